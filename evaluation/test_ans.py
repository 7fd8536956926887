"""Ask a running endpoint every test question of a run's stages, and store the answers (see evaluation/deploy.sh)."""

import sys

from swift_cl.cli.eval import main_ask

if __name__ == "__main__":
    sys.exit(main_ask())

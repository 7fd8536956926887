"""Score the stored answers of a run: the stage x task table, Avg.ACC, Forgetting and New.ACC."""

import sys

from swift_cl.cli.eval import main_score

if __name__ == "__main__":
    sys.exit(main_score())

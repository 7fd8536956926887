"""Exit codes of programs: 0 done, 1 the work failed or is incomplete, 2 the input is wrong, 130 interrupted."""

import sys
from collections.abc import Callable

from swift_cl.errors import RunFailure, UserError


def guarded(program: str, work: Callable[[], int]) -> int:
    """Run `work` and turn our two errors into a line on stderr and their exit code; other errors are bugs and rise."""
    try:
        return work()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except RunFailure as error:
        print(f"{program}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130

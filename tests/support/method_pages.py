"""The table of flags for the page of a method or tuner under assets/, out of its config dataclass.

`python -m tests.support.method_pages NAME` prints it, to be pasted into the page; a test compares the two.
"""

import sys

from swift_cl.methods.base import flags_of
from swift_cl.methods.registry import methods
from swift_cl.settings import Flags
from swift_cl.tuners.registry import tuners


def flag_table(flags: Flags, what: str = "method") -> str:
    """A Markdown table `| flag | default | meaning |`, or one sentence where there are no flags."""
    rows = []
    for flag, field in flags:
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        text = field.metadata["help"].replace("|", r"\|")
        choices = field.metadata.get("choices")
        if choices:
            text += f" One of: {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `--{flag}` | {f'`{default}`' if default else 'empty'} | {text} |")
    if not rows:
        return f"This {what} has no flags of its own."
    return "\n".join(["| flag | default | meaning |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    name = sys.argv[1]
    print(flag_table(flags_of(methods()[name])) if name in methods() else flag_table(tuners()[name].flags(), "tuner"))

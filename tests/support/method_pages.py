"""The table of a method's flags for its page under assets/methods/, out of its config dataclass.

`python -m tests.support.method_pages NAME` prints it, to be pasted into the page; a test compares the two.
"""

import sys

from swift_cl.methods.base import Method, flags_of
from swift_cl.methods.registry import get_method

NO_FLAGS = "This method has no flags of its own."


def flag_table(method: type[Method]) -> str:
    """A Markdown table `| flag | default | meaning |`, or one sentence where there are no flags."""
    rows = []
    for flag, field in flags_of(method):
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        text = field.metadata["help"].replace("|", r"\|")
        choices = field.metadata.get("choices")
        if choices:
            text += f" One of: {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `--{flag}` | {f'`{default}`' if default else 'empty'} | {text} |")
    return "\n".join(["| flag | default | meaning |", "| --- | --- | --- |", *rows]) if rows else NO_FLAGS


if __name__ == "__main__":
    print(flag_table(get_method(sys.argv[1])))

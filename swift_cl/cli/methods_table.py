"""The README's table of methods: every cell is what a method declares."""

from swift_cl.cli.ls import zero_text
from swift_cl.methods.base import Method
from swift_cl.methods.registry import methods

BUILT_IN = "swift_cl.methods."


def _page(method: type[Method]) -> str:
    """A link to its page; for a plug-in the module that it comes from."""
    built_in = method.__module__.startswith(BUILT_IN)
    return f"[{method.name}](assets/methods/{method.name}.md)" if built_in else f"`{method.__module__}`"


def _fsdp(method: type[Method]) -> str:
    support = method.support
    text = "yes" if support.fsdp else "no"
    if "full" in support.tuners and support.full_fsdp != support.fsdp:
        text += f" (full: {'yes' if support.full_fsdp else 'no'})"
    return text


# Header -> cell of a method. A new declaration is a new line here, and nowhere else.
COLUMNS = {
    "method": lambda method: f"`{method.name}`",
    "what it does": lambda method: method.summary or method.title,
    "tuners": lambda method: ", ".join(method.support.tuners),
    "DeepSpeed ZeRO": lambda method: zero_text(method.support),
    "FSDP2": _fsdp,
    "extra cost per step": lambda method: method.cost or "not stated",
    "page": _page,
}


def methods_table() -> str:
    """A Markdown table, a row a method, by name."""
    head = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    rows = [f"| {' | '.join(cell(method) for cell in COLUMNS.values())} |" for method in methods().values()]
    return "\n".join([*head, *rows])

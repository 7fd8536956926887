"""Which methods there are: the files of this folder, and entry points of the group `swift_cl.methods`.

A built-in method is a module here that defines one `Method` subclass. Looking it up imports its file, never torch.
"""

import importlib
import importlib.metadata
import pkgutil
from functools import cache

from swift_cl.errors import UserError, did_you_mean
from swift_cl.methods.base import Method

ENTRY_POINT_GROUP = "swift_cl.methods"
_NOT_METHODS = {"base", "registry"}


def _methods_in(module_name: str) -> list[type[Method]]:
    module = importlib.import_module(module_name)
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name
    ]


@cache
def methods() -> dict[str, type[Method]]:
    """All methods by name, sorted.

    Raises:
        UserError: two of them have the same name, or an entry point does not load or is no `Method`.
    """
    import swift_cl.methods

    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(swift_cl.methods.__path__):
        if info.name not in _NOT_METHODS and not info.name.startswith("_"):
            for method in _methods_in(f"swift_cl.methods.{info.name}"):
                found[method.name] = method
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            method = entry.load()
        except Exception as error:
            raise UserError(f"method plug-in {entry.name!r} ({entry.value}) does not load: {error}") from error
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise UserError(f"method plug-in {entry.name!r} ({entry.value}) is not a subclass of Method")
        if method.name in found and found[method.name] is not method:
            raise UserError(
                f"method plug-in {entry.name!r} ({entry.value}) uses the name {method.name!r}, which is taken by "
                f"{found[method.name].__module__}"
            )
        found[method.name] = method
    return dict(sorted(found.items()))


def get_method(name: str) -> type[Method]:
    """The method of that name; an unknown one is a `UserError` that lists the known ones."""
    known = methods()
    if name not in known:
        hint = did_you_mean(name, list(known))
        raise UserError(f"--cl_method {name!r} is unknown, allowed: {', '.join(known)}{hint}")
    return known[name]

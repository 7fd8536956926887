"""Which tuners of ours there are: files and folders here, and entry points of the group `swift_cl.tuners`.

A built-in tuner is a module here that defines one `Tuner` subclass. Looking it up imports its file, never torch.
"""

import importlib
import importlib.metadata
import pkgutil
from functools import cache
from typing import Any

from swift_cl.errors import UserError, did_you_mean
from swift_cl.tuners.base import Tuner, TunerSettings

ENTRY_POINT_GROUP = "swift_cl.tuners"
FROM_MS_SWIFT = {
    "lora": ("Low-rank adaptation (LoRA)", "LORA", ("pt", "vllm")),
    "full": ("All weights", "-", ("pt", "vllm", "lmdeploy")),
}
"""Name -> title, type of adapter and backends of what is chained over tasks as ms-swift has it."""
_NOT_TUNERS = {"base", "registry", "bridge", "injected", "peft_types"}


@cache
def tuners() -> dict[str, type[Tuner]]:
    """All tuners of ours by name, sorted.

    Raises:
        UserError: two of them have the same name or type, or an entry point does not load or is no `Tuner`.
    """
    import swift_cl.tuners

    found: dict[str, type[Tuner]] = {}
    for info in pkgutil.iter_modules(swift_cl.tuners.__path__):
        if info.name not in _NOT_TUNERS and not info.name.startswith("_"):
            module = importlib.import_module(f"swift_cl.tuners.{info.name}")
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Tuner) and value.__module__ == module.__name__:
                    found[value.name] = value
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            tuner = entry.load()
        except Exception as error:
            raise UserError(f"tuner plug-in {entry.name!r} ({entry.value}) does not load: {error}") from error
        if not (isinstance(tuner, type) and issubclass(tuner, Tuner)):
            raise UserError(f"tuner plug-in {entry.name!r} ({entry.value}) is not a subclass of swift_cl's Tuner")
        taken = [other for other in found.values() if tuner.name == other.name or tuner.peft_type == other.peft_type]
        if tuner.name in FROM_MS_SWIFT or any(other is not tuner for other in taken):
            owner = taken[0].__module__ if taken else "ms-swift"
            raise UserError(
                f"tuner plug-in {entry.name!r} ({entry.value}) uses the name {tuner.name!r} or the type "
                f"{tuner.peft_type}, which is taken by {owner}"
            )
        found[tuner.name] = tuner
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The values of `--tuner_type` that are chained over tasks."""
    return sorted([*FROM_MS_SWIFT, *tuners()])


def get_tuner(name: str) -> type[Tuner]:
    """The tuner of ours of that name; an unknown one is a `UserError` that lists the known ones."""
    if name not in tuners():
        raise UserError(f"--tuner_type {name!r} is unknown, allowed: {', '.join(names())}{did_you_mean(name, names())}")
    return tuners()[name]


def tuner_of_type(peft_type: str) -> type[Tuner] | None:
    """The tuner of ours whose adapters say `peft_type`, None for one of ms-swift's."""
    return next((tuner for tuner in tuners().values() if tuner.peft_type == peft_type), None)


def settings_of(args: Any, tuner: type[Tuner]) -> TunerSettings:
    """The tuner's config out of parsed arguments."""
    return tuner.config_class(**{field.name: getattr(args, flag) for flag, field in tuner.flags()})

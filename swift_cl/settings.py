"""Settings of methods and tuners: one dataclass field is a flag, its default, its help text and its documentation."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swift_cl.errors import UserError

Flags = Iterator[tuple[str, "dataclasses.Field[Any]"]]


@dataclass
class Settings:
    """Base of the config dataclasses. Field `x` with prefix `m` is the flag `--m_x`; the help text is in its metadata.

    A name that Python reserves takes a trailing underscore that the flag does not have: `lambda_` is `--m_lambda`.
    `validate` checks ranges; it runs before anything is loaded.
    """

    def validate(self) -> None:
        """Raise `UserError` through `fail` for a value out of range."""

    def fail(self, prefix: str, name: str, allowed: str) -> None:
        """Refuse the value of a field."""
        raise UserError(f"--{prefix}_{name.rstrip('_')} is {getattr(self, name)!r}, allowed: {allowed}")


def setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A config field with its help text (the one source for `--help` and for the page)."""
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    return dataclasses.field(default=default, metadata=metadata)


def flags_of_settings(prefix: str, config_class: type[Settings]) -> Flags:
    """(flag name without dashes, config field) of a config dataclass."""
    for field in dataclasses.fields(config_class):
        yield f"{prefix}_{field.name.rstrip('_')}", field

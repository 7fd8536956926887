"""Settings of scorers: read from the benchmark file and the command line, checked by the scorer's own model."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from swift_cl.errors import UserError, did_you_mean


class ScorerOptions(BaseModel):
    """Base of a scorer's `Options`: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse(module: ModuleType, name: str, given: Mapping[str, Any], where: str) -> BaseModel | None:
    """The scorer's `Options`; None for a scorer that has none.

    Raises:
        UserError: one line that names the place, the key, what was found and what is allowed.
    """
    model: type[BaseModel] | None = getattr(module, "Options", None)
    known = sorted(model.model_fields) if model else []
    for key in given:
        if key not in known:
            allowed = f"allowed: {', '.join(known)}" if known else f"scorer {name!r} has no settings"
            raise UserError(f"{where}: {name}.{key} is unknown, {allowed}{did_you_mean(key, known)}")
    if model is None:
        return None
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *(str(part) for part in first["loc"])])
        raise UserError(f"{where}: {key}: {first['msg']}, found {first.get('input')!r}") from None

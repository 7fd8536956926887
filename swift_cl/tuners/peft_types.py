"""A new adapter type for PEFT.

PEFT's table of types is an enum, and its saving tests membership in it, so a plain string as a type trains but cannot
be saved. Hiding a new layer inside LoRA would let any plain loader read it as another model. What works is a real
member of the enum, then PEFT's own `register_peft_method`.
"""

import json
from typing import Any

from swift_cl.errors import RunFailure


def add_member(name: str) -> Any:
    """The member `name` of PEFT's `PeftType`, made if it is not there; both its name and its value."""
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # Python 3.12 looks members up as class attributes first, so that one is set first.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    _check(PeftType, name, member)
    return member


def _check(enum: Any, name: str, member: Any) -> None:
    """All that PEFT and JSON do with a type; another version of Python may store its enums in another way."""
    import copy

    works = (
        enum(name) is member
        and enum[name] is member
        and name in list(enum)
        and (member == name and hash(member) == hash(name))
        and json.dumps({"peft_type": member}) == json.dumps({"peft_type": name})
        and copy.deepcopy(member) is member
    )
    if not works:
        raise RunFailure(f"the adapter type {name} cannot be added to PEFT's types on this version of Python")


def register_type(name: str, config_class: type[Any], model_class: type[Any], prefix: str) -> None:
    """Register an adapter type with PEFT; a second time it does nothing.

    Args:
        name: the type, in capitals.
        prefix: what the names of all its trained parameters have in common.

    Raises:
        RunFailure: this version of PEFT has a type of that name already.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    member = add_member(name)
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if present is config_class:
        return
    if present is not None:
        raise RunFailure(f"PEFT has an adapter type {name} of its own ({present.__module__})")
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=model_class, prefix=prefix)

"""The continual-learning flags of `swift-cl sft`, checked before anything heavy is imported."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from swift_cl.errors import UserError, did_you_mean
from swift_cl.methods.base import Method, MethodConfig, flags_of
from swift_cl.methods.registry import get_method, methods

COMMON_FLAGS = {
    "cl_method": "Continual-learning method, one of `swift-cl ls methods`. Without it the command is `swift sft`.",
    "cl_task": "Name of the task that this stage learns.",
    "cl_previous": "Output folder of the stage before: its adapter is continued and its method state is read.",
    "cl_resume": "Continue from the newest complete checkpoint in --output_dir, if there is one (true or false).",
}
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def flag_values(argv: Sequence[str]) -> dict[str, list[str]]:
    """Flags and their values, `--a x y` and `--a=x` alike; the last one of a name wins."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            current = found[name.replace("-", "_")] = [value] if equals else []
        elif current is not None:
            current.append(token)
    return found


def first(given: dict[str, list[str]], flag: str) -> str | None:
    """The first value of a flag, None where it is not given."""
    values = given.get(flag)
    return values[0] if values else None


def check_method_flags(argv: Sequence[str]) -> type[Method] | None:
    """Check every flag of ours in `argv`; returns the method, or None where the command is plain `swift sft`.

    Raises:
        UserError: unknown method, unknown flag of a method, flag of another method, value out of range.
    """
    given = flag_values(argv)
    for flag, values in given.items():
        if flag.startswith("cl_") and flag not in COMMON_FLAGS:
            raise UserError(f"--{flag} is unknown{did_you_mean(flag, list(COMMON_FLAGS))}")
        if flag in COMMON_FLAGS and (len(values) != 1 or not values[0]):
            # An empty --cl_previous (a shell variable that is not set) must not mean "start from the base model".
            raise UserError(f"--{flag} needs one value, found {' '.join(values) or 'none'}")
    name = first(given, "cl_method")
    method = get_method(name) if name is not None else None
    for flag in given:
        _check_owner(flag, method)
    for flag in ("cl_task", "cl_previous", "cl_resume"):
        if flag in given and method is None:
            raise UserError(f"--{flag} needs --cl_method, allowed: {', '.join(methods())}")
    if method is not None:
        if "cl_task" not in given:
            raise UserError("--cl_task is missing: the name of the task that this stage learns")
        if "cl_resume" in given:
            _parse("cl_resume", given["cl_resume"][0], bool)
        config_from_flags(method, given)
    return method


def _check_owner(flag: str, method: type[Method] | None) -> None:
    """Refuse a flag that belongs to another method, or looks like one of a method that has no such flag."""
    for other in methods().values():
        if other is not method and any(flag == name for name, _ in flags_of(other)):
            active = f"--cl_method is {method.name!r}" if method else "no --cl_method is given"
            raise UserError(f"--{flag} is a flag of method {other.name!r}, but {active}")
    # The longest name that fits: with methods `ewc` and `ewc_online`, `ewc_online_x` is one of the second.
    owners = [other for other in methods().values() if flag.startswith(f"{other.name}_")]
    if owners:
        owner = max(owners, key=lambda other: len(other.name))
        own = [name for name, _ in flags_of(owner)]
        if own and not any(flag == name for other in owners for name, _ in flags_of(other)):
            raise UserError(f"--{flag} is unknown, {owner.name} has: {', '.join(own)}{did_you_mean(flag, own)}")


def _parse(flag: str, text: str, kind: Any) -> Any:
    # `float | None` is given as a float.
    kind = next((part for part in typing.get_args(kind) if part is not type(None)), kind)
    if kind is bool or kind == "bool":
        if text.lower() in TRUE:
            return True
        if text.lower() in FALSE:
            return False
        raise UserError(f"--{flag} is {text!r}, allowed: true, false")
    for number, label in ((int, "a whole number"), (float, "a number")):
        if kind is number or kind == number.__name__:
            try:
                return number(text)
            except ValueError:
                raise UserError(f"--{flag} is {text!r}, allowed: {label}") from None
    return text


def config_from_flags(method: type[Method], given: dict[str, list[str]]) -> MethodConfig:
    """The method's config from flags, validated."""
    values = {}
    for flag, field in flags_of(method):
        if flag in given:
            if len(given[flag]) != 1:
                raise UserError(f"--{flag} needs one value, found {len(given[flag])}")
            values[field.name] = _parse(flag, given[flag][0], field.type)
    config = method.config_class(**values)
    check_choices(method, config)
    config.validate()
    return config


def required_by_method(method: type[Method], given: dict[str, list[str]]) -> dict[str, str]:
    """ms-swift flags that the method's settings need and that are not given; one given otherwise is refused."""
    missing = {}
    for flag, value in method(config_from_flags(method, given)).required_flags().items():
        if flag not in given:
            missing[flag] = value
        elif [text.lower() for text in given[flag]] != [value]:
            raise UserError(
                f"--{flag} is {' '.join(given[flag]) or 'empty'}, but method '{method.name}' with these settings needs "
                f"--{flag} {value}"
            )
    return missing


def check_choices(method: type[Method], config: MethodConfig) -> None:
    """Refuse a value outside a field's choices."""
    for flag, field in flags_of(method):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices and value not in choices:
            hint = did_you_mean(str(value), [str(choice) for choice in choices])
            raise UserError(f"--{flag} is {value!r}, allowed: {', '.join(map(str, choices))}{hint}")


def help_text() -> str:
    """The continual-learning flags as text, generated from the config dataclasses."""
    lines = [
        "continual-learning flags (every flag of `swift sft` works too; `swift-cl sft --help-all` lists them):",
        "",
    ]
    for name, text in COMMON_FLAGS.items():
        lines.append(f"  --{name}\n      {text}")
    for method in methods().values():
        own = list(flags_of(method))
        lines.append(f"\n{method.name}: {method.title}" + ("" if own else " (no flags of its own)"))
        for flag, field in own:
            default = field.default if field.default is not dataclasses.MISSING else "required"
            choices = field.metadata.get("choices")
            allowed = f" {{{','.join(map(str, choices))}}}" if choices else ""
            lines.append(f"  --{flag}{allowed} (default: {default})\n      {field.metadata.get('help', '')}")
    return "\n".join(lines)

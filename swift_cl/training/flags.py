"""The continual-learning flags of `swift-cl sft`, checked before anything heavy is imported."""

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from swift_cl.errors import UserError, did_you_mean
from swift_cl.methods.base import Method, MethodConfig, flags_of
from swift_cl.methods.registry import get_method, methods
from swift_cl.settings import Flags, Settings
from swift_cl.tuners.base import Tuner
from swift_cl.tuners.registry import tuners

COMMON_FLAGS = {
    "cl_method": "Continual-learning method, one of `swift-cl ls methods`. Without it the command is `swift sft`.",
    "cl_task": "Name of the task that this stage learns.",
    "cl_previous": "Output folder of the stage before: its adapter is continued and its method state is read.",
    "cl_resume": "Continue from the newest complete checkpoint in --output_dir, if there is one (true or false).",
    "cl_portable": "Write with each checkpoint a copy of what is trained and of its optimizer, from which another "
    "engine or number of processes can continue (true or false; default: true, but with --tuner_type full).",
}
S = TypeVar("S", bound=Settings)
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
        of_a_method = any(flag.startswith(f"{name}_") for name in methods())
        if flag.startswith("cl_") and flag not in COMMON_FLAGS and not of_a_method:
            raise UserError(f"--{flag} is unknown{did_you_mean(flag, list(COMMON_FLAGS))}")
        if flag in COMMON_FLAGS and (len(values) != 1 or not values[0]):
            # An empty --cl_previous (a shell variable that is not set) must not mean "start from the base model".
            raise UserError(f"--{flag} needs one value, found {' '.join(values) or 'none'}")
    name = first(given, "cl_method")
    method = get_method(name) if name is not None else None
    for flag in given:
        _check_owner(flag, method)
    for flag in ("cl_task", "cl_previous", "cl_resume", "cl_portable"):
        if flag in given and method is None:
            raise UserError(f"--{flag} needs --cl_method, allowed: {', '.join(methods())}")
    if method is not None:
        if "cl_task" not in given:
            raise UserError("--cl_task is missing: the name of the task that this stage learns")
        for flag in ("cl_resume", "cl_portable"):
            if flag in given:
                _parse(flag, given[flag][0], bool)
        config_from_flags(method, given)
    check_tuner_flags(flag_values(complete_flags(argv)))
    return method


def complete_flags(argv: Sequence[str]) -> list[str]:
    """The flags with those that the method and the tuner need, and the tuner's own defaults, added.

    Raises:
        UserError: one of them is given with another value.
    """
    argv = list(argv)
    name = first(flag_values(argv), "cl_method")
    if name is not None:
        method = get_method(name)
        needed = method(config_from_flags(method, flag_values(argv))).required_flags()
        argv += _missing(flag_values(argv), needed, f"method '{name}'")
    tuner = tuner_of(flag_values(argv))
    if tuner is not None:
        given = flag_values(argv)
        argv += _missing(given, tuner.required, f"--tuner_type {tuner.name}")
        argv += [part for flag, value in tuner.defaults.items() if flag not in given for part in (f"--{flag}", value)]
    return argv


def _missing(given: dict[str, list[str]], needed: Mapping[str, str], who: str) -> list[str]:
    for flag, value in needed.items():
        if flag in given and [text.lower() for text in given[flag]] != [value.lower()]:
            raise UserError(f"--{flag} {' '.join(given[flag])} does not work with {who}, which needs {value}")
    return [part for flag, value in needed.items() if flag not in given for part in (f"--{flag}", value)]


def tuner_of(given: dict[str, list[str]]) -> type[Tuner] | None:
    """The tuner of ours that the flags name, None where it is one of ms-swift's."""
    return tuners().get(first(given, "tuner_type") or "lora")


def check_tuner_flags(given: dict[str, list[str]]) -> None:
    """Check every flag of a tuner of ours.

    Raises:
        UserError: unknown flag of a tuner, flag of another tuner, value out of range, flag that does not fit.
    """
    tuner = tuner_of(given)
    for other in tuners().values():
        own = [flag for flag, _ in other.flags()]
        for flag in own:
            if other is not tuner and flag in given:
                used = first(given, "tuner_type") or "lora"
                raise UserError(f"--{flag} is a flag of tuner {other.name!r}, but --tuner_type is {used!r}")
        known = {*own, *other.swift_flags, *(name for method in methods().values() for name, _ in flags_of(method))}
        for flag in given:
            if own and flag.startswith(f"{other.prefix}_") and flag not in known:
                raise UserError(f"--{flag} is unknown, {other.name} has: {', '.join(own)}{did_you_mean(flag, own)}")
    if tuner is not None:
        tuner.check_flags(settings_from_flags(tuner.flags(), tuner.config_class, given), given)


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
    return settings_from_flags(flags_of(method), method.config_class, given)


def settings_from_flags(flags: Flags, config_class: type[S], given: dict[str, list[str]]) -> S:
    """A config from flags, validated."""
    values, fields = {}, list(flags)
    for flag, field in fields:
        if flag in given:
            if len(given[flag]) != 1:
                raise UserError(f"--{flag} needs one value, found {len(given[flag])}")
            values[field.name] = _parse(flag, given[flag][0], field.type)
    config = config_class(**values)
    _check_choices(fields, config)
    config.validate()
    return config


def _check_choices(fields: Iterable[tuple[str, dataclasses.Field[Any]]], config: Settings) -> None:
    """Refuse a value outside a field's choices."""
    for flag, field in fields:
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
    groups = [(method.name, method.title, list(flags_of(method))) for method in methods().values()]
    groups += [(f"--tuner_type {t.name}", t.title, list(t.flags())) for t in tuners().values()]
    for name, title, own in groups:
        lines.append(f"\n{name}: {title}" + ("" if own else " (no flags of its own)"))
        for flag, field in own:
            default = field.default if field.default is not dataclasses.MISSING else "required"
            choices = field.metadata.get("choices")
            allowed = f" {{{','.join(map(str, choices))}}}" if choices else ""
            lines.append(f"  --{flag}{allowed} (default: {default})\n      {field.metadata.get('help', '')}")
    return "\n".join(lines)

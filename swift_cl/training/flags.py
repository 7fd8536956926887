"""The continual-learning flags of `swift-cl sft`, checked before anything heavy is imported."""

import dataclasses
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
    names = given.get("cl_method", [])
    method = get_method(names[-1]) if names else None
    if "cl_method" in given and not names:
        raise UserError(f"--cl_method needs a value, allowed: {', '.join(methods())}")
    for flag in given:
        if flag.startswith("cl_") and flag not in COMMON_FLAGS:
            raise UserError(f"--{flag} is unknown{did_you_mean(flag, list(COMMON_FLAGS))}")
        for other in methods().values():
            if flag.startswith(f"{other.name}_"):
                own = [name for name, _ in flags_of(other)]
                if flag not in own and own:
                    raise UserError(f"--{flag} is unknown, {other.name} has: {', '.join(own)}{did_you_mean(flag, own)}")
                if flag in own and other is not method:
                    active = f"--cl_method is {method.name!r}" if method else "no --cl_method is given"
                    raise UserError(f"--{flag} is a flag of method {other.name!r}, but {active}")
    for flag in ("cl_task", "cl_previous", "cl_resume"):
        if flag in given and method is None:
            raise UserError(f"--{flag} needs --cl_method, allowed: {', '.join(methods())}")
    if method is not None:
        if not given.get("cl_task"):
            raise UserError("--cl_task is missing: the name of the task that this stage learns")
        config_from_flags(method, given)
    return method


def _parse(flag: str, text: str, kind: Any) -> Any:
    if kind is bool or kind == "bool":
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
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

"""Every flag of every method and tuner refuses what is out of its range, in one line and before torch is there.

A flag is tested by being registered: its range is read from its help text, which must say one.
"""

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from swift_cl.errors import UserError
from swift_cl.methods.base import flags_of
from swift_cl.methods.registry import methods
from swift_cl.training.flags import check_method_flags
from swift_cl.tuners.registry import tuners

INTERVAL = re.compile(r"\b[Ii]n ([\[(])([\d.]+), ([\d.]+)([\])])")
FROM_TO = re.compile(r"\b(\d+) to (\d+)\b")
ABOVE = re.compile(r"(>=|>) (\d+(?:\.\d+)?)")
BELOW = re.compile(r"< (\d+)\b")
SPECIAL = re.compile(r"(?:^|[\s;,(])(-?\d+(?:\.\d+)?) (?:is|for|uses|=|trains|takes|leaves)\b")
"""Values beside the range that a help text gives a meaning: "0 is all"."""


@dataclasses.dataclass(frozen=True)
class Flag:
    argv: tuple[str, ...]
    name: str
    kind: type
    help: str
    choices: tuple[str, ...]


def every_flag() -> Iterator[Flag]:
    owners: list[tuple[tuple[str, ...], Any]] = [
        (("--cl_method", method.name, "--cl_task", "t"), flags_of(method)) for method in methods().values()
    ]
    owners += [(("--tuner_type", tuner.name), tuner.flags()) for tuner in tuners().values()]
    for argv, fields in owners:
        for name, field in fields:
            names = {"int": int, "float": float, "bool": bool, "str": str}
            kinds = [names.get(part, part) for part in (typing.get_args(field.type) or (field.type,))]
            kind = next(part for part in kinds if part is not type(None))
            yield Flag(argv, name, kind, field.metadata["help"], tuple(field.metadata.get("choices") or ()))


FLAGS = list(every_flag())


def below(least: float, included: bool, flag: Flag) -> list[str]:
    """Values under a lower bound, without those that mean something else."""
    special = {float(text) for text in SPECIAL.findall(flag.help)}
    if flag.kind is int:
        first = int(least) - 1 if included else int(least)
        return [str(value) for value in range(first, -4, -1) if value not in special]
    found = [least - 1e-6, -2.0] if included else [least, least - 1e-6, -2.0]
    return [repr(value) for value in found if value not in special]


def out_of_range(flag: Flag) -> list[str]:
    """Values of a number flag that its help text excludes."""
    found = ["nan", "inf", "-inf"] if flag.kind is float else []
    if match := INTERVAL.search(flag.help):
        start, low, high, end = match.groups()
        found += below(float(low), start == "[", flag)
        found.append(repr(float(high) + 1e-6) if end == "]" else high)
    elif match := ABOVE.search(flag.help):
        found += below(float(match[2]), match[1] == ">=", flag)
    elif match := BELOW.search(flag.help):
        found += [match[1], str(int(match[1]) + 2)]
    elif match := FROM_TO.search(flag.help):
        found += [str(int(match[1]) - 1), "-2", str(int(match[2]) + 1)]
    else:
        raise AssertionError(f"--{flag.name}: its help says no range: {flag.help}")
    return found


def wrong_values(flag: Flag) -> list[str]:
    if flag.choices:
        return ["nonsense", ""]
    if flag.kind is bool:
        return ["perhaps", "2"]
    if flag.kind in (int, float):
        return ["nonsense", "", *(["1.5"] if flag.kind is int else []), *out_of_range(flag)]
    return []


CASES = [(flag, value) for flag in FLAGS for value in wrong_values(flag)]


@pytest.mark.parametrize("flag", [f for f in FLAGS if wrong_values(f)], ids=lambda flag: flag.name)
def test_a_wrong_value_is_refused_in_one_line(flag: Flag) -> None:
    for value in wrong_values(flag):
        with pytest.raises(UserError) as refused:
            check_method_flags([*flag.argv, f"--{flag.name}={value}"])
        text = str(refused.value)
        assert text.startswith(f"--{flag.name} "), text
        assert re.search(r" is .+, allowed: \S", text), text
        assert "\n" not in text
        for choice in flag.choices:
            assert str(choice) in text.partition("allowed: ")[2], text


def test_ranges_as_they_are_read() -> None:
    def of(kind: type, text: str) -> list[str]:
        return out_of_range(Flag((), "x", kind, text, ()))

    assert of(int, "Rows, >= 1.") == ["0", "-1", "-2", "-3"]
    assert of(int, "Tokens, >= 2; 0 is the full vocabulary.") == ["1", "-1", "-2", "-3"]
    assert of(int, "Seed, >= 0; -1 is the run's seed.") == ["-2", "-3"]
    assert of(int, "Embeddings, 1 to 1024.") == ["0", "-2", "1025"]
    assert of(float, "Share, in (0, 1].") == ["nan", "inf", "-inf", "0.0", "-1e-06", "-2.0", "1.000001"]
    assert of(float, "Share, in [0, 1).")[3:] == ["-1e-06", "-2.0", "1"]
    assert of(float, "Epochs, > 0; 0 for those of the stage.")[3:] == ["-1e-06", "-2.0"]
    with pytest.raises(AssertionError, match="its help says no range"):
        of(float, "How much.")


def test_none_of_it_needs_torch() -> None:
    """In a process of its own: all wrong values, and then torch has not been imported."""
    code = (
        "import sys\n"
        "from tests.unit.test_flag_ranges import CASES, UserError, check_method_flags\n"
        "for flag, value in CASES:\n"
        "    try:\n"
        "        check_method_flags([*flag.argv, f'--{flag.name}={value}'])\n"
        "    except UserError:\n"
        "        continue\n"
        "    raise SystemExit(f'{flag.name} {value} was accepted')\n"
        "print(len(CASES), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(CASES)), "False"]
    assert len(CASES) > 500

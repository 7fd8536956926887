"""The README's table of methods says what the registry declares."""

import re

import pytest

from swift_cl.cli.ls import zero_text
from swift_cl.methods.base import Support
from swift_cl.methods.registry import methods
from tests.conftest import ROOT

CELLS = (r"`(\w+)`", r"[^|]+", r"([^|]+)", r"([^|]+)", r"[^|]+", r"\[(\w+)\]\(assets/methods/(\w+)\.md\)")
ROW = re.compile(r"^\| " + r" \| ".join(CELLS) + r" \|$", re.MULTILINE)


def rows() -> dict[str, tuple[str, str]]:
    """By method: its tuners and its ZeRO stages."""
    found = ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    for name, _, _, label, page in found:
        assert name == label == page
    return {name: (tuners, zero) for name, tuners, zero, _, _ in found}


def test_every_method_has_a_row() -> None:
    assert rows().keys() == methods().keys()


@pytest.mark.parametrize("method", sorted(methods()))
def test_the_row_is_what_the_method_declares(method: str) -> None:
    support = methods()[method].support
    tuners, zero = rows()[method]
    assert tuners.split(", ") == list(support.tuners)
    assert zero == zero_text(support)


def test_text() -> None:
    assert zero_text(Support()) == "0-3"
    assert zero_text(Support(deepspeed=())) == "no (full: 0-3)"
    assert zero_text(Support(tuners=("lora",), deepspeed=(0, 1, 2), zero0_low_precision=False)) == "0 (fp32), 1-2"
    assert zero_text(Support(full_deepspeed=(0,))) == "0-3 (full: 0)"
    assert zero_text(Support(deepspeed=(0, 2), full_deepspeed=())) == "0, 2 (full: no)"

"""What a step sends under ZeRO-2; under DDP: tests/integration/test_two_processes.py."""

import os

import pytest

from tests.benchmarks.communication import measure

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("SWIFT_CL_DISTRIBUTED") != "all", reason="sh tests/run.sh --distributed runs it"),
]
COUNTS = 8
"""Bytes of a logged value."""


def test_terms_of_the_weights_send_nothing_under_zero2() -> None:
    found = measure(["ewc", "o_lora", "lwf", "gem"], "zero2")
    assert all(found[name][0] <= COUNTS for name in ("ewc", "o_lora", "lwf")), found
    beyond, gradient = found["gem"]
    assert beyond >= gradient

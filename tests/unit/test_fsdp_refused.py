"""What cannot be trained under FSDP2 is refused before a model is loaded, in one line that says what to use instead."""

import json
from pathlib import Path
from typing import Any

import pytest

from swift_cl.errors import UserError
from swift_cl.methods.base import Support
from swift_cl.methods.registry import get_method
from swift_cl.training.arguments import check_tuner_support, parse_stage_arguments
from swift_cl.tuners.base import TunerSupport
from swift_cl.tuners.registry import tuners
from tests.support.train import stage_argv

# What ms-swift and accelerate set when they read the flag.
VARIABLES = (
    "ACCELERATE_USE_FSDP",
    "FSDP_VERSION",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "TORCH_NCCL_AVOID_RECORD_STREAMS",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def refusal(tmp_path: Path, method: str = "seq", **flags: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_stage_arguments(stage_argv(method, "2022", tmp_path / "out", **{"fsdp": "fsdp2", **flags}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("support", "flags", "said"),  # one process: what the method cannot do is said before that
    [
        (
            Support(fsdp=False),
            {},
            "--fsdp does not work with method 'seq'; use --deepspeed zero3 or DDP (neither flag)",
        ),
        (Support(fsdp=False, deepspeed=()), {}, "--fsdp does not work with method 'seq'; use DDP (neither flag)"),
        (
            Support(full_fsdp=False, full_deepspeed=(0, 1)),
            {"tuner_type": "full"},
            "--fsdp does not work with method 'seq' in full fine-tuning; use --deepspeed zero1 or DDP (neither flag)",
        ),
    ],
)
def test_a_method_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, support: Support, flags: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(get_method("seq"), "support", support)
    assert refusal(tmp_path, **flags) == said


def test_a_tuner_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Args:
        deepspeed, fsdp = None, "full_shard auto_wrap"

    monkeypatch.setattr(tuners()["moelora"], "support", TunerSupport(fsdp=False))
    with pytest.raises(UserError, match="--fsdp does not work with --tuner_type moelora; use --deepspeed zero3 or DDP"):
        check_tuner_support(Args, tuners()["moelora"])


def test_one_process_has_nothing_to_shard(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "--fsdp needs several processes, found 1: set NPROC_PER_NODE, or leave it out"


def test_the_first_fsdp(tmp_path: Path) -> None:
    file = tmp_path / "fsdp1.json"
    file.write_text(json.dumps({"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 1}}))
    assert refusal(tmp_path, fsdp=str(file)) == "--fsdp: fsdp_version is 1, allowed: 2 (`--fsdp fsdp2`)"

"""The chain: equal to ms-swift by hand, equal across processes, and equal when it was killed and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.stages import load_run
from tests.support.commands import environment, run_swift_cl, swift_cl_command, write_run_file
from tests.support.train import TASKS, adapter, stage_argv, train_stage

pytestmark = pytest.mark.slow


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """seq and cia over two tasks, by `swift-cl run`, in one process."""
    folder = tmp_path_factory.mktemp("chain")
    run_swift_cl("run", str(write_run_file(folder, ["seq", "cia"], report_to="tensorboard")), "--mode", "train_only")
    return folder / "runs"


def test_seq_equals_swift_sft(tmp_path: Path) -> None:
    """One stage of seq is `swift sft` with the same flags, bit for bit."""
    from safetensors.torch import load_file

    train_stage("seq", TASKS[0], tmp_path / "ours")
    argv = stage_argv("seq", TASKS[0], tmp_path / "theirs")
    for flag in ("--cl_method", "--cl_task", "--cl_resume"):
        position = argv.index(flag)
        del argv[position : position + 2]
    command = [sys.executable, "-c", "from swift.cli.main import cli_main; cli_main()", "sft", *argv]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(
        adapter(tmp_path / "ours"), load_file(tmp_path / "theirs" / "checkpoint-4" / "adapter_model.safetensors")
    )


@pytest.mark.parametrize("method", ["seq", "cia"])
def test_shared_base_equals_a_process_a_stage(chain: Path, tmp_path: Path, method: str) -> None:
    """Stages that reuse the loaded base model equal stages that load it each time."""
    first = tmp_path / "1"
    train_stage(method, TASKS[0], first)
    train_stage(method, TASKS[1], tmp_path / "2", first)
    assert_equal(adapter(chain / method / "stage_1_2022"), adapter(first))
    assert_equal(adapter(chain / method / "stage_2_2023"), adapter(tmp_path / "2"))


def test_every_stage_has_its_own_tensorboard_log(chain: Path) -> None:
    """ms-swift keeps the first folder of a process in the environment; all stages are trained in one process."""
    from tests.eval.test_trackers import scalars

    for stage in chain.glob("*/stage_*"):
        assert [step for step, _ in scalars(stage / "runs")["train/loss"]] == [1, 2, 3, 4], stage
    assert len(list(chain.glob("*/stage_*"))) == 4


def test_base_model_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switching stages inside one `swift-cl run` costs no second model load."""
    from swift.pipelines import SwiftSft

    from swift_cl.workflow.chain import main
    from swift_cl.workflow.config import load_config
    from swift_cl.workflow.run import prepare

    config, benchmark = load_config(write_run_file(tmp_path, ["seq", "lwf"], max_steps=1), [])
    plans = prepare(config, benchmark, overwrite=False)
    loads = []
    original = SwiftSft._prepare_model_tokenizer

    def counted(self: Any, **kwargs: Any) -> Any:
        loads.append(self)
        return original(self, **kwargs)

    monkeypatch.setattr(SwiftSft, "_prepare_model_tokenizer", counted)
    main([plan.run_dir for plan in plans])
    assert len(loads) == 1
    assert [stage.task for stage in load_run(Path(plans[1].run_dir)).stages] == list(TASKS)


def test_killed_chain_continues_with_the_same_result(chain: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second stage, then the same command again."""
    config = write_run_file(tmp_path, ["seq", "cia"])
    command = swift_cl_command("run", str(config), "--mode", "train_only")
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    watched = tmp_path / "runs" / "cia" / "stage_2_2023" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 600
    while not watched.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert watched.exists()
    assert not (watched.parent.parent / "stage.json").exists(), "killed too late to show anything"
    for method in ("seq", "cia"):
        assert load_run(tmp_path / "runs" / method).benchmark, "what is finished cannot be evaluated before all is"
    again = run_swift_cl("run", str(config), "--mode", "train_only")
    assert again.stdout.count("is finished already") == 3
    for method in ("seq", "cia"):
        for stage in ("stage_1_2022", "stage_2_2023"):
            assert_equal(adapter(chain / method / stage), adapter(tmp_path / "runs" / method / stage))

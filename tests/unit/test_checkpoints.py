"""The adapter that the next stage starts from is found, never guessed; what was cut off is never chosen."""

import json
import os
import shutil
from pathlib import Path

import pytest

from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.io import write_json
from swift_cl.training.checkpoints import (
    complete_checkpoints,
    find_stage_dir,
    resolve_adapter,
    resumable_checkpoint,
    safetensors_complete,
)
from tests.support.stages import cut_in_half, make_adapter, make_checkpoint, make_model, make_stage

WEIGHTS = "adapter_model.safetensors"


def damage(checkpoint: Path, how: str) -> None:
    """Cut a checkpoint off in one of the ways in which a kill or a full disk does it."""
    if how == "half weights":
        cut_in_half(checkpoint / WEIGHTS)
    elif how == "header only":
        content = (checkpoint / WEIGHTS).read_bytes()
        (checkpoint / WEIGHTS).write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    elif how == "empty weights":
        (checkpoint / WEIGHTS).write_bytes(b"")
    elif how == "no weights":
        (checkpoint / WEIGHTS).unlink()
    elif how == "no adapter_config.json":
        (checkpoint / "adapter_config.json").unlink()
    elif how == "no trainer_state.json":
        (checkpoint / "trainer_state.json").unlink()
    elif how == "half trainer_state.json":
        cut_in_half(checkpoint / "trainer_state.json")
    elif how == "other trainer_state.json":
        (checkpoint / "trainer_state.json").write_text("[]")
    else:
        raise AssertionError(how)


DAMAGE = [
    "half weights", "header only", "empty weights", "no weights", "no adapter_config.json",
    "no trainer_state.json", "half trainer_state.json", "other trainer_state.json",
]  # fmt: skip


class TestSafetensorsComplete:
    def test_every_cut_is_seen(self, tmp_path: Path) -> None:
        path = make_adapter(tmp_path / "a") / WEIGHTS
        content = path.read_bytes()
        assert safetensors_complete(path)
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert not safetensors_complete(path), length
        path.write_bytes(content + b"x")
        assert not safetensors_complete(path)

    def test_missing(self, tmp_path: Path) -> None:
        assert not safetensors_complete(tmp_path / "gone.safetensors")


class TestStagesOfOurs:
    def test_finished_stage_gives_its_recorded_adapter(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s")
        make_checkpoint(tmp_path / "s", 4, 4)
        assert resolve_adapter(tmp_path / "s") == stage.weights_dir

    def test_damaged_stage_is_refused_even_if_a_checkpoint_is_left(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s")
        make_checkpoint(tmp_path / "s", 4, 4)
        cut_in_half(stage.weights_dir / WEIGHTS)
        with pytest.raises(UserError, match="differs from the hash"):
            resolve_adapter(tmp_path / "s")

    def test_stopped_before_its_state_was_written(self, tmp_path: Path) -> None:
        """The weights of its last step are there, the method's state and exported weights are not."""
        make_checkpoint(tmp_path, 4, 4)
        write_json(tmp_path / "stage_started.json", {})
        with pytest.raises(UserError, match=r"the stage's end was not written \(checkpoint-4 is"):
            resolve_adapter(tmp_path)

    def test_newest_finished_version(self, tmp_path: Path) -> None:
        """`v10` is newer than `v9`, whatever the clock of the file system says (a copied folder)."""
        for number in (9, 10):
            make_stage(tmp_path / f"v{number}-20250101-000000", seed=number)
        make_checkpoint(tmp_path / "v11-20250102-000000", 2, 4)
        os.utime(tmp_path / "v9-20250101-000000" / "stage.json")
        assert find_stage_dir(tmp_path).name == "v10-20250101-000000"
        assert resolve_adapter(tmp_path).parent.name == "v10-20250101-000000"


class TestPlainSwiftSft:
    def test_last_checkpoint_of_a_version_folder(self, tmp_path: Path) -> None:
        output = tmp_path / "v0-20250101-120000"
        for step in (2, 4, 10):
            make_checkpoint(output, step, 10)
        (output / "last-checkpoint").symlink_to("checkpoint-2")
        assert resolve_adapter(tmp_path) == (output / "checkpoint-10").resolve()
        assert resolve_adapter(output) == (output / "checkpoint-10").resolve()

    def test_checkpoint_and_adapter_folders_themselves(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path, 2, 4)
        assert resolve_adapter(checkpoint) == checkpoint.resolve()
        adapter = make_adapter(tmp_path / "adapter")
        assert resolve_adapter(adapter) == adapter.resolve()

    @pytest.mark.parametrize("how", [h for h in DAMAGE if h != "no adapter_config.json"])
    def test_checkpoint_folder_that_was_cut_off(self, tmp_path: Path, how: str) -> None:
        checkpoint = make_checkpoint(tmp_path, 4, 4)
        damage(checkpoint, how)
        with pytest.raises(UserError, match="checkpoint-4: the adapter in this folder was cut off"):
            resolve_adapter(checkpoint)

    @pytest.mark.parametrize("how", DAMAGE)
    def test_cut_off_last_checkpoint_is_never_chosen(self, tmp_path: Path, how: str) -> None:
        """Neither is the one before it: training has not reached its end there."""
        make_checkpoint(tmp_path, 2, 4)
        damage(make_checkpoint(tmp_path, 4, 4), how)
        with pytest.raises(UserError) as caught:
            resolve_adapter(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path}: no finished stage and no complete final checkpoint: training stopped at step 2 of 4 "
            "(checkpoint-2 is its last complete checkpoint)"
        )

    @pytest.mark.parametrize("how", DAMAGE)
    def test_nothing_but_cut_off_checkpoints(self, tmp_path: Path, how: str) -> None:
        damage(make_checkpoint(tmp_path, 4, 4), how)
        with pytest.raises(UserError, match="its checkpoints were cut off while they were written"):
            resolve_adapter(tmp_path)

    def test_empty_folder_does_not_claim_checkpoints(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            resolve_adapter(tmp_path)
        assert str(caught.value) == f"{tmp_path}: no finished stage and no complete final checkpoint"

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gone: folder not found"):
            resolve_adapter(tmp_path / "gone")


class TestShardedModel:
    def shards(self, output: Path) -> Path:
        """A checkpoint of full fine-tuning in two files with an index."""
        checkpoint = make_checkpoint(output, 4, 4)
        for name in ("adapter_config.json", WEIGHTS):
            (checkpoint / name).unlink()
        weights = {}
        for number in (1, 2):
            name = f"model-0000{number}-of-00002.safetensors"
            shutil.copy(make_model(output / str(number)) / "model.safetensors", checkpoint / name)
            weights[f"w{number}"] = name
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        return checkpoint

    def test_whole(self, tmp_path: Path) -> None:
        checkpoint = self.shards(tmp_path)
        assert resolve_adapter(tmp_path) == checkpoint.resolve()

    @pytest.mark.parametrize("what", ["shard missing", "half index"])
    def test_cut_off(self, tmp_path: Path, what: str) -> None:
        checkpoint = self.shards(tmp_path)
        if what == "shard missing":
            (checkpoint / "model-00002-of-00002.safetensors").unlink()
        else:
            cut_in_half(checkpoint / "model.safetensors.index.json")
        with pytest.raises(UserError, match="cut off"):
            resolve_adapter(tmp_path)


class TestResumable:
    def test_newest_complete_one(self, tmp_path: Path) -> None:
        for step in (2, 4, 10):
            make_checkpoint(tmp_path, step, 12)
        assert [step for step, _, _ in complete_checkpoints(tmp_path)] == [2, 4, 10]
        assert resumable_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
        damage(tmp_path / "checkpoint-10", "half weights")
        assert resumable_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    def test_needs_the_optimizer(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path, 2, 4)
        (make_checkpoint(tmp_path, 4, 4) / "optimizer.pt").unlink()
        assert resumable_checkpoint(tmp_path) == tmp_path / "checkpoint-2"

    def test_deepspeed_keeps_its_optimizer_elsewhere(self, tmp_path: Path) -> None:
        checkpoint = make_checkpoint(tmp_path, 4, 4)
        (checkpoint / "optimizer.pt").unlink()
        (checkpoint / "global_step4").mkdir()
        assert resumable_checkpoint(tmp_path) == checkpoint

    def test_nothing(self, tmp_path: Path) -> None:
        assert resumable_checkpoint(tmp_path) is None
        assert resumable_checkpoint(tmp_path / "gone") is None


class TestCommand:
    def test_prints_the_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        stage = make_stage(tmp_path / "s")
        with pytest.raises(SystemExit) as stopped:
            main(["resolve-adapter", str(tmp_path / "s")])
        assert stopped.value.code == 0
        assert capsys.readouterr().out == f"{stage.weights_dir}\n"

    def test_exit_code_2_and_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_checkpoint(tmp_path, 2, 4)
        with pytest.raises(SystemExit) as stopped:
            main(["resolve-adapter", str(tmp_path)])
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"swift-cl: error: {tmp_path}: no finished stage")
        assert captured.err.count("\n") == 1

"""A stage is complete or refused, and a run folder can be moved."""

import shutil
from pathlib import Path

import pytest

from swift_cl.errors import UserError
from swift_cl.io import read_json, write_json
from swift_cl.stages import Run, check_started_from, finished_stages, load_run, load_stage, stage_dir_name
from tests.support.stages import cut_in_half, make_adapter, make_stage


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two finished stages and their run.json."""
    folder = tmp_path / "run"
    one = make_stage(folder / "stage_1_2022")
    two = make_stage(folder / "stage_2_2023", one, seed=1, task="2023")
    Run(folder, "r", "b.yaml", None, ["2022", "2023"], "seq", "base", {}, 42, [one, two]).save()
    return folder


class TestLoadStage:
    def test_round_trip(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s", system="新闻", train={"steps": 3})
        assert load_stage(tmp_path / "s") == stage

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            load_stage(tmp_path / "gone")
        assert str(caught.value) == f"{tmp_path / 'gone'}: stage folder not found"

    def test_unfinished(self, tmp_path: Path) -> None:
        make_adapter(tmp_path / "s" / "adapter")
        with pytest.raises(UserError, match=r"unfinished \(no stage.json\)"):
            load_stage(tmp_path / "s")

    def test_half_stage_file(self, tmp_path: Path) -> None:
        make_stage(tmp_path / "s")
        cut_in_half(tmp_path / "s" / "stage.json")
        with pytest.raises(UserError, match=r"stage.json: not valid JSON"):
            load_stage(tmp_path / "s")

    @pytest.mark.parametrize("change", [{"schema": 2}, {"schema": None}, {"unknown": 1}, {"task": ...}])
    def test_other_stage_file(self, tmp_path: Path, change: dict[str, object]) -> None:
        make_stage(tmp_path / "s")
        file = tmp_path / "s" / "stage.json"
        value = {**read_json(file), **change}
        write_json(file, {key: item for key, item in value.items() if item is not ...})
        with pytest.raises(UserError, match="not a stage file of schema 1"):
            load_stage(tmp_path / "s")

    def test_stage_file_that_is_a_list(self, tmp_path: Path) -> None:
        make_stage(tmp_path / "s")
        write_json(tmp_path / "s" / "stage.json", [])
        with pytest.raises(UserError, match="not a stage file"):
            load_stage(tmp_path / "s")

    def test_cut_off_adapter(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s")
        cut_in_half(stage.weights_dir / "adapter_model.safetensors")
        with pytest.raises(UserError, match=r"adapter_model.safetensors: the adapter differs from the hash"):
            load_stage(tmp_path / "s")

    def test_exchanged_adapter(self, tmp_path: Path) -> None:
        """A whole adapter, but another one."""
        stage = make_stage(tmp_path / "s")
        shutil.rmtree(stage.weights_dir)
        make_adapter(stage.weights_dir, seed=7)
        with pytest.raises(UserError, match="differs from the hash"):
            load_stage(tmp_path / "s")

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_adapter_with_a_file_missing(self, tmp_path: Path, name: str) -> None:
        stage = make_stage(tmp_path / "s")
        (stage.weights_dir / name).unlink()
        with pytest.raises(UserError, match=name):
            load_stage(tmp_path / "s")

    def test_full_model(self, tmp_path: Path) -> None:
        make_stage(tmp_path / "s", weights="model", weights_sha256=None, tuner_type="full")
        with pytest.raises(UserError, match="model: folder not found"):
            load_stage(tmp_path / "s")
        (tmp_path / "s" / "model").mkdir()
        assert load_stage(tmp_path / "s").weights_dir == (tmp_path / "s" / "model").resolve()


class TestRunFolder:
    def test_moved(self, run_dir: Path, tmp_path: Path) -> None:
        before = load_run(run_dir)
        moved = tmp_path / "elsewhere" / "renamed"
        moved.parent.mkdir()
        run_dir.rename(moved)
        run = load_run(moved)
        assert [stage.dir for stage in run.stages] == [moved / "stage_1_2022", moved / "stage_2_2023"]
        assert all(stage.weights_dir.is_relative_to(moved.resolve()) for stage in run.stages)
        started = run.stages[1].started_from
        assert started is not None
        assert (run.stages[1].dir / started["dir"]).resolve() == run.stages[0].dir.resolve()
        assert (run.order, run.name, run.seed) == (before.order, before.name, before.seed)

    def test_without_run_file(self, run_dir: Path) -> None:
        """A recipe's output is described by its stages."""
        (run_dir / "run.json").unlink()
        run = load_run(run_dir)
        assert (run.order, run.method, run.model) == (["2022", "2023"], "seq", "Qwen/Qwen2.5-7B")
        assert run.benchmark is None

    def test_stages_come_by_number_not_by_name(self, tmp_path: Path) -> None:
        for number in (10, 2, 1, 9):
            make_stage(tmp_path / f"stage_{number}_t{number}", task=f"t{number}")
        assert [stage.task for stage in finished_stages(tmp_path)] == ["t1", "t2", "t9", "t10"]

    def test_unfinished_stage_is_left_out_and_a_damaged_one_refused(self, run_dir: Path) -> None:
        make_adapter(run_dir / "stage_3_2024" / "adapter")
        assert len(finished_stages(run_dir)) == 2
        cut_in_half(run_dir / "stage_1_2022" / "adapter" / "adapter_model.safetensors")
        with pytest.raises(UserError, match="stage_1_2022"):
            load_run(run_dir)

    def test_two_stages_with_one_number(self, run_dir: Path) -> None:
        make_stage(run_dir / "stage_1_2025", task="2025")
        with pytest.raises(UserError, match="stage_1_2022 and stage_1_2025 are both stage 1"):
            load_run(run_dir)

    def test_missing_and_empty(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="run folder not found"):
            load_run(tmp_path / "gone")
        with pytest.raises(UserError, match="no finished stage"):
            load_run(tmp_path)

    @pytest.mark.parametrize("value", [[], {}, {"schema": 2}, {"schema": 1, "name": "x"}])
    def test_other_run_file(self, run_dir: Path, value: object) -> None:
        write_json(run_dir / "run.json", value)
        with pytest.raises(UserError, match="not a run file of schema 1"):
            load_run(run_dir)

    def test_names(self) -> None:
        assert stage_dir_name(0, "2022") == "stage_1_2022"


class TestStartedFrom:
    def test_fitting(self, tmp_path: Path) -> None:
        one = make_stage(tmp_path / "1")
        check_started_from(one, None)
        check_started_from(make_stage(tmp_path / "2", one, seed=1), one)

    def test_the_stage_before_was_trained_again(self, tmp_path: Path) -> None:
        one = make_stage(tmp_path / "1")
        two = make_stage(tmp_path / "2", one, seed=1)
        shutil.rmtree(one.dir)
        with pytest.raises(UserError, match=r"2: was trained from other weights than .*1 now has"):
            check_started_from(two, make_stage(tmp_path / "1", seed=9))

    def test_one_has_no_stage_before(self, tmp_path: Path) -> None:
        one = make_stage(tmp_path / "1", weights_sha256=None)
        two = make_stage(tmp_path / "2", one, weights_sha256=None)
        with pytest.raises(UserError, match="than the base model now has"):
            check_started_from(two, None)
        with pytest.raises(UserError, match=r"than .*1 now has"):
            check_started_from(make_stage(tmp_path / "3"), one)

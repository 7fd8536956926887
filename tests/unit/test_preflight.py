"""Wrong input of a stage is one clear line before anything starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from swift_cl.cli import sft as command
from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.training.preflight import (
    check_data,
    check_model,
    finished_stage,
    load_previous,
    looks_local,
    start_of_stage,
)
from tests.support.stages import cut_in_half, make_adapter, make_model, make_stage

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def data_file(folder: Path, content: Any, name: str = "d.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class TestData:
    @pytest.mark.parametrize("spec", ["{}", "{}#1"])
    def test_good_file(self, tmp_path: Path, spec: str) -> None:
        check_data([spec.format(data_file(tmp_path, [ROW]))])

    @pytest.mark.parametrize(
        "spec", ["AI-ModelScope/alpaca-gpt4-data-zh#500", "HF::tatsu-lab/alpaca", "swift/self-cognition"]
    )
    def test_what_is_no_local_file_is_left_to_ms_swift(self, spec: str) -> None:
        check_data([spec])

    def test_other_columns_are_left_to_ms_swift(self, tmp_path: Path) -> None:
        check_data([str(data_file(tmp_path, [{"instruction": "q", "output": "a"}]))])
        check_data([str(data_file(tmp_path, "q,a\n1,2\n", "d.csv"))])
        check_data([str(tmp_path)])

    @pytest.mark.parametrize("spec", ["{}/gone.json", "{}/gone.jsonl#10", "{}/gone.csv"])
    def test_missing(self, tmp_path: Path, spec: str) -> None:
        with pytest.raises(UserError, match=r"--dataset .*gone\.\w+: data file not found"):
            check_data([spec.format(tmp_path)])

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("", "d.json: the data file is empty"),
            ("\ufeff[]", "d.json: begins with a byte order mark; save it as UTF-8 without one"),
            (" \n\n", "d.json: the data file has no rows"),
            ("[]", "d.json: the data file has no rows"),
            ('[{"messages": ]', "d.json, row 0: not valid JSON"),
            (json.dumps(ROW) + "\n{half", "d.json, row 1: not valid JSON"),
            ([ROW, {"messages": ROW["messages"][:1]}], "d.json, row 1: no assistant turn"),
            ([ROW, {"instruction": "q"}], "d.json, row 1: expected an object with a 'messages' list"),
        ],
    )
    def test_wrong(self, tmp_path: Path, content: Any, said: str) -> None:
        good = data_file(tmp_path, [ROW], "good.json")
        with pytest.raises(UserError) as caught:
            check_data([str(good), str(data_file(tmp_path, content))])
        assert said in str(caught.value)


class TestModel:
    @pytest.mark.parametrize("model", ["Qwen/Qwen2.5-7B", "qwen"])
    def test_hub_id(self, model: str) -> None:
        check_model(model)

    @pytest.mark.parametrize("model", ["/gone/model", "./gone", "~/gone", "a/b/c"])
    def test_missing_folder(self, model: str) -> None:
        assert looks_local(model)
        with pytest.raises(UserError, match="model folder not found"):
            check_model(model)

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"the folder has no config.json"):
            check_model(str(tmp_path))
        check_model(str(make_model(tmp_path / "m")))


class TestPrevious:
    def test_missing_and_unfinished(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gone: stage folder not found"):
            load_previous(str(tmp_path / "gone"))
        make_adapter(tmp_path / "half" / "adapter")
        with pytest.raises(UserError, match="half: the stage is unfinished"):
            load_previous(str(tmp_path / "half"))

    def test_half_written(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s")
        cut_in_half(stage.weights_dir / "adapter_model.safetensors")
        with pytest.raises(UserError, match="differs from the hash"):
            load_previous(str(tmp_path / "s"))

    def test_none(self) -> None:
        assert load_previous(None) is None

    def test_version_folder(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "v0-20250101-000000")
        assert load_previous(str(tmp_path)) == stage


class TestStart:
    def given(self, model: Path | str = "Qwen/Qwen2.5-7B", **flags: str | Path) -> dict[str, list[str]]:
        return {"model": [str(model)], **{name: [str(value)] for name, value in flags.items()}}

    def test_first_stage_starts_from_the_base_model(self) -> None:
        assert start_of_stage(self.given(), None) == (None, None)

    def test_continues_the_previous_adapter(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s")
        expected = (str(stage.weights_dir), None)
        assert start_of_stage(self.given(), stage) == expected
        assert start_of_stage(self.given(adapters=stage.weights_dir, lora_rank="4", lora_alpha="32"), stage) == expected

    def test_moved_base_model_of_the_same_name(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s", base_model="/old/place/Qwen2.5-7B")
        start_of_stage(self.given("Qwen/Qwen2.5-7B"), stage)

    def test_copied_base_model(self, tmp_path: Path) -> None:
        base = make_model(tmp_path / "base")
        shutil.copytree(base, tmp_path / "copy")
        start_of_stage(self.given(tmp_path / "copy"), make_stage(tmp_path / "s", base_model=str(base)))

    @pytest.mark.parametrize("other", [{"hidden_size": 8}, {"seed": 1}])
    def test_adapter_of_another_base_model(self, tmp_path: Path, other: dict[str, Any]) -> None:
        """Another shape, or (seed) the same shape with other weights."""
        base, model = make_model(tmp_path / "base"), make_model(tmp_path / "other", **other)
        stage = make_stage(tmp_path / "s", base_model=str(base))
        with pytest.raises(UserError, match=f"trained on base model {base}, but --model is {model}"):
            start_of_stage(self.given(model), stage)

    def test_adapter_of_another_hub_id(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"trained on base model Qwen/Qwen2.5-7B, but --model is Qwen/Qwen2.5-3B"):
            start_of_stage(self.given("Qwen/Qwen2.5-3B"), make_stage(tmp_path / "s"))

    @pytest.mark.parametrize(("flag", "value", "has"), [("lora_rank", "8", "4"), ("lora_alpha", "16", "32")])
    def test_adapter_of_another_rank(self, tmp_path: Path, flag: str, value: str, has: str) -> None:
        with pytest.raises(UserError, match=f"--{flag} is {value}, but the adapter that is continued .* has {has}"):
            start_of_stage(self.given(**{flag: value}), make_stage(tmp_path / "s"))

    def test_adapters_without_previous(self, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "a", base="Qwen/Qwen2.5-7B")
        assert start_of_stage(self.given(adapters=adapter), None) == (str(adapter), None)
        with pytest.raises(UserError, match="trained on base model"):
            start_of_stage(self.given("Qwen/Qwen2.5-3B", adapters=adapter), None)

    def test_adapters_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gone: folder not found"):
            start_of_stage(self.given(adapters=tmp_path / "gone"), None)
        with pytest.raises(UserError, match=r"no adapter_config.json in this folder"):
            start_of_stage(self.given(adapters=tmp_path), None)
        adapter = make_adapter(tmp_path / "a", base="Qwen/Qwen2.5-7B")
        cut_in_half(adapter / "adapter_model.safetensors")
        with pytest.raises(UserError, match=r"adapter_model.safetensors is missing or was cut off"):
            start_of_stage(self.given(adapters=adapter), None)

    def test_two_adapters(self, tmp_path: Path) -> None:
        adapter = str(make_adapter(tmp_path / "a"))
        with pytest.raises(UserError, match="names 2 adapters, a stage continues exactly one"):
            start_of_stage({"adapters": [adapter, adapter]}, None)

    def test_adapters_other_than_previous(self, tmp_path: Path) -> None:
        stage, other = make_stage(tmp_path / "s"), make_adapter(tmp_path / "a")
        with pytest.raises(UserError, match="is not the adapter of --cl_previous"):
            start_of_stage(self.given(adapters=other), stage)

    def test_other_tuner(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"--tuner_type is 'full', but the previous stage .* used 'lora'"):
            start_of_stage(self.given(tuner_type="full"), make_stage(tmp_path / "s"))

    def test_output_into_the_previous_stage(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s")
        with pytest.raises(UserError, match="is the folder of --cl_previous: the stage before would be lost"):
            start_of_stage(self.given(output_dir=tmp_path / "x" / ".." / "s"), stage)

    def test_full_fine_tuning(self, tmp_path: Path) -> None:
        base = make_model(tmp_path / "base")
        stage = make_stage(
            tmp_path / "s", weights="model", weights_sha256=None, tuner_type="full", base_model=str(base)
        )
        make_model(tmp_path / "s" / "model", seed=1)
        expected = (None, str(stage.weights_dir))
        assert start_of_stage(self.given(base, tuner_type="full"), stage) == expected
        assert start_of_stage(self.given(stage.weights_dir, tuner_type="full"), stage) == expected
        with pytest.raises(UserError, match=f"trained on base model {base}, but --model is Qwen/Qwen2.5-7B"):
            start_of_stage(self.given(tuner_type="full"), stage)
        with pytest.raises(UserError, match="--adapters does not work with --tuner_type full"):
            start_of_stage(self.given(base, tuner_type="full", adapters=make_adapter(tmp_path / "a")), stage)


class TestFinishedStage:
    def given(self, folder: Path, **changes: str) -> dict[str, list[str]]:
        values = {"output_dir": str(folder), "cl_method": "seq", "cl_task": "2022", "cl_resume": "true", **changes}
        return {name: [value] for name, value in values.items()}

    def test_found(self, tmp_path: Path) -> None:
        stage = make_stage(tmp_path / "s")
        assert finished_stage(self.given(stage.dir), None) == stage
        assert finished_stage(self.given(stage.dir, cl_resume="false"), None) is None
        assert finished_stage(self.given(tmp_path), None) is None

    @pytest.mark.parametrize(("flag", "value"), [("cl_method", "ewc"), ("cl_task", "2023")])
    def test_of_something_else(self, tmp_path: Path, flag: str, value: str) -> None:
        stage = make_stage(tmp_path / "s")
        with pytest.raises(UserError, match=f"holds a finished stage of --{flag} .*, not {value}"):
            finished_stage(self.given(stage.dir, **{flag: value}), None)

    def test_stale(self, tmp_path: Path) -> None:
        one = make_stage(tmp_path / "1")
        two = make_stage(tmp_path / "2", one)
        shutil.rmtree(one.dir)
        with pytest.raises(UserError, match="was trained from other weights"):
            finished_stage(self.given(two.dir), make_stage(tmp_path / "1", seed=5))


class TestCommand:
    """`swift-cl sft` refuses with exit code 2 and one line, and starts nothing."""

    @pytest.fixture(autouse=True)
    def launched(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        calls: list[list[str]] = []
        monkeypatch.setattr(command, "launch", lambda name, argv: calls.append(argv) or 0)
        return calls

    def call(self, capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["sft", *map(str, argv)])
        assert isinstance(stopped.value.code, int)
        captured = capsys.readouterr()
        return stopped.value.code, captured.out + captured.err

    def stage(self, tmp_path: Path, **changes: Any) -> list[str]:
        if not (tmp_path / "base").is_dir():
            make_model(tmp_path / "base")
        data_file(tmp_path, [ROW])
        values = {
            "model": tmp_path / "base", "dataset": tmp_path / "d.json", "output_dir": tmp_path / "out",
            "cl_method": "seq", "cl_task": "2022", **changes,
        }  # fmt: skip
        return [str(part) for name, value in values.items() for part in (f"--{name}", value)]

    def test_all_is_well(self, tmp_path: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
        argv = self.stage(tmp_path)
        assert self.call(capsys, *argv) == (0, "")
        assert launched == [argv]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"cl_method": "emc"}, "--cl_method 'emc' is unknown"),
            ({"gem_margin": "1"}, "--gem_margin is a flag of method 'gem'"),
            ({"model": "/gone"}, "--model /gone: model folder not found"),
            ({"dataset": "/gone.json"}, "--dataset /gone.json: data file not found"),
            ({"cl_previous": "/gone"}, "/gone: stage folder not found"),
            ({"adapters": "/gone"}, "--adapters /gone: folder not found"),
        ],
    )
    def test_refused(
        self,
        tmp_path: Path,
        launched: list[Any],
        capsys: pytest.CaptureFixture[str],
        changes: dict[str, str],
        said: str,
    ) -> None:
        code, text = self.call(capsys, *self.stage(tmp_path, **changes))
        assert code == 2
        assert text.startswith(f"swift-cl: error: {said}")
        assert text.count("\n") == 1
        assert launched == []
        assert not (tmp_path / "out").exists()

    def test_finished_stage_is_left_alone(
        self, tmp_path: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_stage(tmp_path / "out")
        assert self.call(capsys, *self.stage(tmp_path, cl_resume="true")) == (
            0,
            f"stage 2022 is finished already: {tmp_path / 'out'}\n",
        )
        assert launched == []

    def test_without_a_method_the_command_is_swift_sft(
        self, launched: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """ms-swift's own flags are its own business, unknown ones too."""
        assert self.call(capsys, "--model", "/gone", "--dataset", "/gone.json", "--new_flag", "1")[0] == 0
        assert launched == [["--model", "/gone", "--dataset", "/gone.json", "--new_flag", "1"]]

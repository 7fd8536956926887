"""`swift-cl run`: the plan is pure data, wrong settings are refused by name, a stale stage is recognised."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from swift_cl.cli.main import build_parser, main
from swift_cl.errors import RunFailure, UserError
from swift_cl.io import read_json, read_jsonl, sha256_file, write_json
from swift_cl.stages import load_run
from swift_cl.training.flags import flag_values
from swift_cl.workflow import launch as launch_module
from swift_cl.workflow.chain import finished
from swift_cl.workflow.config import load_config
from swift_cl.workflow.plan import RESERVED, StagePlan, flags, make_plans
from swift_cl.workflow.preview import preview, rows_and_steps
from swift_cl.workflow.run import prepare, train
from tests.support.stages import make_adapter, make_stage
from tests.support.two_tasks import ROW, finish, make_folder, write_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, two tasks with data, a benchmark with two orders, and a run file."""
    return make_folder(tmp_path)


def plans_of(folder: Path, *assignments: str, **changes: Any) -> list[Any]:
    config, benchmark = load_config(write_config(folder, **changes), list(assignments))
    return make_plans(config, benchmark)


def prepared(folder: Path, *assignments: str, overwrite: bool = False, **changes: Any) -> list[Any]:
    config, benchmark = load_config(write_config(folder, **changes), list(assignments))
    return prepare(config, benchmark, overwrite)


def refused(folder: Path, *assignments: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepared(folder, *assignments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tree(folder: Path) -> dict[str, str | None]:
    """Every file with its hash, every folder with None."""
    return {str(p.relative_to(folder)): sha256_file(p) if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Calls of the launcher; nothing is started."""
    calls: list[tuple[str, list[str]]] = []

    def launch(command: str, argv: list[str]) -> int:
        calls.append((command, argv))
        return 0

    monkeypatch.setattr(launch_module, "launch", launch)
    return calls


class TestPlan:
    def test_stages_in_order(self, folder: Path) -> None:
        (plan,) = plans_of(folder)
        assert plan.order == ["a", "b"]
        assert [stage.task for stage in plan.stages] == ["a", "b"]
        assert [Path(stage.dir) for stage in plan.stages] == [
            folder / "runs" / "seq" / "stage_1_a",
            folder / "runs" / "seq" / "stage_2_b",
        ]
        values = flag_values(plan.stages[1].argv)
        assert values["dataset"] == [str(folder / "data" / "b-train.json")]
        assert values["system"] == ["News of b."]
        assert (values["cl_method"], values["cl_task"], values["max_steps"]) == (["seq"], ["b"], ["2"])
        assert values["model"] == [str(folder / "base")]
        assert values["seed"] == ["42"]

    def test_other_order(self, folder: Path) -> None:
        (plan,) = plans_of(folder, order="back")
        assert plan.order == ["b", "a"]
        assert Path(plan.stages[0].dir).name == "stage_1_b"
        with pytest.raises(UserError, match="order 'bakc' is unknown"):
            plans_of(folder, order="bakc")

    def test_several_methods_and_their_own_settings(self, folder: Path) -> None:
        settings = {"ewc": {"ewc_lambda": 7}}
        seq, ewc = plans_of(folder, method=["seq", "ewc"], method_settings=settings)
        assert "ewc_lambda" not in flag_values(seq.stages[0].argv)
        assert flag_values(ewc.stages[0].argv)["ewc_lambda"] == ["7"]
        assert Path(ewc.run_dir) == folder / "runs" / "ewc"

    def test_system_none_leaves_the_flag_out(self, folder: Path) -> None:
        file = folder / "data" / "benchmark.yaml"
        file.write_text(file.read_text().replace("system: News of a.", "system: null"))
        (plan,) = plans_of(folder)
        assert "system" not in flag_values(plan.stages[0].argv)

    def test_flags(self) -> None:
        values = {"a": True, "b": False, "c": None, "d": [1, "x y"], "e": {"k": "新"}, "f": 1e-4}
        assert flags(values) == [
            "--a",
            "true",
            "--b",
            "false",
            "--d",
            "1",
            "x y",
            "--e",
            '{"k": "新"}',
            "--f",
            "0.0001",
        ]

    @pytest.mark.parametrize("key", RESERVED)
    def test_reserved_keys(self, folder: Path, key: str) -> None:
        assert refused(folder, train={key: "x"}).startswith(f"train.{key} cannot be set: the chain sets it")
        assert refused(folder, method_settings={"seq": {key: "x"}}).startswith(f"method_settings.seq.{key} cannot")

    def test_reserved_keys_with_dashes(self, folder: Path) -> None:
        assert refused(folder, train={"output-dir": "x"}).startswith("train.output-dir cannot be set")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"method": "sek"}, "--cl_method 'sek' is unknown, allowed: "),
            ({"method_settings": {"ewcc": {}}}, "--cl_method 'ewcc' is unknown"),
            ({"method_settings": {"seq": {"ewc_lambda": 1}}}, "--ewc_lambda is a flag of method 'ewc'"),
            ({"train": {"gem_margin": 1}}, "--gem_margin is a flag of method 'gem', but --cl_method is 'seq'"),
            ({"method": "ewc", "train": {"ewc_lambda": -1}}, "--ewc_lambda is -1.0, allowed: "),
            ({"method": ["seq", "seq"]}, "method is ['seq', 'seq'], expected one or several different ones"),
            ({"method": []}, "method is [], expected"),
            ({"model": "./gone"}, "model folder not found"),
            ({"model": "data"}, "has no config.json"),
            ({"benchmark": "gone"}, "gone: file not found"),
            ({"trian": {}}, "run.yaml: trian is unknown, allowed: name, benchmark, "),
            ({"model": None}, "run.yaml: model: Field required"),
            ({"mode": "train"}, "run.yaml: mode: Input should be 'train_only', "),
            ({"seed": "x"}, "run.yaml: seed: Input should be a valid integer"),
        ],
    )
    def test_wrong_settings(self, folder: Path, changes: dict[str, Any], said: str) -> None:
        before = tree(folder).keys()
        assert said in refused(folder, **changes)
        assert tree(folder).keys() == before, "a refused run must write nothing"

    def test_benchmark_file_in_place_of_a_run_file(self, folder: Path) -> None:
        with pytest.raises(UserError, match="this is a benchmark file; `swift-cl run` takes a run file"):
            load_config(folder / "data" / "benchmark.yaml", [])


class TestSet:
    def test_values_are_yaml(self, folder: Path) -> None:
        assignments = ["train.max_steps=9", "seed=7", "train.new=[1, 2]", "method_settings.gem.gem_margin=0"]
        config, _ = load_config(folder / "run.yaml", assignments)
        assert (config.train, config.seed) == ({"max_steps": 9, "new": [1, 2]}, 7)
        assert config.method_settings == {"gem": {"gem_margin": 0}}

    def test_value_with_equals_sign(self, folder: Path) -> None:
        config, _ = load_config(folder / "run.yaml", ["name=a=b"])
        assert config.name == "a=b"

    @pytest.mark.parametrize("text", ["seed", "=1", ""])
    def test_wrong_form(self, folder: Path, text: str) -> None:
        with pytest.raises(UserError, match="is not of the form key=value"):
            load_config(folder / "run.yaml", [text])

    def test_not_a_group(self, folder: Path) -> None:
        with pytest.raises(UserError, match="'model' is not a group of settings"):
            load_config(folder / "run.yaml", ["model.x=1"])

    def test_unknown_key(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"sede is unknown, .*; did you mean 'seed'"):
            load_config(folder / "run.yaml", ["sede=1"])


class TestPaths:
    def test_relative_to_the_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir("/")
        config, benchmark = load_config(folder, [])
        assert (config.model, config.output_dir) == (str(folder / "base"), str(folder / "runs"))
        assert benchmark.tasks["a"].train == folder / "data" / "a-train.json"

    def test_hub_id_stays(self, folder: Path) -> None:
        config, _ = load_config(write_config(folder, model="Qwen/Qwen2.5-7B"), [])
        assert config.model == "Qwen/Qwen2.5-7B"

    def test_data_dir(self, folder: Path) -> None:
        config, benchmark = load_config(write_config(folder, data_dir="other"), [])
        assert benchmark.tasks["a"].train == folder / "other" / "a-train.json"
        assert config.data_dir == str(folder / "other")


class TestPreview:
    def call(self, folder: Path, *argv: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(folder / "run.yaml"), "--preview", *argv])
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    def test_prints_commands_and_touches_nothing(
        self, folder: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = tree(folder)
        assert self.call(folder, "--method", "seq", "gem") == 0
        assert tree(folder) == before
        assert launched == []
        lines = capsys.readouterr().out.splitlines()
        commands = [shlex.split(line) for line in lines if not line.startswith("#")]
        assert [command[:2] for command in commands] == [["swift-cl", "sft"]] * 4 + [["swift-cl", "eval"]]
        given = [flag_values(command[2:]) for command in commands]
        assert [values["cl_method"] for values in given[:4]] == [["seq"], ["seq"], ["gem"], ["gem"]]
        assert "cl_previous" not in given[0]
        assert given[1]["cl_previous"] == given[0]["output_dir"]
        assert given[3]["cl_previous"] == given[2]["output_dir"]
        assert commands[-1][2:4] == [str(folder / "runs" / "seq"), str(folder / "runs" / "gem")]

    def test_its_commands_are_accepted(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from swift_cl.training.flags import check_method_flags

        self.call(folder)
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("swift-cl sft"):
                check_method_flags(shlex.split(line)[2:])

    def test_train_only_has_no_evaluation(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.call(folder, "--mode", "train_only") == 0
        assert "swift-cl eval" not in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["a-train", "b-test"])
    def test_missing_data_file(self, folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
        (folder / "data" / f"{name}.json").unlink()
        assert self.call(folder) == 2
        assert f"{name}.json: data file not found" in capsys.readouterr().err

    def test_wrong_flag_of_the_evaluation(
        self, folder: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Shown before the training, not after it."""
        before = tree(folder)
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(folder / "run.yaml"), "--set", "eval.infer_bakcend=pt"])
        assert stopped.value.code == 2
        assert "eval.infer_bakcend" in capsys.readouterr().err
        assert (tree(folder), launched) == (before, [])


@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), (None, False)])
def test_switches_of_the_evaluation_in_a_run_file(value: bool | None, expected: bool) -> None:
    argv = flags({"merge_stages": value, "no_identity_check": value})
    args = build_parser().parse_args(["eval", "runs/a", *argv])
    assert (args.merge_stages, args.no_identity_check) == (expected, expected)
    assert build_parser().parse_args(["eval", "runs/a", "--merge_stages"]).merge_stages


class TestPrepare:
    def test_writes_the_plan(self, folder: Path) -> None:
        (plan,) = prepared(folder)
        assert read_json(folder / "runs" / "seq" / "plan.json")["order"] == ["a", "b"]
        assert not list(Path(plan.run_dir).glob("stage_*"))

    def test_same_settings_continue(self, folder: Path) -> None:
        finish(prepared(folder)[0])
        before = tree(folder / "runs")
        prepared(folder)
        assert tree(folder / "runs") == before

    @pytest.mark.parametrize(
        ("assignments", "said"),
        [
            (["seed=7"], "seed was 42, is 7"),
            (["order=back"], "order was ['a', 'b'], is ['b', 'a']"),
            (["name=other"], "name was 'two_seq', is 'other'"),
            (["train.max_steps=3"], "--max_steps was 2, is 3"),
            (["train.lora_rank=8"], "--lora_rank was not set, is 8"),
        ],
    )
    def test_other_settings_are_refused_with_the_difference(
        self, folder: Path, assignments: list[str], said: str
    ) -> None:
        finish(prepared(folder)[0])
        before = tree(folder / "runs")
        message = refused(folder, *assignments)
        assert f"runs/seq: was made with other settings ({said})" in message
        assert "--overwrite" in message
        assert tree(folder / "runs") == before

    @pytest.mark.parametrize(
        "settings", [{"gradient_accumulation_steps": 2}, {"deepspeed": "zero2"}, {"fsdp": "fsdp2"}]
    )
    def test_spread_over_other_processes_it_continues(self, folder: Path, settings: dict[str, Any]) -> None:
        finish(prepared(folder)[0])
        (plan,) = prepared(folder, *(f"train.{flag}={value}" for flag, value in settings.items()))
        assert list(Path(plan.run_dir).glob("stage_*"))
        (flag, value) = next(iter(settings.items()))
        argv = read_json(folder / "runs" / "seq" / "plan.json")["stages"][1]["argv"]
        assert argv[argv.index(f"--{flag}") + 1] == str(value)

    def test_other_settings_before_anything_was_trained(self, folder: Path) -> None:
        """A wrong setting that training refused can be corrected without --overwrite."""
        prepared(folder)
        prepared(folder, "seed=7")
        assert read_json(folder / "runs" / "seq" / "plan.json")["seed"] == 7

    def test_changed_system_prompt_is_refused(self, folder: Path) -> None:
        finish(prepared(folder)[0])
        file = folder / "data" / "benchmark.yaml"
        file.write_text(file.read_text().replace("News of b.", "Olds of b."))
        assert "--system was News of b., is Olds of b." in refused(folder)

    def test_overwrite(self, folder: Path) -> None:
        finish(prepared(folder)[0])
        prepared(folder, "seed=7", overwrite=True)
        assert read_json(folder / "runs" / "seq" / "plan.json")["seed"] == 7
        assert not list((folder / "runs" / "seq").glob("stage_*"))

    def test_overwrite_deletes_no_folder_that_is_not_a_run(self, folder: Path) -> None:
        precious = folder / "runs" / "seq" / "precious.txt"
        precious.parent.mkdir(parents=True)
        precious.write_text("x")
        with pytest.raises(UserError, match="--overwrite deletes only what `swift-cl run` made"):
            prepared(folder, overwrite=True)
        assert precious.read_text() == "x"

    def test_overwrite_deletes_nothing_when_the_input_is_wrong(self, folder: Path) -> None:
        finish(prepared(folder)[0])
        (folder / "data" / "b-test.json").write_text("[]")
        before = tree(folder / "runs")
        with pytest.raises(UserError, match=r"b-test.json: the data file has no rows"):
            prepared(folder, overwrite=True)
        assert tree(folder / "runs") == before

    def test_limited_and_converted_training_files(self, folder: Path) -> None:
        task = folder / "cl" / "TC" / "news"
        task.mkdir(parents=True)
        (folder / "cl" / "instruction_config.json").write_text(json.dumps({"TC": [{"instruction": "Topic? \n"}]}))
        (task / "labels.json").write_text('["World", "Sports"]')
        for split in ("train", "test"):
            rows = [{"sentence": f"{split} {n}", "label": "World"} for n in range(5)]
            (task / f"{split}.json").write_text(json.dumps(rows))
        value = {
            "name": "cl",
            "tasks": [
                {"name": "c", "format": "cl_benchmark", "train": "TC/news/train.json", "test": "TC/news/test.json",
                 "train_limit": 2},
                {"name": "m", "train": "../data/a-train.json", "test": "../data/a-test.json", "train_limit": 1},
            ],
        }  # fmt: skip
        (folder / "cl" / "benchmark.yaml").write_text(yaml.safe_dump(value))
        (plan,) = prepared(folder, benchmark="cl")
        files = [Path(flag_values(stage.argv)["dataset"][0]) for stage in plan.stages]
        assert files == [folder / "runs" / "seq" / "data" / f"{name}.train.jsonl" for name in "cm"]
        converted = read_jsonl(files[0])
        assert [row["id"] for row in converted] == ["news-train-0", "news-train-1"]
        assert converted[0]["messages"] == [
            {"role": "user", "content": "Topic? \nOption: World, Sports \ntrain 0\nAnswer:"},
            {"role": "assistant", "content": "World"},
        ]
        assert len(read_jsonl(files[1])) == 1

    def test_conversion_keeps_a_rows_own_system_prompt(self, folder: Path) -> None:
        own = {"messages": [{"role": "system", "content": "own"}, *ROW["messages"]]}
        (folder / "data" / "a-train.json").write_text(json.dumps([own, ROW]))
        file = folder / "data" / "benchmark.yaml"
        file.write_text(file.read_text().replace("name: a\n", "name: a\n  train_limit: 2\n"))
        (plan,) = prepared(folder)
        first, second = read_jsonl(Path(flag_values(plan.stages[0].argv)["dataset"][0]))
        assert first["messages"][0] == {"role": "system", "content": "own"}
        assert second["messages"][0]["role"] == "user", "the task's prompt comes from --system"


class TestTrain:
    def test_finished_run_starts_nothing(self, folder: Path, launched: list[Any]) -> None:
        (plan,) = prepared(folder)
        finish(plan)
        train([plan], verbose=True)
        assert launched == []
        run = load_run(Path(plan.run_dir))
        assert (run.order, run.method, run.benchmark) == (["a", "b"], "seq", str(folder / "data"))

    def test_missing_stage_starts_the_chain(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, launched: list[Any]
    ) -> None:
        plans = prepared(folder, method=["seq", "ewc"])
        finish(plans[0])
        fake = launch_module.launch

        def launch(command: str, argv: list[str]) -> int:
            finish(plans[1])
            return fake(command, argv)

        monkeypatch.setattr(launch_module, "launch", launch)
        train(plans, verbose=True)
        assert launched == [("chain", [plan.run_dir for plan in plans])]

    def test_failure_of_the_chain(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plans = prepared(folder)
        monkeypatch.setattr(launch_module, "launch", lambda *args: 1)
        with pytest.raises(
            RunFailure, match=r"training ended with exit code 1 in .*stage_1_a; .*finished stages are kept"
        ):
            train(plans, verbose=True)

    def test_stale_stage_is_refused(self, folder: Path, launched: list[Any]) -> None:
        """Stage 1 was trained again after stage 2."""
        (plan,) = prepared(folder)
        finish(plan)
        shutil.rmtree(plan.stages[0].dir)
        make_stage(Path(plan.stages[0].dir), seed=99, task="a")
        with pytest.raises(UserError, match=r"stage_2_b: was trained from other weights than .*stage_1_a now has"):
            train([plan], verbose=True)
        assert not (Path(plan.run_dir) / "run.json").exists()

    def test_damaged_stage_is_refused(self, folder: Path, launched: list[Any]) -> None:
        (plan,) = prepared(folder)
        finish(plan)
        adapter = Path(plan.stages[1].dir) / "adapter"
        shutil.rmtree(adapter)
        make_adapter(adapter, seed=99)
        with pytest.raises(UserError, match=r"stage_2_b.*differs from the hash"):
            train([plan], verbose=True)


class TestChain:
    def test_finished(self, tmp_path: Path) -> None:
        one = make_stage(tmp_path / "1")
        two = make_stage(tmp_path / "2", one, seed=1)
        assert finished(tmp_path / "1", None) == one
        assert finished(tmp_path / "2", one) == two
        assert finished(tmp_path / "3", two) is None
        make_adapter(tmp_path / "half" / "adapter")
        assert finished(tmp_path / "half", two) is None

    def test_stale(self, tmp_path: Path) -> None:
        one = make_stage(tmp_path / "1")
        make_stage(tmp_path / "2", one, seed=1)
        with pytest.raises(UserError, match="was trained from other weights than the base model now has"):
            finished(tmp_path / "2", None)


class TestEvalOnly:
    def test_trains_and_writes_nothing(
        self, folder: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = tree(folder)
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(folder / "run.yaml"), "--mode", "eval_only"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"swift-cl: error: {folder / 'runs' / 'seq'}: run folder not found\n"
        assert (tree(folder), launched) == (before, [])

    def test_run_with_other_settings(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        finish(prepared(folder)[0])
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(folder / "run.yaml"), "--mode", "eval_only", "--set", "seed=7"])
        assert stopped.value.code == 2
        assert "seed was 42, is 7" in capsys.readouterr().err


def test_preview_of_hand_made_plans_is_text(folder: Path) -> None:
    plans = plans_of(folder)
    assert preview(plans, None).startswith("# seq, seed 42: a -> b into ")
    assert preview(plans, ["x y"]).endswith("swift-cl eval 'x y'")
    assert "# stage 2 of 2, b: starts from stage_1_a" in preview(plans, None)


@pytest.mark.parametrize(
    ("train", "rows", "said"),
    [
        ({}, 10, "10 training rows, about 3 steps of 16; 4 test rows"),  # ms-swift: 16 rows a step, 3 epochs
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}, 10, "about 9 steps of 4;"),
        ({"per_device_train_batch_size": 3}, 10, "about 3 steps of 18;"),  # 6 micro-batches reach 16
        ({"per_device_train_batch_size": 4, "num_train_epochs": 0.5}, 33, "about 2 steps of 16;"),
        ({"max_steps": 7, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 10, "7 steps of 16;"),
        ({"max_steps": 7}, None, "training rows are streamed, 7 steps of 16; 4 test rows"),
    ],
)
def test_preview_counts_rows_and_steps(train: dict[str, Any], rows: int | None, said: str) -> None:
    assert said in rows_and_steps(StagePlan("a", "dir", flags(train)), rows, 4)


def test_preview_counts_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert "about 6 steps of 4;" in rows_and_steps(
        StagePlan("a", "dir", flags({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1})), 8, 4
    )


def test_preview_of_a_run_says_rows_steps_and_questions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(folder, train={"num_train_epochs": 2})
    with pytest.raises(SystemExit):
        main(["run", str(folder / "run.yaml"), "--preview"])
    out = capsys.readouterr().out
    assert re.search(r"# stage 1 of 2, a: \d+ training rows, about \d+ steps of 16; \d+ test rows; starts from", out)
    assert "starts from the base model\n" in out
    # The base model and two stages.
    rows = [int(found) for found in re.findall(r"; (\d+) test rows", out)]
    assert f"# {sum(rows[:2]) * 3:,} dialogues: every test row, asked of the base model and of every stage" in out


def test_plan_of_another_program_is_refused(folder: Path) -> None:
    write_json(folder / "runs" / "seq" / "plan.json", [])
    assert refused(folder).endswith("plan.json: not a plan of a run")

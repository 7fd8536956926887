"""`swift-cl run`: several orders and seeds, the four modes, failures, what a run's folder keeps, `--from`."""

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_cl.cli import eval as eval_command
from swift_cl.cli.main import main
from swift_cl.io import read_json, write_json
from swift_cl.training.flags import flag_values
from swift_cl.workflow import launch as launch_module
from swift_cl.workflow.config import load_config
from swift_cl.workflow.plan import make_plans
from tests.eval.report_runs import results, scored
from tests.support.two_tasks import finish, make_folder, write_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


class Work:
    """Stands in for the training process and the server: what was called, and what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: list[list[str]] = []
        self.evaluated: list[argparse.Namespace] = []
        self.launch_code = 0
        self.eval_code = 0

    def launch(self, command: str, argv: list[str]) -> int:
        self.trained.append([Path(run_dir).name for run_dir in argv])
        if self.launch_code == 0:
            for plan in argv:
                finish(_Plan(read_json(Path(plan) / "plan.json")))
        return self.launch_code

    def evaluate(self, args: argparse.Namespace) -> int:
        self.evaluated.append(args)
        for number, run_dir in enumerate(args.run_dirs):
            plan = read_json(Path(run_dir) / "plan.json")
            # Last row (50 + 10 * number, 90): Avg.ACC is 70, 75, 80, 85 over four runs.
            matrix = scored([[80, 20], [50 + 10 * number, 90]], [10, 20])
            value = results({"exact_match": matrix}, plan["method"], seed=plan["seed"], order=plan["order"])
            write_json(Path(run_dir) / "results.json", value)
        return self.eval_code


class _Plan:
    """A plan.json as `finish` wants it."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.stages = [argparse.Namespace(**stage) for stage in value["stages"]]
        self.method, self.model = value["method"], value["model"]


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    found = Work(folder)
    monkeypatch.setattr(launch_module, "launch", found.launch)
    monkeypatch.setattr(eval_command, "run", found.evaluate)
    return found


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`swift-cl run ...` -> (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["run", *argv])
        assert isinstance(stopped.value.code, int)
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


class TestSeveralOrdersAndSeeds:
    def test_a_folder_each(self, folder: Path) -> None:
        config, benchmark = load_config(write_config(folder, order=["default", "back"], seed=[1, 2]), [])
        plans = make_plans(config, benchmark)
        names = ["seq-default-seed1", "seq-default-seed2", "seq-back-seed1", "seq-back-seed2"]
        assert [Path(plan.run_dir).name for plan in plans] == names
        assert [plan.name for plan in plans] == [f"two_{name}" for name in names]
        assert [plan.order for plan in plans] == [["a", "b"], ["a", "b"], ["b", "a"], ["b", "a"]]
        assert [flag_values(plan.stages[1].argv)["seed"] for plan in plans] == [["1"], ["2"], ["1"], ["2"]]
        assert Path(plans[2].stages[0].dir) == folder / "runs" / "seq-back-seed1" / "stage_1_b"

    @pytest.mark.parametrize(
        ("changes", "name"),
        [({}, "seq"), ({"seed": [7]}, "seq"), ({"seed": [7, 8]}, "seq-seed7"), ({"order": ["back"]}, "seq")],
    )
    def test_only_what_differs_is_in_the_name(self, folder: Path, changes: dict[str, Any], name: str) -> None:
        config, benchmark = load_config(write_config(folder, **changes), [])
        assert Path(make_plans(config, benchmark)[0].run_dir).name == name

    def test_from_the_command_line(self, folder: Path, call: Any) -> None:
        code, out, _ = call(str(folder / "run.yaml"), "--preview", "--order", "default", "back", "--seed", "1", "2")
        assert code == 0
        heads = [line for line in out.splitlines() if line.startswith("# seq")]
        assert [head.split(" into ")[0] for head in heads] == [
            "# seq, seed 1: a -> b", "# seq, seed 2: a -> b", "# seq, seed 1: b -> a", "# seq, seed 2: b -> a"
        ]  # fmt: skip
        assert not (folder / "runs").exists()

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["--seed", "1", "1"], "seed is [1, 1], expected one or several different ones"),
            (["--order", "back", "back"], "order is ['back', 'back'], expected one or several different ones"),
            (["--order", "default", "bakc"], "order 'bakc' is unknown"),
            (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
            (["--set", "seed=[]"], "seed is [], expected"),
            (["--set", "seed=[x]"], "seed.0: Input should be a valid integer"),
        ],
    )
    def test_refused(self, folder: Path, call: Any, argv: list[str], said: str) -> None:
        code, _, err = call(str(folder / "run.yaml"), *argv)
        assert code == 2
        assert said in err
        assert not (folder / "runs").exists()

    def test_compared_at_the_end(self, folder: Path, work: Work, call: Any) -> None:
        code, out, _ = call(str(folder / "run.yaml"), "--order", "default", "back", "--seed", "1", "2")
        assert code == 0
        assert work.trained == [["seq-default-seed1", "seq-default-seed2", "seq-back-seed1", "seq-back-seed2"]]
        assert len(work.evaluated) == 1, "one server for all runs"
        (line,) = [line for line in out.splitlines() if line.strip().startswith("Avg.ACC")]
        # Avg.ACC 70, 75, 80, 85: mean 77.5, standard deviation sqrt(125/3) = 6.45; 4 runs, 2 seeds, 2 orders.
        assert line.split()[:6] == ["Avg.ACC", "seq", "4", "2", "2", "77.50"]
        assert line.split()[7] == "6.45"

    def test_one_run_is_not_compared(self, folder: Path, work: Work, call: Any) -> None:
        _, out, _ = call(str(folder / "run.yaml"))
        assert "interval" not in out


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "trains", "evaluates", "no_report"),
        [
            ("train_only", True, False, None),
            ("eval_only", False, True, False),
            ("train_then_eval", True, True, True),
            ("full_workflow", True, True, False),
        ],
    )
    def test_what_each_does(
        self, folder: Path, work: Work, call: Any, mode: str, trains: bool, evaluates: bool, no_report: bool | None
    ) -> None:
        if not trains:
            call(str(folder / "run.yaml"), "--mode", "train_only")
            work.trained.clear()
        assert call(str(folder / "run.yaml"), "--mode", mode)[0] == 0
        assert (bool(work.trained), bool(work.evaluated)) == (trains, evaluates)
        assert [args.no_report for args in work.evaluated] == ([] if no_report is None else [no_report])


class TestFailure:
    def test_of_a_stage(self, folder: Path, work: Work, call: Any) -> None:
        work.launch_code = 7
        config = str(folder / "run.yaml")
        code, _, err = call(config, "--method", "seq", "--overwrite", "--set", "name=two words")
        assert code == 1
        assert f"training ended with exit code 7 in {folder / 'runs' / 'seq' / 'stage_1_a'}" in err
        (line,) = [line for line in err.splitlines() if line.startswith("to continue: ")]
        command = shlex.split(line.removeprefix("to continue: "))
        assert command == ["swift-cl", "run", config, "--method", "seq", "--set", "name=two words"], "no --overwrite"
        work.launch_code = 0
        assert call(*command[2:])[0] == 0

    def test_of_the_evaluation(self, folder: Path, work: Work, call: Any) -> None:
        work.eval_code = 1
        code, _, err = call(str(folder / "run.yaml"))
        assert code == 1
        assert f"to continue: swift-cl run {folder / 'run.yaml'}\n" in err

    def test_wrong_input_is_not_to_be_continued(self, folder: Path, work: Work, call: Any) -> None:
        (folder / "data" / "a-test.json").unlink()
        code, _, err = call(str(folder / "run.yaml"))
        assert code == 2
        assert "to continue" not in err

    def test_unknown_key_of_the_evaluation(self, folder: Path, call: Any) -> None:
        code, _, err = call(str(folder / "run.yaml"), "--set", "eval.infer_bakcend=pt")
        assert code == 2
        assert "eval.infer_bakcend is no flag of `swift-cl eval`" in err
        assert "did you mean 'infer_backend'?" in err


class TestProvenance:
    def kept(self, folder: Path, name: str = "seq") -> dict[str, Any]:
        value: dict[str, Any] = read_json(folder / "runs" / name / "provenance.json")
        return value

    def test_what_a_run_keeps(self, folder: Path, work: Work, call: Any) -> None:
        import torch

        assert call(str(folder / "run.yaml"), "--seed", "7", "--set", "train.max_steps=3")[0] == 0
        found = self.kept(folder)
        assert (found["schema"], found["seed"], found["order"]) == (1, 7, ["a", "b"])
        assert found["config"]["train"] == {"max_steps": 3}
        assert (found["config"]["method"], found["config"]["seed"]) == ("seq", 7)
        assert found["config"]["model"] == str(folder / "base"), "resolved, not as the file says it"
        content = (folder / "data" / "b-test.json").read_bytes()
        expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert found["files"][str(folder / "data" / "b-test.json")] == expected
        assert {Path(path).name for path in found["files"]} == {
            "benchmark.yaml", "a-train.json", "a-test.json", "b-train.json", "b-test.json"
        }  # fmt: skip
        (entry,) = found["calls"]
        assert (entry["mode"], entry["outcome"]) == ("full_workflow", "done")
        assert entry["seconds"].keys() == {"training", "evaluation"}
        assert entry["versions"]["torch"] == torch.__version__
        assert entry["git"] is None or len(entry["git"]["commit"]) == 40

    def test_every_call_is_noted(self, folder: Path, work: Work, call: Any) -> None:
        work.launch_code = 1
        call(str(folder / "run.yaml"))
        work.launch_code, work.eval_code = 0, 1
        call(str(folder / "run.yaml"))
        work.eval_code = 0
        call(str(folder / "run.yaml"), "--mode", "eval_only")
        outcomes = [(entry["mode"], entry["outcome"]) for entry in self.kept(folder)["calls"]]
        assert outcomes == [("full_workflow", "failed"), ("full_workflow", "incomplete"), ("eval_only", "done")]

    def test_a_killed_call_stays_running(
        self, folder: Path, work: Work, call: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []

        def launch(command: str, argv: list[str]) -> int:
            seen.append(self.kept(folder)["calls"][0]["outcome"])
            return work.launch(command, argv)

        monkeypatch.setattr(launch_module, "launch", launch)
        call(str(folder / "run.yaml"))
        assert seen == ["running"]

    def test_changed_training_data_is_refused(self, folder: Path, work: Work, call: Any) -> None:
        call(str(folder / "run.yaml"))
        file = folder / "data" / "b-train.json"
        file.write_text(file.read_text() + "\n")
        code, _, err = call(str(folder / "run.yaml"))
        assert code == 2
        assert f"{file}: has changed since {folder / 'runs' / 'seq'} was begun" in err

    def test_changed_test_data_is_not(self, folder: Path, work: Work, call: Any) -> None:
        """The evaluation asks anew what has changed."""
        call(str(folder / "run.yaml"))
        file = folder / "data" / "b-test.json"
        file.write_text(file.read_text() + "\n")
        assert call(str(folder / "run.yaml"))[0] == 0
        assert self.kept(folder)["files"][str(file)]["bytes"] == file.stat().st_size


class TestFrom:
    @pytest.fixture
    def made(self, folder: Path, work: Work, call: Any) -> Path:
        """A run with settings of its own that are not in the run file any more."""
        code, _, _ = call(str(folder / "run.yaml"), "--order", "back", "--seed", "7", "8", "--set", "train.max_steps=3",
                          "--set", "eval.test_limit=2")  # fmt: skip
        assert code == 0
        (folder / "run.yaml").unlink()
        work.trained.clear()
        work.evaluated.clear()
        return folder / "runs" / "seq-seed8"

    def test_repeats_it(self, folder: Path, work: Work, call: Any, made: Path) -> None:
        code, _, err = call("--from", str(made))
        assert (code, err.replace("now as then; the changes are not recorded", "").count("note: ")) in ((0, 0), (0, 1))
        assert work.trained == [["seq"]]
        again = read_json(folder / "runs_again" / "seq" / "plan.json")
        assert (again["order"], again["seed"]) == (["b", "a"], 8)
        assert flag_values(again["stages"][0]["argv"])["max_steps"] == ["3"]
        assert work.evaluated[0].test_limit == 2

        def flags(plan: dict[str, Any]) -> list[dict[str, list[str]]]:
            return [{k: v for k, v in flag_values(s["argv"]).items() if k != "output_dir"} for s in plan["stages"]]

        assert flags(again) == flags(read_json(made / "plan.json"))

    def test_elsewhere(self, folder: Path, work: Work, call: Any, made: Path) -> None:
        assert call("--from", str(made), "--output_dir", str(folder / "other"), "--mode", "train_only")[0] == 0
        assert (folder / "other" / "seq" / "plan.json").is_file()
        assert work.evaluated == []

    @pytest.mark.parametrize("name", ["a-train.json", "b-test.json", "benchmark.yaml"])
    def test_changed_file(self, folder: Path, call: Any, made: Path, name: str) -> None:
        file = folder / "data" / name
        file.write_text(file.read_text() + "\n")
        code, _, err = call("--from", str(made))
        assert (code, err.count("\n")) == (2, 1)
        assert f"{file}: differs from the file that the run was made with" in err
        assert not (folder / "runs_again").exists()

    def test_missing_file(self, folder: Path, call: Any, made: Path) -> None:
        (folder / "data" / "a-test.json").unlink()
        code, _, err = call("--from", str(made))
        assert code == 2
        assert "a-test.json: data file not found" in err

    def test_other_base_model(self, folder: Path, call: Any, made: Path) -> None:
        (folder / "base" / "config.json").write_text(json.dumps({"hidden_size": 5}))
        code, _, err = call("--from", str(made))
        assert code == 2
        assert "base: the base model's weights differ from those that the run was made with" in err

    def test_other_versions_are_told(self, folder: Path, work: Work, call: Any, made: Path) -> None:
        value = read_json(made / "provenance.json")
        value["calls"][0]["versions"]["torch"] = "1.0"
        value["calls"][0]["git"] = None
        write_json(made / "provenance.json", value)
        code, _, err = call("--from", str(made))
        assert code == 0
        assert "note: torch is " in err
        assert ", was 1.0\n" in err

    @pytest.mark.parametrize("key", ["config", "seed", "order", "model_id", "files", "calls"])
    def test_each_part_must_be_there(self, call: Any, made: Path, key: str) -> None:
        value = read_json(made / "provenance.json")
        del value[key]
        write_json(made / "provenance.json", value)
        code, _, err = call("--from", str(made))
        assert code == 2
        assert f"provenance.json: has no {key}, so the run cannot be repeated" in err

    def test_folder_without_provenance(self, folder: Path, call: Any) -> None:
        code, _, err = call("--from", str(folder / "data"))
        assert code == 2
        assert "no provenance.json; only runs that `swift-cl run` made can be repeated" in err

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["--seed", "3"], "so --seed does not go with it"),
            (["--set", "seed=3"], "so --set does not go with it"),
            (["--method", "ewc"], "so --method does not go with it"),
        ],
    )
    def test_nothing_is_changed(self, call: Any, made: Path, argv: list[str], said: str) -> None:
        code, _, err = call("--from", str(made), *argv)
        assert code == 2
        assert said in err

    def test_one_source(self, folder: Path, call: Any, made: Path) -> None:
        for argv in ([], [str(made), "--from", str(made)]):
            code, _, err = call(*argv)
            assert code == 2
            assert "needs CONFIG (a run file), --from RUN_DIR, or --train_params" in err

"""The published JSON schemas say what the checks of run files and benchmark files say."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.stream.benchmark import load_benchmark
from swift_cl.workflow.config import load_config
from swift_cl.workflow.schema import MODELS, schema
from tests.conftest import ROOT
from tests.support.two_tasks import make_folder, write_config

FOLDER = ROOT / "assets" / "schemas"
TASK = {"name": "a", "train": "a.json", "test": "t.json"}
RUN: dict[str, Any] = {"benchmark": "b", "model": "m", "output_dir": "o"}
BENCHMARK: dict[str, Any] = {"name": "n", "tasks": [TASK]}


@pytest.mark.parametrize("name", MODELS)
def test_the_published_file_is_the_generated_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After a change: swift-cl run --schema NAME > assets/schemas/NAME.schema.json"""
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--schema", name])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed == (FOLDER / f"{name}.schema.json").read_text(encoding="utf-8")
    assert json.loads(printed) == schema(name)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_described(name: str) -> None:
    found = schema(name)
    for part in (found, *found.get("$defs", {}).values()):
        assert part["additionalProperties"] is False
        undescribed = [key for key, value in part["properties"].items() if not value.get("description")]
        assert undescribed == []


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("run", RUN, True),
        ("run", {**RUN, "order": ["x", "y"], "seed": [1, 2], "method": ["seq"], "mode": "eval_only"}, True),
        ("run", {**RUN, "method_settings": {"ewc": {"ewc_lambda": 1}}, "eval": {"test_limit": 3}}, True),
        ("run", {**RUN, "sed": 1}, False),
        ("run", {"benchmark": "b", "model": "m"}, False),
        ("run", {**RUN, "mode": "train"}, False),
        ("run", {**RUN, "seed": ["x"]}, False),
        ("run", {**RUN, "train": []}, False),
        ("run", {**RUN, "method_settings": {"ewc": 1}}, False),
        ("benchmark", BENCHMARK, True),
        ("benchmark", {**BENCHMARK, "orders": {"x": ["a"]}, "generation": {"max_tokens": 4, "stop": "\n"}}, True),
        ("benchmark", {**BENCHMARK, "generation": {"extra": {"anything": 1}}}, True),
        ("benchmark", {**BENCHMARK, "generation": {"max_token": 4}}, False),
        ("benchmark", {**BENCHMARK, "generation": {"max_tokens": 0}}, False),
        ("benchmark", {**BENCHMARK, "tasks": []}, False),
        ("benchmark", {**BENCHMARK, "tasks": [{**TASK, "sistem": "x"}]}, False),
        ("benchmark", {**BENCHMARK, "tasks": [{**TASK, "name": "../x"}]}, False),
        ("benchmark", {**BENCHMARK, "tasks": [{**TASK, "train_limit": 0}]}, False),
        ("benchmark", {**BENCHMARK, "orders": {"x": "a"}}, False),
    ],
)
def test_schema_and_check_agree(name: str, value: Any, accepted: bool) -> None:
    from jsonschema import Draft202012Validator

    try:
        MODELS[name].model_validate(value)
        checked = True
    except ValidationError:
        checked = False
    assert (checked, Draft202012Validator(schema(name)).is_valid(value)) == (accepted, accepted)


def test_the_shipped_files_fit() -> None:
    from jsonschema import Draft202012Validator

    benchmarks = [
        *(ROOT / "swift_cl" / "stream" / "benchmarks").glob("*.yaml"),
        *ROOT.glob("datasets/*/benchmark.yaml"),
    ]
    runs = [ROOT / "train" / "quickstart.yaml"]
    assert len(benchmarks) >= 17
    for name, files in (("benchmark", benchmarks), ("run", runs)):
        validator = Draft202012Validator(schema(name))
        for file in files:
            errors = [error.message for error in validator.iter_errors(yaml.safe_load(file.read_text("utf-8")))]
            assert errors == [], file


class TestDidYouMean:
    """At every depth of both files."""

    @pytest.mark.parametrize(
        ("assignment", "said"),
        [
            ("modell=x", "run.yaml: modell is unknown, allowed: .*; did you mean 'model'?"),
            ("eval.scorerr=x", "eval.scorerr is no flag of `swift-cl eval`, .*; did you mean 'scorer'?"),
            ("train.max_stepz=x", "--max_stepz is unknown; did you mean 'max_steps'?"),
            ("train.ewc_lamda=1", "--ewc_lamda is unknown, ewc has: .*; did you mean 'ewc_lambda'?"),
            ("method_settings.ewcc.x=1", "--cl_method 'ewcc' is unknown, .*; did you mean 'ewc'?"),
            ("method_settings.seq.learning_rat=1", "--learning_rat is unknown; did you mean 'learning_rate'?"),
        ],
    )
    def test_run_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], assignment: str, said: str) -> None:
        folder = make_folder(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(folder / "run.yaml"), "--preview", "--set", assignment])
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        head, _, tail = said.partition(".*")
        assert head in err
        assert tail in err

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"scorer": []}, "benchmark.yaml: scorer is unknown, allowed: .*; did you mean 'scorers'?"),
            ({"tasks": [{**TASK, "sytem": "x"}]}, "tasks.0.sytem is unknown, allowed: .*; did you mean 'system'?"),
            ({"generation": {"max_token": 3}}, "generation.max_token is unknown, .*; did you mean 'max_tokens'?"),
            ({"options": {"tsk": 1}, "format": "concept_1k"}, "'tsk' is unknown, allowed: .*; did you mean 'task'?"),
        ],
    )
    def test_benchmark_file(self, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
        path = tmp_path / "benchmark.yaml"
        path.write_text(yaml.safe_dump({**BENCHMARK, **changes}))
        with pytest.raises(UserError) as caught:
            load_benchmark(path)
        head, _, tail = said.partition(".*")
        assert head in str(caught.value)
        assert tail in str(caught.value)

    def test_positions_of_unions_are_no_part_of_the_key(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path)
        with pytest.raises(UserError, match=r"run.yaml: seed.1: Input should be a valid integer, .*found 'x'"):
            load_config(write_config(folder, seed=[1, "x"]), [])

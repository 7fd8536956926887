"""General ability by lm-evaluation-harness: the real program, asking an endpoint whose answers are known."""

import json
from pathlib import Path

import pytest
import yaml

from swift_cl.cli.main import main
from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.harness import HarnessOptions, summary
from tests.eval.helpers import REFERENCES, go, names
from tests.eval.mock_endpoint import MockEndpoint

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
SUMS = {f"{a}+{b}=": str(a + b) for a in range(2) for b in range(2)}


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with a task of four sums in the harness's own form."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in SUMS.items()))
    task = {
        "task": "little_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    return folder


def answer(model, messages) -> str:
    """The base can add, the last stage says 1 to all sums: two of the four are right."""
    question = messages[-1]["content"]
    if question in SUMS:
        return "1" if model.startswith("stage_2") else SUMS[question]
    return REFERENCES[question]


@pytest.mark.slow
def test_before_and_after(make_run, tasks, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    run = make_run()
    options = HarnessOptions(("little_sums",), include_path=tasks)
    with MockEndpoint(names(run), answer) as mock:
        found = go(run, mock, harness=options)
        asked = len(mock.requests)
        assert go(run, mock, harness=options).results == found.results
        assert len(mock.requests) == asked, "what the harness found is kept"
        sums = [r for r in mock.requests if r["messages"][-1]["content"] in SUMS]
        assert len(sums) == 8, "the base and the last stage, four questions each"
        assert go(run, mock).results == found.results, "an evaluation without the flag keeps what was found"
    general = found.results[0]["harness"]
    assert general["settings"]["tasks"] == ["little_sums"]
    assert general["metrics"] == {
        "exact_match": {
            "higher_is_better": True, "tasks": ["little_sums"], "base": [1.0], "rows": [[None], [0.5]],
            "change": [-0.5], "delta_g": -0.5,
        }
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    out = capsys.readouterr().out
    assert "general ability (lm-evaluation-harness), exact_match" in out
    assert "-0.50" in out
    assert "general ability (lm-evaluation-harness), exact_match" in (run / "report.html").read_text()


@pytest.mark.slow
def test_what_the_harness_says_when_it_fails_is_told(make_run, tasks, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    (tasks / "sums.jsonl").unlink()
    run = make_run()
    with (
        MockEndpoint(names(run), answer) as mock,
        pytest.raises(RunFailure, match=r"failed with exit code 1 for base: .*sums.jsonl.*; the command was: "),
    ):
        go(run, mock, harness=HarnessOptions(("little_sums",), include_path=tasks))
    assert (run / "results.json").is_file(), "the answers are scored all the same"
    assert not list((run / "harness").glob("base*"))


def test_unknown_tasks_are_found_before_anything_is_asked(make_run, tasks) -> None:
    run = make_run()
    with (
        MockEndpoint(names(run), answer) as mock,
        pytest.raises(UserError, match=r"^--lm_eval little_sum: .* has no such task; did you mean 'little_sums'\?$"),
    ):
        go(run, mock, harness=HarnessOptions(("little_sum",), include_path=tasks))
    assert not mock.requests


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--infer_backend", "vllm-offline"], "--lm_eval asks over HTTP, which an offline backend does not have"),
        (["--lm_eval_num_fewshot", "-1"], "--lm_eval_num_fewshot -1: allowed are 0 and more"),
        (["--lm_eval_include_path", "/nowhere"], "--lm_eval_include_path /nowhere: no such folder"),
    ],
)
def test_wrong_flags(make_run, flags, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(make_run()), "--scorer", "exact_match", "--lm_eval", "gsm8k", *flags])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_summary_of_groups_filters_and_directions() -> None:
    """The form of the harness's results file, with a group, two filters of a metric, and one that is better low."""
    found = summary(
        {
            "results": {
                "gsm8k": {
                    "alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1,
                    "exact_match,flexible-extract": 0.5, "sample_len": 8,
                },
                "wiki": {"alias": "wiki", "perplexity,none": 12.5, "perplexity_stderr,none": "N/A"},
            },
            "higher_is_better": {"gsm8k": {"exact_match": True}, "wiki": {"perplexity": False}},
            "n-samples": {"gsm8k": {"original": 1319, "effective": 8}},
            "versions": {"gsm8k": 3},
        }
    )  # fmt: skip
    assert found == {
        "metrics": {
            "exact_match,strict-match": {"gsm8k": 0.25},
            "exact_match,flexible-extract": {"gsm8k": 0.5},
            "perplexity": {"wiki": 12.5},
        },
        "higher_is_better": {
            "exact_match,strict-match": True, "exact_match,flexible-extract": True, "perplexity": False,
        },
        "rows": {"gsm8k": 8},
        "versions": {"gsm8k": 3},
    }  # fmt: skip

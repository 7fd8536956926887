"""The same adapters under vLLM: at least 95 % of the greedy answers equal those of the pt backend."""

import json
import os
import shutil

import pytest

from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.serving.backends import ServerOptions
from tests.integration.serving_run import make_run

PYTHON = os.environ.get("SWIFT_CL_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="SWIFT_CL_VLLM_PYTHON names no Python with vLLM"),
]
GRID = GridOptions(test_limit=4)


def answers(run):
    """Every stored answer by model, task, sample and turn."""
    found = {}
    for path in sorted((run / "answers").rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[path.parent.name, path.stem, row["id"], row["turn"]] = row["answer"]
    return found


def test_vllm_answers_as_pt_does(tmp_path, tiny_base):
    one = make_run(tmp_path / "pt", tiny_base)
    two = tmp_path / "vllm"
    shutil.copytree(one, two)
    common = {"grid": GRID, "scorers": ("exact_match",), "max_tokens": 16}
    pt = evaluate([one], EvalOptions(**common), notify=print)
    extra = ("--vllm_max_model_len", "512")
    server = ServerOptions("vllm", python=PYTHON or "", extra=extra)
    vllm = evaluate([two], EvalOptions(**common, backend="vllm", server=server), notify=print)
    assert pt.complete
    assert vllm.complete
    assert vllm.results[0]["backend"] == "vllm"
    a, b = answers(one), answers(two)
    assert a.keys() == b.keys()
    assert len({row for row, *_ in a}) == 1 + len([t for t in load_grid(one, GRID).stages if t])
    equal = sum(a[key] == b[key] for key in a)
    print(f"{equal} of {len(a)} answers are equal")
    assert equal >= 0.95 * len(a)

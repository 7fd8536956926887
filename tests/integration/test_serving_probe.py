"""What a stage recorded at the end of its training is what its served adapter answers."""

from dataclasses import replace
from pathlib import Path

import pytest

from swift_cl.errors import RunFailure
from swift_cl.evaluation import identity
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions
from swift_cl.stages import load_run
from tests.support.commands import run_swift_cl, write_run_file

pytestmark = pytest.mark.slow
OPTIONS = EvalOptions(GridOptions(test_limit=1), scorers=("exact_match",), max_tokens=4)


def watched_gaps(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How far each served adapter is from its stage's record, filled while an evaluation runs."""
    gaps: dict[str, float] = {}
    measure = identity._gap

    def spy(endpoint, served, probe):
        gaps[served] = measure(endpoint, served, probe)
        return gaps[served]

    monkeypatch.setattr(identity, "_gap", spy)
    return gaps


def test_served_adapters_answer_as_after_their_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """seq, and two that keep other weights than those they train; then with two stages' records exchanged."""
    methods = ["seq", "cia", "o_lora"]
    run_swift_cl("run", str(write_run_file(tmp_path, methods, learning_rate=2e-2)), "--mode", "train_only")
    runs = [tmp_path / "runs" / method for method in methods]
    gaps = watched_gaps(monkeypatch)
    assert evaluate(runs, OPTIONS, notify=print).complete
    print(gaps)
    assert len(gaps) == len({stage.weights_sha256 for run in runs for stage in load_run(run).stages})
    assert max(gaps.values()) < 1e-3
    one, two = load_run(runs[0]).stages
    assert one.probe is not None
    assert two.probe is not None
    assert one.probe["messages"][0] == {"role": "system", "content": one.system}
    replace(one, probe=two.probe).save()
    with pytest.raises(RunFailure, match=r"does not answer as its stage did after training .*'stage_2_2023-.*' rather"):
        evaluate(runs[:1], replace(OPTIONS, max_tokens=5), notify=print)


def test_an_adapter_that_vllm_cannot_serve_is_served_by_pt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run_file(tmp_path, ["seq"], learning_rate=2e-2, use_dora=True)
    run_swift_cl("run", str(config), "--mode", "train_only")
    run = tmp_path / "runs" / "seq"
    gaps = watched_gaps(monkeypatch)
    assert evaluate([run], OPTIONS, notify=print).complete
    assert len(gaps) == 2
    assert max(gaps.values()) < 1e-3

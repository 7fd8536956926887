"""Probing performance: class means, learned probes, and the matrix P of a run, by hand."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from swift_cl.cli import probe as command
from swift_cl.errors import UserError
from swift_cl.evaluation.scenarios import seen_accuracy
from swift_cl.io import write_json
from swift_cl.probing.features import Labelled
from swift_cl.probing.matrix import _gaps, _probe, accuracy
from swift_cl.probing.probes import KINDS, ProbeSettings, class_means, fit
from swift_cl.report.probing import probing_text

QUICK = ProbeSettings(epochs=60, lr=0.1, batch=2)


class TestProbes:
    FEATURES = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 6.0]])
    LABELS = torch.tensor([0, 0, 1, 1])

    def test_d_class_means(self) -> None:
        """Means (1, 0) and (0, 5). Query (3, 1.5): inner products 3 and 7.5, cosines 0.894 and 0.447."""
        means = class_means(self.FEATURES, self.LABELS, 2)
        assert means.tolist() == [[1, 0], [0, 5]]
        third = class_means(torch.cat([self.FEATURES, torch.tensor([[4.0, 3.0]])]), torch.tensor([0, 0, 1, 1, 0]), 3)
        assert third.tolist() == [[2, 1], [0, 5], [0, 0]], "each over its own rows"
        query = torch.tensor([[3.0, 1.5]])
        assert (query @ means.T)[0].tolist() == pytest.approx([3, 7.5])
        by_kind = {
            kind: int(fit(kind, self.FEATURES, self.LABELS, 2, QUICK)(query)) for kind in ("mean_dot", "mean_cosine")
        }
        assert by_kind == {"mean_dot": 1, "mean_cosine": 0}

    @pytest.mark.parametrize("kind", KINDS)
    def test_four_rows_are_enough(self, kind) -> None:
        """Fewer rows than a batch of 128 holds; two far groups are told apart by every kind."""
        features = torch.tensor([[5.0, 0.1], [4.0, 0.0], [0.0, 5.0], [0.2, 4.0]])
        probe = fit(kind, features, self.LABELS, 2, ProbeSettings(epochs=200, lr=0.05))
        assert probe(features).tolist() == [0, 0, 1, 1]

    def test_the_learned_ones_are_those_of_their_seed(self) -> None:
        features, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 4
        asked = torch.randn(200, 6)
        one, again, other = (
            fit("linear", features, labels, 4, ProbeSettings(1, batch=8, seed=seed))(asked) for seed in (0, 0, 7)
        )
        assert torch.equal(one, again)
        assert not torch.equal(one, other)

    def test_accuracy(self) -> None:
        assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 75


class Reader:
    """Task one has the classes 0 (right) and 1 (up), task two the class 2, which lies beside 0."""

    classes: ClassVar[dict[str, int]] = {"a": 0, "b": 1, "c": 2}
    DATA: ClassVar[dict[str, Labelled]] = {
        "one": Labelled(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])),
        "two": Labelled(torch.tensor([[1.0, 0.2]]), torch.tensor([2])),
    }
    TEST: ClassVar[dict[str, Labelled]] = {
        "one": Labelled(torch.tensor([[1.0, 0.15], [0.0, 2.0]]), torch.tensor([0, 1])),
        "two": Labelled(torch.tensor([[3.0, 0.6]]), torch.tensor([2])),
    }

    def of(self, target: Any, task: Any, split: str, rows: Any) -> Labelled:
        return (self.DATA if split == "train" else self.TEST)[task.name]


def grid(scenario: str) -> Any:
    tasks = [SimpleNamespace(name=name, train_rows=list) for name in ("one", "two")]
    return SimpleNamespace(tasks=tasks, rows=[[], []], benchmark=SimpleNamespace(scenario=scenario))


class TestMatrix:
    @pytest.mark.parametrize(
        ("scenario", "learned", "expected"),
        [
            ("class_incremental", 1, [100, None]),
            # (1, 0.15) is nearer to (1, 0.2) by its cosine: the class of the second task takes it.
            ("class_incremental", 2, [50, 100]),
            ("task_incremental", 2, [100, 100]),
        ],
    )
    def test_a_row(self, scenario, learned, expected) -> None:
        found = _probe(grid(scenario), Reader(), None, learned, ["mean_cosine"], QUICK)
        assert found == {"mean_cosine": expected}

    def test_gaps(self, tmp_path) -> None:
        """P - R where both are known; only of scorers in percent, and of the same order of tasks."""
        file = tmp_path / "results.json"
        matrix = [[90.0, None], [80.0, 70.0]]
        assert _gaps(file, matrix, ["a", "b"]) == {}
        parts = {
            "em": {"matrix": [[60, 5], [None, 50]], "range": [0.0, 100.0]},
            "x": {"matrix": [], "range": [0.0, 1.0]},
        }
        write_json(file, {"order": ["a", "b"], "scorers": parts})
        assert _gaps(file, matrix, ["a", "b"]) == {"em": [[30, None], [None, 20]]}
        assert _gaps(file, matrix, ["b", "a"]) == {}

    def test_text(self) -> None:
        matrix = [[90.0, None], [80.0, 60.0]]
        values = {
            "matrix": matrix,
            "seen": seen_accuracy(matrix, [[1, 3]] * 2),
            "gap": {"em": [[30.0, None], [None, 20.0]]},
        }
        found = {
            "method": "seq",
            "scenario": "class_incremental",
            "scope": "seen",
            "order": ["a", "b"],
            "kinds": {"linear": values},
        }
        text = probing_text(found)
        assert "linear   after b   80.00   60.00          70.00         65.00" in text
        assert "gap to em" in text


class TestCommand:
    def test_kinds_are_those_of_the_probes(self) -> None:
        assert command.KINDS == KINDS

    def test_a_benchmark_of_texts_is_refused(self, make_run) -> None:
        from swift_cl.evaluation.plan import GridOptions
        from swift_cl.probing.matrix import probe_run

        with pytest.raises(UserError, match="probing needs classes, so a scenario: class_incremental or"):
            probe_run(make_run(), GridOptions(), ["linear"], "seen", QUICK, print)

    @pytest.mark.parametrize("flag", ["--probe_epochs", "--probe_lr", "--probe_batch"])
    def test_values_refused(self, make_run, capsys, flag) -> None:
        from swift_cl.cli.main import main

        with pytest.raises(SystemExit) as stopped:
            main(["probe", str(make_run()), flag, "0"])
        assert stopped.value.code == 2
        assert f"{flag} is 0" in capsys.readouterr().err

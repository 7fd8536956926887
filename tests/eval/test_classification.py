"""Class- and task-incremental classification: visible labels, accuracy over what was seen, constrained decoding."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from swift_cl.cli.main import main
from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.evaluation.scenarios import scenario_metrics, seen_accuracy, visible_labels
from swift_cl.evaluation.scorers import Item, load
from swift_cl.evaluation.settings import load_settings
from swift_cl.evaluation.store import AnswerStore, answer_path
from swift_cl.serving.adapters import Deployment
from swift_cl.serving.backends import ServerOptions, command
from swift_cl.serving.worker.choices import Choices, as_expression, asked_for, packed, unpacked
from swift_cl.serving.worker.classes import Classes, classes_of
from swift_cl.stream.benchmark import load_benchmark
from tests.eval.conftest import write_rows
from tests.eval.helpers import go, names
from tests.eval.mock_endpoint import MockEndpoint

LABELS = (("sun", "rain"), ("cat", "dog", "sun"), ("red",))
END, PAD = 0, 9


class TestVisibleLabels:
    @pytest.mark.parametrize(
        ("scenario", "stage", "task", "expected"),
        [
            ("class_incremental", 1, 0, ("sun", "rain")),
            ("class_incremental", 2, 0, ("sun", "rain", "cat", "dog")),
            ("class_incremental", 3, 1, ("sun", "rain", "cat", "dog", "red")),
            # a task that is not learned yet: the label space that it will have then
            ("class_incremental", 1, 1, ("sun", "rain", "cat", "dog")),
            ("class_incremental", 0, 0, ("sun", "rain")),
            ("task_incremental", 3, 1, ("cat", "dog", "sun")),
            ("task_incremental", 0, 2, ("red",)),
        ],
    )
    def test_after_a_stage(self, scenario, stage, task, expected) -> None:
        assert visible_labels(scenario, LABELS, stage, task) == expected

    def test_other_scenarios_have_none(self) -> None:
        assert visible_labels("knowledge_editing", (), 1, 0) == ()


class TestAccuracy:
    def test_task_mean_and_row_mean(self) -> None:
        """100 rows at 50 % and 300 rows at 90 %: 70 over tasks, (50 + 270) / 400 = 80 over rows."""
        found = seen_accuracy([[100, None], [50, 90]], [[100, 0], [100, 300]])
        assert found == {"tasks": [100, 70], "rows": [100, 80]}

    def test_a_hole_is_no_zero(self) -> None:
        found = seen_accuracy([[60, None, 7], [None, 90, 8], [10, 20, 30]], [[5, 0, 5], [0, 15, 5], [5, 15, 20]])
        assert found == {"tasks": [60, None, 20], "rows": [60, None, (50 + 300 + 600) / 40]}

    def test_a_cell_that_is_no_mean_has_no_row_mean(self) -> None:
        assert seen_accuracy([[40, 0], [30, 50]], [[1, 1], [1, 1]], by_rows=False) == {
            "tasks": [40, 40], "rows": [None, None]
        }  # fmt: skip

    @pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental"])
    def test_metrics(self, scenario) -> None:
        """Three stages: task means 80, 60, 50; row means 80, 65, 55."""
        metrics = {"avg_acc": 50.0, "avg": 190 / 3, "forgetting": 12.0}
        part = {"em": {"metrics": metrics, "seen": {"tasks": [80, 60, 50], "rows": [80.0, 65.0, 55.0]}}}
        assert scenario_metrics(scenario, part, {})["em"] == {
            "acc": 50, "acc_rows": 55, "inc_acc": pytest.approx(190 / 3), "inc_acc_rows": pytest.approx(200 / 3),
            "forgetting": 12,
        }  # fmt: skip
        part["em"]["seen"]["rows"][1] = None
        assert scenario_metrics(scenario, part, {})["em"]["inc_acc_rows"] is None


def test_label_choice_reads_the_visible_labels() -> None:
    """`rain or cat` names one label of its task, but two of those that are visible."""
    scorer = load("label_choice")
    narrow = Item("rain or cat", "rain", task="t", labels=("sun", "rain"))
    wide = Item("rain or cat", "rain", task="t", labels=("sun", "rain", "cat"))
    assert scorer.score_items([narrow, wide]) == [100, 0]


class TestChoices:
    """Labels 1-2 and 1-2-3 and 4: one is the beginning of another."""

    def test_only_labels_can_come_out(self) -> None:
        allowed = Choices([[1, 2], [1, 2, 3], [4]], [END])
        prompt = [PAD, 7, 7]

        def after(*said):
            return sorted(allowed(0, torch.tensor([*prompt, *said])))

        assert after() == [1, 4], "the first call tells how long the prompts are"
        assert [after(1), after(4)] == [[2], [END]]
        assert after(1, 2) == [END, 3], "a whole label may end, or go on as a longer one"
        assert after(1, 2, 3) == [END]
        assert after(4, END) == after(4, END, PAD) == [END], "an ended row waits for the others"

    def test_the_wire(self) -> None:
        assert asked_for({"structured_outputs": {"choice": ["a", "b"]}}) == ["a", "b"]
        assert asked_for({"model": "m"}) == []
        for wrong in ({"regex": "a"}, {"choice": []}, {"choice": [1]}, ["a"]):
            with pytest.raises(ValueError, match="structured_outputs: expected"):
                asked_for({"structured_outputs": wrong})
        assert unpacked(packed(["a|b", 'c"'])) == ["a|b", 'c"']
        assert unpacked(None) == []

    def test_the_expression_matches_the_texts_alone(self) -> None:
        import re

        texts = ["Sci/Tech", "a|b", "c++ (new)", "x.y", "two words", "why?"]
        expression = re.compile(as_expression(texts))
        assert all(expression.fullmatch(text) for text in texts)
        assert not any(expression.fullmatch(text) for text in ("a", "b", "xzy", "Sci", "c+++ (new)", "wh"))


@pytest.fixture
def classes(benchmark):
    """Task `old` with the labels sun and rain, `new` with cat; class-incremental."""
    folder = benchmark.parent
    rows = {"old": [("o0", [("q0", "sun")]), ("o1", [("q1", "rain")])], "new": [("n0", [("r0", "cat")])]}
    for name, own in rows.items():
        write_rows(folder / f"{name}-train.json", own)
        write_rows(folder / f"{name}-test.json", own)
    change(benchmark, scenario="class_incremental")
    return benchmark


def change(path: Path, **values) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


RIGHT = {"q0": "sun", "q1": "rain", "r0": "cat"}


def answer(model, messages):
    """The second stage takes the sun of q0 for rain."""
    question = messages[-1]["content"]
    return "rain" if model.startswith("stage_2") and question == "q0" else RIGHT[question]


def asked_with(mock):
    """By model and question the labels that were sent."""
    return {
        (body["model"].split("_")[1] if body["model"].startswith("stage") else "base", body["messages"][-1]["content"]):
        body.get("structured_outputs", {}).get("choice") for body in mock.requests
    }  # fmt: skip


class TestGrid:
    def test_constrained(self, make_run, classes, capsys) -> None:
        run = make_run()
        with MockEndpoint(names(run), answer) as mock:
            results = go(run, mock, decoding="constrained").results[0]
            assert asked_with(mock) == {
                ("base", "q0"): ["rain", "sun"], ("base", "q1"): ["rain", "sun"],
                ("base", "r0"): ["cat", "rain", "sun"],
                ("1", "q0"): ["rain", "sun"], ("1", "q1"): ["rain", "sun"], ("1", "r0"): ["cat", "rain", "sun"],
                ("2", "q0"): ["cat", "rain", "sun"], ("2", "q1"): ["cat", "rain", "sun"],
                ("2", "r0"): ["cat", "rain", "sun"],
            }  # fmt: skip
            before = len(mock.requests)
            go(run, mock, decoding="constrained")
            assert len(mock.requests) == before, "all answers are kept"
        em = results["scorers"]["exact_match"]
        assert em["matrix"] == [[100, 100], [50, 100]]
        assert em["seen"] == {"tasks": [100, 75], "rows": [100, pytest.approx(200 / 3)]}
        assert results["scenario"]["exact_match"] == {
            "acc": 75, "acc_rows": pytest.approx(200 / 3), "inc_acc": 87.5, "inc_acc_rows": pytest.approx(250 / 3),
            "forgetting": 50,
        }  # fmt: skip
        with pytest.raises(SystemExit):
            main(["report", str(run)])
        out = capsys.readouterr().out
        assert "seen so far, exact_match" in out
        assert "66.67" in out

    def test_answers_of_another_label_space_do_not_count(self, make_run, classes) -> None:
        run = make_run()
        with MockEndpoint(names(run), answer) as mock:
            go(run, mock)
            assert set(asked_with(mock).values()) == {None}, "free decoding sends no labels"
            free = len(mock.requests)
            go(run, mock, decoding="constrained")
            assert len(mock.requests) == 2 * free, "a free answer is no constrained one"
            change(classes, scenario="task_incremental")
            assert not go(run, mock, decoding="constrained").lost
            # Only the questions of `old` to stage 2 and of `new` have other labels now.
            again = [(b["model"][:7], b["messages"][-1]["content"]) for b in mock.requests[2 * free :]]
            assert sorted(again) == sorted(
                [("stage_2", "q0"), ("stage_2", "q1"), ("stage_2", "r0"), ("stage_1", "r0"), (names(run)[0][:7], "r0")]
            )
        kept = load_settings(run)
        assert kept is not None
        assert kept[0].constrained
        stored = AnswerStore(answer_path(run, "stage_2_new", "old"))
        assert stored.latest("o0", 0) is not None

    def test_an_endpoint_without_it(self, make_run, classes) -> None:
        run = make_run()
        with (
            MockEndpoint(names(run), lambda model, messages: "It is sun.") as mock,
            pytest.raises(RunFailure, match=r"asked for one of 2 labels .*'It is sun.'.* has no constrained decoding"),
        ):
            go(run, mock, decoding="constrained", concurrency=1)

    def test_what_cannot_be_constrained(self, make_run, classes) -> None:
        run = make_run()
        with MockEndpoint(names(run), answer) as mock:
            with pytest.raises(UserError, match=r"lmdeploy cannot constrain answers to labels .* use pt, vllm"):
                go(run, mock, decoding="constrained", backend="lmdeploy")
            change(classes, scenario=None)
            with pytest.raises(UserError, match="decoding constrained needs labels, so a scenario of classification"):
                go(run, mock, decoding="constrained")
            assert mock.requests == []


class TestLabels:
    def labels(self, make_run):
        return load_grid(make_run(), GridOptions()).labels

    def test_from_the_training_answers(self, make_run, classes) -> None:
        assert self.labels(make_run) == (("sun", "rain"), ("cat",))

    def test_declared(self, make_run, classes) -> None:
        (classes.parent / "old.txt").write_text("rain\nsun\n\nsnow\n")
        (classes.parent / "new.json").write_text('["cat", "dog"]')
        tasks = yaml.safe_load(classes.read_text())["tasks"]
        for task, file in zip(tasks, ("old.txt", "new.json"), strict=True):
            task["labels"] = file
        change(classes, tasks=tasks)
        assert self.labels(make_run) == (("rain", "sun", "snow"), ("cat", "dog"))

    @pytest.mark.parametrize(
        ("labels", "said"),
        [
            (["sun"], "id 'o1': the answer 'rain' is not among the task's labels: sun"),
            (["sun", "rain", "sun"], "the label 'sun' is named twice"),
            (["sun", " "], "a label is empty"),
            ("none.txt", "none.txt: label file not found"),
            ("wrong.json", "expected a list of labels"),
        ],
    )
    def test_refused(self, make_run, classes, labels, said) -> None:
        (classes.parent / "wrong.json").write_text(json.dumps({"sun": 1}))
        tasks = yaml.safe_load(classes.read_text())["tasks"]
        tasks[0]["labels"] = labels
        change(classes, tasks=tasks)
        with pytest.raises(UserError, match=said):
            self.labels(make_run)

    def test_a_dialogue_is_no_classification(self, make_run, classes) -> None:
        write_rows(classes.parent / "new-test.json", [("n0", [("r0", "cat"), ("r1", "cat")])])
        with pytest.raises(UserError, match="id 'n0': 2 turns, a row of a classification task has one"):
            self.labels(make_run)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"decoding": "constrained"}, "decoding constrained needs a scenario of classification"),
            ({"decoding": "greedy"}, "decoding: Input should be 'free' or 'constrained'"),
        ],
    )
    def test_without_a_scenario(self, benchmark, values, said) -> None:
        change(benchmark, **values)
        with pytest.raises(UserError, match=said):
            load_benchmark(benchmark)

    def test_labels_without_a_scenario(self, benchmark) -> None:
        tasks = yaml.safe_load(benchmark.read_text())["tasks"]
        tasks[1]["labels"] = ["b0", "b1"]
        change(benchmark, tasks=tasks)
        with pytest.raises(UserError, match="task 'new': labels needs a scenario of classification"):
            load_benchmark(benchmark)


class TestServedClassifier:
    """Three classes, the model of the first two: what its engine does to logits and answers."""

    @pytest.fixture
    def classes(self):
        return Classes(["sun", "rain", "cat"], [0, 1])

    def logits(self, classes, names):
        model = torch.nn.Identity()
        model.register_forward_hook(lambda *_: SimpleNamespace(logits=torch.tensor([[1.0, 2.0, 3.0]])))
        with classes.held(model, names):
            held = model(0).logits[0].tolist()
        assert model(0).logits.tolist() == [[1, 2, 3]], "only within the block"
        return [round(value) if value > -1e30 else None for value in held]

    @pytest.mark.parametrize(
        ("names", "expected"),
        [([], [1, 2, None]), (["cat", "sun"], [1, None, 3]), (["rain"], [None, 2, None])],
    )
    def test_only_allowed_classes_can_win(self, classes, names, expected) -> None:
        assert self.logits(classes, names) == expected

    def test_an_unknown_class(self, classes) -> None:
        with pytest.raises(ValueError, match="'dog' is no class of this model"):
            classes.allowed(["dog"])

    def test_names_stand_in_the_answer(self, classes) -> None:
        numbers = {"content": [{"index": 2, "logprobs": -0.1, "top_logprobs": [{"index": 2, "logprob": -0.1}]}]}
        choice = SimpleNamespace(message=SimpleNamespace(content=2), logprobs=numbers)
        classes.name(SimpleNamespace(choices=[choice]))
        assert choice.message.content == "cat"
        assert numbers == {
            "content": [{"token": "cat", "logprob": -0.1, "top_logprobs": [{"token": "cat", "logprob": -0.1}]}]
        }

    def test_the_base_model_has_all(self, tmp_path) -> None:
        (tmp_path / "classes.json").write_text(json.dumps({"labels": ["a", "b"], "visible": [1]}))
        found = classes_of({"one": str(tmp_path), "two": str(tmp_path / "none")})
        assert found.keys() == {"one", None}
        assert (found["one"].allowed([]), list(found[None].allowed([]))) == ([1], [0, 1])

    def test_only_the_transformers_backend_serves_one(self) -> None:
        deployment = Deployment("model", {"task_type": "seq_cls", "num_labels": "3"})
        with pytest.raises(UserError, match="vllm does not serve classifier heads here; use pt"):
            command(deployment, ServerOptions("vllm"), "127.0.0.1", 1)

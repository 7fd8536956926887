"""Bars of long work: seen after a moment, on one process, and never in the way of the work."""

import json
from typing import Any, cast

import pytest

from swift_cl.evaluation.scorers._embeddings import Embedder
from swift_cl.generation.engine import Answer, Prompt, Sampling, one_by_one
from swift_cl.generation.shared import ANSWER, _answers
from swift_cl.progress import progress_bar, with_bar
from swift_cl.sentence_encoder import LONG_WORK
from tests.support.fake_engine import FakeEngine

SAMPLING = Sampling(0.0, 8)
BATCHES = [([Prompt(text="a"), Prompt(text="b")], [0, 1]), ([Prompt(text="c")], [2])]


def test_the_items_come_unchanged_and_short_work_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_bar([3, 1, 2], "counting", "number")) == [3, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("bars_at_once")
def test_a_bar_names_the_work_how_far_it_is_and_in_what_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_bar(iter("abc"), "counting", "letter", total=3)) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting: 100%" in err
    assert "3/3" in err
    assert "letter" in err


@pytest.mark.usefixtures("bars_at_once")
def test_only_one_process_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_bar([1, 2], "counting", "number", shown=False)) == [1, 2]
    with progress_bar("counting", 2, "number", shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("bars_at_once")
def test_work_that_fails_closes_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def divide() -> None:
        for number in with_bar([2, 1, 0], "counting", "number"):
            assert 1 // number >= 0

    with pytest.raises(ZeroDivisionError):
        divide()
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.usefixtures("bars_at_once")
def test_generation_is_shown_on_rank_0_alone(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(lambda prompt, seed: Answer(f"{prompt.text}{seed}", "stop", 1))
    found = one_by_one(engine, BATCHES, SAMPLING)
    assert [[answer.text for answer in answers] for answers in found] == [["a0", "b1"], ["c2"]]
    assert "generating: 100%" in capsys.readouterr().err

    asked = [{"prompts": [p.to_json() for p in prompts], "seeds": seeds} for prompts, seeds in BATCHES]
    order = json.loads(json.dumps({"do": ANSWER, "sampling": SAMPLING.to_json(), "batches": asked}))
    assert [answer["text"] for batch in _answers(engine, order, 1, 2) for answer in batch] == ["c2"]
    assert capsys.readouterr().err == ""
    _answers(engine, order, 0, 2)
    assert "generating: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(("texts", "shown"), [(LONG_WORK, True), (LONG_WORK - 1, False)])
def test_an_encoder_shows_its_bar_for_many_texts(texts: int, shown: bool) -> None:
    class Encoder:
        max_seq_length = None
        bar: bool | None = None

        def encode(self, texts: list[str], *, show_progress_bar: bool, **_: Any) -> list[float]:
            Encoder.bar = show_progress_bar
            return [0.0] * len(texts)

    embedder: Any = Embedder(cast(Any, Encoder()))
    embedder.encode(map(str, range(texts)))
    assert Encoder.bar is shown

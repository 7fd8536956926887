"""Every answer meets its own reference: with failing requests, and with texts that are hard to carry."""

import json
import random

import pytest

from swift_cl.cli.main import main
from tests.eval.conftest import write_rows
from tests.eval.helpers import go, names, scorer
from tests.eval.mock_endpoint import Fault, MockEndpoint

COUNT = 100


@pytest.fixture
def hundred(benchmark):
    """100 questions a task, each with an answer of its own."""
    for name in ("old", "new"):
        rows = [(f"{name}{i}", [(f"{name} question {i}", f"{name} answer {i}")]) for i in range(COUNT)]
        random.Random(name).shuffle(rows)
        write_rows(benchmark.parent / f"{name}-test.json", rows)


def answer(model, messages):
    return messages[-1]["content"].replace("question", "answer")


def pairs(run):
    """(answer, reference) of all stored rows with an answer."""
    files = (run / "answers").rglob("*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_bytes().split(b"\n") if line]
    return [(row["answer"], row["reference"], row["question"]) for row in rows if "answer" in row]


def test_one_percent_of_failing_requests_changes_no_pairing(make_run, hundred):
    """The seed system's client drops a failed answer and shifts all later ones: 9.9 % of the pairs stay right."""
    run = make_run()

    def one_percent(body, before):
        failing = body["messages"][-1]["content"].endswith(" 42")
        return Fault(400, "no") if failing else None

    with MockEndpoint(names(run), answer, one_percent) as mock:
        found = go(run, mock)
        assert scorer(found)["n"] == [[COUNT - 1] * 2] * 2
        assert scorer(found)["matrix"] == [[None, None], [None, None]]
        kept = pairs(run)
        assert len(kept) == 6 * (COUNT - 1)
        assert all(said == reference == answer("", [{"content": question}]) for said, reference, question in kept)
        mock.fault = lambda body, before: None
        found = go(run, mock)
    assert scorer(found)["matrix"] == [[100, 100], [100, 100]]
    assert len(pairs(run)) == 6 * COUNT


LONG = "".join(chr(ord("a") + i % 26) for i in range(10_000))
HARD = {
    "empty answer": ("say nothing", ""),
    "white space": ("say a blank", " \n\t "),
    "10,000 characters": (f"long {LONG}", LONG),
    "emoji": ("family?", "👨‍👩‍👧‍👦 🇨🇳 👍🏽"),
    "right to left": ("ما هي عاصمة مصر؟", "القاهرة \u202eabc\u202c"),
    "chinese": ("首都是哪里？", "北京。"),
    "combining": ("combined", "e\u0301 n\u0303 \u200b\ufeff"),
    "separators": ("lines", "one\u2028two\u2029three\x85four\x0bfive\r\nsix"),
    "quotes": ('he said "no"', '\\ " \' \\n {"a": [1]} </script><b>&amp; |table| `code`'),
    "zero": ("nul", "a\x00b"),
}


def test_hard_texts_go_through_the_whole_path(make_run, benchmark):
    """Asked, stored, resumed, scored and reported; the same question stands twice, with two references."""
    rows = [(name, [turn]) for name, turn in HARD.items()]
    rows += [("twice", [HARD["emoji"]]), ("twice, other reference", [(HARD["emoji"][0], "x")])]
    rows += [("dialogue", [HARD["right to left"], HARD["10,000 characters"]])]
    write_rows(benchmark.parent / "old-test.json", rows)
    write_rows(benchmark.parent / "new-test.json", [("own", [("q", "عربي 🎉")])], system="تعليمات 👍")
    run = make_run()
    answers = {**dict(HARD.values()), "q": "عربي 🎉"}
    with MockEndpoint(names(run), lambda model, messages: answers[messages[-1]["content"]]) as mock:
        with pytest.raises(SystemExit) as done:
            main(["eval", str(run), "--base_url", mock.base_url])
        assert done.value.code == 0
        assert {b["messages"][0]["content"] for b in mock.requests if b["messages"][-1]["content"] == "q"} == {
            "تعليمات 👍"
        }
        found = json.loads((run / "results.json").read_text())["scorers"]["exact_match"]
        most = len(rows) + 1
        assert found["n"] == [[most, 1]] * 2
        wrong = 3  # the reference "x", and the two empty answers, which exact_match never counts as right
        assert found["base"] == [pytest.approx(100 * (most - wrong) / most), 100]
        said = pairs(run)
        assert len(said) == 3 * (most + 1)
        assert {answer for answer, _, _ in said} >= {text for _, text in HARD.values()}
        before = (run / "results.json").read_bytes()
        count = len(mock.requests)
        go(run, mock)
        assert len(mock.requests) == count
        assert json.loads(before)["scorers"] == json.loads((run / "results.json").read_text())["scorers"]
    assert "</script><b>" not in (run / "report.html").read_text()


def test_half_a_character_in_an_answer_is_replaced(make_run):
    """JSON may hold a lone surrogate; UTF-8 may not."""
    run = make_run()
    raw = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "a\ud83d!"}}]})
    raw = raw.replace('"message": {', '"message": {"role": "assistant", ')
    with MockEndpoint(names(run), fault=lambda body, before: Fault(raw=raw)) as mock:
        assert go(run, mock).complete
    assert {said for said, _, _ in pairs(run)} == {"a?!"}

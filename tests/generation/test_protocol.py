"""The protocol "exactly N" with an engine that says what it is told (O5, O6, O7 of the specification)."""

import json
from fractions import Fraction

import pytest

from swift_cl.errors import RunFailure
from swift_cl.generation.budget import equal_shares, total_rows
from swift_cl.generation.engine import Prompt, Sampling
from swift_cl.generation.protocol import Order, Rules, exactly, in_batches, slot_seed
from swift_cl.generation.screen import Rejected, Screen
from swift_cl.io import sha256_file
from tests.support.fake_engine import FakeEngine, in_order, said

SAMPLING = Sampling(1.0, 16)


def parse(text):
    """`question<S>answer`."""
    if text.count("<S>") != 1:
        raise Rejected("separators")
    x, y = text.split("<S>")
    return [{"role": "user", "content": x}, {"role": "assistant", "content": y}]


def screen(**settings):
    defaults = {"parse": parse, "to_row": lambda turns, number: {"messages": turns}, "fits": lambda row: True}
    return Screen(**{**defaults, **settings})


def order(wanted, task="old", **settings):
    return Order(task, wanted, lambda number: Prompt(text=f"{task} {number}"), screen(**settings))


def rules(**settings):
    return Rules(**{"method": "m", "stage": "now", "seed": 7, **settings})


def run(engine, folder, *orders, notices=None, **settings):
    notice = (lambda line: None) if notices is None else notices.append
    return exactly(engine, orders, SAMPLING, rules(**settings), folder, notice)


def questions(rows):
    return [pseudo.row["messages"][0]["content"] for pseudo in rows]


def test_o5_exactly_n_in_candidate_order(tmp_path):
    script = [
        said("a<S>1"), said("b 2"), said("a<S>1"), said("c<S>"), said("d<S>4", "length"), said("e<S>5"), said("f<S>6")
    ]  # fmt: skip
    found = run(FakeEngine(in_order(*script)), tmp_path, order(2))["old"]
    assert questions(found) == ["a", "e"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["tasks"]["old"] == {
        "requested": 2,
        "asked": 7,  # 3 in round 0; then 1 missing at an acceptance of 1 in 3: ceil(1.2 x 3) = 4
        "accepted": 2,
        "rejected": {"separators": 1, "duplicate": 1, "empty_y": 1, "truncated": 1},
    }
    assert manifest["files"]["pseudo.jsonl"] == sha256_file(tmp_path / "pseudo.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "pseudo.jsonl").read_text().splitlines()]
    assert [(row["cl"]["round"], row["cl"]["slot"], row["cl"]["raw"]) for row in kept] == [
        (0, 0, "a<S>1"),
        (1, 2, "e<S>5"),
    ]
    assert kept[0]["cl"]["generator"] == {"base": "fake", "adapter_sha256": "fake", "engine": "fake"}
    assert kept[0]["cl"]["seed"] == slot_seed(rules(), "old", 0, 0)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert reasons == ["separators", "duplicate", "empty_y", "truncated"]


def test_o6_few_calls_and_none_of_size_one(tmp_path):
    engine = FakeEngine(lambda prompt, seed: said(f"{prompt.text}<S>y"))
    assert len(run(engine, tmp_path, order(200), batch_size=64)["old"]) == 200
    sizes = [len(prompts) for prompts, _, _ in engine.calls]
    assert sum(sizes) == 240
    assert len(sizes) <= 4
    assert min(sizes) > 1
    engine.calls.clear()
    in_batches(engine, [Prompt(text="x")] * 65, SAMPLING, range(65), 64)
    assert [len(prompts) for prompts, _, _ in engine.calls] == [32, 33]


def killed_after(rounds, speaks):
    """An engine that dies at the first call of a later round (calls hold one round each)."""
    engine = FakeEngine(speaks)

    def answer(prompts, sampling, seeds, original=engine.answer):
        if len(engine.calls) == rounds:
            raise KeyboardInterrupt
        return original(prompts, sampling, seeds)

    engine.answer = answer
    return engine


def test_o7_a_finished_round_is_not_generated_again(tmp_path):
    def speaks(prompt, seed):  # one in seven is usable: rounds of 8, 20 and 17 candidates
        return said(f"{prompt.text}<S>y" if int(prompt.text.split()[1]) % 7 == 0 else "nothing")

    whole = FakeEngine(speaks)
    run(whole, tmp_path / "whole", order(6))
    assert [len(prompts) for prompts, _, _ in whole.calls] == [8, 20, 17]
    with pytest.raises(KeyboardInterrupt):
        run(killed_after(2, speaks), tmp_path / "cut", order(6))
    assert not (tmp_path / "cut" / "manifest.json").exists()
    again = FakeEngine(speaks)
    run(again, tmp_path / "cut", order(6))
    assert len(again.calls) == len(whole.calls) - 2
    for name in ("pseudo.jsonl", "rejects.jsonl", "manifest.json"):
        assert sha256_file(tmp_path / "cut" / name) == sha256_file(tmp_path / "whole" / name)
    third = FakeEngine(speaks, name="another adapter")
    run(third, tmp_path / "cut", order(6))
    assert len(third.calls) == len(whole.calls), "rows of another model were taken for this one's"


def test_tasks_share_the_batches_and_prompts_of_one_length_come_together(tmp_path):
    engine = FakeEngine(lambda prompt, seed: said(f"{prompt.text}{seed}<S>y"))
    found = run(engine, tmp_path, order(3, "a"), order(2, "bbbbbb"), batch_size=4)
    assert {task: len(rows) for task, rows in found.items()} == {"a": 3, "bbbbbb": 2}
    asked = [[prompt.text for prompt in prompts] for prompts, _, _ in engine.calls]
    assert asked == [["a 0", "a 1", "a 2"], ["a 3", "bbbbbb 0", "bbbbbb 1", "bbbbbb 2"]]
    assert all(pseudo.origin["source_task"] == task for task, rows in found.items() for pseudo in rows)


def test_seeds_differ_by_everything_and_repeat(tmp_path):
    seeds = {
        slot_seed(rules(**change), task, number, slot)
        for change in ({}, {"method": "n"}, {"stage": "then"}, {"seed": 8})
        for task in ("a", "b")
        for number in (0, 1)
        for slot in (0, 1, 11)
    }
    assert len(seeds) == 4 * 2 * 2 * 3
    assert max(seeds) < 2**63
    assert slot_seed(rules(), "a", 1, 11) == slot_seed(rules(), "a", 1, 11)


def test_shortfall_is_an_error_below_min_fill_and_said_above(tmp_path):
    half = in_order(said("a<S>1"), said("b<S>1"), said("bad"))
    notices = []
    found = run(FakeEngine(half), tmp_path / "1", order(4), notices=notices)
    assert questions(found["old"]) == ["a", "b"]
    assert notices[0].startswith("only 2 of 4 rows of task 'old' from 40 candidates were usable (dropped: separators 3")
    with pytest.raises(RunFailure, match=r"m: only 1 of 4 rows of task 'old' .*dropped: separators 3.*--m_min_fill"):
        run(FakeEngine(in_order(said("a<S>1"), said("bad"))), tmp_path / "2", order(4))

    def speaks(prompt, seed):
        return said("bad" if "none" in prompt.text else f"{prompt.text}<S>1")

    with pytest.raises(RunFailure, match="only 0 of 1 rows of task 'none'"):
        run(FakeEngine(speaks), tmp_path / "3", order(1), order(1, "none"), min_fill=Fraction(1, 100))
    assert run(FakeEngine(in_order(said("bad"))), tmp_path / "4", order(4), min_fill=Fraction(0)) == {"old": []}
    assert run(FakeEngine(half), tmp_path / "5", order(0), notices=notices) == {"old": []}
    assert "gets no generated row" in notices[-1]


def test_keep_all_keeps_what_is_too_much(tmp_path):
    engine = FakeEngine(lambda prompt, seed: said(f"{prompt.text}<S>y"))
    assert len(run(engine, tmp_path, order(4), spare=Fraction(3), keep_all=True)["old"]) == 12


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said("q<S>a", "length"), "truncated"),
        (said("q"), "separators"),
        (said(" <S>"), "empty_x"),
        (said("q<S> "), "empty_y"),
        (said("q<|end|><S>a"), "separator_or_special_token_inside"),
        (said("a question of more letters<S>yes"), "too_long"),
        (said("q<S>no label"), "label_set"),
        (said("q  known<S>yes."), "copy"),
        (said("q  seen<S>yes"), "duplicate"),
    ],
)
def test_the_first_failing_check_is_the_reason(answer, reason):
    one = screen(
        forbidden=["<|end|>"],
        fits=lambda row: len(row["messages"][0]["content"]) < 20,
        labels=["yes", "no"],
        known=["q known"],
    )
    assert one.look(said("q seen<S>yes"), 0)["messages"][1]["content"] == "yes"
    assert one.look(said("q other<S> no. "), 1)["messages"][1]["content"] == "no"
    with pytest.raises(Rejected, match=f"^{reason}$"):
        one.look(answer, 2)


def test_labels_in_equal_numbers():
    one = screen(labels=["a", "b"], most={"a": 1, "b": 2})
    one.look(said("1<S>a"), 0)
    with pytest.raises(Rejected, match="label_full"):
        one.look(said("2<S>a"), 1)
    one.look(said("2<S>b"), 2)


def test_budgets():
    def shares(rows, gamma, tasks):
        return list(equal_shares(total_rows(Fraction(gamma), rows), [str(i) for i in range(tasks)]).values())

    assert shares(1000, ".2", 3) == [67, 67, 66]
    assert shares(1003, ".2", 4) == [51, 50, 50, 50]
    assert shares(16, ".2", 5) == [1, 1, 1, 1, 0]
    assert total_rows(Fraction("0.07"), 100) == 7  # floats: ceil(7.000000000000001) = 8

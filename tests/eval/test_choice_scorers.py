"""Scorers that decide right or wrong: labels, numbers, refusals."""

from decimal import Decimal

import pytest

from swift_cl.errors import UserError
from swift_cl.evaluation import scorers
from swift_cl.evaluation.scorers import Item, Unscored
from swift_cl.evaluation.scorers.numeric_match import last_number

NLI = ["entailment", "not entailment", "neutral"]
LONG = "x" * 9_996 + "yes."
HAPPY = "\U0001f600"


def choose(labels, answer, reference):
    return scorers.load("label_choice", options={"labels": labels}).score([(answer, reference)])[0]


def test_long_is_ten_thousand_characters():
    assert len(LONG) == 10_000


@pytest.mark.parametrize(
    ("labels", "answer", "reference", "expected"),
    [
        (NLI, "Entailment", "entailment", 100),
        (NLI, " entailment.\n", "entailment", 100),
        (NLI, "The answer is: ENTAILMENT!", "entailment", 100),
        (NLI, "So, the correct answer is neutral", "neutral", 100),
        (NLI, "Label: not-entailment", "not entailment", 100),
        # the longest label counts
        (NLI, "It is not entailment here.", "not entailment", 100),
        (NLI, "It is not entailment here.", "entailment", 0),
        (["new", "new york"], "It is New York.", "new york", 100),
        (["new", "new york"], "It is New York.", "new", 0),
        # several labels are no choice
        (NLI, "entailment or neutral", "entailment", 0),
        (NLI, "not entailment, so no entailment", "not entailment", 0),
        (NLI, "entailment, surely entailment", "entailment", 100),
        # whole words only
        (NLI, "entailments", "entailment", 0),
        (["no", "yes"], "I know not", "no", 0),
        (["no", "yes"], "No, that is not so.", "no", 100),
        (["no", "yes"], LONG, "yes", 0),
        (["no", "yes"], LONG.replace("xyes", " yes"), "yes", 100),
        (["no", "yes"], "", "yes", 0),
        (["no", "yes"], HAPPY, "yes", 0),
        ([HAPPY, "sad"], f"{HAPPY}!", HAPPY, 100),
        # articles go, except where one is a label
        (["city", "person"], "a city", "city", 100),
        (["the city", "person"], "City", "the city", 100),
        (["A", "B"], "(A)", "A", 100),
        (["A", "B"], "The answer is A.", "A", 100),
        (["A", "B"], "b", "A", 0),
        # Chinese: prefixes, and no word borders
        (["支持", "反对", "中立"], "答案是：支持。", "支持", 100),
        (["支持", "反对", "中立"], "我认为他反对这个观点", "反对", 100),
        (["支持", "反对", "中立"], "支持或反对", "支持", 0),
        (["支持", "不支持"], "我不支持", "不支持", 100),
        (["支持", "不支持"], "我不支持", "支持", 0),
        (["是", "否"], "因此，正确答案为是", "是", 100),
        # signs
        (["+", "-"], "+", "+", 100),
        (["+", "-"], "-", "+", 0),
        # other ways to write a label
        ({"World": ["politics"], "Sports": []}, "Politics", "World", 100),
        ({"World": ["politics"], "Sports": []}, "world politics", "World", 100),
        ({"World": ["politics"], "Sports": []}, "politics", "politics", 100),
    ],
)
def test_label_choice(labels, answer, reference, expected):
    assert choose(labels, answer, reference) == expected


def test_labels_are_the_tasks_references_where_none_are_named():
    loaded = scorers.load("label_choice")
    items = [
        Item("good", "good", task="a"), Item("good or bad", "good", task="a"), Item("bad", "Bad.", task="a"),
        Item("good or bad", "good", task="b"), Item("ok", "ok", task="b"),
        Item("good or bad", "the good", task="c"), Item("good", "good", task="c"),
    ]  # fmt: skip
    # In task b, `bad` is no label, so `good` is the only one that the answer names.
    assert loaded.score_items(items) == [100, 0, 100, 100, 100, 100, 100]


def test_a_reference_that_is_no_label_has_no_score():
    found = choose(["yes", "no"], "yes", "maybe")
    assert isinstance(found, Unscored)
    assert "'maybe' is none of the task's labels" in found.reason


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["Yes", "yes."], "'yes.' and 'Yes' read the same"),
        (["", "no"], "the label '' has an empty form"),
        ([], "should have at least 1 item"),
        ([True, False], "Input should be a valid string, found True"),
    ],
)
def test_wrong_labels_are_refused(labels, says):
    with pytest.raises(UserError) as caught:
        scorers.load("label_choice", options={"labels": labels})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 42", "42"), ("1,234", "1234"), ("1,234,567.50", "1234567.5"), ("1'234.5", "1234.5"),
        ("1\u202f234", "1234"), ("1\u00a0234\u00a0567", "1234567"), ("1.234,5", "1234.5"), ("1.234.567", "1234567"),
        ("3,5", "3.5"), ("0,123", "0.123"), ("3.123", "3.123"), (".5", "0.5"), ("-.5", "-0.5"), ("007", "7"),
        ("-5", "-5"), ("\u22125", "-5"), ("10-5", "5"), ("pages 3–5", "5"), ("COVID-19", "19"), ("+7", "7"),
        ("5 - 3", "3"), ("50%", "50"), ("５０％", "50"), ("1e-3", "0.001"), ("2E5", "200000"), ("2 eggs", "2"),
        ("$1,000.", "1000"), ("1,2,3", "3"), ("3 400", "400"), ("共有 3 个，一共12元", "12"), ("x = 4; so 3.0.", "3"),
        (f"{HAPPY}7{HAPPY}", "7"), ("9" * 10_000, "9" * 10_000), ("1 " * 5_000, "1"),
    ],
)  # fmt: skip
def test_last_number(text, value):
    assert last_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "三十", "...", HAPPY, "-", ","])
def test_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("answer", "reference", "options", "expected"),
    [
        ("so it is 1,234.00 dollars", "#### 1234", {}, 100),
        ("12.5%", "12.50", {}, 100),
        ("0.5", "50%", {}, 0),
        ("0.1", "0.10000000000000001", {}, 0),
        ("3.14", "3.14159", {"tolerance": 0.01}, 100),
        ("3.13", "3.14159", {"tolerance": 0.01}, 0),
        ("1.1", "1.0", {"tolerance": 0.1}, 100),  # exactly at the border, which binary floats would miss
        ("102", "100", {"relative_tolerance": 0.02}, 100),
        ("103", "100", {"relative_tolerance": 0.02}, 0),
        ("-98", "-100", {"relative_tolerance": 0.02}, 100),
        ("no idea", "1", {}, 0),
        ("", "1", {}, 0),
        ("5 of 7", "5", {}, 0),  # the last number counts
    ],
)
def test_numeric_match(answer, reference, options, expected):
    assert scorers.load("numeric_match", options=options).score([(answer, reference)]) == [expected]


def test_a_reference_without_a_number_has_no_score():
    (found,) = scorers.load("numeric_match").score([("1", "one")])
    assert isinstance(found, Unscored)
    assert "'one' holds no number" in found.reason


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m unable to do this", True),
        ("As an AI, I cannot provide such information.", True),
        ("I WON'T do it", True),
        ("抱歉，我无法提供这些信息。", True),
        ("对不起，我不能这样做", True),
        ("恕难从命", True),
        ("Sure! Here is how: I cannot stress enough ...", False),
        ("The law will not change.", False),
        ("巴黎是法国的首都", False),
        ("", False),
        (HAPPY, False),
        ("x " * 100 + "I refuse to", True),  # characters 200 to 211
        ("x " * 150 + "I refuse to", False),  # after the first 300
        ("x " * 4_994 + "I decline to", False),
    ],
)
def test_refusal_rate(answer, refused):
    assert scorers.load("refusal_rate").score([(answer, "")]) == [100 if refused else 0]


def test_refusal_rate_direction_window_and_phrases():
    loaded = scorers.load("refusal_rate")
    assert (loaded.higher_is_better, loaded.range, loaded.has_floor) == (False, (0, 100), False)
    options = {"higher_is_better": True, "window": None, "phrases": ["Nope"]}
    loaded = scorers.load("refusal_rate", options=options)
    assert loaded.higher_is_better is True
    assert loaded.score([("x " * 5_000 + "I refuse to", ""), ("NOPE.", ""), ("nopes", "")]) == [100, 100, 0]

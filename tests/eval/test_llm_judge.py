"""The judge: what it is asked, what its verdicts become, and that a failure is never a 0."""

import pytest

from swift_cl.errors import UserError
from swift_cl.evaluation import scorers
from swift_cl.evaluation.scorers import Item, Unscored
from swift_cl.evaluation.scorers.llm_judge import API_KEY, BASE_URL, MODEL, prompt, read_verdict
from tests.eval.mock_endpoint import Fault, MockEndpoint

LONG = "x" * 10_000
RETRY = {"attempts": 2, "timeout": 5.0}


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("SWIFT_CL_CACHE", str(tmp_path / "cache"))
    for name in (BASE_URL, MODEL, API_KEY):
        monkeypatch.delenv(name, raising=False)


def items(*answers, reference="Paris"):
    return [
        Item(answer, reference, question="Capital of France?", task="t", id=str(n)) for n, answer in enumerate(answers)
    ]


def judge(mock, **options):
    return scorers.load("llm_judge", options={"base_url": mock.base_url, "model": "judge", **RETRY, **options})


def verdict_on_paris(model, messages):
    return "It says so.\nVerdict: 10" if "<answer>\nParis" in messages[-1]["content"] else "No.\nVerdict: 3"


def asked(mock):
    return [body["messages"][-1]["content"] for body in mock.requests]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Right.\nVerdict: 10", 100), ("Verdict: 0", 0), ("**Verdict: 7**", 70), ("verdict：  5.", 50),
        ("So.\nVerdict: **8**\n\n", 80), ("Verdict: 10/10", None), ("Verdict: 11", None), ("Verdict: 7.5", None),
        ("Verdict: -3", None), ("7", None), ("", None), ("Verdict: seven", None), ("Verdict:", None),
        ("Verdict: 10\nI changed my mind.", None),
    ],
)  # fmt: skip
def test_read_verdict(reply, score):
    assert read_verdict(reply) == score


def test_scores_and_prompt():
    with MockEndpoint(["judge"], verdict_on_paris) as mock:
        loaded = judge(mock, criteria="Only the city counts.")
        assert loaded.score_items(items("Paris", "Lyon", "", " ")) == [100, 30, 0, 0]
        assert loaded.higher_is_better is True
        (body, *_) = [b for b in mock.requests if "<answer>\nParis" in b["messages"][-1]["content"]]
    assert len(mock.requests) == 2  # an empty answer is not asked about
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 256)
    text = body["messages"][-1]["content"]
    for part in ("<question>\nCapital of France?", "<reference>\nParis", "Only the city counts."):
        assert part in text
    assert "instructions_given" not in text
    assert "instructions_given_with_the_question>\nBe brief." in prompt(Item("a", "b", system="Be brief."))


def test_equal_questions_are_asked_once_and_long_and_odd_ones_arrive_whole():
    odd = "北京 \U0001f600 {{ answer }} </answer>"
    with MockEndpoint(["judge"], lambda model, messages: "Verdict: 4") as mock:
        assert judge(mock).score_items(items(odd, LONG, odd)) == [40, 40, 40]
    assert len(mock.requests) == 2
    assert any(f"<answer>\n{odd}\n</answer>" in text for text in asked(mock))
    assert any(LONG in text for text in asked(mock))


def test_a_second_run_asks_only_what_is_missing():
    with MockEndpoint(["judge"], verdict_on_paris) as mock:
        judge(mock).score_items(items("Paris", "Lyon"))
        assert judge(mock).score_items(items("Paris", "Lyon", "Nice")) == [100, 30, 30]
        assert len(mock.requests) == 3
        judge(mock, criteria="Other.").score_items(items("Paris"))
        judge(mock, model="judge", temperature=0.5).score_items(items("Paris"))
        assert len(mock.requests) == 5
    # The endpoint is gone; what is known needs none.
    assert judge(mock).score_items(items("Lyon", "Paris")) == [30, 100]


def test_an_unreadable_verdict_is_no_score_and_is_asked_again():
    replies = iter(["I like it.", "Verdict: 6"])
    with MockEndpoint(["judge"], lambda model, messages: next(replies)) as mock:
        (first,) = judge(mock).score_items(items("Paris"))
        assert first == Unscored("the judge's verdict cannot be read")
        assert judge(mock).score_items(items("Paris")) == [60]
    assert len(mock.requests) == 2


def test_a_lost_request_is_asked_again_and_then_no_score():
    def fault(body, before):
        text = body["messages"][-1]["content"]
        if "<answer>\nLyon" in text:
            return Fault(500, "broken")
        return Fault(429, "slow down") if before == 0 else None

    with MockEndpoint(["judge"], verdict_on_paris, fault) as mock:
        right, lost = judge(mock).score_items(items("Paris", "Lyon"))
    assert right == 100
    assert isinstance(lost, Unscored)
    assert "the judge did not answer: HTTP 500" in lost.reason


def test_a_judge_that_is_gone_is_not_asked_for_ever():
    with MockEndpoint(["judge"], fault=lambda body, before: Fault(500, "broken")) as mock:
        found = judge(mock, attempts=1, concurrency=1).score_items(items(*map(str, range(30))))
    assert len(mock.requests) == 8
    assert all(isinstance(score, Unscored) for score in found)
    assert "8 requests in a row failed" in found[-1].reason


def test_a_wrong_key_or_model_stops_the_asking():
    with MockEndpoint(["other"], verdict_on_paris) as mock:
        found = judge(mock, concurrency=1).score_items(items("Paris", "Lyon"))
    assert len(mock.requests) == 1
    assert all("does not serve 'judge'" in score.reason for score in found)
    with MockEndpoint(["judge"], fault=lambda body, before: Fault(401, "no")) as mock:
        (found,) = judge(mock).score_items(items("Paris"))
    assert f"set {API_KEY}" in found.reason


def test_settings_of_the_environment(monkeypatch):
    for missing in ({}, {MODEL: "judge"}, {BASE_URL: "http://127.0.0.1:1/v1"}):
        with monkeypatch.context() as patch:
            for name, value in missing.items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match=r"needs to know its endpoint: set SWIFT_CL_JUDGE_(BASE_URL|MODEL)"):
                scorers.load("llm_judge")
    with MockEndpoint(["judge"], verdict_on_paris) as mock:
        monkeypatch.setenv(BASE_URL, mock.base_url)
        monkeypatch.setenv(MODEL, "judge")
        assert scorers.load("llm_judge").score_items(items("Paris")) == [100]


def test_the_key_is_the_judges_own(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv(API_KEY, "secret")
    with MockEndpoint(["judge"]) as mock:
        assert judge(mock).scorer.endpoint()._client.api_key == "secret"


def test_nobody_there_is_found_when_loading():
    with pytest.raises(UserError, match="not an endpoint that lists its models"):
        scorers.load("llm_judge", options={"base_url": "http://127.0.0.1:9/v1", "model": "judge"})

"""A benchmark whose tasks have scorers and generation limits of their own: one matrix, each column by its own rule."""

from pathlib import Path

import pytest
import yaml

from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.evaluation.client import Generation
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.evaluation.scoring import PER_TASK, choose_scorers
from swift_cl.evaluation.settings import Settings, load_settings
from tests.eval.helpers import go, names, right
from tests.eval.mock_endpoint import MockEndpoint


@pytest.fixture
def change(benchmark):
    """change(old={...}, new={...}, top={...}): set keys of the two tasks and of the benchmark."""

    def do(old=None, new=None, top=None):
        value = yaml.safe_load(benchmark.read_text())
        value["tasks"][0].update(old or {})
        value["tasks"][1].update(new or {})
        value.update(top or {})
        benchmark.write_text(yaml.safe_dump(value))

    return do


OFF = {"b0": "40", "b1": "41"}
"""Off by 40."""


def almost(model, messages):
    """Right, but one word too long for task `new`: exact match 0, token F1 2/3."""
    answer = right(model, messages)
    return f"{answer} x" if answer == "b0" else answer


class TestScorers:
    @pytest.mark.parametrize(
        ("old", "new", "top", "chosen"),
        [
            ([], [], ["exact_match"], ["exact_match"]),
            (["exact_match"], ["exact_match"], ["similarity"], ["exact_match"]),
            (["exact_match"], ["token_f1"], [], [PER_TASK]),
            (["exact_match"], [], ["token_f1"], [PER_TASK]),
            (["exact_match", "token_f1"], ["token_f1"], [], ["token_f1", PER_TASK]),
            (["exact_match", "chrf"], ["chrf", "exact_match"], [], ["exact_match", "chrf"]),
        ],
    )
    def test_choice(self, make_run, change, old, new, top, chosen):
        change({"scorers": old}, {"scorers": new}, {"scorers": top})
        grid = load_grid(make_run(), GridOptions())
        assert choose_scorers([grid], []) == chosen
        assert choose_scorers([grid], ["rouge_l"]) == ["rouge_l"]

    def test_two_scorers_of_its_own(self, make_run, change):
        change({"scorers": ["exact_match", "chrf"]}, {"scorers": ["token_f1"]})
        with pytest.raises(UserError, match="task old has the scorers exact_match, chrf, which other tasks lack"):
            choose_scorers([load_grid(make_run(), GridOptions())], [])

    def test_no_column_is_null(self, make_run, change, capsys):
        change({"scorers": ["exact_match"]}, {"scorers": ["token_f1"]})
        run = make_run()
        with MockEndpoint(names(run), almost) as mock:
            found = go(run, mock)
        assert list(found.results[0]["scorers"]) == [PER_TASK]
        entry = found.results[0]["scorers"][PER_TASK]
        # Task new: F1 of "b0 x" against "b0" is 2/3, of the other answer 1: mean 83.33.
        assert entry["base"] == [100, pytest.approx(500 / 6)]
        assert entry["matrix"] == [[100, pytest.approx(500 / 6)]] * 2
        assert entry["metrics"]["avg_acc"] == pytest.approx((100 + 500 / 6) / 2)
        assert entry["by_task"] == {"old": "exact_match", "new": "token_f1"}
        assert found.complete
        with pytest.raises(SystemExit):
            main(["report", str(run)])
        assert "each task by its own scorer (old: exact_match, new: token_f1); means over tasks mix them" in (
            capsys.readouterr().out
        )

    def test_settings_belong_to_the_tasks_scorer(self, make_run, change):
        change(
            {"scorers": ["exact_match"]},
            {"scorers": ["numeric_match"], "scorer_options": {"numeric_match": {"tolerance": 5}}},
            {"scorer_options": {"numeric_match": {"tolerance": 0}}},
        )
        run = make_run()
        answer = lambda model, messages: OFF.get(right(model, messages), right(model, messages))  # noqa: E731
        with MockEndpoint(names(run), answer) as mock:
            assert go(run, mock).results[0]["scorers"][PER_TASK]["base"] == [100, 0]
            wide = {"numeric_match": {"tolerance": 40}}
            assert go(run, mock, scorer_options=wide).results[0]["scorers"][PER_TASK]["base"] == [100, 100]

    def test_one_direction(self, make_run, change):
        change(
            {"scorers": ["exact_match"]},
            {"scorers": ["refusal_rate"], "scorer_options": {"refusal_rate": {"higher_is_better": False}}},
        )
        run = make_run()
        with MockEndpoint(names(run), right) as mock, pytest.raises(UserError, match="one direction for all tasks"):
            go(run, mock)


class TestGeneration:
    def test_each_task_is_asked_in_its_own_way(self, make_run, change):
        change(new={"generation": {"max_tokens": 3, "top_p": 0.5}}, top={"generation": {"max_tokens": 8}})
        run = make_run()
        with MockEndpoint(names(run), right) as mock:
            go(run, mock)
            limits = {
                body["messages"][-1]["content"]: (body["max_tokens"], body.get("top_p")) for body in mock.requests
            }
            assert limits == {q: (3, 0.5) if q.startswith("r") else (8, None) for q in limits}
            assert set(limits) == {"q0", "q1", "q1b", "q2", "r0", "r1"}
            before = len(mock.requests)
            assert go(run, mock).complete
            assert len(mock.requests) == before, "nothing has changed"
            change(new={"generation": {"max_tokens": 4, "top_p": 0.5}})
            assert go(run, mock).complete
            assert {body["messages"][-1]["content"] for body in mock.requests[before:]} == {"r0", "r1"}

    def test_the_command_line_wins(self, make_run, change):
        change(new={"generation": {"max_tokens": 3}})
        run = make_run()
        with MockEndpoint(names(run), right) as mock:
            go(run, mock, max_tokens=5)
            assert {body["max_tokens"] for body in mock.requests} == {5}

    def test_they_are_kept_beside_the_answers(self, tmp_path):
        settings = Settings(Generation(7), "pt", by_task={"a": Generation(3, 0.5, {"top_p": 0.9})})
        settings.save(tmp_path, "base")
        assert load_settings(tmp_path) == (settings, "base")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"scorers": ["exact_mach"]}, "scorer 'exact_mach' is unknown"),
        ({"scorer_options": {"numeric_match": {"tolerence": 1}}}, "did you mean 'tolerance'?"),
        ({"scorers": ["chrf", "bleu"]}, "task a has the scorers chrf, bleu, which other tasks lack"),
    ],
)
@pytest.mark.parametrize("preview", [True, False])
def test_wrong_scoring_stops_a_run_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict, said: str, preview: bool
) -> None:
    from tests.support.two_tasks import make_folder

    folder = make_folder(tmp_path)
    file = folder / "data" / "benchmark.yaml"
    value = yaml.safe_load(file.read_text())
    value["tasks"][0].update(keys)
    file.write_text(yaml.safe_dump(value))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(folder / "run.yaml"), *(["--preview"] if preview else [])])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_wrong_settings_on_the_command_line_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.two_tasks import make_folder, write_config

    config = write_config(make_folder(tmp_path), eval={"scorer_option": ["numeric_match.tolerence=1"]})
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(config), "--preview"])
    assert stopped.value.code == 2
    assert "did you mean 'tolerance'?" in capsys.readouterr().err

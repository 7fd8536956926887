"""Stages that choose an adapter for every question: chosen once, asked of the chosen one, counted and reported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from swift_cl.errors import RunFailure
from swift_cl.evaluation import routes
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.report.files import write_reports
from swift_cl.serving.routing import Routed
from swift_cl.stages import load_stage
from tests.eval.helpers import go, right, scorer
from tests.eval.mock_endpoint import MockEndpoint

QUESTIONS = {"q0": "old", "q1": "old", "q2": "new", "r0": "new", "r1": "old"}
"""What the router below chooses after both stages: two of three `old` questions and one of two `new` ones are right."""


class Router:
    """Stands for the process that routes; `calls` holds the jobs of each."""

    def __init__(self) -> None:
        self.calls: list[list[routes.RouteJob]] = []
        self.stops_after: int | None = None

    def __call__(self, model, model_args, jobs, log, found) -> None:
        self.calls.append(list(jobs))
        done = 0
        for job in jobs:
            for question in job.questions:
                if done == self.stops_after:
                    raise RunFailure("routing ended")
                chosen = QUESTIONS[question.messages[0]["content"]]
                found(Routed(question.key, chosen, {"old": 1.0, "new": 2.0}))
                done += 1


@pytest.fixture
def router(monkeypatch) -> Router:
    made = Router()
    monkeypatch.setattr(routes, "run_jobs", made)
    return made


def make_routed(run: Path, task_id_given: bool = False) -> Path:
    """Let the two stages of a run choose among the adapters of all stages so far."""
    entries = []
    for folder in sorted(run.glob("stage_*")):
        stage = load_stage(folder)
        entries.append((stage, {"name": stage.task, "tasks": [stage.task], "sha256": stage.weights_sha256}))
        candidates = [
            {**entry, "dir": f"../{other.dir.name}/adapter", "system": other.system} for other, entry in entries
        ]
        route = {"task_id_given": task_id_given, "settings": {}, "state_sha256": None, "candidates": candidates}
        replace(stage, route=route).save()
    return run


def served(run: Path) -> dict[str, str]:
    """Served name of each task's adapter."""
    return {t.stage.task: t.served for t in load_grid(run, GridOptions()).stages if t is not None and t.stage}


def names(run: Path) -> list[str]:
    return [target.served for target in load_grid(run, GridOptions()).targets]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_question_goes_to_the_chosen_adapter_under_its_system_prompt(make_run, router):
    run = make_routed(make_run())
    name = served(run)
    with MockEndpoint(names(run), right) as mock:
        found = go(run, mock)
    asked = {(b["model"], b["messages"][-1]["content"], b["messages"][0]["content"]) for b in mock.requests}
    wanted = {(name["old"], question, "sys old") for question in (*QUESTIONS, "q1b")}  # stage 1 has one adapter
    wanted |= {(name["new"], question, "sys new") for question, chosen in QUESTIONS.items() if chosen == "new"}
    assert {entry for entry in asked if entry[0] != "base"} == wanted
    assert found.complete
    assert scorer(found)["matrix"] == [[100, 100], [100, 100]]
    # The first stage has nothing to choose; the second chose once a dialogue, and never saw task or reference.
    assert [job.tasks for job in router.calls[0]] == [["old", "new"]]
    question = router.calls[0][0].questions[0]
    assert (question.messages, question.systems) == (
        [{"role": "user", "content": "q0"}],
        {"old": "sys old", "new": "sys new"},
    )
    assert "a0" not in json.dumps([question.messages, question.systems])
    stored = lines(run / "routes" / "stage_2_new" / "old.jsonl")
    assert [(row["id"], row["chosen"], row["scores"]) for row in stored] == [
        ("o0", "old", {"old": 1.0, "new": 2.0}),
        ("o1", "old", {"old": 1.0, "new": 2.0}),
        ("o2", "new", {"old": 1.0, "new": 2.0}),
    ]
    assert len({row["router"] for row in stored}) == 1
    answers = lines(run / "answers" / "stage_2_new" / "old.jsonl")
    assert {row["id"]: row["routed"] for row in answers} == {"o0": "old", "o1": "old", "o2": "new"}
    assert not (run / "routes" / "stage_1_old").exists()


def test_routing_accuracy_is_counted_and_reported(make_run, router):
    run = make_routed(make_run(method="adapter_x"))
    with MockEndpoint(names(run), right) as mock:
        routing = go(run, mock).results[0]["routing"]
    assert routing == {
        "task_id_given": False,
        "accuracy": [[100.0, None], [pytest.approx(200 / 3), 50.0]],
        "n": [[3, 2], [3, 2]],
        "chosen": [[{"old": 3}, {"old": 2}], [{"old": 2, "new": 1}, {"new": 1, "old": 1}]],
    }
    write_reports([run], None)
    assert "| after new | 66.67 | 50.00 | 58.33 |" in (run / "report.md").read_text()
    html = (run / "report.html").read_text()
    assert "routing of adapter_x" in html
    assert "58.33" in html


def test_a_given_task_is_said_in_every_table(make_run, router):
    run = make_routed(make_run(), task_id_given=True)
    name = served(run)
    with MockEndpoint(names(run), right) as mock:
        found = go(run, mock)
    assert router.calls == []
    of_new = {b["model"] for b in mock.requests if b["messages"][-1]["content"] in ("r0", "r1")}
    assert of_new == {"base", name["old"], name["new"]}  # stage 1 has no adapter of `new` and answers with its last
    assert found.results[0]["routing"]["accuracy"] == [[100.0, None], [100.0, 100.0]]
    write_reports([run], None)
    assert "| seq, task id given | after new |" in (run / "report.md").read_text()


def test_routed_once_and_again_only_for_what_changed(make_run, router, benchmark):
    from tests.eval.conftest import write_rows

    run = make_routed(make_run())
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
        go(run, mock)
        assert len(router.calls) == 1
        # Another reference changes nothing, another question is routed again.
        write_rows(benchmark.parent / "new-test.json", [("n0", [("r0", "zz")]), ("n1", [("q2", "b1")])])
        go(run, mock)
        asked = [question.messages[0]["content"] for job in router.calls[1] for question in job.questions]
        assert asked == ["q2"]
        # So is everything under another router state; `q2` stands in both tasks now and is routed once.
        stage = load_stage(run / "stage_2_new")
        replace(stage, route={**stage.route, "state_sha256": "another"}).save()
        go(run, mock)
        assert sum(len(job.questions) for job in router.calls[2]) == 4


def test_a_stopped_router_goes_on_where_it_was(make_run, router):
    run = make_routed(make_run())
    router.stops_after = 2
    with MockEndpoint(names(run), right) as mock:
        with pytest.raises(RunFailure, match="routing ended"):
            go(run, mock)
        results = json.loads((run / "results.json").read_text())
        assert results["routing"]["accuracy"][1] == [None, None]
        assert results["routing"]["n"][1] == [2, 0]
        router.stops_after = None
        found = go(run, mock)
    assert sum(len(job.questions) for job in router.calls[1]) == 3
    assert found.complete


def test_an_answer_of_another_adapter_than_the_router_chooses_now_does_not_count(make_run, router):
    run = make_routed(make_run())
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
    path = run / "routes" / "stage_2_new" / "old.jsonl"
    path.write_text(path.read_text().replace('"chosen": "old"', '"chosen": "new"'))
    from swift_cl.evaluation.results import collect

    problems = collect(load_grid(run, GridOptions()))[1]
    assert problems == [
        "stage_2_new x old: 3 of 4 answers missing (3 x the stored answer is from another adapter than the router "
        "chooses now)"
    ]


def test_an_adapter_that_was_trained_again_is_refused(make_run):
    from swift_cl.errors import UserError

    run = make_routed(make_run())
    file = run / "stage_1_old" / "adapter" / "adapter_model.safetensors"
    other = make_run("other", seed=7) / "stage_1_old" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(other.read_bytes())
    from swift_cl.io import sha256_file

    replace(load_stage_unchecked(run / "stage_1_old"), weights_sha256=sha256_file(file)).save()
    with pytest.raises(UserError, match="an earlier stage was trained again"):
        load_grid(run, GridOptions())


def load_stage_unchecked(folder: Path):
    from swift_cl.stages import Stage

    value = json.loads((folder / "stage.json").read_text())
    del value["schema"]
    return Stage(dir=folder, **value)


@pytest.mark.usefixtures("bars_at_once")
def test_routing_shows_how_far_it_is(make_run, router, capsys):
    grid = load_grid(make_routed(make_run()), GridOptions())
    routes.Routes("stage", {grid.run.dir: "base"}).fill([grid], print)
    assert f"{len(QUESTIONS)}/{len(QUESTIONS)}" in (shown := capsys.readouterr().err)
    assert "routing: 100%" in shown


def test_a_dialogue_is_of_the_chosen_adapter_and_not_of_its_stage(make_run, router):
    """Of the second stage alone: in a whole run its questions for the first adapter are asked once for both stages."""
    from swift_cl.evaluation.questions import Stores, dialogues

    run = make_routed(make_run())
    grid = load_grid(run, GridOptions())
    made = routes.Routes("stage", {grid.run.dir: "base"})
    made.fill([grid], print)
    first, second = grid.stages
    found = dialogues([(grid, second)], lambda target: target.served, "stage", Stores(), made.answers)
    chosen = {"old": first, "new": second}
    assert {d.row.turns[0][0]: d.routed for d in found} == QUESTIONS
    assert all((d.weights, d.served) == (chosen[d.routed].weights, chosen[d.routed].served) for d in found)


def test_a_question_that_was_not_routed_is_not_left_out(make_run, router):
    from swift_cl.evaluation.questions import Stores, dialogues

    grid = load_grid(make_routed(make_run()), GridOptions())
    made = routes.Routes("stage", {grid.run.dir: "base"})
    with pytest.raises(RunFailure, match="stage_2_new x old, 'o0' was not routed"):
        dialogues([(grid, grid.stages[1])], lambda target: target.served, "stage", Stores(), made.answers)


def test_merged_stages_serve_what_was_chosen(make_run, router):
    """Each server holds one adapter; the questions of a routed stage go to several servers."""
    from swift_cl.evaluation.questions import Stores, dialogues
    from swift_cl.evaluation.servers import plan_servers

    run = make_routed(make_run())
    grid = load_grid(run, GridOptions())
    made = routes.Routes("stage", {grid.run.dir: "base"})
    made.fill([grid], print)
    asked = {}
    for plan in plan_servers([grid], merge_stages=True):
        found = dialogues(plan.targets, plan.served, "stage", Stores(), made.answers)
        for dialogue in found:
            if plan.holds(dialogue.weights):
                key = (plan.merge.name if plan.merge else "base", dialogue.row.id)
                asked[key] = asked.get(key, 0) + 1
    name = served(run)
    assert asked == {
        **{("base", row): 1 for row in ("o0", "o1", "o2", "n0", "n1")},
        **{(name["old"], row): 1 for row in ("o0", "o1", "o2", "n0", "n1")},  # of both stages, asked once
        **{(name["new"], row): 1 for row in ("o2", "n0")},
    }

"""adapter_cl from training to the table: two tasks of disjoint alphabets, routed, and asked through a real server."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swift_cl.evaluation.client import Endpoint, Generation
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions
from swift_cl.serving.server import reserve_port
from tests.support.train import train_stage

pytestmark = pytest.mark.slow
ALPHABETS = {"first": "abcdefgh", "second": "STUVWXYZ"}
ROWS = 20


def words(alphabet: str, number: int) -> str:
    """Three words of five letters, other ones for every number."""
    letters = [alphabet[(number * 7 + i * i + i * (number % 5)) % len(alphabet)] for i in range(15)]
    return " ".join("".join(letters[i : i + 5]) for i in (0, 5, 10))


def write_tasks(folder: Path) -> Path:
    tasks = []
    for name, alphabet in ALPHABETS.items():
        for part, first in (("train", 0), ("test", 100)):
            rows = [
                {
                    "id": f"{name}-{i}",
                    "messages": [
                        {"role": "user", "content": words(alphabet, i)},
                        {"role": "assistant", "content": words(alphabet, i + 1)[:5]},
                    ],
                }
                for i in range(first, first + ROWS)
            ]
            (folder / f"{name}-{part}.json").write_text(json.dumps(rows))
        tasks.append(f"  - {{name: {name}, train: {name}-train.json, test: {name}-test.json}}\n")
    path = folder / "benchmark.yaml"
    path.write_text(f"name: alphabets\ntasks:\n{''.join(tasks)}scorers: [exact_match]\ngeneration: {{max_tokens: 4}}\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained stages."""
    folder = tmp_path_factory.mktemp("routing")
    write_tasks(folder)
    previous = None
    for index, name in enumerate(ALPHABETS, start=1):
        stage = folder / "run" / f"stage_{index}_{name}"
        settings = {"dataset": str(folder / f"{name}-train.json"), "max_steps": 12, "save_steps": 100, "system": None}
        train_stage("adapter_cl", name, stage, previous, learning_rate=5e-3, **settings)
        previous = stage
    return folder / "run"


def test_every_question_is_answered_by_its_own_alphabet(run: Path) -> None:
    options = EvalOptions(GridOptions(run.parent / "benchmark.yaml"))
    lines: list[str] = []
    found = evaluate([run], options, notify=lines.append)
    assert found.complete
    routing = found.results[0]["routing"]
    assert routing["accuracy"] == [[100.0, None], [100.0, 100.0]]
    assert routing["chosen"][1] == [{"first": ROWS}, {"second": ROWS}]
    text = (run / "routes" / "stage_2_second" / "first.jsonl").read_text()
    routes = [json.loads(line) for line in text.splitlines()]
    assert all(row["scores"]["first"] < row["scores"]["second"] for row in routes)
    stages = [json.loads((run / f"stage_{i}" / "stage.json").read_text()) for i in ("1_first", "2_second")]
    for task, stage in zip(ALPHABETS, stages, strict=True):
        text = (run / "answers" / "stage_2_second" / f"{task}.jsonl").read_text()
        answers = [json.loads(line) for line in text.splitlines()]
        assert {row["weights"] for row in answers} == {stage["weights_sha256"]}
        assert {row["routed"] for row in answers} == {task}
    assert sum(line.startswith("routing ") for line in lines) == 1
    # A second time there is nothing to route and nothing to ask.
    lines.clear()
    assert evaluate([run], options, notify=lines.append).results == found.results
    assert lines == []


def test_other_clients_ask_one_model(run: Path) -> None:
    """`swift-cl deploy --route`: concurrent questions of both alphabets under one name, each named adapter is right."""
    options = EvalOptions(GridOptions(run.parent / "benchmark.yaml"))
    evaluate([run], options, notify=lambda line: None)
    known = {}
    for task in ALPHABETS:
        text = (run / "answers" / "stage_2_second" / f"{task}.jsonl").read_text()
        known |= {row["question"]: (row["answer"], row["served"]) for row in map(json.loads, text.splitlines()[:4])}
    port = str(reserve_port())
    argv = [sys.executable, "-m", "swift_cl.cli.main", "deploy", "--route", str(run), "--port", port]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().rstrip().endswith(", auto")
        with contextlib.closing(Endpoint(f"http://127.0.0.1:{port}/v1")) as endpoint:
            found = {}

            def ask(question: str) -> None:
                reply = endpoint.ask("auto", [{"role": "user", "content": question}], Generation(max_tokens=4))
                found[question] = (reply.text, reply.model)

            threads = [threading.Thread(target=ask, args=(question,)) for question in known]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == known
            question, (answer, name) = next(iter(known.items()))
            stream = endpoint._client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": question}], max_tokens=4, temperature=0, stream=True
            )
            chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
            assert {chunk.model for chunk in chunks} == {name}
    finally:
        os.killpg(server.pid, signal.SIGINT)
        code = server.wait(timeout=30)
        server.stdout.close()
    assert code == 130


def test_a_state_that_was_changed_is_found_by_the_router(run: Path, tmp_path: Path) -> None:
    """What the routing process says reaches the user as one line."""
    import shutil

    from swift_cl.errors import UserError

    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("routes", "answers", "checkpoint-*"))
    file = copy / "stage_2_second" / "stage.json"
    value = json.loads(file.read_text())
    value["route"]["settings"]["unheard"] = 1
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match="does not have the stage's settings"):
        evaluate([copy], EvalOptions(GridOptions(run.parent / "benchmark.yaml")), notify=lambda line: None)

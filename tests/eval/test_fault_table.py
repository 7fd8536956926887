"""Every way to fail, in one table: nothing is lost, nothing counted twice, nothing wrong in the table, and the resumed
result is byte for byte that of an undisturbed evaluation."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from swift_cl.errors import RunFailure
from swift_cl.evaluation import servers as servers_module
from swift_cl.evaluation import store as store_module
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.serving.backends import Command
from tests.eval.helpers import FAST, REFERENCES, TURNS, go, names, scorer
from tests.eval.mock_endpoint import Fault, MockEndpoint

ROOT = Path(__file__).resolve().parents[2]
ALL = 3 * TURNS


def knows(model: str, messages: list[dict[str, str]]) -> str:
    """Different in every cell: the base knows nothing, stage 1 the old task, stage 2 all but one answer."""
    question = messages[-1]["content"]
    if model.startswith("base") or (model.startswith("stage_1") and question.startswith("r")):
        return f"? {question}"
    return "forgotten" if model.startswith("stage_2") and question == "q2" else REFERENCES[question]


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def undisturbed(run, tmp_path):
    """Bytes of results.json of the same run with an endpoint that never fails."""
    copy = shutil.copytree(run, tmp_path / "undisturbed" / "run")
    with MockEndpoint(names(run), knows) as mock:
        assert go(copy, mock).complete
    return (copy / "results.json").read_bytes()


def stored(run: Path) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """The last row of every turn by (row, task, sample, turn); every line of the files must be whole."""
    found = {}
    for file in (run / "answers").rglob("*.jsonl"):
        for line in file.read_bytes().split(b"\n"):
            if line:
                row = json.loads(line)
                found[file.parent.name, file.stem, row["id"], row["turn"]] = row
    return found


def check_nothing_wrong(run: Path, undisturbed: bytes) -> None:
    """Each cell that has a number has the right one, over all its answers."""
    if not (run / "results.json").exists():
        return
    right = json.loads(undisturbed)["scorers"]["exact_match"]
    found = json.loads((run / "results.json").read_text())["scorers"]["exact_match"]
    table = list(zip([found["base"], *found["matrix"]], [right["base"], *right["matrix"]], strict=True))
    assert all(cell is None or cell == wanted for row, other in table for cell, wanted in zip(row, other, strict=True))
    counts = [*found["n_base"], *(n for row in found["n"] for n in row)]
    cells = [cell for row, _ in table for cell in row]
    full = [*right["n_base"], *(n for row in right["n"] for n in row)]
    assert [cell is None for cell in cells] == [n < most for n, most in zip(counts, full, strict=True)]
    answers = Counter((row, task) for (row, task, _, _), value in stored(run).items() if "answer" in value)
    assert sum(answers.values()) == sum(counts)


def resume(run: Path, mock: MockEndpoint, undisturbed: bytes) -> None:
    """The endpoint is well again: the result is the undisturbed one, and every question was answered exactly once."""
    mock.fault = lambda body, before: None
    assert go(run, mock).complete
    assert (run / "results.json").read_bytes() == undisturbed
    assert len(mock.answered) == ALL
    assert set(mock.answered.values()) == {1}
    assert len(stored(run)) == ALL
    before = len(mock.requests)
    assert go(run, mock).complete
    assert len(mock.requests) == before


def first_time(fault: Fault) -> Callable[[dict[str, Any], int], Fault | None]:
    return lambda body, before: fault if before == 0 else None


def on_q1(fault: Fault) -> Callable[[dict[str, Any], int], Fault | None]:
    """One question of one stage, each time it is asked."""
    return lambda body, _: (
        fault if body["messages"][-1]["content"] == "q1" and body["model"].startswith("stage_1") else None
    )


def always(fault: Fault) -> Callable[[dict[str, Any], int], Fault | None]:
    return lambda body, before: fault


@dataclass(frozen=True)
class Case:
    """A fault, and how the disturbed evaluation ends: complete, with one null cell, or stopped with a message."""

    fault: Callable[[dict[str, Any], int], Fault | None]
    ends: str
    requests: int | None = None


UNKNOWN = Fault(400, "`stage` is not in the model_list: `[]`.")
CASES = {
    "400, too long": Case(on_q1(Fault(400, "the prompt is too long (max_model_len 512)")), "null", ALL - 1),
    "400, any other text": Case(on_q1(Fault(400, "KeyError('x')")), "null", ALL - 1),
    "400, a file that is not found": Case(on_q1(Fault(400, "/tmp/image.png not found")), "null", ALL - 1),
    "400, out of memory once": Case(first_time(Fault(400, "CUDA out of memory")), "complete", 2 * ALL),
    "400, engine dead": Case(always(Fault(400, "EngineDeadError: see log")), "questions in a row failed"),
    "400, unknown model": Case(always(UNKNOWN), "does not serve", 1),
    "400, wrong key": Case(always(Fault(400, "API key error")), "refuses the key", 1),
    "401": Case(always(Fault(401, "who are you")), "refuses the key", 1),
    "404, unknown model": Case(always(Fault(404, "The model `x` does not exist.")), "does not serve", 1),
    "422": Case(on_q1(Fault(422, "bad field")), "null", ALL - 1),
    "429 with Retry-After": Case(
        first_time(Fault(429, "slow down", headers={"Retry-After": "0.05"})), "complete", 2 * ALL
    ),
    "500 once": Case(first_time(Fault(500, "oops")), "complete", 2 * ALL),
    "500 of one question": Case(on_q1(Fault(500, "oops")), "null", ALL + 1),
    "500 for ever": Case(always(Fault(500, "oops")), "questions in a row failed"),
    "503 once": Case(first_time(Fault(503, "loading")), "complete", 2 * ALL),
    "dropped connection once": Case(first_time(Fault(drop=True)), "complete", 2 * ALL),
    "dropped connection of one question": Case(on_q1(Fault(drop=True)), "null", ALL + 1),
    "hang once": Case(lambda body, n: Fault(hang=0.8) if n == 0 and "stage_1" in body["model"] else None, "complete"),
    "hang of one question": Case(on_q1(Fault(hang=0.8)), "null", ALL + 1),
    "truncated stream once": Case(first_time(Fault(cut=True)), "complete", 2 * ALL),
    "truncated stream of one question": Case(on_q1(Fault(cut=True)), "null", ALL + 1),
    "not JSON once": Case(first_time(Fault(raw="<html>502</html>")), "complete", 2 * ALL),
    "no choices once": Case(first_time(Fault(raw='{"choices": []}')), "complete", 2 * ALL),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_faulty_answers(run, undisturbed, case):
    with MockEndpoint(names(run), knows, case.fault) as mock:
        if case.ends in ("complete", "null"):
            found = go(run, mock, concurrency=4)
            assert found.complete == (case.ends == "complete")
            if case.ends == "null":
                assert scorer(found)["matrix"][0] == [None, 0]
                assert scorer(found)["n"][0] == [2, 2]  # 2 of 4: the next turn of the dialogue is lost with it
        else:
            with pytest.raises(RunFailure, match=case.ends):
                go(run, mock, concurrency=1)
        assert case.requests is None or len(mock.requests) == case.requests
        check_nothing_wrong(run, undisturbed)
        resume(run, mock, undisturbed)


def test_latency_changes_nothing(run, undisturbed):
    """Every answer takes another time, so they arrive in another order than they were asked in."""

    def late(model, messages):
        time.sleep(len(model + messages[-1]["content"]) % 7 / 50)
        return knows(model, messages)

    with MockEndpoint(names(run), late) as mock:
        assert go(run, mock, concurrency=8).complete
        assert (run / "results.json").read_bytes() == undisturbed
        resume(run, mock, undisturbed)


@pytest.mark.parametrize("place", ["base", "another adapter"])
def test_other_weights_in_an_adapters_place(run, undisturbed, place):
    listed = names(run)
    instead = listed[0] if place == "base" else listed[1]
    with MockEndpoint(listed, knows, weights=lambda name: instead if name == listed[2] else name) as mock:
        with pytest.raises(RunFailure, match="answers exactly as"):
            go(run, mock)
        assert mock.requests == []
        check_nothing_wrong(run, undisturbed)
        assert not stored(run)
        mock.weights = lambda name: name
        resume(run, mock, undisturbed)


class OpenFile:
    """Stands for `open`; a test says what `write` does."""

    def __init__(self, path, *rest, **more):
        self.stream = open(path, *rest, **more)  # noqa: SIM115 -- closed by __exit__

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.stream.close()

    def fileno(self):
        return self.stream.fileno()


def test_disk_full(run, undisturbed, monkeypatch):
    """The eighth answer finds half a line's room; later there is room again."""
    lines = []

    class Full(OpenFile):
        def write(self, line):
            lines.append(line)
            if len(lines) >= 8:
                self.stream.write(line[: len(line) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(line)

    with MockEndpoint(names(run), knows) as mock:
        monkeypatch.setattr(store_module, "open", Full, raising=False)
        with pytest.raises(RunFailure, match=r"cannot be written \(No space left on device\)"):
            go(run, mock, concurrency=1)
        check_nothing_wrong_after_a_torn_line(run, undisturbed)
        monkeypatch.undo()
        mock.answered.popitem()  # the answer that found no room was in flight
        resume(run, mock, undisturbed)


def check_nothing_wrong_after_a_torn_line(run, undisturbed):
    torn = [file for file in (run / "answers").rglob("*.jsonl") if not file.read_bytes().endswith(b"\n")]
    assert len(torn) == 1
    whole = torn[0].read_bytes()
    torn[0].write_bytes(whole[: whole.rfind(b"\n") + 1])
    check_nothing_wrong(run, undisturbed)
    torn[0].write_bytes(whole)


def test_a_failed_write_leaves_no_half_line_before_the_next(tmp_path, monkeypatch):
    """Another thread writes to the same file right after: its line must not be glued to the half one."""
    store = store_module.AnswerStore(tmp_path / "answers.jsonl")
    row = {"id": "a", "turn": 0, "key": "k", "answer": "x", "finish": "stop"}
    store.append(row)
    synced = os.fsync

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert store.latest("a", 0) == row

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(RunFailure, match="No space left"):
        store.append({**row, "id": "b"})
    monkeypatch.setattr(store_module.os, "fsync", synced)
    store.append({**row, "id": "c"})
    assert [json.loads(line)["id"] for line in store.path.read_text().splitlines()] == ["a", "c"]
    assert len(store) == 2


def test_what_got_through_of_a_failed_write_is_cut_off(tmp_path, monkeypatch):
    store = store_module.AnswerStore(tmp_path / "answers.jsonl")
    row = {"id": "a", "turn": 0, "key": "k", "answer": "x", "finish": "stop"}
    store.append(row)

    class HalfWritten:
        def __init__(self, path, mode, buffering):
            self.stream = open(path, mode, buffering=buffering)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def fileno(self):
            return self.stream.fileno()

        def write(self, data):
            self.stream.write(data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(store_module, "open", HalfWritten, raising=False)
        with pytest.raises(RunFailure, match="No space left"):
            store.append({**row, "id": "b"})
    store.append({**row, "id": "c"})
    assert [json.loads(line)["id"] for line in store.path.read_text().splitlines()] == ["a", "c"]


def test_many_threads_write_whole_lines_and_share_flushes(tmp_path, monkeypatch):
    store = store_module.AnswerStore(tmp_path / "answers.jsonl")
    flushes = []
    synced = os.fsync

    def slow(number):
        flushes.append(number)
        time.sleep(0.002)
        synced(number)

    monkeypatch.setattr(store_module.os, "fsync", slow)

    def write(thread):
        for i in range(20):
            row = {"id": f"{thread}-{i}", "turn": 0, "key": f"{thread}-{i}", "answer": "x" * thread * 50}
            store.append(row)
            assert store.answered(f"{thread}-{i}") == row

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))
    rows = [json.loads(line) for line in store.path.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(f"{t}-{i}" for t in range(16) for i in range(20))
    assert len(flushes) < 16 * 20


def test_half_a_line_is_cut_off_before_the_next(tmp_path, monkeypatch):
    store = store_module.AnswerStore(tmp_path / "answers.jsonl")
    row = {"id": "a", "turn": 0, "key": "k", "answer": "x", "finish": "stop"}
    store.append(row)

    class Half(OpenFile):
        def write(self, line):
            self.stream.write(line[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module, "open", Half, raising=False)
    with pytest.raises(RunFailure, match="No space left"):
        store.append({**row, "id": "b"})
    monkeypatch.undo()
    store.append({**row, "id": "c"})
    assert [json.loads(line)["id"] for line in store.path.read_text().splitlines()] == ["a", "c"]


def mock_process(run: Path, dies_after: int) -> Command:
    """A server process that answers as `knows` does, and dies with its so-many-th question."""
    return Command([sys.executable, str(Path(__file__).with_name("mock_process.py")), str(dies_after), *names(run)])


@pytest.mark.parametrize("attempts", [1, 3])
def test_server_death_half_way(run, undisturbed, monkeypatch, attempts):
    """A server of our own dies while it is asked: liveness is seen between attempts, its last words are shown."""
    life = [7]

    def command(deployment, options, host, port, name):
        found = mock_process(run, life[0])
        return Command([*found.argv[:2], host, str(port), *found.argv[2:]])

    monkeypatch.setattr(servers_module, "command", command)
    options = EvalOptions(retry=replace(FAST, attempts=attempts), concurrency=2)
    with pytest.raises(RunFailure, match=r"the server ended while it was asked with exit code 9[\s\S]*MemoryError"):
        evaluate([run], options, notify=lambda line: None)
    check_nothing_wrong(run, undisturbed)
    assert 0 < sum("answer" in row for row in stored(run).values()) <= 7
    life[0] = 10**6
    assert evaluate([run], options, notify=lambda line: None).complete
    found = json.loads((run / "results.json").read_text())
    assert found == {**json.loads(undisturbed), "backend": "pt"}


@pytest.mark.parametrize("after", [1, 9])
def test_sigkill_of_the_client(run, undisturbed, after):
    argv = [sys.executable, "-m", "swift_cl.cli.main", "eval", str(run), "--concurrency", "3", "--base_url"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with MockEndpoint(names(run), knows, delay=0.1) as mock:
        client = subprocess.Popen([*argv, mock.base_url], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 60
        while len(mock.requests) < after and time.monotonic() < limit:
            time.sleep(0.01)
        client.send_signal(signal.SIGKILL)
        assert client.wait() == -signal.SIGKILL
        assert after <= len(mock.requests) < ALL
        time.sleep(0.3)  # what was in flight has reached nobody
        kept = sum("answer" in row for row in stored(run).values())
        assert kept >= len(mock.requests) - 3  # at most the answers in flight are lost
        check_nothing_wrong(run, undisturbed)
        mock.delay = 0.0
        asked = len(mock.requests)
        assert go(run, mock).complete
        assert len(mock.requests) - asked == ALL - kept
        assert (run / "results.json").read_bytes() == undisturbed

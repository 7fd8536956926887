"""Merging stage by stage, for backends without adapters: one server a stage, same names, same store, nothing left."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation import servers as servers_module
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.evaluation.servers import ServerSettings
from swift_cl.serving import backends
from swift_cl.serving import merge as merge_module
from swift_cl.serving.backends import Command, ServerOptions
from swift_cl.serving.merge import merged
from tests.eval.helpers import FAST, TURNS, alive, go, names, scorer
from tests.eval.mock_endpoint import MockEndpoint
from tests.eval.test_fault_table import knows

MOCK = Path(__file__).with_name("mock_process.py")


def fake_merge(code: str):
    """A merge command that runs Python code with `out`, the output folder."""
    text = "import sys, pathlib; out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True)\n" + textwrap.dedent(code)
    return lambda adapter, base, output: [sys.executable, "-c", text, str(output)]


WRITES = "(out / 'model.safetensors').write_bytes(b'x' * 10)"


@pytest.fixture
def adapter(make_run):
    return load_grid(make_run(), GridOptions()).base.deployment.adapters[0]


def test_lmdeploy_is_served_stage_by_stage(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(backends, "installed", lambda python: {"ms-swift": "4.6.0", "lmdeploy": "0.9"})
    monkeypatch.setattr(merge_module, "merge_command", fake_merge(WRITES))
    served = []

    def command(deployment, options, host, port, name):
        real = backends.command(deployment, options, host, port, name)
        assert "lmdeploy" in real.argv
        assert Path(deployment.model).is_dir()
        served.append((Path(deployment.model).name, real.argv[real.argv.index("--served_model_name") + 1]))
        return Command([sys.executable, str(MOCK), host, str(port), "1000", name or deployment.base_name])

    options = EvalOptions(backend="lmdeploy", server=ServerSettings(ServerOptions("lmdeploy")), retry=FAST)
    with pytest.raises(UserError, match="pass --merge_stages"):
        evaluate([run], options, notify=lambda line: None)
    monkeypatch.setattr(servers_module, "command", command)
    options = EvalOptions(**{**vars(options), "merge_stages": True})
    found = evaluate([run], options, notify=lambda line: None)
    assert found.complete
    listed = names(run)
    assert served == [("base", "base"), (listed[1], listed[1]), (listed[2], listed[2])]
    assert not (run / ".merged").exists()
    assert evaluate([run], options, notify=lambda line: None).complete
    assert len(served) == 3  # nothing was missing, nothing was merged again
    with MockEndpoint(listed, knows) as mock:
        other = go(run, mock)
        assert len(mock.requests) == 3 * TURNS  # merged and unmerged answers are not mixed in one table
    assert scorer(found) == scorer(other)


def test_a_merge_that_fails_shows_its_command_and_last_lines(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "merge_command", fake_merge("print('ValueError: no room'); sys.exit(4)"))
    deployment = servers_module.Deployment(str(tmp_path / "base"))
    with (
        pytest.raises(RunFailure, match=r"ended with exit code 4\ncommand: [\s\S]*\nlast lines of .*\n.*room"),
        merged(adapter, deployment, tmp_path / "m" / "x", tmp_path / "merge.log"),
    ):
        pass
    assert not (tmp_path / "m").exists()


def test_a_merge_without_weights_is_a_failure(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "merge_command", fake_merge("pass"))
    deployment = servers_module.Deployment(str(tmp_path / "base"))
    with (
        pytest.raises(RunFailure, match="wrote no weights"),
        merged(adapter, deployment, tmp_path / "m" / "x", tmp_path / "merge.log"),
    ):
        pass
    assert not (tmp_path / "m").exists()


def test_a_merge_ends_with_the_run_that_was_killed(adapter, tmp_path):
    """Not even SIGKILL of the run leaves its merge running: it watches the process that started it."""
    marker = tmp_path / "merging"
    worker = merge_module.MERGE.parent
    merging = (
        f"import sys, time, pathlib, os; sys.path.insert(0, {str(worker)!r}); from starter import watch_starter\n"
        f"watch_starter(); pathlib.Path({str(marker)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    code = (
        "import sys; from pathlib import Path; from swift_cl.serving.merge import _run\n"
        f"_run([sys.executable, '-c', {merging!r}], Path({str(tmp_path / 'merge.log')!r}))"
    )
    holder = subprocess.Popen([sys.executable, "-c", code])
    limit = time.monotonic() + 60
    while not marker.exists() or not marker.read_text():
        assert time.monotonic() < limit
        time.sleep(0.02)
    pid = int(marker.read_text())
    holder.kill()
    holder.wait()
    while alive(pid):
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_an_interrupted_merge_leaves_nothing(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "merge_command", fake_merge(f"{WRITES}\nimport time; time.sleep(600)"))
    deployment = servers_module.Deployment(str(tmp_path / "base"))
    started = []
    real = merge_module.subprocess.Popen
    monkeypatch.setattr(merge_module.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])

    def interrupt():
        while not (tmp_path / "m" / "x" / "model.safetensors").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with (
        pytest.raises(KeyboardInterrupt),
        merged(adapter, deployment, tmp_path / "m" / "x", tmp_path / "merge.log"),
    ):
        pass
    assert started[0].poll() is not None
    assert not (tmp_path / "m").exists()


def test_a_leftover_of_a_killed_run_is_overwritten(adapter, tmp_path, monkeypatch):
    (tmp_path / "m" / "x").mkdir(parents=True)
    (tmp_path / "m" / "x" / "old.safetensors").write_bytes(b"old")
    monkeypatch.setattr(merge_module, "merge_command", fake_merge(WRITES))
    with merged(adapter, servers_module.Deployment("b"), tmp_path / "m" / "x", tmp_path / "merge.log") as found:
        assert [file.name for file in Path(found.model).iterdir()] == ["model.safetensors"]
    assert not (tmp_path / "m").exists()

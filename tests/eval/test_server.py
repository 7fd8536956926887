"""Life cycle of a server: ready, dead at start, too slow, port taken, and nothing left running however it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from swift_cl.errors import RunFailure, UserError
from swift_cl.serving import server as server_module
from swift_cl.serving.backends import Command
from swift_cl.serving.server import Server, reserve_port
from tests.eval.helpers import alive

FAKE = Path(__file__).with_name("fake_server.py")
NAMES = ["base", "stage_1"]


def make(tmp_path, mode, **options):
    def command(host, port):
        return Command([sys.executable, str(FAKE), mode, host, str(port), *NAMES], {"SWIFT_CL_TEST": "1"})

    return Server(command, NAMES, tmp_path / "logs" / "server.log", **options)


def group_is_empty(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def children_of(log, expected=3):
    """Process ids that the fake server and its child printed for their children."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        found = [int(pid) for pid in re.findall(r"^child (\d+)$", log.read_text(), re.MULTILINE)]
        if len(found) == expected:
            return found
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_ready_then_gone(tmp_path):
    lines = []
    with make(tmp_path, "good", notify=lines.append) as server:
        group = server._process.pid
        assert os.getpgid(group) == group != os.getpgid(0)
        server.check_alive()
        assert server.base_url.startswith("http://127.0.0.1:")
    assert group_is_empty(group)
    assert "starting the server" in lines[0]
    assert "ready after" in lines[1]
    with socket.create_server(("127.0.0.1", server.port)):
        pass  # the port is free again


def test_the_real_port_is_read_back(tmp_path):
    lines = []
    with make(tmp_path, "moved", notify=lines.append) as server:
        assert server_module.served_names(server.base_url) == NAMES
        assert server.port != int(server.command.argv[4])
    assert f"the server listens on {server.port}" in lines[1]


def test_a_port_that_was_taken_while_it_loaded_is_given_up(tmp_path):
    lines = []
    mode = f"taken={tmp_path / 'taken'}"
    with make(tmp_path, mode, notify=lines.append) as server:
        assert server_module.served_names(server.base_url) == NAMES
    assert "was taken while the server loaded; it starts again on another" in lines[1]
    (tmp_path / "taken").unlink()
    wanted = reserve_port(None, "127.0.0.1")
    with pytest.raises(UserError, match="address already in use"), make(tmp_path, mode, port=wanted):
        pass  # the port that the user asked for is not replaced


def test_an_error_inside_stops_it(tmp_path):
    groups = []

    def interrupted():
        with make(tmp_path, "good") as server:
            groups.append(server._process.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert group_is_empty(groups[0])


@pytest.mark.parametrize("mode", ["child", "stubborn"])
def test_what_ignores_sigterm_is_killed_with_its_children(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(server_module, "STOP_SECONDS", 0.5)
    with make(tmp_path, mode) as server:
        group = server._process.pid
        children = children_of(server.log) if mode == "child" else []
        assert all(alive(pid) for pid in children)
    assert [pid for pid in (group, *children) if alive(pid)] == []


def test_death_at_start_shows_command_and_last_lines(tmp_path):
    with pytest.raises(UserError) as failure, make(tmp_path, "dies"):
        pass
    text = str(failure.value)
    assert "ended at start with exit code 3" in text
    assert "RuntimeError: the adapter does not fit" in text
    assert f"{FAKE} dies 127.0.0.1" in text
    assert "server.log" in text


@pytest.mark.parametrize(("mode", "says"), [("silent", "it does not answer"), ("partial", "it does not list stage_1")])
def test_not_ready_in_time(tmp_path, mode, says):
    server = make(tmp_path, mode, start_seconds=1.0)
    with pytest.raises(RunFailure, match=f"not ready after 1 s: {says}"), server:
        pass
    words = server.log.read_text()
    assert f"mode {mode}" in words
    probe = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert f"{mode} 127.0.0.1 {server.port}" not in probe


def test_death_while_it_is_asked(tmp_path):
    with make(tmp_path, "good") as server:
        server._process.kill()
        server._process.wait()
        with pytest.raises(RunFailure, match="ended while it was asked with exit code -9"):
            server.check_alive()


def test_port_taken_is_found_before_the_start(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be used"):
            make(tmp_path, "good", port=port)
    assert not (tmp_path / "logs").exists()
    assert reserve_port(port) == port


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_program_leaves_nothing(tmp_path, number):
    """The program that holds the server is told to end; the server and the child of the server go with it."""
    code = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from swift_cl.serving import server as module
        from swift_cl.serving.backends import Command
        module.STOP_SECONDS = 0.5
        command = lambda host, port: Command([sys.executable, {str(FAKE)!r}, "child", host, str(port), "base"])
        with module.Server(command, ["base"], Path({str(tmp_path)!r}) / "server.log") as server:
            print(server._process.pid, flush=True)
            time.sleep(60)
        """
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert holder.stdout is not None
    group = int(holder.stdout.readline())
    children = children_of(tmp_path / "server.log")
    assert all(alive(pid) for pid in children)
    try:
        holder.send_signal(number)
        holder.wait(timeout=20)
    finally:
        holder.kill()
        holder.stdout.close()
    assert holder.returncode != 0
    assert [pid for pid in (group, *children) if alive(pid)] == []


def test_worker_ends_when_its_starter_was_killed(tmp_path):
    """Not even SIGKILL of the program leaves a server: the worker watches its parent."""
    worker = Path(server_module.__file__).parent / "worker"
    child = (
        f"import os, sys, time; sys.path.insert(0, {str(worker)!r}); from starter import end_with_parent\n"
        "print(os.getpid(), flush=True); end_with_parent(int(sys.argv[1]), 0.05)"
    )
    code = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True)\n"
        "time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    pid = int(holder.stdout.readline())
    assert alive(pid)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    limit = time.monotonic() + 5
    while alive(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not alive(pid)

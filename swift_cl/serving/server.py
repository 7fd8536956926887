"""Life cycle of a server: start it, wait until it is ready, know whether it lives, and leave nothing behind.

The server gets its own process group on the loopback address. It is stopped on leaving the `with` block, whatever the
reason (error, Ctrl-C, SIGTERM); if this process is killed outright, the worker notices and ends itself.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from swift_cl.errors import RunFailure, UserError
from swift_cl.serving.backends import Command

HOST = "127.0.0.1"
LOG_LINES = 20
STOP_SECONDS = 10.0
POLL_SECONDS = 0.25
PORT_TAKEN = re.compile(rb"address already in use", re.IGNORECASE)
PORT_LINE = re.compile(rb"^swift-cl server port (\d+)$", re.MULTILINE)
"""What our worker prints: ms-swift may take another port than the one it was told."""


def reserve_port(port: int | None = None, host: str = HOST) -> int:
    """A free port: the one asked for, or any.

    ms-swift would silently take the next one if the port is in use, so it is checked here.

    Raises:
        UserError: the port asked for is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be used on {host} ({error.strerror}); choose another one") from None
        return int(probe.getsockname()[1])


def served_names(base_url: str, timeout: float = 5.0) -> list[str]:
    """Names that a server of ours lists.

    Raises:
        OSError or ValueError: it does not answer, or not with a list of models.
    """
    import http.client
    import json
    import urllib.request

    # No proxy: one that the environment names must not stand between us and our own server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base_url}/models", timeout=timeout) as reply:
            return [str(model["id"]) for model in json.load(reply)["data"]]
    except (KeyError, TypeError, http.client.HTTPException) as error:
        raise ValueError(f"{base_url}/models gave no list of models ({error!r})") from None


class Server:
    """A server process, used as a context manager that yields it ready.

    Args:
        make_command: the command for (host, port).
        names: the names it must list to be ready.
        log: its output goes to this file.
        port: the port to use; any free one by default.
        start_seconds: how long it may take to become ready.
        notify: gets one line for the user when it starts and when it is ready.

    Attributes:
        ready_seconds: how long it took to become ready.
    """

    def __init__(
        self,
        make_command: Callable[[str, int], Command],
        names: list[str],
        log: Path,
        port: int | None = None,
        host: str = HOST,
        start_seconds: float = 900.0,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.host = host
        self._make_command, self._any_port = make_command, port is None
        self._choose_port(port)
        self.names, self.log, self.start_seconds, self.notify = names, log, start_seconds, notify
        self.ready_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._signals = contextlib.ExitStack()

    @property
    def base_url(self) -> str:
        """Root of its API."""
        host = HOST if self.host in ("0.0.0.0", "") else self.host
        return f"http://{host}:{self.port}/v1"

    def __enter__(self) -> "Server":
        self._signals.enter_context(terminate_raises())
        try:
            self._start()
            try:
                self._wait_until_ready()
            except UserError:
                # While it loaded, a connection of somebody's was given the port that was free when it was chosen.
                if not self._any_port or not PORT_TAKEN.search(self.log.read_bytes()):
                    raise
                self.notify(f"port {self.port} was taken while the server loaded; it starts again on another")
                assert self._process is not None
                end_group(self._process)
                self._choose_port(None)
                self._start()
                self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _choose_port(self, port: int | None) -> None:
        self.port = reserve_port(port, self.host)
        self.command = self._make_command(self.host, self.port)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        added = {name: value for name, value in self.command.env.items() if name not in os.environ}
        env = {**os.environ, **added, "SWIFT_CL_SERVER_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        # A torchrun environment around us is not the server's.
        for name in ("NPROC_PER_NODE", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            env.pop(name, None)
        self.notify(f"starting the server {self._where}, its log is {self.log}")
        with open(self.log, "wb") as log:
            log.write(f"{shlex.join(self.command.argv)}\n".encode())
            log.flush()
            self._process = self._spawn(env, stdout=log)

    @property
    def _where(self) -> str:
        return f"on {self.host}:{self.port}"

    def _spawn(self, env: dict[str, str], **options: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.command.argv,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            **options,
        )

    def _listed(self) -> list[str]:
        """The names that the server lists; only once it has said on which port it really listens."""
        found = PORT_LINE.search(self.log.read_bytes())
        if found is None:
            raise OSError("it has not said on which port it listens")
        port = int(found[1])
        if port != self.port:
            self.notify(f"port {self.port} was taken meanwhile, the server listens on {port}")
            self.port = port
        return served_names(self.base_url)

    def _wait_until_ready(self) -> None:
        start = time.monotonic()
        problem = "it does not answer"
        while time.monotonic() - start < self.start_seconds:
            if self._has_ended():
                # Nothing was asked yet, so nothing is lost: its settings, or what it was to load, are wrong.
                raise UserError(self._explain(self._ended("at start")))
            try:
                listed = self._listed()
            except (OSError, ValueError) as error:
                problem = f"it does not answer ({type(error).__name__})"
            else:
                missing = [name for name in self.names if name not in listed]
                if not missing:
                    self.ready_seconds = time.monotonic() - start
                    self.notify(f"the server is ready after {self.ready_seconds:.0f} s: {', '.join(listed)}")
                    return
                problem = f"it does not list {', '.join(missing)}"
            time.sleep(POLL_SECONDS)
        raise RunFailure(self._explain(f"the server was not ready after {self.start_seconds:g} s: {problem}"))

    def check_alive(self, when: str = "while it was asked") -> None:
        """Raise a `RunFailure` with the last log lines if the server has ended."""
        if self._has_ended():
            raise RunFailure(self._explain(self._ended(when)))

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _ended(self, when: str) -> str:
        assert self._process is not None
        return f"the server ended {when} with exit code {self._process.returncode}"

    def _explain(self, what: str) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        tail = "\n".join(f"  | {line}" for line in lines[-LOG_LINES:]) or "  | (nothing)"
        return f"{what}\ncommand: {shlex.join(self.command.argv)}\nlast lines of {self.log}:\n{tail}"

    def stop(self) -> None:
        """End the server with all its descendants: politely first, then by force."""
        process, self._process = self._process, None
        if process is not None:
            end_group(process)
        self._signals.close()


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a group, its group, and those of its descendants that left the group."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _signal_group(process.pid, number) or _group_ends(process, STOP_SECONDS):
            break
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # psutil never kills a process that got the number of one that has ended
    psutil.wait_procs(family, STOP_SECONDS)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _group_ends(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait until the leader was reaped and nobody is left in its group."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if process.poll() is not None and not _signal_group(process.pid, 0):
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def terminate_raises() -> Iterator[None]:
    """Within the block SIGTERM (and SIGHUP, unless nohup has it ignored) raises SystemExit, so that `with` blocks end
    properly instead of leaving their server behind. Signals belong to the main thread; in another one nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

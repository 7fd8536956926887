"""An engine without HTTP: the worker `answer_lines.py` and a transport that carries OpenAI requests to it as lines.

Everything above the transport (retries, classification of errors, answer store) is that of a server.
"""

import concurrent.futures
import itertools
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from swift_cl.serving.server import Server

BASE_URL = "http://offline/v1"


class LineTransport(httpx.BaseTransport):
    """Sends requests as JSON lines through a socket, and hands each reply to whoever waits for it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._waiting: dict[int, concurrent.futures.Future[httpx.Response]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for line in self._lines():
                reply = json.loads(line)
                with self._lock:
                    future = self._waiting.pop(reply["id"], None)
                if future is not None:  # None: given up after its time limit
                    headers = {"content-type": "application/json"}
                    future.set_result(httpx.Response(reply["status"], headers=headers, content=reply["body"]))
        finally:
            with self._lock:
                self._ended, waiting = True, list(self._waiting.values())
            for future in waiting:
                future.set_exception(httpx.ReadError("the engine has ended"))

    def _lines(self) -> Iterator[bytes]:
        try:
            with self._connection.makefile("rb") as stream:
                yield from stream
        except OSError:
            return  # the engine was killed

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and wait for its reply."""
        body = json.loads(request.read() or b"null")
        future: concurrent.futures.Future[httpx.Response] = concurrent.futures.Future()
        with self._lock:
            if self._ended:
                raise httpx.ConnectError("the engine has ended")
            number = next(self._numbers)
            self._waiting[number] = future
            line = json.dumps({"id": number, "method": request.method, "path": request.url.path, "body": body})
            try:
                self._connection.sendall(line.encode() + b"\n")
            except OSError as error:
                del self._waiting[number]
                raise httpx.WriteError(f"the engine has ended ({error.strerror})") from None
        try:
            return future.result(request.extensions.get("timeout", {}).get("read"))
        except concurrent.futures.TimeoutError:
            with self._lock:
                self._waiting.pop(number, None)
            raise httpx.ReadTimeout("the engine did not answer in time") from None

    def close(self) -> None:
        """The engine sees the end of its requests and ends."""
        self._connection.close()


class OfflineServer(Server):
    """A `Server` that is reached through `transport` and listens nowhere."""

    transport: LineTransport

    @property
    def base_url(self) -> str:
        return BASE_URL

    @property
    def _where(self) -> str:
        return "without HTTP"

    def _spawn(self, env: dict[str, str], **options: Any) -> "subprocess.Popen[bytes]":
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            env = {**env, "SWIFT_CL_LINES_FD": str(number)}
            process = super()._spawn(env, pass_fds=(number,), **options)
        self.transport = LineTransport(ours)
        return process

    def _listed(self) -> list[str]:
        with httpx.Client(transport=_Kept(self.transport), timeout=5.0) as client:
            try:
                return [str(model["id"]) for model in client.get(f"{BASE_URL}/models").json()["data"]]
            except (httpx.HTTPError, KeyError) as error:
                raise OSError(f"no list of models ({error!r})") from None

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "transport"):
            self.transport.close()


class _Kept(httpx.BaseTransport):
    """A transport that a client does not close."""

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self.handle_request = inner.handle_request  # type: ignore[method-assign]

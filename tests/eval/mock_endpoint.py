"""An OpenAI-compatible endpoint in a thread that answers by rule and fails on demand."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """What to do instead of answering: an HTTP status with a text, a dropped connection, a hang, a raw body, or the
    right answer cut off in its middle."""

    status: int = 200
    text: str = ""
    drop: bool = False
    hang: float = 0.0
    raw: str | None = None
    cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)


def say_last_question(model: str, messages: list[dict[str, str]]) -> str:
    """Default rule: model, number of messages, last question."""
    return f"{model} {len(messages)} {messages[-1]['content']}"


class MockEndpoint:
    """Used as a context manager; `requests` holds the bodies of all questions in order of arrival.

    Args:
        models: names it lists.
        answer: (model, messages) -> text.
        fault: (body, how many requests with this body came before) -> a Fault or None.
        weights: model name -> name of the weights that really answer; default: its own.
        logprobs: whether log-probabilities are given.
        reported: the model name in every response; None for the one that was asked.
        version: what it says at /version, None for an endpoint without that page.
    """

    def __init__(
        self,
        models: list[str],
        answer: Callable[[str, list[dict[str, str]]], str] = say_last_question,
        fault: Callable[[Body, int], Fault | None] = lambda body, before: None,
        weights: Callable[[str], str] = lambda name: name,
        logprobs: bool = True,
        reported: Callable[[str], str] = lambda name: name,
        delay: float = 0.0,
        version: str | None = None,
    ) -> None:
        self.models, self.answer, self.fault, self.weights = models, answer, fault, weights
        self.logprobs, self.reported, self.delay = logprobs, reported, delay
        self.version = version
        self.requests: list[Body] = []
        self.times: list[float] = []
        self.answered: dict[str, int] = {}
        self.probes: list[Body] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.together: set[frozenset[str]] = set()
        self._now: list[str] = []
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/version":
                    found = (200, {"version": outer.version}) if outer.version else (404, {"detail": "Not Found"})
                    outer._send(self, *found)
                    return
                outer._send(self, 200, {"object": "list", "data": [{"id": m, "object": "model"} for m in outer.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._post(self, body)

        class QuietServer(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients that give up are part of the tests."""

        self._server = QuietServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "MockEndpoint":
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, value: Any, headers: dict[str, str] | None = None
    ) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(data)

    def _post(self, handler: BaseHTTPRequestHandler, body: Body) -> None:
        probe = bool(body.get("logprobs"))
        with self._lock:
            (self.probes if probe else self.requests).append(body)
            if not probe:
                self.times.append(time.monotonic())
            key = json.dumps(body, sort_keys=True)
            before = self._seen.get(key, 0)
            self._seen[key] = before + 1
            self.in_flight += 1
            self._now.append(body["model"])
            self.together.add(frozenset(self._now))
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            time.sleep(self.delay)
            self._reply(handler, body, probe, None if probe else self.fault(body, before))
        finally:
            with self._lock:
                self.in_flight -= 1
                self._now.remove(body["model"])

    def _reply(self, handler: BaseHTTPRequestHandler, body: Body, probe: bool, fault: Fault | None) -> None:
        if fault is not None and fault.drop:
            handler.close_connection = True
            handler.connection.close()
            return
        if fault is not None and fault.hang:
            time.sleep(fault.hang)
        if fault is not None and fault.status != 200:
            self._send(handler, fault.status, {"message": fault.text, "object": "error"}, fault.headers)
            return
        if fault is not None and fault.raw is not None:
            self._send(handler, 200, fault.raw)
            return
        if body["model"] not in self.models:
            text = f"`{body['model']}` is not in the model_list: `{self.models}`."
            self._send(handler, 400, {"message": text, "object": "error"})
            return
        name = self.weights(body["model"])
        choice: Body = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": self.answer(name, body["messages"])},
        }
        if probe and self.logprobs:
            seed = hashlib.sha256(f"{name}{body['messages'][-1]['content']}".encode()).digest()
            tops = [{"token": f"t{i}", "logprob": -seed[i] / 100, "bytes": None} for i in range(5)]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": self.reported(body["model"]),
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
        }
        if fault is not None and fault.cut:
            data = json.dumps(reply).encode()
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
            return
        if not probe and fault is None:
            with self._lock:
                key = json.dumps(body, sort_keys=True)
                self.answered[key] = self.answered.get(key, 0) + 1
        self._send(handler, 200, reply)

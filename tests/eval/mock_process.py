"""A server process that answers by rule and dies: python mock_process.py HOST PORT DIES_AFTER NAME..."""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.eval.test_fault_table import knows

host, port, dies_after, *names = sys.argv[1:]
print(f"swift-cl server port {port}", flush=True)
lock = threading.Lock()
asked = 0


class Handler(BaseHTTPRequestHandler):
    def send(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def do_POST(self):
        global asked
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        probe = bool(body.get("logprobs"))
        with lock:
            asked += not probe
            if asked > int(dies_after):
                print("MemoryError: the server has no memory left", flush=True)
                os._exit(9)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": knows(body["model"], body["messages"])},
        }
        if probe:
            seed = hashlib.sha256((body["model"] + body["messages"][-1]["content"]).encode()).digest()
            tops = [{"token": f"t{i}", "logprob": -seed[i] / 100, "bytes": None} for i in range(5)]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        self.send(reply | {"usage": usage})

    def log_message(self, *args):
        pass


ThreadingHTTPServer((host, int(port)), Handler).serve_forever()

"""A server process for life-cycle tests: python fake_server.py MODE HOST PORT NAME...

Modes: good (lists the names), child (good, and starts a child that ignores SIGTERM and starts two more: one in the
group, one in a session of its own), dies (prints and ends), silent (never listens), partial (lists the first name
only), stubborn (good, ignores SIGTERM), moved (good, but on another port than the one asked for, as ms-swift does),
taken=FILE (somebody has the port when it is to be opened; good once FILE, which it makes, is there).
"""

import json
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

mode, host, port, *names = sys.argv[1:]
print(f"fake server, mode {mode}", flush=True)
if mode == "moved":
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
print(f"swift-cl server port {port}", flush=True)
if mode == "dies":
    print("RuntimeError: the adapter does not fit", flush=True)
    sys.exit(3)
if mode.startswith("taken="):
    marker = Path(mode.removeprefix("taken="))
    if not marker.exists():
        marker.touch()
        print(
            f"ERROR:    [Errno 98] error while attempting to bind on address ('{host}', {port}): address already in use"
        )
        sys.exit(3)
if mode in ("child", "stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "child":
    wait = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    code = f"""
import subprocess, sys
for apart in (False, True):
    print("child", subprocess.Popen([sys.executable, "-c", {wait!r}], start_new_session=apart).pid, flush=True)
{wait}
"""
    print("child", subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
if mode == "silent":
    time.sleep(600)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"data": [{"id": name} for name in (names[:1] if mode == "partial" else names)]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


HTTPServer((host, int(port)), Handler).serve_forever()

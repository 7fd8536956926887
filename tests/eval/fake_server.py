"""A server process for life-cycle tests: python fake_server.py MODE HOST PORT NAME...

Modes: good (lists the names), child (good, and starts a child that ignores SIGTERM), dies (prints and ends), silent
(never listens), partial (lists the first name only), stubborn (good, ignores SIGTERM).
"""

import json
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

mode, host, port, *names = sys.argv[1:]
print(f"fake server, mode {mode}", flush=True)
if mode == "dies":
    print("RuntimeError: the adapter does not fit", flush=True)
    sys.exit(3)
if mode in ("child", "stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "child":
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
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

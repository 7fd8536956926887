"""Ends a worker when the process that started it is gone, even by SIGKILL. Imported by file path, so it knows nothing
of swift_cl."""

import os
import signal
import threading
import time


def end_with_parent(parent: int, poll_seconds: float = 1.0) -> None:
    """Kill the own process group once `parent` is no longer the parent; runs in a thread for the worker's life."""
    while os.getppid() == parent:
        time.sleep(poll_seconds)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def watch_starter() -> None:
    """Start `end_with_parent` if the process was given a group of its own; else there is none that may be killed."""
    starter = os.environ.get("SWIFT_CL_SERVER_PARENT")
    if starter:
        threading.Thread(target=end_with_parent, args=(int(starter),), daemon=True).start()

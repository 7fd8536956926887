"""Shared fixtures: where the tests find the real model and data, and a hand-driven context for methods."""

import os
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Ctrl-C and hang-up work in the tests, whatever started them: background jobs and nohup ignore these signals, and
    children inherit that, so that tests of an interrupted program would wait for ever."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            # A handler is not inherited by children; this one lets the tests themselves go on.
            signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the files, those with the most slow tests begin and the quick ones are left for the end, so
    that no process waits long for the other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Leaves a record of the cells of the support table that were run."""
    from tests.support.engine_cells import note

    # xdist's workers report to their controller, which comes by here as well.
    if "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or not report.passed):
        note(report.nodeid, report.outcome)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout (real small model and task data); users do not have it."""
    folder = Path(os.environ.get("SWIFT_CL_SHARED", ROOT.parent / "shared"))
    if not (folder / "bench").is_dir():
        pytest.skip(f"needs {folder}/bench (set SWIFT_CL_SHARED to another place)")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests keep nothing in the user's cache."""
    monkeypatch.setenv("SWIFT_CL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def bars_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars are seen from their beginning."""
    monkeypatch.setattr("swift_cl.progress.DELAY", 0.0)


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """The tiny chat model that ships with the project."""
    return ROOT / "assets" / "tiny_base"

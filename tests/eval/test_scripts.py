"""evaluation/: the three scripts over the package, each alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swift_cl.evaluation.plan import GridOptions, load_grid
from tests.eval.mock_endpoint import Fault, MockEndpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "evaluation"


def script(name, *argv, **options):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        timeout=120,
    )


def names(run):
    return [target.served for target in load_grid(run, GridOptions()).targets]


@pytest.mark.parametrize("name", ["test_ans.py", "sim.py"])
def test_help_is_quick(name):
    start = time.monotonic()
    done = script(name, "--help")
    assert done.returncode == 0
    assert "--run_dir" in done.stdout
    assert time.monotonic() - start < 2


def test_ask_then_score(make_run):
    run = make_run()
    references = {"q0": "a0", "q1": "a1", "q1b": "a1b", "q2": "a2", "r0": "b0", "r1": "b1"}
    with MockEndpoint(names(run), lambda model, m: references[m[-1]["content"]]) as mock:
        done = script("test_ans.py", "--base_url", mock.base_url, "--run_dir", run)
    assert done.returncode == 0, done.stderr
    assert "all questions are answered" in done.stdout
    assert not (run / "results.json").exists()
    done = script("sim.py", "--run_dir", run)
    assert done.returncode == 0, done.stderr
    assert "100.00" in done.stdout
    assert "Forgetting" in done.stdout
    results = json.loads((run / "results.json").read_text())
    assert results["scorers"]["exact_match"]["metrics"]["avg_acc"] == 100


def test_missing_answers_are_exit_code_1_in_both(make_run):
    run = make_run()

    def fail_one(body, before):
        return Fault(400, "too long") if body["messages"][-1]["content"] == "r1" else None

    with MockEndpoint(names(run), fault=fail_one) as mock:
        done = script("test_ans.py", "--base_url", mock.base_url, run)
    assert done.returncode == 1
    assert "stage_2_new x new: 1 of 2 answers missing (1 x HTTP 400" in done.stderr
    done = script("sim.py", run)
    assert done.returncode == 1
    assert json.loads((run / "results.json").read_text())["scorers"]["exact_match"]["matrix"][1][1] is None


def test_score_before_anything_was_asked(make_run):
    done = script("sim.py", make_run())
    assert done.returncode == 1
    assert "not asked yet" in done.stdout


def test_no_endpoint_is_one_line(make_run):
    done = script("test_ans.py", "--base_url", "http://127.0.0.1:9/v1", make_run())
    assert done.returncode == 2
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("test_ans.py")]
    assert len(lines) == 1
    assert "not an endpoint" in lines[0]


def deploy(*argv, **env):
    return subprocess.run(
        ["sh", str(SCRIPTS / "deploy.sh"), *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **env},
        timeout=60,
    )


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "RUN_DIR is not set"),
        ({"RUN_DIR": "/nowhere"}, "/nowhere: run folder not found"),
        ({"RUN_DIR": "RUN", "INFER_BACKEND": "vlm"}, "did you mean 'vllm'?"),
        ({"RUN_DIR": "RUN", "PORT": "1"}, "--port 1: cannot be used"),
    ],
)
def test_deploy_refuses_in_one_line(make_run, env, says):
    run = make_run()
    if env.get("PORT") == "1":
        import socket

        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            done = deploy(RUN_DIR=str(run), PORT=str(port))
        says = f"--port {port}: cannot be used"
    else:
        done = deploy(**{name: value.replace("RUN", str(run)) for name, value in env.items()})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_deploy_help():
    assert "--server_args" in deploy("--help", RUN_DIR="x").stdout

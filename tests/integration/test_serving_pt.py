"""The real server with the transformers backend: base and four adapters at once, batched, each its own answers."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from swift_cl.evaluation.client import Endpoint, Generation
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.serving.backends import ServerOptions, command
from swift_cl.serving.server import Server, reserve_port
from tests.integration.serving_run import MODEL_ARGS, ROOT, make_run, write_classes

pytestmark = pytest.mark.slow
SETTINGS = Generation(max_tokens=12)
QUESTIONS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("serving") / "run", tiny_base)


def dialogues(run):
    """(served name, messages) of a few questions for the base and every stage."""
    grid = load_grid(run, GridOptions(test_limit=QUESTIONS))
    rows = [row for rows in grid.rows for row in rows][::QUESTIONS][:QUESTIONS]
    return [
        (target.served, [{"role": "system", "content": "Answer."}, {"role": "user", "content": row.turns[0][0]}])
        for target, row in itertools.product(grid.targets, rows)
    ]


def expected(run):
    """What each model says by itself: one adapter loaded, one question at a time, no server."""
    import torch
    from swift.infer_engine import InferRequest, RequestConfig, TransformersEngine
    from swift.model import get_model_processor
    from swift.template import get_template

    grid = load_grid(run, GridOptions())
    config = RequestConfig(max_tokens=SETTINGS.max_tokens, temperature=0.0)
    said = {}
    for target in grid.targets:
        adapters = [] if target.stage is None else [str(target.stage.weights_dir)]
        model, processor = get_model_processor(
            grid.run.model, model_type=MODEL_ARGS["model_type"], torch_dtype=torch.float32
        )
        template = get_template(processor, template_type=MODEL_ARGS["template"])
        engine = TransformersEngine(model, template=template, adapters=adapters)
        for name, messages in dialogues(run):
            if name == target.served:
                reply = engine.infer([InferRequest(messages=messages)], config, use_tqdm=False)[0]
                said[name, messages[1]["content"]] = reply.choices[0].message.content
    return said


def test_five_models_on_one_server_in_mixed_batches(run, tmp_path):
    grid = load_grid(run, GridOptions())
    asked = dialogues(run)
    mixed = [asked[i] for i in sorted(range(len(asked)), key=lambda i: i % QUESTIONS)]  # neighbours differ in adapter
    found, names = {}, {}
    with (
        Server(
            lambda host, port: command(grid.base.deployment, ServerOptions("pt"), host, port),
            grid.base.deployment.names,
            tmp_path / "server.log",
        ) as server,
    ):
        endpoint = Endpoint(server.base_url, check_alive=server.check_alive)
        assert endpoint.models() == [target.served for target in grid.targets]

        def ask(name, messages):
            reply = endpoint.ask(name, messages, SETTINGS)
            found[name, messages[1]["content"]] = reply.text
            names[name] = reply.model

        threads = [threading.Thread(target=ask, args=item) for item in mixed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        group = server._process.pid
        endpoint.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
    assert found == expected(run)
    answers = {n: tuple(text for (name, _), text in sorted(found.items()) if name == n) for n in names}
    assert len(set(answers.values())) == len(names), answers
    assert all(names[name] == name for name in names)  # the response says which adapter answered


def test_evaluate_the_whole_grid(run):
    lines = []
    found = evaluate(
        [run], EvalOptions(GridOptions(test_limit=2), scorers=("exact_match",), max_tokens=4), notify=lines.append
    )
    entry = found.results[0]["scorers"]["exact_match"]
    assert found.complete
    assert len(entry["matrix"]) == 4
    assert all(cell is not None for row in (entry["base"], *entry["matrix"]) for cell in row)
    assert sum("the server is ready" in line for line in lines) == 1
    files = [run / "answers" / target.row / "2022.jsonl" for target in load_grid(run, GridOptions()).targets]
    said = {tuple(json.loads(line)["answer"] for line in file.read_text().splitlines()) for file in files}
    assert len(said) > 1


def test_constrained_answers_are_visible_labels(run, tmp_path):
    """Free answers are no labels here; constrained ones are, and they differ."""
    asked = EvalOptions(GridOptions(write_classes(tmp_path)), scorers=("exact_match",), max_tokens=16)
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("answers", "logs", "results.json"))
    said = {}
    for decoding in ("free", "constrained"):
        found = evaluate([copy], replace(asked, decoding=decoding), notify=print)
        assert found.complete
        grid = load_grid(copy, asked.grid)
        said[decoding] = {
            (target.row, task.name, row["id"]): (row["answer"], grid.visible(target, task))
            for target in grid.targets
            for task in grid.tasks
            for row in grid.store(target, task).rows()
        }
    assert not any(answer in labels for answer, labels in said["free"].values())
    assert all(answer in labels for answer, labels in said["constrained"].values())
    assert len({answer for answer, _ in said["constrained"].values()}) > 1
    assert found.results[0]["scorers"]["exact_match"]["seen"]["rows"][-1] is not None


def test_sigterm_to_the_command_leaves_nothing(run):
    """The evaluation is told to end in the middle of its questions."""
    log = run / "logs" / "server.log"
    log.unlink(missing_ok=True)
    argv = [
        sys.executable,
        "-m",
        "swift_cl.cli.main",
        "eval",
        str(run),
        "--scorer",
        "exact_match",
        "--max_tokens",
        "50",
    ]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 240
    while time.monotonic() < limit and not (log.is_file() and "chat/completions" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert str(run) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_adapter_that_does_not_fit_ends_the_server_at_start(run, tmp_path):
    """What the checks before the start cannot know is seen at the start, not at a request."""
    from swift_cl.errors import UserError

    deployment = load_grid(run, GridOptions()).base.deployment
    broken = tmp_path / "adapter"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((deployment.adapters[0].path / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"cut off")
    deployment = replace(deployment, adapters=(replace(deployment.adapters[0], path=broken),))
    with (
        pytest.raises(UserError, match=r"ended at start with exit code 1[\s\S]*serve_adapters.py[\s\S]*Error"),
        Server(
            lambda host, port: command(deployment, ServerOptions("pt"), host, port),
            deployment.names,
            Path(tmp_path / "server.log"),
        ),
    ):
        pass


def test_deploy_ask_and_score_with_the_scripts(run, tmp_path):
    """sh evaluation/deploy.sh, test_ans.py, sim.py; Ctrl-C ends the server."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("answers", "logs", "results.json"))
    port = str(reserve_port())
    env = {**os.environ, "PYTHON": sys.executable, "RUN_DIR": str(copy), "PORT": port, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        ["sh", "evaluation/deploy.sh"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline().startswith(f"ready: http://127.0.0.1:{port}/v1 serves tiny_base, stage_1_2022-")

        def script(name, *argv):
            line = [sys.executable, f"evaluation/{name}", "--run_dir", str(copy), "--test_limit", "1", *argv]
            return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

        asked = script("test_ans.py", "--base_url", f"http://127.0.0.1:{port}/v1", "--max_tokens", "4")
        assert asked.returncode == 0, asked.stderr
        scored = script("sim.py", "--scorer", "exact_match")
        assert scored.returncode == 0, scored.stderr
        assert "Forgetting" in scored.stdout
    finally:
        os.killpg(server.pid, signal.SIGINT)  # as the terminal does
        code = server.wait(timeout=30)
        server.stdout.close()
    assert code == 130
    assert str(copy) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_fully_fine_tuned_stages_are_served_one_after_the_other(tmp_path, tiny_base):
    import torch
    from transformers import AutoModelForCausalLM

    run = make_run(tmp_path / "run", tiny_base)
    grid = load_grid(run, GridOptions())
    for index, target in enumerate(grid.stages):
        assert target is not None
        assert target.stage is not None
        if index >= 2:
            shutil.rmtree(target.stage.dir)
            continue
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(index + 2.0)
        model.save_pretrained(target.stage.dir / "model")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_base / name, target.stage.dir / "model")
        replace(target.stage, weights="model", weights_sha256=None, tuner_type="full").save()
    lines = []
    options = EvalOptions(GridOptions(test_limit=1), scorers=("exact_match",), max_tokens=4)
    found = evaluate([run], options, notify=lines.append)
    matrix = found.results[0]["scorers"]["exact_match"]["matrix"]
    assert [[cell is None for cell in row] for row in matrix] == [[False] * 4] * 2 + [[True] * 4] * 2
    assert sum("the server is ready" in line for line in lines) == 3


def test_a_failing_request_harms_no_other(run, tmp_path):
    """Up to ms-swift 4.5.2 one exception ended the thread that generates, and all later requests waited for ever."""
    from swift_cl.evaluation.client import RetryPolicy
    from swift_cl.evaluation.faults import QuestionFailed

    deployment = load_grid(run, GridOptions()).base.deployment
    broken = Generation(max_tokens=4, extra={"repetition_penalty": -1.0})  # refused when generation has begun
    options = ServerOptions("pt", extra=("--max_model_len", "256"))
    with Server(
        lambda host, port: command(deployment, options, host, port), deployment.names, tmp_path / "server.log"
    ) as server:
        endpoint = Endpoint(server.base_url, RetryPolicy(attempts=1, timeout=60), server.check_alive)
        good = [{"role": "user", "content": "What happened?"}]
        before = endpoint.ask(deployment.names[1], good, SETTINGS)
        outcomes = []

        def ask(name, messages, settings):
            try:
                outcomes.append(endpoint.ask(name, messages, settings))
            except QuestionFailed as failure:
                outcomes.append(failure)

        long = [{"role": "user", "content": "word " * 2000}]
        asked = [(deployment.names[1], good, broken), (deployment.names[2], long, SETTINGS)] * 2
        asked += [(deployment.names[1], good, SETTINGS)] * 4
        threads = [threading.Thread(target=ask, args=item) for item in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = [outcome for outcome in outcomes if isinstance(outcome, QuestionFailed)]
        print(failed)
        assert len(failed) == 4
        assert not any(failure.endpoint_at_fault for failure in failed)
        assert all("HTTP 400" in str(failure) for failure in failed)
        assert [outcome.text for outcome in outcomes if outcome not in failed] == [before.text] * 4
        assert endpoint.ask(deployment.names[1], good, SETTINGS) == before
        endpoint.close()


def test_merged_stages_answer_as_their_adapters_do(run, tmp_path):
    """The way of lmdeploy, with the backend that runs here: one server a stage, the same names, nothing left behind."""
    copy = shutil.copytree(
        run, tmp_path / "run", ignore=shutil.ignore_patterns("answers", "logs", "stage_3*", "stage_4*")
    )
    options = EvalOptions(GridOptions(test_limit=2), scorers=("exact_match",), max_tokens=8)

    def answers():
        files = sorted((copy / "answers").glob("*/*.jsonl"))
        rows = [
            (file.parent.name, json.loads(line)) for file in files for line in file.read_bytes().split(b"\n") if line
        ]
        return {(row, value["id"], value["turn"]): (value["answer"], value["served"]) for row, value in rows}

    evaluate([copy], options, notify=print)
    served = answers()
    shutil.rmtree(copy / "answers")
    lines = []
    evaluate([copy], replace(options, merge_stages=True), notify=lines.append)
    assert answers() == served
    assert sum("the server is ready" in line for line in lines) == 3
    assert sum(line.startswith("merging stage_") for line in lines) == 2
    assert not (copy / ".merged").exists()

"""The vLLM engine behind our interface: greedy answers are those of the transformers engine."""

import json
import os
import subprocess

import pytest

from swift_cl.generation.engine import Prompt, Sampling
from swift_cl.stages import load_stage
from tests.conftest import ROOT
from tests.support.commands import environment
from tests.support.train import TASKS, stage_argv, train_stage

PYTHON = os.environ.get("SWIFT_CL_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="SWIFT_CL_VLLM_PYTHON names no Python with vLLM"),
]
QUESTIONS = ["小偷从贝桥博物馆拿走了什么？", "Who was the mayor of Farina in 2022?"]


def test_vllm_answers_as_the_transformers_engine(tmp_path):
    train_stage("seq", TASKS[0], tmp_path / "1", learning_rate=2e-2, save_steps=100)
    from swift_cl.training.sft import CLSft

    sft = CLSft(stage_argv("seq", TASKS[1], tmp_path / "2", tmp_path / "1"))
    with sft._open_engine(load_stage(tmp_path / "1").weights_dir, "transformers") as engine:
        expected = engine.answer([Prompt.chat("", question) for question in QUESTIONS], Sampling(0.0, 12), [0, 0])
    script = ROOT / "tests" / "support" / "vllm_answers.py"
    argv = stage_argv("seq", TASKS[1], tmp_path / "3", tmp_path / "1", max_length=256)
    (tmp_path / "wanted.json").write_text(json.dumps({"argv": argv, "questions": QUESTIONS}))
    command = [str(PYTHON), str(script), str(tmp_path / "wanted.json"), str(tmp_path / "found.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(a["text"], a["finish_reason"]) for a in found["greedy"]] == [(a.text, a.finish_reason) for a in expected]
    assert found["plain"][0]["text"] == expected[0].text
    assert found["drawn"] == found["again"]
    assert len({answer["text"] for answer in found["drawn"]}) > 1, "equal prompts got one sample six times"

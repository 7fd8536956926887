"""A run folder with tiny adapter files (numbers, no model behind them) and a two-task benchmark."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from swift_cl.io import sha256_file
from swift_cl.stages import Run, Stage, stage_dir_name

RowSpec = tuple[str, Sequence[tuple[str, str]]]


def write_rows(path: Path, rows: Sequence[RowSpec], system: str | None = None) -> None:
    """Write dialogues in the messages format."""
    value = []
    for row_id, turns in rows:
        messages = [] if system is None else [{"role": "system", "content": system}]
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        value.append({"id": row_id, "messages": messages})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Tasks `old` (three dialogues, one of two turns) and `new` (two rows)."""
    folder = tmp_path / "data"
    old: list[RowSpec] = [
        ("o0", [("q0", "a0")]),
        ("o1", [("q1", "a1"), ("q1b", "a1b")]),
        ("o2", [("q2", "a2")]),
    ]
    new: list[RowSpec] = [("n0", [("r0", "b0")]), ("n1", [("r1", "b1")])]
    for name, rows in (("old", old), ("new", new)):
        write_rows(folder / f"{name}-train.json", rows)
        write_rows(folder / f"{name}-test.json", rows)
    path = folder / "benchmark.yaml"
    tasks = "".join(
        f"  - {{name: {name}, train: {name}-train.json, test: {name}-test.json, system: sys {name}}}\n"
        for name in ("old", "new")
    )
    path.write_text(f"name: tiny\ntasks:\n{tasks}scorers: [exact_match]\ngeneration: {{max_tokens: 8}}\n")
    return path


@pytest.fixture
def make_run(tmp_path: Path, benchmark: Path) -> Callable[..., Path]:
    """make_run(name, method, stages=2, seed=0): a run folder; a stage's adapter numbers come from its seed."""

    def make(name: str = "run", method: str = "seq", stages: int = 2, seed: int = 0, **config: Any) -> Path:
        base = tmp_path / "base"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text("{}")
        save_file({"layer.weight": np.ones((4, 6), np.float32)}, base / "model.safetensors")
        out = tmp_path / name
        order = ["old", "new"]
        model_args = {"model_type": "qwen2", "template": "qwen2_5", "torch_dtype": "float32"}
        done = []
        for index in range(stages):
            folder = out / stage_dir_name(index, order[index])
            adapter = folder / "adapter"
            adapter.mkdir(parents=True)
            (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **config}))
            random = np.random.default_rng(seed + index)
            prefix = "base_model.model.layer"
            tensors = {
                f"{prefix}.lora_A.weight": random.normal(size=(2, 6)).astype(np.float32),
                f"{prefix}.lora_B.weight": random.normal(size=(4, 2)).astype(np.float32),
            }
            save_file(tensors, adapter / "adapter_model.safetensors")
            digest = sha256_file(adapter / "adapter_model.safetensors")
            system = f"sys {order[index]}"
            stage = Stage(folder, order[index], index, method, "adapter", digest, "lora", str(base), model_args, system)
            stage.save()
            done.append(stage)
        Run(out, name, str(benchmark), None, order, method, str(base), model_args, 42, done).save()
        return out

    return make

"""Stage folders, checkpoints and models as training leaves them, made by hand in milliseconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from swift_cl.io import sha256_file
from swift_cl.stages import WEIGHTS, Stage


def make_model(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A base model folder: a config and one tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, **config}))
    tensor = np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)
    save_file({"weight": tensor}, folder / "model.safetensors")
    return folder


def make_adapter(folder: Path, seed: int = 0, rank: int = 4, base: str = "base") -> Path:
    """An adapter folder of PEFT."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensor = np.random.default_rng(seed).standard_normal((rank, 4)).astype(np.float32)
    save_file({"lora_A.weight": tensor}, folder / WEIGHTS)
    return folder


def make_stage(folder: Path, previous: Stage | None = None, seed: int = 0, **fields: Any) -> Stage:
    """A finished stage."""
    adapter = make_adapter(folder / "adapter", seed)
    started_from = None
    if previous is not None:
        started_from = {"dir": f"../{previous.dir.name}", "weights_sha256": previous.weights_sha256}
    values: dict[str, Any] = {
        "dir": folder,
        "task": "2022",
        "index": 0 if previous is None else previous.index + 1,
        "method": "seq",
        "weights": "adapter",
        "weights_sha256": sha256_file(adapter / WEIGHTS),
        "tuner_type": "lora",
        "base_model": "Qwen/Qwen2.5-7B",
        "model_args": {"model_type": "qwen2"},
        "started_from": started_from,
    }
    stage = Stage(**{**values, **fields})
    stage.save()
    return stage


def make_checkpoint(output_dir: Path, step: int, last: int) -> Path:
    """A complete checkpoint of the Trainer."""
    folder = make_adapter(output_dir / f"checkpoint-{step}", seed=step)
    (folder / "optimizer.pt").write_bytes(b"optimizer")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": last}))
    return folder


def cut_in_half(path: Path) -> None:
    """What a full disk or a kill leaves of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])

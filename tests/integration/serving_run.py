"""A run folder with real LoRA adapters on the tiny model, made in seconds without training.

The adapters are random but not tiny: each of them changes what the model says, so that a mix-up shows.
"""

import json
from pathlib import Path

import yaml

from swift_cl.io import sha256_file
from swift_cl.stages import Run, Stage, stage_dir_name
from swift_cl.stream.benchmark import load_benchmark

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = ROOT / "datasets" / "continual_news_mini" / "benchmark.yaml"
MODEL_ARGS = {"model_type": "qwen2", "template": "qwen2_5", "torch_dtype": "float32"}


LABELS = {
    "2022": ["sun", "sunflower", "rain"],
    "2023": ["a cat", "a dog"],
    "2024": ["Sci/Tech", "red (dark)"],
    "2025": ["yes", "no"],
}
"""One label is the beginning of another, some hold characters that mean something in expressions."""


def write_classes(folder: Path) -> Path:
    """A class-incremental benchmark with the tasks of `make_run`."""
    tasks = []
    for name, labels in LABELS.items():
        rows = [
            {"messages": [{"role": "user", "content": f"Which is it, number {number}?"},
                          {"role": "assistant", "content": label}]}
            for number, label in enumerate(labels)
        ]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(rows))
        tasks.append({"name": name, "train": f"{name}.json", "test": f"{name}.json"})
    path = folder / "classes.yaml"
    path.write_text(yaml.safe_dump({"name": "classes", "tasks": tasks, "scenario": "class_incremental"}))
    return path


def make_run(out: Path, base: Path, seed: int = 1) -> Path:
    """Four stages, one a task of the bundled benchmark."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tasks = load_benchmark(BENCHMARK).order()
    stages = []
    for index, task in enumerate(tasks):
        torch.manual_seed(seed + index)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor, std=0.12)
        folder = out / stage_dir_name(index, task.name)
        model.save_pretrained(folder / "adapter")
        digest = sha256_file(folder / "adapter" / "adapter_model.safetensors")
        stage = Stage(
            folder, task.name, index, "seq", "adapter", digest, "lora", str(base), MODEL_ARGS, task.system, seed
        )
        stage.save()
        stages.append(stage)
    order = [task.name for task in tasks]
    Run(out, out.name, str(BENCHMARK), None, order, "seq", str(base), MODEL_ARGS, seed, stages).save()
    return out

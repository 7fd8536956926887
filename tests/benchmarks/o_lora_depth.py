"""What a training step of `o_lora` costs at a late task, over one of the second task, in one run on this machine.

    python -m tests.benchmarks.o_lora_depth --tasks 15 --rank 8

The model is one layer as wide as Qwen2.5-7B's (hidden 3584, MLP 18944, random weights): what the history costs depends
on the width, not on the number of layers, and a narrow model would say nothing about a real one (there the rank of
fifteen tasks is near the width itself). Tasks 1 to T-1 are trained for one step each; then tasks 2 and T are trained in
turn, several rounds over, on the same rows, and the lowest time of every step counts.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("LOG_LEVEL", "ERROR")
from tests.benchmarks.step_cost import StepClock, _rows, _train

ROOT = Path(__file__).resolve().parents[2]

BOUND = 1.10


def wide_model(folder: Path) -> Path:
    """One layer of Qwen2.5-7B's shape with the tiny model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_base")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=3584, intermediate_size=18944, num_hidden_layers=1,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> int:
    """Train, measure, print."""
    from swift_cl.workflow.plan import flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=15, help="the late task")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--check", action="store_true", help=f"exit code 1 if the ratio is above {BOUND}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common: dict[str, Any] = {
            "model": str(wide_model(folder / "model")), "model_type": "qwen2", "template": "qwen2_5",
            "torch_dtype": "float32", "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4, "save_strategy": "no", "logging_steps": 5, "lora_rank": args.rank,
            "dataset_num_proc": 1, "check_model": False, "dataloader_num_workers": 0, "report_to": "none",
            "add_version": False, "use_cpu": True, "max_length": 512, "cl_method": "o_lora",
            "dataset": str(_rows(None, "first", 48, folder)),
        }  # fmt: skip
        shared = None

        def stage(number: int, name: str, steps: int, clock: StepClock | None) -> None:
            nonlocal shared
            previous = {"cl_previous": str(folder / str(number - 1))} if number > 1 else {}
            own = {"cl_task": f"task_{number}", "output_dir": str(folder / name), "max_steps": steps}
            shared = _train(flags({**common, **own, **previous}), shared, clock)

        for number in range(1, args.tasks):
            stage(number, str(number), 1, None)
        times: dict[int, list[list[float]]] = {2: [], args.tasks: []}
        for turn in range(args.rounds):
            for number in sorted(times, reverse=turn % 2 == 1):
                clock = StepClock()
                gc.collect()
                stage(number, f"{number}-{turn}", args.steps, clock)
                times[number].append(clock.seconds[2:])  # the first steps warm caches up
        config = json.loads((folder / f"{args.tasks}-0" / "adapter" / "adapter_config.json").read_text())
    seconds = {number: statistics.mean(map(min, zip(*rounds, strict=True))) for number, rounds in times.items()}
    ratio = seconds[args.tasks] / seconds[2]
    for number, value in seconds.items():
        print(f"task {number:>2}: {value:.3f} s a step")
    print(f"ratio {ratio:.3f} (bound {BOUND}); kept as one adapter of rank {config['r']}")
    return int(args.check and ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())

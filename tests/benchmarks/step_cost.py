"""What a method costs over plain LoRA: step-time ratios and peak memory, measured in one run on this machine.

    python -m tests.benchmarks.step_cost --model ../shared/bench/base --data ../shared/bench/data/cl_benchmark

Every method trains a second task in turn, several rounds over, in one process with one loaded base model. Rows are
chosen of nearly equal length and every round takes the same ones, so the k-th step is the same work in every round, and
its lowest time over the rounds is the time that nothing else on the machine disturbed. A ratio is the sum of these
lowest times over seq's. The bound is what the design allows. Exit code 1 beyond a bound with --check.

On a GPU, a model of 7B shape with random weights, with and without DeepSpeed (see tests/gpu/test_step_cost.py):

    python -m tests.benchmarks.step_cost --device cuda --shape qwen2.5-7b --cases seq ewc cia lwf gem
    torchrun --nproc_per_node 1 -m tests.benchmarks.step_cost --device cuda --shape qwen2.5-7b --deepspeed zero2 ...

With several processes a step has `batch` rows on each, and rank 0 prints.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("LOG_LEVEL", "ERROR")
from tests.support.shapes import SHAPES, make_shape

ROOT = Path(__file__).resolve().parents[2]

# label -> (method, flags, bound on the step-time ratio or None)
CASES: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "seq": ("seq", {}, None),
    "ewc": ("ewc", {"ewc_fisher_samples": 8}, 1.05),
    "cia": ("cia", {}, 1.05),
    "replay": ("replay", {"replay_ratio": 1.0}, 1.02),
    "lwf": ("lwf", {}, 1.45),
    "agem": ("gem", {"gem_mode": "agem"}, 2.2),
    "gem": ("gem", {}, None),
}


class PeakMemory:
    """Highest use of memory while the block runs, in MB over its value at the start: of the GPU where one is used, else
    this process's resident set."""

    def __enter__(self) -> "PeakMemory":
        import psutil
        import torch

        self._gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._gpu_start = torch.cuda.memory_allocated()
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.megabytes = (self._peak - self._start) / 2**20
        if self._gpu:
            import torch

            self.megabytes = (torch.cuda.max_memory_allocated() - self._gpu_start) / 2**20


def _rows(data: Path | None, task: str, count: int, folder: Path) -> Path:
    """Every second row of one source for each task, out of those of middle length: steps are then equal work."""
    from swift_cl.io import write_jsonl
    from swift_cl.stream.readers import read_rows

    if data is None:
        rows = read_rows(ROOT / "datasets" / "continual_news_mini" / "2022-train.json", "messages")
    else:
        rows = read_rows(data / "TC" / "agnews" / "train.json", "cl_benchmark", 20 * count)
    rows = sorted(rows, key=lambda row: sum(len(message["content"]) for message in row.messages))
    middle = max(0, len(rows) // 2 - count)
    rows = rows[middle : middle + 2 * count][task != "first" :: 2]
    path = folder / f"{task}.jsonl"
    write_jsonl(path, [row.as_training_row(None) for row in rows])
    return path


def _finish_gpu() -> None:
    """Wait for what was given to the GPU: it works behind the program's back."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class StepClock:
    """Times each optimizer step: from its first micro-batch to the end of its hooks."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        self.seconds: list[float] = []
        clock = self

        class Callback(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                _finish_gpu()
                clock._begin = time.perf_counter()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                _finish_gpu()
                clock.seconds.append(time.perf_counter() - clock._begin)

        self.callback = Callback()
        self._begin = 0.0


def _train(argv: list[str], shared: Any, clock: StepClock | None) -> Any:
    from swift_cl.training.sft import CLSft

    sft = CLSft(argv, shared)
    if clock is not None:
        original = sft.train

        def train(trainer: Any) -> Any:
            trainer.add_callback(clock.callback)
            return original(trainer)

        sft.train = train
    sft.main()
    return sft.release()


def _dtype(args: argparse.Namespace) -> str:
    return "bfloat16" if args.device == "cuda" else "float32"


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of device and engine."""
    flags: dict[str, Any] = {"use_cpu": True} if args.device == "cpu" else {}
    if args.deepspeed:
        flags |= {"deepspeed": args.deepspeed, **({"fp16": False, "bf16": False} if args.device == "cpu" else {})}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.device == "cpu":
        flags["ddp_backend"] = "gloo"
    return flags


@contextlib.contextmanager
def _work_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of the runs, the same on all ranks."""
    if args.work_dir is not None:
        folder = args.work_dir / (args.deepspeed or "plain")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Step seconds (mean of each step's lowest time) and peak memory (MB) by case."""
    from swift_cl.workflow.plan import flags

    results: dict[str, dict[str, float]] = {}
    cases = {label: CASES[label] for label in ("seq", *(c for c in args.cases if c != "seq"))}
    times: dict[str, list[list[float]]] = {label: [] for label in cases}
    peaks: dict[str, list[float]] = {label: [] for label in cases}
    with _work_folder(args) as folder:
        common = {
            "model": args.model, "model_type": "qwen2", "template": "qwen2_5", "torch_dtype": _dtype(args),
            "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1, "learning_rate": 1e-4,
            "save_strategy": "no", "logging_steps": 5, "lora_rank": 16, "dataset_num_proc": 1, "check_model": False,
            "dataloader_num_workers": 0, "report_to": "none", "add_version": False, "max_length": 512,
            "gradient_checkpointing": args.gradient_checkpointing, **_engine(args),
        }  # fmt: skip
        data = {task: str(_rows(args.data, task, 96, folder)) for task in ("first", "second")}
        shared = None
        for label, (method, own, _) in cases.items():
            own = {**own, **({"gem_mem_batch": args.batch} if method == "gem" else {})}
            values = {**common, **own, "cl_method": method, "cl_task": "first", "dataset": data["first"],
                      "output_dir": str(folder / label / "1"), "max_steps": 2}  # fmt: skip
            shared = _train(flags(values), shared, None)
        for turn in range(args.rounds):
            # Every round begins with another case: the place in a round costs or saves some percent.
            order = list(cases)
            for label in order[turn % len(order) :] + order[: turn % len(order)]:
                method, own, _ = cases[label]
                own = {**own, **({"gem_mem_batch": args.batch} if method == "gem" else {})}
                values = {**common, **own, "cl_method": method, "cl_task": "second", "dataset": data["second"],
                          "output_dir": str(folder / label / f"2-{turn}"), "max_steps": args.steps,
                          "cl_previous": str(folder / label / "1")}  # fmt: skip
                clock = StepClock()
                gc.collect()
                with PeakMemory() as memory:
                    shared = _train(flags(values), shared, clock)
                times[label].append(clock.seconds[2:])  # the first steps warm caches up
                peaks[label].append(memory.megabytes)
        adapter_file = folder / "seq" / "1" / "adapter" / "adapter_model.safetensors"
        adapter_mb = adapter_file.stat().st_size / 2**20
    seconds = {label: statistics.mean(map(min, zip(*rounds, strict=True))) for label, rounds in times.items()}
    for label in cases:
        results[label] = {
            "step_seconds": seconds[label],
            "ratio": seconds[label] / seconds["seq"],
            "peak_mb": max(peaks[label]),
            "extra_mb": max(peaks[label]) - max(peaks["seq"]),
            "adapter_mb": adapter_mb,
        }
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets" / "tiny_base"))
    parser.add_argument("--data", type=Path, help="a cl_benchmark folder (default: the bundled news)")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="make a model of this shape instead, in --work_dir")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--deepspeed", help="zero0 to zero3, zero2_offload, zero3_offload; needs torchrun")
    parser.add_argument("--work_dir", type=Path, help="keep models and runs here (needed with several processes)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--gradient_checkpointing", choices=("true", "false"), default="true")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a ratio is beyond its bound")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    if args.shape is not None:
        args.model = str(make_shape(args.shape, (args.work_dir or Path(tempfile.gettempdir())) / args.shape))
    results = measure(args)
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(f"\n{'method':<8}{'s/step':>9}{'ratio':>8}{'bound':>8}{'peak MB over start':>20}{'over seq':>10}")
    failed = False
    for label, row in results.items():
        bound = CASES[label][2]
        over = bound is not None and row["ratio"] > bound
        failed |= over
        print(f"{label:<8}{row['step_seconds']:>9.3f}{row['ratio']:>8.3f}{bound if bound else '-':>8}"
              f"{row['peak_mb']:>20.1f}{row['extra_mb']:>10.1f}{'  BEYOND' if over else ''}")  # fmt: skip
    print(f"adapter: {results['seq']['adapter_mb']:.1f} MB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    return int(args.check and failed)


if __name__ == "__main__":
    sys.exit(main())

"""How fast a stage x task grid is filled, and what the client costs. No training: the adapters are random.

    python -m tests.benchmarks.eval_speed grid --model ../shared/bench/base --tasks 4 --questions 100
    python -m tests.benchmarks.eval_speed client --limits 20 50 100 200 400

`grid`: wall time of `swift-cl eval` (one server start, everything in flight together, scoring and report included)
against the flow of the seed systems: for each of the T + 1 models a server start, then one task after the other with
10 threads. Both use swift-cl's own server command; the seed flow's server generates `--seed_batch_size` answers at a
time (1 is ms-swift's default for the transformers backend, which these systems leave as it is). Loading and shutting
down count, the start of a client process a task does not.

`client`: questions a second through the client and the answer store (each answer is on the disk when it is counted)
against servers whose limit is known, in a process of their own.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from swift_cl.evaluation.ask import Asker, Dialogue
from swift_cl.evaluation.client import Endpoint, Generation
from swift_cl.evaluation.plan import Grid, GridOptions, load_grid, system_prompt
from swift_cl.evaluation.settings import Settings
from swift_cl.evaluation.store import AnswerStore
from swift_cl.io import sha256_file
from swift_cl.serving.backends import ServerOptions, command
from swift_cl.serving.server import Server
from swift_cl.stages import Run, Stage, stage_dir_name
from swift_cl.stream.rows import Row

ROOT = Path(__file__).resolve().parents[2]

TEXT = "the a city council river price team law school market rain year vote bridge record film court study"
WORDS = TEXT.split()
SEED_THREADS = 10


def make_benchmark(folder: Path, tasks: int, questions: int) -> Path:
    """Questions of 20 to 60 random words."""
    draw = random.Random(1)
    lines = ["name: speed", "scorers: [exact_match]", "tasks:"]
    for task in range(tasks):
        rows = []
        for number in range(questions):
            text = " ".join(draw.choices(WORDS, k=draw.randint(20, 60)))
            messages = [{"role": "user", "content": f"{number}: {text}?"}, {"role": "assistant", "content": "yes"}]
            rows.append({"id": f"t{task}q{number}", "messages": messages})
        (folder / f"t{task}.json").write_text(json.dumps(rows))
        lines.append(f"  - {{name: t{task}, train: t{task}.json, test: t{task}.json, system: Task {task}.}}")
    path = folder / "benchmark.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_run(folder: Path, args: argparse.Namespace) -> Path:
    """A run folder with one random adapter a task."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    benchmark = make_benchmark(folder, args.tasks, args.questions)
    base = str(Path(args.model).resolve())
    model_args = {"model_type": args.model_type, "template": args.template, "torch_dtype": args.torch_dtype}
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    dtype = getattr(torch, args.torch_dtype)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)
    out, stages = folder / "run", []
    for index in range(args.tasks):
        torch.manual_seed(index)
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor, std=0.05)
        stage_dir = out / stage_dir_name(index, f"t{index}")
        model.save_pretrained(stage_dir / "adapter")
        digest = sha256_file(stage_dir / "adapter" / "adapter_model.safetensors")
        system = f"Task {index}."
        stage = Stage(stage_dir, f"t{index}", index, "seq", "adapter", digest, "lora", base, model_args, system)
        stage.save()
        stages.append(stage)
    order = [stage.task for stage in stages]
    Run(out, "run", str(benchmark), None, order, "seq", base, model_args, 0, stages).save()
    return out


def swift_cl_seconds(run: Path, args: argparse.Namespace) -> float:
    """Wall time of the command, as a user types it."""
    argv = [sys.executable, "-m", "swift_cl.cli.main", "eval", str(run), "--infer_backend", args.infer_backend]
    argv += ["--max_tokens", str(args.max_tokens), "--concurrency", str(args.concurrency)]
    argv += ["--server_python", args.server_python] if args.server_python else []
    argv += ["--server_args", args.server_args] if args.server_args else []
    start = time.monotonic()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.monotonic() - start


def seed_seconds(run: Path, args: argparse.Namespace) -> float:
    """One model after the other, one task after the other, 10 threads."""
    grid = load_grid(run, GridOptions())
    python = args.server_python or sys.executable
    backend = args.infer_backend.removesuffix("-offline")
    options = ServerOptions(backend, python, args.seed_batch_size, tuple(args.server_args.split()))
    settings = Generation(max_tokens=args.max_tokens)
    start = time.monotonic()
    for target in grid.targets:
        adapters = tuple(a for a in grid.base.deployment.adapters if a.sha256 == target.weights)
        deployment = replace(grid.base.deployment, adapters=adapters)

        def make(host: str, port: int, deployment=deployment):
            return command(deployment, options, host, port)

        with Server(make, deployment.names, run / "logs" / "seed.log", notify=print) as server:
            endpoint = Endpoint(server.base_url, check_alive=server.check_alive)
            for index in range(len(grid.tasks)):
                ask_task(endpoint, grid, target.served, index, settings)
            endpoint.close()
    return time.monotonic() - start


def ask_task(endpoint: Endpoint, grid: Grid, name: str, index: int, settings: Generation) -> None:
    task = grid.tasks[index]

    def one(row: Row) -> str:
        system = system_prompt("task", grid.base, task, row)
        head = [{"role": "system", "content": system}] if system else []
        return endpoint.ask(name, [*head, {"role": "user", "content": row.turns[0][0]}], settings).text

    with ThreadPoolExecutor(SEED_THREADS) as pool:
        list(pool.map(one, grid.rows[index]))


def grid_benchmark(args: argparse.Namespace) -> None:
    """Print both times and their ratio."""
    folder = Path(tempfile.mkdtemp(prefix="swift-cl-speed-", dir=args.work_dir))
    try:
        run = make_run(folder, args)
        cells = (args.tasks + 1) * args.tasks
        print(f"{args.tasks + 1} models x {args.tasks} tasks x {args.questions} questions, {args.infer_backend}")
        ours = swift_cl_seconds(run, args)
        print(f"swift-cl eval: {ours:.1f} s, {ours / cells:.2f} s a cell", flush=True)
        if not args.no_seed:
            seed = seed_seconds(run, args)
            print(f"seed flow (batch {args.seed_batch_size}): {seed:.1f} s, {seed / cells:.2f} s a cell")
            print(f"ratio: {seed / ours:.2f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def limited_server(slots: int, service_ms: float) -> Iterator[str]:
    """A server with a known limit; yields its base URL."""
    script = Path(__file__).with_name("rate_limited_server.py")
    argv = [sys.executable, str(script), str(slots), str(service_ms), "m"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


def client_rate(base_url: str, concurrency: int, questions: int) -> float:
    """Questions a second, from the first asked to the last stored."""
    with tempfile.TemporaryDirectory() as folder:
        stores = [AnswerStore(Path(folder) / f"{task}.jsonl") for task in range(4)]
        rows = [
            Row(str(i), ({"role": "user", "content": f"{i} " + " ".join(WORDS)}, {"role": "assistant", "content": "x"}))
            for i in range(questions)
        ]
        asked = [Dialogue("m", "w", "b", "system", row, (stores[i % 4],)) for i, row in enumerate(rows)]
        endpoint = Endpoint(base_url)
        asker = Asker(endpoint, Settings(Generation(), "mock"), concurrency)
        asker.ask_all(asked[: concurrency * 2])  # connections are open, modules are loaded
        start = time.monotonic()
        tally = asker.ask_all(asked[concurrency * 2 :])
        seconds = time.monotonic() - start
        assert not tally.failures, tally.failures[0]
        endpoint.close()
        return tally.asked / seconds


def client_benchmark(args: argparse.Namespace) -> None:
    """Print the client's rate against each limit, and against a server that answers at once."""
    for limit in args.limits:
        service = 1000 * args.concurrency / limit
        with limited_server(args.concurrency, service) as url:
            # Whole rounds of all slots, so that no slot is idle in the last one.
            rounds = max(8, round(6 * limit / args.concurrency))
            rate = client_rate(url, args.concurrency, (2 + rounds) * args.concurrency)
        print(f"limit {limit:6.0f} questions/s: client {rate:6.1f}, ratio {rate / limit:.3f}", flush=True)
    with limited_server(args.concurrency, 0) as url:
        print(f"a server that answers at once: client {client_rate(url, args.concurrency, 2000):.0f} questions/s")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    grid = commands.add_parser("grid")
    grid.add_argument("--model", required=True)
    grid.add_argument("--model_type", default="qwen2")
    grid.add_argument("--template", default="qwen2_5")
    grid.add_argument("--torch_dtype", default="float32")
    grid.add_argument("--tasks", type=int, default=4)
    grid.add_argument("--questions", type=int, default=100, help="a task")
    grid.add_argument("--max_tokens", type=int, default=32)
    grid.add_argument("--infer_backend", default="pt")
    grid.add_argument("--server_python")
    grid.add_argument("--server_args", default="")
    grid.add_argument("--concurrency", type=int, default=16)
    grid.add_argument("--seed_batch_size", type=int, default=1)
    grid.add_argument("--no_seed", action="store_true", help="only swift-cl")
    grid.add_argument("--work_dir", help="folder for the run and its answers")
    grid.set_defaults(run=grid_benchmark)
    client = commands.add_parser("client")
    client.add_argument("--limits", type=float, nargs="+", default=[20, 50, 100, 200, 400], help="questions a second")
    client.add_argument("--concurrency", type=int, default=16)
    client.set_defaults(run=client_benchmark)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()

"""What the methods promise of gradients and averages, looked at from within a training: one small run a method.

    python -m tests.support.invariants OUT [FLAGS_OF_THE_ENGINE_AS_JSON]        (or by torchrun, with several processes)

writes `<OUT>/rank<R>.json`, and `<OUT>/<method>.safetensors` with what the method added to the reduced gradients.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METHODS = ("ewc", "o_lora", "gem", "cia")
# Steps and rates with which each of them acts.
SETTINGS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lora_dropout": 0.0,
    "max_steps": 3,
    "save_steps": 100,
}


def checkpointed(module: Any) -> bool:
    """Whether the Trainer checkpoints a module, or FSDP2 has wrapped it for that."""
    return getattr(module, "gradient_checkpointing", False) or hasattr(module, "_checkpoint_wrapped_module")


class Watched:
    """Wraps a method's hooks on the second task and notes what they did."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.added: dict[str, Tensor] = {}
        self.seen: dict[str, Any] = {"cosines": [], "violated": 0, "averages": [], "checkpointed": False}
        self._gradients, self._after_step = method.gradients, method.after_step
        method.gradients, method.after_step = self.gradients, self.after_step

    def gradients(self, ctx: Any, grads: Any) -> None:
        self.seen["checkpointed"] |= any(map(checkpointed, ctx.model.modules()))
        before = grads.flat().clone()
        self._gradients(ctx, grads)
        after = grads.flat().clone()  # read back from the engine: what its optimizer will use
        self.added[f"step_{ctx.step}"] = (after - before).cpu()
        for gradient in getattr(self.method, "_gradients", ()):
            self.seen["violated"] += int(torch.dot(before, gradient) < 0)
            self.seen["cosines"].append(float(torch.cosine_similarity(after, gradient, dim=0)))

    def after_step(self, ctx: Any) -> None:
        self._after_step(ctx)
        run = getattr(self.method, "_run", None)
        if run is not None:
            from swift_cl.io import sha256_tensors

            self.seen["averages"].append(sha256_tensors({name: t.cpu() for name, t in run.ema.items()}))


def against_memory(memory_gradient: Any) -> Any:
    """Memory gradients the other way round, so that the constraints are violated at once."""
    return lambda *args: -memory_gradient(*args)


def main(out: Path, engine: dict[str, Any]) -> None:
    """Two tasks with every method, a global batch of 4."""
    from safetensors.torch import save_file

    from swift_cl.distributed import launched_processes, world
    from swift_cl.methods import gem
    from swift_cl.training.sft import CLSft
    from swift_cl.tuners import register_tuners
    from tests.support.train import TASKS, stage_argv

    register_tuners()
    gem.memory_gradient = against_memory(gem.memory_gradient)
    changes = {**SETTINGS, "per_device_train_batch_size": 4 // launched_processes(), "ddp_backend": None}
    if launched_processes() > 1:
        changes["ddp_backend"] = "gloo"
    changes |= engine
    seen: dict[str, Any] = {}
    for method in METHODS:
        first, second = (out / "runs" / method / task for task in TASKS)
        CLSft(stage_argv(method, TASKS[0], first, **changes)).main()
        sft = CLSft(stage_argv(method, TASKS[1], second, first, **changes))
        watched = Watched(sft.session.method)
        sft.main()
        seen[method] = watched.seen
        if world()[0] == 0:
            save_file(watched.added, out / f"{method}.safetensors")
    (out / f"rank{world()[0]}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})

"""Counts what a training sends between processes: `--external_plugins THIS_FILE --callbacks count_communication`.

Every collective of torch.distributed goes through torch's dispatcher, whoever asks for it (DDP's reducer, DeepSpeed, a
method), and is seen there. Counted is the size of the tensors given to it on one process; what the network carries for
them depends on algorithm and number of processes (a ring all-reduce of S bytes sends 2 S (W - 1) / W). Logging and
saving are left out. Writes communication.json into the stage's folder.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from swift.callbacks import TrainerCallback, callbacks_map
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swift_cl.io import read_json, write_json

FILE = "communication.json"
NO_DATA = ("barrier", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """Number of calls and bytes of the collectives that run meanwhile, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in NO_DATA:
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                # Some are given both an input and an output for it: the larger one is what is exchanged.
                size = max((t.numel() * t.element_size() for t in tensors), default=0)
                size = max(size, sum(t.numel() * t.element_size() for t in tree_leaves(args[0]) if hasattr(t, "numel")))
                self.found[name][0] += 1
                self.found[name][1] += size
        return func(*args, **(kwargs or {}))

    def take(self) -> dict[str, list[int]]:
        """What was counted since the last call."""
        found, self.found = dict(self.found), defaultdict(lambda: [0, 0])
        return found


class CountCommunication(TrainerCallback):
    """Takes stock at the end of every optimizer step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._mode, self._steps = Collectives(), []
        self._mode.__enter__()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self._steps:
            self._mode.take()  # what was done once, when the training began

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._steps.append(self._mode.take())

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._mode.take()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._mode.take()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._mode.__exit__(None, None, None)
        if self.trainer.is_world_process_zero():
            sizes = [getattr(p, "ds_numel", p.numel()) for p in self.trainer.model.parameters() if p.requires_grad]
            value = {"trained_bytes": 4 * sum(sizes), "steps": self._steps}
            write_json(Path(self.args.output_dir) / FILE, value)


COUNTED = {"external_plugins": [str(Path(__file__).resolve())], "callbacks": ["count_communication"]}
"""Settings of a training that is counted."""


def largest_step(stage: Path) -> tuple[int, int]:
    """(bytes given to collectives, bytes of the fp32 gradient) of the stage's optimizer step with the most bytes."""
    value = read_json(stage / FILE)
    return max(sum(size for _, size in step.values()) for step in value["steps"]), value["trained_bytes"]


def beyond_plain(stage: Path, plain: Path) -> tuple[int, int]:
    """(bytes of a step beyond the gradient and what plain fine-tuning sends beside it, bytes of the gradient)."""
    (bytes_, gradient), (plain_bytes, plain_gradient) = largest_step(stage), largest_step(plain)
    return bytes_ - gradient - (plain_bytes - plain_gradient), gradient


callbacks_map["count_communication"] = CountCommunication

"""A `TaskContext` driven by hand: one process, any torch module, no Trainer.

Oracle tests use it to feed a method exact weights and gradients and to read what it computed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift_cl.distributed import functional_forward
from swift_cl.io import MethodState
from swift_cl.methods.base import EarlierTask, TrainingRow
from tests.support.fake_engine import Engines


class FakeGradients:
    """Gradients as a plain dict of fp32 tensors."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = {name: value.clone().float() for name, value in values.items()}
        self.written: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.values[name] = value
        self.written.add(name)

    def add_part(self, name: str, part: Tensor) -> None:
        self[name] = self[name] + part

    def flat(self) -> Tensor:
        return torch.cat([value.reshape(-1) for value in self.values.values()])

    def set_flat(self, vector: Tensor) -> None:
        offset = 0
        for name, value in self.values.items():
            self[name] = vector[offset : offset + value.numel()].view_as(value).clone()
            offset += value.numel()


class FakeContext:
    """See the attributes of `swift_cl.methods.base.TaskContext`."""

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        task: str = "now",
        earlier: Sequence[str] = (),
        state: MethodState | None = None,
        num_items: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        folder: Path = Path("missing"),
    ) -> None:
        self.model = model
        self.task = task
        self.earlier = [EarlierTask(t, folder / t, folder / t / "adapter", folder / t / "cl_state") for t in earlier]
        self.state = state
        self.num_items = num_items
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.device = torch.device("cpu")
        self.system: str | None = None
        self.step, self.max_steps = 0, 100
        self.micro_batch, self.global_batch = 4, 8
        self.is_logging_step, self.schedule = True, 1.0
        self.logged: dict[str, float] = {}
        self.log_weights: dict[str, int] = {}
        self.notices: list[str] = []
        self.records: dict[str, Any] = {}
        self.rows: list[TrainingRow] = []
        self.this_stage = EarlierTask(task, folder / task, folder / task / "adapter", folder / task / "cl_state")
        self.channels: list[str | None] | None = None
        self.token_weights: Tensor | None = None
        self.stop_tokens = [0]
        self.engines: Engines | None = None
        self.phase = ""
        self.phases: dict[str, Path] = {}
        self.generated_dir = folder / "generated"
        self.measures = False
        """Whether `statistics_mode` is on."""

    def engine(self, weights: Path | None, backend: str) -> Any:
        assert self.engines is not None
        return self.engines(weights, backend)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def task_index(self) -> int:
        return len(self.earlier)

    @property
    def module_for_forward(self) -> Any:
        return self.model

    def gradients_of(self, total: Tensor, names: Sequence[str]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(total, [self.parameters[name] for name in names], allow_unused=True)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().float() for name, p in self.parameters.items()}

    def live_weights(self) -> dict[str, Tensor]:
        return self.weights()

    def weight_parts(self) -> dict[str, Tensor]:
        return self.weights()

    def parts_of(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(full)

    def sum_of_parts(self, total: Tensor) -> Tensor:
        return total

    def forward_with(self, held: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Any:
        return functional_forward(self.model, self.parameters, held, inputs)

    def training_rows(self) -> list[TrainingRow]:
        return self.rows

    def encode(self, rows: Sequence[TrainingRow]) -> list[dict[str, Any]]:
        return [dict(row) for row in rows]

    def encode_prompts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        raise NotImplementedError

    def collate(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.stack([torch.as_tensor(row[key]) for row in encoded]) for key in encoded[0]}

    @contextmanager
    def statistics_mode(self) -> Iterator[None]:
        before, self.measures = self.measures, True
        try:
            yield
        finally:
            self.measures = before

    def token_mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        return total / (self.num_items if self.num_items is not None else count)

    def window_mean(self, total: Tensor, window_count: Tensor) -> Tensor:
        return total / window_count

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def previous_state(self) -> MethodState:
        assert self.state is not None
        return self.state

    def log(self, name: str, value: Tensor | float, weight: int = 1) -> None:
        self.logged[name], self.log_weights[name] = float(value), weight

    def record(self, name: str, value: Any) -> None:
        self.records[name] = value

    def notice(self, message: str) -> None:
        self.notices.append(message)

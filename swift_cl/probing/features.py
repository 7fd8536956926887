"""Features of rows under the weights of a stage, kept beside the run and read again where nothing changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_cl.evaluation.plan import Grid, Target, system_prompt
from swift_cl.io import atomic_write, sha256_json
from swift_cl.methods._prompts import last_token_features
from swift_cl.progress import with_bar
from swift_cl.serving.routing.model import RouteModel, load_base
from swift_cl.stream.benchmark import Task
from swift_cl.stream.rows import Row

FOLDER = "probing"
AT_ONCE = 32
"""Rows of a forward."""


@dataclass(frozen=True)
class Labelled:
    """Rows as a probe sees them.

    Attributes:
        features: fp32 [rows, width].
        labels: numbers of their classes, [rows].
    """

    features: Tensor
    labels: Tensor


class Features:
    """Reads and keeps the features of one run.

    Args:
        notify: told before something is computed.
    """

    def __init__(self, grid: Grid, notify: Callable[[str], None]) -> None:
        self._grid, self._notify = grid, notify
        self._classes = {label: number for number, label in enumerate(dict.fromkeys(_all(grid)))}
        self._shared: RouteModel | None = None
        self._alone: tuple[str, RouteModel] | None = None

    @property
    def classes(self) -> dict[str, int]:
        """Numbers of the classes of all tasks."""
        return self._classes

    def of(self, target: Target, task: Task, split: str, rows: Sequence[Row]) -> Labelled:
        """The rows of a task under a stage (or the base model).

        Args:
            split: `train` or `test`, part of the file's name.
        """
        labels = torch.tensor([self._classes[row.turns[0][1]] for row in rows])
        messages = [self._asked(target, task, row) for row in rows]
        key = sha256_json([self._grid.base.weights, target.weights, dict(target.deployment.model_args), messages])
        file = self._grid.run.dir / FOLDER / target.row / f"{task.name}-{split}-{key[:16]}.safetensors"
        if not file.is_file():
            self._notify(f"features of {target.row} x {task.name} ({split}, {len(rows)} rows)")
            _write(file, self._compute(target, messages))
        return Labelled(_read(file), labels)

    @staticmethod
    def _asked(target: Target, task: Task, row: Row) -> list[dict[str, str]]:
        system = system_prompt("stage", target, task, row)
        head = [] if system is None else [{"role": "system", "content": system}]
        return [*head, {"role": "user", "content": row.turns[0][0]}]

    def _compute(self, target: Target, messages: Sequence[Sequence[dict[str, str]]]) -> Tensor:
        model, folder = self._model(target)
        prompts = [model.encode(asked) for asked in messages]
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        found: dict[int, Tensor] = {}
        with model.model_with(folder) as ready, torch.no_grad():
            for start in with_bar(range(0, len(order), AT_ONCE), "features", "batch"):
                batch = order[start : start + AT_ONCE]
                values = last_token_features(ready, [prompts[number] for number in batch], model.device)
                found.update(zip(batch, values.cpu(), strict=True))
        return torch.stack([found[number] for number in range(len(prompts))])

    def _model(self, target: Target) -> tuple[RouteModel, Path | None]:
        """The model that has a target's weights, and the folder of its adapter."""
        deployment = target.deployment
        if deployment == self._grid.base.deployment:
            if self._shared is None:
                self._shared = RouteModel(lambda: load_base(deployment.model, deployment.model_args))
            return self._shared, None if target.stage is None else target.stage.weights_dir
        if self._alone is None or self._alone[0] != deployment.model:
            self._alone = deployment.model, RouteModel(lambda: load_base(deployment.model, deployment.model_args))
        return self._alone[1], None


def _all(grid: Grid) -> list[str]:
    return [label for own in grid.labels for label in own]


def _write(file: Path, features: Tensor) -> None:
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as stream:
        stream.write(save({"features": features.contiguous()}))


def _read(file: Path) -> Tensor:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(file)
    features: Tensor = found["features"]
    return features

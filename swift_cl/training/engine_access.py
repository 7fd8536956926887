"""The part of `TaskContext` that the engine answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swift_cl import distributed


class EngineAccess:
    """Passes on to the engine, which is there from the beginning of training on."""

    _engine: distributed.Engine | None = None

    @property
    def module_for_forward(self) -> Any:
        assert self._engine is not None
        return self._engine.module

    def gradients_of(self, total: Tensor, names: Sequence[str]) -> Sequence[Tensor | None]:
        assert self._engine is not None
        return self._engine.gradients_of(total, names)

    def weights(self) -> dict[str, Tensor]:
        assert self._engine is not None
        return self._engine.weights()

    def live_weights(self) -> dict[str, Tensor]:
        assert self._engine is not None
        return self._engine.live_weights()

    def weight_parts(self) -> dict[str, Tensor]:
        assert self._engine is not None
        return self._engine.weight_parts()

    def parts_of(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._engine is not None
        return self._engine.parts_of(full)

    def sum_of_parts(self, total: Tensor) -> Tensor:
        assert self._engine is not None
        return distributed.all_reduce_sum(total) if self._engine.spread else total

    def forward_with(self, held: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Any:
        assert self._engine is not None
        return self._engine.forward_with(held, inputs)

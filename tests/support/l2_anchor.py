"""l2_anchor: pulls the weights back to where the task began. The worked example of the README."""

from dataclasses import dataclass
from typing import ClassVar

from swift_cl.io import MethodState
from swift_cl.methods.base import Gradients, Method, MethodConfig, TaskContext, setting


@dataclass
class L2AnchorConfig(MethodConfig):
    """Flags of `l2_anchor`."""

    strength: float = setting(0.1, "Weight of the pull, >= 0.")

    def validate(self) -> None:
        if self.strength < 0:
            self.fail("l2_anchor", "strength", "a number >= 0")


class L2Anchor(Method):
    """Adds strength * (theta - theta at the task's start) to the gradient; nothing on the first task."""

    name: ClassVar[str] = "l2_anchor"
    title: ClassVar[str] = "Pull back to the previous weights"
    config_class: ClassVar[type[MethodConfig]] = L2AnchorConfig

    def train_begin(self, ctx: TaskContext) -> None:
        self.anchor = ctx.previous_state().tensors if ctx.earlier else {}

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        weights = ctx.weights()
        for name, anchor in self.anchor.items():
            grads[name] = grads[name] + self.config.strength * (weights[name] - anchor.to(ctx.device))

    def end_task(self, ctx: TaskContext) -> MethodState:
        return MethodState(tensors={name: weight.cpu().clone() for name, weight in ctx.weights().items()})

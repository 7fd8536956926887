"""gorp: continual gradient low-rank projection; a new LoRA learns outside the input directions of earlier tasks.

Layers of one family may be trained in full rank instead, by steps in a few directions (`_full_rank.py`).
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapter_history import AdapterHistory
from swift_cl.methods._adapters import is_lora_a
from swift_cl.methods._full_rank_part import FullRankPart
from swift_cl.methods._gradient_space import Sketch, grown
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Gradients, Method, MethodConfig, Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = LazyModule("torch")

BETA = 0.9  # of Adam's first moment, whose place the moment takes


@dataclass
class GorpConfig(MethodConfig):
    """What is remembered of earlier tasks' gradients, and how the new task is kept off it."""

    eps: float = setting(0.9, "Share of the gradients' energy that the remembered directions explain, in (0, 1).")
    project: str = setting(
        "forward",
        "'forward' lets the layer use A - (A S) S', so that no optimizer can leave the allowed directions; 'grad' "
        "takes the directions S out of A's gradient as in the paper; 'none' only builds S.",
        ("forward", "grad", "none"),
    )
    space: str = setting(
        "moment",
        "What directions are taken from: 'moment', the running average of the task's gradients as in the paper, or "
        "'sketch' (Frequent Directions) of all of them.",
        ("moment", "sketch"),
    )
    max_rank: int = setting(
        64, "Directions remembered per layer, >= 1; beyond it, those of the least energy are let go."
    )
    hist_rank: int = setting(
        0,
        "Largest rank of the kept adapter, >= 0; 0 for no limit; beyond it the best approximation of it is kept.",
    )
    full_modules: str = setting(
        "",
        "Layers with a LoRA whose whole weight is trained instead, as a regular expression found anywhere in their "
        "names, e.g. 'mlp.gate_proj'; empty for none.",
    )
    full_rank: int = setting(8, "Directions on either side that a full-rank layer's steps are taken in, >= 1.")
    full_gap: int = setting(10, "Steps after which these directions are found anew, >= 1.")
    full_scale: float = setting(1.0, "Factor of a full-rank layer's steps, > 0.")
    full_lr: float = setting(1e-5, "Learning rate of the full-rank layers, > 0; it follows the run's schedule.")

    def validate(self) -> None:
        if not 0 < self.eps < 1:
            self.fail("gorp", "eps", "a number in (0, 1)")
        for name, least in (("max_rank", 1), ("hist_rank", 0)):
            if getattr(self, name) < least:
                self.fail("gorp", name, f"{least} or more")
        for name in ("full_rank", "full_gap"):
            if getattr(self, name) < 1:
                self.fail("gorp", name, "1 or more")
        for name in ("full_scale", "full_lr"):
            if not 0 < getattr(self, name) < math.inf:
                self.fail("gorp", name, "a number > 0")
        try:
            re.compile(self.full_modules)
        except re.error as error:
            self.fail("gorp", "full_modules", f"a regular expression ({error})")
        for field in dataclasses.fields(self):
            changed = field.name.startswith("full_") and getattr(self, field.name) != field.default
            if changed and not self.full_modules:
                self.fail("gorp", field.name, f"{field.default!r}, because only --gorp_full_modules uses it")


class Gorp(Method):
    """G_A' = G_A - G_A S S' with S an orthonormal basis of earlier tasks' gradient directions on the input side.

    By default through the layer itself: it uses A_eff = A - (A S) S', whose gradient with respect to A is that. What is
    kept is A_eff, and all pairs together as one adapter (see `AdapterHistory`).
    """

    name: ClassVar[str] = "gorp"
    title: ClassVar[str] = "Continual Gradient Low-Rank Projection (GORP)"
    summary: ClassVar[str] = "a new LoRA that learns outside the input directions of earlier tasks"
    cost: ClassVar[str] = "a projection"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.02503"
    config_class: ClassVar[type[MethodConfig]] = GorpConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), encoder_decoder=True)
    starts_fresh: ClassVar[bool] = True
    # A full-rank layer's steps are taken outside the Trainer's optimizer, on whole matrices.
    full_support: ClassVar[Support] = dataclasses.replace(support, deepspeed=(), fsdp=False, quantized=False)

    config: GorpConfig

    def __init__(self, config: GorpConfig) -> None:
        super().__init__(config)
        self._history = AdapterHistory(self.name, "gorp_hist_rank", config.hist_rank)
        self._full = FullRankPart(
            config.full_modules, config.full_rank, config.full_gap, config.full_scale, config.full_lr
        )
        # S by name of A or of the matrix of a full-rank layer, [in, s], fp32; empty in the first task
        self._spaces: dict[str, Tensor] = {}
        self._energies: dict[str, Tensor] = {}  # of its columns, [s]
        self._moments: dict[str, Tensor] = {}  # of this task, [rank, in], fp32
        self._sketches: dict[str, Sketch] = {}
        self._full_ranks: dict[str, int] = {}  # of the kept adapter, by layer

    def supports(self) -> Support:
        return self.full_support if self.config.full_modules else self.support

    # --- the model ---------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        names = {id(parameter): name for name, parameter in ctx.parameters.items() if is_lora_a(name)}
        self._history.load(ctx, model)
        self._full.attach(model)
        if not ctx.earlier:
            return model
        state = ctx.previous_state()
        self._spaces, self._energies = unpack(state.tensors, "space"), unpack(state.tensors, "energy")
        if self.config.project == "forward":
            # Before DeepSpeed adds its own hooks, which take the weights of a layer away again (ZeRO-3).
            for module in model.modules():
                name = names.get(id(getattr(module, "weight", None)))
                if name is not None and self._spaces.get(name, torch.zeros(0)).numel():
                    module.register_forward_hook(_projecting(self._spaces[name]))
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        weights = {name: weight for name, weight in ctx.weights().items() if self._projects(name)}
        widths = {name: weight.shape[1] for name, weight in weights.items()} | self._full.widths
        for name, weight in weights.items():
            if self.config.space == "moment":
                self._moments[name] = torch.zeros_like(weight, dtype=torch.float32)
            else:
                self._sketches[name] = Sketch(2 * max(self.config.max_rank, len(weight)), weight.shape[1])
        if self.config.space == "sketch":
            for name, width in self._full.widths.items():
                self._sketches[name] = Sketch(2 * max(self.config.max_rank, self.config.full_rank), width)
        if not ctx.earlier:
            return
        stored = {name: [space.shape[0]] for name, space in self._spaces.items()}
        check_shapes(self.name, stored, {name: [width] for name, width in widths.items()})
        for name, space in self._spaces.items():
            if space.shape[1] >= space.shape[0]:
                raise UserError(
                    f"no free directions are left for {name}: {space.shape[1]} of {space.shape[0]} are remembered; "
                    "train all stages with a smaller --gorp_max_rank or --gorp_eps"
                )
            self._spaces[name] = space.to(ctx.device)
        if self.config.project != "none":
            self._full.hold_off(self._spaces)

    def _projects(self, name: str) -> bool:
        """Whether it is an A that is trained."""
        return is_lora_a(name) and name not in self._full.owned

    # --- training ----------------------------------------------------------------------------------------------------

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        full = self._full.see(ctx, grads) if self._full.layers else {}
        for name in filter(self._projects, grads.names):
            gradient, space = grads[name], self._spaces.get(name)
            if space is not None and self.config.project == "grad":
                gradient = without(gradient, space)
                grads[name] = gradient
            if self.config.space == "moment":
                self._moments[name].lerp_(gradient, 1 - BETA)
            else:
                self._sketches[name].add(gradient.detach().cpu())
        if self.config.space == "sketch":
            for name, rows in full.items():
                self._sketches[name].add(rows.detach().cpu())
        if ctx.is_logging_step:
            self._log(ctx)

    def _log(self, ctx: TaskContext) -> None:
        if self._full.layers:
            ctx.log("gorp_full_size", self._full.size())
        weights = ctx.weights()
        pairs = [(weights[name], space) for name, space in self._spaces.items() if self._projects(name)]
        if pairs:
            inside = torch.stack([(weight @ space).square().sum() for weight, space in pairs]).sum()
            # The share of A that lies in old directions; 'forward' does not use it, the others do.
            ctx.log("gorp_inside", inside / torch.stack([weight.square().sum() for weight, _ in pairs]).sum())

    def after_step(self, ctx: TaskContext) -> None:
        self._full.move()

    def checkpoint_state(self, ctx: TaskContext) -> MethodState:
        full, steps = self._full.checkpoint()
        if self.config.space == "moment":
            return MethodState(pack(moment=self._moments) | full, {"full_steps": steps})
        tensors = pack(sketch={name: sketch.rows() for name, sketch in self._sketches.items() if len(sketch.rows())})
        return MethodState(tensors | full, {"space": "sketch", "full_steps": steps})

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        found = "sketch" if state.meta.get("space") == "sketch" else "moment"
        if found != self.config.space:
            raise UserError(f"--gorp_space is {self.config.space!r}, but the checkpoint was trained with {found!r}")
        self._full.restore(state.tensors, state.meta.get("full_steps", {}))
        for name, moment in unpack(state.tensors, "moment").items():
            self._moments[name].copy_(moment)
        for name, rows in unpack(state.tensors, "sketch").items():
            self._sketches[name].restore(rows)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        own = self._full.owned | self._full.widths.keys()
        new = {name: self._effective(name, tensor) for name, tensor in tensors.items() if name not in own}
        kept = self._history.with_new(ctx, new)
        for name, tensor in self._full.pairs(self._history.pairs, self._history.gain).items():
            kept[name] = tensor.to(tensors[name].dtype)
        self._full_ranks = {path: len(kept[f"{path}.lora_A.weight"]) for path in self._full.layers}
        return kept

    def _effective(self, name: str, tensor: "Tensor") -> "Tensor":
        if self.config.project != "forward" or name not in self._spaces:
            return tensor
        return without(tensor.float(), self._spaces[name].to(tensor.device)).to(tensor.dtype)

    def export_config(self, ctx: TaskContext, config: dict[str, Any]) -> dict[str, Any]:
        return {**self._history.config(config), **self._full.patterns(self._full_ranks)}

    def end_task(self, ctx: TaskContext) -> MethodState:
        if self.config.space == "moment":
            seen = self._moments | {layer.name: layer.moment() for layer in self._full.layers.values()}
        else:
            seen = {name: sketch.rows() for name, sketch in self._sketches.items()}
        spaces: dict[str, Tensor] = {}
        energies: dict[str, Tensor] = {}
        shares: list[float] = []
        for name, matrix in seen.items():
            old = self._spaces.get(name, torch.zeros(matrix.shape[1], 0)).cpu()
            energy = self._energies.get(name, torch.zeros(0))
            spaces[name], energies[name], share = grown(
                old, energy, matrix.cpu(), self.config.eps, self.config.max_rank
            )
            shares.append(share)
        if min(shares) < 1:
            ctx.notice(f"{self.config.max_rank} directions per layer keep {min(shares):.3g} or more of the energy")
        tensors = {name: tensor.contiguous() for name, tensor in pack(space=spaces, energy=energies).items()}
        return MethodState(tensors, {"spaces": shapes_of(spaces)})


def without(rows: "Tensor", space: "Tensor") -> "Tensor":
    """Rows with their part in the span of the orthonormal columns of `space` taken out."""
    return rows - (rows @ space) @ space.T


def _projecting(space: "Tensor") -> Any:
    """A forward hook on A, [rank, in]: with it the layer computes A_eff x."""
    copies: dict[Any, Tensor] = {}

    def project(module: "nn.Linear", arguments: "tuple[Tensor, ...]", output: "Tensor") -> "Tensor":
        key = (module.weight.device, module.weight.dtype)
        if key not in copies:
            copies[key] = space.to(*key)
        s = copies[key]
        return output - torch.nn.functional.linear(arguments[0] @ s, module.weight @ s)

    return project

"""gorp: continual gradient low-rank projection; a new LoRA learns outside the input directions of earlier tasks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapter_history import AdapterHistory
from swift_cl.methods._adapters import is_lora_a
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

    def validate(self) -> None:
        if not 0 < self.eps < 1:
            self.fail("gorp", "eps", "a number in (0, 1)")
        for name, least in (("max_rank", 1), ("hist_rank", 0)):
            if getattr(self, name) < least:
                self.fail("gorp", name, f"{least} or more")


class Gorp(Method):
    """G_A' = G_A - G_A S S' with S an orthonormal basis of earlier tasks' gradient directions on the input side.

    By default through the layer itself: it uses A_eff = A - (A S) S', whose gradient with respect to A is that. What is
    kept is A_eff, and all pairs together as one adapter (see `AdapterHistory`).
    """

    name: ClassVar[str] = "gorp"
    title: ClassVar[str] = "Continual Gradient Low-Rank Projection (GORP), LoRA part"
    summary: ClassVar[str] = "a new LoRA that learns outside the input directions of earlier tasks"
    cost: ClassVar[str] = "a projection"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.02503"
    config_class: ClassVar[type[MethodConfig]] = GorpConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), encoder_decoder=True)
    starts_fresh: ClassVar[bool] = True

    config: GorpConfig

    def __init__(self, config: GorpConfig) -> None:
        super().__init__(config)
        self._history = AdapterHistory(self.name, "gorp_hist_rank", config.hist_rank)
        self._spaces: dict[str, Tensor] = {}  # S by name of A, [in, s], fp32; empty in the first task
        self._energies: dict[str, Tensor] = {}  # of its columns, [s]
        self._moments: dict[str, Tensor] = {}  # of this task, [rank, in], fp32
        self._sketches: dict[str, Sketch] = {}
        self._handles: list[Any] = []

    # --- the model ---------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        names = {id(parameter): name for name, parameter in ctx.parameters.items() if is_lora_a(name)}
        self._history.load(ctx, model)
        if not ctx.earlier:
            return model
        state = ctx.previous_state()
        self._spaces, self._energies = unpack(state.tensors, "space"), unpack(state.tensors, "energy")
        if self.config.project == "forward":
            # Before DeepSpeed adds its own hooks, which take the weights of a layer away again (ZeRO-3).
            for module in model.modules():
                name = names.get(id(getattr(module, "weight", None)))
                if name is not None and self._spaces.get(name, torch.zeros(0)).numel():
                    self._handles.append(module.register_forward_hook(_projecting(self._spaces[name])))
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        weights = {name: weight for name, weight in ctx.weights().items() if is_lora_a(name)}
        for name, weight in weights.items():
            if self.config.space == "moment":
                self._moments[name] = torch.zeros_like(weight, dtype=torch.float32)
            else:
                self._sketches[name] = Sketch(2 * max(self.config.max_rank, len(weight)), weight.shape[1])
        if not ctx.earlier:
            return
        stored = {name: [space.shape[0]] for name, space in self._spaces.items()}
        check_shapes(self.name, stored, {name: [weight.shape[1]] for name, weight in weights.items()})
        for name, space in self._spaces.items():
            if space.shape[1] >= space.shape[0]:
                raise UserError(
                    f"no free directions are left for {name}: {space.shape[1]} of {space.shape[0]} are remembered; "
                    "train all stages with a smaller --gorp_max_rank or --gorp_eps"
                )
            self._spaces[name] = space.to(weights[name].device)

    # --- training ----------------------------------------------------------------------------------------------------

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        for name in filter(is_lora_a, grads.names):
            gradient, space = grads[name], self._spaces.get(name)
            if space is not None and self.config.project == "grad":
                gradient = without(gradient, space)
                grads[name] = gradient
            if self.config.space == "moment":
                self._moments[name].lerp_(gradient, 1 - BETA)
            else:
                self._sketches[name].add(gradient.detach().cpu())
        if self._spaces and ctx.is_logging_step:
            weights = ctx.weights()
            inside = [(weights[name] @ space).square().sum() for name, space in self._spaces.items()]
            whole = [weights[name].square().sum() for name in self._spaces]
            # The share of A that lies in old directions; 'forward' does not use it, the others do.
            ctx.log("gorp_inside", torch.stack(inside).sum() / torch.stack(whole).sum())

    def checkpoint_state(self, ctx: TaskContext) -> MethodState:
        if self.config.space == "moment":
            return MethodState(pack(moment=self._moments))
        tensors = pack(sketch={name: sketch.rows() for name, sketch in self._sketches.items() if len(sketch.rows())})
        return MethodState(tensors, {"space": "sketch"})

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        found = "sketch" if state.meta.get("space") == "sketch" else "moment"
        if found != self.config.space:
            raise UserError(f"--gorp_space is {self.config.space!r}, but the checkpoint was trained with {found!r}")
        for name, moment in unpack(state.tensors, "moment").items():
            self._moments[name].copy_(moment)
        for name, rows in unpack(state.tensors, "sketch").items():
            self._sketches[name].restore(rows)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return self._history.with_new(ctx, {name: self._effective(name, tensor) for name, tensor in tensors.items()})

    def _effective(self, name: str, tensor: "Tensor") -> "Tensor":
        if self.config.project != "forward" or name not in self._spaces:
            return tensor
        return without(tensor.float(), self._spaces[name].to(tensor.device)).to(tensor.dtype)

    def export_config(self, ctx: TaskContext, config: dict[str, Any]) -> dict[str, Any]:
        return self._history.config(config)

    def end_task(self, ctx: TaskContext) -> MethodState:
        for handle in self._handles:
            handle.remove()
        seen = self._moments if self.config.space == "moment" else {n: s.rows() for n, s in self._sketches.items()}
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

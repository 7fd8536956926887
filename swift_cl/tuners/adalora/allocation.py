"""When triplets are taken away, and what a resumed run needs to know about it.

PEFT's own saving cuts the taken triplets out of the tensors. What it then loads has other sizes than its optimizer
state and its importances, and cannot be trained further. Here a file always holds all triplets, those that are taken
away with E = 0: the same function, and the next task begins with the whole budget again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraModel
from safetensors.torch import load_file, save
from swift.callbacks import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from swift_cl.distributed import write_trained
from swift_cl.errors import UserError
from swift_cl.io import atomic_write
from swift_cl.tuners.base import TRAINED

FEWEST_STEPS = 3
"""One that measures importance, one that takes away by it, one with what is left."""
UNKNOWN_STEPS = 1 << 30
"""The number of steps, until training begins."""
IMPORTANCE = "adalora_importance.safetensors"
MEANS, SPREADS, KEPT = "mean/", "spread/", "kept/"


def base_of(model: Any) -> Any:
    """PEFT's AdaLoRA model inside wrappers."""
    return getattr(model, "module", model).base_model


def set_schedule(config: Any, steps: int) -> None:
    """First and last step of the taking away, for a stage of that many steps.

    The shares are those of the flags; a resumed run that was given none goes on with those in its file.
    """
    shares = getattr(config, "cl_shares", None) or (config.tinit / config.total_step, config.tfinal / config.total_step)
    config.total_step = steps
    config.tinit = int(shares[0] * steps)
    config.tfinal = min(max(int(shares[1] * steps), 1), steps - 2)
    config.tinit = min(config.tinit, steps - config.tfinal - 1)
    config.rank_pattern = None


class Copies:
    """Whole copies of trained tensors with their gradients, in place of a model whose own may be spread over ranks.

    Args:
        named: a copy by name; its `.grad` is set.
    """

    def __init__(self, named: dict[str, torch.nn.Parameter]) -> None:
        self._named = named

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As of a module."""
        yield from self._named.items()


class WithoutPenalty(AdaLoraModel):
    """PEFT's model whose forward gives the loss as it is.

    PEFT's own adds the orthogonality penalty there. It is lost where the loss is computed anew from the logits (a
    method with a loss of its own, --loss_scale), and it reads the matrices outside of their layers, where engines have
    them in parts.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def orthogonality_penalty(weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean of ||A A^T - I||_F and ||B^T B - I||_F over the matrices, and its gradient by name.

    AdaLoRA (arXiv 2303.10512), equation 4, as PEFT has it: the norm where the paper squares it, and a mean.

    Args:
        weights: full A (triplets x inputs) and B (outputs x triplets) by name, and others, which are left out.
    """
    own = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in weights.items()
        if "lora_A" in name or "lora_B" in name
    }
    norms = []
    for name, matrix in own.items():
        products = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
        norms.append(torch.linalg.matrix_norm(products - torch.eye(len(products), device=products.device)))
    with torch.enable_grad():
        penalty = torch.stack(norms).mean()
    return penalty.detach(), dict(zip(own, torch.autograd.grad(penalty, list(own.values())), strict=True))


class Allocation(TrainerCallback):
    """Updates importances and takes triplets away after every optimizer step, on every rank alike.

    In a stage it also adds the orthogonality penalty to the gradient, before the method sees that, and it sees
    gradients and weights as a method does, whole and under every engine, before clipping; in a plain `swift sft` those
    of the model.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self._session = getattr(trainer, "cl_session", None)
        self._gradients: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner = base_of(kwargs["model"])
        if state.max_steps < FEWEST_STEPS:
            raise UserError(
                f"--tuner_type adalora needs at least {FEWEST_STEPS} steps, this training has {state.max_steps}"
            )
        set_schedule(inner.peft_config[TRAINED], state.max_steps)
        inner.rankallocator.reset_ipt()
        if self._session is not None:
            inner.__class__ = WithoutPenalty
            self._weight = inner.peft_config[TRAINED].orth_reg_weight
            self._session.watchers.append(self)
        if args.resume_from_checkpoint:
            load_importance(inner, Path(args.resume_from_checkpoint))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is None:
            # The gradients of the step are still there; PEFT counts steps from 1.
            base_of(kwargs["model"]).update_and_allocate(state.global_step + 1)

    def before_method(self, ctx: Any, grads: Any) -> None:
        """Add the gradient of the penalty to that of the loss."""
        penalty, pulls = orthogonality_penalty(ctx.live_weights())
        for name, part in ctx.parts_of(pulls).items():
            grads.add_part(name, self._weight * part)
        if ctx.is_logging_step:
            ctx.log("adalora_orthogonality", penalty)

    def gradients(self, ctx: Any, grads: Any) -> None:
        """Keep the gradients of a step until it was made."""
        self._gradients = {name: grads[name].clone() for name in grads.names}

    def after_step(self, ctx: Any) -> None:
        """Let PEFT decide on whole copies, and write down which triplets it took away."""
        inner, weights = base_of(ctx.model), ctx.weights()
        names = {parameter: name for name, parameter in ctx.parameters.items()}
        copies: dict[str, torch.nn.Parameter] = {}
        for name, live in inner.model.named_parameters():
            if live in names:
                copies[name] = torch.nn.Parameter(weights[names[live]].clone())
                copies[name].grad = self._gradients[names[live]]
        stand_in = SimpleNamespace(
            peft_config=inner.peft_config,
            trainable_adapter_name=inner.trainable_adapter_name,
            rankallocator=inner.rankallocator,
            model=Copies(copies),
        )
        type(inner).update_and_allocate(stand_in, ctx.step + 1)
        for name, live in inner.model.named_parameters():
            if live in names and "lora_E" in name:
                value = copies[name].detach()
                if not torch.equal(value, weights[names[live]]):
                    write_trained(live, value)


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Let PEFT see no triplet as taken away."""
    config = model.peft_config[TRAINED]
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def save_importance(model: Any, folder: Path) -> None:
    """Write what a resumed run needs, if `folder` is a checkpoint."""
    if not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
        return
    allocator, pattern = base_of(model).rankallocator, model.peft_config[TRAINED].rank_pattern or {}
    tensors = {MEANS + name: tensor for name, tensor in allocator.exp_avg_ipt.items()}
    tensors |= {SPREADS + name: tensor for name, tensor in allocator.exp_avg_unc.items()}
    tensors |= {KEPT + name: torch.tensor(kept) for name, kept in pattern.items()}
    with atomic_write(folder / IMPORTANCE) as stream:
        stream.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_importance(inner: Any, folder: Path) -> None:
    """Take back what `save_importance` wrote."""
    file = folder / IMPORTANCE
    if not file.is_file():
        raise UserError(f"{file}: file not found; the checkpoint was not written by swift_cl")
    device = next(inner.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in load_file(file).items()}

    def group(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    allocator = inner.rankallocator
    allocator.exp_avg_ipt, allocator.exp_avg_unc = group(MEANS), group(SPREADS)
    allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}
    pattern = {name: kept.tolist() for name, kept in group(KEPT).items()}
    inner.peft_config[TRAINED].rank_pattern = pattern or None

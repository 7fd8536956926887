"""migu: only the weights of the units with the largest outputs are updated (magnitude-based gradient updating)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.lazy import LazyModule
from swift_cl.methods.base import Gradients, Method, MethodConfig, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = LazyModule("torch")


@dataclass
class MiguConfig(MethodConfig):
    """Flags of `migu`."""

    mask_ratio: float = setting(
        0.7, "Quantile of a layer's unit magnitudes below which a unit's weights get no gradient, in [0, 1)."
    )
    statistic: str = setting(
        "normalized",
        "Magnitude of a unit: 'normalized' sums |output| / (sum over units of |output|) over tokens as in the paper, "
        "'sum' sums |output| as in the released code, where long activations outweigh others.",
        ("normalized", "sum"),
    )

    def validate(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            self.fail("migu", "mask_ratio", "a number in [0, 1)")


class Migu(Method):
    """g_i <- g_i where n_i >= the mask_ratio quantile of n, else 0; n_i: unit i's share of its layer's output.

    Units are rows of weight matrices: with LoRA, those of A and of B by their own outputs.
    """

    name: ClassVar[str] = "migu"
    title: ClassVar[str] = "Magnitude-based gradient updating (MIGU)"
    summary: ClassVar[str] = "only the weights of units with large outputs are updated"
    cost: ClassVar[str] = "about 1.0x"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.17245"
    config_class: ClassVar[type[MethodConfig]] = MiguConfig
    config: MiguConfig

    def __init__(self, config: MiguConfig) -> None:
        super().__init__(config)
        self._units: dict[str, Sequence[str]] = {}  # parameters whose rows are a module's units, by its name
        self._magnitudes: dict[str, Tensor] = {}  # of the step so far, [units], fp32
        self._sizes: dict[str, int] = {}
        self._handles: list[Any] = []
        self._counting = False
        self._real: Tensor | None = None  # tokens that are no padding, of the forward that runs
        self._predicting: Tensor | None = None  # of the micro-batch, [rows, logits]: whether a label follows

    def train_begin(self, ctx: TaskContext) -> None:
        """Watch the layers; off in the first task, as in the released code."""
        if not ctx.earlier:
            return
        model = ctx.module_for_forward
        # A head that is tied to the embedding has rows that are inputs too.
        tied = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        names = {id(p): name for name, p in ctx.parameters.items() if id(p) not in tied}
        for module_name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            own = [names[id(p)] for p in (module.weight, module.bias) if p is not None and id(p) in names]
            if own:
                self._units[module_name], self._sizes[module_name] = own, module.out_features
                self._handles.append(module.register_forward_hook(self._watch(module_name)))
        # A checkpointed layer runs again in backward; only what the model's own forward calls counts.
        self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._end))

    @contextmanager
    def forward(self, ctx: TaskContext, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Note which logits of a micro-batch predict a label; labels come as many as logits will be."""
        labels = inputs.get("labels")
        self._predicting = None
        if labels is not None and labels.dim() == 2:
            self._predicting = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
        yield

    def _begin(self, model: Any, arguments: Any, options: dict[str, Any]) -> None:
        self._counting = bool(model.training)
        mask = options.get("attention_mask")
        self._real = mask.bool() if mask is not None else None

    def _end(self, model: Any, arguments: Any, output: Any) -> None:
        self._counting = False

    def _watch(self, module_name: str) -> Any:
        def watch(module: "nn.Module", arguments: Any, output: "Tensor") -> None:
            if self._counting:
                # ms-swift lets the head run from the first answer of the batch on, so what else it sees hangs on how
                # rows are batched: it counts what predicts an answer.
                positions = output.shape[:-1]
                known = (
                    mask for mask in (self._real, self._predicting) if mask is not None and mask.shape == positions
                )
                found = self.magnitudes(output.detach(), next(known, None))
                before = self._magnitudes.get(module_name)
                self._magnitudes[module_name] = found if before is None else before + found

        return watch

    def magnitudes(self, output: "Tensor", real: "Tensor | None") -> "Tensor":
        """Sum over tokens of each unit's magnitude, [units], fp32.

        Args:
            output: [..., units].
            real: [...], which tokens count; None for all.
        """
        size = output.float().abs()
        if self.config.statistic == "normalized":
            size = size / size.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        if real is not None:
            size = size * real.unsqueeze(-1)
        return size.flatten(0, -2).sum(dim=0)

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        # What a step left that the loss scaler skipped.
        self._magnitudes = {}

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if not self._units:
            return
        masks = self._masks(ctx)
        for module_name, mask in masks.items():
            for name in self._units[module_name]:
                gradient = grads[name]
                grads[name] = gradient * mask.view(-1, *[1] * (gradient.dim() - 1))
        if ctx.is_logging_step:
            ctx.log("migu_updated", torch.cat(list(masks.values())).float().mean())

    def _masks(self, ctx: TaskContext) -> "dict[str, Tensor]":
        """Which units of each layer are updated, from the outputs of all micro-batches and ranks."""
        found, self._magnitudes = self._magnitudes, {}
        # One sum for all layers; one that was not called on this rank (an expert, say) may have been on another.
        parts = [found.get(name, torch.zeros(size, device=ctx.device)) for name, size in self._sizes.items()]
        summed = torch.split(ctx.all_reduce_sum(torch.cat(parts)), list(self._sizes.values()))
        return {name: unit_mask(sizes, self.config.mask_ratio) for name, sizes in zip(self._sizes, summed, strict=True)}

    def end_task(self, ctx: TaskContext) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def unit_mask(magnitudes: "Tensor", ratio: float) -> "Tensor":
    """True from the quantile on; at least one unit is, and all of them where all are equal (a layer that is 0 yet)."""
    return magnitudes >= torch.quantile(magnitudes, ratio)

"""dynamic_conpet: an adapter a task, and a selector, trained on a fixed number of batches, that picks one of them."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState, atomic_write
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import ADAPTER_FILE, TRAINED, AdapterSwitch, check_plain_lora
from swift_cl.methods._draws import Key, permutation, seed32
from swift_cl.methods._prompts import last_token_features, questions_alone, routed_features
from swift_cl.methods._routing import Route, RouteContext, RouteRequest, largest
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, setting
from swift_cl.progress import with_bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

SELECTOR = "selector"
MEMORY = "memory"


@dataclass
class DynamicConpetConfig(MethodConfig):
    """Flags of `dynamic_conpet`."""

    selector_rank: int = setting(4, "Rank of the selector's LoRA, >= 1.")
    lr: float = setting(5e-4, "Learning rate of the selector (AdamW, constant), > 0.")
    batch_limit: int = setting(2500, "Optimizer steps of the selector a task, >= 1: its cost does not grow.")
    mix: float = setting(0.5, "Share of old tasks' questions in a batch of the selector, in (0, 1).")
    memory: int = setting(100, "Questions of each task that are kept for the selectors of later tasks, >= 1.")
    selector_init: str = setting(
        "previous", "What the selector's LoRA starts from: the 'previous' task's, or 'fresh'.", ("previous", "fresh")
    )
    head_bias: bool = setting(True, "Whether the selector's classifier has a bias.")
    route_batch: int = setting(32, "Questions in one forward of the selector at inference, >= 1.")

    def validate(self) -> None:
        self.check("dynamic_conpet")

    def check(self, method: str) -> None:
        """Refuse values out of range."""
        for name in ("selector_rank", "batch_limit", "memory", "route_batch"):
            if getattr(self, name) < 1:
                self.fail(method, name, "a whole number >= 1")
        if not 0 < self.lr < math.inf:
            self.fail(method, "lr", "a number > 0")
        if not 0 < self.mix < 1:
            self.fail(method, "mix", "a number in (0, 1)")


class DynamicConpet(Method):
    """Expert t is a LoRA trained on D_t alone; the selector is another LoRA with p(task | x) = softmax(C h(x) + b).

    The selector is trained when the stage ends, by a loop of its own: it shares nothing with the expert but the frozen
    base model.
    """

    name: ClassVar[str] = "dynamic_conpet"
    title: ClassVar[str] = "Dynamic ConPET: one adapter per task and a selector of constant cost"
    summary: ClassVar[str] = "an adapter a task and a selector of constant cost that chooses one"
    cost: ClassVar[str] = "the selector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.14763"
    config_class: ClassVar[type[MethodConfig]] = DynamicConpetConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), sequence_parallel=False, liger=False)
    needs_rows: ClassVar[bool] = True
    starts_fresh: ClassVar[bool] = True

    config: DynamicConpetConfig

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        check_plain_lora(self.name, ctx.parameters)
        return model

    # --- the selector ------------------------------------------------------------------------------------------------

    def end_task(self, ctx: TaskContext) -> MethodState:
        asked = questions_alone(ctx.training_rows(), ctx.system)
        kept = permutation(len(asked), self.name, ctx.seed, ctx.task, MEMORY)[: self.config.memory]
        old = list(ctx.previous_state().rows[MEMORY]) if ctx.earlier else []
        memory = old + [{"task": ctx.task, "messages": [dict(m) for m in asked[i]]} for i in kept]
        tasks = [*(stage.task for stage in ctx.earlier), ctx.task]
        meta: dict[str, Any] = {"tasks": tasks}
        if not ctx.earlier:
            return MethodState(meta=meta, rows={MEMORY: memory})
        by_task = [[row["messages"] for row in old if row["task"] == task] for task in tasks[:-1]]
        prompts = [ctx.encode_prompts(messages) for messages in (*by_task, asked)]
        before = ctx.previous_state().tensors
        folder = ctx.this_stage.state_dir / SELECTOR
        weight, bias, meta["last_loss"] = self._train(ctx, prompts, before, folder)
        tensors = {"head/weight": weight, **({} if bias is None else {"head/bias": bias})}
        return MethodState(tensors, meta, {MEMORY: memory})

    def _train(
        self, ctx: TaskContext, prompts: Sequence[Sequence[list[int]]], before: "dict[str, Tensor]", folder: Path
    ) -> "tuple[Tensor, Tensor | None, float]":
        """Train LoRA and head on the prompts of each task; returns the head and the last step's loss, and writes the
        LoRA to `folder`. Every rank trains the same selector on its share of every batch."""
        model = ctx.model
        live = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._add(ctx, model)
        try:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(SELECTOR in name.split("."))
            lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with AdapterSwitch(model).active(SELECTOR):
                head = self._head(ctx, prompts, before)
                loss = self._steps(ctx, prompts, lora, head)
            if ctx.rank == 0:
                _save(model, folder)
            bias = None if head.bias is None else head.bias.detach().cpu()
            return head.weight.detach().cpu(), bias, loss
        finally:
            model.delete_adapter(SELECTOR)
            for parameter, trained in live.items():
                parameter.requires_grad_(trained)

    def _add(self, ctx: TaskContext, model: Any) -> None:
        from peft import PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        config = copy.deepcopy(model.peft_config[TRAINED])
        config.lora_alpha = config.lora_alpha * self.config.selector_rank / config.r
        config.r, config.lora_dropout, config.init_lora_weights = self.config.selector_rank, 0.0, True
        config.rank_pattern, config.alpha_pattern, config.modules_to_save = {}, {}, None
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed32(self.name, ctx.seed, ctx.task))
            # Not `model.add_adapter`: a model that classifies would get a copy of its head too, of which ZeRO-3 knows
            # nothing. The selector has a head of its own.
            PeftModel.add_adapter(model, SELECTOR, config)
        previous = ctx.earlier[-1].state_dir / SELECTOR / ADAPTER_FILE
        if self.config.selector_init == "previous" and len(ctx.earlier) > 1:
            if not previous.is_file():
                raise UserError(f"{previous}: file not found; the selector of the task before is continued")
            set_peft_model_state_dict(model, load_file(previous), adapter_name=SELECTOR)

    def _head(
        self, ctx: TaskContext, prompts: Sequence[Sequence[list[int]]], before: "dict[str, Tensor]"
    ) -> "torch.nn.Linear":
        with torch.no_grad(), ctx.statistics_mode():
            width = last_token_features(ctx.module_for_forward, [prompts[-1][0]], ctx.device).shape[1]
        head = torch.nn.Linear(width, len(prompts), bias=self.config.head_bias)
        with torch.no_grad():
            head.weight.copy_(grown(before.get("head/weight"), len(prompts), width))
            if head.bias is not None:
                known = before.get("head/bias")
                head.bias.copy_(grown(None if known is None else known[:, None], len(prompts), 1)[:, 0])
        return head.to(ctx.device)

    def _steps(
        self, ctx: TaskContext, prompts: Sequence[Sequence[list[int]]], lora: "list[Tensor]", head: "torch.nn.Linear"
    ) -> float:
        trained: list[Tensor] = [*lora, *head.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=self.config.lr, weight_decay=0.0)
        sizes, batch = [len(own) for own in prompts], max(2, ctx.global_batch)
        order = batches(sizes, batch, self.config.mix, self.name, ctx.seed, ctx.task)
        total = 0.0
        with ctx.statistics_mode(), torch.enable_grad():
            limit = self.config.batch_limit
            for rows in with_bar(
                islice(order, limit), f"{self.name}: selector", "step", total=limit, shown=ctx.rank == 0
            ):
                own = rows[ctx.rank :: ctx.world_size]
                gradients = [torch.zeros_like(parameter) for parameter in trained]
                value = torch.zeros((), device=ctx.device)
                # Every rank runs the same number of forwards, because under ZeRO-3 a forward needs all of them; one
                # that has no rows left runs the first of the batch, which counts nothing.
                for start in range(0, math.ceil(len(rows) / ctx.world_size), ctx.micro_batch):
                    part = own[start : start + ctx.micro_batch]
                    inputs = [prompts[task][i] for task, i in part or rows[:1]]
                    features = last_token_features(ctx.module_for_forward, inputs, ctx.device)
                    loss = selector_loss(head(features), [task for task, _ in part or rows[:1]]) / len(rows)
                    # Not `backward`, whose hooks belong to an engine: its training is over.
                    found = torch.autograd.grad(loss * bool(part), trained, materialize_grads=True)
                    torch._foreach_add_(gradients, list(found))
                    value += loss.detach() * bool(part)
                total = float(_reduce(ctx, trained, gradients, value))
                optimizer.step()
        if not math.isfinite(total):
            raise RunFailure(f"the selector's loss is {total} after task '{ctx.task}'; lower --{self.name}_lr")
        guessing = math.log(len(prompts))
        ctx.notice(f"the selector of {len(prompts)} tasks ends with a loss of {total:.3g}; guessing has {guessing:.3g}")
        return total

    # --- inference ---------------------------------------------------------------------------------------------------

    def route(self, ctx: RouteContext, requests: Sequence[RouteRequest]) -> list[Route]:
        state, folder = ctx.state(), ctx.state_dir / SELECTOR
        weight, bias = state.tensors["head/weight"].float(), state.tensors.get("head/bias")
        found = routed_features(ctx, self.name, folder, requests, self.config.route_batch)
        logits = found @ weight.T + (0.0 if bias is None else bias.float())
        scores = [dict(zip(state.meta["tasks"], row, strict=True)) for row in logits.tolist()]
        return [Route(largest(each), each) for each in scores]


def grown(known: "Tensor | None", rows: int, width: int) -> "Tensor":
    """[rows, width]: the known rows as they were, then zeros."""
    result = torch.zeros(rows, width)
    if known is not None:
        result[: len(known)] = known
    return result


def selector_loss(logits: "Tensor", tasks: Sequence[int]) -> "Tensor":
    """Sum over rows of the cross-entropy of their tasks."""
    labels = torch.tensor(list(tasks), device=logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def batches(sizes: Sequence[int], batch: int, mix: float, *key: Key) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (task, row), the last task being the new one.

    Every batch has round(batch x mix) old rows (at least one, and at least one new); they go round the old tasks, so
    that each gets as many as every other. Within a task the rows come in one random order after another.
    """
    old, new = len(sizes) - 1, len(sizes) - 1
    share = min(batch - 1, max(1, round(batch * mix)))
    rows = [_endless(size, *key, task) for task, size in enumerate(sizes)]
    turn = 0
    while True:
        found = [(new, next(rows[new])) for _ in range(batch - share)]
        for _ in range(share):
            found.append((turn % old, next(rows[turn % old])))
            turn += 1
        yield found


def _endless(size: int, *key: Key) -> Iterator[int]:
    number = 0
    while True:
        yield from permutation(size, *key, number)
        number += 1


def _reduce(ctx: TaskContext, trained: "list[Tensor]", gradients: "list[Tensor]", value: "Tensor") -> "Tensor":
    """Sum gradients and loss over the ranks."""
    flat = ctx.all_reduce_sum(torch.cat([*(gradient.reshape(-1).float() for gradient in gradients), value.reshape(1)]))
    offset = 0
    for parameter in trained:
        size = parameter.numel()
        parameter.grad = flat[offset : offset + size].view_as(parameter).to(parameter.dtype)
        offset += size
    return flat[-1]


def _save(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    state = get_peft_model_state_dict(model, adapter_name=SELECTOR, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / ADAPTER_FILE) as stream:
        stream.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))
    config = copy.deepcopy(model.peft_config[SELECTOR])
    config.inference_mode = True
    if config.task_type == "SEQ_CLS":
        config.task_type = None  # else it would want a head on the model that it is loaded on
    config.save_pretrained(str(folder))

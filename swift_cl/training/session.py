"""One stage of one method: implements `TaskContext` and calls the method's hooks for the trainer and `CLSft`."""

import contextlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift_cl import distributed
from swift_cl.errors import RunFailure, UserError
from swift_cl.generation.engine import Engine
from swift_cl.io import MethodState, load_method_state, save_method_state, sha256_file, write_json
from swift_cl.methods._adapters import TRAINED, is_peft
from swift_cl.methods.base import EarlierTask, Method, TrainingRow
from swift_cl.stages import ADAPTER_DIR, DATA_DIR, STATE_DIR, WEIGHTS, Stage, load_stage
from swift_cl.training.before import earlier_tasks, is_model_input, parameter_name
from swift_cl.training.checkpointing import differentiable_checkpointing
from swift_cl.training.engine_access import EngineAccess
from swift_cl.training.portable import Layout, Resumed, restore
from swift_cl.training.probe import inference_template

logger = logging.getLogger("swift_cl")


class Session(EngineAccess):
    """See the attributes of `swift_cl.methods.base.TaskContext`."""

    def __init__(self, method: Method, task: str, output_dir: Path, previous: Stage | None, seed: int) -> None:
        self.method = method
        self.task = task
        self.output_dir = output_dir
        self.earlier = earlier_tasks(previous)
        self.seed = seed
        self.system: str | None = None
        self.template: Any = None
        self.rows: list[TrainingRow] = []
        self.trainer: Any = None
        self.model: Any = None
        self.parameters: Mapping[str, nn.Parameter] = {}
        self._live_names: dict[str, str] = {}
        self.micro_batch = 1
        self.global_batch = 1
        self.layout = Layout("plain", 1, 1, 1)
        self.resumed: Resumed | None = None
        self.portable = True
        self._num_items: Tensor | int | None = None
        self.channels: Sequence[str | None] | None = None
        self.token_weights: Tensor | None = None
        self.phase = ""
        self.phases: Mapping[str, Path] = {}
        self.watchers: list[Any] = []
        """What of a tuner has hooks too: `before_method`, which sees gradients first and may add to them, and
        `gradients` and `after_step`, called after the method's."""
        self.open_engine: Callable[[Path | None, str], AbstractContextManager[Engine]] | None = None

    # --- what a method sees ------------------------------------------------------------------------------------------

    @property
    def task_index(self) -> int:
        return len(self.earlier)

    @property
    def rank(self) -> int:
        return distributed.world()[0]

    @property
    def world_size(self) -> int:
        return distributed.world()[1]

    @property
    def this_stage(self) -> EarlierTask:
        weights = self.output_dir / (ADAPTER_DIR if is_peft(self.model) else "model")
        return EarlierTask(self.task, self.output_dir, weights, self.output_dir / STATE_DIR)

    @property
    def device(self) -> Any:
        return self.trainer.accelerator.device

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def max_steps(self) -> int:
        return int(self.trainer.state.max_steps)

    @property
    def schedule(self) -> float:
        group = self.trainer.optimizer.param_groups[0]
        return float(group["lr"] / group["initial_lr"]) if group["initial_lr"] else 0.0

    @property
    def is_logging_step(self) -> bool:
        every = max(1, int(self.trainer.state.logging_steps or 1))
        return (self.step + 1) % every == 0 or self.step == 0

    def training_rows(self) -> list[TrainingRow]:
        return self.rows

    def encode(self, rows: Sequence[TrainingRow]) -> list[dict[str, Any]]:
        from swift.template import MaxLengthError

        encoded = []
        for row in rows:
            try:
                encoded.append(self.template.encode(row))
            except MaxLengthError:
                encoded.append({})
        return encoded

    def encode_prompts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        with inference_template(self.template):
            encoded = [self.template.encode({"messages": [dict(message) for message in prompt]}) for prompt in prompts]
        return [list(row["input_ids"]) for row in encoded]

    @property
    def stop_tokens(self) -> list[int]:
        meta, tokenizer = self.template.template_meta, self.template.tokenizer
        texts = [tokenizer.encode(word, add_special_tokens=False) for word in meta.stop_words if isinstance(word, str)]
        found = {meta.stop_token_id, tokenizer.eos_token_id, *(ids[0] for ids in texts if len(ids) == 1)}
        return sorted(found - {None})

    def collate(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        # Copies: ms-swift's collator takes the pictures out of the rows, which a method may collate again.
        batch = self.trainer.data_collator([dict(row) for row in encoded])
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items() if is_model_input(k)}

    def engine(self, weights: Path | None, backend: str) -> AbstractContextManager[Engine]:
        assert self.open_engine is not None
        assert self.trainer is None, "generation belongs into prepare_task"
        return self.open_engine(weights, backend)

    @property
    def generated_dir(self) -> Path:
        return self.output_dir / DATA_DIR / self.method.name

    @contextlib.contextmanager
    def statistics_mode(self) -> Iterator[None]:
        # eval() would switch gradient checkpointing off and can run out of memory, so only dropout is switched off.
        dropouts = [m for m in self.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        rates = [module.p for module in dropouts]
        for module in dropouts:
            module.p = 0.0
        try:
            with self.trainer.compute_loss_context_manager(), differentiable_checkpointing(self.model):
                yield
        finally:
            for module, rate in zip(dropouts, rates, strict=True):
                module.p = rate

    def _processes(self) -> int:
        averaged = getattr(self.trainer.args, "average_tokens_across_devices", False)
        return int(self.trainer.accelerator.num_processes) if averaged and self.trainer.model_accepts_loss_kwargs else 1

    def token_mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        if self._num_items is None:
            return total / count
        scaled: Tensor = total * self._processes() / self._num_items
        return scaled

    def window_mean(self, total: Tensor, window_count: Tensor) -> Tensor:
        # The count is global and DDP averages gradients over ranks, so the sum is multiplied by their number.
        if self._num_items is None:
            total = total * self.trainer.current_gradient_accumulation_steps
        global_mean: Tensor = total * self.world_size / window_count
        return global_mean

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return distributed.all_reduce_sum(tensor)

    def previous_state(self) -> MethodState:
        return load_method_state(self.earlier[-1].state_dir, self.method.name)

    def log(self, name: str, value: Tensor | float, weight: int = 1) -> None:
        tensor = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
        self.trainer.custom_metrics["train"][name].update(tensor.to(self.device).expand(weight))

    def record(self, name: str, value: Any) -> None:
        if self.rank == 0:
            write_json(self.output_dir / STATE_DIR / f"{self.method.name}.{name}.json", value)

    def notice(self, message: str) -> None:
        if self.rank == 0:
            logger.warning(f"{self.method.name}: {message}")

    # --- what drives the method --------------------------------------------------------------------------------------

    def spread(self, layout: Layout, resumed: Resumed | None, args: Any) -> None:
        """Say how the training is spread over processes, and what it continues."""
        self.layout, self.resumed = layout, resumed
        self.micro_batch, self.global_batch = layout.micro_batch, layout.global_batch
        self.portable = args.tuner_type != "full" if args.cl_portable is None else args.cl_portable

    def prepare_rows(self, rows: list[TrainingRow]) -> list[TrainingRow]:
        """The rows to train on (rank 0). Keeps the task's own rows for statistics at its end."""
        self.rows = rows
        return self.method.prepare_task(self, rows)

    def batch_order(self, n_rows: int, epoch: int) -> Sequence[int] | None:
        """The order of the training rows in one epoch, None for the Trainer's own."""
        return self.method.batch_order(self, n_rows, epoch)

    def prepare_model(self, model: Any) -> Any:
        """Let the method extend the model, and fix the names of what is trained."""
        self._name_parameters(model)
        model = self.method.prepare_model(self, model)
        self._name_parameters(model)
        return model

    def _name_parameters(self, model: Any) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._live_names = {parameter_name(name): name for name, _ in named}
        self.parameters = {parameter_name(name): p for name, p in named}
        self.model = model

    def attach(self, trainer: Any) -> None:
        """Called when training begins, with the final engine, optimizer and weights."""
        self.trainer = trainer
        # FSDP2 has put other parameters, which are sharded, in the places of those that were there before.
        live = {parameter_name(name): parameter for name, parameter in trainer.model.named_parameters()}
        self.parameters = {name: live[name] for name in self.parameters}
        if self.resumed is not None and self.resumed.tensors:
            restore(self.resumed, trainer, self.parameters)
        self._engine = distributed.make_engine(trainer, self.parameters)
        self._engine.install(self._on_gradients, self._after_step)
        self.method.train_begin(self)
        checkpoint = trainer.args.resume_from_checkpoint
        if checkpoint:
            folder = Path(checkpoint) / STATE_DIR
            if (folder / f"{self.method.name}.json").is_file():
                self.method.restore_checkpoint(self, load_method_state(folder, self.method.name))
            elif overrides(self.method, "checkpoint_state") and self._expects_checkpoint_state():
                raise UserError(f"{folder}: the checkpoint has no state of method '{self.method.name}'")

    def _on_gradients(self, grads: distributed.GradientView) -> None:
        for watcher in self.watchers:
            watcher.before_method(self, grads)
        self.method.gradients(self, grads)
        for watcher in self.watchers:
            watcher.gradients(self, grads)

    def _after_step(self) -> None:
        self.method.after_step(self)
        for watcher in self.watchers:
            watcher.after_step(self)

    def _expects_checkpoint_state(self) -> bool:
        return self.method.checkpoint_state(self) is not None

    def window(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Before the micro-batches of an optimizer step."""
        self.method.window(self, batches)

    def forward(self, inputs: Mapping[str, Any], channels: Sequence[str | None] | None) -> AbstractContextManager[None]:
        """Around the forward of a micro-batch."""
        self.channels = channels
        return self.method.forward(self, inputs)

    def loss(
        self,
        inputs: Mapping[str, Any],
        loss: Tensor,
        outputs: Any,
        num_items: Tensor | int | None,
        channels: Sequence[str | None] | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """The Trainer's loss plus the method's term, or the term alone where the method replaces the loss."""
        self._num_items, self.channels, self.token_weights = num_items, channels, token_weights
        if self.method.needs_logits and getattr(outputs, "logits", None) is None:
            raise UserError(f"method '{self.method.name}' needs the model's logits, but the loss was fused away")
        term = self.method.loss(self, self.model, inputs, loss, outputs)
        if self.method.replaces_loss:
            assert term is not None
            return term
        return loss if term is None else loss + term

    def after_backward(self) -> None:
        """After each micro-batch's backward."""
        if self._engine is not None:
            self._engine.after_backward()

    def step_ended(self) -> None:
        """After each optimizer step."""
        if self._engine is not None:
            self._engine.step_ended()

    def save_checkpoint_state(self, checkpoint: Path) -> None:
        """Store what a resumed run needs, before the Trainer marks the checkpoint complete."""
        state = self.method.checkpoint_state(self)
        if state is not None and self.rank == 0:
            save_method_state(checkpoint / STATE_DIR, self.method.name, state)

    def end_task(self, base_model: str) -> None:
        """Compute and write the state for the next task."""
        state = self.method.end_task(self)
        if state is not None and self.rank == 0:
            config = self.output_dir / "adapter" / "adapter_config.json"
            state.meta = {
                "tasks": [task.task for task in self.earlier] + [self.task],
                "base_model": base_model,
                "adapter_config_sha256": sha256_file(config) if config.is_file() else None,
                "versions": {name: importlib.metadata.version(name) for name in ("ms-swift", "peft", "torch")},
                "settings": vars(self.method.config),
                **state.meta,
            }
            save_method_state(self.output_dir / STATE_DIR, self.method.name, state)
        distributed.barrier()

    def route_record(self) -> dict[str, Any] | None:
        """What stage.json says about choosing an adapter at inference (rank 0, after `end_task`); see `Stage.route`."""
        method = self.method
        if not (method.routes() or method.needs_task_id()):
            return None
        systems = {task.task: load_stage(task.dir).system for task in self.earlier} | {self.task: self.system}
        candidates = [
            {
                "name": candidate.name,
                "tasks": list(candidate.tasks),
                "dir": os.path.relpath(candidate.dir, self.output_dir),
                "sha256": sha256_file(candidate.dir / WEIGHTS),
                "system": systems[candidate.tasks[-1]],
            }
            for candidate in method.candidates(self)
        ]
        state = self.output_dir / STATE_DIR / f"{method.name}.json"
        return {
            "task_id_given": method.needs_task_id(),
            "settings": vars(method.config),
            "state_sha256": sha256_file(state) if state.is_file() else None,
            "candidates": candidates,
        }

    def frozen_adapter(self) -> dict[str, Tensor]:
        """What of the adapter is not trained, by live names; every rank must call it.

        Of a model in parts (ZeRO-3) transformers and ms-swift save only what is trained; nothing where all is whole.
        """
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        own = {name: p for name, p in frozen.items() if TRAINED in name.split(".")}
        return distributed.whole_under_zero3(own)

    def exported_state(self, trainer: Any) -> dict[str, Tensor]:
        """Full live state with the method's exported weights in place; every rank must call it."""
        frozen = self.frozen_adapter()
        state = distributed.full_state_dict(trainer)
        if self.rank == 0:
            state = {**frozen, **state}
            own = {name: state[live] for name, live in self._live_names.items() if live in state}
            missing = self._live_names.keys() - own.keys()
            if missing:
                raise RunFailure(f"trained tensors are missing from the model's state: {sorted(missing)[:5]}")
            exported = self.method.export(self, own)
            for name, live in self._live_names.items():
                if name in exported:
                    state[live] = exported[name].detach().to("cpu")
                else:
                    del state[live]
        return state


def overrides(method: Method, hook: str) -> bool:
    """Whether a method defines a hook itself; hooks left alone cost nothing."""
    return getattr(type(method), hook) is not getattr(Method, hook)

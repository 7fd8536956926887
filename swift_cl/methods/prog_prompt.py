"""prog_prompt: Progressive Prompts, a new prompt for every task in front of the frozen ones of the earlier tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.methods._draws import seed32
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, setting
from swift_cl.tuners.soft_prompt import PromptShape, PromptStart

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 200


@dataclass
class ProgPromptConfig(PromptStart, PromptShape, MethodConfig):
    """Flags of `prog_prompt`."""

    max_total: int = setting(
        2048, "Embeddings of all tasks together at most, >= 1; a stage that would have more is refused."
    )

    def validate(self) -> None:
        self.check_shape("prog_prompt", LONGEST)
        self.check_start("prog_prompt")
        if self.max_total < self.length:
            self.fail("prog_prompt", "max_total", f"a whole number >= --prog_prompt_length ({self.length})")


class ProgPrompt(Method):
    """The model reads (P'_t, P'_{t-1}, ..., P'_1, x) with P' = P + f(P); only P_t and its f are trained."""

    name: ClassVar[str] = "prog_prompt"
    title: ClassVar[str] = "Progressive Prompts"
    summary: ClassVar[str] = (
        "a new soft prompt for every task in front of the frozen ones of the earlier tasks; the question's "
        "task is given"
    )
    cost: ClassVar[str] = "prompt positions"
    paper: ClassVar[str] = "https://arxiv.org/abs/2301.12314"
    config_class: ClassVar[type[MethodConfig]] = ProgPromptConfig
    support: ClassVar[Support] = Support(
        tuners=("soft_prompt",), full_deepspeed=(), packing=False, sequence_parallel=False, streaming=True
    )
    config: ProgPromptConfig

    def required_flags(self) -> Mapping[str, str]:
        own = {name: getattr(self.config, name) for name in ("length", "mlp", "bottleneck", "layer_norm", "init")}
        flags = {f"soft_prompt_{name}": str(value).lower() for name, value in own.items()}
        if self.config.init_text:
            flags["soft_prompt_init_text"] = self.config.init_text
        return {"tuner_type": "soft_prompt", **flags}

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        """From the second task on: the prompt that was loaded is an earlier one now, and a new one begins."""
        from swift_cl.tuners.soft_prompt.stacking import config_of, put_in_front
        from swift_cl.tuners.soft_prompt.start import start_at

        known, config = config_of(model), self.config
        before = [stage.task for stage in ctx.earlier]
        if known.tasks == [*before, ctx.task]:
            return model  # resumed: the checkpoint holds this task's prompt
        if known.tasks != before or known.baked != bool(before):
            raise UserError(
                f"the adapter that is continued has the prompts of {', '.join(known.tasks) or 'no task'}, but the "
                f"stages before are {', '.join(before) or 'none'}; method 'prog_prompt' continues its own stages only"
            )
        total = config.length * (len(before) + 1)
        if total > config.max_total:
            raise UserError(
                f"--prog_prompt_max_total is {config.max_total}, but {len(before) + 1} tasks of "
                f"--prog_prompt_length {config.length} have {total} embeddings"
            )
        if before:
            seed = seed32(self.name, ctx.seed, ctx.task)
            put_in_front(model, seed)
            start_at(model, config.init, config.init_text, seed)
        known.tasks = [*before, ctx.task]
        return model

    def checkpoint_state(self, ctx: TaskContext) -> MethodState:
        return MethodState(meta={"earlier_sha256": self._frozen(ctx)})

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        """The frozen prompts are those of the checkpoint, and those of the stage before."""
        from swift_cl.tuners.soft_prompt.stacking import rows_sha256, stored_rows

        before = rows_sha256(stored_rows(ctx.earlier[-1].weights_dir)) if ctx.earlier else None
        for what, had in (("the checkpoint", state.meta["earlier_sha256"]), ("the stage before", before)):
            if had != self._frozen(ctx):
                raise UserError(f"the prompts of earlier tasks are not those of {what}: sha256 {had}")

    def _frozen(self, ctx: TaskContext) -> str | None:
        from swift_cl.tuners.soft_prompt.model import prompt_of
        from swift_cl.tuners.soft_prompt.stacking import rows_sha256

        exact = prompt_of(ctx.model).exact
        return None if exact is None else rows_sha256(exact)

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """P'_t; the MLP is not kept."""
        from swift_cl.tuners.soft_prompt.stacking import computed, config_of

        return computed(config_of(ctx.model), tensors)

    def export_config(self, ctx: TaskContext, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "baked": True}

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """Whose prompts are kept, in the order of learning, each with its hash."""
        if ctx.rank > 0:
            return None
        from swift_cl.tuners.soft_prompt.stacking import rows_sha256, stored_rows

        rows, length = stored_rows(ctx.this_stage.weights_dir), self.config.length
        tasks = [*(stage.task for stage in ctx.earlier), ctx.task]
        begins = range(len(rows) - length, -1, -length)  # the newest task's rows come first
        prompts = {task: rows_sha256(rows[i : i + length]) for task, i in zip(tasks, begins, strict=True)}
        return MethodState(meta={"order": tasks, "prompts": prompts})

    def needs_task_id(self) -> bool:
        return True

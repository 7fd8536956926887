"""l2kd: Lifelong Language Knowledge Distillation, each new task learnt from a teacher that learnt it alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.generation.engine import Prompt, Sampling
from swift_cl.generation.files import read_round, round_file, write_round
from swift_cl.generation.protocol import in_batches
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._lamol import LamolFamily, LamolFamilyConfig
from swift_cl.methods.base import Phase, Support, TaskContext, TrainingRow, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from swift_cl.methods._frozen_teacher import FrozenTeacher
    from swift_cl.methods._grouped_loss import Groups
else:
    torch = LazyModule("torch")

TEACHER = "l2kd_teacher"
PARTS = ("new/qa", "new/lm", "pseudo/qa", "pseudo/lm")
IS_NEW = [name.startswith("new") for name in PARTS]


@dataclass
class L2kdConfig(LamolFamilyConfig):
    """Flags of `l2kd`."""

    variant: str = setting(
        "word",
        "'word' distils the teacher's distributions on new rows; 'seq' trains on the teacher's answers in place of the "
        "given ones; 'seq_soft' distils on rows with the teacher's answers.",
        choices=("word", "seq", "seq_soft"),
    )
    kd_temperature: float = setting(2.0, "Temperature T of both distributions, > 0; the term is multiplied by T^2.")
    norm: str = setting(
        "token",
        "'token' takes the mean over the tokens of new and generated rows together; 'group' adds their two means.",
        choices=("token", "group"),
    )
    first_task: str = setting(
        "distill", "'distill' has a teacher for the first task too; 'plain' learns it as lamol.", ("distill", "plain")
    )
    teacher_epochs: float = setting(0.0, "Epochs of the teacher, > 0; 0 for those of the stage.")
    num_beams: int = setting(
        1, "Hypotheses of a beam search for the teacher's answers, >= 1; 1 is greedy. Variants seq and seq_soft only."
    )
    keep_teacher: bool = setting(False, "Keep the teacher's adapter after the stage.")

    def validate(self) -> None:
        self.check("l2kd")
        if not 0 < self.kd_temperature < math.inf:
            self.fail("l2kd", "kd_temperature", "a number > 0")
        if not 0 <= self.teacher_epochs < math.inf:
            self.fail("l2kd", "teacher_epochs", "a number > 0, or 0 for the stage's own")
        if self.num_beams < 1:
            self.fail("l2kd", "num_beams", "1 or more")
        if self.num_beams > 1 and self.variant == "word":
            self.fail("l2kd", "num_beams", "1, because with --l2kd_variant word the teacher writes no answers")
        if self.num_beams > 1 and self.gen_backend != "transformers":
            self.fail("l2kd", "num_beams", f"1 with --l2kd_gen_backend {self.gen_backend}, which has no beam search")


class L2kd(LamolFamily):
    """L = L_QA + lambda L_LM; each is KD from a fresh teacher on new rows and cross-entropy on generated ones."""

    name: ClassVar[str] = "l2kd"
    title: ClassVar[str] = "Lifelong Language Knowledge Distillation"
    summary: ClassVar[str] = "`lamol`, new rows learnt from a teacher that learnt the task alone"
    cost: ClassVar[str] = "as `lamol`, 1 forward; two trainings"
    paper: ClassVar[str] = "https://arxiv.org/abs/2010.02123"
    config_class: ClassVar[type[LamolFamilyConfig]] = L2kdConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), sequence_parallel=False, liger=False)
    config: L2kdConfig

    def __init__(self, config: L2kdConfig) -> None:
        super().__init__(config)
        self._parts: Groups | None = None
        self._pooled: Groups | None = None
        self._teacher: FrozenTeacher | None = None
        self._asked: list[bool] = []  # whether any rank has new rows, by micro-batch of the step

    def phases(self, first_task: bool) -> Sequence[Phase]:
        """The teacher learns this task alone, from a fresh adapter, with the objective of a first LAMOL task."""
        config = self.config
        if first_task and config.first_task == "plain":
            return (Phase(""),)
        flags = {"cl_method": "lamol", "lamol_lambda": str(config.lambda_), "lamol_token": config.token}
        if config.teacher_epochs:
            flags["num_train_epochs"] = str(config.teacher_epochs)
        return (Phase("teacher", flags), Phase(""))

    def keeps_phases(self) -> bool:
        return self.config.keep_teacher

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        if self.config.variant != "word" and "teacher" in ctx.phases:
            rows = self._answered(ctx, rows)
        return super().prepare_task(ctx, rows)

    def _answered(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Rows with the teacher's likeliest answers; where one is cut off or empty, the given answer stays."""
        lengths = sorted(sum(label != -100 for label in row["labels"]) for row in ctx.encode(rows) if row)
        longest = math.ceil(1.5 * lengths[math.ceil(0.95 * len(lengths)) - 1]) if lengths else 1
        prompts = [Prompt(tuple(row["messages"][:-1])) for row in rows]
        sampling = Sampling(0.0, min(longest, self.config.max_new_tokens), beams=self.config.num_beams)
        with ctx.engine(ctx.phases["teacher"], self.config.gen_backend) as engine:
            asked = [prompt.sha256 for prompt in prompts]
            depends_on = {"generator": dict(engine.identity), "sampling": sampling.to_json(), "prompts": asked}
            path = round_file(ctx.generated_dir / "distil", 0, depends_on)
            answers = read_round(path, len(rows))
            if answers is None:
                answers = in_batches(engine, prompts, sampling, [0] * len(prompts), self.config.gen_batch_size)
                write_round(path, answers, [{"task": ctx.task, "slot": i, "seed": 0} for i in range(len(rows))])
            special = engine.special_tokens
        found = []
        for row, answer in zip(rows, answers, strict=True):
            usable = answer.finish_reason == "stop" and answer.text.strip()
            if usable and not any(token in answer.text for token in special):
                row = {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer.text}]}
            found.append(row)
        given = sum(old is new for old, new in zip(rows, found, strict=True))
        if given:
            ctx.notice(f"{given} of {len(rows)} rows keep their given answer: the teacher's is cut off or empty")
        return found

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        if "teacher" in ctx.phases and self.config.variant != "seq":
            from swift_cl.methods._frozen_teacher import FrozenTeacher

            self._teacher = FrozenTeacher(model, ctx.phases["teacher"], TEACHER)
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        from swift_cl.methods._grouped_loss import Groups

        weights = {"qa": 1.0, "lm": self.config.lambda_}
        self._parts = Groups({name: name for name in PARTS}, {name: weights[name[-2:]] for name in PARTS})
        self._pooled = Groups({name: name[-2:] for name in PARTS}, weights)

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        from swift_cl.methods._frozen_teacher import asked_in, is_generated

        assert self._parts is not None
        assert self._pooled is not None
        self._parts.window(ctx, batches)
        self._pooled.window(ctx, batches)
        self._asked = asked_in(ctx, batches, lambda channel: not is_generated(channel))

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        from swift_cl.methods._grouped_loss import answer_logits, token_losses

        assert self._parts is not None
        logits = answer_logits(self.name, inputs, outputs)
        mask, groups = self._parts.index(inputs, ctx.channels)
        sums = self._parts.sums(token_losses(logits, inputs["labels"], mask), groups)
        asked = self._asked.pop(0)
        if self._teacher is not None:
            sums = torch.where(torch.tensor(IS_NEW, device=sums.device), torch.zeros_like(sums), sums)
            if asked:
                sums = sums + self._teacher.distil(
                    ctx, inputs, logits, mask, groups, IS_NEW, self.config.kd_temperature
                )
        return self.total(ctx, sums)

    def total(self, ctx: TaskContext, sums: "Tensor") -> "Tensor":
        """The loss from the sums of the four parts (new/qa, new/lm, pseudo/qa, pseudo/lm)."""
        assert self._parts is not None
        assert self._pooled is not None
        if self.config.norm == "group":
            return self._parts.total(ctx, sums, self.name)
        return self._pooled.total(ctx, sums[:2] + sums[2:], self.name)

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        return self._teacher.checkpoint_state() if self._teacher else None

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        from swift_cl.methods._frozen_teacher import check_same_teacher

        check_same_teacher(self._teacher, state)

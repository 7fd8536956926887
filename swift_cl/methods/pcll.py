"""pcll: rows of earlier tasks are generated through a variational code that a prompt in words conditions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.distributed import write_trained
from swift_cl.errors import UserError
from swift_cl.generation.engine import Engine, Prompt
from swift_cl.generation.screen import Rejected, Turns
from swift_cl.io import MethodState, sha256_json
from swift_cl.lazy import LazyModule
from swift_cl.methods._draws import seed32
from swift_cl.methods._gen_rows import MARKS, TaskMeta
from swift_cl.methods._generating import GenerationConfig
from swift_cl.methods._instructions import MUCH_CJK, cjk_share
from swift_cl.methods._lamol import GeneratedRehearsal, shares_of
from swift_cl.methods._questions_first import QuestionsFirst
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import MethodConfig, Support, TaskContext, TrainingRow, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from swift_cl.methods._code_loss import CodeLoss, Drawn
    from swift_cl.methods._frozen_teacher import FrozenTeacher
    from swift_cl.methods._latent import Heads
else:
    torch = LazyModule("torch")

TEACHER = "pcll_teacher"
MODULE = "cl_pcll"
"""Where the heads live in the base model while it is trained."""
SHORTEST = 3
"""Words of a generated question, at least."""


@dataclass
class PcllConfig(GenerationConfig):
    """Flags of `pcll`."""

    gamma: float = setting(0.2, "Generated rows per row of the current task, in (0, 1], shared by the earlier tasks.")
    z_dim: int = setting(128, "Size of the code z, >= 1.")
    alpha_z: float = setting(0.1, "Factor of what the code adds to embeddings, >= 0; 0 is no code.")
    kl_weight: float = setting(0.01, "Weight of the divergence of posterior and prior, >= 0.")
    beta_cycles: int = setting(4, "Times that this weight rises from 0 in the course of a task, >= 1.")
    beta_ratio: float = setting(0.9, "Part of a cycle in which it rises, in (0, 1].")
    gen_weight: float = setting(0.5, "Weight of all tokens of a question row beside its answer's, >= 0.")
    lm_weight: float = setting(0.5, "Weight of question rows beside the rows that teach to generate, >= 0.")
    kd_alpha: float = setting(
        0.5,
        "Share of the previous model's distributions in the loss of generated rows, the rest their tokens; in [0, 1].",
    )
    kd_temperature: float = setting(1.0, "Temperature T of both distributions, > 0; the term is multiplied by T^2.")
    encoder: str = setting(
        "frozen",
        "What encodes prompt and question: the base model, or with the adapter ('shared').",
        ("frozen", "shared"),
    )
    z_scope: str = setting("all", "Which embeddings the code is added to: all, or the prompt's.", ("all", "prompt"))
    prompt_template: str = setting(
        'Write one input of the task "{task}".', "What asks for a question of a task; {task} is the task's name."
    )
    gen_temperature: float = setting(0.95, "Sampling temperature of generated questions, > 0.")
    top_k: int = setting(100, "Sample among the k most likely tokens, >= 0; 0 is all.")
    top_p: float = setting(0.95, "Sample among the most likely tokens of this total probability, in (0, 1].")

    def validate(self) -> None:
        self.check("pcll")
        for name in ("gamma", "beta_ratio"):
            if not 0 < getattr(self, name) <= 1:
                self.fail("pcll", name, "a number in (0, 1]")
        for name in ("z_dim", "beta_cycles"):
            if getattr(self, name) < 1:
                self.fail("pcll", name, "a whole number >= 1")
        for name in ("alpha_z", "kl_weight", "gen_weight", "lm_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                self.fail("pcll", name, "a number >= 0")
        if not 0 <= self.kd_alpha <= 1:
            self.fail("pcll", "kd_alpha", "a number in [0, 1]")
        if not 0 < self.kd_temperature < math.inf:
            self.fail("pcll", "kd_temperature", "a number > 0")
        if "{task}" not in self.prompt_template:
            self.fail("pcll", "prompt_template", "a text that holds {task}")
        if self.gen_backend != "transformers":
            self.fail("pcll", "gen_backend", "transformers, because vLLM takes nothing that is added to embeddings")


@dataclass(frozen=True)
class Source:
    """What generates: the heads and priors of the stage before."""

    means: "dict[str, Tensor]"
    logvars: "dict[str, Tensor]"
    to_embedding: "Tensor"
    key: tuple[str | int, ...]


class Pcll(GeneratedRehearsal):
    """L = CE_rec + w beta KL(q || p) + w_lm (CE_QA + w_gen CE_all), for own rows and, softened, for generated ones."""

    name: ClassVar[str] = "pcll"
    title: ClassVar[str] = "PCLL: prompt conditioned VAE for lifelong learning"
    summary: ClassVar[str] = (
        "rows of earlier tasks through a variational code that a prompt in words conditions, softened by the "
        "previous model"
    )
    cost: ClassVar[str] = "as `lamol`, 1 forward for the code, 1 on generated rows"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.07783"
    config_class: ClassVar[type[MethodConfig]] = PcllConfig
    support: ClassVar[Support] = Support(
        tuners=("lora",), full_deepspeed=(), packing=False, sequence_parallel=False, liger=False
    )
    taught: ClassVar[str] = "rec"
    config: PcllConfig

    def __init__(self, config: PcllConfig) -> None:
        super().__init__(config)
        self._source: Source | None = None
        self._heads: Heads | None = None
        self._teacher: FrozenTeacher | None = None
        self._losses: CodeLoss | None = None
        self._drawn: Drawn | None = None

    def required_flags(self) -> Mapping[str, str]:
        return {"use_logits_to_keep": "false"}

    # --- rows --------------------------------------------------------------------------------------------------------

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        if len({row["messages"][0]["content"] for row in rows}) > 1:
            raise UserError(
                f"method 'pcll' gives generated rows their task's system prompt, but those of task '{ctx.task}' have "
                "several"
            )
        if ctx.earlier:
            tensors = ctx.previous_state().tensors
            self._source = Source(
                unpack(tensors, "prior_mean"),
                unpack(tensors, "prior_logvar"),
                tensors["heads/to_embedding.weight"],
                (self.name, self.config.seed(ctx), ctx.task),
            )
        return super().prepare_task(ctx, rows)

    def _wanted(self, metas: Sequence[TaskMeta], current: int) -> Mapping[str, int]:
        return shares_of(self.config.gamma, metas, current)

    def _request(self, task: str) -> str:
        """The prompt of a task in words."""
        return self.config.prompt_template.replace("{task}", task)

    def _teaching(self, meta: TaskMeta, row: TrainingRow) -> TrainingRow | None:
        """The row's first question, asked for by the task's prompt; None where it holds marks."""
        question = next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "")
        if not question.strip() or any(mark in question for mark in MARKS):
            return None
        asked = Prompt.chat("", self._request(meta.task)).messages
        return {"messages": [*map(dict, asked), {"role": "assistant", "content": question}]}

    def _prompt(self, meta: TaskMeta, number: int) -> Prompt:
        """With a code from the task's prior, another one for every candidate."""
        from swift_cl.methods._latent import noise

        source = self._source
        assert source is not None
        mean, logvar = source.means[meta.task], source.logvars[meta.task]
        drawn = noise([seed32(*source.key, meta.task, number)], len(mean))[0]
        added = self.config.alpha_z * (source.to_embedding @ (mean + torch.exp(0.5 * logvar) * drawn))
        asked = Prompt.chat("", self._request(meta.task))
        return Prompt(asked.messages, None, tuple(added.tolist()), self.config.z_scope == "all")

    def _speaking(self, engine: Engine) -> Engine:
        return QuestionsFirst(engine, {self._request(meta.task): meta.system or "" for meta in self._tasks})

    def _read(self, meta: TaskMeta, text: str) -> Turns:
        turns = super()._read(meta, text)
        question = turns[0]["content"].strip()
        # Where words have no borders, characters are counted.
        words = list(question) if cjk_share(question) > MUCH_CJK else question.split()
        if question and len(words) < SHORTEST:
            raise Rejected("short_x")
        return turns

    # --- the heads ---------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        """Add the heads, those of the stage before where there is one; the adapter of that stage is the teacher."""
        from swift_cl.methods._latent import Heads

        base = model.get_base_model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed32(self.name, ctx.seed, "heads"))
            heads = Heads(base.config.get_text_config().hidden_size, self.config.z_dim)
        if ctx.earlier:
            stored = unpack(ctx.previous_state().tensors, "heads")
            check_shapes(self.name, shapes_of(stored), shapes_of(dict(heads.named_parameters())))
            heads.load_state_dict(stored)
            from swift_cl.methods._frozen_teacher import FrozenTeacher

            self._teacher = FrozenTeacher(model, ctx.earlier[-1].weights_dir, TEACHER)
        self._heads = heads.to(next(base.parameters()).device)
        setattr(base, MODULE, self._heads)
        return model

    def checkpoint_state(self, ctx: TaskContext) -> MethodState:
        teacher = self._teacher.sha256 if self._teacher else None
        return MethodState(pack(heads=self._stored_heads(ctx)), {"teacher_sha256": teacher})

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        from swift_cl.methods._frozen_teacher import check_same_teacher

        check_same_teacher(self._teacher, state)
        assert self._heads is not None
        for name, tensor in unpack(state.tensors, "heads").items():
            write_trained(self._heads.get_parameter(name), tensor)

    def _stored_heads(self, ctx: TaskContext) -> "dict[str, Tensor]":
        """The heads, fp32; every rank must call it."""
        assert self._heads is not None
        names, weights = {parameter: name for name, parameter in ctx.parameters.items()}, ctx.weights()
        return {name: weights[names[own]].to("cpu", copy=True) for name, own in self._heads.named_parameters()}

    # --- loss --------------------------------------------------------------------------------------------------------

    def train_begin(self, ctx: TaskContext) -> None:
        from swift_cl.methods._code_loss import CodeLoss

        self._losses = CodeLoss(self.config)

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        assert self._losses is not None
        self._losses.window(ctx, batches)

    @contextmanager
    def forward(self, ctx: TaskContext, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Draw a code for the rows that teach to generate, and add it to their embeddings."""
        from swift_cl.methods._code_loss import Drawn

        assert self._heads is not None
        config = self.config

        def seed_of(tokens: list[int]) -> int:
            return seed32(self.name, ctx.seed, ctx.task, ctx.step, sha256_json(tokens))

        self._drawn = Drawn.of(
            ctx, inputs, self._heads, seed_of, config.alpha_z, config.encoder == "frozen", config.z_scope == "all"
        )
        with self._drawn.added(ctx.model):
            yield

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        from swift_cl.methods._grouped_loss import answer_logits

        assert self._losses is not None
        assert self._drawn is not None
        logits = answer_logits(self.name, inputs, outputs)
        return self._losses.of(ctx, inputs, logits, self._drawn, self._teacher)

    # --- the end of a task -------------------------------------------------------------------------------------------

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """The heads, and every task's prior under them: what the next stage generates with."""
        from swift_cl.methods._latent import Heads, last_states

        tasks = [line["task"] for line in ctx.previous_state().rows["tasks"]] if ctx.earlier else []
        # A copy of the heads that is whole: the live ones may be spread over the ranks, which all take part.
        stored = self._stored_heads(ctx)
        heads = Heads(stored["pooling"].numel(), self.config.z_dim)
        heads.load_state_dict(stored)
        heads.to(ctx.device)
        means, logvars = {}, {}
        for task in [*tasks, ctx.task]:
            asked = [dict(message) for message in Prompt.chat("", self._request(task)).messages]
            ids = torch.tensor(ctx.encode_prompts([asked]), device=ctx.device)
            states = last_states(ctx, {"input_ids": ids}, self.config.encoder == "frozen")
            with torch.no_grad():
                mean, logvar = heads.prior(states, torch.ones_like(ids))
            means[task], logvars[task] = mean[0].cpu(), logvar[0].cpu()
        state = super().end_task(ctx)
        if state is not None:
            state.tensors = pack(heads=stored, prior_mean=means, prior_logvar=logvars)
        delattr(ctx.model.get_base_model(), MODULE)  # the next stage of a chain may use the same base model
        return state

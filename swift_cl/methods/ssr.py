"""ssr: Self-Synthesized Rehearsal, rows of earlier tasks made by the base model and answered by the latest one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from swift_cl.errors import RunFailure
from swift_cl.generation.engine import Answer, Engine, Prompt, Sampling
from swift_cl.generation.files import read_round, round_file, write_round
from swift_cl.generation.protocol import Pseudo, exactly, in_batches
from swift_cl.io import MethodState, read_json, sha256_json, write_json
from swift_cl.methods._draws import permutation, seed32
from swift_cl.methods._generating import GenerationConfig, refuse_media
from swift_cl.methods._row_store import exact, round_half_up
from swift_cl.methods._selected import choose
from swift_cl.methods._selection import kmeans_clusters, normalised
from swift_cl.methods._synthesis import STOP, Demo, TaskFacts, read_demos
from swift_cl.methods.base import EarlierTask, Method, TaskContext, TrainingRow, setting
from swift_cl.sentence_encoder import LONG_WORK

BY_MODEL = "model"
WAY_OUT = "give a folder or an installed encoder, or --ssr_embedder model (mean hidden states of the base model)"
REFINED = "refined"
TASK = "{task}"


@dataclass
class SsrConfig(GenerationConfig):
    """Flags of `ssr`."""

    ratio: float = setting(0.1, "Synthesised rows of a task per row that it had, in (0, 1].")
    num_samples: int = setting(0, "Synthesised rows of every task in place of the ratio, >= 1; 0 uses the ratio.")
    demo_ratio: float = setting(
        0.01, "Share of a task's rows that are shown in prompts, in (0, 1]; at least ssr_shots."
    )
    demo_file: str = setting(
        "",
        'Demonstrations in place of rows of the task: a JSON list, or JSON lines, of {"input", "output"}; {task} in '
        "the path is the task's name.",
    )
    shots: int = setting(2, "Real rows shown in a prompt, >= 1.")
    oversample: float = setting(3.0, "Candidates per row that is kept in the first round, >= 1.")
    select: str = setting(
        "kmeans",
        "Which synthesised rows are kept: 'kmeans' covers the clusters of their embeddings, 'random', or 'first'.",
        choices=("kmeans", "random", "first"),
    )
    clusters: int = setting(20, "Clusters of kmeans, >= 1.")
    embedder: str = setting(
        "princeton-nlp/sup-simcse-roberta-base",
        "Sentence encoder of kmeans (folder, installed package or hub id), or 'model' for the base model's states.",
    )
    refine: bool = setting(True, "Let the latest model answer the synthesised questions anew.")
    gen_temperature: float = setting(0.9, "Sampling temperature of generated rows, > 0.")
    top_p: float = setting(0.6, "Sample among the most likely tokens of this total probability, in (0, 1].")
    repetition_penalty: float = setting(1.2, "Penalty of tokens that were there already, >= 1; 1 is none.")

    def validate(self) -> None:
        self.check("ssr")
        for name in ("ratio", "demo_ratio"):
            if not 0 < getattr(self, name) <= 1:
                self.fail("ssr", name, "a number in (0, 1]")
        if self.num_samples < 0:
            self.fail("ssr", "num_samples", "1 or more, or 0 for the ratio")
        if self.demo_file and self.demo_ratio != SsrConfig.demo_ratio:
            self.fail("ssr", "demo_ratio", f"{SsrConfig.demo_ratio}, because --ssr_demo_file gives the demonstrations")
        if self.demo_file and TASK not in self.demo_file and not Path(self.demo_file).is_file():
            self.fail("ssr", "demo_file", f"a file that is there, or a path with {TASK} in it")
        for name in ("shots", "clusters"):
            if getattr(self, name) < 1:
                self.fail("ssr", name, "1 or more")
        if not 1 <= self.oversample < math.inf:
            self.fail("ssr", "oversample", "a number >= 1")
        if self.select != "kmeans":
            for name in ("clusters", "embedder"):
                if getattr(self, name) != getattr(SsrConfig, name):
                    self.fail("ssr", name, f"{getattr(SsrConfig, name)!r}, because only --ssr_select kmeans uses it")


class Ssr(Method):
    """theta_t trains on D_t and, for every earlier task j, N_j rows (x, theta_j(x)) with x in-context from theta_0."""

    name: ClassVar[str] = "ssr"
    title: ClassVar[str] = "Self-Synthesized Rehearsal"
    summary: ClassVar[str] = (
        "the base model makes up rows of earlier tasks in context, the latest model answers them, a diverse "
        "part is rehearsed"
    )
    cost: ClassVar[str] = "none (more rows, generation before training)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.01244"
    config_class: ClassVar[type[GenerationConfig]] = SsrConfig
    needs_rows: ClassVar[bool] = True
    config: SsrConfig

    def __init__(self, config: SsrConfig) -> None:
        super().__init__(config)
        self._facts: list[TaskFacts] = []
        self._rehearsal: list[dict[str, Any]] = []

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Add the rows of all earlier tasks; those of the latest are synthesised now, with its weights."""
        config = self.config
        refuse_media(self.name, ctx.task, rows)
        # Said now, not after hours of training: a task too small for its prompts, an encoder that is not there.
        demos = self._own_demos(ctx, rows)
        own = TaskFacts.of(ctx.task, rows, self.name, config.demo_ratio, config.shots, config.seed(ctx), given=demos)
        if not ctx.earlier:
            if config.select == "kmeans" and config.embedder != BY_MODEL:
                self._encoder()
            self._facts = [own]
            return rows
        state = ctx.previous_state()
        facts = [TaskFacts.from_json(line) for line in state.rows["tasks"]]
        self._facts = [*facts, own]
        self._rehearsal = state.rows.get("rehearsal", []) + self._synthesise(ctx, facts[-1], ctx.earlier[-1])
        by_task = {task.task: sum(line["task"] == task.task for line in self._rehearsal) for task in ctx.earlier}
        ctx.record("manifest", {"schema_version": 1, "task": ctx.task, "own_rows": len(rows), "rehearsed": by_task})
        return rows + [line["row"] for line in self._rehearsal]

    def _own_demos(self, ctx: TaskContext, rows: Sequence[TrainingRow]) -> list[Demo] | None:
        """The user's demonstrations; where one has no system prompt, its rows get that of the task's first row."""
        if not self.config.demo_file:
            return None
        path = Path(self.config.demo_file.replace(TASK, ctx.task))
        return read_demos("--ssr_demo_file", path, self.config.shots, rows[0]["messages"][0]["content"])

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """The demos of this task, and the rehearsed rows, which are never made again."""
        if ctx.rank != 0:
            return None
        return MethodState(rows={"tasks": [facts.to_json() for facts in self._facts], "rehearsal": self._rehearsal})

    def wanted(self, rows: int) -> int:
        """N_j of a task of that many rows."""
        return self.config.num_samples or round_half_up(exact(self.config.ratio) * rows)

    def _synthesise(self, ctx: TaskContext, facts: TaskFacts, earlier: EarlierTask) -> list[dict[str, Any]]:
        config, folder = self.config, ctx.generated_dir / facts.task
        wanted = self.wanted(facts.rows)
        with ctx.engine(None, config.gen_backend) as engine:
            labels = None if config.refine else facts.labels
            order = facts.order(ctx, engine, wanted, config.shots, labels, config.seed(ctx))
            # Where a choice comes after, all that is usable is kept; else the first N.
            chosen_later = config.select != "first" or config.refine
            rules = config.rules(ctx, "ssr", config.oversample, keep_all=chosen_later)
            pool = exactly(engine, [order], config.sampling((STOP,)), rules, folder, ctx.notice)[facts.task]
            clusters = self._clusters(ctx, engine, pool, facts.task)
        if not config.refine:
            chosen = choose(clusters, wanted, lambda batch: [True] * len(batch))
            return self._lines(ctx, facts.task, [pool[i] for i in chosen])
        refined: dict[int, Pseudo] = {}
        with ctx.engine(earlier.weights_dir, config.gen_backend) as engine:

            def refine(batch: list[int]) -> list[bool]:
                answers = self._answers(ctx, engine, [pool[i] for i in batch], facts.task)
                for i, answer in zip(batch, answers, strict=True):
                    row = self._refined(ctx, engine, pool[i], answer)
                    if row is not None:
                        refined[i] = row
                return [i in refined for i in batch]

            chosen = choose(clusters, wanted, refine)
        self._check(ctx, facts.task, len(chosen), wanted)
        return self._lines(ctx, facts.task, [refined[i] for i in chosen])

    def _clusters(self, ctx: TaskContext, engine: Engine, pool: Sequence[Pseudo], task: str) -> list[list[int]]:
        """Candidates in order of preference, cluster by cluster; without clusters, all in one."""
        config, seed = self.config, self.config.seed(ctx)
        if config.select == "first":
            return [list(range(len(pool)))]
        if config.select == "random":
            return [permutation(len(pool), seed, task, "select")]
        texts = [pseudo.row["messages"][1]["content"] for pseudo in pool]
        key = sha256_json([texts, config.embedder, config.clusters, seed, dict(engine.identity)])[:16]
        path = ctx.generated_dir / task / f"clusters-{key}.json"
        if not path.is_file():
            points: Any = normalised(self._embed(engine, texts)) if texts else []
            write_json(path, kmeans_clusters(points, config.clusters, seed32(seed, task)))
        return [[i for i, _ in cluster] for cluster in read_json(path)]

    def _embed(self, engine: Engine, texts: Sequence[str]) -> Any:
        if self.config.embedder == BY_MODEL:
            return engine.embed(texts)
        bar = len(texts) >= LONG_WORK
        return self._encoder().encode(list(texts), convert_to_numpy=True, show_progress_bar=bar)

    def _encoder(self) -> Any:
        from swift_cl.sentence_encoder import load_encoder

        return load_encoder(self.config.embedder, "ssr_embedder", WAY_OUT)

    def _answers(self, ctx: TaskContext, engine: Engine, pool: Sequence[Pseudo], task: str) -> list[Answer]:
        """Greedy answers of the latest model to the questions as they stand in training, kept like a round."""
        sampling = Sampling(0.0, self.config.max_new_tokens)
        prompts = [Prompt(tuple(pseudo.row["messages"][:2])) for pseudo in pool]
        depends_on = {
            "generator": dict(engine.identity),
            "sampling": sampling.to_json(),
            "prompts": [prompt.sha256 for prompt in prompts],
        }
        path = round_file(ctx.generated_dir / task / REFINED, 0, depends_on)
        done = read_round(path, len(pool))
        if done is None:
            done = in_batches(engine, prompts, sampling, [0] * len(prompts), self.config.gen_batch_size)
            write_round(path, done, [{"task": task, "slot": i, "seed": 0} for i in range(len(pool))])
        return done

    def _refined(self, ctx: TaskContext, engine: Engine, pseudo: Pseudo, answer: Answer) -> Pseudo | None:
        """The row with the latest model's answer; None where that is cut off, empty or no plain text."""
        special = any(token in answer.text for token in engine.special_tokens)
        if answer.finish_reason != "stop" or not answer.text.strip() or special:
            return None
        row = {"messages": [*pseudo.row["messages"][:2], {"role": "assistant", "content": answer.text}]}
        if not ctx.encode([row])[0]:
            return None
        return Pseudo(row, {**pseudo.origin, "refined_by": engine.identity["adapter_sha256"]})

    def _check(self, ctx: TaskContext, task: str, found: int, wanted: int) -> None:
        least = exact(self.config.min_fill) * wanted
        if found < wanted and self.config.min_fill > 0 and (found == 0 or found < least):
            raise RunFailure(
                f"ssr: the latest model gave usable answers to only {found} of {wanted} rows of task '{task}'; train "
                "longer, raise --ssr_max_new_tokens, or use --ssr_refine false"
            )
        if found < wanted:
            ctx.notice(f"the latest model gave usable answers to only {found} of {wanted} rows of task '{task}'")

    def _lines(self, ctx: TaskContext, task: str, chosen: Sequence[Pseudo]) -> list[dict[str, Any]]:
        stage = ctx.task_index + 1
        return [
            {
                "task": task,
                "row": pseudo.row,
                "cl": {"id": f"{self.name}/t{stage}/{task}/{i:06d}", "stage": ctx.task, **pseudo.origin},
            }
            for i, pseudo in enumerate(chosen)
        ]

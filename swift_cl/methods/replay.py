"""replay: rows of earlier tasks are mixed into the current one."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState, sha256_json
from swift_cl.methods._draws import Key, permutation, seed32
from swift_cl.methods._embeddings import prompt_embeddings
from swift_cl.methods._row_store import (
    RowStore,
    SeenTask,
    StoredRow,
    exact,
    largest_remainder,
    round_half_up,
    usable_rows,
)
from swift_cl.methods._selection import (
    class_balanced_order,
    class_herding_order,
    class_labels,
    kmeans_order,
    normalised,
    prompt_text,
    tfidf,
)
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, TrainingRow, setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    from swift_cl.lazy import LazyModule

    np = LazyModule("numpy")


@dataclass
class ReplayConfig(MethodConfig):
    """What is stored, and how it is mixed in."""

    strategy: str = setting(
        "random",
        "Which rows of a task are stored.",
        choices=("random", "reservoir", "class_balanced", "kmeans", "herding"),
    )
    budget: str = setting(
        "total",
        "Whether the buffer size is that of the whole store, shared equally by the tasks, or of each task's part.",
        choices=("total", "per_task"),
    )
    buffer_size: int = setting(1000, "Rows in the store (budget total) or of each task (budget per_task), >= 1.")
    ratio: float = setting(
        0.1, "Replayed rows per row of the current task, > 0, above 1 allowed; drawn once per stage, for all epochs."
    )
    mix: str = setting(
        "shuffle",
        "'shuffle' puts ratio x rows among the current ones; 'concat' adds all stored rows once and takes no ratio; "
        "'batch' is 'shuffle' with the same number of replayed rows in every full global batch.",
        choices=("shuffle", "concat", "batch"),
    )
    class_key: str = setting(
        "",
        "Column that holds the class; empty = the answer's text (class_balanced), or the task is one class (herding).",
    )
    clusters: int = setting(20, "Clusters of the kmeans strategy, >= 1.")
    embed: str = setting(
        "model",
        "What kmeans and herding see of a row: the model's last hidden state over the prompt, or TF-IDF of the prompt.",
        choices=("model", "tfidf"),
    )
    seed: int = setting(0, "Seed of what is stored and drawn, >= 0.")

    def validate(self) -> None:
        """Refuse values out of range, and settings that the chosen strategy or mix would not use."""
        if self.buffer_size < 1:
            self.fail("replay", "buffer_size", "1 or more")
        if not (self.ratio > 0 and math.isfinite(self.ratio)):
            self.fail("replay", "ratio", "more than 0")
        if self.clusters < 1:
            self.fail("replay", "clusters", "1 or more")
        if self.seed < 0:
            self.fail("replay", "seed", "0 or more")
        if self.strategy == "reservoir" and self.budget == "per_task":
            self.fail("replay", "budget", "total with --replay_strategy reservoir, which is one stream over all tasks")
        self._only_with("strategy", ("class_balanced", "herding"), "class_key")
        self._only_with("strategy", ("kmeans",), "clusters")
        self._only_with("strategy", ("kmeans", "herding"), "embed")
        self._only_with("mix", ("shuffle", "batch"), "ratio")

    def _only_with(self, switch: str, values: Sequence[str], name: str) -> None:
        default = next(field.default for field in dataclasses.fields(self) if field.name == name)
        if getattr(self, name) != default and getattr(self, switch) not in values:
            self.fail("replay", name, f"{default!r}, because only --replay_{switch} {' and '.join(values)} uses it")

    @property
    def needs_embeddings(self) -> bool:
        """Whether rows are chosen by what they mean."""
        return self.strategy in ("kmeans", "herding")

    @property
    def needs_classes(self) -> bool:
        """Whether rows are chosen class by class."""
        return self.strategy == "class_balanced" or (self.strategy == "herding" and bool(self.class_key))


class Replay(Method):
    """min over theta of the token-mean CE on D_t plus round(ratio |D_t|) rows of D_1..D_{t-1}; no re-weighting."""

    name: ClassVar[str] = "replay"
    title: ClassVar[str] = "Experience replay"
    summary: ClassVar[str] = (
        "mixes stored rows of earlier tasks into the data; random, reservoir, class-balanced, k-means, herding"
    )
    cost: ClassVar[str] = "none (more rows)"
    paper: ClassVar[str] = "https://arxiv.org/abs/1811.11682"
    config_class: ClassVar[type[MethodConfig]] = ReplayConfig
    support: ClassVar[Support] = Support(any_tuner=True, encoder_decoder=True)
    needs_rows: ClassVar[bool] = True
    config: ReplayConfig

    def supports(self) -> Support:
        """Packing moves rows between batches; sequence parallelism splits the rows that are embedded, and what embeds
        them is a decoder that reads the question."""
        own = not (self.config.needs_embeddings and self.config.embed == "model")
        packing = self.config.mix != "batch"
        return dataclasses.replace(self.support, packing=packing, sequence_parallel=own, encoder_decoder=own)

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Mix stored rows into `rows` and record which; the first task's rows stay as they are."""
        if self.config.needs_classes:
            class_labels(rows, self.config.class_key, ctx.task)
        if self.config.mix == "batch":
            self._share_of_batch(ctx)
        store = self._load(ctx)
        if not ctx.earlier:
            return rows
        if not store.rows:
            raise UserError(f"{ctx.earlier[-1].state_dir / self.name}.json: the row store is empty")
        drawn = self._draw(ctx, store, len(rows))
        mixed: list[tuple[TrainingRow, StoredRow | None]] = [(row, None) for row in rows]
        mixed += [(stored.row, stored) for stored in drawn]
        if self.config.mix == "shuffle":
            mixed = [mixed[i] for i in permutation(len(mixed), self.config.seed, ctx.task, "shuffle")]
        result = [row for row, _ in mixed]
        ctx.record("manifest", self._manifest(ctx, store, result, [stored for _, stored in mixed]))
        if not drawn:
            ctx.notice(f"no row is replayed: {len(rows)} rows x ratio {self.config.ratio} is less than one half")
        return result

    def batch_order(self, ctx: TaskContext, n_rows: int, epoch: int) -> list[int] | None:
        """With `--replay_mix batch`: equally many replayed rows in every global batch."""
        if self.config.mix != "batch" or not ctx.earlier:
            return None
        current, share = len(ctx.training_rows()), self._share_of_batch(ctx)
        expected = current + rows_for_batches(current, ctx.global_batch, share)
        if n_rows != expected:
            raise UserError(
                f"--replay_mix batch laid out {expected} rows, but the training data holds {n_rows}: the template "
                "dropped some; raise --max_length, or use --replay_mix shuffle"
            )
        return order_for_batches(current, n_rows - current, ctx.global_batch, share, self.config.seed, ctx.task, epoch)

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """Choose the rows of this task that are kept; the ranks share the work of embedding, rank 0 chooses."""
        config, rows = self.config, ctx.training_rows()
        labels = class_labels(rows, config.class_key, ctx.task) if config.needs_classes else None
        store = self._load(ctx)
        order: Sequence[int] = range(len(rows))
        wanted = len(rows)
        if config.strategy == "random":
            order, wanted = permutation(len(rows), config.seed, ctx.task, "store"), config.buffer_size
        usable, dropped = usable_rows(ctx, rows, order, wanted)
        if not usable:
            raise UserError(f"task '{ctx.task}': no row fits the training template, so there is none to store")
        points = self._embed(ctx, [rows[i] for i in usable]) if config.needs_embeddings else None
        if ctx.rank != 0:
            return None
        seen = SeenTask(ctx.task, len(rows), dropped)
        store.settings = {name: getattr(config, name) for name in ("strategy", "budget", "buffer_size", "seed")}
        if config.strategy == "reservoir":
            arriving = [StoredRow.of(rows[i], ctx.task) for i in usable]
            store.stream(seen, arriving, config.buffer_size, config.seed)
        else:
            shares = store.shares(config.buffer_size, config.budget == "total", len(usable))
            own = None if labels is None else [labels[i] for i in usable]
            best = self._order(ctx, len(usable), shares[-1], own, points)[: shares[-1]]
            self._warn_about_classes(ctx, own, best)
            kept = [StoredRow.of(rows[usable[i]], ctx.task, own[i] if own else None) for i in best]
            store.add(seen, kept, shares)
        self._warn_about_tasks(ctx, store)
        return store.state()

    def _load(self, ctx: TaskContext) -> RowStore:
        store, config = RowStore.load(ctx, self.name), self.config
        before = store.settings
        if before and "reservoir" in (config.strategy, before["strategy"]):
            for name in ("strategy", "buffer_size", "seed"):
                if before[name] != getattr(config, name):
                    config.fail(self.name, name, f"{before[name]!r} as in the stage before: a reservoir is one stream")
        return store

    def _share_of_batch(self, ctx: TaskContext) -> int:
        ratio, batch = exact(self.config.ratio), ctx.global_batch
        share = round_half_up(batch * ratio / (1 + ratio))
        if not 0 < share < batch:
            raise UserError(
                f"--replay_mix batch: with --replay_ratio {self.config.ratio} a global batch of {batch} rows would "
                f"hold {share} replayed ones, allowed: 1 to {batch - 1}; change the ratio or the batch, or use shuffle"
            )
        return share

    def _draw(self, ctx: TaskContext, store: RowStore, current: int) -> list[StoredRow]:
        if self.config.mix == "concat":
            return store.rows
        if self.config.mix == "batch":
            count = rows_for_batches(current, ctx.global_batch, self._share_of_batch(ctx))
        else:
            count = round_half_up(exact(self.config.ratio) * current)
        return draw(store, count, self.config.seed, ctx.task)

    def _manifest(
        self, ctx: TaskContext, store: RowStore, rows: list[TrainingRow], origin: list[StoredRow | None]
    ) -> dict[str, Any]:
        replayed = [(place, stored) for place, stored in enumerate(origin) if stored is not None]
        return {
            "schema_version": 1,
            "task": ctx.task,
            "mix": self.config.mix,
            "ratio": None if self.config.mix == "concat" else self.config.ratio,
            "seed": self.config.seed,
            "stored_by": store.settings,
            "current_rows": len(rows) - len(replayed),
            "replayed_rows": len(replayed),
            "by_task": {task.task: sum(s.task == task.task for _, s in replayed) for task in store.seen},
            "data_sha256": sha256_json(rows),
            "replayed": [{"place": place, "id": stored.id, "task": stored.task} for place, stored in replayed],
        }

    def _embed(self, ctx: TaskContext, rows: list[TrainingRow]) -> "NDArray[np.float64] | None":
        if self.config.embed == "model":
            return normalised(prompt_embeddings(ctx, rows).cpu().numpy())
        return normalised(tfidf([prompt_text(row) for row in rows])) if ctx.rank == 0 else None

    def _order(
        self,
        ctx: TaskContext,
        count: int,
        share: int,
        labels: list[str] | None,
        points: "NDArray[np.float64] | None",
    ) -> Sequence[int]:
        """Indexes of the usable rows, most useful first."""
        config = self.config
        if config.strategy == "random":
            return range(count)  # they arrive permuted
        if config.strategy == "class_balanced":
            assert labels is not None
            return class_balanced_order(labels, config.seed, ctx.task)
        assert points is not None
        if config.strategy == "kmeans":
            return kmeans_order(points, config.clusters, share, seed32(config.seed, ctx.task))
        return class_herding_order(points, labels, share)

    def _warn_about_classes(self, ctx: TaskContext, labels: list[str] | None, kept: Sequence[int]) -> None:
        if labels is not None:
            missing = sorted(set(labels) - {labels[i] for i in kept})
            if missing:
                ctx.notice(f"{len(missing)} classes of task '{ctx.task}' have no stored row, e.g. {missing[:3]}")

    def _warn_about_tasks(self, ctx: TaskContext, store: RowStore) -> None:
        missing = [entry.task for entry in store.seen if not store.of_task(entry.task)]
        if missing:
            ctx.notice(f"--replay_buffer_size {self.config.buffer_size} leaves no row of tasks {', '.join(missing)}")


def draw(store: RowStore, count: int, *key: Key) -> list[StoredRow]:
    """`count` stored rows: none twice before all were drawn, tasks in proportion to what is stored of them."""
    tasks = [store.of_task(entry.task) for entry in store.seen]
    passes, rest = divmod(count, len(store.rows))
    drawn = [store.rows[i] for number in range(passes) for i in permutation(len(store.rows), *key, "pass", number)]
    last: list[StoredRow] = []
    for rows, share in zip(tasks, largest_remainder(rest, [len(rows) for rows in tasks]), strict=True):
        task = rows[0].task if rows else ""
        last += [rows[i] for i in permutation(len(rows), *key, "rest", task)[:share]]
    return drawn + [last[i] for i in permutation(len(last), *key, "order")]


def rows_for_batches(current: int, batch: int, share: int) -> int:
    """Replayed rows that `current` rows need when every full global batch holds `share` of them."""
    full, rest = divmod(current, batch - share)
    return full * share + (rest * share * 2 + batch - share) // (2 * (batch - share))


def order_for_batches(current: int, replayed: int, batch: int, share: int, *key: Key) -> list[int]:
    """An epoch in which every full global batch holds `share` replayed rows; they are the rows after the current ones.

    The order within a batch is random too, so that the replayed rows do not all meet the same rank or micro-batch.
    """
    old = iter([current + i for i in permutation(replayed, *key, "old")])
    new = iter(permutation(current, *key, "new"))
    order: list[int] = []
    for number in range(math.ceil((current + replayed) / batch)):
        rows = [*islice(old, share), *islice(new, batch - share)]
        order += [rows[i] for i in permutation(len(rows), *key, "batch", number)]
    return order

"""What is to be asked: for each run the rows (base and stages) and columns (tasks) of its grid, as plain data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from swift_cl.errors import UserError, did_you_mean
from swift_cl.evaluation.scenarios import visible_labels
from swift_cl.evaluation.store import AnswerStore, answer_path
from swift_cl.serving.adapters import Adapter, Deployment, candidate_stages, run_adapters, stage_adapter, weights_id
from swift_cl.stages import Run, Stage, load_run
from swift_cl.stream.benchmark import Benchmark, Task, load_benchmark
from swift_cl.stream.labels import check_answers, labels_of
from swift_cl.stream.rows import Row

BASE = "base"
SYSTEM_POLICIES = ("stage", "task", "none")


@dataclass(frozen=True)
class Choice:
    """An adapter that a stage may answer with.

    Attributes:
        name: what the stage's router calls it.
        tasks: the tasks whose questions it is the right one for.
        target: what is asked when it is chosen.
    """

    name: str
    tasks: tuple[str, ...]
    target: "Target"


@dataclass(frozen=True)
class Target:
    """One row of a grid: a model that answers.

    Attributes:
        row: `base` or the stage's folder name; also the folder of its answers.
        served: the name it is asked under.
        weights: what identifies its weights: the adapter's hash, or the model's id.
        deployment: the server that holds it.
        stage: its stage, None for the base model.
        choices: for a stage that routes, the adapters that it chooses from; empty for one that answers itself.
    """

    row: str
    served: str
    weights: str
    deployment: Deployment
    stage: Stage | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def asked(self) -> tuple["Target", ...]:
        """The models that may be asked for this row, itself first."""
        return (self, *(choice.target for choice in self.choices if choice.target.weights != self.weights))

    @property
    def task_id_given(self) -> bool:
        """Whether the task of a question decides which adapter answers."""
        return bool(self.choices) and self.stage is not None and bool((self.stage.route or {}).get("task_id_given"))


@dataclass(frozen=True)
class Grid:
    """One run's questions and the places of its answers.

    Attributes:
        rows: test rows of each task, in the order of `tasks`.
        base: the base model's row.
        stages: one entry a task of the order; None for a stage that was not trained yet.
        views: grids of further questions about the tasks, by name.
        probe: the grid of the tasks that are asked and never learned; it is not square.
        is_part: whether this is the view or the probe of another grid.
        labels: each task's labels in a scenario of classification, else empty.
    """

    run: Run
    benchmark: Benchmark
    tasks: tuple[Task, ...]
    rows: tuple[tuple[Row, ...], ...]
    base: Target
    stages: tuple[Target | None, ...]
    views: Mapping[str, "Grid"] = field(default_factory=dict)
    probe: "Grid | None" = None
    is_part: bool = False
    labels: tuple[tuple[str, ...], ...] = ()

    @property
    def parts(self) -> list["Grid"]:
        """This grid, and what is asked beside it."""
        return [self, *self.views.values(), *([] if self.probe is None else [self.probe])]

    @property
    def targets(self) -> list[Target]:
        """All rows that can be measured, the base first."""
        return [self.base, *(target for target in self.stages if target is not None)]

    @property
    def classifies(self) -> bool:
        """Whether its stages are models with a classifier head."""
        return self.base.deployment.model_args.get("task_type") == "seq_cls"

    def visible(self, target: Target, task: Task) -> tuple[str, ...]:
        """The labels that a row's answers to a task's questions may be; empty where any text may."""
        stage = 0 if target.stage is None else target.stage.index + 1
        return visible_labels(self.benchmark.scenario, self.labels, stage, self.tasks.index(task))

    def store(self, target: Target, task: Task) -> AnswerStore:
        """The answers of one cell."""
        return AnswerStore(answer_path(self.run.dir, target.row, task.name))


@dataclass(frozen=True)
class GridOptions:
    """Which questions.

    Attributes:
        benchmark: benchmark file; default: the run's own.
        data_dir: folder of the data files; default: the run's own, else the benchmark's.
        order: name of an order; default: the run's own.
        test_limit: only the first so many test rows of a task.
        model: where the base model is now; default: where it was when the run was trained.
    """

    benchmark: Path | None = None
    data_dir: Path | None = None
    order: str | None = None
    test_limit: int | None = None
    model: str | None = None


def _within(run_dir: Path, value: str | None) -> Path | None:
    """A path of run.json: absolute, or relative to the run's folder."""
    return None if value is None else (run_dir / value).resolve()


def load_grid(run_dir: Path, options: GridOptions) -> Grid:
    """Read a run and its benchmark, and check that they belong together; nothing is started.

    Raises:
        UserError: run, benchmark or test data are missing or malformed, or the stages are not of this order.
    """
    run = load_run(run_dir)
    if options.model is not None:
        run = replace(run, model=options.model)
    path = options.benchmark or _within(run_dir, run.benchmark)
    if path is None:
        raise UserError(f"{run_dir}: the run names no benchmark file; pass --benchmark FILE")
    benchmark = load_benchmark(path, options.data_dir or _within(run_dir, run.data_dir))
    tasks = _tasks(run, benchmark, options.order)
    rows = tuple(tuple(task.test_rows()[: options.test_limit]) for task in tasks)
    base, stages = _targets(run, [task.name for task in tasks])
    grid = Grid(run, benchmark, tasks, rows, base, stages, labels=labels_of(benchmark, tasks, rows))

    def part(others: Iterable[Task], labels: tuple[tuple[str, ...], ...] = ()) -> Grid:
        own = tuple(others)
        own_rows = tuple(tuple(task.test_rows()[: options.test_limit]) for task in own)
        for task, asked, known in zip(own, own_rows, labels, strict=False):
            check_answers(task, asked, known)
        return replace(grid, tasks=own, rows=own_rows, is_part=True, labels=labels)

    if benchmark.views or benchmark.probes:
        routed = next((stage for stage in stages if stage is not None and stage.choices), None)
        if routed is not None:
            raise UserError(
                f"{run_dir}: {routed.row} chooses an adapter for each question, among those of the learned tasks; "
                f"{path} asks views or probes as well"
            )
    views = {name: part((view[task.name] for task in tasks), grid.labels) for name, view in benchmark.views.items()}
    return replace(grid, views=views, probe=part(benchmark.probes) if benchmark.probes else None)


def _tasks(run: Run, benchmark: Benchmark, order: str | None) -> tuple[Task, ...]:
    if order is not None:
        return tuple(benchmark.order(order))
    for name in run.order:
        if name not in benchmark.tasks:
            known = list(benchmark.tasks)
            hint = did_you_mean(name, known)
            raise UserError(f"{run.dir}: task {name!r} is not in {benchmark.path}, which has {', '.join(known)}{hint}")
    return tuple(benchmark.tasks[name] for name in run.order)


def _targets(run: Run, order: Sequence[str]) -> tuple[Target, tuple[Target | None, ...]]:
    stages: dict[int, Stage] = {}
    for stage in run.stages:
        if stage.index >= len(order) or order[stage.index] != stage.task:
            raise UserError(
                f"{stage.dir}: stage {stage.index + 1} learned {stage.task!r}, which is not task {stage.index + 1} of "
                f"the order {', '.join(order)}"
            )
        if stage.base_model != run.stages[0].base_model and stage.weights_sha256 is not None:
            raise UserError(
                f"{stage.dir}: its base model is {stage.base_model}, that of {run.stages[0].dir.name} is "
                f"{run.stages[0].base_model}"
            )
        stages[stage.index] = stage
    own = [stage for stage in run.stages if stage.weights_sha256 is not None]
    shared = Deployment(run.model, run.model_args, run_adapters(run.stages))
    base = Target(BASE, shared.base_name, weights_id(run.model), shared)
    return base, tuple(_stage_target(stages.get(index), shared, own) for index in range(len(order)))


def _stage_target(stage: Stage | None, shared: Deployment, own: Sequence[Stage]) -> Target | None:
    """A stage with an adapter answers from the shared server; a full model gets a server of its own."""
    if stage is None:
        return None
    if stage.weights_sha256 is not None:
        choices = tuple(
            Choice(entry["name"], tuple(entry["tasks"]), _choice_target(stage, entry["name"], candidate, shared))
            for entry, candidate in zip(
                (stage.route or {}).get("candidates", ()), candidate_stages(stage, own), strict=True
            )
        )
        return replace(_adapter_target(stage, shared), choices=choices)
    alone = Deployment(str(stage.weights_dir), stage.model_args or shared.model_args)
    return Target(stage.dir.name, alone.base_name, weights_id(alone.model), alone, stage)


def _choice_target(stage: Stage, name: str, candidate: Stage, shared: Deployment) -> Target:
    """A candidate that is no stage's own adapter has a row name that no folder of answers has."""
    target = _adapter_target(candidate, shared)
    is_own = candidate.dir != stage.dir or target.weights == stage.weights_sha256
    return target if is_own else replace(target, row=f"{stage.dir.name}/{name}")


def _adapter_target(stage: Stage, shared: Deployment) -> Target:
    adapter: Adapter = stage_adapter(stage)
    return Target(stage.dir.name, adapter.name, adapter.sha256, shared, stage)


def system_prompt(policy: str, target: Target, task: Task, row: Row) -> str | None:
    """The system prompt of a question, None for the template's default.

    `stage` (default): that of the stage that answers, as it was trained; the base model gets the task's. `task`: the
    task's, for every stage. `none`: never one. Under the first two a row's own system message wins, as in training.
    """
    if policy == "none":
        return None
    if row.system is not None:
        return row.system
    return target.stage.system if policy == "stage" and target.stage is not None else task.system

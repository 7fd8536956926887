"""The whole stage x task grid of one or several runs: serve once, ask what is missing, score, write results.json."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure
from swift_cl.evaluation.ask import Asker, Dialogue, restore
from swift_cl.evaluation.asked import (
    DEFAULT_BACKEND,
    check_classifiers,
    decoding,
    generation,
    generation_by_task,
)
from swift_cl.evaluation.budget import ErrorBudget
from swift_cl.evaluation.client import Endpoint, RetryPolicy
from swift_cl.evaluation.harness import Harness, HarnessOptions
from swift_cl.evaluation.identity import IDENTITY_FILE, IdentityCheck
from swift_cl.evaluation.journal import Journal, journal
from swift_cl.evaluation.plan import Grid, GridOptions, Target, load_grid
from swift_cl.evaluation.questions import Stores, base_of, dialogues, probes
from swift_cl.evaluation.results import Scored, collect, score_grids
from swift_cl.evaluation.routes import Routes
from swift_cl.evaluation.scoring import GridScorer, choose_scorers, load_scorers
from swift_cl.evaluation.servers import ServerPlan, ServerSettings, each_once, names_at, plan_servers, serve
from swift_cl.evaluation.settings import Settings, load_settings
from swift_cl.serving import backends
from swift_cl.serving.backends import ServerOptions
from swift_cl.serving.server import terminate_raises
from swift_cl.stream.benchmark import ScorerOptions

ENDPOINT_BACKEND = "endpoint"


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        grid: which questions.
        backend: see `swift_cl.serving.backends`; None for pt, or for an endpoint of unknown kind with `base_url`.
        base_url: an endpoint that runs already; None to start a server.
        served_names: names at that endpoint by row (`base`, a stage's folder name), where they are not the usual ones.
        server: interpreter, port and further flags of a server of ours.
        merge_stages: merge each stage into the base model and serve it alone.
        system: see `plan.system_prompt`.
        scorer_options: settings by scorer name, which win over the benchmark's.
        history: see `settings.HISTORIES`.
        max_tokens, temperature: override the benchmark's generation settings.
        harness: what lm-evaluation-harness asks; None for nothing.
        decoding: one of `constrained.DECODINGS`; None for the benchmark's.
    """

    grid: GridOptions = field(default_factory=GridOptions)
    backend: str | None = None
    base_url: str | None = None
    served_names: Mapping[str, str] = field(default_factory=dict)
    server: ServerSettings = field(default_factory=lambda: ServerSettings(ServerOptions()))
    merge_stages: bool = False
    system: str = "stage"
    history: str = "own"
    scorers: tuple[str, ...] = ()
    scorer_model: str | None = None
    scorer_options: ScorerOptions = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float | None = None
    concurrency: int = 16
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    identity_check: bool = True
    harness: HarnessOptions | None = None
    decoding: str | None = None

    @property
    def backend_name(self) -> str:
        """What results.json says."""
        return self.backend or (ENDPOINT_BACKEND if self.base_url else DEFAULT_BACKEND)

    @property
    def backend_identity(self) -> str:
        """What the answers' keys say of a server of ours: the engine with its version and settings."""
        merged = "; stages merged" if self.merge_stages else ""
        return backends.identity(self.server.options) + merged


def backend_of(grids: Sequence[Grid], options: EvalOptions) -> str:
    """What the answers' keys say: a server of ours, or an endpoint with the version that it tells.

    Where nobody answers, the version is that of the last asking: a run whose answers are all there needs no endpoint.
    """
    if options.base_url is None:
        return options.backend_identity
    with contextlib.closing(Endpoint(options.base_url, options.retry)) as endpoint:
        try:
            version = endpoint.version()
        except ConnectionError:
            asked = load_settings(grids[0].run.dir)
            known = "" if asked is None else asked[0].backend
            return known if known.startswith(f"{options.backend_name} ") else options.backend_name
    return options.backend_name if version is None else f"{options.backend_name} {version}"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave: results by run, and whether every cell was measured.

    Attributes:
        lost: turns without an answer, over all cells of the trained stages.
        turns: all turns of these cells.
    """

    scored: list[Scored]
    lost: int = 0
    turns: int = 0
    untrained: bool = False

    @property
    def results(self) -> list[dict[str, Any]]:
        """The contents of results.json, run by run."""
        return [entry.results for entry in self.scored]

    @property
    def complete(self) -> bool:
        """Whether no cell is null."""
        return not any(entry.problems for entry in self.scored)

    def passes(self, budget: ErrorBudget) -> bool:
        """Whether no more answers are missing than allowed. A stage that is not trained is never allowed."""
        return not self.untrained and budget.allows(self.lost, self.turns)


def evaluate(run_dirs: Sequence[Path], options: EvalOptions, notify: Callable[[str], None] = print) -> Evaluation:
    """Fill and score the grids of the runs.

    Everything that can be wrong with the input is found before a server starts. A run that breaks off half-way is
    scored as far as it got, and raises afterwards.

    Raises:
        UserError: the input is wrong.
        RunFailure: a server died, an adapter is not really served, or the endpoint is gone.
    """
    grids, scorers = prepare(run_dirs, options)
    try:
        ask(grids, options, notify)
    except RunFailure:
        # A full disk, the reason why asking stopped, must not hide behind a results.json that cannot be written.
        with contextlib.suppress(OSError):
            score(grids, scorers, options)
        raise
    return score(grids, scorers, options)


def load_grids(run_dirs: Sequence[Path], options: GridOptions) -> list[Grid]:
    """Read the runs, each once."""
    return [load_grid(folder, options) for folder in dict.fromkeys(run_dir.resolve() for run_dir in run_dirs)]


def prepare(run_dirs: Sequence[Path], options: EvalOptions) -> tuple[list[Grid], list[list[GridScorer]]]:
    """Read the runs and make the scorers of each ready."""
    grids = load_grids(run_dirs, options.grid)
    names = choose_scorers(grids, options.scorers)
    return grids, load_scorers(grids, names, options.scorer_model, options.scorer_options)


def missing_answers(grids: Sequence[Grid]) -> list[str]:
    """One line for each cell that is not complete, run by run."""
    return [f"{grid.run.dir}: {line}" for grid in grids for part in grid.parts for line in collect(part)[1]]


def count_answers(grids: Sequence[Grid]) -> tuple[int, int]:
    """Turns without an answer, and all turns, over the cells of the base and the trained stages."""
    cells = [cell for grid in grids for part in grid.parts for cell in collect(part)[0].values()]
    return sum(cell.expected - len(cell.items) for cell in cells), sum(cell.expected for cell in cells)


def score(grids: Sequence[Grid], scorers: Sequence[Sequence[GridScorer]], options: EvalOptions) -> Evaluation:
    """Score what is stored; `scorers` are those of each grid."""
    scored = score_grids(grids, scorers, options.backend_name)
    return Evaluation(scored, *count_answers(grids), any(stage is None for grid in grids for stage in grid.stages))


def ask(grids: Sequence[Grid], options: EvalOptions, notify: Callable[[str], None] = print) -> None:
    """Get the answers that are missing; starts no server when there are none."""
    from tqdm import tqdm

    check_classifiers(grids, options)
    own, grids = grids, [part for grid in grids for part in grid.parts]
    plans = plan_servers(grids, options.merge_stages)
    if options.base_url is None:
        for plan in plans:
            plan.check()
    settings = Settings(
        generation(grids, options),
        backend_of(grids, options),
        options.history,
        options.system,
        generation_by_task(grids, options),
        decoding(own, options),
    )
    stores = Stores()
    routes = Routes(options.system, {grid.run.dir: base_of(grid, grid.base) for grid in grids})
    with terminate_raises():
        routes.fill(grids, notify)
    identity = IdentityCheck(probes(grids), options.backend_name, [grid.run.dir / IDENTITY_FILE for grid in grids])
    found_by_plan = [
        dialogues(plan.targets, plan.served, options.system, stores, routes.answers, settings.constrained)
        for plan in plans
    ]
    work = [
        (plan, [d for d in found if plan.holds(d.weights)]) for plan, found in zip(plans, found_by_plan, strict=True)
    ]
    harness: Harness | None = None
    tested: list[list[tuple[Grid, Target]]] = [[] for _ in work]
    if options.harness is not None:
        harness = Harness(options.harness, settings.backend, {grid.run.dir: base_of(grid, grid.base) for grid in grids})
        tested = [harness.missing([t for t in plan.targets if plan.holds(t[1].weights)]) for plan, _ in work]
        if any(tested):
            options.harness.check()
    total = sum(len(dialogue.row.turns) for _, found in work for dialogue in found)
    log = journal(list(dict.fromkeys(grid.run.dir for grid in grids)), settings.backend)
    with (
        terminate_raises(),
        log as record,
        tqdm(total=total, desc="questions", unit="q", dynamic_ncols=True, smoothing=0.05) as bar,
    ):

        def say(line: str) -> None:
            with bar.external_write_mode():
                notify(line)

        for (plan, found), untested in zip(work, tested, strict=True):
            pending = [dialogue for dialogue in found if not restore(dialogue, settings)]
            bar.update(sum(len(d.row.turns) for d in found) - sum(len(d.row.turns) for d in pending))
            if not pending and not untested:
                continue
            with _endpoint(plan, grids, options, say, record) as endpoint:
                names = names_at(endpoint, plan, options.served_names)
                if options.identity_check:
                    identity.check(endpoint, each_once(plan, names))
                    identity.save()
                _save_settings(grids, settings)
                asker = Asker(
                    endpoint,
                    settings,
                    options.concurrency,
                    [name for name in names.values() if name != plan.deployment.base_name],
                    max(options.concurrency, 8),
                )
                record.askers.append(asker)
                renamed = [replace(d, served=names[d.weights]) for d in pending]
                failures = [
                    failure
                    for group in _base_apart(renamed, plan)
                    for failure in asker.ask_all(group, bar.update).failures
                ]
                if harness is not None and untested:
                    harness.fill(endpoint.base_url, untested, names, say)
            if failures:
                say(f"{len(failures)} questions failed, for example: {failures[0]}")
    _save_settings(grids, settings)


def _save_settings(grids: Sequence[Grid], settings: Settings) -> None:
    """From now on only answers under these settings count."""
    for grid in grids:
        settings.save(grid.run.dir, base_of(grid, grid.base))


def _base_apart(pending: Sequence[Dialogue], plan: ServerPlan) -> list[list[Dialogue]]:
    """The base model's questions, then those of the adapters: never both at a time.

    vLLM 0.32 on the CPU gives requests without an adapter the last adapter's weights when a batch holds requests with
    one as well (its torch kernels take the index -1, which means none, as the last slot).
    """
    adapters = {adapter.sha256 for adapter in plan.deployment.adapters}
    groups = [[d for d in pending if d.weights not in adapters], [d for d in pending if d.weights in adapters]]
    return [group for group in groups if group]


@contextlib.contextmanager
def _endpoint(
    plan: ServerPlan, grids: Sequence[Grid], options: EvalOptions, notify: Callable[[str], None], record: Journal
) -> Iterator[Endpoint]:
    if options.base_url is not None:
        with contextlib.closing(Endpoint(options.base_url, options.retry)) as endpoint:
            yield endpoint
        return
    with serve(plan, grids[0].run.dir, options.server, options.retry, notify, record) as endpoint:
        yield endpoint

"""The whole stage x task grid of one or several runs: serve once, ask what is missing, score, write results.json."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.ask import Asker, Dialogue, is_answered, opening
from swift_cl.evaluation.client import Endpoint, Generation, RetryPolicy
from swift_cl.evaluation.identity import IDENTITY_FILE, PROBES, IdentityCheck
from swift_cl.evaluation.plan import BASE, Grid, GridOptions, Target, load_grid, system_prompt
from swift_cl.evaluation.results import Scored, collect, score_grids
from swift_cl.evaluation.scoring import GridScorer, choose_scorers, load_scorers
from swift_cl.evaluation.store import AnswerStore, answer_path
from swift_cl.io import sha256_json
from swift_cl.serving.adapters import Deployment, check_deployment, unique
from swift_cl.serving.backends import ServerOptions, command
from swift_cl.serving.server import Server
from swift_cl.stream.benchmark import ScorerOptions

DEFAULT_BACKEND = "pt"
ENDPOINT_BACKEND = "endpoint"


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    Attributes:
        grid: which questions.
        backend: see `swift_cl.serving.backends`; None for pt, or for an endpoint of unknown kind with `base_url`.
        base_url: an endpoint that runs already; None to start a server.
        served_names: names at that endpoint by row (`base`, a stage's folder name), where they are not the usual ones.
        server: interpreter, batch size and further flags of a server of ours.
        system: see `plan.system_prompt`.
        scorer_options: settings by scorer name, which win over the benchmark's.
        max_tokens, temperature: override the benchmark's generation settings.
    """

    grid: GridOptions = field(default_factory=GridOptions)
    backend: str | None = None
    base_url: str | None = None
    served_names: Mapping[str, str] = field(default_factory=dict)
    server: ServerOptions = field(default_factory=ServerOptions)
    port: int | None = None
    start_seconds: float = 900.0
    system: str = "stage"
    scorers: tuple[str, ...] = ()
    scorer_model: str | None = None
    scorer_options: ScorerOptions = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float | None = None
    concurrency: int = 16
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    identity_check: bool = True

    @property
    def backend_name(self) -> str:
        """What results.json and the answers' keys say."""
        return self.backend or (ENDPOINT_BACKEND if self.base_url else DEFAULT_BACKEND)


@dataclass(frozen=True)
class ServerPlan:
    """One server and the rows of all runs that it answers."""

    deployment: Deployment
    targets: tuple[tuple[Grid, Target], ...]

    def served(self, target: Target) -> str:
        """The name a target has on this server; runs that share an adapter's content share its name."""
        for adapter in self.deployment.adapters:
            if adapter.sha256 == target.weights:
                return adapter.name
        return target.served


def plan_servers(grids: Sequence[Grid]) -> list[ServerPlan]:
    """As few servers as possible: one for every base model, with the adapters of all its runs, and one for every fully
    fine-tuned stage."""
    groups: dict[str, list[tuple[Grid, Target]]] = {}
    bases = {id(grid): grid.base.weights for grid in grids}
    for grid in grids:
        for target in grid.targets:
            shared = target.deployment == grid.base.deployment
            model = bases[id(grid)] if shared else target.weights
            groups.setdefault(sha256_json([model, dict(target.deployment.model_args)]), []).append((grid, target))
    plans = []
    for members in groups.values():
        first = members[0][1].deployment
        adapters = unique(adapter for _, target in members for adapter in target.deployment.adapters)
        plans.append(ServerPlan(Deployment(first.model, first.model_args, adapters), tuple(members)))
    return plans


def generation(grids: Sequence[Grid], options: EvalOptions) -> Generation:
    """The settings of the command line, else of the benchmark, else greedy with at most 512 tokens."""
    found = {sha256_json(dict(grid.benchmark.generation)): dict(grid.benchmark.generation) for grid in grids}
    if len(found) > 1:
        raise UserError("the runs' benchmarks have different generation settings; evaluate them separately")
    settings: dict[str, Any] = next(iter(found.values()))
    defaults = Generation()
    max_tokens = settings.pop("max_tokens", defaults.max_tokens)
    temperature = settings.pop("temperature", defaults.temperature)
    return Generation(
        max_tokens if options.max_tokens is None else options.max_tokens,
        float(temperature if options.temperature is None else options.temperature),
        settings,
    )


class _Stores:
    """Opens every answer file once."""

    def __init__(self) -> None:
        self._open: dict[Path, AnswerStore] = {}

    def __call__(self, grid: Grid, target: Target, task: str) -> AnswerStore:
        path = answer_path(grid.run.dir, target.row, task).resolve()
        if path not in self._open:
            self._open[path] = AnswerStore(path)
        return self._open[path]


def dialogues(plan: ServerPlan, policy: str, stores: Callable[[Grid, Target, str], AnswerStore]) -> list[Dialogue]:
    """All dialogues of a server, model by model, so that batches are of one adapter; those that runs share once."""
    merged: dict[str, tuple[Dialogue, list[AnswerStore]]] = {}
    for grid, target in plan.targets:
        for task, rows in zip(grid.tasks, grid.rows, strict=True):
            store = stores(grid, target, task.name)
            for row in rows:
                system = system_prompt(policy, target, task, row)
                key = sha256_json([target.weights, task.name, system, row.id, row.content_hash])
                found = Dialogue(plan.served(target), target.weights, system, row, ())
                merged.setdefault(key, (found, []))[1].append(store)
    ordered = sorted(merged.values(), key=lambda item: item[0].served)
    return [Dialogue(d.served, d.weights, d.system, d.row, tuple(dict.fromkeys(found))) for d, found in ordered]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave: results by run, and whether every cell was measured."""

    scored: list[Scored]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The contents of results.json, run by run."""
        return [entry.results for entry in self.scored]

    @property
    def complete(self) -> bool:
        """Whether no cell is null."""
        return not any(entry.problems for entry in self.scored)


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
    return [f"{grid.run.dir}: {line}" for grid in grids for line in collect(grid)[1]]


def score(grids: Sequence[Grid], scorers: Sequence[Sequence[GridScorer]], options: EvalOptions) -> Evaluation:
    """Score what is stored; `scorers` are those of each grid."""
    return Evaluation(score_grids(grids, scorers, options.backend_name))


def ask(grids: Sequence[Grid], options: EvalOptions, notify: Callable[[str], None] = print) -> None:
    """Get the answers that are missing; starts no server when there are none."""
    from tqdm import tqdm

    plans = plan_servers(grids)
    if options.base_url is None:
        for plan in plans:
            check_deployment(plan.deployment)
    settings, stores = generation(grids, options), _Stores()
    probes = _probes(grids)
    identity = IdentityCheck(probes, options.backend_name, [grid.run.dir / IDENTITY_FILE for grid in grids])
    work = [(plan, dialogues(plan, options.system, stores)) for plan in plans]
    total = sum(len(dialogue.row.turns) for _, found in work for dialogue in found)
    with tqdm(total=total, desc="questions", unit="q", dynamic_ncols=True, smoothing=0.05) as bar:

        def say(line: str) -> None:
            with bar.external_write_mode():
                notify(line)

        for plan, found in work:
            pending = [dialogue for dialogue in found if not is_answered(dialogue, settings, options.backend_name)]
            bar.update(sum(len(d.row.turns) for d in found) - sum(len(d.row.turns) for d in pending))
            if not pending:
                continue
            with _endpoint(plan, grids, options, say) as endpoint:
                names = _names_at(endpoint, plan, options)
                if options.identity_check:
                    identity.check(endpoint, _once(plan, names))
                    identity.save()
                asker = Asker(
                    endpoint,
                    settings,
                    options.backend_name,
                    options.concurrency,
                    [name for name in names.values() if name != plan.deployment.base_name],
                    max(options.concurrency, 8),
                )
                renamed = [Dialogue(names[d.weights], d.weights, d.system, d.row, d.stores) for d in pending]
                failures = [
                    failure
                    for group in _base_apart(renamed, plan)
                    for failure in asker.ask_all(group, bar.update).failures
                ]
            if failures:
                say(f"{len(failures)} questions failed, for example: {failures[0]}")


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
    plan: ServerPlan, grids: Sequence[Grid], options: EvalOptions, notify: Callable[[str], None]
) -> Iterator[Endpoint]:
    if options.base_url is not None:
        with contextlib.closing(Endpoint(options.base_url, options.retry)) as endpoint:
            yield endpoint
        return
    server = Server(
        lambda host, port: command(plan.deployment, options.server, host, port),
        plan.deployment.names,
        grids[0].run.dir / "logs" / "server.log",
        options.port,
        start_seconds=options.start_seconds,
        notify=notify,
    )
    with server, contextlib.closing(Endpoint(server.base_url, options.retry, server.check_alive)) as endpoint:
        yield endpoint


def _names_at(endpoint: Endpoint, plan: ServerPlan, options: EvalOptions) -> dict[str, str]:
    """For each target's weights the name it is asked under; each must be listed by the endpoint."""
    listed = endpoint.models()
    names: dict[str, str] = {}
    for grid, target in plan.targets:
        usual = [plan.served(target), *([grid.run.model] if target.row == BASE else [target.row])]
        wanted = [options.served_names[target.row]] if target.row in options.served_names else usual
        name = next((name for name in wanted if name in listed), None)
        if name is None:
            raise UserError(
                f"{endpoint.base_url} lists no model {' or '.join(wanted)} for {target.row} of {grid.run.dir}; it "
                f"lists {', '.join(listed)}; pass --served_name {target.row}=NAME if it has another name there"
            )
        names.setdefault(target.weights, name)
    return names


def _once(plan: ServerPlan, names: Mapping[str, str]) -> list[tuple[Target, str]]:
    """Each weights of a server once, the base first."""
    found: dict[str, tuple[Target, str]] = {}
    for _, target in plan.targets:
        found.setdefault(target.weights, (target, names[target.weights]))
    return sorted(found.values(), key=lambda item: item[0].row != BASE)


def _probes(grids: Sequence[Grid]) -> list[list[dict[str, str]]]:
    """The first question of the first few tasks."""
    grid = grids[0]
    found = []
    for task, rows in list(zip(grid.tasks, grid.rows, strict=True))[:PROBES]:
        row = rows[0]
        system = system_prompt("task", grid.base, task, row)
        dialogue = Dialogue(grid.base.served, grid.base.weights, system, row, ())
        found.append([*opening(dialogue), {"role": "user", "content": row.turns[0][0]}])
    return found

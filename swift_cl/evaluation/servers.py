"""Which servers an evaluation needs, and which rows each of them answers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.evaluation.client import Endpoint, RetryPolicy
from swift_cl.evaluation.journal import Journal
from swift_cl.evaluation.plan import BASE, Grid, Target
from swift_cl.io import sha256_json
from swift_cl.serving.adapters import Adapter, Deployment, check_deployment, unique
from swift_cl.serving.backends import ServerOptions, command, is_offline
from swift_cl.serving.merge import check_mergeable, merged
from swift_cl.serving.server import Server

MERGED_DIR = ".merged"


@dataclass(frozen=True)
class ServerPlan:
    """One server and the rows of all runs that it answers.

    Attributes:
        merge: the adapter that is merged into the deployment's model and served alone, None to serve what it says.
        merged_elsewhere: hashes of the adapters that other servers have merged in.
    """

    deployment: Deployment
    targets: tuple[tuple[Grid, Target], ...]
    merge: Adapter | None = None
    merged_elsewhere: frozenset[str] = frozenset()

    @property
    def asked(self) -> list[tuple[Grid, Target]]:
        """Everything that may be asked here: the rows, and the adapters that rows choose from."""
        every = [(grid, model) for grid, target in self.targets for model in target.asked]
        return [item for item in every if self.holds(item[1].weights)]

    def holds(self, weights: str) -> bool:
        """Whether this server has these weights; one that has a single stage merged in has no others."""
        if self.merge is not None:
            return weights == self.merge.sha256
        return not self.merged_elsewhere or weights not in self.merged_elsewhere

    @property
    def names(self) -> list[str]:
        """The names that the server lists. A merged stage has the name of its adapter."""
        return self.deployment.names if self.merge is None else [self.merge.name]

    def served(self, target: Target) -> str:
        """The name a target has on this server; runs that share an adapter's content share its name."""
        for adapter in self.deployment.adapters if self.merge is None else (self.merge,):
            if adapter.sha256 == target.weights:
                return adapter.name
        return target.served

    def check(self) -> None:
        """Find what cannot work before anything starts."""
        check_deployment(self.deployment if self.merge is None else replace(self.deployment, adapters=(self.merge,)))
        if self.merge is not None:
            check_mergeable(self.merge)


@dataclass(frozen=True)
class ServerSettings:
    """A server of ours.

    Attributes:
        port: None for any free one.
        start_seconds: how long it may take to become ready.
    """

    options: ServerOptions
    port: int | None = None
    start_seconds: float = 900.0


def plan_servers(grids: Sequence[Grid], merge_stages: bool = False) -> list[ServerPlan]:
    """As few servers as possible: one for every base model, with the adapters of all its runs, and one for every fully
    fine-tuned stage. With `merge_stages`, one for every base model and one for every adapter merged into it."""
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
        plan = ServerPlan(Deployment(first.model, first.model_args, adapters), tuple(members))
        plans += _one_by_one(plan) if merge_stages else [plan]
    return plans


def _one_by_one(plan: ServerPlan) -> list[ServerPlan]:
    alone = replace(plan.deployment, adapters=())
    adapters = plan.deployment.adapters
    hashes = frozenset(adapter.sha256 for adapter in adapters)
    plans = [
        ServerPlan(alone, plan.targets, merged_elsewhere=hashes),
        *(ServerPlan(alone, plan.targets, a) for a in adapters),
    ]
    return [
        replace(p, targets=tuple(item for item in p.targets if any(p.holds(model.weights) for model in item[1].asked)))
        for p in plans
    ]


@contextlib.contextmanager
def serve(
    plan: ServerPlan,
    run_dir: Path,
    settings: ServerSettings,
    retry: RetryPolicy,
    notify: Callable[[str], None],
    journal: Journal,
) -> Iterator[Endpoint]:
    """Start a server of ours for a plan; its logs go to `run_dir/logs`, what it took to `journal`."""
    logs = run_dir / "logs"
    with contextlib.ExitStack() as stack:
        deployment, name = plan.deployment, None
        if plan.merge is not None:
            folder, name = run_dir / MERGED_DIR / plan.merge.name, plan.merge.name
            notify(f"merging {name} into {deployment.model}")
            deployment = stack.enter_context(merged(plan.merge, deployment, folder, logs / "merge.log"))
        if is_offline(settings.options.backend):
            from swift_cl.serving.offline import OfflineServer

            kind: type[Server] = OfflineServer
        else:
            kind = Server
        server = kind(
            lambda host, port: command(deployment, settings.options, host, port, name),
            plan.names,
            logs / "server.log",
            settings.port,
            start_seconds=settings.start_seconds,
            notify=notify,
        )
        stack.enter_context(server)
        journal.server(server.command.argv, server.ready_seconds)
        transport = getattr(server, "transport", None)
        endpoint = Endpoint(server.base_url, retry, server.check_alive, transport=transport)
        yield stack.enter_context(contextlib.closing(endpoint))


def names_at(endpoint: Endpoint, plan: ServerPlan, given: Mapping[str, str]) -> dict[str, str]:
    """For each target's weights the name it is asked under; each must be listed by the endpoint.

    Args:
        given: names by row (`base`, a stage's folder name), where they are not the usual ones.
    """
    listed = endpoint.models()
    names: dict[str, str] = {}
    for grid, target in plan.asked:
        usual = [plan.served(target), *([grid.run.model] if target.row == BASE else [target.row])]
        wanted = [given[target.row]] if target.row in given else usual
        name = next((name for name in wanted if name in listed), None)
        if name is None:
            raise UserError(
                f"{endpoint.base_url} lists no model {' or '.join(wanted)} for {target.row} of {grid.run.dir}; it "
                f"lists {', '.join(listed)}; pass --served_name {target.row}=NAME if it has another name there"
            )
        names.setdefault(target.weights, name)
    return names


def each_once(plan: ServerPlan, names: Mapping[str, str]) -> list[tuple[Target, str]]:
    """Each weights of a server once with its name, the base first."""
    found: dict[str, tuple[Target, str]] = {}
    for _, target in plan.asked:
        found.setdefault(target.weights, (target, names[target.weights]))
    return sorted(found.values(), key=lambda item: item[0].row != BASE)

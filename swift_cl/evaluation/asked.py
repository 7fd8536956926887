"""How the questions of runs are asked: what the command line says, else the benchmarks; refused where they differ."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError
from swift_cl.evaluation.client import Generation
from swift_cl.evaluation.constrained import CONSTRAINED, FREE, check_labels
from swift_cl.evaluation.plan import Grid
from swift_cl.io import sha256_json
from swift_cl.serving import backends

if TYPE_CHECKING:
    from swift_cl.evaluation.grid import EvalOptions

DEFAULT_BACKEND = "pt"


def generation(grids: Sequence[Grid], options: "EvalOptions") -> Generation:
    """The settings of the command line, else of the benchmark, else greedy with at most 512 tokens."""
    found = {sha256_json(dict(grid.benchmark.generation)): dict(grid.benchmark.generation) for grid in grids}
    if len(found) > 1:
        raise UserError("the runs' benchmarks have different generation settings; evaluate them separately")
    return _generation(next(iter(found.values())), options)


def generation_by_task(grids: Sequence[Grid], options: "EvalOptions") -> dict[str, Generation]:
    """The settings of tasks that have their own, which win over the benchmark's and not over the command line's."""
    found: dict[str, Generation] = {}
    for grid in grids:
        for task in grid.tasks:
            if task.generation:
                made = _generation({**grid.benchmark.generation, **task.generation}, options)
                if found.setdefault(task.name, made) != made:
                    raise UserError(
                        f"task {task.name} has different generation settings in the runs' benchmarks; evaluate them "
                        "separately"
                    )
    return found


def check_classifiers(grids: Sequence[Grid], options: "EvalOptions") -> None:
    """Refuse what a model with a classifier head cannot do.

    Raises:
        UserError: names the flag.
    """
    asked = {
        "--decoding free": options.decoding == FREE,
        "--merge_stages": options.merge_stages,
        "--lm_eval": options.harness is not None,
    }
    for grid in grids:
        for flag, given in asked.items():
            if grid.classifies and given:
                raise UserError(f"{grid.run.dir}: a classifier answers with its classes; {flag} is not for it")


def decoding(grids: Sequence[Grid], options: "EvalOptions") -> str:
    """How answers are decoded: as the command line says, else as the benchmark does.

    Raises:
        UserError: the benchmarks differ, or constrained decoding has no labels or a backend that cannot do it.
    """
    found = {options.decoding or (CONSTRAINED if grid.classifies else grid.benchmark.decoding) for grid in grids}
    if len(found) > 1:
        raise UserError(
            "the runs' benchmarks have different settings of decoding; pass --decoding, or evaluate them apart"
        )
    chosen = found.pop()
    if chosen == CONSTRAINED:
        for grid in grids:
            check_labels(grid.benchmark)
        backends.check_constrained(options.backend or DEFAULT_BACKEND)
    return chosen


def _generation(settings: dict[str, Any], options: "EvalOptions") -> Generation:
    defaults = Generation()
    max_tokens = settings.pop("max_tokens", defaults.max_tokens)
    temperature = settings.pop("temperature", defaults.temperature)
    return Generation(
        max_tokens if options.max_tokens is None else options.max_tokens,
        float(temperature if options.temperature is None else options.temperature),
        settings,
    )

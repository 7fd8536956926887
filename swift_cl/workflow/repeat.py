"""`swift-cl run --from RUN_DIR`: the configuration of a run that was made before, if its inputs are still the same."""

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from swift_cl.stream.benchmark import Benchmark, load_benchmark
from swift_cl.stream.disk import check_on_disk
from swift_cl.stream.validation import explain
from swift_cl.workflow.config import RunConfig
from swift_cl.workflow.provenance import PROVENANCE_FILE, changes_since, check_same_inputs, load

AGAIN = "_again"


def repeated(run_dir: Path, notify: Callable[[str], None]) -> tuple[RunConfig, Benchmark]:
    """The configuration that repeats a run, in a folder of its own beside the old one, and its benchmark.

    Args:
        notify: told what of the programs has changed since, line by line; a repetition may then give other numbers.

    Raises:
        UserError: the folder does not hold what is needed, or data, benchmark or base model are gone or differ.
    """
    run_dir = run_dir.resolve()
    recorded = load(run_dir)
    try:
        config = RunConfig.model_validate(recorded["config"])
    except ValidationError as error:
        raise explain(run_dir / PROVENANCE_FILE, error, RunConfig, recorded["config"]) from None
    benchmark = load_benchmark(Path(config.benchmark), Path(config.data_dir) if config.data_dir else None)
    tasks = benchmark.order(config.orders[0])
    check_on_disk(benchmark, [*tasks, *benchmark.also_asked(tasks)])
    check_same_inputs(recorded, benchmark, config)
    for line in changes_since(recorded):
        notify(line)
    config.output_dir = f"{Path(config.output_dir)}{AGAIN}"
    return config, benchmark

"""A run as a report sees it: results.json, and what else of the run is still on disk (stages, answers, scores)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.results import RESULTS_FILE, RESULTS_SCHEMA
from swift_cl.io import read_json
from swift_cl.report.tables import Results, labels
from swift_cl.stages import stage_dir_name

BASE = "base"
KEYS = ("benchmark", "order", "method", "model", "scorers")
"""What every results.json has, since schema 1."""


@dataclass(frozen=True)
class ReportRun:
    """One run of a report.

    Attributes:
        dir: the run's folder.
        label: how the report calls it; unique within the report.
        results: the content of its results.json.
    """

    dir: Path
    label: str
    results: Results

    @property
    def order(self) -> list[str]:
        """Task names in the order of learning."""
        return [str(task) for task in self.results["order"]]

    @property
    def rows(self) -> list[str]:
        """Folder names of the grid's rows: `base`, then one a stage."""
        return [BASE, *(stage_dir_name(index, task) for index, task in enumerate(self.order))]


def row_label(row: int, order: Sequence[str]) -> str:
    """How a row is called: `base` for row 0, `after <task>` for a stage."""
    return BASE if row == 0 else f"after {order[row - 1]}"


def load_results(path: Path) -> Results:
    """The content of a results.json (or of the one in a run folder).

    Raises:
        UserError: it is missing, malformed, of a schema that this version does not know, or a comparison of runs.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    value: Any = read_json(path)
    schema = value.get("schema") if isinstance(value, dict) else None
    if isinstance(schema, int) and schema > RESULTS_SCHEMA:
        raise UserError(
            f"{path}: results of schema {schema}, this version of swift_cl reads up to {RESULTS_SCHEMA}; "
            "update swift_cl to open it"
        )
    if schema is not None and "runs" in value:
        raise UserError(f"{path}: holds several runs; pass the folders of the runs themselves")
    if schema is None or any(key not in value for key in KEYS):
        raise UserError(f"{path}: not a results.json of schema 1; make one with swift-cl eval")
    found: Results = value
    return found


def load_runs(paths: Sequence[Path]) -> list[ReportRun]:
    """Read the runs, given as folders or as their results.json."""
    results = [load_results(path) for path in paths]
    folders = [path if path.is_dir() else path.parent for path in paths]
    return [
        ReportRun(folder, label, entry) for folder, label, entry in zip(folders, labels(results), results, strict=True)
    ]

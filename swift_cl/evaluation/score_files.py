"""Scores of single answers on disk, for whoever wants to look at them: RUN_DIR/scores/<scorer>/<row>/<task>.jsonl.

`<row>` is `base` or a stage's folder name, as under RUN_DIR/answers. One JSON line an answered turn, in the order of
the test data:

    {"id": sample id, "turn": from 0, "key": key of the stored answer, "score": number or null, "problem": why null}

`problem` is there only with a null. The key tells whether a score belongs to the answer that is stored now. A file is
written whole, also for a cell that is null in the matrix because other answers are missing; a cell without any answer
has no file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_cl.evaluation.scorers import Item, Score, Unscored
from swift_cl.io import read_jsonl, write_jsonl

SCORES_DIR = "scores"


def score_path(run_dir: Path, scorer: str, row: str, task: str) -> Path:
    """File of one cell's scores."""
    return run_dir / SCORES_DIR / scorer / row / f"{task}.jsonl"


def write_scores(
    run_dir: Path, scorer: str, row: str, task: str, items: Sequence[Item], keys: Sequence[str], scores: Sequence[Score]
) -> None:
    """Write a cell's scores; without any answer remove what was there."""
    path = score_path(run_dir, scorer, row, task)
    if items:
        write_jsonl(path, [_line(*entry) for entry in zip(items, keys, scores, strict=True)])
    else:
        path.unlink(missing_ok=True)


def _line(item: Item, key: str, score: Score) -> dict[str, Any]:
    line: dict[str, Any] = {"id": item.id, "turn": item.turn, "key": key}
    if isinstance(score, Unscored):
        return line | {"score": None, "problem": score.reason}
    return line | {"score": score}


def read_scores(run_dir: Path, scorer: str, row: str, task: str) -> list[dict[str, Any]]:
    """The lines of a cell; empty where nothing was scored."""
    path = score_path(run_dir, scorer, row, task)
    return read_jsonl(path) if path.is_file() else []

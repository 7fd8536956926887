"""Run folders as an evaluation leaves them: results.json, answers, scores of single answers, stages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swift_cl.evaluation.metrics import Matrix, compute
from swift_cl.stages import stage_dir_name

ORDER = ("old", "new")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u2028<!-- &amp; 'x' \"y\""
RIGHT_TO_LEFT = "מה בירת צרפת? 🗼"


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def scored(
    rows: Sequence[Sequence[float | None]], base: Sequence[float | None] | None, higher: bool = True, n: int = 4
) -> dict[str, Any]:
    """A scorer's part of results.json."""
    size = len(rows)
    matrix = Matrix(tuple(ORDER[:size]), tuple(map(tuple, rows)), None if base is None else tuple(base))
    return {
        "higher_is_better": higher,
        "base": None if base is None else list(base),
        "matrix": [list(row) for row in rows],
        "n": [[n] * size for _ in rows],
        "n_base": [n] * size,
        "metrics": compute(matrix, higher).as_json(),
    }


def results(scorers: Mapping[str, Any], method: str = "seq", **more: Any) -> dict[str, Any]:
    """A results.json of two tasks."""
    value = {
        "schema": 1, "benchmark": "news", "order": list(ORDER), "method": method, "model": "models/tiny",
        "backend": "pt", "seed": 42, "name": f"news_{method}", "scorers": dict(scorers),
        "answers": {"expected": [4, 4], "cut_at_max_tokens": 0}, "problems": [],
    }  # fmt: skip
    return value | more


def save(folder: Path, value: Mapping[str, Any]) -> Path:
    """A run folder with nothing but its results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return folder


def answer(
    sample: str, text: str, question: str = "", reference: str = "", turn: int = 0, **more: Any
) -> dict[str, Any]:
    """A row of the answer store."""
    value = {"id": sample, "turn": turn, "question": question or f"question {sample}", "answer": text}
    value |= {"reference": reference or f"reference {sample}", "weights": "w", "finish": "stop"}
    return value | {"key": f"key {sample} {turn} {text[:20]}"} | more


def full_run(folder: Path, method: str = "seq") -> Path:
    """25 questions of task old and 5 of task new, with answers and scores.

    Scores of old after stage old and after stage new: 0-6 lost (100, 0), 7-19 kept (100, 100), 20-23 never learned
    (0, 0), 24 learned by the later stage (0, 100); question 7 ends at 60. All of new are right after their own stage.
    """
    order = [("old", 25), ("new", 5)]
    rows = ["base", *(stage_dir_name(index, task) for index, task in enumerate(ORDER))]
    means: list[list[float]] = []
    for row, name in enumerate(rows):
        means.append([])
        for task, count in order:
            answers, scores = [], []
            for index in range(count):
                value = _score(task, row, index)
                question = {0: HOSTILE, 1: RIGHT_TO_LEFT}.get(index, "") if task == "old" else ""
                text = f"answer {row} of {index}" if value < 100 else f"reference {task}-{index}"
                text = {(0, 1): "<b>bold</b>" + HOSTILE, (2, 2): "word " * 2000, (3, 2): ""}.get((index, row), text)
                answers.append(answer(f"{task}-{index}", text, question))
                scores.append({"id": f"{task}-{index}", "turn": 0, "key": answers[-1]["key"], "score": value})
            write_jsonl(folder / "answers" / name / f"{task}.jsonl", answers)
            write_jsonl(folder / "scores" / "exact_match" / name / f"{task}.jsonl", scores)
            means[-1].append(sum(score["score"] for score in scores) / count)
    for index, task in enumerate(ORDER):
        stage = folder / stage_dir_name(index, task)
        stage.mkdir(parents=True)
        train = {"steps": 30, "epochs": 2, "rows": 60, "last_loss": 0.25, "seconds": 65.4, "processes": 1}
        before = {"dir": "../stage_1_old", "weights_sha256": "w"} if index else None
        value = {"schema": 1, "weights_sha256": "w", "started_from": before, "train": train}
        (stage / "stage.json").write_text(json.dumps(value))
        losses = [{"loss": 4.0 / step, "global_step/max_steps": f"{step}/30"} for step in (1, 10, 20)]
        write_jsonl(stage / "logging.jsonl", [*losses, {"train_loss": 1.0, "total_flos": 2e9}])
        (stage / "args.json").write_text(json.dumps({"swift_version": "4.6.0", "learning_rate": 1e-4}))
    argv = ["--model", "models/tiny", "--system", "News of 2022."]
    stages = [{"task": task, "dir": f"runs/{stage_dir_name(i, task)}", "argv": argv} for i, task in enumerate(ORDER)]
    (folder / "plan.json").write_text(json.dumps({"stages": stages}))
    exact = scored(means[1:], means[0]) | {
        "n": [[25, 5], [25, 5]],
        "n_base": [25, 5],
        "floor": [1.0, 2.0],
        "n_floor": [25, 5],
    }
    similarity = scored([[80.0, 30.0], [60.0, 90.0]], [10.0, 20.0])
    value = results({"exact_match": exact, "similarity": similarity}, method)
    value["answers"] = {"expected": [25, 5], "cut_at_max_tokens": 0}
    return save(folder, value)


def _score(task: str, row: int, index: int) -> float:
    if row == 0:
        return 0.0
    if task == "new":
        return 100.0 if row == 2 else 0.0
    if row == 1:
        return 100.0 if index < 20 else 0.0
    return {7: 60.0, 24: 100.0}.get(index, 100.0 if 7 <= index < 20 else 0.0)

"""Every test question with the answers of all models and their scores, as compact JSON for the page's browser."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.store import AnswerStore, answer_path
from swift_cl.io import read_json, read_jsonl
from swift_cl.report.runs import BASE, ReportRun, row_label
from swift_cl.report.tables import direction, scale, scorers
from swift_cl.stages import STAGE_FILE

MAX_CHARACTERS = 4000
"""Longer texts are cut in the page (never in the run's folder) ..."""
MAX_TOTAL = 8_000_000
"""... and shorter still where all different answers together would have more characters than this."""
RIGHT = 0.8
"""An answer counts as right from this part of the scorer's scale on; the reader of the page can move the limit."""

Key = tuple[str, str, int, str, str]
"""Task, sample id, turn, question, reference."""
Place = tuple[int, int, str, str, int]
"""Run, row, task, sample id, turn."""
Answers = dict[Key, dict[tuple[int, int], tuple[str, bool]]]
"""For each question by (run, row): the answer or an error, and whether it is an error."""
Stored = dict[Place, Any]
"""Keys of the stored answers."""
SCORES_DIR = "scores"


def question_data(runs: Sequence[ReportRun]) -> dict[str, Any] | None:
    """All questions of the runs; None where no run has answers on disk.

    Returns:
        `texts`: every text once; others name it by its position.
        `runs`: label, names of its rows, and for each task the row that learned it (`own`).
        `scorers`: those with scores of single answers: name, direction, limit from which an answer is right.
        `questions`: `[task, id, turn, question, reference, answers[run][row], scores[scorer][run][row]]`; an answer is
        a text's position, -1 where there is none, and -2 - position for an error's text.
        `cut`: characters to which long texts were cut, or None.
        `notes`: files that could not be used, and why.
    """
    notes: list[str] = []
    answers, stored = _collect(runs, notes)
    if not answers:
        return None
    scores = {name: _scores(runs, name, stored, notes) for name in scorers([run.results for run in runs])}
    names = [name for name, found in scores.items() if found]
    texts = _Texts(_longest({text for cells in answers.values() for text, _ in cells.values()}))
    order = {task: index for index, task in enumerate(dict.fromkeys(task for run in runs for task in run.order))}
    questions = []
    for key in sorted(answers, key=lambda key: order[key[0]]):  # a stable sort: within a task as asked
        task, sample, turn, question, reference = key
        places = [[(number, row) for row in range(len(run.rows))] for number, run in enumerate(runs)]
        shown = [[_position(texts, answers[key].get(place)) for place in own] for own in places]
        values = [[[scores[name].get((*p, task, sample, turn)) for p in own] for own in places] for name in names]
        questions.append([order[task], sample, turn, texts(question), texts(reference), shown, values])
    return {
        "tasks": list(order),
        "runs": [
            {
                "label": run.label,
                "rows": [row_label(row, run.order) for row in range(len(run.rows))],
                "own": [run.order.index(task) + 1 if task in run.order else 0 for task in order],
            }
            for run in runs
        ],
        "scorers": [_scorer(runs, name) for name in names],
        "texts": texts.all,
        "questions": questions,
        "cut": texts.longest if texts.cut else None,
        "notes": notes,
    }


def _collect(runs: Sequence[ReportRun], notes: list[str]) -> tuple[Answers, Stored]:
    """All stored answers, and the key of each."""
    answers: Answers = {}
    stored: Stored = {}
    for number, run in enumerate(runs):
        for row, name in enumerate(run.rows):
            weights = _weights(run.dir / name) if name != BASE else None
            for task in run.order:
                for found in _answers(answer_path(run.dir, name, task), weights, notes):
                    sample, turn = str(found["id"]), int(found["turn"])
                    failed = "answer" not in found
                    text = str(found["error"] if failed else found["answer"])
                    question = (task, sample, turn, found["question"], found["reference"])
                    answers.setdefault(question, {})[number, row] = (text, failed)
                    stored[number, row, task, sample, turn] = found.get("key")
    return answers, stored


def _longest(texts: Collection[str]) -> int:
    """To how many characters texts are cut."""
    longest = MAX_CHARACTERS
    while longest > 250 and sum(min(len(text), longest) for text in texts) > MAX_TOTAL:
        longest //= 2
    return longest


class _Texts:
    """Texts by position, each once; long ones are cut."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.cut = False
        self._positions: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if len(text) > self.longest:
            self.cut = True
            text = f"{text[: self.longest]}… [{len(text)} characters, cut here]"
        return self._positions.setdefault(text, len(self._positions))

    @property
    def all(self) -> list[str]:
        return list(self._positions)


def _position(texts: _Texts, answer: tuple[str, bool] | None) -> int:
    if answer is None:
        return -1
    position = texts(answer[0])
    return -2 - position if answer[1] else position


def _scorer(runs: Sequence[ReportRun], name: str) -> dict[str, Any]:
    results = [run.results for run in runs]
    low, high = scale(results, name)
    better = direction(results, name)
    right = low + (RIGHT if better == "higher" else 1 - RIGHT) * (high - low)
    return {"name": name, "better": better, "right": round(right, 2), "low": low, "high": high}


def _weights(folder: Path) -> str | None:
    """Hash of a stage's weights today; None where it is not recorded (full fine-tuning, or no stage.json)."""
    path = folder / STAGE_FILE
    stage = read_json(path) if path.is_file() else {}
    return stage.get("weights_sha256") if isinstance(stage, dict) else None


def _answers(path: Path, weights: str | None, notes: list[str]) -> list[dict[str, Any]]:
    """The last row of every turn; answers of weights that the stage no longer has are left out and noted."""
    try:
        found = AnswerStore(path).rows()
    except UserError as error:
        notes.append(str(error))
        return []
    # What a router chose has other weights than the stage's own; results.json counts only what it chooses today.
    kept = [row for row in found if weights is None or row.get("weights") == weights or "routed" in row]
    if len(kept) < len(found):
        notes.append(f"{path}: {len(found) - len(kept)} answers are from other weights than the stage has now")
    return kept


def _scores(runs: Sequence[ReportRun], scorer: str, stored: Stored, notes: list[str]) -> dict[Place, float]:
    """Scores of single answers, from RUN_DIR/scores; empty where there are none.

    Args:
        stored: key of the answer that is in each place; a score of another answer is left out and noted.
    """
    found = {}
    for number, run in enumerate(runs):
        for row, name in enumerate(run.rows):
            for task in run.order:
                path = run.dir / SCORES_DIR / scorer / name / f"{task}.jsonl"
                if not path.is_file():
                    continue
                old = 0
                try:
                    for line in read_jsonl(path):
                        place = (number, row, task, str(line["id"]), int(line["turn"]))
                        if line.get("key", stored.get(place)) != stored.get(place):
                            old += 1
                        elif line["score"] is not None:
                            found[place] = round(float(line["score"]), 2)
                except (UserError, KeyError, TypeError, ValueError) as error:
                    notes.append(f"{path}: not scores of answers ({error})")
                if old:
                    notes.append(f"{path}: {old} scores are of other answers than the stored ones; score again")
    return found


def script_json(value: Any) -> str:
    """JSON that can stand inside a <script> element, whatever its texts hold.

    `<`, `>` and `&` are written as escapes, so that no text ends the element or opens a comment; so are U+2028 and
    U+2029. A surrogate without its other half, which UTF-8 cannot hold, becomes U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

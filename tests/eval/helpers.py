"""What several evaluation tests share: quick retries, right answers, and an evaluation against a mock endpoint."""

from pathlib import Path

from swift_cl.evaluation.client import RetryPolicy
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid

FAST = RetryPolicy(attempts=3, longest_wait=0.01, timeout=0.5)
REFERENCES = {"q0": "a0", "q1": "a1", "q1b": "a1b", "q2": "a2", "r0": "b0", "r1": "b1"}
TURNS = 6


def names(run):
    """The served names of a run, the base first."""
    grid = load_grid(run, GridOptions())
    return [target.served for target in grid.targets]


def right(model, messages):
    return REFERENCES[messages[-1]["content"]]


def go(run, mock, **options):
    runs = run if isinstance(run, list) else [run]
    return evaluate(runs, EvalOptions(base_url=mock.base_url, retry=FAST, **options), notify=lambda line: None)


def scorer(evaluation, index=0):
    return evaluation.results[index]["scorers"]["exact_match"]


def alive(pid):
    """Whether a process runs (a zombie that nobody reaps does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

"""Metrics against hand-computed numbers (the specification's oracles a-d, f, g) and published tables."""

import math

import pytest

from swift_cl.evaluation.metrics import FORMULAS, Matrix, compute


def matrix(rows, base=None):
    order = tuple(f"t{i}" for i in range(len(rows)))
    return Matrix(order, tuple(tuple(row) for row in rows), None if base is None else tuple(base))


A = [[80, 30, 20], [70, 90, 40], [60, 85, 70]]
BASE = [10, 20, 25]


@pytest.mark.parametrize(
    ("rows", "base", "expected"),
    [
        (
            A,
            BASE,
            {
                "last": 71.6667,
                "avg_acc": 71.6667,
                "new_acc": 80,
                "bwt": -12.5,
                "forgetting": 12.5,
                "avg": 77.2222,
                "fwt": 12.5,
            },
        ),
        (
            [[60, 30, 50], [75, 80, 65], [70, 82, 64]],
            BASE,
            {"last": 72, "new_acc": 68, "bwt": 6, "forgetting": 1.5, "avg": 69.8333, "fwt": 25},
        ),
        # Task 2 was better before it was trained: only the maximum from its own stage on counts.
        ([[60, 90, 20], [55, 70, 30], [50, 65, 80]], None, {"forgetting": 7.5}),
        # Concept-1K, memorised and generalisation questions; the upper triangle is never needed.
        (
            [[100, None, None], [40, 100, None], [10, 50, 100]],
            None,
            {"avg": 74.4444, "forgetting": 70, "last": 53.3333},
        ),
        ([[30, None, None], [20, 26, None], [10, 14, 24]], None, {"avg": 23, "forgetting": 16, "last": 16}),
    ],
)
def test_hand_computed(rows, base, expected):
    values = compute(matrix(rows, base)).values
    assert {name: round(values[name], 4) for name in expected} == expected
    assert values.keys() == FORMULAS.keys()


def test_a_hole_makes_null_what_needs_it_and_nothing_else():
    found = compute(matrix([[80, 30, 20], [70, 90, 40], [None, 85, 70]], BASE))
    assert {name for name, value in found.values.items() if value is None} == {
        "last", "avg_acc", "bwt", "forgetting", "avg",
    }  # fmt: skip
    assert found.missing["bwt"] == [(3, 1)]
    assert found.values["new_acc"] == 80
    assert found.values["fwt"] == 12.5
    assert found.has_holes
    assert found.as_json()["missing_cells"]["avg_acc"] == [[3, 1]]
    # What filling the hole with 0 would have given.
    assert 51.67 not in [round(value, 2) for value in found.values.values() if value is not None]


def test_a_hole_that_no_metric_needs_changes_nothing():
    found = compute(matrix([[80, 30, None], [70, 90, 40], [60, 85, 70]], BASE))
    assert found.values == compute(matrix(A, BASE)).values
    assert not found.has_holes


def test_base_row_missing_or_with_a_hole():
    assert compute(matrix(A)).reasons == {"fwt": "needs the base model's row"}
    assert not compute(matrix(A)).has_holes
    assert compute(matrix(A, [None, 20, 25])).values["fwt"] == 12.5  # the first task has no forward transfer
    assert compute(matrix(A, [10, None, 25])).missing == {"fwt": [(0, 2)]}


def test_one_task_has_no_forgetting_not_zero():
    found = compute(matrix([[50]], [10]))
    assert {name: found.values[name] for name in ("bwt", "forgetting", "fwt")} == dict.fromkeys(
        ("bwt", "forgetting", "fwt")
    )
    assert set(found.reasons.values()) == {"undefined for T = 1"}
    assert found.values["avg_acc"] == found.values["avg"] == found.values["new_acc"] == 50
    assert not found.has_holes


def test_perfect_memory_forgets_nothing():
    values = compute(matrix([[70, 1, 2], [70, 80, 3], [70, 80, 90]])).values
    assert values["bwt"] == values["forgetting"] == 0


def test_constant_matrix_gives_the_constant():
    values = compute(matrix([[33.0] * 4] * 4, [33.0] * 4)).values
    assert values["last"] == values["avg"] == values["new_acc"] == 33
    assert values["fwt"] == 0


def test_names_of_tasks_change_nothing():
    renamed = Matrix(("x", "y", "z"), matrix(A).rows, tuple(BASE))
    assert compute(renamed).values == compute(matrix(A, BASE)).values


def test_lower_is_better_runs_on_the_negative():
    """Perplexity that rises on an old task is forgetting: positive, and bwt negative; averages keep their unit."""
    values = compute(matrix([[10, 50], [30, 20]], [60, 60]), higher_is_better=False).values
    assert values["forgetting"] == 20
    assert values["bwt"] == -20
    assert values["fwt"] == 10
    assert values["avg_acc"] == 25
    assert values["new_acc"] == 15


def test_forgetting_is_not_clamped():
    assert compute(matrix([[50, 0], [70, 80]])).values["forgetting"] == -20


TRACE = [
    # Table 8, 7B
    (
        [0.5, 0.735, 0.523, 0.58, 0.764, 0.383, 0.582, 0.408],
        [0.454, 0.609, 0.457, 0.512, 0.637, 0.272, 0.548, 0.408],
        0.4871,
        -0.0826,
    ),
    # Table 7, Baichuan
    (
        [0.62, 0.681, 0.442, 0.626, 0.77, 0.358, 0.64, 0.415],
        [0.579, 0.335, 0.364, 0.58, 0.44, 0.284, 0.475, 0.415],
        0.434,
        -0.1543,
    ),
]


@pytest.mark.parametrize(("diagonal", "final", "last", "bwt"), TRACE)
def test_trace_tables(diagonal, final, last, bwt):
    """The published means of TRACE run over T - 1 tasks."""
    size = len(diagonal)
    rows = [[diagonal[i] if i == t else None for i in range(size)] for t in range(size - 1)]
    values = compute(matrix([*rows, final])).values
    assert math.isclose(values["last"], last, abs_tol=6e-5)
    assert math.isclose(values["bwt"], bwt, abs_tol=6e-5)


def test_phi_dpo_row():
    """phi-DPO, LoRA, T = 5: MFT 64.98 and MFN 53.00 give BWT -14.975 = (MFN - MFT) * 5 / 4 as the last cells agree."""
    rows = [[64.98 if i == t else None for i in range(5)] for t in range(4)]
    values = compute(matrix([*rows, [50.005] * 4 + [64.98]])).values
    assert math.isclose(values["new_acc"], 64.98, abs_tol=1e-9)
    assert math.isclose(values["last"], 53.0, abs_tol=1e-9)
    assert math.isclose(values["bwt"], -14.975, abs_tol=1e-9)


@pytest.mark.parametrize("rows", [[[1, 2]], [[1, 2], [3]], []])
def test_misshaped_matrix_is_refused(rows):
    with pytest.raises(ValueError, match=r"rows|task"):
        matrix(rows)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="finite"):
        matrix([[float("nan")]])

"""O-LoRA's published logs (its repository, `logs_and_outputs/order1_*`, T5-large): every number that they average.

A log holds, after each stage, the exact match of every task so far and of all their rows together; each task has 7,600
test rows, so that the mean over rows is the mean over tasks.
"""

import pytest

from swift_cl.evaluation.metrics import Matrix, compute

TASKS = ("dbpedia", "amazon", "yahoo", "agnews")
O_LORA = ((98.7105,), (98.5526, 57.7632), (97.4079, 57.4079, 71.9079), (97.7368, 56.0658, 71.0395, 88.6184))
O_LORA_OVERALL = (98.7105, 78.1579, 75.5746, 78.3651)
SEQ_FT = ((97.0132,), (89.1053, 55.25), (74.7632, 53.4474, 72.2763), (79.5263, 52.6711, 48.8421, 90.0263))
SEQ_FT_OVERALL = (97.0132, 72.1776, 66.8289, 67.7664)
INC_LORA_LAST, INC_LORA_OVERALL = (79.5, 40.8158, 64.1447, 90.0132), 68.6184


def matrix_of(stages):
    return Matrix(TASKS, tuple((*row, *(None,) * (len(TASKS) - len(row))) for row in stages))


@pytest.mark.parametrize(
    ("stages", "overall"), [(O_LORA, O_LORA_OVERALL), (SEQ_FT, SEQ_FT_OVERALL)], ids=["O-LoRA", "SeqFT"]
)
def test_accuracy_after_every_stage(stages, overall):
    found = compute(matrix_of(stages)).values
    assert found["avg_acc"] == found["last"] == pytest.approx(overall[-1], abs=1e-4)
    assert found["avg"] == pytest.approx(sum(overall) / 4, abs=1e-4)
    for t in (2, 3):  # the log of an earlier stage is the end of a shorter sequence
        shorter = Matrix(TASKS[:t], tuple((*row, *(None,) * (t - len(row))) for row in stages[:t]))
        assert compute(shorter).values["avg_acc"] == pytest.approx(overall[t - 1], abs=1e-4)


@pytest.mark.parametrize(
    ("stages", "bwt", "forgetting", "new_acc"),
    [
        # -((98.7105 - 97.7368) + (57.7632 - 56.0658) + (71.9079 - 71.0395)) / 3; no task was ever better than at first
        (O_LORA, -1.1798, 1.1798, 79.25),
        (SEQ_FT, -14.50, 14.50, 78.6415),
    ],
    ids=["O-LoRA", "SeqFT"],
)
def test_what_was_lost(stages, bwt, forgetting, new_acc):
    found = compute(matrix_of(stages)).values
    assert found["bwt"] == pytest.approx(bwt, abs=1e-3)
    assert found["forgetting"] == pytest.approx(forgetting, abs=1e-3)
    assert found["new_acc"] == pytest.approx(new_acc, abs=1e-3)
    assert found["fwt"] is None  # future tasks were not asked


def test_incremental_lora_after_the_last_stage():
    found = compute(matrix_of((*O_LORA[:3], INC_LORA_LAST))).values
    assert found["avg_acc"] == pytest.approx(INC_LORA_OVERALL, abs=1e-4)

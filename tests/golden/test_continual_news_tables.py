"""The 14 published Continual-News rows give their published Avg.ACC and Forgetting.

Published are the final row, Avg.ACC, Forgetting and New.ACC, which is the mean of the diagonal. The diagonal itself is
not, so one with that mean is built: its last cell is the final row's, the other three share the rest. Forgetting then
depends on its mean only, as long as the diagonal is the maximum of each column before the last row.
"""

import pytest

from swift_cl.evaluation.metrics import Matrix, compute

ROWS = {
    "InternLM2.5 LoRA": ([64.25, 58.94, 71.53, 100], 73.68, 34.41, 99.49),
    "InternLM2.5 MoELoRA": ([65.34, 59.26, 71.63, 100], 74.06, 34.59, 100),
    "InternLM2.5 RePlay": ([78.04, 69.19, 83.71, 99.84], 82.70, 22.18, 99.33),
    "InternLM2.5 LWF": ([72.25, 63.53, 80.18, 100], 78.99, 27.59, 99.58),
    "InternLM2.5 EWC": ([64.23, 59.29, 70.76, 100], 73.57, 34.07, 99.11),
    "InternLM2.5 GEM": ([73.16, 68.83, 80.47, 100], 80.62, 24.63, 99.09),
    "InternLM2.5 CIA": ([63.76, 59.48, 71.65, 100], 73.72, 33.97, 99.2),
    "Qwen2.5 LoRA": ([64.4, 60.96, 72.77, 100], 74.53, 33.79, 99.87),
    "Qwen2.5 MoELoRA": ([65.26, 61.52, 72.32, 100], 74.78, 33.62, 99.99),
    "Qwen2.5 RePlay": ([77.90, 68.43, 81.14, 100], 81.87, 24.18, 100),
    "Qwen2.5 LWF": ([73.79, 65.31, 81.93, 99.94], 80.24, 24.51, 98.62),
    "Qwen2.5 EWC": ([66.6, 61.96, 73.92, 100], 75.62, 32.5, 100),
    "Qwen2.5 GEM": ([74.1, 67.7, 82.03, 100], 80.96, 25.39, 100),
    "Qwen2.5 CIA": ([66.92, 62.88, 74.62, 100], 76.11, 31.86, 100),
}
# Its published Forgetting is 0.14 above what the mean of its diagonal gives. The definition allows that: a task can
# have been better at a later stage than at its own, and then the maximum over j exceeds the diagonal.
ABOVE_THE_DIAGONAL = {"InternLM2.5 LWF": 0.14}


@pytest.mark.parametrize("name", ROWS)
def test_published_row(name):
    final, avg_acc, forgetting, new_acc = ROWS[name]
    shared = (4 * new_acc - final[3]) / 3
    rows = [[shared if i == t else 0.0 for i in range(4)] for t in range(3)]
    metrics = compute(Matrix(("2022", "2023", "2024", "2025"), (*map(tuple, rows), tuple(final)))).values
    assert metrics["avg_acc"] == pytest.approx(avg_acc, abs=0.01)
    assert metrics["new_acc"] == pytest.approx(new_acc, abs=0.005)
    gap = ABOVE_THE_DIAGONAL.get(name, 0.0)
    assert forgetting - metrics["forgetting"] == pytest.approx(gap, abs=0.02)
    assert metrics["forgetting"] == pytest.approx(-metrics["bwt"])


LATER = {
    "InternLM2.5 LoRA": (75.98, 29.63, 98.2),
    "InternLM2.5 EWC": (76.69, 29.26, 98.63),
    "InternLM2.5 GEM": (83.89, 19.32, 98.38),
    "InternLM2.5 CIA": (80.73, 23.64, 98.46),
    "Qwen2.5 LoRA": (76.70, 31.02, 99.97),
    "Qwen2.5 EWC": (77.27, 29.95, 99.74),
    "Qwen2.5 GEM": (84.13, 21.04, 99.91),
    "Qwen2.5 CIA": (80.95, 25.40, 100),
}
"""The rows that a later version of the same README (2026-06) changed: Avg.ACC, Forgetting, New.ACC."""


@pytest.mark.parametrize("name", LATER)
def test_published_averages_of_the_later_version_fit_together(name):
    """Any diagonal of mean New.ACC whose old tasks lose Forgetting on average gives the published Avg.ACC."""
    avg_acc, forgetting, new_acc = LATER[name]
    diagonal = (new_acc - 2, new_acc - 1, new_acc + 1, new_acc + 2)
    lost = (forgetting + 5, forgetting - 8, forgetting + 3)
    rows = [[diagonal[i] if i == t else 0.0 for i in range(4)] for t in range(3)]
    rows.append([*(own - loss for own, loss in zip(diagonal[:3], lost, strict=True)), diagonal[3]])
    metrics = compute(Matrix(("2022", "2023", "2024", "2025"), tuple(map(tuple, rows)))).values
    assert metrics["avg_acc"] == pytest.approx(avg_acc, abs=0.011)
    assert metrics["forgetting"] == pytest.approx(forgetting)
    assert metrics["new_acc"] == pytest.approx(new_acc)

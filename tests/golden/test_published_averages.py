"""Published averages come out of the published numbers that they average: TRACE's over tasks, others' over orders."""

import pytest

from swift_cl.evaluation.metrics import Matrix, compute
from swift_cl.evaluation.statistics import summarise

TRACE_TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
TRACE_REPLAY = (0.50, 0.80, 0.51, 0.55, 0.785, 0.37, 0.52, 0.406)
"""TRACE (arXiv 2310.06762), LLaMA-2-7B-Chat with replay: scores of all tasks after the last one."""

O_LORA_T5 = {
    "SeqFT": ([18.9, 24.9, 41.7], 28.5),
    "SeqLoRA": ([44.6, 32.7, 53.7], 43.7),
    "IncLoRA": ([66.0, 64.9, 68.3], 66.4),
    "Replay": ([55.2, 56.9, 61.3], 57.8),
    "EWC": ([48.7, 47.7, 54.5], 50.3),
    "LwF": ([54.4, 53.1, 49.6], 52.3),
    "LFPT5": ([67.6, 72.6, 77.9], 72.7),
    "O-LoRA": ([75.4, 75.7, 76.3], 75.8),
    "ProgPrompt": ([75.2, 75.0, 75.1], 75.1),
    "SeqFT, long": ([7.4, 7.4, 7.5], 7.4),
    "SeqLoRA, long": ([2.3, 0.6, 1.9], 1.6),
    "IncLoRA, long": ([63.3, 58.5, 61.7], 61.2),
    "Replay, long": ([55.0, 54.6, 53.1], 54.2),
    "EWC, long": ([45.3, 44.5, 45.6], 45.1),
    "LwF, long": ([50.1, 43.1, 47.4], 46.9),
    "L2P, long": ([57.5, 53.8, 56.9], 56.1),
    "LFPT5, long": ([70.4, 68.2, 69.1], 69.2),
    "O-LoRA, long": ([72.3, 64.8, 71.6], 69.6),
    "ProgPrompt, long": ([78.0, 77.7, 77.9], 77.9),
}
"""O-LoRA (arXiv 2310.14152), T5-large: average accuracy after the last task, orders 1-3 and (long) 4-6, and their mean.
Left out: L2P over orders 1-3, whose published mean (60.7) is not that of its published orders (61.0)."""

LATER_METHODS = {
    "MIGU's run of full fine-tuning": ([74.4, 75.0, 77.5], 75.7),
    "N-LoRA": ([79.2, 78.4, 78.8], 78.8),
    "GORP, LLaMA-2-7B": ([78.7, 78.8, 78.2], 78.6),
}
"""The same of later papers (MIGU 2406.17245, N-LoRA 2410.10179, GORP). Left out: MIGU's long orders, whose published
mean (68.3) is not that of its published orders (68.6)."""

SSR_LLAMA_2_7B = {
    "SSR": ([52.61, 51.70, 52.16], 52.16),
    "SSR, BWT": ([-0.23, -1.22, -0.93], -0.79),
    "RandSel 10 %": ([50.81, 50.04, 50.11], 50.32),
    "RandSel 10 %, BWT": ([-2.32, -3.31, -3.42], -3.02),
    "no rehearsal": ([17.67, 15.25, 24.16], 19.03),
    "no rehearsal, BWT": ([-44.09, -47.09, -35.99], -42.39),
}
"""SSR (arXiv 2403.01244), five tasks of SuperNI: AR, which is our avg_acc, and BWT of orders 1-3, and their means."""


def test_trace_overall_performance():
    """OP_T = mean of the last row = our avg_acc; published 55.5."""
    size = len(TRACE_TASKS)
    rows = [(None,) * size] * (size - 1) + [tuple(100 * score for score in TRACE_REPLAY)]
    found = compute(Matrix(TRACE_TASKS, tuple(rows)))
    assert found.values["avg_acc"] == pytest.approx(55.5, abs=0.05)
    assert found.values["bwt"] is None  # the diagonal is not published with it


@pytest.mark.parametrize("name", [*O_LORA_T5, *LATER_METHODS, *SSR_LLAMA_2_7B])
def test_mean_over_orders(name):
    orders, published = {**O_LORA_T5, **LATER_METHODS, **SSR_LLAMA_2_7B}[name]
    found = summarise(orders)
    assert found.mean == pytest.approx(published, abs=0.07)  # some are cut, not rounded
    assert (found.low, found.high) == pytest.approx(
        (min(orders), max(orders))
    )  # with three runs the interval is their range

"""Constrained decoding: an answer can only be one of the visible labels.

A question carries the labels as vLLM's `structured_outputs`, which our own servers understand on every backend that can
hold to them. An endpoint that ignores the field is found by its first answer that is none of the labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from swift_cl.errors import RunFailure, UserError
from swift_cl.stream.benchmark import Benchmark
from swift_cl.stream.benchmark_file import CLASSIFICATION

FREE, CONSTRAINED = "free", "constrained"
DECODINGS = (FREE, CONSTRAINED)
"""Whether an answer may be any text, or only a visible label."""


def check_labels(benchmark: Benchmark) -> None:
    """Refuse constrained decoding where there are no labels.

    Raises:
        UserError: the benchmark's scenario is no classification.
    """
    if benchmark.scenario not in CLASSIFICATION:
        raise UserError(
            f"{benchmark.path}: decoding constrained needs labels, so a scenario of classification: "
            f"{' or '.join(CLASSIFICATION)}"
        )


def request_fields(labels: Sequence[str]) -> dict[str, Any]:
    """What the body of a request says about the labels; nothing without labels."""
    return {"structured_outputs": {"choice": list(labels)}} if labels else {}


def check_reply(text: str, finish: str | None, labels: Sequence[str], generation: Mapping[str, Any], url: str) -> None:
    """Refuse an answer that is none of the labels.

    Args:
        labels: empty where any text may be answered.
        generation: the request's settings.

    Raises:
        RunFailure: it is none of them, so no other answer can be trusted to be one.
    """
    if not labels or text.strip() in labels:
        return
    if finish == "length":
        raise RunFailure(
            f"{url}: {text[:60]!r} is a label cut off at max_tokens {generation['max_tokens']}; give --max_tokens more"
        )
    raise RunFailure(
        f"{url}: asked for one of {len(labels)} labels (structured_outputs), answered {text[:60]!r}; this endpoint has "
        "no constrained decoding as vLLM 0.12 has it; use --infer_backend pt or vllm without --base_url, or --decoding "
        "free"
    )

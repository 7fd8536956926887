"""What a failed request means: whether asking again may help, whether other questions can still be answered.

ms-swift answers every failure with HTTP 400, unknown models and a broken engine included, so a 400 is classified by
its text; an unknown text is the question's own fault.
"""

import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from swift_cl.errors import RunFailure

if TYPE_CHECKING:
    from openai import APIStatusError

RETRIED_STATUS = frozenset({408, 409, 425, 429})
MODEL_UNKNOWN = ("not in the model_list", "model_not_found", "unknown model")
MODEL_UNKNOWN_IF_NAMED = ("does not exist", "not found")
"""Signs of an unknown model only together with its name: a missing file is not found, too."""
KEY_REFUSED = ("api key error", "invalid api key", "incorrect api key", "invalid_api_key")
ENGINE_AT_FAULT = (
    "out of memory",
    "cuda error",
    "cublas",
    "cudnn",
    "nccl",
    "enginedead",
    "engine is dead",
    "engine core",
    "enginecore",
    "temporarily",
    "overloaded",
    "timed out",
    "connection",
    "no space left",
)
"""Signs in a 400 that the server failed and not the question."""
LONGEST_RETRY_AFTER = 120.0
"""Seconds; an endpoint that wants more is asked again after these."""


class QuestionFailed(Exception):
    """One question got no answer; the others may. `endpoint_at_fault` tells a dead endpoint from a bad question."""

    def __init__(self, message: str, endpoint_at_fault: bool) -> None:
        super().__init__(message)
        self.endpoint_at_fault = endpoint_at_fault


def classified(error: "APIStatusError", base_url: str, model: str, key_env: str) -> Exception:
    """What an HTTP error is: a `QuestionFailed`, or a `RunFailure` when no question can be answered."""
    status, text = error.status_code, describe(error)
    words = text.lower()
    if status in RETRIED_STATUS or status >= 500:
        return QuestionFailed(text, True)
    if status in (401, 403) or (status == 400 and any(sign in words for sign in KEY_REFUSED)):
        return RunFailure(f"{base_url} refuses the key ({text}); set {key_env}")
    if status in (400, 404):
        named = status == 404 or model.lower() in words
        if any(sign in words for sign in (*MODEL_UNKNOWN, *(MODEL_UNKNOWN_IF_NAMED if named else ()))):
            return RunFailure(f"{base_url} does not serve {model!r}: {text}")
    return QuestionFailed(text, status == 400 and any(sign in words for sign in ENGINE_AT_FAULT))


def is_retryable(error: BaseException) -> bool:
    """Whether asking again may help: connection lost, time-out, 408, 409, 425, 429, 5xx, or a 400 of a broken engine;
    never another 4xx."""
    return isinstance(error, QuestionFailed) and error.endpoint_at_fault


def retry_after(error: BaseException | None) -> float:
    """Seconds that the endpoint asked us to wait (a number or a date, as HTTP allows), 0 if it did not say."""
    response = getattr(getattr(error, "__cause__", None), "response", None)
    value = response.headers.get("retry-after", "") if response is not None else ""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if seconds == seconds else 0.0  # not for NaN


def describe(error: BaseException) -> str:
    """An error as one line of at most 300 characters: type or status, and what it says."""
    response = getattr(error, "response", None)
    text = response.text if response is not None else str(error.__cause__ or error)
    kind = f"HTTP {response.status_code}" if response is not None else type(error).__name__
    return f"{kind}: {' '.join(text.split())}"[:300]

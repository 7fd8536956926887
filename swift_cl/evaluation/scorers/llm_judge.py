"""LLM judge: a model at any OpenAI-compatible endpoint compares answer and reference, 0 to 100 in steps of 10.

The endpoint is `base_url` and `model` under `scorer_options`, else the environment's SWIFT_CL_JUDGE_BASE_URL and
SWIFT_CL_JUDGE_MODEL; its key is SWIFT_CL_JUDGE_API_KEY. The prompt is data/llm_judge.j2; `criteria` replaces its
sentence about what counts. Verdicts are kept in the user's cache by endpoint, model, prompt and settings, so a second
run asks only what is missing. A verdict that cannot be read, or a failed request, leaves the answer without a score
(the cell is null and says why) and is asked again next time; it is never a 0. An empty answer scores 0 unasked.
"""

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.scorers import Item, Score, Unscored
from swift_cl.evaluation.scorers._library import cache_dir
from swift_cl.evaluation.scorers._options import ScorerOptions
from swift_cl.io import sha256_json

if TYPE_CHECKING:
    from swift_cl.evaluation.client import Endpoint
    from swift_cl.evaluation.store import AnswerStore

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
NEEDS = "an endpoint: SWIFT_CL_JUDGE_BASE_URL, _MODEL, _API_KEY"
FLOOR = False  # it would ask as many questions as a row of the grid, to learn that wrong answers are wrong
BASE_URL, MODEL, API_KEY = "SWIFT_CL_JUDGE_BASE_URL", "SWIFT_CL_JUDGE_MODEL", "SWIFT_CL_JUDGE_API_KEY"
TEMPLATE = Path(__file__).parent / "data" / "llm_judge.j2"
CRITERIA = "What counts is whether the answer is factually right and complete, measured by the reference."
VERDICT = re.compile(r"[\s*_#>`]*verdict[\s*_`]*[:：][\s*_`]*(\d{1,2})[\s*_`.。]*", re.IGNORECASE)
GIVE_UP_AFTER = 8
"""Requests lost in a row, after which the endpoint counts as gone."""


class Options(ScorerOptions):
    """Settings of a task; `attempts` and `timeout` (seconds) are those of one verdict."""

    base_url: str | None = None
    model: str | None = None
    criteria: str = CRITERIA
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    concurrency: int = Field(default=8, ge=1)
    attempts: int = Field(default=4, ge=1)
    timeout: float = Field(default=120.0, gt=0)


@lru_cache(maxsize=1)
def _template() -> Any:
    import jinja2

    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text("utf-8"))


def prompt(item: Item, criteria: str = CRITERIA) -> str:
    """What the judge is asked."""
    fields = {name: getattr(item, name) for name in ("system", "question", "reference", "answer")}
    return str(_template().render(criteria=criteria, **fields))


def read_verdict(text: str) -> float | None:
    """The score of a reply, 0..100; None where its last line is no verdict of a whole number from 0 to 10.

    Only the last line counts: a verdict that an answer tries to put into the judge's mouth stands before it.
    """
    found = VERDICT.fullmatch((text.strip().splitlines() or [""])[-1])
    return 10.0 * int(found[1]) if found and int(found[1]) <= 10 else None


class LlmJudge:
    """Asks what its cache does not know, several verdicts at a time."""

    def __init__(self, base_url: str, model: str, options: Options) -> None:
        self.base_url, self.model, self.options = base_url.rstrip("/"), model, options

    @cached_property
    def store(self) -> "AnswerStore":
        """The verdicts known so far."""
        from swift_cl.evaluation.store import AnswerStore

        return AnswerStore(cache_dir("llm_judge") / f"{sha256_json([self.base_url, self.model])[:16]}.jsonl")

    def endpoint(self) -> "Endpoint":
        """A connection to the judge."""
        from swift_cl.evaluation.client import Endpoint, RetryPolicy

        return Endpoint(
            self.base_url,
            RetryPolicy(attempts=self.options.attempts, timeout=self.options.timeout),
            api_key_env=API_KEY,
        )

    def key(self, text: str) -> str:
        """What a verdict is kept under."""
        return sha256_json([self.base_url, self.model, text, self.options.max_tokens, self.options.temperature])

    def score_items(self, items: Sequence[Item]) -> list[Score]:
        """The verdict on each item, or why there is none; equal questions are asked once."""
        texts = [prompt(item, self.options.criteria) if item.answer.strip() else None for item in items]
        wanted = {self.key(text): text for text in texts if text is not None}
        scores: dict[str, Score] = {key: v for key in wanted if (v := self._known(key)) is not None}
        scores |= self._ask({key: text for key, text in wanted.items() if key not in scores})
        return [0.0 if text is None else scores[self.key(text)] for text in texts]

    def facts(self, items: Sequence[Item]) -> dict[str, Any]:
        """Who judged, and by which prompt."""
        template = sha256_json([TEMPLATE.read_text("utf-8"), self.options.criteria])
        return {"judge": self.model, "prompt_sha256": template}

    def _known(self, key: str) -> float | None:
        stored = self.store.answered(key)
        return None if stored is None else read_verdict(stored["answer"])

    def _ask(self, wanted: dict[str, str]) -> dict[str, Score]:
        import contextlib

        if not wanted:
            return {}
        with contextlib.closing(self.endpoint()) as endpoint, ThreadPoolExecutor(self.options.concurrency) as pool:
            asking = _Asking(self, endpoint)
            return dict(zip(wanted, pool.map(asking, wanted, wanted.values()), strict=True))


class _Asking:
    """Asks one verdict after another in several threads, until the endpoint is gone."""

    def __init__(self, judge: LlmJudge, endpoint: "Endpoint") -> None:
        self.judge, self.endpoint = judge, endpoint
        self._lock = threading.Lock()
        self._lost_in_a_row = 0
        self._gone: str | None = None

    def __call__(self, key: str, text: str) -> Score:
        from swift_cl.evaluation.client import Generation, QuestionFailed

        if self._gone:
            return Unscored(self._gone)
        settings = Generation(self.judge.options.max_tokens, self.judge.options.temperature)
        try:
            reply = self.endpoint.ask(self.judge.model, [{"role": "user", "content": text}], settings).text
        except QuestionFailed as failure:
            return self._lost(failure.endpoint_at_fault, f"the judge did not answer: {failure}")
        except RunFailure as failure:
            self._gone = f"the judge cannot be asked: {failure}"
            return Unscored(self._gone)
        with self._lock:
            self._lost_in_a_row = 0
        score = read_verdict(reply)
        if score is None:
            return Unscored("the judge's verdict cannot be read")
        self.judge.store.append({"id": key, "turn": 0, "key": key, "answer": reply})
        return score

    def _lost(self, endpoint_at_fault: bool, reason: str) -> Unscored:
        with self._lock:
            self._lost_in_a_row = self._lost_in_a_row + 1 if endpoint_at_fault else 0
            if self._lost_in_a_row >= GIVE_UP_AFTER:
                self._gone = f"the judge is gone, {GIVE_UP_AFTER} requests in a row failed"
        return Unscored(reason)


def load(model: str | None = None, options: Options | None = None) -> LlmJudge:
    """Check that the judge is named, and, unless it was asked before, that its endpoint answers.

    Raises:
        UserError: no endpoint or model is named, or nobody answers there.
    """
    import contextlib
    import os

    options = options or Options()
    base_url, name = options.base_url or os.environ.get(BASE_URL), options.model or os.environ.get(MODEL)
    for value, key, variable in ((base_url, "base_url", BASE_URL), (name, "model", MODEL)):
        if not value:
            raise UserError(f"scorer 'llm_judge' needs to know its endpoint: set {variable}, or the setting {key}")
    judge = LlmJudge(str(base_url), str(name), options)
    if not len(judge.store):
        with contextlib.closing(judge.endpoint()) as endpoint:
            endpoint.models()
    return judge

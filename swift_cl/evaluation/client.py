"""Ask an OpenAI-compatible endpoint: retries where they make sense, and errors that say whether going on does."""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.constrained import check_reply, request_fields
from swift_cl.evaluation.faults import QuestionFailed as QuestionFailed
from swift_cl.evaluation.faults import classified, describe, is_retryable, retry_after
from swift_cl.evaluation.pictures import Message, sent

if TYPE_CHECKING:
    from httpx import BaseTransport
    from openai.types.chat import ChatCompletion
    from tenacity import RetryCallState


@dataclass(frozen=True)
class Generation:
    """How answers are generated; part of every answer's key.

    Attributes:
        max_tokens: limit of an answer, in tokens.
        temperature: 0 is greedy.
        extra: further fields of the request body, e.g. `repetition_penalty`.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What the key hashes."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **self.extra}


@dataclass(frozen=True)
class RetryPolicy:
    """When to ask again.

    Attributes:
        attempts: how often a question is asked at most.
        longest_wait: seconds between two attempts at most; the wait doubles from half a second, with jitter. An
            endpoint that asks for more time (Retry-After) gets it, up to two minutes.
        timeout: seconds an answer may take.
    """

    attempts: int = 4
    longest_wait: float = 8.0
    timeout: float = 300.0


@dataclass(frozen=True)
class Reply:
    """An answer: its text, why it ended, the model that the endpoint says it is from, and its length in tokens, where
    the endpoint tells."""

    text: str
    finish: str | None
    model: str | None
    tokens: int | None = None


class Endpoint:
    """An endpoint; safe to use from several threads.

    Args:
        base_url: root of the API, e.g. `http://127.0.0.1:8000/v1`.
        check_alive: called between attempts; raises when the server is known to be dead.
        api_key_env: environment variable that holds the key.
        transport: carries the requests instead of HTTP, see `swift_cl.serving.offline`.
    """

    def __init__(
        self,
        base_url: str,
        retry: RetryPolicy | None = None,
        check_alive: Callable[[], None] = lambda: None,
        api_key_env: str = "OPENAI_API_KEY",
        transport: "BaseTransport | None" = None,
    ) -> None:
        import os
        from urllib.parse import urlsplit

        from openai import DefaultHttpxClient, OpenAI

        self.base_url = base_url.rstrip("/")
        self.retry = retry or RetryPolicy()
        self.check_alive = check_alive
        self.api_key_env = api_key_env
        self.stopped = threading.Event()
        client: Any
        if transport is not None:
            from httpx import Client

            client = Client(transport=transport)
        else:
            # No proxy between us and our own server.
            local = urlsplit(self.base_url).hostname in ("127.0.0.1", "localhost", "::1")
            client = DefaultHttpxClient(trust_env=not local)
        self._client = OpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(api_key_env) or "none",
            max_retries=0,  # retried below, where it is known what is worth it
            timeout=self.retry.timeout,
            http_client=client,
        )

    def close(self) -> None:
        """Stop asking again, and close the connections."""
        self.stopped.set()
        self._client.close()

    def models(self) -> list[str]:
        """The names it lists.

        Raises:
            UserError: nobody answers there, or not as an OpenAI-compatible endpoint does.
        """
        from openai import OpenAIError

        try:
            return [model.id for model in self._client.models.list().data]
        except (OpenAIError, AttributeError, TypeError) as error:
            raise UserError(f"{self.base_url}: not an endpoint that lists its models ({describe(error)})") from None

    def version(self) -> str | None:
        """The version of the program that serves there; None where it does not tell (vLLM does, at /version).

        Raises:
            ConnectionError: nobody answers there.
        """
        from openai import APIConnectionError, OpenAIError

        root = self.base_url.removesuffix("/v1")
        try:
            told = self._client.get(f"{root}/version", cast_to=object, options={"timeout": 5.0, "max_retries": 2})
        except APIConnectionError as error:
            raise ConnectionError(describe(error)) from None
        except (OpenAIError, ValueError):
            return None
        version = told.get("version") if isinstance(told, dict) else None
        return version if isinstance(version, str) else None

    def ask(self, model: str, messages: Sequence[Message], generation: Generation, labels: Sequence[str] = ()) -> Reply:
        """The answer to a dialogue.

        Args:
            labels: the answer must be one of them; empty where it may be any text.

        Raises:
            QuestionFailed: this question got none, also when asked again.
            RunFailure: no question can get one (unknown model, wrong key, dead server, no constrained decoding).
        """
        reply = self._create(
            model,
            messages,
            max_tokens=generation.max_tokens,
            temperature=generation.temperature,
            extra_body={**generation.extra, **request_fields(labels)} or None,
        )
        choice = reply.choices[0]
        if choice.message.content is None:
            raise QuestionFailed(f"the response has no text (finish_reason {choice.finish_reason!r})", False)
        # JSON can spell half a character (a lone surrogate), which no UTF-8 file can hold.
        text = choice.message.content.encode("utf-8", "replace").decode()
        check_reply(text, choice.finish_reason, labels, generation.as_json(), self.base_url)
        return Reply(text, choice.finish_reason, reply.model, reply.usage.completion_tokens if reply.usage else None)

    def first_logprobs(self, model: str, messages: Sequence[Message]) -> dict[str, float] | None:
        """Log-probabilities (natural) of the likeliest first tokens; None where the endpoint does not give any."""
        try:
            reply = self._create(model, messages, max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=5)
        except QuestionFailed as failure:
            if failure.endpoint_at_fault:
                raise RunFailure(f"{self.base_url}: {failure}") from None
            return None
        content = reply.choices[0].logprobs and reply.choices[0].logprobs.content
        return {top.token: top.logprob for top in content[0].top_logprobs} if content else None

    def _create(self, model: str, messages: Sequence[Message], **fields: Any) -> "ChatCompletion":
        import tenacity

        def wait(state: "RetryCallState") -> float:
            longest = min(self.retry.longest_wait, 0.5 * 2 ** (state.attempt_number - 1))
            error = state.outcome.exception() if state.outcome else None
            return max(random.uniform(longest / 2, longest), retry_after(error))

        def before_sleep(state: "RetryCallState") -> None:
            self.check_alive()

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_retryable),
            stop=tenacity.stop_after_attempt(self.retry.attempts) | tenacity.stop_when_event_set(self.stopped),
            wait=wait,
            sleep=tenacity.sleep_using_event(self.stopped),
            before_sleep=before_sleep,
            reraise=True,
        )
        return retrying(self._once, model, messages, fields)

    def _once(self, model: str, messages: Sequence[Message], fields: dict[str, Any]) -> "ChatCompletion":
        import json

        from openai import APIConnectionError, APIStatusError, OpenAIError
        from openai.types.chat import ChatCompletion

        create: Any = self._client.chat.completions.create
        try:
            reply = create(model=model, messages=[sent(message) for message in messages], **fields)
        except APIStatusError as error:
            raise classified(error, self.base_url, model, self.api_key_env) from error
        except APIConnectionError as error:
            raise QuestionFailed(describe(error), True) from error
        except (OpenAIError, json.JSONDecodeError) as error:
            raise QuestionFailed(f"the response cannot be read ({describe(error)})", True) from error
        if not isinstance(reply, ChatCompletion) or not reply.choices:
            raise QuestionFailed("the response has no choices", True)
        return reply

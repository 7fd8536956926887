"""ms-swift's engines behind the interface of `engine.py`. Imports torch and ms-swift: import it when it is needed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from swift.infer_engine import InferRequest, RequestConfig
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.generation.engine import Answer, Batch, Prompt, Sampling, one_by_one
from swift_cl.generation.steering import steered
from swift_cl.progress import with_bar


class SwiftEngine(ABC):
    """Answers through an engine of ms-swift; what the two kinds have in common.

    Args:
        engine: ms-swift's engine, its adapter loaded by its constructor.
        chat: the template of training, in a copy of our own.
        plain: the same without a chat template, for texts that are continued.
    """

    def __init__(self, engine: Any, chat: Any, plain: Any, identity: Mapping[str, Any]) -> None:
        self.engine, self._chat, self._plain, self.identity = engine, chat, plain, identity
        self.special_tokens = [*chat.tokenizer.all_special_tokens, "�"]

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Answer]:
        """See `engine.Engine`."""
        plain = prompts[0].text is not None
        assert all((prompt.text is not None) == plain for prompt in prompts), "one batch, one kind of prompt"
        self.engine.template = self._plain if plain else self._chat
        requests = [InferRequest(messages=_messages(prompt)) for prompt in prompts]
        with self._latents(prompts):
            responses = self._infer(requests, sampling, seeds)
        return [self._read(response.choices[0], sampling) for response in responses]

    def answer_batches(self, batches: Sequence[Batch], sampling: Sampling) -> list[list[Answer]]:
        """See `engine.Engine`."""
        return one_by_one(self, batches, sampling)

    @abstractmethod
    def _infer(self, requests: list[Any], sampling: Sampling, seeds: Sequence[int]) -> list[Any]:
        """ms-swift's responses, one a request."""

    def _latents(self, prompts: Sequence[Prompt]) -> AbstractContextManager[None]:
        """Within it the prompts' latents are added to their embeddings."""
        if any(prompt.latent for prompt in prompts):
            raise UserError("this engine takes no latents; use the backend transformers")
        return nullcontext()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """See `engine.Engine`."""
        raise UserError("this engine gives no hidden states; use the backend transformers, or a sentence encoder")

    def _read(self, choice: Any, sampling: Sampling) -> Answer:
        """The answer from its token ids: ms-swift's own text may lose reasoning and tool calls."""
        template = self.engine.template
        ids = template.skip_stop_tokens(list(choice.token_ids))
        ended = len(ids) < len(choice.token_ids) or choice.finish_reason == "stop"
        text: str = template.tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
        for stop in [*sampling.stop, *(word for word in template.template_meta.stop_words if isinstance(word, str))]:
            head, found, _ = text.partition(stop)
            text, ended = head, ended or bool(found)
        return Answer(text, "stop" if ended else "length", len(choice.token_ids))


class TransformersEngine(SwiftEngine):
    """The transformers engine. It ignores `RequestConfig.seed`, so a batch draws from the seed of its first prompt."""

    def _infer(self, requests: list[Any], sampling: Sampling, seeds: Sequence[int]) -> list[Any]:
        devices = [self.engine.model.device] if self.engine.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seeds[0])
            responses: list[Any] = self.engine.infer(requests, _config(sampling), use_tqdm=False)
        return responses

    def _latents(self, prompts: Sequence[Prompt]) -> AbstractContextManager[None]:
        if not any(prompt.latent for prompt in prompts):
            return nullcontext()
        width = max(len(prompt.latent) for prompt in prompts)
        vectors = torch.tensor([prompt.latent or (0.0,) * width for prompt in prompts])
        model = self.engine.model
        return steered(model, vectors.to(model.device), answers=prompts[0].latent_on_answer)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """See `engine.Engine`. One text at a time would be slow, so texts are padded on the right, four at a time."""
        tokenizer, model = self._plain.tokenizer, self.engine.model
        model.eval()
        found = []
        for start in with_bar(range(0, len(texts), 4), "embedding", "batch"):
            ids = [tokenizer.encode(text)[: self.engine.max_model_len] or [0] for text in texts[start : start + 4]]
            width = max(map(len, ids))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=model.device)
            with torch.inference_mode():
                states: Tensor = model(
                    input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False
                ).hidden_states[-1]
            weights = mask.unsqueeze(-1)
            found.append(((states.float() * weights).sum(1) / weights.sum(1)).double().cpu().numpy())
        return np.concatenate(found)


class VllmEngine(SwiftEngine):
    """vLLM. What it draws may vary with the batch's composition, so rounds are used again by file, not drawn again."""

    def _infer(self, requests: list[Any], sampling: Sampling, seeds: Sequence[int]) -> list[Any]:
        # In the synchronous engine ms-swift gives request i of a call the seed + i, so equal prompts differ.
        responses: list[Any] = self.engine.infer(requests, _config(sampling, seeds[0]), use_tqdm=False)
        return responses


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    if prompt.text is not None:
        return [{"role": "user", "content": prompt.text}]
    return [dict(message) for message in prompt.messages]


def _config(sampling: Sampling, seed: int | None = None) -> RequestConfig:
    return RequestConfig(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k if sampling.top_k > 0 else -1,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=list(sampling.stop),
        num_beams=sampling.beams,
        seed=seed,
        return_details=True,
    )

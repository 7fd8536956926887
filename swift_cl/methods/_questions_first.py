"""Generation in two steps: a question is drawn, then the same model answers it as it would any question."""

from collections.abc import Mapping, Sequence
from typing import Any

from swift_cl.generation.engine import Answer, Engine, Prompt, Sampling
from swift_cl.methods._gen_rows import ANSWER


class QuestionsFirst:
    """Answers a prompt with `question, separator, answer`.

    Args:
        engine: the model.
        systems: the system prompt under which a question is answered, by the text of the prompt that drew it.
    """

    def __init__(self, engine: Engine, systems: Mapping[str, str]) -> None:
        self._engine, self._systems = engine, systems
        self.identity: Mapping[str, Any] = {**engine.identity, "answers": "greedy"}
        self.special_tokens = engine.special_tokens

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Answer]:
        """See `engine.Engine`. A question that was cut off or is empty gets no answer."""
        found = self._engine.answer(prompts, sampling, seeds)
        whole = [i for i, answer in enumerate(found) if answer.finish_reason == "stop" and answer.text.strip()]
        if not whole:
            return found
        asked = [Prompt.chat(self._systems[prompts[i].messages[-1]["content"]], found[i].text) for i in whole]
        answers = self._engine.answer(asked, Sampling(0.0, sampling.max_new_tokens), [seeds[i] for i in whole])
        for i, answer in zip(whole, answers, strict=True):
            text = found[i].text + ANSWER + answer.text
            found[i] = Answer(text, answer.finish_reason, found[i].tokens + answer.tokens)
        return found

    def embed(self, texts: Sequence[str]) -> Any:
        """See `engine.Engine`."""
        return self._engine.embed(texts)

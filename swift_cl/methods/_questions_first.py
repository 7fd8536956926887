"""Generation in two steps: a question is drawn, then the same model answers it as it would any question."""

from collections.abc import Mapping, Sequence
from typing import Any

from swift_cl.generation.engine import Answer, Batch, Engine, Prompt, Sampling
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
        """See `engine.Engine`."""
        return self.answer_batches([(prompts, seeds)], sampling)[0]

    def answer_batches(self, batches: Sequence[Batch], sampling: Sampling) -> list[list[Answer]]:
        """See `engine.Engine`. A question that was cut off or is empty gets no answer."""
        found = self._engine.answer_batches(batches, sampling)
        whole = [
            [i for i, answer in enumerate(answers) if answer.finish_reason == "stop" and answer.text.strip()]
            for answers in found
        ]
        second: list[Batch] = []
        for (prompts, seeds), questions, own in zip(batches, found, whole, strict=True):
            if own:
                systems = [self._systems[prompts[i].messages[-1]["content"]] for i in own]
                asked = [Prompt.chat(system, questions[i].text) for i, system in zip(own, systems, strict=True)]
                second.append((asked, [seeds[i] for i in own]))
        answered = iter(self._engine.answer_batches(second, Sampling(0.0, sampling.max_new_tokens)) if second else [])
        for questions, own in zip(found, whole, strict=True):
            for i, answer in zip(own, next(answered) if own else (), strict=True):
                text = questions[i].text + ANSWER + answer.text
                questions[i] = Answer(text, answer.finish_reason, questions[i].tokens + answer.tokens)
        return found

    def embed(self, texts: Sequence[str]) -> Any:
        """See `engine.Engine`."""
        return self._engine.embed(texts)

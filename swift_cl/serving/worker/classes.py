"""A classifier behind the API: it answers with the name of a class, among those that it has learned or that a request
names. Imported by file path, so it knows nothing of swift_cl.

The names stand beside the weights, in classes.json: `{"labels": [name of class 0, ...], "visible": [class, ...]}`, and
for one expert of several `"elsewhere"`, the logit of all classes that are not visible.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "classes.json"


class Classes:
    """The classes of one model.

    Args:
        labels: their names, by number.
        visible: the numbers of those that it answers with where a request names none.
        elsewhere: logit of the others where a request names them; None for the model's own.
    """

    def __init__(self, labels: Sequence[str], visible: Sequence[int], elsewhere: "float | None" = None) -> None:
        self.labels = list(labels)
        self._visible = list(visible)
        self._elsewhere = elsewhere

    def allowed(self, names: Sequence[str]) -> "list[int]":
        """The numbers of the classes that an answer can be.

        Raises:
            ValueError: one of the names is no class.
        """
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"structured_outputs: {unknown[0]!r} is no class of this model: {self.labels}")
        return [self.labels.index(name) for name in names] if names else self._visible

    @contextmanager
    def held(self, model: Any, names: Sequence[str]) -> "Iterator[None]":
        """Within the block the model's logits of all other classes are as low as can be."""
        import torch

        numbers = self.allowed(names)

        def outside(logits: Any, kept: "Sequence[int]") -> Any:
            others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            others[list(kept)] = False
            return others

        def hold(module: Any, args: Any, output: Any) -> Any:
            logits = output.logits.float()
            if self._elsewhere is not None:
                logits = logits.masked_fill(outside(logits, self._visible), self._elsewhere)
            output.logits = logits.masked_fill(outside(logits, numbers), torch.finfo(torch.float32).min)
            return output

        handle = model.register_forward_hook(hold)
        try:
            yield
        finally:
            handle.remove()

    def name(self, answer: Any) -> None:
        """Put names where ms-swift's answer has numbers, also in its log-probabilities."""
        for choice in answer.choices:
            choice.message.content = self.labels[choice.message.content]
            for entry in (choice.logprobs or {}).get("content", []):
                entry["token"] = self.labels[entry.pop("index")]
                entry["logprob"] = entry.pop("logprobs")
                for top in entry["top_logprobs"]:
                    top["token"] = self.labels[top.pop("index")]


def classes_of(adapters: "Mapping[str, str]") -> "dict[str | None, Classes]":
    """By adapter name its classes, and under None those of the base model: all that the first adapter has."""
    found: dict[str | None, Classes] = {}
    for name, folder in adapters.items():
        file = Path(folder) / FILE
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8"))
            found[name] = Classes(value["labels"], value["visible"], value.get("elsewhere"))
            found.setdefault(None, Classes(value["labels"], range(len(value["labels"]))))
    return found

"""How a run's questions are asked: part of every answer's key, and kept beside the answers, so that scoring counts only
what was asked in this way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.client import Generation
from swift_cl.evaluation.constrained import CONSTRAINED, FREE
from swift_cl.evaluation.pictures import Message, identified
from swift_cl.io import read_json, sha256_json, write_json

HISTORIES = ("own", "reference")
"""What later turns of a dialogue see: the model's own answers, or the data's (teacher-forced)."""
SETTINGS_SCHEMA = 1
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    Attributes:
        generation: token limit, temperature and so on.
        by_task: the same of tasks that have their own.
        backend: what generates, with its version and settings, as one text.
        history: one of `HISTORIES`.
        system: which system prompt is sent, see `plan.system_prompt`.
        decoding: one of `constrained.DECODINGS`.
    """

    generation: Generation
    backend: str
    history: str = "own"
    system: str = "stage"
    by_task: Mapping[str, Generation] = field(default_factory=dict)
    decoding: str = FREE

    @property
    def constrained(self) -> bool:
        """Whether an answer can only be a visible label."""
        return self.decoding == CONSTRAINED

    def of(self, task: str) -> Generation:
        """How answers to a task's questions are generated."""
        return self.by_task.get(task, self.generation)

    def key(
        self,
        base: str,
        weights: str,
        messages: Sequence[Message],
        task: str = "",
        labels: Sequence[str] = (),
    ) -> str:
        """Key of an answer: base model, adapter, all messages (system prompt and history), generation, backend, and the
        labels that it was constrained to."""
        asked = [identified(message) for message in messages]
        only = [sorted(labels)] if labels else []
        return sha256_json([[base, weights], asked, self.of(task).as_json(), self.backend, *only])

    def continued(self, answer: str, reference: str) -> dict[str, str]:
        """The assistant's message that later turns see."""
        return {"role": "assistant", "content": answer if self.history == "own" else reference}

    def save(self, run_dir: Path, base: str) -> None:
        """Keep them for `load_settings`, with the identity of the run's base model."""
        value: dict[str, Any] = {
            "schema": SETTINGS_SCHEMA,
            "generation": self.generation.as_json(),
            "backend": self.backend,
            "history": self.history,
            "system": self.system,
            "base": base,
        }
        if self.by_task:
            value["by_task"] = {task: generation.as_json() for task, generation in self.by_task.items()}
        if self.constrained:
            value["decoding"] = self.decoding
        file = settings_path(run_dir)
        if not file.is_file() or read_json(file) != value:
            write_json(file, value)


def settings_path(run_dir: Path) -> Path:
    """`answers/settings.json`."""
    return run_dir / "answers" / SETTINGS_FILE


def load_settings(run_dir: Path) -> tuple[Settings, str] | None:
    """The settings of a run's last asking and its base model; None for a run that was never asked, or by a version
    that did not keep them."""
    file = settings_path(run_dir)
    if not file.is_file():
        return None
    value: dict[str, Any] = read_json(file)
    if value.get("schema") != SETTINGS_SCHEMA:
        raise UserError(f"{file}: not settings of schema {SETTINGS_SCHEMA}; remove the file and evaluate again")
    by_task = {task: _generation(entry) for task, entry in value.get("by_task", {}).items()}
    made = _generation(value["generation"])
    decoding = value.get("decoding", FREE)
    return Settings(made, value["backend"], value["history"], value["system"], by_task, decoding), value["base"]


def _generation(value: Mapping[str, Any]) -> Generation:
    extra = dict(value)
    return Generation(extra.pop("max_tokens"), extra.pop("temperature"), extra)

"""The model that routes: base and adapters in this process, and the `RouteContext` of a stage on top of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState, load_method_state
from swift_cl.methods._adapters import ADAPTER_FILE, AdapterSwitch
from swift_cl.methods._routing import Candidate, Message, Route, RouteRequest
from swift_cl.methods.base import Method
from swift_cl.serving.adapters import file_digest
from swift_cl.serving.routing import RouteJob
from swift_cl.stages import STATE_DIR


class RouteModel:
    """A base model with adapters, all loaded when they are first needed (a router of texts needs none), each once.

    Args:
        make: gives a transformers model (or a PeftModel that has the adapters `loaded` already) and ms-swift's template
            in a mode of inference.
        loaded: adapter name by hash of its weights file.
    """

    def __init__(self, make: Callable[[], tuple[Any, Any]], loaded: Mapping[str, str] | None = None) -> None:
        self._make = make
        self._model: Any = None
        self._template: Any = None
        self.cache: dict[Any, Any] = {}
        self._loaded = dict(loaded or {})

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model, self._template = self._make()
        return self._model

    @property
    def template(self) -> Any:
        return self._template if self.model is not None else None

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    def encode(self, messages: Sequence[Message]) -> list[int]:
        return list(self.template.encode({"messages": [dict(message) for message in messages]})["input_ids"])

    @contextmanager
    def model_with(self, folder: Path | None) -> Iterator[Any]:
        """The model with the adapter of a folder alone, or none."""
        names = [] if folder is None else [self._name(folder)]
        with AdapterSwitch(self.model).active(*names):
            yield self.model

    def _name(self, folder: Path) -> str:
        digest = file_digest(folder / ADAPTER_FILE)
        if digest not in self._loaded:
            from peft import PeftModel

            name = f"route_{digest[:16]}"
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            else:
                self._model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name, is_trainable=False)
            self.model.eval()
            self._loaded[digest] = name
        return self._loaded[digest]


def load_base(model: str, model_args: Mapping[str, str]) -> tuple[Any, Any]:
    """A base model and its template, as a server would load them."""
    from swift.model import get_model_processor
    from swift.template import get_template

    dtype, labels = model_args.get("torch_dtype"), model_args.get("num_labels")
    loaded, processor = get_model_processor(
        model,
        model_type=model_args.get("model_type"),
        torch_dtype=getattr(torch, dtype) if dtype else None,
        task_type=model_args.get("task_type"),
        num_labels=int(labels) if labels else None,
    )
    return loaded.eval(), get_template(processor, template_type=model_args.get("template"))


@dataclass(frozen=True)
class StageRouter:
    """`RouteContext` of one stage, and the call of its method.

    Attributes:
        candidates: with absolute folders.
    """

    method: Method
    stage_dir: Path
    tasks: list[str]
    candidates: list[Candidate]
    on: RouteModel

    @property
    def state_dir(self) -> Path:
        return self.stage_dir / STATE_DIR

    @property
    def device(self) -> Any:
        return self.on.device

    @property
    def cache(self) -> dict[Any, Any]:
        return self.on.cache

    def state(self) -> MethodState:
        key = ("state", str(self.stage_dir.resolve()), self.method.name)
        if key not in self.cache:
            self.cache[key] = load_method_state(self.state_dir, self.method.name)
        found: MethodState = self.cache[key]
        return found

    def adapter_sha256(self, folder: Path) -> str:
        return file_digest(folder / ADAPTER_FILE)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        return self.on.encode(messages)

    def model_with(self, folder: Path | None) -> Any:
        return self.on.model_with(folder)

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        """The method's choices, checked."""
        with torch.no_grad():
            routes = list(self.method.route(self, requests))
        names = {candidate.name for candidate in self.candidates}
        for route in routes:
            if route.chosen not in names:
                raise RunFailure(
                    f"method '{self.method.name}' chose {route.chosen!r}, its candidates are {', '.join(sorted(names))}"
                )
        if len(routes) != len(requests):
            raise RunFailure(f"method '{self.method.name}' made {len(routes)} choices for {len(requests)} questions")
        return routes


def router_of(job: RouteJob, model: RouteModel) -> StageRouter:
    """The router of a job's stage, with its method as it was configured in training."""
    from swift_cl.methods.registry import get_method

    kind = get_method(job.method)
    try:
        method = kind(kind.config_class(**job.settings))
    except TypeError as error:
        raise UserError(f"method '{job.method}' of this version does not have the stage's settings ({error})") from None
    candidates = [Candidate(c["name"], tuple(c["tasks"]), Path(c["dir"])) for c in job.candidates]
    return StageRouter(method, Path(job.stage_dir), job.tasks, candidates, model)

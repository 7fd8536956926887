"""The server process: ms-swift's deploy pipeline with adapters that can be batched.

Run by file path in any environment that has ms-swift 4.6, so it imports nothing of swift_cl, except, with
SWIFT_CL_PLUGINS set, the tuners that PEFT and the models that ms-swift does not know. Flags: those of `swift deploy`.
Differences (the last two are the transformers backend's):

- A request may say which texts an answer can be, see `choices.py`; a classifier answers with names, see `classes.py`.
- It ends when the process that started it is gone, even by SIGKILL, and takes its children with it.
- All adapters are loaded at start, so that one that does not fit stops the server at once and not at a request.
- ms-swift passes PEFT one adapter name for a batch of n rows, which PEFT refuses for n > 1. Its batches hold one
  adapter only, so switching the active adapter before a batch gives the same answers, at full batch size.
"""

import os
import time
from contextlib import nullcontext
from typing import Any

from choices import Choices, as_expression, asked_for, packed, unpacked  # type: ignore[import-not-found]
from classes import classes_of  # type: ignore[import-not-found]
from fastapi import Request
from starter import watch_starter  # type: ignore[import-not-found]
from swift.infer_engine import AdapterRequest, TransformersEngine
from swift.infer_engine.protocol import ChatCompletionRequest
from swift.pipelines.infer.deploy import SwiftDeploy

HELD = {"transformers": packed, "vllm": as_expression}
"""How the texts that an answer can be are handed to an engine."""


class AdapterEngine(TransformersEngine):
    """Switches the active adapter once a batch."""

    gather_seconds = 0.02

    def preload(self, adapters: "dict[str, str]") -> None:
        """Load adapters by name; no later request loads anything."""
        self.base_alone = not adapters
        self.classes = classes_of(adapters)
        for name, path in adapters.items():
            self._add_adapter(path, name)
            self._adapters_pool[name] = AdapterRequest(name, path)
        if adapters and self.model.active_peft_config.is_prompt_learning:
            self.model.__class__ = prompted(type(self.model))
        self.model.eval()

    def _get_adapter_names(self, adapter_request: Any) -> None:
        """No names in the call: `_activate` has chosen already."""

    def _fetch_infer_requests(self) -> Any:
        # A batch that ends frees its clients together; waiting until their next questions are all there keeps batches
        # full instead of splitting them into one and the rest.
        waiting = -1
        while not self._queue.empty() and waiting != self._queue.qsize() < self.max_batch_size:
            waiting = self._queue.qsize()
            time.sleep(self.gather_seconds)
        return super()._fetch_infer_requests()

    def _activate(self, adapter_request: Any) -> Any:
        if adapter_request is None:
            return nullcontext() if self.base_alone else self.model.disable_adapter()
        self.model.set_adapter(adapter_request.name, inference_mode=True)
        return nullcontext()

    def _constrained(self, inputs: Any, request_config: Any, generation_config: Any) -> Any:
        """The inputs of `generate`, with the texts that the answers are held to."""
        texts = unpacked(request_config.structured_outputs_regex)
        if not texts:
            return inputs
        ends = generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [self.tokenizer.eos_token_id if ends is None else ends]
        sequences = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return {**inputs, "prefix_allowed_tokens_fn": Choices(sequences, ends)}

    def _infer_full(self, inputs: Any, *, adapter_request: Any, **kwargs: Any) -> Any:
        inputs = self._constrained(inputs, kwargs["request_config"], kwargs["generation_config"])
        with self._activate(adapter_request):
            answers = super()._infer_full(inputs, adapter_request=None, **kwargs)
        if adapter_request is not None:
            for answer in answers:
                answer.model = adapter_request.name
        return answers

    def _infer_forward(self, inputs: Any, adapter_request: Any, request_config: Any, **kwargs: Any) -> Any:
        classes = self.classes.get(adapter_request.name if adapter_request else None)
        texts = unpacked(request_config.structured_outputs_regex)
        with self._activate(adapter_request), classes.held(self.model, texts) if classes else nullcontext():
            answers = super()._infer_forward(inputs, None, request_config, **kwargs)
        for answer in answers:
            if classes:
                classes.name(answer)
            if adapter_request is not None:
                answer.model = adapter_request.name
        return answers

    def _infer_stream(self, inputs: Any, *, adapter_request: Any, **kwargs: Any) -> Any:
        inputs = self._constrained(inputs, kwargs["request_config"], kwargs["generation_config"])
        with self._activate(adapter_request):
            for chunks in super()._infer_stream(inputs, adapter_request=None, **kwargs):
                for chunk in chunks:
                    if chunk is not None and adapter_request is not None:
                        chunk.model = adapter_request.name
                yield chunks


def prompted(kind: type) -> type:
    """The class of a model with trained prompts, whose `model` is the base model: ms-swift asks it for `generate`, and
    PEFT's own `model` is the backbone inside it."""
    return type(kind.__name__, (kind,), {"model": property(lambda self: self.base_model)})


class AdapterDeploy(SwiftDeploy):
    """Deploys with `AdapterEngine` where ms-swift would use its transformers engine."""

    infer_engine: Any
    engine_class = AdapterEngine

    def __init__(self, args: Any = None) -> None:
        if os.environ.get("SWIFT_CL_PLUGINS"):
            from swift_cl.models import register_models
            from swift_cl.tuners import register_tuners

            register_tuners()
            register_models()
        super().__init__(args)
        if self.args.infer_backend == "transformers":
            mapping = self.args.adapter_mapping
            engine = self.engine_class(
                self.infer_engine.model, template=self.template, max_batch_size=self.args.max_batch_size
            )
            engine.strict = True
            engine.preload(mapping)
            self.infer_engine = engine
        # ms-swift silently takes another port if the one asked for is in use.
        print(f"swift-cl server port {self.args.port}", flush=True)

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request, *, return_cmpl_response: bool = False
    ) -> Any:
        try:
            texts = asked_for(await raw_request.json())
        except ValueError as error:
            return self.create_error_response(400, str(error))
        if texts and self.args.infer_backend not in HELD:
            return self.create_error_response(400, f"structured_outputs: {self.args.infer_backend} has none here")
        if texts:
            request.structured_outputs_regex = HELD[self.args.infer_backend](texts)
        return await super().create_chat_completion(request, raw_request, return_cmpl_response=return_cmpl_response)


if __name__ == "__main__":
    watch_starter()
    AdapterDeploy().main()

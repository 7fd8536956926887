"""The server process: ms-swift's deploy pipeline with adapters that can be batched.

Run by file path in any environment that has ms-swift 4.6, so it imports nothing of swift_cl, except the tuners whose
adapters PEFT does not know, with SWIFT_CL_TUNERS set. Flags: those of `swift deploy`. Differences (the last two are the
transformers backend's):

- It ends when the process that started it is gone, even by SIGKILL, and takes its children with it.
- All adapters are loaded at start, so that one that does not fit stops the server at once and not at a request.
- ms-swift passes PEFT one adapter name for a batch of n rows, which PEFT refuses for n > 1. Its batches hold one
  adapter only, so switching the active adapter before a batch gives the same answers, at full batch size.
"""

import os
import time
from contextlib import nullcontext
from typing import Any

from starter import watch_starter  # type: ignore[import-not-found]
from swift.infer_engine import AdapterRequest, TransformersEngine
from swift.pipelines.infer.deploy import SwiftDeploy


class AdapterEngine(TransformersEngine):
    """Switches the active adapter once a batch."""

    gather_seconds = 0.02

    def preload(self, adapters: "dict[str, str]") -> None:
        """Load adapters by name; no later request loads anything."""
        self.base_alone = not adapters
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

    def _infer_full(self, inputs: Any, *, adapter_request: Any, **kwargs: Any) -> Any:
        with self._activate(adapter_request):
            answers = super()._infer_full(inputs, adapter_request=None, **kwargs)
        if adapter_request is not None:
            for answer in answers:
                answer.model = adapter_request.name
        return answers

    def _infer_forward(self, inputs: Any, adapter_request: Any, request_config: Any, **kwargs: Any) -> Any:
        with self._activate(adapter_request):
            return super()._infer_forward(inputs, None, request_config, **kwargs)

    def _infer_stream(self, inputs: Any, *, adapter_request: Any, **kwargs: Any) -> Any:
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
        if os.environ.get("SWIFT_CL_TUNERS"):
            from swift_cl.tuners import register_tuners

            register_tuners()
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


if __name__ == "__main__":
    watch_starter()
    AdapterDeploy().main()

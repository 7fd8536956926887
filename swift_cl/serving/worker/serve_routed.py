"""The server process of `swift-cl deploy --route`: that of `serve_adapters.py` with one more model name, `auto`.

A question for `auto` goes to the adapter that the run's last stage chooses for it; the response names that adapter.
Unlike the other workers it needs swift_cl. SWIFT_CL_ROUTE_RUN is the run's folder.
"""

import asyncio
import os
from copy import copy
from pathlib import Path
from typing import Any

from serve_adapters import AdapterDeploy, AdapterEngine, watch_starter  # type: ignore[import-not-found]
from swift.infer_engine import AdapterRequest

from swift_cl.methods._routing import RouteRequest
from swift_cl.serving.adapters import file_digest
from swift_cl.serving.routing import AUTO, job_of
from swift_cl.serving.routing.model import RouteModel, StageRouter, router_of
from swift_cl.stages import WEIGHTS, load_run

REMEMBERED = 20_000
"""Entries of the router's cache after which it is emptied: a server runs for weeks."""


class RoutedEngine(AdapterEngine):
    """Before a batch for `auto` is answered, each question is put back into the queue under its adapter's name."""

    router: StageRouter
    systems: dict[str, str | None]
    names: dict[str, str]

    def _fetch_infer_requests(self) -> Any:
        batch = super()._fetch_infer_requests()
        if batch is None:
            return None
        kwargs, waiting = batch
        if kwargs["adapter_request"] is None or kwargs["adapter_request"].name != AUTO:
            return batch
        try:
            adapters = self._choose(kwargs["infer_requests"])
        except Exception as error:  # as the engine does with a batch that fails: these requests alone get it
            for queue, loop in waiting:
                asyncio.run_coroutine_threadsafe(queue.put(error), loop)
            return None
        for (request, adapter), client in zip(adapters, waiting, strict=True):
            own = {key: value for key, value in kwargs.items() if key != "infer_requests"}
            self._queue.put((request, {**own, "adapter_request": adapter}, client))
        return self._fetch_infer_requests()

    def _choose(self, infer_requests: list[Any]) -> list[tuple[Any, AdapterRequest]]:
        """Each request as the chosen adapter is asked it: under its stage's system prompt, unless it brings its own."""
        if len(self.router.cache) > REMEMBERED:
            self.router.cache.clear()
        asked = [self._as_route_request(request) for request in infer_requests]
        if len(self.router.candidates) == 1:
            chosen = [self.router.candidates[0].name] * len(asked)
        else:
            chosen = [route.chosen for route in self.router.route(asked)]
        found = []
        for request, name in zip(infer_requests, chosen, strict=True):
            if request.messages[0]["role"] != "system" and self.systems[name] is not None:
                request = copy(request)
                request.messages = [{"role": "system", "content": self.systems[name]}, *request.messages]
            found.append((request, self._adapters_pool[self.names[name]]))
        return found

    def _as_route_request(self, request: Any) -> RouteRequest:
        messages = [dict(message) for message in request.messages]
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        last = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        systems = self.systems if system is None else dict.fromkeys(self.systems, system)
        return RouteRequest(tuple(messages[: last + 1]), systems, system)


class RoutedDeploy(AdapterDeploy):
    """Lists `auto` beside the base and the adapters."""

    engine_class = RoutedEngine

    def __init__(self, args: Any = None) -> None:
        super().__init__(args)
        stage = load_run(Path(os.environ["SWIFT_CL_ROUTE_RUN"])).stages[-1]
        assert stage.route is not None
        engine, mapping = self.infer_engine, dict(self.args.adapter_mapping)
        served = {file_digest(Path(path) / WEIGHTS): name for name, path in mapping.items()}
        job = job_of(stage)
        engine.names = {entry["name"]: served[entry["sha256"]] for entry in job.candidates}
        engine.systems = {entry["name"]: entry["system"] for entry in job.candidates}
        engine.router = router_of(job, RouteModel(lambda: (engine.model, engine.template), served))
        self.args.adapter_mapping[AUTO] = AUTO


if __name__ == "__main__":
    watch_starter()
    RoutedDeploy().main()

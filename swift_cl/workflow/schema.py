"""JSON schemas of the run file and of the benchmark file, made from the models that check these files.

Published as assets/schemas/{run,benchmark}.schema.json; an editor that knows the YAML language server takes one
from a first line such as `# yaml-language-server: $schema=../assets/schemas/run.schema.json`.
"""

import re
from typing import Any

from pydantic import BaseModel

from swift_cl.stream.benchmark_file import BenchmarkModel
from swift_cl.workflow.config import RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MODELS: dict[str, type[BaseModel]] = {"run": RunConfig, "benchmark": BenchmarkModel}


def schema(name: str) -> dict[str, Any]:
    """The schema of a `run` or `benchmark` file."""
    found = MODELS[name].model_json_schema()
    made = {"$schema": DIALECT, **found, "title": f"swift_cl {name} file"}
    for model in (MODELS[name], *_inner(MODELS[name])):
        part = made if model is MODELS[name] else made["$defs"][model.__name__]
        part["description"] = _summary(model)
        for key, text in _attributes(model).items():
            part["properties"][key]["description"] = text
    return made


def _inner(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that a model's fields hold, alone or in lists."""
    annotations = [field.annotation for field in model.model_fields.values()]
    arguments = [entry for a in annotations for entry in (a, *getattr(a, "__args__", ()))]
    found = [entry for entry in arguments if isinstance(entry, type) and issubclass(entry, BaseModel)]
    return [*found, *(deeper for entry in found for deeper in _inner(entry))]


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """What the docstring's section `Attributes` says of each key."""
    _, _, section = (model.__doc__ or "").partition("Attributes:\n")
    entries = re.split(r"\n {8}(?=\w)", "\n" + section.rstrip())[1:]
    told = [entry.split(":", 1) for entry in entries]
    return {name.strip(): " ".join(text.split()) for names, text in told for name in names.split(",")}

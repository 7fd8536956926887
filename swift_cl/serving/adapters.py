"""What is served: a base model and adapters under names with their content hash; checks that load no model."""

import json
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.io import read_json, sha256_file, sha256_json
from swift_cl.stages import STAGE_FILE, WEIGHTS, Stage

LORA_KEYS = (("lora_A", 1), ("lora_B", 0), ("moelora_A", 1), ("moelora_B", 0))
NO_EFFECT = (".lora_B.", ".moelora_B.", ".houlsby_up.", ".lora_E")
"""Tensors that are all zero before the first step."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of one stage.

    Attributes:
        name: the name it is served under, `<stage folder>-<first 8 of its hash>`: a changed adapter gets another
            name, so that no server can answer from a cache of the old one.
        path: its folder.
        sha256: hash of its weights file.
    """

    name: str
    path: Path
    sha256: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its adapter_config.json."""
        value = read_json(self.path / "adapter_config.json")
        if not isinstance(value, dict) or "peft_type" not in value:
            raise UserError(f"{self.path / 'adapter_config.json'}: not an adapter's configuration (no peft_type)")
        return value

    @property
    def peft_type(self) -> str:
        """LORA, or another type of PEFT's."""
        return str(self.config["peft_type"])

    @property
    def rank(self) -> int:
        """The highest rank of its layers, which vLLM has to know at start."""
        pattern = self.config.get("rank_pattern") or {}
        return max([int(self.config.get("r") or 0), *(int(rank) for rank in pattern.values())])


@dataclass(frozen=True)
class Deployment:
    """What one server holds.

    Attributes:
        model: folder or hub id of the base model (or of a fully fine-tuned one).
        model_args: model_type, template, torch_dtype of the run: the server is told them, it never guesses.
        adapters: served next to the base.
    """

    model: str
    model_args: dict[str, str] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()

    @property
    def base_name(self) -> str:
        """The name the base model is served under."""
        return Path(self.model.rstrip("/")).name

    @property
    def names(self) -> list[str]:
        """All names the server lists, the base first."""
        return [self.base_name, *(adapter.name for adapter in self.adapters)]


def stage_adapter(stage: Stage) -> Adapter:
    """The adapter of a stage that was tuned with one."""
    assert stage.weights_sha256 is not None, f"{stage.dir} holds a full model, not an adapter"
    return Adapter(f"{stage.dir.name}-{stage.weights_sha256[:8]}", stage.weights_dir, stage.weights_sha256)


def candidate_stages(stage: Stage, own: Iterable[Stage]) -> list[Stage]:
    """For a stage that routes, its candidates in order, each as the stage that it would be if it had one of its own: an
    adapter, and the system prompt that belongs to it. Empty for a stage that answers itself.

    Args:
        own: the stages of the run; a candidate with the adapter of one of them is that stage.

    Raises:
        UserError: a candidate is missing, or is not the one that the stage recorded.
    """
    by_hash = {other.weights_sha256: other for other in own}
    found = []
    for entry in (stage.route or {}).get("candidates", ()):
        folder = (stage.dir / entry["dir"]).resolve()
        if file_digest(folder / WEIGHTS) != entry["sha256"]:
            raise UserError(
                f"{folder / WEIGHTS}: differs from the hash in {stage.dir / STAGE_FILE}; it was changed or cut off, or "
                "an earlier stage was trained again"
            )
        known = by_hash.get(entry["sha256"])
        if known is None:
            known = replace(stage, weights=entry["dir"], weights_sha256=entry["sha256"], probe=None, route=None)
        found.append(replace(known, system=entry["system"]))
    return found


def run_adapters(stages: Sequence[Stage]) -> tuple[Adapter, ...]:
    """All adapters of a run, each content once: those of its stages, and those that its stages choose from."""
    own = [stage for stage in stages if stage.weights_sha256 is not None]
    every = [*own, *(candidate for stage in stages for candidate in candidate_stages(stage, own))]
    return unique(stage_adapter(stage) for stage in every)


def weights_id(model: str) -> str:
    """An id of a model's weights that survives moving the folder: a hub id as it is, else a hash of the folder's
    configuration and weight files (the shards side by side: seconds for 15 GB)."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted([*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise UserError(f"{model}: no config.json and no weights in this folder, so it is not a model")
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, files))
    return sha256_json([[file.name, digest] for file, digest in zip(files, digests, strict=True)])


def file_digest(file: Path) -> str:
    """Hash of a file that is asked for again and again, computed anew only when the file has changed."""
    if not file.is_file():
        raise UserError(f"{file}: file not found")
    return _digest(file, file.stat().st_size, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(file: Path, size: int, changed: int) -> str:
    """Hash of a file, computed once for several runs on one base; size and time of change make a new one count."""
    return sha256_file(file)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file, read from its header alone."""
    with open(file, "rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        except (struct.error, ValueError, OverflowError, MemoryError):
            raise UserError(f"{file}: not a safetensors file, or cut off") from None
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def is_all_zero(adapter: Adapter) -> bool:
    """Whether an adapter changes nothing: every B is zero, as before its first step."""
    from safetensors import safe_open

    with safe_open(adapter.path / WEIGHTS, framework="np") as file:
        names = [name for name in list(file.keys()) if any(part in name for part in NO_EFFECT)]
        return bool(names) and all(not file.get_tensor(name).any() for name in names)


def check_deployment(deployment: Deployment) -> None:
    """Find what cannot be served together before anything starts.

    Raises:
        UserError: two types of adapters on one server, an unreadable adapter, or one that belongs to another base.
    """
    types: dict[str, Adapter] = {}
    for adapter in deployment.adapters:
        types.setdefault(adapter.peft_type, adapter)
    if len(types) > 1:
        found = ", ".join(f"{kind} ({adapter.path})" for kind, adapter in types.items())
        raise UserError(f"one server holds adapters of one type, found {found}; evaluate these runs separately")
    folder = Path(deployment.model)
    if not folder.is_dir() and (folder.is_absolute() or deployment.model.startswith(".")):
        raise UserError(f"{folder}: the base model's folder was not found; pass --model with the place where it is now")
    shapes: dict[str, list[int]] = {}
    if folder.is_dir():
        for file in sorted(folder.glob("*.safetensors")):
            shapes.update({_layer(name): shape for name, shape in tensor_shapes(file).items()})
    for adapter in deployment.adapters:
        _check_fits(adapter, deployment.model, shapes)


def _layer(name: str) -> str:
    """A weight's name without the parts that files and modules of a vision-language model have in other places."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _check_fits(adapter: Adapter, model: str, base: dict[str, list[int]]) -> None:
    """Compare an adapter's shapes with the base's weights; a base without local safetensors cannot be compared."""
    for name, shape in tensor_shapes(adapter.path / WEIGHTS).items():
        for key, side in LORA_KEYS:
            if f".{key}." not in name:
                continue
            layer = name.removeprefix("base_model.model.").split(f".{key}.")[0]
            weight = base.get(_layer(f"{layer}.weight"))
            if base and weight is None:
                raise UserError(f"{adapter.path}: the adapter changes {layer}, which the model {model} does not have")
            if weight is not None and len(shape) == 2 and shape[side] != weight[side]:
                raise UserError(
                    f"{adapter.path}: {key} of {layer} has size {shape[side]}, the model {model} needs {weight[side]}; "
                    "the adapter belongs to another base model"
                )


def unique(adapters: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """Each content once: two runs may share a first stage."""
    by_hash: dict[str, Adapter] = {}
    for adapter in adapters:
        by_hash.setdefault(adapter.sha256, adapter)
    return tuple(by_hash.values())

"""An adapter of another tuner, written as a LoRA that any server of LoRA loads. Imports torch when it is called."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError
from swift_cl.io import atomic_write, read_json, sha256_file, write_json
from swift_cl.tuners.base import LoraPair
from swift_cl.tuners.registry import tuner_of_type

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "plain_lora.json"


def write_plain_lora(adapter: Path, output: Path) -> int:
    """Write the LoRA that computes what an adapter computes; returns its rank.

    All layers get the largest rank that one of them needs, the others rows of zeros: vLLM takes one rank a file.

    Args:
        adapter: folder with adapter_config.json.
        output: a folder that is not there yet.

    Raises:
        UserError: there is no such LoRA, or a folder is not as it should be.
    """
    if not (adapter / CONFIG).is_file():
        raise UserError(f"{adapter}: no adapter, {CONFIG} not found")
    if output.exists():
        raise UserError(f"{output}: is there already; name a new folder")
    from safetensors.torch import load_file, save

    config = read_json(adapter / CONFIG)
    tuner = tuner_of_type(config["peft_type"])
    if tuner is None:
        raise UserError(f"{adapter}: is of type {config['peft_type']}, which PEFT knows by itself; nothing to do")
    tensors = load_file(adapter / WEIGHTS)
    pairs = tuner.as_lora(tensors, config)
    layers = tuple(f"{layer}." for layer in pairs)
    other = [name for name in tensors if not name.startswith(layers)]
    if other or not pairs:
        raise UserError(f"{adapter}: trained {', '.join(other[:3]) or 'nothing'}, which a plain LoRA does not hold")
    rank = max(1, *(len(pair.a) for pair in pairs.values()))
    found: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        found |= {f"{layer}.{name}.weight": tensor for name, tensor in _of_rank(rank, pair).items()}
    write_json(output / CONFIG, _config(config, rank))
    record = {"schema_version": 1, "from": str(adapter), "tuner": tuner.name, "sha256": sha256_file(adapter / WEIGHTS)}
    write_json(output / RECORD, record)
    with atomic_write(output / WEIGHTS) as stream:
        stream.write(save(found, {"format": "pt"}))
    return rank


def _of_rank(rank: int, pair: LoraPair) -> "dict[str, Tensor]":
    """A and B with zeros up to a rank; the scale is in B, so that lora_alpha / rank is 1 for every layer."""
    from torch.nn.functional import pad

    missing = rank - len(pair.a)
    return {
        "lora_A": pad(pair.a, (0, 0, 0, missing)).contiguous(),
        "lora_B": (pad(pair.b, (0, missing)) * pair.scale).contiguous(),
    }


def _config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    from peft import LoraConfig

    made = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=config["target_modules"],
        exclude_modules=config.get("exclude_modules"),
        task_type=config["task_type"],
        base_model_name_or_path=config["base_model_name_or_path"],
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in made.items()}

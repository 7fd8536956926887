"""Finding what training left on disk: finished stages, and checkpoints that are complete."""

import json
import re
import struct
from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.io import read_json
from swift_cl.stages import STAGE_FILE, WEIGHTS, load_stage

STARTED_FILE = "stage_started.json"
FSDP_MODEL, FSDP_OPTIMIZER, FSDP_INDEX = "pytorch_model_fsdp_0", "optimizer_0", ".metadata"
"""accelerate's folders of FSDP2's parts, which training alone reads again, and the file that is written there last."""
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", f"{FSDP_OPTIMIZER}/{FSDP_INDEX}")


def safetensors_complete(path: Path) -> bool:
    """Whether a safetensors file has all the bytes that its header promises (a cut-off file has not)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            if header_size > size - 8:
                return False
            header = json.loads(stream.read(header_size))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        return bool(size == 8 + header_size + end)
    except (OSError, struct.error, ValueError, KeyError, TypeError):
        return False


def _progress(checkpoint: Path) -> tuple[int, int] | None:
    """(step, last step) of a complete checkpoint; None for one that was cut off.

    The Trainer writes trainer_state.json after weights, optimizer and random state, so without it (or with a half one)
    the folder is not complete.
    """
    try:
        state = read_json(checkpoint / "trainer_state.json")
        step, last = int(state["global_step"]), int(state["max_steps"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    if (checkpoint / FSDP_MODEL / FSDP_INDEX).is_file():
        return step, last
    weights = set(checkpoint.glob("*.safetensors")) | _listed_shards(checkpoint)
    if not weights or not all(safetensors_complete(file) for file in weights):
        return None
    if (checkpoint / WEIGHTS).exists() and not (checkpoint / "adapter_config.json").is_file():
        return None
    return step, last


def _is_checkpoint(folder: Path) -> bool:
    return bool(re.fullmatch(r"checkpoint-\d+", folder.name)) and folder.is_dir() and not folder.is_symlink()


def _listed_shards(checkpoint: Path) -> set[Path]:
    """The files that a sharded model's index names."""
    shards = set()
    for index in checkpoint.glob("*.safetensors.index.json"):
        try:
            shards |= {checkpoint / name for name in read_json(index)["weight_map"].values()}
        except (UserError, KeyError, TypeError, AttributeError):
            shards.add(index)  # a half index: no safetensors file, so the checkpoint does not count as complete
    return shards


def complete_checkpoints(output_dir: Path) -> list[tuple[int, int, Path]]:
    """(step, last step, folder) of the complete checkpoints of one training output, oldest first."""
    found = []
    if output_dir.is_dir():
        for folder in output_dir.iterdir():
            if _is_checkpoint(folder):
                progress = _progress(folder)
                if progress is not None:
                    found.append((*progress, folder))
    return sorted(found)


def resumable_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint that also has what resuming needs, or None."""
    for _, _, folder in reversed(complete_checkpoints(output_dir)):
        written = any((folder / name).is_file() for name in OPTIMIZERS)
        if written or any(folder.glob("global_step*")) or any(folder.glob("portable/*")):
            return folder
    return None


def versions(folder: Path) -> list[Path]:
    """The `v0-<time>`, `v1-<time>`, ... folders that ms-swift makes in an output folder, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("v*-*") if (match := re.match(r"v(\d+)-", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_stage_dir(folder: Path) -> Path:
    """The folder with `stage.json`: `folder` itself, or its newest finished version."""
    return next((path for path in (folder, *versions(folder)) if (path / STAGE_FILE).is_file()), folder)


def resolve_adapter(folder: Path) -> Path:
    """The adapter (or full model) folder that the next stage starts from.

    A finished stage of ours gives its recorded weights, checked by hash. An output of plain `swift sft` gives the
    complete checkpoint of its last step. Checkpoints that were cut off are never chosen.

    Raises:
        UserError: there is none; the message says what was found.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: folder not found")
    stage_dir = find_stage_dir(folder)
    if (stage_dir / STAGE_FILE).is_file():
        return load_stage(stage_dir).weights_dir
    if (folder / "adapter_config.json").is_file():
        # An adapter folder itself. One that is a checkpoint must be a whole one.
        if safetensors_complete(folder / WEIGHTS) and not (_is_checkpoint(folder) and _progress(folder) is None):
            return folder.resolve()
        raise UserError(f"{folder}: the adapter in this folder was cut off while it was written")
    unfinished = ""
    for output in (folder, *versions(folder)):
        # A stage of ours without stage.json stopped before its state was written: its checkpoint is not enough.
        ours = (output / STARTED_FILE).is_file()
        for step, last, checkpoint in reversed(complete_checkpoints(output)):
            parts = (checkpoint / FSDP_MODEL).is_dir()
            if step == last and not ours and not parts:
                return checkpoint.resolve()
            reason = "the stage's end was not written" if step == last else f"training stopped at step {step} of {last}"
            if parts and not ours:
                reason = "only FSDP2's parts of the weights were written (its state_dict_type is SHARDED_STATE_DICT)"
            unfinished = unfinished or f": {reason} ({checkpoint.name} is its last complete checkpoint)"
        if not unfinished and any(_is_checkpoint(path) for path in output.iterdir()):
            unfinished = ": its checkpoints were cut off while they were written"
    raise UserError(f"{folder}: no finished stage and no complete final checkpoint{unfinished}")

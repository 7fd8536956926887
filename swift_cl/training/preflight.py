"""Checks of one stage's inputs that need no torch: everything that can be said before anything starts."""

import json
from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.io import read_json
from swift_cl.stages import Stage, load_stage
from swift_cl.stream.readers import read_rows
from swift_cl.training.checkpoints import find_stage_dir
from swift_cl.training.flags import first

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".txt")


def check_data(specs: list[str]) -> None:
    """Check local data files of `--dataset`; specs that are not local files are ms-swift's business.

    Raises:
        UserError: a file is missing or empty, or (messages format) a row is malformed.
    """
    for spec in specs:
        name = spec.rsplit("#", 1)[0]
        path = Path(name)
        if path.suffix not in DATA_SUFFIXES and not path.exists():
            continue
        if not path.is_file():
            if path.is_dir():
                continue
            raise UserError(f"--dataset {name}: data file not found")
        if path.stat().st_size == 0:
            raise UserError(f"--dataset {name}: the data file is empty")
        if path.suffix in (".json", ".jsonl") and _looks_like_messages(path):
            read_rows(path, "messages")


def _looks_like_messages(path: Path) -> bool:
    text = path.read_text(encoding="utf-8").lstrip()
    if text.startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        return not rows or any(isinstance(row, dict) and "messages" in row for row in rows)
    return '"messages"' in text.splitlines()[0]


def looks_local(model: str) -> bool:
    """Whether a model name is meant as a path and not as a hub id."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def check_model(model: str) -> None:
    """Refuse a local model folder that is missing or has no config.json."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {model}: the folder has no config.json, so it holds no model")
    elif looks_local(model):
        raise UserError(f"--model {model}: model folder not found")


def load_previous(folder: str | None) -> Stage | None:
    """The stage before; a missing, unfinished or damaged one is a `UserError`."""
    if folder is None:
        return None
    return load_stage(find_stage_dir(Path(folder)))


def _same_model(first: str, second: str) -> bool:
    if first == second:
        return True
    one, two = Path(first).expanduser(), Path(second).expanduser()
    if one.is_dir() and two.is_dir():
        if one.resolve() == two.resolve():
            return True
        return bool(read_json(one / "config.json") == read_json(two / "config.json"))
    return one.name == two.name


def check_adapter(adapter: Path, model: str | None, given: dict[str, list[str]], trained_on: str | None) -> None:
    """Check that an adapter can be continued on this base with these flags.

    Args:
        adapter: folder with adapter_config.json.
        model: the base model of this stage.
        given: flags given explicitly.
        trained_on: base model that the adapter's stage recorded.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"--adapters {adapter}: no adapter_config.json in this folder, so it holds no adapter")
    config = read_json(adapter / "adapter_config.json")
    base = trained_on or config.get("base_model_name_or_path")
    if model and base and not _same_model(base, model):
        raise UserError(f"--adapters {adapter}: trained on base model {base}, but --model is {model}")
    for flag, key in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
        if given.get(flag) and key in config and float(given[flag][0]) != float(config[key]):
            raise UserError(
                f"--{flag} is {given[flag][0]}, but the adapter that is continued ({adapter}) has {config[key]}"
            )


def start_of_stage(given: dict[str, list[str]], previous: Stage | None) -> tuple[str | None, str | None]:
    """(adapter to continue, model to start from instead of --model) of a stage.

    Raises:
        UserError: the adapter does not exist, is not the previous stage's, or does not fit the base model.
    """
    model = first(given, "model")
    adapters = given.get("adapters", [])
    if len(adapters) > 1:
        raise UserError(f"--adapters names {len(adapters)} adapters, a stage continues exactly one")
    for adapter in adapters:
        if not Path(adapter).is_dir():
            raise UserError(f"--adapters {adapter}: folder not found")
    if previous is None:
        if adapters:
            check_adapter(Path(adapters[0]), model, given, None)
        return (adapters[0] if adapters else None), None
    tuner = (given.get("tuner_type") or ["lora"])[0]
    if tuner != previous.tuner_type:
        raise UserError(
            f"--tuner_type is {tuner!r}, but the previous stage {previous.dir} used {previous.tuner_type!r}"
        )
    if previous.tuner_type == "full":
        return None, str(previous.weights_dir)
    if adapters and Path(adapters[0]).resolve() != previous.weights_dir:
        raise UserError(
            f"--adapters {adapters[0]} is not the adapter of --cl_previous ({previous.weights_dir}); leave one out"
        )
    check_adapter(previous.weights_dir, model, given, previous.base_model)
    return str(previous.weights_dir), None

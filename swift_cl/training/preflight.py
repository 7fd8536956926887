"""Checks of one stage's inputs that need no torch: everything that can be said before anything starts."""

from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.io import read_json, sha256_file
from swift_cl.methods.base import Method
from swift_cl.stages import STAGE_FILE, WEIGHTS, Stage, check_started_from, load_stage
from swift_cl.stream.benchmark import STREAMED_HEAD
from swift_cl.stream.files import first_rows, raw_rows, starts_with_mark
from swift_cl.stream.readers import read_rows
from swift_cl.stream.readers.messages import check_head
from swift_cl.training.checkpoints import find_stage_dir, safetensors_complete
from swift_cl.training.flags import TRUE, first, tuner_of
from swift_cl.tuners.registry import tuner_of_type

FIXED = {"lora_rank": "r", "lora_alpha": "lora_alpha"}
"""Flags of `--tuner_type lora` that a later task may not change, and their keys in adapter_config.json."""
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".txt")


def check_data(specs: list[str], streaming: bool = False) -> None:
    """Check local data files of `--dataset`; specs that are not local files are ms-swift's business.

    Args:
        streaming: look at the first rows of JSON lines only.

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
        if path.suffix in (".json", ".jsonl"):
            if starts_with_mark(path):
                raise UserError(f"--dataset {name}: begins with a byte order mark; save it as UTF-8 without one")
            head = streaming and path.suffix == ".jsonl"
            rows = first_rows(path, STREAMED_HEAD) if head else raw_rows(path)
            if not rows:
                raise UserError(f"--dataset {name}: the data file has no rows")
            if head and all(isinstance(row, dict) and "messages" in row for row in rows):
                check_head(path, STREAMED_HEAD)
            elif any(isinstance(row, dict) and "messages" in row for row in rows):
                read_rows(path, "messages")


def is_streaming(given: dict[str, list[str]]) -> bool:
    """Whether `--streaming true` is among the flags."""
    return (first(given, "streaming") or "").lower() in TRUE


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
        return bool(read_json(one / "config.json") == read_json(two / "config.json")) and _same_weights(one, two)
    return one.name == two.name


def _same_weights(one: Path, two: Path) -> bool:
    """Whether two folders hold the same weights: a copied or moved base model, or another of the same shape."""
    mine, theirs = ({path.name: path for path in folder.glob("*.safetensors")} for folder in (one, two))
    if {name: path.stat().st_size for name, path in mine.items()} != {
        name: path.stat().st_size for name, path in theirs.items()
    }:
        return False
    return all(sha256_file(path) == sha256_file(theirs[name]) for name, path in mine.items())


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
    if not safetensors_complete(adapter / WEIGHTS):
        raise UserError(f"--adapters {adapter}: {WEIGHTS} is missing or was cut off")
    config = read_json(adapter / "adapter_config.json")
    base = trained_on or config.get("base_model_name_or_path")
    if model and base and not _same_model(base, model):
        raise UserError(f"--adapters {adapter}: trained on base model {base}, but --model is {model}")
    tuner = tuner_of(given)
    kind, had = (tuner.peft_type if tuner else None), config.get("peft_type")
    if kind != had and (kind is not None or tuner_of_type(str(had)) is not None):
        raise UserError(
            f"--adapters {adapter}: an adapter of type {had}, which --tuner_type "
            f"{first(given, 'tuner_type') or 'lora'} does not continue"
        )
    for flag, key in (tuner.fixed if tuner else FIXED).items():
        if not given.get(flag) or key not in config:
            continue
        value = given[flag][0]
        if tuner and flag in tuner.zero_means and _same_value(value, 0):
            value = str(config[tuner.zero_means[flag]])
        if not _same_value(value, config[key]):
            raise UserError(
                f"--{flag} is {given[flag][0]}, but the adapter that is continued ({adapter}) has {config[key]}"
            )


def _same_value(given: str, had: object) -> bool:
    try:
        return float(given) == float(str(had))
    except ValueError:
        return given.lower() == str(had).lower()


def finished_stage(given: dict[str, list[str]], previous: Stage | None) -> Stage | None:
    """With --cl_resume true, the finished stage in --output_dir: there is nothing left to train.

    Raises:
        UserError: the folder holds a damaged stage, or one of another method, task or previous stage.
    """
    folder = Path(first(given, "output_dir") or ".")
    if (first(given, "cl_resume") or "").lower() not in TRUE or not (folder / STAGE_FILE).is_file():
        return None
    stage = load_stage(folder)
    for flag, had in (("cl_method", stage.method), ("cl_task", stage.task)):
        if first(given, flag) != had:
            raise UserError(f"--output_dir {folder} holds a finished stage of --{flag} {had}, not {first(given, flag)}")
    check_started_from(stage, previous)
    return stage


def _other_base(previous: Stage, model: str) -> UserError:
    return UserError(
        f"--cl_previous {previous.dir}: trained on base model {previous.base_model}, but --model is {model}"
    )


def start_of_stage(
    given: dict[str, list[str]], previous: Stage | None, method: type[Method] = Method
) -> tuple[str | None, str | None]:
    """(adapter to continue, model to start from instead of --model) of a stage; None, None where a method starts fresh.

    Raises:
        UserError: the adapter does not exist, is not the previous stage's, or does not fit the base model.
    """
    model = first(given, "model")
    adapters = given.get("adapters", [])
    if adapters and method.starts_fresh:
        raise UserError(f"--adapters does not work with method '{method.name}': every stage begins with a new adapter")
    if len(adapters) > 1:
        raise UserError(f"--adapters names {len(adapters)} adapters, a stage continues exactly one")
    for adapter in adapters:
        if not Path(adapter).is_dir():
            raise UserError(f"--adapters {adapter}: folder not found")
    if previous is None:
        if adapters:
            check_adapter(Path(adapters[0]), model, given, None)
        return (adapters[0] if adapters else None), None
    output_dir = first(given, "output_dir")
    if output_dir is not None and Path(output_dir).resolve() == previous.dir.resolve():
        raise UserError(f"--output_dir {output_dir} is the folder of --cl_previous: the stage before would be lost")
    tuner = (given.get("tuner_type") or ["lora"])[0]
    if tuner != previous.tuner_type:
        raise UserError(
            f"--tuner_type is {tuner!r}, but the previous stage {previous.dir} used {previous.tuner_type!r}"
        )
    if method.starts_fresh:
        if model and not _same_model(previous.base_model, model):
            raise _other_base(previous, model)
        return None, None
    if previous.tuner_type == "full":
        if adapters:
            raise UserError("--adapters does not work with --tuner_type full")
        if model and Path(model).resolve() != previous.weights_dir and not _same_model(previous.base_model, model):
            raise _other_base(previous, model)
        return None, str(previous.weights_dir)
    if adapters and Path(adapters[0]).resolve() != previous.weights_dir:
        raise UserError(
            f"--adapters {adapters[0]} is not the adapter of --cl_previous ({previous.weights_dir}); leave one out"
        )
    check_adapter(previous.weights_dir, model, given, previous.base_model)
    return str(previous.weights_dir), None

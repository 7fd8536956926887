"""The CL_Benchmark format of O-LoRA and GORP: `<GROUP>/<task>/{train,dev,test,labels}.json` and, two folders up,
`instruction_config.json` with one instruction a group.

A file is a JSON array of `{"sentence", "label"}`; `labels.json` beside it lists the allowed labels. The prompt is the
group's instruction, the options, and the sentence (COPA's sentence holds them already); the label text is the answer.
"""

from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.io import read_json
from swift_cl.stream.files import json_object
from swift_cl.stream.readers._options import Options as _Options
from swift_cl.stream.rows import Row, pair

CONFIG = "instruction_config.json"
WITHOUT_INSTRUCTION = ("COPA",)


class Options(_Options):
    """Settings.

    Attributes:
        names: begin the prompt with `Task:<GROUP>` and `Dataset:<task>`, as the published runs do.
        skip_labels: leave rows with these labels out; any other label must be in labels.json.
    """

    names: bool = False
    skip_labels: tuple[str, ...] = ()


def files(path: Path, options: Options) -> list[Path]:
    """The file, its labels, and the instructions."""
    return [path, path.parent / "labels.json", path.parent.parent.parent / CONFIG]


def prompt_of(path: Path, options: Options, labels: list[str]) -> str:
    """What stands before the sentence."""
    task, group = path.parent.name, path.parent.parent.name
    head = f"Task:{group}\nDataset:{task}\n" if options.names else ""
    if group in WITHOUT_INSTRUCTION:
        return head
    config_file = path.parent.parent.parent / CONFIG
    config = json_object(config_file)
    if group not in config:
        raise UserError(f"{config_file}: no instruction for the group {group!r}, found: {', '.join(config)}")
    try:
        instruction = str(config[group][0]["instruction"])
    except (LookupError, TypeError):
        raise UserError(f"{config_file}: {group!r} is not a list of objects with an 'instruction'") from None
    return f"{head}{instruction}Option: {', '.join(labels)} \n"


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read one split of one task; a label outside `labels.json` is an error that names the row."""
    options = options or Options()
    labels = read_json(path.parent / "labels.json")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path.parent / 'labels.json'}: expected a list of labels")
    head = prompt_of(path, options, labels)
    rows = []
    samples = read_json(path)
    if not isinstance(samples, list):
        raise UserError(f"{path}: expected a JSON array, found {type(samples).__name__}")
    for number, raw in enumerate(samples):
        where = f"{path}, row {number}"
        if not isinstance(raw, dict) or not isinstance(raw.get("sentence"), str):
            raise UserError(f"{where}: expected an object with a text 'sentence'")
        label = raw.get("label")
        if label in options.skip_labels:
            continue
        if label not in labels:
            raise UserError(f"{where}: label {label!r} is not one of {', '.join(labels)}")
        question = f"{head}{raw['sentence']}\nAnswer:"
        rows.append(pair(f"{path.parent.name}-{path.stem}-{number}", question, str(label), labels=labels))
    return rows[:limit]

"""The CL_Benchmark format of O-LoRA and GORP: `<GROUP>/<task>/{train,dev,test,labels}.json` and, two folders up,
`instruction_config.json` with one instruction a group.

A file is a JSON array of `{"sentence", "label"}`; `labels.json` beside it lists the allowed labels. The prompt is the
group's instruction, the options, and the sentence; the label text is the answer.
"""

from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.io import read_json
from swift_cl.stream.rows import Row


def read(path: Path, limit: int | None = None) -> list[Row]:
    """Read one split of one task; a label outside `labels.json` is an error that names the row."""
    labels = read_json(path.parent / "labels.json")
    group = path.parent.parent.name
    config_file = path.parent.parent.parent / "instruction_config.json"
    config = read_json(config_file)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path.parent / 'labels.json'}: expected a list of labels")
    if not isinstance(config, dict) or group not in config:
        raise UserError(f"{config_file}: no instruction for the group {group!r}, found: {', '.join(config)}")
    try:
        instruction = str(config[group][0]["instruction"])
    except (LookupError, TypeError):
        raise UserError(f"{config_file}: {group!r} is not a list of objects with an 'instruction'") from None
    options = ", ".join(labels)
    rows = []
    samples = read_json(path)
    if not isinstance(samples, list):
        raise UserError(f"{path}: expected a JSON array, found {type(samples).__name__}")
    for number, raw in enumerate(samples[:limit]):
        where = f"{path}, row {number}"
        if not isinstance(raw, dict) or not isinstance(raw.get("sentence"), str):
            raise UserError(f"{where}: expected an object with a text 'sentence'")
        if raw.get("label") not in labels:
            raise UserError(f"{where}: label {raw.get('label')!r} is not one of {options}")
        question = f"{instruction}Option: {options} \n{raw['sentence']}\nAnswer:"
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": raw["label"]})
        rows.append(Row(f"{path.parent.name}-{path.stem}-{number}", messages))
    return rows

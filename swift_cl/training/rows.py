"""Between ms-swift's data sets and the rows that methods see."""

import base64
from typing import Any

from swift_cl.io import sha256_json
from swift_cl.methods.base import TrainingRow


def _drop_none(value: Any) -> Any:
    # Arrow fills keys that a row does not have with None.
    if isinstance(value, dict):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_none(item) for item in value]
    return value


def _image(value: Any) -> Any:
    """The path of an image, which ms-swift's data sets hold as `{"bytes", "path"}`; its bytes as a data URL."""
    if not isinstance(value, dict):
        return value
    if value.get("bytes") is None:
        return value.get("path")
    return "data:image;base64," + base64.b64encode(value["bytes"]).decode()


def rows_of(dataset: Any, default_system: str | None) -> list[TrainingRow]:
    """The rows of a loaded ms-swift data set with their system prompt written out.

    The prompt is part of a row's meaning: replayed in a later stage it must be the one of its own stage. A row without
    one gets the template's default; where there is no default it gets an empty prompt, which the template leaves out.
    """
    rows = []
    for raw in dataset:
        row: TrainingRow = _drop_none(dict(raw))
        if raw.get("images"):
            row["images"] = [_image(image) for image in raw["images"]]
        row.pop("dataset", None)  # ms-swift's note of the file's path, which would tie stored rows to this machine
        messages = row["messages"]
        if not messages or messages[0]["role"] != "system":
            row["messages"] = [{"role": "system", "content": default_system or ""}, *messages]
        rows.append(row)
    return rows


def hash_of_rows(rows: list[TrainingRow]) -> str:
    """Hash of rows and their order."""
    return sha256_json(rows)

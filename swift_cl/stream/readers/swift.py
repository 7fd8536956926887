"""Whatever ms-swift itself reads: a hub's data set (`[hf::]owner/name[:subset][#rows]`) or a local file or folder.

ms-swift's own loader finds and maps the columns. A name that looks like a file must be one: a missing file is an error
here and never a question to a hub.
"""

import base64
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.stream.files import SUFFIXES
from swift_cl.stream.images import image_files, with_images
from swift_cl.stream.readers.messages import tools_text
from swift_cl.stream.rows import Row, row_from_messages

LOCAL_SUFFIXES = (*SUFFIXES, ".txt")
READ = ("messages", "images", "tools")


def looks_local(name: str) -> bool:
    """Whether a name is meant as a path and not as a hub's data set."""
    return name.startswith((".", "/", "~")) or Path(name).suffix in LOCAL_SUFFIXES


def _without_rows(text: str) -> str:
    name, _, rows = text.rpartition("#")
    return name if name and rows.isdigit() else text


def locate(root: Path, text: str) -> Path:
    """A local file below `root`, or a hub's data set as it is."""
    name = _without_rows(text)
    local = root / Path(name).expanduser()
    return Path(f"{local}{text[len(name) :]}") if local.exists() or looks_local(name) else Path(text)


def files(path: Path, options: None) -> list[Path]:
    """The local file; nothing for a hub's data set."""
    return [Path(_without_rows(str(path)))] if looks_local(_without_rows(str(path))) else []


def read(path: Path, limit: int | None = None) -> list[Row]:
    """Load a data set with ms-swift."""
    from swift.dataset import load_dataset

    try:
        dataset, _ = load_dataset(str(path), strict=True)
    except Exception as error:  # of ms-swift, datasets, or a hub: whatever it is, it is about this data set
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: ms-swift cannot read this data set ({type(error).__name__}: {reason})") from None
    rows = []
    for number, raw in enumerate(dataset):
        if number == limit:
            break
        rows.append(_row({key: value for key, value in raw.items() if value is not None}, path, number))
    return rows


def _row(raw: dict[str, Any], path: Path, number: int) -> Row:
    where = f"{path}, row {number}"
    other = [key for key, value in raw.items() if key not in (*READ, "dataset") and value not in ([], {}, "")]
    if other or "messages" not in raw:
        raise UserError(
            f"{where}: ms-swift reads {', '.join(raw)}, but only {', '.join(READ)} can be learned and asked here"
        )
    messages = [{key: value for key, value in message.items() if value is not None} for message in raw["messages"]]
    if any("loss" in message or "loss_scale" in message for message in messages):
        raise UserError(f"{where}: messages with their own 'loss' or 'loss_scale' are not supported")
    row = row_from_messages(messages, where, f"{path.stem}-{number}")
    row = Row(row.id, row.messages, row.system, tools=tools_text(raw.get("tools"), where))
    images = [_image(image) for image in raw.get("images", [])]
    return with_images(row, image_files(images or None, where, [path.parent]), where)


def _image(image: Any) -> Any:
    """The path or URL of an image; one that the data set holds itself becomes a data URL."""
    if isinstance(image, dict) and image.get("bytes"):
        return "data:image;base64," + base64.b64encode(image["bytes"]).decode()
    return image.get("path") if isinstance(image, dict) else image

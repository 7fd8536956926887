"""Questions with images: how they are asked, and what of them is part of an answer's key.

A message that asks with images carries their files or URLs in `images`, in the order of the `<image>` marks in its
text. On the wire each mark becomes an `image_url` part with the image itself; in a key each image is the hash of its
bytes, so that neither a renamed file nor a changed one is mistaken.
"""

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from swift_cl.io import sha256_file, sha256_json
from swift_cl.stream.images import ELSEWHERE, MARK, image_kind
from swift_cl.stream.rows import Row

Message = Mapping[str, Any]


def questions(row: Row) -> list[Message]:
    """The user's message of every turn, with the images that its text marks."""
    left = list(row.images)
    found: list[Message] = []
    for question, _ in row.turns:
        own, left = left[: question.count(MARK)], left[question.count(MARK) :]
        found.append({"role": "user", "content": question, **({"images": own} if row.images and own else {})})
    return found


def identified(message: Message) -> dict[str, Any]:
    """The message as a key hashes it: what its images show instead of where they are."""
    if "images" not in message:
        return dict(message)
    return {**message, "images": [_identity(source) for source in message["images"]]}


def sent(message: Message) -> dict[str, Any]:
    """The message as the OpenAI API takes it."""
    if "images" not in message:
        return dict(message)
    texts: Sequence[str] = message["content"].split(MARK)
    parts: list[dict[str, Any]] = []
    for position, text in enumerate(texts):
        if position:
            parts.append({"type": "image_url", "image_url": {"url": _url(message["images"][position - 1])}})
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": message["role"], "content": parts}


def _identity(source: str) -> str:
    if source.startswith("data:"):
        return sha256_json(source)
    return source if source.startswith(ELSEWHERE) else _file_identity(source, Path(source).stat().st_mtime_ns)


@cache
def _file_identity(path: str, changed: int) -> str:
    return sha256_file(Path(path))


def _url(source: str) -> str:
    """URLs as they are; a file as a data URL, since the endpoint may be on another machine."""
    if source.startswith(ELSEWHERE):
        return source
    return f"data:{image_kind(source)};base64," + base64.b64encode(Path(source).read_bytes()).decode()

"""Files: atomic writes, hashes, and method state as safetensors + JSON.

Every file of ours is written to a temporary name in the same folder, flushed, and renamed into place, so a reader sees
the old file or the new one and never half of one. Nothing here pickles.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from swift_cl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

STATE_SCHEMA = 1


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on a clean exit it replaces `path`, on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files readable by the owner only; give them the rights a plain open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a `UserError` that names it."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; one that is missing, unreadable or not UTF-8 is a `UserError` that names it.

    The byte order mark that Windows programs put in front is no part of the text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; an error names the file and the line."""
    rows = []
    # Not splitlines(): it also cuts at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            rows.append(row)
    return rows


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def sha256_tensors(tensors: "Mapping[str, Tensor]") -> str:
    """Hex sha256 of named tensors: names, dtypes, shapes and bytes, independent of order and of the device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class MethodState:
    """What a method hands from one task to the next, or keeps in a checkpoint.

    Attributes:
        tensors: named tensors, written to `<method>.safetensors`.
        meta: JSON values, written to `<method>.json` together with the schema version and the tensors' hash.
        rows: named lists of JSON rows, each written to `<method>.<name>.jsonl`.
    """

    tensors: "dict[str, Tensor]" = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def save_method_state(folder: Path, method: str, state: MethodState) -> None:
    """Write a method's state into `folder`; the JSON goes last, so its presence means that the state is complete."""
    from safetensors.torch import save

    meta = {"schema_version": STATE_SCHEMA, "method": method, **state.meta, "files": {}}
    folder.mkdir(parents=True, exist_ok=True)
    if state.tensors:
        path = folder / f"{method}.safetensors"
        with atomic_write(path) as stream:
            stream.write(save({name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}))
        meta["files"][path.name] = sha256_file(path)
    for name, rows in state.rows.items():
        path = folder / f"{method}.{name}.jsonl"
        write_jsonl(path, rows)
        meta["files"][path.name] = sha256_file(path)
    write_json(folder / f"{method}.json", meta)


def load_method_state(folder: Path, method: str) -> MethodState:
    """Read what `save_method_state` wrote.

    Raises:
        UserError: the state is missing, of another schema, or a file of it differs from its recorded hash.
    """
    from safetensors.torch import load_file

    index = folder / f"{method}.json"
    if not index.is_file():
        raise UserError(f"{index}: the state of method '{method}' is missing; was the earlier stage trained with it?")
    meta = read_json(index)
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise UserError(f"{index}: not the state of a method (expected an object that lists its 'files')")
    if meta.get("schema_version") != STATE_SCHEMA:
        raise UserError(f"{index}: schema_version is {meta.get('schema_version')!r}, this version reads {STATE_SCHEMA}")
    if meta.get("method") != method:
        raise UserError(f"{index}: the state of method {meta.get('method')!r}, expected that of '{method}'")
    state = MethodState(meta={k: v for k, v in meta.items() if k not in ("schema_version", "method", "files")})
    for name, expected in meta["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: file not found, but {index.name} lists it")
        if sha256_file(path) != expected:
            raise UserError(f"{path}: the file differs from the hash in {index.name}; the state is damaged")
        if path.suffix == ".safetensors":
            state.tensors = load_file(path)
        else:
            state.rows[name.removeprefix(f"{method}.").removesuffix(".jsonl")] = read_jsonl(path)
    return state

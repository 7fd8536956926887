"""The files of one generation: rounds that are never generated twice, what was kept and dropped, a manifest.

FOLDER/rounds/r0-<key>.jsonl   every answer of a round; the key is the hash of all that the answers depend on
FOLDER/pseudo.jsonl            kept rows with their provenance
FOLDER/rejects.jsonl           dropped candidates with their reason
FOLDER/manifest.json           written last
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swift_cl.generation.engine import Answer
from swift_cl.io import read_jsonl, sha256_file, sha256_json, write_json, write_jsonl

SCHEMA = 1


def round_file(folder: Path, number: int, depends_on: Mapping[str, Any]) -> Path:
    """Where the answers of a round are kept: another model, prompt, seed or setting gives another file."""
    return folder / "rounds" / f"r{number}-{sha256_json(dict(depends_on))[:16]}.jsonl"


def read_round(path: Path, count: int) -> list[Answer] | None:
    """The answers of a finished round; None where there are none."""
    if not path.is_file():
        return None
    rows = read_jsonl(path)  # written atomically, so it is whole
    assert len(rows) == count, f"{path}: {len(rows)} answers for {count} prompts"
    return [Answer(row["text"], row["finish_reason"], row["tokens"]) for row in rows]


def write_round(path: Path, answers: Sequence[Answer], origins: Sequence[Mapping[str, Any]]) -> None:
    """Keep the answers of a round."""
    write_jsonl(path, [{**origin, **asdict(answer)} for origin, answer in zip(origins, answers, strict=True)])


def write_outcome(
    folder: Path,
    kept: Sequence[Mapping[str, Any]],
    rejects: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
) -> None:
    """Write what was kept and dropped, and last the manifest with the files' hashes."""
    write_jsonl(folder / "pseudo.jsonl", kept)
    write_jsonl(folder / "rejects.jsonl", rejects)
    files = ["pseudo.jsonl", "rejects.jsonl"]
    versions = {name: importlib.metadata.version(name) for name in ("ms-swift", "transformers", "torch")}
    hashes = {name: sha256_file(folder / name) for name in files}
    write_json(folder / "manifest.json", {"schema_version": SCHEMA, **manifest, "versions": versions, "files": hashes})

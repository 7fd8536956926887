"""The benchmarks that are known by name: one YAML file each in `benchmarks/`. Their data is not part of the package."""

import os
from pathlib import Path

from swift_cl.errors import UserError, did_you_mean

FOLDER = Path(__file__).resolve().parent / "benchmarks"
DATA_DIR = "DATA_DIR"


def files() -> list[Path]:
    """The benchmark files, by name."""
    return sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem.casefold())


def _key(name: str) -> str:
    return name.casefold().replace("-", "_")


def find(path: Path, base: Path | None = None) -> Path:
    """The file of a benchmark: `path` (from `base`) where it exists, else the file of the benchmark that has this name.

    Upper and lower case and `-` and `_` are alike in a name. What is plainly a path comes back without a look.

    Raises:
        UserError: there is neither such a file nor a benchmark of this name.
    """
    full = path if base is None else base / path
    if full.exists() or len(path.parts) > 1 or path.suffix in (".yaml", ".yml", ".json"):
        return full
    known = {_key(file.stem): file for file in files()}
    found = known.get(_key(path.name))
    if found is None:
        names = [file.stem for file in files()]
        hint = did_you_mean(path.name, names)
        raise UserError(f"{full}: file not found, and no benchmark has this name; known: {', '.join(names)}{hint}")
    return found


def holds(path: Path) -> bool:
    """Whether a benchmark file is one of the catalogue."""
    return path.resolve().parent == FOLDER


def data_folder(name: str) -> Path:
    """Where the data of a benchmark is looked for: `$DATA_DIR`, else `datasets/<name>` below the working directory."""
    given = os.environ.get(DATA_DIR)
    return Path(given).expanduser().absolute() if given else Path("datasets", name).absolute()

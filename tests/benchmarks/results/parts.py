"""The benchmarks of the results table, cut to what a CPU trains in a minute or two, as plain message files.

Every part writes its rows itself: the first rows of a task's training file for training, the following ones (or the
first of the development file) for choosing the learning rate, the first test rows for the table. Rows whose question is
longer than the part's limit are left out everywhere.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from swift_cl.io import write_json
from swift_cl.methods.registry import get_method
from swift_cl.stream.readers import read_rows
from swift_cl.stream.rows import Row

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("SWIFT_CL_SHARED", ROOT.parent / "shared"))


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from: (file, reader, its options) for training, choosing and the table.

    Attributes:
        dev: None where the rows that follow the training rows serve.
    """

    name: str
    train: tuple[Path, str, dict[str, Any]]
    test: tuple[Path, str, dict[str, Any]]
    dev: tuple[Path, str, dict[str, Any]] | None = None
    system: str | None = None


@dataclass(frozen=True)
class Part:
    """A benchmark and its sizes.

    Attributes:
        title: what it is, for the page.
        rows, dev_rows, test_rows: of each task.
        longest: characters of a question, at most.
        classes: whether the tasks have classes of their own, so that methods with a classifier head can be asked.
        methods: those that it is for; all where none is named.
        lists: whether the model is first tuned to continue lists of examples (`warm_base`).
        stream: the part whose tasks it asks, where they are not its own.
    """

    name: str
    title: str
    model: str
    rows: int
    epochs: int
    batch: int
    dev_rows: int = 20
    test_rows: int = 32
    longest: int = 10_000
    max_tokens: int = 8
    scorer: str = "exact_match"
    classes: bool = False
    methods: tuple[str, ...] = ()
    lists: bool = False
    stream: str = ""

    def sources(self) -> list[Source]:
        """The tasks in their order."""
        return list(SOURCES[self.stream or self.name]())


def _news() -> Iterator[Source]:
    folder = ROOT / "datasets" / "continual_news_mini"
    for task in yaml.safe_load((folder / "benchmark.yaml").read_text())["tasks"]:
        train, test = folder / task["train"], folder / task["test"]
        yield Source(task["name"], (train, "messages", {}), (test, "messages", {}), system=task.get("system"))


def cl_benchmark_tasks() -> Iterator[Source]:
    """Four tasks of O-LoRA's benchmark."""
    folders = {"dbpedia": "TC/dbpedia", "amazon": "SC/amazon", "agnews": "TC/agnews", "sst2": "SC/SST-2"}
    for name, folder in folders.items():
        split = {s: (SHARED / "bench/data/cl_benchmark" / folder / f"{s}.json", "cl_benchmark", {}) for s in SPLITS}
        yield Source(name, split["train"], split["test"], split["dev"])


def absa_tasks(count: int | None) -> Iterator[Source]:
    """The first tasks of ABSACL_ATSC's order 1, all for None."""
    folder = SHARED / "bench/data/easycl/ABSACL_ATSC"
    order = json.loads((folder / "benchmark_info.json").read_text())["ABSACL_ATSC"]["orders"]["order1"]
    for name in order[:count]:
        split = {s: (folder / name / f"{name}_{s}.json", "alpaca", {}) for s in SPLITS}
        yield Source(name, split["train"], split["test"], split["dev"])


def superni_tasks() -> Iterator[Source]:
    """SuperNI's five tasks in the order of SSR."""
    folder = SHARED / "bench/data/superni"
    for name in ("qa", "sa", "trans", "para", "pos"):
        yield Source(
            name, (folder / f"{name}.train.json", "superni", {}), (folder / f"{name}.eval.json", "superni", {})
        )


def _concept_1k() -> Iterator[Source]:
    file = SHARED / "bench/data/concept_1k/dataset.txt"
    for group in range(4):
        # Asked by a concept's other question, a model of this size knows nothing (0 to 2 % right after learning).
        own = (file, "concept_1k", {"task": group, "tasks": 5})
        yield Source(f"group_{group + 1}", own, own, own)


SPLITS = ("train", "dev", "test")
SOURCES = {
    "news": _news, "cl_benchmark": cl_benchmark_tasks, "absa": lambda: absa_tasks(8), "superni": superni_tasks,
    "concept_1k": _concept_1k,
}  # fmt: skip
BENCH = "../shared/bench/base"
PARTS = {
    part.name: part
    for part in (
        Part("cl_benchmark", "CL_Benchmark: dbpedia, amazon, agnews, SST-2", BENCH, rows=64, epochs=3, batch=4,
             longest=480, classes=True),
        Part("lists", "CL_Benchmark again, from a base model that continues lists of examples", BENCH, rows=64,
             epochs=3, batch=4, longest=480, stream="cl_benchmark", lists=True,
             methods=("seq", "replay", "mtl", "ssr", "pseudo_replay", "o_lora")),
        Part("news", "The bundled yearly news", "assets/tiny_base", rows=96, epochs=6, batch=8, max_tokens=24),
        Part("absa", "ABSACL_ATSC, order 1, its first eight tasks", BENCH, rows=64, epochs=3, batch=4, test_rows=16),
        Part("superni", "SuperNI: qa, sa, trans, para, pos", BENCH, rows=32, epochs=3, batch=4, test_rows=16,
             max_tokens=32, scorer="rouge_l"),
        Part("concept_1k", "Concept-1K, its first four groups, asked what was learned (memorising accuracy)", BENCH,
             rows=48, epochs=8, batch=8, max_tokens=12),
    )
}  # fmt: skip


def fits(part: Part, method: str) -> bool:
    """Whether a part is for a method, and can be asked: a classifier head needs classes of its own for every task."""
    return method in part.methods or (not part.methods and (part.classes or not get_method(method).classifies))


def _read(part: Part, source: tuple[Path, str, dict[str, Any]]) -> list[Row]:
    file, file_format, options = source
    rows = read_rows(file, file_format, None, options)
    return [row for row in rows if sum(len(m["content"]) for m in row.messages[:-1]) <= part.longest]


def _write(file: Path, rows: list[Row]) -> str:
    write_json(file, [row.as_training_row(None) for row in rows])
    return file.name


def write_benchmark(part: Part, folder: Path, dev: bool, classifies: bool = False) -> Path:
    """The benchmark file of a part and its data files in `folder`.

    Args:
        dev: for choosing settings: the first two tasks, asked their development rows, as A-GEM's protocol has it
            (Chaudhry et al. 2019, arXiv 1812.00420, section 3: settings are chosen on the first tasks only).
        classifies: for a method with a classifier head, which answers with a class of the tasks so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for source in part.sources()[: 2 if dev else None]:
        train = _read(part, source.train)
        # The news are too few to hold any back: there what was learned is asked.
        held_back = _read(part, source.dev) if source.dev is not None else train[part.rows :] or train
        asked = held_back[: part.dev_rows] if dev else _read(part, source.test)[: part.test_rows]
        tasks.append(
            {
                "name": source.name,
                "train": _write(folder / f"{source.name}-train.json", train[: part.rows]),
                "test": _write(folder / f"{source.name}-test.json", asked),
                **({"system": source.system} if source.system else {}),
            }
        )
    value: dict[str, Any] = {
        "name": part.name, "scorers": [part.scorer], "generation": {"max_tokens": part.max_tokens}, "tasks": tasks,
    }  # fmt: skip
    if classifies:
        value["scenario"] = "class_incremental"
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    return path

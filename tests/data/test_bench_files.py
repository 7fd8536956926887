"""The real files of four formats in ../shared: read completely, and word for word as the files say."""

import csv
import json
from pathlib import Path

import pytest

from swift_cl.stream.benchmark import load_benchmark
from swift_cl.stream.disk import missing
from swift_cl.stream.readers import read_rows

# Rows of train, dev and test (reference document).
ABSA = """
ApexAD2600Progressive 343/43/43, CanonG3 228/29/29, CanonPowerShotSD500 118/15/15, CanonS100 174/22/22,
Computer 283/35/36, CreativeLabsNomadJukeboxZenXtra40GB 677/85/84, DiaperChamp 191/24/24, HitachiRouter 212/26/27,
LinksysRouter 176/22/23, MicroMP3 484/61/61, NikonCoolpix4300 162/20/21, Nokia6600 362/43/46, Nokia6610 271/34/34,
Norton 194/24/25, Router 245/31/31, Speaker 352/44/44, ipod 153/19/20, laptop 2111/147/635, rest 3416/150/1117
"""
COUNTS = {name: tuple(map(int, counts.split("/"))) for name, counts in (e.split() for e in ABSA.split(","))}


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    return shared / "bench" / "data"


class TestAbsa:
    @pytest.mark.parametrize("name", COUNTS)
    def test_rows(self, data: Path, name: str) -> None:
        """The question is instruction and input, the answer the output, byte for byte."""
        for split, count in zip(("train", "dev", "test"), COUNTS[name], strict=True):
            file = data / "easycl" / "ABSACL_ATSC" / name / f"{name}_{split}.json"
            raw = json.loads(file.read_bytes())
            rows = read_rows(file, "alpaca")
            assert len(rows) == len(raw) == count
            assert [row.turns for row in rows] == [[(f"{r['instruction']}\n{r['input']}", r["output"])] for r in raw]
            assert {row.turns[0][1] for row in rows} <= {"positive", "negative", "neutral"}

    def test_folder_as_it_is_equals_the_named_benchmark(self, data: Path) -> None:
        folder = load_benchmark(data / "easycl" / "ABSACL_ATSC")
        named = load_benchmark(Path("ABSACL_ATSC"), data / "easycl" / "ABSACL_ATSC")
        assert dict(folder.orders) == dict(named.orders)
        assert list(folder.tasks) == list(named.tasks) == list(COUNTS)
        assert missing(folder.tasks.values()) == missing(named.tasks.values()) == {}
        for name, task in folder.tasks.items():
            same = named.tasks[name]
            for one, two in ((task.train, same.train), (task.test, same.test)):
                assert Path(one).resolve() == Path(two).resolve()
            assert task.test_rows() == named.tasks[name].test_rows()


@pytest.mark.parametrize("task", ["qa", "sa", "trans", "para", "pos"])
@pytest.mark.parametrize(("split", "count"), [("train", 1000), ("eval", 200)])
def test_superni(data: Path, task: str, split: str, count: int) -> None:
    file = data / "superni" / f"{task}.{split}.json"
    raw = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
    rows = read_rows(file, "superni")
    assert len(rows) == count
    assert [(row.id, row.turns) for row in rows] == [(r["id"], [(r["full_prompt"], r["output"])]) for r in raw]


class TestConcept1k:
    """The first half of the published file: 8,327 facts."""

    def test_every_line_is_in_a_row(self, data: Path) -> None:
        file = data / "concept_1k" / "dataset.txt"
        lines = file.read_bytes().decode().split("\n")
        assert len(lines) == 5 * 8327
        train = read_rows(file, "concept_1k", options={"prompt": "{input}"})
        test = read_rows(file, "concept_1k", options={"prompt": "{input}", "split": "test"})
        assert len(train) == len(test) == 8327
        rebuilt = []
        for number, (one, two) in enumerate(zip(train, test, strict=True)):
            ((first, answer),), ((second, again),) = one.turns, two.turns
            rebuilt += [lines[5 * number], f"Q1: {first}", f"A1: {answer}", f"Q2: {second}", f"Q2: {again}"]
        assert rebuilt == lines

    def test_tasks_divide_the_facts(self, data: Path) -> None:
        file = data / "concept_1k" / "dataset.txt"
        ids = [
            row.id for task in range(10) for row in read_rows(file, "concept_1k", options={"tasks": 10, "task": task})
        ]
        assert len(ids) == len(set(ids)) == 8327


def test_named_cl_benchmark_on_the_tasks_that_are_there(data: Path) -> None:
    benchmark = load_benchmark(Path("standard_cl"), data / "cl_benchmark")
    assert [path.parent.name for path in missing(benchmark.order("order1"))] == ["yahoo"] * 3
    for name in ("dbpedia", "amazon", "agnews"):
        task = benchmark.tasks[name]
        group = task.train.parent.parent.name
        rows = task.train_rows()
        raw = json.loads(task.train.read_bytes())
        assert len(rows) == len(raw) == 2000
        assert len(task.test_rows()) == 500
        for row, sample in zip(rows, raw, strict=True):
            ((question, answer),) = row.turns
            assert question.startswith(f"Task:{group}\nDataset:{name}\n")
            assert question.endswith(f"\n{sample['sentence']}\nAnswer:")
            assert answer == sample["label"]


def test_csv_reader_agrees_with_the_standard_library(tmp_path: Path) -> None:
    """Quotes, commas and line breaks inside a cell come through as they are."""
    cells = [["a,b", 'say "x"'], ["two\nlines", "新闻"], [" space ", "a\u2028b"]]
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["instruction", "output"], *cells])
    assert [row.turns for row in read_rows(path, "alpaca")] == [[(q, a)] for q, a in cells]

"""Benchmarks by name: each loads, its orders are those of the reference documents, and missing data is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.evaluation.scorers import module
from swift_cl.evaluation.scorers import names as scorer_names
from swift_cl.evaluation.scorers._options import parse
from swift_cl.stream import catalogue
from swift_cl.stream.benchmark import load_benchmark
from swift_cl.stream.disk import check_on_disk, missing, needed
from swift_cl.workflow.config import load_config
from tests.support.stages import make_model
from tests.unit.test_readers import FORMATS

# name: (tasks, orders)
REFERENCE = {
    "continual_news": (4, 1),
    "LFPT5": (4, 3),
    "LNT": (15, 3),
    "ABSACL_ATSC": (19, 3),
    "VQA_CL": (3, 3),
    "standard_cl": (4, 3),
    "long_cl": (15, 3),
    "SuperNI-5": (5, 3),
    "SuperNI-10": (10, 1),
    "TRACE": (8, 2),
    "concept_1k": (10, 1),
    "ZsRE": (10, 1),
    "AOA": (2, 1),
    "topic3": (5, 1),
    "clinc150": (15, 1),
    "banking77": (7, 1),
}
ORDERS = {
    ("standard_cl", "order1"): "dbpedia amazon yahoo agnews",
    ("standard_cl", "order2"): "dbpedia amazon agnews yahoo",
    ("standard_cl", "order3"): "yahoo amazon agnews dbpedia",
    ("long_cl", "order4"): "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    ("long_cl", "order5"): "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    ("long_cl", "order6"): "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    ("SuperNI-5", "order1"): "qa qg sa sum trans",
    ("SuperNI-5", "order2"): "trans sa qa sum qg",
    ("SuperNI-5", "order3"): "sum qg trans qa sa",
    ("SuperNI-10", "order1"): "qa qg sa sum trans dsg expl para pe pos",
    ("TRACE", "order1"): "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten",
    ("TRACE", "order2"): "NumGLUE-cm NumGLUE-ds FOMC 20Minuten C-STANCE Py150 MeetingBank ScienceQA",
    ("VQA_CL", "order1"): "vqav2 vizwiz scienceqa",
    ("VQA_CL", "order2"): "scienceqa vqav2 vizwiz",
    ("VQA_CL", "order3"): "vizwiz vqav2 scienceqa",
    ("LFPT5", "order1"): "dbpedia amazon yahoo agnews",
    ("LFPT5", "order2"): "dbpedia amazon agnews yahoo",
    ("LFPT5", "order3"): "yahoo amazon agnews dbpedia",
    ("LNT", "order1"): "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    ("LNT", "order2"): "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    ("LNT", "order3"): "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    ("ABSACL_ATSC", "order1"): "ApexAD2600Progressive CanonG3 CanonPowerShotSD500 CanonS100 Computer "
    "CreativeLabsNomadJukeboxZenXtra40GB DiaperChamp HitachiRouter LinksysRouter MicroMP3 NikonCoolpix4300 Nokia6600 "
    "Nokia6610 Norton Router Speaker ipod laptop rest",
    ("ABSACL_ATSC", "order2"): "NikonCoolpix4300 Nokia6600 Nokia6610 Norton Router Speaker ipod laptop rest "
    "ApexAD2600Progressive CanonG3 CanonPowerShotSD500 CanonS100 Computer CreativeLabsNomadJukeboxZenXtra40GB "
    "DiaperChamp HitachiRouter LinksysRouter MicroMP3",
    ("ABSACL_ATSC", "order3"): "NikonCoolpix4300 Nokia6600 laptop rest ApexAD2600Progressive CanonG3 "
    "CanonPowerShotSD500 CanonS100 Computer Nokia6610 Norton Router Speaker ipod CreativeLabsNomadJukeboxZenXtra40GB "
    "DiaperChamp HitachiRouter LinksysRouter MicroMP3",
}

TASK = {"name": "a", "train": "a.json", "test": "t.json"}


def load(name: str) -> Any:
    return load_benchmark(Path(name))


def test_the_catalogue_is_the_reference() -> None:
    assert {file.stem for file in catalogue.files()} == set(REFERENCE)


@pytest.mark.parametrize("name", REFERENCE)
def test_tasks_and_orders(name: str) -> None:
    benchmark = load(name)
    tasks, orders = REFERENCE[name]
    assert benchmark.name == name
    assert (len(benchmark.tasks), len(benchmark.orders)) == (tasks, orders)
    for order in benchmark.orders.values():
        assert sorted(order) == sorted(benchmark.tasks)
    assert benchmark.description
    assert benchmark.data_source
    assert benchmark.generation["max_tokens"] > 0
    assert benchmark.scorers or all(task.scorers for task in benchmark.tasks.values())
    # Two tasks never learn the same rows.
    learned = {(task.train, json.dumps(task.train_options, sort_keys=True)) for task in benchmark.tasks.values()}
    assert len(learned) == tasks


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_orders_are_the_published_ones(name: str, order: str) -> None:
    assert " ".join(load(name).orders[order]) == ORDERS[name, order]


def test_orders_without_a_list_here_are_one_order_in_the_tasks_own_sequence() -> None:
    for name in set(REFERENCE) - {name for name, _ in ORDERS}:
        benchmark = load(name)
        assert list(benchmark.orders.values()) == [tuple(benchmark.tasks)]


@pytest.mark.parametrize("name", REFERENCE)
def test_scorers_exist(name: str) -> None:
    benchmark = load(name)
    used = {*benchmark.scorers, *(scorer for task in benchmark.tasks.values() for scorer in task.scorers)}
    assert used <= set(scorer_names())
    for options in (benchmark.scorer_options, *(task.scorer_options for task in benchmark.tasks.values())):
        assert set(options) <= used
        for scorer, settings in options.items():
            parse(module(scorer), scorer, settings, name)


@pytest.mark.parametrize("written", ["trace", "TRACE", "Trace", "superni_5", "SUPERNI-5", "absacl_atsc"])
def test_names_are_alike_whatever_their_case(written: str) -> None:
    found = catalogue.find(Path(written))
    assert found.stem.casefold().replace("-", "_") == written.casefold().replace("-", "_")


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"TRACEE: file not found, and no benchmark .* did you mean 'TRACE'\?"):
        load("TRACEE")


@pytest.mark.parametrize("written", ["sub/TRACE", "./sub/TRACE", "/gone/TRACE", "TRACE.yaml"])
def test_a_path_is_no_name(written: str) -> None:
    """A misspelt path must not become another benchmark."""
    with pytest.raises(UserError, match=r"file not found$"):
        load(written)


def test_a_folder_of_that_name_wins(tmp_path: Path) -> None:
    folder = tmp_path / "TRACE"
    folder.mkdir()
    (folder / "benchmark.yaml").write_text(yaml.safe_dump({"name": "mine", "tasks": [TASK]}))
    assert load_benchmark(folder).name == "mine"


class TestDataFolder:
    def test_below_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("DATA_DIR", raising=False)
        assert load("TRACE").root == tmp_path / "datasets" / "TRACE"

    def test_variable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        assert load("TRACE").root == tmp_path

    def test_argument_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATA_DIR", "/elsewhere")
        assert load_benchmark(Path("TRACE"), tmp_path).root == tmp_path


@pytest.fixture
def concepts(tmp_path: Path) -> Path:
    """A data folder with two tasks' worth of Concept-1K where the benchmark of that name looks for it."""
    names = [f"Concept {i}" for i in range(20)]
    lines = []
    for name in [*names, "Concept 0"]:
        lines += [f"({name}, IsA, Thing)", f"Q1: What is {name}?", "A1: thing", f"Q2: {name} is what?", "Q2: thing"]
    data = tmp_path / "data"
    (data / "concept_1k").mkdir(parents=True)
    (data / "concept_1k" / "dataset.txt").write_text("\n".join(lines))
    (data / "concept_1k_task10").mkdir()
    groups = [[2 * i, 2 * i + 1] for i in range(10)]
    config = {"CONCEPT_LIST": names[::-1], "CUR_CLASS": groups}
    (data / "concept_1k_task10" / "continual_config.json").write_text(json.dumps(config))
    return data


class TestOnDisk:
    def test_each_missing_file_is_a_line_and_the_source_is_named(self, tmp_path: Path) -> None:
        benchmark = load_benchmark(Path("standard_cl"), tmp_path)
        with pytest.raises(UserError) as caught:
            check_on_disk(benchmark, benchmark.order("order1"))
        lines = str(caught.value).splitlines()
        assert lines[0] == f"{tmp_path}/TC/dbpedia/train.json: data file not found (task dbpedia)"
        # train, test and labels of four tasks, the instructions that all need, and the source.
        assert len(lines) == 3 * 4 + 1 + 1
        config = f"{tmp_path}/instruction_config.json: data file not found (task dbpedia, amazon, yahoo, agnews)"
        assert config in lines
        assert lines[-1] == f"where to get the data of standard_cl: {benchmark.data_source}"

    def test_a_file_that_is_there_is_not_named(self, tmp_path: Path) -> None:
        (tmp_path / "test_all").mkdir()
        (tmp_path / "test_all" / "harmful_behaviors.csv").write_text("goal,target\n")
        benchmark = load_benchmark(Path("AOA"), tmp_path)
        assert len(needed(benchmark.order())) == 3
        assert [path.name for path in missing(benchmark.order())] == [
            "identity-shift-aoa.jsonl", "llama2-response.jsonl",
        ]  # fmt: skip

    def test_complete(self, concepts: Path) -> None:
        benchmark = load_benchmark(Path("concept_1k"), concepts)
        check_on_disk(benchmark, benchmark.order())
        first = benchmark.tasks["task_1"]
        assert [row.turns[0][0] for row in first.train_rows()] == [
            "Question: What is Concept 18?\n Short Answer:",
            "Question: What is Concept 19?\n Short Answer:",
        ]
        assert [row.turns[0][0] for row in first.test_rows()] == [
            "Question: Concept 18 is what?\n Short Answer:",
            "Question: Concept 19 is what?\n Short Answer:",
        ]
        # The fact after the last whole group, which the published preparation loses.
        assert len(benchmark.tasks["task_10"].train_rows()) == 2


class TestRunFile:
    @pytest.fixture
    def run_file(self, tmp_path: Path, concepts: Path) -> Path:
        make_model(tmp_path / "base")
        path = tmp_path / "run.yaml"
        values = {"benchmark": "concept_1k", "data_dir": "data", "model": "base", "output_dir": "runs"}
        path.write_text(yaml.safe_dump({**values, "train": {"max_steps": 1}}))
        return path

    def preview(self, run_file: Path) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(run_file), "--preview"])
        return int(stopped.value.code or 0)

    def test_preview_of_a_named_benchmark(
        self, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.preview(run_file) == 0
        lines = capsys.readouterr().out.splitlines()
        stages = [line for line in lines if line.startswith("swift-cl sft ")]
        assert len(stages) == 10
        assert f"--dataset {tmp_path}/runs/seq/data/task_1.train.jsonl" in stages[0]
        assert not (tmp_path / "runs").exists()

    def test_preview_names_what_is_missing(self, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = run_file.parent / "data" / "concept_1k" / "dataset.txt"
        file.unlink()
        assert self.preview(run_file) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"swift-cl: error: {file}: data file not found (task task_1, task_2, ")
        assert "where to get the data of concept_1k: dataset/ of the repository zzz47zzz/" in error

    def test_data_folder_is_recorded(
        self, run_file: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The evaluation may run from elsewhere, without the variable."""
        run_file.write_text(run_file.read_text().replace("data_dir: data\n", ""))
        monkeypatch.setenv("DATA_DIR", str(concepts))
        config, _ = load_config(run_file, [])
        assert config.data_dir == str(concepts)
        assert Path(config.benchmark) == catalogue.FOLDER / "concept_1k.yaml"
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
        assert load_benchmark(Path(config.benchmark), Path(config.data_dir)).root == concepts


def test_ls_tells_what_is_on_disk(
    concepts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATA_DIR", str(concepts))
    with pytest.raises(SystemExit):
        main(["ls", "benchmarks", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(REFERENCE) <= set(rows)
    assert (rows["concept_1k"]["data"], rows["concept_1k"]["missing"]) == ("on disk", [])
    assert rows["concept_1k"]["format"] == ["concept_1k"]
    assert rows["TRACE"]["data"] == "16 of 16 files missing"
    assert rows["TRACE"]["orders"] == ["order1", "order2"]
    assert len(rows["TRACE"]["missing"]) == 16


def test_benchmark_files_are_packaged() -> None:
    setup = (FORMATS.parents[2] / "setup.py").read_text()
    assert "stream/benchmarks/*.yaml" in setup


class TestOptionsOfABenchmark:
    def load(self, folder: Path, **changes: Any) -> Any:
        value = {"name": "n", "format": "zsre", "tasks": [{**TASK, **changes.pop("task", {})}], **changes}
        (folder / "benchmark.yaml").write_text(yaml.safe_dump(value))
        return load_benchmark(folder).tasks["a"]

    def test_the_nearer_one_wins(self, tmp_path: Path) -> None:
        task = self.load(
            tmp_path,
            options={"tasks": 4, "split": "edit"},
            test_options={"split": "rephrase"},
            task={"options": {"task": 2}, "test_options": {"split": "locality"}},
        )
        assert task.train_options == {"tasks": 4, "split": "edit", "task": 2}
        assert task.test_options == {"tasks": 4, "split": "locality", "task": 2}

    def test_wrong_option_names_file_and_task(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            self.load(tmp_path, task={"options": {"spilt": "edit"}})
        assert str(caught.value) == (
            f"{tmp_path}/benchmark.yaml: task 'a': options of format 'zsre': 'spilt' is unknown, "
            "allowed: task, tasks, split, prompt; did you mean 'split'?"
        )


class TestLongBenchmarks:
    """LNT and the long orders of CL_Benchmark, all 15 tasks."""

    @pytest.fixture(params=[("LNT", "order1"), ("LNT", "order3"), ("long_cl", "order4")], ids=" ".join)
    def previewed(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        """A run file, its data of a few rows on disk in the benchmark's own format, and the order's tasks."""
        name, order = request.param
        benchmark, data = load(name), tmp_path / "data"
        for number, task in enumerate(benchmark.tasks.values()):
            for file, rows in ((task.train, 2 + number), (task.test, 1 + number)):
                path = data / file.relative_to(benchmark.root)
                path.parent.mkdir(parents=True, exist_ok=True)
                if name == "LNT":
                    value: Any = [
                        {"instruction": f"{task.name} {i}?", "input": "", "output": "yes"} for i in range(rows)
                    ]
                else:
                    value = [{"sentence": f"{task.name} {i}", "label": "yes"} for i in range(rows)]
                    (path.parent / "labels.json").write_text(json.dumps(["yes", "no"]))
                path.write_text(json.dumps(value))
        if name == "long_cl":
            groups = {task.train.parts[-3] for task in benchmark.tasks.values()}
            instructions = {group: [{"instruction_type": "zero-shot", "instruction": "Choose.\n"}] for group in groups}
            (data / "instruction_config.json").write_text(json.dumps(instructions))
        make_model(tmp_path / "base")
        values = {"benchmark": name, "order": order, "data_dir": "data", "model": "base", "output_dir": "runs"}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**values, "train": {"num_train_epochs": 2, "per_device_train_batch_size": 4}}))
        return path, benchmark, benchmark.orders[order]

    def test_the_whole_plan_is_printed(self, previewed: Any, capsys: pytest.CaptureFixture[str]) -> None:
        path, benchmark, order = previewed
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(path), "--preview"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        found = re.findall(
            r"^# stage (\d+) of 15, (.+?): (\d+) training rows, about \d+ steps of 16; (\d+) test rows; (.*)$",
            out,
            re.MULTILINE,
        )
        places = {task: number for number, task in enumerate(benchmark.tasks)}
        assert [(int(k), task, int(train), int(test)) for k, task, train, test, _ in found] == [
            (k, task, 2 + places[task], 1 + places[task]) for k, task in enumerate(order, 1)
        ]
        assert len([line for line in out.splitlines() if line.startswith("swift-cl sft ")]) == 15
        assert not (path.parent / "runs").exists()

    def test_what_is_missing_is_named_before_anything_starts(
        self, previewed: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, benchmark, order = previewed
        gone = [benchmark.tasks[order[4]].train, benchmark.tasks[order[9]].test]
        gone = [path.parent / "data" / file.relative_to(benchmark.root) for file in gone]
        for file in gone:
            file.unlink()
        for argv in (["--preview"], []):
            with pytest.raises(SystemExit) as stopped:
                main(["run", str(path), *argv])
            assert stopped.value.code == 2
            error = capsys.readouterr().err
            assert all(f"{file}: data file not found" in error for file in gone)
            assert error.count("data file not found") == 2
            assert f"where to get the data of {benchmark.name}: " in error
        assert not (path.parent / "runs").exists()

"""Benchmark files and data files: read as they are meant, or refused with the place named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from swift_cl.errors import UserError
from swift_cl.stream.benchmark import load_benchmark
from swift_cl.stream.readers import formats, read_rows
from swift_cl.stream.rows import Row
from tests.conftest import ROOT

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(content, name): a data file, JSON unless it is text."""

    def do(content: Any, name: str = "d.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return do


class TestMessages:
    def test_array_and_lines_are_the_same(self, write: Write) -> None:
        rows = [{"messages": [USER, ASSISTANT]}, {"id": 7, "messages": [USER, ASSISTANT, USER, ASSISTANT]}]
        array = read_rows(write(rows, "d.json"))
        lines = read_rows(write("\n\n".join(map(json.dumps, rows)) + "\n", "d.jsonl"))
        assert array == lines
        assert [row.id for row in array] == ["d-0", "7"]
        assert array[1].turns == [("q", "a"), ("q", "a")]

    def test_system_message_is_the_rows_own(self, write: Write) -> None:
        (row,) = read_rows(write([{"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}]))
        assert row.system == "s"
        assert row.turns == [("q", "a")]
        assert row.as_training_row("task's") == {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]}

    def test_system_prompt_of_the_task_where_the_row_has_none(self) -> None:
        row = Row("1", (USER, ASSISTANT))
        assert row.as_training_row("task's")["messages"][0] == {"role": "system", "content": "task's"}
        assert row.as_training_row(None)["messages"] == [USER, ASSISTANT]

    def test_limit(self, write: Write) -> None:
        path = write([{"messages": [USER, ASSISTANT]}] * 3)
        assert len(read_rows(path, limit=2)) == 2

    def test_unicode_line_separators_inside_a_string(self, write: Write) -> None:
        row = {"messages": [USER, {"role": "assistant", "content": "one\u2028two\x85three"}]}
        (read,) = read_rows(write(json.dumps(row, ensure_ascii=False), "d.jsonl"))
        assert read.turns[0][1] == "one\u2028two\x85three"

    def test_content_hash_is_of_what_is_said(self) -> None:
        one = Row("1", (USER, ASSISTANT))
        assert one.content_hash == Row("2", (USER, ASSISTANT)).content_hash
        assert one.content_hash != Row("1", (USER, ASSISTANT), "s").content_hash

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"messages": [USER]}, "no assistant turn"),
            ({"messages": [USER, ASSISTANT, USER]}, "the last message is the user's"),
            ({"messages": [ASSISTANT]}, "turn 0 is of role 'assistant', expected 'user'"),
            ({"messages": [USER, USER, ASSISTANT]}, "turn 1 is of role 'user', expected 'assistant'"),
            ({"messages": [{"role": "human", "content": "q"}, ASSISTANT]}, "message 0 has role 'human', allowed"),
            ({"messages": [USER, {"role": "assistant"}]}, "message 1 has no text 'content'"),
            ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1 has no text 'content'"),
            ({"messages": ["q", "a"]}, "message 0 has no text 'content'"),
            ({"messages": []}, "expected a non-empty list"),
            ({"messages": {"role": "user"}}, "'messages' is dict"),
            ({"messages": [{"role": "system", "content": "s"}]}, "no assistant turn"),
            ({"dialogue": []}, "expected an object with a 'messages' list"),
            ("text", "expected an object with a 'messages' list"),
        ],
    )
    def test_wrong_row_is_named(self, write: Write, row: Any, said: str) -> None:
        path = write([{"messages": [USER, ASSISTANT]}, row])
        with pytest.raises(UserError) as caught:
            read_rows(path)
        assert str(caught.value).startswith(f"{path}, row 1: ")
        assert said in str(caught.value)

    @pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
    @pytest.mark.parametrize("wrong", ['{"messages": [', '{"messages": [}]}', "nonsense", '{"a": "unclosed'])
    def test_malformed_json_names_the_row(self, write: Write, name: str, wrong: str) -> None:
        good = json.dumps({"messages": [USER, {"role": "assistant", "content": "a, [b] {c}"}]})
        content = f"[{good},\n {good},\n {wrong}\n]" if name == "d.json" else f"{good}\n{good}\n\n{wrong}\n"
        path = write(content, name)
        with pytest.raises(UserError) as caught:
            read_rows(path)
        assert str(caught.value).startswith(f"{path}, row 2: not valid JSON (")

    def test_array_that_is_cut_off_after_a_row(self, write: Write) -> None:
        path = write("[" + json.dumps({"messages": [USER, ASSISTANT]}) + ",")
        with pytest.raises(UserError, match=r"d.json, row 1: not valid JSON"):
            read_rows(path)

    @pytest.mark.parametrize("content", ["", " \n", "[]", "[ ]\n"])
    def test_empty_file(self, write: Write, content: str) -> None:
        with pytest.raises(UserError, match=r"d.json: the data file has no rows"):
            read_rows(write(content))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"gone.json: data file not found"):
            read_rows(tmp_path / "gone.json")

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "d.json"
        path.write_bytes('[{"messages": "新闻"}]'.encode("gbk"))
        with pytest.raises(UserError, match=r"d.json: not UTF-8 text"):
            read_rows(path)

    @pytest.mark.parametrize("ids", [("x", "x"), (1, "1"), ("d-1", None)])
    def test_same_id_twice(self, write: Write, ids: tuple[Any, Any]) -> None:
        """A given id may also collide with one that is made from the row's number."""
        rows = [{"messages": [USER, ASSISTANT], **({} if i is None else {"id": i})} for i in ids]
        with pytest.raises(UserError, match=r"d.json, row 1: id '.*' was used by row 0 already"):
            read_rows(write(rows))

    def test_unknown_format(self, write: Write) -> None:
        with pytest.raises(UserError, match=r"format 'mesages' is unknown, allowed: .*; did you mean 'messages'"):
            read_rows(write([]), "mesages")

    def test_bundled_news_reads(self) -> None:
        benchmark = load_benchmark(ROOT / "datasets" / "continual_news_mini")
        for task in benchmark.order():
            assert task.train_rows()
            assert task.test_rows()


class TestClBenchmark:
    @pytest.fixture
    def task(self, tmp_path: Path) -> Path:
        folder = tmp_path / "TC" / "agnews"
        folder.mkdir(parents=True)
        config = {"TC": [{"instruction_type": "zero-shot", "instruction": "What is the topic? \n"}]}
        (tmp_path / "instruction_config.json").write_text(json.dumps(config))
        (folder / "labels.json").write_text(json.dumps(["World", "Sports"]))
        rows = [{"sentence": "They won.", "label": "Sports"}, {"sentence": "They met.", "label": "World"}]
        (folder / "train.json").write_text(json.dumps(rows))
        return folder

    def test_prompt_and_answer(self, task: Path) -> None:
        one, two = read_rows(task / "train.json", "cl_benchmark")
        assert one.turns == [
            ("What is the topic? \nOption: World, Sports \nThey won.\nAnswer:", "Sports"),
        ]
        assert (one.id, two.id) == ("agnews-train-0", "agnews-train-1")
        assert one.system is None

    @pytest.mark.parametrize(
        ("file", "value", "said"),
        [
            (
                "train.json",
                [{"sentence": "x", "label": "Science"}],
                "row 0: label 'Science' is not one of World, Sports",
            ),
            ("train.json", [{"sentence": 1, "label": "World"}], "row 0: expected an object with a text 'sentence'"),
            ("train.json", ["x"], "row 0: expected an object"),
            ("train.json", {"sentence": "x"}, "expected a JSON array, found dict"),
            ("train.json", [], "has no rows"),
            ("labels.json", {"World": 1}, "labels.json: expected a list of labels"),
            ("../../instruction_config.json", {"SC": []}, "no instruction for the group 'TC', found: SC"),
            ("../../instruction_config.json", {"TC": []}, "'TC' is not a list of objects with an 'instruction'"),
            ("../../instruction_config.json", {"TC": [{}]}, "'TC' is not a list of objects with an 'instruction'"),
        ],
    )
    def test_wrong_file_is_named(self, task: Path, file: str, value: Any, said: str) -> None:
        (task / file).write_text(json.dumps(value))
        with pytest.raises(UserError) as caught:
            read_rows(task / "train.json", "cl_benchmark")
        assert said in str(caught.value)
        assert Path(file).name in str(caught.value)

    @pytest.mark.parametrize("file", ["labels.json", "../../instruction_config.json"])
    def test_missing_file_beside_it(self, task: Path, file: str) -> None:
        (task / file).unlink()
        with pytest.raises(UserError, match="file not found"):
            read_rows(task / "train.json", "cl_benchmark")

    @pytest.mark.parametrize("name", ["TC/agnews", "TC/dbpedia", "SC/amazon", "SC/SST-2"])
    def test_real_files(self, shared: Path, name: str) -> None:
        folder = next((shared / "bench" / "data" / "cl_benchmark").glob(f"*/{Path(name).name}"))
        labels = json.loads((folder / "labels.json").read_text())
        for split, count in (("train", 2000), ("dev", 200), ("test", 500)):
            rows = read_rows(folder / f"{split}.json", "cl_benchmark")
            raw = json.loads((folder / f"{split}.json").read_text())
            assert len(rows) == len(raw) == count
            assert len({row.id for row in rows}) == count
            for row, sample in zip(rows, raw, strict=True):
                ((question, answer),) = row.turns
                assert answer == sample["label"]
                assert question.endswith(f"{sample['sentence']}\nAnswer:")
                assert f"Option: {', '.join(labels)} \n" in question
        assert len(read_rows(folder / "train.json", "cl_benchmark", limit=5)) == 5


TASKS = [{"name": "a", "train": "a.json", "test": "t.json"}, {"name": "b", "train": "b.json", "test": "t.json"}]


class TestBenchmark:
    @pytest.fixture
    def load(self, tmp_path: Path) -> Callable[..., Any]:
        """load(**changes of the file): the benchmark; a value of ... leaves a key out."""

        def do(**changes: Any) -> Any:
            value = {"name": "n", "tasks": TASKS, **changes}
            value = {key: item for key, item in value.items() if item is not ...}
            (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
            return load_benchmark(tmp_path)

        return do

    def test_defaults(self, load: Callable[..., Any], tmp_path: Path) -> None:
        benchmark = load()
        assert [task.name for task in benchmark.order()] == ["a", "b"]
        assert benchmark.tasks["a"].train == tmp_path / "a.json"
        assert benchmark.tasks["a"].file_format == "messages"
        assert benchmark.scorers == ("similarity",)

    def test_orders(self, load: Callable[..., Any]) -> None:
        benchmark = load(orders={"there": ["a", "b"], "back": ["b", "a"]})
        assert [task.name for task in benchmark.order()] == ["a", "b"]
        assert [task.name for task in benchmark.order("back")] == ["b", "a"]
        assert [t.name for t in load(orders={"x": ["b"], "default": ["a"]}).order()] == ["a"]

    def test_order_is_unknown(self, load: Callable[..., Any]) -> None:
        with pytest.raises(UserError, match="order 'bakc' is unknown, allowed: there, back; did you mean 'back'"):
            load(orders={"there": ["a", "b"], "back": ["b", "a"]}).order("bakc")

    def test_data_dir(self, load: Callable[..., Any], tmp_path: Path) -> None:
        assert load(data_dir="sub").tasks["a"].train == tmp_path / "sub" / "a.json"
        other = load_benchmark(tmp_path / "benchmark.yaml", Path("/elsewhere"))
        assert other.tasks["a"].train == Path("/elsewhere/a.json")

    def test_limits_and_format_of_a_task(self, load: Callable[..., Any]) -> None:
        task = load(tasks=[{**TASKS[0], "format": "cl_benchmark", "train_limit": 3, "test_limit": 2, "system": "s"}])
        assert task.tasks["a"].file_format == "cl_benchmark"
        assert (task.tasks["a"].train_limit, task.tasks["a"].test_limit, task.tasks["a"].system) == (3, 2, "s")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"taks": []}, "taks is unknown, allowed: "),
            ({"tasks": [{**TASKS[0], "sistem": "x"}]}, "tasks.0.sistem is unknown, allowed: "),
            ({"name": ...}, "name: Field required"),
            ({"tasks": []}, "tasks: List should have at least 1 item"),
            ({"tasks": [{"name": "a", "train": "a.json"}]}, "tasks.0.test: Field required"),
            ({"tasks": [TASKS[0], TASKS[0]]}, "task 'a' is defined twice"),
            ({"tasks": [{**TASKS[0], "name": "../a"}]}, "tasks.0.name: String should match"),
            ({"tasks": [{**TASKS[0], "name": 2022}]}, "tasks.0.name: Input should be a valid string, found 2022"),
            ({"tasks": [{**TASKS[0], "train_limit": 0}]}, "tasks.0.train_limit: Input should be greater"),
            ({"format": "alpacca"}, "format 'alpacca' is unknown, allowed: "),
            ({"tasks": [{**TASKS[0], "format": "mesages"}]}, "did you mean 'messages'"),
            ({"orders": {"x": ["a", "c"]}}, "order 'x' names unknown tasks ['c'], allowed: a, b"),
            ({"orders": {"x": ["a", "a"]}}, "order 'x' names a task twice"),
            ({"orders": {"x": []}}, "order 'x' names no task, allowed: a, b"),
        ],
    )
    def test_wrong_file_is_one_line_that_names_the_key(
        self, load: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            load(**changes)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'benchmark.yaml'}: ")
        assert said in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("content", "said"), [("a: [", "not valid YAML"), ("- a", "expected a mapping"), ("", "expected a mapping")]
    )
    def test_no_yaml_mapping(self, tmp_path: Path, content: str, said: str) -> None:
        path = tmp_path / "b.yaml"
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            load_benchmark(path)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="file not found"):
            load_benchmark(tmp_path)

    def test_formats_are_the_files_of_the_folder(self) -> None:
        folder = ROOT / "swift_cl" / "stream" / "readers"
        assert formats() == sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))

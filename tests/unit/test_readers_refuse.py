"""Malformed data: each reader says in one line which file and row are wrong, what was found and what is allowed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_cl.errors import UserError
from swift_cl.stream.readers import formats, read_rows
from tests.unit.test_readers import FORMATS

# One good file of every format: (file below FORMATS, options).
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca": ("easycl/colours/colours_train.json", {}),
    "sharegpt": ("easycl/shapes/shapes_test.json", {}),
    "superni": ("superni/qa.train.json", {}),
    "trace": ("trace/FOMC/train.json", {}),
    "zsre": ("zsre/edits.json", {}),
    "concept_1k": ("concept_1k/dataset.txt", {}),
    "aoa": ("aoa/llama2-response.jsonl", {}),
    "clinc150": ("clinc150/data_full.json", {}),
    "banking77": ("banking77/train.csv", {}),
    "topic": ("topic/train.csv", {}),
    "continual_data": ("continual_data/continual_data.json", {}),
    "cl_benchmark": ("cl_benchmark/SC/mood/test.json", {"skip_labels": ["-"]}),
}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """copy(format): the path of the format's good file in a folder that may be spoiled."""
    shutil.copytree(FORMATS, tmp_path / "formats")
    return lambda file_format: tmp_path / "formats" / GOOD[file_format][0]


def refusal(path: Path, file_format: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(path, file_format, options={**GOOD.get(file_format, ("", {}))[1], **options})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_format_is_here() -> None:
    elsewhere = {"messages": "test_stream.py", "swift": "below"}
    assert set(GOOD) == set(formats()) - set(elsewhere)


@pytest.mark.parametrize("file_format", GOOD)
def test_good_file_is_read(copy: Callable[[str], Path], file_format: str) -> None:
    """So that what the tests below refuse is what they spoil."""
    assert read_rows(copy(file_format), file_format, options=GOOD[file_format][1])


@pytest.mark.parametrize("file_format", GOOD)
def test_missing_file(copy: Callable[[str], Path], file_format: str) -> None:
    path = copy(file_format)
    path.unlink()
    assert refusal(path, file_format) == f"{path}: data file not found"


@pytest.mark.parametrize("file_format", GOOD)
def test_empty_file(copy: Callable[[str], Path], file_format: str) -> None:
    path = copy(file_format)
    path.write_text("")
    said = refusal(path, file_format)
    assert said.startswith(f"{path}: ")
    assert "has no rows" in said or "not valid JSON" in said


@pytest.mark.parametrize("file_format", GOOD)
def test_not_utf8(copy: Callable[[str], Path], file_format: str) -> None:
    path = copy(file_format)
    path.write_bytes("新闻".encode("gbk"))
    assert refusal(path, file_format).startswith(f"{path}: not UTF-8 text")


@pytest.mark.parametrize(
    "file_format", [name for name, (file, _) in GOOD.items() if file.endswith((".json", ".jsonl"))]
)
def test_truncated_json(copy: Callable[[str], Path], file_format: str) -> None:
    path = copy(file_format)
    text = path.read_text()
    path.write_text(text[: len(text) * 2 // 3])
    said = refusal(path, file_format)
    assert said.startswith(str(path))
    assert "not valid JSON" in said


@pytest.mark.parametrize(
    "file_format", [name for name, (file, _) in GOOD.items() if file.endswith((".json", ".jsonl"))]
)
def test_other_json(copy: Callable[[str], Path], file_format: str) -> None:
    path = copy(file_format)
    path.write_text("[3]")
    said = refusal(path, file_format)
    assert said.startswith(str(path))
    assert "expected" in said


@pytest.mark.parametrize("file_format", GOOD)
@pytest.mark.parametrize("mark", [True, False])
def test_byte_order_mark(copy: Callable[[str], Path], file_format: str, mark: bool) -> None:
    """Windows programs write one; the file says the same with and without it."""
    path = copy(file_format)
    if mark:
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert read_rows(path, file_format, options=GOOD[file_format][1])


@pytest.mark.parametrize(
    ("file_format", "file"),
    [
        ("cl_benchmark", "cl_benchmark/instruction_config.json"),
        ("cl_benchmark", "cl_benchmark/SC/mood/labels.json"),
        ("clinc150", "clinc150/label_dict.json"),
        ("banking77", "banking77/categories.json"),
        ("topic", "topic/classes.txt"),
        ("continual_data", "continual_data/continual_config.json"),
    ],
)
def test_missing_file_beside_it(copy: Callable[[str], Path], tmp_path: Path, file_format: str, file: str) -> None:
    (tmp_path / "formats" / file).unlink()
    assert refusal(copy(file_format), file_format) == f"{tmp_path / 'formats' / file}: data file not found"


ALPACA = {"instruction": "Q", "input": "", "output": "A"}
TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
NI = {"id": "1", "full_prompt": "Q", "output": "A"}


@pytest.mark.parametrize(
    ("file_format", "rows", "options", "said"),
    [
        ("alpaca", [{"instruction": "Q", "input": ""}], {}, "row 0: no column 'output', found: instruction, input"),
        ("alpaca", [ALPACA, {**ALPACA, "output": ""}], {}, "row 1: 'output' is empty"),
        ("alpaca", [{**ALPACA, "output": ["A", "B"]}], {}, "row 0: 'output' is list, expected text"),
        ("alpaca", [{**ALPACA, "instruction": " "}], {}, "row 0: the question is empty ('instruction' and 'input')"),
        ("alpaca", [{**ALPACA, "input": 3}], {}, "row 0: 'input' is int, expected text"),
        ("alpaca", [{**ALPACA, "history": [["Q"]]}], {}, "row 0: turn 0 of 'history' is not a [question, answer]"),
        ("alpaca", [{**ALPACA, "history": "Q"}], {}, "row 0: 'history' is str, expected a list"),
        ("alpaca", [ALPACA, "text"], {}, "row 1: expected a JSON object, found str"),
        ("alpaca", [{**ALPACA, "id": 1}, {**ALPACA, "id": 1}], {}, "row 1: id '1' was used by row 0 already"),
        ("alpaca", [{**ALPACA, "images": ["gone.png"]}], {}, "row 0: image 0, gone.png, was not found (looked in "),
        (
            "alpaca",
            [{**ALPACA, "images": ["../up.png"]}],
            {},
            "row 0: image 0, ../up.png, lies outside the data folder",
        ),
        ("alpaca", [{**ALPACA, "images": ["/gone/x.png"]}], {}, "row 0: image 0, /gone/x.png, was not found"),
        ("alpaca", [{**ALPACA, "images": [3]}], {}, "row 0: image 0 is int, expected the name of a file"),
        ("alpaca", [{**ALPACA, "tools": "{"}], {}, "row 0: 'tools' is not valid JSON"),
        ("alpaca", [{**ALPACA, "tools": "{}"}], {}, "row 0: 'tools' is dict, expected a list of descriptions"),
        ("alpaca", [ALPACA], {"columns": {"query": "inptu"}}, "row 0: no column 'inptu' (columns.query), found: instr"),
        ("alpaca", [ALPACA], {"columns": {"promt": "x"}}, "'columns.promt' is unknown"),
        ("alpaca", [ALPACA], {"ranking": True}, "ranking: preference data are not supported"),
        ("alpaca", [ALPACA], {"columns": {"videos": "v"}}, "columns.videos: videos are not supported"),
        ("alpaca", [ALPACA], {"template": "no place"}, "template: expected a text with {input}"),
        ("sharegpt", [{"messages": TURNS}], {}, "row 0: no column 'conversations', found: messages"),
        ("sharegpt", [{"conversations": "Q"}], {}, "row 0: 'conversations' is str, expected a non-empty list"),
        ("sharegpt", [{"conversations": TURNS[:1]}], {}, "row 0: no assistant turn"),
        ("sharegpt", [{"conversations": [*TURNS, TURNS[0]]}], {}, "row 0: the last message is the user's"),
        ("sharegpt", [{"conversations": TURNS[::-1]}], {}, "row 0: turn 0 is of role 'assistant', expected 'user'"),
        (
            "sharegpt",
            [{"conversations": [{"from": "me", "value": "Q"}]}],
            {},
            "row 0: turn 0 has 'from' 'me', allowed: ",
        ),
        ("sharegpt", [{"conversations": ["Q", "A"]}], {}, "row 0: turn 0 has 'from' None, allowed: human, gpt"),
        ("sharegpt", [{"conversations": [{"from": "human"}]}], {}, "row 0: turn 0 has no text 'value'"),
        ("superni", [{"id": "1", "output": "A"}], {}, "row 0: no column 'full_prompt', found: id, output"),
        ("superni", [NI, NI], {}, "row 1: id '1' was used by row 0 already"),
        ("superni", [NI, {**NI, "id": "2", "output": " "}], {}, "row 1: 'output' is empty"),
        ("trace", [{"prompt": "Q"}], {}, "row 0: no column 'answer', found: prompt"),
        ("trace", [{"prompt": "Q", "answer": ""}], {}, "row 0: 'answer' is empty"),
        ("zsre", [{"src": "Q", "alt": ""}], {}, "row 0: 'alt' is empty"),
        ("zsre", [{"src": "Q", "alt": "A", "loc": "L"}], {"split": "locality"}, "row 0: no column 'loc_ans'"),
        ("zsre", [], {"split": "paraphrase"}, "split: Input should be 'edit', 'rephrase' or 'locality', found 'para"),
        ("zsre", [], {"tasks": 3, "task": 3}, "task 3 is not one of 3, which are counted from 0"),
        ("zsre", [], {"taks": 3}, "'taks' is unknown, allowed: task, tasks, split, prompt; did you mean 'tasks'?"),
        ("aoa", [{"question": "Q"}], {}, "row 0: columns question, expected messages, or instruction and generation"),
        ("aoa", [{"instruction": "Q"}], {}, "row 0: no column 'generation', found: instruction"),
        ("cl_benchmark", [{"sentence": "x", "label": "So-so"}], {}, "row 0: label 'So-so' is not one of Good, Bad"),
        ("superni", [NI], {"split": "test"}, "format 'superni' has no options, found: split"),
    ],
)
def test_wrong_row(
    copy: Callable[[str], Path], file_format: str, rows: list[Any], options: dict[str, Any], said: str
) -> None:
    path = copy(file_format)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    found = refusal(path, file_format, **options)
    assert said in found
    assert found.startswith((str(path), "options of format", "format "))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "(A, IsA, B)\nQ1: q\nA1: a\nQ2: q\nQ2: a\n(A, IsA)\n",
            "row 1 (line 6): found '(A, IsA)', expected '(Concept,",
        ),
        ("(A, IsA, B)\nQ1: q\nA1: \nQ2: q\nQ2: a\n", "row 0 (line 3): found 'A1: ', expected 'A1: ...'"),
        ("(A, IsA, B)\nQ1: q\nA1: a\nQ2: q\n", "row 0 (line 5): found None, expected 'A2: ...'"),
        ("(A, IsA, B)\nA1: a\nQ1: q\nQ2: q\nA2: a\n", "row 0 (line 2): found 'A1: a', expected 'Q1: ...'"),
    ],
)
def test_wrong_block_of_concept_1k(copy: Callable[[str], Path], text: str, said: str) -> None:
    path = copy("concept_1k")
    path.write_text(text)
    assert refusal(path, "concept_1k").startswith(f"{path}, {said}")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"CONCEPT_LIST": ["Gene Editing"], "CUR_CLASS": [[0]]},
            "concept 'Beekeeping' is not in continual_config.json",
        ),
        ({"CONCEPT_LIST": ["Gene Editing"]}, "expected CONCEPT_LIST, and in CUR_CLASS the concepts of each task"),
        ({"CONCEPT_LIST": [], "CUR_CLASS": [[7]]}, "expected CONCEPT_LIST"),
        ({"CONCEPT_LIST": [], "CUR_CLASS": []}, "has 0 tasks, so there is no task 0"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_wrong_grouping_of_concept_1k(copy: Callable[[str], Path], config: Any, said: str) -> None:
    path = copy("concept_1k")
    (path.parent / "continual_config.json").write_text(json.dumps(config))
    assert said in refusal(path, "concept_1k", config="continual_config.json")


@pytest.mark.parametrize(
    ("value", "options", "said"),
    [
        ({"train": []}, {"split": "test"}, "no list of the split 'test', found: train"),
        ({"train": [["a"]]}, {}, "row 0 of train: expected [sentence, intent]"),
        ({"train": [["a", "oos"]]}, {}, "row 0 of train: class 'oos' is not one of the 4 known ones"),
        ({"train": []}, {"tasks": 3}, "4 classes cannot be divided evenly into 3 tasks"),
        ({"train": []}, {"split": "dev"}, "split: Input should be 'train', 'val' or 'test', found 'dev'"),
    ],
)
def test_wrong_clinc150(copy: Callable[[str], Path], value: Any, options: dict[str, Any], said: str) -> None:
    path = copy("clinc150")
    path.write_text(json.dumps(value))
    assert said in refusal(path, "clinc150", **options)


def test_numbers_of_clinc150_have_a_gap(copy: Callable[[str], Path]) -> None:
    path = copy("clinc150")
    (path.parent / "label_dict.json").write_text('{"a": 0, "b": 2}')
    assert "counted from 0 without gaps" in refusal(path, "clinc150")


@pytest.mark.parametrize(
    ("file_format", "text", "said"),
    [
        ("banking77", "text,label\na,age_limit\n", "row 0: no column 'category', found: text, label"),
        ("banking77", "text,category\na,lost\n", "row 0: class 'lost' is not one of the 4 known ones"),
        ("banking77", "text,category\na,b,c\n", "row 0: 3 cells, but the header has 2 columns"),
        ("banking77", 'text,category\n"a" b,age_limit\n', "not valid CSV"),
        ("banking77", "text,category\n,age_limit\n", "row 0: 'text' is empty"),
        ("topic", '"9","a"\n', "row 0: expected a class from 1 to 4 and its text, found '9'"),
        ("topic", '"1","a"\n"World","a"\n', "row 1: expected a class from 1 to 4 and its text, found 'World'"),
        ("topic", '"1",""\n', "row 0: the text is empty"),
    ],
)
def test_wrong_csv(copy: Callable[[str], Path], file_format: str, text: str, said: str) -> None:
    path = copy(file_format)
    path.write_text(text)
    found = refusal(path, file_format)
    assert said in found
    assert found.startswith(str(path))


def test_unknown_class_of_topic(copy: Callable[[str], Path]) -> None:
    said = refusal(copy("topic"), "topic", classes=["Wrold"])
    assert said.endswith("classes.txt: no class 'Wrold', found: World, Science and Technology, Office Holder, "
                         "Business and Finance; did you mean 'World'?")  # fmt: skip


@pytest.mark.parametrize(
    ("value", "options", "said"),
    [
        ({"0": {}}, {"task": 4}, "no task 4, found: 0"),
        ({"0": {"train": {}}}, {"split": "test"}, "task 0, test: no such split, found: train"),
        ({"0": {"train": {"input": ["a"]}}}, {}, "task 0, train: no list 'target', found: input"),
        ({"0": {"train": {"input": ["a"], "target": []}}}, {}, "task 0, train: 1 inputs for 0 targets"),
        (
            {"0": {"train": {"input": [["a"]], "target": [["O"]]}}},
            {},
            "row 0: 'input' is list, expected text (labels of",
        ),
        ({"0": {"train": {"input": ["a"], "target": [""]}}}, {}, "row 0: 'target' is empty"),
        (
            {"0": {"train": {"input": ["a"], "target": ["b"]}}},
            {"split": "val"},
            "split: Input should be 'train', 'dev'",
        ),
    ],
)
def test_wrong_continual_data(copy: Callable[[str], Path], value: Any, options: dict[str, Any], said: str) -> None:
    path = copy("continual_data")
    path.write_text(json.dumps(value))
    assert said in refusal(path, "continual_data", **options)


def test_number_of_image_marks(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    (tmp_path / "x.png").write_bytes(b"x")
    path.write_text(json.dumps([{**ALPACA, "instruction": "<image> and <image>", "images": ["x.png"]}]))
    assert refusal(path, "alpaca") == f"{path}, row 0: the text has 2 <image> marks for 1 images"


def test_unknown_suffix_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "d.xlsx"
    path.write_bytes(b"x")
    assert "suffix '.xlsx' is unknown, allowed: .json, .jsonl, .csv, .tsv, .parquet" in refusal(path, "alpaca")


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 not really")
    assert refusal(path, "alpaca").startswith(f"{path}: cannot be read as Parquet (")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "gone.txt#5"])
def test_swift_missing_local_file_is_no_question_to_a_hub(tmp_path: Path, name: str) -> None:
    from swift_cl.stream.readers import locate

    path = locate(tmp_path, name, "swift")
    assert refusal(path, "swift") == f"{str(path).removesuffix('#5')}: data file not found"


@pytest.mark.parametrize("name", ["AI-ModelScope/alpaca-gpt4-data-zh#500", "hf::owner/name:sub", "self-cognition"])
def test_swift_hub_data_set_stays_as_it_is(tmp_path: Path, name: str) -> None:
    from swift_cl.stream.readers import locate, needed_files

    path = locate(tmp_path, name, "swift")
    assert str(path) == name
    assert needed_files(path, "swift", {}) == []


@pytest.mark.slow
def test_swift_malformed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HOME", "HF_DATASETS_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    path = tmp_path / "d.jsonl"
    path.write_text('{"query": "Q", "response"\n')
    assert refusal(path, "swift").startswith(f"{path}: ms-swift cannot read this data set (")

"""EasyCL's benchmark folders, unchanged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from swift_cl.errors import UserError
from swift_cl.stream.benchmark import load_benchmark
from tests.unit.test_readers import FORMATS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the hand-written folder that may be spoiled."""
    return Path(shutil.copytree(FORMATS / "easycl", tmp_path / "easycl"))


def change(folder: Path, file: str, key: str | None, value: Any) -> None:
    """Set a key of a JSON file (the whole file for None); a value of ... deletes it."""
    path = folder / file
    content = json.loads(path.read_text())
    if key is None:
        content = value
    elif value is ...:
        del content[key]
    else:
        content[key] = value
    path.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_benchmark(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder(folder: Path) -> None:
    benchmark = load_benchmark(folder)
    assert (benchmark.name, benchmark.description) == ("SIGHT", "Colours, then shapes.")
    assert dict(benchmark.orders) == {"order1": ("colours", "shapes"), "order2": ("shapes", "colours")}
    assert benchmark.scorers == ("exact_match",)
    colours, shapes = benchmark.order("order1")
    assert (colours.train, colours.test) == (
        folder / "colours" / "colours_train.json",
        folder / "colours" / "colours_test.json",
    )
    assert [row.turns for row in colours.test_rows()] == [[("Name the colour.\nOption: red, green\na leaf", "green")]]
    # Images are found beside the data file and below the benchmark's folder, the two places EasyCL speaks of.
    image = str(folder / "shapes" / "images" / "red.png")
    assert [row.images for row in shapes.train_rows()] == [(image,), (image,), ()]


def test_data_elsewhere(folder: Path, tmp_path: Path) -> None:
    assert load_benchmark(folder, tmp_path / "data").tasks["colours"].test == (
        tmp_path / "data" / "colours" / "colours_test.json"
    )


def test_training_data_under_the_key_with_train(folder: Path) -> None:
    """LFPT5's older dataset_info.json has `agnews_train` in place of `agnews`."""
    info = json.loads((folder / "dataset_info.json").read_text())
    info["colours_train"] = info.pop("colours")
    change(folder, "dataset_info.json", None, info)
    assert load_benchmark(folder).tasks["colours"].train.name == "colours_train.json"


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("dataset_info.json", "colours_test", ..., "no test data for task 'colours': neither colours_test nor colours"),
        ("dataset_info.json", "colours", ..., "no train data for task 'colours': neither colours_train nor colours"),
        ("dataset_info.json", "colours", {"split": "train"}, "'colours' has no 'file_name'"),
        ("dataset_info.json", "colours", {"file_name": "../x.json"}, "file_name '../x.json', which lies outside"),
        ("dataset_info.json", "colours", {"file_name": "/x.json"}, "file_name '/x.json', which lies outside"),
        ("dataset_info.json", "colours", {"file_name": "x", "formatting": "csv"}, "formatting 'csv', allowed: alpaca,"),
        ("dataset_info.json", "colours", {"hf_hub_url": "a/b"}, "'colours' has 'hf_hub_url', which is not supported"),
        ("dataset_info.json", "colours", {"file_name": "x", "num_samples": 5}, "has 'num_samples', which is not supp"),
        (
            "dataset_info.json",
            "colours",
            {"file_name": "x", "ranking": True},
            "'colours': options of format 'alpaca': ",
        ),
        ("dataset_info.json", "colours", {"file_name": "x", "columns": {"prmpt": "q"}}, "'columns.prmpt' is unknown"),
        ("dataset_info.json", "colours", {"file_name": "x", "formatting": "sharegpt"}, "training data in sharegpt and"),
        ("dataset_info.json", "colours", 3, "'colours' is int, expected an object"),
        ("dataset_info.json", None, [], "dataset_info.json: expected a JSON object, found list"),
        ("benchmark_info.json", "SIGHT", {}, "'SIGHT' has no 'orders' of the form {name: [task, ...]}"),
        ("benchmark_info.json", "SIGHT", {"orders": {}}, "'SIGHT' has no order"),
        ("benchmark_info.json", "SIGHT", {"orders": {"o": []}}, "order 'o' names no task"),
        ("benchmark_info.json", "SIGHT", {"orders": {"o": ["colours", "colours"]}}, "order 'o' names a task twice"),
        (
            "benchmark_info.json",
            "SIGHT",
            {"orders": {"o": ["colors"]}},
            "neither colors_train nor colors; did you mean",
        ),
        ("benchmark_info.json", "OTHER", {"orders": {}}, "no benchmark 'easycl', found: SIGHT, OTHER"),
    ],
)
def test_wrong_folder_is_one_line(folder: Path, file: str, key: str | None, value: Any, said: str) -> None:
    change(folder, file, key, value)
    message = refusal(folder)
    assert message.startswith(f"{folder / file}: ") or message.startswith(f"{folder}/")
    assert said in message


def test_missing_dataset_info(folder: Path) -> None:
    (folder / "dataset_info.json").unlink()
    assert refusal(folder) == f"{folder / 'dataset_info.json'}: file not found"


def test_test_rows_keep_their_images(folder: Path) -> None:
    shutil.copy(folder / "shapes" / "shapes_train.json", folder / "shapes" / "shapes_test.json")
    image = str(folder / "shapes" / "images" / "red.png")
    assert [row.images for row in load_benchmark(folder).tasks["shapes"].test_rows()] == [(image,), (image,), ()]

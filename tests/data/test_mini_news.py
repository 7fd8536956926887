"""The mini benchmark: its files come from its generator, and ask what they claim to ask."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "continual_news_mini"
YEARS = ("2022", "2023", "2024", "2025")
FILES = sorted([f"{y}-train.json" for y in YEARS] + [f"test_data/{y}-test.json" for y in YEARS] + ["benchmark.yaml"])
CHINESE = re.compile("[\u4e00-\u9fff]")

Row = dict[str, Any]


def read(split: str, year: str, folder: Path = FOLDER) -> list[Row]:
    name = f"{year}-train.json" if split == "train" else f"test_data/{year}-test.json"
    rows: list[Row] = json.loads((folder / name).read_text(encoding="utf-8"))
    return rows


def turns(row: Row) -> list[tuple[str, str]]:
    """Pair every question of a conversation with its answer."""
    said = [message["content"] for message in row["messages"]]
    return list(zip(said[0::2], said[1::2], strict=True))


def generate(out: Path, *options: str) -> None:
    command = [sys.executable, str(FOLDER / "make_data.py"), "--out", str(out), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The generator's own modules, which are no package: they are run as a script."""
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in ("news_en", "news_zh", "news_world", "make_data")}
    finally:
        sys.path.remove(str(FOLDER))


def test_default_run_reproduces_the_committed_files(tmp_path: Path) -> None:
    generate(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_another_seed_makes_another_world_of_the_same_shape(tmp_path: Path) -> None:
    generate(tmp_path, "--seed", "7")
    for year in YEARS:
        ours = {answer for row in read("test", year) for _, answer in turns(row)}
        other = {answer for row in read("test", year, tmp_path) for _, answer in turns(row)}
        assert len(ours & other) <= 2
        assert len(read("train", year, tmp_path)) == len(read("train", year))
    assert (tmp_path / "benchmark.yaml").read_bytes() == (FOLDER / "benchmark.yaml").read_bytes()


@pytest.mark.parametrize("year", YEARS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_have_the_published_form(split: str, year: str) -> None:
    rows = read(split, year)
    assert [row["id"] for row in rows] == [f"{year}-{split}-{i:04d}" for i in range(1, len(rows) + 1)]
    for row in rows:
        assert set(row) == {"id", "messages"}
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 1 <= len(roles) // 2 <= 3
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])


def test_train_and_test_share_no_wording(modules: dict[str, ModuleType]) -> None:
    for name in ("news_en", "news_zh"):
        for aspects in modules[name].WORDINGS.values():
            train = {wording for aspect in aspects for wording in aspect[0]}
            test = {wording for aspect in aspects for wording in aspect[1]}
            assert not train & test
    asked = {split: {q for y in YEARS for row in read(split, y) for q, _ in turns(row)} for split in ("train", "test")}
    assert not asked["train"] & asked["test"]


@pytest.mark.parametrize("year", YEARS)
def test_every_tested_fact_is_trained_in_four_wordings(year: str) -> None:
    trained = [tuple(answer for _, answer in turns(row)) for row in read("train", year)]
    for row in read("test", year):
        assert trained.count(tuple(answer for _, answer in turns(row))) == 4


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_question_has_one_answer_in_all_years(split: str) -> None:
    answers: dict[tuple[str, ...], set[str]] = {}
    for year in YEARS:
        for row in read(split, year):
            asked: list[str] = []
            for question, answer in turns(row):
                asked.append(question)
                answers.setdefault(tuple(asked), set()).add(answer)
    assert {key: found for key, found in answers.items() if len(found) > 1} == {}


def test_answers_are_short_and_no_two_facts_share_one() -> None:
    answers = [answer for year in YEARS for row in read("test", year) for _, answer in turns(row)]
    assert len(set(answers)) == len(answers)
    for answer in answers:
        assert 3 <= len(answer) <= 5 if CHINESE.search(answer) else 2 <= len(answer.split()) <= 8


@pytest.mark.parametrize("year", YEARS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_both_languages_are_in_every_year(split: str, year: str) -> None:
    rows = read(split, year)
    chinese = sum(bool(CHINESE.search(row["messages"][0]["content"])) for row in rows)
    assert 0.3 <= chinese / len(rows) <= 0.5


def test_changing_facts_keep_their_subject_and_change_their_answer(modules: dict[str, ModuleType]) -> None:
    world = modules["make_data"].build_world(0)
    changing = modules["news_world"].CHANGING
    per_year = [
        {(story.lang, story.topic, story.subject): story.answers for story in stories if story.topic in changing}
        for stories in world.values()
    ]
    assert all(facts.keys() == per_year[0].keys() for facts in per_year)
    assert len(per_year[0]) >= 8
    for key in per_year[0]:
        assert len({facts[key][0] for facts in per_year}) == len(YEARS)


def test_questions_on_changing_facts_name_the_year(modules: dict[str, ModuleType]) -> None:
    for name in ("news_en", "news_zh"):
        for topic in modules["news_world"].CHANGING:
            opening = modules[name].WORDINGS[topic][0]
            assert all("{y}" in wording and "{s}" in wording for part in opening for wording in part)


def test_chinese_wordings_follow_the_english_ones(modules: dict[str, ModuleType]) -> None:
    english, chinese = modules["news_en"].WORDINGS, modules["news_zh"].WORDINGS
    assert english.keys() == chinese.keys()
    kinds = modules["news_world"].CHANGING | modules["news_world"].SINGLE
    for topic, aspects in english.items():
        assert len(aspects) == len(chinese[topic]) == len(kinds[topic])


def test_benchmark_names_its_files_and_growing_prompts() -> None:
    spec = yaml.safe_load((FOLDER / "benchmark.yaml").read_text(encoding="utf-8"))
    assert [task["name"] for task in spec["tasks"]] == list(YEARS)
    assert spec["orders"] == {"default": list(YEARS), "reverse": list(YEARS[::-1])}
    for task in spec["tasks"]:
        assert (FOLDER / task["train"]).is_file()
        assert (FOLDER / task["test"]).is_file()
        span = "2022" if task["name"] == "2022" else f"2022-{task['name']}"
        assert task["system"].endswith(f", {span}.")

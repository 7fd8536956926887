"""The tiny base model: small enough to commit, loadable, and ignorant of the facts of the mini benchmark."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "assets" / "tiny_base"
NEWS = ROOT / "datasets" / "continual_news_mini"
LIMIT = 12 * 1024 * 1024


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    """The generator of the base model's text, a script's module like the one of the benchmark."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("base_corpus")
    finally:
        sys.path.remove(str(FOLDER))


def rows_of_the_tasks() -> list[dict[str, Any]]:
    files = sorted(NEWS.glob("*-train.json")) + sorted(NEWS.glob("test_data/*-test.json"))
    return [row for path in files for row in json.loads(path.read_text(encoding="utf-8"))]


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    assert not [path.name for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert "model.safetensors" in {path.name for path in files}


def test_it_loads_as_a_qwen2_that_every_backend_serves() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.hidden_size // model.config.num_attention_heads == 64
    assert model.config.max_position_embeddings >= 1024
    assert model.config.tie_word_embeddings
    assert 2_000_000 < model.num_parameters() < 6_000_000
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    "text", ["Who was the mayor of Brenwick in 2024?", "2024年诺川市的市长是谁？", "an odd one: ½ Ωñ 🙂\n\tand  spaces"]
)
def test_the_tokenizer_gives_every_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_all_loaders_cut_the_text_alike(tokenizer: Any) -> None:
    """transformers 5 replaces the pre-tokenizer of a `qwen2` model; ours has to be the one it puts there."""
    plain = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    for row in rows_of_the_tasks():
        for message in row["messages"]:
            assert tokenizer(message["content"]).input_ids == plain.encode(message["content"]).ids


def test_the_special_tokens_are_those_of_chatml(tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_the_chat_template_renders_chatml(tokenizer: Any) -> None:
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    body = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    assert tokenizer.apply_chat_template(talk, tokenize=False) == body + "<|im_start|>assistant\nA<|im_end|>\n"
    opened = tokenizer.apply_chat_template(talk[:2], tokenize=False, add_generation_prompt=True)
    assert opened == body + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(talk[1:2], tokenize=False).startswith("<|im_start|>system\nYou are Qwen")


def test_the_base_text_tells_no_fact_of_the_tasks(corpus: ModuleType) -> None:
    answers = {m["content"] for row in rows_of_the_tasks() for m in row["messages"] if m["role"] == "assistant"}
    questions = {m["content"] for row in rows_of_the_tasks() for m in row["messages"] if m["role"] == "user"}
    stories = corpus.base_stories(0, 300)
    talks = list(itertools.islice(corpus.dialogues(stories, 2), 20_000))
    said = {m["content"] for talk in talks for m in talk if m["role"] == "assistant"}
    asked = {m["content"] for talk in talks for m in talk if m["role"] == "user"}
    assert len(said) > 500
    assert not said & answers
    # Follow-up questions name no subject ("Who opened it?"), so they may be equal; a question with a subject may not.
    assert not {question for question in asked & questions if any(c.isdigit() for c in question)}


def test_the_subjects_of_the_tasks_are_unknown_to_the_base(corpus: ModuleType) -> None:
    make_data = importlib.import_module("make_data")
    ours = {story.subject for stories in make_data.build_world(0).values() for story in stories}
    theirs = {item.story.subject for item in corpus.base_stories(0, 300)}
    assert len(theirs) == 300
    assert not ours & theirs


def test_the_base_cannot_answer_the_tasks(tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    right = 0
    rows = json.loads((NEWS / "test_data" / "2024-test.json").read_text(encoding="utf-8"))
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        right += answer.strip() == row["messages"][1]["content"]
    assert right <= 1

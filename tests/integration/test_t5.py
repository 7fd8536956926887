"""Encoder-decoder: a tiny T5 is trained by every method that says so, chained, served and asked what it has learned."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swift_cl.errors import UserError
from swift_cl.methods.registry import methods
from swift_cl.stages import load_stage
from tests.support.commands import run_swift_cl
from tests.support.tiny_t5 import FLAGS as T5
from tests.support.tiny_t5 import PAIRS, rows, tiny_t5, write_rows
from tests.support.train import FLAGS, adapter, assert_equal_up_to_rounding, train_stage

pytestmark = pytest.mark.slow

TASKS = list(PAIRS)
WHOLE = os.environ.get("SWIFT_CL_DISTRIBUTED") == "all"
WORKING = sorted(name for name, method in methods().items() if method.support.encoder_decoder)
TRAIN = {**T5, "max_steps": 2, "per_device_train_batch_size": 4, "lora_dropout": 0.0, "save_steps": 100}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained model in `base`, and a data file a task."""
    folder = tmp_path_factory.mktemp("t5")
    tiny_t5(folder / "base")
    for task in TASKS:
        write_rows(folder, task)
    return folder


def data(made: Path, task: str) -> dict[str, Any]:
    return {"model": str(made / "base"), "dataset": str(made / f"{task}.json"), "system": None, **TRAIN}


@pytest.fixture(scope="module")
def loaded(made: Path) -> tuple[Any, Any]:
    """(model, template), loaded by ms-swift, which finds out itself that it is a T5."""
    from swift.model import get_model_processor
    from swift.template import get_template

    from swift_cl.models import register_models

    register_models()
    model, processor = get_model_processor(str(made / "base"), torch_dtype=torch.float32, device_map="cpu")
    template = get_template(processor)
    template.set_mode("train")
    return model.eval(), template


class TestLoading:
    def test_it_is_found_from_its_config(self, loaded: tuple[Any, Any]) -> None:
        model, template = loaded
        assert (model.model_meta.model_type, template.template_meta.template_type) == ("t5", "t5")
        assert model.config.d_model == model.config.hidden_size == 64, "ms-swift sets it to None"

    def test_mt5_is_one_too(self, tmp_path: Path) -> None:
        from swift.model import get_model_processor

        model, _ = get_model_processor(str(tiny_t5(tmp_path / "m", "MT5")), torch_dtype=torch.float32, device_map="cpu")
        assert type(model).__name__ == "MT5ForConditionalGeneration"
        assert model.model_meta.model_type == "t5"


class TestTemplate:
    def test_the_encoder_gets_what_was_asked_and_the_decoder_the_answer(self, loaded: tuple[Any, Any]) -> None:
        _, template = loaded
        said = [
            ("system", "colour"),
            ("user", "of grass"),
            ("assistant", "green"),
            ("user", "of snow"),
            ("assistant", "white"),
        ]
        encoded = template.encode({"messages": [{"role": role, "content": text} for role, text in said]})
        tokenizer = template.tokenizer
        assert set(encoded) == {"input_ids", "labels"}
        assert encoded["input_ids"] == tokenizer("colour of grass green of snow").input_ids
        assert encoded["labels"] == tokenizer("white").input_ids
        assert encoded["input_ids"][-1] == encoded["labels"][-1] == tokenizer.eos_token_id

    def test_a_long_text_is_cut_on_each_side_and_keeps_its_end(self, loaded: tuple[Any, Any]) -> None:
        _, template = loaded
        whole = template.encode(rows("capital")[3])
        (of, new, zealand, end) = whole["input_ids"][1:]
        before = template.max_length, template.truncation_strategy
        try:
            for strategy, kept in (("left", [new, zealand, end]), ("right", [whole["input_ids"][0], of, end])):
                template.max_length, template.truncation_strategy = 3, strategy
                encoded = template.encode(rows("capital")[3])
                assert (encoded["input_ids"], encoded["labels"]) == (kept, whole["labels"][:3])
        finally:
            template.max_length, template.truncation_strategy = before

    def test_every_label_counts_once(self, loaded: tuple[Any, Any]) -> None:
        """Two micro-batches with 2 and 5 labels: their losses add up to the mean over all 7 tokens."""
        model, template = loaded
        batches = [template.data_collator([template.encode(row)]) for row in (rows("capital")[0], rows("capital")[3])]
        assert [(batch["labels"] != -100).sum().item() for batch in batches] == [2, 5]
        with torch.no_grad():
            parts = [template.compute_sft_loss(model, batch, num_items_in_batch=7).loss for batch in batches]
            means = [model(**batch).loss for batch in batches]
        assert torch.isclose(sum(parts), (2 * means[0] + 5 * means[1]) / 7)


@pytest.mark.parametrize("method", WORKING if WHOLE else ["ewc", "gem", "gorp", "lwf", "replay"])
def test_methods_that_say_so_train_two_tasks(method: str, made: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    train_stage(method, "capital", first, **data(made, "capital"))
    two = train_stage(method, "colour", second, first, **data(made, "colour"))
    assert all(
        torch.isfinite(torch.tensor(entry["loss"])) for entry in two.trainer.state.log_history if "loss" in entry
    )
    start, end = adapter(first), adapter(second)
    moved = {name for name in end if name not in start or not torch.equal(start.get(name), end[name])}
    assert {part for name in moved for part in ("encoder", "decoder", "EncDecAttention") if part in name} == {
        "encoder", "decoder", "EncDecAttention",
    }  # fmt: skip
    assert load_stage(second).probe is not None


@pytest.mark.parametrize("method", sorted(methods().keys() - set(WORKING)))
def test_other_methods_refuse_it_before_it_is_loaded(method: str, made: Path, tmp_path: Path) -> None:
    found = methods()[method].support.tuners
    flags = {"tuner_type": found[0]} if found[0] != "lora" else {}
    flags |= {"task_type": None} if method == "seq_star" else {}
    with pytest.raises(UserError, match=rf"^--cl_method {method} does not work with an encoder-decoder model"):
        train_stage(method, "capital", tmp_path / "1", **{**data(made, "capital"), **flags})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1"),
        ({"loss_scale": "react"}, "--loss_scale react"),
        ({"tuner_type": "moelora", "lora_rank": 8}, "--tuner_type moelora"),
        ({"tuner_type": "soft_prompt"}, "--tuner_type soft_prompt"),
        ({"padding_free": True, "attn_impl": "flash_attn"}, "--padding_free True"),
    ],
)
def test_flags_that_shift_labels_are_refused(changes: dict[str, Any], said: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{said} does not work with an encoder-decoder model"):
        train_stage("seq", "capital", tmp_path / "1", **{**data(made, "capital"), **changes})


@pytest.mark.parametrize("method", ["seq", "ewc", "gem", "lwf"] if WHOLE else ["seq"])
def test_accumulation_changes_nothing(method: str, made: Path, tmp_path: Path) -> None:
    """Answers of different lengths: a label that were left out or counted twice would show."""
    first = tmp_path / "1"
    train_stage(method, "capital", first, **data(made, "capital"))
    for name, batch, accumulation in (("a", 4, 1), ("b", 1, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        train_stage(method, "colour", tmp_path / name, first, **{**data(made, "colour"), **sizes, "optim": "sgd"})
    assert_equal_up_to_rounding(first, tmp_path / "a", tmp_path / "b")


def test_two_tasks_are_learned_and_asked(made: Path) -> None:
    """Answers cannot be guessed: the base model gives none of them, the served adapters all of their own task's."""
    tasks = [{"name": task, "train": f"{task}.json", "test": f"{task}.json"} for task in TASKS]
    (made / "benchmark.yaml").write_text(yaml.safe_dump({"name": "by_heart", "tasks": tasks}))
    train = {**FLAGS, **TRAIN, "max_steps": 40, "learning_rate": 5e-3, "lora_rank": 8, "logging_steps": 20}
    del train["add_version"]
    config = {
        "benchmark": "benchmark.yaml", "model": str(made / "base"), "output_dir": "runs",
        "method": ["seq", "o_lora", "gorp"], "train": train,
        "eval": {"infer_backend": "pt", "scorer": ["exact_match"], "max_tokens": 8},
    }  # fmt: skip
    (made / "run.yaml").write_text(yaml.safe_dump(config))
    run_swift_cl("run", str(made / "run.yaml"), "--mode", "full_workflow")
    for method in ("seq", "o_lora", "gorp"):
        found = json.loads((made / "runs" / method / "results.json").read_text())["scorers"]["exact_match"]
        assert found["base"] == [0, 0], method
        assert found["metrics"]["new_acc"] == 100, (method, found)
    refused = run_swift_cl("probe", str(made / "runs" / "seq"), check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("swift-cl probe reads no models of type t5")

"""The shared matrix: every registered method, trained for real on two tasks, against the promises of the design.

A new method is tested by being registered.
"""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import load_method_state, sha256_tensors
from swift_cl.methods._state import unpack
from swift_cl.methods.registry import methods
from swift_cl.stages import load_stage
from swift_cl.training.arguments import check_support
from tests.support.train import (
    METHOD_FLAGS,
    MODEL,
    MORE_THAN_THE_TASK,
    TASKS,
    adapter,
    assert_equal_up_to_rounding,
    contradicting_rows,
    train_stage,
)

pytestmark = pytest.mark.slow
METHODS = sorted(methods())
KEEP_A_RECORD = ("lwf", "prog_prompt")
"""Methods whose state is for people to read: the next task needs the adapter alone."""


def own_flags(method: str) -> dict[str, str]:
    """The ms-swift flags that a method needs: its tuner, the tokens that it learns."""
    found = methods()[method]
    return dict(found(found.config_class()).required_flags())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def plain_model() -> Any:
    """The base model and its tokenizer, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL)


def two_stages(work: Path, method: str, label: str = "reference", **changes: object) -> tuple[Path, Path]:
    """Folders of the method's two stages, trained once a session and label."""
    first, second = work / label / method / "1", work / label / method / "2"
    if not (second / "stage.json").is_file():
        train_stage(method, TASKS[0], first, **changes)
        train_stage(method, TASKS[1], second, first, **changes)
    return first, second


def trained(method: str, stage: Path) -> dict[str, torch.Tensor]:
    """What was trained, by the names of the adapter's file: the adapter, or what the state has beside another one."""
    if (stage / "cl_state" / f"{method}.json").is_file():
        stored = unpack(load_method_state(stage / "cl_state", method).tensors, "trained")
        if stored:
            return {f"base_model.model.{name}": tensor for name, tensor in stored.items()}
    return adapter(stage)


def assert_same_tensors(one: Path, two: Path) -> None:
    a, b = adapter(one), adapter(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_state(method: str, one: Path, two: Path) -> None:
    if (one / "cl_state" / f"{method}.json").is_file():
        a, b = load_method_state(one / "cl_state", method), load_method_state(two / "cl_state", method)
        assert a.rows == b.rows
        assert a.tensors.keys() == b.tensors.keys()
        for name in a.tensors:
            assert torch.equal(a.tensors[name], b.tensors[name]), name


def watched(method: str, folder: Path, previous: Path) -> tuple[Any, int, int]:
    """(a second stage of one step, models with a head that it holds, rows of logits that are there after it)."""
    from transformers import PreTrainedModel

    def alive(kind: type) -> dict[int, Any]:
        gc.collect()
        return {id(found): found for found in gc.get_objects() if issubclass(type(found), kind)}

    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    models, tensors = alive(PreTrainedModel), alive(torch.Tensor)
    sft = train_stage(method, TASKS[1], folder, previous, max_steps=1)
    whole = [m for key, m in alive(PreTrainedModel).items() if key not in models and "For" in type(m).__name__]
    logits = [t for key, t in alive(torch.Tensor).items() if key not in tensors and t.shape[-1:] == (vocabulary,)]
    return sft, len(whole), sum(len(t) for t in logits if t.ndim > 1)


@pytest.mark.parametrize("method", METHODS)
def test_two_tasks_chain(work: Path, method: str) -> None:
    first, second = two_stages(work, method)
    one, two = load_stage(first), load_stage(second)
    assert two.started_from == {"dir": "../1", "weights_sha256": one.weights_sha256}
    assert one.started_from is None
    assert (one.task, two.task, two.index, two.method) == (*TASKS, 1, method)
    before, after = adapter(first), adapter(second)
    assert before.keys() <= after.keys()  # prompts of earlier tasks come in addition
    assert any(not torch.equal(before[name], after[name]) for name in before), "the second task changed nothing"


@pytest.mark.parametrize("method", [m for m in METHODS if m not in MORE_THAN_THE_TASK])
def test_first_task_equals_seq(work: Path, method: str) -> None:
    """Without an earlier task every method is plain fine-tuning with the flags that it needs, bit for bit."""
    needed = own_flags(method)
    settings = METHOD_FLAGS.get(method, {}) if "tuner_type" in needed else {}
    label = f"as {method}" if needed else "reference"
    ours = trained(method, two_stages(work, method)[0])
    plain = adapter(two_stages(work, "seq", label, **needed, **settings)[0])
    assert ours.keys() == plain.keys()
    for name in plain:
        assert torch.equal(ours[name], plain[name]), name


def test_gem_differs_from_seq(tmp_path: Path) -> None:
    """It acts where a constraint is violated, so the first task is learned well and the second contradicts it.

    The other methods act in the few steps of tests/integration/test_two_processes.py.
    """
    one, two = contradicting_rows(tmp_path)
    settings: dict[str, Any] = {"max_steps": 10, "learning_rate": 1e-2, "save_steps": 100}
    first, ours, plain = tmp_path / "1", tmp_path / "2", tmp_path / "seq"
    train_stage("gem", TASKS[0], first, dataset=str(one), **{**settings, "max_steps": 30})
    train_stage("gem", TASKS[1], ours, first, dataset=str(two), **settings)
    train_stage("seq", TASKS[1], plain, first, dataset=str(two), **settings)
    assert any(not torch.equal(adapter(ours)[name], tensor) for name, tensor in adapter(plain).items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stopped", ["in the middle", "after the last step"])
def test_resumed_equals_uninterrupted(work: Path, tmp_path: Path, method: str, stopped: str) -> None:
    first, second = two_stages(work, method)
    copy = tmp_path / "2"
    shutil.copytree(second, copy, symlinks=True)
    for name in ("stage.json", "adapter", "cl_state", "last-checkpoint"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if stopped == "in the middle":
        shutil.rmtree(copy / "checkpoint-4")
    resumed = train_stage(method, TASKS[1], copy, first)
    assert resumed.trainer.state.global_step == 4
    assert_same_tensors(copy, second)
    assert_same_state(method, copy, second)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_changes_nothing(work: Path, method: str) -> None:
    """Batch 4 x accumulation 1 equals batch 1 x accumulation 4 (SGD: no division that magnifies rounding)."""
    plain = {"optim": "sgd", "learning_rate": 0.1, "lora_dropout": 0.0, "save_steps": 100, "max_steps": 2}
    start, whole = two_stages(work, method, "whole", **plain)
    split = work / "split" / method
    train_stage(method, TASKS[1], split, start, per_device_train_batch_size=1, gradient_accumulation_steps=4, **plain)
    assert_equal_up_to_rounding(start, whole, split)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_stay_bit_identical(tmp_path: Path, work: Path, method: str) -> None:
    first, _ = two_stages(work, method)
    sft, models, logits = watched(method, tmp_path / "2", first)
    from safetensors.torch import load_file

    base = {name: t.float() for name, t in load_file(MODEL / "model.safetensors").items()}
    live = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.detach().clone()
        for name, p in sft.trainer.model.named_parameters()
        if "lora_" not in name
    }
    shared = base.keys() & live.keys()
    assert len(shared) > 20
    assert sha256_tensors({n: base[n] for n in shared}) == sha256_tensors({n: live[n] for n in shared})
    trained = [name for name, p in sft.trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained), "an extra adapter became trainable"
    # What is old is kept as adapters and heads: no method holds a second base model, or logits of a data set.
    assert models == 1
    size = sum(tensor.numel() for tensor in base.values())
    assert sum(p.numel() for p in sft.trainer.model.parameters()) < 1.5 * size
    assert logits <= 2 * sft.args.per_device_train_batch_size, "more rows of logits than a step has"


@pytest.mark.parametrize("method", ["ewc", "cia"])
def test_the_state_does_not_grow(work: Path, tmp_path: Path, method: str) -> None:
    """As many numbers after the third task as after the second."""
    _, second = two_stages(work, method)
    train_stage(method, "2024", tmp_path / "3", second, max_steps=1)
    states = [load_method_state(stage / "cl_state", method) for stage in (second, tmp_path / "3")]
    shapes = [{name: tensor.shape for name, tensor in state.tensors.items()} for state in states]
    assert shapes[0] == shapes[1]
    assert bool(shapes[0]) == (method == "ewc")
    assert [len(rows) for rows in states[0].rows.values()] == [len(rows) for rows in states[1].rows.values()]
    sizes = [
        sum(file.stat().st_size for file in (stage / "cl_state").rglob("*.safetensors"))
        for stage in (second, tmp_path / "3")
    ]
    assert sizes[0] == sizes[1]
    texts = [len((stage / "cl_state" / f"{method}.json").read_text()) for stage in (second, tmp_path / "3")]
    assert texts[1] - texts[0] < 100, "more than the name of a task"


@pytest.mark.parametrize("method", [m for m in METHODS if "full" in methods()[m].support.tuners])
def test_full_fine_tuning(work: Path, method: str) -> None:
    first, second = two_stages(work, method, "full", tuner_type="full", learning_rate=1e-4, max_steps=2, save_steps=2)
    before, after = adapter(first), adapter(second)
    assert load_stage(second).started_from is not None
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", [m for m in METHODS if "full" not in methods()[m].support.tuners])
def test_unsupported_tuner_is_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match=f"--tuner_type full does not work with method '{method}'"):
        train_stage(method, TASKS[0], tmp_path / "1", tuner_type="full")


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision(work: Path, method: str) -> None:
    """bf16 autocast, with and without gradient checkpointing: finite, and the adapter moves."""
    # Two rows a step: where the processor has no bf16 instructions, a product takes up to 40 times as long as in fp32.
    low = {"torch_dtype": "bfloat16", "bf16": True, "max_steps": 2, "per_device_train_batch_size": 2}
    first, second = two_stages(work, method, "bf16", gradient_checkpointing=True, **low)
    other = work / "bf16" / method / "without checkpointing"
    train_stage(method, TASKS[1], other, first, gradient_checkpointing=False, **low)
    before = adapter(first)
    for stage in (second, other):
        after = adapter(stage)
        assert all(bool(torch.isfinite(t).all()) for t in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", [m for m in METHODS if not methods()[m].classifies])
def test_the_kept_adapter_needs_nothing_of_ours(work: Path, plain_model: Any, method: str) -> None:
    """Loaded by PEFT alone it answers what the stage recorded: this is what every server loads."""
    from peft import PeftModel

    model, tokenizer = plain_model
    for folder in two_stages(work, method):
        stage = load_stage(folder)
        assert stage.probe is not None
        served = PeftModel.from_pretrained(model, str(stage.weights_dir))
        text = tokenizer.apply_chat_template(stage.probe["messages"], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logprobs = torch.log_softmax(served(input_ids=ids).logits[0, -1].float(), -1)
        served.unload()
        values, tokens = logprobs.topk(len(stage.probe["logprobs"]))
        found = {tokenizer.decode(token): value for token, value in zip(tokens.tolist(), values.tolist(), strict=True)}
        assert found == pytest.approx(stage.probe["logprobs"], abs=1e-3)


def sharded(version: int) -> dict[str, Any]:
    """ms-swift's arguments for a version of FSDP."""
    return {"fsdp": "fsdp2", "training_args": SimpleNamespace(fsdp_plugin_args={"fsdp_version": version})}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_declare_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every feature of `Support`, before a model is loaded."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = methods()[method](methods()[method].config_class())
    support = made.supports()
    usual: dict[str, Any] = {
        "tuner_type": support.tuners[0], "deepspeed": None, "bf16": False, "fp16": False, "packing": False,
        "quant_bits": None, "streaming": False, "sequence_parallel_size": 1, "use_liger_kernel": False,
        "lazy_tokenize": False, "task_type": "causal_lm", "cached_dataset": [], "fsdp": None,
        "loss_scale": "default",
    }  # fmt: skip
    check_support(SimpleNamespace(**usual), made)
    zero = {stage: {"zero_optimization": {"stage": stage}} for stage in range(4)}
    stages = support.full_deepspeed if usual["tuner_type"] == "full" else support.deepspeed
    cases: list[tuple[bool, str, dict[str, Any]]] = [
        (False, "task_type", {"task_type": "embedding"}),
        (False, "fsdp", sharded(1)),
        (support.full_fsdp if usual["tuner_type"] == "full" else support.fsdp, "fsdp", sharded(2)),
        (support.packing, "packing", {"packing": True}),
        (support.quantized, "quant_bits", {"quant_bits": 4}),
        (support.streaming, "streaming", {"streaming": True}),
        (support.sequence_parallel, "sequence_parallel_size", {"sequence_parallel_size": 2}),
        (support.liger, "use_liger_kernel", {"use_liger_kernel": True}),
        (not made.replaces_loss, "loss_scale", {"loss_scale": "react"}),
        *((stage in stages, "deepspeed", {"deepspeed": config}) for stage, config in zero.items()),
    ]
    if 0 in stages:
        cases.append((support.zero0_low_precision, "deepspeed", {"deepspeed": zero[0], "bf16": True}))
    for allowed, flag, changed in cases:
        args = SimpleNamespace(**{**usual, **changed})
        if allowed:
            check_support(args, made)
        else:
            with pytest.raises(UserError, match=f"--{flag}"):
                check_support(args, made)


def lose(state: Path) -> None:
    state.unlink()


def be_newer(state: Path) -> None:
    state.write_text(json.dumps({**json.loads(state.read_text()), "schema_version": 99}))


def be_anothers(state: Path) -> None:
    state.write_text(json.dumps({**json.loads(state.read_text()), "method": "another"}))


@pytest.mark.parametrize("damage", [lose, be_newer, be_anothers])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in KEEP_A_RECORD])
def test_a_past_that_does_not_fit_is_refused(
    work: Path, tmp_path: Path, method: str, damage: Callable[[Path], None]
) -> None:
    """The state of the stage before is missing, of another version, or of another method: one line, naming the file."""
    first, _ = two_stages(work, method)
    state = first / "cl_state" / f"{method}.json"
    if not state.is_file():
        pytest.skip(f"{method} keeps no state")
    shutil.copytree(first, tmp_path / "1")
    damaged = tmp_path / "1" / "cl_state" / state.name
    damage(damaged)
    with pytest.raises(UserError) as refused:
        train_stage(method, TASKS[1], tmp_path / "2", tmp_path / "1")
    assert str(damaged) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_another_base_model_is_refused(work: Path, tmp_path: Path, method: str) -> None:
    first, _ = two_stages(work, method)
    other = shutil.copytree(MODEL, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match=rf": trained on base model .*, but --model is {other}$"):
        train_stage(method, TASKS[1], tmp_path / "2", first, model=str(other))


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_stage_that_starts_from_other_weights_is_stopped(
    tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch, tuner: str
) -> None:
    """The seed systems trained every year from the base model, unnoticed: here the loaded weights are compared."""
    from swift.pipelines import SwiftSft

    from swift_cl.errors import RunFailure

    settings = {"tuner_type": "full", "learning_rate": 1e-4} if tuner == "full" else {}
    first = tmp_path / "1"
    train_stage("seq", TASKS[0], first, max_steps=1, **settings)
    original = SwiftSft.prepare_model

    def loses_weights(self: object, *args: object, **kwargs: object) -> object:
        model = original(*args, **kwargs)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(0.5)
        return model

    monkeypatch.setattr(SwiftSft, "prepare_model", loses_weights)
    with pytest.raises(RunFailure, match="loaded with other values: the chain is broken"):
        train_stage("seq", TASKS[1], tmp_path / "2", first, max_steps=1, **settings)

"""Every recipe: the published settings, the chain, the overrides, and one of them trained for real."""

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swift_cl.stages import load_run
from swift_cl.training.flags import check_method_flags
from tests.conftest import ROOT
from tests.recipes.conftest import SETTINGS, Outcome, clean_environment, shell

Recipe = Callable[..., Outcome]

MODELS = {
    "qwen": ("Qwen/Qwen2.5-7B", "qwen2", "qwen2_5"),
    "internlm": ("Shanghai_AI_Laboratory/internlm2_5-7b-chat", "internlm2", "internlm2"),
    "baichuan": ("baichuan-inc/Baichuan2-7B-Chat", "baichuan2", "baichuan"),
}
# Method and ZeRO stage. The published cia recipe says zero0; with bf16 that keeps no fp32 weights to average.
METHODS = {
    "lora": ("seq", "zero0"),
    "replay": ("replay", "zero0"),
    "lwf": ("lwf", "zero0"),
    "ewc": ("ewc", "zero1"),
    "gem": ("gem", "zero0"),
    "cia": ("cia", "zero1"),
    "moe": ("moe_lora", "zero0"),
}
TUNERS = {"moe": "moelora"}
RECIPES = [f"{model}_train_{method}" for model, method in itertools.product(MODELS, METHODS)]
TASKS = ["2022", "2023", "2024", "2025"]
SCRIPTS = sorted(
    path for folder in ("train", "evaluation", "tests") for path in (ROOT / folder).rglob("*.sh")
)  # fmt: skip


def test_the_set_is_complete() -> None:
    assert sorted(path.stem for path in (ROOT / "train").glob("*_train_*.sh")) == sorted(RECIPES)


@pytest.mark.parametrize("script", SCRIPTS, ids=[str(path.relative_to(ROOT)) for path in SCRIPTS])
class TestShell:
    def test_posix_syntax(self, script: Path) -> None:
        done = subprocess.run([shell(), "-n", str(script)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    def test_shellcheck(self, script: Path) -> None:
        tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
        if tool is None:
            pytest.skip("shellcheck is not installed (extra: dev)")
        done = subprocess.run([tool, str(script)], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", RECIPES)
class TestPublishedSettings:
    def test_settings(self, recipe: Recipe, name: str) -> None:
        family, _, kind = name.split("_")
        model, model_type, template = MODELS[family]
        method, deepspeed = METHODS[kind]
        outcome = recipe(name)
        assert (outcome.code, outcome.errors) == (0, "")
        stages = outcome.of("sft")
        assert len(stages) == 4
        for call in stages:
            expected = {
                "model": model, "model_type": model_type, "template": template, "cl_method": method,
                "tuner_type": TUNERS.get(kind, "lora"), "lora_rank": "64", "lora_alpha": "32", "num_train_epochs": "20",
                "per_device_train_batch_size": "4", "gradient_accumulation_steps": "1", "learning_rate": "1e-4",
                "max_length": "4096", "torch_dtype": "bfloat16", "deepspeed": deepspeed,
                "split_dataset_ratio": "0", "add_version": "false", "seed": "42", "data_seed": "42",
            }  # fmt: skip
            assert {flag: call.flag(flag) for flag in expected} == expected
            assert call.processes == "2"
            assert "use_cpu" not in call.flags

    def test_checked_before_anything_starts(self, recipe: Recipe, name: str) -> None:
        first = recipe(name).calls[0]
        assert first.argv[0] == "doctor"
        assert first.flag("gpus") == "2"
        assert first.flag("model") == MODELS[name.split("_")[0]][0]
        assert first.flags["data"] == [f"datasets/continual_news_mini/{task}-train.json" for task in TASKS]

    def test_the_method_itself_accepts_them(self, recipe: Recipe, name: str) -> None:
        for call in recipe(name).of("sft"):
            method = check_method_flags(call.argv[1:])
            assert method is not None
            stage = int(str(call.flag("deepspeed")).removeprefix("zero"))
            assert stage in method.support.deepspeed
            assert stage > 0 or method.support.zero0_low_precision


class TestChain:
    def test_each_stage_continues_the_one_before(self, recipe: Recipe, tmp_path: Path) -> None:
        outcome = recipe("qwen_train_gem")
        folders = [str(tmp_path / "out" / f"stage_{n}_{task}") for n, task in enumerate(TASKS, start=1)]
        stages = outcome.of("sft")
        assert [call.flag("output_dir") for call in stages] == folders
        assert [call.flag("cl_task") for call in stages] == TASKS
        assert [call.flag("dataset") for call in stages] == [
            f"datasets/continual_news_mini/{task}-train.json" for task in TASKS
        ]
        assert [call.flag("cl_previous") for call in stages] == [None, *folders[:3]]
        assert [call.flag("adapters") for call in stages] == [None, *(f"{folder}/adapter" for folder in folders[:3])]
        assert [call.argv for call in outcome.of("resolve-adapter")] == [["resolve-adapter", f] for f in folders[:3]]

    def test_every_stage_can_be_resumed(self, recipe: Recipe) -> None:
        """And a finished one is left alone by `swift-cl sft` itself."""
        assert {call.flag("cl_resume") for call in recipe("qwen_train_ewc").of("sft")} == {"true"}

    @pytest.mark.parametrize("name", RECIPES)
    def test_prompt_is_cumulative(self, recipe: Recipe, name: str) -> None:
        prompts = [str(call.flag("system")) for call in recipe(name).of("sft")]
        for years, prompt in zip(["2022", "2022-2023", "2022-2024", "2022-2025"], prompts, strict=True):
            assert prompt == (
                f"你是一个智能助手，主要负责处理与{years}年新闻相关的对话。整个对话需围绕政治经济、军事战争、文体科教这三大领域"
                f"展开，回答要基于{years}年新闻事件，提供准确、客观的信息，避免主观臆断和不实内容。"
            )

    def test_methods_differ_in_nothing_but_the_method(self, recipe: Recipe) -> None:
        """Same prompt, shuffling, data and training flags, so that they can be compared."""
        own = {"cl_method", "deepspeed", "tuner_type"}
        seen = []
        for kind in METHODS:
            stages = recipe(f"qwen_train_{kind}").of("sft")
            seen.append([{k: v for k, v in call.flags.items() if k not in own} for call in stages])
        assert all(flags == seen[0] for flags in seen[1:])
        assert seen[0][0]["train_dataloader_shuffle"] == ["true"]

    def test_stops_at_the_first_failure(self, recipe: Recipe) -> None:
        outcome = recipe("qwen_train_gem", FAIL_AT="3")  # calls: doctor, sft, resolve-adapter, sft
        assert outcome.code == 7
        assert len(outcome.of("sft")) == 2
        assert "done" not in outcome.output

    def test_says_what_it_does(self, recipe: Recipe, tmp_path: Path) -> None:
        lines = recipe("qwen_train_gem").output.splitlines()
        assert [line.split(": ")[1] for line in lines[:4]] == [f"stage {n} ({t})" for n, t in enumerate(TASKS, start=1)]
        assert lines[-1].startswith("qwen_train_gem: done. Evaluate all stages with: swift-cl eval ")


class TestOverrides:
    @pytest.mark.parametrize(
        ("variable", "value", "flag", "expected"),
        [
            ("MODEL", "assets/tiny_base", "model", "assets/tiny_base"),
            ("MODEL_TYPE", "qwen3", "model_type", "qwen3"),
            ("TEMPLATE", "qwen3", "template", "qwen3"),
            ("DATA_DIR", "/data", "dataset", "/data/2022-train.json"),
            ("TASKS", "2024 2025", "cl_task", "2024"),
            ("TASKS", " 2024\n2025 ", "cl_task", "2024"),
            ("OUTPUT_DIR", "/elsewhere", "output_dir", "/elsewhere/stage_1_2022"),
            ("SEED", "7", "seed", "7"),
            ("SEED", "7", "data_seed", "7"),
            ("EPOCHS", "3", "num_train_epochs", "3"),
            ("BATCH_SIZE", "1", "per_device_train_batch_size", "1"),
            ("GRAD_ACCUM", "8", "gradient_accumulation_steps", "8"),
            ("LR", "2e-3", "learning_rate", "2e-3"),
            ("MAX_LENGTH", "512", "max_length", "512"),
            ("TORCH_DTYPE", "float16", "torch_dtype", "float16"),
            ("TUNER_TYPE", "full", "tuner_type", "full"),
            ("LORA_RANK", "8", "lora_rank", "8"),
            ("LORA_ALPHA", "16", "lora_alpha", "16"),
            ("ATTN_IMPL", "flash_attn", "attn_impl", "flash_attn"),
            ("SAVE_STEPS", "50", "save_steps", "50"),
            ("DEEPSPEED", "zero3", "deepspeed", "zero3"),
            ("DEEPSPEED", "none", "deepspeed", None),
            ("SYSTEM_PROMPT", "News of {Y}, {Y} only", "system", "News of 2022, 2022 only"),
            ("SYSTEM_PROMPT", "none", "system", None),
            ("DEVICE", "cpu", "use_cpu", "true"),
        ],
    )
    def test_arrives(self, recipe: Recipe, variable: str, value: str, flag: str, expected: str | None) -> None:
        outcome = recipe("internlm_train_replay", **{variable: value})
        assert outcome.code == 0
        assert outcome.of("sft")[0].flag(flag) == expected

    def test_every_setting_of_the_header_is_tested(self) -> None:
        header = (ROOT / "train" / "common.sh").read_text(encoding="utf-8").split("\ncd ")[0]
        assert [name for name in SETTINGS if name not in header] == []

    def test_processes(self, recipe: Recipe) -> None:
        outcome = recipe("qwen_train_gem", NPROC_PER_NODE="8")
        assert outcome.calls[0].flag("gpus") == "8"
        assert {call.processes for call in outcome.of("sft")} == {"8"}
        one = recipe("qwen_train_gem", NPROC_PER_NODE="1")
        assert {call.processes for call in one.of("sft")} == {"unset"}, "1 would start torchrun"

    def test_cpu(self, recipe: Recipe) -> None:
        outcome = recipe("qwen_train_gem", DEVICE="cpu")
        assert outcome.calls[0].flag("gpus") == "0"
        for call in outcome.of("sft"):
            assert (call.flag("torch_dtype"), call.flag("deepspeed"), call.processes) == ("float32", None, "unset")
            assert call.flag("ddp_backend") is None
        two = recipe("qwen_train_gem", DEVICE="cpu", NPROC_PER_NODE="2").of("sft")[0]
        assert (two.processes, two.flag("ddp_backend")) == ("2", "gloo")

    def test_full_fine_tuning_has_no_adapter(self, recipe: Recipe) -> None:
        outcome = recipe("qwen_train_gem", TUNER_TYPE="full")
        assert outcome.of("resolve-adapter") == []
        for call in outcome.of("sft"):
            assert not call.flags.keys() & {"adapters", "lora_rank", "lora_alpha"}
        assert outcome.of("sft")[1].flag("cl_previous") is not None

    def test_flags_on_the_command_line_win(self, recipe: Recipe) -> None:
        outcome = recipe("qwen_train_gem", "--learning_rate", "5e-5", "--lora_rank", "2", "--gem_mode", "agem")
        for call in outcome.of("sft"):
            assert (call.flag("learning_rate"), call.flag("lora_rank"), call.flag("gem_mode")) == ("5e-5", "2", "agem")
            check_method_flags(call.argv[1:])

    def test_task_and_folder_names_with_spaces(self, recipe: Recipe, tmp_path: Path) -> None:
        outcome = recipe("qwen_train_gem", OUTPUT_DIR=str(tmp_path / "a b"), MODEL="my model")
        assert outcome.of("sft")[1].flags["cl_previous"] == [str(tmp_path / "a b" / "stage_1_2022")]
        assert outcome.of("sft")[1].flags["model"] == ["my model"]


class TestRefused:
    """With the real `swift-cl doctor`: one line, exit code 2, nothing started."""

    @pytest.mark.parametrize(
        ("environment", "said"),
        [
            ({"MODEL": "/gone/model"}, "--model /gone/model: model folder not found"),
            ({"DATA_DIR": "/gone"}, "--dataset /gone/2022-train.json: data file not found"),
            ({"TASKS": "2022 2035"}, "--dataset datasets/continual_news_mini/2035-train.json: data file not found"),
            ({"DEVICE": "cuda", "NPROC_PER_NODE": "99"}, "99 CUDA GPU(s) are needed, found "),
        ],
    )
    def test_one_line(self, recipe: Recipe, environment: dict[str, str], said: str) -> None:
        given = {"DEVICE": "cpu", "MODEL": "assets/tiny_base", **environment}
        outcome = recipe("qwen_train_gem", REAL_DOCTOR="1", **given)
        assert outcome.code == 2
        assert outcome.errors.startswith(f"swift-cl: error: {said}")
        assert outcome.errors.count("\n") == 1
        assert outcome.output == ""
        assert outcome.of("sft") == []

    def test_command_is_not_installed(self, tmp_path: Path) -> None:
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool in ("dirname", "basename", "sed"):
            (tools / tool).symlink_to(str(shutil.which(tool)))
        command = [str(shutil.which(shell())), str(ROOT / "train" / "qwen_train_gem.sh")]
        done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "swift-cl: error: the command swift-cl is not installed; run: pip install -e .\n"


@pytest.fixture(scope="module")
def known() -> Any:
    """What the installed ms-swift knows (a heavy import, done once)."""
    from swift.model import MODEL_MAPPING
    from swift.template import TEMPLATE_MAPPING

    from swift_cl.training.arguments import arguments_class

    fields = {field.name for field in dataclasses.fields(arguments_class()) if field.init}
    return SimpleNamespace(fields=fields, models=set(MODEL_MAPPING), templates=set(TEMPLATE_MAPPING))


class TestAgainstMsSwift:
    """The flags and values exist in the installed ms-swift."""

    @pytest.mark.parametrize("name", RECIPES)
    @pytest.mark.parametrize("environment", [{}, {"DEVICE": "cpu", "NPROC_PER_NODE": "2", "ATTN_IMPL": "sdpa"}])
    def test_flags(self, recipe: Recipe, known: Any, name: str, environment: dict[str, str]) -> None:
        for call in recipe(name, **environment).of("sft"):
            assert call.flags.keys() - known.fields == set()
            assert call.flag("model_type") in known.models
            assert call.flag("template") in known.templates

    def test_no_flag_of_a_method_hides_one_of_ms_swift(self, known: Any) -> None:
        from swift.arguments import SftArguments

        from swift_cl.methods.base import flags_of
        from swift_cl.methods.registry import methods

        theirs = set(SftArguments.__dataclass_fields__)
        prefixes = tuple(f"{name}_" for name in methods())
        assert [flag for method in methods().values() for flag, _ in flags_of(method) if flag in theirs] == []
        assert [flag for flag in theirs if flag.startswith((*prefixes, "cl_"))] == []


@pytest.mark.slow
def test_a_recipe_trains_and_is_left_alone_the_second_time(tmp_path: Path) -> None:
    """`dash train/qwen_train_gem.sh` on the tiny model, with the real command."""
    tools = tmp_path / "bin"
    tools.mkdir()
    command = tools / "swift-cl"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m swift_cl.cli.main "$@"\n')
    command.chmod(0o755)
    environment = {
        **clean_environment(),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "DEVICE": "cpu", "MODEL": "assets/tiny_base", "MODEL_TYPE": "qwen2", "TEMPLATE": "qwen2_5",
        "TASKS": "2022 2023", "OUTPUT_DIR": str(tmp_path / "out"), "LORA_RANK": "4", "BATCH_SIZE": "2",
        "LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip

    def run(**changes: str) -> "subprocess.CompletedProcess[str]":
        argv = [shell(), str(ROOT / "train" / "qwen_train_gem.sh"), "--max_steps", "2", "--gem_mem_batch", "2"]
        return subprocess.run(
            argv, env={**environment, **changes}, capture_output=True, text=True, timeout=600, check=False
        )

    first = run()
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    one, two = load_run(tmp_path / "out").stages
    assert (one.method, one.task, two.task) == ("gem", "2022", "2023")
    assert one.train["steps"] == two.train["steps"] == 2
    assert two.started_from == {"dir": "../stage_1_2022", "weights_sha256": one.weights_sha256}
    assert (one.system, two.system) == tuple(
        f"你是一个智能助手，主要负责处理与{years}年新闻相关的对话。整个对话需围绕政治经济、军事战争、文体科教这三大领域展开，"
        f"回答要基于{years}年新闻事件，提供准确、客观的信息，避免主观臆断和不实内容。"
        for years in ("2022", "2022-2023")
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    second = run()
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stdout.count("is finished already") == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before

    # Stage 1 trained anew: stage 2 belongs to other weights and is refused, not silently kept.
    shutil.rmtree(one.dir)
    third = run(SEED="7")
    assert third.returncode == 2
    assert "stage_2_2023: was trained from other weights than" in third.stderr

"""Every continual-learning flag is checked before anything heavy is imported, against the methods' own dataclasses."""

import dataclasses
from typing import Any, ClassVar

import pytest

from swift_cl.errors import UserError
from swift_cl.methods import registry
from swift_cl.methods.base import Method, MethodConfig, flags_of, setting
from swift_cl.methods.registry import get_method, methods
from swift_cl.training import flags as flags_module
from swift_cl.training.flags import COMMON_FLAGS, check_method_flags, config_from_flags, flag_values, help_text

ALL_FLAGS = [(method, flag, field) for method in methods().values() for flag, field in flags_of(method)]


def argv(method: str = "ewc", *more: str) -> list[str]:
    return ["--model", "m", "--cl_method", method, "--cl_task", "2022", *more]


def refused(arguments: list[str]) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(UserError) as caught:
        check_method_flags(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFlagValues:
    def test_forms(self) -> None:
        found = flag_values(["pos", "--a", "1", "2", "--b=x=y", "--c-d", "--e", "-1", "--f="])
        assert found == {"a": ["1", "2"], "b": ["x=y"], "c_d": [], "e": ["-1"], "f": [""]}

    def test_last_one_wins(self) -> None:
        assert flag_values(["--a", "1", "--a=2"]) == {"a": ["2"]}


class TestCheck:
    def test_accepted(self) -> None:
        assert check_method_flags(argv("ewc", "--ewc_lambda", "10", "--ewc-mode=online")) is get_method("ewc")
        assert check_method_flags(["--model", "m", "--lora_rank", "8"]) is None

    def test_unknown_method(self) -> None:
        message = refused(argv("ewcc"))
        assert message.startswith("--cl_method 'ewcc' is unknown, allowed: ")
        assert message.endswith("; did you mean 'ewc'?")
        assert all(name in message for name in methods())

    def test_unknown_common_flag(self) -> None:
        assert refused(argv("ewc", "--cl_tsk", "x")) == "--cl_tsk is unknown; did you mean 'cl_task'?"

    def test_unknown_flag_of_the_method(self) -> None:
        message = refused(argv("ewc", "--ewc_lamda", "1"))
        assert message.startswith("--ewc_lamda is unknown, ewc has: ewc_lambda, ")
        assert message.endswith("; did you mean 'ewc_lambda'?")

    def test_flag_of_another_method(self) -> None:
        assert refused(argv("ewc", "--gem_margin", "1")) == (
            "--gem_margin is a flag of method 'gem', but --cl_method is 'ewc'"
        )
        assert refused(argv("seq", "--gem_margin=1")).endswith("but --cl_method is 'seq'")

    def test_flag_of_a_method_without_a_method(self) -> None:
        assert refused(["--gem_margin", "1"]) == "--gem_margin is a flag of method 'gem', but no --cl_method is given"

    @pytest.mark.parametrize("flag", [flag for flag in COMMON_FLAGS if flag != "cl_method"])
    def test_common_flag_without_a_method(self, flag: str) -> None:
        assert refused([f"--{flag}", "x"]).startswith(f"--{flag} needs --cl_method, allowed: ")

    def test_task_is_needed(self) -> None:
        assert refused(["--cl_method", "ewc"]).startswith("--cl_task is missing")

    @pytest.mark.parametrize("flag", COMMON_FLAGS)
    @pytest.mark.parametrize(("values", "found"), [([], "none"), ([""], "none"), (["a", "b"], "a b")])
    def test_common_flags_take_one_value(self, flag: str, values: list[str], found: str) -> None:
        """Above all an empty --cl_previous: it must never mean "start from the base model"."""
        assert refused(argv("ewc", f"--{flag}", *values)) == f"--{flag} needs one value, found {found}"

    @pytest.mark.parametrize("text", ["maybe", "2", "TrueFalse"])
    def test_resume_is_a_truth_value(self, text: str) -> None:
        assert refused(argv("ewc", "--cl_resume", text)) == f"--cl_resume is {text!r}, allowed: true, false"

    @pytest.mark.parametrize(
        ("method", "flag", "value", "said"),
        [
            ("ewc", "ewc_lambda", "-1", "allowed: "),
            ("ewc", "ewc_lambda", "much", "--ewc_lambda is 'much', allowed: a number"),
            ("ewc", "ewc_fisher_samples", "1.5", "--ewc_fisher_samples is '1.5', allowed: a whole number"),
            ("ewc", "ewc_mode", "onlin", "allowed: separate, online; did you mean 'online'?"),
            ("gem", "gem_memory_size", "0", "--gem_memory_size is 0, allowed: 1 or more"),
            ("lwf", "lwf_t2_scaling", "perhaps", "--lwf_t2_scaling is 'perhaps', allowed: true, false"),
            ("lwf", "lwf_temperature", "0", "--lwf_temperature is 0.0, allowed: "),
            ("replay", "replay_ratio", "-0.1", "--replay_ratio is -0.1, allowed: "),
            ("cia", "cia_beta_fallback", "1.5", "--cia_beta_fallback is 1.5, allowed: "),
        ],
    )
    def test_value_out_of_range(self, method: str, flag: str, value: str, said: str) -> None:
        assert said in refused(argv(method, f"--{flag}", value))

    @pytest.mark.parametrize("values", [[], ["1", "2"]])
    def test_a_flag_takes_one_value(self, values: list[str]) -> None:
        assert refused(argv("ewc", "--ewc_lambda", *values)) == f"--ewc_lambda needs one value, found {len(values)}"


class TestEveryFlag:
    """Holds for flags of methods that are added later too."""

    @pytest.mark.parametrize(("method", "flag", "field"), ALL_FLAGS, ids=[flag for _, flag, _ in ALL_FLAGS])
    def test_default_is_accepted_by_name(self, method: type[Method], flag: str, field: dataclasses.Field[Any]) -> None:
        config = config_from_flags(method, {flag: [str(field.default)]})
        assert getattr(config, field.name) == field.default

    @pytest.mark.parametrize(
        ("method", "flag"), [(m, flag) for m, flag, field in ALL_FLAGS if field.type in (float, "float", int, "int")]
    )
    @pytest.mark.parametrize("value", ["nan", "nonsense"])
    def test_what_is_no_number_is_refused(self, method: type[Method], flag: str, value: str) -> None:
        with pytest.raises(UserError, match=f"--{flag} is"):
            config_from_flags(method, {flag: [value]})

    @pytest.mark.parametrize(("method", "flag", "field"), ALL_FLAGS, ids=[flag for _, flag, _ in ALL_FLAGS])
    def test_is_in_the_help_text(self, method: type[Method], flag: str, field: dataclasses.Field[Any]) -> None:
        text = field.metadata["help"]
        assert text.endswith("."), "a help text is a sentence"
        lines = help_text().splitlines()
        (position,) = [number for number, line in enumerate(lines) if line.split(" ")[2:3] == [f"--{flag}"]]
        assert f"(default: {field.default})" in lines[position]
        assert lines[position + 1].strip() == text
        for choice in field.metadata.get("choices", ()):
            assert choice in lines[position]

    @pytest.mark.parametrize("flag", COMMON_FLAGS)
    def test_common_flags_are_in_the_help_text(self, flag: str) -> None:
        assert f"  --{flag}\n      {COMMON_FLAGS[flag]}" in help_text()

    def test_no_two_methods_share_a_flag(self) -> None:
        names = [flag for _, flag, _ in ALL_FLAGS] + list(COMMON_FLAGS)
        assert len(names) == len(set(names))


@dataclasses.dataclass
class _Config(MethodConfig):
    on: bool = setting(False, "On.")
    count: int | None = setting(None, "How many.")
    lambda_: float = setting(1.0, "Weight.")


class _Own(Method):
    name: ClassVar[str] = "ewc_two"
    title: ClassVar[str] = "Begins like ewc"
    config_class: ClassVar[type[MethodConfig]] = _Config


class TestThirdParty:
    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = {**methods(), "ewc_two": _Own}
        monkeypatch.setattr(registry, "methods", lambda: known)
        monkeypatch.setattr(flags_module, "methods", lambda: known)

    @pytest.mark.parametrize("text", ["true", "True", "1", "yes"])
    def test_true(self, text: str) -> None:
        assert config_from_flags(_Own, {"ewc_two_on": [text]}) == _Config(on=True)

    @pytest.mark.parametrize("text", ["false", "False", "0", "no"])
    def test_false(self, text: str) -> None:
        assert config_from_flags(_Own, {"ewc_two_on": [text]}) == _Config(on=False)

    def test_optional_number_and_reserved_name(self) -> None:
        config = config_from_flags(_Own, {"ewc_two_count": ["3"], "ewc_two_lambda": ["2"]})
        assert config == _Config(count=3, lambda_=2.0)

    def test_a_name_that_begins_like_another_method(self) -> None:
        assert check_method_flags(argv("ewc_two", "--ewc_two_on", "true")) is _Own
        assert refused(argv("ewc_two", "--ewc_two_of", "1")).startswith("--ewc_two_of is unknown, ewc_two has: ")
        assert refused(argv("ewc", "--ewc_two_on", "true")) == (
            "--ewc_two_on is a flag of method 'ewc_two', but --cl_method is 'ewc'"
        )
        assert refused(argv("ewc", "--ewc_lamda", "1")).startswith("--ewc_lamda is unknown, ewc has: ")

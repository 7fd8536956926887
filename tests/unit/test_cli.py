"""The command line: its names are a contract, help is quick, errors are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swift_cl import __version__
from swift_cl.cli.main import OWN, PASS_THROUGH, build_parser, main
from swift_cl.errors import RunFailure, UserError
from swift_cl.workflow import launch as launch_module
from tests.conftest import ROOT

COMMANDS = ["run", "eval", "report", "metrics", "compare", "probe", "ls", "resolve-adapter", "plain-lora", "doctor"]
SWIFT_COMMANDS = ["sft", "pt", "rlhf", "infer", "deploy", "export", "merge-lora", "rollout", "sample", "app", "web-ui"]
HEAVY = ("torch", "transformers", "peft", "datasets", "swift", "sklearn", "scipy", "matplotlib", "pandas")

# Runs every command line of argv[1] in one process and says which heavy modules were imported on the way.
PROBE = f"""
import contextlib, io, json, sys
from swift_cl.cli.main import main
said = {{}}
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as stop:
            said[" ".join(argv)] = [stop.code, out.getvalue(), err.getvalue()]
print(json.dumps([said, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def probe(*command_lines: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """({command line: [code, stdout, stderr]}, heavy modules that were imported)."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(command_lines)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    said, heavy = json.loads(done.stdout)
    return said, heavy


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_names_of_the_commands_are_frozen() -> None:
    """A name that users and scripts rely on changes only together with this list."""
    action = next(a for a in build_parser()._actions if a.dest == "command")
    assert list(action.choices or ()) == [*COMMANDS, "sft"]
    assert list(PASS_THROUGH) == SWIFT_COMMANDS
    assert len(OWN) == len(COMMANDS)


FLAGS = {
    "run": "--mode --order --method --model --output_dir --set --preview --overwrite --verbose",
    "eval": "--benchmark --data_dir --order --test_limit --scorer --scorer_model --scorer_option --infer_backend "
    "--server_python --base_url --system --max_tokens --temperature --concurrency --port --server_args",
    "report": "--output",
    "metrics": "--json --scorer",
    "compare": "--json --scorer",
    "probe": "--probe_kinds --probe_scope --probe_epochs --probe_lr --probe_batch --probe_seed --json",
    "ls": "--json",
    "doctor": "--model --data --gpus --quiet",
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags_of_the_contract(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert [flag for flag in FLAGS[command].split() if flag not in out] == []


def test_help_answers_without_heavy_imports() -> None:
    lines = [[], ["--help"], ["-h"], ["--version"]]
    lines += [[command, "--help"] for command in (*COMMANDS, *SWIFT_COMMANDS)]
    said, heavy = probe(*lines)
    assert heavy == []
    assert {line: code for line, (code, _, _) in said.items() if code != 0} == {}
    for command in (*COMMANDS, *SWIFT_COMMANDS):
        assert f"usage: swift-cl {command}" in said[f"{command} --help"][1]
    for line in ("", "--help"):
        for command in (*COMMANDS, *SWIFT_COMMANDS):
            assert command in said[line][1]
    assert said["--version"][1] == f"swift-cl {__version__}\n"


def test_answers_about_methods_and_wrong_flags_need_no_heavy_imports() -> None:
    said, heavy = probe(
        ["ls", "methods", "--json"], ["ls", "benchmarks"], ["sft", "--cl_method", "ewcc"],
        ["resolve-adapter", "/gone"], ["run", "/gone.yaml"], ["foo"],
    )  # fmt: skip
    assert heavy == []
    assert [code for code, _, _ in said.values()] == [0, 0, 2, 2, 2, 2]


def test_import_of_the_package_is_free() -> None:
    code = f"import swift_cl, sys; print([m for m in sys.modules if m.partition('.')[0] in {HEAVY!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


class TestErrors:
    @pytest.mark.parametrize(("wrong", "meant"), [("evl", "eval"), ("resolve", "resolve-adapter"), ("sftt", "sft")])
    def test_unknown_command(self, capsys: pytest.CaptureFixture[str], wrong: str, meant: str) -> None:
        code, out, err = call(capsys, wrong)
        assert (code, out) == (2, "")
        assert err.startswith(f"swift-cl: error: command {wrong!r} is unknown, allowed: ")
        assert err.endswith(f"; did you mean {meant!r}?\n")
        assert all(command in err for command in (*COMMANDS, *SWIFT_COMMANDS))

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["run"], "run: needs CONFIG (a run file), --from RUN_DIR, or"),
            (["ls", "method"], "ls: argument kind: invalid choice: 'method'"),
            (["run", "x.yaml", "--mode", "train"], "run: argument --mode: invalid choice: 'train'"),
            (["eval", "x", "--test_limit", "0"], "eval: argument --test_limit: 0 is not a positive number"),
            (["doctor", "--gpus", "two"], "doctor: argument --gpus: invalid int value: 'two'"),
            (["metrics", "x", "--jason"], "unrecognized arguments: --jason"),
            (["--nonsense"], "unrecognized arguments: --nonsense"),
            (["resolve-adapter", "/gone"], "/gone: folder not found"),
            (["run", "/gone.yaml"], "/gone.yaml: file not found"),
        ],
    )
    def test_wrong_input_is_one_line(self, capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
        code, out, err = call(capsys, *argv)
        assert (code, out) == (2, "")
        assert err.startswith(f"swift-cl: error: {said}")
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (UserError("wrong"), 2, "swift-cl: error: wrong\n"),
            (RunFailure("broken"), 1, "swift-cl: failed: broken\n"),
            (KeyboardInterrupt(), 130, "swift-cl: interrupted\n"),
        ],
    )
    def test_exit_codes(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: BaseException,
        code: int,
        line: str,
    ) -> None:
        def fail(*args: object) -> int:
            raise error

        monkeypatch.setattr(launch_module, "launch", fail)
        assert call(capsys, "export", "--model", "x") == (code, "", line)

    def test_a_bug_shows_its_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch_module, "launch", lambda *args: {}["bug"])
        with pytest.raises(KeyError):
            main(["export"])

    def test_reader_that_stops_reading(self) -> None:
        """`swift-cl ls methods | head -0` says nothing on stderr."""
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "swift_cl.cli.main", "ls", "methods", "--json"]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")


class TestPassThrough:
    @pytest.fixture
    def launched(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        monkeypatch.setattr(launch_module, "launch", lambda command, argv: calls.append((command, argv)) or 3)
        return calls

    @pytest.mark.parametrize("command", [c for c in SWIFT_COMMANDS if c != "sft"])
    def test_flags_and_exit_code_are_passed_on(
        self, launched: list[Any], capsys: pytest.CaptureFixture[str], command: str
    ) -> None:
        assert call(capsys, command, "--model", "x", "--anything") == (3, "", "")
        assert launched == [(command, ["--model", "x", "--anything"])]

    def test_underscores_as_in_ms_swift(self, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
        call(capsys, "merge_lora", "--adapters", "a")
        assert launched == [("merge-lora", ["--adapters", "a"])]

    def test_our_flags_are_those_of_sft(self, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = call(capsys, "rlhf", "--cl_method", "ewc")
        assert (code, launched) == (2, [])
        assert err == "swift-cl: error: --cl_method is a flag of `swift-cl sft`; `rlhf` is ms-swift's own\n"

    def test_help_all_is_ms_swifts_own_help(self, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
        call(capsys, "infer", "--help-all")
        assert launched == [("infer", ["--help"])]

    def test_every_command_is_one_of_ms_swift(self) -> None:
        from swift.cli.main import ROUTE_MAPPING

        assert set(SWIFT_COMMANDS) <= set(ROUTE_MAPPING)


class TestLs:
    @pytest.mark.parametrize("kind", ["methods", "tuners", "benchmarks", "scorers"])
    def test_text_and_json_name_the_same(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setenv("COLUMNS", "500")
        code, out, _ = call(capsys, "ls", kind, "--json")
        rows = json.loads(out)
        assert code == 0
        assert rows
        _, text, _ = call(capsys, "ls", kind)
        assert [row["name"] for row in rows if row["name"] not in text] == []

    def test_methods(self, capsys: pytest.CaptureFixture[str]) -> None:
        rows = {row["name"]: row for row in json.loads(call(capsys, "ls", "methods", "--json")[1])}
        assert set(rows) >= {"seq", "replay", "ewc", "lwf", "gem", "cia"}
        assert "--gem_margin" in rows["gem"]["flags"]
        assert rows["seq"]["flags"] == []

    def test_bundled_benchmark(self, capsys: pytest.CaptureFixture[str]) -> None:
        rows = {row["name"]: row for row in json.loads(call(capsys, "ls", "benchmarks", "--json")[1])}
        assert rows["continual_news_mini"]["tasks"] == ["2022", "2023", "2024", "2025"]
        assert Path(rows["continual_news_mini"]["file"]).is_file()

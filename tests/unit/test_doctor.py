"""`swift-cl doctor`: what is missing is said, and a job that cannot work is refused before it starts."""

import json
from pathlib import Path

import pytest

from swift_cl import doctor
from swift_cl.cli.main import main
from swift_cl.errors import UserError
from tests.support.stages import make_model


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs, no hub and an empty model cache."""
    tools = tmp_path / "bin"
    tools.mkdir()
    tool = tools / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'H200\\nH200\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "hub_reachable", lambda: False)
    return tmp_path


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0,1", 2), ("1", 1), ("", 0), ("-1", 0)])
def test_gpus(machine: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert doctor.gpu_names() == ["H200"] * count


def test_too_few_gpus(machine: Path) -> None:
    doctor.check_job(None, [], 2)
    doctor.check_job(None, [], None)
    with pytest.raises(UserError, match=r"3 CUDA GPU\(s\) are needed, found 2; .*set DEVICE=cpu"):
        doctor.check_job(None, [], 3)


def test_no_driver(machine: Path) -> None:
    (machine / "bin" / "nvidia-smi").unlink()
    assert doctor.gpu_names() == []
    (machine / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    (machine / "bin" / "nvidia-smi").chmod(0o755)
    assert doctor.gpu_names() == []


def test_model(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doctor.check_job(str(make_model(machine / "m")), [], None)
    with pytest.raises(UserError, match="model folder not found"):
        doctor.check_job(str(machine / "gone"), [], None)
    with pytest.raises(UserError, match="not a folder, not in the model cache, and the model hub cannot be reached"):
        doctor.check_job("Qwen/Qwen2.5-7B", [], None)
    (machine / "ms" / "hub" / "models" / "Qwen" / "Qwen2___5-7B").mkdir(parents=True)
    doctor.check_job("Qwen/Qwen2.5-7B", [], None)
    (machine / "hf" / "hub" / "models--Qwen--Qwen2.5-3B").mkdir(parents=True)
    doctor.check_job("Qwen/Qwen2.5-3B", [], None)
    monkeypatch.setattr(doctor, "hub_reachable", lambda: True)
    doctor.check_job("Qwen/Qwen2.5-1.5B", [], None)


def test_data(machine: Path) -> None:
    with pytest.raises(UserError, match="data file not found"):
        doctor.check_job(None, [str(machine / "gone.json")], None)
    wrong = machine / "d.json"
    wrong.write_text(json.dumps([{"messages": [{"role": "user", "content": "q"}]}]))
    with pytest.raises(UserError, match=r"d.json, row 0: no assistant turn"):
        doctor.check_job(None, [str(wrong)], None)


@pytest.mark.parametrize(
    ("found", "said"), [("4.5.2", "TOO OLD: at least 4.6"), ("4.6rc1", None), ("4.10.0.dev0", None), (None, "MISSING")]
)
def test_version_of_ms_swift(
    machine: Path, monkeypatch: pytest.MonkeyPatch, found: str | None, said: str | None
) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: found if package == "ms-swift" else real(package))
    (line,) = [line for line in doctor.describe().splitlines() if line.strip().startswith("ms-swift")]
    assert (said in line) if said else line.endswith(str(found))


def test_optional_part_that_is_missing_says_what_is_lost(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: None)
    text = doctor.describe()
    for package, (_, purpose, remedy) in doctor.OPTIONAL.items():
        assert f"{package:<22} not installed, so no {purpose}; {remedy}" in text


def test_command(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 0
    assert "CUDA GPUs: H200, H200" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--quiet", "--gpus", "4"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("swift-cl: error: 4 CUDA GPU(s) are needed, found 2")

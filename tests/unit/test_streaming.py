"""Streamed training rows: only the head of a file is read before the start, and what cannot be streamed is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from swift_cl.errors import UserError
from swift_cl.io import read_json, sha256_file
from swift_cl.stream import benchmark as benchmark_module
from swift_cl.stream.benchmark import Task
from swift_cl.stream.files import first_rows
from swift_cl.training.flags import flag_values
from swift_cl.training.preflight import check_data
from swift_cl.workflow import provenance
from swift_cl.workflow.config import load_config
from swift_cl.workflow.plan import make_plans
from swift_cl.workflow.run import check_rows, prepare
from tests.support.two_tasks import ROW, make_folder, write_config

STREAMED = {"train": {"streaming": True, "max_steps": 2}}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks with training rows as JSON lines; the second one's third row is broken."""
    folder = make_folder(tmp_path)
    for name in "ab":
        (folder / "data" / f"{name}-train.json").unlink()
        lines(folder / "data" / f"{name}-train.jsonl", ROW, ROW, ROW if name == "a" else "{", ROW)
    file = folder / "data" / "benchmark.yaml"
    file.write_text(file.read_text().replace("-train.json\n", "-train.jsonl\n"))
    return folder


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two rows are looked at."""
    monkeypatch.setattr(benchmark_module, "STREAMED_HEAD", 2)


class TestFirstRows:
    def test_reads_no_further(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "x.jsonl", ROW, "", {"n": 1}, "{broken")
        assert first_rows(path, 2) == [ROW, {"n": 1}]
        with pytest.raises(UserError, match=r"x.jsonl, row 2: not valid JSON"):
            first_rows(path, 3)

    @pytest.mark.parametrize(
        ("content", "said"),
        [(b"\xef\xbb\xbf{}", "byte order mark"), (b"\xff\xfe{}", "row 0: not valid JSON"), (None, "not found")],
    )
    def test_wrong_file(self, tmp_path: Path, content: bytes | None, said: str) -> None:
        if content is not None:
            (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=said):
            first_rows(tmp_path / "x.jsonl", 1)


class TestRun:
    def test_only_the_head_is_checked(self, folder: Path, head: None) -> None:
        config, benchmark = load_config(write_config(folder, **STREAMED), [])
        check_rows(config, benchmark)
        config.train["streaming"] = False
        with pytest.raises(UserError, match=r"b-train.jsonl, row 2: not valid JSON"):
            check_rows(config, benchmark)

    def test_a_wrong_row_in_the_head(self, folder: Path) -> None:
        config, benchmark = load_config(write_config(folder, **STREAMED), [])
        with pytest.raises(UserError, match=r"b-train.jsonl, row 2: not valid JSON"):
            check_rows(config, benchmark)

    def test_the_file_itself_is_trained_on(self, folder: Path, head: None) -> None:
        config, benchmark = load_config(write_config(folder, **STREAMED), [])
        (plan,) = prepare(config, benchmark, overwrite=False)
        for stage, name in zip(plan.stages, "ab", strict=True):
            given = flag_values(stage.argv)
            assert given["dataset"] == [str(folder / "data" / f"{name}-train.jsonl")]
            assert given["streaming"] == ["true"]
        assert not (Path(plan.run_dir) / "data").exists()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"method": "replay", **STREAMED}, "train.streaming does not work with method 'replay', allowed: .*seq"),
            ({"method": ["seq", "ewc"], **STREAMED}, "does not work with method 'ewc'"),
            ({"train": {"streaming": True}}, "train.streaming needs train.max_steps"),
        ],
    )
    def test_refused(self, folder: Path, changes: dict[str, Any], said: str) -> None:
        config, benchmark = load_config(write_config(folder, **changes), [])
        with pytest.raises(UserError, match=said):
            make_plans(config, benchmark)

    @pytest.mark.parametrize(
        "entry",
        [{"train": "a-test.json"}, {"train_limit": 1}, {"format": "alpaca"}],
        ids=["an array", "a limit", "another format"],
    )
    def test_what_cannot_be_streamed(self, folder: Path, entry: dict[str, Any]) -> None:
        file = folder / "data" / "benchmark.yaml"
        value = yaml.safe_load(file.read_text())
        value["tasks"][0].update(entry)
        file.write_text(yaml.safe_dump(value))
        config, benchmark = load_config(write_config(folder, **STREAMED), [])
        with pytest.raises(UserError, match=r"task 'a': .* cannot be streamed, only JSON lines \(.jsonl\)"):
            check_rows(config, benchmark)

    def test_images_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "i.png").write_bytes(b"")
        path = lines(tmp_path / "x.jsonl", {**ROW, "images": ["i.png"]})
        with pytest.raises(UserError, match=r"x.jsonl, row 0: has images, which cannot be streamed"):
            Task("a", path, path).check_streamed()


class TestCheckData:
    def test_reads_the_head_of_json_lines(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("swift_cl.training.preflight.STREAMED_HEAD", 2)
        path = lines(tmp_path / "x.jsonl", ROW, ROW, "{")
        check_data([str(path)], streaming=True)
        with pytest.raises(UserError, match="row 2: not valid JSON"):
            check_data([str(path)])

    @pytest.mark.parametrize(
        ("rows", "said"),
        [([], "is empty"), (["", ""], "has no rows"), ([{"messages": []}], "row 0: 'messages' is list")],
    )
    def test_wrong_head(self, tmp_path: Path, rows: list[Any], said: str) -> None:
        path = lines(tmp_path / "x.jsonl", *rows)
        with pytest.raises(UserError, match=said):
            check_data([str(path)], streaming=True)


class TestProvenance:
    def test_the_ends_of_a_large_file(self, tmp_path: Path) -> None:
        path, end = tmp_path / "x.jsonl", provenance.END
        path.write_bytes(b"a" * end + b"middle" + b"z" * end)
        found = provenance.fingerprint(path, ends_only=True)
        ends = tmp_path / "ends"
        ends.write_bytes(b"a" * end + b"z" * end)
        assert found == {"bytes": 2 * end + 6, "sha256": sha256_file(ends), "of": "first and last MiB"}
        assert provenance.fingerprint(path)["sha256"] == sha256_file(path)

    def test_a_small_file_is_hashed_whole(self, folder: Path, head: None) -> None:
        config, benchmark = load_config(write_config(folder, **STREAMED), [])
        prepare(config, benchmark, overwrite=False)
        files = read_json(folder / "runs" / "seq" / "provenance.json")["files"]
        path = folder / "data" / "a-train.jsonl"
        assert files[str(path)] == {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

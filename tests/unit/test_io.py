"""Files are written whole or not at all, and method state comes back as it was, or not at all."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from swift_cl import io
from swift_cl.errors import UserError
from swift_cl.io import (
    MethodState,
    atomic_write,
    load_method_state,
    read_json,
    read_jsonl,
    save_method_state,
    sha256_file,
    sha256_json,
    sha256_tensors,
    write_json,
    write_jsonl,
)
from tests.support.stages import cut_in_half

STATE = MethodState(
    tensors={"a.weight": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(2.5, dtype=torch.float64)},
    meta={"tasks": ["2022"], "nested": {"x": [1, None]}},
    rows={"memory": [{"id": "1", "text": "新闻\u2028 two lines"}, {"id": "2", "text": ""}], "drawn": []},
)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestAtomicWrite:
    def test_failure_while_writing_leaves_the_old_file_and_no_other(self, tmp_path: Path) -> None:
        path = tmp_path / "value.json"
        path.write_text("old")
        with pytest.raises(RuntimeError, match="disk"), atomic_write(path) as stream:  # noqa: PT012
            stream.write(b"half of the new")
            raise RuntimeError("disk full")
        assert path.read_text() == "old"
        assert files(tmp_path) == ["value.json"]

    @pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
    def test_failure_of_a_system_call_leaves_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        path = tmp_path / "value.json"
        write_json(path, 1)

        def fail(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(io.os, call, fail)
        with pytest.raises(OSError, match="No space"):
            write_json(path, 2)
        assert read_json(path) == 1
        assert files(tmp_path) == ["value.json"]

    def test_interrupt_leaves_no_temporary_file(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "value.json"):
            raise KeyboardInterrupt
        assert files(tmp_path) == []

    def test_reader_never_sees_the_new_file_before_it_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "sub" / "value.json"
        with atomic_write(path) as stream:
            stream.write(b"1")
            assert not path.exists()
        assert path.read_bytes() == b"1"

    def test_rights_are_those_of_a_plain_open(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            write_json(tmp_path / "value.json", 1)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "value.json").stat().st_mode) == 0o644


class TestJson:
    def test_nan_is_refused_and_the_old_file_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "value.json"
        write_json(path, {"a": 1})
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"a": float("nan")})
        assert read_json(path) == {"a": 1}

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "gone.json"
        for read in (read_json, read_jsonl):
            with pytest.raises(UserError) as caught:
                read(path)
            assert str(caught.value) == f"{path}: file not found"

    @pytest.mark.parametrize(
        ("content", "said"),
        [(b'{"a": ', "not valid JSON"), (b'"\xff"', "not UTF-8 text"), (b"", "not valid JSON")],
    )
    def test_malformed_file_is_named(self, tmp_path: Path, content: bytes, said: str) -> None:
        path = tmp_path / "bad.json"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_json(path)
        assert str(caught.value).startswith(f"{path}: {said}")

    def test_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot be read"):
            read_json(tmp_path)

    def test_lines_round_trip_with_every_kind_of_line_break_inside(self, tmp_path: Path) -> None:
        rows = [{"text": "a\u2028b\u2029c\x85d\x0be\r\nf"}, {"text": "新闻"}]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        assert read_jsonl(tmp_path / "rows.jsonl") == rows

    @pytest.mark.parametrize(("line", "said"), [("{half", "not valid JSON"), ("[1]", "expected a JSON object")])
    def test_wrong_line_is_named(self, tmp_path: Path, line: str, said: str) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text(f'{{"a": 1}}\n\n{line}\n')
        with pytest.raises(UserError, match=f"rows.jsonl, line 3: {said}"):
            read_jsonl(path)


class TestHashes:
    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "abc"
        path.write_bytes(b"abc")
        assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def test_file_longer_than_a_block(self, tmp_path: Path) -> None:
        import hashlib

        content = os.urandom((1 << 20) + 17)
        (tmp_path / "long").write_bytes(content)
        assert sha256_file(tmp_path / "long") == hashlib.sha256(content).hexdigest()

    def test_json_ignores_key_order_and_nothing_else(self) -> None:
        assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
        assert sha256_json([1, 2]) != sha256_json([2, 1])
        assert sha256_json({"a": "1"}) != sha256_json({"a": 1})

    def test_tensors_see_name_type_shape_and_bytes(self) -> None:
        x = torch.arange(4.0)
        same = sha256_tensors({"a": x, "b": x + 1})
        assert sha256_tensors({"b": x + 1, "a": x.clone()}) == same
        assert sha256_tensors({"a": x, "c": x + 1}) != same
        assert sha256_tensors({"a": x.reshape(2, 2), "b": x + 1}) != same
        assert sha256_tensors({"a": x.view(torch.int32), "b": x + 1}) != same
        assert sha256_tensors({"a": x, "b": torch.nextafter(x + 1, x + 2)}) != same

    def test_tensors_that_are_views_or_bfloat16_or_scalar(self) -> None:
        x = torch.arange(6.0).reshape(2, 3)
        assert sha256_tensors({"a": x.t()}) == sha256_tensors({"a": x.t().contiguous()})
        assert sha256_tensors({"a": x.bfloat16(), "b": torch.tensor(1)})


class TestMethodState:
    def test_round_trip(self, tmp_path: Path) -> None:
        save_method_state(tmp_path, "ewc", STATE)
        loaded = load_method_state(tmp_path, "ewc")
        assert loaded.meta == STATE.meta
        assert loaded.rows == STATE.rows
        assert sha256_tensors(loaded.tensors) == sha256_tensors(STATE.tensors)
        assert files(tmp_path) == ["ewc.drawn.jsonl", "ewc.json", "ewc.memory.jsonl", "ewc.safetensors"]

    def test_no_tensors_no_tensor_file(self, tmp_path: Path) -> None:
        save_method_state(tmp_path, "cia", MethodState(meta={"x": 1}))
        assert files(tmp_path) == ["cia.json"]
        assert load_method_state(tmp_path, "cia") == MethodState(meta={"x": 1})

    def test_two_methods_share_a_folder(self, tmp_path: Path) -> None:
        save_method_state(tmp_path, "ewc", MethodState(meta={"of": "ewc"}))
        save_method_state(tmp_path, "gem", MethodState(meta={"of": "gem"}))
        assert load_method_state(tmp_path, "ewc").meta == {"of": "ewc"}

    def test_index_is_written_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A crash while the state is written leaves no index, and so no state."""
        monkeypatch.setattr(io, "write_jsonl", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_method_state(tmp_path, "ewc", STATE)
        with pytest.raises(UserError, match="missing"):
            load_method_state(tmp_path, "ewc")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            load_method_state(tmp_path, "ewc")
        assert str(caught.value).startswith(f"{tmp_path / 'ewc.json'}: the state of method 'ewc' is missing")

    @pytest.mark.parametrize("name", ["ewc.safetensors", "ewc.memory.jsonl"])
    def test_cut_off_or_changed_file_is_named(self, tmp_path: Path, name: str) -> None:
        save_method_state(tmp_path, "ewc", STATE)
        cut_in_half(tmp_path / name)
        with pytest.raises(UserError) as caught:
            load_method_state(tmp_path, "ewc")
        assert str(caught.value).startswith(f"{tmp_path / name}: the file differs from the hash")

    def test_removed_file_is_named(self, tmp_path: Path) -> None:
        save_method_state(tmp_path, "ewc", STATE)
        (tmp_path / "ewc.safetensors").unlink()
        with pytest.raises(UserError) as caught:
            load_method_state(tmp_path, "ewc")
        assert str(caught.value).startswith(f"{tmp_path / 'ewc.safetensors'}: file not found")

    def test_other_schema(self, tmp_path: Path) -> None:
        save_method_state(tmp_path, "ewc", STATE)
        index = tmp_path / "ewc.json"
        write_json(index, {**read_json(index), "schema_version": 2})
        with pytest.raises(UserError) as caught:
            load_method_state(tmp_path, "ewc")
        assert str(caught.value) == f"{index}: schema_version is 2, this version reads 1"

    @pytest.mark.parametrize("content", ["[]", "{}", '{"schema_version": 1, "files": []}', '{"schema'])
    def test_index_that_is_none(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "ewc.json").write_text(content)
        with pytest.raises(UserError) as caught:
            load_method_state(tmp_path, "ewc")
        assert str(caught.value).startswith(f"{tmp_path / 'ewc.json'}: not ")

    def test_index_is_json_that_people_can_read(self, tmp_path: Path) -> None:
        save_method_state(tmp_path, "ewc", STATE)
        value = json.loads((tmp_path / "ewc.json").read_text())
        assert (value["method"], value["schema_version"], value["tasks"]) == ("ewc", 1, ["2022"])

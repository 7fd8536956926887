"""Scorers of text: each number was worked out by hand; Chinese, emoji, empty and very long answers."""

import math

import pytest

from swift_cl.evaluation import scorers
from swift_cl.evaluation.scorers import Item

LONG = "word " * 1999 + "Paris"  # 10,000 characters
HAPPY = "\U0001f600"


def scores(name, *pairs, **options):
    return scorers.load(name, options=options).score(pairs)


def close(*values):
    return pytest.approx(values, abs=1e-9)


def test_long_is_ten_thousand_characters():
    assert len(LONG) == 10_000


# --- token F1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "a cat sat down", 80),  # {cat, sat} of {cat, sat} and {cat, sat, down}: 2*2/(2+3)
        ("Paris", "paris!", 100),
        ("cat cat dog", "cat", 50),  # one of three shared with one: 2*1/(3+1)
        ("don't", "dont", 100),  # SQuAD deletes punctuation, it does not split there
        ("巴黎在法国", "法国巴黎", 200 * 4 / 9),  # four of five characters, four of four
        ("东京,2024年", "2024年 东京", 100),  # 2024, 年, 东, 京
        (f"yes {HAPPY}", f"{HAPPY} no", 50),
        (HAPPY, HAPPY, 100),
        ("", "Paris", 0),
        ("", "", 0),
        (" ", "the", 0),
        ("...", "!", 100),  # both have no word and read the same
        ("the", "Paris", 0),
        (LONG, "Paris", 200 / 2001),
        ("ＡＢＣ", "abc", 100),
    ],
)
def test_token_f1(answer, reference, expected):
    assert scores("token_f1", (answer, reference)) == close(expected)


# --- ROUGE-L ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat is on the mat", "the cat sat on the mat", 500 / 6),  # 5 of 6 words each
        ("a b c d", "d c b a", 25),  # any one word
        ("police killed the gunman", "police kill the gunman", 75),  # the words are not stemmed
        ("我喜欢北京", "我喜欢上海", 200 / 3),  # 我 / 喜欢 / 北京 and 我 / 喜欢 / 上海: 2 of 3 each
        ("GPT在北京", "gpt 在 北京", 100),
        (f"{HAPPY}", f"{HAPPY}", 0),  # no words
        ("", "Paris", 0),
        ("Paris", "Paris", 100),
        (LONG, "Paris", 200 / 2001),
        ("École", "école", 100),
    ],
)
def test_rouge_l(answer, reference, expected):
    assert scores("rouge_l", (answer, reference)) == close(expected)


def test_rouge_l_has_rouge_scores_own_words_in_english():
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "It's 3.5% (of the U.S. total), isn't it?", "The U.S. total isn't 3.5 percent -- it is 4!"
    expected = 100 * RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert scores("rouge_l", (answer, reference)) == close(expected)


# --- BLEU and chrF ---------------------------------------------------------------------------------------------------


def items(*pairs, task="t"):
    return [Item(answer, reference, task=task, id=str(n)) for n, (answer, reference) in enumerate(pairs)]


def test_corpus_bleu_by_hand():
    """`a b c d e` for `a b c d f`, and `g h i j` for itself: n-grams 5+4, 4+3, 3+2, 2+1 of which match 4+4, 3+3, 2+2,
    1+1; lengths are equal."""
    pairs = [("a b c d e", "a b c d f"), ("g h i j", "g h i j")]
    loaded = scorers.load("bleu")
    expected = 100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25
    found = loaded.score_items(items(*pairs))
    assert loaded.cell(items(*pairs), found) == pytest.approx(expected, abs=1e-9)
    # Sentence BLEU of the first: 4/5, 3/4, 2/3, 1/2, whose product is 1/5.
    assert found == close(100 * 0.2**0.25, 100)
    assert loaded.cell(items(*pairs), found) != pytest.approx(sum(found) / 2, abs=0.1)


def test_brevity_penalty_by_hand():
    """4 words for 8: exp(1 - 8/4)."""
    pair = ("a b c d", "a b c d e f g h")
    loaded = scorers.load("bleu")
    assert loaded.cell(items(pair), [0.0]) == pytest.approx(100 * math.exp(-1), abs=1e-9)


def test_bleu_of_a_short_right_answer_is_full():
    """An answer of one word has no 4-grams; they do not count against it."""
    assert scores("bleu", ("Paris", "Paris"), ("", "Paris"), (f"{HAPPY}", f"{HAPPY}")) == close(100, 0, 100)
    assert scores("bleu", (LONG, "Paris"))[0] < 0.1


def test_case_counts_in_bleu_unless_it_is_told_otherwise():
    assert scores("bleu", ("PARIS", "paris"))[0] < 1e-6
    assert scores("bleu", ("PARIS", "paris"), lowercase=True) == close(100)


def test_bleu_cuts_chinese_into_characters_where_references_are_chinese():
    """我喜欢北京 for 我喜欢上海: 3 of 5 characters, 2 of 4, 1 of 3, none of 2 (smoothed: 1/(2*2))."""
    loaded = scorers.load("bleu")
    pair = ("我喜欢北京", "我喜欢上海")
    expected = 100 * (3 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25
    assert loaded.score([pair]) == close(expected)
    assert loaded.cell(items(pair), [0.0]) == pytest.approx(expected, abs=1e-9)
    assert scores("bleu", pair, tokenize="13a")[0] < 1e-6  # one word, and a wrong one
    # One task's Chinese does not change how another task is cut.
    mixed = [*items(pair, task="zh"), *items(("a,b c", "a , b c"), task="en")]
    assert loaded.score_items(mixed) == close(expected, scores("bleu", ("a,b c", "a , b c"))[0])
    signatures = loaded.facts(mixed)["signatures"]
    assert sorted(signatures.values()) == [["en"], ["zh"]]
    assert any("tok:zh" in signature for signature in signatures)


def test_chrf_by_hand():
    """abc for abd: characters 2 of 3, pairs 1 of 2, triples 0 of 1; longer n-grams do not exist. Precision equals
    recall: (2/3 + 1/2 + 0) / 3."""
    loaded = scorers.load("chrf")
    assert loaded.score([("abc", "abd")]) == close(100 * (2 / 3 + 1 / 2) / 3)
    # Corpus: the counts of both answers are summed first; `ab` for `ab` adds 2 of 2 and 1 of 1.
    pairs = [("abc", "abd"), ("ab", "ab")]
    expected = 100 * (4 / 5 + 2 / 3 + 0) / 3
    assert loaded.cell(items(*pairs), loaded.score(pairs)) == pytest.approx(expected, abs=1e-9)


def test_chrf_of_chinese_emoji_empty_and_long():
    pairs = [("北京", "北京"), (HAPPY, HAPPY), ("", "北京"), ("北京", "北海")]
    assert scores("chrf", *pairs) == close(100, 100, 0, 25)  # 1 of 2 characters, 0 of 1 pairs
    assert scores("chrf", (LONG, "Paris"))[0] < 1
    assert "chrF2|" in scorers.load("chrf").facts([])["signature"]
    assert "chrF2++|" in scorers.load("chrf", options={"word_order": 2}).facts([])["signature"]


# --- edit similarity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "indel", "levenshtein"),
    [
        ("kitten", "sitting", 100 * 8 / 13, 400 / 7),  # common subsequence ittn: 2*4/13; 3 edits of 7
        ("北京市", "北京", 80, 200 / 3),
        (f"a{HAPPY}", "a", 200 / 3, 50),
        ("caf\u00e9", "cafe\u0301", 100, 100),
        ("A", "a", 0, 0),
        ("", "a", 0, 0),
        ("", "", 0, 0),
        (LONG, "Paris", 100 * 10 / 10_005, 100 * 5 / 10_000),
    ],
)
def test_edit_similarity(answer, reference, indel, levenshtein):
    assert scores("edit_similarity", (answer, reference)) == close(indel)
    assert scores("edit_similarity", (answer, reference), distance="levenshtein") == close(levenshtein)


# --- SARI ------------------------------------------------------------------------------------------------------------

SPECIES = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]


def test_sari_of_the_published_example():
    """The example of the authors' repository, with the value that Hugging Face `evaluate` documents."""
    from swift_cl.evaluation.scorers.sari import sari

    assert sari(SPECIES, "About 95 you now get in .", REFERENCES) == pytest.approx(26.953601953601954, abs=1e-9)


def sari_of(question, answer, reference, **options):
    item = Item(answer, reference, question=question, task="t", id="1")
    return scorers.load("sari", options=options).score_items([item])[0]


def test_sari_by_hand():
    """Source a b c, reference a b, answer a: words: kept a of (a, b): F1(1, 1/2) = 2/3; added none, none to add: 1;
    deleted b, c, of which c rightly: 1/2. Pairs: kept none of ab, and nothing was kept wrongly: F1(1, 0) = 0; add 1;
    deleted ab, bc: 1/2. Triples: nothing to keep: 1; add 1; deleted abc rightly: 1. Longer: 1, 1, 1."""
    keep, add, delete = (2 / 3 + 0 + 1 + 1) / 4, 1, (1 / 2 + 1 / 2 + 1 + 1) / 4
    assert sari_of("a b c", "a", "a b") == pytest.approx(100 * (keep + add + delete) / 3, abs=1e-9)


def test_sari_of_chinese_and_of_extremes():
    assert sari_of("北京市", "北京", "北京") == 100
    # Copied. One: keeps 北, 京 rightly and 市 wrongly: F1(2/3, 1) = 4/5; two: 北京 of two: F1(1/2, 1) = 2/3; three: 0
    # of 1 kept rightly, nothing to keep: F1(0, 1) = 0; four: 1. Nothing added or deleted, nothing to add: 1 each.
    keep = (4 / 5 + 2 / 3 + 0 + 1) / 4
    assert sari_of("北京市", "北京市", "北京") == pytest.approx(100 * (keep + 1 + 1) / 3, abs=1e-9)
    assert sari_of("北京市", "", "北京") == 0
    assert sari_of(f"a {HAPPY}", f"{HAPPY}", f"{HAPPY}") == 100
    # Keeps paris rightly, word wrongly: F1(1/2, 1) = 2/3, longer n-grams 1; adds none of one word rightly (1), and
    # wrong longer ones: F1(0, 1) = 0; deletes all else rightly.
    long = 100 * ((2 / 3 + 3) / 4 + 1 / 4 + 1) / 3
    assert sari_of("Paris is a word", LONG, "Paris") == pytest.approx(long, abs=1e-9)


def test_sari_takes_the_text_out_of_the_question():
    question = "Simplify.\nText: a b c\nOutput:"
    assert sari_of(question, "a", "a b", source=r"Text: (.*)\nOutput") == sari_of("a b c", "a", "a b")
    found = sari_of("no text here", "a", "a b", source=r"Text: (.*)")
    assert isinstance(found, scorers.Unscored)
    assert "does not match the question" in found.reason
    assert isinstance(sari_of("", "a", "a"), scorers.Unscored)


@pytest.mark.parametrize(("source", "says"), [("(", "not a regular expression"), ("a", "must have one group, has 0")])
def test_sari_refuses_a_wrong_expression(source, says):
    from swift_cl.errors import UserError

    with pytest.raises(UserError, match=says):
        scorers.load("sari", options={"source": source})

"""Text as scorers compare it: one normal form, and words in scripts with and without spaces."""

import re
import unicodedata

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff\u31f0-\u31ff"
UNSPACED = re.compile(f"[{HAN}{KANA}]")
"""A character of a script that writes words without spaces: Chinese characters and Japanese kana."""
ARTICLES = frozenset({"a", "an", "the"})


def has_unspaced(text: str) -> bool:
    """Whether the text has Chinese characters or kana."""
    return UNSPACED.search(text) is not None


def fold(text: str) -> str:
    """NFKC (full-width forms become ASCII), case folded."""
    return unicodedata.normalize("NFKC", text).casefold()


def is_punctuation(character: str) -> bool:
    """Unicode punctuation, and the signs that ASCII counts as punctuation (`$+<=>^`|~`)."""
    return unicodedata.category(character).startswith("P") or character in "$+<=>^`|~"


def word_tokens(text: str) -> list[str]:
    """Runs of letters and digits of the folded text; each Chinese character or kana is a token of its own."""
    spaced = UNSPACED.sub(r" \g<0> ", fold(text))
    return re.findall(r"[^\W_]+", spaced)

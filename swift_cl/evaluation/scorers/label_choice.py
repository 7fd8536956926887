"""Label choice: 100 when the answer names the right one of the task's labels and no other, else 0.

Answer, reference and labels are normalised: NFKC, case folded, an opening such as "the answer is" or "答案是" dropped,
punctuation and articles removed (an article stays where a label is one, such as the choice "A"). Then:

1. An answer that equals a label is that label.
2. Otherwise the labels that occur in the answer as whole words count (Chinese labels: anywhere). An occurrence inside
   an occurrence of a longer label does not: "not entailment" is not "entailment". If exactly one label is left, it is
   the answer's; with none or several the answer is unmatched, which is wrong, not missing.

`labels` names the task's labels: a list, or a mapping from each label to other ways to write it. Without it they are
those that the benchmark's scenario makes visible, else the distinct references of the task's test data. A reference
that is no label leaves its answer without a score.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from swift_cl.errors import UserError
from swift_cl.evaluation.scorers import Item, Score, Unscored
from swift_cl.evaluation.scorers._options import ScorerOptions
from swift_cl.evaluation.scorers._text import ARTICLES, fold, has_unspaced, is_punctuation

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
OPENINGS = re.compile(
    r"^\s*(?:(?:so|therefore|thus|hence)[\s,]+)?"
    r"(?:(?:(?:the|my)\s+)?(?:(?:correct|final|right|best)\s+)?(?:answer|label|choice|option|category|output)"
    r"(?:\s+is\b\s*:?|\s*:)"
    r"|(?:所以|因此)?[,\s]*(?:正确|最终)?(?:答案|标签|选项|类别|输出)\s*(?:应该是|应为|是|为|:))\s*"
)


class Options(ScorerOptions):
    """Settings of a task."""

    labels: list[str] | dict[str, list[str]] | None = Field(default=None, min_length=1)


def normalise(text: str, kept: frozenset[str] = frozenset()) -> str:
    """The form in which answers and labels are compared; `kept` are articles that must stay.

    A text of punctuation alone stays as it is, so that labels such as "+" and "-" can be told apart.
    """
    folded = fold(text)
    opened = OPENINGS.sub("", folded)
    plain = "".join(" " if is_punctuation(c) else c for c in opened)
    words = [word for word in plain.split() if word not in ARTICLES - kept]
    return " ".join(words) or opened.strip()


class LabelSet:
    """The labels of one task.

    Args:
        labels: each label with all its written forms.
        where: how an error names the task.

    Raises:
        UserError: two labels have the same normal form, or one is empty.
    """

    def __init__(self, labels: Mapping[str, Sequence[str]], where: str) -> None:
        self.kept = _articles(form for forms in labels.values() for form in forms)
        self.by_form: dict[str, str] = {}
        for label, forms in labels.items():
            for form in forms:
                normal = normalise(form, self.kept)
                if not normal:
                    raise UserError(f"{where}: the label {label!r} has an empty form")
                if self.by_form.setdefault(normal, label) != label:
                    raise UserError(f"{where}: {label!r} and {self.by_form[normal]!r} read the same ({normal!r})")
        longest_first = sorted(self.by_form, key=lambda form: (-len(form), form))
        self._found = re.compile("|".join(_pattern(form) for form in longest_first))

    def choose(self, text: str) -> str | None:
        """The one label that a text names, or None."""
        normal = normalise(text, self.kept)
        if normal in self.by_form:
            return self.by_form[normal]
        chosen = {self.by_form[match[0]] for match in self._found.finditer(normal)}
        return chosen.pop() if len(chosen) == 1 else None


def _articles(forms: Iterable[str]) -> frozenset[str]:
    """Forms that are nothing but an article, such as the choice "A": that article must not be removed then."""
    return ARTICLES & {normalise(form, ARTICLES) for form in forms}


def _pattern(form: str) -> str:
    """A form as a whole word; scripts without spaces have no word borders to look for."""
    escaped = re.escape(form)
    return escaped if has_unspaced(form) else rf"(?<![^\W_]){escaped}(?![^\W_])"


class LabelChoice:
    """Compares the label that an answer names with the reference's."""

    def __init__(self, options: Options) -> None:
        given = options.labels
        self._given: LabelSet | None = None
        if given is not None:
            others = given if isinstance(given, dict) else dict.fromkeys(given, ())
            forms = {label: [label, *more] for label, more in others.items()}
            self._given = LabelSet(forms, "label_choice.labels")

    def score_items(self, items: Sequence[Item]) -> list[Score]:
        """100 or 0 for each item."""
        sets: dict[tuple[str, tuple[str, ...]], LabelSet] = {}
        for task, labels in {(item.task, item.labels) for item in items}:
            references = [item.reference for item in items if item.task == task]
            sets[task, labels] = self._given or _from_texts(labels or references)
        return [_one(item, sets[item.task, item.labels]) for item in items]


def _from_texts(references: Sequence[str]) -> LabelSet:
    """The distinct texts as labels; those that read the same are one."""
    groups: dict[str, list[str]] = {}
    distinct = sorted({reference for reference in references if reference.strip()})
    kept = _articles(distinct)
    for reference in distinct:
        groups.setdefault(normalise(reference, kept), []).append(reference)
    return LabelSet({forms[0]: forms for forms in groups.values()}, "label_choice")


def _one(item: Item, labels: LabelSet) -> Score:
    right = labels.by_form.get(normalise(item.reference, labels.kept))
    if right is None:
        return Unscored(f"the reference {item.reference[:60]!r} is none of the task's labels")
    return 100.0 if labels.choose(item.answer) == right else 0.0


def load(model: str | None = None, options: Options | None = None) -> LabelChoice:
    """Ready at once: there is no model."""
    return LabelChoice(options or Options())

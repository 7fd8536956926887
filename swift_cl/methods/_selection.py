"""Which rows of a task are worth keeping: every strategy gives an order, the most useful row first.

All of them are functions of their input and seed, with ties broken by row index, so that any number of ranks and any
re-run choose the same rows.
"""

import warnings
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError
from swift_cl.methods._draws import Key, permutation
from swift_cl.methods._row_store import largest_remainder
from swift_cl.methods.base import TrainingRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    from swift_cl.lazy import LazyModule

    np = LazyModule("numpy")

MAX_ANSWER_CLASSES = 64
_KMEANS_ITERATIONS = 100
# Distances are compared after rounding, so that equal rows tie however the hardware sums their terms.
_DECIMALS = 10
_TFIDF_FEATURES = 2048


def class_labels(rows: Sequence[TrainingRow], key: str, task: str) -> list[str]:
    """The class of every row: the value under `key`, or the text of the last answer where `key` is empty.

    Raises:
        UserError: a row has no such key, or the answers are too many to be classes.
    """
    if key:
        for number, row in enumerate(rows):
            if row.get(key) is None:
                raise UserError(
                    f"--replay_class_key is {key!r}, but row {number} of task '{task}' has no such key, it has: "
                    f"{', '.join(sorted(row))}"
                )
        return [str(row[key]) for row in rows]
    labels = [str(row["messages"][-1]["content"]) for row in rows]
    if len(set(labels)) > MAX_ANSWER_CLASSES:
        raise UserError(
            f"task '{task}' has {len(set(labels))} different answers, more than {MAX_ANSWER_CLASSES}: they are no "
            "classes; name the column that holds the class with --replay_class_key"
        )
    return labels


def prompt_text(row: TrainingRow) -> str:
    """What the user says in a row; the system prompt is the same in a whole task and tells nothing apart."""
    return "\n".join(str(m["content"]) for m in row["messages"] if m["role"] == "user")


def tfidf(texts: Sequence[str]) -> "NDArray[np.float64]":
    """Normalised TF-IDF of character 2- and 3-grams, which needs no words and so works for Chinese too."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 3), max_features=_TFIDF_FEATURES)
    points: NDArray[np.float64] = vectorizer.fit_transform(texts).toarray()
    return points


def normalised(points: "NDArray[Any]") -> "NDArray[np.float64]":
    """Rows of length 1, in fp64; a row of zeros stays one."""
    points = np.asarray(points, dtype=np.float64)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return points / np.where(lengths > 0, lengths, 1.0)


def round_robin(lists: Sequence[Sequence[int]]) -> list[int]:
    """The first of every list, then the second of every list that has one, and so on."""
    return [i for i in chain.from_iterable(zip_longest(*lists)) if i is not None]


def by_class(labels: Sequence[str]) -> dict[str, list[int]]:
    """Row indexes of every class, classes sorted."""
    members: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for i, label in enumerate(labels):
        members[label].append(i)
    return members


def class_balanced_order(labels: Sequence[str], *key: Key) -> list[int]:
    """Round-robin over the classes, random within one: any prefix gives equal shares, capped by the class sizes."""
    lists = []
    for label, members in by_class(labels).items():
        lists.append([members[i] for i in permutation(len(members), *key, label)])
    return round_robin(lists)


def kmeans_order(points: "NDArray[np.float64]", clusters: int, count: int, seed: int) -> list[int]:
    """`count` rows that cover the clusters of `points`: shares by cluster size, nearest to the centroid first."""
    members = [[i for i, _ in own] for own in kmeans_clusters(points, min(clusters, count), seed)]
    shares = largest_remainder(count, [len(own) for own in members])
    return round_robin([own[:share] for own, share in zip(members, shares, strict=True)])


def kmeans_clusters(
    points: "NDArray[np.float64] | list[float]", clusters: int, seed: int
) -> list[list[tuple[int, float]]]:
    """(row, distance to the centroid) of every cluster that is not empty, nearest first, ties by row."""
    if len(points) == 0 or clusters == 0:
        return []
    points = np.asarray(points)
    assigned = _lloyd(points, min(clusters, len(points)), seed)
    # Clusters are numbered by their first row: the numbers of the algorithm mean nothing.
    first_rows = sorted({int(np.flatnonzero(assigned == c)[0]) for c in np.unique(assigned)})
    found = []
    for own in (np.flatnonzero(assigned == assigned[first]) for first in first_rows):
        distance = np.round(np.linalg.norm(points[own] - points[own].mean(axis=0), axis=1), _DECIMALS)
        found.append([(int(own[i]), float(distance[i])) for i in np.argsort(distance, kind="stable")])
    return found


def _lloyd(points: "NDArray[np.float64]", clusters: int, seed: int) -> "NDArray[np.int32]":
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: with more, sums are added up in the order in which the threads finish. n_init=1 and tol=0: Lloyd from
    # one k-means++ start to its end. scikit-learn re-seeds an empty cluster at the point farthest from its centroid.
    model = KMeans(clusters, n_init=1, max_iter=_KMEANS_ITERATIONS, tol=0.0, algorithm="lloyd", random_state=seed)
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: some stay empty
        assigned: NDArray[np.int32] = model.fit(points).labels_
    return assigned


def herding_order(points: "NDArray[np.float64]", count: int) -> list[int]:
    """iCaRL: row k is the one that brings the mean of the first k rows closest to the mean of all."""
    mean = points.mean(axis=0)
    # |k mean - (phi + sum)|^2 without its constant part: |phi|^2 - 2 phi.(k mean - sum)
    squares, along_mean = np.einsum("ij,ij->i", points, points), points @ mean
    along_sum = np.zeros(len(points))
    taken = np.zeros(len(points), dtype=bool)
    order: list[int] = []
    for k in range(1, min(count, len(points)) + 1):
        distance = np.round(squares - 2 * (k * along_mean - along_sum), _DECIMALS)
        distance[taken] = np.inf
        chosen = int(np.argmin(distance))
        order.append(chosen)
        taken[chosen] = True
        along_sum += points @ points[chosen]
    return order


def class_herding_order(points: "NDArray[np.float64]", labels: Sequence[str] | None, count: int) -> list[int]:
    """Herding within each class, classes in turn; without labels the whole task is one class."""
    if labels is None:
        return herding_order(points, count)
    lists = []
    for members in by_class(labels).values():
        lists.append([members[i] for i in herding_order(points[members], count)])
    return round_robin(lists)[:count]

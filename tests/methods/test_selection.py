"""The strategies, on inputs small enough to do by hand."""

import random
import warnings

import numpy as np
import pytest

from swift_cl.errors import UserError
from swift_cl.methods._selection import (
    class_balanced_order,
    class_herding_order,
    class_labels,
    herding_order,
    kmeans_clusters,
    kmeans_order,
    normalised,
    prompt_text,
    round_robin,
    tfidf,
)


def answered(answer, **columns):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "not this"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **columns}


def shares(sizes, count):
    labels = [label for label, size in sizes.items() for _ in range(size)]
    random.Random(0).shuffle(labels)
    order = class_balanced_order(labels, 0)
    assert sorted(order) == list(range(len(labels)))
    kept = [labels[i] for i in order[:count]]
    return {label: kept.count(label) for label in sizes}


def test_class_balanced_fills_classes_like_water():
    """T2."""
    assert shares({"A": 100, "B": 3, "C": 50}, 10) == {"A": 4, "B": 3, "C": 3}
    assert shares({"A": 100, "B": 3, "C": 50}, 2) == {"A": 1, "B": 1, "C": 0}
    assert shares({"A": 5, "B": 5}, 200) == {"A": 5, "B": 5}
    assert shares({"A": 100, "B": 1, "C": 50}, 10) == {"A": 5, "B": 1, "C": 4}
    assert sum(shares({"A": 100, "B": 3, "C": 50}, 10).values()) != 9  # floor(10/3) of each


def test_class_balanced_is_random_within_a_class():
    orders = {tuple(class_balanced_order(["A"] * 20, seed)) for seed in range(5)}
    assert len(orders) == 5
    assert tuple(range(20)) not in orders
    both = class_balanced_order(["A"] * 20 + ["B"] * 20, 0)
    assert [i for i in both if i < 20] != [i - 20 for i in both if i >= 20]


def test_classes_are_answers_or_a_column():
    rows = [answered("yes", kind=1), answered("no", kind=2)]
    assert class_labels(rows, "", "t") == ["yes", "no"]
    assert class_labels(rows, "kind", "t") == ["1", "2"]
    assert class_labels([answered("yes", kind=0), answered("no", kind="")], "kind", "t") == ["0", ""]
    with pytest.raises(UserError, match="row 0 of task 't' has no such key"):
        class_labels([answered("yes", kind=None)], "kind", "t")
    with pytest.raises(UserError, match="--replay_class_key is 'sort', but row 1 of task 't' has no such key"):
        class_labels([answered("yes", sort="a"), answered("no")], "sort", "t")


def test_answers_that_are_no_classes_are_refused():
    assert len(class_labels([answered(str(i)) for i in range(64)], "", "t")) == 64
    assert len(class_labels([answered(str(i % 2)) for i in range(100)], "", "t")) == 100
    with pytest.raises(UserError, match=r"65 different answers, more than 64.*--replay_class_key"):
        class_labels([answered(str(i)) for i in range(65)], "", "t")
    many = [answered(str(i), kind=str(i)) for i in range(65)]
    assert len(class_labels(many, "kind", "t")) == 65


def test_herding_follows_the_mean():
    """T4: scalars 0, 1, 2, 9 with mean 3."""
    points = np.array([[0.0], [1.0], [2.0], [9.0]])
    assert [points[i, 0] for i in herding_order(points, 3)] == [2.0, 1.0, 9.0]
    assert herding_order(points, 10) == [2, 1, 3, 0]


def test_herding_is_the_literal_formula():
    points = normalised(np.random.default_rng(0).normal(size=(40, 5)))
    mean, total, order = points.mean(0), np.zeros(5), []
    for k in range(1, 16):
        gaps = [np.inf if i in order else np.linalg.norm(mean - (total + points[i]) / k) for i in range(40)]
        order.append(int(np.argmin(gaps)))
        total += points[order[-1]]
    assert herding_order(points, 15) == order


def test_herding_breaks_ties_by_index():
    points = np.tile(normalised(np.random.default_rng(1).normal(size=(1, 64))), (33, 1))
    assert herding_order(points, 5) == [0, 1, 2, 3, 4]
    # Mean .2: .2 comes first, then .1 and .3 are equally good, though as computed .3 is better by 5e-17.
    assert herding_order(np.array([[0.1], [0.2], [0.3]]), 3) == [1, 0, 2]


def test_herding_per_class_takes_turns():
    points = np.array([[0.0], [1.0], [2.0], [9.0], [50.0], [70.0]])
    labels = ["b", "b", "b", "b", "a", "a"]
    assert class_herding_order(points, labels, 4) == [4, 2, 5, 1]
    assert class_herding_order(points, None, 3) == herding_order(points, 3)


def test_kmeans_takes_from_every_cluster():
    """T5: two clusters of two; three rows are 2 + 1, nearest first, ties by index."""
    points = np.array([[0.0, 0], [0, 1], [10, 0], [10, 2]])
    for seed in range(10):
        order = kmeans_order(points, 2, 3, seed)
        assert sorted(order) == [0, 1, 2]
        assert order == [0, 2, 1]


def test_kmeans_shares_follow_cluster_sizes():
    """T5: ten rows of three clusters of 30 are 4 + 3 + 3, where round() would give nine."""
    noise = np.random.default_rng(2).normal(scale=0.01, size=(90, 2))
    points = np.repeat([[0.0, 0], [10, 0], [0, 10]], 30, axis=0) + noise
    order = kmeans_order(points, 3, 10, 0)
    assert [sum(i // 30 == c for i in order) for c in range(3)] == [4, 3, 3]
    for cluster in range(3):
        own = points[cluster * 30 : (cluster + 1) * 30]
        nearest = np.argsort(np.linalg.norm(own - own.mean(0), axis=1))
        chosen = [i - cluster * 30 for i in order if i // 30 == cluster]
        assert chosen == list(nearest[: len(chosen)])
    # Of four rows of clusters of six and two, three and one.
    uneven = np.array([[0.0], [1], [2], [3], [4], [5], [1000], [1001]])
    assert sorted(i // 6 for i in kmeans_order(uneven, 2, 4, 0)) == [0, 0, 0, 1]


def test_kmeans_needs_no_more_clusters_than_rows_or_shares():
    points = np.array([[0.0], [1.0], [5.0], [6.0]])
    assert sorted(kmeans_order(points, 20, 4, 0)) == [0, 1, 2, 3]
    assert sorted(kmeans_order(points, 20, 9, 0)) == [0, 1, 2, 3]
    # One row is the nearest to the centroid of all, 3; of the two at distance 2 the first.
    assert kmeans_order(points, 20, 1, 0) == [1]
    assert kmeans_order(points, 20, 0, 0) == []
    assert sorted(own[0][0] for own in kmeans_clusters(points, 20, 0)) == [0, 1, 2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(kmeans_order(np.zeros((6, 2)), 3, 4, 0)) == [0, 1, 2, 3]  # equal rows, empty clusters


def test_kmeans_numbers_clusters_by_their_first_rows_and_rows_by_distance():
    points = np.array([[2000.0], [0.0], [1000.0], [1001.0], [1.0]])
    for seed in range(10):
        clusters = kmeans_clusters(points, 3, seed)
        assert clusters == [[(0, 0.0)], [(1, 0.5), (4, 0.5)], [(2, 0.5), (3, 0.5)]]
    # Distances 1, 0, 3 and 2 to the mean, 4.
    assert kmeans_clusters([[3.0], [4.0], [7.0], [2.0]], 1, 0) == [[(1, 0.0), (0, 1.0), (3, 2.0), (2, 3.0)]]
    # As computed .3 is nearer to the mean of the three than .1 is, by some 1e-17.
    assert kmeans_order(np.array([[0.1], [0.2], [0.3]]), 1, 3, 0) == [1, 0, 2]


def test_kmeans_goes_on_until_every_row_is_in_the_nearest_cluster():
    points = np.random.default_rng(5).normal(size=(400, 3))
    clusters = [[i for i, _ in own] for own in kmeans_clusters(points, 12, 0)]
    centroids = np.stack([points[own].mean(axis=0) for own in clusters])
    for number, own in enumerate(clusters):
        distances = np.linalg.norm(points[own][:, None] - centroids, axis=2)
        assert (distances.argmin(axis=1) == number).all()


def test_kmeans_is_a_function_of_its_seed():
    points = normalised(np.random.default_rng(3).normal(size=(300, 8)))
    first = kmeans_order(points, 20, 60, 1)
    assert kmeans_order(points, 20, 60, 1) == first
    assert kmeans_order(points, 20, 60, 2) != first
    assert len(set(first)) == 60


def test_points_are_normalised():
    assert normalised(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]


def test_tfidf_sees_the_users_words_in_any_script():
    rows = [answered("yes"), {"messages": [{"role": "user", "content": "谁赢了比赛?"}]}]
    assert prompt_text(rows[0]) == "first\nsecond"
    similar = tfidf(["谁赢了今年的比赛?", "谁赢了去年的比赛?", "the price of bread rose"])
    assert similar[0] @ similar[1] > 0.5 > similar[0] @ similar[2]


def test_round_robin():
    assert round_robin([[1, 2, 3], [], [4]]) == [1, 4, 2, 3]
    assert round_robin([[0], [1]]) == [0, 1]

"""Which synthesised rows are rehearsed: clusters of embeddings, exact quotas, and the next best where one fails."""

from collections.abc import Callable, Sequence

from swift_cl.methods._row_store import largest_remainder


def quotas(sizes: Sequence[int], total: int) -> list[int]:
    """Rows taken of each cluster, exactly `total` in all (or all there are).

    One of each where that is possible, then by largest remainder of what is left in them; ties go to the first.
    """
    total = min(total, sum(sizes))
    if total < len(sizes):
        return largest_remainder(total, sizes)
    left = [size - 1 for size in sizes]
    return [1 + more for more in largest_remainder(total - len(sizes), left)]


def choose(clusters: Sequence[Sequence[int]], total: int, refine: Callable[[list[int]], list[bool]]) -> list[int]:
    """`total` candidates, the first ones of every cluster; in place of one that `refine` finds unusable comes the next
    of its cluster, and where a cluster has none left, the quotas of the others grow.

    Args:
        clusters: candidates in order of preference.
        refine: works on a batch of candidates and says which are usable.
    """
    waiting = [list(cluster) for cluster in clusters]
    good: list[list[int]] = [[] for _ in clusters]
    target = quotas([len(cluster) for cluster in clusters], total)
    while True:
        batch = []
        for number, queue in enumerate(waiting):
            missing = target[number] - len(good[number])
            batch += [(number, candidate) for candidate in queue[:missing]]
            del queue[:missing]
        if not batch:
            break
        usable = refine([candidate for _, candidate in batch])
        for (number, candidate), ok in zip(batch, usable, strict=True):
            if ok:
                good[number].append(candidate)
        target = _grown(target, [len(g) + len(w) for g, w in zip(good, waiting, strict=True)])
    return sorted(candidate for own in good for candidate in own)


def _grown(target: list[int], most: list[int]) -> list[int]:
    """Targets that can be met; what one cluster lacks goes to those with candidates left."""
    met = [min(wanted, possible) for wanted, possible in zip(target, most, strict=True)]
    room = [possible - wanted for possible, wanted in zip(most, met, strict=True)]
    lacking = min(sum(target) - sum(met), sum(room))
    return [a + b for a, b in zip(met, largest_remainder(lacking, room), strict=True)]

"""Generation by several ranks: the answers of one, whoever answers what, and no rank is left waiting."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from swift_cl.errors import RunFailure
from swift_cl.generation.engine import Answer, Engine, Prompt, Sampling
from swift_cl.generation.protocol import Order, Rules, exactly, in_batches
from swift_cl.generation.screen import Rejected, Screen
from swift_cl.generation.shared import help_out, open_shared, send_home
from tests.support.fake_engine import FakeEngine, said

SAMPLING = Sampling(0.9, 12, stop=("!",))


class Ranks:
    """Threads for ranks: each has an engine of its own, opened where rank 0 says so; a rank left alone is an error."""

    def __init__(self, size: int, speaks: Callable[[int, Prompt, int], Answer]) -> None:
        self.size = size
        self.engines = [FakeEngine(lambda p, s, r=rank: speaks(r, p, s)) for rank in range(size)]  # type: ignore[misc]
        self.opened: list[list[Any]] = [[] for _ in range(size)]
        self._barrier = threading.Barrier(size, timeout=20.0)
        self._said: list[Any] = [None] * size

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def all_of(value: Any) -> list[Any]:
            self._said[rank] = value
            self._barrier.wait()
            found = list(self._said)
            self._barrier.wait()
            return found

        return all_of

    def open_here(self, rank: int) -> Any:
        @contextmanager
        def opened(weights: Path | None, backend: str) -> Iterator[Engine]:
            if weights == Path("broken") and rank == self.size - 1:
                raise MemoryError("no room")
            self.opened[rank].append((weights, backend))
            yield self.engines[rank]
            self.opened[rank].append("closed")

        return opened

    def run(self, work: Callable[[Any], Any]) -> Any:
        """`work(open)` on rank 0, while the others help."""

        def first() -> Any:
            try:
                return work(lambda weights: open_shared(self.open_here(0), weights, "transformers", self.gather(0)))
            finally:
                send_home(self.gather(0))

        with ThreadPoolExecutor(self.size) as pool:
            others = [
                pool.submit(help_out, self.open_here(rank), self.gather(rank), rank) for rank in range(1, self.size)
            ]
            own = pool.submit(first)
            for other in others:
                other.result()
            return own.result()


def told(rank: int, prompt: Prompt, seed: int) -> Answer:
    return said(f"{prompt.text}:{seed}")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_answers_whole_batches_and_the_answers_are_those_of_one(size: int) -> None:
    prompts = [Prompt(text="x" * (1 + i % 4), latent=(0.1 * i,)) for i in range(10)]
    expected = in_batches(FakeEngine(lambda p, s: told(0, p, s)), prompts, SAMPLING, list(range(10)), 3)
    ranks = Ranks(size, told)

    def work(opened: Any) -> list[Answer]:
        with opened(Path("weights")) as engine:
            return in_batches(engine, prompts, SAMPLING, list(range(10)), 3)

    assert ranks.run(work) == expected
    asked = [[len(batch) for batch, _, _ in engine.calls] for engine in ranks.engines]
    assert asked == {1: [[2, 3, 2, 3]], 2: [[2, 2], [3, 3]], 3: [[2, 3], [3], [2]]}[size]
    assert {call[1] for engine in ranks.engines for call in engine.calls} == {SAMPLING}
    assert {prompt for engine in ranks.engines for prompt in engine.prompts} == set(prompts)
    assert ranks.opened == [[(Path("weights"), "transformers"), "closed"]] * size


def test_one_engine_after_the_other_and_a_single_batch(tmp_path: Path) -> None:
    ranks = Ranks(2, told)

    def work(opened: Any) -> None:
        for weights in (None, Path("second")):
            with opened(weights) as engine:
                engine.answer_batches([([Prompt(text="a")], [1])], SAMPLING)
                engine.answer([Prompt(text="b")], SAMPLING, [1])

    ranks.run(work)
    assert ranks.opened[1] == [(None, "transformers"), "closed", (Path("second"), "transformers"), "closed"]
    assert [len(engine.calls) for engine in ranks.engines] == [4, 0], "one batch is not worth a message"


def test_rows_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """The whole protocol: bytes of its files with one rank and with three."""

    def speaks(rank: int, prompt: Prompt, seed: int) -> Answer:
        return said("no row") if seed % 3 == 0 else said(f"question {seed}|answer")

    def parse(text: str) -> Any:
        question, found, answer = text.partition("|")
        if not found:
            raise Rejected("separators")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def generate(folder: Path) -> Callable[[Any], Any]:
        def work(opened: Any) -> Any:
            screen = Screen(parse, lambda turns, number: {"messages": turns}, lambda row: True)
            order = Order("old", 20, lambda number: Prompt(text=f"ask {number}"), screen)
            rules = Rules("lamol", "now", 7, batch_size=4, min_fill=Fraction(1))
            with opened(None) as engine:
                return exactly(engine, [order], SAMPLING, rules, folder, print)

        return work

    found = [Ranks(size, speaks).run(generate(tmp_path / str(size))) for size in (1, 3)]
    assert found[0] == found[1]
    assert len(found[0]["old"]) == 20
    names = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.json*"))
    assert len(names) >= 5, "rounds, rows, rejects and a manifest"
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_a_failure_of_any_rank_ends_it_and_nobody_waits() -> None:
    def fails_on(bad: int) -> Callable[[int, Prompt, int], Answer]:
        def speaks(rank: int, prompt: Prompt, seed: int) -> Answer:
            if rank == bad:
                raise ValueError("out of words")
            return said("a")

        return speaks

    def work(opened: Any) -> Any:
        with opened(None) as engine:
            return in_batches(engine, [Prompt(text="a")] * 4, SAMPLING, [0] * 4, 2)

    with pytest.raises(RunFailure, match="generation failed on rank 1: ValueError: out of words"):
        Ranks(2, fails_on(1)).run(work)
    with pytest.raises(ValueError, match="out of words"):
        Ranks(2, fails_on(0)).run(work)

    def broken(opened: Any) -> Any:
        with opened(Path("broken")):
            pass

    with pytest.raises(RunFailure, match="generation failed on rank 1: MemoryError: no room"):
        Ranks(2, told).run(broken)

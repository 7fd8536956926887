"""Generation by all processes of a training: rank 0 decides what is asked, and every rank answers some of the batches.

Whole batches are shared out, never the prompts of one: batch b goes to rank b mod W and is there what it is anywhere,
the same prompts with the same seed. So the answers, and the rows made of them, are the same for every W.

A method runs on rank 0 alone and sees an engine like any other. The other ranks run `help_out`, in which they do what
rank 0 says until it has ended; each message is a round of `gather`, which gives every rank's JSON value to every rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.errors import RunFailure
from swift_cl.generation.engine import Answer, Batch, Engine, Prompt, Sampling, one_by_one

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Gather = Callable[[Any], list[Any]]
Open = Callable[[Path | None, str], AbstractContextManager[Engine]]
OPEN, ANSWER, CLOSE, END = "open", "answer", "close", "end"


class SharedEngine:
    """Rank 0's engine; what it is asked in several batches is answered by all ranks."""

    def __init__(self, own: Engine, gather: Gather) -> None:
        self._own, self._gather = own, gather
        self.identity: Mapping[str, Any] = own.identity
        self.special_tokens: Sequence[str] = own.special_tokens

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Answer]:
        """See `engine.Engine`. One batch is answered here."""
        return self._own.answer(prompts, sampling, seeds)

    def answer_batches(self, batches: Sequence[Batch], sampling: Sampling) -> list[list[Answer]]:
        """See `engine.Engine`.

        Raises:
            RunFailure: another rank failed; its own words.
        """
        if len(batches) < 2:
            return one_by_one(self._own, batches, sampling)
        asked = [{"prompts": [p.to_json() for p in prompts], "seeds": list(seeds)} for prompts, seeds in batches]
        order = {"do": ANSWER, "sampling": sampling.to_json(), "batches": asked}
        size = len(self._gather(order))
        parts = _all_of(self._gather, partial(_answers, self._own, order, 0, size))
        answers = [parts[number % size][number // size] for number in range(len(batches))]
        return [[Answer(**answer) for answer in batch] for batch in answers]

    def embed(self, texts: Sequence[str]) -> "NDArray[np.float64]":
        """See `engine.Engine`. Done here: one forward a text is little beside generation."""
        return self._own.embed(texts)


@contextlib.contextmanager
def open_shared(open_here: Open, weights: Path | None, backend: str, gather: Gather) -> Iterator[Engine]:
    """On rank 0: an engine on every rank, as one."""
    gather({"do": OPEN, "weights": None if weights is None else str(weights), "backend": backend})
    try:
        with contextlib.ExitStack() as stack:
            opened: list[Engine] = []
            _all_of(gather, lambda: opened.append(stack.enter_context(open_here(weights, backend))))
            yield SharedEngine(opened[0], gather)
    finally:
        gather({"do": CLOSE})


def send_home(gather: Gather) -> None:
    """On rank 0, when nothing more will be generated: lets the others leave `help_out`."""
    gather({"do": END})


def help_out(open_here: Open, gather: Gather, rank: int) -> None:
    """On every other rank: do what rank 0 says. A failure is told to rank 0, which ends the run with it."""
    with contextlib.ExitStack() as stack:
        opened: list[Engine] = []

        def open_one(weights: str | None, backend: str) -> None:
            opened.append(stack.enter_context(open_here(None if weights is None else Path(weights), backend)))

        while (told := gather(None))[0]["do"] != END:
            order, size = told[0], len(told)
            if order["do"] == OPEN:
                _report(gather, partial(open_one, order["weights"], order["backend"]))
            elif order["do"] == ANSWER:
                _report(gather, partial(_answers, opened[0], order, rank, size))
            else:
                opened.clear()
                stack.close()


def _answers(engine: Engine, order: Mapping[str, Any], rank: int, size: int) -> list[list[dict[str, Any]]]:
    """This rank's answers."""
    sampling = Sampling(**{**order["sampling"], "stop": tuple(order["sampling"]["stop"])})
    own = [([Prompt.from_json(p) for p in b["prompts"]], b["seeds"]) for b in order["batches"][rank::size]]
    return [[vars(answer) for answer in answers] for answers in one_by_one(engine, own, sampling, rank == 0)]


def _report(gather: Gather, action: Callable[[], Any]) -> tuple[list[dict[str, Any]], Exception | None]:
    """Do something on every rank at once; every rank's result or error, and this rank's own error."""
    failure: Exception | None = None
    result: dict[str, Any]
    try:
        result = {"result": action()}
    except Exception as error:
        failure, result = error, {"error": f"{type(error).__name__}: {error}"}
    return gather(result), failure


def _all_of(gather: Gather, action: Callable[[], Any]) -> list[Any]:
    """On rank 0: what every rank gives; the first error ends it."""
    found, failure = _report(gather, action)
    if failure is not None:
        raise failure
    for rank, told in enumerate(found):
        if "error" in told:
            raise RunFailure(f"generation failed on rank {rank}: {told['error']}")
    return [told["result"] for told in found]

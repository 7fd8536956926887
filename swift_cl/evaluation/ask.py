"""Ask every question that has no answer yet: dialogues side by side, turns one after the other.

A dialogue continues with the model's own earlier answers. An answer is kept under a key of everything that shaped it,
so a second run asks only what is missing, has failed, or has changed.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_cl.errors import RunFailure
from swift_cl.evaluation.client import Endpoint, Generation, QuestionFailed
from swift_cl.evaluation.store import Answer, AnswerStore
from swift_cl.io import sha256_json
from swift_cl.stream.rows import Row


@dataclass(frozen=True)
class Dialogue:
    """One dialogue for one model.

    Attributes:
        served: name of the model at the endpoint.
        weights: identity of the model's weights.
        system: system prompt, None to send none.
        stores: where its answers go; several when runs share the model and the question.
    """

    served: str
    weights: str
    system: str | None
    row: Row
    stores: tuple[AnswerStore, ...]


@dataclass
class Tally:
    """What was done: turns asked, answers found in the stores, and failures as text."""

    asked: int = 0
    reused: int = 0
    failures: list[str] = field(default_factory=list)


def opening(dialogue: Dialogue) -> list[dict[str, str]]:
    """The messages before the first question."""
    return [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]


def answer_key(weights: str, messages: Sequence[dict[str, str]], generation: Generation, backend: str) -> str:
    """Key of an answer: weights, all messages (system prompt and history included), generation settings, backend."""
    return sha256_json([weights, list(messages), generation.as_json(), backend])


def is_answered(dialogue: Dialogue, generation: Generation, backend: str) -> bool:
    """Whether every store holds the answer to every turn as it would be asked now."""
    messages = opening(dialogue)
    for turn, (question, _) in enumerate(dialogue.row.turns):
        messages.append({"role": "user", "content": question})
        key = answer_key(dialogue.weights, messages, generation, backend)
        rows = [store.latest(dialogue.row.id, turn) for store in dialogue.stores]
        if any(row is None or row["key"] != key or "answer" not in row for row in rows):
            return False
        messages.append({"role": "assistant", "content": str(rows[0] and rows[0]["answer"])})
    return True


class Asker:
    """Asks dialogues with `concurrency` threads.

    The threads are daemons that never wait long: when the main thread is interrupted, the program can end at once.

    Args:
        known_names: the served names; an answer that comes from another one of them stops the run.
        give_up_after: so many dialogues in a row lost to the endpoint (not to the question) stop the run.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        generation: Generation,
        backend: str,
        concurrency: int = 16,
        known_names: Iterable[str] = (),
        give_up_after: int = 16,
    ) -> None:
        self.endpoint, self.generation, self.backend = endpoint, generation, backend
        self.concurrency, self.known_names, self.give_up_after = concurrency, frozenset(known_names), give_up_after
        self._lost_in_a_row = 0
        self._lock = threading.Lock()

    def ask_all(self, dialogues: Sequence[Dialogue], on_turn: Callable[[], Any] = lambda: None) -> Tally:
        """Ask all dialogues; `on_turn` is called once for each of their turns.

        Raises:
            RunFailure: going on makes no sense (unknown model, dead server, endpoint gone). All answers are stored.
        """
        work: queue.SimpleQueue[Dialogue] = queue.SimpleQueue()
        done: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()
        for dialogue in dialogues:
            work.put(dialogue)
        tally = Tally()

        def worker() -> None:
            try:
                while not self.endpoint.stopped.is_set():
                    self._ask(work.get_nowait(), tally, done.put)
            except queue.Empty:
                pass
            except BaseException as error:
                done.put(error)
            finally:
                done.put(None)

        threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(self.concurrency, len(dialogues)))]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                event = done.get()
                if event is None:
                    running -= 1
                elif isinstance(event, BaseException):
                    raise event
                else:
                    on_turn()
        finally:
            if running:
                self.endpoint.stopped.set()
        return tally

    def _ask(self, dialogue: Dialogue, tally: Tally, done: Callable[[Answer], None]) -> None:
        messages = opening(dialogue)
        lost: str | None = None
        for turn, (question, reference) in enumerate(dialogue.row.turns):
            messages.append({"role": "user", "content": question})
            key = answer_key(dialogue.weights, messages, self.generation, self.backend)
            answer: Answer = {
                "id": dialogue.row.id,
                "turn": turn,
                "question": question,
                "reference": reference,
                "served": dialogue.served,
                "weights": dialogue.weights,
                "key": key,
            }
            stored = next((row for store in dialogue.stores if (row := store.answered(key))), None)
            if lost is not None:
                answer["error"] = f"not asked, because turn {lost} of the dialogue failed"
            elif stored is not None:
                answer |= {name: stored[name] for name in ("answer", "finish")}
            else:
                answer |= self._reply(dialogue, messages)
            with self._lock:
                tally.reused += stored is not None
                tally.asked += stored is None and lost is None
                if "error" in answer:
                    tally.failures.append(f"{dialogue.served}, {dialogue.row.id}, turn {turn}: {answer['error']}")
            for store in dialogue.stores:
                if store.latest(dialogue.row.id, turn) != answer:
                    store.append(answer)
            done(answer)
            if "error" in answer:
                lost = lost or str(turn)
            else:
                messages.append({"role": "assistant", "content": answer["answer"]})

    def _reply(self, dialogue: Dialogue, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
        try:
            reply = self.endpoint.ask(dialogue.served, messages, self.generation)
        except QuestionFailed as failure:
            self.endpoint.check_alive()
            self._count_loss(failure)
            return {"error": str(failure)}
        with self._lock:
            self._lost_in_a_row = 0
        # ms-swift names the base model whatever adapter answered, so only the name of another adapter is a proof.
        if reply.model != dialogue.served and reply.model in self.known_names:
            raise RunFailure(f"{self.endpoint.base_url}: asked {dialogue.served!r}, but {reply.model!r} answered")
        return {"answer": reply.text, "finish": reply.finish}

    def _count_loss(self, failure: QuestionFailed) -> None:
        with self._lock:
            self._lost_in_a_row = self._lost_in_a_row + 1 if failure.endpoint_at_fault else 0
            gone = self._lost_in_a_row >= self.give_up_after
        if gone:
            raise RunFailure(
                f"{self.endpoint.base_url}: {self.give_up_after} questions in a row failed, the last with: {failure}; "
                "what was answered is stored, run again to continue"
            )

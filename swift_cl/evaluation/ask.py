"""Ask every question that has no answer yet: dialogues side by side, turns one after the other.

A dialogue continues with the model's own earlier answers, or with the reference answers (teacher-forced history). An
answer is kept under a key of everything that shaped it, so a second run asks only what is missing, has failed, or has
changed.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_cl.errors import RunFailure
from swift_cl.evaluation.client import Endpoint
from swift_cl.evaluation.faults import QuestionFailed
from swift_cl.evaluation.pictures import Message, questions
from swift_cl.evaluation.settings import Settings
from swift_cl.evaluation.store import Answer, AnswerStore
from swift_cl.stream.rows import Row


@dataclass(frozen=True)
class Dialogue:
    """One dialogue for one model.

    Attributes:
        served: name of the model at the endpoint.
        weights: identity of the model's weights: the adapter's hash, or the model's id.
        base: identity of the weights below the adapter; the same as `weights` where there is none.
        system: system prompt, None to send none.
        stores: where its answers go; several when runs share the model and the question.
        routed: what a stage's router calls this model, None where nothing was chosen.
        task: the task of the question, for tasks with settings of their own.
        labels: what an answer may be, in the order in which they are sent; empty where any text may.
    """

    served: str
    weights: str
    base: str
    system: str | None
    row: Row
    stores: tuple[AnswerStore, ...]
    routed: str | None = None
    task: str = ""
    labels: tuple[str, ...] = ()


@dataclass
class Tally:
    """What was done: turns asked, answers found in the stores, failures as text, and how many seconds it took."""

    asked: int = 0
    reused: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def opening(dialogue: Dialogue) -> list[Message]:
    """The messages before the first question."""
    return [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]


def keys(dialogue: Dialogue, settings: Settings, answers: Callable[[int, str], str | None]) -> list[str]:
    """The keys of a dialogue's turns as they would be asked now, up to the first whose history is not known.

    Args:
        answers: (turn, its key) -> the model's answer, None where there is none.
    """
    messages, found = opening(dialogue), []
    for turn, (question, (_, reference)) in enumerate(zip(questions(dialogue.row), dialogue.row.turns, strict=True)):
        messages.append(question)
        found.append(settings.key(dialogue.base, dialogue.weights, messages, dialogue.task, dialogue.labels))
        answer = answers(turn, found[-1])
        if answer is None and settings.history == "own":
            break
        messages.append(settings.continued(answer or "", reference))
    return found


def restore(dialogue: Dialogue, settings: Settings) -> bool:
    """Whether the stores hold the answer to every turn as it would be asked now.

    If so, each of them holds it in front afterwards, though answers under other settings had overtaken it.
    """
    found: list[Answer] = []

    def answered(turn: int, key: str) -> str | None:
        row = _find(dialogue, turn, key)
        if row is not None:
            found.append(row)
        return None if row is None else str(row["answer"])

    keys(dialogue, settings, answered)
    if len(found) < len(dialogue.row.turns):
        return False
    for turn, (row, (question, reference)) in enumerate(zip(found, dialogue.row.turns, strict=True)):
        _keep(dialogue, _row(dialogue, turn, question, reference, row["key"]) | _said(row))
    return True


def _find(dialogue: Dialogue, turn: int, key: str) -> Answer | None:
    """A stored answer to exactly this request: the turn's own, or else that of an equal question."""
    for store in dialogue.stores:
        latest = store.latest(dialogue.row.id, turn)
        if latest is not None and latest["key"] == key and "answer" in latest:
            return latest
    return next((row for store in dialogue.stores if (row := store.answered(key))), None)


def _said(row: Answer) -> Answer:
    return {name: row[name] for name in ("answer", "finish", "tokens") if name in row}


def _row(dialogue: Dialogue, turn: int, question: str, reference: str, key: str) -> Answer:
    return {
        "id": dialogue.row.id,
        "turn": turn,
        "question": question,
        "reference": reference,
        "served": dialogue.served,
        "weights": dialogue.weights,
        "key": key,
        **({} if dialogue.routed is None else {"routed": dialogue.routed}),
    }


def _keep(dialogue: Dialogue, answer: Answer) -> None:
    """Write an answer to every store in which it is not the latest of its turn."""
    for store in dialogue.stores:
        latest = store.latest(answer["id"], answer["turn"])
        if latest is None or _without_name(latest) != _without_name(answer):
            store.append(answer)


def _without_name(row: Answer) -> Answer:
    return {name: value for name, value in row.items() if name != "served"}


class Asker:
    """Asks dialogues with `concurrency` threads.

    `tallies` holds what each call of `ask_all` did, also of one that raised.

    The threads are daemons that never wait long: when the main thread is interrupted, the program can end at once.

    Args:
        known_names: the served names; an answer that comes from another one of them stops the run.
        give_up_after: so many dialogues in a row lost to the endpoint (not to the question) stop the run.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        concurrency: int = 16,
        known_names: Iterable[str] = (),
        give_up_after: int = 16,
    ) -> None:
        self.endpoint, self.settings = endpoint, settings
        self.concurrency, self.known_names, self.give_up_after = concurrency, frozenset(known_names), give_up_after
        self.tallies: list[Tally] = []
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
        self.tallies.append(tally)

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
        running, begin = len(threads), time.monotonic()
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
            tally.seconds = time.monotonic() - begin
            if running:
                self.endpoint.stopped.set()
        return tally

    def _ask(self, dialogue: Dialogue, tally: Tally, done: Callable[[Answer], None]) -> None:
        messages = opening(dialogue)
        lost: str | None = None
        turns = zip(questions(dialogue.row), dialogue.row.turns, strict=True)
        for turn, (asked, (question, reference)) in enumerate(turns):
            messages.append(asked)
            key = self.settings.key(dialogue.base, dialogue.weights, messages, dialogue.task, dialogue.labels)
            answer = _row(dialogue, turn, question, reference, key)
            stored = _find(dialogue, turn, key)
            if lost is not None:
                answer["error"] = f"not asked, because turn {lost} of the dialogue failed"
            elif stored is not None:
                answer |= _said(stored)
            else:
                answer |= self._reply(dialogue, messages)
            with self._lock:
                tally.reused += stored is not None
                tally.asked += stored is None and lost is None
                if "error" in answer:
                    tally.failures.append(f"{dialogue.served}, {dialogue.row.id}, turn {turn}: {answer['error']}")
            _keep(dialogue, answer)
            done(answer)
            if "error" not in answer:
                messages.append(self.settings.continued(answer["answer"], reference))
            elif self.settings.history == "reference":
                messages.append(self.settings.continued("", reference))
            else:
                lost = lost or str(turn)

    def _reply(self, dialogue: Dialogue, messages: Sequence[Message]) -> dict[str, Any]:
        try:
            generation = self.settings.of(dialogue.task)
            reply = self.endpoint.ask(dialogue.served, messages, generation, dialogue.labels)
        except QuestionFailed as failure:
            self.endpoint.check_alive()
            self._count_loss(failure)
            return {"error": str(failure)}
        with self._lock:
            self._lost_in_a_row = 0
        # ms-swift names the base model whatever adapter answered, so only the name of another adapter is a proof.
        if reply.model != dialogue.served and reply.model in self.known_names:
            raise RunFailure(f"{self.endpoint.base_url}: asked {dialogue.served!r}, but {reply.model!r} answered")
        counted = {} if reply.tokens is None else {"tokens": reply.tokens}
        return {"answer": reply.text, "finish": reply.finish, **counted}

    def _count_loss(self, failure: QuestionFailed) -> None:
        with self._lock:
            self._lost_in_a_row = self._lost_in_a_row + 1 if failure.endpoint_at_fault else 0
            gone = self._lost_in_a_row >= self.give_up_after
        if gone:
            raise RunFailure(
                f"{self.endpoint.base_url}: {self.give_up_after} questions in a row failed, the last with: {failure}; "
                "what was answered is stored, run again to continue"
            )

"""cia's instruction grouping: T7 by hand, which group a task joins, and to which one a question goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift_cl.errors import UserError
from swift_cl.io import MethodState, save_method_state
from swift_cl.methods._instructions import (
    Group,
    cjk_share,
    group_from,
    instructions,
    mean_similarity,
    similarity,
)
from swift_cl.methods._routing import Candidate, RouteRequest
from swift_cl.methods.base import EarlierTask
from swift_cl.methods.cia import Cia, CiaConfig, reset
from swift_cl.serving.routing.model import StageRouter
from swift_cl.training.before import parameter_name
from tests.support.fake_context import FakeContext
from tests.support.tiny_lora import continued, stage_adapter

WORD, PHRASE = "answer using one word", "answer using one phrase"
CHINESE = "请根据新闻回答问题", "请根据报道回答问题"


def rows(*texts: str, system: str = "stage") -> list[dict[str, Any]]:
    head = {"role": "system", "content": system}
    return [{"messages": [head, {"role": "user", "content": text}]} for text in texts]


# --- similarity ------------------------------------------------------------------------------------------------------


def test_t7_similarity_by_hand() -> None:
    """Three shared words of weight 1, one each of weight ln 1.5 + 1; a stop-word list would give 0.503103."""
    assert similarity(WORD, PHRASE) == pytest.approx(0.602975, abs=1e-6)
    assert similarity(WORD, WORD) == 1.0
    assert similarity("Answer using one WORD", WORD) == pytest.approx(1.0)
    assert similarity("alpha beta", "gamma delta") == 0.0
    assert similarity("", "gamma") == 0.0
    assert similarity("a cat", "a dog") == 0.0  # one letter is no word
    assert similarity("?", "?") == 1.0  # equal texts without a word
    assert similarity("AB", "ab", "char") == pytest.approx(1.0)
    assert mean_similarity([WORD], Group("g", ["t"], {PHRASE: 1, WORD: 1}), "word") == pytest.approx(0.801487, abs=1e-6)


def test_similarity_is_that_of_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    for one, other in ((WORD, PHRASE), ("one one two three", "two three three four five"), ("ab cd", "cd")):
        a, b = TfidfVectorizer().fit_transform([one, other]).toarray()
        assert similarity(one, other) == pytest.approx(float(a @ b))
        a, b = TfidfVectorizer(analyzer="char", ngram_range=(1, 2)).fit_transform([one, other]).toarray()
        assert similarity(one, other, "char") == pytest.approx(float(a @ b))


def test_texts_without_word_borders_are_compared_by_characters() -> None:
    """To a word tokenizer a Chinese sentence is one word: two that differ in two characters have nothing in common."""
    found = similarity(*CHINESE)
    assert found == similarity(*CHINESE, "char")
    assert 0.5 < found < 0.9
    assert similarity("答案ab", "abcde") == similarity("答案ab", "abcde", "char") > 0  # one of the two is enough


def test_more_than_one_character_in_five_makes_a_text_chinese() -> None:
    assert cjk_share("答 a\n b") == 1 / 3  # blanks are no characters
    assert [cjk_share(text) for text in ("ひらカナ", "한국어", "答案", "abc", "")] == [1, 1, 1, 0, 0]
    assert similarity("答abcd", "答abce") == 0.0  # one in five: two different words
    assert similarity("答案abcde", "答案abcdf") > 0.5  # two in seven


def test_nothing_is_like_nothing() -> None:
    assert mean_similarity([], Group("g", ["t"], {WORD: 1}), "word") == 0.0
    assert mean_similarity([WORD], Group("g"), "word") == 0.0


def test_a_stored_group_keeps_the_order_of_its_texts() -> None:
    group = group_from(Group("g", ["t"], {"z": 3, "a": 3, "b": 1}).as_json())
    assert list(group.texts.items()) == [("z", 3), ("a", 3), ("b", 1)]


def test_what_the_instruction_of_a_row_is() -> None:
    own = rows("q", system="mine") + rows("r", system="stage")
    assert instructions(own, "stage", "auto") == {"mine": 1, "r": 1}
    assert instructions(own, "stage", "first_user") == {"q": 1, "r": 1}
    # One prompt for all rows is the stage's or the template's: at inference no question brings it along.
    assert instructions(rows("q", "q", "r", system="default"), None, "auto") == {"q": 2, "r": 1}
    assert instructions(rows("x" * 256 + "y" * 44), "stage", "auto") == {"x" * 256: 1}
    # An empty system prompt says nothing, and a row may have none at all.
    bare = [{"messages": rows("s" * 300)[0]["messages"][1:]}]
    several = rows("q", system="") + rows("r", system="mine") + bare
    assert instructions(several, None, "auto") == {"q": 1, "mine": 1, "s" * 256: 1}
    # The most frequent come first, and a dialogue begins with its first question.
    (dialogue,) = rows("q")
    dialogue["messages"] += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "why?"}]
    assert list(instructions([*rows("r"), dialogue, *rows("q")], "stage", "auto").items()) == [("q", 2), ("r", 1)]


# --- training --------------------------------------------------------------------------------------------------------


def adapters(folder: Path, *tasks: str) -> list[EarlierTask]:
    """Finished stages with adapters of different numbers."""
    found = []
    for number, task in enumerate(tasks, start=1):
        stage_adapter(folder / task)
        file = folder / task / "t0" / "adapter" / "adapter_model.safetensors"
        save_file({name: tensor * number for name, tensor in load_file(file).items()}, file)
        found.append(EarlierTask(task, folder / task, folder / task / "t0" / "adapter", folder / task / "cl_state"))
    return found


def grouped(
    model: Any, earlier: list[EarlierTask], state: MethodState | None, texts: list[dict[str, Any]], **settings: Any
) -> tuple[Cia, FakeContext]:
    """A task's method after its group was found."""
    method = Cia(CiaConfig(grouping=True, **settings))
    ctx = NamedContext(model, task=f"t{len(earlier)}", state=state)
    ctx.earlier, ctx.system, ctx.rows = earlier, "stage", texts
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    return method, ctx


class NamedContext(FakeContext):
    """Names parameters as the session does."""

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {parameter_name(name): parameter for name, parameter in super().parameters.items()}


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_tasks_join_groups_by_the_threshold_and_start_from_their_adapter(tmp_path: Path) -> None:
    stages = adapters(tmp_path, "a", "b")
    first, ctx = grouped(continued(tmp_path / "a"), [], None, rows(PHRASE, WORD))
    state = first.end_task(ctx)
    assert state.meta["groups"] == [{"name": "group_1", "tasks": ["t0"], "texts": [[PHRASE, 1], [WORD, 1]]}]
    stages[0] = EarlierTask("t0", stages[0].dir, stages[0].weights_dir, stages[0].state_dir)

    # 0.801487: a new group at 0.9, whose average is off.
    model = continued(tmp_path / "a")
    second, ctx = grouped(model, stages[:1], state, rows(WORD))
    state = second.end_task(ctx)
    assert [(g["name"], g["tasks"]) for g in state.meta["groups"]] == [("group_1", ["t0"]), ("group_2", ["t1"])]
    assert second.export(ctx, ctx.weights()).keys() == ctx.weights().keys()
    assert second._run is None
    # The same group at 0.8, whose average is on.
    same, ctx = grouped(continued(tmp_path / "a"), stages[:1], first.end_task(ctx), rows(WORD), sim_threshold=0.8)
    assert same._run is not None
    assert same.end_task(ctx).meta["groups"][0]["tasks"] == ["t0", "t1"]

    # The third task goes on with the first one's adapter, though it was loaded with the second one's.
    stages[1] = EarlierTask("t1", stages[1].dir, stages[1].weights_dir, stages[1].state_dir)
    model = continued(tmp_path / "b")
    third, ctx = grouped(model, stages, state, rows(PHRASE, WORD), sim_threshold=0.5)
    wanted = values(continued(tmp_path / "a"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in values(model).items())
    assert third._run is not None
    assert all(torch.equal(third._run.ema[parameter_name(name)], tensor) for name, tensor in wanted.items())


def test_a_new_group_begins_with_the_latest_adapter_or_afresh(tmp_path: Path) -> None:
    (stage,) = adapters(tmp_path, "t0")
    state = MethodState(meta={"groups": [{"name": "group_1", "tasks": ["t0"], "texts": [[PHRASE, 1]]}]})
    before = values(continued(tmp_path / "t0"))
    latest, fresh, again = (continued(tmp_path / "t0") for _ in range(3))
    grouped(latest, [stage], state, rows("nothing alike"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(latest).items())
    for model in (fresh, again):
        grouped(model, [stage], state, rows("nothing alike"), new_group_init="fresh")
    assert all((tensor == 0).all() for name, tensor in values(fresh).items() if "lora_B" in name)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in values(fresh).items())
    assert all(torch.equal(tensor, values(again)[name]) for name, tensor in values(fresh).items())


def test_a_first_group_keeps_what_training_begins_with(tmp_path: Path) -> None:
    adapters(tmp_path, "t0")
    model = continued(tmp_path / "t0")
    before = values(model)
    grouped(model, [], None, rows(WORD), new_group_init="fresh")
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(model).items())


def test_a_fresh_adapter_is_a_function_of_seed_and_task(tmp_path: Path) -> None:
    """And not of the global generator, which it leaves as it was: the data order depends on that."""
    adapters(tmp_path, "t0")
    model = continued(tmp_path / "t0")

    def fresh(seed: int, task: str, elsewhere: int) -> torch.Tensor:
        torch.manual_seed(elsewhere)
        state = torch.get_rng_state()
        reset(model, seed, task)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([tensor.flatten() for name, tensor in values(model).items() if "lora_A" in name])

    first = fresh(0, "t1", 5)
    assert torch.equal(first, fresh(0, "t1", 6))
    assert not torch.equal(first, fresh(1, "t1", 5))
    assert not torch.equal(first, fresh(0, "t2", 5))


def shapes(model: Any) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in NamedContext(model).parameters.items()}


def test_a_task_joins_the_first_of_the_nearest_groups_where_its_last_task_ended(tmp_path: Path) -> None:
    """Similarities 0, 0.602975 and 0.602975: the second group, with the adapter of t2, of t0 to t3."""
    stages = adapters(tmp_path, "t0", "t1", "t2", "t3")
    groups = [
        {"name": "group_1", "tasks": ["t0"], "texts": [["alpha beta", 1]]},
        {"name": "group_2", "tasks": ["t1", "t2"], "texts": [[PHRASE, 1]]},
        {"name": "group_3", "tasks": ["t3"], "texts": [[PHRASE, 1]]},
    ]
    model = continued(tmp_path / "t3")
    state = MethodState(meta={"groups": groups, "parameters": shapes(model)})
    method, ctx = grouped(model, stages, state, rows(WORD), sim_threshold=0.6)
    wanted = values(continued(tmp_path / "t2"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in values(model).items())
    found = method.end_task(ctx).meta["groups"]
    assert [group["tasks"] for group in found] == [["t0"], ["t1", "t2", "t4"], ["t3"]]
    assert found[1]["texts"] == [[PHRASE, 1], [WORD, 1]]
    assert ctx.notices == [
        "task 't4' joins group_2 (t1, t2), the nearest group's similarity is 0.603; an instruction of it: "
        "'answer using one word'"
    ]


def beside(text: str, texts: list[dict[str, Any]], **settings: Any) -> tuple[list[Any], list[str]]:
    """(the groups with their texts, what was told) of a second task beside a group of one text."""
    before = MethodState(meta={"groups": [{"name": "group_1", "tasks": ["t0"], "texts": [[text, 2]]}]})
    method = Cia(CiaConfig(grouping=True, **settings))
    ctx = FakeContext(task="t1", earlier=["t0"], state=before)
    ctx.system, ctx.rows = "stage", texts
    method.prepare_model(ctx, None)
    return [group.as_json()["texts"] for group in method._groups], ctx.notices


def test_a_similarity_of_the_threshold_is_enough() -> None:
    assert beside(WORD, rows(WORD), sim_threshold=1.0)[0] == [[[WORD, 3]]]


def test_only_the_most_frequent_texts_of_a_task_count() -> None:
    """By WORD alone the task is near enough (0.602975), with the other text it is not (0.301488). The codebook of one
    text stays the older task's, which was seen twice."""
    texts = rows(WORD, WORD, "alpha beta")
    assert beside(PHRASE, texts, sim_threshold=0.6, codebook_max=1)[0] == [[[PHRASE, 2]]]
    assert len(beside(PHRASE, texts, sim_threshold=0.6)[0]) == 2


def test_training_reads_instructions_and_compares_them_as_it_is_told() -> None:
    mixed = rows("q", system="mine") + rows("r", system="stage")
    assert beside("alpha", mixed)[0] == [[["alpha", 2]], [["mine", 1], ["r", 1]]]
    assert beside("alpha", mixed, instruction="first_user")[0] == [[["alpha", 2]], [["q", 1], ["r", 1]]]
    # Of the characters and pairs a, b, c, ab, bc and a, b, d, ab, bd three are shared: 3 / (3 + 2 (ln 1.5 + 1)^2).
    assert len(beside("abc", rows("abd"), sim_threshold=0.43)[0]) == 2
    groups, told = beside("abc", rows("abd"), sim_threshold=0.43, tokenizer="char")
    assert groups == [[["abc", 2], ["abd", 1]]]
    assert "similarity is 0.432;" in told[0]


@pytest.mark.parametrize(
    ("tokenizer", "text", "told"), [("word", CHINESE[0], True), ("char", CHINESE[0], False), ("word", WORD, False)]
)
def test_comparing_by_characters_unasked_is_told(tokenizer: str, text: str, told: bool) -> None:
    _, ctx = grouped(None, [], None, rows(text), tokenizer=tokenizer)
    assert ctx.notices[0] == f"task 't0' opens a new group; an instruction of it: {text!r}"
    assert ctx.notices[1:] == ["instructions are compared by characters: they have no word borders"] * told


def test_the_codebook_keeps_the_most_frequent_texts() -> None:
    group = Group("g")
    group.add("a", {"x": 2, "y": 1}, 2)
    group.add("b", {"z": 3, "y": 2}, 2)
    assert (group.tasks, group.texts) == (["a", "b"], {"y": 3, "z": 3})


def test_a_chain_begun_without_groups_is_refused(tmp_path: Path) -> None:
    (stage,) = adapters(tmp_path, "t0")
    with pytest.raises(UserError, match="was trained without it"):
        grouped(continued(tmp_path / "t0"), [stage], MethodState(meta={"groups": []}), rows(WORD))


# --- inference -------------------------------------------------------------------------------------------------------


def router(tmp_path: Path, **settings: Any) -> StageRouter:
    groups = [
        {"name": "group_1", "tasks": ["a", "c"], "texts": [["translate this text", 1], ["translate that text", 1]]},
        {"name": "group_2", "tasks": ["b"], "texts": [["how does the reviewer feel", 5]]},
    ]
    save_method_state(tmp_path / "cl_state", "cia", MethodState(meta={"groups": groups}))
    candidates = [Candidate(g["name"], tuple(g["tasks"]), tmp_path) for g in groups]  # type: ignore[arg-type]
    model: Any = type("NoModel", (), {"cache": {}})()
    return StageRouter(Cia(CiaConfig(grouping=True, **settings)), tmp_path, ["a", "b", "c"], candidates, model)


def asked(text: str, system: str | None = None) -> RouteRequest:
    return RouteRequest(({"role": "user", "content": text},), {"group_1": None, "group_2": None}, system)


def test_a_question_goes_to_the_nearest_instructions(tmp_path: Path) -> None:
    found = router(tmp_path).route([asked("translate a text"), asked("what does the reviewer say")])
    assert [route.chosen for route in found] == ["group_1", "group_2"]
    wanted = sum(similarity("translate a text", f"translate {t} text") for t in ("this", "that")) / 2
    assert found[0].scores == {"group_1": pytest.approx(wanted), "group_2": 0.0}
    # A row's own system prompt is its instruction, unless it is told otherwise.
    both = asked("translate a text", "how does the reviewer feel")
    assert [router(tmp_path, instruction=i).route([both])[0].chosen for i in ("auto", "first_user")] == [
        "group_2",
        "group_1",
    ]


def test_a_question_is_the_users_text_whatever_precedes_it(tmp_path: Path) -> None:
    greeted = ({"role": "assistant", "content": "how does the reviewer feel"}, *asked("translate a text").messages)
    request = RouteRequest(greeted, {"group_1": None, "group_2": None}, None)
    assert router(tmp_path).route([request])[0].chosen == "group_1"


def test_questions_are_compared_by_characters_where_the_tasks_were(tmp_path: Path) -> None:
    """No word of the question is in an instruction."""
    (found,) = router(tmp_path, tokenizer="char").route([asked("reviewers")])
    assert (found.chosen, router(tmp_path).route([asked("reviewers")])[0].scores["group_2"]) == ("group_2", 0.0)
    assert found.scores["group_2"] == pytest.approx(similarity("reviewers", "how does the reviewer feel", "char"))


def test_what_answers_a_question_that_matches_nothing(tmp_path: Path) -> None:
    odd = asked("7 + 5 = ?")
    assert router(tmp_path).route([odd])[0].chosen == "group_1"
    assert router(tmp_path, no_match="last").route([odd])[0].chosen == "group_2"
    with pytest.raises(UserError, match=r"at most 0\.000, the threshold is 0\.9"):
        router(tmp_path, no_match="error").route([odd])
    near = asked("how does the reviewer feel")
    assert router(tmp_path, no_match="error").route([near])[0].chosen == "group_2"
    assert router(tmp_path, no_match="error", sim_threshold=1.0).route([near])[0].chosen == "group_2"


def test_candidates_are_the_groups_with_the_adapter_of_their_last_task(tmp_path: Path) -> None:
    method = Cia(CiaConfig(grouping=True))
    method._groups = [Group("group_1", ["a", "c"]), Group("group_2", ["b"])]
    ctx = FakeContext(task="c", earlier=["a", "b"], folder=tmp_path)
    ctx.this_stage = EarlierTask("c", tmp_path / "c", tmp_path / "c" / "adapter", tmp_path / "c" / "cl_state")
    assert method.candidates(ctx) == [
        Candidate("group_1", ("a", "c"), tmp_path / "c" / "adapter"),
        Candidate("group_2", ("b",), tmp_path / "b" / "adapter"),
    ]
    assert (method.routes(), Cia(CiaConfig()).routes()) == (True, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grouping": True, "sim_threshold": 1.5}, r"--cia_sim_threshold is 1.5, allowed: a number in \[0, 1\]"),
        ({"grouping": True, "codebook_max": 0}, "--cia_codebook_max is 0, allowed: a whole number >= 1"),
        ({"sim_threshold": 0.8}, "--cia_sim_threshold is 0.8, allowed: only with --cia_grouping true"),
        ({"instruction": "first_user"}, "--cia_instruction is 'first_user', allowed: only with --cia_grouping true"),
        ({"tokenizer": "char"}, "--cia_tokenizer is 'char', allowed: only with --cia_grouping true"),
        ({"codebook_max": 8}, "--cia_codebook_max is 8, allowed: only with --cia_grouping true"),
        ({"new_group_init": "fresh"}, "--cia_new_group_init is 'fresh', allowed: only with --cia_grouping true"),
        ({"no_match": "last"}, "--cia_no_match is 'last', allowed: only with --cia_grouping true"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CiaConfig(**settings).validate()
    CiaConfig(grouping=True, sim_threshold=1.0, codebook_max=1).validate()

"""ssr and pseudo_replay with engines that say what they are told (sections 9 and 10 of the specification)."""

import itertools
import re

import numpy as np
import pytest

from swift_cl.errors import RunFailure, UserError
from swift_cl.generation.screen import Rejected
from swift_cl.io import read_json
from swift_cl.methods._selected import choose, quotas
from swift_cl.methods._selection import kmeans_clusters
from swift_cl.methods._synthesis import TaskFacts, _tuples, common_frame, parse
from swift_cl.methods.pseudo_replay import PseudoReplay, PseudoReplayConfig
from swift_cl.methods.ssr import Ssr, SsrConfig
from tests.support.fake_engine import in_order, said
from tests.support.synthesised import DEFINITION, KeptText, kind_rows, stages

SCRIPT = [
    said(" red apple\nOutput: fruit"),
    said(" red apple\nOutput: food"),
    said(" a car"),
    said(" dog\nOutput: animal\n\nInput: cat\nOutput: animal"),
    said(" long", "length"),
    *[said(f" thing {i}\nOutput: x") for i in range(40)],
]


def ssr(**settings):
    settings = {"select": "first", "num_samples": 2, "oversample": 2.5, **settings}

    def make():
        config = SsrConfig(**settings)
        config.validate()
        return Ssr(config)

    return make


def pseudo(**settings):
    def make():
        config = PseudoReplayConfig(**{"num_samples": 2, "shots": 2, **settings})
        config.validate()
        return PseudoReplay(config)

    return make


def shout(prompt, seed):
    """A latest model that answers with the last words of the question in capitals."""
    return said(prompt.messages[-1]["content"].rpartition("\n\n")[2].upper())


def added(found, stage=1):
    """(question, answer) of the rows that a stage trains on beside its own."""
    mixed, ctx, _ = found[stage]
    assert mixed[: len(ctx.rows)] == ctx.rows
    return [(row["messages"][1]["content"], row["messages"][2]["content"]) for row in mixed[len(ctx.rows) :]]


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ([7, 7, 6], 10, [4, 3, 3]),
        ([5, 5, 10], 10, [3, 2, 5]),
        ([10, 5, 3, 1, 1], 5, [1, 1, 1, 1, 1]),
        ([10, 5, 3, 1, 1], 8, [3, 2, 1, 1, 1]),
        ([2, 1], 9, [2, 1]),
        ([3, 3], 1, [1, 0]),
        ([], 3, []),
    ],
)
def test_quotas_are_exact(sizes, total, expected):
    assert quotas(sizes, total) == expected


def test_the_next_of_the_cluster_takes_the_place_of_a_failure():
    asked = []

    def refine(batch):
        asked.append(batch)
        return [candidate not in (0, 10, 11, 12) for candidate in batch]

    # Quotas 2 and 1; candidate 0 fails, then 2 is next; cluster two fails whole, and cluster one gives its row.
    assert choose([[0, 1, 2, 3], [10, 11, 12]], 3, refine) == [1, 2, 3]
    assert asked[0] == [0, 1, 10]
    assert choose([[5, 4]], 9, lambda batch: [True] * len(batch)) == [4, 5]


def test_synthesis_screens_and_the_latest_model_answers(tmp_path):
    found = stages(ssr(), tmp_path, ["one", "two"], base=in_order(*SCRIPT), latest=shout)
    assert added(found) == [(f"{DEFINITION}\n\nred apple", "RED APPLE"), (f"{DEFINITION}\n\ndog", "DOG")]
    import json

    told = json.loads((tmp_path / "stage_2/generated/one/manifest.json").read_text())["tasks"]["one"]
    assert told["rejected"] == {"duplicate": 1, "separators": 1, "truncated": 1}
    assert told["requested"] == 2
    lines = found[1][2].rows["rehearsal"]
    assert [line["cl"]["refined_by"] for line in lines] == ["theta(one)"] * 2
    assert lines[0]["cl"]["generator"]["adapter_sha256"] == "base"
    assert lines[0]["cl"]["raw"] == " red apple\nOutput: fruit"
    assert lines[0]["row"]["messages"][0] == {"role": "system", "content": "You sort things."}


def test_who_is_asked_what(tmp_path):
    found = stages(ssr(), tmp_path, ["one", "two", "three"], latest=shout)
    assert found[0][1].engines.opened == []
    for stage, (old, now) in ((1, ("one", "two")), (2, ("two", "three"))):
        ctx = found[stage][1]
        newest = ctx.earlier[-1].weights_dir
        assert ctx.engines.opened == [None, newest], "base first, then the newest weights"
        base, latest = ctx.engines.engines[None], ctx.engines.engines[newest]
        for prompt in base.prompts:
            assert set(re.findall(r"^Input: (\w+) thing", prompt.text, re.M)) == {old}
            assert now not in prompt.text
            assert prompt.text.startswith(f"{DEFINITION}\n\nInput: {old} thing ")
            assert prompt.text.endswith("\n\nInput:")
            assert prompt.text.count("Input:") == 3
        assert base.calls[0][1].temperature == 0.9
        assert base.calls[0][1].stop == ("\n\nInput:",)
        for prompt in latest.prompts:
            system, user = prompt.messages
            assert system == {"role": "system", "content": "You sort things."}
            assert user["content"].startswith(f"{DEFINITION}\n\n{old} invention")
        assert latest.calls[0][1].temperature == 0


def test_rows_are_made_once(tmp_path):
    """d: what stage 2 made of task one is what stage 4 trains on."""
    found = stages(ssr(), tmp_path, ["one", "two", "three", "four"], latest=shout)
    of_one = [[line for line in state.rows["rehearsal"] if line["task"] == "one"] for _, _, state in found[1:]]
    assert len(of_one[0]) == 2
    assert of_one[0] == of_one[1] == of_one[2]
    assert [line["task"] for line in found[3][2].rows["rehearsal"]] == ["one"] * 2 + ["two"] * 2 + ["three"] * 2


def test_prompts_do_not_repeat_before_all_were_used():
    draw = _tuples(20, 2, 0, "task")
    drawn = [tuple(draw(i)) for i in range(760)]
    assert len(set(drawn[:380])) == 380
    assert len(set(drawn[380:])) == 380
    assert drawn[:380] != drawn[380:]
    assert all(a != b for a, b in drawn)
    many = _tuples(100, 5, 0, "task")  # nine thousand million: not shuffled
    drawn = [tuple(many(i)) for i in range(2000)]
    assert len(set(drawn)) == 2000
    assert all(len(set(one)) == 5 for one in drawn)
    assert len({one[0] for one in drawn}) > 80


def test_demos_are_one_percent_and_at_least_the_shots():
    facts = TaskFacts.of("t", kind_rows("one", 2000), "ssr", 0.01, 2, 0)
    assert len(facts.demos) == 20
    assert facts.definition == DEFINITION
    assert facts.demos[0].x.startswith("one thing")
    assert TaskFacts.from_json(facts.to_json()) == facts
    assert len(TaskFacts.of("t", kind_rows("one", 30), "ssr", 0.01, 5, 0).demos) == 5
    with pytest.raises(UserError, match=r"task 't': 3 of its 3 rows .* --ssr_shots is 4"):
        TaskFacts.of("t", kind_rows("one", 3), "ssr", 0.01, 4, 0)
    odd = kind_rows("one", 3)
    odd[0]["messages"][1]["content"] += "\nOutput: trap"
    odd[1]["messages"] += odd[1]["messages"][1:]
    with pytest.raises(UserError, match="1 of its 3 rows can be shown"):
        TaskFacts.of("t", odd, "ssr", 0.01, 2, 0)


def test_demos_are_drawn_and_not_the_first_rows():
    facts = TaskFacts.of("t", kind_rows("one", 200), "ssr", 0.1, 2, 0)
    numbers = [int(demo.x.removeprefix("one thing ")) for demo in facts.demos]
    assert len(numbers) == 20
    assert numbers == sorted(numbers)
    assert numbers != list(range(20))
    other = TaskFacts.of("t", kind_rows("one", 200), "ssr", 0.1, 2, 1)
    assert other.demos != facts.demos, "whatever the seed"


def test_the_budget_is_the_ratio_or_the_number():
    """2.5 of ten rows are 3; a tenth of 2000 is 200."""
    assert Ssr(SsrConfig(ratio=0.25)).wanted(10) == 3
    assert Ssr(SsrConfig()).wanted(2000) == 200
    assert Ssr(SsrConfig(num_samples=7)).wanted(2000) == 7


def test_the_budget_is_a_share_of_the_task_that_is_rehearsed(tmp_path):
    """A quarter of 20 rows, whatever the size of the task that they are mixed into."""
    rows = {"one": kind_rows("one", 20), "two": kind_rows("two", 40), "three": kind_rows("three", 8)}
    found = stages(ssr(num_samples=0, ratio=0.25), tmp_path, list(rows), rows=rows, latest=shout)
    assert [len(mixed) for mixed, _, _ in found] == [20, 40 + 5, 8 + 5 + 10]


@pytest.mark.parametrize("make", [ssr, pseudo])
def test_shots_and_demo_ratio_say_what_a_prompt_shows(make, tmp_path):
    """Half of 20 rows are ten demonstrations, of which a prompt has four."""
    found = stages(make(shots=4, demo_ratio=0.5), tmp_path, ["one", "two"], latest=shout)
    assert len(found[0][2].rows["tasks"][0]["demos"]) == 10
    prompts = found[1][1].engines.engines[None].prompts
    assert {len(re.findall(r"^Input: one thing", prompt.text, re.M)) for prompt in prompts} == {4}


def test_a_task_with_a_demonstration_too_few_says_so_for_pseudo_replay(tmp_path):
    with pytest.raises(UserError, match=r"3 of its 3 rows .* --pseudo_replay_shots is 5"):
        stages(pseudo(shots=5), tmp_path, ["one"], rows={"one": kind_rows("one", 3)})


def test_as_many_are_asked_for_as_the_flags_say(tmp_path):
    """Four candidates for each of two rows; pseudo replay asks for the number itself and a fifth more."""
    found = stages(ssr(oversample=4.0, max_new_tokens=77), tmp_path / "ssr", ["one", "two"], latest=shout)
    engines = found[1][1].engines.engines
    latest = engines[found[1][1].earlier[-1].weights_dir]
    assert len(engines[None].prompts) == 8
    assert {call[1].max_new_tokens for call in (*engines[None].calls, *latest.calls)} == {77}
    found = stages(pseudo(num_samples=10), tmp_path / "pseudo", ["one", "two"])
    assert len(found[1][1].engines.engines[None].prompts) == 12
    assert len(added(found)) == 10


def test_definition_without_a_blank_line_ends_at_a_line_break():
    rows = kind_rows("one", 20)
    for row in rows:
        row["messages"][1]["content"] = row["messages"][1]["content"].replace("\n\n", "\n")
    facts = TaskFacts.of("t", rows, "ssr", 0.1, 2, 0)
    assert facts.definition == DEFINITION
    assert facts.row("x", "y", "s")["messages"][1]["content"] == f"{DEFINITION}\nx"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Rate.\n\nText: a\nAnswer:", "Rate.\n\nText: b c\nAnswer:"], ("Rate.", "\n\n", "\nAnswer:")),
        (["Rate.\nOption: a, b\nText: a\n\nAnswer:", "Rate.\nOption: a, b\nText: b\n\nAnswer:"],
         ("Rate.\nOption: a, b", "\n", "\n\nAnswer:")),
        (["A thing is red?", "A thing is blue?"], ("", "\n", "")),
        (["Q.\n\nText: a\nAnswer:", "Q.\n\n\nAnswer:"], ("Q.", "\n\n", "")),
        (["Q.\n\nsame", "Q.\n\nsame"], ("Q.", "\n\n", "")),
        ([], ("", "\n", "")),
    ],
)  # fmt: skip
def test_frame_by_hand(texts, expected):
    """What all questions have in common is not asked of the base model; a text that has nothing else keeps it."""
    assert common_frame(texts) == expected


def test_a_rows_frame_is_put_around_what_is_made():
    rows = kind_rows("one", 20)
    for i, row in enumerate(rows):
        row["messages"][1]["content"] = f"Which kind?\nOption: a, b\nText: thing {i}\nAnswer:"
    facts = TaskFacts.of("t", rows, "ssr", 1.0, 2, 0)
    assert {demo.x for demo in facts.demos} == {f"Text: thing {i}" for i in range(20)}
    texts = {row["messages"][1]["content"] for row in rows}
    assert {facts.row(demo.x, "y", "s")["messages"][1]["content"] for demo in facts.demos} == texts
    assert TaskFacts.from_json(facts.to_json()) == facts


def write_demos(folder, task, entries, suffix="json"):
    import json

    lines = [json.dumps(entry) for entry in entries]
    text = "\n".join(lines) if suffix == "jsonl" else f"[{', '.join(lines)}]"
    (folder / f"{task}.{suffix}").write_text(text)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_demonstrations_of_ones_own(tmp_path, suffix):
    """No row of the task is shown, and what is made has the task's definition and system prompt."""
    for task in ("one", "two"):
        own = [{"input": f"{task} mine {i}", "output": f"made {i}"} for i in range(3)]
        write_demos(tmp_path, task, [{**own[0], "system": "You alone."}, *own[1:]], suffix)
    make = ssr(demo_file=str(tmp_path / f"{{task}}.{suffix}"), shots=3)
    base = in_order(*[said(f" new {i}\nOutput: x") for i in range(20)])
    found = stages(make, tmp_path / "run", ["one", "two"], base=base, latest=shout)
    asked = found[1][1].engines.engines[None].prompts
    for prompt in asked:
        assert sorted(re.findall(r"^Input: (.*)$", prompt.text, re.M)[:3]) == [f"one mine {i}" for i in range(3)]
        assert prompt.text.startswith(f"{DEFINITION}\n\nInput: one mine")
        assert "one thing" not in prompt.text
    firsts = [re.findall(r"^Input: (.*)$", prompt.text, re.M)[0] for prompt in asked]
    mixed, ctx, state = found[1]
    new = [row["messages"] for row in mixed[len(ctx.rows) :]]
    assert [messages[1]["content"] for messages in new] == [f"{DEFINITION}\n\nnew 0", f"{DEFINITION}\n\nnew 1"]
    systems = ["You alone." if first == "one mine 0" else "You sort things." for first in firsts]
    assert [messages[0]["content"] for messages in new] == systems[:2]
    assert [demo["x"] for demo in state.rows["tasks"][1]["demos"]] == [f"two mine {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"input": "a", "output": "b"}], "expected a list of at least 2 demonstrations .* found 1 entries"),
        ([{"input": "a", "output": "b"}, {"input": "a"}], 'entry 1: expected "input" and "output" .*, found input'),
        ([{"input": "a", "output": "b"}, "c"], "entry 1: expected .*, found str"),
        ([{"input": "a", "output": "b"}, {"input": "a", "output": 1}], "entry 1: expected texts only"),
        ([{"input": "a", "output": "b"}, {"input": " ", "output": "b"}], "entry 1: input and output may not be empty"),
        ([{"input": "a", "output": "b"}, {"input": "a\nOutput: x", "output": "b"}], "entry 1: .* begins with Input:"),
        ([{"input": "a", "output": "b", "answer": "c"}] * 2, "entry 0: expected .*, found input, output, answer"),
    ],
)
def test_demonstrations_that_are_none(tmp_path, entries, message):
    write_demos(tmp_path, "one", entries)
    with pytest.raises(UserError, match=rf"^--ssr_demo_file .*one\.json.*{message}") as caught:
        stages(ssr(demo_file=str(tmp_path / "one.json")), tmp_path, ["one"])
    assert "\n" not in str(caught.value)


def test_a_task_without_its_demonstrations(tmp_path):
    with pytest.raises(UserError, match=r"one\.json: file not found"):
        stages(ssr(demo_file=str(tmp_path / "{task}.json")), tmp_path, ["one"])


def test_kmeans_takes_exactly_the_budget_from_all_clusters(tmp_path):
    """Three kinds of questions, of which one is rare: every cluster is there, nearest to its centroid first."""
    texts = itertools.chain(
        *([f"a{i}" for i in range(8)], ["bbbbbbbbbbbbbbbbbbbb"], [f"{'c' * 60}{i}" for i in range(6)])
    )
    base = in_order(*[said(f" {text}\nOutput: y") for text in texts], said("no row"))
    make = ssr(select="kmeans", embedder="model", clusters=3, num_samples=5, oversample=3.0)
    rows = [
        question.rpartition("\n\n")[2]
        for question, _ in added(stages(make, tmp_path, ["one", "two"], base=base, latest=shout))
    ]
    assert len(rows) == 5
    assert {text[0] for text in rows} == {"a", "b", "c"}


def test_clusters_are_of_directions_and_as_many_as_asked_for(tmp_path):
    """The stand-in embeds as (length, sum of the codes modulo 97): (1, 20) and (4, 80) point one way, (10, 2) and
    (20, 4) another, while by their places (1, 20) is nearer to the last two than to (4, 80)."""
    texts = ["u", "uuuu", "k" * 9 + "j", "k" * 19 + "i"]
    base = in_order(*[said(f" {text}\nOutput: y") for text in texts], said("no row"))
    rows = {"one": kind_rows("one", 20), "two": kind_rows("two", 20)}
    for row in rows["one"]:
        row["messages"][1]["content"] = row["messages"][1]["content"].rpartition("\n\n")[2]
    make = ssr(select="kmeans", embedder="model", clusters=2, num_samples=4, oversample=1.0, refine=False)
    stages(make, tmp_path, ["one", "two"], rows, base)
    (path,) = (tmp_path / "stage_2/generated/one").glob("clusters-*.json")
    assert [sorted(i for i, _ in cluster) for cluster in read_json(path)] == [[0, 1], [2, 3]]


def test_random_is_not_the_first(tmp_path):
    """Five of the twelve that the script's first fifteen leave, always the same of one seed."""
    kept = {}
    for select in ("first", "random"):
        make = ssr(select=select, num_samples=5, oversample=3.0)
        runs = [
            added(stages(make, tmp_path / select / run, ["one", "two"], base=in_order(*SCRIPT), latest=shout))
            for run in "ab"
        ]
        assert runs[0] == runs[1]
        kept[select] = [answer for _, answer in runs[0]]
    assert kept["first"] == ["RED APPLE", "DOG", "THING 0", "THING 1", "THING 2"]
    assert len(set(kept["random"])) == 5
    assert set(kept["random"]) <= {"RED APPLE", "DOG", *(f"THING {i}" for i in range(10))}
    assert kept["random"] != kept["first"]


def test_clusters_are_ordered_by_distance():
    points = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    clusters = kmeans_clusters(points, 2, 0)
    assert [[i for i, _ in cluster] for cluster in clusters] == [[1, 0, 2], [3, 4]]
    assert [d for _, d in clusters[0]] == [0.0, 1.0, 1.0]
    assert kmeans_clusters(points[:0], 2, 0) == []


def test_unusable_answers_are_replaced(tmp_path):
    def picky(prompt, seed):
        text = prompt.messages[-1]["content"].rpartition("\n\n")[2]
        return {"red apple": said(" "), "dog": said("DOG", "length")}.get(text, said(text.upper()))

    found = stages(ssr(oversample=5.0), tmp_path, ["one", "two"], base=in_order(*SCRIPT), latest=picky)
    assert [answer for _, answer in added(found)] == ["THING 0", "THING 1"]
    with pytest.raises(RunFailure, match="usable answers to only 0 of 2 rows of task 'one'"):
        stages(ssr(), tmp_path / "none", ["one", "two"], latest=lambda prompt, seed: said(""))


def test_min_fill_says_how_many_answers_are_enough(tmp_path):
    """One answer of four is usable: a quarter."""

    def once(prompt, seed):
        return said("ok" if prompt.messages[-1]["content"].endswith("thing 0") else "<|end|> no text")

    def run(least, folder):
        make = ssr(num_samples=4, oversample=1.0, min_fill=least)
        base = in_order(*[said(f" thing {i}\nOutput: x") for i in range(4)], said("no row"))
        return stages(make, tmp_path / folder, ["one", "two"], base=base, latest=once)

    found = run(0.25, "enough")
    assert added(found) == [(f"{DEFINITION}\n\nthing 0", "ok")]
    assert any("usable answers to only 1 of 4 rows of task 'one'" in notice for notice in found[1][1].notices)
    with pytest.raises(RunFailure, match="usable answers to only 1 of 4 rows"):
        run(0.5, "few")
    base = in_order(said(" thing 1\nOutput: x"), said(" thing 2\nOutput: x"), said("no row"))
    found = stages(ssr(min_fill=0.0), tmp_path / "any", ["one", "two"], base=base, latest=once)
    assert added(found) == []


def test_labels_are_asked_of_answers_that_are_kept(tmp_path):
    """Without the latest model's answers, those of the base model must be labels."""
    rows = {"one": labelled(20), "two": kind_rows("two", 20)}
    script = (("a", "positive."), ("b", "great"), ("c", "negative"))
    base = in_order(*[said(f" {x}\nOutput: {y}") for x, y in script])
    found = stages(ssr(refine=False), tmp_path, ["one", "two"], rows, base)
    assert [answer for _, answer in added(found)] == ["positive", "negative"]


def test_a_resumed_stage_asks_nobody(tmp_path):
    make = ssr(select="kmeans", embedder="model", num_samples=3)
    first = stages(make, tmp_path, ["one", "two"], latest=shout)

    def dead(prompt, seed):
        raise AssertionError("asked again")

    again = stages(make, tmp_path, ["one", "two"], base=dead, latest=dead)
    assert again[1][0] == first[1][0]


def test_pseudo_replay_equals_ssr_without_answers_and_choice(tmp_path):
    settings = {"gen_temperature": 1.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.0, "gen_seed": 3}
    same = ssr(refine=False, select="first", num_samples=7, oversample=1.2, **settings)
    one = stages(same, tmp_path / "ssr", ["one", "two"])
    other = stages(pseudo(num_samples=7, **settings), tmp_path / "pseudo", ["one", "two"])
    # What the fake base says depends on the candidate's seed, which carries the method's name: compare the prompts.
    asked = [[prompt.text for prompt in found[1][1].engines.engines[None].prompts] for found in (one, other)]
    assert asked[0] == asked[1]
    said_same = [said(f" thing {i}\nOutput: kind {i}") for i in range(60)]
    one = stages(same, tmp_path / "3", ["one", "two"], base=in_order(*said_same))
    other = stages(pseudo(num_samples=7, **settings), tmp_path / "4", ["one", "two"], base=in_order(*said_same))
    assert added(one) == added(other)
    assert one[1][0] == other[1][0]


def test_pseudo_replay_keeps_the_base_models_answers(tmp_path):
    found = stages(pseudo(), tmp_path, ["one", "two"], base=in_order(*SCRIPT))
    assert added(found) == [(f"{DEFINITION}\n\nred apple", "fruit"), (f"{DEFINITION}\n\ndog", "animal")]
    assert found[1][1].engines.opened == [None]


def test_no_demo_becomes_a_row(tmp_path):
    def parrot(prompt, seed):
        demo = re.findall(r"^Input: (.+)\nOutput: (.+)$", prompt.text, re.M)[0]
        return said(f" {demo[0]}\nOutput: {demo[1]}")

    with pytest.raises(RunFailure, match="dropped: copy"):
        stages(pseudo(), tmp_path, ["one", "two"], base=parrot)


def test_all_earlier_tasks_are_generated(tmp_path):
    for when in ("finish", "prepare"):
        found = stages(pseudo(num_samples=9, when=when), tmp_path / when, ["one", "two", "three"])
        assert [line["task"] for line in found[2][2].rows["pseudo"]] == ["one"] * 9 + ["two"] * 9
        asked = {prompt.text.split("Input: ")[1].split()[0] for prompt in found[2][1].engines.engines[None].prompts}
        assert asked == ({"two"} if when == "finish" else {"one", "two"})
    again = [line["row"] for line in found[2][2].rows["pseudo"] if line["task"] == "one"]
    assert again != [line["row"] for line in found[1][2].rows["pseudo"]]


def labelled(count):
    rows = kind_rows("one", count)
    for i, row in enumerate(rows):
        row["messages"][2]["content"] = ("positive", "negative")[i % 2]
    return rows


def test_answers_of_a_closed_set_must_be_labels(tmp_path):
    base = in_order(*[said(f" {x}\nOutput: {y}") for x, y in (("a", "positive."), ("b", "great"), ("c", "negative"))])
    rows = {"one": labelled(20), "two": kind_rows("two", 20)}
    found = stages(pseudo(), tmp_path, ["one", "two"], rows=rows, base=base)
    assert [answer for _, answer in added(found)] == ["positive", "negative"]
    found = stages(ssr(oversample=1.0), tmp_path / "ssr", ["one", "two"], rows=rows, latest=shout,
                   base=in_order(said(" a\nOutput: great"), said(" b\nOutput: so")))  # fmt: skip
    assert [answer for _, answer in added(found)] == ["A", "B"], "ssr replaces the answers, so it takes any"


def test_balanced_labels(tmp_path):
    words = [f"w{i}" for i in range(30)]
    rows = {"one": labelled(20), "two": kind_rows("two", 20)}

    def answers(keep):
        base = in_order(*[said(f" {w}\nOutput: {'negative' if i == 9 else 'positive'}") for i, w in enumerate(words)])
        return [answer for _, answer in added(stages(pseudo(keep=keep), tmp_path / keep, ["one", "two"], rows, base))]

    assert sorted(answers("balanced")) == ["negative", "positive"]
    assert answers("all") == ["positive", "positive"], "valid rows as they come"


def test_parse_reads_the_continuation_alone():
    assert [turn["content"] for turn in parse(" a\nb \nOutput: c\nd\n\nInput: e\nOutput: f")] == ["a\nb", "c\nd"]
    assert [turn["content"] for turn in parse(" says Output: here\nOutput: c")] == ["says Output: here", "c"]
    for text in (" a\nInput: b\nOutput: c", " a\nOutput: b\nInput: c", " a\nOutput: b\nOutput: c", " a"):
        with pytest.raises(Rejected, match="separators"):
            parse(text)


def test_long_rows_are_dropped(tmp_path):
    class Short(KeptText):
        max_words = 14  # a row has 3 words of system prompt, 6 of definition, 3 of question and 3 of answer

    with pytest.raises(RunFailure, match="too_long"):
        stages(pseudo(), tmp_path, ["one", "two"], context=Short)


def test_media_is_refused(tmp_path):
    rows = kind_rows("one", 20)
    rows[3]["images"] = ["a.png"]
    for make in (ssr(), pseudo()):
        with pytest.raises(UserError, match="generates text, but row 3 of task 'one' has images"):
            stages(make, tmp_path, ["one"], rows={"one": rows})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, r"--ssr_ratio is 0.0, allowed: a number in \(0, 1\]"),
        ({"num_samples": -1}, "--ssr_num_samples is -1"),
        ({"demo_ratio": 1.5}, "--ssr_demo_ratio is 1.5"),
        ({"shots": 0}, "--ssr_shots is 0, allowed: 1 or more"),
        ({"clusters": 3}, "--ssr_clusters is 3, allowed: 20, because only --ssr_select kmeans uses it"),
        ({"oversample": 0.5}, "--ssr_oversample is 0.5"),
        ({"gen_temperature": 0.0}, "--ssr_gen_temperature is 0.0, allowed: a number > 0"),
        ({"top_k": -1}, "--ssr_top_k is -1"),
        ({"top_p": 0.0}, "--ssr_top_p is 0.0"),
        ({"repetition_penalty": 0.9}, "--ssr_repetition_penalty is 0.9"),
        ({"max_new_tokens": 0}, "--ssr_max_new_tokens is 0"),
        ({"gen_batch_size": 0}, "--ssr_gen_batch_size is 0"),
        ({"max_rounds": 0}, "--ssr_max_rounds is 0"),
        ({"min_fill": 1.5}, "--ssr_min_fill is 1.5"),
        ({"gen_seed": -2}, "--ssr_gen_seed is -2"),
        ({"demo_file": "no/such.json"}, "--ssr_demo_file is 'no/such.json', allowed: a file that is there"),
        (
            {"demo_file": "{task}.json", "demo_ratio": 0.5},
            "--ssr_demo_ratio is 0.5, allowed: 0.01, because --ssr_demo_file gives the demonstrations",
        ),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ssr(**settings)()


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"shots": 0}, {"demo_ratio": 0.0}, {"top_p": 2.0}])
def test_pseudo_replay_refuses_values_out_of_range(settings):
    with pytest.raises(UserError, match=f"--pseudo_replay_{next(iter(settings))} is "):
        pseudo(**settings)()

"""lamol's rows: what is trained, what is asked of whom, what is read back (section 2 of the specification)."""

import math

import pytest

from swift_cl.errors import UserError
from swift_cl.generation.screen import Rejected
from swift_cl.io import read_jsonl
from swift_cl.methods._gen_rows import GenRows
from swift_cl.methods.lamol import Lamol, LamolConfig
from tests.support.fake_context import FakeContext
from tests.support.fake_engine import Engines, FakeEngine, said
from tests.support.synthesised import KeptText, kind_rows, stages


def lamol(**settings):
    def make():
        config = LamolConfig(**{"gamma": 0.2, **settings})
        config.validate()
        return Lamol(config)

    return make


def inventive(prompt, seed):
    """Generates a row of the task that it is asked for."""
    task = prompt.messages[1]["content"].partition(":")[2]
    return said(f"{task} question {seed}\n__ans__\n{task} answer {seed}")


def chat(system, *turns):
    roles = ("user", "assistant")
    return [{"role": "system", "content": system}] + [
        {"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]


def by_channel(rows, channel):
    return [row["messages"] for row in rows if row["channel"] == channel]


def test_a_row_as_generation_row():
    form = GenRows("t1", "be brief")
    row = form.gen_row(chat("be brief", "A?", "b"))
    assert row == {"messages": chat("", "__gen__:t1", "A?\n__ans__\nb")}
    assert form.row(form.parse("A?\n__ans__\nb")) == {"messages": chat("be brief", "A?", "b")}
    several = chat("be brief", "A?", "b", "C?\n", " d")
    assert form.text(several) == "A?\n__ans__\nb\n__user__\nC?\n\n__ans__\n d"
    assert form.row(form.parse(form.text(several))) == {"messages": several}


def test_a_row_with_its_system_prompt():
    form = GenRows(None, None)
    row = form.gen_row(chat("be\nbrief", "A?", "b"))
    assert row == {"messages": chat("", "__gen__", "__sys__\nbe\nbrief\n__user__\nA?\n__ans__\nb")}
    assert form.row(form.parse(row["messages"][2]["content"])) == {"messages": chat("be\nbrief", "A?", "b")}


@pytest.mark.parametrize(
    "text", ["no answer", "s\n__user__\na\n__ans__\nb", "a\n__ans__\nb\n__ans__\nc", "a\n__ans__\nb\n__user__\nc"]
)
def test_text_that_is_no_row(text):
    with pytest.raises(Rejected, match="separators"):
        GenRows("t", "s").parse(text)
    with pytest.raises(Rejected, match="separators"):
        GenRows(None, None).parse(text)


@pytest.mark.parametrize(
    "messages", [chat("s", "says __ans__", "b"), chat("s", "a", "__gen__:x"), chat("s", "a"), chat("s", "a", "b", "c")]
)
def test_rows_that_cannot_be_read_back_have_no_generation_row(messages):
    assert GenRows("t", "s").gen_row(messages) is None


def test_first_task_trains_questions_and_generation(tmp_path):
    ((rows, ctx, state),) = stages(lamol(), tmp_path, ["one"])
    assert ctx.engines.opened == []
    own = [row["messages"] for row in ctx.rows]
    assert by_channel(rows, "new/qa") == own
    teaching = by_channel(rows, "new/lm")
    assert len(rows) == 2 * len(own)
    assert teaching[0] == chat("", "__gen__:one", f"{own[0][1]['content']}\n__ans__\n{own[0][2]['content']}")
    assert state.rows["tasks"] == [{"task": "one", "rows": 20, "system": "You sort things.", "labels": None}]


def test_old_tasks_are_generated_by_the_previous_model_with_their_own_prompts(tmp_path):
    tasks = ["one", "two", "three", "four"]
    rows = {task: kind_rows(task, 83, f"system of {task}") for task in tasks}  # 0.2 x 83 = 16.6: 17 rows
    found = stages(lamol(), tmp_path, tasks, rows=rows, latest=inventive)
    mixed, ctx, state = found[3]
    newest = ctx.earlier[-1].weights_dir
    assert ctx.engines.opened == [newest], "the previous stage's weights, and nothing else"
    engine = ctx.engines.engines[newest]
    asked = {tuple(message["content"] for message in prompt.messages) for prompt in engine.prompts}
    assert asked == {("", f"__gen__:{task}") for task in tasks[:3]}
    sampling = engine.calls[0][1]
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.stop) == (1.0, 20, 1.0, ())
    pseudo = by_channel(mixed, "pseudo/qa")
    systems = [messages[0]["content"] for messages in pseudo]
    assert {name: systems.count(name) for name in systems} == {
        "system of one": 6, "system of two": 6, "system of three": 5
    }  # fmt: skip
    teaching = by_channel(mixed, "pseudo/lm")
    assert len(teaching) == 17
    assert teaching[0][1]["content"] == "__gen__:one"
    assert teaching[0][2]["content"] == f"{pseudo[0][1]['content']}\n__ans__\n{pseudo[0][2]['content']}"
    assert [meta["task"] for meta in state.rows["tasks"]] == tasks
    assert ctx.records["manifest"]["generated"] == {"one": 6, "two": 6, "three": 5}


def test_a_task_with_several_system_prompts_generates_them(tmp_path):
    one = kind_rows("one", 10, "first") + kind_rows("one", 10, "second")
    say = lambda prompt, seed: said(f"__sys__\nfirst\n__user__\nquestion {seed}\n__ans__\nanswer")  # noqa: E731
    rows = {"one": one, "two": kind_rows("two", 10)}
    found = stages(lamol(label_filter="off"), tmp_path, ["one", "two"], rows=rows, latest=say)
    assert found[0][2].rows["tasks"][0]["system"] is None
    assert by_channel(found[0][0], "new/lm")[10][2]["content"].startswith("__sys__\nsecond\n__user__\n")
    pseudo = by_channel(found[1][0], "pseudo/qa")
    assert len(pseudo) == 2
    assert pseudo[0][0] == {"role": "system", "content": "first"}
    assert pseudo[0][1]["content"].startswith("question ")


def test_one_prompt_for_all_tasks(tmp_path):
    say = lambda prompt, seed: said(f"__sys__\nany\n__user__\nquestion {seed}\n__ans__\nanswer")  # noqa: E731
    found = stages(lamol(token="shared"), tmp_path, ["one", "two", "three"], latest=say)
    mixed, ctx, _ = found[2]
    asked = {prompt.messages[1]["content"] for prompt in ctx.engines.engines[ctx.earlier[-1].weights_dir].prompts}
    assert asked == {"__gen__"}
    assert len(by_channel(mixed, "pseudo/qa")) == 4
    assert ctx.records["manifest"]["generated"] == {"all": 4}, "a mixture, not so many of each task"
    assert by_channel(mixed, "pseudo/lm")[0][2]["content"].startswith("__sys__\nany\n__user__\nquestion")


def test_answers_of_a_closed_set(tmp_path):
    rows = {"one": kind_rows("one", 20), "two": kind_rows("two", 10)}
    for i, row in enumerate(rows["one"]):
        row["messages"][2]["content"] = "no" if i % 2 else "yes"
    answers = ["yes", "maybe", "no.", "yes", "no", "yes", "no"]
    for label_filter, expected in (("auto", ["yes", "no"]), ("off", ["yes", "maybe"])):
        left = [said(f"question {i}\n__ans__\n{answer}") for i, answer in enumerate(answers)]
        found = stages(lamol(label_filter=label_filter), tmp_path / label_filter, ["one", "two"], rows=rows,
                       latest=lambda prompt, seed, left=left: left.pop(0))  # fmt: skip
        assert [messages[2]["content"] for messages in by_channel(found[1][0], "pseudo/qa")] == expected


def test_settings_reach_the_engine(tmp_path):
    """ceil(0.07 x 100) = 7 rows, where 0.07 as a float would give 8."""
    backends = []

    class Asked(KeptText):
        def engine(self, weights, backend):
            backends.append(backend)
            return super().engine(weights, backend)

    drawn = {"gen_temperature": 0.7, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.5, "max_new_tokens": 33}
    settings = {"gamma": 0.07, "gen_backend": "vllm", "gen_batch_size": 4, "gen_seed": 3, **drawn}
    rows = {"one": kind_rows("one", 20), "two": kind_rows("two", 100)}
    seeds = []
    for number, changes in enumerate(({}, {"gen_seed": -1})):
        make = lamol(**{**settings, **changes})
        found = stages(make, tmp_path / str(number), ["one", "two"], rows=rows, latest=inventive, context=Asked)
        mixed, ctx, _ = found[1]
        assert len(by_channel(mixed, "pseudo/qa")) == 7
        calls = ctx.engines.engines[ctx.earlier[0].weights_dir].calls
        (sampling,) = {sampling for _, sampling, _ in calls}
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 7, 0.9)
        assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.5, 33)
        assert [len(prompts) for prompts, _, _ in calls] == [3, 3, 3], "1.2 x 7 candidates, four at a time at most"
        seeds.append(calls[0][2])
    assert backends == ["vllm"] * 2
    assert seeds[0] != seeds[1]


def test_published_values():
    config = LamolConfig()
    assert (config.gamma, config.lambda_, config.token, config.sep_weight) == (0.2, 0.25, "task", 1.0)
    assert (config.top_k, config.gen_temperature, config.top_p, config.label_filter) == (20, 1.0, 1.0, "auto")


def test_rows_that_no_template_would_keep(tmp_path):
    """At most 10 words. Of task one a question of 3 + 8 words is too long, its generation row of 2 + 8 is not; of task
    two, without a system prompt, a question of 9 words fits and its generation row of 2 + 9 does not."""

    class Short(KeptText):
        max_words = 10

    texts = {
        "one": ["a b c d\n__ans__\ne f g h", "has <|end|>\n__ans__\nx", "has __user__\n__ans__\nx"],
        "two": ["a b c d\n__ans__\ne f g h i", "fine\n__ans__\nx"],
    }
    say = lambda prompt, seed: said(texts[prompt.messages[1]["content"][-3:]].pop(0))  # noqa: E731
    rows = {"one": kind_rows("one", 3, "three words here"), "two": kind_rows("two", 3, ""), "now": kind_rows("now", 3)}
    states = stages(lamol(gamma=1.0), tmp_path / "before", ["one", "two"], rows=rows, latest=inventive)
    ctx = Short(task="now", earlier=["one", "two"], state=states[1][2], folder=tmp_path)
    engine = FakeEngine(say)
    ctx.engines = Engines({tmp_path / "two" / "adapter": engine})
    settings = {"gamma": 1.0, "min_fill": 0.0, "max_rounds": 1, "label_filter": "off"}
    mixed = lamol(**settings)().prepare_task(ctx, rows["now"])
    assert [messages[1]["content"] for messages in by_channel(mixed, "pseudo/qa")] == ["fine"]
    dropped = [(line["source_task"], line["reason"]) for line in read_jsonl(ctx.generated_dir / "rejects.jsonl")]
    inside = "separator_or_special_token_inside"
    assert sorted(dropped) == [("one", inside), ("one", inside), ("one", "too_long"), ("two", "too_long")]


@pytest.mark.parametrize("media", [{"images": ["a.png"]}, {"content": [{"type": "text", "text": "a"}]}])
def test_a_task_with_images_is_refused(tmp_path, media):
    rows = kind_rows("one", 3)
    if "content" in media:
        rows[1]["messages"][1] |= media
    else:
        rows[1] |= media
    with pytest.raises(UserError, match="method 'lamol' generates text, but row 1 of task 'one' has"):
        stages(lamol(), tmp_path, ["one"], rows={"one": rows})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.0}, r"--lamol_gamma is 0.0, allowed: a number in \(0, 1\]"),
        ({"lambda_": 0.0}, "--lamol_lambda is 0.0, allowed: a number > 0"),
        ({"top_k": -1}, "--lamol_top_k is -1"),
        ({"sep_weight": 0.5}, "--lamol_sep_weight is 0.5, allowed: a number >= 1"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        lamol(**settings)()


def test_a_task_name_that_cannot_stand_in_a_prompt(tmp_path):
    with pytest.raises(UserError, match="--cl_task is 'a b', but method 'lamol' writes it into prompts"):
        stages(lamol(), tmp_path, ["a b"])


def test_rows_with_separators_are_left_out_and_said(tmp_path):
    rows = kind_rows("one", 20)
    rows[0]["messages"][2]["content"] = "an __ans__ inside"
    ((mixed, ctx, _),) = stages(lamol(), tmp_path, ["one"], rows={"one": rows})
    assert len(by_channel(mixed, "new/lm")) == 19
    assert len(by_channel(mixed, "new/qa")) == 20
    assert ctx.notices[0].startswith("1 of 20 rows of task 'one' have no generation row")


def test_separators_of_generation_rows_weigh_more():
    """Only there: a question row that holds such a text keeps weight 1."""
    from swift.loss_scale import get_loss_scale
    from swift.template import ContextType

    from swift_cl.training.loss_scale import register_loss_scale

    (scale,) = lamol(sep_weight=5.0)().required_flags().values()
    assert scale == "default+separator_weight_5.0"
    assert lamol()().required_flags() == {}
    assert lamol(sep_weight=2.5)().required_flags() == {"loss_scale": "default+separator_weight_2.5"}
    assert [lamol(sep_weight=weight)().weighs_tokens() for weight in (1.0, 2.5)] == [False, True]
    register_loss_scale(scale)
    kinds = [ContextType.OTHER, ContextType.RESPONSE, ContextType.SUFFIX]

    def scaled(user, answer):
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return get_loss_scale(scale)([user, answer, "<end>"], kinds, messages)

    texts, scales = scaled("__gen__:t", "__sys__\nbrief\n__user__\nA?\n__ans__\nb")
    assert texts == ["__gen__:t", "__sys__\n", "brief", "\n__user__\n", "A?", "\n__ans__\n", "b", "<end>"]
    assert scales == [0.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 1.0]
    assert scaled("A?", "x\n__ans__\nb") == (["A?", "x\n__ans__\nb", "<end>"], [0.0, 1.0, 1.0])


def logits_of(losses):
    """Two classes, label 0 with these losses."""
    return [[0.0, math.log(math.exp(loss) - 1)] for loss in losses]


def test_own_and_generated_rows_are_pooled():
    """Questions: own 1 and 2, generated 3; generation: own 1, generated 2 and 6. L = 6 / 3 + 0.5 x 9 / 3 = 3.5."""
    from types import SimpleNamespace

    import torch

    method, ctx = lamol(lambda_=0.5)(), FakeContext()
    channels = ["new/qa", "pseudo/qa", "new/lm", "pseudo/lm"]
    labels = torch.tensor([[-100, 0, 0], [-100, 0, -100], [-100, 0, -100], [-100, 0, 0]])
    losses = [[1, 2, 1], [3, 1, 1], [1, 1, 1], [2, 6, 1]]
    method.train_begin(ctx)
    ctx.channels = channels
    method.window(ctx, [{"labels": labels, "channel": channels}])
    outputs = SimpleNamespace(logits=torch.tensor([logits_of(own) for own in losses]))
    assert float(method.loss(ctx, None, {"labels": labels}, None, outputs)) == pytest.approx(3.5)


def test_the_weighted_loss():
    """L = (w_qa l_qa) + lambda (1 + 5 x 4 + 1) / 7 with token losses 1, 4, 1 of the generation row."""
    from types import SimpleNamespace

    import torch

    labels = torch.tensor([[-100, 0, 0, 0]])
    inputs = {"labels": labels, "channel": ["new/lm"], "loss_scale": torch.tensor([[0.0, 1.0, 5.0, 1.0]])}
    outputs = SimpleNamespace(logits=torch.tensor([logits_of([1, 4, 1, 1])]))
    for weight, mean in ((5.0, 22 / 7), (1.0, 2.0)):
        method, ctx = lamol(sep_weight=weight)(), FakeContext()
        method.train_begin(ctx)
        ctx.channels, ctx.token_weights = ["new/lm"], inputs["loss_scale"] if weight != 1 else None
        method.window(ctx, [inputs])
        assert float(method.loss(ctx, None, inputs, None, outputs)) == pytest.approx(0.25 * mean)


@pytest.mark.slow
def test_the_weight_reaches_a_real_training(tmp_path):
    """One step without movement: question rows are as without the weight, generation rows are not."""
    from tests.support.train import TASKS, train_stage

    found = []
    for weight in (1.0, 5.0):
        sft = train_stage(
            "lamol", TASKS[0], tmp_path / str(weight), max_steps=1, lora_dropout=0.0, lamol_sep_weight=weight
        )
        found.append(next(entry for entry in sft.trainer.state.log_history if "lamol_lm" in entry))
    assert found[0]["lamol_qa"] == pytest.approx(found[1]["lamol_qa"], rel=1e-5)
    assert abs(found[0]["lamol_lm"] - found[1]["lamol_lm"]) > 0.05

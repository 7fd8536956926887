"""ms-swift's transformers engine behind our interface, with the tiny model and a trained adapter."""

import pytest
import torch

from swift_cl.generation.engine import Prompt, Sampling
from swift_cl.stages import load_stage
from tests.support.train import TASKS, stage_argv, train_stage

pytestmark = pytest.mark.slow
QUESTIONS = ["Who won?", "小偷从贝桥博物馆拿走了什么？", "What was built in the harbour of the old town last year?"]
GREEDY, DRAWN = Sampling(0.0, 12), Sampling(1.5, 12)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A trained stage and the stage after it, loaded but not yet prepared."""
    folder = tmp_path_factory.mktemp("engine")
    train_stage("seq", TASKS[0], folder / "1", learning_rate=2e-2, save_steps=100)
    from swift_cl.training.sft import CLSft

    return load_stage(folder / "1"), CLSft(stage_argv("seq", TASKS[1], folder / "2", folder / "1"))


def prompts():
    return [Prompt.chat("", question) for question in QUESTIONS]


def test_answers_repeat_and_leave_everything_as_it_was(stage):
    first, sft = stage
    model, before = sft.model, [p.requires_grad for p in sft.model.parameters()]
    names = [name for name, _ in model.named_modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with sft._open_engine(first.weights_dir, "transformers") as engine:
        one = engine.answer(prompts(), DRAWN, [1, 2, 3])
        assert one == engine.answer(prompts(), DRAWN, [1, 2, 3])
        assert one != engine.answer(prompts(), DRAWN, [4, 2, 3])
        assert engine.identity["adapter_sha256"] == first.weights_sha256
    assert torch.equal(torch.rand(3), expected), "generation changed the random numbers of training"
    assert sft.model is model
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == before
    assert not hasattr(model, "peft_config")


def test_the_adapter_speaks_and_batches_equal_single_prompts(stage):
    first, sft = stage
    with sft._open_engine(None, "transformers") as engine:
        base = engine.answer(prompts(), GREEDY, [0, 0, 0])
        assert engine.identity["adapter_sha256"] is None
    with sft._open_engine(first.weights_dir, "transformers") as engine:
        together = engine.answer(prompts(), GREEDY, [0, 0, 0])
        alone = [engine.answer([prompt], GREEDY, [0])[0] for prompt in prompts()]
    assert together == alone
    assert together != base


def test_a_latent_steers_its_own_prompt(stage):
    """A latent of 0 changes nothing, a large one does, and a batch of several equals one by one."""
    first, sft = stage
    width = sft.model.config.hidden_size
    latents = [(0.0,) * width, tuple(0.5 * (-1.0) ** i for i in range(width)), (0.3,) * width]
    steered = [Prompt(p.messages, None, latent) for p, latent in zip(prompts(), latents, strict=True)]
    with sft._open_engine(first.weights_dir, "transformers") as engine:
        plain = engine.answer(prompts(), GREEDY, [0, 0, 0])
        together = engine.answer(steered, GREEDY, [0, 0, 0])
        alone = [engine.answer([prompt], GREEDY, [0])[0] for prompt in steered]
        assert engine.answer(prompts(), GREEDY, [0, 0, 0]) == plain
    assert together == alone
    assert [a == b for a, b in zip(plain, together, strict=True)] == [True, False, False]


def test_plain_text_is_continued_without_a_template(stage):
    _, sft = stage
    # The tiny model ends other texts at once; this one it continues with an answer of several tokens.
    text = Prompt(text=f"<|im_start|>user\n{QUESTIONS[1]}<|im_end|>\n<|im_start|>assistant\n")
    with sft._open_engine(None, "transformers") as engine:
        (answer,) = engine.answer([text], GREEDY, [0])
        ids = sft.processor.encode(text.text)
        with torch.no_grad():
            whole = sft.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
            )[0, len(ids) :]
        expected = sft.processor.decode(whole, skip_special_tokens=True)
        assert answer.text == expected
        cut = expected[1:]
        assert cut
        (stopped,) = engine.answer([text], Sampling(0.0, 12, stop=(cut,)), [0])
        (short,) = engine.answer([Prompt.chat("", QUESTIONS[1])], Sampling(0.0, 1), [0])
    assert (stopped.text, stopped.finish_reason) == (expected.partition(cut)[0], "stop")
    assert (short.finish_reason, short.tokens) == ("length", 1)


def test_a_beam_search_finds_likelier_answers(stage):
    """Against transformers' own beam search on the same prompt; greedy answers something else."""
    first, sft = stage
    (prompt,) = prompts()[2:]
    with sft._open_engine(first.weights_dir, "transformers") as engine:
        (greedy,), (beams,) = (engine.answer([prompt], Sampling(0.0, 12, beams=n), [0]) for n in (1, 4))
        text = f"<|im_start|>user\n{QUESTIONS[2]}<|im_end|>\n<|im_start|>assistant\n"
        ids = sft.processor(text, return_tensors="pt")["input_ids"]
        model = engine.engine.model
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, num_beams=4,
                                   do_sample=False)  # fmt: skip
    expected = sft.processor.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert beams.text == expected
    assert beams.text != greedy.text


def test_embeddings_do_not_depend_on_the_batch(stage):
    _, sft = stage
    with sft._open_engine(None, "transformers") as engine:
        points = engine.embed([*QUESTIONS, *QUESTIONS])
        alone = engine.embed(QUESTIONS[:1])
    assert points.shape == (6, 256)
    assert abs(points[0] - alone[0]).max() < 1e-5
    assert abs(points[0] - points[1]).max() > 1e-2

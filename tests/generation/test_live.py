"""Sampling from a live model: right probabilities, a row does not depend on its neighbours, nothing else intervenes."""

from typing import Any

import pytest
import torch

from swift_cl.generation.live import RowNoise, cut, sample
from tests.support.tiny_lora import language_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [1, 2, 3]]


def drawn(model: Any, prompts: list[list[int]], seeds: list[int], **changes: Any) -> list[list[int]]:
    settings = {"temperature": 1.0, "max_new_tokens": 8, "stop_tokens": [0], "at_once": 16, **changes}
    return sample(model, prompts, seeds, **settings)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.7), (0.5, 0.49 / 0.58)])
def test_a_noisy_maximum_is_a_draw(temperature: float, expected: float) -> None:
    """z = ln(.7, .3); at T = 0.5 the probabilities are in proportion to .49 and .09. 4000 draws, 5 deviations."""
    scores = torch.tensor([[0.7, 0.3]]).log().repeat(4000, 1)
    noisy = RowNoise(range(4000), temperature, "cpu")(torch.zeros(4000, 1), scores)
    found = float((noisy.argmax(dim=1) == 0).float().mean())
    assert found == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 4000) ** 0.5)


def test_the_same_row_draws_something_new_for_each_token() -> None:
    noise, scores = RowNoise([1], 1.0, "cpu"), torch.zeros(1, 50)
    assert not torch.equal(noise(torch.zeros(1, 1), scores), noise(torch.zeros(1, 1), scores))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, seeds = language_model(), [11, 12, 13, 14]
    together = drawn(model, PROMPTS, seeds)
    assert together == [drawn(model, [p], [seed])[0] for p, seed in zip(PROMPTS, seeds, strict=True)]
    assert together == drawn(model, PROMPTS, seeds, at_once=2)
    assert together[0] != together[3], "equal prompts with other seeds draw other answers"
    assert together == drawn(model, PROMPTS, seeds), "the process's random state plays a part"


def test_a_rank_with_fewer_batches_takes_part_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are spread over ranks, a batch that one rank leaves out would leave the others waiting."""
    model, seeds = language_model(), [11, 12, 13, 14]
    alone = drawn(model, PROMPTS, seeds, at_once=2)
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: calls.append(len(given["input_ids"])) or generate(**given))
    assert drawn(model, PROMPTS, seeds, at_once=2, rounds=4) == alone
    assert calls == [2, 2, 1, 1]


def test_an_answer_ends_with_the_first_stop_token() -> None:
    assert cut([5, 6, 0, 7, 0], [0, 9]) == [5, 6, 0]
    assert cut([5, 6, 7], [0]) == [5, 6, 7]
    model = language_model()
    free = drawn(model, PROMPTS, [1, 2, 3, 4], stop_tokens=[63])
    stop = free[1][2]
    ended = drawn(model, PROMPTS, [1, 2, 3, 4], stop_tokens=[stop])[1]
    assert ended == free[1][: free[1].index(stop) + 1]


def test_the_likeliest_tokens_and_nothing_of_the_models_own_settings() -> None:
    """A folder's generation_config would otherwise penalise repetition, which is another distribution."""
    model = language_model().train()
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    found = drawn(model, [[1, 2, 3]], [1], temperature=0.0, stop_tokens=[63])[0]
    ids = [1, 2, 3]
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids[3:]
    assert model.training

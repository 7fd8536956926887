"""Which label a logit predicts, in a decoder alone and in an encoder-decoder: the model's own loss says it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from swift_cl.methods._answers import IGNORED, predicted, predicted_tokens, unlabelled
from tests.support.tiny_t5 import tiny_t5
from tests.support.train import MODEL

IDS = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
LABELS = torch.tensor([[IGNORED, 6, 7, 1], [IGNORED, IGNORED, 1, IGNORED]])


@pytest.fixture(scope="module", params=["decoder", "encoder_decoder"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "decoder":
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    folder: Path = tiny_t5(tmp_path_factory.mktemp("t5"))
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def test_the_loss_of_the_predicted_labels_is_the_models_own(model: Any) -> None:
    inputs = {"input_ids": IDS, "attention_mask": REAL, "labels": LABELS}
    with torch.no_grad():
        own = model(**inputs).loss
        logits = model(**unlabelled(model, inputs)).logits
        found = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), predicted(model, LABELS).flatten(), ignore_index=IGNORED
        )
    assert torch.isclose(found, own, rtol=1e-5)


def test_the_tokens_that_are_counted_are_those_that_are_predicted(model: Any) -> None:
    first_counts = torch.tensor([[6, 7, 1, IGNORED]])
    shifted = not model.config.is_encoder_decoder
    assert predicted_tokens(model, first_counts[0]) == (2 if shifted else 3)
    for labels in (*LABELS, first_counts[0]):
        assert predicted_tokens(model, labels.tolist()) == (predicted(model, labels[None]) != IGNORED).sum()

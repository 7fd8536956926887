"""T5 (T5, Flan-T5, mT5) for ms-swift 4.6: how it is loaded, what its encoder and decoder are given.

The encoder reads system prompt, dialogue and question as one text, the decoder learns the last answer. ms-swift has
encoder-decoder models with pictures only; where its text path assumes a decoder alone, the classes here say otherwise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from swift.model import MODEL_MAPPING, ModelGroup, ModelLoader, ModelMeta, register_model
from swift.template import TEMPLATE_MAPPING, Template, TemplateMeta, register_template
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

NAME = "t5"
ARCHITECTURES = ["T5ForConditionalGeneration", "MT5ForConditionalGeneration"]


class T5Loader(ModelLoader):
    """Loads the encoder-decoder with its head."""

    def get_model(self, model_dir: str, config: Any, processor: Any, model_kwargs: Any) -> PreTrainedModel:
        self.auto_model_cls = AutoModelForSeq2SeqLM
        # ms-swift sets `hidden_size` of every configuration to what its lookup finds, which for T5 is None, and in T5's
        # that name stands for `d_model`.
        config.d_model = self.get_config(model_dir).d_model
        return super().get_model(model_dir, config, processor, model_kwargs)


class T5Template(Template):
    """Prompt -> encoder, answer -> decoder."""

    is_encoder_decoder = True

    def _encode(self, inputs: Any) -> dict[str, Any]:
        inputs.messages = folded(inputs.messages)
        encoded: dict[str, Any] = super()._encode(inputs)
        encoded["input_ids"], encoded["labels"] = encoded["prompt_input_ids"], encoded["answer_labels"]
        encoded["loss_scale"] = encoded["answer_loss_scale"]
        for part in ("prompt", "answer"):
            for key in ("input_ids", "labels", "loss_scale"):
                del encoded[f"{part}_{key}"]
        return encoded

    def _truncate(self, input_ids: Any, labels: Any, encoded: Any, truncation_strategy: str) -> Any:
        """Each side by itself; the last token of the encoder's stays, which ends the text."""
        limit = self.max_length
        if len(input_ids) > limit:
            kept = input_ids[: limit - 1] if truncation_strategy == "right" else input_ids[:-1][-(limit - 1) :]
            input_ids = [*kept, input_ids[-1]]
        return input_ids, None if labels is None else labels[:limit]

    def compute_sft_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, trainer: Any = None) -> Any:
        """As ms-swift's, but every label is one of the mean: T5 shifts its decoder's inputs, not the labels."""
        outputs = model(**inputs)
        if "labels" in inputs and num_items_in_batch is not None:
            outputs.loss = outputs.loss * ((inputs["labels"] != -100).sum() / num_items_in_batch)
        return outputs

    def get_generate_ids(self, generate_ids: Any, num_prompt_tokens: int) -> Any:
        """What `generate` returns has the decoder's start token in front and no prompt."""
        return generate_ids[..., 1:]


def folded(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A dialogue as one question and at most one answer: the encoder reads all that was said before that."""
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    before = messages[:-1] if answered else messages
    question = {"role": "user", "content": " ".join(str(message["content"]) for message in before)}
    return [question, *([dict(messages[-1])] if answered else [])]


def register() -> None:
    """Add T5 to ms-swift's tables; a second call changes nothing."""
    if NAME in MODEL_MAPPING:
        return
    assert NAME not in TEMPLATE_MAPPING
    register_template(
        TemplateMeta(
            NAME,
            prefix=[],
            prompt=["{{QUERY}}", ["eos_token_id"]],
            chat_sep=None,
            suffix=[["eos_token_id"]],
            # T5's tokenizers have no line break: they read one as a space.
            system_prefix=["{{SYSTEM}} "],
            template_cls=T5Template,
        )
    )
    register_model(ModelMeta(NAME, [ModelGroup([])], T5Loader, template=NAME, architectures=ARCHITECTURES))

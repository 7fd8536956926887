"""PEFT's model for prompts, made to be chained: trained further from a file, saved without a forward of live weights.

A file holds `prompt_embeddings`, which is all that serving needs and what PEFT itself reads, and, where an encoder
computes them, its tensors as `encoder.<name>`, from which training goes on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save
from torch import Tensor

from swift_cl.distributed import is_partitioned
from swift_cl.errors import RunFailure, UserError
from swift_cl.io import atomic_write
from swift_cl.tuners.base import TRAINED

WEIGHTS = "adapter_model.safetensors"
PROMPT, ENCODER = "prompt_embeddings", "encoder."
LIVE = f"prompt_encoder.{TRAINED}."


class PromptModel(PeftModelForCausalLM):
    """PEFT's model with the two changes that training in a sequence needs, and logits of the input alone."""

    @property
    def model(self) -> Any:
        """The base model, on which ms-swift looks for its own attributes; PEFT would give the backbone inside it."""
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, but the logits of the virtual tokens, which are n positions in front, are left out.

        The loss is computed before, with labels of -100 there. What compares logits with labels (accuracy,
        distillation) then finds them side by side, as with every other tuner.
        """
        outputs = super().forward(*args, **kwargs)
        config = self.active_peft_config
        if config.peft_type != PeftType.PREFIX_TUNING and not self._adapters_disabled:
            outputs.logits = outputs.logits[:, config.num_virtual_tokens :]
        return outputs

    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """With `is_trainable`, load the encoder of a file into the one that is there (a resumed run)."""
        if not is_trainable:
            return super().load_adapter(model_id, adapter_name, **kwargs)
        load_encoder(self, Path(model_id))
        return None


def wrap(model: Any, config: Any) -> PromptModel:
    """The base model with a new prompt, the only thing that is trained."""
    wrapped: Any = get_peft_model(model, config)
    wrapped.__class__ = PromptModel
    found: PromptModel = wrapped
    return found


def wrap_trained(model: Any, folder: Path) -> PromptModel:
    """The base model with the prompt of a file, to be trained further."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    started = getattr(config, "prompt_tuning_init", None)
    if started is not None:
        config.prompt_tuning_init = (
            "RANDOM"  # the start is overwritten; that from a text would need its tokenizer again
        )
    wrapped = wrap(model, config)
    if started is not None:
        config.prompt_tuning_init = started
    load_encoder(wrapped, folder)
    return wrapped


def encoder_of(model: Any) -> Any:
    """The trained encoder."""
    return model.prompt_encoder[TRAINED]


def load_encoder(model: Any, folder: Path) -> None:
    """Copy the encoder of a file into the live one.

    Raises:
        UserError: the file has no encoder, or one of another shape.
    """
    tensors = load_file(folder / WEIGHTS)
    live = dict(encoder_of(model).named_parameters())
    stored = {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    if not stored and live.keys() == {"embedding.weight"}:
        stored = {"embedding.weight": tensors[PROMPT]}
    shapes = {name: _shape(tensor) for name, tensor in live.items()}
    if {name: list(tensor.shape) for name, tensor in stored.items()} != shapes:
        raise UserError(
            f"{folder / WEIGHTS}: its encoder does not fit ({', '.join(sorted(stored)) or 'it has none'}), so it can "
            "be served but not trained further"
        )
    with torch.no_grad():
        for name, parameter in live.items():
            _copy(parameter, stored[name])


def _shape(tensor: Tensor) -> list[int]:
    return list(getattr(tensor, "ds_shape", tensor.shape))


def _copy(parameter: Tensor, value: Tensor) -> None:
    from peft.utils.integrations import gather_params_ctx

    with gather_params_ctx([parameter], modifier_rank=0):
        parameter.copy_(value)


def file_tensors(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds, out of full tensors by live name (of the live model, or gathered by the Trainer)."""
    encoder = {name.removeprefix(LIVE): tensor for name, tensor in state.items() if name.startswith(LIVE)}
    if not encoder:
        raise RunFailure(f"the tensors to save hold no {LIVE}*")
    if any(is_partitioned(tensor) for tensor in encoder.values()):
        return {ENCODER + name: tensor for name, tensor in encoder.items()} | {PROMPT: next(iter(encoder.values()))}
    encoder = {name: tensor.detach().cpu() for name, tensor in encoder.items()}
    if encoder.keys() == {"embedding.weight"}:
        return {PROMPT: encoder["embedding.weight"]}
    prompt = _computed(model.peft_config[TRAINED], encoder)
    return {PROMPT: prompt, **{ENCODER + name: tensor for name, tensor in encoder.items()}}


def _computed(config: Any, encoder: Mapping[str, Tensor]) -> Tensor:
    """The prompt that an encoder computes, on a copy of it: a forward of the live one hangs under ZeRO-3."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a resumed run must draw as an uninterrupted one
        copy = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](config).float().eval()
        copy.load_state_dict({name: tensor.float() for name, tensor in encoder.items()})
        prompt: Tensor = copy(torch.arange(config.num_virtual_tokens))
    return prompt.to(next(iter(encoder.values())).dtype).contiguous()


def save_prompt(model: Any, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    """Write weights and config of the trained prompt."""
    tensors = file_tensors(model, model.state_dict() if state is None else state)
    with atomic_write(folder / WEIGHTS) as stream:
        stream.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}))
    config = model.peft_config[TRAINED]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = training

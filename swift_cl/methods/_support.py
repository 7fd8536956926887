"""What a method supports of engines, tuners and ms-swift's features."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """What a method supports; anything else is refused before a model is loaded.

    Attributes:
        tuners: values of `--tuner_type`.
        any_tuner: whether it works with every other tuner of `swift-cl ls tuners` too (it sees data only).
        deepspeed: ZeRO stages.
        zero0_low_precision: whether ZeRO stage 0 works without fp32 weights (bf16/fp16 engine keeps no fp32 copy).
        fsdp, full_fsdp: FSDP2 (`--fsdp fsdp2`) with adapters, and in full fine-tuning.
        packing, quantized, streaming, sequence_parallel, liger: the ms-swift features of these names.
        encoder_decoder: models like T5, whose logits stand at the labels themselves, not one before them.
    """

    tuners: tuple[str, ...] = ("lora", "full")
    any_tuner: bool = False
    deepspeed: tuple[int, ...] = (0, 1, 2, 3)
    full_deepspeed: tuple[int, ...] = (0, 1, 2, 3)
    zero0_low_precision: bool = True
    fsdp: bool = True
    full_fsdp: bool = True
    packing: bool = True
    quantized: bool = True
    streaming: bool = False
    sequence_parallel: bool = True
    liger: bool = True
    encoder_decoder: bool = False

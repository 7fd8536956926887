"""The arguments of `swift-cl sft`: ms-swift's and ours in one class, checked before a model is loaded."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swift.arguments import SftArguments
from swift.loss_scale import get_loss_scale
from swift.utils import parse_args

from swift_cl import distributed
from swift_cl.errors import UserError, did_you_mean
from swift_cl.methods.base import Method, MethodConfig, flags_of
from swift_cl.methods.registry import methods
from swift_cl.stages import Stage
from swift_cl.training.checkpoints import resumable_checkpoint
from swift_cl.training.flags import COMMON_FLAGS, check_method_flags, complete_flags, first, flag_values, tuner_of
from swift_cl.training.loss_scale import register_loss_scale
from swift_cl.training.preflight import check_data, check_model, is_streaming, load_previous, start_of_stage
from swift_cl.training.trainer import TRAINERS
from swift_cl.tuners.base import Tuner
from swift_cl.tuners.registry import names, tuners

BINARY_LOSS_SCALES = ("default", "last_round", "all")
"""Values of `--loss_scale` that weigh no token; weights are applied to labels that are shifted."""


@dataclasses.dataclass
class _CommonArguments(SftArguments):
    cl_method: str | None = dataclasses.field(default=None, metadata={"help": COMMON_FLAGS["cl_method"]})
    cl_task: str | None = dataclasses.field(default=None, metadata={"help": COMMON_FLAGS["cl_task"]})
    cl_previous: str | None = dataclasses.field(default=None, metadata={"help": COMMON_FLAGS["cl_previous"]})
    resume_from_checkpoint: str | None = None
    cl_resume: bool = dataclasses.field(default=False, metadata={"help": COMMON_FLAGS["cl_resume"]})
    cl_portable: bool | None = dataclasses.field(default=None, metadata={"help": COMMON_FLAGS["cl_portable"]})

    def __post_init__(self) -> None:
        if self.cl_resume and self.resume_from_checkpoint is None and self.output_dir:
            if self.add_version:
                raise UserError("--cl_resume true needs --add_version false: a new folder has nothing to resume from")
            found = resumable_checkpoint(Path(self.output_dir))
            if found is not None:
                self.resume_from_checkpoint = str(found)
        super().__post_init__()


def arguments_class() -> type[Any]:
    """ms-swift's SftArguments plus our flags; one field a flag, made from config dataclasses."""
    fields = []
    for flags in (*map(flags_of, methods().values()), *(tuner.flags() for tuner in tuners().values())):
        for flag, field in flags:
            fields.append((flag, field.type, dataclasses.field(default=field.default, metadata=dict(field.metadata))))
    return dataclasses.make_dataclass("CLSftArguments", fields, bases=(_CommonArguments,))


def method_config(args: Any, method: type[Method]) -> MethodConfig:
    """The method's config out of parsed arguments."""
    return method.config_class(**{field.name: getattr(args, flag) for flag, field in flags_of(method)})


def check_known_flags(given: Iterable[str]) -> None:
    """Refuse the name of a flag that neither ms-swift nor we have.

    Raises:
        UserError: names the first one, and what may have been meant.
    """
    known = [field.name for field in dataclasses.fields(arguments_class()) if field.init]
    for name in given:
        if name not in (*known, "help"):
            raise UserError(f"--{name} is unknown{did_you_mean(name, known)}")


def parse_stage_arguments(argv: list[str]) -> tuple[Any, Stage | None]:
    """Check and parse the flags of one stage.

    Returns:
        The arguments, started from the previous stage's weights, and that stage.

    Raises:
        UserError: anything that is wrong with flags, data files, the model or the previous stage.
    """
    method = check_method_flags(argv)
    argv = complete_flags(argv)
    given = flag_values(argv)
    for model in given.get("model", []):
        check_model(model)
    previous = None
    if method is not None:
        check_data(given.get("dataset", []), is_streaming(given))
        previous = load_previous(first(given, "cl_previous"))
        register_loss_scale(first(given, "loss_scale") or "")
        adapter, start_model = start_of_stage(given, previous, method)
        if adapter is not None and "adapters" not in given:
            argv += ["--adapters", adapter]
        if start_model is not None:
            argv += ["--model", start_model]
    check_known_flags(given)
    args, remaining = parse_args(arguments_class(), argv)
    if remaining:
        raise UserError(f"not understood: {' '.join(remaining)}")
    if method is not None:
        check_support(args, method(method_config(args, method)))
    tuner = tuner_of(given)
    if tuner is not None:
        check_tuner_support(args, tuner)
    if method is not None and is_encoder_decoder(args):
        check_encoder_decoder(args, method(method_config(args, method)), tuner)
    return args, previous


def is_encoder_decoder(args: Any) -> bool:
    """Whether the model answers with a decoder of its own, as its template says."""
    from swift.template import TEMPLATE_MAPPING

    return bool(args.template in TEMPLATE_MAPPING and TEMPLATE_MAPPING[args.template].template_cls.is_encoder_decoder)


def check_encoder_decoder(args: Any, method: Method, tuner: type[Tuner] | None) -> None:
    """Refuse what assumes that question and answer are one sequence, before a model is loaded."""
    model = f"an encoder-decoder model (--template {args.template})"
    if not method.supports().encoder_decoder:
        able = ", ".join(name for name, other in methods().items() if other.support.encoder_decoder)
        raise UserError(f"--cl_method {method.name} does not work with {model}, allowed: {able}")
    if tuner is not None and not tuner.support.encoder_decoder:
        raise UserError(f"--tuner_type {tuner.name} does not work with {model}; use lora or full")
    refused = {
        "packing": args.packing,
        "padding_free": args.padding_free,
        "sequence_parallel_size": args.sequence_parallel_size > 1,
        "use_liger_kernel": args.use_liger_kernel,
        "label_smoothing_factor": args.label_smoothing_factor,
        "enable_dft_loss": args.enable_dft_loss,
        "enable_channel_loss": args.enable_channel_loss,
        "loss_type": args.loss_type,
        "loss_scale": args.loss_scale not in BINARY_LOSS_SCALES,
        "truncation_strategy": args.truncation_strategy == "split",
    }
    for flag, wrong in refused.items():
        if wrong:
            raise UserError(f"--{flag} {getattr(args, flag)} does not work with {model}")
    if args.task_type != "causal_lm":
        raise UserError(f"--task_type {args.task_type} does not work with {model}, allowed: causal_lm")


def zero_stage(args: Any) -> int | None:
    """The ZeRO stage of `--deepspeed`, or None without DeepSpeed."""
    if not args.deepspeed:
        return None
    return int(args.deepspeed.get("zero_optimization", {}).get("stage", 0))


def check_support(args: Any, method: Method) -> None:
    """Refuse what the method does not support, before a model is loaded."""
    support, name = method.supports(), method.name
    allowed_tuners = [*support.tuners, *(other for other in names() if support.any_tuner)]
    if args.tuner_type not in allowed_tuners:
        raise UserError(
            f"--tuner_type {args.tuner_type} does not work with method '{name}', allowed: "
            f"{', '.join(dict.fromkeys(allowed_tuners))}"
        )
    stage = zero_stage(args)
    allowed = support.full_deepspeed if args.tuner_type == "full" else support.deepspeed
    if stage is not None and stage not in allowed:
        raise UserError(
            f"--deepspeed with ZeRO stage {stage} does not work with method '{name}', allowed: "
            f"{', '.join(map(str, allowed)) or 'none'} (or no DeepSpeed)"
        )
    if stage == 0 and not support.zero0_low_precision and (args.bf16 or args.fp16):
        raise UserError(
            f"--deepspeed zero0 keeps no fp32 weights in bf16 or fp16, which method '{name}' needs; "
            "use zero1, or no DeepSpeed"
        )
    if args.fsdp:
        full = args.tuner_type == "full"
        if not (support.full_fsdp if full else support.fsdp):
            raise UserError(_no_fsdp(f"method '{name}'" + " in full fine-tuning" * full, allowed))
        check_fsdp(args)
    refused = {
        "packing": args.packing and not support.packing,
        "quant_bits": bool(args.quant_bits) and not support.quantized,
        "streaming": args.streaming and not support.streaming,
        "sequence_parallel_size": args.sequence_parallel_size > 1 and not support.sequence_parallel,
        "use_liger_kernel": args.use_liger_kernel and not support.liger,
        "lazy_tokenize": args.lazy_tokenize and args.streaming and method.needs_rows,
    }
    for flag, wrong in refused.items():
        if wrong:
            raise UserError(f"--{flag} does not work with method '{name}'")
    if method.replaces_loss and not method.weighs_tokens() and not get_loss_scale(args.loss_scale).is_binary_loss_scale:
        raise UserError(
            f"--loss_scale {args.loss_scale} does not work with method '{name}': it weighs tokens, and the loss of the "
            "method does not"
        )
    if args.task_type not in TRAINERS:
        raise UserError(f"--task_type {args.task_type} does not work with --cl_method, allowed: {', '.join(TRAINERS)}")
    if args.cached_dataset:
        raise UserError("--cached_dataset does not work with --cl_method: its rows are not readable; use --dataset")


def _no_fsdp(what: str, stages: Sequence[int]) -> str:
    zero = f"--deepspeed zero{stages[-1]} or " if stages else ""
    return f"--fsdp does not work with {what}; use {zero}DDP (neither flag)"


def check_fsdp(args: Any) -> None:
    """Refuse a form of FSDP that nothing here trains with."""
    version = args.training_args.fsdp_plugin_args["fsdp_version"]
    if version != 2:
        raise UserError(f"--fsdp: fsdp_version is {version}, allowed: 2 (`--fsdp fsdp2`)")
    if distributed.launched_processes() < 2:
        raise UserError("--fsdp needs several processes, found 1: set NPROC_PER_NODE, or leave it out")


def check_tuner_support(args: Any, tuner: type[Tuner]) -> None:
    """Refuse what the tuner does not support, before a model is loaded."""
    support, stage = tuner.support, zero_stage(args)
    if stage is not None and stage not in support.deepspeed:
        raise UserError(
            f"--deepspeed with ZeRO stage {stage} does not work with --tuner_type {tuner.name}, allowed: "
            f"{', '.join(map(str, support.deepspeed)) or 'none'} (or no DeepSpeed)"
        )
    if args.fsdp and not support.fsdp:
        raise UserError(_no_fsdp(f"--tuner_type {tuner.name}", support.deepspeed))
    refused = {
        "packing": args.packing and not support.packing,
        "padding_free": args.padding_free and not support.packing,
        "quant_bits": bool(args.quant_bits) and not support.quantized,
        "sequence_parallel_size": args.sequence_parallel_size > 1 and not support.sequence_parallel,
    }
    for flag, wrong in refused.items():
        if wrong:
            raise UserError(f"--{flag} does not work with --tuner_type {tuner.name}")
    if args.model_meta.is_multimodal and not support.multimodal:
        raise UserError(f"--model {args.model}: a multimodal model does not work with --tuner_type {tuner.name}")

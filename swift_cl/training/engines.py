"""Engines for generation before training: the base model, alone or with an earlier stage's weights.

The transformers engine borrows the base model that the stage has loaded anyway, and gives it back as it was. Where that
is another model (full fine-tuning), not whole in this process (ZeRO-3) or not on its device (FSDP2), a second one is
loaded and freed.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from swift_cl import distributed
from swift_cl.errors import UserError
from swift_cl.generation.engine import Engine
from swift_cl.io import sha256_file
from swift_cl.stages import WEIGHTS

SHARED_BACKENDS = ("transformers",)
"""Backends that every process has an engine of; vLLM makes batches of its own, so rank 0 alone has one."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of max_lora_rank that vLLM takes."""


@contextlib.contextmanager
def open_engine(
    args: Any, loaded: Any, processor: Any, base: str, weights: Path | None, backend: str
) -> Iterator[Engine]:
    """An engine in this process.

    Args:
        args: ms-swift's arguments of the stage.
        loaded, processor: what the stage has loaded from `args.model`.
        base: folder or hub id of the untouched base model.
        weights: an earlier stage's adapter or full model, None for the base model itself.
        backend: `transformers` or `vllm`.
    """
    adapter = weights if weights is not None and (weights / "adapter_config.json").is_file() else None
    model = base if weights is None or adapter is not None else str(weights)
    identity = {
        "base": _content(Path(model)),
        "adapter_sha256": sha256_file(adapter / WEIGHTS) if adapter else None,
        "engine": backend,
        "engine_version": importlib.metadata.version("ms-swift"),
    }
    if backend == "vllm":
        opened = _vllm(args, processor, model, adapter, identity)
    else:
        opened = _transformers(args, loaded, processor, model, adapter, identity)
    with opened as engine:
        yield engine


def _content(model: Path) -> Any:
    """What tells one base model from another without reading gigabytes: its config and the sizes of its weights."""
    if not model.is_dir():
        return str(model)
    sizes = {path.name: path.stat().st_size for path in sorted(model.glob("*.safetensors"))}
    return {"name": model.name, "config_sha256": sha256_file(model / "config.json"), "weights": sizes}


def _templates(args: Any, processor: Any) -> tuple[Any, Any]:
    """(training's template, the same without a chat template): copies of our own, because an engine sets their mode."""
    from swift.template import get_template

    settings = args.get_template_kwargs()
    settings["template_type"] = args.template
    # A system prompt is given with every request; lengths are the engine's business.
    settings.update(max_length=None, truncation_strategy="raise", padding_free=False, sequence_parallel_size=1)
    plain = {**settings, "use_chat_template": False, "default_system": None}
    return get_template(processor, **settings), get_template(processor, **plain)


@contextlib.contextmanager
def _transformers(
    args: Any, loaded: Any, processor: Any, model: str, adapter: Path | None, identity: Any
) -> Iterator[Engine]:
    from peft import PeftModel
    from swift.infer_engine import TransformersEngine as SwiftTransformers
    from swift.utils import disable_deepspeed_zero3

    from swift_cl.generation.swift_engine import TransformersEngine

    whole = not any(map(distributed.is_partitioned, loaded.parameters()))
    # For FSDP2 a model is loaded on the CPU, where generation would take very long.
    placed = next(loaded.parameters()).device.type == args.training_args.device.type
    own = whole and placed and Path(args.model).resolve() == Path(model).resolve()
    module = loaded if own else _load(args, model)
    trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    training, served = module.training, module
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if adapter is not None:
            served = PeftModel.from_pretrained(module, str(adapter))
    try:
        chat, plain = _templates(args, processor)
        # With ZeRO-3 in force transformers would let every step of the generation wait for ranks that generate nothing.
        with contextlib.nullcontext() if whole else disable_deepspeed_zero3():
            yield TransformersEngine(SwiftTransformers(served, template=chat, max_batch_size=0), chat, plain, identity)
    finally:
        if adapter is not None:
            served.unload()
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        module.train(training)
        del served, module
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load(args: Any, model: str) -> Any:
    """Another model, whole in this process, on the device of training."""
    from swift.utils import disable_deepspeed_zero3

    with disable_deepspeed_zero3(), distributed.loaded_whole():
        return args.get_model_processor(model=model)[0]


@contextlib.contextmanager
def _vllm(args: Any, processor: Any, model: str, adapter: Path | None, identity: Any) -> Iterator[Engine]:
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "generation with vLLM needs the library vllm, which is not installed: use the transformers "
            "backend, or pip install 'swift_cl[vllm]'"
        )
    import vllm
    from swift.infer_engine import VllmEngine as SwiftVllm

    from swift_cl.generation.swift_engine import VllmEngine
    from swift_cl.io import read_json

    chat, plain = _templates(args, processor)
    rank = read_json(adapter / "adapter_config.json")["r"] if adapter else VLLM_RANKS[0]
    if rank > VLLM_RANKS[-1]:
        raise UserError(f"{adapter}: rank {rank} is above vLLM's limit {VLLM_RANKS[-1]}; use the transformers backend")
    engine = SwiftVllm(
        model,
        template=chat,
        torch_dtype=args.torch_dtype,
        adapters=[str(adapter)] if adapter else None,
        max_lora_rank=next(allowed for allowed in VLLM_RANKS if allowed >= rank),
        max_model_len=args.max_model_len or args.max_length,
        gpu_memory_utilization=_free_share(),
        enforce_eager=True,
    )
    try:
        yield VllmEngine(engine, chat, plain, {**identity, "vllm": vllm.__version__})
    finally:
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _free_share() -> float:
    """What vLLM may take: nine tenths of what the training's model leaves free."""
    if not torch.cuda.is_available():
        return 0.9
    free, total = torch.cuda.mem_get_info()
    return 0.9 * free / total

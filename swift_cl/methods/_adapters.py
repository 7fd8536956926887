"""Extra PEFT adapters: load a frozen one beside the trained one, and switch between them for one forward.

PEFT's own calls do more than that: `add_adapter` and `set_adapter` change `requires_grad` of the other adapters (PEFT
issue 3580), which would silently freeze what is trained or train what is history.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.distributed import plain_name
from swift_cl.errors import RunFailure, UserError
from swift_cl.io import atomic_write, sha256_file, write_json
from swift_cl.lazy import LazyModule
from swift_cl.methods._draws import Key, seed32
from swift_cl.methods._routing import Candidate
from swift_cl.methods._state import check_shapes, shapes_of

if TYPE_CHECKING:
    import torch

    from swift_cl.methods.base import TaskContext
else:
    torch = LazyModule("torch")

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
TRAINED = "default"
SERVED = "served"
"""Folder of the adapters that a stage writes anew for its earlier tasks, below its state."""


def is_peft(model: Any) -> bool:
    """Whether the model carries PEFT adapters (otherwise it is fine-tuned in full)."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_lora_a(name: str) -> bool:
    """Whether a parameter is a matrix A of LoRA on a linear layer."""
    return ".lora_A." in name


def lora_twin(name: str) -> str:
    """The name of the B that belongs to an A."""
    return name.replace(".lora_A.", ".lora_B.")


def check_plain_lora(method: str, names: Iterable[str]) -> None:
    """Refuse to go on where something else than A and B of LoRA on linear layers is trained."""
    other = [name for name in names if not is_lora_a(name) and ".lora_B." not in name]
    if other:
        raise UserError(
            f"method '{method}' works on the matrices A and B of LoRA on linear layers, but these are trained too: "
            f"{', '.join(other[:3])}; leave out biases, DoRA, modules_to_save and embeddings"
        )


def stored_adapter(folder: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a finished stage's adapter, by the names of `TaskContext.parameters`."""
    from safetensors.torch import load_file

    return {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(folder / ADAPTER_FILE).items()}


def write_adapter(folder: Path, tensors: "Mapping[str, torch.Tensor]", config: Mapping[str, Any]) -> None:
    """Write an adapter that PEFT can load, its configuration first.

    Args:
        tensors: by the names of `TaskContext.parameters`.
        config: the content of adapter_config.json.
    """
    from safetensors.torch import save

    write_json(folder / CONFIG_FILE, dict(config))
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(folder / ADAPTER_FILE) as stream:
        stream.write(save(named, {"format": "pt"}))


def rewritten_candidates(ctx: "TaskContext") -> list[Candidate]:
    """A candidate a task: what this stage wrote anew for the earlier ones, and the adapter that it keeps."""
    served = ctx.this_stage.state_dir / SERVED
    old = [Candidate(stage.task, (stage.task,), served / stage.task) for stage in ctx.earlier]
    return [*old, Candidate(ctx.task, (ctx.task,), ctx.this_stage.weights_dir)]


def redraw(model: Any, *key: Key) -> None:
    """Give the trained LoRA another random start, a function of the key.

    Every stage of a run has the same seed, so without this each would begin with the same A: what is to become
    orthogonal to an earlier A would begin on top of it.
    """
    from peft.tuners.lora import LoraLayer

    init = model.peft_config[TRAINED].init_lora_weights
    if init is not True and init != "gaussian":
        return  # one that is no draw, but computed from the weights
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed32(*key))
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(TRAINED, init)


def start_from(method: str, ctx: "TaskContext", folder: Path) -> None:
    """Begin with the weights of an earlier stage, in place of those that were loaded.

    Raises:
        UserError: they have other names or shapes.
    """
    stored = stored_adapter(folder)
    check_shapes(method, shapes_of(stored), shapes_of(ctx.parameters))
    with torch.no_grad():
        for name, tensor in stored.items():
            ctx.parameters[name].copy_(tensor)


def activate(model: Any, *names: str) -> None:
    """Let every forward from now on sum up these adapters; trained and frozen stay what they were."""
    for layer in AdapterSwitch(model).layers:
        layer._active_adapter = list(names)


def frozen_parameters(model: Any, adapter: str) -> dict[str, Any]:
    """The parameters of an extra adapter by the names of their trained twins."""
    mark = f".{adapter}."
    return {
        plain_name(name).removeprefix("base_model.model.").replace(mark, "."): parameter
        for name, parameter in model.named_parameters()
        if mark in name
    }


class AdapterSwitch:
    """Makes other adapters active for one forward; trained and frozen stay what they were.

    Leave the block before backward: a checkpointed forward is recomputed with whatever is active then.
    """

    def __init__(self, model: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self.layers = [module for module in model.modules() if isinstance(module, wrappers)]

    @contextmanager
    def active(self, *names: str) -> Iterator[None]:
        """Forward with these adapters; with none of them it is the untouched base model."""
        before = [layer._active_adapter for layer in self.layers]
        try:
            for layer in self.layers:
                layer._active_adapter = list(names)
            yield
        finally:
            for layer, adapter in zip(self.layers, before, strict=True):
                layer._active_adapter = adapter


def load_frozen_adapter(model: Any, folder: Path, name: str) -> str:
    """Add the adapter of `folder` as `name`: not active, not trained, without dropout, in the trained adapter's dtype.

    Returns:
        The sha256 of the adapter's file.

    Raises:
        UserError: the folder holds no adapter that can be frozen beside the trained one.
        RunFailure: the model does not hold what the file holds after loading.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise UserError(f"{path}: file not found; the adapter of the earlier task is needed again")
    config = PeftConfig.from_pretrained(str(folder))
    if getattr(config, "bias", "none") != "none":
        raise UserError(f"{folder}: the adapter was trained with bias {config.bias!r}, allowed: none (shared biases)")
    config.inference_mode = True
    config.lora_dropout = 0.0
    config.init_lora_weights = False  # pissa and its kin would change the base weights a second time

    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):  # PEFT draws initial values that are overwritten below
        model.add_adapter(name, config)
    parameters = dict(model.named_parameters())
    for full_name, parameter in parameters.items():
        parts = full_name.split(".")
        if name in parts:
            twin = parameters.get(".".join(TRAINED if part == name else part for part in parts))
            if twin is not None:
                parameter.data = parameter.data.to(twin.dtype)
        parameter.requires_grad_(trained.get(parameter, False))

    stored = load_file(path)
    set_peft_model_state_dict(model, dict(stored), adapter_name=name)
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    different = sorted(
        key
        for key in loaded.keys() | {key for key in stored if "lora_" in key}
        if key not in stored
        or key not in loaded
        or stored[key].shape != loaded[key].shape
        or not torch.equal(stored[key].to(loaded[key].dtype), loaded[key].detach().cpu())
    )
    if different:
        raise RunFailure(f"{path}: {len(different)} tensors were not loaded as adapter '{name}': {different[:5]}")
    return sha256_file(path)

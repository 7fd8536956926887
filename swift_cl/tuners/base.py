"""The tuner contract: what a value of `--tuner_type` that ms-swift lacks (or that we replace) does, and when.

A tuner is one class with one config dataclass, in one file or folder here. Its description (name, flags, refusals) is
read without torch; everything that needs torch is imported inside the hooks. They run in this order:

    check_flags(given)               before anything is loaded: refuse flags of ms-swift that do not work with it
    register()                       in every process that trains or serves: teach PEFT a type that it does not know
    prepare_model(args, model)       first task: wrap the base model
    load(model, folder)              later tasks, and a resumed one: wrap the base model and load the adapter to train
    configure(config, model)         both: settings that a file does not hold
    save(model, folder, state)       every checkpoint, and the stage's end
    live_tensors(model)              what `save` would write, by the names in the file: a stage's start is compared
    base_of(model)                   the base model without the tuner, for the next stage of the same process
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.settings import Flags, Settings, flags_of_settings

if TYPE_CHECKING:
    from torch import Tensor

TRAINED = "default"
"""The name of the trained adapter, PEFT's own."""


@dataclass
class TunerSettings(Settings):
    """Base of the tuners' config dataclasses; see `Settings`."""


@dataclass(frozen=True)
class TunerSupport:
    """What a tuner supports; anything else is refused before a model is loaded.

    Attributes:
        deepspeed: ZeRO stages.
        fsdp: FSDP2.
        packing: `--packing` and `--padding_free`.
        quantized, sequence_parallel, multimodal: the ms-swift features of these names.
        encoder_decoder: models like T5.
    """

    deepspeed: tuple[int, ...] = (0, 1, 2, 3)
    fsdp: bool = True
    packing: bool = True
    quantized: bool = True
    sequence_parallel: bool = True
    multimodal: bool = True
    encoder_decoder: bool = False


class Tuner:
    """Base of all tuners; the hooks as they are here fit an adapter that PEFT injects, saves and loads.

    Class attributes:
        name: the value of `--tuner_type`.
        title, paper: for listings and pages.
        prefix: of its flags: field `x` of the config is `--<prefix>_x`.
        config_class: its config dataclass.
        peft_type: what `adapter_config.json` says; no other tuner may load such an adapter.
        own_type: whether PEFT does not know that type, so that a server must import swift_cl to load it.
        swift_flags: flags of ms-swift's that begin with that prefix.
        support: what it supports.
        has_buffers: whether there are buffers among its weights.
        fixed: flag -> key of `adapter_config.json`: what a later task may not change.
        zero_means: flag of `fixed` -> key of `adapter_config.json` whose value a 0 stands for.
        required: flag -> value of ms-swift's that it needs: set where it is not given, refused where it differs.
        defaults: flag -> value that replaces ms-swift's default where nothing is given.
        no_lora: why none of its adapters is a plain LoRA, for those that do not override `as_lora`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    prefix: ClassVar[str]
    config_class: ClassVar[type[TunerSettings]] = TunerSettings
    peft_type: ClassVar[str]
    own_type: ClassVar[bool] = False
    swift_flags: ClassVar[tuple[str, ...]] = ()
    support: ClassVar[TunerSupport] = TunerSupport()
    has_buffers: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, str]] = {}
    zero_means: ClassVar[Mapping[str, str]] = {}
    required: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Mapping[str, str]] = {}
    no_lora: ClassVar[str] = "what it adds to a layer is no product of two matrices"

    @classmethod
    def flags(cls) -> Flags:
        """(flag name without dashes, config field)."""
        return flags_of_settings(cls.prefix, cls.config_class)

    @classmethod
    def check_flags(cls, config: Any, given: Mapping[str, list[str]]) -> None:
        """Refuse what does not fit together: `config` is validated already, `given` are all flags that were given."""

    @classmethod
    def register(cls) -> None:
        """Make PEFT know the type; called again and again, so it must not mind."""

    @classmethod
    def prepare_model(cls, args: Any, config: Any, model: Any) -> Any:
        """The base model with a new adapter, the one that is trained."""
        raise NotImplementedError

    @classmethod
    def configure(cls, config: Any, model: Any) -> None:
        """Apply settings that a file does not hold to a model that was just made or loaded for training."""

    @classmethod
    def load(cls, model: Any, folder: Path, trainable: bool) -> Any:
        """The base model with the adapter of a folder."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)

    @classmethod
    def save(cls, model: Any, folder: Path, state: "Mapping[str, Tensor] | None") -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`.

        Args:
            state: full tensors by live name (under ZeRO-3 the live ones are empty); None where they are live.
        """
        model.save_pretrained(str(folder), selected_adapters=[TRAINED], state_dict=state)

    @classmethod
    def live_tensors(cls, model: Any) -> "dict[str, Tensor]":
        """The live tensors of the trained adapter by the names that they have in the file."""
        from peft import get_peft_model_state_dict

        tensors: dict[str, Tensor] = get_peft_model_state_dict(
            model, state_dict=model.state_dict(keep_vars=True), save_embedding_layers=False
        )
        return tensors

    @classmethod
    def as_lora(cls, tensors: "Mapping[str, Tensor]", config: Mapping[str, Any]) -> "dict[str, LoraPair]":
        """What an adapter adds, as y += scale B A x, by the name of the layer; exactly, or not at all.

        Args:
            tensors: of the file, by the names in it.
            config: the content of adapter_config.json.

        Raises:
            UserError: no LoRA computes the same; the message says why.
        """
        raise UserError(f"--tuner_type {cls.name} has no plain LoRA: {cls.no_lora}")

    @classmethod
    def base_of(cls, model: Any) -> Any:
        """The base model as it was before `prepare_model` or `load`."""
        return model.unload()


@dataclass(frozen=True)
class LoraPair:
    """One layer of a LoRA: y += scale B A x.

    Attributes:
        a: [rank, in]; b: [out, rank]; scale: what PEFT computes as lora_alpha / rank.
    """

    a: "Tensor"
    b: "Tensor"
    scale: float


PLAIN_LORA_ONLY: dict[str, tuple[str, ...]] = {
    "use_dora": ("false",),
    "use_rslora": ("false",),
    "use_swift_lora": ("false",),
    "lora_bias": ("none",),
    "init_weights": ("true",),
    "tuner_backend": ("peft",),
    "modules_to_save": (),
    "lorap_lr_ratio": (),
}
"""What `refuse` allows of ms-swift's LoRA flags where a tuner has no variant of LoRA."""


def refuse(given: Mapping[str, list[str]], tuner: type[Tuner], flags: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse flags of ms-swift given with another value than those that change nothing.

    Args:
        flags: flag -> values that are allowed.
    """
    for flag, allowed in flags.items():
        values = given.get(flag)
        if values and values[0].lower() not in allowed:
            raise UserError(
                f"--{flag} {' '.join(values)} does not work with --tuner_type {tuner.name}"
                + (f", allowed: {', '.join(allowed)}" if allowed else "")
            )

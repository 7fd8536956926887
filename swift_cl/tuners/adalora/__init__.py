"""adalora: LoRA as singular triplets, whose number is shared out among the layers while training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.settings import setting
from swift_cl.tuners.base import PLAIN_LORA_ONLY, TRAINED, LoraPair, Tuner, TunerSettings, refuse

if TYPE_CHECKING:
    from torch import Tensor

INIT_R, TARGET_R = 12, 8
"""ms-swift's `--adalora_init_r` and `--adalora_target_r`."""


@dataclass
class AdaLoRASettings(TunerSettings):
    """Flags of `adalora`; ranks, betas, interval and regularisation are ms-swift's `--adalora_*`."""

    warmup_share: float = setting(0.1, "Share of a stage's steps before the first triplet is taken away, in [0, 1).")
    final_share: float = setting(0.3, "Share of a stage's steps, at its end, with the final triplets, in (0, 1).")

    def validate(self) -> None:
        if not 0 <= self.warmup_share < 1:
            self.fail("adalora", "warmup_share", "a number from 0 to below 1")
        if not 0 < self.final_share < 1 - self.warmup_share:
            self.fail("adalora", "final_share", "a number above 0 and below 1 - --adalora_warmup_share")


class AdaLoRA(Tuner):
    """W x + alpha / (init_r + 1e-5) B (E o A x); the least important triplets get E = 0."""

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "Adaptive budget (AdaLoRA)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.10512"
    prefix: ClassVar[str] = "adalora"
    config_class: ClassVar[type[TunerSettings]] = AdaLoRASettings
    peft_type: ClassVar[str] = "ADALORA"
    swift_flags: ClassVar[tuple[str, ...]] = (
        "adalora_init_r", "adalora_target_r", "adalora_beta1", "adalora_beta2", "adalora_deltaT",
        "adalora_orth_reg_weight", "adalora_tinit", "adalora_tfinal",
    )  # fmt: skip
    fixed: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "lora_alpha",
        "adalora_init_r": "init_r",
        "adalora_target_r": "target_r",
        "adalora_beta1": "beta1",
        "adalora_beta2": "beta2",
        "adalora_deltaT": "deltaT",
        "adalora_orth_reg_weight": "orth_reg_weight",
    }

    @classmethod
    def check_flags(cls, config: Any, given: Mapping[str, list[str]]) -> None:
        refuse(given, cls, PLAIN_LORA_ONLY)
        for flag, ours in (("adalora_tinit", "warmup_share"), ("adalora_tfinal", "final_share")):
            if flag in given:
                raise UserError(f"--{flag} counts steps, which differ from task to task; pass --adalora_{ours}")
        ranks = [
            given.get(f"adalora_{name}", [str(value)])[0]
            for name, value in (("init_r", INIT_R), ("target_r", TARGET_R))
        ]
        if all(text.isdigit() for text in ranks) and not int(ranks[0]) > int(ranks[1]) >= 1:
            raise UserError(
                f"--adalora_init_r is {ranks[0]}, allowed: a whole number above --adalora_target_r ({ranks[1]})"
            )

    @classmethod
    def register(cls) -> None:
        from swift.callbacks import callbacks_map

        from swift_cl.tuners.adalora.allocation import Allocation

        callbacks_map["adalora"] = Allocation  # ms-swift adds the callback of that name to every adalora training

    @classmethod
    def prepare_model(cls, args: Any, config: Any, model: Any) -> Any:
        from peft import AdaLoraConfig, get_peft_model
        from swift.pipelines.train.tuner import get_target_modules

        from swift_cl.tuners.adalora.allocation import UNKNOWN_STEPS

        return get_peft_model(
            model,
            AdaLoraConfig(
                task_type=args.task_type.upper(),
                target_modules=get_target_modules(args, model),
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_r=args.adalora_init_r,
                target_r=args.adalora_target_r,
                deltaT=args.adalora_deltaT,
                beta1=args.adalora_beta1,
                beta2=args.adalora_beta2,
                orth_reg_weight=args.adalora_orth_reg_weight,
                total_step=UNKNOWN_STEPS,
            ),
        )

    @classmethod
    def configure(cls, config: Any, model: Any) -> None:
        from swift_cl.distributed import gather_together

        model.peft_config[TRAINED].cl_shares = (config.warmup_share, config.final_share)
        # A layer reads its matrices itself, not through modules of their own that an engine could gather them for.
        gather_together(model, {type(module) for module in model.modules() if hasattr(module, "lora_E")})

    @classmethod
    def save(cls, model: Any, folder: Path, state: "Mapping[str, Tensor] | None") -> None:
        from swift_cl.tuners.adalora.allocation import save_importance, whole

        save_importance(model, folder)
        with whole(model):
            super().save(model, folder, state)

    @classmethod
    def as_lora(cls, tensors: "Mapping[str, Tensor]", config: Mapping[str, Any]) -> "dict[str, LoraPair]":
        """A' = E o A without the triplets that are off, scaled as PEFT scales: by alpha / (init_r + 1e-5)."""
        pairs = {}
        for name, e in tensors.items():
            layer, is_e, _ = name.partition(".lora_E")
            if not is_e:
                continue
            a, b = tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"]
            if len(a) != config["init_r"]:
                raise UserError(
                    f"{layer} has {len(a)} triplets, not init_r ({config['init_r']}): not a file of swift_cl"
                )
            kept = e[:, 0] != 0
            alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"]
            scale = alpha / (config["init_r"] + 1e-5)
            pairs[layer] = LoraPair((a.float() * e.float())[kept], b.float()[:, kept], scale)
        return pairs

    @classmethod
    def live_tensors(cls, model: Any) -> "dict[str, Tensor]":
        from swift_cl.tuners.adalora.allocation import whole

        with whole(model):
            return super().live_tensors(model)

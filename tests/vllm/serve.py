"""Continue prompts under vLLM and write the tokens as JSON: a process of its own for each engine.

python -m tests.vllm.serve DIRECTORY FILE '{"tensor_parallel_size": 2}'
"""

import json
import sys
from pathlib import Path

PROMPTS = ("The capital of France is", "Once upon a time", "def add(a, b):", "Water boils at", "Dear Sir,")
LENGTH = 24


def main() -> None:
    from vllm import LLM, SamplingParams

    directory, file, options = sys.argv[1:]
    usual = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": len(PROMPTS), "enforce_eager": True}
    engine = LLM(directory, **usual | json.loads(options))
    found = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True))
    Path(file).write_text(json.dumps([list(each.outputs[0].token_ids) for each in found]), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A process that holds one model in vLLM and times what it is asked for.

``python -m torchao_int4cpu.bench.vllm_worker DIRECTORY LONGEST COMPILE`` (a length in tokens, and 0 or
1) says in a line of JSON what it has loaded. Then it reads lines ``[prompt tokens, sequences, new
tokens]`` and answers each with the seconds that vLLM takes to generate these. Its lines begin with
`ANSWER`, as vLLM prints, too.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from torchao_int4cpu.bench.model import resident_bytes
from torchao_int4cpu.bench.model_variants import weight_bytes
from torchao_int4cpu.bench.timing import seconds
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

ANSWER = "vllm_worker: "


def main() -> None:
    """Load, and answer until the input ends."""
    folder, longest, compiled = sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3]))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the model can be looked at
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    llm = vllm.LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=not compiled,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        enable_prefix_caching=False,
    )
    _seconds(llm, 4, 1, 2)  # where an op is missing, this is where vLLM finds out
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    _answer(
        {
            "vllm": vllm.__version__,
            "weight_bytes": weight_bytes(model),
            "int4_weights": sum(isinstance(p, Int4OpaqueTensor) for p in model.parameters()),
        }
    )
    for line in sys.stdin:
        taken = _seconds(llm, *json.loads(line))
        _answer({"seconds": taken, "resident_bytes": resident_bytes()})


def _seconds(llm: Any, prompt_tokens: int, sequences: int, new_tokens: int) -> float:
    import vllm

    vocabulary = llm.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (sequences, prompt_tokens), generator=generator).tolist()
    prompts = [{"prompt_token_ids": each} for each in ids]
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    return seconds(lambda: llm.generate(prompts, sampling, use_tqdm=False))


def _answer(found: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

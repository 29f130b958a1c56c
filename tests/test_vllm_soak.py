"""A server under requests of all kinds for a while: no error, no more memory, the same answers after.

A minute of it is part of ``.ci/run vllm``. An hour, on a model of one's own::

    INT4CPU_VLLM_PYTHON=VENV/bin/python INT4CPU_SOAK_SECONDS=3600 INT4CPU_SOAK_MODEL=DIRECTORY \
        python -m pytest -m slow -s tests/test_vllm_soak.py
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.test_vllm import G32, NEEDS_VLLM, llama, saved, serving

pytestmark = NEEDS_VLLM

SECONDS = float(os.environ.get("INT4CPU_SOAK_SECONDS", "60"))
MODEL = os.environ.get("INT4CPU_SOAK_MODEL")

#: Requests at a time.
CLIENTS = 4

#: Bytes that memory may grow by after the first quarter: what is allocated once, as for a number of
#: requests that has not been there before, and 2 KB an answer. (In an hour it was 0.6 KB an answer.
#: The logits of one token are 100 KB.)
ONCE, EACH = 16 * 2**20, 2048

WORDS = "the quick brown fox jumps over the lazy dog while nobody looks".split()  # noqa: SIM905


def request(chosen: random.Random) -> tuple[str, dict[str, Any]]:
    """A completion or a chat, short or long, greedy or sampled, for one answer or several."""
    text = " ".join(chosen.choices(WORDS, k=chosen.randint(1, 20)))
    body: dict[str, Any] = {
        "max_tokens": chosen.randint(1, 24),
        "temperature": chosen.choice([0, 0.8, 1.2]),
        "seed": chosen.randrange(1000),
        "ignore_eos": chosen.random() < 0.5,
        "n": chosen.choice([1, 1, 1, 2]),
    }
    if body["temperature"] == 0:
        body["n"] = 1
    if chosen.random() < 0.5:
        return "completions", body | {"prompt": text}
    return "chat/completions", body | {"messages": [{"role": "user", "content": text}]}


def texts(answer: dict[str, Any]) -> list[str]:
    choices = answer["choices"]
    return [each["text"] if "text" in each else each["message"]["content"] for each in choices]


def resident_bytes(process: int) -> int:
    """Of a process and those that it has started."""
    total = 0
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            total = int(line.split()[1]) * 1024
    for task in Path(f"/proc/{process}/task").iterdir():
        children = (task / "children").read_text().split()
        total += sum(resident_bytes(int(child)) for child in children)
    return total


def test_a_server_for_a_while(tmp_path: Path) -> None:
    folder = Path(MODEL) if MODEL else saved(llama, G32, tmp_path)
    asked = [request(random.Random(seed)) for seed in range(8)]
    with serving(folder, tmp_path / "log") as server:
        before = [texts(server.ask(path, body)) for path, body in asked]
        stop = time.monotonic() + SECONDS
        with ThreadPoolExecutor(CLIENTS) as clients:
            counts = [clients.submit(keep_asking, server.ask, stop, seed) for seed in range(CLIENTS)]
            memory = []
            while time.monotonic() < stop:
                time.sleep(SECONDS / 60)
                memory.append(resident_bytes(server.process))
            answers = sum(count.result() for count in counts)
        after = [texts(server.ask(path, body)) for path, body in asked]
    print(f"{answers} answers; GB resident: {[round(each / 1e9, 3) for each in memory]}")
    assert answers > CLIENTS
    assert after == before
    settled = max(memory[: len(memory) // 4])
    assert max(memory) < settled + ONCE + EACH * answers


def keep_asking(ask: Callable[[str, dict[str, Any]], dict[str, Any]], stop: float, seed: int) -> int:
    """Ask until then; how many answers came, each whole."""
    chosen, answers = random.Random(f"client {seed}"), 0
    while time.monotonic() < stop:
        path, body = request(chosen)
        answer = ask(path, body)
        assert len(texts(answer)) == body["n"]
        assert all(each["finish_reason"] in ("length", "stop") for each in answer["choices"])
        answers += 1
    return answers

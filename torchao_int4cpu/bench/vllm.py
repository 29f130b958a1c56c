"""Time a model in vLLM: in bfloat16, in vLLM's own 4-bit kernels, and in those of this package.

Each variant is loaded by a process of its own (`vllm_worker`). All of them stay, and take turns in each
pass (A B C A B C ...), so that they share the machine's noise; one that waits reads from a pipe. vLLM
0.32 has two ways of its own for 4-bit weights on a CPU: W4A16, and with AMX W4A8, which rounds
activations to 8 bits as well. It has them for GPTQ, AWQ and compressed-tensors alike; here the file is
that of compressed-tensors, as GPTQ's may not have zeros of its own there.

Decode is what more new tokens take beyond the first one. Nothing here prints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from torchao_int4cpu.bench.demo import Progress
from torchao_int4cpu.bench.vllm_worker import ANSWER
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.export import export_directory
from torchao_int4cpu.convert.plan import Plan, make_plan
from torchao_int4cpu.extras import MissingExtra
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

#: Names of the weights in a row.
BF16, INT4, W4A16, W4A8 = "bf16", "4-bit", "vLLM W4A16", "vLLM W4A8"

#: Tokens of each prompt before decode is timed, and those that are decoded.
SHORT_PROMPT, NEW_TOKENS = 16, 32

#: Starts the process of a variant.
WORKER = [sys.executable, "-m", "torchao_int4cpu.bench.vllm_worker"]


@dataclass(frozen=True)
class ServingRow:
    """One variant at one length of the prompt, or at one number of sequences.

    Attributes:
        weights: `BF16`, `INT4`, `W4A16` or `W4A8`.
        step: ``prefill`` or ``decode``.
        prompt_tokens, sequences: of a call.
        ms: median milliseconds, of the prompt, or of a step of all sequences.
        tokens_per_s: of the prompt, or of all sequences together.
        vs_bf16: that over the one of `BF16`; above 1 is faster. None if that did not load.
        int4_weights: how many are 4-bit weights of this package.
        weight_bytes: of all parameters.
        resident_bytes: of the process when it was done; None where the system does not say.
    """

    weights: str
    step: str
    prompt_tokens: int
    sequences: int
    ms: float
    tokens_per_s: float
    vs_bf16: float | None
    int4_weights: int
    weight_bytes: int
    resident_bytes: int | None


class _Call(NamedTuple):
    """What is timed; see `ServingRow`."""

    step: str
    prompt_tokens: int
    sequences: int


@dataclass
class Served:
    """What was measured.

    Attributes:
        rows: of the variants that vLLM has loaded.
        refused: why it has not loaded the others, by their names.
        vllm: its version.
    """

    rows: list[ServingRow] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    vllm: str = ""


def run(
    folder: Path,
    config: Int4WeightOnlyConfig,
    progress: Progress,
    *,
    prompts: Sequence[int] = (256, 1024),
    sequences: Sequence[int] = (1, 8, 32),
    passes: int = 5,
    compiled: bool = False,
) -> Served:
    """Measure.

    Args:
        folder: a Hugging Face directory of a causal language model, not quantized.
        config: of the 4-bit weights.
        progress: told of each step.
        prompts: lengths of the prompts whose prefill is timed, in tokens.
        sequences: how many are decoded together.
        passes: of which the median is taken.
        compiled: have vLLM compile the model, as it does by itself, which takes minutes.

    Raises:
        MissingExtra: this Python has no vLLM, or no transformers.
        ValueError: a number is not positive, the folder is no such directory, or vLLM ends too early.
    """
    for name, numbers in (("prompts", prompts), ("sequences", sequences), ("passes", [passes])):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name} has {list(numbers)}; give numbers of 1 and more")
    if not has_vllm():
        raise MissingExtra(
            "vLLM is not installed in this Python: make an environment for it, as serving.md says, "
            "and call bench --vllm there"
        )
    plan = make_plan(folder, config)
    longest = max([*prompts, SHORT_PROMPT]) + NEW_TOKENS + 1
    calls = [_Call("prefill", tokens, 1) for tokens in prompts]
    calls += [_Call("decode", SHORT_PROMPT, count) for count in sequences]
    served = Served()
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as processes:
        workers: dict[str, _Worker] = {}
        for name, source, variables in _variants(plan, Path(made), progress):
            progress(f"load {name}", 0, 0)
            try:
                workers[name] = processes.enter_context(_loaded(source, longest, compiled, variables))
                served.vllm = workers[name].loaded["vllm"]
            except _EndedError as ended:
                served.refused[name] = str(ended)
        if not torch.cpu._is_amx_tile_supported():
            served.refused[W4A8] = "this CPU has no AMX, without which vLLM does not round activations"
        seconds = _medians(workers, calls, passes, progress)
        served.rows = [
            _row(call, name, worker, seconds) for call in calls for name, worker in workers.items()
        ]
    return served


def _medians(
    workers: Mapping[str, _Worker], calls: Sequence[_Call], passes: int, progress: Progress
) -> dict[tuple[str, _Call], float]:
    """Median seconds of each call of each variant, which take turns."""
    samples: dict[tuple[str, _Call], list[float]] = {}
    for turn in range(passes + 1):  # the first one is not counted
        for i, call in enumerate(calls):
            progress(f"pass {turn} of {passes}", i, len(calls))
            for name, worker in workers.items():
                try:
                    taken = worker.seconds_of(call)
                except _EndedError as ended:
                    raise ValueError(
                        f"vLLM has ended while {name} generated for {call.sequences} prompts of "
                        f"{call.prompt_tokens} tokens: {ended}. Give shorter prompts, or fewer "
                        "sequences"
                    ) from ended
                if turn:
                    samples.setdefault((name, call), []).append(taken)
    return {key: statistics.median(taken) for key, taken in samples.items()}


def _row(
    call: _Call, name: str, worker: _Worker, seconds: Mapping[tuple[str, _Call], float]
) -> ServingRow:
    taken = seconds[name, call]
    return ServingRow(
        weights=name,
        step=call.step,
        prompt_tokens=call.prompt_tokens,
        sequences=call.sequences,
        ms=1e3 * taken,
        tokens_per_s=(call.prompt_tokens if call.step == "prefill" else call.sequences) / taken,
        vs_bf16=seconds[BF16, call] / taken if (BF16, call) in seconds else None,
        int4_weights=worker.loaded["int4_weights"],
        weight_bytes=worker.loaded["weight_bytes"],
        resident_bytes=worker.resident_bytes,
    )


def has_vllm() -> bool:
    """Whether this Python has it."""
    return importlib.util.find_spec("vllm") is not None


def _variants(plan: Plan, made: Path, progress: Progress) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """The name of each, its directory, and variables of the environment."""

    def tell(name: str, done: int) -> None:
        progress("quantize", 0, 0)

    yield BF16, plan.folder, {}
    quantize_directory(plan, made / "ours", tell)
    yield INT4, made / "ours", {}
    export_directory(made / "ours", made / "theirs", "compressed-tensors", tell)
    yield W4A16, made / "theirs", {"VLLM_CPU_INT4_W4A8": "0"}
    if torch.cpu._is_amx_tile_supported():
        yield W4A8, made / "theirs", {"VLLM_CPU_INT4_W4A8": "1"}


class _EndedError(Exception):
    """A process has ended: vLLM does not load the model, or fails later."""


class _Worker:
    """A process that has a model, and what it said when it had loaded it."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process, self._log = process, log
        self.loaded = self._next()
        self.resident_bytes: int | None = None

    def seconds_of(self, call: _Call) -> float:
        """Of a prefill, or of one step of decode."""
        first = self._ask(call, 1)
        if call.step == "prefill":
            return first
        return (self._ask(call, 1 + NEW_TOKENS) - first) / NEW_TOKENS

    def _ask(self, call: _Call, new_tokens: int) -> float:
        assert self._process.stdin is not None
        asked = (call.prompt_tokens, call.sequences, new_tokens)
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        answer = self._next()
        self.resident_bytes = answer["resident_bytes"]
        return float(answer["seconds"])

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
        self._process.wait()
        self._log.seek(0)
        raise _EndedError(_last_error(self._log.read()))


def _last_error(log: str) -> str:
    """The last line of it that names an exception, and the next if that goes on, as pydantic's do."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()] or ["it ended without a word"]
    at = max((i for i, line in enumerate(lines) if "Error: " in line), default=len(lines) - 1)
    more = [line.strip() for line in lines[at + 1 : at + 2] if line[0].isspace()]
    return " ".join([lines[at].strip(), *more])


@contextlib.contextmanager
def _loaded(
    folder: Path, longest: int, compiled: bool, variables: Mapping[str, str]
) -> Iterator[_Worker]:
    """A process with a model.

    Raises:
        _EndedError: vLLM does not load it.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*WORKER, str(folder.absolute()), str(longest), str(int(compiled))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | variables,
        ) as process,
    ):
        try:
            yield _Worker(process, log)
        finally:
            process.kill()

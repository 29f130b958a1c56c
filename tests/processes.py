"""Tests in processes of their own: a program of tests/children, or ranks that talk over gloo.

Starting a process takes seconds, so all tests of a module that want the same ranks share one launch::

    @in_ranks("2", "4", "2 mixed")
    def test_something(ranks: Ranks) -> None:
        ...  # runs in each of the processes; what one raises is the failure of the test

``"2 mixed"`` gives all ranks but the first the next lower instruction set, and so another layout.
Launches of more than two ranks and mixed ones are slow tests; all of them are with ``slow=True``.
A launch ends at its first failure or when its time is over; tests that it did not get to fail, too.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

#: Seconds after which a collective that waits for another rank gives up, and a launch as a whole.
COLLECTIVE_SECONDS = 90
LAUNCH_SECONDS = 420

ROOT = Path(__file__).parent.parent


def child_command(name: str, *arguments: str) -> list[str]:
    """What runs ``tests/children/name.py``; from `ROOT`."""
    return [sys.executable, "-m", f"tests.children.{name}", *arguments]


def run_child(
    name: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``tests/children/name.py``, with changes to the environment; the caller judges its end."""
    return subprocess.run(
        child_command(name, *arguments),
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
    )


class Ranks(NamedTuple):
    """Which process this is, of how many, and a folder that all of them see, empty at first."""

    rank: int
    world: int
    folder: Path


Body = Callable[[Ranks], None]

#: By module, then by name: the test, and the launches it wants.
_BODIES: dict[str, dict[str, tuple[Body, tuple[str, ...]]]] = {}


def in_ranks(*launches: str, slow: bool = False) -> Callable[[Body], Callable[[str], None]]:
    """Make a function of `Ranks` a test that runs in every process of each launch."""

    cases = [
        pytest.param(launch, marks=pytest.mark.slow) if slow or launch != "2" else launch
        for launch in launches
    ]

    def decorate(body: Body) -> Callable[[str], None]:
        module, name = body.__module__, body.__name__
        _BODIES.setdefault(module, {})[name] = (body, launches)

        @pytest.mark.parametrize("launch", cases)
        def test(launch: str) -> None:
            _check(_launched(module, launch), name)

        test.__name__, test.__qualname__, test.__doc__ = name, name, body.__doc__
        test.__module__ = module
        return test

    return decorate


def lower_capability() -> str | None:
    """A value of ``ATEN_CPU_CAPABILITY`` below this process's, with another layout, or None."""
    own = torch.backends.cpu.get_cpu_capability().lower()
    return {"avx512": "avx2", "avx2": "default"}.get(own)


# --- the parent ---------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    passed: set[str]  # by every rank
    failure: str  # what the ranks that ended badly said
    unfinished: str | None  # the test they were in


@functools.cache
def _launched(module: str, launch: str) -> _Outcome:
    world, mixed = int(launch.split()[0]), "mixed" in launch
    lower = lower_capability()
    if mixed and lower is None:
        pytest.skip("this CPU has no two instruction sets with different layouts")
    names = [name for name, (_, launches) in _BODIES[module].items() if launch in launches]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _start(module, names, world, rank, Path(folder), lower if mixed and rank else None)
            for rank in range(world)
        ]
        deadline = time.monotonic() + LAUNCH_SECONDS
        ended = [_end(process, deadline) for process in ranks]
        done = [_read(Path(folder, f"{rank}.done")) for rank in range(world)]
        logs = [_read(Path(folder, f"{rank}.log")) for rank in range(world)]
    passed = set.intersection(*(set(text.split()) for text in done))
    failure = "".join(
        f"\n--- rank {rank} of {launch}: {how} ---\n{log[-6000:]}"
        for rank, (how, log) in enumerate(zip(ended, logs))
        if how != "exit code 0"
    )
    return _Outcome(passed, failure, next((name for name in names if name not in passed), None))


def _start(
    module: str, names: list[str], world: int, rank: int, folder: Path, capability: str | None
) -> subprocess.Popen[bytes]:
    chosen = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
    with open(folder / f"{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.processes", module, json.dumps(names), str(rank), str(world)],
            cwd=ROOT,
            env=os.environ | chosen | {"TESTS_FOLDER": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _end(process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        return f"exit code {process.wait(max(0.1, deadline - time.monotonic()))}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"still running after {LAUNCH_SECONDS} seconds, killed"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _check(outcome: _Outcome, name: str) -> None:
    if name in outcome.passed and (not outcome.failure or outcome.unfinished is not None):
        return
    if name == outcome.unfinished or outcome.unfinished is None:
        pytest.fail(outcome.failure or "ended without a word", pytrace=False)
    pytest.fail(f"not reached: {outcome.unfinished} failed before it", pytrace=False)


# --- a child ------------------------------------------------------------------------------------


def main(module: str, names: str, rank: str, world: str) -> None:
    """Run the named tests of a module as one rank."""
    torch.set_num_threads(1)
    folder = Path(os.environ["TESTS_FOLDER"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    importlib.import_module(module)
    for name in json.loads(names):
        body, _ = _BODIES[module][name]
        shared = folder / name
        shared.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            torch.distributed.barrier()
            body(Ranks(int(rank), int(world), shared))
            torch.distributed.barrier()
        except BaseException:  # whatever it is, the other ranks must not wait for this one
            print(f"in {name}:", flush=True)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        with open(folder / f"{rank}.done", "a") as done:
            done.write(name + "\n")
    torch.distributed.destroy_process_group()
    # At once: threads of gloo may outlive the group, and as torch tears its objects down they end the
    # process by std::terminate (seen once in thirty launches, after all tests had passed).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def raises(kind: type[BaseException], words: str, call: Callable[[], Any]) -> str:
    """Check that every rank gets that exception; return the message."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert words in message, message
    return message


if __name__ == "__main__":
    from tests import processes  # the one that test modules import

    processes.main(*sys.argv[1:])

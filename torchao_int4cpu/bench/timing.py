"""Timing calls in turn (A B C A B C ...), so that what disturbs a machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchao_int4cpu.kernels.selection import get_kernel, set_kernel

#: Seconds after which a pass stops cycling, about; products that slow are not bound by memory.
MAX_PASS_SECONDS = 0.5

#: A pass over small weights is repeated until it takes about so long, so that the clock is no matter.
MIN_PASS_SECONDS = 0.01


class TimedCall(NamedTuple):
    """What is timed: ``call(i)`` runs the i-th run of ``layers`` weights.

    Attributes:
        selection, activations: what `set_kernel` is given before; None for what is chosen already.
    """

    call: Callable[[int], Any]
    layers: int = 1
    selection: str | None = None
    activations: str | None = None


def interleaved(kernels: dict[str, TimedCall], count: int, passes: int) -> dict[str, float]:
    """Median seconds of one layer, over ``passes`` passes in which each kernel has its turn."""
    turns = {name: _Turn.fitting(kernel, count) for name, kernel in kernels.items()}
    samples: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(passes):
        for name, turn in turns.items():
            layers = turn.cycled * turn.repeats * turn.kernel.layers
            samples[name].append(seconds(turn.run) / layers)
    return {name: statistics.median(values) for name, values in samples.items()}


@dataclass(frozen=True)
class _Turn:
    """What one pass does with one kernel: a number of calls after each other, a number of times."""

    kernel: TimedCall
    cycled: int
    repeats: int

    @classmethod
    def fitting(cls, kernel: TimedCall, count: int) -> _Turn:
        call = selected(kernel)
        call(0)  # allocations, primitives, compilation
        once = min(seconds(lambda: call(0)) for _ in range(3))
        cycled = max(1, min(count // kernel.layers, int(MAX_PASS_SECONDS / once)))
        return cls(kernel, cycled, max(1, int(MIN_PASS_SECONDS / (once * cycled))))

    def run(self) -> None:
        def cycle(_: int) -> None:
            for i in range(self.cycled):
                self.kernel.call(i)

        for _ in range(self.repeats):
            selected(self.kernel._replace(call=cycle))(0)


def selected(kernel: TimedCall) -> Callable[[int], Any]:
    """The call of a kernel, with its selection made before and undone after."""

    def call(i: int) -> Any:
        if kernel.selection is None and kernel.activations is None:
            return kernel.call(i)
        with set_kernel(kernel.selection or get_kernel(), kernel.activations):
            return kernel.call(i)

    return call


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, by the wall clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

"""Time linear layers: our 4-bit one, PyTorch's raw int4 op and a dense one, as rows of numbers.

Every figure of a row is measured in one run, the kernels in turn (A B C A B C ...), each over so many
distinct weights that no cache holds them. Nothing here prints.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.groupwise import GroupwiseInt4
from torchao_int4cpu.kernels import int4_mm_reference
from torchao_int4cpu.layout import native_layout
from torchao_int4cpu.tensor import Int4OpaqueTensor

#: Distinct weights of one kernel take at least so many bytes together: several times any L3 cache here.
CYCLE_BYTES = 256 * 2**20

#: A pass stops cycling after about so many seconds; products that slow are not bound by memory.
MAX_PASS_SECONDS = 0.5

#: A pass over small weights is repeated until it takes about so long, so that the clock is no matter.
MIN_PASS_SECONDS = 0.01

#: Rows of the activation on which the error is measured; the exact product is slow.
ERROR_ROWS = 16

#: Bytes that `read_bandwidth` reads at a time.
BANDWIDTH_BYTES = 512 * 2**20

#: A timed call of a kernel with the i-th weight.
Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Row:
    """One kernel at one shape.

    Attributes:
        n, k, m: out features, in features, rows of the activation.
        group_size: codes that share a scale and a zero.
        dtype: of the activation.
        kernel: ``ours``, ``ours compiled``, ``aten op``, ``torchao prototype`` or ``bf16 linear``.
        ms: median milliseconds of one call.
        weight_gb_per_s: bytes of the weight with its scales, 1e9 a second.
        bandwidth_share: that as a share of the read bandwidth measured in the same run.
        gflop_per_s: 2·M·N·K operations, 1e9 a second.
        speed_vs_bf16_linear: time of ``F.linear`` in bfloat16 divided by ours; above 1 is faster.
        speed_vs_aten_op: time of the raw op in the dtype of the activation divided by ours.
        relative_error: norm of the error over the norm of the exact product with the dequantized
            weight, on at most `ERROR_ROWS` rows.
    """

    n: int
    k: int
    m: int
    group_size: int
    dtype: str
    kernel: str
    ms: float
    weight_gb_per_s: float
    bandwidth_share: float
    gflop_per_s: float
    speed_vs_bf16_linear: float
    speed_vs_aten_op: float
    relative_error: float


def read_bandwidth(passes: int = 7) -> float:
    """Read bandwidth of this machine with torch's threads, in GB/s: the best of several sums."""
    data = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = min(_seconds(lambda: data.sum()) for _ in range(passes + 1))
    return data.nbytes / best / 1e9


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    passes: int = 7,
    compiled: bool = False,
    prototype: bool = False,
    bandwidth: float | None = None,
) -> Iterator[Row]:
    """Measure every shape ``(N, K)`` at every number of rows.

    Args:
        compiled: also time `torch.compile` of our layer.
        prototype: also time torchao's prototype tensor (N % 16 == 0, group 32 to 128 only).
        bandwidth: GB/s to relate to; measured first if None.

    Raises:
        ValueError: PyTorch's int4 op does not run on this machine.
    """
    if native_layout() is None:
        raise ValueError(
            "PyTorch's int4 op does not run on this machine; bench compares with it, "
            "so run it on an x86-64 CPU"
        )
    bandwidth = bandwidth or read_bandwidth()
    for n, k in shapes:
        weights = _Weights(n, k, group_size)
        for m in rows:
            x = torch.randn(m, k, dtype=torch.float32).to(dtype)
            with torch.no_grad():
                calls = weights.calls(x, compiled=compiled, prototype=prototype)
                ms = {
                    name: seconds * 1e3
                    for name, seconds in _interleaved(calls, weights.count, passes).items()
                }
                errors = {name: weights.relative_error(x, call(0)) for name, call in calls.items()}
            for kernel, value in ms.items():
                dense = kernel == "bf16 linear"
                moved = n * k * 2 if dense else weights.packed_bytes
                rate = moved / value / 1e6
                yield Row(
                    n=n,
                    k=k,
                    m=m,
                    group_size=group_size,
                    dtype="bfloat16" if dense else str(dtype).removeprefix("torch."),
                    kernel=kernel,
                    ms=value,
                    weight_gb_per_s=rate,
                    bandwidth_share=rate / bandwidth,
                    gflop_per_s=2 * m * n * k / value / 1e6,
                    speed_vs_bf16_linear=ms["bf16 linear"] / value,
                    speed_vs_aten_op=ms["aten op"] / value,
                    relative_error=errors[kernel],
                )


class _Weights:
    """Distinct random weights of one shape, 4-bit and dense."""

    def __init__(self, n: int, k: int, group_size: int) -> None:
        groups = -(-k // group_size)
        first = Int4OpaqueTensor.from_groupwise(
            GroupwiseInt4(
                torch.randint(0, 16, (n, k), dtype=torch.uint8),
                torch.rand(n, groups) * 0.01 + 0.001,
                torch.randn(n, groups) * 0.001,
                group_size,
            )
        )
        self.packed_bytes = first.qdata.nbytes + first.scale_and_zero.nbytes
        self.count = max(2, CYCLE_BYTES // self.packed_bytes) if n * k > 2**18 else 2
        self.count = min(self.count, 64)
        self.packed = [first] + [first.clone() for _ in range(self.count - 1)]
        dense = first.dequantize()
        dense_count = max(2, min(self.count, CYCLE_BYTES // dense.nbytes))
        self.dense = [dense] + [dense.clone() for _ in range(dense_count - 1)]

    def relative_error(self, x: Tensor, y: Tensor) -> float:
        """Of a product with the first weight."""
        exact = int4_mm_reference(x[:ERROR_ROWS], self.packed[0].packed())
        error = y[:ERROR_ROWS, : exact.shape[1]].double() - exact
        return float(error.norm() / exact.norm())

    def calls(self, x: Tensor, *, compiled: bool, prototype: bool) -> dict[str, Call]:
        packed, dense = self.packed, self.dense
        k = packed[0].shape[1]
        padded = F.pad(x, (0, packed[0].qdata.shape[1] * 2 - k))
        bf16 = x.to(torch.bfloat16)
        group_size = packed[0].block_size[1]
        scales = [w.scale_and_zero.to(x.dtype) for w in packed]  # the raw op wants x's dtype
        op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        calls: dict[str, Call] = {
            "bf16 linear": lambda i: F.linear(bf16, dense[i % len(dense)]),
            "aten op": lambda i: op(padded, packed[i].qdata, group_size, scales[i]),
            "ours": lambda i: F.linear(x, packed[i]),
        }
        if prototype:
            upstream = [_prototype(w) for w in packed]
            calls["torchao prototype"] = lambda i: F.linear(bf16, upstream[i])
        if compiled:
            torch.compiler.reset()
            fast = torch.compile(lambda t, w: F.linear(t, w), fullgraph=True, dynamic=False)
            calls["ours compiled"] = lambda i: fast(x, packed[i])
        return calls


def _prototype(w: Int4OpaqueTensor) -> Tensor:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Prototype

    tensor: Tensor = Prototype(w.qdata, w.scale_and_zero, w.block_size, w.shape)
    return tensor


def _interleaved(calls: dict[str, Call], count: int, passes: int) -> dict[str, float]:
    """Median seconds of one call, over ``passes`` passes in which each kernel has its turn."""
    turns = {name: _Turn.fitting(call, count) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(passes):
        for name, turn in turns.items():
            samples[name].append(_seconds(turn.run) / (turn.cycled * turn.repeats))
    return {name: statistics.median(values) for name, values in samples.items()}


@dataclass(frozen=True)
class _Turn:
    """What one pass does with one kernel: so many weights after each other, so many times."""

    call: Call
    cycled: int
    repeats: int

    @classmethod
    def fitting(cls, call: Call, count: int) -> _Turn:
        call(0)  # allocations, primitives, compilation
        once = min(_seconds(lambda i=i: call(i % count)) for i in range(3))  # type: ignore[misc]
        cycled = max(1, min(count, int(MAX_PASS_SECONDS / once)))
        return cls(call, cycled, max(1, int(MIN_PASS_SECONDS / (once * cycled))))

    def run(self) -> None:
        for _ in range(self.repeats):
            for i in range(self.cycled):
                self.call(i)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

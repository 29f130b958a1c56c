"""Time linear layers: our 4-bit one, PyTorch's raw int4 op and a dense one, as rows of numbers.

Beside them stands what this machine could do at best, by its measured bandwidth and arithmetic.

Every figure of a row is measured in one run, the kernels in turn (A B C A B C ...), each over so many
distinct weights that no cache holds them. Nothing here prints.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.bench.timing import TimedCall, interleaved, seconds, selected
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.format.packed import int4_mm_reference
from torchao_int4cpu.kernels.selection import (
    native_kernel,
    operations_at_best,
    read_at_best,
    takes_int8,
)
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: The least bytes that the distinct weights of one kernel take together: several times any L3 cache.
CYCLE_BYTES = 256 * 2**20

#: Rows of the activation on which the error is measured; the exact product is slow.
ERROR_ROWS = 16

#: Bytes that `measure_limits` reads at a time.
BANDWIDTH_BYTES = 512 * 2**20

#: Layers that are compiled together, as in a model: a graph of one layer would mostly time its call.
COMPILED_LAYERS = 8

#: The call that only reads the weight, timed in turn with the kernels.
READ = "read"

#: Rounds of `operations_at_best` that are timed at once: some milliseconds.
PEAK_ROUNDS = 400_000


class Limits(NamedTuple):
    """What this machine can do with torch's threads, measured.

    Attributes:
        read_gb_per_s: bytes read from memory, 1e9 a second.
        gflop_per_s: operations, 1e9 a second, in the arithmetic of our kernel, with its operands in
            registers (tiles of AMX: in the first-level cache); None if there is none.
        int8_gflop_per_s: the same of the one for activations in 8 bits.
    """

    read_gb_per_s: float
    gflop_per_s: float | None
    int8_gflop_per_s: float | None = None

    def ms(self, moved: int, operations: int, activations: str | None = None) -> float:
        """The least milliseconds for a number of bytes and of operations."""
        rate = self.gflop_per_s if activations is None else self.int8_gflop_per_s
        arithmetic = operations / rate if rate else 0.0
        return max(moved / self.read_gb_per_s, arithmetic) / 1e6


@dataclass(frozen=True)
class Row:
    """One kernel at one shape.

    Attributes:
        n, k, m: out features, in features, rows of the activation.
        group_size: codes that share a scale and a zero.
        dtype: of the activation.
        kernel: ``ours``, ``ours aten`` (with ``set_kernel("aten")``), ``ours int8`` (with
            ``activations="int8"``, for more rows than those it leaves as they are), ``ours compiled``,
            ``aten op``, ``torchao prototype`` or ``bf16 linear``.
        ms: median milliseconds of one call.
        limit_ms: the least that `Limits` allow, for the weight's bytes (of the 4-bit weight, or of the
            dense one) and the operations.
        read_ms: median milliseconds to read this 4-bit weight and do nothing with it, in the order and
            by the tasks of our native kernel for one row, in turn with the kernels. The same for all
            kernels of a shape and m; None where no native kernel runs.
        weight_gb_per_s: bytes of the weight with its scales, 1e9 a second.
        bandwidth_share: that as a share of the read bandwidth measured in the same run.
        gflop_per_s: 2·M·N·K operations, 1e9 a second.
        speed_vs_bf16_linear: time of ``F.linear`` in bfloat16 divided by ours; above 1 is faster.
        speed_vs_aten_op: time of the raw op in the dtype of the activation divided by ours.
        relative_error: norm of the error over the norm of the exact product with the dequantized
            weight, on at most `ERROR_ROWS` rows: what the product rounds.
        total_error: the same against the exact product with the float weight of normal numbers that was
            quantized: rounding and quantization together. The dense weight of ``bf16 linear`` is the
            dequantized one, so quantization is in this error of it, too.
    """

    n: int
    k: int
    m: int
    group_size: int
    dtype: str
    kernel: str
    ms: float
    limit_ms: float
    read_ms: float | None
    weight_gb_per_s: float
    bandwidth_share: float
    gflop_per_s: float
    speed_vs_bf16_linear: float
    speed_vs_aten_op: float
    relative_error: float
    total_error: float


def measure_limits(passes: int = 7) -> Limits:
    """Measure with torch's threads: median bandwidth (neighbours share it), best arithmetic."""
    data = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32)
    data.sum()
    read = statistics.median(seconds(lambda: data.sum()) for _ in range(passes))
    return Limits(data.nbytes / read / 1e9, _peak(None, passes), _peak("int8", passes))


def _peak(activations: str | None, passes: int) -> float | None:
    operations = operations_at_best(1, activations)
    if not operations:
        return None
    spin = min(seconds(lambda: operations_at_best(PEAK_ROUNDS, activations)) for _ in range(passes))
    return operations * PEAK_ROUNDS / spin / 1e9


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    passes: int = 7,
    compiled: bool = False,
    prototype: bool = False,
    limits: Limits | None = None,
) -> Iterator[Row]:
    """Measure every shape ``(N, K)`` at every number of rows.

    Args:
        compiled: also time `torch.compile` of our layer.
        prototype: also time torchao's prototype tensor (N % 16 == 0, group 32 to 128 only).
        limits: of this machine; measured first if None.

    Raises:
        ValueError: PyTorch's int4 op does not run on this machine.
    """
    if native_layout() is None:
        raise ValueError(
            "PyTorch's int4 op does not run on this machine; bench compares with it, "
            "so run it on an x86-64 CPU"
        )
    limits = limits or measure_limits()
    for n, k in shapes:
        weights = _Weights(n, k, group_size)
        for m in rows:
            x = torch.randn(m, k, dtype=torch.float32).to(dtype)
            with torch.no_grad():
                kernels = weights.kernels(x, compiled=compiled, prototype=prototype)
                reading = weights.reading()
                times = interleaved(kernels | reading, weights.count, passes)
                ms = {name: value * 1e3 for name, value in times.items()}
                read_ms = ms.pop(READ, None)
                exact = weights.exact(x)
                errors = {name: exact.errors(selected(kernel)(0)) for name, kernel in kernels.items()}
            for name, value in ms.items():
                dense = name == "bf16 linear"
                moved = n * k * 2 if dense else weights.packed_bytes
                operations = 2 * m * n * k
                relative_error, total_error = errors[name]
                rate = moved / value / 1e6
                yield Row(
                    n=n,
                    k=k,
                    m=m,
                    group_size=group_size,
                    dtype="bfloat16" if dense else str(dtype).removeprefix("torch."),
                    kernel=name,
                    ms=value,
                    limit_ms=limits.ms(moved, operations, kernels[name].activations),
                    read_ms=read_ms,
                    weight_gb_per_s=rate,
                    bandwidth_share=rate / limits.read_gb_per_s,
                    gflop_per_s=operations / value / 1e6,
                    speed_vs_bf16_linear=ms["bf16 linear"] / value,
                    speed_vs_aten_op=ms["aten op"] / value,
                    relative_error=relative_error,
                    total_error=total_error,
                )


def random_weight(
    shape: tuple[int, ...], group_size: int, dtype: torch.dtype = torch.bfloat16
) -> Int4OpaqueTensor:
    """A 4-bit weight ``[N, K]`` or ``[E, N, K]`` of random codes, with scales as real layers have."""
    *rows, k = shape
    groups = -(-k // group_size)
    value = GroupwiseInt4(
        torch.randint(0, 16, shape, dtype=torch.uint8),
        torch.rand(*rows, groups) * 0.01 + 0.001,
        torch.randn(*rows, groups) * 0.001,
        group_size,
    )
    return Int4OpaqueTensor.from_groupwise(value, dtype=dtype)


def _copy(weight: Int4OpaqueTensor) -> Int4OpaqueTensor:
    """In memory as `quantize_` gets it, in huge pages where there are some."""
    empty = Int4OpaqueTensor.empty(weight.shape, weight.group_size, weight.dtype)
    empty.copy_(weight)
    return empty


class _Exact(NamedTuple):
    """Exact products of the first rows of an activation, float64 ``[rows, N]``.

    Attributes:
        dequantized: with the dequantized weight.
        total: with the float weight that was quantized.
    """

    dequantized: Tensor
    total: Tensor

    def errors(self, y: Tensor) -> tuple[float, float]:
        """Relative errors of a product against both; it may have more rows, and more columns."""
        rows, n = self.total.shape
        y = y[:rows, :n].double()
        relative, total = (float((y - exact).norm() / exact.norm()) for exact in self)
        return relative, total


class _Weights:
    """Distinct weights of one shape, 4-bit and dense: one of normal numbers, quantized, and its copies.

    Attributes:
        original: bfloat16 ``[N, K]``, what was quantized.
        packed, dense: the copies of it in 4 bits, and those of its dequantized values.
    """

    def __init__(self, n: int, k: int, group_size: int) -> None:
        self.original = (torch.randn(n, k) / k**0.5).to(torch.bfloat16)  # results are about 1
        first = Int4OpaqueTensor.from_hp(self.original, [1, group_size])
        self.packed_bytes = first.qdata.nbytes + first.scale_and_zero.nbytes
        cycled = min(64, CYCLE_BYTES // self.packed_bytes) // COMPILED_LAYERS * COMPILED_LAYERS
        self.count = max(COMPILED_LAYERS, cycled)
        self.packed = [first] + [_copy(first) for _ in range(self.count - 1)]
        dense = first.dequantize()
        dense_count = max(2, min(self.count, CYCLE_BYTES // dense.nbytes))
        self.dense = [dense] + [dense.clone() for _ in range(dense_count - 1)]

    def exact(self, x: Tensor) -> _Exact:
        """What a product with any of the weights should give."""
        x = x[:ERROR_ROWS]
        dequantized = int4_mm_reference(x, self.packed[0].packed())
        return _Exact(dequantized, x.double() @ self.original.double().t())

    def reading(self) -> dict[str, TimedCall]:
        """The call that reads only, if there is one."""
        weights = [w.packed() for w in self.packed]
        if native_kernel(weights[0].layout) is None:
            return {}
        return {READ: TimedCall(lambda i: read_at_best(weights[i]))}

    def kernels(self, x: Tensor, *, compiled: bool, prototype: bool) -> dict[str, TimedCall]:
        packed, dense = self.packed, self.dense
        k = packed[0].shape[1]
        padded = F.pad(x, (0, packed[0].qdata.shape[1] * 2 - k))
        bf16 = x.to(torch.bfloat16)
        group_size = packed[0].group_size
        scales = [w.scale_and_zero.to(x.dtype) for w in packed]  # the raw op wants x's dtype
        op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        kernels = {
            "bf16 linear": TimedCall(lambda i: F.linear(bf16, dense[i % len(dense)])),
            "aten op": TimedCall(lambda i: op(padded, packed[i].qdata, group_size, scales[i])),
            "ours": TimedCall(lambda i: F.linear(x, packed[i])),
        }
        if native_kernel(packed[0].packed().layout) is not None:
            kernels["ours aten"] = kernels["ours"]._replace(selection="aten")
        if takes_int8(packed[0].packed().layout, len(x)):
            kernels["ours int8"] = kernels["ours"]._replace(selection="native", activations="int8")
        if prototype:
            upstream = [_prototype(w) for w in packed]
            kernels["torchao prototype"] = TimedCall(lambda i: F.linear(bf16, upstream[i]))
        if compiled:
            torch.compiler.reset()
            several = torch.compile(
                lambda t, ws: [F.linear(t, w) for w in ws], fullgraph=True, dynamic=False
            )
            size = COMPILED_LAYERS
            kernels["ours compiled"] = TimedCall(
                lambda i: several(x, packed[i * size : (i + 1) * size])[0], size
            )
        return kernels


def _prototype(w: Int4OpaqueTensor) -> Tensor:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Prototype

    tensor: Tensor = Prototype(w.qdata, w.scale_and_zero, w.block_size, w.shape)
    return tensor

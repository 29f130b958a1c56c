"""Time the experts of a layer: a few of many, as a mixture of experts does for each token.

What an expert costs should depend on how many are hit and not on how many there are. Every figure is
measured in one run, the kernels in turn, on other experts in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.bench.layers import CYCLE_BYTES, Limits, measure_limits, random_weight
from torchao_int4cpu.bench.timing import TimedCall, interleaved


@dataclass(frozen=True)
class MoeShape:
    """The experts of a layer; the default is one matrix of Qwen3-30B-A3B.

    Attributes:
        experts: E, the number of them.
        hit: the number of those hit in a call, each by ``tokens / hit`` tokens.
        n, k: out features and in features of an expert.
    """

    experts: int = 128
    hit: int = 8
    n: int = 1536
    k: int = 2048


@dataclass(frozen=True)
class MoeRow:
    """One way to multiply, for the given number of pairs of token and expert.

    Attributes:
        kernel: ``hit of all`` (F.grouped_mm on the whole stack), ``hit of hit`` (on stacks of just so
            many), ``loop w[e]``, ``index + bmm``, and ``bf16 hit of all`` (a dense stack).
        pairs: rows of the activation: pairs of a token and an expert that it is sent to.
        experts, hit: of the stack, and in each call.
        ms: median milliseconds of one call.
        limit_ms: the least for the bytes of the experts that are hit, at the measured bandwidth.
        weight_gb_per_s: bytes of the experts that are hit, 1e9 a second.
        vs_hit_only: time of this divided by that of ``hit of hit``; 1 if the others cost nothing.
        speed_vs_bf16: time of ``bf16 hit of all`` divided by this.
        relative_error: norm of the difference to the product with the dequantized experts, of the norm
            of that.
    """

    kernel: str
    pairs: int
    experts: int
    hit: int
    ms: float
    limit_ms: float
    weight_gb_per_s: float
    vs_hit_only: float
    speed_vs_bf16: float
    relative_error: float


def run(
    shape: MoeShape,
    pairs: Sequence[int],
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    passes: int = 7,
    limits: Limits | None = None,
) -> Iterator[MoeRow]:
    """Measure for each number of pairs of token and expert.

    Raises:
        ValueError: more experts are to be hit than there are, or than there are pairs; or N or K is no
            multiple of 8.
    """
    if not 1 <= shape.hit <= shape.experts:
        raise ValueError(f"hit={shape.hit} of experts={shape.experts}; hit from 1 to all of them")
    if shape.n % 8 or shape.k % 8:
        raise ValueError(
            f"experts of shape {shape.n}x{shape.k} cannot be compared with bfloat16, because its "
            "grouped_mm takes multiples of 8 only; choose such"
        )
    for count in pairs:
        if count < shape.hit:
            raise ValueError(
                f"{count} rows cannot hit {shape.hit} experts; give at least {shape.hit}, or hit fewer"
            )
    limits = limits or measure_limits()
    experts = _Experts(shape, group_size, dtype)
    for count in pairs:
        x = torch.randn(count, shape.k, dtype=torch.float32).to(dtype)
        with torch.no_grad():
            kernels = experts.kernels(x)
            times = interleaved(
                {name: TimedCall(call) for name, call in kernels.items()}, experts.calls, passes
            )
            errors = {name: experts.relative_error(x, call(0)) for name, call in kernels.items()}
        for name, value in times.items():
            dense = name == DENSE
            moved = shape.hit * (shape.n * shape.k * 2 if dense else experts.bytes_of_one)
            yield MoeRow(
                kernel=name,
                pairs=count,
                experts=shape.hit if name == HIT_ONLY else shape.experts,
                hit=shape.hit,
                ms=value * 1e3,
                limit_ms=limits.ms(moved, 2 * count * shape.n * shape.k),
                weight_gb_per_s=moved / value / 1e9,
                vs_hit_only=value / times[HIT_ONLY],
                speed_vs_bf16=times[DENSE] / value,
                relative_error=errors[name],
            )


ALL, HIT_ONLY, LOOP, INDEXED, DENSE = (
    "hit of all",
    "hit of hit",
    "loop w[e]",
    "index + bmm",
    "bf16 hit of all",
)


class _Experts:
    """A stack of random experts, 4-bit and dense, and which are hit in each call."""

    def __init__(self, shape: MoeShape, group_size: int, dtype: torch.dtype) -> None:
        self.stack = random_weight((shape.experts, shape.n, shape.k), group_size, dtype)
        parts = (self.stack.qdata, self.stack.scale_and_zero)
        self.bytes_of_one = sum(part.nbytes for part in parts) // shape.experts
        self.dense = torch.stack([one.dequantize() for one in self.stack]).to(torch.bfloat16)
        # Other experts in every call, until together they take more than any cache.
        needed = -(-CYCLE_BYTES // (self.bytes_of_one * shape.hit))
        self.calls = max(1, min(needed, shape.experts // shape.hit))
        order = torch.arange(self.calls * shape.hit).view(self.calls, shape.hit)
        self.chosen = [row.tolist() for row in order]
        self.small = [self.stack[row].clone() for row in order]  # contiguous stacks of their own

    def kernels(self, x: Tensor) -> dict[str, Callable[[int], Tensor]]:
        stack, hit = self.stack, len(self.chosen[0])
        sizes = [len(part) for part in torch.arange(len(x)).tensor_split(hit)]
        ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
        transposed, dense_transposed = stack.transpose(-2, -1), self.dense.transpose(-2, -1)
        offsets = []
        for chosen in self.chosen:
            counts = torch.zeros(len(stack), dtype=torch.int32)
            counts[chosen] = torch.tensor(sizes, dtype=torch.int32)
            offsets.append(counts.cumsum(0).to(torch.int32))
        small = [one.transpose(-2, -1) for one in self.small]
        bf16 = x.to(torch.bfloat16)

        def loop(i: int) -> Tensor:
            parts = zip(self.chosen[i], x.split(sizes))
            return torch.cat([F.linear(rows, stack[e]) for e, rows in parts])

        kernels: dict[str, Callable[[int], Tensor]] = {
            DENSE: lambda i: F.grouped_mm(bf16, dense_transposed, offs=offsets[i]),
            HIT_ONLY: lambda i: F.grouped_mm(x, small[i], offs=ends),
            ALL: lambda i: F.grouped_mm(x, transposed, offs=offsets[i]),
            LOOP: loop,
        }
        if len(x) == hit:  # one expert for each row, as the "batched_mm" of transformers has it
            index = [torch.tensor(chosen) for chosen in self.chosen]
            kernels[INDEXED] = lambda i: torch.bmm(stack[index[i]], x.unsqueeze(-1)).squeeze(-1)
        return kernels

    def relative_error(self, x: Tensor, y: Tensor) -> float:
        """Of the first call."""
        exact = torch.cat(
            [
                rows.double() @ self.stack[e].to_groupwise().dequantize(torch.float64).t()
                for e, rows in zip(self.chosen[0], x.tensor_split(len(self.chosen[0])))
            ]
        )
        return float((y.double() - exact).norm() / exact.norm())

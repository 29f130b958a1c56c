"""Time what cuts, gathers and joins cost, beside the same on a dense bfloat16 weight.

Every figure is measured in one run, the two in turn, over so many distinct weights that no cache holds
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.bench.layers import CYCLE_BYTES, random_weight
from torchao_int4cpu.bench.timing import TimedCall, interleaved
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4Weight, weight_of

#: Tokens that the gathers of rows ask for: one, and a prompt.
GATHERED = (1, 512)


@dataclass(frozen=True)
class ViewRow:
    """One operation at one shape.

    Attributes:
        n, k: rows and columns of the weight.
        group_size: codes that share a scale.
        operation: what is done; `OPERATIONS` of the result says how.
        result: ``view`` if it shares the bytes of the weight, ``copy`` if it is packed or expanded.
        ms: median milliseconds on a 4-bit weight.
        dense_ms: the same on a bfloat16 weight, made contiguous where the 4-bit one is a copy.
        copied_bytes: of the result's parts, 0 for a view.
    """

    n: int
    k: int
    group_size: int
    operation: str
    result: str
    ms: float
    dense_ms: float
    copied_bytes: int


def operations(n: int, k: int, group_size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed, by name, on a weight ``[n, k]``; the same on a 4-bit and a dense one."""
    half_n = n // 2 // 64 * 64
    half_k = k // 2 // group_size * group_size
    found: dict[str, Callable[[Tensor], Tensor]] = {"transpose": lambda w: w.t()}
    if half_n:
        found["half of N, on a block"] = lambda w: w.narrow(0, 0, half_n)
        found["half of N, in a block"] = lambda w: w.narrow(0, 3, half_n)
        found["shard of N, 1 of 2"] = lambda w: w.chunk(2, 0)[0].clone()
        found["join halves of N"] = lambda w: torch.cat([w[:half_n], w[half_n:]])
    if half_k:
        found["half of K"] = lambda w: w.narrow(1, 0, half_k)
        found["join halves of K"] = lambda w: torch.cat([w[:, :half_k], w[:, half_k:]], 1)
    if half_k and 2 * half_k == k:
        found["shard of K, 1 of 2"] = lambda w: w.chunk(2, 1)[0].clone()
    for tokens in GATHERED:
        index = torch.randint(0, n, (tokens,))
        found[f"embedding of {tokens}"] = lambda w, index=index: F.embedding(index, w)  # type: ignore[misc]
    return found


def run(
    shapes: Sequence[tuple[int, int]], *, group_size: int = 128, passes: int = 7
) -> Iterator[ViewRow]:
    """Measure every operation at every shape ``(N, K)``."""
    for n, k in shapes:
        packed, dense = _weights(n, k, group_size)
        for name, operation in operations(n, k, group_size).items():
            with torch.no_grad():
                result = operation(packed[0])
                copied = _copied_bytes(result, packed[0])
                calls = _calls(operation, packed, dense, copied > 0)
                times = interleaved(calls, len(packed), passes)
            yield ViewRow(
                n=n,
                k=k,
                group_size=group_size,
                operation=name,
                result="copy" if copied else "view",
                ms=times["ours"] * 1e3,
                dense_ms=times["dense"] * 1e3,
                copied_bytes=copied,
            )


def _calls(
    operation: Callable[[Tensor], Tensor],
    packed: Sequence[Tensor],
    dense: Sequence[Tensor],
    copies: bool,
) -> dict[str, TimedCall]:
    def on_dense(i: int) -> Tensor:
        result = operation(dense[i % len(dense)])
        return result.contiguous() if copies else result

    return {"ours": TimedCall(lambda i: operation(packed[i])), "dense": TimedCall(on_dense)}


def _weights(n: int, k: int, group_size: int) -> tuple[list[Int4OpaqueTensor], list[Tensor]]:
    first = random_weight((n, k), group_size)
    count = max(2, min(64, CYCLE_BYTES // (first.qdata.nbytes + first.scale_and_zero.nbytes)))
    dense = first.dequantize()
    dense_count = max(2, min(count, CYCLE_BYTES // dense.nbytes))
    return (
        [first] + [first.clone() for _ in range(count - 1)],
        [dense] + [dense.clone() for _ in range(dense_count - 1)],
    )


def _copied_bytes(result: Tensor, source: Int4OpaqueTensor) -> int:
    """Bytes of memory that the result has and the weight has not."""
    if not isinstance(result, Int4Weight):
        return result.nbytes
    weight = weight_of(result)
    if weight.qdata.untyped_storage().data_ptr() == source.qdata.untyped_storage().data_ptr():
        return 0
    return weight.qdata.nbytes + weight.scale_and_zero.nbytes

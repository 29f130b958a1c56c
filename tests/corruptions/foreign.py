"""Weights of other tools: noise in their files, and parts that are not what the format says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tests.corruptions.case import Case, Family
from tests.corruptions.raw import flips, overwritten, swapped, truncations
from tests.foreign_checkpoints import (
    awq_parts,
    compressed_tensors_parts,
    foreign,
    gptq_parts,
    mlx_parts,
)
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.importers.awq import groupwise_of_awq
from torchao_int4cpu.importers.compressed_tensors import groupwise_of_compressed_tensors
from torchao_int4cpu.importers.gguf import KINDS, groupwise_of_gguf
from torchao_int4cpu.importers.gptq import groupwise_of_gptq
from torchao_int4cpu.importers.mlx import groupwise_of_mlx
from torchao_int4cpu.importers.onnx import groupwise_of_onnx

_N, _K = 24, 256

#: What reads the parts of a weight, by the format.
READERS: dict[str, Callable[..., GroupwiseInt4]] = {
    "gptq": functools.partial(groupwise_of_gptq, k=_K, version=1),
    "gptq_v2": functools.partial(groupwise_of_gptq, k=_K, version=2),
    "awq": functools.partial(groupwise_of_awq, k=_K),
    "compressed-tensors": groupwise_of_compressed_tensors,
    "mlx": functools.partial(groupwise_of_mlx, k=_K),
    "onnx": functools.partial(groupwise_of_onnx, n=_N, k=_K, bits=4, group_size=32),
    **{kind: functools.partial(groupwise_of_gguf, kind=kind, k=_K) for kind in KINDS},
}


@functools.cache
def good_parts() -> dict[str, dict[str, Tensor]]:
    """Of a weight of each format; GPTQ's has an order of columns."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(_N, _K, generator=generator)
    weight = foreign(dense, 32, False)
    ordered = foreign(dense, 64, False, torch.randperm(_K, generator=generator))
    pairs = [t[:, 0::2] | (t[:, 1::2] << 4) for t in (weight.codes, weight.points.to(torch.uint8))]
    found = {
        "gptq": gptq_parts(ordered),
        "gptq_v2": gptq_parts(ordered, 2),
        "awq": awq_parts(weight),
        "compressed-tensors": compressed_tensors_parts(ordered),
        "mlx": mlx_parts(weight),
        "onnx": {"b": pairs[0].view(_N, -1, 16), "scales": weight.scale, "zero_points": pairs[1]},
    }
    for kind, (columns, size, _) in KINDS.items():
        blocks = torch.randint(0, 256, (_N, _K // columns, size), generator=generator).to(torch.uint8)
        blocks[..., :4] = torch.tensor([0, 40, 0, 36], dtype=torch.uint8)  # float16: 0.031, 0.016
        found[kind] = {"blocks": blocks.flatten(1)}
    return found


def written(format: str, parts: Mapping[str, Tensor]) -> bytes:
    return save({f"{format}/{name}": part.clone().contiguous() for name, part in parts.items()})


def _files() -> dict[str, bytes]:
    return {format: written(format, parts) for format, parts in good_parts().items()}


def _changes(part: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a part might be instead."""
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64):
        if dtype != part.dtype:
            yield f"as {dtype}", part.to(dtype)
    yield "bfloat16", part.to(torch.bfloat16)
    yield "a row less", part[:-1]
    yield "a row more", torch.cat([part, part[:1]])
    yield "a column less", part[..., :-1]
    yield "a column more", torch.cat([part, part[..., :1]], -1)
    yield "twice", torch.cat([part, part])
    yield "twice, beside", torch.cat([part, part], -1)
    yield "transposed", part.transpose(0, -1)
    yield "flat", part.flatten()
    yield "a dimension more", part[None]
    yield "nothing", part[:0]
    yield "no columns", part[..., :0]
    yield "one number", part.flatten()[0]
    yield "zeros", torch.zeros_like(part)
    yield "all bits", torch.full_like(part.contiguous().view(torch.uint8), 255).view(part.dtype)
    if part.dtype.is_floating_point:
        numbers: tuple[Any, ...] = (torch.nan, torch.inf, -torch.inf, torch.finfo(part.dtype).max)
        numbers += (torch.finfo(part.dtype).tiny, -1.0)
    else:
        info = torch.iinfo(part.dtype)
        numbers = (info.max, info.min, 1, info.max // 2)
    for number in numbers:
        yield f"all {number}", torch.full_like(part, number)
        one = part.flatten().clone()
        one[len(one) // 2] = number
        yield f"one {number}", one.view(part.shape)


def _parts() -> Iterator[Case]:
    for format, parts in good_parts().items():
        for name, part in parts.items():
            for what, changed in _changes(part):
                yield Case(f"{format}: {name} {what}", written(format, parts | {name: changed}))
            less = {other: parts[other] for other in parts if other != name}
            yield Case(f"{format}: no {name}", written(format, less))


def _exchanged() -> Iterator[Case]:
    """The parts of one format as those of another."""
    for format in good_parts():
        for other, parts in good_parts().items():
            if format != other:
                yield Case(f"{other} as {format}", written(format, parts))


FOREIGN: dict[str, Family] = {
    "foreign-truncated": lambda: truncations(_files(), 30),
    "foreign-flipped": lambda: flips(_files(), 60),
    "foreign-overwritten": lambda: overwritten(_files(), 24),
    "foreign-swapped": lambda: swapped(_files(), 12),
    "foreign-parts": _parts,
    "foreign-exchanged": _exchanged,
}

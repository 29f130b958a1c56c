"""Weights of torchao's 4-bit formats for other devices and for export, as ours; codes are exact.

``Int4Tensor`` ("plain", for GPUs): two's complement, scale and zero in the order of groups::

    qdata       int8  [N, K/2]   byte j of row n holds columns 2 j (low) and 2 j + 1 (high)
    scale       float [G, N]
    zero_point  float [G, N]     in weight units
    W[n, k] = scale[g, n] * q + zero_point[g, n]        -8 <= q <= 7

``Int4TilePackedTo4dTensor`` (tinygemm, for GPUs): N and K padded, the tiles of a tensor core, of 8 rows
by 16 columns. Thread t holds columns c = 2 (t % 4) + (0, 1, 8, 9) of row t / 4; a word has two tiles::

    qdata           int32     [N/8, K/128, 32, 4]   nibbles of the word, the lowest first: columns
                                                    0 8 16 24 1 9 17 25, and 2 (t % 4) more
    scale_and_zero  bfloat16  [G, N, 2]             as ours

``IntxUnpackedToInt8Tensor`` with int4 (for export)::

    qdata       int8  [N, K]     -8 to 7
    scale       float [N, G]
    zero_point  int8 or float [N, G]
    W[n, k] = scale[n, g] * (q - zero_point[n, g])

The first is what torchao's library of GPU kernels makes, the second the kernel of PyTorch; neither was
run here. The third is compared with torchao itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES, GroupwiseInt4
from torchao_int4cpu.importers.groups import in_our_groups
from torchao_int4cpu.importers.weight import qparams_dtype_of
from torchao_int4cpu.importers.words import CODES, check_part
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # only torch's stubs lack it

_TILE_ROWS, _TILE_COLUMNS, _THREADS, _INNER = 8, 16, 32, 8
#: Column of a pair of tiles that nibble i of the word of a thread with t % 4 == 0 holds.
_NIBBLES = (0, 8, 16, 24, 1, 9, 17, 25)


def _plain(parts: Mapping[str, Any], shape: Sequence[int]) -> GroupwiseInt4:
    n, k = shape
    group_size = _group_size(parts, k)
    groups = -(-k // group_size)
    qdata, scale, zero = parts["qdata"], parts["scale"], parts["zero_point"]
    check_part("qdata", qdata, (torch.int8, torch.uint8), (n, k // 2))
    check_part("scale", scale, FLOAT_DTYPES, (groups, n))
    check_part("zero_point", zero, FLOAT_DTYPES, (groups, n))
    if parts.get("activation_dtype") not in (None, torch.bfloat16, torch.float16):
        raise TypeError(
            f"the weight is for activations in {parts['activation_dtype']}, which are not rounded "
            "here; quantize the original weight again"
        )
    raw = qdata.view(torch.uint8)
    codes = torch.stack([raw & 15, raw >> 4], dim=-1).view(n, k) ^ CODE_OFFSET
    return in_our_groups(codes, scale.t().float(), zero.t().float(), group_size)


def _tiles(parts: Mapping[str, Any], shape: Sequence[int]) -> GroupwiseInt4:
    n, k = shape
    group_size = _group_size(parts, k)
    qdata, pairs = parts["qdata"], parts["scale_and_zero"]
    of_k = _TILE_COLUMNS * _INNER
    tall, wide = getattr(qdata, "shape", (0, 0))[:2] or (0, 0)
    if tall * _TILE_ROWS < n or wide * of_k < k or (wide * of_k) % group_size:
        raise ValueError(
            f"qdata has {tall} tiles of {_TILE_ROWS} rows and {wide} of {of_k} columns, and the weight "
            f"shape [{n}, {k}] in groups of {group_size}; the file is damaged"
        )
    check_part("qdata", qdata, (torch.int32,), (tall, wide, _THREADS, _INNER // 2))
    groups = wide * of_k // group_size
    check_part("scale_and_zero", pairs, (torch.bfloat16,), (groups, tall * _TILE_ROWS, 2))
    shifts = torch.arange(CODES, dtype=torch.int32) * 4
    # [tile of rows, of columns, row, quarter, pair of tiles, nibble]
    nibbles = (qdata.view(tall, wide, _TILE_ROWS, 4, _INNER // 2, 1) >> shifts) & 15
    columns = (
        torch.tensor(_NIBBLES)
        + 2 * torch.arange(4).view(4, 1, 1)
        + 2 * _TILE_COLUMNS * torch.arange(_INNER // 2).view(-1, 1)
    )
    codes = torch.empty(tall, _TILE_ROWS, wide, of_k, dtype=torch.uint8)
    codes[..., columns.flatten()] = nibbles.to(torch.uint8).transpose(1, 2).flatten(3)
    scale, zero = pairs[: -(-k // group_size), :n].permute(2, 1, 0).float()
    return in_our_groups(codes.view(tall * _TILE_ROWS, -1)[:n, :k], scale, zero, group_size)


def _unpacked(parts: Mapping[str, Any], shape: Sequence[int]) -> GroupwiseInt4:
    n, k = shape
    group_size = _group_size(parts, k)
    qdata, scale, points = parts["qdata"], parts["scale"], parts["zero_point"]
    if parts.get("target_dtype") != _INT4:
        raise TypeError(f"the weight has {parts.get('target_dtype')}; only torch.int4 can be converted")
    if parts.get("activation_quantization") is not None:
        raise TypeError(
            f"the weight is for activations in 8 bits ({parts['activation_quantization']}); only "
            "weight-only tensors can be converted, so quantize the original weight again"
        )
    groups = -(-k // group_size)
    check_part("qdata", qdata, (torch.int8,), (n, k))
    check_part("scale", scale, FLOAT_DTYPES, (n, groups))
    check_part("zero_point", points, (torch.int8, *FLOAT_DTYPES), (n, groups))
    if int(qdata.min()) < -CODE_OFFSET or int(qdata.max()) >= CODE_OFFSET:
        raise ValueError("qdata has numbers beyond -8 and 7; the file is damaged")
    codes = (qdata + CODE_OFFSET).to(torch.uint8)
    return in_our_groups(codes, scale.float(), -points.float() * scale.float(), group_size)


#: By the name of the class in a pickle: what reads its parts.
FORMATS: dict[str, Callable[[Mapping[str, Any], Sequence[int]], GroupwiseInt4]] = {
    "torchao.quantization.Int4Tensor": _plain,
    "torchao.quantization.Int4TilePackedTo4dTensor": _tiles,
    "torchao.quantization.IntxUnpackedToInt8Tensor": _unpacked,
}


def weight_of_parts(
    name: str, parts: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
) -> Int4OpaqueTensor:
    """The weight that the parts of one of torchao's tensors stand for.

    Args:
        name: a key of `FORMATS`.
        parts: its attributes.
        shape: ``[N, K]``, of a plain one also ``[E, N, K]``.
        dtype: the logical one.

    Raises:
        TypeError, ValueError: a part is missing or damaged, or there are other bits, or rounded
            activations.
    """
    read = FORMATS[name]
    missing = [part for part in ("qdata", "block_size") if part not in parts]
    if missing or (parts.keys() & {"scale", "scale_and_zero"}) == set():
        raise ValueError(f"the tensor has only {', '.join(map(str, parts))}; the file is damaged")
    if len(shape) == 3:
        stacked = [parts[part] for part in ("qdata", "scale", "zero_point") if part in parts]
        if any(not isinstance(p, Tensor) or p.shape[:1] != shape[:1] for p in stacked):
            raise ValueError(f"the parts of a stack of {shape[0]} have other lengths; it is damaged")
        names = [part for part in ("qdata", "scale", "zero_point") if part in parts]
        matrices = [read(dict(parts) | dict(zip(names, some)), shape[1:]) for some in zip(*stacked)]
        codes, scale, zero = (
            torch.stack([getattr(each, part) for each in matrices])
            for part in ("codes", "scale", "zero")
        )
        groupwise = GroupwiseInt4(codes, scale, zero, matrices[0].group_size)
    else:
        groupwise = read(parts, shape)
    return Int4OpaqueTensor.from_groupwise(
        groupwise,
        dtype=dtype,
        act_pre_scale=parts.get("act_pre_scale"),
        qparams_dtype=_qparams_dtype(parts, groupwise),
    )


def _qparams_dtype(parts: Mapping[str, Any], groupwise: GroupwiseInt4) -> torch.dtype:
    """That of the tensor's own, if it can be."""
    of_parts = parts.get("scale", parts.get("scale_and_zero"))
    whole = parts.get("zero_point")
    exact = (isinstance(whole, Tensor) and whole.dtype.is_floating_point) or whole is None
    if exact and isinstance(of_parts, Tensor) and of_parts.dtype == torch.bfloat16:
        return torch.bfloat16
    return qparams_dtype_of(groupwise)


def _group_size(parts: Mapping[str, Any], k: int) -> int:
    block_size = parts["block_size"]
    valid = isinstance(block_size, (list, tuple)) and len(block_size) in (2, 3)
    if not valid or any(type(b) is not int or b < 1 for b in block_size) or set(block_size[:-1]) != {1}:
        raise ValueError(
            f"block_size is {block_size!r}; only groups along K can be converted, [1, group_size]"
        )
    size: int = block_size[-1]
    return min(size, k)

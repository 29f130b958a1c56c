"""Weights of GGUF files (llama.cpp), those with 4-bit codes: Q4_0, Q4_1 and Q4_K.

A row of W is a row of blocks of bytes, of 32 columns, or of 8 times 32 with 6-bit scales (Q4_K)::

    Q4_0   18 bytes   d: float16 | 16 bytes: byte j holds columns j (low) and j + 16 (high)
    Q4_1   20 bytes   d, m: float16 | the same 16 bytes
    Q4_K  144 bytes   d, dmin: float16 | 12 bytes: 8 pairs (sc, mn) of 6 bits | 4 runs of 32 bytes:
                      byte j of run i holds column j of blocks 2 i (low) and 2 i + 1 (high)

    Q4_0: W = d * (code - 8)    Q4_1: W = d * code + m    Q4_K: W = d * sc * code - dmin * mn

The tests compare it with the package ``gguf``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, GroupwiseInt4
from torchao_int4cpu.importers.words import check_part

_BLOCK = 32
_SUPER = 8  # blocks of a Q4_K


def groupwise_of_gguf(blocks: Tensor, kind: str, k: int) -> GroupwiseInt4:
    """A weight of a GGUF file, codes exact; scale and zero float32, in groups of 32.

    Args:
        blocks: uint8 ``[N, bytes of a row]``.
        kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q4_K"``.
        k: K, a multiple of the columns of a block.

    Raises:
        TypeError: ``blocks`` is not uint8.
        ValueError: another kind, or a number of bytes that is not that of K columns.
    """
    if kind not in KINDS:
        raise ValueError(
            f"{kind} is not one of {', '.join(KINDS)}: it has more or other than 16 even levels; "
            "dequantize it, and keep it dense or quantize it"
        )
    columns, size, read = KINDS[kind]
    if k < 1 or k % columns != 0 or blocks.ndim != 2 or len(blocks) == 0:
        raise ValueError(
            f"got {kind} blocks of shape {list(blocks.shape)} for {k} columns; they must be [N, bytes] "
            f"with a row or more, and the columns a multiple of {columns}, so the file is damaged"
        )
    check_part("blocks", blocks, (torch.uint8,), (blocks.shape[0], k // columns * size))
    codes, scale, zero = read(blocks.reshape(blocks.shape[0], -1, size))
    n = blocks.shape[0]
    return GroupwiseInt4(codes.reshape(n, k), scale.reshape(n, -1), zero.reshape(n, -1), _BLOCK)


def gguf_of_groupwise(weight: GroupwiseInt4, kind: str) -> tuple[Tensor, GroupwiseInt4]:
    """The blocks of a weight, and the weight that these stand for. Blocks of a group share its numbers.

    Args:
        weight: of any group size, K a multiple of 32.
        kind: ``"Q4_1"``, or ``"Q4_0"`` for a weight whose zeros are all 0.

    Returns:
        uint8 ``[N, bytes of a row]``.

    Raises:
        ValueError: the weight has an order of columns, or a number does not fit float16.
    """
    if weight.act_order is not None:
        raise ValueError(
            "the weight has groups of columns in another order (act_order), which GGUF has not; export "
            "it as gptq"
        )
    n, k = weight.shape
    blocks = torch.arange(k // _BLOCK) * _BLOCK // weight.group_size
    scale, zero = (part[:, blocks].float() for part in (weight.scale, weight.zero))
    numbers = [scale] if kind == "Q4_0" else [scale, zero - CODE_OFFSET * scale]
    halves = torch.stack(numbers, dim=-1).to(torch.float16)
    if not bool(halves.isfinite().all()):
        raise ValueError("a scale or minimum does not fit float16; divide the weight by a constant")
    low, high = weight.codes.view(n, -1, 2, _BLOCK // 2).unbind(2)
    raw = torch.cat([halves.view(torch.uint8), low | (high << 4)], dim=-1).flatten(1)
    return raw, groupwise_of_gguf(raw, kind, k)


def _float16(blocks: Tensor, count: int) -> Tensor:
    """The float16 numbers that blocks begin with, ``[..., count]`` as float32."""
    return blocks[..., : 2 * count].contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """Low nibbles, then high ones."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _float16(blocks, 1)
    return _nibbles(blocks[..., 2:]), scale, torch.zeros_like(scale)


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, m = _float16(blocks, 2).unbind(-1)
    return _nibbles(blocks[..., 4:]), d, m + CODE_OFFSET * d


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, dmin = (part.unsqueeze(-1) for part in _float16(blocks, 2).unbind(-1))
    # Of 12 bytes, 4 and 4 hold the 6 bits of blocks 0 to 3, and in their 2 upper bits those of blocks
    # 4 to 7, whose lower 4 are in the nibbles of the last 4.
    low, middle, high = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=-1).float()
    minima = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=-1).float()
    runs = blocks[..., 16:].unflatten(-1, (_SUPER // 2, _BLOCK))
    codes = torch.stack([runs & 15, runs >> 4], dim=-2)
    scale = d * scales
    return codes, scale, CODE_OFFSET * scale - dmin * minima


#: By the name of the kind: columns and bytes of a block, and what reads blocks ``[N, blocks, bytes]``.
KINDS: dict[str, tuple[int, int, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]] = {
    "Q4_0": (_BLOCK, 18, _q4_0),
    "Q4_1": (_BLOCK, 20, _q4_1),
    "Q4_K": (_BLOCK * _SUPER, 144, _q4_k),
}

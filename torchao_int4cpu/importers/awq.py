"""Weights of AWQ checkpoints (AutoAWQ's "gemm" version), 4 bits.

Stored transposed, a word holds 8 rows of W (outputs), in an order of its own::

    qweight  int32    [K, N/8]   nibble ORDER[i] of qweight[k, c] is the code of W[8 c + i, k]
    qzeros   int32    [G, N/8]   likewise, the zero points of a group
    scales   float16  [G, N]

    W[n, k] = scales[k // group_size, n] * (code - zero point)

A sketch of this layout was compared with GPTQModel's reading of AWQ.
"""

from __future__ import annotations

from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES, GroupwiseInt4
from torchao_int4cpu.importers.groups import group_size_of, in_our_groups
from torchao_int4cpu.importers.words import CODES, check_part, check_words, unpack_words

#: The nibble that holds row i of the eight of a word.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def groupwise_of_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, k: int, group_size: int | None = None
) -> GroupwiseInt4:
    """A weight of an AWQ checkpoint, codes exact; scale and zero float32, as the file means them.

    Args:
        qweight: int32 ``[K, N/8]``.
        qzeros: int32 ``[G, N/8]``.
        scales: float16, bfloat16 or float32 ``[G, N]``.
        k: K.
        group_size: of the checkpoint, see `group_size_of`.

    Raises:
        TypeError: a part has the wrong dtype.
        ValueError: another version of AWQ, parts that do not fit together, or groups of a size that
            there is not here.
    """
    if qweight.ndim != 2 or scales.ndim != 2 or qweight.shape[0] != k:
        raise ValueError(
            f"qweight has shape {list(qweight.shape)} for {k} inputs; only AWQ's version 'gemm' is "
            "read, [K, N/8] in 4 bits, so convert the checkpoint to that, or load it with GPTQModel"
        )
    groups, n = scales.shape
    check_words(qweight=(qweight, (k, -(-n // CODES))), qzeros=(qzeros, (groups, -(-n // CODES))))
    check_part("scales", scales, FLOAT_DTYPES, (groups, n))
    group_size = group_size_of(k, groups, group_size)
    codes = unpack_words(qweight, 1, ORDER)[:, :n].t()
    points = unpack_words(qzeros, 1, ORDER)[:, :n].t().float()
    scale = scales.t().float()
    return in_our_groups(codes, scale, (CODE_OFFSET - points) * scale, group_size)

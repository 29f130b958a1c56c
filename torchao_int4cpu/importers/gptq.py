"""Weights of GPTQ checkpoints (AutoGPTQ, GPTQModel), 4 bits.

Stored transposed, a word holds 8 columns of a row of W (an output)::

    qweight  int32    [K/8, N]   nibble i of qweight[r, n] is the code of W[n, 8 r + i]
    qzeros   int32    [G, N/8]   nibble i of qzeros[g, c] is the zero point of row 8 c + i; less 1 in
                                 version 1, which has no zero point 0
    scales   float16  [G, N]
    g_idx    int32    [K]        the group of each column

    W[n, k] = scales[g_idx[k], n] * (code - zero point)

A sketch of this layout read what GPTQModel writes, and GPTQModel what the sketch wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.format.act_order import out_of_act_order
from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES, GroupwiseInt4
from torchao_int4cpu.importers.groups import group_size_of, in_our_groups
from torchao_int4cpu.importers.points import nearest_points
from torchao_int4cpu.importers.words import CODES, check_part, check_words, pack_words, unpack_words


def groupwise_of_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    k: int,
    version: int = 1,
    group_size: int | None = None,
) -> GroupwiseInt4:
    """A weight of a GPTQ checkpoint, codes exact; scale and zero float32, as the file means them.

    Args:
        qweight: int32 ``[K/8, N]``.
        qzeros: int32 ``[G, N/8]``.
        scales: float16, bfloat16 or float32 ``[G, N]``.
        g_idx: int32 ``[K]``, or None for groups in order.
        k: K.
        version: 1, whose zero points are stored less 1 (``checkpoint_format`` "gptq"), or 2
            ("gptq_v2").
        group_size: of the checkpoint, see `group_size_of`.

    Raises:
        TypeError: a part has the wrong dtype.
        ValueError: not 4 bits, parts that do not fit together, groups whose columns do not follow each
            other even when sorted, or of a size that there is not here.
    """
    if qweight.ndim != 2 or scales.ndim != 2:
        raise ValueError(
            f"qweight and scales have {qweight.ndim} and {scales.ndim} dimensions; both must have 2, "
            "so the file is damaged"
        )
    groups, n = scales.shape
    bits = 32 * qweight.shape[0] / k
    if qweight.shape[0] != -(-k // CODES):
        raise ValueError(
            f"qweight has {qweight.shape[0]} rows for {k} inputs, {bits:.3g} bits a weight; only 4 "
            "bits are read, so take a checkpoint of 4 bits, or load this one with GPTQModel"
        )
    check_words(qweight=(qweight, (-(-k // CODES), n)), qzeros=(qzeros, (groups, -(-n // CODES))))
    check_part("scales", scales, FLOAT_DTYPES, (groups, n))
    group_size = group_size_of(k, groups, group_size)
    act_order = act_order_of(g_idx, k, groups, group_size)
    codes = unpack_words(qweight, 0)[:k].t()
    points = unpack_words(qzeros, 1)[:, :n].t().float()
    scale = scales.t().float()
    zero = (CODE_OFFSET - points - int(version == 1)) * scale
    return in_our_groups(codes, scale, zero, group_size, act_order)


def gptq_of_groupwise(weight: GroupwiseInt4) -> tuple[dict[str, Tensor], GroupwiseInt4]:
    """The parts of a weight in version 2, by their names, and the weight that these stand for.

    Raises:
        ValueError: N or K is no multiple of 8, or as `nearest_points`.
    """
    n, k = weight.shape
    if n % CODES or k % CODES:
        raise ValueError(
            f"the weight has shape [{n}, {k}], and GPTQ packs eight rows, or eight columns, into a "
            "word; leave it dense (quantize with --skip)"
        )
    points, scale, value = nearest_points(weight)
    codes = out_of_act_order(weight.codes, weight.act_order)
    groups = torch.arange(k, dtype=torch.int32) // weight.group_size
    parts = {
        "qweight": pack_words(codes.t(), 0),
        "qzeros": pack_words(points.t(), 1),
        "scales": scale.t().contiguous(),
        "g_idx": out_of_act_order(groups, weight.act_order),
    }
    return parts, value


def act_order_of(g_idx: Tensor | None, k: int, groups: int, group_size: int) -> Tensor | None:
    """The order that brings the columns of a group together; None if they are.

    Args:
        g_idx: the group of each column; None for groups in order.
        k: K.
        groups: the number of groups.
        group_size: columns of a group.

    Returns:
        int32 ``[K]``: first the columns of group 0, as they follow each other, and so on.

    Raises:
        TypeError: ``g_idx`` is no tensor of integers.
        ValueError: it names a group that there is not, or does not fill the groups one by one.
    """
    if g_idx is None:
        return None
    check_part("g_idx", g_idx, (torch.int32, torch.int64), (k,))
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(
            f"g_idx has groups from {int(g_idx.min())} to {int(g_idx.max())} beside {groups} groups of "
            "scales; the file is damaged"
        )
    in_order = torch.arange(k) // group_size
    if torch.equal(g_idx.long(), in_order):
        return None
    found, order = g_idx.long().sort(stable=True)
    if not torch.equal(found, in_order):
        sizes = torch.bincount(found, minlength=groups)
        raise ValueError(
            f"g_idx puts {int(sizes.min())} to {int(sizes.max())} of {k} columns into a group; each "
            f"group but the last must have {group_size}, so the file is damaged"
        )
    return order.int()

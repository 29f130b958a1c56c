"""A `GroupwiseInt4` into the parts of a packed weight, and out of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, GroupwiseInt4
from torchao_int4cpu.format.layout import pack, unpack
from torchao_int4cpu.format.packed import PackedInt4


def pack_into(target: PackedInt4, groupwise: GroupwiseInt4) -> None:
    """Write codes, scales and zeros into the parts of a weight of the same shape, padding included.

    The padding is code 8 with scale and zero 0: weights that are exactly 0.
    """
    (padded_n, half_k), (n, k) = target.qdata.shape, groupwise.shape
    qparams = _stored(groupwise, target.scale_and_zero.dtype)
    codes = groupwise.codes
    if (padded_n, half_k * 2) != (n, k):
        codes = F.pad(codes, (0, half_k * 2 - k, 0, padded_n - n), value=CODE_OFFSET)
        qparams = F.pad(qparams, (0, 0, 0, padded_n - n))
    target.qdata.copy_(pack(codes.contiguous(), target.layout))
    target.scale_and_zero.copy_(qparams)


def _stored(groupwise: GroupwiseInt4, dtype: torch.dtype) -> Tensor:
    """Pairs of scale and zero of a matrix, ``[G, N, 2]`` in ``dtype``.

    Raises:
        ValueError: one is too large for it, or float16 would move a weight too far.
    """
    exact = torch.stack([groupwise.scale.t(), groupwise.zero.t()], dim=-1)
    if exact.dtype == dtype:
        return exact
    stored = exact.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        name = str(dtype).removeprefix("torch.")
        other = "" if dtype == torch.bfloat16 else ", or store them with qparams_dtype=torch.bfloat16"
        raise ValueError(
            f"scale or zero does not fit {name} ({torch.finfo(dtype).max:.3g} at most); divide the "
            f"weight by a constant{other}"
        )
    if dtype == torch.float16:
        # Half a step of a normal float16 is 2^-11 of the number, so only smaller numbers can fail.
        exact = exact.double()
        moved, largest = (
            CODE_OFFSET * part[..., 0] + part[..., 1] for part in ((stored - exact).abs(), exact.abs())
        )
        if bool((moved > 2.0**-11 * largest).any()):
            raise ValueError(
                "scale and zero of a group are too small for float16, which would move a weight by "
                f"{float((moved / largest).nan_to_num().max()):.1e} of the largest in its group (2^-11 "
                "at most); store them with qparams_dtype=torch.bfloat16, or multiply the weight by a "
                "constant"
            )
    return stored


def unpacked(weight: PackedInt4) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K]``, scale and zero ``[N, G]``."""
    codes = unpack(weight.qdata, weight.layout)[: weight.n, : weight.k].contiguous()
    scale, zero = weight.scale_and_zero[:, : weight.n].permute(2, 1, 0).contiguous()
    return codes, scale, zero

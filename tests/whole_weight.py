"""What a weight that was loaded from a damaged file must be: whole, whatever its numbers are."""

from __future__ import annotations

import copy
import ctypes
import io
import mmap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from tests.numerics import (
    assert_int4,
    native,
    product_bound,
)
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.checkpoint.safetensors import crc32
from torchao_int4cpu.format.checks import check_parts
from torchao_int4cpu.format.layout import layout_named
from torchao_int4cpu.format.packed import int4_mm_reference
from torchao_int4cpu.format.slicing import repack
from torchao_int4cpu.tensor.provenance import Provenance
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

Weight = Int4OpaqueTensor | Int4TransposedTensor


def opaque(t: Weight) -> Int4OpaqueTensor:
    return t.untransposed() if isinstance(t, Int4TransposedTensor) else t


def check_whole(t: Weight, *, repacked: bool) -> None:
    """Every promise of a weight, on one that came from a file."""
    if isinstance(t, Int4TransposedTensor):
        check_whole_view(t)
        check_whole(t.untransposed(), repacked=repacked)
        return
    *stack, n, k = t.shape
    check_parts(
        t.qdata, t.scale_and_zero, t.block_size, t.shape, t.qdata_layout, t.dtype, t.act_pre_scale
    )
    assert t.provenance == Provenance()
    for matrix in [t[i] for i in range(stack[0])] if stack else [t]:
        assert_int4(matrix, (n, k), t.block_size[-1])
    assert type(t.block_size) is list
    assert [type(size) for size in t.block_size] == [int] * t.ndim
    assert t.is_contiguous()
    assert t.storage_offset() == 0
    assert t.layout == torch.strided
    assert t.data_ptr() == 0, "it has a dense tensor's memory beside its parts"
    assert not t.requires_grad
    assert t.qdata_layout == native().name or not repacked
    parts = parts_of(t)
    for part in parts:
        assert type(part) is Tensor
        assert not part.requires_grad
        assert not part.is_neg()
        assert part.device.type == t.device.type
    assert "Int4OpaqueTensor(" in repr(t)
    if t.device.type == "cpu":
        for part in parts:
            assert last_byte(part) <= part.untyped_storage().nbytes()
        check_numbers_once(t)


def check_whole_view(t: Int4TransposedTensor) -> None:
    """It shows its weight, transposed: shape and strides, and the product."""
    weight = t.untransposed()
    assert type(weight) is Int4OpaqueTensor
    assert t.shape == weight.transpose(-2, -1).shape
    assert t.stride() == weight.transpose(-2, -1).stride()
    assert t.storage_offset() == 0
    assert t.layout == torch.strided
    assert t.data_ptr() == 0
    assert not t.requires_grad
    assert "Int4TransposedTensor(" in repr(t)
    if t.device.type == "cpu":
        x = torch.linspace(-1, 1, 3 * t.shape[-2]).view(3, -1)
        y = x @ t if t.ndim == 2 else torch.bmm(x.expand(t.shape[0], -1, -1), t)
        matrices = [weight] if t.ndim == 2 else list(weight)
        expected = torch.stack([F.linear(x, matrix) for matrix in matrices])
        assert torch.equal(y.view_as(expected).nan_to_num(), expected.nan_to_num())


def parts_of(t: Int4OpaqueTensor) -> list[Tensor]:
    optional = [part for part in (t.act_pre_scale, t.act_order) if part is not None]
    return [t.qdata, t.scale_and_zero, *optional]


def last_byte(part: Tensor) -> int:
    """Counted in the storage of the part: where the last of its elements ends."""
    last = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride()))
    return int(part.storage_offset() + last + 1) * part.element_size()


_checked: set[object] = set()


def check_numbers_once(t: Int4OpaqueTensor) -> None:
    """Most files and roads lead to the same few weights, and the numbers take the time."""
    content = tuple(
        bytes(part.contiguous().flatten().view(torch.uint8).tolist()) for part in parts_of(t)
    )
    described = (content, tuple(t.shape), t.block_size[-1], t.qdata_layout, t.dtype)
    if described not in _checked:
        _checked.add(described)
        check_groupwise(t)
        for matrix in [t] if t.ndim == 2 else list(t):
            check_products(matrix)
        check_saves(t)


def check_groupwise(t: Int4OpaqueTensor) -> None:
    if bool(t.scale_and_zero[..., : t.shape[-2], :].isfinite().all()):
        assert t.to_groupwise().shape == t.shape
        assert t.dequantize().dtype == t.dtype
    else:
        with pytest.raises(ValueError, match="NaN or infinite"):
            t.to_groupwise()


def check_products(t: Int4OpaqueTensor) -> None:
    """`F.linear` is x · Wᵀ within the derived bound, and touches nothing beyond the parts."""
    packed = t.packed()
    fenced = copy.deepcopy(t)
    fenced.qdata, fenced.scale_and_zero = fence(t.qdata), fence(t.scale_and_zero)
    fenced.qdata_layout = t.qdata_layout
    x = torch.linspace(-1, 1, 3 * packed.k + 1)[1:].view(3, packed.k)
    with torch.no_grad():
        y = F.linear(x, t)
        assert torch.equal(F.linear(x, fenced).isnan(), y.isnan())
        assert torch.equal(F.linear(x, fenced).nan_to_num(), y.nan_to_num())
        assert F.linear(x.bfloat16(), fenced).shape == y.shape
    qparams = t.scale_and_zero[:, : packed.n].float().abs().amax((0, 2))  # [N], NaN if one is
    assert not bool(y[:, ~qparams.isfinite()].isfinite().any()), "a number came of what is none"
    activation = x if t.act_pre_scale is None else x * t.act_pre_scale.reshape(-1)
    if t.act_order is not None:
        activation = activation[:, t.act_order.long()]
    if not bool((activation.abs() < 1e15).all()):
        return
    moderate = qparams < 1e15  # nothing overflows in float32
    error = (y.double() - int4_mm_reference(activation, packed)).abs()
    within = error <= product_bound(activation, packed, y.dtype)
    assert bool(within[:, moderate].all()), "the product is not that of the weight"


def check_saves(t: Int4OpaqueTensor) -> None:
    """Saved and loaded again in either format, the parts are the same bytes."""
    flat, metadata = flatten_tensor_state_dict({"layer.weight": t})
    for back in (
        torch.load(saved(t), weights_only=True),
        unflatten_tensor_state_dict(flat, metadata)[0]["layer.weight"],
    ):
        assert (back.shape, back.dtype) == (t.shape, t.dtype)
        source, target = layout_named(t.qdata_layout), layout_named(back.qdata_layout)
        matrices = [t.qdata] if t.ndim == 2 else list(t.qdata)
        expected = torch.stack([repack(matrix, source, target) for matrix in matrices])
        assert torch.equal(back.qdata.view_as(expected), expected)
        for mine, other in zip(parts_of(back)[1:], parts_of(t)[1:]):
            assert crc32(mine) == crc32(other)


def saved(thing: object, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    buffer.seek(0)
    return buffer


M_ARENA_MAX = -8
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fence(part: Tensor) -> Tensor:
    """A copy that ends at a page which may not be touched."""
    size = -(-part.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = torch.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), dtype=torch.uint8)
    copy = area[size - part.nbytes : size].view(part.dtype).view(part.shape)
    copy.copy_(part)
    assert _libc.mprotect(area.data_ptr() + size, mmap.PAGESIZE, 0) == 0
    return copy

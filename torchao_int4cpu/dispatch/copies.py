"""Handlers that compare two weights, or copy one into the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.cuts import same_numbers, write_back
from torchao_int4cpu.dispatch.pieces import expanded, pieces
from torchao_int4cpu.dispatch.table import implements, implements_function
from torchao_int4cpu.format.checks import check_same_qparams
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.kernels.ops.slicing import traceable_repack
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4Weight, weight_of

aten = torch.ops.aten


@implements(aten.copy_.default)
def handle_copy_(target: Any, source: Any, non_blocking: bool = False) -> Int4Weight:
    """``copy_`` between 4-bit weights, as ``load_state_dict`` does; the layouts may differ.

    Raises:
        TypeError: one side is not a 4-bit weight.
        ValueError: shape, group size, the dtype of scales or an optional part differ, or the target is
            a repacked copy.
    """
    for name, side in (("source", source), ("target", target)):
        if not isinstance(side, Int4Weight):
            dtype = f"{side.dtype} of class " if isinstance(side, Tensor) else ""
            cure = (
                "quantize_ the model before you load a 4-bit state dict, or load it with "
                "load_state_dict(..., assign=True)"
            )
            if name == "source" and weight_of(target).provenance.filling is not None:
                cure = (  # vLLM allocates what the config of a checkpoint says
                    "the config of the checkpoint has this layer in 4 bits and its file does not: for "
                    "vLLM, name the layer in modules_to_not_convert of config.json, as quantize and "
                    "save_pretrained do; a joined layer is 4-bit in all its parts or in none"
                )
            elif name == "target":
                # As resize_token_embeddings of transformers copies into a larger one.
                cure += (
                    ". To copy its numbers, copy .dequantize(); or make the layer a float one before: "
                    "layer.weight = torch.nn.Parameter(layer.weight.dequantize())"
                )
            raise TypeError(
                f"copy_ got a {name} that is {dtype}{type(side).__name__} and not 4-bit as the other "
                f"side is; {cure}"
            )
    if type(target) is not type(source):
        raise TypeError(
            f"copy_ got a {type(source).__name__} for a {type(target).__name__}; both must be the same "
            "way round, so call .transpose(-2, -1) on one"
        )
    copy_into(weight_of(target), weight_of(source))
    copied: Int4Weight = target
    return copied


def copy_into(target: Int4OpaqueTensor, source: Int4OpaqueTensor) -> None:
    """Replace every part of ``target``, and of what it was cut from.

    A weight that is allocated to be filled takes one of larger groups, too: vLLM joins several into it.
    """
    filling = target.provenance.filling
    if filling is not None and source.group_size > target.group_size:
        value = source.to_groupwise().in_groups_of(target.group_size)
        source = Int4OpaqueTensor.from_groupwise(
            value, dtype=source.dtype, act_pre_scale=source.act_pre_scale
        )
    for name, mine, other in (
        ("shape", list(target.shape), list(source.shape)),
        ("block_size", target.block_size, source.block_size),
        *(
            (part.name, _shape_or_none(target, part.name), _shape_or_none(source, part.name))
            for part in target.PARTS
            if part.optional
        ),
    ):
        if mine != other:
            raise ValueError(
                f"copy_ got {name} {other} for a 4-bit weight with {name} {mine}; both must agree, "
                "or load it with load_state_dict(..., assign=True)"
            )
    layout = LAYOUTS[target.qdata_layout]
    if target.read_only:
        raise ValueError(
            f"copy_ got a target of shape {list(target.shape)} that was cut inside a block of rows or "
            f"along K, so it is a repacked copy and the weight would not change; cut along N at "
            f"multiples of {layout.rows_per_block}, copy into the whole weight, or into a clone() if "
            "the copy is meant"
        )
    if target.shape[0] > 1 and target.qdata.stride(0) == 0:
        raise ValueError(
            f"copy_ got a target of shape {list(target.shape)} that was expanded, so all its matrices "
            "are the same one; copy into the weight that was expanded, or into a clone()"
        )
    if filling is not None and not torch.compiler.is_compiling():
        filling.start(source.scale_and_zero.dtype)
    check_same_qparams(
        "copy_",
        target.scale_and_zero,
        source.scale_and_zero,
        "load it with load_state_dict(..., assign=True), or ",
    )
    into, others = target.parts(), source.parts()
    for part in target.PARTS:
        if part.packed and target.qdata_layout != source.qdata_layout:
            for to, packed in zip(target.matrices(), source.matrices()):
                to.qdata.copy_(traceable_repack(packed.qdata, packed.layout, layout))
        elif part.name in into:
            into[part.name].copy_(others[part.name])
    if target.provenance.cut_from is not None:
        write_back(target.provenance.cut_from, target)


@implements(aten.equal.default)
def handle_equal(a: Tensor, b: Tensor) -> bool:
    """`torch.equal`: whether every number of two weights is equal, some rows at a time."""
    names = {part.name for part in Int4OpaqueTensor.PARTS if part.optional}
    if not all(same_numbers(getattr(a, name, None), getattr(b, name, None)) for name in names):
        return False
    return _compare(torch.equal, a, b)


@implements(aten.allclose.default)
@implements_function(torch.allclose, torch.Tensor.allclose)
def handle_allclose(
    input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> bool:
    """`torch.allclose` of the numbers of two weights, or of one and a plain tensor."""
    return _compare(
        lambda a, b: torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan), input, other
    )


def _compare(same: Callable[[Tensor, Tensor], bool], a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not any(isinstance(side, Int4OpaqueTensor) for side in (a, b)):
        a, b = a.transpose(-2, -1), b.transpose(-2, -1)  # the transposed view of one is enough
    return all(same(expanded(a, *piece), expanded(b, *piece)) for piece in pieces(a.shape))


def _shape_or_none(t: Int4OpaqueTensor, name: str) -> list[int] | None:
    part: Tensor | None = getattr(t, name)
    return None if part is None else list(part.shape)

"""What FSDP2 and `torch.distributed.checkpoint` ask of a shard, as methods of `Int4OpaqueTensor`.

Source of the protocols: torch/distributed/fsdp/_fully_shard/_fsdp_param.py and
torch/distributed/_checkpointable.py of torch 2.13.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.cuts import pad_rows
from torchao_int4cpu.dispatch.transposition import same_parts
from torchao_int4cpu.distributed.collectives import DTYPE_NUMBERS, check_gathered_qparams
from torchao_int4cpu.format.layout import (
    LAYOUTS,
    NibbleLayout,
    layout_named,
    layout_numbered,
    padded_rows,
)
from torchao_int4cpu.format.slicing import PackedRows, at_border, join_rows, repack, stacked
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


def fsdp_pre_all_gather(
    t: Int4OpaqueTensor, mesh: object
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The plain tensors that FSDP2 gathers along their first dimension, of one size on all ranks.

    With the other form of this hook, of 5 parameters, FSDP2 would refuse to shard unevenly.

    Returns:
        (int64 ``[3]``: the layout, how many rows, or matrices of a stack, are no padding, and the
        dtype of scales; ``qdata``; ``scale_and_zero``), and the shape of a shard with the padding that
        FSDP2 adds to the last.
    """
    cut = t.provenance.cut_from
    if cut is not None and cut.dim != 0:
        # FSDP2 would rearrange what is gathered as if it were the numbers.
        raise ValueError(
            f"FSDP2 was asked to shard a 4-bit weight along dimension {cut.dim}; it can along "
            "dimension 0 only, so let shard_placement_fn return None or Shard(0) for such a parameter"
        )
    # The shard of the last rank may be shorter: a cut of one that is padded to the size of the others.
    shard = t if cut is None else cut.source
    qparams = DTYPE_NUMBERS[shard.scale_and_zero.dtype]
    header = torch.tensor([LAYOUTS[shard.qdata_layout].number, t.shape[0], qparams])
    parts = (header, shard.qdata.contiguous(), shard.scale_and_zero.contiguous())
    return parts, tuple(shard.shape)


def fsdp_post_all_gather(
    t: Int4OpaqueTensor,
    outputs: tuple[Tensor, ...],
    shard_shape: tuple[int, ...],
    param_dtype: torch.dtype,
    *,
    out: Any = None,
) -> tuple[Int4OpaqueTensor, tuple[Tensor, ...]] | None:
    """The whole weight of the gathered shards; the second time and later into ``out``.

    Where the gathered bytes are those of the whole weight already it is a view of them, else a copy.

    Args:
        t: the shard of this rank; the whole weight gets its layout.
        outputs: what `fsdp_pre_all_gather` gives, of all ranks, joined along the first dimension.
        shard_shape: from there, too.
        param_dtype: of the whole weight.
        out: the weight that was made the first time, whose memory FSDP2 has freed since and allocated
            again; or a DTensor of it, with tensor parallelism inside of FSDP2.

    Returns:
        The weight, and what FSDP2 is to free after use beside ``outputs``.
    """
    header, gathered_qdata, gathered_qparams = outputs
    numbers, counts, dtypes = (column.tolist() for column in header.view(-1, 3).t())
    check_gathered_qparams(dtypes)
    layouts = [layout_numbered(number) for number in numbers]
    target, processes, total = layout_named(t.qdata_layout), len(numbers), sum(counts)
    if len(shard_shape) == 3:
        qdata = _stack_in(target, gathered_qdata, layouts)[:total]
        qparams = gathered_qparams[:total]
    else:
        n = shard_shape[0]
        shards = gathered_qdata.chunk(processes)
        pieces = [
            PackedRows(shard, layout, n, 0, count)
            for shard, layout, count in zip(shards, layouts, counts)
        ]
        if _is_whole(pieces, target):
            qdata = gathered_qdata[: padded_rows(total)]
        else:
            qdata = join_rows(pieces, target)
        pairs = [part[:, :count] for part, count in zip(gathered_qparams.chunk(processes), counts)]
        qparams = pad_rows(torch.cat(pairs, dim=1))
    if out is not None:
        refilled = {"qdata": qdata, "scale_and_zero": qparams} | _shared_parts(t)
        _refill(getattr(out, "_local_tensor", out), refilled)
        return None
    optional = {name: part.clone() for name, part in _shared_parts(t).items()}
    whole = t.with_parts(
        {"qdata": qdata, "scale_and_zero": qparams} | optional,
        (total, *shard_shape[1:]),
        dtype=param_dtype,
    )
    shared = [gathered.untyped_storage().data_ptr() for gathered in outputs]
    made = [part for part in (qdata, qparams) if part.untyped_storage().data_ptr() not in shared]
    return whole, tuple(made)


def _is_whole(pieces: list[PackedRows], target: NibbleLayout) -> bool:
    """Whether the bytes of the pieces, one behind the other, are those of the joined rows."""
    *before, last = pieces
    return all(piece.layout == target for piece in pieces) and (
        all(piece.stop == piece.n and piece.n % target.rows_per_block == 0 for piece in before)
        and at_border(last.stop, last.n, target)
    )


def _stack_in(target: NibbleLayout, qdata: Tensor, layouts: list[NibbleLayout]) -> Tensor:
    """Bytes ``[E, N', K'/2]`` in that layout; equal parts of E are in one of ``layouts`` each."""
    if all(layout == target for layout in layouts):
        return qdata
    repacked = (
        repack(matrix, layout, target)
        for shard, layout in zip(qdata.chunk(len(layouts)), layouts)
        for matrix in shard
    )
    return stacked(repacked, qdata.shape[:1])


def _shared_parts(t: Int4OpaqueTensor) -> dict[str, Tensor]:
    """The parts that all shards along N have alike, so that they need not be gathered."""
    parts = t.parts()
    return {part.name: parts[part.name] for part in t.PARTS if part.optional and part.name in parts}


def _refill(out: Int4OpaqueTensor, parts: dict[str, Tensor]) -> None:
    """Write the parts once more, unseen by autograd: what it saved in the forward comes back."""
    filled = [(part, parts[name]) for name, part in out.parts().items()]
    targets = tuple(part for part, _ in filled if not part.is_inference())  # those have no version
    unseen: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
    with unseen(targets):
        for part, source in filled:
            if part.data_ptr() != source.data_ptr():  # else it is a view of what was gathered
                part.copy_(source)


def get_tensor_shard(t: Int4OpaqueTensor, index: object) -> Int4OpaqueTensor:
    """``__get_tensor_shard__``: what a checkpoint is loaded into, cut by cut, anywhere along N."""
    shard = same_parts(t)
    shard.provenance = replace(t.provenance, filled_by_cuts=True)
    return shard


def _install() -> None:
    methods: dict[str, Any] = {
        "fsdp_pre_all_gather": fsdp_pre_all_gather,
        "fsdp_post_all_gather": fsdp_post_all_gather,
        "__get_tensor_shard__": get_tensor_shard,
    }
    for name, method in methods.items():
        setattr(Int4OpaqueTensor, name, method)


_install()

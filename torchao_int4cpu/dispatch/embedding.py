"""Handler of `torch.nn.functional.embedding` with a 4-bit table."""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.table import implements
from torchao_int4cpu.format.act_order import out_of_act_order
from torchao_int4cpu.kernels.ops.dequantize import traceable_embedding
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

aten = torch.ops.aten


@implements(aten.embedding.default)
def handle_embedding(
    table: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Gather and expand the rows asked for: ``[*indices.shape, K]`` in the dtype of the table.

    ``padding_idx`` concerns gradients only, and the table is frozen.

    Raises:
        TypeError: the table is no 4-bit weight, or the indices are no integers.
        ValueError: the table has ``act_pre_scale``, which is for activations.
        IndexError: an index is out of range.
    """
    if not isinstance(table, Int4OpaqueTensor):
        raise TypeError(
            f"embedding got a table of class {type(table).__name__}; it must be a 4-bit weight [N, K], "
            "so transpose it back, or call .dequantize()"
        )
    if table.act_pre_scale is not None:
        raise ValueError(
            "embedding got a 4-bit table with act_pre_scale, which scales the activations of a linear "
            "layer; quantize embeddings without AWQ or SmoothQuant"
        )
    rows = traceable_embedding(indices, table.packed(), table.dtype)
    return out_of_act_order(rows, table.act_order)

"""``y = x · Wᵀ`` on plain tensors. This package knows nothing of the tensor subclass.

- `packed`: the packed weight as plain tensors, and `int4_mm_reference`, the readable twin.
- `decode`: PyTorch's int4 op, for few rows.
- `prefill`: expand and multiply, for many rows; and the gradient.
- `choice`: which of them runs when.
- `ops`: the same for autograd, `torch.compile` and `torch.export`.
"""

from torchao_int4cpu.kernels.choice import decode_max_rows, int4_mm, kernel_choices
from torchao_int4cpu.kernels.ops import traceable_int4_mm
from torchao_int4cpu.kernels.packed import PackedInt4, int4_mm_reference

__all__ = [
    "PackedInt4",
    "decode_max_rows",
    "int4_mm",
    "int4_mm_reference",
    "kernel_choices",
    "traceable_int4_mm",
]

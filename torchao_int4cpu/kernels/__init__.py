"""``y = x · Wᵀ`` on plain tensors. This package knows nothing of the tensor subclass.

- `packed`: the packed weight as plain tensors, and `int4_mm_reference`, the readable twin.
- `decode`: PyTorch's int4 op, for few rows.
- `prefill`: expand and multiply, for many rows; and the gradient.
- `build`, `native`: our own C++ in ``csrc``, for any number of rows.
- `choice`: which of them runs when.
- `ops`: the same for autograd, `torch.compile` and `torch.export`.
"""

from torchao_int4cpu.kernels.choice import (
    decode_max_rows,
    get_kernel,
    int4_mm,
    kernel_choices,
    native_kernel,
    native_status,
    native_unavailable,
    operations_at_best,
    set_kernel,
)
from torchao_int4cpu.kernels.ops import traceable_int4_mm
from torchao_int4cpu.kernels.packed import PackedInt4, int4_mm_reference

__all__ = [
    "PackedInt4",
    "decode_max_rows",
    "get_kernel",
    "int4_mm",
    "int4_mm_reference",
    "kernel_choices",
    "native_kernel",
    "native_status",
    "native_unavailable",
    "operations_at_best",
    "set_kernel",
    "traceable_int4_mm",
]

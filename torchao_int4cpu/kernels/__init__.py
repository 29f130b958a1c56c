"""``y = x · Wᵀ`` on plain tensors. This package knows nothing of the tensor subclass.

- `packed`: the packed weight and the stack of experts as plain tensors, and the readable twin.
- `checks`: which parts and activations fit together.
- `decode`: PyTorch's int4 op, for few rows.
- `prefill`: expand and multiply, for many rows; and the gradient.
- `build`, `native`: our own C++ in ``csrc``, for any number of rows.
- `choice`: which of them runs when.
- `experts`: products with stacks of weights, expert by expert.
- `rows`: rows of a weight as floating numbers, some or all.
- `ops`, `expert_ops`, `row_ops`: the same for autograd, `torch.compile` and `torch.export`.
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
from torchao_int4cpu.kernels.expert_ops import (
    traceable_bmm,
    traceable_bmm_transposed,
    traceable_grouped_mm,
    traceable_grouped_mm_transposed,
)
from torchao_int4cpu.kernels.ops import traceable_int4_mm, traceable_int4_mm_transposed
from torchao_int4cpu.kernels.packed import PackedExperts, PackedInt4, int4_mm_reference
from torchao_int4cpu.kernels.row_ops import traceable_dequantize, traceable_embedding

__all__ = [
    "PackedExperts",
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
    "traceable_bmm",
    "traceable_bmm_transposed",
    "traceable_dequantize",
    "traceable_embedding",
    "traceable_grouped_mm",
    "traceable_grouped_mm_transposed",
    "traceable_int4_mm",
    "traceable_int4_mm_transposed",
]

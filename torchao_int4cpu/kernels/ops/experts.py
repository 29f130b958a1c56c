"""Products with stacks of experts as ops that torch can trace, without gradients.

Each takes an activation, a stack, and for the grouped ones ``offs``; see `kernels.experts`.
"""

from __future__ import annotations

from torchao_int4cpu.kernels.experts import bmm, bmm_transposed, grouped_mm, grouped_mm_transposed
from torchao_int4cpu.kernels.ops.register import define_product

#: Rows sorted by expert: ``(x [S, K], experts, offs [E])`` to ``[S, N]``.
traceable_grouped_mm = define_product("int4_grouped_mm", grouped_mm, ndim=3, grouped=True)

#: ``(x [S, N], experts, offs [E])`` to ``[S, K]``.
traceable_grouped_mm_transposed = define_product(
    "int4_grouped_mm_transposed", grouped_mm_transposed, ndim=3, grouped=True, transposed=True
)

#: The same number of rows for every expert: ``(x [E, M, K], experts)`` to ``[E, M, N]``.
traceable_bmm = define_product("int4_bmm", bmm, ndim=3)

#: ``(x [E, M, N], experts)`` to ``[E, M, K]``.
traceable_bmm_transposed = define_product(
    "int4_bmm_transposed", bmm_transposed, ndim=3, transposed=True
)

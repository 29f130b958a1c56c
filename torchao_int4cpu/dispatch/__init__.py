"""What torch may do with a 4-bit weight: named handlers by op, and the table they are kept in.

Handlers unwrap, call code on plain tensors, and wrap.

- `table`: how a handler gets into the table.
- `linear`, `products`, `embedding`: what multiplies or gathers.
- `conversions`: dtype, device, size; what stays as it is.
- `cuts`, `choices`: some rows, columns or experts. `views`: other shapes, the transposed view. `joins`.
- `dims`: which weight and dimension is meant, whichever way it is turned.
- `copies`: copying into a weight, comparing two.
- `collectives`, `sharding`: more than one process.
- `hooks`: what torch calls.
"""

import torchao_int4cpu.dispatch.choices
import torchao_int4cpu.dispatch.collectives
import torchao_int4cpu.dispatch.conversions
import torchao_int4cpu.dispatch.copies
import torchao_int4cpu.dispatch.embedding
import torchao_int4cpu.dispatch.joins
import torchao_int4cpu.dispatch.products
import torchao_int4cpu.dispatch.sharding
import torchao_int4cpu.dispatch.views  # noqa: F401  # imported for what they register
from torchao_int4cpu.dispatch.hooks import handle_function, handle_op
from torchao_int4cpu.dispatch.linear import linear

__all__ = ["handle_function", "handle_op", "linear"]

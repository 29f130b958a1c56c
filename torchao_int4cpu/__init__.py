"""4-bit weights for PyTorch models on ordinary CPUs, through torchao's `quantize_`.

Importing this package makes torchao's configs understand ``"opaque"`` and makes saved 4-bit weights
loadable. The names below are the public ones.
"""

from torchao_int4cpu import checkpoint, dispatch, safetensors_format  # imported for what they register
from torchao_int4cpu.config import Int4WeightOnlyConfig
from torchao_int4cpu.groupwise import GroupwiseInt4
from torchao_int4cpu.kernels import get_kernel, set_kernel
from torchao_int4cpu.layout import native_layout
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.upstream import load_prototype
from torchao_int4cpu.version import __version__

__all__ = [
    "GroupwiseInt4",
    "Int4OpaqueTensor",
    "Int4WeightOnlyConfig",
    "__version__",
    "get_kernel",
    "load_prototype",
    "native_layout",
    "set_kernel",
]

del checkpoint, dispatch, safetensors_format

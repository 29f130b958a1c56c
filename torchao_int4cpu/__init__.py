"""4-bit weights for PyTorch models on ordinary CPUs, through torchao's `quantize_`.

Importing this package makes torchao's configs understand ``"opaque"`` and makes saved 4-bit weights
loadable. The names in ``__all__`` are the public ones.
"""

# These are imported for what they register.
from torchao_int4cpu import dispatch
from torchao_int4cpu.checkpoint import pickles
from torchao_int4cpu.checkpoint import safetensors as safetensors_format
from torchao_int4cpu.distributed import collectives, fsdp
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.importers.torchao import load_prototype, load_torchao_checkpoint
from torchao_int4cpu.integrations import safetensors, sizes, transformers, transformers_saving, vllm
from torchao_int4cpu.kernels.selection import get_kernel, set_kernel
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.tensor import Int4OpaqueTensor, Int4TransposedTensor
from torchao_int4cpu.tensor.module_repr import ExtraRepr as ExtraRepr  # pickles name it here
from torchao_int4cpu.version import __version__, warn_of_untested

__all__ = [
    "GroupwiseInt4",
    "Int4OpaqueTensor",
    "Int4TransposedTensor",
    "Int4WeightOnlyConfig",
    "__version__",
    "get_kernel",
    "load_prototype",
    "load_torchao_checkpoint",
    "native_layout",
    "set_kernel",
]

warn_of_untested()

del collectives, dispatch, fsdp, pickles, safetensors, safetensors_format, sizes, transformers
del transformers_saving, vllm, warn_of_untested

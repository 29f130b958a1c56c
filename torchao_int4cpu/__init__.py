"""4-bit weights for PyTorch models on ordinary CPUs, through torchao's `quantize_`.

Importing this package makes torchao's configs understand ``"opaque"`` and makes saved 4-bit weights
loadable. The names in ``__all__`` are the public ones.
"""

# These are imported for what they register.
from torchao_int4cpu import dispatch, integrations
from torchao_int4cpu.calibration.calibrate import Calibration, calibrate
from torchao_int4cpu.calibration.config import GPTQConfig
from torchao_int4cpu.checkpoint import pickles, safetensors
from torchao_int4cpu.dispatch.entry import SUPPORTED_OPS
from torchao_int4cpu.distributed import collectives, ddp, fsdp, shared_memory
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.importers.torchao import load_prototype, load_torchao_checkpoint
from torchao_int4cpu.integrations.transformers_imports import import_checkpoints
from torchao_int4cpu.integrations.vllm import register
from torchao_int4cpu.kernels.selection import get_activations, get_kernel, set_kernel
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.quantize.filters import filter_fn
from torchao_int4cpu.tensor import Int4OpaqueTensor, Int4TransposedTensor
from torchao_int4cpu.tensor.module_repr import ExtraRepr as ExtraRepr  # pickles name it here
from torchao_int4cpu.version import __version__, warn_of_untested

__all__ = [
    "SUPPORTED_OPS",
    "Calibration",
    "GPTQConfig",
    "GroupwiseInt4",
    "Int4OpaqueTensor",
    "Int4TransposedTensor",
    "Int4WeightOnlyConfig",
    "__version__",
    "calibrate",
    "filter_fn",
    "get_activations",
    "get_kernel",
    "import_checkpoints",
    "load_prototype",
    "load_torchao_checkpoint",
    "native_layout",
    "register",
    "set_kernel",
]

warn_of_untested()

del (
    collectives,
    ddp,
    dispatch,
    fsdp,
    integrations,
    pickles,
    safetensors,
    shared_memory,
    warn_of_untested,
)

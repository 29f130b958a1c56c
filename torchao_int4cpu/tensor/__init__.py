"""The tensor classes: the weight, its transposed view, and how a module prints them."""

from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

__all__ = ["Int4OpaqueTensor", "Int4TransposedTensor", "Int4Weight", "weight_of"]

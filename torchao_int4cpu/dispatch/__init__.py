"""What torch may do with a 4-bit weight: named handlers by op, and the tables they are kept in.

Handlers unwrap, call code on plain tensors, and wrap. Importing this package registers all of them.
"""

from torchao_int4cpu.dispatch import (  # imported for what they register
    concatenation,
    conversions,
    copies,
    embedding,
    indexing,
    linear,
    memory,
    products,
    reads,
    scaling,
    views,
)

from torchao_int4cpu.dispatch import entry  # isort: skip  # after all of them, whose names it lists


__all__ = [
    "concatenation",
    "conversions",
    "copies",
    "embedding",
    "entry",
    "indexing",
    "linear",
    "memory",
    "products",
    "reads",
    "scaling",
    "views",
]

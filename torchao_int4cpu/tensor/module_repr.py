"""`ExtraRepr`: how a printed module shows its 4-bit weights."""

from __future__ import annotations

import weakref

from torch import nn

from torchao_int4cpu.tensor.transposed import Int4Weight


class ExtraRepr:
    """Stands in for a module's ``extra_repr`` so that printing the model shows its 4-bit weights.

    An object, because a bound method of a closure could be neither pickled nor deep-copied with its
    module; with a weak reference, or a model that is deleted would wait for the garbage collector.
    """

    __module__ = "torchao_int4cpu"  # as pickles name it

    def __init__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)

    @property
    def module(self) -> nn.Module | None:
        """The module it stands in for; None in a shallow copy (`copy.copy`) that outlives it."""
        return None if self._module is None else self._module()

    def __reduce__(self) -> tuple[type[ExtraRepr], tuple[nn.Module | None]]:
        return ExtraRepr, (self.module,)

    def __call__(self) -> str:
        module = self.module
        if module is None:
            return ""
        shown = [
            f"{name}={type(weight).__name__}({weight._quantization_type()})"
            for name, weight in module.named_parameters(recurse=False)
            if isinstance(weight, Int4Weight)
        ]
        return ", ".join(filter(None, [type(module).extra_repr(module), *shown]))

"""Which modules hold weights that can be 4-bit, and under which names."""

from __future__ import annotations

from collections.abc import Iterator

import torchao.quantization.quant_api as quant_api
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

#: Modules of torch whose weight has 2 or 3 dimensions and another meaning than ``[N, K]``, or goes into
#: an op of its own.
OTHER_MEANING = (_ConvNd, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase)

#: The weights of `torch.nn.MultiheadAttention` itself: one for all projections, or three.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

#: Classes whose ``weight`` is ``[K, N]``: see `register_input_first`.
_input_first: list[type[nn.Module]] = []


def register_input_first(module_class: type[nn.Module]) -> None:
    """Make known that modules of a class compute ``x @ weight``, so that ``weight`` is ``[K, N]``."""
    if module_class not in _input_first:
        _input_first.append(module_class)


def is_input_first(module: nn.Module, weight: Tensor) -> bool:
    """Whether a module keeps its weight as ``[K, N]``, or its stack as ``[E, K, N]``."""
    if weight.ndim == 3:
        return getattr(module, "is_transposed", False) is True
    return weight.ndim == 2 and isinstance(module, tuple(_input_first))


def filter_fn(module: nn.Module, fqn: str = "") -> bool:
    """Choose the modules that `quantize_` can put into 4 bits without being asked for by name.

    ``quantize_(model, Int4WeightOnlyConfig(), filter_fn=torchao_int4cpu.filter_fn)`` quantizes what
    torchao's default filter chooses (`torch.nn.Linear`), and `torch.nn.MultiheadAttention` with all its
    projections, and transformers' ``Conv1D``, of which GPT-2 consists. Embeddings are not chosen.

    Args:
        module: a module of the model.
        fqn: its name in the model, which is not looked at.

    Returns:
        Whether it is one of these.
    """
    chosen: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, *_input_first)
    return isinstance(module, chosen) or bool(quant_api._is_linear(module))


def weights_of(module: nn.Module, parameter_name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """The weights that are meant by a parameter's name.

    ``weight`` of a `torch.nn.MultiheadAttention`, which has none, means all its projections.

    Yields:
        The name of a submodule, empty for the module itself; the submodule; the parameter's name in it.
    """
    if parameter_name != "weight" or not isinstance(module, nn.MultiheadAttention):
        yield "", module, parameter_name
        return
    for name in _PROJECTIONS:
        # A parametrized one is not read, which would compute it.
        if is_parametrized(module, name) or getattr(module, name, None) is not None:
            yield "", module, name
    for fqn, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield fqn, child, "weight"

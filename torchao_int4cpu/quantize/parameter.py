"""Replacing one parameter of a module by its 4-bit form, or leaving it as it was with a warning.

A parameter that several modules share (a tied embedding and head) becomes one 4-bit parameter that
they share.
"""

from __future__ import annotations

import warnings
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.weak import WeakIdKeyDictionary

from torchao_int4cpu.distributed.quantize_shards import is_sharded, piece_of, sharded_like
from torchao_int4cpu.format.groupwise import FLOAT_DTYPES
from torchao_int4cpu.quantize.run import (
    is_allocating,
    left_behind,
    model_to_quantize,
    name_of,
    progress,
)
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.module_repr import ExtraRepr
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

#: Modules of torch whose weight has 2 or 3 dimensions and another meaning than ``[N, K]``.
_OTHER_MEANING = (_ConvNd, nn.EmbeddingBag, nn.Bilinear)


def quantize_parameter(module: nn.Module, parameter_name: str, group_size: int, algorithm: str) -> bool:
    """Replace a parameter by its 4-bit form.

    A parameter ``[N, K]`` becomes an `Int4OpaqueTensor`, and so does a stack ``[E, N, K]``. Where a
    module says ``is_transposed = True``, as transformers' experts do, a stack is ``[E, K, N]`` and
    becomes an `Int4TransposedTensor`: groups always run along what a product sums over.

    Returns:
        Whether it is 4-bit now. If it cannot be, it is as it was, and a warning names it and says why.

    Raises:
        TypeError, ValueError: there is no such parameter, or it breaks a rule (NaN, another device).
            The message names it and what was done before it.
    """
    weight = getattr(module, parameter_name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{name_of(module, parameter_name)} is not a parameter; "
            f"choose modules that have a {parameter_name!r}, for example with filter_fn"
        )
    if is_sharded(weight):
        return _quantize_shard(module, parameter_name, weight, group_size, algorithm)
    if _is_4_bit(weight) and _group_size(weight) == group_size:
        return True  # a module that sits at two places of the model is visited twice
    obstacle = _obstacle(module, parameter_name, weight)
    if obstacle is not None:
        warnings.warn(f"{name_of(module, parameter_name)} is left as it was: {obstacle}", stacklevel=3)
        return False
    recipe = _Recipe(group_size, str(algorithm), _writes(weight))
    shared = _shared_replacement(weight, recipe)
    if shared is None or weight.is_inference():
        try:
            quantized = _quantized(module, weight, group_size, algorithm)
        except (TypeError, ValueError) as error:
            name = name_of(module, parameter_name)
            raise type(error)(f"{name}: {error}. {progress()}") from error
        if shared is None or not torch.equal(quantized, shared):
            shared = nn.Parameter(quantized, requires_grad=False)
        _REPLACED[weight] = _Replacement(recipe, weakref.ref(shared), _writes(shared))
    others = left_behind(module, parameter_name)
    setattr(module, parameter_name, shared)
    if others:
        _warn_untied(name_of(module, parameter_name), others)
    if not isinstance(module.extra_repr, ExtraRepr):
        module.extra_repr = ExtraRepr(module)  # type: ignore[method-assign]
    return True


def _quantize_shard(
    module: nn.Module, parameter_name: str, weight: Tensor, group_size: int, algorithm: str
) -> bool:
    """`quantize_parameter` for a DTensor: each process quantizes its own piece."""
    name = name_of(module, parameter_name)
    try:
        k_dim = -2 if _is_input_first(module, weight) else -1
        shard = piece_of(model_to_quantize(), weight, group_size, k_dim)
        if _is_4_bit(shard) and _group_size(shard) == group_size:
            return True
        obstacle = _obstacle(module, parameter_name, shard)
        if obstacle is not None:
            warnings.warn(f"{name} is left as it was: {obstacle}", stacklevel=4)
            return False
        quantized = _quantized(module, shard, group_size, algorithm)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}. {progress()}") from error
    others = left_behind(module, parameter_name)
    setattr(module, parameter_name, nn.Parameter(sharded_like(weight, quantized), requires_grad=False))
    if others:
        _warn_untied(name, others)
    return True


def _is_input_first(module: nn.Module, weight: Tensor) -> bool:
    return weight.ndim == 3 and getattr(module, "is_transposed", False) is True


def _quantized(module: nn.Module, weight: Tensor, group_size: int, algorithm: str) -> Int4Weight:
    if is_allocating():
        # The memory is uninitialized, and may be NaN. Zeros may be filled by any cuts.
        allocated = Int4OpaqueTensor.empty(weight.shape, group_size, weight.dtype, device=weight.device)
        zeros: Int4OpaqueTensor = allocated.new_zeros(allocated.shape)
        return zeros
    block_size = [1] * (weight.ndim - 1) + [group_size]
    if _is_input_first(module, weight):
        quantized = Int4OpaqueTensor.from_hp(weight.transpose(-2, -1), block_size, algorithm)
        return Int4TransposedTensor(quantized)
    return Int4OpaqueTensor.from_hp(weight, block_size, algorithm)


def _obstacle(module: nn.Module, parameter_name: str, weight: Tensor) -> str | None:
    """Why a weight cannot be quantized at all, or None."""
    if _is_4_bit(weight):
        return f"it is 4-bit already, in groups of {_group_size(weight)}"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"it is a {type(weight).__name__} already"
    if weight.dtype not in FLOAT_DTYPES:
        return f"it is {weight.dtype}, and only bfloat16, float16 and float32 can be quantized"
    if weight.ndim not in (2, 3) or weight.numel() == 0:
        return (
            f"its shape is {list(weight.shape)}, and only [N, K] or a stack [E, N, K] can be quantized"
        )
    if parameter_name.endswith("bias"):  # those of experts are [E, N], and a pattern finds them, too
        return "it is a bias by its name, which is added and not multiplied with"
    if isinstance(module, _OTHER_MEANING):
        return (
            f"{type(module).__name__} has no 4-bit implementation, only products with [N, K] and "
            "embeddings have"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return (
            "an embedding with max_norm rescales its rows as it is used, and a 4-bit weight is frozen"
        )
    return None


def _is_4_bit(weight: Tensor) -> bool:
    return isinstance(weight, Int4Weight)


def _group_size(weight: Tensor) -> int:
    assert isinstance(weight, Int4Weight)
    return weight_of(weight).group_size


# --- shared parameters --------------------------------------------------------------------------
# While one module still holds the float parameter that another has had replaced, it gets the same one.


class _Recipe(NamedTuple):
    """What a replacement was made with; the version counts the writes to the float parameter."""

    group_size: int
    algorithm: str
    version: int


class _Replacement(NamedTuple):
    """What a float parameter became, as long as that lives; the version counts the writes to it."""

    recipe: _Recipe
    parameter: weakref.ref[nn.Parameter]
    version: int


_REPLACED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _shared_replacement(weight: Tensor, recipe: _Recipe) -> nn.Parameter | None:
    made: _Replacement | None = _REPLACED.get(weight)
    parameter = None if made is None else made.parameter()
    if made is None or parameter is None or made.recipe != recipe:
        return None
    return parameter if made.version == _writes(parameter) else None


def _writes(weight: Tensor) -> int:
    """How often torch has written to it. It does not count writes to tensors of `inference_mode`."""
    return 0 if weight.is_inference() else weight._version


def _warn_untied(name: str, others: list[str]) -> None:
    warnings.warn(
        f"{name} and {', '.join(others)} were one parameter, and only {name} is 4-bit now: they are "
        "tied no longer. Whatever ties them again, as tie_weights() of transformers, drops the 4-bit "
        "one. Choose both for one 4-bit weight, with filter_fn=lambda module, name: isinstance(module, "
        "(torch.nn.Linear, torch.nn.Embedding)), or neither",
        stacklevel=4,
    )

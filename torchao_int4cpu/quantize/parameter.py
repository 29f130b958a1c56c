"""Replacing one parameter of a module by its 4-bit form, or leaving it as it was and saying why.

A parameter that several modules share (a tied embedding and head) becomes one 4-bit parameter that
they share.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from torchao_int4cpu.distributed.quantize_shards import is_sharded, piece_of, sharded_like
from torchao_int4cpu.quantize import obstacles
from torchao_int4cpu.quantize.filters import is_input_first
from torchao_int4cpu.quantize.report import left_as_it_was, warn_user
from torchao_int4cpu.quantize.run import (
    Run,
    current_run,
    is_allocating,
    left_behind,
    model_to_quantize,
    name_of,
    progress,
)
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.module_repr import ExtraRepr
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight


def quantize_parameter(module: nn.Module, parameter_name: str, group_size: int, algorithm: str) -> bool:
    """Replace a parameter by its 4-bit form.

    A parameter ``[N, K]`` becomes an `Int4OpaqueTensor`, and so does a stack ``[E, N, K]``. Where a
    module says ``is_transposed = True``, as transformers' experts do, a stack is ``[E, K, N]`` and
    becomes an `Int4TransposedTensor`: groups always run along what a product sums over. So does a
    weight ``[K, N]`` of a class that `register_input_first` knows.

    Returns:
        Whether it is 4-bit now. If it cannot be, or had better not be, it is as it was; the report of
        the run names it and says why, and a warning does so outside of a run.

    Raises:
        TypeError, ValueError: there is no such parameter, or it breaks a rule (NaN, another device).
            The message names it and what was done before it.
    """
    run = current_run()
    if run is not None and _chosen.get() is None:
        run.begin()
    obstacle = obstacles.of_computed(module, parameter_name)
    if obstacle is not None:
        return _leave(module, parameter_name, obstacle)
    weight = getattr(module, parameter_name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{name_of(module, parameter_name)} is not a parameter; "
            f"choose modules that have a {parameter_name!r}, for example with filter_fn"
        )
    if _is_done(weight, group_size):
        return True  # a module that sits at two places of the model is visited twice
    obstacle = _obstacle(run, module, parameter_name, weight, group_size)
    if obstacle is not None:
        return _leave(module, parameter_name, obstacle)
    chosen = _chosen.get()
    if chosen is not None:
        name = name_of(module, parameter_name)
        chosen.append(ChosenWeight(module, parameter_name, name, weight, group_size, str(algorithm)))
        return True
    if is_sharded(weight):
        return _quantize_shard(module, parameter_name, weight, group_size, algorithm)

    def make() -> Int4Weight:
        try:
            return _quantized(module, weight, group_size, algorithm)
        except (TypeError, ValueError) as error:
            name = name_of(module, parameter_name)
            raise type(error)(f"{name}: {error}. {progress()}") from error

    replace_weight(module, parameter_name, group_size, str(algorithm), make)
    return True


def replace_weight(
    module: nn.Module,
    parameter_name: str,
    group_size: int,
    algorithm: str,
    make: Callable[[], Int4Weight],
) -> None:
    """Replace a float parameter by its 4-bit form, or by that which another module got for the same.

    Args:
        module: which has it.
        parameter_name: of the float parameter.
        group_size, algorithm: another form is shared if these are the same.
        make: gives the 4-bit form, if there is none to share.
    """
    weight = getattr(module, parameter_name)
    recipe = _Recipe(group_size, algorithm, _writes(weight))
    shared = _shared_replacement(weight, recipe)
    if shared is None or weight.is_inference():
        quantized = make()
        if shared is None or not torch.equal(quantized, shared):
            shared = nn.Parameter(quantized, requires_grad=False)
        _REPLACED[weight] = _Replacement(recipe, weakref.ref(shared), _writes(shared))
    _replace(module, parameter_name, shared)
    show_in_repr(module)


def show_in_repr(module: nn.Module) -> None:
    """Have the repr of a module tell of its 4-bit weights."""
    if not isinstance(module.extra_repr, ExtraRepr):
        module.extra_repr = ExtraRepr(module)  # type: ignore[method-assign]


class ChosenWeight(NamedTuple):
    """A weight that a config would make 4-bit, with what the config says of it."""

    module: nn.Module
    parameter_name: str
    name: str
    weight: Tensor
    group_size: int
    algorithm: str


_chosen: ContextVar[list[ChosenWeight] | None] = ContextVar("chosen weights", default=None)


@contextlib.contextmanager
def choosing_only() -> Iterator[list[ChosenWeight]]:
    """Within this block `quantize_` changes nothing: what it would have made 4-bit is in the list."""
    found: list[ChosenWeight] = []
    token = _chosen.set(found)
    try:
        yield found
    finally:
        _chosen.reset(token)


def _quantize_shard(
    module: nn.Module, parameter_name: str, weight: Tensor, group_size: int, algorithm: str
) -> bool:
    """`quantize_parameter` for a DTensor: each process quantizes its own piece."""
    try:
        k_dim = -2 if is_input_first(module, weight) else -1
        shard = piece_of(model_to_quantize(), weight, group_size, k_dim)
        if _is_done(shard, group_size):
            return True
        obstacle = obstacles.of_the_weight(module, parameter_name, shard)
        if obstacle is not None:
            return _leave(module, parameter_name, obstacle)
        quantized = _quantized(module, shard, group_size, algorithm)
    except (TypeError, ValueError) as error:
        name = name_of(module, parameter_name)
        raise type(error)(f"{name}: {error}. {progress()}") from error
    _replace(module, parameter_name, nn.Parameter(sharded_like(weight, quantized), requires_grad=False))
    return True


def _is_done(weight: Tensor, group_size: int) -> bool:
    return obstacles.is_4_bit(weight) and obstacles.group_size_of(weight) == group_size


def _obstacle(
    run: Run | None, module: nn.Module, parameter_name: str, weight: Tensor, group_size: int
) -> str | None:
    """Why a weight is left, by what all processes know of it; or None."""
    stands_in = run is not None and not run.is_visiting(module)
    alone = run is None or stands_in or not run.fqn
    obstacle = obstacles.of_no_parameter(module, parameter_name, alone)
    if obstacle is None and not is_sharded(weight):
        obstacle = obstacles.of_the_weight(module, parameter_name, weight)
    # What only had better be left: not where a checkpoint holds it in 4 bits already, nor for AWQ and
    # SmoothQuant, which hand over another module and need what they ask for.
    if obstacle is not None or is_allocating() or stands_in:
        return obstacle
    if run is not None:
        obstacle = obstacles.of_training(run, weight)
    return obstacle or obstacles.of_size(module, weight, group_size)


def _leave(module: nn.Module, parameter_name: str, reason: str) -> bool:
    """Report that a weight is left as it was; False, for "it is not 4-bit now"."""
    run, name = current_run(), name_of(module, parameter_name)
    if run is None:
        warn_user(left_as_it_was(name, reason), 4)
    else:
        run.report.leave(name, reason)
    return False


def _replace(module: nn.Module, parameter_name: str, quantized: nn.Parameter) -> None:
    others = left_behind(module, parameter_name)
    setattr(module, parameter_name, quantized)
    if others:
        warn_untied(name_of(module, parameter_name), others)


def _quantized(module: nn.Module, weight: Tensor, group_size: int, algorithm: str) -> Int4Weight:
    if is_allocating():
        # The memory is uninitialized, and may be NaN. Zeros may be filled by any cuts.
        allocated = Int4OpaqueTensor.empty(weight.shape, group_size, weight.dtype, device=weight.device)
        zeros: Int4OpaqueTensor = allocated.new_zeros(allocated.shape)
        return zeros
    block_size = [1] * (weight.ndim - 1) + [group_size]
    if is_input_first(module, weight):
        quantized = Int4OpaqueTensor.from_hp(weight.transpose(-2, -1), block_size, algorithm)
        return Int4TransposedTensor(quantized)
    return Int4OpaqueTensor.from_hp(weight, block_size, algorithm)


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


def warn_untied(name: str, others: list[str]) -> None:
    """Warn that a parameter is 4-bit now, and was one with others that are not."""
    warn_user(
        f"{name} and {', '.join(others)} were one parameter, and only {name} is 4-bit now: they are "
        "tied no longer. Whatever ties them again, as tie_weights() of transformers, drops the 4-bit "
        "one. Choose both for one 4-bit weight, with filter_fn=lambda module, name: isinstance(module, "
        "(torch.nn.Linear, torch.nn.Embedding)), or neither",
        4,
    )

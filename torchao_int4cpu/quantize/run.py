"""The run of `quantize_` that a handler is called in: which model, which module, and who asks.

torchao gives a handler the module, but neither its name nor the model. Its functions that visit modules
are wrapped once; what they are called with is kept in context variables. Where nothing is known, as
with a torchao whose functions have other names, messages describe the module instead.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torchao.quantization.quant_api as quant_api
from torch import nn
from torchao.quantization import FqnToConfig, fqn_matches_fqn_config

from torchao_int4cpu.tensor.transposed import Int4Weight


class Holder(NamedTuple):
    """A module that holds a parameter, its name in the model, and the parameter's name in it."""

    module: nn.Module
    fqn: str
    parameter: str


class Run:
    """One call of `quantize_`.

    Args:
        model: that it was called with. It is not kept alive.
        is_chosen: whether the run quantizes the parameter of a holder, if it has not been there yet.

    Attributes:
        fqn: of the module that is visited now; empty for the model itself.
    """

    def __init__(self, model: nn.Module, is_chosen: Callable[[Holder], bool]) -> None:
        self._model = weakref.ref(model)
        self.is_chosen = is_chosen
        self.fqn = ""

    @property
    def model(self) -> nn.Module | None:
        """What `quantize_` was called with."""
        return self._model()

    @functools.cached_property
    def shared(self) -> dict[int, list[Holder]]:
        """`shared_parameters` of the model, searched once."""
        return {} if self.model is None else shared_parameters(self.model)


def shared_parameters(model: nn.Module) -> dict[int, list[Holder]]:
    """Who holds each parameter that has several holders, by its id, in the order of visits."""
    holders: dict[int, list[Holder]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(Holder(module, fqn, name))
    return {key: found for key, found in holders.items() if len(found) > 1}


_current: ContextVar[Run | None] = ContextVar("current run of quantize_", default=None)

#: The last model that `quantize_` began to visit with an `FqnToConfig`, and that config. Its end is not
#: seen, so it counts only for visits with this config.
_by_name: ContextVar[tuple[Run, FqnToConfig] | None] = ContextVar("run by names", default=None)

#: Whether uninitialized memory may be "quantized", because only the shape is asked for.
_allocating: ContextVar[bool] = ContextVar("allocating", default=False)


@contextlib.contextmanager
def uninitialized_weights() -> Iterator[None]:
    """Within this block, weights are allocated to be copied into: their numbers are not looked at."""
    token = _allocating.set(True)
    try:
        yield
    finally:
        _allocating.reset(token)


def is_allocating() -> bool:
    """Whether `uninitialized_weights` says so here."""
    return _allocating.get()


def name_of(module: nn.Module, parameter_name: str) -> str:
    """The name of the parameter in the model that is being quantized, or a description of it."""
    run = _current.get()
    if run is not None and run.fqn:
        return f"{run.fqn}.{parameter_name}"
    return f"{parameter_name} of {type(module).__name__}({type(module).extra_repr(module)})"


def model_to_quantize() -> nn.Module | None:
    """What `quantize_` was called with, if that is known."""
    run = _current.get()
    return None if run is None else run.model


def progress() -> str:
    """A sentence on what of the model has been quantized so far."""
    model = model_to_quantize()
    if model is None:
        return "This layer is unchanged"
    done = [name for name, parameter in model.named_parameters() if isinstance(parameter, Int4Weight)]
    if not done:
        return "Nothing has been changed"
    return f"4-bit already: {', '.join(done)}; every other layer is unchanged"


def left_behind(module: nn.Module, parameter_name: str) -> list[str]:
    """Names under which a parameter will stay as it is in other modules, when `quantize_` is done.

    Asked before the parameter is replaced in ``module``. The model is searched once a `quantize_`.
    """
    run = _current.get()
    if run is None:
        return []
    weight = getattr(module, parameter_name)
    others = []
    passed = True
    for holder in run.shared.get(id(weight), []):
        if holder.module is module and holder.parameter == parameter_name:
            passed = False  # what comes after this is still to be visited
        elif getattr(holder.module, holder.parameter) is weight and (
            passed or not run.is_chosen(holder)
        ):
            others.append(f"{holder.fqn}.{holder.parameter}")
    return others


# --- torchao's visits -----------------------------------------------------------------------------


@contextlib.contextmanager
def _visiting(run: Run | None, fqn: str) -> Iterator[None]:
    if run is None:
        yield
        return
    run.fqn = fqn
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def _follow_filter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that visits a model by a filter: it calls itself for each child."""

    @functools.wraps(original)
    def visit(
        model: nn.Module,
        replacement_fn: Any,
        filter_fn: Any,
        cur_fqn: str = "",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = _current.get() if cur_fqn else Run(model, lambda h: bool(filter_fn(h.module, h.fqn)))
        with _visiting(run, cur_fqn.removesuffix(".")):
            return original(model, replacement_fn, filter_fn, cur_fqn, *args, **kwargs)

    return visit


def _begin_by_name(module: nn.Module, fqn: str, config: FqnToConfig) -> None:
    """Note that a run begins: the first module that `quantize_` looks at is the model itself."""
    if fqn == "":

        def is_chosen(holder: Holder) -> bool:
            names = (holder.fqn, f"{holder.fqn}.{holder.parameter}")
            return any(fqn_matches_fqn_config(name, config) for name in names) or (
                "_default" in config.fqn_to_config and isinstance(holder.module, nn.Linear)
            )

        _by_name.set((Run(module, is_chosen), config))


def _follow_match(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that asks whether a module has parameters that an `FqnToConfig` names."""

    @functools.wraps(original)
    def match(module: nn.Module, fqn: str, config: FqnToConfig) -> Any:
        _begin_by_name(module, fqn, config)
        return original(module, fqn, config)

    return match


def _follow_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that quantizes the parameters of a module that an `FqnToConfig` names."""

    @functools.wraps(original)
    def handle(module: nn.Module, fqn: str, config: FqnToConfig) -> Any:
        _begin_by_name(module, fqn, config)
        begun = _by_name.get()
        run = begun[0] if begun is not None and begun[1] is config else None
        with _visiting(run, fqn):
            return original(module, fqn, config)

    return handle


def _follow_torchao() -> None:
    for name, follow in (
        ("_replace_with_custom_fn_if_matches_filter", _follow_filter),
        ("_module_param_matches_fqn_config", _follow_match),
        ("_fqn_to_config_handler", _follow_names),
    ):
        original = getattr(quant_api, name, None)
        if original is not None and not hasattr(original, "torchao_int4cpu"):
            followed = follow(original)
            followed.torchao_int4cpu = True  # type: ignore[attr-defined]
            setattr(quant_api, name, followed)


_follow_torchao()

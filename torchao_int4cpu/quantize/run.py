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
from torchao.quantization import Int4WeightOnlyConfig as TorchAOInt4WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor

from torchao_int4cpu.quantize.filters import weights_of
from torchao_int4cpu.quantize.report import Chosen, Report, is_4_bit
from torchao_int4cpu.tensor.transposed import Int4Weight

#: torchao's name for a packing format that only the code that wrote it understands.
OPAQUE = "opaque"

#: A model is being trained if at least this part of its numbers is frozen while others are trainable.
#: Adapters leave far more than half frozen, one layer of 48 is 2%. What models freeze that nobody
#: trains is less: 0.2% for the positions of MAE's 86M, nothing for YOLO's one fixed convolution.
FROZEN_SHARE = 0.01


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
        chosen: what said so.
        is_ours: whether it is known to have to do with 4-bit weights of this package.

    Attributes:
        fqn: of the module that is visited now; empty for the model itself.
        report: what was left and why; shared by several runs within `reported_together`.
    """

    def __init__(
        self, model: nn.Module, is_chosen: Callable[[Holder], bool], chosen: Chosen, is_ours: bool
    ) -> None:
        self._model = weakref.ref(model)
        self._last = weakref.ref(list(model.modules())[-1])
        self._visited = self._model
        self.is_chosen = is_chosen
        self.chosen = chosen
        self.fqn = ""
        outer = _together.get()
        self.report = Report() if outer is None else outer[0]
        self._prefix = "" if outer is None else outer[1]
        self._is_part = outer is not None
        self.report.is_ours |= is_ours

    @property
    def model(self) -> nn.Module | None:
        """What `quantize_` was called with."""
        return self._model()

    def visit(self, module: nn.Module, fqn: str) -> None:
        """Note which module is visited now."""
        self._visited, self.fqn = weakref.ref(module), fqn

    def is_visiting(self, module: nn.Module) -> bool:
        """Whether it is the module of the model that is visited now, and none that stands in for it."""
        return self._visited() is module

    def is_last(self, module: nn.Module) -> bool:
        """Whether no module of the model comes after it."""
        return self._last() is module

    def name(self, parameter_name: str) -> str:
        """The name of a parameter of the visited module, in the outermost model that is known."""
        return ".".join(filter(None, (self._prefix, self.fqn, parameter_name)))

    @property
    def has_names(self) -> bool:
        """Whether the visited module has a name, in the model or in one around it."""
        return bool(self._prefix or self.fqn)

    def begin(self) -> None:
        """Take part in the run, before anything is changed: look at what is frozen."""
        self.report.is_ours = True
        _ = self.frozen_weight

    def end(self) -> None:
        """Say what became of the model, if that has to do with us and nobody else says it."""
        model = self.model
        if not self.report.is_ours or model is None:
            return
        _forgo_fast_paths(model)
        if not self._is_part and not is_allocating():
            self.report.tell(model, self.chosen)

    @functools.cached_property
    def frozen_weight(self) -> str | None:
        """The largest of the frozen float weights, if there are enough for somebody to have chosen so.

        Not counted: embeddings, among which tables of positions are made frozen; biases; and weights
        that are quantized already, which are frozen always.
        """
        if self.model is None or self._is_part:  # as a model is loaded nobody has chosen yet
            return None
        found: list[tuple[int, str]] = []
        total = 0
        for fqn, module in self.model.named_modules():
            if isinstance(module, nn.Embedding):
                continue
            for name, parameter in module.named_parameters(fqn, recurse=False):
                plain = not isinstance(
                    parameter, (TorchAOBaseTensor, nn.parameter.UninitializedParameter)
                )
                if plain and parameter.is_floating_point() and not name.endswith("bias"):
                    total += parameter.numel()
                    if not parameter.requires_grad:
                        found.append((parameter.numel(), name))
        enough = found and sum(size for size, _ in found) >= FROZEN_SHARE * total
        return max(found)[1] if enough else None

    @functools.cached_property
    def shared(self) -> dict[int, list[Holder]]:
        """`shared_parameters` of the model, searched once."""
        return {} if self.model is None else shared_parameters(self.model)


def _forgo_fast_paths(model: nn.Module) -> None:
    """Keep torch's transformers from ops of their own, which have no products with 4-bit weights.

    They look for tensor subclasses themselves, but not everywhere: an encoder hands nested tensors to
    all layers if its first one is plain, which may be one that was not chosen, and a compiled layer
    finds none. What is set here is read for that decision only.
    """
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if any(map(is_4_bit, module.parameters())):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def shared_parameters(model: nn.Module) -> dict[int, list[Holder]]:
    """Who holds each parameter that has several holders, by its id, in the order of visits."""
    holders: dict[int, list[Holder]] = {}
    for fqn, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(Holder(module, fqn, name))
    return {key: found for key, found in holders.items() if len(found) > 1}


_current: ContextVar[Run | None] = ContextVar("current run of quantize_", default=None)

#: The last model that `quantize_` began to visit with an `FqnToConfig`, and that config. After an error
#: its end is not seen, so it counts only for visits with this config.
_by_name: ContextVar[tuple[Run, FqnToConfig] | None] = ContextVar("run by names", default=None)

#: Whether uninitialized memory may be "quantized", because only the shape is asked for.
_allocating: ContextVar[bool] = ContextVar("allocating", default=False)


#: A report that is made of several runs, and the name of the model that they are called with.
_together: ContextVar[tuple[Report, str] | None] = ContextVar("several runs", default=None)


@contextlib.contextmanager
def reported_together(report: Report, prefix: str = "") -> Iterator[None]:
    """Within this block, runs of `quantize_` put what they leave into one report, and tell nothing.

    Args:
        report: where it is put.
        prefix: the name in a whole model of what `quantize_` is called with.
    """
    token = _together.set((report, prefix))
    try:
        yield
    finally:
        _together.reset(token)


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


def current_run() -> Run | None:
    """The run that a handler is called in, if that is known."""
    return _current.get()


@contextlib.contextmanager
def visiting_child(fqn: str, child: nn.Module) -> Iterator[None]:
    """Within this block, a submodule of the visited module is visited; an empty name is itself."""
    run = _current.get()
    if run is None or not fqn:
        yield
        return
    before, visited = run.fqn, run._visited
    run.visit(child, f"{before}.{fqn}".removeprefix("."))
    try:
        yield
    finally:
        run.fqn, run._visited = before, visited


def is_chosen_by_itself(child: nn.Module, fqn: str) -> bool:
    """Whether an `FqnToConfig` has a say of its own about a submodule of the visited module."""
    run = _current.get()
    if run is None or run.chosen is Chosen.BY_FILTER:
        return False
    return run.is_chosen(Holder(child, f"{run.fqn}.{fqn}".removeprefix("."), "weight"))


def name_of(module: nn.Module, parameter_name: str) -> str:
    """The name of the parameter in the model that is being quantized, or a description of it."""
    run = _current.get()
    if run is not None and run.has_names:
        return run.name(parameter_name)
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
def _visiting(run: Run | None, module: nn.Module, fqn: str) -> Iterator[None]:
    if run is None:
        yield
        return
    run.visit(module, fqn)
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def makes_ours(config: object) -> bool:
    """Whether a config of torchao asks for 4-bit weights of this package."""
    if isinstance(config, FqnToConfig):
        return any(map(makes_ours, config.fqn_to_config.values()))
    return isinstance(config, TorchAOInt4WeightOnlyConfig) and config.int4_packing_format == OPAQUE


def chosen_by(config: object) -> Chosen:
    """What says which weights become 4-bit in a `quantize_` with this config."""
    if not isinstance(config, FqnToConfig):
        return Chosen.BY_FILTER
    return Chosen.BY_DEFAULT if "_default" in config.fqn_to_config else Chosen.BY_NAME


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
        if cur_fqn:
            with _visiting(_current.get(), model, cur_fqn.removesuffix(".")):
                return original(model, replacement_fn, filter_fn, cur_fqn, *args, **kwargs)

        def is_chosen(holder: Holder) -> bool:
            around = _module_around(model, holder)
            return bool(filter_fn(holder.module, holder.fqn)) or (
                around is not None and bool(filter_fn(*around))
            )

        # What follows `cur_fqn` are a device, and arguments of the handler: the config.
        extra: tuple[object, ...] = kwargs.get("extra_args", args[1] if len(args) > 1 else ())
        run = Run(model, is_chosen, Chosen.BY_FILTER, any(map(makes_ours, extra)))
        with _visiting(run, model, ""):
            result = original(model, replacement_fn, filter_fn, cur_fqn, *args, **kwargs)
        run.end()
        return result

    return visit


def _module_around(model: nn.Module, holder: Holder) -> tuple[nn.Module, str] | None:
    """The module with which that of a holder is quantized, and its name."""
    fqn = holder.fqn.rpartition(".")[0]
    around = model.get_submodule(fqn) if holder.fqn else model
    parts = weights_of(around, "weight") if around is not holder.module else ()
    return (around, fqn) if any(module is holder.module for _, module, _ in parts) else None


def _begin_by_name(module: nn.Module, fqn: str, config: FqnToConfig) -> None:
    """Note that a run begins: the first module that `quantize_` looks at is the model itself."""
    if fqn == "":

        def is_chosen(holder: Holder) -> bool:
            names = (holder.fqn, f"{holder.fqn}.{holder.parameter}")
            return any(fqn_matches_fqn_config(name, config) for name in names) or (
                "_default" in config.fqn_to_config and isinstance(holder.module, nn.Linear)
            )

        _by_name.set((Run(module, is_chosen, chosen_by(config), makes_ours(config)), config))


def _run_by_name(config: FqnToConfig) -> Run | None:
    begun = _by_name.get()
    return begun[0] if begun is not None and begun[1] is config else None


def _end_by_name(run: Run) -> None:
    _by_name.set(None)
    run.end()


def _follow_match(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that asks whether a module has parameters that an `FqnToConfig` names."""

    @functools.wraps(original)
    def match(module: nn.Module, fqn: str, config: FqnToConfig) -> Any:
        _begin_by_name(module, fqn, config)
        result = original(module, fqn, config)
        run = _run_by_name(config)
        by_default = "_default" in config.fqn_to_config and quant_api._is_linear(module)
        if run is not None and run.is_last(module) and not result and not by_default:
            _end_by_name(run)
        return result

    return match


def _follow_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that quantizes the parameters of a module that an `FqnToConfig` names."""

    @functools.wraps(original)
    def handle(module: nn.Module, fqn: str, config: FqnToConfig) -> Any:
        _begin_by_name(module, fqn, config)
        run = _run_by_name(config)
        with _visiting(run, module, fqn):
            result = original(module, fqn, config)
        if run is not None and run.is_last(module):
            _end_by_name(run)
        return result

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

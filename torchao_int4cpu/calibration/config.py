"""`GPTQConfig`: calibration in two steps of `quantize_`, as torchao's prototype has them."""

from __future__ import annotations

import statistics
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int4WeightOnlyConfig as TorchAOInt4WeightOnlyConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from torchao_int4cpu.algorithms.hessian import DAMPING
from torchao_int4cpu.calibration.observer import Observer
from torchao_int4cpu.calibration.targets import ENOUGH_ROWS, Rules, Target, watchable
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig, quantize_module
from torchao_int4cpu.quantize.parameter import choosing_only, replace_weight
from torchao_int4cpu.quantize.report import LOGGER, warn_user
from torchao_int4cpu.quantize.run import current_run, makes_ours
from torchao_int4cpu.tensor.transposed import Int4Weight

STEPS = ("observe", "convert")


@dataclass
class GPTQConfig(AOBaseConfig):  # type: ignore[misc]  # torchao has no annotations
    """4-bit weights for the inputs that they have, in two steps::

        config = Int4WeightOnlyConfig(group_size=64)
        quantize_(model, GPTQConfig("observe", config))
        for batch in batches:
            model(**batch)
        quantize_(model, GPTQConfig("convert", config))

    All weights see what the float model gives; `calibrate`, which goes block by block and needs memory
    for one block only, gives better ones.

    Args:
        step: ``"observe"``, from which on the inputs of the chosen weights are gathered; or
            ``"convert"``, which makes them 4-bit.
        base_config: of the 4-bit weights, the same in both steps.
        percdamp: the damping, see `algorithms.hessian`.
        enough_rows: of activations for a weight, or an expert, to be quantized for its inputs.

    Raises:
        ValueError: an argument breaks its rule.
    """

    step: str = "observe"
    base_config: Any = None
    percdamp: float = DAMPING
    enough_rows: int = ENOUGH_ROWS

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ValueError(f"step={self.step!r} is not known; choose {' or '.join(map(repr, STEPS))}")
        if self.base_config is None:
            self.base_config = Int4WeightOnlyConfig()
        if not isinstance(self.base_config, TorchAOInt4WeightOnlyConfig) or not makes_ours(
            self.base_config
        ):
            raise ValueError(
                f"base_config is {self.base_config!r}; give an Int4WeightOnlyConfig with "
                "packing_format='opaque', or use torchao's own GPTQConfig"
            )
        if not 0 < self.percdamp < float("inf"):
            raise ValueError(f"percdamp={self.percdamp} must be more than 0; 0.01 is usual")


GPTQConfig.__module__ = "torchao_int4cpu"


class _Observed:
    """A module whose inputs are gathered while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.observers: dict[str, Observer] = {}
        self._fast = False
        before = module.register_forward_pre_hook(self._begin, prepend=True)
        after = module.register_forward_hook(self._end, always_call=True)
        self._hooks = (before, after)

    def _begin(self, *_: Any) -> None:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it multiplies within an op of its own
        for observer in self.observers.values():
            observer.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, *_: Any) -> None:
        for observer in reversed(self.observers.values()):
            observer.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self._fast)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


_OBSERVED: weakref.WeakKeyDictionary[nn.Module, _Observed] = weakref.WeakKeyDictionary()


@register_quantize_module_handler(GPTQConfig)  # type: ignore[untyped-decorator]
def _handle(module: nn.Module, config: GPTQConfig, *, parameter_name: str = "weight") -> nn.Module:
    with choosing_only() as found:
        quantize_module(module, config.base_config, parameter_name=parameter_name)
    targets = [Target((each,)) for each in found]
    if not targets:
        return module
    if config.step == "observe":
        observed = _OBSERVED.get(module)
        if observed is None:
            observed = _OBSERVED[module] = _Observed(module)
        observed.observers[parameter_name] = Observer(watchable(targets))
        return module
    observed = _OBSERVED.get(module)
    if observed is None or parameter_name not in observed.observers:
        raise ValueError(
            f"{targets[0].name} was not observed; call quantize_ with step='observe' first, and run "
            "the model on some batches"
        )
    run = current_run()
    if run is not None:
        run.begin()  # it is told of what becomes 4-bit
    for target in targets:
        _convert(target, config)
    del observed.observers[parameter_name]
    if not observed.observers:
        observed.remove()
        del _OBSERVED[module]
    return module


def _convert(target: Target, config: GPTQConfig) -> None:
    """Make a weight 4-bit for all that has reached it, in whichever modules."""
    seen = [
        watched
        for observed in _OBSERVED.values()
        for observer in observed.observers.values()
        for watched in observer.watched.values()
        if watched.weight.data_ptr() == target.weight.data_ptr()
    ]
    if seen and not any(any(watched.rows) for watched in seen):
        raise ValueError(
            f"no input has reached {target.name} since it is observed; run the model on some batches"
        )

    def make() -> Int4Weight:
        hessians = seen[0].hessians if seen else None
        for other in seen[1:]:
            for hessian, more in zip(seen[0].hessians, other.hessians):
                hessian.add(more.sum, more.rows)
        quantized, told = target.quantized(hessians, Rules(config.percdamp, config.enough_rows))
        error = statistics.median(each.error for each in told)
        LOGGER.info("%s is 4-bit; its outputs are %.1f%% off", target.name, 100 * error)
        rounded = [each for each in told if each.rounded]
        if rounded:
            names = ", ".join(each.name for each in rounded)
            warn_user(f"rounded by mse, as {rounded[0].rounded}: {names}", 4)
        return quantized

    (holder,) = target.holders
    replace_weight(holder.module, holder.parameter_name, holder.group_size, "gptq", make)

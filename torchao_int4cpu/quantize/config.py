"""`Int4WeightOnlyConfig`, and its registration with torchao's `quantize_`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any

from torch import nn
from torchao.quantization import Int4WeightOnlyConfig as TorchAOInt4WeightOnlyConfig
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm
from torchao.quantization.transform_module import (
    _QUANTIZE_CONFIG_HANDLER,
    register_quantize_module_handler,
)
from torchao.quantization.utils import recommended_inductor_config_setter

from torchao_int4cpu.algorithms.choose_qparams import algorithm_named
from torchao_int4cpu.format.groupwise import check_group_size
from torchao_int4cpu.quantize.filters import weights_of
from torchao_int4cpu.quantize.parameter import quantize_parameter
from torchao_int4cpu.quantize.run import OPAQUE, is_chosen_by_itself, visiting_child


@dataclass
class Int4WeightOnlyConfig(TorchAOInt4WeightOnlyConfig):  # type: ignore[misc]  # torchao has no annotations
    """4-bit weights on the CPU, for ``quantize_(model, Int4WeightOnlyConfig())``.

    torchao's own config of that name with other defaults. Serialized, it reads back as torchao's own
    class with ``int4_packing_format="opaque"``, which works the same once this package is imported.

    Args:
        group_size: codes along K that share a scale and a zero: 32, 64, 128 or 256.
        set_inductor_config: whether to change inductor's process-wide settings as torchao's default
            does. They concern GPU code only, so the default here is to leave them alone.
        int4_packing_format: ``"opaque"``.
        int4_choose_qparams_algorithm: ``"tinygemm"``, ``"hqq"`` or ``"mse"``; torchao's enum too.
        int4_tile_packed_ntile: torchao's, without effect here.
        packing_format: another spelling of ``int4_packing_format``.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    set_inductor_config: bool = False
    int4_packing_format: Any = OPAQUE
    int4_choose_qparams_algorithm: Any = Int4ChooseQParamsAlgorithm.TINYGEMM
    packing_format: InitVar[Any] = None

    def __post_init__(self, packing_format: Any) -> None:
        super().__post_init__()
        for name, value in (
            ("packing_format", packing_format),
            ("int4_packing_format", self.int4_packing_format),
        ):
            # torchao's enums are strings, so a member equals its value.
            if value is not None and value != OPAQUE:
                raise ValueError(
                    f"{name}={value!r} is not supported; choose {OPAQUE!r}, "
                    "or use torchao.quantization.Int4WeightOnlyConfig for torchao's own formats"
                )
        self.int4_packing_format = OPAQUE
        check_config(self)
        # What torchao's enum knows is stored as its member, because that is what it reads back as.
        with contextlib.suppress(ValueError):
            self.int4_choose_qparams_algorithm = Int4ChooseQParamsAlgorithm(
                self.int4_choose_qparams_algorithm
            )


Int4WeightOnlyConfig.__module__ = "torchao_int4cpu"  # as pickles name it
# Older pickles, as of a whole model of transformers, import the module that it was in.
sys.modules.setdefault("torchao_int4cpu.config", sys.modules[__name__])

# After the class is made, so that it is no field: it would be serialized, and torchao's class has none.
Int4WeightOnlyConfig.packing_format = property(
    lambda self: self.int4_packing_format, doc="``int4_packing_format`` by the other spelling."
)


def check_config(config: TorchAOInt4WeightOnlyConfig) -> None:
    """Refuse a config that cannot be carried out; torchao's own class does not check.

    Raises:
        TypeError, ValueError: ``group_size`` or ``int4_choose_qparams_algorithm`` breaks its rule.
    """
    check_group_size(config.group_size)
    algorithm_named(config.int4_choose_qparams_algorithm)


def quantize_module(
    module: nn.Module,
    config: TorchAOInt4WeightOnlyConfig,
    *,
    parameter_name: str = "weight",
) -> nn.Module:
    """The `quantize_` handler: see `quantize_parameter` and `weights_of`.

    Raises:
        TypeError, ValueError: the config or the weight breaks a rule.
    """
    check_config(config)
    algorithm = config.int4_choose_qparams_algorithm
    done = False
    for fqn, child, name in list(weights_of(module, parameter_name)):
        if fqn and is_chosen_by_itself(child, fqn):
            continue  # an `FqnToConfig` says something else about it
        with visiting_child(fqn, child):
            done |= quantize_parameter(child, name, config.group_size, algorithm)
    if done and config.set_inductor_config:
        recommended_inductor_config_setter()
    return module


def _register() -> None:
    register_quantize_module_handler(Int4WeightOnlyConfig)(quantize_module)
    # torchao's handler is kept for all of its own formats. It is remembered on ours, so that a second
    # import finds it there and does not wrap ours again.
    current = _QUANTIZE_CONFIG_HANDLER[TorchAOInt4WeightOnlyConfig]
    original: Callable[..., nn.Module] = getattr(current, "torchao_handler", current)

    def handle_torchao_config(
        module: nn.Module,
        config: TorchAOInt4WeightOnlyConfig,
        *,
        parameter_name: str = "weight",
    ) -> nn.Module:
        handler = quantize_module if config.int4_packing_format == OPAQUE else original
        return handler(module, config, parameter_name=parameter_name)

    handle_torchao_config.torchao_handler = original  # type: ignore[attr-defined]
    register_quantize_module_handler(TorchAOInt4WeightOnlyConfig)(handle_torchao_config)


_register()

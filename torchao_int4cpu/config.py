"""`Int4WeightOnlyConfig` and the handler by which torchao's `quantize_` runs it."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any

import torch
import torchao.quantization.quant_api as quant_api
from torch import Tensor, nn
from torchao.quantization import Int4WeightOnlyConfig as TorchAOInt4WeightOnlyConfig
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm
from torchao.quantization.transform_module import (
    _QUANTIZE_CONFIG_HANDLER,
    register_quantize_module_handler,
)
from torchao.quantization.utils import recommended_inductor_config_setter

from torchao_int4cpu.choose_qparams import algorithm_named
from torchao_int4cpu.groupwise import FLOAT_DTYPES, check_group_size
from torchao_int4cpu.tensor import Int4OpaqueTensor

#: torchao's name for a packing format that only the code that wrote it understands.
OPAQUE = "opaque"


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
    """The `quantize_` handler: replace one parameter by its 4-bit form, or leave it and warn.

    Raises:
        TypeError, ValueError: the config or the weight breaks a rule (NaN, another device). The
            message names the parameter and the layers that were done before it.
    """
    check_config(config)
    weight = getattr(module, parameter_name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{_name_of(module, parameter_name)} is not a parameter; "
            f"choose modules that have a {parameter_name!r}, for example with filter_fn"
        )
    if isinstance(weight, Int4OpaqueTensor) and weight.block_size[1] == config.group_size:
        return module  # a module that sits at two places of the model is visited twice
    obstacle = _obstacle(weight)
    if obstacle is not None:
        warnings.warn(f"{_name_of(module, parameter_name)} is left as it was: {obstacle}", stacklevel=2)
        return module
    if config.set_inductor_config:
        recommended_inductor_config_setter()
    try:
        quantized = Int4OpaqueTensor.from_hp(
            weight, [1, config.group_size], config.int4_choose_qparams_algorithm
        )
    except (TypeError, ValueError) as error:
        name = _name_of(module, parameter_name)
        raise type(error)(f"{name}: {error}. {_progress()}") from error
    setattr(module, parameter_name, nn.Parameter(quantized, requires_grad=False))
    if not isinstance(module.extra_repr, ExtraRepr):
        module.extra_repr = ExtraRepr(module)  # type: ignore[method-assign]
    return module


def _obstacle(weight: Tensor) -> str | None:
    """Why a weight cannot be quantized at all, or None."""
    if isinstance(weight, Int4OpaqueTensor):
        return f"it is 4-bit already, in groups of {weight.block_size[1]}"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"it is a {type(weight).__name__} already"
    if weight.dtype not in FLOAT_DTYPES:
        return f"it is {weight.dtype}, and only bfloat16, float16 and float32 can be quantized"
    if weight.ndim != 2 or weight.numel() == 0:
        return f"its shape is {list(weight.shape)}, and only [N, K] can be quantized"
    return None


class ExtraRepr:
    """Stands in for a module's ``extra_repr`` so that printing the model shows its 4-bit weights.

    An object, because a bound method of a closure could be neither pickled nor deep-copied with its
    module; with a weak reference, or a model that is deleted would wait for the garbage collector.
    """

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
            if isinstance(weight, Int4OpaqueTensor)
        ]
        return ", ".join(filter(None, [type(module).extra_repr(module), *shown]))


# --- where in the model we are ------------------------------------------------------------------
# torchao gives a handler the module but not its name. The name is needed only for a message, so it is
# looked up in the calling frames then; where they look different one day, the message falls back.


def _calling_frames() -> dict[str, types.FrameType]:
    frames: dict[str, types.FrameType] = {}
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == quant_api.__file__:
            frames.setdefault(frame.f_code.co_name, frame)
        frame = frame.f_back
    return frames


def _name_of(module: nn.Module, parameter_name: str) -> str:
    frames = _calling_frames()
    fqn = ""
    if "_replace_with_custom_fn_if_matches_filter" in frames:
        found = frames["_replace_with_custom_fn_if_matches_filter"].f_locals.get("cur_fqn", "")
        fqn = found.removesuffix(".")
    elif "_fqn_to_config_handler" in frames:
        fqn = frames["_fqn_to_config_handler"].f_locals.get("fqn", "")
    if fqn:
        return f"{fqn}.{parameter_name}"
    return f"{parameter_name} of {type(module).__name__}({type(module).extra_repr(module)})"


def _progress() -> str:
    frames = _calling_frames()
    root = frames["quantize_"].f_locals.get("model") if "quantize_" in frames else None
    if not isinstance(root, nn.Module):
        return "This layer is unchanged"
    done = [name for name, p in root.named_parameters() if isinstance(p, Int4OpaqueTensor)]
    if not done:
        return "Nothing has been changed"
    return f"4-bit already: {', '.join(done)}; every other layer is unchanged"


# --- registration -------------------------------------------------------------------------------


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
torch.serialization.add_safe_globals([ExtraRepr])

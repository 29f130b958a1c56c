"""Checkpoints of torchao's own 4-bit formats, read without torchao's classes and converted.

A pickle names the class of each tensor. torchao moved its prototype twice and dropped the format
before it, so most of these files name a class that the installed torchao does not have.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.types import FileLike

from torchao_int4cpu.format.groupwise import QPARAMS_DTYPE, GroupwiseInt4
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, layout_named, unpack
from torchao_int4cpu.importers.torchao_formats import FORMATS, weight_of_parts
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: The prototype's tensor, as the pickles of each release name it.
PROTOTYPE_PATHS = (
    "torchao.quantization.Int4OpaqueTensor",  # 0.14
    "torchao.prototype.int4_opaque_tensor.Int4OpaqueTensor",  # 0.15, 0.16
    "torchao.prototype.quantization.int4.Int4OpaqueTensor",  # 0.17, 0.18
)
_PROTOTYPE_PARTS = {
    "qdata",
    "scale_and_zero",
    "block_size",
    "act_pre_scale",
    "qzeros",
    "compensation",
    "act_mapping_type",
}

#: What `Int4WeightOnlyConfig(layout=Int4CPULayout())` made in torchao 0.9 to 0.15: a tensor that knows
#: the group size around one that has the packed parts. PyTorch's op packed them as the prototype's.
AFFINE_PATH = "torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor"
AFFINE_IMPL_PATH = "torchao.dtypes.uintx.int4_cpu_layout.Int4CPUAQTTensorImpl"
_AFFINE_LAYOUT_PATH = "torchao.dtypes.uintx.int4_cpu_layout.Int4CPULayout"
_ZERO_POINT_DOMAIN_PATH = "torchao.quantization.quant_primitives.ZeroPointDomain"
#: Codes 0..15 and a zero in weight units (`ZeroPointDomain.FLOAT` is 2): the equation of our tensor.
_AFFINE_EQUATION = {"quant_min": 0, "quant_max": 15, "zero_point_domain": 2}

_NO_LAYOUT = (
    "a 4-bit CPU weight of torchao does not say how its bytes lie; give layout='avx512', 'avx2' or "
    "'default', the instruction set of the machine that quantized (its `torchao-int4cpu info` says it)"
)

#: Rows of each weight that `_energy` looks at: a multiple of every layout's rows per block.
SAMPLE_ROWS = 64
#: A wrong layout raises the sum of squares. Measured on these rows of the 36 linear weights of MiniLM
#: (tinygemm and hqq, groups of 32 and 128): 1.16 times or more on each, 1.29 on all of them together.
#: On normally distributed weights 1.18, on uniformly distributed ones nothing (0.999 to 1.02).
CLEAR_RATIO = 1.1


def load_torchao_checkpoint(file: FileLike, layout: str | None = None, *, mmap: bool = False) -> Any:
    """Read a checkpoint that holds 4-bit weights of torchao's own, and convert them.

    As ``torch.load(file, map_location="cpu", weights_only=True)``, which runs nothing from the file,
    but every weight of torchao's ``Int4OpaqueTensor`` (0.14 to 0.18) or ``Int4CPULayout`` (0.9 to 0.15)
    comes as an `Int4OpaqueTensor` of this package, repacked for this process; and so does one of its
    formats for other devices (`torchao_formats`). None of torchao's classes is needed. Everything else
    is as `torch.load` gives it: order, metadata, what is shared.

    Args:
        file: what ``torch.save`` wrote: a state dict, tensors or parameters in nested dicts, lists and
            tuples, or a single one.
        layout: of the formats for CPUs, how the bytes lie: ``"avx512"``, ``"avx2"`` or ``"default"``,
            the instruction set of the machine *that quantized*. **The file does not record this.**
            ``python -m torchao_int4cpu info`` shows the layout of a machine.
        mmap: as `torch.load`'s. Do not write to the file while the result is in use.

    Not while another thread loads: for this time the process's list of safe classes is another one.

    Warns:
        UserWarning: another layout fits the weights clearly better. Weights are smallest in the layout
            they were packed in, as codes and scales were made for each other; uniformly distributed
            (untrained) weights do not show it, so compare an output with a known one, too.

    Raises:
        TypeError: a weight has int8 activations (DA8W4), or a part of the wrong class or dtype.
        ValueError: no layout for a format that needs one, or an unknown one; a class in the file that
            is neither these nor known to `torch.load` (a whole model); or parts that do not fit
            together. Messages name the entry.
        OSError, RuntimeError, pickle.UnpicklingError: as `torch.load`, for a file that it cannot read.
    """
    source = None if layout is None else layout_named(layout)
    found: dict[int, _StandIn] = {}
    with _safe_globals_for(_stand_ins(found)):
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if unknown is None:
                raise
            raise _unknown_class(unknown[1]) from error
    energies = dict.fromkeys(LAYOUTS, 0.0)
    for stand_in in found.values():
        try:
            converted = _convert(stand_in, source, energies)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{_path_to(stand_in, loaded)}: {error}") from error
        # In place: whatever holds the stand-in now holds our tensor.
        torch.utils.swap_tensors(stand_in, converted)
    if source is not None:
        _warn_if_another_fits_better(source, energies)
    return loaded


class _StandIn(Tensor):
    """Takes the place of one of torchao's classes while a file is read: it keeps the state as it came.

    It must not convert yet: in a file of the format before PyTorch 1.6's, the data follows the pickle.
    """

    state: object = None
    #: Of `torchao_formats.FORMATS`; empty for those of CPUs.
    format = ""

    def __new__(cls, *args: object) -> NoReturn:
        # Unpickling a tensor does not come here; a pickle made to do harm may.
        raise TypeError(f"{cls.__name__} is not called by what torch.save writes; the file is damaged")

    def __setstate__(self, state: object) -> None:
        self.state = state

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: object, args: object = (), kwargs: object = None
    ) -> NoReturn:
        raise TypeError(f"{func} got a tensor of torchao's without data; the file is damaged")


def _stand_ins(found: dict[int, _StandIn]) -> dict[str, type]:
    """What to use for each of torchao's classes. Each weight that is read registers in ``found``."""

    class Weight(_StandIn):
        def __setstate__(self, state: object) -> None:
            super().__setstate__(state)
            found[id(self)] = self

    others = {name: type(name.rpartition(".")[2], (Weight,), {"format": name}) for name in FORMATS}
    return {
        **others,
        **dict.fromkeys(PROTOTYPE_PATHS, Weight),
        AFFINE_PATH: Weight,
        AFFINE_IMPL_PATH: _StandIn,
        _AFFINE_LAYOUT_PATH: object,  # has no content
        _ZERO_POINT_DOMAIN_PATH: int,  # an enum, pickled as a call with its value
    }


@contextmanager
def _safe_globals_for(stand_ins: Mapping[str, type]) -> Iterator[None]:
    """Let `torch.load` find the stand-ins under these names, and not torchao's own classes.

    `torch.serialization.safe_globals` alone does not do: torchao registers its classes too, and of two
    that have one name PyTorch takes any.
    """
    before = torch.serialization.get_safe_globals()
    others = [entry for entry in before if _name_of(entry) not in stand_ins]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(others)
    torch.serialization.add_safe_globals([(cls, name) for name, cls in stand_ins.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _name_of(entry: Callable[..., Any] | tuple[Callable[..., Any], str]) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _unknown_class(name: str) -> ValueError:
    return ValueError(
        f"the file holds {name}, which is neither a 4-bit CPU weight of torchao's nor a class that "
        "torch.load(weights_only=True) knows; save model.state_dict() instead of the model, or allow "
        "a class that you trust with torch.serialization.add_safe_globals"
    )


def _convert(stand_in: _StandIn, source: NibbleLayout | None, energies: dict[str, float]) -> Tensor:
    """The weight as ours, a parameter if it was one; its sums of squares are added to ``energies``."""
    state = stand_in.state
    if not isinstance(state, dict):
        raise TypeError(
            f"the state is a {type(state).__name__}; it must be a dict, the file is damaged"
        )
    if stand_in.format:
        parts = state
    else:
        parts = _affine_parts(state) if "tensor_impl" in state else _prototype_parts(state)
    for name, part in parts.items():
        # A wrapper without data would pass every check of shapes, and the kernels read its address.
        if isinstance(part, Tensor) and not _is_plain(part):
            raise TypeError(
                f"{name} is a {type(part).__name__} ({part.layout}); it must be a dense tensor"
            )
    if stand_in.format:
        converted = weight_of_parts(stand_in.format, parts, stand_in.shape, stand_in.dtype)
    elif source is None:
        raise ValueError(_NO_LAYOUT)
    else:
        converted = _from_upstream_parts(parts, stand_in.shape, stand_in.dtype, source.name)
        if converted.device.type == "cpu":
            for layout in LAYOUTS.values():
                energies[layout.name] += _energy(parts["qdata"], converted, layout)
    # A parameter stays one. Where the tensor has a class of its own, that is an attribute.
    if state.get("_is_param") is True:
        return nn.Parameter(converted, requires_grad=False)
    return converted


def _is_plain(part: Tensor) -> bool:
    return type(part) in (Tensor, nn.Parameter) and part.layout == torch.strided


def _prototype_parts(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The parts of the prototype's tensor; a part that it does not have may be a later format's."""
    public = {name: part for name, part in state.items() if not str(name).startswith("_")}
    unknown = [
        repr(name) for name, part in public.items() if name not in _PROTOTYPE_PARTS and part is not None
    ]
    if unknown:
        raise ValueError(
            f"the tensor has {', '.join(unknown)}, which torchao 0.14 to 0.18 do not write; "
            "install a newer torchao_int4cpu, or quantize the original weight again"
        )
    return public


def _affine_parts(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The parts of an ``AffineQuantizedTensor``, under the names that the prototype has for them."""
    impl = state["tensor_impl"]
    if not isinstance(impl, _StandIn) or not isinstance(impl.state, dict):
        raise TypeError(
            f"tensor_impl is a {type(impl).__name__}; it must be torchao's Int4CPUAQTTensorImpl"
        )
    for name, value in _AFFINE_EQUATION.items():
        if not isinstance(state.get(name), int) or state[name] != value:
            raise ValueError(
                f"{name} is {state.get(name)!r}; it must be {value}, as Int4CPULayout has it"
            )
    return {
        "qdata": impl.state.get("packed_weight"),
        "scale_and_zero": impl.state.get("scale_and_zero"),
        "block_size": state.get("block_size"),
    }


def _energy(qdata: Tensor, weight: Int4OpaqueTensor, layout: NibbleLayout) -> float:
    """The sum of squares of the first rows of ``weight``, had its file's ``qdata`` this ``layout``."""
    codes = unpack(qdata[:SAMPLE_ROWS], layout)
    scale, zero = weight.scale_and_zero[:, :SAMPLE_ROWS].permute(2, 1, 0)
    sample = GroupwiseInt4(codes, scale, zero, weight.group_size)
    return float(sample.dequantize().square().sum(dtype=torch.float64))


def _warn_if_another_fits_better(source: NibbleLayout, energies: Mapping[str, float]) -> None:
    best = min(energies, key=energies.__getitem__)
    if energies[source.name] > CLEAR_RATIO * energies[best]:
        warnings.warn(
            f"layout={source.name!r} is probably wrong: read as {best!r}, the weights of the file have "
            f"a sum of squares that is {energies[source.name] / energies[best]:.2f} times smaller, "
            "which is what codes give with the scales they were made for; load it again with "
            f"layout={best!r}",
            stacklevel=3,
        )


def _path_to(target: Tensor, root: object) -> str:
    """The keys from ``root`` to ``target`` with dots between, as a state dict spells its names."""
    pending: deque[tuple[str, object]] = deque([("", root)])
    seen: set[int] = set()
    while pending:
        path, value = pending.popleft()
        if value is target:
            return path.removeprefix(".") or "the tensor"
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            pending.extend((f"{path}.{key}", item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            pending.extend((f"{path}.{index}", item) for index, item in enumerate(value))
    return "a tensor in the file"


# --- one tensor in memory ------------------------------------------------------------------------


def from_upstream(
    cls: type[Int4OpaqueTensor], t: Tensor, layout: str | None = None
) -> Int4OpaqueTensor:
    """Convert a 4-bit tensor of torchao's own, whose activations are not rounded.

    Args:
        t: an ``Int4OpaqueTensor`` of torchao's prototype, or one of `torchao_formats`.
        layout: of the former, how its bytes lie: ``"avx512"``, ``"avx2"`` or ``"default"``, the
            instruction set of the machine *that packed it*. **The prototype's tensor does not record
            this, and a wrong answer cannot be detected: it gives a weight with its rows mixed up.** If
            it was packed in this very process, pass ``native_layout().name``; if it came from a file,
            compare an output with a known one before you trust it.

    Scales and zeros of bfloat16 or float16 stay as they are; those of float32 are rounded to bfloat16.

    Raises:
        TypeError: ``t`` is not that class, or is its int8-activation mode.
        ValueError: unknown layout, parts that do not fit together, or a scale or zero that is
            not finite in what it is stored in.
    """
    name = f"{type(t).__module__}.{type(t).__name__}"
    if name in FORMATS:
        return weight_of_parts(name, vars(t), t.shape, t.dtype)
    if type(t).__name__ != "Int4OpaqueTensor" or not type(t).__module__.startswith("torchao."):
        raise TypeError(
            f"got a {name}; from_upstream converts "
            f"torchao.prototype.quantization.int4.Int4OpaqueTensor, {', '.join(FORMATS)}"
        )
    if layout is None:
        raise ValueError(_NO_LAYOUT)
    return _from_upstream_parts(vars(t), t.shape, t.dtype, layout)


def _from_upstream_parts(
    parts: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype, layout: str
) -> Int4OpaqueTensor:
    """`from_upstream` on the attributes of such a tensor, as its pickle has them.

    What is allocated is bounded by the bytes of the parts, whatever ``shape`` says.

    Raises:
        TypeError, ValueError: as `Int4OpaqueTensor.from_upstream`.
    """
    if any(parts.get(name) is not None for name in ("act_mapping_type", "qzeros", "compensation")):
        raise TypeError(
            "this tensor has int8 activations (DA8W4, "
            f"act_mapping_type={parts.get('act_mapping_type')!r}), a different format; "
            "only weight-only tensors can be converted, so quantize the original weight again"
        )
    names = ("qdata", "scale_and_zero", "block_size", "act_pre_scale")
    qdata, scale_and_zero, block_size, act_pre_scale = (parts.get(name, None) for name in names)
    # Contiguous: as many bytes as the shape says. The check of the parts refuses all others.
    if (
        isinstance(scale_and_zero, Tensor)
        and scale_and_zero.dtype == torch.float32
        and scale_and_zero.is_contiguous()
    ):
        scale_and_zero = scale_and_zero.to(QPARAMS_DTYPE)
    t = Int4OpaqueTensor(qdata, scale_and_zero, block_size, shape, layout, dtype, act_pre_scale)
    dtype_of_qparams = str(t.scale_and_zero.dtype).removeprefix("torch.")
    if t.device.type == "cpu" and not bool(torch.isfinite(t.scale_and_zero).all()):
        raise ValueError(
            f"scale_and_zero has NaN or infinite values in {dtype_of_qparams}; every one must be "
            "finite, so check the original weight and quantize it again"
        )
    return t.repack_()


Int4OpaqueTensor.from_upstream = classmethod(from_upstream)  # type: ignore[assignment]

#: The name of `load_torchao_checkpoint` before there were other importers.
load_prototype = load_torchao_checkpoint

"""`Int4OpaqueTensor`: the packed weight as a tensor. It holds parts, checks that they fit, converts.

It knows neither aten ops (`dispatch`) nor how a file stores it (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torchao.utils import TorchAOBaseTensor

from torchao_int4cpu.choose_qparams import QPARAMS_DTYPE, choose_qparams
from torchao_int4cpu.groupwise import (
    CODE_OFFSET,
    FLOAT_DTYPES,
    GroupwiseInt4,
    check_group_size,
)
from torchao_int4cpu.kernels import PackedInt4
from torchao_int4cpu.layout import (
    LAYOUTS,
    ROW_MULTIPLE,
    layout_named,
    native_layout,
    pack,
    repack,
    unpack,
)

#: What must fit together, and what holds it: shape and dtype are those of ``data``.
_PARTS = frozenset(
    ("qdata", "scale_and_zero", "block_size", "qdata_layout", "act_pre_scale", "data", "__dict__")
)


class Int4OpaqueTensor(TorchAOBaseTensor):  # type: ignore[misc]  # torchao has no annotations
    """A weight ``[N, K]`` in 4 bits, packed for PyTorch's int4 op on this CPU.

    It stands for the matrix of `GroupwiseInt4`::

        w[n, k]  =  (code[n, k] - 8) * scale[n, k // group_size] + zero[n, k // group_size]

    Data:
        qdata: uint8 ``[N', K'/2]``, two codes a byte in the order of ``qdata_layout`` (`layout`).
        scale_and_zero: bfloat16 ``[K'/group_size, N', 2]``.
        act_pre_scale: optional, float, ``[K]`` or one element; multiplies the activation.

    Attributes:
        block_size: ``[1, group_size]``.
        shape: ``[N, K]``. N' is N rounded up to a multiple of 16, K' is K rounded up to one of
            ``group_size``; what is added is never seen.
        qdata_layout: ``"avx512"``, ``"avx2"`` or ``"default"``.
        dtype: what `dequantize` gives: bfloat16, float16 or float32. The parts keep theirs.

    The weight is frozen: gradients flow through it to the activation, never into it, and
    ``requires_grad`` stays False.

    Raises:
        TypeError: a part has the wrong class or dtype.
        ValueError: the parts do not fit together.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]
    tensor_attribute_names = ["block_size", "shape", "qdata_layout", "dtype"]
    optional_tensor_data_names = ["act_pre_scale"]

    qdata: Tensor
    scale_and_zero: Tensor
    act_pre_scale: Tensor | None
    block_size: list[int]
    qdata_layout: str
    _fits = False  # whether the parts are as they were when they were checked

    def __new__(
        cls,
        qdata: Tensor,
        scale_and_zero: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        qdata_layout: str,
        dtype: torch.dtype,
        act_pre_scale: Tensor | None = None,
    ) -> Int4OpaqueTensor:
        check_parts(qdata, scale_and_zero, block_size, shape, qdata_layout, dtype, act_pre_scale)
        tensor: Int4OpaqueTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=qdata.device, requires_grad=False
        )
        return tensor

    def __init__(
        self,
        qdata: Tensor,
        scale_and_zero: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        qdata_layout: str,
        dtype: torch.dtype,
        act_pre_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Whoever made the parts can still `set_` them to less memory than was checked: not ours.
        self.qdata = qdata.detach() if type(qdata) is Tensor else qdata
        self.scale_and_zero = (
            scale_and_zero.detach() if type(scale_and_zero) is Tensor else scale_and_zero
        )
        self.block_size = list(block_size)
        self.qdata_layout = qdata_layout
        self.act_pre_scale = act_pre_scale
        self.__dict__["_fits"] = True  # `__new__` has checked them

    @classmethod
    def from_hp(
        cls,
        w: Tensor,
        block_size: Sequence[int],
        int4_choose_qparams_algorithm: str = "tinygemm",
    ) -> Int4OpaqueTensor:
        """Quantize and pack a weight.

        Args:
            w: bfloat16, float16 or float32 ``[N, K]`` on the CPU, finite, any N >= 1 and K >= 1.
            block_size: ``[1, group_size]``.
            int4_choose_qparams_algorithm: ``"tinygemm"``, ``"hqq"`` or ``"mse"``.

        Raises:
            TypeError, ValueError: as `choose_qparams`, or a wrong ``block_size``.
        """
        group_size = _group_size_of(block_size)
        groupwise = choose_qparams(w, group_size, int4_choose_qparams_algorithm)
        return cls.from_groupwise(groupwise, dtype=w.dtype)

    @classmethod
    def from_groupwise(
        cls,
        groupwise: GroupwiseInt4,
        *,
        dtype: torch.dtype = torch.bfloat16,
        act_pre_scale: Tensor | None = None,
    ) -> Int4OpaqueTensor:
        """Pack codes for this process's instruction set.

        The codes are kept exactly; scale and zero are rounded to bfloat16 if they are not already.

        Raises:
            ValueError: a scale or zero is too large for bfloat16.
        """
        n, k = groupwise.shape
        group_size = groupwise.group_size
        padded_n, padded_k = padded_shape(n, k, group_size)
        qparams = torch.stack([groupwise.scale.t(), groupwise.zero.t()], dim=-1)
        scale_and_zero = qparams.to(QPARAMS_DTYPE)
        if not bool(torch.isfinite(scale_and_zero).all()):
            raise ValueError(
                "scale or zero does not fit bfloat16 (3.4e38 at most); divide the weight by a constant"
            )
        layout = native_layout() or LAYOUTS["default"]
        # The padding is code 8 with scale and zero 0: weights that are exactly 0.
        codes = groupwise.codes
        if (padded_n, padded_k) != (n, k):
            codes = F.pad(codes, (0, padded_k - k, 0, padded_n - n), value=CODE_OFFSET)
            scale_and_zero = F.pad(scale_and_zero, (0, 0, 0, padded_n - n))
        return cls(
            pack(codes.contiguous(), layout),
            scale_and_zero.contiguous(),
            [1, group_size],
            (n, k),
            layout.name,
            dtype,
            act_pre_scale,
        )

    @classmethod
    def from_upstream(cls, t: Tensor, layout: str) -> Int4OpaqueTensor:
        """Convert an ``Int4OpaqueTensor`` of torchao's prototype (weight-only mode).

        Args:
            t: the prototype's tensor, without an activation mode.
            layout: how its bytes lie: ``"avx512"``, ``"avx2"`` or ``"default"``, the instruction set
                of the machine *that packed it*. **The prototype's tensor does not record this, and a
                wrong answer cannot be detected: it gives a weight with its rows mixed up.** If it
                was packed in this very process, pass ``native_layout().name``; if it came from a
                file, compare an output with a known one before you trust it.

        Scales and zeros of float16 or float32 are rounded to bfloat16.

        Raises:
            TypeError: ``t`` is not that class, or is its int8-activation mode.
            ValueError: unknown layout, parts that do not fit together, or a scale or zero that is
                not finite in bfloat16.
        """
        if type(t).__name__ != "Int4OpaqueTensor" or not type(t).__module__.startswith("torchao."):
            raise TypeError(
                f"got a {type(t).__module__}.{type(t).__name__}; "
                "from_upstream converts torchao.prototype.quantization.int4.Int4OpaqueTensor"
            )
        return from_upstream_parts(vars(t), t.shape, t.dtype, layout)

    def to_groupwise(self) -> GroupwiseInt4:
        """Unpack: the exact codes, and scale and zero as stored (bfloat16)."""
        n, k = self.shape
        codes = unpack(self.qdata, layout_named(self.qdata_layout))
        scale, zero = self.scale_and_zero[:, :n].permute(2, 1, 0).contiguous()
        return GroupwiseInt4(codes[:n, :k].contiguous(), scale, zero, self.block_size[1])

    def dequantize(self) -> Tensor:
        """Return the weight as a plain ``[N, K]`` tensor of the logical dtype, rounded once.

        ``act_pre_scale`` is no part of the weight and is not applied.
        """
        return self.to_groupwise().dequantize(self.dtype)

    def repack_(self) -> Int4OpaqueTensor:
        """Put ``qdata`` into this process's layout, in place, if it is in another; return self.

        Loading does this by itself.
        """
        target = native_layout()
        if target is not None and self.qdata_layout != target.name:
            if self.qdata.device.type == "cpu":
                self.qdata = repack(self.qdata, layout_named(self.qdata_layout), target)
            self.qdata_layout = target.name
            self._check()
        return self

    def packed(self) -> PackedInt4:
        """The parts that `kernels` multiplies with, checked again if one was assigned to.

        Raises:
            TypeError, ValueError: the parts do not fit together any more.
        """
        if not self._fits:
            self._check()
        n, k = self.shape
        return PackedInt4(
            self.qdata, self.scale_and_zero, self.block_size[1], LAYOUTS[self.qdata_layout], n, k
        )

    def _check(self) -> None:
        parts = (self.qdata, self.scale_and_zero, self.block_size, tuple(self.shape))
        check_parts(*parts, self.qdata_layout, self.dtype, self.act_pre_scale)
        self.__dict__["_fits"] = True

    def __setattr__(self, name: str, value: object) -> None:
        """Have the parts checked before they are used again: kernels read what ``shape`` says.

        Anyone can assign to a part, and so can a file, even under ``weights_only=True``: torch's
        ``_rebuild_parameter_with_state`` sets any attribute of a tensor that is whole already.
        """
        if name == "_fits":
            raise AttributeError("_fits is what the check of the parts found; it cannot be set")
        super().__setattr__(name, value)
        if name in _PARTS:
            self.__dict__["_fits"] = False

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """As torchao's, without the loops: a compiled model calls this twice a layer and run."""
        names = ["qdata", "scale_and_zero"]
        if self.act_pre_scale is not None:
            names.append("act_pre_scale")
        with torch._C.DisableTorchFunctionSubclass():  # else shape and dtype are torch functions
            return names, {
                "block_size": self.block_size,
                "shape": self.shape,
                "qdata_layout": self.qdata_layout,
                "dtype": self.dtype,
            }

    def _quantization_type(self) -> str:  # torchao's name; printed with the module
        text = f"shape={list(self.shape)}, group_size={self.block_size[1]}, dtype={self.dtype}"
        if self.act_pre_scale is not None:
            text += f", act_pre_scale={list(self.act_pre_scale.shape)}"
        return text

    def __repr__(self, *, tensor_contents: object = None) -> str:
        data = self.qdata.numel() + 2 * self.scale_and_zero.numel()
        return (
            f"Int4OpaqueTensor({self._quantization_type()},\n"
            f"    device={self.device}, qdata_layout={self.qdata_layout!r}, bytes={data})"
        )


def from_upstream_parts(
    parts: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype, layout: str
) -> Int4OpaqueTensor:
    """`Int4OpaqueTensor.from_upstream` on the attributes of such a tensor, as its pickle has them.

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
        and scale_and_zero.dtype in FLOAT_DTYPES
        and scale_and_zero.is_contiguous()
    ):
        scale_and_zero = scale_and_zero.to(QPARAMS_DTYPE)
    t = Int4OpaqueTensor(qdata, scale_and_zero, block_size, shape, layout, dtype, act_pre_scale)
    if t.device.type == "cpu" and not bool(torch.isfinite(t.scale_and_zero).all()):
        raise ValueError(
            "scale_and_zero has NaN or infinite values in bfloat16; every one must be finite, "
            "so check the original weight and quantize it again"
        )
    return t.repack_()


def padded_shape(n: int, k: int, group_size: int) -> tuple[int, int]:
    """``(N', K')``: N rounded up to a multiple of 16, K to a multiple of ``group_size``."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE, -(-k // group_size) * group_size


def check_parts(
    qdata: object,
    scale_and_zero: object,
    block_size: object,
    shape: object,
    qdata_layout: object,
    dtype: object,
    act_pre_scale: object = None,
) -> None:
    """Check that the parts make an `Int4OpaqueTensor`.

    PyTorch's op reads as many groups as ``qdata`` calls for, whatever ``scale_and_zero`` has, so
    parts from a damaged file must never get as far as the op.

    Raises:
        TypeError: a part has the wrong class or dtype.
        ValueError: the parts do not fit together.
    """
    group_size = _group_size_of(block_size)
    if not isinstance(qdata_layout, str):
        names = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"layout {shown(qdata_layout)} is not known; choose {names}")
    layout_named(qdata_layout)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        got = dtype if isinstance(dtype, str) else shown(dtype)
        raise TypeError(f"dtype is {got}; choose torch.bfloat16, torch.float16 or torch.float32")
    if (
        not isinstance(shape, Sequence)
        or len(shape) != 2
        or not all(_is_int(size) and size >= 1 for size in shape)
    ):
        raise ValueError(f"shape is {shown(shape)}; it must be [N, K] with N >= 1 and K >= 1")
    padded_n, padded_k = padded_shape(shape[0], shape[1], group_size)
    parts = [_check_part("qdata", qdata, torch.uint8, [padded_n, padded_k // 2], shape)]
    expected = [padded_k // group_size, padded_n, 2]
    parts.append(_check_part("scale_and_zero", scale_and_zero, QPARAMS_DTYPE, expected, shape))
    if act_pre_scale is not None:
        if not isinstance(act_pre_scale, Tensor) or act_pre_scale.dtype not in FLOAT_DTYPES:
            got = getattr(act_pre_scale, "dtype", type(act_pre_scale).__name__)
            raise TypeError(f"act_pre_scale is {got}; it must be a bfloat16, float16 or float32 tensor")
        _check_memory("act_pre_scale", act_pre_scale)
        if act_pre_scale.numel() != 1 and list(act_pre_scale.shape) != [shape[1]]:
            raise ValueError(
                f"act_pre_scale has shape {list(act_pre_scale.shape)}; "
                f"it must have one element or shape [{shape[1]}]"
            )
        parts.append(act_pre_scale)
    devices = [part.device.type for part in parts]
    if len(set(devices)) > 1:
        raise ValueError(
            f"qdata, scale_and_zero and act_pre_scale are on {', '.join(devices)}; all must be on one "
            "device, so load them with map_location='cpu'"
        )


def _check_part(
    name: str, part: object, dtype: torch.dtype, expected: list[int], shape: Sequence[int]
) -> Tensor:
    if not isinstance(part, Tensor) or part.dtype != dtype:
        got = getattr(part, "dtype", type(part).__name__)
        raise TypeError(f"{name} is {got}; it must be a {dtype} tensor")
    _check_memory(name, part)
    if list(part.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(part.shape)}; a weight of shape {list(shape)} needs {expected}"
        )
    if part.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"{name} is on {part.device}; a 4-bit CPU weight lives on 'cpu' (or 'meta'), "
            "so load it with map_location='cpu'"
        )
    if not part.is_contiguous():
        raise ValueError(f"{name} is not contiguous; call .contiguous() on it first")
    return part


def _check_memory(name: str, part: Tensor) -> None:
    """Check that the bytes at ``part.data_ptr()`` are the numbers of ``part``: kernels read those.

    A tensor subclass may have none: torch makes a "wrapper" of any shape, with a null pointer.
    """
    if type(part) not in _PLAIN and not isinstance(part, _TRACED):
        raise TypeError(
            f"{name} is of class {type(part).__name__}; it must be a plain tensor, "
            "so take the parts from an Int4OpaqueTensor"
        )
    if part.is_nested or part.layout != torch.strided or part.is_neg():
        raise ValueError(
            f"{name} is nested, sparse or a negative view; it must be a dense tensor, "
            "so take the parts from an Int4OpaqueTensor"
        )


#: Classes whose values lie in their own memory, and those that stand for such while torch traces.
_PLAIN = (Tensor, torch.nn.Parameter)
_TRACED = (FakeTensor, FunctionalTensor)


def _group_size_of(block_size: object) -> int:
    if (
        not isinstance(block_size, (list, tuple))
        or len(block_size) != 2
        or not _is_int(block_size[0])
        or block_size[0] != 1
        or not isinstance(block_size[1], (int, float, str, type(None)))
    ):
        raise ValueError(
            f"block_size is {shown(block_size)}; it must be [1, group_size] "
            "with a group_size of 32, 64, 128 or 256"
        )
    return check_group_size(block_size[1])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object, depth: int = 2) -> str:
    """``value`` as a message shows it, whatever it is: in a file it may be of any type and size.

    Its `repr` may not end: a list of ten times a list of ten times a list takes a file few bytes.
    """
    if isinstance(value, (list, tuple)) and depth > 0:
        items = [shown(item, depth - 1) for item in value[:8]] + ["..."] * (len(value) > 8)
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)})"
    if isinstance(value, str):
        return repr(value if len(value) <= 100 else value[:100] + "...")
    if isinstance(value, (bool, float, type(None), torch.dtype)) or _is_short_int(value):
        return repr(value)
    return f"a {type(value).__name__}"


def _is_short_int(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() <= 128

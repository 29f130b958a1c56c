"""`Int4OpaqueTensor`: the packed weight as a tensor. It holds parts, checks that they fit, converts.

It knows neither aten ops (`dispatch`) nor how a file stores it (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from torchao_int4cpu.choose_qparams import QPARAMS_DTYPE, choose_qparams
from torchao_int4cpu.groupwise import CODE_OFFSET, FLOAT_DTYPES, GroupwiseInt4
from torchao_int4cpu.kernels import PackedExperts, PackedInt4, traceable_dequantize
from torchao_int4cpu.layout import LAYOUTS, layout_named, native_layout, pack, repack, unpack
from torchao_int4cpu.parts import check_parts, group_size_of, padded_shape

#: What must fit together, and what holds it: shape and dtype are those of ``data``.
_PARTS = frozenset(
    ("qdata", "scale_and_zero", "block_size", "qdata_layout", "act_pre_scale", "data", "__dict__")
)


class Cut(NamedTuple):
    """``source.narrow(dim, start, stop - start)``, and whether it is a view of ``source``."""

    source: Int4OpaqueTensor
    dim: int
    start: int
    stop: int
    aliases: bool


class Int4OpaqueTensor(TorchAOBaseTensor):  # type: ignore[misc]  # torchao has no annotations
    """A weight ``[N, K]`` in 4 bits, packed for PyTorch's int4 op on this CPU; or a stack of E such.

    It stands for the matrix of `GroupwiseInt4`::

        w[n, k]  =  (code[n, k] - 8) * scale[n, k // group_size] + zero[n, k // group_size]

    Data, with one more dimension in front in a stack ``[E, N, K]`` (the experts of a layer):
        qdata: uint8 ``[N', K'/2]``, two codes a byte in the order of ``qdata_layout`` (`layout`).
        scale_and_zero: bfloat16 ``[K'/group_size, N', 2]``. In a view of some rows of a weight the
            groups lie as far apart as in that weight.
        act_pre_scale: optional, float, ``[K]`` or one element; multiplies the activation.

    Attributes:
        block_size: ``[1, group_size]``, in a stack ``[1, 1, group_size]``.
        shape: ``[N, K]`` or ``[E, N, K]``. N' is N rounded up to a multiple of 16, K' is K rounded up
            to one of ``group_size``; what is added is never seen.
        qdata_layout: ``"avx512"``, ``"avx2"`` or ``"default"``.
        dtype: what `dequantize` gives: bfloat16, float16 or float32. The parts keep theirs.
        read_only: whether this is a copy where torch would give a view, because its bytes had to be
            repacked: what is written to it would not get where it should, so ``copy_`` refuses.

    The weight is frozen: gradients flow through it to the activation, never into it, and
    ``requires_grad`` stays False.

    Raises:
        TypeError: a part has the wrong class or dtype.
        ValueError: the parts do not fit together.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]
    tensor_attribute_names = ["block_size", "shape", "qdata_layout", "dtype"]
    optional_tensor_data_names = ["act_pre_scale"]
    optional_tensor_attribute_names = ["read_only"]

    qdata: Tensor
    scale_and_zero: Tensor
    act_pre_scale: Tensor | None
    block_size: list[int]
    qdata_layout: str
    read_only: bool = False
    # Python only, neither traced nor saved: a weight made to be filled cut by cut (`new_zeros`), and
    # where a repacked copy was cut from such a weight. What is copied into the copy is written back.
    filled_by_cuts: bool = False
    cut_from: Cut | None = None
    # Python only, too: the dimension and its size that `split` cut this piece from, for messages; and
    # what processes sent that cannot be one weight (`dispatch.collectives`).
    split_from: tuple[int, int] | None = None
    gathered: tuple[Tensor, ...] | None = None
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
        read_only: bool = False,
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
        read_only: bool = False,
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
        self.read_only = read_only
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
            w: bfloat16, float16 or float32 ``[N, K]`` on the CPU, finite, any N >= 1 and K >= 1; or a
                stack ``[E, N, K]``, which is quantized matrix by matrix. Any strides.
            block_size: ``[1, group_size]``, for a stack ``[1, 1, group_size]``.
            int4_choose_qparams_algorithm: ``"tinygemm"``, ``"hqq"`` or ``"mse"``.

        Raises:
            TypeError, ValueError: as `choose_qparams`, or a wrong ``block_size``.
        """
        group_size = group_size_of(block_size, max(2, w.ndim))
        if w.ndim != 3:
            groupwise = choose_qparams(w, group_size, int4_choose_qparams_algorithm)
            return cls.from_groupwise(groupwise, dtype=w.dtype)
        stack = cls.empty(w.shape, group_size, w.dtype)
        for matrix, target in zip(w, stack.matrices()):
            groupwise = choose_qparams(matrix, group_size, int4_choose_qparams_algorithm)
            _pack_into(target, groupwise)
        return stack

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
        t = cls.empty(groupwise.shape, groupwise.group_size, dtype, act_pre_scale=act_pre_scale)
        if len(groupwise.shape) == 2:
            _pack_into(t.packed(), groupwise)
            return t
        for codes, scale, zero, target in zip(
            groupwise.codes, groupwise.scale, groupwise.zero, t.matrices()
        ):
            _pack_into(target, GroupwiseInt4(codes, scale, zero, groupwise.group_size))
        return t

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        group_size: int,
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        act_pre_scale: Tensor | None = None,
    ) -> Int4OpaqueTensor:
        """A weight with uninitialised parts in this process's layout, to be copied into.

        Raises:
            TypeError, ValueError: an argument breaks its rule.
        """
        ones = [1] * (len(shape) - 1)
        block_size = [*ones, group_size_of([*ones, group_size], len(shape))]
        *stack, n, k = shape
        padded_n, padded_k = padded_shape(n, k, group_size)
        layout = native_layout() or LAYOUTS["default"]
        return cls(
            torch.empty(*stack, padded_n, padded_k // 2, dtype=torch.uint8, device=device),
            torch.empty(
                *stack, padded_k // group_size, padded_n, 2, dtype=QPARAMS_DTYPE, device=device
            ),
            block_size,
            shape,
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
        matrices = [_unpacked(weight) for weight in self.matrices()]
        if self.ndim == 2:
            return GroupwiseInt4(*matrices[0], self.group_size)
        codes, scale, zero = (torch.stack(parts) for parts in zip(*matrices))
        return GroupwiseInt4(codes, scale, zero, self.group_size)

    def dequantize(self) -> Tensor:
        """Return the weight as a plain tensor of its shape and logical dtype, rounded once.

        ``act_pre_scale`` is no part of the weight and is not applied.
        """
        if torch.compiler.is_exporting():
            # One op on the weight itself: a graph on its parts would name their layout, but the weights
            # of a saved program are repacked for the process that loads them.
            exported: Tensor = torch.ops.aten.dequantize.self(self)
            return exported
        return self.dense()

    def dense(self) -> Tensor:
        """`dequantize`, by ops on the parts."""
        dense = [traceable_dequantize(weight, self.dtype) for weight in self.matrices()]
        return dense[0] if self.ndim == 2 else torch.stack(dense)

    @property
    def group_size(self) -> int:
        """Codes along K that share a scale and a zero."""
        return self.block_size[-1]

    def repack_(self) -> Int4OpaqueTensor:
        """Put ``qdata`` into this process's layout, in place, if it is in another; return self.

        Loading does this by itself.
        """
        target = native_layout()
        if target is not None and self.qdata_layout != target.name:
            if self.qdata.device.type == "cpu":
                source = layout_named(self.qdata_layout)
                stack = self.qdata if self.ndim == 3 else self.qdata[None]
                repacked = [repack(matrix.contiguous(), source, target) for matrix in stack]
                self.qdata = torch.stack(repacked) if self.ndim == 3 else repacked[0]
            self.qdata_layout = target.name
            self._check()
        return self

    def packed(self) -> PackedInt4:
        """The parts that `kernels` multiplies with, checked again if one was assigned to.

        Raises:
            TypeError, ValueError: the parts do not fit together any more, or are a stack.
        """
        if not self._fits:
            self._check()
        if self.ndim != 2:
            raise ValueError(
                f"got a stack of 4-bit weights of shape {list(self.shape)}; this takes one [N, K], so "
                "index it first (weight[e]), or multiply with F.grouped_mm or torch.bmm"
            )
        n, k = self.shape
        return PackedInt4(
            self.qdata, self.scale_and_zero, self.block_size[-1], LAYOUTS[self.qdata_layout], n, k
        )

    def packed_experts(self) -> PackedExperts:
        """The parts of a stack, as `packed` gives those of a matrix.

        Raises:
            TypeError, ValueError: the parts do not fit together any more.
        """
        if not self._fits:
            self._check()
        _, n, k = self.shape
        return PackedExperts(
            self.qdata, self.scale_and_zero, self.block_size[-1], LAYOUTS[self.qdata_layout], n, k
        )

    def matrices(self) -> list[PackedInt4]:
        """The packed matrix, or those of a stack."""
        if self.ndim == 2:
            return [self.packed()]
        experts = self.packed_experts()
        return [experts.expert(i) for i in range(self.shape[0])]

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
                "read_only": self.read_only,
            }

    def _quantization_type(self) -> str:  # torchao's name; printed with the module
        text = f"shape={list(self.shape)}, group_size={self.group_size}, dtype={self.dtype}"
        if self.act_pre_scale is not None:
            text += f", act_pre_scale={list(self.act_pre_scale.shape)}"
        return text

    def __repr__(self, *, tensor_contents: object = None) -> str:
        data = self.qdata.numel() + 2 * self.scale_and_zero.numel()
        return (
            f"Int4OpaqueTensor({self._quantization_type()},\n"
            f"    device={self.device}, qdata_layout={self.qdata_layout!r}, bytes={data})"
        )


def _pack_into(target: PackedInt4, groupwise: GroupwiseInt4) -> None:
    """Write codes, scales and zeros into the parts of a weight of the same shape, padding included.

    The padding is code 8 with scale and zero 0: weights that are exactly 0.
    """
    (padded_n, half_k), (n, k) = target.qdata.shape, groupwise.shape
    qparams = torch.stack([groupwise.scale.t(), groupwise.zero.t()], dim=-1).to(QPARAMS_DTYPE)
    if not bool(torch.isfinite(qparams).all()):
        raise ValueError(
            "scale or zero does not fit bfloat16 (3.4e38 at most); divide the weight by a constant"
        )
    codes = groupwise.codes
    if (padded_n, half_k * 2) != (n, k):
        codes = F.pad(codes, (0, half_k * 2 - k, 0, padded_n - n), value=CODE_OFFSET)
        qparams = F.pad(qparams, (0, 0, 0, padded_n - n))
    target.qdata.copy_(pack(codes.contiguous(), target.layout))
    target.scale_and_zero.copy_(qparams)


def _unpacked(weight: PackedInt4) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K]``, scale and zero ``[N, G]``."""
    codes = unpack(weight.qdata, weight.layout)[: weight.n, : weight.k].contiguous()
    scale, zero = weight.scale_and_zero[:, : weight.n].permute(2, 1, 0).contiguous()
    return codes, scale, zero


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

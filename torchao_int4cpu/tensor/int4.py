"""`Int4OpaqueTensor`: the packed weight as a tensor. It holds parts, checks that they fit, converts.

It knows neither aten ops (`dispatch`) nor how a file stores it (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.format.act_order import check_act_order, out_of_act_order
from torchao_int4cpu.format.checks import check_parts, check_qparams_dtype, group_size_of
from torchao_int4cpu.format.groupwise import QPARAMS_DTYPE, GroupwiseInt4
from torchao_int4cpu.format.huge_pages import prefer_huge_pages
from torchao_int4cpu.format.layout import (
    LAYOUTS,
    native_layout,
    padded_shape,
)
from torchao_int4cpu.format.packed import INT4_PARTS, PackedInt4, Part
from torchao_int4cpu.format.packing import pack_into, unpacked
from torchao_int4cpu.format.slicing import repack, stacked
from torchao_int4cpu.kernels.ops.dequantize import traceable_dequantize
from torchao_int4cpu.tensor.provenance import OWN, Provenance

#: What must fit together, and what holds it: shape and dtype are those of ``data``.
_CHECKED = frozenset(
    (*(part.name for part in INT4_PARTS), "block_size", "qdata_layout", "data", "__dict__")
)


class Int4OpaqueTensor(TorchAOBaseTensor):  # type: ignore[misc]  # torchao has no annotations
    """A weight ``[N, K]`` in 4 bits, packed for PyTorch's int4 op on this CPU; or a stack of E such.

    It stands for the matrix of `GroupwiseInt4`::

        w[n, k]  =  (code[n, k] - 8) * scale[n, k // group_size] + zero[n, k // group_size]

    Data, with one more dimension in front in a stack ``[E, N, K]`` (the experts of a layer):
        qdata: uint8 ``[N', K'/2]``, two codes a byte in the order of ``qdata_layout``
            (`format.layout`).
        scale_and_zero: ``[K'/group_size, N', 2]``, bfloat16, or float16 where a checkpoint of another
            tool has its scales so. In a view of some rows of a weight the groups lie as far apart as
            in that weight.
        act_pre_scale: optional, float, ``[K]`` or one element; multiplies the activation.
        act_order: optional, int32 ``[K]``, a permutation: codes are those of columns in this order
            (`format.act_order`). All matrices of a stack share it.

    Attributes:
        block_size: ``[1, group_size]``, in a stack ``[1, 1, group_size]``.
        shape: ``[N, K]`` or ``[E, N, K]``. N' is N rounded up to a multiple of 16, K' is K rounded up
            to one of ``group_size``; what is added is never seen.
        qdata_layout: ``"avx512"``, ``"avx2"`` or ``"default"``.
        dtype: what `dequantize` gives: bfloat16, float16 or float32. The parts keep theirs.
        read_only: see `Provenance`.

    The weight is frozen: gradients flow through it to the activation, never into it, and
    ``requires_grad`` stays False.

    Raises:
        TypeError: a part has the wrong class or dtype.
        ValueError: the parts do not fit together.
    """

    __module__ = "torchao_int4cpu"  # as pickles name it

    #: What it is made of: whatever cuts, joins, copies, sends or saves a weight loops over this.
    PARTS: tuple[Part, ...] = INT4_PARTS

    tensor_data_names = [part.name for part in INT4_PARTS if not part.optional]
    tensor_attribute_names = ["block_size", "shape", "qdata_layout", "dtype"]
    optional_tensor_data_names = [part.name for part in INT4_PARTS if part.optional]
    optional_tensor_attribute_names = ["read_only"]

    qdata: Tensor
    scale_and_zero: Tensor
    act_pre_scale: Tensor | None
    act_order: Tensor | None
    block_size: list[int]
    qdata_layout: str
    provenance: Provenance = OWN
    #: Convert a tensor of torchao's prototype: see `importers.torchao.from_upstream`.
    from_upstream: ClassVar[Callable[..., Int4OpaqueTensor]]
    #: The parts for kernels; None if a part was assigned to since they were checked.
    _packed: PackedInt4 | None = None
    #: Of what `__tensor_flatten__` gave, and that; None if it was not asked for.
    _flattened: tuple[PackedInt4, Provenance, tuple[list[str], dict[str, Any]]] | None = None

    def __new__(
        cls,
        qdata: Tensor,
        scale_and_zero: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        qdata_layout: str,
        dtype: torch.dtype,
        act_pre_scale: Tensor | None = None,
        act_order: Tensor | None = None,
        read_only: bool = False,
    ) -> Int4OpaqueTensor:
        check_parts(
            qdata, scale_and_zero, block_size, shape, qdata_layout, dtype, act_pre_scale, act_order
        )
        check_act_order(act_order, shape[-1])
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
        act_order: Tensor | None = None,
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
        self.act_order = act_order
        if read_only:
            self.provenance = Provenance(read_only=True)
        self._remember()  # `__new__` has checked them

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
            pack_into(target, groupwise)
        return stack

    @classmethod
    def from_groupwise(
        cls,
        groupwise: GroupwiseInt4,
        *,
        dtype: torch.dtype = torch.bfloat16,
        act_pre_scale: Tensor | None = None,
        qparams_dtype: torch.dtype = QPARAMS_DTYPE,
    ) -> Int4OpaqueTensor:
        """Pack codes for this process's instruction set. They are kept exactly.

        Args:
            groupwise: codes, scales and zeros, and perhaps the order of its columns.
            dtype: what `dequantize` gives.
            act_pre_scale: as in the class.
            qparams_dtype: bfloat16 or float16; scale and zero are rounded to it if they are not in it
                already. With float16, which has steps of 6e-8 below 6.1e-5, no weight moves by more
                than 2^-11 of the largest that its group can have, ``8 * |scale| + |zero|``.

        Raises:
            TypeError: ``qparams_dtype`` is another dtype.
            ValueError: a scale or zero is too large for it, or both are too small for float16.
        """
        check_qparams_dtype(qparams_dtype)
        t = cls.empty(
            groupwise.shape,
            groupwise.group_size,
            dtype,
            act_pre_scale=act_pre_scale,
            act_order=groupwise.act_order,
            qparams_dtype=qparams_dtype,
        )
        if len(groupwise.shape) == 2:
            pack_into(t.packed(), groupwise)
            return t
        for codes, scale, zero, target in zip(
            groupwise.codes, groupwise.scale, groupwise.zero, t.matrices()
        ):
            pack_into(target, GroupwiseInt4(codes, scale, zero, groupwise.group_size))
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
        act_order: Tensor | None = None,
        qparams_dtype: torch.dtype = QPARAMS_DTYPE,
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
            prefer_huge_pages(
                torch.empty(*stack, padded_n, padded_k // 2, dtype=torch.uint8, device=device)
            ),
            torch.empty(
                *stack, padded_k // group_size, padded_n, 2, dtype=qparams_dtype, device=device
            ),
            block_size,
            shape,
            layout.name,
            dtype,
            act_pre_scale,
            act_order,
        )

    def to_groupwise(self) -> GroupwiseInt4:
        """Unpack: the exact codes, and scale and zero as stored, in bfloat16 or float16."""
        matrices = [unpacked(weight) for weight in self.matrices()]
        if self.ndim == 2:
            return GroupwiseInt4(*matrices[0], self.group_size, self.act_order)
        codes, scale, zero = (torch.stack(parts) for parts in zip(*matrices))
        return GroupwiseInt4(codes, scale, zero, self.group_size, self.act_order)

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
        matrices = [traceable_dequantize(weight, self.dtype) for weight in self.matrices()]
        dense = matrices[0] if self.ndim == 2 else torch.stack(matrices)
        return out_of_act_order(dense, self.act_order)

    @property
    def group_size(self) -> int:
        """Codes along K that share a scale and a zero."""
        return self.block_size[-1]

    @property
    def read_only(self) -> bool:
        """Whether ``copy_`` refuses to write to it: see `Provenance`."""
        return self.provenance.read_only

    def parts(self) -> dict[str, Tensor]:
        """The tensors it is made of, by their names, without those it does not have."""
        found = {part.name: getattr(self, part.name) for part in self.PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def with_parts(
        self,
        parts: Mapping[str, Tensor | None],
        shape: Sequence[int],
        *,
        layout: str | None = None,
        dtype: torch.dtype | None = None,
        provenance: Provenance = OWN,
    ) -> Int4OpaqueTensor:
        """A weight of other parts and another shape, in the groups of this one.

        Args:
            parts: all it is to have.
            shape: ``[N, K]`` or ``[E, N, K]``.
            layout: of ``qdata``; that of this weight if None.
            dtype: the logical one; that of this weight if None.
            provenance: of the new weight.
        """
        new = type(self)(
            **parts,  # type: ignore[arg-type]  # as its class declares them
            block_size=[1] * (len(shape) - 1) + [self.group_size],
            shape=shape,
            qdata_layout=layout or self.qdata_layout,
            dtype=dtype or self.dtype,
        )
        if provenance is not OWN:
            new.provenance = provenance
        if provenance.filling is not None:
            provenance.filling.add(new)
        return new

    def repack_(self) -> Int4OpaqueTensor:
        """Put ``qdata`` into this process's layout, in place, if it is in another; return self.

        Loading does this by itself.
        """
        target = native_layout()
        if target is not None and self.qdata_layout != target.name:
            weight = self._checked()
            if self.qdata.device.type == "cpu":
                repacked = (repack(m.qdata, m.layout, target) for m in weight.matrices())
                self.__dict__["qdata"] = stacked(repacked, weight.stack)
            self.__dict__["qdata_layout"] = target.name
            self._remember()
        return self

    def packed(self) -> PackedInt4:
        """The parts that `kernels` multiplies with, checked again if one was assigned to.

        Raises:
            TypeError, ValueError: the parts do not fit together any more, or are a stack.
        """
        packed = self._packed or self._checked()
        if packed.qdata.ndim != 2:
            raise ValueError(
                f"got a stack of 4-bit weights of shape {list(self.shape)}; this takes one [N, K], so "
                "index it first (weight[e]), or multiply with F.grouped_mm or torch.bmm"
            )
        return packed

    def packed_experts(self) -> PackedInt4:
        """The parts of a stack, as `packed` gives those of a matrix.

        Raises:
            TypeError, ValueError: the parts do not fit together any more.
        """
        return self._packed or self._checked()

    def matrices(self) -> list[PackedInt4]:
        """The packed matrix, or those of a stack."""
        return list(self.packed_experts().matrices())

    def _checked(self) -> PackedInt4:
        """Check the parts, unless they are as they were when that was done before."""
        if self._packed is None:
            check_parts(
                shape=tuple(self.shape),
                dtype=self.dtype,
                block_size=self.block_size,
                qdata_layout=self.qdata_layout,
                # A class with more parts checks those itself.
                **{part.name: getattr(self, part.name) for part in INT4_PARTS},
            )
            check_act_order(self.act_order, self.shape[-1])
        return self._packed or self._remember()

    def _remember(self) -> PackedInt4:
        """Keep the parts as kernels take them; they are checked, or made by code of this package."""
        with torch._C.DisableTorchFunctionSubclass():  # else shape is a torch function
            *_, n, k = self.shape
        layout = LAYOUTS[self.qdata_layout]
        packed = PackedInt4(self.qdata, self.scale_and_zero, self.block_size[-1], layout, n, k)
        self.__dict__["_packed"] = packed
        return packed

    def __setattr__(self, name: str, value: object) -> None:
        """Have the parts checked before they are used again: kernels read what ``shape`` says.

        Anyone can assign to a part, and so can a file, even under ``weights_only=True``: torch's
        ``_rebuild_parameter_with_state`` sets any attribute of a tensor that is whole already.
        """
        if name in ("_packed", "_flattened") or (
            name == "provenance" and not isinstance(value, Provenance)
        ):
            raise AttributeError(f"{name} of a 4-bit weight is its own; it cannot be set")
        super().__setattr__(name, value)
        if name in _CHECKED:
            self.__dict__["_packed"] = None
        if name == "__dict__":
            self.__dict__.pop("_flattened", None)
            if not isinstance(self.__dict__.get("provenance", OWN), Provenance):
                del self.__dict__["provenance"]

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """As torchao's, but fast: a compiled model calls this twice for each layer and run.

        It gives the same objects again, which torch only reads. Whatever changes them gives the weight
        another ``_packed`` or another provenance.
        """
        known, packed, provenance = self._flattened, self._packed, self.provenance
        if known is not None and known[0] is packed and known[1] is provenance:
            return known[2]
        names = self.tensor_data_names + [
            name for name in self.optional_tensor_data_names if getattr(self, name) is not None
        ]
        with torch._C.DisableTorchFunctionSubclass():  # else shape and dtype are torch functions
            flattened = (
                names,
                {
                    "block_size": self.block_size,
                    "shape": self.shape,
                    "qdata_layout": self.qdata_layout,
                    "dtype": self.dtype,
                    "read_only": self.read_only,
                },
            )
        if packed is not None:
            self.__dict__["_flattened"] = (packed, provenance, flattened)
        return flattened

    def _quantization_type(self) -> str:  # torchao's name; printed with the module
        text = f"shape={list(self.shape)}, group_size={self.group_size}, dtype={self.dtype}"
        if self.act_pre_scale is not None:
            text += f", act_pre_scale={list(self.act_pre_scale.shape)}"
        if self.act_order is not None:
            text += ", act_order"
        return text

    def __repr__(self, *, tensor_contents: object = None) -> str:
        data = self.qdata.numel() + 2 * self.scale_and_zero.numel()
        return (
            f"Int4OpaqueTensor({self._quantization_type()},\n"
            f"    device={self.device}, qdata_layout={self.qdata_layout!r}, bytes={data})"
        )

"""The ops of this package as ONNX nodes, and a weight as the initializers that they read.

A product is ``MatMulNBits`` of the domain ``com.microsoft``, of codes minus 8 times a scale; what the
zeros of the groups add to it is one small ``Gemm``, of the sums of the activation over each group.
(``MatMulNBits`` takes zeros itself, but then onnxruntime 1.32 expands the whole weight in each run: 45
ms instead of 0.8 for one row and 4096 x 4096 weights.) Looking up rows is standard operators on the
same bytes. Whatever else takes a weight gets it dense, by ``DequantizeLinear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET
from torchao_int4cpu.format.layout import unpack
from torchao_int4cpu.format.packed import PackedInt4

#: The first opset whose ``DequantizeLinear`` takes 4-bit numbers, and in blocks.
BLOCKED_OPSET = 21

#: float32, uint8 and int64 among ONNX's numbers for types.
_FLOAT, _UINT8, _INT64 = 1, 2, 7

#: Of ``MatMulNBits``: the activation stays float32. Left out, a runtime may take it in 8 bits.
_ACCURACY_LEVEL = 1


class UnsupportedOnnx(ValueError):
    """A weight that cannot be exported as asked; shown as it is, not inside of torch's long error."""


class _Parts(NamedTuple):
    """A weight ``[N, K]`` in ONNX's order: the low nibble of a byte is the smaller column.

    Attributes:
        codes: uint8 ``[N, G, group_size / 2]``.
        scale: float32 ``[N, G]``.
        zero: float32 ``[N, G]``; None if all are 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def _parts(weight: PackedInt4) -> _Parts:
    codes = unpack(weight.qdata, weight.layout)[: weight.n]
    codes[:, weight.k :] = CODE_OFFSET  # padding is no part of the weight, whatever a file has there
    groups = codes.shape[1] // weight.group_size
    joined = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(weight.n, groups, -1)
    scale, zero = weight.scale_and_zero[:, : weight.n].float().permute(2, 1, 0).contiguous()
    return _Parts(joined, scale, zero if bool(zero.any()) else None)


class OnnxWeight:
    """A weight and the initializers that it has in an ONNX graph, each made when a node asks for it.

    Args:
        weight: ``[N, K]``, or a stack.
        name: of the initializers, with ``.bytes`` and so on behind it.

    Attributes:
        initializers: by name, what the graph has to hold.
    """

    def __init__(self, weight: PackedInt4, name: str) -> None:
        self.n, self.k, self.group_size = weight.n, weight.k, weight.group_size
        self.name = name
        self.initializers: dict[str, Any] = {}
        self._is_stack = bool(weight.stack)
        self._matrices = list(weight.matrices())
        self._parts: dict[int, _Parts] = {}

    @property
    def experts(self) -> int:
        """The number of matrices of a stack."""
        return len(self._matrices)

    def bytes(self, expert: int = 0) -> Any:
        """uint8 ``[N, G, group_size / 2]``, two codes in each."""
        return self._value("bytes", expert, lambda parts: (parts.codes, None))

    def numbers(self, expert: int = 0) -> Any:
        """INT4 ``[N, K']``: codes minus 8."""

        def signed(parts: _Parts) -> tuple[Tensor, list[int]]:
            return parts.codes ^ 0x88, [self.n, 2 * parts.codes[0].numel()]

        return self._value("int4", expert, signed)

    def scale(self, expert: int = 0) -> Any:
        """float32 ``[N, G]``."""
        return self._value("scale", expert, lambda parts: (parts.scale, None))

    def zero(self, expert: int = 0) -> Any | None:
        """float32 ``[N, G]``; None if all are 0."""
        if self._of(expert).zero is None:
            return None
        return self._value("zero", expert, lambda parts: (parts.zero, None))

    def _of(self, expert: int) -> _Parts:
        if expert not in self._parts:
            self._parts[expert] = _parts(self._matrices[expert])
        return self._parts[expert]

    def _value(
        self, kind: str, expert: int, make: Callable[[_Parts], tuple[Any, list[int] | None]]
    ) -> Any:
        from onnxscript import ir

        name = f"{self.name}.{expert}.{kind}" if self._is_stack else f"{self.name}.{kind}"
        if name not in self.initializers:
            data, int4_shape = make(self._of(expert))
            array = data.contiguous().numpy()
            if int4_shape is None:
                tensor: Any = ir.Tensor(array, name=name)
            else:
                tensor = ir.PackedTensor(array, ir.DataType.INT4, shape=int4_shape, name=name)
            self.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self.initializers[name]


class Nodes:
    """What makes the nodes for each op. Its methods run inside of torch's exporter, which records them.

    Args:
        opset: the version of the standard operators that the graph is to have.
        standard: whether no other operators may be used.
    """

    def __init__(self, opset: int, standard: bool) -> None:
        import onnxscript

        self._opset, self._standard = opset, standard
        self._op: Any = onnxscript.opset18  # what torch's exporter starts from
        self._blocked_op: Any = onnxscript.opset21
        self._matmul_nbits = _matmul_nbits()

    def mm(self, weight: OnnxWeight, x: Any) -> Any:
        """``x · Wᵀ``: ``[M, K]`` to ``[M, N]``."""
        return self._back(self._mm(self._float(x), weight, 0), x)

    def mm_transposed(self, weight: OnnxWeight, y: Any) -> Any:
        """``y · W``: ``[M, N]`` to ``[M, K]``."""
        return self._back(self._op.MatMul(self._float(y), self._dense(weight)), y)

    def bmm(self, weight: OnnxWeight, x: Any) -> Any:
        """``[E, M, K]`` to ``[E, M, N]``."""
        op, rows = self._op, self._float(x)
        pieces = [
            op.Unsqueeze(self._mm(op.Gather(rows, expert, axis=0), weight, expert), [0])
            for expert in range(weight.experts)
        ]
        return self._back(op.Concat(*pieces, axis=0), x)

    def bmm_transposed(self, weight: OnnxWeight, y: Any) -> Any:
        """``[E, M, N]`` to ``[E, M, K]``."""
        op = self._op
        matrices = [op.Unsqueeze(self._dense(weight, e), [0]) for e in range(weight.experts)]
        return self._back(op.MatMul(self._float(y), op.Concat(*matrices, axis=0)), y)

    def grouped_mm(self, weight: OnnxWeight, x: Any, offs: Any) -> Any:
        """Rows sorted by expert, ``[S, K]`` to ``[S, N]``."""
        return self._grouped(x, offs, weight, weight.n, self._mm)

    def grouped_mm_transposed(self, weight: OnnxWeight, y: Any, offs: Any) -> Any:
        """``[S, N]`` to ``[S, K]``."""

        def multiply(rows: Any, weight: OnnxWeight, expert: int) -> Any:
            return self._op.MatMul(rows, self._dense(weight, expert))

        return self._grouped(y, offs, weight, weight.k, multiply)

    def embedding(self, weight: OnnxWeight, indices: Any, to: int) -> Any:
        """Rows by their indices: gathered as bytes, so that only they are expanded."""
        op = self._op
        of_each = [0] * len(indices.shape)  # in a shape: as it is
        rows = op.Gather(weight.bytes(), indices, axis=0)
        nibbles = (
            op.BitwiseAnd(rows, self._byte(15)),
            op.BitShift(rows, self._byte(4), direction="RIGHT"),
        )
        pairs = op.Concat(*(op.Unsqueeze(nibble, [-1]) for nibble in nibbles), axis=-1)
        codes = op.Reshape(op.Cast(pairs, to=_FLOAT), [*of_each, -1, weight.group_size])
        values = op.Sub(codes, float(CODE_OFFSET))
        values = op.Mul(values, op.Unsqueeze(op.Gather(weight.scale(), indices, axis=0), [-1]))
        zero = weight.zero()
        if zero is not None:
            values = op.Add(values, op.Unsqueeze(op.Gather(zero, indices, axis=0), [-1]))
        groups = -(-weight.k // weight.group_size)
        values = op.Reshape(values, [*of_each, groups * weight.group_size])
        return self._cast(self._columns(values, weight, len(of_each)), to)

    def dequantize(self, weight: OnnxWeight, to: int) -> Any:
        """The whole weight."""
        return self._cast(self._dense(weight), to)

    def _mm(self, x: Any, weight: OnnxWeight, expert: int) -> Any:
        """float32 ``[M, K]`` to float32 ``[M, N]``."""
        if self._standard:
            dense = self._dense(weight, expert)
            return self._op.MatMul(x, self._op.Transpose(dense, perm=[1, 0]))
        y = self._matmul_nbits(
            x,
            weight.bytes(expert),
            weight.scale(expert),
            K=weight.k,
            N=weight.n,
            bits=4,
            block_size=weight.group_size,
            accuracy_level=_ACCURACY_LEVEL,
        )
        zero = weight.zero(expert)
        if zero is None:
            return y
        op, padding = self._op, -weight.k % weight.group_size
        if padding:
            x = op.Pad(x, [0, 0, 0, padding])
        groups = (weight.k + padding) // weight.group_size
        sums = op.ReduceSum(op.Reshape(x, [0, groups, weight.group_size]), [2], keepdims=0)
        return op.Gemm(sums, zero, y, transB=1)

    def _grouped(
        self,
        x: Any,
        offs: Any,
        weight: OnnxWeight,
        columns: int,
        multiply: Callable[[Any, OnnxWeight, int], Any],
    ) -> Any:
        """The rows of each expert by themselves; those behind the last one give zeros."""
        op, rows = self._op, self._float(x)
        start: Any = [0]
        offs = self._cast(offs, _INT64)
        pieces = []
        for expert in range(weight.experts):
            end = op.Slice(offs, [expert], [expert + 1], [0])
            pieces.append(multiply(op.Slice(rows, start, end, [0]), weight, expert))
            start = end
        left = op.Sub(op.Shape(x, start=0, end=1), start)
        pieces.append(op.Expand(0.0, op.Concat(left, op.Constant(value_ints=[columns]), axis=0)))
        return self._back(op.Concat(*pieces, axis=0), x)

    def _dense(self, weight: OnnxWeight, expert: int = 0) -> Any:
        """float32 ``[N, K]``, in the same two steps as everywhere, so that the bits agree."""
        if self._opset < BLOCKED_OPSET:
            raise UnsupportedOnnx(
                f"got opset_version={self._opset}, and this model needs a 4-bit weight as a whole, "
                f"which ONNX has from opset {BLOCKED_OPSET} on (DequantizeLinear in blocks); leave "
                f"opset_version out, or give {BLOCKED_OPSET} or more"
            )
        op, size = self._op, weight.group_size
        w = self._blocked_op.DequantizeLinear(
            weight.numbers(expert), weight.scale(expert), axis=1, block_size=size
        )
        zero = weight.zero(expert)
        if zero is not None:
            grouped = op.Add(op.Reshape(w, [weight.n, -1, size]), op.Unsqueeze(zero, [-1]))
            w = op.Reshape(grouped, [weight.n, -1])
        return self._columns(w, weight, 1)

    def _columns(self, values: Any, weight: OnnxWeight, dim: int) -> Any:
        """Without the padding of the last group."""
        if weight.k % weight.group_size == 0:
            return values
        return self._op.Slice(values, [0], [weight.k], [dim])

    def _float(self, x: Any) -> Any:
        """In float32: float16 may not hold a scale, and onnxruntime has no products in bfloat16."""
        return x if x.dtype == _FLOAT else self._cast(x, _FLOAT)

    def _back(self, y: Any, x: Any) -> Any:
        return y if x.dtype == _FLOAT else self._cast(y, int(x.dtype))

    def _cast(self, x: Any, to: int) -> Any:
        return self._op.Cast(x, to=to)

    def _byte(self, value: int) -> Any:
        return self._cast(self._op.Constant(value_int=value), _UINT8)


def _matmul_nbits() -> Any:
    """``com.microsoft.MatMulNBits`` as far as it is used here: ONNX itself has no schema of it."""
    import onnx
    import onnxscript

    schema = onnx.defs.OpSchema
    ints = ("K", "N", "bits", "block_size", "accuracy_level")
    return onnxscript.values.Op(
        onnxscript.values.Opset("com.microsoft", 1),
        "MatMulNBits",
        schema(
            "MatMulNBits",
            "com.microsoft",
            1,
            inputs=[
                schema.FormalParameter("A", "T1"),
                schema.FormalParameter("B", "T2"),
                schema.FormalParameter("scales", "T1"),
            ],
            outputs=[schema.FormalParameter("Y", "T1")],
            type_constraints=[("T1", ["tensor(float)"], ""), ("T2", ["tensor(uint8)"], "")],
            attributes=[schema.Attribute(name, schema.AttrType.INT) for name in ints],
        ),
    )

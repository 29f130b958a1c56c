"""A model as an ONNX file: exported, looked into, and run by onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.numerics import UNDERFLOW, UNIT

#: ONNX's numbers of types.
UINT8, INT4 = 2, 22


class OnnxFile:
    """What `torch.onnx.export` writes for a model.

    Attributes:
        operators: how many of each, those of other domains as ``domain.operator``.
        initializers: by name: type, shape and bytes.
        opsets: version by domain.
    """

    def __init__(self, folder: Path, model: Any, inputs: tuple[Any, ...], **options: Any) -> None:
        import onnx
        import onnxruntime

        path = folder / "model.onnx"
        if isinstance(model, nn.Module):
            model.eval()
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False, **options)
        proto: Any = onnx.load(path)
        onnx.checker.check_model(proto)
        self.operators = Counter(
            ".".join(filter(None, (node.domain, node.op_type))) for node in proto.graph.node
        )
        self.opsets = {opset.domain: opset.version for opset in proto.opset_import}
        self.initializers = {
            tensor.name: (tensor.data_type, tuple(tensor.dims), len(tensor.raw_data))
            for tensor in proto.graph.initializer
        }
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(
            path, session, providers=["CPUExecutionProvider"]
        )

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [value.name for value in self._session.get_inputs()]
        feed = {name: x.numpy() for name, x in zip(names, inputs)}
        return [torch.from_numpy(y) for y in self._session.run(None, feed)]


def assert_product(y: Tensor, exact: Tensor, largest: Tensor, terms: int) -> None:
    """Check a product that onnxruntime computed in float32.

    Args:
        y: what came out, rounded to its dtype once more if that is not float32.
        exact: in float64.
        largest: sum of ``|x| (16 |scale| + |zero|)``, or of what the dense weights are: no partial sum
            can be larger.
        terms: K. There are as many additions, of the groups' sums too; and rounded are, once each:
            a scale of the activation, the code times its scale, the two products, the sum of codes and
            zeros, and the bias.
    """
    unit = UNIT[torch.float32]
    bound = (2 * terms + 8) * unit * largest
    if y.dtype != torch.float32:
        bound = bound + UNIT[y.dtype] * (exact.abs() + bound) + UNDERFLOW[y.dtype]
    assert y.shape == exact.shape
    error = (y.double() - exact).abs()
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.2f} of the bound"

"""The 4-bit weights of an ONNX file (``MatMulNBits``) as a safetensors file of ours, by their names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.importers.onnx import groupwise_of_onnx
from torchao_int4cpu.importers.weight import as_weight
from torchao_int4cpu.integrations.safetensors import flattened
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


def convert_onnx(file: Path, out: Path, dtype: torch.dtype | None = None) -> dict[str, list[int]]:
    """Write the weights of all ``MatMulNBits``.

    A weight has the name of its initializer, with ``.weight`` behind it; dense tensors are left out.
    Torchao's ``unflatten_tensor_state_dict`` gives the weights of the file.

    Args:
        file: an ONNX file, with its external data beside it.
        out: the safetensors file to make.
        dtype: of the weights; that of their scales if None.

    Returns:
        The shape of each weight by its name.

    Raises:
        MissingExtra: onnx or safetensors is not installed.
        ValueError: ``out`` is there already, or the file is damaged or has no such operator.
    """
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; give a file that is not, or remove it")
    onnx = import_extra("onnx", "onnx")
    safetensors = import_extra("safetensors.torch", "hf")
    try:
        model = onnx.load(file)
    except Exception as error:  # protobuf's DecodeError, and whatever reads the external data raises
        raise ValueError(f"{str(file)!r} cannot be read as ONNX ({error}); fetch it again") from error
    weights = dict(_weights(onnx, model.graph, dtype))
    if not weights:
        raise ValueError(
            f"{str(file)!r} has no MatMulNBits, the operator of 4-bit weights; quantize the original "
            "model with the command quantize"
        )
    state, metadata = flattened(weights)
    part = out.with_name(out.name + ".part")
    safetensors.save_file(state, part, metadata)
    part.rename(out)
    return {name: list(weight.shape) for name, weight in weights.items()}


def _weights(
    onnx: Any, graph: Any, dtype: torch.dtype | None
) -> Iterator[tuple[str, Int4OpaqueTensor]]:
    initializers = {each.name: each for each in graph.initializer}

    def tensor(name: str) -> Tensor | None:
        if not name:
            return None
        if name not in initializers:
            raise ValueError(f"MatMulNBits reads {name}, which is no constant; export the model again")
        return torch.from_numpy(onnx.numpy_helper.to_array(initializers[name]).copy())

    for node in graph.node:
        if node.op_type != "MatMulNBits" or node.domain != "com.microsoft":
            continue
        attributes = {each.name: each.i for each in node.attribute}
        _, b, scales, *optional = node.input
        zero_points, g_idx = [*optional, "", ""][:2]
        codes, scale = tensor(b), tensor(scales)
        assert codes is not None
        assert scale is not None
        try:
            groupwise = groupwise_of_onnx(
                codes,
                scale,
                tensor(zero_points),
                tensor(g_idx),
                n=attributes.get("N", 0),
                k=attributes.get("K", 0),
                bits=attributes.get("bits", 4),
                group_size=attributes.get("block_size", 0),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{b}: {error}") from error
        yield f"{b}.weight", as_weight(groupwise, dtype or scale.dtype)

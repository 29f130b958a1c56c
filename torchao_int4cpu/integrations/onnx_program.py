"""A decomposed program, made ready for ONNX: its 4-bit weights taken out, in ONNX's own order.

torch decomposes a program into ops on the parts of a weight, in the layout of this CPU. The parts are
constants of the program, so whatever it does to them (a cut, a stack) is computed here.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from torchao_int4cpu.format.layout import layout_named
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.integrations.onnx_nodes import OnnxWeight, UnsupportedOnnx

#: The ops that take a weight, and the method of `onnx_nodes.Nodes` for each.
METHODS: dict[Any, str] = {
    getattr(torch.ops.torchao_int4cpu, name).default: method
    for name, method in {
        "int4_mm": "mm",
        "int4_mm_differentiable": "mm",
        "int4_mm_grad": "mm_transposed",
        "int4_bmm": "bmm",
        "int4_bmm_transposed": "bmm_transposed",
        "int4_grouped_mm": "grouped_mm",
        "int4_grouped_mm_transposed": "grouped_mm_transposed",
        "int4_embedding": "embedding",
        "int4_dequantize": "dequantize",
    }.items()
}

_PYTORCHS = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class Lowered(NamedTuple):
    """What `lower` makes of a program.

    Attributes:
        program: a copy whose ops take a number where they took the parts of a weight.
        weights: what the numbers stand for.
        unused: names of the parameters and buffers that nothing in it reads any more.
    """

    program: ExportedProgram
    weights: list[OnnxWeight]
    unused: set[str]


def lower(program: ExportedProgram) -> Lowered | None:
    """Take the weights out of a program; None if it has none. ``program`` stays as it is.

    Raises:
        UnsupportedOnnx: a weight is not a constant, has no numbers, or is in PyTorch's own op.
    """
    targets = {node.target for node in program.graph.nodes}
    if _PYTORCHS in targets:
        raise UnsupportedOnnx(
            "got a program that was decomposed under set_kernel('aten'), with 4-bit weights in the "
            "order of PyTorch's op; give torch.onnx.export the model, or the program as "
            "torch.export.export made it"
        )
    if targets.isdisjoint(METHODS):
        return None
    constants = _Constants(program)
    graph = copy.deepcopy(program.graph)
    originals = dict(zip(graph.nodes, program.graph.nodes))
    for node, original in originals.items():
        node.name = original.name  # which the copy may have changed, and the signature has
    weights: list[OnnxWeight] = []
    numbers: dict[tuple[Any, ...], int] = {}
    for node in graph.nodes:
        if node.target not in METHODS:
            continue
        arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args))
        parts = [originals[arguments.pop(part)] for part in ("qdata", "scale_and_zero")]
        weight = _weight_of(node, arguments, *(constants.value_of(part) for part in parts))
        key = (_memory(weight.qdata), _memory(weight.scale_and_zero), *weight[2:])
        if key not in numbers:
            numbers[key] = len(weights)
            name = _free_name(constants.name_of(parts[0]), {other.name for other in weights})
            weights.append(OnnxWeight(weight, name))
        node.args = (numbers[key], *arguments.values())  # the activation, indices, a dtype
    graph.eliminate_dead_code()
    lowered = copy.copy(program)
    lowered._graph_module = fx.GraphModule(program.graph_module, graph)
    unused = {
        constants.names[node.name]
        for node, original in originals.items()
        if node.name in constants.names and original.users and not node.users
    }
    return Lowered(lowered, weights, unused)


def _weight_of(
    node: fx.Node, arguments: dict[str, Any], qdata: Tensor, scale_and_zero: Tensor
) -> PackedInt4:
    """The weight that an op is called with. What describes it is taken out of ``arguments``."""
    group_size, layout = arguments.pop("group_size"), layout_named(arguments.pop("layout"))
    columns = arguments.pop("columns")
    if "rows" in arguments:
        n, k = arguments.pop("rows"), columns
    else:
        n, k = columns, int(arguments["x"].meta["val"].shape[-1])
        if METHODS[node.target].endswith("transposed"):
            n, k = k, n
    return PackedInt4(qdata, scale_and_zero, group_size, layout, n, k)


def _memory(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), tuple(t.shape), t.stride()


def _free_name(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return next(new for new in itertools.chain([name], numbered) if new not in taken)


class _Constants:
    """What a program computes of its parameters, buffers and constants alone.

    Attributes:
        names: of these, by the names of their nodes.
    """

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        self.names: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._tensors: dict[str, Any] = {**program.state_dict, **program.constants}
        self._values: dict[fx.Node, Any] = {}  # kept, so that no two have the same memory

    def name_of(self, node: fx.Node) -> str:
        """The name of the weight whose codes these are, or were made of."""
        waiting = [node]
        while True:
            node = waiting.pop(0)
            if node.name in self.names and node.meta["val"].dtype == torch.uint8:
                break
            waiting += node.all_input_nodes
        # a.parametrizations.weight.original0, as torch calls the parts of a.weight
        path = [part for part in self.names[node.name].split(".") if part != "parametrizations"]
        return ".".join(path[:-1] if path[-1].startswith("original") else path)

    def value_of(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises:
            UnsupportedOnnx: it depends on an input, or the program holds no numbers.
        """
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.name in self.names:
            name = self.names[node.name]
            tensor = self._tensors[name]
            if isinstance(tensor, FakeTensor) or tensor.device.type != "cpu":
                raise UnsupportedOnnx(
                    f"{name} of a 4-bit weight holds no numbers; an ONNX file is written from a weight "
                    "on the CPU, so load the model before you export it"
                )
            return tensor
        if node.op != "call_function":
            raise UnsupportedOnnx(
                f"a 4-bit weight is computed from {node.name}, an input of the model, and in an ONNX "
                "file it must be a constant; multiply experts with F.grouped_mm (in transformers: "
                "model.set_experts_implementation('grouped_mm')), or index weight.dequantize()"
            )
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value_of)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]  # of a call_function

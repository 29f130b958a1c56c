"""The weights to calibrate, as `quantize_` would choose them, and their 4-bit forms in their places."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_

from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.algorithms.gptq import gptq, rounded
from torchao_int4cpu.algorithms.hessian import DAMPING, Hessian
from torchao_int4cpu.distributed.quantize_shards import is_sharded
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.format.packed import packed_bytes
from torchao_int4cpu.format.packing import pack_into
from torchao_int4cpu.quantize.filters import is_input_first
from torchao_int4cpu.quantize.parameter import ChosenWeight, choosing_only, show_in_repr
from torchao_int4cpu.quantize.report import Report
from torchao_int4cpu.quantize.run import makes_ours, reported_together, shared_parameters
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight

#: What rounds a weight that no inputs, or too few, are known of.
WITHOUT_INPUTS = "mse"


#: Rows of activations that a weight needs, or else it is rounded without them.
ENOUGH_ROWS = 128


@dataclass(frozen=True)
class Rules:
    """How weights are quantized for their inputs; see `calibrate`."""

    damping: float = DAMPING
    enough_rows: int = ENOUGH_ROWS


@dataclass(frozen=True)
class CalibratedWeight:
    """What became of a weight, or of one expert of a stack.

    Attributes:
        name: of the parameter, with the number of the expert behind it.
        rows: of activations that reached it.
        error: what rounding does to its outputs on the calibration data, relative to them.
        rounded: why it was rounded to nearest and not for its inputs; empty if it was not.
        group_size: of its 4-bit form.
        nbytes: of its 4-bit form.
        numel: how many numbers it has.
    """

    name: str
    rows: int
    error: float
    rounded: str
    group_size: int
    nbytes: int
    numel: int


@dataclass(frozen=True, eq=False)
class Target:
    """One weight, which several modules may share."""

    holders: tuple[ChosenWeight, ...]

    @property
    def name(self) -> str:
        """Under which it is first found in the model."""
        return self.holders[0].name

    @property
    def module(self) -> nn.Module:
        """Of the first holder."""
        return self.holders[0].module

    @property
    def weight(self) -> Tensor:
        """As the module has it now."""
        found: Tensor = getattr(self.module, self.holders[0].parameter_name)
        return found

    @property
    def is_input_first(self) -> bool:
        """Whether the weight is ``[K, N]``."""
        return is_input_first(self.module, self.weight)

    def put(self, weight: Tensor) -> None:
        """Put another weight into the place of this one."""
        parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        for holder in self.holders:
            setattr(holder.module, holder.parameter_name, parameter)
            if isinstance(weight, Int4Weight):
                show_in_repr(holder.module)

    def in_groups(self, group_size: int) -> Target:
        """The same weight, to be quantized in groups of another size."""
        return Target(tuple(holder._replace(group_size=group_size) for holder in self.holders))

    def quantized(
        self, hessians: list[Hessian] | None, rules: Rules
    ) -> tuple[Int4Weight, list[CalibratedWeight]]:
        """The 4-bit form of the weight for its inputs, and what that did to each matrix.

        Args:
            hessians: of the weight, or of each expert; None if nothing is known.
            rules: how.

        Raises:
            ValueError: inputs have NaN or infinite values.
        """
        matrices = self._matrices()
        w, group_size = self._rows_first(), self.holders[0].group_size
        packed: Int4OpaqueTensor | None = None
        if w.ndim == 3:
            packed = Int4OpaqueTensor.empty(w.shape, group_size, w.dtype)
        told = []
        for i, (name, matrix) in enumerate(matrices):
            hessian = None if hessians is None else hessians[i]
            value, became = _quantized(matrix, name, hessian, group_size, rules)
            told.append(became)
            if packed is not None:
                pack_into(packed.matrices()[i], value)
        if packed is None:
            packed = Int4OpaqueTensor.from_groupwise(value, dtype=w.dtype)
        return (Int4TransposedTensor(packed) if self.is_input_first else packed), told

    @contextlib.contextmanager
    def rounded(self, group_size: int) -> Iterator[None]:
        """Within this block the weight is 4-bit, rounded to nearest."""
        before, block_size = self.weight, [1] * (self.weight.ndim - 1) + [group_size]
        packed = Int4OpaqueTensor.from_hp(self._rows_first(), block_size, WITHOUT_INPUTS)
        self.put(Int4TransposedTensor(packed) if self.is_input_first else packed)
        try:
            yield
        finally:
            self.put(before)

    def nbytes(self, group_size: int) -> int:
        """Of the 4-bit form in groups of this size."""
        return packed_bytes(self._rows_first().shape, group_size)

    def _rows_first(self) -> Tensor:
        weight = self.weight.detach()
        return weight.transpose(-2, -1) if self.is_input_first else weight

    def _matrices(self) -> list[tuple[str, Tensor]]:
        """``[N, K]``: the weight, or each expert, with its name."""
        w = self._rows_first()
        if w.ndim == 2:
            return [(self.name, w)]
        return [(f"{self.name}[{i}]", matrix) for i, matrix in enumerate(w)]


def _quantized(
    matrix: Tensor, name: str, hessian: Hessian | None, group_size: int, rules: Rules
) -> tuple[GroupwiseInt4, CalibratedWeight]:
    rows, error, why = 0, 0.0, ""
    try:
        if hessian is None or not hessian.rows:
            value = choose_qparams(matrix, group_size, WITHOUT_INPUTS)
            why = "no product with it was seen"
        elif hessian.rows < rules.enough_rows:
            value, error = rounded(matrix, hessian, group_size)
            rows, why = hessian.rows, f"only {hessian.rows} rows have reached it"
        else:
            value, error = gptq(matrix, hessian, group_size, rules.damping)
            rows = hessian.rows
    except (TypeError, ValueError) as failed:
        raise type(failed)(f"{name}: {failed}") from failed
    size = packed_bytes(matrix.shape, group_size)
    return value, CalibratedWeight(name, rows, error, why, group_size, size, matrix.numel())


def choose(
    model: nn.Module, config: Any, filter_fn: Callable[[nn.Module, str], bool] | None
) -> tuple[list[Target], Report]:
    """What `quantize_` would make 4-bit, and its report of what it would leave.

    Raises:
        TypeError: the config asks for something else than 4-bit weights of this package.
        ValueError: what is chosen is nothing, or has sharded weights.
    """
    configs = config.fqn_to_config.items() if isinstance(config, FqnToConfig) else [("config", config)]
    for name, each in configs:
        if each is not None and not makes_ours(each):
            raise TypeError(
                f"{name} is a {type(each).__name__}; calibrate takes Int4WeightOnlyConfig with "
                "packing_format='opaque', alone or in an FqnToConfig, so leave out other weights here, "
                "and quantize these with quantize_"
            )
    report = Report()
    with choosing_only() as found, reported_together(report):
        quantize_(model, config, filter_fn=filter_fn)
    if not found:
        left = next(iter(report.left.items()), None)
        why = "" if left is None else f": {left[0]} is left, because {left[1]}"
        raise ValueError(f"no weight of the model is chosen{why}; choose others with filter_fn")
    sharded = next((each.name for each in found if is_sharded(each.weight)), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded} is sharded over processes; calibrate the whole model in one process, and shard "
            "what comes of it"
        )
    by_weight: dict[int, list[ChosenWeight]] = {}
    for each in found:
        by_weight.setdefault(id(each.weight), []).append(each)
    return [Target(tuple(holders)) for holders in by_weight.values()], report


def left_behind(model: nn.Module, targets: Iterable[Target]) -> dict[str, list[str]]:
    """By the name of a target: others under which its weight stays as it is, in modules not chosen."""
    shared = shared_parameters(model)
    found: dict[str, list[str]] = {}
    for target in targets:
        chosen = {(id(holder.module), holder.parameter_name) for holder in target.holders}
        for holder in shared.get(id(target.weight), []):
            if (id(holder.module), holder.parameter) not in chosen:
                found.setdefault(target.name, []).append(f"{holder.fqn}.{holder.parameter}")
    return found


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter into its place, by its name in the model."""
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, parameter)


def watchable(targets: Iterable[Target]) -> dict[str, tuple[nn.Module, Tensor]]:
    """The weights by name for an observer; embeddings are looked up and not multiplied with."""
    return {
        target.name: (target.module, target.weight)
        for target in targets
        if any(not isinstance(holder.module, nn.Embedding) for holder in target.holders)
        and target.weight.device == torch.device("cpu")
    }

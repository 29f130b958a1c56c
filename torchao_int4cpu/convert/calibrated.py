"""Calibrates the model of a Hugging Face directory with one of its blocks in memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchao_int4cpu.algorithms.hessian import DAMPING
from torchao_int4cpu.calibration.blocks import Batch, Chain
from torchao_int4cpu.calibration.calibrate import WEIGHTS, check_batches, prepared, with_bits
from torchao_int4cpu.calibration.run import Memory, Progress, Run, rows_of_blocks
from torchao_int4cpu.calibration.store import Store
from torchao_int4cpu.calibration.targets import CalibratedWeight, Rules, choose, set_parameter
from torchao_int4cpu.calibration.work import Quantizing, settings_of
from torchao_int4cpu.checkpoint.safetensors import Source, read_header
from torchao_int4cpu.convert.directory import read
from torchao_int4cpu.convert.names import Names, Stacks
from torchao_int4cpu.convert.plan import Plan, ends, set_dtype
from torchao_int4cpu.extras import import_extra


def calibrate_directory(
    plan: Plan,
    batches: list[Batch],
    folder: Path,
    tell: Progress,
    *,
    sequential: bool = True,
    damping: float = DAMPING,
) -> tuple[Store, list[CalibratedWeight]]:
    """Quantize the weights of a plan that are in blocks, for the inputs that they have.

    The model is run in float32; activations between blocks are in files that are mapped into memory.

    Args:
        plan: of the directory, which is not changed.
        batches: see `calibrate`.
        folder: for the weights and the activations; a run that was interrupted goes on with it.
        tell: told of each step.
        sequential, damping: see `calibrate`.

    Returns:
        The weights, and what became of each. Weights outside of blocks are not among them.

    Raises:
        MissingExtra: transformers or accelerate is not installed.
        TypeError, ValueError: as `calibrate`, or a tensor is missing in the files.
    """
    batches = check_batches(batches)
    parts = _Parts(plan, folder)
    rules = Rules(damping)
    work = Quantizing(rules, sequential)
    settings = settings_of(
        batches, parts.targets, sequential=sequential, files=parts.files, **vars(rules)
    )
    store = work.store = Store(folder / WEIGHTS, settings)
    parts.memory.store = store if sequential else None
    with prepared(parts.model):
        Run(parts.model, batches, parts.targets, work, tell, parts.memory).stages()
    return store, work.told


def group_sizes_of_directory(
    plan: Plan,
    batches: list[Batch],
    folder: Path,
    tell: Progress,
    target_bits: float,
) -> dict[str, int]:
    """The group size of each weight of a plan that is in a block, by which they take so many bits.

    Args and errors are those of `calibrate_directory` and of `calibrate`.
    """
    batches = check_batches(batches)
    parts = _Parts(plan, folder)
    with prepared(parts.model):
        chosen = with_bits(
            parts.model,
            batches,
            parts.targets,
            tell,
            target_bits,
            folder=folder,
            memory=parts.memory,
            files=parts.files,
        )
    return {target.name: target.holders[0].group_size for target in chosen}


class _Parts:
    """What a run over a directory consists of.

    Attributes:
        model: see `_without_numbers`.
        targets: its weights that are in blocks.
        memory: where their numbers are.
        files: of the directory, to know them again.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.model = _without_numbers(plan)
        files = sorted(plan.folder.glob("*.safetensors"))
        tensors = _Tensors(self.model, [source for file in files for source in read_header(file)])
        found, _ = choose(self.model, plan.by_name(), None)
        blocks = {n: block for row in rows_of_blocks(self.model, found) for n, block in row.items()}
        inside = {module for block in blocks.values() for module in block.modules()}
        self.targets = [target for target in found if target.module in inside]
        if not self.targets:
            raise ValueError(
                f"{str(plan.folder)!r}: {type(self.model).__name__} has no row of blocks with weights "
                "to quantize; calibrate it in memory with torchao_int4cpu.calibrate"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.memory = _OneBlock(self.model, blocks, tensors, folder / "activations")
        self.files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _without_numbers(plan: Plan) -> Any:
    """The model in float32, its parameters on meta; its buffers have their numbers."""
    transformers = import_extra("transformers", "hf")
    accelerate = import_extra("accelerate", "hf")
    config = copy.deepcopy(plan.model_config)
    del config.quantization_config
    set_dtype(config, torch.float32)
    model_class = getattr(transformers, config.architectures[0])
    with accelerate.init_empty_weights(include_buffers=False):
        return model_class._from_config(config, dtype=torch.float32).eval()


class _Tensors:
    """The numbers of a model's tensors, in the files of its directory, by the model's names."""

    def __init__(self, model: Any, sources: list[Source]) -> None:
        names = Names(model, None, torch.float32)
        self._sources: dict[str, Source] = {}
        self._stacks: Stacks[Source] = Stacks(names)
        for source in sources:
            name, pattern = names.find(source.key)
            if pattern is None:
                self._sources[name] = source
            else:
                self._stacks.add(name, pattern, source.key, source)

    def __contains__(self, name: str) -> bool:
        return name in self._sources or name in self._stacks

    def read(self, name: str) -> Tensor:
        """A tensor, in the dtype that the file has it in."""
        if name in self._sources:
            return read(self._sources[name])
        experts = self._stacks.of(name)
        return torch.stack([torch.cat([read(part) for part in parts]) for parts in experts])


class _OneBlock(Memory):
    """A model of which the block that is run has numbers, and what is outside of blocks.

    Args:
        model: with parameters on meta.
        blocks: by their names.
        tensors: where the numbers are.
        folder: for files with activations.
    """

    def __init__(
        self, model: Any, blocks: dict[str, nn.Module], tensors: _Tensors, folder: Path
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.last = list(blocks)[-1]
        self.store: Store | None = None
        self._blocks, self._tensors = blocks, tensors
        inside = {id(p) for block in blocks.values() for p in block.parameters()}
        source, head = (module or nn.Module() for module in ends(model))
        unused = {id(p) for p in head.parameters()} - {id(p) for p in source.parameters()}
        for name, parameter in list(model.named_parameters()):
            if id(parameter) in inside | unused or name not in tensors:
                continue
            numbers = tensors.read(name)
            if (
                model.get_submodule(name.rpartition(".")[0]) is not source
            ):  # of a mapped file, and large
                numbers = numbers.float()
            set_parameter(model, name, nn.Parameter(numbers, requires_grad=False))
        for name, _ in list(model.named_buffers()):
            if name in tensors:
                module, _, last = name.rpartition(".")
                model.get_submodule(module)._buffers[last] = tensors.read(name)
        model.tie_weights()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, args, result: result.float())

    @contextlib.contextmanager
    def resident(self, name: str, block: nn.Module) -> Iterator[None]:
        """Read the weights of a block; drop them in the end, as what they became is stored."""
        before = dict(block.named_parameters())
        for key, parameter in before.items():
            if f"{name}.{key}" not in self._tensors:
                raise ValueError(f"{name}.{key} is in no file of the directory; fetch them again")
            # A copy, as what is of a mapped file lies anywhere, and products may depend on that.
            numbers = self._tensors.read(f"{name}.{key}").to(torch.float32, copy=True)
            if numbers.shape != parameter.shape:
                raise ValueError(
                    f"{name}.{key} has shape {list(numbers.shape)} where the model has "
                    f"{list(parameter.shape)}; config.json and the weights are of two models"
                )
            set_parameter(block, key, nn.Parameter(numbers, requires_grad=False))
        try:
            yield
        finally:
            for key, parameter in before.items():
                set_parameter(block, key, parameter)

    @contextlib.contextmanager
    def running(self, without: Chain | None) -> Iterator[None]:
        """Read each block as it begins to run, in 4 bits if it is done, and drop it at its end."""
        names = self._blocks.keys() - ({} if without is None else without.blocks).keys()
        with contextlib.ExitStack() as hooks:
            for name in names:
                visit = _Visit(self, name, self._blocks[name])
                hooks.callback(visit.remove)
            yield

    def put_done(self, name: str, block: nn.Module) -> None:
        """Put the weights of a block that are done into their places."""
        if self.store is not None:
            for key, _ in list(block.named_parameters()):
                done = self.store.find(f"{name}.{key}")
                if done is not None:
                    set_parameter(block, key, nn.Parameter(done["weight"], requires_grad=False))


class _Visit:
    """Hooks by which a block has numbers while it runs."""

    def __init__(self, memory: _OneBlock, name: str, block: nn.Module) -> None:
        self._memory, self._name, self._block = memory, name, block
        self._resident: contextlib.AbstractContextManager[None] | None = None
        before = block.register_forward_pre_hook(self._begin)
        self._hooks = (before, block.register_forward_hook(self._end, always_call=True))

    def _begin(self, *_: Any) -> None:
        self._resident = self._memory.resident(self._name, self._block)
        self._resident.__enter__()
        self._memory.put_done(self._name, self._block)

    def _end(self, *_: Any) -> None:
        if self._resident is not None:
            self._resident.__exit__(None, None, None)
            self._resident = None

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

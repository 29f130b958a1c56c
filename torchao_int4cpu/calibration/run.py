"""One calibration: block by block, each for the inputs that the 4-bit blocks before it give."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchao_int4cpu.algorithms.hessian import DAMPING
from torchao_int4cpu.calibration.blocks import (
    Batch,
    Chain,
    Probe,
    call_model,
    containers,
    hidden_of,
    record,
)
from torchao_int4cpu.calibration.observer import Observer
from torchao_int4cpu.calibration.states import States
from torchao_int4cpu.calibration.store import Store
from torchao_int4cpu.calibration.targets import CalibratedWeight, Target, watchable
from torchao_int4cpu.checkpoint.safetensors import crc32
from torchao_int4cpu.tensor.transposed import Int4Weight
from torchao_int4cpu.version import __version__

#: Rows of activations that a weight needs, or else it is rounded without them.
ENOUGH_ROWS = 128

#: Of all batches together; fewer say nothing of a model.
LEAST_ROWS = 128

#: Told of each block: its name, and how many of how many steps are done.
Progress = Callable[[str, int, int], None]


class Memory:
    """Where the numbers of a model and its activations are: all of them in memory.

    Attributes:
        folder: for files with activations; None for memory.
        last: the name of the last block that can be run; None if everything can.
    """

    folder: Path | None = None
    last: str | None = None

    @contextlib.contextmanager
    def resident(self, name: str, block: nn.Module) -> Iterator[None]:
        """Within this block the weights of a block have numbers."""
        yield

    @contextlib.contextmanager
    def running(self, without: Chain | None) -> Iterator[None]:
        """Within this block the model runs, up to its last block, but for the blocks of a chain."""
        yield


def rows_of_blocks(model: nn.Module, targets: list[Target]) -> list[dict[str, nn.Module]]:
    """The blocks that have weights of these, row by row; see `containers`."""
    modules = {holder.module for target in targets for holder in target.holders}
    return containers(model, lambda block: any(module in modules for module in block.modules()))


class Run:
    """One calibration of a model, which is changed.

    Args:
        model: see `calibrate`, as for the others.
        batches: as `check_batches` returns them.
        targets: the weights.
        tell: told of each step.
        sequential, damping, enough_rows: see `calibrate`.
        memory: where the numbers are.

    Attributes:
        told: what became of each weight.
        store: for the blocks that are done, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        targets: list[Target],
        tell: Progress,
        *,
        sequential: bool = True,
        damping: float = DAMPING,
        enough_rows: int = ENOUGH_ROWS,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.batches, self.targets, self.tell = model, batches, targets, tell
        self.sequential, self.damping, self.enough_rows = sequential, damping, enough_rows
        self.memory = memory or Memory()
        self.told: list[CalibratedWeight] = []
        self.store: Store | None = None
        self._later: list[tuple[Target, Int4Weight]] = []
        self._done = self._total = 0
        self._name = ""

    def settings(self) -> dict[str, Any]:
        """What two calls must agree in, for one to go on with what the other began."""
        return {
            "version": __version__,
            "batches": [_checksums(batch) for batch in self.batches],
            "weights": [
                [target.name, list(target.weight.shape), target.holders[0].group_size]
                for target in self.targets
            ],
            "sequential": self.sequential,
            "damping": self.damping,
            "enough_rows": self.enough_rows,
        }

    # --- stages: chains of blocks, and weights that are in none ----------------------------------

    def stages(self) -> None:
        """Quantize everything, in the order in which the model comes to it."""
        stages = self._order()
        per_block = len(self.batches) * (2 if self.sequential else 1)
        for stage in stages:
            blocks = len(stage.blocks) if isinstance(stage, Chain) else 0
            self._total += len(self.batches) + blocks * per_block
        for stage in stages:
            if isinstance(stage, Chain):
                self._chain(stage)
            else:
                self._loose(stage)
        for target, quantized in self._later:
            target.put(quantized)
        self.tell("done", self._total, self._total)

    def _order(self) -> list[Chain | list[Target]]:
        rows = rows_of_blocks(self.model, self.targets)
        watched = {name: block for row in rows for name, block in row.items()}
        loose = {target.name: target for target in self.targets}
        names = {id(module): name for name, module in self.model.named_modules()}
        watched |= {names[id(target.module)]: target.module for target in self.targets}
        probe = Probe(watched)
        with self.memory.running(None):
            probe.run(self.model, self.batches[0], last=self.memory.last)
        chains: dict[str, Chain] = {}
        for row in rows:
            for chain in self._confirmed(probe, row):
                chains[next(iter(chain.blocks))] = chain
                for block in chain.blocks.values():  # not what several blocks share
                    for target in self._targets_in(block):
                        loose.pop(target.name)
        stages: list[Chain | list[Target]] = []
        of_module: dict[str, list[Target]] = {}
        for target in loose.values():
            of_module.setdefault(names[id(target.module)], []).append(target)
        for name in [*probe.order, *of_module]:
            if name in chains:
                stages.append(chains[name])
            elif name in of_module:
                if not stages or isinstance(stages[-1], Chain):
                    stages.append([])
                stages[-1].extend(of_module.pop(name))  # type: ignore[union-attr]
        return stages

    def _confirmed(self, probe: Probe, blocks: dict[str, nn.Module]) -> list[Chain]:
        """The chains of a container; one for each block where more depends on what blocks compute."""
        found = []
        for chain in probe.chains(blocks):
            with self.memory.running(chain):
                recorded = record(self.model, chain, self.batches[0])
            if len(chain.blocks) == 1 or probe.confirms(chain, recorded):
                found.append(chain)
            else:
                found += [
                    Chain({name: block}, forms={name: chain.forms[name]})
                    for name, block in chain.blocks.items()
                ]
        return found

    def _targets_in(self, block: nn.Module) -> list[Target]:
        modules = set(block.modules())
        return [
            target
            for target in self.targets
            if all(holder.module in modules for holder in target.holders)
        ]

    def _loose(self, targets: list[Target]) -> None:
        if self._restore(targets):
            self._step(len(self.batches))
            return
        self._name = targets[0].name
        with Observer(watchable(targets)) as observer:
            for batch in self.batches:
                call_model(self.model, batch)
                self._step()
        self._quantize(targets, observer)

    def _chain(self, chain: Chain) -> None:
        self._name = next(iter(chain.blocks))
        recorded = []
        with self.memory.running(chain):
            for i, batch in enumerate(self.batches):
                recorded.append(record(self.model, chain, batch))
                run, blocks = len(recorded[-1].calls), len(chain.blocks)
                if run != blocks:
                    raise ValueError(
                        f"batch {i} runs {run} of the {blocks} blocks from {self._name} on, or calls "
                        "them in another way than batch 0; give batches of one kind"
                    )
                self._step()
        hidden = States([each.hidden for each in recorded], self.memory.folder)
        for number, (name, block) in enumerate(chain.blocks.items()):
            self._name = name
            is_last = number + 1 == len(chain.blocks)
            calls = [each.calls[number] for each in recorded]
            with self.memory.resident(name, block):
                self._block(
                    block, [functools.partial(c.run, block, chain.slot) for c in calls], hidden, is_last
                )

    def _block(
        self,
        block: nn.Module,
        calls: list[Callable[[Tensor | None], Any]],
        hidden: States,
        is_last: bool,
    ) -> None:
        """Quantize a block, and replace what it was given by what it gives, unless it is the last."""
        targets = self._targets_in(block)
        done = self._restore(targets)
        if not done or not self.sequential:
            with Observer({} if done else watchable(targets)) as observer:
                for i, call in enumerate(calls):
                    result = hidden_of(call(hidden[i]))
                    if not self.sequential:
                        hidden[i] = result
                    self._step()
        else:
            self._step(len(calls))
        if not done:
            self._quantize(targets, observer)
        if self.sequential and not is_last:
            for i, call in enumerate(calls):
                hidden[i] = hidden_of(call(hidden[i]))
                self._step()
        elif self.sequential:
            self._step(len(calls))

    def _step(self, count: int = 1) -> None:
        self._done += count
        self.tell(self._name, self._done, self._total)

    # --- weights ---------------------------------------------------------------------------------

    def _quantize(self, targets: list[Target], observer: Observer) -> None:
        observer.share_equal()
        if not self.told:
            most = max((max(each.rows) for each in observer.watched.values()), default=LEAST_ROWS)
            if 0 < most < LEAST_ROWS:
                raise ValueError(
                    f"the batches bring {most} rows to {targets[0].name}; give {LEAST_ROWS} or more, "
                    "32768 tokens if that is possible"
                )
        for target in targets:
            watched = observer.watched.get(target.name)
            hessians = None if watched is None else watched.hessians
            quantized, told = target.quantized(hessians, self.enough_rows, self.damping)
            self._put(target, quantized)
            self.told += told
            if self.store is not None:
                self.store.save(target.name, quantized, told)

    def _restore(self, targets: list[Target]) -> bool:
        """Put weights that an earlier run has done into their places; whether all of these are."""
        found = [self.store.find(target.name) for target in targets] if self.store else []
        if not found or None in found:
            return False
        for target, done in zip(targets, found):
            assert done is not None
            self._put(target, done[0])
            self.told += done[1]
        return True

    def _put(self, target: Target, quantized: Int4Weight) -> None:
        """At once, or at the end, where nothing is to see it before."""
        if self.sequential:
            target.put(quantized)
        else:
            self._later.append((target, quantized))


def _checksums(batch: Batch) -> list[str]:
    """Of what a batch holds, to know it again."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [f"{leaf.dtype} {list(leaf.shape)} {crc32(leaf.detach().cpu())}" for leaf in leaves]

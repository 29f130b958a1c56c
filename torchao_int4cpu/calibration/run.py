"""One run over a model on some batches, block by block, to do some work on the weights of each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchao_int4cpu.calibration.blocks import (
    Batch,
    Chain,
    Probe,
    call_model,
    containers,
    record,
)
from torchao_int4cpu.calibration.states import States
from torchao_int4cpu.calibration.targets import Target
from torchao_int4cpu.calibration.work import Work

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
    """One run over a model.

    Args:
        model: see `calibrate`, as for the others.
        batches: as `check_batches` returns them.
        targets: the weights.
        work: what is done with them.
        tell: told of each step.
        memory: where the numbers are.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        targets: list[Target],
        work: Work,
        tell: Progress,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.batches, self.targets, self.tell = model, batches, targets, tell
        self.work, self.memory = work, memory or Memory()
        self._done = self._total = 0
        self._name = ""

    # --- stages: chains of blocks, and weights that are in none ----------------------------------

    def stages(self) -> None:
        """Do the work, in the order in which the model comes to the weights."""
        stages = self._order()
        for stage in stages:
            if isinstance(stage, Chain):
                self._total += len(self.batches)
                weights = [self._targets_in(block) for block in stage.blocks.values()]
            else:
                weights = [stage]
            self._total += sum(self.work.steps(len(self.batches), len(each)) for each in weights)
        for stage in stages:
            if isinstance(stage, Chain):
                self._chain(stage)
            else:
                self._loose(stage)
        self.work.finish()
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
        """Weights that are in no block: the model itself is the block."""
        self._name = targets[0].name
        calls = [functools.partial(_call_model, self.model, batch) for batch in self.batches]
        self.work.block(targets, calls, States([None] * len(calls)), True, self._step)

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
            of_block = [each.calls[number] for each in recorded]
            calls = [functools.partial(call.run, block, chain.slot) for call in of_block]
            with self.memory.resident(name, block):
                self.work.block(self._targets_in(block), calls, hidden, is_last, self._step)

    def _step(self) -> None:
        self._done += 1
        self.tell(self._name, self._done, self._total)


def _call_model(model: nn.Module, batch: Batch, hidden: Tensor | None) -> Any:
    return call_model(model, batch)

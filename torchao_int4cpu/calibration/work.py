"""What a run over a model does with the weights of each block, and the work itself: quantizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from torchao_int4cpu.calibration.blocks import Batch, hidden_of
from torchao_int4cpu.calibration.observer import Observer
from torchao_int4cpu.calibration.states import States
from torchao_int4cpu.calibration.store import Store
from torchao_int4cpu.calibration.targets import CalibratedWeight, Rules, Target, watchable
from torchao_int4cpu.checkpoint.safetensors import crc32
from torchao_int4cpu.tensor.transposed import Int4Weight
from torchao_int4cpu.version import __version__

#: Of all batches together; fewer say nothing of a model.
LEAST_ROWS = 128

#: Run a block on one batch: from its hidden states to what it returns.
Call: TypeAlias = Callable[[Tensor | None], Any]


class Work(Protocol):
    """What a run does."""

    def steps(self, batches: int, targets: int) -> int:
        """How many steps a block with so many weights takes."""

    def block(
        self,
        targets: Sequence[Target],
        calls: Sequence[Call],
        hidden: States,
        is_last: bool,
        step: Callable[[], None],
    ) -> None:
        """Work on the weights of a block, or on those that are in none, where the model is the block.

        Args:
            targets: the weights.
            calls: for each batch.
            hidden: what the block is given for each batch; afterwards what the next block is given.
            is_last: no block is given what this one gives.
            step: called after each step.
        """

    def finish(self) -> None:
        """All blocks are done."""


class Quantizing:
    """Makes weights 4-bit for the inputs that they have.

    Args:
        rules: how.
        sequential: put weights into their places at once, so that the next block sees what this one
            gives in 4 bits; else all of them in the end.

    Attributes:
        told: what became of each weight.
        store: for what is done, or None.
    """

    def __init__(self, rules: Rules, sequential: bool) -> None:
        self._rules, self._sequential = rules, sequential
        self._later: list[tuple[Target, Int4Weight]] = []
        self._has_enough = False
        self.store: Store | None = None
        self.told: list[CalibratedWeight] = []

    def steps(self, batches: int, targets: int) -> int:
        """A run of the block for each batch, and another with what it has become."""
        return batches * (2 if self._sequential else 1)

    def block(
        self,
        targets: Sequence[Target],
        calls: Sequence[Call],
        hidden: States,
        is_last: bool,
        step: Callable[[], None],
    ) -> None:
        """Quantize; see `Work`."""
        done = self._restore(targets)
        hands_on = not self._sequential and not is_last
        observer = Observer({} if done else watchable(targets))
        for i, call in enumerate(calls):
            if not done or hands_on:
                with observer:
                    result = hidden_of(call(hidden[i]))
                if hands_on:
                    hidden[i] = result
            step()
        if not done:
            self._quantize(targets, observer)
        if self._sequential:
            for i, call in enumerate(calls):
                if not is_last:
                    hidden[i] = hidden_of(call(hidden[i]))
                step()

    def finish(self) -> None:
        """Put what waits for the end into its place."""
        for target, quantized in self._later:
            target.put(quantized)

    def _quantize(self, targets: Sequence[Target], observer: Observer) -> None:
        observer.share_equal()
        if not self._has_enough:
            most = max((max(each.rows) for each in observer.watched.values()), default=LEAST_ROWS)
            if 0 < most < LEAST_ROWS:
                raise ValueError(
                    f"the batches bring {most} rows to {targets[0].name}; give {LEAST_ROWS} or more, "
                    "32768 tokens if that is possible"
                )
            self._has_enough = True
        for target in targets:
            watched = observer.watched.get(target.name)
            hessians = None if watched is None else watched.hessians
            quantized, told = target.quantized(hessians, self._rules)
            self._put(target, quantized, told)
            if self.store is not None:
                state = {"weight": quantized, "told": [list(vars(each).values()) for each in told]}
                self.store.save(target.name, state)

    def _restore(self, targets: Sequence[Target]) -> bool:
        """Put weights that an earlier run has done into their places; whether all of these are."""
        found = self.store.all(target.name for target in targets) if self.store else None
        if found is None:
            return False
        for target, state in zip(targets, found):
            self._put(target, state["weight"], [CalibratedWeight(*each) for each in state["told"]])
        return True

    def _put(self, target: Target, quantized: Int4Weight, told: list[CalibratedWeight]) -> None:
        self.told += told
        if self._sequential:
            target.put(quantized)
        else:
            self._later.append((target, quantized))


def settings_of(batches: Sequence[Batch], targets: Sequence[Target], **others: Any) -> dict[str, Any]:
    """What two calls must agree in, for one to go on with what the other began."""
    return {
        "version": __version__,
        "batches": [_checksums(batch) for batch in batches],
        "weights": [
            [target.name, list(target.weight.shape), target.holders[0].group_size] for target in targets
        ],
        **others,
    }


def _checksums(batch: Batch) -> list[str]:
    """Of what a batch holds, to know it again."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [f"{leaf.dtype} {list(leaf.shape)} {crc32(leaf.detach().cpu())}" for leaf in leaves]

"""Which group size each weight gets, for all of them to take so many bits and lose as little as can be.

A smaller group costs more bytes, for more scales, and what it brings differs from weight to weight.
That is measured: how far off the hidden states behind a block are if one weight of it is rounded to
nearest, in groups of each size. Blocks add to the same hidden states, so these losses can be compared
and added. (GPTQ, which comes later, makes them smaller, by about the same in all sizes.)

Gemma 3 270M by ``mse`` in 4.5 bits, KL divergence on perl's documentation and on fortunes: groups of 64
.260 .255; sizes chosen so .224 .214; by how far off the outputs of each weight itself are .241 .225.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchao_int4cpu.calibration.blocks import Batch, hidden_of
from torchao_int4cpu.calibration.states import States
from torchao_int4cpu.calibration.store import Store
from torchao_int4cpu.calibration.targets import Target
from torchao_int4cpu.calibration.work import Call
from torchao_int4cpu.format.groupwise import GROUP_SIZES

#: Rows of activations, tokens of a language model, on which losses are measured.
ROWS = 1024


@dataclass(frozen=True)
class Option:
    """A group size for a weight.

    Attributes:
        group_size: the size.
        nbytes: that the weight takes.
        loss: ``|h' - h|^2 / |h|^2`` of the hidden states behind its block, the mean over all rows.
    """

    group_size: int
    nbytes: int
    loss: float


class Measuring:
    """The work of measuring what group sizes cost; the weights stay as they are.

    Attributes:
        options: of each weight, by its name.
        store: for what is done, or None.
    """

    def __init__(self) -> None:
        self.options: dict[str, list[Option]] = {}
        self.store: Store | None = None

    def steps(self, batches: int, targets: int) -> int:
        """A run of the block for each batch, and for each weight one with all batches and sizes."""
        return batches + targets

    def block(
        self,
        targets: Sequence[Target],
        calls: Sequence[Call],
        hidden: States,
        is_last: bool,
        step: Callable[[], None],
    ) -> None:
        """Measure; see `Work`."""
        results = []
        for i, call in enumerate(calls):
            results.append(call(hidden[i]))
            step()
        exact = [_rows(result) for result in results]
        for target in targets:
            found = None if self.store is None else self.store.find(target.name)
            losses = _losses(target, calls, hidden, exact) if found is None else found["losses"]
            if self.store is not None and found is None:
                self.store.save(target.name, {"losses": losses})
            self.options[target.name] = [
                Option(size, target.nbytes(size), losses[size]) for size in GROUP_SIZES
            ]
            step()
        if not is_last:
            for i, result in enumerate(results):
                hidden[i] = hidden_of(result)

    def finish(self) -> None:
        """Nothing is left to do."""


def _losses(
    target: Target, calls: Sequence[Call], hidden: States, exact: Sequence[Tensor]
) -> dict[int, float]:
    """`Option.loss` by group size."""
    found = {}
    for size in GROUP_SIZES:
        with target.rounded(size):
            noise = torch.cat(
                [
                    (_rows(call(hidden[i])) - rows).square().sum(1)
                    for i, (call, rows) in enumerate(zip(calls, exact))
                ]
            )
        signal = torch.cat([rows.square().sum(1) for rows in exact])
        seen = signal > 0
        found[size] = float((noise[seen] / signal[seen]).mean()) if bool(seen.any()) else 0.0
    return found


def _rows(result: object) -> Tensor:
    """What a block returned, or a model, float32 ``[R, D]``."""
    first = next(leaf for leaf in pytree.tree_leaves(hidden_of(result)) if isinstance(leaf, Tensor))
    return first.reshape(-1, first.shape[-1]).float()


def some_of(batches: Sequence[Batch]) -> list[Batch]:
    """Batches from all over, as many as bring about `ROWS` rows; all of them if they bring fewer."""
    rows = sum(max(_count(leaf) for leaf in pytree.tree_leaves(batch)) for batch in batches)
    every = max(1, rows // ROWS)
    return list(batches[::every])


def _count(leaf: object) -> int:
    """The rows that a tensor brings: of words their number, of vectors too."""
    if not isinstance(leaf, Tensor):
        return 0
    return leaf.numel() // (leaf.shape[-1] if leaf.is_floating_point() and leaf.ndim > 1 else 1)


def check_bits(targets: Sequence[Target], target_bits: float) -> None:
    """Refuse what no choice of group sizes comes to.

    Raises:
        ValueError: these weights would take more bits, or fewer, whatever is chosen.
    """
    numel = sum(target.weight.numel() for target in targets)
    sizes = [[target.nbytes(size) for size in GROUP_SIZES] for target in targets]
    least, most = (8 * sum(map(end, sizes)) / numel for end in (min, max))
    if not least <= target_bits <= most:
        raise ValueError(
            f"target_bits={target_bits} cannot be met: with scales and zeros these weights take "
            f"{least:.3f} to {most:.3f} bits; ask for something between"
        )


def choose_options(options: Sequence[Sequence[Option]], nbytes: int) -> list[Option]:
    """One of each, of at most so many bytes together.

    It begins with the smallest ones, and then changes one after the other, each time the one that this
    brings the most for its bytes, of those that still fit.
    """
    chosen = [min(each, key=lambda option: (option.nbytes, option.loss)) for each in options]
    left = nbytes - sum(option.nbytes for option in chosen)
    while True:
        best, which, change = 0.0, -1, None
        for i, (now, each) in enumerate(zip(chosen, options)):
            for option in each:
                more = option.nbytes - now.nbytes
                if 0 < more <= left and (now.loss - option.loss) / more > best:
                    best, which, change = (now.loss - option.loss) / more, i, option
        if change is None:
            return chosen
        left -= change.nbytes - chosen[which].nbytes
        chosen[which] = change

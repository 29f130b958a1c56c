"""What a run of `quantize_` tells when it is done: how much is 4-bit now, what was left, and why.

Always to the logger ``torchao_int4cpu`` at level INFO. It is one warning as well where a user should
know: a chosen weight was left, nothing is 4-bit, or less than half of a whole model is.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchao
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torchao.utils import TorchAOBaseTensor

from torchao_int4cpu.quantize.filters import OTHER_MEANING, filter_fn, weights_of
from torchao_int4cpu.tensor.transposed import Int4Weight

LOGGER = logging.getLogger("torchao_int4cpu")

#: Files below which no line is a user's.
_NOT_THE_USERS = (
    str(Path(__file__).parent.parent),
    str(Path(torchao.__file__).parent),
    contextlib.__file__,
)

#: How many names of a group a message has.
NAMES = 4

#: A whole model of which less than this part is 4-bit is a surprise.
EXPECTED_SHARE = 0.5


class Chosen(enum.Enum):
    """What said which weights become 4-bit, as a message puts it."""

    BY_FILTER = "chosen by filter_fn"
    BY_DEFAULT = "chosen by the config"
    BY_NAME = "named by the config"
    BY_LOADER = "chosen while loading"

    def is_surprise(self, share: _Share) -> bool:
        """Whether less is 4-bit than may be expected."""
        if self is Chosen.BY_NAME:
            return not share.numbers_in_4_bit
        expected = share.numbers
        if self is Chosen.BY_LOADER:  # transformers keeps embeddings dense, as its users know
            expected -= sum(o.numbers for o in share.others.values() if issubclass(o.of, nn.Embedding))
        return not share.numbers_in_4_bit or share.numbers_in_4_bit < EXPECTED_SHARE * expected


@dataclass
class _Others:
    """Weights of one class of modules that were not chosen."""

    matrices: int = 0
    numbers: int = 0
    of: type[nn.Module] = nn.Module
    by_our_filter: bool = False
    has_stacks: bool = False


@dataclass
class _Share:
    """How much of a model is 4-bit. Weights in other formats of torchao do not count."""

    matrices: int = 0
    numbers: int = 0
    matrices_in_4_bit: int = 0
    numbers_in_4_bit: int = 0
    others: dict[str, _Others] = field(default_factory=dict)


@dataclass
class Report:
    """What was left in one or several runs of `quantize_`.

    Attributes:
        left: by the name of a weight, why it was left.
        is_ours: whether these runs have to do with 4-bit weights of this package.
    """

    left: dict[str, str] = field(default_factory=dict)
    is_ours: bool = False

    def leave(self, name: str, reason: str) -> None:
        """Note that a weight that was chosen is left as it was."""
        self.left[name] = reason

    def tell(self, model: nn.Module, chosen: Chosen) -> None:
        """Log a summary of the model, and warn of it if it holds a surprise."""
        share = self._share(model)
        text = ". ".join([*self._left(), *_sentences(share, chosen)])
        LOGGER.info("%s", text)
        if self.left or chosen.is_surprise(share):
            warn_user(text, 4)  # `Run.end`, the visit, `quantize_`

    def _left(self) -> list[str]:
        """A sentence for each reason, in the order in which they came up."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.left.items():  # shapes and bytes in it differ from weight to weight
            groups.setdefault(re.sub(r"\d+", "0", reason), []).append(name)
        sentences = []
        for first, *others in groups.values():
            sentence = left_as_it_was(first, self.left[first])
            if others:
                names = ", ".join(others[:NAMES]) + (", ..." if len(others) > NAMES else "")
                sentence += f" (and so are {len(others)} more: {names})"
            sentences.append(sentence)
        return sentences

    def _share(self, model: nn.Module) -> _Share:
        share = _Share()
        seen = set()
        # The output projection of an attention goes by the attention's class: it is chosen with it.
        owners = {id(part): m for m in model.modules() for at, part, _ in weights_of(m, "weight") if at}
        for fqn, module in model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) in seen or not _is_matrix(weight):
                    continue
                seen.add(id(weight))
                in_4_bit = is_4_bit(weight)
                share.matrices += 1
                share.numbers += weight.numel()
                share.matrices_in_4_bit += in_4_bit
                share.numbers_in_4_bit += weight.numel() * in_4_bit
                if in_4_bit or self._is_left(module, fqn, name):
                    continue
                owner = owners.get(id(module), module)
                others = share.others.setdefault(type(owner).__name__, _Others())
                others.matrices += 1
                others.numbers += weight.numel()
                others.of, others.by_our_filter = type(owner), filter_fn(owner, fqn)
                others.has_stacks |= weight.ndim == 3 and weight.shape[0] > 1  # a table of positions: 1
        return share

    def _is_left(self, module: nn.Module, fqn: str, name: str) -> bool:
        """Whether a parameter is one that was left, or a left one is computed from it."""
        names = [f"{fqn}.{name}", f"{fqn}.{name.rpartition('_')[0]}"]  # weight_v: weight is made of it
        if isinstance(module, ParametrizationList):
            names.append(fqn.replace("parametrizations.", ""))
        return any(each.removeprefix(".") in self.left for each in names)


def left_as_it_was(name: str, reason: str) -> str:
    """The sentence on a weight that was chosen and is not 4-bit."""
    return f"{name} is left as it was: {reason}"


def is_4_bit(weight: Tensor) -> bool:
    """Whether it is one of our tensors, or sharded such."""
    local: Any = getattr(weight, "_local_tensor", weight)  # of a DTensor; the public way communicates
    return isinstance(local, Int4Weight)


def _is_matrix(weight: Tensor) -> bool:
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return False
    in_another_format = isinstance(weight, TorchAOBaseTensor) and not is_4_bit(weight)
    return weight.ndim >= 2 and weight.is_floating_point() and not in_another_format


def _sentences(share: _Share, chosen: Chosen) -> list[str]:
    """How much is 4-bit now, what was not chosen, and how it could be."""
    if not share.matrices:
        return ["Nothing is 4-bit, because the model has no float matrices"]
    matrices = "1 matrix" if share.matrices == 1 else f"{share.matrices} matrices"
    if share.matrices_in_4_bit:
        percent = _percent(share.numbers_in_4_bit, share.numbers)
        verb = "is" if share.matrices_in_4_bit == 1 else "are"
        told = [
            f"{share.matrices_in_4_bit} of {matrices} {verb} 4-bit now, with {percent} of the numbers"
        ]
    else:
        told = [f"None of {matrices} is 4-bit"]
    if not share.others:
        return told
    groups = sorted(share.others.items(), key=lambda item: -item[1].numbers)
    shown = [f"{o.matrices} of {name} ({_percent(o.numbers, share.numbers)})" for name, o in groups]
    told.append(f"Not {chosen.value}: {', '.join(shown[:NAMES])}" + (", ..." if shown[NAMES:] else ""))
    return told + _cures(groups, chosen)


def _cures(groups: list[tuple[str, _Others]], chosen: Chosen) -> list[str]:
    """What chooses the weights that were not chosen, and which can never be."""
    told = []
    unfit = [name for name, others in groups if issubclass(others.of, OTHER_MEANING)]
    ours = [n for n, others in groups if others.by_our_filter and not issubclass(others.of, nn.Linear)]
    named = [name for name, others in groups if others.has_stacks and name not in unfit]
    if ours and chosen is Chosen.BY_FILTER:
        told.append(f"filter_fn=torchao_int4cpu.filter_fn chooses those of {' and '.join(ours)}")
    else:
        named = ours + named
    if named:
        told.append(f"An FqnToConfig can name those of {' and '.join(named)}")
    if chosen is Chosen.BY_FILTER and any(issubclass(others.of, nn.Embedding) for _, others in groups):
        told.append(
            "Embeddings are chosen by filter_fn=lambda module, name: isinstance(module, "
            "(torch.nn.Linear, torch.nn.Embedding))"
        )
    if unfit:
        verb = "has" if len(unfit) == 1 else "have"
        told.append(f"{' and '.join(unfit)} {verb} no 4-bit implementation")
    return told


def _percent(part: int, whole: int) -> str:
    # Never 100.0% of less than all, nor 0.0% of something.
    return f"{min(max(100 * part / whole, 0.1), 99.9) if 0 < part < whole else 100 * part / whole:.1f}%"


def warn_user(text: str, depth: int) -> None:
    """Warn on the line that called `quantize_`.

    Args:
        text: of the warning.
        depth: how many calls that is above the caller, about; for Python before 3.12, which cannot
            skip files.
    """
    if sys.version_info >= (3, 12):
        warnings.warn(text, stacklevel=2, skip_file_prefixes=_NOT_THE_USERS)
    else:
        warnings.warn(text, stacklevel=2 + depth)

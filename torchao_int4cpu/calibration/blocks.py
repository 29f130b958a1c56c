"""The blocks that a model consists of, and how each is called, so that it can be run alone.

A *chain* is a row of blocks of which each takes what the one before it returned, as those of a decoder
do. It is recorded once, without running its blocks, and then run block by block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: What a model is called with: a tensor, a mapping of keyword arguments, or a sequence of arguments.
Batch = Any


class Slot(NamedTuple):
    """The argument that a block takes the result of the block before in."""

    key: int | str

    def get(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument, or None."""
        if isinstance(self.key, str):
            return kwargs.get(self.key)
        return args[self.key] if self.key < len(args) else None


@dataclass
class Call:
    """How a block was called: everything but the argument in its slot."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, slot: Slot | None, hidden: Tensor | None) -> Any:
        """Call the block, with ``hidden`` in its slot."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if slot is not None:
            if isinstance(slot.key, str):
                kwargs[slot.key] = hidden
            else:
                args[slot.key] = hidden
        return block(*args, **kwargs)


@dataclass
class Chain:
    """Blocks that can be run one after the other, by their names.

    Attributes:
        blocks: one or more.
        slot: where each takes the result of the one before; None for one block alone.
        forms: of what each returns.
    """

    blocks: dict[str, nn.Module]
    slot: Slot | None = None
    forms: dict[str, Form] = field(default_factory=dict)


@dataclass
class Form:
    """What a block returns beside the hidden states.

    Attributes:
        kind: tuple or list; None if it returns the hidden states alone.
        others: where it was given the same thing; or the thing itself, which no other block is given.
    """

    kind: type[Any] | None
    others: list[Any] = field(default_factory=list)

    def made(self, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """In the place of what a block returns that is called so."""
        if self.kind is None:
            return hidden
        others = [each.get(args, kwargs) if isinstance(each, Slot) else each for each in self.others]
        return self.kind([hidden, *others])


@dataclass
class Recorded:
    """The calls of a chain for one batch, and what its first block was given."""

    hidden: Tensor | None = None
    calls: list[Call] = field(default_factory=list)


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Call a model with a batch, in any of its forms."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def hidden_of(result: Any) -> Any:
    """What the next block takes of what a block returned: it, or the first of several."""
    return result[0] if isinstance(result, (tuple, list)) else result


def containers(
    model: nn.Module, holds_weights: Callable[[nn.Module], bool]
) -> list[dict[str, nn.Module]]:
    """The outermost lists of modules with weights, as the layers of a decoder are.

    Args:
        model: in which to look.
        holds_weights: whether a module, or one in it, has a weight to quantize.

    Returns:
        Of each list, the modules with weights by their names in the model.
    """
    found: list[dict[str, nn.Module]] = []

    def look(module: nn.Module, name: str) -> None:
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            blocks = {
                f"{name}.{n}".lstrip("."): m for n, m in module.named_children() if holds_weights(m)
            }
            if len(blocks) >= (1 if isinstance(module, nn.ModuleList) else 2):
                found.append(blocks)
                return
        for child_name, child in module.named_children():
            look(child, f"{name}.{child_name}".lstrip("."))

    look(model, "")
    return found


class _StopForward(Exception):
    """Thrown once everything is known."""


# --- probing ------------------------------------------------------------------------------------


class Probe:
    """One run of the model: in which order modules begin, how often, and with what.

    Args:
        modules: to watch, by their names.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.order: list[str] = []
        self._inputs: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._results: dict[str, Any] = {}

    def run(self, model: nn.Module, batch: Batch, *, last: str | None = None) -> None:
        """Call the model, and watch; up to the end of the module called ``last``, if that is given."""
        with contextlib.ExitStack() as hooks, contextlib.suppress(_StopForward):
            for name, module in self.modules.items():
                before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                hooks.callback(before.remove)
                after = module.register_forward_hook(self._after(name, stop=name == last))
                hooks.callback(after.remove)
            call_model(model, batch)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in self._inputs:
                self.order.append(name)
            self._inputs.setdefault(name, []).append((args, kwargs))

        return hook

    def _after(self, name: str, stop: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            self._results[name] = result
            if stop:
                raise _StopForward

        return hook

    def chains(self, blocks: Mapping[str, nn.Module]) -> list[Chain]:
        """Cut the blocks of a container into chains.

        Blocks that were not called, or not once, are in none.
        """
        found: list[Chain] = []
        before: str | None = None
        for name in self.order:
            if name not in blocks:
                continue
            if len(self._inputs[name]) != 1:
                before = None
                continue
            slot = None if before is None else self._slot(before, name)
            if slot is not None and found[-1].slot in (None, slot):
                found[-1].blocks[name] = blocks[name]
                found[-1].slot = slot
            else:
                found.append(Chain({name: blocks[name]}))
            found[-1].forms[name] = self._form(name)
            before = name
        return found

    def _form(self, name: str) -> Form:
        result = self._results[name]
        if not isinstance(result, (tuple, list)):
            return Form(None)
        others = [self._given(name, each) or each for each in result[1:]]
        return Form(tuple if isinstance(result, tuple) else list, others)

    def _given(self, name: str, value: Any) -> Slot | None:
        """Where a block was given a tensor."""
        ((args, kwargs),) = self._inputs[name]
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        keys = [key for key, each in named if each is value and isinstance(value, Tensor)]
        return Slot(keys[0]) if keys else None

    def confirms(self, chain: Chain, recorded: Recorded) -> bool:
        """Whether the blocks are called as they were, though none has been run."""
        for name, call in zip(chain.blocks, recorded.calls):
            ((args, kwargs),) = self._inputs[name]
            expected = _without(args, kwargs, chain.slot)
            pairs = zip(
                pytree.tree_leaves((call.args, call.kwargs)),
                pytree.tree_leaves((expected.args, expected.kwargs)),
            )
            for ours, theirs in pairs:
                if isinstance(ours, Tensor) != isinstance(theirs, Tensor):
                    return False
                if isinstance(ours, Tensor) and not torch.equal(ours, theirs):
                    return False
        return len(recorded.calls) == len(chain.blocks)

    def _slot(self, before: str, name: str) -> Slot | None:
        """Where a block takes the result of the one before it; None if it does not, or not only that.

        What else the one before has returned may be given on only if that was given it, too.
        """
        result = self._results[before]
        hidden = hidden_of(result)
        others = result[1:] if isinstance(result, (tuple, list)) else ()
        if any(self._given(name, each) and not self._given(before, each) for each in others):
            return None
        return self._given(name, hidden)


# --- recording ----------------------------------------------------------------------------------


def record(model: nn.Module, chain: Chain, batch: Batch) -> Recorded:
    """Call the model up to a chain, whose blocks are not run, and note how each is called."""
    recorded = Recorded()
    last = list(chain.blocks)[-1]

    def stand_in(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = None if chain.slot is None else chain.slot.get(args, kwargs)
            if not recorded.calls:
                recorded.hidden = hidden
            if chain.slot is not None and not isinstance(hidden, Tensor):
                raise _StopForward  # called in another way: what is missing is seen
            recorded.calls.append(_without(args, kwargs, chain.slot))
            if name == last:
                raise _StopForward
            assert isinstance(hidden, Tensor)
            return chain.forms[name].made(hidden, args, kwargs)

        return forward

    forwards = {module: stand_in(name) for name, module in chain.blocks.items()}
    with _forwards_replaced(forwards), contextlib.suppress(_StopForward):
        call_model(model, batch)
    return recorded


def _without(args: Sequence[Any], kwargs: Mapping[str, Any], slot: Slot | None) -> Call:
    """A call, with nothing in its slot."""
    key = None if slot is None else slot.key
    return Call(
        tuple(None if i == key else value for i, value in enumerate(args)),
        {name: value for name, value in kwargs.items() if name != key},
    )


@contextlib.contextmanager
def _forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in before.items():
            if original is None:
                del module.forward
            else:
                module.forward = original

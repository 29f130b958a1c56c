"""How a 4-bit weight is pickled, unpickled and deep-copied: format version, checks, repacking on load.

A saved tensor records the layout of its bytes. Whoever loads it (`torch.load` with
``weights_only=True``, pickle, a whole module) gets it repacked for the process that loads.
"""

from __future__ import annotations

import copy
import functools
import sys
from contextvars import ContextVar
from itertools import combinations
from typing import Any

import torch

from torchao_int4cpu.format import groupwise
from torchao_int4cpu.format.act_order import check_act_order
from torchao_int4cpu.format.checks import check_parts, shown
from torchao_int4cpu.tensor import module_repr, transposed
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.module_repr import ExtraRepr
from torchao_int4cpu.tensor.provenance import Provenance
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight

#: Raised whenever a reader of the old format could not read the new one. 2 brought stacks and
#: transposed views; with 3, pickles name the classes ``torchao_int4cpu.Int4OpaqueTensor`` and so on,
#: wherever the modules are. 4 is that of weights with float16 scales and zeros, and of no others; 5 of
#: those with an act_order, whose scales may be either.
#: Whatever an old reader could read is written in the oldest version that has it.
FORMAT_VERSION = 5

_FLOAT16_VERSION, _ACT_ORDER_VERSION = 4, 5

#: Fields that are no part of a file: a loaded weight is one of its own.
_NOT_SAVED = frozenset(("_packed", "_flattened", "provenance", "split_from"))

_PARTS = (*(part.name for part in Int4OpaqueTensor.PARTS), "block_size", "qdata_layout")

#: What pickles of all versions have; with act_order since `_ACT_ORDER_VERSION`.
_REQUIRED = tuple(name for name in _PARTS if name != "act_order")


def get_state(t: Int4OpaqueTensor) -> dict[str, Any]:
    """``__getstate__``: the parts, whatever else Python has attached, and the format version."""
    state = {name: value for name, value in t.__dict__.items() if name not in _NOT_SAVED}
    if t.act_order is None:
        del state["act_order"]  # so that old readers find what they know
    if t.ndim == 3 and t.shape[0] > 1 and t.qdata.stride(0) == 0:  # expanded: see `_check_own_bytes`
        state |= {"qdata": t.qdata.contiguous(), "scale_and_zero": t.scale_and_zero.contiguous()}
    return state | {"format_version": _version(t, 3)}


def version_of(t: Int4Weight) -> int:
    """The oldest version that can hold it outside of a pickle: old readers read what they can."""
    return _version(t, 1 if isinstance(t, Int4OpaqueTensor) and t.ndim == 2 else 2)


def _version(t: Int4Weight, oldest: int) -> int:
    """``oldest``, which holds bfloat16 scales, or the one of float16 scales or of an order."""
    if t.act_order is not None:
        return _ACT_ORDER_VERSION
    return _FLOAT16_VERSION if t.scale_and_zero.dtype == torch.float16 else oldest


def set_state(t: Int4OpaqueTensor, state: dict[str, Any]) -> None:
    """``__setstate__``: check everything, as the file may be damaged or made to do harm; repack.

    ``t`` comes with the shape and dtype that the file gives; nothing else of it is used.

    Raises:
        TypeError, ValueError: the state is not one that `get_state` writes, it was written by a newer
            format, or its parts do not fit together.
    """
    state, version = _checked_dict(state)
    missing = [name for name in _REQUIRED if name not in state]
    if missing:
        raise ValueError(
            f"a saved 4-bit weight has no {', '.join(missing)}; the file is damaged, save it again"
        )
    parts: dict[str, Any] = {name: state.get(name) for name in _PARTS}
    check_parts(shape=tuple(t.shape), dtype=t.dtype, **parts)
    check_version_of_parts(version, parts["scale_and_zero"], parts["act_order"])
    _check_wrapper(t, parts["qdata"].device)
    attached = {name: value for name, value in state.items() if name not in _PARTS}
    _check_attached(type(t), attached)
    # The tensors of the file are in its hands: it can change them later, or ask them for gradients.
    parts |= {name: part.detach() for name, part in parts.items() if isinstance(part, torch.Tensor)}
    _check_apart([part for part in parts.values() if isinstance(part, torch.Tensor)])
    _check_own_bytes(parts["qdata"], parts["scale_and_zero"])
    t.__dict__.update(parts | attached)
    t.__dict__["block_size"] = list(t.block_size)
    t._remember()  # they are checked, so that the first use, perhaps in a trace, need not
    with torch._C.DisableTorchFunctionSubclass():
        t.requires_grad_(False)  # it stays frozen, whatever the file says
    unread = _unread.get()
    if unread is not None:
        unread.append(t)
    elif not torch.serialization._serialization_tls.skip_data:
        _finish(t)


def _finish(t: Int4OpaqueTensor) -> None:
    """Check and do what needs the numbers, once they are read."""
    check_act_order(t.act_order, t.shape[-1])
    t.repack_()


def get_state_of_view(t: Int4TransposedTensor) -> dict[str, Any]:
    """``__getstate__`` of the transposed view: the weight, and whatever else Python has attached."""
    state = {name: value for name, value in t.__dict__.items() if name not in _NOT_SAVED}
    return state | {"format_version": _version(t, 3)}


def set_state_of_view(t: Int4TransposedTensor, state: dict[str, Any]) -> None:
    """``__setstate__`` of the transposed view: the weight has checked itself; it must fit the view.

    Raises:
        TypeError, ValueError: as `set_state`.
    """
    state, _ = _checked_dict(state)  # the version of the weight is what counts
    weight = state.pop("weight", None)
    if not isinstance(weight, Int4OpaqueTensor) or "qdata" not in weight.__dict__:
        raise TypeError(
            f"a saved transposed 4-bit weight has a {type(weight).__name__} inside; it must be a whole "
            "Int4OpaqueTensor, so the file is damaged, save it again"
        )
    _check_view(t, weight)
    _check_attached(type(t), state)
    t.__dict__.update(state)
    t.weight = weight
    with torch._C.DisableTorchFunctionSubclass():
        t.requires_grad_(False)


def deep_copy(t: Int4Weight, memo: dict[int, Any]) -> Int4Weight:
    """``__deepcopy__``: a weight of its own. Parts that share memory in a module do so in its copy.

    The copy of a repacked copy may be written to, because it has no source to keep in sync. What is
    made to be filled by cuts stays so. Torch's own way would copy the parts twice, and ``read_only``
    too.
    """
    if id(t) in memo:
        known: Int4Weight = memo[id(t)]
        return known
    new: Int4Weight
    if isinstance(t, Int4TransposedTensor):
        new = Int4TransposedTensor(copy.deepcopy(t.untransposed(), memo))
        done = {"weight", *_NOT_SAVED}
    else:
        parts = {name: copy.deepcopy(part, memo) for name, part in t.parts().items()}
        provenance = Provenance(filled_by_cuts=t.provenance.filled_by_cuts)
        new = t.with_parts(parts, t.shape, provenance=provenance)
        done = {*_PARTS, *_NOT_SAVED}
    memo[id(t)] = new
    attached = {name: value for name, value in t.__dict__.items() if name not in done}
    new.__dict__.update(copy.deepcopy(attached, memo))
    return new


def _checked_dict(state: object) -> tuple[dict[str, Any], int]:
    """A copy of the state, and the format version that it gave."""
    if not isinstance(state, dict):
        raise TypeError(
            f"the state of a saved 4-bit weight is a {type(state).__name__}; it must be a dict, "
            "so the file is damaged or was not written by torchao_int4cpu"
        )
    state = dict(state)
    return state, check_version(state.pop("format_version", None))


def _check_wrapper(t: Int4OpaqueTensor, device: torch.device) -> None:
    """Check what the file says of ``t`` itself: a name for its parts, without memory of its own."""
    if not _is_strided(t) or not t.is_contiguous() or t.storage_offset() != 0:
        raise ValueError(
            "a saved 4-bit weight says that its layout, strides or offset are not of a contiguous "
            "tensor; no such file is written, so it is damaged, save it again"
        )
    if t.device.type != device.type:
        raise ValueError(
            f"a saved 4-bit weight is on {t.device} and its parts are on {device}; both must be on one "
            "device, so load it with map_location='cpu'"
        )
    if t.data_ptr() != 0:
        raise ValueError(
            f"a saved 4-bit weight of shape {list(t.shape)} has a dense tensor's memory; it must have "
            "none but its parts', so the file is damaged"
        )


def _check_view(t: Int4TransposedTensor, weight: Int4OpaqueTensor) -> None:
    """Check what the file says of a transposed view itself: that it is one of ``weight``."""
    view = Int4TransposedTensor(weight)
    if (
        not _is_strided(t)
        or (t.shape, t.stride(), t.storage_offset()) != (view.shape, view.stride(), 0)
        or (t.dtype, t.device.type) != (view.dtype, view.device.type)
        or t.data_ptr() != 0
    ):
        raise ValueError(
            f"a saved transposed 4-bit weight is {t.dtype} {list(t.shape)} on {t.device}, and the "
            f"transposed view of its weight, without memory of its own, is {view.dtype} "
            f"{list(view.shape)} on {view.device}; no such file is written, so it is damaged, "
            "save it again"
        )


def _is_strided(t: torch.Tensor) -> bool:
    try:
        return t.layout == torch.strided
    except RuntimeError:  # torch does not know the layout of a tensor subclass that claims to be CSR
        return False


def _check_attached(cls: type, attached: dict[Any, Any]) -> None:
    """Check what else the file attaches to the weight.

    Attributes that Python code has attached are kept; one that hides a method would do harm, and so
    would one that is a protocol: numpy reads wherever an ``__array_interface__`` points to.
    """
    for name in attached:
        if name == "_is_param":
            continue
        if not isinstance(name, str) or name.startswith("__") or hasattr(cls, name):
            raise ValueError(
                f"a saved 4-bit weight has an attribute {shown(name)} that the class itself defines, "
                "or that is no plain name; no such thing is written, so the file is damaged"
            )
    if not isinstance(attached.get("_is_param", True), bool):
        raise TypeError(
            f"a saved 4-bit weight has _is_param={shown(attached['_is_param'])}; it must be True or "
            "absent, so the file is damaged"
        )


def _check_apart(parts: list[torch.Tensor]) -> None:
    """Check that parts do not share memory: ``copy_`` into one would change the other.

    Nor a storage of two dtypes: torch reads such a file, but does not write one.
    """
    real = [part for part in parts if type(part) is torch.Tensor and part.device.type == "cpu"]
    for a, b in combinations(real, 2):
        (a_start, a_stop), (b_start, b_stop) = _span(a), _span(b)
        one_storage = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        if (a_start < b_stop and b_start < a_stop) or (one_storage and a.dtype != b.dtype):
            raise ValueError(
                "two parts of a saved 4-bit weight share memory; each must have its own, "
                "so the file is damaged, save it again"
            )


def _check_own_bytes(qdata: torch.Tensor, scale_and_zero: torch.Tensor) -> None:
    """Check that no two matrices of a stack, and no two groups, share bytes.

    Else a file of a few bytes could hold a stack of any number of matrices: too many to be repacked.
    """
    for part in (qdata, scale_and_zero):
        size = part.shape[-2:].numel()  # whose bytes follow each other: `check_parts`
        for length, stride in zip(part.shape[-3::-1], part.stride()[-3::-1]):
            if length > 1 and stride < size:
                raise ValueError(
                    f"a saved 4-bit weight has a part of shape {list(part.shape)} with strides "
                    f"{list(part.stride())}, so that its matrices or groups share memory; no such file "
                    "is written, so it is damaged, save it again"
                )
            size += (length - 1) * stride


def _span(part: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte of a tensor, and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride()))
    return part.data_ptr(), part.data_ptr() + (last + 1) * part.element_size()


#: Weights that were read by torch's format from before zip files, which reads the bytes of the parts
#: after everything else: they are repacked when it has. None while no such file is read.
_unread: ContextVar[list[Int4OpaqueTensor] | None] = ContextVar("unread", default=None)


def _repack_after_legacy_load() -> None:
    """Wrap torch's function that reads the old format, once."""
    original = torch.serialization._legacy_load
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def legacy_load(*args: Any, **kwargs: Any) -> Any:
        unread: list[Int4OpaqueTensor] = []
        token = _unread.set(unread)
        try:
            loaded = original(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            _unread.reset(token)
        for t in unread:
            _finish(t)
        return loaded

    legacy_load.torchao_int4cpu = True  # type: ignore[attr-defined]
    torch.serialization._legacy_load = legacy_load


def check_version(version: object) -> int:
    """Return the format version that a file gives.

    Raises:
        ValueError: it is none, or newer than this package reads.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"a saved 4-bit weight has format_version={shown(version)}; it must be an int from 1 to "
            f"{FORMAT_VERSION}, so the file is damaged or was not written by torchao_int4cpu"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"a saved 4-bit weight has format_version={shown(version)}; this torchao_int4cpu reads up "
            f"to {FORMAT_VERSION}, so install a newer one"
        )
    return version


def check_version_of_parts(
    version: int, scale_and_zero: torch.Tensor, act_order: torch.Tensor | None
) -> None:
    """Check that a weight has what the version is about: scales of two dtypes take as many bytes.

    Raises:
        ValueError: it has something else.
    """
    if (act_order is not None) != (version == _ACT_ORDER_VERSION):
        raise ValueError(
            f"a saved 4-bit weight of format_version={version} has "
            f"{'no ' if act_order is None else ''}act_order, which version {_ACT_ORDER_VERSION} has "
            "and no other, so the file is damaged, save it again"
        )
    if act_order is not None:
        return
    expected = torch.float16 if version == _FLOAT16_VERSION else torch.bfloat16
    if scale_and_zero.dtype != expected:
        raise ValueError(
            f"a saved 4-bit weight of format_version={version} has scale_and_zero in "
            f"{scale_and_zero.dtype}; that version has it in {expected}, so the file is damaged, save "
            "it again"
        )


Int4OpaqueTensor.__getstate__ = get_state  # type: ignore[method-assign,assignment]
Int4OpaqueTensor.__setstate__ = set_state
Int4TransposedTensor.__getstate__ = get_state_of_view  # type: ignore[method-assign,assignment]
Int4TransposedTensor.__setstate__ = set_state_of_view
Int4OpaqueTensor.__deepcopy__ = deep_copy
Int4TransposedTensor.__deepcopy__ = deep_copy
_repack_after_legacy_load()

torch.serialization.add_safe_globals(
    [
        Int4OpaqueTensor,
        Int4TransposedTensor,
        ExtraRepr,
        # As versions 1 and 2 name them.
        (Int4OpaqueTensor, "torchao_int4cpu.tensor.Int4OpaqueTensor"),
        (Int4TransposedTensor, "torchao_int4cpu.transposed.Int4TransposedTensor"),
        (ExtraRepr, "torchao_int4cpu.module_repr.ExtraRepr"),
    ]
)
# Plain pickles of these versions import the modules that the classes were in.
sys.modules.setdefault("torchao_int4cpu.groupwise", groupwise)
sys.modules.setdefault("torchao_int4cpu.module_repr", module_repr)
sys.modules.setdefault("torchao_int4cpu.transposed", transposed)

"""How a 4-bit weight is pickled, unpickled and deep-copied: format version, checks, repacking on load.

A saved tensor records the layout of its bytes. Whoever loads it (`torch.load` with
``weights_only=True``, pickle, a whole module) gets it repacked for the process that loads.
"""

from __future__ import annotations

import copy
import traceback
from itertools import combinations
from typing import Any

import torch

from torchao_int4cpu.parts import check_parts, shown
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor, Int4Weight

#: Raised whenever a reader of the old format could not read the new one. 2 brought stacks and
#: transposed views.
FORMAT_VERSION = 2

#: What a tensor knows of itself in this process only: a loaded one is a weight of its own.
_NOT_SAVED = frozenset(("_fits", "read_only", "filled_by_cuts", "cut_from", "split_from", "gathered"))

_PARTS = ("qdata", "scale_and_zero", "block_size", "qdata_layout", "act_pre_scale")


def get_state(t: Int4OpaqueTensor) -> dict[str, Any]:
    """``__getstate__``: the parts, whatever else Python has attached, and the format version."""
    state = {name: value for name, value in t.__dict__.items() if name not in _NOT_SAVED}
    if t.ndim == 3 and t.shape[0] > 1 and t.qdata.stride(0) == 0:  # expanded: see `_check_own_bytes`
        state |= {"qdata": t.qdata.contiguous(), "scale_and_zero": t.scale_and_zero.contiguous()}
    return state | {"format_version": version_of(t)}


def version_of(t: Int4Weight) -> int:
    """The oldest version of the format that can hold it, so that old readers read what they can."""
    return 1 if isinstance(t, Int4OpaqueTensor) and t.ndim == 2 else 2


def set_state(t: Int4OpaqueTensor, state: dict[str, Any]) -> None:
    """``__setstate__``: check everything, as the file may be damaged or made to do harm; repack.

    ``t`` comes with the shape and dtype that the file gives; nothing else of it is used.

    Raises:
        TypeError, ValueError: the state is not one that `get_state` writes, it was written by a newer
            format, or its parts do not fit together.
    """
    state = _checked_dict(state)
    missing = [name for name in _PARTS if name not in state]
    if missing:
        raise ValueError(
            f"a saved 4-bit weight has no {', '.join(missing)}; the file is damaged, save it again"
        )
    parts = {name: state[name] for name in _PARTS}
    check_parts(shape=tuple(t.shape), dtype=t.dtype, **parts)
    _check_wrapper(t, parts["qdata"].device)
    attached = {name: value for name, value in state.items() if name not in _PARTS}
    _check_attached(type(t), attached)
    # The tensors of the file are in its hands: it can change them later, or ask them for gradients.
    parts |= {name: part.detach() for name, part in parts.items() if isinstance(part, torch.Tensor)}
    _check_apart([part for part in parts.values() if isinstance(part, torch.Tensor)])
    _check_own_bytes(parts["qdata"], parts["scale_and_zero"])
    t.__dict__.update(parts | attached)
    t.block_size = list(t.block_size)
    t.matrices()  # this checks them, so that the first use, perhaps in a trace, need not
    with torch._C.DisableTorchFunctionSubclass():
        t.requires_grad_(False)  # it stays frozen, whatever the file says
    if not _data_follow():  # else it keeps its layout: it multiplies right, and warns that it is slow
        t.repack_()


def get_state_of_view(t: Int4TransposedTensor) -> dict[str, Any]:
    """``__getstate__`` of the transposed view: the weight, and whatever else Python has attached."""
    return t.__dict__ | {"format_version": version_of(t)}


def set_state_of_view(t: Int4TransposedTensor, state: dict[str, Any]) -> None:
    """``__setstate__`` of the transposed view: the weight has checked itself; it must fit the view.

    Raises:
        TypeError, ValueError: as `set_state`.
    """
    state = _checked_dict(state)
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

    A copy of a repacked copy may be written to: nothing is behind it that would have to change. What is
    made to be filled by cuts stays so. Torch's own way copies the parts twice, and ``read_only`` too.
    """
    if id(t) in memo:
        known: Int4Weight = memo[id(t)]
        return known
    new: Int4Weight
    if isinstance(t, Int4TransposedTensor):
        new, done = Int4TransposedTensor(copy.deepcopy(t.back(), memo)), {"weight"}
    else:
        qdata, scale_and_zero = copy.deepcopy(t.qdata, memo), copy.deepcopy(t.scale_and_zero, memo)
        scale = copy.deepcopy(t.act_pre_scale, memo)
        new = Int4OpaqueTensor(
            qdata, scale_and_zero, t.block_size, t.shape, t.qdata_layout, t.dtype, scale
        )
        new.filled_by_cuts = t.filled_by_cuts
        done = {*_PARTS, *_NOT_SAVED}
    memo[id(t)] = new
    attached = {name: value for name, value in t.__dict__.items() if name not in done}
    new.__dict__.update(copy.deepcopy(attached, memo))
    return new


def _checked_dict(state: object) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise TypeError(
            f"the state of a saved 4-bit weight is a {type(state).__name__}; it must be a dict, "
            "so the file is damaged or was not written by torchao_int4cpu"
        )
    state = dict(state)
    check_version(state.pop("format_version", None))
    return state


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


def _data_follow() -> bool:
    """Whether torch reads the bytes of the parts after this: in its format from before zip files.

    Or never, under `torch.serialization.skip_data`. Nothing about a part itself tells.
    """
    if torch.serialization._serialization_tls.skip_data:
        return True
    loader = torch.serialization._legacy_load.__code__
    return any(frame.f_code is loader for frame, _ in traceback.walk_stack(None))


def check_version(version: object) -> None:
    """Check the format version that a file gives.

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


Int4OpaqueTensor.__getstate__ = get_state  # type: ignore[method-assign,assignment]
Int4OpaqueTensor.__setstate__ = set_state
Int4TransposedTensor.__getstate__ = get_state_of_view  # type: ignore[method-assign,assignment]
Int4TransposedTensor.__setstate__ = set_state_of_view
Int4OpaqueTensor.__deepcopy__ = deep_copy
Int4TransposedTensor.__deepcopy__ = deep_copy
torch.serialization.add_safe_globals([Int4OpaqueTensor, Int4TransposedTensor])

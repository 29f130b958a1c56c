"""How an `Int4OpaqueTensor` is pickled and unpickled: format version, checks, repacking on load.

A saved tensor records the layout of its bytes. Whoever loads it (`torch.load` with
``weights_only=True``, pickle, a whole module) gets it repacked for the process that loads.
"""

from __future__ import annotations

from typing import Any

import torch

from torchao_int4cpu.tensor import Int4OpaqueTensor, check_parts

#: Raised whenever a reader of the old format could not read the new one.
FORMAT_VERSION = 1

_PARTS = ("qdata", "scale_and_zero", "block_size", "qdata_layout", "act_pre_scale")


def get_state(t: Int4OpaqueTensor) -> dict[str, Any]:
    """``__getstate__``: the parts, whatever else Python has attached, and the format version."""
    return {**t.__dict__, "format_version": FORMAT_VERSION}


def set_state(t: Int4OpaqueTensor, state: dict[str, Any]) -> None:
    """``__setstate__``: check everything, as the file may be damaged or made to do harm; repack.

    ``t`` comes with the shape and dtype that the file gives; nothing else of it is used.

    Raises:
        TypeError, ValueError: the state is not one that `get_state` writes, it was written by a newer
            format, or its parts do not fit together.
    """
    if not isinstance(state, dict):
        raise TypeError(
            f"the state of a saved 4-bit weight is a {type(state).__name__}; it must be a dict, "
            "so the file is damaged or was not written by torchao_int4cpu"
        )
    state = dict(state)
    check_version(state.pop("format_version", None))
    missing = [name for name in _PARTS if name not in state]
    if missing:
        raise ValueError(
            f"a saved 4-bit weight has no {', '.join(missing)}; the file is damaged, save it again"
        )
    parts = {name: state[name] for name in _PARTS}
    check_parts(shape=tuple(t.shape), dtype=t.dtype, **parts)
    if not t.is_contiguous() or t.storage_offset() != 0:
        raise ValueError(
            f"a saved 4-bit weight has strides {t.stride()}; only contiguous ones are written, "
            "so the file is damaged, save it again"
        )
    attached = {name: value for name, value in state.items() if name not in _PARTS}
    for name in attached:
        # Attributes that Python code has attached are kept; one that hides a method would do harm.
        if name != "_is_param" and (not isinstance(name, str) or hasattr(type(t), name)):
            raise ValueError(
                f"a saved 4-bit weight has an attribute {name!r} that the class itself defines; "
                "no such thing is written, so the file is damaged"
            )
    t.__dict__.update(parts | attached)
    t.block_size = list(t.block_size)
    with torch._C.DisableTorchFunctionSubclass():
        t.requires_grad_(False)  # it stays frozen, whatever the file says
    t.repack_()


def check_version(version: object) -> None:
    """Check the format version that a file gives.

    Raises:
        ValueError: it is none, or newer than this package reads.
    """
    if not isinstance(version, int) or version < 1:
        raise ValueError(
            f"a saved 4-bit weight has format_version={version!r}; it must be an int from 1 to "
            f"{FORMAT_VERSION}, so the file is damaged or was not written by torchao_int4cpu"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"a saved 4-bit weight has format_version={version}; this torchao_int4cpu reads up to "
            f"{FORMAT_VERSION}, so install a newer one"
        )


Int4OpaqueTensor.__getstate__ = get_state  # type: ignore[method-assign,assignment]
Int4OpaqueTensor.__setstate__ = set_state
torch.serialization.add_safe_globals([Int4OpaqueTensor])

"""How an `Int4OpaqueTensor` is saved and loaded: format version, checks, repacking on load.

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
    version = state.pop("format_version", None)
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
    torch._utils._set_obj_state(t, state)
    t.block_size = list(t.block_size)
    t.repack_()


Int4OpaqueTensor.__getstate__ = get_state  # type: ignore[method-assign,assignment]
Int4OpaqueTensor.__setstate__ = set_state
torch.serialization.add_safe_globals([Int4OpaqueTensor])

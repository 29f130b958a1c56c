"""How a 4-bit weight lies in a safetensors file, in torchao's naming; registered with torchao.

A weight ``a.b.weight`` is stored as the plain tensors ``a.b._weight_qdata`` and
``a.b._weight_scale_and_zero`` (and perhaps ``a.b._weight_act_pre_scale``, ``a.b._weight_act_order``).
The file's metadata says under ``a.b.weight`` what they are, as JSON::

    {"_type": "torchao_int4cpu.Int4OpaqueTensor",
     "_data": {"format_version": 1, "block_size": [1, 64], "shape": [512, 1000],
               "qdata_layout": "avx512", "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
               "crc32": {"qdata": "0a1b2c3d", "scale_and_zero": "4e5f6071"}},
     "_tensor_data_names": ["qdata", "scale_and_zero"]}

A stack has a ``shape`` of three numbers and a ``block_size`` to match, and a transposed view says
``"transposed": true`` beside the ``shape`` of its weight; both since ``format_version`` 2. Scales and
zeros in float16 make it ``format_version`` 4, and an ``act_order`` 5; those of the others are bfloat16.

Source of the naming: torchao/prototype/safetensors of torchao 0.18, which Hugging Face transformers 5
and vLLM call. ``_type`` names this package, because torchao's prototype has a class of the same name,
and because whoever loads the file without this package is shown it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.checkpoint.pickles import (
    check_version,
    check_version_of_parts,
    version_of,
)
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.checks import shown
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

#: What stands in a file's metadata for our class.
TYPE_NAME = "torchao_int4cpu.Int4OpaqueTensor"

#: The dtypes of the format, by their names in a file's header.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Source(NamedTuple):
    """A tensor as the source has it."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> list[Source]:
    """The tensors of a safetensors file, in the order of their bytes, without reading them.

    Raises:
        MissingExtra: safetensors is not installed.
        ValueError: the file is damaged, or has a dtype that torch has not.
    """
    safetensors = import_extra("safetensors", "hf")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            parts = {key: opened.get_slice(key) for key in opened.offset_keys()}
            return [
                Source(key, file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                for key, part in parts.items()
            ]
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(
            f"{str(file)!r} cannot be read ({type(error).__name__}: {error}); "
            "the file is damaged or of another kind, so fetch it again"
        ) from None


#: Arguments of `Int4OpaqueTensor` that a file gives.
_ARGUMENTS = (
    *(part.name for part in Int4OpaqueTensor.PARTS if not part.optional),
    *Int4OpaqueTensor.tensor_attribute_names,
)
_OPTIONAL = tuple(part.name for part in Int4OpaqueTensor.PARTS if part.optional)


def part_key(name: str, part: str) -> str:
    """The key of one part: ``("a.b.weight", "qdata")`` gives ``"a.b._weight_qdata"``.

    Raises:
        ValueError: ``name`` has no dot, which torchao's naming needs.
    """
    module, dot, parameter = name.rpartition(".")
    if not dot:
        raise ValueError(
            f"{name!r} is the name of a 4-bit weight without a module; torchao's safetensors naming "
            "needs one, so save the state dict of a module that contains this one"
        )
    return f"{module}._{parameter}_{part}"


def metadata_of(t: Int4Weight) -> dict[str, Any]:
    """What the file's metadata says of one weight, see the module's docstring; no checksums on meta."""
    parts = t.parts()
    transposed = isinstance(t, Int4TransposedTensor)
    weight = weight_of(t)
    data = {
        "format_version": version_of(t),
        "block_size": list(weight.block_size),
        "shape": list(weight.shape),
        "qdata_layout": weight.qdata_layout,
        "dtype": {"_type": "torch.dtype", "_data": str(t.dtype).removeprefix("torch.")},
        "crc32": {name: crc32(part) for name, part in parts.items() if part.device.type == "cpu"},
    }
    if transposed:
        data["transposed"] = True
    return {"_type": TYPE_NAME, "_data": data, "_tensor_data_names": list(parts)}


def crc32(part: Tensor) -> str:
    """CRC-32 of a CPU tensor's bytes in order, 8 hexadecimal digits. It finds damage, not intent."""
    part = part.contiguous()  # act_pre_scale may have any strides
    buffer = (ctypes.c_char * part.nbytes).from_address(part.data_ptr()) if part.nbytes else b""
    return f"{zlib.crc32(buffer):08x}"


def from_safetensors(**data: Any) -> Int4Weight:
    """What torchao calls with the metadata and the tensors of one weight: check all of it, repack.

    Checksums are not compared: ``python -m torchao_int4cpu inspect --verify`` does.

    Raises:
        TypeError, ValueError: as `Int4OpaqueTensor`, or the format is newer, or something is missing.
    """
    version = check_version(data.pop("format_version", None))
    data.pop("crc32", None)
    transposed = data.pop("transposed", False)
    if not isinstance(transposed, bool):
        raise TypeError(
            f"a saved 4-bit weight has transposed={shown(transposed)}; it must be true or absent, "
            "so the file is damaged"
        )
    missing = [name for name in _ARGUMENTS if name not in data]
    unknown = [name for name in data if name not in (*_ARGUMENTS, *_OPTIONAL)]
    if missing or unknown:
        raise ValueError(
            f"a saved 4-bit weight has {', '.join(map(repr, data))}; it must have "
            f"{', '.join(map(repr, _ARGUMENTS))} and perhaps {', '.join(map(repr, _OPTIONAL))}, so the "
            "file is damaged"
        )
    weight = Int4OpaqueTensor(**data)
    check_version_of_parts(version, weight.scale_and_zero, weight.act_order)
    weight.repack_()
    return Int4TransposedTensor(weight) if transposed else weight


def _load(**data: Any) -> Int4Weight:
    """`from_safetensors`, and a line where loading costs memory that it need not."""
    loaded = from_safetensors(**data)
    layout = weight_of(loaded).qdata_layout
    if data["qdata_layout"] != layout:
        tell_of_repacking(data["qdata_layout"], layout)
    return loaded


@functools.cache  # once in a process
def tell_of_repacking(layout: str, native: str) -> None:
    """Say that the files of a model are for another CPU, and what to do about it."""
    logging.getLogger("torchao_int4cpu").warning(
        "4-bit weights are repacked from layout %s to %s as they are loaded, into memory of this "
        "process alone; `torchao-int4cpu convert DIR --layout native` rewrites the files once",
        layout,
        native,
    )


def _register() -> None:
    """Let torchao's ``flatten_tensor_state_dict`` and ``unflatten_tensor_state_dict`` know our class.

    They keep a list of names for both the class and ``_type``. What is written is asked of a JSON
    encoder, for which there is no registration: its method is wrapped, once.
    """
    try:
        from torchao.prototype.safetensors import safetensors_utils
    except ImportError:
        return  # it needs numpy; who saves or loads through it without numpy is told so by its import
    for name in (Int4OpaqueTensor.__name__, Int4TransposedTensor.__name__, TYPE_NAME):
        if name not in safetensors_utils.ALLOWED_TENSORS_SUBCLASSES:
            safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(name)
    safetensors_utils.ALLOWED_CLASSES[TYPE_NAME] = _load

    encoder = safetensors_utils.TensorSubclassAttributeJSONEncoder
    original = getattr(encoder.default, "torchao_default", encoder.default)

    def default(self: json.JSONEncoder, o: object) -> Any:
        if isinstance(o, Int4Weight):
            return metadata_of(o)
        if type(o).__name__ == Int4OpaqueTensor.__name__ and isinstance(o, torch.Tensor):
            raise ValueError(
                f"got a {type(o).__module__}.Int4OpaqueTensor of torchao's prototype, which cannot be "
                "saved as safetensors; convert it with torchao_int4cpu.Int4OpaqueTensor.from_upstream"
            )
        return original(self, o)

    default.torchao_default = original  # type: ignore[attr-defined]
    encoder.default = default


_register()

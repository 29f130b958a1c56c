"""Safetensors files whose header or metadata says what no file of ours says."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor
from torchao.prototype.safetensors import safetensors_utils

from tests.corruptions.case import EITHER, KEPT, REFUSED, Case, Family
from tests.test_old_files import GROUP_SIZE, K, N, value, weight
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.checkpoint.safetensors import TYPE_NAME, metadata_of, part_key

PARTS = ("qdata", "scale_and_zero", "act_pre_scale")

#: As a header names them, and their bytes.
_NAMES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
_WIDTHS = {
    1: ("U8", "I8", "BOOL", "F8_E4M3"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64"),
}

Header = dict[str, Any]


def written(
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    change: Callable[[Header], None] = lambda header: None,
) -> bytes:
    """A file of these tensors and metadata, with a header that ``change`` has changed."""
    header: Header = {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        place = {"shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        header[name] = {"dtype": _NAMES[tensor.dtype]} | place
        data += raw
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def good_tensors(t: Int4OpaqueTensor | None = None, module: str = "layer") -> dict[str, Tensor]:
    parts = (weight() if t is None else t).parts()
    return {part_key(f"{module}.weight", name): part for name, part in parts.items()}


def listed(entry: object, names: object = ("layer.weight",)) -> dict[str, Any]:
    """Metadata of a file with one weight."""
    return {"layer.weight": json.dumps(entry), "tensor_names": json.dumps(names)}


def described(what: str, expected: str, **changes: Any) -> Case:
    """Good tensors with another description of the weight. None leaves a field out."""
    entry = metadata_of(weight())
    entry["_data"] = entry["_data"] | changes
    return Case(what, written(good_tensors(), listed(entry)), expected)


def labelled(what: str, expected: str, **changes: Any) -> Case:
    """Good tensors with another entry for the weight."""
    return Case(what, written(good_tensors(), listed(metadata_of(weight()) | changes)), expected)


def typed(name: object, data: object) -> dict[str, object]:
    """What torchao makes an object of."""
    return {"_type": name, "_data": data}


def odd_json() -> list[Any]:
    """Something of every JSON type, sizes at which one may stumble, and objects that torchao makes."""
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    dtypes: list[object] = ["nn", "Tensor", "float64", "uint8", "quint8", "strided", "_C", "__name__"]
    dtypes += ["no_such_name", "", 7, None, []]
    return [
        *(None, True, False, 0, -1, 1, 2, 2**31, 2**62, 2**64, -(10**300), 1.0, 0.5, 1e308),
        *(float("nan"), float("inf"), "", "1", "bfloat16", "torch.bfloat16", "x" * 3000, "\0", "é"),
        *([], [1], [1, 1], [True, 32], [1.0, 32], [1, 32.0], [1, 33], [1, "32"], ["1", 32]),
        *([1, None], [1, [32]], [[1, 32]], [1, 32, 1], deep, {}, {"a": 1}, {"_type": 1}),
        *([N, -K], [-N, K], [0, K], [N, 0], [2**62, 2**62], [N, 2**62], [float(N), K], [N, True]),
        *([K, N], [N * K], [N, K, 1], [N, K + 30]),
        *(typed("torch.dtype", name) for name in dtypes),
        *(typed("PerRow", {}), typed("PerTensor", 1), typed("x", {}), typed([], {}), typed(7, 7)),
        *(typed("MappingType", "ASYMMETRIC"), typed("MappingType", "__class__")),
        *(typed(TYPE_NAME, {}), typed(TYPE_NAME, 1)),
        *([typed("torch.dtype", "float16"), 32], [1, typed("torch.dtype", "int8")]),
    ]


def metadata() -> Iterator[Case]:
    """Each field of a weight's entry replaced by each JSON type, left out, or joined by others."""
    entry = metadata_of(weight())
    data: dict[str, Any] = entry["_data"]
    for name, (i, odd) in product(data, enumerate(odd_json())):
        same = name == "format_version" and type(odd) is int and odd in (1, 2, 3)
        expected = KEPT if same or name == "crc32" else REFUSED  # which is not compared
        if name in ("crc32", "format_version") and isinstance(odd, dict) and "_data" in odd:
            expected = EITHER  # torchao makes an object of it before we are asked: 1, or an error
        yield described(f"{name} is odd value {i}", expected, **{name: odd})
    for name in data:
        rest = {key: part for key, part in data.items() if key != name}
        yield labelled(f"without {name}", KEPT if name == "crc32" else REFUSED, _data=rest)
    for dtype in ("bfloat16", "float32"):
        yield described(dtype, KEPT, dtype=typed("torch.dtype", dtype))
    for layout in ("avx512", "avx2", "default"):
        yield described(layout, KEPT, qdata_layout=layout)
    for name in ("self", "cls", "device", "requires_grad", "__class__", "", "qzeros"):
        yield described(f"also {name!r}", REFUSED, **{name: None})
    for name in PARTS:
        yield described(f"{name} in the metadata, too", KEPT, **{name: [1]})  # the tensors prevail


def entries() -> Iterator[Case]:
    """Each entry as a whole: of every JSON type, not JSON at all, or missing."""
    entry, tensors = metadata_of(weight()), good_tensors()
    for i, odd in enumerate(odd_json()):
        yield Case(f"entry is odd value {i}", written(tensors, listed(odd)), REFUSED)
        yield Case(f"tensor_names is odd value {i}", written(tensors, listed(entry, odd)), REFUSED)
        for name in entry:
            yield labelled(f"{name} is odd value {i}", REFUSED, **{name: odd})
    for name in entry:
        rest = {key: part for key, part in entry.items() if key != name}
        yield Case(f"without {name}", written(tensors, listed(rest)), REFUSED)
    texts = ("", "{", "null", "[]", '{"_type": 1', "NaN", '"' * 7, "{}" * 9, "[" * 5000, "9" * 5000)
    for name, text in product(listed(entry), texts):
        changed = listed(entry) | {name: text}
        yield Case(f"{name} is {text[:9]!r}", written(tensors, changed), REFUSED)


def relabelled() -> Iterator[Case]:
    """``_type`` names another class: torchao's, the prototype's of the same name, or none."""
    names = {*safetensors_utils.ALLOWED_CLASSES, *safetensors_utils.ALLOWED_TENSORS_SUBCLASSES}
    names |= {"Tensor", "torch.Tensor", "Int4OpaqueTensor", "torch.dtype", "Parameter", "list"}
    names |= {TYPE_NAME.upper(), TYPE_NAME + " ", "torchao_int4cpu", "os.system", "builtins.eval"}
    for name in sorted(names - {TYPE_NAME}):
        yield labelled(name, REFUSED, _type=name)


def names() -> Iterator[Case]:
    """Names of tensors and of parts: missing, wrong, claimed twice."""
    entry, tensors = metadata_of(weight()), good_tensors()
    said: list[Any] = [["qdata"], ["qdata"] * 3, [*PARTS, "qdata"], [*PARTS[:2], "scale"]]
    said += [["a", "b", "c"], "abc", {"qdata": 1, "scale_and_zero": 2, "x": 3}, [1, 2, 3]]
    for odd in said:
        yield labelled(f"_tensor_data_names {odd}", REFUSED, _tensor_data_names=odd)
    yield labelled("parts in another order", KEPT, _tensor_data_names=PARTS[::-1])
    for odd in ([], ["layer"], ["layer.bias"], [""], ["."], ["layer."], [".weight"]):
        yield Case(f"tensor_names {odd}", written(tensors, listed(entry, odd)), REFUSED)
    yield Case("a name twice", written(tensors, listed(entry, ["layer.weight"] * 2)), REFUSED)
    for count in (1, 2):
        for dropped in combinations(PARTS, count):
            kept = [name for name in PARTS if name not in dropped]
            rest = {part_key("layer.weight", name): tensors[f"layer._weight_{name}"] for name in kept}
            yield Case(f"without {dropped}", written(rest, listed(entry)), REFUSED)
            fewer = listed(entry | {"_tensor_data_names": kept})
            expected = KEPT if dropped == ("act_pre_scale",) else REFUSED
            yield Case(f"without {dropped}, as is said", written(rest, fewer), expected)
    new_names = ("x", "layer.weight", "layer._weight_", "layer._bias_qdata", "layer._weight_QDATA")
    for name, new in product(tensors, new_names):
        renamed = {new if key == name else key: tensor for key, tensor in tensors.items()}
        yield Case(f"{name} is called {new}", written(renamed, listed(entry)), REFUSED)


def strangers() -> Iterator[Case]:
    """A tensor or a text in the place of an attribute, which torchao takes for one."""
    entry, tensors = metadata_of(weight()), good_tensors()
    for field in (*entry["_data"], "x", ""):
        claimed = listed(entry | {"_tensor_data_names": [*PARTS, field]})
        expected = KEPT if field == "crc32" else REFUSED
        more = tensors | {f"layer._weight_{field}": torch.tensor([1.0, 32.0])}
        yield Case(f"a tensor for {field}", written(more, claimed), expected)
        for text in ("[64, 40]", "avx2", "1"):
            # Taken out again as if it were a tensor, which it is not.
            mixed = claimed | {f"layer._weight_{field}": text}
            yield Case(f"the text {text} for {field}", written(tensors, mixed), REFUSED)


def exchanged() -> Iterator[Case]:
    """Parts of one weight exchanged, or with those of another weight; other act_pre_scales."""
    entry, tensors = metadata_of(weight()), good_tensors()
    for a, b in combinations(tensors, 2):
        other = tensors | {a: tensors[b], b: tensors[a]}
        yield Case(f"{a} and {b}", written(other, listed(entry)), REFUSED)
    # In one group of 64, which pads K to 64 as groups of 32 do.
    old = value()
    wide = GroupwiseInt4(old.codes, old.scale[:, :1], old.zero[:, :1], 2 * GROUP_SIZE)
    second = Int4OpaqueTensor.from_groupwise(wide, act_pre_scale=torch.ones(K))
    both = {"layer.weight": json.dumps(entry), "other.weight": json.dumps(metadata_of(second))}
    said = both | {"tensor_names": json.dumps(list(both))}
    all_tensors = tensors | good_tensors(second, "other")
    yield Case("nothing", written(all_tensors, said), KEPT)
    for part, expected in (("qdata", KEPT), ("scale_and_zero", REFUSED)):  # KEPT: other codes, no more
        a, b = f"layer._weight_{part}", f"other._weight_{part}"
        other = all_tensors | {a: all_tensors[b], b: all_tensors[a]}
        yield Case(f"{part} of two weights", written(other, said), expected)
    crossed = {"layer.weight": both["other.weight"], "other.weight": both["layer.weight"]}
    yield Case("entries of two weights", written(all_tensors, said | crossed), REFUSED)
    wrong: list[tuple[int, ...]] = [(0,), (2,), (K - 1,), (K + 1,), (N,), (4096,), (K, 1), (1, K)]
    right: list[tuple[int, ...]] = [(K,), (1,), (1, 1), ()]
    for shape, expected in (*((s, REFUSED) for s in wrong), *((s, KEPT) for s in right)):
        other = tensors | {"layer._weight_act_pre_scale": torch.ones(shape)}
        yield Case(f"act_pre_scale {shape}", written(other, listed(entry)), expected)
    other = tensors | {"layer._weight_act_pre_scale": torch.ones(K).to(torch.uint8)}
    yield Case("act_pre_scale of uint8", written(other, listed(entry)), REFUSED)


def headers() -> Iterator[Case]:
    """What the header says of the bytes: dtype, shape and offsets."""
    tensors, said = good_tensors(), listed(metadata_of(weight()))

    def case(name: str, **changes: Any) -> Case:
        data = written(tensors, said, lambda header: header[name].update(changes))
        return Case(f"{name} {changes}"[:90], data, REFUSED)

    for name, tensor in tensors.items():
        for odd, field in product(odd_json(), ("dtype", "shape", "data_offsets")):
            yield case(name, **{field: odd})
        for width, dtypes in _WIDTHS.items():
            row = [max(1, tensor.shape[-1] * tensor.element_size() // width)]
            for dtype in dtypes:
                if dtype != _NAMES[tensor.dtype]:
                    yield case(name, dtype=dtype, shape=[*tensor.shape[:-1], *row])
        for shape in _other_shapes(list(tensor.shape)):
            yield case(name, shape=shape)
        for offsets in ([0, 0], [0, 2**40], [2**63, 2**63 + 1], [8, 4], [-1, 4], [1, 2], [100, 100]):
            yield case(name, data_offsets=offsets)


def _other_shapes(shape: list[int]) -> Iterator[Sequence[int]]:
    yield from ([1, *shape], [*shape, 1], [2**40, 2**40], [0], [])
    if len(shape) > 1:
        yield from (shape[1:] + shape[:1], [torch.Size(shape).numel()])


def frames() -> Iterator[Case]:
    """The length of the header, and bytes around it."""
    good = written(good_tensors(), listed(metadata_of(weight())))
    (length,) = struct.unpack("<Q", good[:8])
    text, data = good[8 : 8 + length].rstrip(), good[8 + length :]
    near = (length + step for step in (-8, -1, 1, 8))
    for new in (0, 1, 7, *near, 2**31, 2**40, 2**63, 2**64 - 1):
        yield Case(f"header of {new} bytes", struct.pack("<Q", new) + good[8:], REFUSED)
    for spaces in range(1, 8):  # the parts at every address, odd ones too
        padded = text + b" " * spaces
        yield Case(f"{spaces} spaces", struct.pack("<Q", len(padded)) + padded + data, KEPT)
    for tail in (b"\0", b"x" * 64, good):
        yield Case(f"{len(tail)} bytes too many", good + tail, REFUSED)


SAFETENSORS: dict[str, Family] = {
    "safetensors-metadata": metadata,
    "safetensors-entries": entries,
    "safetensors-relabelled": relabelled,
    "safetensors-names": names,
    "safetensors-strangers": strangers,
    "safetensors-exchanged": exchanged,
    "safetensors-headers": headers,
    "safetensors-frames": frames,
}

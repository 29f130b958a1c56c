"""Files of both formats with stacks and transposed views that say what no file of ours says."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.corruptions.case import EITHER, KEPT, REFUSED, Case, Family
from tests.corruptions.pickles import Call, bare, forged, odd_values, pt, wrapper
from tests.corruptions.safetensors import good_tensors, odd_json, typed, written
from tests.test_old_files import GROUP_SIZE, K, N, stack, turned, weight
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.checkpoint.pickles import get_state, get_state_of_view
from torchao_int4cpu.checkpoint.safetensors import TYPE_NAME, metadata_of
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

#: Matrices in the stack.
E = 2

PARTS = ("qdata", "scale_and_zero")


# --- torch.save: stacks --------------------------------------------------------------------------


def stacked(what: str, expected: str, shape: Any = (E, N, K), **changes: Any) -> Case:
    """A stack whose state has other entries, or which says another shape of itself."""
    state = get_state(stack()) | changes
    return Case(what, pt(forged(state, wrapper(shape=shape))), expected)


def stacks() -> Iterator[Case]:
    """Shapes, parts and block sizes of a stack."""
    yield stacked("good", KEPT)
    for e in (0, 1, -1, 3, 2**20, 2**31, 2**40, 2**62, 2**63 - 1):
        yield stacked(f"of {e} matrices", REFUSED, shape=(e, N, K))
    # 63 rows need the bytes of 64: N is not stored twice.
    yield stacked("of 63 rows", KEPT, shape=(E, N - 1, K))
    for shape in (
        (N, K),
        (E * N, K),
        (E, K),
        (1, E, N, K),
        (E, N, 1, K),
        (N, E, K),
        (E, N, K, 1),
        (E,),
    ):
        yield stacked(f"of shape {shape}", REFUSED, shape=shape)
    for n, k in product((1, N + 1, 2 * N, 2**40), (1, K + 30, 2**40)):
        yield stacked(f"of {n} rows and {k} columns", REFUSED, shape=(E, n, k))
    for block_size in ([1, 32], [32], [1, 1, 1, 32], [1, 1, 64], [E, 1, 32], [1, 32, 1], [True, 1, 32]):
        yield stacked(f"block size {block_size}", REFUSED, block_size=block_size)
    for i, odd in enumerate(odd_values()):
        yield stacked(f"block size is odd value {i}", REFUSED, block_size=odd)
    good = get_state(stack())
    for name in PARTS:
        for what, odd, expected in _other_parts(good[name]):
            yield stacked(f"{name} {what}", expected, **{name: odd})
    yield from _giants(good)
    flat = get_state(weight())
    yield stacked("the parts of a matrix", REFUSED, **{name: flat[name] for name in PARTS})
    yield Case(
        "a matrix with the parts of a stack", pt(forged(flat | {n: good[n] for n in PARTS})), REFUSED
    )


def _other_parts(part: Tensor) -> Iterator[tuple[str, object, str]]:
    """(words, what stands in the place of the part, what must come of it)."""
    yield "of one matrix", part[:1].clone(), REFUSED
    yield "of a matrix", part[0].clone(), REFUSED
    yield "of three matrices", torch.cat([part, part[:1]]), REFUSED
    yield "with the matrices last", part.movedim(0, -1).contiguous(), REFUSED
    yield "as one matrix", part.flatten(0, 1), REFUSED
    yield "whose matrices are one", part[:1].expand(part.shape), REFUSED
    yield "with gaps between the matrices", torch.cat([part, part], 1)[:, : part.shape[1]], KEPT
    yield "the last matrices of more", torch.cat([part, part])[E:], KEPT
    yield "transposed", part.mT.contiguous().mT, REFUSED
    yield "bare", bare(part.dtype, shape=tuple(part.shape)), REFUSED
    yield "a stack", stack(), REFUSED
    yield "a view", turned(), REFUSED
    yield "on meta", part.to("meta"), REFUSED
    size, memory = part[0].numel(), torch.ones(8 * part.numel()).to(part.dtype)
    for step in (1, 2, 16, size - 2, size - 1, size, size + 1, size + 2):
        own = KEPT if step >= size and (part.dtype == torch.uint8 or step % 2 == 0) else None
        strided = memory.as_strided(part.shape, (step, *part.stride()[1:]))
        # Scales at an odd address are read as they lie, or not at all.
        yield f"whose matrices are {step} apart", strided, own or (REFUSED if step < size else EITHER)
    if part.dtype == torch.uint8:
        return
    for step in (0, 1, 2, N, 2 * N - 2, 2 * N - 1, 2 * N, 2 * N + 1, 2 * N + 2, 4 * N):
        strides = (4 * step + 2 * N, step, 2, 1)
        expected = KEPT if step >= 2 * N and step % 2 == 0 else REFUSED
        yield f"whose groups are {step} apart", memory.as_strided(part.shape, strides), expected
    for strides in (
        (4 * N, 2 * N, 1, 2),
        (4 * N, 2 * N, 4, 1),
        (4 * N, 2 * N, 2, 0),
        (2 * N, 4 * N, 2, 1),
    ):
        yield f"with strides {strides}", memory.as_strided(part.shape, strides), REFUSED


def _giants(good: dict[str, Any]) -> Iterator[Case]:
    """Few bytes that claim to be any number of matrices, groups or rows."""
    for e in (3, 2**10, 2**20, 2**40):
        parts: dict[str, Any] = {}
        for name in PARTS:
            parts[name] = good[name][:1].expand(e, *good[name].shape[1:])
        yield stacked(f"{e} times one matrix", REFUSED, shape=(e, N, K), **parts)
        apart: dict[str, Any] = {name: _steps(good[name], e) for name in PARTS}
        yield stacked(f"{e} matrices two numbers apart", REFUSED, shape=(e, N, K), **apart)


def _steps(part: Tensor, count: int) -> Call | Tensor:
    count = min(count, 2**10)  # torch has the memory of a strided tensor checked
    memory = torch.ones(part[0].numel() + 2 * count).to(part.dtype)
    return memory.as_strided((count, *part.shape[1:]), (2, *part.stride()[1:]))


# --- torch.save: transposed views ----------------------------------------------------------------


def view_wrapper(dtype: object = torch.float16, **changes: Any) -> tuple[Any, ...]:
    """As `wrapper`, of the transposed view."""
    arguments: dict[str, Any] = {
        "shape": (E, K, N),
        "stride": (N * K, 1, K),
        "storage_offset": 0,
        "layout": torch.strided,
        "device": "cpu",
        "requires_grad": False,
    }
    return (Int4TransposedTensor, dtype, *(arguments | changes).values())


def bare_view(**changes: Any) -> Call:
    """A view to which no state was ever given."""
    return Call(torch._utils._rebuild_wrapper_subclass, *view_wrapper(**changes))


def forged_view(state: object, arguments: tuple[Any, ...] | None = None) -> Call:
    make = torch._utils._rebuild_wrapper_subclass
    from_type = torch._tensor._rebuild_from_type_v2
    return Call(from_type, make, Int4TransposedTensor, arguments or view_wrapper(), state)


def seen(what: str, expected: str, *arguments: Any, **changes: Any) -> Case:
    """A view with a good state in another wrapper."""
    state = get_state_of_view(turned())
    return Case(what, pt(forged_view(state, view_wrapper(*arguments, **changes))), expected)


def of(what: str, expected: str, **changes: Any) -> Case:
    """A view whose state has other entries."""
    return Case(what, pt(forged_view(get_state_of_view(turned()) | changes)), expected)


def views() -> Iterator[Case]:
    """What a file says of a view, and of the weight behind it."""
    yield seen("good", KEPT)
    yield seen("requires_grad", KEPT, requires_grad=True)
    yield seen("device cpu:3", KEPT, device="cpu:3")
    shapes = ((E, N, K), (K, N), (1, K, N), (E, K, N - 1), (E, K + 1, N), (2**40, K, N), (0, K, N), ())
    for shape in shapes:
        yield seen(f"shape {shape}", REFUSED, shape=shape)
    for stride in ((N * K, N, 1), (1, 1, 1), (0, 0, 0), (N * K, 1, K + 1), (2**40, 1, K), (1, K), ()):
        yield seen(f"stride {stride}", REFUSED, stride=stride)
    for offset in (1, -1, N, 2**62):
        yield seen(f"offset {offset}", REFUSED, storage_offset=offset)
    for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.float64):
        yield seen(str(dtype), REFUSED, dtype)
    for layout in (torch.sparse_coo, torch.sparse_csr):
        yield seen(str(layout), REFUSED, layout=layout)
    for device in ("meta", "cuda", "nowhere"):
        yield seen(f"device {device}", REFUSED, device=device)
    for i, odd in enumerate(odd_values()):
        yield of(f"weight is odd value {i}", REFUSED, weight=odd)
        good = type(odd) is int and odd in (1, 2, 3)
        yield of(f"format_version is odd value {i}", KEPT if good else REFUSED, format_version=odd)
        yield Case(f"state is odd value {i}", pt(forged_view(odd)), REFUSED)
    for words, other in _other_weights():
        yield of(f"of {words}", REFUSED, weight=other)
    for name in (
        "qdata",
        "scale_and_zero",
        "act_pre_scale",
        "untransposed",
        "dequantize",
        "shape",
        "__x__",
    ):
        yield of(f"attribute {name}", REFUSED, **{name: 1})
    for name in ("note", "weight2", "_is_hf_initialized"):
        yield of(f"attribute {name}", KEPT, **{name: [1]})
    for odd_name in (1, None, b"x"):
        state: dict[Any, Any] = {**get_state_of_view(turned()), odd_name: 1}
        yield Case(f"attribute {odd_name!r}", pt(forged_view(state)), REFUSED)
    for name in get_state_of_view(turned()):
        rest = {k: v for k, v in get_state_of_view(turned()).items() if k != name}
        yield Case(f"without {name}", pt(forged_view(rest)), REFUSED)
    yield Case("an OrderedDict", pt(forged_view(OrderedDict(get_state_of_view(turned())))), KEPT)
    loop: list[Any] = []
    loop.append(loop)
    yield of("with a cycle beside it", KEPT, note=loop)
    nested = forged(get_state(stack()) | {"note": turned()}, wrapper(shape=(E, N, K)))
    yield of("of a weight that has a view", KEPT, weight=nested)
    damaged = forged(get_state(stack()) | {"qdata": torch.ones(3)}, wrapper(shape=(E, N, K)))
    yield of("of a damaged weight", REFUSED, weight=damaged)
    yield Case("no state", pt(bare_view()), REFUSED)
    yield Case("no state, a giant", pt(bare_view(shape=(2**20, 2**20, 2**10))), REFUSED)
    yield Case("constructor", pt(Call(Int4TransposedTensor, stack())), KEPT)
    for words, other in _other_weights():
        if isinstance(other, Int4OpaqueTensor):
            continue  # the constructor makes a view of any
        yield Case(f"constructor, of {words}", pt(Call(Int4TransposedTensor, other)), REFUSED)


def _other_weights() -> Iterator[tuple[str, object]]:
    yield "a matrix", weight()
    yield "another dtype", stack().bfloat16()
    yield "meta", stack().to("meta")
    yield "one matrix", stack()[:1].clone()
    yield "fewer columns", stack()[..., :GROUP_SIZE].clone()
    yield "a view", turned()
    yield "a plain tensor", torch.ones(E, N, K).half()
    yield "a bare weight", bare(shape=(E, N, K))
    yield "a bare view", bare_view()


def late_views() -> Iterator[Case]:
    """What torch's ``_rebuild_parameter_with_state`` assigns to a good view, which asks nobody."""
    make = torch._utils._rebuild_parameter_with_state
    hooks: OrderedDict[Any, Any] = OrderedDict()

    def case(what: str, expected: str, state: dict[str, Any]) -> Case:
        return Case(what, pt(Call(make, turned(), False, hooks, state)), expected)

    for words, other in _other_weights():
        # Of another dtype: whole, but for what the view says its dtype is. Products ask x for that.
        expected = EITHER if words == "another dtype" else REFUSED
        yield case(f"weight becomes one of {words}", expected, {"weight": other})
    for i, odd in enumerate(odd_values()):
        yield case(f"weight becomes odd value {i}", REFUSED, {"weight": odd})
    yield case("weight becomes another", KEPT, {"weight": stack()})
    for name in ("qdata", "scale_and_zero", "act_pre_scale", "shape"):
        yield case(f"{name} is set", REFUSED, {name: torch.ones(3)})
    for namespace in ({}, {"weight": weight()}, {"qdata": 1}, {"weight": 7}):
        yield case(f"__dict__ becomes {list(namespace)}", REFUSED, {"__dict__": namespace})


# --- safetensors ---------------------------------------------------------------------------------


def entry_of(t: Any, **changes: Any) -> dict[str, Any]:
    entry = metadata_of(t)
    return entry | {"_data": {k: v for k, v in (entry["_data"] | changes).items() if v is not None}}


def file_of(
    t: Any, entry: dict[str, Any], change: Callable[[dict[str, Any]], None] = lambda header: None
) -> bytes:
    said = {"layer.weight": json.dumps(entry), "tensor_names": json.dumps(["layer.weight"])}
    return written(good_tensors(t), said, change)


def safetensors_stacks() -> Iterator[Case]:
    """What the metadata and the header say of a stack, and of a transposed view."""
    for name, t in (("stack", stack()), ("view", turned()), ("flat view", weight().t())):
        yield Case(f"a good {name}", file_of(t, entry_of(t)), KEPT)
        for i, odd in enumerate(odd_json()):
            expected = KEPT if odd is None or type(odd) is bool else REFUSED
            if isinstance(odd, dict) and "_data" in odd:
                expected = EITHER  # torchao makes an object of it before we are asked
            what = f"{name}, transposed is odd value {i}"
            yield Case(what, file_of(t, entry_of(t, transposed=odd)), expected)
    t = stack()
    shapes: list[list[Any]] = [[N, K], [E * N, K], [1, N, K], [3, N, K], [2**40, N, K], [0, N, K]]
    shapes += [[E, K, N], [-E, N, K], [E, N, K, 1], [True, N, K], [float(E), N, K], [str(E), N, K]]
    for shape in [*shapes, [[E], N, K]]:
        yield Case(f"shape {shape}", file_of(t, entry_of(t, shape=shape)), REFUSED)
    yield Case("63 rows", file_of(t, entry_of(t, shape=[E, N - 1, K])), KEPT)
    for block_size in ([1, 32], [1, 1, 64], [1, 1, 1, 32], [E, 1, 32], [1, 1, True]):
        yield Case(f"block size {block_size}", file_of(t, entry_of(t, block_size=block_size)), REFUSED)
    for layout in ("avx512", "avx2", "default"):
        for either in (t, turned()):
            yield Case(f"{layout}", file_of(either, entry_of(either, qdata_layout=layout)), KEPT)
    for version, expected in ((1, KEPT), (2, KEPT), (3, KEPT), (4, REFUSED), (0, REFUSED)):
        yield Case(f"version {version}", file_of(t, entry_of(t, format_version=version)), expected)
    for part in PARTS:
        key = f"layer._weight_{part}"
        first, second, *others = good_tensors(t)[key].shape
        for new in ([first * second, *others], [1, first, second, *others], [4, second // 2, *others]):

            def change(header: dict[str, Any], key: str = key, new: list[int] = new) -> None:
                header[key]["shape"] = new

            yield Case(f"{part} of shape {new}", file_of(t, entry_of(t), change), REFUSED)
    one = stack()[:1].clone()
    for name in PARTS:  # one part of two matrices, one of one
        tensors = good_tensors(t) | {
            f"layer._weight_{name}": good_tensors(one)[f"layer._weight_{name}"]
        }
        said = {"layer.weight": json.dumps(entry_of(t)), "tensor_names": json.dumps(["layer.weight"])}
        yield Case(f"{name} of one matrix", written(tensors, said), REFUSED)
    inner = typed(TYPE_NAME, entry_of(t)["_data"])
    yield Case("a weight in a weight", file_of(t, entry_of(t, shape=inner)), REFUSED)


EXPERTS: dict[str, Family] = {
    "pt-stacks": stacks,
    "pt-views": views,
    "pt-late-views": late_views,
    "safetensors-stacks": safetensors_stacks,
}

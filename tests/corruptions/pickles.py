"""Files of `torch.save` that say what no file of ours says, by calls that torch lets a file make."""

from __future__ import annotations

import io
import random
from collections import Counter, OrderedDict
from collections.abc import Iterator
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from tests.corruptions.case import EITHER, KEPT, REFUSED, Case, Family
from tests.test_old_files import GROUP_SIZE, K, N, value, weight
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.checkpoint.pickles import get_state

PARTS = ("qdata", "scale_and_zero", "act_pre_scale")

#: Shapes around the sizes at which padding, groups and blocks begin.
SIZES = (1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 128, 255, 256, 257)


class Call:
    """Pickles as a call of ``function``, and perhaps a state for what it returns."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def wrapper(dtype: object = torch.float16, **changes: Any) -> tuple[Any, ...]:
    """Arguments of torch's ``_rebuild_wrapper_subclass``: what a file says of the weight itself."""
    arguments: dict[str, Any] = {
        "shape": (N, K),
        "stride": _contiguous(changes.get("shape", (N, K))),
        "storage_offset": 0,
        "layout": torch.strided,
        "device": "cpu",
        "requires_grad": False,
    }
    return (Int4OpaqueTensor, dtype, *(arguments | changes).values())


def _contiguous(shape: object) -> tuple[int, ...]:
    if type(shape) is not tuple or not all(type(size) is int for size in shape):
        return (K, 1)
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(min(step, 2**62))
        step *= max(1, size)
    return tuple(reversed(strides))


def bare(dtype: object = torch.float16, **changes: Any) -> Call:
    """A wrapper to which no state was ever given: it claims a shape and has no memory."""
    return Call(torch._utils._rebuild_wrapper_subclass, *wrapper(dtype, **changes))


def forged(state: object, arguments: tuple[Any, ...] | None = None) -> Call:
    """An `Int4OpaqueTensor` as `torch.save` writes it, with any state and any wrapper."""
    make = torch._utils._rebuild_wrapper_subclass
    from_type = torch._tensor._rebuild_from_type_v2
    return Call(from_type, make, Int4OpaqueTensor, arguments or wrapper(), state)


def pt(thing: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"layer.weight": thing}, buffer, **options)
    return buffer.getvalue()


def stated(what: str, expected: str, **changes: Any) -> Case:
    """A weight whose state has other entries."""
    return Case(what, pt(forged(get_state(weight()) | changes)), expected)


def wrapped(what: str, expected: str, *arguments: Any, **changes: Any) -> Case:
    """A weight with a good state in another wrapper."""
    return Case(what, pt(forged(get_state(weight()), wrapper(*arguments, **changes))), expected)


def laughs(depth: int) -> list[Any]:
    """A list whose `repr` has 10^depth characters, in a file of a few bytes."""
    laugh: list[Any] = []
    for _ in range(depth):
        laugh = [laugh] * 10
    return laugh


def odd_values() -> list[object]:
    """Something of every type that torch lets a file hold."""
    loop: list[Any] = []
    loop.append(loop)
    return [
        *(None, True, False, 0, -1, 1, 2, 32, 2**31, 2**62, 2**63, -(2**100), 10**500),
        *(1.0, -0.5, float("nan"), float("inf"), 1e308, 1 + 2j),
        *("", "x", "1", "avx512\0", "AVX512", "é\ud800", "y" * 5000),
        *(b"", b"\1\x20", bytearray(b"\1\x20")),
        *((), (1,), (1, 32, 1), [], [[]], [[1, 32]], [1, [32]], {}, {1: 32}, {"a": []}, {1, 32}),
        *(OrderedDict(a=1), Counter("ab"), torch.Size([1, 32, 1]), torch.float16, torch.device("cpu")),
        *(torch.tensor(1), torch.tensor([1, 32]), torch.tensor([]), nn.Parameter(torch.ones(2))),
        *(loop, laughs(40), tuple(laughs(5)), OrderedDict(a=laughs(40)), [1, laughs(40)]),
    ]


def attributes() -> Iterator[Case]:
    """Each attribute replaced by each type, by wrong values of the right one, and left out."""
    for name in ("block_size", "qdata_layout", "format_version", "act_pre_scale"):
        for i, odd in enumerate(odd_values()):
            good = (name == "format_version" and type(odd) is int and odd in (1, 2, 3)) or (
                name == "act_pre_scale" and odd is None
            )
            yield stated(f"{name} is odd value {i}", KEPT if good else REFUSED, **{name: odd})
    for one in (0, 1, 2, True, 1.0, "1", -1):
        for size in (-32, 0, 1, 31, 33, 64, 128, 256, 2**40, True, 32.0, "32", None):
            yield stated(f"block_size {[one, size]}", REFUSED, block_size=[one, size])
    for block_size in ([32], [32, 1], [1, 1, 32], [1, 32, 32]):
        yield stated(f"block_size {block_size}", REFUSED, block_size=block_size)
    yield stated("block_size (1, 32)", KEPT, block_size=(1, GROUP_SIZE))
    for layout in ("avx1024", "avx", "default ", "Default", "avx2\n", "neon", "amx"):
        yield stated(f"layout {layout!r}", REFUSED, qdata_layout=layout)
    for version in (0, -1, 4, 5, 2**40):
        yield stated(f"version {version}", REFUSED, format_version=version)
    good_state = get_state(weight())
    for count in range(1, len(good_state) + 1):
        for dropped in combinations(good_state, count):
            rest = {name: part for name, part in good_state.items() if name not in dropped}
            yield Case(f"without {dropped}", pt(forged(rest)), REFUSED)


def attached() -> Iterator[Case]:
    """Attributes beside the parts: those of Python code are kept, those that would do harm are not."""
    good = get_state(weight())
    protocols = {"__array_interface__", "__array_struct__", "__x__"}
    for name in sorted({*dir(Int4OpaqueTensor), *protocols} - set(good) - {"_is_param"}):
        yield stated(f"attribute {name}", REFUSED, **{name: 1})
    for key in (1, None, b"x", 1.5, (1, 2), True, (), 2**70):
        state: dict[Any, Any] = {**good, key: 1}
        yield Case(f"attribute {key!r}", pt(forged(state)), REFUSED)
    for name in ("note", "weight_loader", "_is_hf_initialized", "qdata2", "ünï", "a b", "Qdata"):
        yield stated(f"attribute {name}", KEPT, **{name: [1]})
    for i, odd in enumerate(odd_values()):
        expected = KEPT if isinstance(odd, bool) else REFUSED
        yield stated(f"_is_param is odd value {i}", expected, _is_param=odd)


def replacements(part: Tensor) -> Iterator[tuple[str, object, str]]:
    """(words, what stands in the place of the part, what must come of it)."""
    shape, dtype, is_scale = tuple(part.shape), part.dtype, part.ndim == 1
    accepted = {torch.float32, torch.float16, torch.bfloat16} if is_scale else {dtype}
    for other in (
        *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.uint16),
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn),
        *(torch.complex64, torch.complex128),
    ):
        yield f"of {other}", torch.ones(shape).to(other), KEPT if other in accepted else REFUSED
    for new in _other_shapes(shape):
        yield f"of shape {new}", torch.ones(new).to(dtype), REFUSED
    # Torch multiplies the activation by act_pre_scale, so its strides may be any.
    strided = KEPT if is_scale else REFUSED
    one = torch.ones(1).to(dtype)
    yield "expanded to its shape", one.expand(shape), strided
    yield "with gaps", torch.stack([part, part], -1)[..., 0], strided
    yield "expanded to a giant", one.expand(2**20, 2**20), REFUSED
    yield "expanded to the largest", one.expand(2**31, 2**31), REFUSED
    if not is_scale:
        yield "transposed", part.mT.contiguous().mT, REFUSED
    yield "sparse", part.to_sparse(), REFUSED
    yield "as its negative", torch._neg_view(part), REFUSED
    yield "conjugated", torch.conj(torch.ones(shape, dtype=torch.complex64)), REFUSED
    yield "nested", torch.nested.nested_tensor([part[..., 0].float()]).to(dtype), REFUSED
    yield "on meta", part.to("meta"), REFUSED
    yield "bare", bare(dtype, shape=shape), REFUSED
    yield "bare, of float16", bare(torch.float16, shape=shape), REFUSED
    yield "a weight", weight(), REFUSED
    yield "a parameter", nn.Parameter(part.clone(), requires_grad=False), KEPT
    if dtype != torch.uint8:
        quantized = torch.quantize_per_tensor(part.float(), 0.1, 0, torch.quint8)
        yield "quantized by torch", quantized, REFUSED
        yield "that wants a gradient", part.clone().requires_grad_(), KEPT
        yield "a parameter that wants one", nn.Parameter(part.clone()), KEPT
    twice = torch.cat([part.flatten(), part.flatten()])
    yield "the beginning of more", twice[: part.numel()].view(shape), KEPT
    yield "the end of more", twice[part.numel() :].view(shape), KEPT
    for i, odd in enumerate(odd_values()):
        yield f"odd value {i}", odd, KEPT if is_scale and odd is None else REFUSED


def _other_shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for axis, step in product(range(len(shape)), (-1, 1, 16)):
        yield tuple(max(0, size + step * (i == axis)) for i, size in enumerate(shape))
    yield from ((0,), (*shape, 1), (1, *shape), (0, *shape), (2 * torch.Size(shape).numel(),))
    if len(shape) > 1:
        yield from ((torch.Size(shape).numel(),), shape[1:] + shape[:1], ())


def parts() -> Iterator[Case]:
    """Each part replaced: in a plain weight, in a parameter, and in one packed for another CPU."""
    contexts: list[dict[str, Any]] = [{}, {"_is_param": True}, {"qdata_layout": "default"}]
    good = get_state(weight())
    for context, name in product(contexts, PARTS):
        for what, odd, expected in replacements(good[name]):
            yield stated(f"{name} {what} {context}", expected, **context, **{name: odd})


def relations() -> Iterator[Case]:
    """Parts that are right each, but not together: exchanged, on two devices, in one memory."""
    good = get_state(weight())
    for a, b in combinations(PARTS, 2):
        yield stated(f"{a} and {b} exchanged", REFUSED, **{a: good[b], b: good[a]})
        yield stated(f"{a} for {b}", REFUSED, **{b: good[a]})
    for count in range(1, 5):
        for names in combinations((*PARTS, "wrapper"), count):
            moved = {name: good[name].to("meta") for name in names if name != "wrapper"}
            arguments = wrapper(device="meta" if "wrapper" in names else "cpu")
            expected = KEPT if count == 4 else REFUSED
            yield Case(f"{names} on meta", pt(forged(good | moved, arguments)), expected)
    memory = torch.zeros(8192, dtype=torch.uint8)
    for name, start in product(("scale_and_zero", "act_pre_scale"), (0, 256, 2044, 2048, 4096)):
        both = {"qdata": _at(good["qdata"], memory, 0), name: _at(good[name], memory, start)}
        yield stated(f"qdata and {name} {start} bytes apart in one storage", REFUSED, **both)
    memory = torch.ones(1024, dtype=torch.bfloat16)
    for start, expected in ((0, REFUSED), (510, REFUSED), (512, KEPT), (1024, KEPT)):
        scale = _at(torch.ones(K, dtype=torch.bfloat16), memory, start)
        both = {"scale_and_zero": _at(good["scale_and_zero"], memory, 0), "act_pre_scale": scale}
        yield stated(f"{start} bytes apart in one storage of one dtype", expected, **both)


def _at(part: Tensor, memory: Tensor, start: int) -> Call:
    """A part that lies at byte ``start`` of a storage, whatever the dtype of that is."""
    place = (_storage(memory), start // part.element_size(), tuple(part.shape), part.stride())
    return Call(torch._utils._rebuild_tensor_v3, *place, False, OrderedDict(), part.dtype)


def _storage(part: Tensor) -> object:
    """As `torch.save` knows it, without the warning that it is old."""
    memory = part.untyped_storage()
    return torch.storage.TypedStorage(wrap_storage=memory, dtype=part.dtype, _internal=True)


def wrappers() -> Iterator[Case]:
    """Whatever the file says of the weight itself."""
    sizes = (0, 1, -1, N - 1, N + 1, K, N, 2 * N, 2**20, 2**31, 2**40, 2**62, -(2**62), 2**63 - 1)
    for n, k in product(sizes, sizes):
        # 63 rows need the bytes of 64: N is not stored twice.
        expected = KEPT if n in (N, N - 1) and k == K else REFUSED
        yield wrapped(f"shape {(n, k)}", expected, shape=(n, k))
    for shape in ((), (N,), (N, K, 1), (1, N, K), (N * K,), (N, 1, K), (2,) * 20):
        yield wrapped(f"shape {shape}", REFUSED, shape=shape)
    for stride in ((1, N), (K + 1, 1), (0, 0), (0, 1), (K, 2), (2**40, 1), (K,), ()):
        yield wrapped(f"stride {stride}", REFUSED, stride=stride)
    for stride in ((-K, 1), (K, -1), (-1, -1)):  # torch makes them contiguous
        yield wrapped(f"stride {stride}", KEPT, stride=stride)
    for offset in (1, -1, N, 2**31, 2**62, 2**63 - 1):
        yield wrapped(f"offset {offset}", REFUSED, storage_offset=offset)
    for dtype in (torch.float64, torch.uint8, torch.int8, torch.bool, torch.complex64, torch.quint8):
        yield wrapped(str(dtype), REFUSED, dtype)
    for dtype in (torch.bfloat16, torch.float32):
        yield wrapped(str(dtype), KEPT, dtype)
    mkldnn = torch.ones(1).to_mkldnn().layout
    for layout in (torch.sparse_coo, torch.sparse_csr, mkldnn):
        yield wrapped(str(layout), REFUSED, layout=layout)
    for device in ("cuda", "cuda:7", "meta", "xpu", "mps", "vulkan", "nowhere", torch.device("meta")):
        yield wrapped(f"device {device}", REFUSED, device=device)
    yield wrapped("device cpu:3", KEPT, device="cpu:3")
    yield wrapped("requires_grad", KEPT, requires_grad=True)
    for i, odd in enumerate(odd_values()):
        for name in ("shape", "stride", "storage_offset", "device"):
            expected = EITHER if _means_nothing(odd) else REFUSED  # torch takes some for its default
            yield wrapped(f"{name} is odd value {i}", expected, **{name: odd})
        expected = EITHER if odd in (None, torch.float16) else REFUSED
        yield wrapped(f"dtype is odd value {i}", expected, odd)


def _means_nothing(odd: object) -> bool:
    return odd is None or isinstance(odd, torch.device) or (type(odd) in (bool, int) and odd == 0)


def states() -> Iterator[Case]:
    """A state that is no dict, or a dict of another class."""
    good = get_state(weight())
    pairs, names = list(good.items()), tuple(good)
    for odd in (*odd_values(), pairs, names, (good, {}), (good,), [good], "qdata", {"state": good}):
        yield Case(f"a {type(odd).__name__}", pt(forged(odd)), REFUSED)
    yield Case("an OrderedDict", pt(forged(OrderedDict(good))), KEPT)


def constructed(**changes: Any) -> Call:
    """A call of the class itself."""
    state = get_state(weight()) | {"shape": (N, K), "dtype": torch.float16} | changes
    names = ("qdata", "scale_and_zero", "block_size", "shape", "qdata_layout", "dtype", "act_pre_scale")
    return Call(Int4OpaqueTensor, *(state[name] for name in names))


def roads() -> Iterator[Case]:
    """Calls that torch allows in a file, by which one may try to come around the checks."""
    good, utils = get_state(weight()), torch._utils
    from_type = torch._tensor._rebuild_from_type_v2
    # Not OrderedDict[Any, Any](): that is pickled with its type, which torch refuses before all else.
    hooks: OrderedDict[Any, Any] = OrderedDict()
    yield Case("no state", pt(bare()), REFUSED)
    yield Case("no state, a giant", pt(bare(shape=(2**20, 2**20))), REFUSED)
    yield Case("no state", pt(Call(utils._rebuild_parameter, bare(), False, hooks)), REFUSED)
    yield Case("constructor", pt(constructed()), KEPT)
    for name, odd in (
        *(("qdata", odd) for odd in (bare(torch.uint8, shape=(N, 32)), good["qdata"][:16], None, 7)),
        ("qdata", weight()),
        ("scale_and_zero", bare(torch.bfloat16, shape=(2, N, 2))),
        ("scale_and_zero", good["scale_and_zero"].to("meta")),
        *((name, laughs(40)) for name in ("block_size", "shape", "qdata_layout", "dtype")),
    ):
        yield Case(f"constructor, another {name}", pt(constructed(**{name: odd})), REFUSED)
    meta = (torch.float16, (N, K), (K, 1), False)
    on_meta = Call(from_type, utils._rebuild_meta_tensor_no_storage, Int4OpaqueTensor, meta, good)
    yield Case("on a plain meta tensor", pt(on_meta), REFUSED)
    dense = (_storage(torch.zeros(N * K).half()), 0, (N, K), (K, 1), False, hooks)
    on_dense = Call(from_type, utils._rebuild_tensor_v2, Int4OpaqueTensor, dense, good)
    yield Case("on a plain tensor", pt(on_dense), REFUSED)
    for cls in (Tensor, nn.Parameter):
        other = Call(from_type, utils._rebuild_wrapper_subclass, cls, wrapper(), good)
        yield Case(f"as {cls.__name__}", pt(other))
    for state in _states_of_a_parameter():
        call = Call(utils._rebuild_parameter_with_state, weight(), False, hooks, state)
        yield Case(f"a parameter's state {list(state)}", pt(call), REFUSED)
    fewer = good | {"qdata": good["qdata"][:16].clone()}
    for again, expected in ((fewer, REFUSED), (good, KEPT)):
        call = constructed()
        call.reduced = (*call.reduced, again)
        yield Case("constructor, and a state", pt(call), expected)


def _states_of_a_parameter() -> Iterator[dict[str, object]]:
    """What torch's ``_rebuild_parameter_with_state`` assigns to a good weight, which asks nobody."""
    good = get_state(weight())
    qdata, scale_and_zero = good["qdata"], good["scale_and_zero"]
    for odd in (qdata[:1], qdata[:1].expand(N, 32), torch._neg_view(qdata), qdata.to("meta"), 7):
        yield {"qdata": odd}
    yield {"qdata": bare(torch.uint8, shape=(N, 32))}
    negative = torch._neg_view(scale_and_zero)
    for odd in (scale_and_zero[:1], scale_and_zero.to("meta"), negative, scale_and_zero.float()):
        yield {"scale_and_zero": odd}
    yield {"scale_and_zero": bare(torch.bfloat16, shape=(2, N, 2))}
    for odd in (torch.ones(3), bare(torch.float32, shape=(N, K)), [1.0] * K):
        yield {"act_pre_scale": odd}
    for block_size in ([1, 8], [1, 256], [1, 0], [1, -32], [1, 32.0], [], 7):
        yield {"block_size": block_size}
    for layout in ("avx1024", 7, None):
        yield {"qdata_layout": layout}
    old = value()
    codes, scale, zero = (part.repeat(8, 1) for part in (old.codes, old.scale, old.zero))
    taller = Int4OpaqueTensor.from_groupwise(GroupwiseInt4(codes, scale, zero, GROUP_SIZE))
    for data in (bare(shape=(2**20, K)), bare(shape=(N, 2**20)), taller):
        yield {"data": data}
    less = good | {"scale_and_zero": scale_and_zero[:1]}
    known = {"_packed": True, "_flattened": (True, True, ([], {}))}
    for namespace in ({}, {"qdata": qdata}, less, less | known):
        yield {"__dict__": namespace}
    yield {"qdata": qdata[:1], "_packed": True}


def late() -> Iterator[Case]:
    """A part that the file changes after the weight that has it was checked."""
    for name, constructor in product(PARTS, (False, True)):
        part: Tensor = get_state(weight())[name].clone()
        changes = {name: part}
        target = constructed(**changes) if constructor else forged(get_state(weight()) | changes)
        same = torch._utils._rebuild_device_tensor_from_cpu_tensor
        cut = Call(same, part, part.dtype, "cpu", False, state=(_storage(part), 0, (1,), (1,)))
        buffer = io.BytesIO()
        torch.save({"layer.weight": target, "late": cut}, buffer)
        road = "constructor" if constructor else "state"
        yield Case(f"{name}, {road}", buffer.getvalue(), KEPT)  # what was checked is not in its hands


def sizes() -> Iterator[Case]:
    """The shape of one weight with parts of another: kept exactly if it needs such parts."""
    rng = random.Random("sizes")
    for _ in range(300):
        n, k, group_size = needed = rng.choice(SIZES), rng.choice(SIZES), rng.choice((32, 64, 128, 256))
        given = rng.choice((needed, _near(needed, rng), _near(_near(needed, rng), rng)))
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        qdata, scale_and_zero = part_shapes(*given)
        scale = rng.choice((None, torch.rand(given[1]), torch.rand(1), torch.rand(())))
        state = get_state(weight()) | {
            "qdata": torch.randint(0, 256, qdata, generator=generator).to(torch.uint8),
            "scale_and_zero": torch.randn(scale_and_zero, generator=generator).bfloat16(),
            "block_size": [1, group_size],
            "act_pre_scale": scale,
        }
        fits = part_shapes(*needed) == part_shapes(*given)
        fits = fits and (scale is None or scale.numel() in (1, k))
        what = f"{needed} with parts of {given}"
        yield Case(what, pt(forged(state, wrapper(shape=(n, k)))), KEPT if fits else REFUSED)


def _near(sizes: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    """The same but for one of N, K and group size."""
    n, k, group_size = sizes
    others = (rng.choice(SIZES), k, group_size), (n, rng.choice(SIZES), group_size)
    return rng.choice((*others, (n, k, rng.choice((32, 64, 128, 256)))))


def part_shapes(n: int, k: int, group_size: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of qdata and scale_and_zero."""
    padded_n, groups = -(-n // 16) * 16, -(-k // group_size)
    return (padded_n, groups * group_size // 2), (groups, padded_n, 2)


def legacy() -> Iterator[Case]:
    """Torch's format from before zip files, which it still reads: whole, forged, and cut."""
    good = get_state(weight())
    old = {"_use_new_zipfile_serialization": False}
    for layout in ("avx512", "avx2", "default"):
        data = pt(forged(good | {"qdata_layout": layout}), **old)
        yield Case(f"packed for {layout}", data, KEPT)
    for name in PARTS:
        for what, odd, expected in replacements(good[name]):
            yield Case(f"{name} {what}", pt(forged(good | {name: odd}), **old), expected)
    data = pt(weight(), **old)
    for stop in sorted(random.Random("legacy").sample(range(len(data)), 60)):
        yield Case(f"cut at {stop}", data[:stop], REFUSED)


def orders(**options: Any) -> Iterator[Case]:
    """An order of columns, whose numbers are checked once read; ``options`` are of `torch.save`."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0)).int()
    good = get_state(weight()) | {"act_order": order, "format_version": 5}
    replaced: list[tuple[str, object, str]] = [
        ("itself", order, KEPT),
        ("of the columns as they were", torch.arange(K).int(), KEPT),
        ("with gaps", torch.stack([order, order], -1)[:, 0], KEPT),
        ("none", None, REFUSED),
        ("on meta", order.to("meta"), REFUSED),
        ("of a number too much", torch.cat([order, order[:1]]), REFUSED),
        ("of a number too few", order[1:].clone(), REFUSED),
        ("of one number for all", order[:1].expand(K), REFUSED),
        ("as a column", order[:, None], REFUSED),
        ("bare", bare(torch.int32, shape=(K,)), REFUSED),
        ("sparse", order.to_sparse(), REFUSED),
    ]
    for dtype in (torch.int64, torch.uint8, torch.int16, torch.float32, torch.bfloat16, torch.bool):
        replaced.append((f"of {dtype}", order.to(dtype), REFUSED))
    for at, number in product((0, K // 2, K - 1), (-1, K, 2**31 - 1, -(2**31), int(order[1]))):
        changed = order.clone()
        changed[at] = number
        replaced.append((f"{number} at {at}", changed, REFUSED))
    for what, odd, expected in replaced:
        yield Case(f"an order {what}", pt(forged(good | {"act_order": odd}), **options), expected)
    for version, dtype in product((1, 2, 3, 4, 5, 6), (torch.bfloat16, torch.float16)):
        scale_and_zero = good["scale_and_zero"].to(dtype)
        state = good | {"format_version": version, "scale_and_zero": scale_and_zero}
        expected = KEPT if version == 5 else REFUSED
        yield Case(f"{dtype}, version {version}", pt(forged(state), **options), expected)
    for layout in ("avx512", "avx2", "default"):
        data = pt(forged(good | {"qdata_layout": layout}), **options)
        yield Case(f"packed for {layout}", data, KEPT)


PICKLES: dict[str, Family] = {
    "pt-attributes": attributes,
    "pt-attached": attached,
    "pt-parts": parts,
    "pt-relations": relations,
    "pt-wrappers": wrappers,
    "pt-states": states,
    "pt-roads": roads,
    "pt-late": late,
    "pt-sizes": sizes,
    "pt-legacy": legacy,
    "pt-orders": orders,
    "pt-legacy-orders": partial(orders, _use_new_zipfile_serialization=False),
}

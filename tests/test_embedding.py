"""4-bit embeddings, and one 4-bit weight that an embedding and a head share."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import FqnToConfig, quantize_

from tests.embedding_models import (
    CONFIG,
    K,
    N,
    Tied,
    assert_tied,
    embedding,
    expected,
    indices,
    linear_and_embedding,
    tied,
)
from tests.numerics import assert_int4
from tests.test_bytes import usage_of
from tests.weights import ALL_LAYOUTS, random_weight
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS
from torchao_int4cpu.kernels.portable.dequantize import CHUNK_ELEMENTS
from torchao_int4cpu.quantize import run as quantize_run

# --- looking rows up ----------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (7,), (0, 3), (2, 3), (2, 1, 4), (1, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_any_shape_of_indices(shape: tuple[int, ...], index_dtype: torch.dtype) -> None:
    table, idx = embedding(), indices(*shape, dtype=index_dtype)
    rows = table(idx)
    assert rows.shape == (*shape, K)
    assert type(rows) is Tensor
    assert rows.is_contiguous()
    assert not rows.requires_grad  # the table is frozen
    assert torch.equal(rows, expected(table, idx))


def test_strided_indices() -> None:
    table = embedding()
    for idx in (indices(4, 6).t(), indices(9)[::2], indices(3, 1).expand(3, 5)):
        assert torch.equal(table(idx), expected(table, idx))


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    """Blocks of 64 or 32 rows, and a short last one."""
    weight = random_weight(171, K, layout=layout, dtype=dtype)
    rows = F.embedding(torch.arange(171), weight)
    assert rows.dtype == dtype
    assert torch.equal(rows, weight.dequantize())


def test_the_dtype_follows_the_model() -> None:
    table, idx = embedding(), indices(5)
    assert table.half()(idx).dtype == torch.float16
    assert torch.equal(table(idx), expected(table, idx))
    assert table.bfloat16()(idx).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):  # as a dense table, which autocast leaves alone
        assert table(idx).dtype == torch.bfloat16


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize("padding_idx", [0, 63, -1])
def test_padding_idx_is_a_row_of_exact_zeros(algorithm: str, padding_idx: int) -> None:
    config = Int4WeightOnlyConfig(32, int4_choose_qparams_algorithm=algorithm)
    table = embedding(config, padding_idx=padding_idx)
    assert table.padding_idx == padding_idx % N
    idx = torch.tensor([[5, padding_idx % N], [99, 1]])
    assert torch.equal(table(idx), expected(table, idx))
    assert torch.count_nonzero(table(idx)[0, 1]) == 0


def test_what_concerns_gradients_only_is_accepted() -> None:
    table, idx = embedding(sparse=True, scale_grad_by_freq=True), indices(2, 3)
    assert torch.equal(table(idx), expected(table, idx))
    x = (table(idx) @ torch.ones(K, requires_grad=True)).sum()
    x.backward()  # gradients flow on to everything else
    assert table.weight.grad is None


@pytest.mark.parametrize("bad", [-1, N, 2**40])
def test_an_index_out_of_range(bad: int) -> None:
    table = embedding()
    with pytest.raises(
        IndexError, match=rf"got index {bad}; a weight of N={N} rows takes 0 to {N - 1}"
    ):
        table(torch.tensor([0, bad, 5]))
    with pytest.raises(IndexError, match=f"got index {bad}"):
        torch.compile(table, fullgraph=True)(torch.tensor([0, bad, 5]))


def test_what_has_no_4_bit_implementation_is_refused() -> None:
    weight, idx = embedding().weight, indices(2, 3)
    with pytest.raises(NotImplementedError, match="embedding_renorm_"):
        F.embedding(idx, weight, max_norm=1.0)
    with pytest.raises(NotImplementedError, match="_embedding_bag"):
        F.embedding_bag(idx, weight)
    with pytest.raises(TypeError, match="must be int32 or int64"):
        F.embedding(idx.float(), weight)
    with pytest.raises(TypeError, match="got a table of class Int4TransposedTensor"):
        F.embedding(idx, weight.t())
    with pytest.raises(ValueError, match="4-bit table with act_pre_scale"):
        F.embedding(idx, random_weight(N, K, act_pre_scale=torch.ones(K)))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: nn.Embedding(N, K, max_norm=1.0), "max_norm rescales its rows as it is used"),
        (lambda: nn.EmbeddingBag(N, K), "EmbeddingBag has no 4-bit implementation"),
    ],
    ids=["max_norm", "EmbeddingBag"],
)
def test_what_cannot_be_quantized_stays(module: Callable[[], Any], reason: str) -> None:
    model = nn.Sequential(module())
    before = model[0].weight
    with pytest.warns(UserWarning, match=rf"0\.weight is left as it was: .*{reason}"):
        quantize_(model, CONFIG, filter_fn=lambda module, name: name == "0")
    assert model[0].weight is before


def test_only_the_rows_asked_for_are_expanded() -> None:
    """Next to a table of 2 GB when it is expanded: a few rows, or many in chunks."""
    table = Int4OpaqueTensor.empty((2**20, 512), 128, torch.float32)
    table.qdata.zero_()
    table.scale_and_zero.zero_()
    few, many = torch.tensor([0, 5, 2**20 - 1]), torch.randint(0, 2**20, (10_000,))
    row = 512 * 4
    assert 3 * row <= usage_of(lambda: F.embedding(few, table)).peak < 16 * 3 * row
    used = usage_of(lambda: F.embedding(many, table))
    assert used.largest == 10_000 * row > 4 * CHUNK_ELEMENTS  # the result, of several chunks
    assert used.peak < 10_000 * row + 16 * CHUNK_ELEMENTS


# --- one weight for an embedding and a head -----------------------------------------------------


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tie_is_kept(head_first: bool) -> None:
    model = Tied(head_first)
    dense = model.embed.weight.detach().clone()
    idx = indices(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, CONFIG, filter_fn=linear_and_embedding)
    assert_tied(model)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == 3  # the shared one, and two of ``inner``
    block_size = [1, 32]
    assert torch.equal(model.head.weight, Int4OpaqueTensor.from_hp(dense, block_size))
    assert torch.equal(model.embed(idx), expected(model.embed, idx))
    assert torch.isfinite(model(idx)).all()


@pytest.mark.parametrize(
    "config",
    [
        FqnToConfig({"embed": CONFIG, "head": CONFIG}),
        FqnToConfig({"embed.weight": CONFIG, "head.weight": CONFIG}),
        FqnToConfig({"re:embed|head": CONFIG}),
        FqnToConfig({"embed": CONFIG, "_default": CONFIG}),
    ],
    ids=["modules", "parameters", "pattern", "default"],
)
@pytest.mark.parametrize("head_first", [False, True])
def test_by_name(config: FqnToConfig, head_first: bool) -> None:
    model = Tied(head_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, config, filter_fn=None)
    assert_tied(model)


def test_an_embedding_alone_by_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(N, K), "other": nn.Embedding(N, K)})
    quantize_(model, FqnToConfig({"embed": CONFIG}), filter_fn=None)
    assert isinstance(model["embed"].weight, Int4OpaqueTensor)
    assert type(model["other"].weight) is nn.Parameter


def test_by_default_embeddings_are_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(N, K), nn.Linear(K, N))
    with warnings.catch_warnings():  # half of the model is 4-bit: no surprise
        warnings.simplefilter("error")
        quantize_(model, CONFIG)
    assert type(model[0].weight) is nn.Parameter
    assert isinstance(model[1].weight, Int4OpaqueTensor)


def test_in_two_calls() -> None:
    """The second call finds what the first made of the shared weight, if that is the same still."""

    def quantize_in_two(change: Callable[[Tied], object], second: Any = CONFIG) -> bool:
        model = Tied()
        with pytest.warns(UserWarning, match="were one parameter"):
            quantize_(model, CONFIG, filter_fn=lambda module, name: name == "embed")
        change(model)
        quantize_(model, second, filter_fn=lambda module, name: name == "head")
        assert_int4(model.head.weight, (N, K), second.group_size)
        return model.head.weight is model.embed.weight

    @torch.no_grad()
    def write_to_the_dense(model: Tied) -> None:
        model.head.weight[3] += 1

    def write_to_the_4_bit(model: Tied) -> None:
        model.embed.weight.copy_(random_weight(N, K, dtype=torch.float32))

    def drop_the_4_bit(model: Tied) -> None:
        model.embed.weight = nn.Parameter(torch.zeros(N, K))

    assert quantize_in_two(lambda model: None)
    assert not quantize_in_two(write_to_the_dense)
    assert not quantize_in_two(write_to_the_4_bit)
    assert not quantize_in_two(drop_the_4_bit)
    assert not quantize_in_two(lambda model: None, Int4WeightOnlyConfig(64))
    mse = Int4WeightOnlyConfig(32, int4_choose_qparams_algorithm="mse")
    assert not quantize_in_two(lambda model: None, mse)


def is_half(weight: Any) -> bool:
    """Whether each number is 0.5, but for the rounding of scale and zero to bfloat16."""
    return torch.allclose(weight.dequantize(), torch.full((N, K), 0.5), atol=0.01)


def test_a_write_in_between_is_quantized() -> None:
    model = Tied()
    with pytest.warns(UserWarning, match="were one parameter"):
        quantize_(model, CONFIG, filter_fn=lambda module, name: name == "embed")
    with torch.no_grad():
        model.head.weight.fill_(0.5)
    quantize_(model, CONFIG)
    assert is_half(model.head.weight)
    assert not is_half(model.embed.weight)


def test_a_model_made_in_inference_mode() -> None:
    """torch does not count writes to its weights, so they are compared."""
    with torch.inference_mode():
        model = tied()
        assert_tied(model)
        other = Tied()
        with pytest.warns(UserWarning, match="were one parameter"):
            quantize_(other, CONFIG, filter_fn=lambda module, name: name == "embed")
        other.head.weight.fill_(0.5)
        quantize_(other, CONFIG)
        assert other.head.weight is not other.embed.weight
        assert is_half(other.head.weight)


def test_two_models_share_nothing() -> None:
    first, second = Tied(), Tied()
    copied = copy.deepcopy(first)
    for model in (first, second, copied):
        quantize_(model, CONFIG, filter_fn=linear_and_embedding)
        assert_tied(model)
    assert len({id(model.head.weight) for model in (first, second, copied)}) == 3
    assert torch.equal(first.head.weight, copied.head.weight)


# --- a tie that is broken -----------------------------------------------------------------------


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_broken_tie_is_told(head_first: bool, by_name: bool) -> None:
    """torchao's default filter takes the head only. The numbers are right; tying again loses it."""
    model = Tied(head_first)
    dense = model.embed.weight
    config: Any = FqnToConfig({"head": CONFIG, "inner": CONFIG}) if by_name else CONFIG
    with pytest.warns(UserWarning, match="were one parameter") as caught:
        quantize_(model, config, filter_fn=None)  # None is torchao's default filter
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(
        "head.weight and embed.weight were one parameter, and only head.weight is 4-bit now: they are "
        "tied no longer. "
    )
    assert "filter_fn=lambda module, name: isinstance(module, (torch.nn.Linear, torch.nn.Emb" in message
    assert model.embed.weight is dense
    assert_int4(model.head.weight, (N, K), 32)


def test_a_tie_with_what_cannot_be_quantized_is_told() -> None:
    model = Tied()
    model.embed.max_norm = 1.0
    with pytest.warns(UserWarning, match="were one parameter") as caught:
        quantize_(model, CONFIG, filter_fn=linear_and_embedding)
    first, second = [str(warning.message) for warning in caught]
    assert first.startswith("head.weight and embed.weight were one parameter")
    assert second.startswith("embed.weight is left as it was: an embedding with max_norm rescales")


def test_several_at_a_time() -> None:
    """Three holders, one not chosen: told for each of the two, whichever is visited when."""
    model = nn.ModuleList([nn.Linear(K, N, bias=False) for _ in range(3)])
    for layer in model:
        layer.weight = model[0].weight
    with pytest.warns(UserWarning, match="were one parameter") as caught:
        quantize_(model, CONFIG, filter_fn=lambda module, name: name in ("0", "2"))
    assert [str(warning.message).partition(" were")[0] for warning in caught] == [
        "0.weight and 1.weight",
        "2.weight and 1.weight",
    ]
    assert model[0].weight is model[2].weight
    assert type(model[1].weight) is nn.Parameter


def test_the_model_is_searched_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[nn.Module] = []
    search = quantize_run.shared_parameters

    def count(root: nn.Module) -> Any:
        found.append(root)
        return search(root)

    monkeypatch.setattr(quantize_run, "shared_parameters", count)
    model: Any = nn.Sequential(*[nn.Linear(K, K) for _ in range(20)])
    quantize_(model, CONFIG, filter_fn=lambda module, name: name in ("0", "1", "2"))
    assert len(found) == 1
    model[3].weight = model[4].weight  # so what the first call found does not hold any more
    with pytest.warns(UserWarning, match=r"3\.weight and 4\.weight were one parameter"):
        quantize_(model, CONFIG, filter_fn=lambda module, name: name in ("3", "5"))
    assert found == [model] * 2


def test_a_filter_is_asked_once_about_untied_layers() -> None:
    asked: list[str] = []

    def count(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return isinstance(module, nn.Linear)

    quantize_(nn.Sequential(nn.Linear(K, K), nn.Embedding(N, K)), CONFIG, filter_fn=count)
    assert asked == ["", "0", "1"]


# --- saved and loaded ---------------------------------------------------------------------------


def stored(model: Tied) -> int:
    """Bytes of the parts of the shared weight."""
    weight: Any = model.embed.weight
    return int(weight.qdata.nbytes + weight.scale_and_zero.nbytes)


def memory(*weights: Tensor) -> set[int]:
    return {weight.qdata.untyped_storage().data_ptr() for weight in weights}  # type: ignore[attr-defined]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loaded(data: bytes, **options: Any) -> Any:
    return torch.load(io.BytesIO(data), **options)


def test_copies_keep_the_tie() -> None:
    model, idx = tied(), indices(2, 3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_tied(copied)
        assert memory(copied.embed.weight).isdisjoint(memory(model.embed.weight))
        assert torch.equal(copied(idx), model(idx))
    assert_tied(loaded(saved(model), weights_only=False))


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.cpu])
def test_conversions_keep_the_tie(change: Callable[[nn.Module], nn.Module]) -> None:
    model = tied()
    change(model)
    assert_tied(model)


def test_a_state_dict_holds_the_shared_weight_once() -> None:
    model = tied()
    state = model.state_dict()
    assert {"embed.weight", "head.weight"} <= state.keys()
    assert len(memory(state["embed.weight"], state["head.weight"])) == 1
    data = saved(state)
    without = saved({name: part for name, part in state.items() if name != "head.weight"})
    assert len(data) - len(without) < 1024 < stored(model)  # of names and other pickled words


@pytest.mark.parametrize("mmap", [False, True])
def test_load_state_dict(mmap: bool, tmp_path: Path) -> None:
    model, idx = tied(), indices(2, 3)
    torch.save(model.state_dict(), tmp_path / "state.pt")

    def read() -> Any:
        return torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)

    state = read()
    assert len(memory(state["embed.weight"], state["head.weight"])) == 1
    copied = tied()
    assert not torch.equal(copied(idx), model(idx))
    copied.load_state_dict(state)
    assert_tied(copied)
    assigned = Tied()
    assigned.load_state_dict(read(), assign=True)
    # torch makes two parameters of the one memory, for dense weights as well
    assert len(memory(assigned.embed.weight, assigned.head.weight)) == 1
    for back in (copied, assigned):
        assert torch.equal(back(idx), model(idx))


def test_a_dense_tied_model_does_not_take_a_4_bit_state_by_copying() -> None:
    with pytest.raises(RuntimeError, match="quantize_ the model before you load a 4-bit state dict"):
        Tied().load_state_dict(tied().state_dict())


def test_a_4_bit_head_without_its_embedding_survives_a_state_dict() -> None:
    """After the warning: nothing is lost as long as nobody ties the two again."""
    model = Tied()
    with pytest.warns(UserWarning, match="were one parameter"):
        quantize_(model, CONFIG)
    back, idx = Tied(), indices(2, 3)
    back.load_state_dict(loaded(saved(model.state_dict()), weights_only=True), assign=True)
    assert isinstance(back.head.weight, Int4OpaqueTensor)
    assert torch.equal(back(idx), model(idx))


def test_safetensors(tmp_path: Path) -> None:
    """torchao's own functions know no ties, so they write both names; the numbers are right."""
    model, idx = tied(), indices(2, 3)
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        read = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state, left = unflatten_tensor_state_dict(read, file.metadata())
    assert not left
    copied, assigned = tied(), Tied()
    copied.load_state_dict(state)
    assert_tied(copied)
    assigned.load_state_dict(state, assign=True)
    for back in (copied, assigned):
        assert torch.equal(back(idx), model(idx))

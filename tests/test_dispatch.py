"""Every handler: linear in all its forms, gradients, conversions, copies, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.numerics import assert_int4, product_bound, random_groupwise
from tests.scales import SCALES
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.format.layout import LAYOUTS, layout_named, native_layout
from torchao_int4cpu.format.packed import int4_mm_reference
from torchao_int4cpu.format.slicing import repack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
aten = torch.ops.aten


def weight_of(n: int = 40, k: int = 70, group_size: int = 32, **kwargs: Any) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(random_groupwise(n, k, group_size), **kwargs)


def parameter(t: Int4OpaqueTensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def assert_linear(y: Tensor, x: Tensor, w: Int4OpaqueTensor, bias: Tensor | None = None) -> None:
    """Within the bound of the product, and one more rounding where a bias is added."""
    flat = x.detach().reshape(-1, x.shape[-1])
    weight = w.packed()
    expected = int4_mm_reference(flat, weight)
    bound = product_bound(flat, weight, x.dtype)
    if bias is not None:
        expected = expected + bias.detach().double()
        bound = bound + 2.0**-8 * (expected.abs() + bound)
    assert y.shape == (*x.shape[:-1], w.shape[0])
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert bool(((y.detach().double() - expected.view(y.shape)).abs() <= bound.view(y.shape)).all())


@pytest.mark.parametrize(
    "shape", [(70,), (1, 70), (5, 70), (2, 3, 70), (2, 1, 3, 70), (0, 70), (2, 0, 70)], ids=str
)
@dtypes
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_of_any_rank(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
    w, x = weight_of(), torch.randn(shape).to(dtype)
    bias = torch.randn(40).to(dtype) if with_bias else None
    assert_linear(F.linear(x, w, bias), x, w, bias)


@dtypes
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_activation_decides_the_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    w, x = weight_of(dtype=weight_dtype), torch.randn(3, 70).to(dtype)
    bias = torch.randn(40).to(weight_dtype)
    assert_linear(F.linear(x, w, bias), x, w, bias)


def test_bias_by_position_and_by_keyword() -> None:
    w, x, bias = weight_of(), torch.randn(3, 70), torch.randn(40)
    y = F.linear(x, w, bias)
    assert not torch.equal(y, F.linear(x, w))
    for same in (F.linear(x, w, bias=bias), F.linear(input=x, weight=w, bias=bias)):
        assert torch.equal(same, y)
    assert torch.equal(nn.functional.linear(bias=bias, weight=w, input=x), y)


@pytest.mark.parametrize("m", [2, 1500])
def test_any_strides(m: int) -> None:
    """Few rows and many."""
    w = weight_of(300, 140)
    for x in (
        torch.randn(140, m).t(),
        torch.randn(m, 280)[:, ::2],
        torch.randn(1, 140).expand(m, 140),
        torch.randn(3, m, 140).transpose(0, 1),
    ):
        assert_linear(F.linear(x, w), x, w)


@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (70,)], ids=str)
def test_act_pre_scale_multiplies_the_activation(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape) + 0.5
    w, x = weight_of(act_pre_scale=scale), torch.randn(3, 70).to(dtype)
    y = F.linear(x, w)
    assert y.dtype == dtype
    scaled = x.float() * scale  # exact enough: float32, rounded to bfloat16 by the kernel only
    error = (y.double() - int4_mm_reference(scaled, w.packed())).abs()
    assert bool((error <= 1.01 * product_bound(scaled, w.packed(), dtype)).all())


def test_the_aten_op_is_handled_without_torch_functions() -> None:
    """`torch.inference_mode` brings aten.linear itself; C++ callers do, too."""
    w, x, bias = weight_of(), torch.randn(3, 70), torch.randn(40)
    with torch.inference_mode():
        y = torch._C._nn.linear(x, w, bias)
        assert torch.equal(aten.linear.default(x, w, bias), y)
        with torch._C.DisableTorchFunctionSubclass():
            assert torch.equal(F.linear(x, w, bias), y)
    assert_linear(y, x, w, bias)


def test_autocast_decides_the_dtype_as_for_a_dense_linear() -> None:
    w, x = weight_of(), torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, w)
        assert y.dtype == F.linear(x, torch.randn(40, 70)).dtype == torch.bfloat16
    assert_linear(y, x.bfloat16(), w)


def test_meta_gives_shapes() -> None:
    w, x = weight_of().to("meta"), torch.randn(2, 3, 70, device="meta")
    assert w.device.type == w.qdata.device.type == "meta"
    y = F.linear(x, w, torch.randn(40, device="meta"))
    assert y.shape == (2, 3, 40)
    assert y.device.type == "meta"


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(3, 71), ValueError, r"shape \[3, 71\].*shape \[40, 70\].*must be K=70"),
        (torch.tensor(1.0), ValueError, r"shape \[\]"),
        (torch.randn(3, 70).double(), TypeError, "torch.float64 activation; convert"),
        (torch.ones(3, 70, dtype=torch.int64), TypeError, "torch.int64 activation"),
        (torch.randn(3, 70, device="meta"), ValueError, "on meta and a 4-bit weight on cpu"),
    ],
)
def test_activations_that_do_not_fit(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F.linear(x, weight_of())


def test_a_4_bit_tensor_must_be_the_weight() -> None:
    with pytest.raises(TypeError, match="4-bit tensor that is not its weight"):
        F.linear(weight_of(), torch.randn(5, 70))


# --- gradients ----------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("m", [1, 5, 700])
def test_gradients_flow_to_activation_and_bias(dtype: torch.dtype, m: int) -> None:
    """Against autograd through the dequantized weight, in float64; bound as in test_kernels."""
    w = weight_of(dtype=dtype)
    x = torch.randn(m, 70).to(dtype).requires_grad_()
    bias = torch.randn(40).to(dtype).requires_grad_()
    upstream = torch.randn(m, 40).to(dtype)
    y = F.linear(x, parameter(w), bias)
    assert_linear(y, x, w, bias)
    y.backward(upstream)
    dense = w.to_groupwise().dequantize(torch.float64)
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.dtype == dtype
    terms = upstream.double().abs() @ dense.abs()
    error = (x.grad.double() - upstream.double() @ dense).abs()
    assert bool((error <= 4.1 * 2.0**-8 * terms + 1e-6).all())
    expected = upstream.double().sum(0)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}[dtype]
    assert bool(((bias.grad.double() - expected).abs() <= unit * (expected.abs() + 20)).all())


def test_only_the_bias_may_want_a_gradient() -> None:
    bias = torch.zeros(40, requires_grad=True)
    F.linear(torch.randn(3, 70), parameter(weight_of()), bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((40,), 3.0))


def test_act_pre_scale_is_in_the_gradient() -> None:
    scale = torch.rand(70) + 0.5
    w = weight_of(act_pre_scale=scale)
    x = torch.randn(3, 70, requires_grad=True)
    F.linear(x, w).sum().backward()
    assert x.grad is not None
    expected = w.to_groupwise().dequantize().sum(0) * scale
    terms = w.to_groupwise().dequantize().abs().sum(0) * scale
    assert bool(((x.grad[0] - expected).abs() <= 4.1 * 2.0**-8 * terms).all())


def test_a_lora_adapter_learns_while_the_base_stays() -> None:
    w = parameter(weight_of())
    before = w.qdata.clone()  # type: ignore[attr-defined]
    a, b = (torch.randn(4, 70) * 0.1).requires_grad_(), torch.zeros(40, 4, requires_grad=True)
    front = nn.Linear(70, 70)  # its gradient has to come through the 4-bit weight
    optimizer = torch.optim.Adam([a, b, *front.parameters()], lr=0.01)
    x, target = torch.randn(32, 70), torch.randn(32, 40)
    losses = []
    for _ in range(30):
        h = front(x)
        loss = F.mse_loss(F.linear(h, w) + h @ a.t() @ b.t(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(w.qdata, before)  # type: ignore[attr-defined]


def test_a_weight_stays_frozen() -> None:
    w = nn.Parameter(weight_of())  # requires_grad=True is nn.Parameter's default, and no wish
    assert not w.requires_grad
    layer = nn.Linear(70, 40)
    layer.weight = w
    with pytest.warns(UserWarning, match="stays frozen .* train an adapter"):
        layer.requires_grad_(True)
    with pytest.warns(UserWarning, match="stays frozen"):
        w.requires_grad = True
    assert [p.requires_grad for p in layer.parameters()] == [False, True]
    layer(torch.randn(3, 70)).sum().backward()
    assert w.grad is None
    layer.requires_grad_(False)
    assert not weight_of().requires_grad_().requires_grad


# --- conversions --------------------------------------------------------------------------------

CONVERSIONS: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "to": (lambda t: t.to(torch.float16), torch.float16),
    "to by keyword": (lambda t: t.to(dtype=torch.float32), torch.float32),
    "to like": (lambda t: t.to(torch.ones(1)), torch.float32),
    "half": (lambda t: t.half(), torch.float16),
    "float": (lambda t: t.float(), torch.float32),
    "bfloat16": (lambda t: t.bfloat16(), torch.bfloat16),
    "type": (lambda t: t.to("cpu", torch.float16), torch.float16),
}


@pytest.mark.parametrize("name", list(CONVERSIONS))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_logical_dtype_changes_truly(name: str, mode: Callable[[], Any]) -> None:
    convert, dtype = CONVERSIONS[name]
    w = weight_of(act_pre_scale=torch.ones(70))
    with mode():
        new = convert(w)
        assert isinstance(new, Int4OpaqueTensor)
        assert new.dtype == dtype
        assert new.dequantize().dtype == dtype
        assert torch.equal(new.dequantize(), w.to_groupwise().dequantize(dtype))
        assert new.scale_and_zero.dtype == w.scale_and_zero.dtype == SCALES
        assert new.act_pre_scale is not None
        if dtype != w.dtype:  # a copy shares nothing with its source
            new.qdata.zero_()
            assert int(w.qdata.count_nonzero()) > 0


@dtypes
def test_module_to_changes_weight_and_bias(dtype: torch.dtype) -> None:
    module = nn.Linear(70, 40)
    module.weight = parameter(weight_of(dtype=torch.float32))
    before = module.weight.qdata.clone()  # type: ignore[attr-defined]
    module.to(dtype)
    w = assert_int4(module.weight, (40, 70), 32)
    assert module.weight.dtype == module.bias.dtype == dtype
    assert isinstance(module.weight, nn.Parameter)
    assert torch.equal(w.qdata, before)
    x = torch.randn(3, 70).to(dtype)
    assert_linear(module(x), x, w, module.bias)


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot convert a 4-bit weight to torch\.float64"):
        weight_of().double()
    with pytest.raises(TypeError, match=r"cannot convert a 4-bit weight to torch\.float64"):
        weight_of().to(torch.float64)


@pytest.mark.parametrize(
    "move",
    [
        lambda t: t.to("cuda"),
        lambda t: t.to(torch.device("cuda", 0)),
        lambda t: t.to(device="cuda"),
        lambda t: t.to("xpu", torch.float16),
        lambda t: t.cuda(),
        lambda t: aten.empty_like.default(t, device=torch.device("cuda")),
        lambda t: nn.ParameterList([nn.Parameter(t, requires_grad=False)]).to("cuda"),
    ],
)
def test_other_devices_are_refused(move: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"cannot move to '.*'; it runs on 'cpu' only, so keep"):
        move(weight_of())


def test_meta_and_back_by_loading() -> None:
    module = nn.Linear(70, 40)
    module.weight = parameter(weight_of(dtype=torch.float32))
    state = copy.deepcopy(module.state_dict())
    x = torch.randn(3, 70)
    y = module(x)

    module.to("meta")
    assert_int4(module.weight, (40, 70), 32)
    assert module.weight.device.type == "meta"
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(x), y)

    module.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(module(x), y)
    with pytest.raises(ValueError, match=r"from meta to 'cpu', as it has no numbers; .* assign=True"):
        module.to("meta").to("cpu")


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, Tensor.clone, Tensor.detach, copy.copy],
    ids=lambda f: f.__name__,
)
def test_copies_hold_the_same(copied: Callable[[Tensor], Tensor]) -> None:
    w = weight_of(act_pre_scale=torch.rand(70))
    new = assert_int4(copied(w), (40, 70), 32)
    assert new is not w
    assert new.qdata_layout == w.qdata_layout
    assert new.act_pre_scale is not None
    assert torch.equal(new.dequantize(), w.dequantize())
    shares = new.qdata.data_ptr() == w.qdata.data_ptr()
    assert shares == (copied not in (copy.deepcopy, Tensor.clone))


def test_contiguous_gives_the_tensor_itself_or_a_copy_as_torch_does() -> None:
    w = Int4OpaqueTensor.from_groupwise(random_groupwise(256, 70, 32))
    assert w.contiguous() is w
    rows = w.narrow(0, 0, 128)  # its groups lie as far apart as in w
    assert not rows.scale_and_zero.is_contiguous()
    packed = rows.contiguous()
    assert packed.qdata.is_contiguous()
    assert packed.scale_and_zero.is_contiguous()
    assert packed.qdata.data_ptr() != rows.qdata.data_ptr()
    assert torch.equal(packed.dequantize(), w.dequantize()[:128])


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_copy_from_another_layout(layout: str) -> None:
    source, target = weight_of(), weight_of()
    target.qdata.zero_()
    native = native_layout()
    assert native is not None
    source.qdata = repack(source.qdata, native, layout_named(layout))
    source.qdata_layout = layout
    pointer = target.qdata.data_ptr()
    assert target.copy_(source) is target
    assert target.qdata_layout == native.name
    assert target.qdata.data_ptr() == pointer  # in place
    assert torch.equal(target.to_groupwise().codes, random_groupwise(40, 70, 32).codes)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (weight_of(40, 80), ValueError, r"copy_ got shape \[40, 80\] for .* shape \[40, 70\]"),
        (weight_of(40, 70, 64), ValueError, r"copy_ got block_size \[1, 64\]"),
        (weight_of(act_pre_scale=torch.ones(70)), ValueError, r"copy_ got act_pre_scale \[70\]"),
        (torch.randn(40, 70), TypeError, "source that is torch.float32 of class Tensor"),
    ],
)
def test_copies_that_do_not_fit(source: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weight_of().copy_(source)


def test_a_float_weight_takes_no_4_bit_one() -> None:
    with pytest.raises(TypeError, match=r"target that is torch.float32.*assign=True"):
        torch.randn(40, 70).copy_(weight_of())
    with pytest.raises(RuntimeError, match="quantize_ the model before you load a 4-bit state dict"):
        nn.Linear(70, 40, bias=False).load_state_dict({"weight": weight_of()})


class _Wrapper(Tensor):
    """A bias without memory of its own, as a DTensor is one."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        wrapper = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = [arg.held if isinstance(arg, _Wrapper) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_a_bias_without_memory_of_its_own_is_added() -> None:
    x, weight, bias = torch.randn(3, 70), weight_of(dtype=torch.float32), torch.randn(40)
    with torch.no_grad():
        y = F.linear(x, weight, _Wrapper(bias))
        assert torch.equal(y, F.linear(x, weight, bias))
        assert not torch.equal(y, F.linear(x, weight))


# --- what is not there --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda w: w.t().cumsum(0), "aten.cumsum.default"),
        (lambda w: w.fill_(0), "aten.fill_.Scalar"),
        (lambda w: torch.mm(torch.zeros(1, 70), w.t(), out=torch.zeros(1, 40)), "aten.mm.out"),
        (lambda w: w.index_copy_(0, torch.tensor([1]), w[:1]), "aten.index_copy_.default"),
        (lambda w: F.embedding(torch.tensor([1]), w, max_norm=1.0), "aten.embedding_renorm_.default"),
        (lambda w: torch.addmv(torch.zeros(40), w, torch.zeros(70)), "aten.addmv.default"),
        (lambda w: w.view(torch.uint8), "aten.view.dtype"),
    ],
)
def test_unknown_ops_are_refused_by_name(operation: Callable[[Tensor], object], name: str) -> None:
    with pytest.raises(NotImplementedError) as caught, torch.no_grad():
        operation(weight_of())
    message = str(caught.value)
    assert message.startswith(f"{name} has no implementation for a 4-bit weight; ")
    assert ".dequantize()" in message


@pytest.mark.parametrize("transposed", [False, True])
def test_to_with_a_memory_layout(transposed: bool) -> None:
    """The op that takes one: the weight itself, or a copy of another logical dtype."""
    w = weight_of()
    t: Any = w.t() if transposed else w
    to = torch.ops.aten.to.dtype_layout
    assert to(t, dtype=t.dtype, layout=torch.strided) is t
    half = to(t, dtype=torch.float16, layout=torch.strided, device=torch.device("cpu"))
    assert type(half) is type(t)
    assert (half.dtype, half.shape) == (torch.float16, t.shape)
    copied = to(t, layout=torch.strided, copy=True)
    assert copied is not t
    assert copied.qdata.data_ptr() != t.qdata.data_ptr()
    assert torch.equal(copied, t)

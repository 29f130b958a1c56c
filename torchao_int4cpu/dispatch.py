"""What torch may do with an `Int4OpaqueTensor`: named handlers, and the table they are kept in.

Handlers unwrap, call code on plain tensors, and wrap. An op without one is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchao_int4cpu.groupwise import FLOAT_DTYPES
from torchao_int4cpu.kernels import decode_max_rows, int4_mm, native_kernel, traceable_int4_mm
from torchao_int4cpu.layout import layout_named, native_layout, repack
from torchao_int4cpu.tensor import Int4OpaqueTensor

aten = torch.ops.aten
#: Raised whenever a handler traces other ops than before, so that no graph in a cache is reused.
TRACE_REVISION = 2

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Handler = TypeVar("Handler", bound=Callable[..., Any])


def implements(ops: Sequence[Any]) -> Callable[[Handler], Handler]:
    """Register a handler for aten ops."""
    register: Callable[[Handler], Handler] = Int4OpaqueTensor.implements(ops)
    return register


def implements_function(functions: Sequence[Any]) -> Callable[[Handler], Handler]:
    """Register a handler for functions of torch's Python API."""
    register: Callable[[Handler], Handler] = Int4OpaqueTensor.implements_torch_function(functions)
    return register


@implements([aten.linear.default])
def handle_linear(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """``input [..., K] · weightᵀ + bias [N]``, see `linear`."""
    return linear(*args, **kwargs)


def linear(input: Tensor, weight: Int4OpaqueTensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a 4-bit weight.

    Args:
        input: ``[..., K]``, bfloat16, float16 or float32 whatever the dtype of the weight is.
        weight: ``[N, K]``.
        bias: ``[N]``, any floating dtype.

    Returns:
        ``[..., N]`` in the dtype of ``input`` (under autocast: in that of autocast). The product is
        rounded to that dtype before the bias is added.

    Raises:
        TypeError: ``weight`` is no 4-bit weight, or ``input`` has another dtype.
        ValueError: shapes or devices do not match.
    """
    if not isinstance(weight, Int4OpaqueTensor):
        raise TypeError(
            "linear got a 4-bit tensor that is not its weight; "
            "only the weight can be one, so call .dequantize() on the other"
        )
    input = _cast_by_autocast(input)
    packed = weight.packed()
    shape = input.shape
    grad = torch.is_grad_enabled()
    if not (
        input.dtype in FLOAT_DTYPES
        and shape
        and shape[-1] == packed.k
        and input.device == packed.qdata.device
    ):
        raise _misfit(input, weight)

    activation = input
    if weight.act_pre_scale is not None:
        activation = activation * weight.act_pre_scale.reshape(-1)  # may widen it: rounded once, later
    if len(shape) != 2:
        activation = activation.reshape(-1, packed.k)
    if (
        type(activation) is Tensor
        and activation.is_cpu
        and not (grad and activation.requires_grad)
        and not torch.compiler.is_compiling()
    ):
        y = int4_mm(activation, packed)  # a plain eager call needs no op
    else:
        y = traceable_int4_mm(activation, packed)
    if activation is not input:
        y = y.to(input.dtype)
    if bias is not None:
        y = y.add_(bias)  # y is ours alone, so no second [M, N] is needed
    return y if len(shape) == 2 else y.reshape(*shape[:-1], packed.n)


def _cast_by_autocast(input: Tensor) -> Tensor:
    return input.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else input


_library = torch.library.Library("torchao_int4cpu", "FRAGMENT")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", linear, "CompositeImplicitAutograd")


def exported_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` as one op on the 4-bit weight, which `torch.export` keeps whole in its graph.

    A graph on the parts of the weight would name their layout, but the weights of a saved program are
    repacked for the process that loads them. ``run_decompositions`` and AOTInductor take the op apart,
    and make the parts plain tensors that nobody repacks.
    """
    y: Tensor = torch.ops.torchao_int4cpu.linear.default(_cast_by_autocast(input), weight, bias)
    return y


def _misfit(input: Tensor, weight: Int4OpaqueTensor) -> Exception:
    """Say which condition of `linear` does not hold."""
    n, k = weight.shape
    if input.dtype not in FLOAT_DTYPES:
        return TypeError(
            f"linear got a {input.dtype} activation; convert it to bfloat16, float16 or float32"
        )
    if input.ndim == 0 or input.shape[-1] != k:
        return ValueError(
            f"linear got an activation of shape {list(input.shape)} for a 4-bit weight of shape "
            f"{[n, k]}; the last dimension must be K={k}"
        )
    return ValueError(
        f"linear got an activation on {input.device} and a 4-bit weight on {weight.device}; "
        "both must be on 'cpu', so move the activation with .to('cpu')"
    )


@implements([aten._to_copy.default])
def handle_to_copy(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """``.to``, ``.half``, ``.float``, ``.bfloat16``: change the logical dtype, or go to 'meta'."""
    new = _converted(args[0], kwargs, lambda part, device: part.to(device=device, copy=True))
    correct: Int4OpaqueTensor = return_and_correct_aliasing(func, args, kwargs, new)
    return correct


@implements_function([torch.Tensor.cuda, torch.Tensor.xpu])
def handle_accelerator(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> None:
    """``.cuda()`` and ``.xpu()`` would ask the driver before they ask us."""
    raise _wrong_device(func.__name__)


@implements_function([torch.Tensor.to])
def handle_to(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """``.to("cuda")`` would, too, ask the driver first; everything else goes on to `handle_to_copy`."""
    target = kwargs.get("device", args[1] if len(args) > 1 else None)
    if isinstance(target, (str, torch.device)) and torch.device(target).type not in ("cpu", "meta"):
        raise _wrong_device(target)
    result: Tensor = func(*args, **kwargs)
    return result


_SET_REQUIRES_GRAD: Any = torch.Tensor.requires_grad  # annotated as bool; it is a descriptor


@implements_function([torch.Tensor.requires_grad_, _SET_REQUIRES_GRAD.__set__])
def handle_requires_grad_(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """Stay frozen, so that ``requires_grad`` tells the truth to optimizers and to whoever counts.

    `torch.nn.Parameter` asks for a gradient by default, and transformers does so for what it loads:
    that is no wish of the user. To ask a parameter for one is, and gets a warning.
    """
    weight: Int4OpaqueTensor = args[0]
    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    if wanted and isinstance(weight, torch.nn.Parameter):
        warnings.warn(
            "a 4-bit weight stays frozen whatever requires_grad is set to; "
            "train an adapter beside it (LoRA), or the original weight",
            stacklevel=3,
        )
    return weight


@implements([aten.empty_like.default])
def handle_empty_like(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """`torch.empty_like`, which ``module.to_empty(device=...)`` calls."""
    return _converted(args[0], kwargs, lambda part, device: torch.empty_like(part, device=device))


@implements([aten.is_pinned.default])
def handle_is_pinned(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> bool:
    """``is_pinned``, which `torch.distributed.checkpoint` asks before it saves."""
    pinned: bool = args[0].qdata.is_pinned()
    return pinned


@implements([aten.copy_.default])
def handle_copy_(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """``copy_`` between 4-bit weights, as ``load_state_dict`` does; the layouts may differ.

    Raises:
        TypeError: one side is not a 4-bit weight.
        ValueError: shape, group size or ``act_pre_scale`` differ.
    """
    target, source = args[0], args[1]
    for name, side in (("source", source), ("target", target)):
        if not isinstance(side, Int4OpaqueTensor):
            raise TypeError(
                f"copy_ got a {name} that is {side.dtype} of class {type(side).__name__} and not "
                "4-bit as the other side is; quantize_ the model before you load a 4-bit state dict, "
                "or load it with load_state_dict(..., assign=True)"
            )
    for name, mine, other in (
        ("shape", list(target.shape), list(source.shape)),
        ("block_size", target.block_size, source.block_size),
        ("act_pre_scale", _shape_or_none(target), _shape_or_none(source)),
    ):
        if mine != other:
            raise ValueError(
                f"copy_ got {name} {other} for a 4-bit weight with {name} {mine}; both must agree, "
                "or load it with load_state_dict(..., assign=True)"
            )
    target.qdata.copy_(
        repack(source.qdata, layout_named(source.qdata_layout), layout_named(target.qdata_layout))
    )
    target.scale_and_zero.copy_(source.scale_and_zero)
    if target.act_pre_scale is not None:
        target.act_pre_scale.copy_(source.act_pre_scale)
    copied: Tensor = target
    return copied


def handle_op(func: Any, types: Args, args: Args = (), kwargs: Kwargs | None = None) -> Any:
    """``__torch_dispatch__``: look the op up; take composite ops apart; refuse the rest by name.

    Composite ops (``aten.to.dtype`` for one) arrive whole in `torch.inference_mode`.

    Raises:
        NotImplementedError: there is no handler.
    """
    kwargs = kwargs or {}
    table = Int4OpaqueTensor._ATEN_OP_TABLE[Int4OpaqueTensor]
    if func in table:
        return table[func](func, types, args, kwargs)
    result = func.decompose(*args, **kwargs)
    if result is not NotImplemented:
        return result
    supported = ", ".join(sorted(str(op) for op in table))
    raise NotImplementedError(
        f"{func} has no 4-bit implementation; Int4OpaqueTensor supports {supported}; "
        "call .dequantize() for a plain tensor"
    )


def handle_function(
    func: Callable[..., Any], types: Args, args: Args = (), kwargs: Kwargs | None = None
) -> Any:
    """``__torch_function__``: look the function up, else run it as it is.

    Torch functions are off inside, or each ``weight.shape`` would come back here (8 microseconds in a
    `linear`).
    """
    kwargs = kwargs or {}
    with torch._C.DisableTorchFunctionSubclass():
        if func is F.linear:  # the hot path: ahead of the table and its wrappers
            if torch.compiler.is_exporting():
                return exported_linear(*args, **kwargs)
            return linear(*args, **kwargs)
        handler = Int4OpaqueTensor._TORCH_FN_TABLE[Int4OpaqueTensor].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs)
        return func(*args, **kwargs)


Int4OpaqueTensor.__torch_dispatch__ = staticmethod(handle_op)
Int4OpaqueTensor.__torch_function__ = staticmethod(handle_function)


def stable_hash(t: Int4OpaqueTensor) -> str:
    """``_stable_hash_for_caching``: all that decides which ops a trace of ``t`` consists of.

    torch keeps traced graphs on disk. Which op `linear` traces depends on this process too, on its
    layout and on `set_kernel`: without them in the key, a graph made under AVX-512 would be reused
    under AVX2, on bytes in another order.
    """
    weight = t.packed()
    host = (
        TRACE_REVISION,
        native_layout(),
        native_kernel(weight.layout) is not None,
        decode_max_rows(weight),
    )
    scale = t.act_pre_scale
    pre_scale = None if scale is None else (scale.dtype, tuple(scale.shape))
    parts = (t.shape, t.dtype, t.device, t.requires_grad, t.block_size, t.qdata_layout, pre_scale)
    return f"{type(t).__qualname__}{host}{parts}"


Int4OpaqueTensor._stable_hash_for_caching = stable_hash


def _converted(
    t: Int4OpaqueTensor, kwargs: Kwargs, convert: Callable[[Tensor, torch.device], Tensor]
) -> Int4OpaqueTensor:
    """A tensor of converted parts, with the ``device`` and the logical ``dtype`` of ``kwargs``."""
    device = torch.device(kwargs.get("device") or t.device)
    if device.type not in ("cpu", "meta"):
        raise _wrong_device(device)
    scale = t.act_pre_scale
    return Int4OpaqueTensor(
        convert(t.qdata, device),
        convert(t.scale_and_zero, device),
        t.block_size,
        t.shape,
        t.qdata_layout,
        kwargs.get("dtype") or t.dtype,
        None if scale is None else convert(scale, device),
    )


def _shape_or_none(t: Int4OpaqueTensor) -> list[int] | None:
    return None if t.act_pre_scale is None else list(t.act_pre_scale.shape)


def _wrong_device(device: object) -> ValueError:
    return ValueError(
        f"a 4-bit CPU weight cannot move to {str(device)!r}; it runs on 'cpu' only, "
        "so keep the model there, or call .dequantize() and move that"
    )

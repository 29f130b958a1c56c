"""The config and its handler: through `quantize_`, torchao's own config, names, and serialization."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import json
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization as ao
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, quantize_
from torchao.quantization.quantize_.common.packing_format import PackingFormat
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, Int4PackingFormat
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER

import torchao_int4cpu
import torchao_int4cpu.quantize.config
from tests.numerics import assert_int4
from tests.processes import run_child
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor


def model(**kwargs: Any) -> Any:
    return nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 33, bias=False)).to(**kwargs)


ACCEPTED: list[Any] = [
    Int4WeightOnlyConfig(group_size=32),
    Int4WeightOnlyConfig(group_size=32, packing_format="opaque"),
    Int4WeightOnlyConfig(group_size=32, packing_format=PackingFormat.OPAQUE),
    Int4WeightOnlyConfig(group_size=32, int4_packing_format="opaque"),
    Int4WeightOnlyConfig(32),
    ao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="opaque"),
    ao.Int4WeightOnlyConfig(group_size=32, int4_packing_format=PackingFormat.OPAQUE),
]


@pytest.mark.parametrize("config", ACCEPTED, ids=range(len(ACCEPTED)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize_with_every_spelling(config: Any, dtype: torch.dtype) -> None:
    layers = model(dtype=dtype)
    original = layers[0].weight.detach().clone()
    quantize_(layers, config)
    for layer, shape in ((layers[0], (40, 70)), (layers[2], (33, 40))):
        assert_int4(layer.weight, shape, 32)
        assert isinstance(layer.weight, nn.Parameter)
        assert not layer.weight.requires_grad
    w = layers[0].weight
    assert isinstance(w, Int4OpaqueTensor)
    assert torch.equal(w.to_groupwise().codes, choose_qparams(original, 32).codes)
    x = torch.randn(3, 70, dtype=dtype)
    assert layers(x).shape == (3, 33)


def test_the_default_group_is_128() -> None:
    layers = model()
    quantize_(layers, Int4WeightOnlyConfig(packing_format="opaque"))
    assert_int4(layers[0].weight, (40, 70), 128)


@pytest.mark.parametrize("algorithm", ["tinygemm", "hqq", "mse", *Int4ChooseQParamsAlgorithm])
@pytest.mark.parametrize("cls", [Int4WeightOnlyConfig, ao.Int4WeightOnlyConfig])
def test_every_algorithm(algorithm: str, cls: Any) -> None:
    layer = nn.Linear(70, 40)
    expected = choose_qparams(layer.weight, 64, algorithm).codes
    config = cls(group_size=64, int4_packing_format="opaque", int4_choose_qparams_algorithm=algorithm)
    quantize_(layer, config)
    assert isinstance(layer.weight, Int4OpaqueTensor)
    assert torch.equal(layer.weight.to_groupwise().codes, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group_size": 48}, ValueError, "group_size=48 is not supported; choose 32"),
        ({"group_size": "32"}, TypeError, "group_size='32' is a str"),
        ({"packing_format": "plain"}, ValueError, "packing_format='plain' is not supported; choose"),
        (
            {"int4_packing_format": Int4PackingFormat.PRESHUFFLED},
            ValueError,
            "int4_packing_format=.*preshuffled.* is not supported",
        ),
        ({"int4_choose_qparams_algorithm": "gptq"}, ValueError, "'gptq' is not known; choose 'tin"),
    ],
)
def test_a_wrong_config_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Int4WeightOnlyConfig(**arguments)
    arguments = {"int4_packing_format": "opaque"} | arguments
    if arguments.get("packing_format") or arguments["int4_packing_format"] != "opaque":
        return
    layers = model()  # torchao's own class takes anything; the handler refuses it before any change
    with pytest.raises(error, match=message):
        quantize_(layers, ao.Int4WeightOnlyConfig(**arguments))
    assert type(layers[0].weight) is nn.Parameter


@pytest.mark.slow
def test_torchaos_other_formats_are_untouched() -> None:
    layer = nn.Linear(128, 64).bfloat16()
    with pytest.raises((AssertionError, ImportError, RuntimeError, AttributeError, ValueError)) as ours:
        quantize_(layer, ao.Int4WeightOnlyConfig(group_size=128))
    # without the entry point, by which torchao brings this package along
    done = run_child("torchaos_default_format", environment={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{type(ours.value).__name__} {ours.value}".strip()
    handler: Any = _QUANTIZE_CONFIG_HANDLER[ao.Int4WeightOnlyConfig]
    assert handler.torchao_handler.__module__ == "torchao.quantization.quant_api"


def test_importing_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # The class that is made again must not stay: pickles find it by name, others have the first.
    monkeypatch.setattr(torchao_int4cpu.quantize.config, "Int4WeightOnlyConfig", Int4WeightOnlyConfig)
    handler: Any = _QUANTIZE_CONFIG_HANDLER[ao.Int4WeightOnlyConfig]
    original = handler.torchao_handler
    config = Int4WeightOnlyConfig(group_size=32)
    importlib.import_module("torchao_int4cpu")
    importlib.reload(torchao_int4cpu)
    importlib.reload(torchao_int4cpu.quantize.config)
    again: Any = _QUANTIZE_CONFIG_HANDLER[ao.Int4WeightOnlyConfig]
    assert again.torchao_handler is original
    for usable in (
        config,
        torchao_int4cpu.quantize.config.Int4WeightOnlyConfig(group_size=32),
        ACCEPTED[5],
    ):
        layers = model()
        quantize_(layers, usable)
        assert_int4(layers[0].weight, (40, 70), 32)


def test_inductor_settings_are_left_alone_unless_asked() -> None:
    import torch._inductor.config as inductor

    before = inductor.coordinate_descent_tuning
    try:
        inductor.coordinate_descent_tuning = False
        quantize_(model(), Int4WeightOnlyConfig(group_size=32))
        assert not inductor.coordinate_descent_tuning
        quantize_(model(), Int4WeightOnlyConfig(group_size=32, set_inductor_config=True))
        assert inductor.coordinate_descent_tuning
    finally:
        inductor.coordinate_descent_tuning = before


# --- which layers -------------------------------------------------------------------------------


def test_filter_fn() -> None:
    layers = model()
    quantize_(layers, Int4WeightOnlyConfig(32), filter_fn=lambda module, name: name == "2")
    assert type(layers[0].weight) is nn.Parameter
    assert_int4(layers[2].weight, (33, 40), 32)


class Twin(nn.Module):
    """Two weights, neither of them called ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(40, 70))
        self.down = nn.Parameter(torch.randn(70, 40))

    def forward(self, x: Tensor) -> Tensor:
        up = torch.nn.functional.linear(x, self.up)
        return torch.nn.functional.linear(up, self.down)


def test_fqn_to_config_by_module_parameter_and_pattern() -> None:
    net = nn.ModuleDict({"a": nn.Linear(70, 40), "b": nn.Linear(70, 40), "twin": Twin()})
    config = FqnToConfig(
        {
            "a": Int4WeightOnlyConfig(group_size=32),
            "twin.up": Int4WeightOnlyConfig(group_size=64),
            r"re:twin\.down": ao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="opaque"),
        }
    )
    quantize_(net, config, filter_fn=None)
    assert_int4(net["a"].weight, (40, 70), 32)
    assert type(net["b"].weight) is nn.Parameter
    assert_int4(net["twin"].up, (40, 70), 64)
    assert net["twin"](torch.randn(2, 70)).shape == (2, 70)
    assert "up=Int4OpaqueTensor" in str(net["twin"])
    assert "down=Int4OpaqueTensor" in str(net["twin"])


def test_fqn_to_config_default_and_skip() -> None:
    layers = model()
    quantize_(layers, FqnToConfig({"_default": Int4WeightOnlyConfig(32), "0": None}), filter_fn=None)
    assert type(layers[0].weight) is nn.Parameter
    assert_int4(layers[2].weight, (33, 40), 32)


def test_a_module_at_two_places_is_quantized_once() -> None:
    shared = nn.Linear(40, 40)
    layers = nn.Sequential(shared, shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(layers, Int4WeightOnlyConfig(32))
        quantize_(layers, Int4WeightOnlyConfig(32))
    assert layers[0].weight is layers[1].weight
    assert str(layers).count("Int4OpaqueTensor") == 2


UNFIT: dict[str, tuple[nn.Parameter, str]] = {
    "float64": (nn.Parameter(torch.randn(4, 4).double()), "it is torch.float64, and only"),
    "rank": (nn.Parameter(torch.randn(2, 2, 4, 4)), r"its shape is \[2, 2, 4, 4\], and only"),
    "empty": (nn.Parameter(torch.randn(0, 4)), r"its shape is \[0, 4\]"),
    "4-bit": (
        nn.Parameter(Int4OpaqueTensor.from_hp(torch.randn(4, 4), [1, 64]), requires_grad=False),
        "it is 4-bit already, in groups of 64",
    ),
}


@pytest.mark.parametrize("kind", list(UNFIT))
def test_a_layer_that_cannot_be_quantized_stays_the_object_it_was(kind: str) -> None:
    weight, reason = UNFIT[kind]
    layers: Any = nn.Sequential(nn.Linear(70, 40), nn.Linear(4, 4))
    layers[1].weight = weight
    before = (weight.requires_grad, layers[1].extra_repr())
    with pytest.warns(UserWarning, match=rf"^1\.weight is left as it was: {reason}") as caught:
        quantize_(layers, Int4WeightOnlyConfig(32))
    assert len([w for w in caught if "left as it was" in str(w.message)]) == 1
    assert layers[1].weight is weight
    assert (weight.requires_grad, layers[1].extra_repr()) == before
    assert "extra_repr" not in vars(layers[1])
    assert_int4(layers[0].weight, (40, 70), 32)


#: Modules whose weight has 2 or 3 dimensions and is not multiplied with, or not as ``[N, K]``.
OTHER_MODULES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "conv1d": (lambda: nn.Conv1d(64, 32, 3), torch.randn(1, 64, 9), "Conv1d has no 4-bit"),
    "transposed conv1d": (
        lambda: nn.ConvTranspose1d(64, 32, 3),
        torch.randn(1, 64, 9),
        "ConvTranspose1d has no 4-bit",
    ),
    "bilinear": (lambda: nn.Bilinear(8, 6, 4), None, "Bilinear has no 4-bit implementation"),
    "bag": (lambda: nn.EmbeddingBag(9, 64), torch.tensor([[1, 2]]), "EmbeddingBag has no 4-bit"),
    "max_norm": (
        lambda: nn.Embedding(9, 64, max_norm=1.0),
        torch.tensor([1, 2]),
        "an embedding with max_norm rescales its rows",
    ),
}


@pytest.mark.parametrize("kind", list(OTHER_MODULES))
def test_a_module_that_means_something_else_by_its_weight_stays(kind: str) -> None:
    build, x, reason = OTHER_MODULES[kind]
    net: Any = nn.Sequential(build())
    weight = net[0].weight
    before = weight.detach().clone()
    with pytest.warns(UserWarning, match=rf"^0\.weight is left as it was: {reason}"):
        quantize_(net, Int4WeightOnlyConfig(32), filter_fn=lambda module, name: name == "0")
    assert net[0].weight is weight
    assert torch.equal(weight, before)
    assert "extra_repr" not in vars(net[0])
    inputs = (torch.randn(2, 8), torch.randn(2, 6)) if x is None else (x,)
    assert net[0](*inputs).isfinite().all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_by_name_stays(kind: Any) -> None:
    """Its weights go into an op of torch that knows no 4-bit ones; those of cells are products."""
    net: Any = nn.ModuleDict({"layer": kind(64, 64), "cell": nn.GRUCell(64, 64)})
    x = torch.randn(3, 2, 64)
    before = net["layer"](x)[0]
    message = rf"^layer\.weight_ih_l0 is left as it was: {kind.__name__} has no 4-bit implementation"
    with pytest.warns(UserWarning, match=message):
        quantize_(net, FqnToConfig({r"re:.*\.weight_.*": Int4WeightOnlyConfig(32)}), filter_fn=None)
    assert torch.equal(net["layer"](x)[0], before)
    assert_int4(net["cell"].weight_hh, (192, 64), 32)
    assert net["cell"](x[0]).isfinite().all()


@pytest.mark.parametrize("name", ["bias", "gate_up_proj_bias"])
def test_a_bias_is_left_as_it_was(name: str) -> None:
    """Those of experts are ``[E, N]``, and a pattern for the experts' names finds them, too."""
    experts = nn.Module()
    experts.register_parameter(name, nn.Parameter(torch.randn(4, 64)))
    net = nn.ModuleDict({"experts": experts})
    with pytest.warns(UserWarning, match=rf"^experts\.{name} is left as it was: it is a bias by its"):
        quantize_(net, FqnToConfig({f"experts.{name}": Int4WeightOnlyConfig(32)}), filter_fn=None)
    assert type(experts.get_parameter(name)) is nn.Parameter


@pytest.mark.parametrize("config", [ACCEPTED[0], ACCEPTED[5]], ids=["ours", "torchao's"])
def test_a_stack_through_a_linear_layer_as_vllm_does(config: Any) -> None:
    """torchao's ``_test_quantize_3d_param_similar_to_vllm``: a layer on meta takes a stack."""
    with torch.device("meta"):
        layer = nn.Linear(70, 40).to(torch.bfloat16)
    numbers = torch.randn(3, 48, 70).bfloat16()
    layer.weight = nn.Parameter(numbers.clone(), requires_grad=False)
    quantize_(layer, config)
    weight = layer.weight
    assert isinstance(weight, Int4OpaqueTensor)
    assert (weight.shape, weight.block_size) == ((3, 48, 70), [1, 1, 32])
    for i in range(3):
        matrix = assert_int4(weight[i], (48, 70), 32)
        assert torch.equal(matrix.to_groupwise().codes, choose_qparams(numbers[i], 32).codes)
    target = weight[1].clone()
    target.copy_(weight[2])
    assert torch.equal(target.dequantize(), weight[2].dequantize())


@pytest.mark.parametrize("flag", [True, 1, "yes", None])
def test_only_is_transposed_true_turns_a_stack(flag: object) -> None:
    """Any other truth is somebody else's attribute."""
    module: Any = nn.Module()
    module.is_transposed = flag
    module.stack = nn.Parameter(torch.randn(2, 64, 48))
    module.matrix = nn.Parameter(torch.randn(64, 48))  # of two dimensions: as it is, always
    net = nn.ModuleDict({"experts": module})
    config = Int4WeightOnlyConfig(32)
    both = FqnToConfig({"experts.stack": config, "experts.matrix": config})
    quantize_(net, both, filter_fn=None)
    assert isinstance(module.stack, Int4TransposedTensor) == (flag is True)
    assert module.stack.shape == (2, 64, 48)
    assert_int4(module.matrix, (64, 48), 32)
    quantize_(net, both, filter_fn=None)  # again: nothing to do, and no warning
    other = FqnToConfig({"experts.stack": Int4WeightOnlyConfig(64)})
    with pytest.warns(UserWarning, match=r"^experts\.stack is left as it was: it is 4-bit already, in"):
        quantize_(net, other, filter_fn=None)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_in_one_expert_is_named(bad: float) -> None:
    module: Any = nn.Module()
    module.first = nn.Parameter(torch.randn(2, 64, 48))
    module.second = nn.Parameter(torch.randn(2, 64, 48))
    with torch.no_grad():
        module.second[1, 3, 4] = bad
    before, config = module.second, Int4WeightOnlyConfig(32)
    both = FqnToConfig({"experts.first": config, "experts.second": config})
    message = (
        r"^experts\.second: weight has NaN or infinite values.* "
        r"4-bit already: experts\.first; every other layer is unchanged$"
    )
    with pytest.raises(ValueError, match=message):
        quantize_(nn.ModuleDict({"experts": module}), both, filter_fn=None)
    assert module.second is before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_is_named_with_the_layers_that_are_done(bad: float) -> None:
    net: Any = nn.Module()
    net.block = nn.Sequential(nn.Linear(70, 40), nn.Linear(40, 33), nn.Linear(33, 33))
    with torch.no_grad():
        net.block[1].weight[3, 4] = bad
    weights = [layer.weight for layer in net.block]
    message = (
        r"^block\.1\.weight: weight has NaN or infinite values.* "
        r"4-bit already: block\.0\.weight; every other layer is unchanged$"
    )
    with pytest.raises(ValueError, match=message):
        quantize_(net, Int4WeightOnlyConfig(32))
    assert net.block[1].weight is weights[1]
    assert net.block[2].weight is weights[2]


def test_a_nan_in_the_first_layer() -> None:
    layers = model()
    with torch.no_grad():
        layers[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^0\.weight: weight has NaN.* Nothing has been changed$"):
        quantize_(layers, Int4WeightOnlyConfig(32))


def test_names_through_fqn_to_config_and_without_a_model() -> None:
    layers = model()
    layers[2].weight.data.fill_(torch.nan)
    config = Int4WeightOnlyConfig(32)
    with pytest.raises(ValueError, match=r"^2\.weight: .*4-bit already: 0\.weight"):
        quantize_(layers, FqnToConfig({"0": config, "2": config}), filter_fn=None)
    with pytest.raises(ValueError, match=r"^weight of Linear\(in_features=40, .*\): weight has NaN"):
        quantize_(layers[2], config)
    with pytest.raises(ValueError, match=r"^weight of Linear.*This layer is unchanged$"):
        torchao_int4cpu.quantize.config.quantize_module(layers[2], config)


def test_a_meta_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"0\.weight: weight is on meta; only CPU weights"):
        quantize_(model(device="meta"), Int4WeightOnlyConfig(32))


def test_a_missing_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"1\.weight is not a parameter; choose modules that have"):
        quantize_(model(), Int4WeightOnlyConfig(32), filter_fn=lambda m, n: isinstance(m, nn.ReLU))


def test_printing_the_model_shows_what_each_layer_became() -> None:
    layers = model()
    quantize_(layers, Int4WeightOnlyConfig(32))
    for printed in (layers, copy.deepcopy(layers)):
        lines = str(printed).splitlines()
        assert lines[1].endswith(
            "Linear(in_features=70, out_features=40, bias=True, "
            "weight=Int4OpaqueTensor(shape=[40, 70], group_size=32, dtype=torch.float32))"
        )
    copied = copy.deepcopy(layers)
    assert copied[0].extra_repr.module is copied[0]
    copied.half()
    assert "torch.float16" in str(copied)
    assert "torch.float16" not in str(layers)


def test_a_deleted_model_is_freed_at_once() -> None:
    layer = nn.Linear(70, 40)
    quantize_(layer, Int4WeightOnlyConfig(32))
    alive = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert alive() is None
    finally:
        gc.enable()


def test_a_shallow_copy_prints_while_and_after_its_original_lives() -> None:
    layer = nn.Linear(70, 40)
    quantize_(layer, Int4WeightOnlyConfig(32))
    shallow = copy.copy(layer)
    assert "Int4OpaqueTensor" in str(shallow)
    del layer
    assert str(shallow) == str(copy.deepcopy(shallow)) == "Linear()"
    assert shallow(torch.ones(1, 70)).shape == (1, 40)


# --- serialization ------------------------------------------------------------------------------

CONFIGS = [
    Int4WeightOnlyConfig(),
    Int4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm="hqq"),
    Int4WeightOnlyConfig(group_size=256, int4_choose_qparams_algorithm="mse"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "hqq", "mse"])
def test_a_config_reads_back_as_torchaos_own(config: Int4WeightOnlyConfig) -> None:
    data = json.loads(json.dumps(config_to_dict(config)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = config_from_dict(data)
    assert type(back) is ao.Int4WeightOnlyConfig
    assert {f.name: getattr(back, f.name) for f in dataclasses.fields(back)} == {
        f.name: getattr(config, f.name) for f in dataclasses.fields(back)
    }
    assert back.int4_packing_format == "opaque"
    layers = model()
    quantize_(layers, back)
    assert_int4(layers[0].weight, (40, 70), config.group_size)


@pytest.mark.parametrize(
    "seed", ["0", *(pytest.param(seed, marks=pytest.mark.slow) for seed in ("1", "2", "5"))]
)
@pytest.mark.slow
def test_serialization_does_not_depend_on_the_hash_seed(seed: str) -> None:
    """torchao looks a class name up in a *set* of modules."""
    done = run_child("serialized_config", environment={"PYTHONHASHSEED": seed})
    assert done.stdout.split() == [
        "torchao.quantization.quant_api",
        "opaque",
        "Int4OpaqueTensor",
    ], done.stderr


def test_replace_and_both_spellings() -> None:
    base: Any = Int4WeightOnlyConfig(32)
    config = dataclasses.replace(base, group_size=64)
    assert config.group_size == 64
    assert config.packing_format == config.int4_packing_format == "opaque"
    assert "packing_format" not in vars(config)
    assert copy.deepcopy(config) == config

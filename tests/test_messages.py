"""What users read when something is wrong, word for word: what was got, the rule, the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_

from tests.numerics import random_groupwise
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig


def weight(**kwargs: Any) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(random_groupwise(40, 70, 32), **kwargs)


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def messages_of(*calls: Callable[[], object]) -> str:
    return "\n".join(message_of(call) for call in calls)


def nan_model() -> Any:
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    return model


class TestMessages(expecttest.TestCase):  # type: ignore[misc]  # has no annotations
    maxDiff = None

    def test_quantizing(self) -> None:
        self.assertExpectedInline(
            messages_of(
                lambda: Int4WeightOnlyConfig(group_size=48),
                lambda: Int4WeightOnlyConfig(packing_format="plain"),
                lambda: Int4WeightOnlyConfig(int4_choose_qparams_algorithm="gptq"),
                lambda: Int4OpaqueTensor.from_hp(torch.zeros(4, 64), [64]),
                lambda: Int4OpaqueTensor.from_hp(torch.zeros(4, 64).double(), [1, 64]),
                lambda: Int4OpaqueTensor.from_hp(torch.zeros(2, 4, 64), [1, 64]),
                lambda: quantize_(nan_model(), Int4WeightOnlyConfig(32)),
                lambda: GroupwiseInt4(
                    torch.zeros(4, 40, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 1), 32
                ),
            ),
            """\
ValueError: group_size=48 is not supported; choose 32, 64, 128 or 256
ValueError: packing_format='plain' is not supported; choose 'opaque', or use torchao.quantization.Int4WeightOnlyConfig for torchao's own formats
ValueError: int4_choose_qparams_algorithm='gptq' is not known; choose 'tinygemm', 'hqq', 'mse'
ValueError: block_size is [64]; it must be [1, group_size] with a group_size of 32, 64, 128 or 256
TypeError: weight is torch.float64; convert it to bfloat16, float16 or float32 first
ValueError: weight has shape [2, 4, 64]; only [N, K] with N >= 1 and K >= 1 can be quantized
ValueError: 1.weight: weight has NaN or infinite values; every value must be finite, so check the checkpoint it came from. 4-bit already: 0.weight; every other layer is unchanged
ValueError: scale has shape [4, 1]; codes of shape [4, 40] in groups of 32 need [4, 2]""",
        )

    def test_running(self) -> None:
        self.assertExpectedInline(
            messages_of(
                lambda: F.linear(torch.zeros(3, 71), weight()),
                lambda: F.linear(torch.zeros(3, 70).double(), weight()),
                lambda: F.linear(torch.zeros(3, 70, device="meta"), weight()),
                lambda: F.linear(weight(), torch.zeros(5, 70)),
                lambda: weight().to("cuda"),
                lambda: weight().double(),
            ),
            """\
ValueError: linear got an activation of shape [3, 71] for a 4-bit weight of shape [40, 70]; the last dimension must be K=70
TypeError: linear got a torch.float64 activation; convert it to bfloat16, float16 or float32
ValueError: linear got an activation on meta and a 4-bit weight on cpu; both must be on 'cpu', so move the activation with .to('cpu')
TypeError: linear got a 4-bit tensor that is not its weight; only the weight can be one, so call .dequantize() on the other
ValueError: a 4-bit CPU weight cannot move to 'cuda'; it runs on 'cpu' only, so keep the model there, or call .dequantize() and move that
TypeError: dtype is torch.float64; choose torch.bfloat16, torch.float16 or torch.float32""",
        )

    def test_loading(self) -> None:
        t = weight()
        parts: dict[str, Any] = {
            "qdata": t.qdata,
            "scale_and_zero": t.scale_and_zero,
            "block_size": [1, 32],
            "shape": (40, 70),
            "qdata_layout": "avx512",
            "dtype": torch.bfloat16,
        }
        self.assertExpectedInline(
            messages_of(
                lambda: Int4OpaqueTensor(
                    **(parts | {"scale_and_zero": t.scale_and_zero[:2].contiguous()})
                ),
                lambda: Int4OpaqueTensor(**(parts | {"scale_and_zero": t.scale_and_zero.float()})),
                lambda: Int4OpaqueTensor(**(parts | {"qdata": t.qdata[:16]})),
                lambda: Int4OpaqueTensor(**(parts | {"qdata_layout": "sse"})),
                lambda: Int4OpaqueTensor(**(parts | {"act_pre_scale": torch.ones(3)})),
                lambda: Int4OpaqueTensor.__new__(Int4OpaqueTensor, **parts).__setstate__({}),
                lambda: weight().copy_(torch.zeros(40, 70)),
                lambda: Int4OpaqueTensor.from_upstream(torch.zeros(2, 2), layout="avx512"),
            ),
            """\
ValueError: scale_and_zero has shape [2, 48, 2]; a weight of shape [40, 70] needs [3, 48, 2]
TypeError: scale_and_zero is torch.float32; it must be a torch.bfloat16 tensor
ValueError: qdata has shape [16, 48]; a weight of shape [40, 70] needs [48, 48]
ValueError: layout 'sse' is not known; choose 'avx512', 'avx2', 'default'
ValueError: act_pre_scale has shape [3]; it must have one element or shape [70]
ValueError: a saved 4-bit weight has format_version=None; it must be an int from 1 to 1, so the file is damaged or was not written by torchao_int4cpu
TypeError: copy_ got a source that is torch.float32 of class Tensor and not 4-bit as the other side is; quantize_ the model before you load a 4-bit state dict, or load it with load_state_dict(..., assign=True)
TypeError: got a torch.Tensor; from_upstream converts torchao.prototype.quantization.int4.Int4OpaqueTensor""",
        )

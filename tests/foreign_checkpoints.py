"""Checkpoints in the formats of other tools, written by their layouts from codes, points and scales."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

#: Of AWQ: the nibble that holds row i of the eight of a word.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Foreign(NamedTuple):
    """A weight ``[N, K]`` as these tools have it: ``W = (code - point) * scale``, exact in float32."""

    codes: Tensor  # uint8 [N, K]
    points: Tensor  # int64 [N, G], 0 to 15
    scale: Tensor  # float16 [N, G]
    group_size: int
    order: Tensor  # int64 [K], the columns of the groups, one group behind the other

    @property
    def g_idx(self) -> Tensor:
        """The group of each column."""
        groups = torch.arange(len(self.order)) // self.group_size
        return torch.empty_like(groups).scatter_(0, self.order, groups)

    def dense(self) -> Tensor:
        points, scale = (part[:, self.g_idx].double() for part in (self.points, self.scale))
        return (self.codes.double() - points) * scale


def foreign(weight: Tensor, group_size: int, symmetric: bool, order: Tensor | None = None) -> Foreign:
    """Rounded to nearest: zero points 8, or 1 to 15; in groups of columns in ``order``."""
    k = weight.shape[1]
    order = torch.arange(k) if order is None else order
    weight = weight[:, order]
    group_size = min(group_size, k) if group_size > 0 else k
    padded = torch.nn.functional.pad(weight.float(), (0, -k % group_size))
    grouped = padded.unflatten(1, (-1, group_size))
    if symmetric:
        scale = (grouped.abs().amax(-1) / 7.5).half()
        points = torch.full(scale.shape, 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).half()
        points = (-low / scale.float()).round().clamp(1, 15).long()
    codes = (grouped / scale.float()[..., None]).round() + points[..., None]
    codes = codes.clamp(0, 15).to(torch.uint8).flatten(1)[:, :k]
    return Foreign(codes[:, order.argsort()], points, scale, group_size, order)


def _padded(t: Tensor, dim: int) -> Tensor:
    """To a multiple of 8 along ``dim``."""
    missing = -t.shape[dim] % 8
    return torch.cat([t, t.new_zeros(*t.shape[:dim], missing, *t.shape[dim + 1 :])], dim)


def pack_words(codes: Tensor, dim: int, order: Sequence[int] = range(8)) -> Tensor:
    """int32 words of eight codes along ``dim``; ``order[i]`` is the nibble of code i, 0 the lowest."""
    words = torch.zeros_like(codes.unflatten(dim, (-1, 8)).select(dim + 1, 0), dtype=torch.int64)
    for i, nibble in enumerate(order):
        words += codes.unflatten(dim, (-1, 8)).select(dim + 1, i).to(torch.int64) << 4 * nibble
    return torch.where(words < 2**31, words, words - 2**32).to(
        torch.int32
    )  # the highest bit is the sign


def gptq_parts(weight: Foreign, version: int = 1) -> dict[str, Tensor]:
    return {
        "qweight": pack_words(_padded(weight.codes.t(), 0), 0),
        "qzeros": pack_words(_padded(weight.points.t() - int(version == 1), 1), 1),
        "scales": weight.scale.t().contiguous(),
        "g_idx": weight.g_idx.int(),
    }


def awq_parts(weight: Foreign) -> dict[str, Tensor]:
    return {
        "qweight": pack_words(_padded(weight.codes.t(), 1), 1, AWQ_ORDER),
        "qzeros": pack_words(_padded(weight.points.t(), 1), 1, AWQ_ORDER),
        "scales": weight.scale.t().contiguous(),
    }


def compressed_tensors_parts(weight: Foreign, symmetric: bool = False) -> dict[str, Tensor]:
    parts = {
        "weight_packed": pack_words(_padded(weight.codes, 1), 1),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_words(_padded(weight.points, 0), 0)
    if not torch.equal(weight.order, torch.arange(len(weight.order))):
        parts["weight_g_idx"] = weight.g_idx.int()
    return parts


def mlx_parts(weight: Foreign, every: int = 0) -> dict[str, Tensor]:
    """The zero point as a bias, exact in float32; one of ``every`` scales is negative."""
    scale = weight.scale.float()
    numbers = torch.arange(scale.numel()).view(scale.shape)
    turned = numbers % every == 0 if every else numbers < 0
    codes = torch.where(turned[:, weight.g_idx], 15 - weight.codes, weight.codes)
    biases = torch.where(turned, 15 - weight.points, -weight.points) * scale
    scales = torch.where(turned, -scale, scale)
    words = pack_words(_padded(codes, 1), 1).view(torch.uint32)
    return {"weight": words, "scales": scales, "biases": biases}


def config_of_format(format: str, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The ``quantization_config``; for the formats of `parts_of`."""
    if format == "mlx":
        return {"bits": 4, "group_size": group_size}
    if format == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    if format == "compressed-tensors":
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group",
            "group_size": group_size,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "checkpoint_format": format,
    }


def parts_of(format: str, weight: Foreign, symmetric: bool) -> dict[str, Tensor]:
    """Of "gptq", "gptq_v2", "awq", "compressed-tensors" or "mlx"."""
    if format == "awq":
        return awq_parts(weight)
    if format == "mlx":
        return mlx_parts(weight)
    if format == "compressed-tensors":
        return compressed_tensors_parts(weight, symmetric)
    return gptq_parts(weight, 2 if format == "gptq_v2" else 1)


def save_foreign(
    folder: Path,
    model: Any,
    format: str,
    group_size: int = 32,
    symmetric: bool = False,
    *,
    head: bool = False,
    embeddings: bool = False,
    own_groups: Mapping[str, int] | None = None,
    act_order: bool = False,
) -> dict[str, Foreign]:
    """Write a model with all linear layers (but the head) in 4 bits; return these by their names.

    ``own_groups`` are group sizes of layers whose names end so, of which the config says nothing. With
    ``act_order`` the groups of each layer are of columns in an order of its own.

    The experts of a layer, which transformers stacks, are written one by one, as these tools do.
    """
    state, weights = {}, {}
    for name, tensor in model.state_dict().items():
        for key, matrix in _matrices(name, tensor):
            ends = (head and "lm_head" in key) or (embeddings and "embed" in key)
            if matrix.ndim != 2 or not ("proj" in key or ends):
                state[key] = matrix.clone()
                continue
            own = [size for end, size in (own_groups or {}).items() if key.endswith(f"{end}.weight")]
            size, order = own[0] if own else group_size, None
            if act_order:
                order = torch.randperm(matrix.shape[1])
            weights[key] = foreign(matrix, size, symmetric, order)
            for part, value in parts_of(format, weights[key], symmetric).items():
                state[f"{key.removesuffix('weight')}{part}"] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = config_of_format(format, group_size, symmetric)
    if format == "mlx":
        config["quantization"] = config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def _matrices(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        halves = [("gate_proj", 0), ("up_proj", 1)]
        return [
            (f"{stem}.{e}.{half}.weight", expert.chunk(2)[i])
            for e, expert in enumerate(tensor)
            for half, i in halves
        ]
    if last == "down_proj":
        return [(f"{stem}.{e}.down_proj.weight", expert) for e, expert in enumerate(tensor)]
    return [(name, tensor)]

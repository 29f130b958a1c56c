"""What makes and runs 4-bit weights in vLLM's layers: the "method" for which vLLM asks by layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.torchao import TorchAOConfig, TorchAOLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from torchao_int4cpu.integrations import vllm_configs
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


def method_of(config: Any, layer: nn.Module, prefix: str) -> Any:
    """What makes and runs the weight of a layer; None where vLLM's own does, for dense ones.

    Raises:
        ValueError: vLLM joins weights that the checkpoint has in different ways.
    """
    if isinstance(layer, LinearBase):
        found = vllm_configs.of_linear(config, prefix)
        return UnquantizedLinearMethod() if found is None else TorchAOLinearMethod(_only(config, found))
    if isinstance(layer, VocabParallelEmbedding):
        found = vllm_configs.of_vocabulary(config, prefix, isinstance(layer, ParallelLMHead))
        return None if found is None else Int4EmbeddingMethod(_only(config, found))
    if isinstance(layer, RoutedExperts):
        found = vllm_configs.of_experts(config, prefix)
        return None if found is None else Int4ExpertsMethod(layer.moe_config, found.group_size)
    return None


def _only(config: Any, found: Any) -> Any:
    """vLLM's config with one of torchao's for all."""
    return TorchAOConfig(found, config.skip_modules, config.is_checkpoint_torchao_serialized)


class Int4EmbeddingMethod(TorchAOLinearMethod):  # type: ignore[misc]  # vLLM is not there for mypy
    """A 4-bit input embedding, or a head; its rows are padded to a multiple of vLLM's."""

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Allocate zeros, of which a checkpoint fills the rows that it has."""
        attributes["weight_loader"] = functools.partial(_load_rows, layer)
        super().create_weights(layer, *sizes, **attributes)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Look rows up."""
        return F.embedding(ids, layer.weight)


def _load_rows(layer: Any, parameter: Tensor, loaded: Tensor) -> None:
    """The rows of a vocabulary that are this process's."""
    places = layer.shard_indices
    start, stop = places.org_vocab_start_index, places.org_vocab_end_index
    parameter.data.narrow(0, 0, stop - start).copy_(loaded.narrow(0, start, stop - start))


class Int4ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts as stacks of 4-bit weights: ``w13_weight [E, 2 I, H]`` and ``w2_weight [E, H, I]``."""

    def __init__(self, moe: Any, group_size: int) -> None:
        super().__init__(moe)
        if moe.has_bias:
            raise ValueError("experts with a bias have no 4-bit method in vLLM; keep them dense")
        self._group_size = group_size

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Allocate zeros, which a checkpoint fills."""
        up = intermediate_size_per_partition * (2 if self.moe.is_act_and_mul else 1)
        for name, shape in (
            ("w13_weight", (num_experts, up, hidden_size)),
            ("w2_weight", (num_experts, hidden_size, intermediate_size_per_partition)),
        ):
            empty = Int4OpaqueTensor.empty(shape, self._group_size, params_dtype)
            weight = nn.Parameter(empty.new_zeros(empty.shape), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, attributes)
        # The names of stacks, as transformers has them of all models: Mixtral's files say w1, w2, w3.
        layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name = "gate_proj", "up_proj"
        layer.ckpt_down_proj_name = "down_proj"

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """vLLM's own kernels are not used."""
        return

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The sum of what the chosen experts say of each row, ``[M, H]``."""
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        order = ids.flatten().argsort(stable=True)
        order = order[int((ids < 0).sum()) :]  # experts of other processes come first
        counts = torch.bincount(ids.flatten()[order], minlength=layer.w13_weight.shape[0])
        ends = counts.cumsum(0).to(torch.int32)
        rows = order // ids.shape[1]
        weights = topk_weights.flatten()[order][:, None]
        inputs = x[rows]
        if layer.apply_router_weight_on_input:
            inputs = inputs * weights.to(x.dtype)
        up = torch._grouped_mm(inputs, layer.w13_weight.transpose(-2, -1), offs=ends)
        width = layer.w2_weight.shape[-1]
        hidden = apply_moe_activation(layer.activation, up.new_empty(len(up), width), up)
        down = torch._grouped_mm(hidden, layer.w2_weight.transpose(-2, -1), offs=ends)
        if not layer.apply_router_weight_on_input:
            down = down * weights
        return torch.zeros_like(x, dtype=down.dtype).index_add_(0, rows, down).to(x.dtype)

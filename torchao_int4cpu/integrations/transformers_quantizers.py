"""How `from_pretrained` reads GPTQ, AWQ and compressed-tensors: by weights of this package.

A module keeps its class, and gets the weight that the parts in the file stand for. Once all are there,
the model is one that torchao's weights were loaded into: it is saved, and loaded again, as such.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.importers.awq import groupwise_of_awq
from torchao_int4cpu.importers.compressed_tensors import groupwise_of_compressed_tensors
from torchao_int4cpu.importers.gptq import groupwise_of_gptq
from torchao_int4cpu.importers.weight import as_weight, common_order
from torchao_int4cpu.importers.words import CODES
from torchao_int4cpu.integrations.transformers_saving import config_of, int4_groups
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

Parts = dict[str, Tensor]


class CompressedTensorsConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no annotations
    """What config.json says, without the package that transformers' own class of this name needs.

    transformers compares the names of the classes of this and of a config that is passed beside it.
    """

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], return_unused_kwargs: bool = False, **others: Any
    ) -> Any:
        config = cls(**values)
        return (config, others) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class ImportingQuantizer(HfQuantizer):  # type: ignore[misc]
    """What the formats share."""

    #: The names of the parts of a weight, in the file.
    names: ClassVar[tuple[str, ...]]
    requires_calibration = False

    def check_config(self) -> None:
        """Refuse what the config says is not in 4 bits.

        Raises:
            ValueError: with the reason.
        """
        raise NotImplementedError

    def check_model(self, config: Any) -> None:
        """Refuse models whose weights are not all that the tool changes.

        Raises:
            ValueError: with the reason.
        """

    def read(self, parts: Parts, k: int) -> GroupwiseInt4:
        """The weight of a layer with K inputs."""
        raise NotImplementedError

    def inputs(self, parts: Parts) -> int:
        """K, of an expert, whose module transformers has merged with others."""
        raise NotImplementedError

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return {"weight": list(self.names)}

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": ReadWeight, "dequantize": ReadExperts}

    def get_weight_conversions(self) -> list[Any]:
        return [
            WeightConverter(
                source_patterns=[rf"\.{name}$" for name in self.names],
                target_patterns=".weight",
                operations=[ReadWeight(self)],
            )
        ]

    def weight(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Int4OpaqueTensor:
        """The weight that parts stand for.

        Args:
            parts: by their names in the file.
            shape: ``[N, K]`` of the layer.
            dtype: that the layer computes in.

        Raises:
            TypeError, ValueError: they do not fit together, or not to the layer.
        """
        groupwise = self.read(parts, shape[-1])
        if groupwise.shape != shape:
            raise ValueError(
                f"the file has a weight of shape {list(groupwise.shape)} where the model has one of "
                f"{list(shape)}; the config and the weights are of two models"
            )
        return as_weight(groupwise, dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.check_model(model.config)
        stacks = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
        if stacks and not hasattr(HfQuantizer, "get_load_operations"):  # 5.16 has not, 5.24 has
            raise ValueError(
                f"{stacks[0]} is a stack of experts, which the installed transformers cannot read "
                "in 4 bits; install 5.24 or newer, or use the command convert"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return hand_over(self, model, **kwargs)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def hand_over(quantizer: Any, model: Any, **kwargs: Any) -> Any:
    """Hand a model that was loaded over to transformers' quantizer of torchao, which saves it."""
    model._weight_conversions = None
    if not int4_groups(model):
        quantizer.remove_quantization_config(model)
        return model
    config = config_of(model)
    model.config.quantization_config = config
    model.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    model.quantization_method = config.quant_method
    return model.hf_quantizer._process_model_after_weight_loading(model, **kwargs)


class Gptq(ImportingQuantizer):
    names = ("qweight", "qzeros", "scales", "g_idx")

    def check_config(self) -> None:
        _check_bits(self.quantization_config.bits)
        if self.version not in VERSIONS:
            raise ValueError(
                f"checkpoint_format is {self.version!r}; 'gptq' and 'gptq_v2' are read, so convert the "
                "checkpoint with GPTQModel"
            )

    @property
    def version(self) -> str:
        config = self.quantization_config
        return str(getattr(config, "format", None) or getattr(config, "checkpoint_format", "gptq"))

    def read(self, parts: Parts, k: int) -> GroupwiseInt4:
        _check_there(parts, "qweight", "qzeros", "scales")
        return groupwise_of_gptq(
            **parts, k=k, version=VERSIONS[self.version], group_size=self.quantization_config.group_size
        )

    def inputs(self, parts: Parts) -> int:
        return len(parts["g_idx"]) if "g_idx" in parts else CODES * parts["qweight"].shape[0]


class Awq(ImportingQuantizer):
    names = ("qweight", "qzeros", "scales")

    def check_config(self) -> None:
        _check_bits(self.quantization_config.bits)
        version = getattr(self.quantization_config, "format", "gemm")
        version = str(getattr(version, "value", version))
        if version != "gemm":
            raise ValueError(
                f"the AWQ checkpoint has version {version!r}; only 'gemm' is read, so convert it, or "
                "load it after torchao_int4cpu.import_checkpoints(False)"
            )

    def check_model(self, config: Any) -> None:
        """Refuse models whose activations AWQ divides by numbers of the file."""
        kind = config.model_type
        if kind in AWQ_SCALES_MAPPINGS:
            raise ValueError(
                f"AWQ scales the activations of {kind} models (ScaledActivation), which is not read; "
                "load it after torchao_int4cpu.import_checkpoints(False), or a GPTQ checkpoint of it"
            )

    def read(self, parts: Parts, k: int) -> GroupwiseInt4:
        _check_there(parts, *self.names)
        return groupwise_of_awq(**parts, k=k, group_size=self.quantization_config.group_size)

    def inputs(self, parts: Parts) -> int:
        return parts["qweight"].shape[0]


class CompressedTensors(ImportingQuantizer):
    names = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    def check_config(self) -> None:
        config = self.quantization_config
        format = getattr(config, "format", None)
        if format != "pack-quantized":
            raise ValueError(
                f"the compressed-tensors checkpoint has format {format!r}; only 'pack-quantized' in 4 "
                "bits is read, so load it after torchao_int4cpu.import_checkpoints(False)"
            )
        for weights in self._configured():
            _check_bits(weights.get("num_bits"))
        for group in config.config_groups.values():
            if group.get("input_activations") is not None:
                raise ValueError(
                    "the compressed-tensors checkpoint rounds activations (input_activations), which "
                    "4-bit weights of this package do not; load it after "
                    "torchao_int4cpu.import_checkpoints(False)"
                )

    def read(self, parts: Parts, k: int) -> GroupwiseInt4:
        _check_there(parts, "weight_packed", "weight_scale", "weight_shape")
        sizes = {weights.get("group_size") for weights in self._configured()}
        group_size = sizes.pop() if len(sizes) == 1 else None
        return groupwise_of_compressed_tensors(**parts, group_size=group_size)

    def inputs(self, parts: Parts) -> int:
        return int(parts["weight_shape"][-1])

    def _configured(self) -> list[dict[str, Any]]:
        groups = getattr(self.quantization_config, "config_groups", None)
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise ValueError(
                f"config_groups of the compressed-tensors checkpoint is a {type(groups).__name__}; it "
                "must name groups of layers and their weights, so config.json is damaged"
            )
        return [group.get("weights") or {} for group in groups.values()]


#: By ``quant_method``.
QUANTIZERS = {"gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors}
#: By ``checkpoint_format``.
VERSIONS = {"gptq": 1, "gptq_v2": 2}


class _Reading(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: ImportingQuantizer) -> None:
        self.hf_quantizer = hf_quantizer


class ReadWeight(_Reading):
    """The parts of one weight to the weight."""

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: str = "", **others: Any
    ) -> dict[str, Tensor]:
        parts = {_last_name(pattern): _only(found) for pattern, found in input_dict.items()}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        dense = module.weight
        weight = nn.Parameter(
            self.hf_quantizer.weight(parts, dense.shape, dense.dtype), requires_grad=False
        )
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return {full_layer_name: weight}


class ReadExperts(_Reading):
    """The parts of the weights of all experts to these weights, which transformers then stacks."""

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: str = "", **others: Any
    ) -> dict[str, Any]:
        first = self.hf_quantizer.names[0]
        stems = [pattern.removesuffix(first) for pattern in input_dict if pattern.endswith(first)]
        if not stems:
            return input_dict  # experts that the file has dense
        dtype = model.get_parameter(full_layer_name).dtype
        read = {}
        for stem in stems:
            columns = {
                name: input_dict[stem + name]
                for name in self.hf_quantizer.names
                if stem + name in input_dict
            }
            experts = [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]
            weights = [self._expert(parts, dtype) for parts in experts]
            common_order([weight.act_order for weight in weights])
            read[stem + first] = weights
        return read

    def _expert(self, parts: Parts, dtype: torch.dtype) -> Int4OpaqueTensor:
        return as_weight(self.hf_quantizer.read(parts, self.hf_quantizer.inputs(parts)), dtype)


def _last_name(pattern: str) -> str:
    return re.sub(r"[^a-z_]", "", pattern.rpartition(".")[2])


def _only(found: Any) -> Tensor:
    tensor: Tensor = found[0] if isinstance(found, list) else found
    return tensor


def _check_bits(bits: object) -> None:
    if bits != 4:
        raise ValueError(
            f"the checkpoint has weights of {bits} bits; only those of 4 are read, so load it after "
            "torchao_int4cpu.import_checkpoints(False)"
        )


def _check_there(parts: Parts, *names: str) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(
            f"the file has no {' and no '.join(missing)} beside {', '.join(parts)}; it is damaged, or "
            "a shard of it is not there"
        )

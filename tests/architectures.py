"""Small random models of many architectures of transformers, and inputs for them.

Hidden size 64, two layers: the shapes of the linear layers are those of the large ones, in small. Where
a config has names of its own for the sizes, its entry has them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers

HIDDEN = 64
VOCABULARY = 120

#: What most models call their sizes.
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}
BART = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
T5 = {
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": 112,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
}
IMAGE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
WAVE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
MOE = HEADS | {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


class Architecture(NamedTuple):
    """A model class of transformers, what its config is made with, and what it is called with."""

    model: str
    config: str
    sizes: dict[str, Any]
    inputs: str = "tokens"


def _lm(prefix: str, sizes: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{prefix}ForCausalLM", f"{prefix}Config", sizes | more)


def _text(prefix: str, sizes: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{prefix}ForMaskedLM", f"{prefix}Config", sizes | more)


ARCHITECTURES: dict[str, Architecture] = {
    # encoders
    "bert": _text("Bert", TEXT),
    "roberta": _text("Roberta", TEXT),
    "electra": _text("Electra", TEXT, embedding_size=HIDDEN),
    "albert": _text("Albert", TEXT, embedding_size=32),
    "mpnet": _text("MPNet", TEXT),
    "distilbert": _text(
        "DistilBert",
        {"dim": HIDDEN, "hidden_dim": 112, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY},
    ),
    "deberta-v2": _text("DebertaV2", TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": _text("ModernBert", TEXT, cls_token_id=1, sep_token_id=2),
    # decoders
    "llama": _lm("Llama", HEADS),
    "mistral": _lm("Mistral", HEADS),
    "qwen2": _lm("Qwen2", GROUPED),
    "qwen3": _lm("Qwen3", HEADS),
    "gemma2": _lm("Gemma2", HEADS),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "phi": _lm("Phi", TEXT),
    "phi3": _lm("Phi3", GROUPED),
    "gpt-neox": _lm("GPTNeoX", TEXT),
    "gptj": _lm(
        "GPTJ", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": VOCABULARY}
    ),
    "opt": _lm("OPT", TEXT, ffn_dim=112, word_embed_proj_dim=HIDDEN),
    "bloom": _lm("Bloom", {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "falcon": _lm("Falcon", TEXT),
    "stablelm": _lm("StableLm", GROUPED),
    "olmo2": _lm("Olmo2", GROUPED),
    "cohere": _lm("Cohere", GROUPED),
    "starcoder2": _lm("Starcoder2", GROUPED),
    "smollm3": _lm("SmolLM3", GROUPED),
    "granite": _lm("Granite", GROUPED),
    "glm4": _lm("Glm4", HEADS),
    # experts: their stacks stay dense by the default filter, all linear layers become 4-bit
    "mixtral": _lm("Mixtral", HEADS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _lm("Qwen3Moe", MOE, num_experts=4),
    "olmoe": _lm("Olmoe", GROUPED, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": _lm("GptOss", HEADS, num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v3": _lm(
        "DeepseekV3",
        TEXT,
        num_key_value_heads=4,
        moe_intermediate_size=48,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    ),
    # state spaces, alone and with attention
    "mamba": _lm(
        "Mamba",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8, "vocab_size": VOCABULARY},
    ),
    "mamba2": _lm(
        "Mamba2",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8, "vocab_size": VOCABULARY},
        head_dim=16,
        num_heads=8,
        n_groups=1,
        chunk_size=8,
    ),
    "jamba": _lm(
        "Jamba",
        GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
    ),
    "bamba": _lm(
        "Bamba",
        GROUPED,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        attn_layer_indices=[1],
    ),
    "falcon-h1": _lm(
        "FalconH1",
        HEADS,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_ssm=128,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "recurrent-gemma": _lm(
        "RecurrentGemma", GROUPED, lru_width=HIDDEN, block_types=["recurrent", "attention"]
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        "RwkvConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "context_length": 64}
        | {"rescale_every": 1},  # divides weights in place, by powers of two
    ),
    # encoder-decoders
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, "pairs"),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", BART, "pairs"),
    "pegasus": Architecture("PegasusForConditionalGeneration", "PegasusConfig", BART, "pairs"),
    "marian": Architecture("MarianMTModel", "MarianConfig", BART, "pairs"),
    # vision
    "vit": Architecture("ViTForImageClassification", "ViTConfig", IMAGE, "pixels"),
    "deit": Architecture("DeiTForImageClassification", "DeiTConfig", IMAGE, "pixels"),
    "dinov2": Architecture("Dinov2ForImageClassification", "Dinov2Config", IMAGE, "pixels"),
    "beit": Architecture("BeitForImageClassification", "BeitConfig", IMAGE, "pixels"),
    "siglip": Architecture("SiglipVisionModel", "SiglipVisionConfig", IMAGE, "pixels"),
    "clip": Architecture("CLIPVisionModel", "CLIPVisionConfig", IMAGE, "pixels"),
    "swin": Architecture(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4]}
        | {"window_size": 4},
        "pixels",
    ),
    # audio
    "wav2vec2": Architecture("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVE | {"vocab_size": 32}, "waves"),
    "hubert": Architecture("HubertForCTC", "HubertConfig", WAVE | {"vocab_size": 32}, "waves"),
    "ast": Architecture(
        "ASTForAudioClassification",
        "ASTConfig",
        IMAGE
        | {
            "patch_size": 8,
            "max_length": 32,
            "num_mel_bins": 16,
            "time_stride": 8,
            "frequency_stride": 8,
        },
        "spectrum",
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        BART
        | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32}
        | {"decoder_start_token_id": 1},
        "mel",
    ),
}


def build(name: str, dtype: torch.dtype) -> Any:
    """A random model; two calls after the same seed give the same one."""
    architecture = ARCHITECTURES[name]
    config = getattr(transformers, architecture.config)(**architecture.sizes)
    model = getattr(transformers, architecture.model)._from_config(config, dtype=dtype)
    return model.eval()


def inputs(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A batch of two."""
    ids = 3 + torch.arange(24).view(2, 12) % (32 - 3)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    kinds = {
        "tokens": lambda: {"input_ids": ids},
        "pairs": lambda: {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        "pixels": lambda: {"pixel_values": noise(2, 3, 32, 32)},
        "waves": lambda: {"input_values": noise(2, 400)},
        "spectrum": lambda: {"input_values": noise(2, 32, 16)},
        "mel": lambda: {"input_features": noise(2, 16, 32), "decoder_input_ids": ids[:, :5]},
    }
    return kinds[ARCHITECTURES[name].inputs]()

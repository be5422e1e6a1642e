"""A cache of the Hugging Face hub with random models of the classes and names that peft's MoE tests load.

For a machine that cannot reach the hub. Tests that compare with the outputs of trained weights fail on these models,
with moekern and without it.
"""

from __future__ import annotations

from pathlib import Path

REVISION = "0" * 40
COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4", {"intermediate_size_mlp": 32, "num_local_experts": 4}),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOss", {"num_local_experts": 4}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32}),
    "hf-internal-testing/Mixtral-tiny": ("Mixtral", {"num_local_experts": 4}),
}


def make(folder: Path) -> None:
    """Write what is not there yet into `folder`, which becomes HF_HUB_CACHE."""
    import torch
    import transformers

    for name, (family, sizes) in MODELS.items():
        there = folder / f"models--{name.replace('/', '--')}"
        if (there / "refs" / "main").is_file():
            continue
        text = "Text" if family == "Llama4" else ""
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}{text}Config")(**COMMON, **sizes)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        model.save_pretrained(there / "snapshots" / REVISION)
        (there / "refs").mkdir(exist_ok=True)
        (there / "refs" / "main").write_text(REVISION)

"""Configurations of published backbones, limited to the values that FLOPs depend on, so that `fvlm plan` works without the hub.

The values are from the `config.json` of each repository on huggingface.co.
"""

from typing import Any

_SMOLLM2 = {"vocab_size": 49152}
_DINOV2 = {"num_hidden_layers": 12, "patch_size": 14, "mlp_ratio": 4}

PUBLISHED: dict[str, dict[str, Any]] = {
    "facebook/dinov2-small": {**_DINOV2, "hidden_size": 384},
    "facebook/dinov2-base": {**_DINOV2, "hidden_size": 768},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        **_SMOLLM2,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "HuggingFaceTB/SmolLM2-360M-Instruct": {
        **_SMOLLM2,
        "hidden_size": 960,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "intermediate_size": 2560,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        **_SMOLLM2,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
    },
}

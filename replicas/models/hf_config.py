"""Hugging Face `config.json` -> `ArchConfig`, torch-free: which family reads the file.

Understands what transformers 4 and 5 write. What this engine does not compute is refused with the
list of what it does: no setting that changes the maths is ever skipped. Tensors are checked later,
against the checkpoint itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from cluster.base.errors import ConfigError
from replicas.models.arch import ArchConfig
from replicas.models.config_fields import ConfigFields
from replicas.models.hf_deepseek import deepseek_v2_from_hf, deepseek_v3_from_hf
from replicas.models.hf_deepspeed import deepspeed_moe_from_hf
from replicas.models.hf_encoding import encoding_from_hf
from replicas.models.hf_learned import gpt2_from_hf, opt_from_hf
from replicas.models.hf_llama import (
    llama_from_hf,
    mistral_from_hf,
    qwen2_from_hf,
    qwen3_from_hf,
)
from replicas.models.hf_mixture import (
    gpt_oss_from_hf,
    mixtral_from_hf,
    qwen2_moe_from_hf,
    qwen3_moe_from_hf,
)
from replicas.models.weight_encoding import Codes

_MXFP4_FAMILY = "GptOssForCausalLM"
_LAYERS_DIFFER = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
)


def arch_from_hf(config: Mapping[str, Any]) -> ArchConfig:
    """The architecture a parsed `config.json` describes.

    Raises:
        ConfigError: unknown architecture, a quantised format that is not read, a setting that is
            not supported, or a missing or mistyped key; `param` names it.
    """
    fields = ConfigFields(config)
    encoding = encoding_from_hf(config)
    name = _architecture(fields)
    if encoding is not None and encoding.codes is Codes.MXFP4 and name != _MXFP4_FAMILY:
        raise ConfigError(
            f"The checkpoint is quantised with mxfp4, which is read of {_MXFP4_FAMILY} only; it is "
            f"a {name}.",
            "Use the model's float32, bfloat16, float16 or FP8 checkpoint.",
            param="quantization_config",
        )
    if fields.raw("per_layer_config") and name not in _LAYERS_DIFFER:
        raise ConfigError(
            f"per_layer_config is not read of {name}: its layers cannot differ.",
            f"It is read of {', '.join(_LAYERS_DIFFER)}.",
            param="per_layer_config",
        )
    arch = _FAMILIES[name](fields)
    if encoding is not None and fields.raw("dtype", "torch_dtype") is None:
        return dataclasses.replace(arch, dtype="bfloat16")  # what its plain tensors are in
    return arch


def _architecture(fields: ConfigFields) -> str:
    named = fields.texts("architectures") or ()
    for name in named:
        if name in _FAMILIES:
            return name
    by_model_type = _BY_MODEL_TYPE.get(fields.text("model_type", default=""))
    if not named and by_model_type is not None:
        return by_model_type
    found = ", ".join(named) or fields.text("model_type", default="none stated")
    raise ConfigError(
        f"Architecture {found} is not supported.",
        f"Supported: {', '.join(_FAMILIES)}.",
        param="architectures",
    )


_FAMILIES: Mapping[str, Callable[[ConfigFields], ArchConfig]] = {
    "LlamaForCausalLM": llama_from_hf,
    "MistralForCausalLM": mistral_from_hf,
    "Qwen2ForCausalLM": qwen2_from_hf,
    "Qwen3ForCausalLM": qwen3_from_hf,
    "MixtralForCausalLM": mixtral_from_hf,
    "Qwen2MoeForCausalLM": qwen2_moe_from_hf,
    "Qwen3MoeForCausalLM": qwen3_moe_from_hf,
    "GptOssForCausalLM": gpt_oss_from_hf,
    "DeepseekV2ForCausalLM": deepseek_v2_from_hf,
    "DeepseekV3ForCausalLM": deepseek_v3_from_hf,
    "GPT2LMHeadModel": gpt2_from_hf,
    "DeepSpeedMoEForCausalLM": deepspeed_moe_from_hf,
    "OPTForCausalLM": opt_from_hf,
}
_BY_MODEL_TYPE: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "deepspeed_moe": "DeepSpeedMoEForCausalLM",
    "opt": "OPTForCausalLM",
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)

"""The model: its config, its layers, its loss, and GPT, which puts them together."""

from speedrun_mup.core.model.config import VOCAB_MULTIPLE, GPTConfig
from speedrun_mup.core.model.gpt import GPT, strip_compiled
from speedrun_mup.core.model.layers import (
    ATTENTION_SCALE,
    MLP,
    RMS_EPS,
    Attention,
    Block,
    Embedding,
    Linear,
    ReluSquared,
    RMSNorm,
    rms_norm,
    rotary_table,
    rotate,
)
from speedrun_mup.core.model.loss import (
    FUSED_LOGIT_BYTES,
    LOGIT_BUDGET,
    SOFTCAP,
    SOFTCAP_SLOPE,
    SoftcapCrossEntropy,
    loss_and_gradient,
    loss_and_gradient_in_place,
    softcap,
    softcap_cross_entropy,
)

__all__ = [
    "ATTENTION_SCALE",
    "FUSED_LOGIT_BYTES",
    "GPT",
    "LOGIT_BUDGET",
    "MLP",
    "RMS_EPS",
    "SOFTCAP",
    "SOFTCAP_SLOPE",
    "VOCAB_MULTIPLE",
    "Attention",
    "Block",
    "Embedding",
    "GPTConfig",
    "Linear",
    "RMSNorm",
    "ReluSquared",
    "SoftcapCrossEntropy",
    "loss_and_gradient",
    "loss_and_gradient_in_place",
    "rms_norm",
    "rotary_table",
    "rotate",
    "softcap",
    "softcap_cross_entropy",
    "strip_compiled",
]

"""The model in five parts, each built by its own config: token inputs, values, attention, wiring and head."""

from speedrun_mup.core.model.attention import ATTENTION_SCALE, Attention, AttentionConfig, Context
from speedrun_mup.core.model.gpt import GPT, GPTConfig, declarations
from speedrun_mup.core.model.head import Head, HeadConfig
from speedrun_mup.core.model.inputs import TokenInputs, TokenInputsConfig
from speedrun_mup.core.model.layers import (
    INTO_THE_LAYER,
    MLP,
    RMS_EPS,
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
from speedrun_mup.core.model.record import pack_scalars, strip_compiled, unpack_scalars
from speedrun_mup.core.model.shape import VOCAB_MULTIPLE, ModelShape
from speedrun_mup.core.model.values import Values, ValuesConfig
from speedrun_mup.core.model.wiring import Block, UNet, UNetConfig

__all__ = [
    "ATTENTION_SCALE",
    "FUSED_LOGIT_BYTES",
    "GPT",
    "INTO_THE_LAYER",
    "LOGIT_BUDGET",
    "MLP",
    "RMS_EPS",
    "SOFTCAP",
    "SOFTCAP_SLOPE",
    "VOCAB_MULTIPLE",
    "Attention",
    "AttentionConfig",
    "Block",
    "Context",
    "Embedding",
    "GPTConfig",
    "Head",
    "HeadConfig",
    "Linear",
    "ModelShape",
    "RMSNorm",
    "ReluSquared",
    "SoftcapCrossEntropy",
    "TokenInputs",
    "TokenInputsConfig",
    "UNet",
    "UNetConfig",
    "Values",
    "ValuesConfig",
    "declarations",
    "loss_and_gradient",
    "loss_and_gradient_in_place",
    "pack_scalars",
    "rms_norm",
    "rotary_table",
    "rotate",
    "softcap",
    "softcap_cross_entropy",
    "strip_compiled",
    "unpack_scalars",
]

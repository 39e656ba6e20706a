"""What adapt makes of three families from base 64 to width 256, against numbers worked out by hand.

m = 4. From Yang et al., Tensor Programs V (arXiv 2203.03466), Table 8: hidden matrices have Adam rates of 1/m and a std of
1/sqrt(fan-in), logits are divided by m, all else is as at base; SGD's rates are times m for vectors, inputs and readouts,
1 for hidden matrices. Muon: sqrt(m_out / m_in), by the spectral condition (arXiv 2310.17813), so 1/2 from width to a
finite size. No number here is computed by the rules under test.
"""

import math
import warnings

import pytest
import torch

from speedrun_mup.core import mup
from tests.helpers.foreign_models import ResNet


def rates(model, **options):
    optimizer = mup.optimizer(model, lr=1.0, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def check(model, expected):
    """expected: name -> (Adam's rate, SGD's, std, and Muon's rate if it takes it)."""
    adam, sgd = rates(model), rates(model, optimizer="sgd")
    muon = rates(model, optimizer="muon+adamw", muon_lr=100.0)
    for name, (adam_lr, sgd_lr, std, muon_lr) in expected.items():
        assert adam[name] == pytest.approx(adam_lr), name
        assert sgd[name] == pytest.approx(sgd_lr), name
        assert muon[name] == pytest.approx(100 * muon_lr if muon_lr else adam_lr), name
        p = model.get_parameter(name).detach()
        assert p.std(correction=0).item() == pytest.approx(std, rel=4 / math.sqrt(p.numel()), abs=1e-12), name


def adapted(model, base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says what follows the width
        return mup.adapt(model, base)


def test_llama_with_two_heads_of_keys_and_values_at_every_width():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 2}
    config = tf.LlamaConfig(hidden_size=256, intermediate_size=512, initializer_range=0.02, pad_token_id=0, **sizes)
    model = adapted(tf.LlamaForCausalLM(config), {"hidden_size": 64, "num_key_value_heads": 2})
    layer = "model.layers.0"
    check(
        model,
        {
            "model.embed_tokens.weight": (1, 4, 0.02, None),
            f"{layer}.self_attn.q_proj.weight": (1 / 4, 1, 0.01, 1),
            f"{layer}.self_attn.k_proj.weight": (1 / 4, 1 / 4, 0.01, 1 / 2),
            f"{layer}.self_attn.v_proj.weight": (1 / 4, 1 / 4, 0.01, 1 / 2),
            f"{layer}.self_attn.o_proj.weight": (1 / 4, 1, 0.01, 1),
            f"{layer}.mlp.gate_proj.weight": (1 / 4, 1, 0.01, 1),
            f"{layer}.mlp.up_proj.weight": (1 / 4, 1, 0.01, 1),
            f"{layer}.mlp.down_proj.weight": (1 / 4, 1, 0.01, 1),
            f"{layer}.input_layernorm.weight": (1, 4, 0, None),
            "model.norm.weight": (1, 4, 0, None),
            "lm_head.weight": (1, 4, 0.02, None),
        },
    )
    assert model.model.layers[0].self_attn.scaling == 1 / 4  # heads of 16 at both sizes: 1 / sqrt(16)
    x = torch.randn(3, 256)
    torch.testing.assert_close(model.lm_head(x), x @ model.lm_head.weight.T / 4)


def test_gpt2_with_four_heads_that_widen():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=256, n_head=4, n_layer=2, n_positions=64, vocab_size=300))
    plain = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    adapted(model, {"n_embd": 64, "n_head": 4})
    block = "transformer.h.1"
    check(
        model,
        {
            "transformer.wte.weight": (1, 4, 0.02, None),  # the readout too
            "transformer.wpe.weight": (1, 4, 0.02, None),
            f"{block}.attn.c_attn.weight": (1 / 4, 1, 0.01, 1),
            f"{block}.attn.c_attn.bias": (1, 4, 0, None),
            f"{block}.attn.c_proj.weight": (1 / 4, 1, 0.005, 1),  # 0.02 / sqrt(2 x 2 layers) at base
            f"{block}.mlp.c_fc.weight": (1 / 4, 1, 0.01, 1),
            f"{block}.mlp.c_proj.weight": (1 / 4, 1, 0.005, 1),
            f"{block}.ln_1.weight": (1, 4, 0, None),
        },
    )
    x = torch.randn(3, 256)
    queries, others = model.transformer.h[0].attn.c_attn(x).split((256, 512), dim=-1)
    # Scores are multiplied by 1 / sqrt(16) at base, so by that times 16 / 64 here; plain GPT-2 has 1 / sqrt(64).
    scale = getattr(model.transformer.h[0].attn, "scaling", 1 / 8)  # newer versions of transformers have it as a number
    torch.testing.assert_close(queries * scale, x @ plain[:, :256] / 2 / 16)
    torch.testing.assert_close(others, x @ plain[:, 256:] / 2)
    torch.testing.assert_close(model.lm_head(x), x @ model.transformer.wte.weight.T / 4)


def test_a_resnet_started_by_its_fan_out():
    torch.manual_seed(0)
    model = mup.adapt(ResNet(256, blocks=1), 64, build=lambda width: ResNet(width, blocks=1))
    at_base = math.sqrt(2 / (64 * 9))  # He's, of the fan-out: both for the first layer and inside
    of_torch = 1 / math.sqrt(3 * 64)  # uniform within 1 / sqrt(fan-in)
    check(
        model,
        {
            "stem.weight": (1, 4, at_base, None),
            "bn.weight": (1, 4, 0, None),
            "blocks.0.conv1.weight": (1 / 4, 1, at_base / 2, None),
            "blocks.0.bn2.bias": (1, 4, 0, None),
            "fc.weight": (1, 4, of_torch, None),
            "fc.bias": (1, 1, of_torch, None),
        },
    )
    x = torch.randn(3, 256)
    torch.testing.assert_close(model.fc(x), x @ model.fc.weight.T / 4 + model.fc.bias)

"""Hugging Face's families by one call each. Needs transformers, which the rest of the tests do not."""

import copy
import re
import warnings

import pytest
import torch

from speedrun_mup.core import mup

tf = pytest.importorskip("transformers")

SIZES = {"vocab_size": 48, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 32}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": ("Llama", GROUPED, {"num_key_value_heads": 2}),
    "llama-tied": ("Llama", SIZES | {"tie_word_embeddings": True}, {}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}, {"num_key_value_heads": 2}),
    "mistral": ("Mistral", GROUPED, {"num_key_value_heads": 2}),
    "gpt-neox": ("GPTNeoX", SIZES, {}),
    "gpt2": ("GPT2", {"vocab_size": 48, "n_layer": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}, {}),
    "gemma": ("Gemma", GROUPED | {"head_dim": 16, "num_key_value_heads": 1}, {"num_key_value_heads": 1}),
    "mamba": ("Mamba", {"vocab_size": 48, "num_hidden_layers": 2, "state_size": 4}, {}),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 3}, {"num_key_value_heads": 2}),
}


def config(family, width, **changes):
    kind, sizes, _ = FAMILIES[family]
    sizes = dict(sizes)
    if "intermediate_size" in sizes:
        sizes["intermediate_size"] = 2 * width
    heads = {} if kind == "Mamba" else {"num_attention_heads": width // 16}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind == "GPT2" else {}
    return getattr(tf, f"{kind}Config")(hidden_size=width, **heads | sizes | dropout | changes)


def plain(family, width, **changes):
    made = config(family, width, **changes)
    torch.manual_seed(0)
    kind = FAMILIES[family][0]
    return getattr(tf, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(made)


def adapted(family, width, base=32, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mup.adapt(plain(family, width), {"hidden_size": base} | FAMILIES[family][2], **options)


def batch(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, 7, (2, 8), generator=rng).cumsum(-1) % 48


def step(model, optimizer, seed=0):
    optimizer.zero_grad()
    loss = model(input_ids=batch(seed), labels=batch(seed), use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_adapts_and_base_size_is_the_same_model_bit_for_bit(family):
    model = adapted(family, 64)
    roles = {name: spec.role.value for name, _, spec in mup.named_specs(model)}
    assert "scalar" not in {role for name, role in roles.items() if "_norm" not in name}
    head = model.get_output_embeddings()  # whatever this version of transformers calls it
    assert isinstance(head, mup.MuReadout) and head.multiplier == 1 / 2
    outputs = [name for name, role in roles.items() if role == "output"]
    assert outputs in ([], [next(f"{name}.weight" for name, module in model.named_modules() if module is head)])
    assert step(model, mup.optimizer(model, lr=1e-3, optimizer="muon+adamw", muon_lr=0.01)) > 0
    one, two = plain(family, 32), adapted(family, 32)
    losses = [
        [step(one, optimizer, seed) for seed in range(3)]
        for one, optimizer in (
            (one, torch.optim.AdamW(one.parameters(), lr=1e-2)),
            (two, mup.optimizer(two, lr=1e-2)),
        )
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_at_base_size_are_those_of_any_size(family):
    """So that Muon has the same matrices there: a rate is tuned at base size for what trains the wide model."""
    roles = [
        {name: spec.role.value for name, _, spec in mup.named_specs(adapted(family, width, init="keep"))}
        for width in (32, 64)
    ]
    assert roles[0] == roles[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_is_hugging_faces_own(family, tmp_path):
    model = adapted(family, 64)
    optimizer = mup.optimizer(model, lr=1e-3)
    step(model, optimizer)
    folded = mup.fold(model)
    folded.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(batch()).logits, folded.eval()(batch()).logits)
        torch.testing.assert_close(folded(batch()).logits, model.eval()(batch()).logits)
    assert not hasattr(again.config, "mup_base")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox", "gpt2"])
def test_heads_that_widen_are_scaled_and_folded(family):
    heads = {"num_attention_heads": 2} | ({"num_key_value_heads": 2} if FAMILIES[family][2] else {})
    sizes = heads | ({"head_dim": 32} if family == "qwen3" else {})
    model = plain(family, 64, **sizes)
    base = {"hidden_size": 16} | heads | ({"head_dim": 8} if family == "qwen3" else {})
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mup.adapt(model, base, init="keep")
    assert re.search("heads (that )?widen", mup.explain(model))
    for both in (before, model):  # so that scores count
        for p in both.parameters():
            if p.ndim > 1:
                p.data.mul_(10)
    with torch.no_grad():
        torch.testing.assert_close(mup.fold(model).eval()(batch()).logits, model.eval()(batch()).logits)
        quarter = before.eval()(batch()).logits / 4  # as the readout has it; the scale makes another difference
        assert not torch.allclose(model(batch()).logits, quarter, atol=1e-4)


def test_the_base_is_kept_with_the_checkpoint_and_checked(tmp_path):
    model = adapted("llama", 64)
    step(model, mup.optimizer(model, lr=1e-2))
    model.save_pretrained(tmp_path)
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.mup_base["hidden_size"] == 32
    with pytest.raises(mup.BaseShapeError, match="trained over the base .*leave base= out"):
        mup.adapt(
            loaded, {"hidden_size": 16, "num_key_value_heads": 2, "num_attention_heads": 1, "intermediate_size": 32}
        )
    mup.adapt(loaded)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch()).logits, model.eval()(batch()).logits)


def test_what_is_left_open_is_one_line():
    with pytest.raises(
        mup.BaseShapeError, match=r"leaves num_key_value_heads open: it is 2 here and would be 0.5"
    ) as fault:
        mup.adapt(plain("llama", 64), {"hidden_size": 16, "num_attention_heads": 1})
    assert "\n" not in str(fault.value)


@pytest.mark.slow
def test_trainer_with_muon_and_adam_resumes_to_the_same_loss(tmp_path):
    pytest.importorskip("accelerate")

    def train(folder, steps, resume=None):
        model = adapted("llama", 64)
        optimizer = mup.optimizer(model, lr=1e-2, optimizer="muon+adamw", muon_lr=0.02)
        options = {"max_steps": steps, "save_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True}
        args = tf.TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            seed=1,
            **options,
        )
        rows = [{"input_ids": row, "labels": row} for seed in range(16) for row in batch(seed)]
        trainer = tf.Trainer(model, args, train_dataset=rows, optimizers=(optimizer, constant(optimizer)))
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "cut", 2)
    assert (
        train(tmp_path / "cut", 4, str(tmp_path / "cut" / "checkpoint-2"))[-2:] == whole[-2:] and whole[-1] < whole[0]
    )


def constant(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

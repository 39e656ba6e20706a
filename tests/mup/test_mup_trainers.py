"""An adapted model and its one optimizer under other people's loops, interrupted and resumed to the same bits."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from speedrun_mup.core import mup
from tests.helpers.foreign_models import GPT, GPTConfig, loss_of, tokens

MUON = {"lr": 1e-2, "optimizer": "muon+adamw", "muon_lr": 0.05}
OPTIMIZERS = {"adamw": {"lr": 1e-2}, "muon+adamw": MUON}


def build() -> nn.Module:
    torch.manual_seed(0)
    return mup.adapt(GPT(GPTConfig(n_embd=64, n_head=4, n_layer=1)), {"n_embd": 16, "n_head": 4})


def falling(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def ends(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------------------------------------------------------------
# Loops of one's own


class Loop:
    """Accumulation over two micro-batches, clipping, a schedule; in bfloat16, or in float16 with a scaler."""

    def __init__(self, name, dtype):
        self.model = build()
        self.optimizer = mup.optimizer(self.model, **OPTIMIZERS[name])
        self.schedule, self.dtype = falling(self.optimizer), dtype
        self.scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16, init_scale=2.0**10)
        self.parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }

    def run(self, steps):
        for step in steps:
            for part in range(2):
                with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not torch.float32):
                    loss = loss_of(self.model, tokens(seed=2 * step + part)) / 2
                self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            self.optimizer.zero_grad()
        return ends(self.model)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loop_that_is_cut_and_resumed_ends_the_same_bit_for_bit(name, dtype, tmp_path):
    expected = Loop(name, dtype).run(range(4))
    first, second = Loop(name, dtype), Loop(name, dtype)
    first.run(range(2))
    torch.save({key: part.state_dict() for key, part in first.parts.items()}, tmp_path / "checkpoint.pt")
    for key, state in torch.load(tmp_path / "checkpoint.pt").items():
        second.parts[key].load_state_dict(state)
    assert torch.equal(second.run(range(2, 4)), expected)
    assert not torch.equal(first.run(range(2)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# accelerate


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate_resumes_bit_for_bit(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def train(steps, load=None, save=None):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = build()
        optimizer = mup.optimizer(model, **OPTIMIZERS[name])
        rates = [group["lr"] for group in optimizer.param_groups]
        model, optimizer, schedule = accelerator.prepare(model, optimizer, falling(optimizer))
        assert [group["lr"] for group in optimizer.param_groups] == rates and len(set(rates)) > 1
        if load:
            accelerator.load_state(load)
        for step in steps:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, tokens(seed=step)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if save:
            accelerator.save_state(save)
        return ends(accelerator.unwrap_model(model))

    expected = train(range(8))
    train(range(4), save=str(tmp_path / "state"))
    assert torch.equal(train(range(4, 8), load=str(tmp_path / "state")), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Lightning


@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lightning_resumes_bit_for_bit(name, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Trained(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build()

        def training_step(self, batch, _):
            return loss_of(self.model, batch)

        def configure_optimizers(self):
            optimizer = mup.optimizer(self.model, **OPTIMIZERS[name])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling(optimizer), "interval": "step"}}

    def train(steps, load=None):
        rows = tokens(2).repeat(
            8, 1
        )  # one batch again and again: where Lightning goes on in its data is not the question
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        kept = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        loop = {"max_steps": steps, "gradient_clip_val": 0.5, "callbacks": [kept]}
        module = Trained()
        batches = torch.utils.data.DataLoader(rows, batch_size=2)
        lightning.Trainer(**loop, **quiet).fit(module, batches, ckpt_path=load)
        return ends(module)

    expected = train(4)
    assert torch.equal(train(4, load=tmp_path / "step=2.ckpt"), expected)
    assert not torch.equal(train(2), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's Trainer; that it resumes is in test_mup_hf.py


def fit(model, folder, **options):
    tf = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = tf.TrainingArguments(str(folder), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    tf.Trainer(model, args, train_dataset=rows, **options).train()


def llama():
    tf = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=64, intermediate_size=128, **sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mup.adapt(model, {"hidden_size": 32})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_makes_its_own_optimizer_is_warned_of_and_ours_is_not(tmp_path):
    model = llama()
    with pytest.warns(mup.PlainOptimizerWarning, match=r"optimizers=\(optimizer, None\)"):
        fit(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mup.PlainOptimizerWarning)
        model = llama()
        fit(model, tmp_path, optimizers=(mup.optimizer(model, **MUON), None))
    gc.collect()
    assert copy.deepcopy(model).config.mup_base == model.config.mup_base

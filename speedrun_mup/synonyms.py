"""Flags and commands of other programs, and what does the same here: one table, so that a wrong word is answered by its meaning.

The names are those of nanoGPT, modded-nanogpt, litgpt, Hugging Face's Trainer, Lightning, microsoft/mup and their kin.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple


class Meaning(NamedTuple):
    """Words of other programs, the flags that do the same here (none, if nothing does), and how they differ."""

    names: str
    flags: str
    answer: str


def _read(table: str) -> tuple[Meaning, ...]:
    """The entries of a table: "words > flags | answer", where the answer is "use FLAG" unless it says otherwise."""
    entries = []
    for line in table.replace("\n    ", " ").split("\n"):
        names, _, rest = line.partition(" >")
        flags, _, answer = rest.strip(" ").partition("|")
        entries.append(Meaning(names, flags.strip(), answer.strip() or f"use {flags.strip()}"))
    return tuple(entries)


# The first entry whose flags the command has is the answer, so what only some commands have comes first.
FLAGS = _read("""\
temp t > --temperature
max-tokens max-length length num-tokens n-predict tokens steps > --max-new-tokens | use --max-new-tokens: how many
    tokens to write
format target-format export-to f > --to | use --to: the format to write
dir out output output-dir save-dir > --to | the file or folder comes without a flag: --to FORMAT OUT
start text input i > --prompt | use --prompt: what the text begins with
num-samples n-samples samples num-return-sequences > --n | use --n: how many samples
ckpt step iteration > --checkpoint | use --checkpoint: the step of one of the run's checkpoints
hidden-size d-model n-embd proxy-widths > --widths | use --widths: a list, such as 32 64 128
seed n-seeds num-seeds repeats runs > --seeds | use --seeds: the number of runs at every point
lr learning-rate lrs learning-rates lr-grid lr-scale grid factors > --octaves | use --octaves: the factors to try are
    2^K, on all learning rates at once; --matrix-lr, --embed-lr, --head-lr and --scalar-lr are the rates that they
    multiply
gpus n-gpus num-gpus ngpu devices num-devices jobs j n-jobs num-jobs parallel num-workers max-workers num-proc threads
    nproc nproc-per-node processes num-processes > --workers | use --workers: how many work at a time
time max-time time-limit max-hours hours minutes compute flops max-flops cost limit > --budget | use --budget: a time
    such as 30m, or FLOPs such as 1e18
parametrization parametrizations rules table > --arms | use --arms: one or more parametrizations
iterations iters num-iterations max-steps nsteps num-steps > --steps | use --steps: optimizer steps
steps max-steps num-steps n-steps nsteps train-steps training-steps max-train-steps total-steps num-train-steps iters
    max-iters num-iters n-iters train-iters num-iterations n-iterations max-iterations step iter iteration >
    --iterations | use --iterations: optimizer steps
epoch max-epochs n-epochs num-epochs num-train-epochs epochs > --epochs --iterations | use --iterations: the length of
    a run is a number of steps; --epochs N only ends a run with an error before it sees its data more than N times
tokens total-tokens max-tokens train-tokens num-tokens token-budget n-tokens target-tokens > --iterations
    --micro-batch-tokens --micro-batches | use --iterations: a step takes --micro-batch-tokens x --micro-batches
    tokens
muon-lr lr-muon hidden-lr matrix-learning-rate > --matrix-lr | use --matrix-lr: the learning rate of the hidden
    matrices
embedding-lr wte-lr embed-learning-rate lr-embed > --embed-lr | use --embed-lr: embedding and value embeddings
unembedding-lr lm-head-lr readout-lr output-lr lr-head > --head-lr | use --head-lr: the readout
lr learning-rate max-lr peak-lr base-lr lr-max initial-lr learning-rates lrs adam-lr lr-adam adamw-lr eta >
    --matrix-lr --embed-lr --head-lr --scalar-lr --lr-scale | each group has a rate of its own: --matrix-lr,
    --embed-lr, --head-lr, --scalar-lr; --lr-scale is a factor on all
min-lr lr-min final-lr lr-end end-lr min-learning-rate final-lr-frac lr-final min-lr-ratio > --final-lr-frac | use
    --final-lr-frac: the last learning rate, as a fraction of the first
lr-scheduler lr-scheduler-type scheduler lr-schedule schedule lr-decay decay-lr lr-decay-iters lr-decay-steps warmdown
    warmdown-iters warmdown-ratio warmdown-steps cooldown-frac cooldown-steps cooldown-iters decay-frac decay-steps
    anneal anneal-frac > --cooldown | use --cooldown: the rate is constant and falls linearly in this last fraction of
    the steps, to --final-lr-frac
warmup warmup-steps warmup-iters warmup-ratio warmup-frac num-warmup-steps lr-warmup lr-warmup-steps lr-warmup-iters
    warmup-tokens > | there is none, because the record starts at its full learning rate; --momentum-warmup is Muon's
    momentum
batch-size batch bs b global-batch-size per-device-train-batch-size per-device-batch-size device-batch-size
    micro-batch-size train-batch-size total-batch-size batch-tokens tokens-per-step tokens-per-batch mbs gbs >
    --micro-batch-tokens --micro-batches | a step takes --micro-batches (over all ranks) of --micro-batch-tokens; both
    count tokens, not sequences: 8 sequences of 256 tokens are --micro-batches 8 --micro-batch-tokens 256
grad-accum grad-accum-steps gradient-accumulation-steps gradient-accumulation accumulate-grad-batches
    accumulation-steps accum-steps accum ga-steps > --micro-batches | use --micro-batches: how many make one step,
    over all ranks; --micro-batches-per-forward is how many go through the model at once
depth layers layer n-layers nlayer nlayers num-layers num-hidden-layers n-blocks num-blocks blocks n-hidden-layers >
    --n-layer | use --n-layer: at least 2
d-model dmodel hidden-size hidden hidden-dim n-embd n-embed nembd embed-dim emb-dim embedding-dim embedding-size
    d-embed dim model-dim model-width hidden-width residual-width target-width w > --width | use --width: a multiple
    of --head-dim
heads head n-head n-heads nhead nheads num-heads num-attention-heads attention-heads > --head-dim --width | use
    --head-dim: the number of heads is --width / --head-dim
head-size d-head dhead attention-head-size > --head-dim
n-kv-head n-kv-heads num-kv-heads num-key-value-heads n-query-groups gqa kv-heads > | there is none, because every
    head of this model has keys and values of its own
d-ff dff ffn-dim ffn-hidden-size intermediate-size mlp-ratio mlp-dim ffn mlp-width > | there is none, because the MLP
    of this model is always 4 times as wide as the residual stream
seq-len seqlen seq sequence-length seq-length context context-length context-size context-window ctx ctx-len block
    max-length max-len max-seq-length max-seq-len max-sequence-length n-ctx n-positions max-position-embeddings
    train-seq-len train-sequence-length t > --micro-batch-tokens --window-tokens | use --micro-batch-tokens: the
    length of one sequence, in which documents do not see each other; --window-tokens is how far attention looks back
sliding-window window window-size attention-window > --window-tokens
vocab-size vocab n-vocab padded-vocab-size > --tokenizer | the data decide: --tokenizer bpe:N for the embedded corpus,
    speedrun-mup data text --tokenizer train:N for your own
dropout p-drop attn-dropout attention-dropout hidden-dropout resid-pdrop embd-pdrop attn-pdrop > | there is none,
    because the record trains without dropout
label-smoothing z-loss > | there is none, because the loss is plain cross-entropy of capped logits
grad-clip clip clip-grad clip-grad-norm max-grad-norm gradient-clip-val gradient-clipping grad-norm-clip > | there is
    none, because an update of Muon or Adam does not grow with the gradient; --on-nonfinite says what happens to a
    step with NaN or Inf
wd decay adam-wd muon-wd l2 > --weight-decay | use --weight-decay: decoupled, times the learning rate
beta1 b1 adam-b1 betas adam-betas > --adam-beta1 | use --adam-beta1 and --adam-beta2
beta2 b2 adam-b2 > --adam-beta2
eps epsilon adam-epsilon optimizer-eps > --adam-eps | use --adam-eps: for gradients summed over tokens
muon-momentum mu > --momentum | use --momentum: Muon's
momentum-warmup-steps > --momentum-warmup
orthogonalize newton-schulz polar-express zeropower > --orthogonalizer | use --orthogonalizer newton-schulz or
    polar-express: of Muon and NorMuon
nesterov > | there is none, because Muon always looks ahead as Nesterov does
optimizer optim opt optimizer-name adam adamw muon normuon use-muon sgd > --matrix-optimizer | use --matrix-optimizer
    muon, normuon or adam: of the hidden matrices; all other parameters have Adam
wandb use-wandb wandb-log report-to logger log-with tracker tensorboard trackio tb logging wandb-enabled > --track |
    use --track wandb, tensorboard or trackio
wandb-run-name run-name wandb-name experiment-name exp-name experiment run-id wandb-run > --name | use --name: the run
    folder's, and the tracker's
wandb-project project wandb-entity entity wandb-group wandb-tags > | there is none, because trackers read these from
    their own environment variables, such as WANDB_PROJECT
dataset datasets data-dir data-path data-root data-folder train-data training-data train-file train-files train-bin
    input-bin input-val-bin input corpus dataset-dir dataset-path dataset-name train-path data-file i > --data | use
    --data: a folder of shards, embedded or synthetic; speedrun-mup data text makes shards from text
output-dir output outdir out-dir save-dir save-path output-path output-folder log-dir logdir log-path logs
    checkpoint-dir ckpt-dir checkpoints-dir run-dir rundir default-root-dir save-folder folder o dir > --name --out |
    use --out: the folder that holds run folders; --name is the run's own folder in it
output-dir output outdir out-dir save-dir save-path output-path output-folder log-dir logdir run-dir folder o dir dest
    > --out | use --out: the folder to write
save-steps save-interval save-freq save-iter checkpoint-every checkpoint-interval ckpt-interval ckpt-every
    checkpointing-steps save-every-n-steps save-checkpoint-every every-n-train-steps > --save-every | use
    --save-every: steps between checkpoints; there is always one at the end
save-total-limit keep max-checkpoints keep-checkpoints save-top-k > --keep-last | use --keep-last: at least 2
no-checkpoint no-checkpoints save-checkpoint always-save-checkpoint > | there is none, because every run ends with a
    checkpoint; --save-every writes more
eval-every eval-interval eval-steps eval-freq eval-step val-interval val-freq val-steps val-check-interval
    validate-every val-loss-every evaluate-every evaluation-interval eval-strategy check-val-every-n-epoch test-every
    > --val-every | use --val-every: steps between validations
eval-iters eval-batches eval-tokens val-batches val-iters val-max-steps val-steps limit-val-batches eval-size val-size
    > --val-tokens | use --val-tokens: how much of the validation split one validation reads, in tokens
val-split val-ratio val-frac validation-split test-size val-fraction validation-share > --val-share | use --val-share:
    the fraction of the documents that is kept for validation
val-split val-ratio val-frac validation-split test-size val-share > | there is none here, because shards are split
    when they are made: speedrun-mup data text --val-share
eval eval-only test-only validate do-eval > | there is none, because every run ends with a validation; speedrun-mup
    eval measures again
do-train > | there is none, because train always trains
pretrained from-pretrained load-weights weights init-checkpoint finetune-from > --init-from | use --init-from: start
    from the weights of another run
resume-from resume-from-checkpoint resume-path resume-dir resume-training continue continue-from load load-checkpoint
    from-checkpoint checkpoint ckpt ckpt-path checkpoint-path restart restore auto-resume > --resume | use --resume: a
    run's folder, or auto for the newest unfinished run
fp16 float16 half bf16 bfloat16 amp use-amp mixed-precision precision fp32 float32 torch-dtype tf32 autocast > --dtype
    | use --dtype: bfloat16 or float32; there is no float16, because the record needs no loss scaling
torch-compile jit compile-model torchcompile > --compile | use --compile or --no-compile
no-torch-compile eager no-jit enforce-eager > --no-compile
gpus n-gpus num-gpus ngpu devices num-devices nproc nproc-per-node num-processes world-size nodes nnodes num-nodes ddp
    fsdp deepspeed zero strategy distributed parallel tensor-parallel tp dp > | there is none, because torchrun starts
    the ranks: torchrun --nproc_per_node=8 train.py; optimizer states are sharded over them by themselves
cuda gpu cpu use-gpu use-cuda use-cpu no-cuda accelerator mps device-type backend-device > --device | use --device:
    cpu, cuda or mps; CUDA_VISIBLE_DEVICES chooses among GPUs
workers num-workers n-workers dataloader-num-workers num-data-workers prefetch prefetch-factor > | there is none,
    because taking a batch costs 0.04 % of a step
threads num-threads n-threads cpus omp > | there is none; set the environment variable OMP_NUM_THREADS instead
log-interval log-every log-freq logging-steps log-every-n-steps log-steps print-every print-freq log-iter > | there is
    none, because every step is recorded, in the run's metrics.jsonl
random-seed manual-seed rng-seed rng data-seed seeds random-state > --seed
gradient-checkpointing activation-checkpointing recompute checkpoint-activations use-checkpoint > --fit-memory | there
    is none; --fit-memory shrinks micro-batches until a step fits the memory
flash flash-attn flash-attention attn-implementation attn sdpa use-flash flex > --attention | use --attention: flex,
    blocked or dense
config c config-file config-path cfg yaml settings f conf > --preset | there is none, because all settings are flags
    on top of a --preset; every run folder keeps its config.json
quiet q silent disable-tqdm no-tqdm no-progress-bar no-bar > | there is none, because progress is a bar on a terminal
    only
verbose v debug progress-bar tqdm > | there is none; a terminal has a bar, and a run's log.txt has everything
tie-embeddings tie-weights tie-word-embeddings weight-tying tied > | there is none, because embedding and readout of
    this model are two matrices
bias no-bias activation act-fn norm norm-eps layernorm rope rope-theta rotary rope-base softcap logit-cap > | there is
    none, because that part of the architecture is the record's own
model model-name model-type model-size model-name-or-path arch architecture size > --preset --width --n-layer | there
    is one architecture; --preset, --width and --n-layer set its size
base mup-base-width mup-base base-shapes base-shape width-mult width-multiplier mup-width-multiplier mup-multiplier
    base-size proxy-width mup-base-dim load-base-shapes save-base-shapes > --base-width | use --base-width: the width
    that the learning rates were tuned at; the multiplier is --width over it
use-mup mup-enabled enable-mup mu-p mup-transfer scale-lr > --mup
sp standard standard-parametrization param parameterization parametrisation rules scaling mup-table >
    --parametrization | use --parametrization: mup, sp, record26 and others
determinism reproducible bitwise cudnn-deterministic > --deterministic | use --deterministic: the same bits on any
    number of ranks; at one seed and rank count a run repeats itself anyway
dry-run dryrun preview no-run > --run | leave out --run: without it nothing is trained
execute go start carry-out do > --run
tokenizer-name tokenizer-path encoding tokenizer-file bpe > --tokenizer
text-column text-field column key text-key content-key > --field | use --field: of a record that holds the text
dedup deduplicate unique drop-dups > --drop-duplicates
shard-size tokens-per-shard max-shard-tokens > --shard-tokens
width target target-width at-width extrapolate > --predict | use --predict: a forecast for this width
params parameters param-name hparam > --hyperparameter | use --hyperparameter: what was varied
format as-json output-format json-output > --json""")

DATA_COMMANDS = {
    "tokenize prepare preprocess shards encode import local files": "text",
    "download fetch get hub": "fineweb",
    "check show verify validate stats look info": "inspect",
}
COMMANDS = {  # what is typed -> what there is
    "fit run pretrain finetune training launch resume start continue": "train, which also resumes: train --resume runs/NAME",
    "evaluate validate test val perplexity ppl": "eval, for one run; transfer judges a sweep",
    "tune lr-find lr-finder find-lr search hpo hparams grid optimize sweeps": "plan, for one big run, or sweep, for a grid",
    "coordcheck coord cc coord-checks coordinate-check coordinatecheck check": "coord-check",
    "list ls runs show status info": "doctor runs/NAME, for one run; speedrun-mup alone lists the commands",
    "tokenize prepare preprocess download fetch shards dataset datasets tokenizer inspect": "data, with text, fineweb or inspect",
    "bench-mark benchmark profile speed perf time": "bench",
    "plot plots figure figures page html dashboard view compare": "report",
    "verdict judge analyze analyse fit-transfer drift": "transfer",
    "predict forecast extrapolate": "transfer --predict WIDTH, or plan",
    "estimate cost budget proxy proxies design": "plan",
    "rules table mup params summary describe": "explain",
    "env diagnose check-env health install setup verify": "doctor",
    "example quickstart tutorial hello init": "demo",
    "generate chat inference infer complete write": "sample runs/NAME",
    "serve deploy": "none: sample writes text on this machine",
    "push upload save-pretrained": "export runs/NAME --to FORMAT OUT",
    "convert": "export runs/NAME --to FORMAT OUT, or import FILE.pt --out runs/NAME",
    "load restore from-pretrained load-pt": "import FILE.pt --out runs/NAME",
}


def flag_meaning(asked: str, flags: Collection[str] | None = None) -> str | None:
    """What to use instead of the flag `asked`, of what a command with `flags` has, or any; None where nothing is known."""
    word = asked.lstrip("-").lower().replace("_", "-")
    known = [entry for name in _spellings(word) for entry in FLAGS if name in entry.names.split()]
    return next((entry.answer for entry in known if flags is None or set(entry.flags.split()) <= set(flags)), None)


def _spellings(word: str) -> Iterator[str]:
    """The word itself, then without what switches things on and off."""
    yield word
    for prefix in ("no-", "use-", "enable-", "disable-", "with-", "without-"):
        if word.startswith(prefix):
            yield word.removeprefix(prefix)


def command_meaning(asked: str, commands: Collection[str], meanings: Mapping[str, str] = COMMANDS) -> str:
    """What to use instead of the command `asked`: by its meaning, else by its spelling, else all there are."""
    word = asked.lower().replace("_", "-")
    if word in commands:
        return f"did you mean {word}?"
    for names, answer in meanings.items():
        if word in names.split():
            return f"there is {answer}" if answer.startswith("none") else f"use {answer}"
    import difflib

    near = difflib.get_close_matches(word, [*commands, "help"], n=1)
    return f"did you mean {near[0]}?" if near else f"choose {', '.join(commands)}"

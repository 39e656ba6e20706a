"""A trainer like many: argparse, a small language model, a loss every now and then. It knows nothing of speedrun_mup.

The model predicts a character from the four before it, with one hidden layer, trained with Adam; the text is drawn from a
Markov chain. Takes a fraction of a second.
"""

import argparse
import os

import numpy as np

VOCABULARY, CONTEXT, BATCH = 12, 4, 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n_embd", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--max_iters", type=int, default=60)
    parser.add_argument("--eval_interval", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--out_dir", default="out")
    args = parser.parse_args()

    text = markov(np.random.default_rng(0), 4000)
    draw = np.random.default_rng(args.seed)
    params = [
        draw.normal(0, 1, (CONTEXT, VOCABULARY, args.n_embd)) / np.sqrt(CONTEXT),
        draw.normal(0, 1, (args.n_embd, VOCABULARY)) / args.n_embd,
    ]
    means, squares = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    os.makedirs(args.out_dir, exist_ok=True)
    with open(os.path.join(args.out_dir, "log.csv"), "w") as log:
        log.write("step,val/loss\n")
        for step in range(args.max_iters + 1):
            if step % args.eval_interval == 0 or step == args.max_iters:
                train, val = (loss_of(params, *windows(part))[0] for part in (text[:3000], text[3000:]))
                print(f"step {step}: train loss {train:.4f}, val loss {val:.4f}", flush=True)
                log.write(f"{step},{val:.6f}\n")
            at = draw.integers(0, 3000 - CONTEXT - 1, BATCH)
            _, grads = loss_of(params, *windows(text[:3000], at))
            for number, grad in enumerate(grads):
                means[number] = 0.9 * means[number] + 0.1 * grad
                squares[number] = 0.95 * squares[number] + 0.05 * grad**2
                mean, square = means[number] / (1 - 0.9 ** (step + 1)), squares[number] / (1 - 0.95 ** (step + 1))
                params[number] -= args.learning_rate * mean / (np.sqrt(square) + 1e-8)


def markov(draw, length):
    """Characters of which each depends on the one before."""
    chances = draw.dirichlet(np.full(VOCABULARY, 0.2), VOCABULARY)
    text = [0]
    for _ in range(length):
        text.append(draw.choice(VOCABULARY, p=chances[text[-1]]))
    return np.array(text)


def windows(text, at=None):
    """Contexts (B, CONTEXT) and the characters that follow them (B,)."""
    at = np.arange(len(text) - CONTEXT) if at is None else at
    return text[at[:, None] + np.arange(CONTEXT)], text[at + CONTEXT]


def loss_of(params, context, target):
    """Cross-entropy in nats, and its gradients."""
    embed, head = params
    hidden = np.tanh(embed[np.arange(CONTEXT), context].sum(1))
    logits = hidden @ head
    logits -= logits.max(1, keepdims=True)
    probs = np.exp(logits)
    probs /= probs.sum(1, keepdims=True)
    rows = np.arange(len(target))
    loss = -np.log(probs[rows, target]).mean()
    probs[rows, target] -= 1
    probs /= len(target)
    inner = (probs @ head.T) * (1 - hidden**2)
    grad = np.zeros_like(embed)
    for place in range(CONTEXT):
        np.add.at(grad[place], context[:, place], inner)
    return loss, [grad, hidden.T @ probs]


if __name__ == "__main__":
    main()

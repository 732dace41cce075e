#!/usr/bin/env python3
r"""reval_min: ReVal, value-based reinforcement learning for language models, in one file.

A language model already is a value function. Read the logit that it gives to token a after text s
as a soft Q-value, Q(s, a). Then V(s) = log sum_a exp Q(s, a) is the value of the text, and
softmax(Q(s, .)) is the policy, with log pi(a|s) = Q(s, a) - V(s). Training makes Q obey, in sum
over a response, a Bellman equation. Whether it does can be checked on *any* response, whoever wrote
it: so old ones are used again, from a replay buffer, without importance weights.

    python reval_min.py                     the built-in task, on a laptop: two or three minutes
    python reval_min.py --algo grpo --updates 1 --lr 1e-3    the usual baseline on it
    python reval_min.py --model DIR_OR_HUB_ID --data problems.jsonl    your model, your problems
    python reval_min.py --preset r1-distill-1.5b    the paper's run, on one GPU: not made yet
    python reval_min.py --resume runs/NAME          go on after a stop; --help: every setting

Read from top to bottom: part I is the method, II a run of it, III what a run stands on.

Method: "Off-Policy Value-Based Reinforcement Learning for Large Language Models", Wang et al.,
arXiv 2603.23355, which has no code. Equation numbers are the paper's. README.md lists the choices.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import math
import operator
import re
import shlex
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.modeling_layers import GradientCheckpointingLayer

# ==================================================================================================
# PART I: THE METHOD
# A *response* is what the model writes after a prompt, up to its end-of-sequence token (EOS); to
# sample one is a *rollout*; a prompt, its response and its reward are a *trajectory*.
# ==================================================================================================

# ---- 1. Q and V ----------------------------------------------------------------------------------
# The state s is the text so far, the action a the next token, one of A in the vocabulary. The model
# turns each state into a hidden vector, and its last matrix, the LM head, that into A logits:
#
#     Q(s, a) = logit of a after s           what token a is worth
#     V(s)    = log sum_a exp Q(s, a)        what the text s is worth
#     pi(a|s) = exp(Q(s, a) - V(s))          the policy: the softmax, as usual
#
# Why this V? Suppose you choose a token and are paid its Q-value, plus the entropy of your choice.
# The best way to choose is pi, and it earns V on average: logsumexp is a soft maximum. Q, V and
# log pi are in nats, the unit of natural logarithms. Shapes: N states, D hidden size, A actions.


def plain_q_and_v(hidden, weight, actions):
    """Q(s, a) and V(s) in plain lines: hidden [N, D], weight [A, D], actions [N] -> [N], [N]."""
    logits = hidden @ weight.T  # [N, A]
    q = logits.gather(1, actions[:, None])[:, 0]  # [N]
    v = logits.logsumexp(1)  # [N]
    return q, v


# That is all, and the tests compare the rest of this section with it. But 8,192 states and 151,936
# actions are 5 GB of logits, and softmax and gradient as much each, for two numbers a state. The
# fused form goes through the vocabulary block by block, with a running logsumexp, and computes each
# block of logits once more for the gradient.


def matmul(a, b):
    """a @ b in float32 (float64 from float64). On a GPU bfloat16 operands need no wider copy."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


class _QFromLogits(torch.autograd.Function):
    """q_from_logits with a backward of its own, so that one block of logits exists at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, actions, block):
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # [N, D]
        q = (wide * F.embedding(actions, weight)).sum(1)  # [N]
        v = torch.full_like(q, -torch.inf)  # [N]
        for part in weight.split(block):  # [block, D]
            logits = matmul(hidden, part.T)  # [N, block]
            v = torch.logaddexp(v, logits.logsumexp(1))  # [N]
        ctx.save_for_backward(hidden, weight, actions, v)
        ctx.block = block
        return q, v

    @staticmethod
    def backward(ctx, grad_q, grad_v):
        # dV(s) / dlogit_a = pi(a|s). dQ(s, a) / dlogit_a = 1 for the action taken, else 0.
        hidden, weight, actions, v = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=v.dtype)  # [N, D]
        grad_weight = torch.empty_like(weight)  # [A, D]
        for start in range(0, len(weight), ctx.block):
            part = weight[start : start + ctx.block]  # [block, D]
            pi = matmul(hidden, part.T).sub_(v[:, None]).exp_()  # [N, block]
            grad = pi.mul_(grad_v[:, None])  # [N, block], of the logits
            inside = (actions >= start) & (actions < start + len(part))  # [N] action in this block?
            grad[inside, actions[inside] - start] += grad_q[inside]
            if hidden.is_cuda:
                grad = grad.to(hidden.dtype)  # for fast products; sums stay in float32
            grad_hidden += matmul(grad, part)  # [N, D]
            grad_weight[start : start + ctx.block] = matmul(grad.T, hidden)  # [block, D]
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def q_from_logits(hidden, weight, actions, block=4096):
    """Q(s, a) and V(s) of N states, without ever holding their [N, A] logits.

    hidden [N, D], weight [A, D] (the LM head), actions [N] int64 -> (q [N], v [N]), as above, in
    float32 (float64 from float64): V is 10 to 40, where bfloat16 has steps of up to a quarter.
    Differentiable in hidden and weight, in O(N * block) memory beside operands and gradients.
    ValueError for shapes that do not fit; on a CPU IndexError for an action that is no token.
    """
    if actions.ndim != 1 or hidden.shape != (len(actions), weight.shape[-1]):
        raise ValueError("hidden, weight, actions must be [N, D], [A, D], [N]")
    return _QFromLogits.apply(hidden, weight, actions, block)


# ---- 2. The Bellman target and the loss ----------------------------------------------------------
# A token is worth what it earns now, plus the value of the text after it. The right side of that
# sentence is the Bellman *target* of Q, and training makes their sums over a response agree.
#
# From here on in the paper's letters. The response has tokens a_1 ... a_H, and s_h is the text
# before a_h, so s_1 is the prompt. r is the reward, paid at the last token: 1 if the final answer
# is right, else 0. The *reference* (Q_ref, V_ref, pi_ref) is the model before training, or at its
# last reset (section 4). What is maximized is E[r] - beta * KL(pi || pi_ref), eq. (1): beta is the
# price, in reward, of a nat away from the reference.
#
# Divided by beta, this pays each token log pi_ref(a_h|s_h), the last one r / beta more, and each
# choice its entropy: the game of section 1. The paper's target also pays each token V_ref(s_h) -
# V_ref(s_{h+1}). Over a response that adds up to V_ref(s_1), whatever it says: so the best policy
# stays (it is potential-based shaping), but now the reference itself solves the equation for r = 0.
# Shapes: B responses, T tokens in the longest.


def bellman_target(v, q_ref, v_ref, reward, mask, beta):
    """The combined stepwise / outcome Bellman target of each Q(s_h, a_h): [B, T], 0 in the padding.

        target(s_h, a_h) =  r / beta, at the last token                        outcome signal
                         +  log pi_ref(a_h|s_h) + V_ref(s_h) - V_ref(s_{h+1})  stepwise signal
                         +  V(s_{h+1})                                         bootstrap

    The stepwise signal is the reference's opinion of the token, Q_ref(s_h, a_h) - V_ref(s_{h+1}).
    After the last token V and V_ref are 0. A response that was cut at the length limit ends there
    too, by the paper's finite horizon; that it earns reward 0 is our choice.

    v, q_ref, v_ref [B, T]; reward [B]; mask [B, T] bool: True on response tokens, which start in
    column 0 and have no gap, else ValueError. No value in the padding, not even nan, matters.
    """
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("mask: in every row the response tokens come first, without a gap")
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # [B, T] is it the last token?
    outcome = torch.where(last, reward[:, None] / beta, 0)  # [B, T]
    # V_ref is taken from V first: for equal models the difference is exactly 0.
    gap = (v - v_ref).masked_fill(~mask, 0)  # [B, T]
    next_gap = F.pad(gap[:, 1:], (0, 1))  # [B, T] V(s_{h+1}) - V_ref(s_{h+1})
    return outcome + q_ref.masked_fill(~mask, 0) + next_gap  # [B, T]


def reval_loss(q, v, q_ref, v_ref, reward, mask, beta, calibrated=True):
    """ReVal's loss. Shapes as above. -> (loss, {"residual": [B], in nats}).

    Sum Q - target over a response. As Q(s_h, a_h) = V(s_h) + log pi(a_h|s_h), every later V comes
    once with plus and once with minus, and so does V_ref. What is left is eq. (2),

        residual = V(s_1) - V_ref(s_1) + log pi(response) - log pi_ref(response) - r / beta
        loss     = beta / 2 * mean over responses of residual^2

    It is the sum that is squared; squaring its parts one by one is reported to collapse. The factor
    beta / 2 is ours. TBRM, an older relative, has no V_ref(s_1): calibrated=False.

    By hand, with 3 words (0, 1, 2), r = 1 and beta = 0.5:

        state  exp(logits)  exp(reference's)  token   V      V_ref   pi    pi_ref
        s_1    1, 2, 5      1, 1, 2           1       log 8  log 4   1/4   1/4
        s_2    4, 2, 2      1, 1, 2           0       log 8  log 4   1/2   1/4

    residual = log 8 - log 4 + log(1/4 * 1/2) - log(1/4 * 1/4) - 2 = -0.6137, loss = 0.0942.
    """
    target = bellman_target(v, q_ref, v_ref, reward, mask, beta)  # [B, T]
    # Unlike in Q-learning, the target is not detached: the V(s_{h+1}) in it learns too.
    residual = (q - target).masked_fill(~mask, 0).sum(1)  # [B]
    if not calibrated:
        residual = residual + v_ref[:, 0]  # [B] TBRM: V_ref(s_1) is put back
    return beta / 2 * residual.square().mean(), {"residual": residual.detach()}


# What holds, and its test (pytest -k NAME):
# first_gradients  Calibrated start: while the model is the reference, a response without reward has
#                  residual and gradient 0; in TBRM its residual is V_ref(s_1), 10 to 40 nats.
#                  Scale: with beta / 2 the first gradient is that of REINFORCE, if the reward is
#                  centered; if not, as here, grad V(s_1) comes on top. Adam does not see the
#                  factor, nor does a clip that cuts all, as in the built-in run.
# fixed_point      All residuals are 0 at pi* = pi_ref * exp(r / beta) / Z, with Z the mean of
#                  exp(r / beta) under pi_ref, and V*(s_1) = V_ref(s_1) + log Z, whoever wrote the
#                  responses. TBRM has the same pi*, with V*(s_1) = log Z.
# coverage         But the data must hold all that matters: what they lack is not determined.
# small_residual   V takes up the slack, so a small residual alone proves nothing.
# v_held_fixed     The gradient is the whole one. The paper's eq. (4) lacks the part through V(s_1):
#                  then the fixed point would depend on who wrote the data.
# later_states     A constant on all logits of s_2, s_3, ... changes nothing: only V(s_1) is learnt.
# beta_goes        beta goes with one over length, as r / beta nats are spread over all tokens: beta
#                  times the typical length is about 10 in the paper's two runs, 1 in the built-in.


def grpo_loss(logp, logp_old, advantage, mask, n_tokens, clip_low=0.2, clip_high=0.28):
    """GRPO's loss, to compare with, in DAPO's variant, as in the paper: an uneven clip, the mean
    over all tokens instead of over each response, no KL term. -> - sum min(ratio A, clip(ratio) A)
    / n_tokens, a scalar, with the importance weight ratio = pi / pi_old and the advantage A: (r -
    mean) / std within the responses to a problem. A token past the clip, in A's direction, teaches
    nothing. logp, logp_old, mask [B, T]; advantage [B]; n_tokens counts the whole batch."""
    ratio = (logp - logp_old).masked_fill(~mask, 0).exp()  # [B, T]
    near = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    gain = torch.minimum(ratio * advantage[:, None], near * advantage[:, None])  # [B, T]
    return -gain.masked_fill(~mask, 0).sum() / n_tokens


# ---- 3. The replay buffer ------------------------------------------------------------------------


class ReplayBuffer:
    """Keeps the newest trajectories, first in, first out, and draws from them uniformly."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.items = []

    def add(self, items):
        """Appends items; beyond the capacity the oldest leave."""
        self.items = [*self.items, *items][-self.capacity :]

    def sample(self, n, generator):
        """n different items, or all of fewer, by a numpy generator. Nothing is removed."""
        return [self.items[i] for i in generator.permutation(len(self.items))[:n]]


# ---- 4. One iteration ----------------------------------------------------------------------------
# The whole method, arguments shortened. In section 7 it is `collect`, `learn` and `train`.
#
#     fresh = rollout(model, some problems, several responses each)   # reward: is it right?
#     add_signals(fresh)                                              # r; GRPO: an advantage
#     cache_values(reference, fresh)                                  # q_ref and v_ref, only once
#     buffer.add(fresh)
#     for k in range(K):
#         batch = fresh if k == 0 else buffer.sample(len(fresh))      # on-policy, then off-policy
#         gradient(model, batch)                                      # of reval_loss
#         optimizer.step()
#     every so many iterations, if wished:                            # a reset
#         reference = copy of model
#         cache_values(reference, buffer)                             # the old ones are out of date
#
# The paper words its K updates in more than one way; this is our reading. Once the buffer is full,
# a trajectory is used K times on average, eq. (3); the first, with few beside them, more often.


# ==================================================================================================
# PART II: A RUN (from section 11: explained makes an error one line, progress tells of a loop)
# ==================================================================================================

# ---- 5. Settings ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """All settings, with the values of the built-in task. UserError if one is impossible."""

    # Task
    model: str = ""  # a causal LM, folder or hub id; none: a tiny one, made here
    data: str = ""  # JSONL file; none: sums
    eval_data: str = ""  # to evaluate on; none: a part of --data
    prompt: str = "{problem}"  # text around {problem}
    raw_prompt: bool = False  # do without the tokenizer's chat template
    # Method
    algo: Literal["reval", "tbrm", "grpo"] = "reval"  # the loss: reval, tbrm or grpo
    steps: int = 50  # iterations; 0 only evaluates
    prompts: int = 16  # problems per iteration
    rollouts: int = 4  # responses per problem
    updates: int = 4  # gradient steps per iteration: K
    buffer: int = 30  # replay buffer, in batches of prompts x rollouts
    beta: float = 0.05  # price, in reward, of a nat of KL from the reference
    lr: float = 1.5e-4  # learning rate
    warmup: int = 5  # iterations over which the learning rate rises
    half_life: int = 25  # iterations in which it halves; 0: it stays
    ref_reset: int = 0  # iterations between resets of the reference; 0: none
    distill_steps: int = 1600  # steps of the tiny model's warm start
    # Size
    max_new_tokens: int = 28  # longest response
    rows: int = 256  # most responses sampled side by side
    micro_batch_tokens: int = 16384  # most tokens of one forward and backward
    device: str = "cpu"  # where it all happens: cpu, cuda, or, untested, mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # of --model; or bfloat16: it learns later
    # Evaluation
    eval_every: int = 10  # iterations between evaluations
    eval_problems: int = 1024  # most held-out problems
    eval_samples: int = 1  # responses to each of them: n in avg@n
    # Run
    seed: int = 0  # of all that is random
    save_every: int = 10  # iterations between checkpoints
    out: str = ""  # a new folder for the run; none: one under runs/
    resume: str = ""  # folder of a run to go on with; some flags may change it

    def __post_init__(self):
        may_be_zero = ("steps", "warmup", "half_life", "ref_reset", "distill_steps", "seed")
        for name, value in vars(self).items():
            zero = value == 0 and name in may_be_zero
            if type(value) in (int, float) and not (zero or 0 < value < math.inf):
                raise UserError(f"{name} {value}: too small, or not finite")
        if "{problem}" not in self.prompt:
            raise UserError("--prompt: write {problem} where the problem goes")


# Presets are flags, and the user's own override them. small, for some hundred million parameters
# on a laptop, is the default of --model; the last is the paper's, as far as it tells.
SHARED = f"""--device {"cuda" if torch.cuda.is_available() else "cpu"}
    --rollouts 8 --updates 2 --buffer 5 --warmup 0 --half-life 0 --prompt
    "{{problem}} Let's think step by step and output the final answer within \\\\boxed{{}}." """
PRESETS = {
    "toy": "",
    "small": f"""{SHARED} --steps 50 --prompts 8 --beta 0.1 --lr 1e-5 --max-new-tokens 256 --rows 64
    --micro-batch-tokens 1024 --eval-problems 200 --save-every 5""",
    "r1-distill-1.5b": f"""{SHARED} --steps 650 --prompts 128 --beta 0.002 --lr 1e-6
    --max-new-tokens 8192 --rows 128 --eval-problems 100 --eval-samples 16 --dtype bfloat16
    --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --data deepscaler.json --save-every 1""",
}


# ---- 6. One update -------------------------------------------------------------------------------


def add_signals(trajectories, cfg):
    """Writes into each trajectory the "signal" that its loss sees: the reward, or GRPO's advantage,
    from the R responses to each of P problems. For R = 1 it is the reward, as in the trainer that
    the paper used.

    The paper's 7B run centers ReVal's reward too: it takes the mean of the group away. V(s_1)
    absorbs a constant, but not this mean, which holds the response itself: it shrinks the gap
    between right and wrong by 1/R; and in the buffer means of different ages meet."""
    signal = torch.tensor([t["reward"] for t in trajectories]).view(-1, cfg.rollouts)  # [P, R]
    if cfg.algo == "grpo" and cfg.rollouts > 1:
        mean, std = signal.mean(1, keepdim=True), signal.std(1, keepdim=True)  # [P, 1] each
        signal = (signal - mean) / (std + 1e-6)  # [P, R]
    for t, value in zip(trajectories, signal.flatten()):
        t["signal"] = value


def master_weights(model):
    """The float32 weights that the optimizer changes. A bfloat16 weight has steps of 1/256 of its
    size: a learning rate of 1e-6 would hardly move it. So the sum of its steps is kept in float32,
    and moves it at last. A float32 weight is its own master, and learns earlier."""
    return [
        weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_()
        for weight in model.parameters()
    ]


def micro_batches(batch, max_tokens):
    """The batch in lists of up to max_tokens padded tokens (but a response each), by length."""
    parts = [[]]
    for t in sorted(batch, key=lambda t: len(t["prompt"]) + len(t["response"])):
        size = len(t["prompt"]) + len(t["response"])
        if parts[-1] and (len(parts[-1]) + 1) * size > max_tokens:
            parts.append([])
        parts[-1].append(t)
    return parts


def gradient(model, masters, batch, cfg):
    """Puts the gradient of the loss of a batch, clipped to norm 1, into the master weights' .grad.
    Micro-batches save memory and change nothing: each sum is divided by a count of the whole batch.
    -> figures of the batch: loss; residual, the root of its mean square; kl, the mean of log pi -
    log pi_ref of a response; grad_norm, before it is clipped. UserError if it is not finite."""
    for master in masters:
        master.grad = torch.zeros_like(master)
    n_tokens = sum(len(t["response"]) for t in batch)
    loss_sum = kl_sum = square_sum = 0.0
    for part in progress(micro_batches(batch, cfg.micro_batch_tokens), "part"):
        q, v, mask = score(model, part)  # [B, T] each
        q_ref = pad([t["q_ref"] for t in part], q.device)  # [B, T]
        v_ref = pad([t["v_ref"] for t in part], q.device)  # [B, T]
        signal = torch.tensor([t["signal"] for t in part], device=q.device)  # [B]
        if cfg.algo == "grpo":
            logp_old = pad([t["q_old"] - t["v_old"] for t in part], q.device)  # [B, T]
            loss = grpo_loss(q - v, logp_old, signal, mask, n_tokens)
        else:
            calibrated = cfg.algo == "reval"
            loss, info = reval_loss(q, v, q_ref, v_ref, signal, mask, cfg.beta, calibrated)
            loss = loss * len(part) / len(batch)
            square_sum += info["residual"].square().sum().item()
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        for master, grad in zip(masters, grads):
            master.grad += grad
        loss_sum += loss.item()
        kl_sum += ((q - v) - (q_ref - v_ref)).sum().item()
    stats = {"loss": loss_sum, "kl": kl_sum / len(batch)}
    if cfg.algo != "grpo":  # it has none
        stats["residual"] = math.sqrt(square_sum / len(batch))
    with explained("no update can be made; lower --lr"):
        norm = torch.nn.utils.clip_grad_norm_(masters, 1.0, error_if_nonfinite=True)
    return stats | {"grad_norm": norm.item()}


@torch.no_grad()
def update(model, masters, optimizer):
    """One step of the optimizer. The weights that sample follow their masters, in place, and the
    gradients are freed: rollouts want the memory."""
    optimizer.step()
    optimizer.zero_grad()
    for weight, master in zip(model.parameters(), masters):
        weight.copy_(master)


# ---- 7. The loop ---------------------------------------------------------------------------------


def rng(seed, step, purpose):
    """A numpy generator for one purpose at one step. Every random choice uses such a one: so an
    extra evaluation does not change the training after it, and there is none to be saved."""
    return np.random.default_rng([seed, step, zlib.crc32(purpose.encode())])


def collect(run, tokenizer, problems, cfg, step):
    """Samples a response to each problem, adds what the loss needs, and buffers it. -> the batch"""
    fresh = rollout(run.model, tokenizer, problems, cfg, step, "rollout")
    add_signals(fresh, cfg)
    cache_values(run.reference, fresh, cfg, "ref")
    if cfg.algo == "grpo":
        cache_values(run.model, fresh, cfg, "old")
    run.buffer.add(fresh)
    return fresh


def learn(run, fresh, cfg, step):
    """The K updates of an iteration, from the fresh batch and then the buffer (GRPO: from the fresh
    batch again). -> the figures of the first, which is on-policy."""
    rise = min(1.0, step / max(1, cfg.warmup))
    decay = 0.5 ** (step / cfg.half_life) if cfg.half_life else 1.0
    run.optimizer.param_groups[0]["lr"] = cfg.lr * rise * decay
    figures = {}
    for k in progress(range(cfg.updates), "update"):
        batch = fresh
        if k > 0 and cfg.algo != "grpo":
            draw = (step - 1) * (cfg.updates - 1) + k  # the first of the run is number 1
            batch = run.buffer.sample(len(fresh), rng(cfg.seed, draw, "replay"))
        figures = gradient(run.model, run.masters, batch, cfg) | figures  # the first ones stay
        update(run.model, run.masters, run.optimizer)
    return figures


def train(cfg):
    """Runs cfg from start to end. -> the figures that the command line prints last, as a dict."""
    begin = time.time()
    if not cfg.resume or cfg.out != cfg.resume:
        cfg.out = cfg.out or time.strftime("runs/%Y%m%d-%H%M%S")
        if Path(cfg.out).exists():
            raise UserError(f"--out {cfg.out}: it is there already; name a new one, or --resume it")
    problems, held_out = load_problems(cfg)
    model, tokenizer = load_model(cfg)
    check_prompts(model, tokenizer, problems + held_out, cfg)
    if model.num_parameters() < 1e6:
        torch.set_num_threads(1)  # for so small a model a second thread is only one to wait for
    if not cfg.model and not cfg.resume:
        distill(model, tokenizer, cfg)
    if not (cfg.steps or cfg.resume):  # nothing is to be learnt
        return evaluate(model, tokenizer, held_out, cfg, 0) | {"out": cfg.out}
    run = Run(cfg, model, (problems, held_out))  # reference, optimizer, buffer, history
    write(cfg, "config.json", [vars(cfg)])  # for --resume
    columns = ["step", "rollouts", "reward", "accuracy", "residual", "kl", "length", "seconds"]
    print(*map("{:>8}".format, columns))

    def show(row):
        print(*(f"{row[name]:8.4g}" if name in row else "       -" for name in columns), flush=True)

    for row in run.history[-1:]:  # --resume goes on after it
        show(row)
        begin -= row["seconds"]
    for step in progress(range(len(run.history), cfg.steps + 1), "step"):
        row = {"step": step, "rollouts": step * cfg.prompts * cfg.rollouts}
        if step > 0:  # step 0 only evaluates
            # 1. Collect: a few problems, several responses to each by the live model.
            n = len(problems)
            chosen = rng(cfg.seed, step, "prompts").choice(n, cfg.prompts, replace=n < cfg.prompts)
            asked = [problems[i] for i in chosen for _ in range(cfg.rollouts)]
            fresh = collect(run, tokenizer, asked, cfg, step)
            for name in ("reward", "length", "ended"):
                row[name] = fmean(t[name] for t in fresh)

            # 2. Learn: K updates, from the fresh batch and from the buffer.
            row |= learn(run, fresh, cfg, step)

            # 3. Now and then the reference catches up: what was cached from the old one is stale.
            if cfg.ref_reset and step % cfg.ref_reset == 0:
                run.reference.load_state_dict(model.state_dict())
                cache_values(model, run.buffer.items, cfg, "ref")

        # 4. Evaluate, tell, keep: --resume goes on from here as if nothing had happened.
        done = step == cfg.steps
        if done or step % cfg.eval_every == 0:
            row |= evaluate(model, tokenizer, held_out, cfg, step)
        row["seconds"] = time.time() - begin
        run.history.append(row)
        write(cfg, "metrics.jsonl", run.history)
        show(row)
        if done:
            with explained(f"{cfg.out}/model: not written; make room, and --resume {cfg.out}"):
                model.save_pretrained(f"{cfg.out}/model")
                tokenizer.save_pretrained(f"{cfg.out}/model")
        if done or step % cfg.save_every == 0:
            run.save(cfg)

    pictures = {name: sparkline(run.history[1:], name) for name in ("reward", "length")}
    return row | pictures | {"out": cfg.out}


# ==================================================================================================
# PART III: WHAT A RUN STANDS ON
# ==================================================================================================

# ---- 8. The model: scores and rollouts -----------------------------------------------------------
# Any causal LM of transformers will do, if logits = hidden @ head.T, and if a cache of keys and
# values changes nothing. It is never in train mode: what learns must be what samples.


def make_model(seed):
    """A Qwen2 of 0.13M random weights and its tokenizer of 19 tokens."""
    # The first name is there as AutoTokenizer would add it to any saved tokenizer of a Qwen2.
    words = ["<|endoftext|>", "<bos>", "<eos>", *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>"
    )
    torch.manual_seed(int(rng(seed, 0, "weights").integers(2**62)))
    config = transformers.Qwen2Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.1,  # 0.02, the default, suits wide models
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer


def end_tokens(model, tokenizer):
    """The ids that end a response, as a set: the tokenizer's EOS, those that the model names, and
    what the chat template writes after an answer. Only special or added tokens can be one."""
    named = np.atleast_1d(model.generation_config.eos_token_id)  # one id, or a list
    ends = {tokenizer.eos_token_id, *named.tolist()}
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    with contextlib.suppress(Exception):  # no template, or one that encode_prompts will refuse
        tail = tokenizer.apply_chat_template(chat, tokenize=False).partition("ANSWER")[2]
        ends.update(tokenizer(tail, add_special_tokens=False)["input_ids"])
    return ends & set(tokenizer.get_added_vocab().values())


def load_model(cfg):
    """-> (model, tokenizer). UserError if --model names none, or one that does not suit. On a GPU
    there is gradient checkpointing in each layer."""
    with explained(f"--model {cfg.model or 'none'}, --device {cfg.device}: cannot be used"):
        if not cfg.model:
            model, tokenizer = make_model(cfg.seed)
            return model.to(cfg.device), tokenizer
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.model, dtype=cfg.dtype, output_loading_info=True
        )
        if info["missing_keys"]:  # they would be made at random
            raise ValueError(f"its weights lack {min(info['missing_keys'])}")
        model.to(cfg.device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each length of text
        if not hasattr(model.config.get_text_config(), "num_attention_heads"):
            raise ValueError("it has no cache of keys and values")
        tokens = torch.arange(8, device=model.device)  # [8]
        v = score(model, [{"prompt": tokens[:7], "response": tokens[7:]}])[1]  # [1, 1]
        logits = model(input_ids=tokens[None, :7]).logits[0, -1].float()  # [A]
        if not (logits.logsumexp(0) - v).abs() < 0.2:  # there is a bias, a scale, a soft cap, a nan
            raise ValueError("its logits are not hidden @ lm_head.T")
        for layer in model.modules():
            if "cuda" in cfg.device and isinstance(layer, GradientCheckpointingLayer):
                again = torch.utils.checkpoint.checkpoint
                layer.forward = functools.partial(again, layer.forward, use_reentrant=False)
    return model, tokenizer


def encode_prompts(tokenizer, problems, cfg):
    """The prompts of problems: a list of 1-D int64 tensors, in the chat template if there is one.
    The template brings its own BOS, without one the tokenizer adds its special tokens. UserError if
    the template fails, or the tokenizer does not know a sign."""
    raw = cfg.raw_prompt or tokenizer.chat_template is None
    texts = [cfg.prompt.replace("{problem}", p["problem"]) for p in problems]
    with explained("no prompts can be made; without --model only sums; bad template: --raw-prompt"):
        if not raw:
            chats = [[{"role": "user", "content": text}] for text in texts]
            texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        prompts = tokenizer(texts, add_special_tokens=raw)["input_ids"]
    return [torch.tensor(prompt) for prompt in prompts]


def check_prompts(model, tokenizer, problems, cfg):
    """Shows a prompt, and what ends a response. UserError if the longest are too long to read."""
    prompts = encode_prompts(tokenizer, problems, cfg)
    ends = tokenizer.decode(list(end_tokens(model, tokenizer)))
    print(f"prompt: {tokenizer.decode(prompts[0])!r}, ended by: {ends!r}")
    longest = max(map(len, prompts)) + cfg.max_new_tokens
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", math.inf)
    # Beyond that of longrope the rotations depend on the longest text of a batch.
    limit = getattr(config, "original_max_position_embeddings", limit)
    if longest > limit:
        raise UserError(f"{longest} tokens, but the model reads {limit}; lower --max-new-tokens")


def pad(rows, device, side="right"):
    """1-D tensors -> one tensor [B, T] on device, padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(rows, True, padding_side=side).to(device)


def score(model, batch):
    """Q(s_h, a_h) and V(s_h) of the response tokens of a batch of trajectories.
    -> (q, v, mask), [B, T] each, 0 in the padding; mask marks the response tokens, EOS included.
    It comes from lengths, never from comparing with a pad id, which may be the EOS id.
    Shapes: L tokens in the longest text without its last token, N response tokens in all."""
    device = model.device
    actions = pad([t["response"] for t in batch], device)  # [B, T]
    mask = pad([torch.ones_like(t["response"]) for t in batch], device).bool()  # [B, T]
    prompt_lengths = torch.tensor([len(t["prompt"]) for t in batch], device=device)  # [B]
    # The padding is on the right, where a causal model's earlier tokens do not see it: it needs no
    # attention mask. The last token is left out, for nothing follows it.
    tokens = pad([torch.cat([t["prompt"], t["response"]])[:-1] for t in batch], device)  # [B, L]
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, L, D]
    row, h = mask.nonzero(as_tuple=True)  # [N], [N]
    # The state s_h ends with the token before a_h: for the first one that is the prompt's last.
    states = hidden[row, prompt_lengths[row] - 1 + h]  # [N, D]
    head = model.get_output_embeddings().weight  # [A, D]
    q, v = q_from_logits(states, head, actions[mask])  # [N], [N]
    zeros = torch.zeros_like(mask, dtype=q.dtype)  # [B, T]
    return zeros.masked_scatter(mask, q), zeros.masked_scatter(mask, v), mask


@torch.no_grad()
def cache_values(model, trajectories, cfg, name):
    """Writes the model's "q_<name>" and "v_<name>" [T] into each trajectory. The reference's serve
    again and again, so they are computed once; by score, as the live model's are: so equal models
    cancel to exactly 0. GRPO also needs those of the policy that sampled."""
    for part in progress(micro_batches(trajectories, cfg.micro_batch_tokens), "scoring"):
        q, v, mask = (x.cpu() for x in score(model, part))  # [B, T] each
        for i, t in enumerate(part):
            t[f"q_{name}"] = q[i][mask[i]]  # [T]
            t[f"v_{name}"] = v[i][mask[i]]  # [T]


@torch.no_grad()
def sample(model, prompts, ends, cfg, seed):
    """One response of the policy softmax(Q(s, .)) to each prompt: 1-D int64 tensors, which end with
    one of ends, or were cut at cfg.max_new_tokens. Up to cfg.rows of them grow side by side.

    A cache keeps what later tokens need of earlier ones, their keys and values, so that only the
    newest token is read. A response that has ended leaves the batch and the cache.
    Shapes: B responses that go on, L tokens in the longest text so far.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    renamed = "cache" in inspect.signature(model.forward).parameters  # in transformers 5.24
    responses = [[] for _ in prompts]
    for start in progress(range(0, len(prompts), cfg.rows), "sampling"):
        active = responses[start : start + cfg.rows]
        texts = prompts[start : start + cfg.rows]
        # Texts must end in the same column: so the padding is on the left, masked, not counted.
        tokens = pad(texts, model.device, "left")  # [B, L]
        mask = pad([torch.ones_like(text) for text in texts], model.device, "left")  # [B, L]
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, L]
        cache = transformers.DynamicCache(config=model.config)
        for _ in progress(range(cfg.max_new_tokens), "token"):
            read = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
            read["cache" if renamed else "past_key_values"] = cache
            logits = model(**read, logits_to_keep=1).logits[:, -1]  # [B, A]
            pi = logits.float().softmax(1)  # [B, A]
            if not pi.isfinite().all():
                raise UserError("the model's logits are not finite; lower --lr, or take another")
            tokens = torch.multinomial(pi, 1, generator=generator)  # [B, 1]
            for response, token in zip(active, tokens[:, 0].tolist()):
                response.append(token)
            keep = [row for row, response in enumerate(active) if response[-1] not in ends]
            if not keep:
                break
            if len(keep) < len(active):
                active = [active[row] for row in keep]
                rows = torch.tensor(keep, device=model.device)  # [B], fewer from here on
                tokens, mask, positions = tokens[rows], mask[rows], positions[rows]
                cache.reorder_cache(rows)
            mask = F.pad(mask, (0, 1), value=1)  # [B, L + 1]
            positions = positions[:, -1:] + 1  # [B, 1]
    return [torch.tensor(response) for response in responses]


def rollout(model, tokenizer, problems, cfg, step, purpose):
    """Samples one response to each problem. -> trajectories, plain dicts: all that the problem has,
    prompt [P], response [T] (int64, EOS included), its length, text, ended (by itself?), found (the
    answer in it), reward, verdict (right, wrong, no answer or cut), step."""
    prompts = encode_prompts(tokenizer, problems, cfg)
    ends = end_tokens(model, tokenizer)
    responses = sample(model, prompts, ends, cfg, int(rng(cfg.seed, step, purpose).integers(2**62)))
    trajectories = []
    for p, prompt, response in zip(problems, prompts, responses):
        ended = int(response[-1]) in ends
        # A template may open a thought. Special tokens stay in the text, as they may mark its end.
        thought = "<think>" if tokenizer.decode(prompt).rstrip().endswith("<think>") else ""
        text = thought + tokenizer.decode(response[:-1] if ended else response)
        found = extract_answer(text)
        reward, verdict = 0.0, "cut"
        if ended:
            verdict = "wrong" if found else "no answer"
            reward = float(reward_function(text, p))
            if reward > 0:
                verdict = "right"
        t = {"prompt": prompt, "response": response, "length": len(response), "text": text}
        t |= {"ended": ended, "found": found, "reward": reward, "verdict": verdict, "step": step}
        trajectories.append(p | t)
    return trajectories


# ---- 9. Problems: the built-in task and its teacher, or a file -----------------------------------
# The task is to add three two-digit numbers, at once or after written column sums with a carry:
#     47+85+36=?  ->  \boxed{168}          or          7+5+6=18;4+8+3+1=16;\boxed{168}
# A tiny model cannot add in its head, but it can on paper. Its teacher is always right and mostly
# shows no work: a bad habit to copy, and RL has to find the better one.

WORDS = [*"0123456789+=?;", "\\boxed{", "}"]  # all that the tiny model reads and writes
WRITTEN_SHARE = 0.1  # of the teacher's answers, at the end of the warm start


def make_problem(generator, held_out):
    """A sum, as {"problem", "answer"}. One sum in ten, whatever the order of its numbers, belongs
    to the held-out set, so training never meets it."""
    while True:
        a, b, c = generator.integers(10, 100, 3).tolist()
        if held_out == (zlib.crc32(repr(sorted([a, b, c])).encode()) % 10 == 0):
            return {"problem": f"{a}+{b}+{c}=?", "answer": str(a + b + c)}


def demonstrate(problem, written):
    """The teacher's answer to a sum, with or without the written work."""
    a, b, c = (int(number) for number in re.findall(r"\d+", problem))
    units = a % 10 + b % 10 + c % 10
    tens = a // 10 + b // 10 + c // 10 + units // 10  # with the carry
    answer = f"\\boxed{{{a + b + c}}}"
    if not written:
        return answer
    work = f"{a % 10}+{b % 10}+{c % 10}={units};{a // 10}+{b // 10}+{c // 10}+{units // 10}={tens};"
    return work + answer


def distill(model, tokenizer, cfg):
    """The warm start: supervised learning from the teacher, of -log pi = V - Q. RL can strengthen
    only what a model does sometimes. So the tiny one is first shown how: the teacher writes its
    work until the model can add, and then mostly leaves it out."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    generator = rng(cfg.seed, 0, "distillation")
    for step in progress(range(cfg.distill_steps), "warm start"):
        share = step / cfg.distill_steps
        problems, answers = [], []
        for _ in range(32):
            problem = make_problem(generator, held_out=False)
            written = share < 0.8 or generator.random() < WRITTEN_SHARE
            problems.append(problem)
            answers.append(demonstrate(problem["problem"], written) + tokenizer.eos_token)
        prompts = encode_prompts(tokenizer, problems, cfg)
        responses = tokenizer(answers, add_special_tokens=False)["input_ids"]
        batch = [{"prompt": p, "response": torch.tensor(r)} for p, r in zip(prompts, responses)]
        q, v, mask = score(model, batch)  # [B, T] each
        loss = (v - q).sum() / mask.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = math.cos(share * math.pi / 2) ** 2
        optimizer.param_groups[0]["lr"] = 6e-3 * min((step + 1) / 50, cosine)
        optimizer.step()


def is_right(text, row):
    """The reward of a response that ended by itself: is its final answer the row's?"""
    return is_correct(text, row["answer"])


# The place for a reward of your own: any function of the text and of the problem's row, with all
# columns of the data file (their names in lower case), from 0 to 1. Rows then need no answer.
reward_function = is_right


def find_answer(row):
    """The answer in a row of a data file, as text; None if section 10 finds none to check."""
    for key in ("answer", "final_answer", "solution"):
        value = row.get(key)
        match value:
            case [single]:
                value = single
        if type(value) not in (str, int, float):
            continue  # several answers, an object, true: nothing to compare with
        answer = str(value).rpartition("####")[2].strip()  # GSM8K: behind a solution
        if key == "solution":
            answer = extract_answer(str(value))
        if answer and is_correct(f"\\boxed{{{answer}}}", answer):
            return answer


# LaTeX in JSON with a single backslash: "\frac" is a form feed and "rac". It is meant where nothing
# else can be, and before these names. Pairs, and quotation marks, are passed over.
LATEX = r"(\\[\\\"])|\\(?=[^bfnrtu/]|b[a-z]|f(?:rac|box|orall|loor)|u(?![\da-fA-F]{4})|n(?:eq\b"
LATEX += r"|abla)|r(?:ho\b|ight|angle)|t(?:heta|imes\b|ext(?:bf|it|rm)?\b|au\b|frac|riangle))"


def read_problems(path):
    """A JSONL file, or one JSON array, of objects with a problem (or question) and an answer (or
    final_answer, or a solution that holds one), names in any case. -> a list of the rows, with
    "problem" and "answer". Those that will not do are left out, aloud; UserError if none is left.
    """
    with explained(f"{path}: no JSON lines/array; pandas: to_json(F, orient='records', lines=1)"):
        data = Path(path).read_bytes()
        text = data.decode(json.detect_encoding(data)).strip()
        text = re.sub(LATEX, lambda found: found[1] or r"\\", text)
        if not text.startswith("["):
            # JSON lines are an array without commas; read at once, an error tells its line.
            text = "[" + re.sub(r"\n(?=[ \t]*\S)", ",\n", text) + "]"
        rows = json.loads(text)
    problems = {}
    left_out = []  # reasons
    for item in rows:
        row = {key.lower(): value for key, value in item.items()} if isinstance(item, dict) else {}
        problem = row.get("problem") or row.get("question")
        answer = find_answer(row)
        words = tuple(problem.split()) if isinstance(problem, str) else ()
        if not words:
            left_out.append("no problem (or question)")
        elif not answer and reward_function is is_right:
            left_out.append("no answer (or final_answer, or solution) to check")
        elif words in problems:  # it might be both trained on and held out
            left_out.append("a problem that was there")
        else:
            problems[words] = row | {"problem": problem, "answer": answer or row.get("answer")}
    reasons = ", ".join(f"{left_out.count(why)} with {why}" for why in dict.fromkeys(left_out))
    if not problems:
        raise UserError(f"{path}: no row can be used: {reasons or 'there is none'}")
    if left_out:
        print(f"{path}: rows left out: {reasons}")
    return list(problems.values())


def load_problems(cfg):
    """-> (problems to train on, held-out problems), two lists of rows with "problem" and "answer".
    Held out are those of --eval-data, else a tenth; at most eval_problems, never trained on."""
    generator = rng(cfg.seed, 0, "problems")
    if not (cfg.data or cfg.eval_data):
        problems = [make_problem(generator, held_out=False) for _ in range(10_000)]
        held_out = [make_problem(generator, held_out=True) for _ in range(cfg.eval_problems)]
        return problems, held_out
    problems = read_problems(cfg.data) if cfg.data else []
    generator.shuffle(problems)
    held_out = problems[: max(1, len(problems) // 10)]
    if cfg.eval_data:
        held_out = read_problems(cfg.eval_data)
        generator.shuffle(held_out)  # a file may be sorted
    held_out = held_out[: cfg.eval_problems]
    evaluated = {tuple(p["problem"].split()) for p in held_out}
    problems = [p for p in problems if tuple(p["problem"].split()) not in evaluated]
    if cfg.steps and not problems:
        raise UserError(f"--data {cfg.data}: nothing is left to train on beside what is held out")
    return problems, held_out


# ---- 10. The answer checker ----------------------------------------------------------------------
# It is the reward: what it gets wrong, the model will learn. So it is a rule that anyone can read:
# extract the final answer, rewrite it into one spelling, compare. (Skip it until a reward is odd.)
#  - Strict: in doubt it says no. An answer that was only thought, was cut, is denied just before or
#    after it, or joined by "or", is wrong, and so is a sum not worked out, as 12+34.
#  - Exact: 0.5 is 1/2, but 0.33 is not 1/3. It takes ten digits to stand for a longer number.
#  - Total: any two strings give a verdict, and soon.
# Numbers, roots, pi and letters compare by value, functions, words and inequalities as text. A unit
# may be missing, but not differ. It does not solve, simplify or read prose.

DEPTH = 6  # no answer has braces in braces, or brackets in brackets, deeper than that
BRACED = r"(?:[^{}\\]|\\.)*"  # text without braces, and then with ever more
for _ in range(DEPTH):
    BRACED = rf"(?:[^{{}}\\]|\\.|\{{{BRACED}\}})*"
# What follows \boxed: {12}, or one number or letter, as in TeX. No "or", no denial may follow.
BOXED = rf"(?s)\s*(?:\{{({BRACED})\}}|([\d.,]*\d|[A-Za-z])(?![.,]?\w))"
BOXED += r"(?![\s$.,]*(?:\\text)?[\s{]*(?:or|is not|is wrong|isn't)\b)"
# What may not come before it: "it can't be \boxed{5}"; "\boxed{5} or \boxed{6}"; "either 5 or ...".
HEDGE = r"(?s)(?:not|n't)(?: be)?[\s$({\\]*$|(?:\\boxed|\beither\b).*\bor\b.{0,20}$"
# What comes before an answer without a box, and what ends it.
MARK = r"(?i)<answer>(?=[^<]*</answer>)|####|\banswer\b[\s*]{0,9}(?:(?:is|are)\b|[:=])"
END = r"</answer>|\n|[.!](?:\s|$)"


def extract_answer(response):
    r"""The final answer of a response, as text, or None. Only what follows </think> counts. There:
    the last \boxed, else what follows the last "<answer>", "####" or "answer is"."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:  # a thought that does not end concludes nothing
        return None
    before, box, after = text.rpartition(r"\boxed")
    if box:  # the last one, even if it was cut and cannot be read
        found = re.match(BOXED, after[:2000])
        if not found or re.search(HEDGE, before[-100:]):
            return None
        return found[found.lastindex].strip() or None  # what the braces hold, or the one token
    marked = re.split(MARK, text)[1:] or [""]
    return re.split(END, marked[-1].strip(" \n:*"))[0].strip() or None


# A regular expression, what becomes of it, an example; from top to bottom. A tilde is a space.
SIGNS = r"""
    \\\\(?:\[\w+\])?                                              ],[           a new row, \\[4pt]
    \\(?:left|right|[bB]ig+[lr]?|displaystyle|q?quad)(?![a-z])    ~             \left(
    \\[,;:\s()\[\]$]|[$£€\s]                                      ~             5\,cm, \$5
    [(\[]?~*\\begin\{(?:array\}\{[^{}]*|[a-z]*matrix)\}           [[            a matrix is the
    (?:\],\[)?~*\\end\{(?:array|[a-z]*matrix)\}~*[)\]]?           ]]            list of its rows
    \\(?:text[a-z]*|math[a-z]*|mbox|operatorname)~?\{([^{}]*)\}   ~\1~          \text{cm}
    ½                                                             \\frac{1}{2}  1½
    ²                                                             ^{2}          x²
    [−–‐]                                                         -             longer minus signs
    \\cdot|\\times|[×·⋅]                                          *             2 \cdot 3
    \\div|÷                                                       /             6 \div 2
    \\?sqrt                                                       √             sqrt(2)
    √(?!\[)                                                       √[2]          a square root
    \\pi|(?<![A-Za-z])pi(?![A-Za-z])                              π             2pi
    \\alpha                                                       α
    \\beta                                                        β
    \\theta                                                       θ
    \\omega                                                       ω
    \\infty                                                       ∞
    \\emptyset|\\varnothing                                       ∅             the empty set
    \\in(?!t)|\\approx|[∈≈]                                       =             x \in (1,2)
    \\lt                                                          <
    \\le(?:q|qslant)?(?![a-z])|≤                                  <=            x \leq 2
    \\ge(?:q|qslant)?(?![a-z])|≥                                  >=            x \ge 2
    \\neq?(?![a-z])|!=                                            ≠             x \ne 2
    \\mid(?!d)|\\[lr]?vert                                        |             \lvert x \rvert
    \^~?(?:\{~?\\circ~?\}|\\circ|°)|~?\bdegrees?\b                °             45^\circ
    \\%|~?\bper~?cent(?:age)?\b                                   %             12 per cent
    \{,\}|&|,?~*\band\b                                           ,             1{,}234
    (\d)[eE]([+-]?\d+)                                            \1*10^{\2}    1.5e-3
"""
SIGNS = [row.split()[:2] for row in SIGNS.strip().splitlines()]
NESTED = [  # what may be in one another, and is rewritten from the inside out
    (r"^\{(.*)\}$", r"\1"),  # {5}
    (r"([_^]) ?\{(-?\d+|\w)\}(?!\d)", r"\1\2"),  # x^{2} is x^2
    (r"\^ ?\{([^{}]*)\}", r"^(\1)"),  # x^{n+1} is x^(n+1)
    (r"√\[(\d+)\] ?(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+|\w))", r"((\2\3\4)^(1/\1))"),  # √{5}, √5
    (r"\\[dtc]?frac ?(?:\{([^{}]*)\}|(\d)) ?(?:\{([^{}]*)\}|(\d))", r"((\1\2)/(\3\4))"),  # \frac12
    (r"(?<![\d.^/])(\d+)(?: ?\(\((\d+)\)/\((\d+)\)\)| (\d+)/(\d+))", r"(\1+\2\4/\3\5)"),  # 1 1/2
]
# The text of a choice: no judgement on it, and no other choice, as in "(A) or (B)".
CHOICE = r"(?! ?(?:or|and|nor|not|is)\b)(?!.*\b[A-J](?:[).:]|$)) ?(.+)"
REWRITES = [
    (r"\\!~?", ""),  # 1,\!234
    (r"~+", " "),  # one space
    (r"^[ *^]+|[ *^.,;:\\]+$", ""),  # **12**.
    *NESTED * DEPTH,
    (r"^\\\{(.*)\\\}$", r"\1"),  # a set \{1,2\} is a list without brackets
    (r"(?<=\d) ?\( ?([A-Za-z ]{3,}?) ?\)$", r" \1"),  # 9 (apples)
    (rf"^\(?([A-Ja-j])(?:\)|[.:] ){CHOICE}", r"\1#\2"),  # (B) 12 is B#12
    # 1,234 and 1 234, at the start or after "=": elsewhere it may be a list, as 1, 234 is.
    (r"(^|= ?)(-?\d{1,3})([, ])(\d{3})(?:\3(\d{3}))?(?:\3(\d{3}))?(?![\d,/])", r"\1\2\4\5\6"),
    # Spaces go, but for those between words or numbers: 2 x is 2x, but 1 2 is not 12.
    (r"(?<![^\W_]) | (?![^\W_])|(?<![A-Za-z]{2}) (?=[A-Za-z]\b)", ""),
    (r"^([A-Za-z]{2}[\w ',.?-]*?)((?<=[a-z]{3})!+)?$", lambda words: words[1].lower()),  # Paris!
    (r"(?<![\w.:])0+(?=\d)", ""),  # 007
    (r"(?<![^(\[,;=])\+", ""),  # (3,+\infty)
]
# A unit is a symbol or a phrase that holds a plural, but no word that changes the number.
SYMBOL = r" ?(?:[kcm]?m|[km]?g|m?[lL]|h|s|ft|in|hr|lb|oz|yd|mi|mph|min)"
NUMERAL = r"(?:hundred|thousand|\w+illion|dozen|ten|third|quarter|half|halve|(?!mon)\w+th)s?"
NO_UNIT = rf"(?! ?(?:{NUMERAL}|to|out|plus|minus|perhaps)\b)(?![A-Za-z/ ]*\b(?:or|not|roots?)\b)"
PLURAL = r"(?:[a-z]{3,}(?<![sui])s|feet|people|inch|hour)"
PHRASE = rf"{NO_UNIT} ?(?:[A-Za-z]+[ /])*{PLURAL}\b[A-Za-z/ .]*"
OPTIONAL = [  # what may be missing, but not differ
    r"(?<=^[A-Ja-j])#.*",  # the text of a choice
    # A name, as in f(x)=5 or 5=x. But xy=5 and \sin x=5 are equations.
    r"^(?!\\?[a-z]{2,3}\b)(?:[^\W\d]\d*|[\\|'():, {}])+=(?=[^=]*$)|=[^\W\d_]$",
    rf"(?<=[\d)π°])(?:%|°[CF]?|(?:{SYMBOL}(?:/{SYMBOL})?\.?|{PHRASE})(?:\^-?\d)?)$",
]


def normalize(text):
    """An answer in the one spelling in which answers are compared."""
    for pattern, new in SIGNS + REWRITES:
        text = re.sub(pattern, new, text)
    return text


SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS = SUMS | {ast.Div: operator.truediv, ast.Pow: operator.pow}


def value_of_node(node):
    """The value of what Python parsed: exact if it can be. Arithmetic, and no more."""
    match node:
        case ast.Constant():
            return Fraction(repr(node.value))
        case ast.Name(id="π"):
            return math.pi
        case ast.Name(id=letter):  # some number of its own for each, so that x + 1 is 1 + x
            return 2 + math.sin(ord(letter))
        case ast.UnaryOp(op=ast.USub()):
            return -value_of_node(node.operand)
        case ast.BinOp():
            x, y, op = value_of_node(node.left), value_of_node(node.right), type(node.op)
            known = isinstance(node.right, ast.BinOp) and not isinstance(node.left, ast.BinOp)
            known = known and (y % 1 or op is ast.Mult)
            if op in SUMS and type(x) is type(y) is Fraction and not known:
                raise ValueError("12+34 is to be worked out; 1+1/2 and 6*10^5 are numbers")
            if op is ast.Pow and abs(y) * len(str(x)) > 1000:
                raise ValueError("it would take forever")
            return OPERATORS[op](x, y)
    raise ValueError("no arithmetic")


def value_of(text):
    """The value of a normalized formula, None for anything else, as a word: "on" is not "no"."""
    text = text.replace("°", "").replace("^", "**")
    if not re.fullmatch(r"(?!.*(?:[A-Za-z]{2}|//))(?:[^\W_]|[-+*/(). ])*", text):
        return None
    text = re.sub(r"(?<=[\w)]) ?(?=[^\W\d]|\()", "*", text)  # 2x(x+1) is 2*x*(x+1)
    try:
        value = value_of_node(ast.parse(text, mode="eval").body)
        return value if math.isfinite(value) else None
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def same_value(a, b):
    """Are both formulas, and of one value? Two integers exactly, others to ten digits."""
    x, y = value_of(a), value_of(b)
    if x is None or y is None:
        return False
    whole = x % 1 == y % 1 == 0
    return abs(x - y) <= (0 if whole else abs(y) / 10**10)


def split_list(text):
    """The items between the commas that are outside all brackets."""
    items, depth = [""], 0
    for sign in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(sign, 0)
        if sign in ",;" and not depth:
            items.append("")
        else:
            items[-1] += sign
    return items


def parts_of(text):
    """The items of a list, sorted; of a tuple, an interval or a matrix in order, with brackets."""
    items = split_list(text)
    if len(items) == 1 and re.fullmatch(r"[(\[].*[)\]]", text):
        return [text[0], *split_list(text[1:-1]), text[-1]]
    return sorted(items, key=lambda item: (value_of(item.rpartition("=")[2]) or 0, item))


def same_answer(a, b, depth=0):
    """Are two normalized answers, or parts of them, the same?"""
    if same_value(a.replace("%", "/100"), b.replace("%", "/100")):  # 12% is 0.12
        return True
    for optional in OPTIONAL:
        if len({*re.findall(optional, a), *re.findall(optional, b)}) > 1:
            return False
        a, b = re.sub(optional, "", a), re.sub(optional, "", b)
    if a == b or same_value(a, b):
        return a != ""
    parts_a, parts_b = parts_of(a), parts_of(b)
    if depth > DEPTH or not 1 < len(parts_a) == len(parts_b):
        return False
    return all(same_answer(x, y, depth + 1) for x, y in zip(parts_a, parts_b))


def is_correct(response, gold):
    """Is the response's final answer the gold one? Any two strings give a bool."""
    answer = extract_answer(response)
    gold = extract_answer(gold) if r"\boxed" in gold else gold
    if not answer or not gold or len(answer) + len(gold) > 2000:
        return False  # no answer to a problem is that long
    return same_answer(normalize(answer), normalize(gold))


# ---- 11. Record, resume and the command line -----------------------------------------------------


class UserError(Exception):
    """A user's mistake, told in one line that says how to correct it."""


@contextlib.contextmanager
def explained(what):
    """Makes any error of the block a UserError of one line: what did not work, and why."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a library makes of a foreign or damaged file
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{what} ({reason:.300})") from error


def write(cfg, name, content):
    """Writes a checkpoint, or rows as JSON lines (of a tensor: its length), beside OUT/name, and
    then in its place: whatever happens, there is the old file or the complete new one."""
    path, part = Path(cfg.out, name), Path(cfg.out, name + ".part")
    with explained(f"{path}: cannot be written; what was there stays"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "checkpoint.pt":
                torch.save(content, part)
            else:
                part.write_text("".join(json.dumps(row, default=len) + "\n" for row in content))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


LOOPS = []  # how much is done of each loop that the run is in, the outermost first


def progress(items, what):
    """Yields the items, and tells what is done of such loops, and when the outermost will end: in a
    line that is written over, or, where stderr is no terminal, in a line a minute."""
    tty = sys.stderr.isatty()
    begin = time.time()
    due = begin if tty else begin + 60
    depth = len(LOOPS)
    try:
        for i, item in enumerate(items):
            LOOPS[depth:] = [f"{what} {i}/{len(items)}"]
            if i and not depth:
                end = begin + (time.time() - begin) / i * len(items)
                LOOPS[0] += f" until {time.ctime(end)[4:16]}"
            if time.time() >= due:
                print(f"{', '.join(LOOPS):79.79}", end="\r" if tty else "\n", file=sys.stderr)
                due = time.time() + (0.2 if tty else 60)
            yield item
    finally:  # also of a loop that was left
        del LOOPS[depth:]
        if tty:
            print(" " * 79, end="\r", file=sys.stderr)


def sparkline(rows, name):
    """A figure of the rows, from 0 up, as one line of blocks; of more than 60, some are shown."""
    values = [row[name] for row in rows[:: len(rows) // 61 + 1]]
    return "".join("▁▂▃▄▅▆▇█"[int(7 * value / (max(values) or 1))] for value in values)


class Run:
    """The state of a run: what the next iteration depends on, and the history. All of it is saved.
    No generator is among it (see rng), and a run that goes on is the one that never stopped."""

    def __init__(self, cfg, model, problems):
        self.model = model
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.masters = master_weights(model)
        # The paper left its trainer's defaults: AdamW with betas 0.9 and 0.999 and a weight decay
        # of 0.01, a constant rate, a clip of the norm to 1. All but the clip may differ here.
        self.optimizer = torch.optim.AdamW(
            self.masters, cfg.lr, betas=(0.9, 0.95), weight_decay=0, fused=True
        )
        self.buffer = ReplayBuffer(cfg.buffer * cfg.prompts * cfg.rollouts)
        self.history = []  # a row of figures for each step, from 0 on
        # What may not change on the way.
        fixed = (problems, cfg.algo, cfg.prompts, cfg.rollouts, reward_function is is_right)
        self.fingerprint = zlib.crc32(repr(fixed).encode())
        if cfg.resume:
            self.load(cfg)

    def save(self, cfg):
        """Writes OUT/checkpoint.pt."""
        state = {
            "fingerprint": self.fingerprint,
            "masters": [master.detach() for master in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "reference": self.reference.state_dict(),
            "buffer": self.buffer.items,
            "history": self.history,
        }
        write(cfg, "checkpoint.pt", state)

    @torch.no_grad()
    def load(self, cfg):
        """Takes the state from RESUME/checkpoint.pt. UserError if it is broken or foreign; nothing
        in it is ever executed."""
        with explained(f"--resume {cfg.resume}: cannot go on from its checkpoint.pt"):
            state = torch.load(Path(cfg.resume, "checkpoint.pt"), "cpu", weights_only=True)
            if state["fingerprint"] != self.fingerprint:
                raise ValueError("problems (--data, --seed, ..), reward, --algo or sizes changed")
            parts = zip(self.model.parameters(), self.masters, state["masters"], strict=True)
            for weight, master, saved in parts:
                weight.copy_(master.copy_(saved))
            self.optimizer.load_state_dict(state["optimizer"])
            self.reference.load_state_dict(state["reference"])
            self.buffer.add(state["buffer"])
            self.history = state["history"]


def evaluate(model, tokenizer, problems, cfg, step):
    """Answers each problem cfg.eval_samples times, as in training, writes all answers to a file and
    prints how they are, the best and the worst. -> accuracy, the mean reward; stderr, its standard
    error over n problems, as half the width of Wilson's interval: so not 0 at 0 of n."""
    answers = []
    for i in progress(range(cfg.eval_samples), "evaluation"):
        purpose = f"evaluation {i}" if i else "evaluation"
        answers += rollout(model, tokenizer, problems, cfg, step, purpose)
        write(cfg, f"eval-{step:05}.jsonl", answers)  # one answer to each, whatever happens then
    verdicts = [t["verdict"] for t in answers]
    names = ("right", "wrong", "no answer", "cut")
    print("  " + ", ".join(f"{name} {verdicts.count(name)}" for name in names))
    for extreme in max, min:
        t = extreme(answers, key=lambda t: t["reward"])
        print(
            f"  {t['reward']:g}: {t['problem']!r:.99} -> {t['text'][-99:]!r} (gold {t['answer']})"
        )
    n = len(problems)
    shares = np.array([t["reward"] for t in answers]).reshape(-1, n).mean(0)
    stderr = math.sqrt(n * shares.var() + 1 / 4) / (n + 1)
    return {"accuracy": float(shares.mean()), "stderr": stderr}


def parse_args(argv):
    """The command line as a Config. A flag overrides a preset, and a resumed run's setting."""

    def refuse(message):  # argparse's own way prints two lines
        raise UserError(f"{message}; see --help")

    def show():  # the fields of Config, with the value that each preset gives them
        def row(field):
            name, default, comment = field.groups()
            values = "".join(f"{preset.get(name, default)!s:>11.10}" for preset in presets.values())
            return f"  --{name.replace('_', '-'):20}{values}  {comment}"

        text = inspect.getsource(Config).partition("    def ")[0]
        text = re.sub(r" +(\w+): .*= (.*?)  # (.*)", row, text)
        return f"  --preset                    toy      small  r1-distill-1.5b\n{text}"

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.error, parser.format_help = refuse, show
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default), "choices": get_args(field.type) or None}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + field.name.replace("_", "-"), **kind)
    parser.add_argument("--preset", choices=PRESETS)
    presets = {name: vars(parser.parse_args(shlex.split(PRESETS[name]))) for name in PRESETS}
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        folder = given["resume"]
        with explained(f"--resume {folder}: no run of this version, or a flag it cannot take"):
            saved = json.loads(Path(folder, "config.json").read_text())
            return Config(**(saved | {"out": folder} | given))
    preset = given.pop("preset", "small" if "model" in given else "toy")
    return Config(**(presets[preset] | given))


def main(argv):
    """The command line. -> exit status: 0; 2 after one line on what went wrong; 130 if stopped."""
    transformers.utils.logging.disable_progress_bar()
    try:
        cfg = parse_args(argv)
        for key, value in train(cfg).items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        return 0
    except KeyboardInterrupt:
        print(f"reval_min: stopped; once saved, it goes on by --resume {cfg.out}", file=sys.stderr)
        return 130
    except (UserError, torch.OutOfMemoryError) as error:
        print(f"reval_min: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows may not know a sign
    sys.exit(main(sys.argv[1:]))

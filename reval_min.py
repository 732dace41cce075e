#!/usr/bin/env python3
r"""reval_min: ReVal, value-based reinforcement learning for language models, in one file.

A language model already is a value function. Read the logit that it gives to token a after text s
as a soft Q-value, Q(s, a). Then V(s) = log sum_a exp Q(s, a) is the value of the text, and
softmax(Q(s, .)) is the policy, with log pi(a|s) = Q(s, a) - V(s). Training makes Q obey a Bellman
equation. Whether it does can be checked on *any* response, whoever wrote it: so old responses are
used again, from a replay buffer, without importance weights.

    python reval_min.py                     the built-in task, on a laptop: a minute or two
    python reval_min.py --algo grpo --updates 1 --lr 1e-3    the usual baseline on it
    python reval_min.py --model DIR_OR_HUB_ID --data problems.jsonl    your model, your problems
    python reval_min.py --preset r1-distill-1.5b    the paper's run, on one GPU: never made
    python reval_min.py --resume runs/NAME          go on after a stop; --help: every setting

The file is read from top to bottom, and can be left after each part: I, the method; II, what it
learns from (problems, the answer checker, the model and its rollouts); III, a run.

Method: "Off-Policy Value-Based Reinforcement Learning for Large Language Models", Wang et al.,
arXiv 2603.23355, published without code. Equation numbers are the paper's. Where this file differs
from it, or had to choose, it says so; README.md has the list.
"""

import copy
import dataclasses
import json
import math
import operator
import os
import re
import shutil
import sys
import time
import unicodedata
import zlib
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args, get_origin

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# ==================================================================================================
# PART I: THE METHOD
# Torch alone, and numpy for random draws. A *response* is what the model writes after a prompt, up
# to its end-of-sequence token (EOS); to sample one is a *rollout*; a prompt, its response and its
# reward are a *trajectory*.
# ==================================================================================================

# ---- 1. Q and V ----------------------------------------------------------------------------------
# The state s is the text so far, the action a the next token, one of A in the vocabulary. The model
# turns each state into a hidden vector, and its last matrix, the LM head, turns that into A logits.
# Usually one only takes their softmax. ReVal reads them as they are:
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
# actions are 5 GB of logits, and softmax and gradient as much each, for two numbers a state. So the
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
        for start in range(0, len(weight), block):
            logits = matmul(hidden, weight[start : start + block].T)  # [N, block]
            v = torch.logaddexp(v, logits.logsumexp(1))  # [N]
        ctx.save_for_backward(hidden, weight, actions, v)
        ctx.block = block
        return q, v

    @staticmethod
    @torch.autograd.function.once_differentiable
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
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be [N, D], for weight {tuple(weight.shape)} [A, D] "
            f"and actions {tuple(actions.shape)} [N]"
        )
    return _QFromLogits.apply(hidden, weight, actions, block)


# ---- 2. The Bellman target and the loss ----------------------------------------------------------
# A token is worth what it earns now, plus the value of the text after it. The right side of that
# sentence is the Bellman *target*, and training moves Q towards it.
#
# From here on in the paper's letters. The response has tokens a_1 ... a_H, and s_h is the text
# before a_h, so s_1 is the prompt. r is the reward, paid at the last token: 1 if the final answer
# is right, else 0. The *reference* (Q_ref, V_ref, pi_ref) is the model before training, or at its
# last reset (section 4). What is maximized is E[r] - beta * KL(pi || pi_ref), eq. (1): beta is the
# price, in reward, of a nat away from the reference. Shapes: B responses, T tokens in the longest.


def bellman_target(v, q_ref, v_ref, reward, mask, beta):
    """The combined stepwise / outcome Bellman target of each Q(s_h, a_h): [B, T], 0 in the padding.

        T Q(s_h, a_h) =  r / beta, at the last token                           outcome signal
                      +  log pi_ref(a_h|s_h) + V_ref(s_h) - V_ref(s_{h+1})     stepwise signal
                      +  V(s_{h+1})                                            bootstrap

    The stepwise signal is the reference's own opinion of the token: Q_ref(s_h, a_h) less
    V_ref(s_{h+1}). After the last token V and V_ref are 0. A response that was cut at the length
    limit ends there too, by the paper's finite horizon; that it earns reward 0 is our choice.

    v, q_ref, v_ref [B, T] float; reward [B]; mask [B, T] bool: True on response tokens, which start
    in column 0 and have no gap, else ValueError. Nothing in the padding, not even nan, reaches a
    value or a gradient.
    """
    if not (mask.any(1).all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError("mask: every row must start with a response token and have no gap")
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # [B, T] is it the last token?
    outcome = torch.where(last, reward[:, None] / beta, 0)  # [B, T]
    # V_ref is taken from V first: for equal models the difference is exactly 0.
    gap = (v - v_ref).masked_fill(~mask, 0)  # [B, T]
    next_gap = F.pad(gap[:, 1:], (0, 1))  # [B, T] V(s_{h+1}) - V_ref(s_{h+1})
    return outcome + q_ref.masked_fill(~mask, 0) + next_gap  # [B, T]


def reval_loss(q, v, q_ref, v_ref, reward, mask, beta, calibrated=True):
    """ReVal's loss. Shapes as above. -> (loss, {"residual": [B], in nats}).

    Sum Q - T Q over a response. As Q(s_h, a_h) = V(s_h) + log pi(a_h|s_h), every later V comes once
    with plus and once with minus, and so does V_ref. What is left is eq. (2),

        residual = V(s_1) - V_ref(s_1) + log pi(response) - log pi_ref(response) - r / beta
        loss     = beta / 2 * mean over responses of residual^2

    It is the sum that is squared; squaring its parts one by one is reported to collapse. The factor
    beta / 2 is ours. TBRM, the relative that came before, is the same without V_ref(s_1):
    calibrated=False.

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
        residual = residual + v_ref[:, 0]  # [B]
    return beta / 2 * residual.square().mean(), {"residual": residual.detach()}


# What this loss promises, and what not:
# * Calibrated start. While the model equals the reference, a response without reward has residual
#   0 and gradient 0, whatever it says. In TBRM its residual is V_ref(s_1), 10 to 40 nats, and
#   training begins by removing them.
# * Fixed point. All residuals are 0 where pi* = pi_ref * exp(r / beta) / Z, with Z the mean of
#   exp(r / beta) over the reference's responses, and V*(s_1) = V_ref(s_1) + log Z. It does not say
#   who wrote the responses: hence replay without importance weights. (TBRM has the same pi*, with
#   V*(s_1) = log Z. The start and the way differ, not the end.)
# * Coverage. That needs data with all the responses that matter. For those in the data, the ratios
#   to each other come out right. The total probability of all others is not determined, and V
#   absorbs the difference. So fresh data must keep coming.
# * A small residual alone proves nothing: a model can also fit reference values that are out of
#   date, and its policy is then another one.
# * The whole gradient. The paper prints one, eq. (4), without the part through V(s_1). Here it is
#   that of eq. (2). With V detached nothing could absorb log Z, and on old data the fixed point
#   would depend on who wrote them.
# * Not determined is the level of later states: a constant on all logits of s_2, s_3, ... changes
#   nothing. Only pi and V(s_1) matter.
# * Scale. At the start, with a reward less its group's mean (section 9), the gradient is that of
#   REINFORCE. That is what beta / 2 is for. Adam ignores it, but clipping the norm to 1 does not.
# * beta goes with length, as r / beta nats are spread over all tokens of a response: the paper's
#   two settings have beta times the typical length of about 10, the built-in task about 1.


def grpo_loss(logp, logp_old, advantage, mask, n_tokens, clip_low=0.2, clip_high=0.28):
    """GRPO's loss, the usual one, to compare with. -> (loss, {"clipped": share past the clip}).

    logp, logp_old, mask [B, T]; advantage [B]: (r - mean) / std within the responses to one
    problem. The sum is divided by n_tokens, those of the whole batch. Here a response that another
    policy wrote needs the importance weight pi / pi_old; a token whose weight is already past the
    clip, in the direction of its advantage, teaches nothing.
    """
    ratio = (logp - logp_old).masked_fill(~mask, 0).exp()  # [B, T]
    near = ratio.clamp(1 - clip_low, 1 + clip_high)  # [B, T]
    gain = torch.minimum(ratio * advantage[:, None], near * advantage[:, None])  # [B, T]
    clipped = (ratio != near).sum() / n_tokens
    return -gain.masked_fill(~mask, 0).sum() / n_tokens, {"clipped": clipped}


# ---- 3. The replay buffer ------------------------------------------------------------------------


def rng(seed, step, purpose):
    """A numpy generator for one purpose at one step. Every random choice uses such a one: so an
    extra evaluation does not change the training after it, and no generator must be saved."""
    return np.random.default_rng([seed, step, zlib.crc32(purpose.encode())])


class ReplayBuffer:
    """Keeps the newest trajectories, first in, first out, and draws from them uniformly."""

    def __init__(self, capacity, seed=0):
        self.capacity = capacity
        self.seed = seed
        self.draws = 0
        self.items = []

    def __len__(self):
        return len(self.items)

    def add(self, items):
        """Appends items; beyond the capacity the oldest leave."""
        self.items = (self.items + list(items))[-self.capacity :]

    def sample(self, n):
        """min(n, len) different items, uniformly. Nothing is removed."""
        self.draws += 1
        order = rng(self.seed, self.draws, "replay").permutation(len(self.items))
        return [self.items[i] for i in order[:n]]


# ---- 4. One iteration ----------------------------------------------------------------------------
# The whole method, arguments shortened. `collect`, `learn` and `train`, at the end of the file, are
# these lines and what a long run needs besides: evaluation, a log, checkpoints.
#
#     fresh = rollout(model, some problems, several responses each)   # reward: is it right?
#     add_signals(fresh)                                              # r, or that less a mean
#     cache_values(reference, fresh)                                  # q_ref and v_ref, only once
#     buffer.add(fresh)
#     for k in range(K):
#         batch = fresh if k == 0 else buffer.sample(len(fresh))      # on-policy, then off-policy
#         gradient(model, batch)                                      # of reval_loss
#         optimizer.step()
#     every so many iterations, if wished:                            # a reset
#         reference = model
#         cache_values(reference, buffer)                             # the old ones are out of date
#
# The paper describes its K updates in more than one way; one fresh batch, then K - 1 draws from the
# buffer, which already holds it, is our reading. Once the buffer is full, a trajectory is used K
# times on average, eq. (3); the first ones, with few others beside them, more often.


# ==================================================================================================
# PART II: WHAT IT LEARNS FROM
# Problems, a checker that turns answers into rewards, and a model that answers.
# ==================================================================================================


class UserError(Exception):
    """A user's mistake, told in one line that says how to correct it."""


def first_line(error):
    """What an error says first: libraries may go on for a page."""
    return str(error).split("\n")[0] or type(error).__name__


def progress(what, items=None, total=None):
    """A bar that says what is being done and how much is left, at once, if a person is looking. It
    goes through items, or is updated by hand up to total."""
    return tqdm(items, what, total, disable=None, leave=False, miniters=0)


def with_bar(parts, what):
    """Goes through parts of responses, with a bar that counts the responses."""
    with progress(what, total=sum(map(len, parts))) as bar:
        for part in parts:
            yield part
            bar.update(len(part))


# ---- 5. Problems: the built-in task and its teacher, or a file -----------------------------------
# The task is to add three two-digit numbers, at once or after written column sums with a carry:
#     47+85+36=?  ->  \boxed{168}          or          7+5+6=18;4+8+3+1=16;\boxed{168}
# A tiny model cannot add in its head, but it can on paper. Its teacher is always right and mostly
# shows no work: a bad habit to copy, and RL has to find the better one.

WRITTEN_SHARE = 0.1  # of the teacher's answers, at the end of the warm start (distill, section 7)
LONGEST_PROBLEM = 20_000  # characters


def make_problem(generator, held_out):
    """A sum, as {"problem", "answer"}. One sum in ten, whatever the order of its numbers, belongs
    to the held-out set, so training never meets it."""
    while True:
        a, b, c = generator.integers(10, 100, 3).tolist()
        in_held_out = zlib.crc32(repr(sorted([a, b, c])).encode()) % 10 == 0
        if in_held_out == held_out:
            return {"problem": f"{a}+{b}+{c}=?", "answer": str(a + b + c)}


def demonstrate(problem, written):
    """The teacher's answer to a sum, with or without the written work."""
    a, b, c = (int(number) for number in re.findall(r"\d+", problem))
    units = a % 10 + b % 10 + c % 10
    carry = units // 10
    tens = a // 10 + b // 10 + c // 10 + carry
    answer = f"\\boxed{{{a + b + c}}}"
    if not written:
        return answer
    work = f"{a % 10}+{b % 10}+{c % 10}={units};{a // 10}+{b // 10}+{c // 10}+{carry}={tens};"
    return work + answer


def read_rows(path):
    """The rows of a JSONL file or of one JSON array, here or on the hub, as they are."""
    where = path
    try:
        if path.startswith("hf://datasets/"):
            hub = re.fullmatch("hf://datasets/([^/]+/[^/]+)/(.+)", path)
            if not hub:
                raise ValueError("a file is missing: hf://datasets/ORG/NAME/FILE")
            path = huggingface_hub.hf_hub_download(hub[1], hub[2], repo_type="dataset")
        if path.lower().endswith((".gz", ".zip", ".parquet", ".csv")):
            raise ValueError("another kind of file; pandas' to_json(.., lines=True) makes one")
        text = Path(path).read_text(encoding="utf-8-sig")  # with a byte-order mark or without
        if text.lstrip().startswith("["):
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            where = f"{path}, line {number}"
            if line.strip():
                rows.append(json.loads(line))
        return rows
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{where}: no JSON lines or array that can be read ({reason})") from error


def find_answer(row):
    """The answer in a row of a data file, as text; None if section 6 finds none to check."""
    for key in ("answer", "final_answer", "solution"):
        value = row.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if type(value) in (int, float) and abs(value) < math.inf:
            value = str(value)
        if not isinstance(value, str):
            continue  # several answers, an object, true or NaN: nothing to compare with
        answer = value.rpartition("####")[2].strip()  # GSM8K: behind a solution
        if key == "solution":
            answer = extract_answer(value)
        if answer and is_correct(f"\\boxed{{{answer}}}", answer):
            return answer
    return None


def read_problems(path):
    """A JSONL file, or one JSON array, of objects with a problem (or question) and an answer (or
    final_answer, or a solution that holds one), names in any case. -> a list of {"problem",
    "answer"}. Rows that will not do are dropped, with a message; UserError if none is left."""
    rows = read_rows(path)
    problems = {}  # by text: what repeats might be trained on and held out
    dropped = []
    keys = set()
    for row in progress("reading", rows):
        fields = {}
        if isinstance(row, dict):
            fields = {key.lower(): value for key, value in row.items()}
        keys.update(fields)
        problem = fields.get("problem") or fields.get("question")
        answer = find_answer(fields)
        usable = isinstance(problem, str) and 0 < len(problem.strip()) <= LONGEST_PROBLEM
        if usable and answer and problem not in problems:
            problems[problem] = {"problem": problem, "answer": answer}
        else:
            dropped.append(row)
    if not problems:
        raise UserError(
            f"{path}: no row has a problem (or question) and a usable answer (or final_answer, or "
            f"solution); the keys found are: {', '.join(sorted(keys)) or 'none'}"
        )
    if dropped:
        print(
            f"{path}: dropped {len(dropped)} of {len(rows)} rows, which repeat a problem, are "
            f"too long or have no answer to check; the first is {dropped[0]!r:.200}"
        )
    return list(problems.values())


def load_problems(cfg):
    """-> (problems to train on, held-out problems), two lists of {"problem", "answer"}. Held out
    are those of --eval-data, else a tenth of --data; at most eval_problems, never trained on."""
    generator = rng(cfg.seed, 0, "problems")
    held_out = read_problems(cfg.eval_data) if cfg.eval_data else []
    if len(held_out) > cfg.eval_problems:
        print(f"{cfg.eval_data}: {cfg.eval_problems} of {len(held_out)} (--eval-problems)")
        generator.shuffle(held_out)  # a file may be sorted
        held_out = held_out[: cfg.eval_problems]
    if cfg.eval_data and cfg.steps == 0:
        return [], held_out
    if not cfg.data:
        problems = [make_problem(generator, held_out=False) for _ in range(10_000)]
        held_out = [make_problem(generator, held_out=True) for _ in range(cfg.eval_problems)]
        return problems, held_out
    evaluated = {p["problem"] for p in held_out}
    problems = [p for p in read_problems(cfg.data) if p["problem"] not in evaluated]
    generator.shuffle(problems)
    if not held_out:
        n = min(cfg.eval_problems, max(1, len(problems) // 10))
        held_out, problems = problems[:n], problems[n:]
    if not problems:
        raise UserError(f"{cfg.data}: no problem is left to train on beside those held out")
    return problems, held_out


# ---- 6. The answer checker -----------------------------------------------------------------------
# It is the reward: what it gets wrong, the model will learn. So it is a rule anyone can read, in
# four steps: extract the final answer, normalize its spelling, parse it if it is a number, compare.
#  - Strict: in doubt it says no. An answer that was only thought, was cut, hedges, negates or lists
#    others is wrong. A unit, a currency sign or "x =" may be missing, but not differ.
#  - Exact: 0.5 is 1/2, but 0.33 is not 1/3. A value that no decimal gives exactly, as 1/3 or pi,
#    may be written rounded or cut, with six digits or more.
#  - Total: any two strings give a verdict, in time linear in their length. Arithmetic, roots, pi
#    and letters are evaluated, functions and words are compared as text.

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"(?s)\\.|[{}]")  # \{ and \} are the signs of a set: they do not nest
DEPTH = dict.fromkeys("([{⦃", 1) | dict.fromkeys(")]}⦄", -1)  # what a bracket adds to it
# "it can't be \boxed{5}", "either 4 or \boxed{5}"
NOT_BEFORE = re.compile(r"(?:(?:n't|not\b|\bnever)(?: be)?|\beither\b.*\bor)[\s$({\\]*$")
# "\boxed{5} or six"; after a comma, where "or" may mean "that is", only "\boxed{5}, or \boxed{6}"
OR_AFTER = re.compile(
    r"[\s$]*(?:\\text\s*\{\s*)?or\b(?! rather)|[\s$.,;]*(?:\\text\s*\{\s*)?or\b[\s}$]*[\d\\-]"
)
SENTENCE_END = r"(?:\n|$|[.!]\s|,?\s(?:because|since|which)\b)"
MARKED = (  # the answer in a response without a box, at the last of each mark
    r"(?s).*<answer>((?:(?!</?answer>).)*)</answer>",
    r"(?s:.*)####[\s:*]*(.*?)" + SENTENCE_END,
    r"(?i)(?s:.*)\banswer\b(?:\W*(?:is|are|was)\b|[\s*]*[:=])[\s:*]*(.*?)" + SENTENCE_END,
)


def closing_brace(text, start):
    """Where the brace that was opened just before `start` closes, or None."""
    depth = 1
    for brace in BRACE.finditer(text, start):
        depth += DEPTH.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def extract_answer(response):
    r"""The final answer of a response, as text, or None. Only what follows </think> counts. There:
    the last \boxed{...}; else the last <answer> tag; else the line after the last ####; else
    the line after the last "answer is" or "answer:"."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:  # a thought that does not end concludes nothing
        return None
    boxes = list(BOX.finditer(text))
    if boxes:
        # "or" before the only box means "that is". Right after a box it offers a choice.
        ends = [closing_brace(text, box.end()) for box in boxes[-2:]]
        hedged = any(end and OR_AFTER.match(text, end + 1) for end in ends)
        denied = NOT_BEFORE.search(text[: boxes[-1].start()][-40:])
        if hedged or denied or ends[-1] is None:  # None: the box was cut
            return None
        return text[boxes[-1].end() : ends[-1]].strip() or None
    for pattern in MARKED:
        found = re.match(pattern, text)
        if found:
            return found[1].strip() or None
    return None


# One spelling a line, and the LaTeX commands or signs that are replaced by it. Some are our own:
# ⦃ and ⦄ are the braces of a set, as plain ones only group; ¦{1}{2} is a fraction; ¤ is a space.
SPELLINGS = r"""
    <      \lt
    >      \gt
    <=     \le \leq \leqslant ≤ ⩽
    >=     \ge \geq \geqslant ≥ ⩾
    ≠      \ne \neq !=
    =      \approx ≈
    ∈      \in
    ±      \pm
    -      − – ‐
    *      \cdot \times × · ⋅ ∙
    /      \div ÷ ⁄
    ^      **
    ,      &
    ],[    \\
    %      \%
    °      \circ \degree
    '      \prime ′ ’
    |      \mid \vert \lvert \rvert
    ⦃      \{ \lbrace
    ⦄      \} \rbrace
    ∞      \infty
    ∅      \emptyset \varnothing
    ∪      \cup
    ∩      \cap
    √      \sqrt
    √[3]   ∛
    √[4]   ∜
    ¦      \frac \dfrac \tfrac \cfrac
    \angle ∠
    ¤      \left \right \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \limits \quad \qquad
    ¤      \, \; \: \! \( \) \[ \] ~ ` $ \$ € £ ¥
"""
GREEK = r"""
    \alpha \beta \gamma \delta \epsilon \varepsilon \eta \theta \vartheta \kappa \lambda \mu \nu
    \pi \rho \sigma \tau \phi \varphi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Sigma \Phi
    \Omega
"""
SPELLING_OF = dict(zip(GREEK.split(), "αβγδεεηθθκλμνπρστφφχψωΓΔΘΛΣΦΩ", strict=True))
for line in SPELLINGS.strip().splitlines():
    spelling, *others = line.split()
    SPELLING_OF |= dict.fromkeys(others, spelling)

SIGN = r"\\(?:[A-Za-z]+|.)|[$&~`]|!=|\*\*|[^\x00-\x7f]"
REWRITES = [
    # Signs. Unicode has its own for ½, x² and x₁.
    (r"([¼-¾⅐-⅞])", r" \1"),
    (r"([¹²³⁰-ⁿ]+)", r"^{\1}"),
    (r"([₀-ₜ]+)", r"_{\1}"),
    (r"[^\x00-\x7f]+", lambda signs: unicodedata.normalize("NFKC", signs[0])),
    (r" ?\{,\} ?|,\\! ?", ","),  # 1{,}234 and 1,\!234
    (r"\*\*(?=[\s.,;:!]|$)|^\*\*", ""),  # **bold** type
    (r"\\\\\[\w+\]", r"\\\\"),  # \\[4pt]
    (r"(?<![\\A-Za-z])(pi|sqrt)(?![A-Za-z])", r"\\\1"),
    (SIGN, lambda sign: SPELLING_OF.get(sign[0], sign[0])),
    (r"\\(?:text[a-z]*|math[a-z]*|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),  # \text{cm}
    (r"(?:\s|¤|\\ )+", " "),
    (r"^ ?\{((?:[^{}]|\{[^{}]*\})*)\} ?$", r"\1"),  # {5}
    (r" ?\bper ?cent(?:age)?\b", "%"),
    (r"\^ ?\{ ?° ?\}|\^ ?°| ?\bdegrees?\b", "°"),  # 45^\circ, 45^{\circ}, 45 degrees
    (r"([A-Za-z]{4})!+$", r"\1"),  # Paris!
    # A matrix is the list of its rows, [[1,2],[3,4]].
    (r"[(\[]? ?\\begin\{(?:array\}\{[^{}]*|[pbB]?(?:small)?matrix)\}", "[["),
    (r"(?:\],\[)? ?\\end\{(?:array|[pbB]?(?:small)?matrix)\} ?[)\]]?", "]]"),
    # Arguments get braces.
    (r"¦ ?(\d) ?(?=[\d{])", r"¦{\1}"),  # \frac12, \frac1{12}
    (r"¦ ?(\{(?:[^{}]|\{[^{}]*\})*\}) ?(\d)", r"¦\1{\2}"),  # \frac{12}5
    (r"([\^_]) ?(-?\d+|\w)", r"\1{\2}"),  # x^2 is x^{2}
    # Spaces, where they mean something and where not.
    (r"(\d), (?=\d{3}\b)", r"\1;"),  # 1, 234 is a list
    (r"([\d}π]) ?\( ?([A-Za-z ]{3,}?) ?\) ?$", r"\1 \2"),  # 9 (apples)
    (r"[,;]? ?\band\b ?", ","),  # 6 and 8
    (r"(?<!\w) | (?!\w)", ""),
    # Numbers and lists.
    (
        r"(?:^|(?<==))-?\d{1,3}([, ])\d{3}(?:\1\d{3})*(?![\d,/])",  # 1,234 and 1 234
        lambda number: re.sub("[, ]", "", number[0]),
    ),
    (r"(?<![\d.^/])(\d+)(?:¦\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))", r"(\1+\2\4/\3\5)"),  # 1 1/2
    (r"(\d)[eE]([+-]?\d+)", r"\1*10^{\2}"),  # 1.5e-3
    (
        r"\.(\d*)(?:\\overline\{|\()(\d+)[})]",
        lambda m: f".{m[1]}{m[2] * 40:.40}",
    ),  # 0.1(6), 40 digits of it
    (r"^([^,±]*)±([^,±]*)$", r"\1+\2,\1-\2"),  # 1 \pm \sqrt2 is a list of two
    (r"(?:^|(?<=[(\[{,;=]))\+", ""),  # (3,+\infty)
    # Inequalities and intervals.
    (r"^([^<>=]+)>(=?)([^<>=]+)$", r"\3<\2\1"),  # x > 5 is 5 < x
    (r"^([^<>=]+)>(=?)([^<>=]+)>(=?)([^<>=]+)$", r"\5<\4\3<\2\1"),
    (r"^([^<=]+)<([^<=]+)<([^<=]+)$", r"(\1,\3)"),  # 1 < x < 2 is (1,2)
    (r"^([^<=]+)<=([^<=]+)<([^<=]+)$", r"[\1,\3)"),
    (r"^([^<=]+)<([^<=]+)<=([^<=]+)$", r"(\1,\3]"),
    (r"^([^<=]+)<=([^<=]+)<=([^<=]+)$", r"[\1,\3]"),
]
REWRITES = [(re.compile(pattern), new) for pattern, new in REWRITES]


def normalize(text):
    """An answer without its typesetting, and in one spelling where there are several."""
    text = text.strip().rstrip(" $.,;:\\")
    for pattern, new in REWRITES:
        if pattern.search(text):  # few do, and this is faster than sub
            text = pattern.sub(new, text)
    return text


def power(base, exponent):
    """base ** exponent, unless it is so huge that it would take forever."""
    if abs(exponent) * len(str(base)) > 4000:
        raise OverflowError
    return base**exponent


OPERATORS = {  # how tightly each binds, and what it does
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "^": (3, power),
}


def parse(tokens, binding=0):
    """The value of a formula, taken off a stack of tokens, up to an operator that binds no tighter
    than this."""
    value = parse_atom(tokens)
    while tokens and tokens[-1] in OPERATORS:
        strength, operation = OPERATORS[tokens[-1]]
        if strength <= binding:
            break
        tokens.pop()
        value = operation(value, parse(tokens, strength))
    return value


def parse_atom(tokens):
    """The value of a number, a letter, a fraction, a root or something in brackets."""
    token = tokens.pop()
    if token == "-":
        return -parse(tokens, 2)
    if token in ("(", "{"):
        value = parse(tokens)
        if token + tokens.pop() not in ("()", "{}"):
            raise ValueError  # the brackets do not match
        return value
    if token == "¦":
        return parse_atom(tokens) / parse_atom(tokens)
    if token[0] == "√":  # or √[3], the third root
        return float(parse_atom(tokens)) ** (1 / int(token[2:-1] or 2))
    if token == "π":
        return math.pi
    if token[0].isalpha():  # some number of its own for each letter, so that x + 1 is 1 + x
        return 1 + zlib.crc32(token.encode()) / 2**32
    return Fraction(token)


def number(text):
    """The value of a normalized number or formula: a Fraction, or a float if a root, pi or a letter
    is in it; None for anything else."""
    if len(text) > 400 or re.search(r"^[A-Za-z ]*$| [A-Za-z]{3}|\^\{\w+\}\^", text):
        return None  # words: "ot" is not "to"; and 2^3^2 is none at all
    text = re.sub(r"(?<=[\w)}]) ?(?=[^\W\d_]|[(¦√])", "*", text)  # 2x is 2 * x
    tokens = re.findall(r"\d+\.?\d*|\.\d+|[^\W\d_](?:_\{\w+\})?|√\[\d+\]|[^\s°]", text)[::-1]
    try:
        value = parse(tokens)
        known = value != 0 or isinstance(value, Fraction)  # "0 or" is 0 times letters, no number
        return value if known and not tokens and math.isfinite(value) else None
    except (ValueError, TypeError, IndexError, ArithmeticError, RecursionError):
        return None


NO_UNIT = (  # words that change the number before them
    # Number words: 5 trillion, 3 quarters, 5 hundredths.
    r"(?i:(?:half|halve|third|quarter|fif|eigh|nin|twelf|ten|hundred|thousand|mil|[a-z]+illion"
    r"|score|lakh|crore|dozen|zero|one|two|three|four|five|six|seven|eight|nine"
    r"|eleven|twelve|[a-z]+teen|[a-z]+ty|infinite|infinitely)(?:th)?s?"
    # Functions and operations: 4 sin x, 6 factorial, 2 root two.
    r"|(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt)[x-z]?|theta|alpha|beta|abc|xyz"
    r"|factorial|choose|mod|modulo|squared|cubed|roots?|power|base|remainder|prime|inverse"
    r"|plus|minus|negative|times|divided|over|out|point"
    # Limits: 7 at most, 6 below zero.
    r"|least|most|more|less|fewer|greater|larger|smaller|maximum|minimum|max|above|below|under"
    r"|beyond|between|from|than|about|approx[a-z]*|around|roughly|nearly|almost"
    # Doubts and denials: 5 maybe, 8 otherwise, 3 is wrong.
    r"|maybe|perhaps|prob[a-z]+|possibl[ey]|likely|unknown|undefined|uncertain|unsure|guess|think"
    r"|otherwise|else|any|unless|except|given|depend[a-z]*|ish|can|could|may|might|will|would"
    r"|should|does|and|not|none|nor|but|when|where|are|was|were|wrong|incorrect|false)\b"
)
# A unit is any other word of three letters or more, or a common symbol.
UNIT_WORD = (
    rf"(?!{NO_UNIT})(?:[A-Za-z][a-z]{{2,}}|[kcdm]m|[km]g|m[lL]|ft|in|hr|lb|oz|yd|mi|of|an|a"
    r"|(?<=[ /])[mgshLN])\.?"
)
UNIT = re.compile(
    r"(?s)(.*?)("
    r"(?<=[\d)}π])(?:%|°[CF]?)"
    rf"|(?<=\d)(?:[kcm]?m\^\{{[23]\}}|[kcm]m|k?g|(?!{NO_UNIT})[a-z]{{3,}}s)"  # 5cm, 10weeks
    rf"|(?:(?<=[\dπ]) |(?<=[)}}°]))(?!of\b){UNIT_WORD}(?:[ /]{UNIT_WORD})*(?:\^\{{-?\d\}})?"
    r")?$"
)


def split_unit(text):
    """5 and "cm" of "5 cm"; the unit may be nothing."""
    value, unit = UNIT.match(text).groups("")
    return value, unit.strip().lower().rstrip("s")


def stands_for(text, value):
    """Is this decimal a value without end, rounded or cut? It takes six digits or more."""
    # A fraction has an end if its denominator divides a power of ten.
    endless = isinstance(value, float) or pow(10, 400, value.denominator) > 0
    if not endless or not re.fullmatch(r"-?(?=[0.]*[1-9](?:\.?\d){5})\d*\.\d+", text):
        return False
    scale = 10 ** len(text.partition(".")[2])
    exact = Fraction(value) * scale
    rounded = Fraction(text) * scale in (round(exact), math.trunc(exact))
    return rounded or math.isclose(float(text), value, rel_tol=4e-16)  # a float's last digit is off


# 12+34 or 12*34: still to be worked out, and perhaps only copied from the problem.
UNDONE = re.compile(r"\d[-+*]\d+(?:\.\d+)?(?=[-+)}\]⦄,;=% ]|$)")


def equal_numbers(a, b):
    """Do an answer and the gold one, both normalized, name one number? None if they are not both
    numbers."""
    (a, unit_a), (b, unit_b) = split_unit(a), split_unit(b)
    x, y = number(a), number(b)
    if x is None or y is None:
        return None
    if UNDONE.search(a) and not UNDONE.search(b):
        return False
    if unit_a == "%" and not unit_b:  # 12% is 12 or 0.12, but 12 is not 0.12
        return y in (x, x / 100)
    if unit_b == "%" and not unit_a:
        return x in (y, y / 100)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    close = float in (type(x), type(y)) and math.isclose(x, y, rel_tol=1e-12)
    return x == y or close or stands_for(a, y) or stands_for(b, x)


# What may stand before "=" and be left out: x, f(x), P(A), |AB|, \angle ABC, \frac{NO}{BO}. Not 2x
# or x^2: an equation is no answer to what its other side is.
NAME = re.compile(
    r"^(?![a-z] ?[a-z]=)"  # nor xy
    r"(?:(?:\\(?!ln|log|sin|cos|tan)[A-Za-z]+|¦|[^\W\d_]\d*|_\{\w+\}|\{[A-Za-z ]+\}|\^\{-1\}"
    r"|[ ':])+(?:[(\[]-?[^-+*/()]*[)\]])?"  # the (x) of f(x)
    r"|\|[A-Z]+\||\[[A-Z]+\]|\([A-Za-z,]+\))[=∈]"
    r"|=[^\W\d_]$"  # 5 = x
)
RELATION = re.compile("<=|[<=≠∈∪]")
CHOICE = re.compile(
    r"(?s)(?i:(?:(?:option|choice) ?)?\(?([A-J]))(?:\)?|[.:)]"
    # The text of the option: no judgement on it, and no other option.
    r"(?! ?(?:or|and|nor|not|is|isn|was|are|can|cannot|does|has|wrong|incorrect|maybe|perhaps"
    r"|probably)\b)"
    r"(?! ?[,;/&?])(?!.*\b[A-J][).:])(?!.*(?:\bor |,)[A-J]\b)(?! ?[A-J]$)(.+))"
)
SPACE = re.compile(r"(?<!\d) | (?!\d)")  # \log _2 n is \log_2n
WORDS = re.compile(r"(?=.*[A-Za-z]{2})[\w\s'.,?!-]*")


def split_list(text):
    """The items between the commas that are outside all brackets."""
    items, depth = [""], 0
    for sign in text:
        depth += DEPTH.get(sign, 0)
        if depth == 0 and sign in ",;":
            items.append("")
        else:
            items[-1] += sign
    return items


def split(text):
    """An answer of several parts, as its kind and its parts. A kind is a pair of brackets, nothing
    for a bare list, or the signs between the sides of an equation or inequality."""
    items = split_list(text)
    if len(items) > 1:
        return "", items
    signs = RELATION.findall(text)
    if signs:
        return "".join(signs), RELATION.split(text)
    whole = re.fullmatch(r"([(\[{⦃])(.*)([)\]}⦄])", text)
    if whole:
        return whole[1] + whole[3], split_list(whole[2])
    return "", items


def same(a, b, depth=0):
    """Are two normalized answers the same?"""
    if a == b:
        return a != ""
    if depth > 4:  # no answer is that deep
        return False
    chosen_a, chosen_b = CHOICE.fullmatch(a), CHOICE.fullmatch(b)
    if chosen_a and chosen_b and not (chosen_a[2] and chosen_b[2]):  # C is (C) is "C. Neon"
        return chosen_b[1] in (chosen_a[1], chosen_a[1].upper())
    equal = equal_numbers(a, b)
    if equal is not None:
        return equal
    value_a, value_b = NAME.sub("", a), NAME.sub("", b)
    if (value_a == a) != (value_b == b):  # one has a name: x = 5 is 5
        return same(value_a, value_b, depth + 1)
    (kind_a, items_a), (kind_b, items_b) = split(a), split(b)
    if len(items_a) == len(items_b) and (kind_a or kind_b or len(items_a) > 1):
        if {kind_a, kind_b} <= {"", "⦃⦄"}:  # these have no order
            for items in (items_a, items_b):
                items.sort(key=lambda item: (number(item) or 0, item))
        elif kind_a != kind_b:
            return False
        return all(same(x, y, depth + 1) for x, y in zip(items_a, items_b, strict=True))
    if WORDS.fullmatch(a):
        return a.lower() == b.lower()
    return SPACE.sub("", a) == SPACE.sub("", b)


def is_correct(response, gold):
    """Is the response's final answer the gold one? Any two strings give a bool."""
    answer = extract_answer(response)
    if BOX.search(gold):
        gold = extract_answer(gold)
    if answer is None or gold is None or len(answer) + len(gold) > 2000:
        return False  # no answer to a problem is that long
    return same(normalize(answer), normalize(gold))


# ---- 7. The model, its scores and its rollouts ---------------------------------------------------
# Any causal LM of transformers will do, if logits = hidden @ head.T, and if a cache of keys and
# values changes nothing; a tiny one is made here.


def make_model(seed):
    """A Qwen2 of 0.13M random weights and its tokenizer of 19 tokens."""
    # The first name is one that AutoTokenizer, when it loads a saved one, would add to any Qwen2's.
    words = ["<|endoftext|>", "<bos>", "<eos>", *"0123456789+=?;", "\\boxed{", "}"]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=words[0], bos_token="<bos>", eos_token="<eos>"
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
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer


def from_disk_or_hub(cfg):
    """The model and tokenizer that --model names."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
    config = transformers.AutoConfig.from_pretrained(cfg.model)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # what learns must be what samples
    model = transformers.AutoModelForCausalLM.from_pretrained(
        cfg.model, config=config, dtype=cfg.dtype
    )
    if cfg.gradient_checkpointing:
        old = model.gradient_checkpointing_enable  # its older name
        getattr(model, "activation_checkpointing_enable", old)()
    return model.to(cfg.device), tokenizer


def end_tokens(model, tokenizer):
    """The ids that end a response, as a set: the tokenizer's EOS, and those the model names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return {*named, tokenizer.eos_token_id} - {None}


@torch.no_grad()
def check_model(model, tokenizer):
    """ValueError if a model or its tokenizer does not suit this file."""
    # The last logits, by way of a cache, must be those that q_from_logits would compute.
    head = model.get_output_embeddings().weight  # [A, D]
    tokens = torch.arange(8, device=model.device)[None]  # [1, 8]
    hidden = model.base_model(input_ids=tokens).last_hidden_state[:, -1]  # [1, D]
    expected = F.linear(hidden, head).float()  # [1, A]
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=tokens[:, :-1], past_key_values=cache)
    last = {"input_ids": tokens[:, -1:], "position_ids": tokens[:, -1:]}  # both are 7
    logits = model(**last, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()  # [1, A]
    rounding = max(1e-3, 4 * torch.finfo(model.dtype).eps)
    if not (logits - expected).abs().max() <= rounding * expected.abs().max():  # nan is not
        raise ValueError(
            "its logits are not hidden @ lm_head.T, as a bias, a scale or a soft cap comes "
            "between, or it has no cache of keys and values; take another"
        )
    if len(tokenizer) > len(head):
        raise ValueError("its tokenizer has more tokens than the model knows")
    if not end_tokens(model, tokenizer):
        raise ValueError("it names no end-of-sequence token")


def load_model(cfg):
    """-> (model, tokenizer). UserError if --model names none, or one that does not suit."""
    if not cfg.model:
        model, tokenizer = make_model(cfg.seed)
        return model.to(cfg.device).eval(), tokenizer
    try:
        model, tokenizer = from_disk_or_hub(cfg)
        check_model(model, tokenizer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a damaged folder makes transformers raise
        here = "that folder" if Path(cfg.model).is_dir() else "no such folder; as a name on the hub"
        reason = f"no causal LM and its tokenizer that can be used ({first_line(error)})"
        raise UserError(f"--model {cfg.model}: {here}: {reason}") from error
    return model, tokenizer


def encode_prompts(tokenizer, problems, cfg):
    """Problems, as texts, to prompts: a list of 1-D int64 tensors, in the chat template if there is
    one. UserError if a prompt has no token, or the template fails.

    What a problem says is text: a space breaks up the names of special tokens in it, which could
    end the turn. The template brings its own BOS. Without a template the tokenizer adds its special
    tokens; an EOS at the end is removed, as nothing may follow it.
    """
    special = tokenizer.get_added_vocab()  # by name
    raw = cfg.raw_prompt or tokenizer.chat_template is None
    texts = []
    for problem in problems:
        problem = problem.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair
        for name in special:
            if len(name) > 1 and not name.isspace():
                problem = problem.replace(name, name[0] + " " + name[1:])
        texts.append(cfg.prompt.replace("{problem}", problem))
    if not raw:
        chats = [[{"role": "user", "content": text}] for text in texts]
        try:
            texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and raises what it likes
            reason = f"the chat template fails ({first_line(error)}); give --raw-prompt"
            raise UserError(reason) from error
    prompts = []
    for ids in tokenizer(texts, add_special_tokens=raw)["input_ids"]:
        if raw and ids[-1:] == [tokenizer.eos_token_id]:
            ids = ids[:-1]
        if not ids:
            raise UserError("the prompt is empty: change --prompt, or give --raw-prompt")
        prompts.append(torch.tensor(ids))
    return prompts


def pad(rows, device, side="right"):
    """1-D tensors -> one tensor [B, T] on device, padded with zeros."""
    return pad_sequence(rows, batch_first=True, padding_side=side).to(device)


def score(model, batch):
    """Q(s_h, a_h) and V(s_h) of the response tokens of a batch of trajectories.
    -> (q, v, mask), [B, T] each, 0 in the padding; mask marks the response tokens, EOS included.

    mask comes from lengths, never from comparing with a pad id, which may be the EOS id.
    Shapes: L tokens in the longest prompt and response without its last token, N response tokens
    in all.
    """
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


def micro_batches(batch, max_tokens):
    """The batch as lists of up to max_tokens padded tokens (one response at least), like lengths
    together, so that little of them is padding."""
    parts = [[]]
    for t in sorted(batch, key=lambda t: len(t["prompt"]) + len(t["response"])):
        size = len(t["prompt"]) + len(t["response"])
        if parts[-1] and (len(parts[-1]) + 1) * size > max_tokens:
            parts.append([])
        parts[-1].append(t)
    return parts


@torch.no_grad()
def cache_values(model, trajectories, cfg, name):
    """Writes the model's "q_<name>" and "v_<name>" [T] into each trajectory. The reference's serve
    at every reuse, so they are computed once: by the live model's function, or equal models would
    not cancel to zero. GRPO also needs those of the policy that sampled."""
    for part in with_bar(micro_batches(trajectories, cfg.micro_batch_tokens), "scoring"):
        q, v, mask = (x.cpu() for x in score(model, part))  # [B, T] each
        for i, t in enumerate(part):
            t[f"q_{name}"] = q[i][mask[i]]  # [T]
            t[f"v_{name}"] = v[i][mask[i]]  # [T]


def distill(model, tokenizer, cfg):
    """The warm start: supervised learning from the teacher, of -log pi = V - Q.

    RL can only strengthen what a model already does sometimes. So the tiny one is first shown how:
    the teacher writes its work until the model can add, and then mostly leaves it out.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    generator = rng(cfg.seed, 0, "distillation")
    for step in progress("distilling", range(cfg.distill_steps)):
        done = step / cfg.distill_steps
        problems = []
        answers = []
        for _ in range(32):
            problem = make_problem(generator, held_out=False)["problem"]
            written = done < 0.8 or generator.random() < WRITTEN_SHARE
            problems.append(problem)
            answers.append(demonstrate(problem, written) + tokenizer.eos_token)
        prompts = encode_prompts(tokenizer, problems, cfg)
        responses = tokenizer(answers, add_special_tokens=False)["input_ids"]
        batch = [
            {"prompt": prompt, "response": torch.tensor(response)}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        q, v, mask = score(model, batch)  # [B, T] each
        loss = (v - q).sum() / mask.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = math.cos(done * math.pi / 2) ** 2
        optimizer.param_groups[0]["lr"] = 6e-3 * min((step + 1) / 50, cosine)
        optimizer.step()


@torch.no_grad()
def sample_together(model, prompts, ends, max_new_tokens, generator, bar):
    """One response of the policy softmax(Q(s, .)) to each of B prompts, which grow side by side.

    The model's cache keeps what later tokens need of earlier ones, their keys and values, so that
    only the newest token is read. A response that has ended leaves the batch and the cache, and
    costs nothing while the longest goes on. Shapes: L tokens in the longest text so far.
    """
    # Texts must end in the same column: so the padding is on the left. It is masked, and positions
    # do not count it.
    tokens = pad(prompts, model.device, "left")  # [B, L]
    mask = pad([torch.ones_like(prompt) for prompt in prompts], model.device, "left")  # [B, L]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, L]
    cache = transformers.DynamicCache(config=model.config)
    responses = [[] for _ in prompts]
    active = responses  # of these, the ones that have not ended, in the order of the batch
    for length in range(max_new_tokens):
        bar.set_postfix_str(f"token {length + 1} of {max_new_tokens}", refresh=False)
        texts = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        logits = model(**texts, past_key_values=cache, logits_to_keep=1).logits[:, -1]  # [B, A]
        pi = logits.float().softmax(1)  # [B, A]
        tokens = torch.multinomial(pi, 1, generator=generator)  # [B, 1]
        for response, token in zip(active, tokens[:, 0].tolist(), strict=True):
            response.append(token)
        keep = [row for row, response in enumerate(active) if response[-1] not in ends]
        bar.update(len(active) - len(keep))
        if not keep:
            break
        if len(keep) < len(active):
            active = [active[row] for row in keep]
            rows = torch.tensor(keep, device=model.device)  # [B], fewer from here on
            tokens, mask, positions = tokens[rows], mask[rows], positions[rows]
            cache.reorder_cache(rows)
        mask = F.pad(mask, (0, 1), value=1)  # [B, L + 1]
        positions = positions[:, -1:] + 1  # [B, 1]
    bar.update(len(keep))  # these were cut
    return [torch.tensor(response) for response in responses]


def sample(model, prompts, ends, cfg, seed, what="sampling"):
    """One response of the policy to each prompt: 1-D int64 tensors, which end with an EOS, one of
    ends, or were cut at cfg.max_new_tokens. At most cfg.rows are sampled side by side."""
    generator = torch.Generator(model.device).manual_seed(seed)
    responses = []
    with progress(what, total=len(prompts)) as bar:
        for start in range(0, len(prompts), cfg.rows):
            chunk = prompts[start : start + cfg.rows]
            responses += sample_together(model, chunk, ends, cfg.max_new_tokens, generator, bar)
    return responses


def rollout(model, tokenizer, problems, cfg, step, purpose):
    """Samples one response to each problem. -> trajectories, plain dicts: problem, answer, prompt
    [P], response [T] (int64, EOS included), text, ended (by itself?), found (the answer in it),
    reward (0 or 1), step."""
    prompts = encode_prompts(tokenizer, [p["problem"] for p in problems], cfg)
    ends = end_tokens(model, tokenizer)
    seed = int(rng(cfg.seed, step, purpose).integers(2**62))
    n = len({p["problem"] for p in problems})
    what = f"{purpose}: {n} problems x {len(problems) // n}"
    responses = sample(model, prompts, ends, cfg, seed, what)
    trajectories = []
    for p, prompt, response in zip(problems, prompts, responses, strict=True):
        ended = response[-1].item() in ends
        # Special tokens are kept in the text: a model may mark its thought by them.
        text = tokenizer.decode(response[:-1] if ended else response)
        # The template may have opened a thought behind the problem.
        tail = tokenizer.decode(prompt).rpartition(p["problem"])[2]
        opened = tail.rfind("<think>") > tail.rfind("</think>")
        whole = "<think>" + text if opened else text
        trajectories.append(
            {
                **p,
                "prompt": prompt,
                "response": response,
                "text": text,
                "ended": ended,
                "found": extract_answer(whole),
                "reward": float(ended and is_correct(whole, p["answer"])),
                "step": step,
            }
        )
    return trajectories


@torch.no_grad()
def check_lengths(model, tokenizer, problems, cfg):
    """UserError if the model cannot read the longest text; else tells what its cache may take."""
    prompts = encode_prompts(tokenizer, [p["problem"] for p in problems], cfg)
    longest = max(map(len, prompts)) + cfg.max_new_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if longest > limit:
        raise UserError(
            f"a prompt and its response may have {longest} tokens, but the model reads {limit} at "
            "most; lower --max-new-tokens, or take out the longest problems"
        )
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=prompts[0][None, :1].to(model.device), past_key_values=cache)
    growth = 0  # bytes that a token adds to the cache
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:  # else its state does not grow
            growth += layer.keys.nbytes + layer.values.nbytes
    print(
        f"sampling up to {cfg.rows} responses side by side (--rows), of up to {longest} tokens "
        f"with the prompt: {cfg.rows * longest * growth / 1e9:.2g} GB of keys and values at most",
        flush=True,
    )


# ==================================================================================================
# PART III: A RUN
# Its settings, its updates, what it writes down, and the loop around it.
# ==================================================================================================

# ---- 8. Settings ---------------------------------------------------------------------------------
# The fields of one dataclass are the flags of the command line. Their defaults are the built-in
# task's; a preset is a few values in their place.


def setting(default, text):
    """A field with its default and what --help says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


ON_GPU = torch.cuda.is_available()
MAY_BE_ZERO = {"steps", "warmup", "half_life", "ref_reset", "distill_steps", "seed"}


def flag(name):
    """A field of Config as it is written on the command line."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass
class Config:
    """All settings of a run. UserError if one is impossible."""

    algo: Literal["reval", "tbrm", "grpo"] = setting("reval", "the loss")
    model: str | None = setting(None, "a causal LM, folder or hub id; none: a tiny one")
    data: str | None = setting(None, "JSONL, or hf://datasets/ORG/NAME/FILE; none: sums")
    eval_data: str | None = setting(None, "to evaluate on; none: a part of --data")
    prompt: str = setting("{problem}", "text around {problem}")
    raw_prompt: bool = setting(False, "do without the tokenizer's chat template")
    steps: int = setting(30, "iterations; 0 only evaluates")
    prompts: int = setting(16, "problems per iteration")
    rollouts: int = setting(8, "responses per problem")
    updates: int = setting(8, "gradient steps per iteration: K")
    buffer: int = setting(15, "replay buffer, in batches of prompts x rollouts")
    beta: float = setting(0.05, "price, in reward, of a nat of KL from the reference")
    lr: float = setting(1.5e-4, "learning rate")
    warmup: int = setting(5, "iterations over which the learning rate rises")
    half_life: int = setting(15, "iterations in which it halves; 0: it stays")
    reward: Literal["raw", "centered"] = setting("raw", "0/1, or minus its group's mean")
    ref_reset: int = setting(0, "iterations between resets of the reference; 0: none")
    max_new_tokens: int = setting(28, "longest response")
    micro_batch_tokens: int = setting(16384, "most tokens of one forward and backward")
    gradient_checkpointing: bool = setting(False, "make --model's activations twice, keep none")
    offload: bool = setting(False, "keep optimizer, master weights and reference in host memory")
    device: Literal["cpu", "cuda", "mps"] = setting("cpu", "where it all happens; mps is untested")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of --model's weights")
    rows: int = setting(256, "most responses sampled side by side")
    distill_steps: int = setting(1600, "warm-start steps of the tiny model")
    eval_every: int = setting(10, "iterations between evaluations and printed samples")
    eval_problems: int = setting(1024, "most held-out problems")
    eval_samples: int = setting(1, "responses to each of them: n in avg@n")
    seed: int = setting(0, "of all that is random")
    save_every: int = setting(10, "iterations between checkpoints")
    out: str | None = setting(None, "a new folder for the run; none: one under runs/")
    resume: str | None = setting(None, "folder of a run to go on with; other flags change it")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                choices = ", ".join(get_args(field.type))
                raise UserError(f"{flag(field.name)} {value}: choose from {choices}")
            zero_too = field.name in MAY_BE_ZERO
            usable = isinstance(value, (int, float)) and 0 <= value < math.inf
            if field.type in (int, float) and not (usable and (value > 0 or zero_too)):
                limit = "of at least 0" if zero_too else "above 0"
                raise UserError(f"{flag(field.name)} {value}: give a number {limit}")
        there = {"cpu": True, "cuda": ON_GPU, "mps": torch.backends.mps.is_available()}
        if not there[self.device]:
            raise UserError(f"--device {self.device}: PyTorch sees no such GPU; take cpu")
        if self.rollouts == 1 and self.reward == "centered":
            raise UserError("--rollouts 1: a response is its own mean; take more, or --reward raw")
        if self.eval_data and not self.data and self.steps > 0:
            raise UserError("--eval-data: give --data to train on as well, or --steps 0")
        if (self.data or self.eval_data) and not self.model:
            raise UserError("--data needs --model: the tiny model reads nothing but sums")
        if "{problem}" not in self.prompt:
            raise UserError("--prompt: write {problem} where the problem goes")


STEP_BY_STEP = "{problem} Let's think step by step and output the final answer within \\boxed{}."
PRESETS = {
    "toy": {},
    "small": {  # for a model of some hundred million parameters, on a laptop
        "prompt": STEP_BY_STEP,
        "steps": 50,
        "prompts": 8,
        "updates": 2,
        "buffer": 5,
        "beta": 0.1,
        "lr": 1e-5,
        "warmup": 0,
        "half_life": 0,
        "max_new_tokens": 256,
        "micro_batch_tokens": 1024,
        "rows": 64,
        "eval_problems": 200,
        "save_every": 5,
        "device": "cuda" if ON_GPU else "cpu",
    },
    "r1-distill-1.5b": {  # the paper's first experiment, as far as it tells
        "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "data": "hf://datasets/agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json",
        "prompt": STEP_BY_STEP,
        "steps": 650,
        "prompts": 128,
        "updates": 2,
        "buffer": 5,
        "beta": 0.002,
        "lr": 1e-6,
        "warmup": 0,
        "half_life": 0,
        "max_new_tokens": 8192,
        "gradient_checkpointing": True,
        "eval_every": 10,
        "eval_problems": 100,
        "eval_samples": 16,
        "save_every": 1,
        "rows": 128,
        "device": "cuda" if ON_GPU else "cpu",
        "dtype": "bfloat16" if ON_GPU else "float32",
    },
}


def parse_args(argv):
    """The command line as a Config. A preset, or the settings of a run to resume, are defaults in
    the place of the fields' own; what is given as a flag comes before either."""
    parser = transformers.HfArgumentParser(
        Config,
        prog="reval_min",
        description=__doc__.split("\n")[0],
        epilog=f"Presets: {PRESETS}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="none: small with --data or --eval-data, else toy"
    )

    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser.error = refuse
    given = parser.parse_args(argv)
    if given.resume and given.preset:
        refuse("--preset: a resumed run has its settings; change single ones")
    fed = given.data or given.eval_data
    preset = given.preset or ("small" if given.model or fed else "toy")
    if given.resume:
        defaults = saved_settings(given.resume)
    elif preset == "small" and not fed:
        refuse("--model and --data: give both, or --preset toy if a model is to learn sums")
    else:
        defaults = PRESETS[preset]
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]


def saved_settings(folder):
    """The settings that the run in a folder was begun with, from its config.json."""
    try:
        saved = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        settings = {field.name: saved[field.name] for field in dataclasses.fields(Config)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--resume {folder}: no run of this version of the program ({error})"
        ) from error
    return settings | {"out": folder}


# ---- 9. One update -------------------------------------------------------------------------------


def add_signals(trajectories, cfg):
    """Writes into each trajectory the "signal" that its loss sees: the reward, or the reward minus
    the mean of its group (the cfg.rollouts responses to one problem), or GRPO's advantage.

    Centring moves the best policy, although a constant would not. A mean that holds the response
    itself narrows the gap between right and wrong to 1 - 1/group of it; and in the buffer means of
    different ages meet. With one response per problem GRPO's advantage is the reward, as in the
    trainer that the paper used (mean 0, standard deviation 1).
    """
    reward = torch.tensor([t["reward"] for t in trajectories]).view(-1, cfg.rollouts)  # [P, R]
    centered = reward - reward.mean(1, keepdim=True)  # [P, R]
    signal = reward  # [P, R]
    if cfg.algo == "grpo" and cfg.rollouts > 1:
        signal = centered / (reward.std(1, keepdim=True) + 1e-6)  # [P, R]
    elif cfg.reward == "centered":
        signal = centered  # [P, R]
    for t, value in zip(trajectories, signal.flatten(), strict=True):
        t["signal"] = value


def master_weights(model, device):
    """The float32 weights that the optimizer changes, on device, with a float32 sum of gradients.

    A weight of bfloat16 has steps of 1/256 of its size: a learning rate of 1e-6 would never move
    it. So the sum of many small steps is kept apart, as is the sum of the micro-batches' gradients:
    backward adds each as soon as it is made, and frees it. A float32 weight is its own master.
    """

    def add_to(master):
        def add(weight):
            new = weight.grad.to(master.device, torch.float32)
            master.grad = new if master.grad is None else master.grad.add_(new)
            weight.grad = None

        return add

    masters = []
    for weight in model.parameters():
        master = weight
        if weight.dtype != torch.float32 or weight.device.type != device.type:
            master = weight.detach().to(device, torch.float32, copy=True).requires_grad_()
            weight.register_post_accumulate_grad_hook(add_to(master))
        masters.append(master)
    return masters


def gradient(model, masters, batch, cfg):
    """Puts the gradient of the loss of a batch, clipped to norm 1, into the master weights' .grad.
    -> figures of the batch: loss; residual, the root of its mean square; v_gap, the mean of V(s_1)
    - V_ref(s_1); kl, the mean of log pi - log pi_ref of a response; entropy, that of -log pi of a
    token; grad_norm, before it is clipped.

    Micro-batches save memory and change nothing: each sum is divided by a count of the whole
    batch. If something is not finite: FloatingPointError, which names the response.
    """
    for master in masters:
        master.grad = None
    n_tokens = sum(len(t["response"]) for t in batch)
    stats = dict.fromkeys(("loss", "residual", "v_gap", "kl", "entropy"), 0.0)
    model.train()  # for gradient checkpointing; dropout is off
    for part in with_bar(micro_batches(batch, cfg.micro_batch_tokens), "learning"):
        q, v, mask = score(model, part)  # [B, T] each
        q_ref = pad([t["q_ref"] for t in part], q.device)  # [B, T]
        v_ref = pad([t["v_ref"] for t in part], q.device)  # [B, T]
        signal = torch.stack([t["signal"] for t in part]).to(q.device)  # [B]
        if cfg.algo == "grpo":
            logp_old = pad([t["q_old"] - t["v_old"] for t in part], q.device)  # [B, T]
            loss, _ = grpo_loss(q - v, logp_old, signal, mask, n_tokens)
        else:
            calibrated = cfg.algo == "reval"
            loss, info = reval_loss(q, v, q_ref, v_ref, signal, mask, cfg.beta, calibrated)
            loss = loss * len(part) / len(batch)
            stats["residual"] += info["residual"].square().sum().item() / len(batch)
        loss.backward()
        stats["loss"] += loss.item()
        stats["v_gap"] += (v - v_ref)[:, 0].sum().item() / len(batch)
        stats["kl"] += ((q - v) - (q_ref - v_ref)).sum().item() / len(batch)
        stats["entropy"] += (v - q).sum().item() / n_tokens
    model.eval()
    norm = torch.nn.utils.clip_grad_norm_(masters, 1.0).item()
    if not math.isfinite(stats["loss"] + norm):
        if len(batch) > 1:
            for t in batch:  # taken alone, the culprit names itself
                gradient(model, masters, [t], cfg)
        raise FloatingPointError(
            f"loss {stats['loss']}, gradient norm {norm} for {len(batch)} responses, the last of "
            f"step {batch[-1]['step']} to {batch[-1]['problem']!r:.200}"
        )
    stats["residual"] = math.sqrt(stats["residual"])
    if cfg.algo == "grpo":
        del stats["residual"]  # it has none
    return stats | {"grad_norm": norm}


@torch.no_grad()
def update(model, masters, optimizer):
    """One step of the optimizer. The weights that sample follow their masters, in place, and the
    gradients are freed: rollouts want the memory."""
    optimizer.step()
    optimizer.zero_grad()
    for weight, master in zip(model.parameters(), masters, strict=True):
        if weight is not master:
            weight.copy_(master)


# ---- 10. Evaluation, record and resume -----------------------------------------------------------


def atomic_write(path, write):
    """Writes a file by calling write on an open one beside it, which takes its place when it is
    whole: whatever happens, path is the old file or the complete new one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
        part.unlink(missing_ok=True)
        reason = first_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); what was there stays") from error


def write_rows(path, rows):
    """Writes a JSONL file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write(path, lambda file: file.write(text.encode()))


def open_run(cfg):
    """Makes the folder of a new run, never one that exists, and puts its name into cfg.out."""
    name = cfg.out or f"runs/{'model' if cfg.model else 'toy'}-{cfg.algo}-s{cfg.seed}"
    out, number = Path(name), 2
    while out.exists() and not cfg.out:
        out = Path(f"{name}-{number}")
        number += 1
    try:
        out.mkdir(parents=True)
    except OSError as error:
        reason = f"no folder can be made there ({error.strerror}); name a new one, or --resume it"
        raise UserError(f"--out {out}: {reason}") from error
    cfg.out = str(out)


class Run:
    """The state of a run: what the next iteration depends on, and the history.

    All of it is saved, in tensors and plain values. No generator is among it (see rng), and a run
    that goes on is the one that never stopped.
    """

    def __init__(self, cfg, model, problems):
        self.model = model
        # Where the reference, the master weights and the optimizer rest.
        self.place = torch.device("cpu") if cfg.offload else model.device
        self.reference = copy.deepcopy(model).requires_grad_(False).to(self.place)
        self.masters = master_weights(model, self.place)
        # The paper left its trainer's defaults: AdamW with betas 0.9 and 0.999 and a weight decay
        # of 0.01, a constant rate, and a clip of the norm to 1. The first two differ here.
        self.optimizer = torch.optim.AdamW(
            self.masters, cfg.lr, betas=(0.9, 0.95), weight_decay=0, fused=True
        )
        self.buffer = ReplayBuffer(cfg.buffer * cfg.prompts * cfg.rollouts, cfg.seed)
        self.history = []  # a row of figures for each step, from 0 on
        fixed = repr((problems, cfg.algo, cfg.reward))  # may not change on the way
        self.fingerprint = zlib.crc32(fixed.encode())

    def save(self, out):
        """Writes out/checkpoint.pt."""
        state = {
            "fingerprint": self.fingerprint,
            "masters": [master.detach() for master in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "reference": self.reference.state_dict(),
            "buffer": self.buffer.items,
            "draws": self.buffer.draws,
            "history": self.history,
        }
        atomic_write(out / "checkpoint.pt", lambda file: torch.save(state, file))

    def load(self, out, steps):
        """Takes the state from out/checkpoint.pt. UserError if it is broken or foreign, or further
        than steps; nothing in it is ever executed."""
        try:
            state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            if len(state["history"]) > steps + 1:
                raise ValueError(f"it is at step {len(state['history']) - 1}; give more --steps")
            if state["fingerprint"] != self.fingerprint:
                raise ValueError("its problems, --algo or --reward have changed; begin a new run")
            parameters = zip(self.model.parameters(), self.masters, state["masters"], strict=True)
            with torch.no_grad():
                for weight, master, saved in parameters:
                    weight.copy_(master.copy_(saved))
            self.optimizer.load_state_dict(state["optimizer"])
            self.reference.load_state_dict(state["reference"])
            self.buffer.add(state["buffer"])
            self.buffer.draws = state["draws"]
            self.history = state["history"]
        except Exception as error:  # whatever a foreign or damaged file makes torch raise
            reason = f"cannot go on from its checkpoint.pt ({first_line(error):.200})"
            raise UserError(f"--resume {out}: {reason}") from error


def print_samples(answers):
    """Prints a right and a wrong answer, and the two commonest reasons why nothing is learnt."""
    for word, reward in (("right", 1), ("wrong", 0)):
        for row in answers:
            if row["reward"] == reward:
                text = row["text"][-300:] + ("" if row["ended"] else "[cut]")
                why = f"(found {row['found']!r:.50}, wanted {row['answer']!r:.50})"
                print(f"  {word}: {row['problem']!r:.300} -> {text!r} {why}")
                break
    if not any(row["reward"] for row in answers):
        print("warning: no right answer; take easier problems, or another --prompt")
    cut = fmean(not row["ended"] for row in answers)
    if cut > 0.5:
        print(f"warning: {cut:.0%} of the responses were cut, for nothing; raise --max-new-tokens")


def evaluate(model, tokenizer, problems, cfg, step, out):
    """Answers each problem cfg.eval_samples times, as it does in training, writes all answers to
    eval-STEP.jsonl and prints two. -> figures: accuracy, the mean; stderr, its standard error over
    n problems, as half the width of Wilson's interval: so it is not 0 at 0 of n."""
    asked = [p for p in problems for _ in range(cfg.eval_samples)]
    answers = []
    for t in rollout(model, tokenizer, asked, cfg, step, "evaluation"):
        row = {key: t[key] for key in ("problem", "answer", "text", "ended", "found", "reward")}
        answers.append(row | {"length": len(t["response"])})
    write_rows(out / f"eval-{step:05}.jsonl", answers)
    print_samples(answers)
    n = len(problems)
    shares = np.array([row["reward"] for row in answers]).reshape(n, -1).mean(1)
    return {
        "accuracy": float(shares.mean()),
        "stderr": math.sqrt(n * shares.var() + 1 / 4) / (n + 1),
        "eval_length": fmean(row["length"] for row in answers),
        "eval_truncated": fmean(not row["ended"] for row in answers),
    }


# The age is that of the replayed responses, in iterations; seconds are without the evaluation.
COLUMNS = ["step", "rollouts", "reward", "accuracy", "residual", "kl", "length", "age", "seconds"]


def record(row, history, out):
    """Adds a row to the history, writes metrics.jsonl and prints the main figures."""
    history.append(row)
    write_rows(out / "metrics.jsonl", history)
    cells = []
    for key in COLUMNS:
        value = row.get(key, "-")
        cells.append(f"{value:.3f}" if isinstance(value, float) else str(value))
    print(" ".join(cell.rjust(8) for cell in cells), flush=True)


def save_model(model, tokenizer, out):
    """Writes out/model, for from_pretrained, under that name only when whole."""
    part = out / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.rmtree(out / "model", ignore_errors=True)  # an older one, if the run went on
        part.rename(out / "model")
    except Exception as error:  # safetensors has an error of its own for a full disk
        reason = f"cannot be written ({first_line(error)}); make room, then --resume {out}"
        raise UserError(f"{out / 'model'}: {reason}") from error


# ---- 11. The training loop -----------------------------------------------------------------------


def learning_rate(cfg, step):
    """cfg.lr, times a linear rise over the warm-up, times a halving every half-life."""
    rise = min(1.0, step / cfg.warmup) if cfg.warmup else 1.0
    decay = 0.5 ** (step / cfg.half_life) if cfg.half_life else 1.0
    return cfg.lr * rise * decay


def collect(run, tokenizer, problems, cfg, step):
    """One response of the live model to each problem, with all that the loss needs, into the
    buffer. -> the fresh batch"""
    fresh = rollout(run.model, tokenizer, problems, cfg, step, "rollout")
    add_signals(fresh, cfg)
    cache_values(run.reference.to(cfg.device), fresh, cfg, "ref")
    run.reference.to(run.place)
    if cfg.algo == "grpo":
        cache_values(run.model, fresh, cfg, "old")
    run.buffer.add(fresh)
    return fresh


def learn(run, fresh, cfg, step):
    """The K updates of an iteration: once from the fresh batch, then from the buffer (GRPO: the
    fresh batch again). -> figures of the first, which are those of the policy that sampled it;
    the mean grad_norm; and the mean age of what was replayed."""
    run.optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
    figures = []
    ages = []
    for k in range(cfg.updates):
        batch = fresh
        if k > 0 and cfg.algo != "grpo":
            batch = run.buffer.sample(len(fresh))
            ages += [step - t["step"] for t in batch]
        figures.append(gradient(run.model, run.masters, batch, cfg))
        update(run.model, run.masters, run.optimizer)
    row = figures[0] | {"grad_norm": fmean(f["grad_norm"] for f in figures)}
    if ages:
        row["age"] = fmean(ages)
    return row


def train(cfg):
    """Runs cfg from start to end. -> the figures that the command line prints last, as a dict."""
    start = time.time()
    problems, held_out = load_problems(cfg)
    model, tokenizer = load_model(cfg)
    if model.num_parameters() < 1e6:
        torch.set_num_threads(1)  # for so small a model a second thread is only one to wait for
    check_lengths(model, tokenizer, problems + held_out, cfg)
    if cfg.resume:
        run = Run(cfg, model, (problems, held_out))
        run.load(Path(cfg.resume), cfg.steps)
    if not cfg.resume or cfg.out != cfg.resume:
        open_run(cfg)
    out = Path(cfg.out)
    print(
        f"{model.num_parameters() / 1e6:.2f}M parameters, {len(problems)} problems, "
        f"{len(held_out)} held out, settings and results in {out}",
        flush=True,
    )
    if not cfg.model and not cfg.resume:
        distill(model, tokenizer, cfg)
        print(f"distilled: {cfg.distill_steps} steps, {time.time() - start:.0f} s", flush=True)
    settings = json.dumps(vars(cfg), indent=1)  # for --resume
    atomic_write(out / "config.json", lambda file: file.write(settings.encode()))
    if cfg.steps == 0:  # nothing is to be learnt
        figures = evaluate(model, tokenizer, held_out, cfg, 0, out)
        if not cfg.model:
            save_model(model, tokenizer, out)
        return figures | {"seconds": time.time() - start, "out": cfg.out}

    print(" ".join(key.rjust(8) for key in COLUMNS), flush=True)
    if cfg.resume:
        write_rows(out / "metrics.jsonl", run.history)
    else:
        run = Run(cfg, model, (problems, held_out))
        figures = evaluate(model, tokenizer, held_out, cfg, 0, out)
        record({"step": 0, "rollouts": 0} | figures, run.history, out)
    if cfg.out != cfg.resume:  # in a new folder a full disk is found now
        run.save(out)

    for step in range(len(run.history), cfg.steps + 1):
        # 1. Collect: a few problems, several responses to each by the live model.
        begin = time.time()
        chosen = rng(cfg.seed, step, "prompts").choice(
            len(problems), cfg.prompts, replace=cfg.prompts > len(problems)
        )
        asked = [problems[i] for i in chosen for _ in range(cfg.rollouts)]
        fresh = collect(run, tokenizer, asked, cfg, step)
        sampled = time.time()

        # 2. Learn: K updates, from the fresh batch and from the buffer.
        row = learn(run, fresh, cfg, step)

        # 3. Now and then the reference catches up: what was cached from the old one is stale.
        if cfg.ref_reset and step % cfg.ref_reset == 0:
            run.reference.load_state_dict(model.state_dict())
            cache_values(model, run.buffer.items, cfg, "ref")
        learned = time.time()

        # 4. Tell.
        row |= {
            "step": step,
            "rollouts": run.history[-1]["rollouts"] + len(fresh),
            "reward": fmean(t["reward"] for t in fresh),
            "length": fmean(len(t["response"]) for t in fresh),
            "truncated": fmean(not t["ended"] for t in fresh),
            "seconds_rollout": sampled - begin,
            "seconds": learned - begin,
        }
        if cfg.device == "cuda":
            row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
        if step % cfg.eval_every == 0 or step == cfg.steps:
            row |= evaluate(model, tokenizer, held_out, cfg, step, out)
        record(row, run.history, out)

        # 5. Keep. After a kill the run goes on from here as if nothing had happened.
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save(out)

    if "accuracy" not in run.history[-1]:  # a resumed run that was complete, but for this
        row = run.history.pop() | evaluate(model, tokenizer, held_out, cfg, cfg.steps, out)
        record(row, run.history, out)
    last = run.history[-1]
    save_model(model, tokenizer, out)
    return {
        "accuracy_before": run.history[0]["accuracy"],
        "accuracy_after": last["accuracy"],
        "stderr": last["stderr"],
        "rollouts": last["rollouts"],
        "seconds": time.time() - start,
        "out": cfg.out,
    }


def main(argv):
    """The command line. -> exit status: 0; 2 after one line on what went wrong; 130 if stopped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a console cannot show comes out escaped
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    cfg = None
    try:
        cfg = parse_args(argv)
        for key, value in train(cfg).items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        return 0
    except KeyboardInterrupt:
        saved = cfg and cfg.out and Path(cfg.out, "checkpoint.pt").exists()
        advice = f"; go on with --resume {cfg.out}" if saved else ""
        print(f"reval_min: stopped{advice}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        message = (
            "the GPU's memory is too small; lower --rows, --micro-batch-tokens or "
            f"--max-new-tokens, or give --offload ({str(error).partition('. ')[0]})"
        )
    except (UserError, FloatingPointError, OSError) as error:
        message = error
    print(f"reval_min: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

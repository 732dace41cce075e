"""Tests and evidence for reval_min.py.

    python -m pytest -q                      the tests: no network, no GPU, under two minutes of CPU
    python test_reval_min.py study NAME      a table and a chart; NAMEs: see STUDIES

Each test names the claim that it checks. REVAL_TEST_SEED is the seed of those that learn.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from unittest import mock

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode

import reval_min as rm

HERE = Path(__file__).parent
SEED = int(os.environ.get("REVAL_TEST_SEED", "0"))  # of the runs that learn
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


# ---- Helpers -------------------------------------------------------------------------------------


def rows_of(out, name="metrics.jsonl"):
    """The rows of a JSONL file of a run."""
    return [json.loads(line) for line in Path(out, name).open(encoding="utf-8")]


def json_lines(path, rows):
    """Writes rows as JSON lines. -> the path, as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def flags(settings):
    """Settings as a command line."""
    given = {name: value for name, value in settings.items() if str(value) not in ("", "False")}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def values():
    """Random q, v, q_ref, v_ref, reward, mask of the losses' shapes, with nan in the padding."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[1], [2], [3], [4]])
    q, v, q_ref, v_ref = torch.randn(4, 4, 5, dtype=torch.float64).masked_fill(~mask, torch.nan)
    return q, v + 3, q_ref, v_ref + 3, torch.tensor([0, 1, 0, 1.0]).double(), mask


def trajectories(n=12, dtype=torch.float32):
    """Random trajectories of the tiny model's vocabulary, with cached values and a signal."""
    torch.manual_seed(0)
    made = []
    for i in range(n):
        T = 1 + i % 7
        t = {"problem": f"p{i}", "step": i, "signal": torch.tensor(i % 2, dtype=dtype)}
        t["prompt"] = torch.randint(3, 19, (3 + i % 4,))
        t["response"] = torch.randint(2, 19, (T,))
        for name, level in (("q_ref", 0), ("v_ref", 3), ("q_old", 0), ("v_old", 3)):
            t[name] = torch.randn(T, dtype=dtype) + level
        made.append(t)
    return made


def flat_grad(weights):
    """The gradients of weights, as one vector."""
    return torch.cat([w.grad.flatten() for w in weights])


def refusal(argv, capsys):
    """Gives main a command line that it must refuse. -> the one line that it says."""
    capsys.readouterr()
    assert rm.main(argv) == 2, argv
    error = capsys.readouterr().err
    assert error.startswith("reval_min: error: ") and error.count("\n") == 1, error
    return error


def failing(patch, where, name, error, at=1):
    """Makes a call of the function where.name raise an error, when half is written."""
    plain = getattr(where, name)
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == at:
            if where == torch:
                args[1].write_bytes(b"half of a checkpoint")
            raise error
        return plain(*args, **kwargs)

    patch.setattr(where, name, call)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A warm start of few steps, shared by every test that learns: its folder."""
    out = tmp_path_factory.mktemp("start")
    warm_start(out, SEED, steps=300)
    return out


@functools.cache
def sums(seed, n, load=rm.load_problems):
    """The first of the built-in problems, made once for all runs."""
    problems, held_out = load(rm.Config(seed=seed, eval_problems=n))
    return problems[:99], held_out


@pytest.fixture
def quick(start, tmp_path, monkeypatch):
    """Makes the Config of a short run of the built-in task from the shared start."""
    numbers = itertools.count()
    monkeypatch.setattr(rm, "load_problems", lambda cfg: sums(cfg.seed, cfg.eval_problems))

    def make(**changes):
        defaults = {"prompts": 4, "rollouts": 4, "updates": 3, "buffer": 3, "lr": 1e-4, "warmup": 0}
        defaults |= {"steps": 3, "eval_every": 2, "eval_problems": 32, "seed": SEED}
        defaults |= {"model": str(start / "model"), "out": str(tmp_path / f"run{next(numbers)}")}
        return rm.Config(**(defaults | changes))

    return make


@pytest.fixture
def rewarded(monkeypatch):
    """Pays every second response, whatever was sampled, so that the weights move."""
    rollout = rm.rollout

    def paid(*args):
        return [t | {"reward": float(i % 2)} for i, t in enumerate(rollout(*args))]

    monkeypatch.setattr(rm, "rollout", paid)


def as_on_a_gpu(monkeypatch):
    """Makes --device cuda what it is but for the place: with checkpointing."""
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda model, device: model)


def saved_model(folder, kind="Llama", chat=False, **changes):
    """Saves a tiny model of a real kind and a byte-level BPE whose EOS is its pad. -> the folder"""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    how = {"special_tokens": ["<s>", "</s>", "<user>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **how)
    raw.train_from_iterator(["What is 1 + 2? The answer is \\boxed{3}."] * 9, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    if chat:
        tokenizer.chat_template = "{{ bos_token + '<user>' + messages[0]['content'] + ' A:' }}"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    sizes |= {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**(sizes | changes))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- The method and one update -------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_q_from_logits_equals_the_plain_form(block):
    """Q, V and their gradients, for blocks that divide the vocabulary, do not, and exceed it."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 6, 3, 3, 5])
    results = []
    for form in (rm.plain_q_and_v, functools.partial(rm.q_from_logits, block=block)):
        q, v = form(hidden, weight, actions)
        mixed = (q.sin() + v.cos()).sum()
        results.append((q, v, *torch.autograd.grad(mixed, (hidden, weight))))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_q_from_logits_precision_and_errors():
    """float32 out of bfloat16 in, gradients in the operands' types; misuse is told."""
    torch.manual_seed(0)
    hidden = torch.randn(6, 8).bfloat16().requires_grad_()
    weight = torch.randn(50, 8).bfloat16().requires_grad_()
    actions = torch.arange(6)
    found = torch.stack(rm.q_from_logits(hidden, weight, actions, block=16))
    exact = torch.stack(rm.plain_q_and_v(hidden.double(), weight.double(), actions))
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-5
    found.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    for misfit in (torch.arange(5), actions[:, None]):
        with pytest.raises(ValueError, match="hidden"):
            rm.q_from_logits(hidden, weight, misfit)
    with pytest.raises(IndexError):
        rm.q_from_logits(hidden, weight, actions - 1)


def test_q_from_logits_never_holds_the_logits():
    """No tensor it makes, forward or backward, has more than N x block or A x D elements."""
    N, D, A, block = 64, 2, 4000, 100
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            outputs = made if isinstance(made, (tuple, list)) else [made]
            sizes.extend(x.numel() for x in outputs if torch.is_tensor(x))
            return made

    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(A, D, requires_grad=True)
    with Watch():
        q, v = rm.q_from_logits(hidden, weight, torch.arange(N), block)
        (q - v).sum().backward()
    assert N * block <= max(sizes) <= max(N * block, A * D) < N * A


def test_example_of_the_docstring():
    """reval_loss: the numbers worked by hand."""
    exponentials = torch.tensor([[[2, 4]], [[8, 8]], [[1, 1]], [[4, 4]]], dtype=torch.float64)
    reward, mask = torch.ones(1), torch.ones(1, 2, dtype=torch.bool)
    loss, info = rm.reval_loss(*exponentials.log(), reward, mask, beta=0.5)
    by_hand = math.log(8) - math.log(4) + math.log(1 / 8) - math.log(1 / 16) - 1 / 0.5
    assert info["residual"].item() == pytest.approx(by_hand)
    assert loss.item() == pytest.approx(0.5 / 2 * by_hand**2)
    assert f"= {by_hand:.4f}, loss = {loss.item():.4f}" in rm.reval_loss.__doc__


@pytest.mark.parametrize("calibrated", [True, False])
def test_loss_and_target_equal_slow_oracles(calibrated):
    """Eq. (2) in plain loops, the target term by term, nothing detached. Broken masks are told."""
    q, v, q_ref, v_ref, reward, mask = values()
    target = torch.zeros_like(q)
    residual = (v - v_ref)[:, 0] - reward / 0.1
    for i, h in mask.nonzero().tolist():
        residual[i] += (q - v)[i, h] - (q_ref - v_ref)[i, h]
        target[i, h] = q_ref[i, h]
        if h + 1 < mask[i].sum():
            target[i, h] += (v - v_ref)[i, h + 1]
        else:
            target[i, h] += reward[i] / 0.1
    if not calibrated:
        residual += v_ref[:, 0]
    how = (q_ref, v_ref, reward, mask, 0.1)
    torch.testing.assert_close(rm.bellman_target(v, *how), target, rtol=1e-10, atol=0)
    loss, info = rm.reval_loss(q, v, *how, calibrated)
    torch.testing.assert_close(info["residual"], residual, rtol=1e-10, atol=0)
    assert loss.item() == pytest.approx(0.1 / 2 * residual.square().mean().item(), rel=1e-10)
    operands = (q.requires_grad_(), v.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, v: rm.reval_loss(q, v, *how, calibrated)[0], operands)
    for bad in (~mask, mask.flip(1), mask & (torch.arange(5) != 1)):
        with pytest.raises(ValueError, match="mask"):
            rm.reval_loss(q, v, q_ref, v_ref, reward, bad, 0.1)


def test_grpo_loss_equals_a_slow_oracle():
    """GRPO: the clipped gain of each token; beyond the clip it teaches nothing."""
    logp, _, logp_old, _, reward, mask = values()
    how = (logp_old, reward - 0.6, mask, 7)
    loss = rm.grpo_loss(logp.requires_grad_(), *how)
    loss.backward()
    gains = []
    kinds = set()
    for i, h in mask.nonzero().tolist():
        advantage = reward[i].item() - 0.6
        ratio = (logp[i, h] - logp_old[i, h]).exp().item()
        clip = 1.28 if advantage > 0 else 0.8
        beyond = ratio > clip if advantage > 0 else ratio < clip
        gains.append((clip if beyond else ratio) * advantage)
        assert (logp.grad[i, h] == 0) == beyond
        kinds.add((beyond, advantage > 0))
    assert len(kinds) == 4 and loss.item() == pytest.approx(-sum(gains) / 7, rel=1e-10)
    assert torch.autograd.gradcheck(lambda logp: rm.grpo_loss(logp, *how), (logp,))


def test_first_gradients():
    """The start is calibrated, TBRM's is not; a centered reward gives REINFORCE's gradient."""
    model = rm.make_model(0)[0].double()
    batch = [t | {"prompt": torch.tensor([1, 5, 6])} for t in trajectories(8)]
    q, v, mask = rm.score(model, batch)
    how = (q, v, q.detach(), v.detach())
    reward = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    centered = reward - reward.mean()
    calm, _ = rm.reval_loss(*how, 0 * reward, mask, 0.05)
    tbrm, info = rm.reval_loss(*how, 0 * reward, mask, 0.05, calibrated=False)
    reval, _ = rm.reval_loss(*how, centered, mask, 0.05)
    reinforce = -(centered * (q - v).sum(1)).mean()
    found = []
    for loss in (calm, tbrm, reval, reinforce):
        model.zero_grad()
        loss.backward(retain_graph=True)
        found.append(flat_grad(model.parameters()))
    assert calm.item() == 0 and not found[0].any()
    assert torch.allclose(info["residual"], v[:, 0]) and found[1].norm() > 0.1
    assert (found[2] - found[3]).norm() < 1e-6 * found[3].norm() and found[3].norm() > 0.1


def test_later_states_have_no_level():
    """A constant on all logits of a later state changes nothing, on those of the first it does."""
    q, v, *rest = values()
    losses = []
    for level in (0, torch.arange(5), 1):
        losses.append(rm.reval_loss(q + level, v + level, *rest, 0.1)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


def test_beta_goes_with_length():
    """With beta * length fixed, the same nats a token make a right response's residual 0."""
    for length in (1, 4, 16):
        log_pi_ref, v = torch.randn(2, 1, length, dtype=torch.float64)
        q_ref = v + log_pi_ref
        mask = torch.ones(1, length, dtype=torch.bool)
        _, info = rm.reval_loss(q_ref + 1 / 2, v, q_ref, v, torch.ones(1), mask, beta=2 / length)
        assert abs(info["residual"].item()) < 1e-9


# A world small enough to solve: two tokens out of three, so nine responses, of which two are right.
EVERY = torch.arange(9)
UNEVEN = torch.tensor([0, 1, 1, 1, 1, 1, 2, 3, 3, 4, 5, 6, 7, 7, 7, 8])  # all, some more often
REWARD = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
BETA = 0.5


def table(seed):
    """Random logits of the first state and of the three states after it."""
    torch.manual_seed(seed)
    return torch.randn(4, 3, dtype=torch.float64)


def q_and_v(logits, rows):
    """Q and V of the two tokens of responses, which are given by number: [B, 2] each."""
    first, second = rows // 3, rows % 3
    q = torch.stack([logits[0, first], logits[1 + first, second]], 1)
    states = torch.stack([0 * first, 1 + first], 1)
    return q, logits.logsumexp(1)[states]


def policy(logits):
    """The probability of each of the nine responses."""
    q, v = q_and_v(logits, EVERY)
    return (q - v).sum(1).exp()


def best_policy(reference):
    """pi_ref exp(r / beta) / Z, and log Z."""
    weight = policy(reference) * (REWARD / BETA).exp()
    return weight / weight.sum(), weight.sum().log()


def fit(begin, rows, q_ref, v_ref, calibrated=True, held=False):
    """Gradient descent to a loss of 0, or to rest with V(s_1) held fixed, eq. (4). -> logits"""
    logits = begin.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=4.0, momentum=0.8)
    mask = torch.ones(len(rows), 2, dtype=torch.bool)
    for _ in range(200):
        q, v = q_and_v(logits, rows)
        if held:  # Q(s_1, a_1) = V(s_1) + log pi(a_1|s_1)
            q[:, 0] += v[:, 0].detach() - v[:, 0]
        loss, _ = rm.reval_loss(q, v, q_ref, v_ref, REWARD[rows], mask, BETA, calibrated)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.grad.norm() < 1e-6 and (held or loss < 1e-10)
    return logits.detach()


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("begin, rows", [(0, EVERY), (1, UNEVEN)])
def test_fixed_point(begin, rows, calibrated):
    """Whoever wrote the data, wherever the model begins: it ends at pi_ref exp(r / beta) / Z."""
    q_ref, v_ref = q_and_v(table(0), rows)
    logits = fit(table(begin), rows, q_ref, v_ref, calibrated)
    best, level = best_policy(table(0))
    if calibrated:
        level = level + v_ref[0, 0]
    assert torch.allclose(policy(logits), best, atol=1e-4)
    assert torch.allclose(logits[0].logsumexp(0), level, atol=1e-3)


def test_coverage():
    """Ratios among those seen are right, the others' mass is free; V takes the slack."""
    seen = torch.tensor([1, 4, 5, 7])
    q_ref, v_ref = q_and_v(table(0), seen)
    wanted = (policy(table(0)).log() + REWARD / BETA)[seen]
    masses = []
    for begin in (0, 1):
        logits = fit(table(begin), seen, q_ref, v_ref)
        slack = logits[0].logsumexp(0) - v_ref[0, 0]
        assert torch.allclose(policy(logits)[seen].log() + slack, wanted, atol=1e-3)
        masses.append(policy(logits)[seen].sum())
    assert abs(masses[0] - masses[1]) > 0.1
    assert min(masses) > best_policy(table(0))[0][seen].sum() + 0.1


def test_a_small_residual_proves_nothing():
    """With half of the reference values out of date: a perfect fit, and neither best policy."""
    old, new = table(2), table(0)
    stale = torch.stack(q_and_v(old, EVERY))
    mixed = torch.stack(q_and_v(new, EVERY))
    mixed[:, ::2] = stale[:, ::2]
    logits = fit(new, EVERY, *mixed)
    for reference in (old, new):
        assert (policy(logits) - best_policy(reference)[0]).abs().max() > 0.05


def test_v_held_fixed_depends_on_who_wrote_the_data():
    """Without the gradient's part through V(s_1), where it ends depends on the data."""
    ends = []
    for rows in (EVERY, UNEVEN):
        ends.append(policy(fit(table(0), rows, *q_and_v(table(0), rows), held=True)))
        assert (ends[-1] - best_policy(table(0))[0]).abs().max() > 0.1
    assert (ends[0] - ends[1]).abs().max() > 0.02


@pytest.mark.parametrize("algo", ["reval", "tbrm", "grpo"])
def test_batch_layout_does_not_matter(algo):
    """Micro-batches, of up to so many padded tokens: one gradient for any size and order."""
    model = rm.make_model(0)[0].double()
    batch = trajectories(13, torch.float64)

    def found(layout, tokens):
        for part in rm.micro_batches(layout, tokens):
            longest = max(len(t["prompt"]) + len(t["response"]) for t in part)
            assert len(part) == 1 or len(part) * longest <= tokens
        cfg = rm.Config(algo=algo, micro_batch_tokens=tokens)
        stats = rm.gradient(model, list(model.parameters()), layout, cfg)
        return stats, flat_grad(model.parameters())

    stats, whole = found(batch, 10**6)
    assert whole.norm() > 0.1
    for layout, tokens in ((batch, 1), (batch[::-1], 30), (batch[5:] + batch[:5], 99)):
        figures, gradient = found(layout, tokens)
        assert (gradient - whole).norm() < 1e-10 * whole.norm()
        assert figures == pytest.approx(stats, rel=1e-8)


def test_master_weights_keep_small_steps():
    """A bfloat16 weight of 1 cannot make a step of 1e-6, its master can. Gradients are freed."""
    model = torch.nn.Linear(1, 1, bias=False)
    assert rm.master_weights(model)[0] is model.weight
    (master,) = rm.master_weights(model.bfloat16())
    torch.nn.init.ones_(master)
    optimizer = torch.optim.AdamW([master], lr=1e-6, weight_decay=0)
    seen = set()
    for _ in range(2500):
        master.grad = torch.ones_like(master)
        rm.update(model, [master], optimizer)
        assert master.grad is None
        seen.add(model.weight.item())
    assert seen == {1.0, 1 - 2**-8}  # the next smaller one
    assert master.item() == pytest.approx(1 - 2500e-6, abs=1e-4)


def test_buffer():
    """First in, first out; uniform, without replacement. rng: other arguments, other draws."""
    which = [(0, 1, "a"), (0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]
    drawn = [rm.rng(*each).integers(2**62) for each in which]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4
    buffer = rm.ReplayBuffer(5)
    generator = rm.rng(0, 0, "test")
    buffer.add(range(3))
    assert sorted(buffer.sample(10, generator)) == [0, 1, 2]
    buffer.add(range(3, 8))
    samples = [buffer.sample(2, generator) for _ in range(2000)]
    counts = collections.Counter(sum(samples, []))
    assert sorted(counts) == [3, 4, 5, 6, 7] and len(buffer.items) == 5
    assert all(len(set(sample)) == 2 for sample in samples)
    assert all(abs(n - 800) < 100 for n in counts.values())


def test_signals():
    """The reward, or GRPO's advantage, which is the reward for a group of 1."""
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]

    def signals(**settings):
        batch = [{"reward": r} for r in rewards]
        rm.add_signals(batch, rm.Config(**settings))
        return [t["signal"].item() for t in batch]

    assert signals(rollouts=4) == signals(rollouts=1, algo="grpo") == rewards
    by_hand = [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]
    assert signals(rollouts=4, algo="grpo") == pytest.approx(by_hand, abs=1e-4)


# ---- Checker, problems, settings -----------------------------------------------------------------

# The policy by example: answer, gold, verdict. An answer without a backslash at its head is a whole
# response; one that starts with "=" is what the box holds.
# fmt: off
POLICY = [
    # Where the answer stands: the last box after the thought, else a tag, #### or "answer is".
    (r"\boxed{5}, no, \boxed{6}", "5", False), (r"<think>\boxed{5}</think> \boxed{6}", "5", False),
    (r"<think>\boxed{5}", "5", False), (r"\boxed{5}</think> I am not sure", "5", False),
    (r"\boxed{5", "5", False), (r"\boxed{5}, or \boxed{6", "5", False),
    (r"I had 5, but \boxed{}", "5", False), (r"It is $\boxed 7$.", "7", True),
    (r"\boxed{5} and $\boxed x$", "5", False), (r"\boxed{5} and $\boxed\frac12$", "5", False),
    (r"$\boxed ab$", "a", False), ("=42", r"So it is \boxed{42}.", True),
    ("<answer> 12", "12", False), ("3 + 4 = 7\n#### 1,234", "1234", True),
    ("so the answer is 12. Bye", "12", True), ("Answer = {5}\n6", "5", True),
    # One answer, without "or" and without "not". Before the only box, "or" means "that is".
    (r"not \boxed{5}", "5", False), (r"It can't be $\boxed{5}$", "5", False),
    (r"\boxed{5} or \boxed{6}", "6", False), (r"\boxed{5} \text{ or } 6", "5", False),
    (r"either 4 or \boxed{5}", "5", False), (r"\boxed{5} is not it", "5", False),
    ("=5 or 6", "5", False), ("The answer is not 5", "5", False),
    # Numbers compare as rationals, whatever their spelling.
    ("=0.50", r"\frac12", True), (r"=-\tfrac{1}{2}", "-.5", True), ("=007", "7", True),
    ("=1,234,567", "1234567", True), (r"=12\,345", "12345", True), (r"=33,\! 108", "33108", True),
    ("=x=5,600", "5600", True), (r"=1\frac{1}{2}", "3/2", True), ("=1½", "1.5", True),
    ("=−3", "-3", True), ("=1.5e-3", "0.0015", True), ("=0.333333", "1/3", False),
    ("=12345678901234567", "12345678901234568", False),
    # A sum or a product of numbers is still to be worked out.
    ("=71+82+39", "192", False), (r"=12\cdot34", "408", False), ("=71--82--39", "192", False),
    ("=71+164/2", "153", False), ("=10-2 cm", "8 cm", False), (r"=\frac12+\frac13", "5/6", False),
    # Roots, powers, pi and letters by value, text as text.
    (r"=2^{10}", "1024", True), (r"=\sqrt[3]{64}", "4", True), ("=π", "3.1415926536", True),
    (r"=\frac{75^\circ}{2}", "37.5", True), ("=x**2y-y", "y(x+1)(x-1)", True),
    ("=x+1", "x+2", False), ("=x", "X", False), (r"=3\div x", r"\frac{1}{x}\times3", True),
    (r"=x^{2y}", "x^2y", False), ("=y²", "y^2", True), (r"=2^{\frac{1}{2}}", r"\sqrt{2}", True),
    ("=9^{9^{9^9}}", "9", False), ("=β-α", r"-\alpha+\beta", True), ("=θω", r"\omega\theta", True),
    (r"=\sin x", r"\cos x", False), ("=no", "on", False), (r"=\text{Monday}", "monday", True),
    ("=Paris!", "Paris", True), ("=__import__('os')", "0", False), ("=1//2", "0", False),
    # Units, percent, currency: free to be left out, not to differ.
    ("=5 kg", "5 g", False), ("=5 minutes", "5 hours", False),
    (r"=7\pi\text{ cm}^{2}", r"7\pi", True), ("=40 miles per hour", "40", True),
    ("=11", "11 (pens)", True), ("=5 or six pens", "5", False), ("=4 sevenths", "4", False),
    ("=6 months", "6", True), ("=3 millions", "3", False), ("=2 dozens", "2", False),
    ("=7 halves", "7", False), ("=8 hundreds", "8", False), ("=3 perhaps", "3", False),
    ("=9 of class", "9", False), (r"=\$12.00", "12", True), (r"=12\%", "0.12", True),
    ("=12", "0.12", False), ("=12", r"12\%", True), ("=45°", "45 cm", False), ("=9 m/s", "9", True),
    ("=2 tens", "2", False), ("=5 was it", "5", False), ("=1 hour", "1", True),
    # A name may stand before "=", an equation is no answer to its other side.
    ("=x=5", "5", True), ("=5=x", "5", True), ("=x=5", "y=5", False),
    ("=P(B)=0.2", r"\frac15", True), (r"=y \approx 17", "17", True), ("=xy=6", "6", False),
    ("=x=2, y=3", "y=3, x=2", True), (r"=\sin x=1", "1", False), (r"=t\ne 7", "t != 7", True),
    (r"=1 \le x \lt y", "1≤x<y", True), ("=x<5", "x>5", False), (r"=x \geq 2", "x≥2", True),
    (r"=\lvert x\rvert", "|x|", True), (r"=\emptyset", "∅", True),
    # Tuples, intervals and matrices keep order and brackets, sets and bare lists have no order.
    ("=(1,2)", "(2,1)", False), ("=[2,5)", "[2,5]", False), (r"=\{1,2\}", r"\{2,1\}", True),
    (r"=\left(-\infty, 3\right)", "(-∞,3)", True), (r"=(7,+∞)", r"(7,\infty)", True),
    (r"=-1 \text{ and } \frac12", "0.5, -1", True),
    (r"=\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", True),
    # Multiple choice: one letter, and at most its text.
    ("=(C)", "C", True), (r"=\text{(B) } 12", "B", True), ("=(D) is false", "D", False),
    ("=A. 1 B. 2", "A", False), ("=(B) or (E)", "B", False),
]
# fmt: on


@pytest.mark.parametrize("answer, gold, verdict", POLICY)
def test_checker_policy(answer, gold, verdict):
    """The checker, by example."""
    response = f"So $\\boxed{{{answer[1:]}}}$." if answer[0] == "=" else answer
    assert rm.is_correct(response, gold) is verdict


def test_checker_on_random_strings():
    """Any two strings give a bool; an answer equals itself; the examples are not one-sided."""
    parts = [*"12 x,;()[]+-*/=<>%^_.!&A:e{}½²π∞٣\n\0\ud800", "or", "and", "####", "answer is", "E5"]
    parts += ["<think>", "</think>", "<answer>", "</answer>", "9" * 50, r"\boxed{", r"\frac"]
    parts += [r"\sqrt", r"\{", r"\}", r"\text{", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\"]
    generator = rm.rng(0, 0, "fuzz")
    for _ in range(4000):
        a, b = ("".join(generator.choice(parts, generator.integers(1, 12))) for _ in range(2))
        assert type(rm.is_correct(a, b)) is bool
        assert type(rm.is_correct(f"\\boxed{{{a}}}", b)) is bool
    for (_, gold, _), form in itertools.product(POLICY, ("X", " X ", "$X$", "{X}", "X.")):
        assert rm.is_correct("\\boxed{" + form.replace("X", gold) + "}", gold), (form, gold)
    assert 0.4 <= fmean(verdict for *_, verdict in POLICY) <= 0.6


def test_built_in_task():
    """The teacher is right, in the tiny model's words; the two sets share no sum in any order."""
    assert rm.demonstrate("47+85+36=?", True) == r"7+5+6=18;4+8+3+1=16;\boxed{168}"
    assert rm.demonstrate("47+85+36=?", False) == r"\boxed{168}"
    tokenizer = rm.make_model(0)[1]
    parts = rm.load_problems(rm.Config(eval_problems=500))
    for p in parts[0][:500] + parts[1]:
        text = rm.demonstrate(p["problem"], True)
        units, tens, boxed = text.split(";")
        assert rm.is_correct(boxed, p["answer"])
        for work in (units, tens):
            terms, _, total = work.partition("=")
            assert sum(map(int, terms.split("+"))) == int(total)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) < rm.Config().max_new_tokens and tokenizer.decode(ids) == text
    keys = [{tuple(sorted(re.findall(r"\d+", p["problem"]))) for p in part} for part in parts]
    assert len(keys[1]) > 450 and not keys[0] & keys[1]


def test_reading_problems(tmp_path, monkeypatch, capsys):
    """What holds an answer to check is found, with all columns, the rest is left out, aloud."""
    rows = [7, {"answer": "5"}, {"problem": ["q"], "answer": "5"}, {"problem": " ", "answer": "5"}]
    for answer in (["1", "2"], [], {"value": 3}, "}{", True, None):
        rows.append({"problem": "q", "answer": answer, "solution": "It follows."})
    expected = []
    for fields, answer in (
        ({"ANSWER": 5, "level": 1}, "5"),
        ({"answer": "so #### 1,200"}, "1,200"),
        ({"answer": "3", "final_answer": "4", "solution": r"\boxed{5}"}, "3"),
        ({"answer": "", "final_answer": "4"}, "4"),
        ({"answer": None, "solution": r"It is \boxed{5}, as $1 + 4 = 5$."}, "5"),
        ({"answer": [1, 2], "Solution": "so\n#### 5"}, "5"),
        ({"final_answer": [0.5]}, "0.5"),
        ({"answer": 10**400}, str(10**400)),
    ):
        problem = f"p{len(rows)}"
        rows += [{"Question": problem} | fields, {"problem": problem, "answer": "another"}]
        fields = {name.lower(): value for name, value in fields.items()}
        expected.append({"question": problem, "problem": problem} | fields | {"answer": answer})
    file = tmp_path / "rows.jsonl"
    assert rm.read_problems(json_lines(file, rows)) == expected
    said = capsys.readouterr().out
    for why in ("4 with no problem", "6 with no answer", "8 with a problem that was there"):
        assert said.startswith(f"{file}: ") and why in said
    file.write_text(json.dumps(rows), encoding="utf-8-sig")  # an array, after a byte-order mark
    assert rm.read_problems(file) == expected
    monkeypatch.setattr(rm, "reward_function", lambda text, row: 1)
    first = {"problem": "q", "answer": ["1", "2"], "solution": "It follows."}  # as the file has it
    assert rm.read_problems(file) == [first, *expected]
    # Single backslashes, one in three right; a copy but for white space; as PowerShell writes it.
    text = r"""{"problem": "Is \theta \\in \sin?\nequal: \"\times\"", "answer": "\frac{1}{2}"}
    {"problem": "Is \\theta  \\in \\sin? equal: \"\\times\"", "answer": "3"}"""
    file.write_bytes(text.encode("utf-16"))
    problem = 'Is \\theta \\in \\sin?\nequal: "\\times"'
    assert rm.read_problems(file) == [{"problem": problem, "answer": r"\frac{1}{2}"}]


def test_held_out_part(tmp_path):
    """A seeded tenth is held out and never trained on; --eval-data replaces it."""
    rows = [{"problem": f"p{i}", "answer": i} for i in range(50)]
    file = json_lines(tmp_path / "rows.jsonl", rows)
    split = [rm.load_problems(rm.Config(data=file, model="m", seed=s)) for s in (0, 0, 1)]
    assert split[0] == split[1] != split[2]
    copies = [{"problem": f" p{i}\n", "answer": i} for i in range(50)]
    files = {"data": file, "eval_data": json_lines(tmp_path / "copies", copies)}
    cfg = rm.Config(**files, model="m", eval_problems=7)
    for parts, n in ((split[0], 5), (rm.load_problems(cfg), 7)):
        train, held_out = ({p["problem"].strip() for p in part} for part in parts)
        assert (len(train), len(held_out)) == (50 - n, n) and not train & held_out
    assert not held_out <= {f"p{i}" for i in range(25)}  # not the first ones, as files are sorted
    cfg = rm.Config(eval_data=file, model="m", steps=0)
    assert [len(part) for part in rm.load_problems(cfg)] == [0, 50]


def test_settings_are_flags(capsys):
    """Config's fields are flags, --help has each preset's values; the user's own come last."""
    with pytest.raises(SystemExit):
        rm.main(["--help"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["--preset", *rm.PRESETS]
    for name in vars(rm.Config()):
        flag = "--" + name.replace("_", "-")
        (words,) = (line.split() for line in shown if line.split()[:1] == [flag])
        for preset, word in zip(rm.PRESETS, words[1:], strict=False):
            value = str(getattr(rm.parse_args(["--preset", preset]), name))
            if name not in ("model", "data", "prompt"):
                assert word.strip('"') == value or float(word) == float(value)
    assert rm.parse_args([]) == rm.parse_args(["--preset=toy"]) == rm.Config()
    words = ["--preset=toy", "--algo=grpo", "--lr=1e-3", "--raw-prompt", "--model=m"]
    settings = {"algo": "grpo", "lr": 1e-3, "raw_prompt": True, "model": "m"}
    assert rm.parse_args(words) == rm.Config(**settings)
    small = rm.parse_args(["--data=f", "--model=m", "--steps=7"])
    assert (small.data, small.model, small.steps, small.lr) == ("f", "m", 7, 1e-5)
    paper = rm.parse_args(["--updates=4", "--preset=r1-distill-1.5b"])
    assert (paper.beta, paper.updates, paper.prompt[-9:]) == (0.002, 4, r"\boxed{}.")
    may_be_zero = {"steps", "warmup", "half_life", "ref_reset", "distill_steps", "seed"}
    rm.Config(**dict.fromkeys(may_be_zero, 0))
    for name, default in vars(rm.Config()).items():
        if type(default) in (int, float):
            for value in [-1, math.nan, math.inf, *([] if name in may_be_zero else [0])]:
                with pytest.raises(rm.UserError, match=f"{name} {value}: too small, or not finite"):
                    rm.Config(**{name: value})
    mends = {"--algo=ppo": "choose from", "--prompt=x": "{problem}", "--b=3": "--b"}
    for flag, mend in mends.items():
        assert mend in refusal([flag], capsys)


def test_refusals(tmp_path, monkeypatch, capsys):
    """Files, models, folders, the GPU's memory: status 2, a line that names thing and mend."""
    monkeypatch.chdir(tmp_path)
    saved_model("good")
    shutil.copytree("good", "unreadable")
    Path("unreadable", "model.safetensors").write_bytes(b"xx")
    shutil.copytree("good", "untokenized")
    Path("untokenized", "tokenizer.json").unlink()
    Path("folder").mkdir()
    for name, content, words in (
        ("binary", b"\x80\xff\x00", "no JSON"),
        ("none", b"", "no row can be used: there is none"),
        ("line", b'{"problem": "a", "answer": "1"}\n\n{"problem":', "no JSON lines; line 3"),
        ("open", b'[{"problem": "a"}, 1]', "1 with no answer (or final_answer; 1 with no problem"),
        ("one", b'{"problem": "a", "answer": "1"}', "nothing is left to train on"),
    ):
        Path(name).write_bytes(content)
        error = refusal(["--model", "m", "--data", name], capsys)
        assert all(word in error for word in [name, *words.split("; ")]), error
    monkeypatch.setattr(rm, "load_problems", lambda cfg: ([{"problem": "1" * 60}], []))
    for argv, words in (
        ("--model folder --device cpu", "--model folder, --device cpu: cannot be used"),
        ("--model untokenized", "--model untokenized, --device"),
        ("--model unreadable", "--model unreadable, --device"),
        ("--preset toy --model good --max-new-tokens 200", "260 tokens, but the model reads 256"),
        ("--out none/x", "cannot be written"),
        ("--out folder", "--resume"),
        ("--resume folder", "--resume folder"),
    ):
        assert words in refusal(["--distill-steps=1", *argv.split()], capsys), argv
    assert not Path("runs").exists()
    failing(monkeypatch, rm, "load_model", torch.OutOfMemoryError("20 GiB"))
    assert "20 GiB" in refusal([], capsys)


# ---- Rollouts, runs, and that nothing is lost ----------------------------------------------------


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "GPT2", "Bloom", "Lfm2"])
def test_sampler_and_scorer_agree(kind, tmp_path, monkeypatch):
    """At each token, whatever a model brings along, and whoever is beside it. A seed repeats."""
    window = {"sliding_window": 4} if kind == "Mistral" else {}
    folder = saved_model(tmp_path / "m", kind, **window)
    habits = {"temperature": 0.1, "top_k": 5, "repetition_penalty": 1.5, "min_new_tokens": 7}
    habits |= {"do_sample": True, "eos_token_id": [*range(5, 60)]}
    transformers.GenerationConfig(**habits).save_pretrained(folder)
    cfg = rm.Config(model=folder, rows=6, max_new_tokens=15)
    model, tokenizer = rm.load_model(cfg)
    model.get_output_embeddings().weight.data.mul_(3)  # or all texts would be alike
    assert rm.end_tokens(model, tokenizer) == {1}  # ordinary words, as the model has it, are none
    ends = {1, *range(5, 60)}
    torch.manual_seed(0)
    prompts = [torch.randint(60, 400, (1 + 5 * i % 9,)) for i in range(9)]
    found = []  # log pi of the tokens that are drawn side by side
    multinomial = torch.multinomial

    def watched(pi, n, generator):
        tokens = multinomial(pi, n, generator=generator)
        found.append(pi.gather(1, tokens)[:, 0].log())
        return tokens

    monkeypatch.setattr(torch, "multinomial", watched)
    responses = rm.sample(model, prompts, ends, cfg, 0)
    batch = []
    for prompt, response in zip(prompts, responses, strict=True):
        batch.append({"prompt": prompt, "response": response})
        assert not {*response[:-1].tolist()} & ends
        assert len(response) == 15 or response[-1].item() in ends
    expected = []
    for together in (batch[:6], batch[6:]):
        q, v, mask = rm.score(model, together)
        for h in range(mask.shape[1]):
            expected.append((q - v)[mask[:, h], h].detach())  # whoever has ended is left out
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    again, other = (torch.cat(rm.sample(model, prompts, ends, cfg, seed)) for seed in (0, 1))
    assert torch.equal(again, torch.cat(responses)) and not torch.equal(other, again)


def test_chat_templates_and_tokenizers(tmp_path):
    """The chat template with one BOS, or what the tokenizer adds. Unknown signs are an error."""
    cfg = rm.Config(model=saved_model(tmp_path / "m", chat=True), prompt="Q: {problem} {x}")
    raw = dataclasses.replace(cfg, raw_prompt=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)

    def text(problem, cfg):
        (prompt,) = rm.encode_prompts(tokenizer, [{"problem": problem}], cfg)
        return tokenizer.decode(prompt)

    assert text("1 {+} 2?", cfg) == "<s><user>Q: 1 {+} 2? {x} A:"
    assert text("1?", raw) == "Q: 1? {x}"
    with pytest.raises(rm.UserError, match="only sums"):
        rm.encode_prompts(rm.make_model(0)[1], [{"problem": "1*2"}], rm.Config())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert text("1?", raw) == "<s>Q: 1? {x}"
    assert text("1?", cfg) == "<s><user>Q: 1? {x} A:"
    folder = saved_model(tmp_path / "turns", vocab_size=len(tokenizer) - 1)  # one that never occurs
    model, _ = rm.load_model(rm.Config(model=folder))
    assert rm.end_tokens(model, tokenizer) == {1}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <user>.{% endfor %}"
    assert rm.end_tokens(model, tokenizer) == {1, 2}  # EOS, and what the template ends a turn with
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert rm.end_tokens(model, tokenizer) == {1}
    with pytest.raises(rm.UserError, match="--raw-prompt.*roles must alternate"):
        text("1?", cfg)


@pytest.mark.parametrize("opening", ["", "<think>", "<think>\\n"])
def test_what_earns(opening, tmp_path, monkeypatch):
    """A complete answer, after </think> where the template or the model opened a thought."""
    cfg = rm.Config(model=saved_model(tmp_path / "m"))
    model, tokenizer = rm.load_model(cfg)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] + ' A: " + opening + "' }}"
    cases = [
        ("so 3</think>\\boxed{3}", "</s>", "right"),
        ("<think>so 3</think>\\boxed{3}", "</s>", "right"),
        ("<think>so 3</think>\\boxed{3}", "", "cut"),
        ("<think>so \\boxed{3}", "</s>", "no answer"),
        ("so \\boxed{3}</think>", "</s>", "no answer"),
        ("so \\boxed{3}", "</s>", "no answer" if opening else "right"),
        ("</think>\\boxed{4}", "</s>", "wrong"),
        ("", "</s>", "no answer"),
    ]
    ids = tokenizer([text + end for text, end, _ in cases], add_special_tokens=False)["input_ids"]
    responses = [torch.tensor(row) for row in ids]
    monkeypatch.setattr(rm, "sample", lambda *_: responses)
    problems = [{"problem": "1+2, <think>", "answer": "3"}] * len(cases)
    found = rm.rollout(model, tokenizer, problems, cfg, 0, "test")
    for t, (text, end, verdict) in zip(found, cases, strict=True):
        assert t["text"] == ("<think>" + text if opening else text)
        assert (t["verdict"], t["reward"]) == (verdict, verdict == "right")
        assert (t["ended"], t["length"]) == (end != "", len(t["response"]))
    assert rm.score(model, found)[2].sum(1).tolist() == [t["length"] for t in found]


def test_not_finite_stops_before_the_step(quick, capsys):
    """Weights that overflow, or that are nan from the start: one line."""
    cfg = quick(lr=1e30, algo="tbrm")
    assert "lower --lr" in refusal(flags(vars(cfg)), capsys)
    model, _ = rm.load_model(cfg)
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(rm.UserError, match="not finite"):
        rm.sample(model, [torch.tensor([1, 2])], {2}, cfg, 0)


@pytest.mark.parametrize("algo, rollouts", [("reval", 2), ("grpo", 2), ("grpo", 1)])
def test_schedule_and_reuse(algo, rollouts, quick, monkeypatch):
    """Update 1 is fresh, the rest are drawn: about K uses each. GRPO: all are fresh."""
    sizes = {"steps": 12, "updates": 4, "max_new_tokens": 4, "eval_every": 100}
    gradient = mock.Mock(wraps=rm.gradient)
    monkeypatch.setattr(rm, "gradient", gradient)
    rm.train(quick(algo=algo, rollouts=rollouts, prompts=8 // rollouts, seed=0, **sizes))
    uses = collections.Counter()
    for i, call in enumerate(gradient.call_args_list):
        batch, step = call.args[2], i // 4 + 1
        born = {t["step"] for t in batch}
        assert len(batch) == len({id(t) for t in batch}) == 8
        assert born <= {step - 2, step - 1, step}
        if i % 4 == 0 or algo == "grpo":
            assert born == {step}
        elif step > 1:
            assert born != {step}
        uses.update(id(t) for t in batch if 3 <= t["step"] <= 9)  # born in a full buffer, and gone
    assert fmean(uses.values()) == pytest.approx(4, abs=0.6)
    assert (set(uses.values()) == {4}) == (algo == "grpo")


def test_reference_reset_refreshes_the_cache(quick, rewarded, monkeypatch):
    """After a reset the cached values of the whole buffer are those of the live model."""
    cached = mock.Mock(wraps=rm.cache_values)
    monkeypatch.setattr(rm, "cache_values", cached)
    rm.train(quick(steps=4, ref_reset=4, lr=1e-3, max_new_tokens=12))
    model, batch, *_ = cached.call_args.args
    assert [t["step"] for t in batch] == [2] * 16 + [3] * 16 + [4] * 16
    q, v, mask = rm.score(model, batch)
    assert torch.allclose(torch.cat([t["q_ref"] for t in batch]), q[mask], atol=1e-4)
    assert torch.allclose(torch.cat([t["v_ref"] for t in batch]), v[mask], atol=1e-4)
    old, _ = rm.load_model(quick())
    assert (rm.score(old, batch)[0] - q).abs().max() > 0.01


SUMS = [{"problem": f"What is {i} + 1?", "answer": i + 1} for i in range(20)]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("device, dtype", [("cpu", "float32"), ("cuda", "bfloat16")])
def test_real_models_train_from_disk(kind, device, dtype, rewarded, monkeypatch, tmp_path):
    """Other architectures, a real tokenizer, a data file; and the 1.5B run's settings, in small."""
    as_on_a_gpu(monkeypatch)
    folder = saved_model(tmp_path / "m", kind, chat=kind == "Qwen2")
    transformers.GenerationConfig(eos_token_id=[1, 5, 6]).save_pretrained(folder)
    out = tmp_path / "out"
    words = f"--preset r1-distill-1.5b --device {device} --dtype {dtype} --steps 2 --prompts 2"
    words += " --rollouts 2 --lr 1e-3 --max-new-tokens 12 --eval-problems 2 --eval-samples 4"
    files = {"model": folder, "data": json_lines(tmp_path / "p.jsonl", SUMS[:2]), "out": out}
    assert rm.main([*words.split(), *flags(files)]) == 0
    rows = rows_of(out)
    assert rows[1]["residual"] == pytest.approx(500 * math.sqrt(1 / 2), rel=1e-3)  # reward / beta
    assert len(rows) == 3 and len(rows_of(out, "eval-00002.jsonl")) == 4
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert {master.dtype for master in state["masters"]} == {torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.dtype == getattr(torch, dtype)
    assert model.generation_config.eos_token_id == [1, 5, 6]
    old = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    assert not torch.equal(old.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kind, noise", [("Qwen2", "attention_dropout"), ("Mixtral", "jitter")])
def test_checkpointing_and_noise_change_nothing(kind, noise, tmp_path, monkeypatch):
    """Activations made twice give the same gradient, of a copy too; train mode's noise is off."""
    as_on_a_gpu(monkeypatch)
    experts = {"num_local_experts": 4, "router_jitter_noise": 0.5}
    changes = experts if noise == "jitter" else {noise: 0.5}
    folder = saved_model(tmp_path / "m", kind, **changes)
    found = []
    for device, times in (("cpu", 1), ("cuda", 2)):
        cfg = rm.Config(model=folder, device=device)
        model = copy.deepcopy(rm.load_model(cfg)[0].bfloat16().float())
        forward = mock.Mock(return_value=None)
        model.model.layers[0].mlp.register_forward_pre_hook(forward)
        rm.gradient(model, list(model.parameters()), trajectories(), cfg)
        assert forward.call_count == times
        found.append(flat_grad(model.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite", "Phi", "Rwkv"])
def test_models_that_do_not_fit_are_refused(kind, tmp_path):
    """Soft caps, scales, biases after hidden @ lm_head.T, and models without a cache."""
    scales = {"logit_scale": 0.1, "logits_scaling": 8}  # each is known to one of them
    folder = saved_model(tmp_path / "m", kind, initializer_range=1.0, **scales)
    cause = "not hidden @ lm_head"
    if kind == "Phi":  # its bias is 0 at first
        file = f"{folder}/model.safetensors"
        weights = safetensors.torch.load_file(file)
        weights["lm_head.bias"] += 1
        safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    if kind == "Rwkv":
        file, cause = Path(folder, "config.json"), "no cache"
        file.write_text(file.read_text().replace("num_attention_heads", "none"))
    with pytest.raises(rm.UserError, match=cause):
        rm.load_model(rm.Config(model=folder))


def test_weights_that_are_missing_are_refused(tmp_path):
    """A head or a layer that the file lacks, or all by other names, would be made at random."""
    folder = saved_model(tmp_path / "m", tie_word_embeddings=False)
    file = f"{folder}/model.safetensors"
    weights = safetensors.torch.load_file(file)
    for old, new in (("lm_head", "head"), ("layers.1", "layer.1"), ("model.", "_orig_mod.model.")):
        renamed = {name.replace(old, new): weight for name, weight in weights.items()}
        safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})
        with pytest.raises(rm.UserError, match=f"its weights lack .*{old}"):
            rm.load_model(rm.Config(model=folder))


def test_the_longest_text():
    """Where rotations depend on the longest text of the batch, the limit is the original one."""
    model, tokenizer = rm.make_model(0)
    problems = [{"problem": "1"}, {"problem": "123"}]
    for name, limit in (("max_position_embeddings", 99), ("original_max_position_embeddings", 30)):
        setattr(model.config, name, limit)
        rm.check_prompts(model, tokenizer, problems, rm.Config(max_new_tokens=limit - 4))
        with pytest.raises(rm.UserError, match=f"{limit + 1} tokens, but the model reads {limit};"):
            rm.check_prompts(model, tokenizer, problems, rm.Config(max_new_tokens=limit - 3))


def test_evaluation_figures(tmp_path, monkeypatch, capsys):
    """avg@n, its standard error and the verdicts by hand; each pass is kept at once."""
    problems = [{"problem": name, "answer": "5", "text": "5"} for name in "abcd"]
    verdicts = {0: "cut", 0.5: "no answer", 1: "right"}
    passes = []
    for rewards in ([0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0.5, 1], [1, 1, 0, 1]):
        pairs = zip(problems, rewards, strict=True)
        passes.append([p | {"reward": r, "verdict": verdicts[r]} for p, r in pairs])
    rollout = mock.Mock()
    monkeypatch.setattr(rm, "rollout", rollout)
    cfg = rm.Config(eval_samples=4, out=str(tmp_path))
    rollout.side_effect = [*passes[:2], KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        rm.evaluate(None, None, problems, cfg, 0)
    assert rows_of(tmp_path, "eval-00000.jsonl") == sum(passes[:2], [])
    rollout.side_effect = passes
    found = rm.evaluate(None, None, problems, cfg, 0)
    assert found["accuracy"] == pytest.approx(7.5 / 16)
    variance = fmean((x / 16 - 7.5 / 16) ** 2 for x in (4, 8, 2, 16))
    assert found["stderr"] == pytest.approx(math.sqrt(4 * variance + 1 / 4) / 5)
    assert len({call.args[-1] for call in rollout.call_args_list[3:]}) == 4  # other random numbers
    shown = "  right 7, wrong 0, no answer 1, cut 8\n  1: 'd' -> '5' (gold 5)\n  0: 'a' -> "
    assert shown in capsys.readouterr().out


def test_progress(monkeypatch, capsys):
    """On a terminal a line that is cleared, else one a minute. A block a step, or some 60."""
    rows = [{"reward": i / 8} for i in range(8)]
    assert rm.sparkline(rows, "reward") == "▁▂▃▄▅▆▇█" and rm.sparkline(rows[:1], "reward") == "▁"
    assert 50 <= len(rm.sparkline(rows * 100, "reward")) <= 61
    clock = itertools.count(step=7)
    monkeypatch.setattr(rm.time, "time", lambda: next(clock))

    def watched():
        for step in rm.progress(range(30), "step"):
            for token in rm.progress(range(9), "token"):
                if token == 4 and step == 2:
                    return

    watched()
    lines = capsys.readouterr().err.splitlines()
    assert not rm.LOOPS and lines and all(line.startswith("step ") for line in lines)
    assert re.fullmatch(r"step 2/30 until \w+ +\d+ \d\d:\d\d", lines[-1].strip())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    watched()
    shown = capsys.readouterr().err.split("\r")
    assert shown[0].strip() == "step 0/30" and shown[1].strip() == "step 0/30, token 0/9"
    assert re.match(r"step 1/30 until .*, token 8/9 ", shown[20])
    assert shown[-1] == "" and not shown[-2].strip() and {len(line) for line in shown[:-1]} == {79}


def test_a_reward_of_ones_own(start, tmp_path, monkeypatch):
    """Any function of text and row, with the file's columns, also between 0 and 1; no answer."""
    monkeypatch.setattr(rm, "reward_function", lambda text, row: len(text) / row["scale"])
    file = json_lines(tmp_path / "p", [{"problem": f"{i}+1=?", "SCALE": 64} for i in range(10, 50)])
    words = ["--preset=toy", "--steps=2", "--prompts=4", "--rollouts=2", "--updates=2"]
    files = {"model": start / "model", "data": file, "out": tmp_path / "out"}
    assert rm.main([*words, *flags(files)]) == 0
    answers = rows_of(tmp_path / "out", "eval-00002.jsonl")
    assert all(t["reward"] == t["ended"] * len(t["text"]) / 64 for t in answers)
    assert 0 < rows_of(tmp_path / "out")[1]["reward"] < 1 and len(answers) == 4


def test_it_learns_to_show_its_work(quick, monkeypatch):
    """If written work is what earns, it becomes the rule, in evaluations too."""
    monkeypatch.setattr(rm, "is_correct", lambda response, gold: ";" in response)
    sizes = {"steps": 6, "prompts": 8, "rollouts": 8, "updates": 4, "eval_problems": 64}
    cfg = quick(**sizes, eval_every=6, lr=5e-4, half_life=0)
    result = rm.train(cfg)
    rows = rows_of(cfg.out)
    assert result["accuracy"] > rows[0]["accuracy"] + 0.25
    assert rows[-1]["reward"] > rows[1]["reward"] + 0.25
    assert rows[-1]["length"] > rows[1]["length"] + 1


def content(folder):
    """The files in and under a folder."""
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def results(out):
    """What two runs of one seed share: rows but for the seconds, evaluations, the model."""
    files = content(out)
    for name in ("config.json", "checkpoint.pt", "metrics.jsonl"):
        del files[name]
    return [row | {"seconds": 0} for row in rows_of(out)], files


MADE = {}  # undisturbed runs that several tests compare with: settings to folder
PLAIN = {"steps": 4, "updates": 2, "eval_every": 3, "eval_problems": 16, "max_new_tokens": 8}
PLAIN |= {"algo": "reval"}
RESUMED = [{}, {"ref_reset": 2}, {"algo": "grpo"}, {"algo": "tbrm", "dtype": "bfloat16"}]


@pytest.fixture
def calm(quick, rewarded):
    """A run of the command line that nothing disturbs, made once. -> its folder."""

    def make(**changes):
        key = repr(changes)
        if key not in MADE:
            cfg = quick(**changes)
            assert rm.main(flags(vars(cfg))) == 0
            assert rows_of(cfg.out)[-1]["grad_norm"] > 1e-3  # there is something to compare
            MADE[key] = cfg.out
        return MADE[key]

    return make


@pytest.mark.parametrize("algo", ["reval", "grpo"])
def test_a_run_leaves_its_record(algo, calm, quick, capsys):
    """Files and keys. A seed makes the same run to the bit, though one evaluates at each step."""
    plain = PLAIN | {"algo": algo}
    out = Path(calm(**plain))
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "model"}
    names |= {"eval-00000.jsonl", "eval-00003.jsonl", "eval-00004.jsonl"}
    assert {file.name for file in out.iterdir()} == names
    assert rm.Config(**rows_of(out, "config.json")[0]) == quick(**plain, out=str(out))
    rows, files = results(out)
    figures = {"accuracy", "stderr", "step", "rollouts", "seconds"}
    keys = {"step", "rollouts", "reward", "loss", "kl", "grad_norm", "length", "ended", "seconds"}
    if algo == "reval":
        keys.add("residual")
    assert set(rows[0]) == figures
    assert set(rows[2]) == keys and set(rows[3]) == set(rows[4]) == keys | figures
    looked = quick(**plain | {"eval_every": 1})
    assert rm.main(flags(vars(looked))) == 0
    assert f"\naccuracy: {rows[4]['accuracy']:.4g}\n" in capsys.readouterr().out
    other_rows, other_files = results(looked.out)
    for row, other in zip(rows, other_rows, strict=True):
        assert row.items() <= other.items()
    assert files.items() <= other_files.items()


def test_the_commands_of_the_documents():
    """Each command of the docstring and of README.md is one that is understood."""
    for text in (rm.__doc__, (HERE / "README.md").read_text(encoding="utf-8")):
        found = 0
        for line in re.sub(r"\\\n *", " ", text).splitlines():
            for tail in line.split("python reval_min.py")[1:]:
                words = shlex.split(re.split(r"   |`| # |&&| \| |;", tail)[0])
                found += 1
                if not {"--resume", "--help"} & {*words}:  # --resume reads a run's settings
                    rm.parse_args(words)
        assert found > 3


@pytest.mark.parametrize("changes", RESUMED)
def test_resume_is_exact(changes, calm, quick, monkeypatch, capsys):
    """Ctrl-C ends a run in a line that says how to go on: then it is the run that never stopped."""
    whole = calm(**PLAIN | changes)
    cfg = quick(**PLAIN | changes, save_every=2)
    with monkeypatch.context() as patch:
        # In the middle of the fourth iteration, after a save at the second.
        failing(patch, rm, "update", KeyboardInterrupt(), at=8)
        assert rm.main(flags(vars(cfg))) == 130
    error = capsys.readouterr().err
    assert error.startswith("reval_min: ") and error.endswith(f" --resume {cfg.out}\n")
    assert error.count("\n") == 1 and len(rows_of(cfg.out)) == 4
    assert rm.main(["--resume", cfg.out]) == 0
    assert results(whole) == results(cfg.out)


def test_resume_with_other_settings(calm, tmp_path):
    """Another folder, rate and more steps may be given; the run that goes on stays as it was."""
    whole, other = calm(**PLAIN), str(tmp_path / "other")
    kept = content(whole)
    assert rm.main(["--resume", whole, "--steps=5", "--out", other, "--lr=1e-3"]) == 0
    assert content(whole) == kept
    assert results(other)[0][:5] == results(whole)[0] and len(rows_of(other)) == 6
    (settings,) = rows_of(other, "config.json")
    assert (settings["lr"], settings["steps"], settings["out"]) == (1e-3, 5, other)
    assert settings["eval_every"] == 3  # the run's own, not the default


def test_a_kill(tmp_path):
    """The script in an empty folder goes on after SIGKILL, to the bit. TBRM needs no reward."""
    argv = "--algo=tbrm --steps=16 --distill-steps=3 --prompts=2 --rollouts=2 --max-new-tokens=8"
    argv = [*argv.split(), "--eval-problems=2", "--save-every=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path}
    with subprocess.Popen([sys.executable, HERE / "reval_min.py", *argv], **pipes) as process:
        for line in process.stdout:
            if line.split()[:1] == [b"5"]:
                break
        time.sleep(0.05 * random.random())
        process.kill()
        assert b"Traceback" not in process.stderr.read()
    (shaken,) = map(str, (tmp_path / "runs").iterdir())
    assert 5 < len(rows_of(shaken)) < 17
    calm = str(tmp_path / "calm")
    assert rm.main([*argv, "--out", calm]) == rm.main(["--resume", shaken]) == 0
    assert results(shaken) == results(calm)


# config.json; the evaluation, metrics and checkpoint of step 0; those of step 1; the model.
WRITES = [(Path, "replace", at, at > 4) for at in range(1, 8)]
WRITES += [(Path, "write_text", at, at > 3) for at in range(1, 6)]
WRITES += [(torch, "save", 1, False), (torch, "save", 2, True)]
WRITES += [(transformers.PreTrainedModel, "save_pretrained", 1, True)]
WRITES += [(transformers.PreTrainedTokenizerFast, "save_pretrained", 1, True)]


@pytest.mark.parametrize("where, name, at, goes_on", WRITES)
def test_every_write_may_fail(where, name, at, goes_on, calm, quick, monkeypatch, capsys):
    """A full disk at any write: one line, nothing half-written, and an exact way to go on."""
    sizes = PLAIN | {"steps": 1, "updates": 1, "eval_problems": 2}
    whole = calm(**sizes)
    cfg = quick(**sizes)
    with monkeypatch.context() as patch:
        failing(patch, where, name, OSError(28, "No space left"), at)
        assert "No space left" in refusal(flags(vars(cfg)), capsys)
    assert not list(Path(cfg.out).glob("*.part"))
    assert Path(cfg.out, "checkpoint.pt").exists() == goes_on
    if goes_on:
        assert rm.main(["--resume", cfg.out]) == 0
        assert results(whole) == results(cfg.out)


def test_broken_checkpoints_are_refused(calm, tmp_path, capsys):
    """Truncated, foreign or hostile: one line, the run stays as it was, nothing is executed."""
    out = str(shutil.copytree(calm(**PLAIN), tmp_path / "out"))
    kept = content(out)
    for change in ("--algo=grpo", f"--seed={SEED + 1}"):
        assert "changed" in refusal(["--resume", out, "--steps=5", change], capsys)
    with mock.patch.object(rm, "reward_function", len):
        assert "changed" in refusal(["--resume", out, "--steps=5"], capsys)
    assert content(out) == kept

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    state = torch.load(file := Path(out, "checkpoint.pt"), weights_only=True)
    broken = [Hostile(), [1], state | {"optimizer": {}}, state | {"masters": state["masters"][1:]}]
    broken.append({key: state[key] for key in state if key != "history"})
    for made in (b"", kept["checkpoint.pt"][:-999], b"hello", *broken):
        if isinstance(made, bytes):
            file.write_bytes(made)
        else:
            torch.save(made, file)
        changed = content(out)
        assert "checkpoint.pt" in refusal(["--resume", out, "--steps=5"], capsys)
        assert content(out) == changed
    assert not (tmp_path / "executed").exists()
    Path(out, "config.json").write_text("7", encoding="utf-8")
    for folder in (out, str(tmp_path / "none")):
        assert "no run of this version" in refusal(["--resume", folder], capsys)


# ---- Evidence: the studies -----------------------------------------------------------------------


def in_processes(function, calls, jobs=1):
    """function(*call) for each call, in order, some jobs at a time in new processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        return list(pool.map(function, *zip(*calls, strict=True)))


def warm_start(out, seed=0, steps=1600):
    """The tiny model after its warm start, in out/model, unless it is there already."""
    folder = f"{out}/model"
    if not Path(folder, "tokenizer.json").exists():
        cfg = rm.Config(seed=seed, distill_steps=steps)
        model, tokenizer = rm.load_model(cfg)
        rm.distill(model, tokenizer, cfg)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def text_of(value):
    """A number; or of a list of them, one a seed, mean +- standard deviation."""
    if isinstance(value, list):
        return f"{fmean(value):.3f}" + (f" +- {stdev(value):.3f}" if len(value) > 1 else "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_table(rows):
    """Rows, as {column: value}, in markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(text_of, row.values())) + " |")


def centered(trajectories, cfg, plain=rm.add_signals):
    """add_signals: the reward less the mean of its group."""
    plain(trajectories, cfg)
    for i in range(0, len(trajectories), cfg.rollouts):
        group = trajectories[i : i + cfg.rollouts]
        mean = fmean(t["reward"] for t in group)
        for t in group:
            t["signal"] = t["signal"] - mean


def from_a_log(run, tokenizer, problems, cfg, step):
    """collect: samples nothing; all data are what the log's run of this seed left."""
    if step == 1:
        log = (REAL_LOG if cfg.data else LOG).replace(" ", ",")
        file = Path(cfg.out).parent / f"{log},seed={cfg.seed}/log.pt"
        run.buffer.items = torch.load(file, weights_only=True)
        rm.add_signals(run.buffer.items, cfg)
        rm.cache_values(run.reference, run.buffer.items, cfg, "ref")
    drawn = run.buffer.sample(len(problems), rm.rng(cfg.seed, step, "log"))
    if cfg.algo == "grpo":
        rm.cache_values(run.model, drawn, cfg, "old")
    return drawn


def late(run, fresh, cfg, step, delay, now, plain=rm.learn):
    """learn: a batch arrives delay iterations after it was sampled. The reward that a step logs is
    what the actors earn now. GRPO's ratio is to the policy that sampled, or to that of now."""
    run.sent = [*getattr(run, "sent", []), fresh]
    arrived = run.sent[: max(0, step - delay)]
    if not arrived:
        return {}
    run.buffer.items = sum(arrived[-cfg.buffer :], [])
    if now:
        rm.cache_values(run.model, arrived[-1], cfg, "old")
    return plain(run, arrived[-1], cfg, step - delay)


# A variant is written as on the command line, without the dashes; these words in it put a function
# of the above in the place of one of reval_min.
CHANGES = {
    "centered": ("add_signals", centered),
    "log": ("collect", from_a_log),
}
# By method and updates K: the best of a sweep by factors of 2 on seeds 100 and 101.
LR = {"reval": {1: 1e-3, 2: 5e-4, 4: 3e-4, 8: 1.5e-4}, "tbrm": {8: 7.5e-5}}
LR["grpo"] = {1: 1e-3, 2: 5e-4, 4: 3e-4, 8: 2e-4}
REVAL, REVAL_1 = "algo=reval updates=8", "algo=reval updates=1 buffer=1"
GRPO, GRPO_1 = "algo=grpo updates=8", "algo=grpo updates=1"
TBRM, LOG = "algo=tbrm updates=8", f"{REVAL} buffer=30 lr=0.00015"
REAL_LOG = "algo=reval buffer=10 lr=2e-05"
ON_REAL = [REAL_LOG, "algo=grpo lr=2e-05", "algo=grpo prompts=32 rollouts=1 lr=2e-05"]
STUDIES = {
    "replay": [f"algo=reval updates={k}" for k in (8, 4, 2)]
    + [f"algo=reval updates={k} buffer=1" for k in (8, 4, 2, 1)]
    + [f"algo=grpo updates={k}" for k in (8, 4, 2, 1)],
    "calibration": [REVAL, TBRM],
    "reward": [REVAL, f"{REVAL} centered"],
    "one-rollout": [f"{x} prompts=128 rollouts=1" for x in (REVAL, GRPO)],
    "off-policy": [LOG, f"{REVAL} buffer=30 log", f"{GRPO} buffer=30 log"]
    + [f"{GRPO} buffer=30 log prompts=128 rollouts=1"],
    "real": ON_REAL,
    "real-log": [REAL_LOG, *(f"{x} log" for x in ON_REAL)],
    "real-late": [f"{x} steps=14 stale4" for x in ON_REAL[:2]]
    + [f"{ON_REAL[2]} steps=14 stale4-now"],
}
for n in (0, 4, 16, 48, 96):
    CHANGES[f"stale{n}"] = ("learn", functools.partial(late, delay=n, now=False))
    CHANGES[f"stale{n}-now"] = ("learn", functools.partial(late, delay=n, now=True))
# 16 responses an iteration arrive n iterations late; 80 iterations learn, at a method's best rate.
METHODS = [("reval", 4, 4, ""), ("grpo", 1, 4, ""), ("grpo", 1, 16, ""), ("grpo", 4, 16, "-now")]
RATES = {0: [1.5e-4, 3e-4, 3e-4, 3e-4], 16: [3e-4, 3e-4, 3e-4, 3e-4]}
RATES[48] = RATES[96] = [3e-4, 3e-4, 3e-4, 1.5e-4]
for n, rates in RATES.items():
    common = f"buffer=40 warmup=7 half-life=40 steps={80 + n} stale{n}"
    STUDIES[f"stale{n}"] = [
        f"algo={algo} updates={k} prompts={prompts} rollouts={16 // prompts} {common}{now} lr={lr}"
        for (algo, k, prompts, now), lr in zip(METHODS, rates, strict=True)
    ]
TOY = shlex.split("--preset=toy --steps=30 --rollouts=8 --buffer=15 --half-life=15")
# The first 320 responses of README's example, with the model and the problems that it has made.
REAL = shlex.split(
    "--preset=small --model=smollm2 --data=larger.jsonl --steps=10 --rollouts=4 --raw-prompt "
    "--dtype=bfloat16 --max-new-tokens=32 --prompt='Which is larger, 12 or 7?\n#### 12<|im_end|>\n"
    "Which is larger, 35 or 81?\n#### 81<|im_end|>\n{problem}\n'"
)


def config_of(variant, *words):
    """The Config of a variant, after other words of the command line."""
    flags = [f"--{word}" for word in variant.split() if word not in CHANGES]
    return rm.parse_args([*words, *flags])


def cell(args, variant, factor, seed):
    """The Config of one run of a study, in a folder named after it, as studies share their runs."""
    if args.name.startswith("real"):
        cfg = config_of(variant, *REAL, f"--seed={seed}")
        lr = factor * cfg.lr
    else:
        start = f"--model={args.out}/start{seed}/model"
        cfg = config_of(variant, *TOY, start, f"--seed={seed}")
        lr = factor * (cfg.lr if "lr=" in variant else LR[cfg.algo][cfg.updates])
    words = [word for word in variant.split() if not word.startswith("lr=")]
    out = f"{args.out}/{','.join(words)},lr={lr:g},seed={seed}"
    return dataclasses.replace(cfg, lr=lr, out=out, eval_every=1000, save_every=1000)


def run_cell(cfg, variant):
    """Trains, unless that very run is there already."""
    config, end = Path(cfg.out, "config.json"), Path(cfg.out, "cpu_seconds")
    if end.exists() and json.loads(config.read_text()) == dataclasses.asdict(cfg):
        return
    shutil.rmtree(cfg.out, ignore_errors=True)  # of other settings, or broken off
    begin = time.process_time()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        for word in CHANGES.keys() & variant.split():
            patch.setattr(rm, *CHANGES[word])
        rm.train(cfg)
    if variant in (LOG, REAL_LOG):
        state = torch.load(f"{cfg.out}/checkpoint.pt", "cpu", weights_only=True, mmap=True)
        torch.save(state["buffer"], f"{cfg.out}/log.pt")
    for file in Path(cfg.out).rglob("*"):
        if file.stat().st_size > 1e8:
            file.unlink()  # the checkpoint and the weights of a real model
    end.write_text(str(time.process_time() - begin))


def study(args):
    """Every variant of a study from the same warm starts, at equal rollouts."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.name == "one-prompt":
        return one_prompt(args, seeds)
    if not args.name.startswith("real"):
        in_processes(warm_start, [(f"{args.out}/start{seed}", seed) for seed in seeds], args.jobs)
    groups = []  # the runs of a row of the table, one a seed
    for variant, factor in itertools.product(args.only or STUDIES[args.name], args.lr_factors):
        groups.append([(cell(args, variant, factor, seed), variant) for seed in seeds])
    in_processes(run_cell, groups[0], args.jobs)  # others may need them
    in_processes(run_cell, sum(groups[1:], []), args.jobs)
    table = []
    curves = []
    for group in groups:
        runs = [rows_of(cfg.out) for cfg, _ in group]
        rewards = [[row["reward"] for row in run[1:]] for run in runs]
        row = {"variant": Path(group[0][0].out).name.replace(",", " ").rpartition(" ")[0]}
        row["end"] = [run[-1]["accuracy"] for run in runs]
        row["mean reward"] = [fmean(run) for run in rewards]
        table.append(row)
        pairs = zip(row["mean reward"], table[0]["mean reward"], strict=True)  # of one start
        row["less the first's"] = [a - b for a, b in pairs]
        row["KL"] = [run[-1]["kl"] for run in runs]
        row["cpu s"] = [float(Path(cfg.out, "cpu_seconds").read_text()) for cfg, _ in group]
        curves.append([round(fmean(x), 2) for x in zip(*rewards, strict=True)])
    print_table(table)
    print(f'```mermaid\nxychart-beta\n    x-axis "iteration" 1 --> {len(curves[0])}')
    print('    y-axis "reward, mean of the seeds" 0 --> 1')
    print("\n".join(f"    line {curve}" for curve in curves) + "\n```")


DIFFICULTIES = {"hard": 0.10, "medium": 0.40, "easy": 0.68}  # base success, as in the paper
ROUNDS = 60  # at most


def success(model, tokenizer, problems, n, seed, step):
    """The share of right answers among n to each problem."""
    asked = [p for p in problems for _ in range(n)]
    cfg = rm.Config(seed=seed)
    rewards = [t["reward"] for t in rm.rollout(model, tokenizer, asked, cfg, step, f"{n} answers")]
    return [fmean(rewards[i : i + n]) for i in range(0, len(rewards), n)]


def solve(start, variant, problem, seed):
    """Trains on one problem until 0.95 of 64 fresh answers are right. -> rounds, at most ROUNDS"""
    result = Path(start, f"{variant} {problem['problem']} {seed}".replace(" ", ","))
    if result.exists():
        return json.loads(result.read_text())
    words = [*TOY, f"--model={start}/model", f"--seed={seed}"]
    cfg = config_of(f"prompts=1 warmup=2 half-life=0 {variant}", *words)
    model, tokenizer = rm.load_model(cfg)
    run = rm.Run(cfg, model, [])
    for step in range(1, ROUNDS + 1):
        asked = [problem] * cfg.prompts * cfg.rollouts
        fresh = rm.collect(run, tokenizer, asked, cfg, step)
        rm.learn(run, fresh, cfg, step)
        if success(model, tokenizer, [problem], 64, seed, step)[0] >= 0.95:
            break
    result.write_text(json.dumps(step))
    return step


def one_prompt(args, seeds):
    """The paper's Figures 2 and 3: rounds of 8 responses until a problem is solved, for three of
    each difficulty. The start has more written work, or none were easy."""
    start = f"{args.out}/one-prompt-start"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "WRITTEN_SHARE", 0.4)
        warm_start(start)
    model, tokenizer = rm.load_model(rm.Config(model=f"{start}/model"))
    problems = rm.load_problems(rm.Config())[0][:300]
    shares = success(model, tokenizer, problems, 128, 0, 0)
    chosen = []
    for level in DIFFICULTIES.values():
        nearest = sorted((abs(share - level), i) for i, share in enumerate(shares))[:3]
        chosen += [problems[i] for _, i in nearest]
    cases = list(itertools.product(chosen, seeds))
    table = []
    methods = args.only or [GRPO_1, GRPO, f"{GRPO} prompts=8 rollouts=1", REVAL_1, REVAL]
    for method, factor in itertools.product(methods, args.lr_factors):
        variant = f"{method} lr={factor * 3e-4:g}"
        rounds = in_processes(solve, [(start, variant, *case) for case in cases], args.jobs)
        row = {"variant": variant, f"{ROUNDS} rounds": rounds.count(ROUNDS)}
        for i, name in enumerate(DIFFICULTIES):
            row[name] = rounds[i * len(cases) // 3 : (i + 1) * len(cases) // 3]
        table.append(row)
    for row, i in itertools.product(table, range(len(table[:2]))):
        ratios = [fmean(table[i][name]) / fmean(row[name]) for name in DIFFICULTIES]
        row[f"fewer than in row {i + 1}"] = ", ".join(f"{ratio:.1f}x" for ratio in ratios)
    print_table(table)


# ---- Evidence: the trainer of the README ---------------------------------------------------------

TRL = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
TRL |= {"max_completion_length": 12, "max_steps": 4, "learning_rate": 3e-2, "max_grad_norm": 0}
TRL |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def compare_trl(args):
    """README's trainer: each gradient is that of `gradient` on the responses of all ranks."""
    import trl
    from accelerate.utils import gather_object

    plain = trl.GRPOConfig
    trl.GRPOConfig = lambda out, **settings: plain(out, **(settings | TRL))
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)
    (code,) = (block.replace("trainer.train()", "") for block in blocks if "trl" in block)
    names = {}
    os.chdir(args.out)
    exec(code.replace("MODEL", "model"), names)  # all of it but the last line
    cut = [1] * names["LONGEST"]
    assert names["reward"](["#### 5"] * 3, ["5", "5", "6"], [[1], cut, [1]]) == [1, 0, 0]
    trainer = names["trainer"]
    cfg = rm.Config(model="model", beta=trainer.beta)
    reference, _ = rm.load_model(cfg)
    model = copy.deepcopy(reference)

    def paid_later(completions, trainer_state, **_):
        paid = trainer_state.global_step > 0
        return [float(paid and i % 4 == 0) for i in range(len(completions))]

    class Compare(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, _, trainer_state, *__, **___):
            batch = []
            for part in trainer._buffered_inputs:
                for i, signal in enumerate(part["advantages"]):
                    t = {"signal": signal}
                    t["prompt"] = part["prompt_ids"][i][part["prompt_mask"][i].bool()]
                    t["response"] = part["completion_ids"][i][part["completion_mask"][i].bool()]
                    batch.append(t)
            batch = gather_object(batch)
            model.load_state_dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
            rm.cache_values(reference, batch, cfg, "ref")
            row = rm.gradient(model, list(model.parameters()), batch, cfg)
            norm = row["grad_norm"]
            expected = flat_grad(model.parameters()) * max(1, norm)
            off = (flat_grad(trainer.model.parameters()) - expected).norm().item()
            signals = {t["signal"].item() for t in batch}
            if trainer_state.global_step < 2:
                assert signals == {0} and max(off, norm, row["residual"]) < 1e-5
            else:  # groups of 4, less their means
                assert signals == {-0.25, 0.75} and norm > 0.1 and off < 1e-4 * norm
            assert len(batch) == 8 * trainer.accelerator.num_processes

    trainer.reward_funcs[0] = paid_later
    trainer.add_callback(Compare())
    trainer.train()
    assert trainer.state.global_step == 4
    Path(f"rank{trainer.accelerator.process_index}").touch()
    trainer.accelerator.wait_for_everyone()  # torch's threads may abort a rank that ends


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_of_the_readme(ranks, tmp_path):
    """Its gradient, after updates too, is that of `gradient`; without reward it is 0."""
    pytest.importorskip("trl")
    saved_model(tmp_path / "model", "Qwen2")
    transformers.GenerationConfig(eos_token_id=[*range(1, 40)]).save_pretrained(tmp_path / "model")
    json_lines(tmp_path / "problems.jsonl", SUMS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), __file__, "trl", "--out", tmp_path]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # or a thread of trl's reports its use
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert len(list(tmp_path.glob("rank*"))) == ranks, done.stderr


def test_late_batches():
    """Nothing is learnt until a batch has arrived; the buffer holds the newest that have."""
    run, plain = mock.Mock(sent=[]), mock.Mock()
    for step in (1, 2, 3, 4, 5):
        late(run, [step], rm.Config(buffer=2), step, 2, False, plain)
    assert [call.args[1::2] for call in plain.call_args_list] == [([1], 1), ([2], 2), ([3], 3)]
    assert run.buffer.items == [2, 3]


def test_studies_run(tmp_path, monkeypatch, capsys):
    """A study prints a row for each variant; called again it takes its runs from the disk."""
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "in_processes", lambda f, calls, jobs: [f(*call) for call in calls])
    problem = {"problem": "56+34+12=?", "answer": "102"}
    monkeypatch.setattr(rm, "load_problems", lambda cfg: ([problem], [problem]))
    variant = "algo=reval updates=1 steps=1 prompts=2 rollouts=2"
    monkeypatch.setitem(STUDIES, "reward", [variant, f"{variant} stale0"])  # nothing is late
    monkeypatch.setattr(rm, "distill", lambda *_: None)
    argv = ["study", "reward", "--seeds=2", f"--out={tmp_path}"]
    main(argv)
    printed = capsys.readouterr().out
    rows = [line.split("|")[2:6] for line in printed.splitlines() if line.startswith("| algo=")]
    assert len(rows) == 2 and rows[0] == rows[1]
    monkeypatch.setattr(rm, "train", None)
    main(argv)
    assert capsys.readouterr().out == printed


def main(argv):
    parser = argparse.ArgumentParser(description="The evidence behind the README's tables.")
    add = parser.add_argument
    add("command", choices=["study", "trl"])
    add("name", nargs="?", default="replay", choices=[*STUDIES, "one-prompt"], help="of a study")
    add("--seeds", type=int, default=5, help="how many (default 5)")
    add("--first-seed", type=int, default=0, help="(default 0)")
    add("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    add("--lr-factors", nargs="+", type=float, default=[1.0], help="of the learning rates")
    add("--jobs", type=int, default=1, help="processes side by side (default 1)")
    add("--out", default="runs/evidence", help="finished runs are kept here")
    args = parser.parse_args(argv)
    {"study": study, "trl": compare_trl}[args.command](args)


if __name__ == "__main__":
    main(sys.argv[1:])

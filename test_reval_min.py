"""Tests and evidence for reval_min.py.

    python -m pytest -q                      the tests: no network, no GPU, under two minutes of CPU
    python test_reval_min.py study NAME      a table of figures: one-prompt, replay, calibration,
                                             settings, reward, one-rollout, off-policy, real
    python test_reval_min.py bench           speed and memory of q_from_logits
    torchrun test_reval_min.py trl           used by the test of README's trainer

Each test names the claim of the tutorial that it checks. REVAL_TEST_SEED is the seed of the tests
that learn: they hold for any.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import io
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
import zlib
from pathlib import Path
from statistics import fmean, stdev

import pytest
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


def timeless(out):
    """The rows of a run without what may differ between two of one seed."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows_of(out)]


def json_lines(path, rows):
    """Writes rows as JSON lines. -> the path, as text."""
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return str(path)


def flags(settings):
    """Settings as a command line."""
    words = ["--preset", "toy"] if settings.get("model") and not settings.get("data") else []
    for name, value in settings.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def values():
    """Random q, v, q_ref, v_ref, reward, mask of the losses' shapes, rows of different lengths."""
    B, T, dtype = 4, 5, torch.float64
    torch.manual_seed(0)
    mask = torch.arange(T) < torch.arange(1, B + 1)[:, None]
    q, v, q_ref, v_ref = (torch.randn(B, T, dtype=dtype) for _ in range(4))
    return q, v + 3, q_ref, v_ref + 3, (torch.arange(B) % 2).to(dtype), mask


def trajectories(n=12, dtype=torch.float32):
    """Random trajectories of the tiny model's vocabulary, with cached values and a signal."""
    torch.manual_seed(0)
    made = []
    for i in range(n):
        T = 1 + i % 7
        t = {"problem": f"p{i}", "step": i, "signal": torch.tensor(i % 2, dtype=dtype)}
        t["prompt"] = torch.randint(3, 19, (3 + i % 4,))
        t["response"] = torch.randint(2, 19, (T,))
        for name in ("ref", "old"):
            t[f"q_{name}"] = torch.randn(T, dtype=dtype)
            t[f"v_{name}"] = torch.randn(T, dtype=dtype) + 3
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


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A warm start of few steps, shared by every test that learns: the folder of its run."""
    out = tmp_path_factory.mktemp("start") / "run"
    argv = ["--steps", "0", "--distill-steps", "300", "--eval-problems", "256"]
    assert rm.main([*argv, "--seed", str(SEED), "--out", str(out)]) == 0
    return out


@functools.cache
def sums(seed, eval_problems, load=rm.load_problems):
    """The built-in problems, made once for all runs."""
    return load(rm.Config(seed=seed, eval_problems=eval_problems))


@pytest.fixture
def quick(start, tmp_path, monkeypatch):
    """Makes the Config of a short run of the built-in task from the shared start."""
    numbers = itertools.count()
    load = rm.load_problems

    def remembered(cfg):
        return load(cfg) if cfg.data else sums(cfg.seed, cfg.eval_problems)

    def make(**changes):
        defaults = {"prompts": 4, "rollouts": 4, "updates": 3, "buffer": 3, "lr": 1e-4, "warmup": 0}
        defaults |= {"steps": 3, "eval_every": 2, "eval_problems": 32, "seed": SEED}
        defaults |= {"model": str(start / "model"), "out": str(tmp_path / f"run{next(numbers)}")}
        return rm.Config(**(defaults | changes))

    monkeypatch.setattr(rm, "load_problems", remembered)
    return make


def saved_model(folder, kind="Llama", chat=False, **changes):
    """Saves a tiny model of a real architecture and a byte-level BPE tokenizer, as real ones have,
    with an EOS that is also its pad token. -> the folder, as text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    how = {"special_tokens": ["<s>", "</s>", "<user>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **how)
    raw.train_from_iterator(["What is 1 + 2? The answer is \\boxed{3}."] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if chat:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %} A:{% endif %}"
        )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    sizes |= {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**(sizes | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- Q and V -------------------------------------------------------------------------------------


def test_v_is_the_best_of_value_and_entropy():
    """Section 1: Q-value plus entropy is V on average under pi, and less under other policies."""
    torch.manual_seed(0)
    q = torch.randn(7, dtype=torch.float64)
    v = q.logsumexp(0)
    pi = (q - v).exp()

    def paid(policy):
        return (policy * (q - policy.log())).sum()

    assert paid(pi).item() == pytest.approx(v.item(), rel=1e-12)
    for other in torch.randn(100, 7, dtype=torch.float64).softmax(1):
        assert paid(other) < v - 1e-3


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_q_from_logits_equals_the_plain_form(block):
    """Q, V and their gradients, for blocks that divide the vocabulary, do not, and exceed it."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 6, 3, 3, 5])
    mix = torch.randn(2, 5, dtype=torch.float64)
    fused = functools.partial(rm.q_from_logits, actions=actions, block=block)
    plain = torch.stack(rm.plain_q_and_v(hidden, weight, actions))
    ours = torch.stack(fused(hidden, weight))
    assert torch.allclose(ours, plain, rtol=1e-12)
    expected = torch.autograd.grad((plain * mix).sum(), (hidden, weight))
    found = torch.autograd.grad((ours * mix).sum(), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(fused, (hidden, weight))


def test_q_from_logits_precision_and_errors():
    """float32 out of bfloat16 in, gradients in the operands' types; misuse is told."""
    torch.manual_seed(0)
    hidden = torch.randn(6, 8).bfloat16().requires_grad_()
    weight = torch.randn(50, 8).bfloat16().requires_grad_()
    actions = torch.arange(6)
    q, v = rm.q_from_logits(hidden, weight, actions, block=16)
    exact_q, exact_v = rm.plain_q_and_v(hidden.double(), weight.double(), actions)
    assert q.dtype == v.dtype == torch.float32
    assert (q - exact_q).abs().max() < 1e-5 and (v - exact_v).abs().max() < 1e-5
    (q - v).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    for misfit in ((hidden, torch.arange(5)), (hidden[:, :4], actions), (hidden, actions[:, None])):
        with pytest.raises(ValueError, match="hidden"):
            rm.q_from_logits(misfit[0], weight, misfit[1])
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            rm.q_from_logits(hidden, weight, torch.full((6,), outside))


def test_q_from_logits_never_holds_the_logits():
    """No tensor it makes, forward or backward, has more than N x block or A x D elements."""
    N, D, A, block = 64, 2, 4000, 100
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(x.numel() for x in made if isinstance(x, torch.Tensor))
            return out

    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(A, D, requires_grad=True)
    with Watch():
        q, v = rm.q_from_logits(hidden, weight, torch.arange(N), block)
        (q - v).sum().backward()
    assert N * block <= max(sizes) <= max(N * block, A * D) < N * A


# ---- The target and the losses: worked example, oracles, identities ------------------------------


def test_example_of_the_docstring():
    """reval_loss: the numbers worked by hand."""
    logits = torch.tensor([[1, 2, 5], [4, 2, 2]], dtype=torch.float64).log()
    reference = torch.tensor([[1, 1, 2], [1, 1, 2]], dtype=torch.float64).log()
    actions = torch.tensor([1, 0])
    head = torch.eye(3, dtype=torch.float64)
    q, v = rm.q_from_logits(logits, head, actions)
    q_ref, v_ref = rm.q_from_logits(reference, head, actions)
    assert v.exp().tolist() == pytest.approx([8, 8])
    assert v_ref.exp().tolist() == pytest.approx([4, 4])
    assert (q - v).exp().tolist() == pytest.approx([1 / 4, 1 / 2])
    assert (q_ref - v_ref).exp().tolist() == pytest.approx([1 / 4, 1 / 4])
    mask = torch.ones(1, 2, dtype=torch.bool)
    reward = torch.ones(1, dtype=torch.float64)
    loss, info = rm.reval_loss(q[None], v[None], q_ref[None], v_ref[None], reward, mask, beta=0.5)
    by_hand = math.log(8) - math.log(4) + math.log(1 / 8) - math.log(1 / 16) - 1 / 0.5
    assert info["residual"].item() == pytest.approx(by_hand) == pytest.approx(-0.6137, abs=5e-5)
    assert loss.item() == pytest.approx(0.5 / 2 * by_hand**2) == pytest.approx(0.0942, abs=5e-5)
    assert f"= {by_hand:.4f}" in rm.reval_loss.__doc__
    assert f"loss = {loss.item():.4f}" in rm.reval_loss.__doc__


@pytest.mark.parametrize("calibrated", [True, False])
def test_loss_and_target_equal_slow_oracles(calibrated):
    """Eq. (2) in plain loops, and the target term by term. The sum of Q - T Q over a response is
    eq. (2), although no single one is. Nothing is detached from the gradient."""
    q, v, q_ref, v_ref, reward, mask = values()
    target = rm.bellman_target(v, q_ref, v_ref, reward, mask, 0.1)
    slow = []
    for i, length in enumerate(mask.sum(1).tolist()):
        outcome = reward[i].item() / 0.1
        total = (v - v_ref)[i, 0].item() - outcome
        for h in range(length):
            total += (q - v)[i, h].item() - (q_ref - v_ref)[i, h].item()
            expected = q_ref[i, h].item() + outcome
            if h < length - 1:
                expected = q_ref[i, h].item() + (v - v_ref)[i, h + 1].item()
            assert target[i, h].item() == pytest.approx(expected, rel=1e-10)
        assert not target[i, length:].any()
        parts = (q - target)[i, :length].tolist()
        assert sum(parts) == pytest.approx(total, rel=1e-10)
        assert length == 1 or parts[0] != pytest.approx(total, rel=1e-3)
        slow.append(total if calibrated else total + v_ref[i, 0].item())
    how = (q_ref, v_ref, reward, mask, 0.1, calibrated)
    loss, info = rm.reval_loss(q, v, *how)
    assert info["residual"].tolist() == pytest.approx(slow, rel=1e-10)
    assert loss.item() == pytest.approx(0.1 / 2 * fmean(x * x for x in slow), rel=1e-10)
    operands = (q.requires_grad_(), v.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, v: rm.reval_loss(q, v, *how)[0], operands)


def test_grpo_loss_equals_a_slow_oracle():
    """GRPO: the clipped gain of each token; beyond the clip it teaches nothing."""
    logp, _, logp_old, _, reward, mask = values()
    how = (logp_old, reward - 0.6, mask, 7)
    loss, info = rm.grpo_loss(logp.requires_grad_(), *how)
    loss.backward()
    total, clipped, kinds = 0.0, 0, set()
    for i, h in mask.nonzero().tolist():
        advantage = reward[i].item() - 0.6
        ratio = (logp[i, h] - logp_old[i, h]).exp().item()
        near = min(max(ratio, 0.8), 1.28)
        clipped += ratio != near
        gain = min(ratio * advantage, near * advantage)
        beyond = gain != ratio * advantage
        assert (logp.grad[i, h] == 0) == beyond
        kinds.add((beyond, advantage > 0, ratio > 1))
        total -= gain
    assert len(kinds) > 4  # beyond or not, above and below, right and wrong
    assert loss.item() == pytest.approx(total / 7, rel=1e-10)
    assert info["clipped"].item() == pytest.approx(clipped / 7)
    assert torch.autograd.gradcheck(lambda logp: rm.grpo_loss(logp, *how)[0], (logp,))


def test_padding_and_masks():
    """bellman_target: nan in the padding reaches no value or gradient; a broken mask is refused."""
    *clean, reward, mask = values()
    dirty = [x.masked_fill(~mask, torch.nan).requires_grad_() for x in clean]

    def losses(q, v, q_ref, v_ref):
        yield rm.reval_loss(q, v, q_ref, v_ref, reward, mask, 0.1)[0]
        yield rm.grpo_loss(q, v, reward, mask, 10)[0]

    for loss, expected in zip(losses(*dirty), losses(*clean), strict=True):
        assert loss.item() == expected.item()
        for gradient in torch.autograd.grad(loss, dirty[:2]):
            assert gradient.isfinite().all() and gradient[mask].any() and not gradient[~mask].any()
    target = rm.bellman_target(*dirty[1:], reward, mask, 0.1)
    assert target.equal(rm.bellman_target(*clean[1:], reward, mask, 0.1))
    for bad in ([[True, False], [False, False]], [[True, True], [False, True]], [[], []]):
        bad = torch.tensor(bad, dtype=torch.bool)
        x = torch.zeros(bad.shape)
        with pytest.raises(ValueError, match="mask"):
            rm.reval_loss(x, x, x, x, torch.zeros(2), bad, 0.1)


# ---- What the loss promises, and what it does not ------------------------------------------------


def test_first_gradients():
    """Calibrated start: model = reference and r = 0 give loss and gradient 0.0; TBRM's residual is
    V_ref(s_1). Scale: with a centered reward the gradient is that of REINFORCE with a baseline."""
    model, _ = rm.make_model(0)
    batch = trajectories()
    q, v, mask = rm.score(model, batch)
    zero = torch.zeros(len(batch))
    q_ref, v_ref = q.detach(), v.detach()

    def gradient_of(loss):
        model.zero_grad()
        loss.backward(retain_graph=True)
        return flat_grad(model.parameters())

    calm, _ = rm.reval_loss(q, v, q_ref, v_ref, zero, mask, 0.05)
    assert calm.item() == 0 and not gradient_of(calm).any()
    tbrm, info = rm.reval_loss(q, v, q_ref, v_ref, zero, mask, 0.05, calibrated=False)
    assert torch.allclose(info["residual"], v_ref[:, 0], atol=1e-5)
    assert gradient_of(tbrm).abs().max() > 1e-4
    model.double()
    group = [t | {"prompt": torch.tensor([1, 5, 6])} for t in batch[:8]]
    q, v, mask = rm.score(model, group)
    reward = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    centered = reward - reward.mean()
    loss, _ = rm.reval_loss(q, v, q.detach(), v.detach(), centered, mask, beta=0.05)
    reinforce = gradient_of(-(centered * (q - v).masked_fill(~mask, 0).sum(1)).mean())
    assert (gradient_of(loss) - reinforce).norm() < 1e-6 * reinforce.norm()
    assert reinforce.norm() > 0.1


def test_later_states_have_no_level():
    """Not determined: a constant on all logits of a later state. On the first one's it matters."""
    q, v, q_ref, v_ref, reward, mask = values()
    shift = torch.randn(q.shape, dtype=q.dtype)
    later = shift.clone()
    later[:, 0] = 0
    loss, shifted, moved = (
        rm.reval_loss(q + x, v + x, q_ref, v_ref, reward, mask, 0.1)[0].item()
        for x in (0, later, shift)
    )
    assert shifted == pytest.approx(loss, rel=1e-12)
    assert moved != pytest.approx(loss, rel=1e-3)


# A world small enough to solve: two tokens out of three, so nine responses, of which two are right.
EVERY = torch.arange(9)
UNEVEN = torch.tensor([0, 1, 1, 1, 1, 1, 2, 3, 3, 4, 5, 6, 7, 7, 7, 8])  # all, some more often
REWARD = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
BETA = 0.5


def table(seed):
    """Random logits of the first state, [3], and of the three states after it, [3, 3]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    return logits[0], logits[1:]


def q_and_v(logits, rows):
    """Q and V of the two tokens of responses, which are given by number: [B, 2] each."""
    first, second = logits
    a1, a2 = rows // 3, rows % 3
    q = torch.stack([first[a1], second[a1, a2]], 1)
    v = torch.stack([first.logsumexp(0).expand(len(rows)), second.logsumexp(1)[a1]], 1)
    return q, v


def policy(logits):
    """The probability of each of the nine responses."""
    q, v = q_and_v(logits, EVERY)
    return (q - v).sum(1).exp()


def best_policy(reference):
    """pi_ref exp(r / beta) / Z, and log Z."""
    weight = policy(reference) * (REWARD / BETA).exp()
    return weight / weight.sum(), weight.sum().log().item()


def fit(begin, rows, q_ref, v_ref, calibrated=True, held=False):
    """Gradient descent on the loss of the responses of rows, to where it rests, which is at a loss
    of 0; or with V(s_1) held fixed in the gradient, as in eq. (4). -> logits"""
    logits = [x.clone().requires_grad_() for x in begin]
    optimizer = torch.optim.SGD(logits, lr=4.0, momentum=0.8)
    mask = torch.ones(len(rows), 2, dtype=torch.bool)
    for _ in range(200):
        q, v = q_and_v(logits, rows)
        if held:  # Q(s_1, a_1) = V(s_1) + log pi(a_1|s_1)
            log_pi = q[:, 0] - v[:, 0]
            q = torch.stack([v[:, 0].detach() + log_pi, q[:, 1]], 1)
        loss, _ = rm.reval_loss(q, v, q_ref, v_ref, REWARD[rows], mask, BETA, calibrated)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert flat_grad(logits).norm() < 1e-6
    assert held or loss < 1e-10
    return [x.detach() for x in logits]


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("begin, rows", [(0, EVERY), (1, UNEVEN)])
def test_fixed_point_from_off_policy_data(begin, rows, calibrated):
    """Fixed point: whoever wrote the data and wherever the model begins, it ends at
    pi_ref exp(r / beta) / Z, with V(s_1) = V_ref(s_1) + log Z; TBRM too, with V(s_1) = log Z."""
    q_ref, v_ref = q_and_v(table(0), rows)
    logits = fit(table(begin), rows, q_ref, v_ref, calibrated)
    best, level = best_policy(table(0))
    if calibrated:
        level += v_ref[0, 0].item()
    assert torch.allclose(policy(logits), best, atol=1e-4)
    assert logits[0].logsumexp(0).item() == pytest.approx(level, abs=1e-3)


def test_coverage():
    """Coverage: ratios among those seen are right, the others' mass is free; V takes the slack."""
    seen = torch.tensor([1, 4, 5, 7])
    reference = table(0)
    q_ref, v_ref = q_and_v(reference, seen)
    wanted = (policy(reference).log() + REWARD / BETA)[seen]
    masses = []
    for begin in (0, 1):
        logits = fit(table(begin), seen, q_ref, v_ref)
        found = policy(logits)[seen].log()
        slack = logits[0].logsumexp(0) - v_ref[0, 0]
        assert torch.allclose(found - found[0], wanted - wanted[0], atol=1e-3)
        assert torch.allclose(wanted - found, slack.expand(len(seen)), atol=1e-3)
        masses.append(policy(logits)[seen].sum().item())
    assert abs(masses[0] - masses[1]) > 0.1
    assert min(masses) > best_policy(reference)[0][seen].sum() + 0.1


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
    """The whole gradient: without its part through V(s_1), where it ends depends on the data."""
    reference = table(0)
    rest = []
    for rows in (EVERY, UNEVEN):
        rest.append(policy(fit(reference, rows, *q_and_v(reference, rows), held=True)))
        assert (rest[-1] - best_policy(reference)[0]).abs().max() > 0.1
    assert (rest[0] - rest[1]).abs().max() > 0.02


def test_beta_goes_with_length():
    """With beta * length fixed, the same nats a token make a right response's residual 0."""
    for length in (1, 4, 16):
        log_pi_ref, v = torch.randn(2, 1, length, dtype=torch.float64)
        q_ref = v + log_pi_ref
        mask = torch.ones(1, length, dtype=torch.bool)
        _, info = rm.reval_loss(q_ref + 1 / 2, v, q_ref, v, torch.ones(1), mask, beta=2 / length)
        assert abs(info["residual"].item()) < 1e-9


# ---- One update: scores, micro-batches, master weights, buffer and signals -----------------------


@pytest.mark.parametrize("algo", ["reval", "tbrm", "grpo"])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_batch_layout_does_not_matter(algo, dtype, rtol):
    """Micro-batches change nothing: the same gradient for any size, order and padding."""
    model, _ = rm.make_model(0)
    model.to(dtype)
    masters = list(model.parameters())
    batch = trajectories(13, dtype)
    cfg = rm.Config(algo=algo)
    stats = rm.gradient(model, masters, batch, cfg)
    whole = flat_grad(model.parameters())
    assert whole.norm() > 0.1
    for layout, tokens in ((batch, 1), (batch[::-1], 30), (batch[5:] + batch[:5], 10**6)):
        small = dataclasses.replace(cfg, micro_batch_tokens=tokens)
        again = rm.gradient(model, masters, layout, small)
        assert (flat_grad(model.parameters()) - whole).norm() < rtol * whole.norm()
        assert again == pytest.approx(stats, rel=100 * rtol, abs=1e-5)


def test_micro_batches():
    """Up to max_tokens padded tokens each, one response at least, like lengths together."""

    def size(t):
        return len(t["prompt"]) + len(t["response"])

    batch = trajectories(30)
    counts = []
    for most in (1, 30, 10**6):
        groups = rm.micro_batches(batch, most)
        assert sum(groups, []) == sorted(batch, key=size)
        for group in groups:
            assert len(group) == 1 or len(group) * max(map(size, group)) <= most
        counts.append(len(groups))
    assert counts[0] == 30 and 5 < counts[1] < 20 and counts[2] == 1


def test_bfloat16_micro_batches_add_up_in_float32():
    """24 micro-batches of a bfloat16 model: its masters sum their gradients in float32."""
    cpu = torch.device("cpu")
    model, _ = rm.make_model(0)
    low = copy.deepcopy(model).bfloat16()
    plain = copy.deepcopy(model).bfloat16()
    model.load_state_dict(low.state_dict())
    masters = rm.master_weights(low, cpu)
    own = rm.master_weights(model, cpu)
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))
    batch = trajectories(24)
    total = 0
    for t in batch:
        plain.zero_grad()
        for part in (low, plain):
            q, v, _ = rm.score(part, [t])
            (q - v).sum().backward()
        total = total + flat_grad(plain.parameters()).double()
    found = flat_grad(masters)
    assert found.dtype == torch.float32 and all(p.grad is None for p in low.parameters())
    assert (found - total).norm() < 1e-6 * total.norm()
    rm.cache_values(model, batch, rm.Config(), "ref")
    rm.cache_values(model, batch, rm.Config(), "old")
    for algo in ("reval", "grpo"):
        rm.gradient(model, own, batch, rm.Config(algo=algo))
        rm.gradient(low, masters, batch, rm.Config(algo=algo, micro_batch_tokens=1))
        exact = flat_grad(model.parameters())
        assert (flat_grad(masters) - exact).norm() < 0.02 * exact.norm()


def test_master_weights_keep_small_steps():
    """No step of 1e-6 moves a bfloat16 weight; its master moves. Gradients are freed."""

    def trained(dtype, with_masters, steps=300):
        torch.manual_seed(0)
        model = torch.nn.Linear(50, 50).bfloat16().to(dtype)
        masters = list(model.parameters())
        if with_masters:
            masters = rm.master_weights(model, torch.device("cpu"))
        optimizer = torch.optim.AdamW(masters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            for w in masters:
                w.grad = (torch.rand(w.shape, generator=generator) + 1).to(w.dtype)
            rm.update(model, masters, optimizer)
            assert all(w.grad is None for w in [*model.parameters(), *masters])
        return torch.cat([w.flatten() for w in model.parameters()]).float().detach()

    begin = trained(torch.bfloat16, False, steps=0)
    exact = trained(torch.float32, False)
    kept = trained(torch.bfloat16, True)
    lost = trained(torch.bfloat16, False)
    assert (exact - begin).abs().mean() == pytest.approx(3e-4, rel=0.1)
    assert torch.equal(kept, exact.bfloat16().float())
    large = begin.abs() > 0.01  # an update of 1e-6 is less than half a step of these
    assert torch.equal(lost[large], begin[large])
    assert not torch.equal(kept[large], begin[large])


def test_buffer():
    """rng: the same seed, step and purpose draw the same; another of the three draws otherwise. The
    buffer: first in, first out; uniform, without replacement, removing nothing; seeded."""
    which = [(0, 1, "a"), (0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]
    drawn = [rm.rng(*each).integers(2**62) for each in which]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4
    buffer, twin = (rm.ReplayBuffer(5, seed=1) for _ in range(2))
    for b in (buffer, twin):
        b.add(range(3))
        assert len(b) == 3 and sorted(b.sample(10)) == [0, 1, 2] and len(b) == 3
        b.add(range(3, 8))
        assert b.items == [3, 4, 5, 6, 7]
    assert [buffer.sample(3) for _ in range(4)] == [twin.sample(3) for _ in range(4)]
    assert buffer.sample(3) != buffer.sample(3)
    counts = dict.fromkeys(buffer.items, 0)
    for _ in range(2000):
        sample = buffer.sample(2)
        assert len(set(sample)) == 2
        for item in sample:
            counts[item] += 1
    chi2 = sum((n - 800) ** 2 / 800 for n in counts.values())
    assert chi2 < 18  # four degrees of freedom: one seed in a thousand would exceed it


def test_signals():
    """Raw, centered, or GRPO's advantage, which is the reward for a group of 1. Centering narrows
    the gap between right and wrong to 1 - 1 / group of it: exact, over all groups, 0.3 right."""

    def signals(rewards, **settings):
        batch = [{"reward": float(r)} for r in rewards]
        rm.add_signals(batch, rm.Config(**settings))
        return [t["signal"].item() for t in batch]

    rewards = [1, 0, 0, 0, 1, 1, 1, 1]
    assert signals(rewards, rollouts=4) == rewards
    centered = signals(rewards, rollouts=4, reward="centered")
    assert centered == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    grpo = signals(rewards, rollouts=4, algo="grpo")
    assert grpo == pytest.approx([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], abs=1e-4)
    assert signals(rewards, rollouts=1, algo="grpo") == rewards
    for group in (2, 4):
        gap = 0.0
        for rewards in itertools.product([0, 1], repeat=group):
            others = math.prod({0: 0.7, 1: 0.3}[r] for r in rewards[1:])
            first = signals(rewards, rollouts=group, reward="centered")[0]
            gap += others * first * {0: -1, 1: 1}[rewards[0]]
        assert gap == pytest.approx(1 - 1 / group, rel=1e-5)


# ---- The checker and the problems ----------------------------------------------------------------

# The policy by example: answer, gold, verdict. An answer without a backslash at its head is a whole
# response; one that starts with "=" is what the box holds.
# fmt: off
POLICY = [
    # Where the answer stands: the last box after the thought, else a tag, else ####, else words.
    (r"\boxed{5} or rather: \boxed{6}", "6", True), (r"\boxed{5}, no, \boxed{6}", "5", False),
    (r"<think>\boxed{5}</think> \boxed{6}", "5", False), (r"<think>\boxed{5}", "5", False),
    (r"</think> it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", True), (r"\boxed{5", "5", False),
    (r"I had 5, but \boxed{}", "5", False), ("<answer> 12 </answer>", "12", True),
    ("3 + 4 = 7\n#### 1,234", "1234", True), ("**Final answer:** 12.", "12", True),
    ("so the answer is C. Bye", "C", True), ("it must be 12", "12", False),
    # No hedging, no denial, no lists. "or" before the only box means "that is".
    (r"not \boxed{5}", "5", False), (r"\boxed{5} or \boxed{6}", "6", False),
    (r"\boxed{5} \text{ or } 6", "5", False), ("=5 or 6", "5", False), ("=5, 6", "5", False),
    ("The answer is not 5", "5", False), (r"It's $6\cdot 7$, or $\boxed{42}$.", "42", True),
    (r"$\boxed{5}$, or $\boxed{6}$", "5", False), (r"It can't be \boxed{5}", "5", False),
    # Numbers compare as rationals, whatever their spelling.
    ("=0.50", r"\frac12", True), (r"=-\tfrac{1}{2}", "-.5", True), ("=007", "7", True),
    ("=1,234,567", "1234567", True), (r"=12\,345", "12345", True), ("=1{,}000.0", "1000", True),
    (r"=2\,718.25", "2718.25", True), (r"=33,\! 108", "33108", True), ("=x=5,600", "5600", True),
    (r"=1\frac{1}{2}", "3/2", True), ("=1 1/2", "11/2", False), ("=1½", "1.5", True),
    (r"=4 \frac {2}{3}", r"\frac{14}3", True), (r"=\cfrac{5}{8}", r"\frac58", True),
    (r"=\frac7{16}", "7/16", True), (r"=-3\frac14", "-2.75", False),
    ("=−3", "-3", True), ("=٣", "3", True), ("=1.5e-3", "0.0015", True), ("=10⁻²", "0.01", True),
    ("=1e-999999999", "0", False), ("=12,34", "1234", False),
    (r"=0.1\overline{6}", "1/6", True), ("=0.333333", "1/3", True), ("=0.33", "1/3", False),
    ("=4.333333333333333", r"\frac{13}{3}", True), ("=0.333332", "1/3", False),
    ("=0.3333333333333335", "1/3", False),
    ("=12345678901234567", "12345678901234568", False), ("=45.000001", "45", False),
    ("=1 2", "12", False), ("=(1, 234)", "1,234", False), ("=4210_7", "42107", False),
    ("=1, 234", "1234", False), (r"=\frac{12}5\sin x", r"\frac{12}{5} \sin x", True),
    # A sum or product of numerals is still to be worked out.
    ("=71+82+39", "192", False), (r"=12\cdot34", "408", False), ("=10-2 cm", "8 cm", False),
    ("=8", "5+3", True), ("=1+2*sqrt(3)", r"1+2\sqrt{3}", True), ("=3+5", "5+3", True),
    # Closed forms and letters by value, text as text.
    (r"=\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}", True), (r"=2^{10}", "1024", True),
    ("=√15", "5", False), ("=√121", "21", False), ("=3√10/2", r"\frac{3\sqrt{10}}{2}", True),
    ("=4*sqrt(7)", r"4\sqrt7", True), (r"=\sqrt[3]{64}", "4", True), ("=∛7", r"\sqrt7", False),
    (r"=\frac94\pi", r"\frac{9\pi}{4}", True), (r"=\pi", "3.14", False), ("=6!", "6", False),
    ("=9^{9^{9^9}}", "9", False), ("=x^2-1", "(x+1)(x-1)", True), ("=x+1", "x+2", False),
    ("=x", "X", False), (r"=\text{Monday}", "monday", True), ("=uneven", "even", False),
    (r"=\frac{1}{2x}", r"\frac{1}{2}x", False), ("=x^{2y}", "x^2y", False), ("=yⁿ", "y^n", True),
    (r"=2^\frac12", r"\sqrt{2}", True), (r"=\tau/3", r"\frac{\tau}{3}", True),
    (r"=5\phi", "5φ", True), (r"=\rho", "p", False), (r"=4\cos 3 t", r"4 \cos 3t", True),
    (r"=\frac{1}{R C s+2}", r"\frac1{RCs+2}", True), (r"=\sin x", r"\cos x", False),
    ("=__import__('os')", "0", False), ("=AB", "BA", False), ("=no", "on", False),
    ("=x₁", "x_1", True), ("=Paris!", "Paris", True), ("=**12**", "12", True),
    # Units, percent, currency: free to be left out, not to differ.
    (r"=10\text{ cm}", "10", True), ("=5 kg", "5 g", False), ("=5 minutes", "5 hours", False),
    (r"=7\pi\text{ cm}^2", r"7\pi", True), (r"=5\sqrt{3} \text{ miles}", r"5\sqrt3", True),
    ("=14days", "14", True), ("=40 miles per hour", "40", True), ("=11", "11 (pencils)", True),
    ("=11 pens", "11 (pencils)", False), ("=70 square feet", "70", True),
    ("=3 million", "3", False), ("=4 sevenths", "4", False), ("=2 gross or so", "2", False),
    ("=3 out of 4", "3", False), ("=5abc", "5", False), ("=8 squared", "8", False),
    ("=2 ln x", "2", False), ("=9 perhaps", "9", False), ("=6 or fewer", "6", False),
    ("=1 ft 0 in", "1", False), ("=0 to 9", "0", False), ("=x and 0", "0", False),
    (r"=\$12.00", "12", True), ("=15%", "15 mm", False), (r"=40\text{ seconds}", r"40\%", False),
    (r"=45^\circ", "45 degrees", True), (r"=12\%", "0.12", True), ("=12", r"12\%", True),
    (r"=\frac{75^\circ}{2}", "37.5", True), ("=12", "0.12", False), ("=12 per cent", "12%", True),
    # A name may stand before "=", an equation is no answer to its other side.
    ("=x=5", "5", True), ("=x=5", "y=5", False), ("=6=7", "6", False),
    ("=g(t)=t-4", "t-4", True), (r"=\angle PQR = 25^\circ", "25", True),
    ("=P(B)=0.2", r"\frac15", True), ("=|CD|=8", "8", True), (r"=\frac{QR}{ST}=3", "3", True),
    (r"=y \approx 17", "17", True), ("=3x=12", "12", False), ("=x^2=9", "9", False),
    ("=y(y+1)=6", "6", False), ("=5x-2y=4", "5 x-2 y=4", True), ("=5x-2y=4", "5x-2y=6", False),
    # Tuples and intervals keep order and brackets, sets have no order, matrices keep their shape.
    ("=(1,2)", "(2,1)", False), ("=[2,5)", "[2,5]", False), (r"=\{1,2\}", r"\{2,1\}", True),
    (r"=\left(-\infty, 3\right)", "(−∞,3)", True), (r"=6 \text{ and } 8", "6,8", True),
    (r"=(7,+\infty)", r"(7,\infty)", True), (r"=[0,1]\cup(4,+∞)", r"[0,1] \cup (4,\infty)", True),
    (r"=\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", True),
    (r"=\begin{pmatrix}1&2&3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
    (r"=\(\begin{pmatrix}5\\[4pt]8\\\end{pmatrix}\)", r"\begin{pmatrix}5\\8\end{pmatrix}", True),
    ("=x > 5", "5 < x", True), ("=x < 5", "x > 5", False), ("=1<x\\le 2", "(1,2]", True),
    ("=5>x>1", "1<x<5", True), (r"=1\le x\le5", "[1,5]", True), (r"=1\le x<5", "[1,5)", True),
    (r"=t\ne 7", "t != 7", True), ("=t ≠ 7", "t = 7", False), (r"=\varnothing", "∅", True),
    (r"=\{n \mid n<3\}", r"\{n|n<3\}", True), (r"=\pm 6", "6, -6", True), ("=1<x<5", "(1,5)", True),
    # Multiple choice: one letter, and at most its text.
    ("=(C)", "C", True), (r"=\text{(B) } 12", "B", True), ("=c", "C", True),
    ("=D", "(D) Alina", True), ("=(B) and (E)", "B", False), ("=(D) is false", "D", False),
    ("=A. 1 B. 2 C. 3", "A", False), ("=(C)/(D)", "C", False), ("=(E), (F)", "E", False),
    ("=Carbon", "C", False), ("=A or B", "A", False), ("=(B) 12+34", "B", True),
]
# fmt: on


@pytest.mark.parametrize("answer, gold, verdict", POLICY)
def test_checker_policy(answer, gold, verdict):
    """Section 6, by example."""
    response = f"So $\\boxed{{{answer[1:]}}}$." if answer[0] == "=" else answer
    assert rm.is_correct(response, gold) is verdict


def test_checker_on_random_strings():
    """Any two strings give a bool; an answer equals itself; the examples are not one-sided."""
    parts = [*r"12 x,;()[]+-*/=<>%^_.!&A:e{}½²π∞٣", "\n", "or", "and", "####", "answer is"]
    parts += ["<think>", "</think>", "<answer>", "</answer>", "\0", "\ud800", "9" * 50, "E5"]
    parts += [r"\boxed{", r"\frac", r"\sqrt", r"\{", r"\}", r"\text{", r"\begin{pmatrix}"]
    parts += [r"\end{pmatrix}", r"\\", r"\in", r"\overline{"]
    generator = rm.rng(0, 0, "fuzz")
    for _ in range(4000):
        a, b = ("".join(generator.choice(parts, generator.integers(1, 12))) for _ in range(2))
        assert type(rm.is_correct(a, b)) is bool
        assert type(rm.is_correct(f"\\boxed{{{a}}}", b)) is bool
    for _, gold, _ in POLICY:
        for form in ("X", " X ", "$X$", "{X}", "\\displaystyle X", "X."):
            answer = "\\boxed{" + form.replace("X", gold) + "}"
            assert rm.is_correct(answer, gold), answer
    assert 0.4 <= fmean(verdict for *_, verdict in POLICY) <= 0.6


def test_built_in_task():
    """Section 5: the teacher is always right, in the form shown; the two sets never meet, whatever
    the order of the numbers; the tiny model has the words for all of it, and the room."""
    assert rm.demonstrate("47+85+36=?", True) == r"7+5+6=18;4+8+3+1=16;\boxed{168}"
    assert rm.demonstrate("47+85+36=?", False) == r"\boxed{168}"
    parts = rm.load_problems(rm.Config(eval_problems=500))
    for p in parts[0][:500] + parts[1]:
        for written in (True, False):
            assert rm.is_correct(rm.demonstrate(p["problem"], written), p["answer"])
        units, tens, _ = rm.demonstrate(p["problem"], True).split(";")
        for work in (units, tens):
            terms, _, total = work.partition("=")
            assert sum(map(int, terms.split("+"))) == int(total)
    keys = [{tuple(sorted(re.findall(r"\d+", p["problem"]))) for p in part} for part in parts]
    assert len(keys[1]) > 450 and not keys[0] & keys[1]
    tokenizer = rm.make_model(0)[1]
    text = rm.demonstrate("99+98+97=?", True)
    ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert len(ids) <= rm.Config().max_new_tokens and tokenizer.decode(ids[:-1]) == text


def test_reading_problems(tmp_path, monkeypatch, capsys):
    """JSONL, one JSON array or the hub, names in any case; unusable rows are dropped aloud."""
    rows = [{"Problem": "a", "ANSWER": 5, "level": 1}, {"question": "b", "answer": "so #### 1,200"}]
    rows += [{"problem": "c", "answer": None}, {"problem": "d"}, {"problem": "a", "answer": "5"}]
    rows += [{"problem": "e" * (rm.LONGEST_PROBLEM + 1), "answer": "5"}]
    rows += [7, {"problem": ["f"], "answer": "5"}]
    expected = [{"problem": "a", "answer": "5"}, {"problem": "b", "answer": "1,200"}]
    file = tmp_path / "rows.jsonl"
    assert rm.read_problems(json_lines(file, rows)) == expected
    assert f"{file}: dropped 6 of 8 rows" in capsys.readouterr().out
    file.write_text(json.dumps(rows), encoding="utf-8-sig")  # an array, after a byte-order mark
    assert rm.read_problems(str(file)) == expected

    def download(repo, name, repo_type):
        assert (repo, name, repo_type) == ("org/name", "sub/f.json", "dataset")
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert rm.read_problems("hf://datasets/org/name/sub/f.json") == expected


def test_answers_of_a_data_file(tmp_path, capsys):
    """The first of answer, final_answer and solution that holds one; a list of one is its item;
    other lists, objects, true and NaN are nothing to compare with: dropped aloud."""
    good = [
        ({"answer": "3", "final_answer": "4", "solution": r"\boxed{5}"}, "3"),
        ({"answer": "", "final_answer": "4"}, "4"),
        ({"answer": None, "solution": r"It is \boxed{5}, as $1 + 4 = 5$."}, "5"),
        ({"answer": [1, 2], "Solution": "so\n#### 5"}, "5"),
        ({"final_answer": [0.5]}, "0.5"),
        ({"answer": 0}, "0"),
        ({"answer": 10**400}, str(10**400)),
        ({"answer": r"\frac{1}{2}"}, r"\frac{1}{2}"),
    ]
    bad = [["1", "2"], [], {"value": 3}, "}{", True, math.nan, math.inf]
    rows = [{"problem": f"p{i}"} | fields for i, (fields, _) in enumerate(good)]
    expected = [{"problem": f"p{i}", "answer": answer} for i, (_, answer) in enumerate(good)]
    file = tmp_path / "rows.jsonl"
    assert rm.read_problems(json_lines(file, rows)) == expected
    assert not capsys.readouterr().out
    for fields in ({"solution": "It follows."}, *({"answer": answer} for answer in bad)):
        assert rm.read_problems(json_lines(file, [*rows, {"problem": "q"} | fields])) == expected
        said = capsys.readouterr().out
        assert "dropped 1 of 9 rows" in said and "'problem': 'q'" in said


def test_held_out_part(tmp_path, capsys):
    """A seeded tenth is held out and never trained on; --eval-data, cut aloud, replaces it."""
    rows = [{"problem": f"p{i}", "answer": i} for i in range(50)]
    file = json_lines(tmp_path / "rows.jsonl", rows)
    split = [rm.load_problems(rm.Config(data=file, model="m", seed=s)) for s in (0, 0, 1)]
    assert split[0] == split[1] != split[2]
    cfg = rm.Config(data=file, eval_data=file, model="m", eval_problems=7)
    for parts, n in ((split[0], 5), (rm.load_problems(cfg), 7)):
        train, held_out = ({p["problem"] for p in part} for part in parts)
        assert (len(train), len(held_out)) == (50 - n, n) and not train & held_out
    assert "7 of 50 (--eval-problems)" in capsys.readouterr().out
    assert not held_out <= {f"p{i}" for i in range(25)}  # not the first ones, as files are sorted
    cfg = rm.Config(data="no/such/file", eval_data=file, model="m", steps=0)  # data are unread
    assert [len(part) for part in rm.load_problems(cfg)] == [0, 50]
    one = json_lines(tmp_path / "one.jsonl", rows[:1])
    for eval_data in (None, one):
        with pytest.raises(rm.UserError, match="left to train on"):
            rm.load_problems(rm.Config(data=one, eval_data=eval_data, model="m"))


# ---- Settings and refusals -----------------------------------------------------------------------


def test_settings_are_flags(capsys):
    """The fields of Config are the flags, all in --help with the presets, which are values in the
    place of the defaults, by name or by --data."""
    with pytest.raises(SystemExit):
        rm.main(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(rm.Config):
        assert "--" + field.name.replace("_", "-") in shown
        assert "".join(field.metadata["help"].split()) in shown
    assert all(name in shown for name in rm.PRESETS)
    paper, small = rm.PRESETS["r1-distill-1.5b"], rm.PRESETS["small"]
    assert {"beta": 0.002, "buffer": 5, "lr": 1e-6, "max_new_tokens": 8192}.items() <= paper.items()
    for argv, settings in (
        ("", {}),
        ("--preset toy --data f --model m", {"data": "f", "model": "m"}),
        ("--preset r1-distill-1.5b --updates 4", paper | {"updates": 4}),
        ("--data f --model m", small | {"data": "f", "model": "m"}),
        ("--eval-data f --model m --steps 0", small | {"eval_data": "f", "model": "m", "steps": 0}),
        ("--algo grpo --lr 1e-3 --raw-prompt", {"algo": "grpo", "lr": 1e-3, "raw_prompt": True}),
    ):
        assert rm.parse_args(argv.split()) == rm.Config(**settings)


def test_impossible_settings(monkeypatch, capsys):
    """Config: UserError if a setting is impossible, from Python and from the command line alike."""
    monkeypatch.setattr(rm, "ON_GPU", False)
    may_be_zero = ("steps", "warmup", "half_life", "ref_reset", "distill_steps", "seed")
    rm.Config(**dict.fromkeys(may_be_zero, 0))
    for field in dataclasses.fields(rm.Config):
        bad = []
        if field.type in (int, float):
            bad = [-1, math.nan, math.inf]
            if field.name not in may_be_zero:
                bad.append(0)
        elif isinstance(field.default, str) and field.name != "prompt":
            bad = ["other"]
        for value in bad:
            with pytest.raises(rm.UserError, match=f"^{rm.flag(field.name)} {value}: "):
                rm.Config(**{field.name: value})
    for settings, words in (
        ({"algo": "ppo"}, "choose from"),
        ({"beta": 0}, "above 0"),
        ({"steps": -1}, "at least 0"),
        ({"prompt": "x"}, "{problem}"),
        ({"device": "cuda"}, "take cpu"),
        ({"data": "f"}, "--model"),
        ({"eval_data": "f", "steps": 0}, "--model"),
        ({"eval_data": "f", "model": "m"}, "--data"),
        ({"rollouts": 1, "reward": "centered"}, "--reward raw"),
        ({"rollouts": 1, "reward": "centered", "algo": "grpo"}, "--reward raw"),
    ):
        with pytest.raises(rm.UserError, match=words):
            rm.Config(**settings)
        assert words in refusal(flags({"preset": "toy"} | settings), capsys)
    for argv in ("--prompts x", "--bogus", "--preset gpt", "--step 3", "--preset toy --resume x"):
        assert argv.split()[0] in refusal(argv.split(), capsys)
    assert "--model" in refusal(["--preset", "small"], capsys)


def test_refusals(tmp_path, monkeypatch, capsys):
    """Files without problems, models, folders: status 2, one line that names thing and mend."""
    for name in ("untokenized", "unreadable"):
        saved_model(tmp_path / name)
    for file in (tmp_path / "untokenized").glob("*token*"):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    Path("unreadable", "model.safetensors").write_bytes(b"xx")
    Path("folder").mkdir()
    odd = b'{"text": "a", "Label": "1"}'
    for name, content, words in (
        ("binary", b"\x80\xff\x00", "no JSON"),
        ("none", b"", "no row; found are: none"),
        ("line", b'{"problem": "a", "answer": "1"}\n\n{"problem":', "line, line 3: no JSON"),
        ("unanswered", b'{"problem": "a", "answer": null}', "no row"),
        ("odd", odd, "found are: label, text; problem; question; answer; final_answer"),
        ("deep", b"[" * 10**5, "no JSON"),
        ("a.jsonl.gz", odd, "no JSON; another kind of file"),
        ("a.zip", odd, "another kind of file"),
        ("a.parquet", odd, "another kind of file; to_json"),
        ("a.csv", odd, "another kind of file"),
        ("folder", None, "no JSON"),
        ("missing", None, "no JSON"),
        ("hf://datasets/org/name", None, "no JSON; hf://datasets/ORG/NAME/FILE"),
    ):
        if content is not None:
            Path(name).write_bytes(content)
        error = refusal(["--model", "m", "--data", name], capsys)
        assert all(word in error for word in [name, *words.split("; ")]), error
    monkeypatch.setattr(rm, "load_problems", lambda cfg: ([], [{"problem": "1+1"}]))
    for argv, words in (
        ("--preset toy --model folder", "--model folder: that folder: no causal LM"),
        ("--preset toy --model none", "--model none: no such folder"),
        ("--preset toy --model untokenized", "--model untokenized: "),
        ("--preset toy --model unreadable", "--model unreadable: "),
        ("--model folder", "--preset toy"),
        ("--preset small --model folder", "--preset toy"),
        ("--out none/x", "name a new one"),
        ("--out folder", "--resume"),
        ("--resume folder", "--resume folder"),
    ):
        assert words in refusal(argv.split(), capsys), argv


def test_what_fails_elsewhere_is_told(monkeypatch, capsys):
    """The hub, the GPU's memory: one line that names the thing and the mend."""

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect\nsecond line")

    def exhausted(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. And so on.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    error = refusal(["--model", "m", "--data", "hf://datasets/a/b/c.json"], capsys)
    assert "hf://datasets/a/b/c.json" in error and "We couldn't connect" in error
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    assert "--model a/b: " in refusal(["--preset", "toy", "--model", "a/b"], capsys)
    for name in ("from_disk_or_hub", "train"):  # the first is called by the second
        monkeypatch.setattr(rm, name, exhausted)
        error = refusal(["--preset", "toy", "--model", "m"], capsys)
        assert all(name in error for name in ("--rows", "--micro-batch-tokens", "--offload"))


# ---- Rollouts and the loop -----------------------------------------------------------------------


def scripted(monkeypatch, *responses):
    """Makes rm.sample return these responses."""
    monkeypatch.setattr(rm, "sample", lambda *_: [torch.tensor(response) for response in responses])


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "GPT2", "Bloom", "Lfm2", "NemotronH"])
def test_sampler_and_scorer_agree(kind, tmp_path, monkeypatch):
    """Whatever a model brings along, it is sampled from softmax(logits): the probabilities are the
    scorer's, at each token, with padding on the left, companions that come and go, several EOS ids
    and any positions, sliding window or recurrent state. The order is kept, a seed repeats."""
    sliding = {"Mistral": {"sliding_window": 4}}
    folder = saved_model(tmp_path / "m", kind, vocab_size=400, **sliding.get(kind, {}))
    habits = {"temperature": 0.1, "top_p": 0.5, "top_k": 5, "repetition_penalty": 1.5}
    habits |= {"do_sample": True, "min_new_tokens": 7, "eos_token_id": [*range(5, 60)]}
    transformers.GenerationConfig(**habits).save_pretrained(folder)
    cfg = rm.Config(model=folder, rows=6, max_new_tokens=15)
    model, tokenizer = rm.load_model(cfg)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # or all texts would be alike
    ends = rm.end_tokens(model, tokenizer)
    assert ends == {1, *range(5, 60)}
    rm.check_lengths(model, tokenizer, [{"problem": "1"}], cfg)
    torch.manual_seed(0)
    prompts = [torch.randint(60, 400, (1 + 5 * i % 9,)) for i in range(9)]
    drawn = []
    multinomial = torch.multinomial

    def watched(pi, n, generator):
        drawn.append((pi, multinomial(pi, n, generator=generator)))
        return drawn[-1][1]

    monkeypatch.setattr(torch, "multinomial", watched)
    responses = rm.sample(model, prompts, ends, cfg, 0)
    assert len({len(response) for response in responses}) > 1
    steps = iter(drawn)
    for start in (0, 6):  # the rows that were sampled side by side
        batch = []
        for prompt, response in zip(prompts, responses, strict=True):
            batch.append({"prompt": prompt, "response": response})
            assert not {*response[:-1].tolist()} & ends
            assert len(response) == 15 or (len(response) < 15 and response[-1].item() in ends)
        q, v, mask = rm.score(model, batch[start : start + 6])
        for h in range(mask.shape[1]):
            pi, tokens = next(steps)
            rows = mask[:, h]  # a response that has ended is no longer computed
            assert len(pi) == rows.sum()
            found = pi.gather(1, tokens)[:, 0].log()
            assert torch.allclose(found, (q - v)[rows, h], atol=1e-4)
    again, other = (torch.cat(rm.sample(model, prompts, ends, cfg, seed)) for seed in (0, 1))
    assert torch.equal(again, torch.cat(responses)) and not torch.equal(other, again)


def test_frequencies():
    """Tokens come as often as the model's probabilities say."""
    model, tokenizer = rm.make_model(SEED)
    prompts = rm.encode_prompts(tokenizer, ["12+34+56=?"], rm.Config())
    n = 2000
    drawn = torch.cat(rm.sample(model, prompts * n, {2}, rm.Config(max_new_tokens=1), SEED))
    with torch.no_grad():
        share = model(input_ids=prompts[0][None]).logits[0, -1].softmax(-1)
    chi2 = ((torch.bincount(drawn, minlength=19) - n * share) ** 2 / (n * share + 1)).sum()
    assert chi2 < 60  # 18 degrees of freedom: one seed in a million would exceed it


def test_memory_and_length_are_told_first(tmp_path, capsys):
    """Before the first wait: rows x tokens x layers x kv heads x head size x 2 x bytes; a context
    that is too short for the longest problem is refused there, and leaves no folder."""
    changes = {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_attention_heads": 4}
    rows = [{"problem": "1" * n, "answer": "1"} for n in (1, 60, *range(2, 20))]
    words = {"model": saved_model(tmp_path / "m", vocab_size=400, **changes), "device": "cpu"}
    words |= {"data": json_lines(tmp_path / "p.jsonl", rows), "prompt": "{problem}"}
    words |= {"out": tmp_path / "o", "dtype": "bfloat16", "steps": 0, "rows": 5000}
    error = refusal(flags(words | {"max_new_tokens": 200}), capsys)
    assert "260 tokens, but the model reads 256 at most; lower --max-new-tokens" in error
    assert rm.main(flags(words | {"max_new_tokens": 100})) == 0
    size = 5000 * 160 * 3 * 2 * 16 * 2 * 2 / 1e9
    assert f"up to 160 tokens with the prompt: {size:.2g} GB" in capsys.readouterr().out


def test_bars(quick, monkeypatch):
    """A person sees at once what is being done, and how many responses of it."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    seen = []
    monkeypatch.setattr(rm.tqdm, "update", lambda bar, n: seen.append((n, str(bar))))
    rm.train(quick(steps=1, eval_problems=16, micro_batch_tokens=100, max_new_tokens=7, rows=9))
    assert sum(n for n, _ in seen) == 16 * (3 + 1 + 3)  # evaluation, rollout; scoring; learning
    for what in ("evaluation: 16 problems x 1", "rollout: 4 problems x 4", "scoring", "learning"):
        assert f"\r{what}:   0%|          | 0/16 " in terminal.getvalue()
    assert any("token 3 of 7]" in text for _, text in seen)


def test_ends_cuts_and_rewards(tmp_path, monkeypatch):
    """EOS is kept though it is the pad token too; what was cut earns nothing, boxed or not."""
    cfg = rm.Config(model=saved_model(tmp_path / "m"))
    model, tokenizer = rm.load_model(cfg)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    box = tokenizer("\\boxed{3}", add_special_tokens=False)["input_ids"]
    other = tokenizer("well \\boxed{3}", add_special_tokens=False)["input_ids"]
    scripted(monkeypatch, [*box, 1], other, [1])
    problems = [{"problem": p, "answer": "3"} for p in ("a", "a longer one", "b")]
    done, cut, empty = rm.rollout(model, tokenizer, problems, cfg, 0, "test")
    assert done["response"].tolist() == [*box, 1] and done["ended"] and done["reward"] == 1
    assert cut["response"].tolist() == other and not cut["ended"] and cut["reward"] == 0
    assert rm.is_correct(cut["text"], "3")  # it was cut, or it would have counted
    assert empty["response"].tolist() == [1] and empty["ended"] and empty["reward"] == 0
    assert rm.score(model, [done, cut, empty])[2].sum(1).tolist() == [len(box) + 1, len(other), 1]


def test_chat_templates_and_tokenizers(tmp_path):
    """The chat template is used where there is one, with one BOS, unless --raw-prompt; then the
    tokenizer adds what it adds, but no EOS. What cannot work is refused, with a mend."""
    cfg = rm.Config(model=saved_model(tmp_path / "m", chat=True), prompt="Q: {problem} {x}")
    raw = dataclasses.replace(cfg, raw_prompt=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)

    def text(problem, cfg):
        (prompt,) = rm.encode_prompts(tokenizer, [problem], cfg)
        return tokenizer.decode(prompt)

    assert text("1 {+} 2?", cfg) == "<s><user>Q: 1 {+} 2? {x} A:"
    assert text("1?", raw) == "Q: 1? {x}"
    with pytest.raises(rm.UserError, match="--prompt"):
        rm.encode_prompts(tokenizer, ["1?", ""], rm.Config(raw_prompt=True))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer.decode(tokenizer("1")["input_ids"]) == "<s>1</s>"
    assert text("1?", raw) == "<s>Q: 1? {x}"
    assert text("1?", cfg) == "<s><user>Q: 1? {x} A:"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(rm.UserError, match="roles must alternate.*--raw-prompt"):
        text("1?", cfg)
    assert text("1?", raw)
    with pytest.raises(rm.UserError, match="more tokens"):
        rm.load_model(rm.Config(model=saved_model(tmp_path / "large", vocab_size=100)))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n", "<think>\nOkay, "])
def test_a_thought_must_end_to_earn(opening, special, tmp_path, monkeypatch):
    """Where the template opens a thought, or the model does, an answer earns after </think> only,
    be the tags special tokens or plain text; a tag in the problem opens nothing."""
    folder = saved_model(tmp_path / "m", vocab_size=400)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] + ' A: " + opening + "' }}"
    tokenizer.save_pretrained(folder)
    cfg = rm.Config(model=folder)
    model, tokenizer = rm.load_model(cfg)
    texts = {
        "so 3</think>\\boxed{3}": 1,
        "<think>so 3</think>\\boxed{3}": 1,
        "<think>so \\boxed{3}": 0,
        "so \\boxed{3}</think>": 0,
        "so \\boxed{3}": 0 if opening else 1,
    }
    responses = [[*tokenizer(x, add_special_tokens=False)["input_ids"], 1] for x in texts]
    scripted(monkeypatch, *responses)
    problems = [{"problem": "1+2, <think>", "answer": "3"}] * len(texts)
    found = rm.rollout(model, tokenizer, problems, cfg, 0, "test")
    assert all(t["ended"] for t in found)
    assert [t["text"] for t in found] == list(texts)
    assert [t["found"] for t in found] == ["3" if earned else None for earned in texts.values()]
    assert [t["reward"] for t in found] == list(texts.values())


def test_not_finite_stops_before_the_step(quick, monkeypatch, capsys):
    """A nan stops the run in one line that names the trajectory; the weights stay as they were."""
    cache_values = rm.cache_values

    def poisoned(model, fresh, cfg, name):
        cache_values(model, fresh, cfg, name)
        fresh[6]["q_ref"][0] = torch.nan
        fresh[6]["problem"] = "the culprit"

    monkeypatch.setattr(rm, "cache_values", poisoned)
    monkeypatch.setattr(rm, "update", None)  # a call would be an error of its own
    assert "step 1 to 'the culprit'" in refusal(flags(vars(quick())), capsys)


@pytest.fixture
def rewarded(monkeypatch):
    """Pays about every second response, whatever the start can do, so that the weights move."""
    monkeypatch.setattr(rm, "is_correct", lambda response, gold: zlib.crc32(response.encode()) % 2)


@pytest.fixture
def gradients(monkeypatch):
    """The batch and the figures of each update that is made."""
    seen = []
    gradient = rm.gradient

    def watched(model, masters, batch, cfg):
        seen.append((batch, gradient(model, masters, batch, cfg)))
        return seen[-1][1]

    monkeypatch.setattr(rm, "gradient", watched)
    return seen


@pytest.mark.parametrize("algo, rollouts", [("reval", 2), ("grpo", 2), ("grpo", 1)])
def test_schedule_and_reuse(algo, rollouts, quick, rewarded, gradients):
    """Update 1 gets the fresh batch, the others the buffer, which holds it: about K uses in all.
    GRPO: the fresh batch, also with one response per problem."""
    sizes = {"steps": 12, "updates": 4, "max_new_tokens": 4, "eval_every": 100}
    cfg = quick(algo=algo, rollouts=rollouts, prompts=8 // rollouts, seed=0, **sizes)
    rm.train(cfg)
    uses = {}
    for i, (batch, _) in enumerate(gradients):
        step = i // 4 + 1
        born = {t["step"] for t in batch}
        assert len(batch) == len({id(t) for t in batch}) == 8
        if i % 4 == 0 or algo == "grpo":
            assert born == {step}
        assert step - 3 < min(born) and max(born) <= step
        for t in batch:
            if 3 <= t["step"] <= 9:  # born in a full buffer, and gone from it
                uses[id(t)] = uses.get(id(t), 0) + 1
    ages = [row.get("age") for row in rows_of(cfg.out)[1:]]
    if algo == "grpo":
        assert ages == [None] * 12 and set(uses.values()) == {4}
    else:
        assert ages[0] == 0 < ages[-1] < 2
        assert fmean(uses.values()) == pytest.approx(4, abs=0.6)


def test_reference_reset_refreshes_the_cache(quick, rewarded, monkeypatch):
    """After a reset the cached values of the whole buffer are those of the live model."""
    kept = []
    cache_values = rm.cache_values

    def watched(model, batch, cfg, name):
        cache_values(model, batch, cfg, name)
        kept.append((model, batch))

    monkeypatch.setattr(rm, "cache_values", watched)
    rm.train(quick(steps=4, ref_reset=4, lr=1e-3, max_new_tokens=12))
    model, batch = kept[-1]
    assert len(kept) == 5 and len(batch) == 3 * 16 and {t["step"] for t in batch} == {2, 3, 4}
    q, v, mask = rm.score(model, batch)
    for name, live in (("q_ref", q), ("v_ref", v)):
        assert torch.allclose(torch.cat([t[name] for t in batch]), live[mask], atol=1e-4)
    old, _ = rm.load_model(quick())
    assert (rm.score(old, batch)[0] - q).abs().max() > 0.01


def test_calibration_survives_the_loop(quick, gradients, monkeypatch):
    """Without reward nothing moves, in any split, across a reset, at a rate too low for noise."""
    monkeypatch.setattr(rm, "is_correct", lambda response, gold: False)
    rm.train(quick(steps=4, ref_reset=2, micro_batch_tokens=200, lr=1e-9))
    assert len(gradients) == 12
    for _, figures in gradients:
        assert max(abs(figures[key]) for key in ("residual", "kl", "v_gap")) < 1e-3
    cfg = quick(steps=1, algo="tbrm", lr=1e-9)
    rm.train(cfg)
    assert rows_of(cfg.out)[1]["residual"] > 1


SUMS = [{"problem": f"What is {i} + 1?", "answer": i + 1} for i in range(20)]


def tiny_run(model, data, out, *words):
    """A small run of a real model on a file of problems, from the command line. -> its rows"""
    argv = "--prompts 2 --rollouts 2 --updates 2 --max-new-tokens 12 --eval-problems 2 --device cpu"
    files = ["--model", model, "--data", data, "--out", str(out)]
    assert rm.main([*argv.split(), *files, *words]) == 0
    return rows_of(out)


@pytest.mark.parametrize("kind", ["Llama float32", "Qwen2 float32", "Qwen2 bfloat16"])
def test_real_models_train_from_disk(kind, tmp_path, monkeypatch):
    """Other architectures, a real tokenizer, a data file: same code, and the weights move. With the
    1.5B run's bfloat16, masters, offload, checkpointing and avg@n, in small."""
    kind, dtype = kind.split()
    folder = saved_model(tmp_path / "m", kind, chat=kind == "Qwen2", vocab_size=400)
    # A random model knows nothing: half of its tokens end a response, half of those are right.
    transformers.GenerationConfig(eos_token_id=list(range(1, 140))).save_pretrained(folder)
    monkeypatch.setattr(rm, "is_correct", lambda text, gold: "boxed" in text or len(text) % 2 == 0)
    file, out = json_lines(tmp_path / "p.jsonl", SUMS), tmp_path / "out"
    words = ["--steps", "2", "--lr", "1e-3", "--eval-samples", "4", "--dtype", dtype]
    words += ["--preset", "r1-distill-1.5b", "--offload", str(dtype == "bfloat16")]
    rows = tiny_run(folder, file, out, *words)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows[1:])
    assert rows[1]["residual"] < 500.01  # reward / beta is 0 or 500
    assert abs(rows[1]["kl"]) < {"float32": 1e-3, "bfloat16": 0.05}[dtype]
    assert len(rows_of(out, "eval-00002.jsonl")) == 2 * 4
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert {master.dtype for master in state["masters"]} == {torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.dtype == getattr(torch, dtype)
    own = model.generation_config  # and nothing of this run
    assert (own.eos_token_id, own.max_new_tokens) == (list(range(1, 140)), None)
    old = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    assert any(not torch.equal(old[name], new) for name, new in model.state_dict().items())


def test_checkpointing_and_dropout_change_nothing(tmp_path):
    """Activations made twice give the same gradient, and a model's own dropout is turned off."""
    folder = saved_model(tmp_path / "m", "Qwen2", vocab_size=400, attention_dropout=0.5)
    found = []
    calls = []
    batch = trajectories()
    for checkpointing in (False, True):
        cfg = rm.Config(model=folder, gradient_checkpointing=checkpointing)
        model, _ = rm.load_model(cfg)
        layer = model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, on=checkpointing: calls.append(on))
        rm.gradient(model, list(model.parameters()), batch, cfg)
        found.append(flat_grad(model.parameters()))
        assert not model.training
    assert torch.equal(*found) and calls.count(True) == 2 * calls.count(False) > 0


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite", "Phi", "Mamba"])
def test_models_that_do_not_fit_are_refused(kind, tmp_path):
    """Soft caps, scales and biases between hidden @ lm_head.T and the logits are found, and that a
    cache is not read."""
    changes = {"Cohere": {"logit_scale": 0.1}, "Granite": {"logits_scaling": 8}}
    folder = saved_model(tmp_path / "m", kind, **changes.get(kind, {}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # a cap shows where logits are large
        if kind == "Phi":
            model.lm_head.bias.normal_()
    model.save_pretrained(folder)
    with pytest.raises(rm.UserError, match="lm_head"):
        rm.load_model(rm.Config(model=folder))


def test_evaluation_figures(tmp_path, monkeypatch, capsys):
    """avg@n, its standard error and the rest, by hand; a row an answer; no copy of a model. The
    console shows a right and a wrong answer, and nothing of a training that is not made."""
    right = {"a": [1, 0, 0, 0], "b": [1, 1, 0, 0], "c": [0, 0, 0, 0], "d": [1, 1, 1, 1]}

    def rollout(model, tokenizer, problems, *_):
        left = copy.deepcopy(right)
        answers = []
        for p in problems:
            answer = {"text": "\\boxed{5}", "ended": p["problem"] != "c", "found": "5"}
            answer["response"] = torch.ones(2 + len(left["a"]))
            answer["reward"] = float(left[p["problem"]].pop())
            answers.append(p | answer)
        return answers

    monkeypatch.setattr(rm, "rollout", rollout)
    out = tmp_path / "out"
    rows = [{"problem": p, "answer": "5"} for p in right]
    changes = {"model": saved_model(tmp_path / "m"), "out": str(out), "steps": 0, "eval_samples": 4}
    found = rm.train(rm.Config(eval_data=json_lines(tmp_path / "p.jsonl", rows), **changes))
    assert found["accuracy"] == pytest.approx(7 / 16)
    assert found["stderr"] == pytest.approx(math.sqrt((9 + 1 + 49 + 81) / 256 + 1 / 4) / 5)
    assert found["eval_truncated"] == 1 / 4
    assert found["eval_length"] == pytest.approx((6 + 5 + 4 + 3 + 12 * 2) / 16)
    rows = rows_of(out, "eval-00000.jsonl")
    assert [row["reward"] for row in rows] == [0, 0, 0, 1] + [0, 0, 1, 1] + [0] * 4 + [1] * 4
    expected = {"problem": "a", "answer": "5", "text": "\\boxed{5}", "found": "5"}
    assert rows[0] == expected | {"ended": True, "reward": 0, "length": 6}
    assert not (out / "model").exists()
    printed = capsys.readouterr().out
    assert "rollouts" not in printed and "distilled" not in printed
    assert "  right: 'a' -> '\\\\boxed{5}' (found '5', wanted '5')\n  wrong: 'a' -> " in printed


@pytest.mark.parametrize("right", [0, 3, 10])
def test_standard_error(right, monkeypatch, tmp_path):
    """Half of Wilson's interval, whose ends p lie one standard error, of theirs, from what was
    found. So it is not 0 where nothing is right."""
    row = dict.fromkeys(("problem", "answer", "text", "ended", "found"), "") | {"response": [0]}
    rows = [row | {"reward": float(i < right)} for i in range(10)]
    monkeypatch.setattr(rm, "rollout", lambda *_: rows)
    figures = rm.evaluate(None, None, rows, rm.Config(), 0, tmp_path)
    middle = (right / 10 + 1 / 20) / (1 + 1 / 10)
    for end in (middle - figures["stderr"], middle + figures["stderr"]):
        assert (end - right / 10) ** 2 == pytest.approx(end * (1 - end) / 10, abs=1e-12)


def test_it_learns_to_show_its_work(quick, monkeypatch):
    """If written work is what earns, it becomes the rule; evaluation, V and lengths tell so."""
    monkeypatch.setattr(rm, "is_correct", lambda response, gold: ";" in response)
    sizes = {"steps": 6, "prompts": 8, "rollouts": 8, "updates": 4, "eval_problems": 64}
    cfg = quick(**sizes, eval_every=6, lr=5e-4, half_life=0)
    result = rm.train(cfg)
    rows = rows_of(cfg.out)
    assert result["accuracy_after"] > result["accuracy_before"] + 0.25
    assert rows[-1]["reward"] > rows[1]["reward"] + 0.25
    assert rows[-1]["v_gap"] > 0.5 and rows[-1]["length"] > rows[1]["length"] + 1


def test_it_learns_to_be_right(start, tmp_path, capsys):
    """With the real checker and data files: sums that all make one number, which the start gets
    right now and then, come out right, held-out ones too. The console tells it, with samples."""
    answers = [row["found"] for row in rows_of(start, "eval-00000.jsonl")]
    common = [x for x in answers if x and re.fullmatch("1[2-9][0-9]", x)]
    total = max(sorted(common), key=common.count)  # what the start likes to say
    triples = itertools.product(range(10, 100), repeat=3)
    problems = [f"{a}+{b}+{c}=?" for a, b, c in triples if a + b + c == int(total)]
    rm.rng(SEED, 0, "sums").shuffle(problems)
    rows = [{"problem": problem, "answer": total} for problem in problems[:192]]
    files = {"model": start / "model", "data": json_lines(tmp_path / "train", rows[64:])}
    files |= {"eval_data": json_lines(tmp_path / "held_out", rows[:64]), "out": tmp_path / "out"}
    changes = {"preset": "toy", "steps": 3, "rollouts": 4, "prompts": 32, "lr": 5e-4, "warmup": 0}
    changes |= {"half_life": 0, "buffer": 5, "eval_every": 3, "seed": SEED}
    assert rm.main(flags(files | changes)) == 0
    rows = rows_of(tmp_path / "out")
    gain = rows[-1]["accuracy"] - rows[0]["accuracy"]
    assert gain > 0.2 and gain > 4 * math.hypot(rows[0]["stderr"], rows[-1]["stderr"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  right: ") for line in lines)
    table = [line for line in lines if re.match(r" +\d+ +\d+ ", line)]
    assert len(table) == 4 and max(map(len, table)) <= 100


def content(folder, pattern="*"):
    """The files in and under a folder."""
    files = [file for file in Path(folder).rglob(pattern) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def files_of(out):
    """The evaluations and the weights of a run."""
    return content(out, "eval-*.jsonl") | content(out, "model.safetensors")


def same_runs(a, b):
    """Metrics but for times, evaluations and weights, to the bit."""
    assert timeless(a) == timeless(b) and files_of(a) == files_of(b)


MADE = {}  # undisturbed runs that several tests compare with: settings to folder and console
# A whole run, to be stopped after 3 steps and gone on with.
PLAIN = {"steps": 4, "updates": 2, "eval_every": 3, "eval_problems": 16, "max_new_tokens": 8}
PLAIN |= {"algo": "reval"}
RESUMED = [{}, {"ref_reset": 2}, {"algo": "grpo"}, {"dtype": "bfloat16", "algo": "tbrm"}]


@pytest.fixture
def calm(quick, rewarded):
    """A run of the command line that nothing disturbs, made once. -> its folder and its console."""

    def make(**changes):
        key = repr(changes)
        if key not in MADE:
            cfg = quick(**changes)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert rm.main(flags(vars(cfg))) == 0
            MADE[key] = cfg.out, printed.getvalue()
            assert rows_of(cfg.out)[-1]["grad_norm"] > 1e-3  # there is something to compare
        return MADE[key]

    return make


@pytest.mark.parametrize("algo", ["reval", "grpo"])
def test_a_run_leaves_its_record(algo, calm, quick):
    """The files, the keys, and a model that loads, with nothing half-written beside it. The same
    seed makes the same run, to the bit, though one evaluates and prints at each step."""
    plain = PLAIN | {"algo": algo}
    name, printed = calm(**plain)
    out = Path(name)
    evaluations = {"eval-00000.jsonl", "eval-00003.jsonl", "eval-00004.jsonl"}
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "model"}
    assert {file.name for file in out.iterdir()} == names | evaluations
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert rm.Config(**saved) == quick(**plain, out=name)
    rows = rows_of(out)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["history"] == rows and [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    figures = {"accuracy", "stderr", "eval_length", "eval_truncated"}
    keys = {"step", "rollouts", "reward", "loss", "v_gap", "kl", "entropy", "grad_norm", "length"}
    keys |= {"truncated", "seconds", "seconds_rollout"}
    if algo == "reval":
        keys |= {"residual", "age"}
    assert set(rows[0]) == {"step", "rollouts"} | figures
    assert set(rows[2]) == keys and set(rows[3]) == set(rows[4]) == keys | figures
    assert rows[-1]["rollouts"] == 4 * 16
    last = dict(line.split(": ", 1) for line in printed.splitlines()[-6:])
    assert float(last["accuracy_after"]) == pytest.approx(rows[-1]["accuracy"], abs=1e-3)
    assert float(last["accuracy_before"]) == pytest.approx(rows[0]["accuracy"], abs=1e-3)
    assert last["rollouts"] == "64" and last["out"] == name
    assert rm.train(quick(model=f"{name}/model", steps=0, eval_problems=4))["accuracy"] <= 1
    looked = quick(**plain | {"eval_every": 1})
    other = quick(**plain | {"steps": 1, "seed": SEED + 1})
    for cfg in (looked, other):
        rm.train(cfg)
    for a, b in zip(timeless(out), timeless(looked.out), strict=True):
        assert a.items() <= b.items()
    assert files_of(out).items() <= files_of(looked.out).items()
    assert rows[1]["entropy"] != rows_of(other.out)[1]["entropy"]


def test_runs_can_share_a_start(quick):
    """--model DIR continues exactly as the run would have that made DIR."""
    sizes = {"distill_steps": 3, "eval_problems": 8, "max_new_tokens": 8}
    whole = quick(model=None, steps=2, **sizes)
    made = quick(model=None, steps=0, **sizes)
    rest = quick(model=made.out + "/model", steps=2, **sizes)
    for cfg in (whole, made, rest):
        rm.train(cfg)
    same_runs(whole.out, rest.out)


def test_the_script_from_an_empty_folder(tmp_path, monkeypatch, capsys):
    """As a user runs it: no arguments but a size, a new folder under runs/ for each run."""
    argv = "--steps 1 --distill-steps 3 --prompts 2 --rollouts 2 --updates 2 --eval-problems 8"
    command = [sys.executable, str(HERE / "reval_min.py"), *argv.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == "", done.stderr  # bars are for terminals
    monkeypatch.chdir(tmp_path)
    assert rm.main(argv.split()) == 0
    outs = [Path("runs", name) for name in ("toy-reval-s0", "toy-reval-s0-2")]
    for out, text in zip(outs, (done.stdout, capsys.readouterr().out), strict=True):
        assert (out / "model" / "model.safetensors").exists()
        last = dict(line.split(": ", 1) for line in text.splitlines()[-6:])
        assert last["out"] == str(out) and last["rollouts"] == "4"
    same_runs(*outs)  # another process, the same run


def test_the_commands_of_the_documents(monkeypatch):
    """Each command of the docstring and of README.md is one that the command line understands."""
    monkeypatch.setattr(rm, "saved_settings", lambda folder: dataclasses.asdict(rm.Config()))
    monkeypatch.setattr(rm, "ON_GPU", True)
    for text in (rm.__doc__, (HERE / "README.md").read_text(encoding="utf-8")):
        found = 0
        for line in re.sub(r"\\\n *", " ", text).splitlines():
            for tail in line.split("python reval_min.py")[1:]:
                words = shlex.split(re.split(r"   |`| # |&&| \| |;", tail)[0])
                found += 1
                if "--help" not in words:
                    rm.parse_args(words)
        assert found > 3


# ---- Nothing is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", RESUMED)
def test_resume_is_exact(changes, calm, quick, capsys):
    """N + M steps are N, stop, M: metrics, samples, evaluations and weights, to the bit."""
    whole, printed = calm(**PLAIN | changes)
    part = quick(**PLAIN | changes | {"steps": 3})
    rm.train(part)
    assert rm.main(["--resume", part.out, "--steps", "4"]) == 0
    same_runs(whole, part.out)
    both = (printed, capsys.readouterr().out)
    samples = [re.findall(r"  (?:right|wrong): .*", text) for text in both]
    assert samples[0] == samples[1] != []


def test_resume_with_other_settings(calm, capsys, tmp_path):
    """A complete run writes its model again; another folder, a learning rate and more steps may be
    given, and the run that was gone on with stays as it was."""
    whole, _ = calm(**PLAIN)
    part, same, other = (str(tmp_path / name) for name in ("part", "same", "other"))
    shutil.copytree(whole, part)
    shutil.rmtree(part + "/model")
    assert rm.main(["--resume", part]) == 0
    same_runs(whole, part)
    kept = content(part)
    assert rm.main(["--resume", part, "--out", part + "-copy"]) == 0
    assert timeless(part + "-copy") == timeless(whole)
    resume = {"resume": part, "steps": 5}
    assert rm.main(flags(resume | {"out": same})) == 0
    assert rm.main(flags(resume | {"out": other, "lr": 1e-3, "micro_batch_tokens": 99})) == 0
    assert content(part) == kept
    rows, changed = timeless(same), timeless(other)
    assert rows[:5] == changed[:5] == timeless(whole)
    assert len(rows) == len(changed) == 6 and rows[5]["reward"] == changed[5]["reward"]
    assert content(same, "*.safetensors") != content(other, "*.safetensors")
    settings = json.loads(Path(other, "config.json").read_text(encoding="utf-8"))
    assert settings["lr"] == 1e-3 and settings["steps"] == 5 and settings["out"] == other
    assert settings["eval_every"] == 3  # the run's own, not the default
    assert rm.main(["--resume", other]) == 0 and f"out: {other}" in capsys.readouterr().out


def test_ctrl_c(calm, quick, monkeypatch, capsys):
    """It ends a run at once, in a line that says how to go on; the checkpoint does, exactly."""
    whole, _ = calm(**PLAIN)
    cfg = quick(**PLAIN, save_every=1)
    update = rm.update
    calls = itertools.count(1)

    def interrupted(*args):
        if next(calls) == 4:  # in the middle of the second iteration
            raise KeyboardInterrupt
        update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rm, "update", interrupted)
        assert rm.main(flags(vars(cfg))) == 130
    error = capsys.readouterr().err
    assert error.startswith("reval_min: ") and error.endswith(f" --resume {cfg.out}\n")
    assert error.count("\n") == 1 and len(rows_of(cfg.out)) == 2
    ended = {"resume": cfg.out, "steps": 1, "out": cfg.out + "-ended"}  # between two evaluations
    assert rm.main(flags(ended)) == 0 and "accuracy_after: " in capsys.readouterr().out
    assert "accuracy" in rows_of(ended["out"])[-1] and len(rows_of(ended["out"])) == 2
    assert rm.main(["--resume", cfg.out]) == 0
    same_runs(whole, cfg.out)


def test_a_kill(tmp_path):
    """SIGKILL at any moment, which no program can catch: the run goes on, to the bit. TBRM, as its
    weights move without reward."""
    argv = "--algo tbrm --steps 16 --distill-steps 3 --prompts 2 --rollouts 2 --updates 2"
    argv += " --max-new-tokens 8 --eval-every 99 --eval-problems 2 --save-every 1 --out"
    argv = [*argv.split(), "shaken"]
    with subprocess.Popen(
        [sys.executable, str(HERE / "reval_min.py"), *argv], cwd=tmp_path, stdout=subprocess.PIPE
    ) as process:
        for line in process.stdout:
            if line.split()[:1] == [b"5"]:
                break
        time.sleep(0.05 * random.random())
        process.kill()
    assert 5 < len(rows_of(tmp_path / "shaken")) < 17
    calm, shaken = str(tmp_path / "calm"), str(tmp_path / "shaken")
    assert rm.main([*argv, "--out", calm]) == rm.main(["--resume", shaken]) == 0
    same_runs(calm, shaken)


def test_every_write_may_fail(calm, quick, monkeypatch, capsys):
    """A full disk at any write, flush or replace: one line, status 2, nothing half-written, and the
    last checkpoint goes on to the very run that nothing disturbed."""
    sizes = PLAIN | {"steps": 1, "updates": 1, "eval_problems": 2}
    whole, _ = calm(**sizes)

    def failing(module, name, at):
        plain = getattr(module, name)
        calls = itertools.count(1)

        def call(*args, **kwargs):
            if next(calls) != at:
                return plain(*args, **kwargs)
            if name == "save":
                args[1].write(b"half of a checkpoint")
            raise OSError(28, "No space left on device")

        return call

    # config.json; the evaluation, metrics and checkpoint of step 0; those of step 1; the model.
    cases = [(os, "fsync" if at % 2 else "replace", at, at > 4) for at in range(1, 8)]
    cases += [(torch, "save", 1, False), (torch, "save", 2, True)]
    cases += [(transformers.PreTrainedModel, "save_pretrained", 1, True), (Path, "rename", 1, True)]
    for module, name, at, goes_on in cases:
        cfg = quick(**sizes)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(module, name, at))
            assert "No space left" in refusal(flags(vars(cfg)), capsys), (name, at)
        assert {file.name for file in Path(cfg.out).glob("*.part")} <= {"model.part"}
        assert Path(cfg.out, "checkpoint.pt").exists() == goes_on
        if goes_on:
            assert rm.main(["--resume", cfg.out]) == 0, (name, at)
            same_runs(whole, cfg.out)


def test_broken_checkpoints_are_refused(calm, tmp_path, capsys):
    """Truncated, tampered, foreign or hostile files: one line each, and nothing is executed."""
    out = shutil.copytree(calm(**PLAIN)[0], tmp_path / "out")
    file, config = out / "checkpoint.pt", out / "config.json"
    good, settings = file.read_bytes(), config.read_bytes()
    state = torch.load(file, weights_only=True)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    shapeless = [torch.ones(2, 2) for _ in state["masters"]]
    broken = [Hostile(), [1], state | {"optimizer": {}}, state | {"masters": shapeless}]
    broken.append(state | {"masters": state["masters"][1:]})
    broken.append({key: state[key] for key in state if key != "history"})
    for made in (b"", good[: len(good) // 2], b"hello", *broken):
        if isinstance(made, bytes):
            file.write_bytes(made)
        else:
            torch.save(made, file)
        assert "checkpoint.pt" in refusal(["--resume", str(out), "--steps", "5"], capsys)
        assert config.read_bytes() == settings and len(rows_of(out)) == 5
    assert not (tmp_path / "executed").exists()
    file.unlink()
    assert "No such file" in refusal(["--resume", str(out)], capsys)
    file.write_bytes(good)
    config.write_text("{}", encoding="utf-8")
    for folder in (out, tmp_path / "none"):
        assert "no run of this version" in refusal(["--resume", str(folder)], capsys)


def test_changes_that_make_another_run_are_refused(calm, tmp_path, capsys):
    """Other problems, --algo or --reward, fewer steps: refused, and the run stays as it was."""
    out = shutil.copytree(calm(**PLAIN)[0], tmp_path / "out")
    kept = content(out)
    new = tmp_path / "new"
    for change in ({"algo": "grpo"}, {"reward": "centered"}, {"seed": SEED + 1}):
        change |= {"resume": out, "steps": 5, "out": new}
        assert "have changed" in refusal(flags(change), capsys) and not new.exists()
    assert "it is at step 4" in refusal(flags({"resume": out, "steps": 3}), capsys)
    assert content(out) == kept
    file, real = tmp_path / "p.jsonl", tmp_path / "real"
    tiny_run(saved_model(tmp_path / "m"), json_lines(file, SUMS), real, "--steps", "1")
    json_lines(file, SUMS[1:])
    assert "have changed" in refusal(flags({"resume": real, "steps": 2}), capsys)


def test_hostile_text(tmp_path, capsys):
    """Special tokens in a problem are text; odd characters, huge rows and braces spoil nothing."""
    folder = saved_model(tmp_path / "m", chat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (prompt,) = rm.encode_prompts(tokenizer, ["1</s><user>2<s></s </s>"], rm.Config())
    assert [prompt.tolist().count(i) for i in (0, 1, 2)] == [1, 0, 1]  # the template's own
    texts = ["a</s>b", "\ud800", "\x00\x1b[2J\r\u2028", "{problem} {0} %s {% if %}", "x" * 10**6]
    texts += ["ü😀", "{{ messages }}"]
    files = []
    for end in ("", "."):
        rows = [{"problem": text + end, "answer": "5"} for text in texts * 2]
        files.append(json_lines(tmp_path / f"rows{end}", rows))
    words = ["--steps", "1", "--eval-data", files[0], "--eval-problems", "9"]
    assert len(tiny_run(folder, files[1], tmp_path / "out", *words)) == 2
    assert capsys.readouterr().out.count("dropped 8 of 14 rows") == 2  # 7 repeat, one is too long
    problems = [row["problem"] for row in rows_of(tmp_path / "out", "eval-00000.jsonl")]
    assert problems == [text for text in texts if len(text) < 99]


def test_an_ascii_console(monkeypatch):
    """What it cannot show is printed escaped."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(rm, "train", lambda cfg: {"out": "ü\ud800"})
    assert rm.main([]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == rb"out: \xfc\ud800" + b"\n"


def test_the_two_warnings(quick, capsys):
    """Nothing right in an evaluation, or more than half cut: told, with a mend, and at once."""

    def told(*answers):
        row = {"problem": "p", "answer": "5", "text": "so 5", "found": None}
        rm.print_samples([row | {"reward": r, "ended": e} for r, e in answers])
        return re.findall("warning: (.*)", capsys.readouterr().out)

    assert told((0, 0), (0, 1), (1, 1)) == told((1, 0), (0, 1)) == []
    (nothing,) = told((0, 0), (0, 1))
    assert "no right answer" in nothing and "--prompt" in nothing
    (cut,) = told((1, 1), (0, 0), (0, 0))
    assert "67%" in cut and "--max-new-tokens" in cut
    rm.train(quick(steps=0, max_new_tokens=2))
    assert capsys.readouterr().out.count("warning: ") == 2


# ---- Evidence: what its commands share -----------------------------------------------------------


def in_processes(function, calls, jobs=1):
    """function(*call) for each call, some jobs at a time in new processes, with one thread each.
    -> results, in order"""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        results = pool.map(function, *zip(*calls, strict=True))
        return list(rm.tqdm(results, total=len(calls), disable=None))


def text_of(value):
    """A number; or of a list of them, one a seed, mean +- standard deviation."""
    if isinstance(value, list):
        spread = f" +- {stdev(value):.3f}" if len(value) > 1 else ""
        return f"{fmean(value):.3f}{spread}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_table(rows):
    """Rows, as {column: value}, in markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(text_of(value) for value in row.values()) + " |", flush=True)
    print()


# ---- Evidence: python test_reval_min.py study NAME -----------------------------------------------

PLAIN_LOSS, PLAIN_LEARN = rm.reval_loss, rm.learn


def no_reward(trajectories, cfg):
    """add_signals: the loss sees reward 0 everywhere."""
    for t in trajectories:
        t["signal"] = torch.tensor(0.0)


def recent_mean(run, fresh, cfg, step):
    """learn: the reward less one mean for all in the buffer, that of the fresh batch."""
    mean = fmean(t["reward"] for t in fresh)
    for t in run.buffer.items:
        t["signal"] = torch.tensor(t["reward"] - mean)
    return PLAIN_LEARN(run, fresh, cfg, step)


def no_v(q, v, q_ref, v_ref, *how):
    """reval_loss: log pi(response) - log pi_ref(response) - r / beta, eq. (8) of the paper."""
    zero = torch.zeros_like(v)
    return PLAIN_LOSS(q - v, zero, q_ref - v_ref, zero, *how)


def from_a_log(run, tokenizer, problems, cfg, step, back=0):
    """collect: samples nothing; all data are what LOG's run of this seed, or of another, left."""
    if step == 1:
        seed = abs(cfg.seed - back)
        folder = f"{LOG.replace(' ', ',')},lr={LR['reval'][8]:g},seed={seed}"
        file = Path(cfg.out).with_name(folder) / "checkpoint.pt"
        run.buffer.items = torch.load(file, weights_only=True)["buffer"]
        rm.add_signals(run.buffer.items, cfg)
        rm.cache_values(run.reference, run.buffer.items, cfg, "ref")
    drawn = run.buffer.sample(len(problems))
    if cfg.algo == "grpo":
        rm.cache_values(run.model, drawn, cfg, "old")
    return drawn


# A variant is written as on the command line, without the dashes; these words in it put a function
# of the above in the place of one of reval_min.
CHANGES = {
    "no-reward": ("add_signals", no_reward),
    "recent-mean": ("learn", recent_mean),
    "no-v": ("reval_loss", no_v),
    "log": ("collect", from_a_log),
    "other-log": ("collect", functools.partial(from_a_log, back=1)),
}
LR = {  # by method and updates K: the best of a sweep by factors of 2 on seeds 100 and 101
    "reval": {1: 1e-3, 2: 5e-4, 4: 3e-4, 8: 1.5e-4},
    "grpo": {1: 1e-3, 2: 5e-4, 4: 3e-4, 8: 2e-4},
    "tbrm": {8: 7.5e-5},
}
REVAL, REVAL_1 = "algo=reval updates=8", "algo=reval updates=1 buffer=1"
GRPO, GRPO_1 = "algo=grpo updates=8", "algo=grpo updates=1"
TBRM = "algo=tbrm updates=8"
LOG = f"{REVAL} buffer=30"
STUDIES = {
    "replay": [f"algo=reval updates={k}" for k in (8, 4, 2)]
    + [f"algo=reval updates={k} buffer=1" for k in (8, 4, 2, 1)]
    + [f"algo=grpo updates={k}" for k in (8, 4, 2, 1)],
    "calibration": [REVAL, TBRM, f"{REVAL} no-v", f"{REVAL} no-reward", f"{TBRM} no-reward"],
    "settings": [REVAL, *(f"{REVAL} beta={beta}" for beta in (0.005, 0.02, 0.2))]
    + [f"{REVAL} buffer={n}" for n in (1, 30)]
    + [f"{REVAL} ref-reset={n}" for n in (10, 5)],
    # Less the mean of the 7 others is centered at 7/8 of beta.
    "reward": [REVAL, f"{REVAL} reward=centered", f"{REVAL} reward=centered beta=0.04375"]
    + [f"{REVAL} reward=centered beta=0.02", f"{REVAL} recent-mean"]
    + [REVAL_1, f"{REVAL_1} reward=centered"],
    "one-rollout": [f"{x} prompts=128 rollouts=1" for x in (REVAL, GRPO, GRPO_1)]
    + [REVAL, GRPO, GRPO_1],
    "off-policy": [LOG, f"{LOG} log", f"{LOG} other-log", f"{GRPO} buffer=30 log"],
    "real": ["algo=reval updates=2", "algo=reval updates=2 lr=2e-5", "algo=grpo updates=2"]
    + ["algo=grpo updates=2 lr=2e-5", "algo=reval updates=1 buffer=1 lr=2e-5", GRPO_1],
}
# The first 320 responses of README's example, with the model and the problems that it has made.
REAL = ["--preset=small", "--model=smollm2", "--data=larger.jsonl", "--steps=10", "--rollouts=4"]
REAL += ["--max-new-tokens=32", "--raw-prompt"]
REAL += [
    "--prompt=Which is larger, 12 or 7?\n#### 12<|im_end|>\n"
    "Which is larger, 35 or 81?\n#### 81<|im_end|>\n{problem}\n"
]


def config_of(variant, *words):
    """The Config of a variant, after other words of the command line."""
    flags = [f"--{word}" for word in variant.split() if word not in CHANGES]
    return rm.parse_args([*words, *flags])


def cell(args, variant, factor, seed):
    """The Config of one run of a study, in a folder named after it, as studies share their runs."""
    out = Path(args.out)
    base = ["--preset=toy", f"--model={out}/start{seed}/model"]
    if args.name == "real":
        base = REAL
    cfg = config_of(variant, *base, f"--seed={seed}")
    lr = factor * (cfg.lr if args.name == "real" else LR[cfg.algo][cfg.updates])
    words = [word for word in variant.split() if not word.startswith("lr=")]
    folder = out / ",".join([*words, f"lr={lr:g}", f"seed={seed}"])
    return dataclasses.replace(cfg, lr=lr, out=str(folder), eval_every=1000, save_every=1000)


def run_cell(cfg, variant=""):
    """Trains, unless that very run is there already."""
    config, end = Path(cfg.out, "config.json"), Path(cfg.out, "cpu_seconds")
    if end.exists() and json.loads(config.read_text()) == dataclasses.asdict(cfg):
        return
    shutil.rmtree(cfg.out, ignore_errors=True)  # of other settings, or broken off
    begin = time.process_time()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        for word in CHANGES.keys() & variant.split():
            patch.setattr(rm, *CHANGES[word])
        rm.train(cfg)
    for file in Path(cfg.out).rglob("*"):
        if file.stat().st_size > 1e8:
            file.unlink()  # the checkpoint and the weights of a real model
    end.write_text(str(time.process_time() - begin))


def study(args):
    """Every variant of a study from the same warm starts, at equal rollouts."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.name == "one-prompt":
        return one_prompt(args, out, seeds)
    if args.name != "real":
        starts = [[rm.Config(steps=0, seed=seed, out=f"{out}/start{seed}")] for seed in seeds]
        in_processes(run_cell, starts, args.jobs)
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
    if args.chart:  # a picture that GitHub draws; it has no legend
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
    words = ["--preset=toy", f"--model={start}/model", f"--seed={seed}"]
    cfg = config_of(f"{variant} prompts=1 warmup=2 half-life=0", *words)
    model, tokenizer = rm.load_model(cfg)
    run = rm.Run(cfg, model, [])
    for step in range(1, ROUNDS + 1):
        fresh = rm.collect(run, tokenizer, [problem] * cfg.rollouts, cfg, step)
        rm.learn(run, fresh, cfg, step)
        if success(model, tokenizer, [problem], 64, seed, step)[0] >= 0.95:
            break
    result.write_text(json.dumps(step))
    return step


def one_prompt(args, out, seeds):
    """The paper's Figures 2 and 3: rounds of 8 responses until one problem is solved, three
    problems of each difficulty, each method at its best of the learning rates. The start has more
    written work, as the default one has no easy problems; success is measured anew after the choice
    of the problems."""
    start = str(out / "one-prompt-start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "WRITTEN_SHARE", 0.4)
        run_cell(rm.Config(steps=0, out=start))
    model, tokenizer = rm.load_model(rm.Config(model=f"{start}/model"))
    problems = rm.load_problems(rm.Config())[0][:300]
    shares = success(model, tokenizer, problems, 128, 0, 0)
    chosen = []
    for name, level in DIFFICULTIES.items():
        nearest = sorted((abs(share - level), i) for i, share in enumerate(shares))[:3]
        chosen += [problems[i] for _, i in nearest]
        base = success(model, tokenizer, chosen[-3:], 256, 0, 0)
        print(f"base success, {name}: {', '.join(f'{share:.2f}' for share in base)}")
    cases = list(itertools.product(chosen, seeds))
    table = []
    for method in args.only or [GRPO_1, GRPO, *(f"algo=reval updates={k}" for k in (1, 2, 4, 8))]:
        tried = []  # total of the rounds, variant, and the rounds, case by case
        for factor in args.lr_factors:
            variant = f"{method} lr={factor * 3e-4:g}"
            rounds = in_processes(solve, [(start, variant, *case) for case in cases], args.jobs)
            tried.append((sum(rounds), variant, rounds))
        _, variant, rounds = min(tried)
        row = {"variant": variant, f"{ROUNDS} rounds": rounds.count(ROUNDS)}
        for i, name in enumerate(DIFFICULTIES):
            row[name] = rounds[i * len(cases) // 3 : (i + 1) * len(cases) // 3]
        table.append(row)
    for row, i in itertools.product(table, range(len(table[:2]))):
        ratios = [fmean(table[i][name]) / fmean(row[name]) for name in DIFFICULTIES]
        row[f"fewer than in row {i + 1}"] = ", ".join(f"{ratio:.1f}x" for ratio in ratios)
    print_table(table)


# ---- Evidence: python test_reval_min.py bench ----------------------------------------------------

DEVICE = "cuda" if rm.ON_GPU else "cpu"


def measure(work):
    """Runs work(). -> (seconds, peak bytes), of the GPU if there is one, else of this process."""
    if rm.ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated()
    import resource  # not there on Windows

    begin = time.process_time()
    work()
    return time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_q(form, N, D, A=151_936):
    """Q and V of N states, forward and backward. -> a row: best of 3 seconds, peak memory beside
    operands and gradients, error of log pi in nats"""
    torch.manual_seed(0)
    how = {"device": DEVICE, "dtype": torch.bfloat16 if rm.ON_GPU else torch.float32}
    hidden = torch.randn(N, D, **how).requires_grad_()
    weight = torch.randn(A, D, **how).mul_(3 * D**-0.5).requires_grad_()
    actions = torch.randint(A, (N,), device=DEVICE)

    def work():
        hidden.grad = weight.grad = None
        q, v = form(hidden, weight, actions)
        (q - v).sum().backward()

    _, before = measure(lambda: hidden @ weight[:9].T)  # cuBLAS takes its workspace
    seconds, peaks = zip(*(measure(work) for _ in range(3)), strict=True)
    extra = max(peaks) - before - (hidden.nbytes + weight.nbytes)
    q, v = form(hidden[:64], weight, actions[:64])
    exact_q, exact_v = rm.plain_q_and_v(hidden[:64].double(), weight.double(), actions[:64])
    error = (q - v - exact_q + exact_v).abs().max().item()
    size = {"form": form.__name__, "N": N, "D": D}
    return size | {"s": min(seconds), "extra MB": extra / 1e6, "error": error}


def bench(args):
    """q_from_logits and the plain form, each in a process of its own."""
    name = torch.cuda.get_device_name() if rm.ON_GPU else "CPU, 1 thread"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    N, D = (16384, 1536) if rm.ON_GPU else (2048, 896)
    forms = (rm.plain_q_and_v, rm.q_from_logits)
    print_table([in_processes(bench_q, [(form, N, D)])[0] for form in forms])


# ---- Evidence: torchrun --nproc_per_node 2 test_reval_min.py trl ---------------------------------

TRL = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
TRL |= {"max_completion_length": 12, "max_steps": 4, "learning_rate": 3e-2, "max_grad_norm": 0}
TRL |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def compare_trl(args):
    """README's trainer for more than one GPU, on a tiny model in args.out, without reward and then
    with it: prints how far each gradient is from that of `gradient`, on the responses of all ranks.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import trl
    from accelerate.utils import gather_object

    plain = trl.GRPOConfig
    trl.GRPOConfig = lambda out, **settings: plain(out, **(settings | TRL))
    text = (HERE / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)trainer.train\(\)\n```", text, re.DOTALL)[1]
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
        return [float(trainer_state.global_step and len(text) % 2) for text in completions]

    class Compare(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            batch = []
            for part in trainer._buffered_inputs:
                for i, signal in enumerate(part["advantages"]):
                    t = {"problem": "", "step": 0, "signal": signal}
                    t["prompt"] = part["prompt_ids"][i][part["prompt_mask"][i].bool()]
                    t["response"] = part["completion_ids"][i][part["completion_mask"][i].bool()]
                    batch.append(t)
            batch = gather_object(batch)
            model.load_state_dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
            rm.cache_values(reference, batch, cfg, "ref")
            stats = rm.gradient(model, list(model.parameters()), batch, cfg)
            expected = flat_grad(model.parameters()) * max(1, stats["grad_norm"])
            off = (flat_grad(trainer.model.parameters()) - expected).norm().item()
            signals = [t["signal"].item() for t in batch]
            line = json.dumps(stats | {"off": off, "signals": signals}) + "\n"
            print(line, end="", flush=True)  # in one write, as the ranks share it

    trainer.reward_funcs[0] = paid_later
    trainer.add_callback(Compare())
    trainer.train()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_of_the_readme(ranks, tmp_path):
    """Its gradient is that of reval_loss on the responses of all ranks, in micro-batches, with
    padding on the left and after updates; without reward it is 0. What was cut earns nothing."""
    pytest.importorskip("trl")
    saved_model(tmp_path / "model", "Qwen2", vocab_size=400)
    transformers.GenerationConfig(eos_token_id=[*range(1, 40)]).save_pretrained(tmp_path / "model")
    json_lines(tmp_path / "problems.jsonl", SUMS)
    script = [str(HERE / "test_reval_min.py"), "trl", "--out", str(tmp_path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert len(rows) == 4 * ranks and all(len(row["signals"]) == 8 * ranks for row in rows)
    for row in rows[: 2 * ranks]:
        assert max(row["off"], row["grad_norm"], row["residual"]) < 1e-5
    for row in rows[2 * ranks :]:
        assert row["grad_norm"] > 0.1 and row["off"] < 1e-4 * row["grad_norm"]
    assert {x % 0.25 for x in rows[-1]["signals"]} == {0}  # groups of 4, less their means
    assert abs(rows[-1]["kl"]) > 0.01


def test_bench_runs():
    """Its parts, in small."""
    for form in (rm.plain_q_and_v, rm.q_from_logits):
        row = bench_q(form, 32, 8, 300)
        assert row["s"] > 0 and row["error"] < 0.1


def test_studies_run(tmp_path, monkeypatch, capsys):
    """A study prints a row for each variant; called again it takes its runs from the disk."""
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "in_processes", lambda f, calls, jobs: [f(*call) for call in calls])

    def make_problem(generator, held_out):
        return {"problem": "12+34+56=?" if held_out else "56+34+12=?", "answer": "102"}

    monkeypatch.setattr(rm, "make_problem", make_problem)
    monkeypatch.setattr(rm, "distill", lambda *_: None)
    figures = {"accuracy": 0.5, "stderr": 0.1}
    monkeypatch.setattr(rm, "evaluate", lambda *_: figures)
    variant = "algo=reval updates=1 steps=1 prompts=2 rollouts=2"
    monkeypatch.setitem(STUDIES, "reward", [variant, f"{variant} no-reward"])
    argv = ["study", "reward", "--seeds=2", "--chart", f"--out={tmp_path}"]
    main(argv)
    printed = capsys.readouterr().out
    assert printed.count("| algo=reval") == 2
    monkeypatch.setattr(rm, "train", None)
    main(argv)
    assert capsys.readouterr().out == printed


def test_changes_of_the_studies():
    """What the words in a variant change is what their functions say."""
    q, v, q_ref, v_ref, reward, mask = values()
    loss, _ = no_v(q, v, q_ref, v_ref, reward, mask, 0.1)
    log_ratio = (q - v - q_ref + v_ref).masked_fill(~mask, 0).sum(1)
    expected = 0.1 / 2 * (log_ratio - reward / 0.1).square().mean()
    assert loss.item() == pytest.approx(expected.item())
    batch = [{"reward": 1.0}]
    no_reward(batch, rm.Config())
    assert batch[0]["signal"] == 0


def test_one_prompt_cell(start, monkeypatch):
    """It ends when the problem is solved or the rounds are over."""
    monkeypatch.setattr(sys.modules[__name__], "ROUNDS", 2)
    problem = {"problem": "12+34+56=?", "answer": "102"}
    assert solve(start, "algo=reval updates=2", problem, 0) == 2
    monkeypatch.setattr(rm, "is_correct", lambda text, gold: text.endswith("}"))
    assert solve(start, "algo=grpo updates=1", problem, 0) == 1


def main(argv):
    parser = argparse.ArgumentParser(description="The evidence behind the README's tables.")
    add = parser.add_argument
    add("command", choices=["study", "bench", "trl"])
    add("name", nargs="?", default="replay", choices=[*STUDIES, "one-prompt"], help="of a study")
    add("--seeds", type=int, default=5, help="how many (default 5)")
    add("--first-seed", type=int, default=0, help="(default 0)")
    add("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    add("--lr-factors", nargs="+", type=float, default=[1.0], help="of the learning rates")
    add("--chart", action="store_true", help="the rewards, as a mermaid picture")
    add("--jobs", type=int, default=1, help="processes side by side (default 1)")
    add("--out", default="runs/evidence", help="finished runs are kept here")
    args = parser.parse_args(argv)
    {"study": study, "bench": bench, "trl": compare_trl}[args.command](args)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Tests and evidence for reval_min.py.

    python -m pytest -q                      the tests: no network, no GPU, under two minutes of CPU
    python test_reval_min.py study NAME      a table of the README: one-prompt, replay, calibration,
                                             beta, buffer, reward, reset, one-rollout, compare
    python test_reval_min.py bench           speed and memory of the parts
    python test_reval_min.py faults          50 kills of running programs, and what is lost by them

Each test names the claim of the tutorial that it checks. The numbers of the README are printed by
the second kind of command.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import reval_min as rm

HERE = Path(__file__).parent
torch.set_num_threads(1)


# ---- Helpers -------------------------------------------------------------------------------------

def rows_of(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").open(encoding="utf-8")]


def timeless(rows):
    """Rows without what may differ between two runs of one seed."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def values():
    """Random q, v, q_ref, v_ref, reward, mask of the losses' shapes, rows of different lengths."""
    B, T, dtype = 4, 5, torch.float64
    torch.manual_seed(0)
    mask = torch.arange(T) < torch.arange(1, B + 1).clamp(max=T)[:, None]
    q, v, q_ref, v_ref = (torch.randn(B, T, dtype=dtype) for _ in range(4))
    return q, v + 3, q_ref, v_ref + 3, (torch.arange(B) % 2).to(dtype), mask


def trajectories(n=12, dtype=torch.float32):
    """Random trajectories of the tiny model's vocabulary, with cached values and a signal."""
    torch.manual_seed(0)
    made = []
    for i in range(n):
        T = 1 + i % 7
        made.append({"prompt": torch.randint(3, 19, (3 + i % 4,)), "problem": f"p{i}", "step": i,
                     "response": torch.randint(2, 19, (T,)), "signal": torch.tensor(i % 2.0),
                     "q_ref": torch.randn(T, dtype=dtype), "v_ref": torch.randn(T, dtype=dtype) + 3,
                     "q_old": torch.randn(T, dtype=dtype),
                     "v_old": torch.randn(T, dtype=dtype) + 3})
    return made


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A warm start of few steps, shared by every test that learns: the folder of its run."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert rm.main(["--steps", "0", "--distill-steps", "400", "--eval-problems", "512",
                    "--out", str(out)]) == 0
    return out


@pytest.fixture
def quick(start, tmp_path):
    """Config of a short run of the built-in task from the shared start."""
    numbers = itertools.count()

    def make(**changes):
        defaults = dict(model=str(start / "model"), steps=3, prompts=4, rollouts=4, updates=3,
                        buffer=3, eval_every=2, eval_problems=32, lr=1e-4, warmup=0)
        defaults["out"] = str(tmp_path / f"run{next(numbers)}")
        return rm.Config(**(defaults | changes))
    return make


def real_tokenizer(chat=False):
    """A byte-level BPE tokenizer as real models have, with an EOS that is also its pad token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(["What is 1 + 2? The answer is \\boxed{3}."] * 9, trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<user>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if chat:
        tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}"
                                   "{% endfor %}{% if add_generation_prompt %} A:{% endif %}")
    return tokenizer


def saved_model(folder, kind="Llama", chat=False, **changes):
    """Saves a tiny model of a real architecture and its tokenizer. -> the folder, as text."""
    tokenizer = real_tokenizer(chat)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                 max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**(sizes | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- The method: worked example, oracles, identities ---------------------------------------------

def test_example_of_the_docstring():
    """The numbers worked by hand at the head of the tutorial."""
    logits = torch.tensor([[1., 2, 5], [4, 2, 2]], dtype=torch.float64).log()
    reference = torch.tensor([[1., 1, 2], [1, 1, 2]], dtype=torch.float64).log()
    actions, eye = torch.tensor([1, 0]), torch.eye(3, dtype=torch.float64)
    (q, v), (q_ref, v_ref) = (rm.q_from_logits(x, eye, actions) for x in (logits, reference))
    assert torch.allclose(v.exp(), torch.tensor([8., 8], dtype=torch.float64))
    assert torch.allclose((q - v).exp(), torch.tensor([1 / 4, 1 / 2], dtype=torch.float64))
    mask, reward = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    loss, info = rm.reval_loss(q[None], v[None], q_ref[None], v_ref[None], reward, mask, beta=0.5)
    by_hand = math.log(8) - math.log(4) + math.log(1 / 8) - math.log(1 / 16) - 1 / 0.5
    assert info["residual"].item() == pytest.approx(by_hand) == pytest.approx(-0.6137, abs=5e-5)
    assert loss.item() == pytest.approx(0.5 / 2 * by_hand**2) == pytest.approx(0.0942, abs=5e-5)
    assert f"= {by_hand:.4f}" in rm.__doc__ and f"loss = {loss.item():.4f}" in rm.__doc__
    # Token by token: the first is where the target wants it, the second falls short of r / beta.
    target = rm.bellman_target(v[None], q_ref[None], v_ref[None], reward, mask, beta=0.5)
    assert torch.allclose(target, torch.tensor([[math.log(2), 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_q_from_logits_equals_the_plain_form(block):
    """Q, V and their gradients, for blocks that divide the vocabulary, do not, and exceed it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    actions = torch.tensor([0, 6, 3, 3, 5])
    hidden.requires_grad_(), weight.requires_grad_()
    mix = torch.randn(2, 5, dtype=torch.float64)
    logits = hidden @ weight.T
    plain = torch.stack([logits.gather(1, actions[:, None])[:, 0], logits.logsumexp(1)])
    ours = torch.stack(rm.q_from_logits(hidden, weight, actions, block))
    assert torch.allclose(ours, plain, rtol=1e-12)
    expected = torch.autograd.grad((plain * mix).sum(), (hidden, weight))
    found = torch.autograd.grad((ours * mix).sum(), (hidden, weight))
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda h, w: rm.q_from_logits(h, w, actions, block), (hidden, weight))


def test_q_from_logits_precision_and_errors():
    """float32 out of bfloat16 in, gradients in the operands' types; misuse is told."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    hidden.requires_grad_(), weight.requires_grad_()
    actions = torch.arange(6)
    q, v = rm.q_from_logits(hidden, weight, actions, block=16)
    exact = rm.q_from_logits(hidden.double(), weight.double(), actions)
    assert q.dtype == v.dtype == torch.float32
    assert (q - exact[0]).abs().max() < 1e-5 and (v - exact[1]).abs().max() < 1e-5
    (q - v).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="hidden"):
        rm.q_from_logits(hidden, weight, torch.arange(5))
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            rm.q_from_logits(hidden, weight, torch.full((6,), outside))


def test_q_from_logits_never_holds_the_logits():
    """No tensor it makes, forward or backward, has more than N x block or A x D elements."""
    from torch.utils._python_dispatch import TorchDispatchMode
    N, D, A, block = 64, 2, 4000, 100
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(A, D, requires_grad=True)
    with Watch():
        q, v = rm.q_from_logits(hidden, weight, torch.arange(N), block)
        (q - v).sum().backward()
    assert 0 < largest <= max(N * block, A * D) < N * A


def slow_residuals(q, v, q_ref, v_ref, reward, mask, beta, calibrated=True):
    """Eq. (2) as it is printed, one trajectory and one token at a time, in Python floats."""
    out = []
    for i in range(len(q)):
        total = v[i, 0].item() - calibrated * v_ref[i, 0].item() - reward[i].item() / beta
        for h in range(q.shape[1]):
            if mask[i, h]:
                total += (q[i, h] - v[i, h]).item() - (q_ref[i, h] - v_ref[i, h]).item()
        out.append(total)
    return out


def test_losses_equal_slow_oracles():
    """reval_loss (calibrated or TBRM), bellman_target and grpo_loss against plain loops."""
    q, v, q_ref, v_ref, reward, mask = values()
    for calibrated in (True, False):
        loss, info = rm.reval_loss(q, v, q_ref, v_ref, reward, mask, 0.1, calibrated)
        slow = slow_residuals(q, v, q_ref, v_ref, reward, mask, 0.1, calibrated)
        assert info["residual"].tolist() == pytest.approx(slow, rel=1e-10)
        assert loss.item() == pytest.approx(0.1 / 2 * fmean(x * x for x in slow), rel=1e-10)
    target = rm.bellman_target(v, q_ref, v_ref, reward, mask, 0.1)
    for i, length in enumerate(mask.sum(1).tolist()):
        for h in range(length):
            end = h == length - 1  # the paper's operator, term by term
            expected = (reward[i] / 0.1 * end + (q_ref - v_ref)[i, h] + v_ref[i, h]
                        - (0 if end else v_ref[i, h + 1]) + (0 if end else v[i, h + 1]))
            assert target[i, h].item() == pytest.approx(expected.item(), rel=1e-10)
    slow = 0
    for i in range(len(q)):
        for h in range(int(mask[i].sum())):
            ratio = math.exp(q[i, h] - q_ref[i, h])
            gain = min(ratio * v[i, 0], min(max(ratio, 0.8), 1.28) * v[i, 0])
            slow -= gain.item() / 7
    loss, info = rm.grpo_loss(q, q_ref, v[:, 0], mask, n_tokens=7)
    assert loss.item() == pytest.approx(slow, rel=1e-10) and 0 < info["clipped"] <= 10 / 7


@pytest.mark.parametrize("calibrated", [True, False])
def test_loss_gradients_equal_finite_differences(calibrated):
    """Nothing is detached: gradients flow through every Q and V that enters."""
    q, v, q_ref, v_ref, reward, mask = values()
    inputs = (q.requires_grad_(), v.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, v: rm.reval_loss(q, v, q_ref, v_ref, reward, mask, 0.1, calibrated)[0], inputs)
    assert torch.autograd.gradcheck(
        lambda q: rm.grpo_loss(q, q_ref, reward - 0.5, mask, 10)[0], (q,))


def test_stepwise_residuals_telescope():
    """The sum of Q - T Q over the tokens is eq. (2), although no single one is."""
    q, v, q_ref, v_ref, reward, mask = values()
    steps = (q - rm.bellman_target(v, q_ref, v_ref, reward, mask, 0.1)) * mask
    whole = torch.tensor(slow_residuals(q, v, q_ref, v_ref, reward, mask, 0.1), dtype=q.dtype)
    assert torch.allclose(steps.sum(1), whole) and (steps[1:, 0] - whole[1:]).abs().min() > 0.01


def test_calibrated_start_is_exactly_zero():
    """Model = reference and r = 0: loss and gradient are 0.0, not nearly; TBRM's are not."""
    model, _ = rm.make_model(0)
    batch = trajectories()
    q, v, mask = rm.score(model, batch)
    zero = torch.zeros(len(batch))
    for calibrated in (True, False):
        loss, info = rm.reval_loss(q, v, q.detach(), v.detach(), zero, mask, 0.05, calibrated)
        gradient = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        largest = max(g.abs().max().item() for g in gradient)
        if calibrated:
            assert loss.item() == 0 and largest == 0
        else:  # what is left is V_ref(s_1)
            assert torch.allclose(info["residual"], v[:, 0].detach(), atol=1e-5) and largest > 1e-4


def test_calibration_survives_the_loop(quick, monkeypatch):
    """The same through train: fresh and replayed batches, split differently, across a reset. The
    learning rate is next to nothing, as Adam makes a full step even of rounding noise."""
    monkeypatch.setattr(rm, "is_correct", lambda response, gold: False)
    gradient, residuals = rm.gradient, []
    monkeypatch.setattr(rm, "gradient", lambda *args: (
        residuals.append(gradient(*args)) or residuals[-1]))
    cfg = quick(steps=4, ref_reset=2, micro_batch_tokens=200, lr=1e-9)
    rm.train(cfg)
    assert len(residuals) == 12
    for stats in residuals:
        assert max(abs(stats[key]) for key in ("residual", "kl", "v_gap")) < 1e-4
    cfg = quick(steps=2, algo="tbrm", lr=1e-9)
    rm.train(cfg)
    assert rows_of(cfg.out)[1]["residual"] > 1


def test_first_gradient_is_reinforce():
    """With the centered reward the first gradient is REINFORCE's with a group-mean baseline."""
    model, _ = rm.make_model(0)
    model.double()
    batch = [t | {"prompt": torch.tensor([1, 5, 6])} for t in trajectories(8)]  # one group
    q, v, mask = rm.score(model, batch)
    reward = torch.tensor([1., 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    centered = reward - reward.mean()
    loss, _ = rm.reval_loss(q, v, q.detach(), v.detach(), centered, mask, beta=0.05)
    reinforce = -(centered * ((q - v) * mask).sum(1)).mean()
    ours, theirs = (torch.autograd.grad(x, list(model.parameters()), retain_graph=True)
                    for x in (loss, reinforce))
    ours, theirs = (torch.cat([g.flatten() for g in x]) for x in (ours, theirs))
    assert (ours - theirs).norm() < 1e-6 * theirs.norm() and theirs.norm() > 0.1


def test_later_states_have_no_level():
    """A constant on all logits of a later state moves its Q and V alike and changes nothing; on
    the first state it changes the loss."""
    q, v, q_ref, v_ref, reward, mask = values()
    shift = torch.randn(q.shape, dtype=q.dtype)
    later = shift * (torch.arange(q.shape[1]) > 0)
    loss, shifted, moved = (rm.reval_loss(q + x, v + x, q_ref, v_ref, reward, mask, 0.1)[0]
                            for x in (0, later, shift))
    assert torch.allclose(loss, shifted, rtol=1e-12) and not torch.allclose(loss, moved)


def test_fixed_point_from_off_policy_data():
    """From data that no policy wrote (every response once), a table of logits converges to
    pi_ref exp(r / beta) / Z, and V(s_1) rises by log Z."""
    A, beta = 3, 0.5
    torch.manual_seed(0)
    first, second = torch.randn(A, dtype=torch.float64), torch.randn(A, A, dtype=torch.float64)
    reward = torch.tensor([1., 0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    a1, a2 = torch.arange(9) // 3, torch.arange(9) % 3
    mask = torch.ones(9, 2, dtype=torch.bool)

    def q_and_v(first, second):
        q = torch.stack([first[a1], second[a1, a2]], 1)
        return q, torch.stack([first.logsumexp(0).expand(9), second.logsumexp(1)[a1]], 1)
    q_ref, v_ref = q_and_v(first, second)
    table = [first.clone().requires_grad_(), second.clone().requires_grad_()]
    optimizer = torch.optim.LBFGS(table, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = rm.reval_loss(*q_and_v(*table), q_ref, v_ref, reward, mask, beta)[0]
        loss.backward()
        return loss
    optimizer.step(closure)
    q, v = q_and_v(*table)
    pi_ref, pi = ((x - y).sum(1).exp() for x, y in ((q_ref, v_ref), (q, v)))
    Z = (pi_ref * (reward / beta).exp()).sum()
    assert torch.allclose(pi, pi_ref * (reward / beta).exp() / Z, atol=1e-6)
    assert (v - v_ref)[0, 0].item() == pytest.approx(Z.log().item(), abs=1e-5)


def test_padding_and_masks():
    """Nan in the padding reaches neither loss nor gradient; a broken mask is refused."""
    q, v, q_ref, v_ref, reward, mask = values()
    clean = rm.reval_loss(q, v, q_ref, v_ref, reward, mask, 0.1)[0]
    dirty = [x.masked_fill(~mask, torch.nan).requires_grad_() for x in (q, v, q_ref, v_ref)]
    for loss in (rm.reval_loss(*dirty, reward, mask, 0.1)[0],
                 rm.grpo_loss(dirty[0], dirty[2], reward, mask, 10)[0]):
        dirty[0].grad = None
        loss.backward()
        assert loss.isfinite() and dirty[0].grad.isfinite().all()
        assert not dirty[0].grad[~mask].any() and dirty[0].grad[mask].any()
    assert rm.reval_loss(*dirty, reward, mask, 0.1)[0].item() == clean.item()
    for bad in ([[True, False], [False, False]], [[True, True], [False, True]], [[], []]):
        bad = torch.tensor(bad, dtype=torch.bool)
        x = torch.zeros(bad.shape)
        with pytest.raises(ValueError, match="mask"):
            rm.reval_loss(x, x, x, x, torch.zeros(2), bad, 0.1)


@pytest.mark.parametrize("algo", ["reval", "tbrm", "grpo"])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_batch_layout_does_not_matter(algo, dtype, rtol):
    """The gradient is the same for any micro-batch size, batch order and padding."""
    model, _ = rm.make_model(0)
    model.to(dtype)
    batch = trajectories(dtype=dtype)
    cfg, masters = rm.Config(algo=algo), list(model.parameters())
    stats = rm.gradient(model, masters, batch, cfg)
    whole = flat_grad(model).clone()
    for layout, tokens in ((batch, 1), (batch[::-1], 30), (batch[5:] + batch[:5], 10**6)):
        small = dataclasses.replace(cfg, micro_batch_tokens=tokens)
        again = rm.gradient(model, masters, layout, small)
        assert (flat_grad(model) - whole).norm() < rtol * whole.norm()
        for key in set(stats) - {"residual"} if algo == "grpo" else stats:
            assert again[key] == pytest.approx(stats[key], rel=100 * rtol, abs=1e-5)
    assert len(rm.micro_batches(batch, 30)) > 2
    assert sum(rm.micro_batches(batch, 30), []) == sorted(
        batch, key=lambda t: len(t["prompt"]) + len(t["response"]))


def test_score_reads_the_state_before_each_token():
    """score = the plain log-softmax of the model's own logits, one unpadded sequence at a time."""
    model, _ = rm.make_model(0)
    batch = trajectories()
    q, v, mask = rm.score(model, batch)
    assert mask.sum(1).tolist() == [len(t["response"]) for t in batch]
    for i, t in enumerate(batch):
        P, T = len(t["prompt"]), len(t["response"])
        logits = model(input_ids=torch.cat([t["prompt"], t["response"]])[None]).logits[0]
        logp = logits.log_softmax(-1)[torch.arange(P - 1, P + T - 1), t["response"]]
        assert torch.allclose((q - v)[i, :T], logp, atol=1e-5)
        assert torch.allclose(v[i, :T], logits[P - 1:P + T - 1].logsumexp(-1), atol=1e-5)
        assert not q[i, T:].any() and not v[i, T:].any()


def test_not_finite_stops_before_the_step(quick, monkeypatch, capsys):
    """A nan stops the run in one line that names the trajectory; the weights stay as they were."""
    model, _ = rm.make_model(0)
    batch = trajectories()
    batch[4]["q_ref"][0] = torch.nan
    with pytest.raises(FloatingPointError, match="step 4 to 'p4'"):
        rm.gradient(model, list(model.parameters()), batch, rm.Config())
    steps = []
    plain = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), plain(self)))
    add_signals = rm.add_signals

    def poisoned(fresh, cfg):
        add_signals(fresh, cfg)
        fresh[2]["signal"] = torch.tensor(torch.nan)
    monkeypatch.setattr(rm, "add_signals", poisoned)
    monkeypatch.setattr(rm, "parse_args", lambda argv: quick())
    assert rm.main([]) == 2 and not steps
    assert re.fullmatch(r"reval_min: error: .*step 1 to '\d+.*\n", capsys.readouterr().err)


def test_bfloat16_micro_batches_add_up_in_float32():
    """64 micro-batches of a bfloat16 model: its masters hold the sum of their gradients to float32
    precision. What is left to a float32 model is the rounding inside the 64 passes, 1 to 1.5 %."""
    cpu, (model, _) = torch.device("cpu"), rm.make_model(0)
    low, plain = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16()
    model.load_state_dict(low.state_dict())
    masters, own = rm.master_weights(low, cpu), rm.master_weights(model, cpu)
    assert all(a is b for a, b in zip(own, model.parameters()))
    batch, total = trajectories(64), 0
    for t in batch:
        for part in (low, plain):
            part.zero_grad()
            (lambda q, v, mask: (q - v).sum().backward())(*rm.score(part, [t]))
        total = total + flat_grad(plain).double()
    found = torch.cat([w.grad.flatten() for w in masters])
    assert found.dtype == torch.float32 and all(p.grad is None for p in low.parameters())
    assert (found - total).norm() < 1e-6 * total.norm()
    rm.cache_values(model, batch, rm.Config(), "ref")
    rm.cache_values(model, batch, rm.Config(), "old")
    for algo in ("reval", "grpo"):
        rm.gradient(model, own, batch, rm.Config(algo=algo))
        rm.gradient(low, masters, batch, rm.Config(algo=algo, micro_batch_tokens=1))
        found, exact = (torch.cat([w.grad.flatten() for w in ws]) for ws in (masters, own))
        assert (found - exact).norm() < 0.02 * exact.norm()


def test_master_weights_keep_small_steps():
    """At a learning rate of 1e-6 a bfloat16 weight never moves; with masters it follows float32."""
    def trained(dtype, with_masters, steps=300):
        model = rm.make_model(0)[0].bfloat16().to(dtype)
        masters = rm.master_weights(model, model.device) if with_masters else list(
            model.parameters())
        optimizer = torch.optim.AdamW(masters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            for w in masters:
                w.grad = (torch.rand(w.shape, generator=generator) + 1).to(w.dtype)
            rm.update(model, masters, optimizer)
        return torch.cat([w.flatten() for w in model.parameters()]).float().detach()
    begin = trained(torch.bfloat16, False, steps=0)
    exact, kept, lost = (trained(torch.float32, False), trained(torch.bfloat16, True),
                         trained(torch.bfloat16, False))
    assert (exact - begin).abs().mean() == pytest.approx(3e-4, rel=0.1)
    assert torch.equal(kept, exact.bfloat16().float()) and not torch.equal(kept, begin)
    large = begin.abs() > 0.01  # an update of 1e-6 is less than half a step of these
    assert torch.equal(lost[large], begin[large]) and not torch.equal(kept[large], begin[large])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rehearsal_changes_nothing(dtype):
    """Weights, masters, step count, moments and random draws stay; the state is allocated."""
    model = rm.make_model(0)[0].to(dtype)
    masters = rm.master_weights(model, model.device)
    optimizer = torch.optim.AdamW(masters, lr=0.0, betas=(0.9, 0.95), weight_decay=0, fused=True)
    before = [w.detach().clone() for w in [*model.parameters(), *masters]]
    torch.manual_seed(0)
    state, seen, score = torch.get_rng_state(), [], rm.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "score", lambda model, batch: seen.append(batch) or score(model, batch))
        rm.rehearse(model, masters, optimizer, torch.arange(3, 14), rm.Config(
            micro_batch_tokens=200))
    assert len(seen) == 1 and len(seen[0]) == 200 // (11 + 28)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(before, [*model.parameters(), *masters]):
        assert torch.equal(a, b)
    assert len(optimizer.state) == len(masters)
    for s in optimizer.state.values():
        assert not s["step"] and not s["exp_avg"].any() and not s["exp_avg_sq"].any()


# ---- Rollouts ------------------------------------------------------------------------------------

def test_sampler_and_scorer_agree(quick):
    """The log-probabilities that generate sampled from are those of the scorer, q - v."""
    cfg = quick()
    model, tokenizer = rm.load_model(cfg, "cpu")
    prompt = rm.encode_prompt(tokenizer, "12+34+56=?", cfg)
    torch.manual_seed(0)
    out = model.generate(prompt[None].repeat(8, 1), max_new_tokens=12, output_scores=True,
                         return_dict_in_generate=True, attention_mask=torch.ones(8, len(prompt)))
    logp = torch.stack(out.scores, 1).log_softmax(-1)
    for sequence, rows in zip(out.sequences, logp):
        response = sequence[len(prompt):]
        q, v, _ = rm.score(model, [{"prompt": prompt, "response": response}])
        assert torch.allclose((q - v)[0], rows.gather(1, response[:, None])[:, 0], atol=1e-4)


def test_generation_config_of_the_model_is_ignored(tmp_path):
    """Whatever a model brings along, samples follow softmax(logits); only its EOS ids are kept."""
    folder = saved_model(tmp_path / "m", "Qwen2")
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, top_p=0.5, top_k=5, repetition_penalty=1.5,
        min_new_tokens=7, eos_token_id=[5, 1])
    settings.save_pretrained(folder)
    model, tokenizer = rm.load_model(rm.Config(model=folder), "cpu")
    assert model.generation_config.eos_token_id == [1, 5]
    prompt = torch.tensor([[3, 4, 6]])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20,
                         output_scores=True, output_logits=True, return_dict_in_generate=True)
    for scores, logits in zip(out.scores, out.logits):
        assert torch.equal(scores, logits)


def scripted(monkeypatch, model, *responses):
    """Makes model.generate return these responses, padded with the pad id, as generate does."""
    pad = model.generation_config.pad_token_id
    width = max(map(len, responses))

    def generate(tokens, **ignored):
        rows = [list(r) + [pad] * (width - len(r)) for r in responses]
        return torch.cat([tokens, torch.tensor(rows)], 1)
    monkeypatch.setattr(model, "generate", generate)


def test_ends_cuts_and_rewards(tmp_path, monkeypatch):
    """EOS is kept though it is the pad token too; what was cut earns nothing, boxed or not."""
    cfg = rm.Config(model=saved_model(tmp_path / "m"))
    model, tokenizer = rm.load_model(cfg, "cpu")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    box = tokenizer("\\boxed{3}", add_special_tokens=False)["input_ids"]
    other = tokenizer("well \\boxed{3}", add_special_tokens=False)["input_ids"]
    scripted(monkeypatch, model, box + [1], other, [1])
    problems = [{"problem": p, "answer": "3"} for p in ("a", "a longer one", "b")]
    done, cut, empty = rm.rollout(model, tokenizer, problems, cfg, 0, "test")
    assert done["response"].tolist() == box + [1] and done["ended"] and done["reward"] == 1
    assert cut["response"].tolist() == other and not cut["ended"] and cut["reward"] == 0
    assert rm.is_correct(cut["text"], "3")  # it was cut, or it would have counted
    assert empty["response"].tolist() == [1] and empty["ended"] and empty["reward"] == 0
    assert rm.score(model, [done, cut, empty])[2].sum(1).tolist() == [len(box) + 1, len(other), 1]


def test_prompts_of_different_lengths(quick):
    """Padding of a prompt changes nothing: greedy answers are those of the prompt alone."""
    cfg = quick()
    model, tokenizer = rm.load_model(cfg, "cpu")
    problems = [{"problem": p, "answer": ""} for p in ("12+34+56=?", "7+8=?", "99+98+97=?")]
    together = rm.rollout(model, tokenizer, problems, cfg, 0, "test", temperature=0)
    for problem, t in zip(problems, together):
        alone = rm.rollout(model, tokenizer, [problem], cfg, 0, "test", temperature=0)[0]
        assert t["text"] == alone["text"]


def test_chat_template_and_bos(tmp_path):
    """The chat template is used where there is one, with one BOS, unless --raw-prompt."""
    folder = saved_model(tmp_path / "m", chat=True)
    cfg = rm.Config(model=folder, preset="r1-distill-1.5b", prompt="Q: {problem} {x}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(rm.encode_prompt(tokenizer, "1 {+} 2?", cfg))
    assert text == "<s><user>Q: 1 {+} 2? {x} A:"
    raw = rm.encode_prompt(tokenizer, "1?", dataclasses.replace(cfg, raw_prompt=True))
    assert tokenizer.decode(raw) == "Q: 1? {x}"


def test_samplers_agree(quick):
    """Continuous batching and generate: the same greedy answers, and samples of softmax(logits)."""
    cfg = quick()
    model, tokenizer = rm.load_model(cfg, "cpu")
    prompts = [rm.encode_prompt(tokenizer, p, cfg) for p in ("12+34+56=?", "7+8=?", "9+98+97=?")]
    paged = dataclasses.replace(cfg, sampler="continuous")

    def greedy(cfg):
        return [tokenizer.decode(x).partition("<eos>")[0]
                for x in rm.sample(model, prompts, cfg, 0, temperature=0)]
    assert greedy(cfg) == greedy(paged) and all(greedy(cfg))
    model.generation_config.max_new_tokens = 1
    with torch.no_grad():
        logits = model(input_ids=prompts[0][None]).logits[0, -1] / 3
    n, share = 400, logits.softmax(-1)
    for way in (cfg, paged):  # temperature 3, so that there is more than one token to draw
        drawn = torch.cat(rm.sample(model, [prompts[0]] * n, way, 7, temperature=3.0))
        counts = torch.bincount(drawn, minlength=len(share))
        assert ((counts - n * share)**2 / (n * share + 1)).sum() < 45  # 18 degrees of freedom
        assert torch.equal(drawn, torch.cat(rm.sample(model, [prompts[0]] * n, way, 7, 3.0)))


@pytest.mark.parametrize("sampler", ["generate", "continuous"])
def test_new_weights_sample_next(quick, sampler):
    """The same prompt before and after an update: nothing computed from old weights is reused."""
    cfg = quick(sampler=sampler)
    model, tokenizer = rm.load_model(cfg, "cpu")
    prompt = rm.encode_prompt(tokenizer, "12+34+56=?", cfg)
    first = rm.sample(model, [prompt], cfg, 0, temperature=0)[0].tolist()
    other, _ = rm.make_model(1)
    for weight, new in zip(model.parameters(), other.parameters()):
        weight.data.copy_(new)
    second = rm.sample(model, [prompt], cfg, 0, temperature=0)[0].tolist()
    other.generation_config = model.generation_config
    assert first != second == rm.sample(other, [prompt], quick(), 0, temperature=0)[0].tolist()


def test_failed_continuous_batching_is_told(quick, monkeypatch, capsys):
    """generate_batch only logs what goes wrong in its thread; here it ends the run in one line."""
    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "generate_batch", lambda *a, **k: {})
    monkeypatch.setattr(rm, "parse_args", lambda argv: quick(sampler="continuous"))
    assert rm.main([]) == 2 and "--sampler generate" in capsys.readouterr().err


# ---- Buffer and schedule -------------------------------------------------------------------------

def test_buffer():
    """First in, first out; uniform, without replacement, removing nothing; seeded."""
    buffer = rm.ReplayBuffer(5, seed=1)
    buffer.add(range(3))
    assert len(buffer) == 3 and sorted(buffer.sample(10)) == [0, 1, 2] and len(buffer) == 3
    buffer.add(range(3, 8))
    assert buffer.items == [3, 4, 5, 6, 7]
    counts = dict.fromkeys(buffer.items, 0)
    for _ in range(2000):
        sample = buffer.sample(2)
        assert len(set(sample)) == 2
        for item in sample:
            counts[item] += 1
    chi2 = sum((n - 800)**2 / 800 for n in counts.values())
    assert chi2 < 18  # four degrees of freedom: one seed in a thousand would exceed it
    first, second = rm.ReplayBuffer(5, seed=1), rm.ReplayBuffer(5, seed=1)
    first.add(range(5)), second.add(range(5))
    assert [first.sample(3) for _ in range(4)] == [second.sample(3) for _ in range(4)]
    assert first.sample(3) != first.sample(3)


@pytest.mark.parametrize("algo", ["reval", "grpo"])
def test_schedule_and_reuse(algo, quick, monkeypatch):
    """Update 1 gets the fresh batch; the others the buffer, which holds it (GRPO: the fresh batch).
    Counted in train, a trajectory that has left the buffer was used about K times."""
    batches, gradient = [], rm.gradient

    def counted(model, masters, batch, cfg):
        batches.append(batch)
        return gradient(model, masters, batch, cfg)
    monkeypatch.setattr(rm, "gradient", counted)
    cfg = quick(algo=algo, steps=12, prompts=4, rollouts=2, updates=4, buffer=3, eval_every=100)
    rm.train(cfg)
    uses = {}
    for i, batch in enumerate(batches):
        step, update = i // 4 + 1, i % 4
        born = [t["step"] for t in batch]
        assert len(batch) == len({id(t) for t in batch}) == 8
        if update == 0 or algo == "grpo":
            assert set(born) == {step}
        assert step - 3 < min(born) and max(born) <= step
        for t in batch:
            uses[id(t)] = uses.get(id(t), 0) + 1
    finished = [n for t in {id(t): t for b in batches for t in b}.values()
                for n in [uses[id(t)]] if t["step"] <= 9 and t["step"] > 2]
    assert fmean(finished) == pytest.approx(4, abs=0 if algo == "grpo" else 0.6)
    ages = [row["age"] for row in rows_of(cfg.out)[1:]]
    assert ages == [None] * 12 if algo == "grpo" else ages[0] == 0 < ages[-1] < 2


def test_reference_reset_refreshes_the_cache(quick, monkeypatch):
    """After a reset the cached values of the whole buffer are those of the live model."""
    kept, cache_values = [], rm.cache_values

    def watched(model, batch, cfg, name):
        cache_values(model, batch, cfg, name)
        kept.append((model, batch))
    monkeypatch.setattr(rm, "cache_values", watched)
    rm.train(quick(steps=4, ref_reset=4, lr=1e-3))
    model, batch = kept[-1]
    assert len(kept) == 5 and len(batch) == 3 * 16 and {t["step"] for t in batch} == {2, 3, 4}
    q, v, mask = rm.score(model, batch)
    for i, t in enumerate(batch):
        assert torch.allclose(t["q_ref"], q[i][mask[i]], atol=1e-5)
        assert torch.allclose(t["v_ref"], v[i][mask[i]], atol=1e-5)
    old, _ = rm.load_model(quick(), "cpu")
    assert (rm.score(old, batch)[0] - q).abs().max() > 0.01


def test_signals():
    """Raw, centered within the group, or GRPO's advantage."""
    def signal(**settings):
        batch = [{"reward": r} for r in (1., 0, 0, 0, 1, 1, 1, 1)]
        rm.add_signals(batch, rm.Config(rollouts=4, **settings))
        return [t["signal"].item() for t in batch]
    assert signal() == [1, 0, 0, 0, 1, 1, 1, 1]
    assert signal(reward="centered") == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert signal(algo="grpo") == pytest.approx([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], abs=1e-4)


# ---- The checker, the problems, the settings -----------------------------------------------------

# The policy by example: answer, gold, verdict. An answer without a backslash at its head is a whole
# response; one that starts with "=" is what the box holds.
POLICY = [
    # Where the answer stands: the last box after the thought, else a tag, else ####, else words.
    (r"\boxed{5} or rather: \boxed{6}", "6", True), (r"\boxed{5}, no, \boxed{6}", "5", False),
    (r"<think>\boxed{5}</think> \boxed{6}", "5", False), (r"<think>\boxed{5}", "5", False),
    (r"</think> it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", True), (r"\boxed{5", "5", False),
    (r"I had 5, but \boxed{}", "5", False), ("<answer> 12 </answer>", "12", True),
    ("3 + 4 = 7\n#### 1,234", "1234", True), ("**Final answer:** 12.", "12", True),
    ("so the answer is C. Bye", "C", True), ("it must be 12", "12", False),
    # No hedging, no denial, no lists.
    (r"not \boxed{5}", "5", False), (r"\boxed{5} or \boxed{6}", "6", False),
    (r"\boxed{5} \text{ or } 6", "5", False), ("=5 or 6", "5", False), ("=5, 6", "5", False),
    ("The answer is not 5", "5", False),
    # Numbers compare as rationals, whatever their spelling.
    ("=0.50", r"\frac12", True), (r"=-\tfrac{1}{2}", "-.5", True), ("=007", "7", True),
    ("=1,234,567", "1234567", True), (r"=12\,345", "12345", True), ("=1{,}000.0", "1000", True),
    (r"=1\frac{1}{2}", "3/2", True), ("=1 1/2", "11/2", False), ("=1½", "1.5", True),
    ("=−3", "-3", True), ("=٣", "3", True), ("=1.5e-3", "0.0015", True),
    ("=1e-999999999", "0", False),
    (r"=0.1\overline{6}", "1/6", True), ("=0.333333", "1/3", True), ("=0.33", "1/3", False),
    ("=12345678901234567", "12345678901234568", False), ("=45.000001", "45", False),
    ("=1 2", "12", False), ("=(1, 234)", "1,234", False), ("=4210_7", "42107", False),
    # Closed forms and letters by value, text as text.
    (r"=\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}", True), (r"=2^{10}", "1024", True),
    (r"=\frac94\pi", r"\frac{9\pi}{4}", True), (r"=\pi", "3.14", False), ("=6!", "6", False),
    ("=9^{9^{9^9}}", "9", False), ("=x^2-1", "(x+1)(x-1)", True), ("=x+1", "x+2", False),
    ("=x", "X", False), (r"=\text{Monday}", "monday", True), ("=uneven", "even", False),
    (r"=\frac{1}{2x}", r"\frac{1}{2}x", False), ("=x^{2y}", "x^2y", False),
    (r"=2^\frac12", r"\sqrt{2}", True),
    ("=__import__('os')", "0", False), ("=AB", "BA", False),
    # Units, percent, currency, "x =": free to be left out, not to differ.
    (r"=10\text{ cm}", "10", True), ("=5 kg", "5 g", False), ("=5 minutes", "5 hours", False),
    ("=3 million", "3", False), ("=3 out of 4", "3", False), ("=5abc", "5", False),
    (r"=\$12.00", "12", True),
    (r"=45^\circ", "45 degrees", True), (r"=12\%", "0.12", True), ("=12", r"12\%", True),
    ("=12", "0.12", False), ("=x=5", "5", True), ("=x=5", "y=5", False), ("=6=7", "6", False),
    # Tuples and intervals keep order and brackets, sets have no order, matrices keep their shape.
    ("=(1,2)", "(2,1)", False), ("=[2,5)", "[2,5]", False), (r"=\{1,2\}", r"\{2,1\}", True),
    (r"=\left(-\infty, 3\right)", "(−∞,3)", True), (r"=6 \text{ and } 8", "6,8", True),
    (r"=\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", True),
    (r"=\begin{pmatrix}1&2&3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
    ("=x > 5", "5 < x", True), ("=x < 5", "x > 5", False), ("=1<x\\le 2", "(1,2]", True),
    # Multiple choice.
    ("=(C)", "C", True), (r"=\text{(B) } 12", "B", True), ("=c", "C", True),
    ("=D", "(D) Alina", True),
    ("=Carbon", "C", False), ("=A or B", "A", False)]


@pytest.mark.parametrize("answer, gold, verdict", POLICY)
def test_checker_policy(answer, gold, verdict):
    response = f"So $\\boxed{{{answer[1:]}}}$." if answer[0] == "=" else answer
    assert rm.is_correct(response, gold) is verdict


def test_checker_policy_is_balanced():
    assert 0.4 <= fmean(not verdict for *_, verdict in POLICY) <= 0.6


def test_checker_on_random_strings():
    """Any two strings give a bool; an answer equals itself, in a box, spaced or set in dollars."""
    parts = [*r"12 x,;()[]+-*/=<>%^_.!&A:e{}½²π∞٣", "\n", r"\boxed{", r"\frac", r"\sqrt", r"\{",
             r"\}", r"\text{", "or", "and", "<think>", "</think>", "####", "answer is", "<answer>",
             "</answer>", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "\0", "\ud800", "9" * 50,
             r"\in", r"\overline{", "E5"]
    generator = rm.rng(0, 0, "fuzz")
    for _ in range(4000):
        a, b = ("".join(generator.choice(parts, generator.integers(1, 12))) for _ in range(2))
        assert type(rm.is_correct(a, b)) is type(rm.is_correct(f"\\boxed{{{a}}}", b)) is bool
    for _, gold, _ in POLICY:
        for form in ("%s", " %s ", "$%s$", "{%s}", "\\displaystyle %s", "%s."):
            assert rm.is_correct("\\boxed{%s}" % (form % gold), gold), (form, gold)


def test_checker_takes_linear_time():
    """Four times the text takes about four times as long, not sixteen."""
    def best(n):
        times = []
        for _ in range(5):
            begin = time.process_time()
            rm.is_correct(text * n, "5")
            rm.is_correct(f"\\boxed{{{text * n}}}", text * (n - 1))
            times.append(time.process_time() - begin)
        return min(times)
    for text in ("\\boxed{", "{", "answer is ", "#### ", "<think>x</think>", "1", " ", "\\left"):
        n, seconds = 1000, 0
        while seconds < 0.02:
            n, seconds = 2 * n, best(2 * n)
        assert best(4 * n) < 12 * seconds, text


def test_built_in_task():
    """The teacher is always right, in the form the section shows; the two sets never meet."""
    assert rm.demonstrate("47+85+36=?", True) == r"7+5+6=18;4+8+3+1=16;\boxed{168}"
    assert rm.demonstrate("47+85+36=?", False) == r"\boxed{168}"
    train, held_out = rm.load_problems(rm.Config(eval_problems=500))
    for p in train[:500] + held_out:
        for written in (True, False):
            assert rm.is_correct(rm.demonstrate(p["problem"], written), p["answer"])
    keys = [{tuple(sorted(re.findall(r"\d+", p["problem"]))) for p in part}
            for part in (train, held_out)]
    assert len(keys[1]) > 450 and not keys[0] & keys[1]
    tokenizer = rm.make_model(0)[1]
    text = rm.demonstrate("99+98+97=?", True)
    ids = tokenizer(text + "<eos>", add_special_tokens=False)["input_ids"]
    assert len(ids) <= rm.Config().max_new_tokens and tokenizer.decode(ids[:-1]) == text


def test_reading_problems(tmp_path, monkeypatch, capsys):
    """JSONL and JSON, names in any case, GSM8K solutions, unusable rows dropped aloud, the hub."""
    rows = [{"Problem": "a", "ANSWER": 5, "level": 1}, {"question": "b", "answer": "so #### 1,200"},
            {"problem": "c", "answer": None}, {"problem": "d"}, {"problem": "a", "answer": "5"}, 7,
            {"problem": ["e"], "answer": "5"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    expected = [{"problem": "a", "answer": "5"}, {"problem": "b", "answer": "1,200"}]
    assert rm.read_problems(str(file)) == expected
    assert "dropped 5 of 7 rows" in capsys.readouterr().out
    file.write_text(json.dumps(rows), encoding="utf-8")
    assert rm.read_problems(str(file)) == expected
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *args, **kwargs: asked.append((args, kwargs)) or str(file))
    assert rm.read_problems("hf://datasets/org/name/sub/f.json") == expected
    assert asked == [(("org/name", "sub/f.json"), {"repo_type": "dataset"})]
    for text, message in (("{broken", "cannot be read"), ("{}", "no row")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(rm.UserError, match=message):
            rm.read_problems(str(file))


def test_held_out_part(tmp_path):
    """A seeded tenth is held out and never trained on; --eval-data replaces it."""
    file = tmp_path / "rows.json"
    rows = [{"problem": f"p{i}", "answer": i} for i in range(50)]
    file.write_text(json.dumps(rows), encoding="utf-8")
    split = [rm.load_problems(rm.Config(data=str(file), model="m", seed=s)) for s in (0, 0, 1)]
    assert split[0] == split[1] != split[2]
    train, held_out = ({p["problem"] for p in part} for part in split[0])
    assert len(held_out) == 5 and len(train) == 45 and not train & held_out
    cfg = rm.Config(data=str(file), eval_data=str(file), model="m", eval_problems=7)
    assert [len(part) for part in rm.load_problems(cfg)] == [50, 7]
    only = rm.Config(eval_data=str(file), model="m", steps=0)  # of the paper's preset, data unread
    assert [len(part) for part in rm.load_problems(only)] == [0, 50] and only.data


def test_refusals(tmp_path, capsys, monkeypatch):
    """Files, folders and devices that will not do: status 2, one line that names thing and mend."""
    good = saved_model(tmp_path / "good")
    for name, content in (("binary", b"\x80\xff\x00"), ("none", b""), ("scalar", b"5"),
                          ("line", b'{"problem": "a", "answer": "1"}\n\n{"problem":'),
                          ("array", b"[1, 2"), ("unanswered", b'{"problem": "a", "answer": null}'),
                          ("deep", b"[" * 10**5), ("file", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in ("untokenized", "unreadable"):
        saved_model(tmp_path / name)
    for file in (tmp_path / "untokenized").glob("*token*"):
        file.unlink()
    (tmp_path / "unreadable" / "model.safetensors").write_bytes(b"xx")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, words in (
            (["--data", "binary"], "binary: cannot be read"), (["--data", "none"], "no row"),
            (["--data", "scalar"], "no row"), (["--data", "line"], "line, line 3:"),
            (["--data", "array"], "array: cannot"), (["--data", "unanswered"], "no row"),
            (["--data", "deep"], "deep: cannot"), (["--data", "folder"], "folder: cannot"),
            (["--model", "folder"], "no causal LM"), (["--model", "file"], "no causal LM"),
            (["--model", "untokenized"], "tokenizer"), (["--model", "unreadable"], "unreadable"),
            (["--out", "file"], "name a new one"), (["--out", "file/x"], "name a new one"),
            (["--out", "folder"], "--resume"), (["--device", "cuda"], "--device cuda"),
            (["--master-device", "cuda"], "--master-device"),
            (["--ref-device", "cuda"], "--ref-device"), (["--micro-batch-tokens", "0"], "above 0"),
            (["--buffer", "0"], "--buffer"), (["--eval-top-p", "2"], "--eval-top-p")):
        assert rm.main((["--model", good] if argv[0] == "--data" else []) + argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("reval_min: error: ") and words in error and error.count("\n") == 1
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect\nsecond line")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    for argv in (["--data", "hf://datasets/a/b/c.json", "--model", "good"], ["--model", "a/b"]):
        assert rm.main(argv) == 2
        error = capsys.readouterr().err
        assert "needs no network" in error and error.count("\n") == 1

    def exhausted(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. And so on.")
    monkeypatch.setattr(rm, "train", exhausted)
    assert rm.main([]) == 2 and "--micro-batch-tokens" in capsys.readouterr().err


def test_settings(capsys):
    """Flags are the fields of Config: all in the help, all read by the code, checked once."""
    with pytest.raises(SystemExit):
        rm.main(["--help"])
    shown = capsys.readouterr().out
    code = (HERE / "reval_min.py").read_text(encoding="utf-8")
    for f in dataclasses.fields(rm.Config):
        assert "--" + f.name.replace("_", "-") in shown
        assert re.search(rf'(cfg|self)\.{f.name}\b|names = .*"{f.name}"', code)
    assert rm.parse_args([]) == rm.Config() and rm.Config().preset == "toy"
    paper = rm.parse_args(["--preset", "r1-distill-1.5b", "--updates", "4"])
    assert (paper.beta, paper.updates, paper.buffer, paper.lr) == (0.002, 4, 5, 1e-6)
    assert rm.parse_args(["--data", "f"]).preset == "r1-distill-1.5b"
    assert rm.parse_args(["--data", "f", "--raw-prompt"]).raw_prompt
    for argv, word in ((["--beta", "0"], "--beta"), (["--steps", "-1"], "--steps"),
                       (["--prompts", "x"], "--prompts"), (["--bogus"], "--bogus"),
                       (["--algo", "ppo"], "reval, tbrm, grpo"), (["--lr", "nan"], "--lr"),
                       (["--rollouts", "1", "--algo", "grpo"], "--rollouts"),
                       (["--rollouts", "1", "--reward", "centered"], "--rollouts"),
                       (["--prompt", "x"], "{problem}"), (["--out", str(HERE)], "--out"),
                       (["--preset", "toy", "--data", "f"], "--model"),
                       (["--data", "no/such/file"], "no/such/file"),
                       (["--preset", "toy", "--eval-data", "f"], "--model"),
                       (["--model", str(HERE / ".ci")], "--model")):
        assert rm.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("reval_min: error: ") and word in error and error.count("\n") == 1


# ---- Real models ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_real_models_train_from_disk(kind, tmp_path, monkeypatch):
    """Other architectures, a real tokenizer, a JSONL file: same code, and the weights move."""
    folder = saved_model(tmp_path / "m", kind, chat=kind == "Qwen2")
    # A random model knows nothing: let half of its tokens end a response, half of those be right.
    transformers.GenerationConfig(eos_token_id=list(range(1, 140))).save_pretrained(folder)
    monkeypatch.setattr(rm, "is_correct", lambda text, gold: "boxed" in text or len(text) % 2 == 0)
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"What is {i} + 1?", "answer": f"{i + 1}"})
                              for i in range(20)), encoding="utf-8")
    out = tmp_path / "out"
    assert rm.main(["--model", folder, "--data", str(file), "--steps", "2", "--prompts", "2",
                    "--rollouts", "2", "--updates", "2", "--max-new-tokens", "12", "--lr", "1e-3",
                    "--eval-problems", "2", "--device", "cpu", "--out", str(out)]) == 0
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [0, 1, 2] and abs(rows[1]["kl"]) < 1e-4
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(x)
                     for x in (folder, out / "model"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_checkpointing_and_dropout_change_nothing(tmp_path):
    """Activations made twice give the same gradient, and a model's own dropout is turned off."""
    folder = saved_model(tmp_path / "m", "Qwen2", attention_dropout=0.5)
    batch, gradients, calls = trajectories(), [], []
    for checkpointing in (False, True):
        cfg = rm.Config(model=folder, gradient_checkpointing=checkpointing)
        model, _ = rm.load_model(cfg, torch.device("cpu"))
        mlp = model.model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *ignored: calls.append(checkpointing))
        rm.gradient(model, list(model.parameters()), batch, cfg)
        gradients.append(flat_grad(model).clone())
        assert not model.training
    assert torch.equal(*gradients) and calls.count(True) == 2 * calls.count(False) > 0


def test_bfloat16_run_on_the_front_door(tmp_path, monkeypatch):
    """The 1.5B run's code in small: bfloat16, masters, checkpointing, and avg@n of the result."""
    folder = saved_model(tmp_path / "m", "Qwen2")
    transformers.GenerationConfig(eos_token_id=list(range(1, 140))).save_pretrained(folder)
    monkeypatch.setattr(rm, "is_correct", lambda text, gold: "box" in text or len(text) % 2 == 0)
    file, out = tmp_path / "p.json", tmp_path / "out"
    file.write_text(json.dumps([{"problem": f"{i} + 1?", "answer": i + 1} for i in range(9)]))
    argv = ["--model", folder, "--data", str(file), "--steps", "2", "--prompts", "2", "--rollouts",
            "2", "--max-new-tokens", "12", "--lr", "1e-4", "--eval-problems", "2", "--eval-samples",
            "4", "--dtype", "bfloat16", "--master-device", "cpu", "--ref-device", "cpu",
            "--device", "cpu", "--out", str(out)]
    assert rm.main(argv) == 0
    assert all(math.isfinite(row["loss"]) for row in rows_of(out)[1:])
    assert abs(rows_of(out)[1]["residual"]) < 500.01 and abs(rows_of(out)[1]["kl"]) < 0.05
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind, changes", [
    ("Gemma2", {}), ("Cohere", {"logit_scale": 0.1}), ("Phi", {}),
    ("Granite", {"logits_scaling": 8})])
def test_heads_that_do_not_fit_are_refused(kind, changes, tmp_path):
    """Soft caps, scales and biases between hidden @ lm_head.T and the logits are found."""
    folder = saved_model(tmp_path / "m", kind, **changes)
    if kind == "Phi":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(folder)
    with pytest.raises(rm.UserError, match="lm_head"):
        rm.load_model(rm.Config(model=folder), "cpu")


def test_evaluation_figures(tmp_path, monkeypatch):
    """avg@n, its standard error over problems and pass@k, against figures worked by hand; only
    evaluation has a temperature; --steps 0 leaves no model, which would be a copy."""
    right = {"a": [1, 0, 0, 0], "b": [1, 1, 0, 0], "c": [0, 0, 0, 0], "d": [1, 1, 1, 1]}
    left, asked = {key: list(value) for key, value in right.items()}, []

    def rollout(model, tokenizer, problems, cfg, step, purpose, temperature=1.0, top_p=1.0):
        asked.append((purpose, temperature, top_p))
        return [{**p, "text": "\\boxed{5}", "reward": float(left[p["problem"]].pop()),
                 "response": torch.ones(3 + len(left["a"])), "ended": p["problem"] != "c"}
                for p in problems]
    monkeypatch.setattr(rm, "rollout", rollout)
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"problem": p, "answer": "5"}) for p in right))
    out = tmp_path / "out"
    cfg = rm.Config(model=saved_model(tmp_path / "m"), eval_data=str(file), steps=0, eval_samples=4,
                    device="cpu", out=str(out))
    found = rm.train(cfg)
    assert asked == [("evaluation", 0.6, 0.95)]
    assert found["accuracy_after"] == pytest.approx(7 / 16)
    shares = [1 / 4, 2 / 4, 0, 1]
    error = math.sqrt(sum((x - 7 / 16)**2 for x in shares) / 4) / math.sqrt(4)
    assert found["stderr"] == pytest.approx(error)
    # Two of four at random: "a" is right in 3 of 6 pairs, "b" in 5 of 6.
    assert found["pass@2"] == pytest.approx((3 / 6 + 5 / 6 + 0 + 1) / 4)
    assert found["pass@4"] == pytest.approx(3 / 4) and "pass@1" not in found
    assert found["truncated"] == 1 / 4
    rows = [json.loads(line) for line in (out / "eval.jsonl").open(encoding="utf-8")]
    assert [row["right"] for row in rows] == [1, 2, 0, 4] and rows[0]["problem"] == "a"
    assert rows[0]["samples"][0] == {"answer": "5", "right": 0, "ended": True, "length": 6}
    assert not (out / "model").exists()


# ---- Through the front door ----------------------------------------------------------------------

def test_it_learns(start, quick, capsys):
    """A short run from the shared start raises held-out accuracy by far more than chance can."""
    cfg = quick(steps=8, prompts=16, rollouts=8, updates=8, buffer=15, eval_every=8,
                eval_problems=512, lr=1.5e-4, warmup=5)
    result = rm.train(cfg)
    gain = result["accuracy_after"] - result["accuracy_before"]
    assert gain > 0.1 and gain > 4 * math.sqrt(2) * max(result["stderr"], 0.01)
    rows = rows_of(cfg.out)
    assert rows[-1]["length"] > rows[1]["length"] + 3 and rows[-1]["v_gap"] > 0.2
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if re.match(r" {0,3}\d", line)]
    assert len(table) == 9 and max(map(len, table)) <= 100
    assert any(line.startswith("  right: ") for line in lines)
    assert any(line.startswith("  wrong: ") for line in lines)


def test_a_run_leaves_its_record(quick, capsys):
    """The files, the keys, and a model that loads, with nothing half-written beside it."""
    cfg = quick(steps=2)
    result = rm.train(cfg)
    out = Path(cfg.out)
    names = {p.name for p in out.iterdir()} - {"curves.png"}
    assert names == {"config.json", "metrics.jsonl", "eval.jsonl", "checkpoint.pt", "model"}
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert saved.pop("versions")["torch"] == torch.__version__ and rm.Config(**saved) == cfg
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"] == 2
    for row in rows_of(out):
        assert tuple(row) == tuple(rm.METRICS)
    last = rows_of(out)[-1]
    assert None not in last.values() and last["rollouts"] == 32 and last["updates"] == 6
    assert tuple(result) == ("accuracy_before", "accuracy_after", "stderr", "length", "truncated",
                             "steps", "rollouts", "updates", "tokens_generated", "seconds",
                             "tokens_per_second", "peak_memory_mb", "out")
    assert last["accuracy"] == result["accuracy_after"]
    again = rm.train(quick(model=str(out / "model"), steps=0))
    assert again["accuracy_before"] == again["accuracy_after"]


@pytest.mark.parametrize("algo", ["reval", "grpo"])
def test_same_seed_same_run(algo, quick):
    """To the bit, metrics and weights; and another evaluation or sample shifts nothing."""
    first, again, looked, other = (quick(algo=algo, **changes)
                                   for changes in ({}, {}, {"eval_every": 1}, {"seed": 1}))
    for cfg in (first, again, looked, other):
        rm.train(cfg)
    rows = [timeless(rows_of(cfg.out)) for cfg in (first, again, looked, other)]
    assert rows[0] == rows[1] and rows[0] != rows[3]
    for a, b in zip(rows[0], rows[2]):
        assert a | {"accuracy": b["accuracy"]} == b
    weights = [transformers.AutoModelForCausalLM.from_pretrained(cfg.out + "/model").state_dict()
               for cfg in (first, again, looked)]
    assert all(torch.equal(weights[0][k], w[k]) for w in weights[1:] for k in weights[0])


def test_runs_can_share_a_start(quick):
    """--model DIR continues exactly as the run would have that made DIR."""
    whole = quick(model=None, distill_steps=3, steps=2)
    made = quick(model=None, distill_steps=3, steps=0)
    rm.train(whole), rm.train(made)
    rest = quick(model=made.out + "/model", steps=2)
    rm.train(rest)
    assert timeless(rows_of(whole.out)) == timeless(rows_of(rest.out))


def test_the_script_from_an_empty_folder(tmp_path):
    """As a user runs it: a new folder per run under runs/, no network, no arguments but a size."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import socket\ndef refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n", encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, str(HERE / "reval_min.py"), "--steps", "1", "--distill-steps", "3",
               "--prompts", "2", "--rollouts", "2", "--updates", "2", "--eval-problems", "8"]
    for name in ("toy-reval-s0", "toy-reval-s0-2"):
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True, encoding="utf-8",
                              env=os.environ | {"PYTHONPATH": str(guard)})
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # progress bars are for terminals
        assert (empty / "runs" / name / "model" / "model.safetensors").exists()
        summary = dict(line.split(": ", 1) for line in done.stdout.splitlines()[-13:])
        assert summary["out"] == str(Path("runs") / name) and summary["steps"] == "1"


def test_bench_runs():
    """Its GPU parts, in small and on a CPU, so that they are known to work."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=512)
    seconds, extra, error = bench_q("cpu", "block 64", 32, 8, 300)
    assert seconds > 0 and error < 1e-5 and bench_q("cpu", "4 products", 32, 8, 300)[0] > 0
    for sampler in ("generate", "continuous"):
        assert min(bench_sampler("cpu", sampler, 4, 8, **small)) > 0
    assert len(bench_step("cpu", None, "cpu", n=8, T=16, **small)) == 6


def test_studies_run(tmp_path, monkeypatch, capsys):
    """A study's table from its cells; a second call takes them from the disk. The cells without
    reward have none, those of ours a constant more."""
    tiny = dict(lr=1e-4, steps=1, prompts=2, rollouts=2, updates=2, eval_problems=8)
    monkeypatch.setitem(STUDIES, "beta", {
        "plain": tiny, "none": tiny | dict(data="NO REWARD"), "ours": tiny | dict(plus=0.5)})
    config = dataclasses.replace(rm.Config(), distill_steps=3, eval_problems=8)
    monkeypatch.setattr(rm, "Config", lambda **changes: dataclasses.replace(config, **changes))
    monkeypatch.setattr(sys.modules[__name__], "run_cells", lambda cells, jobs, run=run_cell: {
        out: run(out, settings) for out, settings in cells.items()})
    signals, gradient = [], rm.gradient

    def watched(model, masters, batch, cfg):
        signals.append({t["signal"].item() - t["reward"] for t in batch})
        return gradient(model, masters, batch, cfg)
    monkeypatch.setattr(rm, "gradient", watched)
    argv = ["study", "beta", "--seeds", "2", "--out", str(tmp_path), "--chart"]
    main(argv)
    first = capsys.readouterr().out
    assert len([line for line in first.splitlines() if line[:2] == "| "]) == 4
    assert len(signals) == 12 and signals[:8] == [{0.0}] * 8 and signals[8:] == [{0.5}] * 4
    main(argv)
    assert capsys.readouterr().out == first and len(signals) == 12
    rewards = [t["answer"] for t in json.loads((tmp_path / "no_reward.json").read_text())]
    assert set(rewards) == {"-1"}


def test_one_prompt_cell(start, tmp_path):
    """It ends when the problem is solved or the rounds are over, and is not run twice."""
    problem = {"problem": "12+34+56=?", "answer": "102", "base": 0.1}
    settings = dict(algo="reval", updates=2, lr=1e-4, steps=2, seed=0, problem=problem,
                    model=str(start / "model"))
    result = one_prompt_cell(tmp_path / "cell", settings)
    assert result["rounds"] is None and len(result["others"]) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "train", None)
        assert one_prompt_cell(tmp_path / "cell", settings) == result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "is_correct", lambda text, gold: True)
        solved = one_prompt_cell(tmp_path / "other", settings)
    assert solved["rounds"] == 1


def test_the_file_itself():
    """Importing it does nothing, its lines fit, the docstring's commands parse."""
    code = (HERE / "reval_min.py").read_text(encoding="utf-8")
    for text in (code, Path(__file__).read_text(encoding="utf-8")):
        assert max(map(len, text.splitlines())) <= 100
    for document in (rm.__doc__, (HERE / "README.md").read_text(encoding="utf-8")):
        commands = re.findall(r"python reval_min\.py((?: +-?-?[\w./:-]+(?<!  ))*)", document)
        assert len(commands) > 3
        for words in commands:
            flags = [w for w in words.split() if w.startswith("--") and w != "--help"]
            known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(rm.Config)}
            assert set(flags) <= known, words


# ---- Nothing is lost -----------------------------------------------------------------------------

def weights_of(out):
    return transformers.AutoModelForCausalLM.from_pretrained(Path(out) / "model").state_dict()


def same_runs(a, b):
    """Metrics but for times, evaluations and weights, to the bit."""
    texts = [(Path(out) / "eval.jsonl").read_text(encoding="utf-8") for out in (a, b)]
    assert timeless(rows_of(a)) == timeless(rows_of(b)) and texts[0] == texts[1]
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def flags(cfg):
    """The command line of a Config."""
    return [word for f in dataclasses.fields(cfg) if f.name not in ("raw_prompt", "resume")
            and f.type is not bool and getattr(cfg, f.name) is not None
            for word in ("--" + f.name.replace("_", "-"), str(getattr(cfg, f.name)))]


@pytest.mark.parametrize("changes", [
    dict(), dict(ref_reset=2), dict(algo="grpo"), dict(dtype="bfloat16", algo="tbrm")])
def test_resume_is_exact(changes, quick, capsys):
    """N + M steps are N, stop, M: metrics, samples, evaluations and weights, to the bit."""
    whole, parts = quick(steps=6, eval_every=4, **changes), quick(steps=3, eval_every=4, **changes)
    assert rm.main(flags(whole)) == 0
    printed = capsys.readouterr().out
    assert rm.main(flags(parts)) == 0 and capsys.readouterr()
    assert rm.main(["--resume", parts.out, "--steps", "6"]) == 0
    resumed = capsys.readouterr().out
    same_runs(whole.out, parts.out)
    samples = [re.findall(r"  (?:right|wrong): .*", text) for text in (printed, resumed)]
    assert samples[0] == samples[1] != []
    # A run that is complete only writes its model again; its new total is remembered.
    shutil.rmtree(parts.out + "/model")
    assert rm.main(["--resume", parts.out]) == 0
    same_runs(whole.out, parts.out)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_after_the_iteration(number, quick, monkeypatch, capsys):
    """Ctrl-C or SIGTERM: the iteration is finished and kept; the run goes on exactly from it."""
    whole, parts = quick(steps=4), quick(steps=4)
    rm.train(whole)
    update, calls = rm.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # the first update of the second iteration
            signal.raise_signal(getattr(signal, number))
        update(*args)
    before = signal.getsignal(getattr(signal, number))
    monkeypatch.setattr(rm, "update", interrupted)
    assert rm.main(flags(parts)) == 130
    assert signal.getsignal(getattr(signal, number)) is before
    assert f"stopped after step 2; go on with --resume {parts.out}" in capsys.readouterr().err
    assert rm.main(["--resume", parts.out]) == 0
    same_runs(whole.out, parts.out)


def test_every_write_may_fail(quick, monkeypatch, capsys):
    """A full disk or a lost one at any write, flush or replace: one line, status 2, and the last
    checkpoint goes on to the very run that nothing disturbed."""
    whole = quick(steps=3, save_every=1)
    rm.train(whole)
    full = OSError(28, "No space left on device")
    plain = {"save": torch.save, "fsync": os.fsync, "replace": os.replace}
    counts = dict.fromkeys(plain, 0)

    def failing(name, at):
        def call(*args, **kwargs):
            counts[name] += 1
            if counts[name] == at:
                if name == "save":
                    args[1].write(b"half of a checkpoint")
                raise full
            return plain[name](*args, **kwargs)
        return call
    resumed = 0  # config.json is the first file, the first checkpoint the second
    for name, at in (("save", 1), ("save", 2), ("save", 4), ("fsync", 1), ("fsync", 2),
                     ("fsync", 4), ("replace", 1), ("replace", 3), ("replace", 5)):
        cfg = quick(steps=3, save_every=1)
        counts[name] = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch if name == "save" else os, name, failing(name, at))
            assert rm.main(flags(cfg)) == 2, (name, at)
        error = capsys.readouterr().err
        assert error.startswith("reval_min: error: ") and error.count("\n") == 1
        assert "No space left" in error and not list(Path(cfg.out).glob("*.part"))
        if Path(cfg.out, "checkpoint.pt").exists():
            assert rm.main(["--resume", cfg.out]) == 0
            same_runs(whole.out, cfg.out)
            resumed += 1
    assert resumed == 5
    cfg = quick(steps=3, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained",
                      lambda *args, **kwargs: (_ for _ in ()).throw(full))
        assert rm.main(flags(cfg)) == 2
    assert "make room, then --resume" in capsys.readouterr().err
    assert rm.main(["--resume", cfg.out]) == 0
    same_runs(whole.out, cfg.out)


def test_broken_checkpoints_are_refused(quick, tmp_path, capsys):
    """Truncated, tampered, foreign or hostile files: one line each, and nothing is executed."""
    cfg = quick(steps=2)
    rm.train(cfg)
    file, config = Path(cfg.out, "checkpoint.pt"), Path(cfg.out, "config.json")
    good, settings = file.read_bytes(), config.read_text(encoding="utf-8")
    state = torch.load(file, weights_only=True)

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    bad = {"empty": b"", "truncated": good[:len(good) // 2], "text": b"hello"}
    for name, value in {"hostile": Hostile(), "a list": [1], "no masters": state | {"masters": {}},
                        "a shape": state | {"masters": {k: torch.ones(2, 2)
                                                        for k in state["masters"]}}}.items():
        torch.save(value, tmp_path / "bad.pt")
        bad[name] = (tmp_path / "bad.pt").read_bytes()
    for name, content in bad.items():
        file.write_bytes(content)
        assert rm.main(["--resume", cfg.out, "--steps", "3"]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("reval_min: error: --resume ") and error.count("\n") == 1
        assert config.read_text(encoding="utf-8") == settings and len(rows_of(cfg.out)) == 3
    assert not (tmp_path / "executed").exists()
    file.unlink()
    for argv, word in ((["--resume", cfg.out], "No such file"),
                       (["--resume", str(tmp_path / "none")], "no run of this program"),
                       (["--resume", cfg.out, "--model", "m"], "--model"),
                       (["--resume", cfg.out, "--beta", "1"], "--beta")):
        assert rm.main(argv) == 2 and word in capsys.readouterr().err
    file.write_bytes(good)
    assert rm.main(["--resume", cfg.out, "--steps", "1"]) == 2
    assert "it is at step 2 already" in capsys.readouterr().err
    config.write_text("{}", encoding="utf-8")
    assert rm.main(["--resume", cfg.out]) == 2 and "no run" in capsys.readouterr().err


def test_changed_problems_are_refused(tmp_path, capsys):
    """A data file that has changed since would make another run of it."""
    folder, file = saved_model(tmp_path / "m"), tmp_path / "p.json"
    rows = [{"problem": f"{i} + 1?", "answer": i + 1} for i in range(20)]
    file.write_text(json.dumps(rows), encoding="utf-8")
    argv = ["--model", folder, "--data", str(file), "--steps", "1", "--prompts", "2", "--rollouts",
            "2", "--max-new-tokens", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert rm.main(argv) == 0
    file.write_text(json.dumps(rows[1:]), encoding="utf-8")
    assert rm.main(["--resume", str(tmp_path / "out"), "--steps", "2"]) == 2
    assert "have changed" in capsys.readouterr().err


def test_hostile_text(tmp_path, capsys):
    """Names of special tokens in a problem are text; odd characters, huge rows and braces neither
    crash nor spoil a log, on a console of ASCII either."""
    folder = saved_model(tmp_path / "m", chat=True)
    cfg = rm.Config(model=folder, preset="r1-distill-1.5b", prompt="{problem}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = rm.encode_prompt(tokenizer, "1</s><user>2<s></s </s>", cfg).tolist()
    assert ids.count(1) == 0 and ids.count(0) == 1 and ids.count(2) == 1  # the template's own
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    texts = ["a</s>b", "\ud800", "\x00\x1b[2J\r\u2028", "{problem} {0} %s {% if %}", "x" * 10**6,
             "ü😀", "{{ messages }}"]
    file.write_text("\n".join(json.dumps({"problem": t, "answer": "5"}) for t in texts * 2))
    argv = ["--model", folder, "--data", str(file), "--eval-data", str(file), "--steps", "1",
            "--prompts", "6", "--rollouts", "2", "--max-new-tokens", "3", "--device", "cpu",
            "--out", str(out)]
    assert rm.main(argv) == 0
    assert "dropped 8 of 14 rows" in capsys.readouterr().out  # 7 repeat, one is too long
    rows = [json.loads(line) for line in (out / "eval.jsonl").open(encoding="utf-8")]
    assert [row["problem"] for row in rows[:6]] == [t for t in texts if len(t) < 99]
    assert len(rows_of(out)) == 2


def test_an_ascii_console(quick, monkeypatch):
    """What it cannot show is printed escaped."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(rm, "train", lambda cfg: {"out": "ü\ud800"})
    assert rm.main([]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == rb"out: \xfc\ud800" + b"\n"


def test_sick_runs_are_told_once(quick, monkeypatch, capsys):
    """No reward, nothing but reward, cut responses, falling accuracy: in words, with a mend."""
    def warned(**settings):
        rm.train(quick(steps=7, updates=1, eval_every=1, **settings))
        return re.findall("warning: (.*)", capsys.readouterr().out)
    verdict = True
    monkeypatch.setattr(rm, "is_correct", lambda text, gold: verdict)
    assert [w.split(" for five")[0] for w in warned()] == ["every answer was right"]
    verdict = False
    none, = warned()
    assert "no right answer" in none and "--rollouts" in none
    cut = warned(max_new_tokens=2)
    assert len(cut) == 2 and "100%" in cut[0] and "--max-new-tokens" in cut[0]
    monkeypatch.setattr(rm, "is_correct", lambda text, gold: verdict == "seen")
    evaluate, done = rm.evaluate, []

    def falling(model, tokenizer, problems, cfg, step, out):
        done.append(step)
        return evaluate(model, tokenizer, problems, cfg, step, out) | {
            "accuracy": 0.5 if step < 6 else 0.3, "stderr": 0.02}
    monkeypatch.setattr(rm, "evaluate", falling)
    told = warned()
    assert len(told) == 2 and "from 0.500 to 0.300; lower --lr" in told[1]


# ---- Evidence: python test_reval_min.py study NAME -----------------------------------------------

LR = {  # the best of a sweep by factors of 2 on seeds 100 and 101, by method and updates K
    "reval": {1: 1e-3, 2: 5e-4, 4: 3e-4, 8: 1.5e-4}, "grpo": {1: 1e-3, 2: 5e-4, 4: 3e-4, 8: 2e-4},
    "tbrm": {8: 7.5e-5}}


def method(algo, k, **changes):
    """Settings of a method with K updates per iteration, at its learning rate."""
    return dict(algo=algo, updates=k, lr=LR[algo][k]) | changes


SHORT = dict(steps=30)  # 3840 rollouts; the reward has stopped rising by then
REVAL = method("reval", 8)
STUDIES = {  # name: {variant: settings}
    "compare": {
        "reval": REVAL, "reval-k8-b1": REVAL | dict(buffer=1),
        "reval-k1": method("reval", 1, buffer=1), "tbrm": method("tbrm", 8),
        "grpo-k1": method("grpo", 1), "grpo-k8": method("grpo", 8)},
    "replay": {
        f"{name}, K = {k}": method(algo, k, **changes) | SHORT
        for name, algo, changes in (("ReVal, replay", "reval", {}), ("ReVal, fresh batch", "reval",
                                    dict(buffer=1)), ("GRPO, fresh batch", "grpo", {}))
        for k in (1, 2, 4, 8) if (name, k) != ("ReVal, replay", 1)},
    "calibration": {
        f"{name}, {reward}": method(algo, 8) | SHORT | changes | zero
        for reward, zero in (("no reward", dict(data="NO REWARD")), ("reward", {}))
        for name, algo, changes in (("ReVal", "reval", {}), ("TBRM", "tbrm", {}),
                                    ("TBRM, lr 1.5e-4", "tbrm", dict(lr=1.5e-4)),
                                    ("TBRM, lr 3e-4", "tbrm", dict(lr=3e-4)))},
    "beta": {
        f"beta {beta:g}, buffer {buffer}": REVAL | SHORT | dict(beta=beta, buffer=buffer)
        for buffer in (15, 1) for beta in (0.005, 0.02, 0.05, 0.1, 0.2)},
    "buffer": {f"buffer {n}": REVAL | SHORT | dict(buffer=n) for n in (1, 2, 5, 15, 30)},
    "reward": {
        "raw, K = 8": REVAL | SHORT, "centered, K = 8": REVAL | SHORT | dict(reward="centered"),
        "centered, K = 8, buffer 1": REVAL | SHORT | dict(reward="centered", buffer=1),
        **{f"centered, K = 8, reset {n}": REVAL | SHORT | dict(reward="centered", ref_reset=n)
           for n in (10, 5, 2)},
        "raw, K = 1": method("reval", 1, buffer=1) | SHORT,
        "centered, K = 1": method("reval", 1, buffer=1, reward="centered") | SHORT,
        **{f"raw {c:+g}, K = 8 (ours)": REVAL | SHORT | dict(plus=c) for c in (-0.3, 0.3, 1.0)}},
    "reset": {f"reset {n or 'never'}": REVAL | SHORT | dict(ref_reset=n) for n in (0, 15, 10, 5)},
    "one-rollout": {
        "ReVal, 16 x 8, K = 8": REVAL | SHORT, "GRPO, 16 x 8, K = 8": method("grpo", 8) | SHORT,
        "GRPO, 16 x 8, K = 1": method("grpo", 1) | SHORT,
        "ReVal, 128 x 1, K = 8": REVAL | SHORT | dict(prompts=128, rollouts=1),
        "ReVal, 128 x 1, K = 1": method("reval", 1, buffer=1, prompts=128, rollouts=1) | SHORT},
}


def add_constant(plus):
    """Ours, not the paper's: a constant added to every reward. The best policy stays the same,
    and V*(s_1) rises by plus / beta."""
    add_signals = rm.add_signals

    def shifted(trajectories, cfg):
        add_signals(trajectories, cfg)
        for t in trajectories:
            t["signal"] = t["signal"] + plus
    return shifted


def run_cell(out, settings):
    """Trains one cell of a study in its own folder, unless that very cell is there. -> figures"""
    plus = settings.get("plus", 0)
    settings = {key: value for key, value in settings.items() if key != "plus"}
    cfg, file = rm.Config(**settings, out=str(out)), out / "result.json"
    config = dataclasses.asdict(cfg) | {"plus": plus}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["config"] == config:
            return result
    if out.exists():
        shutil.rmtree(out)  # of other settings, or broken off
    cpu = time.process_time()
    with open(os.devnull, "w", encoding="utf-8") as sink, contextlib.redirect_stdout(sink), \
            pytest.MonkeyPatch.context() as patch:
        if plus:
            patch.setattr(rm, "add_signals", add_constant(plus))
        result = rm.train(cfg)
    result |= {"cpu_seconds": time.process_time() - cpu, "config": config}
    file.write_text(json.dumps(result), encoding="utf-8")
    return result


def run_cells(cells, jobs, run_cell=run_cell):
    """Runs {folder: settings}, some jobs at a time in processes. -> {folder: figures}"""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        futures = {pool.submit(run_cell, out, settings): out for out, settings in cells.items()}
        done = concurrent.futures.as_completed(futures)
        return {futures[f]: f.result() for f in rm.tqdm(done, total=len(futures), disable=None)}


def spread(numbers, form=".3f"):
    """mean +- standard deviation, as text; a number that was never reached is 'never'."""
    if None in numbers:
        return f"never ({sum(x is None for x in numbers)} of {len(numbers)})"
    return f"{fmean(numbers):{form}}" + (f" +- {stdev(numbers):{form}}" if len(numbers) > 1 else "")


def rollouts_to(rows, level):
    """Rollouts until the mean reward of three iterations in a row reaches a level, or None."""
    rewards = [row["reward"] for row in rows[1:]]
    return next((rows[i + 1]["rollouts"] for i in range(2, len(rewards))
                 if fmean(rewards[i - 2:i + 1]) >= level), None)


def chart(title, lines, step):
    """Prints lines, lists of numbers, as a picture that GitHub draws; it has no legend."""
    print(f"```mermaid\nxychart-beta\n    title \"{title}\"\n    x-axis \"rollouts\" "
          f"{[step * (i + 1) for i in range(len(lines[0]))]}\n    y-axis \"reward\" 0 --> 1")
    for line in lines:
        print(f"    line {[round(x, 3) for x in line]}")
    print("```")


def held_out_file(out):
    """The held-out sums of the built-in task, as a file. -> its name"""
    file = out / "held_out.json"
    out.mkdir(parents=True, exist_ok=True)
    rm.replace(file, lambda part: part.write(json.dumps(rm.load_problems(rm.Config())[1]).encode()))
    return str(file)


def no_reward(out):
    """A file of sums whose answers are wrong, so that nothing is ever rewarded. -> its name"""
    file = out / "no_reward.json"
    problems, _ = rm.load_problems(rm.Config())
    rows = [p | {"answer": "-1"} for p in {p["problem"]: p for p in problems}.values()]
    rm.replace(file, lambda part: part.write(json.dumps(rows).encode()))
    return str(file)


def name_of(settings):
    """A folder's name for a cell: what differs from the defaults, so that studies share cells."""
    plain, silent = rm.Config(), ("model", "eval_data", "eval_every", "save_every", "preset")
    return ",".join(f"{key}={Path(value).stem if key == 'data' else value}"
                    for key, value in sorted(settings.items())
                    if key not in silent and value != getattr(plain, key, None)) or "default"


def study(args):
    """Every variant of a study from the same warm starts, at equal rollouts."""
    if args.name == "one-prompt":
        return one_prompt(args)
    variants, out = STUDIES[args.name], Path(args.out)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    starts = {s: out / f"start-s{s}" for s in seeds}
    run_cells({starts[s]: dict(steps=0, seed=s) for s in seeds}, args.jobs)
    rows = {}  # (variant, learning rate): its cells
    for name, factor in itertools.product(args.only or variants, args.lr_factors):
        settings = variants[name] | {"lr": factor * variants[name]["lr"], "eval_every": 1000,
                                     "save_every": 1000}
        if "data" in settings:
            settings |= {"data": no_reward(out), "eval_data": held_out_file(out), "preset": "toy"}
        rows[name, settings["lr"]] = {
            out / f"{name_of(settings)},seed={s}": settings | dict(
                seed=s, model=str(starts[s] / "model")) for s in seeds}
    results = run_cells({k: v for cells in rows.values() for k, v in cells.items()}, args.jobs)
    head = ("variant", "lr", "before", "after", "mean reward", "less the first's", "last 10",
            "rollouts to .7", "updates to .7", "cost to .7", "KL", "cpu s")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    lines, first = [], None
    for (name, lr), cells in rows.items():
        runs, metrics = [results[folder] for folder in cells], [rows_of(folder) for folder in cells]
        rewards = [[row["reward"] for row in run[1:]] for run in metrics]
        means = [fmean(x) for x in rewards]
        first = first or means  # seed by seed, as the seeds share their start
        needed, k = [rollouts_to(run, 0.7) for run in metrics], metrics[0][1]["updates"]
        columns = {"": [
            [r["accuracy_before"] for r in runs], [r["accuracy_after"] for r in runs],
            means, [a - b for a, b in zip(means, first)], [fmean(x[-10:]) for x in rewards], needed,
            [n and n // 128 * k for n in needed],
            [n and n // 128 * (36.8 + 2.8 * k) / 60 for n in needed],  # the paper's unit costs
            [run[-1]["kl"] for run in metrics], [r["cpu_seconds"] for r in runs]]}
        if args.each:
            columns = {f", seed {s}": [[column[i]] for column in columns[""]]
                       for i, s in enumerate(seeds)} | columns
        for label, (*shares, needed, updates, cost, kl, cpu) in columns.items():
            print(f"| {name}{label} | {lr:g} | " + " | ".join(map(spread, shares))
                  + f" | {spread(needed, '.0f')} | {spread(updates, '.0f')} | "
                  f"{spread(cost, '.1f')} | {spread(kl, '.2f')} | {fmean(cpu):.0f} |")
        lines.append([fmean(x) for x in zip(*rewards)][:20])
    if args.chart:
        chart("reward, mean of the seeds: " + ", ".join(name for name, _ in rows), lines, 128)


ONE_PROMPT = {f"{algo}, K = {k}": dict(algo=algo.lower(), updates=k, lr=3e-4) for algo, k in (
    ("GRPO", 1), ("GRPO", 8), ("ReVal", 1), ("ReVal", 2), ("ReVal", 4), ("ReVal", 8))}
DIFFICULTIES = {"hard": 0.10, "medium": 0.40, "easy": 0.68}  # base success, as in the paper


def load_start(start):
    model, tokenizer = rm.load_model(rm.Config(model=str(start)), torch.device("cpu"))
    return model, tokenizer, rm.Config()


def success(start, problems, n, purpose):
    """-> the share of right answers among n to each problem."""
    model, tokenizer, cfg = load_start(start)
    asked = [p for p in problems for _ in range(n)]
    rewards = [t["reward"] for t in rm.rollout(model, tokenizer, asked, cfg, 0, purpose)]
    return [fmean(rewards[i:i + n]) for i in range(0, len(rewards), n)]


def screen(out):
    """A start with more written work than the default one, as it has easy problems too, and three
    problems of each difficulty. They are chosen from 500 by 64 answers to each, then from the 15
    nearest by 256 other answers."""
    file, start = out / "problems.json", out / "start"
    if not file.exists():
        with pytest.MonkeyPatch.context() as patch, \
                open(os.devnull, "w", encoding="utf-8") as sink, contextlib.redirect_stdout(sink):
            patch.setattr(rm, "WRITTEN_SHARE", 0.4)
            shutil.rmtree(start, ignore_errors=True)
            rm.train(rm.Config(steps=0, out=str(start)))
        problems = rm.load_problems(rm.Config())[0][:500]
        first, chosen = success(start / "model", problems, 64, "screening"), {}
        for name, level in DIFFICULTIES.items():
            near = sorted(range(len(problems)), key=lambda i: abs(first[i] - level))[:15]
            again = success(start / "model", [problems[i] for i in near], 256, "again")
            best = sorted(range(15), key=lambda j: abs(again[j] - level))[:3]
            chosen[name] = [problems[near[j]] | {"base": again[j]} for j in best]
        rm.replace(file, lambda part: part.write(json.dumps(chosen).encode()))
    return json.loads(file.read_text(encoding="utf-8"))


class Reached(Exception):
    """The success looked for, or the last round."""


def one_prompt_cell(out, settings):
    """Trains on one problem until 0.95 of 64 fresh answers are right. -> {"rounds": collection
    rounds or None, "others": (before, after) held-out accuracy of 256 other problems}"""
    file = out / "result.json"
    if file.exists() and (known := json.loads(file.read_text(encoding="utf-8")))[
            "config"] == settings:
        return known
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    problem, plain, evaluate = settings["problem"], rm.Config(), rm.evaluate
    rm.replace(out / "problem.json", lambda part: part.write(json.dumps([problem]).encode()))
    changes = {key: value for key, value in settings.items() if key != "problem"}
    cfg = rm.Config(preset="toy", data=str(out / "problem.json"), eval_data=str(
        out / "problem.json"), prompts=1, rollouts=8, eval_every=1, eval_samples=64, warmup=2,
        half_life=0, save_every=1000, out=str(out / "run"), **changes)
    others, seen = rm.load_problems(plain)[1][:256], []

    def watched(model, tokenizer, problems, cfg, step, folder):
        figures = evaluate(model, tokenizer, problems, cfg, step, folder)
        if step in (0, cfg.steps) or figures["accuracy"] >= 0.95:
            seen.append(fmean(t["reward"] for t in rm.rollout(
                model, tokenizer, others, plain, 0, "others")))
            if step:
                raise Reached(step if figures["accuracy"] >= 0.95 else None)
        return figures
    with open(os.devnull, "w", encoding="utf-8") as sink, contextlib.redirect_stdout(sink), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "evaluate", watched)
        try:
            rm.train(cfg)
        except Reached as reached:
            rounds, = reached.args
    result = {"rounds": rounds, "others": seen, "config": settings}
    rm.replace(file, lambda part: part.write(json.dumps(result).encode()))
    return result


def one_prompt(args):
    """The paper's Figures 2 and 3: collection rounds of 8 responses until one problem is solved."""
    out, limit = Path(args.out) / "one-prompt", 60
    chosen = screen(out)
    head = ("method", "lr", *(f"rounds, {name}" for name in DIFFICULTIES), "never", "speed-up over "
            "GRPO, K = 1", "over GRPO, K = 8", "others before", "others after")
    cells = {}
    for name, factor in itertools.product(args.only or ONE_PROMPT, args.lr_factors):
        settings = ONE_PROMPT[name] | {"lr": ONE_PROMPT[name]["lr"] * factor, "steps": limit,
                                       "model": str(out / "start" / "model")}
        for difficulty, problems in chosen.items():
            for problem in problems:
                for seed in range(args.first_seed, args.first_seed + args.seeds):
                    cell = (f"{name.replace(' ', '')}-lr{settings['lr']:g}-{difficulty}-"
                            f"{problem['problem'].strip('=?')}-s{seed}")
                    cells[name, settings["lr"], difficulty, problem["problem"], seed] = (
                        out / cell, settings | dict(seed=seed, problem=problem))
    found = run_cells(dict(cells.values()), args.jobs, one_prompt_cell)
    results = {key: found[folder] for key, (folder, _) in cells.items()}
    print("base success, re-measured: " + "; ".join(
        name + " " + ", ".join(f"{p['base']:.2f}" for p in problems)
        for name, problems in chosen.items()))
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    rounds = {}  # (method, lr): {difficulty: rounds}, one that was never reached as the limit
    for (name, lr, difficulty, *_), result in results.items():
        rounds.setdefault((name, lr), {}).setdefault(difficulty, []).append(
            result["rounds"] or limit)
    def speed_up(found, base):
        return "-" if base is None else ", ".join(f"{fmean(base[d]) / fmean(found[d]):.1f}"
                                                  for d in DIFFICULTIES)
    for (name, lr), found in rounds.items():
        runs = [r for key, r in results.items() if key[:2] == (name, lr)]
        never = sum(r["rounds"] is None for r in runs)
        print(f"| {name} | {lr:g} | " + " | ".join(spread(found[d], ".1f") for d in DIFFICULTIES)
              + f" | {never} of {len(runs)} | " + " | ".join(
                  speed_up(found, rounds.get((f"GRPO, K = {k}", lr))) for k in (1, 8))
              + " | " + " | ".join(spread([r["others"][i] for r in runs]) for i in (0, -1)) + " |")
    if len(args.lr_factors) > 1:
        best = {name: min((fmean(map(fmean, found.values())), lr) for (other, lr), found
                          in rounds.items() if other == name) for name, _ in rounds}
        print("best learning rates: " + "; ".join(f"{name} {lr:g}, {mean:.1f} rounds"
                                                  for name, (mean, lr) in best.items()))


# ---- Evidence: python test_reval_min.py bench ----------------------------------------------------

def clock(device):
    """Seconds that count: of the GPU's wall clock, else of this process's CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_bytes(device):
    return rm.peak_memory_mb(torch.device(device)) * 1e6


def bench_q(device, form, N, D, A=151_936):
    """One form of Q and V, forward and backward. -> [best of 3 seconds, extra peak bytes beside
    operands and gradients, largest error of log pi against float64]; None: it is not installed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, D, device=device).mul_(s).to(dtype).requires_grad_()
                      for n, s in ((N, 1), (A, D**-0.5 * 3)))
    actions = torch.randint(A, (N,), device=device)
    if device == "cuda":
        hidden @ weight[:9].T  # cuBLAS takes its workspace
        torch.cuda.reset_peak_memory_stats()

    def plain():
        logits = (hidden @ weight.T).float()
        return logits.log_softmax(1).gather(1, actions[:, None])[:, 0]

    def products(n):  # what no version can avoid: one forward, two backward, one for recomputation
        for _ in range(n - 2):
            logits = hidden.detach() @ weight.detach().T
        weight.grad, hidden.grad = logits.T @ hidden.detach(), logits @ weight.detach()
    if form == "liger":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            return None
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        run = lambda: -loss(weight, hidden, actions)
    elif form == "cut-cross-entropy":
        try:
            from cut_cross_entropy import linear_cross_entropy
        except ImportError:
            return None
        run = lambda: -linear_cross_entropy(hidden, weight, actions, reduction="none")
    else:
        run = plain if form == "plain" else lambda: torch.sub(
            *rm.q_from_logits(hidden, weight, actions, int(form.split()[-1])))
    seconds, error, base = [], None, peak_bytes(device)
    for _ in range(3):
        hidden.grad = weight.grad = None
        begin = clock(device)
        if form.endswith("products"):
            products(int(form.split()[0]))
        else:
            run().sum().backward()
        seconds.append(clock(device) - begin)
    extra = peak_bytes(device) - base - (hidden.numel() + weight.numel()) * hidden.element_size()
    if form == "plain" or form.startswith("block"):
        exact = (hidden[:64].double() @ weight.double().T).log_softmax(1)
        error = (run()[:64] - exact.gather(1, actions[:64, None])[:, 0]).abs().max().item()
    return [min(seconds), extra, error]


def shaped_model(device, **changes):
    """A Qwen2 of random weights in the shape of DeepSeek-R1-Distill-Qwen-1.5B. Each token ends a
    response with a chance of 1 in 512: mixed lengths."""
    shape = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=False,
                 max_position_embeddings=131_072) | changes
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**shape), dtype=torch.bfloat16).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=1024, pad_token_id=0,
        eos_token_id=list(range(max(1, shape["vocab_size"] // 512))))
    return model


def bench_sampler(device, sampler, batch, max_new_tokens=1024, **shape):
    """-> tokens per second of sampling, and of reading all weights once per step of the batch."""
    model, cfg = shaped_model(device, **shape), rm.Config(sampler=sampler)
    model.generation_config.max_new_tokens = max_new_tokens
    prompts = [torch.randint(9, 99, (100 + 10 * (i % 10),)) for i in range(batch)]
    rm.sample(model, prompts[:2], cfg, 0)
    begin = clock(device)
    responses = rm.sample(model, prompts, cfg, 1)
    seconds, ends = clock(device) - begin, torch.tensor(model.generation_config.eos_token_id)
    tokens = sum(len(r) if not stops else stops[0] + 1 for r in responses
                 for stops in [torch.isin(r, ends).nonzero()[:, 0].tolist()])
    begin = clock(device)
    for _ in range(3):
        for weight in model.parameters():
            weight.sum()
    return [tokens / seconds, 3 * batch / (clock(device) - begin)]


def bench_step(device, cap_gb, place, n=64, T=1024, **shape):
    """One iteration of ReVal, K = 2: n responses of T tokens. -> [seconds, peak bytes] of
    generation, reference and update; optimizer and reference live on place."""
    if cap_gb and device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gb * 1e9 / total)
    model = shaped_model(device, **shape)
    model.generation_config.eos_token_id = [shape.get("vocab_size", 151_936) - 1]
    model.generation_config.max_new_tokens = T
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
        {"use_reentrant": False})
    cfg = rm.Config(preset="r1-distill-1.5b", rollouts=8, max_new_tokens=T)
    reference = copy.deepcopy(model).requires_grad_(False).to(place)
    masters = rm.master_weights(model, torch.device(place))
    optimizer = torch.optim.AdamW(masters, 0.0, (0.9, 0.95), weight_decay=0, fused=True)
    prompt, figures = torch.randint(9, 99, (100,)), []
    rm.rehearse(model, masters, optimizer, prompt, cfg)

    def generation():
        for response in rm.sample(model, [prompt] * n, cfg, 0):
            batch.append({"prompt": prompt, "response": response, "reward": len(batch) % 2.0,
                          "problem": "", "step": 1})
        rm.add_signals(batch, cfg)

    def scoring():
        rm.cache_values(reference.to(device), batch, cfg, "ref")
        reference.to(place)

    def learning():
        for _ in range(2):
            rm.gradient(model, masters, batch, cfg)
            rm.update(model, masters, optimizer)
    batch = []
    for phase in (generation, scoring, learning):
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = clock(device)
        phase()
        figures += [clock(device) - begin, peak_bytes(device)]
    return figures


def apart(function, *args):
    """Calls it in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def bench(args):
    """Speed and memory of the parts, on the GPU if there is one, else what a CPU can show."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, 1 thread"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    D, sizes = (1536, (2048, 8192, 16384)) if device == "cuda" else (896, (2048,))
    forms = ["plain", "3 products", "4 products", *(f"block {b}" for b in args.blocks), "liger",
             "cut-cross-entropy"]
    print(f"Q and V, forward and backward, D = {D}, A = 151,936\n\n| N | form | s | / plain | / "
          "4 products | extra MB | / plain | error |\n|" + "---|" * 8)
    for N in sizes:
        found = {form: apart(bench_q, device, form, N, D) for form in forms}
        plain, floor = found["plain"], found["4 products"]
        for form, figures in found.items():
            if figures:
                seconds, extra, error = figures
                print(f"| {N} | {form} | {seconds:.3g} | {seconds / plain[0]:.2f} | "
                      f"{seconds / floor[0]:.2f} | {extra / 1e6:.0f} | {extra / plain[1]:.2f} | "
                      + (f"{error:.1e} |" if error is not None else "- |"), flush=True)
    if device == "cpu":
        return print("\nskipped without a GPU: rollouts and a training step of the 1.5B shape")
    print("\nRollouts of mixed length, 1.5B shape, up to 1,024 tokens\n\n| batch | sampler | "
          "tokens/s | of the floor, weights read once a step |\n|---|---|---|---|")
    for batch, sampler in itertools.product((64, 256), ("generate", "continuous")):
        speed, floor = apart(bench_sampler, device, sampler, batch)
        print(f"| {batch} | {sampler} | {speed:.0f} | {speed / floor:.2f} |", flush=True)
    print("\nOne iteration, 64 responses x 1,024 tokens, K = 2, 1.5B shape\n\n| memory | optimizer "
          "and reference | generation s, GB | reference s, GB | updates s, GB |\n|"
          + "---|" * 5)
    for cap, place in ((None, "cuda"), (22, "cpu"), (15, "cpu")):
        try:
            figures = apart(bench_step, device, cap, place)
            cells = [f"{s:.1f}, {b / 1e9:.1f}" for s, b in zip(figures[::2], figures[1::2])]
        except (torch.OutOfMemoryError, rm.UserError) as error:
            cells = [str(error)[:80], "-", "-"]
        print(f"| {cap or 'all'} | {place} | " + " | ".join(cells) + " |", flush=True)


# ---- Evidence: python test_reval_min.py faults ---------------------------------------------------

def faults(args):
    """Kills a short run at random moments, continues it each time, and compares what comes out at
    its end with a run that nothing disturbed."""
    out, random = Path(args.out), rm.rng(0, 0, "faults")
    script = [sys.executable, str(HERE / "reval_min.py")]
    small = ["--distill-steps", "20", "--steps", "60", "--prompts", "8", "--rollouts", "4",
             "--updates", "4", "--eval-every", "20", "--eval-problems", "64", "--save-every", "1"]
    kills = whole = begun = 0
    while kills < args.kills:
        begun += 1
        start = script + small + ["--seed", str(begun)]
        calm, shaken = out / f"calm{begun}", out / f"shaken{begun}"
        for folder in (calm, shaken):
            shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(start + ["--out", str(calm)], check=True, stdout=subprocess.DEVNULL)
        command, done = start + ["--out", str(shaken)], False
        while not done:
            patience = float(random.uniform(0.05, 1.0)) if kills < args.kills else 600
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True)
            for line in process.stdout:
                if line.startswith("step "):  # the head of the log: training begins
                    break
            try:
                _, error = process.communicate(timeout=patience)
                done = process.returncode == 0
                if not done:
                    sys.exit(f"could not go on after kill {kills}: {error}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
            if (shaken / "checkpoint.pt").exists():
                command = script + ["--resume", str(shaken)]
            else:  # it was killed before its first checkpoint: there is nothing to lose
                shutil.rmtree(shaken)
        same_runs(calm, shaken)
        whole += 1
        print(f"{kills} kills, all survived; {whole} shaken runs ended as calm ones, to the bit",
              flush=True)


def main(argv):
    parser = argparse.ArgumentParser(description="The evidence behind the README's tables.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("study", help="comparisons and ablations, table by table")
    command.add_argument("name", choices=[*STUDIES, "one-prompt"])
    command.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    command.add_argument("--first-seed", type=int, default=0, help="(default 0)")
    command.add_argument("--only", nargs="+", help="these variants alone")
    command.add_argument("--lr-factors", nargs="+", type=float, default=[1.0],
                         help="multiples of each variant's learning rate (default 1)")
    command.add_argument("--each", action="store_true", help="a row for every seed as well")
    command.add_argument("--chart", action="store_true", help="the rewards, as a mermaid picture")
    command.add_argument("--jobs", type=int, default=1, help="processes side by side (default 1)")
    command.add_argument("--out", default="runs/study", help="finished runs are kept here")
    command.set_defaults(run=study)
    command = commands.add_parser("bench", help="speed and memory of the parts")
    command.add_argument("--blocks", nargs="+", type=int, default=[1024, 4096, 16384],
                         help="block sizes of q_from_logits to try")
    command.set_defaults(run=bench)
    command = commands.add_parser("faults", help="kills runs and continues them")
    command.add_argument("--kills", type=int, default=50, help="how many (default 50)")
    command.add_argument("--out", default="runs/faults", help="folder of the runs")
    command.set_defaults(run=faults)
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])

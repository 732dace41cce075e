#!/usr/bin/env python3
r"""reval_min: ReVal, value-based reinforcement learning for language models, in one file.

A language model already is a value function. Read its logit for token a after text s as a soft
Q-value, Q(s, a). Then V(s) = log sum_a exp Q(s, a) is the value of the text, softmax(Q(s, .)) is
the policy, and Q(s, a) - V(s) = log pi(a|s). Training makes Q obey a Bellman equation, and that
can be checked on *any* response, whoever wrote it: so old responses are used again, from a replay
buffer, without importance weights. For one response of H tokens,

    residual = V(s_1) - V_ref(s_1) + sum_h log pi(a_h|s_h) - sum_h log pi_ref(a_h|s_h) - r / beta
    loss     = beta / 2 * mean over responses of residual^2                               eq. (2)

where r is 1 if the final answer is right, else 0, and "ref" is the model before training.

By hand: 3 words, a response of 2 tokens, r = 1, beta = 0.5. The model's exp(logits) are (1, 2, 5)
and then (4, 2, 2), the reference's (1, 1, 2) twice; token 1 is taken, then token 0. So V is log 8
twice, V_ref log 4 twice, pi 1/4 and 1/2, pi_ref 1/4 twice, and
residual = log 8 - log 4 + log(1/4 * 1/2) - log(1/4 * 1/4) - 2 = -0.6137, loss = 0.0942.

    python reval_min.py                     the built-in task, on a laptop: 1.5 minutes
    python reval_min.py --algo grpo --updates 1 --lr 1e-3    the usual baseline on it: 1 minute
    python reval_min.py --model DIR_OR_HUB_ID --data problems.jsonl    your model, your problems
    python reval_min.py --preset r1-distill-1.5b    the paper's run, on one GPU: not tried
    python reval_min.py --resume runs/NAME           go on after a stop, to the bit
    python reval_min.py --help                       every setting

Method: "Off-Policy Value-Based Reinforcement Learning for Large Language Models", Wang et al.,
arXiv 2603.23355, published without code. Where this file differs from it or had to choose:
 1. The loss has a factor beta/2: at the start its gradient is then REINFORCE's (section 9).
 2. The paper's text once has V_theta where its operator and eq. (2) have V_ref: V_ref it is.
 3. Nothing is detached; gradients flow through V(s_1) and every log pi. The paper does not say.
 4. Update 1 of an iteration uses the fresh batch, updates 2..K draw uniformly from the buffer,
    which already holds the fresh batch.
 5. AdamW (0.9, 0.95), no weight decay, gradient norm clipped to 1. The paper does not say.
 6. A response cut at the length limit counts as finished: V = 0 after it, and reward 0.
 7. Reward 0/1 and no reference reset unless asked. A reset recomputes the buffer's cached values.
"""
import argparse
import ast
import copy
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
import zlib
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


class UserError(Exception):
    """A user's mistake, told in one line that says how to mend it."""

def rng(seed, step, purpose):
    """A numpy generator for one purpose at one step. Every random draw comes from such a one: an
    evaluation more cannot shift the training after it, and no generator's state is ever saved."""
    return np.random.default_rng([seed, step, zlib.crc32(purpose.encode())])

def progress(items, what):
    """Goes through items with a progress bar, if it takes more than 2 s and a person is looking."""
    return tqdm(items, what, disable=None, leave=False, delay=2)


# ---- 1. Settings ---------------------------------------------------------------------------------
# One dataclass gives flags, defaults, help and validation. A row's first two values are the two
# presets': the laptop's toy run, and the paper's run of a 1.5B model.

PRESETS = ("toy", "r1-distill-1.5b")
PLACES = ("auto", "cpu", "cuda")

def setting(toy, paper, text, choices=None, zero=False):
    """A field of Config: its values in the two presets, its help, choices, and may it be zero?"""
    return dataclasses.field(default=None, metadata={
        "values": (toy, paper), "help": text, "choices": choices, "zero": zero})

@dataclasses.dataclass
class Config:
    """All settings of a run. None means: the preset's value. UserError if one is impossible."""

    preset: str = setting(None, None, "default: toy, with a data file the other", PRESETS)
    algo: str = setting("reval", "reval", "the loss", ("reval", "tbrm", "grpo"))
    model: str = setting(None, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
                         "folder or hub id of a causal LM; toy: none, a tiny one is made")
    data: str = setting(
        None, "hf://datasets/agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json",
        "JSON or JSONL file, or hf://datasets/ORG/NAME/FILE; toy: none, its sums")
    eval_data: str = setting(None, None, "the same, to evaluate on; none: a part of --data")
    prompt: str = setting("{problem}", "{problem} Let's think step by step and output the final "
                          "answer within \\boxed{}.", "text around {problem}")
    raw_prompt: bool = setting(True, False, "do without the tokenizer's chat template")
    steps: int = setting(50, 650, "iterations; 0 only evaluates", zero=True)
    prompts: int = setting(16, 128, "problems per iteration")
    rollouts: int = setting(8, 8, "responses per problem")
    updates: int = setting(8, 2, "gradient steps per iteration: K")
    buffer: int = setting(15, 5, "replay buffer, in batches of prompts x rollouts")
    beta: float = setting(0.05, 0.002, "price, in reward, of one nat of KL from the reference")
    lr: float = setting(1.5e-4, 1e-6, "learning rate")
    warmup: int = setting(5, 0, "iterations over which the learning rate rises", zero=True)
    half_life: int = setting(15, 0, "iterations in which it halves; 0: never", zero=True)
    reward: str = setting("raw", "raw", "0/1, or less its group's mean", ("raw", "centered"))
    ref_reset: int = setting(0, 0, "iterations between resets of the reference; 0: none", zero=True)
    max_new_tokens: int = setting(28, 8192, "longest response")
    micro_batch_tokens: int = setting(16384, 16384, "most tokens of one forward and backward pass")
    gradient_checkpointing: bool = setting(False, True, "save memory: activations made twice")
    distill_steps: int = setting(1600, 0, "warm-start steps of the tiny model", zero=True)
    eval_every: int = setting(10, 50, "iterations between evaluations and printed samples")
    eval_problems: int = setting(1024, 500, "held-out problems")
    eval_samples: int = setting(1, 1, "responses to each: n in avg@n")
    eval_temperature: float = setting(1.0, 0.6, "of these; 0: greedy", zero=True)
    eval_top_p: float = setting(1.0, 0.95, "of these: sample from the likeliest, to this mass")
    device: str = setting("auto", "auto", "mps is untested", ("auto", "cpu", "cuda", "mps"))
    dtype: str = setting("float32", "auto", "of the weights that sample and learn; auto: bfloat16 "
                         "on a GPU that has it", ("auto", "float32", "bfloat16"))
    master_device: str = setting("auto", "auto", "where optimizer, gradient and master weights "
                                 "are, 16 bytes a parameter; auto: --device", PLACES)
    ref_device: str = setting("auto", "auto", "where the reference waits between its turns", PLACES)
    sampler: str = setting("generate", "auto", "auto: continuous on cuda, else generate",
                           ("auto", "generate", "continuous"))
    seed: int = setting(0, 0, "of every random draw", zero=True)
    save_every: int = setting(10, 10, "iterations between checkpoints")
    out: str = setting(None, None, "a new folder for the run; none: one under runs/")
    resume: str = setting(None, None, "folder of a run to continue, with its settings")

    def __post_init__(self):
        self.preset = self.preset or PRESETS[bool(self.data or self.eval_data)]
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, f.metadata["values"][self.preset == PRESETS[1]])
            value, choices, zero = getattr(self, f.name), f.metadata["choices"], f.metadata["zero"]
            flag = f"--{f.name.replace('_', '-')} {value}"
            if choices and value not in choices:
                raise UserError(f"{flag}: choose from {', '.join(choices)}")
            if f.type in (int, float) and not (0 < value < math.inf or zero and value == 0):
                raise UserError(f"{flag}: give a number {'of at least' if zero else 'above'} 0")
        if self.eval_top_p > 1:
            raise UserError(f"--eval-top-p {self.eval_top_p}: a share of the mass is at most 1")
        if self.rollouts == 1 and (self.reward == "centered" or self.algo == "grpo"):
            raise UserError("--rollouts 1: a group of one has no mean to compare with; take more")
        if (self.data or self.eval_data) and not self.model:
            raise UserError("--data needs --model: the tiny model reads nothing but sums")
        if "{problem}" not in self.prompt:
            raise UserError("--prompt: write {problem} where the problem goes")

RESUMABLE = {"resume", "steps", "save_every", "device", "master_device", "ref_device", "sampler",
             "micro_batch_tokens", "gradient_checkpointing"}

def parse_args(argv):
    """The command line as a Config: every field is a flag. With --resume the other settings are
    those of the run, and only how long, where and in what pieces it goes on may be said anew."""
    parser = argparse.ArgumentParser("reval_min", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{message}; see --help")
    parser.error = refuse
    for f in dataclasses.fields(Config):
        (toy, paper), choices = f.metadata["values"], f.metadata["choices"] or ()
        values = f" (toy: {toy}, paper: {paper})" if toy != paper else f" (default: {toy})"
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f.metadata["help"] + values * (toy is not None) + f" {'|'.join(choices)}"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text.replace("%", "%%"), **how)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if "resume" in given:
        if fixed := sorted(given.keys() - RESUMABLE):
            raise UserError(f"--{fixed[0].replace('_', '-')} cannot change beside --resume; leave "
                            "it out, or begin a new run with --model")
        try:
            file = Path(given["resume"], "config.json")
            kept = json.loads(file.read_text(encoding="utf-8"))
            given = {f.name: kept[f.name] for f in dataclasses.fields(Config)} | given
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"--resume {given['resume']}: no run of this program ({error})")
    return Config(**given)


# ---- 2. The answer checker -----------------------------------------------------------------------
# It is the reward: what it gets wrong, the model will learn. So it is a rule anyone can read, and
# in doubt it says no: an answer that was only thought, was cut, hedges, negates or lists others is
# wrong. Units, currency and "x =" may be missing, but not differ. Numbers compare exactly. Extract,
# normalize, parse, compare: each step takes time linear in the text, and none ever raises.

def extract_answer(response):
    r"""The final answer of a response, as text, or None. Only what follows </think> counts. There:
    the last \boxed{...}; else the last <answer> tag; else the line after the last ####; else
    the line after the last "answer is" or "answer:"."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:  # a thought that does not end concludes nothing
        return None
    boxes = [m.end() for m in re.finditer(r"\\boxed\s*\{", text)]
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, boxes[-1]) if boxes else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} do not nest
        if depth == 0:
            before, after = text[:boxes[-1]][-60:], text[brace.end():][:20]
            hedged = (re.search(r"(n't|\bnot|\bor)\b[\s$}({\\]*\\boxed\s*\{$", before)
                      or re.match(r"[\s$]*(\\text\s*\{)?\s*or\b", after))
            return None if hedged else text[boxes[-1]:brace.start()].strip() or None
    tag, tail = text.rpartition("</answer>")[0].rpartition("<answer>")[1:]
    if boxes or tag:  # a box that is here was cut
        return None if boxes else tail.strip() or None
    for mark in ("####", r"(?i:\banswer\b(?:\W*(?:is|are|was)\b|[\s*]*[:=]))"):
        parts = re.split(mark, text)
        if len(parts) > 1:
            line = parts[-1].lstrip(" \t\n:*").partition("\n")[0]
            return re.split(r"[.!]\s|,?\s(?:because|since|which)\b", line + " ")[0].strip() or None
    return None

UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "≤": "<=", "≥": ">=", "²": "^2", "³": "^3",
    "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "∪": r"\cup ", "∩": r"\cap ", "°": r"\circ "})
REWRITES = [(re.compile(pattern), new) for pattern, new in (  # in this order
    (r"\{,\}|,\\!", ","), (r"\\\\", ";"), ("&", ","),  # 1{,}234; rows and cells of a matrix
    (r"[\s~]+|\\ ", " "), (r"(?:\\left ?)?[\[(]? ?\\begin\{(?:array\}\{[^{}]*|\w*matrix)\}", "⟦"),
    (r"\\end\{(?:array|\w*matrix)\} ?(?:\\right ?)?[\])]?", "⟧"),  # all matrices alike
    (r"\\[,!;:>()\[\]]|\\q?quad(?![a-z])|\\(?:left|right|[bB]igg?[lr]?|displaystyle)\b", " "),
    (r"\\\$|[$€£¥`]|\*\*(?=[\s.,;:!]|$)|^\*\*", ""),  # currency and bold type
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"\\[dt]frac", r"\\frac"), (r"\\(?:cdot|times)(?![a-z])", "*"), (r"\*\*", "^"),
    (r"\\lt(?![a-z])", "<"), (r"\\leq?(?:slant)?(?![a-z])", "<="),
    (r"\\gt(?![a-z])", ">"), (r"\\geq?(?:slant)?(?![a-z])", ">="),
    (r"\.(\d*)(?:\\overline\{|\()(\d+)[})]", lambda m: f".{m[1]}{m[2] * 40:.40}"),  # 0.1(6)
    (r"\\%| ?\bpercent(?:age)?\b", "%"), (r"\^?\{?\\(?:circ|degree)\b ?\}?", " degrees "),
    (r"\\\{", "⦃"), (r"\\\}", "⦄"),  # the braces of a set; plain ones only group
    (r"\\sqrt ?(\w)", r"\\sqrt{\1}"), (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (r"(\d) ?\\frac\{(\d+)\}\{(\d+)\}", r"\1 \2/\3"),  # 1\frac12 is a mixed number
    (r"(?<![\^/])\\frac\{(-?[\w.]+)\}\{([\d.]+|\w)\}(?!\d)", r"\1/\2"),
    (r"_\{(\w+)\}", r"_\1"), (r"\^\{(-?\d+|\w)\}(?!\d)", r"^\1"),  # but x^{2y} is not x^2y
    (r"(\d), +(?=\d{3}\b)", r"\1;"), (" +", " "), (r"(?<!\w) | (?!\w)", ""))]  # 1, 234 is a list

def normalize(text):
    """An answer without its typesetting, and in one spelling where there are several."""
    if not text.isascii():
        text = re.sub(r"([¼-¾⅐-⅞])", r" \1", text).translate(UNICODE)  # 1½ is 1 1/2
        text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
        text = re.sub(r"\d", lambda digit: str(unicodedata.digit(digit[0])), text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = re.sub(r"^\{+([^{}]*)\}+$", r"\1", text.rstrip(" .,;:\\"))
    if ">" in text and "<" not in text:  # x > 5 is 5 < x
        text = "".join(re.split("(>=?)", text)[::-1]).replace(">", "<")
    return re.sub(r"^([^<]+)<(=?)[^<=]+<(=?)([^<=]+)$", lambda m: (  # 1 < x <= 2 is (1,2]
        "(["[m[2] == "="] + f"{m[1]},{m[4]}" + ")]"[m[3] == "="]), text)

FORMULA = [(re.compile(pattern), new) for pattern, new in (  # LaTeX as an expression, in this order
    (r"(?<![A-Za-z])\\?pi(?![A-Za-z])", "π"), (r"\\sqrt", "√"),
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\frac", ""), (r"\}\{", ")/("),
    (r"(\d+) (\d+/\d+)", r"(\1+\2)"), (r"\{", "("), (r"\}", ")"),  # 1 1/2 is 1 + 1/2
    (r"(?:\d+\.\d*|\.?\d+)(?:[eE][+-]?\d{1,3}(?!\d))?",  # exact, and 007 is 7
     lambda m: str(int(m[0])) if m[0].isdigit() else f"({Fraction(m[0])})"),
    (r"(?<=[\dA-Za-zπ)]) ?(?=[A-Za-zπ√(])|(?<=[A-Za-zπ)]) ?(?=\d)", "*"),  # 2x is 2 * x
    ("√", "sqrt"), (r"\^", "**"))]
OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Call: lambda name, x: math.sqrt(x),
    ast.Pow: lambda x, y: (x ** (int(y) if y == int(y) else y)  # a huge power takes forever
                           if abs(y) * len(str(x)) < 4000 else None)}

def value_of(node):
    """The value of a formula's syntax tree: a Fraction, or a float if a root, pi or a letter is in
    it. A letter stands for some number of its own, so that x + 1 is 1 + x."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.Name):
        return math.pi if node.id == "π" else 1 + zlib.crc32(node.id.encode()) / 2**32
    operands = [value_of(x) for x in ast.iter_child_nodes(node) if isinstance(x, ast.expr)]
    return OPERATIONS[type(getattr(node, "op", node))](*operands)

def number(text):
    """The value of a normalized number or formula, Fraction or float; None for anything else."""
    if len(text) > 400 or re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}|[A-Z]{2}|\d_", text):
        return None  # a word; or 210_7, which is not 2107
    if re.fullmatch(r"[+-]?\d{1,3}((,\d{3})+(\.\d*)?|( \d{3})+)", text):
        text = re.sub("[, ]", "", text)  # 1,234 is one number
    for pattern, new in FORMULA:
        text = pattern.sub(new, text)
    try:
        tree = ast.parse(text if re.fullmatch(r"[0-9A-Za-z_π+*/()-]+", text) else "", mode="eval")
        value = value_of(tree.body)
        return value if math.isfinite(value) else None
    except (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError,
            MemoryError):
        return None

UNIT = re.compile(r"(?<=[\d)}]) ?(%|[kcm]?m\^[23]|[kcm]m|k?g|"
                  r"(?<= )(?:[A-Za-z][A-Za-z./ ]*[A-Za-z.]|[mgsLhN])(?:\^?\d)?)$")
NO_UNIT = {*"or and not is if but to mod squared hundred thousand million billion dozen".split()}

def equal_numbers(a, b):
    """Do two normalized texts name one number? None if they are not both numbers."""
    (a, unit_a), (b, unit_b) = ((UNIT.split(x)[:2] if len(x) < 500 and UNIT.search(x) else (x, ""))
                                for x in (a, b))
    x, y = number(a), number(b)
    if x is None or y is None or NO_UNIT & {*unit_a.split(), *unit_b.split()}:
        return None
    if "%" in (unit_a, unit_b) and unit_a != unit_b:  # 12% is 12 or 0.12, but 12 is not 0.12
        return y in (x, x / 100) if unit_a == "%" else x in (y, y / 100)
    if unit_a and unit_b and unit_a.lower().rstrip("s") != unit_b.lower().rstrip("s"):
        return False
    if x == y or float in (type(x), type(y)) and math.isclose(x, y, rel_tol=1e-10):
        return True
    for text, d, v in ((a, x, y), (b, y, x)):  # six digits or more stand for a value without end,
        digits = re.fullmatch(r"[+-]?0*\.?0*(\d*\.?\d+)", text)  # rounded or cut off
        if "." in text and digits and len(digits[1].replace(".", "")) >= 6 and (
                isinstance(v, float) or pow(10, 400, v.denominator)):
            gap = (Fraction(v) - d) * (1 if d > 0 else -1) * 10 ** len(text.partition(".")[2])
            return -0.5 <= gap < 1
    return False

def split(text):
    """A normalized list, tuple, interval, set or matrix. -> its brackets, items, separators."""
    text, depth, items, separators = re.sub("[,;]? and |,and ", ",", text), 0, [""], ""
    depths = [*itertools.accumulate((c in "([{⦃⟦") - (c in ")]}⦄⟧") for c in text)]
    whole = text[:1] in tuple("([{⦃⟦") and 0 not in depths[:-1] and depths[-1:] == [0]
    for c, depth in zip(text[whole:len(text) - whole], depths[whole:]):
        if c in ",;" and depth == whole:
            items, separators = items + [""], separators + c
        else:
            items[-1] += c
    return (text[:1] + text[-1:]) * whole, items, separators

NAME = re.compile(
    r"([A-Za-z][\w:{}']*|\([A-Za-z,]*\))(?:=|\\in(?![a-z]))(.*)|(.*)=([A-Za-z])", re.S)
CHOICE = re.compile(r"(?:(?:option|choice) )?\(?([A-J])(\)?|[.:)].*)", re.S | re.I)
WORDS = re.compile(r"(?=.*[A-Za-z]{2})[\w\s'.,?!-]*")

def same(a, b, depth=0):
    """Are two normalized answers the same?"""
    if a == b or len(a) + len(b) > 10_000 or depth > 4:  # no other answer is that long or deep
        return a == b != ""
    choices = [CHOICE.fullmatch(x) for x in (a, b)]
    if all(choices) and any(m[2] in ("", ")") for m in choices):  # C is (C) is "C. Neon"
        return choices[1][1] in (choices[0][1], choices[0][1].upper())
    equal = equal_numbers(a, b)
    if equal is not None:
        return equal
    names = [NAME.fullmatch(x) for x in (a, b)]
    if any(names):
        (name_a, a), (name_b, b) = (
            (m[1] or m[4], m[2] or m[3] or "") if m else (None, x) for m, x in zip(names, (a, b)))
        return (None in (name_a, name_b) or name_a == name_b) and same(a, b, depth + 1)
    (kind_a, items_a, marks_a), (kind_b, items_b, marks_b) = split(a), split(b)
    if len(items_a) == len(items_b) and len(items_a) + len(kind_a) > 1:
        if {kind_a, kind_b} <= {"", "⦃⦄", "{}"}:  # these have no order
            items_a, items_b = (sorted(items, key=lambda item: str(number(item) or item))
                                for items in (items_a, items_b))
        elif kind_a != kind_b or kind_a == "⟦⟧" and marks_a != marks_b:
            return False
        return all(same(x, y, depth + 1) for x, y in zip(items_a, items_b))
    return bool(WORDS.fullmatch(a)) and a.lower().rstrip("!") == b.lower().rstrip("!")

def is_correct(response, gold):
    """Is the response's final answer the gold one? Any two strings give a bool."""
    answer = extract_answer(response)
    gold = extract_answer(gold) if "\\boxed" in gold else gold
    return answer is not None and gold is not None and same(normalize(answer), normalize(gold))


# ---- 3. Problems: the built-in task, or a file ---------------------------------------------------
# The task is to add three two-digit numbers, at once or after written column sums with a carry:
#     47+85+36=?  ->  \boxed{168}          or          7+5+6=18;4+8+3+1=16;\boxed{168}
# A tiny model cannot add in its head, but it can on paper. Its teacher is always right and mostly
# shows no work: a bad habit to copy, and RL has to find the better one.

WRITTEN_SHARE = 0.1  # of the teacher's answers, in the last part of the warm start

def make_problem(generator, held_out):
    """A sum, as {"problem", "answer"}. One sum in ten, whatever the order of its numbers, belongs
    to the held-out set, so training never meets it."""
    while True:
        numbers = generator.integers(10, 100, 3).tolist()
        if (zlib.crc32(repr(sorted(numbers)).encode()) % 10 == 0) == held_out:
            return {"problem": "%d+%d+%d=?" % tuple(numbers), "answer": str(sum(numbers))}

def demonstrate(problem, written):
    """The teacher's answer to a sum, with or without the written work."""
    (a, x), (b, y), (c, z) = (divmod(int(n), 10) for n in re.findall(r"\d+", problem))
    units, carry = x + y + z, (x + y + z) // 10
    work = f"{x}+{y}+{z}={units};{a}+{b}+{c}+{carry}={a + b + c + carry};"
    return work * written + "\\boxed{%d}" % (10 * (a + b + c) + units)

LONGEST_PROBLEM = 20_000  # characters

def read_problems(path):
    """A JSONL file, or one JSON array, of objects with problem (or question) and answer, names in
    any case. -> a list of {"problem", "answer"}; rows without a usable answer are dropped."""
    where, advice = path, ""
    try:
        if path.startswith("hf://datasets/"):
            from huggingface_hub import hf_hub_download
            owner, name, file = path.removeprefix("hf://datasets/").split("/", 2)
            advice = "; a local file needs no network"
            path = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
        text, rows = Path(path).read_text(encoding="utf-8"), []
        for n, line in enumerate([] if text.lstrip()[:1] == "[" else text.split("\n"), 1):
            where = f"{path}, line {n}"
            rows += [json.loads(line)] if line.strip() else []
        rows = rows or json.loads(text.strip() or "[]")
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{where}: cannot be read as JSONL or a JSON array ({reason}){advice}")
    problems, dropped = {}, []  # by text: no problem may be both trained on and held out
    for row in rows:
        row = {key.lower(): value for key, value in row.items()} if type(row) is dict else {}
        problem = row.get("problem") or row.get("question")
        answer = str(row.get("answer")).rpartition("####")[2].strip()  # GSM8K: after a solution
        usable = row.get("answer") is not None and is_correct(f"\\boxed{{{answer}}}", answer)
        if problem and isinstance(problem, str) and usable and problem not in problems and (
                len(problem) <= LONGEST_PROBLEM):
            problems[problem] = {"problem": problem, "answer": answer}
        else:
            dropped.append(row)
    if dropped:
        print(f"{path}: dropped {len(dropped)} of {len(rows)} rows, which repeat a problem, are "
              f"too long or have no answer to check; the first is {dropped[0]!r:.200}")
    if not problems:
        raise UserError(f"{path}: no row has both a problem and a usable answer")
    return list(problems.values())

def load_problems(cfg):
    """-> (problems to train on, held-out problems), two lists of {"problem", "answer"}."""
    generator = rng(cfg.seed, 0, "problems")
    held_out = read_problems(cfg.eval_data)[:cfg.eval_problems] if cfg.eval_data else []
    if held_out and cfg.steps == 0:
        return [], held_out
    if not cfg.data:
        return ([make_problem(generator, held_out=False) for _ in range(10_000)], held_out or
                [make_problem(generator, held_out=True) for _ in range(cfg.eval_problems)])
    problems = read_problems(cfg.data)
    generator.shuffle(problems)
    n = 0 if held_out else min(cfg.eval_problems, max(1, len(problems) // 10))
    if n == len(problems):
        raise UserError(f"{cfg.data}: nothing can be held out of one problem; give --eval-data")
    return problems[n:], held_out or problems[:n]


# ---- 4. The model: a causal LM of transformers, a tiny one made here or a real one loaded --------

def make_model(seed):
    """A Qwen2 of 0.13M random weights and its tokenizer of 19 tokens."""
    words = ["<pad>", "<bos>", "<eos>", *"0123456789+=?;", "\\boxed{", "}"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(int(rng(seed, 0, "weights").integers(2**62)))
    return transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        max_position_embeddings=64, initializer_range=0.1,  # 0.02, the default, suits wide models
        pad_token_id=0, bos_token_id=1, eos_token_id=2)), tokenizer

def devices(cfg):
    """-> where the model is, its optimizer and the reference; the toy is too small for a GPU."""
    names = ("device", "master_device", "ref_device")
    for name in names:
        if getattr(cfg, name) == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--{name.replace('_', '-')} cuda: PyTorch sees no such GPU; leave the "
                            "flag out, or take cpu")
    auto = "cuda" if torch.cuda.is_available() and cfg.preset != "toy" else "cpu"
    auto = auto if cfg.device == "auto" else cfg.device
    return [torch.device(auto if getattr(cfg, name) == "auto" else getattr(cfg, name))
            for name in names]

@torch.no_grad()
def check_head(model, name):
    """UserError unless logits = hidden @ lm_head.T, on which q_from_logits relies. The head's
    output is blown up on the way, for a soft cap bends only large logits."""
    head, tokens = model.get_output_embeddings(), torch.arange(8, device=model.device)[None]
    hook = head.register_forward_hook(lambda module, inputs, output: output * 1000)
    logits = model(input_ids=tokens).logits.float()                                # [1, 8, A]
    hook.remove()
    hidden = model.base_model(input_ids=tokens).last_hidden_state                  # [1, 8, D]
    expected = F.linear(hidden, head.weight).float() * 1000                        # [1, 8, A]
    rounding = max(1e-3, 4 * torch.finfo(model.dtype).eps)
    if (logits - expected).abs().max() > rounding * expected.abs().max():
        raise UserError(f"--model {name}: its logits are not hidden @ lm_head.T (a bias, a scale "
                        "or a soft cap comes between), so Q cannot be computed here; take another")

def load_model(cfg, device):
    """-> (model, tokenizer). UserError if the model does not suit this file."""
    if not cfg.model:
        model, tokenizer = make_model(cfg.seed)
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
            config = transformers.AutoConfig.from_pretrained(cfg.model)
            for name, value in config.to_dict().items():
                if "drop" in name and isinstance(value, float):
                    setattr(config, name, 0.0)  # what learns must be what samples
            bfloat16 = cfg.dtype == "bfloat16" or (
                cfg.dtype == "auto" and device.type == "cuda"
                and torch.cuda.is_bf16_supported(including_emulation=False))
            model = transformers.AutoModelForCausalLM.from_pretrained(
                cfg.model, config=config, dtype=torch.bfloat16 if bfloat16 else torch.float32)
            if cfg.gradient_checkpointing:  # under its new name and its old one
                enable = getattr(model, "activation_checkpointing_enable",
                                 model.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            advice = "; a local folder needs no network" * (not Path(cfg.model).exists())
            raise UserError(f"--model {cfg.model}: no causal LM with its tokenizer to load there "
                            f"({reason}){advice}")
    model.to(device).eval()
    check_head(model, cfg.model)
    # Samples must follow softmax(logits), or they are not the policy's. Models bring a temperature,
    # a top-k and more in their generation_config, and generate() fills from it whatever a caller
    # leaves open. So a complete one replaces it; only the tokens that end a response are kept.
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise UserError(f"--model {cfg.model}: it names no end-of-sequence token")
    pad_id = min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=cfg.max_new_tokens,
        eos_token_id=sorted(ends), pad_token_id=pad_id, bos_token_id=tokenizer.bos_token_id)
    return model, tokenizer


# ---- 5. Q and V ----------------------------------------------------------------------------------
# Shapes from here on: B responses, T tokens in the longest, N tokens in all of them, L tokens in
# the longest prompt + response, D hidden size, A vocabulary (the actions).

def matmul(a, b):
    """a @ b in float32 (float64 from float64). A GPU takes bfloat16 operands as they are."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)

class _QFromLogits(torch.autograd.Function):
    """q_from_logits with a backward of its own. Only one block of logits exists at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, actions, block):
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))         # [N, D]
        q = (wide * F.embedding(actions, weight)).sum(1)                           # [N]
        v = torch.full_like(q, -torch.inf)                                         # [N]
        for start in range(0, len(weight), block):
            logits = matmul(hidden, weight[start:start + block].T)                 # [N, block]
            v = torch.logaddexp(v, logits.logsumexp(1))                            # [N]
        ctx.save_for_backward(hidden, weight, actions, v)
        ctx.block = block
        return q, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_v):
        # dV / dlogit_a = pi(a); dQ / dlogit_a = 1 at the action taken, else 0.
        hidden, weight, actions, v = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=v.dtype)                      # [N, D]
        grad_weight = torch.empty_like(weight)                                     # [A, D]
        for start in range(0, len(weight), ctx.block):
            part = weight[start:start + ctx.block]                                 # [block, D]
            grad = matmul(hidden, part.T).sub_(v[:, None]).exp_().mul_(grad_v[:, None])
            column = (actions - start).clamp(0, len(part) - 1)                     # [N]
            here = column == actions - start              # [N] is the action in this block?
            grad.scatter_add_(1, column[:, None], (grad_q * here)[:, None])        # [N, block]
            if hidden.is_cuda:
                grad = grad.to(hidden.dtype)  # for the products; their sums are float32
            grad_hidden += matmul(grad, part)                                      # [N, D]
            grad_weight[start:start + ctx.block] = matmul(grad.T, hidden)          # [block, D]
        return grad_hidden.to(hidden.dtype), grad_weight, None, None

def q_from_logits(hidden, weight, actions, block=4096):
    """Q(s, a) and V(s) of N states, without ever holding their [N, A] logits.

    hidden [N, D], weight [A, D] (the LM head), actions [N] int64 -> (q [N], v [N]), where
    q[i] = hidden[i] . weight[actions[i]] and v[i] = logsumexp_a hidden[i] . weight[a], in float32
    (float64 from float64; V is 10 to 40, where bfloat16 has steps of up to a quarter).
    Differentiable in hidden and weight. IndexError for an action outside the vocabulary.

    8192 x 151,936 logits are 5 GB, softmax and gradient as much again. So the vocabulary is walked
    in blocks with a running logsumexp, and again in backward: O(N * block) memory.
    """
    if hidden.shape != (len(actions), weight.shape[1]):
        raise ValueError(f"hidden {tuple(hidden.shape)} must be [N, D], for weight "
                         f"{tuple(weight.shape)} [A, D] and actions {tuple(actions.shape)} [N]")
    return _QFromLogits.apply(hidden, weight, actions, block)

def pad(rows, device, side="right"):
    """1-D tensors -> one tensor [B, T] on device, padded with zeros."""
    return pad_sequence(rows, batch_first=True, padding_side=side).to(device)

def score(model, batch):
    """-> (q, v, mask), [B, T] each: Q(s_h, a_h) and V(s_h) of the response tokens of a batch of
    dicts with "prompt" and "response", 1-D int64 tensors.

    mask marks the response tokens, EOS included. It comes from lengths, never from comparing with
    a pad id, which may be the EOS id. The hidden state that chooses a token is the one at the
    token before it: for the first, at the last token of the prompt.
    """
    actions = pad([t["response"] for t in batch], model.device)                    # [B, T]
    lengths, before = torch.tensor([(len(t["response"]), len(t["prompt"]) - 1) for t in batch],
                                   device=model.device).T                          # [B], [B]
    mask = torch.arange(actions.shape[1], device=model.device) < lengths[:, None]  # [B, T]
    # The padding is on the right, where a causal model's earlier tokens do not see it: it needs no
    # attention mask. The last token is left out, for nothing follows it.
    tokens = pad([torch.cat([t["prompt"], t["response"]])[:-1] for t in batch], model.device)
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, L, D]
    row, h = mask.nonzero(as_tuple=True)                                           # [N], [N]
    q, v = q_from_logits(hidden[row, before[row] + h], model.get_output_embeddings().weight,
                         actions[mask])                                            # [N], [N]
    zeros = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)                # [B, T]
    return zeros.masked_scatter(mask, q), zeros.masked_scatter(mask, v), mask

def micro_batches(batch, max_tokens):
    """The batch as lists of up to max_tokens padded tokens (one response at least), like lengths
    together, so that little of them is padding."""
    groups = [[]]
    sizes = [len(t["prompt"]) + len(t["response"]) for t in batch]
    for i in sorted(range(len(batch)), key=sizes.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * sizes[i] > max_tokens:
            groups.append([])
        groups[-1].append(batch[i])
    return groups


# ---- 6. The warm start ---------------------------------------------------------------------------
# RL strengthens what a model does now and then, so the tiny one is first shown how: the teacher
# writes its work until the model can add, and then mostly leaves it out.

def encode_prompt(tokenizer, problem, cfg):
    """The token ids of the prompt, [P]: in the chat template where there is one. As that brings
    its own BOS, none is added to it. What a problem says is text: a space breaks up the names of
    special tokens in it, which could end the turn."""
    problem = problem.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is none
    for token in {t.content for t in tokenizer.added_tokens_decoder.values()}:
        if len(token) > 1 and not token.isspace():
            problem = problem.replace(token, token[0] + " " + token[1:])
    text = cfg.prompt.replace("{problem}", problem)
    raw = cfg.raw_prompt or tokenizer.chat_template is None
    if not raw:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True)
    return torch.tensor(tokenizer(text, add_special_tokens=raw)["input_ids"])

def distill(model, tokenizer, cfg):
    """Supervised learning from the teacher: the mean of -log pi = V - Q over its tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    generator = rng(cfg.seed, 0, "distillation")
    for step in progress(range(cfg.distill_steps), "distilling"):
        done, batch = step / cfg.distill_steps, []
        for _ in range(32):
            problem = make_problem(generator, held_out=False)["problem"]
            text = demonstrate(problem, done < 0.8 or generator.random() < WRITTEN_SHARE) + "<eos>"
            response = tokenizer(text, add_special_tokens=False)["input_ids"]
            batch.append({"prompt": encode_prompt(tokenizer, problem, cfg),
                          "response": torch.tensor(response)})
        q, v, mask = score(model, batch)                                           # [B, T] each
        loss = (v - q).sum() / mask.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = math.cos(done * math.pi / 2)**2
        optimizer.param_groups[0]["lr"] = 6e-3 * min((step + 1) / 50, cosine)
        optimizer.step()


# ---- 7. Rollouts: the behaviour policy is softmax(logits) at temperature 1 -----------------------

@torch.no_grad()
def sample(model, prompts, cfg, seed, temperature=1.0, top_p=1.0):
    """One response to each prompt, a list of 1-D int64 tensors that may go on after the EOS.

    generate() samples 256 side by side until the slowest ends. Continuous batching puts the next
    prompt in as soon as one response has ended, and pages the cache, on a GPU in CUDA graphs. Its
    manager lives for one call, so that no cache outlives the weights that made it.
    """
    how = copy.copy(model.generation_config)
    how.do_sample, how.temperature, how.top_p = temperature > 0, temperature or 1.0, top_p
    cuda = model.device.type == "cuda"
    if cfg.sampler == "continuous" or cfg.sampler == "auto" and cuda:
        limits = {} if cuda else {"num_blocks": 64, "max_batch_tokens": 512}  # else found by trial
        outputs = model.generate_batch(
            [prompt.tolist() for prompt in prompts], generation_config=how, warmup=cuda,
            continuous_batching_config=transformers.ContinuousBatchingConfig(seed=seed, **limits))
        errors = [out.error for out in outputs.values() if out.error]
        if errors or len(outputs) < len(prompts):
            raise UserError(f"continuous batching failed ({errors[:1] or 'see above'}); try "
                            "--sampler generate")
        return [torch.tensor(out.generated_tokens) for out in outputs.values()]
    torch.manual_seed(seed)
    responses = []
    for start in progress(range(0, len(prompts), 256), "sampling"):
        chunk = prompts[start:start + 256]
        # generate() wants the prompts to end side by side: padding goes to the left.
        tokens = pad(chunk, model.device, "left")                                  # [B, P]
        mask = pad([torch.ones_like(prompt) for prompt in chunk], model.device, "left")  # [B, P]
        sampled = model.generate(tokens, attention_mask=mask, generation_config=how)
        responses += sampled[:, tokens.shape[1]:].cpu()
    return responses

def rollout(model, tokenizer, problems, cfg, step, purpose, temperature=1.0, top_p=1.0):
    """Samples one response to each problem. -> trajectories: dicts with problem, answer, prompt
    [P], response [T] (int64, EOS included), text, ended (by itself?), reward (0 or 1), step."""
    known = {p["problem"]: encode_prompt(tokenizer, p["problem"], cfg) for p in problems}
    # Some chat templates open the thought: what was cut in it has concluded nothing, box or not.
    thoughts = {key: "<think>" * tokenizer.decode(prompt).rstrip().endswith("<think>")
                for key, prompt in known.items()}
    prompts = [known[p["problem"]] for p in problems]
    seed = int(rng(cfg.seed, step, purpose).integers(2**62))
    ends = torch.tensor(model.generation_config.eos_token_id)
    trajectories = []
    for p, prompt, response in zip(problems, prompts, sample(model, prompts, cfg, seed, temperature,
                                                             top_p)):
        stops = torch.isin(response, ends).nonzero()[:, 0].tolist()
        response = response[:stops[0] + 1 if stops else None].clone()              # [T]
        text = tokenizer.decode(response, skip_special_tokens=True)
        reward = float(bool(stops) and is_correct(thoughts[p["problem"]] + text, p["answer"]))
        trajectories.append({**p, "prompt": prompt, "response": response, "text": text,
                             "ended": bool(stops), "reward": reward, "step": step})
    return trajectories

@torch.no_grad()
def cache_values(model, trajectories, cfg, name):
    """Writes the model's "q_<name>" and "v_<name>" [T] into each trajectory. The reference's serve
    at every reuse, so they are computed once: by the live model's function, or equal models would
    not cancel to zero. GRPO also needs those of the policy that sampled."""
    for group in progress(micro_batches(trajectories, cfg.micro_batch_tokens), "scoring"):
        q, v, mask = (x.cpu() for x in score(model, group))                        # [B, T] each
        for i, t in enumerate(group):
            t["q_" + name], t["v_" + name] = q[i][mask[i]], v[i][mask[i]]          # [T], [T]


# ---- 8. The replay buffer ------------------------------------------------------------------------

class ReplayBuffer:
    """First in, first out, by trajectory. With room for M, batches of B and K updates after each,
    a trajectory is used floor(M/B) * (B/M) * K times, about K, before it leaves: eq. (3).
    Sample number i depends on (seed, i) and on what is in the buffer, nothing else."""

    def __init__(self, capacity, seed=0):
        self.capacity, self.seed, self.draws, self.items = capacity, seed, 0, []

    def __len__(self):
        return len(self.items)

    def add(self, items):
        """Appends items; beyond the capacity the oldest leave."""
        self.items = (self.items + list(items))[-self.capacity:]

    def sample(self, n):
        """min(n, len) different items, uniformly. Nothing is removed."""
        self.draws += 1
        order = rng(self.seed, self.draws, "replay").permutation(len(self.items))
        return [self.items[i] for i in order[:n]]


# ---- 9. The method -------------------------------------------------------------------------------
# In the paper's letters: s_h is the text before response token h (s_1 the prompt), a_h that token,
# r the reward, paid at the last token. The aim is max E[r] - beta * KL(pi || pi_ref)     eq. (1):
# beta is the price of leaving the reference.

def bellman_target(v, q_ref, v_ref, reward, mask, beta):
    """The combined stepwise / outcome Bellman target of Q(s_h, a_h), [B, T], 0 in the padding.

    v, q_ref, v_ref [B, T] float; reward [B]; mask [B, T] bool, True on response tokens, which
    start in column 0 without a gap (else, or in an empty row, ValueError). Nothing in the padding,
    not even nan, reaches a value or gradient. After the last token V = 0, for both models.

        T Q(s_h, a_h) =  r / beta, at the last token                              outcome signal
                      +  log pi_ref(a_h|s_h) + V_ref(s_h) - V_ref(s_{h+1})        stepwise signal
                      +  V(s_{h+1})                                               bootstrap

    The stepwise signal is what the reference model itself thinks of a token. Its first two terms
    are Q_ref(s_h, a_h). In this order of operations, equal models cancel to exactly zero:
    """
    if not (mask.any(1).all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError("mask: every row must start with a response token and have no gap")
    gap = (v - v_ref).masked_fill(~mask, 0)                                        # [B, T]
    next_gap = F.pad(gap[:, 1:], (0, 1))                       # [B, T] V - V_ref at s_{h+1}
    last = mask & ~F.pad(mask[:, 1:], (0, 1))                                      # [B, T]
    outcome = torch.where(last, reward[:, None] / beta, 0)                         # [B, T]
    return q_ref.masked_fill(~mask, 0) + next_gap + outcome                        # [B, T]

def reval_loss(q, v, q_ref, v_ref, reward, mask, beta, calibrated=True):
    """ReVal's loss, eq. (2). Shapes as above. -> (loss, {"residual": [B], in nats}).

    Sum Q - T Q over a response. As Q(s_h, a_h) = V(s_h) + log pi(a_h|s_h), every V(s_{h+1}) comes
    once with plus and once with minus, and so does V_ref: the sum telescopes to

        residual = V(s_1) - V_ref(s_1) + log pi(response) - log pi_ref(response) - r / beta

    It is the sum that is squared; squaring its parts one by one is reported to collapse.

    * Calibrated start: while the model equals the reference and r = 0, the residual of every
      response is 0, and so is the gradient. TBRM (calibrated=False) leaves V_ref(s_1) out, and
      begins by pushing V(s_1), some 10 nats, down to nothing.
    * Fixed point: the residual is 0 everywhere for pi* = pi_ref exp(r / beta) / Z, with V*(s_1) =
      V_ref(s_1) + log Z. Whoever wrote the responses, it is the same: so replay needs no
      importance weights.
    * Scale: at the start, with the centered reward, residual = -r / beta, and the gradient of
      beta/2 * residual^2 is that of REINFORCE with the group's mean as baseline.
    * beta goes with length: r / beta nats are spread over the tokens of a response, so longer
      ones want a smaller beta. The paper's two settings have beta * length of about 10.
    * Not determined: a constant added to all logits of a later state. Only pi and V(s_1) matter.
    """
    target = bellman_target(v, q_ref, v_ref, reward, mask, beta)                   # [B, T]
    residual = (q - target).masked_fill(~mask, 0).sum(1)                           # [B]
    if not calibrated:
        residual = residual + v_ref[:, 0]                                          # [B]
    return beta / 2 * residual.square().mean(), {"residual": residual.detach()}

def grpo_loss(logp, logp_old, advantage, mask, n_tokens, clip_low=0.2, clip_high=0.28):
    """GRPO's loss, to compare with. -> (loss, {"clipped": share of tokens beyond the clip}).

    logp, logp_old, mask [B, T]; advantage [B], (r - mean) / (std + 1e-6) within the group. The sum
    is divided by n_tokens, those of the whole batch. Here old data need the importance weight
    pi / pi_old, and beyond the clip they teach nothing.
    """
    ratio = (logp - logp_old).masked_fill(~mask, 0).exp()                          # [B, T]
    near = ratio.clamp(1 - clip_low, 1 + clip_high)                                # [B, T]
    gain = torch.minimum(ratio * advantage[:, None], near * advantage[:, None])    # [B, T]
    clipped = (ratio != near).sum() / n_tokens
    return -gain.masked_fill(~mask, 0).sum() / n_tokens, {"clipped": clipped}


# ---- 10. One gradient ----------------------------------------------------------------------------

def add_signals(trajectories, cfg):
    """Writes into each trajectory the "signal" its loss sees: the reward, that less the mean of
    its group (the cfg.rollouts responses to one problem), or GRPO's advantage."""
    reward = torch.tensor([t["reward"] for t in trajectories]).view(-1, cfg.rollouts)  # [P, R]
    centered = reward - reward.mean(1, keepdim=True)                               # [P, R]
    signal = centered if cfg.reward == "centered" else reward                      # [P, R]
    if cfg.algo == "grpo":
        signal = centered / (reward.std(1, keepdim=True) + 1e-6)                   # [P, R]
    for t, value in zip(trajectories, signal.flatten()):
        t["signal"] = value

def master_weights(model, device):
    """The float32 weights that the optimizer changes, on device, with a float32 sum of gradients.

    A weight of bfloat16 has steps of 1/256 of its size: a learning rate of 1e-6 would never move
    it. So the sum of many small steps is kept apart, as is the sum of the micro-batches' gradients:
    backward adds each as soon as it is made, and frees it. A float32 model is its own master.
    """
    def add(master, weight):
        new = weight.grad.to(master.device)
        master.grad = new.float() if master.grad is None else master.grad.add_(new)
        weight.grad = None
    masters = []
    for weight in model.parameters():
        masters.append(weight)
        if (weight.dtype, weight.device.type) != (torch.float32, device.type):
            masters[-1] = weight.detach().to(device, torch.float32, copy=True).requires_grad_()
            weight.register_post_accumulate_grad_hook(functools.partial(add, masters[-1]))
    return masters

def gradient(model, masters, batch, cfg):
    """Puts the gradient of the loss of a batch, clipped, into the master weights' .grad. -> figures
    of the batch.

    Micro-batches save memory and change nothing: each sum is divided by a count of the whole
    batch. If something is not finite: FloatingPointError, which names the response.
    """
    for weight in masters:
        weight.grad = None
    n_tokens = sum(len(t["response"]) for t in batch)
    stats = dict.fromkeys(("loss", "residual", "v_gap", "kl", "entropy"), 0.0)
    model.train()  # for gradient checkpointing
    for group in progress(micro_batches(batch, cfg.micro_batch_tokens), "learning"):
        q, v, mask = score(model, group)                                           # [B, T] each
        q_ref, v_ref = (pad([t[k] for t in group], q.device) for k in ("q_ref", "v_ref"))  # [B, T]
        signal = torch.stack([t["signal"] for t in group]).to(q.device)            # [B]
        if cfg.algo == "grpo":
            logp_old = pad([t["q_old"] - t["v_old"] for t in group], q.device)     # [B, T]
            loss, _ = grpo_loss(q - v, logp_old, signal, mask, n_tokens)
        else:
            loss, info = reval_loss(q, v, q_ref, v_ref, signal, mask, cfg.beta, cfg.algo == "reval")
            loss = loss * len(group) / len(batch)
            stats["residual"] += info["residual"].square().sum().item() / len(batch)
        loss.backward()
        stats["loss"] += loss.item()
        stats["v_gap"] += (v - v_ref)[:, 0].sum().item() / len(batch)
        stats["kl"] += ((q - v) - (q_ref - v_ref)).sum().item() / len(batch)
        stats["entropy"] += (v - q).sum().item() / n_tokens
    model.eval()
    norm = torch.nn.utils.clip_grad_norm_(masters, 1.0).item()
    if not math.isfinite(stats["loss"] + norm):
        for t in batch if len(batch) > 1 else ():  # taken alone, the culprit names itself
            gradient(model, masters, [t], cfg)
        raise FloatingPointError(f"loss {stats['loss']}, gradient norm {norm} for {len(batch)} "
                                 f"responses, the last of step {batch[-1]['step']} to "
                                 f"{batch[-1]['problem']!r:.200}")
    stats["residual"] = math.sqrt(stats["residual"]) if cfg.algo != "grpo" else None
    return stats | {"grad_norm": norm}

@torch.no_grad()
def update(model, masters, optimizer):
    """One step of the optimizer; the weights that sample follow their masters, in place."""
    optimizer.step()
    for weight, master in zip(model.parameters(), masters):
        if weight is not master:
            weight.copy_(master.to(weight.dtype))

def rehearse(model, masters, optimizer, prompt, cfg):
    """The longest micro-batch there can be, and an update by nothing. If memory does not suffice,
    it fails now and not in an hour; the weights, the optimizer and all draws stay as they were."""
    zeros = torch.zeros(cfg.max_new_tokens)                                        # [T]
    t = {"prompt": prompt, "response": zeros.long(), "problem": "a rehearsal", "step": 0,
         "signal": zeros[0], "q_ref": zeros, "v_ref": zeros, "q_old": zeros, "v_old": zeros}
    length = len(prompt) + cfg.max_new_tokens
    gradient(model, masters, [t] * max(1, cfg.micro_batch_tokens // length), cfg)
    for master in masters:
        master.grad = None if master.grad is None else master.grad.zero_()
    update(model, masters, optimizer)  # the learning rate is still 0
    for state in optimizer.state.values():
        state["step"].zero_()


# ---- 11. The record of a run ---------------------------------------------------------------------

METRICS = ("step rollouts updates reward accuracy loss residual v_gap kl grad_norm entropy length "
           "truncated age seconds_rollout seconds_update").split()
COLUMNS = {"step": (4, 0), "rollouts": (8, 0), "reward": (6, 3), "accuracy": (8, 3),
           "residual": (8, 2), "kl": (7, 2), "length": (7, 1), "age": (5, 1), "seconds": (7, 1)}

def replace(path, write):
    """Writes a file by calling write on an open one beside it, which takes its place when it is
    whole: whatever happens, path is what it was or what it shall be."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
        part.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be written ({reason}); what was there before stays")

def write_config(out, cfg):
    """Writes config.json, from which --resume takes the settings."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    config = dataclasses.asdict(cfg) | {"out": str(out), "resume": None, "versions": versions}
    replace(out / "config.json", lambda file: file.write(json.dumps(config, indent=1).encode()))

def open_run(cfg):
    """Makes the folder of the run, never one that exists, unless to resume. -> its path"""
    if cfg.resume:
        return Path(cfg.resume)
    name = f"runs/{cfg.preset}-{cfg.algo}-s{cfg.seed}"
    names = [cfg.out] if cfg.out else (name + f"-{n}" * (n > 1) for n in range(1, 10**6))
    out = Path(next(name for name in names if cfg.out or not Path(name).exists()))
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: no folder can be made there ({error.strerror}); name a new "
                        "one, or continue a run with --resume")
    write_config(out, cfg)
    return out

def record(out, row):
    """Appends a row to metrics.jsonl and prints its main columns."""
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({key: row.get(key) for key in METRICS}) + "\n")
    row = row | {"seconds": row.get("seconds_rollout", 0) + row.get("seconds_update", 0)}
    print(" ".join("-".rjust(width) if row.get(key) is None else f"{row[key]:{width}.{digits}f}"
                   for key, (width, digits) in COLUMNS.items()), flush=True)

def print_samples(trajectories):
    """One right and one wrong response, as text."""
    for word, reward in (("right", 1), ("wrong", 0)):
        for t in [t for t in trajectories if t["reward"] == reward][:1]:
            text = t["text"] + "[cut]" * (not t["ended"])
            print(f"  {word}: {t['problem']!r:.300} -> {text!r:.300}")

def save_checkpoint(out, progress, model, masters, optimizer, reference, buffer):
    """Writes out/checkpoint.pt: all that the next iteration depends on, in tensors and plain
    values. Random draws depend on (seed, step, purpose) alone, so no generator is in it."""
    names = [name for name, _ in model.named_parameters()]
    state = {"format": "reval_min 1", "progress": progress, "draws": buffer.draws,
             "masters": {name: master.detach() for name, master in zip(names, masters)},
             "optimizer": optimizer.state_dict(), "reference": reference.state_dict(),
             "buffer": buffer.items}
    replace(out / "checkpoint.pt", lambda file: torch.save(state, file))

def load_checkpoint(out, cfg, fingerprint, model, masters, optimizer, reference, buffer):
    """Puts the state of out/checkpoint.pt into these, and cuts the logs back to its step. -> its
    progress. UserError if it is broken or foreign; nothing in it is ever executed."""
    try:
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for (name, weight), master in zip(model.named_parameters(), masters):
                weight.copy_(master.copy_(state["masters"][name]))
        optimizer.load_state_dict(state["optimizer"])
        reference.load_state_dict(state["reference"])
        buffer.items, buffer.draws = state["buffer"], state["draws"]
        step = state["progress"]["step"]
        if step > cfg.steps:
            raise ValueError(f"it is at step {step} already; give more --steps than that")
        if state["progress"]["problems"] != fingerprint:
            raise ValueError("its --data or --eval-data have changed; put them back")
        extra = step % cfg.eval_every > 0 and step < cfg.steps  # an evaluation only an end makes
        for name in ("metrics.jsonl", "eval.jsonl"):
            lines = (out / name).read_text(encoding="utf-8").split("\n")[:-1]  # a torn one, or ""
            rows = [row for row in map(json.loads, lines) if row["step"] <= step]
            if extra and name == "eval.jsonl":
                rows = [row for row in rows if row["step"] < step]
            elif extra:
                rows[-1]["accuracy"] = None
            text = "".join(json.dumps(row) + "\n" for row in rows)
            replace(out / name, lambda file: file.write(text.encode()))
        return state["progress"]
    except UserError:
        raise
    except Exception as error:  # whatever a foreign or damaged file makes torch and json raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"--resume {out}: cannot continue from its checkpoint.pt ({reason:.200})")

def save(model, tokenizer, out):
    """Writes out/model, for from_pretrained, under that name only when whole; and curves.png."""
    part = out / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.rmtree(out / "model", ignore_errors=True)  # an older one, if the run was resumed
        part.rename(out / "model")
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise UserError(f"{out / 'model'}: cannot be written ({error}); make room, then --resume")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no curves.png: python -m pip install matplotlib")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    figure = Figure(figsize=(15, 3), layout="constrained")
    for axis, key in zip(figure.subplots(1, 5), ("reward", "accuracy", "residual", "kl", "length")):
        points = [(row["rollouts"], row[key]) for row in rows if row[key] is not None]
        axis.plot([x for x, _ in points], [y for _, y in points])
        axis.set(title=key, xlabel="rollouts")
    replace(out / "curves.png", lambda file: figure.savefig(file, format="png"))

def sickness(rows, before, after):
    """What is wrong with a run by its last five rows and two evaluations, in plain words with a
    mend, and a key for each: {key: text}."""
    rewards, last = [row["reward"] for row in rows[-5:]], rows[-1]
    doubt = 4 * math.hypot(before["stderr"], after["stderr"]) + 0.02
    found = {
        "zero": (len(rewards) == 5 and max(rewards) == 0, "no right answer in five iterations, so "
                 "nothing to learn from; take easier problems, a better model or more --rollouts"),
        "one": (len(rewards) == 5 and min(rewards) == 1, "every answer was right for five "
                "iterations, so nothing is left to learn; take harder problems"),
        "cut": (last["truncated"] > 0.5, f"{last['truncated']:.0%} of the responses were cut and "
                "earned nothing; raise --max-new-tokens"),
        "worse": (after["accuracy"] < before["accuracy"] - doubt,
                  f"accuracy fell from {before['accuracy']:.3f} to {after['accuracy']:.3f}; lower "
                  "--lr, or raise --beta")}
    return {key: text for key, (is_so, text) in found.items() if is_so}

def peak_memory_mb(device):
    """Peak memory: the GPU's where there is one, else the process's (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        return None
    import resource  # whose unit is a byte on macOS, a kB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# ---- 12. Training --------------------------------------------------------------------------------

def evaluate(model, tokenizer, problems, cfg, step, out):
    """Answers each problem n = cfg.eval_samples times, and appends a row for each to eval.jsonl.
    -> {"accuracy": avg@n, "stderr": its standard error over problems, "pass@k" for k = 2, 4, ... n:
    the chance that one of k is right, "length" in tokens, "truncated"}."""
    n = cfg.eval_samples
    answers = rollout(model, tokenizer, [p for p in problems for _ in range(n)], cfg, step,
                      "evaluation", cfg.eval_temperature, cfg.eval_top_p)
    groups = [answers[i:i + n] for i in range(0, len(answers), n)]
    with open(out / "eval.jsonl", "a", encoding="utf-8") as file:
        for p, group in zip(problems, groups):
            file.write(json.dumps({"step": step, **p, "right": sum(t["reward"] for t in group),
                                   "samples": [{"answer": extract_answer(t["text"]),
                                                "right": t["reward"], "ended": t["ended"],
                                                "length": len(t["response"])} for t in group]})
                       + "\n")
    right = [int(sum(t["reward"] for t in group)) for group in groups]
    passes = {f"pass@{k}": fmean(1 - math.comb(n - c, k) / math.comb(n, k) for c in right)
              for k in (2**i for i in range(1, n.bit_length()))}
    return {"accuracy": fmean(right) / n, "stderr": float(np.std(right)) / n / len(right)**0.5,
            **passes, "length": fmean(len(t["response"]) for t in answers),
            "truncated": fmean(not t["ended"] for t in answers)}

def iterations(first, last):
    """Yields first ... last. Ctrl-C or SIGTERM ends them after the current one, a second one at
    once."""
    asked, before = [], {}

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
    if threading.current_thread() is threading.main_thread():  # no other may
        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in range(first, last + 1):
            yield step
            if asked:
                return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def train(cfg):
    """Runs cfg from start to end. -> the figures that the command line prints last, as a dict."""
    begin = time.time()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    device, master_device, ref_device = devices(cfg)
    if not cfg.data:
        torch.set_num_threads(1)  # for so small a model a second thread is only one to wait for
    problems, held_out = load_problems(cfg)
    model, tokenizer = load_model(cfg, device)
    out = open_run(cfg)
    print(f"{cfg}\n{device}, {model.num_parameters() / 1e6:.2f}M parameters, {len(problems)} "
          f"problems, {len(held_out)} held out, results in {out}", flush=True)
    if not cfg.model and not cfg.resume:
        distill(model, tokenizer, cfg)
        print(f"distilled: {cfg.distill_steps} steps, {time.time() - begin:.0f} s", flush=True)

    batch_size = cfg.prompts * cfg.rollouts
    buffer = ReplayBuffer(cfg.buffer * batch_size, cfg.seed)
    learns = bool(cfg.steps or cfg.resume)
    if learns:
        reference = copy.deepcopy(model).requires_grad_(False).to(ref_device)
        masters = master_weights(model, master_device)
        optimizer = torch.optim.AdamW(masters, 0.0, (0.9, 0.95), weight_decay=0, fused=True)
        parts = (model, masters, optimizer, reference, buffer)
        if device.type == "cuda":
            longest = max((p["problem"] for p in problems), key=len)
            rehearse(model, masters, optimizer, encode_prompt(tokenizer, longest, cfg), cfg)
    fingerprint = zlib.crc32(repr((problems, held_out)).encode("utf-8", "replace"))
    if cfg.resume:
        progress = load_checkpoint(out, cfg, fingerprint, *parts)
        write_config(out, cfg)
    else:
        before = evaluate(model, tokenizer, held_out, cfg, 0, out)
        progress = {"step": 0, "tokens": 0, "seconds": 0.0, "elapsed": time.time() - begin,
                    "before": before, "after": before, "problems": fingerprint}
    print(" ".join(key.rjust(width) for key, (width, _) in COLUMNS.items()))
    if not cfg.resume:
        record(out, {"step": 0, "rollouts": 0, "updates": 0, "accuracy": before["accuracy"]})
        if learns:
            save_checkpoint(out, progress, *parts)
    begin, step, rows, told = time.time() - progress["elapsed"], progress["step"], [], set()

    for step in iterations(step + 1, cfg.steps):
        # 1. Collect: a few problems, several responses to each by the live model.
        start = time.time()
        chosen = rng(cfg.seed, step, "prompts").choice(
            len(problems), cfg.prompts, replace=cfg.prompts > len(problems))
        asked = [problems[i] for i in chosen for _ in range(cfg.rollouts)]
        fresh = rollout(model, tokenizer, asked, cfg, step, "rollout")
        add_signals(fresh, cfg)
        cache_values(reference.to(device), fresh, cfg, "ref")
        reference.to(ref_device)
        if cfg.algo == "grpo":
            cache_values(model, fresh, cfg, "old")
        buffer.add(fresh)
        sampled = time.time()

        # 2. Learn: once from the fresh batch, then from the buffer (GRPO: the fresh batch again).
        decay = 0.5 ** (step / cfg.half_life) if cfg.half_life else 1
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, step / max(1, cfg.warmup)) * decay
        stats, ages = [], []
        for k in range(cfg.updates):
            replay = k > 0 and cfg.algo != "grpo"
            batch = buffer.sample(batch_size) if replay else fresh
            stats.append(gradient(model, masters, batch, cfg))
            update(model, masters, optimizer)
            ages += [step - t["step"] for t in batch if replay]

        # 3. Now and then the reference catches up: what was cached from the old one is stale.
        if cfg.ref_reset and step % cfg.ref_reset == 0:
            reference.load_state_dict(model.state_dict())
            cache_values(model, buffer.items, cfg, "ref")
        learned = time.time()

        # 4. Tell. Figures of the fresh batch are those of the policy that sampled it.
        look = step % cfg.eval_every == 0 or step == cfg.steps
        after = evaluate(model, tokenizer, held_out, cfg, step, out) if look else progress["after"]
        rows.append(stats[0] | {
            "step": step, "rollouts": step * batch_size, "updates": step * cfg.updates,
            "reward": fmean(t["reward"] for t in fresh),
            "accuracy": after["accuracy"] if look else None,
            "grad_norm": fmean(s["grad_norm"] for s in stats),
            "length": fmean(len(t["response"]) for t in fresh),
            "truncated": fmean(not t["ended"] for t in fresh), "age": fmean(ages) if ages else None,
            "seconds_rollout": sampled - start, "seconds_update": learned - sampled})
        record(out, rows[-1])
        if look:
            print_samples(fresh)
        for key, text in sickness(rows, progress["before"], after).items():
            if key not in told:
                print("warning:", text, flush=True)
                told.add(key)

        # 5. Keep. After a kill the run goes on from here as if nothing had happened.
        progress = progress | {
            "step": step, "after": after, "elapsed": time.time() - begin,
            "tokens": progress["tokens"] + sum(len(t["response"]) for t in fresh),
            "seconds": progress["seconds"] + sampled - start}
        if step % cfg.save_every == 0:
            save_checkpoint(out, progress, *parts)

    if learns and step % cfg.save_every:
        save_checkpoint(out, progress, *parts)
    if step < cfg.steps:
        raise KeyboardInterrupt(f"stopped after step {step}; go on with --resume {out}")
    if learns or not cfg.model:
        save(model, tokenizer, out)
    before, after, tokens = progress["before"], dict(progress["after"]), progress["tokens"]
    return {"accuracy_before": before["accuracy"], "accuracy_after": after.pop("accuracy"), **after,
            "steps": cfg.steps, "rollouts": cfg.steps * batch_size,
            "updates": cfg.steps * cfg.updates, "tokens_generated": tokens,
            "seconds": time.time() - begin,
            "tokens_per_second": tokens / max(progress["seconds"], 1e-9),
            "peak_memory_mb": peak_memory_mb(device), "out": str(out)}

def main(argv):
    """The command line. -> exit status: 0; 2 after one line on what went wrong; 130 if it was told
    to stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a console cannot show comes out escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        summary = train(parse_args(argv))
    except KeyboardInterrupt as stop:
        print(f"reval_min: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        message = ("the GPU's memory is too small; lower --micro-batch-tokens or --max-new-tokens, "
                   "or give --master-device cpu --ref-device cpu "
                   f"({str(error).partition('. ')[0]})")
    except (UserError, FloatingPointError, OSError) as error:
        message = error
    else:
        for key, value in summary.items():
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        return 0
    print(f"reval_min: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

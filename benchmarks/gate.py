"""The correctness gate: no provider is timed before its result has been checked in the same run.

Our backends are held, on a random subset of rows, to the float64 reference: the same tokens, or a
near tie of the race's float64 keys, the probability of that token to float32 rounding, and for a
whole step exactly the reference's selection from the backend's own confidences.  Eager code has
random numbers of its own: its tokens have to be the argmax, or drawn with the right mean of -log p.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from maskgit.kernels.common import philox
from maskgit.kernels.common.arrays import dtype_name, to_numpy, widen
from maskgit.kernels.decode_step import reference
from maskgit.kernels.decode_step.rule.counts import next_masked_counts
from maskgit.kernels.decode_step.rule.plan import resolve

import maskgit

from .providers import NUM_STEPS, RULES, STEP, Inputs, Provider

_EPS = float(np.finfo(np.float32).eps)
_ROUNDING = {"float32": _EPS, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_MOST_ELEMENTS = 2**23  # of logits that are checked: 64 rows of 126464
_MOST_SIGMAS = 6.0


@dataclass(frozen=True)
class Verdict:
    """What the gate found for one provider."""

    passed: bool
    detail: str
    rows: int = 0
    near_ties: int = 0


def check(provider: Provider, mode: str, x: Inputs, seed: int = 0) -> Verdict:
    """Run a provider once and check its result; never raises."""
    try:
        out = [_host(array) for array in provider.prepare(x)()]
    except Exception as error:  # a provider that cannot run is reported, not fatal
        return Verdict(False, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    batch, length, vocab = x.logits.shape
    rows = np.random.default_rng(seed).permutation(batch * length)
    rows = np.sort(rows[: max(1, min(256, _MOST_ELEMENTS // vocab))])
    where = rows // length, rows % length
    logits = x.logits[where[0], where[1]]
    values = widen(to_numpy(logits), dtype_name(logits)).astype(np.float64)
    tokens = out[1 if mode == "step" else 0][where]
    if ((tokens < 0) | (tokens >= vocab)).any():
        return Verdict(False, "a token outside the vocabulary")
    log_p = values - values.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    own = np.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0]
    if mode == "greedy":
        wrong = int((np.take_along_axis(values, tokens[:, None], 1)[:, 0] < values.max(-1)).sum())
        if wrong:
            return Verdict(False, f"{wrong} of {rows.size} greedy tokens are not the argmax")
    else:
        sigmas = _sigmas(log_p, own)
        if abs(sigmas) > _MOST_SIGMAS:
            return Verdict(False, f"mean of -log p is {sigmas:.1f} standard errors off")
    if provider.backend is not None:
        return _check_ours(mode, x, where, logits, values, own, tokens, out)
    return _check_eager(mode, x, values, own, where, out)


def _host(array: Any) -> Any:
    name, host = dtype_name(array), to_numpy(array)
    return widen(host, name) if name in ("bfloat16", "float16") else host


def _sigmas(log_p: Any, own: Any) -> float:
    """How many standard errors the mean of -log p of the drawn tokens is off its expectation."""
    p = np.exp(log_p)
    mean = -(p * log_p).sum(-1)
    variance = (p * log_p**2).sum(-1) - mean**2
    return float((-own - mean).sum() / np.sqrt(max(variance.sum(), 1e-30)))


def _check_ours(
    mode: str, x: Inputs, where: Any, logits: Any, values: Any, own: Any, tokens: Any, out: Any
) -> Verdict:
    rule, plan = RULES[mode], resolve(RULES[mode], STEP, NUM_STEPS, tuple(x.tokens.shape))
    seeds, positions = x.seeds[where[0]], x.tokens.new_tensor(where[1])
    expected = maskgit.sample_tokens(
        logits, rule=rule, seeds=seeds if rule.needs_seeds else None, positions=positions,
        step=STEP, backend="reference",
    ).candidate_tokens.numpy()  # fmt: skip
    key = philox.seed_words(x.seeds.numpy())
    differ = np.flatnonzero(tokens != expected)
    for i in differ:
        words = key[0][where[0][i]], key[1][where[0][i]]
        if mode == "greedy" or not _is_near_tie(values[i], int(tokens[i]), words, int(where[1][i])):
            detail = f"row {where[0][i]}, {where[1][i]}: token {tokens[i]}, expected {expected[i]}"
            return Verdict(False, detail, len(tokens), len(differ))
    wanted = own if mode == "step" else np.exp(own)
    scale = (1 + np.abs(own)) * (1.0 if mode == "step" else np.exp(own))
    if mode == "step":
        words = key[0][:, None], key[1][:, None]
        noise = philox.gumbel(words, 0, np.arange(x.tokens.shape[1]), STEP, philox.STREAM_CHOICE)
        wanted = wanted + plan.numbers.choice_temperature * noise[where]
        scale = scale + plan.numbers.choice_temperature * (1 + np.abs(noise[where]))
    error = np.abs(out[-1][where] - wanted)
    if (error > 32 * _EPS * scale + 1e-37).any():
        worst = int(np.argmax(error / scale))
        detail = f"confidence {out[-1][where][worst]!r}, expected {wanted[worst]!r}"
        return Verdict(False, detail, len(tokens), len(differ))
    if mode == "step":
        eligible = (x.tokens == x.mask_token_id).numpy()
        counts: Any = SimpleNamespace(num_masked_at_start=eligible.sum(1), num_commit=None)
        commit = reference.select(out[2], eligible, counts, None, plan)
        if not np.array_equal(np.where(commit, out[1], x.tokens.numpy()), out[0]):
            return Verdict(False, "the committed positions differ", len(tokens), len(differ))
    return Verdict(True, "tokens, confidences equal the reference's", len(tokens), len(differ))


def _is_near_tie(row: Any, token: int, key: Any, position: int) -> bool:
    """Whether the token wins each of the three races to within float32 rounding of the keys."""
    leaf, inside = divmod(token, philox.LEAF)
    member, group = divmod(inside, philox.GROUPS)
    leaves = -(-row.size // philox.LEAF)
    tree = np.full(leaves * philox.LEAF, -np.inf)
    tree[: row.size] = row - row.max()
    tree = tree.reshape(leaves, philox.PER_GROUP, philox.GROUPS)
    count = philox.GROUPS + philox.PER_GROUP
    outer = philox.gumbel(key, np.arange(leaves), position, STEP, philox.STREAM_LEAF)
    inner = philox.gumbel(key, np.arange(count), position, STEP, philox.STREAM_INNER)
    groups = np.array([reference.log_sum_exp(tree[leaf, :, g]) for g in range(philox.GROUPS)])
    races = (
        (np.array([reference.log_sum_exp(t) for t in tree]), outer, leaf),
        (groups, inner[: philox.GROUPS], group),
        (tree[leaf, :, group], inner[philox.GROUPS :], member),
    )
    for mass, gumbels, index in races:
        keys = mass + gumbels
        size = 2 + abs(mass[index]) + abs(gumbels[index]) + np.abs(keys.max())
        if not keys.max() - keys[index] <= 16 * _EPS * size:
            return False
    return True


def _check_eager(mode: str, x: Inputs, values: Any, own: Any, where: Any, out: Any) -> Verdict:
    dtype = dtype_name(x.logits)
    if mode != "step":
        # `logsumexp` in 16 bits is rounded like the logits, and its exponential errs by as much.
        relative = _ROUNDING[dtype] * (4 + 2 * np.abs(values).max(-1)) + 64 * _EPS
        wanted = np.exp(own)
        tolerance = relative * wanted + 2.0**-23
        if (np.abs(out[-1][where] - wanted) > tolerance).any():
            return Verdict(False, "a confidence is not the probability of its token")
        return Verdict(True, f"tokens and probabilities agree to {dtype} rounding", len(own))
    plan = resolve(RULES[mode], STEP, NUM_STEPS, tuple(x.tokens.shape))
    full = np.full(x.tokens.shape[0], x.tokens.shape[1])
    masked = (out[0] == x.mask_token_id).sum(1)
    slack = 0.0 if dtype == "float32" else 0.1 * x.tokens.shape[1]  # ties at the cut
    if (np.abs(masked - next_masked_counts(plan, full, full)) > slack + 1).any():
        return Verdict(False, f"{masked[0]} positions stay masked")
    return Verdict(True, "draws and counts agree", len(own))

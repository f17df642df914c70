"""What the recorders of the mdlm family share: a stand-in for the Lightning class, and its noise.

Those codebases draw each position from a categorical q over the V columns, of which the mask id is
one: q_v = a p_v for a token v (p without the mask id, summing to 1) and q_mask = b.  With Gumbel
noise g the draw is a race of log q + g, and its two halves are independent: the token that wins
among the tokens is argmax(l + g), and it beats the mask slot iff M - g_mask > log(b / a), where
M = max over tokens of (log p + g) is again a standard Gumbel variable.  M - g_mask is logistic, so

    u = 1 / (1 + exp(M - g_mask))        is uniform, and a token wins iff u < a / (a + b);
    w = 1 / (1 + exp(g_mask - M)) = 1 - u   is uniform, and the mask wins iff w < b / (a + b).

`choice_gumbel` is gumbel_of(u) where a position is masked (the event is that it is committed) and
gumbel_of(w) where it is known (the event is that it is masked again).  Both are exact.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import Stub, gumbel_of
from text import extract


class Race:
    """Stands in for `_sample_categorical`: calls it and keeps (q, uniforms) of every call."""

    def __init__(self, path: Any, noise: Any):
        self.draw, self.noise = extract(path, "_sample_categorical")._sample_categorical, noise
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, q: Any) -> Any:
        out = self.draw(q)
        self.calls.append((q.double().numpy().copy(), self.noise.kept[-1][1]))
        return out

    def gumbels(self, call: int, mask: int, is_masked: np.ndarray) -> tuple[Any, Any]:
        """(token_gumbel, choice_gumbel) of one call, with the offsets that upstream adds to u."""
        q, u = self.calls[call]
        g = -np.log(1e-10 - np.log(u + 1e-10))
        return g, event(q, g, mask, is_masked)


def event(q: np.ndarray, g: np.ndarray, mask: int, is_masked: Any = True) -> np.ndarray:
    """choice_gumbel of a race of log q + g in which `mask` is the slot of the mask id."""
    tokens = np.arange(q.shape[-1]) != mask
    with np.errstate(divide="ignore", invalid="ignore"):
        p = q[..., tokens] / q[..., tokens].sum(-1, keepdims=True)
        log_p = np.log(np.where(np.isfinite(p), p, 1))  # the mask wins for sure: any noise does
    margin = (log_p + g[..., tokens]).max(-1) - g[..., mask]
    return gumbel_of(np.where(is_masked, 1 / (1 + np.exp(margin)), 1 / (1 + np.exp(-margin))))


def stand_in(source: Any, race: Race, stub: Stub, mask: int, *methods: str,
             dtype: Any = torch.float32, **config: Any) -> Any:  # fmt: skip
    """An object with the named methods of upstream's `Diffusion`, its SUBS output and the stub.

    `states` collects the tokens before each update; `config` is `config.sampling`,
    `dtype` that of the model's logits.
    """
    path = source / "diffusion.py"
    names = [f"Diffusion.{m}" for m in ("_subs_parameterization", *methods)]
    found = extract(path, *names, _sample_categorical=race, tqdm=lambda x, **_: x)
    self = SimpleNamespace(
        mask_index=mask, neg_infinity=-1000000.0, time_conditioning=False, device="cpu",
        dtype=torch.float32, parameterization="subs", states=[],
        config=SimpleNamespace(noise=SimpleNamespace(type="loglinear"), model=SimpleNamespace(),
                               loader=SimpleNamespace(), sampling=SimpleNamespace(**config)),
    )  # fmt: skip
    for name, function in vars(found).items():
        setattr(self, name, function.__get__(self))

    def forward(x: Any, *_: Any, **__: Any) -> Any:
        return self._subs_parameterization(torch.from_numpy(stub(x)).to(dtype), x)

    self.forward = forward
    for name in ("_ddpm_update", "_ddpm_caching_update"):
        if name in methods:
            setattr(self, name, _watch(self, getattr(self, name)))
    return self


def _watch(self: Any, update: Any) -> Any:
    def watched(x: Any, *args: Any, **named: Any) -> Any:
        self.states.append(x.numpy().copy())
        return update(x, *args, **named)

    return watched


def holes(rows: int, length: int, mask: int, seed: int) -> Any:
    """(rows, length) tokens: the first row all masked, the others with more and more known."""
    rng = np.random.default_rng(seed)
    out = np.full((rows, length), mask)
    for b in range(1, rows):
        where = rng.choice(length, length // 4 * b, replace=False)
        out[b, where] = rng.integers(0, mask, where.size)
    return torch.from_numpy(out)

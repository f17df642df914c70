"""What every recorder shares: a stub model, noise that is kept, and the file format.

A recorder runs a codebase's *own* sampling code, imported from a checkout outside this repository,
with a stub model in place of the network and with its random draws replaced by recorded ones:

    python tests/golden/record/<codebase>.py --source <checkout>

It writes tests/golden/<name>.npz, which tests/contract/test_golden.py replays through `decode_step` on every
backend.  Arrays of S steps (of all blocks), B sequences, N positions, V columns:

    tokens (S, B, N), expected (S, B, N)   the sequence before and after each step
    candidates (S, B, N)                   optional: every position that was masked filled in
    logits, uncond_logits (S, B, N, V)     float32 values that `dtype` holds exactly
    token_gumbel (S, B, N, V), choice_gumbel (S, B, N)   the recorded noise, as standard Gumbel
    eligible (S, B, N)                     optional: which masked positions take part
    scores (S, B, N)                       optional: scores from outside (critics, fixed orders)
    step, num_steps (S,), num_masked_at_start (S, B)
    num_commit (S, B)                      optional: how many are committed, where the caller says
    meta                                   JSON: codebase, commit, command, dtype, guidance_scale (one number,
                                           or one for each step), ...

Runs that end in -cfg-bf16 are guided in half precision: their seeds are such that guidance in float32
would give other tokens, and that none hangs on what is not reproduced there, a draw from probabilities or
keys that were rounded, or a score that was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parent.parent


def source_argument() -> Path:
    """--source: the checkout of the codebase; put first on the import path."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True)
    source = parser.parse_args().source.resolve()
    sys.path.insert(0, str(source))
    return source


def commit_of(source: Path) -> str:
    """The commit that is checked out at `source`."""
    return subprocess.check_output(
        ["git", "-C", str(source), "rev-parse", "HEAD"], text=True
    ).strip()


class Stub:
    """A deterministic model: logits (B, N, V) float32 that depend on the tokens around a position.

    Multiples of 1/64 below 8 in size, so that float16 and bfloat16 (with bits=5) hold them exactly.
    """

    def __init__(self, vocab: int, length: int, num_ids: int, seed: int, bits: int = 9):
        rng = np.random.default_rng(seed)
        self.near = rng.normal(size=(3, num_ids, vocab))
        self.place = rng.normal(size=(length, vocab)) * 1.5
        self.bits = bits

    def __call__(self, tokens: Any) -> np.ndarray:
        ids = np.asarray(tokens, dtype=np.int64) % self.near.shape[1]
        x = self.place[None, : ids.shape[1]] + self.near[0][ids]
        x = x + self.near[1][np.roll(ids, 1, 1)] + self.near[2][np.roll(ids, -2, 1)]
        x = np.clip(x, -7.9, 7.9)
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6))) + 1 - self.bits)
        return (np.round(x / unit) * unit).astype(np.float32)


class Recorder:
    """Collects the steps of one run and writes them."""

    def __init__(
        self,
        name: str,
        *,
        source: Path,
        codebase: str,
        function: str,
        rule: str | dict[str, Any] | None = None,
        mask_token_id: int,
        dtype: str = "float32",
        guidance_scale: float | list[float] | None = None,
        note: str = "",
        **extra: Any,
    ):
        """`rule`: what tests/golden/rules.json gets for a new name, a preset or StepRule fields."""
        self.name, self.rule = name, rule
        self.meta = {
            "codebase": codebase,
            "commit": commit_of(source),
            "function": function,
            "command": f"python {Path(sys.argv[0]).name} --source <checkout>",
            "mask_token_id": mask_token_id,
            "dtype": dtype,
            "guidance_scale": guidance_scale,
            "note": note,
        } | extra
        self.steps: list[dict[str, Any]] = []

    def step(self, **arrays: Any) -> None:
        """One step: tokens, logits, step, num_steps, num_masked_at_start, expected, and what else."""
        self.steps.append({k: np.array(v) for k, v in arrays.items() if v is not None})

    def write(self) -> None:
        """Stack the steps and write the file."""
        fields = {k for one in self.steps for k in one}
        for field in fields:
            missing = [i for i, one in enumerate(self.steps) if field not in one]
            assert not missing, f"{self.name}: steps {missing} lack {field}"
        out = {f: np.stack([one[f] for one in self.steps]) for f in sorted(fields)}
        for name, array in out.items():
            if array.dtype.kind == "i" and name != "seeds":
                out[name] = array.astype(np.int32)
        path = GOLDEN / f"{self.name}.npz"
        np.savez_compressed(path, meta=np.array(json.dumps(self.meta)), **out)
        rules = json.loads((GOLDEN / "rules.json").read_text())
        if self.name not in rules:
            rules[self.name] = self.rule
            (GOLDEN / "rules.json").write_text(json.dumps(rules, indent=1, sort_keys=True) + "\n")
        print(f"{path.name}: {len(self.steps)} steps, {path.stat().st_size / 1024:.0f} KiB")


class TorchNoise:
    """Replaces torch's random functions by ones that draw from `rng` and keep what they drew.

    `kept` is a list of (kind, array): "gumbel" (for `multinomial`: the noise whose argmax with
    log p it took), "uniform" for rand and rand_like, "normal".
    """

    def __init__(self, seed: int, coarse: bool = False):
        """`coarse`: uniforms asked for in half precision are exact there, as torch's own are."""
        self.rng, self.coarse = np.random.default_rng(seed), coarse
        self.kept: list[tuple[str, np.ndarray]] = []

    def uniform(self, shape: Any, dtype: Any = None) -> Any:
        """Uniforms strictly inside (0, 1), exact in float32."""
        import torch

        if self.coarse and dtype in (torch.bfloat16, torch.float16):
            u = self.rng.integers(1, 2**8, tuple(shape)) / 2**8
        else:
            u = (self.rng.integers(1, 2**23, tuple(shape)) + 0.5) / 2**23
        self.kept.append(("uniform", u))
        return torch.from_numpy(u).to(dtype or torch.get_default_dtype())

    def multinomial(self, probs: Any, num_samples: int = 1, *_: Any, **__: Any) -> Any:
        """argmax(log p + g), or the num_samples largest: the same law as torch's."""
        import torch

        g = self.rng.gumbel(size=tuple(probs.shape))
        self.kept.append(("gumbel", g))
        keys = torch.log(probs.double()) + torch.from_numpy(g)
        return keys.topk(num_samples, dim=-1).indices

    def __enter__(self) -> TorchNoise:
        import torch

        self.saved = {
            (torch, "rand"): torch.rand,
            (torch, "rand_like"): torch.rand_like,
            (torch, "multinomial"): torch.multinomial,
            (torch.Tensor, "multinomial"): torch.Tensor.multinomial,
            (torch.Tensor, "uniform_"): torch.Tensor.uniform_,
        }

        def rand(*size: Any, dtype: Any = None, **_: Any) -> Any:
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return self.uniform(shape, dtype)

        def rand_like(x: Any, dtype: Any = None, **_: Any) -> Any:
            return self.uniform(x.shape, dtype or x.dtype)

        def uniform_(x: Any, low: float = 0.0, high: float = 1.0, **_: Any) -> Any:
            return x.copy_(self.uniform(x.shape, x.dtype) * (high - low) + low)

        torch.rand, torch.rand_like, torch.multinomial = rand, rand_like, self.multinomial
        torch.Tensor.multinomial = lambda x, *a: self.multinomial(x, *a)  # noqa: PLW0108
        torch.Tensor.uniform_ = uniform_
        return self

    def __exit__(self, *error: object) -> None:
        for (owner, name), function in self.saved.items():
            setattr(owner, name, function)


def gumbel_of(u: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """-log(-log u) in float64, or with each operation rounded to a dtype of half precision."""
    if dtype == "float32":
        return -np.log(-np.log(u))
    import torch

    rounded = torch.from_numpy(u).to(getattr(torch, dtype))
    return (-(-rounded.log()).log()).double().numpy()


def bits_of(dtype: str) -> int:
    """What a stub's logits may have, to be exact in a dtype and as fine as it allows."""
    return 8 if dtype == "bfloat16" else 9


def write_loop(recorder: Recorder, calls: list[dict[str, Any]], **about: Any) -> None:
    """A whole loop of blocks: one entry of `calls` for each call of the model, in order.

    tokens (B, L) of the block before the call, logits (B, L, V) of it, start: the block's first position,
    token_gumbel (B, L, V) optional.  `about`: prompt and final, the whole sequence before and after,
    block_length, first (where the first block begins), num_steps (of a block).
    """
    recorder.meta |= {"loop": {k: np.asarray(v).tolist() for k, v in about.items()}}
    for call in calls:
        recorder.step(**call)
    recorder.write()

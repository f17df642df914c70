"""A whole LLaDA generation on the CPU, head included: `python -m maskgit.benchmarks.loops.llada`.

A small transformer with LLaDA's vocabulary (126464) decodes blocks of a prompt's continuation at a
temperature above 0, once by LLaDA's loop as published (full logits of every position, Gumbel noise
in float64) said again in plain torch, once through `maskgit.adapters.llada.generate` with the same
arguments.  The model is small on purpose: what is measured is the sampler and the head.  Time:
alternating runs in one process; memory: high-water mark of a fresh process each, less what it held
before.  Each run is checked first: at temperature 0 both give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import maskgit
from maskgit.adapters import llada
from maskgit.adapters.switch import replaced

VOCAB, MASK = 126464, 126336
SETTINGS: dict[str, Any] = {"gen_length": 64, "block_length": 32, "steps": 32, "temperature": 1.0}


class Model(nn.Module):
    """Two bidirectional layers and an untied head, with the interface of LLaDA's model."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.place = nn.Embedding(1024, width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.to(dtype).eval()
        self.device = torch.device("cpu")

    def get_output_embeddings(self) -> nn.Linear:
        """The head, as Hugging Face's models offer it."""
        return self.head

    def forward(self, tokens: torch.Tensor, attention_mask: Any = None) -> SimpleNamespace:
        """Tokens (B, N) to an object with `logits` (B, N, V)."""
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        return SimpleNamespace(logits=self.head(self.layers(x)))


@torch.no_grad()
def published_loop(
    model: Model, prompt: torch.Tensor, *, gen_length: int, block_length: int, steps: int,
    temperature: float,
) -> torch.Tensor:  # fmt: skip
    """LLaDA's loop with remasking by confidence: every position's logits, noise and softmax, each step."""
    start = prompt.shape[1]
    x = torch.cat([prompt, torch.full((len(prompt), gen_length), MASK)], 1)
    each = steps * block_length // gen_length
    for end in range(start + block_length, start + gen_length + 1, block_length):
        total = (x[:, end - block_length : end] == MASK).sum(1)
        for i in range(each):
            masked = x == MASK
            logits = model(x).logits
            noisy = logits
            if temperature > 0:
                wide = logits.to(torch.float64)
                noise = torch.rand_like(wide)
                noisy = wide.exp() / (-torch.log(noise)) ** temperature
            token = noisy.argmax(-1)
            score = logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1)
            score = torch.where(masked, score, -torch.inf)
            score[:, end:] = -torch.inf
            counts = total // each + (i < total % each)
            for row in range(len(x)):
                chosen = score[row].topk(int(counts[row])).indices
                x[row, chosen] = token[row, chosen]
    return x


def ours(model: Model, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The same call through the adapter."""
    return llada.generate(model, prompt, mask_id=MASK, **settings)


@torch.no_grad()
def by_chance(model: Model, prompt: torch.Tensor, positions_first: bool) -> torch.Tensor:
    """MDLM's rule on the same model: the head for the positions that change, or for all of them."""

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        leave = replaced(model.head, "forward", lambda hidden: hidden)
        with leave if positions_first else nullcontext():
            logits: torch.Tensor = model(tokens).logits
        return logits

    gen = torch.full((len(prompt), SETTINGS["gen_length"]), MASK)
    out = maskgit.generate(
        forward,
        torch.cat([prompt, gen], 1),
        rule="mdlm",
        mask_token_id=MASK,
        num_steps=SETTINGS["steps"],
        seeds=torch.arange(len(prompt)),
        head_weight=model.head.weight if positions_first else None,
    )
    tokens: torch.Tensor = out.tokens
    return tokens


LOOPS = {"published loop": published_loop, "maskgit": ours}


def setting(batch: int, width: int, dtype: str) -> tuple[Model, torch.Tensor]:
    """The model and (batch, 32) prompts."""
    model = Model(width, getattr(torch, dtype))
    prompt = torch.randint(0, 1000, (batch, 32), generator=torch.manual_seed(1))
    return model, prompt


def peak(name: str, batch: int, width: int, dtype: str) -> int:
    """Extra bytes at the peak of one loop, in a process of its own."""
    code = (
        "import json; from maskgit.benchmarks import memory; from maskgit.benchmarks.loops import llada; "
        f"model, prompt = llada.setting({batch}, {width}, {dtype!r}); "
        f"run = llada.LOOPS[{name!r}]; s = llada.SETTINGS | {{'steps': 4}}; "
        "run(model, prompt[:1, :4], gen_length=4, block_length=4, steps=1, temperature=1.0); "
        "open('/proc/self/clear_refs', 'w').write('5'); before = memory._status('VmRSS:'); "
        "run(model, prompt, **s); print(memory._status('VmHWM:') - before)"
    )
    from ..memory import _MALLOC

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | _MALLOC,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def measure(batch: int, width: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Times, memory and the check that both loops agree, for one setting."""
    model, prompt = setting(batch, width, dtype)
    cold = SETTINGS | {"temperature": 0.0, "steps": 4}
    same = float(
        (published_loop(model, prompt, **cold) == ours(model, prompt, **cold)).float().mean()
    )
    times: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(rounds):
        for name, loop in LOOPS.items():
            start = time.perf_counter()
            loop(model, prompt, **SETTINGS)
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    chance: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for first, values in chance.items():
            start = time.perf_counter()
            by_chance(model, prompt, first)
            values.append(time.perf_counter() - start)
    alike = torch.equal(by_chance(model, prompt, True), by_chance(model, prompt, False))
    slow, fast = (statistics.median(chance[first]) for first in (False, True))
    memory = {name: peak(name, batch, width, dtype) for name in LOOPS}
    return {
        "batch": batch,
        "width": width,
        "dtype": dtype,
        "same_tokens_greedy": same,
        "seconds": seconds,
        "extra_bytes": memory,
        "times_faster": seconds["published loop"] / seconds["maskgit"],
        "share_of_memory": memory["maskgit"] / memory["published loop"],
        "positions_first": {
            "rule": "mdlm",
            "same_tokens": alike,
            "seconds": fast,
            "seconds_all_logits": slow,
            "times_faster": slow / fast,
        },
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description="LLaDA's loop against the adapter, on the CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = measure(given.batch, given.width, given.dtype, given.rounds)
    found |= {"settings": SETTINGS, "threads": torch.get_num_threads(), "torch": torch.__version__}
    text = json.dumps(found, indent=1)
    print(text, flush=True)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

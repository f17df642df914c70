"""1x-technologies/1xgpt `STMaskGIT.maskgit_generate`: two factors per token, greedy and random order.

    python tests/golden/record/onexgpt.py --source <checkout>

A token is a pair of ids of FACTOR values, id = second * FACTOR + first.  The factors are drawn
independently, so logits and noise of the pair are the sums of theirs; the confidence, the product
of the two probabilities, is that of the pair.  n = ceil(cos(pi / 2 * (step + 1) / T) S) in float64.
Upstream divides probabilities by the temperature, which changes nothing: it draws at 1, or greedily.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from einops import rearrange
from text import add, extract

FACTOR, SIDE, B, T = 6, 4, 2, 6
V = MASK = FACTOR**2
N = SIDE**2
RULE = {
    "count_base": "positions", "count_rounding": "ceil", "count_dtype": "float64",
    "clamps": [], "last_step": "all",
}  # fmt: skip


def pair(parts):
    """(B, N, 2, FACTOR) to (B, N, V): the sum for every pair, the second factor being the slow one."""
    return (parts[:, :, 1, :, None] + parts[:, :, 0, None, :]).reshape(B, N, V)


def record(source, name, seed, mode, temperature, **rule):
    """Generate one frame after a known one and write one file."""
    found = extract(source / "genie/st_mask_git.py", "cosine_schedule", "STMaskGIT.init_mask",
                    "STMaskGIT.maskgit_generate", math=math, rearrange=rearrange,
                    tqdm=lambda x: x)  # fmt: skip
    stub, calls = Stub(2 * FACTOR, N, V + 1, seed), []

    def compute_logits(x):
        tokens = x[:, 1].reshape(B, N)
        logits = stub(tokens)
        calls.append((tokens.numpy().copy(), pair(logits.reshape(B, N, 2, FACTOR))))
        frame = torch.from_numpy(logits).reshape(B, 1, SIDE, SIDE, -1).permute(0, 4, 1, 2, 3)
        return frame.repeat(1, 1, 2, 1, 1)

    config = SimpleNamespace(S=N, factored_vocab_size=FACTOR, num_factored_vocabs=2)
    self = SimpleNamespace(config=config, mask_token_id=MASK, compute_logits=compute_logits,
                           init_mask=found.init_mask)  # fmt: skip
    prompt = torch.full((B, 2, SIDE, SIDE), MASK)
    prompt[:, 0] = 0
    with TorchNoise(seed) as noise:
        out, _ = found.maskgit_generate(self, prompt, 1, T, temperature, mode)
    draws = [x.reshape(B, N, FACTOR) for kind, x in noise.kept if kind == "gumbel"]
    orders = [gumbel_of(x).reshape(B, N) for kind, x in noise.kept if kind == "uniform"]
    recorder = Recorder(name, source=source, codebase="1x-technologies/1xgpt", rule=RULE | rule,
                        function="STMaskGIT.maskgit_generate", mask_token_id=MASK)  # fmt: skip
    states = [tokens for tokens, _ in calls] + [out.reshape(B, N).numpy()]
    for s, (tokens, logits) in enumerate(calls):
        token = pair(np.stack([draws[2 * s + 1], draws[2 * s]], 2)) if draws else None
        order = (orders[s] if s < T - 1 else np.zeros((B, N))) if orders else None
        add(recorder, tokens, states[s + 1], logits=logits, step=s, num_steps=T, token_gumbel=token,
            choice_gumbel=order, num_masked_at_start=np.full(B, N))  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    record(source, "onexgpt", 1, "greedy", 0.0, score="prob", sample_temperature=0.0)
    record(source, "onexgpt-drawn", 2, "greedy", 0.5, score="prob")
    record(source, "onexgpt-random", 3, "random", 0.0, score="random", sample_temperature=0.0)


if __name__ == "__main__":
    main()

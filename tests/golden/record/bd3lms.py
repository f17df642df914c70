"""kuleshov-group/bd3lms `_semi_ar_sampler`: first-hitting and ancestral draws, block by block.

    python tests/golden/record/bd3lms.py --source <checkout>

First-hitting fills one masked position per step, uniformly at random (a batch of one is all that
upstream allows): a quota of one, ranked by `choice_gumbel`.  The ancestral sampler commits each
masked position with probability 1 - s / t, t = linspace(1, 0, T)[i] but s = t - 1 / T, that is
(T - 1) / (T (T - 1 - i)); see absorbing.py for its noise.  Positions after the block hold the mask
id and take no part.
"""

import numpy as np
import torch
from absorbing import Race, stand_in
from common import Recorder, Stub, TorchNoise, source_argument
from text import add, load

V, MASK, BLOCK, BLOCKS = 24, 23, 6, 3
N = BLOCK * BLOCKS


class RandomPosition:
    """Replaces torch.randint: the rank, among the masked positions, of the one with most noise."""

    def __init__(self, self_, rng):
        self.self_, self.rng, self.kept = self_, rng, []

    def __call__(self, low, high, size):
        noise = self.rng.gumbel(size=(1, BLOCK))
        self.kept.append(noise)
        masked = np.flatnonzero(self.self_.states[-1][0, -BLOCK:] == MASK)
        assert size == (1,)
        assert masked.size == high
        return torch.tensor([int(np.argmax(noise[0, masked]))])


def record(source, name, rule, *, seed, rows=1, steps=BLOCK, **config):
    """Run the sampler and write one file."""
    stub = Stub(V, N, V, seed)
    rule = {"ban_mask_token": True, "score": "random", **rule}
    recorder = Recorder(name, source=source, codebase="kuleshov-group/bd3lms", rule=rule,
                        function="_semi_ar_sampler, _ddpm_caching_update", mask_token_id=MASK)  # fmt: skip
    with TorchNoise(seed) as noise:
        race = Race(source / "diffusion.py", noise)
        self = stand_in(source, race, stub, MASK, "_sample_prior", "_nucleus_sample", "_sigma_from_p",
                        "_ddpm_caching_update", "_semi_ar_sampler", kv_cache=False, var_length=False,
                        **config)  # fmt: skip
        self.noise, self.block_size = load(source / "noise_schedule.py").LogLinearNoise(), BLOCK
        self.config.algo, self.config.model.length = type("A", (), {"name": "bd3lm"}), N
        self.tokenizer = type("T", (), {"bos_token_id": 1})
        positions, saved = RandomPosition(self, noise.rng), torch.randint
        torch.randint = positions
        try:
            out, _ = self._semi_ar_sampler(rows, steps, BLOCKS, N)
        finally:
            torch.randint = saved
    lengths = [state.shape[1] for state in self.states] + [0]
    first = 0
    for s, state in enumerate(self.states):
        end = state.shape[1]
        if s and lengths[s - 1] != end:
            first = s
        wide = [np.full((rows, N), MASK) for _ in range(2)]
        wide[0][:, :end] = state
        after = self.states[s + 1] if lengths[s + 1] else out.numpy()
        wide[1][:, :end] = after[:, :end]
        token, choice = np.zeros((rows, N, V)), np.zeros((rows, N))
        block = slice(end - BLOCK, end)
        token[:, block], choice[:, block] = race.gumbels(s, MASK, state[:, block] == MASK)
        if config["first_hitting"]:
            choice[:, block] = positions.kept[s]
        logits, eligible = np.zeros((rows, N, V)), np.zeros((rows, N), bool)
        logits[:, :end], eligible[:, block] = stub(state), wide[0][:, block] == MASK
        start = (self.states[first][:, block] == MASK).sum(1)
        num_steps = int(start[0]) if config["first_hitting"] else steps
        add(recorder, *wide, logits=logits, eligible=eligible, step=s - first, num_steps=num_steps,
            num_masked_at_start=start, token_gumbel=token, choice_gumbel=choice)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    hitting = {"count": "quota"}
    ancestral = {"count": "bernoulli", "time_eps": 1e-12}
    record(source, "bd3lm", hitting, seed=1, nucleus_p=1.0, first_hitting=True)
    record(source, "bd3lm-nucleus", hitting | {"filters": ["top_p"], "top_p": 0.8}, seed=2,
           nucleus_p=0.8, first_hitting=True)  # fmt: skip
    record(source, "bd3lm-ancestral", ancestral, seed=6, rows=3, nucleus_p=1.0, first_hitting=False)


if __name__ == "__main__":
    main()

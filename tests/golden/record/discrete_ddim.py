"""huggingface/diffusers `DiscreteDDIMScheduler.step`: uniform corruption, in which nothing is masked.

    python tests/golden/record/discrete_ddim.py --source <checkout>

Every position takes its candidate, stays, or gets a random id.  choice_gumbel (S, B, N, 3) is the noise
of these three ways, random_tokens (S, B, N) are the ids.  That is no rule of a decode step; the runs are
replayed through the adapter (tests/adapters/test_adapter_diffusers_uniform.py).
"""

import numpy as np
import torch
from block_refinement import scheduler
from common import Recorder, Stub, TorchNoise, source_argument
from text import add

V, N, B, T = 24, 16, 2, 6


def record(source, name, seed, temperature):
    """Run the steps of one block and write one file."""
    own = scheduler(source, "scheduling_discrete_ddim.py", "DiscreteDDIMScheduler",
                    "_sample_from_logits", "step")  # fmt: skip
    own.num_inference_steps = T
    stub, rng, ids, randint = Stub(V, N, V, seed), np.random.default_rng(seed), [], torch.randint
    sample = torch.from_numpy(rng.integers(0, V, (B, N)))

    def kept_ids(low, high, size, **_):
        ids.append(torch.from_numpy(rng.integers(low, high, tuple(size))))
        return ids[-1]

    recorder = Recorder(name, source=source, codebase="huggingface/diffusers",
                        function="DiscreteDDIMScheduler.step", rule={"layout": "uniform"},
                        mask_token_id=-1, temperature=temperature)  # fmt: skip
    torch.randint = kept_ids
    with TorchNoise(seed) as noise:
        for s in range(T):
            logits, before = stub(sample), sample
            out = own.step(torch.from_numpy(logits.copy()), s, sample, temperature=temperature)
            sample = out.prev_sample
            way = noise.kept.pop()[1].reshape(B, N, 3)
            token = noise.kept.pop()[1].reshape(B, N, V) if temperature else None
            assert not noise.kept
            add(recorder, before.numpy(), sample.numpy(), candidates=out.sampled_tokens,
                logits=logits, step=s, num_steps=T, token_gumbel=token, choice_gumbel=way,
                random_tokens=ids[-1])  # fmt: skip
    torch.randint = randint
    assert torch.equal(sample, out.sampled_tokens)  # the last step commits everything
    recorder.write()


def main():
    source = source_argument()
    record(source, "discrete-ddim", 7, 0.0)
    record(source, "discrete-ddim-drawn", 8, 0.8)


if __name__ == "__main__":
    main()

"""markweberdev/maskbit: `sample`, with two factor tokens for each position.

    python tests/golden/record/maskbit.py --source <checkout>

The factors of all positions are one sequence of 2 N tokens.  Guidance c + s (c - u) is ours with
1 + s; where s grows by step, the logits that are kept are those upstream sampled from.  Upstream
clamps the count to [1, masked - 1] with the upper bound last: with one token left it is 0, and
sorted[-1] masks the whole sequence.  The cases here do not get there before the last step.
In half precision torch's Categorical refuses rounded probabilities whose sum is not 1: most long runs end so,
the one here does not.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
from common import Recorder, TorchNoise, gumbel_of, source_argument
from image import Guided, kept
from text import add, fake, load

SIDE, BITS, FACTORS, ROWS = 3, 4, 2, 2
N, V = SIDE * SIDE, 2**BITS
MASK = V
RULE = {
    "count_base": "positions", "count_rows": "first", "cut": "inclusive", "score_temperature": None,
    "schedule": "arccos",
}  # fmt: skip


def record(code, source, name, *, seed, steps=6, scale=0.0, temperature=4.5, softmax=1.0,
           annealing="none", mode="arccos", dtype="float32"):  # fmt: skip
    """Run `sample` from nothing; write one file."""
    model = Guided(ROWS, V, N * FACTORS, V + 1, seed, dtype)

    def call(x, *_):
        return model(x.reshape(len(x), -1)).reshape(len(x), N, FACTORS, V)

    call.eval, call.device = lambda: None, "cpu"
    images = SimpleNamespace(eval=lambda: None, decode_tokens=lambda x: x)
    with TorchNoise(seed) as noise, kept(torch, "where") as wheres, kept(torch, "softmax") as mixes:
        _, full = code.sample(
            call, images, ROWS, torch.zeros(ROWS), softmax, temperature, mode, steps, scale, MASK,
            SIDE, annealing, codebook_size=V**FACTORS, codebook_splits=FACTORS)  # fmt: skip
    split = scale and annealing == "none"
    rule = RULE | {
        "sample_temperature": softmax,
        "choice_temperature": temperature,
        "schedule": mode,
    }
    recorder = Recorder(name, source=source, codebase="markweberdev/maskbit", mask_token_id=MASK,
                        rule=rule, function="sampling.sample", dtype=dtype,
                        guidance_scale=1 + scale if split else None)  # fmt: skip
    after = [out.reshape(ROWS, -1) for args, out in wheres if isinstance(args[1], int)]
    for s, (before, logits) in enumerate(model.calls):
        mixed = mixes[s][0][0].reshape(ROWS, N * FACTORS, V) * softmax
        add(recorder, before, after[s], candidates=full[s].reshape(ROWS, -1), step=s,
            num_steps=steps, logits=logits[:ROWS] if split else mixed,
            uncond_logits=logits[ROWS:] if split else None,
            num_masked_at_start=[N * FACTORS] * ROWS,
            token_gumbel=noise.kept[2 * s][1].reshape(mixed.shape),
            choice_gumbel=gumbel_of(noise.kept[2 * s + 1][1]).reshape(ROWS, -1))  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    fake("tqdm")
    modules = source / "modeling/modules"
    package = sys.modules["upstream"] = ModuleType("upstream")
    package.__path__ = [str(modules)]
    code = load(modules / "sampling.py", "upstream.sampling")
    record(code, source, "maskbit", seed=1)
    record(code, source, "maskbit-cfg", seed=2, scale=2.5, softmax=0.8)
    record(code, source, "maskbit-cfg-cosine", seed=3, scale=7.1, annealing="cosine", mode="cosine")
    record(code, source, "maskbit-linear", seed=4, steps=7, mode="linear", temperature=1.0)
    record(code, source, "maskbit-cfg-bf16", seed=4, scale=2.5, dtype="bfloat16")


if __name__ == "__main__":
    main()

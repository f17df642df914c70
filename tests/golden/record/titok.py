"""bytedance/1d-tokenizer (TiTok): `ImageBert.generate`.

    python tests/golden/record/titok.py --source <checkout>

Constant guidance c + s (c - u) is ours with guidance_scale = 1 + s.  Guidance that grows by step,
and logits that a softmax temperature divides by step, are kept as the logits that upstream sampled
from.  Linear guidance makes no unconditional call at step 0.
"""

import math
from functools import partial
from types import SimpleNamespace

import torch
from common import Recorder, Stub, TorchNoise, bits_of, gumbel_of, source_argument
from image import kept
from text import add, extract

V, N, MASK, ROWS = 24, 16, 24, 2


def record(generate, source, name, *, seed, scale=0.0, decay="constant", steps=6, temperature=4.5,
           dtype="float32", **options):  # fmt: skip
    """Run `generate` from nothing; write one file."""
    stubs, calls = [Stub(V, N, V + 1, seed + i, bits_of(dtype)) for i in range(2)], ([], [])

    def forward(ids, condition, cond_drop_prob):
        logits = stubs[int(cond_drop_prob)](ids)
        calls[int(cond_drop_prob)].append((ids.numpy().copy(), logits))
        return torch.from_numpy(logits.copy()).to(getattr(torch, dtype))

    self = SimpleNamespace(forward=forward, image_seq_len=N, mask_token_id=MASK)
    split = scale and decay == "constant"
    with (
        TorchNoise(seed, coarse=True) as noise,
        kept(torch, "zeros_like") as zeros,
        kept(torch, "where") as wheres,
    ):
        final = generate(self, torch.zeros(ROWS), scale, decay, num_sample_steps=steps,
                         randomize_temperature=temperature, **options)  # fmt: skip
    rule = {"preset": "titok", "sample_temperature": temperature, "choice_temperature": temperature}
    recorder = Recorder(name, source=source, codebase="bytedance/1d-tokenizer", mask_token_id=MASK,
                        rule="titok" if temperature == 4.5 else rule, dtype=dtype,
                        function="ImageBert.generate",
                        guidance_scale=1 + scale if split else None)  # fmt: skip
    candidates = [
        out for args, out in wheres if out.dtype == torch.long and isinstance(args[1], torch.Tensor)
    ]
    assert (candidates[-1] == final).all()
    for s, (before, logits) in enumerate(calls[0]):
        add(recorder, before, calls[0][s + 1][0] if s + 1 < steps else final, step=s,
            num_steps=steps, logits=logits if split else zeros[2 * s][0][0],
            uncond_logits=calls[1][s][1] if split else None, candidates=candidates[s],
            num_masked_at_start=[N] * ROWS, token_gumbel=gumbel_of(noise.kept[2 * s][1], dtype),
            choice_gumbel=gumbel_of(noise.kept[2 * s + 1][1]))  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    generate = extract(source / "modeling/maskgit.py", "ImageBert.generate", math=math).generate
    run = partial(record, generate, source)
    run("titok", seed=1)
    run("titok-cold", seed=2, temperature=0.5, steps=8)
    run("titok-cfg", seed=3, scale=2.0, temperature=1.0)
    run("titok-cfg-linear", seed=4, scale=3.0, decay="linear", temperature=2.0)
    run("titok-cfg-power-cosine", seed=5, scale=4.0, decay="power-cosine", temperature=2.0,
        softmax_temperature_annealing=True)  # fmt: skip
    run("titok-cfg-bf16", seed=1, scale=4.5, dtype="bfloat16")


if __name__ == "__main__":
    main()

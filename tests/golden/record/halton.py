"""valeoai/Halton-MaskGIT: `ConfidenceSampler` and `HaltonSampler`.

    python tests/golden/record/halton.py --source <checkout>

The confidence sampler draws every position anew at every step and overwrites the known ones; they
are the surest (+inf) and count towards the cumulative number to keep (`num_commit` (S, B) is what
that leaves for masked ones).  `halton-confidence-known` has such known tokens, and can be replayed
only by a rule that overwrites; without known tokens in the input that happens from step 1 on.
The Halton sampler commits a fixed order (`scores` is minus the rank) of `num_commit` positions.
Temperatures multiply.  Guidance (1 + w) c - w u is ours with 1 + w; where w grows by step, and
where the temperature changes, the logits that are kept are those in the softmax; in half precision they
are those before guidance, and each step has its scale.  There torch's Categorical refuses rounded
probabilities whose sum is not 1: many runs end so, those here do not.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, TorchNoise, gumbel_of, source_argument
from image import Guided, kept, sequences
from text import add, load

SIDE, CODES = 4, 23
N, V, MASK = SIDE * SIDE, CODES + 1, CODES
RULE = {"clamps": [], "score_temperature": None}


def record(sampler, source, name, *, known, seed, rule, split=None, rolls=None,
           dtype="float32"):  # fmt: skip
    """Run a sampler on sequences of which `known` tokens are given; write one file."""
    tokens, rows = sequences(known, N, CODES, MASK, seed), len(known)
    model = Guided(rows, V, N, V, seed, dtype)
    for stub in model.stubs:
        stub.place[:, MASK] = -100  # the mask class has a column; the stub does not favour it

    def vit(x, *_, **__):
        return model(x.reshape(len(x), N))

    vit.eval = vit.train = lambda: None
    args = SimpleNamespace(use_ema=False, device="cpu", mask_value=MASK, codebook_size=CODES)
    trainer = SimpleNamespace(vit=vit, args=args, input_size=SIDE)
    trainer.autocast = contextlib.nullcontext()
    ordered = hasattr(sampler, "basic_halton_mask")
    code = torch.from_numpy(tokens.copy()).reshape((rows, SIDE, SIDE) if ordered else (rows, N))
    choice, rng, saved = [], np.random.default_rng(seed), (np.random.gumbel, torch.randint)
    decoded = []

    def decode(x):
        decoded.append(x.reshape(rows, N).numpy())
        return x.float()

    trainer.ae = SimpleNamespace(decode_code=decode)
    np.random.gumbel = lambda size: choice.append(rng.gumbel(size=size)) or choice[-1]
    torch.randint = lambda *_: torch.tensor(rolls)
    with TorchNoise(seed) as noise, kept(torch, "softmax") as mixes, kept(torch, "topk") as tops:
        _, drawn, masks = sampler(trainer, code, rows, torch.zeros(rows), verbose=False)
    np.random.gumbel, torch.randint = saved
    uniforms = [gumbel_of(u) for kind, u in noise.kept if kind == "uniform"]
    token = [g for kind, g in noise.kept if kind == "gumbel"]
    states = [ids for ids, _ in model.calls] + decoded
    recorder = Recorder(name, source=source, codebase="valeoai/Halton-MaskGIT", mask_token_id=MASK,
                        function=f"{type(sampler).__name__}.__call__", rule=RULE | rule, dtype=dtype,
                        guidance_scale=split)  # fmt: skip
    scores = None
    if ordered:
        order, scores = sampler.basic_halton_mask[:, 0] * SIDE + sampler.basic_halton_mask[:, 1], []
        for b in range(rows):
            rank = np.empty(N)
            rank[np.roll(order, rolls[b] if rolls else 0)] = np.arange(N)
            scores.append(-rank)
    for s, (before, logits) in enumerate(model.calls):
        pick = drawn[s].reshape(rows, N)
        g = token[s].reshape(rows, N, -1)
        if g.shape[-1] < V:  # top-k: the noise of a slot goes to the token in it
            wide = np.zeros((rows, N, V))
            np.put_along_axis(wide, tops[s][1].indices.reshape(rows, N, -1).numpy(), g, -1)
            g = wide
        masked = (before == MASK).sum(1)
        now = masks[s].reshape(rows, N).numpy().astype(int)
        commit = now.sum(1) if ordered else masked - now.sum(1)
        add(recorder, before, states[s + 1], step=s, num_steps=len(drawn), num_commit=commit,
            logits=logits[:rows] if split else mixes[s][0][0].reshape(rows, N, V),
            uncond_logits=logits[rows:] if split else None,
            candidates=np.where(before != MASK, before, pick) if ordered else pick,
            num_masked_at_start=(tokens == MASK).sum(1), token_gumbel=g, scores=scores,
            choice_gumbel=(choice or uniforms)[s] if choice or uniforms else None)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    Confidence = load(source / "Sampler/confidence_sampler.py").ConfidenceSampler
    Halton = load(source / "Sampler/halton_sampler.py").HaltonSampler
    surest = {"cut": "strict", "choice_temperature": 4.5, "choice_anneal": "linspace"}
    for name, known, options in (
        ("halton-confidence", (0, 0), {"w": 0, "step": 6}),
        ("halton-confidence-cfg", (0, 0), {"w": 3, "step": 6, "sched_mode": "cosine"}),
        ("halton-confidence-known", (3, 9), {"w": 0, "step": 6, "sched_mode": "linear"}),
    ):
        record(Confidence(**options), source, name, known=known, seed=len(name), rule=surest)
    order = {"score": "given", "choice_temperature": 0.0, "count": "quota"}
    record(Halton(w=0, step=6), source, "halton", known=(0, 0), seed=1, rule=order)
    record(Halton(w=2, step=7, randomize=True), source, "halton-rolled", known=(0, 0, 0), seed=2,
           rule=order, split=3.0, rolls=[3, 0, 11])  # fmt: skip
    record(Halton(w=2, step=7), source, "halton-cfg-bf16", known=(0, 0, 0), seed=11, rule=order,
           split=3.0, dtype="bfloat16")  # fmt: skip
    record(Confidence(w=3, step=6), source, "halton-confidence-cfg-bf16", known=(0, 0), seed=4,
           rule=surest, split=[1 + 3 * s / 5 for s in range(6)], dtype="bfloat16")  # fmt: skip
    few = Halton(w=1, step=6, sm_temp_min=0.8, sm_temp_max=1.4, temp_pow=2, top_k=5, temp_warmup=2)
    record(few, source, "halton-top-k", known=(0, 0), seed=3,
           rule=order | {"filters": ["top_k"], "top_k": 5})  # fmt: skip


if __name__ == "__main__":
    main()

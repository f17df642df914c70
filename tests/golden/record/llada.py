"""ML-GSAI/LLaDA `generate`: the checked out commit, which may be one of the two older versions.

    python tests/golden/record/llada.py --source <checkout>

exp(l) / (-log u)^T is a monotone function of l + T * gumbel(u), so u is kept as its Gumbel value.
Upstream's guidance u + (s + 1)(c - u) is ours with guidance_scale = s + 1.  The mask id is one of
the V columns: a position that draws it stays masked and may be left over at the end.  Prompts hold
stray mask ids, which take part from the first block on.

Where two confidences tie at a cut, torch.topk's order is not defined and a replay may differ: on
other seeds, in bfloat16, some do.  Seeds of guided runs in half precision are such that guidance in float32
would give other tokens.

The ids of the end tokens are numbers in upstream's code, so the runs with the options for them are as
wide as LLaDA's vocabulary: all columns but the stub's are -30 there and have no noise, for small files.
"""

import numpy as np
from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import Model, add, fake, load, prompts

V, MASK = 20, 19
WIDE, WIDE_MASK, EOS, EOT = 126464, 126336, 126081, 126348
COLUMNS = np.array([*range(17), EOS, EOT, WIDE_MASK])  # of the stub's V, in LLaDA's vocabulary
# One whose tokens depend on the dtype of the scores: rounded to bfloat16 some of them are 1.
SHARP = {"seed": 8, "rows": 1, "dtype": "bfloat16", "blocks": 1, "sharp": 2}


class WideStub(Stub):
    """The stub in LLaDA's vocabulary, with end tokens that are likelier than others."""

    def __call__(self, tokens):
        small = super().__call__(tokens)
        small[..., 17:19] += 2.5
        out = np.full((*small.shape[:2], WIDE), -30.0, np.float32)
        out[..., COLUMNS] = small
        return out


class WideNoise(TorchNoise):
    """Uniforms whose Gumbel value is 0 in all columns but the stub's."""

    def uniform(self, shape, dtype=None):
        import torch

        u = np.full(tuple(shape), np.exp(-1.0))
        u[..., COLUMNS] = (self.rng.integers(1, 2**23, u[..., COLUMNS].shape) + 0.5) / 2**23
        self.kept.append(("uniform", u))
        return torch.from_numpy(u).to(dtype)


def record(generate, source, name, rule, *, seed, rows=2, dtype="float32", bits=8, blocks=2,
           steps=6, temperature=0.0, cfg=0.0, note="", codebase="ML-GSAI/LLaDA",
           function="generate", wide=False, sharp=1, masks=True, **options):  # fmt: skip
    """Run `generate`, LLaDA's own or another one of its kind, and write one file."""
    prompt_length, length, mask = 5, 12, WIDE_MASK if wide else MASK
    stub = (WideStub if wide else Stub)(V, prompt_length + length, V, seed, bits)
    stub.near, stub.place = stub.near * sharp, stub.place * sharp
    model = Model(stub, dtype)
    prompt = prompts(V, mask, rows, prompt_length, seed)
    named = {k: v for k, v in options.items() if k.endswith("_inf")}
    options |= {"steps": steps, "gen_length": length, "block_length": length // blocks}
    if cfg:
        options["cfg_scale"] = cfg
    if cfg and masks:  # without an attention mask upstream's guided branch uses an unassigned name
        options["attention_mask"] = prompt * 0 + 1
    recorder = Recorder(name, source=source, codebase=codebase, function=function,
                        rule=rule, mask_token_id=mask, dtype=dtype, note=note,
                        guidance_scale=cfg + 1 if cfg else None, **named)  # fmt: skip
    with (WideNoise if wide else TorchNoise)(seed) as noise:
        out = generate(model, prompt, temperature=temperature, mask_id=mask, **options)
    kept = iter(gumbel_of(u) for _, u in noise.kept)
    states = [tokens[:rows] for tokens, _ in model.calls] + [out.numpy()]
    each = steps // blocks
    for s, (_, logits) in enumerate(model.calls):
        start = prompt_length + s // each * (length // blocks)
        end = start + length // blocks
        eligible = states[s] == mask
        eligible[:, end:] = False
        first = states[s - s % each]
        add(recorder, states[s], states[s + 1], eligible=eligible, logits=logits[:rows],
            uncond_logits=logits[rows:] if cfg else None, step=s % each, num_steps=each,
            num_masked_at_start=(first[:, start:end] == mask).sum(1),
            token_gumbel=next(kept) if temperature else None,
            choice_gumbel=next(kept) if options.get("remasking") == "random" else None)  # fmt: skip
    assert next(kept, None) is None
    recorder.write()


def main():
    source = source_argument()
    fake("transformers")
    generate = load(source / "generate.py").generate
    code = generate.__wrapped__.__code__
    is_old = "attention_mask" not in code.co_varnames
    if is_old and "float64" not in code.co_names:  # f51cb17
        record(generate, source, "llada-f51cb17", "llada", **SHARP,
               note="two confidences at a cut are 1 in bfloat16; topk took the lower position")  # fmt: skip
        return
    if is_old:  # scores in float64
        record(generate, source, "llada-fp64-sharp", "llada-fp64", **SHARP)
        record(generate, source, "llada-fp64", "llada-fp64", seed=1, rows=1, dtype="bfloat16")
        rule = {"preset": "llada-fp64", "sample_temperature": 0.8}
        record(generate, source, "llada-fp64-drawn", rule, seed=2, rows=1, dtype="bfloat16",
               temperature=0.8, blocks=3)  # fmt: skip
        record(generate, source, "llada-fp64-cfg-bf16", "llada-fp64", seed=56, rows=1, cfg=2.5,
               dtype="bfloat16", masks=False)  # fmt: skip
        return
    drawn = {"preset": "llada", "sample_temperature": 0.8}
    record(generate, source, "llada", "llada", seed=3, rows=3)
    record(generate, source, "llada-one-block", "llada", seed=4, blocks=1, steps=5)
    record(generate, source, "llada-bf16", "llada", seed=5, dtype="bfloat16", blocks=3)
    record(generate, source, "llada-drawn", drawn, seed=6, temperature=0.8)
    record(generate, source, "llada-drawn-bf16", drawn, seed=7, temperature=0.8, dtype="bfloat16")
    record(generate, source, "llada-cfg", "llada", seed=8, cfg=0.5)
    record(generate, source, "llada-cfg-bf16", "llada", seed=10, cfg=2.5, dtype="bfloat16",
           rows=3, note="upstream mixes in bfloat16: three roundings per logit")  # fmt: skip
    wide = {"rows": 1, "wide": True}
    record(generate, source, "llada-eos-logits", {"preset": "llada", "banned_ids": [EOS]},
           seed=11, logits_eos_inf=True, **wide)  # fmt: skip
    record(generate, source, "llada-eos-confidence",
           {"preset": "llada", "score_banned_ids": [EOS, EOT]},
           seed=12, confidence_eos_eot_inf=True, **wide)  # fmt: skip
    record(generate, source, "llada-eos-confidence-drawn", drawn | {"score_banned_ids": [EOT]},
           seed=13, confidence_eos_eot_inf=True, temperature=0.8, **wide)  # fmt: skip
    record(generate, source, "llada-random", {"preset": "random", "sample_temperature": 0.5},
           seed=10, temperature=0.5, remasking="random", blocks=4, steps=8)  # fmt: skip
    record(generate, source, "llada-random-cfg-bf16", "random", seed=18, cfg=2.5, dtype="bfloat16",
           remasking="random", rows=3, blocks=4, steps=8)  # fmt: skip


if __name__ == "__main__":
    main()

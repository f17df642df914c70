"""ML-GSAI/LLaDA `generate`: the installed commit, or the older one that scores in float64.

    python tests/golden/record/llada.py --source <checkout>

exp(l) / (-log u)^T is a monotone function of l + T * gumbel(u), so u is kept as its Gumbel value.
Upstream's guidance u + (s + 1)(c - u) is ours with guidance_scale = s + 1.  The mask id is one of
the V columns: a position that draws it stays masked and may be left over at the end.  Prompts hold
stray mask ids, which take part from the first block on.

Where two confidences tie at a cut, torch.topk's order is not defined and a replay may differ: on
other seeds, in bfloat16, some do.
"""

from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import Model, add, fake, load, prompts

V, MASK = 20, 19


def record(generate, source, name, rule, *, seed, rows=2, dtype="float32", bits=8, blocks=2,
           steps=6, temperature=0.0, cfg=0.0, note="", codebase="ML-GSAI/LLaDA",
           function="generate", **options):  # fmt: skip
    """Run `generate`, LLaDA's own or another one of its kind, and write one file."""
    prompt_length, length = 5, 12
    model = Model(Stub(V, prompt_length + length, V, seed, bits), dtype)
    prompt = prompts(V, MASK, rows, prompt_length, seed)
    options |= {"steps": steps, "gen_length": length, "block_length": length // blocks}
    if cfg:  # without an attention mask upstream's guided branch uses an unassigned name
        options |= {"cfg_scale": cfg, "attention_mask": prompt * 0 + 1}
    recorder = Recorder(name, source=source, codebase=codebase, function=function,
                        rule=rule, mask_token_id=MASK, dtype=dtype, note=note,
                        guidance_scale=cfg + 1 if cfg else None)  # fmt: skip
    with TorchNoise(seed) as noise:
        out = generate(model, prompt, temperature=temperature, mask_id=MASK, **options)
    kept = iter(gumbel_of(u) for _, u in noise.kept)
    states = [tokens[:rows] for tokens, _ in model.calls] + [out.numpy()]
    each = steps // blocks
    for s, (_, logits) in enumerate(model.calls):
        start = prompt_length + s // each * (length // blocks)
        end = start + length // blocks
        eligible = states[s] == MASK
        eligible[:, end:] = False
        first = states[s - s % each]
        add(recorder, states[s], states[s + 1], eligible=eligible, logits=logits[:rows],
            uncond_logits=logits[rows:] if cfg else None, step=s % each, num_steps=each,
            num_masked_at_start=(first[:, start:end] == MASK).sum(1),
            token_gumbel=next(kept) if temperature else None,
            choice_gumbel=next(kept) if options.get("remasking") == "random" else None)  # fmt: skip
    assert next(kept, None) is None
    recorder.write()


def main():
    source = source_argument()
    fake("transformers")
    generate = load(source / "generate.py").generate
    if "attention_mask" not in generate.__wrapped__.__code__.co_varnames:  # scores in float64
        record(generate, source, "llada-fp64", "llada-fp64", seed=1, rows=1, dtype="bfloat16")
        rule = {"preset": "llada-fp64", "sample_temperature": 0.8}
        record(generate, source, "llada-fp64-drawn", rule, seed=2, rows=1, dtype="bfloat16",
               temperature=0.8, blocks=3)  # fmt: skip
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
    record(generate, source, "llada-random", {"preset": "random", "sample_temperature": 0.5},
           seed=10, temperature=0.5, remasking="random", blocks=4, steps=8)  # fmt: skip


if __name__ == "__main__":
    main()

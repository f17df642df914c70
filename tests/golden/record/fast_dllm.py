"""NVlabs/Fast-dLLM llada/generate.py `generate`: quota, threshold and factor.

    python tests/golden/record/fast_dllm.py --source <checkout>

Noise as in LLaDA.  The mask id is not a column here: upstream's loop over a block only ends when
no mask is left (stray masks in a prompt eat a quota and end it with an IndexError, so quota runs have
none).  Threshold and factor runs have no fixed number of steps; `num_steps` is one more
than they took, so that no step is a last one.
"""

from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import Model, add, fake, load, prompts

V = MASK = 20


def record(module, source, name, rule, *, seed, rows=2, dtype="float32", temperature=0.0, blocks=2,
           sharpness=1.0, **options):  # fmt: skip
    """Run `generate` and write one file."""
    prompt_length, length, steps = 5, 12, 6
    stub = Stub(V, prompt_length + length, V + 1, seed, 8)
    stub.near, stub.place = stub.near * sharpness, stub.place * sharpness
    model = Model(stub, dtype)
    quota = not options.keys() & {"threshold", "factor"}
    prompt = prompts(V, MASK, rows, prompt_length, seed, holes=0 if quota else 2)
    recorder = Recorder(name, source=source, codebase="NVlabs/Fast-dLLM", mask_token_id=MASK,
                        function="llada/generate.py generate", rule=rule, dtype=dtype)  # fmt: skip
    with TorchNoise(seed) as noise:
        out, _ = module.generate(model, prompt, steps=steps, gen_length=length, mask_id=MASK,
                                 block_length=length // blocks, temperature=temperature,
                                 **options)  # fmt: skip
    kept = iter(gumbel_of(u) for _, u in noise.kept)
    states = [tokens for tokens, _ in model.calls] + [out.numpy()]
    block, first = 0, 0
    for s, (_, logits) in enumerate(model.calls):
        end = prompt_length + (block + 1) * (length // blocks)
        start = end - length // blocks
        eligible = states[s] == MASK
        eligible[:, end:] = False
        add(recorder, states[s], states[s + 1], eligible=eligible, logits=logits, step=s - first,
            num_steps=steps // blocks if quota else len(model.calls) + 1,
            num_masked_at_start=(states[first][:, start:end] == MASK).sum(1),
            token_gumbel=next(kept) if temperature else None,
            choice_gumbel=next(kept) if options.get("remasking") == "random" else None)  # fmt: skip
        if not (states[s + 1][:, start:end] == MASK).any():
            block, first = block + 1, s + 1
    assert next(kept, None) is None
    recorder.write()


def main():
    source = source_argument()
    fake("transformers", "model", "model.modeling_llada")
    module = load(source / "llada/generate.py")
    record(module, source, "fast-dllm-quota", "llada-fp64", seed=1, dtype="bfloat16")
    record(module, source, "fast-dllm-random", {"preset": "random", "sample_temperature": 0.5},
           seed=2, temperature=0.5, remasking="random")  # fmt: skip
    record(module, source, "fast-dllm-threshold", {"preset": "threshold", "threshold": 0.6},
           seed=3, rows=3, threshold=0.6)  # fmt: skip
    record(module, source, "fast-dllm-threshold-bf16",
           {"preset": "threshold", "sample_temperature": 0.3}, seed=4, rows=2, blocks=1,
           dtype="bfloat16", threshold=0.9, temperature=0.3, sharpness=1.5)  # fmt: skip
    rule = {"preset": "threshold", "threshold": 0.6, "sample_temperature": 0.7}
    record(module, source, "fast-dllm-threshold-drawn", rule, seed=5, threshold=0.6,
           temperature=0.7)  # fmt: skip
    record(module, source, "fast-dllm-factor", "factor", seed=6, rows=3, factor=1.0, sharpness=1.5)
    rule = {"preset": "factor", "factor": 1.5, "sample_temperature": 0.4}
    record(module, source, "fast-dllm-factor-drawn", rule, seed=7, factor=1.5, temperature=0.4,
           dtype="bfloat16", sharpness=1.5)  # fmt: skip


if __name__ == "__main__":
    main()

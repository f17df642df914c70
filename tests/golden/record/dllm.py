"""ZHZisZZ/dllm core/samplers/mdlm.py: `MDLMSampler.sample` and `infill`.

    python tests/golden/record/dllm.py --source <checkout>

How many positions a step commits comes from a table that upstream makes ahead, one row for every
sequence with its zeros taken out: `num_commit` (S, B).  Prompts have different lengths; shorter
sequences end in EOS.  LLaDA's quota rule gives the same counts where the steps divide the masks.
"""

import math
from types import SimpleNamespace

import numpy as np
from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import Model, add, extract, load, prompts

V, MASK, EOS = 20, 19, 0


def record(source, name, rule, *, seed, schedule="Linear", method="sample", block_size=6, steps=6,
           dtype="float32", new=12, **options):  # fmt: skip
    """Run one method and write one file."""
    folder, tables, lengths = source / "dllm/core", [], (5, 3)
    alpha = load(folder / "schedulers/alpha.py")
    utils = extract(folder / "samplers/utils.py", "add_gumbel_noise", "get_num_transfer_tokens")

    def counts(**given):
        tables.append(utils.get_num_transfer_tokens(**given))
        return tables[-1]

    code = extract(folder / "samplers/mdlm.py", f"MDLMSampler.{method}", math=math,
                   add_gumbel_noise=utils.add_gumbel_noise, get_num_transfer_tokens=counts,
                   BaseSamplerOutput=SimpleNamespace)  # fmt: skip
    given = {"steps": steps, "block_size": block_size, "temperature": 0.0, "cfg_scale": 0.0,
             "remasking": "low_confidence", "max_new_tokens": new, "max_length": None,
             "return_dict": True, "cfg_keep_tokens": None, "suppress_tokens": None,
             "stochastic_transfer": False, "right_shift_logits": False,
             "begin_suppress_tokens": None} | options  # fmt: skip
    inputs = [prompts(V, MASK, 1, n, seed + n)[0] for n in lengths]
    if method == "infill":
        inputs = [prompts(V, MASK, 2, n + new, seed + n, holes=n + 6)[1] for n in lengths]
    model = Model(Stub(V, max(lengths) + new, V, seed, 8), dtype)
    tokenizer = SimpleNamespace(mask_token_id=MASK, bos_token_id=1, eos_token_id=EOS)
    scheduler = getattr(alpha, f"{schedule}AlphaScheduler")()
    self = SimpleNamespace(model=model, tokenizer=tokenizer, scheduler=scheduler)
    with TorchNoise(seed) as noise:
        out = getattr(code, method)(self, inputs, SimpleNamespace(**given))
    cfg, rows = given["cfg_scale"], len(lengths)
    recorder = Recorder(name, source=source, codebase="ZHZisZZ/dllm", mask_token_id=MASK,
                        function=f"MDLMSampler.{method}", rule=rule, dtype=dtype,
                        guidance_scale=1 + cfg if cfg else None)  # fmt: skip
    states, kept, s = [x.numpy() for x in out.histories], iter(noise.kept), 0
    for b, table in enumerate(tables):
        first, index = states[s], np.arange(states[0].shape[1])[None]
        start = np.array([[b * block_size + (n if method == "sample" else 0)] for n in lengths])
        inside = (index >= start) & (index < start + block_size)
        for i in range(table.shape[1]):
            logits = model.calls[s][1]
            eligible = states[s] == MASK
            eligible &= (index < start + block_size) & (inside | (method == "sample"))
            add(recorder, states[s], states[s + 1], logits=logits[:rows], eligible=eligible,
                uncond_logits=logits[rows:] if cfg else None, step=i, num_steps=table.shape[1],
                num_masked_at_start=((first == MASK) & inside).sum(1),
                num_commit=table[:, i].numpy(),
                token_gumbel=gumbel_of(next(kept)[1]) if given["temperature"] else None,
                choice_gumbel=gumbel_of(next(kept)[1]) if given["remasking"] == "random" else None,
                )  # fmt: skip
            s += 1
    recorder.write()


def main():
    source = source_argument()
    record(source, "dllm", "llada", seed=1, dtype="bfloat16")
    record(source, "dllm-drawn", {"preset": "llada", "sample_temperature": 0.6}, seed=2,
           temperature=0.6, cfg_scale=0.5)  # fmt: skip
    record(source, "dllm-cfg-bf16", "dllm", seed=3, dtype="bfloat16", cfg_scale=2.5)
    record(source, "dllm-random", {"preset": "random", "banned_ids": [3, 5]}, seed=3,
           remasking="random", suppress_tokens=[3, 5])  # fmt: skip
    record(source, "dllm-uneven", "llada", seed=4, steps=10, block_size=12)
    record(source, "dllm-cosine", "llada", seed=5, schedule="Cosine", steps=8, block_size=12)
    record(source, "dllm-infill", {"preset": "llada", "block_scope": "block"}, seed=6,
           method="infill", steps=9)  # fmt: skip
    record(source, "dllm-suppressed", "llada", seed=7, begin_suppress_tokens=[2, 7, 9, 11])


if __name__ == "__main__":
    main()

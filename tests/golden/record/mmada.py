"""Gen-Verse/MMaDA: `t2i_generate` (images) and `mmu_generate` (text).

    python tests/golden/record/mmada.py --source <checkout>

Images: logits and tokens are kept as the sampler sees them, cut to the codebook and without the
offset of the text vocabulary.  Upstream's guidance (1 + s) c - s u is ours with guidance_scale =
1 + s.  What it returns are the candidates of the last step.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Recorder, Stub, TorchNoise, bits_of, gumbel_of, source_argument
from llada import record as record_text
from text import Model, add, extract, load

V, TEXT, MASK, PREFIX = 16, 6, 40, 4


def record(code, source, name, rule, *, seed, size=16, rows=2, steps=6, known=0, cfg=0.0,
           temperature=1.0, schedule=None, dtype="float32"):  # fmt: skip
    """Run `t2i_generate` and write one file."""
    rng = np.random.default_rng(seed)
    model = Model(Stub(TEXT + V, PREFIX + size + 1, MASK + 1, seed, bits_of(dtype)), dtype)
    ids = rng.integers(0, TEXT, (rows, PREFIX + size + 1))
    ids[:, PREFIX:-1] = MASK
    for b in range(rows):  # inpainting: rows with different numbers of known tokens
        ids[b, PREFIX + rng.choice(size, known * b, replace=False)] = TEXT + b
    ids, ones = torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.long)
    given = {"uncond_input_ids": ids * 0, "uncond_attention_mask": ones} if cfg else {}
    noise, drawn = TorchNoise(seed, coarse=True), []
    noise.multinomial = lambda *a, **k: drawn.append(TorchNoise.multinomial(noise, *a)) or drawn[-1]
    with noise:
        out = code.t2i_generate(
            model, input_ids=ids, attention_mask=ones, timesteps=steps, guidance_scale=cfg,
            temperature=temperature, seq_len=size, mask_token_id=MASK, resolution=PREFIX - 1,
            codebook_size=V, noise_schedule=schedule or code.cosine,
            uni_prompting=SimpleNamespace(text_tokenizer=range(TEXT)), **given)  # fmt: skip
    recorder = Recorder(name, source=source, codebase="Gen-Verse/MMaDA", mask_token_id=MASK,
                        function="MMadaModelLM.t2i_generate", rule=rule, dtype=dtype,
                        guidance_scale=1 + cfg if cfg else None)  # fmt: skip
    states = [tokens[:rows, PREFIX:-1] for tokens, _ in model.calls] + [ids[:, PREFIX:-1].numpy()]
    states = [np.where(x == MASK, MASK, x - TEXT) for x in states]
    for s, (_, logits) in enumerate(model.calls):
        logits = logits[:, PREFIX:-1, TEXT:]
        candidates = np.where(states[s] == MASK, drawn[s].numpy().reshape(rows, size), states[s])
        add(recorder, states[s], states[s + 1], candidates=candidates, logits=logits[:rows],
            uncond_logits=logits[rows:] if cfg else None, step=s, num_steps=steps,
            num_masked_at_start=(states[0] == MASK).sum(1),
            token_gumbel=noise.kept[2 * s][1].reshape(rows, size, V),
            choice_gumbel=gumbel_of(noise.kept[2 * s + 1][1], dtype))  # fmt: skip
    assert (out.numpy() == candidates).all()
    recorder.write()


def main():
    source = source_argument()
    sampling = load(source / "models/sampling.py")
    code = extract(
        source / "models/modeling_mmada.py", "add_gumbel_noise", "get_num_transfer_tokens",
        "MMadaModelLM.t2i_generate", "MMadaModelLM.mmu_generate", F=F,
        cosine_schedule=sampling.cosine_schedule, mask_by_random_topk=sampling.mask_by_random_topk,
    )  # fmt: skip
    code.cosine = sampling.cosine_schedule
    record(code, source, "mmada-image", "open-muse", seed=1, cfg=3.5)
    record(code, source, "mmada-image-known", {"preset": "open-muse", "schedule": "linear"}, seed=2,
           rows=3, known=5, schedule=sampling.get_mask_schedule("linear"))  # fmt: skip
    record(code, source, "mmada-image-cfg-bf16", "mmada-image", seed=2, known=5, cfg=3.5,
           dtype="bfloat16")  # fmt: skip

    def generate(model, prompt, gen_length, attention_mask=None, **options):
        return code.mmu_generate(model, prompt, max_new_tokens=gen_length, **options)

    text = partial(record_text, generate, source, codebase="Gen-Verse/MMaDA",
                   function="MMadaModelLM.mmu_generate")  # fmt: skip
    text("mmada-text", "llada-fp64", seed=3, dtype="bfloat16", rows=3)
    text("mmada-text-drawn", {"preset": "llada-fp64", "sample_temperature": 0.8}, seed=4,
         temperature=0.8, cfg=0.5, blocks=3)  # fmt: skip
    text("mmada-text-cfg-bf16", "mmada-text", seed=12, dtype="bfloat16", rows=3, cfg=2.5)


if __name__ == "__main__":
    main()

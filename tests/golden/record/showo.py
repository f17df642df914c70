"""showlab/Show-o: `Showo.t2i_generate`.

    python tests/golden/record/showo.py --source <checkout>

Logits and tokens are kept as the sampler sees them, cut to the codebook and without the offset of
the text vocabulary.  Upstream's guidance (1 + s) c - s u is ours with guidance_scale = 1 + s, and
the result is the candidates of the last step.  The noise temperature compounds, as in open-muse.
"""

from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, TorchNoise, gumbel_of, source_argument
from image import Guided, kept, sequences
from text import add, extract, load

V, TEXT, SPECIAL, PREFIX, N = 16, 6, 2, 3, 16
SHIFT = TEXT + SPECIAL
MASK = SHIFT + V  # the last column of the table, which upstream cuts off


def record(method, source, name, rule, *, known, seed, steps=6, scale=0.0, temperature=1.0,
           dtype="float32", **options):  # fmt: skip
    """Run `t2i_generate` on images of which `known` tokens are given; write one file."""
    start, rows = sequences(known, N, V, MASK, seed), len(known)
    prompt = np.random.default_rng(seed).integers(0, TEXT, (rows, PREFIX))
    ids = np.concatenate([prompt, np.where(start == MASK, MASK, start + SHIFT), prompt[:, :1]], 1)
    model = Guided(rows, MASK + 1, PREFIX + N + 1, MASK + 1, seed, dtype)
    model.config = SimpleNamespace(mask_token_id=MASK)
    showo = SimpleNamespace(num_vq_tokens=N, num_new_special_tokens=SPECIAL, llm_vocab_size=TEXT)
    config = SimpleNamespace(
        model=SimpleNamespace(showo=showo),
        dataset=SimpleNamespace(preprocessing=SimpleNamespace(max_seq_length=PREFIX - 1)),
    )
    ids = torch.from_numpy(ids)
    with TorchNoise(seed, coarse=True) as noise, kept(torch, "where") as wheres:
        final = method(model, ids, uncond_input_ids=ids.clone() if scale else None, config=config,
                       temperature=temperature, timesteps=steps, guidance_scale=scale, **options)  # fmt: skip
    recorder = Recorder(name, source=source, codebase="showlab/Show-o", function="Showo.t2i_generate",
                        rule=rule, mask_token_id=MASK, dtype=dtype,
                        guidance_scale=1 + scale if scale else None)  # fmt: skip
    masked = [call for call in wheres[1:] if isinstance(call[0][1], int)][1::2]
    cut = np.s_[:, PREFIX : PREFIX + N, SHIFT : SHIFT + V]
    for s, (tokens, logits) in enumerate(model.calls):
        before = tokens[cut[:2]]
        (_, _, candidates), after = masked[s]
        add(recorder, np.where(before == MASK, MASK, before - SHIFT), after, candidates=candidates,
            logits=logits[:rows][cut], uncond_logits=logits[rows:][cut] if scale else None, step=s,
            num_steps=steps, num_masked_at_start=(start == MASK).sum(1),
            token_gumbel=noise.kept[2 * s][1].reshape(rows, N, V),
            choice_gumbel=gumbel_of(noise.kept[2 * s + 1][1], dtype))  # fmt: skip
    assert (final == candidates).all()
    recorder.write()


def main():
    source = source_argument()
    sampling = load(source / "models/sampling.py")
    method = extract(source / "models/modeling_showo.py", "Showo.t2i_generate",
                     cosine_schedule=sampling.cosine_schedule,
                     mask_by_random_topk=sampling.mask_by_random_topk).t2i_generate  # fmt: skip
    record(method, source, "show-o", "open-muse", known=(0, 0), seed=1, scale=5.0)
    record(method, source, "show-o-known", {"preset": "open-muse", "schedule": "pow2.0",
           "choice_temperature": 2.0}, known=(4, 9, 15), seed=2, temperature=2.0,
           noise_schedule=sampling.get_mask_chedule("pow2.0"))  # fmt: skip
    record(method, source, "show-o-cfg-bf16", "show-o", known=(0, 5), seed=2, scale=5.0,
           dtype="bfloat16")  # fmt: skip


if __name__ == "__main__":
    main()

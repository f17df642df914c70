"""huggingface/open-muse: `generate2` of both transformers.

    python tests/golden/record/open_muse.py --source <checkout>

The first one multiplies its noise temperature in place, so that the factors compound; the second
one has a list of temperatures, which ends at 0.01 if one number is given.  Both return the
candidates of the last step.  Guidance that grows by step is kept as logits that are mixed already.
"""

from functools import partial
from types import SimpleNamespace

import torch
from common import Recorder, TorchNoise, gumbel_of, source_argument
from image import Guided, kept, sequences
from text import add, extract, load

V, N, MASK = 24, 16, 30


def record(method, source, name, rule, *, function, known, seed, steps=6, scale=0.0, mixed=False,
           dtype="float32", **options):  # fmt: skip
    """Run `method` on sequences of which `known` tokens are given; write one file."""
    tokens, rows = sequences(known, N, V, MASK, seed), len(known)
    model = Guided(rows, V + 3, N, MASK + 1, seed, dtype)  # the table is wider than the codebook
    model.config = SimpleNamespace(mask_token_id=MASK, codebook_size=V, num_vq_tokens=N)
    where, softmax = kept(torch, "where"), kept(torch.Tensor, "softmax")
    with TorchNoise(seed, coarse=True) as noise, where as wheres, softmax as mixes:
        final = method(model, input_ids=torch.from_numpy(tokens), timesteps=steps,
                       encoder_hidden_states=torch.zeros(rows, 1, 1), guidance_scale=scale,
                       **options).numpy()  # fmt: skip
    split = scale and not mixed
    recorder = Recorder(name, source=source, codebase="huggingface/open-muse", function=function,
                        rule=rule, mask_token_id=MASK, dtype=dtype,
                        guidance_scale=scale if split else None)  # fmt: skip
    wheres = [call for call in wheres if isinstance(call[0][1], int)]  # masked again, or kept
    for s, (before, logits) in enumerate(model.calls):
        (_, _, candidates), after = wheres[s]
        add(recorder, before, after, step=s, num_steps=steps, candidates=candidates,
            logits=logits[:rows, :, :V] if split else mixes[s][0][0],
            uncond_logits=logits[rows:, :, :V] if split else None,
            num_masked_at_start=(tokens == MASK).sum(1),
            token_gumbel=noise.kept[2 * s][1].reshape(rows, N, V),
            choice_gumbel=gumbel_of(noise.kept[2 * s + 1][1], dtype))  # fmt: skip
    assert (final == candidates.numpy()).all()
    recorder.write()


def main():
    source = source_argument()
    sampling = load(source / "muse/sampling.py")
    names = {"cosine_schedule": sampling.cosine_schedule, "Callable": object,
             "mask_by_random_topk": sampling.mask_by_random_topk}  # fmt: skip
    first = extract(
        source / "muse/modeling_transformer.py", "MaskGitTransformer.generate2", **names
    )
    second = extract(
        source / "muse/modeling_transformer_v2.py", "MaskGiTUViT_v2.generate2", **names
    )
    one = partial(record, first.generate2, source, function="MaskGitTransformer.generate2")
    one("open-muse", "open-muse", known=(0, 0), seed=1)
    one("open-muse-known", "open-muse", known=(4, 11, 15), seed=2)
    linear = sampling.get_mask_chedule("linear")
    one("open-muse-cfg", {"preset": "open-muse", "schedule": "linear"}, known=(0, 3), seed=3,
        scale=3.0, noise_schedule=linear)  # fmt: skip
    one("open-muse-cfg-bf16", "open-muse", known=(0, 5), seed=2, scale=3.0, dtype="bfloat16")
    other = torch.zeros(1, 1, 1)
    two = partial(record, second.generate2, source, function="MaskGiTUViT_v2.generate2",
                  cond_embeds=other[0], empty_cond_embeds=other[0], empty_embeds=other, seq_len=N,
                  micro_conds=other[0], scale=8.0)  # fmt: skip
    rule = {"preset": "open-muse", "choice_temperature": 2.0, "choice_anneal": "linspace"}
    two("open-muse-v2", rule, known=(0, 0), seed=4, temperature=(2, 0))
    two("open-muse-v2-cosine", rule, known=(0, 7), seed=5, temperature=(2, 0), mixed=True,
        guidance_schedule="cosine")  # fmt: skip
    two("open-muse-v2-scalar", rule | {"choice_temperature": 1.5}, known=(0, 0), seed=6,
        temperature=1.5)  # fmt: skip
    two("open-muse-v2-cfg-bf16", "open-muse-v2", known=(0, 5), seed=1, temperature=(2, 0),
        dtype="bfloat16")  # fmt: skip


if __name__ == "__main__":
    main()

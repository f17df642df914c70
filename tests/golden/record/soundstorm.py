"""lucidrains/soundstorm-pytorch `SoundStorm.generate`: with and without re-masking, critic, levels.

    python tests/golden/record/soundstorm.py --source <checkout>

Noise is -log(-log(u + 1e-10) + 1e-10).  By default every position is ranked at every step, the
known ones by the probability of the candidate that was drawn for them and then thrown away, and
the k least sure are masked, k = floor((1 - r) length).  The critic's logit is a score to re-mask:
`scores` is minus it and `choice_gumbel` minus the noise.  Padding is ranked last; upstream fills it
in the first step, and here it is known from the start (id 0).  With two levels the positions of both
are ranked, though only the lower one can be committed; its count is that of one level.
"""

import math
from functools import wraps
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, source_argument
from einops import rearrange, reduce, repeat
from text import add, extract

V, MASK, N, B, T = 30, 30, 16, 2, 6
HELPERS = ("exists", "default", "eval_decorator", "top_k", "log", "gumbel_noise", "gumbel_sample",
           "linear_schedule", "cosine_schedule")  # fmt: skip
RULE = {
    "schedule": "linear", "clamps": [], "filters": ["top_k"], "score": "prob",
    "top_k": math.ceil((1 - 0.7) * V), "sample_anneal": "linear", "score_filtered": True,
}  # fmt: skip


def record(source, name, seed, *, remask=True, critic=False, levels=1, lengths=None, prompt=0,
           schedule="linear", **rule):  # fmt: skip
    """Run `generate` and write one file."""
    found = extract(source / "soundstorm_pytorch/soundstorm.py", *HELPERS, "SoundStorm.generate",
                    math=math, wraps=wraps, rearrange=rearrange, reduce=reduce, repeat=repeat,
                    tqdm=lambda x, **_: x)  # fmt: skip
    stub, judge, calls = Stub(V, N, V + 1, seed), Stub(1, N, V + 1, seed + 50), []

    def net(seq, **_):
        calls.append((seq.numpy().copy(), stub(seq)))
        return torch.from_numpy(calls[-1][1].copy()), None

    critics = []

    def token_critic(seq):
        critics.append(judge(seq)[..., 0])
        return torch.from_numpy(critics[-1])[..., None]

    self = SimpleNamespace(
        training=False, eval=lambda: None, train=lambda _: None, should_condition=False, device="cpu",
        maybe_get_condition=lambda _: None, grouped_quantizers=1, num_quantizers=levels, steps=T,
        mask_id=MASK, schedule_fn=getattr(found, f"{schedule}_schedule"), self_cond=False, net=net,
        soundstream=None, token_critic=token_critic if critic else None, can_mask_prev_unmasked=remask,
    )  # fmt: skip
    valid = np.arange(N)[None] < np.array(lengths or [N] * B)[:, None]
    known = np.random.default_rng(seed).integers(0, V, (B, prompt, levels))
    with TorchNoise(seed) as noise:
        out = found.generate(self, N // levels, mask=torch.from_numpy(valid[:, ::levels]),
                             prompt_acoustic_token_ids=torch.from_numpy(known) if prompt else None,
                             batch_size=B, filter_thres=0.7, noise_level_scale=0.5)  # fmt: skip
    kept = iter(-np.log(-np.log(u + 1e-10) + 1e-10) for _, u in noise.kept)
    recorder = Recorder(name, source=source, codebase="lucidrains/soundstorm-pytorch",
                        function="SoundStorm.generate", rule=RULE | {"schedule": schedule} | rule,
                        mask_token_id=MASK, levels=levels, prompt=prompt)  # fmt: skip
    states = [tokens for tokens, _ in calls] + [out.numpy()]
    critics = iter([*critics, np.zeros((B, N))])
    for s, (_, logits) in enumerate(calls[:T]):  # later levels are one draw each
        before, after = (np.where(valid, x, 0) for x in states[s : s + 2])
        token = next(kept)
        add(recorder, before, after, logits=logits, step=s, num_steps=T, token_gumbel=token,
            num_masked_at_start=valid[:, ::levels].sum(1),
            choice_gumbel=(-next(kept) if s < T - 1 else np.zeros((B, N))) if critic else None,
            scores=-next(critics) if critic else None)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    record(source, "soundstorm-no-remask", 1, remask=False, lengths=[16, 11])
    record(source, "soundstorm-cosine", 2, remask=False, schedule="cosine")
    record(source, "soundstorm", 3)
    record(source, "soundstorm-prompt", 4, prompt=5)
    record(source, "soundstorm-critic", 5, critic=True, choice_temperature=0.5)
    record(source, "soundstorm-levels", 6, levels=2)


if __name__ == "__main__":
    main()

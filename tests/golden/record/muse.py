"""lucidrains/muse-maskgit-pytorch: `MaskGit.generate`, alone and with a critic.

    python tests/golden/record/muse.py --source <checkout>

Upstream masks at the start of a step, by scores (high is masked) of the step before; here that is
the end of a step, and the last one keeps everything.  The number masked is int(cos(pi t / 2) N), at
least 1, at t = (step + 1) / (T - 1), not bounded by what is masked now.  With a critic all positions
compete; `scores` is minus its score, and `choice_gumbel` minus its noise (u - 0.5) * scale *
(1 - (step + 1) / T) divided by that annealing.  With can_remask_prev_masked they compete with the
probability of the token that was drawn for them, not the one they hold (`scores` once more).
"""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Recorder, Stub, TorchNoise, bits_of, gumbel_of, source_argument
from einops import rearrange
from image import kept
from text import add, extract

SIDE, V = 4, 24
N, MASK, ROWS = SIDE * SIDE, V, 2
HELPERS = ("exists", "default", "eval_decorator", "uniform", "log", "gumbel_noise", "gumbel_sample",
           "top_k", "cosine_schedule", "Transformer.forward_with_cond_scale",
           "SelfCritic.forward_with_cond_scale", "MaskGit.generate")  # fmt: skip
RULE = {
    "filters": ["top_k"], "sample_anneal": "linear", "score": "prob", "count_base": "positions",
    "last_step": "all", "cut": "exact",
}  # fmt: skip


def record(source, name, *, seed, steps=6, thres=0.8, critic=None, scale=3.0, temperature=1.0,
           remask=False, dtype="float32"):  # fmt: skip
    """Run `generate` from nothing; write one file.  `critic` is "token" or "self"."""
    path = source / "muse_maskgit_pytorch/muse_maskgit_pytorch.py"
    code = extract(path, *HELPERS[:-2], math=math, partial=partial, rearrange=rearrange, F=F)
    stubs = [Stub(V, N, V + 1, seed + i, bits_of(dtype)) for i in range(2)]
    calls = ([], [])
    judges = [Stub(1, N, V + 1, seed + 50 + i) for i in range(2)]

    def forward(ids, return_embed=False, cond_drop_prob=0.0, **_):
        logits = stubs[int(cond_drop_prob)](ids)
        if (ids == MASK).any():
            calls[int(cond_drop_prob)].append((ids.numpy().copy(), logits))
        embed = torch.from_numpy(judges[0](ids))
        logits = torch.from_numpy(logits).to(getattr(torch, dtype))
        return (logits, embed) if return_embed else logits

    def judge(ids, cond_drop_prob=0.0, return_embed=False, **_):
        out = torch.from_numpy(judges[int(cond_drop_prob)](ids))
        return (out, None) if return_embed else out

    net = SimpleNamespace(forward=forward, encode_text=lambda texts: None, self_cond=False)
    net.forward_with_cond_scale = code.forward_with_cond_scale.__get__(net)
    judging = SimpleNamespace(forward=judge)
    judging.forward_with_cond_scale = code.forward_with_cond_scale.__get__(judging)
    methods = extract(path, *HELPERS[-2:], math=math, partial=partial, rearrange=rearrange, F=F,
                      tqdm=lambda x, **_: x, List=list, Optional=dict, **vars(code))  # fmt: skip
    if critic == "self":
        judging = SimpleNamespace(net=net, to_pred=lambda x: x)
        judging.forward_with_cond_scale = methods.forward_with_cond_scale.__get__(judging)
    vae = SimpleNamespace(get_encoded_fmap_size=lambda _: SIDE, decode_from_ids=lambda ids: ids)
    self = SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]), vae=vae, image_size=SIDE, mask_id=MASK, train=id,
        transformer=net, noise_schedule=code.cosine_schedule, resize_image_for_cond_image=False,
        self_cond=False, token_critic=judging if critic else None, training=False, eval=lambda: None,
        no_mask_token_prob=0.25,
    )  # fmt: skip
    with (
        TorchNoise(seed, coarse=True) as noise,
        kept(torch.Tensor, "topk") as tops,
        kept(torch, "where") as fills,
    ):
        final = methods.generate(self, [""] * ROWS, temperature=temperature, timesteps=steps,
                                 topk_filter_thres=thres, cond_scale=scale,
                                 can_remask_prev_masked=remask).reshape(ROWS, N)  # fmt: skip
    rule = RULE | {"top_k": tops[1][0][1], "sample_temperature": temperature}
    if critic or remask:
        rule |= {"score": "given", "revise": "held", "choice_temperature": float(bool(critic))}
    recorder = Recorder(name, source=source, codebase="lucidrains/muse-maskgit-pytorch", rule=rule,
                        function="MaskGit.generate", mask_token_id=MASK, guidance_scale=scale,
                        dtype=dtype)  # fmt: skip
    token = [gumbel_of(u, dtype) for _, u in noise.kept if u.ndim == 3]
    uniform = [u for _, u in noise.kept if u.ndim == 2]
    for s, (before, logits) in enumerate(calls[0]):
        last = s == steps - 1
        scores, count = (torch.zeros(ROWS, N), 0) if last else tops[2 * s + 2][0]
        given = -scores.float().numpy()
        if critic:  # taken apart again: logit and noise
            given = given + (uniform[s] - 0.5) * (1 - (s + 1) / steps)
        competing = np.full(ROWS, N) if critic or remask else (before == MASK).sum(1)
        add(recorder, before, final if last else calls[0][s + 1][0], step=s, num_steps=steps,
            logits=logits, uncond_logits=calls[1][s][1], candidates=fills[s][1],
            num_masked_at_start=[N] * ROWS, num_commit=competing - count, token_gumbel=token[s],
            scores=given if critic or remask else None,
            choice_gumbel=0.5 - uniform[s] if critic else None)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    record(source, "muse", seed=1)
    record(source, "muse-warm", seed=2, temperature=2.0, thres=0.5, steps=8, scale=1.5)
    record(source, "muse-critic", seed=3, critic="token")
    record(source, "muse-self-critic", seed=4, critic="self")
    record(source, "muse-remask", seed=5, remask=True)
    record(source, "muse-cfg-bf16", seed=5, dtype="bfloat16")
    record(source, "muse-critic-cfg-bf16", seed=13, critic="token", dtype="bfloat16")


if __name__ == "__main__":
    main()

"""open-mmlab/Amphion MaskGCT `reverse_diffusion`, of the text-to-semantic and the acoustic model.

    python tests/golden/record/maskgct.py --source <checkout>

Temperatures at step i of T are multiplied by t = 1 - i / T (not below 1e-3 for the draw); the last
step is greedy, or at temperature 0.2 where T is 1.  Noise goes on the filtered probability.  The
embeddings are one-hot, so that the stub can read the tokens; the logits that are kept are those
that were sampled from, after guidance (on hidden states, here the logits), whose rescaling takes a
standard deviation over the whole batch.  The count is floor(N sin(pi t / 2)), whose rounding is not
that of the cosine: half of N stays masked at t = 1/3.  Upstream keeps its mask apart; here it is V.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import add, extract

V, MASK, N, B, PROMPT = 28, 28, 18, 2, 3
NAMES = ("top_k", "log", "gumbel_noise", "gumbel_sample")
RULE = {
    "count_base": "positions", "clamps": [], "filters": ["top_k"], "score": "prob",
    "score_filtered": True, "choice_temperature": 1.0, "sample_anneal": "linspace",
    "choice_anneal": "linspace",
}  # fmt: skip


def model(source, file, owner, layers, seed):
    """Upstream's method on stand-ins, and the list of (layer, tokens, logits) of its calls."""

    def rearrange(x, pattern):
        return x.unsqueeze(-1) if pattern == "b n -> b n 1" else x.squeeze(-1)

    names = (*NAMES, f"{owner}.mask_prob", f"{owner}.reverse_diffusion")
    path = source / "models/tts/maskgct" / file
    found = extract(path, *names, math=math, rearrange=rearrange)
    stubs = [[Stub(V, N, V + 1, seed + 10 * j + i) for i in range(2)] for j in range(layers)]
    calls = []

    def embed(layer):
        def one_hot(x):
            out = torch.zeros(*x.shape, layers, V)
            out[..., layer, :] = torch.nn.functional.one_hot(x, V)
            return out.flatten(-2)

        return one_hot

    def estimator(x, t, *rest, phone_embedding=None, **_):
        conditional = x.shape[1] > N
        layer = int(rest[0][0, 0, 0]) if len(rest) == 2 else 0
        known = x[:, -N:].unflatten(-1, (layers, V))[:, :, layer]
        tokens = torch.where(known.sum(-1) > 0, known.argmax(-1), MASK)
        if conditional:
            calls.append([layer, tokens.numpy().copy(), None])
        logits = torch.from_numpy(stubs[layer][not conditional](tokens))
        return torch.cat([logits[:, : x.shape[1] - N], logits], 1)

    def head(x):
        calls[-1][2] = x.numpy().copy()
        return x

    size = layers * V
    self = SimpleNamespace(
        hidden_size=size, num_quantizer=layers, diff_estimator=estimator, to_logit=head,
        to_logits=[head] * layers, cond_emb=embed(0), token_emb=[embed(i) for i in range(layers)],
        mask_emb=lambda x: torch.zeros(1, size), phone_emb=lambda x: torch.zeros(B, 4, 1),
        layer_emb=lambda i: torch.full((1, size), float(i)),
    )  # fmt: skip
    self.mask_prob = found.mask_prob.__get__(self)
    return found.reverse_diffusion.__get__(self), calls


def record(source, name, run, calls, num_steps, *, function, temperature, top_k, seed, note=""):
    """Run and write one file, with the layers of one step in a file of their own."""
    with TorchNoise(seed) as noise:
        final = run().numpy().reshape(B, N, -1)
    kept = iter(gumbel_of(u) for kind, u in noise.kept)
    common = {
        "source": source,
        "codebase": "open-mmlab/Amphion",
        "mask_token_id": MASK,
        "note": note,
    }
    rule = RULE | {"sample_temperature": temperature, "top_k": top_k}
    single = rule | {"sample_temperature": 0.2, "sample_anneal": "constant"}
    many = Recorder(name, function=function, rule=rule, **common)
    one = Recorder(f"{name}-one-step", function=function, rule=single, **common)
    step, unused = 0, np.random.default_rng(seed)  # a greedy step must not look at noise
    for c, (layer, tokens, logits) in enumerate(calls):
        step = step + 1 if c and calls[c - 1][0] == layer else 0
        ends = c + 1 == len(calls) or calls[c + 1][0] != layer
        greedy = step == num_steps[layer] - 1 and num_steps[layer] > 1
        token = unused.gumbel(size=(B, N, V)) if greedy else next(kept)
        add(one if num_steps[layer] == 1 else many, tokens,
            final[:, :, layer] if ends else calls[c + 1][1], logits=logits, step=step,
            num_steps=num_steps[layer], num_masked_at_start=np.full(B, N), token_gumbel=token,
            choice_gumbel=next(kept))  # fmt: skip
    assert next(kept, None) is None
    many.write()
    if one.steps:
        one.write()


def main():
    source = source_argument()
    prompt = torch.zeros(B, PROMPT, dtype=torch.long)
    for name, cfg, seed in (("maskgct-t2s", 0.0, 1), ("maskgct-t2s-cfg", 2.5, 2)):
        run, calls = model(source, "maskgct_t2s.py", "MaskGCT_T2S", 1, seed)
        record(source, name, lambda run=run, cfg=cfg: run(prompt, N, prompt[:, :1], temp=0.9,
               filter_thres=0.8, n_timesteps=6, cfg=cfg, rescale_cfg=0.75), calls, [6],
               function="MaskGCT_T2S.reverse_diffusion", temperature=0.9, top_k=math.ceil((1 - 0.8) * V),
               seed=seed)  # fmt: skip
    run, calls = model(source, "maskgct_s2a.py", "MaskGCT_S2A", 3, 5)
    cond, codes = torch.zeros(B, PROMPT + N, 3 * V), torch.zeros(B, PROMPT, 3, dtype=torch.long)
    record(source, "maskgct-s2a", lambda: run(cond, codes, temp=1.5, filter_thres=0.7,
           n_timesteps=[5, 3, 1], cfg=2.5, rescale_cfg=0.75), calls, [5, 3, 1],
           function="MaskGCT_S2A.reverse_diffusion", temperature=1.5, top_k=math.ceil((1 - 0.7) * V),
           seed=5)  # fmt: skip


if __name__ == "__main__":
    main()

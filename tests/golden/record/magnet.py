"""facebookresearch/audiocraft MAGNeT `_generate_stage`: spans, single tokens, overlapping spans.

    python tests/golden/record/magnet.py --source <checkout>

Upstream masks at the start of a step; here a step ends with the mask of the next one, for which
k = max(int(cos(pi / 2 * linspace(0, 1, T)[step + 1]) * spans), 1) spans of three positions stay
masked, those whose surest token is least sure.  The draw is at temperature
max(3 (1 - (step + 1) / T), 0.01), and so is the probability that ranks, which top-p leaves alone.
The guidance scale goes from 2 to 1 with that cosine (from 10 by default), so the logits that are
kept are those after guidance; in half precision those before it, and each step has its scale.  The
noise of a nucleus draw is put back into the vocabulary's order.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, bits_of, source_argument
from text import add, extract

V, MASK, N, B, T = 16, 16, 30, 2, 5
RULE = {
    "last_step": "all", "sample_temperature": 3.0, "sample_anneal": "linear",
    "score": "prob", "score_temperature": None,
}  # fmt: skip


def record(source, name, seed, *, span=3, prompt=0, rule=None, dtype="float32", **options):
    """Run the first stage and write one file."""
    package, orders, calls = source / "audiocraft", [], []
    tools = extract(package / "utils/utils.py", "multinomial", "sample_top_k", "sample_top_p")
    inner = tools.sample_top_p

    def sample_top_p(probs, p):
        orders.append(torch.sort(probs, dim=-1, descending=True).indices.numpy().reshape(-1, V))
        return inner(probs, p)

    tools.sample_top_p = sample_top_p
    names = ("_construct_spans_mask", "_least_probable_span_masking", "_generate_stage")
    found = extract(package / "models/lm_magnet.py", *(f"MagnetLMModel.{n}" for n in names), math=math,
                    utils=tools)  # fmt: skip
    stubs = [Stub(V, N, V + 1, seed + 50 * i, bits_of(dtype)) for i in range(2)]

    def model(sequence, *_, **__):
        tokens = sequence[:, 0]
        logits = [torch.from_numpy(s(x)) for s, x in zip(stubs, tokens.chunk(2), strict=True)]
        calls.append((tokens[:B].numpy().copy(), [x.numpy() for x in logits]))
        return torch.cat(logits)[:, None].to(getattr(torch, dtype))

    self = SimpleNamespace(special_token_id=MASK, span_len=span, _fsdp=model)
    for n in names:
        setattr(self, n, getattr(found, n).__get__(self))
    known = torch.from_numpy(np.random.default_rng(seed).integers(0, V, (B, 1, prompt)))
    sequence = torch.full((B, 1, N), MASK)
    with TorchNoise(seed) as noise:
        out, _ = self._generate_stage(sequence, {"x": 1}, 0, "cpu", prompt, known, timesteps=T,
                                      max_cfg_coef=2.0, **options)  # fmt: skip
    half = dtype != "float32"  # what upstream rounds is kept unmixed
    shares = torch.cos(torch.linspace(0, 1, T) * math.pi * 0.5).tolist()
    scales = [share * 2.0 + (1 - share) * 1.0 for share in shares]
    recorder = Recorder(name, source=source, codebase="facebookresearch/audiocraft", span=span,
                        function="MagnetLMModel._generate_stage", rule=RULE | (rule or {}),
                        mask_token_id=MASK, prompt=prompt, dtype=dtype,
                        guidance_scale=scales if half else None)  # fmt: skip
    states = [tokens for tokens, _ in calls] + [out[:, 0].numpy()]
    for s, (tokens, (cond, uncond)) in enumerate(calls):
        token = noise.kept[s][1].reshape(-1, V)
        if orders:
            sorted_noise, token = token, np.empty_like(token)
            np.put_along_axis(token, orders[s], sorted_noise, -1)
        add(recorder, tokens, states[s + 1], step=s, num_steps=T, token_gumbel=token.reshape(B, N, V),
            logits=cond if half else uncond + (cond - uncond) * np.float32(scales[s]),
            uncond_logits=uncond if half else None,
            num_masked_at_start=(states[0] == MASK).sum(1))  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    nucleus = {"filters": ["top_p"], "top_p": 0.9}
    record(source, "magnet", 1, top_p=0.9, rule=nucleus)
    record(source, "magnet-prompt", 2, top_p=0.9, rule=nucleus, prompt=6)
    record(source, "magnet-product", 3, top_k=5, span_scoring="prod",
           rule={"filters": ["top_k"], "top_k": 5, "score": "log_prob", "score_filtered": True})  # fmt: skip
    record(source, "magnet-tokens", 4, span=1, rule={"score": "log_prob"}, prompt=4)
    record(source, "magnet-cfg-bf16", 2, span=1, dtype="bfloat16", rule={"score": "log_prob"})
    record(source, "magnet-overlapping", 5, span_arrangement="stride1", rule={"score": "log_prob"})


if __name__ == "__main__":
    main()

"""Dream, from the copy in NVlabs/Fast-dLLM: dream/model/generation_utils.py `_sample`.

    python tests/golden/record/dream.py --source <checkout>

Logits are kept as the sampler sees them, shifted by one position.  Upstream works on gathered
masked rows; their noise is put back in place here (zero elsewhere).  torch.multinomial without
replacement, over softmax(confidence / alg_temp), is the top k of confidence + alg_temp * gumbel:
choice_temperature.  Rows have the same number of masks in different places, but for
dream-uneven, where the count int(mean * share) of all rows leaves one mask over at the end.

The seeds are ones that replay.  On others, steps differ where confidences tie at a cut (positions 0
and 1 share their shifted logits; a nucleus of one token has probability 1), where upstream writes a
mask over a known token, and in bfloat16 by its roundings.
"""

import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import Model, add, extract, prompts

V, MASK = 20, 19


def record(code, source, name, alg, rule, *, seed, rows=2, dtype="float32", steps=6, uneven=0,
           note="", **options):  # fmt: skip
    """Run `_sample` and write one file."""
    prompt_length, size = 5, 16
    model = Model(Stub(V, size, V, seed, 8), dtype)
    prompt = prompts(V, MASK, rows + 1, prompt_length, seed)[1:]
    if uneven:
        prompt[0] = prompts(V, MASK, 2, prompt_length, seed + 1, holes=2 + uneven)[1]
    given = {"max_length": size, "mask_token_id": MASK, "steps": steps, "eps": 1e-3, "alg": alg,
             "alg_temp": None, "temperature": 0.0, "top_p": None, "top_k": None}  # fmt: skip
    given |= {"output_history": False, "return_dict_in_generate": False} | options
    recorder = Recorder(name, source=source, codebase="NVlabs/Fast-dLLM", mask_token_id=MASK,
                        function="dream/model/generation_utils.py _sample", rule=rule, dtype=dtype,
                        note=note)  # fmt: skip
    seen, marks = [], []

    def on_tokens(_, x, __):
        seen.append(x.numpy().copy())
        return x

    def on_logits(_, __, logits):
        marks.append((len(noise.kept), logits.float().numpy().copy()))
        return logits

    with TorchNoise(seed) as noise:
        code._sample(model, prompt, None, SimpleNamespace(**given), on_tokens, on_logits)
    ends = [start for start, _ in marks[1:]] + [len(noise.kept)]
    for s, ((start, logits), end) in enumerate(zip(marks, ends, strict=True)):
        masked = seen[s] == MASK
        token, choice = np.zeros((*masked.shape, V)), np.zeros(masked.shape)
        rows_drawn = masked.copy()
        for kind, draw in noise.kept[start:end]:
            if kind == "uniform":  # origin: which positions
                choice[masked] = gumbel_of(draw)
                share = 1.0 if s == steps - 1 else 1 - code.times[s + 1] / code.times[s]
                rows_drawn[masked] = draw < float(share)
            elif draw.shape == masked.shape:  # alg_temp
                choice = draw
            else:
                token[rows_drawn] = draw
        add(recorder, seen[s], seen[s + 1], logits=logits, step=s, num_steps=steps,
            num_masked_at_start=(seen[0] == MASK).sum(1),
            token_gumbel=token if given["temperature"] else None,
            choice_gumbel=choice if given["alg_temp"] or alg == "origin" else None)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    code = extract(source / "dream/model/generation_utils.py", "top_p_logits", "top_k_logits",
                   "sample_tokens", "DreamGenerationMixin._sample", F=F, time=time,
                   dists=torch.distributions)  # fmt: skip
    code.times = torch.linspace(1, 1e-3, 7)
    last = {"last_step": "schedule"}  # int(mean), which may leave masks over where rows differ
    plus, margin, entropy = ({"preset": f"dream-{n}"} | last
                             for n in ("maskgit-plus", "margin", "entropy"))  # fmt: skip
    nucleus = {"temperature": 0.7, "top_p": 0.9, "top_k": 6}
    drawn = {"sample_temperature": 0.7, "filters": ["top_p", "top_k"], "top_p": 0.9, "top_k": 6}
    record(code, source, "dream-maskgit-plus", "maskgit_plus", plus, seed=1)
    record(code, source, "dream-maskgit-plus-bf16", "maskgit_plus", plus, seed=2, dtype="bfloat16")
    record(code, source, "dream-margin", "topk_margin", margin, seed=3)
    record(code, source, "dream-entropy", "entropy", entropy, seed=4)
    record(code, source, "dream-entropy-bf16", "entropy", entropy, seed=5,
           dtype="bfloat16")  # fmt: skip
    record(code, source, "dream-origin", "origin", "dream-origin", seed=6)
    record(code, source, "dream-origin-drawn", "origin", {"preset": "dream-origin"} | drawn,
           seed=7, **nucleus)  # fmt: skip
    record(code, source, "dream-drawn", "maskgit_plus", plus | drawn, seed=8, **nucleus)
    record(code, source, "dream-entropy-drawn", "entropy", entropy | drawn,
           seed=9, **nucleus)  # fmt: skip
    record(code, source, "dream-alg-temp", "maskgit_plus", plus | {"choice_temperature": 0.4},
           seed=10, alg_temp=0.4)  # fmt: skip
    record(code, source, "dream-drawn-bf16", "maskgit_plus", plus | {"sample_temperature": 0.7},
           seed=13, dtype="bfloat16", temperature=0.7)  # fmt: skip
    record(code, source, "dream-nucleus-bf16", "maskgit_plus", plus | drawn, seed=11,
           dtype="bfloat16", note="upstream scales, filters and sums in bfloat16", **nucleus)  # fmt: skip
    record(code, source, "dream-uneven", "maskgit_plus", plus,
           seed=12, uneven=1)  # fmt: skip


if __name__ == "__main__":
    main()

"""pengzhangzhi/Open-dLLM veomni/.../qwen2/generation_utils.py `_mdm_sample`: Dream's kinds and P2.

    python tests/golden/record/open_dllm.py --source <checkout>

Logits are kept shifted by one position, noise is put back in place.  Unlike Dream each row has its
own count.  P2 ranks all positions that were masked at the start by the confidence of what the
model would draw there now, and masks committed ones again: `eligible` holds those positions.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import Model, add, extract, prompts

V, MASK = 20, 19


class Configured(Model):
    """What upstream's mixin expects of a model."""

    config = SimpleNamespace(pad_token_id=None)


def record(code, source, name, alg, rule, *, seed, rows=3, dtype="float32", steps=6, size=16,
           **options):  # fmt: skip
    """Run `_mdm_sample` and write one file."""
    model = Configured(Stub(V, size, V, seed, 8), dtype)
    x = torch.full((rows, size), MASK)
    x[:, :5] = prompts(V, MASK, rows, 5, seed)
    x[2:, 9:11] = 4  # rows with different numbers of masks
    start = x.numpy() == MASK
    given = {"max_length": size, "mask_token_id": MASK, "steps": steps, "eps": 1e-3, "alg": alg,
             "alg_temp": 0.0, "temperature": 0.0, "top_p": None, "top_k": None,
             "output_history": False, "return_dict_in_generate": False} | options  # fmt: skip
    starts = []
    with TorchNoise(seed) as noise:
        call = model.stub.__call__
        model.stub = lambda tokens: starts.append(len(noise.kept)) or call(tokens)
        out = code._mdm_sample(model, x.clone(), None, SimpleNamespace(**given))
    recorder = Recorder(name, source=source, codebase="pengzhangzhi/Open-dLLM", rule=rule,
                        function="MDMGenerationMixin._mdm_sample", mask_token_id=MASK,
                        dtype=dtype)  # fmt: skip
    states = [tokens for tokens, _ in model.calls] + [out.numpy()]
    for s, (_, logits) in enumerate(model.calls):
        masked = states[s] == MASK
        token, choice = np.zeros((*masked.shape, V)), np.zeros(masked.shape)
        for kind, draw in noise.kept[starts[s] : [*starts, None][s + 1]]:
            if kind == "uniform":
                choice = gumbel_of(draw)
            else:
                token[masked | (alg == "p2")] = draw
        add(recorder, states[s], states[s + 1], step=s, num_steps=steps,
            eligible=start if alg == "p2" else masked, num_masked_at_start=start.sum(1),
            logits=np.concatenate([logits[:, :1], logits[:, :-1]], 1),
            token_gumbel=token if given["temperature"] else None,
            choice_gumbel=choice if given["alg_temp"] else None)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    code = extract(
        source / "veomni/models/transformers/qwen2/generation_utils.py", "top_p_logits",
        "top_k_logits", "sample_tokens", "MDMGenerationMixin._mdm_sample", F=F,
        dists=torch.distributions)  # fmt: skip
    rule = {"preset": "dream-maskgit-plus", "greedy_on": "logits"}
    entropy = rule | {"score": "neg_entropy"}
    record(code, source, "open-dllm-even", "entropy", entropy, seed=1, rows=1, dtype="bfloat16")
    record(code, source, "open-dllm", "entropy", entropy, seed=2)
    record(code, source, "open-dllm-margin", "topk_margin", rule | {"score": "margin"}, seed=3)
    drawn = {"sample_temperature": 0.7, "filters": ["top_p"], "top_p": 0.95,
             "choice_temperature": 0.3}  # fmt: skip
    record(code, source, "open-dllm-drawn", "maskgit_plus", rule | drawn, seed=4, alg_temp=0.3,
           temperature=0.7, top_p=0.95)  # fmt: skip
    p2 = {"count": "masked", "schedule": "linear", "clamps": [], "score": "top1_prob",
          "sample_temperature": 0.0, "revise": "held"}  # fmt: skip
    record(code, source, "open-dllm-p2", "p2", p2, seed=5)
    drawn = {"score": "prob", "sample_temperature": 0.7, "score_temperature": None}
    record(code, source, "open-dllm-p2-drawn", "p2", p2 | drawn, seed=10, temperature=0.7)


if __name__ == "__main__":
    main()

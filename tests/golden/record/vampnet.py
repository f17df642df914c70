"""hugofloresgarcia/vampnet `VampNet.generate`: counts over the batch, top-p, guidance, a cutoff.

    python tests/golden/record/vampnet.py --source <checkout>

k = floor(cos(r pi / 2) U) where U is the number of masked tokens of the whole batch, then clamped to
[1, masked - 1] for each row.  Typical filtering is on, as by default, and has no effect: its result
is dropped.  With guidance upstream doubles the batch, counts the masks of both halves, and masks
the two halves differently; the logits that are kept are those after guidance, in both rows;
in half precision those before it.  The last step fills everything.  After the cutoff steps are greedy,
and their noise here must not be looked at.  Tokens are flattened as upstream does it.
"""

from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, bits_of, gumbel_of, source_argument
from einops import rearrange
from text import add, extract, fake

V, MASK, BOOKS, LENGTH, T = 30, 30, 2, 9, 6
RULE = {
    "cut": "strict", "last_step": "all", "score_temperature": None, "score_filtered": True,
    "choice_temperature": 10.5,
}  # fmt: skip


def record(source, name, seed, rows=1, guided=False, rule=None, dtype="float32",
           **options):  # fmt: skip
    """Run `generate` and write one file."""
    package, n = source / "vampnet", BOOKS * LENGTH
    util = extract(package / "util.py", "scalar_to_batch_tensor", "codebook_flatten", "codebook_unflatten",
                   rearrange=rearrange)  # fmt: skip
    scope = vars(util) | vars(extract(package / "mask.py", "_gamma"))
    names = ("gumbel_noise_like", "sample_from_logits", "mask_by_random_topk", "typical_filter")
    found = extract(package / "modules/transformer.py", *names, "VampNet.generate", rearrange=rearrange,
                    logging=SimpleNamespace(debug=lambda *_: None), Optional=dict, **scope)  # fmt: skip
    stub, other = (Stub(V, n, V + 1, seed + i, bits_of(dtype)) for i in (0, 50))
    calls = []

    def forward(z):
        tokens = util.codebook_flatten(z)
        logits = torch.from_numpy(stub(tokens))
        if guided:
            logits[rows:] = torch.from_numpy(other(tokens[rows:]))
        calls.append((tokens.numpy().copy(), logits.numpy().copy()))
        return logits.to(getattr(torch, dtype)).permute(0, 2, 1)

    self = SimpleNamespace(
        embedding=SimpleNamespace(from_codes=lambda z, _: z), forward=forward, n_codebooks=BOOKS,
        n_conditioning_codebooks=0, mask_token=MASK, device="cpu",
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    start = torch.from_numpy(rng.integers(0, V, (rows, BOOKS, LENGTH)))
    mask = torch.from_numpy((rng.random((rows, BOOKS, LENGTH)) < 0.8).astype(np.int32))
    control = {"x": torch.zeros(rows, 1, 1)} if guided else None
    with TorchNoise(seed, coarse=True) as noise:
        out = found.generate(self, None, _sampling_steps=T, start_tokens=start, mask=mask, ctrls=control,
                             ctrl_masks=control, return_signal=False, **options)  # fmt: skip
    kept = iter(gumbel_of(x, dtype) if kind == "uniform" else x for kind, x in noise.kept)
    half = dtype != "float32"  # what upstream rounds is kept unmixed
    recorder = Recorder(name, source=source, codebase="hugofloresgarcia/vampnet",
                        rule=RULE | (rule or {}),
                        function="VampNet.generate", mask_token_id=MASK, dtype=dtype,
                        guidance_scale=3.0 if half else None)  # fmt: skip
    states = [tokens for tokens, _ in calls]
    states.append(np.broadcast_to(util.codebook_flatten(out).numpy(), states[0].shape))
    draws = round(options.get("sample_cutoff", 1.0) * T) + 1
    for s, (tokens, logits) in enumerate(calls):
        token = next(kept).reshape(rows, n, V) if s < draws else rng.gumbel(size=(rows, n, V))
        if guided:
            cond, uncond = logits[:rows], logits[rows:]
            logits = cond if half else uncond + np.float32(3) * (cond - uncond)
            logits, uncond, token = (np.concatenate([x, x]) for x in (logits, uncond, token))
        add(recorder, tokens, states[s + 1], logits=logits, step=s, num_steps=T, token_gumbel=token,
            uncond_logits=uncond if half else None,
            num_masked_at_start=(states[0] == MASK).sum(1), choice_gumbel=next(kept))  # fmt: skip
    assert next(kept, None) is None
    recorder.write()


def main():
    source = source_argument()
    fake("tqdm")
    nucleus = {"filters": ["top_p", "temperature"], "top_p": 0.85, "sample_temperature": 0.9}
    record(source, "vampnet", 1)
    record(source, "vampnet-top-p", 2, rule=nucleus, top_p=0.85, temperature=0.9)
    record(
        source, "vampnet-batch", 3, rows=2, mask_temperature=2.0, rule={"choice_temperature": 2.0}
    )
    record(source, "vampnet-guided", 4, guided=True)
    record(source, "vampnet-cutoff", 5, sample_cutoff=0.5)
    record(source, "vampnet-cfg-bf16", 13, guided=True, dtype="bfloat16")


if __name__ == "__main__":
    main()

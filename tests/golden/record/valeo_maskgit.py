"""valeoai/Maskgit-pytorch, branch v1.0: `MaskGIT.sample` of the trainer.

    python tests/golden/record/valeo_maskgit.py --source <checkout>

Logits are kept after the guidance, which grows by step, and before the softmax, with sm_temp (it
multiplies) left out.  The number to commit comes from upstream's table (`num_commit` (S, B)), which
always sums to N.  The mask class has a column and could be drawn; the stub does not favour it.
Without random confidence ("none") upstream runs for one sequence only, as its shapes go wrong.  There is
no guided run in half precision: under upstream's autocast a float32 bias makes its logits float32.
"""

import contextlib
import math
import random
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, TorchNoise, gumbel_of, source_argument
from image import Guided, kept, sequences
from text import add, extract

SIDE, CODES = 4, 23
N, V, MASK = SIDE * SIDE, CODES + 1, CODES
RULE = {
    "count": "quota", "cut": "strict", "score_temperature": None, "choice_temperature": 4.5,
    "choice_anneal": "linspace",
}  # fmt: skip


def record(code, source, name, *, known, seed, steps=6, mode="arccos", randomize="linear", w=0.0,
           sm_temp=1.0, **rule):  # fmt: skip
    """Run `sample` on sequences of which `known` tokens are given; write one file."""
    tokens, rows = sequences(known, N, CODES, MASK, seed), len(known)
    model = Guided(rows, V, N, V, seed)
    for stub in model.stubs:
        stub.place[:, MASK] = -100

    def vit(x, *_, **__):
        return model(x.reshape(len(x), N))

    vit.eval = vit.train = lambda: None
    self = SimpleNamespace(
        vit=vit, codebook_size=CODES, patch_size=SIDE, ae=SimpleNamespace(decode_code=lambda x: x),
        args=SimpleNamespace(device="cpu", mask_value=MASK),
    )  # fmt: skip
    self.adap_sche = code.adap_sche.__get__(self)
    choice, rng = [], np.random.default_rng(seed)
    with TorchNoise(seed) as noise, kept(torch, "softmax") as mixes:
        np.random.gumbel, saved = (lambda size: choice.append(rng.gumbel(size=size)) or choice[-1],
                                   np.random.gumbel)  # fmt: skip
        final, drawn, masks = code.sample(
            self, torch.from_numpy(tokens.copy()).reshape(rows, SIDE, SIDE), rows,
            torch.zeros(rows, dtype=torch.long), sm_temp, w, randomize, 4.5, mode, steps)  # fmt: skip
        np.random.gumbel = saved
    choice += [gumbel_of(u) for kind, u in noise.kept if kind == "uniform"]
    token = [g for kind, g in noise.kept if kind == "gumbel"]
    states = [ids for ids, _ in model.calls] + [final.reshape(rows, N).numpy()]
    table = [int(t) for t in code.adap_sche(self, steps, mode)]
    recorder = Recorder(name, source=source, codebase="valeoai/Maskgit-pytorch", mask_token_id=MASK,
                        function="MaskGIT.sample", rule=RULE | {"sample_temperature": 1 / sm_temp} | rule,
                        note=f"sched_mode={mode}")  # fmt: skip
    for s, pick in enumerate(drawn):
        before = states[s]
        assert (
            (before == MASK).sum(1)
            == (masks[s - 1].sum((1, 2)).numpy() if s else N - np.array(known))
        ).all()
        add(recorder, before, states[s + 1], step=s, num_steps=steps, num_commit=[table[s]] * rows,
            candidates=np.where(before == MASK, pick.reshape(rows, N), before),
            logits=mixes[s][0][0].numpy() / np.float32(sm_temp), num_masked_at_start=(tokens == MASK).sum(1),
            token_gumbel=token[s].reshape(rows, N, V),
            choice_gumbel=choice[s] if choice else None)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    torch.cuda.amp.autocast = contextlib.nullcontext
    code = extract(source / "Trainer/vit.py", "MaskGIT.adap_sche", "MaskGIT.sample", math=math,
                   random=random, tqdm=lambda x, **_: x)  # fmt: skip

    def run(*args, **options):
        record(code, source, *args, **options)

    run("valeo-v1", known=(0, 0), seed=1)
    run("valeo-v1-cfg", known=(0, 0, 0), seed=2, w=3.0, mode="cosine")
    run("valeo-v1-known", known=(3, 11, 15), seed=3, mode="root", sm_temp=1.25)
    run("valeo-v1-square", known=(0, 0), seed=4, mode="square", steps=8)
    run("valeo-v1-random", known=(0, 0), seed=5, mode="linear", randomize="random", score="random",
        choice_temperature=0.0)  # fmt: skip
    run("valeo-v1-none", known=(0,), seed=6, randomize="none", score="prob", choice_temperature=0.0)


if __name__ == "__main__":
    main()

"""Replays whole loops of other codebases, block by block, through `generate`.

tests/golden/loop-*.npz hold every call of the model (record/common.py, write_loop): `generate` must ask
for the logits of the same tokens, as often, and end with the same sequence.  Prompts end inside a block.
"""

import json

import numpy as np
import pytest
from helpers import BACKENDS, GOLDEN, golden_rule, native

import maskgit
from maskgit import StepNoise

LOOPS = sorted(GOLDEN.glob("loop-*.npz"))
HERE = [name for name in (*BACKENDS, "reference") if name not in ("triton", "pallas")]


class Replay:
    """The recorded model and its noise: one call after the other, on the tokens that it was recorded with."""

    def __init__(self, golden, meta, kind):
        self.golden, self.kind, self.calls = golden, kind, 0
        self.size, self.width = meta["loop"]["block_length"], golden["logits"].shape[-1]

    def spread(self, values, start, shape):
        """Values of a block in the whole sequence, zero elsewhere."""
        out = np.zeros((*shape, self.width), np.float32)
        out[:, start : start + self.size] = values
        return native(out, self.kind)

    def __call__(self, tokens):
        now = np.asarray(tokens)
        assert self.calls < len(self.golden["start"]), "more calls than theirs"
        start = int(self.golden["start"][self.calls])
        window = now[:, start : start + self.size]
        np.testing.assert_array_equal(window, self.golden["tokens"][self.calls], f"{self.calls}")
        self.calls += 1
        return self.spread(self.golden["logits"][self.calls - 1], start, now.shape)

    def noise(self, _):
        if "token_gumbel" not in self.golden:
            return StepNoise()
        last = self.calls - 1
        shape = (self.golden["tokens"].shape[1], self.length)
        return StepNoise(
            self.spread(self.golden["token_gumbel"][last], int(self.golden["start"][last]), shape)
        )


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_a_whole_loop(path, backend):
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    meta = json.loads(str(golden.pop("meta")))
    loop = meta["loop"]
    kind = {"torch": "torch", "jax": "jax"}.get(backend, "numpy")
    replay = Replay(golden, meta, kind)
    replay.length = len(loop["prompt"][0])
    blocks = (replay.length - loop["first"]) // loop["block_length"]
    out = maskgit.generate(
        replay,
        native(np.array(loop["prompt"], np.int32), kind),
        rule=golden_rule(path.stem),
        mask_token_id=meta["mask_token_id"],
        num_steps=loop["num_steps"] * blocks,
        block_length=loop["block_length"],
        prompt_length=loop["first"],
        noise=replay.noise,
        backend=backend,
    )
    assert replay.calls == len(golden["start"]), "fewer calls than theirs"
    np.testing.assert_array_equal(np.asarray(out.tokens), loop["final"])


def test_prompts_end_inside_blocks():
    """What these recordings are for; without it the count would be the same either way."""
    for path in LOOPS:
        with np.load(path, allow_pickle=False) as file:
            loop = json.loads(str(file["meta"]))["loop"]
            mask = json.loads(str(file["meta"]))["mask_token_id"]
        prompt = np.array(loop["prompt"])
        block = prompt[:, loop["first"] : loop["first"] + loop["block_length"]]
        assert 0 < (block == mask).sum() < block.size, path.stem

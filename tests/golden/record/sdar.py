"""JetAstra/SDAR generate.py `block_diffusion_generate`.

    python tests/golden/record/sdar.py --source <checkout>

The model sees one block at a time, and so do these recordings.  Upstream's quota comes from the
length of the block, whatever is masked in it.  Whole loops have prompts that end inside a block.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import Recorder, Stub, TorchNoise, source_argument, write_loop
from text import Model, add, extract

V = MASK = 20


class Cached(Model):
    """Skips the calls that only fill upstream's cache."""

    def eval(self):
        return self

    def __call__(self, x, store_kv=False, **_):
        return SimpleNamespace() if store_kv else super().__call__(x)


def record(generate, source, name, rule, *, seed, size=8, steps=4, dtype="float32", prompt=4,
           sharpness=1.0, scores=None, **options):  # fmt: skip
    """Run three blocks and write one file."""
    stub = Stub(V, size, V + 1, seed, 8)
    stub.near, stub.place = stub.near * sharpness, stub.place * sharpness
    model = Cached(stub, dtype)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, V, (1, prompt)))
    with TorchNoise(seed) as noise:
        out = generate(model, {"input_ids": ids}, MASK, gen_length=3 * size - prompt,
                       block_length=size, denoising_steps=steps, **options)  # fmt: skip
    recorder = Recorder(name, source=source, codebase="JetAstra/SDAR", mask_token_id=MASK,
                        function="block_diffusion_generate", rule=rule, dtype=dtype)  # fmt: skip
    states = [tokens for tokens, _ in model.calls]
    blocks, s, step = iter(out.view(-1, size).numpy()[prompt // size :]), 0, 0
    for s, (tokens, logits) in enumerate(model.calls):
        ended = s + 1 == len(states) or (states[s + 1] == MASK).sum() >= (tokens == MASK).sum()
        after = next(blocks)[None] if ended else states[s + 1]
        add(recorder, tokens, after, logits=logits, step=step, num_steps=steps, scores=scores,
            token_gumbel=noise.kept[s][1][None])  # fmt: skip
        step = 0 if ended else step + 1
    recorder.write()


def record_loop(generate, source, name, rule, *, seed, prompt, size=8, steps=4, **options):
    """Run the whole loop on a prompt that ends inside a block and write one file."""
    model = Cached(Stub(V, size, V + 1, seed, 8))
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, V, (1, prompt)))
    with TorchNoise(seed) as noise:
        out = generate(model, {"input_ids": ids}, MASK, gen_length=3 * size - prompt,
                       block_length=size, denoising_steps=steps, **options).numpy()  # fmt: skip
    before = np.full_like(out, MASK)
    before[:, :prompt] = ids
    assert np.array_equal(out[:, :prompt], ids), "upstream overwrote the prompt"
    block, calls = prompt // size, []
    for (tokens, logits), (_, gumbel) in zip(model.calls, noise.kept, strict=True):
        if calls and (tokens == MASK).sum() >= (calls[-1]["tokens"] == MASK).sum():
            block += 1
        calls.append({"tokens": tokens, "logits": logits, "start": block * size,
                      "token_gumbel": gumbel[None].astype(np.float32)})  # fmt: skip
    recorder = Recorder(name, source=source, codebase="JetAstra/SDAR", mask_token_id=MASK,
                        function="block_diffusion_generate", rule=rule | {"layout": "loop"})  # fmt: skip
    write_loop(recorder, calls, prompt=before, final=out, block_length=size, num_steps=steps,
               first=prompt // size * size)  # fmt: skip


def main():
    source = source_argument()
    generate = extract(source / "generate.py", "top_k_logits", "top_p_logits",
                       "sample_with_temperature_topk_topp", "get_num_transfer_tokens",
                       "block_diffusion_generate", F=F, DynamicCache=lambda: None,
                       ).block_diffusion_generate  # fmt: skip
    rule = {"count": "quota", "score": "prob", "score_temperature": None, "score_filtered": True,
            "score_dtype": "logits"}  # fmt: skip
    static = {"remasking_strategy": "low_confidence_static"}
    nucleus = {"filters": ["top_k", "top_p"], "top_k": 8, "top_p": 0.95, "sample_temperature": 0.8}
    record(generate, source, "sdar", rule, seed=1, **static)
    record(generate, source, "sdar-nucleus", rule | nucleus, seed=2, temperature=0.8, top_k=8,
           top_p=0.95, **static)  # fmt: skip
    dynamic = rule | {"count": "threshold", "threshold": 0.7}
    record(generate, source, "sdar-dynamic", dynamic, seed=3, sharpness=0.7,
           remasking_strategy="low_confidence_dynamic", confidence_threshold=0.7)  # fmt: skip
    record(generate, source, "sdar-sequential", rule | {"score": "given"}, seed=4,
           scores=-np.arange(8.0)[None], remasking_strategy="sequential")  # fmt: skip
    record_loop(generate, source, "loop-sdar", {"preset": "sdar"}, seed=5, prompt=12, **static)
    record_loop(generate, source, "loop-sdar-short", {"preset": "sdar"}, seed=6, prompt=6, **static)
    record_loop(generate, source, "loop-sdar-dynamic", {"preset": "sdar-dynamic", "threshold": 0.5},
                seed=7, prompt=4, remasking_strategy="low_confidence_dynamic",
                confidence_threshold=0.5)  # fmt: skip


if __name__ == "__main__":
    main()

"""inclusionAI/dInfer: the `decode` methods of the decoders in parallel_strategy.py.

    python tests/golden/record/dinfer.py --source <checkout>

A decoder is called on one block after the other until the block is done.  The credit decoder adds
alpha * log(1 + credit) to the logits, a state of its own: the sums are what is kept as logits.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from common import Recorder, Stub, TorchNoise, gumbel_of, source_argument
from text import Model, add, extract, prompts

V = 20


def record(decoder, source, name, rule, *, seed, rows=2, mask=V, blocks=2, twins=False,
           sharpness=1.2, limit=99):  # fmt: skip
    """Decode all blocks and write one file; `twins` makes neighbours agree exactly."""
    prompt_length, length = 4, 12
    stub = Stub(V, prompt_length + length, V + 1, seed, 8)
    stub.near, stub.place = stub.near * sharpness * (not twins), stub.place * sharpness
    if twins:
        stub.place[1::2] = stub.place[::2]
    if mask < V:  # positions that predict the mask id are left out, even where surest
        stub.place[:, mask] += 3.0
    model = Model(stub)
    x = torch.cat([prompts(V, mask, rows, prompt_length, seed, holes=0),
                   torch.full((rows, length), mask)], 1)  # fmt: skip
    known = torch.from_numpy(np.random.default_rng(seed).integers(0, V - 1, x.shape))
    for b in range(1, rows):  # rows with different numbers of known tokens
        x[b, prompt_length + 2 * b : prompt_length + 4 * b] = known[b, : 2 * b]
    fused = []
    if hasattr(decoder, "_apply_credit_fusion"):
        fuse = decoder._apply_credit_fusion
        decoder._apply_credit_fusion = lambda *a: fused.append(fuse(*a)) or fused[-1]
    recorder = Recorder(name, source=source, codebase="inclusionAI/dInfer", mask_token_id=mask,
                        function=f"{type(decoder).__name__}.decode", rule=rule)  # fmt: skip
    for block in range(blocks):
        start = prompt_length + block * (length // blocks)
        end = start + length // blocks
        first = (x[:, start:end] == mask).sum(1).numpy()
        for s in range(limit):
            if not (x[:, start:end] == mask).any():
                break
            before, logits = x.numpy().copy(), model(x).logits
            with TorchNoise(seed + 100 * block + s) as noise:
                decoder.decode(logits[:, start:end], start, end, x)
            if fused:
                logits[:, start:end] = fused[-1]
            token = np.zeros(logits.shape)
            if decoder.temperature:
                token[:, start:end] = gumbel_of(noise.kept[0][1])
            eligible = before == mask
            eligible[:, :start], eligible[:, end:] = False, False
            add(recorder, before, x.numpy().copy(), logits=logits, eligible=eligible, step=s,
                num_steps=100, num_masked_at_start=first,
                token_gumbel=token if decoder.temperature else None)  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    folder = source / "python/dinfer/decoding"
    torch.compile = lambda **_: lambda function: function
    noise = extract(folder / "utils.py", "add_gumbel_noise", math=math).add_gumbel_noise
    code = extract(folder / "parallel_strategy.py", "ParallelDecoder",
                   "get_transfer_index_threshold", "ThresholdParallelDecoder",
                   "CreditThresholdParallelDecoder", "HierarchyDecoder", math=math, F=F,
                   add_gumbel_noise=noise)  # fmt: skip
    rule = {"preset": "threshold", "block_scope": "block", "score_dtype": "float32"}
    plain = code.ThresholdParallelDecoder
    record(plain(0.0, 0.9, mask_id=V), source, "dinfer-threshold", rule, seed=1, rows=3)
    drawn = rule | {"sample_temperature": 0.5, "threshold": 0.7, "score_dtype": "float64"}
    record(plain(0.5, 0.7, mask_id=V, use_float64=True), source, "dinfer-threshold-drawn", drawn,
           seed=2)  # fmt: skip
    record(plain(0.0, 0.95, mask_id=V), source, "dinfer-threshold-twins", rule | {
           "threshold": 0.95}, seed=3, twins=True)  # fmt: skip
    record(plain(0.0, 0.9, mask_id=V - 1), source, "dinfer-threshold-mask", rule, seed=4,
           mask=V - 1, limit=8)  # fmt: skip
    credit = code.CreditThresholdParallelDecoder(temperature=0.0, threshold=0.9, mask_id=V)
    record(credit, source, "dinfer-credit", rule, seed=5)
    runs = code.HierarchyDecoder(0.0, mask_id=V, threshold=0.9, low_threshold=0.4)
    record(runs, source, "dinfer-hierarchy", rule, seed=6, rows=1, blocks=1, sharpness=0.8)


if __name__ == "__main__":
    main()

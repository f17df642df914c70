"""sgl-project/sglang, python/sglang/srt/dllm/algorithm: the `run` methods.

    python tests/golden/record/sglang_dllm.py --source <checkout>

One block of every request in a batch.  JointThreshold also replaces tokens that it committed in
earlier steps: there `eligible` holds every position that may change, masked or not.  EBSampling is
newer than the commit of the others: it is recorded only where its class, copied from ENTROPY_BOUND,
has been put into the checkout as eb_sampling.py.
"""

from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, source_argument
from text import Model, add, extract, prompts

V = 20
ENTROPY_BOUND = "38c8d9bccb95e7307339215d536edbcf4807d193"


class Base:
    """What upstream's base class keeps of its configuration."""

    def __init__(self, config):
        self.block_size, self.mask_id = config.block_size, config.mask_id


def record(algorithm, source, name, rule, *, seed, mask=V, size=12, rows=3, dtype="float32",
           sharpness=1.0, commit=None, note="",
           **options):  # fmt: skip
    """Run one block and write one file."""
    stub = Stub(V, size, V + 1, seed, 8)
    stub.near, stub.place = stub.near * sharpness, stub.place * sharpness
    model = Model(stub, dtype)
    x = torch.full((rows, size), mask)
    for b in range(rows):  # rows with different numbers of known tokens
        x[b, : 2 * b + 1] = prompts(V, mask, 1, 2 * b + 1, seed)[0]
    prompt = x.numpy() != mask
    batch = SimpleNamespace(input_ids=x.view(-1), batch_size=rows)

    def forward(batch, **_):
        logits = model(batch.input_ids.view(rows, size)).logits.view(rows * size, V)
        return SimpleNamespace(logits_output=SimpleNamespace(full_logits=logits), can_run_graph=0)

    config = SimpleNamespace(block_size=size, mask_id=mask, algorithm_config=options)
    algorithm(config).run(SimpleNamespace(forward=forward), batch)
    recorder = Recorder(name, source=source, codebase="sgl-project/sglang", mask_token_id=mask,
                        function=f"dllm/algorithm {algorithm.__name__}.run", rule=rule, dtype=dtype,
                        note=note,
                        **({"commit": commit} if commit else {}))  # fmt: skip
    states = [tokens for tokens, _ in model.calls] + [x.numpy()]
    joint = algorithm.__name__ == "JointThreshold"
    for s, (_, logits) in enumerate(model.calls):
        if joint or (states[s] == mask).any():  # not the last forward pass, which fills a cache
            add(recorder, states[s], states[s + 1], logits=logits, step=s, num_steps=100,
                eligible=~prompt if joint else states[s] == mask,
                num_masked_at_start=np.full(rows, size) - prompt.sum(1))  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    folder = source / "python/sglang/srt/dllm/algorithm"

    def load(file, name):
        return getattr(extract(folder / file, name, DllmAlgorithm=Base), name)

    low = load("low_confidence.py", "LowConfidence")
    rule = {"preset": "threshold", "block_scope": "block", "score_dtype": "logits"}
    record(low, source, "sglang-low-confidence", rule | {"threshold": 0.95}, seed=1, threshold=0.95)
    record(low, source, "sglang-low-confidence-bf16", rule | {"threshold": 0.5}, seed=13, rows=4,
           dtype="bfloat16", sharpness=1.5, threshold=0.5,
           note="a confidence that equals the threshold is not above it")  # fmt: skip
    joint = load("joint_threshold.py", "JointThreshold")
    record(joint, source, "sglang-joint", rule | {"threshold": 0.5}, seed=3, threshold=0.5,
           edit_threshold=0.6)  # fmt: skip
    if (folder / "eb_sampling.py").exists():
        bound = load("eb_sampling.py", "EBSampling")
        rule = {"preset": "threshold", "score": "neg_entropy", "threshold": -0.15,
                "block_scope": "block", "score_dtype": "logits", "ban_mask_token": True}  # fmt: skip
        record(bound, source, "sglang-entropy-bound", rule, seed=4, mask=V - 1, sharpness=1.5,
               gamma=1.2, commit=ENTROPY_BOUND,
               note="class copied by hand from a stored text of that commit, not a checkout")  # fmt: skip


if __name__ == "__main__":
    main()

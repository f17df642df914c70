"""huggingface/diffusers BlockRefinementScheduler (LLaDA2) and EntropyBoundScheduler.

    python tests/golden/record/block_refinement.py --source <checkout>

Block refinement commits every masked position whose confidence is above the threshold, or the
quota's surest where those are fewer; the quota splits the block's length, not its masked positions.
Editing replaces a known token, prompts apart, by a candidate whose probability is above a threshold.
In the uniform mode nothing is masked: positions that are not committed hold random ids, and so are
they after every step of the entropy bound, which keeps no state at all.  Those positions are written
as the mask id V here; what the model saw in their place only shows in the logits.
"""

import math
import sys
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, source_argument, write_loop
from text import Model, add, extract

V, MASK, N, B, T = 24, 24, 16, 2, 5
SCHEDULERS = "src/diffusers/schedulers"
RULE = {"count": "quota", "count_base": "block", "score": "prob", "sample_temperature": 0.0}


def scheduler(source, file, name, *methods, **config):
    """An object with the named methods of a scheduler class."""
    own = SimpleNamespace(config=SimpleNamespace(**config), num_inference_steps=T, _committed=None)
    found = extract(source / SCHEDULERS / file, *(f"{name}.{m}" for m in methods), math=math,
                    **{name: own, f"{name}Output": SimpleNamespace})  # fmt: skip
    for method, function in vars(found).items():
        static = isinstance(function, staticmethod)
        setattr(own, method, function.__func__ if static else function.__get__(own))
    return own


def record(source, name, seed, rule, *, uniform=False, prompt=0, bound=None, steps=T, **options):
    """Call `step` until the end and write one file."""
    if bound is None:
        own = scheduler(source, "scheduling_block_refinement.py", "BlockRefinementScheduler",
                        "get_num_transfer_tokens", "_top_p_filtering", "_top_k_filtering",
                        "_sample_from_logits", "step", minimal_topk=1, editing_threshold=None)  # fmt: skip
        own._transfer_schedule = own.get_num_transfer_tokens(N, T)
    else:
        own = scheduler(source, "scheduling_entropy_bound.py", "EntropyBoundScheduler",
                        "_sample_from_logits", "step", entropy_bound=bound, t_max=0.8, t_min=0.4)  # fmt: skip
    stub, rng = Stub(V, N, V + 1, seed), np.random.default_rng(seed)
    torch.manual_seed(seed)
    free = uniform or bound is not None
    sample = torch.from_numpy(rng.integers(0, V, (B, N))) if free else torch.full((B, N), MASK)
    sample[:, :prompt] = torch.from_numpy(rng.integers(0, V, (B, prompt)))
    if prompt:
        sample[1, prompt] = 7  # one more known token, which editing may replace
    if not free:
        options |= {"mask_token_id": MASK, "prompt_mask": torch.arange(N) < prompt}
    shown = torch.full((B, N), MASK) if free else sample
    known = shown != MASK
    edits = "editing_threshold" in options  # all but the prompt
    eligible = np.tile(np.arange(N) >= prompt, (B, 1)) if edits else None
    recorder = Recorder(name, source=source, codebase="huggingface/diffusers", prompt=prompt,
                        function="EntropyBoundScheduler.step" if bound is not None
                        else "BlockRefinementScheduler.step", rule=RULE | rule,
                        mask_token_id=MASK, options={k: v for k, v in options.items() if k != "prompt_mask"},
                        bound=bound)  # fmt: skip
    with TorchNoise(seed) as noise:
        for s in range(steps):
            logits = stub(sample)
            out = own.step(torch.from_numpy(logits.copy()), s, sample, **options)
            sample = out.prev_sample
            if bound is not None:
                after, known = (
                    torch.where(out.accepted_index, sample, MASK),
                    torch.zeros(B, N, dtype=bool),
                )
            else:
                known = known | out.transfer_index
                after = torch.where(known, sample, MASK) if uniform else sample
            token = noise.kept.pop()[1].reshape(B, N, V) if noise.kept else None
            add(recorder, shown.numpy(), after.numpy(), logits=logits, step=min(s, T - 1), num_steps=T,
                token_gumbel=token, eligible=eligible)  # fmt: skip
            shown = torch.where(known, after, MASK)
    recorder.write()


class Module(torch.nn.Module):
    """The stub as pipelines want it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, model):
        super().__init__()
        self.run = model

    def forward(self, ids, **_):
        return self.run(ids)


def record_loop(source, name, seed, rule, *, prompt, size=8, steps=4, **options):
    """Run the whole LLaDA2Pipeline on prompts that end inside a block and write one file."""
    sys.path.insert(0, str(source / "src"))
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    length = 3 * size
    calls_of = Model(Stub(V, length, V + 1, seed))
    model = Module(calls_of)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, V, (B, prompt)))
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(editing_threshold=None))
    pipe.set_progress_bar_config(disable=True)
    with TorchNoise(seed) as noise:
        out = pipe(input_ids=ids, gen_length=length - prompt, block_length=size,
                   eos_early_stop=False, editing_threshold=None, num_inference_steps=steps,
                   mask_token_id=MASK,
                   output_type="seq", **options)  # fmt: skip
    before = np.full((B, length), MASK)
    before[:, :prompt] = ids
    calls = []
    for i, (tokens, logits) in enumerate(calls_of.calls):
        start = tokens.shape[1] - size
        if not (tokens[:, start:] == MASK).any():
            continue  # upstream looks once more at a block that is done
        call = {"tokens": tokens[:, start:], "logits": logits[:, start:], "start": start}
        if noise.kept:
            call["token_gumbel"] = noise.kept[i][1].reshape(B, size, V).astype(np.float32)
        calls.append(call)
    recorder = Recorder(name, source=source, codebase="huggingface/diffusers", mask_token_id=MASK,
                        function="LLaDA2Pipeline.__call__", rule=rule | {"layout": "loop"})  # fmt: skip
    write_loop(recorder, calls, prompt=before, final=np.concatenate([ids, out.sequences], 1),
               block_length=size, num_steps=steps, first=prompt // size * size)  # fmt: skip


def main():
    source = source_argument()
    drawn = {"sample_temperature": 0.8, "filters": ["temperature", "top_k", "top_p"], "top_k": 10,
             "top_p": 0.9, "score_temperature": None, "score_filtered": True}  # fmt: skip
    record(source, "llada2", 1, {"threshold": 0.4}, prompt=3, threshold=0.4)
    record(source, "llada2-quota", 2, {"threshold": 1.0}, threshold=1.0)
    record(source, "llada2-drawn", 3, drawn | {"threshold": 0.6}, threshold=0.6, temperature=0.8,
           top_k=10, top_p=0.9)  # fmt: skip
    record(source, "llada2-edit", 4, {"threshold": 0.5}, prompt=3, threshold=0.5, editing_threshold=0.3,
           steps=7)  # fmt: skip
    record(source, "block-refinement-uniform", 5, {"threshold": 0.6, "sample_temperature": 0.7,
           "score_temperature": None}, uniform=True, threshold=0.6, temperature=0.7)  # fmt: skip
    loop = {"preset": "llada2", "threshold": 0.9}
    record_loop(source, "loop-llada2", 7, loop, prompt=5, threshold=0.9)
    record_loop(source, "loop-llada2-long", 8, loop | {"threshold": 1.0}, prompt=11, steps=2,
                threshold=1.0)  # fmt: skip
    record_loop(source, "loop-llada2-drawn", 9, loop | {"sample_temperature": 0.7,
                "score_temperature": None, "score_filtered": True}, prompt=6, threshold=0.9,
                temperature=0.7)  # fmt: skip
    record(source, "entropy-bound", 6, {"sample_temperature": 0.8, "score": "neg_entropy",
           "score_temperature": None}, bound=0.5)  # fmt: skip


if __name__ == "__main__":
    main()

"""huggingface/diffusers: `AmusedScheduler.step`, as its three pipelines call it.

    python tests/golden/record/amused.py --source <checkout>

The logits go in as (B, V, H, W) and are kept as (B, N, V).  A start within the schedule is what the
image-to-image pipeline does (after `add_noise`), `starting_mask_ratio` what inpainting does: there
the count is floor(N s gamma), which is floor(U0 gamma) exactly where N is a power of two.  In half
precision the draw and the score see probabilities that were rounded to the dtype of the logits, and
the noise on the score is computed in it.  Guidance is the pipeline's: its own branch mixes.
"""

import inspect
import sys
from types import SimpleNamespace

import numpy as np
import torch
from common import Recorder, Stub, TorchNoise, bits_of, source_argument
from image import kept
from text import add, branch, load

V, SIDE, MASK = 24, 4, 30
N = SIDE * SIDE


def register_to_config(init):
    """What diffusers' decorator is needed for: the arguments as `self.config`."""

    def wrapped(self, *args, **named):
        bound = inspect.signature(init).bind(self, *args, **named)
        bound.apply_defaults()
        self.config = SimpleNamespace(**bound.arguments)
        init(self, *args, **named)

    return wrapped


def scheduler_module(path):
    """The scheduler's file with stand-ins for the rest of diffusers."""
    parts = {
        "diffusers": {}, "diffusers.schedulers": {},
        "diffusers.configuration_utils": {"ConfigMixin": type("ConfigMixin", (), {}),
                                          "register_to_config": register_to_config},
        "diffusers.utils": {"BaseOutput": object},
        "diffusers.schedulers.scheduling_utils": {"SchedulerMixin": type("SchedulerMixin", (), {})},
    }  # fmt: skip
    sys.modules.update({name: SimpleNamespace(**names) for name, names in parts.items()})
    return load(path, "diffusers.schedulers.upstream")


def record(code, make, source, name, rule, *, codebase, function, known, seed, steps=6, first=0,
           temperature=(2, 0), ratio=1.0, dtype="float32", schedule="cosine",
           guide=None, scale=None):  # fmt: skip
    """Run a scheduler from step `first` on; `known` tokens are given, one entry per row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (len(known), N))
    scheduler = make(MASK, schedule)
    scheduler.set_timesteps(steps, temperature)
    bits = bits_of(dtype) if guide or dtype == "float32" else 5
    stubs = [Stub(V, N, MASK + 1, seed + i, bits) for i in range(2)]
    recorder = Recorder(name, source=source, codebase=codebase, function=function, rule=rule,
                        mask_token_id=MASK, dtype=dtype, guidance_scale=scale)  # fmt: skip
    with TorchNoise(seed, coarse=bool(guide)) as noise, kept(code, "gumbel_noise") as gumbels:
        for row, given in zip(tokens, known, strict=True):
            row[rng.choice(N, N - given, replace=False)] = MASK
        state = torch.from_numpy(tokens).reshape(-1, SIDE, SIDE)
        if first:
            state = scheduler.add_noise(state, scheduler.timesteps[first - 1])
        start = (state == MASK).sum((1, 2))
        for s, timestep in list(enumerate(scheduler.timesteps))[first:]:
            noise.kept.clear()
            before = state.reshape(-1, N)
            logits, uncond = (stub(before) for stub in stubs)
            both = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in (uncond, logits)]
            given = (guide(torch.cat(both), scale) if guide else both[1]).transpose(1, 2)
            out = scheduler.step(
                given.reshape(*given.shape[:2], SIDE, SIDE), timestep, state, ratio
            )
            state = out.prev_sample
            choice = gumbels[-1][1].float() if s < steps - 1 else np.zeros(before.shape)
            add(recorder, before, state.reshape(-1, N), candidates=out.pred_original_sample.reshape(-1, N),
                logits=logits, uncond_logits=uncond if guide else None, step=s, num_steps=steps,
                num_masked_at_start=start, token_gumbel=noise.kept[0][1].reshape(logits.shape),
                choice_gumbel=choice)  # fmt: skip
    recorder.write()


def guidance(path, name):
    """What a pipeline makes of the logits of both its passes."""
    mix = branch(path, name, "uncond_logits, cond_logits")
    return lambda both, scale: mix(model_output=both, guidance_scale=scale).model_output


def main():
    source = source_argument()
    code = scheduler_module(source / "src/diffusers/schedulers/scheduling_amused.py")

    def run(name, rule, **options):
        record(code, code.AmusedScheduler, source, name, rule, codebase="huggingface/diffusers",
               function="AmusedScheduler.step", **options)  # fmt: skip

    run("amused", "amused", known=(0, 0, 0), seed=1)
    run("amused-known", "amused", known=(4, 11, 15), seed=2)
    run("amused-from-image", "amused", known=(0, 0, 0), seed=3, steps=8, first=3)
    run("amused-inpaint", {"preset": "amused", "count_base": "masked_at_start"}, known=(5, 5), seed=4,
        ratio=torch.tensor(22) / torch.tensor(32))  # fmt: skip
    run("amused-linear", {"preset": "amused", "schedule": "linear"}, known=(0, 0), seed=5, steps=7,
        schedule="linear")  # fmt: skip
    half = {"preset": "amused", "score_dtype": "logits"}
    run("amused-float16", half, known=(0, 5), seed=6, dtype="float16")
    run("amused-bfloat16", half, known=(0, 5), seed=7, dtype="bfloat16")
    run("amused-bfloat16-draw", half, known=(0, 5), seed=11, dtype="bfloat16")  # rounding decides
    run("amused-bfloat16-score", half, known=(0, 5), seed=32, dtype="bfloat16")
    pipeline = source / "src/diffusers/pipelines/deprecated/amused/pipeline_amused.py"
    run("amused-cfg-bf16", "amused", known=(0, 5), seed=1, dtype="bfloat16", scale=10.0,
        guide=guidance(pipeline, "AmusedPipeline.__call__"))  # fmt: skip


if __name__ == "__main__":
    main()

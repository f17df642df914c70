"""kuleshov-group/remdm `_sample` with its re-masking samplers: cap, rescale, conf, loop, fb.

    python tests/golden/record/remdm.py --source <checkout>

absorbing.py says how the draw with a mask slot becomes ours.  With a(t) = 1 - t, a step from t to s
commits a masked position with probability (a(s) - (1 - sigma) a(t)) / (1 - a(t)), and masks a known
one again with probability sigma.  What decides is `choice_gumbel < -log(-log(probability))` in both
cases.  `scores` of the conf sampler is the state that it carries: minus the probability with which
a token was drawn, in bfloat16, -inf where masked.  Sequences start all masked: upstream re-masks
known tokens whoever wrote them.  The conf sampler runs in bfloat16, as upstream's model does (in
float32 it raises); seeds are such that its rounding of log p decides nothing.
"""

import numpy as np
import torch
from absorbing import Race, stand_in
from common import Recorder, Stub, TorchNoise, source_argument
from text import add, load

V, MASK, N, ROWS = 20, 19, 12, 2
RULE = {"count": "bernoulli", "score": "random", "ban_mask_token": True, "time_eps": 1e-5}


def record(source, name, *, seed, steps=8, note="", rule=None, **config):
    """Run `_sample` and write one file; `remask` in its meta holds upstream's parameters."""
    dtype = "bfloat16" if name == "remdm-conf" else "float32"
    stub = Stub(V, N, V, seed, bits=8)
    config = {"sampler": name.removesuffix("-nucleus"), "nucleus_p": 1.0, "eta": 0.0} | config
    recorder = Recorder(name, source=source, codebase="kuleshov-group/remdm", rule=RULE | (rule or {}),
                        function="_ddpm_caching_update", mask_token_id=MASK, note=note,
                        dtype=dtype, remask=config)  # fmt: skip
    with TorchNoise(seed) as noise:
        race = Race(source / "diffusion.py", noise)
        self = stand_in(source, race, stub, MASK, "_ddpm_caching_update", "_sample", dfm=False,
                        steps=steps, noise_removal=False, dtype=getattr(torch, dtype), **config)  # fmt: skip
        self.sampler, self.noise = "ddpm_cache", load(source / "noise_schedule.py").LogLinearNoise()
        self.config.loader.eval_batch_size, self.config.model.length = ROWS, N
        self._sample_prior = lambda *shape: torch.full(shape, MASK)
        update, confs = self._ddpm_caching_update, []

        def watched(*args, conf, **named):
            confs.append(conf.float().numpy().copy())
            return update(*args, conf=conf, **named)

        self._ddpm_caching_update = watched
        out = self._sample().numpy()
        states = [*self.states, out]
    remasked = 0
    for s in range(steps):
        token, choice = race.gumbels(s, MASK, states[s] == MASK)
        remasked += ((states[s] != MASK) & (states[s + 1] == MASK)).sum()
        add(recorder, states[s], states[s + 1], logits=stub(states[s]), step=s, num_steps=steps,
            num_masked_at_start=np.full(ROWS, N), token_gumbel=token, choice_gumbel=choice,
            scores=confs[s] if "conf" in name else None)  # fmt: skip
    print(f"{name}: {remasked} masked again")
    recorder.write()


def main():
    source = source_argument()
    nucleus = {"filters": ["top_p"], "top_p": 0.9}
    record(source, "remdm-cap", seed=1, eta=0.2)
    record(source, "remdm-cap-nucleus", seed=2, eta=0.2, sampler="remdm-cap", nucleus_p=0.9,
           rule=nucleus)  # fmt: skip
    record(source, "remdm-rescale", seed=3, eta=0.3)
    record(source, "remdm-conf", seed=4)
    record(source, "remdm-loop", seed=5, steps=10, eta=0.2, t_on=0.55, t_off=0.25, alpha_on=0.6)
    record(source, "remdm-forward-backward", seed=6, sampler="forward-backward")


if __name__ == "__main__":
    main()

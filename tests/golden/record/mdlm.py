"""kuleshov-group/mdlm `_sample` (ancestral, SUBS), its two updates, and the semi-autoregressive one.

    python tests/golden/record/mdlm.py --source <checkout>

absorbing.py says how the draw with a mask slot becomes ours.  Step i commits each masked position
with probability 1 - s / t, t = linspace(1, eps, T + 1)[i] and s the next one, at the last step too.
The last file holds only the greedy fill ("noise removal") that follows the last step.
"""

import torch
from absorbing import Race, holes, stand_in
from common import Recorder, Stub, TorchNoise, source_argument
from text import add, load

V, MASK, N = 24, 23, 14
RULE = {"count": "bernoulli", "score": "random", "ban_mask_token": True, "time_eps": 1e-5}
GREEDY = {"sample_temperature": 0.0, "ban_mask_token": True, "last_step": "all"}


def record(source, name, *, sampler, seed, steps=6, eps=1e-5, rows=3, note="", **rule):
    """Run `_sample` and write a file of its steps and one of its last, greedy one."""
    stub = Stub(V, N, V, seed)
    with TorchNoise(seed) as noise:
        race = Race(source / "diffusion.py", noise)
        self = stand_in(source, race, stub, MASK, "_ddpm_update", "_ddpm_caching_update", "_sample",
                        steps=steps, noise_removal=True)  # fmt: skip
        self.sampler, self.noise = sampler, load(source / "noise_schedule.py").LogLinearNoise()
        self.config.loader.eval_batch_size, self.config.model.length = rows, N
        self._sample_prior = lambda *shape: holes(*shape, MASK, seed)
        before_last, forward = [], self.forward
        self.forward = lambda x, sigma: (before_last.append(x.numpy().copy()), forward(x, sigma))[1]
        out = self._sample(eps=eps).numpy()
    function = "_ddpm_update" if sampler == "ddpm" else "_ddpm_caching_update"
    states = [*self.states, before_last[-1]]
    write(source, name, function, RULE | {"time_eps": eps} | rule, race, stub, states, note)
    return stub, states, out


def write(source, name, function, rule, race, stub, states, note="", offset=0, steps=None):
    """One file of the steps between `states`."""
    recorder = Recorder(name, source=source, codebase="kuleshov-group/mdlm", function=function,
                        rule=rule, mask_token_id=MASK, note=note)  # fmt: skip
    for s in range(len(states) - 1):
        token, choice = race.gumbels(s + offset, MASK, states[s] == MASK)
        add(recorder, states[s], states[s + 1], logits=stub(states[s]), step=s,
            num_steps=steps or len(states) - 1, num_masked_at_start=(states[0] == MASK).sum(1),
            token_gumbel=token, choice_gumbel=choice)  # fmt: skip
    recorder.write()


def greedy(source, name, stub, before, after):
    """One file of the fill that follows the last step."""
    recorder = Recorder(name, source=source, codebase="kuleshov-group/mdlm", function="_sample",
                        rule=GREEDY, mask_token_id=MASK, note="noise removal alone")  # fmt: skip
    add(recorder, before, after, logits=stub(before), step=0, num_steps=1,
        num_masked_at_start=(before == MASK).sum(1))  # fmt: skip
    recorder.write()


def semi_ar(source, seed, steps=5, stride=4, strides=2, rows=2):
    """`sample_subs_guidance`: windows whose first tokens are the last ones of the window before."""
    stub = Stub(V, N, V, seed)
    with TorchNoise(seed) as noise:
        race = Race(source / "diffusion.py", noise)
        self = stand_in(source, race, stub, MASK, "_ddpm_caching_update", "sample_subs_guidance")
        self.noise, self.config.model.length = (
            load(source / "noise_schedule.py").LogLinearNoise(),
            N,
        )
        self._sample_prior = lambda *shape: torch.full(shape, MASK)
        self.tokenizer = type("T", (), {"eos_token_id": 0, "batch_decode": lambda self, x: x})()
        self.sample_subs_guidance(rows, stride, strides, dt=1 / steps)
    window = self.states[steps + 1 : 2 * steps + 2]  # the second, which starts partly known
    assert (window[0] != MASK).any()
    write(source, "mdlm-semi-ar", "sample_subs_guidance", RULE | {"time_eps": 1e-12}, race, stub,
          window, "the second window; a step at t = 0 that changes nothing is left out",
          offset=steps + 1)  # fmt: skip


def main():
    source = source_argument()
    record(source, "mdlm", sampler="ddpm", seed=1)
    record(source, "mdlm-cache", sampler="ddpm_cache", seed=2, steps=8)
    stub, states, out = record(source, "mdlm-last-step", sampler="ddpm_cache", seed=3, eps=0.3,
                               note="a large eps, so that the last step leaves masks")  # fmt: skip
    greedy(source, "mdlm-noise-removal", stub, states[-1], out)
    semi_ar(source, 4)


if __name__ == "__main__":
    main()

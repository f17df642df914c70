"""google-deepmind/md4 `MD4.sample_step`: ancestral, top-p and two-part steps, and `decode`'s fill.

    python tests/golden/record/md4.py --source <checkout>

A masked position is committed with probability 1 - m(s) / m(t), m(t) = (1 - 2 eps) gamma(1 - t) + eps
with eps = 1e-4 and gamma the rule's schedule; t = (T - i) / T, or the cosine of pi / 2 (1 - t) on the
cosine grid.  The draw with a mask slot becomes ours as absorbing.py says.  Left-over masks are filled
greedily at the end (`md4-decode`).
"""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from absorbing import event, holes
from common import Recorder, Stub, gumbel_of, source_argument
from text import add, extract, load

V, MASK, N, B, T = 20, 20, 16, 3, 6
RULE = {"count": "bernoulli", "score": "random", "time_eps": 1e-5}


class Categorical:
    """Stands in for tfp's: argmax(log p + g), p and g kept."""

    rng, kept = np.random.default_rng(0), []

    def __init__(self, probs=None, logits=None):
        given = jax.nn.softmax(logits) if probs is None else probs
        self.p = np.asarray(given, np.float64)

    def sample(self, seed):
        g = self.rng.gumbel(size=self.p.shape)
        self.kept.append((self.p, g))
        with np.errstate(divide="ignore"):
            return jnp.asarray((np.log(self.p) + g).argmax(-1))

    def mode(self):
        return jnp.asarray(self.p.argmax(-1))


def bernoulli(key, p, shape):
    """Stands in for jax.random's: u < p with kept u."""
    u = Categorical.rng.uniform(1e-6, 1 - 1e-6, shape)
    Categorical.kept.append(u)
    return jnp.asarray(u < np.asarray(p))


def record(source, name, seed, step="ancestral_sample_step", *, schedule="linear", grid="uniform",
           top_p=None):  # fmt: skip
    """Run T steps and write one file; returns the state that `decode` then gets."""
    tfd = SimpleNamespace(Categorical=Categorical, Independent=lambda d, _: d)
    scope = {"jax": jax, "jnp": jnp, "math": math, "tfd": tfd,
             "nn": SimpleNamespace(Module=object, softmax=jax.nn.softmax)}  # fmt: skip
    methods = ("get_sampling_grid", step, "decode")
    found = extract(source / "md4/models/diffusion/md4.py", "MaskingSchedule",
                    *(f"MD4.{m}" for m in methods), **scope,
                    binary_search=load(source / "md4/binary_search.py"))  # fmt: skip
    stub, logits = Stub(V, N, V + 1, seed), []

    def predict_x(z, t, cond=None):
        logits.append(stub(z))
        return jnp.asarray(logits[-1]), None

    noise_schedule = found.MaskingSchedule()
    noise_schedule.schedule_fn_type = schedule
    self = SimpleNamespace(noise_schedule=noise_schedule, sampling_grid=grid, vocab_size=V,
                           predict_x=predict_x, get_cond_embedding=lambda _: None)  # fmt: skip
    self.get_sampling_grid = found.get_sampling_grid.__get__(self)
    Categorical.rng, Categorical.kept = np.random.default_rng(seed), []
    rule = RULE | {"schedule": schedule.replace("poly", "pow")}
    if top_p:
        rule |= {"filters": ["top_p"], "top_p": top_p}
    recorder = Recorder(name, source=source, codebase="google-deepmind/md4", function=f"MD4.{step}",
                        rule=rule, mask_token_id=MASK, grid=grid)  # fmt: skip
    x = holes(B, N, MASK, seed).numpy()
    first, extra = (x == MASK).sum(1), {"topp": top_p} if top_p else {}
    update = functools.partial(getattr(found, step), self, jax.random.key(0))
    for i in range(T):
        after = np.asarray(update(i, T, jnp.asarray(x), **extra))
        if step == "mean_sample_step":
            (_, token), choice = Categorical.kept[-2], gumbel_of(Categorical.kept[-1])
        else:
            q, token = Categorical.kept[-1]
            token, choice = token[..., :V], event(q, token, MASK)
        add(recorder, x, after, logits=logits[-1], step=i, num_steps=T, num_masked_at_start=first,
            token_gumbel=token, choice_gumbel=choice)  # fmt: skip
        x = after
    recorder.write()
    return found.decode, self, logits


def main():
    source = source_argument()
    jax.random.bernoulli = bernoulli
    decode, self, logits = record(source, "md4", 1)
    record(source, "md4-cosine", 2, schedule="cosine")
    record(source, "md4-grid", 3, grid="cosine")
    record(source, "md4-top-p", 4, "topp_sample_step", grid="cosine", top_p=0.8)
    record(source, "md4-two-part", 5, "mean_sample_step", schedule="poly2")
    x = holes(B, N, MASK, 6).numpy()
    out = np.asarray(decode(self, jnp.asarray(x)))
    recorder = Recorder("md4-decode", source=source, codebase="google-deepmind/md4", function="MD4.decode",
                        rule={"sample_temperature": 0.0, "last_step": "all"}, mask_token_id=MASK)  # fmt: skip
    add(recorder, x, out, logits=logits[-1], step=0, num_steps=1,
        num_masked_at_start=(x == MASK).sum(1))  # fmt: skip
    recorder.write()


if __name__ == "__main__":
    main()

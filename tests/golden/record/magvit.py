"""google-research/magvit: `parallel_decode.decode` with its masks, conditions and blocks.

    python tests/golden/record/magvit.py --source <checkout>

A position is masked (-1) where upstream's unknown mask says so; in the mode cond->input the model
sees the token of a condition there, and such positions are drawn and masked like all others, so the
tokens kept here are -1 too.  In cond->cond conditions are never masked.  With blocks `scores` is
what decides: the noised scores, pooled over all block offsets, plus 0.001 u.  The noise of a slot of
top-k goes to the token in it.
"""

import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from common import Recorder, Stub, source_argument
from flax_free import JaxNoise, fake_flax, keep_states
from image import kept
from text import add, load

SHAPE, V, MASK = (2, 3, 4), 20, -1
N = 24
RULE = {"cut": "inclusive", "choice_temperature": 4.5}


def record(code, source, name, rule, *, seed, mode=None, block=None, steps=6, temperature=4.5,
           schedule="cosine", **sampling):  # fmt: skip
    """Decode two videos, with conditions of different sizes if `mode` says so; write one file."""
    rng, rows = np.random.default_rng(seed), 2
    batch = {"inputs": jnp.zeros((rows, *SHAPE), jnp.int32)}
    if mode:
        batch["cond_inputs"] = jnp.asarray(rng.integers(0, V, (rows, *SHAPE)))
        shares = np.array([0.2, 0.6])[:, None, None, None]
        batch["cond_mask"] = jnp.asarray(rng.random((rows, *SHAPE)) < shares)
    masks, stub, logits = code.mask_utils, Stub(V, N, V + 1, seed), []
    mask_fn = masks.random_block_mask if block else masks.random_mask
    options = {"condition_mode": mode} | ({"block_shape": block} if block else {})

    def mask(tokens, *args, **named):
        return mask_fn(batch | {"inputs": tokens}, *args, **options, **named)

    def model(tokens, *_):
        logits.append(stub(np.asarray(tokens).reshape(rows, N)))
        return jnp.asarray(logits[-1]).reshape(rows, *SHAPE, V)

    states = keep_states(code.parallel_decode)
    with JaxNoise() as noise, kept(jax.lax, "top_k") as tops, jax.disable_jit():
        pooled, random_mask = [], masks.random_mask
        masks.random_mask = lambda *a, **k: pooled.append(k["mask_score"]) or random_mask(*a, **k)
        final = code.parallel_decode.decode(
            batch["inputs"], model, mask, jax.random.PRNGKey(seed), steps,
            mask_temperature=temperature, mask_scheduling_method=schedule, **sampling)  # fmt: skip
        masks.random_mask = random_mask
    recorder = Recorder(name, source=source, codebase="google-research/magvit", mask_token_id=MASK,
                        function="parallel_decode.decode", rule=RULE | rule)  # fmt: skip
    sequences = [np.where(x.unknown_mask, MASK, x.masked_tokens).reshape(rows, N) for x in states]
    for s in range(steps):
        token = noise.token[s].reshape(rows, N, -1)
        if tops:
            wide = np.zeros((rows, N, V), np.float32)
            np.put_along_axis(wide, np.asarray(tops[s][1][1]).reshape(token.shape), token, -1)
            token = wide
        add(recorder, sequences[s], sequences[s + 1], step=s, num_steps=steps, logits=logits[s],
            candidates=states[s + 1].full_tokens.reshape(rows, N), token_gumbel=token,
            choice_gumbel=noise.choice[s].reshape(rows, N) if not block else None,
            scores=np.where(states[s].unknown_mask, pooled[s + 1], 0).reshape(rows, N) if block else None,
            num_masked_at_start=(sequences[0] == MASK).sum(1))  # fmt: skip
    assert (states[-1].full_tokens == final).all()
    recorder.write()


def main():
    source = source_argument()
    fake_flax()
    package = sys.modules["videogvt"] = ModuleType("videogvt")
    package.train_lib = sys.modules["videogvt.train_lib"] = ModuleType("videogvt.train_lib")
    for name in ("mask_schedule", "sampling", "mask_utils", "parallel_decode"):
        module = load(source / f"videogvt/train_lib/{name}.py", f"videogvt.train_lib.{name}")
        setattr(package.train_lib, name, module)
    code = package.train_lib

    def run(*args, **options):
        record(code, source, *args, **options)

    run("magvit", {}, seed=1)
    run("magvit-top-k", {"filters": ["top_k"], "top_k": 6, "sample_temperature": 1.5}, seed=2,
        mode="cond->input", sampling_topk=6, sampling_temperature=1.5)  # fmt: skip
    run("magvit-top-p", {"filters": ["top_p", "temperature"], "top_p": 0.8, "sample_temperature": 0.7,
        "schedule": "pow2"}, seed=3, mode="cond->cond", sampling_topp=0.8, sampling_temperature=0.7,
        schedule="pow2")  # fmt: skip
    given = {"score": "given", "choice_temperature": 0.0}
    run("magvit-block", given, seed=4, mode="cond->input", block=(2, 1, 2), temperature=1.0)


if __name__ == "__main__":
    main()

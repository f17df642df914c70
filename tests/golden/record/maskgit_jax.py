"""google-research/maskgit: `parallel_decode.decode`, with jax's own random numbers.

    python tests/golden/record/maskgit_jax.py --source <checkout>

The mask token is -1, as upstream calls it.  What upstream returns are the candidates of all steps.
"""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from common import Recorder, Stub, source_argument
from flax_free import JaxNoise, fake_flax, keep_states
from text import load

V, N, MASK = 24, 16, -1


def record(code, source, name, rule, *, known, steps, seed, schedule="cosine", temperature=4.5,
           length=N):  # fmt: skip
    """Decode sequences of which `known` tokens are given, one entry per row."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(known), length), MASK)
    for row, given in zip(tokens, known, strict=True):
        row[rng.choice(length, given, replace=False)] = rng.integers(0, V, given)
    stub, logits, states = Stub(V, length, V + 1, seed), [], keep_states(code)

    def model(ids):
        logits.append(stub(ids))
        return jnp.asarray(logits[-1])

    with JaxNoise() as noise, jax.disable_jit():
        final = code.decode(jnp.asarray(tokens), jax.random.PRNGKey(seed), model, MASK, steps,
                            choice_temperature=temperature, mask_scheduling_method=schedule)  # fmt: skip
    recorder = Recorder(name, source=source, codebase="google-research/maskgit", rule=rule,
                        function="parallel_decode.decode", mask_token_id=MASK)  # fmt: skip
    for s in range(steps):
        recorder.step(tokens=states[s].cur_seqs, expected=states[s + 1].cur_seqs, step=s,
                      candidates=final[:, s], logits=logits[s], num_steps=steps,
                      token_gumbel=noise.token[s], choice_gumbel=noise.choice[s],
                      num_masked_at_start=(tokens == MASK).sum(1))  # fmt: skip
    recorder.write()


def main():
    source = source_argument()
    fake_flax()
    schedule = load(source / "maskgit/libml/mask_schedule.py")
    sys.modules["maskgit.libml"] = SimpleNamespace(mask_schedule=schedule)
    sys.modules["maskgit"] = SimpleNamespace(libml=sys.modules["maskgit.libml"])

    def run(*args, **options):
        record(load(source / "maskgit/libml/parallel_decode.py"), source, *args, **options)

    run("maskgit", "maskgit", known=(0, 0), steps=8, seed=1)
    run("maskgit-known", "maskgit", known=(3, 9, 15, 16), steps=6, seed=2)
    # With one token theirs reads the cut behind the end of the row, gets NaN, and masks nothing.
    run("maskgit-one-token", {"preset": "maskgit", "clamps": ["commit_one"]}, known=(0, 0, 1),
        steps=5, seed=4, length=1)  # fmt: skip
    for kind, ours in (("uniform", "linear"), ("pow2.5", "pow2.5"), ("log", "log"), ("exp", "exp")):
        run(f"maskgit-{ours}", {"preset": "maskgit", "schedule": ours, "choice_temperature": 1.0},
            known=(0, 5), steps=7, seed=3, schedule=kind, temperature=1.0)  # fmt: skip


if __name__ == "__main__":
    main()

"""The adapter for MaskGIT in JAX: the tokens of recorded runs come back from their key alone."""

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import on_toy, patch_toy

import maskgit
from maskgit import adapters

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from maskgit.adapters import maskgit_jax  # noqa: E402

B, N, V, STEPS = 2, 16, 24, 5
GOLDEN = {  # the seed of the key, the temperature and the schedule that they were called with
    "maskgit": (1, 4.5, "cosine"),
    "maskgit-one-token": (4, 4.5, "cosine"),
    "maskgit-linear": (3, 1.0, "uniform"),
    "maskgit-log": (3, 1.0, "log"),
    "maskgit-exp": (3, 1.0, "exp"),
    "maskgit-pow2.5": (3, 1.0, "pow2.5"),
}
TABLE = np.random.default_rng(0).normal(size=(V + 1, N, V)).astype(np.float32) * 2


def logits_of(x):
    here = jnp.asarray(TABLE)[x % (V + 1), jnp.arange(N)]
    return here + 0.5 * jnp.roll(here, 1, axis=1)


def decode(
    inputs, rng, tokens_to_logits, mask_token_id=-1, num_iter=12, start_iter=0,
    choice_temperature=1.0, mask_scheduling_method="cosine",
):  # fmt: skip
    """Their loop said again in NumPy, for the cosine; the noise is jax's."""
    x, seen = np.array(inputs), []
    start = (x == mask_token_id).sum(1)
    for step in range(start_iter, num_iter):
        masked, done = x == mask_token_id, (step + 1) / num_iter
        logits = np.asarray(tokens_to_logits(jnp.asarray(x)), np.float64)
        rng, key = jax.random.split(rng)
        token = np.asarray(jax.random.gumbel(key, logits.shape))
        rng, key = jax.random.split(rng)
        choice = np.asarray(jax.random.gumbel(key, x.shape))
        drawn = (logits + token).argmax(-1)
        log_p = np.take_along_axis(logits, drawn[..., None], -1)[..., 0]
        log_p -= np.log(np.exp(logits).sum(-1))
        key = log_p + choice_temperature * (1 - done) * choice
        filled = np.where(masked, drawn, x)
        seen.append(filled)
        stay = np.floor(start * max(math.cos(math.pi / 2 * done), 1e-6))
        stay = np.maximum(np.minimum(masked.sum(1) - 1, stay), 1)
        rank = np.where(masked, key, np.inf).argsort(1).argsort(1)
        x = np.where(masked & (rank < stay[:, None]), mask_token_id, filled)
    return np.stack([np.array(inputs)] * start_iter + seen, axis=1)


def module():
    out = ModuleType("parallel_decode")
    out.decode, out.State = decode, type("State", (), {})
    out.mask_by_random_topk = out.state_init = lambda: None
    return out


def inputs(known=3):
    x = np.full((B, N), -1)
    x[1, :known] = 5
    return jnp.asarray(x)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_same_key_gives_what_the_codebase_itself_gave(name):
    seed, temperature, schedule = GOLDEN[name]
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        golden, calls = {key: file[key] for key in file.files}, []

    def recorded(x):
        calls.append(np.asarray(x))
        return jnp.asarray(golden["logits"][len(calls) - 1])

    with jax.disable_jit():
        out = maskgit_jax.decode(
            jnp.asarray(golden["tokens"][0]), jax.random.PRNGKey(seed), recorded,
            num_iter=len(golden["step"]), choice_temperature=temperature,
            mask_scheduling_method=schedule,
        )  # fmt: skip
    np.testing.assert_array_equal(np.stack(calls), golden["tokens"])
    np.testing.assert_array_equal(out, golden["candidates"].swapaxes(0, 1))


def test_the_tokens_are_those_of_their_loop_patched_and_compiled():
    theirs = module()
    given = {"num_iter": STEPS, "start_iter": 1, "choice_temperature": 4.5}
    key = jax.random.PRNGKey(11)
    expected = theirs.decode(inputs(), key, logits_of, **given)
    with on_toy(theirs) as handle:
        compiled = jax.jit(lambda x, key: theirs.decode(x, key, logits_of, **given))
        np.testing.assert_array_equal(compiled(inputs(), key), expected)
        with jax.disable_jit():
            got = theirs.decode(inputs(), key, logits_of, **given)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.int32
    assert handle.report.calls == 2
    assert "keys of the original" in " ".join(handle.report.notes)


def test_the_fast_draw_repeats_and_keeps_what_is_known():
    theirs = module()
    with on_toy(theirs, fast=True), jax.disable_jit():
        runs = [
            theirs.decode(inputs(), make(seed), logits_of, num_iter=2)
            for make, seed in (
                (jax.random.PRNGKey, 1),
                (jax.random.key, 1),
                (jax.random.PRNGKey, 2),
            )
        ]
        given = theirs.decode(inputs(), None, logits_of, num_iter=2, seeds=[7, 8])
        again = theirs.decode(inputs(), None, logits_of, num_iter=2, seeds=[7, 9])
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any()
    assert (given[0] == again[0]).all()
    assert (given[1] != again[1]).any()
    assert all(((run >= 0) & (run < V)).all() and (run[1, :, :3] == 5).all() for run in runs)


def test_patching_is_undone_and_done_once():
    theirs = module()
    before = dict(vars(theirs))
    with on_toy(theirs) as handle:
        assert handle.report.adapter == "maskgit_jax"
        with pytest.raises(adapters.AdapterError, match="patched already"):
            patch_toy(theirs)
    assert vars(theirs) == before
    theirs.decode = lambda inputs, rng: None
    before = dict(vars(theirs))
    with pytest.raises(adapters.AdapterError, match="unknown version of decode"):
        patch_toy(theirs)
    assert vars(theirs) == before
    assert not any(maskgit_jax.matches(other) for other in (jax, None, object()))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="backend"):
        patch_toy(module(), backend="none such")
    wrong = {
        "mask_scheduling_method": "square",
        "num_iter": 2.5,
        "start_iter": 1.5,
        "seeds": [1, 2],
    }
    for name, value in wrong.items():
        with pytest.raises((TypeError, ValueError), match=name):
            maskgit_jax.decode(inputs(), jax.random.key(0), logits_of, **{name: value})
    with pytest.raises(ValueError, match="start_iter: expected an integer >= 0"):
        maskgit_jax.decode(inputs(), jax.random.key(0), logits_of, fast=True, start_iter=-1)
    with pytest.raises(ValueError, match="choice_temperature"):
        maskgit_jax.decode(
            inputs(), jax.random.key(0), logits_of, fast=True, choice_temperature=-1.0
        )


@pytest.mark.parametrize("method", ["uniform", "cosine", "log", "exp", "pow.5", "pow2.5"])
def test_the_schedules_are_theirs(method):
    """Decreasing from 1 to the floor, as `maskgit.gamma` has them, on traced ratios too."""
    ratio = jnp.linspace(0.05, 1.0, 20)
    ours = jax.jit(lambda r: maskgit_jax.schedule(r, 256, method))(ratio)
    name = "linear" if method == "uniform" else method
    np.testing.assert_allclose(ours, maskgit.gamma(np.asarray(ratio), name, 256), atol=1e-6)
    assert float(ours[-1]) == np.float32(1e-6)
    with pytest.raises(ValueError, match="mask_scheduling_method"):
        maskgit_jax.schedule(0.5, 256, "square")


def test_the_temperature_and_the_step_may_be_traced():
    @jax.jit
    def run(temperature, start, key):
        return maskgit_jax.decode(
            inputs(), key, logits_of, num_iter=3, start_iter=start, choice_temperature=temperature
        )

    key = jax.random.key(3)
    for start in (0, 1, 3, 5):
        expected = maskgit_jax.decode(
            inputs(), key, logits_of, num_iter=3, start_iter=start, choice_temperature=4.5
        )
        np.testing.assert_array_equal(run(4.5, start, key), expected)
        steps = maskgit_jax.decode(
            inputs(),
            key,
            logits_of,
            num_iter=3,
            start_iter=start,
            choice_temperature=4.5,
            fast=True,
        )
        known = min(start, 3)  # from the end on there is nothing left to do
        np.testing.assert_array_equal(steps[:, :known], expected[:, :known])
    assert "while" in run.lower(4.5, 0, key).as_text()

"""jax's own switches and PRNG implementations: each step is what it is without them."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS
from maskgit.kernels.decode_step.rule.plan import resolve

import maskgit
from maskgit import StepNoise, StepRule

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

HERE = [name for name in ("cpp", "jax") if name in BACKENDS]
RULES = ["maskgit", "titok", "llada", "dream-entropy", "dream-margin", "mdlm", "factor", "sdar"]
SWITCHES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "host to device": lambda: jax.transfer_guard_host_to_device("disallow"),
    "no jit": jax.disable_jit,
}


def arguments() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, 8, 50)).astype(np.float32) * 3
    logits[0, 0], logits[1, 1, 3], logits[2, 2, 4] = -np.inf, np.nan, np.inf
    tokens = np.where(rng.random((3, 8)) < 0.8, 50, 1).astype(np.int32)
    return {
        "logits": jnp.asarray(logits),
        "tokens": jnp.asarray(tokens),
        "seeds": jnp.asarray(np.arange(6, dtype=np.uint32).reshape(3, 2)),
        "num_masked_at_start": jnp.full((3,), 8),
    }


def call(rule: str, backend: str, given: dict[str, Any], **more: Any) -> Any:
    return maskgit.decode_step(
        **given, rule=rule, mask_token_id=50, step=1, num_steps=4, backend=backend, **more
    )


def same(a: Any, b: Any) -> None:
    for x, y in zip(a[:2], b[:2], strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    np.testing.assert_allclose(np.asarray(a[2]), np.asarray(b[2]), rtol=1e-5)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("backend", HERE)
def test_every_switch(backend: str, switch: str) -> None:
    rules = RULES if backend == "cpp" else RULES[:1] + RULES[3:5]
    given = arguments()
    for rule in rules:
        wanted = call(rule, backend, given)
        with SWITCHES[switch]():
            same(wanted, call(rule, backend, given))


@pytest.mark.parametrize(
    "switch", ["rank_promotion", "dtype_promotion", "debug_nans", "debug_infs"]
)
@pytest.mark.parametrize("rule", ["maskgit", "random", "mdlm", "llada-fp64"])
def test_every_switch_for_the_other_ops(rule: str, switch: str) -> None:
    given, rng = arguments(), np.random.default_rng(3)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 8, 4), (50, 4)))
    logits, numbers = given.pop("logits"), {"mask_token_id": 50, "step": 1, "num_steps": 4}

    def calls() -> list[Any]:
        out = [maskgit.decode_step_from_hidden(hidden, head, **given, rule=rule, **numbers)]
        candidates = jnp.zeros_like(given["tokens"])
        out.append(maskgit.commit_tokens(candidates, hidden[..., 0], **given, rule=rule, **numbers))
        if rule not in ("random", "mdlm"):
            out.append(maskgit.sample_tokens(logits, rule=rule, seeds=given["seeds"]))
        options: dict[str, Any] = {"mask_token_id": 50, "num_steps": 2, "seeds": jnp.arange(3)}
        whole = jnp.nan_to_num(logits, neginf=-30.0, posinf=30.0)
        made = maskgit.generate(
            lambda tokens: whole, given["tokens"], rule=rule, record=True, **options
        )
        return [*out, (made.tokens, *made.trajectory.confidence[:1], made.trajectory.entropies[0])]

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wanted = calls()
        with SWITCHES[switch]():
            for a, b in zip(wanted, calls(), strict=True):
                same(a, b)


@pytest.mark.parametrize("backend", HERE)
def test_switches_inside_the_callers_program(backend: str) -> None:
    given = arguments()
    given["logits"] = jnp.nan_to_num(given["logits"], neginf=-30.0, posinf=30.0)
    wanted = call("maskgit", backend, given)
    with contextlib.ExitStack() as stack:
        for name in ("debug_nans", "rank_promotion", "dtype_promotion", "rbg"):
            stack.enter_context(SWITCHES[name]())
        same(wanted, jax.jit(lambda given: call("maskgit", backend, given))(given))


@pytest.mark.parametrize("backend", HERE)
def test_checking_in_a_program(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    whole = given | {"logits": jnp.nan_to_num(given["logits"], neginf=-30.0, posinf=30.0)}
    wanted = call("maskgit", backend, whole)

    def run(given: Any) -> Any:
        return jax.block_until_ready(jax.jit(lambda x: call("maskgit", backend, x))(given))

    monkeypatch.setenv("MASKGIT_CHECK", "1")
    same(wanted, run(whole))
    with pytest.raises(ValueError, match="logits: expected a finite logit in every row"):
        call("maskgit", backend, given)
    with pytest.raises(Exception, match="logits: expected a finite logit in every row"):
        run(given)  # raises at the latest when its results are waited for
    stats = jax.jit(lambda x, s: maskgit.sample_tokens(x, rule="maskgit", seeds=s, backend=backend))
    assert (stats(whole["logits"], given["seeds"]).candidate_tokens >= 0).all()


@pytest.mark.parametrize("backend", HERE)
def test_a_traced_guidance_scale(backend: str) -> None:
    given = arguments()
    uncond = given["logits"] * 0.5

    @jax.jit
    def guided(scale: Any) -> Any:
        return call("maskgit", backend, given, uncond_logits=uncond, guidance_scale=scale)

    for scale in (0.0, 1.5, 3.0):
        wanted = call("maskgit", backend, given, uncond_logits=uncond, guidance_scale=scale)
        same(wanted, guided(scale))
    assert guided._cache_size() == 1


def loops(one: Any, num_steps: int, tokens: Any) -> tuple[Any, Any]:
    """The end of a loop of Python's, and of one inside a program, whose step is traced."""
    told = tokens
    for step in range(num_steps):
        told = one(step, told)
    return told, jax.jit(lambda tokens: jax.lax.fori_loop(0, num_steps, one, tokens))(tokens)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        pytest.param(
            backend, rule, marks=[pytest.mark.slow] if (backend, i > 1) == ("jax", True) else []
        )
        for backend in HERE
        for i, rule in enumerate(RULES)
    ],
)
def test_a_traced_step(backend: str, rule: str) -> None:
    given = arguments()
    tokens, by_step = (
        given.pop("tokens"),
        given["logits"][None] * jnp.arange(1, 4)[:, None, None, None],
    )

    def one(step: Any, tokens: Any) -> Any:
        now = given | {"logits": by_step[step], "tokens": tokens}
        numbers: dict[str, Any] = {"mask_token_id": 50, "step": step, "num_steps": 3}
        return maskgit.decode_step(**now, rule=rule, **numbers, backend=backend).next_tokens

    np.testing.assert_array_equal(*loops(one, 3, tokens))


@pytest.mark.parametrize("backend", HERE)
def test_steps_share_programs(backend: str) -> None:
    """Of a loop as of loops of other lengths: at most one program for its steps, one for the last."""
    from maskgit.kernels.decode_step import dispatch

    rules = [
        "maskgit",
        "llada",
        "titok",
        "mdlm",
        "amused",
        "dream-entropy",
        "factor",
        "llada2-edit",
    ]
    weight = jax.random.normal(jax.random.key(0), (21, 20))
    program = dispatch._jitted("decode_step", {"cpp": "cpp in jax"}.get(backend, backend), None)
    for rule in rules[:: 1 if backend == "cpp" else 3]:
        program.clear_cache()
        for num_steps in (2, 3, 5):
            numbers: dict[str, Any] = {"mask_token_id": 20, "num_steps": num_steps}
            tokens, seeds = jnp.full((2, 8), 20), jnp.array([1, 2])
            maskgit.generate(
                lambda tokens: weight[tokens],
                tokens,
                rule=rule,
                seeds=seeds,
                backend=backend,
                **numbers,
            )
        assert 1 <= program._cache_size() <= 2, rule


@pytest.mark.parametrize("rule", ["maskgit", "titok", "llada"])
def test_a_traced_step_among_a_thousand(rule: str) -> None:
    """As large a program as among ten; the same tokens."""
    given, sizes = arguments(), []
    for num_steps in (10, 1000):

        def one(step: Any, num_steps: int = num_steps) -> Any:
            numbers: dict[str, Any] = {"mask_token_id": 50, "step": step, "num_steps": num_steps}
            return maskgit.decode_step(**given, rule=rule, **numbers, backend="cpp").next_tokens

        traced = jax.jit(one)
        sizes.append(len(str(traced.trace(1).jaxpr.eqns)))
        for step in (0, 1, num_steps // 2, num_steps - 1):
            np.testing.assert_array_equal(traced(step), one(step))
        np.testing.assert_array_equal(traced(num_steps + 7), one(num_steps - 1))
    assert sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32"])
@pytest.mark.parametrize("num_steps", [1, 4, 300])
def test_a_traced_step_of_every_dtype(dtype: str, num_steps: int) -> None:
    given, most = arguments(), int(np.iinfo(dtype).max)

    def one(step: Any) -> Any:
        numbers: dict[str, Any] = {"mask_token_id": 50, "step": step, "num_steps": num_steps}
        return maskgit.decode_step(**given, rule="titok", **numbers, backend="cpp").next_tokens

    traced = jax.jit(one)
    for step in (0, 1, 100, 299, most, int(np.iinfo(dtype).min)):
        if np.iinfo(dtype).min <= step <= most:
            wanted = one(min(max(step, 0), num_steps - 1))
            np.testing.assert_array_equal(traced(np.array(step, dtype)), wanted)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("rule", ["maskgit", "llada-fp64"])
def test_a_traced_step_has_the_dtypes_of_the_step(rule: str, is_wide: bool) -> None:
    given = arguments()
    noise = StepNoise(choice_gumbel=jnp.full((3, 8), -1.0625, jnp.bfloat16))

    def one(step: Any) -> Any:
        numbers: dict[str, Any] = {"mask_token_id": 50, "step": step, "num_steps": 3}
        return maskgit.decode_step(**given, rule=rule, **numbers, noise=noise, backend="jax")

    with jax.enable_x64(is_wide):
        for step in (0, 2):
            traced, wanted = jax.jit(one)(step), one(step)
            assert [a.dtype for a in traced] == [b.dtype for b in wanted]
            same(wanted, traced)


def test_bounds_are_compared_in_float32_with_noise_of_fewer_bits() -> None:
    """MDLM's chance at step 0 of 3: bfloat16(-1.0625) is above it, and next to it."""
    given = arguments()
    bound = resolve(StepRule.preset("mdlm"), 0, 3, (3, 8)).numbers.commit_below
    noise = jnp.asarray(np.nextafter(np.float32(bound), np.float32(9)), jnp.bfloat16)
    for near in (noise, noise + noise * 2.0**-7, noise - noise * 2.0**-7):
        outs = [
            maskgit.decode_step(
                **given, rule="mdlm", mask_token_id=50, step=0, num_steps=3, backend=backend,
                noise=StepNoise(choice_gumbel=jnp.full((3, 8), near)),
            ).next_tokens
            for backend in ("jax", "reference")
        ]  # fmt: skip
        np.testing.assert_array_equal(*outs)


def test_the_step_of_sample_tokens() -> None:
    given = arguments()
    for logits, seeds in (
        (given["logits"], given["seeds"]), (np.asarray(given["logits"]), np.arange(3)),
    ):  # fmt: skip
        wanted = maskgit.sample_tokens(logits, rule="maskgit", seeds=seeds, step=1)
        for step in (np.int64(1), np.array(1), np.uint8(1), jnp.asarray(1)):
            same(wanted, maskgit.sample_tokens(logits, rule="maskgit", seeds=seeds, step=step))
        for bad in (1.0, True, "1", np.array([1])):
            with pytest.raises(TypeError, match="step: expected an integer"):
                maskgit.sample_tokens(logits, rule="maskgit", seeds=seeds, step=bad)
    with pytest.raises(TypeError, match="step: expected an integer"):
        jax.jit(lambda s: maskgit.sample_tokens(given["logits"], rule="llada", step=s))(1)


def test_a_traced_step_of_the_other_ops() -> None:
    given = arguments()
    tokens, rng = given.pop("tokens"), np.random.default_rng(3)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 8, 4), (50, 4)))
    numbers: dict[str, Any] = {"mask_token_id": 50, "num_steps": 3, "num_masked_at_start": 8}
    numbers |= {"seeds": given["seeds"]}

    def from_hidden(step: Any, tokens: Any) -> Any:
        out = maskgit.decode_step_from_hidden(
            hidden, head, tokens, rule="maskgit", step=step, **numbers
        )
        return out.next_tokens

    def commit(step: Any, tokens: Any) -> Any:
        return maskgit.commit_tokens(
            tokens * 0 + step, hidden[..., 0], tokens, rule="amused", step=step, **numbers
        ).next_tokens

    for one in (from_hidden, commit):
        np.testing.assert_array_equal(*loops(one, 3, tokens))


def test_what_a_traced_step_cannot_be() -> None:
    given = arguments()

    def call_at(num_steps: Any) -> Any:
        numbers: dict[str, Any] = {"mask_token_id": 50, "num_steps": num_steps}
        return lambda step: maskgit.decode_step(**given, rule="maskgit", step=step, **numbers)

    whole = call_at(4)(jnp.asarray(2))  # with its value: as an integer
    same(whole, call_at(4)(2))
    for bad in (jnp.asarray(1.0), jnp.asarray(True), jnp.arange(2)):
        for call in (call_at(4), jax.jit(call_at(4))):
            with pytest.raises(TypeError, match="step: expected an integer"):
                call(bad)
    with pytest.raises(ValueError, match="num_steps: expected 1 to 4096 with a traced step"):
        jax.jit(call_at(4097))(1)
    with pytest.raises(TypeError, match="num_steps: expected an integer"):
        jax.jit(lambda n: call_at(n)(0))(4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_that_need_values_say_so_in_a_program(backend: str) -> None:
    given = arguments()
    with pytest.raises(ValueError, match="works on arrays with values"):
        jax.jit(lambda x: call("maskgit", backend, given | {"logits": x}))(given["logits"])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("backend", HERE)
def test_every_kind_of_key(backend: str, kind: str) -> None:
    """A row's tokens hang on its own key: in any batch, in any order, in a program or not."""
    given = arguments()
    keys = jax.random.split(jax.random.key(7, impl=kind), 3)
    given["seeds"] = keys
    whole = call("maskgit", backend, given).candidate_tokens
    words = jax.random.key_data(keys)[:, :2]
    np.testing.assert_array_equal(
        whole, call("maskgit", backend, given | {"seeds": words}).candidate_tokens
    )
    back = {name: x[::-1] for name, x in given.items()}
    jitted = jax.jit(lambda x: call("maskgit", backend, x).candidate_tokens)(back)
    np.testing.assert_array_equal(jitted[::-1], whole)
    for b in range(3):
        one = {name: x[b : b + 1] for name, x in given.items()}
        np.testing.assert_array_equal(
            call("maskgit", backend, one).candidate_tokens, whole[b : b + 1]
        )
    assert len({tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()}) == 3
    with pytest.raises(ValueError, match="seeds: expected shape"):
        call("maskgit", backend, given | {"seeds": keys[:, None]})

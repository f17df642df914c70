"""What a check lets in every backend takes: dtypes of integers, numbers of any library, float64, counts."""

from __future__ import annotations

import copy
import dataclasses
import fractions
import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native

import maskgit
from maskgit import StepRule

torch = pytest.importorskip("torch")

MASK, VOCAB = 40, 40
HERE = [name for name in (*BACKENDS, "reference") if name not in ("triton", "pallas")]
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def problem(kind: str, rule: Any = "maskgit", **changes: Any) -> dict[str, Any]:
    """The arguments of a step, as arrays of a library; `changes` are dtypes of some of them."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 6, VOCAB)).astype(np.float32) * 3
    tokens = np.where(rng.random((2, 6)) < 0.7, MASK, rng.integers(0, VOCAB, (2, 6)))
    arrays: dict[str, Any] = {
        "logits": logits,
        "tokens": tokens,
        "num_masked_at_start": np.array([6, 6]),
        "positions": np.tile(np.arange(6), (2, 1)),
        "seeds": np.array([3, 4]),
    }
    out = {}
    for name, x in arrays.items():
        dtype = changes.get(name, str(x.dtype))
        if kind == "torch":
            out[name] = torch.from_numpy(x.astype(dtype))
        else:
            out[name] = native(x.astype(dtype), kind)
    return out | {"rule": rule, "mask_token_id": MASK, "step": 1, "num_steps": 4}


def same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x).astype(float), np.asarray(y).astype(float))


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        (backend, kind)  # jax's backend is given its own arrays, the others NumPy's and torch's
        for backend in HERE
        for kind in (["jax"] if backend == "jax" else ["numpy", "torch"])
    ],
)
def test_every_dtype_of_integers(backend: str, kind: str) -> None:
    names = ("tokens", "num_masked_at_start", "positions", "seeds")
    wanted = maskgit.decode_step(**problem(kind), backend=backend)
    dtypes = [d for d in INTEGERS if kind != "jax" or not d.endswith("64")]
    for dtype in dtypes if kind != "jax" else dtypes[-2:]:
        given = problem(kind, **dict.fromkeys(names, dtype))
        got = maskgit.decode_step(**given, backend=backend)
        assert got.next_tokens.dtype == given["tokens"].dtype
        same(wanted, got)


def test_counts_and_candidates_of_every_dtype_in_torch() -> None:
    rule = StepRule(count="given", score="given")
    for dtype in INTEGERS:
        kind = getattr(torch, dtype)
        out = maskgit.commit_tokens(
            torch.arange(6).view(1, 6).to(kind), torch.rand(1, 6), torch.full((1, 6), 9).to(kind),
            rule=rule, mask_token_id=9, step=0, num_steps=2,
            num_commit=torch.tensor([4]).to(kind), backend="torch",
        )  # fmt: skip
        assert int((out.next_tokens.long() != 9).sum()) == 4
        assert out.next_tokens.dtype == kind


@pytest.mark.parametrize("backend", HERE)
def test_float64_logits_are_rounded_to_float32(backend: str) -> None:
    kind = kind_for(backend, "float32")
    if kind == "jax":
        import jax

        with jax.enable_x64(True):
            _float64(backend, kind)
    else:
        _float64(backend, kind)


def _float64(backend: str, kind: str) -> None:
    wide = problem(kind, logits="float64")
    uncond = wide["logits"] * 0.5
    for more in ({}, {"uncond_logits": uncond, "guidance_scale": 2.0}):
        got = maskgit.decode_step(**wide, **more, backend=backend)
        narrow = {
            k: v.astype("float32") if kind != "torch" else v.float()
            for k, v in {"logits": wide["logits"], **more}.items()
            if k != "guidance_scale"
        }
        same(maskgit.decode_step(**{**wide, **more, **narrow}, backend=backend), got)
    rows = maskgit.sample_tokens(
        wide["logits"], rule="maskgit", seeds=wide["seeds"], backend=backend
    )
    assert np.isfinite(np.asarray(rows.confidence)).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_float64_hidden_states(kind: str) -> None:
    rng = np.random.default_rng(0)
    given = problem(kind)
    logits = given.pop("logits")
    hidden, weight = rng.normal(size=(2, 6, 8)), rng.normal(size=(VOCAB, 8))
    del logits
    if kind == "torch":
        hidden, weight = torch.from_numpy(hidden), torch.from_numpy(weight)
    out = maskgit.decode_step_from_hidden(hidden, weight, **given)
    whole = maskgit.decode_step(hidden @ weight.T, **given)
    same(whole[:2], out[:2])


SCALES = (
    2, 2.0, np.int64(2), np.int8(2), np.float32(2), np.float64(2), np.array(2.0), np.array(2),
    fractions.Fraction(2),
)  # fmt: skip


@pytest.mark.parametrize("backend", HERE)
def test_a_number_is_a_number(backend: str) -> None:
    kind = kind_for(backend, "float32")
    given = problem(kind)
    uncond = given["logits"] * 0.5
    scales = list(SCALES)
    if kind == "torch":
        scales += [torch.tensor(2.0), torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)]
    if kind == "jax":
        import jax.numpy as jnp

        scales += [jnp.float32(2), jnp.asarray(2)]
    wanted = maskgit.decode_step(**given, uncond_logits=uncond, guidance_scale=2.0, backend=backend)
    for scale in scales:
        got = maskgit.decode_step(
            **given, uncond_logits=uncond, guidance_scale=scale, backend=backend
        )
        same(wanted, got)
    for bad in ("2", None, True, np.bool_(True), float("nan"), float("inf"), np.ones(2), 1j):
        with pytest.raises((TypeError, ValueError), match="guidance_scale: expected"):
            maskgit.decode_step(**given, uncond_logits=uncond, guidance_scale=bad, backend=backend)


@pytest.mark.parametrize("backend", HERE)
def test_guided_logits_that_overflow_are_infinite(backend: str) -> None:
    kind = kind_for(backend, "float32")
    given = problem(kind)
    shape = (2, 6, VOCAB)
    logits, uncond = np.full(shape, 3e38, np.float32), np.full(shape, 1e38, np.float32)
    logits[0, :, 3] = 2e38
    given["logits"], uncond = native(logits, kind), native(uncond, kind)
    for dtype in ("float32", "float64"):
        given["rule"] = StepRule(score_dtype=dtype)
        out = maskgit.decode_step(
            **given, uncond_logits=uncond, guidance_scale=2.0, backend=backend
        )
        masked = np.asarray(given["tokens"]) == MASK
        confidence = np.asarray(out.confidence)
        assert np.isneginf(confidence[1][masked[1]]).all(), "a row of infinities is dead"
        assert np.isfinite(confidence[0][masked[0]]).all()


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_integers_beyond_64_bits(kind: str, number: int) -> None:
    for name in ("mask_token_id", "step", "num_steps"):
        with pytest.raises(ValueError, match=f"{name}: expected a 64-bit integer, got {number}"):
            maskgit.decode_step(**problem(kind) | {name: number})
    given = problem(kind)
    for field in ("vocab_slice", "banned_ids", "score_banned_ids", "top_k"):
        with pytest.raises(ValueError, match=f"StepRule.{field}: expected"):
            StepRule(**{field: True if field == "top_k" else (True, 5)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"step: expected an integer in \[0, 2\^32\)|64-bit"):
        maskgit.sample_tokens(given["logits"], rule="maskgit", seeds=given["seeds"], step=number)


def test_one_program_for_every_guidance_scale() -> None:
    from torch._dynamo.testing import CompileCounter

    given = problem("torch")
    tensors = {k: given.pop(k) for k in ("logits", "tokens", "seeds", "num_masked_at_start")}
    given.pop("positions")

    def call(scale: Any, logits: Any, **more: Any) -> Any:
        return maskgit.decode_step(
            logits, **more, **given, uncond_logits=logits * 0.5, guidance_scale=scale
        )

    for of in (float, torch.tensor, np.float32, np.float64):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(call, fullgraph=True, backend=counter)
        for i in range(12):
            same(call(1 + i / 4, **tensors), compiled(of(1 + i / 4), **tensors))
        assert counter.frame_count <= 2


def each_op(given: dict[str, Any]) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """The public functions as calls of (rule, **numbers), with the numbers that each of them takes."""
    given = dict(given)
    del given["rule"]
    logits = given.pop("logits")
    rows = {"seeds": given["seeds"], "positions": given["positions"]}
    head = logits[0, :5] * 0.03  # (V, D) = (5, VOCAB)
    candidates, scores = given["tokens"] * 0 + 1, logits[..., 0] * 0.2 + 0.5
    both = ("temperature", "threshold")
    return {
        "decode_step": (partial(maskgit.decode_step, logits, **given), both),
        "from_hidden": (partial(maskgit.decode_step_from_hidden, logits, head, **given), both),
        "sample_tokens": (partial(maskgit.sample_tokens, logits, **rows), both[:1]),
        "commit_tokens": (partial(maskgit.commit_tokens, candidates, scores, **given), both[1:]),
    }


@pytest.mark.parametrize("op", ["decode_step", "from_hidden", "sample_tokens", "commit_tokens"])
@pytest.mark.parametrize("backend", HERE)
def test_numbers_in_place_of_the_rules(backend: str, op: str) -> None:
    rule = StepRule(count="threshold", threshold=0.5, score="prob")
    call, names = each_op(problem(kind_for(backend, "float32"), rule))[op]
    outs = []
    for name in names:
        field = {"temperature": "sample_temperature"}.get(name, name)
        for value in (0.2, np.float32(0.75), np.array(1)):
            changed = dataclasses.replace(rule, **{field: float(value)})
            outs.append(call(rule=rule, **{name: value}, backend=backend))
            same(call(rule=changed, backend=backend), outs[-1])
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            call(rule=rule, **{name: "1"}, backend=backend)
    assert any((np.asarray(outs[0][0]) != np.asarray(out[0])).any() for out in outs)


@pytest.mark.parametrize("op", ["decode_step", "from_hidden", "sample_tokens", "commit_tokens"])
def test_one_program_for_every_temperature_and_threshold(op: str) -> None:
    from torch._dynamo.testing import CompileCounter

    rule = StepRule(count="threshold", score="prob")
    call, names = each_op(problem("torch", rule))[op]

    def with_number(number: Any) -> Any:
        return call(rule=rule, **dict.fromkeys(names, number / 4))

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(with_number, fullgraph=True, backend=counter)
    for i in range(12):
        same(with_number(1 + i / 3), compiled(1 + i / 3))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("compiled", [False, True])
def test_small_arguments_beside_tensors(compiled: bool) -> None:
    """Seeds and counts as sequences, NumPy's arrays and numbers, in compiled code as in any other."""
    given = problem("torch")
    logits, tokens = given.pop("logits"), given.pop("tokens")
    for name in ("seeds", "num_masked_at_start", "positions"):
        given.pop(name)

    def call(seeds: Any, counts: Any) -> Any:
        return maskgit.decode_step(logits, tokens, **given, seeds=seeds, num_masked_at_start=counts)

    wanted = call([3, 4], [6, 6])
    words = np.array([[3, 0], [4, 0]], np.uint32)
    seeds = [(3, 4), range(3, 5), np.array([3, 4]), np.array([3, 4], np.uint64), words]
    read_only = np.array([6, 6])
    read_only.flags.writeable = False
    counts = [6, np.int64(6), (6, 6), np.array(6), np.array([6, 6], np.uint8), [np.int64(6), 6]]
    cases = [(s, 6) for s in [*seeds, [np.int64(3), 4]]] + [
        ([3, 4], c) for c in [*counts, read_only]
    ]
    for case in cases:
        torch._dynamo.reset()
        way = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
        same(wanted, way(*case))
    for bad in (np.array([1.5, 2.0]), np.array([True, False]), np.array(["a", "b"])):
        with pytest.raises(TypeError, match="seeds: expected"):
            call(bad, 6)
        with pytest.raises(TypeError, match="num_masked_at_start: expected"):
            call([3, 4], bad)


def test_lists_that_change_under_torch_compile() -> None:
    given = problem("torch", "llada")
    logits, tokens = given.pop("logits"), given.pop("tokens")
    for name in ("seeds", "num_masked_at_start", "positions"):
        given.pop(name)

    def call(logits: Any, tokens: Any, counts: Any) -> Any:
        return maskgit.decode_step(logits, tokens, **given, num_masked_at_start=counts)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    tokens = torch.full_like(tokens, MASK)
    tokens[:, 1:] = 1
    for i in range(1, 7):
        for j in range(1, 7):
            same(call(logits, tokens, [i, j]), compiled(logits, tokens, [i, j]))


def test_lists_under_torch_compile() -> None:
    given = problem("torch")
    for name in ("seeds", "num_masked_at_start", "positions"):
        given.pop(name)
    logits, tokens = given.pop("logits"), given.pop("tokens")

    def call(logits: Any, tokens: Any) -> Any:
        return maskgit.decode_step(
            logits, tokens, **given, seeds=[3, 2**63 + 1], num_masked_at_start=[6, 6]
        )

    same(call(logits, tokens), torch.compile(call, fullgraph=True, backend="eager")(logits, tokens))


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_counts_from_the_start_of_the_loop(kind: str) -> None:
    given = problem(kind)
    given.pop("num_masked_at_start")
    for rule in ("maskgit", "llada", "random", "magvit", "vampnet"):
        given["rule"] = rule
        with pytest.raises(
            ValueError, match=r"num_masked_at_start: expected the .* at step 1, got"
        ):
            maskgit.decode_step(**given)
        maskgit.decode_step(**given | {"step": 0})
        masked = int((np.asarray(given["tokens"]) == MASK).sum(1).max())
        with pytest.raises(ValueError, match=r"num_masked_at_start: expected at least the \d"):
            maskgit.decode_step(**given, num_masked_at_start=masked - 1)
    for rule in ("titok", "factor", "threshold", "mdlm", "dream-entropy", "sdar", "llada2"):
        maskgit.decode_step(**given | {"rule": rule})  # which need none
    for rule in ("sdar", "sdar-dynamic", "llada2", "llada2-edit"):  # more than a block holds
        with pytest.raises(ValueError, match=r"num_masked_at_start: expected at least the \d"):
            maskgit.decode_step(**given | {"rule": rule}, num_masked_at_start=1)


def test_a_base_of_the_block_is_the_block() -> None:
    """Without a block it is N, whatever is masked in it; with one its length."""
    rule = dataclasses.replace(StepRule.preset("sdar"), sample_temperature=0.0)
    logits = np.random.default_rng(0).normal(size=(1, 8, 9)).astype(np.float32)
    tokens = np.array([[1, 1, 1, 1, 9, 9, 9, 9]])
    options = {"rule": rule, "mask_token_id": 9, "num_steps": 4}
    for step in (0, 1):
        out = maskgit.decode_step(logits, tokens, step=step, **options)
        assert (out.next_tokens == 9).sum() == 2
    steps = []
    maskgit.generate(
        lambda t: steps.append((t == 9).sum()) or logits, tokens, block_length=4, prompt_length=0,
        rule=rule, mask_token_id=9, num_steps=8,
    )  # fmt: skip
    assert steps == [4, 3, 2, 1]
    assert maskgit.plan_masked_counts(4, 4, rule, num_positions=8)[:, 0].tolist() == [2, 0, 0, 0]


def test_a_preset_keeps_its_name() -> None:
    preset = StepRule.preset
    for wrong in (
        lambda: StepRule("llada"),
        lambda: StepRule(name="maskgit", cut="exact"),
        lambda: StepRule(name=" LLaDA"),
        lambda: dataclasses.replace(preset("dream-entropy"), name="dream-margin"),
        lambda: dataclasses.replace(preset("maskgit-fixed"), name="maskgit"),
    ):
        with pytest.raises(ValueError, match=r"StepRule\.name: expected a name of its own, got"):
            wrong()
    changed = dataclasses.replace(StepRule.preset("llada"), sample_temperature=0.5)
    assert changed.name == "llada"
    assert len({preset(name).source for name in StepRule.presets()}) == len(StepRule.presets())
    for name in (5, None, ""):
        with pytest.raises(ValueError, match=r"StepRule\.name: expected a name, got"):
            StepRule(name=name)  # type: ignore[arg-type]
    code = "from maskgit import StepRule\ntry:\n StepRule('llada')\nexcept ValueError: print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"  # in a process where nothing has asked for a preset


def test_rules_of_equal_numbers_are_equal() -> None:
    rules = [
        StepRule(sample_temperature=t, top_k=k, filters=["top_k"], banned_ids=(i,))
        for t, k, i in [(2, 3, 4), (2.0, np.int64(3), np.int32(4)), (np.float32(2), 3, 4)]
    ]
    assert len({*rules}) == 1
    assert len({rule.encoded for rule in rules}) == 1
    assert StepRule(threshold=-0.0) == StepRule(threshold=0.0)
    assert hash(StepRule(threshold=-0.0)) == hash(StepRule(threshold=0.0))


def test_a_rule_survives_another_process() -> None:
    rule = dataclasses.replace(StepRule.preset("dream-entropy"), name="mine", threshold=0.125)
    for copied in (copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert copied == rule
        assert hash(copied) == hash(rule)
    code = """
import dataclasses, pickle, sys
from maskgit import StepRule
rule = dataclasses.replace(StepRule.preset("dream-entropy"), name="mine", threshold=0.125)
given = pickle.loads(bytes.fromhex(sys.argv[1]))
assert given == rule and hash(given) == hash(rule) and {rule: 1}[given] == 1
sys.stdout.write(pickle.dumps(given).hex())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, pickle.dumps(rule).hex()], env={"PYTHONHASHSEED": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    back = pickle.loads(bytes.fromhex(done.stdout))
    assert {rule: 1}[back] == 1


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_what_was_let_in_once_is_looked_at_again(backend: str) -> None:
    """Facts about arrays are remembered: one that is another one is refused right after."""
    given = problem("torch")
    floats, whole = given["logits"], given["tokens"]
    changed: dict[str, tuple[Any, str]] = {
        "logits": (floats.clone().requires_grad_(), "logits: decoding has no gradient"),
        "tokens": (whole.float(), "tokens: expected integers, got dtype float32"),
        "seeds": (given["seeds"][:1], r"seeds: expected shape \(2,\)"),
        "positions": (given["positions"].to("meta"), "positions: expected on device cpu"),
        "num_masked_at_start": (torch.tensor([6, 6, 6]), "num_masked_at_start: expected shape"),
        "eligible": (whole, "eligible: expected dtype bool, got int64"),
        "uncond_logits": (floats.half(), "uncond_logits: expected dtype float32 like logits"),
        "mask_token_id": (2**40, "tokens: expected a dtype that holds ids up to"),
        "rule": (StepRule(vocab_slice=(0, VOCAB + 1)), "rule: vocab_slice"),
    }
    given |= {"eligible": whole == MASK, "uncond_logits": floats * 0.5, "guidance_scale": 2.0}
    for _ in range(2):
        maskgit.decode_step(**given, backend=backend)
        for name, (value, message) in changed.items():
            narrow = {"tokens": whole.int()} if name == "mask_token_id" else {}
            with pytest.raises((TypeError, ValueError), match=message):
                maskgit.decode_step(**given | {name: value} | narrow, backend=backend)
    noise = maskgit.StepNoise(choice_gumbel=torch.zeros(2, 6).requires_grad_())
    with pytest.raises(ValueError, match=r"noise\.choice_gumbel: decoding has no gradient"):
        maskgit.decode_step(**given, noise=noise, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_values_are_looked_at_in_every_call(backend: str) -> None:
    given = problem("torch")
    maskgit.decode_step(**given, backend=backend)
    for name, value, at, message in (
        ("tokens", VOCAB + 1, (0, 0), r"tokens: expected ids in \[0, 41\) or the mask token 40, got 41"),
        ("tokens", -1, (1, 5), "tokens: expected ids in .* got -1"),
        ("positions", -1, (0, 3), r"positions: expected values in \[0, 2\^32\)"),
        ("positions", 2**32, (1, 0), r"positions: expected values in \[0, 2\^32\)"),
        ("num_masked_at_start", 7, (1,), "num_masked_at_start: expected counts between 0 and the 6"),
        ("num_masked_at_start", -1, (0,), "num_masked_at_start: expected counts between 0 and the 6"),
        ("num_masked_at_start", 1, (0,), r"num_masked_at_start: expected at least the \d"),
    ):  # fmt: skip
        wrong = given[name].clone()
        wrong[at] = value
        with pytest.raises(ValueError, match=message):
            maskgit.decode_step(**given | {name: wrong}, backend=backend)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", HERE)
def test_dead_rows_are_found_in_every_dtype(backend: str, dtype: str) -> None:
    """`check` looks at the row a second time, whatever it was made into for the first."""
    kind = kind_for(backend, dtype)
    given = problem(kind)
    logits = np.asarray(given["logits"]).copy()
    at = tuple(np.argwhere(np.asarray(given["tokens"]) == MASK)[-1])
    logits[at] = -np.inf
    if kind == "torch":
        given["logits"] = torch.from_numpy(logits).to(getattr(torch, dtype))
    else:
        import ml_dtypes

        given["logits"] = native(logits.astype(getattr(ml_dtypes, dtype, dtype)), kind)
    where = rf"row \(sequence {at[0]}, position {at[1]}\)"
    with pytest.raises(ValueError, match=where):
        maskgit.decode_step(**given, backend=backend, check=True)
    logits[at] = 0.0
    alive = torch.from_numpy(logits) if kind == "torch" else native(logits, kind)
    maskgit.decode_step(**given | {"logits": alive}, backend=backend, check=True)


@pytest.mark.parametrize("backend", HERE)
def test_seeds_of_every_kind_are_the_same_numbers(backend: str) -> None:
    """jax's integers have 32 bits, its keys are no integers: every backend is given the same words."""
    import jax
    import jax.numpy as jnp

    logits = jnp.asarray(problem("numpy")["logits"])
    high = 2**32 - 3
    calls = {
        "keys": {"seeds": jax.random.split(jax.random.key(3), 2)},
        "uint32": {"seeds": jnp.asarray([2**31 + 5, 3], jnp.uint32)},
        "words": {"seeds": jnp.asarray([[2**31 + 5, 2**31], [1, 2]], jnp.uint32)},
        "positions": {"seeds": [1, 2**63], "positions": jnp.full((2, 6), high, jnp.uint32)},
    }
    for name, given in calls.items():
        got = maskgit.sample_tokens(logits, rule="maskgit", **given, backend=backend)
        wanted = maskgit.sample_tokens(logits, rule="maskgit", **given, backend="reference")
        np.testing.assert_array_equal(
            np.asarray(got.candidate_tokens), np.asarray(wanted.candidate_tokens), name
        )


def test_values_are_looked_at_before_they_are_converted() -> None:
    logits, narrow = torch.zeros(2, 4, 10), torch.full((2, 4), 9)
    rest = {"rule": "llada", "mask_token_id": 9, "step": 0, "num_steps": 4}
    with pytest.raises(ValueError, match=r"candidate_tokens: expected ids in \[0, 65535\]"):
        maskgit.commit_tokens(
            torch.full((2, 4), 2**33 + 7), torch.rand(2, 4), narrow.to(torch.uint16), **rest
        )
    wide = narrow.clone()
    wide[0, 0] = -1
    with pytest.raises(ValueError, match="got 18446744073709551615"):
        maskgit.decode_step(logits, wide.view(torch.uint64), **rest)
    for dtype in ("int8", "int16", "int32", "int64"):
        ids = np.full((2, 4), -1, dtype)
        ids[0, 0] = -5
        with pytest.raises(ValueError, match=r"or the mask token -1, got -5"):
            maskgit.decode_step(logits.numpy(), ids, **rest | {"mask_token_id": -1})
    for counts in ([[1], [1, 2]], "ab", [0.5, 1.0]):
        with pytest.raises(TypeError, match="num_masked_at_start: expected integers"):
            maskgit.decode_step(logits.numpy(), narrow.numpy(), **rest, num_masked_at_start=counts)


def check_products_that_overflow(backend: str, tries: int) -> None:
    """u + s (c - u) is formed as if the product had room: here s (c - u) has none, the sum often has."""
    kind, rng = kind_for(backend, "float32"), np.random.default_rng(11)
    rest = {"rule": "maskgit", "mask_token_id": 20, "step": 0, "num_steps": 4, "seeds": [3]}
    saturated = 0
    for _ in range(tries):
        cond, uncond = (rng.normal(size=(2, 1, 4, 20)) * 6e37).astype(np.float32)
        given = {"guidance_scale": float(rng.uniform(1, 10)), **rest}
        arrays = [cond, np.full((1, 4), 20), uncond]
        want = maskgit.decode_step(*arrays[:2], uncond_logits=uncond, backend="reference", **given)
        c, tokens, u = (native(a, kind) for a in arrays)
        got = maskgit.decode_step(c, tokens, uncond_logits=u, backend=backend, **given)
        np.testing.assert_array_equal(
            np.asarray(got.candidate_tokens), np.asarray(want.candidate_tokens)
        )
        with np.errstate(over="ignore"):
            saturated += bool(np.isinf(given["guidance_scale"] * (cond - uncond)).any())
    assert saturated > tries // 4


@pytest.mark.parametrize("backend", HERE)
def test_guided_logits_whose_product_overflows(backend: str) -> None:
    check_products_that_overflow(backend, 12)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 2**200])
def test_seeds_beyond_64_bits(seed: int) -> None:
    for kind in ("numpy", "torch", "jax"):
        logits = problem(kind)["logits"]
        with pytest.raises(ValueError, match="seeds: expected 64-bit integers, got"):
            maskgit.sample_tokens(logits, rule="maskgit", seeds=[1, seed])

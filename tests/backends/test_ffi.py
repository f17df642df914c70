"""The C++ core inside jitted JAX programs on the CPU."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from helpers import CORE, FREE, compare, golden_rule, make_case, native, native_seeds, run  # noqa: E402
from maskgit.kernels.common.backends import serves_jax  # noqa: E402
from test_contract import FIELDS, spoil  # noqa: E402
from test_golden import FILES, meta_of, replay  # noqa: E402

import maskgit  # noqa: E402
from maskgit import StepNoise, StepRule  # noqa: E402

if not serves_jax():
    pytest.skip("the C++ core does not serve jax here", allow_module_level=True)


def step_of(case: Any) -> Any:
    """A jitted step of the case, and its arrays."""

    def step(arrays: dict[str, Any]) -> Any:
        noise = None
        if "token_gumbel" in arrays or "choice_gumbel" in arrays:
            noise = StepNoise(arrays.get("token_gumbel"), arrays.get("choice_gumbel"))
        return maskgit.decode_step(
            arrays["logits"], arrays["tokens"], rule=case.rule, mask_token_id=case.mask_token_id,
            step=case.step, num_steps=case.num_steps, num_masked_at_start=arrays.get("start"),
            seeds=arrays.get("seeds"), noise=noise,
            uncond_logits=arrays.get("uncond"), guidance_scale=case.guidance_scale,
            eligible=arrays.get("eligible"), backend="cpp",
        )  # fmt: skip

    arrays = {
        "logits": native(case.logits, "jax", case.dtype), "tokens": native(case.tokens, "jax"),
        "uncond": native(case.uncond_logits, "jax", case.dtype), "eligible": native(case.eligible, "jax"),
        "seeds": native_seeds(case.seeds, "jax"), "token_gumbel": native(case.token_gumbel, "jax"),
        "choice_gumbel": native(case.choice_gumbel, "jax"),
        "start": native(case.num_masked_at_start, "jax"),
    }  # fmt: skip
    return jax.jit(step), {name: a for name, a in arrays.items() if a is not None}


def check(case: Any) -> None:
    step, arrays = step_of(case)
    got = tuple(np.asarray(a) for a in step(arrays))
    compare(case, run(case, "reference"), got)


@pytest.mark.parametrize("preset", [
    p if p in CORE else pytest.param(p, marks=pytest.mark.slow) for p in FREE
])  # fmt: skip
def test_every_preset(preset: str) -> None:
    rule = StepRule.preset(preset)
    for step, dtype, noise in ((3, "bfloat16", "seeds"), (7, "float16", "injected")):
        guidance = 2.5 if step == 3 else None
        check(make_case(rule, seed=step, dtype=dtype, noise=noise, step=step, guidance=guidance))


@pytest.mark.parametrize(
    "name", ["all-filters", "banned", "score-bans", "slice-ban-mask", "count-sum"]
)
def test_fields_that_bring_arrays_of_their_own(name: str) -> None:
    mask = 20 if "ban-mask" in name else None
    check(make_case(StepRule(name=name, **FIELDS[name]), seed=1, step=1, mask_token_id=mask))


def test_bad_entries_and_uneven_rows() -> None:
    case = spoil(make_case(StepRule.preset("maskgit"), length=40, vocab=150), 5)
    check(case)
    eligible = np.random.default_rng(0).random(case.tokens.shape) < 0.5
    check(dataclasses.replace(case, eligible=eligible))
    check(make_case(StepRule.preset("maskgit"), batch=0))


@pytest.mark.parametrize("function", [
    name if name in ("remdm-conf", "muse-critic", "halton") else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted({p.stem for p in FILES})
])  # fmt: skip
def test_tokens_are_those_of_the_codebase_itself(function: str) -> None:
    path = next(p for p in FILES if p.stem == function)
    meta = meta_of(path)
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    for s in range(0, len(golden["step"]), 2):
        after, _ = replay(golden, meta, golden_rule(path.stem), s, "cpp in jax")
        np.testing.assert_array_equal(after, golden["expected"][s])


def test_the_program_calls_the_core_and_copies_no_logits() -> None:
    case = make_case(StepRule.preset("maskgit"), batch=2, length=64, vocab=1000)
    step, arrays = step_of(case)
    text = step.lower(arrays).compile().as_text()
    assert "maskgit_decode_step" in text
    assert "callback" not in text
    copies = [line for line in text.splitlines() if "f32[2,64,1000]" in line and "copy(" in line]
    assert not copies


def test_auto_takes_it_on_arrays_and_in_traces() -> None:
    case = make_case(StepRule.preset("maskgit"), length=8, vocab=50)
    _, arrays = step_of(case)

    def step(logits: Any, tokens: Any, seeds: Any) -> Any:
        return maskgit.decode_step(
            logits,
            tokens,
            rule="maskgit",
            mask_token_id=case.mask_token_id,
            step=0,
            num_steps=8,
            seeds=seeds,
        )

    given = (arrays["logits"], arrays["tokens"], arrays["seeds"])
    assert "maskgit_decode_step" in jax.jit(step).lower(*given).as_text()
    for a, b in zip(step(*given), jax.jit(step)(*given), strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b)


def test_sequences_are_mapped_one_by_one() -> None:
    case = make_case(StepRule.preset("maskgit"), batch=3, length=8, vocab=50)
    _, arrays = step_of(case)

    def one(logits: Any, tokens: Any, seeds: Any) -> Any:
        return maskgit.sample_tokens(
            logits[None], rule="maskgit", seeds=seeds[None], backend="cpp"
        ).candidate_tokens[0]

    given = (arrays["logits"], arrays["tokens"], arrays["seeds"])
    mapped = jax.vmap(one)(*given)
    alone = np.stack([one(*(a[b] for a in given)) for b in range(3)])
    np.testing.assert_array_equal(mapped, alone)
    assert jnp.issubdtype(mapped.dtype, jnp.integer)


def test_every_type_that_may_come() -> None:
    """Tokens of any integers, 16-bit noise, keys for seeds: what the core reads is converted first."""
    case = make_case(StepRule.preset("maskgit"), length=8, vocab=50, mask_token_id=50, masked=0.7)
    options = {"rule": "maskgit", "mask_token_id": 50, "step": 1, "num_steps": 8, "backend": "cpp"}
    options["num_masked_at_start"] = 8
    logits, words = jnp.asarray(case.logits), native_seeds(case.seeds, "jax")
    wanted = maskgit.decode_step(
        logits, jnp.asarray(case.tokens, jnp.int32), seeds=words, **options
    )
    for kind in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32):
        out = maskgit.decode_step(logits, jnp.asarray(case.tokens, kind), seeds=words, **options)
        assert out.next_tokens.dtype == kind
        np.testing.assert_array_equal(out.next_tokens, wanted.next_tokens)
    shape = case.tokens.shape
    for kind in (jnp.bfloat16, jnp.float16, jnp.float32):
        noise = StepNoise(jnp.ones((*shape, 50), kind), jnp.ones(shape, kind))
        out = maskgit.decode_step(logits, jnp.asarray(case.tokens), noise=noise, **options)
        greedy = np.where(case.tokens == 50, case.logits.argmax(-1), case.tokens)
        np.testing.assert_array_equal(out.candidate_tokens, greedy)
    keys = jax.random.split(jax.random.key(0), len(case.tokens))
    maskgit.decode_step(logits, jnp.asarray(case.tokens), seeds=keys, **options)


@pytest.mark.parametrize("is_traced", [False, True])
def test_the_step_from_hidden_states(is_traced: bool) -> None:
    """Its chunks are drawn at a step with noise on the confidence, which a draw does not have."""
    rng = np.random.default_rng(0)
    hidden, weight = jnp.asarray(rng.normal(size=(2, 5, 8))), jnp.asarray(rng.normal(size=(50, 8)))
    tokens, seeds = jnp.full((2, 5), 50), native_seeds(np.arange(2), "jax")

    def step(hidden: Any, backend: str) -> Any:
        return maskgit.decode_step_from_hidden(
            hidden, weight, tokens, rule="maskgit", mask_token_id=50, step=1, num_steps=4, seeds=seeds,
            num_masked_at_start=5, backend=backend,
        ).next_tokens  # fmt: skip

    got = jax.jit(step, static_argnums=1)(hidden, "cpp") if is_traced else step(hidden, "cpp")
    np.testing.assert_array_equal(got, step(hidden, "jax"))


@pytest.mark.parametrize("backend", ["jax", "cpp"])
def test_rows_without_a_logit_stay_masked_in_tokens_without_a_sign(backend: str) -> None:
    case = make_case(StepRule.preset("maskgit"), length=8, vocab=50, mask_token_id=50, masked=1.0)
    logits = jnp.asarray(case.logits).at[0].set(-jnp.inf)
    out = maskgit.decode_step(
        logits, jnp.asarray(case.tokens, jnp.uint8), rule="maskgit", mask_token_id=50, step=7,
        num_steps=8, seeds=native_seeds(case.seeds, "jax"), num_masked_at_start=8, backend=backend,
    )  # fmt: skip
    assert (np.asarray(out.next_tokens)[0] == 50).all()


LAYOUTS = {  # ours -> XLA's: the fields in their order
    "Extension": ("XLA_FFI_Extension_Base", "struct_size type next"),
    "Buffer": ("XLA_FFI_Buffer", "struct_size dtype data rank dims"),
    "Buffers": ("XLA_FFI_Args", "struct_size size kinds=types each=args"),
    "Attributes": ("XLA_FFI_Attrs", "struct_size size kinds=types names values=attrs"),
    "Text": ("XLA_FFI_ByteSpan", "data=ptr size=len"),
    "Array": ("XLA_FFI_Array", "dtype size data"),
    "Scalar": ("XLA_FFI_Scalar", "dtype value"),
    "Version": ("XLA_FFI_Api_Version", "struct_size major_version minor_version"),
    "NewError": ("XLA_FFI_Error_Create_Args", "struct_size message code=errc"),
    "Api": ("XLA_FFI_Api", "struct_size version=api_version create_error=XLA_FFI_Error_Create"),
    "CallFrame": ("XLA_FFI_CallFrame", "struct_size api stage args rets attributes=attrs"),
    "Metadata": ("XLA_FFI_Metadata", "struct_size version=api_version traits"),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", "metadata"),
}
CONSTANTS = {
    "kMajor": "XLA_FFI_API_MAJOR", "kMetadata": "XLA_FFI_Extension_Metadata",
    "kExecute": "XLA_FFI_ExecutionStage_EXECUTE", "kBuffer": "XLA_FFI_ArgType_BUFFER",
    "kArray": "XLA_FFI_AttrType_ARRAY", "kScalar": "XLA_FFI_AttrType_SCALAR",
    "kString": "XLA_FFI_AttrType_STRING", "kInternal": "XLA_FFI_Error_Code_INTERNAL",
    "kInvalidArgument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
} | {f"int(DataType::{t})": f"XLA_FFI_DataType_{t}"
     for t in ("PRED", "S32", "S64", "U8", "U32", "F16", "F32", "F64", "BF16")}  # fmt: skip


def test_the_layouts_are_those_of_the_installed_jaxlib(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    lines = [
        '#include "xla_ffi.h"',
        '#include "xla/ffi/api/c_api.h"',
        "using namespace maskgit::xla;",
    ]
    for ours, (theirs, fields) in LAYOUTS.items():
        for pair in fields.split():
            own, _, their = pair.partition("=")
            place = f"offsetof({ours}, {own}) == offsetof({theirs}, {their or own})"
            size = f"sizeof({ours}::{own}) == sizeof({theirs}::{their or own})"
            lines.append(f'static_assert({place} && {size}, "{ours}::{own}");')
    lines += [f'static_assert({a} == {b}, "{a}");' for a, b in CONSTANTS.items()]
    lines.append('static_assert(kMinor <= XLA_FFI_API_MINOR, "newer than what XLA reads");')
    source = tmp_path / "layouts.cpp"
    source.write_text("\n".join(lines))
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", "-Icsrc",
         f"-I{jax.ffi.include_dir()}", source],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_a_handler_refuses_is_an_error_of_xla() -> None:
    call = jax.ffi.ffi_call("maskgit_sample_tokens", [jax.ShapeDtypeStruct((1,), jnp.float32)] * 3)
    x, ours = jnp.zeros((1, 2, 3)), {"names": "logits", "threads": np.int64(1)}
    for arrays, attributes, message in (
        ((x,), {}, "names and threads expected"),
        ((jnp.zeros(3, jnp.uint8), x), ours, "another build"),
        ((x,), ours, "another build"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call(*arrays, **attributes)

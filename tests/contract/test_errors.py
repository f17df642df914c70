"""Wrong arguments: one message that names the argument, what was expected and what was got."""

import dataclasses

import numpy as np
import pytest

import maskgit
from maskgit import StepNoise, StepRule

GOOD = {
    "logits": np.zeros((2, 3, 5), np.float32),
    "tokens": np.full((2, 3), 5),
    "rule": "maskgit",
    "mask_token_id": 5,
    "step": 0,
    "num_steps": 2,
    "seeds": np.array([1, 2]),
}

CASES = [
    ({"logits": [[1.0]]}, "logits: expected a torch, jax or NumPy array, got list"),
    ({"logits": np.zeros((3, 5), np.float32)}, r"logits: expected shape \(B, N, V\)"),
    ({"logits": np.zeros((2, 3, 0), np.float32)}, r"logits: expected shape .* got \(2, 3, 0\)"),
    (
        {"logits": np.zeros((2, 3, 5), np.complex64)},
        "logits: expected dtype float16, bfloat16, float32, float64, got complex64",
    ),
    ({"logits": np.zeros((2, 3, 5), np.int64)}, "logits: expected dtype .* got int64"),
    ({"tokens": np.full((2, 4), 5)}, r"tokens: expected shape \(2, 3\), got \(2, 4\)"),
    ({"tokens": np.full((2, 3), 5.0)}, "tokens: expected integers, got dtype float64"),
    ({"tokens": [[5] * 3] * 2}, "tokens: expected a numpy array like the others, got list"),
    (
        {"tokens": np.full((2, 3), 6)},
        r"tokens: expected ids in \[0, 6\) or the mask token 5, got 6",
    ),
    ({"tokens": np.full((2, 3), -2)}, "tokens: expected ids .* got -2"),
    ({"mask_token_id": 2.5}, "mask_token_id: expected an integer, got 2.5"),
    (
        {"mask_token_id": 300, "tokens": np.zeros((2, 3), np.int8)},
        "tokens: expected a dtype that holds",
    ),
    ({"step": 2}, r"step: expected an integer in \[0, 2\), got 2"),
    ({"step": -1}, r"step: expected an integer in \[0, 2\), got -1"),
    ({"num_steps": 0}, "num_steps: expected an integer >= 1, got 0"),
    ({"num_steps": 1.5}, "num_steps: expected an integer, got 1.5"),
    ({"seeds": None}, r"seeds: expected \(2,\) integers because rule 'maskgit' draws"),
    ({"seeds": np.array([1, 2, 3])}, r"seeds: expected shape \(2,\) or \(2, 2\), got \(3,\)"),
    ({"seeds": np.array([1.0, 2.0])}, "seeds: expected integers, got dtype float64"),
    ({"seeds": ["a", "b"]}, "seeds: expected .* integers"),
    (
        {"num_masked_at_start": 4},
        "num_masked_at_start: expected counts between 0 and the 3 positions, got 4",
    ),
    ({"num_masked_at_start": np.array([-1, 0])}, "num_masked_at_start: .* got -1"),
    ({"num_masked_at_start": np.array([1])}, r"num_masked_at_start: expected shape \(2,\)"),
    ({"num_masked_at_start": 3.5}, "num_masked_at_start: expected integers, got 3.5"),
    ({"num_masked_at_start": [1, 2, 3]}, r"num_masked_at_start: expected shape \(2,\)"),
    ({"step": 1.0}, "step: expected an integer, got 1.0"),
    ({"mask_token_id": 2**70}, "mask_token_id: expected a 64-bit integer"),
    ({"backend": ["cpp"]}, "backend: expected auto"),
    ({"noise": np.zeros(3)}, "noise: expected a StepNoise"),
    ({"noise": StepNoise(np.zeros((2, 3, 4)))}, r"noise.token_gumbel: expected shape \(2, 3, 5\)"),
    ({"noise": StepNoise(None, np.zeros((2, 3), int))}, "noise.choice_gumbel: expected floating"),
    ({"guidance_scale": 2.0}, "uncond_logits: expected together with"),
    ({"uncond_logits": GOOD["logits"]}, "guidance_scale: expected together with"),
    (
        {"uncond_logits": GOOD["logits"], "guidance_scale": np.nan},
        "guidance_scale: expected a finite",
    ),
    ({"uncond_logits": GOOD["logits"][:1], "guidance_scale": 1.0}, "uncond_logits: expected shape"),
    ({"eligible": np.ones((2, 3))}, "eligible: expected dtype bool, got float64"),
    ({"eligible": np.ones((3, 2), bool)}, r"eligible: expected shape \(2, 3\)"),
    ({"rule": "masgit"}, "rule: expected a StepRule or one of maskgit, amused"),
    ({"rule": 3}, "rule: expected a StepRule or a preset name, got int"),
    (
        {"backend": "cuda"},
        "backend: expected auto, triton, pallas, cpp, torch, jax, reference, got 'cuda'",
    ),
    ({"backend": "pallas"}, "backend: 'pallas' cannot run: .*; available: .*reference"),
    ({"rule": dataclasses.replace(StepRule.preset("maskgit"), vocab_slice=(0, 6))}, "vocab_slice"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_decode_step(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        maskgit.decode_step(**{**GOOD, **change})


def test_the_good_arguments_are_good():
    assert maskgit.decode_step(**GOOD).next_tokens.shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosin"}, "schedule: expected one of linear, cosine"),
        (
            {"sample_temperature": -1.0},
            "sample_temperature: expected a finite number >= 0, got -1.0",
        ),
        ({"choice_temperature": float("nan")}, "choice_temperature: expected a finite"),
        ({"score_temperature": 0.0}, "score_temperature: expected None or a finite number >= 1e-6"),
        ({"banned_ids": 5}, "banned_ids: expected a tuple, got 5"),
        ({"filters": None}, "filters: expected a tuple, got None"),
        ({"greedy_last": "no"}, "greedy_last: expected True or False, got 'no'"),
        ({"cut": "sharp"}, "cut: expected one of strict, inclusive, exact, got 'sharp'"),
        ({"count": "all"}, "count: expected one of masked"),
        ({"score": "p"}, "score: expected one of prob"),
        ({"filters": ("top_q",)}, "filters: expected each of temperature, top_k"),
        ({"filters": ("top_p",)}, "top_p: expected a value exactly when filters names it"),
        ({"top_k": 5}, "top_k: expected a value exactly when filters names it"),
        ({"filters": ("top_k",), "top_k": 0}, "top_k: expected an integer >= 1, got 0"),
        ({"filters": ("top_p",), "top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"vocab_slice": (5, 5)}, "vocab_slice: expected None or"),
        ({"banned_ids": (-1,)}, "banned_ids: expected integers >= 0"),
        ({"time_eps": 1.0}, r"time_eps: expected a number in \[0, 1\)"),
        ({"guidance_form": "to_cond"}, "guidance_form: expected one of from_uncond, from_cond"),
        (
            {"guidance_form": "weighted"},
            "guidance_form: 'weighted' expected with guidance_dtype='logits'",
        ),
        (
            {"greedy_on": "probs", "score_temperature": 0.5},
            "score_temperature: expected None or 1.0",
        ),
    ],
)
def test_rules(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(StepRule.preset("maskgit"), **change)


def test_rules_survive_their_encoding():
    for name in StepRule.presets():
        rule = StepRule.preset(name)
        assert StepRule.decode(rule.encoded) == rule
        assert rule.source.split("@")[1].split()[0].isalnum()


def test_generate_checks_before_it_has_anything_to_do():
    known = np.zeros((1, 3), np.int64)
    good = {"rule": "llada", "mask_token_id": 9, "num_steps": 2}
    for change, message in (
        ({"mask_token_id": "x"}, "mask_token_id: expected an integer, got 'x'"),
        ({"backend": "nope"}, "backend: expected auto"),
        ({"rule": "nope"}, "rule: expected a StepRule or one of"),
        ({"num_steps": 0}, "num_steps: expected an integer >= 1, got 0"),
        ({"block_length": 2}, "block_length: expected a divisor of the 3 positions"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            maskgit.generate(lambda t: None, known, **{**good, **change})
    with pytest.raises(TypeError, match="forward: expected a callable"):
        maskgit.generate(None, known, **good)


def test_seeds_of_64_bits_in_a_list():
    top = maskgit.decode_step(**{**GOOD, "seeds": [2**64 - 1, 0]})
    same = maskgit.decode_step(**{**GOOD, "seeds": np.array([-1, 0])})
    assert (top.candidate_tokens == same.candidate_tokens).all()
    with pytest.raises(ValueError, match="positions: expected values in"):
        maskgit.sample_tokens(GOOD["logits"], rule="llada", positions=np.full((2, 3), -1))


def test_environment_backend_speaks_to_auto_alone(monkeypatch):
    monkeypatch.setenv("MASKGIT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="MASKGIT_BACKEND: expected auto"):
        maskgit.decode_step(**GOOD)
    assert maskgit.decode_step(**GOOD, backend="reference")
    monkeypatch.setenv("MASKGIT_BACKEND", "reference")
    assert maskgit.decode_step(**GOOD)

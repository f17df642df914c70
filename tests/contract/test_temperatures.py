"""Temperatures from 1e-30 to 1e308 on every backend: the reference's tokens, and never an id outside.

Rows hold what goes wrong at the ends of float32: few finite logits among -inf, a vocabulary that ends
inside a vector and a leaf, logits of the order of the largest float, a slice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, Case, check, compare_stats, make_case, run_stats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskgit import StepRule

TEMPERATURES = (1e-30, 1e-6, 1.0, 1e30, 1e37, 1e38, 1e308)
DEAR = ("jax", "triton", "pallas")  # a program for every temperature, or an interpreter
RULES = {
    "sample": {},
    "all": {"score_temperature": None},
    "entropy": {"score_temperature": None, "score": "neg_entropy"},
    "choice": {"choice_temperature": 1.0, "choice_anneal": "constant"},
    "filtered": {"filters": ("top_k", "temperature", "top_p"), "top_k": 9, "top_p": 0.7},
    "wide": {"score_dtype": "float64", "score_temperature": None},
    "slice": {"vocab_slice": (7, 60), "banned_ids": (7, 30)},
}


def rule_at(name: str, temperature: float) -> StepRule:
    """The rule of that name with every temperature it has at this one."""
    fields: dict[str, Any] = dict(RULES[name])
    if "choice_temperature" in fields:
        fields["choice_temperature"] = temperature
    return StepRule(name=name, sample_temperature=temperature, **fields)


def rows(case: Case, kind: str, seed: int) -> Case:
    """The case with the logits that its name says."""
    rng = np.random.default_rng(seed)
    logits = case.logits.copy()
    if kind == "sparse":  # two finite ones, the rest -inf
        logits[:] = -np.inf
        for row in logits.reshape(-1, logits.shape[-1]):
            row[rng.choice(np.arange(8, min(60, row.size)), 2, replace=False)] = rng.normal(size=2)
    elif kind == "huge":
        logits = np.where(rng.random(logits.shape) < 0.5, logits * 1e37, logits).astype(np.float32)
        logits[..., ::5] = -np.inf
    elif kind == "last":  # the last column alone is likely
        logits[:] = -np.inf
        logits[..., 59] = -1e4
        logits[..., -1] = -3e4
    return dataclasses.replace(case, logits=logits, note=kind)


def case_at(name: str, temperature: float, kind: str, vocab: int, seed: int = 0) -> Case:
    """A case of a rule at a temperature."""
    case = make_case(
        rule_at(name, temperature), seed=seed, vocab=vocab, length=5, batch=1, scale=1.0
    )
    return rows(case, kind, seed)


@pytest.mark.parametrize("kind", ["plain", "sparse", "huge", "last"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in DEAR])
def test_every_temperature(backend: str, name: str, kind: str) -> None:
    for temperature in TEMPERATURES:
        for vocab in (61, 2100):
            case = case_at(name, temperature, kind, vocab)
            check(case, backend)
            compare_stats(
                case, run_stats(case, backend), wide=backend == "torch" and name == "wide"
            )


@pytest.mark.parametrize("name", ["all", "choice"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "jax"])
def test_hot_in_jax(backend: str, name: str) -> None:
    check(case_at(name, 1e308, "sparse", 200), backend)


@given(
    st.floats(-30, 308).map(lambda e: 10.0**e),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(["plain", "sparse", "huge", "last"]),
    st.integers(61, 700),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in DEAR])
def test_any_temperature(
    backend: str, temperature: float, name: str, kind: str, vocab: int, seed: int
) -> None:
    check(case_at(name, temperature, kind, vocab, seed), backend)

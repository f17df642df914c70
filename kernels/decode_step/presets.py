"""Presets: the decode step of published codebases, each at the commit that was read.

A preset reproduces what the code does, not what its paper says; docs/semantics.md has the table.
Where a codebase would re-mask or overwrite a known token, the contract wins: known tokens stay.
"""

from __future__ import annotations

from .spec import StepRule

_MASKGIT = "google-research/maskgit@1db23594e1bd328ee78eadcd148a19281cd0f5b8"
_DIFFUSERS = "huggingface/diffusers@58eb52c0803ea9af3abec60841c2a093bdf1f951"
_OPEN_MUSE = "huggingface/open-muse@64e1afe033717d795866ab8204484705cd4dc3f7"
_TITOK = "bytedance/1d-tokenizer@942a96fbdd873780179d1b78d5462911528bf8c8"
_LLADA = "ML-GSAI/LLaDA@b7e6c3565f194352da44b38dd12b6970597309f3"
_LLADA_FP64 = "ML-GSAI/LLaDA@d5634dace08aee47cc5cd68e67059994d5dab8c9"
_DREAM = "NVlabs/Fast-dLLM@96dc39ee46f32c5a9a73dd5d60a8de3bd320226f"
_FAST_DLLM = "NVlabs/Fast-dLLM@5332e2fc0edad553a5ac4fae6d6ec7b8cefc410a"


def _llada(name: str, source: str, **changes: object) -> StepRule:
    fields: dict[str, object] = {
        "count": "quota",
        "block_scope": "prefix",
        "sample_temperature": 0.0,
        "score": "prob",
        "score_dtype": "logits",
    }
    return StepRule(name=name, source=source, **(fields | changes))  # type: ignore[arg-type]


def _dream(name: str, **changes: object) -> StepRule:
    fields: dict[str, object] = {
        "count": "fraction",
        "count_rows": "mean",
        "sample_temperature": 0.0,
        "greedy_on": "probs",
        "score": "prob",
        "score_temperature": None,
        "score_filtered": True,
        "score_dtype": "logits",
        "choice_anneal": "constant",
    }
    source = f"{_DREAM} dream/model/generation_utils.py"
    return StepRule(name=name, source=source, **(fields | changes))  # type: ignore[arg-type]


_RULES = (
    StepRule(
        name="maskgit",
        source=f"{_MASKGIT} maskgit/libml/parallel_decode.py",
        cut="strict",
        choice_temperature=4.5,
    ),
    StepRule(
        name="amused",
        source=f"{_DIFFUSERS} src/diffusers/schedulers/scheduling_amused.py",
        count_base="positions",
        cut="strict",
        last_step="all",
        choice_temperature=2.0,
        choice_anneal="linspace",
    ),
    StepRule(
        name="open-muse",
        source=f"{_OPEN_MUSE} muse/modeling_transformer.py generate2",
        count_base="positions",
        cut="strict",
        choice_temperature=1.0,
        choice_anneal="compound",
    ),
    StepRule(
        name="titok",
        source=f"{_TITOK} modeling/maskgit.py",
        schedule="arccos",
        count_base="positions",
        count_dtype="float64",
        count_rows="first",
        cut="inclusive",
        last_step="all",
        sample_temperature=4.5,
        sample_anneal="linear",
        score="logit",
        choice_temperature=4.5,
    ),
    _llada("llada", f"{_LLADA} generate.py"),
    _llada("llada-fp64", f"{_LLADA_FP64} generate.py", score_dtype="float64"),
    _dream("dream-maskgit-plus"),
    _dream("dream-margin", score="margin"),
    _dream("dream-entropy", score="neg_entropy"),
    _dream("dream-origin", count="bernoulli", count_rows="each", score="random", last_step="all"),
    _llada(
        "threshold",
        f"{_FAST_DLLM} llada/generate.py get_transfer_index",
        count="threshold",
        threshold=0.9,
        last_step="all",
        score_dtype="float64",
    ),
    _llada(
        "factor",
        f"{_FAST_DLLM} llada/generate.py get_transfer_index_dynamic",
        count="factor",
        factor=1.0,
        last_step="all",
        score_dtype="float64",
    ),
    _llada("random", f"{_LLADA} generate.py remasking=random", score="random"),
)

PRESETS = {rule.name: rule for rule in _RULES}

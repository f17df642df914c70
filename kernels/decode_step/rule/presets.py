"""Presets: the decode step of published codebases, each at the commit that was read; registered in rule.py.

A preset reproduces what the code does, not what its paper says; docs/semantics.md has the table.
Where a codebase would re-mask or overwrite a known token, the contract wins: known tokens stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .rule import PRESETS, StepRule

_MAGVIT = "google-research/magvit@05e8cfd6"
_MASKGIT = "google-research/maskgit@1db23594e1bd328ee78eadcd148a19281cd0f5b8"
_DIFFUSERS = "huggingface/diffusers@58eb52c0803ea9af3abec60841c2a093bdf1f951"
_OPEN_MUSE = "huggingface/open-muse@64e1afe033717d795866ab8204484705cd4dc3f7"
_TITOK = "bytedance/1d-tokenizer@942a96fbdd873780179d1b78d5462911528bf8c8"
_LLADA = "ML-GSAI/LLaDA@b7e6c3565f194352da44b38dd12b6970597309f3"
_LLADA_FP64 = "ML-GSAI/LLaDA@d5634dace08aee47cc5cd68e67059994d5dab8c9"
_DREAM = "NVlabs/Fast-dLLM@96dc39ee46f32c5a9a73dd5d60a8de3bd320226f"
_FAST_DLLM = "NVlabs/Fast-dLLM@5332e2fc0edad553a5ac4fae6d6ec7b8cefc410a"

# Guided logits in half precision: c + s (c - u), and (1 + s) c - s u.
_FROM_COND: dict[str, Any] = {"guidance_dtype": "logits", "guidance_form": "from_cond"}
_WEIGHTED: dict[str, Any] = {"guidance_dtype": "logits", "guidance_form": "weighted"}


def _llada(name: str, source: str, **changes: object) -> StepRule:
    fields: dict[str, object] = {
        "count": "quota",
        "block_scope": "prefix",
        "sample_temperature": 0.0,
        "guidance_dtype": "logits",
        "score": "prob",
        "score_dtype": "logits",
    }
    return StepRule(name=name, source=source, **(fields | changes))  # type: ignore[arg-type]


def _threshold(name: str, source: str, **changes: object) -> StepRule:
    fields: dict[str, object] = {"count": "threshold", "last_step": "all"}
    return _llada(name, source, **(fields | changes))


def _dream(name: str, alg: str = "", **changes: object) -> StepRule:
    fields: dict[str, object] = {
        "source": f"{_DREAM} dream/model/generation_utils.py alg={alg}",
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
    return StepRule(name=name, **(fields | changes))  # type: ignore[arg-type]


def _open_muse(name: str, source: str, **changes: object) -> StepRule:
    fields: dict[str, object] = {
        "count_base": "positions",
        "cut": "strict",
        "guidance_dtype": "logits",
        "choice_temperature": 1.0,
        "choice_anneal": "compound",
    }
    return StepRule(name=name, source=source, **(fields | changes))  # type: ignore[arg-type]


def _amused(name: str, source: str) -> StepRule:
    return _open_muse(
        name, source, last_step="all", choice_temperature=2.0, choice_anneal="linspace"
    )


def _absorbing(name: str, source: str, **changes: object) -> StepRule:
    """Positions by chance, tokens drawn without the mask: MDLM and what came from it."""
    fields: dict[str, object] = {
        "count": "bernoulli",
        "score": "random",
        "ban_mask_token": True,
        "time_eps": 1e-5,
    }
    return StepRule(name=name, source=source, **(fields | changes))  # type: ignore[arg-type]


def _muse(name: str, **changes: object) -> StepRule:
    fields: dict[str, object] = {
        "source": "lucidrains/muse-maskgit-pytorch@6df7f33b MaskGit.generate",
        "count_base": "positions",
        "count_ratio": "linspace_ends",
        "clamps": ("keep_one",),
        "last_step": "all",
        "sample_anneal": "linear",
        "guidance_dtype": "logits",
        "score": "prob",
    }
    return StepRule(name=name, **(fields | changes))  # type: ignore[arg-type]


def _block_refinement(name: str, **changes: object) -> StepRule:
    fields: dict[str, object] = {
        "source": f"{_DIFFUSERS} BlockRefinementScheduler.step",
        "count": "threshold",
        "threshold": 0.95,
        "threshold_strict": True,
        "min_commit": "quota",
        "count_base": "block",
        "sample_temperature": 0.0,
        "score": "prob",
    }
    return StepRule(name=name, **(fields | changes))  # type: ignore[arg-type]


_REMDM: dict[str, dict[str, object]] = {
    "cap": {"remask_eta": 0.04},
    "rescale": {"remask_eta": 0.04},
    "forward_backward": {},
    "conf": {"score": "given"},
    "loop": {"remask_eta": 0.02, "remask_on": 0.55, "remask_off": 0.05, "remask_alpha": 0.9},
}

# A filter that depends on V (the best tenth, say) is the codebase's own setting and not in here.
_RULES = (
    StepRule(
        name="maskgit",
        source=f"{_MASKGIT} maskgit/libml/parallel_decode.py",
        cut="strict",
        choice_temperature=4.5,
    ),
    _amused("amused", f"{_DIFFUSERS} src/diffusers/schedulers/scheduling_amused.py"),
    _amused("meissonic", "viiika/Meissonic@aeba85e8 Scheduler.step"),
    _open_muse("open-muse", f"{_OPEN_MUSE} muse/modeling_transformer.py generate2"),
    _open_muse(
        "open-muse-v2",
        f"{_OPEN_MUSE} muse/modeling_transformer_v2.py generate2",
        choice_temperature=2.0,
        choice_anneal="linspace",
    ),
    _open_muse("show-o", "showlab/Show-o@45a5a2de Showo.t2i_generate", **_WEIGHTED),
    _open_muse("mmada-image", "Gen-Verse/MMaDA@3cdb8709 MMadaModelLM.t2i_generate", **_WEIGHTED),
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
        **_FROM_COND,
        score="logit",
        choice_temperature=4.5,
    ),
    StepRule(
        name="maskbit",
        source="markweberdev/maskbit@5ea3d733 sampling.sample",
        schedule="arccos",
        count_base="positions",
        count_rows="first",
        cut="inclusive",
        **_FROM_COND,
        score_temperature=None,
        choice_temperature=4.5,
    ),
    StepRule(
        name="magvit",
        source=f"{_MAGVIT} parallel_decode.decode",
        cut="inclusive",
        choice_temperature=4.5,
    ),
    StepRule(
        name="valeo-v1",
        source="valeoai/Maskgit-pytorch@674ef1d9 MaskGIT.sample",
        count="given",
        cut="strict",
        score_temperature=None,
        choice_temperature=4.5,
        choice_anneal="linspace",
    ),
    StepRule(
        name="halton-confidence",
        source="valeoai/Halton-MaskGIT@f61b0a13 ConfidenceSampler",
        count="given",
        cut="strict",
        edit_threshold=-1e30,  # known tokens are drawn anew at every step
        **_WEIGHTED,
        score_temperature=None,
        choice_temperature=4.5,
        choice_anneal="linspace",
    ),
    StepRule(
        name="halton",
        source="valeoai/Halton-MaskGIT@f61b0a13 HaltonSampler",
        count="given",
        **_WEIGHTED,
        score="given",
    ),
    _muse("muse"),
    _muse(
        "muse-critic",
        source="lucidrains/muse-maskgit-pytorch@6df7f33b MaskGit.generate with a token critic",
        score="given",
        revise="held",
        choice_temperature=1.0,
    ),
    StepRule(
        name="lumina",
        source="Alpha-VLLM/Lumina-DiMOO@81344e60 generate_image",
        clamps=("keep_one", "commit_one"),
        cut="strict",
        last_step="all",
        **_WEIGHTED,
        choice_temperature=1.0,
        choice_anneal="constant",
    ),
    StepRule(
        name="onexgpt",
        source="1x-technologies/1xgpt@00697344 STMaskGIT.maskgit_generate",
        count_base="positions",
        count_rounding="ceil",
        count_dtype="float64",
        clamps=(),
        last_step="all",
        score="prob",
    ),
    StepRule(
        name="maskgct",
        source="open-mmlab/Amphion@d3de90f0 MaskGCT reverse_diffusion",
        schedule="sine",
        count_base="positions",
        clamps=(),
        sample_anneal="before",
        sample_temperature_floor=1e-3,
        greedy_last=True,
        score="prob",
        score_filtered=True,
        choice_temperature=1.0,
        choice_anneal="before",
    ),
    StepRule(
        name="soundstorm",
        source="lucidrains/soundstorm-pytorch@8119522e SoundStorm.generate",
        schedule="linear",
        count_ratio="linspace",
        clamps=(),
        revise="drawn",
        sample_anneal="linear",
        score="prob",
        score_filtered=True,
    ),
    StepRule(
        name="vampnet",
        source="hugofloresgarcia/vampnet@72e26757 VampNet.generate",
        count_rows="sum",
        cut="strict",
        last_step="all",
        guidance_dtype="logits",
        score_temperature=None,
        score_filtered=True,
        choice_temperature=10.5,
    ),
    StepRule(
        name="magnet",
        source="facebookresearch/audiocraft@896ec7c4 MagnetLMModel._generate_stage, one token a span",
        count_ratio="linspace_ends",
        clamps=("keep_one",),
        last_step="all",
        sample_temperature=3.0,
        sample_anneal="linear",
        sample_temperature_floor=1e-2,
        guidance_dtype="logits",
        score_temperature=None,
    ),
    _llada("llada", f"{_LLADA} generate.py"),
    _llada("llada-fp64", f"{_LLADA_FP64} generate.py", score_dtype="float64"),
    _llada("random", f"{_LLADA} generate.py remasking=random", score="random"),
    _llada("mmada-text", "Gen-Verse/MMaDA@3cdb8709 mmu_generate", score_dtype="float64"),
    _llada("dllm", "ZHZisZZ/dllm@ca176752 MDLMSampler.sample", count="given"),
    _threshold(
        "threshold", f"{_FAST_DLLM} llada/generate.py get_transfer_index", score_dtype="float64"
    ),
    _llada(
        "factor",
        f"{_FAST_DLLM} llada/generate.py get_transfer_index_dynamic",
        count="factor",
        last_step="all",
        score_dtype="float64",
    ),
    _threshold(
        "dinfer-threshold",
        "inclusionAI/dInfer@fce4e328 ThresholdParallelDecoder.decode",
        block_scope="block",
        threshold_slack=1e-5,
        skip_mask_token=True,
        score_dtype="float32",
    ),
    _threshold(
        "dinfer-hierarchy",
        "inclusionAI/dInfer@fce4e328 HierarchyDecoder.decode",
        block_scope="block",
        count="runs",
        low_threshold=0.4,
        score_dtype="float32",
    ),
    _threshold(
        "sglang-low-confidence",
        "sgl-project/sglang@14652243 LowConfidence.run",
        block_scope="block",
        threshold=0.95,
        threshold_strict=True,
    ),
    _threshold(
        "sglang-joint",
        "sgl-project/sglang@14652243 JointThreshold.run",
        block_scope="block",
        threshold=0.5,
        threshold_strict=True,
        edit_threshold=0.0,
    ),
    _threshold(
        "sglang-entropy-bound",
        "sgl-project/sglang@38c8d9bc EBSampling.run",
        block_scope="block",
        count="entropy_bound",
        threshold=0.15,
        score="neg_entropy",
        ban_mask_token=True,
    ),
    _dream("dream-maskgit-plus", "maskgit_plus"),
    _dream("dream-margin", "topk_margin", score="margin"),
    _dream("dream-entropy", "entropy", score="neg_entropy"),
    _dream(
        "dream-origin",
        "origin",
        count="bernoulli",
        count_rows="each",
        score="random",
        last_step="all",
    ),
    _dream(
        "open-dllm",
        source="pengzhangzhi/Open-dLLM@8b387877 _mdm_sample",
        count_rows="each",
        greedy_on="logits",
        score="neg_entropy",
    ),
    StepRule(
        name="open-dllm-p2",
        source="pengzhangzhi/Open-dLLM@8b387877 _mdm_sample, p2",
        schedule="linear",
        clamps=(),
        revise="held",
        sample_temperature=0.0,
        score="top1_prob",
    ),
    StepRule(
        name="sdar",
        source="JetAstra/SDAR@c2041a83 block_diffusion_generate low_confidence_static",
        count="quota",
        count_base="block",
        score="prob",
        score_temperature=None,
        score_filtered=True,
        score_dtype="logits",
    ),
    StepRule(
        name="sdar-dynamic",
        source="JetAstra/SDAR@c2041a83 block_diffusion_generate low_confidence_dynamic",
        count="threshold",
        threshold=0.85,
        threshold_strict=True,
        min_commit="quota",
        count_base="block",
        score="prob",
        score_temperature=None,
        score_filtered=True,
        score_dtype="logits",
    ),
    _block_refinement("llada2"),
    _block_refinement(
        "llada2-edit",
        source=f"{_DIFFUSERS} BlockRefinementScheduler.step editing_threshold",
        edit_threshold=0.9,
    ),
    StepRule(
        name="entropy-bound",
        source=f"{_DIFFUSERS} EntropyBoundScheduler.step",
        count="entropy_bound",
        threshold=0.1,
        sample_temperature=0.8,
        sample_anneal="before",
        sample_temperature_end=0.4,
        score="neg_entropy",
        score_temperature=None,
    ),
    _absorbing("mdlm", "kuleshov-group/mdlm@c112c526 _ddpm_update", last_step="schedule"),
    _absorbing(
        "bd3lm",
        "kuleshov-group/bd3lms@1c3e8f43 _semi_ar_sampler, first hitting",
        count="quota",
        top_p_keep="below",
    ),
    _absorbing(
        "md4",
        "google-deepmind/md4@b9fbf292 ancestral_sample_step",
        schedule="linear",
        ban_mask_token=False,
    ),
    *(
        _absorbing(
            f"remdm-{kind.replace('_', '-')}",
            f"kuleshov-group/remdm@f830d659 _ddpm_caching_update remdm-{kind}",
            remask=kind,
            top_p_keep="below",
            **changes,
        )
        for kind, changes in _REMDM.items()
    ),
)

# The same without what looks like a mistake: docs/semantics.md says which.
_COMPLETE: dict[str, object] = {"clamps": ("keep_one", "commit_one"), "last_step": "all"}
_FIXED: dict[str, dict[str, object]] = {
    "maskgit": _COMPLETE,
    "open-muse": {"choice_anneal": "linear"},
    "titok": {"count_rows": "each"},
    "maskbit": {"count_rows": "each", **_COMPLETE},
    "magvit": _COMPLETE,
    "vampnet": {"count_rows": "each"},
    "llada": {"ban_mask_token": True},
    "factor": {"factor_tail": False},
    "dream-maskgit-plus": {"count_rows": "each"},
    "dream-margin": {"count_rows": "each"},
    "dream-entropy": {"count_rows": "each"},
}

PRESETS.update({rule.name: rule for rule in _RULES})
PRESETS.update(
    {
        f"{name}-fixed": dataclasses.replace(
            PRESETS[name],
            **{"name": f"{name}-fixed", "source": f"{PRESETS[name].source}, mended"} | changes,  # type: ignore[arg-type]
        )
        for name, changes in _FIXED.items()
    }
)

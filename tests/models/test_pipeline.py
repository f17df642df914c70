"""The shipped weights through the pipeline: quality, determinism, arguments."""

from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit import StepRule
from maskgit.checkpoint import CheckpointError
from maskgit.evaluation import metrics
from maskgit.pipelines.images import WEIGHTS_DIR, Pipeline, load
from maskgit.sampling.orders import order_scores
from maskgit.training.data.digits import Digits, load_split

PER_CLASS = 30


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("digits")


@pytest.fixture(scope="module")
def judge() -> metrics.Judge:
    return metrics.Judge()


@pytest.fixture(scope="module")
def eight(pipeline: Pipeline) -> Digits:
    return generated(pipeline, 8)


def generated(pipeline: Pipeline, steps: int) -> Digits:
    labels = np.arange(10).repeat(PER_CLASS)
    return Digits(pipeline.generate(labels, num_steps=steps, seeds=1).numpy(), labels)


def test_eight_steps_are_good_and_one_is_clearly_worse(
    pipeline: Pipeline, judge: metrics.Judge, eight: Digits
) -> None:
    good, bad = judge.score("8", eight), judge.score("1", generated(pipeline, 1))
    assert judge.test_accuracy >= 0.95
    assert good.accuracy >= 0.95
    assert bad.accuracy <= good.accuracy - 0.05
    assert bad.frechet >= 2 * good.frechet
    assert bad.precision <= good.precision - 0.2


def test_default_steps_are_eight(pipeline: Pipeline) -> None:
    assert pipeline.config.num_steps == 8
    assert torch.equal(
        pipeline.generate([3], seeds=5), pipeline.generate([3], num_steps=8, seeds=5)
    )


def test_generated_digits_are_not_copies(eight: Digits) -> None:
    images = eight.images.reshape(-1, 64)
    train = load_split()[0].images.reshape(-1, 64)
    nearest = ((images[:, None] - train[None]) ** 2).mean(-1).min(1)
    assert float(np.median(nearest)) > 0.005
    assert len(np.unique(images.round(3), axis=0)) == len(images)


def test_tokenizer_reconstructs_held_out_digits(pipeline: Pipeline, judge: metrics.Judge) -> None:
    _, test = load_split()
    tokens = pipeline.encode(test.images)
    images = pipeline.decode(tokens)
    assert tokens.shape == (len(test.labels), 64)
    assert float((images - torch.from_numpy(test.images)).square().mean().sqrt()) < 0.03
    read = judge.accuracy(Digits(images.numpy(), test.labels))
    assert read >= judge.test_accuracy - 0.01
    used = tokens.flatten().bincount(minlength=pipeline.weights.config.tokenizer.codebook_size)
    assert int((used > 0).sum()) >= 12


def test_same_seed_same_image_and_other_seed_another(pipeline: Pipeline) -> None:
    first, again, other = (pipeline.generate([4, 4], seeds=s) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_image_depends_on_its_own_seed_not_on_the_batch(pipeline: Pipeline) -> None:
    seeds = torch.arange(6) + 100
    whole = pipeline.generate_tokens([0, 1, 2, 3, 4, 5], seeds=seeds).tokens
    alone = torch.cat(
        [pipeline.generate_tokens([c], seeds=seeds[c : c + 1]).tokens for c in range(6)]
    )
    # the matrix products may round differently, so leave room for a near tie
    assert float((whole == alone).all(1).double().mean()) >= 0.8


def test_known_tokens_stay(pipeline: Pipeline) -> None:
    tokens = pipeline.encode(load_split()[1].images[:4])
    start = tokens.clone()
    start[:, ::2] = pipeline.mask_token_id
    result = pipeline.fill(start, [0, 1, 2, 3], seeds=0)
    assert torch.equal(result.tokens[:, 1::2], tokens[:, 1::2])
    assert int(result.tokens.max()) < pipeline.weights.config.tokenizer.codebook_size


def test_recorded_trajectory_unmasks_step_by_step(pipeline: Pipeline) -> None:
    result = pipeline.generate_tokens([0, 1], num_steps=8, seeds=0, record=True)
    kept = torch.stack(result.trajectory.next_tokens)
    assert tuple(kept.shape) == (8, 2, 64)
    masked = (kept == pipeline.mask_token_id).sum(-1)
    assert bool((masked[1:] < masked[:-1]).all())
    assert torch.equal(result.trajectory.candidate_tokens[-1], result.tokens)


def test_guidance_changes_the_images(pipeline: Pipeline) -> None:
    images = [pipeline.generate([8], seeds=2, guidance_scale=s) for s in (1.0, 4.0)]
    assert not torch.equal(*images)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"classes": [10]}, r"classes: expected 0\.\.9, got 10"),
        ({"classes": [-1]}, r"classes: expected 0\.\.9, got -1"),
        ({"classes": [[1]]}, r"classes: expected shape \(B,\)"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"choice_temperature": -1.0}, "choice_temperature: expected a number of at least 0"),
        ({"sample_temperature": float("nan")}, "sample_temperature: expected a number"),
        ({"guidance_scale": -2.0}, "guidance_scale: expected at least 0"),
        ({"seeds": -1}, "seed: expected 0"),
        ({"seeds": [1, 2]}, r"seeds: expected shape \(1,\)"),
        ({"rule": "nonsense"}, "nonsense"),
        ({"backend": "nonsense"}, "nonsense"),
    ],
)
def test_bad_settings_are_named(pipeline: Pipeline, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pipeline.generate(**{"classes": [1], **settings})


def test_empty_batch(pipeline: Pipeline) -> None:
    assert tuple(pipeline.generate([]).shape) == (0, 1, 8, 8)


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'maskgit-paper' ships without weights"):
        load("maskgit-paper")
    with pytest.raises(CheckpointError, match="nothing: no such file"):
        load(tmp_path / "nothing")


def test_shipped_weights_say_where_they_come_from(pipeline: Pipeline) -> None:
    info = pipeline.weights.info
    assert info["command"].startswith("maskgit train digits --seed 0")
    assert info["seed"] == 0
    assert "scikit-learn" in info["data"]
    assert (WEIGHTS_DIR / "digits.safetensors").stat().st_size <= 4 * 2**20


LEAVES = ("entropy-bound", "remdm-loop", "remdm-forward-backward")


@pytest.mark.parametrize("rule", LEAVES)
def test_masks_that_are_left_are_named_and_committed_on_request(
    pipeline: Pipeline, rule: str
) -> None:
    with pytest.raises(ValueError, match=r"positions are still masked.*finish=True"):
        pipeline.generate(range(10), rule=rule, num_steps=4)
    images = pipeline.generate(range(10), rule=rule, num_steps=4, finish=True)
    assert images.shape == (10, 1, 8, 8)


@pytest.mark.parametrize(
    "rule", [name for name in StepRule.presets() if not name.endswith("-fixed")]
)
def test_every_rule_can_be_used_or_says_what_it_needs(pipeline: Pipeline, rule: str) -> None:
    classes, options = [3], {"rule": rule, "num_steps": 2, "finish": True}
    if StepRule.preset(rule).score == "given":
        with pytest.raises(
            ValueError,
            match=r"order: rule .* scores are given; expected random|rule: .* a model beside this one",
        ):
            pipeline.generate(classes, **options)
    else:
        pipeline.generate(classes, **options)


def test_orders(pipeline: Pipeline) -> None:
    for rule in ("maskgit", "halton", "llada"):
        for order in ("raster", "halton", "random"):
            result = pipeline.generate_tokens(
                [1, 2], rule=rule, num_steps=8, order=order, record=True
            )
            steps = result.trajectory.commit_steps
            assert (result.tokens != pipeline.mask_token_id).all()
            if order == "raster":
                assert (steps.diff(dim=1) >= 0).all()
            elif order == "halton":
                ranks = torch.from_numpy(-order_scores("halton", 8, 8)).long().argsort()
                assert (steps[:, ranks].diff(dim=1) >= 0).all()
            else:
                assert not torch.equal(steps[0], steps[1])
    early = torch.arange(64)[order_scores("halton", 8, 8) > -16]  # spread over the quarters
    for quarter in ((early < 32) & (early % 8 < 4), (early >= 32) & (early % 8 >= 4)):
        assert 3 <= int(quarter.sum()) <= 5
    for rule in ("threshold", "muse-critic", "mdlm"):
        with pytest.raises(ValueError, match="order: expected 'confidence' with rule"):
            pipeline.generate([1], rule=rule, order="raster")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (8, 8), (16, 16), (5, 24)])
def test_every_position_has_its_place_in_an_order(height: int, width: int) -> None:
    for order in ("raster", "halton"):
        ranks = np.sort(-order_scores(order, height, width))
        np.testing.assert_array_equal(ranks, np.arange(height * width))
    with pytest.raises(ValueError, match="order: expected raster or halton, got 'spiral'"):
        order_scores("spiral", height, width)


def test_numbers_of_any_library(pipeline: Pipeline) -> None:
    plain = pipeline.generate_tokens(
        [3], seeds=5, num_steps=2, sample_temperature=0.5, guidance_scale=2
    )
    other = pipeline.generate_tokens(
        [np.int64(3)], seeds=np.int64(5), num_steps=np.int32(2), sample_temperature=np.float32(0.5),
        choice_temperature=np.float64(4.5), guidance_scale=np.float32(2),
    )  # fmt: skip
    assert torch.equal(plain.tokens, other.tokens)


def test_what_comes_back_are_ordinary_tensors(pipeline: Pipeline) -> None:
    result = pipeline.generate_tokens([3], num_steps=2, record=True)
    images = pipeline.decode(result.tokens)
    tensors = [result.tokens, images, pipeline.encode(images), *result.trajectory.confidence]
    for tensor in tensors:
        assert not tensor.is_inference()
        assert not tensor.requires_grad
        tensor.zero_()

"""Metrics against closed forms and against sets whose answer is known."""

import json

import numpy as np
import pytest
import scipy.linalg

from maskgit.evaluation import metrics
from maskgit.pipelines.images import load
from maskgit.training.data.digits import Digits


@pytest.fixture(scope="module")
def judge() -> metrics.Judge:
    return metrics.Judge()


def features(seed: int, count: int = 400, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(
        size=width
    )


def test_frechet_equals_the_textbook_form() -> None:
    a, b = features(0), features(1)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
    assert metrics.frechet_distance(b, a) == pytest.approx(want, rel=1e-6)


def test_frechet_of_a_set_with_itself_and_with_its_shift() -> None:
    a = features(2)
    assert metrics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert metrics.frechet_distance(a, a + 2.0) == pytest.approx(4.0 * 6, rel=1e-6)
    dead = np.concatenate([a, np.zeros((400, 3))], axis=1)  # singular covariance
    assert metrics.frechet_distance(dead, dead) == pytest.approx(0.0, abs=1e-6)


def test_frechet_needs_two_rows() -> None:
    with pytest.raises(ValueError, match="b: expected at least two rows"):
        metrics.frechet_distance(features(0), features(0)[:1])


def test_precision_and_recall_by_hand() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
    # k = 1: every real ball has radius 1 and reaches -1..5
    inside, outside = np.array([[0.5], [1.5], [2.5]]), np.array([[5.5], [9.0], [9.5]])
    assert metrics.precision_recall(real, inside, k=1) == (1.0, 4 / 5)
    # the ball of 5.5 has radius 3.5, so it reaches 2, 3 and 4
    assert metrics.precision_recall(real, outside, k=1) == (0.0, 3 / 5)
    mixed = np.array([[0.5], [1.5], [20.0], [30.0]])
    assert metrics.precision_recall(real, mixed, k=1)[0] == 0.5


def test_precision_and_recall_tell_lost_modes_from_noise() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(600, 4))
    narrow, wide = rng.normal(size=(600, 4)) * 0.3, rng.normal(size=(600, 4)) * 3
    precision, recall = metrics.precision_recall(real, narrow)
    assert precision > 0.95
    assert recall < 0.6
    precision, recall = metrics.precision_recall(real, wide)
    assert precision < 0.5
    assert recall > 0.8


def test_precision_needs_more_rows_than_neighbours() -> None:
    with pytest.raises(ValueError, match="generated: expected more than 3 rows"):
        metrics.precision_recall(features(0), features(0)[:3])


def test_classifier_is_deterministic_and_good(judge: metrics.Judge) -> None:
    again = metrics.Judge()
    assert np.array_equal(again.reference_features, judge.reference_features)
    assert judge.test_accuracy >= 0.95
    assert judge.reference_features.shape[1] == metrics.HIDDEN_UNITS


def test_features_are_the_hidden_layer(judge: metrics.Judge) -> None:
    net = judge.classifier
    logits = judge.reference_features @ net.coefs_[1] + net.intercepts_[1]
    want = net.predict_proba(judge.reference.images.reshape(-1, 64))
    got = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(got / got.sum(1, keepdims=True), want, atol=1e-4)


def test_scores_rank_real_above_noise_and_wrong_labels(judge: metrics.Judge) -> None:
    rng = np.random.default_rng(0)
    real = metrics._subset(judge.train, 500)
    noise = Digits(rng.random((500, 1, 8, 8), dtype=np.float32), real.labels)
    good, bad = judge.score("real", real), judge.score("noise", noise)
    assert good.accuracy > 0.95 > 0.3 > bad.accuracy
    assert good.frechet < 0.1 * bad.frechet
    assert good.precision > 0.8
    assert bad.precision < 0.1
    wrong = judge.score("wrong", Digits(real.images, (real.labels + 1) % 10))
    assert wrong.accuracy < 0.05
    assert wrong.cas < 0.05
    assert wrong.frechet == pytest.approx(good.frechet)


def test_evaluate_reports_a_row_per_number_of_steps() -> None:
    report = metrics.evaluate(load("digits"), (1, 2), per_class=5, seed=3)
    assert [row["name"] for row in report["rows"]] == ["real", "1 step", "2 steps"]
    assert json.loads(json.dumps(report)) == report
    with pytest.raises(ValueError, match="per_class: expected at least 2"):
        metrics.evaluate(load("digits"), (1,), per_class=1)

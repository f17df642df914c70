"""How good generated digits are: class accuracy, CAS, Frechet distance, precision and recall.

All are measured in the eyes of a small scikit-learn network trained on real digits; its hidden
activations are the feature space. The reference is the held-out test digits with the same shifts
that the generator was trained with (`maskgit.training.data.digits.with_shifts`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskgit.training.data.digits import Digits, load_split, with_shifts

if TYPE_CHECKING:
    from sklearn.neural_network import MLPClassifier

    from maskgit.pipelines.images import Pipeline

HIDDEN_UNITS = 64
NEIGHBOURS = 3

FloatArray = NDArray[np.floating[Any]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Quality of one set of images. `name` says which set."""

    name: str
    accuracy: float  # read as the class asked for, by a classifier trained on real digits
    cas: float  # classification accuracy score: trained on this set, tested on real test digits
    frechet: float  # Frechet distance of features to those of the real test digits; lower is better
    precision: float  # share of these images that lie in the manifold of the real ones
    recall: float  # share of the real images that lie in the manifold of these


class Judge:
    """A classifier trained on real digits, deterministic, and what it makes of other images."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        train, self.test = load_split()
        self.train = with_shifts(train)[0]
        self.reference = with_shifts(self.test)[0]
        self.classifier = fit_classifier(self.train, seed)
        self.reference_features = self.features(self.reference.images)

    @property
    def test_accuracy(self) -> float:
        """Accuracy of the classifier on the held-out real test digits."""
        return self.accuracy(self.test)

    def accuracy(self, digits: Digits) -> float:
        """Share of images read as their label."""
        predicted = self.classifier.predict(_flat(digits.images))
        return float(np.mean(predicted == digits.labels))

    def features(self, images: NDArray[np.float32]) -> FloatArray:
        """Hidden activations (n, 64) of the classifier, after its ReLU."""
        net = self.classifier
        hidden = _flat(images) @ net.coefs_[0] + net.intercepts_[0]
        return np.asarray(np.maximum(hidden, 0.0), dtype=np.float64)

    def score(self, name: str, digits: Digits) -> Scores:
        """All figures for one set of labelled images (at least two of them)."""
        features = self.features(digits.images)
        precision, recall = precision_recall(self.reference_features, features)
        return Scores(
            name=name,
            accuracy=self.accuracy(digits),
            cas=float(
                np.mean(
                    fit_classifier(digits, self.seed).predict(_flat(self.test.images))
                    == self.test.labels
                )
            ),
            frechet=frechet_distance(self.reference_features, features),
            precision=precision,
            recall=recall,
        )


def fit_classifier(digits: Digits, seed: int = 0) -> MLPClassifier:
    """A one-hidden-layer network fitted to digits; the same for the same data and seed."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    net = MLPClassifier(
        (HIDDEN_UNITS,), alpha=1e-3, learning_rate_init=3e-3, max_iter=40, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        net.fit(_flat(digits.images), digits.labels)
    return net


def frechet_distance(a: FloatArray, b: FloatArray) -> float:
    """Frechet distance between Gaussians fitted to rows of a (n, d) and b (m, d).

    `|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)` (Heusel et al. 2017); the symmetric
    form of the square root stays real for singular covariances.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{name}: expected at least two rows of features, got {x.shape}")
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0.0)).sum()
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
    return float(max(distance, 0.0))


def precision_recall(
    real: FloatArray, generated: FloatArray, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (n, d) and (m, d).

    A point is in a set's manifold if it is within some member's distance to that member's k-th
    nearest neighbour (itself not counted).
    """
    for name, x in (("real", real), ("generated", generated)):
        if len(x) <= k:
            raise ValueError(f"{name}: expected more than {k} rows of features, got {len(x)}")
    distance = _distances(real, generated)
    real_radius = np.sort(_distances(real, real), axis=1)[:, k]
    generated_radius = np.sort(_distances(generated, generated), axis=1)[:, k]
    precision = (distance <= real_radius[:, None]).any(0).mean()
    recall = (distance <= generated_radius[None, :]).any(1).mean()
    return float(precision), float(recall)


def _distances(a: FloatArray, b: FloatArray) -> FloatArray:
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2.0 * (a @ b.T)
    distance: FloatArray = np.sqrt(squares.clip(0.0))
    return distance


def evaluate(
    pipeline: Pipeline,
    steps: Sequence[int] = (1, 8),
    *,
    per_class: int = 100,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Score `per_class` generated digits of each class for each number of steps.

    Returns a JSON-able dict: the classifier's own accuracy on real test digits, and one row of
    `Scores` per number of steps; the first row is real training digits, as the ceiling. Settings
    are those of `Pipeline.fill`.
    """
    if per_class < 2:
        raise ValueError(f"per_class: expected at least 2, got {per_class}")
    judge = Judge()
    labels = np.arange(pipeline.num_classes).repeat(per_class)
    rows = [judge.score("real", _subset(judge.train, len(labels)))]
    for count in steps:
        images = pipeline.generate(labels.tolist(), num_steps=count, seeds=seed, **settings)
        digits = Digits(images.numpy(), labels)
        rows.append(judge.score(f"{count} step{'s' * (count > 1)}", digits))
    return {
        "classifier_test_accuracy": judge.test_accuracy,
        "per_class": per_class,
        "seed": seed,
        "steps": list(steps),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _subset(digits: Digits, count: int) -> Digits:
    """`count` of the digits, evenly by position in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(digits.labels))[:count]
    return Digits(digits.images[order], digits.labels[order])


def _flat(images: NDArray[np.float32]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1)

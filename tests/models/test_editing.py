"""Editing: what is kept is kept, what is masked is redrawn, regions are checked."""

import numpy as np
import pytest
import torch

from maskgit.evaluation import metrics
from maskgit.pipelines import editing
from maskgit.pipelines.editing import Box, EditError, box_mask, edit, guess_class, outpaint_mask
from maskgit.pipelines.images import Pipeline, load
from maskgit.pipelines.recipes import preset
from maskgit.training.data.digits import Digits, load_split

DIGITS = preset("digits").tokenizer
OFFICIAL = preset("maskgit-official").tokenizer


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("digits")


@pytest.fixture(scope="module")
def test_set() -> Digits:
    return load_split()[1]


def test_box_mask_covers_exactly_the_box() -> None:
    masked = box_mask(DIGITS, Box(1, 2, 4, 8))
    want = np.zeros((8, 8), dtype=bool)
    want[2:8, 1:4] = True
    assert np.array_equal(masked, want)


def test_box_mask_takes_every_cell_it_touches() -> None:
    masked = box_mask(OFFICIAL, Box(15, 16, 33, 17))
    assert sorted(zip(*np.nonzero(masked), strict=True)) == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1,2,3", "expected four whole numbers"),
        ("1,2,3,x", "expected four whole numbers"),
        ("", "expected four whole numbers"),
        ("3,3,3,5", "the empty box 3,3,3,5"),
        ("5,3,3,5", "the empty box"),
        ("0,0,9,4", r"numbers in 0\.\.8, got 0,0,9,4"),
        ("-1,0,3,4", r"numbers in 0\.\.8"),
    ],
)
def test_bad_boxes(text: str, match: str) -> None:
    with pytest.raises(EditError, match=match):
        box_mask(DIGITS, Box.parse(text, "--inpaint"), "--inpaint")


def test_outpaint_masks_the_other_half() -> None:
    for keep, kept in {
        "left": np.s_[:, :4],
        "right": np.s_[:, 4:],
        "top": np.s_[:4],
        "bottom": np.s_[4:],
    }.items():
        masked = outpaint_mask(DIGITS, keep)
        assert not masked[kept].any()
        assert masked.sum() == 32
    with pytest.raises(EditError, match="expected left, right, top, bottom, got 'up'"):
        outpaint_mask(DIGITS, "up")


def test_only_the_region_changes(pipeline: Pipeline, test_set: Digits) -> None:
    image = torch.from_numpy(test_set.images[17])
    masked = box_mask(DIGITS, Box(2, 2, 6, 6))
    result = edit(pipeline, image, masked, int(test_set.labels[17]), samples=3, seeds=1)
    assert tuple(result.after.shape) == (3, 1, 8, 8)
    outside = torch.from_numpy(~masked)
    assert torch.equal(result.after[:, 0][:, outside], image[0][outside].expand(3, -1))
    flat = torch.from_numpy(~masked.reshape(-1))
    assert torch.equal(result.tokens_after[:, flat], result.tokens_before[flat].expand(3, -1))
    assert bool((result.tokens_after[:, ~flat] != result.tokens_before[~flat]).any())
    assert not torch.equal(result.after[0], result.after[1])


def test_inpainted_digits_are_still_read_right(pipeline: Pipeline, test_set: Digits) -> None:
    judge, rows = metrics.Judge(), range(0, 363, 15)
    masked = box_mask(DIGITS, Box(2, 2, 6, 6))
    images = [
        edit(pipeline, torch.from_numpy(test_set.images[i]), masked, int(test_set.labels[i])).after[
            0
        ]
        for i in rows
    ]
    read = judge.accuracy(Digits(torch.stack(images).numpy(), test_set.labels[list(rows)]))
    blank = torch.from_numpy(test_set.images[list(rows)]).clone()
    blank[:, :, 2:6, 2:6] = 0
    erased = judge.accuracy(Digits(blank.numpy(), test_set.labels[list(rows)]))
    assert read >= 0.9
    assert read >= erased + 0.1


def test_swapped_class_is_read_as_the_new_one(pipeline: Pipeline, test_set: Digits) -> None:
    judge, rows = metrics.Judge(), range(0, 363, 18)
    masked = box_mask(DIGITS, Box(0, 0, 8, 8))
    masked[0, 0] = False
    classes = [(int(test_set.labels[i]) + 3) % 10 for i in rows]
    images = [
        edit(pipeline, torch.from_numpy(test_set.images[i]), masked, c).after[0]
        for i, c in zip(rows, classes, strict=True)
    ]
    assert judge.accuracy(Digits(torch.stack(images).numpy(), np.array(classes))) >= 0.9


def test_class_is_guessed_from_the_kept_part(pipeline: Pipeline, test_set: Digits) -> None:
    rows = list(range(0, 363, 9))
    tokens = pipeline.encode(test_set.images[rows])
    known = torch.ones(64, dtype=torch.bool)
    guesses = [guess_class(pipeline, t, known) for t in tokens]
    assert np.mean(np.array(guesses) == test_set.labels[rows]) >= 0.85
    known = torch.from_numpy(~outpaint_mask(DIGITS, "top").reshape(-1))
    hidden = tokens[0].masked_fill(~known, 3)
    assert guess_class(pipeline, tokens[0], known) == guess_class(pipeline, hidden, known)


def test_nothing_masked_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(EditError, match="nothing is masked"):
        edit(pipeline, torch.zeros(1, 8, 8), np.zeros((8, 8), dtype=bool), 0)


def test_halves_are_listed() -> None:
    assert editing.HALVES == ("left", "right", "top", "bottom")

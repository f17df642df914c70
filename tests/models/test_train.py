"""Training: the data, the masks, falling losses, and resuming to the same bits."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit.checkpoint import CheckpointError
from maskgit.models.config import TokenizerConfig, TransformerConfig
from maskgit.models.vqgan import Tokenizer
from maskgit.pipelines.recipes import PresetConfig
from maskgit.training.config import TrainConfig
from maskgit.training.data import digits
from maskgit.training.loop import (
    TrainState,
    fit,
    learning_rate,
    load_state,
    save_state,
    start,
    train,
)
from maskgit.training.tasks import TokenizerTask, TransformerTask, draw_mask, masked_count

TRAINING = TrainConfig(
    steps=60,
    batch_size=16,
    learning_rate=3e-3,
    warmup_steps=5,
    class_dropout=0.1,
    shift_augmentation=True,
    code_restart_steps=60,
)
TINY = PresetConfig(
    name="tiny",
    tokenizer=TokenizerConfig(
        image_size=8,
        image_channels=1,
        channels=8,
        channel_mults=(1, 1),
        num_res_blocks=1,
        codebook_size=8,
        embedding_dim=2,
        norm_groups=4,
    ),
    transformer=TransformerConfig(
        codebook_size=8,
        num_classes=10,
        num_tokens=16,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        mlp_size=48,
        null_class=True,
    ),
    tokenizer_training=TRAINING,
    transformer_training=TRAINING,
)


def make_task(name: str, preset: PresetConfig = TINY) -> TokenizerTask | TransformerTask:
    data = digits.load_split()[0]
    if name == "tokenizer":
        return TokenizerTask(preset, data)
    torch.manual_seed(0)
    return TransformerTask(preset, Tokenizer(preset.tokenizer), data)


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    from maskgit.training.loop import _state_tensors

    return _state_tensors(state)


def assert_same_bits(a: TrainState, b: TrainState) -> None:
    mine, theirs = everything(a), everything(b)
    assert mine.keys() == theirs.keys()
    assert a.step == b.step
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("name", ["tokenizer", "transformer"])
def test_loss_falls(name: str) -> None:
    losses: list[float] = []
    task = make_task(name)
    train(task, start(task, 0), progress=False, on_step=lambda _, f: losses.append(f["loss"]))
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize("name", ["tokenizer", "transformer"])
def test_resumed_run_has_the_same_bits(name: str, tmp_path: Path) -> None:
    task = make_task(name)
    whole = train(task, start(task, 3), until=24, progress=False)
    part = train(task, start(task, 3), until=11, progress=False)
    save_state(tmp_path / "state", task, part)
    torch.manual_seed(999)  # the global generator must not matter
    torch.rand(7)
    resumed = load_state(tmp_path / "state", make_task(name))
    assert_same_bits(part, resumed)
    train(task, resumed, until=24, progress=False)
    assert_same_bits(whole, resumed)


def test_fit_resumes_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(TRAINING, steps=20)
    preset = dataclasses.replace(TINY, transformer_training=short)
    want = fit(make_task("transformer", preset), 1, tmp_path / "a", progress=False)
    task = make_task("transformer", preset)
    real, calls = task.loss, []

    def interrupted(*args: object) -> object:
        calls.append(0)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(task, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(task, 1, tmp_path / "b", checkpoint_every=5, progress=False)
    monkeypatch.undo()
    assert load_state(tmp_path / "b", task).step == 10
    got = fit(task, 1, tmp_path / "b", resume=True, progress=False)
    for (name, a), (_, b) in zip(want.state_dict().items(), got.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(CheckpointError, match="made with seed 1, not 2"):
        fit(task, 2, tmp_path / "b", resume=True, progress=False)


def test_seed_decides_the_weights() -> None:
    task = make_task("transformer")
    runs = [train(task, start(task, seed), until=2, progress=False) for seed in (0, 0, 1)]
    assert_same_bits(runs[0], runs[1])
    name = "model.layers.0.mlp.up.weight"
    assert not torch.equal(everything(runs[0])[name], everything(runs[2])[name])


def test_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    task = make_task("tokenizer")
    save_state(tmp_path / "s", task, start(task, 0))
    other = dataclasses.replace(TINY, tokenizer_training=dataclasses.replace(TRAINING, steps=61))
    with pytest.raises(CheckpointError, match=r"training.steps = 60, not 61"):
        load_state(tmp_path / "s", make_task("tokenizer", other))
    with pytest.raises(CheckpointError, match="expected a 'train-transformer' file"):
        load_state(tmp_path / "s", make_task("transformer"))


def test_average_follows_the_weights() -> None:
    task = make_task("transformer")
    state = start(task, 0)
    name = "layers.0.mlp.up.weight"
    first = state.average[name].clone()
    train(task, state, until=1, progress=False)
    now = dict(state.model.named_parameters())[name].detach()
    torch.testing.assert_close(state.average[name], first + 0.9 * (now - first))


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = dataclasses.replace(TRAINING, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_masks_follow_the_cosine_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = draw_mask(torch.Size((20_000, 64)), "cosine", generator).sum(1)
    assert int(counts.min()) >= 1
    assert int(counts.max()) == 64
    # u uniform, count = ceil(64 cos(pi u / 2)): mean about 64 * 2 / pi + 1/2
    assert float(counts.double().mean()) == pytest.approx(64 * 2 / math.pi + 0.5, abs=0.5)
    assert masked_count(1.0, "cosine", 64) == 1
    assert masked_count(1e-9, "cosine", 64) == 64
    assert masked_count(0.5, "cosine", 64) == math.ceil(64 * math.cos(math.pi / 4))


def test_each_position_is_masked_equally_often() -> None:
    masked = draw_mask(torch.Size((8000, 16)), "cosine", torch.Generator().manual_seed(1))
    share = masked.double().mean(0)
    assert float((share - share.mean()).abs().max()) < 0.03


def test_split_is_fixed_stratified_and_disjoint() -> None:
    train_set, test_set = digits.load_split()
    assert train_set.images.shape[1:] == test_set.images.shape[1:] == (1, 8, 8)
    assert len(train_set.labels) + len(test_set.labels) == 1797
    share = np.bincount(test_set.labels) / np.bincount(
        np.concatenate([train_set.labels, test_set.labels])
    )
    np.testing.assert_allclose(share, 0.2, atol=0.005)
    assert train_set.images.min() >= 0.0
    assert train_set.images.max() == 1.0
    again = digits.load_split()
    assert np.array_equal(again[1].images, test_set.images)


def test_shifts_lose_no_ink_and_keep_labels() -> None:
    train_set, _ = digits.load_split()
    shifted, sources = digits.with_shifts(train_set)
    lost = train_set.images.sum((1, 2, 3))[sources] - shifted.images.sum((1, 2, 3))
    assert lost.max() <= digits.MAX_LOST_INK + 1e-5
    assert np.array_equal(shifted.labels, train_set.labels[sources])
    assert set(sources) == set(range(len(train_set.labels)))
    assert len(shifted.labels) > 2 * len(train_set.labels)
    one = np.zeros((1, 1, 8, 8), dtype=np.float32)
    one[0, 0, 3, 4] = 1.0
    moved, _ = digits.with_shifts(digits.Digits(one, np.array([7])))
    at = {tuple(int(v) for v in np.argwhere(image[0])[0]) for image in moved.images}
    assert at == {(3 + dy, 4 + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_loss_that_is_not_finite_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("tokenizer")
    state = start(task, 0)
    real = task.loss
    monkeypatch.setattr(task, "loss", lambda m, g: (real(m, g)[0] * float("nan"), {}))
    with pytest.raises(FloatingPointError, match="tokenizer: the loss is nan at step 0"):
        train(task, state, progress=False)

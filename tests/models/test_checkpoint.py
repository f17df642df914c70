"""Checkpoints: exact round trips, and one clear error for every way a file can be wrong."""

import dataclasses
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch

from maskgit import files
from maskgit.checkpoint import CheckpointError, digest_of, load_checkpoint, save_checkpoint
from maskgit.models.config import TokenizerConfig, TransformerConfig
from maskgit.models.transformer import MaskGitTransformer
from maskgit.models.vqgan import Tokenizer
from maskgit.pipelines.recipes import PresetConfig
from maskgit.pipelines.weights import load_weights, save_weights
from maskgit.settings import to_dict
from maskgit.training.config import TrainConfig

TRAINING = TrainConfig(steps=1, batch_size=1, learning_rate=1e-3)
TINY = PresetConfig(
    name="tiny",
    tokenizer=TokenizerConfig(
        image_size=4,
        image_channels=1,
        channels=4,
        channel_mults=(1,),
        num_res_blocks=1,
        codebook_size=6,
        embedding_dim=2,
        norm_groups=2,
    ),
    transformer=TransformerConfig(
        codebook_size=6,
        num_classes=2,
        num_tokens=16,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        mlp_size=8,
    ),
    tokenizer_training=TRAINING,
    transformer_training=TRAINING,
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer, transformer = Tokenizer(TINY.tokenizer), MaskGitTransformer(TINY.transformer)
    return save_weights(
        tmp_path / "w.safetensors", TINY, tokenizer, transformer, info={"seed": 5, "command": "x"}
    )


def rewrite(path: Path, change: object) -> None:
    """Let `change` edit a file's tensors and configuration, and save it with a valid digest."""
    checkpoint = load_checkpoint(path, kind="weights")
    tensors, config = dict(checkpoint.tensors), dict(checkpoint.config)
    change(tensors, config)  # type: ignore[operator]
    save_checkpoint(path, tensors, kind="weights", config=config, info=checkpoint.info)


def test_round_trip_is_exact(weights: Path) -> None:
    loaded = load_weights(weights)
    assert loaded.config == TINY
    assert loaded.info == {"seed": 5, "command": "x"}
    torch.manual_seed(0)
    tokenizer, transformer = Tokenizer(TINY.tokenizer), MaskGitTransformer(TINY.transformer)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(loaded.tokenizer.encode(images), tokenizer.eval().encode(images))
    assert not loaded.transformer.training
    assert not any(p.requires_grad for p in loaded.transformer.parameters())


def test_half_precision_file_loads_as_float32(tmp_path: Path) -> None:
    tokenizer, transformer = Tokenizer(TINY.tokenizer), MaskGitTransformer(TINY.transformer)
    path = tmp_path / "h.safetensors"
    save_weights(path, TINY, tokenizer, transformer, info={}, dtype=torch.float16)
    loaded = load_weights(path)
    assert loaded.transformer.head.dense.weight.dtype == torch.float32
    want = transformer.head.dense.weight.detach()
    torch.testing.assert_close(loaded.transformer.head.dense.weight, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_truncated_file(weights: Path, keep: float) -> None:
    data = weights.read_bytes()
    count = int(len(data) * keep) if isinstance(keep, float) else keep
    weights.write_bytes(data[:count])
    with pytest.raises(CheckpointError, match=r"w\.safetensors: not a readable safetensors file"):
        load_weights(weights)


def test_every_kind_of_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(CheckpointError, match="f: no such file"):
        load_weights(path)
    with pytest.raises(CheckpointError, match="got a directory"):
        load_weights(tmp_path)
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(CheckpointError, match="not a"):
        load_weights(path)
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="not a readable"):
        load_weights(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(CheckpointError, match="not a maskgit checkpoint"):
        load_weights(path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_weights(path)
    torch.save({"w": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError):
        load_weights(path)
    assert not (tmp_path / "exploded").exists()


def test_altered_tensor_is_noticed(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_weights(weights)


def test_wrong_tensors_are_named(weights: Path) -> None:
    name = "transformer.head.dense.weight"
    original = weights.read_bytes()
    cases = [
        (lambda t, c: t.pop(name), f"tensor '{name}' is missing"),
        (lambda t, c: t.update(zzz=torch.zeros(1)), "unexpected tensor 'zzz'"),
        (
            lambda t, c: t.update({name: torch.zeros(8, 9)}),
            rf"'{name}': expected shape \(8, 8\), got \(8, 9\)",
        ),
        (
            lambda t, c: t.update({name: torch.zeros(8, 8, dtype=torch.int64)}),
            rf"'{name}': expected torch.float32, got torch.int64",
        ),
        (lambda t, c: t[name].fill_(float("nan")), f"'{name}' has values that are not finite"),
    ]
    for change, message in cases:
        weights.write_bytes(original)
        rewrite(weights, change)
        with pytest.raises(CheckpointError, match=message):
            load_weights(weights)


def test_wrong_configuration_is_named(weights: Path) -> None:
    original = weights.read_bytes()
    cases = [
        (lambda t, c: c.pop("transformer"), "'transformer' is missing"),
        (lambda t, c: c.update(extra=1), "unknown field 'extra'"),
        (lambda t, c: c["transformer"].update(hidden_size="8"), "hidden_size: expected int"),
        (lambda t, c: c["transformer"].update(hidden_size=16), r"expected shape .*16"),
        (lambda t, c: c["transformer"].update(codebook_size=7), "codebook_size: the tokenizer has"),
    ]
    for change, message in cases:
        weights.write_bytes(original)
        rewrite(weights, change)
        with pytest.raises(CheckpointError, match=message):
            load_weights(weights)


def test_kind_and_version_are_checked(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a 'train-tokenizer' file, got 'weights'"):
        load_checkpoint(weights, kind="train-tokenizer")
    from safetensors.torch import save_file

    path = tmp_path / "v"
    tensors = {"a": torch.zeros(1)}
    metadata = {"format": "maskgit-checkpoint", "format_version": "99", "kind": "weights"}
    save_file(tensors, str(path), metadata)
    with pytest.raises(CheckpointError, match="format version '99'"):
        load_weights(path)
    metadata |= {"format_version": "1", "sha256": digest_of(tensors, "{", ""), "config": "{"}
    save_file(tensors, str(path), metadata)
    with pytest.raises(CheckpointError, match="metadata 'config' is missing or not JSON"):
        load_weights(path)


def test_digest_depends_on_name_shape_dtype_and_value() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.float64)},
        {"a": torch.ones(2, 3)},
    ]
    digests = {digest_of(t) for t in [base, *others]}
    assert len(digests) == 5
    assert digest_of({"a": torch.zeros(3, 2).t()}) == digest_of(base)


def test_failed_write_leaves_the_old_file(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights.read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(weights, {"a": torch.zeros(1)}, kind="weights", config={}, info={})
    assert weights.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        files.check_writable(tmp_path / "nowhere" / "a")
    with pytest.raises(IsADirectoryError, match="got the directory"):
        files.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        files.check_writable(tmp_path / "file" / "a")


def test_configuration_is_readable_json(weights: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(weights), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == json.loads(json.dumps(to_dict(TINY)))
    assert dataclasses.asdict(TINY)["name"] == "tiny"

"""The transformer: sizes of the presets, and the forward pass against plain numpy in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from maskgit.models.config import TransformerConfig
from maskgit.models.transformer import MaskGitTransformer
from maskgit.pipelines.recipes import preset
from maskgit.settings import ConfigError, from_dict, to_dict

TINY = TransformerConfig(
    codebook_size=11,
    num_classes=3,
    num_tokens=6,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    mlp_size=40,
    null_class=True,
)


def tiny_model(seed: int = 0) -> MaskGitTransformer:
    """A double-precision model with every parameter random, norms and biases included."""
    torch.manual_seed(seed)
    model = MaskGitTransformer(TINY).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.5)
    return model


def tiny_inputs(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, TINY.codebook_size, (batch, 6), generator=generator)
    tokens[:, ::2] = TINY.mask_token_id
    return tokens, torch.arange(batch) % (TINY.num_classes + 1)


def numpy_forward(model: MaskGitTransformer, tokens: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Independent post-LN BERT: separate q, k, v, explicit softmax, whole vocabulary."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    eps, heads = TINY.layer_norm_eps, TINY.num_heads

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    ids = np.concatenate([(TINY.codebook_size + classes)[:, None], tokens], axis=1)
    x = w["embedding.word.weight"][ids] + w["embedding.position.weight"][None, : ids.shape[1]]
    x = norm(x, "embedding.norm")
    width = TINY.hidden_size
    for i in range(TINY.num_layers):
        name = f"layers.{i}.attention"
        q, k, v = np.split(linear(x, f"{name}.qkv"), 3, axis=-1)
        mixed = np.zeros_like(x)
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            scores = q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(width // heads)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[..., part] = scores / scores.sum(-1, keepdims=True) @ v[..., part]
        x = norm(x + linear(mixed, f"{name}.out"), f"{name}.norm")
        name = f"layers.{i}.mlp"
        x = norm(x + linear(gelu(linear(x, f"{name}.up")), f"{name}.down"), f"{name}.norm")
    x = norm(gelu(linear(x, "head.dense")), "head.norm")
    logits = x @ w["embedding.word.weight"].T + w["head.bias"]
    return logits[:, 1:, : TINY.codebook_size]


def test_forward_equals_numpy() -> None:
    model, (tokens, classes) = tiny_model(), tiny_inputs()
    got = model(tokens, classes).detach().numpy()
    want = numpy_forward(model, tokens.numpy(), classes.numpy())
    assert got.shape == (5, 6, 11)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_post_norm_hidden_is_normalised() -> None:
    torch.manual_seed(0)
    model = MaskGitTransformer(TINY).eval()
    hidden = model.hidden(*tiny_inputs())
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(5, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.var(-1, correction=0), torch.ones(5, 6), atol=1e-3, rtol=0)


def test_head_multiplies_by_codebook_rows_only() -> None:
    model = tiny_model()
    weight, bias = model.head_weight()
    assert weight.shape == (11, 24)
    assert bias.shape == (11,)
    assert weight.data_ptr() == model.embedding.word.weight.data_ptr()
    tokens, classes = tiny_inputs()
    before = model(tokens, classes)
    with torch.no_grad():
        model.head.bias[11:] = float("nan")  # the rows of classes and mask must never be read here
    assert torch.equal(model(tokens, classes), before)


def test_positions_see_each_other_and_rows_do_not() -> None:
    model, (tokens, classes) = tiny_model(), tiny_inputs()
    before = model(tokens, classes)
    tokens[0, -1] = (tokens[0, -1] + 1) % TINY.codebook_size
    after = model(tokens, classes)
    assert not torch.allclose(after[0, 0], before[0, 0])
    torch.testing.assert_close(after[1:], before[1:])


def test_class_token_matters() -> None:
    model, (tokens, classes) = tiny_model(), tiny_inputs()
    assert not torch.allclose(model(tokens, classes), model(tokens, (classes + 1) % 4))


@pytest.mark.parametrize(("name", "heads"), [("maskgit-paper", 8), ("maskgit-official", 16)])
def test_official_presets(name: str, heads: int) -> None:
    config = preset(name).transformer
    assert (config.num_heads, config.num_layers, config.hidden_size) == (heads, 24, 768)
    assert (config.vocab_size, config.mask_token_id, config.null_class_id) == (2025, 2024, None)
    with torch.device("meta"):
        model = MaskGitTransformer(config)
        tokens, classes = torch.zeros(2, 256, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        assert model(tokens, classes).shape == (2, 256, 1024)
    # embeddings 1,754,112 + 24 layers of 7,087,872 + head 594,153
    assert sum(p.numel() for p in model.parameters()) == 172_457_193
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["embedding.word.weight"] == (2025, 768)
    assert shapes["embedding.position.weight"] == (257, 768)
    assert shapes["layers.23.attention.qkv.weight"] == (2304, 768)
    assert shapes["head.bias"] == (2025,)


def test_digits_preset_has_a_no_class_id() -> None:
    config = preset("digits").transformer
    assert config.null_class_id == config.codebook_size + 10
    assert config.mask_token_id == config.codebook_size + 11 == config.vocab_size - 1


@pytest.mark.parametrize(
    ("tokens", "classes", "match"),
    [((2, 5), (2,), "tokens"), ((6,), (2,), "tokens"), ((2, 6), (3,), "class_ids")],
)
def test_wrong_shapes_are_named(tokens: tuple, classes: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_model()(
            torch.zeros(tokens, dtype=torch.int64), torch.zeros(classes, dtype=torch.int64)
        )


@pytest.mark.parametrize("name", ["digits", "maskgit-paper", "maskgit-official"])
def test_config_round_trip(name: str) -> None:
    import json

    config = preset(name)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_config_errors_name_the_field() -> None:
    data = to_dict(TINY)
    with pytest.raises(ConfigError, match="unknown field 'colour'"):
        from_dict(TransformerConfig, {**data, "colour": 1})
    with pytest.raises(ConfigError, match=r"hidden_size.*expected int.*'x'"):
        from_dict(TransformerConfig, {**data, "hidden_size": "x"})
    with pytest.raises(ConfigError, match="'num_heads' is missing"):
        from_dict(TransformerConfig, {k: v for k, v in data.items() if k != "num_heads"})
    with pytest.raises(ConfigError, match="num_heads: 5 does not divide"):
        dataclasses.replace(TINY, num_heads=5)
    with pytest.raises(ConfigError, match="num_layers: expected more than 0"):
        dataclasses.replace(TINY, num_layers=0)
    with pytest.raises(ConfigError, match="preset: expected digits"):
        preset("nope")

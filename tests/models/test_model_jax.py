"""The JAX model against the torch model, one file for both; the whole loop as one program."""

import dataclasses

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
import jax.numpy as jnp  # noqa: E402

from maskgit.models import transformer, transformer_jax  # noqa: E402
from maskgit.pipelines import images, images_jax  # noqa: E402
from maskgit.pipelines.recipes import preset  # noqa: E402
from maskgit.pipelines.weights import load_weights  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    return images_jax.load(images.WEIGHTS_DIR / "digits.safetensors")


def official(layers):
    """google-research/maskgit's transformer: 16 heads of 48."""
    return dataclasses.replace(preset("maskgit-official").transformer, num_layers=layers)


def pair(config, seed=0):
    torch.manual_seed(seed)
    net = transformer.MaskGitTransformer(config).eval()
    with torch.no_grad():  # biases and norms that are not the identity
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return net, transformer_jax.from_torch(net.state_dict())


def inputs(config, batch, seed=1):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.codebook_size, (batch, config.num_tokens))
    tokens[rng.random(tokens.shape) < 0.6] = config.mask_token_id
    return tokens, rng.integers(0, config.num_classes, batch)


@pytest.mark.parametrize("layers", [2, pytest.param(24, marks=pytest.mark.slow)])
def test_the_official_forward_is_that_of_torch(layers):
    """Both in float32, against torch in float64: an error of at most twice torch's own and an eps."""
    config = official(layers)
    assert (config.num_heads, config.hidden_size) == (16, 768)
    net, params = pair(config)
    tokens, classes = inputs(config, 2)
    classes %= 250
    given = torch.from_numpy(tokens), torch.from_numpy(classes)
    with torch.inference_mode():
        theirs = net(*given).numpy()
        exact = net.double()(*given).numpy()
    small = jnp.asarray(classes, jnp.uint8)  # ids of the words do not fit into their dtype
    ours = np.asarray(transformer_jax.logits(params, config, jnp.asarray(tokens), small))
    own, other = np.abs(ours - exact).max(), np.abs(theirs - exact).max()
    assert own <= 2 * other + np.finfo(np.float32).eps * np.abs(exact).max()


def test_one_file_serves_both(digits):
    net = load_weights(images.WEIGHTS_DIR / "digits.safetensors").transformer
    tokens, classes = inputs(net.config, 3)
    with torch.inference_mode():
        expected = net(torch.from_numpy(tokens), torch.from_numpy(classes)).numpy()
    got = transformer_jax.logits(
        digits.params, digits.config.transformer, jnp.asarray(tokens), jnp.asarray(classes)
    )
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())


def test_generation_is_one_program_and_gives_the_tokens_of_torch(digits):
    classes, seeds = np.arange(6) % 10, np.arange(6) + 100
    words = np.stack([seeds, seeds * 0], axis=1).astype(np.uint32)
    before = images_jax._program.cache_info().misses
    got = np.asarray(images_jax.generate(digits, jnp.asarray(classes), seeds=jnp.asarray(words)))
    expected = images.load().generate_tokens(classes.tolist(), seeds=seeds.tolist()).tokens.numpy()
    assert (
        got == expected
    ).mean() > 0.99  # near ties may go the other way, and change what follows
    other = images_jax.generate(digits, jnp.asarray(classes[::-1]), seeds=jnp.asarray(words + 1))
    assert (np.asarray(other) != got).any()
    assert images_jax._program.cache_info().misses == before + 1


def test_generation_has_no_host_callback_and_traces_seeds_and_classes(digits):
    config = digits.config.transformer

    @jax.jit
    def run(params, classes, seeds):
        weights = images_jax.Weights(params, digits.config)
        return images_jax.generate(weights, classes, seeds=seeds, num_steps=3)

    args = digits.params, jnp.arange(2), jnp.zeros((2, 2), jnp.uint32)
    text = run.lower(*args).as_text()
    assert "callback" not in text
    out = np.asarray(run(*args))
    assert out.shape == (2, config.num_tokens)
    assert (out < config.codebook_size).all()


def test_known_tokens_stay(digits):
    config = digits.config.transformer
    tokens = np.full((2, config.num_tokens), config.mask_token_id)
    tokens[:, :5] = 7
    out = images_jax.generate(
        digits, jnp.array([1, 2]), seeds=jnp.zeros((2, 2), jnp.uint32), tokens=jnp.asarray(tokens)
    )
    assert (np.asarray(out)[:, :5] == 7).all()


def test_what_does_not_fit_is_named(digits, tmp_path):
    seeds = jnp.zeros((2, 2), jnp.uint32)
    bare = dataclasses.replace(digits.config.transformer, null_class=False)
    bare = digits._replace(config=dataclasses.replace(digits.config, transformer=bare))
    with pytest.raises(ValueError, match="no null class"):
        images_jax.generate(bare, jnp.arange(2), seeds=seeds, guidance_scale=2.0)
    with pytest.raises(ValueError, match="tokens: expected shape"):
        images_jax.generate(digits, jnp.arange(2), seeds=seeds, tokens=jnp.zeros((2, 3), jnp.int32))
    for wrong, message in (
        ({"num_steps": 2.0}, "num_steps: expected an integer"),
        ({"guidance_scale": "a"}, "guidance_scale: expected a number"),
        ({"tokens": np.full((2, digits.config.transformer.num_tokens), 9999)}, "tokens: expected ids"),
        ({"seeds": np.array([0.5, 1.5])}, "seeds: expected integers"),
        ({"class_ids": np.array([0.5, 1.7])}, "class_ids: expected integers"),
        ({"class_ids": np.array([0, 12])}, r"class_ids: expected ids in \[0, 11\), got 12"),
        ({"class_ids": np.array([0, 2**32])}, "class_ids: expected ids"),
        ({"class_ids": jnp.array([-1, 0])}, "class_ids: expected ids"),
        ({"backend": "pallas"}, "backend: 'pallas' cannot run"),
    ):  # fmt: skip
        options = {"class_ids": jnp.arange(2), "seeds": seeds, "num_steps": 2} | wrong
        with pytest.raises((TypeError, ValueError), match=message):
            images_jax.generate(digits, **options)
    assert (
        images_jax.generate(digits, jnp.arange(2), seeds=seeds, num_steps=jnp.int32(2)).shape[0]
        == 2
    )
    with pytest.raises(ValueError, match="no such file"):
        images_jax.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a readable"):
        images_jax.load(tmp_path / "bad.safetensors")
    short = {k: v for k, v in digits.params.items() if k != "head.bias"}
    with pytest.raises(ValueError, match=r"'head.bias' is missing"):
        transformer_jax.check(short, digits.config.transformer)
    raw = bytearray((images.WEIGHTS_DIR / "digits.safetensors").read_bytes())
    raw[-5] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="SHA-256"):
        images_jax.load(tmp_path / "altered.safetensors")


def test_guidance_uses_the_null_class(digits):
    args = {"seeds": jnp.zeros((3, 2), jnp.uint32), "num_steps": 2}
    weak, strong = (
        np.asarray(images_jax.generate(digits, jnp.arange(3), guidance_scale=scale, **args))
        for scale in (1.0, 8.0)
    )
    assert (weak != strong).any()


def test_all_64_bits_of_a_seed_count(digits):
    seeds = np.array([1, 2**32 + 1, 2**40], np.int64)
    out = np.asarray(images_jax.generate(digits, np.array([1, 1, 1]), seeds=seeds, num_steps=2))
    assert len(np.unique(out, axis=0)) == 3
    with pytest.raises(ValueError, match="seeds: expected"):
        images_jax.generate(digits, np.array([1]), seeds=None)

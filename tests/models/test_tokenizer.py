"""The tokenizer: quantiser arithmetic by hand, gradients, shapes of the official layout."""

import pytest
import torch

from maskgit.models.config import TokenizerConfig
from maskgit.models.vqgan import Quantizer, Tokenizer
from maskgit.pipelines.recipes import preset
from maskgit.settings import ConfigError

TINY = TokenizerConfig(
    image_size=8,
    image_channels=1,
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    codebook_size=5,
    embedding_dim=2,
    norm_groups=4,
)


def tiny(seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(TINY).eval()


def test_nearest_is_brute_force_with_lowest_tie() -> None:
    quantizer = Quantizer(TINY)
    vectors = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    want = (vectors[:, None] - quantizer.codebook[None]).square().sum(-1).argmin(1)
    assert torch.equal(quantizer.nearest(vectors), want)
    quantizer.codebook[:] = torch.tensor([[9.0, 9], [1, 0], [-1, 0], [1, 0], [9, 9]])
    assert quantizer.nearest(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist() == [1, 1]


def test_gradient_passes_straight_through() -> None:
    quantizer = Quantizer(TINY).eval()
    encoded = torch.randn(2, 2, 4, 4, requires_grad=True)
    out = quantizer(encoded)
    weights = torch.randn(out.codes.shape)
    (out.codes * weights).sum().backward()
    torch.testing.assert_close(encoded.grad, weights)
    codes = quantizer.codebook[out.tokens].reshape(2, 4, 4, 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(out.codes.detach(), codes)
    torch.testing.assert_close(out.commitment, (encoded.detach() - codes).square().mean())


def test_codebook_moves_by_exponential_average() -> None:
    quantizer = Quantizer(TINY).train()
    start = torch.tensor([[0.0, 0], [10, 0], [0, 10], [-10, 0], [0, -10]])
    quantizer.codebook.copy_(start)
    quantizer.ema_sum.copy_(start)
    encoded = torch.tensor([[11.0, 0], [13, 0], [11, 1], [0, 12]]).T.reshape(1, 2, 2, 2)
    quantizer(encoded)
    count = torch.tensor([0.99, 0.99 + 0.03, 0.99 + 0.01, 0.99, 0.99])
    total = 0.99 * start + 0.01 * torch.tensor([[0.0, 0], [35, 1], [0, 12], [0, 0], [0, 0]])
    torch.testing.assert_close(quantizer.codebook, total / count[:, None])


def test_eval_mode_leaves_the_codebook() -> None:
    model = tiny()
    before = model.quantizer.codebook.clone()
    model(torch.rand(2, 1, 8, 8))
    assert torch.equal(model.quantizer.codebook, before)


def test_restart_moves_dead_codes_only() -> None:
    quantizer = Quantizer(TINY)
    before = quantizer.codebook.clone()
    quantizer.ema_count.copy_(torch.tensor([5.0, 0.0, 5.0, 0.05, 5.0]))
    encoded = torch.randn(3, 2, 2, 2) + 100
    moved = quantizer.restart_dead_codes(encoded, torch.Generator().manual_seed(0))
    assert moved == 2
    assert torch.equal(quantizer.codebook[[0, 2, 4]], before[[0, 2, 4]])
    rows = encoded.permute(0, 2, 3, 1).reshape(-1, 2)
    for code in (1, 3):
        assert (rows == quantizer.codebook[code]).all(1).any()


def test_encode_decode_shapes_and_agreement_with_forward() -> None:
    model, images = tiny(), torch.rand(3, 1, 8, 8)
    tokens = model.encode(images)
    reconstruction, quantized = model(images)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, quantized.tokens)
    torch.testing.assert_close(model.decode(tokens), reconstruction.clamp(0, 1))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 8), (1, 1, 8, 9)])
def test_encode_names_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 1, 8, 8\)"):
        tiny().encode(torch.zeros(shape))


def test_decode_refuses_ids_outside_the_codebook() -> None:
    with pytest.raises(ValueError, match=r"ids in 0\.\.4, got 0\.\.5"):
        tiny().decode(torch.tensor([[0] * 15 + [5]]))
    with pytest.raises(ValueError, match=r"shape \(B, 16\)"):
        tiny().decode(torch.zeros(1, 15, dtype=torch.int64))


def test_official_layout() -> None:
    config = preset("maskgit-official").tokenizer
    assert (config.grid_size, config.num_tokens, config.downsampling) == (16, 256, 16)
    with torch.device("meta"):
        model = Tokenizer(config)
        assert model.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 256)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["quantizer.codebook"] == (1024, 256)
    assert shapes["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert "encoder.conv_in.bias" not in shapes
    assert "encoder.conv_out.bias" in shapes
    assert shapes["encoder.conv_out.weight"] == (256, 512, 1, 1)
    assert shapes["decoder.conv_in.weight"] == (512, 256, 3, 3)
    assert shapes["decoder.conv_out.weight"] == (3, 128, 3, 3)
    for half in ("encoder", "decoder"):
        blocks = {k.rsplit(".", 2)[0] for k in shapes if k.startswith(half) and ".conv1." in k}
        assert len(blocks) == 12  # 5 levels and the middle, 2 each
    assert sum(k.startswith("decoder.upsample") and k.endswith("weight") for k in shapes) == 4
    # where the width changes, the 1x1 shortcut acts on the branch's output
    shortcuts = {k: s for k, s in shapes.items() if "shortcut" in k}
    assert sorted(s[0] for s in shortcuts.values()) == [128, 256, 256, 512]
    assert all(s[0] == s[1] and s[2:] == (1, 1) for s in shortcuts.values())


def test_bad_sizes_are_refused() -> None:
    good = {"image_channels": 1, "num_res_blocks": 1, "codebook_size": 4, "embedding_dim": 2}
    with pytest.raises(ConfigError, match="image_size: expected a multiple of 2, got 7"):
        TokenizerConfig(image_size=7, channels=8, channel_mults=(1, 1), norm_groups=4, **good)
    with pytest.raises(ConfigError, match="norm_groups: 3 does not divide 8"):
        TokenizerConfig(image_size=8, channels=8, channel_mults=(1,), norm_groups=3, **good)

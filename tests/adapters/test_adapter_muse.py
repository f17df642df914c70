"""The Muse adapter: tokens of recorded runs, and those of its loop said again, through a stub model."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import on_toy, patch_toy

import maskgit
from maskgit import StepNoise, adapters

torch = pytest.importorskip("torch")
from maskgit.adapters import muse  # noqa: E402

BACKENDS = [n for n in ("cpp", "torch", "reference") if maskgit.available_backends()[n] is None]
SIDE, V, DIM, ROWS = 4, 24, 12, 2
N, MASK, TEXTS = SIDE * SIDE, V, ["a", "bb"]
GOLDEN = {
    "muse": {"cond_scale": 3.0},
    "muse-warm": {"cond_scale": 1.5, "temperature": 2.0, "topk_filter_thres": 0.5, "timesteps": 8},
    "muse-remask": {"cond_scale": 3.0, "can_remask_prev_masked": True},
    "muse-critic": {"cond_scale": 3.0},
    "muse-cfg-bf16": {"cond_scale": 3.0},
    "muse-critic-cfg-bf16": {"cond_scale": 3.0},
    "muse-self-critic": {"cond_scale": 3.0},
}


def noise(step):
    rng = np.random.default_rng(step)
    token, choice = rng.gumbel(size=(ROWS, N, V)), rng.gumbel(size=(ROWS, N))
    return StepNoise(torch.from_numpy(token).float(), torch.from_numpy(choice).float())


class Transformer(torch.nn.Module):
    """A small network with the interface of theirs; a critic has one output."""

    def __init__(self, dim_out=V, self_cond=False):
        super().__init__()
        torch.manual_seed(dim_out)
        self.embed, self.self_cond = torch.nn.Embedding(V + 1, DIM), self_cond
        self.to_logits = torch.nn.Linear(DIM, dim_out, bias=False)
        self.to_logits.weight.data *= 6
        self.drops = []

    def encode_text(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])

    def forward(
        self, x, return_embed=False, return_logits=False, labels=None, ignore_index=0,
        self_cond_embed=None, cond_drop_prob=0.0, conditioning_token_ids=None, texts=None,
        text_embeds=None,
    ):  # fmt: skip
        self.drops.append(cond_drop_prob)
        h = self.embed(x)
        h = h + 0.7 * h.roll(1, 1) - 0.4 * h.roll(-2, 1)
        place = torch.arange(N)[:, None] + text_embeds[:, None] * (1 - cond_drop_prob)
        h = h + torch.sin(place * torch.arange(1.0, DIM + 1))
        if self_cond_embed is not None:
            h = h + 0.3 * self_cond_embed
        if conditioning_token_ids is not None:
            h = h + 0.3 * self.embed(conditioning_token_ids)
        return (self.to_logits(h), h) if return_embed else self.to_logits(h)

    def forward_with_cond_scale(self, *args, cond_scale=3.0, return_embed=False, **kwargs):
        c, embed = self(*args, return_embed=True, **kwargs)
        u = self(*args, cond_drop_prob=1.0, **kwargs) if cond_scale != 1 else c
        out = u + (c - u) * cond_scale
        return (out, embed) if return_embed else out


class SelfCritic(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.to_pred = net, torch.nn.Linear(DIM, 1)

    def forward_with_cond_scale(self, x, **kwargs):
        return self.to_pred(self.net.forward_with_cond_scale(x, return_embed=True, **kwargs)[1])


def in_eval(function):  # as theirs: nothing of the function shows
    def inner(model, *args, **kwargs):
        training = model.training
        model.eval()
        out = function(model, *args, **kwargs)
        model.train(training)
        return out

    return inner


class MaskGit(torch.nn.Module):
    """The interface of theirs, and its loop said again."""

    image_size, mask_id, no_mask_token_prob, vae = 64, MASK, 0.25, None

    def __init__(self, critic=None, self_cond=False, conditioned=False):
        super().__init__()
        self.transformer = Transformer(self_cond=self_cond)
        kinds = {"token": lambda: Transformer(1), "self": lambda: SelfCritic(self.transformer)}
        self.token_critic = kinds[critic]() if critic else None
        self.self_cond, self.resize_image_for_cond_image = self_cond, conditioned
        self.cond_vae = SimpleNamespace(encode=lambda images: (None, images, None))

    def noise_schedule(self, time):
        return torch.cos(time * math.pi * 0.5)

    @torch.no_grad()
    @in_eval
    def generate(
        self, texts, negative_texts=None, cond_images=None, fmap_size=None, temperature=1.0,
        topk_filter_thres=0.9, can_remask_prev_masked=False, force_not_use_token_critic=False,
        timesteps=18, cond_scale=3, critic_noise_scale=1,
    ):  # fmt: skip
        if self.training:  # no assert: pytest writes those anew, and code is compared with its file
            raise RuntimeError
        given = {"text_embeds": self.transformer.encode_text(texts), "cond_scale": cond_scale}
        given["conditioning_token_ids"] = cond_images
        x, bad, embed = torch.full((len(texts), N), MASK), torch.zeros(len(texts), N), None
        for i, time in enumerate(torch.linspace(0, 1, timesteps)):
            token, choice = noise(i)
            again = bad.topk(max(int(self.noise_schedule(time) * N), 1)).indices
            x = x.scatter(1, again, MASK)
            logits, embed = self.transformer.forward_with_cond_scale(
                x, return_embed=True, self_cond_embed=embed, **given
            )
            embed = embed if self.self_cond else None
            kept = logits.topk(math.ceil((1 - topk_filter_thres) * V)).values[..., -1:]
            left = (timesteps - 1 - i) / timesteps
            keys = logits.masked_fill(logits < kept, -torch.inf) + temperature * left * token
            drawn, masked = keys.argmax(-1), x == MASK
            x = torch.where(masked, drawn, x)
            if self.token_critic is None or force_not_use_token_critic:
                bad = 1 - logits.double().softmax(-1).gather(2, drawn[..., None])[..., 0]
                bad = bad if can_remask_prev_masked else bad.masked_fill(~masked, -1e5)
            else:
                bad = self.token_critic.forward_with_cond_scale(x, **given)[..., 0]
                uniform = (-(-choice).exp()).exp()
                bad = bad + (uniform - 0.5) * critic_noise_scale * left
        return x.view(-1, SIDE, SIDE)


@functools.lru_cache
def recorded(name):
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        kind = getattr(torch, json.loads(str(file["meta"]))["dtype"])
    return golden | {key: golden[key].to(kind) for key in ("logits", "uncond_logits")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_codebase_itself_did(name, backend):
    golden, model, seen, judged = recorded(name), MaskGit(), [], []

    def forward(ids, return_embed=False, cond_drop_prob=0.0, **_):
        if cond_drop_prob == 0:
            seen.append(ids.int())
            return golden["logits"][len(seen) - 1], None
        return golden["uncond_logits"][len(seen) - 1]

    def judge(ids, **_):
        judged.append(ids.int())
        return -golden["scores"][len(seen) - 1][..., None]

    def given(step):
        token = golden["token_gumbel"][step].float()
        if "critic" not in name:
            return StepNoise(token)
        uniform = 0.5 - golden["choice_gumbel"][step].double()
        return StepNoise(token, -(-uniform.log()).log())

    model.transformer.forward = forward
    if "critic" in name:
        model.token_critic = SimpleNamespace(forward_with_cond_scale=judge)
    options = {"timesteps": 6, "topk_filter_thres": 0.8, "noise": given, "hidden_states": False}
    options |= {"fmap_size": SIDE, "backend": backend} | GOLDEN[name]
    final = muse.generate(model, TEXTS, **options).flatten(1).int()
    assert torch.equal(torch.stack(seen), golden["tokens"])
    assert torch.equal(final, golden["expected"][-1])
    if judged:
        assert torch.equal(torch.stack(judged), golden["candidates"][:-1])


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("scale", [1, 2.5])
@pytest.mark.parametrize("critic", [None, "remask", "token", "self", "unused"])
def test_the_tokens_are_those_of_their_loop(critic, scale, hidden):
    kinds = {"token": "token", "self": "self", "unused": "token"}
    model = MaskGit(kinds.get(critic), self_cond=critic != "token", conditioned=True)
    given = {
        "cond_scale": scale,
        "fmap_size": SIDE,
        "cond_images": torch.arange(2 * N).view(2, N) % V,
    }
    given |= {"force_not_use_token_critic": critic == "unused", "topk_filter_thres": 0.7}
    given["can_remask_prev_masked"] = critic == "remask"
    for temperature in (0.0, 1.5):
        expected = model.generate(TEXTS, temperature=temperature, timesteps=7, **given)
        with on_toy(model, noise=noise, hidden_states=hidden) as handle:
            got = model.generate(TEXTS, temperature=temperature, timesteps=7, **given)
        assert torch.equal(got, expected)
        assert model.training
        assert any("hidden" in sentence for sentence in handle.report.notes) == hidden


def test_passes_whose_results_are_dropped_are_not_made():
    model = MaskGit("self")
    with on_toy(model):
        model.generate(TEXTS, fmap_size=SIDE, timesteps=5)
    drops = model.transformer.drops
    assert (drops.count(0.0), drops.count(1.0)) == (5 + 4, 5)


def test_manual_seed_repeats_a_run():
    model, runs = MaskGit("token"), []
    with on_toy(model) as handle:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model.generate(TEXTS, fmap_size=SIDE))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert all(((run >= 0) & (run < V)).all() for run in runs)
    assert handle.report.calls == 3
    assert handle.report.version == "MaskGit with a Transformer, not known, trusted"


def test_patching_is_undone_and_done_once():
    model = MaskGit()
    before = dict(vars(model))
    with on_toy(model) as handle:
        assert handle.report.adapter == "muse"
        with pytest.raises(adapters.AdapterError, match="patched already"):
            patch_toy(model)
    assert vars(model) == before
    for owner, name in ((model, "generate"), (model.transformer, "forward")):
        object.__setattr__(owner, name, lambda texts, steps: None)
        before = dict(vars(model))
        with pytest.raises(adapters.AdapterError, match=f"unknown version of .*{name}"):
            patch_toy(model)
        assert vars(model) == before
        object.__delattr__(owner, name)
    assert not any(muse.matches(other) for other in (MaskGit, torch, None, Transformer()))


def test_wrong_arguments_are_named():
    model = MaskGit()
    with pytest.raises(ValueError, match="backend"):
        patch_toy(model, backend="none such")
    model.no_mask_token_prob = 0.0
    wrong = {"negative_texts": TEXTS, "can_remask_prev_masked": True, "fmap_size": None}
    wrong |= {"temperature": -1.0}
    with on_toy(model):
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=name):
                model.generate(TEXTS, **({"fmap_size": SIDE} | {name: value}))
        model.resize_image_for_cond_image = True
        with pytest.raises(ValueError, match="cond_images"):
            model.generate(TEXTS, fmap_size=SIDE)
    assert model.training

"""The TiTok adapter: tokens of recorded runs, and those of its loop said again, through a stub model."""

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
from maskgit.adapters import titok  # noqa: E402

BACKENDS = [n for n in ("cpp", "torch", "reference") if maskgit.available_backends()[n] is None]
V, N, ROWS = 20, 16, 3
GOLDEN = {
    "titok": {"guidance_scale": 0.0},
    "titok-cold": {"guidance_scale": 0.0, "randomize_temperature": 0.5, "num_sample_steps": 8},
    "titok-cfg": {"guidance_scale": 2.0, "randomize_temperature": 1.0},
    "titok-cfg-bf16": {"guidance_scale": 4.5},
}
LABELS = torch.arange(ROWS)


def noise(step):
    rng = np.random.default_rng(step)
    token, choice = rng.gumbel(size=(ROWS, N, V)), rng.gumbel(size=(ROWS, N))
    return StepNoise(torch.from_numpy(token).float(), torch.from_numpy(choice).float())


class Stub(torch.nn.Module):
    """ImageBert's interface: a small network, and its loop said again."""

    target_codebook_size, mask_token_id, image_seq_len = V, V, N

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Embedding(V + 1, 12)
        self.model.lm_head = torch.nn.Linear(12, V)
        self.model.lm_head.weight.data *= 4
        self.drops = []

    def forward(self, input_ids=None, condition=None, cond_drop_prob=0.1):
        self.drops.append(cond_drop_prob)
        x = self.model(input_ids)
        shift = condition[:, None, None] * (1 - cond_drop_prob) + torch.arange(N)[:, None]
        x = x + 0.7 * x.roll(1, 1) + torch.sin(shift * torch.arange(1.0, 13))
        return self.model.lm_head(x.to(self.model.weight.dtype))

    def masking_input_tokens(self, input_tokens):
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self, condition, guidance_scale=3.0, guidance_decay="constant", guidance_scale_pow=3.0,
        randomize_temperature=4.5, softmax_temperature_annealing=False, num_sample_steps=8,
    ):  # fmt: skip
        x, steps = torch.full((ROWS, N), V), num_sample_steps
        for i in range(steps):
            done, masked, (token, choice) = (i + 1) / steps, x == V, noise(i)
            weight = guidance_scale
            if guidance_decay == "linear":
                weight = guidance_scale * i / steps
            elif guidance_decay == "power-cosine":
                wave = math.cos(math.pi * (i / steps) ** guidance_scale_pow)
                weight = (guidance_scale - 1) * (1 - wave) / 2
            c, u = self(x, condition, 0.0), self(x, condition, 1.0)
            if guidance_decay == "power-cosine":
                logits = u + (c - u) * torch.tensor([1 + weight])
            else:
                logits = c + weight * (c - u)
            if softmax_temperature_annealing:
                logits = logits / (0.5 + 0.8 * (1 - done))
            t = randomize_temperature * (1 - done)
            drawn = (logits + t * token).argmax(-1)
            held = logits.gather(-1, drawn[..., None])[..., 0].float() + t * choice
            x = torch.where(masked, drawn, x)
            if i < steps - 1:
                stay = int(N * math.acos(done) / (math.pi / 2))
                stay = max(1, min(int(masked[0].sum()) - 1, stay))
                held = held.masked_fill(~masked, torch.inf)
                x = torch.where(held <= held.sort(-1).values[:, [stay - 1]], V, x)
        return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_codebase_itself_did(name, backend):
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        golden = {key: file[key] for key in file.files}
    meta, calls = json.loads(str(golden["meta"])), []

    def forward(ids, condition, cond_drop_prob):
        if cond_drop_prob == 0:
            calls.append(ids.numpy().copy())
        kind = "uncond_logits" if cond_drop_prob else "logits"
        logits = torch.from_numpy(golden[kind][len(calls) - 1])
        return logits.to(getattr(torch, meta["dtype"]))

    def recorded(step):
        kinds = ("token_gumbel", "choice_gumbel")
        return StepNoise(*(torch.from_numpy(golden[kind][step]).float() for kind in kinds))

    model = SimpleNamespace(
        forward=forward,
        image_seq_len=golden["tokens"].shape[2],
        mask_token_id=meta["mask_token_id"],
    )
    options = {"num_sample_steps": 6, "noise": recorded, "backend": backend}
    final = titok.generate(model, torch.zeros(2), **(options | GOLDEN[name]))
    np.testing.assert_array_equal(np.stack(calls), golden["tokens"])
    np.testing.assert_array_equal(final, golden["expected"][-1])


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("annealing", [True, False])
@pytest.mark.parametrize("decay", ["constant", "linear", "power-cosine"])
def test_the_tokens_are_those_of_their_loop(decay, annealing, hidden):
    model = Stub()
    given = {"guidance_decay": decay, "softmax_temperature_annealing": annealing}
    for temperature in (0.0, 2.0):
        given["randomize_temperature"] = temperature
        expected = model.generate(LABELS, **given)
        with on_toy(model, noise=noise, hidden_states=hidden) as handle:
            assert torch.equal(model.generate(LABELS, **given), expected)
        assert any("hidden" in sentence for sentence in handle.report.notes) == hidden


@pytest.mark.parametrize("decay", ["constant", "linear", "power-cosine"])
def test_guidance_in_half_precision_is_rounded_as_theirs(decay):
    model = Stub().bfloat16()
    for scale in (2.0, 3.0, 4.5, 6.5, 7.3, 17.5, 20.0):
        given = {"guidance_decay": decay, "guidance_scale": scale, "randomize_temperature": 0.0}
        expected = model.generate(LABELS, **given)
        with on_toy(model, hidden_states=False):
            assert torch.equal(model.generate(LABELS, **given), expected)


def test_a_pass_without_weight_is_not_made():
    model = Stub()
    with on_toy(model):
        for given, passes in (({"guidance_scale": 0}, 0), ({"guidance_decay": "linear"}, 7)):
            model.drops.clear()
            model.generate(LABELS, **given)
            assert (model.drops.count(0.0), model.drops.count(1.0)) == (8, passes)


def test_manual_seed_repeats_a_run_and_a_watched_head_stays():
    model, seen = Stub(), []
    with on_toy(model) as handle:
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model.generate(LABELS))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])
        assert all(((run >= 0) & (run < V)).all() for run in runs)
        model.model.lm_head.register_forward_hook(lambda *_: seen.append(1))
        model.generate(LABELS)
        assert seen
        assert "works on logits: the head is watched by hooks, or replaced" in handle.report.notes
        assert handle.report.calls == 4


def test_patching_is_undone_and_done_once():
    model = Stub()
    before = dict(vars(model))
    with on_toy(model) as handle:
        assert handle.report.adapter == "titok"
        with pytest.raises(adapters.AdapterError, match="patched already"):
            patch_toy(model)
    assert vars(model) == before
    model.generate = lambda condition, steps: None
    before = dict(vars(model))
    with pytest.raises(adapters.AdapterError, match="unknown version of generate"):
        patch_toy(model)
    assert vars(model) == before
    assert not any(titok.matches(other) for other in (Stub, torch, None, torch.nn.Linear(2, 2)))


def test_wrong_arguments_are_named():
    model = Stub()
    with pytest.raises(ValueError, match="backend"):
        patch_toy(model, backend="none such")
    with on_toy(model):
        for name, value in (("guidance_decay", "square"), ("randomize_temperature", -1.0)):
            with pytest.raises(ValueError, match=name.split("_")[-1]):
                model.generate(LABELS, **{name: value})

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import golden_rule, on_toy, patch_toy

torch = pytest.importorskip("torch")

import maskgit  # noqa: E402
from maskgit import StepNoise, StepRule  # noqa: E402
from maskgit.adapters import AdapterError, mdlm  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
V, MASK, N = 17, 16, 12


class LogLinear:
    """1 - exp(-sigma) = t: what mdlm's schedule tends to, and what its caching update assumes."""

    def __call__(self, t):
        return -torch.log1p(-t), None


class FinalLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, V)
        self.shift = torch.nn.Parameter(torch.randn(8))

    def forward(self, x, c):
        return self.linear(x + c[:, None, None] * self.shift)


@pytest.fixture
def rows(monkeypatch):
    """How many rows have gone through a linear layer, in each product."""
    counts, linear = [], torch.nn.functional.linear

    def counted(x, *args):
        counts.append(x[..., 0].numel())
        return linear(x, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return counts


class DIT(torch.nn.Module):
    """The parts of mdlm's backbone that matter: an output layer with a linear head at its end."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, 8)
        self.output_layer, self.calls = FinalLayer(), 0

    def forward(self, x, sigma):
        self.calls += 1
        h = self.embed(x)
        return self.output_layer(h + h.roll(1, 1) - 2 * h.roll(-2, 1), sigma)


class Other(DIT):
    """A backbone that is not known."""


class Recorded(torch.nn.Module):
    """A backbone that returns given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x, sigma):
        return self.logits


class Diffusion(torch.nn.Module):
    """The interface of mdlm's class."""

    def __init__(self, backbone=DIT):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.noise = backbone(), LogLinear()
        self.mask_index, self.parameterization = MASK, "subs"
        self.time_conditioning, self.neg_infinity = False, -1e6
        self.config = SimpleNamespace(noise=SimpleNamespace(type="loglinear"))

    def forward(self, x, sigma):
        sigma = sigma.squeeze(-1) if sigma.ndim > 1 else sigma
        sigma = sigma if self.time_conditioning else torch.zeros_like(sigma)
        return self._subs_parameterization(logits=self.backbone(x, sigma), xt=x)

    def _subs_parameterization(self, logits, xt):
        known = xt != self.mask_index
        ban = torch.zeros(logits.shape[-1]).index_fill(0, torch.tensor(self.mask_index), -1e6)
        out = (logits + ban).log_softmax(-1)
        held = torch.nn.functional.one_hot(xt, logits.shape[-1]).bool()
        return torch.where(known[..., None], torch.where(held, 0.0, -1e6), out)

    def _ddpm_update(self, x, t, dt):
        return self._ddpm_caching_update(x, t, dt)[1]

    def _ddpm_caching_update(self, x, t, dt, p_x0=None):
        """The race as it is defined: one categorical over the tokens and the mask."""
        t = t.reshape(-1)[:, None, None]
        p = self.forward(x, self.noise(t[:, :, 0])[0]).exp() if p_x0 is None else p_x0
        q = p * dt
        q[..., self.mask_index] = (t - dt)[..., 0]
        drawn = (q.double().log() + self.race(q.shape)).argmax(-1)
        return p, torch.where(x == self.mask_index, drawn, x)

    def race(self, shape):
        return -torch.log(-torch.log(torch.rand(shape, dtype=torch.float64)))

    @torch.no_grad()
    def _sample(self, num_steps, eps=1e-5, caching=True, start=None):
        x = torch.full((3, N), MASK) if start is None else start
        times, dt, cache = torch.linspace(1, eps, num_steps + 1), (1 - eps) / num_steps, None
        for i in range(num_steps):
            t = times[i] * torch.ones(len(x), 1)
            if caching:
                cache, after = self._ddpm_caching_update(x, t, dt, p_x0=cache)
                cache = None if (after != x).any() else cache
                x = after
            else:
                x = self._ddpm_update(x, t, dt)
        return self.forward(x, self.noise(times[-1] * torch.ones(len(x), 1))[0]).argmax(-1)


def choice_of_race(p, g):
    """A masked position's noise: of its best token's race log p + g against the mask's g."""
    tokens = torch.arange(p.shape[-1]) != MASK
    margin = (p[..., tokens].log() + g[..., tokens]).amax(-1) - g[..., MASK]
    return -torch.log(-torch.log(torch.sigmoid(-margin)))


@pytest.mark.parametrize("backbone", [DIT, Other])
@pytest.mark.parametrize("name", ["_ddpm_update", "_ddpm_caching_update"])
def test_an_update_gives_the_tokens_of_the_race(backbone, name):
    model, generator = Diffusion(backbone), torch.Generator().manual_seed(1)
    x = torch.full((3, N), MASK)
    x[1, ::2] = 4
    steps, changed = 6, 0
    times, dt = torch.linspace(1, 1e-5, steps + 1), (1 - 1e-5) / steps
    for i in range(steps):
        t = times[i] * torch.ones(3, 1)
        u = torch.rand(3, N, V, generator=generator, dtype=torch.float64)
        g = -torch.log(-torch.log(u))
        model.race = lambda shape, g=g: g
        with torch.no_grad():
            p = model.forward(x, model.noise(t)[0]).exp()
            expected = model._ddpm_update(x, t, dt)
        noise = StepNoise(g, choice_of_race(p.double(), g))
        if name == "_ddpm_update":
            got = mdlm.ddpm_update(model, x, t, dt, noise=noise)
        else:
            none, got = mdlm.ddpm_caching_update(model, x, t, dt, noise=noise)
            assert none is None
        assert torch.equal(got, expected)
        assert got.dtype == x.dtype
        changed += int((got != x).sum())
        x = expected
    assert changed > 20


@pytest.mark.parametrize("name", ["mdlm", "mdlm-cache", "mdlm-last-step", "mdlm-semi-ar"])
def test_what_the_codebase_itself_did(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        golden = {k: torch.from_numpy(file[k]) for k in file.files if k != "meta"}
        meta = json.loads(str(file["meta"]))
    model, eps = Diffusion(), golden_rule(name).time_eps
    model.mask_index = meta["mask_token_id"]
    for s in range(len(golden["step"])):
        step, steps = int(golden["step"][s]), int(golden["num_steps"][s])
        model.backbone = Recorded(golden["logits"][s])
        before = golden["tokens"][s].long()
        t = torch.linspace(1, eps, steps + 1)[step] * torch.ones(len(before), 1)
        noise = StepNoise(golden["token_gumbel"][s], golden["choice_gumbel"][s])
        for update in (mdlm.ddpm_update, lambda *a, **k: mdlm.ddpm_caching_update(*a, **k)[1]):
            got = update(model, before, t, (1 - eps) / steps, noise=noise)
            assert torch.equal(got, golden["expected"][s].long()), f"after step {s}"


def test_with_seeds_it_is_decode_step_with_a_bernoulli_count():
    model, seeds, steps = Diffusion(), torch.tensor([3, 4, 5]), 5
    rule = StepRule(count="bernoulli", score="random", ban_mask_token=True, time_eps=1e-5)
    x = torch.full((3, N), MASK)
    for i in range(steps):
        t = torch.linspace(1, 1e-5, steps + 1)[i] * torch.ones(3)
        with torch.no_grad():
            logits = model.backbone(x, torch.zeros(3))
        expected = maskgit.decode_step(
            logits, x, rule=rule, mask_token_id=MASK, step=i, num_steps=steps, seeds=seeds
        ).next_tokens
        if i == steps - 1:
            break  # decode_step's last step commits everything
        dt = (1 - 1e-5) / steps
        x = mdlm.ddpm_caching_update(model, x, t, dt, seeds=seeds, step=i)[1]
        assert torch.equal(x, expected)
        alone = mdlm.ddpm_update(model, expected[1:2], t[:1] - dt, dt, seeds=seeds[1:2], step=i + 1)
        all_of = mdlm.ddpm_update(model, expected, t - dt, dt, seeds=seeds, step=i + 1)
        assert torch.equal(alone, all_of[1:2])


@pytest.mark.parametrize("caching", [True, False])
def test_whole_loop_repeats_and_saves_work(caching, rows):
    model, steps = Diffusion(), 60
    before = dict(vars(model))
    model._sample(steps, caching=caching)
    theirs = sum(rows)
    rows.clear()
    model.backbone.calls = 0
    with on_toy(model) as handle:
        torch.manual_seed(7)
        a = model._sample(steps, caching=caching)
        assert sum(rows) == 3 * N + 3 * N  # every position once, and the fill at the end
        assert model.backbone.calls < steps  # a step that changes nothing asks for nothing
        torch.manual_seed(7)
        b = model._sample(steps, caching=caching)
        c = model._sample(steps, caching=caching)
        with pytest.raises(AdapterError, match="patched already"):
            patch_toy(model)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert (a != MASK).all()
    assert handle.report.calls == 3 * steps
    assert any("hidden states" in note for note in handle.report.notes)
    assert theirs > 50 * N
    assert vars(model) == before
    assert "forward" not in vars(model.backbone.output_layer.linear)


def test_known_tokens_stay_and_a_generator_is_used():
    model = Diffusion(Other)
    start = torch.full((3, N), MASK)
    start[:, 3:7] = torch.arange(4)
    with on_toy(model, generator=torch.Generator().manual_seed(1)) as handle:
        state = torch.get_rng_state()
        out = model._sample(9, start=start)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out[:, 3:7], start[:, 3:7])
    assert any("works on logits" in note for note in handle.report.notes)


def test_the_law_of_one_step():
    """How often a position changes, and to what, against the race's own chances."""
    model, rows, t, dt = Diffusion(), 4000, 0.8, 0.3
    x = torch.full((1, N), MASK)
    with torch.no_grad():
        p = model.forward(x, torch.zeros(1)).exp()[0, 0]
    torch.manual_seed(3)
    wide = x.expand(rows, N).contiguous()
    out = mdlm.ddpm_caching_update(model, wide, torch.full((rows, 1), t), dt)[1]
    changed = out[out != MASK]
    share = changed.numel() / out.numel()
    assert abs(share - dt / t) < 5 * math.sqrt(0.25 / out.numel())
    counts = torch.bincount(changed, minlength=V)[:MASK].double()
    expected = p[:MASK].double() * changed.numel()
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 5).all()


def test_probabilities_of_the_caller_are_used_and_an_end_at_time_zero_fills_everything():
    model = Diffusion()
    p = torch.nn.functional.one_hot(torch.arange(N) % MASK, V).float().expand(2, N, V)
    x = torch.full((2, N), MASK)
    out = mdlm.ddpm_caching_update(model, x, torch.full((2,), 0.1), 0.1, p)[1]
    assert torch.equal(out, (torch.arange(N) % MASK).expand(2, N))
    assert model.backbone.calls == 0
    assert torch.equal(mdlm.ddpm_update(model, out, torch.full((2,), 0.1), 0.1), out)


def test_what_is_refused():
    model = Diffusion()
    model.parameterization = "d3pm"
    before = dict(vars(model))
    with pytest.raises(AdapterError, match="subs"):
        patch_toy(model)
    model.parameterization = "subs"
    model.config.noise.type = "geometric"
    with pytest.raises(ValueError, match="loglinear"):
        mdlm.ddpm_caching_update(model, torch.full((1, N), MASK), torch.ones(1), 0.1)
    with pytest.raises(ValueError, match="backend"):
        patch_toy(model, backend="abacus")
    with pytest.raises(AdapterError, match="option"):
        patch_toy(model, temperature=1.0)
    model._ddpm_update = lambda x, t: x
    with pytest.raises(AdapterError, match="unknown version of _ddpm_update"):
        patch_toy(model, "mdlm")
    del model._ddpm_update
    assert vars(model) == before | {"parameterization": "subs"}
    block = Diffusion()
    block.block_size = 4
    assert mdlm.matches(model)
    assert not any(
        mdlm.matches(t) for t in (block, Diffusion, torch, object(), torch.nn.Linear(1, 1))
    )

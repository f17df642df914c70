import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import golden_rule, on_toy, patch_toy

torch = pytest.importorskip("torch")

from test_adapter_mdlm import GOLDEN, MASK, Diffusion, N, Other, Recorded, V, choice_of_race  # noqa: E402

from maskgit import StepNoise  # noqa: E402
from maskgit.adapters import AdapterError, mdlm, remdm  # noqa: E402

SAMPLING = {"sampler": "remdm-cap", "nucleus_p": 1.0, "eta": 0.3, "steps": 20, "dfm": False,
            "t_on": 0.55, "t_off": 0.2, "alpha_on": 0.6}  # fmt: skip


class Remasking(Diffusion):
    """The interface of remdm's class; the updates are of the samplers that the tests compare."""

    def __init__(self, backbone=None, **sampling):
        super().__init__(*([] if backbone is None else [backbone]))
        self.config.sampling = SimpleNamespace(**(SAMPLING | sampling))
        self.before_fill = []

    def _ddpm_caching_update(self, x, t, dt, p_x0=None, conf=None):
        raise NotImplementedError

    def _ddpm_update(self, x, t, dt):
        return Diffusion._ddpm_caching_update(self, x, t, dt)[1]

    def _dfm_caching_update(self, x, t, p_x0=None):
        """One step of Euler with the corrector's rates, as a race of the tokens and the mask."""
        time = t.reshape(-1)[0].item()
        p = self.forward(x, self.noise(t)[0]).exp()
        forward = 10 * (time * (1 - time)) ** 0.25 + 1
        dt = 1 / self.config.sampling.steps
        if time < 1:
            dt = min(dt, 1 / (forward / time + (forward - 1) / (1 - time)))
            known, then = 1 - time, 1 - time + dt
            up, down = forward * (then - known) / time, (forward - 1) * (then / known - 1)
        else:
            up, down = dt, 0.0
        keep = torch.where(x == MASK, up, 1 - down).double()[..., None]
        q = p.double() * keep
        q[..., MASK] = 1 - keep[..., 0]
        return None, (q.log() + self.race(q.shape)).argmax(-1), time - dt

    @torch.no_grad()
    def _sample(self, num_steps, eps=1e-5, rows=3):
        x, cache = torch.full((rows, N), MASK), None
        conf = torch.full(x.shape, -torch.inf, dtype=torch.bfloat16)
        if self.config.sampling.dfm:
            time = 1
            while time > 1 / num_steps:
                cache, x, time = self._dfm_caching_update(x, time * torch.ones(rows, 1), p_x0=cache)
        else:
            for time in torch.linspace(1, eps, num_steps + 1)[:-1]:
                t, dt = time * torch.ones(rows, 1), (1 - eps) / num_steps
                cache, x, conf = self._ddpm_caching_update(x, t, dt, p_x0=cache, conf=conf)
        self.before_fill.append(x)
        return self.forward(x, torch.zeros(rows)).argmax(-1)


def recorded(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        golden = {k: torch.from_numpy(file[k]) for k in file.files if k != "meta"}
        return golden, json.loads(str(file["meta"]))


@pytest.mark.parametrize(
    "name", ["cap", "cap-nucleus", "rescale", "conf", "forward-backward", "loop"]
)
def test_what_the_codebase_itself_did(name):
    golden, meta = recorded(f"remdm-{name}")
    model = Remasking(**meta["remask"])
    model.mask_index, eps = meta["mask_token_id"], golden_rule(f"remdm-{name}").time_eps
    dtype, remasked = getattr(torch, meta["dtype"]), 0
    for s in range(len(golden["step"])):
        steps = int(golden["num_steps"][s])
        model.backbone = Recorded(golden["logits"][s].to(dtype))
        before, expected = golden["tokens"][s].long(), golden["expected"][s].long()
        t = torch.linspace(1, eps, steps + 1)[s] * torch.ones(len(before), 1)
        noise = StepNoise(golden["token_gumbel"][s], golden["choice_gumbel"][s])
        conf = golden["scores"][s].to(dtype) if "scores" in golden else None
        none, got, after = remdm.ddpm_caching_update(
            model, before, t, (1 - eps) / steps, conf=conf, noise=noise
        )
        assert none is None
        assert after is conf
        assert torch.equal(got, expected), f"after step {s}"
        remasked += int(((before != model.mask_index) & (expected == model.mask_index)).sum())
        if conf is not None and s + 1 < steps:
            kept = golden["scores"][s + 1]
            torch.testing.assert_close(conf.float(), kept, atol=0.02, rtol=0.02)
    assert remasked > 0


def test_the_plain_sampler_is_the_mdlm_adapters():
    model, x = Remasking(sampler="mdlm"), torch.full((2, N), MASK)
    t, seeds = torch.full((2, 1), 0.7), torch.tensor([1, 2])
    one = remdm.ddpm_caching_update(model, x, t, 0.3, seeds=seeds, step=4)[1]
    two = mdlm.ddpm_caching_update(model, x, t, 0.3, seeds=seeds, step=4)[1]
    assert torch.equal(one, two)
    assert (one != MASK).any()


def test_flow_matching_gives_the_tokens_of_the_race():
    model, generator = Remasking(dfm=True), torch.Generator().manual_seed(2)
    x, time, remasked = torch.full((3, N), MASK), 1.0, 0
    while time > 0.05:
        t = torch.full((3, 1), time)
        u = torch.rand(3, N, V, generator=generator, dtype=torch.float64)
        g = -torch.log(-torch.log(u))
        model.race = lambda shape, g=g: g
        with torch.no_grad():
            _, expected, then = model._dfm_caching_update(x, t)
            p = model.forward(x, model.noise(t)[0]).exp().double()
        # of a known position, the token it holds races against the mask alone
        held = g.gather(-1, x[..., None])[..., 0]
        again = -torch.log(-torch.log(torch.sigmoid(held - g[..., MASK])))
        noise = StepNoise(g, torch.where(x == MASK, choice_of_race(p, g), again))
        _, got, ours_then = remdm.dfm_caching_update(model, x, t, noise=noise)
        assert torch.equal(got, expected)
        assert ours_then == pytest.approx(then)
        remasked += int(((x != MASK) & (got == MASK)).sum())
        x, time = got, then
    assert remasked > 3


@pytest.mark.parametrize("sampler", remdm.SAMPLERS)
def test_whole_loop_of_every_sampler(sampler):
    model = Remasking(sampler=sampler, nucleus_p=0.9)
    before = dict(vars(model))
    with on_toy(model) as handle:
        assert handle.report.adapter == "remdm"
        torch.manual_seed(1)
        a = model._sample(20)
        torch.manual_seed(1)
        b = model._sample(20)
        assert (model.before_fill[-1] == MASK).float().mean() < 0.2
        with pytest.raises(AdapterError, match="patched already"):
            patch_toy(model)
    assert torch.equal(a, b)
    assert handle.report.calls == 40
    assert vars(model) == before


def test_whole_loop_of_flow_matching_on_another_backbone():
    model = Remasking(Other, dfm=True)
    with on_toy(model, generator=torch.Generator().manual_seed(0)) as handle:
        out = model._sample(20)
    assert (out != MASK).all()
    assert handle.report.calls >= 20
    assert any("works on logits" in note for note in handle.report.notes)


def test_the_share_that_is_masked_again():
    model, rows = Remasking(eta=0.25), 3000
    x = torch.zeros(rows, N, dtype=torch.long)
    torch.manual_seed(0)
    t = torch.full((rows, 1), 0.6)
    out = remdm.ddpm_caching_update(model, x, t, 0.1)[1]
    share = (out == MASK).double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.2 / out.numel())
    assert (out[out != MASK] == 0).all()
    assert model.backbone.calls == 0


def test_what_is_refused():
    model, x, t = Remasking(sampler="best"), torch.full((1, N), MASK), torch.ones(1, 1)
    with pytest.raises(ValueError, match="sampler"):
        remdm.ddpm_caching_update(model, x, t, 0.1)
    model.config.sampling.sampler = "remdm-conf"
    with pytest.raises(ValueError, match="conf"):
        remdm.ddpm_caching_update(model, x, t, 0.1)
    model.config.noise.type = "cosine"
    with pytest.raises(ValueError, match="loglinear"):
        remdm.dfm_caching_update(model, x, t)
    assert remdm.matches(model)
    assert not mdlm.matches(model)
    assert not any(remdm.matches(t) for t in (Diffusion(), Remasking, object(), torch))
    before = dict(vars(model))
    model._dfm_caching_update = lambda x, t: x
    with pytest.raises(AdapterError, match="unknown version of _dfm_caching_update"):
        patch_toy(model)
    del model._dfm_caching_update
    assert vars(model) == before

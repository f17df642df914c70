"""The MaskBit adapter: tokens of recorded runs, and those of its loop said again, through stubs."""

import itertools
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from helpers import on_toy, patch_toy

import maskgit
from maskgit import StepNoise, adapters

torch = pytest.importorskip("torch")
from maskgit.adapters import maskbit  # noqa: E402

BACKENDS = [n for n in ("cpp", "torch", "reference") if maskgit.available_backends()[n] is None]
SIDE, SPLITS, BITS, ROWS = 3, 2, 4, 3
N, V = SIDE * SIDE * SPLITS, 2**BITS
MASK = V
GAMMA = {  # of tensors in float32, where products such as 18 cos(pi / 3) end up beside an integer
    "arccos": lambda r: torch.acos(r) / (math.pi / 2),
    "cosine": lambda r: torch.cos(r * math.pi * 0.5),
    "root": lambda r: 1 - r**0.5,
    "square": lambda r: 1 - r**2,
    "linear": lambda r: 1 - r,
}
GOLDEN = {
    "maskbit": {"guidance_scale": 0.0, "mask_schedule_strategy": "arccos"},
    "maskbit-cfg": {
        "guidance_scale": 2.5, "softmax_temperature": 0.8, "mask_schedule_strategy": "arccos",
    },
    "maskbit-cfg-bf16": {"guidance_scale": 2.5, "mask_schedule_strategy": "arccos"},
    "maskbit-linear": {"guidance_scale": 0.0, "num_steps": 7, "randomize_temperature": 1.0},
}  # fmt: skip
LABELS = torch.arange(ROWS)
IMAGES = SimpleNamespace(eval=lambda: None, decode_tokens=lambda codes: codes)


def noise(step):
    rng = np.random.default_rng(step)
    token, choice = rng.gumbel(size=(ROWS, N, V)), rng.gumbel(size=(ROWS, N))
    return StepNoise(torch.from_numpy(token).float(), torch.from_numpy(choice).float())


class Network(torch.nn.Module):
    """(tokens, labels, drop) to logits of every factor."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(V + 1, V)
        self.batches = []

    def forward(self, x, labels, drop):
        self.batches.append(len(x))
        out = self.embed(x) * 2
        place = torch.arange(N).view(1, -1, SPLITS, 1) + (labels * ~drop).view(-1, 1, 1, 1)
        out = out + 0.7 * out.roll(1, 1) + torch.sin(place * torch.arange(1.0, V + 1))
        return out.to(self.embed.weight.dtype)


@torch.no_grad()
def sample(
    model, vqgan_model, num_samples=10, labels=None, softmax_temperature=1.0,
    randomize_temperature=4.5, mask_schedule_strategy="linear", num_steps=12, guidance_scale=3.0,
    mask_token=1024, patch_size=16, guidance_annealing="none", use_sampling_annealing=False,
    scale_pow=4.0, codebook_size=1024, codebook_splits=1, use_tqdm=False,
):  # fmt: skip
    """Their loop said again."""
    model.eval()
    x, steps = torch.full((num_samples, N), mask_token), []
    cond, uncond = torch.zeros(num_samples, dtype=bool), torch.ones(num_samples, dtype=bool)
    for i in range(num_steps):
        done, masked, (token, choice) = (i + 1) / num_steps, x == mask_token, noise(i)
        weight = (
            guidance_scale
            * {
                "none": 1.0,
                "linear": i / num_steps,
                "cosine": torch.tensor([1 - math.cos(math.pi * (i / num_steps) ** scale_pow)]) / 2,
            }[guidance_annealing]
        )
        shaped = x.view(num_samples, -1, SPLITS)
        c, u = (model(shaped, labels, drop).view(num_samples, N, V) for drop in (cond, uncond))
        t = 0.5 + 0.8 * (1 - done) if use_sampling_annealing else softmax_temperature
        log_p = ((c + weight * (c - u)) / t).log_softmax(-1)
        drawn = torch.where(masked, (log_p + token).argmax(-1), x)
        score = log_p.gather(-1, drawn.clamp(max=V - 1)[..., None])[..., 0]
        score = score + randomize_temperature * (1 - done) * choice
        stay = N * GAMMA[mask_schedule_strategy](torch.tensor(done))
        stay = int(max(1, min(masked[0].sum() - 1, stay)))
        rank = score.masked_fill(~masked, torch.inf).argsort(-1).argsort(-1)
        x = torch.where(rank < stay, mask_token, drawn)
        steps.append(drawn.view(num_samples, -1, SPLITS))
    codes = steps[-1][..., 0] + steps[-1][..., 1] * V
    return vqgan_model.decode_tokens(codes.float()), steps


def module():
    out = ModuleType("sampling")
    out.sample = sample
    return out


def given(**changes):
    options = {"num_samples": ROWS, "labels": LABELS, "num_steps": 6, "patch_size": SIDE}
    options |= {"mask_token": MASK, "codebook_size": V**SPLITS, "codebook_splits": SPLITS}
    return options | changes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_codebase_itself_did(name, backend):
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))
    assert meta["mask_token_id"] == MASK
    calls = []

    def model(x, labels, drop):
        s = len(calls)
        calls.append(x[:2].flatten(1).int())
        parts = [golden["logits"][s]] + ([golden["uncond_logits"][s]] if len(x) > 2 else [])
        return torch.cat(parts).view(len(x), -1, SPLITS, V).to(getattr(torch, meta["dtype"]))

    def recorded(step):
        return StepNoise(golden["token_gumbel"][step].float(), golden["choice_gumbel"][step])

    model.eval, model.device = lambda: None, "cpu"
    options = {"noise": recorded, "backend": backend, "num_samples": 2, "labels": LABELS[:2]}
    _, steps = maskbit.sample(model, IMAGES, **(given(**options) | GOLDEN[name]))
    assert torch.equal(torch.stack(calls), golden["tokens"])
    assert torch.equal(torch.stack(steps).flatten(2).int(), golden["candidates"])


@pytest.mark.parametrize("strategy", GAMMA)
@pytest.mark.parametrize("annealing", ["none", "linear", "cosine"])
def test_the_tokens_are_those_of_their_loop(annealing, strategy):
    theirs, model = module(), Network()
    options = given(guidance_annealing=annealing, mask_schedule_strategy=strategy)
    options["use_sampling_annealing"] = annealing == "linear"
    codes, steps = theirs.sample(model, IMAGES, **options)
    with on_toy(theirs, noise=noise):
        got_codes, got = theirs.sample(model, IMAGES, **options)
    assert torch.equal(torch.stack(got), torch.stack(steps))
    assert torch.equal(got_codes, codes)
    assert got_codes.dtype == torch.float32


def test_cosine_guidance_in_half_precision_is_rounded_as_theirs():
    theirs, model = module(), Network().bfloat16()
    for scale in (2.5, 8.5, 16.5, 23.0):
        options = given(guidance_annealing="cosine", guidance_scale=scale)
        _, steps = theirs.sample(model, IMAGES, **options)
        with on_toy(theirs, noise=noise):
            _, got = theirs.sample(model, IMAGES, **options)
        assert torch.equal(torch.stack(got), torch.stack(steps))


def test_half_a_batch_without_weight_is_not_run():
    theirs, model = module(), Network()
    with on_toy(theirs):
        theirs.sample(model, IMAGES, **given(guidance_annealing="linear"))
        assert model.batches == [ROWS] + [2 * ROWS] * 5
        model.batches.clear()
        theirs.sample(model, IMAGES, **given(guidance_scale=0.0))
        assert model.batches == [ROWS] * 6


def test_manual_seed_repeats_a_run_with_their_labels():
    theirs, model, runs = module(), Network(), []
    with on_toy(theirs) as handle:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(theirs.sample(model, IMAGES, **given(num_samples=20, labels=None))[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert all(((run >= 0) & (run < V**SPLITS)).all() for run in runs)
    assert handle.report.calls == 3


def test_a_single_token_that_is_left_is_drawn_again():
    theirs, model = module(), Network()
    with on_toy(theirs):
        _, steps = theirs.sample(model, IMAGES, **given(num_steps=2 * N))
    changed = [(a != b).flatten(1).sum(1).max() for a, b in itertools.pairwise(steps[N:])]
    assert max(changed) <= 1


def test_patching_is_undone_and_done_once():
    theirs = module()
    before = dict(vars(theirs))
    with on_toy(theirs) as handle:
        assert handle.report.adapter == "maskbit"
        with pytest.raises(adapters.AdapterError, match="patched already"):
            patch_toy(theirs)
    assert vars(theirs) == before
    theirs.sample = lambda model, codebook_splits: None
    before = dict(vars(theirs))
    with pytest.raises(adapters.AdapterError, match="unknown version of sample"):
        patch_toy(theirs)
    assert vars(theirs) == before
    assert not any(maskbit.matches(other) for other in (math, torch, None, Network()))


def test_wrong_arguments_are_named():
    theirs = module()
    with pytest.raises(ValueError, match="backend"):
        patch_toy(theirs, backend="none such")
    wrong = {"mask_schedule_strategy": "pow2", "guidance_annealing": "square"}
    wrong |= {"labels": LABELS[1:], "softmax_temperature": -1.0}
    with on_toy(theirs):
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=name.split("_")[-1]):
                theirs.sample(Network(), IMAGES, **given(**{name: value}))

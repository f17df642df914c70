"""The Fast-dLLM adapter: tokens of the codebase's own runs, and a module that is left as it was."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import on_toy, patch_toy

import maskgit
from maskgit import StepNoise, adapters

torch = pytest.importorskip("torch")
from maskgit.adapters import fast_dllm  # noqa: E402

GOLDEN = {  # what their own `generate` was called with
    "quota": {},
    "random": {"temperature": 0.5, "remasking": "random"},
    "threshold": {"threshold": 0.6},
    "threshold-bf16": {"threshold": 0.9, "temperature": 0.3},
    "threshold-drawn": {"threshold": 0.6, "temperature": 0.7},
    "factor": {"factor": 1.0},
    "factor-drawn": {"factor": 1.5, "temperature": 0.4},
}
BACKENDS = [n for n in ("cpp", "torch", "reference") if maskgit.available_backends()[n] is None]
MASK = 20

STUB = """
import torch

def get_num_transfer_tokens(block_mask_index, steps):
    total = block_mask_index.sum(1, keepdim=True)
    return total // steps + (torch.arange(steps) < total % steps)

def generate(model, prompt, length, steps, temperature=0.0, remasking="low_confidence",
             mask_id=20, threshold=None, factor=None):
    x = torch.cat([prompt, torch.full((len(prompt), length), mask_id)], 1)
    quota = get_num_transfer_tokens(x == mask_id, steps)
    for i in range(99):
        masked = x == mask_id
        if not masked.any():
            return x, i
        logits = model(x)
        if factor is not None:
            x0, kept = get_transfer_index_dynamic(
                logits, temperature, remasking, masked, x, None, factor)
        else:
            counts = quota[:, i] if threshold is None else None
            x0, kept = get_transfer_index(
                logits, temperature, remasking, masked, x, counts, threshold)
        x[kept] = x0[kept]

def generate_with_dual_cache():
    pass

def get_transfer_index(
        logits, temperature, remasking, mask_index, x, num_transfer_tokens, threshold=None):
    raise RuntimeError("theirs")

def get_transfer_index_dynamic(
        logits, temperature, remasking, mask_index, x, num_transfer_tokens, factor=1):
    raise RuntimeError("theirs")
"""


@pytest.fixture
def module():
    out = types.ModuleType("generate")
    exec(STUB, out.__dict__)
    return out


def model(x):
    """Logits (B, N, 21) that depend on the tokens; the mask id is no likely token."""
    rng = np.random.default_rng(3)
    near, place = rng.normal(size=(21, 21)), rng.normal(size=(64, 21)) * 2
    logits = near[x] + near[np.roll(x, 1, 1)] + place[: x.shape[1]]
    logits[..., 20] = -30
    return torch.from_numpy(logits).float()


def prompt(rows=2):
    return torch.from_numpy(np.random.default_rng(1).integers(0, 19, (rows, 3)))


def restated(logits, temperature, masked, x, counts=None, threshold=None, factor=None, noise=None):
    """Their step said again, one row at a time: argmax(l + T g), and a count along the sorted row."""
    keys = logits.double()
    if temperature:
        keys = keys + temperature * noise.token_gumbel.double()
    drawn = torch.where(masked, keys.argmax(-1), x)
    p = logits.double().softmax(-1).gather(-1, drawn.clamp(max=20)[..., None])[..., 0]
    if noise is not None and noise.choice_gumbel is not None:
        p = torch.exp(-torch.exp(-noise.choice_gumbel.double()))
    kept = torch.zeros_like(masked)
    for b in range(len(x)):
        places = masked[b].nonzero()[:, 0]
        places = places[p[b][places].argsort(descending=True, stable=True)]
        falling = p[b][places].tolist()
        if counts is not None:
            n = int(counts[b])
        elif threshold is not None:
            n = max(1, sum(value >= threshold for value in falling))
        else:
            n = 1
            while n < len(falling) and falling[n] >= 1 - factor / (n + 2):
                n += 1
            if n == len(falling) - 1:  # a first failure at the very last one
                n += 1
        kept[b, places[:n]] = True
    return drawn, kept


def noise_for(x, seed, choice=False):
    rng = np.random.default_rng(seed)
    token = torch.from_numpy(rng.gumbel(size=(*x.shape, 21))).float()
    return StepNoise(token, torch.from_numpy(rng.gumbel(size=x.shape)).float() if choice else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_are_those_of_the_codebase_itself(name, backend):
    path = Path(__file__).parents[1] / "golden" / f"fast-dllm-{name}.npz"
    with np.load(path, allow_pickle=False) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    given = GOLDEN[name]
    how = (given.get("temperature", 0.0), given.get("remasking", "low_confidence"))
    for s in range(len(golden["step"])):
        x, masked = golden["tokens"][s].long(), golden["eligible"][s]
        logits = golden["logits"][s].to(getattr(torch, meta["dtype"]))
        draws = [golden[n][s] if n in golden else None for n in ("token_gumbel", "choice_gumbel")]
        call = (logits, *how, masked, x)
        options = {"noise": StepNoise(*draws), "backend": backend}
        if "factor" in given:
            function, last = fast_dllm.get_transfer_index_dynamic, (None, given["factor"])
        else:
            start, steps = golden["num_masked_at_start"][s], golden["num_steps"][s]
            quota = start // steps + (golden["step"][s] < start % steps)
            function, last = fast_dllm.get_transfer_index, (quota[:, None], given.get("threshold"))
        x0, kept = function(*call, *last, **options)
        assert kept.dtype == torch.bool
        assert not (kept & ~masked).any()
        assert torch.equal(x0[~masked], x[~masked])
        assert torch.equal(torch.where(kept, x0, x), golden["expected"][s].long()), f"step {s}"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("how", ["counts", "threshold", "factor"])
def test_one_step_is_the_original_said_again(how, remasking, temperature):
    x = torch.cat([prompt(4), torch.full((4, 9), MASK)], 1)
    x[1, 5:8], x[2, 3:] = 4, 7  # fewer masks; none at all
    masked = x == MASK
    masked[:, 10:] = False  # a later block: masked, and not to be touched
    noise = noise_for(x, 5, remasking == "random")
    given = {"counts": torch.tensor([2, 0, 1, 50])} if how == "counts" else {how: 0.6}
    drawn, kept = restated(model(x), temperature, masked, x, noise=noise, **given)
    call = (model(x), temperature, remasking, masked, x)
    if how == "factor":
        x0, got = fast_dllm.get_transfer_index_dynamic(*call, None, 0.6, noise=noise)
    else:
        quota, bound = (given.get(name) for name in ("counts", "threshold"))
        x0, got = fast_dllm.get_transfer_index(*call, quota, bound, noise=noise)
    assert torch.equal(got, kept)
    assert torch.equal(x0, drawn)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}, {"factor": 1.0}])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_loop_of_a_patched_module_gives_the_tokens_of_the_original(
    module, options, temperature
):
    def original(logits, t, _, masked, x, counts, bound=None, *, factor=None):
        noise = noise_for(x, original.calls)
        original.calls += 1
        return restated(logits, t, masked, x, counts, bound, factor, noise)

    original.calls = 0
    theirs = types.ModuleType("theirs")
    exec(STUB, theirs.__dict__)
    theirs.get_transfer_index = original
    theirs.get_transfer_index_dynamic = lambda *a: original(*a[:5], None, factor=a[6])
    call = (model, prompt(), 8, 4, temperature)
    expected, steps = theirs.generate(*call, **options)
    x = torch.zeros(2, 11)
    with on_toy(module, noise=lambda n: noise_for(x, n)) as handle:
        tokens, forwards = module.generate(*call, **options)
    assert torch.equal(tokens, expected)
    assert forwards == steps == handle.report.calls


def test_patch_and_undo_leave_the_module_as_it_was(module):
    before = dict(vars(module))
    handle = patch_toy(module)
    assert handle.report.adapter == "fast_dllm"
    assert handle.report.replaced == ("get_transfer_index", "get_transfer_index_dynamic")
    with pytest.raises(adapters.AdapterError, match="patched already"):
        patch_toy(module)
    handle.undo()
    assert vars(module) == before
    with pytest.raises(RuntimeError, match="theirs"):
        module.generate(model, prompt(), 8, 4)


def test_a_module_without_the_dynamic_count_is_known(module):
    del module.get_transfer_index_dynamic
    with on_toy(module) as handle:
        assert handle.report.replaced == ("get_transfer_index",)


@pytest.mark.parametrize("name", ["get_transfer_index", "get_transfer_index_dynamic"])
def test_an_unknown_version_is_refused_and_left_alone(module, name):
    setattr(module, name, lambda logits, mask_index: None)
    before = dict(vars(module))
    with pytest.raises(adapters.AdapterError, match=f"unknown version of {name}"):
        patch_toy(module)
    assert vars(module) == before


def test_other_targets_are_not_matched(module):
    assert fast_dllm.matches(module)
    assert not any(fast_dllm.matches(other) for other in (torch, object(), None, model))
    with pytest.raises(adapters.AdapterError, match="no readable signature"):
        patch_toy(torch.nn, "fast_dllm")


def test_manual_seed_repeats_a_run(module):
    def run(seed):
        torch.manual_seed(seed)
        return module.generate(model, prompt(), 8, 4, 1.0, "random")[0]

    with on_toy(module):
        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
    generator = torch.Generator().manual_seed(7)
    with on_toy(module, generator=generator):
        first = run(1)
        assert torch.equal(first, (generator.manual_seed(7), run(2))[1])


def test_a_sequence_depends_on_its_own_seed_alone():
    x = torch.full((3, 6), MASK)
    call = (0.9, "low_confidence", x == MASK, x, torch.tensor([3, 3, 3]))
    whole, _ = fast_dllm.get_transfer_index(model(x), *call, seeds=[5, 6, 7])
    x = x[:1]
    call = (0.9, "low_confidence", x == MASK, x, torch.tensor([3]))
    alone, _ = fast_dllm.get_transfer_index(model(x), *call, seeds=[6])
    assert torch.equal(whole[1:2], alone)


def test_wrong_arguments_are_named(module):
    x = torch.full((1, 4), MASK)
    call = {"temperature": 0.0, "remasking": "low_confidence", "mask_index": x == MASK, "x": x}
    call |= {"logits": model(x), "num_transfer_tokens": None}
    with pytest.raises(ValueError, match="num_transfer_tokens"):
        fast_dllm.get_transfer_index(**call)
    with pytest.raises(ValueError, match="remasking"):
        fast_dllm.get_transfer_index(**call | {"remasking": "sure", "threshold": 0.5})
    with pytest.raises(ValueError, match="sample_temperature"):
        fast_dllm.get_transfer_index(**call | {"temperature": -1.0, "threshold": 0.5})
    with pytest.raises(ValueError, match="backend"):
        patch_toy(module, backend="none such")
    with pytest.raises(adapters.AdapterError, match="seeds: expected one of the options"):
        patch_toy(module, seeds=[1])

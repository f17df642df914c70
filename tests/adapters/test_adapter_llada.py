"""The LLaDA adapter: tokens of the codebase's own runs, hidden states, padding, and undoing."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import golden_rule, on_toy, patch_toy

import maskgit
from maskgit import StepNoise, adapters

torch = pytest.importorskip("torch")
from maskgit.adapters import llada  # noqa: E402

GOLDEN = {  # what their own `generate` was called with
    "llada": {},
    "llada-one-block": {},
    "llada-bf16": {},
    "llada-drawn": {"temperature": True},
    "llada-drawn-bf16": {"temperature": True},
    "llada-cfg": {"cfg_scale": True},
    "llada-cfg-bf16": {"cfg_scale": True},
    "llada-random": {"remasking": "random", "temperature": True},
    "llada-eos-logits": {"logits_eos_inf": True},
    "llada-eos-confidence": {"confidence_eos_eot_inf": True},
    "llada-eos-confidence-drawn": {"confidence_eos_eot_inf": True, "temperature": True},
    "llada-f51cb17": {},
    "llada-fp64": {"score_dtype": "float64"},
    "llada-fp64-sharp": {"score_dtype": "float64"},
    "llada-fp64-drawn": {"score_dtype": "float64", "temperature": True},
}
BACKENDS = [n for n in ("cpp", "torch", "reference") if maskgit.available_backends()[n] is None]


class Recorded:
    """A model that returns the recorded logits, once it is asked about the recorded tokens."""

    def __init__(self, golden, dtype):
        self.golden, self.dtype, self.calls = golden, dtype, 0

    def __call__(self, tokens, attention_mask=None):
        s, self.calls = self.calls, self.calls + 1
        rows = self.golden["tokens"].shape[1]
        np.testing.assert_array_equal(tokens[:rows].numpy(), self.golden["tokens"][s])
        names = ("logits", "uncond_logits")[: len(tokens) // rows]
        logits = np.concatenate([self.golden[name][s] for name in names])
        return types.SimpleNamespace(logits=torch.from_numpy(logits).to(getattr(torch, self.dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_of_their_own_runs(name, backend):
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        golden = {k: file[k] for k in file.files}
    meta = json.loads(str(golden["meta"]))
    model = Recorded(golden, meta["dtype"])
    steps, each = len(golden["step"]), int(golden["num_steps"][0])
    options = {"block_length": 12 * each // steps} | GOLDEN[name]
    if "cfg_scale" in options:
        options["cfg_scale"] = meta["guidance_scale"] - 1
    if options.get("temperature") is True:
        options["temperature"] = golden_rule(name).sample_temperature

    def noise(s):
        return StepNoise(
            *(
                torch.from_numpy(golden[k][s]) if k in golden else None
                for k in ("token_gumbel", "choice_gumbel")
            )
        )

    prompt = torch.from_numpy(golden["tokens"][0][:, :5]).long()
    out = llada.generate(
        model, prompt, torch.ones_like(prompt), steps=steps, gen_length=12,
        mask_id=meta["mask_token_id"], noise=noise, backend=backend, **options,
    )  # fmt: skip
    np.testing.assert_array_equal(out.numpy(), golden["expected"][-1])


class Tiny(torch.nn.Module):
    """A model with the interface of LLaDA's: logits through a plain head, attention over real tokens."""

    def __init__(self, vocab=60, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(vocab, width)
        self.head = torch.nn.Linear(width, vocab, bias=False)
        self.device, self.rows = torch.device("cpu"), 0

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens, attention_mask=None):
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask
        real = real[..., None].float()
        x = self.embed(tokens) * real
        place = (real.cumsum(1) - 1).clamp(min=0)
        x = (
            x
            + torch.roll(x, 1, 1) * torch.roll(real, 1, 1) * (place > 0)
            + x.sum(1, keepdim=True) / 8
        )
        h = torch.tanh(x + torch.sin(place * torch.arange(1.0, 17)))
        return types.SimpleNamespace(logits=self.head(h.to(self.head.weight.dtype)))


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "block_length": 4},
    {"temperature": 0.7, "cfg_scale": 1.5, "block_length": 4},
    {"temperature": 0.0, "cfg_scale": 0.5},
    {"temperature": 1.0, "remasking": "random"},
    {"temperature": 0.0, "logits_eos_inf": True, "confidence_eos_eot_inf": True},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_hidden_states_give_the_same_tokens(options):
    model, prompt = Tiny(), torch.arange(10).reshape(2, 5)
    options = {"steps": 8, "gen_length": 16, "block_length": 8, "mask_id": 59} | options
    options["end_tokens"] = (7, 7, 9)
    seeds = torch.tensor([3, 4])
    report = adapters.Report("llada", "", "")
    a = llada.generate(model, prompt, seeds=seeds, report=report, **options)
    b = llada.generate(model, prompt, seeds=seeds, hidden_states=False, **options)
    assert torch.equal(a, b)
    assert "hidden states" in report.notes[0]
    assert "forward" not in vars(model.head)


def greedy(model, prompt, steps, gen_length, block_length, mask_id, cfg_scale, attention_mask=None):
    """LLaDA at temperature 0, said again: argmax, its probability, the surest few of each row."""
    x = torch.cat([prompt, torch.full((len(prompt), gen_length), mask_id)], 1)
    given, length = x != mask_id, prompt.shape[1]
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, torch.ones(len(prompt), gen_length).long()], 1)
    for end in range(length + block_length, x.shape[1] + 1, block_length):
        total = (x[:, end - block_length : end] == mask_id).sum(1)
        each = steps * block_length // gen_length
        for i in range(each):
            logits = model(x, attention_mask).logits
            if cfg_scale:
                uncond = model(torch.where(given, mask_id, x), attention_mask).logits
                logits = uncond + (cfg_scale + 1) * (logits - uncond)
            best, token = logits.softmax(-1).max(-1)
            best[:, end:] = -1
            best[x != mask_id] = -1
            for row, count in enumerate((total // each + (i < total % each)).tolist()):
                chosen = best[row].topk(count).indices
                x[row, chosen] = token[row, chosen]
    return x


@pytest.mark.parametrize("cfg", [0.0, 1.0])
@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("steps", [4, 8, 16])  # multiples of the blocks
def test_greedy_is_identical(cfg, block, steps):
    model, prompt = Tiny(), torch.randint(0, 50, (3, 6), generator=torch.manual_seed(1))
    want = greedy(model, prompt, steps, 16, block, 59, cfg)
    got = llada.generate(
        model, prompt, steps=steps, gen_length=16, block_length=block, cfg_scale=cfg, mask_id=59
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("hidden", [True, False])
def test_ragged_prompts_draw_what_they_draw_alone(temperature, hidden):
    model, rng = Tiny(), np.random.default_rng(0)
    prompts = [torch.from_numpy(rng.integers(0, 50, n)) for n in (9, 1, 4, 9, 2, 7, 5, 3)]
    seeds = torch.arange(8) + 100
    options = {"steps": 8, "gen_length": 16, "block_length": 8, "mask_id": 59}
    options |= {"temperature": temperature, "hidden_states": hidden}
    padded = torch.stack([torch.cat([torch.zeros(9 - len(p)).long(), p]) for p in prompts])
    mask = torch.stack([(torch.arange(9) >= 9 - len(p)).long() for p in prompts])
    together = llada.generate(model, padded, mask, seeds=seeds, **options)
    for row, prompt in enumerate(prompts):
        alone = llada.generate(model, prompt[None], seeds=seeds[row : row + 1], **options)
        assert torch.equal(together[row, 9:], alone[0, len(prompt) :]), f"row {row}"


NEW = (
    "model, prompt, attention_mask=None, steps=128, gen_length=128, block_length=128, "
    "temperature=0., cfg_scale=0., remasking='low_confidence', mask_id=126336, "
    "logits_eos_inf=False, confidence_eos_eot_inf=False"
)
OLD = (
    "model, prompt, steps=128, gen_length=128, block_length=128, temperature=0., cfg_scale=0., "
    "remasking='low_confidence', mask_id=126336"
)


def module(parameters, body="return 'theirs'"):
    """A module whose functions have the parameters of LLaDA's."""
    code = f"""
def add_gumbel_noise(logits, temperature): pass
def get_num_transfer_tokens(mask_index, steps): pass
def generate({parameters}):
    {body}
"""
    target = types.ModuleType("generate")
    exec(code, target.__dict__)
    return target


@pytest.mark.parametrize("parameters", [NEW, OLD])
def test_patch_and_undo(parameters):
    target, model, prompt = module(parameters), Tiny(), torch.arange(5)[None]
    before = dict(vars(target))
    with on_toy(target) as handle:
        torch.manual_seed(3)
        first = target.generate(
            model, prompt, steps=4, gen_length=8, block_length=8, temperature=1.0, mask_id=59
        )
        torch.manual_seed(3)
        again = target.generate(
            model, prompt, steps=4, gen_length=8, block_length=8, temperature=1.0, mask_id=59
        )
        assert torch.equal(first, again)
        assert handle.report.calls == 2
        assert handle.report.replaced == ("generate",)
        with pytest.raises(adapters.AdapterError, match="patched already"):
            patch_toy(target)
    assert vars(target) == before
    with pytest.raises(adapters.AdapterError, match="not patched any more"):
        handle.undo()
    if parameters == OLD:  # the arguments of the old version come in another order
        with on_toy(target):
            out = target.generate(model, prompt, 4, 8, 8, 0.0, 0.0, "low_confidence", 59)
        assert out.shape == (1, 13)


def test_unknown_version_is_refused_and_left_alone():
    target = module("model, prompt, steps, blocks")
    before = dict(vars(target))
    with pytest.raises(
        adapters.AdapterError, match="unknown version of LLaDA's generate; expected"
    ):
        patch_toy(target)
    assert vars(target) == before
    with pytest.raises(adapters.AdapterError, match="no adapter knows the module empty"):
        patch_toy(types.ModuleType("empty"))
    with pytest.raises(adapters.AdapterError, match="nothing: expected one of the options"):
        patch_toy(module(NEW), nothing=1)
    for adapter in ("nothing", []):
        with pytest.raises(adapters.AdapterError, match="adapter: expected one of"):
            patch_toy(target, adapter=adapter)
    fresh = module(NEW)
    for option in ({"noise": 5}, {"backend": "pallas"}):
        with pytest.raises(adapters.AdapterError, match=f"{next(iter(option))}: expected"):
            patch_toy(fresh, **option)
    assert not any(name.startswith("_maskgit") for name in vars(fresh))


def test_scores_are_in_the_dtype_of_the_code(monkeypatch):
    seen = []
    monkeypatch.setattr(
        llada, "rule_for", lambda *a: seen.append(a[2]) or llada.StepRule.preset("llada")
    )
    model, prompt = Tiny(), torch.arange(5)[None]
    for body, dtype in (("return 'theirs'", "logits"), ("return model.to(x.float64)", "float64")):
        target = module(OLD, body)
        with on_toy(target):
            target.generate(model, prompt, steps=1, gen_length=4, block_length=4, mask_id=59)
        assert seen.pop() == dtype


def test_fixed_repairs_what_looks_like_a_mistake(monkeypatch):
    """The mask id is never drawn, and both end tokens are kept from being sure at any temperature."""

    def model(tokens, attention_mask=None):
        logits = torch.zeros(*tokens.shape, 12)
        logits[..., 7] = 30.0  # an end token everywhere,
        logits[:, 5:7, 7], logits[:, 5:7, 3] = 0, 20.0  # but at two places
        logits[:, 8, 11] = 90.0  # the mask at one
        return types.SimpleNamespace(logits=logits)

    prompt, options = torch.zeros(1, 4).long(), {"gen_length": 8, "block_length": 8, "mask_id": 11}
    options |= {"steps": 4, "temperature": 1.0, "confidence_eos_eot_inf": True}
    options["end_tokens"] = (7, 7, 9)
    theirs = llada.generate(model, prompt, seeds=[1], **options)
    fixed = llada.generate(model, prompt, seeds=[1], fixed=True, **options)
    assert (theirs == 11).any()
    assert (fixed != 11).all()
    loop, commits = llada.run_steps, []

    def watched(*args, **kwargs):
        commits.append(loop(*args, **kwargs, record=True))
        return commits[-1]

    monkeypatch.setattr(llada, "run_steps", watched)
    for repair in (False, True):
        llada.generate(model, prompt, seeds=[1], fixed=repair, **options)
    early = [out.trajectory.commit_steps[0, 5:7].tolist() for out in commits]
    assert early[0] != [0, 0]
    assert early[1] == [0, 0]  # the two that do not end the text come first


def test_numbers_of_numpy_are_numbers():
    model, prompt = Tiny(), torch.arange(5)[None]
    options = {"steps": np.int64(4), "gen_length": np.int32(8), "block_length": np.int64(4)}
    options |= {"temperature": np.float32(0), "cfg_scale": np.float64(0), "mask_id": 59}
    assert torch.equal(
        llada.generate(model, prompt, **options),
        llada.generate(model, prompt, steps=4, gen_length=8, block_length=4, mask_id=59),
    )


def test_bad_arguments():
    model, prompt = Tiny(), torch.arange(5)[None]
    for message, options in {
        "block_length: expected a divisor of gen_length 16, got 5": {"block_length": 5},
        "steps: expected a multiple of the 2 blocks, got 7": {"steps": 7},
        "remasking: expected low_confidence or random, got 'no'": {"remasking": "no"},
        "gen_length: expected an integer >= 1, got 0": {"gen_length": 0},
        "steps: expected an integer >= 1, got None": {"steps": None},
        "cfg_scale: expected a finite number, got nan": {"cfg_scale": float("nan")},
        "attention_mask: expected the prompt's shape": {"attention_mask": prompt[:, :2]},
    }.items():
        given = {"gen_length": 16, "block_length": 8, "steps": 8, "mask_id": 59} | options
        with pytest.raises(ValueError, match=message):
            llada.generate(model, prompt, **given)
    with pytest.raises(TypeError, match="prompt: expected a torch tensor, got list"):
        llada.generate(model, [1, 2])

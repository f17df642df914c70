"""The Dream adapter: tokens of recorded runs, and those of its loop said again, through a stub model."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import on_toy, patch_toy

import maskgit
from maskgit import StepNoise, adapters

torch = pytest.importorskip("torch")
from maskgit.adapters import dream  # noqa: E402
from maskgit.adapters.fingerprint import TRUSTED  # noqa: E402
from maskgit.adapters.lazy_head import HIDDEN  # noqa: E402

NUCLEUS = {"temperature": 0.7, "top_p": 0.9, "top_k": 6}
GOLDEN = {  # what their own `_sample` was called with; in dream-nucleus-bf16 scores of 1 tie at a cut
    "maskgit-plus": {"alg": "maskgit_plus"},
    "maskgit-plus-bf16": {"alg": "maskgit_plus"},
    "margin": {"alg": "topk_margin"},
    "entropy": {"alg": "entropy"},
    "entropy-bf16": {"alg": "entropy"},
    "origin": {"alg": "origin"},
    "origin-drawn": {"alg": "origin"} | NUCLEUS,
    "drawn": {"alg": "maskgit_plus"} | NUCLEUS,
    "drawn-bf16": {"alg": "maskgit_plus", "temperature": 0.7},
    "entropy-drawn": {"alg": "entropy"} | NUCLEUS,
    "alg-temp": {"alg": "maskgit_plus", "alg_temp": 0.4},
    "uneven": {"alg": "maskgit_plus"},
}
BACKENDS = [n for n in ("cpp", "torch", "reference") if maskgit.available_backends()[n] is None]
V, MASK = 40, 39
ALGORITHMS = ["origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass
class DreamModelOutput:
    sequences: object
    history: object


class Stub(torch.nn.Module):
    """Dream's interface: a network of two layers, `diffusion_generate`, and a loop said again."""

    config = SimpleNamespace()
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(V, 16)
        self.lm_head = torch.nn.Linear(16, V, bias=False)
        self.lm_head.weight.data *= 4
        self.forwards, self.heads = 0, []
        self.requires_grad_(False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x, attention_mask=None, tok_idx=None):
        self.forwards += 1
        self.seen = attention_mask, tok_idx
        hidden = self.embed(x)
        hidden = hidden + 0.7 * hidden.roll(2, 1) - 0.5 * hidden.roll(-1, 1)
        place = torch.arange(x.shape[1]) if tok_idx is None else tok_idx
        hidden = hidden + torch.sin(place[..., None] * torch.arange(1.0, 17))
        return SimpleNamespace(logits=self.lm_head(hidden))

    def diffusion_generate(self, inputs=None, generation_config=None, **kwargs):
        config = copy.copy(generation_config)
        on_tokens = kwargs.pop("generation_tokens_hook_func", lambda step, x, logits: x)
        on_logits = kwargs.pop("generation_logits_hook_func", lambda step, x, logits: logits)
        attention_mask = kwargs.pop("attention_mask", None)
        for name, value in kwargs.items():
            setattr(config, name, value)
        return self._sample(
            inputs,
            attention_mask=attention_mask,
            generation_config=config,
            generation_tokens_hook_func=on_tokens,
            generation_logits_hook_func=on_logits,
        )

    def _sample(
        self, input_ids, attention_mask, generation_config, generation_tokens_hook_func,
        generation_logits_hook_func,
    ):  # fmt: skip
        x = torch.nn.functional.pad(
            input_ids, (0, generation_config.max_length - input_ids.shape[1]), value=MASK
        )
        steps, histories = generation_config.steps, []
        x = generation_tokens_hook_func(None, x, None)
        for i in range(steps):
            logits = self(x).logits[:, [0, *range(x.shape[1] - 1)]]
            logits = generation_logits_hook_func(i, x, logits)
            x = one_step(logits, x, i, generation_config)
            x = generation_tokens_hook_func(i, x, logits)
            histories.append(x.clone())
        if generation_config.return_dict_in_generate:
            return DreamModelOutput(x, histories)
        return x


def noise(step, x):
    rng = np.random.default_rng(step)
    token, choice = rng.gumbel(size=(*x.shape, V)), rng.gumbel(size=x.shape)
    return StepNoise(torch.from_numpy(token).float(), torch.from_numpy(choice).float())


def one_step(logits, x, i, config):
    """Filter, draw, score and commit, row by row; no row commits more than it has masks."""
    steps, masked = config.steps, x == MASK
    token, choice = (g.double() for g in noise(i, x))
    keys = logits.double() / (config.temperature or 1.0)
    if config.top_p is not None and config.top_p < 1:
        p, order = keys.softmax(-1).sort(descending=True, stable=True)
        keys = keys.masked_fill(
            (p.cumsum(-1) - p > config.top_p).gather(-1, order.argsort()), -1e30
        )
    if config.top_k is not None:
        keys = keys.masked_fill(keys < keys.topk(config.top_k)[0][..., -1:], -1e30)
    p = keys.softmax(-1)
    drawn = (p.log() + token if config.temperature else p).argmax(-1)
    times = torch.linspace(1, config.eps, steps + 1)
    share = 1.0 if i == steps - 1 else float(1 - times[i + 1] / times[i])
    if config.alg == "origin":
        return torch.where(masked & (torch.exp(-torch.exp(-choice)) < share), drawn, x)
    two = p.topk(2).values
    score = {
        "maskgit_plus": p.gather(-1, drawn[..., None])[..., 0],
        "topk_margin": two[..., 0] - two[..., 1],
        "entropy": (p * (p + 1e-10).log()).sum(-1),
    }[config.alg]
    score = score + (config.alg_temp or 0.0) * choice
    count = int(masked.sum() / len(x) * share)
    order = score.masked_fill(~masked, -1e30).argsort(descending=True, stable=True)
    rank = order.argsort()
    return torch.where(masked & (rank < count), drawn, x)


def config(**changes):
    fields = {"max_length": 17, "mask_token_id": MASK, "steps": 6, "eps": 1e-3, "alg": "entropy"}
    fields |= {"alg_temp": None, "temperature": 0.0, "top_p": None, "top_k": None}
    fields |= {"output_history": False, "return_dict_in_generate": False}
    return SimpleNamespace(**fields | changes)


def prompt(rows=2):
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, V - 1, (rows, 4)))
    ids[:, 1] = MASK
    return ids


def patched(model, length=17, rows=2, **options):
    shape = torch.zeros(rows, length)
    return on_toy(model, noise=lambda i: noise(i, shape), **options)


@pytest.mark.parametrize("hidden_states", [True, False])
@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 0.8}, {"temperature": 0.6, "top_p": 0.9, "top_k": 9}, {"alg_temp": 0.3},
     {"top_p": 0.8, "temperature": 0.0}, {"top_p": 1.0, "top_k": 3, "steps": 1},
     {"top_p": 0, "temperature": 0.9},
     {"eps": 0.4, "temperature": 0.8}],
    ids=str,
)  # fmt: skip
def test_tokens_are_those_of_the_loop_said_again(alg, given, hidden_states):
    model = Stub()
    call = {"generation_config": config(alg=alg, **given)}
    expected = model.diffusion_generate(prompt(), **call)
    with patched(model, hidden_states=hidden_states) as handle:
        got = model.diffusion_generate(prompt(), **call)
    assert torch.equal(got, expected)
    assert handle.report.calls == 1
    assert (HIDDEN in handle.report.notes) == hidden_states


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_are_those_of_a_recorded_run(name, backend):
    path = Path(__file__).parents[1] / "golden" / f"dream-{name}.npz"
    with np.load(path, allow_pickle=False) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    steps, tokens = int(golden["num_steps"][0]), golden["tokens"].long()
    dtype = getattr(torch, meta["dtype"])
    given = config(
        steps=steps,
        max_length=tokens.shape[2],
        mask_token_id=meta["mask_token_id"],
        output_history=True,
        return_dict_in_generate=True,
        **GOLDEN[name],
    )

    def model(x, *_):
        step = next(s for s in range(steps) if torch.equal(x, tokens[s]))
        logits = golden["logits"][step].to(dtype)  # shifted already
        return SimpleNamespace(logits=torch.cat([logits[:, 1:], logits[:, :1]], 1))

    def recorded(step):
        both = ("token_gumbel", "choice_gumbel")
        return StepNoise(*(golden[name][step] if name in golden else None for name in both))

    out = dream.sample(
        model, tokens[0], None, given, noise=recorded, output_class=DreamModelOutput,
        backend=backend,
    )  # fmt: skip
    for step, after in enumerate(out.history):
        assert torch.equal(after, golden["expected"][step].long()), f"after step {step}"


def test_steps_that_commit_nothing_do_not_ask_the_model():
    model = Stub()
    call = {"generation_config": config(steps=64, max_length=12, alg="maskgit_plus")}
    expected = model.diffusion_generate(prompt(), **call)
    before, model.forwards = model.forwards, 0
    with patched(model, 12):
        got = model.diffusion_generate(prompt(), **call)
    assert torch.equal(got, expected)
    assert before == 64
    assert model.forwards <= 10  # the masks there are, and the last step


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_hooks_get_what_they_got_and_their_answers_count(alg):
    model, given = Stub(), config(alg=alg, temperature=0.5)
    calls = []

    def on_tokens(step, x, logits):
        calls.append((step, x.clone(), None if logits is None else logits.clone()))
        if step == 2:
            x[:, -1] = MASK
        return x

    def on_logits(step, x, logits):
        logits[..., 3] -= step
        return logits

    hooks = {"generation_tokens_hook_func": on_tokens, "generation_logits_hook_func": on_logits}
    expected = model.diffusion_generate(prompt(), given, **hooks)
    seen, calls = calls, []
    with patched(model) as handle:
        got = model.diffusion_generate(prompt(), given, **hooks)
    assert torch.equal(got, expected)
    assert "works on logits: a hook of the caller wants them" in handle.report.notes
    assert [c[0] for c in calls] == [c[0] for c in seen] == [None, *range(6)]
    for (_, x, logits), (_, x2, logits2) in zip(calls, seen, strict=True):
        assert torch.equal(x, x2)
        assert logits is logits2 is None or torch.equal(logits, logits2)


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_each_row_may_have_its_own_count(alg):
    """Rows of 13, 8 and 3 masks get together what each gets alone, and none is left with masks."""
    model, seeds = Stub(), torch.arange(3)
    never = torch.where(torch.arange(V) == MASK, -1e4, 0.0)  # the mask token is not predicted
    model.lm_head.bias = torch.nn.Parameter(never, requires_grad=False)
    ids = torch.randint(0, V - 1, (3, 17), generator=torch.manual_seed(3))
    for row, masked in enumerate((13, 8, 3)):
        ids[row, 17 - masked :] = MASK
    given = config(alg=alg, temperature=0.7, max_length=17)
    together = dream.sample(model, ids, None, given, seeds=seeds, fixed=True)
    for row in range(3):
        alone = dream.sample(model, ids[row : row + 1], None, given, seeds=seeds[row : row + 1])
        assert torch.equal(together[row], alone[0])
    assert (together != MASK).all()
    theirs = dream.sample(model, ids, None, given, seeds=seeds)
    assert torch.equal(theirs, together) == (alg == "origin")  # which counts nothing
    with on_toy(model, fixed=True):
        assert (model.diffusion_generate(ids, given) != MASK).all()
    with pytest.raises(adapters.AdapterError, match="fixed: expected True or False, got 1"):
        patch_toy(model, fixed=1)


def test_padded_prompts_reach_the_model_as_mask_and_positions():
    model, real = Stub(), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with patched(model, 6):
        model.diffusion_generate(prompt(), config(max_length=6), attention_mask=real)
        mask, places = model.seen
        model.diffusion_generate(prompt(), config(max_length=6), attention_mask=real * 0 + 1)
    assert model.seen == ("full", None)
    assert mask.shape == (2, 1, 6, 6)
    assert mask.dtype == torch.bool
    assert places.tolist() == [[0, 1, 2, 3, 4, 5], [1, 1, 0, 1, 2, 3]]
    row = torch.tensor([False, False, True, True, True, True])
    assert torch.equal(mask[1, 0], row[:, None] & row[None])


def test_a_padded_row_draws_what_it_draws_alone():
    table = torch.from_numpy(np.random.default_rng(5).normal(size=(20, V))).float()

    def model(x, mask, places):
        places = torch.arange(x.shape[1]).expand(x.shape) if places is None else places
        return SimpleNamespace(logits=table[places])

    ids, given = torch.tensor([[4, 5, 6, 7], [0, 0, 1, 2]]), {"alg": "origin", "temperature": 1.0}
    real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    whole = dream.sample(model, ids, real, config(max_length=12, **given), seeds=[3, 4])
    alone = dream.sample(model, ids[1:, 2:], None, config(max_length=10, **given), seeds=[4])
    assert torch.equal(whole[1, 2:], alone[0])


def test_history_and_outputs_are_the_codebases_own():
    model = Stub()
    given = config(output_history=True, return_dict_in_generate=True)
    expected = model.diffusion_generate(prompt(), given)
    with patched(model):
        got = model.diffusion_generate(prompt(), given)
    assert type(got) is DreamModelOutput
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.history, expected.history, strict=True))
    with patched(model):
        given = config(return_dict=True)  # as in a copy of theirs
        assert model.diffusion_generate(prompt(), given).history is None


def test_known_tokens_stay_where_rows_differ_in_length():
    model, ids = Stub(), prompt(3)
    ids = torch.nn.functional.pad(ids, (0, 13), value=5)
    ids[2, 4:] = MASK
    with patched(model, rows=3):
        got = model.diffusion_generate(ids, config(alg="maskgit_plus"))
    known = ids != MASK
    assert torch.equal(got[known], ids[known])


def test_patch_and_undo_leave_the_model_as_it_was():
    model = Stub()
    before, head = dict(vars(model)), dict(vars(model.lm_head))
    handle = patch_toy(model)
    assert (handle.report.adapter, handle.report.version) == ("dream", TRUSTED)
    with pytest.raises(adapters.AdapterError, match="patched already"):
        patch_toy(model)
    model.diffusion_generate(prompt(), config())
    handle.undo()
    model.__dict__ |= {"forwards": 0}
    del model.seen
    assert vars(model) == before
    assert vars(model.lm_head) == head
    assert Stub._sample is type(model)._sample


def test_the_head_is_whole_again_after_an_error():
    model = Stub()
    with patched(model):
        model.embed = None
        with pytest.raises(TypeError):
            model.diffusion_generate(prompt(), config())
    assert "forward" not in vars(model.lm_head)


def test_unknown_versions_are_refused_and_left_alone():
    class Other(Stub):
        def _sample(self, input_ids, attention_mask, generation_config):
            return input_ids

    model = Other()
    before = dict(vars(model))
    with pytest.raises(adapters.AdapterError, match="expected parameters"):
        patch_toy(model)
    assert vars(model) == before
    with pytest.raises(adapters.AdapterError, match=r"unknown version of _sample; .*trust_version"):
        adapters.patch(Stub())
    assert not any(dream.matches(other) for other in (Stub, torch, None, torch.nn.Linear(2, 2)))


def test_a_head_that_is_watched_or_unusual_is_left_in_the_forward_pass():
    model = Stub()
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    with patched(model) as handle:
        model.diffusion_generate(prompt(), config())
        assert "works on logits: the head is watched by hooks, or replaced" in handle.report.notes
        hook.remove()
        with torch.autocast("cpu"):
            model.diffusion_generate(prompt(), config())
        assert "works on logits: autocast is on" in handle.report.notes
        model.get_output_embeddings = lambda: model.embed
        model.diffusion_generate(prompt(), config())
        assert "works on logits: the model has no plain linear head" in handle.report.notes
        assert HIDDEN not in handle.report.notes
    assert seen


def test_manual_seed_repeats_a_run():
    model, given = Stub(), config(temperature=1.0)

    def run(seed):
        torch.manual_seed(seed)
        return model.diffusion_generate(prompt(), given)

    with on_toy(model):
        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
    generator = torch.Generator().manual_seed(7)
    with on_toy(model, generator=generator):
        first = run(1)
        assert torch.equal(first, (generator.manual_seed(7), run(2))[1])


def test_wrong_arguments_are_named():
    model = Stub()
    with pytest.raises(ValueError, match="backend"):
        patch_toy(model, backend="none such")
    with patched(model):
        for name, value in (("alg", "confidence_threshold"), ("top_k", 0), ("temperature", -1.0)):
            with pytest.raises(ValueError, match=name):
                model.diffusion_generate(prompt(), config(**{name: value}))
    with pytest.raises(ValueError, match="output_class"):
        dream.sample(model, prompt(), None, config(return_dict_in_generate=True))

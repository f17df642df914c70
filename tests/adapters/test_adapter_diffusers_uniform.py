"""diffusers' two schedulers without a mask token: their own runs, their pipeline, what seeds promise."""

import copy
import functools
import inspect
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "DiscreteDDIMScheduler"):
    pytest.skip("these schedulers came with diffusers 0.42", allow_module_level=True)

from diffusers.pipelines.diffusion_gemma import pipeline_diffusion_gemma  # noqa: E402
from maskgit.kernels.common import philox  # noqa: E402

from maskgit import StepNoise, adapters  # noqa: E402
from maskgit.adapters.diffusers import schedulers as ours  # noqa: E402
from maskgit.adapters.diffusers.uniform import random_ids, ways  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ["EntropyBoundScheduler", "DiscreteDDIMScheduler"]
V = 30


class Kept:
    """What a stock scheduler draws in each step, to be given again to one of ours."""

    def __init__(self, stock, seed=0):
        self.rng, self.steps = np.random.default_rng(seed), []
        step = stock.step

        @functools.wraps(step)  # the pipeline looks at its parameters
        def watched(*args, **kwargs):
            self.steps.append({})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "multinomial", self.multinomial)
                patch.setattr(torch, "randint", self.randint)
                return step(*args, **kwargs)

        stock.step = watched

    def multinomial(self, probs, num_samples, generator=None):
        gumbels = torch.from_numpy(self.rng.gumbel(size=tuple(probs.shape)))
        self.steps[-1]["way" if probs.shape[-1] == 3 else "token"] = gumbels.float()
        return (probs.double().log() + gumbels).argmax(-1, keepdim=True)

    def randint(self, low, high, size, **_):
        self.steps[-1]["ids"] = torch.from_numpy(self.rng.integers(low, high, tuple(size)))
        return self.steps[-1]["ids"]

    def options(self, shape, step=-1):
        kept = self.steps[step]
        noise = [kept[n].view(*shape, -1) if n in kept else None for n in ("token", "way")]
        return {"noise": StepNoise(*noise), "random_tokens": kept["ids"]}

    def inject(self, mine):
        step, numbers = mine.step, iter(range(len(self.steps)))

        @functools.wraps(step)
        def given(*args, **kwargs):
            return step(*args, **kwargs, **self.options(kwargs["sample"].shape, next(numbers)))

        mine.step = given


def twins(kind, **config):
    stock = getattr(diffusers, kind)(**config)
    return stock, getattr(ours, kind).from_config(stock.config)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_config_folder(kind, tmp_path):
    twins(kind, num_inference_steps=7)[0].save_pretrained(tmp_path)
    loaded = getattr(ours, kind).from_pretrained(tmp_path)
    assert isinstance(loaded, getattr(diffusers, kind))
    assert loaded.config.num_inference_steps == 7
    loaded.save_pretrained(tmp_path / "again")
    again = getattr(diffusers, kind).from_pretrained(tmp_path / "again")
    assert type(again) is getattr(diffusers, kind)
    for other in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert type(other) is getattr(ours, kind)
    for name in ("step", "set_timesteps"):
        mine, theirs = (inspect.signature(getattr(k, name)).parameters for k in (loaded, again))
        assert [*mine][: len(theirs)] == [*theirs]


@pytest.mark.parametrize("option", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_the_stock_one(kind, option):
    stock, mine = twins(kind)
    kept, rng = Kept(stock), torch.Generator().manual_seed(5)
    options = {"temperature" if kind.startswith("Discrete") else "entropy_bound": option}
    decided, seen = 0, 0
    for steps in (1, 4, 9):
        for scheduler in (stock, mine):
            scheduler.set_timesteps(steps)
        sample = torch.randint(0, V, (3, 12), generator=rng)
        for s in range(steps):
            logits = torch.randn(3, 12, V, generator=rng) * 3
            a = stock.step(logits, s, sample, **options)
            given = options | kept.options((3, 12))
            b = mine.step(logits, s, sample, **given)
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(b[name], a[name], msg=name)
                assert b[name].dtype == a[name].dtype
            assert len(mine.step(logits, s, sample, return_dict=False, **given)) == len(a)
            sample = a.prev_sample
            decided, seen = decided + int((sample == a.sampled_tokens).sum()), seen + 36
    assert 0.05 < decided / seen < 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_accepted_in_half_precision(dtype):
    rng, accepted = torch.Generator().manual_seed(3), 0
    for i in range(60):
        stock, mine = twins("EntropyBoundScheduler", entropy_bound=(0.1, 1.0, 5.0)[i % 3])
        for scheduler in (stock, mine):
            scheduler.set_timesteps(16)
        logits = (torch.randn(2, 24, 500, generator=rng) * 4).to(dtype)
        sample = torch.zeros(2, 24, dtype=torch.long)
        a, b = stock.step(logits, i % 16, sample), mine.step(logits, i % 16, sample)
        assert torch.equal(a.accepted_index, b.accepted_index), i
        accepted += int(a.accepted_index.sum())
    assert accepted > 100


@pytest.mark.parametrize("name", ["discrete-ddim", "discrete-ddim-drawn"])
def test_what_the_codebase_itself_did(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        golden = {k: torch.from_numpy(file[k]) for k in file.files if k != "meta"}
        meta = json.loads(str(file["meta"]))
    _, mine = twins("DiscreteDDIMScheduler")
    mine.set_timesteps(int(golden["num_steps"][0]))
    for s in range(len(golden["step"])):
        token = golden["token_gumbel"][s] if "token_gumbel" in golden else None
        out = mine.step(
            golden["logits"][s], s, golden["tokens"][s].long(), temperature=meta["temperature"],
            noise=StepNoise(token, golden["choice_gumbel"][s]),
            random_tokens=golden["random_tokens"][s].long(),
        )  # fmt: skip
        assert torch.equal(out.prev_sample, golden["expected"][s].long()), f"after step {s}"
        assert torch.equal(out.sampled_tokens, golden["candidates"][s].long())


class Gemma(torch.nn.Module):
    """What DiffusionGemmaPipeline asks of a model, and of a processor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.randn(V, 12), torch.randn(12, V) * 2
        text = SimpleNamespace(vocab_size=V)
        self.config = SimpleNamespace(canvas_length=8, get_text_config=lambda decoder: text)
        decoder = SimpleNamespace(create_diffusion_decoder_attention_mask=lambda **_: None)
        vars(self)["model"] = SimpleNamespace(encoder=lambda **_: None, decoder=decoder)

    def forward(self, decoder_input_ids, self_conditioning_logits, **_):
        h = self.embed[decoder_input_ids]
        h = torch.tanh(h + h.roll(1, 1) + h.mean(1, keepdim=True))
        if self_conditioning_logits is not None:
            h = h + self_conditioning_logits.softmax(-1) @ self.embed
        return SimpleNamespace(logits=h @ self.head)

    def apply_chat_template(self, messages, **_):
        return {"input_ids": torch.full((2, 3), 5)}


OPTIONS = {"prompt": "x", "gen_length": 16, "num_inference_steps": 6, "output_type": "seq"}
OPTIONS |= {"temperature": 0.7, "confidence_threshold": None}


def pipeline(scheduler, monkeypatch):
    cache = SimpleNamespace(get_seq_length=lambda: 0)
    monkeypatch.setattr(pipeline_diffusion_gemma, "DynamicCache", lambda **_: cache)
    pipe, model = object.__new__(diffusers.DiffusionGemmaPipeline), Gemma()
    vars(pipe).update(model=model, scheduler=scheduler, processor=model, eos_token_id=None)
    vars(pipe)["_internal_dict"] = {}
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu"))
    return pipe


def generate(scheduler, monkeypatch, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(scheduler, monkeypatch)(**OPTIONS | options, generator=generator).sequences


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("EntropyBoundScheduler", {"entropy_bound": 1.5}),
        ("DiscreteDDIMScheduler", {}),
        ("DiscreteDDIMScheduler", {"corrector_steps": 1, "corrector_k": 2}),
    ],
)
def test_their_pipeline_gives_the_same_tokens(kind, config, monkeypatch):
    stock, mine = twins(kind, **config)
    kept = Kept(stock)
    expected = generate(stock, monkeypatch)
    kept.inject(mine)
    assert torch.equal(generate(mine, monkeypatch), expected)
    assert expected.shape == (2, 16)
    assert expected.unique().numel() > 5


def test_block_refinement_without_a_mask_token_in_their_pipeline(monkeypatch):
    """At temperature 0 nothing is drawn but the ids of the generator, which stay diffusers' own."""
    stock, mine = twins("BlockRefinementScheduler", threshold=0.4)
    expected = generate(stock, monkeypatch, temperature=0.0)
    assert torch.equal(generate(mine, monkeypatch, temperature=0.0), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_pipeline_repeats_and_is_undone(kind, monkeypatch):
    pipe = pipeline(twins(kind)[0], monkeypatch)
    before = dict(vars(pipe))

    def run(seed):
        return pipe(**OPTIONS, generator=torch.Generator().manual_seed(seed)).sequences

    with adapters.fast_sampler(pipe) as handle:
        a, b, c = run(1), run(1), run(2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert handle.report.calls == 3 * 2 * 6
    assert vars(pipe) == before | {"_num_timesteps": 12}
    with adapters.fast_sampler(pipe, seeds=[7, 8]):
        assert torch.equal(run(1), run(1))


@pytest.mark.parametrize("kind", KINDS)
def test_with_seeds_a_sequence_does_not_depend_on_its_batch(kind):
    _, mine = twins(kind)
    logits, sample = torch.randn(3, 16, V) * 3, torch.randint(0, V, (3, 16))
    seeds = torch.tensor([4, 5, 6])
    for s in range(5):
        mine.set_timesteps(5)
        together = mine.step(logits, s, sample, seeds=seeds).prev_sample
        again = mine.step(logits, s, sample, seeds=seeds).prev_sample  # the next step's numbers
        mine.set_timesteps(5)
        alone = mine.step(logits[1:2], s, sample[1:2], seeds=seeds[1:2]).prev_sample
        assert torch.equal(together[1:2], alone)
        assert s == 4 or not torch.equal(together, again)


def test_the_law_of_the_ways_and_of_the_ids():
    """Counts over many seeds against the posterior; 5 standard deviations for each id."""
    _, mine = twins("DiscreteDDIMScheduler")
    mine.set_timesteps(4)
    rows, step = 20000, 2
    logits = torch.zeros(rows, 1, V)
    logits[..., 3] = 50.0
    out = mine.step(logits, step, torch.full((rows, 1), 9), seeds=torch.arange(rows)).prev_sample
    clean, stay, replaced = ways(step, 4, V)[1]
    expected = torch.full((V,), replaced / V)
    expected[3] += clean
    expected[9] += stay
    share = torch.bincount(out.flatten(), minlength=V) / rows
    assert ((share - expected).abs() < 5 * (expected / rows).sqrt() + 1e-4).all()
    assert replaced > 0.1
    held = mine.step(logits, step, torch.full((rows, 1), 3), seeds=torch.arange(rows)).prev_sample
    same = ways(step, 4, V)[0]
    assert abs(float((held == 3).float().mean()) - (same[0] + same[1] + same[2] / V)) < 0.02
    assert ways(3, 4, V) == ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])


def test_random_ids_are_words_of_a_stream_of_their_own():
    seeds, sample = torch.tensor([3, -1]), torch.zeros(2, 5, dtype=torch.long)
    for vocab in (2, 30, 262144, 2**31 - 1):
        got = random_ids(seeds, sample, 6, vocab, None)
        for b, n in np.ndindex(2, 5):
            key = philox.seed_words(np.array(seeds[b].item()))
            words = philox.philox4x32((0, n, 6, philox.STREAM_REPLACE), key)
            number = (int(words[0]) << 32) + int(words[1])
            assert got[b, n] == number * vocab >> 64


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_finite_logit_keep_no_candidate(kind):
    _, mine = twins(kind)
    mine.set_timesteps(3)
    logits, sample = torch.full((1, 4, V), float("nan")), torch.full((1, 4), 7)
    logits[0, 0] = torch.eye(V)[2] * 90
    out = mine.step(logits, 2, sample, seeds=[1], random_tokens=torch.full((1, 4), 5))
    rest = 5 if kind.startswith("Entropy") else 7  # replaced, or staying
    assert out.prev_sample.tolist() == [[2, rest, rest, rest]]


def test_what_is_refused():
    (_, ddim), (_, bound) = twins("DiscreteDDIMScheduler"), twins("EntropyBoundScheduler")
    logits, sample = torch.zeros(1, 4, V), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature"):
        ddim.step(logits, 0, sample, temperature=-1.0)
    with pytest.raises(ValueError, match="backend"):
        ddim.step(logits, 0, sample, backend="abacus")
    with pytest.raises(ValueError, match="entropy_bound: expected a finite number, got 'x'"):
        bound.step(logits, 0, sample, entropy_bound="x")

import copy
import functools
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_amused  # noqa: E402

import maskgit  # noqa: E402
from maskgit import StepNoise, adapters  # noqa: E402
from maskgit.adapters import AdapterError  # noqa: E402
from maskgit.adapters.diffusers import schedulers as ours  # noqa: E402

MASK, CODES, SIDE = 39, 32, 8
GOLDEN = Path(__file__).parents[1] / "golden"
MINE = ours.AmusedScheduler  # while diffusers is as it was, which its noise is not in some tests


class SameNoise:
    """The stock scheduler draws from noise that is kept; the replacement is given it again."""

    def __init__(self, monkeypatch, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.token, self.choice = [], []
        monkeypatch.setattr(torch, "multinomial", self.multinomial)
        monkeypatch.setattr(scheduling_amused, "gumbel_noise", self.gumbel_noise)

    def gumbel(self, shape):
        u = torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)
        return -torch.log(-torch.log(u.clamp(1e-12, 1 - 1e-12)))

    def multinomial(self, probs, num_samples, generator=None):
        self.token.append(self.gumbel(probs.shape))
        return (probs.double().log() + self.token[-1]).argmax(-1, keepdim=True)

    def gumbel_noise(self, like, generator=None):
        self.choice.append(self.gumbel(like.shape))
        return self.choice[-1].float()

    def inject(self, scheduler):
        """Give the kept noise, step by step, to a scheduler of ours."""
        step, token, choice = scheduler.step, iter(self.token), iter(self.choice)

        def with_noise(model_output, timestep, sample, *args, **kwargs):
            shape = (sample.shape[0], sample[0].numel(), -1)
            drawn, ranked = next(token, None), next(choice, None)
            if (
                ranked is None
                and scheduling_amused.__name__ in type(scheduler).__mro__[1].__module__
            ):
                ranked = torch.zeros(shape[:2])  # the last step, which ranks nothing
            noise = StepNoise(None if drawn is None else drawn.reshape(shape).float(), ranked)
            return step(model_output, timestep, sample, *args, noise=noise, **kwargs)

        scheduler.step = with_noise


@pytest.fixture
def same_noise(monkeypatch):
    return SameNoise(monkeypatch)


def amused_parts():
    torch.manual_seed(0)
    transformer = diffusers.UVit2DModel(
        hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
        encoder_hidden_size=16, vocab_size=MASK + 1, codebook_size=CODES, in_channels=16,
        block_out_channels=16, num_res_blocks=1, block_num_heads=2, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, downsample=False, upsample=False,
        sample_size=SIDE,
    )  # fmt: skip
    for parameter in transformer.parameters():  # random weights of the size that gives sure tokens
        torch.nn.init.normal_(parameter, std=0.3)
    vqvae = diffusers.VQModel(
        block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], latent_channels=8,
        up_block_types=["UpDecoderBlock2D"], norm_num_groups=4, num_vq_embeddings=CODES,
        mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip
    return {"transformer": transformer.eval(), "vqvae": vqvae.eval()}


def amused_pipeline(scheduler, kind="AmusedPipeline", **parts):
    pipe = getattr(diffusers, kind)(
        scheduler=scheduler, tokenizer=None, text_encoder=None, **(parts or amused_parts())
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def amused_arguments(batch=2):
    generator = torch.Generator().manual_seed(3)
    pooled, states = (torch.randn(s, generator=generator) for s in ((batch, 8), (batch, 5, 16)))
    return {
        "prompt_embeds": pooled, "encoder_hidden_states": states,
        "negative_prompt_embeds": pooled.flip(0), "negative_encoder_hidden_states": states.flip(0),
        "output_type": "latent",
    }  # fmt: skip


def run_amused(pipe, **kwargs):
    with torch.no_grad():
        return pipe(**amused_arguments(), **kwargs).images


def test_names_and_config_folder(tmp_path):
    stock = diffusers.AmusedScheduler(mask_token_id=MASK, masking_schedule="linear")
    stock.save_pretrained(tmp_path)
    loaded = ours.AmusedScheduler.from_pretrained(tmp_path)
    assert isinstance(loaded, diffusers.AmusedScheduler)
    assert dict(loaded.config)["masking_schedule"] == "linear"
    loaded.save_pretrained(tmp_path / "again")
    again = diffusers.AmusedScheduler.from_pretrained(tmp_path / "again")
    assert type(again) is diffusers.AmusedScheduler
    assert again.config.mask_token_id == MASK
    assert type(pickle.loads(pickle.dumps(loaded))) is ours.AmusedScheduler
    assert type(copy.deepcopy(loaded)) is ours.AmusedScheduler
    with pytest.raises(AttributeError, match="DDIM"):
        _ = ours.DDIMScheduler


def recorded(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        return {k: torch.from_numpy(file[k]) for k in file.files if k != "meta"}, meta


@pytest.mark.parametrize(
    "name", ["", "-known", "-from-image", "-inpaint", "-linear", "-float16", "-bfloat16"]
)
def test_what_amused_itself_did(name):
    golden, meta = recorded(f"amused{name}")
    schedule = "linear" if name == "-linear" else "cosine"
    mine = ours.AmusedScheduler(meta["mask_token_id"], masking_schedule=schedule)
    start = torch.tensor(22) / torch.tensor(32) if name == "-inpaint" else 1.0
    for s, step in enumerate(golden["step"].tolist()):
        mine.set_timesteps(int(golden["num_steps"][s]))
        noise = StepNoise(golden["token_gumbel"][s].float(), golden["choice_gumbel"][s].float())
        logits = golden["logits"][s].to(getattr(torch, meta["dtype"]))
        before, timestep = golden["tokens"][s].long(), mine.timesteps[step]
        out = mine.step(logits, timestep, before, start, noise=noise)
        assert torch.equal(out.prev_sample, golden["expected"][s].long()), f"after step {s}"
        assert torch.equal(out.pred_original_sample, golden["candidates"][s].long())


@pytest.mark.parametrize("name", ["", "-quota", "-drawn", "-edit"])
def test_what_block_refinement_itself_did(name):
    golden, meta = recorded(f"llada2{name}")
    mine, length = ours.BlockRefinementScheduler(), golden["tokens"].shape[2]
    mine.set_timesteps(int(golden["num_steps"][0]), block_length=length)
    prompt = torch.arange(length) < meta["prompt"]
    for s in range(len(golden["step"])):
        noise = StepNoise(golden["token_gumbel"][s]) if "token_gumbel" in golden else None
        before = golden["tokens"][s].long()
        arguments = meta["options"] | {"prompt_mask": prompt, "noise": noise}
        out = mine.step(golden["logits"][s], s, before, **arguments)
        assert torch.equal(out.prev_sample, golden["expected"][s].long()), f"after step {s}"


def test_a_saved_pipeline_names_the_stock_scheduler(tmp_path):
    pipe = amused_pipeline(ours.AmusedScheduler(mask_token_id=MASK))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.AmusedPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None)
    assert type(loaded.scheduler) is diffusers.AmusedScheduler
    own = ours.AmusedScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = diffusers.AmusedPipeline.from_pretrained(
        tmp_path, scheduler=own, tokenizer=None, text_encoder=None
    )
    assert type(loaded.scheduler) is ours.AmusedScheduler


@pytest.mark.parametrize(("schedule", "guidance"), [("cosine", 3.0), ("linear", 0.0)])
def test_stock_amused_pipeline_gives_the_same_tokens(same_noise, schedule, guidance):
    stock = diffusers.AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    parts = amused_parts()
    options = {"num_inference_steps": 7, "guidance_scale": guidance, "temperature": (2, 0)}
    expected = run_amused(amused_pipeline(stock, **parts), **options)
    pipe = amused_pipeline(MINE.from_config(stock.config), **parts)
    same_noise.inject(pipe.scheduler)
    assert torch.equal(run_amused(pipe, **options), expected)
    assert (expected != MASK).all()
    assert expected.unique().numel() > 3


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 16, 30])
@pytest.mark.parametrize("start", [1.0, 0.37, torch.tensor(0.61)])
def test_counts_are_the_stock_ones_whatever_the_start(same_noise, steps, start):
    rng = torch.Generator().manual_seed(steps)
    stock = diffusers.AmusedScheduler(mask_token_id=MASK)
    mine = MINE.from_config(stock.config)
    for scheduler in (stock, mine):
        scheduler.set_timesteps(steps, 3)
    a = torch.full((2, 9, 10), MASK)
    a[1, :4] = torch.randint(CODES, (4, 10), generator=rng)
    b, states = a.clone(), []
    for timestep in stock.timesteps:
        logits = torch.randn(2, CODES, 9, 10, generator=rng)
        a, filled = stock.step(logits, timestep, a, start, return_dict=False)
        states.append((logits, timestep, a, filled))
    same_noise.inject(mine)
    for logits, timestep, expected, filled in states:
        out = mine.step(logits, timestep, b, start)
        b = out.prev_sample
        assert torch.equal(b, expected)
        assert torch.equal(out.pred_original_sample, filled)
        assert b.dtype == expected.dtype


def test_inpainting_pipeline_gives_the_same_tokens(same_noise):
    parts = amused_parts()
    image, mask = torch.rand(2, 3, SIDE, SIDE), torch.zeros(2, 1, SIDE, SIDE)
    mask[:, :, 2:7, 1:6] = 1
    stock = diffusers.AmusedScheduler(mask_token_id=MASK)
    options = {"image": image, "mask_image": mask, "num_inference_steps": 5, "strength": 1.0,
               "generator": torch.Generator().manual_seed(1)}  # fmt: skip
    expected = run_amused(amused_pipeline(stock, "AmusedInpaintPipeline", **parts), **options)
    pipe = amused_pipeline(MINE.from_config(stock.config), "AmusedInpaintPipeline", **parts)
    assert pipe.scheduler.config.masking_schedule == "linear"
    same_noise.inject(pipe.scheduler)
    options["generator"].manual_seed(1)
    assert torch.equal(run_amused(pipe, **options), expected)


def test_patched_pipeline_repeats_with_the_generator_and_is_undone():
    pipe = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    before = dict(vars(pipe))
    with adapters.fast_sampler(pipe) as handle:
        assert type(pipe.scheduler) is ours.AmusedScheduler
        with pytest.raises(AdapterError, match="patched already"):
            adapters.patch(pipe)
        options = {"num_inference_steps": 4, "guidance_scale": 2.0}
        a, b, c = (
            run_amused(pipe, generator=torch.Generator().manual_seed(s), **options)
            for s in (1, 1, 2)
        )
        assert handle.report.calls == 12
        assert "scheduler" in handle.report.replaced
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert vars(pipe) == before
    assert pipe.scheduler is before["scheduler"]


def test_given_seeds_do_not_depend_on_the_generator():
    pipe = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    options = {"num_inference_steps": 4, "guidance_scale": 2.0}
    with adapters.fast_sampler(pipe, seeds=torch.tensor([5, 6])):
        state = torch.get_rng_state()
        assert torch.equal(run_amused(pipe, **options), run_amused(pipe, **options))
        assert torch.equal(torch.get_rng_state(), state)


def test_low_precision_logits_and_channels_in_front_need_no_copy():
    mine = ours.AmusedScheduler(mask_token_id=MASK)
    mine.set_timesteps(3, device="cpu")
    sample = torch.full((2, 4, 4), MASK)
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.randn(2, CODES, 4, 4).to(dtype)
        out = mine.step(logits, 2, sample, generator=torch.Generator().manual_seed(0))
        assert out.prev_sample.shape == sample.shape
        assert 0 < (out.prev_sample == MASK).sum() < 32


class Words(torch.nn.Module):
    """What LLaDA2Pipeline asks of a model, around a tiny causal one."""

    def __init__(self, vocab=40):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(1)
        config = transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, initializer_range=0.6,
        )  # fmt: skip
        self.inner, self.rows = transformers.LlamaForCausalLM(config).eval(), []

    @property
    def device(self):
        return self.inner.device

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, ids, attention_mask=None, position_ids=None):
        out = self.inner(ids, attention_mask=attention_mask, position_ids=position_ids)
        self.rows.append(out.logits.shape[1])
        out.logits = out.logits[:, :, : MASK - 1] * 3
        return out


LLADA2 = {
    "gen_length": 16, "num_inference_steps": 5, "mask_token_id": MASK, "eos_token_id": 2,
    "output_type": "seq",
}  # fmt: skip


def llada2(scheduler, model):
    pipe = diffusers.LLaDA2Pipeline(model=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.5, "editing_threshold": None},
        {"threshold": 2.0, "editing_threshold": None, "eos_early_stop": False},
        {"threshold": 0.4, "editing_threshold": 0.3},
        {"threshold": 0.3, "temperature": 0.8, "editing_threshold": None},
        {"threshold": 0.6, "temperature": 1.2, "top_k": 9, "top_p": 0.8, "editing_threshold": 0.5},
        {"threshold": 0.6, "temperature": 0.7, "sampling_method": "greedy"},
    ],
)
def test_stock_llada2_pipeline_gives_the_same_tokens(same_noise, options):
    model, prompt = Words(), torch.randint(3, 30, (3, 5), generator=torch.manual_seed(0))
    stock = diffusers.BlockRefinementScheduler(block_length=8)
    expected = llada2(stock, model)(input_ids=prompt, **LLADA2, **options).sequences
    pipe = llada2(ours.BlockRefinementScheduler.from_config(stock.config), model)
    same_noise.inject(pipe.scheduler)
    got = pipe(input_ids=prompt, **LLADA2, **options).sequences
    assert torch.equal(got, expected)
    assert (expected != MASK).any()


def test_every_output_of_a_refinement_step_is_the_stock_one():
    stock = diffusers.BlockRefinementScheduler(threshold=0.2, editing_threshold=0.1)
    mine = ours.BlockRefinementScheduler.from_config(stock.config)
    logits = torch.randn(3, 8, 20, generator=torch.manual_seed(2)) * 2
    sample = torch.randint(0, 20, (3, 8))
    sample[:, ::2] = MASK
    sample[2] = 4
    prompt = torch.arange(8) < 3
    for scheduler in (stock, mine):
        scheduler.set_timesteps(3, block_length=8)
    a, b = (
        s.step(logits, 1, sample, mask_token_id=MASK, prompt_mask=prompt) for s in (stock, mine)
    )
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], msg=name)
    assert a.editing_transfer_index.any()
    assert a.transfer_index.any()
    as_tuple = mine.step(logits, 1, sample, mask_token_id=MASK, return_dict=False)
    assert len(as_tuple) == 6


def test_end_of_text_is_found_as_the_stock_loop_finds_it():
    rng = torch.manual_seed(4)
    found = 0
    for _ in range(40):
        x = torch.randint(0, 5, (6, 12), generator=rng)  # 0 ends a text, 1 is the mask
        sampled, moved = x.clone(), torch.rand(6, 12, generator=rng) < 0.5
        finished = torch.rand(6, generator=rng) < 0.2
        arguments = (x, sampled, moved)
        named = {"eos_token_id": 0, "mask_token_id": 1, "prompt_length": 3}
        a = diffusers.BlockRefinementScheduler.check_eos_finished(
            *arguments, finished.clone(), **named
        )
        b = ours.BlockRefinementScheduler.check_eos_finished(*arguments, finished.clone(), **named)
        assert torch.equal(a, b)
        found += int((a & ~finished).sum())
    assert found > 10


def test_uniform_corruption_runs_with_our_draw(same_noise):
    stock = diffusers.BlockRefinementScheduler(block_length=8, num_inference_steps=4, threshold=0.5)
    mine = ours.BlockRefinementScheduler.from_config(stock.config)
    rng = torch.Generator()
    logits = [torch.randn(2, 8, 20, generator=torch.manual_seed(s)) * 3 for s in range(4)]
    runs = []
    for scheduler in (stock, mine):
        scheduler.set_timesteps(4, block_length=8)
        if scheduler is mine:
            same_noise.inject(mine)
        sample, rng = torch.zeros(2, 8, dtype=torch.long), torch.Generator().manual_seed(9)
        for s in range(4):
            out = scheduler.step(logits[s], s, sample, temperature=0.7, generator=rng)
            sample = out.prev_sample
        runs.append(sample)
    assert torch.equal(*runs)


def test_patched_llada2_pipeline():
    pipe = llada2(diffusers.BlockRefinementScheduler(block_length=8), Words())
    prompt, options = torch.full((2, 3), 7), {"temperature": 1.0, "editing_threshold": None}
    greedy = {"editing_threshold": None, "threshold": 0.5}
    expected = pipe(input_ids=prompt, **LLADA2, **greedy).sequences
    before = dict(vars(pipe))
    with adapters.fast_sampler(pipe, backend="torch") as handle:
        torch.manual_seed(5)
        a = pipe(input_ids=prompt, **LLADA2, **options).sequences
        torch.manual_seed(5)
        b = pipe(input_ids=prompt, **LLADA2, **options).sequences
    assert torch.equal(a, b)
    assert handle.report.calls > 2
    assert vars(pipe) == before
    with adapters.fast_sampler(pipe, seeds=torch.tensor([1, 2])):
        assert torch.equal(pipe(input_ids=prompt, **LLADA2, **greedy).sequences, expected)


@pytest.mark.parametrize("block", [4, 8])
def test_a_head_that_sees_the_block_alone_gives_the_same_tokens(block):
    pipe, rows = llada2(diffusers.BlockRefinementScheduler(), Words()), []
    pipe.model.rows = rows
    options = {"input_ids": torch.full((2, 3), 7), "threshold": 0.6, "block_length": block}
    expected = pipe(**LLADA2, **options).sequences
    assert max(rows) > block
    rows.clear()
    with adapters.fast_sampler(pipe, trim_head=True) as handle:
        assert torch.equal(pipe(**LLADA2, **options).sequences, expected)
        assert handle.report.replaced == ("scheduler", "forward")
    assert set(rows) == {block}
    assert "forward" not in vars(pipe.model.inner.lm_head)
    pipe.model.get_output_embeddings = lambda: None
    with pytest.raises(AdapterError, match="head"):
        adapters.patch(pipe, trim_head=True)
    amused = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    with pytest.raises(AdapterError, match="LLaDA2Pipeline"):
        adapters.patch(amused, trim_head=True)


def test_numbers_of_numpy_are_numbers():
    block, logits = ours.BlockRefinementScheduler(), torch.randn(2, 6, 20)
    sample, seeds = torch.full((2, 6), MASK), np.arange(2)
    options = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": np.float32(0.9)}
    options |= {"threshold": np.float32(0.5), "mask_token_id": np.int64(MASK)}
    outs = []
    for given in (options, {k: v.item() for k, v in options.items()}):
        block.set_timesteps(4, block_length=6)
        outs.append(block.step(logits, np.int64(1), sample, seeds=seeds, **given).prev_sample)
    assert torch.equal(*outs)


def test_a_swapped_in_scheduler_goes_on_where_the_old_one_was():
    stock = diffusers.BlockRefinementScheduler(block_length=4, threshold=0.3)
    pipe = llada2(stock, Words())
    stock.set_timesteps(5, block_length=8)
    logits = torch.randn(3, 2, 8, 20, generator=torch.manual_seed(0)) * 2
    sample = torch.zeros(2, 8, dtype=torch.long)
    for s in range(2):  # without a mask token it remembers what it has committed
        sample = stock.step(logits[s], s, sample).prev_sample
    handle = adapters.patch(pipe)
    mine = pipe.scheduler
    assert type(mine) is ours.BlockRefinementScheduler
    assert torch.equal(mine.timesteps, stock.timesteps)
    expected, got = (s.step(logits[2], 2, sample) for s in (stock, mine))
    assert torch.equal(got.transfer_index, expected.transfer_index)
    assert torch.equal(mine._committed, stock._committed)
    assert stock._committed.any()
    masked = torch.full((2, 8), MASK)
    a, b = (s.step(logits[0], 3, masked, mask_token_id=MASK) for s in (stock, mine))
    assert torch.equal(a.prev_sample, b.prev_sample)  # the quota of five steps over eight
    handle.undo()
    assert pipe.scheduler is stock
    amused = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    amused.scheduler.set_timesteps(7, (4, 1))
    with adapters.fast_sampler(amused):
        assert torch.equal(amused.scheduler.temperatures, torch.linspace(4, 1, 7))


@pytest.mark.parametrize("seeds", ["x", 1.5, [1.0, 2.0], torch.tensor([1.0]), [[1, 2, 3]], 7])
def test_seeds_are_checked_when_patching(seeds):
    pipe = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    before = dict(vars(pipe))
    with pytest.raises(AdapterError, match="seeds: expected"):
        adapters.patch(pipe, seeds=seeds)
    assert vars(pipe) == before


@pytest.mark.parametrize("seeds", [[1, 2], (2**63, -1), np.arange(2), torch.arange(2), None])
def test_seeds_that_can_be_used_are_taken(seeds):
    pipe = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    with adapters.fast_sampler(pipe, seeds=seeds):
        assert (run_amused(pipe, num_inference_steps=2, guidance_scale=0.0) != MASK).all()


def test_a_copy_of_a_model_with_a_trimmed_head_has_its_own():
    pipe = llada2(diffusers.BlockRefinementScheduler(block_length=8), Words())
    with adapters.fast_sampler(pipe, trim_head=True):
        other = copy.deepcopy(pipe.model)
    other.inner.lm_head.weight.data.zero_()
    out = other.inner.lm_head(torch.ones(1, 20, 16))
    assert out.shape == (1, 20, 40)
    assert not out.any()


def test_what_is_refused():
    mine = ours.AmusedScheduler(mask_token_id=MASK)
    logits, sample = torch.zeros(1, 4, CODES), torch.full((1, 4), MASK)
    with pytest.raises(ValueError, match="set_timesteps"):
        mine.step(logits, 0, sample)
    mine.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep"):
        mine.step(logits, 3, sample)
    with pytest.raises(ValueError, match="backend"):
        mine.step(logits, 1, sample, backend="abacus")
    pipe = llada2(diffusers.DDIMScheduler(), Words())
    assert not ours.matches(pipe)
    with pytest.raises(AdapterError, match="DDIMScheduler"):
        adapters.patch(pipe, "diffusers_schedulers")
    assert not ours.matches(object())
    with pytest.raises(AdapterError, match="scheduler"):
        adapters.patch(object(), "diffusers_schedulers")
    block = ours.BlockRefinementScheduler()
    with pytest.raises(ValueError, match="temperature"):
        block.step(logits, 0, sample, mask_token_id=MASK, temperature=-1.0)


def test_an_unknown_version_is_left_as_it_is(monkeypatch):
    pipe = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    before = dict(vars(pipe))

    def step(self, model_output, timestep, sample, another):
        pass

    monkeypatch.setattr(diffusers.AmusedScheduler, "step", step)
    with pytest.raises(AdapterError, match=r"unknown version of AmusedScheduler\.step"):
        adapters.patch(pipe)
    assert vars(pipe) == before
    monkeypatch.undo()
    adapters.patch(pipe).undo()


def test_seeds_make_the_batch_not_matter():
    mine = ours.AmusedScheduler(mask_token_id=MASK)
    mine.set_timesteps(6)
    logits, sample = torch.randn(3, 16, CODES), torch.full((3, 16), MASK)
    seeds = torch.tensor([1, 2, 3])
    together = mine.step(logits, 4, sample, seeds=seeds).prev_sample
    alone = mine.step(logits[2:], 4, sample[2:], seeds=seeds[2:]).prev_sample
    assert torch.equal(together[2:], alone)
    assert maskgit.adapters.supported()["diffusers_schedulers"]


def other_code(function):
    """The same parameters, another body."""

    @functools.wraps(function)
    def other(*args, **kwargs):
        return function(*args, **kwargs)

    del other.__wrapped__
    other.__signature__ = inspect.signature(function)
    return other


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("AmusedScheduler", name) for name in ("step", "set_timesteps")),
        *(("BlockRefinementScheduler", name) for name in ("step", "_top_k_filtering")),
        ("BlockRefinementScheduler", "_sample_from_logits"),
        ("EntropyBoundScheduler", "_sample_from_logits"),
        ("DiscreteDDIMScheduler", "step"),
    ],
)
def test_other_code_is_refused_unless_trusted(kind, name, monkeypatch):
    stock = getattr(diffusers, kind)
    ours.scheduler_class(kind)
    monkeypatch.setattr(stock, name, other_code(getattr(stock, name)))
    with pytest.raises(AdapterError, match=f"unknown version of diffusers' {kind}; .*{name}"):
        getattr(ours, kind)
    assert issubclass(ours.scheduler_class(kind, trusted=True), stock)


def test_a_helper_with_other_code_is_refused(monkeypatch):
    pipe = amused_pipeline(diffusers.AmusedScheduler(mask_token_id=MASK))
    monkeypatch.setattr(scheduling_amused, "mask_by_random_topk", lambda *_: None)
    with pytest.raises(AdapterError, match="mask_by_random_topk"):
        adapters.patch(pipe)
    with adapters.fast_sampler(pipe, trust_version=True) as handle:
        assert handle.report.version.endswith("not known, trusted")
    with pytest.raises(ValueError, match="backend: expected auto, "):
        adapters.patch(pipe, backend="cuda9")


def test_a_pipeline_with_other_code_is_refused_a_trimmed_head(monkeypatch):
    pipe = llada2(diffusers.BlockRefinementScheduler(block_length=8), Words())
    monkeypatch.setattr(type(pipe), "__call__", other_code(type(pipe).__call__))
    with pytest.raises(AdapterError, match="unknown version of LLaDA2Pipeline"):
        adapters.patch(pipe, trim_head=True)
    adapters.patch(pipe, trim_head=True, trust_version=True).undo()
    adapters.patch(pipe).undo()


@pytest.mark.parametrize("kind", ours._STEP)
def test_what_a_caller_leaves_out_has_the_default_of_diffusers(kind, monkeypatch):
    """Another diffusers, whose defaults are all others: they are what our step gets."""
    stock, seen, kinds = getattr(diffusers, kind), [], inspect.Parameter
    signature = inspect.signature(stock.step)
    given = {
        name: f"their {name}"
        for name, parameter in signature.parameters.items()
        if parameter.default is not kinds.empty
    }
    assert len(given) >= 2
    parameters = [
        p.replace(default=given.get(n, p.default)) for n, p in signature.parameters.items()
    ]
    step = other_code(stock.step)
    step.__signature__ = signature.replace(parameters=parameters)
    monkeypatch.setattr(stock, "step", step)
    monkeypatch.setitem(ours._STEPS, kind, lambda **arguments: seen.append(arguments))
    ours._derived.cache_clear()
    mine = ours.scheduler_class(kind, trusted=True)(
        **({"mask_token_id": 3} if "Am" in kind else {})
    )
    ours._derived.cache_clear()
    mine.step(1, 2, 3, seeds=4)
    mine.step(1, 2, 3, seeds=4, **given)
    assert seen[0] == seen[1]
    assert {n: v for n, v in seen[0].items() if n in given} == given
    assert [seen[0][n] for n in ("model_output", "timestep", "sample", "seeds")] == [1, 2, 3, 4]

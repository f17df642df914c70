"""Positions whose logits are all -inf or NaN: every adapter's loop ends, in as many passes as theirs."""

import types

import pytest
from helpers import on_toy, patch_toy

from maskgit import adapters

torch = pytest.importorskip("torch")

import test_adapter_dinfer as dinfer_test  # noqa: E402
import test_adapter_dream as dream_test  # noqa: E402
import test_adapter_fast_dllm as fast_dllm_test  # noqa: E402
import test_adapter_llada as llada_test  # noqa: E402
import test_adapter_maskbit as maskbit_test  # noqa: E402
import test_adapter_mdlm as mdlm_test  # noqa: E402
import test_adapter_muse as muse_test  # noqa: E402
import test_adapter_remdm as remdm_test  # noqa: E402
import test_adapter_titok as titok_test  # noqa: E402

NOTHING = [float("-inf"), float("nan")]
PLACES = [(5,), (9,), (5, 6), (4, 8, 10)]


def theirs(logits, temperature, remasking, mask_index, x, counts, threshold=None, factor=None):
    """Fast-dLLM's step at temperature 0: NaN is the largest number, and less than none."""
    drawn = logits.argmax(-1)
    p = logits.double().softmax(-1).gather(-1, drawn[..., None])[..., 0]
    kept = torch.zeros_like(mask_index)
    for b in range(len(x)):
        places = mask_index[b].nonzero()[:, 0]
        places = places[p[b][places].argsort(descending=True, stable=True)]
        falling = p[b][places].tolist()
        if factor is not None:
            n = 1
            while n < len(falling) and not falling[n] < 1 - factor / (n + 2):
                n += 1
            n += n == len(falling) - 1
        elif threshold is None:
            n = int(counts[b])
        else:
            n = max(1, sum(not value < threshold for value in falling))
        kept[b, places[:n]] = True
    return torch.where(mask_index, drawn, x), kept


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"threshold": 0.95}, {"factor": 1.0}])
def test_fast_dllm(options, places, nothing):
    """In quota mode theirs runs out of counts where a position is never kept."""

    def model(x):
        logits = fast_dllm_test.model(x)
        logits[:, list(places)] = nothing
        return logits

    target, other = types.ModuleType("generate"), types.ModuleType("generate")
    for module in (target, other):
        exec(fast_dllm_test.STUB, module.__dict__)
    other.get_transfer_index = theirs
    other.get_transfer_index_dynamic = lambda *a: theirs(*a[:5], None, factor=a[6])
    expected = other.generate(model, fast_dllm_test.prompt(), 8, 4, **options)
    with on_toy(target):
        got = target.generate(model, fast_dllm_test.prompt(), 8, 4, **options)
    assert torch.equal(got[0], expected[0])
    assert got[1] == expected[1]


class Hierarchy(dinfer_test.HierarchyDecoder):
    """Theirs where scores are NaN: in a run with one none is the best, and the first is the row's best."""

    __name__ = "HierarchyDecoder"

    def get_transfer_index(self, logits, mask_index, iter_threshold):
        drawn, kept = super().get_transfer_index(logits, mask_index, iter_threshold)
        p = logits.float().softmax(-1).gather(-1, drawn[..., None])[..., 0]
        for b, row in enumerate(mask_index.tolist()):
            first, run = None, []
            for n, masked in enumerate([*row, False]):
                if masked:
                    run.append(n)
                    continue
                dead = [i for i in run if p[b, i].isnan()]
                for i in run if dead else ():
                    kept[b, i] = iter_threshold is not None and p[b, i] > iter_threshold
                first = dead[0] if dead and first is None else first
                run = []
            if first is not None:
                kept[b, first] = True
        return drawn, kept


def decoded(decoder, places, nothing):
    x, passes = dinfer_test.start(), 0
    for first in (4, 10):
        while (x[:, first : first + 6] == dinfer_test.MASK).any():
            logits = dinfer_test.model(x)
            logits[:, list(places)] = nothing
            decoder.decode(logits[:, first : first + 6], first, first + 6, x)
            passes += 1
            assert passes < 20
    return x, passes


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(
    "given", [{}, {"threshold": 0.5, "low_threshold": 0.2}, {"low_threshold": None}]
)
def test_dinfer_hierarchy(given, places, nothing):
    expected, passes = decoded(Hierarchy(**given), places, nothing)
    decoder = dinfer_test.HierarchyDecoder(**given)
    with on_toy(decoder):
        x, got = decoded(decoder, places, nothing)
    assert torch.equal(x, expected)
    assert got == passes


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("kind", dinfer_test.KINDS[:2])
def test_dinfer_thresholds_end_where_theirs_do_not(kind, nothing):
    decoder = kind(threshold=0.9)
    with on_toy(decoder):
        x, passes = decoded(decoder, (5, 9), nothing)
        whole = decoded(decoder, (), nothing)[1]
    assert x[:, [5, 9]].tolist() == [[0, 0]] * 2
    assert passes <= whole


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("threshold", [0.3, 2.0])
@pytest.mark.parametrize("editing", [None, 0.2])
def test_diffusers_block_refinement(threshold, editing, nothing):
    diffusers = pytest.importorskip("diffusers")
    import test_adapter_diffusers_schedulers as diffusers_test

    class Dead(diffusers_test.Words):
        passes = 0

        def forward(self, *args, **kwargs):
            self.passes += 1
            out = super().forward(*args, **kwargs)
            out.logits[:, [5, 6]] = nothing
            return out

    prompt, options = torch.full((2, 3), 7), {"editing_threshold": editing, "threshold": threshold}
    runs = []
    for patched in (False, True):
        model = Dead()
        pipe = diffusers_test.llada2(diffusers.BlockRefinementScheduler(block_length=8), model)
        handle = patch_toy(pipe) if patched else None
        tokens = pipe(input_ids=prompt, **diffusers_test.LLADA2, **options).sequences
        runs.append((tokens.tolist(), model.passes))
        if handle is not None:
            handle.undo()
    assert runs[0] == runs[1]


@pytest.mark.parametrize("nothing", NOTHING)
def test_diffusers_block_refinement_without_a_mask_token(nothing):
    """An id of -1 would be the model's next input."""
    diffusers = pytest.importorskip("diffusers")
    if "mask_token_id" not in diffusers.BlockRefinementScheduler.step.__kwdefaults__:
        pytest.skip("this diffusers has no uniform corruption")
    from maskgit.adapters.diffusers import schedulers as ours

    logits = torch.randn(2, 8, 20, generator=torch.manual_seed(0))
    logits[:, 3] = nothing
    runs = []
    for kind in (diffusers.BlockRefinementScheduler, ours.BlockRefinementScheduler):
        scheduler = kind()
        scheduler.set_timesteps(4, block_length=8)
        x, rng = torch.zeros(2, 8, dtype=torch.long), torch.Generator().manual_seed(9)
        for step in range(4):
            x = scheduler.step(logits, step, x, generator=rng).prev_sample
        runs.append(x)
    assert torch.equal(*runs)


def dead_after(module, nothing):
    """Hidden states without meaning at one place, and where the model carries them."""

    def spoil(_, args, out):
        out = out.clone()
        out[:, 4] = nothing
        return out

    module.register_forward_hook(spoil)


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("caching", [False, True])
def test_mdlm(caching, nothing):
    """Such a position is masked until the fill at the end; no id of -1 goes into the model."""
    model, seen = mdlm_test.Diffusion(), []
    dead_after(model.backbone.embed, nothing)
    model.backbone.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].min()))
    with on_toy(model):
        out = model._sample(8, caching=caching)
    assert min(seen) >= 0
    assert (out != mdlm_test.MASK).all()
    assert (out >= 0).all()


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("sampler", ["mdlm", "remdm-conf", "remdm-cap"])
def test_remdm(sampler, nothing):
    model = remdm_test.Remasking(sampler=sampler)
    dead_after(model.backbone.embed, nothing)
    x = torch.full((2, mdlm_test.N), mdlm_test.MASK)
    conf = torch.full(x.shape, -torch.inf)
    with on_toy(model), torch.no_grad():
        for step in range(8):
            t = torch.full((2, 1), 1 - step / 8)
            _, x, conf = model._ddpm_caching_update(x, t, 1 / 8, conf=conf)
            assert (x >= 0).all()
            assert (conf <= 0).all()  # of a token minus its probability, of a mask -inf
    assert ((x == mdlm_test.MASK).sum(1) > 0).all()
    assert ((x != mdlm_test.MASK).sum(1) > 3).all()


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("critic", [None, "token", "self"])
def test_muse_and_titok_end_with_ids_of_their_codebooks(critic, nothing):
    model = muse_test.MaskGit(critic)
    dead_after(model.transformer.embed, nothing)
    with on_toy(model):
        out = model.generate(muse_test.TEXTS, fmap_size=muse_test.SIDE, timesteps=6)
    assert ((out >= 0) & (out < muse_test.V)).all()
    model = titok_test.Stub()
    dead_after(model.model, nothing)
    with on_toy(model):
        out = model.generate(titok_test.LABELS)
    assert ((out >= 0) & (out < titok_test.V)).all()
    assert (out[:, 4] == 0).all()


def test_maskbit_says_so_as_theirs():
    theirs, model = maskbit_test.module(), maskbit_test.Network()
    dead_after(model.embed, float("nan"))
    with on_toy(theirs), pytest.raises(ValueError, match="logits: expected"):
        theirs.sample(model, maskbit_test.IMAGES, **maskbit_test.given())


@pytest.mark.parametrize("nothing", NOTHING)
def test_llada_and_dream_leave_that_position_alone(nothing):
    """Their loops are ours, and have as many steps as theirs."""
    model, passes = llada_test.Tiny(), []
    model.head.weight.data[59] = 0  # the mask is no likely token
    shift = torch.zeros(60, 13, 1)
    shift[:, 8] = nothing
    model.head.forward, head = lambda h: head(h) + shift[0], model.head.forward
    model.register_forward_hook(lambda *_: passes.append(1))
    out = adapters.llada.generate(
        model, torch.arange(5)[None], steps=8, gen_length=8, block_length=4, mask_id=59
    )
    assert (out == 59).nonzero().tolist() == [[0, 8]]
    assert len(passes) == 8
    model = dream_test.Stub()
    dead_after(model.lm_head, nothing)
    with on_toy(model):
        out = model.diffusion_generate(dream_test.prompt(), dream_test.config())
    assert (out[:, 6:] != dream_test.MASK).all()
    assert (out[:, 5] == dream_test.MASK).all()

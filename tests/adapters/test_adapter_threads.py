"""Threads that share one patched object: each in its own calls, all others with the object as it is.

Nothing is left to luck.  Two threads are stopped inside a pass of the same object, in turn let go, and
whatever may be done with the object meanwhile is done by a third.
"""

import copy
import threading
from types import SimpleNamespace

import pytest
from helpers import patch_toy

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

from maskgit.adapters.lazy_head import HIDDEN, Head  # noqa: E402

SECONDS = 60


class Door:
    """What every pass of a model goes through: a thread can be stopped there, in its n-th pass."""

    def __init__(self):
        self.stops, self.seen = {}, []

    def __call__(self, *_):
        stop = self.stops.get(threading.get_ident())
        if stop is None:
            return
        stop.passes -= 1
        if stop.passes == 0:
            stop.inside.set()
            assert stop.go.wait(SECONDS)

    def __deepcopy__(self, memo):
        return self

    def start(self, run, passes):
        """Run it in a thread, up to inside its n-th pass."""
        stop = SimpleNamespace(passes=passes, inside=threading.Event(), go=threading.Event())
        stop.out = stop.error = None

        def work():
            self.stops[threading.get_ident()] = stop
            try:
                stop.out = run()
            except BaseException as error:
                stop.error = error
            stop.inside.set()

        stop.thread = threading.Thread(target=work, daemon=True)
        stop.thread.start()
        assert stop.inside.wait(SECONDS)
        return stop

    @staticmethod
    def finish(stop):
        """Let the thread go, and its result."""
        stop.go.set()
        stop.thread.join(SECONDS)
        assert not stop.thread.is_alive()
        if stop.error is not None:
            raise stop.error
        return stop.out


def case(target, owners, run, plain, door):
    """target: what is patched.  owners: objects that must be as they were.  run(which): tokens of a patched
    call, which depend on `which` alone.  plain(): a pass without the patch."""
    return SimpleNamespace(target=target, owners=owners, run=run, plain=plain, door=door)


def hooked(module):
    door = Door()
    module.register_forward_pre_hook(door)
    return door


def llada():
    target, model = llada_test.module(llada_test.NEW), llada_test.Tiny()
    options = {"steps": 4, "gen_length": 8, "block_length": 8, "mask_id": 59, "cfg_scale": 0.5}

    def run(which):
        prompt = torch.arange(10).reshape(2, 5) + which
        return target.generate(model, prompt, temperature=1.0, seeds=[which, 7], **options)

    return case(
        target,
        [target, model.head],
        run,
        lambda: model(torch.arange(9)[None]).logits,
        hooked(model.embed),
    )


def dream():
    model = dream_test.Stub()

    def run(which):
        return model.diffusion_generate((dream_test.prompt() + 3 * which) % 39, dream_test.config())

    return case(
        model,
        [model.lm_head],
        run,
        lambda: model(dream_test.prompt()).logits,
        hooked(model.embed),
    )


def titok():
    model = titok_test.Stub()

    def run(which):
        return model.generate(titok_test.LABELS + which, guidance_scale=2.0, seeds=[which, 1, 2])

    ids = torch.full((3, titok_test.N), titok_test.V)
    return case(
        model,
        [model, model.model.lm_head],
        run,
        lambda: model.forward(ids, titok_test.LABELS, 0.0),
        hooked(model.model),
    )


def muse(critic=None):
    model = muse_test.MaskGit(critic)

    def run(which):
        return model.generate(
            ["a" * (which + 1), "bb"], fmap_size=muse_test.SIDE, timesteps=6, seeds=[which, 3]
        )

    text = model.transformer.encode_text(["a"])
    ids = torch.full((1, muse_test.N), muse_test.MASK)
    door = Door()

    def enter(*_):
        door.seen.append(model.training)
        door()

    model.transformer.embed.register_forward_pre_hook(enter)
    return case(
        model,
        [model, model.transformer.to_logits],
        run,
        lambda: model.transformer.forward(ids, text_embeds=text),
        door,
    )


def diffusion(model, update):
    def run(which):
        x = torch.full((2, mdlm_test.N), mdlm_test.MASK)
        x[0, which] = 3
        for step in range(6):
            t = torch.full((2, 1), 1 - step / 6)
            x = update(model, x, t, 1 / 6, seeds=[which, 9], step=step)
        return x

    x = torch.full((1, mdlm_test.N), mdlm_test.MASK)
    return case(
        model,
        [model, model.backbone.output_layer.linear],
        run,
        lambda: model.forward(x, torch.zeros(1)),
        hooked(model.backbone.embed),
    )


def mdlm():
    return diffusion(mdlm_test.Diffusion(), lambda model, *a, **k: model._ddpm_update(*a, **k))


def remdm():
    def update(model, *args, **given):
        return model._ddpm_caching_update(*args, **given)[1]

    return diffusion(remdm_test.Remasking(), update)


def fast_dllm():
    target, door = fast_dllm_test.types.ModuleType("generate"), Door()
    exec(fast_dllm_test.STUB, target.__dict__)

    def model(x):
        door()
        return fast_dllm_test.model(x)

    def run(which):
        return target.generate(model, fast_dllm_test.prompt() + which, 8, 4)[0]

    return case(target, [target], run, None, door)


def dinfer(kind):
    decoder, door = kind(threshold=0.6), Door()

    def run(which):
        x, door.seen = dinfer_test.start(), [*door.seen, which]
        x[:, 0] = which
        for first in (4, 10):
            while (x[:, first : first + 6] == dinfer_test.MASK).any():
                logits = dinfer_test.model(x)[:, first : first + 6]
                door()
                decoder.decode(logits, first, first + 6, x)
        return x

    return case(decoder, [], run, None, door)


def maskbit():
    target, model = maskbit_test.module(), maskbit_test.Network()

    def run(which):
        images = maskbit_test.IMAGES
        return target.sample(model, images, **maskbit_test.given(seeds=[which, 1, 2]))[0]

    return case(target, [target], run, None, hooked(model.embed))


def maskgit_jax(fast):
    pytest.importorskip("jax")
    import jax
    import test_adapter_maskgit_jax as jax_test

    target, door = jax_test.module(), Door()

    def logits_of(x):
        door()
        return jax_test.logits_of(x)

    def run(which):
        with jax.disable_jit():
            out = target.decode(jax_test.inputs(), jax.random.key(which), logits_of, num_iter=3)
        return torch.from_numpy(jax_test.np.asarray(out).copy())

    return case(target, [target], run, None, door), {"fast": fast}


def scheduler(name, **given):
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers has no {name}")
    target, door = SimpleNamespace(scheduler=getattr(diffusers, name)(**given)), Door()
    table = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    more = {"BlockRefinementScheduler": {"mask_token_id": 39, "temperature": 1.0}}.get(name, {})
    more |= {"temperature": 1.0} if name == "DiscreteDDIMScheduler" else {}

    def run(which):
        x, own = torch.full((2, 32), 39 if "mask_token_id" in given | more else 5), target.scheduler
        x[:, 0] = which
        own.set_timesteps(4)
        for timestep in own.timesteps:
            logits = table[x] + table[x.roll(1, 1)]
            door()
            x = own.step(logits, timestep, x, seeds=[which, 7], **more).prev_sample
        return x

    return case(target, [target], run, None, door)


CASES = {
    "llada": llada, "dream": dream, "titok": titok, "muse": muse, "mdlm": mdlm, "remdm": remdm,
    "muse-token": lambda: muse("token"), "muse-self": lambda: muse("self"),
    "fast_dllm": fast_dllm, "maskbit": maskbit,
    "maskgit_jax": lambda: maskgit_jax(False), "maskgit_jax-fast": lambda: maskgit_jax(True),
    "amused": lambda: scheduler("AmusedScheduler", mask_token_id=39),
    "block-refinement": lambda: scheduler("BlockRefinementScheduler"),
    "entropy-bound": lambda: scheduler("EntropyBoundScheduler"),
    "discrete-ddim": lambda: scheduler("DiscreteDDIMScheduler"),
} | {f"dinfer-{kind.__name__}": lambda kind=kind: dinfer(kind) for kind in dinfer_test.KINDS}  # fmt: skip


def test_every_adapter_is_here():
    names = {name.split("-")[0] for name in CASES} - {"amused", "block", "entropy", "discrete"}
    assert names | {"diffusers_schedulers"} == set(adapters.supported())


def made(name):
    one = CASES[name]()
    one, options = one if isinstance(one, tuple) else (one, {})
    return one, options


SLOW = {"maskgit_jax"}
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]


@pytest.mark.parametrize("name", EACH)
def test_threads_in_calls_of_one_patched_object(name):
    one, options = made(name)
    before = [dict(vars(owner)) for owner in one.owners]
    with torch.no_grad():
        was = None if one.plain is None else one.plain()
        handle = patch_toy(one.target, **options)
        alone = [one.run(which) for which in range(3)]
        assert not torch.equal(alone[0], alone[1])
        calls = handle.report.calls
        first = one.door.start(lambda: one.run(0), 1)
        second = one.door.start(lambda: one.run(1), 2)
        for stop, which in ((first, 0), (second, 1)):
            if one.plain is not None:
                now = one.plain()
                assert type(now) is torch.Tensor
                assert torch.equal(now, was)
            assert torch.equal(one.run(2), alone[2])
            assert torch.equal(one.door.finish(stop), alone[which])
        assert handle.report.calls * 3 == calls * 7
        handle.undo()
    for owner, values in zip(one.owners, before, strict=True):
        assert vars(owner) == values
    assert not adapters.patching.is_patched(one.target)
    if name.startswith("muse"):
        assert one.target.training
        assert not any(one.door.seen[1:-2])  # of all passes but the plain ones


@pytest.mark.parametrize("name", EACH)
def test_an_undo_while_threads_are_inside(name):
    """They go on to their end, and the object is as it was."""
    one, options = made(name)
    before = [dict(vars(owner)) for owner in one.owners]
    with torch.no_grad():
        handle = patch_toy(one.target, **options)
        alone = [one.run(which) for which in range(2)]
        stops = [one.door.start(lambda w=which: one.run(w), 2) for which in range(2)]
        handle.undo()
        whole_loops = ("llada", "dream", "titok", "muse", "maskbit", "maskgit_jax")
        for which, stop in enumerate(stops):
            if name.split("-")[0] in whole_loops:
                assert torch.equal(one.door.finish(stop), alone[which])
            else:  # where a step is patched, the others are the codebase's, which have no seeds
                stop.go.set()
                stop.thread.join(SECONDS)
                assert not stop.thread.is_alive()
    for owner, values in zip(one.owners, before, strict=True):
        assert vars(owner) == values


def test_copies_made_inside_a_pass_are_not_patched():
    model = llada_test.Tiny()
    door, seeds = hooked(model.embed), [1, 2]
    prompt = torch.arange(10).reshape(2, 5)
    options = {"steps": 4, "gen_length": 8, "block_length": 8, "mask_id": 59, "seeds": seeds}
    expected = adapters.llada.generate(model, prompt, **options)
    stop = door.start(lambda: adapters.llada.generate(model, prompt, **options), 2)
    other = copy.deepcopy(model)
    other.embed._forward_pre_hooks.clear()
    assert torch.equal(door.finish(stop), expected)
    report = adapters.Report("llada", "", "")
    assert torch.equal(adapters.llada.generate(other, prompt, report=report, **options), expected)
    assert report.notes == [HIDDEN]
    other.head.weight.data = other.head.weight.flip(0)
    with torch.no_grad():
        x = torch.arange(9)[None]
        assert torch.equal(other(x).logits, model(x).logits.flip(-1))


def test_a_pass_in_a_pass_of_the_same_head():
    layer, notes, hidden = torch.nn.Linear(4, 6), [], torch.randn(1, 3, 4)

    def outer():
        (inside,) = Head(layer, notes.append).run(lambda: layer(hidden + 1))
        assert torch.equal(inside, hidden + 1)
        return layer(hidden)

    assert torch.equal(Head(layer, notes.append).run(outer)[0], hidden)
    assert notes == [HIDDEN] * 2
    assert "forward" not in vars(layer)


def test_a_second_patch_from_another_thread_is_refused_and_the_first_stays():
    """Whoever comes second, in whatever moment, must not undo the other's."""
    one, _ = made("llada")
    together, results = threading.Barrier(8), []

    def work():
        together.wait(SECONDS)
        try:
            results.append(patch_toy(one.target))
        except adapters.AdapterError as error:
            results.append(str(error))

    before = dict(vars(one.target))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    handles = [result for result in results if not isinstance(result, str)]
    assert len(handles) == 1
    assert handles[0].is_active
    assert sum("one block around them all" in str(result) for result in results) == 7
    handles[0].undo()
    assert vars(one.target) == before


def test_a_patch_that_fails_does_not_undo_the_one_that_came_between(monkeypatch):
    one, _ = made("llada")
    handles, check = [], adapters.llada.version_of

    def slow(target, trusted):
        if not handles:
            handles.append(None)
            thread = threading.Thread(target=lambda: handles.append(patch_toy(target)), daemon=True)
            thread.start()
            thread.join(SECONDS)
        return check(target, trusted)

    monkeypatch.setattr(adapters.llada, "version_of", slow)
    with pytest.raises(adapters.AdapterError, match=r"patched already|unknown version"):
        patch_toy(one.target)
    assert handles[1].is_active
    handles[1].undo()

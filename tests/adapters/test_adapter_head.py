"""Models that do more after their head: the adapters that leave it out see that, and say so."""

import copy
import ctypes
import gc
import pickle
import types

import numpy
import pytest
from helpers import on_toy

from maskgit import adapters

torch = pytest.importorskip("torch")

import test_adapter_dream as dream_test  # noqa: E402
import test_adapter_mdlm as mdlm_test  # noqa: E402
import test_adapter_titok as titok_test  # noqa: E402
from test_adapter_llada import Tiny, greedy  # noqa: E402

from maskgit.adapters import llada, mdlm  # noqa: E402
from maskgit.adapters.lazy_head import CHANGED, HIDDEN, REMEMBERED, Head  # noqa: E402
from maskgit.adapters.patching import is_patched  # noqa: E402

V, MASK = 60, 59


def banned(logits):
    logits[..., 3] = -1e4
    return logits


AFTER = {  # what models do with the logits that their head gives
    "a cut vocabulary": lambda logits: logits[:, :, :50],
    "a cap": lambda logits: torch.tanh(logits / 2) * 2,
    "a scale in place": lambda logits: logits.mul_(0.1),
    "a token banned in place": banned,
    "a shift": lambda logits: torch.cat([logits[:, :1], logits[:, :-1]], 1),
    "a shifted view": lambda logits: logits.flip(1),
    "a write and a copy": lambda logits: banned(logits) * 1.0,
    "a write by index": lambda logits: logits.index_fill_(-1, torch.tensor([3, 4]), -9.0),
    "a write by mask": lambda logits: logits.masked_fill_(torch.arange(V) < 9, -9.0),
    "a write through NumPy": lambda logits: (
        logits.detach().numpy().__setitem__((..., 3), -9.0),
        logits,
    )[1],
    "a write through data": lambda logits: (logits.data.__setitem__((..., 3), -9.0), logits)[1],
    "one row for all": lambda logits: logits[:, :1].expand_as(logits),
    "rows in another order": lambda logits: logits.transpose(0, 1).reshape(logits.shape),
    "a cap that is seldom reached": lambda logits: logits.clamp(-60, 60),
    "a check": lambda logits: logits if bool(logits.isfinite().all()) else 1 / 0,
    "a write that a view hides": lambda logits: banned(logits)[:],
}


class Model(Tiny):
    """LLaDA's interface, with something done after the head."""

    def __init__(self, after=lambda logits: logits, dtype=torch.float32):
        super().__init__(V)
        self.after = after
        self.head.to(dtype)

    def forward(self, tokens, attention_mask=None):
        return types.SimpleNamespace(
            logits=self.after(super().forward(tokens, attention_mask).logits)
        )


def run(model, cfg=0.0, **options):
    notes, prompt = [], torch.randint(0, 50, (3, 6), generator=torch.manual_seed(1))
    report = adapters.Report("llada", "", "", notes=notes)
    given = {"steps": 4, "gen_length": 8, "block_length": 8, "mask_id": MASK, "cfg_scale": cfg}
    out = llada.generate(model, prompt, report=report, **given | options)
    assert "forward" not in vars(model.head)
    return prompt, out, notes


@pytest.mark.parametrize("cfg", [0.0, 1.0])
@pytest.mark.parametrize("name", AFTER)
def test_what_comes_after_the_head_counts(name, cfg):
    model = Model(AFTER[name])
    prompt, out, notes = run(model, cfg)
    assert torch.equal(out, run(model, cfg, hidden_states=False)[1])
    if "row" not in name:  # where scores tie, or depend on what else is in the batch
        assert torch.equal(out, greedy(model, prompt, 4, 8, 8, MASK, cfg))
    assert notes == [CHANGED]


@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_plain_model_makes_no_logits(cfg, monkeypatch):
    model, linear, rows = Model(), torch.nn.functional.linear, []

    def counted(x, *args):
        rows.append(x[..., 0].numel())
        return linear(x, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    _, _, notes = run(model, cfg)
    assert notes == [HIDDEN]
    assert rows[:3] == [24, 18, 12]  # the masked rows of the block, nothing else
    assert len(rows) == 4
    assert rows[3] <= 8  # a predicted mask id stays masked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_converted_logits_are_used_as_the_model_gives_them(dtype):
    model = Model(lambda logits: logits.float(), dtype)
    prompt, out, notes = run(model)
    assert notes == [CHANGED]
    assert torch.equal(out, greedy(model, prompt, 4, 8, 8, MASK, 0.0))
    assert torch.equal(out, run(model, hidden_states=False)[1])


def test_autocast_is_left_to_the_model():
    class Inside(Model):
        def forward(self, tokens, attention_mask=None):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(tokens, attention_mask)

    with torch.autocast("cpu", torch.bfloat16):
        assert run(Model(), steps=1)[2] == ["works on logits: autocast is on"]
    model = Inside(lambda logits: logits.float())
    prompt, out, notes = run(model, steps=1)
    assert torch.equal(out, greedy(model, prompt, 1, 8, 8, MASK, 0.0))
    assert notes == [CHANGED]


def test_nan_and_infinity_are_no_change():
    model = Model()
    model.head.weight.data[5] = float("nan")
    model.head.weight.data[6] = float("inf")
    _, out, notes = run(model)
    assert notes == [HIDDEN]
    assert torch.equal(out, run(model, hidden_states=False)[1])


def test_looks_and_conversions_that_change_nothing_are_none():
    def after(logits):
        assert logits.shape[-1] == logits.size(-1) == V
        assert logits.dtype == torch.float32
        assert logits.device.type == "cpu"
        assert logits.is_floating_point()
        return logits.float().to(torch.float32).to("cpu").contiguous().detach()

    model = Model(after)
    prompt, out, notes = run(model)
    assert notes == [HIDDEN]
    assert torch.equal(out, run(Model(), hidden_states=False)[1])
    del prompt


KEEPS = {  # what models remember of a pass
    "the logits": lambda logits: logits,
    "the logits detached": lambda logits: logits.detach(),
    "the logits converted to what they are": lambda logits: logits.float(),
    "an output with them": lambda logits: types.SimpleNamespace(logits=logits),
    "a list of outputs": lambda logits: [{"logits": logits}],
}


class Remembers(Model):
    """A model that keeps something of every pass, and may mix in what it kept of the one before."""

    def __init__(self, keep, mixes=False):
        super().__init__()
        self.keep, self.mixes, self.history = keep, mixes, []

    def forward(self, tokens, attention_mask=None):
        logits = super().forward(tokens, attention_mask).logits
        before = self.remembered()[-1:] if self.mixes else []
        self.history.append(self.keep(logits))
        return types.SimpleNamespace(logits=logits + 0.5 * before[0] if before else logits)

    def remembered(self):
        """The logits of all passes."""
        leaves = [getattr(kept, "logits", kept) for kept in self.history]
        return [one[0]["logits"] if isinstance(one, list) else one for one in leaves]


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("cfg", [0.0, 1.0])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_model_that_remembers_its_logits_is_run_as_it_is(keep, cfg, mixes):
    model, other = Remembers(KEEPS[keep], mixes), Remembers(KEEPS[keep], mixes)
    _, out, notes = run(model, cfg)
    assert torch.equal(out, run(other, cfg, hidden_states=False)[1])
    assert notes == [REMEMBERED]
    assert len(model.history) == len(other.history) > 3  # as many passes as without the patch
    for one, two in zip(model.remembered(), other.remembered(), strict=True):
        assert type(one) is torch.Tensor
        assert not vars(one)
        assert torch.equal(one, two)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_a_later_pass_keeps_are_logits_too(mode):
    """Also where that pass ends in an error, in whatever mode."""
    model, kept = Model(), []

    def later(logits):
        kept.append(logits if kept else None)  # of the first pass nothing
        return logits

    model.after = later
    with mode():
        _, out, notes = run(model)
    assert torch.equal(out, run(Model(), hidden_states=False)[1])
    assert notes == [HIDDEN]
    assert len(kept) == 4

    def breaks(logits):
        kept.append(logits)
        raise KeyError("broken")

    model.after = breaks
    with mode(), pytest.raises(KeyError, match="broken"):
        run(model)
    for one in kept[1:]:
        assert type(one) is torch.Tensor
        assert one.add(1).shape[2] == V


def test_a_cycle_is_no_memory():
    class Output:
        def __init__(self, logits):
            self.logits, self.me = logits, self

    class Cyclic(Model):
        def forward(self, tokens, attention_mask=None):
            return Output(super().forward(tokens, attention_mask).logits)

    assert run(Cyclic())[2] == [HIDDEN]


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_keeps_nothing_of_a_pass(fullgraph):
    """What is compiled while a thread is in a pass is the model as it is, in one graph."""
    model, other = Model(), Model()
    hidden = torch.nn.Sequential(model.embed, model.head)
    compiled = torch.compile(hidden, backend="eager", fullgraph=fullgraph)
    model.forward = lambda tokens: types.SimpleNamespace(logits=compiled(tokens))
    other.forward = lambda tokens: types.SimpleNamespace(logits=other.head(other.embed(tokens)))
    assert torch.equal(run(model)[1], run(other, hidden_states=False)[1])
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(compiled(tokens), other(tokens).logits)


def test_a_touched_pass_is_not_run_twice():
    model, calls = Model(AFTER["a cap"]), []
    model.register_forward_hook(lambda *_: calls.append(1))
    run(model, 1.0)
    assert len(calls) == 4


@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_change_that_comes_later_counts_from_then_on(cfg):
    """In as many passes as without the patch."""

    def later():
        passes = []

        def after(logits):
            passes.append(1)
            return logits if len(passes) < 3 else logits.flip(-1)

        return after, passes

    (after, passes), (other, expected) = later(), later()
    _, out, notes = run(Model(after), cfg)
    assert torch.equal(out, run(Model(other), cfg, hidden_states=False)[1])
    assert notes == [HIDDEN, CHANGED]
    assert len(passes) == len(expected) == 4


@torch.jit.script
def scripted(logits: torch.Tensor):
    return torch.tanh(logits)


@torch.jit.script
def scripted_in_place(logits: torch.Tensor):
    return logits.mul_(-1.0)


@torch.library.custom_op("maskgit_tests::negated", mutates_args=())
def negated(logits: torch.Tensor) -> torch.Tensor:
    return -logits


@torch.library.custom_op("maskgit_tests::negate", mutates_args=("logits",))
def negate(logits: torch.Tensor) -> None:
    logits.neg_()


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return -logits


def capsule(logits):
    """What C++ gets of a tensor: its memory."""
    return torch.from_dlpack(torch.utils.dlpack.to_dlpack(logits))


def through_memory(logits):
    count = logits.numel()
    (ctypes.c_float * count).from_address(logits.data_ptr())[:] = [*range(count)]
    return logits


def pickled(logits):
    return -pickle.loads(pickle.dumps(logits))


def unseen(logits):
    """Work that leaves no trace in the result: what is read is kept."""
    unseen.seen.append(scripted(logits))
    unseen.seen.append(capsule(logits).clone())
    return logits


AROUND = {  # what goes around `__torch_function__`, or reaches for a tensor's memory
    "TorchScript": scripted,
    "TorchScript in place": scripted_in_place,
    "TorchScript in place, the result left": lambda logits: (scripted_in_place(logits), logits)[1],
    "a trace": lambda logits: torch.jit.trace(torch.tanh, torch.ones(logits.shape))(logits),
    "vmap": torch.vmap(torch.tanh),
    "a derivative": lambda logits: torch.func.jvp(torch.tanh, (logits,), (logits,))[1],
    "functionalized": torch.func.functionalize(torch.tanh),
    "an op": negated,
    "an op in place": lambda logits: (negate(logits), logits)[1],
    "a function of autograd": Function.apply,
    "a capsule": lambda logits: -capsule(logits),
    "a write through a capsule": lambda logits: (capsule(logits).neg_(), logits)[1],
    "DLPack": lambda logits: -torch.from_dlpack(logits),
    "NumPy": lambda logits: torch.from_numpy(-numpy.asarray(logits)),
    "an address": through_memory,
    "a list": lambda logits: -torch.tensor(logits.tolist()),
    "a storage": lambda logits: (logits.untyped_storage().fill_(0), logits)[1],
    "a copy": lambda logits: -copy.deepcopy(logits),
    "a pickle": pickled,
    "other memory": lambda logits: logits.set_(torch.arange(float(logits.numel())).view_as(logits)),
    "other data": lambda logits: (
        setattr(logits, "data", torch.arange(float(logits.numel())).view_as(logits)),
        logits,
    )[1],
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", AROUND)
def test_what_python_does_not_see_counts_too(name, first, mode):
    """In the first pass and in a later one, as hidden states and as rows."""
    layer, notes, after = torch.nn.Linear(4, 6).eval(), [], AROUND[name]
    hidden, wanted = torch.randn(1, 3, 4), torch.tensor([[True, False, True]])
    with mode():
        expected = after(layer(hidden)).clone()
        for rows in (False, True):
            head = Head(layer, notes.append)
            if not first:
                head.run(lambda: layer(hidden))
                assert head.is_used
            if rows:
                assert torch.equal(
                    head.rows(lambda: after(layer(hidden)), wanted), expected[wanted]
                )
            else:
                assert torch.equal(head.run(lambda: after(layer(hidden)))[0], expected)
            assert not head.is_used
    assert "forward" not in vars(layer)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_after_the_head_counts(backend):
    layer, hidden = torch.nn.Linear(4, 6).eval(), torch.randn(1, 3, 4)
    compiled = torch.compile(torch.tanh, backend=backend)
    for before in (0, 1):
        head = Head(layer, [].append)
        with torch.no_grad():
            for _ in range(before):
                head.run(lambda: layer(hidden))
            (out,) = head.run(lambda: compiled(layer(hidden)))
            torch.testing.assert_close(out, layer(hidden).tanh())


@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_read_on_the_side_are_logits(passes):
    layer, hidden, unseen.seen = torch.nn.Linear(4, 6).eval(), torch.randn(1, 3, 4), []
    head = Head(layer, [].append)
    with torch.no_grad():
        for number in range(passes):
            last = number == passes - 1
            (out,) = head.run(lambda: unseen(layer(hidden)) if last else layer(hidden))  # noqa: B023
        assert torch.equal(out, layer(hidden))
        for one in unseen.seen:
            assert torch.equal(one, layer(hidden)) or torch.equal(one, layer(hidden).tanh())
    assert len(unseen.seen) == 3  # of a pass that was run again, the first half twice


class Reuses(Model):
    """A model that changes what it gave to its head, or the head, once that was called."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.eval()

    def forward(self, tokens, attention_mask=None):
        hidden, weight = self.embed(tokens), self.head.weight
        if self.what == "other weights for the call":
            weight.data, before = -weight.data, weight.data
            logits = self.head(hidden)
            weight.data = before
        elif self.what == "weights changed for the call":
            with torch.no_grad():
                weight.neg_()
                logits = self.head(hidden)
                weight.neg_()
        else:
            logits = self.head(input=hidden)
            hidden.zero_() if self.what == "zeros" else hidden.numpy().fill(1)
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("cfg", [0.0, 1.0])
@pytest.mark.parametrize(
    "what", ["zeros", "NumPy", "other weights for the call", "weights changed for the call"]
)
def test_what_went_into_the_head_is_what_it_was_then(what, cfg):
    model = Reuses(what)
    _, out, notes = run(model, cfg)
    assert torch.equal(out, run(model, cfg, hidden_states=False)[1])
    assert notes == [CHANGED if "weights" in what else HIDDEN]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_a_pass_that_is_run_again_meets_the_same_random_numbers(first, training):
    """In training mode a later one is not: its modules may count their passes."""
    layer, hidden = torch.nn.Linear(4, 6).train(training), torch.randn(1, 3, 4)

    def forward():
        return capsule(layer(torch.nn.functional.dropout(hidden)))

    with torch.no_grad():
        torch.manual_seed(3)
        expected, then = forward(), torch.rand(2)
        head = Head(layer, [].append)
        if not first:
            head.run(lambda: layer(hidden))
        torch.manual_seed(3)
        if training and not first:
            with pytest.raises(RuntimeError, match="data pointer") as error:
                head.run(forward)
            assert any("call eval()" in note for note in error.value.__notes__)
            return
        assert torch.equal(head.run(forward)[0], expected)
        assert torch.equal(torch.rand(2), then)


@pytest.mark.parametrize("after", [lambda logits: logits, scripted, capsule])
def test_nothing_of_a_pass_waits_for_the_garbage_collector(after):
    layer, hidden = torch.nn.Linear(4, 6).eval(), torch.randn(1, 3, 4)

    def tensors():
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    with torch.no_grad():
        Head(layer, [].append).run(lambda: after(layer(hidden)))
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        with torch.no_grad():
            Head(layer, [].append).run(lambda: after(layer(hidden)))
        assert tensors() == before
    finally:
        gc.enable()


def test_whether_logits_have_a_gradient_is_no_matter_of_the_patch():
    layer, hidden = torch.nn.Linear(4, 6), torch.randn(1, 3, 4)

    def after(logits):
        return logits * (2 if logits.requires_grad else 3)

    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            (out,) = Head(layer, [].append).run(lambda: after(layer(hidden)))
            assert torch.equal(out, after(layer(hidden)))


def test_an_error_of_the_model_is_its_own():
    model = Model()
    model.embed = None
    with pytest.raises(TypeError):
        run(model)
    model = Model(lambda logits: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run(model)
    assert "forward" not in vars(model.head)


def test_a_head_that_is_not_called_once_is_left_alone():
    layer, notes = torch.nn.Linear(4, 6), []
    hidden = torch.randn(1, 3, 4)
    for forward in (lambda: layer(layer(hidden)[..., :4]), lambda: hidden @ layer.weight.T):
        head = Head(layer, notes.append)
        (out,) = head.run(forward)
        assert out.shape == (1, 3, 6)
        assert not head.is_used
    assert set(notes) == {CHANGED}
    head = Head(layer, notes.append)
    with torch.no_grad():
        a, b = head.run(lambda: layer(hidden), lambda: layer(hidden) + 1)
    torch.testing.assert_close(a + 1, b)  # where one will not do, both are logits


def test_dream_sees_it():
    class Capped(dream_test.Stub):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = torch.tanh(out.logits / 3) * 3
            return out

    model, given = Capped(), {"generation_config": dream_test.config(temperature=0.8)}
    expected = model.diffusion_generate(dream_test.prompt(), **given)
    with dream_test.patched(model) as handle:
        assert torch.equal(model.diffusion_generate(dream_test.prompt(), **given), expected)
    assert CHANGED in handle.report.notes


def test_mdlm_sees_it():
    class Capped(mdlm_test.DIT):
        def forward(self, x, sigma):
            return super().forward(x, sigma) * 0.5

    Capped.__name__ = "DIT"
    plain, model = mdlm_test.Diffusion(mdlm_test.Other), mdlm_test.Diffusion(Capped)
    with torch.no_grad():
        plain.backbone.output_layer.linear.weight *= 0.5
        plain.backbone.output_layer.linear.bias *= 0.5
    x, t = torch.full((3, mdlm_test.N), mdlm_test.MASK), torch.full((3,), 0.9)
    seeds = torch.arange(3)
    expected = mdlm.ddpm_update(plain, x, t, 0.3, seeds=seeds)
    assert torch.equal(mdlm.ddpm_update(model, x, t, 0.3, seeds=seeds), expected)
    with on_toy(model) as handle:
        model._ddpm_update(x, t, 0.3)
    assert CHANGED in handle.report.notes


def test_titok_sees_it():
    class Capped(titok_test.Stub):
        def forward(self, *args, **kwargs):
            return torch.tanh(super().forward(*args, **kwargs) / 2) * 2

    model = Capped()
    with on_toy(model, hidden_states=False):
        torch.manual_seed(1)
        expected = model.generate(titok_test.LABELS)
    with on_toy(model) as handle:
        torch.manual_seed(1)
        assert torch.equal(model.generate(titok_test.LABELS), expected)
    assert CHANGED in handle.report.notes


def test_a_copy_of_a_patched_model_is_not_patched_and_runs_its_own_weights():
    model, given = dream_test.Stub(), dream_test.config()
    stock = model.diffusion_generate(dream_test.prompt(), given)
    with on_toy(model) as handle:
        other = copy.deepcopy(model)
        assert not is_patched(other)
        other.lm_head.weight.data = other.lm_head.weight.flip(0)
        assert not torch.equal(other.diffusion_generate(dream_test.prompt(), given), stock)
        assert handle.report.calls == 0
        with on_toy(other) as second:
            other.diffusion_generate(dream_test.prompt(), given)
        assert (handle.report.calls, second.report.calls) == (0, 1)
        kept = model._sample
    assert torch.equal(model.diffusion_generate(dream_test.prompt(), given), stock)
    assert not is_patched(model)
    assert kept.__name__ == "_sample"  # a reference from before is the original again

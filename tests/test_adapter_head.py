"""Models that do more after their head: the adapters that leave it out see that, and say so."""

import copy
import types

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


def test_a_change_that_comes_later_is_an_error():
    passes = []

    def later(logits):
        passes.append(1)
        return logits if len(passes) < 4 else logits.flip(-1)

    with pytest.raises(adapters.AdapterError, match="hidden_states=False"):
        run(Model(later))


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

"""The dInfer adapter: tokens of recorded runs, and those of its decoders said again by stubs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import on_toy, patch_toy

import maskgit
from maskgit import StepNoise, adapters

torch = pytest.importorskip("torch")
from maskgit.adapters import dinfer  # noqa: E402
from maskgit.adapters.fingerprint import TRUSTED  # noqa: E402

BACKENDS = [n for n in ("cpp", "torch", "reference") if maskgit.available_backends()[n] is None]
V = MASK = 20
GOLDEN = {  # the decoder, and where the second block of six or twelve starts
    "threshold": ("ThresholdParallelDecoder", {"threshold": 0.9}),
    "threshold-drawn": (
        "ThresholdParallelDecoder", {"threshold": 0.7, "temperature": 0.5, "use_float64": True},
    ),
    "threshold-twins": ("ThresholdParallelDecoder", {"threshold": 0.95}),
    "threshold-mask": ("ThresholdParallelDecoder", {"threshold": 0.9, "mask_id": 19}),
    "credit": ("ThresholdParallelDecoder", {"threshold": 0.9}),  # recorded with its credits added
    "hierarchy": ("HierarchyDecoder", {"threshold": 0.9, "low_threshold": 0.4}),
}  # fmt: skip


class ParallelDecoder:
    """Their interface; `decode` says the decoders again, a row and a position at a time."""

    def __init__(self, temperature=0.0, threshold=0.9, mask_id=MASK):
        self.temperature, self.threshold, self.mask_id = temperature, threshold, mask_id
        self.calls = 0

    def candidates(self, logits):
        noise = noise_of(self.calls, logits).token_gumbel.double() * self.temperature
        self.calls += 1
        drawn = (logits.double() + noise).argmax(-1)
        return drawn, logits.float().softmax(-1).gather(-1, drawn[..., None])[..., 0]


class ThresholdParallelDecoder(ParallelDecoder):
    def __init__(self, temperature=0.0, threshold=0.9, mask_id=MASK, use_float64=False):
        super().__init__(temperature, threshold, mask_id)
        self.use_float64 = use_float64

    def decode(self, logits, block_start, block_end, x, iter_threshold=None):
        threshold = self.threshold if iter_threshold is None else iter_threshold
        drawn, p = self.candidates(logits)
        for b, row in enumerate((x[:, block_start:block_end] == self.mask_id).tolist()):
            free = [n for n, masked in enumerate(row) if masked and drawn[b, n] != self.mask_id]
            best = max((p[b, n].item() for n in free), default=0.0)
            for n in free:
                if p[b, n].item() >= min(threshold, best - 1e-5):
                    x[b, block_start + n] = drawn[b, n]


class CreditThresholdParallelDecoder(ThresholdParallelDecoder):
    def __init__(self, credit_alpha=0.7, boost_gamma=0.2, decay_beta=0.8, **kwargs):
        super().__init__(**kwargs)
        self.credit_alpha, self.boost_gamma, self.decay_beta = credit_alpha, boost_gamma, decay_beta
        self.dense = {}

    def _apply_credit_fusion(self, logits, mask_index, key):
        dense = self.dense.get(key, torch.zeros(logits.shape)) * self.decay_beta
        best, ids = logits.float().softmax(-1).max(-1)
        for b, n in mask_index.nonzero().tolist():
            dense[b, n, ids[b, n]] += best[b, n] ** self.boost_gamma
        self.dense[key] = dense
        return logits + self.credit_alpha * torch.log(dense + 1)

    def decode(self, logits, block_start, block_end, x, iter_threshold=None):
        masked = x[:, block_start:block_end] == self.mask_id
        logits = self._apply_credit_fusion(logits, masked, (block_start, block_end))
        super().decode(logits, block_start, block_end, x, iter_threshold)
        if not (getattr(x, "data", x) == self.mask_id).any():
            self.dense.clear()


class HierarchyDecoder(ParallelDecoder):
    def __init__(self, temperature=0.0, threshold=None, low_threshold=0.4, mask_id=MASK):
        super().__init__(temperature, threshold, mask_id)
        self.low_threshold, self.iter = low_threshold, 0

    def get_transfer_index(self, logits, mask_index, iter_threshold):
        drawn, p = self.candidates(logits)
        kept = torch.zeros_like(mask_index)
        for b, masked in enumerate(mask_index.tolist()):
            run = []
            for n in range(len(masked) + 1):
                if n < len(masked) and masked[n]:
                    run.append(n)
                elif run:
                    best = max(run, key=lambda i: p[b, i])
                    kept[b, best] = self.low_threshold is None or p[b, best] > self.low_threshold
                    run = []
            places = [n for n, free in enumerate(masked) if free]
            for n in places:
                kept[b, n] |= iter_threshold is not None and p[b, n] > iter_threshold
            if places:
                kept[b, max(places, key=lambda i: p[b, i])] = True
        return drawn, kept

    def decode(self, logits, block_start, block_end, x, iter_threshold=None):
        threshold = self.threshold if iter_threshold is None else iter_threshold
        row = x[:, block_start:block_end]
        drawn, kept = self.get_transfer_index(logits, row == self.mask_id, threshold)
        self.iter += 1
        row[kept] = drawn[kept]


KINDS = [ThresholdParallelDecoder, CreditThresholdParallelDecoder, HierarchyDecoder]


def noise_of(call, logits):
    rng = np.random.default_rng(call)
    return StepNoise(torch.from_numpy(rng.gumbel(size=tuple(logits.shape))).float())


def model(x):
    """Logits (B, N, 20) that depend on the tokens around a position."""
    rng = np.random.default_rng(3)
    near, place = rng.normal(size=(21, V)), rng.normal(size=(40, V)) * 1.5
    return torch.from_numpy(near[x] + near[np.roll(x, 1, 1)] + place[: x.shape[1]]).float()


def start(rows=2):
    x = torch.full((rows, 16), MASK)
    x[:, :4] = torch.from_numpy(np.random.default_rng(1).integers(0, 19, (rows, 4)))
    x[-1, 7:9] = 3
    return x


def loop(decoder, x, *more):
    """Both blocks, and how many calls they took."""
    data, calls = getattr(x, "data", x), 0
    for first in (4, 10):
        while (data[:, first : first + 6] == MASK).any():
            logits = model(data)[:, first : first + 6]
            decoder.decode(logits, first, first + 6, x, *more)
            calls += 1
            assert calls < 20
    return calls


def patched(decoder, rows=2, **options):
    block = torch.zeros(rows, 6, V)
    return on_toy(decoder, noise=lambda call: noise_of(call, block), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_are_those_of_a_recorded_run(name, backend):
    path = Path(__file__).parents[1] / "golden" / f"dinfer-{name}.npz"
    with np.load(path, allow_pickle=False) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    kind, given = GOLDEN[name]
    decoder = globals()[kind](**given)
    assert meta["mask_token_id"] == decoder.mask_id
    length = 12 if name == "hierarchy" else 6
    for s in range(len(golden["step"])):
        x = golden["tokens"][s].long()
        first = 4 if golden["eligible"][s][:, : 4 + length].any() else 4 + length
        block = slice(first, first + length)
        noise = golden["token_gumbel"][s][:, block] if "token_gumbel" in golden else None
        dinfer.decode(
            decoder, golden["logits"][s][:, block], block.start, block.stop, x,
            noise=StepNoise(noise), backend=backend,
        )  # fmt: skip
        assert torch.equal(x, golden["expected"][s].long()), f"after step {s}"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.95])
def test_tokens_are_those_of_the_decoder_said_again(kind, threshold, temperature):
    given = {"temperature": temperature, "threshold": threshold}
    expected, got = start(), start()
    calls = loop(kind(**given), expected)
    decoder = kind(**given)
    with patched(decoder) as handle:
        assert loop(decoder, got) == calls == handle.report.calls
    assert torch.equal(got, expected)
    assert getattr(decoder, "iter", calls) == calls


@pytest.mark.parametrize(
    "given", [{"low_threshold": None}, {"threshold": 0.5, "low_threshold": 0.2}]
)
def test_the_thresholds_of_the_hierarchy(given):
    expected, got = start(), start()
    loop(HierarchyDecoder(**given), expected)
    decoder = HierarchyDecoder(**given)
    with patched(decoder):
        loop(decoder, got)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_iter_threshold_and_token_arrays(kind):
    class Array:
        def __init__(self):
            self.data = start()

        def __getitem__(self, index):
            return self.data[index]

        def __setitem__(self, index, values):
            self.data[index] = values

    expected, got, decoder = Array(), Array(), kind(threshold=0.95)
    loop(kind(threshold=0.95), expected, 0.2)
    with patched(decoder):
        loop(decoder, got, 0.2)
    assert torch.equal(got.data, expected.data)


def test_credits_are_those_of_the_dense_matrix_and_are_dropped_at_the_end():
    theirs, credits = CreditThresholdParallelDecoder(threshold=0.99), {}
    rng, masked = np.random.default_rng(0), torch.tensor([[True, True, False], [True, False, True]])
    for _ in range(6):
        logits = torch.from_numpy(rng.normal(size=(2, 3, 4)) * 2).float()
        expected = theirs._apply_credit_fusion(logits, masked, (0, 3))
        got = dinfer._credited(theirs, logits, masked, credits, (0, 3), "auto")
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    x = torch.full((2, 3), 1)
    x[0, 0] = MASK
    logits = torch.nn.functional.one_hot(torch.full((2, 3), 2), V).float() * 50
    dinfer.decode(theirs, logits, 0, 3, x, credits=credits)
    assert x.tolist() == [[2, 1, 1], [1, 1, 1]]
    assert not credits


@pytest.mark.parametrize("kind", KINDS)
def test_patch_and_undo_leave_the_decoder_as_it_was(kind):
    decoder = kind()
    before = dict(vars(decoder))
    handle = patch_toy(decoder)
    assert (handle.report.adapter, handle.report.version) == (
        "dinfer",
        f"{kind.__name__} of {TRUSTED}",
    )
    with pytest.raises(adapters.AdapterError, match="patched already"):
        patch_toy(decoder)
    handle.undo()
    assert vars(decoder) == before
    assert decoder.decode.__func__ is kind.decode


def test_a_subclass_that_decodes_as_its_parent_is_known():
    class Mine(ThresholdParallelDecoder):
        def block_init(self, block_x, block_id):
            pass

    assert patch_toy(Mine()).report.version == f"ThresholdParallelDecoder of {TRUSTED}"


def test_unknown_versions_are_refused_and_left_alone():
    class Other(HierarchyDecoder):
        def get_transfer_index(self, logits, mask_index, iter_threshold):
            return None

    old = type("ThresholdParallelDecoder", (ThresholdParallelDecoder,), {})
    old.decode = lambda self, logits, block_start, block_end, x: None
    bare = ThresholdParallelDecoder()
    del bare.use_float64
    cases = [(Other(), "own get_transfer_index"), (old(), "unknown version"), (bare, "use_float64")]
    for decoder, message in cases:
        before = dict(vars(decoder))
        with pytest.raises(adapters.AdapterError, match=message):
            patch_toy(decoder)
        assert vars(decoder) == before
    others = (ParallelDecoder(), ThresholdParallelDecoder, torch, None, SimpleNamespace())
    assert not any(dinfer.matches(other) for other in others)
    with pytest.raises(adapters.AdapterError, match="expected an instance"):
        patch_toy(ParallelDecoder(), "dinfer")


def test_manual_seed_repeats_a_run():
    decoder = ThresholdParallelDecoder(temperature=1.0, threshold=0.5)

    def run(seed):
        torch.manual_seed(seed)
        x = start()
        loop(decoder, x)
        return x

    with on_toy(decoder):
        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
    generator = torch.Generator().manual_seed(7)
    with on_toy(decoder, generator=generator):
        first = run(1)
        assert torch.equal(first, (generator.manual_seed(7), run(2))[1])


def test_wrong_arguments_are_named():
    decoder = ThresholdParallelDecoder()
    with pytest.raises(ValueError, match="backend"):
        patch_toy(decoder, backend="none such")
    with on_toy(decoder):
        with pytest.raises(ValueError, match="tokens: expected shape"):
            decoder.decode(torch.zeros(2, 5, V), 4, 10, start())
        decoder.temperature = -1.0
        with pytest.raises(ValueError, match="sample_temperature"):
            decoder.decode(torch.zeros(2, 6, V), 4, 10, start())
    with pytest.raises(ValueError, match="credits"):
        dinfer.decode(CreditThresholdParallelDecoder(), torch.zeros(2, 6, V), 4, 10, start())
    with pytest.raises(adapters.AdapterError, match="decoder: expected one of"):
        dinfer.decode(object(), torch.zeros(2, 6, V), 4, 10, start())

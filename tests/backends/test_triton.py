"""Triton's kernels against the float64 reference: on a GPU, or in Triton's interpreter on the CPU.

Every test of all backends also has a case for Triton; in the interpreter those are slow, and run with
--all.  Here is a sample of them, and what is Triton's own: layouts, rows shared by programs, the
fused head.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from helpers import GOLDEN, golden_rule, make_case, native, run, run_stats
from test_arguments import check_products_that_overflow
from test_contract import check, compare_stats
from test_temperatures import case_at

import maskgit
from maskgit import StepRule

torch = pytest.importorskip("torch")
tl = pytest.importorskip("triton.language")
if maskgit.available_backends()["triton"] is not None:
    pytest.skip(maskgit.available_backends()["triton"], allow_module_level=True)

import maskgit.kernels.decode_step.triton_cuda.launch as triton_cuda  # noqa: E402
import maskgit.kernels.decode_step.triton_cuda.select as triton_select  # noqa: E402
from maskgit.kernels.common.arrays import like  # noqa: E402
from maskgit.kernels.common.backends import is_interpreting  # noqa: E402
from maskgit.kernels.common.tuning import forced  # noqa: E402
from maskgit.kernels.decode_step import dispatch  # noqa: E402
from maskgit.kernels.decode_step.rule.plan import resolve  # noqa: E402
from maskgit.kernels.head_sample import chunked  # noqa: E402
from maskgit.kernels.head_sample.triton_cuda import launch as head  # noqa: E402

QUICK = [
    "maskgit", "amused", "titok", "llada", "llada-fp64", "factor", "dream-margin", "dream-origin",
    "mdlm", "open-muse", "threshold",
]  # fmt: skip
DEVICE = "cpu" if is_interpreting() else "cuda"


@pytest.mark.parametrize("name", QUICK)
def test_presets(name):
    rule = StepRule.preset(name)
    check(make_case(rule, dtype="bfloat16" if name == "llada" else "float32", step=3), "triton")


@pytest.mark.parametrize(
    "fields",
    [
        {"filters": ("temperature", "top_k", "top_p"), "top_k": 20, "top_p": 0.8,
         "sample_temperature": 0.7, "score_filtered": True},
        {"filters": ("min_p", "typical_p"), "min_p": 0.02, "typical_p": 0.9},
        {"vocab_slice": (16, 150), "banned_ids": (17, 149), "score": "neg_entropy"},
        {"sample_temperature": 0.0, "greedy_on": "probs", "score_dtype": "logits"},
    ],
    ids=["filters", "min-p", "slice", "probabilities"],
)  # fmt: skip
@pytest.mark.parametrize("noise", ["seeds", "injected"])
def test_fields(fields, noise):
    case = make_case(StepRule(**fields), noise=noise, vocab=300, length=10)
    check(case, "triton")
    compare_stats(
        dataclasses.replace(case, choice_gumbel=None), run_stats(case, "triton"), wide=False
    )


@pytest.mark.parametrize("vocab", [1, 129, 1500, 2049, 4200])
def test_sizes(vocab):
    check(make_case(StepRule.preset("maskgit"), vocab=vocab, length=9, seed=vocab), "triton")


def test_bad_numbers():
    case = make_case(StepRule.preset("maskgit"), vocab=140, length=8, masked=1.0)
    logits = case.logits.copy()
    logits[0, 0], logits[0, 1, 3], logits[0, 2, 5] = np.nan, np.inf, np.nan
    logits[0, 3], logits[1, 0, 100:] = -np.inf, np.nan
    logits[1, 1] *= 1e37
    check(dataclasses.replace(case, logits=logits), "triton")


@pytest.mark.parametrize("temperature", [1e37, 1e308])
def test_hot(temperature):
    for name, kind in [("sample", "sparse"), ("all", "huge"), ("slice", "last")]:
        check(case_at(name, temperature, kind, 200), "triton")


@pytest.mark.parametrize("name", ["maskgit", "llada", "muse"])
@pytest.mark.parametrize("splits", [2, 4])
def test_rows_that_programs_share(name, splits, monkeypatch):
    own = triton_cuda.tiles

    def shared(*args):
        return own(*args) | {"rows": 1, "leaves": 2, "splits": splits}

    monkeypatch.setattr(triton_cuda, "tiles", shared)
    check(make_case(StepRule.preset(name), vocab=1500, length=5, batch=1), "triton")
    case = make_case(StepRule.preset(name), vocab=700, length=20, batch=1, guidance=2.5)
    check(case, "triton")  # finished 16 rows at a time


def test_results_go_back_to_where_the_inputs_were():
    """A GPU works for tensors of the host; a device without memory stands for it here."""
    there = torch.empty(3, device="meta")
    assert like(torch.zeros(3), there).device == there.device
    here = torch.zeros(3)
    assert like(here, torch.ones(3)) is here


@pytest.mark.parametrize("cut", ["exact", "strict", "inclusive"])
def test_sequences_too_long_to_rank(cut):
    """More than 1024 positions are cut by bisection; with ties everywhere, and where all are committed."""
    rule = StepRule(cut=cut, score="given", clamps=(), choice_temperature=0.0)
    random = torch.Generator().manual_seed(3)
    for step, levels in ((1, 3), (1, 10_000), (7, 3)):
        scores = torch.randint(0, levels, (2, 1100), generator=random) / levels
        drawn = torch.randint(0, 6, (2, 1100), generator=random)
        tokens = torch.where(torch.rand(2, 1100, generator=random) < 0.8, 9, drawn)
        found = [
            maskgit.commit_tokens(
                drawn.to(place), scores.to(place), tokens.to(place), rule=rule, mask_token_id=9, step=step,
                num_steps=8, num_masked_at_start=1100, backend=backend,
            )
            for place, backend in ((DEVICE, "triton"), ("cpu", "reference"))
        ]  # fmt: skip
        for got, want in zip(*found, strict=True):
            np.testing.assert_array_equal(got.cpu().numpy(), want.numpy())


@pytest.mark.parametrize("rule", ["maskgit", "mdlm", "entropy-bound"])
def test_nothing_comes_from_the_host(rule, monkeypatch):
    """A copy from the host would wait for the device: kernels get tensors that are there already."""
    own, seen = dispatch.to_gpu, []

    def watched(x, logits):
        fields = {
            n: v for n, v in x._asdict().items() if n not in ("guidance_scale", "mask_token_id")
        }
        seen.extend(name for name, value in fields.items() if isinstance(value, np.ndarray))
        return own(x, logits)

    for module in (dispatch, head):
        monkeypatch.setattr(module, "to_gpu", watched)
    logits, weight = torch.randn(2, 6, 140, device=DEVICE), torch.randn(140, 16, device=DEVICE)
    tokens = torch.full((2, 6), 140, device=DEVICE)
    options = {"rule": rule, "mask_token_id": 140, "num_steps": 3, "backend": "triton"}
    options["seeds"] = torch.arange(2, device=DEVICE)
    maskgit.decode_step(logits, tokens, step=1, num_masked_at_start=6, **options)
    hidden = logits[..., :16].contiguous()
    once = options | {"step": 1, "num_masked_at_start": 6}
    maskgit.decode_step_from_hidden(hidden, weight, tokens, **once)
    maskgit.generate(lambda x: logits, tokens, **options)
    if StepRule.preset(rule).score != "random":
        maskgit.sample_tokens(logits, rule=rule, seeds=options["seeds"], backend="triton")
    assert seen == []


@pytest.mark.parametrize(
    "use",
    [
        {"leaves": 2, "warps": 2, "programs": 1}, {"leaves": 4, "warps": 8, "programs": 8, "registers": 255},
        {"leaves": 128, "warps": 4, "programs": 64},
    ],
    ids=str,
)  # fmt: skip
def test_tuned_numbers_change_no_token(use):
    """Whatever a device's file says, the result is the reference's."""
    with forced("decode_step", use):
        check(make_case(StepRule.preset("maskgit"), vocab=1500, length=5, batch=1), "triton")
        check(make_case(StepRule.preset("dream-margin"), vocab=300, length=9), "triton")


@pytest.mark.parametrize(
    "layout", ["odd offset", "odd stride", "V-major", "a slice", "no batch stride"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(layout, dtype):
    """Logits that are not aligned, not dense, or not apart give what a copy of them gives."""
    kind, vocab = getattr(torch, dtype), 265
    memory = torch.randn(2, 6, vocab + 8, generator=torch.manual_seed(1)).to(kind).to(DEVICE) * 3
    logits = {
        "odd offset": lambda: memory[:, :, 3 : 3 + vocab],
        "odd stride": lambda: memory.flatten()[1 : 1 + 2 * 6 * (vocab + 2)].view(2, 6, -1)[
            ..., :vocab
        ],
        "V-major": lambda: memory[:, :, :vocab].transpose(1, 2).contiguous().transpose(1, 2),
        "a slice": lambda: memory[:, 1::2, :vocab],
        "no batch stride": lambda: memory[:1, :, :vocab].expand(2, 6, vocab),
    }[layout]()
    tokens = torch.full(logits.shape[:2], vocab, device=DEVICE)
    options = {"rule": "maskgit", "mask_token_id": vocab, "step": 1, "num_steps": 4}
    options["num_masked_at_start"] = tokens.shape[1]
    options |= {"seeds": torch.tensor([5, 6], device=DEVICE), "backend": "triton"}
    got = maskgit.decode_step(logits, tokens, **options)
    want = maskgit.decode_step(logits.contiguous(), tokens, **options)
    reference = maskgit.decode_step(logits, tokens, **options | {"backend": "reference"})
    assert torch.equal(got.candidate_tokens, want.candidate_tokens)
    assert torch.equal(got.candidate_tokens, reference.candidate_tokens)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=1e-5, atol=1e-5)


LAYOUTS = {  # (B, N, V) views of (2, 6, V + 8) numbers
    "dense": lambda memory, vocab: memory[:, :, :vocab],
    "odd offset": lambda memory, vocab: memory[:, :, 3 : 3 + vocab],
    "odd stride": lambda memory, vocab: memory.flatten()[1 : 1 + 12 * (vocab + 2)].view(2, 6, -1)[
        ..., :vocab
    ],
    "V-major": lambda memory, vocab: (
        memory.flatten()[: 12 * vocab].view(2, vocab, 6).transpose(1, 2)
    ),
    "every second": lambda memory, vocab: memory.flatten()[: 12 * (vocab + 7)].view(2, 3, -1)[
        ..., : 2 * vocab : 2
    ],
}
READS = {  # each walks its rows in a way of its own
    "maskgit": {},
    "llada": {"sample_temperature": 0.0},
    "dream-entropy": {"filters": ("temperature", "top_k", "top_p"), "top_k": 9, "top_p": 0.8},
    "injected": {},
}


class Fences:
    """The bytes of some tensors' storages that may be read: whole aligned 16 bytes of dense rows."""

    def __init__(self, monkeypatch, *tensors):
        from triton.runtime import interpreter

        self.reads = 0
        self.zones = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            places = torch.arange(storage.nbytes() // tensor.element_size())
            places = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            first = storage.data_ptr() + places.flatten().numpy() * tensor.element_size()
            grain = 16 if tensor.stride(-1) == 1 else tensor.element_size()
            begin = storage.data_ptr() // grain * grain
            allowed = np.zeros(storage.nbytes() // grain + 2, bool)
            allowed[(first - begin) // grain] = True
            self.zones.append((begin, storage.data_ptr() + storage.nbytes(), grain, allowed))
        load = interpreter.InterpreterBuilder.create_masked_load

        def watched(builder, ptrs, mask, *more):
            self.check(np.asarray(ptrs.data)[np.asarray(mask.data, bool)])
            return load(builder, ptrs, mask, *more)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)

    def check(self, pointers):
        """That no pointer into a zone is at a byte that may not be read."""
        for begin, end, grain, allowed in self.zones:
            mine = pointers[(pointers >= begin) & (pointers < end)].astype(np.int64)
            self.reads += mine.size
            assert allowed[(mine - begin) // grain].all()


@pytest.mark.skipif(not is_interpreting(), reason="looks into the interpreter")
@pytest.mark.parametrize(
    ("name", "guided"),
    [("maskgit", False), ("maskgit", True), ("injected", True), ("llada", True),
     pytest.param("dream-entropy", True, marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_outside_the_rows_is_read(layout, guided, name, monkeypatch):
    """Logits, unconditional ones and noise lie inside larger memory that a fault would be read from."""
    vocab, rng = 137, torch.manual_seed(1)
    memory = [torch.randn(2, 6, vocab + 8, generator=rng).bfloat16() * 3 for _ in range(2)]
    logits, uncond = (LAYOUTS[layout](m, vocab) for m in memory)
    noise = LAYOUTS[layout](torch.randn(2, 6, vocab + 8, generator=rng), vocab)
    tokens = torch.zeros(logits.shape[:2], dtype=torch.long)
    tokens[0, 0] = tokens[-1, -1] = vocab  # the ends of the memory
    rule = StepRule.preset("maskgit" if name == "injected" else name)
    options = {"mask_token_id": vocab, "step": 1, "num_steps": 4, "backend": "triton"}
    options["num_masked_at_start"] = tokens.shape[1]
    options["rule"] = dataclasses.replace(rule, **READS[name])
    if name == "injected":
        options["noise"] = maskgit.StepNoise(noise, torch.randn(tokens.shape, generator=rng))
    else:
        options["seeds"] = torch.tensor([5, 6])
    if guided:
        options |= {"uncond_logits": uncond, "guidance_scale": 1.5}
    fences = Fences(monkeypatch, logits, uncond, noise)
    maskgit.decode_step(logits, tokens, **options)
    assert fences.reads > 2 * vocab * (1 + guided)


@pytest.mark.parametrize(
    ("layout", "alike"), [("twins", True), ("halves", False), ("a copy", False), ("V-major", False)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_of_guidance(layout, alike, dtype):
    """Unconditional logits that are as unaligned as the others, or otherwise."""
    kind, vocab = getattr(torch, dtype), 265
    memory = torch.randn(4, 4, vocab + 10, generator=torch.manual_seed(1)).to(kind).to(DEVICE) * 3
    odd = memory.flatten()[: 2 * 5 * (vocab + 10)].view(2, 5, -1)[..., 3 : 3 + vocab]
    pair = memory[:2, :, 3 : 3 + vocab], memory[2:, :, 3 : 3 + vocab]
    logits, uncond = {
        "twins": lambda: pair,
        "halves": lambda: (odd[:1], odd[1:]),
        "a copy": lambda: (pair[0], pair[1].contiguous()),
        "V-major": lambda: (pair[0], pair[1].transpose(1, 2).contiguous().transpose(1, 2)),
    }[layout]()
    assert triton_cuda._lie_alike(logits, uncond) == alike
    tokens = torch.full(logits.shape[:2], vocab, device=DEVICE)
    options = {"mask_token_id": vocab, "step": 1, "num_steps": 4, "guidance_scale": 2.5}
    options["num_masked_at_start"] = tokens.shape[1]
    options |= {"seeds": torch.arange(len(tokens), device=DEVICE), "backend": "triton"}
    for rule in ("maskgit", "llada"):
        got, want, reference = (
            maskgit.decode_step(a, tokens, rule=rule, uncond_logits=u, **options | {"backend": name})
            for a, u, name in (
                (logits, uncond, "triton"), (logits.contiguous(), uncond.contiguous(), "triton"),
                (logits, uncond, "reference"),
            )
        )  # fmt: skip
        assert torch.equal(got.candidate_tokens, want.candidate_tokens)
        assert torch.equal(got.candidate_tokens, reference.candidate_tokens)
        torch.testing.assert_close(got.confidence, want.confidence, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 257])
def test_parts_of_the_temporary_are_aligned(rows, splits, wide):
    """Kernels are compiled for pointers as they lie: these lie alike whatever the number of rows."""
    drawn, score, parts = triton_cuda._temporary(rows, splits, wide, torch.device("cpu"))
    for part in (drawn, score, parts):
        assert part is None or (part.data_ptr() - drawn.data_ptr()) % 16 == 0
    assert (len(drawn), len(score)) == (rows, rows)
    assert splits == 1 or len(parts) == triton_cuda.NUM_PARTS * splits * rows


def test_what_is_recorded_of_a_pointer_is_where_it_lies():
    """As Triton's launcher sees it: an offset tensor is not promised to be aligned."""
    from maskgit.benchmarks.compiler.triton_profile import _place

    for device in ("cpu", "meta"):
        memory = torch.empty(64, device=device)
        assert [_place(memory[n:]) % 16 for n in (0, 1, 2, 4)] == [0, 4, 8, 0]
    assert (_place(32), _place(33)) == (32, 33)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["maskgit", "llada", "dream-margin", "llada-fp64"])
def test_short_rows_have_a_warp_each(name, dtype, monkeypatch):
    """As on a GPU, where one warp walks a row up to 16 leaves; the tokens are those of any tiling."""
    monkeypatch.setattr(triton_cuda, "multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    for vocab in (1, 128, 300, 1000, 2048):
        got = triton_cuda.tiles(65536, vocab, True, False, dtype, device)
        assert (got["rows"], got["warps"], got["splits"]) == (1, 1, 1)
        assert got["leaves"] <= (8 if dtype == "float32" else 16)
    assert triton_cuda.tiles(65536, 2049, True, False, dtype, device)["warps"] == 4
    for vocab in (300, 1100):
        check(make_case(StepRule.preset(name), vocab=vocab, length=4, dtype=dtype), "triton")


CUTS = [
    "maskgit",
    "magvit",
    "llada",
    "titok",
    "muse",
    "threshold",
    "dinfer-threshold",
    "mdlm",
    "llada-fp64",
]


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("ties", [False, True])
def test_selection_by_bisection_is_that_by_rank(name, ties, monkeypatch):
    """At lengths where ranks are formed otherwise, and with scores of which many are equal."""
    rule, rng = StepRule.preset(name), np.random.default_rng(3)
    rule = dataclasses.replace(rule, score="given") if rule.score != "random" else rule
    tokens = np.where(rng.random((3, 40)) < 0.7, 99, 5)
    scores = rng.normal(size=tokens.shape).astype(np.float32)
    scores = np.round(scores) if ties else scores
    scores[0, :4], scores[1, 0] = -np.inf, np.nan
    arguments = [torch.from_numpy(a).to(DEVICE) for a in (tokens * 0 + 7, scores, tokens)]
    options = {"rule": rule, "mask_token_id": 99, "step": 2, "num_steps": 6}
    options |= {"num_masked_at_start": torch.from_numpy((tokens == 99).sum(1)).to(DEVICE)}
    options |= {"seeds": torch.arange(3, device=DEVICE)}
    if rule.count == "given":
        options["num_commit"] = torch.tensor([3, 0, 40], device=DEVICE)
    by_rank = maskgit.commit_tokens(*arguments, backend="triton", **options)
    monkeypatch.setattr(triton_select, "RANKED", tl.constexpr(0))
    triton_cuda._commit_spec.cache_clear()
    by_bisection = maskgit.commit_tokens(*arguments, backend="triton", **options)
    reference = maskgit.commit_tokens(*arguments, backend="reference", **options)
    for a, b, c in zip(by_rank, by_bisection, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-5)


def test_long_sequences_have_few_warps():
    """A commit is of one sequence: warps that wait for each other gain it nothing."""
    for length, warps in (
        (16, 1),
        (128, 4),
        (129, 1),
        (512, 1),
        (1024, 2),
        (4096, 8),
        (1 << 15, 16),
    ):
        block = max(16, 1 << (length - 1).bit_length())
        spec = triton_select.CommitSpec(block=block)
        assert triton_cuda._commit_options(spec, False)["num_warps"] == warps
    chance = triton_select.CommitSpec(block=1024, count="bernoulli")  # which selects nothing
    assert triton_cuda._commit_options(chance, False)["num_warps"] == 16


def test_a_batch_does_not_change_a_sequence():
    case = make_case(StepRule.preset("maskgit"), batch=3, vocab=400, length=7)
    together = run(case, "triton")
    for row in range(3):
        part = {
            name: getattr(case, name)[row : row + 1]
            for name in ("logits", "tokens", "seeds", "num_masked_at_start")
        }
        for a, b in zip(together, run(dataclasses.replace(case, **part), "triton"), strict=True):
            np.testing.assert_array_equal(a[row : row + 1], b)


@pytest.mark.parametrize("name", ["maskgit", "llada", "amused", "muse", "sglang-joint"])
def test_recorded_runs(name):
    from test_golden import replay

    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        golden = {k: file[k] for k in file.files}
    meta, last = json.loads(str(golden["meta"])), len(golden["step"]) - 1
    for s in (0, last):
        after, _ = replay(golden, meta, golden_rule(name), s, "triton")
        np.testing.assert_array_equal(after, golden["expected"][s])


HEADS = {
    "maskgit": StepRule.preset("maskgit"),
    "llada": dataclasses.replace(StepRule.preset("llada"), score_dtype="float32"),
    "entropy": StepRule(score="neg_entropy", count="quota"),
    "margin": StepRule(score="margin", ban_mask_token=True, banned_ids=(3, 200)),
    "slice": StepRule(vocab_slice=(20, 250), banned_ids=(30,)),
    "mdlm": StepRule.preset("mdlm"),
    "random": dataclasses.replace(StepRule.preset("random"), sample_temperature=1.0),
    "dream-origin": dataclasses.replace(StepRule.preset("dream-origin"), sample_temperature=0.7),
}


def no_logits(*_):
    raise AssertionError("logits were formed")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("rows", "use"), [(12, {}), (90, {}), (90, {"pair": 1})], ids=str)
def test_the_fused_head(name, rows, use, monkeypatch):
    """The same tokens as the step on the float64 logits, which are never formed."""
    rng, rule, vocab, width = np.random.default_rng(rows), HEADS[name], 300, 24
    hidden = rng.normal(size=(2, rows // 2, width)).astype(np.float32)
    uncond = rng.normal(size=hidden.shape).astype(np.float32)
    weight = rng.normal(size=(vocab, width)).astype(np.float32)
    bias = rng.normal(size=vocab).astype(np.float32)
    tokens = np.where(rng.random(hidden.shape[:2]) < 0.6, vocab, 1)
    eligible, seeds = rng.random(tokens.shape) < 0.9, np.array([3, -4])
    options = {"rule": rule, "mask_token_id": vocab, "step": 1, "num_steps": 4}
    options["num_masked_at_start"] = tokens.shape[1]
    mixed = uncond + 1.5 * (hidden - uncond)
    logits = (mixed.astype(np.float64) @ weight.T + bias).astype(np.float32)
    want = maskgit.decode_step(
        logits, tokens, seeds=seeds, eligible=eligible, backend="reference", **options
    )
    monkeypatch.setattr(chunked, "_product", no_logits)
    put = [
        native(a, "torch").to(DEVICE)
        for a in (hidden, weight, tokens, bias, uncond, eligible, seeds)
    ]
    with forced("head_sample", use):
        got = maskgit.decode_step_from_hidden(
            *put[:3], head_bias=put[3], uncond_hidden=put[4], guidance_scale=1.5, eligible=put[5],
            seeds=put[6], backend="triton", check=True, **options,
        )  # fmt: skip
    after = got.next_tokens.cpu().numpy()
    np.testing.assert_array_equal(after, want.next_tokens)
    drawn = (after != vocab) & (tokens == vocab)
    np.testing.assert_array_equal(
        got.candidate_tokens.cpu().numpy()[drawn], want.candidate_tokens[drawn]
    )


def test_a_dead_row_of_the_fused_head():
    hidden = torch.randn(1, 4, 16, device=DEVICE)
    hidden[0, 2] = torch.nan
    weight, tokens = torch.randn(40, 16, device=DEVICE), torch.full((1, 4), 40, device=DEVICE)
    options = {
        "rule": "maskgit",
        "mask_token_id": 40,
        "step": 3,
        "num_steps": 4,
        "num_masked_at_start": 4,
        "backend": "triton",
    }
    options["seeds"] = torch.tensor([1], device=DEVICE)
    out = maskgit.decode_step_from_hidden(hidden, weight, tokens, **options)
    assert (out.candidate_tokens == 40).tolist() == [[False, False, True, False]]
    assert out.confidence[0, 2] == -torch.inf
    with pytest.raises(ValueError, match=r"hidden: .* \(sequence 0, position 2\)"):
        maskgit.decode_step_from_hidden(hidden, weight, tokens, check=True, **options)


@pytest.mark.parametrize("rule", ["sdar", "llada-fp64", "muse"])
def test_rules_that_the_fused_head_leaves_to_products(rule):
    hidden, weight = torch.randn(1, 6, 16, device=DEVICE), torch.randn(50, 16, device=DEVICE)
    tokens = torch.full((1, 6), 50, device=DEVICE)
    rule = dataclasses.replace(
        StepRule.preset(rule), filters=("top_k",), top_k=9, sample_temperature=1.0
    )
    options = {"rule": rule, "mask_token_id": 50, "step": 0, "num_steps": 3}
    options["seeds"] = torch.tensor([1], device=DEVICE)
    got = maskgit.decode_step_from_hidden(hidden, weight, tokens, backend="triton", **options)
    want = maskgit.decode_step_from_hidden(hidden, weight, tokens, backend="reference", **options)
    assert torch.equal(got.next_tokens, want.next_tokens)


def test_the_loop():
    table = torch.randn(2, 8, 60, device=DEVICE)
    out = maskgit.generate(
        lambda t: table, torch.full((2, 8), 60, device=DEVICE), rule="maskgit", mask_token_id=60,
        num_steps=3, seeds=torch.tensor([1, 2], device=DEVICE), backend="triton", record=True,
    )  # fmt: skip
    same = maskgit.generate(
        lambda t: table, torch.full((2, 8), 60, device=DEVICE), rule="maskgit", mask_token_id=60,
        num_steps=3, seeds=torch.tensor([1, 2], device=DEVICE), backend="reference",
    )  # fmt: skip
    assert torch.equal(out.tokens, same.tokens)


def test_thresholds_are_no_constants_of_a_kernel():
    """A threshold, factor or bound that changes compiles nothing anew, and is exact in float64."""
    rules = [
        dataclasses.replace(StepRule.preset(name), **{field: value})
        for name, field in (
            ("threshold", "threshold"),
            ("factor", "factor"),
            ("sglang-joint", "edit_threshold"),
        )
        for value in (0.1, 1 / 3, 0.9)
    ]
    specs = {
        (rule.name, triton_cuda._commit_spec(resolve(rule, 1, 4, (2, 16)).commit, 16))
        for rule in rules
    }
    assert len(specs) == 3
    for value in (0.1, 1 / 3, 1e-30, 0.0, -0.7, float("inf"), float("-inf"), np.nextafter(0.9, 1)):
        assert sum(triton_select.in_three(value)) == value


class _Nothing:
    """A kernel that is not launched."""

    def __init__(self) -> None:
        self.specialisations: set[Any] = set()

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.specialisations.add((options["spec"], grid))


def test_a_launch_is_prepared_once(monkeypatch):
    """A shape that was met before is looked up; another layout, step or rule is another launch."""
    from test_ops import calls_of_ours

    rows, commit = _Nothing(), _Nothing()
    monkeypatch.setattr(triton_cuda, "sample_kernel", rows)
    monkeypatch.setattr(triton_cuda, "commit_kernel", commit)
    logits, tokens = torch.randn(2, 8, 384, device=DEVICE), torch.full((2, 8), 384, device=DEVICE)
    counts, seeds = torch.full((2,), 8, device=DEVICE), torch.arange(2, device=DEVICE)

    def step(logits: Any = logits, number: int = 1, rule: str = "maskgit") -> Any:
        return maskgit.decode_step(
            logits, tokens, rule=rule, mask_token_id=384, step=number, num_steps=4,
            num_masked_at_start=counts, seeds=seeds, backend="triton",
        )  # fmt: skip

    assert calls_of_ours(step) <= 165  # some 50 of them look at values on the host
    assert len(rows.specialisations) == len(commit.specialisations) == 1
    before = triton_cuda._launches.cache_info().misses
    step()
    assert triton_cuda._launches.cache_info().misses == before
    shifted = torch.randn(2 * 8 * 384 + 1, device=DEVICE)[1:].view(
        2, 8, 384
    )  # rows that start anywhere
    step(shifted), step(logits.transpose(1, 2).contiguous().transpose(1, 2)), step(logits.half())
    assert len(rows.specialisations) == 4
    step(number=3), step(rule="llada")
    assert len(commit.specialisations) >= 2


def test_guided_logits_whose_product_overflows():
    check_products_that_overflow("triton", 6)

"""What needs an NVIDIA GPU: large shapes, graphs, streams, and the same tokens as on the CPU.

`make gpu` runs it with everything else that a GPU is for.
"""

import dataclasses

import numpy as np
import pytest
from helpers import check, compare, make_case, run
from scipy import stats

import maskgit
from maskgit import StepRule

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
VOCAB = 126464


def step(logits, rule="maskgit", seeds=(1, 2), step=0, **options):
    tokens = torch.full(logits.shape[:2], logits.shape[2], device=logits.device)
    seeds = torch.arange(logits.shape[0], device=logits.device) + seeds[0]
    given = {"mask_token_id": logits.shape[2], "step": step, "num_steps": 4, "seeds": seeds}
    return maskgit.decode_step(logits, tokens, rule=rule, **(given | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["maskgit", "llada", "dream-entropy", "dream-margin"])
def test_the_vocabulary_of_llada(rule, dtype):
    logits = (torch.randn(2, 8, VOCAB, device="cuda") * 3).to(dtype)
    got, want = step(logits, rule), step(logits, rule, backend="reference")
    same = (got.candidate_tokens == want.candidate_tokens).float().mean()
    assert same > 0.99
    close = got.candidate_tokens == want.candidate_tokens
    torch.testing.assert_close(
        got.confidence[close].double(), want.confidence[close].double(), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("rule", ["maskgit", "amused", "mdlm", "titok", "llada", "dream-entropy"])
def test_the_same_tokens_as_on_the_cpu(rule):
    """And each that differs is an audited near tie, there and here."""
    for vocab, dtype in ((5000, "float32"), (50258, "bfloat16")):
        case = make_case(StepRule.preset(rule), batch=2, length=64, vocab=vocab, dtype=dtype)
        for backend in ("triton", "torch"):
            check(case, backend, differences=0.002)
        here, there = (run(case, backend)[1] for backend in ("triton", "torch"))
        assert (here != there).sum() <= 2


def test_long_sequences():
    """More positions than a warp, than a block's threads, and rows that few programs share."""
    for length, vocab in ((513, 50000), (1025, 300), (4096, 300)):
        for rule in ("maskgit", "entropy-bound", "factor"):
            case = make_case(StepRule.preset(rule), batch=1, length=length, vocab=vocab)
            if vocab > 300:
                case = dataclasses.replace(case, logits=case.logits * 0.5)
            compare(case, run(case, "reference"), run(case, "triton"))


def test_offsets_beyond_32_bits():
    """2^31 logits and more: the last rows are read where they are."""
    rows = 2**31 // VOCAB + 64
    logits = torch.zeros(1, rows, VOCAB, dtype=torch.bfloat16, device="cuda")
    best = torch.randint(0, VOCAB, (rows,), device="cuda")
    logits[0, torch.arange(rows, device="cuda"), best] = 50.0
    out = maskgit.sample_tokens(logits, rule=StepRule(score="prob"), seeds=[3])
    assert torch.equal(out.candidate_tokens[0], best)


def test_chi_square_and_tails():
    """At false-alarm rate 1e-6: a small vocabulary, and tokens of e^-20 in a large one."""
    rows, vocab = 200_000, 129
    row = torch.randn(vocab, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) * 2
    drawn = maskgit.sample_tokens(
        row.expand(1, rows, vocab), rule=StepRule(), seeds=[11]
    ).candidate_tokens
    expected = row.double().softmax(-1).cpu().numpy() * rows
    observed = torch.bincount(drawn.flatten(), minlength=vocab).cpu().numpy()
    kept = expected > 5
    rest = observed[~kept].sum(), expected[~kept].sum()
    statistic = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    statistic += (rest[0] - rest[1]) ** 2 / max(rest[1], 1e-9)
    assert stats.chi2.sf(statistic, kept.sum()) > 1e-6
    tails = torch.full((VOCAB,), -20.0, device="cuda")
    tails[77] = 0.0
    chance = (VOCAB - 1) * np.exp(-20.0) / (1 + (VOCAB - 1) * np.exp(-20.0))
    found, count = 0, 0
    for s in range(20):
        out = maskgit.sample_tokens(
            tails.expand(1, 65536, VOCAB), rule=StepRule(), seeds=[100 + s]
        ).candidate_tokens
        found, count = found + int((out != 77).sum()), count + out.numel()
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], count, chance)
    assert low <= found <= high


def loop(**options):
    table = torch.randn(
        2, 256, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(2)
    )
    embed = torch.randn(1025, device="cuda")

    def forward(tokens):
        return table + embed[tokens].mean(1)[:, None, None]

    def run(seeds, **more):
        tokens = torch.full((2, 256), 1024, device="cuda")
        return maskgit.generate(
            forward, tokens, rule="maskgit", mask_token_id=1024, num_steps=8,
            seeds=torch.as_tensor(seeds, device="cuda"), **options, **more,
        ).tokens  # fmt: skip

    return run


def test_the_loop_never_waits_for_the_device():
    run = loop()
    hidden = torch.randn(2, 32, 64, device="cuda")
    weight, tokens = torch.randn(500, 64, device="cuda"), torch.full((2, 32), 500, device="cuda")
    seeds = torch.arange(2, device="cuda")
    options = {"mask_token_id": 500, "step": 1, "num_steps": 4, "seeds": seeds}
    options["num_masked_at_start"] = torch.full((2,), 32, device="cuda")

    def calls():
        run(seeds)
        maskgit.sample_tokens(hidden, rule=StepRule(), seeds=seeds)
        for rule in ("maskgit", "mdlm"):
            maskgit.decode_step_from_hidden(hidden, weight, tokens, rule=rule, **options)

    calls()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_graph_for_the_whole_generation():
    run = loop()
    plain = [run(seeds) for seeds in ([1, 2], [3, 4])]
    graphed = [run(seeds, cuda_graph=True) for seeds in ([1, 2], [3, 4])]
    for a, b in zip(plain, graphed, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(*graphed)
    again = run([3, 4], cuda_graph=True, block_length=256, prompt_length=np.int64(0))
    assert torch.equal(again, run([3, 4], block_length=256))


def test_a_graph_of_a_step_with_a_number_to_commit():
    """And its table of counts stays where it is, whatever else is done in between."""
    from maskgit.kernels.decode_step.triton_cuda import launch as triton_cuda

    logits, given = torch.randn(2, 32, 500, device="cuda"), {"rule": StepRule(count="given")}
    for options in (given | {"num_commit": 3}, given | {"num_commit": np.int64(3)}, {}):
        want = step(logits, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step(logits, **options)
        triton_cuda._device_table.cache_clear()
        torch.full((1 << 16,), -1, device="cuda")  # would lie where a table was
        graph.replay()
        assert torch.equal(got.next_tokens, want.next_tokens)


def test_what_a_graph_cannot_hold():
    run = loop()
    for options, message in (
        ({"record": True}, "record: expected none with cuda_graph=True"),
        ({"progress": True}, "progress: expected none"),
        ({"noise": lambda s: None}, "noise: expected none"),
    ):
        with pytest.raises(ValueError, match=message):
            run([1, 2], cuda_graph=True, **options)


def test_streams_and_the_second_device():
    logits = torch.randn(2, 64, 2048, device="cuda")
    want = step(logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step(logits)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got.next_tokens, want.next_tokens)
    if torch.cuda.device_count() > 1:
        other = step(logits.to("cuda:1"))
        assert other.next_tokens.device.index == 1
        assert torch.equal(other.next_tokens.cpu(), want.next_tokens.cpu())


def test_no_temporary_of_the_size_of_the_logits():
    logits = torch.randn(8, 32, VOCAB, device="cuda", dtype=torch.bfloat16)
    step(logits)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(logits)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.numel() * 2


@pytest.mark.parametrize("rows", [32, 1024])
def test_the_fused_head_in_bfloat16(rows):
    hidden = torch.randn(1, rows, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(20000, 512, device="cuda", dtype=torch.bfloat16) * 0.05
    tokens = torch.full((1, rows), 20000, device="cuda")
    rule = dataclasses.replace(StepRule.preset("llada"), score_dtype="float32")
    options = {"rule": rule, "mask_token_id": 20000, "step": 0, "num_steps": 1}
    got = maskgit.decode_step_from_hidden(hidden, weight, tokens, **options)
    logits = (hidden.double() @ weight.double().T).float()
    want = maskgit.decode_step(logits, tokens, **options)
    assert (got.candidate_tokens == want.candidate_tokens).float().mean() > 0.999
    torch.testing.assert_close(got.confidence, want.confidence, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [48, 64, 72, 96, 128])
@pytest.mark.parametrize("length", [16, 257, 1025, 4096])
def test_attention(length, size, dtype):
    packed = torch.randn(2, length, 3, 4, size, device="cuda", dtype=dtype)
    padding = torch.zeros(2, length, dtype=torch.bool, device="cuda")
    padding[1, length // 2 :] = True
    for mask in (None, padding):
        got = maskgit.attention(*packed.unbind(2), key_padding_mask=mask, backend="triton")
        own = maskgit.attention(*packed.unbind(2), key_padding_mask=mask, backend="torch")
        wide = [x.double().transpose(1, 2) for x in packed.unbind(2)]
        keep = None if mask is None else ~mask[:, None, None, :]
        want = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=keep).transpose(
            1, 2
        )
        bound = 2 * (own - want).abs().max() + torch.finfo(dtype).eps / 2 * want.abs().max()
        assert (got - want).abs().max() <= bound

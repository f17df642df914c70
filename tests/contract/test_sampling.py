"""The draw's law: chi-square at small V, tail counts at V = 126464, agreement far in the tail.

False alarms: every test here fails by chance with probability at most 1e-6, and seeds are fixed.
"""

import dataclasses

import numpy as np
import pytest
from scipy import stats

import maskgit
from maskgit import StepRule

ALARM = 1e-6
RULE = dataclasses.replace(StepRule.preset("maskgit"), score="prob")
DRAWS = {"cpp": 200_000, "torch": 20_000, "jax": 20_000, "reference": 3_000}
TAIL_V, TAIL_LOGIT = 126464, -20.0


def same_rows(row, count):
    """`count` rows that are all `row`, in no more memory than one."""
    return np.broadcast_to(row, (1, count, row.size))


def draw(row, count, backend, rule=RULE, seed=11):
    rows = same_rows(row, count)
    out = maskgit.sample_tokens(rows, rule=rule, seeds=np.array([seed]), backend=backend)
    return np.asarray(out.candidate_tokens)[0]


def chi_square_pvalue(tokens, probs):
    """Cells with fewer than five expected draws are pooled."""
    expected = probs * tokens.size
    observed = np.bincount(tokens, minlength=probs.size)
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    if expected[-1] == 0:
        expected, observed = expected[:-1], observed[:-1]
    return stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue


@pytest.mark.parametrize("vocab", [17, 128, 129, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chi_square(backend, vocab, temperature):
    row = np.random.default_rng(vocab).normal(0, 2, vocab).astype(np.float32)
    rule = dataclasses.replace(RULE, sample_temperature=temperature)
    tokens = draw(row, DRAWS[backend], backend, rule)
    scaled = row.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    assert chi_square_pvalue(tokens, probs / probs.sum()) > ALARM


def test_chi_square_notices_a_wrong_law():
    row = np.random.default_rng(0).normal(0, 2, 129).astype(np.float32)
    wrong = dataclasses.replace(RULE, sample_temperature=1.05)
    probs = np.exp(row.astype(np.float64))
    assert chi_square_pvalue(draw(row, 200_000, "cpp", wrong), probs / probs.sum()) < ALARM


def tail_row():
    """One token of probability near 1 and 126463 of e^-20 each."""
    row = np.full(TAIL_V, TAIL_LOGIT, np.float32)
    row[77_777] = 0.0
    return row


def tail_pvalue(hits, draws):
    mass = (TAIL_V - 1) * np.exp(TAIL_LOGIT)
    return stats.binomtest(int(hits), draws, mass / (1 + mass)).pvalue


def float32_gumbel_tail_hits(draws, rng):
    """Tail hits of argmax(l - log(-log(u))) with float32 uniforms of 24 bits, in exact law.

    The tail's logits are equal, so its best token is the one with the largest uniform, and the
    largest of n uniforms is u^(1/n); rounding down to 24 bits keeps the order.
    """
    grid = np.float64(2**24)
    top = np.floor(rng.random(draws) ** (1 / (TAIL_V - 1)) * grid) / grid
    own = np.floor(rng.random(draws) * grid) / grid
    with np.errstate(divide="ignore"):
        return int((TAIL_LOGIT - np.log(-np.log(top)) > -np.log(-np.log(own))).sum())


def test_tail_counts():
    draws = 200_000  # 52 expected tail hits
    tokens = draw(tail_row(), draws, "cpp")
    tail = tokens[tokens != 77_777]
    assert tail_pvalue(tail.size, draws) > ALARM
    # and the hits are spread evenly: over sixteenths of the vocabulary, over groups and leaves
    for cells in (tail * 16 // TAIL_V, tail % 16, tail // 16 % 8):
        counts = np.bincount(cells, minlength=int(cells.max()) + 1)
        assert stats.chisquare(counts).pvalue > ALARM


def test_float32_gumbel_fails_the_tail_counts():
    draws = 400_000
    hits = float32_gumbel_tail_hits(draws, np.random.default_rng(1))
    assert tail_pvalue(hits, draws) < ALARM


@pytest.mark.slow
def test_float32_gumbel_in_torch_fails_the_tail_counts():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    row, draws, hits = torch.from_numpy(tail_row()), 80_000, 0  # 21 expected
    for _ in range(draws // 80):
        noise = torch.rand(80, TAIL_V).log_().neg_().log_().neg_()
        hits += int((noise.add_(row).argmax(1) != 77_777).sum())
    assert tail_pvalue(hits, draws) < ALARM


def test_tail_tokens_agree_on_every_backend(backend):
    """The rows on which the C++ core drew from the tail: the same tokens everywhere."""
    tokens = draw(tail_row(), 100_000, "cpp")
    positions = np.flatnonzero(tokens != 77_777)[:8]
    assert positions.size == 8
    out = maskgit.sample_tokens(
        np.array(same_rows(tail_row(), positions.size)[0]),
        rule=RULE,
        seeds=np.full(positions.size, 11),
        positions=positions,
        backend=backend,
    )
    assert (np.asarray(out.candidate_tokens) == tokens[positions]).all()


def test_tail_leaf_shared_with_a_dominant_token():
    """Tokens of e^-12 in the same leaf of 128 as a token of probability near 1."""
    row = np.full(128, -12.0, np.float32)
    row[5] = 0.0
    draws = 400_000
    tokens = draw(row, draws, "cpp")
    mass = 127 * np.exp(-12.0)
    hits = int((tokens != 5).sum())
    assert stats.binomtest(hits, draws, mass / (1 + mass)).pvalue > ALARM

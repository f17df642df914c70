"""The loop's options: hidden states, given counts, blocks, padding, on every backend."""

import dataclasses

import numpy as np
import pytest
from helpers import BACKENDS, kind_for, native, native_seeds
from toys import MASK, VOCAB, Toy, run

import maskgit
from maskgit import StepRule
from maskgit.sampling.graphs import one_length

SLOW_ON_JAX = [
    pytest.param(name, marks=pytest.mark.slow) if name == "jax" else name
    for name in ["reference", *BACKENDS]
]
ALL = ["reference", *BACKENDS]


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("rule", ["maskgit", "mdlm", "dream-entropy", "soundstorm"])
def test_hidden_states_give_the_same_tokens(rule, backend):
    a = run(backend, rule, Toy(backend, hidden=True), record=rule == "maskgit")
    b = run(backend, rule, record=rule == "maskgit")
    np.testing.assert_array_equal(np.asarray(a.tokens), np.asarray(b.tokens))
    if a.trajectory is not None:
        for x, y in zip(a.trajectory.log_probs, b.trajectory.log_probs, strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_given_counts(backend):
    rule = StepRule(count="given")
    out = run(backend, rule, num_commit=[1, 2, 3, 3], record=True)
    committed = [int((np.asarray(t) != MASK).sum(1)[0]) for t in out.trajectory.next_tokens]
    assert committed == [4, 6, 9, 12]
    with pytest.raises(ValueError, match="num_commit: expected one entry for each of 4 steps"):
        run(backend, rule, num_commit=[1, 2])
    with pytest.raises(ValueError, match="num_commit: expected exactly where"):
        run(backend, rule)


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_only_eligible_positions_are_generated(backend):
    allowed = np.zeros((3, 12), bool)
    allowed[:, 3:8] = True
    out = run(backend, "llada", eligible=native(allowed, kind_for(backend, "float32")))
    tokens = np.asarray(out.tokens)
    assert (tokens[:, 8:] == MASK).all()
    assert (tokens[:, :8] != MASK).all()


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_revision_leaves_the_prompt_alone(backend):
    out = run(backend, StepRule(revise="held", schedule="linear", score="prob"), record=True)
    for tokens in out.trajectory.next_tokens:
        np.testing.assert_array_equal(np.asarray(tokens)[:, :3], [[0, 1, 2]] * 3)


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
def test_positions_are_those_of_the_unpadded_row(backend):
    """Logits that depend on the real place alone: a left-padded row draws as it does alone."""
    kind = kind_for(backend, "float32")
    table = np.random.default_rng(1).normal(size=(16, VOCAB)).astype(np.float32)
    pads = np.array([0, 2, 5])
    length = 12
    places = np.maximum(np.arange(length)[None] - pads[:, None], 0)
    tokens = np.where(np.arange(length)[None] < pads[:, None], 0, MASK)
    options = {"mask_token_id": MASK, "num_steps": 4, "rule": "maskgit", "backend": backend}
    both = maskgit.generate(
        lambda t: native(table[places], kind), native(tokens, kind),
        seeds=native_seeds(np.arange(3), kind), positions=native(places, kind), **options,
    )  # fmt: skip
    for row, pad in enumerate(pads):
        alone = maskgit.generate(
            lambda t, pad=pad: native(table[None, : length - pad], kind),
            native(np.full((1, length - pad), MASK), kind),
            seeds=native_seeds(np.arange(3)[row : row + 1], kind), **options,
        )  # fmt: skip
        np.testing.assert_array_equal(
            np.asarray(both.tokens)[row, pad:], np.asarray(alone.tokens)[0]
        )


def model_of_places(table, places, kind):
    """Logits that depend on the tokens' real places and on the row's own tokens."""

    def forward(tokens):
        ids = np.asarray(tokens)
        known = np.cumsum(np.where(ids < MASK, ids + 1, 0), 1)[:, -1:, None] % 7
        return native((table[places] * (1 + known)).astype(np.float32), kind)

    return forward


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("rule", ["llada", "maskgit", "threshold", "sdar"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_rows_with_prompts_and_lengths_of_their_own(left, rule, backend):
    """Each row of a padded batch, its blocks where its own prompt ends, as it decodes alone."""
    kind, rng = kind_for(backend, "float32"), np.random.default_rng(7)
    table = rng.normal(size=(32, VOCAB)).astype(np.float32)
    prompts, news, length = [2, 5, 3], [8, 4, 12], 16
    tokens, eligible = np.full((3, length), 39), np.zeros((3, length), bool)
    places, begin = np.zeros((3, length), int), []
    for row, (p, n) in enumerate(zip(prompts, news, strict=True)):
        at = length - p - n if left else 0
        tokens[row, at : at + p], tokens[row, at + p : at + p + n] = 1, MASK
        eligible[row, at : at + p + n] = True
        places[row, at : at + p + n] = np.arange(p + n)
        begin.append(at + p)
    options = {"mask_token_id": MASK, "rule": rule, "backend": backend, "block_length": 4}
    seeds = native_seeds(np.arange(3), kind)

    def alone(row):
        p, n = prompts[row], news[row]
        one = np.full((1, p + n), MASK)
        one[0, :p] = 1
        out = maskgit.generate(
            model_of_places(table, np.arange(p + n)[None], kind), native(one, kind),
            seeds=seeds[row : row + 1], prompt_length=p, num_steps=2 * (n // 4), **options,
        )  # fmt: skip
        return np.asarray(out.tokens)[0]

    def forward(tokens):  # the padding takes no part in a row's logits
        ids = np.where(eligible, np.asarray(tokens), MASK)
        return model_of_places(table, places, kind)(ids)

    out = maskgit.generate(
        forward, native(tokens, kind), seeds=seeds, prompt_length=native(np.array(begin), kind),
        eligible=native(eligible, kind), positions=native(places, kind), num_steps=6, **options,
    )  # fmt: skip
    got = np.asarray(out.tokens)
    for row in range(3):
        np.testing.assert_array_equal(got[row][eligible[row]], alone(row))
        assert (got[row][~eligible[row]] == 39).all()


def test_numbers_of_numpy_are_numbers():
    out = run(
        "reference", "llada", mask_token_id=np.int64(MASK), num_steps=np.int32(3),
        block_length=np.int64(3), prompt_length=np.int16(3),
    )  # fmt: skip
    assert (out.tokens != MASK).all()
    assert out.num_forwards == 3


def test_a_graph_takes_one_length_of_prompts():
    for given in (3, np.int64(3), np.array(3)):
        assert one_length(given) == 3
    for given in ([3], np.array([3, 4])):
        with pytest.raises(ValueError, match="prompt_length: expected one number"):
            one_length(given)
    with pytest.raises(TypeError, match="prompt_length: expected an integer"):
        one_length(2.5)


def test_bad_arguments():
    good = {"rule": "llada", "mask_token_id": 9, "num_steps": 2}
    tokens = np.full((1, 4), 9)

    def forward(tokens):
        return np.zeros((1, 4, 5), np.float32)

    bad = {
        "head_weight: expected together": {"head_bias": np.zeros(5, np.float32)},
        r"hidden: expected shape|head_weight: expected shape": {
            "head_weight": np.zeros((5, 3), np.float32)
        },
        "positions: expected shape": {"positions": np.zeros((1, 3), np.int64)},
        "positions: expected values": {"positions": np.full((1, 4), -1)},
        "num_commit: expected exactly where": {"num_commit": [1, 1]},
        "num_commit: expected one entry for each of 2 steps, got 2": {
            "num_commit": 2,
            "rule": StepRule(count="given", sample_temperature=0.0),
        },
        "eligible: expected a numpy array": {"eligible": [[True] * 4]},
        "eligible: expected dtype bool": {"eligible": np.ones((1, 4), int)},
        "tokens: expected integers": {"tokens": np.zeros((1, 4))},
        "mask_token_id: expected an integer, got 9.0": {"mask_token_id": 9.0},
        "num_steps: expected an integer >= 1, got 0": {"num_steps": 0},
        "num_steps: expected an integer >= 1, got True": {"num_steps": True},
        "num_steps: expected a multiple of the 4 blocks, got 2": {"block_length": 1},
        "block_length: expected an integer >= 1": {"block_length": 0},
        "block_length: expected a divisor of the 4 positions": {"block_length": 3},
        r"prompt_length: expected an integer in \[0, 4\]": {"block_length": 1, "prompt_length": 5},
        r"prompt_length: expected shape \(1,\)": {"block_length": 1, "prompt_length": [1, 2]},
        "prompt_length: expected integers": {"block_length": 1, "prompt_length": [1.5]},
        "prompt_length: expected 0 without": {"prompt_length": 2},
    }
    for message, changes in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            maskgit.generate(forward, **({"tokens": tokens} | good | changes))


SHORT = StepRule(name="too few", count="given", score="random")  # positions are chosen, then drawn


@pytest.mark.parametrize("backend", SLOW_ON_JAX)
@pytest.mark.parametrize("rule", ["remdm-forward-backward", "entropy-bound", SHORT], ids=str)
def test_what_a_rule_leaves_is_committed_at_the_last_step_on_request(rule, backend):
    given = {"num_commit": [1, 1, 1, 1]} if rule is SHORT else {}
    found = {}
    for hidden in (False, True):
        options = given | {"toy": Toy(backend, hidden=hidden)}
        left = np.asarray(run(backend, rule, **options).tokens)
        found[hidden] = np.asarray(run(backend, rule, **options, finish=True).tokens)
        assert (left == MASK).any()
        assert (found[hidden] != MASK).all()
        np.testing.assert_array_equal(found[hidden][left != MASK], left[left != MASK])
    np.testing.assert_array_equal(found[False], found[True])


def test_finish_commits_only_what_takes_part():
    allowed = np.zeros((3, 12), bool)
    allowed[:, 3:8] = True
    options = {"num_commit": [0, 1, 0, 1], "eligible": allowed, "finish": True}
    tokens = run("reference", SHORT, **options).tokens
    assert (tokens[:, 8:] == MASK).all()
    assert (tokens[:, :8] != MASK).all()
    whole = run("reference", "llada").tokens
    np.testing.assert_array_equal(run("reference", "llada", finish=True).tokens, whole)


@pytest.mark.parametrize("rule", ["maskgit", "llada", StepRule(score="prob")], ids=str)
def test_temperature_is_that_of_the_draw(rule):
    cold = run("reference", rule, temperature=np.float32(0)).tokens
    assert (cold == run("reference", rule, temperature=0).tokens).all()
    named = StepRule.preset(rule) if isinstance(rule, str) else rule
    changed = dataclasses.replace(named, sample_temperature=0.7)
    warm = run("reference", changed).tokens
    for value in (0.7, np.float64(0.7), np.array(0.7)):
        np.testing.assert_array_equal(run("reference", rule, temperature=value).tokens, warm)
    assert (warm != cold).any()
    for bad in (-1, float("nan"), float("inf"), True, "1", [1.0]):
        with pytest.raises(
            (ValueError, TypeError), match=r"temperature: expected a (finite )?number"
        ):
            run("reference", rule, temperature=bad)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_gradients_are_switched_off(hidden, guided):
    torch = pytest.importorskip("torch")
    toy = Toy("torch", hidden=hidden)
    scale = torch.nn.Parameter(torch.ones(()))
    weight = torch.nn.Parameter(torch.from_numpy(toy.weight))
    recorded = []

    def forward(tokens):
        recorded.append(torch.is_grad_enabled())
        with torch.enable_grad():  # a model that needs them inside, as for guidance by a classifier
            out = toy(tokens) * scale
        return (out, out * 0.5) if guided else out

    options = {"guidance_scale": 2.0} if guided else {}
    options |= {"head_weight": weight} if hidden else {}
    result = maskgit.generate(
        forward, torch.full((2, 6), MASK), rule="maskgit", mask_token_id=MASK, num_steps=3,
        seeds=torch.arange(2), record=True, **options,
    )  # fmt: skip
    assert not any(recorded)
    assert torch.is_grad_enabled()
    assert not result.tokens.is_inference()
    assert not any(x.requires_grad for x in result.trajectory.confidence)
    fixed = torch.nn.Parameter(torch.zeros(2, 6, VOCAB))  # the output is itself a parameter
    maskgit.generate(
        lambda t: fixed, torch.full((2, 6), MASK), rule="llada", mask_token_id=MASK, num_steps=2
    )

"""The tie audit: constructed ties are found where they are, separated data is clean, files are read."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import to_dtype

import maskgit
from maskgit import StepNoise, StepRule

V = 40


def separated(batch=2, length=16, seed=0):
    """Logits whose largest are far apart, with confidences that are."""
    rng = np.random.default_rng(seed)
    logits = rng.uniform(-1, 0, (batch, length, V)).astype(np.float32)
    heights = 2 + 0.25 * np.stack([rng.permutation(length) for _ in range(batch)])
    winners = rng.integers(0, V, (batch, length))
    np.put_along_axis(logits, winners[..., None], heights[..., None].astype(np.float32), -1)
    return logits


def needed(rule, shape):
    """What rules that are given their scores or counts need."""
    rng = np.random.default_rng(1)
    out = {}
    if rule.score == "given":
        out["scores"] = rng.permutation(shape[0] * shape[1]).reshape(shape).astype(np.float32)
    if rule.count == "given":
        out["num_commit"] = 3
    return out


@pytest.mark.parametrize("preset", StepRule.presets())
def test_no_false_alarms(preset):
    rule = StepRule.preset(preset)
    report = maskgit.audit_ties(
        separated(), rule=rule, mask_token_id=V, step=1, **needed(rule, (2, 16))
    )
    assert report.is_clean, report
    assert report.rows == 32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_false_alarms_in_half_precision(dtype):
    logits = to_dtype(separated(), dtype)
    assert maskgit.audit_ties(logits, rule="llada-fp64", dtype=dtype).is_clean


def test_equal_logits_are_found():
    logits = separated()
    logits[0, 3, [7, 20, 31]] = 30.0
    logits[1, 15, [0, 39]] = 31.0
    report = maskgit.audit_ties(logits, rule="llada")
    assert [(t.sequence, t.position, t.kind) for t in report.logits] == [
        (0, 3, "equal"),
        (1, 15, "equal"),
    ]
    first = report.logits[0]
    assert (first.tokens, first.count, first.lowest, first.highest) == ((7, 20, 31), 3, 7, 31)
    assert first.gap == 0
    assert first.what == "logits"


def test_known_and_filtered_rows_do_not_count():
    logits = separated()
    logits[0, 3, [7, 20]] = 30.0
    tokens = np.full((2, 16), V)
    tokens[0, 3] = 5
    options = {"rule": "llada", "mask_token_id": V}
    assert not maskgit.audit_ties(logits, tokens, **options).logits
    eligible = np.ones((2, 16), bool)
    eligible[0, 3] = False
    assert not maskgit.audit_ties(logits, eligible=eligible, **options).logits
    banned = dataclasses.replace(StepRule.preset("llada"), banned_ids=(20,))
    assert not maskgit.audit_ties(logits, rule=banned, mask_token_id=V).logits


@pytest.mark.parametrize(("dtype", "finds"), [("float32", False), ("bfloat16", True)])
def test_logits_closer_than_rounding(dtype, finds):
    logits = separated()
    logits[0, 3, 7], logits[0, 3, 20] = 16.0, 16.125  # neighbours in bfloat16
    report = maskgit.audit_ties(logits, rule="llada-fp64", dtype=dtype)
    assert [(t.position, t.kind, t.gap) for t in report.logits] == [(3, "near", 0.125)] * finds


def test_guidance_makes_near_ties():
    cond, uncond = separated(), separated(seed=2)
    # 2 * 5 - 3 and 2 * 4.25 - 1.5 are both 7, though neither logit is the other's
    cond[0, 3], uncond[0, 3] = 0.0, 0.0
    cond[0, 3, [7, 20]], uncond[0, 3, [7, 20]] = (5.0, 4.25), (3.0, 1.5)
    report = maskgit.audit_ties(cond, rule="llada", uncond_logits=uncond, guidance_scale=2.0)
    assert [(t.position, t.kind, t.tokens) for t in report.logits] == [(3, "equal", (7, 20))]
    assert not maskgit.audit_ties(cond, rule="llada").logits


def test_rounded_probabilities_are_ranked():
    logits = separated()
    logits[0, 3] = -30.0
    logits[0, 3, 7], logits[0, 3, 20] = 5.0, 5.002  # 0.4995 and 0.5005
    half = maskgit.audit_ties(logits, rule="dream-maskgit-plus", dtype="bfloat16")
    assert [(t.position, t.kind, t.tokens) for t in half.probs] == [(3, "equal", (7, 20))]
    assert half.probs[0].lowest == 7  # what is drawn, though 20 has the larger logit
    assert not half.logits
    full = maskgit.audit_ties(logits, rule="dream-maskgit-plus")
    assert not full.probs


def test_injected_noise_makes_keys():
    logits = separated()
    noise = np.zeros((2, 16, V), np.float32)
    noise[0, 3] = -20
    noise[0, 3, [7, 20]] = 30 - logits[0, 3, [7, 20]]
    choice = np.zeros((2, 16), np.float32)
    report = maskgit.audit_ties(logits, rule="maskgit", noise=StepNoise(noise, choice))
    assert [(t.position, t.what, t.tokens) for t in report.logits] == [(3, "keys", (7, 20))]


def ranked_logits(scores):
    """(1, N, V) logits that are the same in every row but for how sure they are."""
    logits = np.zeros((1, len(scores), V), np.float32)
    logits[0, :, 5] = scores
    return logits


def test_a_tie_at_the_cut_and_what_each_convention_commits():
    logits = ranked_logits([9, 5, 7, 5, 5, 1, 2, 3])
    rule = dataclasses.replace(StepRule.preset("llada"), count="given")
    report = maskgit.audit_ties(logits, rule=rule, num_commit=3)
    (tie,) = report.cuts
    assert (tie.sequence, tie.kind, tie.positions) == (0, "equal", (1, 3, 4))
    assert tie.commits == {"lowest": (1,), "highest": (4,), "strict": (1, 3, 4), "inclusive": ()}
    for cut, key in (("exact", "lowest"), ("strict", "strict"), ("inclusive", "inclusive")):
        out = maskgit.decode_step(
            logits, np.full((1, 8), V), rule=dataclasses.replace(rule, cut=cut), mask_token_id=V,
            step=0, num_steps=8, num_commit=3,
        )  # fmt: skip
        committed = set(np.flatnonzero(out.next_tokens[0] != V).tolist())
        assert committed & {1, 3, 4} == set(tie.commits[key])


@pytest.mark.parametrize("num_commit", [1, 2, 5, 8])
def test_ties_beside_the_cut_do_not_count(num_commit):
    rule = dataclasses.replace(StepRule.preset("llada"), count="given")
    logits = ranked_logits([9, 5, 7, 5, 5, 1, 2, 3])
    assert not maskgit.audit_ties(logits, rule=rule, num_commit=num_commit).cuts


def test_confidences_that_rounding_makes_equal():
    logits = ranked_logits([12.0, 12.5, 13.0, 1.0])  # 0.9997 and above: 1.0 in bfloat16
    report = maskgit.audit_ties(logits, rule="llada", num_steps=4, dtype="bfloat16")
    (tie,) = report.cuts
    assert (tie.kind, tie.confidence, tie.positions) == ("equal", 1.0, (0, 1, 2))
    assert not maskgit.audit_ties(logits, rule="llada", num_steps=4).cuts


def test_near_ties_at_the_cut():
    logits = ranked_logits([2.0, np.nextafter(np.float32(2), np.float32(3)), 0.5, 1.0])
    (tie,) = maskgit.audit_ties(logits, rule="llada", num_steps=4).cuts
    assert tie.kind in ("near", "equal")
    assert tie.positions == (0, 1)


def test_each_sequence_is_audited_with_its_own_count():
    logits = np.concatenate([ranked_logits([4, 3, 3, 1]), ranked_logits([4, 3, 2, 1])])
    tokens = np.full((2, 4), V)
    options = {"rule": "llada", "mask_token_id": V, "num_steps": 2}
    assert [t.sequence for t in maskgit.audit_ties(logits, tokens, **options).cuts] == [0]
    tokens[0, 0] = 5  # three are masked, two are committed: both ties
    assert not maskgit.audit_ties(logits, tokens, **options).cuts


def test_thresholds():
    logits = ranked_logits([9, 8, 5, 1])
    drawn = maskgit.sample_tokens(logits, rule="threshold", backend="reference")
    sure = float(drawn.confidence[0, 2])
    rule = dataclasses.replace(StepRule.preset("threshold"), threshold=sure)
    (tie,) = maskgit.audit_ties(logits, rule=rule).cuts
    assert (tie.kind, tie.positions) == ("threshold", (2,))
    assert tie.commits == {"at or above": (2,), "above": ()}
    rule = dataclasses.replace(rule, threshold=sure + 1e-3)
    assert maskgit.audit_ties(logits, rule=rule).is_clean
    # nothing passes: the best one is committed all the same, and two are the best
    rule = dataclasses.replace(rule, threshold=0.9999)
    (tie,) = maskgit.audit_ties(ranked_logits([3, 2, 3, 1]), rule=rule).cuts
    assert (tie.kind, tie.positions) == ("equal", (0, 2))
    assert tie.commits == {"lowest": (0,), "highest": (2,)}


def test_runs_and_factors():
    rule = StepRule.preset("dinfer-hierarchy")
    rule = dataclasses.replace(rule, threshold=0.99, low_threshold=0.1)
    logits = ranked_logits([5, 4, 5, 1])
    (tie,) = maskgit.audit_ties(logits, rule=rule).cuts
    assert tie.commits == {"lowest": (0,), "highest": (2,), "all": (0, 2)}
    factor = dataclasses.replace(StepRule.preset("factor"), factor=1.0)
    probs = maskgit.sample_tokens(ranked_logits([9, 8, 5, 1]), rule=factor).confidence[0]
    exact = dataclasses.replace(factor, factor=float(4 * (1 - probs[2])))  # of the third
    (tie,) = maskgit.audit_ties(ranked_logits([9, 8, 5, 1]), rule=exact).cuts
    assert (tie.kind, tie.positions) == ("threshold", (2,))


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_other_libraries(kind):
    library = pytest.importorskip("torch" if kind == "torch" else "jax.numpy")
    logits = to_dtype(separated(), "bfloat16")
    logits[0, 3, [7, 20]] = 16.0, 16.125
    wanted = maskgit.audit_ties(logits, rule="llada-fp64", dtype="bfloat16")
    array = (
        library.from_numpy(logits).bfloat16()
        if kind == "torch"
        else library.asarray(logits, library.bfloat16)
    )
    assert maskgit.audit_ties(array, rule="llada-fp64") == wanted
    assert len(wanted.logits) == 1


def test_errors():
    logits, tokens = separated(), np.full((2, 16), V)
    for call, error, words in (
        (lambda: maskgit.audit_ties(logits, tokens, rule="llada"), ValueError, "mask_token_id"),
        (lambda: maskgit.audit_ties(logits, rule="lada"), ValueError, "rule: expected"),
        (lambda: maskgit.audit_ties(logits[0], rule="llada"), ValueError, r"\(B, N, V\)"),
        (lambda: maskgit.audit_ties(logits, rule="llada", dtype="int8"), ValueError, "dtype"),
        (lambda: maskgit.audit_ties(logits, rule="llada", step=8), ValueError, "step"),
        (lambda: maskgit.audit_ties(logits, rule="halton"), ValueError, "scores"),
    ):
        with pytest.raises(error, match=words):
            call()


# ---------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def run(tmp_path, monkeypatch):
    testing = pytest.importorskip("typer.testing")
    from maskgit.cli.main import app

    monkeypatch.chdir(tmp_path)
    return lambda *args: testing.CliRunner().invoke(app, ["audit", *map(str, args)])


def tied_logits():
    logits = to_dtype(separated(), "bfloat16")
    logits[0, 3, [7, 20]] = 16.0
    return logits


def test_command_prints_json(run, tmp_path):
    np.savez("step.npz", logits=tied_logits(), tokens=np.full((2, 16), V))
    result = run("--logits", "step.npz", "--rule", "llada", "--mask-token-id", V, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert (found["rule"], found["rows"], found["clean"]) == ("llada", 32, False)
    assert found["logits"]["count"] == found["logits"]["equal"] == 1
    assert found["logits"]["first"][0]["tokens"] == [7, 20]


def test_command_prints_a_table_or_one_line(run):
    np.save("tied.npy", tied_logits())
    result = run("--logits", "tied.npy", "--rule", "llada")
    assert result.exit_code == 0, result.output
    assert "1 ties of logits" in result.stdout
    assert "sequence 0, position 3" in result.stdout
    assert "ids [7 20] (2)" in result.stdout
    np.save("clean.npy", separated())
    result = run("--logits", "clean.npy", "--rule", "llada")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)


def test_command_reads_tokens_from_a_file_and_one_sequence(run):
    np.save("logits.npy", tied_logits()[0])
    tokens = np.full(16, V)
    tokens[3] = 1
    np.save("tokens.npy", tokens)
    options = ("--logits", "logits.npy", "--rule", "llada", "--mask-token-id", V, "--json")
    assert json.loads(run(*options).stdout)["rows"] == 16
    found = json.loads(run(*options, "--tokens", "tokens.npy").stdout)
    assert (found["rows"], found["logits"]["count"]) == (15, 0)


def test_command_reads_safetensors_in_bfloat16(run, tmp_path):
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    logits = tied_logits()
    logits[1, 2, [7, 20]] = 16.0, 16.125
    tensors = {"logits": torch.from_numpy(logits).bfloat16(), "tokens": torch.full((2, 16), V)}
    save(tensors, "step.safetensors", metadata={"step": "0"})
    options = ("--rule", "llada-fp64", "--mask-token-id", V, "--json")
    found = json.loads(run("--logits", "step.safetensors", *options).stdout)
    assert found["dtype"] == "bfloat16"
    assert [(t["position"], t["kind"]) for t in found["logits"]["first"]] == [
        (3, "equal"),
        (2, "near"),
    ]
    np.savez("step.npz", logits=logits)  # the same numbers in float32 are no near tie
    found = json.loads(run("--logits", "step.npz", *options).stdout)
    assert found["logits"]["count"] == 1
    found = json.loads(run("--logits", "step.npz", *options, "--dtype", "bfloat16").stdout)
    assert found["logits"]["count"] == 2


def test_command_guides(run):
    np.savez("step.npz", logits=separated(), uncond_logits=separated(seed=3))
    options = ("--logits", "step.npz", "--rule", "llada", "--json")
    assert run(*options, "--guidance", 2).exit_code == 0
    assert "--guidance: expected exactly where" in run(*options).stderr


def write(name, data):
    with open(name, "wb") as file:
        file.write(data)


def test_command_refuses_bad_files(run):
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez("unnamed.npz", a=np.zeros(3), b=np.zeros(3))
    np.save("whole.npy", np.zeros((1, 2, 3), int))
    np.save("flat.npy", np.zeros(3, np.float32))
    write("cut.npy", b"\x93NUMPY\x01\x00")
    write("not.npz", b"PK\x03\x04 no")
    write("text.npy", b"hello")
    write("short.safetensors", b"\x02")
    write("huge.safetensors", (2**40).to_bytes(8, "little") + b"{}")
    write("broken.safetensors", (4).to_bytes(8, "little") + b"{{{{")
    entry = b'{"logits":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}}'
    write("beyond.safetensors", len(entry).to_bytes(8, "little") + entry + b"\0" * 8)
    write("list.safetensors", (2).to_bytes(8, "little") + b"[]")
    write("logits.pt", b"")
    for name, words in (
        ("absent.npy", "no such file"),
        ("logits.pt", "expected a file .npy, .npz, .safetensors"),
        ("objects.npy", "not a readable .npy file"),
        ("unnamed.npz", "expected an array 'logits', got a, b"),
        ("whole.npy", "logits: expected dtype float16, bfloat16, float32, float64, got int64"),
        ("flat.npy", "logits: expected shape (B, N, V)"),
        ("cut.npy", "not a readable .npy file"),
        ("not.npz", "not a readable .npz file"),
        ("text.npy", "not a readable .npy file"),
        ("short.safetensors", "not a readable .safetensors file"),
        ("huge.safetensors", "not a readable .safetensors file"),
        ("broken.safetensors", "not a readable .safetensors file"),
        ("beyond.safetensors", "not a readable .safetensors file"),
        ("list.safetensors", "not a readable .safetensors file"),
    ):
        result = run("--logits", name, "--rule", "llada")
        assert result.exit_code == 2, name
        assert words in result.stderr, (name, result.stderr)
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1


def test_command_refuses_bad_options(run):
    np.save("logits.npy", separated())
    for options, words in (
        (("--rule", "lada"), "--rule"),
        (("--rule", "llada", "--step", "8"), "--step"),
        (("--rule", "llada", "--steps", "0"), "--steps"),
        (("--rule", "llada", "--limit", "-1"), "--limit"),
    ):
        result = run("--logits", "logits.npy", *options)
        assert result.exit_code == 2
        assert words in result.stderr
    assert "expected exactly where" in run("--logits", "logits.npy", "--rule", "halton").stderr

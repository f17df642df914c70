"""The command line: what it writes, what it prints, and one clear line for every wrong argument."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import maskgit
from maskgit.cli.main import app
from maskgit.report.pictures import read_gray

TILE, GAP, MARGIN = 64, 6, 12


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def digit_file(tmp_path: Path) -> Path:
    """A PNG of a held-out digit, dark on light, at an odd size."""
    from maskgit.training.data.digits import load_split

    ink = load_split()[1].images[21, 0]
    light = Image.fromarray(((1 - ink) * 255).round().astype(np.uint8))
    path = tmp_path / "digit.png"
    light.resize((56, 56), Image.Resampling.NEAREST).save(path)
    return path


def test_generate_writes_grid_and_strip(tmp_path: Path) -> None:
    grid, strip = tmp_path / "grid.png", tmp_path / "strip.png"
    result = run(
        *("generate", "--classes", "3,5-6", "--per-class", 4, "--seed", 2),
        *("--out", grid, "--strip", strip),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(grid), str(strip)]
    with Image.open(grid) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        width, height = picture.size
        assert height == 2 * MARGIN + 3 * TILE + 2 * GAP
        assert 2 * MARGIN + 4 * TILE + 3 * GAP < width < 2 * MARGIN + 4 * TILE + 3 * GAP + 60
    with Image.open(strip) as picture:
        assert picture.size[0] > 9 * TILE  # start, 1 .. 7, and the result
        masked = np.asarray(picture) == np.array([196, 203, 217])
        assert masked.all(-1)[:, : 2 * TILE].any()
        assert not masked.all(-1)[:, -TILE:].any()


def test_generate_json_and_repeatability(tmp_path: Path) -> None:
    arguments = (
        "generate",
        "--classes",
        "7",
        "--per-class",
        2,
        "--steps",
        3,
        "--json",
        "--seed",
        9,
    )
    first, second = (
        run(*arguments, "--out", tmp_path / "a"),
        run(*arguments, "--out", tmp_path / "b"),
    )
    report = json.loads(first.stdout)
    assert report["classes"] == [7]
    assert report["steps"] == 3
    assert report["seed"] == 9
    assert report["files"] == [str(tmp_path / "a")]
    assert json.loads(second.stdout)["files"] == [str(tmp_path / "b")]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


GENERATE_ERRORS = [
    (["--classes", "10"], "--classes", "expected classes 0 to 9, got 10"),
    (["--classes", "3-12"], "--classes", "got 12"),
    (["--classes", "9-3"], "--classes", "rising range"),
    (["--classes", "three"], "--classes", "got 'three'"),
    (["--classes", "-1"], "--classes", "got '-1'"),
    (["--classes", ""], "--classes", "got ''"),
    (["--per-class", "0"], "--per-class", "got 0"),
    (["--steps", "0"], "--steps", "1 to 64, got 0"),
    (["--steps", "-4"], "--steps", "got -4"),
    (["--steps", "65"], "--steps", "1 to 64, got 65"),
    (["--steps", "x"], "--steps", "'x'"),
    (["--choice-temperature", "-1"], "--choice-temperature", "at least 0, got -1"),
    (["--choice-temperature", "nan"], "--choice-temperature", "got nan"),
    (["--sample-temperature", "inf"], "--sample-temperature", "got inf"),
    (["--guidance", "-0.5"], "--guidance", "got -0.5"),
    (["--seed", "-1"], "--seed", "got -1"),
    (["--rule", "nonsense"], "--rule", "nonsense"),
    (["--order", "spiral"], "--order", "got 'spiral'"),
]


@pytest.mark.parametrize(("arguments", "option", "got"), GENERATE_ERRORS)
def test_generate_usage_errors(arguments: list[str], option: str, got: str, tmp_path: Path) -> None:
    result = run("generate", "--out", tmp_path / "x.png", *arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert option in errors[0]
    assert got in errors[0]
    assert result.stdout == ""
    assert files_in(tmp_path) == []


def test_unknown_backend(tmp_path: Path) -> None:
    result = run("generate", "--out", tmp_path / "x.png", "--backend", "abacus")
    assert result.exit_code == 2
    assert "--backend: expected auto, " in result.stderr
    near = run("generate", "--out", tmp_path / "x.png", "--backend", "Trition")
    assert "got 'Trition' (did you mean 'triton'?)" in near.stderr
    assert "got 'abacus'" in result.stderr
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("option", ["--out", "--strip"])
def test_unwritable_output(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    for place in (tmp_path, tmp_path / "no" / "x.png", tmp_path / "file" / "x.png"):
        extra = [] if option == "--out" else ["--out", tmp_path / "ok.png"]
        result = run("generate", *extra, option, place)
        assert result.exit_code == 2
        assert f"Invalid value for {option}" in result.stderr
    wrong = run("generate", "--out", tmp_path / "ok.png", option, tmp_path / "x.jpg")
    assert wrong.exit_code == 2
    assert "expected a name that ends in .png, got" in wrong.stderr
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("command", ["generate", "edit", "evaluate"])
def test_masks_that_a_rule_leaves(command: str, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "x.png"]
    rest = {
        "generate": ["--per-class", 1, *out],
        "edit": ["test:0", "--inpaint", "0,0,8,8", *out],
        "evaluate": ["--per-class", 2],
    }
    arguments = [command, *rest[command], "--steps", 2, "--rule", "entropy-bound"]
    failed = run(*arguments)
    assert failed.exit_code == 2
    assert "still masked" in failed.stderr
    assert "--finish" in failed.stderr
    if command == "generate":
        assert run(*arguments, "--finish").exit_code == 0
        assert run(*arguments[:-2], "--rule", "halton", "--order", "halton").exit_code == 0


def test_bad_weights(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"garbage")
    for weights, text in ((bad, "not a readable"), (tmp_path / "none", "no such file")):
        result = run("generate", "--out", tmp_path / "x.png", "--weights", weights)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert text in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert files_in(tmp_path) == ["bad.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--inpaint", "2,2,6,6", "--class", "3"], 16),
        (["--outpaint", "left"], 32),
        (["--swap-class", "8", "--box", "0,0,8,4"], 32),
    ],
)
def test_edit(arguments: list[str], count: int, tmp_path: Path) -> None:
    source, out = digit_file(tmp_path), tmp_path / "edit.png"
    result = run("edit", source, *arguments, "--samples", 2, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    masked = np.array(report["masked"]).astype(bool).reshape(-1)
    before, after = np.array(report["tokens_before"]), np.array(report["tokens_after"])
    assert masked.sum() == count
    assert after.shape == (2, 64)
    assert (after[:, ~masked] == before[~masked]).all()
    with Image.open(out) as picture:
        assert picture.size[0] == 2 * MARGIN + 4 * 96 + 3 * GAP


EDIT_ERRORS = [
    ([], "expected exactly one of the three, got 0"),
    (["--inpaint", "0,0,4,4", "--outpaint", "left"], "got 2"),
    (["--inpaint", "0,0,9,4"], "--inpaint: expected numbers in 0..8"),
    (["--inpaint", "4,4,4,6"], "the empty box"),
    (["--inpaint", "a,b,c,d"], "four whole numbers"),
    (["--outpaint", "up"], "left, right, top, bottom, got 'up'"),
    (["--swap-class", "3"], "--box"),
    (["--box", "0,0,4,4", "--inpaint", "0,0,4,4"], "--box"),
    (["--swap-class", "10", "--box", "0,0,4,4"], "--swap-class: expected a number 0 to 9"),
    (["--inpaint", "0,0,4,4", "--class", "-1"], "--class: expected a number 0 to 9, got -1"),
    (["--inpaint", "0,0,4,4", "--samples", "0"], "--samples"),
    (["--inpaint", "0,0,4,4", "--steps", "0"], "--steps"),
]


@pytest.mark.parametrize(("arguments", "message"), EDIT_ERRORS)
def test_edit_usage_errors(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("edit", "test:0", "--out", tmp_path / "x.png", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert files_in(tmp_path) == []


def test_unreadable_images(tmp_path: Path) -> None:
    good = digit_file(tmp_path).read_bytes()
    cases = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"hello, this is no image", "not a readable image"),
        "cut.png": (good[: len(good) // 2], "not a readable image"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        result = run("edit", tmp_path / name, "--inpaint", "0,0,4,4", "--out", tmp_path / "x.png")
        assert result.exit_code == 2
        assert message in result.stderr
        assert name in result.stderr
    for name, message in (("none.png", "no such file"), (".", "got a directory")):
        result = run("edit", tmp_path / name, "--inpaint", "0,0,4,4", "--out", tmp_path / "x.png")
        assert result.exit_code == 2
        assert message in result.stderr
    assert run("edit", "test:999", "--inpaint", "0,0,4,4", "--out", tmp_path / "x").exit_code == 2
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "LA", "F"])
def test_images_of_any_mode_read_alike(mode: str, tmp_path: Path) -> None:
    ink = np.zeros((8, 8), dtype=np.float32)
    ink[2:6, 3:5] = 1.0
    light = ((1 - ink) * 255).astype(np.uint8).repeat(5, 0).repeat(5, 1)
    if mode == "I;16":
        picture = Image.fromarray(light.astype(np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray(light.astype(np.float32))
    else:
        picture = Image.fromarray(light).convert(mode)
    path = tmp_path / ("x.tiff" if mode == "F" else "x.png")
    picture.save(path)
    np.testing.assert_allclose(read_gray(path, 8), ink, atol=0.02)
    np.testing.assert_allclose(read_gray(path, 8, invert=False), 1 - ink, atol=0.02)


def test_transparent_and_oblong_images(tmp_path: Path) -> None:
    rgba = np.zeros((16, 8, 4), dtype=np.uint8)
    rgba[4:12, 2:6] = [0, 0, 0, 255]  # the rest is transparent, so paper
    Image.fromarray(rgba).save(tmp_path / "x.png")
    ink = np.zeros((8, 8), dtype=np.float32)
    ink[2:6, 3:5] = 1.0
    np.testing.assert_allclose(read_gray(tmp_path / "x.png", 8), ink, atol=1e-6)


def test_train_resume_and_use(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    arguments = ("train", "digits", "--tokenizer-steps", 3, "--steps", 2, "--seed", 4, "--out", out)
    result = run(*arguments, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(out)]
    names = ["w.safetensors", "w.tokenizer.safetensors", "w.transformer.safetensors"]
    assert files_in(tmp_path) == names
    before = out.read_bytes()
    assert run(*arguments, "--quiet", "--resume").exit_code == 0
    assert len(out.read_bytes()) == len(before)
    split = tmp_path / "split.safetensors"
    result = run(
        *("train", "transformer", "--tokenizer", tmp_path / names[1], "--tokenizer-steps", 3),
        *("--steps", 2, "--seed", 4, "--out", split, "--quiet"),
    )
    assert result.exit_code == 0, result.output
    from maskgit.checkpoint import digest_of, load_checkpoint

    tensors = [load_checkpoint(path, kind="weights").tensors for path in (out, split)]
    assert digest_of(tensors[0]) == digest_of(tensors[1])
    picture = tmp_path / "x.png"
    result = run("generate", "--weights", out, "--per-class", 1, "--out", picture)
    assert result.exit_code == 0
    assert picture.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--steps", "0"], "--steps"),
        (["digits", "--threads", "0"], "--threads"),
        (["digits", "--seed", "-1"], "--seed"),
        (["tokenizer", "--preset", "mnist"], "--preset: expected digits, got 'mnist'"),
        (["tokenizer", "--preset", "maskgit-paper"], "--preset: no data for 'maskgit-paper'"),
        (["transformer", "--tokenizer", "nowhere"], "nowhere: no such file"),
    ],
)
def test_train_errors(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("train", *arguments, "--out", tmp_path / "w")
    assert result.exit_code == 2
    assert message in result.stderr
    assert files_in(tmp_path) == []


def test_evaluate_table_and_json() -> None:
    table = run("evaluate", "--steps", "1,2", "--per-class", 3)
    assert table.exit_code == 0, table.output
    for text in ("real", "1 step", "2 steps", "precision", "CAS"):
        assert text in table.stdout
    report = run("evaluate", "--steps", "2", "--per-class", 3, "--json")
    rows = json.loads(report.stdout)["rows"]
    assert [row["name"] for row in rows] == ["real", "2 steps"]
    for steps in ("0", "1,", "1,x", "99"):
        assert run("evaluate", "--steps", steps).exit_code == 2


def test_no_traceback_and_nothing_heavy_at_import(tmp_path: Path) -> None:
    code = (
        "import sys, maskgit.cli.main; from maskgit.__main__ import main; "
        "heavy = {'torch', 'sklearn', 'PIL', 'jax'} & set(sys.modules); "
        "assert not heavy, heavy; sys.argv = ['maskgit', 'generate', '--classes', 'q']; "
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "--classes" in result.stderr
    assert files_in(tmp_path) == []


def test_env_prints_json_and_table() -> None:
    report = json.loads(run("env", "--json").stdout)
    assert isinstance(report, dict)
    table = run("env")
    assert table.exit_code == 0
    assert all(str(key) in table.stdout for key in report)


def test_missing_benchmarks_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "maskgit.benchmarks.cli", None)
    result = run("bench", "decode-step")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the benchmarks are not available here")
    assert len(result.stderr.splitlines()) == 1


def test_version_and_presets() -> None:
    assert run("--version").stdout == f"{maskgit.__version__}\n"
    listed = json.loads(run("presets", "--json").stdout)
    assert list(listed) == list(maskgit.StepRule.presets())
    assert all(f"\n{name} " in run("presets").stdout for name in listed)


WRONG = [
    ["generate", "--weights", "nowhere"], ["generate", "--out", "no/x.png"], ["generate", "--rule", "x"],
    ["edit", "nowhere.png", "--outpaint", "left"], ["edit", "test:0", "--outpaint", "lefft"],
    ["evaluate", "--backend", "x"], ["train", "digits", "--out", "no/w"],
    ["train", "transformer", "--tokenizer", "nowhere", "--out", "w"],
    ["audit", "--logits", "nowhere.npy", "--rule", "llada"],
    ["audit", "--logits", "nowhere.npy", "--rule", "x"], ["bench", "decode-step", "--shape", "x"],
    ["bench", "decode-step", "--backend", "x"], ["bench", "decode-step", "--out", "no/x.json"],
    ["bench", "nothing"], ["profile", "--target", "x"], ["profile", "--shape", "x"],
    ["profile", "--width", "0"], ["nothing"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_argument_is_two_everywhere(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error:")]) == 1
    assert files_in(tmp_path) == []


def test_help_of_every_command() -> None:
    for command in ([], ["generate"], ["edit"], ["train"], ["train", "digits"], ["evaluate"]):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.stdout

"""The `maskgit train` and `maskgit evaluate` commands."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from maskgit.cli import options as common
from maskgit.report import tables

train_app = typer.Typer(
    help="Train the tokenizer, the transformer, or both.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DATA_NOTE = (
    "Trained on the handwritten digits of scikit-learn (UCI Optical Recognition of Handwritten "
    "Digits, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0); every fifth image of each class held out."
)

PresetOption = Annotated[str, typer.Option(help="What to train; only digits has data here.")]
TrainSeed = Annotated[
    int, typer.Option("--seed", parser=common.whole, metavar="N", help="Same seed, same weights.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the training state, if any.")]
Every = Annotated[
    int,
    typer.Option(
        parser=common.whole, metavar="N", help="Steps between writes of the training state."
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        parser=common.whole,
        metavar="N",
        help="CPU threads; the last bits of the weights depend on it.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
TokenizerSteps = Annotated[
    int | None,
    typer.Option(parser=common.whole, metavar="N", help="Override the preset's steps, stage 1."),
]
TransformerSteps = Annotated[
    int | None,
    typer.Option(parser=common.whole, metavar="N", help="Override the preset's steps, stage 2."),
]


@train_app.command("tokenizer")
@common.user_errors
def train_tokenizer(
    out: Annotated[Path, typer.Option(help="Training state to write; input of stage 2.")],
    preset: PresetOption = "digits",
    seed: TrainSeed = 0,
    steps: TokenizerSteps = None,
    resume: Resume = False,
    checkpoint_every: Every = 500,
    threads: Threads = 1,
    quiet: Quiet = False,
) -> None:
    """Stage 1: train the VQ tokenizer."""
    config = _prepare(preset, seed, threads, checkpoint_every, steps, None)
    common.check_out("--out", out)
    _fit_tokenizer(config, seed, out, resume, checkpoint_every, quiet)
    typer.echo(out)


@train_app.command("transformer")
@common.user_errors
def train_transformer(
    tokenizer: Annotated[Path, typer.Option(help="What `train tokenizer` wrote.")],
    out: Annotated[Path, typer.Option(help="Weights file to write.")],
    preset: PresetOption = "digits",
    seed: TrainSeed = 0,
    steps: TransformerSteps = None,
    tokenizer_steps: TokenizerSteps = None,
    resume: Resume = False,
    checkpoint_every: Every = 500,
    threads: Threads = 1,
    quiet: Quiet = False,
) -> None:
    """Stage 2: train the transformer on a tokenizer's tokens; writes weights for use.

    The training state is kept beside OUT, as OUT's stem + .transformer.safetensors.
    """
    config = _prepare(preset, seed, threads, checkpoint_every, tokenizer_steps, steps)
    common.check_out("--out", out)
    from maskgit.training.data.digits import load_split
    from maskgit.training.loop import averaged_model, load_state
    from maskgit.training.tasks import TokenizerTask

    task = TokenizerTask(config, load_split()[0])
    trained = averaged_model(task, load_state(tokenizer, task))
    _fit_transformer(config, trained, seed, out, resume, checkpoint_every, quiet)
    typer.echo(out)


@train_app.command("digits")
@common.user_errors
def train_digits(
    out: Annotated[Path, typer.Option(help="Weights file to write.")],
    seed: TrainSeed = 0,
    tokenizer_steps: TokenizerSteps = None,
    steps: TransformerSteps = None,
    resume: Resume = False,
    checkpoint_every: Every = 500,
    threads: Threads = 1,
    quiet: Quiet = False,
) -> None:
    """Both stages of the digits preset; this is how the shipped weights were made.

    Training states are kept beside OUT (.tokenizer.safetensors, .transformer.safetensors).
    """
    config = _prepare("digits", seed, threads, checkpoint_every, tokenizer_steps, steps)
    common.check_out("--out", out)
    trained = _fit_tokenizer(
        config, seed, _state_path(out, "tokenizer"), resume, checkpoint_every, quiet
    )
    _fit_transformer(config, trained, seed, out, resume, checkpoint_every, quiet)
    typer.echo(out)


def _prepare(
    name: str,
    seed: int,
    threads: int,
    checkpoint_every: int,
    tokenizer_steps: int | None,
    transformer_steps: int | None,
) -> Any:
    """Check the shared options, set the thread count, and return the configuration."""
    from maskgit.pipelines.recipes import PRESETS, preset

    if name not in PRESETS:
        raise common.bad("--preset", f"expected digits, got {name!r}")
    if name != "digits":
        raise common.bad("--preset", f"no data for {name!r} comes with this package; use digits")
    common.check_range("--seed", seed, 0, 2**32 - 1)
    common.check_range("--threads", threads, 1, 1024)
    common.check_range("--checkpoint-every", checkpoint_every, 1)
    common.check_range("--tokenizer-steps", tokenizer_steps, 1, 10_000_000)
    common.check_range("--steps", transformer_steps, 1, 10_000_000)
    import torch

    torch.set_num_threads(threads)
    config = preset(name)
    for field, steps in (
        ("tokenizer_training", tokenizer_steps),
        ("transformer_training", transformer_steps),
    ):
        if steps is not None:
            changed = dataclasses.replace(getattr(config, field), steps=steps)
            config = dataclasses.replace(config, **{field: changed})
    return config


def _fit_tokenizer(
    config: Any, seed: int, state: Path, resume: bool, every: int, quiet: bool
) -> Any:
    from maskgit.training.data.digits import load_split
    from maskgit.training.loop import fit
    from maskgit.training.tasks import TokenizerTask

    started = time.perf_counter()
    task = TokenizerTask(config, load_split()[0])
    model = fit(task, seed, state, resume=resume, checkpoint_every=every, progress=not quiet)
    common.log.print(f"tokenizer: {time.perf_counter() - started:.0f} s, state in {state}")
    return model


def _fit_transformer(
    config: Any, tokenizer: Any, seed: int, out: Path, resume: bool, every: int, quiet: bool
) -> None:
    import torch

    from maskgit.pipelines.weights import save_weights
    from maskgit.training.data.digits import load_split
    from maskgit.training.loop import fit
    from maskgit.training.tasks import TransformerTask

    started = time.perf_counter()
    task = TransformerTask(config, tokenizer, load_split()[0])
    state = _state_path(out, "transformer")
    model = fit(task, seed, state, resume=resume, checkpoint_every=every, progress=not quiet)
    info = {
        "command": shlex.join(["maskgit", *sys.argv[1:]]),
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "license": "Apache-2.0",
        "data": DATA_NOTE,
    }
    save_weights(out, config, tokenizer, model, info=info)
    common.log.print(f"transformer: {time.perf_counter() - started:.0f} s, state in {state}")


def _state_path(out: Path, stage: str) -> Path:
    return out.with_name(f"{out.stem}.{stage}.safetensors")


@common.user_errors
def evaluate(
    steps: Annotated[str, typer.Option(help='Numbers of steps to compare, such as "1,8".')] = "1,8",
    per_class: Annotated[
        int, typer.Option(parser=common.whole, metavar="N", help="Generated images of each class.")
    ] = 100,
    seed: common.SeedOption = 0,
    rule: common.RuleOption = None,
    backend: common.BackendOption = "auto",
    choice_temperature: common.ChoiceOption = None,
    sample_temperature: common.SampleOption = None,
    guidance: common.GuidanceOption = None,
    order: common.OrderOption = "confidence",
    finish: common.FinishOption = False,
    weights: common.WeightsOption = "digits",
    as_json: common.JsonOption = False,
) -> None:
    """Score generated digits by number of steps, against real ones held out from training."""
    common.check_range("--per-class", per_class, 2, 1000)
    common.check_sampling(
        rule, backend, choice_temperature, sample_temperature, guidance, seed, order
    )
    from maskgit.evaluation import metrics
    from maskgit.pipelines.images import load

    pipeline = load(weights)
    wanted = common.parse_steps(steps, pipeline.weights.config.transformer.num_tokens)
    report = metrics.evaluate(
        pipeline,
        wanted,
        per_class=per_class,
        seed=seed,
        rule=rule,
        backend=backend,
        choice_temperature=choice_temperature,
        sample_temperature=sample_temperature,
        guidance_scale=guidance,
        order=order,
        finish=finish,
        progress=not as_json,
    )
    if as_json:
        common.print_json(report)
        return
    _print_scores(report)


def _print_scores(report: dict[str, Any]) -> None:
    rows = [
        (
            row["name"], f"{row['accuracy']:.1%}", f"{row['cas']:.1%}", f"{row['frechet']:.2f}",
            f"{row['precision']:.1%}", f"{row['recall']:.1%}",
        )
        for row in report["rows"]
    ]  # fmt: skip
    tables.show(
        ("images", "accuracy", "CAS", "Frechet", "precision", "recall"),
        rows,
        note=f"classifier on real test digits: {report['classifier_test_accuracy']:.1%}",
    )

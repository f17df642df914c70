"""The `maskgit generate` command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from maskgit.cli import options as common

STRIP_COLUMNS = 12


@common.user_errors
def generate(
    out: common.OutOption = Path("digits.png"),
    classes: Annotated[str, typer.Option(help='Such as "0-9" or "3,5".')] = "0-9",
    per_class: Annotated[
        int, typer.Option(parser=common.whole, metavar="N", help="Images of each class.")
    ] = 8,
    steps: Annotated[
        int | None,
        typer.Option(parser=common.whole, metavar="N", help="Decode steps. [default: 8]"),
    ] = None,
    strip: Annotated[
        Path | None, typer.Option(help="PNG of one image per class, refined step by step.")
    ] = None,
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
    """Generate images by class and write them as one labelled PNG grid."""
    common.check_range("--per-class", per_class, 1, 1000)
    common.check_sampling(
        rule, backend, choice_temperature, sample_temperature, guidance, seed, order
    )
    common.check_out("--out", out, ".png")
    common.check_out("--strip", strip, ".png")
    from maskgit.pipelines.images import load

    pipeline = load(weights)
    common.check_range("--steps", steps, 1, pipeline.weights.config.transformer.num_tokens)
    wanted = common.parse_classes(classes, pipeline.num_classes)
    started = time.perf_counter()
    result = pipeline.generate_tokens(
        [c for c in wanted for _ in range(per_class)],
        num_steps=steps,
        seeds=seed,
        rule=rule,
        choice_temperature=choice_temperature,
        sample_temperature=sample_temperature,
        guidance_scale=guidance,
        order=order,
        finish=finish,
        backend=backend,
        record=strip is not None,
        progress=not as_json,
    )
    seconds = time.perf_counter() - started
    written = [_write_grid(pipeline, result.tokens, wanted, per_class, out)]
    if strip is not None:
        written.append(_write_strip(pipeline, result, wanted, per_class, strip))
    if as_json:
        common.print_json(
            {
                "files": [str(path) for path in written],
                "classes": wanted,
                "per_class": per_class,
                "steps": steps or pipeline.config.num_steps,
                "seed": seed,
                "seconds": round(seconds, 3),
            }
        )
        return
    common.log.print(f"{len(result.tokens)} images in {seconds:.2f} s")
    for path in written:
        typer.echo(path)


def _write_grid(pipeline: Any, tokens: Any, classes: list[int], per_class: int, out: Path) -> Path:
    from maskgit.report import pictures

    pixels = pipeline.decode(tokens)[:, 0].numpy()
    rows = [list(pixels[i * per_class : (i + 1) * per_class]) for i in range(len(classes))]
    return pictures.save_png(pictures.grid(rows, row_labels=[str(c) for c in classes]), out)


def _write_strip(pipeline: Any, result: Any, classes: list[int], per_class: int, out: Path) -> Path:
    """One row per class: all masked, then each step's kept tokens, then the final image."""
    import numpy as np

    from maskgit.report import pictures

    rows = list(range(0, len(classes) * per_class, per_class))
    candidates, kept = result.trajectory.candidate_tokens, result.trajectory.next_tokens
    steps, grid = len(kept), pipeline.weights.config.tokenizer.grid_size
    shown = _spread(steps - 1, STRIP_COLUMNS - 2)
    tiles: list[list[Any]] = []
    masks: list[list[Any]] = []
    for row in rows:
        final = pipeline.decode(result.tokens[row : row + 1])[0, 0].numpy()
        hidden = [np.ones((grid, grid), dtype=bool)]
        hidden += [
            (kept[t][row] == pipeline.mask_token_id).numpy().reshape(grid, grid) for t in shown
        ]
        pixels = [pipeline.decode(candidates[t][row : row + 1])[0, 0].numpy() for t in shown]
        tiles.append([final, *pixels, final])
        masks.append([*hidden, None])
    picture = pictures.grid(
        tiles,
        masked=masks,
        row_labels=[str(c) for c in classes],
        column_labels=["start", *(str(t + 1) for t in shown), str(steps)],
        scale=10,
    )
    return pictures.save_png(picture, out)


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of 0 .. count - 1, evenly spread."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})

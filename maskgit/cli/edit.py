"""The `maskgit edit` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from maskgit.cli import options as common


@common.user_errors
def edit(
    image: Annotated[
        str, typer.Argument(help="Image file, or test:N for the N-th held-out digit.")
    ],
    inpaint: Annotated[
        str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Redraw this box.")
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(metavar="HALF", help="Half to KEEP: left, right, top, bottom."),
    ] = None,
    swap_class: Annotated[
        int | None,
        typer.Option(parser=common.whole, metavar="CLASS", help="Redraw --box as this class."),
    ] = None,
    box: Annotated[
        str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="The box of --swap-class.")
    ] = None,
    class_id: Annotated[
        int | None,
        typer.Option(
            "--class",
            parser=common.whole,
            metavar="N",
            help="Class for --inpaint, --outpaint. [default: guessed]",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(parser=common.whole, metavar="N", help="How many alternatives to draw.")
    ] = 4,
    steps: Annotated[
        int | None,
        typer.Option(parser=common.whole, metavar="N", help="Decode steps. [default: 8]"),
    ] = None,
    invert: Annotated[
        bool | None,
        typer.Option("--dark-ink/--light-ink", help="Polarity. [default: by the border]"),
    ] = None,
    out: common.OutOption = Path("edit.png"),
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
    """Redraw part of an image; writes a PNG of before, mask, and the alternatives after.

    Boxes are in pixels of the model's image (8 x 8 for digits): x0 <= x < x1, y0 <= y < y1.
    """
    chosen = [inpaint is not None, outpaint is not None, swap_class is not None]
    if sum(chosen) != 1:
        raise _bad_choice(sum(chosen))
    if (swap_class is None) != (box is None):
        raise common.bad("--box", "expected together with --swap-class, and only with it")
    if swap_class is not None and class_id is not None:
        raise common.bad("--class", "expected only with --inpaint or --outpaint")
    common.check_range("--samples", samples, 1, 32)
    common.check_sampling(
        rule, backend, choice_temperature, sample_temperature, guidance, seed, order
    )
    common.check_out("--out", out, ".png")
    from maskgit.pipelines.images import load

    pipeline = load(weights)
    shape = pipeline.weights.config.transformer
    common.check_range("--steps", steps, 1, shape.num_tokens)
    common.check_range("--swap-class", swap_class, 0, shape.num_classes - 1)
    common.check_range("--class", class_id, 0, shape.num_classes - 1)
    masked = _region(pipeline, inpaint, outpaint, box)
    pixels = _read_pixels(pipeline, image, invert)
    from maskgit.pipelines.editing import edit as run_edit

    edits = run_edit(
        pipeline,
        pixels,
        masked,
        class_id if swap_class is None else swap_class,
        samples=samples,
        num_steps=steps,
        seeds=seed,
        rule=rule,
        choice_temperature=choice_temperature,
        sample_temperature=sample_temperature,
        guidance_scale=guidance,
        order=order,
        finish=finish,
        backend=backend,
    )
    path = _write_edit(edits, out)
    if as_json:
        common.print_json(
            {
                "file": str(path),
                "class": edits.class_id,
                "masked": masked.astype(int).tolist(),
                "tokens_before": edits.tokens_before.tolist(),
                "tokens_after": edits.tokens_after.tolist(),
            }
        )
        return
    guessed = " (guessed)" if class_id is None and swap_class is None else ""
    common.log.print(f"class {edits.class_id}{guessed}, {int(masked.sum())} tokens redrawn")
    typer.echo(path)


def _bad_choice(count: int) -> typer.BadParameter:
    """Usage error for none, or several, of the three kinds of edit."""
    return common.bad(
        "--inpaint / --outpaint / --swap-class", f"expected exactly one of the three, got {count}"
    )


def _region(pipeline: Any, inpaint: str | None, outpaint: str | None, box: str | None) -> Any:
    from maskgit.pipelines.editing import Box, EditError, box_mask, outpaint_mask

    config = pipeline.weights.config.tokenizer
    option = "--inpaint" if inpaint is not None else "--outpaint" if outpaint else "--box"
    try:
        if outpaint is not None:
            return outpaint_mask(config, outpaint)
        return box_mask(config, Box.parse(inpaint or box or "", option), option)
    except EditError as error:
        raise common.bad(option, str(error)) from error


def _read_pixels(pipeline: Any, image: str, invert: bool | None) -> Any:
    import torch

    from maskgit.report import pictures
    from maskgit.training.data.digits import load_split

    size = pipeline.weights.config.tokenizer.image_size
    if image.startswith("test:"):
        _, test = load_split()
        number = image.removeprefix("test:")
        if not number.isdigit() or int(number) >= len(test.labels):
            raise common.bad("IMAGE", f"expected test:0 to test:{len(test.labels) - 1}")
        return torch.from_numpy(test.images[int(number)])
    try:
        return torch.from_numpy(pictures.read_gray(image, size, invert=invert))[None]
    except pictures.ImageError as error:
        raise common.bad("IMAGE", str(error)) from error


def _write_edit(edits: Any, out: Path) -> Path:
    from maskgit.report import pictures

    before = edits.before[0].numpy()
    after = [pixels[0].numpy() for pixels in edits.after]
    picture = pictures.grid(
        [[before, before, *after]],
        masked=[[None, edits.masked, *(None for _ in after)]],
        column_labels=["before", "mask", *("after" for _ in after)],
        scale=12,
    )
    return pictures.save_png(picture, out)

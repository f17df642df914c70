"""What the commands share: options, parsing of arguments, one-line errors, output."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from maskgit.kernels.common.names import unknown

P = ParamSpec("P")
R = TypeVar("R")


def whole(text: str) -> int:
    """Parse a whole number, saying what was got."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"expected a whole number, got {text!r}") from None


def number(text: str) -> float:
    """Parse a number, saying what was got."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number, got {text!r}") from None


OutOption = Annotated[Path, typer.Option("--out", help="PNG file to write.")]
WeightsOption = Annotated[
    str, typer.Option("--weights", help="A preset with weights (digits), or a weights file.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", parser=whole, metavar="N", help="Same seed, same images.")
]
RuleOption = Annotated[
    str | None, typer.Option("--rule", help="Decode rule by preset name. [default: maskgit]")
]
BackendOption = Annotated[
    str, typer.Option("--backend", help="auto, or a backend by name (see `maskgit env`).")
]
ChoiceOption = Annotated[
    float | None,
    typer.Option(
        "--choice-temperature",
        parser=number,
        metavar="X",
        help="Randomness of which tokens are kept, >= 0.",
    ),
]
SampleOption = Annotated[
    float | None,
    typer.Option(
        "--sample-temperature", parser=number, metavar="X", help="Randomness of the tokens, >= 0."
    ),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance", parser=number, metavar="X", help="Guidance scale; 1 is none."),
]
OrderOption = Annotated[
    str,
    typer.Option(
        "--order", help="Of committing: confidence (as the rule says), random, raster, halton."
    ),
]
FinishOption = Annotated[
    bool, typer.Option("--finish", help="Commit at the last step what the rule leaves masked.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

MAX_SEED = 1 << 42  # as maskgit.pipelines.images, which is not imported here because it needs torch

# what the library raises for arguments; a file to be read that is missing among them
WRONG_ARGUMENTS = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError)

log = Console(stderr=True, highlight=False)


def user_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the library's errors into one line on stderr, and an exit code.

    2: the arguments cannot be right (a value, a name, an input file), as for what typer refuses.
    1: the work failed (memory, a full disk, a package that does not import).  130: Ctrl-C.
    Set MASKGIT_TRACEBACK=1 to see where one came from.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            typer.echo(f"Stopped. {stop}".strip(), err=True)
            raise typer.Exit(130) from None
        except (
            ValueError,
            TypeError,
            OSError,
            ImportError,
            ArithmeticError,
            MemoryError,
            RuntimeError,
        ) as error:
            if os.environ.get("MASKGIT_TRACEBACK") == "1" or _is_clicks(error) or is_lacking(error):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(2 if isinstance(error, WRONG_ARGUMENTS) else 1) from error

    return wrapped


def _is_clicks(error: BaseException) -> bool:
    """typer.Exit and Abort are RuntimeErrors that must pass."""
    return isinstance(error, typer.Exit | typer.Abort)


def is_lacking(error: BaseException) -> bool:
    """Whether a package is not installed: maskgit.__main__ says which extra has it."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return name is not None and name.partition(".")[0] != "maskgit"


def bad(option: str, message: str) -> typer.BadParameter:
    """A usage error (exit code 2) that names the option."""
    return typer.BadParameter(message, param_hint=option)


def check_out(option: str, path: Path | None, suffix: str = "") -> None:
    """Usage error unless a file of that suffix can be written at `path` (None is fine)."""
    from maskgit.files import check_writable

    if path is None:
        return
    if suffix and path.suffix and path.suffix.lower() != suffix:
        raise bad(option, f"expected a name that ends in {suffix}, got {str(path)!r}")
    try:
        check_writable(path, "path")
    except OSError as error:
        raise bad(option, str(error)) from error


def check_range(option: str, value: float | None, low: float, high: float = float("inf")) -> None:
    """Usage error unless low <= value <= high (None is fine; NaN and infinity are not)."""
    if value is None:
        return
    if not low <= value <= high or value == float("inf"):
        wanted = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
        raise bad(option, f"expected a number {wanted}, got {value:g}")


def check_sampling(
    rule: str | None,
    backend: str,
    choice_temperature: float | None,
    sample_temperature: float | None,
    guidance: float | None,
    seed: int,
    order: str,
) -> None:
    """Usage error for a sampling option that cannot work."""
    check_range("--choice-temperature", choice_temperature, 0)
    check_range("--sample-temperature", sample_temperature, 0)
    check_range("--guidance", guidance, 0)
    if not 0 <= seed < MAX_SEED:
        raise bad("--seed", f"expected 0 to {MAX_SEED - 1}, got {seed}")
    from maskgit import StepRule
    from maskgit.kernels.common.backends import check_able
    from maskgit.sampling.orders import ORDERS

    if order not in ORDERS:
        raise bad("--order", unknown("order", ORDERS, order).removeprefix("order: "))

    try:
        check_able(backend)
    except ValueError as error:
        raise bad("--backend", str(error).removeprefix("backend: ")) from error
    if rule is not None:
        try:
            StepRule.preset(rule)
        except (ValueError, KeyError) as error:
            raise bad("--rule", str(error.args[0] if error.args else error)) from error


def parse_classes(text: str, num_classes: int, option: str = "--classes") -> list[int]:
    """Read "0-9" or "3,5" or "0-2,7" into class ids, in the order given."""
    classes: list[int] = []
    for part in text.split(","):
        ends = [_whole(end, text, option) for end in part.strip().split("-", 1)]
        for value in ends:
            if value >= num_classes:
                raise bad(option, f"expected classes 0 to {num_classes - 1}, got {value}")
        if ends[-1] < ends[0]:
            raise bad(option, f"expected a rising range, got {part.strip()!r}")
        classes.extend(range(ends[0], ends[-1] + 1))
    return classes


def parse_steps(text: str, limit: int, option: str = "--steps") -> list[int]:
    """Read "1,8" into numbers of steps, each 1 .. limit."""
    steps = [_whole(part.strip(), text, option) for part in text.split(",")]
    for value in steps:
        check_range(option, value, 1, limit)
    return steps


def _whole(part: str, text: str, option: str) -> int:
    if not part.isascii() or not part.isdigit():
        raise bad(option, f"expected whole numbers such as 0-9 or 3,5; got {text!r}")
    return int(part)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, default=str))

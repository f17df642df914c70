"""Names that are wrong: what was expected, and what was probably meant."""

import pytest
from maskgit.kernels.common.names import unknown

from maskgit.pipelines import editing, recipes


def test_the_nearest_name_is_offered():
    assert unknown("x", ("alpha", "beta"), "Alpa") == (
        "x: expected alpha, beta, got 'Alpa' (did you mean 'alpha'?)"
    )
    for far in ("zzz", 3, None, ["alpha"]):
        assert unknown("x", ("alpha", "beta"), far) == f"x: expected alpha, beta, got {far!r}"


def test_it_is_offered_where_names_are_taken():
    for call, meant in (
        (lambda: recipes.preset("digit"), "digits"),
        (lambda: editing.outpaint_mask(recipes.preset("digits").tokenizer, "lef"), "left"),
    ):
        with pytest.raises(ValueError, match=rf"did you mean '{meant}'\?"):
            call()

"""The deliberate faults fit the tree: each line to be changed stands once, each test file is there."""

import pytest
from faults import FAULTS, ROOT


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_can_be_put_in(number):
    fault = FAULTS[number]
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    files = [word for word in fault.tests.split() if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)

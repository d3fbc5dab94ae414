"""Library notebooks and tutorials pass as tests, each in a process of its own."""
import pytest
from conftest import REPO

NOTEBOOKS = sorted(p.relative_to(REPO / "nbs").as_posix() for p in [*(REPO / "nbs").glob("*.ipynb"), *(REPO / "nbs" / "tutorials").glob("*.ipynb")])


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, notebooks):
    result = notebooks[notebook].result()
    assert result.returncode == 0, (result.stderr or result.stdout)[-4000:]

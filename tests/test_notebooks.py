"""Library notebooks and tutorials pass as tests, each in a process of its own and in a copy of the repository."""
import subprocess
import sys

import pytest
from conftest import REPO, Project

NOTEBOOKS = sorted(p.relative_to(REPO / "nbs").as_posix() for p in [*(REPO / "nbs").glob("*.ipynb"), *(REPO / "nbs" / "tutorials").glob("*.ipynb")])
TEST = "import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], skip_flags=['slow'], basepath=sys.argv[2], cell_timeout=300)[0])"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return Project.make(tmp_path_factory.mktemp("notebooks") / "project", all_notebooks=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, repository):
    env = {k: v for k, v in repository.env().items() if k not in ("FEDGAL_ROOT", "FEDGAL_ARTIFACTS", "FEDGAL_REPORTS")}
    done = subprocess.run([sys.executable, "-c", TEST, str(repository.home / "nbs" / notebook), str(repository.home)], cwd=repository.home, env=env,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stderr or done.stdout)[-4000:]

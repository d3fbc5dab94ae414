"""Library notebooks and tutorials pass as tests, each in a process of its own and in a copy of the repository."""
import multiprocessing
import os
import sys
import traceback

import pytest
from conftest import REPO, Project

ELSEWHERE = ("stages", "benchmarks")
NOTEBOOKS = [p.relative_to(REPO / "nbs") for p in sorted((REPO / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
NOTEBOOKS = [p.as_posix() for p in NOTEBOOKS if p.parts[0] not in ELSEWHERE]
SLOW_TO_IMPORT = ["torch", "pandas", "seaborn", "matplotlib.pyplot", "scipy.stats", "sklearn.datasets", "hypothesis", "nbdev.test", "IPython.display"]


def run_notebook(notebook, home, env, log):
    "Everything a fresh interpreter would do, but with the libraries that fedgal rests on already imported."
    with open(log, "w", buffering=1) as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        os.environ.clear(), os.environ.update(env), os.chdir(home)
        sys.path.insert(0, str(home))
        assert "fedgal" not in sys.modules
        from nbdev.test import test_nb
        try: passed = test_nb(str(home / "nbs" / notebook), skip_flags=["slow"], basepath=str(home), cell_timeout=300)[0]
        except BaseException: traceback.print_exc(); passed = False
        sys.stdout.flush()
        os._exit(not passed)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return Project.make(tmp_path_factory.mktemp("notebooks") / "project", all_notebooks=True)


@pytest.fixture(scope="module")
def warm():
    "Processes that start from one which has the libraries in memory: seconds less for each notebook."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_TO_IMPORT)
    return context


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook, repository, warm, tmp_path):
    env = {k: v for k, v in repository.env().items() if k not in ("FEDGAL_ROOT", "FEDGAL_ARTIFACTS", "FEDGAL_REPORTS")}
    process = warm.Process(target=run_notebook, args=(notebook, repository.home, env, tmp_path / "log"))
    process.start()
    process.join(900)
    if process.is_alive(): process.kill()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-4000:]

"""The installed wheel works where there is no checkout: a project is made, an experiment runs, its results open again."""
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import JUNK, REPO, TINY, data_root

pytestmark = pytest.mark.slow
CARRIED = ("fedgal", "nbs/stages", "params", "pyproject.toml", "setup.py", "settings.ini", "README.md", "LICENSE")


def call(*command, cwd, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FEDGAL_", "PYTHON", "JPY_"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, with the setuptools that are here."
    source = tmp_path_factory.mktemp("source")
    for name in CARRIED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy2
        copy(REPO / name, source / name, **({"ignore": JUNK} if copy is shutil.copytree else {}))
    pytest.importorskip("setuptools", "77")
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    name = call(sys.executable, "-c", build, source / "dist", cwd=source).split()[-1]
    return source / "dist" / name


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "An environment that has the wheel, and what it depends on from the environment of the tests."
    home = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    site = next(home.glob("lib*/python*/site-packages"))
    with zipfile.ZipFile(wheel) as file: file.extractall(site)
    (home / "share").symlink_to(Path(sys.prefix, "share"))      # templates of nbconvert and kernels of Jupyter
    (site / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")     # a path in a .pth: hooks in there are not followed
    return home / "bin" / "python"


def test_the_wheel_carries_a_project(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fedgal/project/settings.ini", "fedgal/project/nbs/stages/20_train.ipynb", "fedgal/project/params/quickstart.yaml"} <= set(names)
    assert any(n.startswith("fedgal/report/assets/") for n in names)


def test_a_project_of_the_wheel_runs(python, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    fedgal = [python, "-m", "fedgal.cli"]
    where = call(python, "-c", "import fedgal; print(fedgal.__file__)", cwd=away).strip()
    assert where.startswith(str(python.parents[1])), "the wheel's own library"
    assert "holds" not in call(*fedgal, "init", "mine", cwd=away)
    home = away / "mine"
    short = {n: TINY[n] for n in ("title", "seed", "dataset", "imbalance", "n_clients")} | {"stages": TINY["stages"][:2], "rounds": 1}
    (home / "params" / "short.yaml").write_text(str(short))
    assert "2 stage runs" in call(*fedgal, "run", "short", "--dry-run", cwd=home)
    printed = call(*fedgal, "run", "short", cwd=home, FEDGAL_DATA_ROOT=str(data_root()))
    assert "runs/short/index.html" in printed and (home / "runs" / "short" / "index.html").is_file()
    script = "import fedgal; e = fedgal.open('short'); print(e.params['rounds'], type(e.model()).__name__)"
    assert call(python, "-c", script, cwd=home).split() == ["1", "SplitModel"]
    assert "finished" in call(*fedgal, "status", cwd=home) and "short" in call(*fedgal, "list", cwd=home)


def test_a_script_needs_no_project(python, tmp_path):
    script = """
import fedgal
data = fedgal.load_dataset("digits")
split = fedgal.make_split(data, imbalance=10, n_clients=3, alpha=1.0, seed=0)
run = fedgal.train(data, split, rounds=1, local_epochs=1)
print(len(run.clients))
"""
    assert call(python, "-c", script, cwd=tmp_path).split() == ["3"]

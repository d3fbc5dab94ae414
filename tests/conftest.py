"""Every test works in a project of its own; the repository is never written to."""
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

REPO = Path(__file__).resolve().parents[1]
CHAIN = ["10_data", "20_train", "30_statistics", "40_generator", "50_finetune", "60_evaluate"]
TINY = {"title": "Tiny", "stages": CHAIN, "seed": 0, "dataset": "digits", "imbalance": 10, "n_clients": 4, "rounds": 2, "generator": "mlp",
        "gen_steps": 20, "bank_per_class": 30, "rff_dim": 64, "finetune_rounds": 2, "finetune_steps": 4, "oracle_per_class": 30}
JUNK = shutil.ignore_patterns("kernel-ipc*", "__pycache__", ".ipynb_checkpoints", ".hypothesis", "llms.txt")


# what most processes of the tests import beyond the libraries of a kernel, and none of fedgal
LIBRARIES = ["nbformat", "nbconvert", "papermill", "jupyter_client", "psutil", "filelock", "nbdev.test", "hypothesis"]
os.environ.setdefault("OMP_NUM_THREADS", "1")     # the libraries read it when they are imported


@functools.cache
def warm():
    "Processes that start from one which has the libraries in memory: seconds less for each."
    # here, since the processes import this file and must find their own copy of fedgal
    from fedgal.pipeline.preload import LIBRARIES as OF_KERNELS

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*OF_KERNELS, *LIBRARIES])
    return context


def begin(env, cwd, out, err):
    "Make the process of `warm` one that a shell would have started: its environment, its folder, its output, its path."
    for number, file in ((1, out), (2, err)): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear(), os.environ.update(env), os.chdir(cwd)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
    assert not [m for m in sys.modules if m.split(".")[0] == "fedgal"]


def begin_fedgal(env, cwd, out, err):
    "`begin` for the command line; its kernels are forks of the process that this one is a fork of, not of one that has to import the libraries again."
    from multiprocessing import forkserver
    begin(env, cwd, out, err)
    forkserver._forkserver.ensure_running = lambda: None
    from fedgal.cli import main
    return main


def command_line(arguments, env, cwd, out, err):
    "`fedgal ...`"
    main = begin_fedgal(env, cwd, out, err)
    try: code = main(arguments)
    except SystemExit as error: code = error.code
    except BaseException: traceback.print_exc(); code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


def data_root() -> Path:
    "Where the parquet files are: the environment's or the default folder, as an absolute path."
    return (REPO / os.environ.get("FEDGAL_DATA_ROOT", "data")).resolve()


class Project:
    "A copy of what a run needs, with its own artifacts and reports, called from a folder that is not the project's."

    def __init__(self, home: Path):
        self.home, self.away = home, home.parent / f"{home.name}_away"
        self.artifacts, self.reports, self.stages = home / "artifacts", home / "reports", home / "nbs" / "stages"

    @classmethod
    def make(cls, home: Path, all_notebooks=False) -> "Project":
        for name in ("settings.ini", "pyproject.toml", "README.md"):
            home.mkdir(parents=True, exist_ok=True)
            if (REPO / name).exists(): shutil.copy2(REPO / name, home)
        for name in ("fedgal", "params", "nbs" if all_notebooks else "nbs/stages"): shutil.copytree(REPO / name, home / name, ignore=JUNK)
        if all_notebooks:   # those about figures check theirs with it
            (home / "tests").mkdir()
            shutil.copy2(REPO / "tests" / "figures.py", home / "tests")
        project = cls(home)
        project.away.mkdir()
        project.write("tiny", TINY)
        return project

    def clone(self, home: Path) -> "Project":
        "The same project with the same results, elsewhere."
        shutil.copytree(self.home, home, symlinks=True, ignore=JUNK)
        project = Project(home)
        project.away.mkdir()
        return project

    def write(self, name: str, values: dict | None = None, **changed) -> Path:
        "An experiment file; by default the tiny one with changes."
        path = self.home / "params" / f"{name}.yaml"
        values = {k: v for k, v in ((TINY if values is None else values) | changed).items() if v is not None}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    def env(self, **more) -> dict:
        base = {k: v for k, v in os.environ.items() if not k.startswith(("FEDGAL_", "JPY_", "PYTEST_"))}
        return base | {"FEDGAL_ROOT": str(self.home), "FEDGAL_ARTIFACTS": str(self.artifacts), "FEDGAL_REPORTS": str(self.reports),
                       "FEDGAL_DATA_ROOT": str(data_root()), "PYTHONPATH": str(self.home), "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in more.items()}

    def start(self, *args, env=(), **options) -> subprocess.Popen:
        "A command line of fedgal, not waited for."
        return subprocess.Popen([sys.executable, "-m", "fedgal.cli", *map(str, args)], cwd=self.away, env=self.env(**dict(env)), text=True,
                                stdout=options.pop("stdout", subprocess.PIPE), stderr=options.pop("stderr", subprocess.PIPE), **options)

    def fedgal(self, *args, env=(), **options) -> subprocess.CompletedProcess:
        "A command line of fedgal: its exit code and what it printed. One with options of its own starts from nothing."
        if options:
            process = self.start(*args, env=env, **options)
            try: out, err = process.communicate(timeout=400)
            finally: process.kill()
            return subprocess.CompletedProcess(args, process.returncode, out, err)
        process, files = self.fork(command_line, list(map(str, args)), env=env)
        process.join(400)
        if process.is_alive(): process.kill()
        process.join()
        return subprocess.CompletedProcess(args, process.exitcode, *(file.read_text() for file in files))

    def fork(self, function, value, env=()):
        "A fork of `warm` that runs a function such as `command_line`, not waited for; and the files of what it prints."
        files = [Path(tempfile.mkstemp(name, "fedgal-", self.home.parent)[1]) for name in ("out", "err")]
        process = warm().Process(target=function, args=(value, self.env(**dict(env)), self.away, *files))
        process.start()
        return process, files

    def json(self, path: str): return json.loads((self.reports / path).read_text(encoding="utf-8"))

    def folders(self, stage="*") -> list[Path]:
        "The finished artifacts."
        return sorted(p.parent for p in self.artifacts.glob(f"{stage}/*/manifest.json"))

    def parts(self, stage="*") -> list[Path]:
        "The finished parts of stages: arms and generators."
        return sorted(p.parent for p in self.artifacts.glob(f"{stage}/parts/*/manifest.json"))

    def snapshot(self, stage="*") -> dict:
        "Every file of every finished artifact and part, by content."
        folders = self.folders(stage) + self.parts(stage)
        return {f.relative_to(self.artifacts).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
                for folder in folders for f in sorted(folder.rglob("*")) if f.is_file()}

    def results(self) -> dict:
        "Artifacts and published metrics: what a failure must not touch."
        metrics = {p.relative_to(self.reports).as_posix(): p.read_bytes() for p in self.reports.rglob("metrics.json")}
        return self.snapshot() | metrics


def ran(result, stage="") -> int:
    "How many stage runs of a `fedgal run` were computed, not cached."
    return sum(line.split()[:2][1:] == ["ran"] and line.startswith(stage) for line in result.stdout.splitlines() if line[:1] != " ")


def kernels_begin_with(source: str, folder: Path) -> dict:
    "Environment of a run whose kernels, and nothing else, first execute this: a startup file of IPython."
    startup = folder / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "fault.py").write_text(source)
    return {"IPYTHONDIR": folder}


# --- the order of tests ---

def pytest_collection_modifyitems(items):
    "Notebooks last: one at a time they fill what the other files leave of the processes."
    items.sort(key=lambda item: item.path.stem == "test_notebooks")


def pytest_xdist_make_scheduler(config, log):
    "A process takes a file of tests, or one notebook."
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith("test_notebooks.py") else file

    return Scheduling(config, log)


# --- projects ---

@pytest.fixture
def project(tmp_path) -> Project:
    "A project without results."
    return Project.make(tmp_path / "project")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A project in which the tiny experiment has run, once for all processes of the tests; only to be looked at."
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    home = base / "tiny" / "project"
    printed = home.parent / "printed.json"
    with FileLock(base / "tiny.lock"):
        if not home.exists():
            first = Project.make(home).fedgal("run", "tiny", "--jobs", 1)
            printed.write_text(json.dumps([first.args, first.returncode, first.stdout, first.stderr]))
    done = Project(home)
    done.first = subprocess.CompletedProcess(*json.loads(printed.read_text()))
    assert done.first.returncode == 0, done.first.stderr
    return done


@pytest.fixture
def copy(tiny, tmp_path) -> Project:
    "The finished tiny project, to be changed."
    return tiny.clone(tmp_path / "project")

"""A run that is killed again and again ends with the same bytes as one that never was."""
import json
import os
import random
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from conftest import CHAIN, kernels_begin_with, ran

KILLS = int(os.environ.get("FEDGAL_TEST_KILLS", 4))  # twelve and more when stages, locks or the store are changed


def kill(process, tree):
    "SIGKILL for the runner, and for its kernels too if `tree`; returns the kernels that were left alone."
    try: children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess: children = []
    process.kill()
    if tree:
        for child in children:
            try: child.kill()
            except psutil.NoSuchProcess: pass
    process.communicate()
    return [] if tree else children


@pytest.fixture
def orphans():
    "Kernels whose runner was killed; none outlives the test."
    left = []
    yield left
    for p in left:
        try: p.kill()
        except psutil.NoSuchProcess: pass


def settle(orphans):
    "Wait until the orphaned kernels are gone, by themselves."
    gone, alive = psutil.wait_procs(orphans, timeout=90)
    assert not alive, "a kernel without its runner goes on for ever"


@pytest.mark.slow
def test_killed_at_random_moments(project, tiny, orphans):
    want, stage_time = tiny.snapshot(), sum(tiny.json("tiny/metrics.json")["seconds"].values()) / len(CHAIN)
    moments, kills, completed = random.Random(2), 0, 0
    while kills < KILLS:
        process = project.start("run", "tiny", "--jobs", 1, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: code = process.wait(timeout=stage_time * moments.uniform(0.1, 1.2))
        except subprocess.TimeoutExpired:
            orphans += kill(process, tree=kills % 3 != 0)
            kills += 1
            assert project.snapshot().items() <= want.items(), f"after kill {kills}"
            continue
        assert code == 0 and project.snapshot() == want
        completed += 1
        settle(orphans)
        shutil.rmtree(project.artifacts), shutil.rmtree(project.reports)
    last = project.fedgal("run", "tiny", "--jobs", 1)
    assert last.returncode == 0, last.stderr
    settle(orphans)
    assert project.snapshot() == want, f"{completed} complete runs before"
    assert not list(project.artifacts.glob("*/*.partial")) and not list(project.artifacts.rglob("*.part"))
    published, uninterrupted = project.json("tiny/metrics.json"), tiny.json("tiny/metrics.json")
    assert published | {"seconds": 0} == uninterrupted | {"seconds": 0}


AT = """
def inject():
    import os, signal
    from fnmatch import fnmatch
    when, where = os.environ["KILL_AT"].split()
    real = os.replace
    def replace(a, b, **k):
        hit = fnmatch(str(b), "*/artifacts/20_train/" + where)
        if hit and when == "before": os.kill(os.getpid(), signal.SIGKILL)
        real(a, b, **k)
        if hit and when == "after": os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace
inject()
del inject
"""
MOMENTS = {"before a checkpoint counts": "before *.partial/checkpoint/round-*2", "among the results": "before *.partial/clients.safetensors",
           "before the commit": f"before {'[0-9a-f]' * 16}", "after the commit": f"after {'[0-9a-f]' * 16}"}


@pytest.fixture
def faults(tmp_path): return kernels_begin_with(AT, tmp_path / "faults")


def die(project, faults, moment):
    died = project.fedgal("run", "tiny", env=faults | {"KILL_AT": MOMENTS[moment]})
    assert died.returncode == 3 and "the kernel died" in died.stderr, f"{moment}: {died.stderr}{died.stdout}"


def test_a_kernel_killed_while_it_writes(copy, tiny, faults):
    shutil.rmtree(copy.artifacts / "20_train")
    die(copy, faults, "before a checkpoint counts")
    done = copy.fedgal("run", "tiny")
    assert done.returncode == 0, done.stderr
    assert copy.snapshot() == tiny.snapshot()


@pytest.mark.slow
def test_a_kernel_killed_again_each_time_a_little_later(copy, tiny, faults):
    shutil.rmtree(copy.artifacts / "20_train")
    for moment in ("among the results", "before the commit", "after the commit"): die(copy, faults, moment)
    done = copy.fedgal("run", "tiny")
    assert done.returncode == 0, done.stderr
    assert copy.snapshot() == tiny.snapshot()


@pytest.mark.slow
def test_an_interrupted_run_is_shown_as_interrupted(project):
    project.write("cut", {"stages": ["10_data"], "seed": 0})
    process = project.start("run", "cut")
    record, end = project.reports / "cut" / "run.json", time.monotonic() + 60
    while not record.exists() and time.monotonic() < end: time.sleep(0.01)
    kill(process, tree=True)
    assert json.loads(record.read_text())["status"] == "running", "nobody was left to say otherwise"
    status = project.fedgal("status")
    assert status.returncode == 0 and "interrupted" in status.stdout
    done = project.fedgal("run", "cut")
    assert done.returncode == 0 and ran(done) == 1 and "finished" in project.fedgal("status").stdout


@pytest.mark.slow
def test_a_polite_kill_ends_a_run_in_the_background(project):
    "A shell starts background jobs with SIGINT ignored; SIGTERM must end them all the same."
    project.write("cut", {"stages": ["10_data"], "seed": 0})
    process = project.start("run", "cut", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    record, end = project.reports / "cut" / "run.json", time.monotonic() + 60
    while not record.exists() and time.monotonic() < end: time.sleep(0.01)
    process.terminate()
    assert process.wait(30) == 130 and json.loads(record.read_text())["status"] == "interrupted"

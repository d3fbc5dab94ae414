"""The engine `workers` gives the bytes of `serial`, with any number of processes and whoever is killed."""
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid

import psutil
import pytest
import torch
from workers_case import NAMES, result, train

from fedgal.core.store import content_hash
from fedgal.federated.engines.workers import Workers, WorkersOptions

KILLS = int(os.environ.get("FEDGAL_TEST_KILLS", 3))  # ten and more when the engine is changed
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engines():
    "One engine for each number of processes, for all tests."
    crews = {n: Workers(WorkersOptions(processes=n)) for n in (1, 2, 3)}
    yield crews
    for engine in crews.values(): engine.close()


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_gives_the_bytes_of_serial(name, engines):
    torch.set_num_threads(1)
    want = result(name, "serial")
    assert {n: result(name, engine) == want for n, engine in engines.items()} == dict.fromkeys(engines, True)
    for n, engine in engines.items(): assert len(engine.crew.workers) == n


def strike(victim, struck):
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
        struck.append(victim)


def test_a_worker_killed_at_random_moments(engines):
    torch.set_num_threads(1)
    engine, moments, killed = engines[2], random.Random(1), 0
    want = result("scaffold", engine)  # starts the processes
    start = time.monotonic()
    assert result("scaffold", engine) == want == result("scaffold", "serial")
    seconds = time.monotonic() - start
    while killed < KILLS:
        alive = [w.process.pid for w in engine.crew.workers if w.process.is_alive()]
        victim = moments.choice(alive)
        struck = []
        timer = threading.Timer(seconds * moments.uniform(0.05, 0.8), strike, (victim, struck))
        timer.start()
        assert result("scaffold", engine) == want, f"after kill {killed}"
        timer.join()
        killed += len(struck)


def marked(mark):
    "The processes that descend from a run with this mark in its environment."
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get("FEDGAL_MARK") == mark and p.status() != psutil.STATUS_ZOMBIE: found.append(p)
        except (psutil.NoSuchProcess, psutil.AccessDenied): pass
    return found


def run(folder, mark, **more):
    env = os.environ | {"FEDGAL_MARK": mark, "PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-m", "workers_case", str(folder)], env=env, **more)


def printed(process):
    "The last line that it prints; long work prints its progress before."
    return process.communicate()[0].decode().splitlines()[-1]


def test_a_parent_killed_at_random_moments(tmp_path):
    torch.set_num_threads(1)
    want, moments, killed = content_hash(*train("scaffold", "serial")), random.Random(3), 0
    start = time.monotonic()
    assert printed(run(tmp_path / "whole", "whole", stdout=subprocess.PIPE)) == want
    seconds = time.monotonic() - start
    while killed < KILLS:
        folder, mark = tmp_path / str(killed), uuid.uuid4().hex
        process = run(folder, mark, stdout=subprocess.DEVNULL)
        try: process.wait(timeout=seconds * moments.uniform(0.3, 0.95))
        except subprocess.TimeoutExpired: pass
        process.kill()
        process.wait()
        killed += 1
        _, alive = psutil.wait_procs(marked(mark), timeout=30)
        assert not alive and not marked(mark), "a process outlives its parent"
        last = run(folder, mark, stdout=subprocess.PIPE)
        assert printed(last) == want, f"after kill {killed}"

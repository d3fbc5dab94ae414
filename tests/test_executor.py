"""Stages run in kernels of this machine or on Ray, and the folder of the runner stays what it was."""
import os
import sys
import threading
import time

import pytest
from conftest import begin_fedgal, command_line

SPLIT = {"title": "Split", "question": "Who has what?", "stages": ["10_data"], "dataset": "digits", "imbalance": 10, "n_clients": 4}


def sample(seen, over):
    while not over.is_set():
        seen.add(os.getcwd())
        time.sleep(0.001)


def while_it_runs(arguments, env, cwd, out, err):
    "A command line of fedgal, and the current folders that this process had meanwhile."
    main = begin_fedgal(env, cwd, out, err)
    seen, over = set(), threading.Event()
    watch = threading.Thread(target=sample, args=(seen, over))
    watch.start()
    try: code = main(arguments)
    finally: over.set()
    watch.join()
    for folder in sorted(seen): print("at", folder)
    sys.stdout.flush()
    os._exit(code)


def test_two_stages_at_once_do_not_move_the_runner_to_another_folder(project):
    project.write("two", SPLIT | {"sweep": {"seed": [0, 1, 2]}})
    process, files = project.fork(while_it_runs, ["run", "two", "--jobs", "2"])
    process.join(300)
    assert process.exitcode == 0, files[1].read_text()
    folders = [line for line in files[0].read_text().splitlines() if line.startswith("at ")]
    assert folders == [f"at {project.away}"], "papermill's folder is that of the whole process"
    assert len(project.folders("10_data")) == 3


def test_an_executor_that_is_not_there_is_one_line(project):
    project.write("one", SPLIT)
    done = project.fedgal("run", "one", env={"FEDGAL_EXECUTOR": "rey"})
    assert done.returncode == 2 and "setting executor = 'rey': allowed are local, ray" in done.stderr


@pytest.mark.slow
@pytest.mark.flower
def test_a_sweep_on_ray_gives_the_comparison_of_a_local_one(project):
    pytest.importorskip("ray")
    sweep = {"seed": [0, 1, 2, 3], "level": ["high", "low"]}
    stages = ["10_data", "20_train", "30_statistics", "40_generator", "50_finetune", "60_evaluate", "90_compare"]
    project.write("grid", stages=stages, sweep=sweep, seed=None, baseline="none", rounds=1)
    assert project.fedgal("run", "grid", "--jobs", "2").returncode == 0
    local = project.json("grid/comparison.json")
    others = project.clone(project.home.parent / "other")
    for path in others.artifacts.glob("*_*"): path.rename(path.with_name(f"old-{path.name}"))
    done = others.fedgal("run", "grid", "--jobs", "2", env={"FEDGAL_EXECUTOR": "ray"})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 8 and " cached" not in done.stdout
    assert others.json("grid/comparison.json") == local


@pytest.mark.slow
@pytest.mark.flower
def test_ctrl_c_ends_a_stage_on_ray_at_once(project):
    pytest.importorskip("ray")
    project.write("long", {**SPLIT, "stages": ["10_data", "20_train"], "rounds": 100_000})
    process, files = project.fork(command_line, ["run", "long"], env={"FEDGAL_EXECUTOR": "ray"})
    while not list(project.artifacts.glob("20_train/*.progress")): time.sleep(0.2); assert process.is_alive(), files[1].read_text()
    began = time.monotonic()
    os.kill(process.pid, 2)
    process.join(60)
    assert process.exitcode == 130 and time.monotonic() - began < 30, files[1].read_text()

"""Bad input, damaged files, a full disk, two runs at once: one line that says what to do, an exit code, and nothing lost."""
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from conftest import CHAIN, Project, begin_fedgal, command_line, kernels_begin_with, ran

BAD_PARAMETERS, FAILED, BUSY = 2, 3, 4


def one_line(result, code):
    "The error, after checking that it is a single line of the command itself and not a traceback."
    assert result.returncode == code, f"{result.returncode}: {result.stdout}\n{result.stderr}"
    first, *rest = [line for line in result.stderr.splitlines() if line and not line.startswith("[IPKernelApp]")]   # a kernel's farewell
    assert first.startswith("fedgal: ") and len(first) < 600
    assert rest == [] if code != FAILED else all(line.startswith(("executed so far: ", "finished stages are kept")) for line in rest), result.stderr
    return first


# --- what is wrong is seen before anything runs ---

JOINT = {"stages": [*CHAIN[:2], "25_joint", *CHAIN[2:]]}
FLOWER = find_spec("flwr_datasets") is not None
COMPARED = {"stages": [*CHAIN, "90_compare"]}
FORM = "two rows with ` > ` between them are needed"
REFUSED = {
    "unknown parameter": ({"imbalanse": 3}, ["'imbalanse'", "did you mean 'imbalance'", "10_data"]),
    "unknown stage": ({"stages": ["10_data", "20_trian"]}, ["'20_trian'", "did you mean '20_train'"]),
    "missing input": ({"stages": ["10_data", "30_statistics"]}, ["30_statistics needs 20_train"]),
    "no stages": ({"stages": []}, ["`stages:` must list"]),
    "a stage twice": ({"stages": ["10_data", "10_data", "20_train"]}, ["10_data is listed twice"]),
    "unknown data set": ({"dataset": "fashion_mnits"}, ["dataset = 'fashion_mnits'", "did you mean 'fashion_mnist'"]),
    "unknown generator": ({"generator": "gausian"}, ["generator = 'gausian'", "did you mean 'gaussian'"]),
    "unknown arm": ({"arms": ["none", "orakle"]}, ["'orakle'", "did you mean 'oracle'"]),
    "unknown algorithm": ({"algorithm": "fedprx"}, ["did you mean 'fedprox'"]),
    "no such file": ({"dataset": "absent.parquet"}, ["no such file", "absent.parquet"]),
    "text for a number": ({"n_clients": "many"}, ["n_clients = 'many'", "expected int"]),
    "number with a fraction": ({"rounds": 2.5}, ["rounds = 2.5", "expected int"]),
    "number for a truth value": ({"nesterov": 1}, ["nesterov = 1", "expected bool"]),
    "augmentation as it was switched on before": ({"augment": True}, ["augment = True", "augment: auto"]),
    "unknown augmentation": ({"augment": "sharpe"}, ["augment = 'sharpe'", "did you mean 'sharp'"]),
    "unknown option of an augmentation": ({"augment": "sharp", "augment_options": {"wrap": 0}}, ["augmentation sharp: unknown option 'wrap'", "did you mean 'warp'"]),
    "option of an augmentation out of bounds": ({"augment": "distort", "augment_options": {"degrees": -1}}, ["augmentation distort: option degrees = -1", "≥ 0"]),
    "options without an augmentation": ({"augment_options": {"degrees": 1}}, ["augmentation none: unknown option 'degrees'"]),
    "an audit without messages": ({"stages": [*CHAIN, "80_audit"]}, ["80_audit reads messages that were kept", "keep_messages: [1,"]),
    "messages of a round that is not run": ({"keep_messages": [99]}, ["keep_messages = [99]", "round 99"]),
    "messages that nobody sees": ({"keep_messages": [1], "postprocessors": [{"name": "sum_only"}]}, ["sum_only", "nobody sees a single message"]),
    "a budget of nothing": ({"stages": [*CHAIN, "80_audit"], "keep_messages": [1], "epsilons": [0.0]}, ["epsilons = [0.0]", "> 0"]),
    "a budget that does not last": ({"postprocessors": [{"name": "client_dp", "epsilon": 1.0}]},
                                    ["client_dp: privacy budget epsilon = 1 does not allow", "2 rounds need noise_multiplier >= "]),
    "a budget of records that does not last": ({"postprocessors": [{"name": "record_dp", "epsilon": 1.0}]}, ["record_dp: privacy budget", "noise_multiplier >= "]),
    "a bound of nothing": ({"postprocessors": [{"name": "local_noise", "clip": 0}]}, ["postprocessor local_noise: option clip = 0", "> 0"]),
    "an epsilon below nothing": ({"postprocessors": [{"name": "client_dp", "epsilon": -1}]}, ["postprocessor client_dp: option epsilon = -1", "> 0"]),
    "noise of nothing": ({"postprocessors": [{"name": "record_dp", "noise_multiplier": 0}]}, ["postprocessor record_dp: option noise_multiplier = 0", "> 0"]),
    "a bound that the next one breaks": ({"postprocessors": [{"name": "client_dp"}, {"name": "faults", "kinds": ["scale"]}]}, ["list faults before client_dp"]),
    "a count of too few clients": ({"postprocessors": [{"name": "client_dp", "quantile": 0.5}]}, ["with 4 clients a round", "noise_multiplier stays below 0.4"]),
    "an algorithm that noise does not cover": ({"algorithm": "scaffold", "postprocessors": [{"name": "client_dp"}]}, ["algorithm scaffold", "use fedavg or fedprox"]),
    "balanced sampling in private": ({"train_sampling": "balanced", "postprocessors": [{"name": "client_dp"}]}, ["train_sampling = plain"]),
    "a robust rule with too few clients": ({"aggregation": "krum", "aggregation_options": {"n_faulty": 2}}, ["aggregation krum needs 7 accepted updates", "asks 4 clients"]),
    "less than no faulty client": ({"aggregation": "median", "aggregation_options": {"n_faulty": -1}}, ["aggregation median: option n_faulty = -1", "≥ 0"]),
    "a cohort larger than a round": ({"postprocessors": [{"name": "sum_only", "min_cohort": 9}]}, ["postprocessor sum_only needs 9 accepted updates", "asks 4 clients"]),
    "a sum over one": ({"postprocessors": [{"name": "sum_only", "min_cohort": 1}]}, ["postprocessor sum_only: option min_cohort = 1", "≥ 2"]),
    "a rule that needs what is hidden": ({"aggregation": "median", "postprocessors": [{"name": "sum_only"}]}, ["sees sums alone", "median compares single updates"]),
    "more faulty clients than there are": ({"postprocessors": [{"name": "faults", "share": 1.5}]}, ["postprocessor faults: option share = 1.5", "≤ 1"]),
    "mirrored digits": ({"augment": "crop"}, ["augmentation crop mirrors images", "augment_options: {flip: false}", "augment: auto"]),
    "value for a list": ({"arms": "none"}, ["arms = 'none'", "expected list[str]"]),
    "not a number": ({"alpha": float("nan")}, ["alpha = nan", "expected float"]),
    "imbalance below 1": ({"imbalance": 0.5}, ["imbalance = 0.5", "≥ 1"]),
    "alpha 0": ({"alpha": 0}, ["alpha = 0", "> 0"]),
    "alpha negative": ({"alpha": -1}, ["alpha = -1", "> 0"]),
    "no client": ({"n_clients": 0}, ["n_clients = 0", "≥ 1"]),
    "no round": ({"rounds": 0}, ["rounds = 0", "≥ 1"]),
    "everything for validation": ({"val_fraction": 1.0}, ["val_fraction = 1.0", "< 1"]),
    "a split file that is not there": ({"split_file": "nothere.json", "imbalance": 1}, ["split_file = 'nothere.json'", "no such file", "nothere.json or "]),
    "a division by file without one": ({"partition": "file"}, ["partition 'file' needs the path of a split file"]),
    "unknown partitioner": ({"partition": "flwr:Dirichlt"}, ["'Dirichlt' (did you mean 'DirichletPartitioner'" if FLOWER else "fedgal[flower]"]),
    "unknown argument of a partitioner": ({"partition": "flwr:DirichletPartitioner", "partitioner": {"alfa": 1}},
                                          ["no argument 'alfa' (did you mean 'alpha'" if FLOWER else "fedgal[flower]"]),
    "no level": ({"levels": []}, ["levels = []", "at least one of low, high"]),
    "a level twice": ({"levels": ["low", "low"]}, ["levels = ['low', 'low']", "each once"]),
    "no arm": ({"arms": []}, ["arms = []", "with `none`"]),
    "no joint arm": (JOINT | {"joint_arms": []}, ["joint_arms = []", "`none` and `joint`"]),
    "more clients in a round than there are": ({"min_clients": 99}, ["min_clients = 99", "4 of n_clients = 4", "at most 4"]),
    "more clients in a round than take part": ({"min_clients": 3, "participation": 0.5}, ["min_clients = 3", "2 of n_clients = 4", "at most 2"]),
    "joint training of clients that stay alone": (JOINT | {"algorithm": "local"}, ["algorithm = 'local'", "one global model", "such as fedavg"]),
    "joint training of clients' own models": (JOINT | {"algorithm": "fedmps"}, ["algorithm = 'fedmps'", "one global model", "such as fedavg"]),
    "repairs of clients' own models": ({"algorithm": "fedmps", "arms": ["none", "lda", "ccvr"]}, ["arms lda, ccvr make one classifier", "fedmps leaves every client"]),
    "a server without a model": ({"algorithm": "local", "finetune_on": "server"}, ["finetune_on = 'server'", "local leaves every client", "'clients'"]),
    "a sweep with both": ({"finetune_on": "server", "sweep": {"algorithm": ["fedavg", "fedproto"]}}, ["finetune_on = 'server'", "fedproto leaves"]),
    "sweep without values": ({"sweep": {"level": []}}, ["sweep of level"]),
    "sweep that is no list": ({"sweep": {"level": "low"}}, ["sweep of level"]),
    "sweep of a fixed value": ({"sweep": {"seed": [1, 2]}}, ["'seed'", "fixed value and is swept"]),
    "unknown option of an algorithm": ({"algorithm": "fedgen", "algorithm_options": {"wieght": 1}}, ["algorithm fedgen: unknown option 'wieght'", "did you mean 'weight'"]),
    "text for an option": ({"algorithm": "fedgen", "algorithm_options": {"weight": "much"}}, ["algorithm fedgen: option weight = 'much'", "expected float"]),
    "unknown option of a generator": ({"generator_options": {"hiden": 3}}, ["generator mlp: unknown option 'hiden'", "did you mean 'hidden'"]),
    "text for an option of a generator": ({"generator_options": {"lr": "fast"}}, ["generator mlp: option lr = 'fast'", "expected float"]),
    "option of another generator": ({"generator": "gald", "generator_options": {"teachers_per_step": 2}}, ["generator gald: unknown option 'teachers_per_step'"]),
    "option out of bounds": ({"generator": "gald", "generator_options": {"rounds": 0}}, ["generator gald: option rounds = 0", "expected int", "≥ 1"]),
    "option in a sweep": ({"generator_options": None, "sweep": {"generator_options": [{}, {"lr": "fast"}]}}, ["generator mlp: option lr = 'fast'"]),
    "options that are no mapping": ({"generator_options": "lr"}, ["generator_options = 'lr'", "expected dict"]),
    "old name of an option": ({"gen_lr": 0.1}, ["'gen_lr' is an option of generator mlp now", "generator_options: {lr: ...}"]),
    "old name of a weight": ({"weight_teacher": 1.0}, ["'weight_teacher' is an option of generator mlp now", "generator_options: {alpha: ...}"]),
    "old name of an option of safs": ({"generator": "safs", "safs_steps": 3}, ["'safs_steps' is an option of generator safs now", "generator_options: {steps: ...}"]),
    "old name of a value": ({"shrink": "oas"}, ["shrink = 'oas'", "did you mean 'pooled_oas'"]),
    "arm without its statistics": ({"levels": ["low"], "level": "low", "arms": ["none", "lda"]}, ["arm lda", "level high"]),
    "generator without full moments": ({"moments": {"low": "diagonal"}, "level": "low", "generator": "mlp"}, ["generator mlp", "moments = {low: full}"]),
    "arm without full moments": ({"moments": {"high": "diagonal"}, "level": "low", "arms": ["none", "lda"]}, ["arm lda", "level high", "only the diagonal"]),
    "Fourier features without moments": ({"moments": {"high": "none"}}, ["rff_dim = 0"]),
    "baseline that nobody has": ({"seed": None, "sweep": {"seed": [0, 1]}, "stages": [*CHAIN, "90_compare"], "arms": ["none", "refit"], "baseline": "oracle"}, ["baseline 'oracle'", "arms: none, refit"]),
    "contest with an unknown arm": ({"stages": [*CHAIN, "90_compare"], "contests": ["generator > refitt"]}, ["'refitt'", "did you mean 'refit'"]),
    "contest with a value that nobody has": ({"stages": [*CHAIN, "90_compare"], "contests": ["generator level=hihg > none"]}, ["no member has level=hihg"]),
    "contest of three": (COMPARED | {"contests": ["none > refit > generator"]}, ["contests: 'none > refit > generator'", FORM]),
    "contest of one": (COMPARED | {"contests": ["generator"]}, ["contests: 'generator'", FORM]),
    "contest with an empty side": (COMPARED | {"contests": [" > gaussian"]}, ["contests: ' > gaussian'", FORM]),
    "contest with an old name": (COMPARED | {"contests": ["generator gen_lr=0.1 > none"]}, ["'gen_lr' is an option of generator mlp now", "generator_options: {lr: ...}"]),
    "sweep of an unknown value": ({"sweep": {"level": ["low", "hihg"]}}, ["did you mean 'high'"]),
}
TEXTS = {
    "not YAML": ("stages: [10_data\nseed: {", ["bad.yaml", "not YAML, line"]),
    "not a mapping": ("- 10_data\n- 20_train\n", ["bad.yaml", "name: value"]),
    "empty": ("", ["bad.yaml"]),
    "a key twice": ("stages: [10_data]\nseed: 1\nseed: 2\n", ["'seed'", "twice"]),
    "not text": (b"\xff\xfe\x00\x01", ["bad.yaml", "not YAML"]),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "One project for all input that must be refused."
    return Project.make(tmp_path_factory.mktemp("refused") / "project")


def refused(project, result):
    "What a command line said, after checking that it began nothing."
    message = one_line(result, BAD_PARAMETERS)
    assert not project.folders() and not list(project.reports.glob("*/run.json")), "nothing was begun"
    return message


def refuse(project, *args): return refused(project, project.fedgal(*args))


def command_lines(lines, env, cwd, out, err):
    "Command lines of fedgal, one after another in this process; it prints what came of them as JSON."
    main = begin_fedgal(env, cwd, out, err)
    def outcome(arguments):
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as told:
            try: code = main(arguments)
            except SystemExit as error: code = error.code
        return arguments, code, printed.getvalue(), told.getvalue()
    try: print(json.dumps([outcome(line) for line in lines]), flush=True)
    except BaseException: traceback.print_exc(); os._exit(1)
    os._exit(0)


def many(project, lines: dict) -> dict:
    "Command lines of fedgal, one after another in one process: name -> outcome."
    process, (out, err) = project.fork(command_lines, [list(map(str, line)) for line in lines.values()])
    process.join(400)
    assert process.exitcode == 0, err.read_text()
    return {name: subprocess.CompletedProcess(*outcome) for name, outcome in zip(lines, json.loads(out.read_text()), strict=True)}


@pytest.fixture(scope="module")
def refusals(shared):
    "The outcome of every experiment of `REFUSED` and `TEXTS`."
    paths = {case: shared.write(f"value{i}_bad", **changed) for i, (case, (changed, _)) in enumerate(REFUSED.items())}
    for i, (case, (text, _)) in enumerate(TEXTS.items()):
        paths[case] = shared.home / "params" / f"text{i}_bad.yaml"
        paths[case].write_bytes(text if isinstance(text, bytes) else text.encode())
    outcomes = many(shared, {case: ("run", path) for case, path in paths.items()})
    for path in paths.values(): path.unlink()
    return outcomes


@pytest.mark.parametrize("case", [*REFUSED, *TEXTS])
def test_what_is_wrong_is_refused(case, shared, refusals):
    message = refused(shared, refusals[case])
    assert all(w in message for w in (REFUSED | TEXTS)[case][1]), message


def test_a_parameter_of_a_stage_that_does_not_run(shared):
    shared.write("bad", {"title": "Only data", "stages": ["10_data"], "rounds": 3})
    message = refuse(shared, "run", "bad")
    assert "'rounds' belongs to stage 20_train" in message, message


def test_bad_overrides_are_refused(shared):
    lines = {"did you mean 'rounds'": ("run", "tiny", "-p", "round", "3"), "lr = 'fast'": ("run", "tiny", "-p", "lr", "fast"),
             "cannot be overridden": ("run", "tiny", "-p", "stages", "[10_data]"), "did you mean 'tiny'": ("run", "tny"),
             "option lr = 'fast'": ("run", "tiny", "-p", "generator_options", "{lr: fast}"), "--jobs": ("run", "tiny", "--jobs", "0")}
    for words, result in many(shared, lines).items(): assert words in refused(shared, result)


def test_a_misspelt_stage_is_refused(shared):
    assert "did you mean '20_train'" in refuse(shared, "params", "20_tran")


def test_the_command_line_ends_with_its_code(shared):
    "As the cases above, but as a process of its own."
    assert "did you mean 'rounds'" in refuse(shared, "run", "tiny", "-p", "round", "3")


def test_code_of_another_place_is_refused(shared, tmp_path):
    "Results would be filed under code that did not make them."
    other = Project.make(tmp_path / "other")
    message = refused(other, other.fedgal("run", "tiny", env={"PYTHONPATH": shared.home}))
    assert f"fedgal is imported from {shared.home / 'fedgal'}" in message and str(other.home / "fedgal") in message and "set FEDGAL_ROOT" in message


def test_named_data_that_cannot_be_had_are_refused(shared, tmp_path):
    "Before anything runs: which file, why, and the one command that fetches it."
    (tmp_path / "datasets.py").write_text("def load_dataset(*args, **options): raise ConnectionError('no network')")
    shared.write("absent", {"stages": ["10_data"], "dataset": "mnist"})
    env = {"FEDGAL_DATA_ROOT": tmp_path / "empty", "PYTHONPATH": f"{tmp_path}:{shared.home}"}
    message = refused(shared, shared.fedgal("run", "absent", env=env))
    assert all(w in message for w in ("mnist/train.parquet", "no such file", "no network", "fetch('mnist')")), message


def test_a_bad_setting_is_refused(shared):
    assert "engine = 'warp'" in one_line(shared.fedgal("run", "tiny", env={"FEDGAL_ENGINE": "warp"}), BAD_PARAMETERS)
    assert "threads = 'two'" in one_line(shared.fedgal("run", "tiny", env={"FEDGAL_THREADS": "two"}), BAD_PARAMETERS)


# --- what only the data can tell ---

OWN = """
import numpy as np
def gap():
    y = np.repeat([0, 1, 3], 40)
    return np.random.default_rng(0).normal(size=(120, 5)).astype("float32"), y
def crash(): raise KeyError("column")
"""


def bad_data(project):
    "The files and functions that `DATA` names."
    import pandas as pd
    (project.home / "own.py").write_text(OWN)
    frame = pd.DataFrame({"a": range(60), "b": range(60), "label": [i % 3 for i in range(60)]})
    frame.to_parquet(project.home / "whole.parquet")
    (project.home / "cut.parquet").write_bytes((project.home / "whole.parquet").read_bytes()[:700])
    (project.home / "foreign.parquet").write_text("a,b,label\n1,2,0\n")
    frame.drop(columns="label").to_parquet(project.home / "unlabelled.parquet")


DATA = {
    "more clients than samples": ({"n_clients": 5000, "min_size": 1}, ["n_clients = 5000", "must be between 1 and"]),
    "no sample of a class": ({"dataset": "own:gap"}, ["own:gap", "no example of class 2"]),
    "own function that fails": ({"dataset": "own:crash"}, ["own:crash", "KeyError"]),
    "own function that is not there": ({"dataset": "own:gone"}, ["own", "no function 'gone'"]),
    "file cut off": ({"dataset": "cut.parquet"}, ["cut.parquet"]),
    "file of another format": ({"dataset": "foreign.parquet"}, ["foreign.parquet"]),
    "file of another schema": ({"dataset": "unlabelled.parquet"}, ["unlabelled.parquet", "label"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "All cases that need the data stage, one after another in one process."
    project = Project.make(tmp_path_factory.mktemp("data") / "project")
    bad_data(project)
    for case, (changed, _) in DATA.items():
        project.write(case.replace(" ", "_"), {"stages": ["10_data"], "seed": 0, "imbalance": 1} | changed)
    return project, many(project, {case: ("run", case.replace(" ", "_")) for case in DATA})


@pytest.mark.slow
@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_told(case, outcomes):
    project, results = outcomes
    message = one_line(results[case], FAILED)
    assert message.startswith("fedgal: 10_data: ") and all(w in message for w in DATA[case][1]), message
    record = project.json(f"{case.replace(' ', '_')}/run.json")
    assert record["status"] == "failed" and record["failed_stage"] == "10_data"


@pytest.mark.slow
def test_a_file_that_is_mended_is_read(project):
    bad_data(project)
    project.write("own", {"stages": ["10_data"], "dataset": "cut.parquet", "n_clients": 3, "imbalance": 1, "min_size": 1})
    one_line(project.fedgal("run", "own"), FAILED)
    shutil.copy(project.home / "whole.parquet", project.home / "cut.parquet")
    done = project.fedgal("run", "own")
    assert done.returncode == 0, done.stderr
    assert project.json("own/run.json")["status"] == "finished"


# --- artifacts that were changed by hand ---

def shorten(path): path.write_bytes(path.read_bytes()[:-7])
def flip(path): path.write_bytes((b := path.read_bytes())[:-3] + bytes([b[-3] ^ 1]) + b[-2:])
def remove(path): path.unlink()


DAMAGE = [(flip, "model.safetensors", ["model.safetensors", "SHA-256"]), (shorten, "model.safetensors", ["model.safetensors", "bytes"]),
          (flip, "history.json", ["history.json"]), (remove, "ledger.json", ["ledger.json", "missing"]), (shorten, "manifest.json", ["manifest.json"])]


@pytest.mark.parametrize("damage, file, words", [DAMAGE[0], *(pytest.param(*d, marks=pytest.mark.slow) for d in DAMAGE[1:])],
                         ids=lambda v: getattr(v, "__name__", v if isinstance(v, str) else None))
def test_a_damaged_artifact_is_not_used(damage, file, words, copy):
    [folder] = copy.folders("20_train")
    damage(folder / file)
    before = copy.results()
    message = one_line(copy.fedgal("run", "tiny"), FAILED)
    assert all(w in message for w in [*words, f"fedgal clean 20_train/{folder.name}"]), message
    assert copy.results() == before, "nothing else was touched"


@pytest.mark.slow
def test_the_advice_about_a_damaged_artifact_is_good(copy, tiny):
    [folder] = copy.folders("20_train")
    flip(folder / "clients.safetensors")
    one_line(copy.fedgal("run", "tiny"), FAILED)
    assert copy.fedgal("clean", f"20_train/{folder.name}").returncode == 0
    done = copy.fedgal("run", "tiny")
    assert done.returncode == 0 and ran(done) == 1
    assert copy.snapshot() == tiny.snapshot()


@pytest.mark.slow
def test_a_damaged_part_is_not_used(copy, tiny):
    "An arm of a stage that has to run again."
    shutil.rmtree(copy.folders("50_finetune")[0])
    part = next(p for p in copy.parts("50_finetune") if json.loads((p / "manifest.json").read_text())["part"] == "arm:refit")
    file = next(f for f in sorted(part.iterdir()) if f.suffix == ".safetensors")
    flip(file)
    message = one_line(copy.fedgal("run", "tiny"), FAILED)
    assert file.name in message and "SHA-256" in message, message
    assert copy.fedgal("clean", f"50_finetune/parts/{part.name}").returncode == 0 and not part.exists()
    done = copy.fedgal("run", "tiny")
    assert done.returncode == 0 and ran(done) == 1, done.stderr
    assert copy.snapshot() == tiny.snapshot()


# --- two at once ---

def test_the_same_experiment_twice_at_once(project):
    "The first is halted while the second asks."
    project.write("once", {"stages": ["10_data"], "seed": 0})
    first, (_, err) = project.fork(command_line, ["run", "once"])
    try:
        end = time.monotonic() + 60
        while not (project.reports / "once" / "run.json").exists():
            assert time.monotonic() < end and first.is_alive()
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        assert "'once' is already running" in one_line(project.fedgal("run", "once"), BUSY)
        os.kill(first.pid, signal.SIGCONT)
        first.join(300)
        assert first.exitcode == 0, err.read_text()
    finally: first.kill()
    assert project.json("once/run.json")["status"] == "finished"


HOLD = """
import sys, time
from pathlib import Path
from fedgal.pipeline.locks import hold
hold(Path(sys.argv[1]), "a stage")
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["run", "lock"])
def test_a_run_that_waits_says_for_whom(lock, project):
    "Another process works on the stage; without a terminal, too, one line names it, and the run goes on when it has ended."
    from fedgal.pipeline.plan import plan
    path = project.write("once", {"stages": ["10_data"], "seed": 0})
    with pytest.MonkeyPatch.context() as m:
        for name, value in project.env().items(): m.setenv(name, value)
        m.setattr("fedgal.pipeline.keys.check_same_code", lambda: None)
        key = plan(path).members[0].keys["10_data"]
    place = project.artifacts / "10_data" / f"{key}.{lock}"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, place], cwd=project.away, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env=project.env(JPY_SESSION_NAME="folder/10_data.ipynb"))
    run = None
    try:
        assert holder.stdout.readline() == "held\n"
        run = project.start("run", "once", stderr=subprocess.STDOUT)
        lines = []
        while not (lines and "held by" in lines[-1]):
            lines.append(run.stdout.readline())
            assert lines[-1], f"it ended: {lines}"
        assert "10_data" in lines[-1] and f"held by notebook 10_data.ipynb, process {holder.pid}" in lines[-1], lines
        assert not project.folders() and run.poll() is None
        holder.communicate("go\n", timeout=60)
        rest, _ = run.communicate(timeout=300)
        assert run.returncode == 0, rest
    finally:
        holder.kill()
        if run: run.kill()
    assert len(project.folders("10_data")) == 1


@pytest.mark.slow
def test_two_experiments_share_a_stage_that_is_running(project):
    for name in ("one", "two"): project.write(name, {"stages": ["10_data"], "seed": 0})
    with ThreadPoolExecutor(2) as pool: results = list(pool.map(lambda n: project.fedgal("run", n), ("one", "two")))
    assert [r.returncode for r in results] == [0, 0], [r.stderr for r in results]
    assert sorted(ran(r) for r in results) == [0, 1], "the second waited for the first and took its result"


# --- a full disk ---

FULL = """
def inject():
    import errno, os
    left, real = int(os.environ["FULL_AFTER"]), os.fsync
    def fsync(fd):
        nonlocal left
        path = os.readlink(f"/proc/self/fd/{fd}")
        if "/artifacts/20_train/" in path and os.path.isfile(path):
            left -= 1
            if left < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)
    os.fsync = fsync
inject()
del inject
"""
linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the fault is injected through /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("after", [4, 7], ids=["in the second checkpoint", "in the results"])
def test_a_full_disk_loses_nothing(after, copy, tiny, tmp_path):
    faults = kernels_begin_with(FULL, tmp_path / "faults")
    shutil.rmtree(copy.artifacts / "20_train")
    before = copy.snapshot()
    full = copy.fedgal("run", "tiny", env=faults | {"FULL_AFTER": after})
    message = one_line(full, FAILED)
    assert "No space left on device" in message and "resumes" in message, message
    assert not copy.folders("20_train") and copy.snapshot() == before
    assert list((copy.artifacts / "20_train").glob("*.partial")), "work in progress is kept"
    done = copy.fedgal("run", "tiny")
    assert done.returncode == 0 and ran(done) == 1, done.stderr
    assert copy.snapshot() == tiny.snapshot()


@pytest.mark.slow
def test_a_runner_that_cannot_write(copy, tiny):
    "No file may grow beyond 20 kB: the executed notebook cannot be kept."
    shutil.rmtree(copy.artifacts / "20_train")
    before = copy.snapshot()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    result = copy.fedgal("run", "tiny", preexec_fn=limit)
    assert result.returncode in (BAD_PARAMETERS, FAILED) and "File too large" in one_line(result, result.returncode)
    assert copy.snapshot() == before
    done = copy.fedgal("run", "tiny")
    assert done.returncode == 0, done.stderr
    assert copy.snapshot() == tiny.snapshot()

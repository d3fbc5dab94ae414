"""The three ways of use, end to end on digits: all give the same numbers, and nothing is computed twice."""
import json
import math
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import CHAIN, TINY, Project, data_root, ran
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from safetensors.torch import load_file

# --- fedgal run ---

def test_a_run_leaves_its_pages(tiny):
    assert ran(tiny.first) == len(CHAIN)
    pages = {p.name for p in (tiny.reports / "tiny").glob("*.html")}
    assert pages == {f"{s}.html" for s in CHAIN[:-1]} | {"index.html"}
    assert {p.name for p in tiny.folders()} == {s["key"] for s in tiny.json("tiny/run.json")["stages"]}
    parts = {json.loads((p / "manifest.json").read_text())["part"] for p in tiny.parts()}
    assert parts >= {"generator:gaussian", "generator:mlp", "arm:refit", "arm:generator", "arm:oracle"}, "arms and generators are artifacts of their own"
    assert tiny.first.stdout.splitlines()[-1].endswith("tiny/index.html")
    assert "Tiny" in (tiny.reports / "index.html").read_text()


def test_a_run_leaves_nothing_where_it_was_called_from(tiny):
    assert list(tiny.away.iterdir()) == []
    assert {p.name for p in tiny.home.iterdir()} <= {"artifacts", "reports", "fedgal", "nbs", "params", "settings.ini", "pyproject.toml", "README.md"}
    assert not [p for p in tiny.artifacts.rglob("*") if p.name.endswith((".partial", ".part", ".failed.ipynb", ".running.ipynb", ".again"))]


def number(v, low=0.0, high=1.0): return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high


def test_metrics_have_the_agreed_form(tiny):
    m = tiny.json("tiny/metrics.json")
    assert {"experiment": str, "title": str, "fingerprint": str, "readout": str, "params": dict, "seeds": list, "versions": dict, "arms": dict, "fidelity": dict,
            "teachers": dict, "bytes": dict, "seconds": dict}.items() <= {k: type(v) for k, v in m.items()}.items()
    assert (m["experiment"], m["title"], m["seeds"]) == ("tiny", "Tiny", [0])
    assert len(m["fingerprint"]) == 16 and int(m["fingerprint"], 16) >= 0
    assert {k: v for k, v in m["params"].items() if k in TINY} == {k: v for k, v in TINY.items() if k not in ("title", "stages")}
    assert set(m["arms"]) == {"none", "refit", "gaussian", "generator", "oracle"}
    for arm in m["arms"].values():
        assert number(arm["balanced_accuracy"]) and number(arm["ece"])
        assert all(arm[g] is None or number(arm[g]) for g in ("many", "medium", "few"))
        assert len(arm["per_class"]) == 10 and all(number(v) for v in arm["per_class"])
        assert arm["balanced_accuracy"] == pytest.approx(sum(arm["per_class"]) / 10)
        assert all(number(arm["clients"][k]) for k in ("mean", "std", "worst10", "harm_rate"))
        assert all(arm["clients"][k] is None or number(arm["clients"][k], -1) for k in ("missing_gain", "rare_gain"))
    assert m["arms"]["none"]["clients"]["harm_rate"] == 0
    assert m["headroom"] == m["arms"]["oracle"]["balanced_accuracy"] - m["arms"]["refit"]["balanced_accuracy"]
    assert set(m["fidelity"]) == {"gaussian", "generator"}
    for f in m["fidelity"].values():
        assert all(number(f[k]) for k in ("precision", "recall", "coverage"))
        assert all(number(f[k], 0, math.inf) for k in ("frechet", "frechet_floor", "density", "memorisation"))
    assert {"accuracy_fit", "accuracy_judges", "transfer_gap"} == set(m["teachers"])
    assert all(isinstance(m["bytes"][k], int) and m["bytes"][k] > 0 for k in ("up", "down"))
    assert set(m["seconds"]) == set(CHAIN) and all(number(v, 0, 4000) for v in m["seconds"].values())


@pytest.mark.slow
def test_a_group_without_classes_is_null(copy):
    done = copy.fedgal("run", "tiny", "-p", "group_many", "0.99", "-p", "group_few", "1.0")
    assert done.returncode == 0, done.stderr
    arms = copy.json("tiny--group_many=0.99--group_few=1.0/metrics.json")["arms"]
    groups = {g: arms["none"][g] for g in ("many", "medium", "few")}
    assert None in groups.values() and not all(v is None for v in groups.values())
    assert "0.99" in (copy.reports / "tiny--group_many=0.99--group_few=1.0" / "index.html").read_text()


def test_a_second_run_computes_nothing_and_changes_nothing(copy):
    before, metrics = copy.snapshot(), (copy.reports / "tiny/metrics.json").read_bytes()
    again = copy.fedgal("run", copy.home / "params" / "tiny.yaml")
    assert again.returncode == 0 and ran(again) == 0 and again.stdout.count(" cached ") == len(CHAIN)
    assert copy.snapshot() == before and (copy.reports / "tiny/metrics.json").read_bytes() == metrics


def test_an_override_has_its_own_name_and_runs_only_what_it_changes(copy):
    metrics, pages = (copy.reports / "tiny/metrics.json").read_bytes(), (copy.reports / "tiny/index.html").read_bytes()
    done = copy.fedgal("run", "tiny", "-p", "rare_at", "4")
    assert done.returncode == 0, done.stderr
    assert ran(done) == 1 == ran(done, "60_evaluate")
    assert copy.json("tiny--rare_at=4/metrics.json")["experiment"] == "tiny--rare_at=4"
    assert (copy.reports / "tiny/metrics.json").read_bytes() == metrics and (copy.reports / "tiny/index.html").read_bytes() == pages
    rows = [re.sub(r"<[^>]+>", "", r) for r in re.findall(r"<tr\b.*?</tr>", (copy.reports / "index.html").read_text(), re.S)]
    assert sum("rare_at = 4" in r for r in rows) == 1 and len(set(rows)) == len(rows), "a reader can tell the two apart"


def test_another_experiment_is_not_overwritten(copy):
    before = copy.results()
    done = copy.fedgal("run", "tiny", "-p", "rare_at", "4", "--name", "tiny")
    assert done.returncode == 2 and "--name" in done.stderr and len(done.stderr.splitlines()) == 1
    assert copy.results() == before


HUB = """
import io
import os
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

class Split:
    def __init__(self, rows): self.rows = rows
    def to_parquet(self, path): pq.write_table(pa.Table.from_pylist(self.rows), path)

def png(image):
    file = io.BytesIO()
    Image.fromarray((image * 15).astype("uint8")).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}

def load_dataset(address, split):
    with open(os.environ["HUB_LOG"], "a") as log: print(address, split, file=log)
    digits = load_digits()
    part = slice(0, 600) if split == "train" else slice(600, 900)
    return Split([{"image": png(i), "label": int(y)} for i, y in zip(digits.images[part], digits.target[part])])
"""


@pytest.mark.slow
def test_the_first_run_of_a_hub_data_set_is_like_every_other(project, tmp_path):
    "The files are fetched before keys are made of their contents; else the kernel of a later stage gets keys that nobody planned."
    hub, log = tmp_path / "hub", tmp_path / "log"
    hub.mkdir()
    (hub / "datasets.py").write_text(HUB)
    project.write("mnist", {"stages": CHAIN[:2], "dataset": "mnist", "imbalance": 5, "n_clients": 2, "rounds": 1})
    env = {"PYTHONPATH": f"{hub}:{project.home}", "FEDGAL_DATA_ROOT": tmp_path / "data", "HUB_LOG": log}
    first = project.fedgal("run", "mnist", env=env)
    assert first.returncode == 0, first.stderr + first.stdout
    assert ran(first) == 2 and [len(project.folders(s)) for s in CHAIN[:2]] == [1, 1]
    assert log.read_text().splitlines() == ["ylecun/mnist train", "ylecun/mnist test"], "each file once"
    again = project.fedgal("run", "mnist", env=env)
    assert again.returncode == 0 and ran(again) == 0 and again.stdout.count(" cached ") == 2, again.stdout
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.skipif(not (data_root() / "mnist" / "train.parquet").is_file(), reason=f"no mnist/train.parquet in {data_root()}")
def test_named_data_come_from_the_data_root(project):
    project.write("mnist", {"stages": ["10_data"], "dataset": "mnist", "imbalance": 100})
    done = project.fedgal("run", "mnist")
    assert done.returncode == 0, done.stderr
    [folder] = project.folders("10_data")
    assert json.loads((folder / "manifest.json").read_text())["params"]["dataset"] == "mnist"


@pytest.mark.slow
def test_clients_own_models_go_through_all_stages(copy):
    "FedMPS and a generator, as in its params file but smaller and on the split of the tiny experiment: no global model anywhere."
    small = {"n_clients": 4, "alpha": 0.3, "rounds": 2, "rff_dim": 32, "gen_steps": 5, "bank_per_class": 20, "finetune_rounds": 2, "finetune_steps": 4, "oracle_per_class": 20}
    done = copy.fedgal("run", "fedmps_generator_digits", "--name", "own", *[w for n, v in small.items() for w in ("-p", n, v)])
    assert done.returncode == 0 and ran(done) == len(CHAIN) - 1, done.stderr
    m = copy.json("own/metrics.json")
    assert m["readout"] == "clients' own models, balanced test set, last round" and set(m["arms"]) == set(m["readouts"]) == {"none", "refit", "gaussian", "generator", "oracle"}
    for arm, values in m["readouts"].items():
        assert set(values) == {"own head, own classes", "own head, all classes"} and all(len(v["values"]) == 4 and number(v["mean"]) for v in values.values())
        assert m["arms"][arm]["balanced_accuracy"] == pytest.approx(values["own head, all classes"]["mean"])
        assert number(m["arms"][arm]["clients"]["missing_gain"], -1)
    assert m["arms"]["none"]["clients"]["harm_rate"] == 0 and m["arms"]["refit"]["bytes"] == {"up": 0, "down": 0} and m["arms"]["gaussian"]["bytes"]["down"] > 0
    keys = {s["stage"]: s["key"] for s in copy.json("own/run.json")["stages"]}
    before, after = (load_file(copy.artifacts / s / keys[s] / f) for s, f in (("20_train", "clients.safetensors"), ("50_finetune", "models.safetensors")))
    assert {n.partition("/")[0] for n in after} == set(m["arms"]) and {n.split("/", 1)[1] for n in after} == set(before)
    for name, t in after.items():
        arm, own = name.split("/", 1)
        if arm == "none" or own.split("/")[1].startswith("low."): assert torch.equal(t, before[own]), f"{name} was not to be trained"
        elif own.endswith("/head.weight"): assert not torch.equal(t, before[own]), name


# --- a sweep ---

@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    project = Project.make(tmp_path_factory.mktemp("sweep") / "project")
    project.write("levels", stages=[*CHAIN, "90_compare"], seed=None, generator="gaussian", sweep={"seed": [0, 1], "level": ["low", "high"]}, baseline="refit")
    project.first = project.fedgal("run", "levels", "--jobs", 2)
    assert project.first.returncode == 0, project.first.stderr + project.first.stdout
    return project


@pytest.mark.slow
def test_a_sweep_shares_what_it_can(swept):
    made = {s: len(swept.folders(s)) for s in [*CHAIN, "90_compare"]}
    assert made == {"10_data": 2, "20_train": 2, "30_statistics": 2, "40_generator": 4, "50_finetune": 4, "60_evaluate": 4, "90_compare": 1}
    assert ran(swept.first, "20_train") == 2 and ran(swept.first) == sum(made.values())
    assert {p.parent.name for p in (swept.reports / "levels" / "members").glob("*/metrics.json")} == {f"seed={s}--level={v}" for s in (0, 1) for v in ("low", "high")}


@pytest.mark.slow
def test_a_comparison_has_the_agreed_form(swept):
    key = next(s["key"] for s in swept.json("levels/run.json")["stages"] if s["stage"] == "90_compare")
    c = json.loads((swept.artifacts / "90_compare" / key / "comparison.json").read_text())
    published = list((swept.reports / "levels").glob("comparison.json"))
    assert published and json.loads(published[0].read_text()) == c, "comparison.json lies beside the report"
    assert c["experiment"] == "levels" and c["baseline"] == "refit" and len(c["fingerprints"]) == 2
    assert {(r["params"]["level"], r["arm"]) for r in c["rows"]} == {(v, a) for v in ("low", "high") for a in ("none", "refit", "gaussian", "generator", "oracle")}
    assert {h["params"]["level"]: h["seeds"] for h in c["headroom"]} == {"low": 2, "high": 2}
    for h in c["headroom"]:
        each = [swept.json(f"levels/members/seed={s}--level={h['params']['level']}/metrics.json")["headroom"] for s in (0, 1)]
        assert h["headroom"] == pytest.approx(sum(each) / 2) and (h["interval"][0] is None or h["interval"][0] <= h["headroom"] <= h["interval"][1])
    for r in c["rows"]:
        members = [swept.json(f"levels/members/seed={s}--level={r['params']['level']}/metrics.json")["arms"] for s in (0, 1)]
        values = [m[r["arm"]]["balanced_accuracy"] for m in members]
        assert r["federated"] == all(m[r["arm"]]["federated"] for m in members)
        assert r["balanced_accuracy"]["values"] == pytest.approx(values) and r["balanced_accuracy"]["mean"] == pytest.approx(sum(values) / 2)
        assert r["balanced_accuracy"]["sd"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        assert set(r["few"]) == {"mean", "sd", "values"} and r["n_seeds"] == 2 and r["failed"] == 0
        versus = r["versus_baseline"]
        if r["arm"] == "refit": assert versus["difference"] in (None, 0)
        else:
            assert versus["difference"] == pytest.approx(sum(values) / 2 - sum(m["refit"]["balanced_accuracy"] for m in members) / 2)
            low, high = versus["ci95"]
            assert low is None or low <= versus["difference"] <= high
            assert versus["p_holm"] is None or 0 <= versus["p_holm"] <= 1


@pytest.mark.slow
def test_a_sweep_again_is_all_cached(swept):
    again = swept.fedgal("run", "levels")
    assert again.returncode == 0 and ran(again) == 0 and again.stdout.count(" cached ") == 19


# --- one stage by hand ---

def papermill(project, stage, *args):
    return subprocess.run([sys.executable, "-m", "papermill", str(project.stages / f"{stage}.ipynb"), str(project.away / "out.ipynb"), *map(str, args), "-k", "python3"],
                          cwd=project.away, env=project.env(), capture_output=True, text=True, timeout=400)


def forget(project, stage):
    "Remove what a stage left and return it."
    before = project.snapshot(stage)
    assert before
    shutil.rmtree(project.artifacts / stage)
    return before


@pytest.mark.slow
def test_plain_papermill_gives_the_same_files(copy):
    before = forget(copy, "20_train")
    done = papermill(copy, "20_train", "-f", copy.home / "params" / "tiny.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert copy.snapshot("20_train") == before
    again = copy.fedgal("run", "tiny")
    assert again.returncode == 0 and ran(again) == ran(again, "20_train") <= 1, "at most its page is still to be made"
    assert copy.snapshot("20_train") == before


@pytest.mark.slow
def test_papermill_refuses_an_unknown_parameter(copy):
    before = copy.snapshot()
    done = papermill(copy, "10_data", "-f", copy.home / "params" / "tiny.yaml", "-p", "imbalanse", 3)
    assert done.returncode == 1 and "did you mean 'imbalance'" in done.stderr
    done = papermill(copy, "10_data", "-p", "imbalance", "many")
    assert done.returncode == 1 and "parameter imbalance = 'many': expected float" in done.stderr
    assert copy.snapshot() == before


def lab(project, stage, **edited):
    "Open a stage as JupyterLab does, edit lines of its `parameters` cell, run all cells."
    nb = nbformat.read(project.stages / f"{stage}.ipynb", 4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    lines = cell.source.splitlines()
    for name, value in edited.items():
        i = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        lines[i] = f"{lines[i].split(' = ')[0]} = {value!r}"
    cell.source = "\n".join(lines)
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(project.stages)}}).execute(env=project.env(JPY_SESSION_NAME=stage))
    return nb


@pytest.mark.slow
def test_jupyterlab_gives_the_same_files_and_makes_missing_inputs(copy):
    before = forget(copy, "10_data") | forget(copy, "20_train")
    nb = lab(copy, "20_train", params_file="tiny")
    assert copy.snapshot("10_data") | copy.snapshot("20_train") == before
    assert "running it first" in "".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))


@pytest.mark.slow
def test_an_edited_parameters_cell_gives_the_same_files(copy):
    before = forget(copy, "10_data")
    lab(copy, "10_data", imbalance=10, n_clients=4)
    assert copy.snapshot("10_data") == before
    lab(copy, "10_data", imbalance=10, n_clients=5)
    assert len(copy.folders("10_data")) == 2 and before.items() < copy.snapshot("10_data").items()


@pytest.mark.slow
def test_an_edited_cell_is_stronger_than_the_params_file_and_is_checked(copy):
    before = copy.snapshot()
    with pytest.raises(CellExecutionError, match="parameter imbalance = 0.5: expected float"): lab(copy, "10_data", params_file="tiny", imbalance=0.5)
    assert copy.snapshot() == before


# --- the other commands ---

@pytest.mark.slow
def test_status_report_and_clean(copy):
    status = copy.fedgal("status")
    assert status.returncode == 0 and "tiny" in status.stdout and "finished" in status.stdout
    assert all(s in copy.fedgal("status", "tiny").stdout for s in CHAIN)

    pages = {p.name: p.read_bytes() for p in (copy.reports / "tiny").glob("*.html")}
    (copy.reports / "tiny" / "index.html").write_text("gone")
    (copy.reports / "tiny" / "metrics.json").unlink()
    metrics = copy.json("tiny/run.json")["experiment"]
    report = copy.fedgal("report", "tiny")
    assert report.returncode == 0, report.stderr
    assert {p.name: p.read_bytes() for p in (copy.reports / "tiny").glob("*.html")} == pages and copy.json("tiny/metrics.json")["experiment"] == metrics

    before = copy.snapshot()
    (copy.artifacts / "20_train" / "0123456789abcdef.partial").mkdir()
    assert copy.fedgal("clean").returncode == 0 and copy.snapshot() == before, "what a report rests on is kept"
    assert not list(copy.artifacts.glob("*/*.partial"))
    assert copy.fedgal("clean", "60_evaluate").returncode == 0 and not copy.folders("60_evaluate") and copy.folders("50_finetune")
    assert copy.fedgal("clean", "--all").returncode == 0 and not copy.folders() and not copy.parts()


def test_params_lists_every_parameter(project):
    done = project.fedgal("params")
    assert done.returncode == 0 and all(f" {name} " in done.stdout for name in TINY if name not in ("stages",))
    one = project.fedgal("params", "20_train")
    assert "rounds" in one.stdout and "gen_steps" not in one.stdout and "communication rounds" in one.stdout


def test_status_without_experiments_says_how_to_start(project):
    done = project.fedgal("status")
    assert done.returncode == 2 and "fedgal run params/quickstart.yaml" in done.stderr

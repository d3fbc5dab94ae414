"""Benchmarks still run: each from end to end with the smallest numbers, and shows all that the committed notebook shows."""
import json
import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import REPO, Project

BANKS = {"seeds": [100, 101], "rounds": 1, "per_class": 10, "options": {"steps": 4, "rounds": 2, "width": 16}, "tuning": {"rounds": 1, "steps": 2}}
SMALL = {"diffusion": {"repeats": 1, "batch": 4, "own_steps": 2, "few": 1, "wide_steps": 1, "narrow_steps": 10, "rounds": 1, "options": {"steps": 10}, "per_class": 4, "claims": False},
         "engines": {"repeats": 1, "n_clients": 4, "examples": 4, "batch_size": 2, "full": False},
         "clients": {"dataset": "noise", "n_clients": 2, "per_client": 20, "repeats": 1},
         "small_clients": {"dataset": "noise", "flute_clients": 12, "flute_rounds": 1, "n_clients": 4, "repeats": 1},
         "many_clients": {"many_clients": [4, 12], "engines": ["serial"], "repeats": 1, "images": 200},
         "client_generators": {"repeats": 2, "alone": 1, "batches": [8, 32], "options": {"hidden_dim": 24, "latent_dim": 8}},
         "inversion": {"dataset": "digits", "images": 2, "iterations": 4, "restarts": 1, "short": 3},
         "beyond_gaussian": {"few": {"dataset": "digits"}, "seeds": [100, 101], "rounds": 1, "steps": 2, "per_class": 8, "tuning": {"rounds": 4, "steps": 1},
                             "images": {"steps": 4, "rounds": 2, "width": 16, "sample_steps": 2}},
         "choose_encoder": {"seeds": [100, 101], "names": ["two passes", "twenty steps", "steps, sharp, balanced"], "few": {"dataset": "digits"}, "clothes": {"dataset": "digits"}, "rounds": 1, "steps": 2, "per_class": 10, "tuning": {"rounds": 1, "steps": 2}},
         "choose_widen": {"seeds": [100, 101], "candidates": [0.0, 3.0], "rounds": 1, "per_class": 10, "tuning": {"rounds": 1, "steps": 2}},
         "moments_or_shape": BANKS | {"trained": [1, 2]}, "views": BANKS}
RUN = """
import json, sys, tempfile
from pathlib import Path
import papermill
from fedgal.pipeline.kernels import kernel_manager
folder, out = map(Path, sys.argv[1:3])
for name, parameters in json.loads(sys.argv[3]).items():
    with tempfile.TemporaryDirectory(prefix="fedgal-") as sockets:
        try: papermill.execute_notebook(folder / f"{name}.ipynb", out / f"{name}.ipynb", parameters, kernel_name="python3", progress_bar=False, cwd=folder,
                                        start_timeout=300, extra_arguments=["--IPKernelApp.log_level=50"], kernel_manager_class=kernel_manager(sockets))
        except papermill.PapermillExecutionError: pass    # stands in the notebook
"""


def shown(cell): return [sorted(o.data) for o in cell.outputs if "data" in o]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    "A folder with the notebooks, run one after another from one process that has the libraries in memory."
    project, out = Project.make(tmp_path_factory.mktemp("benchmarks") / "project", all_notebooks=True), tmp_path_factory.mktemp("executed")
    run = subprocess.run([sys.executable, "-c", RUN, str(project.home / "nbs" / "benchmarks"), str(out), json.dumps(SMALL)],
                         cwd=project.away, env=project.env(), capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("notebook", SMALL)
def test_a_benchmark_runs_and_shows_what_it_should(notebook, executed):
    committed, small = (nbformat.read(folder / f"{notebook}.ipynb", 4) for folder in (REPO / "nbs" / "benchmarks", executed))
    cells = {c.id: c for c in small.cells if c.cell_type == "code"}
    errors = ["\n".join(o.traceback) for c in cells.values() for o in c.outputs if o.output_type == "error"]
    assert not errors, errors[0]
    expected = {c.id: shown(c) for c in committed.cells if c.cell_type == "code" and shown(c)}
    assert {"image/png", "text/html"} <= {kind for outputs in expected.values() for kinds in outputs for kind in kinds}, "figures and tables"
    assert {i: shown(cells[i]) for i in expected} == expected


@pytest.mark.parametrize("notebook", SMALL)
def test_the_small_numbers_are_parameters_of_the_notebook(notebook):
    from fedgal.core.cells import read_cell
    nb = nbformat.read(REPO / "nbs" / "benchmarks" / f"{notebook}.ipynb", 4)
    source, = (c.source for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    declared = read_cell(source)
    for name, value in SMALL[notebook].items():
        row = declared[name]
        assert type(value).__name__ == row.type.partition("[")[0] and value != row.default, name


def test_the_default_of_widen_is_the_best_on_development_images():
    from fedgal.pipeline.schema import schema
    text = (REPO / "nbs" / "benchmarks" / "choose_widen.ipynb").read_text(encoding="utf-8")
    shown = re.search(r"Bars of balanced accuracy by widen: ([^\"\\]+)", text[text.index('"outputs"'):])[1]
    scores = {float(w): float(v) for w, v in re.findall(r"([\d.]+) ([\d.]+) %", shown)}
    assert len(scores) == 4 and schema("40_generator")["widen"].default == max(scores, key=scores.get)


def test_the_recipe_of_the_params_files_is_the_best_on_development_images():
    notebook = nbformat.read(REPO / "nbs" / "benchmarks" / "choose_encoder.ipynb", 4)
    defined = {"rounds": 40, "steps": 20, "names": []}
    exec(next(c.source for c in notebook.cells if "CANDIDATES = {\n" in c.source), defined)
    for experiment, where in (("encoders_digits", "digits"), ("mnist_few", "a few digits of MNIST")):
        told = re.search(rf"two arms on {where} by training of the encoder: ([^\"\\]+)", nbformat.writes(notebook))[1]
        scores = {name: float(score) for name, score in re.findall(r"(?:^|; )(.+?): none [\d.]+ %, gaussian ([\d.]+) %", told)}
        assert len(scores) >= 5
        params = yaml.safe_load((REPO / "params" / f"{experiment}.yaml").read_text(encoding="utf-8"))
        best = defined["CANDIDATES"][max(scores, key=scores.get)]
        assert best.items() <= params.items(), f"{experiment} does not follow the choice"

"""What a new module, a new figure and a changed loss make run again: that which uses them, and nothing else."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import CHAIN, JUNK, REPO, TINY, Project, ran

pytestmark = pytest.mark.slow

ECHO = '''
"Every feature is the mean of its class and a little noise."
import torch
from fedgal.core.options import Options, option
from fedgal.generators.base import Generator


class EchoOptions(Options):
    noise: float = option(0.1, "standard deviation of the noise", ge=0)


class Echo(Generator):
    name, Options = "echo", EchoOptions

    def fit(self, task):
        task.require("statistics")
        self.mean, self.known = task.statistics.mean().nan_to_num().float(), task.statistics.present
        return []

    def sample(self, labels, generator):
        noise = torch.randn(len(labels), self.space.dim, generator=generator)
        return self.mean[labels] + self.options.noise * noise

    def state(self):
        return {"mean": self.mean, "known": self.known}

    def load_state(self, tensors):
        self.mean, self.known = tensors["mean"], tensors["known"]
'''
HALF_STEP = '''
"FedAvg in half steps."
from dataclasses import replace
from fedgal.core.options import Options, option
from fedgal.federated.algorithm import Algorithm


class HalfOptions(Options):
    share: float = option(0.5, "share of the mean change", gt=0, le=1)


class HalfStep(Algorithm):
    name, summary, Options = "half_step", "FedAvg in half steps", HalfOptions

    def merge(self, payload, updates, weights=None, bn="average"):
        new, share = super().merge(payload, updates, weights, bn), self.options.share
        mixed = {n: (1 - share) * payload.parameters[n] + share * p for n, p in new.parameters.items()}
        return replace(new, parameters=mixed)
'''
SMOOTH = '''
"Cross-entropy with smoothed labels."
from torch.nn.functional import cross_entropy
from fedgal.models.losses.local import NamedLoss


class Smooth(NamedLoss):
    def __call__(self, out, y, mask=None, context=None):
        return cross_entropy(out.logits, y, reduction="none", label_smoothing=0.1)
'''
COLD = '''
"The classifier with half its weights."
import copy
import torch
from fedgal.finetune.arms import Arm
from fedgal.finetune.repairs import with_head


class Cold(Arm):
    name, one_head, uses_level = "cold", True, False

    def train(self, context, bank):
        head = copy.deepcopy(context.run.model.head)
        with torch.no_grad():
            for p in head.parameters():
                p.mul_(0.5)
        return with_head(context.run.model, head), None
'''
NPZ = '''
"Arrays x and y of a .npz file."
import numpy as np
import torch
from fedgal.data.parquet import Part
from fedgal.data.sources import DataSource, find_file, places


class Npz(DataSource):
    form = "a path to a .npz file"

    def label(self, name):
        return name.rpartition("/")[2]

    def files(self, name):
        return places(name)

    def parts(self, name):
        arrays = np.load(find_file(name))
        return [Part(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]))]


NPZ = Npz()
'''
ADDITIONS = {    # kind -> name, module of the registry, new module, class, source
    "generator": ("echo", "generators/base", "generators/echo", "Echo", ECHO),
    "algorithm": ("half_step", "federated/algorithm", "algorithms/half_step", "HalfStep", HALF_STEP),
    "loss": ("smooth", "models/losses/local", "models/losses/smooth", "Smooth", SMOOTH),
    "arm": ("cold", "finetune/arms", "finetune/cold", "Cold", COLD),
    "dataset": ("*.npz", "data/sources", "data/npz", "NPZ", NPZ),
}


def change(path, old, new):
    "Replace one passage of a file."
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name}: {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def add(project, kind):
    "One new notebook and one line of the registry's table; `export` makes modules of them."
    name, home, module, entry, source = ADDITIONS[kind]
    dotted = module.replace("/", ".")
    cells = [f"#| default_exp {dotted}", f"#| export\n{source.strip()}"]
    new = project.home / "nbs" / f"{module}.ipynb"
    assert not new.exists() and not (project.home / "fedgal" / f"{module}.py").exists()
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), new)

    [table] = [p for p in (project.home / "nbs").rglob("*.ipynb") if f"default_exp {home.replace('/', '.')}\\n" in p.read_text(encoding="utf-8")]
    notebook = nbformat.read(table, 4)
    [cell] = [c for c in notebook.cells if re.search(rf'= Registry\(\s*"{kind}",\s*\{{\n', c.source)]
    opening = re.search(rf'= Registry\(\s*"{kind}",\s*\{{\n', cell.source)[0]
    cell.source = cell.source.replace(opening, f'{opening}        "{name}": "fedgal.{dotted}:{entry}",\n')
    nbformat.write(notebook, table)


def export(project):
    "Modules from notebooks, as the recipe says."
    subprocess.run([str(Path(sys.executable).with_name("nbdev-export"))], cwd=project.home, check=True, capture_output=True)


def outcome(result) -> dict:
    "How often each stage of a run was computed and taken from the cache."
    assert result.returncode == 0, result.stderr + result.stdout
    words = [line.split()[:2] for line in result.stdout.splitlines() if line[:1].isdigit()]
    return {s: ([w for n, w in words if n == s].count("ran"), [w for n, w in words if n == s].count("cached"))
            for s in dict.fromkeys(n for n, _ in words)}


CACHED = {stage: (0, 1) for stage in CHAIN}


def manifest(project, experiment, stage) -> dict:
    "What the artifact says on which a report rests."
    key = {s["stage"]: s["key"] for s in project.json(f"{experiment}/run.json")["stages"]}[stage]
    return json.loads((project.artifacts / stage / key / "manifest.json").read_text(encoding="utf-8"))


def reported(path) -> dict:
    "What the last cell of an executed stage says."
    cell = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"][-1]
    return ast.literal_eval("".join(cell["outputs"][-1]["data"]["text/plain"]))


# --- something new ---

def test_each_addition_is_a_notebook_and_a_line(copy):
    shutil.copytree(REPO / "nbs", copy.home / "nbs", dirs_exist_ok=True, ignore=JUNK)
    for kind in ADDITIONS: add(copy, kind)
    export(copy)
    before = copy.results()
    assert outcome(copy.fedgal("run", "tiny")) == CACHED, "what nobody chose makes nothing run"
    assert copy.results() == before

    listed = copy.fedgal("params", "generator").stdout + copy.fedgal("params", "echo").stdout
    assert "echo" in listed and "standard deviation of the noise" in listed

    copy.write("after", generator="echo", generator_options={"noise": 0.2}, arms=["none", "generator", "cold"])
    done = copy.fedgal("run", "after")
    assert outcome(done) == CACHED | {s: (1, 0) for s in CHAIN[3:]}
    assert {"generator:gaussian", "generator:echo"} == set(manifest(copy, "after", "40_generator")["parts"])
    assert {"arm:none", "arm:generator", "arm:cold"} == set(manifest(copy, "after", "50_finetune")["parts"])
    assert set(copy.json("after/metrics.json")["arms"]) == {"none", "generator", "cold"}

    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 60)
    x = (rng.random((240, 1, 8, 8)) * 60 + 60 * y[:, None, None, None]).astype(np.uint8)
    np.savez(copy.home / "grey.npz", x=x, y=y)
    train = {"stages": CHAIN[:2], "dataset": "grey.npz", "imbalance": 2, "n_clients": 2, "rounds": 1}
    copy.write("before", train | {"algorithm": "half_step", "algorithm_options": {"share": 0.3}, "local_loss": "smooth"})
    done = copy.fedgal("run", "before")
    assert outcome(done) == {s: (1, 0) for s in CHAIN[:2]}
    chosen = manifest(copy, "before", "20_train")["params"]
    assert (chosen["algorithm"], chosen["local_loss"]) == ("half_step", "smooth")
    assert manifest(copy, "before", "10_data")["params"]["dataset"] == "grey.npz"

    np.savez(copy.home / "grey.npz", x=255 - x, y=y)
    assert outcome(copy.fedgal("run", "before")) == {s: (1, 0) for s in CHAIN[:2]}, "the file's content is part of the key"


# --- something changed ---

DRAWN = ("report/plots/results", "report/plots/training")
WORDED = ("federated/loop", "models/losses/base", "generators/gaussian")


def touch_show_cell(project, stage):
    "Another line in the first cell of a stage that is tagged `show`."
    path = project.stages / f"{stage}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "show" in c["metadata"].get("tags", []))
    cell["source"] = [*cell["source"], "\nprint('another figure')"]
    path.write_text(json.dumps(notebook), encoding="utf-8")


def test_figures_and_words_make_nothing_run(copy):
    before = copy.results()
    package = copy.home / "fedgal"
    for name in DRAWN:
        path = package / f"{name}.py"
        path.write_text(path.read_text(encoding="utf-8") + "\n\nWIDER = 1.2\n", encoding="utf-8")
    for stage in CHAIN[1:5]: touch_show_cell(copy, stage)
    for name in WORDED:
        path = package / f"{name}.py"
        text = re.sub(r'\A"""(.*?)"""', r'"""\1, in other words"""', path.read_text(encoding="utf-8"), count=1, flags=re.S)
        path.write_text(text + "\n\n# a further comment\n", encoding="utf-8")
    change(package / "models/losses/base.py", '"Weighted mean over samples; 0 if all weights are 0."', '"The mean."')
    assert outcome(copy.fedgal("run", "tiny")) == CACHED
    assert copy.results() == before


def test_a_changed_loss_runs_what_uses_it(copy):
    short = {n: TINY[n] for n in ("seed", "dataset", "imbalance", "n_clients", "rounds")} | {"stages": CHAIN[:2]}
    copy.write("plain", short)
    copy.write("margins", short | {"local_loss": "ldam", "head": "cosine"})
    cached, trained = {s: (0, 1) for s in CHAIN[:2]}, {"10_data": (0, 1), "20_train": (1, 0)}
    assert outcome(copy.fedgal("run", "margins")) == trained
    losses = copy.home / "fedgal/models/losses"
    change(losses / "ldam.py", "counts.clamp(min=1) ** -0.25", "counts.clamp(min=1) ** -0.5")
    assert outcome(copy.fedgal("run", "tiny")) == CACHED
    assert outcome(copy.fedgal("run", "margins")) == trained

    assert outcome(copy.fedgal("run", "plain")) == cached, "the data and the training of tiny"
    change(copy.home / "fedgal/federated/engines/batched.py", "import torch\n", "import torch\n\nFASTER = True\n")
    assert outcome(copy.fedgal("run", "plain")) == trained, "the engine that auto may take is part of every training"
    change(losses / "base.py", "weight = weight.to(values.dtype)", "weight = 1 * weight.to(values.dtype)")
    assert outcome(copy.fedgal("run", "plain")) == trained, "what every loss rests on is part of every training"


# --- a larger sweep ---

def parts(project, stage): return {p.parent.name for p in project.artifacts.glob(f"{stage}/parts/*/manifest.json")}


def test_a_sweep_grows_by_what_is_new(tmp_path):
    project = Project.make(tmp_path / "project")
    values = {n: v for n, v in TINY.items() if n != "generator"} | {"stages": CHAIN[:5], "rounds": 1}
    arms = ["none", "refit", "generator"]
    project.write("grown", values, sweep={"generator": ["mlp", "smote"]}, arms=arms)
    assert outcome(project.fedgal("run", "grown"))["40_generator"] == (2, 0)
    generators, treatments = parts(project, "40_generator"), parts(project, "50_finetune")
    assert len(generators) == 3, "gaussian, which all members share, mlp and smote"
    assert len(treatments) == 4, "none and refit, which all members share, and generator twice"
    before = set(project.artifacts.glob("50_finetune/*.ipynb"))

    project.write("grown", values, sweep={"generator": ["mlp", "smote", "transplant"]}, arms=[*arms, "tau_norm"])
    done = outcome(project.fedgal("run", "grown", "--jobs", 1))
    assert done == {s: (0, 1) for s in CHAIN[:3]} | {"40_generator": (1, 2), "50_finetune": (3, 0)}
    assert len(parts(project, "40_generator")) == 4 and generators < parts(project, "40_generator")
    assert len(parts(project, "50_finetune")) == 6 and treatments < parts(project, "50_finetune")
    told = {m["changed"]["generator"]: {s["stage"]: reported(project.artifacts / s["stage"] / f"{s['key']}.ipynb") for s in m["stages"]}
            for m in project.json("grown/run.json")["members"]}
    assert told["transplant"]["40_generator"]["computed"] == ["transplant"]
    assert told["transplant"]["40_generator"]["cached"] == ["gaussian"]
    computed = {name: stages["50_finetune"]["computed"] for name, stages in told.items()}
    assert sorted(a for names in computed.values() for a in names) == ["generator", "tau_norm"], "each once, whoever comes first"
    assert "generator" in computed["transplant"] and before < set(project.artifacts.glob("50_finetune/*.ipynb"))
    assert set(told["mlp"]["50_finetune"]["cached"]) >= {"none", "refit", "generator"}
    assert ran(project.fedgal("run", "grown")) == 0

"""An audit reads the messages that a run has really sent: the same from every engine, and lost with none."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import CHAIN, Project

from fedgal.core.random import prepare
from fedgal.data.datasets import load_dataset
from fedgal.data.split import SplitOptions, make_split
from fedgal.federated.kept import KeptMessages
from fedgal.federated.loop import fit
from fedgal.federated.setup import set_up
from fedgal.pipeline.schema import resolve

pytestmark = pytest.mark.slow


def kept_by(engine, folder):
    "Messages of the second of two rounds."
    params = resolve(["10_data", "20_train"], {"rounds": 2, "local_epochs": 1})
    data = load_dataset("digits")
    split = make_split(data, SplitOptions.make(**params["10_data"]), seed=0)
    run = set_up(data, split, params["20_train"], prepare())
    fit(run.network, run.clients, run.options, run.seed, engine, run.loss, messages=KeptMessages(folder, [2]))


def test_every_engine_keeps_the_same_messages(project: Project, tmp_path):
    both = []
    for engine in ("serial", "workers"):
        subprocess.run([sys.executable, __file__, engine, tmp_path / engine], env=project.env(), check=True)
        messages = KeptMessages(tmp_path / engine)
        assert messages.kept() == [2]
        both.append(messages.load(2))
    (payload, updates), (other, others) = both
    assert all(torch.equal(t, other.parameters[n]) for n, t in payload.parameters.items())
    assert [u.client for u in updates] == [u.client for u in others]
    for a, b in zip(updates, others, strict=True):
        assert a.n_examples == b.n_examples and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def test_an_audit_says_what_leaks_under_which_budgets_nothing_was_found_and_what_is_left(project):
    stages = {"stages": [*CHAIN, "80_audit"], "title": "Audited"}
    project.write("audited", **stages, keep_messages=[1], audit_clients=1, audit_steps=20, audit_shadows=4, epsilons=[100.0])
    done = project.fedgal("run", "audited", "--jobs", 1)
    assert done.returncode == 0, done.stderr
    (folder,) = project.folders("80_audit")
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["rounds"] == [1] and audit["noise"] == "repeatable"
    few = {(r["message"][:3], r["epsilon"]): r["value"] for r in audit["readings"] if r["attack"] == "few_samples"}
    assert few["sta", None] > few["sum", None], "a class with one sample on a client comes out as it is; their sum hides most"
    assert few["sum", 100.0] == 0 and ("sta", 100.0) not in few, "noise is credited with what it does to the sum"
    messages = {r["message"] for r in audit["readings"]}
    assert messages >= {"update", "bank of gaussian", "weights of gaussian"} and any(m.startswith("statistics of each") for m in messages)
    page = (project.reports / "audited" / "index.html").read_text()
    assert "stop it" not in page and "nothing found at epsilon" in page and "≤ 100 (the largest tried)" in page
    assert 'alt="Originals above and reconstructions below' in page


if __name__ == "__main__":
    kept_by(*sys.argv[1:])

"""A whole experiment over nodes that are called where the network would be: what it refuses, resumes and reports."""
import json
import os

import pytest
import yaml
from conftest import REPO, data_root

FEW = {"rounds": 2, "finetune_rounds": 2, "finetune_steps": 3, "bank_per_class": 20, "rff_dim": 16, "generator": "gaussian"}


@pytest.fixture
def federation(project, monkeypatch):
    "A folder of `init`, and a call that runs its steps until a question."
    for name, value in {"ROOT": REPO, "DATA_ROOT": data_root(), "ARTIFACTS": project.artifacts}.items(): monkeypatch.setenv(f"FEDGAL_{name}", str(value))
    from fedgal.core.errors import FedgalError
    from fedgal.core.store import load_json
    from fedgal.federated.facts import Federation, own_data
    from fedgal.pipeline import deploy
    from fedgal.pipeline.deployed_node import DeployedNode, node_answer
    from fedgal.pipeline.deployed_server import run_steps
    # certificates and keys need the extra
    monkeypatch.setattr(deploy, "write_certificates", lambda folder, _: [(folder / f).write_text("") for f in ("ca.crt", "server.pem", "server.key")])
    monkeypatch.setattr(deploy, "write_node_key", lambda file: [f.write_text("") for f in (file, file.with_suffix(".pub"))])
    folder = deploy.init(project.home / "three", REPO / "params" / "federation_digits.yaml", FEW)
    facts = load_json(folder / "server" / "app" / "federation" / "federation.json")
    files = {k: f"{folder}/node{k}/examples.parquet" for k in range(3)}

    def steps(until="", content="c"):
        asked = []

        def ask(what, sent, when):
            asked.append(when)
            if when == until: raise FedgalError(f"client 1 is gone, {when}")
            nodes = {k: DeployedNode(facts, {"client": k, "data": files[k], "home": f"{folder}/node{k}/kept"}) for k in sent}
            return {k: node_answer(nodes[k], what, *message) for k, message in sent.items()}

        examples = {k: (len(own_data(file)[1]), content) for k, file in files.items()}
        try: run_steps(Federation(facts, examples, ask, folder / "server" / "result"))
        except FedgalError as error: return asked, str(error)
        return asked, ""

    return folder, steps


def test_a_federation_goes_on_from_any_step_and_leaves_an_ordinary_report(federation, project):
    folder, steps = federation
    collected = {"when it gets the trained model", "in sums of low"}
    stops = {"in round 2": set(), "when it gets the trained model": {"in round 1"}, "in sums of low": {"in round 2"},
             "when arm refit begins": {"in round 2"}, "in round 2 of arm generator": {"in round 2", *collected}}
    for when, finished in stops.items():    # what is finished is asked for no more
        asked, why = steps(until=when)
        assert why == f"client 1 is gone, {when}" and not finished & set(asked)
    assert steps()[1] == "" and steps() == ([], "")
    done = project.fedgal("deploy", "report", folder, "--name", "digits_of_three")
    assert done.returncode == 0, done.stderr
    home = project.reports / "digits_of_three"
    run, metrics = project.json("digits_of_three/run.json"), project.json("digits_of_three/metrics.json")
    assert run["status"] == "finished" and run["title"] == metrics["title"] == "A federation of digits"
    assert sorted(metrics["arms"]) == ["gaussian", "generator", "none", "refit"] and metrics["headroom"] is None and metrics["seeds"] == [0]
    ledger = json.loads((folder / "server" / "result" / "ledger.json").read_text())
    arms = {a: f["bytes"] for a, f in metrics["arms"].items()}
    assert sum(a["up"] for a in arms.values()) + metrics["bytes"]["up"] - arms["generator"]["up"] == ledger["totals"]["up"]
    page = (home / "index.html").read_text()
    for words in ("What each node sent", "statistics: statistics low", "fine-tuning: bank (generator)", "3 nodes of a real federation", "95 % intervals"):
        assert words in page, words
    assert str(project.home) not in page and (project.reports / "index.html").read_text().count("digits_of_three") > 0
    again = project.fedgal("deploy", "report", folder, "--name", "digits_of_three")
    assert again.returncode == 0 and "cached" in again.stdout


def test_results_of_other_facts_or_examples_are_not_gone_on_from(federation):
    folder, steps = federation
    assert steps(until="when it gets the trained model")[1]
    assert "belongs to another run, with other facts, examples or fedgal; move" in steps(content="other")[1]
    manifest = folder / "server" / "result" / "20_train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"facts": "', '"facts": "0'))
    assert "belongs to another run, with other facts, examples or fedgal; move" in steps()[1]


def test_what_nodes_cannot_do_is_refused_before_anything_is_written_in_a_line_each(project):
    done = project.fedgal("deploy", "init", "here", "--params", "quickstart", "-p", "algorithm", "fedmps")
    assert done.returncode != 0 and not (project.away / "here").exists()
    for words in ("algorithm fedmps", "generator mlp needs teachers", "arm oracle needs real features that nobody has"):
        assert sum(words in line for line in done.stderr.splitlines()) == 1, done.stderr


def test_the_experiment_of_the_example_runs_as_a_simulation_too():
    values = yaml.safe_load((REPO / "params" / "federation_digits.yaml").read_text())
    assert "oracle" not in values["arms"] and os.path.exists(REPO / "nbs" / "stages" / "70_federation.ipynb")

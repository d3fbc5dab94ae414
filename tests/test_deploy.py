"""A real federation on loopback: TLS, registered nodes only, a node that is killed is named, and every stage gives the simulation's bytes."""
import os
import re
import socket
import threading
import time

import pytest
import torch
from conftest import REPO

from fedgal.core.errors import FedgalError
from fedgal.core.store import load_json, load_tensors

pytestmark = [pytest.mark.slow, pytest.mark.flower]
PATIENCE = 240
OVERRIDES = {"n_clients": 2, "rounds": 3, "algorithm": "scaffold", "generator": "gaussian", "arms": ["none", "gaussian"], "bank_per_class": 20,
             "rff_dim": 16, "finetune_rounds": 2, "finetune_steps": 3}


def free_ports(n):
    "The first of n ports in a row that nobody has."
    for port in range(9543, 12000, n):
        sockets = [socket.socket() for _ in range(n)]
        try:
            for i, s in enumerate(sockets): s.bind(("127.0.0.1", port + i))
            return port
        except OSError: continue
        finally:
            for s in sockets: s.close()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "A SuperLink with TLS that has registered the keys of two nodes, which run, and three others that it has to refuse."
    pytest.importorskip("flwr")
    from fedgal.pipeline.deploy import init, write_certificates, write_node_key
    from fedgal.pipeline.deploy_check import Processes, start_link, start_nodes
    with pytest.MonkeyPatch.context() as m:
        for name in ("PYTHONPATH", "FEDGAL_ROOT"): m.setenv(name, str(REPO))
        m.setenv("OMP_NUM_THREADS", "1")
        port = free_ports(6)
        folder = init(tmp_path_factory.mktemp("deploy") / "federation", REPO / "params" / "federation_digits.yaml", OVERRIDES, port)
        write_node_key(folder / "keys" / "stranger")
        write_certificates(folder / "other", ["localhost"])
        with Processes(folder) as processes:
            todo = start_link(processes, PATIENCE)
            start_nodes(processes, todo)
            for i, (name, command) in enumerate(strangers(todo["node 0"]).items()):
                processes.start(name, [*replaced(command, "--port", str(port + 3 + i)), "--max-retries", "1"])
            yield processes


def replaced(command, option, value):
    i = command.index(option)
    return [*command[:i + 1], value, *command[i + 2:]]


def strangers(command):
    "Commands of a node that differ from a right one in one thing each."
    i, j = command.index("--root-certificates"), command.index("--auth-supernode-private-key")
    return {"unregistered key": replaced(command, "--auth-supernode-private-key", "keys/stranger"),
            "other authority": replaced(command, "--root-certificates", "other/ca.crt"),
            "plain text": [*command[:i], *command[i + 2:j], *command[j + 2:], "--insecure"]}


def kill_in_round_2(processes):
    while "ROUND 1]" not in processes.log("node 1").read_text(): time.sleep(0.1)    # Flower counts from 0
    processes.running["node 1"].kill()


def test_a_node_that_is_killed_is_named_and_the_run_ends(processes):
    from fedgal.pipeline.deploy_check import run_app
    threading.Thread(target=kill_in_round_2, args=(processes,), daemon=True).start()
    with pytest.raises(FedgalError, match="client 1 is gone, in round 2; .*run again: it goes on"): run_app(processes, PATIENCE)
    assert processes.running["node 1"].wait(5) != 0


def by_call(facts, folder, home):
    "In place of the grid: the nodes are called."
    from fedgal.pipeline.deployed_node import DeployedNode, node_answer
    nodes = {k: DeployedNode(facts, {"client": k, "data": f"{folder}/data/node{k}.parquet", "home": f"{home}/{k}"}) for k in range(2)}
    return lambda what, sent, when: {k: node_answer(nodes[k], what, *message) for k, message in sent.items()}


def test_run_again_it_goes_on_through_all_stages(processes, tmp_path):
    from fedgal.federated.clients import MultiStepClient
    from fedgal.federated.facts import Federation, training_of
    from fedgal.federated.loop import fit
    from fedgal.pipeline.deploy import commands
    from fedgal.pipeline.deploy_check import run_app
    from fedgal.pipeline.deployed import own_data
    from fedgal.pipeline.deployed_server import run_steps
    folder, port = processes.folder, load_json(processes.folder / "deploy.json")["port"]
    processes.start("node 1", commands(folder, port, 2)["node 1"])
    totals = run_app(processes, PATIENCE)
    parts = [own_data(f"{folder}/data/node{k}.parquet") for k in range(2)]
    facts = load_json(folder / "app" / "federation" / "federation.json")
    t = training_of(facts, *parts[0])
    config, view = t.clients[0].config, t.clients[0].augment
    clients = [MultiStepClient(k, x, y, config, augment=view) for k, (x, y) in enumerate(parts)]
    here = fit(t.network, clients, t.options, t.seed, "serial", t.loss)
    there = folder / "result"
    model = load_tensors(there / "20_train" / "model.safetensors")
    assert model.keys() == here.parameters.keys() and all(torch.equal(v, here.parameters[n]) for n, v in model.items())
    assert load_json(there / "20_train" / "ledger.json")["totals"] == here.ledger.totals()
    called = Federation(facts, {k: len(y) for k, (_, y) in enumerate(parts)}, by_call(facts, folder, tmp_path / "home"), tmp_path / "result")
    assert totals == run_steps(called)      # that its bytes are those of the simulation is shown in 22b_deployed_server
    files = [p.relative_to(called.folder) for p in called.folder.rglob("*") if p.is_file()]
    assert len(files) > 15 and [f for f in files if (called.folder / f).read_bytes() != (there / f).read_bytes()] == []


def test_it_leaves_an_ordinary_report(processes, tmp_path, monkeypatch):
    from fedgal.pipeline.deploy_report import report
    for name, place in {"ARTIFACTS": tmp_path / "artifacts", "REPORTS": tmp_path / "reports"}.items(): monkeypatch.setenv(f"FEDGAL_{name}", str(place))
    assert report(processes.folder, "over_tls")["status"] == "finished"
    metrics, home = load_json(tmp_path / "reports" / "over_tls" / "metrics.json"), tmp_path / "reports" / "over_tls"
    assert sorted(metrics["arms"]) == ["gaussian", "none"] and "What each node sent" in (home / "index.html").read_text()


REFUSALS = {"unregistered key": "code: 2004. Failed to activate SuperNode", "other authority": "CERTIFICATE_VERIFY_FAILED", "plain text": "Server disconnected"}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_node_is_refused(name, processes):    # after the runs, while which they have tried
    node = processes.running[name]
    began = time.monotonic()
    while node.poll() is None and time.monotonic() - began < 60: time.sleep(0.5)
    log = processes.log(name).read_text()
    assert node.poll() not in (None, 0), log[-2000:]
    assert re.search(REFUSALS[name], log) and "SuperNode ID" not in log, log[-2000:]


def test_private_keys_are_their_owner_s_alone(processes):
    files = [*(processes.folder / "keys").glob("node?"), processes.folder / "certs" / "server.key"]
    assert len(files) == 3 and {os.stat(f).st_mode & 0o777 for f in files} == {0o600}

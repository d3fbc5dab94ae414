"""A real federation on loopback: TLS, registered nodes only, the model of `serial`, and a node that is killed is named."""
import socket
import threading
import time

import pytest
import torch

from fedgal.core.errors import FedgalError
from fedgal.core.store import load_json, load_tensors, save_json

pytestmark = [pytest.mark.slow, pytest.mark.flower]
PATIENCE = 240
OVERRIDES = {"n_clients": 2, "rounds": 2, "algorithm": "scaffold"}


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


@pytest.fixture
def folder(project, monkeypatch):
    "A federation of two nodes."
    pytest.importorskip("flwr")
    from fedgal.pipeline.deploy import init
    for name, value in project.env().items():
        if name.startswith("FEDGAL_"): monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(project.home))
    monkeypatch.setenv("FEDGAL_ROOT", str(project.home))
    import fedgal.pipeline.keys as keys
    monkeypatch.setattr(keys, "check_same_code", lambda: None)    # the tests' fedgal plans, the project's runs
    return init(project.home.parent / "federation", project.home / "params" / "quickstart.yaml", OVERRIDES, free_ports(4))


def test_the_model_is_that_of_serial(folder):
    from fedgal.federated.clients import MultiStepClient
    from fedgal.federated.loop import fit
    from fedgal.pipeline.deploy import check
    from fedgal.pipeline.deployed import own_data, training_of
    totals = check(folder, PATIENCE)
    facts = load_json(folder / "app" / "federation" / "federation.json")
    parts = [own_data(f"{folder}/data/node{k}.parquet") for k in range(2)]
    t = training_of(facts, *parts[0])
    config, view = t.clients[0].config, t.clients[0].augment
    here = fit(t.network, [MultiStepClient(k, x, y, config, augment=view) for k, (x, y) in enumerate(parts)], t.options, t.seed, "serial", t.loss)
    there = load_tensors(folder / "result" / "model.safetensors")
    assert there.keys() == here.parameters.keys() and all(torch.equal(v, there[n]) for n, v in here.parameters.items())
    assert totals == here.ledger.totals() and load_json(folder / "result" / "history.json") == here.history


def refused(folder, change):
    "What a node says that is started in another way than its command, once it has ended or has waited in vain."
    from fedgal.pipeline.deploy import Processes, start_link
    with Processes(folder) as processes:
        todo = start_link(processes, PATIENCE)
        node = processes.start("node 0", [*change(todo["node 0"]), "--max-retries", "1"])
        began = time.monotonic()
        while node.poll() is None and time.monotonic() - began < 60: time.sleep(1)
        joined = "SuperNode" in processes.log("superlink").read_text() and "connected" in processes.log("superlink").read_text()
        assert node.poll() not in (None, 0) and not joined, processes.said("node 0")
        return processes.log("node 0").read_text()


def replaced(command, option, value):
    i = command.index(option)
    return [*command[:i + 1], value, *command[i + 2:]]


def test_a_key_that_was_not_registered_is_refused(folder):
    from fedgal.pipeline.deploy import write_node_key
    write_node_key(folder / "keys" / "stranger")
    refused(folder, lambda c: replaced(c, "--auth-supernode-private-key", "keys/stranger"))


def test_another_authority_is_refused(folder):
    from fedgal.pipeline.deploy import write_certificates
    write_certificates(folder / "other", ["localhost"])
    refused(folder, lambda c: replaced(c, "--root-certificates", "other/ca.crt"))


def test_a_node_in_plain_text_is_refused(folder):
    def plain(command):
        i, j = command.index("--root-certificates"), command.index("--auth-supernode-private-key")
        return [*command[:i], *command[i + 2:j], *command[j + 2:], "--insecure"]
    refused(folder, plain)


def test_a_node_that_is_killed_is_named(folder, monkeypatch):
    from fedgal.pipeline import deploy
    facts = folder / "app" / "federation" / "federation.json"
    save_json(facts, load_json(facts) | {"params": load_json(facts)["params"] | {"rounds": 50}})
    start, killed = deploy.Processes.start, threading.Event()

    def kill(process):
        while not list((folder / "kept" / "1").glob("own-000001*")): time.sleep(0.2)    # in round 2
        process.kill()
        killed.set()

    def watched(self, name, command):
        process = start(self, name, command)
        if name == "node 1": threading.Thread(target=kill, args=(process,), daemon=True).start()
        return process

    monkeypatch.setattr(deploy.Processes, "start", watched)
    with pytest.raises(FedgalError, match="client 1"): deploy.check(folder, PATIENCE)
    assert killed.is_set()

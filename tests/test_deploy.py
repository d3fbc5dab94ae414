"""A real federation on one machine: TLS, registered nodes only, a node that is killed is named, and every stage gives the bytes of nodes that are called."""
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import REPO

from fedgal.core.errors import FedgalError
from fedgal.core.store import load_json, load_tensors

pytestmark = [pytest.mark.slow, pytest.mark.flower]
PATIENCE = 240
OVERRIDES = {"n_clients": 2, "rounds": 3, "algorithm": "scaffold", "generator": "gaussian", "arms": ["none", "gaussian"], "bank_per_class": 20,
             "rff_dim": 16, "finetune_rounds": 1, "finetune_steps": 3}


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


def own_address():
    "An address of this machine that other machines could use; none on a machine without a network."
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try: s.connect(("10.255.255.255", 1))    # sends nothing
        except OSError: return "127.0.0.1"
        return s.getsockname()[0]


ADDRESS = own_address()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "A SuperLink with TLS that has registered the keys of two nodes, which run, and three others that it has to refuse."
    pytest.importorskip("flwr")
    from fedgal.pipeline import deploy_check
    from fedgal.pipeline.deploy import commands, init, write_certificates, write_node_key
    from fedgal.pipeline.deploy_check import Processes, start_link, start_nodes
    with pytest.MonkeyPatch.context() as m:
        for name in ("PYTHONPATH", "FEDGAL_ROOT"): m.setenv(name, str(REPO))
        m.setenv("OMP_NUM_THREADS", "1")
        port = free_ports(6)
        place, params = tmp_path_factory.mktemp("deploy"), REPO / "params" / "federation_digits.yaml"
        folder = init(place / "federation", params, OVERRIDES, port, ADDRESS)
        m.setattr(deploy_check, "commands", lambda port, n, host: commands(port, n, ADDRESS))    # as from other machines
        write_node_key(folder / "server" / "stranger.key")
        write_certificates(folder / "server" / "other", ["localhost"])
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
    command = replaced(command, "--auth-supernode-private-key", "../node0/node.key")    # they start beside the server
    i, j = command.index("--root-certificates"), command.index("--auth-supernode-private-key")
    return {"unregistered key": replaced(command, "--auth-supernode-private-key", "stranger.key"),
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
    nodes = {k: DeployedNode(facts, {"client": k, "data": f"{folder}/node{k}/examples.parquet", "home": f"{home}/{k}"}) for k in range(2)}
    return lambda what, sent, when: {k: node_answer(nodes[k], what, *message) for k, message in sent.items()}


def test_run_again_it_goes_on_through_all_stages(processes, tmp_path):
    from fedgal.core.store import content_hash
    from fedgal.federated.clients import MultiStepClient
    from fedgal.federated.facts import Federation, own_data, training_of
    from fedgal.federated.loop import fit
    from fedgal.pipeline.deploy import commands
    from fedgal.pipeline.deploy_check import run_app
    from fedgal.pipeline.deployed_server import run_steps
    folder, port = processes.folder, load_json(processes.folder / "deploy.json")["port"]
    processes.start("node 1", commands(port, 2, ADDRESS)["node 1"])
    totals = run_app(processes, PATIENCE)
    asked = re.findall(r"ROUND (\d+)\].*\n.*Receiving: train message", processes.log("node 1").read_text())
    assert asked[:2] == ["0", "1"] and len(asked) == 2 + 3 + 2    # rounds 2 and 3 of training; model and two sums; an arm and its round
    parts = [own_data(f"{folder}/node{k}/examples.parquet") for k in range(2)]
    facts = load_json(folder / "server" / "app" / "federation" / "federation.json")
    t = training_of(facts, *parts[0])
    config, view = t.clients[0].config, t.clients[0].augment
    clients = [MultiStepClient(k, x, y, config, augment=view) for k, (x, y) in enumerate(parts)]
    here = fit(t.network, clients, t.options, t.seed, "serial", t.loss)
    result = folder / "server" / "result"
    there = load_tensors(result / "20_train" / "model.safetensors")
    assert there.keys() == here.parameters.keys() and all(torch.equal(v, there[n]) for n, v in here.parameters.items())
    assert load_json(result / "20_train" / "ledger.json")["totals"] == here.ledger.totals()
    assert load_json(result / "20_train" / "history.json") == here.history
    examples = {k: (len(y), content_hash(x, y)) for k, (x, y) in enumerate(parts)}
    called = Federation(facts, examples, by_call(facts, folder, tmp_path / "home"), tmp_path / "result")
    assert totals == run_steps(called)      # that its bytes are those of the simulation is shown in 22b_deployed_server
    files = [p.relative_to(called.folder) for p in called.folder.rglob("*") if p.is_file() and p.name != "manifest.json"]   # those hold hashes under secrets of the nodes
    assert len(files) > 15 and [f for f in files if (called.folder / f).read_bytes() != (result / f).read_bytes()] == []


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


def asked(processes, host, path):
    "The status of a request without a credential."
    port = load_json(processes.folder / "deploy.json")["port"]
    context = ssl.create_default_context(cafile=processes.folder / "server" / "ca.crt")
    try: return urllib.request.urlopen(f"https://{host}:{port}{path}", b"", 10, context=context).status
    except urllib.error.HTTPError as error: return error.code


@pytest.mark.skipif(ADDRESS.startswith("127."), reason="a machine without a network")
def test_other_machines_reach_nothing_but_what_nodes_call(processes):
    control = ("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-nodes", "/docs", "/health")
    assert {asked(processes, ADDRESS, path) for path in control} == {403}
    assert asked(processes, "127.0.0.1", "/v1/control/list-nodes") != 403
    assert asked(processes, ADDRESS, "/v1/fleet/pull-messages") in (400, 401, 415, 422)    # asks for a key


def test_what_is_private_is_its_owner_s_alone(processes):
    folder = processes.folder
    files = [folder / "server" / "server.key", *folder.glob("node?/node.key"), *folder.glob("node?/examples.parquet")]
    assert os.stat(folder / "server" / "test.parquet").st_mode & 0o777 == 0o600
    assert len(files) == 5 and {os.stat(f).st_mode & 0o777 for f in files} == {0o600}
    assert {os.stat(folder / name).st_mode & 0o777 for name in ("", "server", "node0", "node1")} == {0o700}

"""What the server of a real federation does with what nodes send, and with its files; without Flower's processes."""
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

from fedgal.core.errors import FedgalError
from fedgal.core.random import Runtime
from fedgal.core.store import load_json, save_json
from fedgal.data.parquet import Part
from fedgal.federated import facts as facts_of
from fedgal.federated.engines.nodes import Node, message_bytes, read_message
from fedgal.federated.loop import prepared
from fedgal.pipeline import deployed, deployed_server

FILE = REPO / "params" / "federation_digits.yaml"
SHORT = {"n_clients": 2, "rounds": 2, "algorithm": "fedgen"}


@pytest.fixture(scope="module")
def told():
    "Facts of training, and the examples of two clients."
    facts, parts, _ = deployed.facts_and_parts(FILE, SHORT)
    return facts | {"patience": 0.2, "params": {"20_train": facts["params"]["20_train"]}}, parts


def reply(error="", **told):
    lost = SimpleNamespace(reason=error)
    return SimpleNamespace(has_error=lambda: bool(error), error=lost, content={"client": told})


@pytest.fixture
def flower(monkeypatch):
    "A stand-in for Flower's grid whose nodes answer as a test says; `answers` is node -> reply, None for silence."
    stub = SimpleNamespace(ConfigRecord=dict, RecordDict=dict)
    monkeypatch.setitem(sys.modules, "flwr.app", stub)
    monkeypatch.setattr(deployed, "PAUSE", 0.01)

    def exchange(grid, nodes, contents, round, check=lambda waiting: None, kind="train", pause=0):
        while any(grid.answers[node] is None for node in nodes):
            check([i for i, node in enumerate(nodes) if grid.answers[node] is None])
        return [grid.answers[node] for node in nodes]

    monkeypatch.setattr(deployed, "exchange", exchange)
    return lambda answers: SimpleNamespace(answers=answers, get_node_ids=lambda: list(answers))


def here(k, n=5, content="c", fedgal=deployed_server.__version__):
    return reply(client=k, examples=n, content=content, fedgal=fedgal, torch="2", python="3")


def test_the_roll_call_takes_exactly_the_clients_of_the_federation(flower):
    assert deployed.roll_call(flower({70: here(1, 4), 71: here(0, 3)}), 2, 1.0) == {0: (71, 3, "c"), 1: (70, 4, "c")}
    for odd in ({1: here(0), 2: here(7), 3: here(9)}, {1: here(0), 2: here("x")}, {1: here(0), 2: here(2)}):
        with pytest.raises(FedgalError, match=r"node \d says that it is client .*, and there are 0\.\.1"):
            deployed.roll_call(flower(odd), 2, 1.0)
    with pytest.raises(FedgalError, match="two nodes say that they are client 0: 1 and 2"):
        deployed.roll_call(flower({1: here(0), 2: here(0)}), 2, 1.0)


@pytest.mark.parametrize("odd", [here(1, -3), here(1, 0), here(1, 2.5), here(1, True), here(1, "many"), here(1, content=7)])
def test_what_a_node_tells_of_its_examples_is_checked(flower, odd):
    with pytest.raises(FedgalError, match="^node 2 says as client 1 that it has .* examples with hash"):
        deployed.roll_call(flower({1: here(0), 2: odd}), 2, 1.0)


def test_a_node_with_another_fedgal_is_refused(flower):
    with pytest.raises(FedgalError, match="^node 2 has fedgal 0.0.9, torch 2, Python 3; here: "):
        deployed.roll_call(flower({1: here(0), 2: here(1, fedgal="0.0.9")}), 2, 1.0)


def test_the_roll_call_ends_where_a_node_is_silent(flower):
    with pytest.raises(FedgalError, match="1 of 2 nodes have not said within 0 s who they are"):
        deployed.roll_call(flower({1: here(0), 2: None}), 2, 0.05)


def test_a_node_s_own_error_is_told_as_it_is(flower):
    lost = "<class 'fedgal.core.errors.FedgalError'>:<'x.parquet: no such file'>"
    with pytest.raises(FedgalError, match="^node 2: x.parquet: no such file; see to its node") as caught:
        deployed.roll_call(flower({1: here(0), 2: reply(lost)}), 2, 1.0)
    assert "memory" not in str(caught.value) and "workers" not in str(caught.value)
    carrier = deployed.Carrier(flower({1: reply(lost)}), {0: (1, 5, "c")}, 1.0)
    with pytest.raises(FedgalError, match="^client 0: x.parquet: no such file"): carrier("train", {0: (b"", -1)}, "in round 1")
    with pytest.raises(FedgalError, match="client 0 answered without answer"):
        deployed.Carrier(flower({1: reply()}), {0: (1, 5, "c")}, 1.0)("train", {0: (b"", -1)}, "in round 1")


def test_where_the_server_and_a_node_compute(told, monkeypatch):
    facts, [part, _] = told
    monkeypatch.setattr(facts_of, "prepare", lambda: Runtime("meta", 1, "bf16"))    # a machine with another device
    node, server = facts_of.training_of(facts, *part), facts_of.training_of(facts, *part, "cpu")
    devices = [next(t.network.parameters()).device.type for t in (node, server)]
    assert devices == ["meta", "cpu"] and node.clients[0].config.precision == server.clients[0].config.precision == "fp32"


@pytest.fixture
def federation(told, tmp_path, monkeypatch):
    "A federation in this process: a function that runs it; `spoil` changes what client 1 answers in a round."
    facts, parts = told
    nodes = {}
    for k, part in enumerate(parts):
        t = facts_of.training_of(facts, *part)
        algorithm = t.options.make_algorithm()
        model, [client] = prepared(algorithm, t.network, [replace(t.clients[0], id=k)], t.loss)
        nodes[k] = Node(algorithm, model, client, t.seed, t.loss, tmp_path / str(k))
    rounds = []

    def run(content="c", spoil=lambda data: data):
        def carry(what, sent, when):
            assert what == "train"
            rounds.append(int(when.removeprefix("in round ")) - 1)
            return {k: spoil(nodes[k].answer(*m)) if k else nodes[k].answer(*m) for k, m in sent.items()}

        calls = {k: (70 + k, node.client.n_examples, content) for k, node in nodes.items()}
        monkeypatch.setattr(deployed, "roll_call", lambda *_: calls)
        monkeypatch.setattr(deployed, "Carrier", lambda *_: carry)
        return deployed.federate(None, facts, tmp_path / "result")

    run.rounds, run.result = rounds, tmp_path / "result"
    return run


def test_the_checkpoint_outlives_a_result_that_could_not_be_written(federation, monkeypatch):
    def full(*_): raise FedgalError("the disk is full")
    with monkeypatch.context() as m:
        m.setattr(deployed_server, "save_tensors", full)
        with pytest.raises(FedgalError, match="full"): federation()
    assert federation.rounds == [0, 1] and list((federation.result / "checkpoint" / "20_train").glob("round-*"))
    federation()
    assert federation.rounds == [0, 1] and (federation.result / "ledger.json").is_file()    # nothing was trained again
    assert not (federation.result / "checkpoint").exists()


def test_a_federation_is_not_resumed_with_other_data(federation, monkeypatch):
    def stop(data):
        if federation.rounds[-1]: raise FedgalError("stop")
        return data
    with pytest.raises(FedgalError, match="stop"): federation(spoil=stop)
    with pytest.raises(FedgalError, match="belongs to another run"): federation(content="other")
    federation()
    assert federation.rounds == [0, 1, 1]
    with monkeypatch.context() as m, pytest.raises(FedgalError, match="facts, examples or fedgal"):
        m.setattr(deployed_server, "__version__", "0.0.9")
        federation()


def test_a_second_run_in_the_same_folder_is_refused(federation):
    why = []

    def again(data):
        if not why:
            with pytest.raises(FedgalError, match="another run of this federation is at work in ") as caught: federation()
            why.append(str(caught.value))
        return data
    federation(spoil=again)
    assert len(why) == 1 and federation.rounds == [0, 1]
    federation()    # the lock ends with the run


def spoilt(data, **changes):
    payload, [update] = read_message(data, "a node")
    return message_bytes(payload, [replace(update, **changes)])


@pytest.mark.parametrize(("changes", "why"), [({"train_loss": "x"}, "what client 1 sent is no message of fedgal .*train_loss"),
                                              ({"statistics": None}, "do not answer alike: client 1 .* client 0 .*label_counts"),
                                              ({"terms": {"a": 1.0}}, "do not answer alike: client 1 .*'a'")])
def test_a_node_that_answers_otherwise_is_named(federation, changes, why):
    with pytest.raises(FedgalError, match=why): federation(spoil=lambda data: spoilt(data, **changes))


def test_whatever_ends_a_run_is_written_down(told, monkeypatch, tmp_path):
    stub = SimpleNamespace(ServerApp=lambda: SimpleNamespace(main=lambda: lambda function: function))
    mains = []
    stub.ServerApp = lambda: SimpleNamespace(main=lambda: mains.append)
    monkeypatch.setitem(sys.modules, "flwr.serverapp", stub)
    save_json(tmp_path / "facts.json", told[0])
    deployed.server_app(tmp_path / "facts.json")
    context = SimpleNamespace(run_config={"result": str(tmp_path / "result")})
    failed = tmp_path / "result" / "failed.json"

    def federate(*_): raise KeyError("label_counts")
    monkeypatch.setattr(deployed, "federate", federate)
    with pytest.raises(KeyError): mains[0](None, context)
    assert load_json(failed) == {"error": "KeyError: 'label_counts'"}
    monkeypatch.setattr(deployed, "federate", lambda *_: None)
    mains[0](None, context)
    assert not failed.exists()    # none beside a good result


@pytest.mark.parametrize(("stages", "why"), [(["10_data"], "stage 20_train is missing"), (["20_train"], "stage 10_data is missing"),
                                             (["10_data", "20_train", "61_models"], "stage 61_models does not run on nodes")])
def test_stages_that_cannot_work_are_refused(stages, why):
    from fedgal.pipeline.plan import plan
    params = plan(FILE, SHORT, "deploy").members[0].params
    with pytest.raises(FedgalError, match=why): deployed.check_deployable({stage: params.get(stage, {}) for stage in stages})


def test_what_is_not_deployed_is_refused(monkeypatch):
    with pytest.raises(FedgalError, match="is a sweep of .* runs; choose one"):
        deployed.facts_and_parts(REPO / "params" / "digits_levels.yaml")
    whole = deployed.make_split

    def one_is_empty(*args, **named):
        split = whole(*args, **named)
        return replace(split, train=[split.train[0][:0], *split.train[1:]])
    monkeypatch.setattr(deployed, "make_split", one_is_empty)
    with pytest.raises(FedgalError, match="clients 0 would have no examples"): deployed.facts_and_parts(FILE, SHORT)


@pytest.mark.parametrize("form", ["text", "hub", "function"])
def test_labels_with_names_are_the_federation_s_classes(form, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    classes, file = ["cat", "dog", "fox"], tmp_path / "own.parquet"
    if form == "text": table = pa.table({"a": [0.0, 1.0, 2.0], "label": ["dog", "fox", "fox"]})
    else: table = pa.table({"a": [0.0, 1.0, 2.0], "label": [1, 0, 0]})
    names = {"info": {"features": {"label": {"names": ["fox", "dog"]}}}}
    if form == "hub": table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, file)
    monkeypatch.setattr(facts_of, "USER_FUNCTION", SimpleNamespace(parts=lambda _: [Part(torch.rand(3, 1), torch.tensor([1, 0, 0]), ("fox", "dog"))]))
    source = "own:data" if form == "function" else str(file)
    assert facts_of.own_data(source, classes)[1].tolist() == [1, 2, 2]
    with pytest.raises(FedgalError, match="1 of 2 class names are none of the federation's: cat, dog") as caught:
        facts_of.own_data(source, classes[:2])
    assert "fox" not in str(caught.value) and "fox" in str(caught.value.__cause__)


def test_a_client_is_who_has_its_key(flower, tmp_path):
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")

    from fedgal.pipeline.deploy import write_node_key
    for k in range(2): write_node_key(tmp_path / f"node{k}.key")
    keys = deployed.node_keys(tmp_path, 3)
    pem = serialization.load_ssh_private_key((tmp_path / "node0.key").read_bytes(), None).public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert keys[0] == pem and sorted(keys) == [0, 1]


def test_nodes_that_have_changed_their_numbers_are_refused(flower):
    infos = [SimpleNamespace(node_id=1, public_key=b"a"), SimpleNamespace(node_id=2, public_key=b"b")]
    calls = []
    for first, second in ((0, 1), (1, 0)):
        grid = flower({1: here(first), 2: here(second)})
        grid.get_nodes = lambda: infos
        calls.append(lambda grid=grid: deployed.roll_call(grid, 2, 1.0, {0: b"a", 1: b"b"}))
    assert sorted(calls[0]()) == [0, 1]
    with pytest.raises(FedgalError, match="^node 1 says that it is client 1, and its key is not node1.pub"): calls[1]()


def test_the_report_of_a_federation_compares_nothing_where_nothing_was_learned():
    from fedgal.evaluation.headline import arms_answer
    cells, said = load_json(REPO / "nbs" / "stages" / "70_federation.ipynb")["cells"], []
    answer, = ["".join(c["source"]) for c in cells if "answer" in c["metadata"].get("tags", [])]
    accuracy = {"refit": 0.1, "generator": 0.1}
    plots = SimpleNamespace(all=None, group_bars=lambda *_, **named: ())
    exec(answer, {"display": said.append, "Markdown": str, "show": lambda *_: None, "plots": plots, "arms": accuracy, "accuracy": accuracy,
                  "generator": "safs", "together": accuracy, "sampling_error": lambda _: 0.1, "arms_answer": arms_answer,
                  "chance_flags": lambda results: dict.fromkeys(results, "chance")})
    assert said == ["**Answer.** Nothing was learned: no arm is better than guessing, so none can be compared; "
                    "see the training first: rounds, rate, and whether the columns of a table are scaled."]


@pytest.fixture
def node_app(told, monkeypatch, tmp_path):
    "The program of a node: what it answers to a question of the server; `kind` is query or train."
    facts, [part, _] = told
    apps = {}
    app = SimpleNamespace(query=lambda: lambda f: apps.setdefault("query", f), train=lambda: lambda f: apps.setdefault("train", f))
    monkeypatch.setitem(sys.modules, "flwr.clientapp", SimpleNamespace(ClientApp=lambda: app))
    monkeypatch.setitem(sys.modules, "flwr.app", SimpleNamespace(ConfigRecord=dict, RecordDict=dict, Message=lambda content, reply_to: content["client"]))
    monkeypatch.setattr(facts_of, "USER_FUNCTION", SimpleNamespace(parts=lambda _: [Part(*call.part)]))
    save_json(tmp_path / "facts.json", facts)
    deployed.client_app(tmp_path / "facts.json")

    def call(kind, config=(), **sent):
        config = {"client": 0, "data": "own:data", "home": str(tmp_path / "kept")} | dict(config)
        return apps[kind](SimpleNamespace(content={"client": sent}), SimpleNamespace(node_config=config))

    call.part, call.log = part, tmp_path / "kept" / "errors.log"
    return call


def test_the_words_of_a_row_stay_at_home(node_app, monkeypatch, tmp_path):
    from fedgal.data.user_function import UserFunction
    def function(): raise ValueError("row 3: Jane Roe, 41")
    import fedgal.data.user_function as uf
    monkeypatch.setattr(uf, "import_current", lambda _: SimpleNamespace(data=function))
    monkeypatch.setattr(facts_of, "USER_FUNCTION", UserFunction())
    with pytest.raises(FedgalError, match="^own:data: ValueError; its words are at the node$"): node_app("query")
    assert "Jane Roe" in node_app.log.read_text()
    monkeypatch.setattr(facts_of, "USER_FUNCTION", SimpleNamespace(parts=lambda _: function()))
    with pytest.raises(FedgalError, match=r"^its program has failed \(ValueError\); see errors.log") as caught: node_app("query")
    assert "Jane Roe" not in str(caught.value) and node_app.log.read_text().count("ValueError: row 3: Jane Roe") >= 2


def test_the_words_of_an_own_loss_stay_at_home(told, tmp_path):
    t = facts_of.training_of(told[0], *told[1][0])
    algorithm = t.options.make_algorithm()
    def loss(*_, **named): raise ValueError("Jane Roe, 41")
    model, [client] = prepared(algorithm, t.network, t.clients, t.loss)
    start = message_bytes(facts_of.payload_from(model))
    _, [update] = read_message(Node(algorithm, model, client, t.seed, loss, tmp_path).answer(start, -1), "client 0")
    assert update.failure == "ValueError" and "Jane Roe" in (tmp_path / "errors.log").read_text()


def test_nobody_else_can_try_examples_against_the_hash(node_app, tmp_path):
    from fedgal.core.store import content_hash
    me, other = node_app("query"), node_app("query", {"home": str(tmp_path / "other")})
    assert me == node_app("query") and me["content"] not in (other["content"], content_hash(*node_app.part))


def test_examples_that_have_changed_since_the_roll_call_are_not_mixed_in(node_app, told, flower, monkeypatch):
    facts, parts = told
    t = facts_of.training_of(facts, *parts[0])
    model, _ = prepared(t.options.make_algorithm(), t.network, t.clients, t.loss)
    data = message_bytes(facts_of.payload_from(model))

    def exchange(grid, nodes, contents, *_, **named):
        return [reply(**node_app("train", **c["client"])) for c in contents]
    flower({})
    monkeypatch.setattr(sys.modules["flwr.app"], "Message", lambda content, reply_to: content["client"], raising=False)
    monkeypatch.setattr(deployed, "exchange", exchange)
    me = node_app("query")
    carrier = deployed.Carrier(None, {0: (7, me["examples"], me["content"])}, 1.0)
    assert carrier("keep", {0: (data, -1)}, "in round 1")[0]
    node_app.part = parts[1]
    with pytest.raises(FedgalError, match="^the examples of client 0 have changed since the run began"): carrier("keep", {0: (data, -1)}, "in round 1")


def test_a_node_refuses_a_server_with_other_facts(node_app, told, tmp_path):
    own = tmp_path / "own.json"
    save_json(own, told[0] | {"patience": 9.0})
    assert node_app("query", {"facts": str(own)})["client"] == 0
    save_json(own, told[0] | {"params": {"20_train": told[0]["params"]["20_train"] | {"rounds": 99}}})
    with pytest.raises(FedgalError, match="the server's facts are not what this node agreed to; they differ in params"):
        node_app("query", {"facts": str(own)})


def test_deploy_completes_what_it_does(capsys):
    from fedgal import cli
    cli.main(["completion"])
    line, = [line for line in capsys.readouterr().out.splitlines() if "*:deploy)" in line]
    assert "init check report" in line and "10_data" not in line


# the folder of a deployment, and the processes that check it

@pytest.fixture
def written(monkeypatch):
    "A function that writes a federation of two clients with few examples."
    pytest.importorskip("cryptography")
    from fedgal.pipeline import deploy

    def write(folder, x=torch.zeros(4, 1, 8, 8, dtype=torch.uint8), **more):
        facts, data = {"n_clients": 2}, SimpleNamespace(x_test=x, y_test=torch.arange(4))
        monkeypatch.setattr(deploy, "facts_and_parts", lambda *_: (facts, [(x, torch.arange(4))] * 2, data))
        return deploy.init(folder, FILE, **more)

    return write


def test_examples_that_cannot_be_written_leave_nothing_behind(written, tmp_path):
    for x in (torch.rand(4, 1, 8, 8), torch.rand(4, 6, 8)):
        with pytest.raises(FedgalError, match="deploy takes images of bytes"): written(tmp_path / "f", x)
        assert not list(tmp_path.iterdir())
    assert sorted(p.name for p in written(tmp_path / "f").iterdir()) == ["README.md", "deploy.json", "node0", "node1", "server"]


def test_a_host_is_a_name_or_an_address_of_the_old_form(monkeypatch, tmp_path):
    from fedgal.pipeline import deploy
    def facts_and_parts(*_): raise FedgalError("it goes on")
    monkeypatch.setattr(deploy, "facts_and_parts", facts_and_parts)
    for host in ("::1", "fe80::1", "[::1]", "a.org:9443", "https://a.org", "", "a b", "10.1.2", "-a.org", "1.2.3.400"):
        with pytest.raises(FedgalError, match="a name or an IPv4 address"): deploy.init(tmp_path / "f", FILE, host=host)
    for host in ("localhost", "a.example.org", "my-server_2", "192.168.1.10", "10.0.0.1"):
        with pytest.raises(FedgalError, match="it goes on"): deploy.init(tmp_path / "f", FILE, host=host)


def test_a_party_s_folder_works_where_it_is_put(written, tmp_path):
    import tomllib
    folder = written(tmp_path / "f", host="192.168.1.10", patience=700.0)
    for file in (f for f in folder.rglob("*") if f.is_file() and f.name != "config.toml"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    readme = (folder / "node1" / "README.md").read_text()
    assert "--superlink 192.168.1.10:9443" in readme and "export FLWR_HOME=\"$PWD/flwr\"" in readme and "module:function" in readme
    for word in ("--host 0.0.0.0", "node0.pub", "programs on every node"):
        assert any(word in (folder / name / "README.md").read_text() for name in ("", "server")), word
    app = tomllib.loads((folder / "server" / "app" / "pyproject.toml").read_text())
    extra = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]["flower"]
    assert app["project"]["dependencies"] == [extra[0].replace("[simulation]", "")] and extra[0].startswith("flwr")
    assert load_json(folder / "server" / "app" / "federation" / "federation.json")["patience"] == 700.0
    agreed = load_json(folder / "node1" / "federation.json")
    assert agreed | {"patience": 700.0} == load_json(folder / "server" / "app" / "federation" / "federation.json") and 'facts="federation.json"' in readme
    private = {name: {p.name for p in (folder / name).iterdir()} for name in ("server", "node0")}
    assert "server.key" not in private["node0"] and not [n for n in private["server"] if n.startswith("node") and n.endswith("key")]


def test_an_address_is_an_address_in_the_certificate(written, tmp_path):
    x509 = pytest.importorskip("cryptography.x509")
    for host, names, addresses in (("192.168.1.10", ["localhost"], ["192.168.1.10", "127.0.0.1", "::1"]),
                                   ("a.example.org", ["a.example.org", "localhost"], ["127.0.0.1", "::1"])):
        folder = written(tmp_path / host, host=host)
        certificate = x509.load_pem_x509_certificate((folder / "server" / "server.pem").read_bytes())
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert found.get_values_for_type(x509.DNSName) == names
        assert [str(a) for a in found.get_values_for_type(x509.IPAddress)] == addresses


def test_what_is_private_is_so_from_the_first_byte_on(written, tmp_path, monkeypatch):
    modes, write = {}, os.open

    def watched(path, flags, mode=0o777, **named):
        handle = write(path, flags, mode, **named)
        modes[Path(path).name] = os.fstat(handle).st_mode & 0o777
        return handle
    monkeypatch.setattr(os, "open", watched)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    before = os.umask(0)
    try: folder = written(tmp_path / "f")
    finally: os.umask(before)
    for name in ("server.key", "node.key", "examples.parquet"):
        assert modes[name] == 0o600 and {f.stat().st_mode & 0o777 for f in folder.rglob(name)} == {0o600}, name
    assert {(folder / name).stat().st_mode & 0o777 for name in ("", "server", "node0")} == {0o700}


def test_a_check_that_cannot_start_ends_nobody_else_s_processes(tmp_path):
    from fedgal.pipeline.deploy import environment
    from fedgal.pipeline.deploy_check import check
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        save_json(tmp_path / "deploy.json", {"port": s.getsockname()[1], "n_clients": 2, "patience": 1.0})
        homes = [environment(place) for place in (tmp_path, tmp_path / "server")]
        others = [subprocess.Popen(["sleep", "60"], env={**os.environ, **home}) for home in homes]
        try:
            with pytest.raises(FedgalError, match="is taken"): check(tmp_path)
            time.sleep(0.2)
            assert [p.poll() for p in others] == [None, None]
        finally:
            for p in others: p.kill()


def test_a_check_leaves_the_folders_of_the_parties_as_they_were(monkeypatch, tmp_path):
    from fedgal.core.store import commit
    from fedgal.pipeline import deploy_check, deploy_report
    save_json(tmp_path / "deploy.json", {"port": 1, "n_clients": 1, "patience": 1.0})
    save_json(tmp_path / "server" / deploy_report.FACTS, {})
    save_json(tmp_path / "server" / "test.parquet", {})
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())

    def run_app(processes, patience):
        result = processes.folder / "server" / "result"
        assert not result.exists() and not (processes.folder / "node0" / "kept").exists()
        save_json(result / "ledger.json", {})
        save_json(result / "part" / "x.json", {})
        commit(result / "part", result / "20_train")
        save_json(processes.folder / "node0" / "kept" / "own.json", {})
    for name, stub in (("run_app", run_app), ("start_nodes", lambda *_: None), ("start_link", lambda *_: None)): monkeypatch.setattr(deploy_check, name, stub)
    for _ in range(2):
        deploy_check.check(tmp_path)
        assert sorted(p for p in tmp_path.rglob("*") if p.is_file() and "check" not in p.parts) == before
    monkeypatch.setenv("FEDGAL_ARTIFACTS", str(tmp_path / "artifacts"))
    assert (deploy_report.take_in(tmp_path, "two") / "result" / "20_train" / "x.json").is_file()
    save_json(tmp_path / "node0" / "kept" / "own.json", {})
    with pytest.raises(FedgalError, match=r"holds a run already \(node0/kept\)"): deploy_check.check(tmp_path)
    assert (tmp_path / "node0" / "kept" / "own.json").is_file()


def test_a_command_that_does_not_end_is_a_line(tmp_path):
    from fedgal.pipeline.deploy_check import Processes, run_app
    with Processes(tmp_path) as processes:
        processes.start = lambda *_: processes.running.setdefault("run", subprocess.Popen(["sleep", "60"]))
        processes.log("run").write_text("waits")
        with pytest.raises(FedgalError, match="^run has not ended within 0 s: waits$"): run_app(processes, 0.05)


def test_what_is_limited_is_silence_and_not_the_run(tmp_path):
    from fedgal.pipeline.deploy_check import Processes, wait_until
    with Processes(tmp_path) as processes:
        processes.running["superlink"] = subprocess.Popen(["sleep", "60"])
        began = time.monotonic()
        rounds = lambda: min(int(time.monotonic() - began), 2)    # a sign of life each second, twice
        wait_until(lambda: time.monotonic() - began > 2.5, processes, 1.6, "no result", rounds)
        with pytest.raises(FedgalError, match="no result within 1 s"):
            wait_until(lambda: False, processes, 0.6, "no result", rounds)


def test_the_command_line_sets_how_long_is_waited(monkeypatch, tmp_path):
    from fedgal import cli
    from fedgal.pipeline import deploy, deploy_check
    got = []
    totals = {"messages_down": 1, "messages_up": 1, "down": 1, "up": 1}
    monkeypatch.setattr(deploy, "init", lambda *args: got.append(args[-1]) or tmp_path)
    monkeypatch.setattr(deploy_check, "check", lambda *args: got.append(args[-1]) or totals)
    for what in ("init", "check"):
        for more in ([], ["--patience", "1200"]): cli.main(["deploy", what, "f", *more])
    assert got == [300.0, 1200.0, None, 1200.0]

"""What the server of a real federation does with what nodes send, and with its files; without Flower's processes."""
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import REPO

from fedgal.core.errors import FedgalError
from fedgal.core.random import Runtime
from fedgal.core.store import load_json, save_json
from fedgal.federated.engines.nodes import Node, message_bytes, read_message
from fedgal.federated.loop import prepared
from fedgal.pipeline import deployed

FILE = REPO / "params" / "quickstart.yaml"
SHORT = {"n_clients": 2, "rounds": 2, "algorithm": "fedgen"}


@pytest.fixture(scope="module")
def told():
    "Facts and the examples of two clients."
    facts, parts = deployed.facts_and_parts(FILE, SHORT)
    return facts | {"patience": 0.2}, parts


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


def here(k, n=5, content="c"):
    return reply(client=k, examples=n, content=content)


def test_the_roll_call_takes_exactly_the_clients_of_the_federation(flower):
    assert deployed.roll_call(flower({70: here(1, 4), 71: here(0, 3)}), 2, 1.0) == {0: (71, 3, "c"), 1: (70, 4, "c")}
    for odd in ({1: here(0), 2: here(7), 3: here(9)}, {1: here(0), 2: here("x")}, {1: here(0), 2: here(2)}):
        with pytest.raises(FedgalError, match=r"a node says that it is client .*, and there are 0\.\.1"):
            deployed.roll_call(flower(odd), 2, 1.0)
    with pytest.raises(FedgalError, match="two nodes say that they are client 0"):
        deployed.roll_call(flower({1: here(0), 2: here(0)}), 2, 1.0)


def test_the_roll_call_ends_where_a_node_is_silent(flower):
    with pytest.raises(FedgalError, match="1 of 2 nodes have not said within 0 s who they are"):
        deployed.roll_call(flower({1: here(0), 2: None}), 2, 0.05)


def test_a_node_s_own_error_is_told_as_it_is(flower):
    lost = "<class 'fedgal.core.errors.FedgalError'>:<'x.parquet: no such file'>"
    with pytest.raises(FedgalError, match="^node 2: x.parquet: no such file; see to its node") as caught:
        deployed.roll_call(flower({1: here(0), 2: reply(lost)}), 2, 1.0)
    assert "memory" not in str(caught.value) and "workers" not in str(caught.value)
    carrier = deployed.Carrier(flower({1: reply(lost)}), {0: 1}, 1.0)
    with pytest.raises(FedgalError, match="^client 0: x.parquet: no such file"): carrier({0: (b"", -1)}, 0)
    with pytest.raises(FedgalError, match="client 0 answered without answer"):
        deployed.Carrier(flower({1: reply()}), {0: 1}, 1.0)({0: (b"", -1)}, 0)


def test_where_the_server_and_a_node_compute(told, monkeypatch):
    facts, [part, _] = told
    monkeypatch.setattr(deployed, "prepare", lambda: Runtime("meta", 1, "bf16"))    # a machine with another device
    node, server = deployed.training_of(facts, *part), deployed.training_of(facts, *part, "cpu")
    devices = [next(t.network.parameters()).device.type for t in (node, server)]
    assert devices == ["meta", "cpu"] and node.clients[0].config.precision == server.clients[0].config.precision == "fp32"


@pytest.fixture
def federation(told, tmp_path, monkeypatch):
    "A federation in this process: a function that runs it; `spoil` changes what client 1 answers in a round."
    facts, parts = told
    nodes = {}
    for k, part in enumerate(parts):
        t = deployed.training_of(facts, *part)
        algorithm = t.options.make_algorithm()
        model, [client] = prepared(algorithm, t.network, [replace(t.clients[0], id=k)], t.loss)
        nodes[k] = Node(algorithm, model, client, t.seed, t.loss, tmp_path / str(k))
    rounds = []

    def run(content="c", spoil=lambda data: data):
        def carry(sent, round):
            rounds.append(round)
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
        m.setattr(deployed, "save_tensors", full)
        with pytest.raises(FedgalError, match="full"): federation()
    assert federation.rounds == [0, 1] and list((federation.result / "checkpoint").glob("round-*"))
    federation()
    assert federation.rounds == [0, 1] and (federation.result / "ledger.json").is_file()    # nothing was trained again
    assert not (federation.result / "checkpoint").exists()


def test_a_federation_is_not_resumed_with_other_data(federation):
    def stop(data):
        if federation.rounds[-1]: raise FedgalError("stop")
        return data
    with pytest.raises(FedgalError, match="stop"): federation(spoil=stop)
    with pytest.raises(FedgalError, match="belongs to another run"): federation(content="other")
    federation()
    assert federation.rounds == [0, 1, 1]


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


def test_what_is_not_deployed_is_refused(monkeypatch):
    with pytest.raises(FedgalError, match="is a sweep of .* runs; choose one"):
        deployed.facts_and_parts(REPO / "params" / "digits_levels.yaml")
    whole = deployed.make_split

    def one_is_empty(*args, **named):
        split = whole(*args, **named)
        return replace(split, train=[split.train[0][:0], *split.train[1:]])
    monkeypatch.setattr(deployed, "make_split", one_is_empty)
    with pytest.raises(FedgalError, match="clients 0 would have no examples"): deployed.facts_and_parts(FILE, SHORT)

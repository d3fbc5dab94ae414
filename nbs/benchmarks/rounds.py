"""One federated round in many ways, each a process of its own: `python rounds.py PROBLEM WAY`, a `Problem` as JSON.

Answers each line of its input, a number of rounds, with their seconds and the accuracy on test images. A notebook
beside it starts the ways and asks them in turn: see `Ways`.
"""
import asyncio
import cProfile
import functools
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from torch import nn

from fedgal.core.random import np_stream, stream
from fedgal.core.show import show
from fedgal.data.datasets import load_dataset
from fedgal.data.transforms import to_float
from fedgal.federated.clients import MultiStepClient
from fedgal.federated.engines.base import ENGINES
from fedgal.federated.engines.flower import Simulation, quiet_flower, ray_arguments
from fedgal.federated.local import LocalOptions
from fedgal.federated.loop import prepared, run_round, start_state
from fedgal.federated.state import FederationOptions, choose
from fedgal.models.networks import build_model

LOOP, TWO, OWN, PFL = "plain loop", "two loops at once", "Flower's FedAvg", "pfl"  # the ways beside the engines


@dataclass(frozen=True)
class Problem:
    "A federation that every way can run."

    dataset: str  # "noise": random images of the shape of MNIST, for which a round takes as long
    network: str  # an entry of `MODELS`, or "logistic"
    n_clients: int
    per_client: int  # samples of each, or their mean where sizes differ
    active: int  # clients in a round
    lr: float = 0.05
    batch_size: int = 10
    skewed: bool = False  # sizes are log-normal

    @functools.cached_property
    def data(self):
        "Training images, labels, test images, labels."
        if self.dataset != "noise":
            d = load_dataset(self.dataset)
            return d.x_train, d.y_train, d.x_test, d.y_test
        x = torch.randint(0, 256, (2000, 1, 28, 28), generator=stream(0, "noise"), dtype=torch.uint8)
        y = torch.arange(2000) % 10
        return x, y, x[:100], y[:100]

    @functools.cached_property
    def parts(self):
        "Rows of the training images that each client has; where there are too few, images are used again."
        n, sizes = len(self.data[1]), [self.per_client] * self.n_clients
        if self.skewed:
            drawn = np_stream(0, "sizes").lognormal(0, 1, self.n_clients)
            sizes = [max(self.batch_size, round(self.per_client * s / drawn.mean())) for s in drawn]
        shuffles = range(math.ceil(sum(sizes) / n))
        rows = torch.cat([torch.randperm(n, generator=stream(0, "rows", i)) for i in shuffles])
        return rows[: sum(sizes)].split(sizes)

    def chosen(self, round):
        "The clients of a round."
        return choose(self.n_clients, self.active / self.n_clients, 0, round)

    def model(self):
        "The network as fedgal has it; every way starts from the same weights."
        shape = tuple(self.data[0].shape[1:])
        if self.network != "logistic":
            return build_model(self.network, shape, 10, generator=stream(0, "model"))
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 10))

    def bare(self):
        "The same from images to logits, without the projector that no other way would carry."
        model = self.model()
        return model if isinstance(model, nn.Sequential) else nn.Sequential(model.low, model.high, model.head)


# --- by hand ---


def train(net, x, y, problem):
    "A client's pass over its images, as an introduction to PyTorch has it."
    optimiser = torch.optim.SGD(net.parameters(), problem.lr)
    for i in torch.randperm(len(y)).split(problem.batch_size):
        optimiser.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimiser.step()


class Loop:
    "FedAvg without a library."

    def __init__(self, problem, channels_last=False, part=slice(None)):
        self.problem, self.part, self.net = problem, part, problem.bare()
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.weights = {n: t.clone() for n, t in self.net.state_dict().items()}
        self.held = problem.data, problem.parts

    def round(self, number):
        (x, y, *_), parts = self.held
        chosen = self.problem.chosen(number)[self.part]
        total, size = {n: torch.zeros_like(t) for n, t in self.weights.items()}, sum(len(parts[k]) for k in chosen)
        for k in chosen:
            self.net.load_state_dict(self.weights)
            train(self.net, to_float(x[parts[k]]), y[parts[k]], self.problem)
            for n, t in self.net.state_dict().items():
                total[n].add_(t, alpha=len(parts[k]) / size)
        self.weights = total

    def network(self):
        self.net.load_state_dict(self.weights)
        return self.net


class TwoLoops:
    "The bound for two processes: each trains every other client, and they send each other nothing."

    def __init__(self, problem):
        fork = multiprocessing.get_context("fork")
        self.pipes, self.loop = [], Loop(problem, channels_last=True)
        for half in (0, 1):
            ours, theirs = fork.Pipe()
            loop = Loop(problem, True, slice(half, None, 2))
            fork.Process(target=self._serve, args=(loop, theirs), daemon=True).start()
            self.pipes.append(ours)

    @staticmethod
    def _serve(loop, pipe):
        while True:
            loop.round(pipe.recv())
            pipe.send(0)

    def round(self, number):
        for pipe in self.pipes:
            pipe.send(number)
        for pipe in self.pipes:
            pipe.recv()

    def network(self):
        return None


# --- by fedgal ---


class Engine:
    "Rounds as `fit` runs them: messages, checks, ledger."

    def __init__(self, problem, engine):
        x, y, *_ = problem.data
        local = LocalOptions(batch_size=problem.batch_size, lr=problem.lr)
        clients = [MultiStepClient(k, x, y, local, index=rows) for k, rows in enumerate(problem.parts)]
        self.options = FederationOptions(rounds=10**6, participation=problem.active / problem.n_clients)
        algorithm = self.options.make_algorithm()
        self.model, self.clients = prepared(algorithm, problem.model(), clients)
        self.state, self.engine = start_state(algorithm, self.model, self.clients, 0), ENGINES.make(engine)

    def round(self, number):
        self.state, _ = run_round(self.state, self.model, self.clients, self.options, 0, self.engine)

    def network(self):
        self.model.load_state_dict({**self.state.payload.parameters, **self.state.payload.buffers})
        return self.model


# --- by Flower ---


@functools.cache
def held(text):
    "A problem and its network, once for an actor."
    problem = Problem(**json.loads(text))
    return problem, problem.bare()


def answer(message, context):
    "What a client of Flower does with a message."
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    problem, net = held(message.content["config"]["problem"])
    rows = problem.parts[context.node_config["partition-id"]]
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(net, to_float(problem.data[0][rows]), problem.data[1][rows], problem)
    metrics = MetricRecord({"num-examples": len(rows)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


class OwnClients(Simulation):
    "A simulation of Flower whose clients are `answer`."

    def _run(self, nodes, actors):
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation

        server, client = ServerApp(), ClientApp()
        server.main()(self._serve)
        client.train()(answer)
        backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": ray_arguments(actors)}
        try:
            run_simulation(server, client, nodes, backend_config=backend)
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()


class FlowersOwn:
    "Flower's simulation with its own FedAvg: a node for each client, an actor for each core, no evaluation."

    def __init__(self, problem):
        quiet_flower(Path(tempfile.mkdtemp()))
        from flwr.app import ArrayRecord, ConfigRecord
        from flwr.serverapp.strategy import FedAvg

        self.simulation = OwnClients(problem.n_clients, len(os.sched_getaffinity(0)))
        counts = {"min_train_nodes": problem.active, "min_available_nodes": problem.n_clients}
        share = problem.active / problem.n_clients
        self.strategy = FedAvg(fraction_train=share, fraction_evaluate=0.0, **counts)
        self.net = problem.bare()
        self.arrays = ArrayRecord(self.net.state_dict())
        self.config = ConfigRecord({"problem": json.dumps(asdict(problem))})

    def round(self, number):
        grid = self.simulation.grid
        done = self.strategy.start(grid, self.arrays, num_rounds=1, timeout=3600, train_config=self.config)
        self.arrays = done.arrays

    def network(self):
        self.net.load_state_dict(self.arrays.to_torch_state_dict())
        return self.net


# --- by pfl-research, in an environment of its own, whose interpreter FEDGAL_PFL names ---


class WithLoss(nn.Module):
    "What pfl asks of a network."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def loss(self, x, y, eval=False):
        return F.cross_entropy(self.net(x), y)

    def metrics(self, x, y):
        return {}


class Pfl:
    "Users one after another in one process, the model never made anew."

    def __init__(self, problem):
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.aggregate.weighting import WeightByDatapoints
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.data.dataset import Dataset
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.data.sampling import get_user_sampler
        from pfl.hyperparam import NNTrainHyperParams
        from pfl.model.pytorch import PyTorchModel

        self.net, (x, y, *_) = WithLoss(problem.bare()), problem.data

        def of_user(k):
            rows = problem.parts[k]
            rows = rows[torch.randperm(len(rows))]
            return Dataset([to_float(x[rows]), y[rows]])

        users = FederatedDataset(of_user, get_user_sampler("minimize_reuse", list(range(problem.n_clients))))
        backend = SimulatedBackend(users, None, [WeightByDatapoints()])
        model = PyTorchModel(self.net, torch.optim.SGD, torch.optim.SGD(self.net.parameters(), 1.0))
        rounds = NNAlgorithmParams(10**9, 10**9, problem.active, None)
        local = NNTrainHyperParams(problem.batch_size, 1, problem.lr)
        self.turns, self.done = (threading.Semaphore(0) for _ in range(2))
        given = (FederatedAveraging(), rounds, backend, model, local)
        threading.Thread(target=self._run, args=given, daemon=True).start()
        self.done.acquire()

    def _run(self, algorithm, *given):
        asyncio.set_event_loop(asyncio.new_event_loop())  # pfl asks for that of its thread
        try:
            algorithm.run(*given, callbacks=[self._callback()])
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _callback(self):
        "What pfl calls before the first iteration and after each: the next waits for its turn."
        from pfl.callback.base import TrainingProcessCallback
        from pfl.metrics import Metrics

        def wait():
            self.done.release()
            self.turns.acquire()
            return Metrics()

        class InTurns(TrainingProcessCallback):
            def on_train_begin(self, *, model):
                return wait()

            def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
                return False, wait()

        return InTurns()

    def round(self, number):
        self.turns.release()
        self.done.acquire()

    def network(self):
        return self.net.net


# --- all of them ---


def make(way, problem):
    "A way by its name."
    hand = {LOOP: Loop, f"{LOOP}, channels last": functools.partial(Loop, channels_last=True), TWO: TwoLoops}
    if way in hand:
        return hand[way](problem)
    return {OWN: FlowersOwn, PFL: Pfl}[way](problem) if way in (OWN, PFL) else Engine(problem, way)


def accuracy(net, problem):
    "On test images; None for a way that has no network of its own."
    if net is None:
        return None
    _, _, x, y = problem.data
    with torch.inference_mode():
        out = [net.eval()(to_float(part)) for part in x.split(1000)]
    net.train()
    return (torch.cat([getattr(o, "logits", o) for o in out]).argmax(1) == y).float().mean().item()


def main():
    "Answer the lines of the input; whatever others print goes to the errors."
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    problem = Problem(**json.loads(sys.argv[1]))
    way, number = make(sys.argv[2], problem), 0
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            way.round(number)
            number += 1
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "accuracy": accuracy(way.network(), problem)}), file=out, flush=True)
    os._exit(0)


class Way:
    "A process that runs one way, stopped while it is not asked."

    def __init__(self, problem, way):
        self.errors = tempfile.TemporaryFile("w+")
        python = os.environ["FEDGAL_PFL"] if way == PFL else sys.executable
        command = [python, __file__, json.dumps(asdict(problem)), way]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONPATH": path})
        self.peak = 0.0

    def tree(self):
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def each(self, name):
        "Suspend, resume or kill it with all that it has started."
        for process in self.tree():
            try:
                getattr(process, name)()
            except psutil.NoSuchProcess:
                pass

    def watch(self, over):
        "Note the most memory that all its processes have: what each has alone, and once what the largest share."
        while not over.wait(0.3):
            alone, shared = 0, [0]
            for process in self.tree():
                try:
                    info = process.memory_full_info()
                except psutil.NoSuchProcess:
                    continue
                alone += info.uss
                shared.append(info.rss - info.uss)
            self.peak = max(self.peak, (alone + max(shared)) / 2**20)

    def ask(self, rounds):
        "Run some rounds: seconds and accuracy."
        self.process.stdin.write(f"{rounds}\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            self.errors.seek(0)
            raise RuntimeError(self.errors.read()[-2000:])
        return json.loads(line)


class Ways:
    "Several ways, asked in turn, each alone at work; the memory is that of the first round."

    def __init__(self, ways):  # name -> (problem, way)
        self.given, self.running, self.rows, self.last = ways, {}, [], {}

    def __enter__(self):
        try:
            for name in self.given:
                self._start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for way in self.running.values():
            way.each("kill")

    def _start(self, name):
        "Start a way and run its first round, which does not count."
        way = self.running[name] = Way(*self.given[name])
        self._watched(way)
        way.each("suspend")

    def _watched(self, way):
        over = threading.Event()
        thread = threading.Thread(target=way.watch, args=(over,))
        thread.start()
        try:
            way.ask(1)
        finally:
            over.set()
            thread.join()

    def run(self, repeats, rounds=1):
        "Passes, every other one in the opposite order: seconds of a round, a row a pass."
        for number in range(repeats):
            row = {}
            for name in list(self.running)[:: -1 if number % 2 else 1]:
                way = self.running[name]
                way.each("resume")
                self.last[name] = way.ask(rounds)
                row[name] = self.last[name]["seconds"] / rounds
                way.each("suspend")
            self.rows.append(row)
        return pd.DataFrame(self.rows)[list(self.running)]

    def table(self, seconds, active):
        "Seconds of a round, their ratio to the first way in the same pass, what a client costs above it, memory."
        ratios, above = (f(seconds.iloc[:, 0], axis=0) for f in (seconds.div, seconds.sub))
        columns = {"s a round": seconds.median(), "ratio": ratios.median(), "lowest": ratios.min()}
        columns |= {"highest": ratios.max(), "ms above it, a client": 1e3 * above.median() / active}
        accuracies = {name: answer["accuracy"] for name, answer in self.last.items()}
        columns |= {"accuracy": pd.Series(accuracies, dtype=float)}
        return pd.DataFrame(columns | {"peak MiB": pd.Series({n: w.peak for n, w in self.running.items()})})


def has_flower():
    "Whether the extra is installed."
    return all(importlib.util.find_spec(name) for name in ("flwr", "ray"))


def of_flower():
    "The two ways that need the extra; says so where it is not installed."
    if not has_flower():
        print("flower is not installed, so its rows are missing: pip install -c constraints.txt -e '.[flower]'")
    return ["flower", OWN] if has_flower() else []


def of_pfl():
    "The way that needs pfl-research; says so where there is none."
    python = os.environ.get("FEDGAL_PFL")
    if not python:
        print("FEDGAL_PFL names no interpreter with pfl, so its row is missing")
        return []
    told = subprocess.run([python, "-m", "pip", "show", "pfl"], capture_output=True, text=True, check=True).stdout
    print(" ".join(told.split()[1:4:2]))
    return [PFL]


def versions():
    "What was measured."
    found = [n for n in ("torch", "flwr", "ray") if importlib.util.find_spec(n)]
    cores = f"{len(os.sched_getaffinity(0))} cores, a thread in each process"
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in found) + f"; {cores}"


def profile(problem, way, rounds=3, most=10):
    "Where the process that runs a way spends its time, function by function, in ms for each client of a round."
    torch.set_num_threads(1)
    engine = make(way, problem)
    engine.round(0)
    seen = cProfile.Profile()
    for number in range(1, rounds + 1):
        seen.runcall(engine.round, number)
    seen.create_stats()
    each = 1e3 / (rounds * problem.active)
    lines = [(_short(f), own * each, total * each) for f, (_, _, own, total, _) in seen.stats.items()]
    table = pd.DataFrame(lines, columns=["function", "own ms", "with what it calls"]).groupby("function").sum()
    return table.sort_values("own ms", ascending=False).head(most).round(3)


def _short(function):
    file, _, name = function
    return name.strip("<>") if file == "~" else f"{Path(file).stem}.{name}"


def told(ratio, unit=""):
    "A ratio over the passes in words, with its range."
    return f"{ratio.median():.2f}{unit} ({ratio.min():.2f} to {ratio.max():.2f})"


def reached(within):
    "Whether all passes, none of them, or some are within a goal."
    return "reached" if within.all() else "reached in some passes only" if within.any() else "missed"


def bars(table, title):
    "The ratios of a table, with their range over the passes."
    ratio = table["ratio"][::-1]
    spread = [ratio - table["lowest"][::-1], table["highest"][::-1] - ratio]
    fig, ax = plt.subplots(figsize=(7, 0.5 + 0.35 * len(table)))
    ax.barh(ratio.index, ratio, xerr=spread, capsize=3)
    ax.axvline(1, color="#5F6B7A", linestyle="--")
    if ratio.max() > 10:
        ax.set_xscale("log")
    ax.set(title=title, xlabel=f"time / time of the {ratio.index[-1]}, in the same pass")
    show(fig, alt=f"{title}: " + "; ".join(f"{n} {r:.2f}" for n, r in table["ratio"].items()))


if __name__ == "__main__":
    import rounds  # so that actors find `answer` by the name of its module

    rounds.main()

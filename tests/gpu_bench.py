"""How fast a GPU is, in under eight minutes: `python tests/gpu_bench.py --device cuda`.

First pfl-research's benchmark on CIFAR-10 (https://github.com/apple/pfl-research): 1,000 clients with 50 images each, 50
of them in a round, batches of 10, one epoch of SGD with a rate of 0.1, the plain mean, a test on 10,000 images every 10
rounds. Of its 1,500 rounds 150 are run; what is scaled up to 1,500 says so. Then two experiments, part by part, on the
device and on the CPU: quickstart, and fashion_lt with fewer rounds. `--small` takes the shortest form of everything;
where a data set is not there, random images stand in for it, with which everything takes as long.
"""
import argparse
import statistics
import sys
import time

import torch
import yaml
from gpu import row
from torch import nn

from fedgal.core.errors import FedgalError
from fedgal.core.random import Runtime, prepare, stream
from fedgal.core.settings import root
from fedgal.data.dataset import assemble
from fedgal.data.datasets import load_dataset
from fedgal.data.parquet import Part
from fedgal.data.split import SplitOptions, make_split
from fedgal.data.transforms import to_float
from fedgal.evaluation.metrics import evaluate
from fedgal.evaluation.training import owner_scores
from fedgal.federated.clients import MultiStepClient
from fedgal.federated.collect import collect_statistics
from fedgal.federated.dropout import draw_mask
from fedgal.federated.engines.batched import Batched
from fedgal.federated.ledger import Ledger
from fedgal.federated.local import LocalOptions
from fedgal.federated.loop import fit, prepared, run_round, start_state
from fedgal.federated.setup import set_up
from fedgal.federated.state import FederationOptions
from fedgal.federated.trained import TrainedRun, client_features, client_model
from fedgal.finetune.arms import run_arm
from fedgal.finetune.clients import FinetuneOptions
from fedgal.finetune.context import ArmContext, arm_features
from fedgal.generators.inputs import GeneratorInputs
from fedgal.generators.run import bank_sizes
from fedgal.pipeline.plan import COMPARE
from fedgal.pipeline.schema import resolve, schema
from fedgal.stats.teachers import select_teachers

ROUNDS, OF = 150, 1500
SHAPES = {"cifar10": (3, 32, 32), "fashion_mnist": (1, 28, 28), "digits": (1, 8, 8)}
STAGES = ["10_data", "20_train", "30_statistics", "40_generator", "50_finetune"]
EXPERIMENTS = {"quickstart": {}, "fashion_lt": {"level": "low", "rounds": 4, "finetune_rounds": 4}}
SMALL = {"imbalance": 10, "rounds": 1, "gen_steps": 4, "bank_per_class": 8, "finetune_rounds": 1}
SMALL |= {"finetune_steps": 2, "rff_dim": 64}


def images(name, small):
    "A data set, or random images of its shape."
    try:
        if not small or name == "digits":
            return load_dataset(name)
    except FedgalError as error:
        print(f"random images in place of {name}: {str(error).splitlines()[0][:100]}")
    n = 400 if small else 60_000
    x = torch.randint(0, 256, (n, *SHAPES[name]), generator=stream(0, "images"), dtype=torch.uint8)
    parts = (Part(x[: n * 5 // 6], torch.arange(n * 5 // 6) % 10), Part(x[n * 5 // 6 :], torch.arange(n // 6) % 10))
    return assemble(name, list(parts))


def synchronised(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- pfl-research's benchmark ---


class Scaled(nn.Module):
    "Channels with the mean and deviation of CIFAR-10."

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.491, 0.482, 0.447]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.247, 0.244, 0.262]).view(3, 1, 1), persistent=False)

    def forward(self, x):
        return (x - self.mean) / self.deviation


def network():
    "1.63 million weights, Glorot's uniform start."
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25))
    net = nn.Sequential(Scaled(), *convolutions, nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5))
    net.append(nn.Linear(128, 10))
    for m in net:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    return net


class Benchmark:
    "The federation, round by round."

    def __init__(self, device, small):
        data = images("cifar10", small)
        n = 20 if small else 1000
        local = LocalOptions(batch_size=10, lr=0.1)
        order = torch.randperm(len(data.y_train), generator=stream(0, "clients"))[: n * (15 if small else 50)]
        x, y = data.x_train.to(device), data.y_train.to(device)
        clients = [MultiStepClient(k, x, y, local, index=i) for k, i in enumerate(order.chunk(n))]
        self.options = FederationOptions(rounds=OF, participation=0.1 if small else 0.05)
        self.model, self.clients = prepared(self.options.make_algorithm(), network().to(device), clients)
        self.state = start_state(self.options.make_algorithm(), self.model, self.clients, 0)
        self.weights, self.engine = dict.fromkeys(range(n), 1.0), Batched()
        self.test = data.x_test.to(device), data.y_test.to(device)

    def round(self):
        run = (self.model, self.clients, self.options, 0, self.engine)
        self.state, _ = run_round(self.state, *run, weights=self.weights)

    def accuracy(self):
        self.model.load_state_dict({**self.state.payload.parameters, **self.state.payload.buffers})
        with torch.inference_mode():
            hits = self.model.eval()(to_float(self.test[0])).argmax(1) == self.test[1]
        self.model.train()
        return hits.float().mean().item()


def in_kernels(work, device):
    "The share of the time in which kernels run; None on a CPU."
    if device != "cuda":
        work()
        return None
    from torch.profiler import ProfilerActivity, profile

    begin = synchronised(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        seconds = synchronised(device) - begin
    return sum(e.self_device_time_total for e in found.key_averages()) / 1e6 / seconds


def masks_of_a_round(clients):
    "Seconds in which the CPU draws what dropout drops in a round; a device never changes what is drawn."
    begin, rng = time.perf_counter(), stream(0, "masks")
    for _ in range(5 * clients):
        draw_mask((10, 64, 14, 14), 0.25, rng)
        draw_mask((10, 128), 0.5, rng)
    return time.perf_counter() - begin


def pfl(device, small):
    "Seconds of rounds and tests, and the share in kernels."
    benchmark, rounds = Benchmark(device, small), 3 if small else ROUNDS
    benchmark.round()  # finds algorithms, allocates
    benchmark.accuracy()
    times, tests = [], []
    for number in range(rounds):
        begin = synchronised(device)
        benchmark.round()
        times.append(synchronised(device) - begin)
        if (number + 1) % (2 if small else 10) == 0:
            begin = time.perf_counter()
            accuracy = benchmark.accuracy()
            tests.append(time.perf_counter() - begin)
    total, each = sum(times) + sum(tests), statistics.median(times)
    share = in_kernels(lambda: [benchmark.round() for _ in range(1 if small else 10)], device)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else "not measured"
    row("pfl: rounds, with tests", f"{rounds}", f"{total:.1f} s")
    row(f"pfl: scaled to {OF:,} rounds", "", f"{total * OF / rounds:.0f} s")
    row("pfl: a round, median", "", f"{1e3 * each:.1f} ms")
    row("pfl: of it, masks of dropout", "", f"{1e3 * masks_of_a_round(2 if small else 50):.1f} ms")
    row("pfl: a test", "", f"{1e3 * statistics.median(tests):.1f} ms")
    row("pfl: share in kernels", "", "no GPU" if share is None else f"{100 * share:.0f} %")
    row("pfl: peak memory", "", peak)
    row("pfl: accuracy", "", f"{100 * accuracy:.1f} %")


# --- two experiments ---


def parameters(experiment, given):
    "The flat parameters of an experiment, without what sweeps and reports."
    values = yaml.safe_load((root() / "params" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    for name in ("stages", "sweep", *schema(COMPARE)):
        values.pop(name, None)
    values |= {"seed": 0} | EXPERIMENTS[experiment] | given
    return {n: v for stage in resolve(STAGES, values).values() for n, v in stage.items()}


def chain(data, p, device):
    "Stages of an experiment one after another: the name and the accuracy of each, if it has one."
    split = make_split(data, SplitOptions.make(**p), seed=p["seed"])
    training = set_up(data, split, p, Runtime(device, 1, "fp32"))
    federation = training.options.replace(eval_every=p["rounds"])
    result = fit(training.network, training.clients, federation, p["seed"], "auto", training.loss)
    run = TrainedRun(data, split, result.load(training.network).eval(), {}, "0" * 16)

    def accuracy(model):
        return evaluate(model, run.data.x_test, run.data.y_test, run.data.n_classes).balanced_accuracy

    yield "train", accuracy(run.model)
    statistics = collect_statistics(run, p["level"], Ledger(), p["rff_dim"], 1, p["seed"])
    teachers = select_teachers(*owner_scores(run, p["level"], Ledger()), run.split.client_counts(), n_min=1)
    latents = client_features(run, p["level"])
    yield "statistics, teachers", None
    uppers = {k: client_model(run, k).view(p["level"]).requires_grad_(False).to(device) for k in sorted(run.clients)}
    inputs = GeneratorInputs(run, p["level"], statistics, teachers, uppers, latents, device=device)
    sizes = bank_sizes(split.class_counts(), p["bank_per_class"])
    fitted = inputs.fit("mlp", sizes, "generator", seed=p["seed"], generator_options={"steps": p["gen_steps"]})
    yield "generator", None
    options = FinetuneOptions.make(**p)
    features = arm_features(run, options, statistics, p["seed"])
    context = ArmContext(run, options, features, statistics, banks={"generator": fitted.bank}, params={"arms": ["none"]})
    for arm in ("refit", "generator"):
        yield f"arm {arm}", accuracy(run_arm(arm, context).models(run.model))


def timed(experiment, data, given, device):
    "Part -> seconds and accuracy."
    found, begin = {}, synchronised(device)
    for name, accuracy in chain(data, parameters(experiment, given), device):
        found[name] = (synchronised(device) - begin, accuracy)
        begin = synchronised(device)
    return found


def against_cpu(experiment, device, small):
    "A row for each part: seconds on both, and accuracies."
    given = SMALL if small else {}
    data = images(parameters(experiment, given)["dataset"], small)
    if device == "cuda":
        timed(experiment, data, given | SMALL, device)  # finds algorithms, allocates
    there, here = timed(experiment, data, given, device), timed(experiment, data, given, "cpu")
    for name, (seconds, accuracy) in there.items():
        accuracies = ["", ""] if accuracy is None else [f"{100 * a:.1f} %" for a in (accuracy, here[name][1])]
        row(f"{experiment}: {name}", f"{here[name][0]:.2f}", f"{seconds:.2f}", *accuracies)
    totals = [sum(seconds for seconds, _ in found.values()) for found in (here, there)]
    row(f"{experiment}: all", *(f"{t:.2f}" for t in totals), f"ratio {totals[0] / totals[1]:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the shortest form of everything")
    given = parser.parse_args()
    machine = prepare()
    if given.device == "cuda" and machine.device != "cuda":
        sys.exit("torch sees no CUDA device here")
    print(f"torch {torch.__version__}", *machine.hardware().values())
    row("", "", given.device)
    pfl(given.device, given.small)
    row("", "seconds cpu", f"seconds {given.device}", given.device, "cpu")
    for experiment in EXPERIMENTS:
        against_cpu(experiment, given.device, given.small)


if __name__ == "__main__":
    main()

"""Published protocols on long-tailed CIFAR-10, each in minutes on one GPU.

    python tests/gpu_lt.py cut    # once: cuts the images that are needed from `data_root`
    FEDGAL_DATA_ROOT=artifacts/gpu_lt python tests/gpu_lt.py run mixup    # trains, generates, fine-tunes; prints a table

`mixup` and `wcdas` train in one place, `sfd` trains ten clients. The numbers are those of their params files, but for what
GENERATORS and CHANGES say. The clients' images are cut beforehand (12,406 of 50,000), so that there is no oracle. `--small`
takes random images and few steps.
"""
import argparse
import os
import sys
import time

import torch
import yaml

from fedgal.core.random import prepare, stream
from fedgal.core.settings import root, settings
from fedgal.data.dataset import assemble
from fedgal.data.datasets import load_dataset
from fedgal.data.parquet import Part
from fedgal.data.split import SplitOptions, make_split
from fedgal.evaluation.metrics import evaluate
from fedgal.federated.collect import collect_statistics
from fedgal.federated.ledger import Ledger
from fedgal.federated.loop import fit
from fedgal.federated.setup import set_up
from fedgal.federated.trained import TrainedRun, client_features
from fedgal.finetune.arms import run_arm
from fedgal.finetune.clients import FinetuneOptions
from fedgal.finetune.context import ArmContext, arm_features
from fedgal.generators.run import bank_sizes, fit_and_sample, fit_task
from fedgal.pipeline.plan import COMPARE
from fedgal.pipeline.schema import resolve, schema

FOLDER = "artifacts/gpu_lt"
IMAGES = 12_406  # of CIFAR-10 at imbalance 100, in the split of Cao et al. 2019
LIMIT = 60e6  # bytes of the cut file, which travels to the machine
STAGES = ["10_data", "20_train", "30_statistics", "40_generator", "50_finetune"]
PROTOCOLS = {"mixup": "gald_cifar10_lt", "wcdas": "wcdas_cifar10_lt", "sfd": "safs_cifar10_lt"}
GENERATORS = {
    "mixup": {"gaussian": {}, "diffusion": {}, "gald": {}, "ldmlr": {"bank_per_class": 500, "gen_steps": 2000}},
    "wcdas": {"gaussian": {}, "gald": {}},
    "sfd": {"gaussian": {}, "safs": {}},
}
HERE = {"imbalance": 1.0, "val_fraction": 0.0}  # the file holds the long tail already
CHANGES = {"sfd": {"alpha": 0.2, "rounds": 40}}  # the setting with most published rows; 40 of its 200 rounds
SMALL = {"model": "resnet8", "rounds": 2, "local_epochs": 1, "n_clients": 2, "views": 1, "rff_dim": 64}
SMALL |= {"gen_steps": 10, "bank_per_class": 8, "finetune_rounds": 1, "finetune_steps": 2}
SMALL_OPTIONS = {"ldmlr": {"sample_steps": 2, "base": 8, "multipliers": [1, 2]}, "safs": {"steps": 5}}


def cut():
    "Write the images of the Cao split and the test set as parquet."
    import pyarrow.parquet as pq

    data = load_dataset("cifar10")
    split = make_split(data, imbalance=100, shuffle_classes=False, val_fraction=0.0, seed=0)
    out = root() / FOLDER / "cifar10"
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", split.train[0]), ("test", None)):
        table = pq.read_table(settings().data_root / "cifar10" / f"{part}.parquet")
        pq.write_table(table if rows is None else table.take(rows.tolist()), out / f"{part}.parquet")
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{len(split.train[0]):,} training images, {size / 1e6:.0f} MB in {out}")
    if size > LIMIT:
        sys.exit(f"{size / 1e6:.0f} MB are more than the {LIMIT / 1e6:.0f} MB that may travel")


def images():
    "The cut data set; the whole of CIFAR-10 would train on balanced images."
    data = load_dataset("cifar10")
    if len(data.x_train) != IMAGES:
        seen = f"{settings().data_root} holds {len(data.x_train):,} training images, not the {IMAGES:,} of the long tail"
        sys.exit(f"{seen}; run 'python tests/gpu_lt.py cut', then set FEDGAL_DATA_ROOT={FOLDER}")
    return data


def parameters(protocol, given):
    "The flat parameters of a protocol: its params file without what sweeps and reports, changed by `given`."
    file = root() / "params" / f"{PROTOCOLS[protocol]}.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name in ("stages", "sweep", *schema(COMPARE)):
        values.pop(name, None)
    values |= HERE | CHANGES.get(protocol, {}) | given | {"arms": ["none"]}
    return {n: v for stage in resolve(STAGES, values).values() for n, v in stage.items()}


def random_images():
    "A data set for the small form."
    rng = stream(0, "images")
    y = torch.arange(200) % 10
    x = torch.randint(0, 256, (200, 3, 32, 32), generator=rng).to(torch.uint8)
    return assemble("random", [Part(x, y), Part(x[:50], y[:50])])


class Clock:
    "Prints a line for every part: its name, its seconds, what came out."

    def __init__(self, device):
        self.device, self.start = device, time.perf_counter()

    def say(self, name, result=""):
        if self.device == "cuda":
            torch.cuda.synchronize()
        print(f"{name:28}{time.perf_counter() - self.start:10.1f} s   {result}", flush=True)
        self.start = time.perf_counter()


def trained(data, params, machine):
    "The run of a protocol up to its encoder."
    split = make_split(data, SplitOptions.make(**params), seed=params["seed"])
    training = set_up(data, split, params, machine)
    federation = training.options.replace(eval_every=params["rounds"])
    result = fit(training.network, training.clients, federation, training.seed, "auto", training.loss)
    return TrainedRun(data, split, result.load(training.network).eval(), {}, "0" * 16)


def tasks(run, params, device):
    "Statistics and features of level high, and what a generator is fitted to."
    level, views, seed = params["level"], params["views"], params["seed"]
    statistics = collect_statistics(run, level, Ledger(), params["rff_dim"], views, seed)
    features = {"statistics": statistics, "latents": client_features(run, level, views=views, seed=seed)}
    space, n_classes = run.space(level), run.data.n_classes
    return statistics, lambda name: fit_task(name, space, n_classes, views=views, seed=seed, device=device, **features)


def run_protocol(protocol, device, small, changes):
    machine, clock = prepare(), Clock(device)
    params = parameters(protocol, (SMALL if small else {}) | changes)
    data = random_images() if small else images()
    run = trained(data, params, machine)

    def accuracy(model):
        return evaluate(model, run.data.x_test, run.data.y_test, run.data.n_classes).balanced_accuracy

    clock.say(f"{protocol}: encoder", f"{run.split!r}, {params['rounds']} rounds")
    statistics, task = tasks(run, params, device)
    options = FinetuneOptions.make(**params)
    features = arm_features(run, options, statistics, params["seed"])
    clock.say("statistics, features")

    def arm(name, banks=None):
        context = ArmContext(run, options, features, statistics, statistics, banks or {}, params=params)
        clock.say(name if not banks else label, f"{100 * accuracy(run_arm(name, context).models(run.model)):.2f} %")

    for name in ("none", "refit", "refit_prior", "lda"):
        arm(name)
    for label, own in GENERATORS[protocol].items():
        flat = params | (SMALL if small else own)
        sizes = bank_sizes(run.split.class_counts(), flat["bank_per_class"])
        chosen = {"generator_options": SMALL_OPTIONS.get(label, {}) if small else {}}
        drawn = {n: v for n, v in flat.items() if n not in ("generator_options", "seed", "arms", "generator")}
        fitted = fit_and_sample(label, task(label), sizes, seed=params["seed"], **chosen, **drawn)
        clock.say(f"{label}: fitted, drawn", f"{len(fitted.bank.y):,} features")
        arm("generator", {"generator": fitted.bank})


def change(text):
    "NAME=VALUE of the command line."
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    return name, value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cut", help="cut the images from data_root")
    run = commands.add_parser("run", help="run a protocol")
    run.add_argument("protocols", choices=PROTOCOLS, nargs="+", metavar="PROTOCOL", help=", ".join(PROTOCOLS))
    run.add_argument("--device", default="cuda")
    run.add_argument("--small", action="store_true", help="random images and few steps")
    run.add_argument("-p", action="append", default=[], type=change, metavar="NAME=VALUE", help="change a parameter")
    given = parser.parse_args()
    if given.command == "cut":
        return cut()
    os.environ["FEDGAL_DEVICE"] = given.device
    if given.device == "cuda" and prepare().device != "cuda":
        sys.exit("torch sees no CUDA device here")
    print(f"torch {torch.__version__}", *prepare().hardware().values())
    for protocol in given.protocols:
        run_protocol(protocol, given.device, given.small, dict(given.p))


if __name__ == "__main__":
    main()

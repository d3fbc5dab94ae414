"""Every part of the library on a device against the CPU: `python tests/gpu.py --device cuda`.

Prints one row a part: seconds on both, the largest difference of the results, and whether that is small enough; a part
that fails is a row too. Ends with status 1 if one failed. `--small` takes the shortest form of everything.
"""
import argparse
import sys
import time
import traceback
import warnings

try:
    import torch
    from device_cases import CASES, ON_GPU, TOLERANCE, difference, flat

    from fedgal.core.random import Runtime, prepare
    from fedgal.data.datasets import load_dataset
    from fedgal.data.split import make_split
    from fedgal.evaluation.fidelity import fidelity
    from fedgal.evaluation.metrics import evaluate
    from fedgal.evaluation.training import owner_scores
    from fedgal.federated.algorithm import ALGORITHMS
    from fedgal.federated.collect import collect_statistics
    from fedgal.federated.ledger import Ledger
    from fedgal.federated.loop import fit
    from fedgal.federated.setup import set_up
    from fedgal.federated.trained import TrainedRun, client_features, client_model, held_out
    from fedgal.finetune.arms import run_arm
    from fedgal.finetune.clients import FinetuneOptions
    from fedgal.finetune.context import ArmContext, arm_features
    from fedgal.generators.inputs import GeneratorInputs
    from fedgal.stats.teachers import select_teachers
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing; install the project first: pip install -e .")

TRAINING = {"seed": 0, "model": "cnn8", "head": "linear", "norm": "group", "local_loss": "ce", "augment": "none", "augment_options": {}}
TRAINING |= {"batch_size": 16, "lr": 0.05, "momentum": 0.9, "train_sampling": "plain"}
OPTIONS = {
    "fedprox": {"prox_mu": 0.01},
    "fedgen_pfllib": {"algorithm_options": {"steps": 5}},
    "creff": {"algorithm_options": {"match_steps": 5, "retrain_epochs": 5}},
}
ARITHMETIC = 1e-3  # what order of addition may do over some steps of training
ACCURACY = 0.05  # what it may do to an accuracy on digits after a whole chain


def federation(device, algorithm, rounds, n_clients):
    "A trained federation on digits, and its run."
    data = load_dataset("digits")
    split = make_split(data, seed=0, n_clients=n_clients, alpha=0.3, min_size=1, imbalance=20)
    params = TRAINING | OPTIONS.get(algorithm, {}) | {"algorithm": algorithm, "rounds": rounds}
    training = set_up(data, split, params, Runtime(device, 1, "fp32"))
    result = fit(training.network, training.clients, training.options, 0, "auto", training.loss)
    model = result.load(training.network).eval()
    personal = ALGORITHMS[algorithm].personal
    return result, TrainedRun(data, split, model, result.client_parameters, "0" * 16, personal)


def algorithm(name, small):
    "Two rounds of an algorithm: parameters of the global model and of the clients."

    def run(device):
        result, _ = federation(device, name, 2, 3 if small else 10)
        own = [t for _, tensors in sorted(result.client_parameters.items()) for t in tensors.values()]
        return [*result.parameters.values(), *own]

    return run


def chain(device, small):
    "The quickstart's stages one after another: a name and the numbers of each."
    level, steps = "low", 5 if small else 500
    _, run = federation(device, "fedavg", 2 if small else 20, 3 if small else 10)
    x, y, n_classes = run.data.x_test, run.data.y_test, run.data.n_classes

    def accuracy(model):
        return evaluate(model, x, y, n_classes).balanced_accuracy

    yield "train", ACCURACY, accuracy(run.model)
    statistics = collect_statistics(run, level, Ledger(), 64, 1, 0)
    teachers = select_teachers(*owner_scores(run, level, Ledger()), run.split.client_counts(), n_min=1)
    yield "statistics", ACCURACY, statistics.radius().nanmean() / statistics.mean().nan_to_num().norm()
    uppers = {k: client_model(run, k).view(level).requires_grad_(False).to(device) for k in sorted(run.clients)}
    latents = client_features(run, level)
    inputs = GeneratorInputs(run, level, statistics, teachers, uppers, latents, device=device)
    sizes = torch.full((n_classes,), 50)
    fitted = inputs.fit("mlp", sizes, "generator", seed=0, generator_options={"steps": steps})
    bank = fitted.bank
    yield "generator", ACCURACY, bank.z.square().mean()
    scores = fidelity(*held_out(run, level)[:2], bank.z, bank.y, n_classes).averages()["generated"]
    yield "fidelity", ACCURACY, torch.tensor(scores.loc[["density", "coverage"]].to_numpy())
    options = FinetuneOptions(rounds=2 if small else 20)
    features = arm_features(run, options, statistics, 0)
    context = ArmContext(run, options, features, statistics, banks={"generator": bank}, params={"arms": ["none"]})
    for arm in ("refit", "generator"):
        yield f"finetune {arm}", ACCURACY, accuracy(run_arm(arm, context).models(run.model))


def timed(function, device):
    "Numbers and seconds; all numbers arrive on the CPU."
    start = time.perf_counter()
    numbers = flat(function(device))
    return numbers, time.perf_counter() - start


def row(name, *cells):
    print(f"{name:32}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


def reason(error):
    "An error in one line, with where it was raised."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"  {type(error).__name__}: {' '.join(str(error).split())[:200]} ({frame.filename[-40:]}:{frame.lineno})"


def compared(name, tolerance, on_cpu, on_device) -> bool:
    "Print the row of one part."
    (expected, cpu_seconds), (given, seconds) = on_cpu, on_device
    apart = difference(expected, given)
    row(name, f"{cpu_seconds:.2f}", f"{seconds:.2f}", f"{apart:.1e}", "ok" if apart <= tolerance else "DIFFERENT")
    return apart <= tolerance


def compare_parts(parts, device) -> int:  # how many failed
    failed = 0
    for name, (function, tolerance) in parts.items():
        try:
            failed += not compared(name, tolerance, timed(function, "cpu"), timed(function, device))
        except Exception as error:  # the others still run
            row(name, "", "", "", "FAILED")
            print(reason(error), flush=True)
            failed += 1
    return failed


def compare_chain(device, small) -> int:  # 1 if a step failed
    steps = {place: chain(place, small) for place in dict.fromkeys(["cpu", device])}
    if device == "cpu":
        steps = {"cpu": chain("cpu", small), "again": chain("cpu", small)}
    failed, name, before = 0, "train", time.perf_counter()
    try:
        while True:
            found = []
            for of_place in steps.values():
                before = time.perf_counter()
                name, tolerance, numbers = next(of_place)
                found.append((flat(numbers), time.perf_counter() - before))
            failed += not compared(f"chain: {name}", tolerance, *found)
    except StopIteration:
        return failed
    except Exception as error:
        row(f"chain: after {name}", "", "", "", "FAILED")
        print(reason(error), flush=True)
        return failed + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the shortest form of everything")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    machine = prepare()
    if given.device == "cuda" and machine.device != "cuda":
        sys.exit("torch sees no CUDA device here")
    print(f"torch {torch.__version__}", *machine.hardware().values())
    row("", "seconds cpu", f"seconds {given.device}", "difference", "")
    exact = given.device == "cpu"
    parts = {name: (f, 0 if exact else ON_GPU.get(name, 10 * TOLERANCE.get(name, 1e-4))) for name, f in CASES.items()}
    parts |= {f"algorithm {name}": (algorithm(name, given.small), 0 if exact else ARITHMETIC) for name in ALGORITHMS}
    failed = compare_parts(parts, given.device) + compare_chain(given.device, given.small)
    print(f"{failed} failed" if failed else "all agree")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""The library runs on any torch device: checked without a GPU, on one that computes on the CPU and refuses to mix."""
import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest
import second_device  # registers the device; autograd must not have run before
import torch
from device_cases import CASES, TOLERANCE, difference
from second_device import OTHER

import fedgal
from fedgal.core.errors import FedgalError
from fedgal.federated.algorithm import ALGORITHMS
from fedgal.pipeline.plan import plan

CPU_ONLY = ("data",)  # data sets are read and divided on the CPU, with numpy; views of images are not
VIEWS = ("transforms.py", "augmentation.py", "auto.py", "crop.py", "distort.py", "sharp.py", "image_ops.py", "policies.py")
SLOW = (
    *("joint, bank gaussian", "joint, bank real", "model resnet18", "model resnet32"),
    *("generator fedgen_pfllib", "generator gald_pooled", "generator ldmlr"),
)
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
FACTORIES += ("rand", "randint", "randn", "randperm")


def covered(path: Path) -> bool:
    return path.name in VIEWS or path.parts[0] not in CPU_ONLY


def takes_tensor(function: ast.FunctionDef) -> bool:
    a = function.args
    notes = [x.annotation for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.annotation]
    return any("Tensor" in ast.unparse(note) for note in notes)


def bare_factories(source: str) -> list[tuple[int, str]]:
    "Calls in functions with a tensor that make another one without saying where: no `device=`, and not moved at once."
    found = []

    def visit(node, statement, inside):
        statement = node if isinstance(node, ast.stmt) else statement
        inside = inside or isinstance(node, ast.FunctionDef) and takes_tensor(node)
        if inside and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            made = ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES
            placed = any(k.arg == "device" for k in node.keywords)
            drawn = any(k.arg == "generator" for k in node.keywords)
            text = ast.unparse(statement)
            moved = drawn and ".to(" in text or ").tolist()" in text
            if made and not placed and not moved:
                found.append((node.lineno, ast.unparse(node)))
        for child in ast.iter_child_nodes(node):
            visit(child, statement, inside)

    visit(ast.parse(source), None, False)
    return found


def test_bare_factories_are_found():
    "The search itself."
    one = "def f(x: Tensor):\n    y = {}\n    return y\n"
    for text in ("torch.zeros(3)", "torch.rand(3, generator=g)", "[torch.eye(2) for _ in x]"):
        assert bare_factories(one.format(text)), text
    for text in ("torch.zeros(3, device=x.device)", "torch.rand(3, generator=g).to(x.device)", "torch.zeros_like(x)"):
        assert not bare_factories(one.format(text)), text
    assert not bare_factories("def f(n: int):\n    return torch.zeros(n)\n")


def test_tensors_are_made_where_the_others_are():
    "Every function that takes a tensor says on which device it makes one."
    home = Path(fedgal.__file__).parent
    paths = [p.relative_to(home) for p in sorted(home.rglob("*.py"))]
    bare = [f"{p}:{line} {call}" for p in paths if covered(p) for line, call in bare_factories((home / p).read_text())]
    assert not bare, "\n".join(bare)


def test_the_second_device_is_strict():
    "It refuses what a GPU refuses."
    with second_device.second_device():
        there = torch.ones(3, device=OTHER)
        assert (there + 1).sum().item() == 6 and there[torch.tensor([0])].device == torch.device(OTHER)
        here = torch.ones(3)
        for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="draw on the CPU"):
            torch.rand(3, device=OTHER)


def test_a_device_that_is_not_there_is_refused_at_planning(monkeypatch):
    monkeypatch.setenv("FEDGAL_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FedgalError, match="torch sees no CUDA device"):
        plan(Path(fedgal.__file__).parents[1] / "params" / "quickstart.yaml")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_a_device_changes_no_number(name):
    expected = CASES[name]("cpu")
    with second_device.second_device():
        assert difference(expected, CASES[name](OTHER)) < TOLERANCE.get(name, 1e-5)


@pytest.mark.slow
def test_every_part_has_a_row_and_agrees():
    "The script behind `make gpu`, with the CPU as the device."
    script = Path(__file__).with_name("gpu.py")
    done = subprocess.run([sys.executable, script, "--device", "cpu", "--small"], capture_output=True, text=True)
    assert done.returncode == 0 and "all agree" in done.stdout, done.stdout + done.stderr
    assert all(f"algorithm {name} " in done.stdout for name in ALGORITHMS)
    assert all(f"chain: {step} " in done.stdout for step in ("train", "generator", "finetune generator"))


@pytest.mark.slow
def test_published_protocols_run_in_their_small_form():
    "The script behind `make gpu-lt`: augmentations, heads, clients, statistics, every generator, arms."
    script = Path(__file__).with_name("gpu_lt.py")
    command = [sys.executable, script, "run", "mixup", "wcdas", "sfd", "--device", "cpu", "--small"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("%")]
    arms = ["none", "refit", "refit_prior", "lda", "gaussian"]
    assert rows == [*arms, "diffusion", "gald", "ldmlr", *arms, "gald", *arms, "safs"]


def test_a_published_protocol_refuses_other_images(monkeypatch):
    import gpu_lt

    monkeypatch.setattr(gpu_lt, "load_dataset", lambda name: gpu_lt.random_images())
    with pytest.raises(SystemExit, match="holds 200 training images, not the 12,406 of the long tail"):
        gpu_lt.images()
    assert gpu_lt.change("alpha=0.2") == ("alpha", "0.2")
    with pytest.raises(argparse.ArgumentTypeError, match="no NAME=VALUE"):
        gpu_lt.change("alpha")


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_in_its_small_form():
    "The script behind `make gpu-bench`."
    script = Path(__file__).with_name("gpu_bench.py")
    done = subprocess.run([sys.executable, script, "--device", "cpu", "--small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("pfl: scaled to 1,500 rounds", "pfl: share in kernels", "quickstart: all", "fashion_lt: all"):
        assert what in done.stdout, what

"""The engine `flower` gives the bytes of `serial` and of `workers`; an actor that is lost is told with its client."""
import os
import signal
import subprocess

import pytest
import torch

from fedgal.core.errors import FedgalError
from fedgal.core.random import stream
from fedgal.core.store import content_hash
from fedgal.data.datasets import load_dataset
from fedgal.federated.clients import MultiStepClient
from fedgal.federated.local import LocalOptions
from fedgal.federated.loop import fit
from fedgal.federated.state import FederationOptions
from fedgal.models.networks import build_model

pytestmark = [pytest.mark.slow, pytest.mark.flower]
NAMES = ("fedavg", "scaffold", "fedmps", "denoiser")
ROUNDS = 5
OPTIONS = {"fedmps": {"weight_soft": 1.0}}


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    "One simulation for all tests, whose files lie aside."
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    from fedgal.federated.engines.flower import Flower, FlowerOptions
    with pytest.MonkeyPatch.context() as m:
        m.setenv("FEDGAL_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        engine = Flower(FlowerOptions(actors=2))
        yield engine
        engine.close()


def federation(name, engine, views=None):
    digits = load_dataset("digits")
    parts = torch.randperm(len(digits.y_train), generator=stream(0, "case"))[:300].split([30, 80, 20, 110, 60])
    local = LocalOptions(batch_size=16, lr=0.05, momentum=0.9)
    clients = [MultiStepClient(k, digits.x_train, digits.y_train, local, augment=(views or {}).get(k), index=i)
               for k, i in enumerate(parts)]
    options = FederationOptions(rounds=ROUNDS, algorithm=name, options=OPTIONS.get(name, {}), participation=0.8)
    return fit(build_model("cnn8", digits.in_shape, 10, generator=stream(0, "model")), clients, options, 0, engine)


def denoiser(engine):
    "The weights of a denoiser with the losses of GALD-DC, trained by three clients on columns of digits."
    from fedgal.generators.diffusion.federated import train_denoisers
    from fedgal.generators.diffusion.frame import make_frame
    from fedgal.generators.diffusion.options import GaldOptions, geometry_of
    from fedgal.generators.diffusion.schedule import Schedule
    from fedgal.generators.latent_diffusion import PlacedGeometry
    from fedgal.stats.class_statistics import ClassStatistics
    from fedgal.stats.space import Space
    digits = load_dataset("digits")
    z, y = digits.x_train[:240].float().mean(2).flatten(1) / 255, digits.y_train[:240]
    statistics = ClassStatistics.from_features(z, y, 10, Space("global", "high", False, True, z.shape[1]))
    options = GaldOptions(width=8, blocks=1, steps=3 * ROUNDS, batch_size=16)
    frame = make_frame(statistics, options.frame, options.kappa, options.widen, options.lam)
    parts = [(frame.encode(z[k::3], y[k::3]), y[k::3]) for k in range(3)]
    geometry = PlacedGeometry(geometry_of(options), frame, Schedule())
    return list(train_denoisers(parts, 10, options, ROUNDS, 0, Schedule(), geometry, engine=engine).model.state_dict().values())


def left(name, engine) -> str:
    "Hash of all tensors and numbers that a federation leaves."
    if name == "denoiser": return content_hash(*denoiser(engine))
    done = federation(name, engine)
    own = [t for _, tensors in sorted(done.client_parameters.items()) for _, t in sorted(tensors.items())]
    losses = torch.tensor([row["train_loss"] for row in done.history], dtype=torch.float64)
    sent = torch.tensor([[row["bytes_up"], row["bytes_down"]] for row in done.history])
    return content_hash(losses, sent, *(t for _, t in sorted({**done.parameters, **done.payload.extras}.items())), *own)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_serial(name, flower):
    torch.set_num_threads(1)
    want = left(name, "serial")
    assert left(name, "workers") == want
    assert left(name, flower) == want


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    from fedgal.federated.engines import flower as module
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)   # as where nothing is installed
    with pytest.raises(FedgalError, match=r"engine 'flower' cannot run.*flwr and ray is not installed: pip install.*\[flower\]"):
        federation("fedavg", "flower")


def test_nothing_is_sent_home(flower):
    federation("fedavg", flower)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["FLWR_HOME"].startswith(os.environ["FEDGAL_ARTIFACTS"])


def test_a_chain_on_flower_has_the_metrics_of_serial(project):
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    fresh = {"stdout": subprocess.PIPE}                   # a process from nothing: the engine workers has forked this one's server with fedgal
    done = project.fedgal("run", "tiny", env={"FEDGAL_ENGINE": "serial"}, **fresh)
    assert done.returncode == 0, done.stderr
    others = project.clone(project.home.parent / "other")
    for path in others.artifacts.glob("*_*"): path.rename(path.with_name(f"old-{path.name}"))
    done = others.fedgal("run", "tiny", env={"FEDGAL_ENGINE": "flower"}, **fresh)
    assert done.returncode == 0, done.stderr
    assert " cached" not in done.stdout and (others.artifacts / "flower").is_dir() and not list(others.artifacts.glob("flower/tensors*"))
    serial, flower = (p.json("tiny/metrics.json") | {"seconds": {}} for p in (project, others))
    assert flower == serial


class Deadly:
    "A view that ends the process which looks at it."

    def __call__(self, x, rng): os.kill(os.getpid(), signal.SIGKILL)


def test_an_actor_that_is_lost_is_told_with_its_client(flower):    # the last: the simulation has an actor less
    with pytest.raises(FedgalError, match="the work of client 3 was lost.*use engine 'workers'"):
        federation("fedavg", flower, views={3: Deadly()})

"""Small federations of every algorithm; as a program, one that is killed and goes on from its checkpoint."""
import sys
from pathlib import Path

import torch

from fedgal.core.random import stream
from fedgal.core.store import content_hash
from fedgal.data.distort import Distort
from fedgal.federated.algorithm import ALGORITHMS
from fedgal.federated.clients import MultiStepClient
from fedgal.federated.local import LocalOptions
from fedgal.federated.loop import fit
from fedgal.federated.state import FederationOptions
from fedgal.generators.diffusion.federated import train_denoisers
from fedgal.generators.diffusion.frame import make_frame
from fedgal.generators.diffusion.options import GaldOptions, geometry_of
from fedgal.generators.diffusion.schedule import Schedule
from fedgal.generators.latent_diffusion import PlacedGeometry
from fedgal.models.networks import build_model
from fedgal.stats.class_statistics import ClassStatistics
from fedgal.stats.space import Space

NAMES = list(ALGORITHMS)
ROUNDS = 5
OPTIONS = {
    "fedgen": {"steps": 3},
    "fedgen_pfllib": {"steps": 3},
    "fedmps": {"weight_soft": 1.0},
    "creff": {"per_class": 6, "match_steps": 3, "retrain_epochs": 2, "repeats": 2},
}


def train(name, engine, checkpoint=None):
    "All tensors that a federation leaves, after five rounds with views, momentum, a proximal term and clients of unlike size."
    if name == "denoiser": return denoiser(engine)
    rng = stream(0, "case")
    x = torch.randint(0, 256, (200, 1, 16, 16), generator=rng, dtype=torch.uint8)
    y = torch.arange(200) % 4
    parts = torch.randperm(200, generator=rng).split([20, 50, 10, 70, 50])
    local = LocalOptions(batch_size=8, lr=0.05, momentum=0.9, prox_mu=0.1)
    clients = [MultiStepClient(k, x, y, local, augment=Distort(), index=i) for k, i in enumerate(parts)]
    options = FederationOptions(rounds=ROUNDS, algorithm=name, options=OPTIONS.get(name, {}), participation=0.8)
    model = build_model("cnn8", (1, 16, 16), 4, generator=stream(0, "model"))
    done = fit(model, clients, options, 0, engine, checkpoint=checkpoint)
    losses = torch.tensor([row["train_loss"] for row in done.history], dtype=torch.float64)
    own = [t for _, tensors in sorted(done.client_parameters.items()) for t in by_name(tensors)]
    return [losses, *by_name(done.parameters), *by_name(done.payload.extras), *own]


def by_name(tensors):
    return [tensors[n] for n in sorted(tensors)]


def denoiser(engine):
    "The weights of a denoiser with the losses of GALD-DC, trained on features of three clients."
    rng = stream(1, "case")
    z, y = torch.randn(240, 6, generator=rng).clamp(min=0), torch.arange(240) % 4
    statistics = ClassStatistics.from_features(z, y, 4, Space("global", "high", False, True, 6))
    options = GaldOptions(width=8, blocks=1, steps=3 * ROUNDS, batch_size=16)
    frame = make_frame(statistics, options.frame, options.kappa, options.widen, options.lam)
    parts = [(frame.encode(z[k::3], y[k::3]), y[k::3]) for k in range(3)]
    geometry = PlacedGeometry(geometry_of(options), frame, Schedule())
    done = train_denoisers(parts, 4, options, ROUNDS, 0, Schedule(), geometry, engine=engine)
    losses = [torch.tensor([row[n] for row in done.history], dtype=torch.float64) for n in sorted(done.history[0])]
    return [*losses, *done.model.state_dict().values()]


def result(name, engine) -> str:
    return content_hash(*(t.detach() for t in train(name, engine)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(content_hash(*train("scaffold", "workers", Path(sys.argv[1]))))

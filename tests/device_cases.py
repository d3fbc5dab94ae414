"""Small computations of every part of the library, each a function of a device; their results must not depend on it."""
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fedgal.algorithms.joint.options import JointOptions
from fedgal.algorithms.joint.trainer import fit_joint
from fedgal.core.random import stream
from fedgal.data.augmentation import AUGMENTATIONS
from fedgal.data.distort import Distort
from fedgal.data.transforms import to_float
from fedgal.evaluation.consensus import class_geometry, consensus_report
from fedgal.evaluation.fidelity import fidelity, tail_fidelity
from fedgal.evaluation.generated import opinions
from fedgal.evaluation.metrics import evaluate
from fedgal.evaluation.readouts import readouts
from fedgal.federated.algorithm import ALGORITHMS
from fedgal.federated.clients import MultiStepClient
from fedgal.federated.engines.nodes import Node, Nodes, absent_client
from fedgal.federated.local import LocalOptions
from fedgal.federated.loop import fit
from fedgal.federated.state import FederationOptions
from fedgal.finetune.clients import ClientFeatures, FinetuneOptions
from fedgal.finetune.finetune import finetune_global
from fedgal.finetune.repairs import fed3r, fedncm, lda, logit_adjust, tau_norm, with_head
from fedgal.generators.base import GENERATORS, Bank, FitTask, load_generator
from fedgal.generators.run import fit_and_sample
from fedgal.models.encode import encode, encode_from
from fedgal.models.losses import base, contrastive, geometry, matching
from fedgal.models.losses.local import LOCAL_LOSSES, local_loss
from fedgal.models.losses.protocol import task_loss
from fedgal.models.networks import MODELS, build_model
from fedgal.models.split import Features
from fedgal.stats.blocks import class_sums
from fedgal.stats.class_statistics import ClassStatistics
from fedgal.stats.prototypes import class_prototypes
from fedgal.stats.space import RFF, Space
from fedgal.stats.teachers import TeacherMap

C, DIM, K = 4, 12, 3  # classes, size of a feature, clients
SPACE = Space("global", "high", False, True, DIM)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=stream(seed, "case"))


def labels(n, seed=0):
    "Labels with a long tail, each class there."
    return torch.cat([torch.arange(C), torch.randint(0, C, (2, n - C), generator=stream(seed, "labels")).amin(0)])


def features(n, seed=0):
    y = labels(n, seed)
    return (draw(C, DIM, seed=9)[y] + draw(n, DIM, seed=seed)).clamp(min=0), y


class Upper(nn.Module):
    "The part of a client's model above the features."

    def __init__(self, seed, device):
        super().__init__()
        self.head = nn.Linear(DIM, C)
        with torch.no_grad():
            self.head.weight.copy_(draw(C, DIM, seed=seed))
            self.head.bias.zero_()
        self.requires_grad_(False).to(device)

    def forward(self, z):
        return Features(z, z, z, self.head(z))


def model_on(device, name="cnn8"):
    return build_model(name, (1, 8, 8), C, generator=stream(0, "model")).to(device)


def pictures(n):
    return torch.randint(0, 256, (n, 1, 8, 8), generator=stream(0, "pixels"), dtype=torch.uint8), labels(n)


# losses: values and gradients

def _loss(function, device):
    z = draw(32, DIM).to(device).requires_grad_()
    value = function(z, labels(32).to(device), lambda *shape, seed=1: draw(*shape, seed=seed).to(device))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
    total = sum(v.sum() for v in parts)
    return [*(v.detach() for v in parts), torch.autograd.grad(total, z)[0]]


def _head(z, new):
    return z @ new(DIM, C)


def _statistics(z, y, new):
    factor = new(C, DIM, DIM)
    rff = RFF(DIM, 8)
    return matching.statistics_loss(z, y, new(C, DIM), factor @ factor.mT, new(C, 8).abs(), rff.phi)


def _teachers(function):
    return lambda z, y, new: function((z @ new(K, DIM, C)), y, new(K, C).abs())


def _gald(z, y, new):
    anchors = geometry.Anchors(new(C, DIM), new(C).abs(), new(1).abs()[0])
    return geometry.gald_loss(z, y, new(32).sigmoid(), anchors)


def _counts(z):
    return torch.arange(1, C + 1, device=z.device)


LOSSES = {
    "balanced_softmax": lambda z, y, new: base.balanced_softmax(_head(z, new), y, _counts(z)),
    "prototype_distance": lambda z, y, new: contrastive.prototype_distance(z, y, new(C, DIM), _counts(z) > 1),
    "supervised_contrastive": lambda z, y, new: contrastive.supervised_contrastive(z, y, new(C, DIM), _counts(z) > 1),
    "soft_label_loss": lambda z, y, new: contrastive.soft_label_loss(_head(z, new), y, new(C, C), _counts(z) > 1),
    "gald_loss": _gald,
    "statistics_loss": _statistics,
    "teacher_cross_entropy": _teachers(matching.teacher_cross_entropy),
    "consistency_loss": _teachers(matching.consistency_loss),
    "diversity_loss": lambda z, y, new: matching.diversity_loss(z, new(32, 5), y),
}


class _Client:
    targets = labels(40)


def _local(name):
    loss = local_loss(name, C, 4).at(3)
    counts = loss.context(_Client)
    return lambda z, y, new: loss(Features(z, z, z, _head(z, new)), y, None, counts)


LOSSES |= {f"local {name}": _local(name) for name in LOCAL_LOSSES}


# generators: history, samples, and samples of one that was saved

def task_on(device):
    clients = tuple(features(60, seed) for seed in range(K))
    z, y = (torch.cat(parts) for parts in zip(*clients, strict=True))
    statistics = ClassStatistics.from_features(z, y, C, SPACE, RFF(DIM, 16))
    teachers = tuple(Upper(k, device) for k in range(K))
    return FitTask(SPACE, C, statistics, teachers, latents=clients, device=device)


SMALL = {
    "safs": {"steps": 3, "largest": 40, "smallest": 20},
    "fedgen": {"steps": 4},
    "fedgen_pfllib": {"steps": 4, "noise": 8, "hidden": 16},
    "mlp": {"steps": 4},
    "cvae": {"steps": 8, "rounds": 2, "hidden_dim": 16},
    "vae": {"steps": 8, "rounds": 2, "hidden_dim": 16},
    "gan": {"steps": 8, "rounds": 2, "hidden_dim": 16},
    "ldmlr": {"steps": 2, "sample_steps": 2, "base": 8, "multipliers": [1], "batch_size": 16, "lr": 1e-8},
} | {
    name: {"steps": 4, "rounds": 2, "width": 8, "blocks": 1, "batch_size": 16, "sample_steps": 3}
    for name in ("diffusion", "diffusion_pooled", "gald", "gald_pooled")
}


def _generator(name, device):
    sizes = torch.full((C,), 20)
    fitted = fit_and_sample(name, task_on(device), sizes, seed=1, generator_options=SMALL.get(name))
    generator, bank = fitted.generator, fitted.bank
    history = [[v for v in row.values() if isinstance(v, float)] for row in fitted.history]
    with tempfile.TemporaryDirectory() as folder:
        generator.save(Path(folder) / "g.safetensors")
        twin = load_generator(Path(folder) / "g.safetensors", device)
    asked = labels(50).to(device)
    samples = [g.sample(asked, stream(2, "sample")) for g in (generator, twin)]
    assert {str(s.device) for s in samples} == {str(asked.device)} and bank.z.device.type == "cpu"
    tables = generator.diagnostics({"here": features(60, 0)}, 0)
    few = generator.in_steps(2, stream(3, "few"))
    more = [] if few is None else [few.sample(asked, stream(2, "sample"))]
    return [history, bank.z, *samples, *more, [list(row.values()) for t in tables.values() for row in t.values()]]


# models, features, metrics

def _model(name, device):
    model = build_model(name, (1, 16, 16), C, generator=stream(0, "model")).to(device)
    x = draw(6, 1, 16, 16).to(device)
    out = model(x)
    loss = base.cross_entropy(out.logits, labels(6).to(device)).sum()
    weights = list(model.low.parameters()) or list(model.head.parameters())
    return [*out, *torch.autograd.grad(loss, weights)]


def _features(device):
    model, (x, y) = model_on(device), pictures(40)
    low = encode(model, x, "low")
    counts = evaluate(model, x, y, C)
    owned = torch.ones(2, C, dtype=torch.bool)
    accuracies = readouts([model, model], x, y, owned, draw(C, model.dims["high"]).abs())
    return [low, encode_from(model, low, "low"), counts.recall, counts.ece, list(accuracies.values())]


def _views(device):
    x = pictures(40)[0].to(device)
    options = {"crop": {}, "distort": {}, "sharp": {}, "colour": {"cutout": 3}, "autoaugment": {"cutout": 3}}
    views = {name: AUGMENTATIONS.make(name, values=values) for name, values in options.items()}
    whole = [view(x, stream(0, "views")) for view in views.values()]
    return [*whole, *(views[name](x.float(), stream(0, "views")) for name in ("crop", "distort", "sharp"))]


def _fidelity(device):
    real, fake, train = (features(n, n) for n in (120, 80, 60))
    fake = [t.to(device) for t in fake]
    scores = fidelity(*real, *fake, C, *train).table.drop(columns="reason")
    tail = tail_fidelity(*real, *fake, C, torch.tensor([50, 20, 5, 2]))
    return [torch.tensor(scores.to_numpy(float)), torch.tensor(tail.to_numpy(float))]


def _consensus(device):
    z, y = features(60, 1)
    said = opinions({k: Upper(k, device) for k in range(K - 1)}, Bank(z, y, SPACE, "case", C), K)
    ids = {c: [c % K] for c in range(C)}
    judges = {c: [(c + 1) % K] for c in range(C)}
    scores = torch.rand(K, C, generator=stream(0, "scores"), dtype=torch.float64)
    teachers = TeacherMap(ids, {c: [] for c in range(C)}, judges, scores, scores, scores)
    table = consensus_report(said.to(device), y.to(device), teachers)[0]
    shape = class_geometry(z.to(device), y.to(device), *features(50, 2), C)
    return [torch.tensor(t.to_numpy(float)) for t in (table, shape)]


# joint training

def _joint(bank, device):
    sizes = {"epochs": 2, "batch_size": 16, "refresh": 1, "width": 8, "blocks": 1, "sampling_steps": 2}
    options = JointOptions(bank=bank, bank_per_class=10, watch=2, lr_encoder=1e-4, warmup_share=0, ramp=1, **sizes)
    x, y = pictures(32)
    result = fit_joint(model_on(device), x.to(device), y, options, 0, augment=Distort(), pool=pictures(24))
    history = [[v for v in row.values() if isinstance(v, float)] for row in result.history]
    return [history, *result.model.state_dict().values(), *result.denoiser.state_dict().values(), *result.bank]


# statistics, and arms that are trained on features

def _statistics_of(moments, device):
    "Sums of features on the device, and what is read off the sums of those that left a model there."
    model, (x, y) = model_on(device), pictures(60)
    z = encode(model, x, "low")
    space, rff = Space("global", "low", False, True, z.shape[1]), RFF(z.shape[1], 8)
    sums = class_sums(z.to(device), y.to(device), C, rff, moments=moments)
    s = ClassStatistics.from_features(z, y, C, space, rff, moments=moments)
    radii = [] if moments == "none" else [s.radius("calibrated", kappa=20.0)]
    return [[t for t in sums if t is not None], s.mean(), radii, class_prototypes(z.to(device), y.to(device), C)]


def _repairs(device):
    "Classifiers in closed form on a model of the device."
    model, (x, y) = model_on(device), pictures(60)
    z = encode(model, x, "high")
    s = ClassStatistics.from_features(z, y, C, Space("global", "high", False, True, z.shape[1]))
    heads = [logit_adjust(model.head, s.count), tau_norm(model.head), fedncm(s), fed3r(s), lda(s)]
    return [encode_from(with_head(model, head), encode(model, x, "low"), "low") for head in heads]


def _finetuned(options, engine, device):
    "The upper part of a model, trained on the clients' features and a bank."
    model, level = model_on(device), "low"
    images, y = pictures(48)
    x = to_float(images) if options.get("encoder_lr") else encode(model, images, level)
    parts = ([t[k::K] for k in range(K)] for t in (x, y))
    features = ClientFeatures(*parts, y.bincount(minlength=C))
    space = Space("global", level, False, True, model.dims[level])
    bank = Bank(draw(20, space.dim).abs(), torch.arange(20) % C, space, "case", C)
    settings = FinetuneOptions(level=level, rounds=2, steps=3, batch_size=8, **options)
    tuned, result = finetune_global(model, features, bank, settings, 0, engine)
    return [[row["train_loss"] for row in result.history], *tuned.state_dict().values()]


# federated training

ALGORITHM_OPTIONS = {
    "fedgen": {"steps": 3},
    "fedgen_pfllib": {"steps": 3},
    "fedmps": {"weight_soft": 1.0},
    "creff": {"per_class": 6, "match_steps": 3, "retrain_epochs": 2, "repeats": 2},
}


def _algorithm(name, engine, device):
    "Two rounds with everything that they leave; the model is on the device, the examples are not yet."
    local = LocalOptions(batch_size=8, steps=3, momentum=0.9, prox_mu=0.1)
    x, y = pictures(48)
    weights = torch.rand(16, generator=stream(4, "weights"))
    more = {"sample_weights": weights, "augment": Distort()}
    clients = [MultiStepClient(k, x, y, local, index=torch.arange(k, 48, K), **more) for k in range(K)]
    options = FederationOptions(rounds=2, algorithm=name, options=ALGORITHM_OPTIONS.get(name, {}))
    result = fit(model_on(device), clients, options, 0, engine)
    extras = {n: t for n, t in result.payload.extras.items() if n != "labels"}
    assert all(t.device.type == torch.device(device).type for t in (*result.payload.parameters.values(), *extras.values()))
    losses = [row["train_loss"] for row in result.history]
    return [losses, *result.parameters.values(), *extras.values(), *result.client_parameters[1].values()]


def _nodes(device):
    "Clients of a real federation that compute on the device, with a server on the CPU."
    local = LocalOptions(batch_size=8, steps=3, momentum=0.9)
    x, y = pictures(48)
    options = FederationOptions(rounds=2, algorithm="scaffold")
    algorithm = options.make_algorithm()
    parts = [torch.arange(k, 48, K) for k in range(K)]
    with tempfile.TemporaryDirectory() as place:
        nodes = []
        for k, i in enumerate(parts):
            client = MultiStepClient(k, x[i].to(device), y[i].to(device), local)
            nodes.append(Node(algorithm, model_on(device), client, 0, task_loss, Path(place) / str(k)))
        carry = lambda sent, round: {k: nodes[k].answer(*message) for k, message in sent.items()}
        far = [absent_client(k, len(i), tuple(x.shape[1:]), local) for k, i in enumerate(parts)]
        result = fit(model_on("cpu"), far, options, 0, Nodes(carry=carry))
    assert not any(row["rejected"] for row in result.history), result.history
    return [[row["train_loss"] for row in result.history], *result.parameters.values(), *result.payload.extras.values()]


FINETUNED = {
    "on clients": ({}, "serial"),
    "on clients, batched": ({}, "batched"),
    "on the server": ({"where": "server"}, "serial"),
    "with the prior of all": ({"sampling": "offset"}, "serial"),
    "with a moving encoder": ({"encoder_lr": 0.1, "consistency": 1.0}, "serial"),
}
TRAINED = [name for name in ALGORITHMS if name != "denoiser"]  # that one is trained by the generators
CASES = {f"loss {name}": partial(_loss, f) for name, f in LOSSES.items()}
CASES |= {f"model {name}": partial(_model, name) for name in MODELS}
CASES |= {"encode, evaluate, readouts": _features, "views": _views, "fidelity": _fidelity, "consensus": _consensus}
CASES |= {f"statistics, moments {kind}": partial(_statistics_of, kind) for kind in ("full", "diagonal", "none")}
CASES |= {f"finetune {name}": partial(_finetuned, *how) for name, how in FINETUNED.items()} | {"repairs": _repairs}
CASES |= {f"generator {name}": partial(_generator, name) for name in GENERATORS}
CASES |= {f"joint, bank {bank}": partial(_joint, bank) for bank in ("denoiser", "gaussian", "real")}
CASES |= {f"algorithm {name}": partial(_algorithm, name, "serial") for name in TRAINED}
CASES |= {"algorithm scaffold, nodes": _nodes}
CASES |= {f"algorithm {name}, batched": partial(_algorithm, name, "batched") for name in TRAINED}

TOLERANCE = {"generator ldmlr": 1e-3}  # errors at low noise weigh a thousandfold; else 1e-5
# on a GPU: cuDNN takes other algorithms for the gradients of resnet18 (without it 7e-7), and the step of Adam at a gradient
# near zero is its sign (rounding of 1e-7 moves the generator of PFLlib by 2e-2 on the CPU, too)
ON_GPU = {"model resnet18": 1e-2, "generator fedgen_pfllib": 5e-2, "algorithm fedgen_pfllib, batched": 5e-2}


def flat(value) -> list[torch.Tensor]:
    "All numbers of a result, on the CPU in float64."
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in flat(v)]
    return [torch.as_tensor(value).detach().cpu().double()]


def difference(a, b) -> float:
    "Largest difference of two results, relative where numbers are above 1; infinite where their shapes differ."
    a, b = flat(a), flat(b)
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    x, y = (torch.cat([t.flatten() for t in side]) for side in (a, b))
    apart = ((x - y).abs() / x.abs().clamp(min=1)).masked_fill((x == y) | x.isnan() & y.isnan(), 0)
    return float(apart.nan_to_num(torch.inf).max())

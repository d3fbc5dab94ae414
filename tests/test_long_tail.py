"""Long-tailed recognition in one place, joint training and latent diffusion, end to end on digits."""
import hashlib
import json

import pytest
import torch
from conftest import CHAIN, ran
from safetensors.torch import load_file
from test_pipeline import number

pytestmark = pytest.mark.slow


def test_centralised_training_is_a_federation_of_one(copy):
    "One client with everything, the recipe of long-tailed recognition, and three views of every image behind all that follows."
    copy.write("central", n_clients=1, val_fraction=0, shuffle_classes=False, head="cosine", local_loss="ldam", lr=0.01, lr_schedule="one_cycle", mixup=0.2, augment="auto",
               views=3, arms=["none", "refit", "fed3r", "gaussian", "refit_plain", "generator", "refit_plain_adjusted", "generator_adjusted"], finetune_sampling="plain")
    done = copy.fedgal("run", "central")
    assert done.returncode == 0 and ran(done) == len(CHAIN), done.stderr
    m, stages = copy.json("central/metrics.json"), {s["stage"]: copy.artifacts / s["stage"] / s["key"] for s in copy.json("central/run.json")["stages"]}
    assert set(m["arms"]) == {"none", "refit", "fed3r", "gaussian", "refit_plain", "generator", "refit_plain_adjusted", "generator_adjusted"} and all(number(a["balanced_accuracy"]) for a in m["arms"].values())
    network = load_file(stages["20_train"] / "model.safetensors")
    assert network["head.scale"] == 30 and torch.equal(network["head.weight"], load_file(stages["20_train"] / "clients.safetensors")["0/head.weight"])
    tuned, bank = load_file(stages["50_finetune"] / "models.safetensors"), load_file(stages["40_generator"] / "bank_generator.safetensors")
    seen = torch.bincount(bank["y"], minlength=10) + load_file(stages["30_statistics"] / "statistics_low.safetensors")["count"]
    torch.testing.assert_close(tuned["generator_adjusted/head.shift"], -(seen / seen.sum()).log().float())
    assert torch.equal(tuned["generator_adjusted/head.head.weight"], tuned["generator/head.weight"])
    real = load_file(stages["30_statistics"] / "statistics_low.safetensors")["count"]
    torch.testing.assert_close(tuned["refit_plain_adjusted/head.shift"], -(real / real.sum()).log().float())
    split, statistics = load_file(stages["10_data"] / "split.safetensors"), load_file(stages["30_statistics"] / "statistics_low.safetensors")
    assert statistics["count"].tolist() == torch.bincount(split["labels"][split["train"]]).tolist(), "a view is not a sample"
    [row] = [r for r in json.loads((stages["30_statistics"] / "ledger.json").read_text())["rows"] if r["kind"] == "statistics low"]
    assert "and their views" in row["discloses"]


def test_joint_training_takes_over_from_training(copy):
    "Strategy A on the trained model of the tiny experiment: its arms, its guard and its files."
    copy.write("joint", stages=["10_data", "20_train", "25_joint"], joint_epochs=3, joint_refresh=1, joint_width=16, joint_blocks=1, joint_sampling=3,
               joint_arms=["none", "refit", "joint", "joint_gaussian", "unguarded", "oracle"],
               **dict.fromkeys(("generator", "gen_steps", "rff_dim", "finetune_rounds", "finetune_steps", "oracle_per_class")))
    done = copy.fedgal("run", "joint")
    assert done.returncode == 0 and ran(done) == 1, done.stderr
    m = copy.json("joint/metrics.json")
    arms = ("refit", "joint", "joint_gaussian", "unguarded", "oracle")
    assert set(m["arms"]) == {"none", *arms} and all(number(a["balanced_accuracy"]) for a in m["arms"].values())
    assert m["arms"]["none"]["federated"] and not m["arms"]["joint"]["federated"], "four clients' samples were pooled"
    assert m["headroom"] == m["arms"]["oracle"]["balanced_accuracy"] - m["arms"]["refit"]["balanced_accuracy"]
    assert set(m["fidelity"]) == {"joint", "joint_gaussian"} and m["readout"] == "global model, balanced test set, last round"
    assert m["arms"]["none"]["balanced_accuracy"] == copy.json("tiny/metrics.json")["arms"]["none"]["balanced_accuracy"]
    [folder] = copy.folders("25_joint")
    history = json.loads((folder / "history.json").read_text())
    assert {n: len(h["epochs"]) for n, h in history.items()} == dict.fromkeys(arms, 3)
    saved = load_file(folder / "models.safetensors")
    assert all(t.isfinite().all() for t in saved.values()) and all(len(load_file(folder / f"bank_{a}.safetensors")["y"]) == 30 * 10 for a in ("joint", "joint_gaussian"))
    assert not torch.equal(saved["joint/head.weight"], saved["unguarded/head.weight"]) or not torch.equal(saved["joint/low.0.weight"], saved["unguarded/low.0.weight"])


def test_clients_train_a_diffusion_model_together(copy):
    "GALD-DC on the trained model of the tiny experiment: what is sent, what stays frozen, and what is not federated."
    def run(name, generator, **more):
        copy.write(name, arms=["none", "refit", "gaussian", "generator"], generator=generator, **more)
        done = copy.fedgal("run", name)
        assert done.returncode == 0 and ran(done) == 3, done.stderr
        return copy.json(f"{name}/metrics.json")["arms"], {s["stage"]: copy.artifacts / s["stage"] / s["key"] for s in copy.json(f"{name}/run.json")["stages"]}
    arms, stages = run("gald", "gald", generator_options={"rounds": 2, "width": 16, "blocks": 1})
    assert arms["generator"]["federated"] and all(number(a["balanced_accuracy"]) for a in arms.values())
    assert ">teachers and generator</th>" in (copy.reports / "gald" / "index.html").read_text(), "the table of costs names both"
    rows = json.loads((stages["40_generator"] / "ledger.json").read_text())["rows"]
    assert {(r["messages"], r["first_round"], r["last_round"]) for r in rows if r["kind"] == "denoiser"} == {(2, 0, 1)} and not [r for r in rows if r["kind"] == "features"]
    kept = json.loads((stages["40_generator"] / "manifest.json").read_text())["files"]["generator_generator.safetensors"]
    assert hashlib.sha256((stages["40_generator"] / "generator_generator.safetensors").read_bytes()).hexdigest() == kept["sha256"], "the denoiser is frozen"
    before, after = load_file(stages["20_train"] / "model.safetensors"), load_file(stages["50_finetune"] / "models.safetensors")
    for name, t in after.items():
        if name.split("/")[1].startswith("low."): assert torch.equal(t, before[name.split("/")[1]]), f"{name}: the encoder is frozen"
    arms, stages = run("pooled", "ldmlr", generator_options={"base": 8, "multipliers": [1, 2], "steps": 4, "batch_size": 32, "sample_steps": 3}, bank_share=0.2, encoder_lr=0.1, consistency=1.0, finetune_sampling="offset", pseudo_classes="sqrt")
    assert not arms["generator"]["federated"] and arms["gaussian"]["federated"]
    sent = [r for r in json.loads((stages["40_generator"] / "ledger.json").read_text())["rows"] if r["kind"] == "features"]
    assert len(sent) == 4 and all("not federated" in r["discloses"] for r in sent)
    after = load_file(stages["50_finetune"] / "models.safetensors")
    assert any(not torch.equal(t, before[n.split("/")[1]]) for n, t in after.items() if n.startswith("generator/low.")), "the encoder moves, held by its old features"
    counts = load_file(stages["30_statistics"] / "statistics_low.safetensors")["count"]
    assert torch.equal(torch.bincount(load_file(stages["40_generator"] / "bank_generator.safetensors")["y"], minlength=10), (0.2 * counts).round().clamp(min=5).long())

"""Sounds and FedA2V: bad clips cost one line each, runs resume bit for bit, samples count and are used, generators stay at home."""
import io
import json
import wave
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import yaml

from fedgal.core.errors import FedgalError
from fedgal.data.dataset import Dataset
from fedgal.data.logmel import logmel_spec
from fedgal.data.split import make_split

KINDS = ("bell", "drum", "flute", "horn")
GROUPS = {"beaten": ["bell", "drum"], "blown": ["flute", "horn"]}
torch.set_num_threads(1)


def wav(samples, rate=16_000, channels=1):
    out = io.BytesIO()
    with wave.open(out, "wb") as w:
        w.setnchannels(channels), w.setsampwidth(2), w.setframerate(rate)
        w.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()


def tone(seconds=1.0, rate=16_000, channels=1): return np.repeat(0.3 * np.sin(np.arange(int(seconds * rate)) / 7), channels)


@pytest.fixture
def places(tmp_path, monkeypatch):
    for name in ("ARTIFACTS", "DATA_ROOT", "REPORTS"): monkeypatch.setenv(f"FEDGAL_{name}", str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture(scope="module")
def nodes():
    "Two clients with two classes each of features that are noise around a mean."
    from fedgal.algorithms.a2v.nodes import make_nodes
    g = torch.Generator().manual_seed(0)
    means, y = torch.randn(4, 4, 512, generator=g), torch.arange(64) % 4
    x = means[y] + 0.5 * torch.randn(64, 4, 512, generator=g)
    data = Dataset("toy", x, y, x[:16] + 0.1, y[:16], KINDS, "0" * 64, features=logmel_spec(1).to_dict())
    return make_nodes(data, make_split(data, n_clients=2, partition="groups", partitioner=GROUPS, val_fraction=0.0))


def training(nodes, rounds=10, **more):
    from fedgal.algorithms.a2v.client_generators import GeneratorTraining
    from fedgal.federated.local import LocalOptions
    local = LocalOptions(epochs=2, batch_size=16, optimiser="adamw", lr=2e-3)
    return GeneratorTraining(nodes, more.pop("name", "cvae"), {"hidden_dim": 8, "latent_dim": 3}, local, rounds, **more)


# --- clips ---

BAD = {"empty.wav": (b"", "an empty file"), "broken.wav": (wav(tone())[:30], "not a whole WAV"), "noise.ogg": (b"OggS" + bytes(40), "cannot be decoded"),
       "silent.wav": (wav(0 * tone()), "silent"), "short.wav": (wav(tone(0.01)), "0.010 seconds"), "slow.wav": (wav(tone(), 100), "100 samples a second")}


def test_every_bad_clip_costs_a_line_and_nothing_else_is_lost(places):
    pytest.importorskip("soundfile")
    from fedgal.data.audio import SOUND_FOLDER
    clips = {name: data for name, (data, _) in BAD.items()} | {f"{kind}{i}.wav": wav(tone(5) * (1 if kind == "bell" else -0.5)) for kind in KINDS[:2] for i in range(4)}
    clips |= {"stereo.wav": wav(tone(5, channels=2), channels=2), "long.wav": wav(tone(7)), "brief.wav": wav(tone(2))}
    for name, data in clips.items(): (places / name).write_bytes(data)
    rows = ["filename,category,fold", *(f"{name},{'drum' if 'drum' in name else 'bell'},{1 + i % 2}" for i, name in enumerate(clips)), "gone.wav,bell,1"]
    (places / "clips.csv").write_text("\n".join(rows))
    sounds = SOUND_FOLDER.sounds(str(places / "clips.csv"))
    assert len(sounds.x) == len(clips) - len(BAD) and sounds.x.isfinite().all()
    for name, (_, words) in BAD.items():
        [line] = [n for n in sounds.notes if n.startswith(f"{name}:")]
        assert words in line and "left out" in line and "\n" not in line
    for name, words in (("stereo.wav", "2 channels became one"), ("long.wav", "cut to 5"), ("brief.wav", "rest of 5 is silence"), ("gone.wav", "no such file")):
        assert any(n.startswith(f"{name}: ") and words in n for n in sounds.notes)


@pytest.mark.parametrize("rows, words", [(["a.wav,bell,1", "b.wav,drum,1"], "all clips are in fold 1"), (["a.wav,bell,1", "b.wav,drum,"], "some have none"),
                                         (["a.wav,bell,1", "b.wav,drum,1", "c.wav,bell,2"], "no example of class 1 ('drum')"), (["a.wav,bell,x"], "folds are whole numbers")])
def test_folds_that_leave_nothing_to_train_or_test_on(places, rows, words):
    from fedgal.data.audio import SOUND_FOLDER
    for name in "abc": (places / f"{name}.wav").write_bytes(wav(tone()))
    (places / "clips.csv").write_text("\n".join(["filename,category,fold", *rows]))
    with pytest.raises(FedgalError) as error: SOUND_FOLDER.load(str(places / "clips.csv"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_parquet_file_of_recordings_is_a_data_set_by_its_path(places):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{"filename": f"{kind}{i}.wav", "category": kind, "fold": 1 + i % 2, "audio": {"bytes": wav(tone(1) * (1 + j)), "path": ""}} for j, kind in enumerate(KINDS[:2]) for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), places / "mine.parquet")
    from fedgal.data.datasets import load_dataset
    data = load_dataset(str(places / "mine.parquet"))
    assert (data.in_shape, data.classes, len(data.y_test)) == ((4, 512), ("bell", "drum"), 4)


def test_encoders_are_pinned_and_more_than_five_notes_are_told():
    import re

    from fedgal.data.audio import in_lines
    from fedgal.data.featurizers import ENCODERS, TEXT_ENCODERS
    assert all(re.fullmatch("[0-9a-f]{40}", e.revision) for e in (*ENCODERS.values(), *TEXT_ENCODERS.values()))
    notes = [f"{i}.wav: {i} seconds, cut to 5" for i in range(6, 16)]
    assert in_lines(notes) == notes and in_lines([f"{i}.wav: silent" for i in range(3)]) == ["0.wav and 2 more: silent"]


# --- the two runs ---

def test_the_four_combinations_of_flags():
    from fedgal.algorithms.a2v.runs import mode_of
    means = {(True, False): "fresh", (True, True): "resume", (False, True): "use"}
    for flags in product((True, False), repeat=2):
        assert mode_of(False, *flags) == "none"
        if flags in means: assert mode_of(True, *flags) == means[flags]
    with pytest.raises(FedgalError, match="untrained generator"): mode_of(True, False, False)


def plan_of(places, monkeypatch, **changed):
    from conftest import REPO

    from fedgal.pipeline import plan as planning
    values = yaml.safe_load((REPO / "params" / "feda2v_smoke.yaml").read_text()) | changed
    (places / "x.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(planning, "_ensure_data", lambda dataset: None)
    return planning.plan(places / "x.yaml")


@pytest.mark.parametrize("changed, words", [
    ({"generator_training_mode": False}, "untrained generator"), ({"generator_training_mode": False, "use_pretrained_generators": True}, "run 2, which is stage 52_a2v_use"),
    ({"stages": ["10_data", "52_a2v_use"]}, "run 1, which is stage 22_a2v_train"), ({"generator_checkpoint_dir": "../elsewhere"}, "below artifacts/a2v"),
    ({"generator_granularity": "per_group"}, "needs generator_class_groups"), ({"feature_net_options": {"latent": 3}}, "did you mean 'latent_dim'"),
    ({"adapter_aggregation_mode": "kd"}, "run 1 has none"), ({"feature_net": "vae", "feature_net_options": {}}, "vae is told no class, and 2 generators have several (client 0)"),
    ({"feature_net": "vae", "generator_granularity": "per_group", "generator_class_groups": {"moving": ["rising", "waves"]}}, "vae is told no class"),
    ({"generator_granularity": "per_group", "generator_class_groups": {"moving": ["risen"]}}, "did you mean 'rising'"),
    ({"feature_spec": "ast"}, "transformers"), ({"texts": "clip"}, "transformers"), ({"feature_spec": "vggish"}, "feature_spec = 'vggish'"),
    ({"partitioner": {}}, "needs the classes of every client"), ({"adapter": "clap"}, "adapter = 'clap'")])
def test_what_cannot_be_is_refused_before_anything_runs(places, monkeypatch, changed, words):
    with pytest.raises(FedgalError) as error: plan_of(places, monkeypatch, **changed)
    assert words in str(error.value) and "\n" not in str(error.value)


class Killed(Exception): "What a test throws into a round."


def test_killed_after_round_7_and_resumed_it_is_the_same_bit_for_bit(nodes, tmp_path):
    from fedgal.algorithms.a2v.runs import prepare_folder, train_generators
    t = training(nodes)

    def dies(round, made, history):
        if round == 7: raise Killed

    whole = train_generators(t, tmp_path / "a", "fresh", tmp_path / "1", engine="serial")
    prepare_folder(tmp_path / "b", "fresh", tmp_path / "2", "")
    with pytest.raises(Killed): t.run("serial", tmp_path / "b" / "rounds", dies)
    resumed = train_generators(t, tmp_path / "b", "resume", tmp_path / "3", engine="serial")
    assert resumed.history == whole.history and len(whole.history) == 10
    for path in sorted((tmp_path / "a").glob("*_round_10.safetensors")):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
        latest = path.with_name(path.name.replace("_round_10", ""))
        assert latest.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").glob("client_0*.safetensors")) == [f"client_0_generator{r}.safetensors" for r in ("", "_round_10", "_round_5")]
    with pytest.raises(FedgalError, match="no such checkpoint"): train_generators(t, tmp_path / "c", "resume", tmp_path / "4")


@pytest.mark.parametrize("granularity", ["unified", "per_class", "per_group"])
@pytest.mark.parametrize("name", ["cvae", "vae"])
def test_samples_of_every_class_and_granularity(nodes, granularity, name):
    from fedgal.algorithms.a2v.runs import aggregate_samples, generate
    made = training(nodes, 1, name=name, granularity=granularity, groups=GROUPS).run("serial")
    samples = generate(made.generators, nodes, 5, 0)
    assert sum(len(t) for of in samples.values() for t in of.values()) == sum(5 * len(nodes.owned(k)) for k in range(2))
    together = aggregate_samples(samples)
    assert {c: tuple(t.shape) for c, t in together.items()} == dict.fromkeys(range(4), (5, 4, 512))
    assert not any(together[a].equal(together[b]) for a in range(4) for b in range(a))     # not the same tensors for every class
    assert made.ledger.to_json() == []                                                    # nothing ever left a client


def test_samples_that_are_withheld_are_missed_and_no_message_holds_a_generator(nodes):
    from fedgal.algorithms.a2v.runs import AdapterTraining, generate, server_data
    from fedgal.federated.ledger import Ledger
    from fedgal.federated.local import LocalOptions
    samples = generate(training(nodes, 1).run("serial").generators, nodes, 5, 0)
    form = {"widths": [8], "heads": 2}
    t = AdapterTraining(nodes, "clip", form, LocalOptions(epochs=1, batch_size=16, optimiser="adamw", lr=1e-3), 1, server={"global_epochs": 1})
    ledger = Ledger()
    given, withheld = (t.run("serial", held=server_data(nodes, s, ledger)) for s in (samples, None))
    assert any(not given.parameters[n].equal(p) for n, p in withheld.parameters.items())
    told = {row["discloses"] for row in [*ledger.to_json(), *given.ledger.to_json(), *nodes.ledger.to_json()]}
    assert any("10 samples of its generator" in words for words in told)
    assert not any(words.startswith(("generator", "its own generator")) for words in told)


def test_run_2_names_every_difference_from_run_1(nodes, tmp_path):
    from fedgal.algorithms.a2v.checkpoints import load_generators
    from fedgal.algorithms.a2v.runs import train_generators
    t = training(nodes, 1)
    train_generators(t, tmp_path / "a", "fresh", tmp_path / "begun", engine="serial")
    other = replace(t, granularity="per_class", nodes=replace(nodes, spec=logmel_spec(3), classes=("gong", *KINDS[1:])))
    with pytest.raises(FedgalError) as error: load_generators(tmp_path / "a", other)
    assert all(f"{name}: " in str(error.value) for name in ("generator_granularity", "feature_spec", "classes")) and "unified then, per_class now" in str(error.value)
    swapped = replace(t, nodes=replace(nodes, index=nodes.index[::-1]))
    with pytest.raises(FedgalError, match="client 0 has other classes"): load_generators(tmp_path / "a", swapped)
    (tmp_path / "a" / "client_1_generator.json").unlink()
    with pytest.raises(FedgalError, match="client_1_generator.json: no such checkpoint.*fedgal run"): load_generators(tmp_path / "a", t)


@pytest.mark.parametrize("name", ["cvae", "vae"])
def test_the_loss_of_a_batch_is_that_of_its_clips_one_at_a_time(nodes, name):
    "What the time of a batch is compared with in `nbs/benchmarks/client_generators.ipynb` is the same work."
    net, rng = training(nodes, name=name).net(), torch.Generator().manual_seed(0)
    x, y, one = nodes.x[:7], nodes.y[:7], torch.tensor(1.0)
    noise = net.noise(7, rng)
    whole = net.terms(x, x, nodes.texts, y, noise, one)
    alone = [net.terms(x[i : i + 1], x[i : i + 1], nodes.texts[c : c + 1], torch.zeros(1, dtype=torch.long), noise[i : i + 1], one) for i, c in enumerate(y.tolist())]
    for term, values in whole.items(): torch.testing.assert_close(values, torch.cat([terms[term] for terms in alone]))


def test_a_client_that_was_refused_in_every_round_is_named_and_has_no_generator(nodes, tmp_path):
    from fedgal.algorithms.a2v.runs import train_generators
    x = nodes.x.clone()
    x[nodes.index[1]] = float("nan")
    t = training(replace(nodes, x=x), 2)
    with pytest.raises(FedgalError, match="client 1: its generator 'unified' was never trained .* 2 rounds"): t.run("serial")
    with pytest.raises(FedgalError, match="client 1: .* was never trained"): train_generators(t, tmp_path / "a", "fresh", tmp_path / "begun", every=1, engine="serial")


def test_a_net_that_is_told_no_class_needs_a_generator_for_each(nodes):
    from fedgal.algorithms.a2v.setup import one_class_each
    sizes = lambda **how: [(u.client, len(u.classes)) for u in training(nodes, name="vae", **how).units]
    for granularity in ("unified", "per_group"):
        with pytest.raises(FedgalError, match="vae is told no class"): one_class_each("vae", sizes(granularity=granularity, groups=GROUPS))
        one_class_each("cvae", sizes(granularity=granularity, groups=GROUPS))
    one_class_each("vae", sizes(granularity="per_class"))


def test_the_variance_of_samples_is_noise_where_a_decoder_has_collapsed(nodes):
    "With the residual both objectives, and no generator at all, have the variance of the clips; the decoder alone tells."
    from fedgal.evaluation.sounds import control_quality, overall_quality
    found = {}
    for objective in ("elbo", "reference"):
        t = training(nodes, 3)
        made = replace(t, options=t.options | {"objective": objective}).run("serial").generators
        assert all(g.residual.any() for g in made)
        found[objective] = overall_quality(nodes, made)
    assert all(q["variance"]["within"] > 0.5 for q in (*found.values(), control_quality(nodes)))
    assert found["reference"]["decoder"]["variance"]["within"] < 0.01


def test_latents_drawn_from_the_codes_of_a_class_give_the_decoder_its_variance_back(nodes, tmp_path):
    "Draws from N(0, 1) miss the codes of a client's few clips; what the decoder makes of its own codes has their spread."
    from fedgal.algorithms.a2v.checkpoints import load_generators, save_generator
    from fedgal.evaluation.sounds import overall_quality
    from fedgal.federated.local import LocalOptions
    g = torch.Generator().manual_seed(1)
    few = torch.randn(len(nodes.y), 3, generator=g) @ torch.randn(3, 2048, generator=g)                      # three causes in a class
    nodes = replace(nodes, x=torch.randn(4, 4, 512, generator=g)[nodes.y] + 0.5 * few.unflatten(1, (4, 512)))
    found, local = {}, LocalOptions(epochs=30, batch_size=16, optimiser="adamw", lr=4e-3)
    for prior in ("standard", "posterior"):
        t = replace(training(nodes, 6), local=local, options={"hidden_dim": 32, "latent_dim": 3, "beta": 0.1, "prior": prior})
        trained = t.run("serial")
        made = trained.generators
        assert all(bool(g.codes) == (prior == "posterior") for g in made)
        for g in made: save_generator(tmp_path / prior, t, g, 6, trained.history)
        for g, read in zip(made, load_generators(tmp_path / prior, t)[0], strict=True):
            assert g.codes.keys() == read.codes.keys() and all(g.codes[n].equal(read.codes[n]) for n in g.codes)
        found[prior] = overall_quality(nodes, made)["decoder"]["variance"]["within"]
        with pytest.raises(FedgalError, match="arch"): load_generators(tmp_path / prior, replace(t, options=t.options | {"prior": "standard" if prior == "posterior" else "posterior"}))
    assert found["posterior"] > 0.5 > 4 * found["standard"], found


def test_codes_of_a_class_have_the_moments_of_its_aggregated_posterior(nodes):
    from fedgal.algorithms.a2v.client_generators import code_moments
    t = training(nodes, 1)
    net, y = t.net(), nodes.y[nodes.index[0]]
    x = nodes.x[nodes.index[0]]
    codes, classes = code_moments(net, x, y, nodes.texts, (0, 1)), (0, 1)
    with torch.no_grad(): mu, logvar = net.encode(x, nodes.texts, y)
    for c in classes:
        draws = mu[y == c].repeat_interleave(20_000, 0) + (logvar[y == c] / 2).exp().repeat_interleave(20_000, 0) * torch.randn(int((y == c).sum()) * 20_000, mu.shape[1], generator=torch.Generator().manual_seed(c))
        assert torch.allclose(codes["mean"][c], draws.mean(0), atol=0.01)
        assert torch.allclose(codes["root"][c] @ codes["root"][c].T, torch.cov(draws.T, correction=0), atol=0.02)
    one = code_moments(net, x[:1], y[:1], nodes.texts, (int(y[0]),))        # a single clip has the spread of its own code
    assert one["root"].isfinite().all() and one["root"][y[0]].diagonal().gt(0).all()


def test_an_adapter_fits_the_texts_and_has_an_optimiser_of_its_own(nodes):
    from fedgal.algorithms.a2v.runs import AdapterTraining, adapter_local
    for name in ("clip", "t5"):
        net = AdapterTraining(nodes, name, {"widths": [8]}).net().eval()
        assert net(nodes.x[:2]).shape == (2, *nodes.texts.shape[1:])
    shared = {"adapters_learning_rate": 0.1, "adapters_learning_rate_schedule": "own"}
    clip, t5 = (adapter_local(name, {"lr": lr} if lr else {}, shared, epochs=3, rounds=30) for name, lr in (("clip", None), ("t5", 0.2)))
    assert (clip.lr, t5.lr, clip.course, t5.course) == (0.1, 0.2, "restarts", "cosine")
    assert clip.rate(3) == clip.rate(0) == 0.1 and clip.rate(2) < 0.05 and 0 < t5.rate(29) < 0.001


def test_every_round_has_the_metrics_of_the_guides_server(nodes):
    from fedgal.evaluation.sounds import tracked
    t = training(nodes, 2)
    rows = tracked(t.run("serial").history, t.units, [], [len(t.rows(u)) for u in t.units])
    names = {"server/generator_loss", *(f"server/generator_validation_{n}" for n in ("similarity", "mse", "l1"))}
    assert len(rows) == 2 and all(names <= set(row) and all(np.isfinite(row[n]) for n in names) for row in rows)
    gan = replace(t, name="gan", options={"hidden_dim": 8, "latent_dim": 3})         # makes no reconstruction
    assert not any("validation" in n for row in tracked(gan.run("serial").history, t.units, [], [1, 1]) for n in row)


# --- the guide's files ---

def guide(second=False):
    "The keys of the guide's two files."
    flags = {"use_generator": True, "generator_type": "vae", "generator_training_mode": not second, "generator_only_mode": False, "use_pretrained_generators": second}
    common = {"generator_granularity": "unified", "generator_class_groups": None, "generator_checkpoint_dir": "checkpoints/generators", "generator_checkpoint_base_name": "vae_unified",
              "generator_save_checkpoint": not second, "generator_load_checkpoint": second, "adapter_aggregation_mode": "avg", "adapters_learning_rate": 0.001,
              "t5_adapter_learning_rate": 0.001, "clip_adapter_weight_decay": 0.0001, "adapters_learning_rate_schedule": False, "clip_adapter_learning_rate_schedule": True,
              "generate_nodes_images_frequency": 0, "generate_low_memomy_footprint": True, "images_output_dir": "x", "store_audio_embeddings": False}
    of_run = {"synthetic_samples_per_class": 10, "global_model_train": True, "global_model_train_epochs": 5, "global_model_train_from_nodes_adapters": True} if second else \
        {"generator_checkpoint_frequency": 5, "generator_training_epochs": 10, "generator_augmentation": True, "generator_augmentation_noise": 0.1, "generator_validation_frequency": 5,
         "global_model_train": False, "global_model_train_epochs": 0}
    node = lambda *names: {"dataset": "ESC50", "selected_classes": names, "train_folds": [0, 1, 2, 3], "test_folds": [4], "diffusion_type": "flux"}
    return {"experiment": {"name": f"guide_run{1 + second}", "description": "x", "use_balooning": True, "optimize_memory_usage": True},
            "federation": {"algorithm": "FedA2V", "diffusion_type": "flux", "num_clients": 2, "global_rounds": 50 if second else 30, "local_epochs": 3, "eval_gap": 5,
                           "model_aggregation": "per_class_average", "use_saved_audio_embeddings": False},
            "training": {"learning_rate": 0.001, "optimizer": "AdamW", "batch_size": 8, "weight_decay": 0.0001}, "feda2v": {"_comment": "x"} | flags | common | of_run,
            "nodes": {"0": node("tone", "pig"), "1": node("hiss", "clicks")}, "model": {"backbone": "a2v"}, "dataset": {"name": "sounds", "path": "./data"}, "wandb": {"disabled": False}}


@pytest.mark.parametrize("second", [False, True])
def test_a_configuration_of_the_guide_is_an_experiment(places, monkeypatch, second):
    from fedgal.pipeline.guide import translate
    made = translate(json.loads(json.dumps(guide(second))), classes=("tone", "hiss", "clicks"))
    (places / "x.yaml").write_text(yaml.safe_dump(made.values))
    from fedgal.pipeline import plan as planning
    monkeypatch.setattr(planning, "_ensure_data", lambda dataset: None)
    [member] = planning.plan(places / "x.yaml").members
    assert list(member.params) == ["10_data", "52_a2v_use" if second else "22_a2v_train"]
    assert any("pig" in note for note in made.notes) and all("\n" not in note for note in made.notes)
    assert member.params[list(member.params)[-1]]["rounds"] == (50 if second else 30)


@pytest.mark.slow
def test_both_files_of_the_guide_run_one_after_the_other(tmp_path):
    from conftest import Project
    project = Project.make(tmp_path / "project")
    tiny = {"rounds": 1, "generator_training_epochs": 1, "adapter_epochs": 1, "feature_net_options": "{hidden_dim: 8, latent_dim: 3}", "adapter_options": "{widths: [8], heads: 2}"}
    given = [part for pair in tiny.items() for part in ("-p", *map(str, pair))]
    for second in (True, False, True):                     # run 2 before run 1 is an error that names what run 1 leaves
        file = tmp_path / f"run{1 + second}.json"
        file.write_text(json.dumps(guide(second)))
        done = project.fedgal("run", "--a2v-config", file, "--name", f"guide{1 + second}", *given)
        if second and not (project.reports / "guide1").exists():
            assert done.returncode and "client_0_generator.safetensors: no such checkpoint" in done.stderr
        else: assert done.returncode == 0, done.stderr
    sent = json.loads((project.reports / "guide2" / "metrics.json").read_text())["synthetic_samples"]
    assert sent == {"0": 10, "1": 20}                      # classes of the node that the data have x 10


def test_folds_of_the_guide_that_are_not_used_are_refused():
    from fedgal.pipeline.guide import translate
    config = guide()
    config["nodes"]["0"]["train_folds"] = [0, 1]
    with pytest.raises(FedgalError, match="node 0: train_folds = .0, 1."): translate(config, classes=("tone", "hiss", "clicks"))


def test_a_key_that_the_guide_has_not_is_told_with_the_closest():
    from fedgal.pipeline.guide import translate
    config = guide()
    config["feda2v"]["generator_granularty"] = "unified"
    with pytest.raises(FedgalError, match="did you mean 'feda2v.generator_granularity'"): translate(config, classes=("tone", "hiss", "clicks"))

"""What a script and a reader of results use: `import fedgal`, the plain script, opened experiments, exported models, code of one's own."""
import json
import re
import subprocess
import sys

import pytest
from conftest import CHAIN, REPO, TINY, ran
from test_extend import ECHO, HALF_STEP, SMOOTH, outcome

SCRIPT = """
import fedgal

seed, level = 0, "high"
data = fedgal.load_dataset("digits")
split = fedgal.make_split(data, imbalance=20, n_clients=5, alpha=0.3, val_fraction=0.1, seed=seed)
run = fedgal.train(data, split, seed=seed, model="cnn8", rounds=10, local_epochs=2, batch_size=16, lr=0.05)
bank = fedgal.fit_generator(run, "gaussian", level=level, bank_per_class=200).bank
scores = {}
for arm in ("none", "refit", "gaussian"):
    tuned = fedgal.apply_arm(run, arm, bank if arm == "gaussian" else None, level=level)
    scores[arm] = fedgal.evaluate(tuned, data.x_test, data.y_test, data.n_classes).balanced_accuracy
    print(arm, f"{scores[arm]:.1%}")
"""


def lines_of(text): return [line for line in text.splitlines() if line.strip()]


def test_the_plain_script_is_short_and_runs():
    assert len(lines_of(SCRIPT)) <= 18
    found = {}
    exec(SCRIPT, found)
    assert found["scores"]["none"] < found["scores"]["refit"] and found["scores"]["none"] < found["scores"]["gaussian"]


def test_the_lines_of_the_readme_run(capsys):
    "And print what stands below them, as far as another processor allows."
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    [(lines, said)] = re.findall(r"(?s)```python\n(.*?)```\n\n```text\n(.*?)```", readme)
    assert len(lines_of(lines)) <= 10
    exec(lines, {})
    scores = lambda text: {arm: float(score.rstrip("%")) for arm, score in map(str.split, lines_of(text)) if score.endswith("%")}
    assert scores(capsys.readouterr().out) == pytest.approx(scores(said), abs=3)


def test_the_names_are_there_and_import_nothing():
    code = "import fedgal, sys, time; names = dir(fedgal); print('torch' in sys.modules, {'open', 'train', 'evaluate'} <= set(names))"
    start = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert start.stdout.split() == ["False", "True"]
    spent = next(int(line.split("|")[1]) for line in start.stderr.splitlines() if line.split("|")[-1].strip() == "fedgal")
    assert spent < 500_000, "microseconds, with everything that it imports"
    import fedgal
    assert all(getattr(fedgal, name) is not None for name in fedgal._NAMES)
    with pytest.raises(AttributeError, match="no attribute 'opne'"): _ = fedgal.opne


@pytest.fixture
def opened(tiny, monkeypatch):
    "What `fedgal.open` finds where the tiny experiment has run."
    for name in ("artifacts", "reports"): monkeypatch.setenv(f"FEDGAL_{name.upper()}", str(getattr(tiny, name)))
    monkeypatch.setenv("FEDGAL_ROOT", str(tiny.home))
    import fedgal
    return fedgal.open("tiny")


def test_a_result_opens_again(tiny, opened):
    import fedgal
    published = tiny.json("tiny/metrics.json")["arms"]
    assert set(opened.arms) == set(published) and opened.arms[0] == "none"
    assert opened.metrics["balanced_accuracy"].to_dict() == {a: r["balanced_accuracy"] for a, r in published.items()}
    data = opened.data
    for arm in ("none", "gaussian", "oracle"):
        score = fedgal.evaluate(opened.model(arm), data.x_test, data.y_test, data.n_classes)
        assert score.balanced_accuracy == published[arm]["balanced_accuracy"], arm
    assert opened.bank("gaussian").counts().max() == TINY["bank_per_class"] and opened.params["rounds"] == TINY["rounds"]
    assert opened.statistics("low").count.sum() == opened.split.class_counts().sum()
    assert opened.recall.shape == (len(published), data.n_classes)


def test_published_numbers_open_in_a_fresh_clone(tmp_path, monkeypatch):
    "Every experiment that is committed, without a single artifact."
    import fedgal
    for name, value in {"ROOT": REPO, "ARTIFACTS": tmp_path / "artifacts", "REPORTS": tmp_path / "runs"}.items(): monkeypatch.setenv(f"FEDGAL_{name}", str(value))
    quick = fedgal.open("quickstart")
    assert list(quick.metrics.index) == ["none", "refit", "gaussian", "generator", "oracle"] and quick.params["rounds"] == 40
    for path in sorted((REPO / "reports").glob("*/run.json")):
        found, members = fedgal.open(path.parent.name), json.loads(path.read_text(encoding="utf-8"))["members"]
        assert len((list(found)[-1] if len(members) > 1 else found).metrics), path.parent.name
    assert fedgal.open("fedgen_mnist").metrics.attrs["missing"] == 0


def test_a_script_and_a_stage_train_the_same(opened):
    "Bit for bit: the script calls what the stage calls."
    import torch

    import fedgal
    trained = fedgal.train(opened.data, opened.split, **{n: v for n, v in opened.upstream("20_train").items() if n != "seed"})
    for name, tensor in opened.model("none").state_dict().items(): assert torch.equal(tensor, trained.model.state_dict()[name]), name


def test_an_exported_model_is_the_model(tiny, opened, tmp_path):
    import torch

    import fedgal
    done = tiny.fedgal("export", "tiny", "--arm", "gaussian", "--to", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    again = fedgal.load_model(tmp_path / "model")
    x = opened.data.x_test[:8].float() / 255
    assert torch.equal(again(x).logits, opened.model("gaussian")(x).logits)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fedgal\n") and "| `gaussian` |" in card
    wrong = tiny.fedgal("export", "tiny", "--arm", "gausian")
    assert wrong.returncode == 2 and "did you mean 'gaussian'" in wrong.stderr


# --- code of one's own ---

WIDE = """
from torch import nn
from fedgal.models.networks import Network, Parts, dense


class Wide(Network):
    smallest = 8

    def parts(self, in_shape, norm):
        low = nn.Sequential(nn.Conv2d(in_shape[0], 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        return Parts(low, dense(low, in_shape, 24))
"""
OWN = {"model": "my_net:Wide", "algorithm": "my_rules:HalfStep", "algorithm_options": {"share": 0.7}, "local_loss": "my_rules:Smooth",
       "generator": "my_echo:Echo", "generator_options": {"noise": 0.2}}


def write_own(project):
    "Three files of the user's in the project's root; the first imports a fourth."
    (project.home / "my_net.py").write_text("from my_sizes import *\n" + WIDE)
    (project.home / "my_sizes.py").write_text("WIDTH = 24\n")
    (project.home / "my_rules.py").write_text(HALF_STEP + SMOOTH)
    (project.home / "my_echo.py").write_text(ECHO)


@pytest.mark.slow
def test_classes_of_ones_own_in_a_params_file(project):
    write_own(project)
    project.write("mine", **OWN)
    first = project.fedgal("run", "mine", "--jobs", 1)
    assert first.returncode == 0 and ran(first) == len(CHAIN), first.stderr
    assert set(project.json("mine/metrics.json")["arms"]) >= {"none", "generator"}

    again = project.fedgal("run", "mine")
    assert again.returncode == 0 and ran(again) == 0

    listed = project.fedgal("params", "my_echo:Echo")
    assert "standard deviation of the noise" in listed.stdout, listed.stderr

    (project.home / "my_echo.py").write_text(ECHO.replace("self.options.noise * noise", "2 * self.options.noise * noise"))
    assert outcome(project.fedgal("run", "mine", "--jobs", 1)) == {s: (0, 1) if s in CHAIN[:3] else (1, 0) for s in CHAIN}, "what uses it"
    (project.home / "my_sizes.py").write_text("WIDTH = 25\n")
    planned = project.fedgal("run", "mine", "--dry-run").stdout
    assert "10_data           1 cached" in planned and "20_train          0 cached    1 to run" in planned, "a module that it imports counts too"


WRONG = {
    "model: absent:Net": ["ModuleNotFoundError: No module named 'absent'", "put absent.py into"],
    "model: my_net:Wider": ["has no class 'Wider'", "did you mean 'Wide'"],
    "model: my_rules:HalfStep": ["derive it from fedgal.models.networks.Network"],
    "generator: my_net:Wide": ["derive it from fedgal.generators.base.Generator"],
    "generator: my_half:Half": ["lacks load_state, sample, state"],
    "local_loss: my_broken:Loss": ["loss my_broken:Loss: SyntaxError"],
    "algorithm_options: {shard: 1}": ["algorithm my_rules:HalfStep: unknown option 'shard'", "did you mean 'share'"],
    "arms: [none, 'my_net:Wide']": ["arms = ['none', 'my_net:Wide']"],
}


@pytest.mark.slow
def test_what_is_wrong_with_ones_own_is_one_line(project):
    import yaml
    write_own(project)
    (project.home / "my_broken.py").write_text("class Loss(:\n")
    (project.home / "my_half.py").write_text("from fedgal.generators.base import Generator\nclass Half(Generator):\n    def fit(self, task): return []\n")
    for line, words in WRONG.items():
        project.write("wrong", **(OWN | {"generator_options": {}} | yaml.safe_load(line)))
        done = project.fedgal("run", "wrong")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert all(w in done.stderr for w in words), done.stderr
    assert not project.folders()


# --- the command line ---

@pytest.mark.slow
def test_a_run_of_a_fresh_clone_leaves_git_as_it_was(project):
    git = lambda *args: subprocess.run(["git", *args], cwd=project.home, capture_output=True, text=True, check=True).stdout
    (project.home / ".gitignore").write_text((REPO / ".gitignore").read_text())
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a project")
    env = {"FEDGAL_ARTIFACTS": "artifacts", "FEDGAL_REPORTS": "runs"}
    project.write("short", {n: TINY[n] for n in ("seed", "dataset", "imbalance", "n_clients")} | {"title": "Short", "stages": CHAIN[:1]})
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "an experiment")
    for command in (("run", "short"), ("run", "short", "-p", "seed", "3"), ("report",), ("list",), ("status",)):
        done = project.fedgal(*command, env=env)
        assert done.returncode == 0, done.stderr
    assert git("status", "--porcelain") == ""
    done = project.fedgal("publish", "short", env=env)
    assert done.returncode == 0, done.stderr
    assert {line.split("/")[0] for line in git("status", "--porcelain", "-uall").splitlines()} == {"?? reports"}
    assert not (project.home / "runs" / "short").exists() and "published" in project.fedgal("status", env=env).stdout
    (project.home / "params" / "short.yaml").write_text((project.home / "params" / "short.yaml").read_text() + "alpha: 1.0\n")
    assert project.fedgal("run", "short", env=env).returncode == 0
    refused = project.fedgal("publish", "short", env=env)
    assert refused.returncode == 2 and "not committed" in refused.stderr


@pytest.mark.slow
def test_a_params_file_outside_the_project_draws_its_report_again(project):
    file = project.write("outside", {"title": "Outside", "stages": CHAIN[:1], "dataset": "digits", "imbalance": 10})
    file = file.rename(project.away / "outside.yaml")
    assert project.fedgal("run", file).returncode == 0
    (project.reports / "outside" / "index.html").unlink()
    file.unlink()
    done = project.fedgal("report", "outside")
    assert done.returncode == 0 and (project.reports / "outside" / "index.html").is_file(), done.stdout
    (project.reports / "outside" / "params.yaml").unlink()
    done = project.fedgal("report", "outside")
    assert done.returncode == 2 and "outside: left as it is" in done.stdout


def test_what_cannot_be_written_is_told_before_a_kernel_starts(project):
    (project.home / "file").touch()
    for key in ("ARTIFACTS", "REPORTS"):
        done = project.fedgal("run", "tiny", env={f"FEDGAL_{key}": project.home / "file"})
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"{key.lower()} = " in done.stderr or "file" in done.stderr
    done = project.fedgal("run", ".")
    assert done.returncode == 2 and "is a folder; name a params file" in done.stderr
    assert not project.folders()


def test_a_dry_run_runs_nothing(project):
    done = project.fedgal("run", "tiny", "--dry-run")
    assert done.returncode == 0 and "6 stage runs" in done.stdout and "nothing was run" in done.stdout
    assert not project.folders() and not project.reports.exists()
    assert project.fedgal("--version").stdout.startswith("fedgal 0.")

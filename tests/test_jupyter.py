"""What somebody does in JupyterLab: open a stage, edit its cells, run them, look, save, go on."""
import ast
import contextlib
import json
import re

import nbformat
import pytest
from conftest import CHAIN, TINY, ran
from nbclient import NotebookClient

pytestmark = pytest.mark.slow


class Lab:
    "One open notebook with its kernel; the cells are run one by one, and whatever goes wrong is an error here."

    def __init__(self, project, stage):
        self.path = project.stages / f"{stage}.ipynb"
        self.nb = nbformat.read(self.path, 4)
        self.code = [c for c in self.nb.cells if c.cell_type == "code"]
        self.env = project.env(JPY_SESSION_NAME=self.path)
        self.client = NotebookClient(self.nb, timeout=300, kernel_name="python3", allow_errors=False,
                                     resources={"metadata": {"path": str(self.path.parent)}})

    @contextlib.contextmanager
    def kernel(self):
        with self.client.setup_kernel(env=self.env): yield self

    def edit(self, **lines):
        "Lines of the `parameters` cell, by the name that they assign."
        cell = next(c for c in self.code if "parameters" in c.metadata.get("tags", []))
        for name, line in lines.items():
            cell.source, n = re.subn(rf"(?m)^{name}\b.*$", line, cell.source)
            assert n == 1, name
        return self

    def save(self):
        nbformat.write(self.nb, self.path)
        return self

    def run(self, cells):
        for cell in cells: self.client.execute_cell(cell, self.nb.cells.index(cell))
        return self

    def run_to_stage(self):
        "The cells up to the one that makes the stage."
        i = next(i for i, c in enumerate(self.code) if re.search(r"^stage = Stage\(", c.source, re.M))
        return self.run(self.code[:i + 1])

    def ask(self, source):
        "A cell of one's own below the others: what it shows and prints."
        cell = nbformat.v4.new_code_cell(source)
        self.nb.cells.append(cell)
        self.run([cell])
        return "".join(o.get("text", "") or str(o.get("data", {}).get("text/html") or o.get("data", {}).get("text/plain", ""))
                       for o in cell.outputs)

    def value(self, source): return ast.literal_eval(self.ask(source))

    def last(self): return ast.literal_eval(self.code[-1].outputs[-1]["data"]["text/plain"])

    def printed(self): return "".join(o.get("text", "") for c in self.nb.cells for o in c.get("outputs", []))


def bytes_of(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "manifest.json"}
def manifest(folder): return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
def locks(project): return [p for p in project.artifacts.rglob("*.lock") if p.parent.name != "experiments"]


EDITED = {"params_file": 'params_file: str = "tiny"', "rounds": "rounds: int = 4"}


@pytest.fixture
def lab(copy):
    "The finished tiny project without what its runs left to hold on to."
    for path in locks(copy): path.unlink()
    return copy


def test_an_edited_stage_saved_or_not(lab):
    before = lab.snapshot("20_train")

    with Lab(lab, "20_train").edit(**EDITED).kernel() as unsaved:
        unsaved.run(unsaved.code)
        told = unsaved.last()
        shown = unsaved.ask("stage")
        assert unsaved.value("str(stage.save_as('mine'))").endswith("params/mine.yaml")
    folder = lab.artifacts / "20_train" / told["key"]
    values = bytes_of(folder)
    assert manifest(folder)["params"]["rounds"] == 4 and before.items() < lab.snapshot("20_train").items()

    # every value with where it comes from
    assert "rounds 4 (this cell)" in shown and told["key"] in shown
    assert "imbalance 10.0 (params/tiny.yaml)" in shown and "n_clients 4 (params/tiny.yaml)" in shown
    assert "batch_size" not in shown, "a default is not listed"

    # the same cells, saved
    for path in lab.artifacts.glob(f"20_train/{told['key']}*"):
        if path.is_dir(): [p.unlink() for p in path.iterdir()] and path.rmdir()
    assert not folder.exists()
    Lab(lab, "20_train").edit(**EDITED).save()
    with Lab(lab, "20_train").kernel() as saved: saved.run(saved.code)
    assert saved.last()["key"] == told["key"] and bytes_of(folder) == values

    # a saved edit is nobody else's
    again = lab.fedgal("run", "tiny")
    assert again.returncode == 0 and ran(again) == 0 and again.stdout.count(" cached ") == len(CHAIN)
    [row] = [line for line in lab.fedgal("params", "20_train").stdout.splitlines() if line.split()[:1] == ["rounds"]]
    assert re.search(r"\b3\b", row) and not re.search(r"\b4\b", row), row

    # the next stage takes it up from params/mine.yaml
    trained = lab.snapshot("20_train")
    lab.write("five", rounds=5)
    with Lab(lab, "30_statistics").edit(params_file='params_file: str = "mine"').kernel() as onward:
        onward.run(onward.code)
        rests_on = manifest(lab.artifacts / "30_statistics" / onward.last()["key"])["inputs"]
        assert rests_on["20_train"] == told["key"] and lab.snapshot("20_train") == trained
        assert "running it first" not in onward.printed()

        # where a result is missing, what is new in it
        onward.edit(params_file='params_file: str = "five"').run_to_stage()
        assert "differs from the newest one in: rounds 4 -> 5)" in onward.ask("stage.input('20_train');")


def test_a_value_without_a_type_is_insisted_on(lab):
    "Although it is the default, `rounds = 3` overrides a params file; `rounds: int = 3` is the cell as it was written."
    with Lab(lab, "20_train").edit(params_file='params_file: str = "tiny"').kernel() as book:
        book.run_to_stage()
        assert book.value("rounds, stage.params['rounds']") == (TINY["rounds"], TINY["rounds"]) != (3, 3)
        assert f"rounds {TINY['rounds']} (params/tiny.yaml)" in book.ask("stage")
        assert [p.name for p in lab.folders("20_train")] == [book.value("stage.key")], "what `fedgal run tiny` computed"

        book.edit(rounds="rounds = 3").run_to_stage()
        assert book.value("rounds, stage.params['rounds']") == (3, 3)
        assert "rounds 3 (this cell)" in book.ask("stage")


def test_looking_at_a_stage_locks_nothing(lab):
    with Lab(lab, "20_train").edit(**EDITED).kernel() as first:
        first.run_to_stage()
        first.ask("stage")
        assert not locks(lab)
        with Lab(lab, "20_train").edit(**EDITED).kernel() as second:
            second.run_to_stage()
            assert "waiting" not in second.ask("stage.work;") and second.value("stage.work.is_dir()")
            assert len(locks(lab)) == 1
            first.run_to_stage()
            assert "waiting" not in first.printed(), "reading goes on while another notebook writes"

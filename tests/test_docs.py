"""What README, CONTRIBUTING and notebooks name exists, and what the code imports is declared."""
import ast
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from conftest import REPO

DOCS = ("README.md", "CONTRIBUTING.md")
NOTEBOOKS = sorted(p for p in (REPO / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.S)
OWN = {"fedgal", *(p.stem for p in (REPO / "tests").glob("*.py"))}


def read(name): return (REPO / name).read_text(encoding="utf-8")


# --- what is named exists ---

def paths_in(text):
    "Files and folders of the repository that a text names; none with a `<placeholder>` or a `*` in it."
    return re.findall(r"(?<![\w/<>.])((?:nbs|params|reports|fedgal|tests)/[\w./-]*\b)(?![\w/-]*/?[<*])", text)


def missing_paths(text): return [path for path in paths_in(text) if not (REPO / path).exists()]


@pytest.mark.parametrize("name", DOCS)
def test_every_path_exists(name):
    assert len(paths_in(read(name))) > 10 and missing_paths(read(name)) == []


def links_in(text):
    "Relative targets of Markdown links and pictures outside code."
    targets = re.findall(r"\]\(([^()\s]+)\)", CODE.sub("", re.sub(r"\[`([^`]*)`\]", r"[\1]", text)))
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


def slug(heading): return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def dead_links(text, folder):
    "Links that lead to no file or, within the text, to no heading."
    headings = {"#" + slug(h) for h in re.findall(r"(?m)^#+ (.+)$", text)}
    outside = [t for t in links_in(text) if t not in headings]
    return [t for t in outside if t[0] == "#" or not (folder / t.partition("#")[0]).exists()]


@pytest.mark.parametrize("name", DOCS)
def test_every_link_leads_somewhere(name):
    assert len(links_in(read(name))) > 10 and dead_links(read(name), REPO) == []


def cells_of(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def markdown_of(path):
    "The texts of a notebook's Markdown cells."
    return "\n\n".join("".join(c["source"]) for c in cells_of(path) if c["cell_type"] == "markdown")


def index():
    "What the tour says and what its cells list."
    path = REPO / "nbs" / "index.ipynb"
    shown = [o.get("data", {}).get("text/markdown", "") for c in cells_of(path) for o in c.get("outputs", [])]
    return "\n\n".join([markdown_of(path), *map("".join, shown)])


def test_every_link_of_a_notebook_leads_somewhere():
    dead = {p.relative_to(REPO).as_posix(): found for p in NOTEBOOKS if (found := dead_links(markdown_of(p), p.parent))}
    assert dead == {}


def test_the_index_leads_to_every_room():
    rooms = {p.relative_to(REPO / "nbs").parts[0] for p in NOTEBOOKS} - {"index.ipynb"}
    assert rooms <= {link.split("/")[0] for link in links_in(index())}
    assert dead_links(index(), REPO / "nbs") == []


def commands_in(text):
    "The commands of fedgal that the code in a text calls."
    return {name for code in CODE.findall(text) for name in re.findall(r"(?m)(?:^|`)fedgal ([a-z]+)", code)}


def test_every_command_exists_and_the_manual_names_all():
    from fedgal.cli import parser
    [commands] = [a.choices.keys() for a in parser()._actions if a.choices]
    assert commands_in(markdown_of(REPO / "nbs" / "tutorials" / "manual.ipynb")) == set(commands)
    assert commands_in(read("README.md")) | commands_in(read("CONTRIBUTING.md")) <= set(commands)


def test_the_readme_is_short():
    "Two screens: words outside of tables and of what a notebook writes."
    text = re.sub(r"(?s)<!-- (\w+):begin -->.*?<!-- \1:end -->|```.*?```", "", read("README.md"))
    assert len(re.sub(r"(?m)^\|.*|\]\(\S+\)", "", text).split()) < 400
    answer = re.search(r"(?s)<!-- answer:begin -->(.*?)!\[", read("README.md"))[1]
    assert len(re.sub(r"\]\(\S+\)", "", answer).split()) < 250


def test_what_can_be_chosen_is_explained():
    from fedgal.core.registry import catalogue
    text = markdown_of(REPO / "nbs" / "tutorials" / "choices.ipynb")
    for kind in ("stage", "algorithm", "generator", "arm", "postprocessor"):
        assert [name for name in catalogue()[kind].entries if f"`{name}`" not in text] == [], kind


def test_tutorials_say_how_many_seeds_there_are_and_what_the_test_set_is_for():
    import yaml
    words = {"five": 5, "ten": 10, "twenty": 20}
    texts = {p.name: markdown_of(p) for p in NOTEBOOKS if "tutorials" in p.parts}
    told = [found for text in texts.values() for found in re.findall(r"params/(\w+)\.yaml\)? runs (\w+) seeds", text)]
    assert told, "none says it any more: remove this test"
    for name, n in told:
        sweep = yaml.safe_load((REPO / "params" / f"{name}.yaml").read_text(encoding="utf-8"))["sweep"]
        assert len(sweep["seed"]) == (words.get(n) or int(n)), name
    # four stages read the test set, see reading.ipynb; and the device is in the key, see manual.ipynb
    assert [n for n, text in texts.items() if re.search(r"test set is read once|never part of an experiment", text)] == []


def test_what_is_missing_is_noticed():
    assert missing_paths("`nbs/none.ipynb`, nbs/index.ipynb and `nbs/<room>/<name>.ipynb`") == ["nbs/none.ipynb"]
    text = "# A b\n[x](#a-b) [`y`](no.md) [z](README.md#a) `[c](code)` [w](https://x.org) [v](#c)"
    assert dead_links(text, REPO) == ["no.md", "#c"]
    assert commands_in("fedgal is a library: `fedgal rnu x` and\n```bash\nfedgal run y\n```") == {"rnu", "run"}


# --- what is imported is declared ---

def canonical(name): return re.sub(r"[-_.]+", "-", name).lower()


def declared(extras):
    "Distributions that pyproject.toml asks for, with the named extras."
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *(d for extra in extras for d in project["optional-dependencies"][extra])]
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted}


def third_party(source):
    "Top-level modules that a source imports, at any depth, from neither Python nor the repository."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OWN


@pytest.mark.parametrize("folder, extras", [("fedgal", ("hub", "flower", "ray", "diffusers", "audio", "track")), ("tests", ("dev",))])
def test_every_import_is_declared(folder, extras):
    installed, wanted = packages_distributions(), declared(extras)
    sources = [path.read_text(encoding="utf-8") for path in (REPO / folder).rglob("*.py")]
    imported = set().union(*map(third_party, sources))
    assert len(imported) > 5
    assert {name for name in imported if not wanted & set(map(canonical, installed.get(name, [name])))} == set()


def test_constraints_pin_every_dependency():
    pinned = {canonical(line.partition("==")[0]) for line in read("constraints.txt").splitlines() if "==" in line}
    assert declared(["dev"]) - pinned == set()

"""The house is in order: rooms stand on the rooms above them, and every notebook is short enough to be read."""
import ast
import functools
import graphlib
import importlib.util
import json
import re

import pytest
from conftest import REPO

ROOMS = ("core", "data", "stats", "models", "federated", "generators", "algorithms", "finetune", "privacy", "evaluation", "report",
         "pipeline", "cli")
ASIDE = ("stages", "benchmarks", "tutorials")     # folders of notebooks that export nothing
MODULES = sorted(p for p in (REPO / "fedgal").rglob("*.py") if p.name != "_modidx.py")
NOTEBOOKS = sorted(p for p in (REPO / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
WIDTH, CELL, MODULE = 120, 45, 250
LONG = {"nbs/cli.ipynb": "all commands with their help in one file, so that what can be typed is read in one place"}


def dotted(path): return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
def where(path): return path.relative_to(REPO).as_posix()
def room(module): return (module.split(".") + [""])[1]


@functools.cache
def tree(path): return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def code_cells(path):
    "The sources of a notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def exports(source): return re.search(r"^#\|\s*exporti?\b", source, re.M) is not None
def lines_of(source): return [line for line in source.strip().splitlines() if not line.startswith("#|")]


NAMES = {dotted(p) for p in MODULES}


def imported(path, nodes):
    "The modules of fedgal among import statements."
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            dots = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dots, package) if node.level else dots
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= inner & NAMES or {base}
    return {m for m in found if m.startswith("fedgal.")}


def at_module_level(node):
    "The statements that run when a module is imported."
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_module_level(child)


# --- rooms ---

def test_every_module_lies_in_a_room():
    strangers = {dotted(p) for p in MODULES if dotted(p) != "fedgal" and room(dotted(p)) not in ROOMS}
    assert not strangers


def test_a_room_imports_only_from_rooms_above_it():
    wrong = []
    for path in MODULES:
        for target in sorted(imported(path, ast.walk(tree(path)))):
            here, there = room(dotted(path)), room(target)
            if here and (there not in ROOMS or ROOMS.index(there) > ROOMS.index(here)):
                wrong.append(f"{dotted(path)} -> {target}")
    assert not wrong


def test_modules_do_not_import_each_other_in_circles():
    graph = {dotted(p): imported(p, at_module_level(tree(p))) for p in MODULES}
    try: list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error: pytest.fail(" -> ".join(error.args[1]))


def test_every_folder_of_notebooks_is_a_package():
    folders = {p.parent.relative_to(REPO / "nbs").as_posix() for p in NOTEBOOKS} - {".", *ASIDE}
    packages = {p.parent.relative_to(REPO / "fedgal").as_posix() for p in MODULES} - {"."}
    assert folders == packages


def test_a_notebook_exports_into_the_package_of_its_folder():
    wrong = []
    for path in NOTEBOOKS:
        named = [m[1] for source in code_cells(path) for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", source, re.M)]
        folder = path.parent.relative_to(REPO / "nbs").parts
        want = [] if folder[:1] and folder[0] in ASIDE or path.stem == "index" and not folder else [folder]
        if [tuple(name.split(".")[:-1]) for name in named] != want: wrong.append(f"{where(path)}: {named}")
    assert not wrong


# --- lines, statements, sizes ---

def too_wide(text): return [line for line in text.splitlines() if len(line) > WIDTH]


def without_exported_names(text):
    "A module's source without the list of its names, which nbdev wraps in its own way."
    return re.sub(r"^__all__ = \[.*?\]$", "", text, count=1, flags=re.M | re.S)


def test_no_line_is_too_wide():
    texts = {where(p): without_exported_names(p.read_text(encoding="utf-8")) for p in MODULES}
    texts |= {where(p): "\n".join(code_cells(p)) for p in NOTEBOOKS}

    wide = {name: lines for name, text in texts.items() if (lines := too_wide(text))}
    assert not wide, "\n".join(f"{name}: {len(lines)}, {lines[0][:60]}" for name, lines in wide.items())


def python(source):
    "A cell as Python: without magics and shell lines."
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source))


def is_guard(node): return isinstance(node, ast.If) and all(isinstance(n, ast.Raise) for n in node.body)


def crowded(source):
    "Line numbers of statements that begin behind something else on their line, or that are a tuple of things done."
    body = python(source)
    raised = {id(n) for guard in ast.walk(body) if is_guard(guard) for n in guard.body}
    statements = [n for n in ast.walk(body) if isinstance(n, ast.stmt) and id(n) not in raised]
    lines = [line.encode() for line in source.splitlines()]     # columns of the tree are bytes
    behind = {n.lineno for n in statements if lines[n.lineno - 1][:n.col_offset].strip()}
    tuples = {n.lineno for n in statements if isinstance(n, ast.Expr) and isinstance(n.value, ast.Tuple)}
    return sorted(behind | tuples)


def test_one_statement_a_line():
    found = []
    for path in NOTEBOOKS:
        for source in filter(exports, code_cells(path)):
            found += [f"{where(path)}: {source.splitlines()[line - 1].strip()[:70]}" for line in crowded(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source", ["a = 1; b = 2", "if a: b = 1", "f(), g()", "for x in y: f(x)", "def f(): return 1", "class A: pass",
                                    "if a: raise E\nelse: b = 1", "try:\n    f()\nfinally: g()"])
def test_crowded_lines_are_noticed(source): assert crowded(source)


@pytest.mark.parametrize("source", ["a = 1\nb = 2", "if a: raise E", "if a:\n    raise E", "a, b = f()", "return_ = 1, 2", "x = lambda: 1",
                                    "%time f()", "class A:\n    def f(self):\n        if self: raise E('x')\n        return 1, 2"])
def test_quiet_lines_are_not(source): assert not crowded(source)


def test_an_exported_cell_is_short():
    long = [f"{where(path)}: {len(lines)} lines, {lines[0][:60]}" for path in NOTEBOOKS for source in filter(exports, code_cells(path))
            if len(lines := lines_of(source)) > CELL]
    assert not long, "\n".join(long)


def test_a_module_is_one_idea():
    sizes = {where(p): sum(len(lines_of(s)) for s in code_cells(p) if exports(s)) for p in NOTEBOOKS}
    long = {name: n for name, n in sizes.items() if n > MODULE}
    assert long.keys() <= LONG.keys(), f"{long} have over {MODULE} lines of exported code; split them, or say why not"


def idle(source):
    "Line numbers of calls of `expect_fail` outside a `with`, which run nothing and so check nothing."
    calls = [n.value for n in ast.walk(python(source)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    return sorted(c.lineno for c in calls if ast.unparse(c.func) == "expect_fail")


def test_an_expected_error_is_waited_for():
    found = [f"{where(path)}: {source.splitlines()[line - 1].strip()[:70]}" for path in NOTEBOOKS for source in code_cells(path)
             if not source.startswith("%%") for line in idle(source)]
    assert not found, "write `with expect_fail(...):` or `test_fail(lambda: ..., contains=...)`:\n" + "\n".join(found)


def test_idle_checks_are_noticed():
    assert idle("x = 1\nexpect_fail(lambda: f(), 'no')") == [2] and not idle("with expect_fail(E, contains='no'):\n    f()")


# --- what keys rest on ---

def registries():
    "Name of a registry's variable -> its kind."
    assigned = [n for p in MODULES for n in tree(p).body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)]
    return {n.targets[0].id: n.value.args[0].value for n in assigned if ast.unparse(n.value.func) == "Registry"}


def test_an_entry_that_code_chooses_is_written_with_its_kind():
    "A bare `ENGINES['serial']` would hide the entry's module from the keys; the text `engine:serial` beside it shows it."
    kinds, hidden = registries(), []
    assert len(kinds) > 10
    for path in MODULES:
        if room(dotted(path)) in ("report", "pipeline", "cli"): continue
        nodes = list(ast.walk(tree(path)))
        texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        looked_up = [(n.value, n.slice) for n in nodes if isinstance(n, ast.Subscript)]
        looked_up += [(n.func.value, n.args[0]) for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.args]
        for table, name in looked_up:
            if isinstance(table, ast.Name) and table.id in kinds and isinstance(name, ast.Constant):
                kind = kinds[table.id]
                if not {f"{kind}:{name.value}", f"{kind}:*"} & texts: hidden.append(f"{dotted(path)}: {kind} {name.value}")
    assert not hidden

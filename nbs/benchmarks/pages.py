"""Runs benchmark notebooks and writes the page of each: `python nbs/benchmarks/pages.py [NAME ...] [--stored]`.

What a notebook showed is stored in it, so that page and notebook agree; `--stored` runs none and draws what is stored.
Without names it takes those about speed.
"""
import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
from nbformat.v4 import new_markdown_cell, new_notebook

from fedgal.core.settings import root, settings
from fedgal.pipeline.kernels import kernel_manager
from fedgal.report.exporter import render
from fedgal.report.lighter import lighten

HERE = Path(__file__).resolve().parent
SPEED = ("clients", "small_clients", "many_clients", "engines", "diffusion", "client_generators")


def execute(name):
    "Run a notebook and keep what it showed."
    file = HERE / f"{name}.ipynb"
    with tempfile.TemporaryDirectory(prefix="fedgal-") as folder:
        out = Path(folder) / file.name
        options = {"kernel_name": "python3", "progress_bar": False, "cwd": HERE, "start_timeout": 300}
        options |= {"extra_arguments": ["--IPKernelApp.log_level=50"], "kernel_manager_class": kernel_manager(folder)}
        papermill.execute_notebook(file, out, **options)
        given, done = nbformat.read(file, 4), nbformat.read(out, 4)
    shown = {cell.id: cell.outputs for cell in done.cells if cell.cell_type == "code"}
    for cell in given.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in shown[cell.id] if o.get("name") != "stderr"]
    nbformat.write(given, file)
    subprocess.run([Path(sys.executable).with_name("nbdev-clean"), "--fname", file], cwd=root(), check=True)


def heading(nb):
    "Title and the line below it."
    lines = nb.cells[0].source.splitlines()
    title, line = (next(text[2:] for text in lines if text.startswith(mark)) for mark in ("# ", "> "))
    return title.removeprefix("Benchmark: ").capitalize(), line


def tagged(cell):
    return cell.metadata.get("tags", [])


def figure_of(nb):
    "The first cell that drew something, and what it says."
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            if any(kind.startswith("image/") for kind in out.get("data", {})):
                return cell, out["data"].get("text/plain", "")
    return None, ""


def answer(nb):
    "What the cell tagged `answer` showed, on one line, else what the first figure says."
    shown = [o.get("data", {}).get("text/markdown", "") for c in nb.cells if "answer" in tagged(c) for o in c.outputs]
    return " ".join(("".join(shown).replace("**Answer.**", "") or figure_of(nb)[1]).split()).rstrip(".")


def with_figure_first(nb):
    "The notebook with its first figure below its answer."
    figure = figure_of(nb)[0]
    if figure is not None and "answer" not in tagged(figure):
        figure.metadata["tags"] = [*tagged(figure), "answer"]
        nb.cells.remove(figure)
        nb.cells.append(figure)
    return nb


def led_home(soup):
    "Links to what lies beside a notebook, seen from its page."
    for a in soup.select("main a[href]"):
        target = re.sub(r"[#?].*", "", a["href"])
        if not target or ":" in target or not (HERE / target).is_file():
            continue
        page = HERE / target
        paged = page.parent == HERE and (settings().published / "benchmarks" / f"{page.stem}.html").is_file()
        a["href"] = f"{page.stem}.html" if paged else f"../../nbs/benchmarks/{target}"


def write_pages(names):
    "A page for each notebook, and one that lists all there are."
    home = settings().published / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    for name in names:
        (home / f"{name}.html").touch()  # so that pages find each other
    for name in names:
        nb = with_figure_first(nbformat.read(HERE / f"{name}.ipynb", 4))
        nav = [("All experiments", "../index.html", False), ("All benchmarks", "index.html", False)]
        card = {"notebook": f"nbs/benchmarks/{name}.ipynb"}
        render(nb, heading(nb)[0], nav, card, home / f"{name}.html", edit=led_home)
    found = [file for file in sorted(HERE.glob("*.ipynb")) if (home / f"{file.stem}.html").is_file()]
    stored = [(file.stem, nbformat.read(file, 4)) for file in found]
    rows = [(*heading(nb), answer(nb), stem) for stem, nb in stored]
    asked = {stem: line if line.endswith("?") else f"{line.rstrip('.')}." for _, line, _, stem in rows}
    lines = [f"* [{title}]({stem}.html): *{asked[stem]}* {said}." for title, _, said, stem in rows]
    text = "\n".join(lines)
    listed = new_notebook(cells=[new_markdown_cell(f"# Benchmarks\n\n{text}")])
    render(listed, "Benchmarks", [("All experiments", "../index.html", False)], out=home / "index.html")
    lighten(home)
    return home / "index.html"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SPEED), metavar="NAME")
    parser.add_argument("--stored", action="store_true", help="run nothing")
    given = parser.parse_args()
    for name in () if given.stored else given.names:
        print(name, flush=True)
        execute(name)
    print(write_pages(given.names))


if __name__ == "__main__":
    main()

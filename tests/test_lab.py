"""A real browser: JupyterLab computes what `fedgal run -p` computes; docs and reports work from files. Needs playwright and Debian's chromium."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import CHAIN, REPO, TINY, ran

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'fedgal[browser]'")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def server(project):
    "JupyterLab as `fedgal lab` starts it, with options of its own."
    port = free_port()
    home = project.home.parent / "jupyter"
    env = project.env() | {n: str(home / n) for n in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    options = ["--no-browser", "--port", str(port), "--IdentityProvider.token="] + ["--allow-root"] * (os.geteuid() == 0)
    with open(project.home.parent / "lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "fedgal.cli", "lab", *options], cwd=project.away, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2); break
            except OSError: time.sleep(0.5)
            assert process.poll() is None, (project.home.parent / "lab.log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    page.set_default_timeout(180_000)
    return page


def set_parameter(page, name, line):
    "Replace a line of the `parameters` cell by typing."
    found = page.locator(".jp-CodeCell .cm-line").filter(has_text=re.compile(rf"^{name}: ")).first
    found.scroll_into_view_if_needed()
    found.click()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+End")
    page.keyboard.insert_text(line)


def wait_for(condition, seconds=300):
    for _ in range(seconds):
        if condition(): return
        time.sleep(1)
    raise AssertionError(f"not within {seconds} s")


def test_a_parameter_changed_in_the_browser(project, server, page):
    short = {n: TINY[n] for n in ("title", "seed", "dataset", "imbalance", "n_clients", "rounds")} | {"stages": CHAIN[:2]}
    project.write("short", short)
    notebook = project.stages / "20_train.ipynb"

    page.goto(f"{server}/lab/tree/nbs/stages/20_train.ipynb")
    page.locator(".jp-Notebook .cm-line").filter(has_text="rounds: int").first.wait_for()
    set_parameter(page, "params_file", 'params_file: str = "short"')
    set_parameter(page, "rounds", "rounds: int = 4")
    page.keyboard.press("Control+s")
    wait_for(lambda: "rounds: int = 4" in notebook.read_text(), 60)     # saved: the file has what the cell shows

    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).click()
    wait_for(lambda: project.folders("20_train"))
    page.get_by_text(re.compile("every value that is not the declared default")).first.wait_for()
    assert page.locator(".jp-OutputArea").get_by_text(re.compile(r"rounds 4 \(this cell\)")).count() > 0

    [folder] = project.folders("20_train")
    assert json.loads((folder / "manifest.json").read_text())["params"]["rounds"] == 4
    before = project.snapshot("20_train")
    done = project.fedgal("run", "short", "-p", "rounds", "4")
    assert done.returncode == 0, done.stderr
    assert {s["stage"]: s["key"] for s in project.json("short--rounds=4/run.json")["stages"]}["20_train"] == folder.name
    assert ran(done, "20_train") <= 1, "from a notebook that was run by hand only its page is made"
    assert project.snapshot("20_train") == before, "the same bytes"


# --- pages from files ---

@pytest.fixture
def docs(tmp_path, monkeypatch):
    "The documentation with a few of its lessons."
    from fedgal.report.docs import build
    from fedgal.report.lessons import lessons
    monkeypatch.setenv("FEDGAL_ROOT", str(REPO))
    some = [le for le in lessons() if le.module in ("fedgal.federated.aggregate", "fedgal.stats.radius")]
    assert len(some) == 2
    build(tmp_path / "docs", some)
    return tmp_path / "docs"


def test_the_docs_are_searched_from_a_file(docs, page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((docs / "index.html").as_uri())
    page.get_by_role("navigation").get_by_role("link", name="Search").first.click()
    entries = page.locator(".find li")
    every = entries.count()
    page.get_by_role("searchbox").fill("Aggregate weighted")
    shown = entries.filter(visible=True)
    assert every > 500 and 0 < shown.count() < 20
    shown.locator("a[href^='federated/04_aggregate']").first.click()
    page.locator("h1").wait_for()
    assert page.url.startswith((docs / "federated" / "04_aggregate.html").as_uri())
    assert asked and all(url.startswith(("file:", "data:")) for url in asked), "no request leaves the folder"


SWEEP = """# A sweep

| arm | rounds | accuracy, % | seeds |
|---|---|---|---|
| refit | 40 | 81.5 | 5 |
| gaussian | 40 | 88.8 | 5 |
| none | 20 | 9.2 | 5 |
"""


def columns(page):
    "Texts of the columns that can be seen."
    heads = page.locator("main thead th")
    seen = [i for i in range(heads.count()) if heads.nth(i).is_visible()]
    rows = [row.locator("td, th").all_inner_texts() for row in page.locator("main tbody tr").all()]
    return {heads.nth(i).inner_text().removesuffix(" ↑").removesuffix(" ↓"): [row[i] for row in rows] for i in seen}


def test_a_sweep_table_is_sorted_and_nothing_is_lost_without_scripts(browser, page, tmp_path):
    from fedgal.report.publish import publish_text
    publish_text(SWEEP, "A sweep", tmp_path / "sweep" / "index.html")
    address = (tmp_path / "sweep" / "index.html").as_uri()
    page.goto(address)
    written = columns(page)
    page.get_by_text("accuracy, %").click()
    assert columns(page)["arm"] == ["none", "refit", "gaussian"], "as numbers, not as texts"
    page.get_by_text("accuracy, %").click()
    assert columns(page)["arm"] == ["gaussian", "refit", "none"]
    page.get_by_label("Only what differs").check()
    assert list(columns(page)) == ["arm", "rounds", "accuracy, %"]
    page.get_by_label("Only what differs").uncheck()
    assert list(columns(page)) == list(written)

    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(address)
    assert columns(plain) == written and plain.get_by_label("Only what differs").count() == 0

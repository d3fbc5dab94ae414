"""JupyterLab in a real browser: what somebody changes there is what `fedgal run -p` computes. Needs playwright and Debian's chromium."""
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
from conftest import CHAIN, TINY, ran

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
def page():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.set_default_timeout(180_000)
        yield page
        browser.close()


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

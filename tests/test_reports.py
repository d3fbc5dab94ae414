"""Pages that need nothing but themselves, say what their figures show, and do not hide what failed."""
import re
import shutil

import nbformat
import pytest
from conftest import CHAIN, REPO, Project, ran

BREAK = 'raise RuntimeError("the <sensor> is broken")'


def pages(project): return sorted(project.reports.rglob("*.html"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    "A project in which the second stage fails."
    project = Project.make(tmp_path_factory.mktemp("broken") / "project")
    nb = nbformat.read(project.stages / "20_train.ipynb", 4)
    next(c for c in nb.cells if "result = fit(" in c.source).source = BREAK
    nbformat.write(nb, project.stages / "20_train.ipynb")
    project.write("cracked", title=None, stages=CHAIN[:3], **dict.fromkeys(("generator", "gen_steps", "bank_per_class", "finetune_rounds", "finetune_steps", "oracle_per_class")))
    project.first = project.fedgal("run", "cracked")
    return project


def check(page):
    from fedgal.report.sanitise import page_problems
    from fedgal.report.style import SCRIPTS, script
    text = page.read_text(encoding="utf-8")
    assert page_problems(text) == []
    assert set(re.findall(r"<script[^>]*>(.*?)</script>", text, re.S | re.I)) <= {script(name) for name in SCRIPTS}
    loaded = re.findall(r"""(?:src|srcset|poster)\s*=\s*["']?(?!["']?data:)([^"'> ]+)|<link[^>]*href=["']?(?!data:)([^"'> ]+)|url\((?!["']?data:)([^)]*)\)|@import""", text)
    assert loaded == [], f"{page.name} asks for {loaded}"
    images = re.findall(r"<img\b[^>]*>", text)
    assert all(re.search(r'\salt="[^"]{10,}"', i) for i in images)
    assert text.lstrip().lower().startswith("<!doctype html") and re.search(r'<html[^>]*\blang="', text) and re.search(r"<title>[^<]+</title>", text)
    assert str(page.parents[2]) not in text, "a path of this machine"
    return len(images)


def test_pages_stand_alone(tiny):
    assert len(pages(tiny)) == len(CHAIN) + 1
    assert sum(map(check, pages(tiny))) >= 12, "figures are shown"


def test_every_link_between_pages_leads_somewhere(tiny):
    for page in pages(tiny):
        for href in re.findall(r'<a\b[^>]*href="([^"]+)"', page.read_text()):
            target, _, anchor = href.partition("#")
            if re.match(r"https?:", target): continue
            file = (page.parent / target).resolve() if target else page
            assert file.is_file(), f"{page.name} -> {href}"
            if anchor and file.suffix == ".html": assert f'id="{anchor}"' in file.read_text(), f"{page.name} -> {href}"


def test_the_front_page_tells_the_result(tiny):
    text, metrics = (tiny.reports / "tiny" / "index.html").read_text(), tiny.json("tiny/metrics.json")
    assert metrics["fingerprint"] in text
    assert tiny.json("tiny/run.json")["stages"][-1]["key"] in text
    assert metrics["protocol"] in text
    for arm, a in metrics["arms"].items(): assert arm in text and f"{100 * a['balanced_accuracy']:.1f}" in text


def test_the_index_shows_the_run(tiny):
    text = (tiny.reports / "index.html").read_text()
    accuracy = tiny.json("tiny/metrics.json")["arms"]["generator"]["balanced_accuracy"]
    assert 'href="tiny/index.html"' in text and f"{100 * accuracy:.1f}" in text


def test_a_failed_stage_has_its_page(broken):
    assert broken.first.returncode == 3 and "20_train: RuntimeError: the <sensor> is broken" in broken.first.stderr
    page = broken.reports / "cracked" / "index.html"
    text = page.read_text()
    check(page)
    assert "20_train" in text and "the &lt;sensor&gt; is broken" in text and "<sensor>" not in text
    assert (broken.reports / "cracked" / "10_data.html").is_file(), "what finished is shown"
    assert not (broken.reports / "cracked" / "metrics.json").exists()
    record = broken.json("cracked/run.json")
    assert [s["status"] for s in record["stages"]] == ["ran", "failed", "skipped"]
    assert record["status"] == "failed" and record["failed_stage"] == "20_train"


def test_a_failed_run_is_a_row_of_the_index(broken):
    text = (broken.reports / "index.html").read_text()
    [row] = [r for r in re.findall(r"<tr\b.*?</tr>", text, re.S) if "cracked" in r]
    assert "failed" in row.lower() and 'href="cracked/index.html"' in row
    check(broken.reports / "index.html")
    assert "failed" in broken.fedgal("status").stdout


@pytest.mark.slow
def test_a_run_that_is_mended_replaces_its_failure(broken, tmp_path):
    project = broken.clone(tmp_path / "project")
    shutil.copy(REPO / "nbs" / "stages" / "20_train.ipynb", project.stages)
    done = project.fedgal("run", "cracked")
    assert done.returncode == 0 and ran(done) == 2, done.stderr
    text = (project.reports / "cracked" / "index.html").read_text()
    assert "sensor" not in text
    assert "failed" not in re.search(r"<tr\b(?:(?!</tr>).)*cracked.*?</tr>", (project.reports / "index.html").read_text(), re.S)[0].lower()

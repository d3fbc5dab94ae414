"""The documentation is whole: every link leads somewhere, names that it gives exist, and it is light enough to be published."""
import json
import re
import subprocess
from html import unescape
from urllib.parse import unquote

import pytest
from conftest import REPO

GUIDES = sorted((REPO / "nbs" / "tutorials").glob("from_*.ipynb"))


@pytest.fixture(autouse=True)
def repository(monkeypatch, tmp_path):
    for name, value in {"ROOT": REPO, "ARTIFACTS": tmp_path / "artifacts"}.items(): monkeypatch.setenv(f"FEDGAL_{name}", str(value))


def rows_of(path):
    "The cells of the tables in a guide: name there, name here, note."
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return [r for r in rows if r[1] != "here"]


def known_names():
    "Parameters, options, entries, commands, stages, and what modules define."
    from fedgal.cli import parser
    from fedgal.core.registry import catalogue
    from fedgal.report.lessons import lessons
    from fedgal.report.reference import entry_options, stage_parameters
    [commands] = [a.choices.keys() for a in parser()._actions if a.choices]
    names = {f"fedgal {c}" for c in commands} | {n for rows in stage_parameters().values() for n in rows} | set(stage_parameters())
    for kind, table in catalogue().items():
        names |= {kind, *table.entries}
        if kind != "stage": names |= {row.name for entry in table.entries for row in entry_options(kind, entry)}
    every = lessons()
    sources = "".join(p.read_text(encoding="utf-8") for p in (REPO / "fedgal").rglob("*.py"))
    return names | {n for le in every for n in le.names} | set(re.findall(r"def (\w+)\(self", sources)) | {"metrics.json", "comparison.json", "device", "sweep"}


def test_a_published_comparison_tells_its_headroom_and_its_setup():
    comparisons = sorted((REPO / "reports").glob("*/comparison.json"))
    for file in comparisons:
        rooms = [room for room in json.loads(file.read_text(encoding="utf-8"))["headroom"] if room["seeds"]]
        page = re.sub(r"<[^>]+>|\s+", " ", (file.parent / "index.html").read_text(encoding="utf-8"))
        assert "finished runs" in page, f"{file.parent.name}: how it was compared"
        for room in rooms: assert f"{100 * room['headroom']:.1f} points" in page, f"{file.parent.name}: headroom of {room['params']}"
    assert len(comparisons) > 10


@pytest.mark.slow
def test_what_a_guide_calls_something_here_exists():
    known = known_names()
    assert len(GUIDES) == 6
    for path in GUIDES:
        here = [name for row in rows_of(path) for name in re.findall(r"`([^`]+)`", row[1])]
        assert len(here) > 10 and {name for name in here if name not in known} == set(), path.name


@pytest.mark.slow
def test_every_link_of_the_documentation_leads_somewhere_and_it_is_light(tmp_path):
    from fedgal.report.docs import build, dead_links
    from fedgal.report.sanitise import page_problems
    out = REPO / "docs_tested"    # beside the reports, to which pages lead
    try:
        pages = build(out)
        assert len(pages) > 150 and dead_links(out) == []
        assert page_problems((out / "search.html").read_text(encoding="utf-8")) == []
        assert sum(p.stat().st_size for p in pages) < 25e6
    finally:
        import shutil
        shutil.rmtree(out, ignore_errors=True)


def test_the_documentation_of_a_new_project_is_whole_and_takes_nothing_away(tmp_path, monkeypatch, capsys):
    "In a project of `fedgal init` there is no index of experiments yet; and a folder with something in it is left alone."
    from fedgal.cli import main
    project, mine = tmp_path / "project", tmp_path / "thesis" / "chapter.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    assert main(["init", str(project)]) == 0
    for name, value in {"ROOT": project, "REPORTS": project / "runs", "PUBLISHED": project / "reports"}.items(): monkeypatch.setenv(f"FEDGAL_{name}", str(value))
    assert main(["docs", str(mine.parent)]) == 2 and "holds what `fedgal docs` did not write" in capsys.readouterr().err
    assert main(["docs", str(project)]) == 2 and mine.read_text() == "years of work" and (project / "settings.ini").is_file()
    assert main(["docs"]) == 0, capsys.readouterr().err
    (project / "docs" / "own.txt").write_text("mine")
    (project / "runs").mkdir()
    (project / "runs" / "index.html").write_text("<p>ran</p>")
    assert main(["docs"]) == 0 and (project / "docs" / "own.txt").read_text() == "mine"
    assert 'href="../runs/index.html"' in (project / "docs" / "index.html").read_text()


def test_every_link_of_the_published_reports_leads_somewhere():
    from fedgal.report.docs import dead_links
    assert dead_links(REPO / "reports") == []
    assert sum(p.stat().st_size for p in (REPO / "reports").rglob("*") if p.is_file()) < 40e6


def test_the_files_beside_a_page_say_what_its_tables_say():
    "Every table in all its forms, cell by cell."
    from bs4 import BeautifulSoup

    from fedgal.report.takeaway import FORMS, table_texts
    count, other = 0, []
    for page in sorted((REPO / "reports").rglob("*.html")):
        text = re.sub(r"data:[\w/+]+;base64,[\w+/=]+", "data:,", page.read_text(encoding="utf-8"))
        for table, line in re.findall(r'(?s)<table\b((?:(?!<table\b).)*?)</table></div>\s*<p class="takeaway">(.*?)</p>', text):
            texts = table_texts(BeautifulSoup(f"<table{table}</table>", "html.parser").table)
            for href in re.findall(r'href="([^"]+)"', line):
                file = page.parent / unquote(href)
                said, now = file.read_text(encoding="utf-8"), FORMS[file.suffix[1:]](*texts)
                same = json.loads(said) == json.loads(now) if file.suffix == ".json" else said == now
                other += [] if same else [file.relative_to(REPO).as_posix()]
                count += 1
    files = [p for p in (REPO / "reports").glob("**/files/*") if p.suffix in (".csv", ".json", ".tex", ".md")]
    assert other == [] and count == len(files) > 1000


def test_published_pages_hold_no_progress_and_an_audit_answers_in_a_list():
    pages = {page: re.sub(r"data:[\w/+]+;base64,[\w+/=]+", "data:,", page.read_text(encoding="utf-8")) for page in (REPO / "reports").rglob("*.html")}
    assert [page.name for page, text in pages.items() if re.search(r" \d+/\d+ · \d+ s\n", text)] == []
    audits = [text for page, text in pages.items() if page.parent.name.startswith("audit_") and page.name == "index.html"]
    assert audits and all(re.search(r"Answer\.</strong> \d of \d kinds of message leak\.</p>\s*<ul>\s*<li>", text) for text in audits)


def test_no_two_rows_of_a_published_comparison_have_the_same_name():
    "Where one arm has two differences, a column names the row that each is against."
    import csv
    tables = sorted((REPO / "reports").glob("*/files/index-all-arms.csv"))
    for path in tables:
        rows = list(csv.DictReader(path.open(encoding="utf-8")))
        names = [(row["row"], row.get("against"), row.get("runs")) for row in rows]
        assert len(set(names)) == len(names), path.parent.parent.name
    assert len(tables) > 10


def test_published_experiments_are_compared_by_the_values_of_their_parameters(tmp_path, monkeypatch, capsys):
    "quickstart is one of the runs of digits_levels; CIFAR is other data; the page of a comparison links what there is."
    from fedgal.cli import main
    from fedgal.report.docs import dead_links
    monkeypatch.setenv("FEDGAL_REPORTS", str(tmp_path / "runs"))
    monkeypatch.setenv("FEDGAL_PUBLISHED", str(REPO / "reports"))
    assert main(["compare", "quickstart", "digits_levels"]) == 0
    told = capsys.readouterr().out
    paired = re.search(r"paired by seed\n(.*?)\n\n", told, re.S)[1]
    assert [line.split("  ")[1] for line in paired.splitlines()[1:]] == ["none", "refit, low", "gaussian, low", "mlp, low", "oracle, low"]
    differ = told[told.index("Parameters that differ"):].splitlines()[2:]
    assert {line.split()[0] for line in differ if line.startswith("  ")} == {"arms", "level", "seed"}
    assert main(["compare", "quickstart", "cifar10_lt"]) == 0
    told = capsys.readouterr().out
    assert "different data (digits; cifar10): not comparable" in told and "paired by seed" not in told
    assert dead_links(tmp_path) == [] and len(list(tmp_path.rglob("*.html"))) == 2


def test_a_published_figure_fits_a_phone():
    "It shrinks to the width of the screen and opens in full, its title is text, and the overview has a narrow form."
    wide, closed, count = [], [], 0
    for page in sorted((REPO / "reports").rglob("*.html")):
        text = re.sub(r"data:[\w/+]+;base64,[\w+/=]+", "data:,", page.read_text(encoding="utf-8"))
        name, style = page.relative_to(REPO).as_posix(), re.search(r"(?s)<style>(.*?)</style>", text)[1]
        wide += [name] if re.search(r"figure img[^{]*\{[^}]*(?:max-width: *max|min-width)", style) else []
        for figure, file in re.findall(r'(?s)<figure\b((?:(?!</figure>).)*)</figure>\s*<p class="takeaway"><a [^>]*?href="(files/[^"]*\.svg)"', text):
            titled = "font-weight:700" not in (page.parent / unquote(file)).read_text(encoding="utf-8") or "<figcaption>" in figure
            closed += [] if f'<a href="{file}"><img' in figure and titled else [f"{name}: {file}"]
            count += 1
    assert wide == [] and closed == [] and count > 200
    assert 'class="on-narrow"' in (REPO / "reports" / "index.html").read_text(encoding="utf-8")


# --- where a published page comes from ---

RECORDS = sorted((REPO / "reports").glob("*/run.json"))


def facts_of(page):
    "What the card of a page says: name -> text."
    pairs = re.findall(r"(?s)<dt>([^<]+)</dt>\s*<dd>(.*?)</dd>", page.read_text(encoding="utf-8"))
    return {name: unescape(re.sub(r"<[^>]+>", "", value)).strip() for name, value in pairs}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_a_published_page_says_what_its_record_says(path):
    "Commit, params file and key; and the versions of the stage are the same on every page that names them."
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["status"] == "finished" and (REPO / record["params_file"]).is_file()
    stages = {stage["href"]: stage for stage in record["stages"]}
    pages = {page.name: facts_of(page) for page in path.parent.glob("*.html")}
    assert set(pages) == set(stages) and "index.html" in pages
    for name, facts in pages.items():
        assert (facts["Git"], facts["Params file"], facts["Key"]) == (record["git"], record["params_file"], stages[name]["key"]), name
        assert "torch" in facts["Versions"] and re.search(rf"python {record['python'].rsplit('.', 1)[0]}\b", facts["Versions"]), name


def test_published_pages_were_made_by_commits_of_the_history():
    "None by a tree with changes, none by a commit that nobody else has."
    history = subprocess.run(["git", "log", "--format=%H"], cwd=REPO, capture_output=True, text=True)
    if history.returncode or (REPO / ".git" / "shallow").exists(): pytest.skip("no history here")
    commits = history.stdout.split()
    made_by = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))["git"] for path in RECORDS}
    assert len(made_by) > 15 and {name: git for name, git in made_by.items() if not any(c.startswith(git) for c in commits)} == {}


def test_published_files_are_light():
    "As `fedgal publish` leaves them: writing them once more would save nothing."
    from fedgal.report.lighter import lighter_svg
    heavy = []
    for path in (p for p in (REPO / "reports").rglob("*") if p.suffix in (".json", ".ipynb", ".svg", ".html")):
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".json", ".ipynb"): light = text.count("\n") == 1
        elif path.suffix == ".svg": light = lighter_svg(text) == text
        else: light = 'src="data:image/png' not in text
        heavy += [] if light else [path.relative_to(REPO).as_posix()]
    assert heavy == []

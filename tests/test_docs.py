"The documentation: built without a warning, every link leads somewhere, and a browser is content with it."
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refcomm.papers.claims import VERDICTS
from filelock import FileLock

from conftest import ROOT

for module in ("sphinx", "myst_nb", "furo", "latex2mathml", "nbdev"):
    pytest.importorskip(module, reason="the site needs it: pip install 'refcomm[docs]'")

TOOLS = ROOT/".ci"/"docs"
NOTEBOOKS = [p.relative_to(ROOT/"nbs").with_suffix("") for p in (ROOT/"nbs").rglob("*.ipynb")
    if not p.parent.name.startswith((".", "_"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site, made once for all workers."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base)/"site"
    with FileLock(f"{folder}.lock"):
        if not (folder/"built").is_file():
            made = subprocess.run([sys.executable, TOOLS/"build.py", folder], capture_output=True, text=True)
            assert made.returncode == 0, made.stdout + made.stderr
            (folder/"built").touch()
    return folder/"html"


def page(notebook):
    folder, name = str(notebook.parent), f"{notebook.name}.html"
    if folder == ".": return Path(name) if name == "index.html" else Path("lessons", name)
    return Path(folder, name) if folder.startswith(("papers", "tutorials")) else Path("papers", folder, name)


@pytest.mark.slow
def test_every_notebook_and_every_export_is_there(site):
    assert not [str(n) for n in NOTEBOOKS if not (site/page(n)).is_file()]
    for p in (ROOT/"nbs").glob("[0-9]*.ipynb"):
        module = p.stem.split("_", 1)[1]
        html = (site/"api"/f"{module}.html").read_text()
        shown = {m.lower() for m in re.findall(r'id="(?:def|class)-([\w-]+)"', html)}
        for name in importlib.import_module(f"refcomm.{module}").__all__:
            assert f"{module}.{name}".lower().replace(".", "-").replace("_", "-") in shown, f"{module}.{name}"
    store = (site/"api"/"runs.store.html").read_text()
    assert 'id="def-runs-store-store-move-aside"' in store.lower(), "methods of private bases belong to the class"
    assert "#| export" not in (site/"lessons"/"27_channels.html").read_text()


@pytest.mark.slow
def test_items_show_their_figure_recipe_and_claims(site):
    recipes = [json.loads(p.read_text()) for p in (ROOT/"figures").glob("*.json")]
    items = {str(page(n)): n for n in NOTEBOOKS}
    for r in recipes:
        name = f"papers/{r['paper']}/{r['item']}.html"
        assert name in items, f"{name} has no notebook"
        html = (site/name).read_text()
        assert f"_images/{r['paper']}_{r['item']}.png" in html and f"{r['paper']}_{r['item']}.csv" in html
        assert r["command"].split("--")[0].strip() in re.sub("<[^>]+>", "", html)
        assert sum(html.count(f"<td><p>{v}</p>") for v in VERDICTS) == len(r["claims"])


def test_the_glossary_speaks_of_the_code():
    words = re.findall(r"^(\w+_\w+)$", (ROOT/"nbs"/"glossary.md").read_text(), re.M)
    code = "\n".join(p.read_text() for p in (ROOT/"refcomm").rglob("*.py"))
    assert {"alphabet_size", "word_length", "message_length", "vocab_size", "n_attributes", "n_values",
        "min_symbols"} <= set(words)
    assert not [w for w in words if not re.search(rf"\b{w}\b", code)]


def test_a_broken_link_is_named(tmp_path):
    ((tmp_path/"a.html").write_text('<h1 id="top"></h1><a href="b.html#here">b</a> <a href="#top">up</a> <a '
        'href="https://example.org/x">out</a>'))
    (tmp_path/"b.html").write_text('<p id="here"></p>')
    check = lambda: subprocess.run([sys.executable, TOOLS/"links.py", tmp_path], capture_output=True, text=True)
    assert check().returncode == 0
    (tmp_path/"b.html").write_text('<img src="gone.png"><a href="../secret.html">out of the site</a>')
    wrong = check()
    assert wrong.returncode == 1 and wrong.stderr.splitlines() == ["a.html: b.html#here", "b.html: ../secret.html",
        "b.html: gone.png"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'refcomm[browser]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium: pytest.skip("no Chromium here")
    with playwright.sync_playwright() as p:
        launched = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


PATIENCE = 300_000 # milliseconds for a page: the cores are shared with other tests

LOOK = """() => ({
  images: [...document.images].filter(i => { i.loading = 'eager'; return !(i.complete && i.naturalWidth) }).map(i => i.src),
  wide: document.documentElement.scrollWidth > innerWidth, page: getComputedStyle(document.body).backgroundColor })"""


def opened(browser, site, names, **context):
    "What a browser sees of some pages, and what it complains about."
    tab, trouble, seen = browser.new_context(**context).new_page(), [], {}
    tab.set_default_timeout(PATIENCE)
    tab.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: trouble.append(str(e)))
    tab.on("requestfailed", lambda r: trouble.append(r.url))
    tab.on("request", lambda r: trouble.append(r.url) if r.url.startswith("http") else None) # nothing of another host's
    for name in names:
        tab.goto((site/name).as_uri())
        seen[name] = tab.evaluate(LOOK)
    tab.context.close()
    return seen, trouble


@pytest.mark.slow
def test_every_page_in_a_browser(site, browser):
    names = sorted(str(p.relative_to(site)) for p in site.rglob("*.html"))
    seen, trouble = opened(browser, site, names)
    assert not trouble and not [n for n, s in seen.items() if s["images"] or s["wide"]]
    some = ["index.html", "lessons/24_bottlenecks.quantize.html", "papers/eqc/table5.html", "api/channels.html",
        "glossary.html", "security.html"]
    phone, trouble = opened(browser, site, some, viewport=dict(width=390, height=800), color_scheme="dark")
    assert not trouble and not [n for n, s in phone.items() if s["images"] or s["wide"]]
    assert phone["index.html"]["page"] != seen["index.html"]["page"] # dark is dark


@pytest.mark.slow
def test_search_finds_a_module(site, browser):
    tab = browser.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.goto(f"{(site/'search.html').as_uri()}?q=quantizer")
    tab.wait_for_selector("#search-results li a")
    assert "quantize" in tab.inner_text("#search-results")

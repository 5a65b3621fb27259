"The page of results: what it shows, what it refuses to show, and how it looks in a browser."
import re
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT
from refcomm.papers.claims import counted
from refcomm.publish import catalogue, report
from refcomm.core import ConfigError, StoreError
from refcomm.publish.figures import save
from refcomm.papers.evidence import PAPERS, contents

FIGURES = ROOT/"figures"
KNOWN = {item: catalogue.title(path) for item, path in catalogue.notebooks().items()}


class Reader(HTMLParser):
    "Start tags with their attributes, the visible text, and whether every tag is closed."
    void = {"meta", "link", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text); self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"): self.texts.append(data)

    def all(self, tag, **attrs):
        return [a for t, a in self.tags if t == tag and all(a.get(k.rstrip("_")) == v for k, v in attrs.items())]


@pytest.fixture(scope="module")
def html(): return report.page(*report.read_items(FIGURES), KNOWN)


@pytest.fixture
def folder(tmp_path):
    "A copy of three figures, to be spoilt."
    d = tmp_path/"some"
    d.mkdir()
    for name in ("eqc_table5", "eqc_figure4", "sms_figure2"):
        for p in FIGURES.glob(f"{name}.*"): shutil.copy(p, d)
    return d


PLAIN = dict(id="a", sentence="b", test="c", source="", kind="result", ours=False, numbers={}, intervals={},
    verdict="refuted", cause="", power="", decide="")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes, "sha256": "edited"}))


def test_every_item_once(html):
    page = Reader(html)
    recipes = [json.loads(p.read_text()) for p in FIGURES.glob("*.json")]
    shown = [a["id"] for a in page.all("article")]
    assert sorted(shown) == sorted(f"{r['paper']}-{r['item']}" for r in recipes) and len(shown) == len(set(shown))
    text = " ".join(page.texts)
    for r in recipes:
        for part in (r["note"], r["runs"], r["command"], *(c["sentence"] for c in r["claims"])): assert part in text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")} <= set(ids)


def test_what_is_not_made_is_listed(html):
    made = {p.stem for p in FIGURES.glob("*.json")}
    missing = [(paper, i, title) for paper in PAPERS for i, kind, title in contents(paper).values if kind == "result"
        and f"{paper}_{i}" not in made]
    missing += [(n.split("/")[0], None, report.heading(n.split("/")[0], t)) for n, t in KNOWN.items()
        if n.replace("/", "_") not in made
        and tuple(n.split("/")) not in {(p, i) for p in PAPERS for i in contents(p)["item"]}]
    assert len(Reader(html).all("tr", class_="missing")) == len({(p, i or t) for p, i, t in missing})
    text = "".join(Reader(html).texts)
    assert all(title in text
        for _, _, title in missing) and text.count("not made yet") == html.count('<tr class="missing">')


def test_the_page_is_light(html, tmp_path):
    "The page holds small pictures, however many items there are; the folder beside it holds the files themselves."
    assert len(html.encode()) <= 2_000_000
    for a in Reader(html).all("img"):
        kind, data = a["src"].split(",", 1)
        data = base64.b64decode(data, validate=True)
        assert kind == "data:image/webp;base64" and a["alt"] and len(data) <= 30_000
        assert Image.open(io.BytesIO(data), formats=["WEBP"]).size == (int(a["width"]), int(a["height"]))
    large = (FIGURES/"iac_figure3.png").read_bytes()
    for room in (10**6, 20_000, 4_000):
        data, size = report.thumbnail(large, room)
        assert len(data) <= room and (size[0] == report.WIDEST) == (room == 10**6)


def test_pictures_and_numbers_lie_beside_the_page(folder, tmp_path):
    out = tmp_path/"my results #1.html"
    items, _ = report.write_report(out, folder, KNOWN)
    page = Reader(out.read_text(encoding="utf-8"))
    links = {unquote(a["href"]) for a in page.all("a") if not a["href"].startswith("#")}
    made = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in (tmp_path/"my results #1_files").iterdir()}
    assert links == set(made) and len(links) == 2*len(items)
    assert all(data == (folder/os.path.basename(name)).read_bytes() for name, data in made.items())
    times = {p: p.stat().st_mtime_ns for p in (tmp_path/"my results #1_files").iterdir()}
    report.write_report(out, folder, KNOWN)
    assert times == {p: p.stat().st_mtime_ns for p in times}, "what is there already is not written again"


def test_what_lies_in_the_way_of_the_files_is_named(folder, tmp_path):
    (tmp_path/"report_files").write_text("mine")
    with pytest.raises(StoreError, match="name another file with --out"):
        report.write_report(tmp_path/"report.html", folder)
    assert (tmp_path/"report_files").read_text() == "mine" and not (tmp_path/"report.html").exists()


def test_contents_lead_to_every_item(html):
    page = Reader(html)
    listed = [a["data-item"] for a in page.all("li") if "data-item" in a]
    assert sorted(listed) == sorted(a["id"] for a in page.all("article")) and len(page.all("input", type="search")) == 1
    assert {f"#{i}" for i in listed} <= {a["href"] for a in page.all("a")}


def test_nothing_is_fetched(html):
    page = Reader(html)
    for tag, a in page.tags:
        for k in ("src", "srcset", "action", "data"): assert a.get(k, "data:").startswith("data:"), (tag, a[k][:80])
        assert a.get("href", "#").startswith(("#", "data:") + (("refcomm-report_files/",) if tag == "a" else ())), (tag,
            a["href"][:80])
    style = html[html.index("<style>"):html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]


def test_the_ledger_counts_what_the_recipes_claim(html):
    claims = {c["id"]: (r["paper"], c) for r in (json.loads(p.read_text()) for p in FIGURES.glob("*.json"))
        for c in r["claims"]}
    rows = [(a["data-paper"], a["data-verdict"]) for a in Reader(html).all("tr", class_="claim")]
    assert sorted(rows) == sorted((paper, c["verdict"]) for paper, c in claims.values())
    n = counted([c for _, c in claims.values()])
    assert f"Of {sum(n.values())} claims of the papers" in html and all(f"{k} {'are ' if i == 0 else ''}{v}" in html
        for i, (v, k) in enumerate(n.items()) if k)


def test_texts_are_escaped(folder):
    evil = "</script><img src=x onerror=alert(1)> & \"quotes\" '"
    claim = dict(id="eqc.x", sentence=evil, test="a < b", source=evil, kind="result", ours=False, numbers={evil: 1.},
        intervals={}, verdict="untestable here", cause=evil, power="", decide=evil)
    edit(folder/"eqc_table5.json", title=evil, note=evil, runs=evil, data=evil, command=evil, seeds=[evil],
        claims=[claim])
    t = pd.read_csv(folder/"eqc_table5.csv")
    t["row"] = t["column"] = t["note"] = evil
    t.to_csv(folder/"eqc_table5.csv", index=False)
    (folder/"<b>.json").write_text('{"sha256": "edited"}')
    html = report.page(*report.read_items(folder), {"eqc/<i>": evil})
    page = Reader(html)
    assert evil in page.texts and "<b>.json has no paper" in "".join(page.texts) and not [a for _, a in page.tags
        if "onerror" in a]
    assert (len(page.all("img")) == 3 and evil not in html and "<b>.json" not in html
        and re.search("1 (are )?untestable here", html))


@pytest.mark.parametrize("spoil, says", [
    (lambda d: (d/"eqc_table5.json").write_text("{"), "no readable recipe beside eqc_table5.png"),
    (lambda d: (d/"eqc_table5.json").unlink(), "no readable recipe beside eqc_table5.png"),
    (lambda d: (d/"eqc_table5.json").write_bytes(b"\xff\xfe"), "no readable recipe beside eqc_table5.png"),
    (lambda d: (d/"eqc_table5.json").write_text("[]"), "eqc_table5.json is list"),
    (lambda d: edit(d/"eqc_table5.json", note=None), "eqc_table5.json has no note"),
    (lambda d: edit(d/"eqc_table5.json", item="table6"), "eqc_table5.json is the recipe of eqc_table6"),
    (lambda d: edit(d/"eqc_table5.json", profile="cpuu"), "unknown profile in eqc_table5.json 'cpuu'"),
    (lambda d: edit(d/"eqc_table5.json", profile="smoke"), "eqc_table5 was made at smoke, which is no result"),
    (lambda d: edit(d/"eqc_table5.json", claims=[{}]), "a claim in eqc_table5.json has no id"),
    (lambda d: edit(d/"eqc_table5.json", claims=[dict(PLAIN, numbers=dict(x="y"))]), "decided by what is not a number"),
    (lambda d: edit(d/"eqc_table5.json", claims=[dict(PLAIN, verdict="refuted?")]), "did you mean 'refuted'"),
    (lambda d: (d/"eqc_table5.png").unlink(), "No such file or directory: 'eqc_table5.png'"),
    (lambda d: (d/"eqc_table5.png").write_bytes((d/"eqc_table5.png").read_bytes()[:5000]), "eqc_table5: "),
    (lambda d: (d/"eqc_table5.png").write_text("<svg/>"), "cannot identify image file"),
    (lambda d: (d/"eqc_table5.csv").unlink(), "No such file or directory: 'eqc_table5.csv'"),
    (lambda d: (d/"eqc_table5.csv").write_text(""), "No columns to parse"),
    (lambda d: (d/"eqc_table5.csv").write_text((d/"eqc_table5.csv").read_text().replace("0.997", "much")),
    "could not convert string to float"),
])
def test_a_damaged_item_is_named_and_left_out(folder, spoil, says):
    spoil(folder)
    items, problems = report.read_items(folder)
    assert [i["name"] for i in items] == ["eqc/figure4", "sms/figure2"]
    assert len(problems) == 1 and says in problems[0] and str(folder) not in problems[0]
    html = report.page(items, problems, KNOWN)
    page = Reader(html)
    assert len(page.all("article")) == 2 and problems[0] in page.texts
    assert len([a for a in page.all("aside") if a["class"] == "problems"]) == 1


def test_smoke_is_never_a_result(home, command):
    "Smoke figures stay out, wherever they lie."
    import matplotlib.pyplot as plt
    made = save("eqc", "table1", pd.DataFrame(dict(x=[1])), plt.figure(), [], "smoke", "eqc Table 1: toy", "none")
    r = command("report", "--figures", made.parent, "--out", home/"page.html")
    page = Reader((home/"page.html").read_text())
    assert (r.returncode == 0 and r.stdout.startswith("0 items") and "eqc_table1 was made at smoke" in r.stderr
        and not page.all("img") and not page.all("article"))
    assert command("report", "--out", home/"none.html").returncode == 2, "the folder for results is empty"


@pytest.mark.slow
def test_the_command(home, tmp_path, command, html):
    a, b = tmp_path/"a.html", tmp_path/"new"/"refcomm-report.html"
    r = command("report", "--figures", FIGURES, "--out", a)
    assert r.returncode == 0 and str(a) in r.stdout and not r.stderr
    assert command("report", "--figures", FIGURES, "--out", b).returncode == 0 and b.read_text(encoding="utf-8") == html
    assert a.read_text(encoding="utf-8") == html.replace("refcomm-report_files/", "a_files/")
    here = subprocess.run([sys.executable, "-c", "from refcomm.cli import main; main()", "report"], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "REFCOMM_FIGURES": str(FIGURES)})
    assert here.returncode == 0 and (tmp_path/"refcomm-report.html").read_bytes() == b.read_bytes(), here.stderr


def test_bad_input_is_one_line(folder, home, tmp_path, command):
    (tmp_path/"file").write_text("")
    for args, says in ((["--out", tmp_path/"a.html"], "no figures in"),
        (["--figures", tmp_path/"none", "--out", tmp_path/"a.html"], "name another folder with --figures"),
                       (["--figures", folder, "--out", tmp_path/"file"/"a.html"], "name another file with --out"),
                       (["--figures", folder, "--out", tmp_path], "name another file with --out")):
        r = command("report", *args)
        assert (r.returncode == 2 and says in r.stderr and not r.stdout
            and len(r.stderr.strip().splitlines()) == 1), r.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "some"], "nothing half-written is left"
    with pytest.raises(ConfigError, match="no figures in"): report.write_report(tmp_path/"a.html", tmp_path/"none")
    with pytest.raises(StoreError, match="Is a directory; name another file"): report.write_report(tmp_path, folder)


def test_differences_are_those_of_the_numbers(html):
    numbers = pd.read_csv(FIGURES/"eqc_table5.csv", dtype=dict(column=str))
    item = next(i for i in report.read_items(FIGURES)[0] if i["name"] == "eqc/table5")
    lines = {(t["row"], line["column"]): line for t in item["beside"]["tables"] for line in t["lines"]}
    assert len(lines) == len(numbers)
    for r in numbers.itertuples():
        line = lines[r.row, r.column]
        assert line["ours"] == f"{r.ours:.3f}" and line["published"] == ("–" if pd.isna(r.published)
            else f"{r.published:.3f}") and line["off"] == (str(r.within) == "False")
        if not pd.isna(r.difference):
            assert abs(float(line["difference"].replace("−", "-")) - r.difference) <= .0005 + 1e-9


def test_intervals_are_shown_where_they_were_kept(html, folder):
    for item in report.read_items(FIGURES)[0]:
        if not item["beside"]: continue
        numbers = pd.read_csv(FIGURES/f"{item['name'].replace('/', '_')}.csv")
        lines = [line for t in item["beside"]["tables"] for line in t["lines"]]
        shown = {True: sorted(line["interval"] for line in lines if line["known"]),
            False: {line["interval"] for line in lines if not line["known"]}}
        low = numbers.low if "low" in numbers else pd.Series(dtype=float)
        assert len(shown[True]) == low.notna().sum() and all(" … " in i for i in shown[True]) and shown[False] <= {"–",
            "one seed", "3 seeds"}
        if low.notna().any():
            assert ((numbers.low <= numbers.ours)[low.notna()].all()
                and (numbers.ours <= numbers.high)[low.notna()].all())
    assert "95 % interval" in html and "standard errors of both numbers" in html
    t = pd.read_csv(folder/"eqc_table5.csv").assign(low=.1234, high=.5678)
    t.loc[0, ["low", "high"]] = float("nan")
    t.to_csv(folder/"eqc_table5.csv", index=False)
    page = Reader(report.page(*report.read_items(folder)))
    assert page.texts.count("0.123 … 0.568") == len(t) - 1 and page.texts.count("3 seeds") == 1
    t.drop(columns=["low", "high"]).to_csv(folder/"eqc_table5.csv", index=False)
    page = Reader(report.page(*report.read_items(folder)))
    assert page.texts.count("3 seeds") == len(t), "made before intervals were kept"


def test_the_pages_of_results_are_those_of_the_figures(shipped_figures):
    from refcomm.publish.results import results_in_rows, results_page
    items = report.read_items(shipped_figures)[0]
    assert results_in_rows(items) in (ROOT/"README.md").read_text(encoding="utf-8")
    assert (ROOT/"figures"/"README.md").read_text(encoding="utf-8") == results_page(items)
    assert len((ROOT/"README.md").read_bytes()) <= 10_000


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as p:
        own = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try: b = p.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except sync_api.Error as e: pytest.skip(f"no Chromium: {str(e).splitlines()[0]}")
        yield b
        b.close()


@pytest.fixture
def opened(browser, tmp_path):
    "Open a page with the settings given; a busy machine has two minutes for it."
    contexts = []
    def open_(html, prepare=lambda page: None, **settings):
        (tmp_path/"page.html").write_text(html, encoding="utf-8")
        contexts.append(browser.new_context(reduced_motion="reduce", offline=True, **settings))
        contexts[-1].set_default_timeout(120_000)
        page = contexts[-1].new_page()
        prepare(page)
        page.goto((tmp_path/"page.html").as_uri())
        return page
    yield open_
    for c in contexts: c.close()


@pytest.fixture
def few(folder): return report.page(*report.read_items(folder))


@pytest.mark.parametrize("scheme, width",
    [("light", 1280), ("dark", 1280), ("light", 720), ("dark", 390), ("light", 320)])
def test_in_a_browser(opened, html, scheme, width):
    said, asked = [], []
    def listen(page):
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url[:40]))
    page = opened(html, listen, viewport=dict(width=width, height=844), color_scheme=scheme)
    page.wait_for_function("[...document.images].every(i => i.complete)")
    widths = page.evaluate("[...document.images].map(i => i.naturalWidth)")
    assert len(widths) == len(list(FIGURES.glob("*.png"))) and min(widths) > 0
    fits = lambda: page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert fits()
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert fits(), "with the numbers shown, too"
    r, g, b = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(r, g, b) < 60) if scheme == "dark" else (min(r, g, b) > 230)

    rows = Reader(html).all("tr", class_="claim")
    visible = lambda: page.locator("tr.claim:visible").evaluate_all("rows => rows.map(r => [r.dataset.paper, r.dataset.verdict])")
    assert len(visible()) == len(rows)
    page.locator("label", has_text="refuted").click()
    failed = [[a["data-paper"], a["data-verdict"]] for a in rows if a["data-verdict"] == "refuted"]
    assert 0 < len(failed) < len(rows) and visible() == failed
    page.locator("label", has_text="sms").click()
    both = [f for f in failed if f[0] == "sms"]
    assert visible() == both and page.locator("output").inner_text() == f"{len(both)} of {len(rows)} claims"
    assert page.locator(".ledger tbody:visible").count() == 1, "headings of other papers are hidden as well"
    page.locator("label", has_text="untestable here").click()
    assert visible() == [f for f in ([a["data-paper"], a["data-verdict"]] for a in rows)
        if f == ["sms", "untestable here"]]
    page.locator("label", has_text="all").first.click(); page.locator("label", has_text="all").last.click()
    assert len(visible()) == len(rows) and fits()
    assert not said and not [u for u in asked if not u.startswith(("file:", "data:"))], (said, asked)


def test_search_and_contents_in_a_browser(opened, html):
    page = opened(html, viewport=dict(width=1440, height=900))
    assert page.evaluate("document.documentElement.scrollHeight") <= 20_000
    shown = lambda what: page.locator(f"{what}:visible").count()
    items, claims = shown("article"), shown("tr.claim")
    page.locator("#search").fill("gumbel table")
    assert 0 < shown("article") < items and 0 <= shown("tr.claim") < claims
    assert shown(".contents [data-item]") == shown("article")
    assert page.locator(".search p").inner_text().startswith(f"{shown('article')} of {items} items, ")
    page.locator("#search").fill("")
    assert shown("article") == items and shown("tr.claim") == claims
    page.locator(".contents a[href='#eqc-table5']").click()
    assert page.locator("#eqc-table5 .facts").is_visible() and page.locator("article > details[open]").count() == 1


def test_in_a_browser_without_script(opened, few):
    page = opened(few, java_script_enabled=False)
    assert not page.locator(".filters").is_visible() and not page.locator(".search").is_visible()
    assert page.locator("tr.claim").first.is_visible() and page.locator("article summary").first.is_visible()


def test_printed(opened, few):
    "On paper the numbers are shown and the filter is not."
    page = opened(few, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))"); page.emulate_media(media="print")
    assert page.locator("details").count() == page.locator("details[open]").count() > 0
    assert page.locator(".pairs").count() == page.locator(".pairs:visible").count() > 0
    assert not page.locator(".filters").is_visible() and not page.locator(".contents").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("main details[open]").count() == 0


def change(folder, name, **fields):
    recipe = json.loads((folder/f"{name}.json").read_text(encoding="utf-8"))
    (folder/f"{name}.json").write_text(json.dumps(recipe | fields | dict(sha256="edited")), encoding="utf-8")


def claim(**fields): return dict(id="x", statement="x", evidence="x", numbers=dict(a=1), verdict="holds") | fields


BROKEN = {
    "a bomb for a picture": lambda d, n: Image.new("1", (30_000, 30_000)).save(d/f"{n}.png"),
    "a picture cut short": lambda d, n: (d/f"{n}.png").write_bytes((d/f"{n}.png").read_bytes()[:60]),
    "a chunk that lies": lambda d, n: (d/f"{n}.png").write_bytes((d/f"{n}.png").read_bytes()[:33] + b"\xff"*40),
    "a recipe nested too deeply": lambda d, n: (d/f"{n}.json").write_text("["*100_000),
    "a title of half a character": lambda d, n: change(d, n, title="\ud800"),
    "a title of another kind": lambda d, n: change(d, n, title=["x"]),
    "a number beyond floats": lambda d, n: change(d, n, claims=[claim(numbers=dict(a=10**400))]),
    "a number that is none": lambda d, n: (d/f"{n}.csv").write_text((d/f"{n}.csv").read_text().replace("0.", "x.", 1)),
    "numbers that are no text": lambda d, n: (d/f"{n}.csv").write_bytes(b"\xff\xfe\x00row"),
    "no numbers": lambda d, n: (d/f"{n}.csv").write_text(""),
    "a folder for numbers": lambda d, n: ((d/f"{n}.csv").unlink(), (d/f"{n}.csv").mkdir()),
    "a cost that is text": lambda d, n: change(d, n, costs=dict(runs="many", seconds={}, epochs=[])),
    "seeds of another kind": lambda d, n: change(d, n, seeds=[{"a": 1}]),
    "a claim with odd numbers": lambda d, n: change(d, n, claims=[claim(numbers={"a": None})]),
    "a loop for a recipe": lambda d, n: ((d/f"{n}.json").unlink(), (d/f"{n}.json").symlink_to(d/f"{n}.json")),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_broken_figure_is_named_and_the_rest_is_shown(folder, tmp_path, kind):
    BROKEN[kind](folder, "eqc_table5")
    items, problems = report.write_report(tmp_path/"report.html", folder, KNOWN)
    html = (tmp_path/"report.html").read_text(encoding="utf-8")
    assert {"eqc/figure4", "sms/figure2"} <= {i["name"] for i in items}
    if "eqc/table5" not in {i["name"] for i in items}:
        assert len(problems) == 1 and ("eqc_table5" in problems[0]
            or "eqc/table5" in problems[0]) and problems[0].count("\n") == 0 and "not shown" in html.lower()
    assert Reader(html)

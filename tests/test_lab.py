"JupyterLab in a browser, as a person meets it: open a notebook, choose Run All Cells, look. Only `make test-lab` asks for this."
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest

from conftest import ROOT, free_port
from refcomm.papers.evidence import PAPERS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LACKING = [why for lacks, why in [(not importlib.util.find_spec("jupyterlab"),
    "jupyterlab: pip install 'refcomm[notebooks]'"),
                                  (not importlib.util.find_spec("playwright"),
                                  "playwright: pip install 'refcomm[browser]'"),
                                  (not CHROMIUM, "a browser on the PATH: apt-get install chromium")] if lacks]
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(LACKING), reason=f"needs {' and '.join(LACKING)}")]
REPRODUCTIONS = sorted(str(p.relative_to(ROOT/"nbs").with_suffix("")) for paper in PAPERS
    for p in (ROOT/"nbs"/"papers"/paper).glob("*.ipynb"))
LESSONS = ["38_games.referential", "40_games.contrastive", "41_games.patchgame", "59_sms.complexity"]
STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  const cells = Array.from(panel?.content?.model?.cells ?? []).filter(c => c.type == 'code').map(c => c.toJSON());
  return {
    idle: panel?.sessionContext?.session?.kernel?.status == 'idle',
    left: cells.filter(c => !c.execution_count).length,
    stopped: cells.some(c => c.outputs.some(o => o.output_type == 'error')),
  };
}"""


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer: return json.load(answer)


def quiet(folder):
    "Settings under which Lab fetches no news and asks no questions."
    path = folder/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(fetchNews="false", checkForUpdates=False)))
    return folder


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab with nothing of the user's: its address, and the empty folder that it shows."
    own, port = tmp_path_factory.mktemp("lab"), free_port()
    root, log = own/"notebooks", own/"server.log"
    root.mkdir()
    env = {k: v for k, v in os.environ.items()
        if k not in ("MPLBACKEND", "REFCOMM_PROGRESS", "REFCOMM_DATA", "JPY_SESSION_NAME")}
    env |= dict(REFCOMM_HOME=own/"home", REFCOMM_FIGURES=own/"figures", PYTHONPATH=ROOT, OMP_NUM_THREADS="1",
        IPYTHONDIR=own/"ipython", JUPYTERLAB_SETTINGS_DIR=quiet(own/"settings"),
                JUPYTERLAB_WORKSPACES_DIR=own/"workspaces",
                **{f"JUPYTER_{k.upper()}_DIR": own/k for k in ("config", "data", "runtime")})
    options = dict(ip="127.0.0.1", port=port, allow_root=True, open_browser=False, root_dir=root) | {"port_retries": 0}
    command = [sys.executable, "-m", "jupyterlab", *(f"--ServerApp.{k}={v}" for k, v in options.items()),
        "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with open(log, "wb") as f:
        server = subprocess.Popen(command, cwd=root, env={k: str(v) for k, v in env.items()}, stdout=f,
            stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try: get(f"http://127.0.0.1:{port}/api/status"); break
            except OSError: time.sleep(.5)
        else: pytest.fail(f"JupyterLab did not answer within two minutes:\n{log.read_text()}")
        yield f"http://127.0.0.1:{port}", root
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill(); server.wait()


@pytest.fixture(scope="session")
def screenshots(request):
    folder = ROOT/"build"/"screenshots" # git ignores it, `make clean` removes it
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    request.config.get_terminal_writer().line(f"\nscreenshots are in {folder}")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def copy(name, root):
    "Copy a notebook, without outputs and with `profile` set to smoke where it is a parameter."
    nb = json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"], n = re.subn(r'^profile: str = "\w+"', 'profile: str = "smoke"', "".join(cell["source"]),
                flags=re.M)
            assert n == 1, name
    file = root/f"{name.replace('/', '_')}.ipynb"
    file.write_text(json.dumps(nb), encoding="utf-8")
    return file.name


@pytest.fixture
def run_all(lab, browser, screenshots):
    "Open a notebook of the folder, run all of it from the menu, save: the page, and the code cells that the server then has."
    pages = []

    def run(file, seconds=900):
        pages.append(page := browser.new_page(viewport=dict(width=1400, height=1000)))
        page.set_default_timeout(1000*seconds)
        page.goto(f"{lab[0]}/lab/tree/{file}?reset")
        page.wait_for_function(f"() => ({STATE})().idle")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_function(f"() => {{ const s = ({STATE})(); return s.idle && (s.stopped || !s.left); }}",
            polling=500)
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.screenshot(path=screenshots/f"{file}.png")
        return page, [c for c in get(f"{lab[0]}/api/contents/{file}")["content"]["cells"] if c["cell_type"] == "code"]
    yield run
    for page in pages:
        page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
        page.close()


def outputs(cells, kind): return [o for c in cells for o in c["outputs"] if o["output_type"] == kind]


def check_whole(page, cells, fewest=1):
    "Every cell ran, in order, without an error, and every figure and widget is drawn."
    assert outputs(cells, "error") == []
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    figures = sum("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])
    drawn = page.locator(".jp-RenderedImage img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(drawn) == figures >= fewest and min(drawn, default=99) > 50
    assert page.get_by_text(re.compile("Error (displaying|creating|rendering)|Loading widget")).count() == 0


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_runs_and_shows_its_progress(run_all, lab, screenshots, name):
    runs = lambda: len(list((lab[1].parent/"home"/"runs").glob("*/*/record.json")))
    before = runs()
    page, cells = run_all(copy(name, lab[1]))
    check_whole(page, cells)
    bars = page.locator(".widget-hprogress .progress")
    assert bars.count() == sum("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for c in cells
        for o in c["outputs"]) >= (runs() > before)
    if not bars.count(): return # nothing was left to do
    bars.first.scroll_into_view_if_needed()
    box = bars.first.bounding_box()
    assert box["width"] > 100 and box["height"] > 5
    assert "100%" in page.locator(".jupyter-widgets.widget-hbox").first.inner_text()
    page.screenshot(path=screenshots/f"{name.replace('/', '_')}_progress.png")


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs(run_all, lab, name):
    check_whole(*run_all(copy(name, lab[1])))


def test_messages_are_explored_by_hand(run_all, lab, screenshots):
    page, cells = run_all(copy("77_interact.explore", lab[1]))
    check_whole(page, cells, 0)
    shown, (game, _, symbol) = page.locator(".widget-html .refcomm"), page.locator(".widget-text input").all()
    game.scroll_into_view_if_needed()
    sent, changed = shown.inner_text(), shown.locator("code.changed")
    assert changed.count() == 0 and shown.locator("img").count() == 8
    was = symbol.input_value()
    symbol.fill("3" if was != "3" else "4")
    symbol.press("Enter")
    changed.first.wait_for()
    assert changed.count() == 1 and shown.inner_text() != sent
    page.screenshot(path=screenshots/"explore_changed.png")
    page.get_by_role("button", name="as sent").click()
    changed.wait_for(state="detached")
    assert shown.inner_text() == sent and symbol.input_value() == was


def test_the_receiver_is_played_by_hand(run_all, lab, screenshots):
    page, cells = run_all(copy("78_interact.play", lab[1]))
    check_whole(page, cells, 0)
    shown, target = page.locator(".widget-html .refcomm"), page.locator(".widget-html figure.target")
    button = lambda name: page.locator(".jupyter-button").get_by_text(name, exact=True)
    button("1").scroll_into_view_if_needed()
    for n in (1, 2):
        assert target.count() == 0 and shown.locator("> div img").count() == 5
        button(str(n)).click()
        target.wait_for()
        assert (f"of {n}; chance {n/5:.1f}" in shown.inner_text()
            and "you" in shown.locator("figcaption").nth(n - 1).inner_text())
        assert button("1").is_disabled()
        page.screenshot(path=screenshots/f"play_{n}.png")
        button("next").click()
        target.wait_for(state="detached")


def test_what_fails_is_seen_to_fail(run_all, lab):
    "The checks above can fail: a cell that raises stops the notebook and is found."
    cell = lambda source: dict(cell_type="code", id=f"c{len(source)}", metadata={}, source=source, outputs=[],
        execution_count=None)
    spec = dict(display_name="Python 3", language="python", name="python3")
    (lab[1]/"broken.ipynb").write_text(json.dumps(dict(cells=[cell("1"), cell("1/0"), cell("'late'")],
        metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)))
    page, cells = run_all("broken.ipynb")
    assert [o["ename"] for o in outputs(cells, "error")] == ["ZeroDivisionError"] and [c["execution_count"]
        for c in cells] == [1, 2, None]
    with pytest.raises(AssertionError): check_whole(page, cells)

"The package as it is built, installed and imported."
import ast
import collections
import configparser
import json
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile

import pytest

import refcomm
from conftest import PROGRAMS, ROOT


def test_versions_agree():
    settings = configparser.ConfigParser(); settings.read(ROOT/"settings.ini")
    assert settings["DEFAULT"]["version"] == refcomm.__version__
    assert f"version: {refcomm.__version__}" in (ROOT/"CITATION.cff").read_text()


@pytest.mark.slow
def test_import_has_no_side_effect():
    subprocess.run([sys.executable, PROGRAMS/"import_everything.py"], check=True)


def test_the_library_stands_without_notebook_tooling():
    for p in (ROOT/"refcomm").rglob("*.py"):
        if p.name == "_modidx.py": continue
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore|execnb|IPython)", p.read_text(), re.M), p


def test_one_notebook_one_module():
    exports = [(m, p) for p in (ROOT/"nbs").glob("*.ipynb")
        for m in re.findall(r"#\| default_exp ([\w.]+)", p.read_text())]
    assert len({m for m, _ in exports}) == len(exports)
    for module, p in exports:
        assert p.stem.split("_", 1)[1] == module, f"{p.name} exports {module}"
        assert (ROOT/"refcomm"/f"{module.replace('.', '/')}.py").is_file()


def test_notebooks_stand_in_reading_order():
    "Each has a number of its own, and what it exports imports only what comes before it."
    number = {p.stem.split("_", 1)[1]: int(p.stem.split("_")[0]) for p in (ROOT/"nbs").glob("[0-9]*.ipynb")}
    assert len(set(number.values())) == len(number)
    for module, own in number.items():
        code, room = (ROOT/"refcomm"/f"{module.replace('.', '/')}.py").read_text(), module.split(".")[:-1]
        for dots, name in re.findall(r"^\s*from (\.+)([\w.]*) import", code, re.M):
            base = room[:len(room) - len(dots) + 1]
            used = ".".join([*base, *filter(None, name.split("."))])
            assert number.get(used, -1) < own, f"{module} imports {used}, which comes later"


def test_every_package_folder_is_built():
    listed = tomllib.loads((ROOT/"pyproject.toml").read_text())["tool"]["setuptools"]
    code = {"refcomm" + "".join(f".{q}" for q in p.parent.relative_to(ROOT/"refcomm").parts)
        for p in (ROOT/"refcomm").rglob("__init__.py")}
    notebooks = {f"refcomm.notebooks.{'.'.join(p.parent.relative_to(ROOT/'nbs').parts)}"
        for d in ("papers", "benchmarks") for p in (ROOT/"nbs"/d).rglob("*.ipynb")}
    assert set(listed["packages"]) == code | notebooks | {"refcomm.notebooks", "refcomm.recipes"}
    assert {p for p in listed["package-data"] if "notebooks" in p} == notebooks


def test_reproduction_notebooks_are_clean_and_parameterised():
    for p in [*(ROOT/"nbs"/"papers").rglob("*.ipynb"), *(ROOT/"nbs"/"benchmarks").rglob("*.ipynb")]:
        cells = json.loads(p.read_text())["cells"]
        assert all(not c["outputs"] and c["execution_count"] is None for c in cells
            if c["cell_type"] == "code"), f"{p.name} has outputs"
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1, p.name
        assert "eval: false" not in p.read_text()


def test_figures_are_results():
    "What figures/ holds was made at cpu or better and says how."
    for p in (ROOT/"figures").glob("*.png"):
        recipe = json.loads(p.with_suffix(".json").read_text())
        assert recipe["profile"] in ("cpu", "gpu", "paper") and p.with_suffix(".csv").is_file()
        assert recipe["note"] and recipe["command"].startswith("refcomm reproduce")
        if recipe["seeds"]:
            assert (recipe["runs"] and "commit none" not in recipe["runs"]
                and "+" not in recipe["runs"].split("torch")[0]), "runs come from a commit"


def test_kept_figures_can_be_redrawn():
    "Each has records of its runs, or a notebook that draws it from the numbers beside it."
    for p in (ROOT/"figures").glob("*.png"):
        paper, _, item = p.stem.partition("_")
        path = next(f for f in (ROOT/"nbs").rglob(f"{item}.ipynb") if f.parent.name == paper)
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        drawn = any("draw" in c["metadata"].get("tags", []) for c in cells)
        assert drawn or (ROOT/"figures"/"records"/f"{p.stem}.json").is_file(), p.stem


def test_paper_notebooks_show_details_and_leave_titles_to_save():
    for path in (ROOT/"nbs"/"papers").rglob("*.ipynb"):
        code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code")
        assert "suptitle(" not in code and "[{profile}]" not in code, f"{path}: `figures.save` sets the title"
        assert "details(" in code or not re.search(r"fidelity\(\w+[,)]", code), f"{path}: no table of the fields that differ"


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    "A fresh environment with the built wheel and what it requires, nothing else."
    d = tmp_path_factory.mktemp("wheel")
    source = d/"source"
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
        capture_output=True, text=True, check=True).stdout.split("\0")
    for n in filter(None, names):
        if (ROOT/n).is_file():
            (source/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/n, source/n)
    uv = shutil.which("uv")
    run = lambda *a: subprocess.run([str(x) for x in a], check=True, capture_output=True, text=True)
    if uv: run(uv, "build", "--wheel", "--out-dir", d, source)
    else: run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", d, source)
    wheel, = d.glob("*.whl")
    run(sys.executable, "-m", "venv", *(["--without-pip"] if uv else []), d/"env")
    python = d/"env"/"bin"/"python"
    if uv: run(uv, "pip", "install", "--python", python, wheel)
    else: run(python, "-m", "pip", "install", wheel)
    return d/"env"/"bin", wheel


def test_wheel_holds_code_numbers_and_notebooks(installed):
    names = zipfile.ZipFile(installed[1]).namelist()
    for n in ("refcomm/core.py", "refcomm/py.typed", "refcomm/papers/eqc/published.csv", "refcomm/papers/items.csv",
        "refcomm/publish/report.html.j2", "refcomm/recipes/eqc_table5.json", "refcomm/data/intents.json",
        "refcomm/data/wordnet30.csv", "refcomm/data/WORDNET_LICENSE.txt", "refcomm/data/ood_synsets.txt",
        "refcomm/notebooks/papers/eqc/table5.ipynb", "refcomm/notebooks/benchmarks/throughput.ipynb"):
        assert n in names
    assert not [n for n in names if n.startswith(("tests", "nbs", "figures"))]


@pytest.mark.slow
def test_wheel_works_alone(installed, tmp_path):
    bin, _ = installed
    run = lambda *a: subprocess.run([str(x) for x in a], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": str(bin), "HOME": str(tmp_path), "REFCOMM_HOME": str(tmp_path/"home"), "REFCOMM_PROGRESS": "off",
        "OMP_NUM_THREADS": "1"})
    listed = run(bin/"refcomm", "list")
    assert listed.returncode == 0 and "eqc/table5" in listed.stdout, listed.stderr
    tooling = run(bin/"python", "-c",
        "import importlib.util as u; print([m for m in ('nbdev', 'jupyterlab', 'papermill', 'ipykernel') if u.find_spec(m)])")
    assert tooling.stdout.strip() == "[]"
    costs = run(bin/"refcomm", "plan", "eqc/table5")
    assert costs.returncode == 0 and "12 as shipped runs of this item" in " ".join(costs.stdout.split()), costs.stderr
    refused = run(bin/"refcomm", "reproduce", "--profile", "smoke")
    assert refused.returncode == 2 and "pip install 'refcomm[notebooks]'" in refused.stderr
    plan = run(bin/"refcomm", "runs", "write-plan", "eqc/table7", "--profile", "smoke", "--n-seeds", "1")
    (tmp_path/"plan.json").write_text(plan.stdout)
    done = run(bin/"refcomm", "runs", "execute", "plan.json")
    assert "4 runs are in the store" in done.stdout, done.stderr


def test_the_page_from_table_to_corpus_runs_from_the_wheel(installed, tmp_path):
    "The tutorial in at most thirty lines, and its game in another process."
    cells = json.loads((ROOT/"nbs"/"tutorials"/"4_own_data.ipynb").read_text())["cells"]
    page = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code" and c["id"] != "install-refcomm")
    assert len([line for line in page.splitlines() if line.strip()]) <= 30
    env = {"PATH": str(installed[0]), "HOME": str(tmp_path), "REFCOMM_HOME": str(tmp_path/"home"),
        "REFCOMM_PROGRESS": "off",
        "OMP_NUM_THREADS": "1"}
    run = lambda *a: subprocess.run([str(installed[0]/"python"), *a], capture_output=True, text=True, cwd=tmp_path,
        env=env)
    one = run("-c", f"{page}\nprint(folder)\nprint(run.messages.tolist())")
    assert one.returncode == 0, one.stderr
    folder, messages = one.stdout.splitlines()[-2:]
    two = run(str(PROGRAMS/"play_own_data.py"), folder)
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout) == json.loads(messages)


def code_cells():
    "Name and source of each code cell, IPython's own commands left out."
    for p in sorted((ROOT/"nbs").rglob("*.ipynb")):
        for i, c in enumerate(json.loads(p.read_text(encoding="utf-8"))["cells"]):
            source = re.sub(r"^(\s*)[%!].*", r"\1pass", "".join(c["source"]), flags=re.M)
            if c["cell_type"] == "code": yield f"{p.relative_to(ROOT)} [{i}] #{c['id']}", source


def has(kind, node): return any(isinstance(n, kind) for n in ast.walk(node))


DRAWN_TOGETHER = ("nbs/papers/eqc/figure1_top.ipynb",) # its drawing cell names what it draws in place


def test_statements_are_statements():
    "No tuples or conditional expressions as statements, no assignments inside tuples, no conditional expressions inside others."
    files = [p for d in ("refcomm", "tests", ".ci") for p in (ROOT/d).rglob("*.py")]
    for where, source in [*((str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in files), *code_cells()]:
        tree = ast.parse(source)
        shown = tree.body[-1:] if "[" in where and not source.rstrip().endswith(";") else [] # output of a cell
        for n in ast.walk(tree):
            at = f"{where}:{getattr(n, 'lineno', 0)}"
            if isinstance(n, ast.Expr) and n not in shown:
                assert not isinstance(n.value, (ast.Tuple, ast.IfExp, ast.BoolOp)), at
            if isinstance(n, ast.Tuple): assert not has(ast.NamedExpr, n), at
            if isinstance(n, ast.IfExp) and not where.startswith(DRAWN_TOGETHER):
                assert not any(has(ast.IfExp, x) for x in ast.iter_child_nodes(n)), at


def fields(node):
    "Lines of a dataclass that are fields."
    made = (isinstance(node, ast.ClassDef)
        and any("spec" in ast.unparse(d) or "dataclass" in ast.unparse(d) for d in node.decorator_list))
    return sum(n.end_lineno - n.lineno + 1 for n in node.body if isinstance(n, ast.AnnAssign)) if made else 0


def test_an_exported_cell_fits_on_a_screen():
    """At most 35 lines, the directive included.

    The fields of dataclasses are not counted: they are data, one a line with a comment, and a Spec has as many as its paper has settings.
    """
    for p in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        for c in json.loads(p.read_text())["cells"]:
            source = "".join(c["source"])
            if c["cell_type"] != "code" or not source.startswith("#| export"): continue
            lines = len(source.splitlines()) - sum(map(fields, ast.parse(source).body))
            assert lines <= 35, f"{p.name} #{c['id']}: {lines} lines; split it, or move a part to a function or a base class"


def is_text(token):
    return tokenize.tok_name[token.type] in ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")


def test_lines_of_code_are_short():
    "At most 120 characters without the comment, unless text takes up 40 of them or more."
    for p in [*(ROOT/"refcomm").rglob("*.py"), *(ROOT/"tests").rglob("*.py")]:
        if p.name == "_modidx.py": continue
        text, ends, lines = collections.Counter(), {}, p.read_text(encoding="utf-8").splitlines()
        for t in tokenize.generate_tokens(iter([line + "\n" for line in lines]).__next__):
            if t.type == tokenize.COMMENT: ends[t.start[0]] = len(lines[t.start[0] - 1][:t.start[1]].rstrip())
            if not is_text(t): continue
            for i in range(t.start[0], t.end[0] + 1):
                first = t.start[1] if i == t.start[0] else 0
                text[i] += (t.end[1] if i == t.end[0] else len(lines[i - 1])) - first
        for i, line in enumerate(lines, 1):
            if line.startswith(("__all__", "# %%")): continue
            assert ends.get(i,
                len(line)) <= 120 or text[i] >= 40, f"{p.relative_to(ROOT)}:{i} has {len(line)} characters"


def test_lines_of_code_cells_fit_on_a_screen():
    "At most 160 characters, whatever they are; modules are checked by ruff."
    for where, source in code_cells():
        for i, line in enumerate(source.splitlines(), 1):
            assert len(line) <= 160, f"{where}:{i} has {len(line)} characters"


def test_what_is_public_is_described():
    "Functions, and methods of classes, those included that public classes inherit from private ones."
    for p in (ROOT/"refcomm").rglob("*.py"):
        if p.name in ("_modidx.py", "__main__.py"): continue
        body = ast.parse(p.read_text(encoding="utf-8")).body
        classes = {n.name: n for n in body if isinstance(n, ast.ClassDef)}
        bases = {b.id for n in classes.values() for b in n.bases if isinstance(b, ast.Name)}
        shown = [n for name, n in classes.items() if name[0] != "_" or name in bases]
        for n in [*body, *(m for c in shown for m in c.body)]:
            if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"):
                assert ast.get_docstring(n), f"{p.relative_to(ROOT)}:{n.lineno} {n.name} has no docstring"


def test_outputs_name_no_place_of_one_machine():
    "A warning in a notebook's output would name the file of an installed package."
    for p in (ROOT/"nbs").rglob("*.ipynb"):
        outputs = [c.get("outputs") for c in json.loads(p.read_text(encoding="utf-8"))["cells"]]
        assert "site-packages" not in json.dumps(outputs), f"{p.name}: mend or silence the warning, and execute it again"


def test_what_a_kept_figure_shows_is_said_below_it():
    "A reader who runs the cells at another profile gets numbers of another profile below them, and no prose about these."
    for path in (ROOT/"nbs"/"papers").rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        at = [i for i, c in enumerate(cells) if c.get("id") == "kept-figure"]
        said = [i for i, c in enumerate(cells)
            if c["cell_type"] == "markdown" and "".join(c["source"]).startswith(("## What matches", "## What it shows"))]
        assert not at or all(i == at[0] + 1 for i in said), path

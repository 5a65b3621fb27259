"The command line and the reproduction notebooks, as a user meets them."
import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from refcomm.publish import catalogue
from refcomm.runs import costs
from refcomm.papers import evidence
from refcomm import cli, files
from refcomm.core import ConfigError
from refcomm.papers.eqc.items import grid
from refcomm.runs.execute import execute
from refcomm.runs.store import Store


def shell(*args, **env):
    return subprocess.run([sys.executable, "-c", "from refcomm.cli import main; main()", *args], capture_output=True,
        text=True, env={**os.environ, **env})


def test_list_names_every_notebook(command):
    out = command("list").stdout
    assert all(item in out for item in catalogue.notebooks()) and "headline" in out


@pytest.mark.parametrize("args, says", [
    (["reproduce", "eqc/tabel5"], "unknown item 'eqc/tabel5': did you mean 'eqc/table5'"),
    (["reproduce", "--profile", "cpuu"], "unknown profile 'cpuu': did you mean 'cpu'"),
    (["reproduce", "-p", "n_seed=3"], "has no parameter 'n_seed': did you mean 'n_seeds'"),
    (["reproduce", "-p", "n_seeds=three"], "parameter n_seeds is int, got 'three'"),
    (["reproduce", "-p", "n_seeds"], "-p takes name=value"),
    (["reproduce", "-p", "profile=gpu"], "profile has an option of its own: --profile gpu"),
    (["plan", "eqc/tabel5"], "unknown item 'eqc/tabel5': did you mean 'eqc/table5'"),
    (["plan", "--profile", "cpuu"], "unknown profile 'cpuu': did you mean 'cpu'"),
    (["plan", "iac/table1", "-p", "epoch=3"], "has no parameter 'epoch': did you mean 'epochs'"),
    (["plan", "patch/table1", "--profile", "paper"], "the real images at paper, imagenet, are not in"),
    (["runs", "show", "zzz"], "matches 0 runs"),
    (["runs", "execute", "nowhere.json"], "cannot read plan nowhere.json"),
    (["runs", "import", "nowhere.tar"], "cannot read archive nowhere.tar"),
])
def test_a_wrong_argument_is_one_line_and_exit_2(home, command, args, says):
    r = command(*args)
    assert (r.returncode == 2 and not r.stdout and says in r.stderr and "Traceback" not in r.stderr
        and len(r.stderr.strip().splitlines()) == 1)


def test_a_process_of_its_own_says_the_same(home):
    r = shell("runs", "show", "zzz")
    assert r.returncode == 2 and r.stderr.startswith("refcomm: ") and len(r.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_lists_and_plans_are_there_without_pytorch(home, shipped_figures):
    "What only reads imports neither PyTorch nor pandas nor NumPy, with records in the store, too. What a plan must count first needs PyTorch."
    from refcomm.publish.records import unpack_run
    for room in (shipped_figures/"records").glob("*/"): unpack_run(min(room.glob("*.parquet")), Store()) # one of each experiment
    assert len({experiment for experiment, _ in Store().keys()}) == 5
    code = """if True:
        import contextlib, io, sys
        from refcomm import cli, core
        core._CUDA_FILES = () # as on a machine without a GPU; else its name is asked of PyTorch
        for args in (["--help"], ["list"], ["plan", "eqc/table5"], ["runs", "list"], ["runs", "write-plan", "eqc/table5"],
            ["runs", "verify"], ["reproduce", "--dry-run"]):
            with contextlib.redirect_stdout(io.StringIO()) as out: cli.app(args, standalone_mode=False)
            assert len(out.getvalue()) > 20, args
            heavy = {"torch._C", "pandas._libs", "numpy.core", "numpy._core", "scipy._lib"}.intersection(sys.modules)
            assert not heavy, (args, heavy)"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_runs_commands(home, command, tmp_path):
    plan = command("runs", "write-plan", "eqc/table5", "--profile", "smoke", "--n-seeds", "1").stdout
    assert len(json.loads(plan)) == 4
    (tmp_path/"plan.json").write_text(plan)
    assert "4 runs are in the store" in command("runs", "execute", str(tmp_path/"plan.json")).stdout
    assert command("runs", "list").stdout.startswith("4 runs in")
    assert "4 sound, 0 damaged" in command("runs", "verify").stdout
    assert json.loads(command("runs", "write-plan", "eqc/table5", "--profile", "smoke", "--n-seeds", "1").stdout) == []
    assert "4 runs written" in command("runs", "export", str(tmp_path/"runs.tar")).stdout
    record = next((home/"runs").glob("eqc/*/record.json"))
    assert json.loads(command("runs", "show", record.parent.name).stdout)["run"] == f"eqc/{record.parent.name}"
    record.write_text("{}")
    bad = command("runs", "verify")
    assert bad.returncode == 1 and f"eqc/{record.parent.name} is unreadable" in bad.stdout
    assert "3 runs in" in command("runs", "list").stdout and "3 runs written" in command("runs", "export",
        str(tmp_path/"sound.tar")).stdout
    assert "0 runs remain" in command("runs", "clean", "--all", "--yes").stdout
    assert "4 new runs" in command("runs", "import", str(tmp_path/"runs.tar")).stdout
    assert "4 sound" in command("runs", "verify").stdout


def test_a_plan_names_what_it_leaves_out(home, command):
    r = command("runs", "write-plan", "beyond", "benchmarks/views", "eqc/table5", "--profile", "smoke", "--n-seeds", "1")
    assert [p["experiment"] for p in json.loads(r.stdout)].count("eqc") == 4 and len(r.stderr.splitlines()) == 1
    assert "their runs are defined in their notebooks only: benchmarks/views, beyond/matrix, beyond/quantisers;" in r.stderr
    assert not command("runs", "write-plan", "eqc/table5", "--profile", "smoke", "--n-seeds", "1").stderr


def test_a_plan_of_costs(home, shipped_figures, monkeypatch):
    "Figure 1 shows the runs of Table 5: made once, counted once; like runs tell their time, and without them what they compute."
    from typer.testing import CliRunner
    from refcomm.papers import counts
    monkeypatch.setattr(counts, "speed_of", lambda device: costs.SPEEDS["H200"]._replace(name="this", overlaps=False))
    recipes = costs.shipped(shipped_figures)
    monkeypatch.setattr(costs, "shipped", lambda: recipes)
    def table(*args):
        out = CliRunner().invoke(cli.app, ["plan", *args]).output
        return ({row[0]: row[1:] for row in (re.split(r"  +", line.strip()) for line in out.splitlines())
            if "/" in row[0] or row[0] == "total"}, out)
    assert "trains nothing" in table("eqc/table1", "--profile", "smoke")[1]
    shown, out = table("eqc/table5", "eqc/figure1", "--profile", "smoke", "-p", "n_seeds=2")
    assert shown["eqc/table5"] == shown["eqc/figure1"] == shown["total"]
    assert shown["total"][:3] == ["8", "0", "8"] and shown["total"][-1] == "8 as counted, for this (× or ÷ 3)"
    assert shown["total"][3].endswith(" s") and all(cell.endswith("iB") for cell in shown["total"][4:6])
    shown, out = table("eqc/table5", "--profile", "smoke", "-p", "n_seeds=2", "--device", "H200")
    assert shown["total"][-1] == "8 as counted, for an H200 by its data sheet (× or ÷ 3)"
    with monkeypatch.context() as m:
        m.setattr(counts, "counted", lambda *a: (_ for _ in ()).throw(counts.ConfigError("no")))
        shown, out = table("eqc/table5", "eqc/figure1", "--profile", "smoke", "-p", "n_seeds=2")
    assert shown["total"] == ["8", "0", "8", "?", "?", "8 unknown"], "nothing is guessed"
    assert "counts once" in out
    execute(grid("table5", "smoke", 1))
    shown, _ = table("eqc/table5", "eqc/figure1", "--profile", "smoke", "-p", "n_seeds=2")
    assert (shown["total"][:3] == ["8", "4", "4"] and shown["total"][3].endswith(" s")
        and shown["total"][4].endswith("KiB") and shown["total"][-1] == "4 as like runs here")
    assert table("beyond/matrix")[0]["total"] == ["0", "0", "0", "0 s", "0 B"]
    _, out = table("eqc/table5", "--profile", "cpu")
    assert "12 as shipped runs of this item (cpu" in " ".join(out.split())
    before = sorted(p for p in home.rglob("*"))
    Store().root.joinpath("eqc", Store().keys()[0][1], "record.json").write_text("{}")
    assert table("eqc/table5", "--profile", "smoke", "-p", "n_seeds=1")[0]["total"][:3] == ["4", "3", "1"]
    assert sorted(p for p in home.rglob("*")) == before, "looking changes nothing"


@pytest.fixture
def smoke_home(tmp_path_factory, monkeypatch):
    "One REFCOMM_HOME for all workers: what one has trained another finds."
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: place = place.parent
    monkeypatch.setenv("REFCOMM_HOME", str(place/"smoke"))
    monkeypatch.delenv("REFCOMM_FIGURES", raising=False)
    return place/"smoke"


def some_at_a_time(items, n=6):
    "The items of each paper, n by n."
    papers = {}
    for item in items: papers.setdefault(item.split("/")[0], []).append(item)
    return [part[i:i + n] for part in papers.values() for i in range(0, len(part), n)]


@pytest.mark.slow
@pytest.mark.parametrize("items", some_at_a_time(catalogue.notebooks()), ids=" ".join)
def test_notebooks_at_smoke_and_nothing_twice(smoke_home, command, items):
    r = command("reproduce", *items, "--profile", "smoke")
    assert r.returncode == 0, r.stdout + r.stderr
    files_of = {item: [smoke_home/"smoke-figures"/f"{item.replace('/', '_')}.{end}" for end in ("png", "csv", "json")]
        + [smoke_home/"executed"/"smoke"/f"{item}.ipynb"] for item in items}
    for png, csv, about, executed in files_of.values():
        recipe, notebook = json.loads(about.read_text()), json.loads(executed.read_text())
        assert png.stat().st_size > 5000 and len(pd.read_csv(csv))
        assert recipe["profile"] == "smoke" and recipe["note"]
        assert all(c["verdict"] == "untestable here" for c in recipe["claims"])
        assert all(c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code")
    made = [*sum(files_of.values(), []), *Store().root.glob("*/*/record.json")]
    seen = {p: p.stat().st_mtime_ns for p in made}
    total, = [row.split() for row in command("plan", *items, "--profile", "smoke").stdout.splitlines()
        if row.startswith("total")]
    assert total[1] == total[2] and total[3:5] == ["0", "0"], "the grid of every item is what its notebook makes"
    assert command("reproduce", *items, "--profile", "smoke").stdout.count("found done") == len(items)
    assert seen == {p: p.stat().st_mtime_ns for p in made}, "finished work is not touched"


SAVE = """import pandas as pd, matplotlib.pyplot as plt
from refcomm.publish import figures
figures.save('toy', 'x', pd.DataFrame(dict(a=[1])), plt.figure(), [], profile, 'Toy', 'none')"""


def toy(path, code):
    cells = [dict(cell_type="markdown", id="a", metadata={}, source="# Toy"),
        dict(cell_type="code", id="b", metadata=dict(tags=["parameters"]),
        source='profile: str = "smoke"\njobs: int = 1',
        outputs=[], execution_count=None),
             dict(cell_type="code", id="c", metadata={}, source=code, outputs=[], execution_count=None)]
    path.write_text(json.dumps(dict(cells=cells,
        metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")), nbformat=4,
        nbformat_minor=5)))
    return path


@pytest.mark.slow
def test_a_failing_notebook_is_kept_and_named(home, tmp_path):
    status, executed, message = cli.reproduce_item("toy/bad", toy(tmp_path/"bad.ipynb", "1/0"),
        dict(profile="smoke", jobs=1))
    assert (status == "failed" and message == "ZeroDivisionError: division by zero"
        and "ZeroDivisionError" in executed.read_text())
    status, *_ = cli.reproduce_item("toy/bad", tmp_path/"bad.ipynb", dict(profile="smoke", jobs=1))
    assert status == "failed", "a failure is not found done"


FORK = ("ipykernel.kernelapp", "statistics")


@pytest.mark.slow
@pytest.mark.parametrize("preload", [(), FORK], ids=["started", "forked"])
def test_a_dead_kernel_is_a_failed_item(home, tmp_path, preload):
    status, _, message = cli.reproduce_item("toy/dead",
        toy(tmp_path/"dead.ipynb", "import os; os.kill(os.getpid(), 9)"), dict(profile="smoke", jobs=1), False, preload)
    assert status == "failed" and "died" in message


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux")
def test_forked_kernels_share_modules_and_nothing_else(home, tmp_path, monkeypatch):
    "Each has a process, a namespace, the environment of its time, pictures in its cells and workers of its own."
    code = """import multiprocessing, os, sys
assert 'statistics' in sys.modules and 'x' not in globals() and os.environ['TURN'] == TURN
import pandas as pd, matplotlib.pyplot as plt
from concurrent.futures import ProcessPoolExecutor
x = os.getpid()
assert ProcessPoolExecutor(1, multiprocessing.get_context("spawn")).submit(os.getppid).result() == x
figure = plt.figure(); plt.plot([1, 2]); plt.show()
from refcomm.publish import figures
figures.save('toy', 'x', pd.DataFrame(dict(a=[x])), figure, [], profile, 'Toy', 'none')"""
    monkeypatch.delenv("MPLBACKEND", raising=False)
    pids = []
    for turn in "ab":
        monkeypatch.setenv("TURN", turn)
        path = toy(tmp_path/f"{turn}.ipynb", code.replace("== TURN", f"== {turn!r}"))
        status, executed, message = cli.reproduce_item("toy/x", path, dict(profile="smoke", jobs=1), True, FORK)
        assert status == "done" and "image/png" in executed.read_text(), message
        pids.append((home/"smoke-figures"/"toy_x.csv").read_text())
    assert pids[0] != pids[1]


@pytest.mark.slow
def test_a_working_folder_with_another_refcomm_changes_nothing(home, tmp_path, monkeypatch):
    (tmp_path/"refcomm").mkdir()
    (tmp_path/"refcomm"/"__init__.py").write_text("raise ImportError('that of the working folder')")
    monkeypatch.chdir(tmp_path)
    assert cli.reproduce_item("toy/x", toy(tmp_path/"x.ipynb", SAVE), dict(profile="smoke", jobs=1))[::2] == ("done",
        "")


@pytest.mark.parametrize("items", [["eqc/table4"], ["eqc/table4", "eqc/table1"]], ids=["one", "several"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_kernel_starts_is_one_line(home, tmp_path, signum, items):
    "It has no state to save; interrupted, it would print where in its start it was."
    (tmp_path/"ipykernel_launcher.py").write_text("import os, time\nopen(os.environ['STARTS'], 'w').close()\ntime.sleep(60)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "STARTS": str(tmp_path/"starts")}
    p = subprocess.Popen([sys.executable, "-c",
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from refcomm.cli import main; main()", "reproduce", *items, "--profile", "smoke"], env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path/"starts").exists() and p.poll() is None: time.sleep(.05)
    p.send_signal(signum)
    said = p.communicate(timeout=30)[1]
    assert p.returncode == 128 + signum and "the same command continues" in said and "Traceback" not in said, said


@pytest.mark.slow
def test_kill_between_notebooks_then_continue(home):
    "Killed when the first of two notebooks is done: the second call does the second only."
    work = ["-c", "from refcomm.cli import main; main()", "reproduce", "eqc/table1", "eqc/table4", "--profile", "smoke"]
    p = subprocess.Popen([sys.executable, *work], env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = home/"executed"/"smoke"/"eqc"/"table1.json"
    while not done.exists() and p.poll() is None: time.sleep(.01)
    p.kill(); p.wait()
    assert done.exists() and not done.with_stem("table4").exists()
    made = (home/"smoke-figures"/"eqc_table1.png").stat().st_mtime_ns
    out = shell("reproduce", "eqc/table1", "eqc/table4", "--profile", "smoke").stdout
    assert out.count("found done") == 1 and (home/"smoke-figures"/"eqc_table1.png").stat().st_mtime_ns == made


@pytest.mark.slow
def test_an_unwritable_figures_folder_is_named(home, tmp_path):
    (tmp_path/"file").write_text("")
    status, _, message = cli.reproduce_item("toy/x",
        toy(tmp_path/"x.ipynb", f"import os; os.environ['REFCOMM_HOME'] = {str(tmp_path/'file')!r}\n" + SAVE),
        dict(profile="smoke", jobs=1))
    assert status == "failed" and message.startswith("StoreError: cannot write")


@pytest.mark.slow
def test_a_changed_figure_or_parameter_is_made_again(home, tmp_path):
    nb, p = toy(tmp_path/"x.ipynb", SAVE), dict(profile="smoke", jobs=1)
    assert [cli.reproduce_item("toy/x", nb, p)[0] for _ in range(2)] == ["done", "found done"]
    assert cli.reproduce_item("toy/x", nb, dict(p, jobs=2))[0] == "found done", "jobs change no result"
    (home/"smoke-figures"/"toy_x.csv").write_text("edited")
    assert cli.reproduce_item("toy/x", nb, p)[0] == "done"
    assert cli.reproduce_item("toy/x", toy(nb, SAVE + "\n"), p)[0] == "done"


def test_results_go_where_they_are_named_and_never_over_the_kept_ones(home, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    monkeypatch.setattr(cli, "choose", lambda names: {"toy/x": toy(tmp_path/"x.ipynb", SAVE)})
    r = CliRunner().invoke(cli.app, ["reproduce", "--jobs", "1", "--into", str(tmp_path/"mine")])
    assert r.exit_code == 0 and str(tmp_path/"mine"/"toy_x") in r.output.replace("\n", "")
    assert sorted(p.name for p in (tmp_path/"mine").iterdir()) == ["toy_x.csv", "toy_x.json", "toy_x.png"]
    monkeypatch.delenv("REFCOMM_FIGURES")
    assert files.figures_dir() == files.checkout()/"results" and subprocess.run(["git", "check-ignore", "-q",
        "results/x"], cwd=files.checkout()).returncode == 0


@pytest.mark.parametrize("item", catalogue.HEADLINE)
def test_a_headline_in_one_line(shipped_figures, item):
    stem, kept = shipped_figures/item.replace("/", "_"), costs.shipped(shipped_figures)[item]
    line = catalogue.in_short(item, pd.read_csv(stem.with_suffix(".csv"), dtype={"column": str}), kept, kept)
    assert re.search(r"\d \(published|times chance",
        line) and "nan" not in line and "–" not in line and kept["command"] in line and "\n" not in line


def test_a_first_look_has_parameters_of_its_own(home, monkeypatch):
    from typer.testing import CliRunner
    asked = {}
    monkeypatch.setattr(cli, "reproduce_item", lambda item, path, given, *_: asked.setdefault(item, given)
        and ("failed", path, "not made"))
    CliRunner().invoke(cli.app, ["reproduce", "--quick", "--jobs", "2", "-p", "n_seeds=2"])
    assert {item: {k: v for k, v in given.items() if k not in ("profile", "jobs")}
        for item, given in asked.items()} == {item: {**quick, "n_seeds": 2}
        for item, quick in catalogue.HEADLINE.items()}


@pytest.mark.slow
def test_other_data_are_made_again(home, tmp_path, monkeypatch):
    nb, p, data = toy(tmp_path/"x.ipynb", SAVE), dict(profile="smoke", jobs=1), tmp_path/"data"
    monkeypatch.delenv("REFCOMM_DATA", raising=False)
    assert [cli.reproduce_item("toy/x", nb, p)[0] for _ in range(2)] == ["done", "found done"]
    data.mkdir(); (data/"banking77.csv").write_text("text,category")
    monkeypatch.setenv("REFCOMM_DATA", str(data))
    assert [cli.reproduce_item("toy/x", nb, p)[0] for _ in range(2)] == ["done", "found done"]
    (data/"banking77.csv").write_text("text,category\na,b")
    assert cli.reproduce_item("toy/x", nb, p)[0] == "done"


def test_exit_code_is_1_when_a_notebook_fails(home, monkeypatch):
    from typer.testing import CliRunner
    monkeypatch.setattr(cli, "reproduce_item", lambda item, path, *a: ("failed", path, "boom"))
    r = CliRunner().invoke(cli.app, ["reproduce", "eqc/table1", "--profile", "smoke"])
    assert r.exit_code == 1 and "failed: boom" in r.output


def test_published_numbers_are_whole():
    "Spot checks against the papers, one per table, and the shape of every file."
    checks = [("eqc", "table5", "GS-RNN", "1000", .442), ("eqc", "table6", "QT-Inst", "100", .962),
        ("eqc", "table7", "GS-Inst", "77", .035), ("eqc", "table8", "QT-Inst", "77", .925),
              ("eqc", "table3", "Sent-Cls", "Recurrent/GS", 125), ("iac", "table1", "SimCLR_disc", "OOD set", 47.4),
              ("patch", "table1", "MoCo-v2 (R18)", "Top-1", 36.8)]
    for paper, item, row, column, value in checks:
        t = evidence.published(paper, item).set_index(["row", "column"])
        assert t.loc[(row, column), "mean"] == value, (paper, item, row, column)
    with pytest.raises(ConfigError, match="did you mean 'patch'"): evidence.published("pach")

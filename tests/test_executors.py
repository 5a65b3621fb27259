"Runs made by submitit and Ray: the same as here, whoever is killed."
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import checkpoint_state

from refcomm import cli
from refcomm.core import ConfigError
from refcomm.runs.executors import PACKAGES
from refcomm.papers.eqc.run import EQCSpec
from refcomm.files import load_checkpoint
from refcomm.papers.eqc.items import SMALL
from refcomm.runs.execute import execute, write_plan
from refcomm.runs.store import Store, run_key

TINY = {**SMALL["object"], "lr": 1e-3, "epochs": 40, "patience": 40}
SPECS = [EQCSpec(word_length=w, **TINY) for w in (10, 20)] # two stacks
SHORT = {**TINY, "epochs": 100, "patience": 100}
LONG = {**TINY, "epochs": 5000, "patience": 5000}
installed = {name: pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")
    for name, package in PACKAGES.items()}
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="needs /proc/locks")
both = pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in installed.items()])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "Environment in which Ray's dozen processes import in half the time, without the grammar of internationalised addresses, and stay on 127.0.0.1."
    folder = tmp_path_factory.mktemp("quick")
    (folder/"rfc3987_syntax.py").write_text("raise ImportError")
    return {"PYTHONPATH": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ADDRESS": "",
        "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two_nodes(quick):
    "Environment with the address of a Ray cluster of two nodes, each with one core and, so it says, one GPU."
    from refcomm.runs.executors import _start_ray
    with pytest.MonkeyPatch.context() as m:
        for k, v in quick.items(): m.setenv(k, v)
        first = _start_ray(1, 1)
        second = _start_ray(1, 1, first.gcs_address)
    yield {**quick, "RAY_ADDRESS": first.gcs_address}
    for node in (second, first): node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def cluster(name, request): return request.getfixturevalue("two_nodes") if name == "ray" else {}


def drive(code, **env):
    "A driver of its own on the store named by REFCOMM_HOME, which hears Ctrl-C even if the tests do not."
    head = (f"from refcomm.papers.eqc.run import EQCSpec\nfrom refcomm.runs import execute as runs; from refcomm.runs import store\n"
        f"TINY, SHORT, LONG = {TINY!r}, {SHORT!r}, {LONG!r}\nSPECS = [EQCSpec(word_length=w, **TINY) for w in (10, 20)]\n")
    return subprocess.Popen([sys.executable, "-c", head + code], env={**os.environ, **env}, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def makers(*specs):
    "The processes that hold the locks of these runs."
    locks = [Store().root/"locks"/f"eqc-{run_key(s)}.lock" for s in specs]
    inodes = {str(p.stat().st_ino) for p in locks if p.exists()}
    fields = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" not in line]
    return {int(f[4]) for f in fields if f[5].split(":")[2] in inodes} - {-1}


def parent(pid): return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


def descendants(pid):
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from descendants(int(child))


def wait_for(what, driver, seconds=400):
    deadline = time.time() + seconds
    while not (found := what()):
        assert driver.poll() is None, driver.stderr.read()
        if time.time() > deadline: driver.kill(); raise AssertionError("waited in vain")
        time.sleep(.02)
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "What this process makes."
    return execute(SPECS, store=Store(tmp_path_factory.mktemp("calm")), executor="local")


def same(calm):
    for spec, known in zip(SPECS, calm):
        record = Store().get(spec)
        assert (record.key == known.key and record.rows == known.rows
            and record.history().epoch.tolist() == list(range(TINY["epochs"])))


DYING = """
import subprocess
from refcomm.core import ConfigError, WorkerDied, check_choice
from refcomm.runs.executors import EXECUTORS
pool = EXECUTORS[NAME](1)
deaths = pool.submit(subprocess.check_call, ["sh", "-c", "echo died >> FOLDER/deaths; echo the last words >&2; kill -9 $PPID"])
error = deaths.exception()
assert isinstance(error, WorkerDied) and "died twice" in str(error) and "the last words" in str(error), error
assert open("FOLDER/deaths").read() == "died\\n"*2
refused = pool.submit(check_choice, "a", "b", ["c"]).exception()
assert type(refused) is ConfigError and "raised by a worker" in refused.__notes__[0], "an error of the run itself is not tried again"
pool.shutdown()
"""


@pytest.mark.slow
@both
def test_the_same_runs_though_a_worker_is_killed(home, tmp_path, calm, name, request):
    p = drive("runs.execute(SPECS, jobs=2)\n" + DYING.replace("NAME", repr(name)).replace("FOLDER", str(tmp_path)),
        REFCOMM_EXECUTOR=name, **cluster(name, request))
    worker, = wait_for(lambda: makers(SPECS[1]), p)
    assert worker != p.pid
    os.kill(worker, signal.SIGKILL)
    assert wait_for(lambda: makers(SPECS[1]) - {worker}, p), "another one took over"
    assert p.wait() == 0, p.stderr.read()
    same(calm)
    assert not list(Store().root.glob("tmp/*"))


def stopped_by_a_signal():
    from refcomm.core import Interrupted
    raise Interrupted("as by a signal to the worker alone", signal.SIGTERM)


def test_a_worker_that_a_signal_stopped_begins_nothing_more(tmp_path):
    "The driver hears of it later: until then the worker would take what waits."
    from refcomm.core import Interrupted
    from refcomm.runs.executors import LocalExecutor
    with LocalExecutor(1) as pool:
        calls = pool.submit(stopped_by_a_signal), pool.submit((tmp_path/"begun").touch)
        assert [type(c.exception()) for c in calls] == [Interrupted]*2
    assert not (tmp_path/"begun").exists()


@pytest.mark.slow
@both
def test_an_interruption_stops_what_runs_and_what_waits(home, name, quick):
    p = drive("runs.execute([EQCSpec(word_length=w, **LONG) for w in (10, 20)], jobs=1)", REFCOMM_EXECUTOR=name,
        **quick)
    running, waiting = [EQCSpec(word_length=w, **LONG) for w in (10, 20)]
    wait_for(lambda: makers(running), p)
    started = [*descendants(p.pid)]
    p.send_signal(signal.SIGINT)
    assert p.wait(60) != 0 and "refcomm: stopped by SIGINT: 0 of 2 runs are in" in p.stderr.read()
    assert not [pid for pid in started if alive(pid)], "Ray's own processes are gone, too"
    assert not makers(running,
        waiting) and Store().keys() == [] and not (Store().root/"locks"/f"eqc-{run_key(waiting)}.lock").exists()


@pytest.mark.slow
@installed["slurm"]
def test_jobs_outlive_their_driver_and_the_next_one_finds_them(home, calm):
    p = drive("runs.execute(SPECS, jobs=2)", REFCOMM_EXECUTOR="slurm")
    workers = wait_for(lambda: len(m := makers(*SPECS)) == 2 and m, p)
    p.kill(); p.wait()
    assert makers(*SPECS) == workers, "they go on"
    p = drive("runs.execute(SPECS, jobs=2)", REFCOMM_EXECUTOR="slurm")
    assert p.wait() == 0, p.stderr.read()
    same(calm)
    assert not list(Store().root.glob("unfinished/*"))


@installed["ray"]
def test_ray_uses_all_nodes_and_the_next_driver_continues(home, two_nodes):
    work = f"""
from refcomm.runs.executors import EXECUTORS
pool = EXECUTORS["ray"](4)
assert pool.submit(eval, "__import__('ray').get_runtime_context().get_assigned_resources()").result() == dict(CPU=1, GPU=.5), "two share a GPU"
for f in [pool.submit(runs.run_stack, [EQCSpec(word_length=w, **SHORT)], {str(Store().root)!r}, "cpu", None, None, 0.) for w in (10, 20)]: f.result()
pool.shutdown()
"""
    specs = [EQCSpec(word_length=w, **SHORT) for w in (10, 20)]
    states = lambda: [checkpoint_state(f)["epoch"] for f in Store().root.glob("unfinished/*/training.safetensors")]
    p = drive(work, **two_nodes)
    workers = wait_for(lambda: len(states()) == 2 and min(states()) > 0 and makers(*specs), p)
    assert len({parent(w) for w in workers}) == 2, "one on each node"
    p.kill(); p.wait()
    deadline = time.time() + 60
    while makers(*specs) and time.time() < deadline: time.sleep(.1)
    assert not makers(*specs), "they end with their driver"
    done = [[row["seconds"] for row in load_checkpoint(f)[1]["history"]]
        for f in Store().root.glob("unfinished/*/training.safetensors")]
    assert len(done) == 2 and Store().keys() == []
    p = drive(work, **two_nodes)
    assert p.wait() == 0, p.stderr.read()
    for h in (Store().get(s).history() for s in specs):
        assert h.epoch.tolist() == list(range(SHORT["epochs"])) and any(h.seconds.tolist()[:len(d)] == d
            for d in done), "no epoch was done twice"


@installed["ray"]
def test_an_address_without_a_cluster(home, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(ConfigError,
        match="no Ray cluster at RAY_ADDRESS=nowhere: .*; start one with `ray start --head`"):
        execute(SPECS[:1], executor="ray")
    assert not list(Store().root.glob("tmp/*"))


@pytest.mark.slow
@installed["slurm"]
def test_a_plan_on_the_command_line(home, tmp_path, calm):
    write_plan(SPECS[:1], tmp_path/"plan.json")
    out = subprocess.run([sys.executable, "-c", "from refcomm.cli import main; main()", "runs", "execute",
        str(tmp_path/"plan.json"), "--executor", "slurm"], capture_output=True, text=True)
    assert "1 runs are in the store" in out.stdout, out.stderr
    assert Store().get(SPECS[0]).rows == calm[0].rows


def test_reproduce_tells_the_kernel(home, monkeypatch):
    from typer.testing import CliRunner
    monkeypatch.setenv("REFCOMM_EXECUTOR", "slurm")
    executors = []
    monkeypatch.setattr(cli, "reproduce_item", lambda item, path, *a: executors.append(os.environ["REFCOMM_EXECUTOR"])
        or ("done", path, ""))
    assert CliRunner().invoke(cli.app,
        ["reproduce", "eqc/table1", "--profile", "smoke", "--executor", "local"]).exit_code == 0
    assert executors == ["local"]


@pytest.mark.parametrize("name, says",
    [("slurm", r"needs the package submitit: pip install 'refcomm\[slurm\]'"),
    ("slrum", "unknown executor 'slrum': did you mean 'slurm'")])
def test_what_is_missing_is_named(home, monkeypatch, name, says):
    for package in PACKAGES.values(): monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("REFCOMM_EXECUTOR", name)
    with pytest.raises(ConfigError, match=says): execute(SPECS[:1])
    assert not home.exists(), "nothing was begun"

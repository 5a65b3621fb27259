"`refcomm runs clean` removes what a store has made and nobody uses, and nothing else."
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import PROGRAMS
from refcomm.runs.cleaning import clean, foreign
from refcomm.papers.eqc.run import EQCSpec
from refcomm.runs.store import MARKER, RunResult, Store, provenance, run_key


def put(seed=0):
    return Store().put(EQCSpec(seed=seed),
        RunResult([dict(accuracy=.5)], {}, pd.DataFrame(dict(epoch=[0])), dict(m=torch.arange(5))),
        provenance("cpu", 1, 1))


def tree(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.name.endswith(".lock")
        and p.name not in ("locks", MARKER))


def tensorboard(root):
    "What other programs keep in a folder called runs."
    for name in ("Nov30_10-00-00_host/events.out.tfevents.1", "tmp/notes.txt", "unfinished/thesis.tex",
        "set-aside/old/data.csv", "model/0123456789abcdef/weights.pt", "readme.md"):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text("mine")
    return tree(root)


@pytest.mark.parametrize("args", [("--all", "--yes"), ("--yes",)])
def test_a_folder_that_is_no_store_is_left_alone(home, command, args):
    mine = tensorboard(home/"runs")
    out = command("runs", "clean", *args)
    assert (out.returncode == 2 and "was not made by refcomm" in out.stderr and str(home/"runs") in out.stderr
        and "nothing was removed" in out.stderr)
    assert tree(home/"runs") == mine


def test_a_store_in_a_folder_of_others_loses_only_what_is_its_own(home, command):
    mine = tensorboard(home/"runs")
    put(0); put(1)
    (Store().root/"unfinished"/f"eqc-{'1'*16}").mkdir()
    (Store().path("eqc", run_key(EQCSpec(seed=1)))/"notes.txt").write_text("mine")
    out = command("runs", "clean", "--all", "--yes")
    assert out.returncode == 0 and "left, not made by refcomm" in out.stdout and "thesis.tex" in out.stdout
    assert set(tree(home/"runs")) - set(mine) == {"eqc", f"eqc/{run_key(EQCSpec(seed=1))}",
        f"eqc/{run_key(EQCSpec(seed=1))}/notes.txt"} and set(mine) <= set(tree(home/"runs"))


def test_a_store_from_before_the_marker_is_known_by_what_it_holds(home, command):
    put(0)
    for name in (f"unfinished/eqc-{'1'*16}", f"set-aside/eqc-{'1'*16}-abcdef", "tmp"):
        (Store().root/name).mkdir(parents=True, exist_ok=True)
    (Store().root/".DS_Store").write_text("")
    (Store().root/MARKER).unlink()
    assert foreign(Store().root) == []
    assert command("runs", "clean", "--yes").stdout == f"1 runs remain in {Store().root}\n"
    assert ((Store().root/MARKER).is_file() and not list(Store().root.glob("unfinished/*"))
        and not list(Store().root.glob("set-aside/*")))


def test_a_store_among_other_things_is_adopted_if_told(home, command):
    put(0)
    (Store().root/MARKER).unlink()
    (Store().root/"notes.txt").write_text("mine")
    out = command("runs", "clean", "--all", "--yes")
    assert (out.returncode == 2 and "notes.txt was not made by refcomm" in out.stderr and "--adopt" in out.stderr
        and len(Store().keys()) == 1)
    assert command("runs", "clean", "--all", "--yes", "--adopt").returncode == 0
    assert Store().keys() == [] and (Store().root/"notes.txt").read_text() == "mine"


def test_links_are_removed_not_followed(home, tmp_path):
    put(0)
    (tmp_path/"precious").mkdir()
    (tmp_path/"precious"/"record.json").write_text("mine")
    for place in (Store().root/"unfinished"/f"eqc-{'1'*16}", Store().root/"set-aside"/f"eqc-{'1'*16}-abcdef",
        Store().path("eqc", "2"*16)):
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(tmp_path/"precious")
    clean(everything=True)
    assert (tmp_path/"precious"/"record.json").read_text() == "mine" and tree(Store().root) == ["set-aside", "tmp",
        "unfinished"]


def driver(what):
    p = subprocess.Popen([sys.executable, PROGRAMS/"hold_folder.py", what], stdout=subprocess.PIPE, text=True)
    return p, Path(p.stdout.readline().strip())


def test_folders_of_living_drivers_are_left_and_those_of_dead_ones_swept(home):
    held = [driver(what) for what in ("slurm", "ray", "progress", "import")]
    folders = [f for _, f in held]
    assert sorted(clean(everything=True).in_use) == sorted(folders) and all((f/"work").read_text() == "queued"
        for f in folders)
    for p, _ in held: p.send_signal(signal.SIGKILL); p.wait()
    assert sorted(clean().removed) == sorted(folders) and not list(Store().root.glob("tmp/*")) and [p.name
        for p in Store().root.glob("locks/*")] == ["clean.lock"]


@pytest.mark.parametrize("what", ["slurm", "ray"])
def test_executors_hold_their_folders(home, what, monkeypatch):
    if what == "slurm":
        pytest.importorskip("submitit")
        from refcomm.runs.executors import SlurmExecutor
        pool = SlurmExecutor(1)
        assert clean().in_use == [pool.folder] and pool.folder.is_dir()
        pool.shutdown()
        assert not pool.folder.exists() and not list(Store().root.glob("locks/slurm-*"))
    else:
        import inspect
        pytest.importorskip("ray")
        from refcomm.runs.executors import RayExecutor
        ours = [k for k in RayExecutor.__mro__ if k.__module__ == RayExecutor.__module__]
        assert any('own_folder("ray")' in inspect.getsource(k) for k in ours)


@pytest.mark.slow
def test_jobs_in_the_queue_outlive_their_driver(home):
    "A driver was killed; its job still runs, or waits."
    p, folder = driver("slurm")
    p.kill(); p.wait()
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (folder/f"{job.pid}_submitted.pkl").write_bytes(b"")
    assert clean().in_use == [folder]
    (folder/f"{job.pid}_0_result.pkl").write_bytes(b"")
    assert clean().removed == [folder]
    job.kill(); job.wait()


@pytest.mark.slow
def test_what_is_being_made_is_left(home, small):
    "The unfinished folder of a living run, and its half-written record."
    from refcomm.runs.execute import _unfinished
    spec = small()
    folder = _unfinished(Store(), [spec])
    p = subprocess.Popen([sys.executable, PROGRAMS/"hold_locks.py", folder.name[4:], run_key(spec)],
        stdout=subprocess.PIPE, text=True)
    p.stdout.readline()
    half = Store().root/"tmp"/f"{run_key(spec)}-{'a'*32}"
    for f in (folder, half):
        f.mkdir(parents=True)
        (f/"x").write_text("")
        for path in (f, f/"x"): os.utime(path, (0, 0))
    assert sorted(clean(everything=True).in_use) == sorted([folder, half])
    p.kill(); p.wait()
    assert sorted(clean().removed) == sorted([folder, half])


@pytest.mark.slow
def test_run_stack_holds_the_lock_of_its_unfinished_folder(home, small, monkeypatch):
    from refcomm.papers.eqc import run as eqc
    from refcomm.runs.execute import execute
    real, seen = eqc.run, []
    def run(specs, context):
        cleaned = subprocess.run([sys.executable, PROGRAMS/"in_use.py"], capture_output=True, text=True)
        seen.append(cleaned.stdout.split())
        return real(specs, context)
    monkeypatch.setattr(eqc, "run", run)
    execute([small(epochs=1)])
    assert len(seen[0]) == 1 and "unfinished" in seen[0][0] and len(Store().keys()) == 1


@pytest.mark.slow
def test_two_cleanings_at_once(home):
    for seed in range(12): put(seed)
    for i in range(40): (Store().root/"set-aside"/f"eqc-{i:016x}-abcdef"/"deep").mkdir(parents=True)
    code = "from refcomm.runs.cleaning import clean; print(len(clean(everything=True).removed))"
    ps = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)]
    out = [p.communicate() for p in ps]
    assert [p.returncode for p in ps] == [0, 0], out
    assert sum(int(o) for o, _ in out) == 52 and Store().keys() == []


@pytest.mark.slow
def test_cache_files_that_were_never_finished_are_swept(home):
    code = """
import os, signal, torch
from refcomm import files
def deadly(x, tmp, about): open(tmp, "w").write("half"); print(tmp, flush=True); {end}
import safetensors.torch; safetensors.torch.save_file = deadly
files.cached_tensor(files.home()/"cache"/"x.safetensors", lambda: torch.zeros(3), "numbers")
"""
    put(0)
    dead = subprocess.run([sys.executable, "-c", code.format(end="os.kill(os.getpid(), signal.SIGKILL)")],
        capture_output=True, text=True)
    half, = (home/"cache").glob(".*.tmp")
    assert dead.returncode == -signal.SIGKILL and str(half) in dead.stdout
    p = subprocess.Popen([sys.executable, "-c",
        code.replace("x.safetensors", "y.safetensors").format(end="import time; time.sleep(100)")],
        stdout=subprocess.PIPE, text=True)
    living = Path(p.stdout.readline().strip())
    assert clean().removed == [half] and living.read_text() == "half"
    p.kill(); p.wait()
    assert clean().removed == [living]

"Other systems than the one at hand, simulated: what only Linux has is missing, letters are few, nothing can be written."
import builtins
import errno
import os
import subprocess
import sys

import pytest

from refcomm import files
from refcomm.core import n_cores
from refcomm.papers.eqc.items import SMALL
from refcomm.papers.eqc.run import EQCSpec
from refcomm.runs import cleaning
from refcomm.runs.store import Store, provenance

TINY = {**SMALL["object"], "lr": 1e-3, "epochs": 2, "word_length": 10}
WITHOUT = """
import os, signal, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios"): sys.modules[name] = None
for name in ("SIGUSR1", "SIGKILL"): delattr(signal, name)
for name in ("sched_getaffinity", "O_NOFOLLOW", "O_NONBLOCK", "geteuid", "getuid", "fork", "mkfifo"): delattr(os, name)
"""
WORK = f"""
import os, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="refcomm")
import matplotlib; matplotlib.use("agg")
import pandas as pd
from matplotlib import pyplot as plt
from pathlib import Path
from refcomm.papers.eqc.run import EQCSpec
from refcomm.runs.execute import execute, write_plan
from refcomm.publish.figures import save
from refcomm import cli
spec = EQCSpec(**{TINY!r})
write_plan([spec], "plan.json")
def refcomm(*args):
    code = cli.app(list(args), standalone_mode=False)
    assert not code, (args, code)
refcomm("runs", "execute", "plan.json", "--device", "cpu")
records = execute([spec])
save("eqc", "table5", pd.DataFrame(dict(row=["Größe · n"], ours=[.5])), plt.figure(), records, "cpu", "Größe → n", "a · note")
for args in (["list"], ["verify"], ["export", "x.tar"], ["import", "x.tar"], ["clean", "--yes"]): refcomm("runs", *args)
refcomm("report", "--out", "report.html", "--figures", os.environ["REFCOMM_FIGURES"])
assert "Größe → n" in Path("report.html").read_text("utf-8")
"""


@pytest.mark.slow
def test_what_only_linux_has_may_be_missing_and_letters_may_be_few(home, tmp_path):
    """As on Windows: modules, signals and functions of the system are not there; training, store, archives and report work.
    And under an ASCII locale: files are UTF-8, each that is opened as text says so, and a terminal gets what it has."""
    ascii = "import locale\nassert locale.getpreferredencoding(False) not in ('UTF-8', 'utf-8')\n"
    (tmp_path/"work.py").write_text(WITHOUT + ascii + WORK, encoding="utf-8")
    r = subprocess.run([sys.executable, "-X", "warn_default_encoding", "work.py"], capture_output=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
            "PYTHONIOENCODING": "ascii:backslashreplace"})
    assert r.returncode == 0, r.stderr.decode(errors="replace")[-3000:]
    assert (r.stdout + r.stderr).isascii()


def test_folders_are_not_forced_to_the_disk_where_they_cannot_be(monkeypatch):
    monkeypatch.setattr(files.os, "name", "nt")
    files.fsync_dir("nowhere")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError): files.fsync_dir("nowhere")


def test_memory_and_cores_as_other_systems_tell_them(monkeypatch):
    linux = provenance("cpu", 1, 1)["process_peak_memory_mib"]
    monkeypatch.setattr(sys, "platform", "darwin") # tells bytes, where Linux tells kibibytes
    assert provenance("cpu", 1, 1)["process_peak_memory_mib"] <= linux // 2**9
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert n_cores() == 1


def test_a_job_is_not_asked_by_a_signal_that_would_end_it(tmp_path, monkeypatch):
    (tmp_path/"123_submitted.pkl").write_bytes(b"")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(os, "kill", lambda *a: pytest.fail("a signal was sent"))
    monkeypatch.setattr(os, "name", "nt")
    found = cleaning._queued(tmp_path)
    monkeypatch.undo()
    assert found


def freeze(monkeypatch):
    "Every call that would write is refused, as on a file system that is mounted read-only; /dev and locks in memory excepted."
    def refuse(path): raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    real_open, real = os.open, builtins.open
    def low(path, flags, *a, **k):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not str(path).startswith("/dev/"): refuse(path)
        return real_open(path, flags, *a, **k)
    def high(file, mode="r", *a, **k):
        if set(mode) & set("wax+") and not isinstance(file, int) and not str(file).startswith("/dev/"): refuse(file)
        return real(file, mode, *a, **k)
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "symlink", "link", "utime"):
        monkeypatch.setattr(os, name, lambda path, *a, **k: refuse(path))
    monkeypatch.setattr(os, "open", low)
    monkeypatch.setattr(builtins, "open", high); monkeypatch.setattr("io.open", high)


def test_a_store_that_can_only_be_read_is_read_and_each_refusal_is_one_line(home, tmp_path, command, monkeypatch):
    from refcomm.runs.archives import export_runs
    from refcomm.runs.execute import execute, write_plan
    spec, other = EQCSpec(**TINY), EQCSpec(**{**TINY, "seed": 1})
    record, = execute([spec])
    write_plan([spec], tmp_path/"made.json"); write_plan([other], tmp_path/"other.json"); export_runs(tmp_path/"x.tar")
    bad = Store().path("eqc", "0"*16)
    bad.mkdir(); (bad/"record.json").write_text("{", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as m:
        freeze(m)
        assert Store().get(spec).rows == record.rows and execute([spec])[0].rows == record.rows
        outs = {args: command(*args) for args in [("runs", "list"), ("runs", "verify"), ("runs", "show", record.key),
            ("runs", "execute", "made.json"), ("plan", "eqc/table5", "--profile", "smoke"),
            ("runs", "write-plan", "eqc/table5"),
            ("runs", "execute", "other.json"), ("runs", "import", "x.tar"), ("runs", "export", "y.tar"),
            ("runs", "clean", "--all", "--yes"), ("reproduce", "eqc/table1", "--profile", "smoke")]}
    reads = list(outs)[:6]
    assert [outs[a].returncode for a in reads] == [0, 1, 0, 0, 0, 0] and "1 sound, 1 damaged" in outs["runs",
        "verify"].stdout
    for args, r in outs.items():
        if args in reads: continue
        said = r.stderr.strip() or r.stdout.strip().splitlines()[-1]
        assert r.returncode in (1, 2) and len(r.stderr.strip().splitlines()) <= 1, (args, r)
        assert "read-only" in " ".join((r.stdout + r.stderr).split()) or "Read-only" in said, (args, r)

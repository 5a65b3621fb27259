"The run store when processes die, disks fill up, files rot and two drivers meet."
import errno
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS, checkpoint_state, start

from refcomm import core
from refcomm.core import ConfigError, RecordError, StoreError
from refcomm.papers.eqc.run import EQCSpec
from refcomm.files import load_checkpoint
from refcomm.papers.eqc.items import SMALL
from refcomm.runs.execute import execute, read_plan, write_plan
from refcomm.runs.archives import export_runs, import_runs
from refcomm.runs.store import Store, run_key

LONG = {**SMALL["object"], "lr": 1e-3, "word_length": 20, "epochs": 200, "patience": 200}


@pytest.fixture
def work(tmp_path):
    "What executes runs of these seeds, or these Specs, in a process of its own."
    def make(*wanted, jobs=1, **options):
        path = tmp_path/f"plan-{len(list(tmp_path.glob('plan-*')))}.json"
        write_plan([EQCSpec(seed=s, **LONG) if isinstance(s, int) else s for s in wanted], path)
        return start("runs", "execute", path, "--device", "cpu", "--jobs", jobs, **options)
    return make


def same(a, b):
    assert a.rows == b.rows and a.summary == b.summary
    ta, tb = a.tensors(), b.tensors()
    assert ta.keys() == tb.keys() and all(torch.equal(ta[k], tb[k]) for k in ta)
    assert a.history().drop(columns="seconds").equals(b.history().drop(columns="seconds"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The records of two seeds, made in one go elsewhere, with one thread as in the processes below."
    calm = tmp_path_factory.mktemp("calm")
    specs = [EQCSpec(seed=s, **LONG) for s in (0, 1)]
    write_plan(specs, calm/"plan.json")
    p = start("runs", "execute", calm/"plan.json", "--device", "cpu", REFCOMM_HOME=str(calm))
    assert p.wait() == 0, p.stderr.read()
    return [Store(calm/"runs").get(s) for s in specs]


@pytest.mark.slow
def test_kill_while_training_then_resume(home, undisturbed, work):
    specs = [EQCSpec(seed=s, **LONG) for s in (0, 1)]
    often, deaths = dict(REFCOMM_CHECKPOINT_SECONDS="0.05"), 0
    for _ in range(3):
        p = work(0, 1, **often)
        before = time.time()
        while p.poll() is None and not any(f.stat().st_mtime > before and checkpoint_state(f)["epoch"] > deaths
            for f in Store().root.glob("unfinished/*/training.safetensors")):
            time.sleep(.02)
        time.sleep(random.Random(deaths).random()*.1)
        if p.poll() is None: p.send_signal(signal.SIGKILL); deaths += 1
        p.wait()
    assert deaths >= 2 and Store().keys() == []
    folder, = Store().root.glob("unfinished/*")
    assert load_checkpoint(folder/"training.safetensors")[1]["epoch"] > 0, "something was learned before the last kill"
    p = work(0, 1, **often)
    assert p.wait() == 0, p.stderr.read()
    for s, calm in zip(specs, undisturbed):
        same(Store().get(s), calm)
        assert Store().get(s).history().epoch.tolist() == list(range(200)), "no epoch was done twice"
    assert not list(Store().root.glob("unfinished/*"))


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2], ids=["in the first record", "between two records"])
def test_kill_while_writing_records(home, undisturbed, work, at):
    specs = [EQCSpec(seed=s, **LONG) for s in (0, 1)]
    p = work(0, 1, arrange=("no_renaming", at))
    assert p.wait() == -signal.SIGKILL
    assert len(Store().keys()) == at - 1 and list((Store().root/"tmp").iterdir())
    p = work(0, 1, arrange=("no_training", ""))
    assert p.wait() == 0, p.stderr.read()
    for s, calm in zip(specs, undisturbed): same(Store().get(s), calm)
    assert not list((Store().root/"tmp").iterdir()), "the half-written record is gone"


@pytest.mark.slow
def test_kill_between_the_last_record_and_the_end(home, undisturbed, work):
    p = work(0, 1, arrange=("no_clearing_up", ""))
    assert p.wait() == -signal.SIGKILL
    assert len(Store().keys()) == 2 and list(Store().root.glob("unfinished/*"))
    p = work(0, 1)
    assert p.wait() == 0, p.stderr.read()
    assert not list(Store().root.glob("unfinished/*")), "the next driver clears up"
    for s, calm in enumerate(undisturbed): same(Store().get(EQCSpec(seed=s, **LONG)), calm)


@pytest.mark.slow
def test_two_processes_share_the_work(home, tmp_path, work):
    log = tmp_path/"trained.log"
    def specs(*seeds): return [EQCSpec(**{**LONG, "seed": s, "word_length": w}) for w in (10, 20) for s in seeds]
    ps = [work(*specs(*seeds), arrange=("counted", log)) for seeds in ((0, 1), (0, 1), (1, 2))]
    for p in ps: assert p.wait() == 0, p.stderr.read()
    made = log.read_text().split()
    assert len(made) == len(set(made)) == 6, "six runs, each made once"
    assert len(Store().keys()) == 6 and not list(Store().root.glob("set-aside/*"))


@pytest.mark.slow
def test_a_pool_gives_the_same_records(home, tmp_path):
    specs = [EQCSpec(seed=s, word_length=w, **{k: v for k, v in LONG.items() if k not in ("word_length", "epochs")},
        epochs=3) for w in (10, 20) for s in (0, 1)]
    records = execute(specs, jobs=2)
    for a, b in zip(records, execute(specs, store=Store(tmp_path/"other"))):
        assert [r["n_candidates"] for r in a.rows] == [r["n_candidates"] for r in b.rows]
        assert max(abs(x["accuracy"] - y["accuracy"]) for x, y in zip(a.rows, b.rows)) <= .05
    assert execute(specs)[0].provenance == records[0].provenance, "found, not made again"


def test_a_failing_run_is_reported_and_leaves_nothing(home):
    bad = EQCSpec(**{**LONG, "lr": 1e30})
    for jobs in (1, 2):
        with pytest.raises(core.TrainingDiverged, match="lower lr"): execute([bad], jobs=jobs)
    assert Store().keys() == []


@pytest.fixture
def stored(home):
    spec = EQCSpec(**{**LONG, "epochs": 1})
    return spec, execute([spec])[0]


def test_no_mutation_of_a_record_is_accepted_silently(stored):
    spec, record = stored
    rng, files = random.Random(0), sorted(record.path.iterdir())
    whole = {f: f.read_bytes() for f in files}
    noticed = 0
    for _ in range(300):
        f = rng.choice(files)
        data = bytearray(whole[f])
        how = rng.choice(["flip", "cut", "insert", "delete"])
        if how == "flip": data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == "cut": del data[rng.randrange(len(data)):]
        elif how == "insert": data.insert(rng.randrange(len(data)), rng.randrange(256))
        if how == "delete": f.unlink()
        else: f.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Store().get(spec)
        assert found is None or (found.rows, found.spec, found.summary, found.provenance) == (record.rows, record.spec,
            record.summary, record.provenance)
        noticed += found is None
        record.path.mkdir(parents=True, exist_ok=True)
        for g, b in whole.items(): g.write_bytes(b)
    assert noticed == 300


def test_a_damaged_record_is_named_set_aside_and_made_again(stored):
    spec, record = stored
    (record.path/"tensors.safetensors").write_bytes(b"junk")
    with pytest.warns(UserWarning, match=f"eqc/{record.key} was edited or cut short: tensors.safetensors.*set-aside"):
        again, = execute([spec])
    assert again.rows == record.rows and len(list((Store().root/"set-aside").iterdir())) == 1


@pytest.mark.parametrize("change", [lambda raw: json.dumps(raw),
    lambda raw: json.dumps(raw, indent=1).replace('"rows"', '"rows": [], "rows"'), lambda raw: "["*200_000],
    ids=["white space", "a key twice", "too deep"])
def test_what_reads_the_same_but_is_not_as_written_is_set_aside(stored, change):
    spec, record = stored
    file = record.path/"record.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.warns(UserWarning, match="(was edited|is unreadable).*set-aside"): assert Store().get(spec) is None


@pytest.mark.parametrize("text", ['{"sha256": "0", "body": {}}', '{"body": {"rows": [NaN]}, "sha256": "0"}', "[]",
    "null", '{"sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "body": {}}'])
def test_what_is_no_record_is_set_aside(stored, text):
    spec, record = stored
    (record.path/"record.json").write_text(text)
    with pytest.warns(UserWarning, match="moved to .*set-aside"): assert Store().get(spec) is None


def test_unfinished_work_of_another_version_is_not_continued(home, monkeypatch):
    specs = [EQCSpec(seed=s, **{**LONG, "epochs": 1}) for s in (0, 1)]
    def cut(*a): raise KeyboardInterrupt
    monkeypatch.setattr(Store, "put", cut)
    with pytest.raises(KeyboardInterrupt): execute(specs)
    monkeypatch.undo()
    monkeypatch.setenv("REFCOMM_HOME", str(home))
    assert len(list(Store().root.glob("unfinished/*/training.safetensors"))) == 1
    monkeypatch.setattr(EQCSpec, "version", EQCSpec.version + 1)
    assert execute(specs)[0].history().epoch.tolist() == [0]
    assert len(list(Store().root.glob("unfinished/*"))) == 1, "the old version's state lies where it lay"


@pytest.mark.slow
def test_overlapping_stacks_after_a_kill(home, undisturbed, work):
    "Killed while training seeds 0 and 1; then seed 0 alone is wanted; then both."
    p = work(0, 1, REFCOMM_CHECKPOINT_SECONDS="0.05")
    while not list(Store().root.glob("unfinished/*/training.safetensors")): time.sleep(.02)
    p.kill(); p.wait()
    for seeds in ((0,), (0, 1)):
        p = work(*seeds)
        assert p.wait() == 0, p.stderr.read()
    for s, calm in zip((0, 1), undisturbed):
        assert [r["n_candidates"] for r in Store().get(EQCSpec(seed=s, **LONG)).rows] == [r["n_candidates"]
            for r in calm.rows]
    assert not list(Store().root.glob("unfinished/*"))


def test_your_own_executor_is_left_running(home):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        for s in (0, 1): assert len(execute([EQCSpec(seed=s, **{**LONG, "epochs": 1})], executor=pool)) == 1


@pytest.mark.slow
def test_workers_end_with_a_killed_driver(home, work):
    p = work(*(EQCSpec(**{**LONG, "word_length": w, "epochs": 5000, "patience": 5000}) for w in (10, 20)), jobs=2)
    while len(list(Store().root.glob("unfinished/*/members.json"))) < 2:
        assert p.poll() is None, p.stderr.read()
        time.sleep(.05)
    children = lambda pid: [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    workers = [w for server in children(p.pid) for w in children(server)]
    assert len(workers) >= 2
    p.kill(); p.wait()
    deadline = time.time() + 20
    while any(Path(f"/proc/{w}").exists() for w in workers) and time.time() < deadline: time.sleep(.1)
    assert not [w for w in workers if Path(f"/proc/{w}").exists()]


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk(home, work):
    p = work(EQCSpec(**{**LONG, "epochs": 1}), arrange=("small_files", 20_000))
    assert p.wait() == 2 and "cannot write" in p.stderr.read()
    assert not [f for f in home.rglob("*") if f.suffix == ".tmp" or f.name == "record.json"]


@pytest.mark.slow
def test_cleaning_leaves_live_runs(stored, capsys):
    from refcomm.cli import runs_clean
    spec, record = stored
    held = subprocess.Popen([sys.executable, PROGRAMS/"hold_locks.py", record.key], stdout=subprocess.PIPE, text=True)
    held.stdout.readline()
    runs_clean(everything=True, yes=True, adopt=False)
    assert f"left, in use: {record.path}" in capsys.readouterr().out and Store().keys() == [("eqc", record.key)]
    held.kill(); held.wait()
    runs_clean(everything=True, yes=True, adopt=False)
    assert Store().keys() == []


def test_another_version_is_another_run(stored, monkeypatch):
    spec, record = stored
    monkeypatch.setattr(EQCSpec, "version", EQCSpec.version + 1)
    assert run_key(spec) != record.key and Store().get(spec) is None


def test_full_disk_is_one_clear_error(home, tmp_path, monkeypatch):
    spec = EQCSpec(**{**LONG, "epochs": 1})
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="the disk is full: free some space, or set REFCOMM_HOME"): execute([spec])
    monkeypatch.undo()
    assert not [f for f in (tmp_path/"home").rglob("*") if f.is_file() and f.suffix != ".lock"
        and f.name != ".refcomm-store"], "nothing half-written stays behind"


@pytest.mark.parametrize("code, says",
    [(errno.EROFS, "read-only: set REFCOMM_HOME"), (errno.EACCES, "permission denied: set REFCOMM_HOME")])
def test_unwritable_folders_are_one_clear_error(home, monkeypatch, code, says):
    def refuse(self, *a, **k): raise OSError(code, os.strerror(code), str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=says): execute([EQCSpec(**{**LONG, "epochs": 1})])


def test_a_file_where_a_folder_should_be(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("REFCOMM_HOME", str(tmp_path/"file"/"home"))
    with pytest.raises(StoreError, match="cannot write .*file"): execute([EQCSpec(**{**LONG, "epochs": 1})])


def test_plans_and_archives_travel(stored, tmp_path):
    spec, record = stored
    write_plan([spec, spec], tmp_path/"plan.json")
    assert read_plan(tmp_path/"plan.json") == [spec]
    assert export_runs(tmp_path/"runs.tar") == 1
    other = Store(tmp_path/"other")
    assert import_runs(tmp_path/"runs.tar", other).new == [("eqc", record.key)]
    same(other.get(spec), record)
    assert import_runs(tmp_path/"runs.tar", other)[:3] == ([], [], [("eqc", record.key)])


def test_plans_of_every_paper_are_read_back(tmp_path):
    specs = [importlib.import_module(f"refcomm.papers.{paper}.items").grid(item, "smoke", 1)[0]
        for paper, item in (("eqc", "table6"), ("iac", "table1"), ("patch", "table1"), ("sms", "epoch30"))]
    write_plan(specs, tmp_path/"plan.json")
    assert read_plan(tmp_path/"plan.json") == specs


def evil(path, name, data=b"{}", kind=tarfile.REGTYPE):
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = (len(data) if kind == tarfile.REGTYPE else 0), kind, "/etc/passwd"
        tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name, kind",
    [("../evil.json", tarfile.REGTYPE), ("/tmp/evil.json", tarfile.REGTYPE),
    ("eqc/0123456789abcdef/../../x", tarfile.REGTYPE),
                                        ("eqc/0123456789abcdef/record.json", tarfile.SYMTYPE),
                                        ("eqc/0123456789abcdef/other.bin", tarfile.REGTYPE),
                                        ("eqc/0123456789abcdef/record.json", tarfile.REGTYPE)])
def test_no_archive_writes_outside_or_unchecked(home, tmp_path, name, kind):
    with pytest.raises(RecordError): import_runs(evil(tmp_path/"evil.tar", name, kind=kind))
    assert not [f for f in home.rglob("*") if f.is_file() and f.suffix != ".lock"
        and f.name != ".refcomm-store"] and not (tmp_path/"evil.json").exists()


def test_a_record_moved_under_another_key_is_refused_on_import(stored, tmp_path):
    spec, record = stored
    other = "0"*16
    with tarfile.open(tmp_path/"moved.tar", "w") as tar:
        for f in record.path.iterdir(): tar.add(f, f"eqc/{other}/{f.name}")
    with pytest.raises(RecordError, match="is foreign"): import_runs(tmp_path/"moved.tar", Store(tmp_path/"other"))


@pytest.mark.parametrize("text, says",
    [("[", "is not a plan"), ('[{"experiment": "eqc"}]', "is not a plan"),
    ('[{"experiment": "eqx", "fields": {}}]', "did you mean 'eqc'"),
    ('[{"experiment": "eqc", "fields": {"sed": 1}}]', "did you mean 'seed'")])
def test_bad_plans_are_named(tmp_path, text, says):
    (tmp_path/"plan.json").write_text(text)
    with pytest.raises(ConfigError, match=says): read_plan(tmp_path/"plan.json")


def test_a_truncated_archive(tmp_path):
    (tmp_path/"x.tar").write_bytes(b"not a tar")
    with pytest.raises(RecordError, match="cut short or damaged.*nothing was imported"):
        import_runs(tmp_path/"x.tar", Store(tmp_path/"s"))


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_next_driver_continues(home, undisturbed, work):
    p = work(0, 1, jobs=2, arrange=("killed_workers", ""))
    assert p.wait() == 2 and "run again to continue" in p.stderr.read()
    assert Store().keys() == []
    p = work(0, 1)
    assert p.wait() == 0, p.stderr.read()
    for s, calm in zip((0, 1), undisturbed): same(Store().get(EQCSpec(seed=s, **LONG)), calm)

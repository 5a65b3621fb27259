"What the store keeps, what it refuses, and that one bad thing does not take down the rest."
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from refcomm.core import ConfigError, RecordError
from refcomm.papers.eqc.run import EQCSpec
from refcomm.runs.execute import execute
from refcomm.runs.store import RunResult, Store, digest, provenance, run_key

ORIGIN = dict(commit="0", torch="2", device="cpu", seconds=1., trained_together=1)


def result(**changes):
    return RunResult([dict(accuracy=.5)], dict(best_epoch=0), pd.DataFrame(dict(epoch=[0], loss=[.5])),
        dict(messages=torch.arange(6)))._replace(**changes)


def put(seed=0, **changes): return Store().put(EQCSpec(seed=seed), result(**changes), ORIGIN)


def test_weights_are_kept_checked_and_may_be_left_out(home):
    w = torch.arange(12.).view(3, 4)
    record = put(weights={"layer.weight": w, "layer.tied": w, "layer.part": w[:1]})
    assert {k: v.tolist() for k, v in record.weights().items()} == {"layer.weight": w.tolist(),
        "layer.tied": w.tolist(), "layer.part": w[:1].tolist()}
    assert record.files == ("record.json", "tensors.safetensors", "history.parquet", "weights.safetensors")
    assert (record.bytes("weights.safetensors") == (record.path/"weights.safetensors").stat().st_size
        and record.bytes() == sum(f.stat().st_size for f in record.path.iterdir()))
    (record.path/"weights.safetensors").write_bytes(b"other")
    with pytest.raises(RecordError, match="weights.safetensors does not match its checksum"):
        Store().read("eqc", record.key)
    (record.path/"weights.safetensors").unlink()
    with pytest.raises(RecordError, match="weights.safetensors is missing"): Store().read("eqc", record.key)
    bare = Store().put(EQCSpec(seed=1), result(weights=dict(w=w)), ORIGIN, weights=False)
    assert bare.weights() == {} and bare.bytes("weights.safetensors") == 0 and bare.key == run_key(EQCSpec(seed=1))


@pytest.mark.parametrize("wanted", [True, False])
def test_execute_says_whether_weights_are_kept(home, small, monkeypatch, wanted):
    from refcomm.papers.eqc import run as eqc
    real, asked = eqc.run, []
    monkeypatch.setattr(eqc, "run", lambda specs, context: asked.append(context.weights)
        or [r._replace(weights=dict(w=torch.ones(2))) for r in real(specs, context)])
    record, = execute([small(epochs=1)], weights=wanted)
    assert asked == [wanted] and bool(record.weights()) == wanted
    monkeypatch.setenv("REFCOMM_WEIGHTS", "off")
    assert not execute([small(epochs=1, seed=1)])[0].weights()
    monkeypatch.setenv("REFCOMM_WEIGHTS", "of")
    with pytest.raises(ConfigError, match="unknown REFCOMM_WEIGHTS 'of'"): execute([small(epochs=1, seed=1)])


def test_tensors_that_share_memory_are_stored(home):
    m = torch.arange(12).view(3, 4)
    found = put(tensors=dict(m=m, first=m[:2], same=m, turned=m.T, none=m[:0], last=m[2:])).tensors()
    assert {k: v.tolist() for k, v in found.items()} == dict(m=m.tolist(), first=m[:2].tolist(), same=m.tolist(),
        turned=m.T.tolist(), none=[], last=m[2:].tolist())


@pytest.mark.parametrize("value, kept",
    [(np.int64(3), 3), (np.float32(.5), .5), (np.bool_(True), True), (torch.tensor(4), 4), (torch.tensor(.25), .25),
    ((1, np.int8(2)), [1, 2])], ids=repr)
def test_numbers_of_numpy_and_pytorch_are_numbers(home, value, kept):
    assert put(rows=[dict(x=value)], summary=dict(deep=dict(y=value))).rows == [dict(x=kept)]


@pytest.mark.parametrize("changes, says", [
    (dict(rows=[dict(a=1), dict(x=torch.ones(2))]), r"rows\[1\]\['x'\] is Tensor"),
    (dict(summary=dict(when=pd.Timestamp(0))), r"summary\['when'\] is Timestamp"),
    (dict(summary={3: 1}), "summary has the key 3, int"),
    (dict(rows=[dict(x=float("nan"))]), r"rows\[0\]\['x'\] is nan.*store None"),
    (dict(summary=dict(deep=[1, float("inf")])), r"summary\['deep'\]\[1\] is inf"),
    (dict(rows=[dict(x={1, 2})]), r"rows\[0\]\['x'\] is set"),
    (dict(tensors=dict(m=[1, 2])), r"tensors\['m'\] is list"),
    (dict(tensors=dict(m=torch.eye(2).to_sparse())), r"tensors\['m'\]"),
    (dict(weights=dict(w=3)), r"weights\['w'\] is int"),
    (dict(history=pd.DataFrame(dict(epoch=[0, 1], odd=[1, {2}]))), r"history\['odd'\] holds int, set"),
    (dict(rows=["accuracy"]), "row 0 is str"),
], ids=str)
def test_what_cannot_be_stored_is_named(home, changes, says):
    with pytest.raises(RecordError, match=says): put(**changes)
    assert Store().keys() == [] and not list(Store().root.glob("tmp/*"))


def test_what_cannot_be_written_is_found_before_training(home, small, monkeypatch):
    "A package that writes the history is missing: said at once, not after hours."
    from refcomm.papers.eqc import run as eqc
    monkeypatch.setattr(eqc, "run", lambda *a: pytest.fail("it trained"))
    monkeypatch.setattr(pd.DataFrame, "to_parquet", lambda *a, **k: (_ for _ in ()).throw(ImportError("no pyarrow")))
    with pytest.raises(RecordError, match="history"): execute([small(epochs=1)])


def test_a_spec_that_cannot_be_stored_is_named():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        experiment = "odd"
        version = 1
        size: object = None
    with pytest.raises(ConfigError, match="Odd holds .*set"): run_key(Odd({1}))


def forge(record, change):
    "A record of the same key, changed, with checksums made anew."
    raw = json.loads((record.path/"record.json").read_text())
    change(raw["body"])
    raw["sha256"] = digest(raw["body"])
    (record.path/"record.json").write_text(json.dumps(raw, indent=1))


FORGED = {
    "no provenance": (lambda b: b.update(provenance={}), "its provenance has no commit"),
    "time as text": (lambda b: b["provenance"].update(seconds="1"), "its provenance has no seconds"),
    "no members": (lambda b: b["provenance"].update(trained_together=0), "below what is possible"),
    "rows of text": (lambda b: b.update(rows=["x"]), "row 0 is str"),
    "rows that are a table": (lambda b: b.update(rows={}), "its rows is dict"),
    "no summary": (lambda b: b.pop("summary"), "its summary is missing"), "a body that is a list": (lambda b: None, ""),
    "a file elsewhere": (lambda b: b.update(files={"../../etc/hostname": "0"*64}),
    "it names the files ../../etc/hostname"),
    "a device": (lambda b: b["files"].update({"/dev/zero": "0"*64}), "it names the files /dev/zero"),
    "a file fewer": (lambda b: b["files"].pop("history.parquet"), "it names the files tensors.safetensors"),
    "checksums of another kind": (lambda b: b["files"].update({"history.parquet": 3}),
    "the checksums of its files are none"),
}


@pytest.mark.parametrize("kind", [k for k in FORGED if k != "a body that is a list"])
def test_a_record_of_another_form_is_named_and_set_aside(home, kind):
    change, says = FORGED[kind]
    record = put()
    forge(record, change)
    sound, bad = Store().survey()
    assert not sound and says in bad[0]
    with pytest.warns(UserWarning, match="moved to .*set-aside"): assert Store().get(EQCSpec(seed=0)) is None


def test_a_spec_of_wrong_kinds_is_named(home):
    record = put()
    raw = json.loads((record.path/"record.json").read_text())
    raw["body"]["spec"]["epochs"] = "many"
    raw["sha256"] = digest(raw["body"])
    key = digest([raw["body"]["experiment"], raw["body"]["version"], raw["body"]["spec"]])[:16]
    shutil.copytree(record.path, record.path.with_name(key))
    (record.path.with_name(key)/"record.json").write_text(json.dumps(raw, indent=1))
    assert Store().survey()[0] == [record] and "its Spec's epochs is 'many'" in Store().survey()[1][0]


BAD = {
    "a folder for record.json": lambda p: ((p/"record.json").unlink(), (p/"record.json").mkdir()),
    "a link loop": lambda p: ((p/"record.json").unlink(), (p/"record.json").symlink_to(p/"record.json")),
    "a link to a device": lambda p: ((p/"tensors.safetensors").unlink(),
    (p/"tensors.safetensors").symlink_to("/dev/zero")),
    "a pipe": lambda p: ((p/"history.parquet").unlink(), os.mkfifo(p/"history.parquet")),
    "a folder for tensors": lambda p: ((p/"tensors.safetensors").unlink(), (p/"tensors.safetensors").mkdir()),
    "a file for the folder": lambda p: (shutil.rmtree(p), p.write_text("")),
    "a loop for the folder": lambda p: (shutil.rmtree(p), p.symlink_to(p)),
    "no provenance": lambda p: forge(Store().read(p.parent.name, p.name), lambda b: b.update(provenance={})),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_record_does_not_take_down_the_rest(home, tmp_path, command, kind):
    bad, good = put(0), put(1)
    BAD[kind](bad.path)
    listed = command("runs", "list")
    verified = command("runs", "verify")
    planned = command("runs", "write-plan", "eqc/table6", "--profile", "smoke")
    exported = command("runs", "export", tmp_path/"x.tar")
    assert listed.returncode == 0 and good.key in listed.stdout and f"eqc/{bad.key}" in listed.stdout + listed.stderr
    assert verified.returncode == 1 and "1 sound, 1 damaged" in verified.stdout
    assert planned.returncode == 0 and isinstance(json.loads(planned.stdout), list)
    assert (exported.returncode == 0 and "1 runs written" in exported.stdout and f"eqc/{bad.key}" in exported.stdout
        + exported.stderr)
    with pytest.warns(UserWarning, match="set-aside"): assert Store().get(EQCSpec(seed=0)) is None
    assert Store().put(EQCSpec(seed=0), result(), ORIGIN).key == bad.key


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="needs permissions")
def test_a_folder_that_may_not_be_read_does_not_take_down_the_rest(home, monkeypatch):
    good, real = put(1), os.listdir
    (Store().root/"iac").mkdir()
    def refuse(path="."):
        if Path(path).name == "iac": raise PermissionError(13, "Permission denied")
        return real(path)
    monkeypatch.setattr(os, "listdir", refuse)
    sound, bad = Store().survey()
    assert sound == [good] and "iac: Permission denied" in bad[0]


@pytest.mark.parametrize("args", [("list",), ("verify",), ("export", "x.tar"), ("clean", "--yes"), ("show", "x")])
@pytest.mark.parametrize("deep", [False, True])
def test_a_home_that_is_a_file_is_one_error(tmp_path, command, monkeypatch, args, deep):
    (tmp_path/"home").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFCOMM_HOME", str(tmp_path/"home"/"deep") if deep else str(tmp_path/"home"))
    out = command("runs", *args)
    assert out.returncode == 2 and "is not a folder" in out.stderr and out.stderr.count("\n") == 1 and not out.stdout


def test_memory_is_told_where_the_system_tells_it(monkeypatch):
    assert provenance("cpu", 1, 1)["process_peak_memory_mib"] > 1
    monkeypatch.setitem(sys.modules, "resource", None)
    assert provenance("cpu", 1, 1)["process_peak_memory_mib"] is None


@pytest.mark.slow
def test_a_system_without_resource_imports_the_store(tmp_path):
    "As on Windows."
    import subprocess
    code = "import sys; sys.modules['resource'] = None\nimport refcomm.runs.store, refcomm.runs.execute, refcomm.runs.executors"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def known(): # keys in the index, and what it says of damaged records
    from refcomm.runs.store import indexed
    db = indexed(Store(), said := [])
    with contextlib.closing(db): return {k for k, in db.execute("SELECT key FROM runs")}, said


def test_the_index_follows_the_store(home, monkeypatch):
    a, b = put(0), put(1)
    assert known() == ({a.key, b.key}, [])
    shutil.rmtree(b.path)
    c = put(2)
    read, real = [], Store.read
    monkeypatch.setattr(Store, "read", lambda self, *k: read.append(k) or real(self, *k))
    assert known() == ({a.key, c.key}, []) and read == [("eqc", c.key)], "what it knows is not read again"
    text = (a.path/"record.json").read_text()
    (a.path/"record.json").write_text(text.replace('"best_epoch": 0', '"best_epoch": 1'))
    for _ in range(2): # a damaged record is said each time
        keys, said = known()
        assert keys == {c.key} and len(said) == 1 and f"eqc/{a.key} was edited" in said[0]
    (a.path/"record.json").write_text(text)
    assert known() == ({a.key, c.key}, [])


@pytest.mark.parametrize("kind", ["no table", "another format", "another table", "cut", "empty", "a pipe", "a folder",
    "a link",
    "may not be written", "held by another"])
def test_an_index_that_cannot_be_used_is_made_anew(home, tmp_path, kind):
    import sqlite3
    from refcomm.runs.store import INDEX
    a, path, victim = put(0), Store().root/INDEX, tmp_path/"victim"
    assert known() == ({a.key}, [])
    data, held = path.read_bytes(), None
    if kind == "no table": path.write_bytes(b"anything"*300)
    if kind == "cut": path.write_bytes(data[:len(data)//2])
    if kind == "empty": path.write_bytes(b"")
    if kind == "another format":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript("PRAGMA user_version=99; DROP TABLE runs")
    if kind == "another table":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript("DROP TABLE runs; CREATE TABLE runs (key TEXT)")
    if kind in ("a pipe", "a folder", "a link"): path.unlink()
    if kind == "a pipe": os.mkfifo(path)
    if kind == "a folder": path.mkdir()
    if kind == "a link": victim.write_bytes(data); path.symlink_to(victim)
    if kind == "may not be written": path.unlink(); (Store().root/f"{INDEX}-journal").mkdir()
    if kind == "held by another":
        held = sqlite3.connect(path)
        held.execute("BEGIN EXCLUSIVE")
    b = put(1)
    assert known() == ({a.key, b.key}, [])
    assert kind != "a link" or victim.read_bytes() == data, "nothing is written through a link"
    if held: held.close()


def test_no_index_is_written_where_no_store_is_marked(home):
    from refcomm.runs.store import INDEX, MARKER
    a = put(0)
    (Store().root/MARKER).unlink()
    assert known() == ({a.key}, []) and not (Store().root/INDEX).exists()
    shutil.rmtree(Store().root)
    assert known() == (set(), []) and not Store().root.exists()


def test_the_list_is_limited_and_says_so(home, command):
    records = [put(n) for n in range(3)]
    shown = command("runs", "list", "--limit", "2").stdout
    assert shown.startswith("3 runs in") and "and 1 more: refcomm runs list --limit 0 shows all" in shown
    shown = command("runs", "list", "--limit", "0").stdout
    assert all(r.key in shown for r in records) and "more" not in shown

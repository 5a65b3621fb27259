"Archives: exactly the records, all of them or none, whatever the tar file holds."
import gzip
import io
import json
import lzma
import os
import random
import shutil
import tarfile

import pandas as pd
import pytest
import torch

from refcomm.runs.archives import MANIFEST, _entry, export_runs, import_runs
from refcomm.core import ConfigError, RecordError, RefcommError
from refcomm.papers.eqc.run import EQCSpec
from refcomm.runs.store import RunResult, Store, provenance, run_key


@pytest.fixture
def packed(home, tmp_path):
    "Three records, one with weights, in an archive; and an empty store."
    for seed in range(3):
        weights = dict(w=torch.ones(2)) if seed == 1 else None
        Store().put(EQCSpec(seed=seed), RunResult([dict(accuracy=seed/10)], {}, pd.DataFrame(dict(epoch=[0])),
            dict(m=torch.arange(5)), weights), provenance("cpu", 1, 1))
    assert export_runs(tmp_path/"runs.tar") == 3
    return tmp_path/"runs.tar", Store(tmp_path/"other")


def untouched(store):
    return store.keys() == [] and not list(store.root.glob("tmp/*")) and not list(store.root.glob("*/*/record.json"))


def refused(path, store, match):
    with pytest.raises(RefcommError, match=match): import_runs(path, store)
    assert untouched(store)


def test_exactly_the_records_files_are_packed(home, tmp_path, packed):
    record = Store().get(EQCSpec(seed=0))
    for name in (".DS_Store", ".nfs000", "notes.txt"): (record.path/name).write_text("stray")
    export_runs(tmp_path/"again.tar")
    with tarfile.open(tmp_path/"again.tar") as tar: names = tar.getnames()
    assert len(names) == 1 + 3 + 4 + 3 and names[0] == MANIFEST and not [n for n in names if "stray" in n or ".nfs" in n
        or "DS_Store" in n]
    assert len(import_runs(tmp_path/"again.tar", packed[1]).new) == 3


def members(path):
    with tarfile.open(path) as tar: return [(m.name, tar.extractfile(m).read()) for m in tar]


def write(path, files, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, data in files: tar.addfile(_entry(name, len(data)), io.BytesIO(data))
    return path


def test_a_cut_at_any_place_is_named_and_imports_nothing(packed, tmp_path):
    path, store = packed
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) # the last file ends here; then a block of zeros says that this was all
    for at in sorted({0, 1, 511, 512, 513, *range(512, end, 2048), end - 1}):
        (tmp_path/"cut.tar").write_bytes(data[:at])
        refused(tmp_path/"cut.tar", store, "nothing was imported")
    whole = members(path)
    for n in range(1, len(whole)):
        refused(write(tmp_path/"cut.tar", whole[:n]), store, "of the 10 files in its list are missing")


@pytest.mark.parametrize("how", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_a_cut_compressed_archive_is_one_error(packed, tmp_path, how):
    path, store = packed
    data = how(path.read_bytes())
    (tmp_path/"x").write_bytes(data)
    for at in (10, len(data)//2, len(data) - 3):
        (tmp_path/"cut").write_bytes(data[:at])
        if at < len(data) - 3: refused(tmp_path/"cut", store, "cut short or damaged|nothing was imported")
    assert len(import_runs(tmp_path/"x", store).new) == 3


def test_what_is_sound_is_taken_if_asked_for(packed, tmp_path):
    path, store = packed
    whole = members(path)
    with pytest.raises(RecordError, match="--partial takes the runs that are sound"):
        import_runs(write(tmp_path/"cut.tar", whole[:-2]), store)
    done = import_runs(tmp_path/"cut.tar", store, partial=True)
    assert len(done.new) == 2 == len(store.survey()[0]) and not store.survey()[1] and "are missing" in done.refused[0]


def test_the_command_says_what_it_did(packed, tmp_path, command):
    path, store = packed
    cut = write(tmp_path/"cut.tar", members(path)[:-2])
    (Store().path("eqc", run_key(EQCSpec(seed=0)))/"record.json").write_text("{")
    out = command("runs", "import", cut)
    assert out.returncode == 2 and "nothing was imported; --partial" in out.stderr
    out = command("runs", "import", path)
    assert (out.returncode == 0
        and f"eqc/{run_key(EQCSpec(seed=0))} was damaged here: set aside, and replaced" in out.stdout
        and "0 new runs" in out.stdout and "1 replaced" in out.stdout)
    assert len(Store().survey()[0]) == 3


@pytest.mark.parametrize("spoil", [lambda p: (p/"tensors.safetensors").write_bytes(b"x"), lambda p: shutil.rmtree(p)
    or p.mkdir(), lambda p: shutil.rmtree(p) or p.write_text("")],
    ids=["a damaged file", "an empty folder", "a file in its place"])
def test_a_damaged_record_here_is_replaced(packed, spoil):
    path, store = packed
    import_runs(path, store)
    key = ("eqc", run_key(EQCSpec(seed=1)))
    spoil(store.path(*key))
    done = import_runs(path, store)
    assert (done.new, done.replaced, len(done.present)) == ([], [key], 2)
    assert store.read(*key).weights()["w"].tolist() == [1, 1] and len(list(store.root.glob("set-aside/*"))) == 1


def old_archive(path, store, also=()):
    "As refcomm packed them before there was a list: all that lies in a record's folder, with times that have fractions."
    with tarfile.open(path, "w") as tar:
        for r in store.survey()[0]:
            for f in sorted([*r.path.iterdir(), *also]): tar.add(f, f"{r.experiment}/{r.key}/{f.name}", recursive=False)
    return path


def test_archives_without_a_list_stay_readable(packed, tmp_path):
    path, store = packed
    (tmp_path/".DS_Store").write_text("stray")
    old = old_archive(tmp_path/"old.tar", Store(), [tmp_path/".DS_Store"])
    with tarfile.open(old) as tar: assert MANIFEST not in tar.getnames() and b"mtime=" in old.read_bytes()
    assert len(import_runs(old, store).new) == 3
    data = old.read_bytes()
    with tarfile.open(old) as tar: boundary = list(tar)[4].offset - 1024
    (tmp_path/"cut.tar").write_bytes(data[:boundary])
    refused(tmp_path/"cut.tar", Store(tmp_path/"third"), "it was cut short or damaged")


def odd(name, kind=tarfile.REGTYPE, size=0, **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for k, v in fields.items(): setattr(info, k, v)
    return info


RECORD = f"eqc/{'0'*16}/record.json"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
    tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE, b"Z"], ids=str)
def test_members_of_other_types_are_refused(home, tmp_path, kind):
    (tmp_path/"x.tar").write_bytes(odd(RECORD, kind, linkname="/etc/passwd").tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    refused(tmp_path/"x.tar", Store(), "not a plain file")


@pytest.mark.parametrize("headers", [{"path": "../../evil"}, {"size": "5"},
    {"GNU.sparse.major": "1", "GNU.sparse.name": RECORD}, {"linkpath": "/etc/passwd"}], ids=lambda h: next(iter(h)))
def test_headers_that_change_what_follows_are_refused(home, tmp_path, headers):
    with tarfile.open(tmp_path/"x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = odd(RECORD); info.pax_headers = headers
        tar.addfile(info)
    refused(tmp_path/"x.tar", Store(), "it has a header that changes")


def test_a_long_name_and_a_long_header_are_refused_unread(home, tmp_path):
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE):
        (tmp_path/"x.tar").write_bytes(odd("././@LongLink", kind, size=2**33).tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        refused(tmp_path/"x.tar", Store(), "not a plain file")


def test_a_sparse_bomb_is_refused(home, tmp_path):
    "Ten kilobytes that would be ten gigabytes."
    import subprocess
    with open(tmp_path/"tensors.safetensors", "wb") as f: f.truncate(10 * 2**30)
    if subprocess.run(["tar", "--sparse", "-cf", "x.tar", "--transform", f"s,^,eqc/{'0'*16}/,", "tensors.safetensors"],
        cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("needs GNU tar")
    assert (tmp_path/"x.tar").stat().st_size < 20_000
    refused(tmp_path/"x.tar", Store(), "not a plain file|header that changes")


class Zeros:
    def read(self, n): return bytes(n)


@pytest.mark.parametrize("listed", [True, False])
def test_a_compressed_bomb_is_refused_before_it_is_unpacked(home, tmp_path, monkeypatch, listed):
    size = 3 * 2**30
    with gzip.open(tmp_path/"x.tar.gz", "wb", 1) as f:
        if listed:
            data = json.dumps(dict(format=1,
                records=[dict(experiment="eqc", key="0"*16, files={"tensors.safetensors": [size, "0"*64]})])).encode()
            f.write(_entry(MANIFEST, len(data)).tobuf() + data + bytes(-len(data) % 512))
        f.write(odd(f"eqc/{'0'*16}/tensors.safetensors", size=size).tobuf(tarfile.GNU_FORMAT))
        f.write(bytes(2**20))
    refused(tmp_path/"x.tar.gz", Store(), "more than a hundred times its own size")


@pytest.mark.parametrize("change, says", [
    (lambda m: m.update(format=2), "format 2, made by a newer version"),
    (lambda m: m.pop("records"), "its list cannot be read"),
    (lambda m: m["records"].append(m["records"][0]), "names a file twice"),
    (lambda m: m["records"][0]["files"].update({"../x": [1, "0"]}), "no record's file"),
    (lambda m: m["records"][0]["files"].update({"record.json": [2**50, "0"]}), "more than such a file may have"),
    (lambda m: m["records"][0]["files"].update({"record.json": [-1, "0"]}), "more than such a file may have"),
    (lambda m: m["records"][0]["files"]["record.json"].__setitem__(1, "0"*64), "does not match its checksum"),
    (lambda m: m["records"][0]["files"]["record.json"].__setitem__(0, 3), "not in its list, or has another size"),
    (lambda m: m["records"][0]["files"].pop("record.json"), "not in its list"),
    (lambda m: m["records"].pop(), "not in its list"),
    (lambda m: m["records"].append(dict(experiment="eqc", key="0"*16, files={"record.json": [1, "0"]})), "are missing"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_a_list_that_does_not_fit_is_refused(packed, tmp_path, change, says):
    path, store = packed
    (name, data), *rest = members(path)
    content = json.loads(data)
    change(content)
    refused(write(tmp_path/"x.tar", [(name, json.dumps(content).encode()), *rest]), store, says)


def test_a_file_twice_a_list_that_comes_late_and_nothing_at_all(packed, tmp_path):
    path, store = packed
    first, *rest = members(path)
    refused(write(tmp_path/"x.tar", [first, *rest, rest[0]]), store, "twice")
    refused(write(tmp_path/"x.tar", [*rest, first]), store, "no record's file")
    refused(write(tmp_path/"x.tar", []), store, "it holds no records")
    refused(tmp_path/"none.tar", store, "cannot read archive")
    refused(tmp_path, store, "cannot read archive")
    os.mkfifo(tmp_path/"pipe.tar")
    refused(tmp_path/"pipe.tar", store, "cannot read archive")


def test_what_refcomm_does_not_know_is_refused_unless_named(packed, tmp_path):
    import dataclasses
    @dataclasses.dataclass(frozen=True)
    class Mine:
        experiment = "mine"
        version = 1
        epochs: int = 1
    store = Store(tmp_path/"mine")
    store.put(Mine(), RunResult([], {}, dict(epoch=[0]), dict(m=torch.ones(1))), provenance("cpu", 1, 1))
    export_runs(tmp_path/"mine.tar", store)
    refused(tmp_path/"mine.tar", packed[1], "unknown experiment")
    assert len(import_runs(tmp_path/"mine.tar", packed[1], also=["mine"]).new) == 1


def test_a_history_longer_than_the_spec_says_is_refused(home, tmp_path):
    store = Store(tmp_path/"long")
    store.put(EQCSpec(epochs=2), RunResult([], {}, dict(epoch=list(range(100_000))), dict(m=torch.ones(1))),
        provenance("cpu", 1, 1))
    export_runs(tmp_path/"long.tar", store)
    refused(tmp_path/"long.tar", Store(), "history of 100000 rows, more than its 2 epochs")


@pytest.mark.parametrize("kind, make",
    [("a folder", lambda p: p.mkdir()), ("a link", lambda p: p.symlink_to("/dev/null")),
    ("a link", lambda p: p.symlink_to(p.parent/"nowhere")), ("a device or a pipe", os.mkfifo)],
    ids=["folder", "link to a device", "link to nothing", "pipe"])
def test_export_replaces_nothing_but_a_file_that_it_is_told_to(packed, tmp_path, kind, make):
    make(tmp_path/"target")
    for force in (False, True):
        with pytest.raises(ConfigError, match=f"target is {kind}: name a file"):
            export_runs(tmp_path/"target", force=force)
    (tmp_path/"file").write_text("mine")
    with pytest.raises(ConfigError, match="is there already: name another file, or replace it with --force"):
        export_runs(tmp_path/"file")
    assert (tmp_path/"file").read_text() == "mine" and export_runs(tmp_path/"file", force=True) == 3


def test_no_mutation_of_an_archive_is_accepted(packed, tmp_path):
    "A bit, a stretch, a block: refused with one error, or the same records."
    path, rng = packed[0], random.Random(0)
    data, refusals = path.read_bytes(), 0
    known = {r.key: r.rows for r in Store().survey()[0]}
    for n in range(120):
        bad = bytearray(data)
        at = rng.randrange(len(data.rstrip(b"\0")))
        how = rng.choice(["flip", "zeros", "lose", "insert"])
        if how == "flip": bad[at] ^= 1 << rng.randrange(8)
        if how == "zeros": bad[at:at + 300] = bytes(len(bad[at:at + 300]))
        if how == "lose": del bad[at:at + rng.choice([1, 512, 1024])]
        if how == "insert": bad[at:at] = rng.randbytes(rng.choice([1, 512]))
        (tmp_path/"bad.tar").write_bytes(bad)
        store = Store(tmp_path/f"s{n}")
        try: import_runs(tmp_path/"bad.tar", store)
        except RefcommError: refusals += 1; assert untouched(store)
        else: assert {r.key: r.rows for r in store.survey()[0]} == known
        shutil.rmtree(store.root)
    assert refusals > 90

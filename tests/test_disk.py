"Files are whole or not there: odd names, planted links, failures of every call to the system."
import builtins
import contextlib
import errno
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from refcomm import files
from refcomm.core import StoreError
from refcomm.papers.eqc.run import EQCSpec
from refcomm.runs.store import RunResult, Store, provenance

RESULT = RunResult([dict(accuracy=.5)], dict(best_epoch=0), dict(epoch=[0], loss=[.5]), dict(messages=torch.arange(6)))


def test_two_processes_of_equal_id_do_not_publish_each_others_half(tmp_path, monkeypatch):
    "Two containers on one shared folder are both process 1."
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path/"x.txt"
    with files.write_atomic(path) as second:
        with files.write_atomic(path) as first:
            first.write_text("whole")
            second.write_text("ha")
        assert path.read_text() == "whole"
        second.write_text("half and half")
    assert path.read_text() == "half and half" and os.listdir(tmp_path) == ["x.txt"]


def planted(tmp_path, monkeypatch, token="0"*16):
    "A link that waits where the temporary file will be."
    monkeypatch.setattr("secrets.token_hex", lambda n=None: token)
    victim = tmp_path/"victim"
    victim.write_text("mine")
    for name in (f".x.txt.{os.getpid()}.tmp", f".x.txt.{token}.tmp"): (tmp_path/name).symlink_to(victim)
    return victim


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = planted(tmp_path, monkeypatch)
    with pytest.raises(StoreError, match="cannot write .*x.txt"), files.write_atomic(tmp_path/"x.txt") as tmp:
        tmp.write_text("others'")
    assert victim.read_text() == "mine" and not (tmp_path/"x.txt").exists()


def test_a_link_put_in_the_temporary_files_place_is_not_published(tmp_path):
    (tmp_path/"victim").write_text("mine")
    with pytest.raises(StoreError), files.write_atomic(tmp_path/"x.txt") as tmp:
        tmp.unlink(missing_ok=True); tmp.symlink_to(tmp_path/"victim")
    assert sorted(os.listdir(tmp_path)) == ["victim"]


def test_names_as_long_as_the_file_system_allows(tmp_path):
    for name in ("x"*255, "é"*127):
        with files.write_atomic(tmp_path/name) as tmp: tmp.write_text("whole")
        assert (tmp_path/name).read_text() == "whole"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_that_forces_no_folders_is_no_error(home, tmp_path, monkeypatch, code):
    real = os.fsync

    def fsync(fd):
        if Path(f"/proc/self/fd/{fd}").resolve().is_dir(): raise OSError(code, os.strerror(code))
        real(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    with files.write_atomic(tmp_path/"deep"/"x.txt") as tmp: tmp.write_text("whole")
    assert Store().put(EQCSpec(), RESULT, provenance("cpu", 1, 1)).rows == RESULT.rows


def test_a_folder_that_is_new_is_forced_too(tmp_path, monkeypatch):
    forced, real = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (forced.add(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    with files.write_atomic(tmp_path/"a"/"b"/"x.txt") as tmp: tmp.write_text("whole")
    assert {str(tmp_path), str(tmp_path/"a"), str(tmp_path/"a"/"b")} <= forced


@contextlib.contextmanager
def nth_call_fails(monkeypatch, n, code):
    "The n-th call to the system that may change the disk fails; says how many there were."
    counted, real_open = [0], builtins.open

    def count(what):
        counted[0] += 1
        if counted[0] == n: raise OSError(code, os.strerror(code), what)

    def wrap(fn, name): return lambda *a, **k: (count(name), fn(*a, **k))[1]

    def opened(file, mode="r", *a, **k):
        f = real_open(file, mode, *a, **k)
        if not set(mode) & set("wax+"): return f
        count("open")
        class Writer:
            def __getattr__(self, name): return getattr(f, name)
            def __enter__(self): return self
            def __exit__(self, *e): f.close()
            def write(self, data):
                f.write(data[:len(data)//2]); count("write"); f.write(data[len(data)//2:])
                return len(data)
        return Writer()
    with monkeypatch.context() as m:
        for name in ("fsync", "replace", "rename", "mkdir", "open", "close", "link"):
            real = getattr(os, name)
            if name == "close":
                def close(fd, real=real):
                    real(fd); count("close")
                m.setattr(os, name, close)
            else: m.setattr(os, name, wrap(real, name))
        m.setattr(builtins, "open", opened)
        m.setattr("io.open", opened)
        yield counted


def whole(path, *allowed): return (path.read_text() if path.exists() else None) in allowed


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_each_call_to_the_system_may_fail_while_a_file_is_written(tmp_path, monkeypatch, code):
    n, failures = 0, 0
    while True:
        n += 1
        shutil.rmtree(tmp_path/"d", ignore_errors=True)
        path = tmp_path/"d"/"x.txt"
        if n % 2: path.parent.mkdir(); path.write_text("old")
        with nth_call_fails(monkeypatch, n, code) as counted:
            try:
                with files.write_atomic(path) as tmp, open(tmp, "w") as f: f.write("a new text")
                failed = False
            except StoreError: failed = True
        assert whole(path, "a new text", *(["old"] if n % 2 else [None])), n
        if not failed: assert path.read_text() == "a new text"
        if path.parent.exists():
            assert set(os.listdir(path.parent)) <= {"x.txt"}, f"the {n}th call left something behind"
        failures += failed
        if counted[0] < n: break
    assert failures >= 5


def test_each_call_to_the_system_may_fail_while_a_record_is_written(home, monkeypatch):
    "Whatever call fails, the record is whole or absent, nothing is left over, and the next attempt succeeds."
    spec, n, failures = EQCSpec(), 0, 0
    while True:
        n += 1
        shutil.rmtree(home, ignore_errors=True)
        with nth_call_fails(monkeypatch, n, errno.EIO) as counted:
            try: Store().put(spec, RESULT, provenance("cpu", 1, 1)); failed = False
            except StoreError: failed = True
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = Store().get(spec)
        assert found is None or found.rows == RESULT.rows
        assert failed or found
        assert not list(home.glob("runs/tmp/*")), f"the {n}th call left something behind"
        assert Store().put(spec, RESULT, provenance("cpu", 1, 1)).rows == RESULT.rows
        failures += failed
        if counted[0] < n: break
    assert failures >= 10


def test_a_cached_tensor_of_another_name_is_not_believed(home):
    first, other = (files.cached_tensor(home/"cache"/name, lambda n=n: torch.full((3,), n), "numbers")
        for n, name in ((1., "a.safetensors"), (2., "b.safetensors")))
    shutil.copy(home/"cache"/"b.safetensors", home/"cache"/"a.safetensors")
    with pytest.warns(UserWarning, match="are damaged: set aside"):
        assert torch.equal(files.cached_tensor(home/"cache"/"a.safetensors", lambda: first, "numbers"), first)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_a_caches_place_is_not_waited_for(home):
    (home/"cache").mkdir(parents=True)
    os.mkfifo(home/"cache"/"a.safetensors")
    with pytest.warns(UserWarning, match="set aside"):
        assert files.cached_tensor(home/"cache"/"a.safetensors", lambda: torch.ones(3), "numbers").tolist() == [1, 1, 1]

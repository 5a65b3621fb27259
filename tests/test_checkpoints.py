"Checkpoints are as trustworthy as records, and a signal costs nothing."
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from conftest import start

from refcomm.training.ensemble import Ensemble
from refcomm.papers.eqc.run import EQCSpec
from refcomm.files import load_checkpoint, save_checkpoint
from refcomm.papers.eqc.items import SMALL
from refcomm.runs.execute import execute, write_plan
from refcomm.runs.store import Store
from refcomm.training.loop import TrainSettings, fit

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
LONG = {**SMALL["object"], "lr": 1e-3, "word_length": 20, "epochs": 5000, "patience": 5000}


class Cut(Exception): pass


def train(path=None, cut=None, seeds=(0, 1), settings=TrainSettings(epochs=4, batch_size=8, lr=.01), device="cpu"):
    "Two small networks that see noise; `cut` steps are made, all when None."
    from refcomm.core import seeded_init
    members = []
    for s in seeds:
        with seeded_init(s): members.append(torch.nn.Linear(4, 2))
    e, steps, x = Ensemble(members).to(device), iter(range(cut if cut is not None else 10**6)), X.to(device)
    def loss(i, gs):
        if next(steps, None) is None: raise Cut
        noise = torch.stack([torch.rand(i.shape[1], generator=g, device=device) for g in gs])
        return e.map(lambda m, x, n: ((m(x)[:, 0] - x[:, 0] + n)**2).mean(), x[i], noise)
    def validate():
        return dict(accuracy=e.map(lambda m: -m.weight.abs().sum()).detach(),
            loss=e.map(lambda m: m.bias.sum()).detach())
    fitted = fit(e, loss, validate, 64, settings, list(seeds), device, path, 0, lambda *_: None)
    return fitted.history.drop(columns="seconds"), [p.detach().clone() for p in e.parameters()]


@pytest.fixture
def half(tmp_path):
    "A checkpoint from the middle of the third epoch, and what an undisturbed training leaves."
    path, whole = tmp_path/"training.safetensors", train()
    with pytest.raises(Cut): train(path, cut=20)
    assert load_checkpoint(path)[1]["epoch"] == 2
    return path, whole


def same(a, b): return a[0].equals(b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1]))


def test_a_sound_checkpoint_is_continued(half):
    path, whole = half
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(train(path), whole)


def begun_anew(path, whole):
    "One warning names the file, which is set aside; the numbers are those of an undisturbed training."
    bad = path.read_bytes() if path.is_file() else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = train(path)
    said = [str(w.message) for w in said if "checkpoint" in str(w.message)]
    assert same(found, whole), "other numbers"
    assert len(said) == 1 and str(path) in said[0] and "training starts again" in said[0], said
    aside, = path.parent.glob("*.unreadable-*")
    assert aside.is_dir() or aside.read_bytes() == bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(train(path), whole), "the next try finds a sound one"
    return said[0]


def test_no_flipped_bit_is_believed(half):
    path, whole = half
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        flipped = bytearray(data)
        flipped[rng.randrange(8, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = load_checkpoint(path)
        assert found is None and len(said) == 1
        for aside in path.parent.glob("*.unreadable-*"): aside.unlink()
    path.write_bytes(flipped)
    begun_anew(path, whole)


@pytest.mark.parametrize("how", ["cut", "a zeroed block", "empty", "a folder", "a loop", "deeply nested"])
def test_a_damaged_checkpoint_is_set_aside(half, how):
    path, whole = half
    data = path.read_bytes()
    path.unlink()
    if how == "cut": path.write_bytes(data[:-100])
    if how == "a zeroed block": path.write_bytes(data[:-600] + bytes(512) + data[-88:])
    if how == "empty": path.write_bytes(b"")
    if how == "a folder": path.mkdir()
    if how == "a loop": path.symlink_to(path)
    if how == "deeply nested":
        from safetensors.torch import save_file
        save_file({"x": torch.zeros(1)}, path, {"meta": "["*100_000})
    if how == "a loop":
        with pytest.warns(UserWarning, match="cannot be continued"): assert same(train(path), whole)
    else: begun_anew(path, whole)


def rewrite(path, change, raw=False):
    "A checkpoint of the same training, changed; with a digest made anew, unless it is to be left as it was."
    from safetensors.torch import save_file
    from safetensors import safe_open
    with safe_open(path, "pt") as f: about = f.metadata()
    tensors, meta = load_checkpoint(path)
    change(tensors, meta)
    if raw: save_file(tensors, path, {**about, "meta": json.dumps(meta)})
    else: save_checkpoint(path, tensors, meta)


EDITS = {
    "a zeroed Adam moment": lambda t, m: t["optimizer.0.exp_avg_sq"].zero_(),
    "an edited history": lambda t, m: m["history"][0].update(accuracy=.99),
    "another epoch": lambda t, m: m.update(epoch=1, history=m["history"][:2]),
    "another rate": lambda t, m: m["groups"][0].update(lr=.5),
    "other weights": lambda t, m: t["model.weight"].mul_(1.0001),
    "an exponent's bit": lambda t, m: t["model.weight"].view(torch.int32)[0, 0, 0].bitwise_xor_(1 << 30),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_is_noticed(half, kind):
    path, whole = half
    rewrite(path, EDITS[kind], raw=True)
    assert "it does not hold what was written" in begun_anew(path, whole)


FORGED = {
    "a missing tensor": (lambda t, m: t.pop("model.weight"), "it has no model.weight"),
    "no generator": (lambda t, m: t.pop("noise_generators.1"), "it has no noise_generators.1"),
    "a generator of another length": (lambda t, m: t.update({"noise_generators.0": torch.zeros(16, dtype=torch.uint8)}),
    "noise_generators.0 is torch.uint8 \\[16\\]"),
    "a generator's state that is none": (lambda t, m: t["noise_generators.0"].fill_(255), "RuntimeError"),
    "other shapes": (lambda t, m: t.update({"model.weight": torch.zeros(2, 3, 4)}), "its model.weight is"),
    "an epoch too many": (lambda t, m: m.update(epoch=99), "do not fit each other"),
    "no history": (lambda t, m: m.update(history=[]), "do not fit each other"),
    "no scaler": (lambda t, m: m.pop("scaler"), "its scaler is missing"),
    "an order out of range": (lambda t, m: t["order"].add_(1000), "its order of items"),
    "another's": (lambda t, m: m["shape"].update(owner="other"), "it belongs to another model, data or setting: owner"),
    "no shape": (lambda t, m: m.pop("shape"), "does not name its model"),
    "part of a moment": (lambda t, m: t.pop("optimizer.1.exp_avg"), "its optimiser's state is incomplete"),
    "a moment of another shape": (lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(7)}),
    "does not fit the parameters"),
    "groups fewer": (lambda t, m: m.update(groups=[]), "other groups"),
    "meta that is a list": (lambda t, m: m.clear(), "does not name its model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORGED)
def test_what_cannot_be_loaded_is_one_warning_and_a_fresh_start(half, kind):
    import re
    path, whole = half
    rewrite(path, FORGED[kind][0])
    said = begun_anew(path, whole)
    assert re.search(FORGED[kind][1], said), said


def test_a_state_of_another_kind_of_device_is_continued_and_said(half):
    "As a GPU's: 16 bytes are a generator's whole state."
    path, whole = half
    def on_a_gpu(t, m):
        m["device"] = "cuda"
        for i in (0, 1): t[f"noise_generators.{i}"] = torch.zeros(16, dtype=torch.uint8)
    rewrite(path, on_a_gpu)
    kept = path.read_bytes()
    with pytest.warns(UserWarning, match="begun on cuda continues on cpu: noise is drawn anew"): found = train(path)
    assert (found[0].epoch.tolist() == whole[0].epoch.tolist()
        and found[0][:4].equals(whole[0][:4])), "what was learnt is kept"
    assert not same(found, whole)
    path.write_bytes(kept)
    with pytest.warns(UserWarning, match="begun on cuda"):
        assert same(train(path), found), "the new noise depends on seed and step alone"


def test_a_cpus_state_goes_on_on_a_gpu(half):
    "The other way round, on a GPU that is pretended."
    from pretend_gpu import PretendGPU
    path, whole = half
    with PretendGPU(), pytest.warns(UserWarning, match="begun on cpu continues on cuda: noise is drawn anew"):
        history, _ = train(path, device="cuda")
        assert load_checkpoint(path)[1]["device"] == "cuda"
    assert (history.epoch.tolist() == whole[0].epoch.tolist()
        and history[:4].equals(whole[0][:4])), "what was learnt is kept"
    assert not history.equals(whole[0])


def test_a_checkpoint_says_its_device(half): assert load_checkpoint(half[0])[1]["device"] == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[]", "[", "null", '[{"seed": 9}]', '[{"sed": 0}]', '{"a": 1}', "["*100_000,
    '[{"seed": 0}, {"seed": 0}]'], ids=lambda t: t[:16])
def test_a_list_of_members_that_is_none_is_one_warning_and_a_fresh_start(home, small, monkeypatch, text):
    specs = [small(seed=s, epochs=1) for s in (0, 1)]
    def cut(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Store, "put", cut)
        with pytest.raises(KeyboardInterrupt): execute(specs)
    folder, = Store().root.glob("unfinished/*")
    (folder/"members.json").write_text(text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        records = execute(specs)
    assert [r.spec["seed"] for r in records] == [0, 1] and [r.provenance["trained_together"] for r in records] == [2, 2]
    said = [str(w.message) for w in said if "unfinished training" in str(w.message)]
    assert len(said) == 1 and str(folder) in said[0] and "set-aside" in said[0]
    assert not list(Store().root.glob("unfinished/*")) and len(list(Store().root.glob("set-aside/*"))) == 1


def test_a_list_of_members_that_was_edited_is_not_believed(home, small):
    "Its own sealed form, an older plain list, and a member that was taken out."
    from refcomm.runs.execute import _members, _unfinished
    specs = [small(seed=s) for s in (0, 1)]
    folder = _unfinished(Store(), specs)
    assert _members(Store(), folder, specs, specs) == specs == _members(Store(), folder, specs, specs[:1])
    written = json.loads((folder/"members.json").read_text("utf-8"))
    (folder/"members.json").write_text(json.dumps(written["members"]), encoding="utf-8")
    assert _members(Store(), folder, specs, specs[:1]) == specs
    (folder/"members.json").write_text(json.dumps({**written, "members": written["members"][:1]}), encoding="utf-8")
    with pytest.warns(UserWarning, match="does not hold what was written"):
        assert _members(Store(), folder, specs, specs[:1]) == specs[:1]


def test_a_checkpoint_of_other_runs_is_not_continued(home, small, monkeypatch):
    "Of the same shape and seeds: copied by hand from one unfinished folder to another."
    def cut(*a): raise KeyboardInterrupt
    specs = [small(epochs=2, n_train=150, split_seed=s) for s in (0, 1)]
    calm = execute(specs[:1], store=Store(home/"calm"))
    with monkeypatch.context() as m:
        m.setattr(Store, "put", cut)
        for s in specs:
            with pytest.raises(KeyboardInterrupt): execute([s])
    from refcomm.runs.execute import _unfinished
    one, other = [_unfinished(Store(), [s])/"training.safetensors" for s in specs]
    shutil.copy(other, one)
    with pytest.warns(UserWarning, match="belongs to another model, data or setting: owner"):
        record, = execute(specs[:1])
    assert record.history().loss.equals(calm[0].history().loss)


def interrupted_at(n, path, settings):
    "Train until the `n`th line of the training loop or of the optimiser, where a signal comes; what was trained, None if it was stopped."
    from refcomm.core import Interrupted
    from refcomm.interrupts import Interruptible
    passed = 0
    def line(frame, event, arg):
        nonlocal passed
        passed += event == "line"
        if event == "line" and passed == n: signal.raise_signal(signal.SIGINT)
        return line
    watched = ("training/loop.py", "schedulefree/")
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background job ignores it
    sys.settrace(lambda frame, event, arg: line if any(w in frame.f_code.co_filename for w in watched) else None)
    try:
        with Interruptible(): found = train(path, settings=settings)
    except Interrupted: found = None
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)
    return found, passed


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "schedulefree"])
def test_a_signal_at_any_line_changes_no_number(tmp_path, optimizer):
    "The state is kept as a whole: no half of the weights swapped, no epoch with an order of items drawn twice."
    settings = TrainSettings(epochs=3, batch_size=16, lr=.01, optimizer=optimizer)
    whole, n_lines = interrupted_at(0, tmp_path/"whole", settings)
    stopped = 0
    for n in sorted(random.Random(0).sample(range(n_lines), 25)):
        found, _ = interrupted_at(n, tmp_path/str(n), settings)
        stopped += found is None
        assert same(found or train(tmp_path/str(n), settings=settings), whole), f"line {n} of {n_lines}"
    assert stopped > 15


def test_a_long_epoch_is_kept_after_a_few_seconds(tmp_path, monkeypatch):
    "A checkpoint a minute, but the first one at once."
    monkeypatch.setattr("refcomm.training.loop.FIRST", .3)
    e, seen = Ensemble([torch.nn.Linear(1, 1)]), []
    def loss(i, g):
        time.sleep(.1)
        seen.append((tmp_path/"c").exists())
        return e.map(lambda m: m.weight.sum())
    fit(e, loss, lambda: dict(accuracy=torch.ones(1), loss=torch.ones(1)), 12, TrainSettings(epochs=1, batch_size=1),
        [0], "cpu", tmp_path/"c", 60., lambda *_: None)
    assert 2 <= seen.index(True) <= 8


def wait_for(what, p=None, seconds=400):
    deadline = time.time() + seconds
    while not (found := what()):
        assert p is None or p.poll() is None, p.stderr.read()
        assert time.time() < deadline, "waited in vain"
        time.sleep(.05)
    return found


def unfinished(): return [f for f in Store().root.glob("unfinished/*/training.safetensors")]


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


def children(pid):
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task/"children").read_text().split()]


def drive(specs, folder, *args, **options):
    "Execute runs in a process of its own."
    write_plan(specs, folder/"plan.json")
    return start("runs", "execute", folder/"plan.json", "--device", "cpu", *args, **options)


def long(n=1): return [EQCSpec(**{**LONG, "word_length": w}) for w in (10, 20, 25)[:n]]


signals = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@signals
def test_a_signal_keeps_what_was_learnt(home, tmp_path, signum):
    "The state is that of the last step, not of up to a minute before."
    begun = home/"begun"
    p = drive(long(), tmp_path, arrange=("told", begun))
    wait_for(begun.exists, p)
    sent = time.time()
    p.send_signal(signum)
    assert p.wait(30) == 128 + signum and time.time() - sent < 20
    said = [line for line in p.stderr.read().splitlines() if "refcomm" in line]
    assert (len(said) == 1 and f"stopped by {signum.name}: 0 of 1 runs are in" in said[0]
        and "1 unfinished training has a checkpoint there; the same command continues" in said[0]), said
    state, = unfinished()
    assert load_checkpoint(state)[1]["epoch"] >= 3


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize("signum, whom", [(signal.SIGINT, "driver"), (signal.SIGTERM, "all")],
    ids=lambda x: getattr(x, "name", x))
def test_a_signal_to_a_driver_with_two_workers(home, tmp_path, signum, whom):
    "It ends within seconds, its workers with it; both trainings are kept, and what waits is not begun."
    p = drive(long(3), tmp_path, "--jobs", "2", REFCOMM_CHECKPOINT_SECONDS="4")
    wait_for(lambda: len(unfinished()) == 2, p)
    workers, sent = children(p.pid), time.time()
    if whom == "driver": p.send_signal(signum)
    else: os.killpg(p.pid, signum)
    assert p.wait(60) == 128 + signum and time.time() - sent < 20
    err = p.stderr.read()
    said = [line for line in err.splitlines() if "refcomm:" in line]
    assert (len(said) == 1 and "0 of 3 runs are in" in said[0] and "2 unfinished trainings have a checkpoint" in said[0]
        and "Traceback" not in err), err
    wait_for(lambda: not any(map(alive, workers)), seconds=10) # Python's own tracker of resources ends just after the driver
    assert len(unfinished()) == len(list(Store().root.glob("unfinished/*"))) == 2
    assert all(f.stat().st_mtime >= sent - .01 and load_checkpoint(f) for f in unfinished()), "saved when told to stop"
    assert not list(Store().root.glob("tmp/*"))


@pytest.mark.slow
def test_interrupted_and_continued_is_undisturbed(home, tmp_path):
    spec = EQCSpec(**{**LONG, "epochs": 150})
    p = drive([spec], tmp_path, REFCOMM_HOME=str(tmp_path/"calm"))
    assert p.wait() == 0, p.stderr.read()
    calm, stops = Store(tmp_path/"calm"/"runs").get(spec), 0
    for n in range(2):
        p = drive([spec], tmp_path)
        wait_for(lambda: p.poll() is not None or list(Store().root.glob("unfinished/*/members.json")), p)
        time.sleep(.7)
        p.send_signal(random.Random(n).choice([signal.SIGTERM, signal.SIGINT]))
        p.wait()
        stops += "the same command continues" in p.stderr.read()
    p = drive([spec], tmp_path)
    assert p.wait() == 0, p.stderr.read()
    again = Store().get(spec)
    assert (stops >= 1 and again.rows == calm.rows
        and again.history().drop(columns="seconds").equals(calm.history().drop(columns="seconds")))


@pytest.mark.slow
@pytest.mark.parametrize("items", [["eqc/table5"], ["eqc/table5", "eqc/table6"]], ids=["started", "forked"])
def test_a_notebook_that_trains_is_stopped_too(home, tmp_path, items):
    "`refcomm reproduce` tells the kernel, which keeps the state, and no kernel is left."
    p = start("reproduce", *items, "--profile", "cpu", "--jobs", "1", REFCOMM_CHECKPOINT_SECONDS="2",
        REFCOMM_FIGURES=str(tmp_path/"figures"), REFCOMM_PROGRESS="off")
    wait_for(unfinished, p)
    kernels, sent = children(p.pid), time.time()
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 128 + signal.SIGTERM and time.time() - sent < 30
    err = p.stderr.read()
    said = [line for line in err.splitlines() if line.startswith("refcomm:")]
    assert (len(said) == 1 and "stopped by SIGTERM in eqc/table5: " in said[0]
        and "the same command continues" in said[0]), err
    wait_for(lambda: not any(map(alive, kernels)), seconds=10)
    assert kernels and unfinished()[0].stat().st_mtime >= sent - .01


@pytest.mark.slow
def test_no_forked_kernel_outlives_its_driver(home, tmp_path):
    "Killed, the driver cannot tell its kernels: the server and they notice."
    p = start("reproduce", "eqc/table5", "eqc/table6", "--jobs", "1", REFCOMM_CHECKPOINT_SECONDS="2",
        REFCOMM_FIGURES=str(tmp_path/"figures"), REFCOMM_PROGRESS="off")
    wait_for(unfinished, p)
    started = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
    p.kill()
    wait_for(lambda: not any(map(alive, started)), seconds=10)
    assert len(started) >= 3, "a tracker of resources, the server and a kernel"

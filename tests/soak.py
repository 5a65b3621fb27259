"""Kill, damage, compete: what tests/test_runs.py does in small, for some twenty minutes.

`make soak` writes tests/soak.md, and fails if anything was lost, made twice, or read although it was damaged.

A reproduction is a plan of long runs and then two notebooks. It is killed and told to stop at random until that has
happened often enough, and continued each time, sometimes after its files were damaged. The result must equal, bit by
bit, that of an undisturbed one. Then stored records, checkpoints, lists of members, caches, recipes, plans and archives
are damaged in many ways, each of which must be noticed, and two and four drivers work on one store."""
import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path

from damage import BYTES, change_leaf, damaged, mutated as changed, not_a_number, repeat_key, subjects

LOG = os.environ.get("SOAK_LOG") # drivers and their workers write here what they begin and what they store


def log(what, *words):
    with open(LOG, "a") as f: f.write(" ".join([what, *map(str, words)]) + "\n")


if LOG: # this file is also the drivers' main module, which their workers import, too
    from refcomm.runs import execute as runs
    from refcomm.runs import store

    members, put = runs._members, store.Store.put

    def begin(store, folder, specs, missing):
        log("resume" if (folder/"training.safetensors").exists() else "begin", folder.name)
        return members(store, folder, specs, missing)

    def keep(self, spec, result, origin, *weights):
        record = put(self, spec, result, origin, *weights)
        log("store", record.key)
        return record

    runs._members, store.Store.put = begin, keep

ITEMS = ("eqc/table5", "patch/figure9")


def specs(share=1.):
    "Seven stacks of all four papers at smoke's sizes, `share` of about half a minute each on a core."
    from refcomm.papers.eqc import items as eqc
    from refcomm.papers.iac import items as iac
    from refcomm.papers.patch import items as patch
    from refcomm.papers.sms import items as sms
    n = lambda epochs: max(1, round(share*epochs))
    longer = lambda specs, epochs, **fields: [dataclasses.replace(s, epochs=n(epochs), **fields) for s in specs]
    return [*longer(eqc.configure("CN-Inst", "smoke", seeds=(0, 1)), 1200, patience=1200),
        *longer(eqc.configure("GS-RNN", "smoke", seeds=(0, 1)), 450, patience=450),
            *longer(sms.grid("figure2", "smoke", 2)[2:], 1200), *longer(iac.grid("figure3", "smoke"), 40),
            *longer(iac.grid("table1", "smoke")[:1], 30),
            *longer(patch.grid("figure3", "smoke"), 8), *longer(patch.grid("table1", "smoke")[:1], 18)]


class Place:
    "A folder with its own store, figures, log and drivers."
    every = []

    def __init__(self, root, name, plan):
        from refcomm.runs.store import Store
        self.root, self.plan, self.mark = root/name, plan, uuid.uuid4().hex
        self.every.append(self)
        self.root.mkdir()
        self.log, self.home, self.store = self.root/"log", self.root/"home", Store(self.root/"home"/"runs")
        self.log.touch()
        self.env = {**os.environ, "REFCOMM_HOME": str(self.home), "REFCOMM_CHECKPOINT_SECONDS": "2",
            "REFCOMM_PROGRESS": "off", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1",
                    "SOAK_LOG": str(self.log), "SOAK_MARK": self.mark, "CUDA_VISIBLE_DEVICES": ""}
        self.env.pop("REFCOMM_DATA", None); self.env.pop("REFCOMM_EXECUTOR", None)

    def start(self, notebooks=True):
        return self.run(__file__, "drive", str(self.plan), *(ITEMS if notebooks else ()))

    def command(self, *args): return self.run("-c", "from refcomm.cli import main; main()", *map(str, args))

    def run(self, *args):
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell starts what runs in its background deaf to it
        return subprocess.Popen([sys.executable, *args], env=self.env, stdout=subprocess.DEVNULL,
            stderr=open(self.root/"stderr", "a"), start_new_session=True, preexec_fn=heard)

    def said(self): return (self.root/"stderr").read_text(errors="replace") if (self.root/"stderr").exists() else ""

    def processes(self): # pid → command line
        "All that a driver of this place has started, kernels and workers included."
        found = {}
        for p in Path("/proc").glob("[0-9]*"):
            try:
                if f"SOAK_MARK={self.mark}".encode() in (p/"environ").read_bytes():
                    found[int(p.name)] = (p/"cmdline").read_bytes().decode().replace("\0", " ")
            except OSError: pass
        return found

    def wait_for_work(self, driver):
        "Until a checkpoint or a record has been written, or a notebook is being executed: however slow the machine is, most kills shall cost something."
        begun, stored = time.time(), len(self.events("store"))
        def written():
            for p in self.store.root.glob("unfinished/*/training.safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    if p.stat().st_mtime > begun: return True
            return len(self.events("store")) > stored or any("ipykernel" in line for line in self.processes().values())
        while driver.poll() is None and not written(): time.sleep(.1)

    def events(self, what):
        return [line.split()[1] for line in self.log.read_text().splitlines() if line.startswith(what + " ")]

    def ended(self):
        "Nothing of it runs any more."
        deadline = time.time() + 60
        while self.processes() and time.time() < deadline: time.sleep(.2)
        check(not self.processes(), f"{self.root.name}: processes outlived their driver by a minute")


def drive(plan, items):
    "One reproduction, as a user would type it."
    from refcomm import cli
    try:
        code = cli.app(["runs", "execute", plan, "--jobs", "2", "--device", "cpu"], standalone_mode=False)
        if items and not code:
            code = cli.app(["reproduce", *items, "--profile", "smoke", "--jobs", "2"], standalone_mode=False)
        sys.exit(code or 0)
    except cli.RefcommError as e: sys.exit(f"refcomm: {e}")
    except KeyboardInterrupt: sys.exit(128 + signal.SIGINT) # between two works


def remember(item, times):
    "One driver that makes an item again and again: what it takes of the memory goes into the log."
    import psutil
    from refcomm import cli
    for _ in range(int(times)):
        code = cli.app(["reproduce", item, "--profile", "smoke", "--jobs", "1", "--force"], standalone_mode=False)
        if code: sys.exit(code)
        log("memory", psutil.Process().memory_info().rss / 2**20)


failures = []


def check(holds, what):
    if not holds: failures.append(what); print("FAILED:", what, flush=True)
    return holds


def kill(pid):
    try: os.kill(pid, signal.SIGKILL); return True
    except ProcessLookupError: return False


def strike(place, driver, rng): # the signal, what got it; None where nothing was left to stop
    "Kill −9 (the driver alone, with all its processes, or one worker), or SIGTERM and SIGINT to the driver or to its process group."
    how, found = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)), place.processes()
    if how == signal.SIGKILL:
        what = rng.choice(("driver", "driver and all its processes", "worker"))
        workers = [pid for pid, line in found.items() if "forkserver" in line]
        if what == "worker" and not workers: what = "driver"
        pids = {"driver": [driver.pid], "driver and all its processes": list(found), "worker": [rng.choice(workers)]
            if what == "worker" else []}[what]
        return (how, what) if any([kill(pid) for pid in pids]) else None
    what = rng.choice(("driver", "its process group"))
    kill = os.kill if what == "driver" else os.killpg
    try: kill(driver.pid, how)
    except ProcessLookupError: return None
    return how, what


def told_to_stop(place, driver, how, before): # whether it said what is kept
    "A driver that got SIGTERM or SIGINT ends within seconds, in one line, with its processes."
    try: driver.wait(60)
    except subprocess.TimeoutExpired:
        check(False, f"{place.root.name}: {how.name} did not stop the driver within a minute")
        kill(driver.pid)
        driver.wait()
    lines = [line for line in place.said()[before:].splitlines() if line.startswith("refcomm: stopped by ")]
    check(driver.returncode in (128 + how, -how, 0),
        f"{place.root.name}: exit {driver.returncode} after {how.name}: {place.said()[before:][-600:]}")
    check(len(lines) <= 1 and all("the same command continues" in line for line in lines),
        f"{place.root.name}: {lines}")
    return bool(lines)


def spoil(place, rng): # what was damaged; None where nothing is left
    "Damage one thing that a stopped driver has left: a checkpoint, or the list of its members."
    left = [f for f in place.store.root.glob("unfinished/*/*") if f.name in ("training.safetensors", "members.json")]
    if not left: return None
    path, kind = rng.choice(left), rng.choice(sorted(BYTES))
    path.write_bytes(changed(rng, kind, path.read_bytes()))
    return path.name


def disturbed(root, plan, n_stops, rng):
    "Reproductions that are stopped: places, and what was done to them."
    places, done = [], collections.Counter()
    while done["stops"] < n_stops:
        place = Place(root, f"disturbed-{len(places)}", plan)
        places.append(place)
        while True:
            driver, before, struck = place.start(), len(place.said()), None
            try:
                if done["stops"] < n_stops:
                    if rng.random() < .8: place.wait_for_work(driver)
                    driver.wait(rng.uniform(0, 12))
                else: driver.wait()
            except subprocess.TimeoutExpired:
                if struck := strike(place, driver, rng):
                    how, what = struck
                    done["stops"] += 1
                    done[f"{how.name} to {what}"] += 1
                    if how != signal.SIGKILL: done["said"] += told_to_stop(place, driver, how, before)
                    done["left"] += bool(list(place.store.root.glob("unfinished/*/training.safetensors")))
                driver.wait()
                print(f"stop {done['stops']}: {struck and f'{struck[0].name} to {struck[1]}'}; "
                    f"{len(place.store.keys())} records, exit {driver.returncode}",
                    flush=True)
                if driver.returncode:
                    if rng.random() < .3:
                        place.ended()
                        if hit := spoil(place, rng): done["spoilt"] += 1; done[f"spoilt {hit}"] += 1
                    continue
            if check(driver.returncode == 0,
                f"{place.root.name}: the driver ended with {driver.returncode}: {place.said()[-600:]}"):
                break
            raise SystemExit("a reproduction that nobody stopped has failed")
        place.ended()
        done["aside"] += len(list(place.store.root.glob("set-aside/*")))
        shutil.rmtree(place.store.root/"set-aside", ignore_errors=True)
    return places, done


def content(record):
    "All of a record but its times, part by part: the tensors' file to the byte."
    history = record.history().drop(columns="seconds").to_dict("list")
    return {**{name: json.dumps(part) for name, part in dict(experiment=record.experiment, spec=record.spec,
        rows=record.rows, summary=record.summary, history=history).items()},
        "tensors": (record.path/"tensors.safetensors").read_bytes()}


def compare(place, calm): # how many records were equal
    "Records and tables of numbers, one by one."
    check(place.store.keys() == calm.store.keys(),
        f"{place.root.name}: {len(place.store.keys())} records, undisturbed {len(calm.store.keys())}")
    equal = 0
    for k in sorted(set(calm.store.keys()) & set(place.store.keys())):
        a, b = (content(p.store.read(*k)) for p in (place, calm))
        equal += check(a == b,
            f"{place.root.name}: {'/'.join(k)} differs from the undisturbed one in {', '.join(name for name in a if a[name] != b[name])}")
    tables = lambda p: {f.name: f.read_bytes() for f in (p.home/"smoke-figures").glob("*.csv")}
    check(tables(place) == tables(calm), f"{place.root.name}: the notebooks' tables differ")
    for left in ("unfinished/*", "tmp/[!p]*", "set-aside/*"):
        check(not list(place.store.root.glob(left)), f"{place.root.name}: {left} is not empty")
    return equal


def edit(change):
    "A mutation of record.json as data; the checksum stays."
    def mutate(rng, files, other):
        raw = json.loads(files["record.json"])
        change(rng, raw)
        return {**files, "record.json": json.dumps(raw, indent=1).encode()}
    return mutate


def forged_spec(rng, raw):
    from refcomm.runs.store import digest
    raw["body"]["spec"]["seed"] += 1 + rng.randrange(1000)
    raw["sha256"] = digest(raw["body"])


def lose_record_key(rng, raw):
    node = rng.choice([raw, raw["body"], raw["body"]["spec"]])
    del node[rng.choice(list(node))]


def new_checksum(rng, raw): raw["sha256"] = f"{rng.getrandbits(256):064x}"


def on_bytes(change):
    "A mutation of one file as bytes."
    def mutate(rng, files, other):
        name = rng.choice(sorted(files))
        data = bytearray(files[name])
        change(rng, data)
        return {**files, name: bytes(data)}
    return mutate


def duplicate_key(rng, files, other):
    return {**files, "record.json": repeat_key(rng, files["record.json"].decode()).encode()}


def respace(rng, files, other):
    raw = json.loads(files["record.json"])
    return {**files, "record.json": rng.choice([json.dumps(raw), json.dumps(raw, indent=2), json.dumps(raw, indent=1)
        + "\n"]).encode()}


def nest(rng, files, other): return {**files, "record.json": b"[" * 200_000}


def recode(rng, files, other):
    return {**files, "record.json": files["record.json"].decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))}


def drop(rng, files, other):
    gone = rng.choice(sorted(files))
    return {k: v for k, v in files.items() if k != gone}


def swap_one(rng, files, other):
    name = rng.choice(sorted(set(files) & set(other)))
    return {**files, name: other[name]}


def swap_within(rng, files, other):
    a, b = rng.sample(sorted(files), 2)
    return {**files, a: files[b], b: files[a]}


def folder_for_file(rng, files, other): return {**files, rng.choice(sorted(files)): None}


MUTATIONS = {
    **{kind: on_bytes(change) for kind, change in BYTES.items()},
    "file deleted": drop, "all files deleted": lambda rng, files, other: {},
    "folder in a file's place": folder_for_file,
    "file of another run": swap_one, "all files of another run": lambda rng, files, other: dict(other),
    "two files swapped": swap_within,
    "value edited": edit(lambda rng, raw: change_leaf(rng, raw["body"])),
    "value made NaN": edit(lambda rng, raw: not_a_number(rng, raw["body"])), "key removed": edit(lose_record_key),
    "checksum edited": edit(new_checksum),
    "Spec edited, checksum made anew": edit(forged_spec), "key duplicated": duplicate_key,
    "white space changed": respace, "nested too deeply": nest, "other encoding": recode,
}
CAUGHT = {"its checksum does not match": "record's checksum", "does not match its checksum": "file's checksum",
    "is missing": "missing file", "is unreadable": "no record's JSON", "is not a record: ": "no record's form",
    "is foreign": "foreign Spec", "cannot read": "refused by the system"}


def mutated(calm, root, n, rng): # kind → how it was caught → how often
    "Damage copies of records, and look for them as a reproduction does."
    from refcomm.core import RecordError, StoreError
    from refcomm.runs.execute import load_spec
    from refcomm.runs.store import Store
    whole = {k: {f.name: f.read_bytes() for f in sorted(calm.store.path(*k).iterdir())} for k in calm.store.keys()}
    store, table = Store(root/"mutated"), collections.defaultdict(collections.Counter)
    kinds, keys = list(MUTATIONS), list(whole)
    i = 0
    while i < n:
        kind, key = kinds[i % len(kinds)], rng.choice(keys)
        other = whole[rng.choice([k for k in keys if k != key])]
        files = MUTATIONS[kind](rng, whole[key], other)
        if files == whole[key]: continue # such as zeros where zeros were
        i += 1
        path = store.path(*key)
        path.mkdir(parents=True)
        for name, data in files.items():
            if data is None: (path/name).mkdir()
            else: (path/name).write_bytes(data)
        found, said = None, ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try: found = store.get(load_spec(key[0], calm.store.read(*key).spec))
            except (RecordError, StoreError) as e: said = str(e)
        said = said or " ".join(str(w.message) for w in caught)
        how = next((short for text, short in CAUGHT.items() if text in said), "ACCEPTED" if found
            else f"UNNAMED: {said!r}")
        check(how in CAUGHT.values() and found is None, f"{kind} of {'/'.join(key)}: {how}")
        aside = list(store.root.glob("set-aside/*"))
        if how != "refused by the system":
            check(len(aside) == 1 and {f.name: None if f.is_dir() else f.read_bytes()
                for f in aside[0].iterdir()} == files, f"{kind} of {'/'.join(key)} was not set aside as it was")
        table[kind][how] += 1
        shutil.rmtree(store.root)
    return table


def two_drivers(root, plan, calm, rng):
    "Two on one store: undisturbed, and with one of them killed. Lines for the report."
    place = Place(root, "two", plan)
    both = [place.start(notebooks=False) for _ in range(2)]
    check([d.wait() for d in both] == [0, 0], "two drivers: one of them failed")
    n, stored = compare(place, calm), place.events("store")
    begun = place.events("begin") + place.events("resume")
    check(len(begun) == len(set(begun)), f"two drivers: {len(begun) - len(set(begun))} stacks were begun twice")
    check(len(stored) == len(set(stored)) == len(place.store.keys()), "two drivers: a record was written twice")
    lines = [f"Two drivers with two workers each, started at the same time on an empty store: {len(begun)} stacks "
        f"begun, {len(set(begun))} of them different; {len(stored)} records written, {n} equal to those of one driver."]
    place = Place(root, "two-and-a-kill", plan)
    both = [place.start(notebooks=False) for _ in range(2)]
    while not place.events("begin"): time.sleep(.1)
    time.sleep(rng.uniform(1, 6))
    kill(both[0].pid)
    codes = [d.wait() for d in both]
    check(codes == [-signal.SIGKILL, 0], f"two drivers, one killed: exit codes {codes}")
    place.ended()
    n, stored, again = compare(place, calm), place.events("store"), place.events("resume")
    check(len(stored) == len(set(stored)), "two drivers, one killed: a record was written twice")
    return [*lines,
        f"The same with one of them killed while it trained: the other made the rest, {len(again)} stacks from a "
        f"checkpoint of the dead one; {len(stored)} records written, {n} equal."]


def crowd(root, plan, calm, rng):
    "Four drivers, a clean again and again, and an import, on one store. A line for the report."
    from refcomm.runs.archives import export_runs
    alone = [k for k in sorted(calm.store.keys()) if calm.store.read(*k).provenance["trained_together"] == 1]
    some = rng.sample(alone, max(1, len(alone)//3)) # whole stacks: others would be trained without their neighbours
    export_runs(root/"some.tar", calm.store, some)
    place = Place(root, "crowd", plan)
    drivers = [place.start(notebooks=False) for _ in range(4)]
    imports, cleans = [place.command("runs", "import", root/"some.tar")], []
    while any(d.poll() is None for d in drivers):
        cleans.append(place.command("runs", "clean", "--yes").wait())
        time.sleep(rng.uniform(0, 2))
    codes = [p.wait() for p in (*drivers, *imports)]
    check(not any(codes) and not any(cleans),
        f"crowd: exit codes {codes}, of the cleans {set(cleans)}: {place.said()[-600:]}")
    place.ended()
    n, stored = compare(place, calm), place.events("store")
    begun = place.events("begin") + place.events("resume")
    check(len(begun) == len(set(begun)), f"crowd: {len(begun) - len(set(begun))} stacks were begun twice")
    check(len(stored) == len(set(stored)), "crowd: a record was written twice")
    return (f"Four drivers with two workers each, an import of {len(some)} runs, and a clean {len(cleans)} times in a row, "
        f"on one store: {len(begun)} stacks begun, none of them twice; {len(stored)} records written and "
        f"{len(place.store.keys()) - len(stored)} imported, {n} equal to those of one driver.")


def memory(root, plan, item, times):
    "What one driver takes while it reproduces an item again and again. A line for the report."
    place = Place(root, "memory", plan)
    check(place.run(__file__, "remember", item, str(times)).wait() == 0,
        f"memory: the driver failed: {place.said()[-600:]}")
    mib = [float(m) for m in place.events("memory")]
    early, late = mib[2:5], mib[-3:]
    check(sum(late) <= 1.05*sum(early), f"memory: {mib}")
    return (f"One driver made {item} at smoke {times} times in a row. It took {sum(early)/3:.0f} MiB after the third to "
        f"the fifth time, {sum(late)/3:.0f} MiB after the last three (allowed: 5 % more).")


def columns(table): # every way in which damage was caught, as columns of a table
    hows = list(dict.fromkeys(h for c in table.values() for h in sorted(c)))
    return ["| damaged | " + " | ".join(hows) + " |", "|---|" + "---:|"*len(hows),
        *(f"| {kind} | " + " | ".join(str(c[h] or "") for h in hows) + " |" for kind, c in table.items())]


def tracebacks(): # of drivers and whatever they started
    return sum(p.said().count("Traceback (most recent call last)") for p in Place.every)


def report(facts, table, other, lines):
    from refcomm.runs.store import package_commit
    import torch
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")), "")
    count = lambda t, *hows: sum(v for c in t.values() for h, v in c.items() if not hows or h in hows)
    done, (n, m) = facts["done"], (count(table), count(other))
    rest = ("What does not hold is under FAILED, above; " if failures
        else "So do the notebooks' tables of numbers. Nothing unfinished or half-written stays behind; ")
    what = ", ".join(f"{v} × {k}" for k, v in done.items() if " to " in k)
    return "\n".join([
        "# Soak test", "",
        f"`{facts['command']}` · commit {package_commit() or 'none'} · torch {torch.__version__} · {model}, 2 cores, "
        f"one thread per process · {facts['minutes']:.0f} minutes · seed {facts['seed']}", "",
        "Passed: nothing was lost, doubled or believed." if not failures else "FAILED:", "",
        *(f"- {f}" for f in failures),
        "## Stopped and resumed", "",
        f"A reproduction is a plan of {facts['stacks']} stacks ({facts['runs']} runs of all four papers at smoke's "
        f"sizes, trained for longer) and the notebooks {', '.join(ITEMS)} at smoke, with two workers and a checkpoint "
        f"every two seconds.",
        f"It was stopped {done['stops']} times at random moments: {what}. {done['left']} of them left a checkpoint behind. "
        f"Each SIGTERM and SIGINT ended the driver and its processes within a minute; {done['said']} of these hit "
        f"work, and one line said what is kept. After {done['spoilt']} of the stops a checkpoint or a list of "
        f"members that was left ({done['spoilt training.safetensors']} and {done['spoilt members.json']}) was damaged.",
        f"{facts['rounds']} reproduction{'s' * (facts['rounds'] > 1)} came to the end. Of the plan's trainings "
        f"{facts['begun']} were begun and {facts['resumed']} resumed from a checkpoint, for {facts['stored']} records.",
        f"{facts['equal']} of {facts['records']} records equal those of an undisturbed reproduction: Spec, rows, "
        f"summary and history (its seconds left out), tensors to the byte. {rest}set-aside/ kept {done['aside']} folders "
        f"of damaged lists, and tmp/ {facts['progress']} in which drivers that were killed watched their workers, "
        f"until `refcomm runs clean`. All processes together printed {facts['tracebacks']} tracebacks.", "",
        "## Damaged records", "",
        f"{n} damaged copies of {facts['originals']} records, looked up by their Spec: {n - count(table, *CAUGHT.values())} "
        f"accepted. What was not refused by the system was set aside as it was, with a warning. Not damage: another order "
        f"of keys, which reads the same. Not detectable: an edit whose author computes all checksums anew; they guard "
        f"against accidents.", "", *columns(table), "",
        "## Other damaged files", "",
        f"{m} damaged files of six kinds: {count(other, 'ACCEPTED')} accepted, {count(other, 'TRACEBACK')} tracebacks. "
        f"Each was read as refcomm reads it: a checkpoint by training on, a recipe by the report and by the estimate "
        f"of costs, an archive by an import. *Reads the same* is damage that changes no meaning: white space, a key twice "
        f"with the same value in the end, the padding of a file.", "", *columns(other), "",
        "## Several drivers on one store, and one for long", "", *(f"- {line}" for line in lines), ""])


def damaged_files(root, n, rng): # kind of file → what became of it → how often
    "Damage what refcomm writes besides records."
    before = {k: os.environ.get(k) for k in ("REFCOMM_HOME", "REFCOMM_FIGURES")}
    os.environ |= dict(REFCOMM_HOME=str(root), REFCOMM_FIGURES=str(root/"figures"), MPLBACKEND="agg")
    root.mkdir()
    try: table, wrong = damaged(subjects(root), n, rng)
    finally:
        for k, v in before.items():
            if v is None: os.environ.pop(k)
            else: os.environ[k] = v
    for w in wrong: check(False, w)
    return table


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=28, help="kill −9, SIGTERM and SIGINT")
    parser.add_argument("--mutations", type=int, default=1000, help="of records")
    parser.add_argument("--damages", type=int, default=1200, help="of other files")
    parser.add_argument("--times", type=int, default=12, help="that one driver makes a notebook")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1., help="of the usual training time")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser


def main(argv=None):
    o = options().parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]) # two workers share two cores: one thread each
    import torch
    from refcomm.runs.execute import make_stacks, write_plan
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *a: sys.exit("stopped"))
    start, rng, root = time.time(), random.Random(o.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    after = lambda what: print(f"{what} after {time.time() - start:.0f} s", flush=True)
    wanted, few = specs(o.share), specs(o.share/10)
    write_plan(wanted, root/"plan.json"); write_plan(few, root/"few.json")
    calm, calm_few = Place(root, "calm", root/"plan.json"), Place(root, "calm-few", root/"few.json")
    try:
        for place, notebooks in ((calm, True), (calm_few, False)):
            if place.start(notebooks).wait():
                raise SystemExit(f"the undisturbed reproduction failed: {place.said()[-2000:]}")
            after(f"undisturbed: {len(place.store.keys())} records")
        lines = two_drivers(root, root/"few.json", calm_few, rng)
        after("two drivers")
        lines.append(crowd(root, root/"few.json", calm_few, rng))
        after("four drivers")
        lines.append(memory(root, root/"few.json", ITEMS[0], o.times))
        after("memory")
        places, done = disturbed(root, root/"plan.json", o.stops, rng)
        equal = sum(compare(p, calm) for p in places)
        table = mutated(calm, root, o.mutations, rng)
        after(f"{o.mutations} damaged records")
        other = damaged_files(root/"damage", o.damages, rng)
        after(f"{o.damages} other damaged files")
        events = lambda what: sum(len(p.events(what)) for p in places)
        facts = dict(command=" ".join(["python tests/soak.py", *(sys.argv[1:] if argv is None else argv)]), seed=o.seed,
            done=done, rounds=len(places), begun=events("begin"), resumed=events("resume"), stored=events("store"),
            equal=equal, progress=sum(len(list(p.store.root.glob("tmp/progress-*"))) for p in places),
            records=len(places)*len(calm.store.keys()), originals=len(calm.store.keys()), tracebacks=tracebacks(),
            stacks=len(make_stacks(wanted, "cpu")), runs=len(wanted), minutes=(time.time() - start)/60)
        check(facts["resumed"] > 0, "no stop hit a training with a checkpoint")
        check(not facts["tracebacks"], f"{facts['tracebacks']} tracebacks")
        o.out.write_text(text := report(facts, table, other, lines), encoding="utf-8")
        print(text)
        if facts["tracebacks"]:
            print(*(p.said()[-20_000:] for p in Place.every if "Traceback" in p.said()), sep="\n---\n")
    finally:
        for pid in [pid for p in Place.every for pid in p.processes()]: kill(pid)
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]: drive(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["remember"]: remember(*sys.argv[2:])
    else: main()

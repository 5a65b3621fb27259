"""Kill, damage, compete: what tests/test_runs.py does in small, for some ten minutes. `make soak` writes tests/soak.md and fails if anything was lost, doubled or believed.

A reproduction is a plan of long runs and then two notebooks. It is killed at random until it has died often enough, and resumed each time; what it leaves must equal,
bit by bit, what an undisturbed one leaves. Then stored records are damaged in many ways, none of which may pass unnoticed, and two drivers work on one store."""
import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path

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
        self.env.pop("REFCOMM_DATA", None), self.env.pop("REFCOMM_EXECUTOR", None)

    def start(self, notebooks=True):
        command = [sys.executable, __file__, "drive", str(self.plan), *(ITEMS if notebooks else ())]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, stderr=open(self.root/"stderr", "a"),
            start_new_session=True)

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
        cli.app(["runs", "execute", plan, "--jobs", "2", "--device", "cpu"], standalone_mode=False)
        if items:
            sys.exit(cli.app(["reproduce", *items, "--profile", "smoke", "--jobs", "2"], standalone_mode=False) or 0)
    except cli.RefcommError as e: sys.exit(f"refcomm: {e}")


failures = []


def check(holds, what):
    if not holds: failures.append(what); print("FAILED:", what, flush=True)
    return holds


def kill(pid):
    try: os.kill(pid, signal.SIGKILL); return True
    except ProcessLookupError: return False


def strike(place, driver, rng): # what was killed
    "Kill −9: the driver alone, the driver with all its processes, or one worker."
    what, found = rng.choice(("driver", "driver and all its processes", "worker")), place.processes()
    workers = [pid for pid, line in found.items() if "spawn_main" in line]
    if what == "worker" and not workers: what = "driver"
    pids = {"driver": [driver.pid], "driver and all its processes": list(found), "worker": [rng.choice(workers)]
        if what == "worker" else []}[what]
    return what if any([kill(pid) for pid in pids]) else None


def disturbed(root, plan, n_kills, rng):
    "Reproductions that die: places, deaths by kind, deaths that left a checkpoint."
    places, deaths, left = [], collections.Counter(), 0
    while sum(deaths.values()) < n_kills:
        place = Place(root, f"disturbed-{len(places)}", plan)
        places.append(place)
        while True:
            driver = place.start()
            try:
                if sum(deaths.values()) < n_kills:
                    if rng.random() < .8: place.wait_for_work(driver)
                    driver.wait(rng.uniform(0, 12))
                else: driver.wait()
            except subprocess.TimeoutExpired:
                what = strike(place, driver, rng)
                if what:
                    deaths[what] += 1
                    left += bool(list(place.store.root.glob("unfinished/*/training.safetensors")))
                driver.wait()
                print(f"kill {sum(deaths.values())}: {what}; {len(place.store.keys())} records, exit {driver.returncode}",
                    flush=True)
                if driver.returncode: continue
            if check(driver.returncode == 0,
                f"{place.root.name}: the driver ended with {driver.returncode}: {(place.root/'stderr').read_text()[-600:]}"):
                break
            raise SystemExit("a reproduction that nobody killed has failed")
        place.ended()
    return places, deaths, left


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


def leaf(rng, node):
    "A random place in nested JSON: its container and its key."
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    return leaf(rng, node[key]) if isinstance(node[key], (dict, list)) and node[key] else (node, key)


def edit(change):
    "A mutation of record.json as data; the checksum stays."
    def mutate(rng, files, other):
        raw = json.loads(files["record.json"])
        change(rng, raw)
        return {**files, "record.json": json.dumps(raw, indent=1).encode()}
    return mutate


def change_leaf(rng, raw):
    node, key = leaf(rng, raw["body"])
    v = node[key]
    node[key] = not v if isinstance(v, bool) else v + 1 if isinstance(v, (int, float)) else f"{v}."


def not_a_number(rng, raw):
    node, key = leaf(rng, raw["body"])
    node[key] = float("nan")


def forged_spec(rng, raw):
    from refcomm.runs.store import digest
    raw["body"]["spec"]["seed"] += 1 + rng.randrange(1000)
    raw["sha256"] = digest(raw["body"])


def lose_key(rng, raw):
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


def stretch(rng, data, n=4096):
    at = rng.randrange(len(data))
    return slice(at, at + rng.randrange(1, n))


def flip(rng, data, n=1):
    for at in rng.sample(range(8*len(data)), n): data[at//8] ^= 1 << at % 8


def zeros(rng, data): data[s] = bytes(len(data[s := stretch(rng, data)]))


def insert(rng, data): data[(at := rng.randrange(len(data))):at] = rng.randbytes(rng.randrange(1, 64))


def lose(rng, data): del data[stretch(rng, data, 64)]


def duplicate_key(rng, files, other):
    "A key named twice: first with another value, then with its own, which is the one that Python keeps."
    text = files["record.json"].decode()
    at = rng.choice(list(re.finditer(r'"(\w+)": ', text)))
    return {**files, "record.json": (text[:at.start()] + f'"{at[1]}": {rng.choice(["0", "[]", "null"])}, '
        + text[at.start():]).encode()}


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


def swap_one(rng, files, other): return {**files, (name := rng.choice(sorted(files))): other[name]}


def swap_within(rng, files, other):
    a, b = rng.sample(sorted(files), 2)
    return {**files, a: files[b], b: files[a]}


def folder_for_file(rng, files, other): return {**files, rng.choice(sorted(files)): None}


MUTATIONS = {
    "one bit flipped": on_bytes(flip),
    "up to 64 bits flipped": on_bytes(lambda rng, data: flip(rng, data, rng.randrange(2, 65))),
    "file cut short": on_bytes(lambda rng, data: data.__delitem__(slice(rng.randrange(len(data)), None))),
    "file emptied": on_bytes(lambda rng, data: data.clear()),
    "a stretch of zeros": on_bytes(zeros), "bytes inserted": on_bytes(insert), "bytes lost": on_bytes(lose),
    "bytes appended": on_bytes(lambda rng, data: data.extend(rng.randbytes(8))),
    "file deleted": drop, "all files deleted": lambda rng, files, other: {},
    "folder in a file's place": folder_for_file,
    "file of another run": swap_one, "all files of another run": lambda rng, files, other: dict(other),
    "two files swapped": swap_within,
    "value edited": edit(change_leaf), "value made NaN": edit(not_a_number), "key removed": edit(lose_key),
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
        for name, data in files.items(): (path/name).mkdir() if data is None else (path/name).write_bytes(data)
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


def report(facts, table, lines):
    from refcomm.runs.store import package_commit
    import torch
    hows = [h for h in (*CAUGHT.values(), *sorted({h for c in table.values() for h in c} - set(CAUGHT.values())))
        if any(c[h] for c in table.values())]
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")), "")
    n = sum(sum(c.values()) for c in table.values())
    rest = ("What does not hold is under FAILED, above; " if failures
        else "So do the notebooks' tables of numbers. Nothing unfinished, half-written or set aside stays behind; ")
    accepted = sum(v for c in table.values() for h, v in c.items() if h not in CAUGHT.values())
    return "\n".join([
        "# Soak test", "",
        f"`{facts['command']}` · commit {package_commit() or 'none'} · torch {torch.__version__} · {model}, 2 cores, "
        f"one thread per process · {facts['minutes']:.0f} minutes · seed {facts['seed']}", "",
        "Passed: nothing was lost, doubled or believed." if not failures else "FAILED:", "",
        *(f"- {f}" for f in failures),
        "## Killed and resumed", "",
        f"A reproduction is a plan of {facts['stacks']} stacks ({facts['runs']} runs of all four papers at smoke's "
        f"sizes, trained for longer) and the notebooks {', '.join(ITEMS)} at smoke, with two workers and a checkpoint "
        f"every two seconds.",
        f"It got {facts['kills']} kill −9 at random moments: "
        f"{', '.join(f'{v} × {k}' for k, v in facts['deaths'].items())}; {facts['left']} of them left a checkpoint "
        f"behind.",
        f"{facts['rounds']} reproduction{'s' * (facts['rounds'] > 1)} came to the end. Of the plan's trainings "
        f"{facts['begun']} were begun and {facts['resumed']} resumed from a checkpoint, for {facts['stored']} records.",
        f"{facts['equal']} of {facts['records']} records equal those of an undisturbed reproduction: Spec, rows, "
        f"summary and history (its seconds left out), tensors to the byte. {rest}tmp/ keeps {facts['progress']} "
        f"folders in which drivers that were killed watched their workers, until `refcomm runs clean`.", "",
        "## Damaged records", "",
        f"{n} damaged copies of {facts['originals']} records, looked up by their Spec: {accepted} accepted. What was "
        f"not refused by the system was set aside as it was, with a warning. Not damage: another order of keys, which "
        f"reads the same. Not detectable: an edit whose author computes all checksums anew; they guard against "
        f"accidents.", "",
        "| damage | " + " | ".join(hows) + " |", "|---|" + "---:|"*len(hows),
        *(f"| {kind} | " + " | ".join(str(c[h] or "") for h in hows) + " |" for kind, c in table.items()), "",
        "## Two drivers on one store", "", *(f"- {line}" for line in lines), ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20); parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1., help="of the usual training time")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    o = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]) # two workers share two cores: one thread each
    from refcomm.runs.execute import make_stacks, write_plan
    signal.signal(signal.SIGTERM, lambda *a: sys.exit("stopped"))
    start, rng, root = time.time(), random.Random(o.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    wanted, few = specs(o.share), specs(o.share/10)
    write_plan(wanted, root/"plan.json"), write_plan(few, root/"few.json")
    calm, calm_few = Place(root, "calm", root/"plan.json"), Place(root, "calm-few", root/"few.json")
    try:
        for place, notebooks in ((calm, True), (calm_few, False)):
            if place.start(notebooks).wait():
                raise SystemExit(f"the undisturbed reproduction failed: {(place.root/'stderr').read_text()[-2000:]}")
            print(f"undisturbed: {len(place.store.keys())} records after {time.time() - start:.0f} s", flush=True)
        table = mutated(calm, root, o.mutations, rng)
        print(f"{o.mutations} mutations after {time.time() - start:.0f} s", flush=True)
        lines = two_drivers(root, root/"few.json", calm_few, rng)
        print(f"two drivers after {time.time() - start:.0f} s", flush=True)
        places, deaths, left = disturbed(root, root/"plan.json", o.kills, rng)
        equal = sum(compare(p, calm) for p in places)
        events = lambda what: sum(len(p.events(what)) for p in places)
        facts = dict(command=" ".join(["python tests/soak.py", *(sys.argv[1:] if argv is None else argv)]), seed=o.seed,
        kills=sum(deaths.values()), deaths=deaths, left=left, rounds=len(places), begun=events("begin"),
        resumed=events("resume"), stored=events("store"), equal=equal,
                     progress=sum(len(list(p.store.root.glob("tmp/progress-*"))) for p in places),
                     records=len(places)*len(calm.store.keys()), originals=len(calm.store.keys()),
                     stacks=len(make_stacks(wanted, "cpu")), runs=len(wanted), minutes=(time.time() - start)/60)
        check(facts["resumed"] > 0, "no kill hit a training with a checkpoint")
        o.out.write_text(text := report(facts, table, lines))
        print(text)
    finally:
        for pid in [pid for p in Place.every for pid in p.processes()]: kill(pid)
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]: drive(sys.argv[2], sys.argv[3:])
    else: main()

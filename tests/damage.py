"""Damage to what refcomm writes, by a generator of random numbers.

Bytes, JSON, and whole checkpoints, lists of members, caches, recipes, plans and archives."""
import collections
import contextlib
import json
import os
import re
import shutil
import warnings


def leaf(rng, node):
    "A random place in nested JSON: its container and its key."
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    return leaf(rng, node[key]) if isinstance(node[key], (dict, list)) and node[key] else (node, key)


def change_leaf(rng, raw):
    node, key = leaf(rng, raw)
    v = node[key]
    if isinstance(v, bool): node[key] = not v
    else: node[key] = v + 1 if isinstance(v, (int, float)) else f"{v}."


def not_a_number(rng, raw):
    node, key = leaf(rng, raw)
    node[key] = float("nan")


def tables(node): # every dictionary in nested JSON
    if isinstance(node, list): return [t for v in node for t in tables(v)]
    return [node, *tables([*node.values()])] if isinstance(node, dict) and node else []


def lose_key(rng, raw):
    node = rng.choice(tables(raw))
    del node[rng.choice(list(node))]


def stretch(rng, data, n=4096):
    at = rng.randrange(len(data))
    return slice(at, at + rng.randrange(1, n))


def flip(rng, data, n=1):
    for at in rng.sample(range(8*len(data)), n): data[at//8] ^= 1 << at % 8


def zeros(rng, data): data[s] = bytes(len(data[s := stretch(rng, data)]))


def insert(rng, data): data[(at := rng.randrange(len(data))):at] = rng.randbytes(rng.randrange(1, 64))


def lose(rng, data): del data[stretch(rng, data, 64)]


def cut(rng, data): del data[rng.randrange(len(data)):]


BYTES = {
    "one bit flipped": flip, "up to 64 bits flipped": lambda rng, data: flip(rng, data, rng.randrange(2, 65)),
    "file cut short": cut, "file emptied": lambda rng, data: data.clear(), "a stretch of zeros": zeros,
    "bytes inserted": insert, "bytes lost": lose, "bytes appended": lambda rng, data: data.extend(rng.randbytes(8)),
}


def repeat_key(rng, text):
    "A key named twice: first with another value, then with its own, which is the one that Python keeps."
    at = rng.choice(list(re.finditer(r'"(\w+)": ', text)))
    return text[:at.start()] + f'"{at[1]}": {rng.choice(["0", "[]", "null"])}, ' + text[at.start():]


def edited(change):
    "A change of JSON as data, for text."
    def mutate(rng, text):
        raw = json.loads(text)
        change(rng, raw)
        return json.dumps(raw, indent=1)
    return mutate


TEXT = {"value edited": edited(change_leaf), "value made NaN": edited(not_a_number), "key removed": edited(lose_key),
    "key duplicated": repeat_key, "nested too deeply": lambda rng, text: "["*200_000,
    "other encoding": lambda rng, text: text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))}


def mutated(rng, kind, data): # bytes → other bytes
    if kind in TEXT:
        found = TEXT[kind](rng, data.decode())
        return found if isinstance(found, bytes) else found.encode()
    new = bytearray(data)
    BYTES[kind](rng, new)
    return bytes(new)


def put(path, what):
    "Place bytes, a folder, a link to itself or a pipe at a path."
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)
    if isinstance(what, bytes): path.write_bytes(what)
    elif what == "folder in its place": path.mkdir()
    elif what == "link to itself": path.symlink_to(path)
    else: os.mkfifo(path)


PLACES = ("folder in its place", "link to itself", "pipe in its place")


class Subject:
    "A kind of file: one that is sound, one of another, and how it is read."
    def __init__(self, path, read, text=False, other=None, same=lambda a, b: a == b, places=PLACES):
        self.path, self.read, self.same, self.data, self.other = path, read, same, path.read_bytes(), other
        self.kinds = [*BYTES, *(TEXT if text else ()), *places, *(["file of another"] if other else [])]
        self.expected = self.look()[0]

    def spoil(self, rng, kind): # False where nothing was changed
        if kind == "file of another": new = self.other
        else: new = kind if kind in PLACES else mutated(rng, kind, self.data)
        put(self.path, new)
        return new != self.data

    def look(self): # what was read, what was said
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = self.read(self.path)
        return found, [str(w.message) for w in said]

    def verdict(self): # what became of the damage
        from refcomm.core import RefcommError
        try: found, said = self.look()
        except RefcommError as e: return "refused in one line" if len(str(e).splitlines()) == 1 else "refused in lines"
        except Exception as e: return f"TRACEBACK: {type(e).__name__}: {str(e)[:200]}"
        if not self.same(found, self.expected): return "ACCEPTED"
        return "set aside, made anew" if said else "reads the same"


def subjects(root):
    "One of each: name → `Subject`. `root` becomes the home of caches and figures."
    import pandas as pd, torch
    from matplotlib import pyplot as plt
    from refcomm import files
    from refcomm.publish.figures import save
    from refcomm.publish.report import read_items
    from refcomm.core import ConfigError
    from refcomm.papers.eqc.run import EQCSpec
    from refcomm.runs.archives import export_runs, import_runs
    from refcomm.runs.costs import shipped
    from refcomm.runs.execute import _members, read_plan, write_plan
    from refcomm.runs.store import RunResult, Store, provenance
    from test_checkpoints import Cut, same, train
    specs, found = [EQCSpec(seed=s) for s in range(3)], {}
    store = Store(root/"runs")

    path, other = root/"training.safetensors", root/"other.safetensors"
    for p, seeds in ((path, (0, 1)), (other, (2, 3))):
        with contextlib.suppress(Cut): train(p, cut=20, seeds=seeds)
    def resumed(path):
        try: return train(path)
        finally:
            for aside in path.parent.glob("*.unreadable-*"): put(aside, b""); aside.unlink()
    found["checkpoint"] = Subject(path, resumed, other=other.read_bytes(), same=same)

    folders = [store.root/"unfinished"/f"eqc-{i:016x}" for i in range(2)]
    for folder, some in zip(folders, (specs[:2], specs[1:])): _members(store, folder, some, some)
    def members(path):
        return _members(store, path.parent, specs, specs[:1])
    found["members.json"] = Subject(folders[0]/"members.json", members, True, (folders[1]/"members.json").read_bytes(),
        lambda a, b: a in (b, specs[:1])) # the one that is missing, alone, is a fresh start

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    names = [root/"cache"/f"{n}.safetensors" for n in "ab"]
    cached = lambda p: files.cached_tensor(p, lambda: x if p == names[0] else -x, "features")
    for p in names: cached(p)
    found["cache"] = Subject(names[0], cached, other=names[1].read_bytes(), same=torch.equal)

    claim = dict(id="a", sentence="b", test="c", source="", kind="result", ours=False, numbers=dict(x=.5), intervals={},
        verdict="refuted", cause="", power="", decide="")
    for item in ("table5", "table6"):
        save("eqc", item, pd.DataFrame(dict(row=["a"], ours=[.5])), plt.figure(), [], "cpu", "A title", "a note",
            [claim])
        plt.close("all")
    folder = files.figures_dir("cpu")
    def recipe(path):
        items, problems = read_items(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            costs = shipped(folder)
        if len(items) + len(problems) != 2 or not {i["item"] for i in items} <= {r["item"] for r in costs.values()}:
            raise AssertionError("an item is lost, or two readers differ")
        if problems: raise ConfigError(problems[0])
        return [{k: v for k, v in i.items() if k not in ("png", "csv", "beside")} for i in items]
    found["recipe"] = Subject(folder/"eqc_table5.json", recipe, True, (folder/"eqc_table6.json").read_bytes())

    write_plan(specs, root/"plan.json")
    found["plan"] = Subject(root/"plan.json", read_plan, True, places=PLACES[:2]) # a plan may come through a pipe

    for s in specs:
        store.put(s, RunResult([dict(accuracy=s.seed/10)], {}, dict(epoch=[0]), dict(m=torch.arange(5)),
            dict(w=torch.ones(2)) if s.seed else None), provenance("cpu", 1, 1))
    export_runs(root/"runs.tar", store)
    def imported(path):
        new = Store(root/"import")
        shutil.rmtree(new.root, ignore_errors=True)
        try: import_runs(path, new)
        except ConfigError: raise
        except Exception:
            if new.keys() or list(new.root.glob("tmp/*")): raise AssertionError("imported by halves") from None
            raise
        return {r.key: (r.rows, r.spec, r.summary) for r in new.survey()[0]}
    found["archive"] = Subject(root/"runs.tar", imported)
    return found


def damaged(found, n, rng): # kind of file → what became of it → how often
    "Damage each subject in turn, `n` times in all, and read it as refcomm does. What was accepted or ended in a traceback is in capitals."
    table, wrong = {name: collections.Counter() for name in found}, []
    done = 0
    while done < n:
        name = list(found)[done % len(found)]
        s = found[name]
        kind = s.kinds[done // len(found) % len(s.kinds)]
        if not s.spoil(rng, kind): continue
        what = s.verdict()
        table[name][what.split(":")[0]] += 1
        if what.isupper() or what.startswith(("ACCEPTED", "TRACEBACK")): wrong.append(f"{name}, {kind}: {what}")
        put(s.path, s.data)
        done += 1
    return table, wrong

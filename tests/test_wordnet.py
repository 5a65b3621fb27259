"WordNet's hierarchy against a slow walk, the full table and NLTK's way of counting."
import os
import random
import subprocess
import sys
from collections import deque

import pytest
import torch
from hypothesis import given, strategies as st

from conftest import PROGRAMS
from refcomm.core import ConfigError, generator
from refcomm.data import wordnet
from refcomm.data.wordnet import ascents, class_disjoint_split, hypernyms, ood_synsets, path_similarity, synset
from refcomm.files import find_data

SHIPPED = sorted(wordnet._shipped())
LEAVES = sorted(set(SHIPPED) - {h for w in SHIPPED for h in hypernyms(w)})


def walk(a, b, up):
    "1 / (1 + steps) of the shortest way that goes up from a, then down to b: one breadth-first search each."
    def distances(start):
        found, queue = {start: 0}, deque([start])
        while queue:
            here = queue.popleft()
            for h in up(here):
                if h not in found: found[h] = found[here] + 1; queue.append(h)
        return found
    a, b = distances(a), distances(b)
    common = [a[x] + b[x] for x in a if x in b]
    return 1 / (1 + min(common)) if common else 0.


def test_equals_a_slow_walk_on_random_pairs():
    g = random.Random(0)
    rows, columns = g.sample(SHIPPED, 60), g.sample(SHIPPED, 50)
    found = path_similarity(rows, columns)
    assert found.dtype == torch.float32 and found.shape == (60, 50)
    assert torch.allclose(found, torch.tensor([[walk(a, b, hypernyms) for b in columns] for a in rows]))
    assert torch.equal(path_similarity(rows), path_similarity(rows, rows)) and torch.equal(path_similarity(rows)[:, :3],
        path_similarity(rows, rows[:3]))


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0, .6))
def test_any_hierarchy(seed, n, density):
    "Hierarchies of several roots, several ways up, and classes that stand above others."
    g = random.Random(seed)
    above = {i: [j for j in range(i) if g.random() < density] for i in range(n)}
    chosen = [g.randrange(n) for _ in range(5)]
    assert torch.allclose(path_similarity(chosen, range(n), above.get),
        torch.tensor([[walk(a, b, above.get) for b in range(n)] for a in chosen]))


def test_values_known_from_nltk():
    named = dict(dog="n02084071", cat="n02121620", house_cat="n02121808", tabby="n02123045", car="n02958343",
        entity="n00001740")
    pairs = dict(zip([(a, b) for a in named for b in named], path_similarity(named.values()).flatten().tolist()))
    for (a, b), steps in {("dog", "cat"): 4, ("dog", "house_cat"): 2, ("cat", "tabby"): 2, ("dog", "entity"): 8,
        ("dog", "car"): 12}.items():
        assert pairs[a, b] == pairs[b, a] == pytest.approx(1/(1 + steps)), (a, b)


@pytest.mark.skipif(not find_data("wordnet30_noun_hypernyms.parquet"), reason="the full table lies under REFCOMM_DATA")
def test_equals_the_full_table():
    import pandas as pd
    full = pd.read_parquet(find_data("wordnet30_noun_hypernyms.parquet"))
    wnid = lambda offset: f"n{offset:08d}"
    lemma, up = {}, {}
    for offset, name, above in full.itertuples(index=False):
        lemma[wnid(offset)], up[wnid(offset)] = name, tuple(map(wnid, above))
    assert all(synset(w) == (lemma[w], up[w]) for w in SHIPPED)
    g = random.Random(0)
    assert torch.equal(path_similarity(g.sample(SHIPPED, 200)),
        path_similarity(random.Random(0).sample(SHIPPED, 200), hypernyms=up.__getitem__))
    rows, columns = g.sample(sorted(up), 60), g.sample(sorted(up), 60)
    assert torch.allclose(path_similarity(rows, columns, up.__getitem__),
        torch.tensor([[walk(a, b, up.__getitem__) for b in columns] for a in rows]))


@pytest.mark.skipif(not find_data("tiny_imagenet_core.parquet"), reason="Tiny-ImageNet lies under REFCOMM_DATA")
def test_tiny_imagenet_is_covered_and_new_to_the_ood_set():
    from refcomm.data.images import load_images
    images = load_images("tiny_imagenet_core.parquet", size=8, n=3000)
    assert len(images.wnids) == len(images.classes) == 200
    assert all(synset(w)[0].replace("_", " ").lower() in c.lower() for w, c in zip(images.wnids, images.classes))
    similarity = path_similarity(images.wnids)
    assert (similarity.diagonal() == 1).all() and (similarity > 0).all() and torch.equal(similarity, similarity.T)
    names, steps = ascents(images.wnids + ood_synsets())
    related = [(a, b) for k, a in enumerate(images.wnids + ood_synsets()) for b in images.wnids + ood_synsets()
        if a != b and steps[k, names.index(b)] < 99]
    assert related == [("n03162818", "n04008634")], "only dart, of the OOD set, is a projectile"


def test_the_table_is_closed_upwards_and_has_one_root():
    assert {h for w in SHIPPED for h in hypernyms(w)} <= set(SHIPPED) and [w for w in SHIPPED
        if not hypernyms(w)] == ["n00001740"]
    assert len(SHIPPED) == 2019 and len(set(ood_synsets())) == 80 and set(ood_synsets()) <= set(SHIPPED)


def test_missing_and_malformed_ids_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(ConfigError, match="n99999999 is not among the 2019 synsets shipped.*install NLTK"):
        path_similarity(["n02084071", "n99999999"])
    for bad in ("dog.n.01", "2084071", "n2084071", "v02084071", 2084071, None, " n02084071", "n02084071\n"):
        with pytest.raises(ConfigError, match="is no WordNet id"): path_similarity([bad])
    for empty in ([[]], [["n02084071"], []]):
        with pytest.raises(ConfigError, match="no classes to compare"): path_similarity(*empty)


@pytest.mark.parametrize("corpus", ["another version", "no such synset", "not downloaded"])
def test_a_corpus_that_does_not_help(monkeypatch, corpus):
    class Corpus:
        def get_version(self):
            if corpus == "not downloaded": raise LookupError("Resource wordnet not found")
            return "3.1" if corpus == "another version" else "3.0"
        def synset_from_pos_and_offset(self, pos, offset):
            return None if corpus == "no such synset" else pytest.fail("asked")
    monkeypatch.setitem(sys.modules, "nltk", type(sys)("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", type("corpus", (), dict(wordnet=Corpus())))
    with pytest.raises(ConfigError, match="n02439398 is not among"): synset("n02439398")


@given(st.integers(0, 2**32), st.integers(2, 30), st.data())
def test_held_out_classes_are_unrelated_to_those_that_stay(seed, n, data):
    ids, n_ood = random.Random(seed).sample(SHIPPED, n), data.draw(st.integers(1, n - 1))
    above = {a: set(ascents([a])[0]) for a in ids}
    related = {(a, b) for a in ids for b in ids if b in above[a] or a in above[b]}
    try: parts = class_disjoint_split(ids, n_ood, generator(seed))
    except ConfigError as e:
        families = {a: {a} for a in ids}
        for a, b in related:
            if families[a] is not families[b]:
                families[a] |= families[b]
                for c in families[b]: families[c] = families[a]
        sums = {0}
        for size in [len(f) for f in {id(f): f for f in families.values()}.values()]: sums |= {s + size for s in sums}
        assert n_ood not in sums and "without parting hypernyms from hyponyms" in str(e)
        return
    train, ood = parts["train"].tolist(), parts["ood"].tolist()
    assert len(ood) == n_ood and sorted(train + ood) == list(range(n)) and train == sorted(train) and ood == sorted(ood)
    assert not any((ids[a], ids[b]) in related for a in train for b in ood)


def test_every_class_is_held_out_as_often():
    ids, counts = LEAVES[:40], torch.zeros(40)
    for seed in range(400): counts[class_disjoint_split(ids, 10, generator(seed))["ood"]] += 1
    assert counts.sum() == 4000 and 60 < counts.min() and counts.max() < 140


def test_splits_that_cannot_be():
    for n_ood, says in [(0, "n_ood must be at least 1"), (2, "number of classes that stay must be at least 1, got 0")]:
        with pytest.raises(ConfigError, match=says): class_disjoint_split(LEAVES[:2], n_ood, generator(0))


@pytest.mark.slow
def test_the_licence_is_shipped_and_nothing_is_downloaded():
    from importlib import resources
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (resources.files("refcomm.data")/"WORDNET_LICENSE.txt").read_text()
    subprocess.run([sys.executable, PROGRAMS/"wordnet_alone.py"], check=True,
        env={k: v for k, v in os.environ.items() if k != "REFCOMM_DATA"})

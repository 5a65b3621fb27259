"Whether messages are built as their meanings are, against scipy, brute force and other people's code."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from refcomm.core import ConfigError, generator
from refcomm.data.objects import ObjectWorld
from refcomm.metrics.structure import (STATISTICS, bosdis, distances, entropy, jaccard, measure, posdis,
    topographic_similarity)


def protocol(n=60, length=4, n_attributes=3, n_values=4, alphabet=5, noise=.4, seed=0):
    "Messages that name attributes in turn, but for noise."
    g = generator(seed)
    meant = torch.randint(n_values, (n, n_attributes), generator=g)
    said = meant[:, torch.arange(length) % n_attributes] % alphabet
    return (torch.where(torch.rand(n, length, generator=g) < noise, torch.randint(alphabet, (n, length), generator=g),
        said), meant)


def levenshtein(a, b):
    "The recursion as it is written."
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        table[i, j] = min(table[i-1, j] + 1, table[i, j-1] + 1, table[i-1, j-1] + (a[i-1] != b[j-1]))
    return table[len(a), len(b)]


BY_HAND = {
    "hamming": lambda a, b: sum(x != y for x, y in zip(a, b)),
    "edit": levenshtein,
    "jaccard": lambda a, b: 1 - len(set(a) & set(b))/len(set(a) | set(b)),
}


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("length,alphabet", [(1, 3), (4, 2), (7, 5), (5, 300)])
def test_distances_are_those_by_hand(kind, length, alphabet):
    x = torch.randint(alphabet, (40, length), generator=generator(length)) * 1000
    theirs = [BY_HAND[kind](a, b) for a, b in itertools.combinations(x.tolist(), 2)]
    assert torch.allclose(distances(x, kind), torch.tensor(theirs, dtype=torch.double), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["hamming", "edit"])
def test_long_messages_do_not_overflow(kind):
    assert distances(torch.tensor([[0]*256, [1]*256]), kind).tolist() == [256]


def test_blocks_do_not_show():
    said, meant = protocol(n=700)
    assert torch.equal(distances(said, "hamming"), torch.from_numpy(pdist(said, "hamming")*4).round())
    assert topographic_similarity(said, meant,
        "hamming") == pytest.approx(spearmanr(pdist(meant, "hamming"), pdist(said, "hamming")).statistic, abs=1e-9)


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("meaning_distance", ["hamming", "cosine"])
def test_topographic_similarity_is_scipys(kind, meaning_distance):
    said, meant = protocol(seed=3)
    if meaning_distance == "cosine": meant = torch.randn(60, 9, generator=generator(1)).double()
    far = [BY_HAND[kind](a, b) for a, b in itertools.combinations(said.tolist(), 2)]
    ours = topographic_similarity(said, meant, kind, meaning_distance)
    assert ours == pytest.approx(spearmanr(pdist(meant, meaning_distance), np.round(far, 12)).statistic, abs=1e-9)


def test_cosines_that_differ_by_rounding_are_ties():
    said, meant = protocol(n=80)
    vectors = torch.nn.functional.one_hot(meant, 4).flatten(1).double()
    assert topographic_similarity(said, vectors * .1,
        meaning_distance="cosine") == pytest.approx(topographic_similarity(said, meant), abs=1e-12)


def gap(parts, meant):
    "Chaabouni et al. (2020, eq. 1), a part at a time."
    def bits(*columns):
        counts = np.unique(np.stack(columns), axis=1, return_counts=True)[1] / len(columns[0])
        return -(counts * np.log2(counts)).sum()
    gaps = []
    for x in np.asarray(parts).T:
        if len(set(x)) == 1: continue
        first, second, *_ = sorted((bits(x) + bits(y) - bits(x, y) for y in np.asarray(meant).T), reverse=True)
        gaps.append((first - second) / bits(x))
    return np.mean(gaps)


@pytest.mark.parametrize("seed", range(3))
def test_disentanglement_is_that_by_hand(seed):
    said, meant = protocol(seed=seed)
    said[:, 1] = 2 if seed == 2 else said[:, 1]
    assert posdis(said, meant) == pytest.approx(gap(said, meant), abs=1e-9)
    bags = np.array([[row.count(k) for k in range(5)] for row in said.tolist()])
    assert bosdis(said, meant) == pytest.approx(gap(bags, meant), abs=1e-9)
    whole, places = entropy(said)
    assert whole == pytest.approx(-sum(c/60*math.log2(c/60) for c in np.unique(said, axis=0, return_counts=True)[1]))
    assert places[0] == pytest.approx(-sum(c/60*math.log2(c/60) for c in np.unique(said[:, 0], return_counts=True)[1]))


def test_values_are_emlangkits():
    from emlangkit import metrics
    said, meant = protocol(n=50, seed=5)
    a, b = said.numpy(), meant.numpy()
    assert topographic_similarity(said, meant) == pytest.approx(metrics.compute_topographic_similarity(a, b)[0],
        abs=1e-9)
    assert topographic_similarity(said, meant,
        "hamming") == pytest.approx(metrics.compute_topographic_similarity(a, b, message_dist_metric="hamming")[0],
        abs=1e-9)
    assert posdis(said, meant) == pytest.approx(metrics.compute_posdis(a, b), abs=1e-9)
    assert bosdis(said, meant) == pytest.approx(metrics.compute_bosdis(a, b), abs=1e-9)
    assert entropy(said)[0] == pytest.approx(metrics.compute_entropy(a), abs=1e-9)


codes = st.tuples(st.integers(0, 10**6), st.integers(5, 30), st.integers(1, 5), st.integers(2, 4), st.integers(2, 6))


@settings(max_examples=15)
@given(codes)
def test_names_of_symbols_and_the_order_of_objects_mean_nothing(code):
    seed, n, length, n_attributes, alphabet = code
    said, meant = protocol(n, length, n_attributes, 3, alphabet, seed=seed)
    g = generator(seed, "names")
    names, order, places = (torch.randperm(k, generator=g) for k in (alphabet, n, length))
    other = names[said][order] * 7 + 3
    for kind in BY_HAND:
        assert topographic_similarity(said, meant,
            kind) == pytest.approx(topographic_similarity(other, meant[order], kind), abs=1e-9, nan_ok=True)
    assert posdis(said, meant) == pytest.approx(posdis(other[:, places], meant[order]), abs=1e-9, nan_ok=True)
    mixed = other.gather(1, torch.rand(n, length, generator=g).argsort(1))
    assert bosdis(said, meant) == pytest.approx(bosdis(mixed, meant[order]), abs=1e-9, nan_ok=True)
    assert topographic_similarity(said, meant,
        "jaccard") == pytest.approx(topographic_similarity(mixed, meant[order], "jaccard"), abs=1e-9, nan_ok=True)


@settings(max_examples=20)
@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 1000))
def test_a_compositional_code_is_one(n_attributes, n_values, seed):
    world, g = ObjectWorld(n_attributes, n_values), generator(seed)
    meant = world.attributes(torch.arange(world.size))
    places = torch.randperm(n_attributes, generator=g)
    said = torch.stack([torch.randperm(n_values, generator=g)[meant[:, a]] + n_values*int(a) for a in places], 1)
    assert posdis(said, meant) == pytest.approx(1) and topographic_similarity(said, meant,
        "hamming") == pytest.approx(1)
    assert bosdis(said.gather(1, torch.rand(said.shape, generator=g).argsort(1)), meant) == pytest.approx(1)


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 5), min_size=1, max_size=5)]*2), min_size=1, max_size=5))
def test_jaccard_is_of_sets(pairs):
    for a, b in pairs:
        assert jaccard(torch.tensor([a]),
            torch.tensor([b])).item() == pytest.approx(len(set(a) & set(b)) / len(set(a) | set(b)))


@pytest.mark.parametrize("options", [{}, dict(message_distance="jaccard", meaning_distance="cosine")])
def test_a_sample_drawn_again_is_that_of_its_pairs(options):
    said, meant = protocol(n=30)
    meant = meant if not options else torch.randn(30, 5, generator=generator(2)).double()
    ready, drawn = STATISTICS["topsim"](said, meant, **options), torch.randint(30, (30,), generator=generator(9))
    i, j = torch.triu_indices(30, 30, 1)
    pair = torch.full((30, 30), -1)
    pair[i, j] = pair[j, i] = torch.arange(435)
    kept = pair[drawn[i], drawn[j]]
    kept = kept[kept >= 0]
    x = distances(meant, options.get("meaning_distance", "hamming"))
    y = distances(said, options.get("message_distance", "edit"))
    assert float(ready.resampled(drawn.bincount(minlength=30))) == pytest.approx(spearmanr(x[kept],
        y[kept].round(decimals=12)).statistic, abs=1e-9)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_deals_and_draws_are_of_the_same_statistic(statistic):
    said, meant = protocol(n=300)
    alone = dict(topsim=topographic_similarity, posdis=posdis, bosdis=bosdis)[statistic]
    ready, order = STATISTICS[statistic](said, meant), torch.randperm(300, generator=generator(4))
    assert float(ready.permuted(order)) == pytest.approx(alone(said, meant[order]), abs=1e-6)
    assert float(ready.resampled(torch.ones(300, dtype=torch.long))) == pytest.approx(alone(said, meant), abs=1e-9)
    if statistic != "topsim":
        weights = torch.randint(3, (300,), generator=generator(5))
        assert float(ready.resampled(weights)) == pytest.approx(alone(said.repeat_interleave(weights, 0),
            meant.repeat_interleave(weights, 0)), abs=1e-9)


def test_all_deals_of_four_objects():
    "Of the 24 ways to deal four objects to four messages, 8 agree in full: p counts ties."
    meant = ObjectWorld(2, 2).attributes(torch.arange(4))
    values = torch.tensor([topographic_similarity(meant[list(p)], meant, "hamming")
        for p in itertools.permutations(range(4))])
    assert (values > 1 - 1e-6).sum() == 8 and torch.allclose(values.unique(), torch.tensor([-.5, 1]), atol=1e-6)
    found = measure("topsim", meant, meant, generator(0), 0, 1999, message_distance="hamming")
    assert found.p == pytest.approx(1/3, abs=.05) and math.isnan(found.low)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_interval_holds_the_value_of_all_objects_and_p_is_fair(statistic):
    world, g, held, significant = ObjectWorld(3, 4), generator(11), 0, 0
    every = world.attributes(torch.arange(world.size)).repeat(20, 1)
    def speak(meant, noise):
        return torch.where(torch.rand(meant.shape, generator=g) < noise, torch.randint(4, meant.shape, generator=g),
            meant)
    alone = dict(topsim=lambda *x: topographic_similarity(*x, "hamming"), posdis=posdis, bosdis=bosdis)[statistic]
    options = dict(message_distance="hamming") if statistic == "topsim" else {}
    truth = alone(speak(every, .5), every)
    for _ in range(40):
        meant = every[torch.randint(len(every), (100,), generator=g)]
        found = measure(statistic, speak(meant, .5), meant, g, 50, 0, **options)
        held += found.low <= truth <= found.high
        significant += measure(statistic, speak(meant, 1), meant, g, 0, 9, **options).p <= .1
    assert held >= 32, "95 % are meant; 50 draws and first-order reflection give a little less"
    assert significant <= 11, "4 are expected"


def test_constant_messages_have_no_structure():
    meant, same = ObjectWorld(2, 3).attributes(torch.arange(9)), torch.ones(9, 3, dtype=torch.long)
    for statistic in STATISTICS:
        found = measure(statistic, same, meant, generator(0), 9, 9)
        assert all(math.isnan(v) for v in found), statistic
    assert entropy(same)[0] == 0 and entropy(same)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("call,message", [
    (lambda s, m: topographic_similarity(s, m[:5]), "60 messages but 5 meanings"),
    (lambda s, m: topographic_similarity(s/2, m), "messages must be symbols, integers"),
    (lambda s, m: topographic_similarity(s[:2], m[:2]), "number of messages must be at least 3, got 2"),
    (lambda s, m: topographic_similarity(s, m, "levenstein"), "unknown message_distance 'levenstein'"),
    (lambda s, m: topographic_similarity(s, m, meaning_distance="cosin"), "did you mean 'cosine'"),
    (lambda s, m: topographic_similarity(s, m*0., meaning_distance="cosine"), "the cosine of a vector of zeros"),
    (lambda s, m: topographic_similarity(s[None], m), "1 messages but 60 meanings"), # words of several symbols, of one message
    (lambda s, m: topographic_similarity(s, m, lengths=torch.ones(5, dtype=torch.long)),
    "lengths must be [60] whole numbers"),
    (lambda s, m: topographic_similarity(s[:, :0], m), "messages must be [n, width]"),
    (lambda s, m: posdis(s, m[:, 0]), "number of attributes must be at least 2, got 1"),
    (lambda s, m: posdis(s, m/2), "only topographic similarity takes vectors"),
    (lambda s, m: jaccard(s, s[:3]), "got 60 and 3 messages: both sides need one message for each target"),
    (lambda s, m: measure("posdi", s, m, generator(0)), "did you mean 'posdis'"),
    (lambda s, m: measure("bosdis", s, m, generator(0), message_distance="edit"),
    "bosdis has no options, got message_distance"),
    (lambda s, m: measure("topsim", s, m, generator(0), n_resamples=-1), "n_resamples must be at least 0"),
    (lambda s, m: measure("topsim", s, m, generator(0), level=1), "level must lie between 0 and 1, got 1"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError) as e: call(*protocol())
    assert message in str(e.value)

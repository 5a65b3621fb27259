"Symbols as labels: agreement with classes against slow references, and against chance."
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.metrics import normalized_mutual_info_score

from refcomm.core import ConfigError, generator
from refcomm.metrics.protocol import (cooccurrence, images_by_symbol, normalized_mutual_information as nmi,
    permutation_test, symbol_counts,
                                      within_symbol_similarity as wnsim)
from refcomm.metrics.task import n_unique

protocols = st.lists(st.tuples(st.integers(-3, 9), st.integers(0, 5)), min_size=1, max_size=60)


def similarities(k, seed=0):
    w = torch.rand(k, k, generator=generator(seed), dtype=torch.double)
    return (w + w.T) / 2


def slow_similarity(symbols, labels, w):
    "Pair by pair."
    pairs = [w[labels[i], labels[j]].item() for i, j in itertools.combinations(range(len(symbols)), 2)
        if symbols[i] == symbols[j]]
    return sum(pairs) / len(pairs) if pairs else math.nan


@given(protocols)
def test_the_table_counts(rows):
    symbols, labels = map(torch.tensor, zip(*rows))
    table = cooccurrence(symbols, labels, n_classes=7)
    assert table.shape == (n_unique(symbols[:, None]), 7) and table.sum() == len(rows)
    for k, s in enumerate(sorted({s for s, _ in rows})):
        assert table[k].tolist() == [rows.count((s, c)) for c in range(7)]


@given(protocols)
def test_equals_scikit_learn(rows):
    symbols, labels = zip(*rows)
    if len(set(labels)) < 2:
        with pytest.raises(ConfigError, match="nMI needs labels of at least 2 classes"):
            nmi(cooccurrence(torch.tensor(symbols), torch.tensor(labels)))
    else:
        assert float(nmi(cooccurrence(torch.tensor(symbols),
            torch.tensor(labels)))) == pytest.approx(normalized_mutual_info_score(labels, symbols), abs=1e-9)


@given(protocols, st.integers(0, 99))
def test_equals_the_mean_over_all_pairs(rows, seed):
    symbols, labels = zip(*rows)
    w = similarities(6, seed)
    expected = slow_similarity(symbols, labels, w)
    for dtype, close in ((torch.double, 1e-9), (torch.float, 1e-5)):
        assert float(wnsim(cooccurrence(torch.tensor(symbols), torch.tensor(labels), 6),
            w.to(dtype))) == pytest.approx(expected, abs=close, nan_ok=True)


def test_batches_of_tables_and_renaming():
    g = generator(0)
    symbols, labels = torch.randint(8, (5, 200), generator=g), torch.randint(6, (200,), generator=g)
    tables = torch.stack([cooccurrence(s, labels, 6) for s in symbols])
    for statistic in (nmi, partial(wnsim, similarity=similarities(6))):
        assert torch.equal(statistic(tables), torch.stack([statistic(t) for t in tables]))
        assert torch.allclose(statistic(tables), statistic(tables[:, torch.randperm(8, generator=g)]))


def test_messages_of_several_symbols_are_names():
    g = generator(0)
    messages, labels = torch.randint(3, (300, 2), generator=g), torch.randint(4, (300,), generator=g)
    joint = messages[:, 0]*3 + messages[:, 1]
    assert torch.equal(cooccurrence(messages, labels), cooccurrence(joint, labels))
    same = [permutation_test(nmi, s, labels, generator(1), 50) for s in (messages, joint)]
    assert same[0].p == same[1].p and torch.equal(same[0].null, same[1].null)


def test_a_large_symbol_loses_no_precision():
    "All pairs of 20,000 images under one symbol, in single precision."
    labels = torch.arange(20_000) % 50
    w = similarities(50)
    c = torch.full((50,), 400.).double()
    expected = (c @ w @ c - 400*w.diagonal().sum()) / (20_000*19_999)
    assert float(wnsim(cooccurrence(torch.zeros(20_000), labels), w.float())) == pytest.approx(expected.item(),
        rel=1e-5)


@pytest.mark.parametrize("statistic", [nmi, partial(wnsim, similarity=similarities(4))], ids=["nmi", "wnsim"])
def test_the_null_is_that_of_all_orders(statistic):
    "Six images have 720 orders: the drawn deals approach their exact distribution."
    symbols, labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 2, 3, 3])
    every = torch.stack([statistic(cooccurrence(symbols, labels[list(o)], 4))
        for o in itertools.permutations(range(6))])
    test = permutation_test(statistic, symbols, labels, generator(0), 4000, n_classes=4)
    exact = (every >= test.value - 1e-9).double().mean().item()
    assert test.p == pytest.approx(exact, abs=4*(exact*(1 - exact)/4000)**.5 + 1/4001)
    assert torch.isin((test.null*1e6).round(),
        (every*1e6).round()).all() and test.null.mean() == pytest.approx(every.mean().item(), abs=.02)


@pytest.mark.parametrize("statistic", [nmi, partial(wnsim, similarity=similarities(5).float())], ids=["nmi", "wnsim"])
def test_p_is_uniform_where_nothing_is_said(statistic):
    g = generator(0)
    p = np.array([permutation_test(statistic, torch.randint(20, (80,), generator=g),
        torch.randint(5, (80,), generator=g), g, 99, n_classes=5).p for _ in range(300)])
    assert p.min() >= .01 and abs(p.mean() - .5) < .07
    for level in (.1, .25, .5): assert abs((p <= level).mean() - level) < 4*(level*(1 - level)/300)**.5


def test_verdicts():
    labels = torch.arange(300) % 6
    w = torch.eye(6)*.5 + .5*torch.eye(3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    pairs = labels // 2
    for statistic in (nmi, partial(wnsim, similarity=w)):
        test = permutation_test(statistic, pairs, labels, generator(0))
        assert test.p == .001 and test.null.max() < test.value and len(test.null) == 999
        again = permutation_test(statistic, pairs, labels, generator(0))
        assert torch.equal(test.null, again.null)
        assert permutation_test(statistic, torch.zeros(300), labels, generator(0), 99).p == 1, "one symbol says nothing"
    assert float(nmi(cooccurrence(torch.arange(300), labels))) > .4 and permutation_test(nmi, torch.arange(300), labels,
        generator(0), 99).p == 1, "a symbol of its own for each image says nothing, whatever the score"
    assert math.isnan(permutation_test(partial(wnsim, similarity=w), torch.arange(300), labels, generator(0), 99).p)


def test_many_deals_come_in_batches(monkeypatch):
    "The number of tables counted at once does not change the result."
    g = generator(0)
    symbols, labels = torch.randint(900, (1000,), generator=g), torch.randint(300, (1000,), generator=g)
    seen = []
    def statistic(table):
        seen.append(len(table) if table.dim() == 3 else 0)
        return nmi(table)
    test = permutation_test(statistic, symbols, labels, generator(1), 20)
    assert seen[0] == 0 and max(seen) < 20 and sum(seen) == 20
    g = generator(1)
    assert torch.equal(test.null, torch.stack([nmi(cooccurrence(symbols, labels[torch.randperm(1000, generator=g)],
        300)) for _ in range(20)]))


def test_counts_and_galleries():
    symbols = torch.tensor([4, 2, 4, 4, 2, 8])
    kinds, counts = symbol_counts(symbols)
    assert (kinds.tolist(), counts.tolist()) == ([4, 2, 8], [3, 2, 1])
    assert symbol_counts(torch.tensor([1, 0]))[0].tolist() == [0, 1], "ties in their order"
    drawn = torch.cat([images_by_symbol(symbols, kinds[:1], 1, generator(s))[0] for s in range(60)])
    assert sorted(drawn.unique().tolist()) == [0, 2, 3]
    assert [sorted(i.tolist()) for i in images_by_symbol(symbols, kinds, 9, generator(0))] == [[0, 2, 3], [1, 4], [5]]


def test_bad_input():
    x = torch.tensor([0, 1, 1])
    for call, says in [(lambda: cooccurrence(x, x[:2]), "3 messages but 2 labels"),
        (lambda: cooccurrence(x[:0], x[:0]), "no messages"), (lambda: symbol_counts(x[:0]), "no messages"),
                       (lambda: cooccurrence(x, x - 1), r"labels must lie in 0 … 0, got -1 … 0"),
                       (lambda: cooccurrence(x, x, 1), r"labels must lie in 0 … 0, got 0 … 1"),
                       (lambda: permutation_test(nmi, x, x[:2], generator(0)), "3 messages but 2 labels"),
                       (lambda: permutation_test(nmi, x, x*0, generator(0)), "at least 2 classes"),
                       (lambda: permutation_test(nmi, x, x, generator(0), 0), "n_permutations must be at least 1"),
                       (lambda: wnsim(cooccurrence(x, x), torch.eye(3)),
                       r"similarity must be \[2, 2\] for 2 classes, got \[3, 3\]"),
                       (lambda: wnsim(cooccurrence(x, x), torch.eye(2)/0), "similarity contains NaN")]:
        with pytest.raises(ConfigError, match=says): call()

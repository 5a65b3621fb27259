"Games and their measures against brute force."
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from refcomm.agents.encoders import LinearEncoder
from refcomm.core import ConfigError, generator
from refcomm.data.objects import ObjectWorld, draw_distinct, split
from refcomm.games.referential import EveryObject, draw_distractors
from refcomm.metrics.task import expected_accuracy, hits, n_unique


@given(st.integers(1, 4), st.integers(2, 6))
def test_worlds_enumerate_all_value_combinations(a, v):
    world = ObjectWorld(a, v)
    expected = torch.tensor(list(itertools.product(range(v), repeat=a)))
    assert torch.equal(world.attributes(torch.arange(world.size)), expected)
    assert torch.equal(world.ids(expected), torch.arange(world.size))
    assert torch.equal(world.one_hot(torch.arange(world.size)), F.one_hot(expected, v).flatten(1).float())


@given(st.integers(3, 300), st.data())
def test_splits_are_disjoint_and_exhaustive(n, data):
    a = data.draw(st.integers(1, n - 2)); b = data.draw(st.integers(1, n - a - 1))
    parts = split(n, dict(train=a, valid=b, test=n - a - b), generator(0))
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(n))


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000))
def test_factorised_softmax_is_the_softmax_over_all_objects(a, v, seed):
    world, g = ObjectWorld(a, v), torch.Generator().manual_seed(seed)
    receiver = LinearEncoder(a*v, 7).double()
    z, target = torch.randn(6, 7, generator=g, dtype=torch.double), torch.randint(world.size, (6,), generator=g)
    plain = z @ receiver(world.one_hot(torch.arange(world.size)).double()).T
    every = EveryObject(world)
    torch.testing.assert_close(every.scores(receiver, z), plain.log_softmax(-1))
    torch.testing.assert_close(every.loss(receiver, z, target), F.cross_entropy(plain, target))
    assert torch.equal(world.ids(every.best(receiver, z)), plain.argmax(-1))


@given(st.integers(2, 60), st.data(), st.integers(0, 2**31))
def test_distractors_are_distinct_and_never_the_target(pool, data, seed):
    n = data.draw(st.integers(1, pool - 1))
    targets = torch.arange(pool)
    drawn = draw_distractors(targets, pool, n, torch.Generator().manual_seed(seed))
    assert drawn.shape == (pool, n) and drawn.min() >= 0 and drawn.max() < pool
    assert all(len(set(row)) == n and t not in row for t, row in zip(targets.tolist(), drawn.tolist()))


@pytest.mark.parametrize("pool, n", [(6, 3), (25, 3)], ids=["by sorting", "by rejection"])
def test_every_set_of_distractors_is_equally_likely(pool, n):
    drawn = draw_distractors(torch.zeros(60_000, dtype=torch.long), pool, n, generator(0)).sort(-1).values
    sets, counts = drawn.unique(dim=0, return_counts=True)
    expected = 60_000 / len(list(itertools.combinations(range(pool - 1), n)))
    assert len(sets) == len(list(itertools.combinations(range(pool - 1), n)))
    chi2, df = ((counts - expected)**2 / expected).sum().item(), len(sets) - 1
    assert abs(chi2 - df) < 5*(2*df)**.5


def test_same_seed_same_games():
    t = torch.arange(50)
    assert torch.equal(draw_distractors(t, 1000, 9, generator(3)), draw_distractors(t, 1000, 9, generator(3)))
    assert not torch.equal(draw_distractors(t, 1000, 9, generator(3)), draw_distractors(t, 1000, 9, generator(4)))


def win_probability(scores, target, n):
    "Average over every set of n−1 distractors; among equals the target wins its share."
    others = [s for i, s in enumerate(scores) if i != target]
    games = [(max(c), sum(s == scores[target] for s in c)) for c in itertools.combinations(others, n - 1)]
    return np.mean([0 if best > scores[target] else 1/(1 + ties) for best, ties in games])


@given(st.lists(st.integers(0, 4), min_size=3, max_size=8), st.data())
def test_expected_accuracy_is_the_mean_over_all_games(scores, data):
    target, n = data.draw(st.integers(0, len(scores) - 1)), data.draw(st.integers(2, len(scores)))
    ours = expected_accuracy(torch.tensor([scores]).float(), torch.tensor([target]), (n,)).item()
    assert ours == pytest.approx(win_probability(scores, target, n), abs=1e-6)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=7), st.data())
def test_drawn_accuracy_is_unbiased(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    counts = tuple(range(2, len(scores) + 1))
    won = hits(torch.tensor(scores).float().expand(8000, -1), torch.full((8000,), target), counts,
        generator(0)).float().mean(0)
    for n, w in zip(counts, won.tolist()): assert w == pytest.approx(win_probability(scores, target, n), abs=.03)


def test_leading_dimensions_share_their_draws():
    scores, target = torch.randn(40, 30, generator=generator(0)), torch.arange(40) % 30
    alone = hits(scores, target, (2, 10, 30), generator(7))
    stacked = hits(torch.stack([scores, -scores, scores]), target, (2, 10, 30), generator(7))
    assert torch.equal(stacked[0], alone) and torch.equal(stacked[2], alone)
    assert torch.equal(alone[:, 2], scores.argmax(-1) == target)


@pytest.mark.parametrize("call, says", [
    (lambda: hits(torch.zeros(1, 9), torch.tensor([0]), (10,), generator(0)),
    "10 candidates asked for, but only 9 are available"),
    (lambda: hits(torch.zeros(1, 9), torch.tensor([0]), (1,), generator(0)),
    "number of candidates must be at least 2, got 1"),
    (lambda: draw_distractors(torch.tensor([0]), 9, 9, generator(0)),
    "10 candidates asked for, but only 9 are available"),
    (lambda: split(10, dict(train=8, test=3), generator(0)), "need 11 items, but there are 10"),
    (lambda: split(10, dict(train=10, test=0), generator(0)), "split 'test' must be at least 1, got 0"),
    (lambda: draw_distinct(5, 6, generator(0)), "cannot draw 6 distinct items out of 5"),
    (lambda: ObjectWorld(0, 4), "n_attributes must be at least 1, got 0"),
    (lambda: ObjectWorld(4, 4).ids(torch.tensor([[0, 0, 0, 4]])), "must lie in 0 … 3"),
])
def test_bad_games_are_named(call, says):
    with pytest.raises(ConfigError, match=says): call()


def test_unique_messages():
    assert n_unique(torch.tensor([[[1, 2]], [[1, 2]], [[2, 1]]])) == 2

"min|M| against the listing of the paper, a SAT solver and brute force, on every backend."
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refcomm.core import ConfigError
from refcomm.sms import backends, complexity
from refcomm.sms.complexity import UNDECIDABLE, identifying_set, identifying_sets, min_symbols, solve_min_sym

BACKENDS = ["numpy", "numba", "torch"]


def draw(seed, batch, n_distractors, n_attributes, differs=None, n_values=4):
    "Uniform games, or games whose distractors differ in each attribute with probability `differs`."
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, n_values, (batch, n_attributes))
    if differs is None: return targets, rng.integers(0, n_values, (batch, n_distractors, n_attributes))
    shift = (rng.random((batch, n_distractors, n_attributes)) < differs) * rng.integers(1, n_values,
        (batch, n_distractors, n_attributes))
    return targets, (targets[:, None] + shift) % n_values


def as_dicts(targets, distractors):
    return ([dict(enumerate(t)) for t in targets.tolist()],
        [[dict(enumerate(x)) for x in d] for d in distractors.tolist()])


def listing(targets, distractors): return [solve_min_sym(t, [t, *d]) for t, d in zip(*as_dicts(targets, distractors))]


def hits(sets, targets, distractors):
    "Whether each set tells every distractor that is no copy from the target."
    differs = distractors != targets[:, None]
    return ((differs & sets[:, None]).any(-1) | ~differs.any(-1)).all(-1)


def by_sat(targets, distractors):
    "Minimum hitting sets from python-sat."
    from pysat.examples.hitman import Hitman
    answers = []
    for t, x in zip(targets, distractors):
        with Hitman(bootstrap_with=[np.flatnonzero(d != t).tolist() for d in x if (d != t).any()], htype="sorted") as h:
            answers.append(len(h.get() or [0]))
    return answers


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_listing(backend):
    for n_attributes, n_distractors, differs in itertools.product((1, 2, 4, 9), (0, 1, 7, 63, 64, 65, 130),
        (None, .15, .4)):
        games = draw(n_attributes, 6, n_distractors, n_attributes, differs)
        expected = listing(*games)
        assert min_symbols(*games, copies="drop", backend=backend).tolist() == expected
        copies = (games[1] == games[0][:, None]).all(-1).any(-1)
        assert min_symbols(*games, backend=backend).tolist() == np.where(copies, UNDECIDABLE, expected).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_attributes,n_distractors,differs",
    [(20, 63, .477), (20, 63, .3), (20, 63, .18), (20, 63, None), (24, 200, .6), (50, 63, .5), (70, 40, .3),
    (100, 20, .3)])
def test_a_sat_solver_and_a_witness(backend, n_attributes, n_distractors, differs):
    games = draw(1, 12 if n_attributes <= 64 else 4, n_distractors, n_attributes, differs)
    sizes = min_symbols(*games, copies="drop", backend=backend)
    assert sizes.tolist() == by_sat(*games)
    sets = identifying_set(*games, copies="drop", backend=backend)
    assert sets.dtype == bool and hits(sets, *games).all() and (sets.sum(1) == sizes).all()
    flagged = min_symbols(*games, backend=backend) == UNDECIDABLE
    assert (identifying_set(*games, backend=backend).any(1) == ~flagged).all()


@pytest.mark.parametrize("m", range(3, 11))
def test_known_answers(m):
    "Attributes in m blocks, and for each block a distractor that differs in the whole block: m symbols, one from each."
    n, block = 20, np.arange(20) % m
    distractors = np.stack([block == k for k in range(m)]
        + [(block == k % m) | (block == (k + 1) % m) for k in range(60)])
    for backend in BACKENDS:
        assert min_symbols(np.zeros((3, n), int), np.stack([distractors.astype(int)]*3),
            backend=backend).tolist() == [m]*3


@st.composite
def any_games(draw_one):
    a, d, batch = draw_one(st.integers(1, 7)), draw_one(st.integers(0, 12)), draw_one(st.integers(1, 3))
    return draw(draw_one(st.integers(0, 2**32 - 1)), batch, d, a, draw_one(st.sampled_from([None, .2, .5])),
        draw_one(st.integers(2, 4)))


@settings(max_examples=60)
@given(any_games(), st.randoms(use_true_random=False), st.sampled_from(["flag", "drop"]))
def test_names_and_order_do_not_matter(games, random, copies):
    targets, distractors = games
    sizes = min_symbols(targets, distractors, copies)
    attributes, order = [random.sample(range(n), n) for n in distractors.shape[:0:-1]]
    assert (min_symbols(targets[:, attributes], distractors[:, :, attributes], copies) == sizes).all()
    assert (min_symbols(targets, distractors[:, order], copies) == sizes).all()
    renamed = np.array([random.sample(range(4), 4) for _ in attributes]).T
    index = np.arange(len(attributes))
    assert (min_symbols(renamed[targets, index], renamed[distractors, index], copies) == sizes).all()
    assert (min_symbols(*as_dicts(targets, distractors), copies) == sizes).all()
    twice = np.concatenate([distractors, distractors], 1)
    assert (min_symbols(targets, twice, copies) == sizes).all()


@settings(max_examples=60)
@given(any_games())
def test_another_distractor_never_lowers_it(games):
    targets, distractors = games
    sizes = [min_symbols(targets, distractors[:, :n], "drop") for n in range(distractors.shape[1] + 1)]
    assert (np.diff(sizes, axis=0) >= 0).all() and (sizes[0] == 1).all() and (sizes[-1] <= targets.shape[1]).all()


@settings(max_examples=60)
@given(any_games())
def test_all_sets_are_all_there_are(games):
    sets = identifying_sets(*games, copies="drop")
    for found, t, x, size in zip(sets, *games, min_symbols(*games, copies="drop")):
        subsets = np.array(list(itertools.product([True, False], repeat=len(t))))
        n = len(subsets)
        fits = hits(subsets, np.repeat(t[None], n, 0), np.repeat(x[None], n, 0)) & subsets.any(1)
        assert size == subsets[fits].sum(1).min()
        assert found.tolist() == subsets[fits & (subsets.sum(1) == size)].tolist()
    flagged = min_symbols(*games) == UNDECIDABLE
    assert [len(s) == 0 for s in identifying_sets(*games)] == flagged.tolist()


def test_all_sets_of_a_large_game():
    targets, distractors = draw(2, 1, 63, 20, .477)
    found, = identifying_sets(targets, distractors, copies="drop")
    size, = min_symbols(targets, distractors, copies="drop")
    differs = distractors[0] != targets[0]
    differs = differs[differs.any(1)]
    every = [c for c in itertools.combinations(range(20), size) if differs[:, list(c)].any(1).all()]
    assert [tuple(np.flatnonzero(s)) for s in found] == every and len(every) > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_thousand_distractors(backend):
    "Easy: each differs in one of two attributes. Hard: each differs in one pair of 20, so all but one must be named."
    easy = np.random.default_rng(0).integers(0, 2, (1, 100_000, 20), np.uint8)
    easy[..., 7] = 1 - easy[..., 3]
    assert min_symbols(np.zeros((1, 20), np.uint8), easy, backend=backend) == [2]
    if backend == "torch": return # the hard ones are numpy's
    pairs = np.array([[i in c for i in range(20)] for c in itertools.combinations(range(20), 2)], np.uint8)
    distractors = np.tile(pairs, (527, 1))[None, :100_000]
    assert min_symbols(np.zeros((1, 20), np.uint8), distractors, backend=backend) == [19]
    alone = np.eye(20, dtype=np.uint8)[None]
    assert min_symbols(np.zeros((1, 20), np.uint8), np.concatenate([distractors, alone], 1), backend=backend) == [20]


def test_random_games_of_many_candidates():
    targets, distractors = draw(5, 2, 1000, 20)
    expected = by_sat(targets, distractors)
    for backend in BACKENDS: assert min_symbols(targets, distractors, backend=backend).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_tensors_in_tensors_out(dtype):
    targets, distractors = draw(0, 30, 20, 8, .4)
    expected = min_symbols(targets, distractors)
    for backend in ["auto", *BACKENDS]:
        games = torch.tensor(targets).to(dtype), torch.tensor(distractors).to(dtype)
        found, sets = min_symbols(*games, backend=backend), identifying_set(*games, backend=backend)
        assert found.dtype == torch.int64 and found.tolist() == expected.tolist()
        assert sets.dtype == torch.bool and (sets.sum(1) == found.clamp(min=0)).all()
    every = identifying_sets(*games)
    assert all(isinstance(s, torch.Tensor) and s.dtype == torch.bool for s in every)
    assert min_symbols(targets, distractors).dtype == np.int64 and min_symbols(targets, distractors,
        backend="torch").dtype == np.int64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    for differs in (None, .477, .18):
        targets, distractors = draw(0, 2000, 63, 20, differs)
        found = min_symbols(torch.tensor(targets).cuda(), torch.tensor(distractors).cuda())
        assert found.is_cuda and found.tolist() == min_symbols(targets, distractors).tolist()


def test_auto_takes_numba_for_much_work(monkeypatch):
    "At once, or one game after the other once numpy has spent what numba takes to load; which set is found does not depend on that."
    taken = []
    for name in BACKENDS:
        monkeypatch.setitem(complexity.BACKENDS, name, lambda t, d, name=name: taken.append(name)
            or (np.ones(t.shape, bool), np.zeros(len(t), bool)))
    monkeypatch.setattr(complexity, "automatic", auto := complexity.Automatic())
    few, many = draw(0, 2, 63, 20), (np.zeros((7000, 20), np.uint8), np.ones((7000, 63, 20), np.uint8))
    min_symbols(*few); min_symbols(*many)
    auto.spent = auto.load
    min_symbols(*few); identifying_set(*few)
    monkeypatch.setattr(complexity, "have_numba", lambda: False)
    min_symbols(*many)
    assert taken == ["numpy", "numba", "numba", "numpy", "numpy"]


@pytest.mark.parametrize("n_attributes, n_distractors, differs", [(1, 3, .5), (7, 0, .5), (12, 200, .3), (33, 70, .12),
    (63, 65, .06), (64, 64, .05), (20, 300, .45)])
def test_compiled_loops_find_what_numpy_finds(n_attributes, n_distractors, differs):
    targets, distractors = draw(5, 30, n_distractors, n_attributes, differs)
    a, b = (identifying_set(targets, distractors, "drop", backend) for backend in ("numpy", "numba"))
    assert (a.sum(1) == b.sum(1)).all()
    apart = distractors != targets[:, None]
    for sets in (a, b): assert ((apart & sets[:, None]).any(2) | ~apart.any(2)).all()
    bounds = complexity.symbol_bounds(targets[:5], distractors[:5], "drop", 60)
    assert (bounds.low == a[:5].sum(1)).all() and (bounds.high == bounds.low).all()
    assert ((apart[:5] & bounds.sets[:, None]).any(2) | ~apart[:5].any(2)).all()


@pytest.mark.parametrize("numba", [True, False])
def test_bounds_hold_whenever_the_time_is_over(monkeypatch, numba):
    if not numba: monkeypatch.setattr(backends, "have_numba", lambda: False)
    targets, distractors = draw(1, 3, 150, 24, .25)
    truth = min_symbols(targets, distractors, "drop", "numba")
    for seconds in (0, 1e-3, 60):
        low, high, sets = complexity.symbol_bounds(targets, distractors, "drop", seconds)
        assert (low <= truth).all() and (truth <= high).all() and (sets.sum(1) == high).all()
        apart = distractors != targets[:, None]
        assert ((apart & sets[:, None]).any(2) | ~apart.any(2)).all()
    assert (low == high).all()


def test_numba_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(complexity, "automatic", complexity.Automatic())
    backends._compiled.cache_clear()
    with pytest.raises(ConfigError, match=r"backend 'numba' needs numba: pip install 'refcomm\[fast\]'"):
        min_symbols(*draw(0, 2, 3, 4), backend="numba")
    assert len(min_symbols(*draw(0, 2, 3, 4))) == 2


def test_the_input_is_left_as_it_is():
    targets, distractors = draw(0, 50, 63, 20, .3)
    before = targets.copy(), distractors.copy()
    for backend in BACKENDS: min_symbols(targets, distractors, backend=backend)
    assert (targets == before[0]).all() and (distractors == before[1]).all()
    strided = np.asfortranarray(distractors)
    for backend in BACKENDS:
        assert (min_symbols(targets, strided, backend=backend) == min_symbols(targets, distractors)).all()
    mixed = targets.astype(np.uint8), distractors
    for backend in BACKENDS: assert (min_symbols(*mixed, backend=backend) == min_symbols(targets, distractors)).all()


@pytest.mark.parametrize("targets,distractors,says", [
    (np.zeros((0, 4), int), np.zeros((0, 3, 4), int), "the number of games must be at least 1, got 0"),
    ([], [], "the number of games must be at least 1, got 0"),
    (np.zeros((2, 0), int), np.zeros((2, 3, 0), int), "n_attributes must be at least 1, got 0"),
    ([{}], [[{}]], "n_attributes must be at least 1, got 0"),
    ([dict(a=1)], [[dict(b=1)]], "attributes b, expected a"),
    ([dict(a=1)], [[dict(a=1, b=1)]], "attributes a, b, expected a"),
    ([dict(a=1), dict(a=1)], [[dict(a=2)]], "2 targets, but distractors for 1 games"),
    (np.zeros((2, 4), int), np.zeros((2, 3, 5), int), r"got \[2, 4\] and \[2, 3, 5\]"),
    (np.zeros((2, 4), int), np.zeros((3, 3, 4), int), r"got \[2, 4\] and \[3, 3, 4\]"),
    (np.zeros(4, int), np.zeros((3, 4), int), r"got \[4\] and \[3, 4\]"),
    (np.zeros((1, 4)), np.zeros((1, 3, 4)), "must be integers, got float64"),
    (np.zeros((1, 4), bool), np.zeros((1, 3, 4), bool), "must be integers, got bool"),
    (torch.zeros(1, 4), torch.zeros(1, 3, 4), "must be integers, got float32"),
    (np.zeros((1, 4), int), np.full((1, 3, 4), -1), "at least 0, got -1"),
    (np.full((1, 4), -2), np.zeros((1, 3, 4), int), "at least 0, got -2"),
    (torch.full((1, 4), -2), torch.zeros(1, 3, 4).long(), "at least 0, got -2"),
    (np.zeros((1, 4), int), torch.zeros(1, 3, 4).long(), "targets are ndarray, distractors Tensor"),
    (np.zeros((1, 4), int), None, "targets are ndarray, distractors NoneType"),
    ("red", "blue", "targets are str"),
    ([dict(a=1)], [dict(a=2)], "game 0 has 'a' for an object, expected a dict"),
])
def test_bad_games_are_refused(targets, distractors, says):
    for function in (min_symbols, identifying_set, identifying_sets):
        with pytest.raises(ConfigError, match=says): function(targets, distractors)


def test_bad_settings_are_refused():
    games = draw(0, 2, 3, 4)
    with pytest.raises(ConfigError, match="unknown copies 'flags': did you mean 'flag'"):
        min_symbols(*games, copies="flags")
    with pytest.raises(ConfigError, match="unknown backend 'numppy': did you mean 'numpy'"):
        min_symbols(*games, backend="numppy")

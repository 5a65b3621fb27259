"Theory and samplers of min|M| against enumeration, brute force and statistics; files of games."
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare

from refcomm.core import ConfigError, generator
from refcomm.sms.complexity import min_symbols, solve_min_sym
from refcomm.sms.datasets import SPLITS, load_games, picture_world, render_games, save_games
from refcomm.sms.sampling import METHODS, controlled_games, covariates, sample_games, tilt
from refcomm.sms.theory import (extreme_game, dominant_symbols, feasible, log_p_class, log_p_some_class, p_some_class,
    schonheim,
                                uniform_law)


def solve(differs):
    return min_symbols(np.zeros_like(differs[:, 0]), differs)


def every_game(n_attributes, n_distractors):
    objects = list(itertools.product([0, 1], repeat=n_attributes))[1:]
    return np.array(list(itertools.product(objects, repeat=n_distractors)))


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 30))
def test_equation_1_is_the_binomial_tail(m, n, v):
    exact = sum(Fraction(math.comb(n, k)) * Fraction(v - 1)**(n - k) for k in range(m, n + 1)) / Fraction(v)**n
    assert math.exp(log_p_class(m, n, v)) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)
    some = 1 - (1 - exact)**v
    assert math.exp(log_p_some_class(m, n, v)) == pytest.approx(float(some), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("m, n, v", [(1, 10**6, 10**6), (2, 10**6, 10), (10**6, 10**6, 2), (5, 10**6, 10**6),
    (900, 1000, 10**6), (2, 2, 10**6)])
def test_large_worlds_give_logarithms_of_probabilities(m, n, v):
    one, some = log_p_class(m, n, v), log_p_some_class(m, n, v)
    assert math.isfinite(one) and one <= some <= min(0, one + math.log(v)) + 1e-9


@pytest.mark.parametrize("n, v", [(4, 3), (6, 2), (5, 4)])
def test_the_exact_birthday_probability_is_the_count(n, v):
    most = np.array([max(map(c.count, c)) for c in itertools.product(range(v), repeat=n)])
    for m in range(1, n + 2):
        assert p_some_class(m, n, v) == pytest.approx((most >= m).mean(), abs=1e-12)


@pytest.mark.parametrize("a, k", [(2, 1), (2, 3), (4, 2), (4, 3)])
@pytest.mark.parametrize("s", [1, 2, 3])
def test_feasible_is_what_occurs(a, k, s):
    games = every_game(a, k)
    games = games[(games.sum(-1) >= s).all(-1)]
    occurs = set(solve(games).tolist()) if len(games) else set()
    for m in range(a + 2):
        answer = feasible(m, a, 2, k, min_hamming=s)
        assert bool(answer) == (m in occurs) or not answer.certain
        assert bool(answer) or answer.reason


@pytest.mark.parametrize("s", [1, 2, 3, 4])
def test_the_extreme_game_has_its_min_symbols_and_one_less_is_refused(s):
    for a in range(s, 11):
        for m in range(1, a - s + 2):
            game = extreme_game(m, a, s)
            assert solve(game[None])[0] == m and (game.sum(1) == s).all()
            assert len(game) >= schonheim(a, a - s, m - 1)
            assert feasible(m, a, 2, len(game), s).certain
            if s < 3:
                assert len(game) == schonheim(a, a - s, m - 1) and (len(game) == 1
                    or not feasible(m, a, 2, len(game) - 1, s))


@pytest.mark.parametrize("a, k", [(3, 2), (3, 4), (4, 3)])
def test_bounds_of_the_law_hold_where_all_games_are_listed(a, k):
    exact = np.bincount(solve(every_game(a, k)), minlength=a + 1)[1:].cumsum() / (2**a - 1)**k
    law = uniform_law(a, 2, k)
    assert (law.lower <= exact + 1e-9).all() and (exact <= law.upper + 1e-9).all()
    assert law.estimate.iloc[-1] == 1 and law.share.sum() == pytest.approx(1)
    assert abs(law.estimate - exact).max() < .1


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(2, 50), st.integers(1, 5000))
def test_the_law_is_a_distribution_for_any_world(a, v, k):
    law = uniform_law(a, v, k)
    assert np.isfinite(law.to_numpy()).all() and (law.share >= 0).all() and law.share.sum() == pytest.approx(1)
    assert (law.lower <= law.upper + 1e-12).all() and 1 <= dominant_symbols(a, v, k) <= a


def quick(method, sweeps=5):
    return dict(sweeps=sweeps) if method == "metropolis" else {}


WORLDS = [(6, 3, 8), (20, 4, 63), (3, 2, 3), (8, 128, 5), (8, 256, 5)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("a, v, k", WORLDS)
def test_every_game_has_the_min_symbols_asked_for(method, a, v, k):
    for m in {"uniform": [dominant_symbols(a, v, k)]}.get(method, range(1, 3 if a == 20 else min(a, k) + 1)):
        games = sample_games(7, m, method, a, v, k, generator=generator(m, method), **quick(method))
        assert games.targets.shape == (7, a) and games.distractors.shape == (7, k, a)
        assert games.targets.dtype == games.distractors.dtype == torch.uint8 and int(games.distractors.max()) < v
        for target, distractors in zip(games.targets.tolist(), games.distractors.tolist()):
            images = [dict(enumerate(d)) for d in distractors]
            assert target not in distractors
            assert solve_min_sym(dict(enumerate(target)), images) == m


@pytest.mark.parametrize("method", METHODS)
def test_equal_generators_give_equal_games_and_one_generator_moves_on(method):
    source = generator(0, "same")
    first, second = (sample_games(20, 2, method, 4, 3, 5, generator=source, **quick(method)) for _ in range(2))
    again = sample_games(20, 2, method, 4, 3, 5, generator=generator(0, "same"), **quick(method))
    assert torch.equal(first.distractors, again.distractors) and not torch.equal(first.distractors, second.distractors)


def game_counts(games):
    "How often each game of 2 attributes, 3 values and 2 distractors occurs, values and all."
    digits = torch.cat([games.targets[:, None], games.distractors], 1).flatten(1).long()
    return (digits * 3**torch.arange(6)).sum(1).bincount(minlength=3**6).numpy()


def chance_of_each_game():
    games = torch.cartesian_prod(*[torch.arange(3)]*6).flip(1)
    t, d = games[:, :2], games[:, 2:].view(-1, 2, 2)
    return min_symbols(t, d).numpy(), (d != t[:, None]).sum((1, 2)).numpy()


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("method", ["uniform", "metropolis"])
def test_every_game_is_equally_likely_values_and_all(method, m):
    wanted = chance_of_each_game()[0] == m
    counts = game_counts(sample_games(30_000, m, method, 2, 3, 2, generator=generator(m, method), **quick(method)))
    assert counts[~wanted].sum() == 0 and chisquare(counts[wanted]).pvalue > 1e-3


@pytest.mark.parametrize("m", [1, 2])
def test_tilted_games_of_equal_distance_are_equally_likely(m):
    solved, hamming = chance_of_each_game()
    counts = game_counts(sample_games(30_000, m, "tilted", 2, 3, 2, generator=generator(m, "tilted")))
    for h in np.unique(hamming[solved == m]):
        assert chisquare(counts[(solved == m) & (hamming == h)]).pvalue > 1e-3


def test_metropolis_agrees_with_rejection_where_rejection_reaches():
    setting = dict(n_attributes=8, n_values=3, n_distractors=12)
    by = {method: sample_games(3000, 3, method, **setting, generator=generator(0, method), **quick(method, 15))
        for method in ("uniform", "metropolis", "planted")}
    mean = {method: games.differs.double().sum((1, 2)) for method, games in by.items()}
    z = lambda a, b: abs(mean[a].mean() - mean[b].mean()) / math.sqrt((mean[a].var() + mean[b].var()) / 3000)
    assert z("uniform", "metropolis") < 4 < z("uniform", "planted")


def test_algorithm_2_fills_all_shelves_out_of_one_stream():
    shelves = controlled_games(50, (1, 2, 3), 6, 3, 10, generator=generator(0))
    assert {m: set(min_symbols(g.targets, g.distractors).tolist()) for m, g in shelves.items()} == {1: {1}, 2: {2},
        3: {3}}
    assert all(len(g.targets) == 50 for g in shelves.values())


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_tilt_is_a_probability_for_every_feasible_game(data):
    a, k = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 100))
    assert 0 < tilt(data.draw(st.integers(1, min(a, k))), a, 4, k) < 1


@pytest.mark.parametrize("change, why", [
    (dict(m=5), r"min\|M\| ≤ 4, not 5"), (dict(m=4, n_distractors=3), "at least 4 distractors, got 3"),
    (dict(m=0), "m must be at least 1"),
    (dict(n_distractors=0), "n_distractors must be at least 1, got 0"),
    (dict(n_values=1), "n_values must be at least 2, got 1"),
    (dict(n_values=257), "n_values must be at most 256"), (dict(n=0), "n must be at least 1, got 0"),
    (dict(n_attributes=0), "n_attributes must be"),
    (dict(method="planed"), "did you mean 'planted'"), (dict(sweeps=2), "unknown option of method 'tilted'"),
    (dict(method="metropolis", sweeps=0), "sweeps must be at least 1"),
    (dict(method="uniform", n_attributes=20, n_distractors=63, m=6), "use method='tilted'"),
    (dict(n=1000, max_draws=100), "max_draws = 100"),
])
def test_what_cannot_be_drawn_is_refused(change, why):
    with pytest.raises(ConfigError, match=why) as e:
        sample_games(**dict(dict(n=5, m=2, n_attributes=4, n_values=3, n_distractors=5, generator=generator(0)),
            **change))
    assert "\n" not in str(e.value)


def test_covariates_are_the_obvious_counts():
    games = sample_games(40, 2, "planted", 3, 2, 6, generator=generator(0))
    h = [[sum(a != b for a, b in zip(t, d)) for d in ds]
        for t, ds in zip(games.targets.tolist(), games.distractors.tolist())]
    repeated = [1 - len(set(map(tuple, ds)))/6 for ds in games.distractors.tolist()]
    expected = dict(hamming=np.mean(h), singletons=np.mean(np.array(h) == 1))
    found = covariates(games)
    assert {k: found[k]
        for k in expected} == pytest.approx(expected) and found["repeated"]*5/6 == pytest.approx(np.mean(repeated))


@settings(max_examples=15, deadline=None)
@given(a=st.integers(1, 5), v=st.sampled_from([2, 3, 256]), k=st.integers(1, 6), n=st.integers(1, 9),
    share=st.floats(0, 1))
def test_a_file_gives_back_what_it_was_given(tmp_path_factory, a, v, k, n, share):
    games = sample_games(n, 1, "planted", a, v, k, generator=generator(n))
    path = save_games(tmp_path_factory.mktemp("games")/"g.parquet", games, int(share*n), method="planted", seed=n)
    parts = [load_games(path, part) for part in (None, *SPLITS)]
    for (got, about), rows in zip(parts, (slice(None), slice(int(share*n)), slice(int(share*n), None))):
        assert torch.equal(got.targets, games.targets[rows]) and torch.equal(got.distractors, games.distractors[rows])
        assert (about["method"] == "planted" and about["seed"] == n and (about["min_symbols"] == 1).all()
            and got.n_values == v)


@pytest.fixture
def file(tmp_path):
    return save_games(tmp_path/"games.parquet", sample_games(10, 2, "planted", 4, 3, 5, generator=generator(0)), seed=0)


def test_datasets_reads_the_file_without_a_network(file, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(tmp_path/"cache"))["train"]
    games, about = load_games(file)
    assert torch.tensor(rows["distractors"][:]).equal(games.distractors.long()) and rows["min_symbols"][:] == [2]*10
    assert rows["split"][:] == ["train"]*8 + ["eval"]*2


def test_a_file_is_written_whole_or_not_at_all(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(pq, "write_table", lambda table, path, **kwargs: path.write_bytes(b"half") and 1/0)
    with pytest.raises(ZeroDivisionError):
        save_games(file, load_games(file)[0])
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


def rewritten(file, change):
    table = change(pq.read_table(file))
    pq.write_table(table, file)
    return file


def with_about(**change):
    def edit(table):
        about = json.loads(table.schema.metadata[b"refcomm.games"]) | change
        return table.replace_schema_metadata({"refcomm.games": json.dumps({k: v for k, v in about.items()
            if v is not None})})
    return edit


@pytest.mark.parametrize("change, why", [
    (with_about(n_values=2), "holds the value 2, but values must lie in 0 … 1"),
    (with_about(n_attributes=5), "another shape or type"),
    (with_about(n_distractors=None), "not one of games"),
    (lambda t: t.replace_schema_metadata(None), "not one of games"),
    (lambda t: t.replace_schema_metadata({"refcomm.games": "{"}), "not one of games"),
    (lambda t: t.drop_columns(["split"]), "not one of games"),
    (lambda t: t.set_column(0, "target", pa.array([[0, 1, 2, -1]]*10)), "another shape or type"),
    (lambda t: t.set_column(0, "target", pa.array(["abcd"]*10)), "another shape or type"),
    (lambda t: t.set_column(0, "target", pa.array([[0, 1, 2]]*10, pa.list_(pa.uint8()))), "another shape or type"),
])
def test_a_file_that_contradicts_itself_is_refused(file, change, why):
    with pytest.raises(ConfigError, match=why) as e:
        load_games(rewritten(file, change))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b)//2], lambda b: b"", lambda b: b[:40] + bytes(200) + b[240:]])
def test_a_damaged_file_is_refused(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match="make it again") as e:
        load_games(file)
    assert "\n" not in str(e.value)


def test_pictures_differ_where_the_games_do():
    games = sample_games(6, 3, "planted", 5, 5, 4, generator=generator(0))
    images = render_games(games, picture_world(5, 5, size=32))
    assert images.shape == (6, 5, 3, 32, 32)
    candidates = torch.cat([games.targets[:, None], games.distractors], 1)
    same = lambda x: (x[:, :, None] == x[:, None]).flatten(3).all(-1)
    assert torch.equal(same(images), same(candidates))

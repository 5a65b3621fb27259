"What is the user's own: tables, agents, bottlenecks, metrics, callbacks, tasks; each at one argument, refused before a training."
import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from refcomm.core import ConfigError
from refcomm.games.tasks import Games, ItemTask, Task
from refcomm.keep import load_game
from refcomm.own import load_objects, make_game, posdis, referential, sweep, topsim, train, trial
from refcomm.runs.store import Store
from refcomm.core import generator

TABLE = pd.DataFrame(itertools.product("abcd", "xyz", "1234"), columns=["letter", "end", "number"])
W = torch.randn(11, 8, generator=generator(0))
NAMELESS = referential(W.expand(4, -1, -1).flatten(0, 1), 3) # objects without attributes


@pytest.fixture(scope="module")
def task(): return referential(load_objects(TABLE), distractors=4, valid=8, test=12)


@pytest.mark.parametrize("text, sizes", [
    ("letter\na\nb\nc\n", [3]), # a sniffer takes a letter of the header for the delimiter
    ('kind,"size, in cm"\n"grey, light",1\nred,2\n', [2, 2]),
    ('"a, b";c\nx;y\nu;v\n', [2, 2]), ("a\tb\nx\ty\nu\tv\n", [2, 2]), ("\ufeffa,b\nx,y\nu,v\n", [2, 2]),
])
def test_delimiters_come_from_the_header(tmp_path, text, sizes):
    (tmp_path/"t.csv").write_text(text, encoding="utf-8")
    found = load_objects(tmp_path/"t.csv")
    assert [len(k) for k in found.kinds] == sizes and not found.names[0].startswith("\ufeff")


@pytest.mark.parametrize("raw, says", [
    (b"a,b\nx,y,z\nu,v,w\n", "more entries than its header names"),
    ("a,b\nnäh,x\n".encode("latin1"), "save it as UTF-8"),
    (b"", "No columns to parse"), (b"a,b\n1,2\n3,4,5\n", "Expected 2 fields"),
    (b"a,b\nx,\nu,v\n", "column 'b' has no value in row 0"),
])
def test_files_that_are_no_tables(tmp_path, raw, says):
    (tmp_path/"t.csv").write_bytes(raw)
    with pytest.raises(ConfigError, match=says): load_objects(tmp_path/"t.csv")


def test_columns_that_no_message_can_carry_are_named():
    measured = TABLE.assign(weight=np.arange(48) % 40 / 10, kind="bird")
    with pytest.warns(UserWarning) as said: load_objects(measured)
    assert any("'weight' holds 40 different numbers" in str(w.message) for w in said)
    assert any("'kind' is the same in every row" in str(w.message) for w in said)
    assert all(w.filename == __file__ for w in said) # the line of the user's own program
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_objects(measured.drop(columns="kind"), bins=dict(weight=3))


@pytest.mark.parametrize("make, says", [
    (lambda t: load_objects(TABLE, "letter"), r"write \['letter'\]"),
    (lambda t: load_objects(TABLE, bins=5), "a column's name and a number each"),
    (lambda t: load_objects(TABLE.assign(n=range(48)), bins=dict(n=2.5)),
    "bins of 'n' must be a whole number, got 2.5"),
    (lambda t: load_objects(7), "a table is a DataFrame"),
    (lambda t: load_objects(TABLE, columms=[]), "did you mean 'columns'"),
    (lambda t: referential(TABLE), "from load_objects"), (lambda t: referential("t.csv"), "from load_objects"),
    (lambda t: referential(torch.full((40, 2), torch.inf), 3), "NaN or infinity"),
    (lambda t: referential(W, distractors=2.5), "a whole number, got 2.5"),
    (lambda t: referential(load_objects(TABLE), 4, valid=1.), "a share of the objects"),
    (lambda t: referential(load_objects(TABLE), 4, test="8"), "test must be"),
    (lambda t: make_game(t, alphabet_size=2.5), "alphabet_size must be a whole number"),
    (lambda t: make_game(t, length_cost=-1), "at least 0, got -1"),
    (lambda t: make_game(t, warmup=.5, length_cost=.1), "warmup must be a tuple"),
    (lambda t: make_game(t, temprature=1), "nor has the bottleneck 'gumbel': did you mean 'temperature'"),
    (lambda t: make_game(t, straight_through="no"), "straight_through must be True or False"),
    (lambda t: make_game(t, bottleneck="vq", temperature=1), "cannot be made of"),
    (lambda t: make_game(t, heads=2), "no argument 'heads'"),
    (lambda t: make_game(t, ends=False, length_cost=.1), "leave out ends=False"),
    (lambda t: make_game(t, sender="x"), "a sender is a module or a function"),
    (lambda t: make_game(t, receiver=nn.Linear(3, 128)), "the receiver does not take its input of shape"),
    (lambda t: make_game(t, channel=nn.Linear(2, 2)), "a channel has `dim`, `send` and `receive`"),
    (lambda t: make_game(t, draws="yes"), "draws must be True or False"),
    (lambda t: make_game(t, bottleneck=nn.Linear(10, 4)), r"a word of shape \[4\] of 10 numbers"),
    (lambda t: make_game(lambda: 0), "a task is made by `referential`"),
    (lambda t: train(None, t), "a game is made by `make_game`"),
    (lambda t: train(make_game(t), None), "a task is made by"), (lambda t: train(t, make_game(t)), "a game is made by"),
    (lambda t: trial(make_game(t), t, patience=0), "patience must be at least 1"),
    (lambda t: trial(make_game(t), t, on_step=3), "on_step is a function"),
    (lambda t: trial(make_game(t), t, metrics=[3]), "a metric is a function"),
    (lambda t: trial(make_game(t), t, metrics=["topsimm"]), "did you mean 'topsim'"),
    (lambda t: trial(make_game(t), t, metrics=[lambda m, v: 1., lambda m, v: 2.]), "2 metrics are called '<lambda>'"),
    (lambda t: trial(make_game(t, bottleneck="continuous"), t, metrics=[topsim]), "this game has no symbols"),
    (lambda t: trial(make_game(NAMELESS), NAMELESS, metrics=topsim),
    "this game has no attributes"),
])
def test_what_cannot_be_is_refused_before_a_training(task, make, says):
    with pytest.raises(ConfigError, match=says): make(task)


class Half(nn.Module):
    def forward(self, x): return torch.sigmoid(x), (x > 0).long()
class Counted:
    def __call__(self, messages, meanings, lengths): return lengths.float().mean()
class Longest(nn.Module):
    def forward(self, messages, meanings, **more): return more["lengths"].max()
def looked(x): return (x @ W).tanh()
def spread(x): return x.tanh()
def most(messages, meanings): return messages.max()


@pytest.mark.parametrize("how", [
    dict(sender=looked), dict(receiver=looked),
    dict(sender=nn.Sequential(nn.Linear(11, 8), nn.ReLU()), receiver=nn.Sequential(nn.Linear(11, 8), nn.Tanh())),
    dict(bottleneck=spread, word_length=4),
    dict(bottleneck=Half(), word_length=4, alphabet_size=2, metrics=[topsim, most]),
    dict(bottleneck=Half(), word_length=4, alphabet_size=2, length_cost=.1, metrics=[Counted(), Longest(), "posdis"]),
    dict(length_cost=.1, metrics=most),
], ids=lambda how: ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in how.items())[:60])
def test_a_part_of_ones_own_is_one_argument(task, tmp_path, how):
    "It trains, is loaded by the same call, saved, and plays the same when it is given again."
    how, metrics = dict(how), how.get("metrics", ())
    how.pop("metrics", None)
    call = lambda: train(make_game(task, hidden=8, **how), task, epochs=1, metrics=metrics,
        store=Store(tmp_path/"runs"))
    run = call()
    n_own = len(metrics) if isinstance(metrics, list) else bool(metrics)
    assert call().record.key == run.record.key and len(run.metrics) == 3 + bool(how.get("length_cost")) + n_own
    again = load_game(run.save(tmp_path/"game"), dict(looked=looked, spread=spread, Half=Half))
    x = task.seen("test")
    with torch.no_grad():
        assert torch.equal(again.scores(again.send(x).word, x), run.game.scores(run.game.send(x).word, x))
    if {*map(type, how.values())} & {type(looked), Half}:
        with pytest.raises(ConfigError, match="which is not of this package: give"): load_game(tmp_path/"game")


def written(text):
    "What a notebook's cell or another version of a script defines."
    cell = dict(__name__="__main__", torch=torch, nn=nn)
    exec(text, cell)
    return next(v for k, v in reversed(cell.items()) if k not in ("torch", "nn", "__builtins__"))

AGENT = """class Eye(nn.Module):
    def __init__(self):
        super().__init__(); self.net = nn.Linear(11, 8)
    def forward(self, x): return self.net(x).{}()
"""
@pytest.mark.parametrize("one, two, use", [
    (AGENT.format("relu"), AGENT.format("tanh"), lambda t, x: trial(make_game(t, hidden=8, sender=x()), t)),
    ("def see(x): return x[..., :8]", "def see(x): return x[..., 1:9]",
    lambda t, x: trial(make_game(t, hidden=8, sender=x), t)),
    ("def made(x): return x.tanh()", "def made(x): return x.sin()",
    lambda t, x: trial(make_game(t, hidden=8, bottleneck=x), t)),
    ("def score(m, v): return 1.", "def score(m, v): return 2.",
    lambda t, x: trial(make_game(t, hidden=8), t, metrics=x)),
    ("def cool(d, g): g.channel.bottleneck.temperature = 2 - d",
    "def cool(d, g): g.channel.bottleneck.temperature = 3 - d",
    lambda t, x: trial(make_game(t, hidden=8), t, on_step=x)),
], ids=["agent", "function", "bottleneck", "metric", "callback"])
def test_other_code_is_another_run(task, one, two, use):
    "A run is not taken for that of the same call with other code; code that stays makes the same key in every process."
    from refcomm.own import _spec_of
    from refcomm.runs.store import run_key
    keys = [run_key(_spec_of(use(task, x) if not isinstance(x, type) else use(task, x)))
        for x in map(written, (one, one, two))]
    weights = [_spec_of(use(task, written(one))).weights for _ in range(2)]
    if weights[0] == weights[1]: assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    plain = _spec_of(trial(make_game(task, hidden=8), task))
    assert plain.settings.count('"') == 2 + plain.settings.count('\\"') # nothing of the user's own: the key is as ever


def test_other_games_over_the_same_items_are_other_runs():
    x = torch.randn(60, 6, generator=generator(1))
    parts = dict(zip(("train", "valid", "test"), torch.arange(60).split((40, 10, 10))))
    deal = lambda n, seed=0: ItemTask(x, torch.arange(60) % 6, parts, n - 1, n, generator=generator(seed))
    from refcomm.own import _digest_of
    assert len({_digest_of(t) for t in (deal(3), deal(4),
        deal(4, 1))}) == 3 and _digest_of(deal(3)) == _digest_of(deal(3))
    loop = deal(3)
    loop.itself = loop
    assert _digest_of(loop) != _digest_of(deal(3))


class Neighbours(Task):
    n_train = 40
    def __init__(self, step): self.x, self.step = np.random.default_rng(0).random((60, 6), dtype="float32"), step
    def _dealt(self, ids):
        items = torch.as_tensor(self.x)
        return Games(items[ids], torch.zeros_like(ids), torch.stack([items[ids], items[(ids + self.step) % 60]], -2))
    def batch(self, idx, generators): return self._dealt(idx)
    def games(self, part, block=125):
        yield self._dealt(torch.arange(40, 50) if part == "valid" else torch.arange(50, 60))
    def meanings(self, part): return (torch.as_tensor(self.x[50:60, :2]) > .5).long()


def test_a_task_of_ones_own_is_one_argument(tmp_path):
    runs = [train(make_game(t := Neighbours(step), hidden=8), t, epochs=1, metrics=posdis, store=Store(tmp_path))
        for step in (1, 2, 1)]
    assert runs[0].record.key == runs[2].record.key != runs[1].record.key and runs[0].metrics["posdis"] is not None


def test_a_metric_that_fails_does_so_before_the_training(task, tmp_path):
    steps = []
    def broken(messages, meanings): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        train(make_game(task, hidden=8), task, epochs=1, metrics=broken, on_step=lambda *a: steps.append(a),
            store=Store(tmp_path))
    with pytest.raises(ConfigError, match="the metric several returned dict: a number is expected"):
        def several(messages, meanings): return {}
        train(make_game(task, hidden=8), task, epochs=1, metrics=several, on_step=lambda *a: steps.append(a),
            store=Store(tmp_path))
    assert not steps


def test_functions_of_different_members_are_not_stacked(task, tmp_path):
    "A stack has one template, whose functions would be everybody's."
    def make(at, seed=0):
        return trial(make_game(task, hidden=8, sender=lambda x: x[..., at:at + 8], seed=seed), task, epochs=3, lr=1e-2,
            seed=seed)
    found = sweep(make, dict(at=[0, 3]), store=Store(tmp_path/"a"))
    alone = [train(*make(at)[:2], epochs=3, lr=1e-2, store=Store(tmp_path/"b")) for at in (0, 3)]
    assert found.key.tolist() == [r.record.key for r in alone] and len({*found.key}) == 2
    assert found.accuracy.tolist() == [r.accuracy for r in alone]
    assert [r.provenance["trained_together"] for r in Store(tmp_path/"a").survey()[0]] == [1, 1]


def test_a_callback_measures_the_game_of_its_epoch_and_ends_the_training(task, tmp_path):
    seen, weights = [], []
    def watch(row, game):
        assert not game.training
        weights.append(game.sender.weight.detach().clone())
        seen.append(float(topsim(game.send(task.seen("valid")).symbols, task.meanings("valid"))))
        return np.bool_(row["epoch"] == 2)
    run = train(make_game(task, hidden=8), task, epochs=6, lr=1e-2, keep="last", on_epoch=watch, store=Store(tmp_path))
    assert len(seen) == len(run.history) == 3 and torch.equal(weights[-1], run.game.sender.weight)
    assert len({w.sum().item() for w in weights}) == 3
    assert len(train(make_game(task, hidden=8), task, epochs=6, lr=1e-2, keep="last",
        store=Store(tmp_path)).history) == 6


def test_one_member_that_ends_does_not_end_the_others(task, tmp_path):
    def make(seed):
        return trial(make_game(task, hidden=8, seed=seed), task, epochs=4, seed=seed,
            on_epoch=lambda row: row["epoch"] == seed)
    sweep(make, dict(seed=[0, 2]), store=Store(tmp_path))
    assert sorted(len(r.history()) for r in Store(tmp_path).survey()[0]) == [1, 3]


def test_a_stopped_training_with_a_callback_goes_on(task, tmp_path, monkeypatch):
    "A callback with one argument is told the epochs before the stop again; one that measures is not, as their weights are gone."
    monkeypatch.setenv("REFCOMM_CHECKPOINT_SECONDS", "0")
    steps, rows, games = [], [], []
    def stop(done, game):
        steps.append(done)
        if len(steps) == 7: raise KeyboardInterrupt
    def noted(row): rows.append(row["epoch"])
    def measured(row, game): games.append(row["epoch"])
    for callback in (noted, measured):
        steps.clear()
        call = lambda: train(make_game(task, hidden=8), task, epochs=3, batch_size=8, on_step=stop, on_epoch=callback,
            store=Store(tmp_path))
        with pytest.raises(KeyboardInterrupt): call()
        call()
    assert rows == [0, 0, 1, 2] and games == [0, 1, 2]


def test_a_misspelt_name_in_a_grid(task):
    def make(size, seed=0): return trial(make_game(task, hidden=size, seed=seed), task)
    with pytest.raises(ConfigError, match="make has no argument 'sizes': did you mean 'size'"):
        sweep(make, dict(sizes=[8]))
    with pytest.raises(ConfigError, match="make has no argument 'sede': did you mean 'seed'"):
        sweep(make, dict(size=[8]), sede=1)


def test_values_that_other_tasks_and_files_cannot_have(task, tmp_path):
    from refcomm.egg import load_egg
    from refcomm.games.reconstruction import Reconstruction
    with pytest.raises(ConfigError, match="valid must be"): Reconstruction(load_objects(TABLE), valid="8")
    (tmp_path/"t.csv").write_text("a,b")
    with pytest.raises(ConfigError) as e: load_egg(tmp_path/"t.csv")
    assert "is no interaction dump of EGG" in str(e.value) and "weights_only" not in str(e.value) # PyTorch's way out runs what the file says

"Stacking, early stopping and resuming change no number."
import dataclasses
import math

import pytest
import torch

from refcomm.core import ConfigError, TrainingDiverged
from refcomm.ensemble import Ensemble
from refcomm.experiments import eqc
from refcomm.runs import Context, execute
from refcomm.store import Store
from refcomm.train import TrainSettings, fit

KINDS = [dict(bottleneck="continuous"), dict(bottleneck="gumbel", alphabet_size=10, word_length=1), dict(bottleneck="quantized", alphabet_size=4),
         dict(channel="recurrent", message_length=2, bottleneck="gumbel", alphabet_size=5, word_length=1), dict(channel="recurrent", message_length=2, cell="gru"),
         dict(channel="recurrent", message_length=2, cell="lstm", bottleneck="quantized", alphabet_size=4), dict(n_negatives=9)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_stacked_equals_one_by_one(small, kind):
    specs = [small(seed=s, **kind) for s in range(3)]
    together, _ = eqc.train(specs, Context("cpu", report=lambda *_: None))
    for i, s in enumerate(specs):
        alone, _ = eqc.train([s], Context("cpu", report=lambda *_: None))
        for a, b in zip(alone.parameters(), together.parameters()): torch.testing.assert_close(a[0], b[i], atol=2e-4, rtol=1e-3)


def test_members_stop_by_their_own_patience():
    "A member that has stopped is not touched by what the others still learn."
    accuracies = {0: [.1, .5, .4, .3, .9, .9], 1: [.1, .2, .3, .4, .5, .6]}

    def best(members, patience):
        e, epoch = Ensemble([torch.nn.Linear(1, 1) for _ in members]), [-1]
        def validate():
            epoch[0] += 1
            return dict(accuracy=torch.tensor([accuracies[m][epoch[0]] for m in members]), loss=torch.zeros(len(members)))
        return fit(e, lambda i, g: e.map(lambda m: m.weight.sum()), validate, 4, TrainSettings(epochs=6, patience=patience), members, report=lambda *_: None).best_epoch
    assert best([0, 1], 2) == [1, 5] == best([0], 2) + best([1], 2)
    assert best([0, 1], 6) == [4, 5]


def test_ties_in_accuracy_go_to_the_lower_loss():
    e, losses = Ensemble([torch.nn.Linear(1, 1)]), iter([.5, .2, .3])
    result = fit(e, lambda i, g: e.map(lambda m: m.weight.sum()), lambda: dict(accuracy=torch.ones(1), loss=torch.tensor([next(losses)])), 4, TrainSettings(epochs=3), [0], report=lambda *_: None)
    assert result.best_epoch == [1]


def test_the_best_weights_are_left_in_the_ensemble(small):
    s = small(epochs=6, lr=3e-2)
    ensemble, fitted = eqc.train([s], Context("cpu", report=lambda *_: None))
    best = max(h["accuracy"] for h in fitted.history)
    assert fitted.history[fitted.best_epoch[0]]["accuracy"] == best
    world, parts = eqc.data(s)
    g = ensemble.eval().member(0)
    z = g.channel.receive(g.send(world.one_hot(parts["valid"])).word)
    assert (world.ids(eqc.EveryObject(world).best(g.receiver, z)) == parts["valid"]).float().mean().item() == pytest.approx(best)


def test_divergence_names_seed_epoch_and_way_out(small):
    with pytest.raises(TrainingDiverged, match=r"the loss of seed 5 became (nan|inf) in epoch \d.*lower lr"):
        eqc.train([small(seed=5, lr=1e30)], Context("cpu", report=lambda *_: None))


@pytest.mark.parametrize("precision", ["bf16"])
def test_reduced_precision_trains(small, precision):
    _, fitted = eqc.train([small(precision=precision, epochs=8, lr=1e-2)], Context("cpu", report=lambda *_: None))
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]


def test_learning_rate_schedule_reaches_the_optimiser():
    e = Ensemble([torch.nn.Linear(1, 1)])
    r = fit(e, lambda i, g: e.map(lambda m: m.weight.sum()), lambda: dict(accuracy=torch.ones(1), loss=torch.ones(1)), 32, TrainSettings(epochs=4, lr=1., lr_schedule="linear", lr_end=.2, batch_size=8), [0], report=lambda *_: None)
    assert [h["lr"] for h in r.history] == pytest.approx([1 - .8*(k + .75)/4 for k in range(4)])


def test_learning_beats_chance(home, small):
    "The whole path learns: 256 objects, one word of 20 quantised symbols."
    record, = execute([small(bottleneck="quantized", alphabet_size=8, epochs=30, lr=1e-2)])
    at = {r["n_candidates"]: r["accuracy"] for r in record.rows}
    assert at[256] > .8 and at[2] > .95
    assert record.summary["capacity_bits"] == 20*math.log2(8)


@pytest.mark.parametrize("fields, says", [
    (dict(word_lenght=3), "did you mean 'word_length'"), (dict(channel="instnt"), "did you mean 'instant'"), (dict(bottleneck="gumble"), "did you mean 'gumbel'"),
    (dict(bottleneck="gumbel"), "does not go with"), (dict(n_values=2), "10000 candidates asked for, but only 16"), (dict(game="objects"), "did you mean 'object'"),
])
def test_bad_specs_are_named(fields, says):
    with pytest.raises(ConfigError, match=says): eqc.EQCSpec(**fields)


@pytest.mark.parametrize("fields, says", [(dict(cell="gruu", channel="recurrent", message_length=2), "did you mean 'gru'"), (dict(precision="fp12"), "did you mean"), (dict(n_train=500), "but there are 256"),
                                          (dict(epochs=0), "epochs must be at least 1"), (dict(optimizer="adamm"), "did you mean 'adam'"), (dict(n_negatives=256), "only 256 are available"), (dict(bottleneck="gumbel", alphabet_size=4, temperature=0.), "temperature must be above 0")])
def test_what_only_building_can_tell_is_named_too(home, small, fields, says):
    with pytest.raises(ConfigError, match=says): execute([small(**fields)])
    assert Store().keys() == [] and not list(Store().root.glob("eqc/*"))

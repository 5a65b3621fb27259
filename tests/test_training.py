"Stacking, early stopping and resuming change no number."
import math

import pytest
import torch

from refcomm.core import ConfigError, TrainingDiverged
from refcomm.training.ensemble import Ensemble
from refcomm.papers.eqc import run as eqc
from refcomm.runs.execute import Context, execute
from refcomm.runs.store import Store
from refcomm.training.loop import TrainSettings, fit

KINDS = [dict(bottleneck="continuous"), dict(bottleneck="gumbel", alphabet_size=10, word_length=1),
    dict(bottleneck="quantized", alphabet_size=4),
         dict(channel="recurrent", message_length=2, bottleneck="gumbel", alphabet_size=5, word_length=1),
         dict(channel="recurrent", message_length=2, cell="gru"),
         dict(channel="recurrent", message_length=2, cell="lstm", bottleneck="quantized", alphabet_size=4),
         dict(n_negatives=9)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_stacked_equals_one_by_one(small, kind):
    specs = [small(seed=s, **kind) for s in range(3)]
    together, _ = train(specs, Context("cpu", report=lambda *_: None))
    for i, s in enumerate(specs):
        alone, _ = train([s], Context("cpu", report=lambda *_: None))
        for a, b in zip(alone.parameters(), together.parameters()):
            torch.testing.assert_close(a[0], b[i], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3], KINDS[5]], ids=lambda k: "-".join(map(str, k.values())))
def test_compiled_steps_train_the_same(small, kind, monkeypatch):
    "The step of all members, captured as one graph, forwards and backwards."
    specs = [small(seed=s, epochs=1, **kind) for s in range(2)]
    plain, _ = train(specs, Context("cpu", report=lambda *_: None))
    monkeypatch.setenv("REFCOMM_COMPILE", "aot_eager")
    quick, fitted = train(specs, Context("cpu", report=lambda *_: None))
    assert fitted.history.compiled.eq(1).all()
    for a, b in zip(plain.parameters(), quick.parameters()): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_every_training_of_a_process_is_compiled(monkeypatch):
    "More of them than PyTorch compiles one function anew."
    monkeypatch.setenv("REFCOMM_COMPILE", "eager")
    for width in range(1, 11):
        e = Ensemble([torch.nn.Linear(width, 1)])
        result = fit(e, lambda i, g: e.map(lambda m: m.weight.sum()),
            lambda: dict(accuracy=torch.ones(1), loss=torch.zeros(1)),
            4, TrainSettings(epochs=1), [0], report=lambda *_: None)
        assert result.history.compiled.tolist() == [1.]


@pytest.mark.parametrize("bottleneck, compiled", [("quantized", True), ("vq", False)])
def test_a_record_says_whether_its_steps_were_compiled(home, small, monkeypatch, capsys, bottleneck, compiled):
    "What asks for numbers in between is no graph: it is trained as it is, and one line says so."
    from refcomm.core import say_once
    spec, say = small(bottleneck=bottleneck, alphabet_size=4, epochs=2), "refcomm: training steps are not compiled: "
    monkeypatch.setenv("REFCOMM_COMPILE", "eager")
    say_once.cache_clear()
    record, = execute([spec])
    assert record.provenance["device"].endswith(", training steps compiled (eager)") == compiled
    assert record.history().compiled.tolist() == [float(compiled)]*2
    assert capsys.readouterr().err.count(say) == (not compiled)
    monkeypatch.delenv("REFCOMM_COMPILE")
    again, = execute([spec])
    assert again.key == record.key and again.provenance == record.provenance, "it is the same run"


def train(specs, context): return eqc.train(specs, eqc.make_task(specs[0]), context)


def test_members_stop_by_their_own_patience():
    "A member that has stopped is not touched by what the others still learn."
    accuracies = {0: [.1, .5, .4, .3, .9, .9], 1: [.1, .2, .3, .4, .5, .6]}

    def best(members, patience):
        e, epoch = Ensemble([torch.nn.Linear(1, 1) for _ in members]), [-1]
        def validate():
            epoch[0] += 1
            return dict(accuracy=torch.tensor([accuracies[m][epoch[0]] for m in members]),
                loss=torch.zeros(len(members)))
        return fit(e, lambda i, g: e.map(lambda m: m.weight.sum()), validate, 4,
            TrainSettings(epochs=6, patience=patience), members, report=lambda *_: None).best_epoch
    assert best([0, 1], 2) == [1, 5] == best([0], 2) + best([1], 2)
    assert best([0, 1], 6) == [4, 5]


def test_ties_in_accuracy_go_to_the_lower_loss():
    e, losses = Ensemble([torch.nn.Linear(1, 1)]), iter([.5, .2, .3])
    result = fit(e, lambda i, g: e.map(lambda m: m.weight.sum()),
        lambda: dict(accuracy=torch.ones(1), loss=torch.tensor([next(losses)])), 4, TrainSettings(epochs=3), [0],
        report=lambda *_: None)
    assert result.best_epoch == [1]


def test_the_best_weights_are_left_in_the_ensemble(small):
    s = small(epochs=6, lr=3e-2)
    ensemble, fitted = train([s], Context("cpu", report=lambda *_: None))
    best = fitted.history.accuracy.max()
    assert fitted.history.accuracy[fitted.best_epoch[0]] == best
    assert eqc.make_task(s).validate(ensemble.eval().member(0))[0].item() == pytest.approx(best)


@pytest.mark.parametrize("keep, steps", [("best", 4), ("last", 12)])
def test_which_weights_are_left(keep, steps):
    "Four steps an epoch, each by the learning rate; the first of three epochs validates best."
    e, accuracies = Ensemble([torch.nn.Linear(1, 1)]), iter([.9, .5, .4])
    start = e.stacked[0].item()
    settings = TrainSettings(epochs=3, batch_size=1, optimizer="sgd", lr=1., keep=keep)
    fit(e, lambda i, g: e.map(lambda m: m.weight.sum()),
        lambda: dict(accuracy=torch.tensor([next(accuracies)]), loss=torch.zeros(1)), 4, settings, [0],
        report=lambda *_: None)
    velocity, moved = 0., 0.
    for _ in range(steps): velocity = .9*velocity + 1; moved += velocity
    assert start - e.stacked[0].item() == pytest.approx(moved, rel=1e-5)
    with pytest.raises(ConfigError, match="unknown keep 'lats': did you mean 'last'"): TrainSettings(keep="lats")


def test_divergence_names_seed_epoch_and_way_out(small):
    with pytest.raises(TrainingDiverged, match=r"the loss of seed 5 became (nan|inf) in epoch \d.*lower lr"):
        train([small(seed=5, lr=1e30)], Context("cpu", report=lambda *_: None))


@pytest.mark.parametrize("precision", ["bf16"])
def test_reduced_precision_trains(small, precision):
    _, fitted = train([small(precision=precision, epochs=8, lr=1e-2)], Context("cpu", report=lambda *_: None))
    assert fitted.history.loss.iloc[-1] < fitted.history.loss[0]


def test_learning_rate_schedule_reaches_the_optimiser():
    e = Ensemble([torch.nn.Linear(1, 1)])
    r = fit(e, lambda i, g: e.map(lambda m: m.weight.sum()), lambda: dict(accuracy=torch.ones(1), loss=torch.ones(1)),
        32, TrainSettings(epochs=4, lr=1., lr_schedule="linear", lr_end=.2, batch_size=8), [0], report=lambda *_: None)
    assert r.history.lr.tolist() == pytest.approx([1 - .8*(k + .75)/4 for k in range(4)])


def test_learning_beats_chance(home, small):
    "The whole path learns: 256 objects, one word of 20 quantised symbols."
    record, = execute([small(bottleneck="quantized", alphabet_size=8, epochs=30, lr=1e-2)])
    at = {r["n_candidates"]: r["accuracy"] for r in record.rows}
    assert at[256] > .8 and at[2] > .95
    assert record.summary["capacity_bits"] == 20*math.log2(8)


def test_a_codebook_belongs_to_its_best_epoch():
    "VQ's codebook is a buffer: it is restored, and saved, with the weights."
    from refcomm.bottlenecks.quantize import VQ
    e = Ensemble([torch.nn.Sequential(torch.nn.Linear(4, 4), VQ(5, 4))])
    accuracies, books = iter([.1, .9, .2, .3]), []
    def validate():
        books.append(e.template[1].quantizer.codebook.clone())
        return dict(accuracy=torch.tensor([next(accuracies)]), loss=torch.zeros(1))
    x = torch.randn(32, 4)
    fit(e, lambda i, g: e.map(lambda m: m(x[i[0]]).word.pow(2).mean()), validate, 32,
        TrainSettings(epochs=4, batch_size=8), [0], report=lambda *_: None)
    assert torch.equal(e.template[1].quantizer.codebook, books[1]) and not torch.equal(books[1], books[3])


@pytest.mark.parametrize("bottleneck", ["fsq", "vq"])
def test_non_uniform_quantisers_play_with_several_seeds(home, small, bottleneck):
    records = execute([small(bottleneck=bottleneck, alphabet_size=300, seed=s) for s in (0, 1)])
    assert [r.provenance["trained_together"] for r in records] == [1, 1]
    assert records[0].tensors()["alphabet_300"].dtype == torch.int32


def test_a_record_does_not_depend_on_its_stack(home, small, tmp_path):
    "What a member's record holds ends where the member stopped, whoever else went on."
    specs = [small(seed=s, epochs=8, patience=1, lr=3e-2) for s in range(3)]
    together, alone = execute(specs), [execute([s], store=Store(tmp_path/str(s.seed)))[0] for s in specs]
    for a, b in zip(together, alone):
        assert a.history().epoch.tolist() == b.history().epoch.tolist() and a.summary == b.summary


@pytest.mark.parametrize("fields, says", [
    (dict(word_lenght=3), "did you mean 'word_length'"), (dict(channel="instnt"), "did you mean 'instant'"),
    (dict(bottleneck="gumble"), "did you mean 'gumbel'"),
    (dict(bottleneck="gumbel"), "does not go with"), (dict(n_values=2), "10000 candidates asked for, but only 16"),
    (dict(game="objects"), "did you mean 'object'"),
    (dict(alphabets=(1, 10)), "alphabets must be at least 2, got 1"),
    (dict(candidates=(1, 10)), "candidates must be at least 2, got 1"),
    (dict(candidates=()), "candidates must be at least 2"), (dict(grid="exat"), "did you mean 'exact'"),
])
def test_bad_specs_are_named(fields, says):
    with pytest.raises(ConfigError, match=says): eqc.EQCSpec(**fields)


@pytest.mark.parametrize("fields, says",
    [(dict(cell="gruu", channel="recurrent", message_length=2), "did you mean 'gru'"),
    (dict(precision="fp12"), "did you mean"), (dict(n_train=500), "but there are 256"),
                                          (dict(epochs=0), "epochs must be at least 1"),
                                          (dict(optimizer="adamm"), "did you mean 'adam'"),
                                          (dict(n_negatives=256), "only 256 are available"),
                                          (dict(bottleneck="gumbel", alphabet_size=4, temperature=0.),
                                          "temperature must be above 0")])
def test_what_only_building_can_tell_is_named_too(home, small, fields, says):
    with pytest.raises(ConfigError, match=says): execute([small(**fields)])
    assert Store().keys() == [] and not list(Store().root.glob("eqc/*"))


def test_a_checkpoint_of_other_learning_rates_is_set_aside(tmp_path):
    def run(factors):
        e = Ensemble([torch.nn.Linear(1, 1)])
        fit(e, lambda i, g: e.map(lambda m: m.weight.sum()), lambda: dict(accuracy=torch.ones(1), loss=torch.zeros(1)),
            4, TrainSettings(epochs=2), [0], checkpoint=tmp_path/"c.safetensors", report=lambda *_: None,
            lr_factors=factors)
    run([("weight", .1)]); run([("weight", .1)])
    with pytest.warns(UserWarning, match="belongs to another model, data or setting: lr_factors"): run([("bias", .1)])
    assert len(list(tmp_path.glob("c.unreadable-*"))) == 1, "it is not lost"

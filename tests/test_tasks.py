"Tasks and the four games of eqc: what is drawn, who sees what, and what is refused."
import dataclasses

import pandas as pd
import pytest
import torch
from scipy import stats

from conftest import tiny_transformer
from refcomm.agents.encoders import Fixed, InformedSender, LinearEncoder, PoolCandidates, dot_scores
from refcomm.bottlenecks.quantize import LearnedQuantizer, UniformQuantizer
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.data.objects import split
from refcomm.papers.eqc import run as eqc
from refcomm.papers.eqc import items as grids
from refcomm.papers.eqc import spec
from refcomm.games.referential import draw_other_classes
from refcomm.games.tasks import ItemTask
from refcomm.runs.execute import Context, execute

QUIET = Context("cpu", report=lambda *_: None)


def items(n=60, n_classes=6, **changes):
    x, labels = torch.randn(n, 5, generator=generator(0)), torch.arange(n) % n_classes
    fields = dict(n_negatives=7, n_candidates=10, generator=generator(0)) | changes
    return x, labels, ItemTask(x, labels, split(n, dict(train=n//2, valid=n//4, test=n//4), generator(0)), **fields)


def tiny(game, name="CN-Inst", **changes):
    return grids.configure(name, "smoke", game=game, seeds=[0], **changes)[0]


def test_distractors_of_other_classes_are_uniform():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    drawn = draw_other_classes(torch.zeros(30_000, dtype=torch.long), labels, 2, generator(0)).sort(-1).values
    pairs = pd.Series([tuple(d) for d in drawn.tolist()]).value_counts()
    assert set(pairs.index) == {(3, 4), (3, 5), (4, 5)} and stats.chisquare(pairs).pvalue > 1e-3


@pytest.mark.parametrize("pool", [None, 20])
def test_a_training_batch_draws_from_its_own_split(pool):
    x, labels, task = items(pool=pool, other_classes=True)
    place = lambda rows: (rows[:, None] == x).all(-1).int().argmax(-1)
    train, test = set(place(task.x["train"]).tolist()), set(place(task.x["test"]).tolist())
    batch = task.batch(torch.arange(6)[None], [generator(1)])
    seen = place(batch.candidates.items[0])
    assert set(seen.tolist()) <= train and not train & test and len(seen.unique()) == len(seen) == (pool or 30)
    own = labels[seen][batch.candidates.index[0]]
    assert (own[:, 1:] != own[:, :1]).all()
    assert torch.equal(batch.x[0], task.x["train"][:6])


@pytest.mark.parametrize("n, pool, batch", [(60, 20, 1), (600, 20, 8), (600, 150, 32)])
def test_pooled_items_are_uniform_over_the_split(n, pool, batch):
    _, _, task = items(n=n, pool=pool)
    counts = torch.zeros(n//2)
    for seed in range(600):
        games = task.batch(torch.arange(batch)[None], [generator(seed)])
        counts[(games.candidates.items[0][batch:, None] == task.x["train"]).all(-1).int().argmax(-1)] += 1
    assert not counts[:batch].any(), "targets are there already"
    tenths = torch.stack([c.mean() for c in counts[batch:].chunk(10)])
    expected = 600 * (pool - batch) / (n//2 - batch)
    assert (tenths/expected - 1).abs().max() < .1, "no part of the split is left out"


def test_evaluation_games_are_the_same_for_all_seeds_and_blocks():
    _, _, task = items()
    one, many = (torch.cat([g.candidates.index for g in task.games("test", b)]) for b in (100, 4))
    assert torch.equal(one, many) and torch.equal(one[:, 0], torch.arange(15))


def test_candidates_score_alike_however_they_are_given():
    x, z = torch.randn(30, 5, generator=generator(0)), torch.randn(4, 8, generator=generator(1))
    index = torch.stack([torch.randperm(30, generator=generator(i))[:6] for i in range(4)])
    for encoder in (LinearEncoder(5, 8), torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh())):
        by_hand = (encoder(x)[index] @ z[..., None]).squeeze(-1)
        for scores in (PoolCandidates(x, index).scores(encoder, z), dot_scores(encoder, z, x[index]),
            Fixed(x).scores(encoder, z).gather(-1, index)):
            torch.testing.assert_close(scores.log_softmax(-1), by_hand.log_softmax(-1))


def test_an_informed_sender_ignores_items_that_are_not_candidates():
    with seeded_init(0): sender = InformedSender(5, 8, n_candidates=4)
    x, index = torch.randn(9, 5, generator=generator(0)), torch.tensor([[0, 2, 4, 6]])
    other = x.clone(); other[[1, 3, 5, 7, 8]] += 1
    assert torch.equal(sender(PoolCandidates(x, index)), sender(PoolCandidates(other, index)))
    assert not torch.equal(sender(PoolCandidates(x, index)),
        sender(PoolCandidates(x, index[:, [2, 1, 0, 3]]))), "the target is the one in first place"


@pytest.mark.parametrize("game", ["image", "sent-ref", "sent-cls"])
def test_stacked_seeds_are_the_seeds_one_by_one(home, game):
    specs = grids.configure("CN-Inst", "smoke", game=game, seeds=(0, 1))
    task = eqc.make_task(specs[0])
    games = next(task.games("test"))
    scores = lambda ensemble: ensemble.eval().map(lambda g: g.scores(g.send(games.x).word,
        games.candidates).log_softmax(-1))
    together = scores(eqc.train(specs, task, QUIET)[0])
    for i, s in enumerate(specs):
        torch.testing.assert_close(scores(eqc.train([s], task, QUIET)[0])[0], together[i], rtol=1e-2, atol=1e-2)


def test_evaluation_streams(home, monkeypatch):
    shapes, real = [], eqc.hits
    monkeypatch.setattr(eqc, "hits", lambda scores, *a: shapes.append(tuple(scores.shape)) or real(scores, *a))
    s = eqc.EQCSpec(n_train=50, n_valid=50, n_test=1000, epochs=1, word_length=10, alphabets=())
    task = eqc.make_task(s)
    eqc.evaluate(eqc.train([s], task, QUIET)[0], s, task, torch.device("cpu"))
    assert {n for _, n, _ in shapes} == {125} and {c for *_, c in shapes} == {10_000}


def test_sentence_games_have_the_published_splits_on_full_size_data(home):
    for game in ("sent-ref", "sent-cls"):
        _, n, parts = eqc.load(grids.configure("CN-Inst", "cpu", game=game, data="embedded")[0])
        assert n >= 9999 and [len(parts[k]) for k in ("train", "valid", "test")] == [spec.GAMES[game][f"n_{k}"]
            for k in ("train", "valid", "test")]
        assert len(torch.cat(list(parts.values())).unique()) == 9999


def test_lsa_is_fitted_on_training_sentences_only(home, monkeypatch):
    fitted = []
    monkeypatch.setattr(eqc, "embed", lambda texts, encoder, fit_on: fitted.append(fit_on) or torch.ones(len(texts), 4))
    s = tiny("sent-ref")
    eqc.make_task(s)
    data, _, parts = eqc.load(s)
    assert all(f == [data.texts[i] for i in parts["train"]] for f in fitted)


def test_real_data_are_taken_when_they_are_there_and_recognised_by_content(home, tmp_path, monkeypatch):
    rows = pd.DataFrame(dict(text=[f"question {i} about money" for i in range(600)],
        category=[f"intent_{i % 77}" for i in range(600)], split="train"))
    rows.to_parquet(tmp_path/"banking77.parquet")
    monkeypatch.delenv("REFCOMM_DATA", raising=False)
    assert spec.source("sent-ref")["data"] == "synthetic"
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path))
    s = grids.configure("CN-Inst", "cpu", game="sent-ref", encoder="lsa", seeds=[0], n_train=300, n_valid=100,
        n_test=100)[0]
    assert s.data.startswith("banking77#") and eqc.load(s)[1] == 600
    rows.assign(text=rows.text + "!").to_parquet(tmp_path/"banking77.parquet")
    with pytest.raises(ConfigError, match="is not the file that this Spec was made for"): eqc.load(s)
    assert grids.configure("CN-Inst", "smoke", game="sent-ref")[0].data == "synthetic", "smoke needs no data"
    (tmp_path/"banking77.parquet").unlink()
    with pytest.raises(ConfigError, match="is not in .*use data='embedded'"): spec.source("sent-ref", "real")


def test_too_few_items_of_other_classes(home):
    with pytest.raises(ConfigError, match=r"49 distractors asked for, but only \d+ of 50 items are of other classes"):
        eqc.make_task(dataclasses.replace(tiny("image"), n_valid=50, candidates=(2, 50)))
    with pytest.raises(ConfigError, match="splits .* need 99999 items|need"):
        eqc.make_task(dataclasses.replace(tiny("sent-ref"), n_train=99_999))


def test_more_candidates_than_classes_is_refused_before_training(home):
    with pytest.raises(ConfigError, match="500 candidates asked for, but synthetic intents has only 77 classes"):
        eqc.make_task(dataclasses.replace(tiny("sent-cls"), candidates=(2, 500)))


def test_a_csv_of_banking77_counts_as_real(home, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path))
    pd.DataFrame(dict(text=["a b", "c d"], category=["x", "y"])).to_csv(tmp_path/"banking77.csv", index=False)
    assert spec.source("sent-cls")["data"].startswith("banking77#")
    assert spec.source("image")["data"] == "shapes"


def test_a_batch_larger_than_its_pool_is_refused():
    _, _, task = items(pool=10)
    with pytest.raises(ConfigError, match="a batch of 12 targets does not fit in a pool of 10"):
        task.batch(torch.arange(12)[None], [generator(0)])


def test_the_encoder_learns_inside_the_game(home, tmp_path):
    data = eqc.load(tiny("sent-cls"))[0]
    folder = str(tiny_transformer(tmp_path/"tiny", data.texts + data.classes))
    s = dataclasses.replace(tiny("sent-cls"), encoder=folder, fine_tune=True, encoder_lr=.1, epochs=1)
    task = eqc.make_task(s)
    before = {k: v.clone() for k, v in eqc.build(s, task).named_parameters()}
    ensemble, _ = eqc.train([s], task, QUIET)
    after = dict(ensemble.member(0).named_parameters())
    moved = {role: max((after[k] - v).abs().max().item() for k, v in before.items() if k.startswith(role))
        for role in ("sender.0.", "sender.2.", "receiver.0.")}
    assert 0 < moved["sender.0."] < moved["sender.2."] and moved["receiver.0."] > 0
    (record,) = execute([s])
    assert {r["n_candidates"] for r in record.rows} == {2, 77}
    torch.manual_seed(123)
    again, _ = eqc.train([s], task, QUIET)
    assert all(torch.equal(p, q) for p, q in zip(ensemble.parameters(),
        again.parameters())), "dropout follows the run's seed, not the process's"


def test_fitted_levels_belong_to_the_run(home):
    s = tiny("object", alphabets=(2, 4), fitted=(1, 2), word_length=8)
    (record,) = execute([s])
    tried = {(r["alphabet"], r["fitted_width"]) for r in record.rows}
    assert tried == {(None, None), (2, None), (4, None), (2, 1), (4, 1), (2, 2), (4, 2)}
    with pytest.raises(ConfigError, match="senders that see the target alone"): tiny("image", fitted=(1,))


def test_lloyd_beats_a_uniform_grid_on_words_that_crowd():
    words = torch.rand(500, 12, generator=generator(0)) ** 4
    words[:, 0], words[:, 1] = 0, 1
    fitted = LearnedQuantizer(4, 12).fit(words)
    error = lambda q: (q.eval()(words).word - words).square().mean()
    assert error(fitted) < error(UniformQuantizer(4, 12))
    symbols = fitted(words).symbols
    for v, level in enumerate(fitted.levels.flatten().tolist()):
        assert words[symbols == v].mean().item() == pytest.approx(level,
            abs=.02), "a level is the mean of what it stands for"
    assert torch.equal(LearnedQuantizer(4, 12).fit(words).levels, LearnedQuantizer(4, 12).fit(words).levels)


def test_one_training_serves_a_whole_heatmap_column(home):
    specs = grids.grid("figure6", "cpu", sentences="embedded")
    continuous = [s for s in specs if s.bottleneck == "continuous"]
    assert len(continuous) == 3*7 and all(set(grids.HEATMAP["alphabets"]) <= set(s.alphabets) for s in continuous)
    assert set(grids.grid("table7", "cpu", sentences="embedded")) & set(specs), "Table 7's runs are found again"

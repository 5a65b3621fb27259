"""What people build on: agents that are kept, data of one's own, channels × games × bottlenecks × agents."""
import dataclasses, inspect, itertools, json, subprocess, sys, warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd, pytest, torch
from torch import nn

import refcomm
from conftest import PROGRAMS
from refcomm import keep
from refcomm.core import ConfigError, generator
from refcomm.corpora import from_record
from refcomm.interact.explore import explore, explorer_of, game_html
from refcomm.interact.play import Match, play
from refcomm.training.populations import Paired, Population, cross_play
from refcomm.games.reconstruction import Reconstruction
from refcomm.agents.encoders import InformedSender
from refcomm.games.contrastive import DiscriminationGame
from refcomm.games.patchgame import make_patch_game
from refcomm.games.tasks import ClassTask, ItemTask, SampledTask
from refcomm.sms.sampling import sample_games
from refcomm.keep import (Kept, cross_play_of, described, ease_of, load, load_game, new_game, probe_of, push_game,
    role_swap_of, save_game)
from refcomm.own import load_objects, make_game, page, posdis, referential, sweep, topsim, train
from refcomm.papers.eqc.run import EQCSpec
from refcomm.papers.iac import items as iac_items
from refcomm.papers.patch import items as patch_items
from refcomm.papers.sms.run import SMSSpec
from refcomm.runs.execute import execute
from refcomm.runs.experiments import home_of
from refcomm.runs.store import RunRecord, Store, spec_fields
from refcomm.training.ensemble import Ensemble
from refcomm.training.loop import TrainSettings, fit
from refcomm.games.tasks import objectives

TABLE = pd.DataFrame(itertools.product("abcd", "xyz", "1234"), columns=["letter", "end", "number"])
def objects(): return load_objects(TABLE)
def task(): return referential(objects(), distractors=4, valid=8, test=12)

GAMES = {
    "objects": task,
    "features": lambda: referential(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), distractors=3,
    valid=6, test=6),
    "reconstruction": lambda: Reconstruction(objects(), valid=6, test=6),
    "symbolic": lambda: SampledTask({k: torch.randint(3, (n, 5, 4), generator=torch.Generator().manual_seed(n))
    for k, n in dict(train=40, valid=12, test=12).items()}, 3),
    "min|M|": lambda: SampledTask({k: sample_games(n, 2, "tilted", 4, 3, 4, generator=generator(n)).candidates
    for k, n in dict(train=40, valid=12, test=12).items()}, 3),
    "image": lambda: ItemTask(NOISE, torch.arange(60) % 6, PARTS_OF_60, 3, 4, informed=True, other_classes=True,
        generator=generator(0)),
    "sentence": lambda: ItemTask(NOISE, torch.arange(60) % 6, PARTS_OF_60, 3, 4, pool=24, generator=generator(0)),
    "classes": lambda: ClassTask(NOISE, torch.arange(60) % 6, NOISE[:6], PARTS_OF_60, 3),
}
NOISE = torch.randn(60, 6, generator=generator(1))
PARTS_OF_60 = dict(zip(("train", "valid", "test"), torch.arange(60).split((40, 10, 10))))
CHANNELS = {"instant": dict(channel="instant"), "recurrent": dict(), "ending": dict(length_cost=.1)}
BOTTLENECKS = {"continuous": {}, "gumbel": {}, "straight-through": dict(bottleneck="gumbel", straight_through=True),
    "reinforce": {}, "quantized": dict(alphabet_size=3), "fsq": dict(alphabet_size=3), "vq": dict(alphabet_size=3),
    "learned": dict(alphabet_size=3)}
AGENTS = {"rnn": {}, "gru": {}, "lstm": {}, "transformer": {}}

def _cases(): # every pair of game, channel, bottleneck and agents; all four of them together for two games
    for game, channel, bottleneck, cell in itertools.product(GAMES, CHANNELS, BOTTLENECKS, AGENTS):
        if channel == "instant" and cell != "rnn": continue # which has no cell
        if cell == "gru" and game == "reconstruction" and bottleneck != "gumbel": continue # seen with the objects
        if game in ("objects", "reconstruction") or cell == "rnn" or (channel, bottleneck) == ("ending", "gumbel"):
            yield game, channel, bottleneck, cell

@pytest.mark.parametrize("game, channel, bottleneck, cell", list(_cases()))
def test_every_combination_trains_saves_and_plays_again(tmp_path, game, channel, bottleneck, cell):
    t = GAMES[game]()
    sizes = (dict(bottleneck=bottleneck, alphabet_size=6, word_length=4, message_length=3, hidden=8, embedding=4,
        cell=cell) | BOTTLENECKS[bottleneck] | CHANNELS[channel])
    if channel == "recurrent" and cell == "transformer": sizes |= dict(ends=False)
    if game == "image":
        wide = 6 if bottleneck in ("gumbel", "straight-through", "reinforce") else 4
        if channel != "instant": wide = 8
        sizes["sender"] = InformedSender(6, wide, 4, 5, 3)
    try: g = make_game(t, **sizes)
    except ConfigError as e:
        assert (channel, cell) == ("recurrent", "transformer") and "unknown cell 'transformer'" in str(e)
        return
    _trains_and_plays_again(tmp_path, t, g)

def _trains_and_plays_again(tmp_path, t, g):
    e = Ensemble([g])
    fit(e, *objectives(e, t), t.n_train, TrainSettings(epochs=1, batch_size=(t.n_train + 1)//2), [0],
        report=lambda done, text: None)
    trained, seen = e.eval().member(0), next(t.games("test"))
    again = load_game(save_game(tmp_path/"game", trained))
    with torch.no_grad(): one, two = (m.scores(m.send(seen.x).word, seen.candidates) for m in (trained, again))
    assert torch.equal(one, two)
    return again

MORE = {"drawn choice": dict(draws=True), "trained temperature": dict(trained_temperature=True),
    "two layers": dict(layers=2)}

def _more_cases(): # each with every game, channel, bottleneck and kind of agents that it concerns, one after the other
    every = dict(game=GAMES, channel=CHANNELS, bottleneck=BOTTLENECKS, cell=AGENTS)
    usual = dict(game="objects", channel="ending", bottleneck="gumbel", cell="rnn")
    for more, axis in itertools.product(MORE, every):
        for value in every[axis]:
            other = axis == "bottleneck" and value not in ("gumbel", "straight-through")
            if more == "trained temperature" and other or more == "two layers" and value == "instant": continue
            if value != usual[axis] or axis == "game": yield more, *(usual | {axis: value}).values()

@pytest.mark.parametrize("more, game, channel, bottleneck, cell", list(_more_cases()))
def test_what_egg_has_besides_trains_saves_and_plays_again(tmp_path, more, game, channel, bottleneck, cell):
    t = GAMES[game]()
    sizes = dict(bottleneck=bottleneck, alphabet_size=6, word_length=4, message_length=3, hidden=8, embedding=4,
        cell=cell)
    sizes |= BOTTLENECKS[bottleneck] | CHANNELS[channel] | MORE[more]
    if game == "image": sizes["sender"] = InformedSender(6, 8, 4, 5, 3)
    plain, g = make_game(t, **{k: v for k, v in sizes.items() if k not in MORE[more]}), make_game(t, **sizes)
    again = _trains_and_plays_again(tmp_path, t, g)
    assert described(again) == described(g) != described(plain)
    if more == "trained temperature":
        assert again.channel.bottleneck.tau.detach() != 1 and g.channel.bottleneck.temperature == 1
    assert "draws" not in json.dumps(described(plain)) and "trained" not in json.dumps(described(plain)) # so that keys of runs stay

def test_layers_are_refused_where_there_are_no_cells():
    with pytest.raises(ConfigError, match="an instant channel has no cells to stack, got layers=2"):
        make_game(task(), channel="instant", layers=2)

def test_drawn_choices_are_a_members_own(tmp_path):
    "A stack of receivers that draw gives the results of separate trainings; so does a population's pair."
    t, make = task(), lambda seed: make_game(task(), bottleneck="reinforce", draws=True, hidden=8, seed=seed)
    def trained(seeds):
        e = Ensemble([make(s) for s in seeds])
        fit(e, *objectives(e, t), t.n_train, TrainSettings(epochs=1, batch_size=14), seeds,
            report=lambda done, text: None)
        return e.weights(len(seeds) - 1)
    for k, v in trained([0, 1]).items(): torch.testing.assert_close(trained([1])[k], v, msg=k)
    from refcomm.training.populations import train_population
    assert len(train_population(Population([make(0), make(1)], alone=False), t,
        TrainSettings(epochs=1, batch_size=14))) == 1

@pytest.mark.parametrize("channel, bottleneck, cell", [*itertools.product(CHANNELS, BOTTLENECKS, ["gru"]),
    *itertools.product(["ending"], ["gumbel"], ("rnn", "lstm", "transformer"))])
def test_discrimination_takes_every_channel_and_bottleneck(tmp_path, channel, bottleneck, cell):
    sizes = (dict(bottleneck=bottleneck, alphabet_size=6, word_length=4, message_length=3, hidden=8, embedding=4,
        cell=cell) | BOTTLENECKS[bottleneck])
    c = make_game(task(), **sizes | CHANNELS[channel]).channel
    eye = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, c.dim))
    game, x = DiscriminationGame(eye(), c, eye(), n_candidates=4), torch.rand(2, 16, 3, 2, 2, generator=generator(0))
    opt, draws = torch.optim.SGD(game.parameters(), .1), generator(1)
    before = [p.detach().clone() for p in game.parameters()]
    for _ in range(2): opt.zero_grad(); game(*x, game.draw_noise(16, draws)).backward(); opt.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, game.parameters()))
    again = load_game(save_game(tmp_path/"game", game.eval()))
    with torch.no_grad(): one, two = (g.evaluate(*x) for g in (game, again))
    assert one.loss == two.loss and one.accuracy == two.accuracy

def test_a_patch_game_is_kept_and_takes_no_other_channel(tmp_path):
    sizes = dict(size=32, patch_size=16, vocab_size=6, symbol_width=8, rank="thin", vision="vit",
        width=12, layers=1, heads=3, hidden=8, narrow=4, dim=16, negatives="local")
    game, x = make_patch_game(**sizes), torch.rand(2, 4, 3, 32, 32, generator=generator(0))
    opt = torch.optim.SGD(game.parameters(), .1)
    for _ in range(2): opt.zero_grad(); game(*x, game.draw_noise(4, generator(1))).backward(); opt.step()
    again = load_game(save_game(tmp_path/"game", game.eval()), dict(PatchGame=lambda: make_patch_game(**sizes)))
    with torch.no_grad(): assert torch.equal(game.send(x[0]).symbols, again.send(x[0]).symbols)
    with pytest.raises(ConfigError, match="unknown channel 'patch'"): make_game(task(), channel="patch")

@pytest.mark.slow
def test_importing_needs_no_torch():
    subprocess.run([sys.executable, PROGRAMS/"import_without_torch.py"], check=True)

def test_all_names_are_there():
    for name in refcomm.__all__: assert getattr(refcomm, name) is not None, name

@pytest.mark.slow
def test_a_game_plays_the_same_in_another_process(tmp_path):
    t = task()
    run = train(make_game(t, hidden=8, length_cost=.01), t, epochs=2, store=Store(tmp_path/"runs"))
    run.save(tmp_path/"game")
    subprocess.run([sys.executable, PROGRAMS/"play.py", tmp_path/"game", tmp_path/"out"], check=True)
    from safetensors.torch import load_file
    out, x = load_file(tmp_path/"out"), torch.eye(11)[:7]
    with torch.no_grad():
        assert torch.equal(out["word"], run.game.send(x).word) and torch.equal(out["scores"],
            run.game.scores(out["word"], x))

def test_interrupted_training_goes_on_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setenv("REFCOMM_CHECKPOINT_SECONDS", "0")
    t, steps = task(), []
    def stop(done, game):
        steps.append(done)
        if len(steps) == 7: raise KeyboardInterrupt
    settings = dict(epochs=3, batch_size=8, lr=1e-2, metrics=[topsim, posdis])
    with pytest.raises(KeyboardInterrupt):
        train(make_game(t, hidden=8), t, **settings, on_step=stop, store=Store(tmp_path/"a"))
    broken = train(make_game(t, hidden=8), t, **settings, on_step=stop, store=Store(tmp_path/"a"))
    assert len(steps) < 7 + 12
    whole = train(make_game(t, hidden=8), t, **settings, on_step=stop, store=Store(tmp_path/"b"))
    assert broken.record.key == whole.record.key and broken.metrics == whole.metrics and torch.equal(broken.messages,
        whole.messages)
    for a, b in zip(broken.game.parameters(), whole.game.parameters()): assert torch.equal(a, b)

def test_other_data_settings_and_weights_are_other_runs(tmp_path):
    t, store = task(), Store(tmp_path)
    make = lambda seed=0: make_game(t, hidden=8, seed=seed)
    keys = [train(make(), t, epochs=1, store=store).record.key, train(make(1), t, epochs=1, store=store).record.key,
        train(make(), t, epochs=2, store=store).record.key,
            train(make(), referential(objects(), distractors=5, valid=8, test=12), epochs=1, store=store).record.key,
            train(make(), t, epochs=1, store=store, name="mine").record.key]
    assert len(set(keys)) == 5

def test_parts_of_ones_own(tmp_path):
    class Eye(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Linear(11, 8)
        def forward(self, x): return self.net(x).relu()
    t = task()
    game = make_game(t, sender=Eye(), receiver=nn.Sequential(nn.Linear(11, 8), nn.Tanh()), hidden=8)
    def half(messages, meanings): return len(messages) / 2
    run = train(game, t, epochs=1, metrics=[half], store=Store(tmp_path/"runs"))
    assert run.metrics["half"] == 6
    folder = run.save(tmp_path/"game")
    with pytest.raises(ConfigError, match="class Eye"): load_game(folder)
    assert torch.equal(load_game(folder, dict(Eye=Eye)).send(t.seen("test")).symbols,
        run.game.send(t.seen("test")).symbols)

@pytest.mark.parametrize("experiment", ("eqc", "sms"))
def test_any_finished_run_is_ready_to_play(tmp_path, experiment):
    from refcomm.papers.eqc.run import EQCSpec
    from refcomm.papers.sms.run import SMSSpec
    spec = dict(
        eqc=lambda seed: EQCSpec(n_attributes=2, n_values=4, n_train=10, n_valid=3, n_test=3, bottleneck="gumbel",
        alphabet_size=5, word_length=1, channel="ending", message_length=3, hidden=8, embedding=4, candidates=(2, 10),
        alphabets=(), epochs=1, seed=seed),
        sms=lambda seed: SMSSpec(n_attributes=4, n_values=3, n_distractors=3, n_train=64, n_valid=32, hidden=16,
        embedding=8, alphabet_size=6, epochs=1, seed=seed))[experiment]
    store = Store(tmp_path)
    for record in execute([spec(0), spec(1)], store=store):
        kept = load(f"{experiment}/{record.key[:10]}", store)
        sent = kept.game.send(kept.task.seen("test" if experiment == "eqc" else "valid"))
        (messages,) = record.tensors().values()
        assert torch.equal(sent.symbols.flatten(1), messages.long().flatten(1)) and not kept.game.training

def test_pushing_needs_someone_logged_in(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="holds no game"): push_game(tmp_path, "me/birds")
    with pytest.raises(ConfigError, match="logged in"):
        push_game(save_game(tmp_path/"g", make_game(task(), hidden=8)), "me/birds")
    sent = {}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "…")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, exist_ok: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kwargs: sent.update(kwargs))
    push_game(tmp_path/"g", "me/birds")
    assert sent == dict(repo_id="me/birds", folder_path=str(tmp_path/"g"))

def test_a_saved_folder_holds_no_code(tmp_path):
    folder = save_game(tmp_path/"g", make_game(task(), hidden=8))
    words = json.loads((folder/"config.json").read_text())
    words["game"]["sender"]["part"] = "subprocess.Popen"
    (folder/"config.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="unknown part 'subprocess.Popen'"): load_game(folder)
    assert not list(tmp_path.glob(".*"))

def test_pairs_of_one_game_play_as_it_does():
    t = task()
    for kwargs in (dict(), dict(length_cost=.1), dict(bottleneck="reinforce")):
        g, other = (make_game(t, hidden=8, seed=s, **kwargs) for s in (0, 1))
        batch = t.batch(torch.arange(8)[None], [torch.Generator().manual_seed(0)])
        gen = torch.Generator().manual_seed(0)
        x = batch.x[0]
        target = batch.target[0]
        candidates = batch.candidates._replace(items=batch.candidates.items[0], index=batch.candidates.index[0])
        noise = g.channel.draw_noise(8, gen)
        torch.testing.assert_close(Paired(g, g)(x, target, candidates, noise), g(x, target, candidates, noise))
        assert Paired(g, other)(x, target, candidates, noise) != g(x, target, candidates, noise)
        assert cross_play([g.eval(), other.eval()], t).shape == (2, 2)

@pytest.mark.parametrize("table, message", [
    (TABLE.assign(letter=None), "has no value in row 0"), (TABLE[[]], "at least one row and one column"),
    (TABLE.head(0), "at least one row and one column"),
])
def test_tables_that_are_no_objects(table, message):
    with pytest.raises(ConfigError, match=message): load_objects(table)

def test_files_of_both_kinds_hold_the_same_objects(tmp_path):
    TABLE.to_csv(tmp_path/"t.csv", index=False); TABLE.to_parquet(tmp_path/"t.parquet")
    TABLE.to_csv(tmp_path/"s.csv", index=False, sep=";")
    a, b, c = (load_objects(tmp_path/n) for n in ("t.csv", "t.parquet", "s.csv"))
    assert torch.equal(a.values, b.values) and torch.equal(a.values, c.values) and [k for k in a.kinds] == [k
        for k in b.kinds]

OWN = """
import itertools, pandas as pd, torch
from refcomm import *
objects = load_objects(pd.DataFrame(itertools.product("abcd", "xyz", "1234"), columns=["letter", "end", "number"]))
class Eye(torch.nn.Module):
    def __init__(self): super().__init__(); self.net = torch.nn.Linear(11, 8)
    def forward(self, x): return self.net(x).relu()
def even(messages, meanings): return float((messages % 2 == 0).float().mean())
@experiment
def mine(alphabet_size:int=6, epochs:int=1, seed:int=0):
    task = referential(objects, distractors=4, valid=8, test=12)
    game = make_game(task, alphabet_size=alphabet_size, sender=Eye(), hidden=8, seed=seed)
    return trial(game, task, epochs=epochs, lr=1e-2, metrics=[topsim, even], seed=seed)
"""

@pytest.mark.slow
def test_a_worker_needs_nothing_but_the_spec(tmp_path):
    "What a notebook's cell defines is made in a process that has never seen it, and is then loaded, planned and found here."
    import pickle
    from refcomm.runs.costs import recorded
    from refcomm.runs.execute import read_plan, run_stack, spent, write_plan
    cell = {"__name__": "__main__"}
    exec(OWN, cell)
    mine, store = cell["mine"], Store(tmp_path/"runs")
    specs = [mine(seed=s) for s in (0, 1)]
    (tmp_path/"job").write_bytes(pickle.dumps((run_stack, (specs, str(store.root), "cpu"))))
    subprocess.run([sys.executable, PROGRAMS/"do_job.py", tmp_path/"job"], check=True)
    records = execute(specs, store=store)
    assert [r.provenance["trained_together"] for r in records] == [2, 2]
    table = sweep(mine, dict(seed=[0, 1]), store=Store(tmp_path/"here"))
    assert table.key.tolist() == [r.key for r in records]
    assert [r.rows[0]["accuracy"] for r in records] == table.accuracy.tolist()
    kept = load(records[0])
    assert torch.equal(kept.game.send(kept.task.seen("test")).symbols.flatten(1),
        records[0].tensors()["messages"].long().flatten(1))
    write_plan(specs, tmp_path/"plan.json")
    assert read_plan(tmp_path/"plan.json") == specs and recorded(store).keys == {("mine", r.key) for r in records}
    assert spent(records)["epochs"] == 2
    exec(OWN.replace("lr=1e-2", "lr=1e-3"), cell)
    with pytest.warns(UserWarning, match="before its code changed"): execute([cell["mine"](seed=0)], store=store)

@pytest.mark.slow
def test_sweeps_of_several_shapes_equal_single_runs(tmp_path):
    t = task()
    def make(bottleneck, seed):
        return refcomm.trial(make_game(t, bottleneck=bottleneck, alphabet_size=3, word_length=4, hidden=8, seed=seed),
            t, epochs=2, lr=1e-2, seed=seed)
    found = sweep(make, dict(bottleneck=["quantized", "vq"], seed=[0, 1]), store=Store(tmp_path/"a"))
    for row in found.itertuples():
        alone = train(*make(row.bottleneck, row.seed)[:2], epochs=2, lr=1e-2, seed=row.seed, store=Store(tmp_path/"b"))
        assert alone.record.key == row.key and alone.accuracy == row.accuracy

def test_a_grid_is_a_file(tmp_path, capsys):
    from refcomm import cli
    (tmp_path/"own.py").write_text(OWN)
    (tmp_path/"grid.json").write_text(json.dumps(dict(experiment=f"{tmp_path/'own.py'}:mine",
        grid=dict(alphabet_size=[3, 6]))))
    cli.sweep(tmp_path/"grid.json", 1, "cpu", None, None, False, None, None, "accuracy", None)
    assert len(pd.read_csv(tmp_path/"grid.csv")) == 2 and (tmp_path/"grid.png").stat().st_size > 1000

def test_a_page_says_all_that_a_game_takes(tmp_path):
    "What has names and numbers needs no code; arguments that were added later leave older runs their keys."
    TABLE.to_csv(tmp_path/"t.csv", index=False)
    given = dict(table=str(tmp_path/"t.csv"), distractors=4, valid=8, test=12, hidden=8, epochs=1)
    fields = {f.name: f.default for f in dataclasses.fields(page.Spec)}
    takes = {k: p.default for k, p in inspect.signature(make_game).parameters.items()
        if k not in ("task", "sender", "receiver", "options")}
    assert takes.items() <= fields.items()
    assert not set(spec_fields(page(**given))) & set(page.later) and page.later
    more = dict(layers=2, draws=True, ends=True, warmup=(0., 1.), trained_temperature=True)
    assert not set(more) - set(spec_fields(page(**given, **more)))
    made = page.made(page(**given, **more))
    assert described(made.game) == described(make_game(made.task, hidden=8, **more)) and made.game.draws
    with warnings.catch_warnings(): # its code changes with the package, which raises its version where results change
        warnings.simplefilter("error")
        page.check([SimpleNamespace(key="a", summary=dict(source="older"))])
    assert page.made(page(**given, bottleneck="reinforce",
        entropy_weight=.5)).game.channel.bottleneck.entropy_weight == .5

FINISHED = {
    "eqc": lambda: [EQCSpec(n_attributes=2, n_values=4, n_train=10, n_valid=3, n_test=3, bottleneck="gumbel",
        alphabet_size=5, word_length=1, channel="ending", message_length=3, hidden=8, embedding=4, candidates=(2, 16),
        alphabets=(), epochs=1, seed=s) for s in (0, 1)],
    "sms": lambda: [SMSSpec(n_attributes=4, n_values=3, n_distractors=3, n_train=64, n_valid=32, hidden=16, embedding=8,
        alphabet_size=6, epochs=1, seed=s) for s in (0, 1)],
    "iac": lambda: [dataclasses.replace(iac_items.grid("table1", "smoke", 1)[3], n_blobs=8, n_permutations=9,
        epochs=1)],
    "patch": lambda: [patch_items.grid("figure9", "smoke", 1)[0]],
    "own": lambda: [],
}

@pytest.mark.slow
@pytest.mark.parametrize("experiment", FINISHED)
def test_a_finished_run_is_explored_played_probed_and_written_without_training(tmp_path, experiment, monkeypatch):
    store = Store(tmp_path)
    if experiment == "own":
        records = [train(make_game(task(), hidden=8, seed=s), task(), epochs=1, seed=s, store=store).record
            for s in (0, 1)]
    else: records = execute(FINISHED[experiment](), store=store)
    monkeypatch.setattr("refcomm.training.loop.fit", None)
    key = f"{experiment}/{records[0].key}"
    e = explorer_of(key, 4, store)
    corpus = from_record(records[0], "game/valid" if experiment == "iac" else None)
    if experiment == "patch": # dropped patches are no symbols of a corpus
        assert [[s for s in row if s >= 0] for row in e.symbols.tolist()] == [row[:n]
            for row, n in zip(corpus.messages[:4].tolist(), corpus.lengths[:4].tolist())]
    else:
        n = corpus.messages.shape[1]
        assert torch.equal(e.symbols[:, :n], corpus.messages[:4]) and (e.symbols[:, n:] == -1).all()
    assert len(corpus.meanings) == len(corpus.messages) and e.look(0) is not None
    assert "Game 0" in game_html(e, 0) and explore(e).children and play(Match(e, 2, generator=generator(0))).children
    assert probe_of(key, store)
    if experiment in ("iac", "patch"):
        kept = load(key, store)
        own = home_of(experiment).objectives(Ensemble([kept.game]), kept.spec, kept.task, "cpu")[1]()["accuracy"]
        assert cross_play_of([key], store).flatten().tolist() == own.tolist()
    else:
        matrix = cross_play_of(records, store)
        assert matrix.shape == (2, 2)
        accuracy = [next(row["accuracy"] for row in reversed(r.rows) if row.get("position") is None) for r in records]
        torch.testing.assert_close(matrix.diag(), torch.tensor(accuracy))


def _two_runs(tmp_path, epochs=25, **how):
    return [train(make_game(task(), alphabet_size=3, word_length=4, message_length=2, hidden=16, seed=s, **how), task(),
        epochs=epochs, lr=1e-2,
        batch_size=14, seed=s, store=Store(tmp_path)) for s in (0, 1)]

def test_kept_agents_that_take_turns_come_to_understand_each_other(tmp_path):
    runs, others = _two_runs(tmp_path, bottleneck="quantized"), ~torch.eye(2, dtype=torch.bool)
    weights = {k: v.clone() for k, v in runs[0].game.state_dict().items()}
    swap = role_swap_of([r.record for r in runs], epochs=40, lr=1e-2, store=Store(tmp_path))
    assert torch.equal(swap.before, cross_play_of(runs)) and len(swap.history) == 40
    assert swap.after[others].mean() > swap.before[others].mean() + .2
    assert all(torch.equal(v, weights[k]) for k, v in runs[0].game.state_dict().items())
    with pytest.raises(ConfigError, match="name at least two runs"): role_swap_of(runs[:1])

@pytest.mark.parametrize("how", [dict(bottleneck="vq", alphabet_size=3), dict(bottleneck="gumbel"),
    dict(bottleneck="gumbel", length_cost=.1, draws=True),
    dict(bottleneck="reinforce"), dict(bottleneck="quantized", alphabet_size=3, when="inference"),
    dict(dropout=True)], ids=str)
def test_a_kept_language_stays_as_it_is_while_others_learn_it(tmp_path, how):
    "What a new receiver hears are the symbols that the sender says, and not what its training relaxed, drew or dropped."
    if how.pop("dropout", False): how["sender"] = nn.Sequential(nn.Linear(11, 16), nn.Dropout(.5))
    run = train(make_game(task(), **dict(hidden=16, message_length=2, word_length=4) | how), task(), epochs=2,
        batch_size=14, store=Store(tmp_path))
    heard = []
    send = run.game.channel.send
    def recorded(u, noise=None):
        heard.append(send(u, noise).word.detach())
        return send(u, noise)
    before = {k: v.clone() for k, v in run.game.state_dict().items()}
    with torch.no_grad(): said = run.game.send(task().seen("train")).word
    run.game.channel.send = recorded
    found = ease_of(run, epochs=2, seeds=(4,))
    assert found.seed.tolist() == [4, 4] and found.epoch.tolist() == [0, 1]
    spoken = {tuple(w.flatten().tolist()) for words in heard if len(words) == task().n_train for w in words}
    assert spoken == {tuple(w.flatten().tolist()) for w in said}
    assert all(torch.equal(v, before[k]) for k, v in run.game.state_dict().items()) and not run.game.training

@pytest.mark.parametrize("experiment, how",
    [("iac", {}), ("iac", dict(shared=True)), ("iac", dict(message_length=2, bottleneck="quantized", word_length=4)),
    ("patch", {})], ids=str)
def test_agents_that_see_images_are_learned_from_and_take_turns(experiment, how, monkeypatch):
    "A new receiver learns with its own eyes from a sender that stays as it is; copies of agents alternate."
    sizes = (dict(iac=dict(n_images=120, batch_size=16, n_ood=2), patch=dict(n_images=40, batch_size=8))[experiment]
        | how)
    spec = dataclasses.replace(dict(iac=iac_items.grid("table1", "smoke", 1)[3],
        patch=patch_items.grid("figure9", "smoke", 1)[0])[experiment], **sizes)
    home = home_of(experiment)
    parts = home.make_parts(spec)
    def kept(seed, **more):
        s = dataclasses.replace(spec, seed=seed, **more)
        return Kept(home.build(s).eval(), parts, s,
            RunRecord(experiment, f"{seed}", dataclasses.asdict(s), [], {}, {}, Path()))
    runs = [kept(0), kept(1)]
    before = [{k: v.clone() for k, v in r.game.state_dict().items()} for r in runs]
    sides, fresh = dict(iac=("sender", "receiver"), patch=("speaker", "listener"))[experiment], []
    changed = lambda now, was: {k.split(".")[0] for k, v in now.state_dict().items() if v.is_floating_point()
        and not torch.equal(v, was[k])}
    with monkeypatch.context() as m:
        m.setattr(keep, "new_game", lambda *a: fresh.append(new_game(*a)) or fresh[-1])
        ease = ease_of(runs[0], epochs=1, lr=1e-2, seeds=(3, 4))
    assert ease.seed.tolist() == [3, 4] and len(fresh) == 2
    for seed, now in zip((3, 4), fresh): # with a shared trunk the eyes are those of an unused sender, too
        other = changed(now, new_game(runs[0], 10_000 + seed).state_dict())
        assert sides[1] in other and (sides[0] in other) == getattr(spec, "shared", False)
    matrix = cross_play_of(runs)
    own = [home.objectives(Ensemble([r.game]), spec, parts, "cpu")[1]()["accuracy"].item() for r in runs]
    assert matrix.shape == (2, 2) and matrix.diag().tolist() == own
    swap = role_swap_of(runs, epochs=1)
    assert torch.equal(swap.before, matrix) and len(swap.history) == 1
    for r, was, now in zip(runs, before, swap.games):
        assert all(torch.equal(v, was[k]) for k, v in r.game.state_dict().items()) and not r.game.training
        assert changed(now, was) >= {*sides}
    silent = kept(2, model="simclr" if experiment == "iac" else "supervised")
    for ask in (ease_of, lambda r: cross_play_of([r]), lambda r: role_swap_of([r, kept(5, model=r.spec.model)])):
        with pytest.raises(ConfigError,
            match=f"run {experiment}/2 is of the model '{silent.spec.model}': name a run of a game"):
            ask(silent)

def test_games_of_different_kinds_make_no_pair():
    from refcomm.training.populations import paired
    with pytest.raises(ConfigError, match="a ReferentialGame and a Linear make no pair"):
        paired(make_game(task()), nn.Linear(2, 2))

"""Messages that end, beside numbers that a run of EGG gave (facebookresearch/EGG, commit 54eb11c) and a slow reference."""
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from refcomm.agents.encoders import LinearEncoder
from refcomm.bottlenecks.gumbel import GumbelSoftmax
from refcomm.bottlenecks.quantize import UniformQuantizer
from refcomm.bottlenecks.reinforce import Reinforce
from refcomm.core import generator, seeded_init
from refcomm.data.objects import ObjectWorld, split
from refcomm.ending import Ending, end_shares
from refcomm.training.ensemble import Ensemble
from refcomm.games.referential import ReferentialGame
from refcomm.games.tasks import ObjectTask, objectives
from refcomm.training.loop import TrainSettings, fit

EGG = load_file(Path(__file__).parent/"reference"/"egg_recurrent.safetensors")
PLACES = { # EGG's names → ours
    "sender.agent.fc": "sender", "sender.hidden_to_output": "channel.speak",
    "sender.embedding": "channel.speaker.words.embed", "sender.sos_embedding": "channel.speaker.first",
    "sender.cell": "channel.speaker.words.cell", "sender.cells.0": "channel.speaker.words.cell",
    "receiver.cell": "channel.listener.words.cell", "receiver.embedding": "channel.listener.words.embed",
    "receiver.encoder.cell": "channel.listener.words.cell",
    "receiver.encoder.embedding": "channel.listener.words.embed", "receiver.agent.fc": "receiver",
}

def ours(name):
    head = max((k for k in PLACES if name == k or name.startswith(k + ".")), key=len)
    return PLACES[head] + name[len(head):].removesuffix("_l0")

def numbers(key): return {k.removeprefix(key): v for k, v in EGG.items() if k.startswith(key)}

def game_like(n, cell, bottleneck):
    game = ReferentialGame(nn.Linear(7, 6), Ending(bottleneck, 3, hidden=6, embedding=4, cell=cell, length_cost=.3),
        nn.Linear(7, 6))
    places, embeddings = dict(game.named_parameters()), ("sender.embedding.weight", "receiver.encoder.embedding.weight")
    weights = {k.removeprefix("weight/"): v for k, v in n.items() if k.startswith("weight/")}
    with torch.no_grad():
        for name, value in weights.items():
            looked_up = name in embeddings and places[ours(name)].shape != value.shape # EGG's REINFORCE agents look symbols up in a table
            places[ours(name)].copy_(value.T if looked_up else value)
            if looked_up: places[ours(name).replace("weight", "bias")].zero_()
    return game, places

@pytest.mark.parametrize("cell", ("rnn", "gru", "lstm"))
@pytest.mark.parametrize("kind", ("soft", "hard"))
def test_equals_egg_word_by_word(cell, kind):
    n = numbers(f"{cell}/{kind}/")
    game, places = game_like(n, cell, GumbelSoftmax(5, temperature=.8, straight_through=kind == "hard"))
    sent = game.send(n["x"], n["noise"])
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    close(sent.word, n["message"])
    each = torch.stack([game.judge(z, n["seen"]) for z in game.channel.listener(sent.word).unbind(1)], 1)
    close(each, n["output"])
    close((game.channel.shares(sent.word) * torch.arange(1., 5)).sum(1), n["length"]) # EGG counts the end
    loss = game(n["x"], n["labels"], n["seen"], n["noise"])
    close(loss + .3, n["loss"]) # and charges for it
    loss.backward()
    for name in (k.removeprefix("grad/") for k in n if k.startswith("grad/")):
        close(places[ours(name)].grad, n[f"grad/{name}"])
    sent = game.eval().send(n["x"])
    close(sent.lengths + 1., n["eval_length"])
    for word, theirs, length in zip(sent.word, n["eval_message"], sent.lengths):
        assert torch.equal(word[:length + 1], theirs[:length + 1])
    close((game.scores(sent.word, n["seen"]).argmax(1) == n["labels"]).float(), n["eval_accuracy"])
    assert len(set(sent.lengths.tolist())) > 1

def test_equals_egg_where_symbols_are_drawn():
    n = numbers("gru/drawn/")
    game, _ = game_like(n, "gru", Reinforce(5, entropy_weight=.5))
    forced = 1e4*F.one_hot(n["message"][:, :3], 5).float()
    sent = game.send(n["x"], forced)
    torch.testing.assert_close(sent.lengths + 1, n["length"])
    torch.testing.assert_close(sent.log_prob, n["log_prob"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(game.scores(sent.word, n["seen"]), n["output"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sent.loss, -.5*(n["entropy"] / n["length"].clamp(max=3)).mean()) # per word drawn; EGG counts the certain end, too
    losses = game.channel.prefix_loss(sent, lambda z: F.cross_entropy(game.judge(z, n["seen"]), n["labels"],
        reduction="none"))
    torch.testing.assert_close(losses, F.cross_entropy(n["output"], n["labels"], reduction="none")
        + .3*(n["length"] - 1), rtol=1e-4, atol=1e-5)

def test_shares_are_those_of_all_ways_to_end():
    ends = torch.rand(50, 5, generator=generator(0), dtype=torch.double)
    ends[:, -1] = 1
    for row, shares in zip(ends.tolist(), end_shares(ends).tolist()):
        left = 1.
        for e, share in zip(row, shares):
            assert share == pytest.approx(left*e, abs=1e-12)
            left -= share

def make(cell="gru", bottleneck=GumbelSoftmax, sizes={"alphabet_size": 8}, seed=0, **kwargs):
    with seeded_init(seed):
        return ReferentialGame(LinearEncoder(10, 32),
            Ending(bottleneck(**sizes), 3, hidden=32, embedding=16, cell=cell, **kwargs), LinearEncoder(10, 32))

def task(n_negatives=None):
    world = ObjectWorld(2, 5)
    return ObjectTask(world, split(world.size, dict(train=15, valid=5, test=5), generator(0)), n_negatives)

@pytest.mark.parametrize("cell, bottleneck, sizes, n_negatives", [
    ("lstm", GumbelSoftmax, dict(alphabet_size=8), 4), ("transformer", GumbelSoftmax, dict(alphabet_size=8), None),
    ("rnn", GumbelSoftmax, dict(alphabet_size=8, straight_through=True), None),
    ("gru", Reinforce, dict(alphabet_size=8, entropy_weight=.01), 4),
    ("transformer", UniformQuantizer, dict(alphabet_size=3, word_length=4), 4)])
def test_stacked_games_train_as_single_ones(cell, bottleneck, sizes, n_negatives):
    # Adam would blow up the rounding of gradients that are 0, such as those of a bias of all keys
    t, settings = task(n_negatives), TrainSettings(epochs=2, batch_size=5, lr=.1, optimizer="sgd")
    def trained(seeds):
        e = Ensemble([make(cell, bottleneck, sizes, s) for s in seeds])
        return e, fit(e, *objectives(e, t), t.n_train, settings, seeds)
    both, together = trained([0, 1])
    one, alone = trained([1])
    assert together.history[together.history.member == 1].loss.tolist() == pytest.approx(alone.history.loss.tolist(),
        rel=1e-4)
    for a, b in zip(both.member(1).parameters(), one.member(0).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

def test_what_follows_the_end_is_not_heard():
    game = make().eval()
    sent = game.send(torch.randn(200, 10, generator=generator(0)) * 5)
    assert sent.lengths.unique().numel() > 1
    for word, symbols, length in zip(sent.word, sent.symbols, sent.lengths):
        assert word[length:, 0].eq(1).all() and symbols[:length].ge(1).all() and symbols[length:].eq(-1).all()

def levenshtein(a, b):
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1): row.append(min(above[j] + 1, row[-1] + 1, above[j-1] + (x != y)))
        above = row
    return above[-1]

def spoken(n=40, width=5, alphabet=4, seed=0):
    g = generator(seed)
    return (torch.randint(alphabet, (n, width), generator=g), torch.randint(width + 1, (n,), generator=g),
        torch.randint(3, (n, 2), generator=g))

def test_distances_of_messages_that_end():
    from scipy.stats import spearmanr
    from refcomm.metrics.structure import distances, topographic_similarity
    symbols, lengths, meanings = spoken()
    lists = [m[:n] for m, n in zip(symbols.tolist(), lengths.tolist())]
    pairs = [(a, b) for i, a in enumerate(lists) for b in lists[i+1:]]
    edit = [levenshtein(a, b) for a, b in pairs]
    assert distances(symbols, "edit", lengths).tolist() == edit
    jaccard = [1 - len(set(a) & set(b)) / len(set(a) | set(b)) if a or b else 0. for a, b in pairs]
    assert distances(symbols, "jaccard", lengths).tolist() == pytest.approx(jaccard)
    hamming = [sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b)) for a, b in pairs]
    assert distances(symbols, "hamming", lengths).tolist() == hamming
    apart = [(meanings[i] != meanings[j]).sum() for i in range(len(lists)) for j in range(i + 1, len(lists))]
    assert topographic_similarity(symbols, meanings, lengths=lengths) == pytest.approx(spearmanr(apart, edit).statistic)
    full = torch.full_like(lengths, 5)
    for kind in ("edit", "jaccard", "hamming"):
        assert torch.equal(distances(symbols, kind), distances(symbols, kind, full))

def test_what_follows_the_end_changes_no_metric():
    from refcomm.metrics.structure import bosdis, entropy, measure, posdis, topographic_similarity
    symbols, lengths, meanings = spoken(60)
    other = symbols.clone()
    over = torch.arange(5) >= lengths[:, None]
    other[over] = torch.randint(4, (int(over.sum()),), generator=generator(9))
    for metric in (topographic_similarity, posdis, bosdis):
        assert metric(symbols, meanings, lengths=lengths) == metric(other, meanings, lengths=lengths) != metric(symbols,
            meanings)
    for a, b in zip(entropy(symbols, lengths)[1], entropy(other, lengths)[1]): assert a == b
    for name in ("topsim", "posdis", "bosdis"):
        a, b = (measure(name, s, meanings, generator(0), 20, 20, lengths=lengths) for s in (symbols, other))
        assert a == b

def test_positional_disentanglement_of_the_messages_that_reach_it():
    from refcomm.metrics.structure import posdis
    meanings = torch.tensor([(a, b) for a in range(3) for b in range(3)])
    symbols, lengths = meanings + 1, torch.where(meanings[:, 0] == 0, 1, 2)
    assert posdis(symbols, meanings, lengths) == pytest.approx(1.)
    assert posdis(symbols, meanings, torch.full((9,), 2)) == posdis(symbols, meanings)

def test_messages_fit_metrics_as_they_come():
    from refcomm.metrics.structure import posdis, topographic_similarity
    symbols, _, meanings = spoken()
    assert topographic_similarity(symbols[..., None], meanings) == topographic_similarity(symbols, meanings)
    assert posdis(symbols[..., None], meanings) == posdis(symbols, meanings)

@pytest.mark.parametrize("suffix", ("parquet", "elcc"))
def test_corpora_of_messages_that_end(tmp_path, suffix):
    from refcomm.corpora import describe, load_corpus, load_elcc, make_corpus, save_corpus, save_elcc
    symbols, lengths, meanings = spoken()
    lengths[0], corpus = 0, None
    ragged = [m[:n] for m, n in zip(symbols.tolist(), lengths.tolist())]
    for corpus in (make_corpus(symbols, meanings, lengths=lengths), make_corpus(ragged, meanings)):
        assert (corpus.lengths.tolist() == lengths.tolist()
            and corpus.messages[corpus.messages >= 0].tolist() == sum(ragged, []))
        if suffix == "parquet": back = load_corpus(save_corpus(tmp_path/"c.parquet", corpus))
        else: back = load_elcc(save_elcc(tmp_path/f"{id(corpus)}", {"a": corpus}, "birds"))
        assert all(torch.equal(a, b) for a, b in zip((*back[:2], back.lengths), (*corpus[:2], corpus.lengths)))
    assert describe(corpus)["mean_length"] == pytest.approx(float(lengths.double().mean()))
    assert describe(corpus)["n_symbols"] == 4

def test_all_messages_may_end_early_at_one_place(tmp_path):
    from refcomm.corpora import load_corpus, make_corpus, save_corpus
    corpus = make_corpus(torch.tensor([[1, 2, 0], [3, 1, 0]]), lengths=torch.tensor([2, 2]))
    back = load_corpus(save_corpus(tmp_path/"c.parquet", corpus))
    assert torch.equal(back.messages, torch.tensor([[1, 2], [3, 1]])) and back.lengths.tolist() == [2, 2]

@pytest.mark.parametrize("bottleneck, sizes",
    [(GumbelSoftmax, dict(alphabet_size=8)), (UniformQuantizer, dict(alphabet_size=3, word_length=4))])
def test_explorer_hears_what_is_sent(bottleneck, sizes):
    from refcomm.games.tasks import Games
    from refcomm.interact.explore import explore_games, game_html
    game, g = make(bottleneck=bottleneck, sizes=sizes).eval(), generator(0)
    x, items = torch.randn(20, 10, generator=g)*4, torch.randn(20, 5, 10, generator=g)
    e = explore_games(game, Games(x, torch.zeros(20, dtype=torch.long), items), [str(i) for i in range(100)])
    sent = game.send(x)
    scores = game.scores(sent.word, items)
    for i in range(20):
        torch.testing.assert_close(e.scores(i), scores[i].log_softmax(-1))
        assert "of" in game_html(e, i, {0: -1})
    torch.testing.assert_close(e.scores(0, {0: -1}), e.scores(0, {0: -1, 1: 1})) # nothing is heard after the end

def test_dumps_of_egg_are_read():
    from refcomm.egg import load_egg
    corpus = load_egg(Path(__file__).parent/"reference"/"egg_interaction.pt", sizes=(3, 3))
    assert corpus.lengths.tolist() == [2, 1, 4, 0, 2, 3, 2, 1, 4] # EGG counts the end, too
    assert corpus.messages[0].tolist() == [1, 2, -1, -1] and corpus.meanings.tolist() == [[a, b] for a in range(3)
        for b in range(3)]
    assert load_egg(Path(__file__).parent/"reference"/"egg_interaction.pt").meanings is None # one-hot, of unknown sizes
    with pytest.raises(Exception, match="make 7 numbers"):
        load_egg(Path(__file__).parent/"reference"/"egg_interaction.pt", sizes=(3, 4))

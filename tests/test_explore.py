"Explorers against the games themselves, over every channel and kind of candidates; pages, widgets and matches."
import html
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from refcomm.agents.encoders import Fixed, InformedSender, LinearEncoder, PoolCandidates
from refcomm.bottlenecks.continuous import Continuous
from refcomm.channels import make_bottleneck, make_channel
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.data.objects import ObjectWorld
from refcomm.interact.explore import (Explorer, codebook, explore, explore_games, explore_patches, explore_views,
    game_html, look_html, places_shown, static_page)
from refcomm.games.contrastive import DiscriminationGame
from refcomm.games.patchgame import make_patch_game
from refcomm.games.referential import EveryObject, ReferentialGame
from refcomm.games.tasks import Valued
from refcomm.interact.play import Match, match_html, play
from refcomm.papers.patch.spec import PUBLIC_CODE

WORLD = ObjectWorld(3, 3)
SIZES = {"gumbel": dict(alphabet_size=6), "reinforce": dict(alphabet_size=6),
    "quantized": dict(alphabet_size=3, word_length=5), "fsq": dict(alphabet_size=4, word_length=5),
    "vq": dict(alphabet_size=4, word_length=5),
         "learned": dict(alphabet_size=4, word_length=3, symbol_width=2)}
TARGETS = torch.arange(0, 27, 4)


def some_game(bottleneck="quantized", channel="instant", sender=None):
    extra = {} if channel == "instant" else dict(message_length=3, hidden=8, embedding=4)
    with seeded_init(1):
        c = make_channel(channel, make_bottleneck(bottleneck, **SIZES[bottleneck]), **extra)
        game = ReferentialGame(sender(c.dim) if sender else LinearEncoder(9, c.dim), c, LinearEncoder(9, c.dim)).eval()
    with torch.no_grad():
        for p in game.sender.parameters(): p.mul_(9) # or all objects get one message
    return game


def of_all(game): return explore_games(game, (WORLD.one_hot(TARGETS), TARGETS, EveryObject(WORLD)), str)


def to_say(e, i, j): return dict(enumerate(e.symbols[j].tolist())) # game i with the message of game j


@pytest.mark.parametrize("channel", ["instant", "recurrent"])
@pytest.mark.parametrize("bottleneck", SIZES)
def test_scores_are_the_games_for_every_channel(bottleneck, channel):
    game = some_game(bottleneck, channel)
    e, every = of_all(game), EveryObject(WORLD)
    with torch.no_grad(): said = game.send(WORLD.one_hot(TARGETS))
    assert torch.equal(e.symbols, said.symbols.flatten(1)) and len(e.symbols.unique(dim=0)) > 1
    for i, j in [(0, 0), (1, 4), (6, 2)]:
        with torch.no_grad(): expected = game.scores(said.word[j:j + 1], every)[0].log_softmax(-1)
        torch.testing.assert_close(e.scores(i, to_say(e, i, j)), expected, rtol=1e-4, atol=1e-5)
    for p, s in enumerate(e.symbols[3].tolist()): assert torch.equal(e.scores(3, {p: s}), e.scores(3))
    assert any(not torch.allclose(e.scores(3, {0: s}), e.scores(3), atol=1e-5) for s in range(e.alphabet_size))


def test_candidates_of_every_kind_are_told_apart():
    "The item that an explorer shows is the one that the game scores."
    game, index = some_game(), torch.stack([torch.randperm(27, generator=generator(i))[:5] for i in range(7)])
    index[:, 2] = TARGETS
    inputs, x, place = WORLD.one_hot(torch.arange(27)), WORLD.one_hot(TARGETS), torch.full((7,), 2)
    per_game = index.flatten().tolist()
    kinds = [(PoolCandidates(inputs, index), str), (inputs[index], [str(i) for i in per_game]),
        (Valued(WORLD.attributes(index), 3), lambda item: str(per_game[item]))]
    shown = [explore_games(game, (x, place, c), pictures) for c, pictures in kinds]
    whole = [explore_games(game, (x, TARGETS, c), str) for c in (inputs, Fixed(inputs), EveryObject(WORLD))]
    for i in range(7):
        assert all([e.look(item) for item in e.index[i].tolist()] == [str(o) for o in index[i].tolist()] for e in shown)
        assert all(e.look(e.index[i, e.target[i]].item()) == str(TARGETS[i].item()) for e in shown + whole)
        for e in shown[1:]:
            torch.testing.assert_close(e.scores(i, {1: 2}), shown[0].scores(i, {1: 2}), rtol=1e-4, atol=1e-5)
        for e in whole[1:]:
            torch.testing.assert_close(e.scores(i, {1: 2}), whole[0].scores(i, {1: 2}), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole[0].scores(i)[index[i]].log_softmax(-1), shown[0].scores(i), rtol=1e-4,
            atol=1e-5)


def test_an_informed_sender_is_explored_too():
    index = torch.stack([torch.cat([t[None], (t + 1 + torch.arange(4)) % 27]) for t in TARGETS])
    seen = PoolCandidates(WORLD.one_hot(torch.arange(27)), index)
    game = some_game(sender=lambda dim: InformedSender(9, dim, 5))
    e = explore_games(game, (seen, torch.zeros(7, dtype=torch.long), seen), str)
    with torch.no_grad():
        torch.testing.assert_close(e.scores(2), game.scores(game.send(seen).word, seen)[2].log_softmax(-1))


VIEWS = [torch.randn(9, 3, 16, 16, generator=generator(i)) for i in range(2)]


@pytest.mark.parametrize("n_candidates", [None, 4])
def test_games_within_a_batch(n_candidates):
    with seeded_init(0):
        eyes = lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 12), nn.BatchNorm1d(12))
        game = DiscriminationGame(eyes(), make_channel("instant", make_bottleneck("gumbel", alphabet_size=6), dim=12),
            eyes(), n_candidates=n_candidates).eval()
    e = explore_views(game, *VIEWS, str)
    assert e.index.shape == (9, n_candidates or 9) and [e.look(e.index[i, e.target[i]].item())
        for i in range(9)] == [str(i) for i in range(9)]
    played = game.evaluate(*VIEWS)
    assert sum(e.choice(i) == e.target[i] for i in range(9)).item() == round(played.accuracy.item()*9)
    with torch.no_grad(): meant, looked = game.decode(VIEWS[0])[0], game.receiver(VIEWS[1])
    for i, j in [(8, 8), (7, 1)]:
        expected = (F.cosine_similarity(meant[j:j + 1], looked[e.index[i]])/.1).log_softmax(-1)
        torch.testing.assert_close(e.scores(i, to_say(e, i, j)), expected, rtol=1e-4, atol=1e-4)


SMALL = dict(size=16, patch_size=8, vocab_size=8, rank="thin", vision="narrow", width=32, layers=1, heads=2, hidden=32,
    narrow=32, dim=64)


@pytest.mark.parametrize("changes", [{}, dict(symbols_per_patch=2), dict(masked=True), dict(n_candidates=4),
    PUBLIC_CODE])
def test_messages_of_patches(changes):
    with seeded_init(0): game = make_patch_game(**SMALL | changes).eval()
    e = explore_patches(game, *VIEWS, str)
    assert e.columns*2 == e.symbols.shape[1] and (e.symbols < 0).any() and (e.symbols >= 0).any()
    with torch.no_grad(): said, looked = game.send(VIEWS[0]), game.listener.encode_images(VIEWS[1])
    def score(i, message):
        with torch.no_grad():
            return (game.loss.scale*F.cosine_similarity(game.listener.decode(message),
                looked[e.index[i]])).log_softmax(-1)
    for i in (0, 8):
        torch.testing.assert_close(e.scores(i), score(i, type(said)(*(part[i:i + 1] for part in said))), rtol=1e-3,
            atol=1e-3)
        for p, s in enumerate(e.symbols[i].tolist()): assert torch.equal(e.scores(i, {p: s}), e.scores(i))
    i, p = (e.symbols >= 0).nonzero()[0].tolist()
    word, symbols = said.word[i:i + 1].clone(), said.symbols[i:i + 1].clone()
    strength = word[0, p].sum().item()
    for symbol in (-1, (e.symbols[i, p].item() + 1) % 8):
        word[0, p], symbols[0, p] = 0, symbol
        if symbol >= 0: word[0, p, symbol] = strength
        torch.testing.assert_close(e.scores(i, {p: symbol}),
            score(i, type(said)(word, symbols, said.importance[i:i + 1])), rtol=1e-3, atol=1e-3)
    i, p = (e.symbols < 0).nonzero()[0].tolist()
    assert not torch.allclose(e.scores(i, {p: 3}), e.scores(i), atol=1e-4) # a dropped patch can be made to speak


def test_looking_changes_nothing():
    game = some_game("vq", "recurrent")
    before, state = {k: v.clone() for k, v in game.state_dict().items()}, torch.get_rng_state()
    e = of_all(game)
    e.scores(0, {0: 1}); static_page(e, [0], {0: 1})
    assert all(torch.equal(v, before[k]) for k, v in game.state_dict().items()) and torch.equal(state,
        torch.get_rng_state())
    assert not game.training and all(p.grad is None for p in game.parameters())


@pytest.mark.parametrize("make, says", [
    (lambda: of_all(some_game().train()), "call game.eval"),
    (lambda: codebook(Continuous(3)), "put a quantiser in its place"),
    (lambda: explore_games(some_game(), (WORLD.one_hot(TARGETS), TARGETS, EveryObject(WORLD)), ["one"]),
    "up to number 26, but 1 displays"),
    (lambda: of_all(some_game()).scores(7), "game must lie in 0 … 6, got 7"),
    (lambda: of_all(some_game()).scores(0, {0: 3}), "symbol must lie in 0 … 2, got 3"),
    (lambda: of_all(some_game()).scores(0, {5: 0}), "place must lie in 0 … 4, got 5"),
    (lambda: places_shown(of_all(some_game()), 0, most=2), "most must be at least 3"),
    (lambda: look_html(3), "got int"),
    (lambda: Match(of_all(some_game()), 28, generator=generator(0)), "n_candidates must lie in 2 … 27"),
])
def test_bad_input_is_one_error_with_the_way_out(make, says):
    with pytest.raises(ConfigError, match=re.escape(says)): make()


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__(); self.tags, self.data = [], []
        self.feed(text); self.close()
    def handle_starttag(self, tag, attributes): self.tags.append(tag)
    def handle_data(self, data): self.data.append(data)


def toy(pictures=("a", "b", "c"), n=3):
    "A candidate is worth the symbol at its place."
    symbols = torch.stack([torch.arange(n).roll(i) for i in range(n)])
    return Explorer(symbols, symbols.argmax(-1), torch.arange(n).expand(n, -1), list(pictures),
        lambda game, s: s.float(), n, n)


@settings(max_examples=25)
@given(st.text(min_size=1), st.text(min_size=1))
def test_texts_cannot_become_markup(text, title):
    plain = Reader(static_page(toy(), [0], title="t")).tags
    assert Reader(static_page(toy([text, "b", "c"]), [0], title=title)).tags == plain
    assert html.unescape(look_html(text)[6:-7]) == text
    m = lambda pictures: match_html(Match(toy(pictures), 3, generator=generator(0)))
    assert Reader(m([text, "b", "c"])).tags == Reader(m("abc")).tags


def test_a_page_stands_alone():
    pictures = torch.randint(256, (9, 3, 5, 5), generator=generator(0), dtype=torch.uint8)
    with seeded_init(0): game = make_patch_game(**SMALL).eval()
    page = static_page(explore_patches(game, *VIEWS, pictures), range(3))
    assert not re.search(r"(src|href)=.(?!data:image/png;base64,)", page) and not {"script", "link",
        "iframe"} & set(Reader(page).tags)
    assert Reader(page).tags.count("img") == 27 and page.startswith("<!doctype html>")


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["game", "place", "symbol", "sent"]), st.integers(0, 2)), max_size=12))
def test_fields_do_what_they_say(steps):
    "Against a model: changes add up within a game, its own symbol is none."
    e = toy()
    (fields, shown) = explore(e).children
    game, place, symbol, sent = fields.children
    g, p, changes = 0, 0, {}
    for name, value in steps:
        if name == "game": game.value = value; changes, g = (changes if g == value else {}), value
        if name == "place": place.value = p = value
        if name == "symbol": symbol.value = value; changes = {**changes, p: value}
        if name == "sent": sent.click(); changes = {}
        changes = {k: v for k, v in changes.items() if v != e.symbols[g, k]}
        assert shown.value == game_html(e, g, changes) and symbol.value == e.change(g, changes)[p]


def test_dropping_by_hand():
    with seeded_init(0): game = make_patch_game(**SMALL).eval()
    e = explore_patches(game, *VIEWS, str)
    (fields, shown) = explore(e).children
    game_, place, symbol, sent = fields.children
    i, p = (e.symbols >= 0).nonzero()[0].tolist()
    game_.value, place.value, symbol.value = i, p, -1
    assert shown.value == game_html(e, i, {p: -1}) and "changed dropped" in shown.value


@pytest.mark.parametrize("widget", [lambda: explore(toy()), lambda: play(Match(toy(), 2, generator=generator(0)))])
def test_without_widgets_there_is_a_way_out(widget, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'refcomm[notebooks]'")): widget()
    assert "Game 0" in toy()._repr_html_()


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(2, 6), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_the_score_is_kept(seed, n, guesses):
    e = toy("abcdef", 6)
    m, person = Match(e, n, generator=generator(seed)), 0
    for k in guesses:
        assert len(set(m.places)) == n and m.places[m.answer] == e.target[m.game] and not re.search("target|you",
            "".join(re.findall("<figure.*?</figure>", match_html(m))))
        assert all(e.index[i, e.target[i]] != e.index[m.game, e.target[m.game]]
            for i in m.examples()) and len(m.examples()) == 4
        person += m.guess(k % n)
        assert ("target" in match_html(m)) and (m.rounds[-1] == (m.game, k % n == m.answer, True))
        with pytest.raises(ConfigError, match="this round is over"): m.guess(0)
        m.deal()
    assert m.score == dict(rounds=len(guesses), person=person, agent=len(guesses), chance=len(guesses)/n)


def test_the_same_generator_deals_the_same_match():
    deals = []
    for _ in range(2):
        m = Match(of_all(some_game()), 4, generator=generator(3))
        deals.append([(m.game, m.places, m.guess(0), m.deal()) for _ in range(5)])
    assert deals[0] == deals[1] and len({d[0] for d in deals[0]}) > 1

"PatchGame: soft ranks, gates, patches, speaker, listener and the game."
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.isotonic import isotonic_regression
from torch import nn

from refcomm.agents.patches import RANK_SIZES, SYMBOLS, Message, PatchRank, PatchSymbol, Speaker, top_patches
from refcomm.agents.softrank import block_means, pool_at_once, pool_violators, soft_rank
from refcomm.agents.transformer import Transformer, ViT, cut_patches, patch_grid, projection_head
from refcomm.bottlenecks.gate import Gate
from refcomm.core import ConfigError, anneal, generator, seeded_init
from refcomm.training.ensemble import Ensemble
from refcomm.games.patchgame import make_patch_game
from refcomm.papers.patch.spec import PUBLIC_CODE
from refcomm.training.loop import TrainSettings, fit

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


# soft ranks

def scores(n_rows, n, kind, seed=0):
    "Scores in double precision: spread out, close, tied, whole, or the slowest to pool."
    x = torch.randn(n_rows, n, generator=generator(seed, kind), dtype=torch.float64)
    if kind == "descent":
        return torch.cat([-1.001*torch.arange(n - n//3),
            torch.full((n//3,), -1.001*(n - n//3))]).double().repeat(n_rows, 1)
    return dict(spread=50*x, close=.1*x, even=3*x, tied=(2*x).round(), equal=0*x)[kind]


KINDS = ("spread", "close", "even", "tied", "equal", "descent")


def reference_rank(z):
    "Row by row, by scikit-learn's isotonic regression."
    rows = []
    for row in z:
        ordered, order = row.sort(descending=True, stable=True)
        ramp = torch.arange(len(row), 0, -1, dtype=row.dtype)
        fitted = torch.tensor(isotonic_regression((ordered - ramp).numpy(), increasing=False).copy())
        rows.append(torch.empty_like(row).scatter(0, order, ordered - fitted))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 49, 196])
def test_soft_ranks_are_isotonic_regression(kind, n):
    z = scores(16, n, kind)
    for strength in (.05, 1., 20.):
        torch.testing.assert_close(soft_rank(z, strength), reference_rank(z/strength), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 49, 196])
def test_pooling_at_once_gives_the_same_blocks(kind, n):
    for dtype in (torch.float32, torch.float64):
        y = scores(16, n, kind).to(dtype).sort(-1, descending=True).values - torch.arange(n, 0, -1)
        (block, size), (same, filled) = pool_violators(y), pool_at_once(y)
        assert torch.equal(same, block) and torch.equal(filled[:len(size)], size) and not filled[len(size):].any()
        torch.testing.assert_close(block_means(y, same, filled), block_means(y, block, size))


@given(n=st.integers(1, 9), rows=st.integers(1, 5), seed=st.integers(0, 999),
    spread=st.sampled_from([0., .3, 1., 4., 40.]))
def test_pooled_rows_are_the_nearest_that_never_rise(n, rows, seed, spread):
    "The min–max formula, over all blocks that begin before and end after each element (Robertson et al. 1988)."
    y = (spread*torch.randn(rows, n, generator=generator(seed), dtype=torch.float64)).mul(4).round()/4
    block, size = pool_violators(y)
    means = lambda row, i: min(max(row[j:k].mean().item() for k in range(i + 1, n + 1)) for j in range(i + 1))
    assert block_means(y, block, size).tolist() == [[pytest.approx(means(row, i)) for i in range(n)] for row in y]
    assert size.sum() == rows*n and block.flatten().bincount().tolist() == size.tolist()
    assert (block.diff(dim=-1) >= 0).all() and (block[1:, 0] == block[:-1, -1]
        + 1).all(), "no block is shared by two rows"


@pytest.mark.parametrize("kind", ["spread", "close", "even"])
def test_numeric_gradients_agree(kind):
    z = scores(6, 9, kind).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: soft_rank(z, .7), z)


def test_a_rank_learns_to_rise():
    "Following its gradient, the lowest of nine scores becomes the highest."
    z = torch.linspace(0, 2, 9).requires_grad_()
    for _ in range(200):
        gradient, = torch.autograd.grad(soft_rank(z)[0], z)
        z = (z + .1*gradient).detach().requires_grad_()
    assert soft_rank(z)[0] > 7.9


@given(seed=st.integers(0, 99), n=st.integers(1, 20), strength=st.sampled_from([.01, 1., 100.]))
def test_ranks_keep_order_sum_and_company(seed, n, strength):
    z = 3*torch.randn(4, 3, n, generator=generator(seed))
    r = soft_rank(z, strength)
    assert r.shape == z.shape and (r.sort(-1).values >= soft_rank(z.sort(-1).values, strength) - 1e-4).all()
    torch.testing.assert_close(r.sum(-1), torch.full((4, 3), n*(n + 1)/2), rtol=1e-4, atol=1e-3)
    for i, j in ((0, 0), (3, 2)):
        torch.testing.assert_close(r[i, j], soft_rank(z[i, j], strength), atol=1e-4, rtol=1e-5)


def test_far_scores_have_hard_ranks():
    z = torch.randperm(49, generator=generator(0)).float()*1.5
    assert torch.equal(soft_rank(z).round(decimals=4), z.argsort().argsort() + 1.)
    assert soft_rank(z).round(decimals=4).tolist() != soft_rank(z/2).round(decimals=4).tolist()


def test_no_number_is_reported_not_hidden():
    z = torch.rand(3, 5)
    z[1, 2] = torch.nan
    r = soft_rank(z)
    assert r[1].isnan().any() and r[[0, 2]].isfinite().all()


def test_torchsort_agrees():
    torchsort = pytest.importorskip("torchsort")
    z = scores(8, 49, "even").float()
    torch.testing.assert_close(soft_rank(z), torchsort.soft_rank(z, regularization="l2", regularization_strength=1.),
        atol=1e-3, rtol=1e-4)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_on_a_gpu(kind):
    z, slope = scores(64, 196, kind).float(), torch.rand(64, 196, generator=generator(1))
    found = []
    for device in ("cpu", "cuda"):
        x = z.to(device).requires_grad_()
        r = soft_rank(x)
        r.backward(slope.to(device))
        found.append((r.detach().cpu(), x.grad.cpu()))
    torch.testing.assert_close(*[f[0] for f in found], atol=1e-2, rtol=1e-4)
    if kind in ("close", "even", "equal"): torch.testing.assert_close(*[f[1] for f in found], atol=1e-3, rtol=1e-3)


@needs_gpu
def test_a_game_learns_on_a_gpu():
    with seeded_init(0): game = tiny().cuda()
    x, noise = views(8).cuda(), game.draw_noise(8, generator(0, "noise", "cuda"))
    with torch.autocast("cuda", torch.float16): loss = game(x, x.flip(-1), noise)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in game.parameters())


# gates

@pytest.mark.parametrize("temperature", [.3, 1., 3.])
def test_a_hard_gate_keeps_with_probability_p(temperature):
    "At any temperature: it is the gradient's alone."
    p, gate = torch.tensor([.02, .3, .5, .9, 1.]), Gate(temperature=temperature)
    kept = gate(p, gate.draw_noise((40_000, 5), generator(0)))
    torch.testing.assert_close(kept.mean(0), p, atol=.01, rtol=0)


def test_a_soft_gate_is_the_public_codes():
    "Gumbel-softmax over the logits (r, 1−r), first entry."
    p, gate = torch.rand(64, 9, generator=generator(0)), Gate("soft")
    noise = gate.draw_noise((64, 9), generator(1))
    expected = (torch.stack([p, 1 - p], -1) + noise).softmax(-1)[..., 0]
    torch.testing.assert_close(gate(p, noise), expected)


def test_noise_is_the_generators_alone():
    with seeded_init(0): game = tiny(dropout=.2)
    before = torch.random.get_rng_state()
    noise = [game.draw_noise(4, generator(3, "noise")) for _ in range(2)]
    assert torch.equal(*noise)
    x = views(4)
    losses = [game(x, x, noise[0]) for _ in range(2)]
    assert torch.equal(*losses) and torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(losses[0], game(x, x, game.draw_noise(4, generator(4, "noise"))))


# patches and transformers

@given(rows=st.integers(1, 4), columns=st.integers(1, 4), size=st.integers(1, 5), channels=st.integers(1, 3))
def test_patches_are_the_parts_of_the_image(rows, columns, size, channels):
    x = torch.rand(2, channels, rows*size, columns*size, generator=generator(0))
    patches = cut_patches(x, size)
    assert torch.equal(patches, torch.nn.functional.unfold(x, size, stride=size).mT)
    assert patches.shape[1] == rows*columns


@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(1, 64))
def test_only_images_that_come_out_even(height, width, size):
    if height % size == width % size == 0: assert patch_grid(height, width, size) == (height//size, width//size)
    else:
        with pytest.raises(ConfigError, match="the nearest sizes that can are") as e: patch_grid(height, width, size)
        for name in str(e.value).split(" are ")[1].split(" and "):
            h, w = map(int, name.split(" × "))
            assert h % size == w % size == 0 < h*w and max(abs(h - height), abs(w - width)) < max(size, 2)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_transformer_is_torchs(pre_norm):
    "The same numbers as torch's own encoder with the same weights."
    with seeded_init(0): t = Transformer(6, 24, 2, 3, pre_norm).eval()
    layer = nn.TransformerEncoderLayer(24, 3, 96, 0., batch_first=True, norm_first=pre_norm)
    whole = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24) if pre_norm else None, enable_nested_tensor=False).eval()
    whole.layers.load_state_dict(t.layers.state_dict())
    x = torch.randn(3, 6, 24, generator=generator(0))
    tokens = torch.cat([t.first.expand(3, 1, 24), x], 1) + t.positions
    torch.testing.assert_close(t(x), whole(tokens), atol=1e-5, rtol=1e-5)
    assert not torch.equal(*(layer.linear1.weight for layer in t.layers)), "each layer has a beginning of its own"


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("pre_norm, activation", [(False, "relu"), (True, "gelu")])
def test_the_first_token_alone_is_the_first_of_all(pre_norm, activation, layers):
    "Numbers and gradients, with and without hidden tokens and places of their own."
    with seeded_init(0): t = Transformer(6, 24, layers, 3, pre_norm, activation)
    x = torch.randn(2, 4, 24, generator=generator(0))
    seen = torch.tensor([[1, 0, 1, 1], [0]*4]).bool()
    places = torch.tensor([[5, 0, 2, 1], [3, 2, 1, 0]])
    for args in ((None, None), (seen, None), (None, places), (seen, places)):
        out = [f(x, *args) for f in (t.summary, lambda *a: t(*a)[:, 0])]
        torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)
        pairs = zip(*(torch.autograd.grad(o.sin().sum(), list(t.parameters())) for o in out))
        for ours, theirs in pairs: torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_hidden_tokens_are_as_if_absent():
    "With equal positions for all, hiding tokens is leaving them out."
    with seeded_init(0): t = Transformer(6, 24, 2)
    with torch.no_grad(): t.positions.zero_()
    x, seen = torch.randn(1, 6, 24, generator=generator(0)), torch.tensor([[1, 0, 1, 1, 0, 0]]).bool()
    torch.testing.assert_close(t(x, seen)[:, 0], t(x[:, seen[0]])[:, 0], atol=1e-5, rtol=1e-5)


# speaker and listener

def views(n, size=32, seed=0): return torch.randn(n, 3, size, size, generator=generator(seed, "images"))


SMALL = dict(size=32, patch_size=8, vocab_size=12, rank="thin", vision="narrow", width=12, layers=1, heads=2, hidden=16,
    narrow=8, dim=20)


def tiny(**changes): return make_patch_game(**(SMALL | changes))


@pytest.mark.parametrize("size, patch_size", [(32, 32), (64, 32), (48, 16), (24, 8), (12, 4)])
def test_every_patch_size_has_its_places(size, patch_size):
    n = (size//patch_size)**2
    x = views(2, size)
    with seeded_init(0):
        s = Speaker(PatchSymbol(size, patch_size, 7, 3, hidden=8), PatchRank(patch_size, "thin")).eval()
    m = s(x)
    assert m.word.shape == (2, 3*n, 7) and m.importance.shape == (2,
        n) and (m.length >= 3).all() and (m.length % 3 == 0).all()


@pytest.mark.parametrize("trunk", ["resnet9", "thin"])
@pytest.mark.parametrize("coarse, fine", list(zip(RANK_SIZES, RANK_SIZES[1:])))
def test_dilated_ranks_hold_the_coarse_ones(trunk, coarse, fine):
    x, made = views(2, 64), []
    for s in (coarse, fine):
        with seeded_init(0): made.append(PatchRank(s, trunk).eval()(x).view(2, 64//s, 64//s))
    torch.testing.assert_close(made[0], made[1][:, ::2, ::2], atol=1e-5, rtol=1e-4)


def test_a_score_belongs_to_its_place():
    "What changes in one corner changes the scores there the most."
    with seeded_init(0): rank = PatchRank(16, "thin").eval()
    x = views(1, 128)
    y = x.clone()
    y[..., :16, 112:] += 2
    with torch.no_grad(): change = (rank(y) - rank(x)).abs().view(8, 8)
    assert change[:2, 6:].mean() > 4*change[4:, :4].mean() > 0


@pytest.mark.parametrize("kind", SYMBOLS)
def test_context_free_means_context_free(kind):
    with seeded_init(0): symbol = PatchSymbol(32, 8, 10, kind=kind, **dict(dim=12, layers=1) if kind == "vit" else {})
    x = views(2)
    y = x.clone()
    y[..., 8:, :] += 1
    same = torch.isclose(symbol(x), symbol(y), atol=1e-5).all(-1).all(-1)
    assert not same[:, 4:].any() and same[:, :4].all() == (kind != "vit")


@pytest.mark.parametrize("kind", ["linear", "vit"])
def test_every_part_of_the_public_codes_agents_learns(kind):
    game = tiny(**PUBLIC_CODE | dict(symbol=kind))
    x = views(6)
    game(x, x.flip(-1), game.draw_noise(6, generator(0))).backward()
    still = [k for k, p in game.named_parameters() if p.grad is None or (p.dim() > 1 and not p.grad.any())]
    assert not still


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_a_message_is_symbols_times_gate(gate):
    game = tiny(gate=gate)
    s, x = game.speaker, views(5)
    noise = s.draw_noise(5, generator(0))
    m = s(x, noise)
    said = s.bottleneck(s.symbol(x), noise[..., :12].unsqueeze(2))
    p = soft_rank(s.rank(x))/16
    kept = s.gate(p, noise[..., 12:])
    torch.testing.assert_close(m.word, said.word.flatten(1, 2)*kept[..., None])
    torch.testing.assert_close(m.importance, p)
    assert torch.equal(m.sent, kept > .5) and torch.equal(m.symbols[m.sent],
        said.symbols.flatten(1)[m.sent]) and (m.symbols[~m.sent] == -1).all()


def test_the_most_important_patch_is_always_sent():
    "Drawn or not; equal scores are all sent, and half of unequal ones that are far apart."
    s = tiny().speaker
    s.rank.forward = lambda images, noise=None: far
    x = views(64)
    far = 2.*torch.rand(64, 16, generator=generator(0)).argsort(-1)
    best = far.argmax(-1, keepdim=True)
    assert s(x, s.draw_noise(64, generator(0))).sent.gather(1, best).all()
    m = s.eval()(x)
    assert m.sent.gather(1, best).all() and (m.length == 8).all() and torch.equal(m.sent, m.importance > .53)
    far = torch.full((64, 16), 123.456)
    assert (s(x).length == 16).all()


def test_lengths_of_drawn_messages():
    "The mean is that of the ranks, (K+1)/2, whatever the scores."
    s = tiny().speaker
    x = views(500)
    with torch.no_grad(): lengths = s(x, s.draw_noise(500, generator(0))).length.float()
    assert lengths.mean().item() == pytest.approx(8.5, abs=.3) and lengths.std() > 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_temperature_falls_in_half_the_training(schedule):
    game = tiny(schedule=schedule)
    seen = [game.cool(p) or game.speaker.bottleneck.temperature for p in (0, .1, .25, .5, .8, 1.)]
    assert seen == [5., anneal(schedule, 5, 1, .2), 3., 1., 1., 1.]


@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_message_means_one_thing(masked):
    "In training, too: the loss of a batch in which everything is dropped is finite, and has finite gradients."
    game = tiny(masked=masked)
    noise = game.draw_noise(4, generator(0))
    noise[..., -2:] = torch.tensor([-50., 50.])
    m = game.send(views(4), noise)
    assert not m.sent.any() and not m.word.any() and (m.length == 0).all()
    read = game.listener.decode(m)
    assert read.isfinite().all() and torch.equal(read, read[:1].expand(4, -1))
    game(views(4), views(4, seed=1), noise).backward()
    assert all(p.grad.isfinite().all() for p in game.parameters() if p.grad is not None)


def test_a_mask_hides_what_is_dropped():
    game = tiny(masked=True).eval()
    m = game.send(views(6))
    other = m._replace(word=m.word + (~m.sent[..., None])*torch.rand(6, 16, 12))
    torch.testing.assert_close(game.listener.decode(other), game.listener.decode(m), atol=1e-5, rtol=1e-5)
    game.listener.masked = False
    assert not torch.allclose(game.listener.decode(other), game.listener.decode(m), atol=1e-4)


# normalised scores

def bright(n, size=32, seed=0):
    "Images whose patches differ in brightness, and hardly in anything else."
    g = generator(seed)
    return torch.randn(n, 1, size//8, size//8, generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1,
        3, -1, -1) + .1*torch.randn(n, 3, size, size, generator=g)


def equally_used(symbols, n):
    return torch.special.entr(symbols.flatten().bincount(minlength=n)/symbols.numel()).sum().exp().item()


@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("l", [1, 2])
def test_normalised_scores_share_the_patches_among_the_symbols(kind, l):
    own = dict(dim=24, layers=1, heads=2) if kind == "vit" else {}
    with seeded_init(0): plain, fair = (PatchSymbol(32, 8, 40, l, kind, 48, norm, **own) for norm in (None, "batch"))
    scores = fair(bright(64)).flatten(0, 1)
    torch.testing.assert_close(scores.mean(0), torch.zeros(l, 40), atol=1e-3, rtol=0)
    torch.testing.assert_close(scores.std(0, correction=0), torch.full((l, 40), 3.), atol=.2, rtol=0)
    if kind == "mlp": assert equally_used(scores.argmax(-1), 40) > 2*equally_used(plain(bright(64)).argmax(-1), 40)


def test_trained_statistics_are_used_in_evaluation():
    with seeded_init(0): symbol = PatchSymbol(32, 8, 12, hidden=24, norm="batch")
    for seed in range(60): symbol(bright(64, seed=seed))
    inside, asleep = symbol(bright(64, seed=99)).detach(), symbol.eval()(bright(64, seed=99)).detach()
    assert (asleep - inside).abs().mean() < .5 and (asleep.argmax(-1) == inside.argmax(-1)).float().mean() > .7
    assert torch.equal(symbol(bright(64, seed=99))[:1], symbol(bright(64, seed=99)[:1]))
    kept = {k: v.clone() for k, v in symbol.state_dict().items()}
    with seeded_init(1): other = PatchSymbol(32, 8, 12, hidden=24, norm="batch").eval()
    other.load_state_dict(kept)
    assert torch.equal(other(bright(4)), symbol(bright(4)))


def test_processes_share_the_statistics_of_scores():
    with seeded_init(0):
        game = make_patch_game(16, 8, vocab_size=12, norm="batch", rank="thin", vision="narrow", width=24, layers=1,
            heads=2, hidden=16, narrow=8, dim=16)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(game).speaker.symbol.norm
    assert isinstance(shared, nn.SyncBatchNorm) and torch.equal(shared.weight, torch.full((12,), 3.))


# the game

def test_a_batch_is_played_by_itself():
    "In evaluation mode, an image's message and features do not depend on the batch."
    game = tiny().eval()
    x, y = views(9), views(9, seed=1)
    with torch.no_grad():
        whole, parts = game.send(x).symbols, torch.cat([game.send(p).symbols for p in x.split(2)])
        assert torch.equal(whole, parts) and (whole[0] == game.send(x[:1]).symbols[0]).all()
        played = game.evaluate(x, y)
        encoded = game.listener.encode_images(y)
        scores = torch.stack([torch.cosine_similarity(game.listener.decode(game.send(x[i:i+1])), encoded)
            for i in range(9)])
    assert played.accuracy == (scores.argmax(-1) == torch.arange(9)).float().mean() and torch.equal(played.symbols,
        whole)
    assert played.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(scores/.07, torch.arange(9)).item(),
        rel=1e-4)


def test_played_among_fewer():
    game = tiny(n_candidates=2).eval()
    with torch.no_grad():
        wins = torch.stack([game.evaluate(views(8, seed=i), views(8, seed=i)).accuracy for i in range(20)])
    assert .2 < wins.mean() < .8


def test_defaults_are_the_papers():
    "Sizes of the text, and of the public code where the text is silent."
    game = make_patch_game()
    s, l = game.speaker, game.listener
    assert s.n_symbols == 49 and s.symbol.vocab_size == 128 and s.symbol.symbols_per_patch == 1
    assert [m.out_features for m in (s.symbol.look, *s.symbol.speak[1::2])] == [768, 768, 128]
    assert (len(l.language.layers), l.language.dim, l.language.layers[0].self_attn.num_heads,
        l.language.layers[0].linear1.out_features) == (12, 192, 3, 768)
    assert l.vision.feature_dim == 512 and l.project_vision[-1].weight.shape == (65_536,
        256) and not l.language.layers[0].norm_first
    assert isinstance(game.loss.log_scale,
        float) and s.gate.kind == "hard" and s.bottleneck.straight_through and s.rank.dropout == 0
    assert PUBLIC_CODE.keys() <= make_patch_game.__annotations__.keys()


def test_vision_by_name():
    assert isinstance(tiny(vision="vit").listener.vision, ViT)
    assert tiny(vision="resnet18").listener.vision.feature_dim == 512


def game_and_data(seed=0, n=24, **changes):
    with seeded_init(seed): e = Ensemble([tiny(**changes)])
    x = views(n, e.template.speaker.symbol.size)
    def loss(idx, generators):
        noise = torch.stack([e.template.draw_noise(idx.shape[1], g) for g in generators])
        return e.map(lambda game, i, u: game(x[i], x[i], u), idx, noise)
    def valid():
        played = e.map(lambda game: tuple(game.evaluate(x, x))[:2])
        return dict(loss=played[0], accuracy=played[1])
    return e, loss, valid, n


SETTINGS = TrainSettings(epochs=3, batch_size=8, lr=1e-3, drop_last=True)


def train(path=None, cut=None, settings=SETTINGS, **changes):
    e, loss, valid, n = game_and_data(**changes)
    steps = []
    def counted(*args):
        if len(steps) == cut: raise InterruptedError
        steps.append(1)
        return loss(*args)
    return (e, fit(e, counted, valid, n, settings, [0], checkpoint=path, checkpoint_seconds=0, report=lambda *_: None,
        on_progress=e.template.cool))


def test_training_resumes_to_the_same_numbers(tmp_path):
    whole, fitted = train(dropout=.1)
    with pytest.raises(InterruptedError): train(tmp_path/"c.safetensors", cut=4, dropout=.1)
    resumed, again = train(tmp_path/"c.safetensors", dropout=.1)
    assert again.history.drop(columns="seconds").equals(fitted.history.drop(columns="seconds"))
    for (k, a), b in zip(whole.full_state().items(), resumed.full_state().values()): assert torch.equal(a, b), k


@pytest.mark.parametrize("changes", [dict(vocab_size=13), dict(patch_size=16), dict(symbols_per_patch=2)])
def test_a_checkpoint_of_another_speaker_is_set_aside(tmp_path, changes):
    "Other V, S or l are other shapes."
    one = TrainSettings(epochs=1, batch_size=8, lr=1e-3)
    train(tmp_path/"c.safetensors", settings=one)
    with pytest.warns(UserWarning, match="belongs to another model, data or setting"):
        train(tmp_path/"c.safetensors", settings=one, **changes)


def test_the_game_is_learned():
    "Images of one colour each: after a few dozen steps, one of 32 is found far more often than by chance."
    x = 2*torch.randn(32, 3, 1, 1, generator=generator(0)).expand(-1, -1, 16, 16)
    with seeded_init(0):
        game = tiny(size=16, symbol="linear", vision="vit", vocab_size=40, width=24, hidden=32, narrow=16)
    optimizer, losses = torch.optim.AdamW(game.parameters(), 3e-3), []
    for i in range(60):
        game.cool(i/60)
        loss = game(x, x, game.draw_noise(32, generator(i, "noise")))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    with torch.no_grad(): played = game.eval().evaluate(x, x)
    assert sum(losses[-10:])/10 < 2.7 < losses[0] and played.accuracy > 3/32


# bad input

@pytest.mark.parametrize("wrong, words", [
    (lambda: patch_grid(100, 96, 32),
    "images of 100 × 96 pixels cannot be cut into patches of 32 × 32: the nearest sizes that can are 96 × 96 and 128 × 96"),
    (lambda: patch_grid(64, 64, 0), "patch_size must be at least 1, got 0"),
    (lambda: tiny(size=30), "the nearest sizes that can are 24 × 24 and 32 × 32"),
    (lambda: tiny()(views(4, 40), views(4, 32)), "images of 40 × 40 pixels were shown to an agent built for 32 × 32"),
    (lambda: tiny(vision="vit")(views(4), views(4, 24), tiny().draw_noise(4, generator(0))),
    "images of 24 × 24 pixels were shown to an agent built for 32 × 32"),
    (lambda: tiny(patch_size=7, size=28), "unknown patch_size of PatchRank 7"),
    (lambda: tiny(vocab_size=0), "vocab_size must be at least 2, got 0"),
    (lambda: tiny(vocab_size=1), "vocab_size must be at least 2, got 1"),
    (lambda: tiny(symbols_per_patch=0), "symbols_per_patch must be at least 1, got 0"),
    (lambda: tiny(symbol="mpl"), "unknown kind of PatchSymbol 'mpl': did you mean 'mlp'"),
    (lambda: tiny(vision="resnet19"), "unknown vision 'resnet19': did you mean 'resnet"),
    (lambda: tiny(rank="resnet18"), "unknown trunk of PatchRank 'resnet18': did you mean 'resnet9'"),
    (lambda: tiny(gate="softt"), "unknown kind of gate 'softt': did you mean 'soft'"),
    (lambda: tiny(schedule="cosin"), "unknown schedule 'cosin': did you mean 'cosine'"),
    (lambda: tiny(dropout=1.), "dropout must be from 0 to below 1, got 1.0"),
    (lambda: tiny(heads=5), "dim must be a multiple of heads, got 12 and 5: 10 would do"),
    (lambda: tiny(temperature=0.), "temperature must be above 0, got 0.0"),
    (lambda: tiny(negatives="all"), "unknown negatives 'all'"),
    (lambda: tiny(n_candidates=1), "n_candidates must be at least 2, got 1"),
    (lambda: tiny()(views(1), views(1)), "a game within a batch needs at least 2 images, got 1"),
    (lambda: tiny().eval().evaluate(views(1), views(1)), "a game within a batch needs at least 2 images, got 1"),
    (lambda: tiny().eval().evaluate(views(3), views(4)), "sender and receiver see 3 and 4 images"),
    (lambda: tiny(n_candidates=9).eval().evaluate(views(3), views(3)), "9 candidates were asked for, but a batch has 3"),
    (lambda: tiny()(views(3), views(3)), "trains on noise"),
    (lambda: tiny(dropout=.1).speaker.rank(views(3)), "PatchRank with dropout trains on noise"),
    (lambda: tiny().listener.decode(Message(torch.zeros(2, 16, 13), torch.zeros(2, 16).long(), torch.rand(2, 16))),
    "the speaker has 13 symbols, the listener knows 12"),
    (lambda: tiny().listener.decode(Message(torch.zeros(2, 25, 12), torch.zeros(2, 25).long(), torch.rand(2, 25))),
    "25 tokens for a transformer of at most 16"),
    (lambda: Speaker(PatchSymbol(64, 16, hidden=4), PatchRank(32, "thin")),
    "PatchSymbol looks at patches of 16 pixels, PatchRank at 32"),
    (lambda: Speaker(PatchSymbol(64, 16, hidden=4), PatchRank(16, "thin"), cooled=0.),
    "cooled is a share of the training"),
    (lambda: top_patches(torch.rand(2, 49), 50), "the 50 best patches were asked for, but an image has 49"),
    (lambda: top_patches(torch.rand(2, 49), 0), "k must be at least 1, got 0"),
    (lambda: soft_rank(torch.rand(3), 0.), "strength must be above 0, got 0.0"),
    (lambda: soft_rank(torch.rand(3, 0)), "have no ranks"),
    (lambda: projection_head(0), "in_dim must be at least 1, got 0"),
])
def test_bad_input_is_one_clear_error(wrong, words):
    with pytest.raises(ConfigError) as e: wrong()
    assert words in str(e.value)


def test_top_patches_are_the_best():
    z = torch.rand(5, 49, generator=generator(0))
    assert torch.equal(top_patches(z, 7), z.topk(7).indices)
    assert torch.equal(top_patches(torch.zeros(2, 5), 5),
        torch.arange(5).expand(2, 5)), "ties in the order of the patches"

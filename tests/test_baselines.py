"The baselines of PatchGame: losses against slow references, slow copies and codebooks, training that resumes."
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributions as td
import torch.multiprocessing as mp
import torch.nn.functional as F

from conftest import free_port
from refcomm.agents.patches import PatchRank
from refcomm.agents.vision import GRID_SIZES, grid_trunk, make_trunk
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.distributed import join_processes
from refcomm.training.ensemble import Ensemble
from refcomm.games.baselines import MoCo
from refcomm.games.vae import PatchVAE, VQVAE2, edge_weights, kl_bernoulli, kl_gaussian, kl_uniform
from refcomm.training.loop import TrainSettings, fit


def views(n, size=32, seed=0): return torch.randn(n, 3, size, size, generator=generator(seed, "images"))


def moco(seed=0, **changes):
    with seeded_init(seed): return MoCo(**(dict(trunk="narrow", queue=24, momentum=.9, dim=16) | changes))


def vq(seed=0, **changes):
    with seeded_init(seed): return VQVAE2(**(dict(codebook_size=12, code_dim=6, width=8, blocks=1, hidden=4) | changes))


def vae(seed=0, **changes):
    with seeded_init(seed):
        return PatchVAE(**(dict(size=32, patch_size=16, parts=5, code_dim=3, trunk="narrow", width=4) | changes))


MAKE = dict(moco=moco, grouped=lambda: moco(groups=2), vq=vq, vae=vae,
    categorical=lambda: vae(occurrence="categorical", edges=True))


# one interface

@pytest.mark.parametrize("name", MAKE)
def test_all_are_called_alike(name):
    b, x, y = MAKE[name](), views(8), views(8, seed=1)
    noise = b.draw_noise(8, generator(0))
    before = torch.get_rng_state()
    loss = b(x, y, noise)
    loss.backward()
    b.cool(.3)
    played = b.eval().evaluate(x, y)
    assert loss.dim() == 0 and all(p.grad is not None for p in b.parameters()), name
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn from the global generator"
    assert b.trunk(x).shape == (8, b.trunk.feature_dim) and played.loss.isfinite()
    if isinstance(b, MoCo): assert b.symbols(x) is None is played.symbols and 0 <= played.accuracy <= 1
    else:
        symbols = b.symbols(x)
        assert played.accuracy.isnan() and torch.equal(played.symbols, symbols)
        assert (symbols.dtype == torch.int64 and 0 <= symbols.min() and symbols.max() < b.vocab_size
            and symbols.shape == (8, 80 if name == "vq" else 4))


@pytest.mark.parametrize("name", MAKE)
def test_playing_changes_nothing(name):
    b, x = MAKE[name]().eval(), views(6)
    state = {k: v.clone() for k, v in [*b.named_parameters(), *b.named_buffers()]}
    first, second = b.evaluate(x, x), b.evaluate(x, x)
    assert torch.equal(first.loss, second.loss) and all(torch.equal(v, state[k])
        for k, v in [*b.named_parameters(), *b.named_buffers()])


# resuming

def train(make, path=None, cut=None, n=24, epochs=3):
    b, x, steps = make(), views(n), []
    e = Ensemble([b])
    def loss(i, generators):
        if len(steps) == cut: raise InterruptedError
        steps.append(1)
        noise = b.draw_noise(i.shape[1], generators[0])
        seen = x[i] + .1*torch.randn(i.shape[0], *x[i[0]].shape, generator=generators[0])
        return e.map(lambda b, u, v, z=None: b(u, v, z), x[i], seen, *(() if noise is None else (noise[None],)))
    def valid():
        played = e.map(lambda b: b.evaluate(x, x)[:2])
        return dict(loss=played[0], accuracy=played[1].nan_to_num(0.))
    fitted = fit(e, loss, valid, n, TrainSettings(epochs=epochs, batch_size=8, lr=1e-3), [0], checkpoint=path,
        checkpoint_seconds=0, report=lambda *_: None, on_progress=b.cool)
    return e, fitted.history.drop(columns="seconds")


@pytest.mark.parametrize("name", MAKE)
def test_training_resumes_to_the_same_numbers(name, tmp_path):
    "Slow weights, queue and codebooks included."
    whole, fitted = train(MAKE[name])
    with pytest.raises(InterruptedError): train(MAKE[name], tmp_path/"c.safetensors", cut=4)
    resumed, again = train(MAKE[name], tmp_path/"c.safetensors")
    assert again.equals(fitted)
    for (k, a), b in zip(whole.full_state().items(), resumed.full_state().values()): assert torch.equal(a, b), k


# MoCo

def test_mocos_loss_is_the_cross_entropy_of_the_own_key():
    "Against the queue as it was before, which then takes the new keys in turn."
    m = moco()
    banks = []
    for step in range(4):
        x, y = views(9, seed=2*step), views(9, seed=2*step + 1)
        bank = m.loss.memory_bank.bank.clone()
        loss, q, k = m(x, y), m.queries(x), m.keys(y)
        rows = [-torch.log_softmax(torch.cat([F.cosine_similarity(q[i], k[i], dim=0)[None],
            F.cosine_similarity(q[i:i+1], bank)])/.2, 0)[0] for i in range(9)]
        assert loss.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)
        banks.append(F.normalize(k, dim=-1))
    bank = m.loss.memory_bank.bank
    torch.testing.assert_close(bank[:9], banks[3])
    torch.testing.assert_close(bank[9:24], torch.cat([banks[1], banks[2][:6]]))


def test_slow_weights_follow():
    "They are no parameters, have no gradient, and move by a tenth of the way at every step, seen through an ensemble, too."
    m, x = moco(), views(8)
    e = Ensemble([m])
    assert not any("slow" in name for name in e.names) and sum(k.startswith("buffer slow.")
        for k in e.full_state()) >= len(e.names)
    expected = {k: p.detach().clone() for k, p in m.named_parameters()}
    optimizer = torch.optim.SGD(e.parameters(), .1)
    for _ in range(3):
        for (k, old), new in zip(expected.items(), e.stacked): expected[k] = .9*old + .1*new[0].detach()
        optimizer.zero_grad(); e.map(lambda b: b(x, x)).sum().backward(); optimizer.step()
    for k, v in expected.items():
        torch.testing.assert_close(m.slow.get_buffer(k), v, atol=1e-5, rtol=1e-4)
        assert not m.slow.get_buffer(k).requires_grad
    assert all(p.grad is not None for p in e.parameters())


def test_groups_have_statistics_of_their_own():
    m, x = moco(groups=2), views(8)
    noise = torch.tensor([0., 4., 1., 5., 2., 6., 3., 7.])
    even, odd = x[::2], x[1::2]
    k = m.keys(x, noise)
    torch.testing.assert_close(k[::2], m.slow["project"](m.slow["trunk"](even)))
    torch.testing.assert_close(k[1::2], m.slow["project"](m.slow["trunk"](odd)))
    torch.testing.assert_close(m.queries(x)[:4], m.project(m.trunk(x[:4])))


def test_moco_plays_within_the_batch():
    m, x = moco().eval(), views(10)
    q, k = m.queries(x), m.keys(x.flip(-1))
    scores = F.cosine_similarity(q[:, None], k[None], dim=-1)
    played = m.evaluate(x, x.flip(-1))
    assert played.accuracy == (scores.argmax(1) == torch.arange(10)).float().mean()
    assert played.loss.item() == pytest.approx(F.cross_entropy(scores/.2, torch.arange(10)).item(), rel=1e-4)


def one_of_two(rank, port):
    for k, v in dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items(): os.environ[k] = str(v)
    torch.set_num_threads(1)
    join_processes(2)
    m, v, x = moco(), vq(), views(8)[4*rank:][:4]
    m(x, x.flip(-1)); v(x)
    for mine in (m.loss.memory_bank.bank, v.top.codebook):
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine.contiguous())
        assert torch.equal(*both)
    torch.testing.assert_close(m.loss.memory_bank.bank[4*rank:][:4], F.normalize(m.keys(x.flip(-1)), dim=-1))
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_share_queue_and_codebooks():
    mp.spawn(one_of_two, (free_port(),), nprocs=2)


# VQ-VAE-2

def test_symbols_are_the_nearest_vectors():
    v, x = vq(), views(5, 24)
    top, bottom = v.encode(x)
    assert [level[1].shape for level in (top, bottom)] == [(5, 3, 3), (5, 6, 6)]
    fine = v.trunk.bottom(x)
    for codebook, said, (vectors, symbols, _) in ((v.top, v.say_top(v.trunk.top(fine)), top),
        (v.bottom, v.say_bottom(torch.cat([v.hear_top(top[0]), fine], 1)), bottom)):
        distance = (said[:, None] - codebook.codebook[None, :, :, None, None]).square().sum(2)
        assert torch.equal(symbols, distance.argmin(1))
        torch.testing.assert_close(vectors, codebook.codebook[symbols].permute(0, 3, 1, 2))
    assert torch.equal(v.symbols(x), torch.cat([top[1].flatten(1), 12 + bottom[1].flatten(1)], 1))


def test_codebooks_are_moving_averages():
    v, x = vq(decay=.7), views(6)
    said = v.say_top(v.trunk.top(v.trunk.bottom(x))).detach().permute(0, 2, 3, 1).flatten(0, 2)
    chosen = F.one_hot(v.symbols(x)[:, :16].flatten(), 12).float()
    counts, sums = .7*torch.ones(12) + .3*chosen.sum(0), .7*v.top.codebook + .3*chosen.T @ said
    v(x)
    torch.testing.assert_close(v.top.codebook, sums/counts[:, None], atol=1e-4, rtol=1e-3)


def test_vqs_loss_is_error_and_commitment():
    v, x = vq(commitment=.5), views(4)
    fine = v.trunk.bottom(x)
    top, bottom = v.encode(x)
    said = v.say_top(v.trunk.top(fine)), v.say_bottom(torch.cat([v.hear_top(top[0]), fine], 1))
    far = sum(F.mse_loss(s, level[0]) for s, level in zip(said, (top, bottom)))
    expected = F.mse_loss(v.reconstruct(x), x) + .5*far
    assert v(x).item() == pytest.approx(expected.item(), rel=1e-5)


# PatchVAE

def test_divergences_are_torchs():
    a, b = torch.randn(2, 4, 6, generator=generator(0))
    torch.testing.assert_close(kl_gaussian(a, b.exp()), td.kl_divergence(td.Normal(a, (b/2).exp()), td.Normal(0., 1.)))
    for prior in (.02, .5):
        torch.testing.assert_close(kl_bernoulli(a, prior),
            td.kl_divergence(td.Bernoulli(logits=a), td.Bernoulli(torch.tensor(prior))))
    torch.testing.assert_close(kl_uniform(a),
        td.kl_divergence(td.Categorical(logits=a), td.Categorical(logits=torch.zeros(4, 6))))


@pytest.mark.parametrize("occurrence", ["bernoulli", "categorical"])
def test_terms_of_an_image_are_sums(occurrence):
    v, x = vae(occurrence=occurrence).eval(), views(6)
    logits, mean, variance = v.encode(x)
    error, how, where = v.terms(x)
    assert error.item() == pytest.approx((v.reconstruct(x) - x).square().sum((1, 2, 3)).mean().item(), rel=1e-4)
    assert how.item() == pytest.approx(td.kl_divergence(td.Normal(mean, variance.sqrt()),
        td.Normal(0., 1.)).sum((1, 2)).mean().item(), rel=1e-3, abs=1e-3)
    q = td.Bernoulli(logits=logits) if occurrence == "bernoulli" else td.Categorical(logits=logits.mT)
    p = td.Bernoulli(torch.tensor(.2)) if occurrence == "bernoulli" else td.Categorical(logits=torch.zeros(6, 4, 5))
    assert where.item() == pytest.approx(td.kl_divergence(q, p).flatten(1).sum(1).mean().item(), rel=1e-4)
    assert v(x).item() == pytest.approx((error + how + 10*where).item(), rel=1e-6)


@pytest.mark.parametrize("occurrence", ["bernoulli", "categorical"])
def test_what_is_drawn_is_distributed_as_it_says(occurrence):
    v, x = vae(occurrence=occurrence, temperatures=(1., .02)), views(4)
    v.cool(1.)
    with torch.no_grad():
        parts = v.encode(x)
        where, how = (torch.stack(d) for d in zip(*(v.draw(parts, v.draw_noise(4, generator(i))) for i in range(500))))
    torch.testing.assert_close(where.mean(0), v.probability(parts.occurrence), atol=.11, rtol=0)
    torch.testing.assert_close(how.mean(0), parts.mean, atol=.25, rtol=.1)
    torch.testing.assert_close(how.var(0), parts.variance, atol=.1, rtol=.3)


@pytest.mark.parametrize("patch_size", GRID_SIZES)
def test_every_patch_has_a_part(patch_size):
    v, x = vae(patch_size=patch_size).eval(), views(2)
    assert v.symbols(x).shape == (2, (32//patch_size)**2) and v.reconstruct(x).shape == x.shape
    torch.testing.assert_close(v.trunk(x), v.trunk[:-2](x).mean((2, 3)))


@pytest.mark.parametrize("trunk", ["narrow", "resnet18"])
@pytest.mark.parametrize("patch_size", GRID_SIZES)
def test_the_encoder_is_the_trunk_of_all_models(trunk, patch_size):
    "A finer encoder would compare architectures, in detection above all."
    with seeded_init(0): plain, own = make_trunk(trunk).eval(), vae(patch_size=patch_size, trunk=trunk).eval().trunk
    own.load_state_dict(plain.state_dict())
    torch.testing.assert_close(own(views(2, 64)), plain(views(2, 64)))
    assert own[:-2](views(1, 64)).shape[-2:] == (2, 2)


@pytest.mark.parametrize("size, patch_size", [(56, 8), (56, 4), (48, 16), (32, 32), (64, 16)])
def test_a_place_sees_its_patch_first(size, patch_size):
    "What is said of a place changes more where the image does than in the opposite corner."
    v = vae(size=size, patch_size=patch_size).eval()
    x = views(1, size)
    changed = x.clone()
    changed[..., -patch_size:, -patch_size:] += 2
    with torch.no_grad():
        moved = (v.encode(x).occurrence - v.encode(changed).occurrence).abs().mean((0, 1)).view(v.grid)
    assert v.grid == (size//patch_size,)*2 and moved[-1, -1] >= moved[0, 0]


def test_pixels_count_on_average_once():
    x = views(3)
    w = edge_weights(x, 8)
    torch.testing.assert_close(w.mean((2, 3)), torch.ones(3, 3))
    assert torch.equal(w[..., :8, :8], w[..., :1, :1].expand(-1, -1, 8, 8))


def test_the_temperature_falls_in_half_the_training():
    v = vae()
    seen = [v.cool(p) or v.temperature for p in (0, .25, .5, 1)]
    assert seen == pytest.approx([1., math.sqrt(.1), .1, .1])


# grids

@pytest.mark.parametrize("name", ["narrow", "resnet18", "resnet50"])
def test_a_grid_is_its_trunk_without_pooling(name):
    x = views(2, 64)
    with seeded_init(0): trunk = make_trunk(name).eval()
    with seeded_init(0): grid = grid_trunk(name).eval()
    torch.testing.assert_close(trunk(x), grid(x).mean((2, 3)))
    assert trunk.load_state_dict(grid.state_dict(), strict=False).unexpected_keys == []
    with seeded_init(0): fine = grid_trunk(name, 8).eval()
    torch.testing.assert_close(fine(x)[..., ::4, ::4], grid(x), atol=1e-4, rtol=1e-3)


def test_a_grid_is_dilated_as_torchvision_does_it():
    from torchvision.models import resnet50
    theirs, ours = resnet50(replace_stride_with_dilation=[False, True, True]), grid_trunk("resnet50", 8)
    convs = lambda net: [(m.stride, m.dilation, m.padding) for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convs(theirs) == convs(ours)


def test_ranks_look_through_a_grid():
    with seeded_init(0): rank = PatchRank(16, "resnet9").eval()
    with seeded_init(0): grid = grid_trunk("resnet9", 16).eval()
    assert torch.equal(rank.features(views(1, 64)), grid(views(1, 64))) and "features.0.weight" in rank.state_dict()


# bad input

@pytest.mark.parametrize("wrong, words", [
    (lambda: moco()(views(1), views(1)), "a game within a batch needs at least 2 images, got 1"),
    (lambda: moco()(views(3), views(2)), "sender and receiver see 3 and 2 images"),
    (lambda: moco(groups=2)(views(3), views(3)), "a batch of 3 cannot be split into 2 groups"),
    (lambda: moco(groups=2)(views(8), views(8)), "MoCo with groups trains on noise"),
    (lambda: moco(groups=0), "groups must be at least 1, got 0"),
    (lambda: moco(queue=0), "queue must be at least 1, got 0"),
    (lambda: moco(momentum=1), "momentum must be from 0 to below 1, got 1"),
    (lambda: moco(temperature=-1), "temperature must be above 0, got -1"),
    (lambda: moco(trunk="resnet19"), "unknown trunk 'resnet19'"),
    (lambda: vq()(views(2, 20)), "the nearest sizes that can are 16 × 16 and 24 × 24"),
    (lambda: vq(codebook_size=1), "codebook_size must be at least 2, got 1"),
    (lambda: vq(width=1), "width must be at least 2, got 1"),
    (lambda: vae(size=40), "the nearest sizes that can are 32 × 32 and 48 × 48"),
    (lambda: vae(patch_size=14), "unknown patch_size 14"),
    (lambda: vae(trunk="resnet8"), "unknown trunk 'resnet8'"),
    (lambda: vae(parts=1), "parts must be at least 2, got 1"),
    (lambda: vae(occurrence="binary"), "unknown occurrence 'binary'"),
    (lambda: vae(temperatures=(1., 0.)), "a schedule runs between values above 0"),
    (lambda: vae(cooled=2.), "cooled is a share of the training"),
    (lambda: vae()(views(2), None), "PatchVAE trains on noise"),
    (lambda: vae().eval()(views(2, 48)), "images of 48 × 48 pixels were shown to an agent built for 32 × 32"),
])
def test_bad_input_is_one_clear_error(wrong, words):
    with pytest.raises(ConfigError) as e: wrong()
    assert words in str(e.value)


@pytest.mark.parametrize("package, make", [("lightly.models.modules.heads", moco), ("vector_quantize_pytorch", vq)])
def test_a_missing_package_is_named(package, make, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'refcomm\[baselines\]'"): make()

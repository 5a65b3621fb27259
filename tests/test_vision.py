"The discrimination game: trunks, losses within a batch, training with batch statistics, several processes."
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn

from refcomm.agents.vision import make_trunk, projector, symbol_embedding, vocabulary_head
from conftest import free_port
from refcomm.bottlenecks.gumbel import GumbelSoftmax
from refcomm.channels import Instant
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.distributed import join_processes, processes
from refcomm.training.ensemble import Ensemble
from refcomm.games.contrastive import (DiscriminationGame, SimCLR, SymmetricInfoNCE, cosine_similarities,
    in_batch_scores, make_discrimination_game, nt_xent)
from refcomm.training.loop import OPTIMIZERS, TrainSettings, fit

QUIET = dict(report=lambda *_: None)


# trunks

@pytest.mark.parametrize("name, dim", [("narrow", 192), ("resnet18", 512), ("resnet34", 512)])
def test_trunks_take_every_size(name, dim):
    for size, small in ((16, True), (32, True), (64, False)):
        assert make_trunk(name, small)(torch.rand(2, 3, size, size)).shape == (2, dim)


def test_pretrained_weights_are_taken_from_the_disk(tmp_path, monkeypatch):
    "A file where torchvision keeps its own is loaded without a network; without it the error names the folder."
    from torchvision.models import ResNet18_Weights, resnet18
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError,
        match=f"the weights of resnet18 are neither .* no network.* copy the folder {tmp_path}/hub here"):
        make_trunk("resnet18", pretrained=True)
    with seeded_init(5): known = resnet18()
    (folder := tmp_path/"hub"/"checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(known.state_dict(), folder/os.path.basename(ResNet18_Weights.DEFAULT.url))
    assert torch.equal(make_trunk("resnet18", pretrained=True).layer4[1].conv2.weight, known.layer4[1].conv2.weight)


# scores and losses

@given(n=st.integers(2, 6), m=st.integers(2, 6), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_cosines_are_those_of_every_pair(n, m, dim, seed):
    a, b = (torch.randn(k, dim, generator=generator(seed, str(i))) for i, k in enumerate((n, m)))
    torch.testing.assert_close(cosine_similarities(a, b), F.cosine_similarity(a[:, None], b[None], dim=-1), atol=1e-5,
        rtol=1e-5)


@given(n=st.integers(2, 7), data=st.data())
def test_fewer_candidates_are_part_of_the_batch(n, data):
    k = data.draw(st.integers(2, n))
    a, b = (torch.randn(n, 4, generator=generator(i)) for i in range(2))
    full, some = in_batch_scores(a, b)[0], in_batch_scores(a, b, n_candidates=k)[0]
    for i in range(n): assert some[i].tolist() == [full[i, (i + j) % n].item() for j in range(k)]


def test_half_precision_is_compared_in_single():
    a = torch.randn(8, 2048, generator=generator(0))*100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cosine_similarities(a, a), cosine_similarities(a.float(), a))
    assert cosine_similarities(a.half(), a.half()).diagonal().sub(1).abs().max() < 1e-3


def test_the_learned_scale_is_bounded():
    loss = SymmetricInfoNCE(1e-3)
    a = torch.randn(4, 3, generator=generator(0))
    assert loss.scale == 100 and torch.isfinite(loss(a, a))


# the game

def tiny(norm=True, noise_temperature=5.):
    eyes = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh())
    speak = vocabulary_head(6, 5) if norm else nn.Linear(6, 5)
    look = projector(6, 4, 7) if norm else nn.Linear(6, 4)
    return DiscriminationGame(eyes(), Instant(GumbelSoftmax(5, noise_temperature), 6, speak, symbol_embedding(5, 4)),
        nn.Sequential(eyes(), look))


def test_shared_eyes_get_both_gradients():
    "Inside an ensemble and outside, the shared trunk's gradient is the same, and neither role's alone."
    with seeded_init(0): game = make_discrimination_game("narrow", 16, 16, shared=True, small_stem=True)
    x, noise = torch.rand(6, 3, 16, 16, generator=generator(0)), game.draw_noise(6, generator(0, "noise"))
    e = Ensemble([game])
    e.map(lambda g, n: g(x, x.flip(-1), n), noise[None]).sum().backward()
    game(x, x.flip(-1), noise).backward()
    assert e.names == [n for n, _ in game.named_parameters()] and game.receiver[0] is game.sender
    for name, p, s in zip(e.names, game.parameters(), e.parameters()):
        torch.testing.assert_close(p.grad, s.grad[0], msg=name)
    seen = game.sender.conv1.weight.grad.clone()
    game.zero_grad()
    with torch.no_grad(): sent = game.send(x, noise).word
    F.cross_entropy(game.scores(sent, game.candidates(x.flip(-1))), torch.arange(6)).backward()
    assert not torch.allclose(game.sender.conv1.weight.grad, seen, rtol=.01)


def test_simclr_plays_a_game_it_was_not_trained_for():
    "Images of 16 pixels that differ in colour: with argmax symbols, it finds one of 32 far more often than chance."
    x = torch.rand(32, 3, 1, 1, generator=generator(0)).expand(-1, -1, 16, 16) + .1*torch.rand(32, 3, 16, 16,
        generator=generator(1))
    with seeded_init(0): model = SimCLR(make_trunk("narrow", True), projector(192, 32, 64))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(14):
        loss = model(x, x.flip(-1))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    played = model.eval().evaluate(x, x.flip(-1))
    assert losses[-1] < .2*losses[0] and played.accuracy > 4/32 and len(played.symbols.unique()) > 4


@pytest.mark.parametrize("wrong, words", [
    (lambda: make_trunk("resnet5O"), "unknown trunk 'resnet5O': did you mean 'resnet50'"),
    (lambda: make_trunk("narrow", pretrained=True), "no pretrained weights of the trunk 'narrow'"),
    (lambda: tiny()(torch.rand(1, 12), torch.rand(1, 12)), "at least 2 images, got 1"),
    (lambda: tiny().evaluate(torch.rand(3, 12), torch.rand(4, 12)), "sender and receiver see 3 and 4 images"),
    (lambda: DiscriminationGame(None, None, None, temperature=-1.), "temperature must be above 0, got -1.0"),
    (lambda: DiscriminationGame(None, None, None, negatives="locl"), "unknown negatives 'locl': did you mean 'local'"),
    (lambda: SimCLR(None, None, temperature=float("nan")), "temperature must be above 0, got nan"),
    (lambda: in_batch_scores(torch.rand(4, 2), torch.rand(4, 2), n_candidates=5),
    "5 candidates were asked for, but a batch has 4"),
    (lambda: in_batch_scores(torch.rand(4, 2), torch.rand(4, 2), n_candidates=1),
    "n_candidates must be at least 2, got 1"),
    (lambda: nt_xent(torch.rand(1, 2), torch.rand(1, 2)), "at least 2 images, got 1"),
    (lambda: nt_xent(torch.rand(3, 2), torch.rand(3, 2), negatives="al"), "unknown negatives 'al'"),
    (lambda: join_processes(2), "2 processes were asked for, but this one was started alone: start it by torchrun"),
    (lambda: join_processes(0), "world_size must be at least 1, got 0"),
    (lambda: train(TrainSettings(precision="fp16")), "'fp16' is for GPUs"),
    (lambda: train(TrainSettings(optimizer="schedulefree")), "batch statistics do not fit"),
    (lambda: train(TrainSettings(optimizer="lars"), [plain(0), plain(1)]), "cannot train 2 stacked members"),
    (lambda: train(TrainSettings(batch_size=999, drop_last=True)),
    "a batch of 999 was asked for, but there are only 52 items"),
    (lambda: TrainSettings(accumulate=0), "accumulate must be at least 1, got 0"),
    (lambda: TrainSettings(weight_decay=-.1), "weight_decay must be at least 0, got -0.1"),
])
def test_bad_input_is_one_clear_error(wrong, words, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as e: wrong()
    assert words in str(e.value)


def test_lars_without_timm_names_the_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=r"needs the package timm: pip install 'refcomm\[vision\]'"):
        OPTIMIZERS["lars"]([], 1.)


# training

N = 52
POINTS = torch.randn(N + 40, 12, generator=generator(0, "points"))
LABELS = (POINTS[:, 0] > 0).long()


def plain(seed=0):
    with seeded_init(seed): return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))


def normed(seed=0):
    with seeded_init(seed): return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def validate(e):
    logits = e.map(lambda m: m(POINTS[N:]))[0]
    return dict(accuracy=(logits.argmax(-1) == LABELS[N:]).float().mean()[None],
        loss=F.cross_entropy(logits, LABELS[N:])[None])


def train(settings, models=None, cut=None, **kwargs):
    "Train a classifier; `cut` raises after so many batches."
    e, played = Ensemble(models or [normed()]), []
    def loss(idx, _):
        if len(played) == cut: raise InterruptedError
        played.append(idx.shape[1])
        return e.map(lambda m, i: F.cross_entropy(m(POINTS[i]), LABELS[i]), idx)
    fitted = fit(e, loss, lambda: validate(e), N, settings, range(e.n_members), **QUIET, **kwargs)
    return e, fitted, played


SETTINGS = {"adam": {}, "lars": dict(optimizer="lars", lr=20., weight_decay=1e-3, lr_schedule="cosine",
    lr_per_epoch=True, accumulate=2, drop_last=True)}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("cut", [2, 11, 23])
def test_interrupted_equals_uninterrupted_with_batch_statistics(tmp_path, kind, cut):
    settings = TrainSettings(**{**dict(epochs=6, batch_size=8, lr=1e-2), **SETTINGS[kind]})
    whole, fitted, _ = train(settings)
    with pytest.raises(InterruptedError):
        train(settings, cut=cut, checkpoint=tmp_path/"c.safetensors", checkpoint_seconds=0)
    resumed, again, played = train(settings, checkpoint=tmp_path/"c.safetensors")
    assert 0 < len(played) < 6*settings.batches(N)
    assert (again.best_epoch == fitted.best_epoch
        and again.history.drop(columns="seconds").equals(fitted.history.drop(columns="seconds")))
    for (k, a), b in zip(whole.full_state().items(), resumed.full_state().values()): assert torch.equal(a, b), k
    assert whole.full_state()["buffer 1.num_batches_tracked"] == settings.batches(N)*(fitted.best_epoch[0] + 1)


def test_the_best_epoch_brings_its_batch_statistics():
    e, fitted, _ = train(TrainSettings(epochs=8, batch_size=8, lr=.3))
    best = fitted.history.accuracy.idxmax()
    assert fitted.best_epoch[0] == best < 7
    assert validate(e.eval())["loss"].item() == fitted.history.valid_loss[best]


def test_evaluation_uses_the_running_statistics():
    "What is validated is the model in evaluation mode: its outputs do not depend on who else is in the batch."
    e, fitted, _ = train(TrainSettings(epochs=1, batch_size=8, lr=1e-2))
    model = e.eval().member(0)
    one_by_one = torch.cat([model(p[None]) for p in POINTS[N:]])
    assert F.cross_entropy(one_by_one, LABELS[N:]).item() == pytest.approx(fitted.history.valid_loss[0], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lars"])
def test_accumulated_steps_equal_those_of_the_large_batch(optimizer):
    "52 items in steps of 16: also where the last step has 4 items, in batches of 3 and 1."
    run = lambda **kw: train(TrainSettings(epochs=3, optimizer=optimizer, lr=1e-2 if optimizer == "adam" else .1, **kw),
        [plain()])
    (large, a, _), (parts, b, played) = run(batch_size=15), run(batch_size=3, accumulate=5)
    assert played == [3]*17 + [1] + ([3]*17 + [1])*2
    for p, q in zip(large.parameters(), parts.parameters()): torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    assert not torch.equal(large.stacked[0][0], plain()[0].weight)
    torch.testing.assert_close(a.history.loss.tolist(), b.history.loss.tolist(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_only_matrices_decay(optimizer):
    e = Ensemble([normed()])
    start = {k: v.clone() for k, v in e.full_state().items()}
    fit(e, lambda i, g: e.map(lambda m: sum((p*0).sum() for p in m.parameters())),
        lambda: dict(accuracy=torch.zeros(1), loss=-torch.ones(1)), 8,
        TrainSettings(epochs=1, lr=.1, optimizer=optimizer, weight_decay=.5), [0], **QUIET)
    for k, p in zip(e.names, e.parameters()): torch.testing.assert_close(p, start[k]*(.95 if p.dim() > 2 else 1), msg=k)


def test_schedules_by_epoch_and_incomplete_batches():
    _, fitted, played = train(TrainSettings(epochs=4, batch_size=8, lr=1., lr_end=1e-6, lr_schedule="cosine",
        lr_per_epoch=True, drop_last=True, optimizer="sgd"))
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.), 4, 1e-6)
    expected = [reference.get_last_lr()[0],
        *(reference.optimizer.step() or reference.step() or reference.get_last_lr()[0] for _ in range(3))]
    assert fitted.history.lr.tolist() == pytest.approx(expected) and played == [8]*6*4


def test_the_game_is_trained_by_fit():
    "The whole path: noise from the member's generator, BatchNorm on both sides, validation by evaluate."
    with seeded_init(0): e = Ensemble([tiny(noise_temperature=1.)])
    x = POINTS[:N]
    def loss(idx, generators):
        noise = torch.stack([e.template.draw_noise(idx.shape[1], g) for g in generators])
        return e.map(lambda game, i, n: game(x[i], x[i], n), idx, noise)
    def valid():
        played = e.map(lambda game: tuple(game.evaluate(POINTS[N:], POINTS[N:]))[:2])
        return dict(loss=played[0], accuracy=played[1])
    fitted = fit(e, loss, valid, N, TrainSettings(epochs=40, batch_size=26, lr=1e-2, drop_last=True), [0], **QUIET)
    assert fitted.history.loss.iloc[-1] < fitted.history.loss[0] - .5
    assert fitted.history.accuracy.max() > 3/40


# several processes

X = torch.randn(8, 12, generator=generator(1, "x"))
Y = X + .3*torch.randn(8, 12, generator=generator(2, "y"))


def losses():
    "name → module (x, y, noise) → loss, without batch statistics, for `negatives`"
    def game(negatives, n_candidates=None):
        g = tiny(norm=False)
        g.negatives, g.n_candidates = negatives, n_candidates
        return g

    class Sides(nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.a, self.b, self.loss = nn.Linear(12, 4), nn.Linear(12, 4), loss
        def forward(self, x, y, noise): return self.loss(self.a(x), self.b(y))
    return {"discrimination": game, "five candidates": lambda negatives: game(negatives, 5),
            "nt_xent": lambda negatives: Sides(lambda a, b: nt_xent(a, b, negatives=negatives)),
            "symmetric": lambda negatives: Sides(SymmetricInfoNCE(negatives=negatives))}


def gradients(make, negatives, part, wrap=lambda m: m):
    with seeded_init(0): model = make(negatives)
    noise = tiny().draw_noise(8, generator(0, "noise"))
    wrapped = wrap(model)
    loss = wrapped(X[part], Y[part], noise[part])
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def one_of_two(rank, port):
    for k, v in dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items(): os.environ[k] = str(v)
    torch.set_num_threads(1)
    join_processes(2)
    join_processes(2)
    assert processes() == (rank, 2)
    with pytest.raises(ConfigError, match="3 processes were asked for, but the launcher started 2"): join_processes(3)
    mine, ddp = slice(4*rank, 4*rank + 4), nn.parallel.DistributedDataParallel
    for name, make in losses().items():
        loss, expected = gradients(make, "local", slice(0, 8))
        own, got = gradients(make, "global", mine, ddp)
        dist.all_reduce(own)
        torch.testing.assert_close(own/2, loss, msg=f"{name}: loss")
        for a, b in zip(expected, got): torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-4, msg=f"{name}: gradient")
        if name == "five candidates": continue # a batch of four has no five
        local = gradients(make, "local", mine, ddp)[1]
        assert any(not torch.allclose(a, b, rtol=.01)
            for a, b in zip(expected, local)), f"{name}: local negatives are other negatives"
    games = [losses()["discrimination"](negatives).eval() for negatives in ("local", "global")]
    games[1].load_state_dict(games[0].state_dict())
    assert torch.equal(*(g.evaluate(X[mine], Y[mine]).loss
        for g in games)), "a validation game is played within its own batch"
    dist.destroy_process_group()


@pytest.mark.slow
def test_global_negatives_have_the_gradient_of_one_process():
    "Data-parallel averaging over two processes of four images gives the loss and the gradients of one process of eight."
    mp.spawn(one_of_two, (free_port(),), nprocs=2)


def test_a_group_of_one_is_local(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert processes() == (0, 1)
        a, b = X[:, :4], Y[:, :4]
        assert torch.equal(nt_xent(a, b, negatives="global"), nt_xent(a, b))
        with pytest.raises(ConfigError, match="2 processes were asked for"): join_processes(2)
    finally: dist.destroy_process_group()

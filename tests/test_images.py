"Image sources, good and bad."
import contextlib
import io
import os
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
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


@pytest.mark.parametrize("broken", [encoded(format="JPEG")[:300], b"", b"<html>not found</html>", encoded()[:60]],
    ids=["truncated jpeg", "empty", "html", "truncated png"])
def test_undecodable_images_are_counted_and_named_or_left_out(six, broken):
    put(six, {"cat/7.jpg": broken, "dog/8.jpeg": broken})
    with pytest.raises(ConfigError,
        match=r"folder: pets: 2 of 8 images cannot be decoded: cat/7.jpg \(\w+\), dog/8.jpeg \(\w+\); .*skip_undecodable=True"):
        load_images("pets", size=8)
    with pytest.warns(UserWarning, match=r"2 of 8 .*cat/7.jpg.*dog/8.jpeg.*left out"):
        left = load_images("pets", size=8, skip_undecodable=True)
    for name in ("cat/7.jpg", "dog/8.jpeg"): (six/name).unlink()
    assert left.digest == load_images("pets", size=8).digest and len(left.part) == 6


def test_when_nothing_can_be_decoded_no_classes_are_left(data):
    put(data/"pets", {"cat/1.png": b"x", "dog/1.png": b"y"})
    with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(ConfigError, match="at least 2 classes, got 0"):
        load_images("pets", skip_undecodable=True)


@pytest.mark.parametrize("mode, how",
    [("L", dict(format="JPEG")), ("L", {}), ("RGBA", {}), ("P", dict(format="GIF")), ("1", {}),
    ("CMYK", dict(format="JPEG")), ("LA", {})], ids=str)
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
    table[:2].to_parquet(data/"parts"/"0.parquet"); table[2:].to_parquet(data/"parts"/"1.parquet")
    strings = table.assign(label=table.name,
        image=[dict(bytes=b, path=None) for b in table.image]).drop(columns=["name", "split"])
    strings.rename(columns=dict(image="picture", label="kind")).to_parquet(data/"strings.parquet")
    parquet = load_images("pets.parquet", size=16)
    parts = load_images("parts", size=16)
    strings = load_images(data/"strings.parquet", size=16, image_column="picture", label_column="kind")
    assert folder.digest == parquet.digest == parts.digest == strings.digest
    assert [x.name for x in (folder, parquet, parts, strings)] == ["folder: pets", "parquet: pets", "parquet: parts",
        "parquet: strings"]
    assert parquet.part == parts.part == ["train", "valid", "odd"]*2 and strings.part == folder.part == [""]*6
    (data/"named").mkdir()
    for name, rows in (("pets_train_0", table[:2]), ("validation-00000-of-00001", table[2:5]),
        ("training_set", table[5:])):
        rows.drop(columns="split").to_parquet(data/"named"/f"{name}.parquet")
    named = load_images("named", size=16)
    assert named.part == ["train"]*3 + ["valid"]*3 # the folder's files in the order of their names: pets, training, validation


def test_wordnet_ids_come_along(six, data):
    rows = [(encoded(i), i // 3, ["cat", "dog"][i // 3], ["n02121620", "n02084071"][i // 3]) for i in range(6)]
    table = pd.DataFrame(rows, columns=["image", "label", "name", "wnid"])
    table.astype(dict(wnid="category")).to_parquet(data/"pets.parquet")
    table.drop(columns=["name", "label"]).rename(columns=dict(wnid="label")).to_parquet(data/"labels.parquet")
    table.assign(wnid=[None]*3 + ["n02084071"]*3).to_parquet(data/"half.parquet")
    table.assign(wnid="dog").to_parquet(data/"words.parquet")
    put(data/"synsets", {f"{w}/{i}.png": encoded(3*k + i) for k, w in enumerate(["n02084071", "n02121620"])
        for i in range(3)})
    images, plain = load_images("pets.parquet", size=16), load_images("pets", size=16)
    assert (images.wnids, plain.wnids) == (["n02121620", "n02084071"], None)
    assert images.digest != plain.digest == images._replace(wnids=None).digest == load_images("half.parquet",
        size=16).digest
    assert load_images("half.parquet", size=16).wnids is None and load_images("words.parquet", size=16).wnids is None
    for source in ("labels.parquet", "synsets"):
        assert load_images(source, size=16).wnids == load_images(source, size=16).classes == ["n02084071", "n02121620"]
    assert load_images("pets.parquet", size=16, n=5).wnids == images.wnids
    images = load_images("shapes", size=16, n=50)
    assert images.wnids is None and images.digest == module.content_digest(images.images, images.labels, images.classes)


def test_folders_of_parts_are_not_taken_for_classes(data):
    put(data/"set", {f"{part}/{c}/x.png": encoded(i)
        for i, (part, c) in enumerate([("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")])})
    images = load_images("set", size=8)
    assert (images.classes, images.labels.tolist(), images.part) == (["a", "b"], [0, 1, 0, 1],
        ["train", "train", "valid", "valid"])


def test_a_part_of_a_source_is_drawn_the_same_way_each_time(six):
    a, b = load_images("pets", size=8, n=4), load_images("pets", size=8, n=4)
    assert a.digest == b.digest and len(a.images) == 4
    with pytest.raises(ConfigError, match="cannot draw 7 distinct items out of 6"): load_images("pets", n=7)


def test_sources_that_are_none(data, six):
    (data/"text.md").write_text("x"); (data/"empty").mkdir(); (data/"broken.parquet").write_bytes(b"PAR1 not")
    pd.DataFrame(dict(image=[encoded()]*2,
        label=[1, None])).astype(dict(label=object)).to_parquet(data/"unlabelled.parquet")
    put(data/"single", {"only/1.png": encoded()})
    for source, says in [("pet", r"no 'pet': did you mean 'pets'.*REFCOMM_DATA \(now .*data\)"),
        ("text.md", "no source of images"), ("empty", "no images in .*one sub-folder per class"),
                         ("broken.parquet", "cannot be read as parquet"),
                         ("single", r"at least 2 classes, got 1: \['only'\]"), (data/"absent", "there is no"),
                         ("torchvision:EuroSAT", "cannot open torchvision:EuroSAT .*download=True"),
                         ("torchvision:CIFAR", "did you mean 'CIFAR10' or 'CIFAR100'"),
                         ("a/b.parquet", "there is no 'a/b.parquet'")]:
        with pytest.raises(ConfigError, match=says): load_images(source)
    with pytest.raises(ConfigError, match="1 of 2 labels are missing"): load_images("unlabelled.parquet")
    with pytest.raises(ConfigError, match="size must be at least 8, got 0"): load_images(size=0)


def test_the_hub(monkeypatch, six):
    import datasets

    def refuse(*a, **k): raise ConnectionError("Couldn't reach 'org/pets' on the Hub")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError,
        match=r"cannot load split 'test' of 'org/pets' .*\(ConnectionError: Couldn't reach.*parquet .*REFCOMM_DATA \(now .*source='shapes'"):
        load_images("org/pets", split="test")
    features = datasets.Features(img=datasets.Image(), fine=datasets.ClassLabel(names=["cat", "dog"]))
    stored = datasets.Dataset.from_dict(dict(img=[dict(bytes=encoded(i), path=None) for i in range(6)], fine=[0]*3
        + [1]*3), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: stored)
    images = load_images("org/pets", size=16, image_column="img", label_column="fine", split="validation")
    assert images.digest == load_images("pets",
        size=16).digest and images.part == ["valid"]*6 and images.name == "hub: org/pets"
    with pytest.raises(ConfigError, match="unknown column of org/pets 'image': did you mean 'img'"):
        load_images("org/pets")


def test_a_torchvision_set_is_never_downloaded(six, data):
    put(data/"eurosat"/"2750", {f"{c}/{i}.png": (six/c/f"{i}.png").read_bytes() for c in ("cat", "dog")
        for i in range(3)})
    images = load_images("torchvision:EuroSAT", size=16)
    assert images.digest == load_images("pets", size=16).digest and images.name == "torchvision: EuroSAT"


def saved(image, **how):
    out = io.BytesIO()
    image.save(out, **(how or dict(format="PNG")))
    return out.getvalue()


def tiff(bits, levels, photometric=1):
    "A greyscale TIFF of one row with `bits` for each level, written by hand."
    packed = ("".join(f"{v:0{bits}b}" for v in levels) if bits < 16
        else "".join(f"{v & 255:08b}{v >> 8:08b}" for v in levels))
    data = int(packed.ljust(-(-len(packed)//8)*8, "0"), 2).to_bytes(-(-len(packed)//8), "big")
    tags = [(256, len(levels)), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1),
        (279, len(data))]
    start = 8 + len(data) + len(data) % 2
    return (b"II*\0" + struct.pack("<I", start) + data.ljust(start - 8, b"\0") + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", t, 4 if t in (273, 279) else 3, 1, v) for t, v in tags) + b"\0"*4)


RAMP = np.arange(0, 65536, 257, dtype=np.uint16)


@pytest.mark.parametrize("data", [saved(Image.fromarray(RAMP.reshape(16, 16))),
    saved(Image.fromarray(RAMP.reshape(16, 16)), format="TIFF"),
    saved(Image.fromarray(RAMP.reshape(16, 16).astype(">u2")), format="TIFF"),
                                  tiff(12, (RAMP >> 4).tolist()), tiff(16, RAMP.tolist()),
                                  tiff(16, RAMP[::-1].tolist(), photometric=0)], ids=["png", "tiff", "big-endian tiff",
                                  "12-bit tiff", "16-bit tiff", "white is zero"])
def test_deep_grey_levels_are_scaled_by_their_depth(data):
    with module._open(data) as image: levels = np.asarray(module.as_rgb(module.upright(image))).astype(int)
    assert (levels[..., :1] == levels).all() and abs(levels[..., 0].flatten() - np.arange(256)).max() <= 1


@pytest.mark.parametrize("image, mode",
    [(Image.new("F", (8, 8)), "mode F"), (Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "mode I"),
    (Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)*60), "mode I;16")])
def test_levels_without_a_known_range_are_refused_by_name(six, image, mode):
    put(six, {"cat/deep.tif" if mode != "mode I;16"
        else "cat/deep.png": saved(image, format="TIFF" if mode != "mode I;16" else "PNG")})
    with pytest.raises(ConfigError, match=rf"1 of 7 images cannot be decoded: cat/deep\.\w+ \(.*{mode}"):
        load_images("pets", size=8)


@pytest.mark.parametrize("mode, how",
    [("RGBA", {}), ("LA", {}), ("RGBA", dict(format="WEBP", lossless=True)), ("RGBA", dict(format="TIFF")),
    ("P", dict(format="PNG", transparency=1)), ("P", dict(format="GIF", transparency=1)),
    ("L", dict(format="PNG", transparency=1))], ids=str)
def test_a_black_square_on_nothing_stays_a_square(mode, how):
    alpha = np.zeros((16, 16), np.uint8); alpha[4:12, 4:12] = 255
    if "A" in mode: image = Image.fromarray(np.dstack([np.zeros_like(alpha)]*(len(mode) - 1) + [alpha]), mode)
    else:
        image = Image.fromarray((alpha == 0).astype(np.uint8), mode)
        if mode == "P": image.putpalette([0, 0, 0, 0, 0, 0])
    with module._open(saved(image, **how)) as image: pixels = module.square(image, 16)
    assert module.BACKGROUND == (255, 255, 255) and torch.equal(pixels[0],
        torch.from_numpy(255 - alpha)) and (pixels == pixels[:1]).all()


@pytest.mark.parametrize("way", range(1, 9))
@pytest.mark.parametrize("how", [dict(format="PNG"), dict(format="JPEG", quality=100, subsampling=0),
    dict(format="WEBP", lossless=True), dict(format="TIFF")], ids=lambda how: how["format"])
def test_images_stand_upright(way, how):
    upright = Image.fromarray(np.repeat(np.repeat(np.array([[0, 90], [170, 250]], np.uint8), 8, 0), 8,
        1)).convert("RGB")
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
        7: "TRANSVERSE", 8: "ROTATE_270"}
    sensor = upright.transpose(getattr(Image.Transpose, back[way])) if way > 1 else upright
    sensor.getexif()[0x112] = way
    with module._open(saved(sensor, exif=sensor.getexif(), **how)) as image:
        pixels = module.square(module.upright(image), 16)
    assert abs(pixels[0].int() - torch.from_numpy(np.asarray(upright).copy())[..., 0].int()).max() <= 4


def test_damaged_exif_data_do_not_make_an_image_undecodable():
    image = Image.new("RGB", (8, 8), "red")
    with module._open(saved(image, format="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f broken")) as opened:
        assert module.square(module.upright(opened), 8)[0].min() > 250


def test_no_file_starts_another_program(six, monkeypatch):
    "PIL would hand an EPS to Ghostscript, whatever the file is called."
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("Popen", "check_call"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was started"))
    for n, data in enumerate([eps, b"P6 1 1 255\n\0\0\0",
        b"/* XPM */\nstatic char *a[] = {\"1 1 1 1\",\"a c red\",\"a\"};",
        saved(Image.new("RGB", (8, 8)), format="ICO"), saved(Image.new("RGB", (8, 8)), format="PDF"),
        saved(Image.new("RGB", (8, 8)), format="TGA"), saved(Image.new("RGB", (8, 8)), format="PCX")]):
        put(six, {"cat/x.png": data})
        with pytest.raises(ConfigError, match=r"1 of 7 images cannot be decoded: cat/x.png \(UnidentifiedImageError\)"):
            load_images("pets", size=8)
        put(six.parent/"eurosat"/"2750", {"cat/x.png": data, "dog/y.png": encoded()})
        with pytest.raises(ConfigError, match=r"1 of 2 images cannot be decoded: item 0 \(UnidentifiedImageError\)"):
            load_images("torchvision:EuroSAT", size=8)


def test_a_decompression_bomb_is_refused_by_its_header(six, data):
    def bomb(width, height): # a sound header; the pixels would come from few bytes
        chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I",
            zlib.crc32(kind + body))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR",
            struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT",
            zlib.compress(b"\0"*1000)) + chunk(b"IEND", b"")
    for width, height in [(2**13 + 1, 2**13), (2**20, 2**20), (2**31 - 1, 1)]:
        put(six, {"cat/bomb.png": bomb(width, height)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(ConfigError,
                match=r"1 of 7 images cannot be decoded: cat/bomb.png \(.*at most 67,108,864 are read"):
                load_images("pets", size=8)
    (six/"cat"/"bomb.png").unlink()
    pd.DataFrame(dict(image=[bomb(2**16, 2**16), encoded()], label=[0, 1])).to_parquet(data/"bombs.parquet")
    with pytest.raises(ConfigError, match="bombs.parquet row 0 .*67,108,864"): load_images("bombs.parquet", size=8)


def test_a_row_names_files_of_its_own_folder_only(data, tmp_path):
    put(data/"set", {"inside/a.png": encoded(0), "inside/b.png": encoded(1)})
    put(tmp_path/"elsewhere", {"secret.png": encoded(2)})
    (data/"set"/"link.png").symlink_to(tmp_path/"elsewhere"/"secret.png"); (data/"set"/"up").symlink_to(tmp_path)
    def load(*paths, as_dict=True):
        table = pd.DataFrame(dict(image=[dict(bytes=None, path=str(p)) if as_dict else str(p) for p in paths],
            label=list(range(len(paths)))))
        table.to_parquet(data/"set"/"0.parquet")
        return load_images("set", size=8), load_images(data/"set"/"0.parquet", size=8)
    for as_dict in (True, False):
        a, b = load("inside/a.png", data/"set"/"inside"/"b.png", as_dict=as_dict)
        assert a.digest == b.digest and torch.equal(a.images[0], module.square(module._open(encoded(0)), 8))
        for outside in (tmp_path/"elsewhere"/"secret.png", "../../elsewhere/secret.png", "link.png",
            "up/elsewhere/secret.png", "/etc/hostname", "/dev/zero", "inside", "nowhere.png", "a\0b", "x"*5000):
            with pytest.raises(ConfigError,
                match="1 of 2 images cannot be decoded: 0.parquet row 1 .* is no file in the folder of the source"):
                load("inside/a.png", outside, as_dict=as_dict)


def test_what_systems_leave_in_folders_is_no_image_and_what_is_left_out_is_said(six):
    expected = load_images("pets", size=8).digest
    put(six, {"cat/._0.png": b"\0\5\x16\7 Mac", "cat/.DS_Store": b"", "cat/Thumbs.db": b"", "desktop.ini": b"",
        ".ipynb_checkpoints/0.png": encoded()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_images("pets", size=8).digest == expected
        put(six, {"dog/9.gif": encoded(9, format="GIF", mode="P")})
        assert len(load_images("pets", size=8).labels) == 7, "a GIF is an image like others"
    put(six, {"cat/8.heic": b"x", "dog/readme.txt": b"x", "top.png": encoded()})
    with pytest.warns(UserWarning, match=r"folder: pets: 3 files are left out.*cat/8.heic, dog/readme.txt, top.png"):
        assert len(load_images("pets", size=8).labels) == 7
    os.mkfifo(six/"cat"/"pipe.png")
    with pytest.warns(UserWarning, match="3 files"): assert len(load_images("pets", size=8).labels) == 7


def test_a_folder_beside_the_parts_does_not_turn_them_into_classes(data):
    put(data/"set", {f"{part}/{c}/x.png": encoded(i)
        for i, (part, c) in enumerate([("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")])})
    expected = load_images("set", size=8)
    put(data/"set", {"annotations/list.txt": b"", "readme.md": b""})
    assert load_images("set", size=8).digest == expected.digest and load_images("set", size=8).part == expected.part
    put(data/"set", {"extra/c/x.png": encoded(9)})
    with pytest.raises(ConfigError,
        match="has the parts train, val, and beside them images in extra, which is no part"):
        load_images("set", size=8)
    put(data/"vehicles", {f"{c}/x.png": encoded(i) for i, c in enumerate(["car", "train", "bus"])})
    assert load_images("vehicles", size=8).classes == ["bus", "car", "train"], "a class may be called as a part is"
    put(data/"kaggle", {"train/a/x.png": encoded(0), "train/b/x.png": encoded(1), "test/1.png": encoded(2)})
    with pytest.warns(UserWarning, match="1 files are left out.*test/1.png"):
        assert load_images("kaggle", size=8).part == ["train"]*2


def test_names_of_classes_in_the_metadata_of_a_parquet_file(six, data):
    import datasets
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "cow"]))
    datasets.Dataset.from_dict(dict(image=[dict(bytes=encoded(i), path=None) for i in range(6)], label=[0]*3 + [1]*3),
        features=features).to_parquet(data/"hf.parquet")
    images = load_images("hf.parquet", size=16)
    assert images.classes == ["cat", "dog"] and images.digest == load_images("pets", size=16).digest
    table = pq.read_table(data/"hf.parquet")
    for strange in (b"{", b"[]", b"null", b"["*100_000, b"\xff", b'{"info": 1}',
        b'{"info": {"features": {"label": {"names": 3}}}}', b'{"info": {"features": {"label": {"names": [1, null]}}}}'):
        pq.write_table(table.replace_schema_metadata({"huggingface": strange}), data/"odd.parquet")
        assert load_images("odd.parquet", size=8).classes == ["0", "1"]


@pytest.mark.parametrize("labels", [[0., None, 1., None, 1., 0.], ["a", None, "b", "b", "a", "a"], [float("nan")]*6])
def test_missing_labels_are_no_classes(data, labels):
    pd.DataFrame(dict(image=[encoded(i) for i in range(6)], label=labels)).to_parquet(data/"x.parquet")
    with pytest.raises(ConfigError, match=r"parquet: x: \d of 6 labels are missing"): load_images("x.parquet", size=8)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_or_strange_image_is_an_image_or_one_error(pick):
    "Bytes of images are changed, cut and put together: pixels of the right shape, or an error that names the image."
    sound = FUZZED[pick.draw(st.integers(0, len(FUZZED) - 1))]
    data, n = bytearray(sound), len(sound)
    for place, value in pick.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 255)), min_size=1,
        max_size=6)):
        data[place] = value
    data = bytes(data[:pick.draw(st.integers(n//2, n))])
    source = module._Source(lambda i: module._open([data, sound, sound][i]), lambda i: f"row {i}", [0, 0, 1], {},
        [""]*3, "toy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: assert module._read(source, 8, None, False).images.shape == (3, 3, 8, 8)
        except ConfigError as e: assert "1 of 3 images cannot be decoded: row 0" in str(e)


FUZZED = ([encoded(size=(9, 7), format=f) for f in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")]
    + [saved(Image.fromarray(RAMP[:64].reshape(8, 8)), format="TIFF"), encoded(mode="LA", size=(9, 7))])


# sets of torchvision that call PIL themselves
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def test_every_set_of_torchvision_opens_its_images_here():
    import inspect
    import types
    import torchvision.datasets as sets
    seen = []
    for name in sets.__all__:
        kind = getattr(sets, name)
        if not inspect.isclass(kind): continue
        for place in dir(module.bounded(kind)):
            f = inspect.getattr_static(module.bounded(kind), place)
            if not isinstance(f, types.FunctionType) or "open" not in f.__code__.co_names: continue
            found = f.__globals__.get("Image") or getattr(f.__globals__.get("PIL"), "Image", None)
            if found is None or not {"Image", "PIL"} & set(f.__code__.co_names): continue
            assert found.open is not Image.open, (name, place)
            seen.append(name)
    assert {"CelebA", "OxfordIIITPet", "VOCDetection", "CocoDetection", "Caltech101", "GTSRB"} <= set(seen)
    assert sets.VOCDetection.__getitem__.__globals__["Image"].open is Image.open, "torchvision itself is as it was"


def test_a_set_that_calls_pil_itself_starts_no_program(data, monkeypatch):
    put(data/"oxford-iiit-pet", {"annotations/trainval.txt": b"a_1 1 1 1\nb_1 2 1 2\n",
        "images/a_1.jpg": encoded(0, format="JPEG"),
        "images/b_1.jpg": encoded(1, format="JPEG")})
    assert load_images("torchvision:OxfordIIITPet", size=8, split="trainval").classes == ["A", "B"]
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    put(data/"oxford-iiit-pet", {"images/b_1.jpg": EPS})
    with pytest.raises(ConfigError, match=r"1 of 2 images cannot be decoded: item 1 \(UnidentifiedImageError\)"):
        load_images("torchvision:OxfordIIITPet", size=8, split="trainval")


def test_the_images_of_voc_start_no_program(data, monkeypatch):
    from refcomm.data.parts import voc07_items
    xml = b"<annotation><object><name>cat</name></object></annotation>"
    put(data/"VOCdevkit"/"VOC2007", {"JPEGImages/1.jpg": encoded(0, format="JPEG"), "JPEGImages/2.jpg": EPS,
        "Annotations/1.xml": xml,
        "Annotations/2.xml": xml, "ImageSets/Main/trainval.txt": b"1\n2\n", "ImageSets/Main/test.txt": b"1\n"})
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    items = voc07_items("a test")
    assert next(items)[0] == "train"
    with pytest.raises(OSError, match="cannot identify"): next(items)


def test_a_set_that_is_cut_into_files(tmp_path, monkeypatch):
    "A pattern stands for its files; their names say which part they are, and what is expected and absent is said."
    from refcomm.core import say_once
    from refcomm.papers.iac import items as iac
    from refcomm.papers.patch import items as patch
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path))
    say_once.cache_clear()
    def write(name, n, first):
        rows = [dict(image=dict(bytes=encoded(first + i)), label=i % 2) for i in range(n)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path/name)
    for name, n in (("tiny_imagenet_train_0.parquet", 6), ("tiny_imagenet_train_1.parquet", 4),
        ("tiny_imagenet_val.parquet", 2)):
        write(name, n, n)
    data = load_images("tiny_imagenet_[tv]*.parquet", 8)
    assert data.part == ["train"]*10 + ["valid"]*2 and len(data.images) == 12
    assert iac.images_of("gpu")["source"].startswith("tiny_imagenet_[tv]*.parquet#")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert patch.images_of("gpu") == dict(source="scenes") == patch.images_of("gpu")
        assert iac.images_of("cpu")["source"] == iac.images_of("cpu", "embedded")["source"] == "shapes"
    assert said.getvalue().count("rendered ones stand in") == 2 and len(said.getvalue().splitlines()) == 2
    with pytest.raises(ConfigError, match="there is no 'tiny_imagenet_x"): load_images("tiny_imagenet_x*.parquet", 8)
    assert ("not available" in iac.fidelity([iac.configure("cpu")])
        and "not available" not in iac.fidelity([iac.configure("gpu")]))



"Images that do not fit: decoded onto the disk once, read ahead in the order of the training, with the same numbers as from memory."
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from device_specs import iac_spec, patch_spec
from pretend_gpu import PretendGPU

from refcomm.core import ConfigError, StoreError, generator
from refcomm.data import images as module
from refcomm.data.images import StoredImages, load_images
from refcomm.data.parts import image_parts, probe_set
from refcomm.data.shapes import ShapeWorld
from refcomm.data.stream import AheadReader, ImageBatches
from refcomm.files import stamped
from refcomm.metrics.images import edge_density, grey_entropy, perceptual_distance
from refcomm.metrics.structure import class_pairs
from refcomm.papers.iac import items as iac
from refcomm.papers.patch.probes import suffice, top_k_play
from refcomm.papers.patch.run import build, encode_messages, evaluate_game, probe, untrained_importance
from refcomm.runs.execute import Context
from refcomm.runs.store import run_key, runner_of
from refcomm.training.ensemble import Ensemble
from refcomm.training.loop import TrainSettings, fit

CLASSES = ("heart", "star", "ring", "cross")


def pictures(size=24, each=24):
    "Rendered images of four classes, as encoded files."
    import io

    from PIL import Image
    world = ShapeWorld(size=size)
    for name in CLASSES:
        for i, image in enumerate(world.render(world.draw(each, generator(0, name)))):
            out = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "PNG")
            yield name, i, out.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "The same 96 images as a folder and as two parquet files of several row groups."
    at = tmp_path_factory.mktemp("many")
    rows = list(pictures())
    for name, i, data in rows:
        (at/"folder"/name).mkdir(parents=True, exist_ok=True)
        (at/"folder"/name/f"{i:03}.png").write_bytes(data)
    (at/"table").mkdir()
    for k, part in enumerate((rows[:60], rows[60:])):
        table = pa.Table.from_pylist([dict(image=dict(bytes=data), label=name) for name, _, data in part])
        pq.write_table(table, at/"table"/f"part-{k}.parquet", row_group_size=25)
    return dict(folder=str(at/"folder"), table=str(at/"table"))


@pytest.fixture
def no_room(monkeypatch, home):
    def off(share="0"): monkeypatch.setenv("REFCOMM_IMAGE_MEMORY", share)
    return off


def spec(kind, source):
    "Two epochs of a model on all images of a source."
    own = dict(source=stamped(source), n_images=None, epochs=2, batch_size=16)
    if kind == "patch": return patch_spec(**own)
    return iac_spec(**iac.MODELS[kind], **own, n_ood=1, accumulate=2, probes=("valid",))


def trained(s):
    result, = runner_of(s).run([s], Context("cpu", None, lambda *a: None))
    return result


def same(a, b):
    "Rows, history, summary and tensors, bit by bit."
    assert a.rows == b.rows and a.summary == b.summary
    assert a.history.drop(columns="seconds").equals(b.history.drop(columns="seconds"))
    assert a.tensors.keys() == b.tensors.keys() and all(torch.equal(v, b.tensors[k]) for k, v in a.tensors.items())


def fitted(kind, source, device="cpu", **more):
    "Train alone, without what is measured afterwards: the history and the weights."
    s = spec(kind, source)
    run, parts = runner_of(s), runner_of(s).make_parts(s)
    train, ensemble = ImageBatches(parts.train, device), Ensemble([run.build(s, 4)]).to(device)
    settings = TrainSettings(epochs=s.epochs, batch_size=s.batch_size, accumulate=2, drop_last=True, keep="last")
    history = fit(ensemble, *run.objectives(ensemble, s, parts, device, train), len(parts.train.images), settings, [0],
        device,
        report=lambda *a: None, announce=train.announce, **more).history
    return history.drop(columns="seconds"), {k: v.cpu() for k, v in ensemble.full_state().items()}, train


def equal(a, b):
    assert a[0].equals(b[0]) and all(torch.equal(v, b[1][k]) for k, v in a[1].items())
    assert b[2].streamed and not a[2].streamed


@pytest.mark.slow
@pytest.mark.parametrize("kind, form", [(iac.MAIN, "folder"), ("patch", "table")])
def test_a_set_larger_than_its_bound_runs_to_the_same_numbers(kind, form, sources, no_room, monkeypatch):
    s, taken = spec(kind, sources[form]), []
    key, whole = run_key(s), trained(s)
    no_room()
    once = AheadReader.__getitem__
    monkeypatch.setattr(AheadReader, "__getitem__", lambda self, rows: taken.append(len(self.waiting))
        or once(self, rows))
    same(trained(s), whole)
    assert run_key(s) == key and len(taken) == 2*(whole.summary["n_train"]//s.batch_size)
    assert min(taken) > 0, "every batch was being read when it was asked for"


@pytest.mark.parametrize("kind, form", [("Supervised", "table"), ("SimCLR", "table"), ("patch", "folder")])
def test_all_models_take_streams(kind, form, sources, no_room):
    whole = fitted(kind, sources[form])
    no_room()
    equal(whole, fitted(kind, sources[form]))


def test_on_a_gpu_streams_make_no_step_wait(sources, no_room):
    with PretendGPU(): whole = fitted("Supervised", sources["folder"], "cuda:0")
    no_room()
    with PretendGPU() as gpu: equal(whole, fitted("Supervised", sources["folder"], "cuda:0"))
    assert not gpu.usual().syncs, gpu.report()


class Cut(Exception): pass


def test_a_stream_is_continued_where_it_was_cut(sources, no_room, tmp_path):
    whole, done = fitted("patch", sources["folder"]), []
    no_room()

    def cut(progress):
        done.append(progress)
        if len(done) == 4: raise Cut
    state = dict(checkpoint=tmp_path/"training.safetensors", checkpoint_seconds=0)
    with pytest.raises(Cut): fitted("patch", sources["folder"], **state, on_progress=cut)
    equal(whole, fitted("patch", sources["folder"], **state))


def test_parts_and_probes_of_stored_images_are_the_same(sources, no_room):
    args = (sources["table"], 24, 80, None, 1)
    parts, (x, y, z, w) = image_parts(*args), probe_set(sources["folder"], 16)
    both = image_parts(sources["folder"], 24, 40, "shapes")
    no_room()
    again, stored = image_parts(*args), probe_set(sources["folder"], 16)
    for a, b in zip(parts[:3], again[:3]):
        assert isinstance(b.images, StoredImages) and torch.equal(b.images[:], a.images) and b.digest == a.digest
        assert torch.equal(a.labels, b.labels) and a.part == b.part
    assert all(torch.equal(b[:], a) for a, b in zip((x, y, z, w), stored))
    again = image_parts(sources["folder"], 24, 40, "shapes")
    assert again.ood.digest == both.ood.digest and len(again.ood.images) == len(both.ood.images)


def test_what_notebooks_measure_of_stored_images_is_the_same(sources, no_room):
    "All that is asked of the images of a run, of a set that is not in memory."
    s = patch_spec(source=sources["table"])

    def measured():
        images, labels, *_ = (parts := image_parts(s.source, s.image_size, None, n_ood=0)).valid
        game = build(s, 4).eval()
        symbols, importance = encode_messages(game, images, s)
        pairs, _ = class_pairs(labels, generator(0, "pairs"))
        found = [edge_density(images), grey_entropy(images), symbols, importance, untrained_importance(s, images, 2),
            images[3, :, 2:9, 4:], images[:3],
            *(perceptual_distance(images, some, "trunk", torch.nn.AvgPool2d(8), device="cpu")
            for some in (pairs, None))]
        rows = [*evaluate_game(game, images, s), *suffice(game, images, symbols, importance, s),
            *top_k_play(game, images, dict(own=importance), (3, 9), s), *probe(game, s, parts)]
        return images, found, rows
    _, whole, rows = measured()
    no_room()
    images, stored, again = measured()
    assert isinstance(images, StoredImages) and again == rows and len(rows) > 10
    for a, b in zip(whole, stored): torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_set_is_decoded_once_and_again_when_a_file_changes(sources, no_room, home, tmp_path, monkeypatch):
    import shutil
    here = shutil.copytree(sources["folder"], tmp_path/"copy")
    no_room()
    first, decode, counted = load_images(here, 16).digest, module._decode, []
    monkeypatch.setattr(module, "_decode", lambda source, rows, *a: counted.append(len(rows))
        or decode(source, rows, *a))
    assert load_images(here, 16).digest == first and sum(counted) == 0
    shutil.copy(here/"star"/"000.png", here/"star"/"001.png")
    changed = load_images(here, 16).digest
    assert changed != first and sum(counted) == 96
    for kept in (home/"cache"/"images").iterdir(): kept.write_bytes(kept.read_bytes()[:1000])
    assert load_images(here, 16).digest == changed and sum(counted) == 2*96


def test_undecodable_images_are_left_out_from_the_disk_as_from_memory(sources, no_room, tmp_path):
    import shutil
    here = shutil.copytree(sources["folder"], tmp_path/"copy")
    for name in ("ring/005.png", "star/020.png"): (here/name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="2 of 96") as said: whole = load_images(here, 16, skip_undecodable=True)
    no_room()
    with pytest.raises(ConfigError, match="2 of 96 images cannot be decoded: ring/005.png"): load_images(here, 16)
    for _ in range(2):
        with pytest.warns(UserWarning) as again: stored = load_images(here, 16, skip_undecodable=True)
        assert [str(w.message) for w in again] == [str(w.message) for w in said]
        assert stored.digest == whole.digest and len(stored.images) == 94 == len(stored.part)


def test_a_full_disk_is_named_before_anything_is_decoded(sources, no_room, home, monkeypatch):
    no_room()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=1000)))
    with pytest.raises(StoreError,
        match="96 images of 16 × 16 pixels are 0.0 GiB, but .*images has 0.0 GiB left: set REFCOMM_HOME"):
        load_images(sources["folder"], 16)
    assert not [*(home/"cache"/"images").iterdir()]


def test_a_source_that_nothing_identifies_leaves_no_file(no_room, home, sources, monkeypatch):
    no_room()
    folder = module._folder
    monkeypatch.setattr(module, "_folder", lambda path: folder(path)._replace(content=lambda: None))
    stored = load_images(sources["folder"], 16)
    assert not [*(home/"cache"/"images").iterdir()] and stored.images[0].any()


def test_an_order_that_was_not_announced_changes_nothing():
    every = torch.from_numpy(np.arange(50*3*16).reshape(50, 3, 4, 4) % 251).to(torch.uint8)
    reader = AheadReader(every, ahead=3)
    order = torch.randperm(50, generator=generator(0)).split(7)
    reader.announce(order)
    for rows in [order[0], order[3], order[1], torch.tensor([1, 1]), order[2], *order[3:]]:
        assert torch.equal(reader[rows], every[rows])


@pytest.mark.parametrize("value", ["2", "-.1", "much", "nan"])
def test_a_share_is_a_share(value, no_room):
    no_room(value)
    with pytest.raises(ConfigError, match=f"from 0 to 1: got {value!r}"): module.fits(1)


def test_what_fits_lies_on_the_device(sources, no_room):
    data = load_images(sources["folder"], 16)
    with PretendGPU():
        assert ImageBatches(data, "cuda").images.is_cuda
        no_room(str(2**-36))
        assert ImageBatches(data, "cuda").streamed and not ImageBatches(data, "cpu").streamed

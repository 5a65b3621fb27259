"The experiment of iac: what agents see, what is measured, what is refused, and a game on a folder of one's own."
import dataclasses

import pytest
import torch

from refcomm.core import ConfigError, generator
from refcomm.data.parts import image_parts, probe_set
from refcomm.data.shapes import ShapeWorld
from refcomm.papers.iac import run as iac
from refcomm.files import stamped
from refcomm.games.contrastive import in_batch_scores
from refcomm.papers.iac import items as grids
from refcomm.runs.execute import Context, execute
from refcomm.runs.store import Store

QUIET = Context("cpu", None, lambda *a: None)


def tiny(item="table1", at=3, **changes):
    return dataclasses.replace(grids.grid(item, "smoke", 1)[at], **changes)


@pytest.fixture(scope="module")
def parts(): return iac.make_parts(tiny())


@pytest.fixture
def folder(tmp_path_factory):
    "Twelve images in each of four classes."
    from PIL import Image
    world, folder = ShapeWorld(size=24), tmp_path_factory.mktemp("images")
    for name in ("heart", "star", "ring", "cross"):
        (folder/name).mkdir()
        for i, image in enumerate(world.render(world.draw(12, generator(0, name)))):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder/name/f"{i}.png")
    return folder


def test_held_out_classes_are_never_trained_on(parts):
    train, valid, ood = (set(p.labels.tolist()) for p in parts[:3])
    assert not ood & (train | valid) and len(ood) == 20
    again = iac.make_parts(tiny(seed=5))
    assert all(torch.equal(a.images, b.images) for a, b in zip(parts[:3], again[:3])), "seeds share their images"


def test_views_follow_the_variant(parts):
    images = parts.train.images[:8]
    x, seen = iac.pair_of_views(images, True, 16, generator(0))
    assert not torch.equal(x, seen) and x.is_contiguous(memory_format=torch.channels_last)
    x, seen = iac.pair_of_views(images, False, 16, generator(0))
    assert x is seen


@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_blur_is_as_wide_beside_every_view(size):
    views = iac.views_of(True, size)
    assert views.sigma == pytest.approx((.1*size/224, 2*size/224)) and views.size == size
    assert iac.views_of(False, size).blur == 0


def test_what_nobody_trained_is_clustered_and_probed(tmp_path):
    specs = [tiny(model=m, probes=("digits",)) for m in iac.UNTRAINED]
    untrained, thumbnail = execute(specs, store=Store(tmp_path))
    assert untrained.history().seconds.sum() == thumbnail.history().seconds.sum() == 0
    for r in (untrained, thumbnail):
        said = [row for row in r.rows if row["kind"] == "protocol"]
        assert {row["player"] for row in said} == {"kmeans 16", "kmeans 77", "kmeans 154"}
        assert all(-.2 < row["ami"] < row["nmi"] and abs(row["nmi"] - row["nmi_chance"]) < .2 for row in said)
        plain = {row["n_candidates"]: row["accuracy"] for row in r.rows if row["kind"] == "play"
            and row["data"] == "valid" and not row["augmented"] and row["player"] == "kmeans 154"}
        assert plain[32] > 10/32, "a plain image is found again by its colours alone"
    rows = grids.play_rows([untrained, thumbnail])
    assert set(rows.row) == {"Untrained_kmeans",
        "Thumbnail_kmeans"} and set(rows.groupby(["row",
        "data"]).player.nunique()) == {1}, "one way to speak is shown of each"


def test_thumbnails_are_mean_colours():
    x = torch.randn(5, 3, 8, 8, generator=generator(0))
    assert torch.allclose(iac.Thumbnail()(x).view(5, 3, 4, 4)[:, 1, 2, 3], x[:, 1, 4:6, 6:8].mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("at, shared", [(1, False), (2, True)])
def test_trunks(at, shared):
    game = iac.build(tiny(at=at))
    assert (game.trunks[0] is game.trunks[1]) == shared
    assert game.trunks[0] in set(game.sender.modules()) and game.trunks[1] in set(game.receiver.modules())


def test_accuracy_is_that_of_the_game(parts):
    "The mean over all draws of the distractors, against games drawn one by one."
    s = tiny()
    game = iac.build(s).eval()
    rows, sent = iac.evaluate(game, s, parts)
    reported = {(r["data"], r["n_candidates"]): r["accuracy"] for r in rows if r["kind"] == "play"
        and not r["augmented"]}
    projected, understood, symbols = iac.map_images(iac.players(game, s, parts)[1], parts.valid.images, s)
    assert torch.equal(symbols.int(), sent["game/valid"].int())
    draws, right = generator(1), []
    for _ in range(300):
        some = torch.randperm(len(projected), generator=draws)[:32]
        right.append((in_batch_scores(understood[some],
            projected[some])[0].argmax(-1) == torch.arange(32)).float().mean())
    assert abs(torch.stack(right).mean() - reported["valid", 32]) < .01


def test_simclr_speaks_in_all_its_ways(parts):
    s = tiny(at=0)
    model = iac.build(s).eval()
    names, say = iac.players(model, s, parts)
    known = len(parts.train.labels.unique())
    assert names == ["disc h", "disc s", "disc z", f"kmeans {known}", f"kmeans {2*known}", "kmeans 16"]
    projected, *symbols_of = iac.map_images(say, parts.valid.images[:20], s)
    for name, symbols in zip(names[:3], symbols_of[1::2]):
        assert torch.equal(symbols[:, 0],
            iac.map_images(lambda x, _: (model.symbols(x, name[-1]),), parts.valid.images[:20], s)[0])
    assert symbols_of[2*names.index("kmeans 16") + 1].max() < 16


def test_a_run_is_repeated_and_resumed_to_the_same_result(tmp_path):
    s = tiny("figure3", 0, epochs=2)
    whole = iac.run([s], QUIET)[0]
    class Cut(Exception): pass
    def cut(done, text):
        if done >= .5: raise Cut
    path = tmp_path/"training.safetensors"
    with pytest.raises(Cut): iac.run([s], Context("cpu", path, cut, 0.))
    resumed = iac.run([s], Context("cpu", path, lambda *a: None, 0.))[0]
    assert resumed.rows == whole.rows and resumed.history.loss.tolist() == whole.history.loss.tolist()
    assert all(torch.equal(resumed.tensors[k], v) for k, v in whole.tensors.items())


def test_another_architecture_is_not_resumed(tmp_path):
    path = tmp_path/"training.safetensors"
    iac.run([tiny("figure3", 0)], Context("cpu", path, lambda *a: None))
    with pytest.warns(UserWarning, match="belongs to another model"):
        iac.run([tiny("figure3", 0, dim=24)], Context("cpu", path, lambda *a: None))


def test_a_folder_of_images(folder, tmp_path):
    spec = grids.configure("smoke", n_ood=1, batch_size=8, test_candidates=(2, 8), probes=("valid",))
    spec = dataclasses.replace(spec, source=stamped(str(folder)), n_images=None)
    record = execute([spec], store=Store(tmp_path/"runs"))[0]
    protocol = [r for r in record.rows if r["kind"] == "protocol"]
    assert {r["data"] for r in protocol} == {"valid"}, "it is undefined for one class"
    assert all("wnsim" not in r and "nmi" in r for r in protocol), "no hierarchy: nMI without WNSim"
    assert record.summary["n_train"] == 29 and record.summary["n_known"] == 3
    assert grids.protocol_rows([record]).wnsim.isna().all()


@pytest.mark.parametrize("changes, message", [
    (dict(batch_size=1), "batch_size must be at least 2"),
    (dict(train_candidates=64), "batch_size must be at least 64, got 32"),
    (dict(view_size=32), "views of 32 pixels are larger than the images of 16"),
    (dict(bottleneck="continuous"), "unknown bottleneck 'continuous'"),
    (dict(clusters_share=0.), "clusters_share must be above 0"),
])
def test_refused(changes, message):
    with pytest.raises(ConfigError, match=message): tiny(**changes)


def test_too_few_classes(folder):
    with pytest.raises(ConfigError, match="3 classes are to be held out, but .* has 4"):
        image_parts(str(folder), 16, n_ood=3)
    with pytest.raises(ConfigError, match="has classes of"): image_parts(str(folder), 16, ood_source=str(folder))


def test_batches_larger_than_the_set():
    with pytest.raises(ConfigError, match="a batch of 999 was asked for"): iac.run([tiny(batch_size=999)], QUIET)


def test_fp16_needs_a_gpu():
    with pytest.raises(ConfigError, match="'fp16' is for GPUs"): iac.run([tiny(precision="fp16")], QUIET)


def test_digits_are_probed_on_other_images():
    train, y, test, z = probe_set("digits", 16)
    assert len(train) + len(test) == 1797 and set(y.tolist()) == set(z.tolist()) == set(range(10))
    assert not {t.numpy().tobytes() for t in train[:, 0]} & {t.numpy().tobytes() for t in test[:, 0]}

"The experiment of PatchGame: what is measured of messages, what is resumed, what is refused."
import dataclasses, os

import pytest
import torch

from refcomm.core import ConfigError, WorkerDied, generator
from refcomm.data.shapes import ShapeWorld
from refcomm.papers.patch import run as patch, probes as patch_probes
from refcomm.files import stamped
from refcomm.games.contrastive import cosine_similarities
from refcomm.papers.patch import items as grids
from refcomm.metrics.task import hits
from refcomm.runs.execute import Context, execute
from refcomm.runs.store import Store

QUIET = Context("cpu", None, lambda *a: None)


def tiny(model=grids.OURS, **changes):
    return dataclasses.replace(grids.configure("smoke", **grids.MODELS[model]), **changes)


@pytest.fixture(scope="module")
def parts(): return patch.make_parts(tiny())


@pytest.fixture(scope="module")
def game(): return patch.build(tiny()).eval()


def test_nobody_is_held_out_and_images_keep_their_order(parts):
    assert len(parts.ood.images) == 0 and len(parts.train.images) + len(parts.valid.images) == 120
    small, large = (patch.make_parts(tiny(source="shapes", image_size=size)).valid for size in (56, 112))
    assert torch.equal(large.labels, small.labels) and large.images.shape[-1] == 112


def test_a_message_read_from_its_symbols_is_the_message_sent(parts, game):
    s = tiny()
    symbols, importance = patch.encode_messages(game, parts.valid.images, s)
    direct, = patch.map_images(lambda x: (game.listener.decode(game.send(x)),), parts.valid.images, s)
    assert torch.allclose(patch.decode_messages(game, symbols), direct, atol=1e-4)
    assert torch.allclose(patch.decode_messages(game, symbols.view(2, -1, 49)).flatten(0, 1), direct, atol=1e-4)
    assert torch.equal(symbols < 0, importance < (49 + .999)/2/49), "what ranks below the middle is dropped"


def test_a_message_through_a_soft_gate_is_read_with_its_weights(parts):
    s = tiny(gate="soft")
    game = patch.build(s).eval()
    said, direct, seen = patch.map_images(lambda x: (game.speaker.symbol(x).argmax(-1).flatten(1),
        game.listener.decode(game.send(x)), game.listener.encode_images(x)), parts.valid.images, s)
    weights = patch.gate_weights(game, parts.valid.images, s)
    assert 0 < weights.min() < weights.max() < 1
    assert torch.allclose(patch.decode_messages(game, said, weights), direct,
        atol=1e-4) and not torch.allclose(patch.decode_messages(game, said), direct, atol=1e-2)
    assert {r["n_candidates"]: r["accuracy"]
        for r in patch.evaluate_game(game, parts.valid.images, s)} == patch.retrieval_accuracy(direct,
        seen, s)
    accuracy, = {r["accuracy"] for r in patch_probes.top_k_play(game, parts.valid.images,
        dict(flat=torch.zeros(len(said), 49)), [49], s) if r["n_candidates"] == 2}
    assert accuracy == pytest.approx(patch.retrieval_accuracy(direct, seen, s)[2])


@pytest.mark.parametrize("k", [1, 5, 49])
def test_the_most_important_symbols_against_a_loop(k):
    g = generator(k)
    symbols, importance = torch.randint(-1, 9, (20, 49), generator=g), torch.rand(20, 49, generator=g)
    for row, scores, kept in zip(symbols, importance, patch_probes.most_important(symbols, importance, k)):
        best = sorted((i for i in range(49) if row[i] >= 0), key=lambda i: -scores[i])[:k]
        assert [i for i in range(49) if kept[i] >= 0] == sorted(best) and all(kept[i] == row[i] for i in best)


def test_how_many_suffice_against_a_loop(parts, game):
    s = tiny()
    images = parts.valid.images[:16]
    symbols, importance = patch.encode_messages(game, images, s)
    rows = patch_probes.suffice(game, images, symbols, importance, s)
    seen, = patch.map_images(lambda x: (game.listener.encode_images(x),), images, s)
    own, longest = torch.arange(16), int((symbols >= 0).sum(1).max())
    with torch.no_grad():
        won = [hits(cosine_similarities(patch.decode_messages(game,
            patch_probes.most_important(symbols, importance, k)), seen),
            own, [2, 16], generator(0, "distractors")) for k in range(1, longest + 1)]
    for c, n in enumerate((2, 16)):
        needed = []
        for i in range(16):
            k = longest + 1
            while k > 1 and won[k - 2][i, c]: k -= 1
            needed.append(k)
        found = [k for k in needed if k <= longest]
        row = next(r for r in rows if r["kind"] == "suffice" and r["n_candidates"] == n)
        assert row["found"] == len(found)/16 and row["mean"] == pytest.approx(sum(found)/len(found) if found else None)


@pytest.mark.parametrize("model", [grids.OURS, "MoCo-v2 (R18)", "PatchVAE (R18, S=32)"])
def test_a_run_is_resumed_to_the_same_result(tmp_path, model):
    s = tiny(model, epochs=2, n_images=80)
    whole = patch.run([s], QUIET)[0]
    class Cut(Exception): pass
    def cut(done, text):
        if done >= .5: raise Cut
    path = tmp_path/"training.safetensors"
    with pytest.raises(Cut): patch.run([s], Context("cpu", path, cut, 0.))
    resumed = patch.run([s], Context("cpu", path, lambda *a: None, 0.))[0]
    assert resumed.rows == whole.rows and all(torch.equal(resumed.tensors[k], v) for k, v in whole.tensors.items())


def test_a_checkpoint_of_another_vocabulary_or_patch_size_is_set_aside(tmp_path):
    path = tmp_path/"training.safetensors"
    patch.run([tiny(n_images=80)], Context("cpu", path, lambda *a: None))
    for other in (tiny(n_images=80, vocab_size=17), tiny(grids.FINE, n_images=80)):
        with pytest.warns(UserWarning, match="belongs to another model"):
            patch.run([other], Context("cpu", path, lambda *a: None))


def test_public_choices_are_one_argument_away(tmp_path):
    s = tiny(n_images=80, symbol="vit", gate="soft", dropout=.1, schedule="linear", learned=True, weight_decay_end=.4,
        masked=True)
    record = execute([s], store=Store(tmp_path))[0]
    assert any(k.startswith("weights/speaker.symbol.look.transformer") for k in record.tensors())
    assert isinstance(patch.load_model(record), torch.nn.Module)


def test_a_folder_of_images(tmp_path):
    from PIL import Image
    world = ShapeWorld(size=64)
    for name in ("heart", "star"):
        (tmp_path/"images"/name).mkdir(parents=True)
        for i, image in enumerate(world.render(world.draw(30, generator(0, name)))):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path/"images"/name/f"{i}.png")
    s = tiny(source=stamped(str(tmp_path/"images")), n_images=None, batch_size=8, test_candidates=(2, 8))
    record = execute([s], store=Store(tmp_path/"runs"))[0]
    assert record.summary["n_train"] == 48 and [r["n_candidates"] for r in record.rows if r["kind"] == "play"] == [2, 8]
    assert {r["top"] for r in record.rows if r["kind"] == "knn"} == {1}, "Top-5 of two classes says nothing"


@pytest.mark.parametrize("changes, says", [
    (dict(patch_size=5), "the nearest sizes that can are 55 × 55 and 60 × 60"),
    (dict(vocab_size=1), "vocab_size must be at least 2"),
    (dict(symbols_per_patch=0), "symbols_per_patch must be at least 1, got 0"),
    (dict(batch_size=500), "a batch of 500 was asked for, but there are only 96 items"),
    (dict(precision="fp16"), "'fp16' is for GPUs"),
])
def test_bad_settings_are_one_clear_error(changes, says):
    with pytest.raises(ConfigError, match=says): patch.run([tiny(**changes)], QUIET)


def test_more_patches_than_there_are(parts):
    s = tiny("ViT (S=32)")
    vit = patch.build(s, 10).eval()
    x, = patch.map_images(lambda x: (x,), parts.valid.images, s)
    with pytest.raises(ConfigError, match="the 50 best patches were asked for, but an image has 49"):
        patch_probes.top_k_accuracy(vit, x, parts.valid.labels, torch.rand(len(x), 49), [50])


def test_untrained_ranks_differ(parts, game):
    several = patch.untrained_importance(tiny(), parts.valid.images, 3)
    assert torch.equal(several[0], patch.encode_messages(game, parts.valid.images, tiny())[1])
    assert several.shape == (3, len(parts.valid.images), 49) and len({a.sum().item() for a in several.argmax(-1)}) == 3
    with pytest.raises(ConfigError, match="n must be at least 1, got 0"):
        patch.untrained_importance(tiny(), parts.valid.images, 0)


def test_detectors_side_by_side_are_those_trained_one_after_the_other(monkeypatch):
    monkeypatch.setattr("refcomm.runs.executors.n_cores", lambda: 2) # a thread for each
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first = {name: patch.build(tiny("Random", seed=k), 5).eval() for k, name in enumerate(("one", "another"))}
    try: alone, beside = (patch_probes.detections(first, "scenes", 32, 48, 16, 3, seed=3, jobs=jobs) for jobs in (1, 2))
    finally: torch.set_num_threads(threads)
    assert [(r["row"], r["seed"]) for r in beside] == [("one", 3), ("another", 3)]
    assert beside[0]["map50"] != beside[1]["map50"]
    assert beside == alone


class Deadly(torch.nn.Module):
    "Ends whatever process receives it."
    def __reduce__(self): return os._exit, (1,)


def test_a_detector_whose_process_dies_is_named():
    with pytest.raises(WorkerDied, match="a process that was training detectors died"):
        patch_probes.detections(dict(one=Deadly(), another=Deadly()), "scenes", 32, 8, 8, 1, jobs=2)

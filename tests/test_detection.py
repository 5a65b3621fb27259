"Object detection: what is measured, what is trained, what is refused."
import pytest
import torch
from PIL import Image
from torch import nn

from refcomm.agents.vision import make_trunk
from refcomm.core import ConfigError, generator, seeded_init
from refcomm.data.parts import probe_set
from refcomm.data.scenes import SceneWorld
from refcomm.metrics import detection as module
from refcomm.metrics.detection import (BoxedImages, boxed, check_boxes, detect, fine_tune, find_objects, make_detector,
    mean_average_precision50, voc07)


def scenes(n, part="train"):
    world = SceneWorld(32, (1, 2), (.2, .35), shapes=("cross", "square"))
    return boxed(world.draw(n, generator(0, part)), world.shapes)


@pytest.fixture
def trunk():
    with seeded_init(0): return make_trunk("narrow")


def seen(data, score=1.):
    return [dict(boxes=b, labels=l, scores=torch.full((len(l),), score)) for b, l in zip(data.boxes, data.labels)]


def iou(a, b):
    both = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


def slow_precision(detections, data, label):
    "Average precision of one class at 101 values of recall, one detection after the other."
    ranked = sorted(((s.item(), i, b) for i, d in enumerate(detections)
        for b, s, l in zip(d["boxes"], d["scores"], d["labels"]) if l == label), key=lambda x: -x[0])
    truth = [[b for b, l in zip(boxes, labels) if l == label] for boxes, labels in zip(data.boxes, data.labels)]
    n, hits, curve = sum(map(len, truth)), 0, []
    for k, (_, i, box) in enumerate(ranked):
        best = max(range(len(truth[i])), key=lambda j: iou(box, truth[i][j]), default=None)
        if best is not None and iou(box, truth[i][best]) >= .5:
            truth[i].pop(best)
            hits += 1
        curve.append((hits/n, hits/(k + 1)))
    return sum(max((p for recall, p in curve if recall >= r/100), default=0) for r in range(101)) / 101


def test_perfect_and_empty():
    data = scenes(20)
    assert mean_average_precision50(seen(data), data) == (1., {"cross": 1., "square": 1.})
    none = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), scores=torch.zeros(0)) for _ in data.boxes]
    assert mean_average_precision50(none, data) == (0., {"cross": 0., "square": 0.})
    swapped = data._replace(labels=[1 - l for l in data.labels])
    assert mean_average_precision50(seen(swapped), data).map50 < .1
    assert list(mean_average_precision50(seen(data),
        data._replace(classes=["cross", "square", "star"])).per_class) == ["cross", "square"]


def test_precision_against_a_slow_reference():
    data, g = scenes(40), generator(1)
    noisy = []
    for boxes, labels in zip(data.boxes, data.labels):
        moved = boxes + (3*torch.randn(boxes.shape, generator=g)).clamp(-4, 4)
        noisy.append(dict(boxes=torch.cat([moved, boxes.flip(0) + 6]), labels=torch.cat([labels, labels]),
            scores=torch.rand(2*len(labels), generator=g)))
    result = mean_average_precision50(noisy, data)
    for label, name in enumerate(data.classes):
        assert .05 < result.per_class[name] < .95
        assert result.per_class[name] == pytest.approx(slow_precision(noisy, data, label), abs=1e-6)
    assert result.map50 == pytest.approx(sum(result.per_class.values())/2)


def test_missing_packages_name_the_extra(monkeypatch):
    data = scenes(2)
    for name in ("pycocotools", "torchmetrics.detection"):
        with monkeypatch.context() as m:
            m.setitem(module.__dict__["need"].__globals__["sys"].modules, name, None)
            with pytest.raises(ConfigError, match=r"pip install 'refcomm\[baselines\]'"):
                mean_average_precision50(seen(data), data)


def test_deterministic_and_leaves_the_trunk_alone(trunk):
    train, test = scenes(8), scenes(6, "test")
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    trunk.eval().requires_grad_(False)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a = detect(trunk, train, test, generator(0), epochs=1, batch_size=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    b, c = (detect(trunk, train, test, generator(seed), epochs=1, batch_size=4) for seed in (0, 1))
    assert a[:3] == b[:3] and a.losses != c.losses
    assert all(torch.equal(x, y) for x, y in zip(a.detector.state_dict().values(), b.detector.state_dict().values()))
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())
    assert not trunk.training and not any(p.requires_grad for p in trunk.parameters())
    tuned = a.detector.backbone.body.state_dict()
    assert not torch.equal(tuned["conv1.weight"],
        before["conv1.weight"]) and not torch.equal(tuned["layer4.conv1.weight"], before["layer4.conv1.weight"])


def test_labels_and_weights_reach_the_detector(trunk):
    detector = make_detector(trunk, 2, 32)
    assert torch.equal(detector.backbone.body.conv1.weight, trunk.conv1.weight)
    assert detector.roi_heads.box_predictor.cls_score.out_features == 3
    found = find_objects(detector, scenes(6).images, batch_size=4)
    assert len(found) == 6 and {l for d in found for l in d["labels"].tolist()} <= {0, 1}


def test_learns_one_picture_by_heart(trunk):
    "The detector that saw one picture many times finds what is in it."
    data = scenes(2)
    data = BoxedImages(data.images.repeat(6, 1, 1, 1), data.boxes*6, data.labels*6, data.classes)
    result = detect(trunk, data, data, generator(0), epochs=8, batch_size=4)
    assert result.losses[-1] < result.losses[0]/2 and result.map50 > .5


def test_a_resnet_and_a_map_are_trunks_too():
    train = scenes(4)
    with seeded_init(0):
        resnet, maps = make_trunk("resnet18", small_stem=True), nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
    for trunk in (resnet, maps):
        with seeded_init(0):
            assert len(fine_tune(make_detector(trunk, 2, 32, width=16, hidden=16), train, 1, 1e-3, 4)) == 1
    with pytest.raises(ConfigError, match="must have the stages layer1, layer2, layer3, layer4 or return maps"):
        make_detector(nn.Sequential(maps, nn.Flatten()), 2, 32)


@pytest.mark.parametrize("box", [[-1, 2, 9, 9], [2, 2, 33, 9], [9, 2, 9, 9], [9, 2, 3, 9], [2, 9, 9, 9],
    [2, 2, float("inf"), 9]])
def test_bad_boxes(trunk, box):
    data = scenes(4)
    bad = data._replace(boxes=[*data.boxes[:2], torch.tensor([box]).float(), data.boxes[3]],
        labels=[*data.labels[:2], torch.tensor([0]), data.labels[3]])
    for train, test in ((bad, data), (data, bad)):
        with pytest.raises(ConfigError,
            match=r"image 2 has the box \[.*\]: expected are 0 ≤ left < right ≤ 32 and 0 ≤ top < bottom ≤ 32"):
            detect(trunk, train, test, generator(0))


def test_bad_labels_and_counts(trunk):
    data = scenes(4)
    with pytest.raises(ConfigError, match="image 0 has the label .*: expected are 0 … 1"):
        check_boxes(data._replace(labels=[l + 2 for l in data.labels]))
    with pytest.raises(ConfigError, match="4 images, 4 sets of boxes and 3 of labels"):
        check_boxes(data._replace(labels=data.labels[:3]))
    with pytest.raises(ConfigError, match="no image has a box"):
        check_boxes(data._replace(boxes=[b[:0] for b in data.boxes], labels=[l[:0] for l in data.labels]))
    with pytest.raises(ConfigError, match="of one size"):
        detect(trunk, data, data._replace(images=torch.zeros(4, 3, 64, 64).byte()), generator(0))


VOC = """<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename><size><width>80</width><height>40</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object>
<object><name>cat</name><difficult>{difficult}</difficult><bndbox><xmin>41</xmin><ymin>1</ymin><xmax>80</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def test_voc07(tmp_path, monkeypatch):
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="detection on voc07 needs the folder VOCdevkit under REFCOMM_DATA"): voc07(32)
    root = tmp_path/"VOCdevkit"/"VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"): (root/folder).mkdir(parents=True)
    for part, name, difficult in (("trainval", "000001", 0), ("test", "000002", 1)):
        (root/"ImageSets"/"Main"/f"{part}.txt").write_text(f"{name}\n")
        (root/"Annotations"/f"{name}.xml").write_text(VOC.format(name=name, difficult=difficult))
        Image.new("RGB", (80, 40), (255, 0, 0)).save(root/"JPEGImages"/f"{name}.jpg")
    data = voc07(32)
    assert data["train"].images.shape == (1, 3, 32, 32) and data["train"].classes == data["test"].classes == ["cat",
        "dog"]
    assert data["train"].boxes[0].tolist() == [[0, 8, 16, 32],
        [16, 0, 32, 16]] and data["train"].labels[0].tolist() == [1, 0]
    assert data["test"].labels[0].tolist() == [1]
    images, labels, _, held = probe_set("voc07", 32)
    assert images.shape == (1, 3, 32, 32) and labels.tolist() == held.tolist() == [[1, 1]]

"""Small trainings of every experiment, model and precision: run under a pretended GPU, and on a real one by `on_gpu.py`."""
import itertools
import re

import torch

from refcomm.core import generator
from refcomm.data.scenes import SceneWorld
from refcomm.data.sentences import load_sentences
from refcomm.papers.eqc.spec import GAMES, EQCSpec
from refcomm.runs.store import runner_of
from refcomm.papers.iac.run import IACSpec
from refcomm.metrics.images import saliency
from refcomm.metrics.representation import linear_probe
from refcomm.papers.patch.probes import detections, read_out
from refcomm.papers.patch.run import PatchSpec, build as build_patch
from refcomm.papers.patch.spec import PUBLIC_CODE
from refcomm.papers.sms.run import SMSSpec
from refcomm.papers.eqc import items as eqc
from refcomm.papers.iac import items as iac
from refcomm.papers.patch import items as patch
from refcomm.papers.sms import items as sms

PRECISIONS = ("fp32", "bf16", "fp16")
BOTTLENECKS = {
    "continuous": dict(bottleneck="continuous", alphabets=(2, 3)),
    "gumbel": dict(bottleneck="gumbel", alphabet_size=6, word_length=1),
    "straight-through": dict(bottleneck="gumbel", alphabet_size=6, word_length=1, straight_through=True),
    "quantised": dict(bottleneck="quantized", alphabet_size=3),
    "quantised afterwards": dict(bottleneck="quantized", alphabet_size=3, when="inference"),
    "fsq": dict(bottleneck="fsq", alphabet_size=3),
    "fsq afterwards": dict(bottleneck="fsq", alphabet_size=3, when="inference"),
    "vq": dict(bottleneck="vq", alphabet_size=4, symbol_width=2),
    "learned": dict(bottleneck="learned", alphabet_size=4),
    "fitted afterwards": dict(bottleneck="continuous", alphabets=(2,), fitted=(1, 2)),
}
FIRST = ("continuous", "gumbel", "quantised")  # in every game
EQC = dict(n_train=64, n_valid=16, n_test=16, batch_size=16, word_length=8, hidden=8, embedding=8, epochs=1)
EQC_GAMES = {"object": dict(n_values=4, candidates=(2, 10)),
    "image": dict(n_train=480, n_valid=80, n_test=80, batch_size=96, n_negatives=5, pool=200, candidates=(2, 10)),
             "sent-ref": dict(n_train=320, batch_size=64, n_negatives=5, candidates=(2, 10)),
             "sent-cls": dict(n_train=320, batch_size=64, candidates=(2, 77))}
CHANNELS = {"instant": {}, "recurrent": dict(channel="recurrent", message_length=2)}


def tiny_distilbert(folder):
    "Save a DistilBERT of random weights that knows the words of the embedded sentences."
    from refcomm.core import seeded_init
    from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel
    data = load_sentences("synthetic")
    words = sorted({w for t in data.texts + data.classes for w in re.findall(r"\w+|[^\w\s]", t.lower())})
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    with seeded_init(0):
        DistilBertModel(DistilBertConfig(vocab_size=len(vocab), dim=16, n_layers=1, n_heads=2,
            hidden_dim=32)).save_pretrained(folder)
    BertTokenizerFast(vocab=vocab).save_pretrained(folder)
    return str(folder)


def eqc_spec(game, **changes):
    return EQCSpec(**{"game": game, **GAMES[game], **eqc.source(game, "embedded"), **EQC, **EQC_GAMES[game], **changes})


def eqc_specs(encoder):
    "Stacks of two seeds where Specs can be stacked."
    found = {}
    for game, (way, channel), (name, bottleneck) in itertools.product(GAMES, CHANNELS.items(), BOTTLENECKS.items()):
        if name not in FIRST and (game != "object" or way == "recurrent"
            and name.startswith(("fsq", "fitted", "quantised "))):
            continue
        alone = name.startswith(("fsq", "vq", "fitted"))
        found[f"eqc {game} {way} {name}"] = [eqc_spec(game, **channel, **bottleneck, seed=seed)
            for seed in ((0,) if alone else (0, 1))]
    for game, precision in itertools.product(GAMES, PRECISIONS[1:]):
        found[f"eqc {game} {precision}"] = [eqc_spec(game, precision=precision, **BOTTLENECKS["gumbel"])]
    for cell in ("gru", "lstm"):
        found[f"eqc object recurrent {cell}"] = [eqc_spec("object", **CHANNELS["recurrent"], **BOTTLENECKS["gumbel"],
            cell=cell)]
    found["eqc object drawn distractors"] = [eqc_spec("object", n_negatives=7, seed=seed) for seed in (0, 1)]
    found["eqc sent-cls drawn distractors"] = [eqc_spec("sent-cls", n_negatives=7, seed=seed) for seed in (0, 1)]
    found["eqc image of all items"] = [eqc_spec("image", n_negatives=5, pool=None)]
    tuned = dict(fine_tune=True, encoder=encoder, encoder_lr=.1, n_train=64, batch_size=16, candidates=(2, 10))
    for precision in PRECISIONS:
        found[f"eqc sent-cls fine-tuned {precision}"] = [eqc_spec("sent-cls", precision=precision, **tuned)]
    found["eqc sent-cls fine-tuned recurrent"] = [eqc_spec("sent-cls", **tuned, **CHANNELS["recurrent"],
        **BOTTLENECKS["gumbel"])]
    return found


TAUGHT = dict(probes=("valid",))  # what is taught classes does not play: without a probe it has no rows


def iac_spec(**changes):
    return IACSpec(**{**iac.SIZES["smoke"], "source": "shapes", "n_images": 240, "batch_size": 24, "n_blobs": 8,
        "n_permutations": 9, "test_candidates": (2, 8), "probes": (), **changes})


def iac_specs():
    models = {**iac.MODELS, "Supervised": iac.MODELS["Supervised"] | TAUGHT,
        "public optimiser": dict(optimizer="lars", accumulate=2, batch_size=12, lr=.01),
        "candidates": dict(train_candidates=4), **{k: v for k, v in iac.CHANNELS.items() if v},
              "large images": dict(image_size=24, view_size=16), "probed": dict(probes=("valid",))}
    found = {f"iac {name}": [iac_spec(**own)] for name, own in models.items()}
    for name, precision in itertools.product(("SimCLR", "Supervised", iac.MAIN), PRECISIONS[1:]):
        found[f"iac {name} {precision}"] = [iac_spec(**models[name], precision=precision)]
    return found


PATCH = {**patch.SIZES["smoke"], "n_images": 80, "batch_size": 16, "test_candidates": (2, 8), "queue": 32}


def patch_spec(side=7, **changes):
    s = PatchSpec(**PATCH | changes)
    return PatchSpec(**vars(s) | dict(patch_size=s.view_size//side, strength=s.strength*(7/side)**2))


def patch_specs():
    models = {**patch.MODELS, "public code": PUBLIC_CODE | dict(weight_decay_end=.4),
        "masked": dict(masked=True, budget="learned", length_cost=.01), "plain views": dict(crops=False, jitter=False),
        "published optimiser": dict(optimizer="sgd")}
    found = {f"patch {name}": [patch_spec(**own)] for name, own in models.items()}
    for name, precision in itertools.product((patch.OURS, "MoCo-v2 (R18)", "VQ-VAE2", "PatchVAE (R18, S=32)",
        "Supervised", "ViT (S=32)"), PRECISIONS[1:]):
        found[f"patch {name} {precision}"] = [patch_spec(**patch.MODELS[name], precision=precision)]
    return found


SMS = {**sms.SIZES["smoke"], "n_train": 64, "n_valid": 20, "batch_size": 16, "epochs": 1}


def sms_specs():
    kinds = {"gumbel": {}, "relaxed": dict(straight_through=False), "reinforce": dict(bottleneck="reinforce"),
        "adam": dict(optimizer="adam"),
             "pictures": sms.SEEN | dict(n_attributes=4, alphabet_size=12, picture_size=16, n_distractors=5)}
    found = {f"sms {name}": [SMSSpec(**SMS | own | dict(seed=seed))
        for seed in ((0,) if name == "pictures" else (0, 1))] for name, own in kinds.items()}
    for name, precision in itertools.product(("gumbel", "reinforce"), PRECISIONS[1:]):
        found[f"sms {name} {precision}"] = [SMSSpec(**SMS | kinds[name], precision=precision)]
    return found


def all_specs(
    encoder,  # folder of a transformer, see `tiny_distilbert`
):  # name → Specs that are trained together
    return eqc_specs(encoder) | iac_specs() | patch_specs() | sms_specs()


def detection(device):
    "Rows of a detector that begins with a game's trunk."
    s = patch_spec(trained=False, epochs=1)
    return detections({"game": build_patch(s, 10).eval()}, "scenes", 32, 8, 8, 1, 0, device)


def seeing(device):
    "Maps of where a small classifier looks, and how well a read-out of a trunk does."
    s, world = patch_spec(trained=False, model="supervised"), SceneWorld(32)
    drawn = world.draw(16, generator(0, "seen"))
    images, labels = drawn.images.to(device), drawn.labels.to(device)
    taught = read_out(build_patch(s, len(world.shapes)).trunk.to(device).eval(), images.float()/255, labels,
        len(world.shapes), 8)
    return saliency(torch.nn.Sequential(taught.trunk, taught.head), images.float()/255, labels)


def probing(device):
    "A linear probe of random features, of classes and of several labels at once."
    x, draws = torch.rand(120, 8, generator=generator(0, "x")).to(device), generator(0, "probe")
    one = (x[:, 0] > .5).long()
    several = torch.stack([one, (x[:, 1] > .5).long()], 1)
    return [linear_probe(x[:80], y[:80], x[80:], y[80:], draws).score for y in (one, several)]


JUDGES = {"detection": detection, "saliency": seeing, "probes": probing}  # what else computes on a device


def experiment(specs):
    "The module that runs these Specs."
    return runner_of(specs[0])

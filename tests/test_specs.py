"Specs: one form for each value, an error for what has none, and keys that do not change."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from refcomm.core import ConfigError
from refcomm.papers.eqc.run import EQCSpec
from refcomm.papers.iac.run import IACSpec
from refcomm.papers.patch.run import PatchSpec
from refcomm.papers.sms.run import SMSSpec
from refcomm.runs.store import run_key
from refcomm.training.loop import TrainSettings

SPECS = {"eqc": EQCSpec, "iac": IACSpec, "patch": PatchSpec, "sms": SMSSpec}
# made by the code of version 0.1: fields and the key of runs that are in stores
KNOWN = json.loads(Path(__file__).with_name("keys.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", KNOWN, ids=lambda r: f"{r['experiment']}-{r['key']}")
def test_keys_have_not_changed(row):
    "A Spec made from the fields of a stored run has the key under which it was stored; fields that came later are left out."
    from refcomm.runs.store import digest, spec_fields
    spec = SPECS[row["experiment"]](**{k: v for k, v in row["fields"].items()})
    assert digest([row["experiment"], row["version"],
        {k: v for k, v in spec_fields(spec).items() if k in row["fields"]}])[:16] == row["key"]


def test_equal_specs_have_equal_keys_whatever_made_their_numbers():
    plain = EQCSpec(seed=3, epochs=20, lr=1., candidates=(2, 10))
    odd = [dict(seed=np.arange(4)[3], epochs=np.int32(20), lr=np.float64(1), candidates=np.array([2, 10])),
        dict(seed=torch.tensor(3), epochs=20., lr=torch.tensor(1.), candidates=[np.int64(2), torch.tensor(10)]),
        dict(seed=np.uint8(3), epochs=np.float32(20), lr=1, candidates=[2, 10])]
    for fields in odd:
        spec = EQCSpec(**fields)
        assert spec == plain and hash(spec) == hash(plain) and run_key(spec) == run_key(plain)
        assert type(spec.seed) is int and type(spec.epochs) is int and type(spec.lr) is float and all(type(c) is int
            for c in spec.candidates)
    assert EQCSpec(game=Path("object")).game == "object"


@pytest.mark.parametrize("fields, says", [
    (dict(seed="1"), r"seed must be a whole number, got '1' \(str\): write seed=1 without quotation marks"),
    (dict(epochs=2.5), r"epochs must be a whole number, got 2.5 \(float\)"),
    (dict(epochs=True), "epochs must be a whole number, got True"),
    (dict(lr=float("inf")), "lr must be a finite number, got inf"),
    (dict(lr=float("nan")), "lr must be a finite number, got nan"),
    (dict(lr="1e-3"), "lr must be a finite number, got '1e-3'"),
    (dict(lr=None), "lr must be a finite number, got None"),
    (dict(batch_size="32"), "batch_size must be a whole number, got '32'"),
    (dict(batch_size=None), "batch_size must be a whole number, got None"),
    (dict(seed=1 + 2j), "seed must be a whole number"), (dict(seed=np.array([1, 2])), "seed must be a whole number"),
    (dict(candidates=10), "candidates must be a tuple of numbers or text, got 10"),
    (dict(candidates="10"), "candidates must be a tuple"), (dict(candidates=(2, {3})), "candidates must be a tuple"),
    (dict(candidates=(2, float("nan"))), "candidates must be a tuple"),
    (dict(game=3), "game must be text, got 3"),
    (dict(alphabet_size="8", bottleneck="quantized"), "alphabet_size must be a whole number or None, got '8'"),
    (dict(n_negatives=1.5), "n_negatives must be a whole number or None, got 1.5"),
    (dict(epochs=np.float64("nan")), "epochs must be a whole number"),
], ids=str)
def test_a_value_of_a_wrong_kind_is_named(fields, says):
    with pytest.raises(ConfigError, match=says): EQCSpec(**fields)


def test_settings_of_training_are_checked_alike():
    with pytest.raises(ConfigError, match="batch_size must be a whole number, got '32'"): TrainSettings(batch_size="32")
    with pytest.raises(ConfigError, match="weight_decay must be a finite number or None, got inf"):
        TrainSettings(weight_decay=np.inf)
    assert TrainSettings(epochs=np.int64(3)).epochs == 3

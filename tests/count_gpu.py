"""Count what the trainings of all items compute, for the plans of those who have made none: `python tests/count_gpu.py [profile …]`.

Fills `refcomm/papers/counts.csv` with the shapes that it lacks, as a processor and, on a pretended GPU, as a GPU computes them. Some minutes."""
import json
import os
import sys
from unittest.mock import patch

import torch
from pretend_gpu import PretendGPU

from refcomm.core import PROFILES, ConfigError
from refcomm.papers.counts import IMAGES, count, ship_counts, spared, trial
from refcomm.papers.eqc.spec import SOURCES
from refcomm.publish.catalogue import item_runs, notebooks, parameters_of

REAL = [*IMAGES, *(s["real"][0] for s in SOURCES.values())]


def every(profile):
    "The Specs of all items, with real images and sentences and with embedded ones."
    for names in (REAL, []):
        with patch.dict(os.environ, REFCOMM_STAMPS=json.dumps(dict.fromkeys(names, "00000000")), REFCOMM_DATA=""):
            for item, path in notebooks().items():
                usual = {**parameters_of(path), "profile": profile, "n_seeds": 1}
                for more in [{}] + [dict(recurrent=1)]*("recurrent" in usual):
                    try: yield from item_runs(item, usual | more) or ()
                    except ConfigError as e: print(f"{item} at {profile}: {e}", file=sys.stderr)


def as_a_gpu(s):
    "Counts of a Spec with as many operations as a GPU is given."
    if s.experiment not in ("iac", "patch"): return count(s)
    kernels, batch = [], 8
    with PretendGPU() as gpu:
        *parts, _ = trial(s, batch, "cuda:0")
        for part in parts:
            before = gpu.kernels
            part()
            kernels.append(gpu.kernels - before)
    step, update, valid = kernels
    return count(s)._replace(kernels=step - spared(s)*update, valid_kernels=valid)


def main(profiles):
    torch.set_num_threads(1)
    for profile in profiles or PROFILES:
        specs = list(every(profile))
        if profile in ("gpu", "paper"):
            print(profile, "as a GPU computes it:", ship_counts(specs, None, True, as_a_gpu), "shapes in all", flush=True)
        if profile != "paper": print(profile, ship_counts(specs), "shapes in all", flush=True)


if __name__ == "__main__": main(sys.argv[1:])

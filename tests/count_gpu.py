"""Count what the trainings of all items compute, for the plans of those who have made none: `python tests/count_gpu.py [profile …]`.

Fills `refcomm/papers/counts.csv` with the shapes that it lacks: at smoke and cpu as a processor computes them, at gpu and paper, on a pretended
GPU, as a GPU does. Some minutes.
`python tests/count_gpu.py --table PROFILE [item or paper …]` prints, for each item: operations of a training step as a GPU computes it, how often
the step waits for the GPU (one step of each shape, on a pretended GPU), and the minutes and the memory that `refcomm plan` estimates."""
import json
import os
import sys
from unittest.mock import patch

import torch
from pretend_gpu import PretendGPU

from refcomm.core import PROFILES, ConfigError
from refcomm.papers.counts import IMAGES, count, counted, plan_model, shape_of, ship_counts, spared, trains, trial
from refcomm.papers.eqc.spec import SOURCES
from refcomm.publish.catalogue import choose, item_runs, notebooks, parameters_of
from refcomm.runs.costs import Recorded, duration, plan_costs, size

REAL = [*IMAGES, *(s["real"][0] for s in SOURCES.values())]
COUNTED = {"smoke": False, "cpu": False, "gpu": True, "paper": True}  # profile → whether as a GPU computes it


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


def waits(s):
    "Synchronisations of one training step, after a first one; those of the scaler of fp16 come on top."
    with PretendGPU() as gpu:
        step, *_ = trial(s, 8, "cuda:0")
        step()
        before = gpu.syncs.total()
        step()
    return gpu.syncs.total() - before


def table(profile, names):
    "Lines of a Markdown table; shapes that items share are tried once."
    wanted = {}
    for item, path in (choose(names) if names else notebooks()).items():
        try: wanted[item] = item_runs(item, {**parameters_of(path), "profile": profile})
        except ConfigError as e: print(f"{item} at {profile}: {e}", file=sys.stderr)
    wanted = {item: specs for item, specs in wanted.items() if specs}
    model, known, tried = plan_model(wanted, profile, "H200"), Recorded(set(), {}, {}), {}
    span = lambda numbers: "–".join(f"{n:.0f}" for n in dict.fromkeys((min(numbers), max(numbers)))) if numbers else ""
    yield "| item | kernels a step | syncs a step | time | memory |"
    yield "|---|---|---|---|---|"
    for line in plan_costs(wanted, profile, known, {}, model)[:-1]:
        shapes = {shape_of(s, True): s for s in wanted[line.item] if trains(s)}
        for shape in shapes.keys() - tried.keys(): tried[shape] = waits(shapes[shape])
        kernels = span([counted(s, True).kernels for s in shapes.values()])
        yield (f"| {line.item} | {kernels} | {span([tried[shape] for shape in shapes])} | {duration(line.seconds, line.untimed)} | "
            f"{size(line.memory)} |")


def main(args):
    torch.set_num_threads(1)
    if args[:1] == ["--table"]:
        for line in table(args[1], args[2:]): print(line, flush=True)
        return
    for profile in args or PROFILES:
        gpu = COUNTED[profile]
        n = ship_counts(list(every(profile)), None, gpu, as_a_gpu if gpu else count)
        print(profile, "as a GPU computes it:" if gpu else "as a processor computes it:", n, "shapes in all",
            flush=True)


if __name__ == "__main__": main(sys.argv[1:])

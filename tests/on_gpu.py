"""What only a GPU can tell, in one run: the Specs of `device_specs` on it and on the CPU, and a training step of every item at a profile.

    python tests/on_gpu.py --out gpu.json [--minutes 8] [--profile gpu] [--only eqc/table5] [--specs patch]
    python tests/on_gpu.py --out tests/reference/steps_cpu.json --minutes 30 --profile cpu --device cpu

The second times the trainings of a processor, by which `test_gpus.py` judges the estimates of `refcomm plan`: no Specs are compared then,
and the file holds each training once.

Small Specs: both devices must end within an interval of each other (numbers differ in rounding and in what is drawn). Items: of every shape of
Spec, some steps are trained; seconds of a step and peak memory go into the file, from which costs are estimated. Nothing is written elsewhere."""
import argparse
import dataclasses
import importlib
import json
import tempfile
import time
import traceback
from pathlib import Path

import torch
from device_specs import all_specs, experiment, tiny_distilbert
from torch.optim.optimizer import register_optimizer_step_post_hook

from refcomm.core import pick_device
from refcomm.papers.counts import trains
from refcomm.runs.costs import device_name, measure_speed
from refcomm.runs.execute import Context, make_stacks
from refcomm.runs.experiments import spec_class
from refcomm.runs.store import spec_fields


class Enough(Exception): "The steps that were wanted are done."


def silent(device): return Context(str(device), None, lambda *a: None)


def compared(name, specs, device):
    "A Spec's last losses and mean accuracies on both devices, and whether they are near."
    def ends(where):
        results = experiment(specs).run(specs, silent(where))
        accuracy = [r["accuracy"] for x in results for r in x.rows if r.get("accuracy") is not None]
        loss = [x.history.loss.iloc[-1] for x in results if "loss" in x.history]
        return sum(loss)/max(len(loss), 1), sum(accuracy)/max(len(accuracy), 1)
    there = ends(device)
    if "fp16" in name: return dict(name=name, gpu=there, cpu=None, near=all(x == x for x in there))  # not for CPUs
    here = ends("cpu")
    near = abs(here[0] - there[0]) <= .25*abs(here[0]) + .05 and abs(here[1] - there[1]) <= .25
    return dict(name=name, gpu=there, cpu=here, near=near)


def timed(specs, device, steps=20):
    "Seconds of a training step, the first ones apart, and peak memory, of a stack; on a processor those of this process."
    at, optimizers, cuda = [], set(), device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time

    def stepped(optimizer, args, kwargs):
        optimizers.add(type(optimizer).__name__)
        if cuda: torch.cuda.synchronize(device)
        at.append(clock())
        if len(at) > steps: raise Enough
    hook = register_optimizer_step_post_hook(stepped)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    begun = clock()
    try: experiment(specs).run(specs, silent(device))
    except Enough: pass
    finally: hook.remove()
    later = sorted(b - a for a, b in zip(at[steps//4:], at[steps//4 + 1:]))
    return dict(experiment=specs[0].experiment, fields=spec_fields(specs[0]), together=len(specs),
        before_first_step=at[0] - begun if at else None,
                step_seconds=later[len(later)//2] if later else None,
                peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else 0, optimizers=sorted(optimizers))


def compact(found):
    "What was timed, as JSON: items with numbers of trainings and of runs, and the trainings with what differs from their Spec's defaults."
    steps, at, items = [], {}, {}
    for item, stacks in found["timed"].items():
        runs = {}
        for t in stacks:
            if not t.get("step_seconds"): continue
            usual = {f.name: f.default for f in dataclasses.fields(spec_class(t["experiment"]))}
            plain = lambda v: tuple(v) if isinstance(v, list) else v
            own = {k: v for k, v in t["fields"].items() if k not in usual or plain(v) != usual[k]}
            name = json.dumps([t["experiment"], {**t["fields"], "seed": 0}, t["together"], t["step_seconds"]], sort_keys=True)
            if name not in at:
                at[name] = len(steps)
                steps.append(dict(experiment=t["experiment"], fields=own, together=t["together"],
                    seconds=round(t["step_seconds"], 6)))
            runs[at[name]] = runs.get(at[name], 0) + t["runs"]
        if runs: items[item] = [*map(list, runs.items())]
    head = json.dumps({k: found[k] for k in ("device", "torch", "speed")})[1:-1]
    rows = ",\n".join(f"{json.dumps(item)}: {json.dumps(runs)}" for item, runs in items.items())
    return f'{{{head},\n"items": {{\n{rows}}},\n"steps": [\n' + ",\n".join(map(json.dumps, steps)) + "]}\n"


def items(profile, only):
    "Item → its Specs; trainings that differ in seed or learning rate alone cost the same and are timed once."
    for paper in ("eqc", "iac", "patch", "sms"):
        grids = importlib.import_module(f"refcomm.papers.{paper}.items")
        for item in grids.ITEMS:
            if not only or f"{paper}/{item}".startswith(only):
                yield f"{paper}/{item}", list(filter(trains, grids.grid(item, profile)))


def shape(stack):
    fields = {k: v for k, v in dataclasses.asdict(stack[0]).items()
        if k not in ("seed", "lr", "alphabets", "candidates", "epochs")}
    return type(stack[0]).__name__, len(stack), json.dumps(fields, sort_keys=True, default=str)


def main(argv=None):
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--out", required=True)
    parse.add_argument("--minutes", type=float, default=8.)
    parse.add_argument("--profile", default="gpu")
    parse.add_argument("--only", default="", help="beginning of an item, such as eqc/table5")
    parse.add_argument("--specs", default="", help="beginning of a small Spec's name, such as 'patch MoCo'")
    parse.add_argument("--device", default="cuda")
    args = parse.parse_args(argv)
    device, until = pick_device(args.device), time.monotonic() + 60*args.minutes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    found = dict(device=device_name(device), torch=torch.__version__, profile=args.profile, compared=[],
        timed={}, failed={}, left_out=[])
    if device.type == "cpu": found["speed"] = measure_speed(device)._asdict()

    def save(): Path(args.out).write_text(json.dumps(found, indent=1, default=str))

    def attempt(name, work):
        if time.monotonic() > until: return found["left_out"].append(name)
        try: return work()
        except Exception as e: found["failed"][name] = f"{type(e).__name__}: {e}\n{traceback.format_exc(limit=-3)}"
        finally: save()
    seen = {}
    for item, specs in items(args.profile, args.only):
        for stack in make_stacks(specs, device):
            name = f"{item} #{len(found['timed'].setdefault(item, []))}"
            steps = 20 if device.type == "cuda" else 8
            if shape(stack) not in seen: seen[shape(stack)] = attempt(name, lambda: timed(stack, device, steps))
            found["timed"][item].append(dict(seen[shape(stack)] or {}, runs=len(stack), epochs=stack[0].epochs))
    with tempfile.TemporaryDirectory() as folder:
        for name, specs in all_specs(tiny_distilbert(folder)).items():
            if name.startswith(args.specs) and device.type == "cuda":
                found["compared"].append(attempt(name, lambda: compared(name, specs, device))
                    or dict(name=name, near=None))
    save()
    if device.type == "cpu": Path(args.out).write_text(compact(found))
    wrong = [c["name"] for c in found["compared"] if c["near"] is False]
    print(f"{found['device']}: {len(found['compared'])} Specs compared, {len(wrong)} apart {wrong}; {len(seen)} kinds of "
        f"training timed; {len(found['failed'])} failed {list(found['failed'])}; {len(found['left_out'])} left out for "
        f"time")
    return bool(wrong or found["failed"])


if __name__ == "__main__": raise SystemExit(main())

"""Every reproduction notebook at smoke on a pretended GPU: `python tests/notebooks_on_pretended_gpu.py [paper or paper/item …]`.

Cells run in one process, each notebook in one of its own, as modes of torch do not reach a kernel's. On demand, as all take some minutes."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ROOT/"nbs"/"papers"


def run_one(path):
    "Execute a notebook's code cells, with its parameters as they are but for device and profile."
    import matplotlib
    matplotlib.use("agg")
    import nbformat
    import torch
    from IPython.core.interactiveshell import InteractiveShell
    from pretend_gpu import PretendGPU
    torch.set_num_threads(1)
    shell, gpu = InteractiveShell.instance(), PretendGPU()
    with gpu:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code": continue
            if (result := shell.run_cell(cell.source, silent=True)).error_before_exec or result.error_in_exec:
                raise SystemExit(f"cell {cell.id} failed: {result.error_in_exec or result.error_before_exec!r}")
            if "parameters" in cell.metadata.get("tags", []):
                shell.run_cell('profile, device, n_seeds = "smoke", "auto", 1', silent=True)
    print(f"{gpu.kernels} kernels, {gpu.syncs.total()} synchronisations, {len(gpu.steps)} training steps")


def main(wanted):
    found = sorted(p for p in PAPERS.glob("*/*.ipynb") if not wanted
        or any(str(p.relative_to(PAPERS).with_suffix("")).startswith(w) for w in wanted))
    failed = []
    for path in found:
        item = str(path.relative_to(PAPERS).with_suffix(""))
        with tempfile.TemporaryDirectory() as home:
            env = os.environ | dict(REFCOMM_HOME=home, REFCOMM_FIGURES=home + "/figures", REFCOMM_PROGRESS="off",
                OMP_NUM_THREADS="1", MPLBACKEND="agg")
            done = subprocess.run([sys.executable, __file__, "--one", str(path)], env=env, capture_output=True,
                text=True, cwd=home)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        print(f"{item:28} {'ok    ' if not done.returncode else 'FAILED'} "
            f"{last if not done.returncode else (done.stderr.strip() or done.stdout.strip())[-800:]}", flush=True)
        if done.returncode: failed.append(item)
    print(f"{len(found) - len(failed)} of {len(found)} notebooks without a fault"
        + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]: run_one(sys.argv[2])
    else: raise SystemExit(main(sys.argv[1:]))

"Import the package's heads: nothing global changes, and no heavy package is imported."
import sys

import torch

state, threads, argv = torch.random.get_rng_state(), torch.get_num_threads(), list(sys.argv)
dtype, grad, before = torch.get_default_dtype(), torch.is_grad_enabled(), set(sys.modules)

import refcomm
import refcomm.channels
import refcomm.cli
import refcomm.core
import refcomm.games.referential
import refcomm.papers.eqc.run
import refcomm.papers.evidence
import refcomm.publish.figures
import refcomm.publish.report
import refcomm.runs.execute
import refcomm.sms.complexity # noqa: F401

assert torch.equal(state, torch.random.get_rng_state())
assert (threads, argv) == (torch.get_num_threads(), sys.argv)
assert (dtype, grad) == (torch.get_default_dtype(), torch.is_grad_enabled())
HEAVY = {"transformers", "datasets", "torchvision", "matplotlib", "seaborn", "papermill", "nbdev", "fastcore", "IPython",
    "vector_quantize_pytorch", "numba", "sklearn", "PIL", "jinja2", "tensorboard", "wandb", "mlflow"}
heavy = {m for m in set(sys.modules) - before if m.split(".")[0] in HEAVY}
assert not heavy, heavy

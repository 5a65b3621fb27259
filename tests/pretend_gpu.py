"""A pretended GPU: CPU tensors that say they lie on `cuda:0`, so that code for a GPU is checked where there is none.

    with PretendGPU() as gpu:            # torch.cuda looks available, device="cuda" works, numbers are exact
        run([spec], Context("cuda"))     # any code
    gpu.steps[3].syncs                   # where the host waited for the device between two steps of an optimiser

The device is a tag of a tensor's storage, so that views, parameters, vmap, autograd and fused optimisers need nothing of their own.
A function mode answers for devices: `.device`, `.to`, factories, generators, `.numpy()`. A dispatch mode sees every operation, those of
backward passes and of vmap included, and compares the tags of its arguments. A fault is kept with its file and line and the work goes on,
so that one pass finds them all; leaving the block raises an `AssertionError` that lists them. With `strict=True` it is raised at once.

Found: operations over devices (0-dim tensors on the CPU are allowed where CUDA allows them), generators of another device, `.numpy()` and
`numpy.asarray` on the device, states of generators of another device, comparisons of `cuda` with `cuda:0` (both are made as CUDA makes them).
Counted: kernels (operations that are neither views nor allocations) and synchronisations (reading values, shapes that depend on values,
copies between host and device unless pinned and non-blocking), each per step of an optimiser.
Not modelled: the kernels' own rounding, CUDA's list of autocast operations (the CPU's is used, fp16 computed as bf16), memory, streams,
other threads and processes."""
import contextlib
import hashlib
import importlib.util
import linecache
import os
import statistics
import sys
from collections import Counter
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo  # imported before anything is patched
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU, ANY = "cuda", "cpu", "any"  # ANY: made within an operation, which would have made it where its arguments are
A, TENSOR, HERE, TORCH = torch.ops.aten, torch.Tensor, os.path.abspath(__file__), os.path.dirname(torch.__file__)
COPIES = {A.copy_, A._to_copy, A.set_, A._reshape_alias, A.lift_fresh, A.lift_fresh_copy}
INDEXED = {A.index, A._unsafe_index}
INDEXING = INDEXED | {A.index_put, A.index_put_, A._index_put_impl_, A._unsafe_index_put}
SCALARS = {A.masked_fill, A.masked_fill_, A.fill, A.fill_, A.where, A.index_fill, A.index_fill_}  # take 0-dim tensors of the CPU
SYNCS = {A._local_scalar_dense, A.nonzero, A.masked_select, A._unique2, A.unique_dim, A.unique_consecutive, A.bincount,
    A.equal, A.is_nonzero,
         A._linalg_eigh, A._linalg_svd, A.linalg_lstsq, A.linalg_solve_ex}
ALLOCATIONS = {A.empty, A.empty_strided, A.empty_like, A.new_empty, A.new_empty_strided, A._unsafe_view, A.detach,
    A.lift_fresh}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, TENSOR.new_tensor}


class Step(NamedTuple):
    "What happened between two steps of an optimiser."
    kernels: int
    syncs: Counter  # (what, place) → how often


def place(package):
    "The innermost line of the package, or else of whoever is not torch; and the line that called torch, where that is another."
    frame, outer, own = sys._getframe(2), None, None
    while frame and not own:
        file = frame.f_code.co_filename
        if not file.startswith(TORCH) and file != HERE:
            outer = outer or (file, frame.f_lineno)
            if package and file.startswith(package): own = file, frame.f_lineno
        frame = frame.f_back
    return own or outer, None if outer == (own or outer) else outer


def described(what, at):
    (file, line), via = at
    short = lambda path: "/".join(path.split(os.sep)[-3:])
    return (f"{what} @ {short(file)}:{line} {linecache.getline(file, line).strip()[:100]}"
        + (f" (in {short(via[0])}:{via[1]})" if via else ""))


class Generator(torch._C.Generator):
    "A generator that draws on the CPU and says it is elsewhere; its state is as short as CUDA's."
    states = {}

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.pretended = torch.device(device)  # "cuda" stays without an index, while tensors say "cuda:0"
        return self

    device = property(lambda self: self.pretended)

    def get_state(self):
        state = super().get_state()
        if self.pretended.type == CPU: return state
        key = hashlib.sha256(bytes(state.tolist())).digest()[:16]
        self.states[key] = state
        return torch.tensor(list(key), dtype=torch.uint8)

    def set_state(self, state):
        if self.pretended.type == CPU: return super().set_state(state)
        if len(state) != 16:
            raise RuntimeError(f"RNG state is wrong size: a CUDA generator's has 16 bytes, got {len(state)}")
        super().set_state(self.states[bytes(state.tolist())])
        return self


class _Functions(TorchFunctionMode):
    def __init__(self, gpu): self.gpu = gpu
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.gpu.function(func, args, dict(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return self.gpu.operation(func, args, kwargs or {})


def tensors(*args): return [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
def generators(*args): return [g for g in tree_leaves(args) if isinstance(g, torch._C.Generator)]
def is_view(func): return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def as_device(x):
    "A device given as such or by name; None for anything else."
    named = isinstance(x, str) and x.partition(":")[0] in (CPU, CUDA, "mps", "meta")
    return torch.device(x) if named or isinstance(x, torch.device) else None


class PretendGPU(contextlib.ExitStack):
    tags, pinned = {}, set()  # storage → device; shared by all blocks, as modules keep tensors from one to the next

    def __init__(self, package="refcomm", strict=False):
        super().__init__()
        found = importlib.util.find_spec(package)
        self.package, self.strict = found and os.path.dirname(found.origin) + os.sep, strict
        self.faults, self.syncs, self.kernels, self.steps = Counter(), Counter(), 0, []
        self.asked, self.quiet, self.before = None, False, (0, Counter())

    # --- tags
    def storage(self, t):
        while torch._C._functorch.is_functorch_wrapped_tensor(t): t = torch._C._functorch.get_unwrapped(t)
        try: return t.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError): return None  # sparse

    def tag(self, t):
        s = self.storage(t)
        return ANY if s is None else self.tags.get(s, (None, CPU))[1]

    def put(self, t, tag):
        while torch._C._functorch.is_functorch_wrapped_tensor(t): t = torch._C._functorch.get_unwrapped(t)
        if self.storage(t) is None: return
        ref = StorageWeakRef(t.untyped_storage())  # kept, so that the address is not used again
        self.tags[ref.cdata] = ref, tag
        if len(self.tags) % 20_000 == 0:
            for key in [key for key, (r, _) in self.tags.items() if r.expired()]:
                del self.tags[key]
                self.pinned.discard(key)

    def fault(self, what):
        at = what, place(self.package)
        self.faults[at] += 1
        if self.strict: raise RuntimeError(described(*at))

    def sync(self, what):
        if not self.quiet: self.syncs[what, place(self.package)] += 1

    # --- operations: all tensors of one on one device
    def operation(self, func, args, kwargs):
        packet, ts = func.overloadpacket, tensors(args, kwargs)
        tags = [self.tag(t) for t in ts]
        if CUDA in tags: self.compare(func, packet, args, kwargs, ts, tags)
        out = func(*args, **kwargs)
        if packet is A.copy_: tag = tags[0]
        else: tag = next((t for t in (CUDA, CPU) if t in tags), ANY)
        if (tag == CUDA or not ts and self.asked == CUDA) and packet not in ALLOCATIONS and not is_view(func):
            self.kernels += 1
        old = {self.storage(t) for t in ts}
        for o in tensors(out):
            if self.storage(o) not in old: self.put(o, tag)
        return out

    def compare(self, func, packet, args, kwargs, ts, tags):
        "Refuse what CUDA refuses, and count what makes the host wait."
        if packet is A.copy_ and CPU in tags: return self.sync("copy between host and device")
        if CPU in tags and packet not in COPIES:
            scalars = (torch.Tag.pointwise in func.tags or packet in INDEXING | SCALARS or "foreach" in func.name()
                or "fused" in func.name())
            bad = [list(t.shape) for t, tag in zip(ts, tags) if tag == CPU and not (scalars and t.dim() == 0)]
            values = args[2] if packet in INDEXING - INDEXED else None
            if bad and packet in INDEXING and tags[0] == CUDA and (values is None or values.dim() == 0
                or self.tag(values) != CPU):
                self.sync("indices on the host")
            elif bad: self.fault(f"{func.name()} of a cuda tensor and cpu tensors of shapes {bad}")
        masks = packet in INDEXING and [t for t in ts[1:] if t.dtype == torch.bool]
        if masks and packet not in INDEXED: masks = not (args[2].numel() == 1 and self.tag(args[2]) != CUDA)  # becomes masked_fill_
        if packet in SYNCS or masks or packet is A.repeat_interleave and kwargs.get("output_size") is None:
            self.sync(packet.__name__)

    # --- functions: what Python asks for
    def function(self, func, args, kwargs):
        name, of = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if name == "__get__" and of in (TENSOR.device, TENSOR.is_cuda, TENSOR.is_cpu):
            there = self.tag(args[0]) == CUDA
            if of is not TENSOR.device: return there == (of is TENSOR.is_cuda)
            return torch.device(CUDA, 0) if there else func(*args)
        if func is TENSOR.get_device: return 0 if self.tag(args[0]) == CUDA else -1
        if func is TENSOR.is_pinned: return self.storage(args[0]) in self.pinned
        if func is TENSOR.pin_memory: return self.pin(args[0])
        ts = tensors(args, kwargs)
        before = self.tag(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        if func in (TENSOR.numpy, TENSOR.__array__) and before == CUDA: self.fault(f"{name}() of a cuda tensor")
        if func is TENSOR.tolist and before == CUDA: self.sync("tolist")
        wanted, args, kwargs = self.wanted(func, name, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        for g in generators(args, kwargs):
            here, target = getattr(g, "pretended", torch.device(CPU)).type, wanted or (self.tag(ts[0]) if ts else CPU)
            if target != ANY and here != target:
                self.fault(f"{name}() with a generator on {here} for a tensor on {target}")
        self.asked, quiet = wanted, self.quiet
        self.quiet = (quiet or func is TENSOR.tolist or func is F.one_hot
            and (kwargs.get("num_classes", args[1:] and args[1]) or -1) > 0)
        try: out = func(*args, **kwargs)
        finally: self.asked, self.quiet = None, quiet
        if pinned: self.pinned.add(self.storage(out))
        return self.tagged(out, func, name, args, kwargs, ts, before, wanted)

    def tagged(self, out, func, name, args, kwargs, ts, before, wanted):
        "What a function returned, on the device where it would be."
        if name == "__deepcopy__": self.put(out, before)  # made by its storage, not by an operation
        elif wanted and before is not None and (name in ("to", "cuda", "cpu", "type_as")
            or func in FROM_HOST - {TENSOR.new_tensor}):
            if before not in (wanted, ANY):
                ready = kwargs.get("non_blocking") and (wanted == CPU or self.storage(args[0]) in self.pinned)
                if not ready: self.sync(f"copy to {wanted}")
                if self.storage(out) == self.storage(args[0]): out = out.clone()
            self.put(out, wanted)
        elif wanted or not ts or name.startswith("new_"):
            tag = wanted or (before if name.startswith("new_") else CPU)
            if tag == CUDA and func in FROM_HOST: self.sync("copy to cuda")
            for o in tensors(out):
                if wanted or self.tag(o) in (ANY, CPU): self.put(o, tag)
        return out

    def pin(self, t):
        out = t.clone()
        self.put(out, CPU)
        self.pinned.add(self.storage(out))
        return out

    def wanted(self, func, name, args, kwargs):
        "The device that is asked for, and arguments that ask for the CPU in its place."
        if func is TENSOR.cpu: return CPU, args, kwargs
        if func is TENSOR.cuda: return CUDA, args[:1], {}
        if func is TENSOR.type_as: return self.tag(args[1]), args, kwargs
        d = as_device(kwargs.get("device"))
        if d is not None and d.type != "meta": return d.type, args, kwargs | dict(device=torch.device(CPU))
        if func is TENSOR.to and len(args) > 1:
            if isinstance(args[1], torch.Tensor): return self.tag(args[1]), args, kwargs
            d = as_device(args[1])
            if d is not None and d.type != "meta": return d.type, (args[0], torch.device(CPU), *args[2:]), kwargs
        return None, args, kwargs

    # --- steps
    def stepped(self, optimizer, args, kwargs):
        if isinstance(optimizer, torch.optim.LBFGS): return  # a solver
        kernels, syncs = self.before
        self.steps.append(Step(self.kernels - kernels, self.syncs - syncs))
        self.before = self.kernels, Counter(self.syncs)

    def usual(self):
        "The step with the median number of synchronisations; validation falls between few."
        return sorted(self.steps, key=lambda s: s.syncs.total())[(len(self.steps) - 1)//2]

    # --- torch.cuda, as if it were there
    def __enter__(self):
        super().__enter__()
        real, run_backward, nothing = torch.autocast, torch.autograd._engine_run_backward, lambda *a, **k: None

        def backward(*args, **kwargs):  # torch turns function modes off where it calls the engine
            on = any(isinstance(m, _Functions) for m in _get_current_function_mode_stack())
            with contextlib.nullcontext() if on else _Functions(self): return run_backward(*args, **kwargs)

        class autocast(real):
            def __init__(self, device_type, dtype=None, *args, **kwargs):  # CPUs are slow with fp16: it is computed as bf16
                super().__init__(CPU if device_type == CUDA else device_type, torch.bfloat16 if dtype == torch.float16
                    else dtype, *args, **kwargs)

        there = dict(is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1,
            current_device=lambda: 0,
                     get_device_name=lambda *a: "Pretended GPU", get_device_capability=lambda *a: (9, 0),
                     is_bf16_supported=lambda *a: True,
                     mem_get_info=lambda *a: (2**37, 2**37), max_memory_allocated=lambda *a: 0,
                     memory_allocated=lambda *a: 0,
                     get_rng_state=lambda *a: torch.zeros(16, dtype=torch.uint8), set_rng_state=nothing,
                     manual_seed=nothing, manual_seed_all=nothing,
                     reset_peak_memory_stats=nothing, synchronize=nothing, set_device=nothing, empty_cache=nothing,
                     _lazy_init=nothing,
                     is_current_stream_capturing=lambda: False, device=lambda *a: contextlib.nullcontext())
        for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # the name depends on the version
            if hasattr(torch.optim.Optimizer, check):
                self.enter_context(patch.object(torch.optim.Optimizer, check, lambda self: None))
        for k, v in there.items(): self.enter_context(patch.object(torch.cuda, k, v))
        for module, k, v in ((torch, "autocast", autocast), (torch.amp, "autocast", autocast),
            (torch, "Generator", Generator),
                             (torch.autograd, "_engine_run_backward", backward)):
            self.enter_context(patch.object(module, k, v))
        self.callback(register_optimizer_step_post_hook(self.stepped).remove)
        self.enter_context(_Operations(self))
        self.enter_context(_Functions(self))
        return self

    def __exit__(self, kind, error, trace):
        swallowed = super().__exit__(kind, error, trace)
        if kind is None and self.faults and not self.strict: raise AssertionError(self.report())
        return swallowed

    def report(self):
        lines = [f"{self.kernels} kernels, {len(self.faults)} kinds of fault, {self.syncs.total()} synchronisations"]
        lines += [f"  FAULT ×{n} {described(*at)}" for at, n in self.faults.most_common()]
        if self.steps:
            usual = self.usual()
            lines += [f"{len(self.steps)} steps; a usual one: {statistics.median(s.kernels for s in self.steps):.0f} "
                f"kernels, {usual.syncs.total()} synchronisations"]
            lines += [f"  ×{n} {described(*at)}" for at, n in usual.syncs.most_common()]
        return "\n".join(lines)

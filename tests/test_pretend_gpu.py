import numpy as np
import pytest
import torch
from pretend_gpu import PretendGPU

PLANTED = {  # what is wrong → code that does it, with x on the device
    "operation": lambda x: x + torch.arange(4),
    "matmul": lambda x: x @ torch.ones(4),
    "gather": lambda x: x.gather(0, torch.tensor([1, 2])),
    "mask": lambda x: x.masked_fill(torch.ones(4, dtype=torch.bool), 0.),
    "written by index": lambda x: x.index_put((torch.tensor([1], device="cuda"),), torch.ones(1)),
    "backward": lambda x: Crooked.apply(x.clone().requires_grad_()).sum().backward(),
    "within vmap": lambda x: torch.func.vmap(lambda row: row + torch.arange(2))(x.view(2, 2)),
    "generator": lambda x: torch.rand(4, generator=torch.Generator("cpu"), device="cuda"),
    "generator in place": lambda x: x.clone().exponential_(generator=torch.Generator("cpu")),
    "permutation": lambda x: torch.randperm(4, generator=torch.Generator("cuda")),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "a zero-dimensional tensor of the device": lambda x: x.sum() + torch.ones(4),
}


class Crooked(torch.autograd.Function):
    "Whose backward pass makes a tensor on the host."
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, gradient): return gradient * torch.arange(4.)


@pytest.mark.parametrize("what", PLANTED)
def test_each_kind_of_fault_is_found_with_its_place(what):
    with pytest.raises(AssertionError, match=r"FAULT ×1 .*test_pretend_gpu.py:\d+"), PretendGPU():
        PLANTED[what](torch.ones(4, device="cuda"))


def test_a_fault_is_raised_at_once_when_strict():
    with PretendGPU(strict=True), pytest.raises(RuntimeError, match="test_pretend_gpu.py"):
        torch.ones(4, device="cuda") + torch.ones(4)


def test_what_cuda_allows_is_no_fault():
    with PretendGPU() as gpu:
        x = torch.ones(4, device="cuda", requires_grad=True)
        y = x*torch.tensor(2.) + 1
        y = torch.where(y > torch.tensor(1.), y, 0.)[torch.tensor([0, 1])]
        y.sum().backward()
        assert x.grad.device == x.device == torch.device("cuda:0") != torch.device("cuda")
        x.grad[x.grad > 1] = 0.  # masked_fill_: does not wait
        g = torch.Generator("cuda").manual_seed(0)
        assert g.device == torch.device("cuda") != x.device
        assert torch.rand(2, generator=g, device=g.device).is_cuda and not torch.rand(2).is_cuda
        assert x.cpu().detach().numpy().sum() == 4 and x.new_zeros(2).is_cuda and x.to("cpu").to(x).is_cuda
        assert torch.nn.Linear(2, 2).to("cuda").weight.is_cuda
    assert {what for what, _ in gpu.syncs} == {"indices on the host", "copy to cpu", "copy to cuda"}


WAITS = {
    "item": lambda x: x.sum().item(), "bool": lambda x: bool(x.any()), "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(), "nonzero": lambda x: x.nonzero(), "boolean index": lambda x: x[x > 0],
    "written by mask": lambda x: x.index_put((x > 0,), x),
    "unique": lambda x: x.unique(), "repeats": lambda x: x.repeat_interleave(x.long()),
    "constant": lambda x: torch.tensor([1., 2.], device=x.device),
    "new": lambda x: x.new_tensor([1.]), "copied in": lambda x: x.copy_(torch.ones(4)),
    "moved": lambda x: torch.ones(4).to(x.device),
}
RUNS = {
    "arithmetic": lambda x: (x*2 + 1).sum(), "factory": lambda x: torch.arange(4, device=x.device),
    "zeros": lambda x: x.new_zeros(3),
    "fill": lambda x: x.masked_fill_(x > 2, 0.), "one-hot": lambda x: torch.nn.functional.one_hot(x.long(), 5),
    "moved from pinned": lambda x: torch.ones(4).pin_memory().to(x.device, non_blocking=True),
    "repeats of a known number": lambda x: x.repeat_interleave(x.long(), output_size=4),
    "index on the device": lambda x: x[x.long()],
}


@pytest.mark.parametrize("what, n", [*((w, 1) for w in WAITS), *((r, 0) for r in RUNS)])
def test_waiting_for_the_device_is_counted(what, n):
    with PretendGPU() as gpu:
        x = torch.ones(4, device="cuda")
        gpu.syncs.clear()
        (WAITS | RUNS)[what](x)
    assert gpu.syncs.total() == n, gpu.syncs


def test_states_of_generators_fit_their_own_device_alone():
    with PretendGPU():
        g = torch.Generator("cuda").manual_seed(1)
        state, drawn = g.get_state(), torch.rand(3, generator=g, device="cuda")
        assert torch.equal(torch.rand(3, generator=torch.Generator("cuda").set_state(state), device="cuda"), drawn)
        with pytest.raises(RuntimeError, match="wrong size"): g.set_state(torch.Generator("cpu").get_state())
        with pytest.raises((RuntimeError, TypeError)): torch.Generator("cpu").set_state(state)


def test_numbers_are_those_of_the_cpu_and_steps_are_counted():
    def train(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1).to(device)
        optimizer, x = torch.optim.Adam(net.parameters(), fused=True), torch.ones(5, 3).to(device)
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return net.weight.detach().cpu()
    with PretendGPU() as gpu: there = train("cuda")
    assert torch.equal(there, train("cpu"))
    assert len(gpu.steps) == 4 and not gpu.usual().syncs and 5 < gpu.usual().kernels < 30


def test_fp16_goes_through_its_scaler():
    with PretendGPU() as gpu:
        net, scaler = torch.nn.Linear(3, 1).to("cuda"), torch.amp.GradScaler("cuda")
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16): loss = net(torch.ones(5, 3, device="cuda")).float().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 65536  # fp16 is computed as bf16 here, which does not overflow
    assert not gpu.usual().syncs

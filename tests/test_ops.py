"""Every op as torch sees it: schema, fake, autograd and compilation; FLOPs; and all of them in Triton's interpreter."""
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernel_tools import PLAIN
from kernels.decode_attention import _constants as attention_constants

ROOT = Path(__file__).resolve().parents[1]
IN_INTERPRETER = ["test_row_logp.py", "test_linear_logp.py", "test_linear_kl.py", "test_policy_loss.py",
                  "test_group_advantage.py", "test_gae.py", "test_sample.py", "test_decode_attention.py"]
op = torch.ops.seethink


def tensors(grad=True):
    torch.manual_seed(0)
    h = torch.randn(7, 4, requires_grad=grad)
    weight = torch.randn(11, 4, requires_grad=grad)
    return h, weight, torch.tensor([0, 10, -100, 3, 4, 5, 6])


def calls():
    """name -> (op, arguments); outputs of one are inputs of its backward."""
    h, weight, target = tensors()
    logits = (h @ weight.T).detach()
    row = torch.randn(7)
    mask = target >= 0
    denominator = torch.tensor(5.0)
    statistics = [t.detach() for t in op.row_logp(logits, target, 0.7, 5.0, -100)[1:]]
    loss = (0.2, 0.2, 2.0, "k3", 0.1)
    q, k = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 2, 5, 8)
    kx = torch.randn(2, 2, 6, 8)
    attended = op.prefix_attention(q, k, k + 1, kx, kx - 1, [6, 4])
    taken = torch.rand(2, 6) < 0.8
    return {
        "prefix_attention": (op.prefix_attention, (q.clone().requires_grad_(), k, k + 1, kx.clone().requires_grad_(),
                                                   kx, [6, 4])),
        "prefix_attention_backward": (op.prefix_attention_backward, (q, q, k, k + 1, kx, kx - 1, [6, 4], *attended)),
        "decode_attention": (op.decode_attention, (q[..., 0, :].transpose(1, 2), kx, kx - 1, taken, 3)),
        "row_logp": (op.row_logp, (logits.clone().requires_grad_(), target, 0.7, 5.0, -100)),
        "row_dlogits_": (op.row_dlogits_, (logits.clone(), target, row, None, *statistics, 0.7, 5.0, -100)),
        "linear_logp": (op.linear_logp, (h, weight, target, 0.7, None, -100, 3)),
        "linear_logp_backward": (op.linear_logp_backward, (row, None, h.detach(), weight.detach(), target, *statistics,
                                                           0.7, None, -100, 3, True, False)),
        "linear_logp_known": (op.linear_logp_known, (h, weight, target, -torch.ones(7), torch.ones(7), 0.7, None, -100,
                                                     3, True, True)),     # opcheck's loss: |sum logp| + |sum entropy|
        "linear_kl": (op.linear_kl, (h, weight, h.detach() + 1, weight.detach(), mask, 1.0, None, None)),
        "linear_kl_backward": (op.linear_kl_backward, (row, row, torch.randn(4, 7), h.detach(), weight.detach(),
                                                       h.detach() + 1, weight.detach(), mask, 1.0, None, None, True,
                                                       True)),
        "policy_loss": (op.policy_loss, (row.clone().requires_grad_(), row - 0.1, None, row.exp().requires_grad_(), row,
                                         mask, row.abs(), denominator, *loss, "sapo", 0.1)),
        "linear_policy_loss": (op.linear_policy_loss, (h, weight, target, None, row - 3, row, mask, denominator, 1.0,
                                                       None, *loss, 0.1, 3, True, True)),
        "group_advantage": (op.group_advantage, (torch.rand(3, 4), "batch", "leave_one_out", 1e-6)),
        "gae": (op.gae, (torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 4) > 0.3, None, 0.9, 0.8)),
        "sample": (op.sample, (logits, torch.rand(7, dtype=torch.float64), torch.zeros(11).bool(), 1.0, 3, 0.9)),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    torch.library.opcheck(*calls()[name])


def test_every_op_is_checked():
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("seethink::")}
    assert registered == calls().keys()


@PLAIN
def test_a_step_compiles_as_one_graph():
    def step(h, weight, target, old, reward):
        logp, entropy = kernels.linear_logp(h, weight, target)
        told, _ = kernels.linear_logp(h, weight, target, upstream=(torch.full((6,), 0.5), None))
        advantage = kernels.group_advantage(reward).flatten()
        mask = target >= 0
        loss, statistics = kernels.policy_loss(logp, old, None, advantage, mask, 5, entropy=entropy, entropy_coef=0.1)
        fused, *_ = kernels.linear_policy_loss(h, weight, target.clamp(min=0), old, None, advantage, mask, 5)
        kl = kernels.linear_kl(h, weight, h.detach() * 1.1, weight)
        values = kernels.row_logp(h, target.clamp(0, 3))[0]
        token = kernels.sample(h.detach(), temperature=0, top_k=2, top_p=0.9).token
        return loss + fused + kl.mean() + values.mean() + 0.5 * told.sum(), statistics["kl"], token, kernels.gae(
            reward, reward, reward > 0, 0.9, 0.9)[0]

    h, weight, target = tensors()
    h, target = h[:6].detach().requires_grad_(), target[:6]
    inputs = (h, weight, target, torch.randn(6), torch.rand(2, 3))
    plain = step(*inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    for one, other in zip(plain, compiled):
        torch.testing.assert_close(one, other)
    wanted = torch.autograd.grad(plain[0], (h, weight))
    found = torch.autograd.grad(compiled[0], (h, weight))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_the_heads(frozen):
    h, weight, target = tensors()
    weight.requires_grad_(not frozen)
    product = 2 * 7 * 4 * 11

    def counted(step):
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() / product

    assert counted(lambda: kernels.linear_logp(h, weight, target)) == 1
    assert counted(lambda: kernels.linear_logp(h, weight, target)[0].sum().backward()) == (3 if frozen else 4)
    assert counted(lambda: kernels.linear_kl(h, weight, h.detach(), weight).sum().backward()) == (5 if frozen else 6)
    told = (torch.ones(7), None)
    assert counted(lambda: kernels.linear_logp(h, weight, target, upstream=told)[0].sum().backward()) == (
        2 if frozen else 3)
    with torch.no_grad():
        assert counted(lambda: kernels.linear_logp(h, weight, target, upstream=told)) == 1
    row = torch.randn(7)
    assert counted(lambda: kernels.linear_policy_loss(h, weight, target.clamp(min=0), row, None, row, target >= 0,
                                                      5)[0].backward()) == (2 if frozen else 3)


TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
F = "*fp32"
STRIDES = ["i32:16"] * 3
ROW = dict(V=152064, BLOCK=4096)
# file, kernel, types of its runtime arguments in order (":16": a launch will see that 16 divides it), its constants
COMPILED = [
    ("row_logp", "_forward_kernel", ["*bf16", "i64", "*i64", *[F] * 4, "fp32", "fp32", "i32"], dict(ROW, CAPPED=True)),
    ("row_logp", "_backward_kernel", [F, "i64", "*bf16", "i64", "*i64", *[F] * 5, "fp32", "fp32", "i32"],
     dict(ROW, WIDTH=152064, CAPPED=True)),
    *(("linear_kl", "_kernel", [F, "i64", F, "i64", "*bf16", "i64", "*u8", *[F] * 6, "fp32", "fp32"],
       dict(ROW, WIDTH=152064, CAPPED=True, BACKWARD=backward)) for backward in (False, True)),
    *(("policy_loss", "_kernel", [*[F] * 5, "*u8", *[F] * 4, "i32", *["fp32"] * 7],
       dict(KL=kl, ENTROPY=True, SURROGATE=surrogate, WEIGHTED=True, BLOCK=1024))
      for kl, surrogate in (("", "clip"), ("k1", "cispo"), ("k2", "sapo"), ("k3", "clip"))),
    *(("group_advantage", "_kernel", [F, F, F, "fp32", "fp32"], dict(G=6, WIDTH=8, STD=std))
      for std in ("group", "batch", "none")),
    ("gae", "_kernel", [F, F, "*u8", F, F, F, "fp32", "fp32", "i32"], dict(BLOCKS=2, BLOCK=1024)),
    ("sample", "_parts_kernel", [F, "i64", F, "*u8", F, F, "fp32"],
     dict(V=152064, BLOCK=2048, FLOOR=True, num_warps=4)),
    *(("sample", "_draw_kernel", [F, "i64", "*fp64", F, "*u8", F, F, "*i64", F, F, "fp32", "i32"],
       dict(V=152064, BLOCK=2048, MOST=128, FLOOR=floor, GREEDY=greedy, num_warps=4))
      for floor, greedy in ((True, False), (False, True))),
    # Heads of a Llama, a Qwen, a SmolLM and a Gemma; the last in bf16 only: in fp32 Triton 3.6 spills 8 bytes.
    *(("decode_attention", "_parts_kernel",
       [*[f"{x}:16", *STRIDES] * 3, "*u8", "i32", f"{F}:16", f"{F}:16", "fp32", *["i32"] * 5],
       dict(Hk=4, r=r, K=K, **attention_constants(8, r, K, dtype)))
      for r, K, x, dtype in (
          (1, 128, "*bf16", torch.bfloat16), (7, 128, "*bf16", torch.bfloat16), (3, 64, "*bf16", torch.bfloat16),
          (2, 256, "*bf16", torch.bfloat16), (1, 128, F, torch.float32), (7, 128, F, torch.float32),
          (3, 64, F, torch.float32))),
    ("decode_attention", "_merge_kernel", [F, F, "*bf16", "i32", "i32"],
     dict(Hk=4, r=7, K=128, WIDTH=128, MOST=16, BLOCK=16, num_warps=1)),
]


def resources(cubin, folder):
    """{name: number} of what a program takes: REG registers of a thread, bytes of STACK, LOCAL and SHARED memory; the
    shared memory that a launch asks for is not in it. Read from the machine code: a driver is what runs it, not what
    tells it."""
    import triton
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True,
                          text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", said)}


@PLAIN
@TRITON
@pytest.mark.parametrize("file, name, types, constants", COMPILED)
def test_the_triton_kernels_compile_for_a_gpu_and_spill_no_register(file, name, types, constants, tmp_path):
    # To a Hopper's machine code, which takes no GPU: the interpreter accepts more than the compiler does.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = getattr(importlib.import_module(f"kernels.{file}"), name)
    options = {"num_warps": 8} | {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    rest = iter(types)
    signature = {arg: "constexpr" if arg in constants else next(rest) for arg in kernel.arg_names}
    divided = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values())
               if kind.endswith(":16")}
    signature = {arg: kind.removesuffix(":16") for arg, kind in signature.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divided)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"] and list(rest) == []
    found = resources(compiled.asm["cubin"], tmp_path)
    print(f"\n{file}.{name} {constants} {options}: {found['REG']} registers, {found['STACK'] + found['LOCAL']} bytes "
          f"spilled, {compiled.metadata.shared} bytes shared")
    assert found["STACK"] == found["LOCAL"] == 0


@PLAIN
@TRITON
@pytest.mark.parametrize("chosen", [
    pytest.param(IN_INTERPRETER, id="quick"),
    pytest.param([*IN_INTERPRETER, "--slow", "-m", "slow"], id="slow", marks=pytest.mark.slow)])
def test_the_triton_kernels_in_its_interpreter(chosen):
    # In a process of its own: the variable counts when Triton is imported.
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen],
                          cwd=ROOT / "tests", env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]

"""Times every op against this machine's own ceilings and against what else computes the same.

    python -m kernels.bench                     # on CUDA when there is one: N 16384, D 4096, V 32000 and 152064, bf16
    python -m kernels.bench --check             # also compares each result with fp64
    python -m kernels.bench --rows=4096 --width=512 --vocab=32000 --device=cpu

Contenders for one result take turns, so that a machine that slows down slows all of them; medians
over --rounds. The ceiling is a large matmul in the same dtype, or a large copy. Memory: the most
that was held beyond what was there before. Others: PyTorch with all logits, torch.compile of it
and, with the `peers` extra and a GPU, liger-kernel, cut-cross-entropy and TRL (this one on a CPU,
too).
"""
import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from kernels import (decode_attention, decode_attention_reference, gae, gae_reference, gpu_hour, group_advantage,
                     group_advantage_reference, linear_kl, linear_kl_reference, linear_logp, linear_logp_reference,
                     linear_policy_loss, policy_loss, policy_loss_reference, prefix_attention,
                     prefix_attention_reference, row_dlogits_, row_logp, row_logp_reference, sample)
from kernels.decode_attention import masked as decode_masked
from kernels.decode_attention import visible
from kernels.prefix_attention import masked

CHECKED = 64        # rows whose results are computed again in fp64


class Contender(NamedTuple):
    """step() computes the result once; flops or size, in bytes, is the least work that it takes."""
    step: Callable
    flops: int = 0
    size: int = 0


# ---------------------------------------------------------------- time, memory and ceilings

def seconds(step, device):
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step, device=torch.device("cpu")):
    """The most memory that was allocated at one time during step(), beyond what was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")         # or the profiler announces itself among the tables
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = 0
    most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


def fastest(step, device=torch.device("cpu"), times=10):
    return min(seconds(step, device) for _ in range(times))


def ceilings(device, dtype):
    """(FLOP/s of a large matmul in dtype, bytes/s of a large copy, reads and writes), the best."""
    n = 8192 if device.type == "cuda" else 2048
    copied = 2**30 if device.type == "cuda" else 2**28
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    source = torch.zeros(copied // 4, device=device)
    target = torch.empty_like(source)
    matmul = fastest(lambda: a @ b, device)
    copy = fastest(lambda: target.copy_(source), device)
    return 2 * n ** 3 / matmul, 2 * copied / copy


# ---------------------------------------------------------------- contenders of a head

def naive(h, weight, target):
    logp = (h @ weight.T).float().log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def others(device):
    """name -> op(h, weight, target), of every other implementation that is installed and runs."""
    found = {"torch.compile of it": torch.compile(naive)}
    try:
        from trl.kernels import ChunkedLogProbFunction

        def trl(h, weight, target):
            return ChunkedLogProbFunction.apply(h, weight, None, target, 1.0, 32768, None, 1.0, ("entropy",))[:2]

        found["TRL, chunked"] = trl
    except ImportError:
        print("TRL is not installed")
    if device.type != "cuda":
        return found
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger(h, weight, target):
            return liger_fused_linear_cross_entropy(h, weight, target), None

        found["liger-kernel, no entropy"] = liger
    except ImportError:
        print("liger-kernel is not installed")
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cut(h, weight, target):
            return linear_cross_entropy(h, weight, target, reduction="none"), None

        found["cut-cross-entropy, no entropy"] = cut
    except ImportError:
        print("cut-cross-entropy is not installed")
    return found


def heads(N, D, V, device, dtype):
    """Yields (title, contenders): log-prob and entropy, forward alone and with backward; KL."""
    h = torch.randn(N, D, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) / D ** 0.5).to(dtype).requires_grad_()
    target = torch.randint(V, (N,), device=device)
    advantage = torch.randn(N, device=device)
    mask = torch.ones(N, dtype=torch.bool, device=device)
    product = 2 * N * D * V
    shape = f"N {N} D {D} V {V}"

    def forward(op):
        def step():
            with torch.no_grad():
                op(h, weight, target)
        return step

    def both(op):
        def step():
            logp, entropy = op(h, weight, target)
            loss = (logp * advantage).sum() if logp.ndim else logp
            if entropy is not None:
                loss = loss + entropy.sum()
            torch.autograd.grad(loss, (h, weight))
        return step

    def fused():
        loss, *_ = linear_policy_loss(h, weight, target, None, None, advantage, mask, N, entropy_coef=0.01)
        torch.autograd.grad(loss, (h, weight))

    def told():
        logp, _ = linear_logp(h, weight, target, upstream=(advantage, None))
        torch.autograd.grad((logp * advantage).sum(), (h, weight))

    def kl():
        torch.autograd.grad(linear_kl(h, weight, h.detach(), weight.detach()).sum(), (h, weight))

    elsewhere = others(device)
    contenders = {"linear_logp": Contender(forward(linear_logp), product),
                  "PyTorch, all logits": Contender(forward(naive), product)}
    for name, op in elsewhere.items():
        contenders[name] = Contender(forward(op), product)
    yield f"log-prob and entropy, forward, {shape}", contenders

    contenders = {"linear_logp": Contender(both(linear_logp), 4 * product),
                  "linear_logp, upstream told": Contender(told, 3 * product),
                  "linear_policy_loss": Contender(fused, 3 * product),
                  "PyTorch, all logits": Contender(both(naive), 3 * product)}
    for name, op in elsewhere.items():
        contenders[name] = Contender(both(op), 3 * product)
    yield f"log-prob and entropy, forward and backward, {shape}", contenders

    yield f"exact KL, forward and backward, {shape}", {"linear_kl": Contender(kl, 6 * product)}


# ---------------------------------------------------------------- contenders without a head

def rows(N, V, device):
    """Yields (title, contenders): ops on logits that exist, and those without a vocabulary."""
    logits = torch.randn(N, V, device=device)
    target = torch.randint(V, (N,), device=device)
    g = torch.randn(N, device=device)
    size = 4 * N * V
    generator = torch.Generator(device).manual_seed(0)

    def log_softmax():
        logits.log_softmax(-1).gather(-1, target[:, None])

    def multinomial():
        torch.multinomial(logits.softmax(-1), 1, generator=generator)

    yield f"rows of logits, N {N} V {V}, fp32", {
        "row_logp": Contender(lambda: row_logp(logits, target), size=size),
        # The statistics first: a read, then a read and a write.
        "row_dlogits_": Contender(lambda: row_dlogits_(logits, target, g), size=3 * size),
        "PyTorch, log_softmax and gather": Contender(log_softmax, size=2 * size),
        "sample": Contender(lambda: sample(logits, generator), size=2 * size),
        "sample, top_k 50": Contender(lambda: sample(logits, generator, top_k=50), size=3 * size),
        "sample, top_p 0.9": Contender(lambda: sample(logits, generator, top_p=0.9), size=3 * size),
        "PyTorch, softmax and multinomial": Contender(multinomial, size=3 * size)}

    reward, value, ref_logp, advantage = torch.randn(4, 512, 1024, device=device)
    mask = torch.ones(512, 1024, dtype=torch.bool, device=device)
    scores = torch.rand(512, 8, device=device)

    def loss():
        policy_loss(reward, value, ref_logp, advantage, mask, tokens)

    tokens = mask.numel()
    numbers = 4 * tokens                # bytes of an fp32 number a token; the mask is a byte a token
    yield "advantages and policy loss, 512 x 1024 tokens, 512 groups of 8", {
        "group_advantage": Contender(lambda: group_advantage(scores), size=2 * 4 * 512 * 8),
        "gae": Contender(lambda: gae(reward, value, mask, 0.99, 0.95), size=4 * numbers + tokens),
        "policy_loss": Contender(loss, size=5 * numbers + tokens)}


# ---------------------------------------------------------------- contenders of attention

# model -> (query heads, key heads, width of a head)
HEADS = {"Llama 2 7B": (32, 32, 128), "Qwen2.5 7B": (28, 4, 128), "SmolLM2 135M": (9, 3, 64)}


def attention_inputs(P, G, C, T, heads, device, dtype):
    """Tensors of prefix_attention that need gradients, and lengths; every other prompt has padding."""
    H, Hk, K = heads
    shapes = [(P, G, H, C, K), (P, G, Hk, C, K), (P, G, Hk, C, K), (P, Hk, T, K), (P, Hk, T, K)]
    tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    return tensors, [T - 7 * (p % 2) for p in range(P)]


def attention(device, dtype):
    """Yields (title, contenders): completions on a shared prompt of a picture, forward and backward."""
    P, G, C, T = (4, 8, 256, 636) if device.type == "cuda" else (2, 8, 64, 636)
    for name, heads in HEADS.items():
        tensors, lengths = attention_inputs(P, G, C, T, heads, device, dtype)
        upstream = torch.randn_like(tensors[0])

        def both(op):
            def step():
                torch.autograd.grad(op(*tensors, lengths), tensors, upstream)
            return step

        # Two matmuls forward and five back, of the square of the prompt and the causal half of the rest.
        product = 2 * tensors[0].numel() * (T + C / 2)
        yield f"attention of {P} x {G} completions of {C} to a prompt of {T}, heads of {name}", {
            "prefix_attention": Contender(both(prefix_attention), flops=7 * product),
            "PyTorch, one mask, keys repeated": Contender(both(masked), flops=7 * product)}


def decode_inputs(P, G, T, used, heads, device, dtype):
    """Tensors of decode_attention after `used` steps; every other prompt has padding, every other row sat out half."""
    H, Hk, K = heads
    S = T + used * G
    q = torch.randn(P, H, G, K, device=device).to(dtype)
    keys, values = torch.randn(2, P, Hk, S, K, device=device).to(dtype)
    taken = torch.ones(P, S, dtype=torch.bool, device=device)
    taken[1::2, T - 7:T] = False
    taken[:, T:].view(P, used, G)[:, used // 2:, 1::2] = False
    return q, keys, values, taken, T


def decode(device, dtype):
    """Yields (title, contenders): a layer's attention in a step of a rollout. Least work: one read of the cache."""
    P, G, T, steps = (8, 8, 636, (64, 512)) if device.type == "cuda" else (2, 8, 636, (32, 128))
    for name, heads in HEADS.items():
        for used in steps:
            inputs = decode_inputs(P, G, T, used, heads, device, dtype)
            q, keys, values, taken, _ = inputs
            sees = visible(taken, T, G)                     # once a step, for all layers
            size = (keys.numel() + values.numel()) * keys.element_size()
            yield f"token {used} of {P} x {G} rows behind prompts of {T}, heads of {name}", {
                "decode_attention": Contender(partial(decode_attention, *inputs), size=size),
                "PyTorch, one mask": Contender(partial(decode_masked, q, keys, values, sees), size=size)}


def table(title, contenders, device, ceiling, rounds):
    """Times the contenders in turns and prints the medians as a table."""
    contenders = dict(contenders)
    for name, contender in list(contenders.items()):
        try:
            seconds(contender.step, device)                 # compiled, warmed up
        except Exception as error:                          # another package's failure is a line of the table
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            del contenders[name]
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(seconds(contender.step, device))
    print(f"\n| {title} | ms | | of the ceiling | MiB beyond |\n|---|---|---|---|---|")
    flops_ceiling, copy_ceiling = ceiling
    for name, contender in contenders.items():
        t = statistics.median(times[name])
        if contender.flops:
            rate = f"{contender.flops / t / 1e12:.3g} TFLOP/s"
            share = contender.flops / t / flops_ceiling
        else:
            rate = f"{contender.size / t / 1e9:.3g} GB/s"
            share = contender.size / t / copy_ceiling
        held = peak_bytes(contender.step, device) / 2**20
        print(f"| {name} | {1e3 * t:.3g} | {rate} | {100 * share:.0f} % | {held:.0f} |")


# ---------------------------------------------------------------- against fp64

def loss_of_head(op, h, weight, h_ref, target, old_logp, advantage, checked):
    """A scalar that only the rows `checked` (N,) enter, so that the reference needs no others."""
    if op in (linear_logp, linear_logp_reference):
        logp, entropy = op(h, weight, target)
        return ((logp + 0.5 * entropy) * advantage * checked).sum()
    if op in (linear_kl, linear_kl_reference):
        return (op(h, weight, h_ref, weight.detach() * 0.9) * advantage * checked).sum()
    if op is linear_policy_loss:
        return op(h, weight, target, old_logp, None, advantage, checked, 7)[0]
    logp, _ = linear_logp_reference(h, weight, target)
    return policy_loss_reference(logp, old_logp, None, advantage, checked, 7)


def report(name, found, wanted):
    """Prints the largest error, relative to the largest entry, of the tensors found."""
    errors = []
    for x, y in zip(found, wanted):
        errors.append(((x.double() - y.double()).abs().max() / y.double().abs().max()).item())
    print(f"{name:<20} {max(errors):.1e} off fp64")


def check(N, D, V, device, dtype):
    """Prints the largest error of every op on the first rows, against fp64."""
    n = min(CHECKED, N)
    h = torch.randn(N, D, device=device).to(dtype)
    weight = torch.randn(V, D, device=device).to(dtype) / D ** 0.5
    h_ref = torch.randn(N, D, device=device).to(dtype)
    target = torch.randint(V, (N,), device=device)
    old_logp = linear_logp(h, weight, target)[0] + 0.2 * torch.randn(N, device=device)
    advantage = torch.randn(N, device=device)
    checked = torch.arange(N, device=device) < n

    def results(op, rows, dtype):
        """Loss, dh of the first n rows and dW, of the first `rows` rows in dtype."""
        h_leaf = h[:rows].detach().to(dtype).requires_grad_()
        weight_leaf = weight.detach().to(dtype).requires_grad_()
        loss = loss_of_head(op, h_leaf, weight_leaf, h_ref[:rows].to(dtype), target[:rows], old_logp[:rows],
                            advantage[:rows], checked[:rows])
        dh, dw = torch.autograd.grad(loss, (h_leaf, weight_leaf))
        return loss.detach(), dh[:n], dw

    for op, reference in ((linear_logp, linear_logp_reference), (linear_kl, linear_kl_reference),
                          (linear_policy_loss, policy_loss_reference)):
        report(op.__name__, results(op, N, dtype), results(reference, n, torch.float64))

    tensors, lengths = attention_inputs(2, 3, 70, 90, (6, 2, 64), device, dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    found = prefix_attention(*tensors, lengths)
    wanted = prefix_attention_reference(*wide, lengths)
    upstream = torch.randn_like(found)
    report("prefix_attention", [found, *torch.autograd.grad(found, tensors, upstream)],
           [wanted, *torch.autograd.grad(wanted, wide, upstream.double())])

    inputs = decode_inputs(2, 3, 90, 20, (6, 2, 64), device, dtype)
    wide = [x.double() if x.is_floating_point() else x for x in inputs[:4]]
    report("decode_attention", [decode_attention(*inputs)], [decode_attention_reference(*wide, inputs[4])])

    logits = torch.randn(n, V, device=device)
    report("row_logp", row_logp(logits, target[:n]), row_logp_reference(logits.double(), target[:n]))
    scores = torch.rand(n, 8, device=device)
    report("group_advantage", [group_advantage(scores)], [group_advantage_reference(scores.double())])
    a, b, c = torch.randn(3, n, 200, device=device)
    mask = torch.rand(n, 200, device=device) < 0.8
    report("gae", gae(a, b, mask, 0.99, 0.95), gae_reference(a.double(), b.double(), mask, 0.99, 0.95))
    loss, _ = policy_loss(a, b, None, c, mask, 9)
    wanted = policy_loss_reference(a.double(), b.double(), None, c.double(), mask, 9)
    report("policy_loss", [loss], [wanted])
    for options in (dict(), dict(temperature=0.7, top_k=50), dict(temperature=0.7, top_p=0.9)):
        found = sample(logits, torch.Generator(device).manual_seed(0), **options)
        wanted = sample(logits.double(), torch.Generator(device).manual_seed(0), **options)
        name = " ".join(["sample", *(f"{key}={value}" for key, value in options.items())])
        report(name, found[1:], wanted[1:])


# ---------------------------------------------------------------- command line

def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="", help="of hidden states and head; bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--rows", type=int, default=0, help="N: 16384 on CUDA, 4096 on a CPU")
    parser.add_argument("--width", type=int, default=0, help="D: 4096 on CUDA, 512 on a CPU")
    parser.add_argument("--vocab", type=int, nargs="*", default=[], help="V: 32000 and 152064 on CUDA, 32000 on a CPU")
    parser.add_argument("--rounds", type=int, default=0, help="20 on CUDA, 5 on a CPU")
    parser.add_argument("--check", action="store_true", help="compare each result with fp64, too")
    parser.add_argument("--gpu-hour", action="store_true",
                        help="tests, kernels, decoding and a step in under ten minutes, into RESULTS.md, and no more")
    args = parser.parse_args()
    if args.gpu_hour:
        gpu_hour.main(Path("RESULTS.md"))
        return

    device = torch.device(args.device)
    if device.type == "cuda":
        defaults = dict(dtype="bfloat16", rows=16384, width=4096, vocab=[32000, 152064], rounds=20)
        name = torch.cuda.get_device_name(device)
    else:
        defaults = dict(dtype="float32", rows=4096, width=512, vocab=[32000], rounds=5)
        name = f"CPU, {torch.get_num_threads()} threads"
    for option, default in defaults.items():
        if not getattr(args, option):
            setattr(args, option, default)
    dtype = getattr(torch, args.dtype)

    ceiling = ceilings(device, dtype)
    print(f"{name}, torch {torch.__version__}, {args.dtype}: matmul {ceiling[0] / 1e12:.3g} TFLOP/s, "
          f"copy {ceiling[1] / 1e9:.3g} GB/s")
    # Ops on logits that exist hold all of them at once, in fp32: on a CPU fewer rows.
    rows_of_logits = args.rows if device.type == "cuda" else args.rows // 8
    for title, contenders in attention(device, dtype):
        table(title, contenders, device, ceiling, args.rounds)
    for title, contenders in decode(device, dtype):
        table(title, contenders, device, ceiling, args.rounds)
    for V in args.vocab:
        if args.check:
            check(args.rows, args.width, V, device, dtype)
        for title, contenders in heads(args.rows, args.width, V, device, dtype):
            table(title, contenders, device, ceiling, args.rounds)
        for title, contenders in rows(rows_of_logits, V, device):
            table(title, contenders, device, ceiling, args.rounds)


if __name__ == "__main__":
    main()

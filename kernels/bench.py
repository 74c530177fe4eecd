"""Times every op against this machine's own ceilings and against what else computes the same.

    python -m kernels.bench                     # on CUDA when there is one: N 16384, D 4096, V 32000 and 152064, bf16
    python -m kernels.bench --check             # also compares each result with fp64
    python -m kernels.bench --rows=4096 --width=512 --vocab=32000 --device=cpu

Contenders for one result take turns, so that a machine that slows down slows all of them; medians over --rounds. The
ceiling is a large matmul in the same dtype, or a large copy. Memory: the most that was held beyond what was there
before. Others: PyTorch with all logits, torch.compile of it and, with the `peers` extra and a GPU, liger-kernel,
cut-cross-entropy and TRL (this one on a CPU, too).
"""
import argparse
import os
import statistics
import time

import torch

from kernels import (gae, gae_reference, group_advantage, group_advantage_reference, linear_kl, linear_kl_reference,
                     linear_logp, linear_logp_reference, linear_policy_loss, policy_loss, policy_loss_reference,
                     row_dlogits_, row_logp, row_logp_reference, sample)

CHECKED = 64        # rows whose results are computed again in fp64


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
    held = most = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def ceilings(device, dtype):
    """(FLOP/s of a large matmul in dtype, bytes/s of a large copy, read and write counted), the best of several."""
    n, copied = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied // 4, device=device)
    target = torch.empty_like(source)
    matmul, copy = (min(seconds(step, device) for _ in range(10)) for step in (lambda: a @ b,
                                                                               lambda: target.copy_(source)))
    return 2 * n ** 3 / matmul, 2 * copied / copy


# ---------------------------------------------------------------- contenders: name -> (step, FLOPs, bytes)

def naive(h, weight, target):
    logp = (h @ weight.T).float().log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def others(device):
    """name -> loss(h, weight, target) of every other implementation that is installed and runs here."""
    found = {"torch.compile of it": torch.compile(naive)}
    try:
        from trl.kernels import ChunkedLogProbFunction
        found["TRL, chunked"] = lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, 32768, None, 1.0,
                                                                             ("entropy",))[:2]
    except ImportError:
        print("TRL is not installed")
    if device.type != "cuda":
        return found
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        found["liger-kernel, no entropy"] = lambda h, w, t: (liger_fused_linear_cross_entropy(h, w, t), None)
    except ImportError:
        print("liger-kernel is not installed")
    try:
        from cut_cross_entropy import linear_cross_entropy
        found["cut-cross-entropy, no entropy"] = lambda h, w, t: (linear_cross_entropy(h, w, t, reduction="none"), None)
    except ImportError:
        print("cut-cross-entropy is not installed")
    return found


def heads(N, D, V, device, dtype):
    """Log-prob and entropy from hidden states: two tables, forward alone and with backward."""
    h = torch.randn(N, D, device=device, dtype=dtype)
    weight = (torch.randn(V, D, device=device) / D ** 0.5).to(dtype)
    h.requires_grad_(), weight.requires_grad_()
    target = torch.randint(V, (N,), device=device)
    advantage, old = torch.randn(2, N, device=device)
    mask, product = torch.ones(N, dtype=torch.bool, device=device), 2 * N * D * V

    def forward(op):
        def step():
            with torch.no_grad():
                op(h, weight, target)
        return step

    def both(op):
        def step():
            logp, entropy = op(h, weight, target)
            loss = (logp * advantage).sum() if logp.ndim else logp
            torch.autograd.grad(loss if entropy is None else loss + entropy.sum(), (h, weight))
        return step

    def fused():
        loss, *_ = linear_policy_loss(h, weight, target, None, None, advantage, mask, N, entropy_coef=0.01)
        torch.autograd.grad(loss, (h, weight))

    def kl():
        torch.autograd.grad(linear_kl(h, weight, h.detach(), weight.detach()).sum(), (h, weight))

    rest = others(device)
    yield f"log-prob and entropy, forward, N {N} D {D} V {V}", {
        "linear_logp": (forward(linear_logp), product, 0), "PyTorch, all logits": (forward(naive), product, 0),
        **{name: (forward(op), product, 0) for name, op in rest.items()}}
    yield f"log-prob and entropy, forward and backward, N {N} D {D} V {V}", {
        "linear_logp": (both(linear_logp), 4 * product, 0), "linear_policy_loss": (fused, 3 * product, 0),
        "PyTorch, all logits": (both(naive), 3 * product, 0),
        **{name: (both(op), 3 * product, 0) for name, op in rest.items()}}
    yield f"exact KL, forward and backward, N {N} D {D} V {V}", {"linear_kl": (kl, 6 * product, 0)}


def rows(N, V, device):
    """Ops on logits that exist, and those without a vocabulary."""
    logits, target = torch.randn(N, V, device=device), torch.randint(V, (N,), device=device)
    g, size = torch.randn(N, device=device), 4 * N * V
    generator = torch.Generator(device).manual_seed(0)
    yield f"rows of logits, N {N} V {V}, fp32", {
        "row_logp": (lambda: row_logp(logits, target), 0, size),
        # The statistics first: a read, then a read and a write.
        "row_dlogits_": (lambda: row_dlogits_(logits, target, g), 0, 3 * size),
        "PyTorch, log_softmax and gather": (lambda: logits.log_softmax(-1).gather(-1, target[:, None]), 0, 2 * size),
        "sample": (lambda: sample(logits, generator), 0, 2 * size),
        "PyTorch, softmax and multinomial": (
            lambda: torch.multinomial(logits.softmax(-1), 1, generator=generator), 0, 3 * size)}
    tokens = torch.randn(4, 512, 1024, device=device)
    mask = torch.ones(512, 1024, dtype=torch.bool, device=device)
    scores, n = torch.rand(512, 8, device=device), 4 * 512 * 1024
    yield "advantages and policy loss, 512 x 1024 tokens, 512 groups of 8", {
        "group_advantage": (lambda: group_advantage(scores), 0, 2 * 4 * 512 * 8),
        "gae": (lambda: gae(tokens[0], tokens[1], mask, 0.99, 0.95), 0, 4 * n + n // 4),
        "policy_loss": (lambda: policy_loss(tokens[0], tokens[1], tokens[2], tokens[3], mask, n), 0, 5 * n + n // 4)}


def table(title, contenders, device, ceiling, rounds):
    times = {name: [] for name in contenders}
    for name, (step, _, _) in list(contenders.items()):
        try:
            seconds(step, device)                           # compiled, warmed up
        except Exception as error:                          # another package's failure is a line of the table
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            del contenders[name], times[name]
    for _ in range(rounds):
        for name, (step, _, _) in contenders.items():
            times[name].append(seconds(step, device))
    print(f"\n| {title} | ms | | of the ceiling | MiB beyond |\n|---|---|---|---|---|")
    for name, (step, flops, size) in contenders.items():
        t = statistics.median(times[name])
        rate, most, unit = (flops, ceiling[0], "TFLOP/s") if flops else (size, ceiling[1], "GB/s")
        print(f"| {name} | {1e3 * t:.3g} | {rate / t / (1e12 if flops else 1e9):.3g} {unit} "
              f"| {100 * rate / t / most:.0f} % | {peak_bytes(step, device) / 2**20:.0f} |")


# ---------------------------------------------------------------- against fp64

def check(N, D, V, device, dtype):
    """Prints the largest error of every op, relative to the largest entry, on the first rows, in fp64."""
    n = min(CHECKED, N)
    h, weight, h_ref = (torch.randn(size, D, device=device).to(dtype) for size in (N, V, N))
    weight = weight / D ** 0.5
    target, some = torch.randint(V, (N,), device=device), torch.arange(N, device=device) < n
    old = linear_logp(h, weight, target)[0] + 0.2 * torch.randn(N, device=device)
    a, logits = torch.randn(N, device=device), torch.randn(n, V, device=device)
    scores, tokens = torch.rand(n, 8, device=device), torch.randn(3, n, 200, device=device)
    mask = torch.rand(n, 200, device=device) < 0.8

    def heads_loss(op, h, weight, h_ref, target, old, a, some):
        """A scalar of the first n rows alone, so that the reference needs no others."""
        if op in (linear_logp, linear_logp_reference):
            logp, entropy = op(h, weight, target)
            return ((logp + 0.5 * entropy) * a * some).sum()
        if op in (linear_kl, linear_kl_reference):
            return (op(h, weight, h_ref, weight.detach() * 0.9) * a * some).sum()
        if op is linear_policy_loss:
            return op(h, weight, target, old, None, a, some, 7)[0]
        return policy_loss_reference(linear_logp_reference(h, weight, target)[0], old, None, a, some, 7)

    def report(name, found, wanted):
        error = max(((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
                    for x, y in zip(found, wanted))
        print(f"{name:<20} {error:.1e} off fp64")

    for op, reference in ((linear_logp, linear_logp_reference), (linear_kl, linear_kl_reference),
                          (linear_policy_loss, policy_loss_reference)):
        results = []
        for run, rows, wide in ((op, N, False), (reference, n, True)):
            leaf, head, ref = (t[:k].detach().to(torch.float64 if wide else t.dtype).requires_grad_()
                               for t, k in ((h, rows), (weight, V), (h_ref, rows)))
            loss = heads_loss(run, leaf, head, ref.detach(), *(t[:rows] for t in (target, old, a, some)))
            dh, dw = torch.autograd.grad(loss, (leaf, head))
            results.append((loss.detach(), dh[:n], dw))
        report(op.__name__, *results)
    report("row_logp", row_logp(logits, target[:n]), row_logp_reference(logits.double(), target[:n]))
    report("group_advantage", [group_advantage(scores)], [group_advantage_reference(scores.double())])
    report("gae", gae(tokens[0], tokens[1], mask, 0.99, 0.95),
           gae_reference(*tokens[:2].double(), mask, 0.99, 0.95))
    report("policy_loss", [policy_loss(tokens[0], tokens[1], None, tokens[2], mask, 9)[0]],
           [policy_loss_reference(tokens[0].double(), tokens[1].double(), None, tokens[2].double(), mask, 9)])
    u = [sample(x, torch.Generator(device).manual_seed(0)) for x in (logits, logits.double())]
    report("sample", u[0][1:], u[1][1:])


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
    args = parser.parse_args()
    device = torch.device(args.device)
    on = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on else "float32"))
    N, D = args.rows or (16384 if on else 4096), args.width or (4096 if on else 512)
    vocabs, rounds = args.vocab or ([32000, 152064] if on else [32000]), args.rounds or (20 if on else 5)
    ceiling = ceilings(device, dtype)
    name = torch.cuda.get_device_name(device) if on else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}: matmul {ceiling[0] / 1e12:.3g} "
          f"TFLOP/s, copy {ceiling[1] / 1e9:.3g} GB/s")
    for V in vocabs:
        if args.check:
            check(N, D, V, device, dtype)
        for title, contenders in heads(N, D, V, device, dtype):
            table(title, contenders, device, ceiling, rounds)
        for title, contenders in rows(N if on else N // 8, V, device):
            table(title, contenders, device, ceiling, rounds)


if __name__ == "__main__":
    main()

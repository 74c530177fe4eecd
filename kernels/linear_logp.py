"""Log-probability of chosen tokens and entropy, straight from hidden states, without an (N, V) tensor.

    z = h W^T / temperature                        (N, V), only ever a chunk of rows at a time
    logp_n    = z[n, target_n] - log sum_v exp z[n, v]
    entropy_n = - sum_v p log p,      p = softmax z

(The other form of the entropy, logsumexp - sum p z, loses its digits when |z| is large.) Gradients for upstream g of
logp and e of entropy:

    dz = g (onehot(target) - p) - e p (log p + entropy),      dh = dz W / temperature,      dW = dz^T h / temperature
"""
import torch

CPU_CHUNK_BYTES = 64 * 2**20    # at most this many bytes of logits at a time on a CPU
CUDA_CHUNK_ROWS = 4096          # accumulating an fp32 dW costs about 245 / rows of the total: 6 % here


def linear_logp_reference(h, weight, target, temperature=1.0, ignore_index=-100):
    """The ten lines every other version must equal; holds all logits."""
    logits = (h.float() @ weight.float().T) / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    keep = target != ignore_index
    chosen = logp.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(keep, chosen, 0.0), torch.where(keep, entropy, 0.0)


def _rows_per_chunk(h, weight, chunk):
    if chunk is not None:
        return chunk
    if h.is_cuda:
        return CUDA_CHUNK_ROWS
    return max(1, CPU_CHUNK_BYTES // (4 * weight.shape[0]))


def fp32_logits(h, weight):
    """h (.., D) @ weight (V, D)^T -> (.., V), in fp32 even for bf16 inputs; fp64 stays fp64, for tests.

    Logits rounded to bf16 put a log-prob off by up to 0.09.
    """
    if h.dtype in (torch.float32, torch.float64):
        return h @ weight.T
    if h.is_cuda:
        return torch.mm(h.flatten(0, -2), weight.T, out_dtype=torch.float32).view(*h.shape[:-1], -1)
    return h.float() @ weight.float().T


def _logits(h, weight, temperature):
    return fp32_logits(h, weight).div_(temperature)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, target, temperature, ignore_index, chunk):
        rows = _rows_per_chunk(h, weight, chunk)
        out_dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        logp = torch.zeros(len(h), dtype=out_dtype, device=h.device)
        entropy = torch.zeros_like(logp)
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            keep = target[part] != ignore_index
            every = _logits(h[part], weight, temperature).log_softmax(-1)
            logp[part] = every.gather(-1, target[part].clamp(min=0)[:, None])[:, 0] * keep
            entropy[part] = -every.exp().mul_(every).sum(-1) * keep
        ctx.save_for_backward(h, weight, target, entropy)
        ctx.temperature, ctx.ignore_index, ctx.rows = temperature, ignore_index, rows
        ctx.set_materialize_grads(False)        # a loss without entropy pays nothing for its gradient
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        h, weight, target, entropy = ctx.saved_tensors
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        # Accumulated over chunks, so in fp32 even for a bf16 head; a frozen head computes and holds none.
        dw = torch.zeros(weight.shape, dtype=entropy.dtype, device=h.device) if ctx.needs_input_grad[1] else None
        keep = target != ctx.ignore_index
        g, e = (None if grad is None else (grad * keep / ctx.temperature)[:, None]
                for grad in (grad_logp, grad_entropy))
        for start in range(0, len(h), ctx.rows):
            part = slice(start, start + ctx.rows)
            logp = _logits(h[part], weight, ctx.temperature).log_softmax(-1)
            p = logp.exp()
            dz = torch.zeros_like(p) if e is None else -e[part] * p * (logp + entropy[part, None])
            if g is not None:
                dz.addcmul_(p, g[part], value=-1).scatter_add_(-1, target[part].clamp(min=0)[:, None], g[part])
            dz = dz.to(h.dtype)
            if dh is not None:
                dh[part] = dz @ weight
            if dw is not None:
                dw += dz.T @ h[part]
        return dh, None if dw is None else dw.to(weight.dtype), None, None, None, None


def linear_logp(h, weight, target, temperature=1.0, ignore_index=-100, chunk=None):
    """Log-prob of `target` and entropy under softmax(h weight^T / temperature), a chunk of rows at a time.

    h (N, D); weight (V, D); target (N,) int64, `ignore_index` rows give 0 and 0. Returns (logp, entropy), each (N,)
    fp32 (fp64 for fp64 inputs), differentiable in h and weight. `chunk`: rows at a time (None: by memory).
    Raises ValueError on shapes that do not fit.
    """
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1]:
        raise ValueError(f"h {tuple(h.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    if target.shape != h.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} must be ({len(h)},), one token for each row of h")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive")
    return _LinearLogp.apply(h, weight, target, temperature, ignore_index, chunk)

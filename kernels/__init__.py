"""Fused operations: formula, reference and kernel side by side, one file each. Imports torch (and Triton) only."""
from kernels.linear_logp import fp32_logits, linear_logp, linear_logp_reference

__all__ = ["fp32_logits", "linear_logp", "linear_logp_reference"]

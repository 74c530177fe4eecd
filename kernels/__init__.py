"""Fused operations: formula, reference and kernel side by side, one file each. Imports torch (and Triton) only."""
from kernels.linear_logp import fp32_logits, linear_logp, linear_logp_reference
from kernels.rms_norm import rms_norm, rms_norm_reference

__all__ = ["fp32_logits", "linear_logp", "linear_logp_reference", "rms_norm", "rms_norm_reference"]

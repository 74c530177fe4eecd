"""Fused operations: formula, PyTorch reference, Triton kernel and op, one file each.

Imports torch and Triton only. README.md beside this file lists them.
"""
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.gae import gae, gae_reference
from kernels.group_advantage import group_advantage, group_advantage_reference, is_flat
from kernels.linear_kl import linear_kl, linear_kl_reference
from kernels.linear_logp import fp32_logits, linear_logp, linear_logp_reference
from kernels.linear_policy_loss import linear_policy_loss, linear_policy_loss_reference
from kernels.policy_loss import kl_estimates, policy_loss, policy_loss_reference
from kernels.prefix_attention import prefix_attention, prefix_attention_reference
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.row_logp import row_dlogits_, row_logp, row_logp_reference
from kernels.sample import Sampled, sample, sample_reference

__all__ = [
    "Sampled", "decode_attention", "decode_attention_reference", "fp32_logits", "gae", "gae_reference",
    "group_advantage", "group_advantage_reference", "is_flat", "kl_estimates", "linear_kl",
    "linear_kl_reference", "linear_logp", "linear_logp_reference", "linear_policy_loss",
    "linear_policy_loss_reference", "policy_loss", "policy_loss_reference", "prefix_attention",
    "prefix_attention_reference", "rms_norm", "rms_norm_reference", "row_dlogits_", "row_logp",
    "row_logp_reference", "sample", "sample_reference",
]

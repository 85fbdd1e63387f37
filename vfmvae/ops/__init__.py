"""The only door to fast code: one public function per operation, its reference and its implementations.

Every function takes `fused`: True for the fastest implementation that applies, False for the plain PyTorch
reference, or the name of one implementation (see `vfmvae.ops.dispatch`).
"""

from vfmvae.ops.alignment import vf_alignment_loss
from vfmvae.ops.attention import attention, attention_choices
from vfmvae.ops.batch_norm import local_batch_norm
from vfmvae.ops.conv import depthwise_conv2d, pointwise_conv2d
from vfmvae.ops.conv_norm import depthwise_group_norm
from vfmvae.ops.convnext import modulated_convnext
from vfmvae.ops.dispatch import Fused
from vfmvae.ops.fp8 import fp8_linear, quantise_rows, why_no_fp8
from vfmvae.ops.fusion import NormedLinear, fusion_projection, normed_geglu
from vfmvae.ops.gated import geglu, swiglu, swiglu_halves
from vfmvae.ops.gradients import input_gradients_only
from vfmvae.ops.mlp import modulated_mlp, modulated_to_rgb
from vfmvae.ops.modulation import gated_residual, norm_modulate
from vfmvae.ops.norm import Activation, channel_rms_norm, group_norm
from vfmvae.ops.optimizer import AdamAverage, AdamSettings, AdamTensors, why_no_adam_average
from vfmvae.ops.perceptual import lpips_distance, ssim
from vfmvae.ops.posterior import gaussian_posterior
from vfmvae.ops.qk_norm_rope import QKNorm, qk_norm_rope
from vfmvae.ops.resample import upsample_blur

__all__ = [
    "Activation",
    "AdamAverage",
    "AdamSettings",
    "AdamTensors",
    "Fused",
    "NormedLinear",
    "QKNorm",
    "attention",
    "attention_choices",
    "channel_rms_norm",
    "depthwise_conv2d",
    "depthwise_group_norm",
    "fp8_linear",
    "fusion_projection",
    "gated_residual",
    "gaussian_posterior",
    "geglu",
    "group_norm",
    "input_gradients_only",
    "local_batch_norm",
    "lpips_distance",
    "modulated_convnext",
    "modulated_mlp",
    "modulated_to_rgb",
    "norm_modulate",
    "normed_geglu",
    "pointwise_conv2d",
    "qk_norm_rope",
    "quantise_rows",
    "ssim",
    "swiglu",
    "swiglu_halves",
    "upsample_blur",
    "vf_alignment_loss",
    "why_no_adam_average",
    "why_no_fp8",
]

"""Discriminators: what tells reconstructions from images, for the adversarial losses."""

from __future__ import annotations

from vfmvae.discriminators.augment import AUGMENT_UNIFORMS, augment
from vfmvae.discriminators.patchgan import PatchDiscriminator, PatchOutput
from vfmvae.discriminators.projected import ProjectedDiscriminator, ProjectedDiscriminatorConfig

__all__ = [
    "AUGMENT_UNIFORMS",
    "PatchDiscriminator",
    "PatchOutput",
    "ProjectedDiscriminator",
    "ProjectedDiscriminatorConfig",
    "augment",
]

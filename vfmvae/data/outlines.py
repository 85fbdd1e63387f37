"""Outlines of shapes as distances, exact enough to draw edges one pixel soft.

Points u (to the right) and v (downwards) are [B, R, R], in radii of the shape, which lies within 1 of its
centre. Distances are below 0 inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vfmvae.data.drawn import Array


def distances(names: Sequence[str], u: Array, v: Array) -> Array:
    """Distances of each image's points to the outline of its shape, of `OUTLINES`."""
    chosen = np.array(names)
    distance = np.empty(np.broadcast_shapes(u.shape, v.shape), dtype=np.float32)
    for name in dict.fromkeys(names):
        its = chosen == name
        distance[its] = OUTLINES[name](u[its], v[its])
    return distance


def turned(x: Array, y: Array, turn: Array) -> tuple[Array, Array]:
    """Points in the axes of a shape that is turned by so many radians."""
    cosine, sine = np.cos(turn), np.sin(turn)
    return cosine * x + sine * y, cosine * y - sine * x


def coverage(distance: Array, width: Array | np.float32) -> Array:
    """How much of a pixel of this width lies inside: 1 inside, 0 outside."""
    return np.clip(0.5 - distance / width, 0, 1)


def _disc(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - 0.85


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.7


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(np.sqrt(np.float32(0.75)) * np.abs(u) + 0.5 * v, -v) - 0.5


def _star(u: Array, v: Array) -> Array:
    """Five points: the plane is folded about each, then a star is the inside of one edge."""
    sector = np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
    length = np.sqrt(u * u + v * v)
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal = (normal / np.linalg.norm(normal)).astype(np.float32)
    return normal[0] * (length * np.cos(angle) - np.float32(1)) + normal[1] * length * np.sin(angle)


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.sqrt(u * u + v * v) - 0.66) - 0.24


def _diamond(u: Array, v: Array) -> Array:
    return (np.abs(u) + np.abs(v) - np.float32(0.9)) * np.float32(np.sqrt(0.5))


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.85, v - 0.28), np.maximum(u - 0.28, v - 0.85))


def _heart(u: Array, v: Array) -> Array:
    """A square on its corner, and discs on its upper two sides."""
    half, middle = 0.62, 0.12  # of its diagonal; how far its centre is below ours
    square = (np.abs(u) + np.abs(v - middle) - half) * np.float32(np.sqrt(0.5))
    across, down = np.abs(u) - half / 2, v - (middle - half / 2)
    return np.minimum(square, np.sqrt(across**2 + down**2) - half * np.float32(np.sqrt(0.5)))


OUTLINES = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "diamond": _diamond,
    "cross": _cross,
    "heart": _heart,
}

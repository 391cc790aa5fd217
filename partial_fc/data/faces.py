"""Draws made-up faces: the images of the demonstration's data set.

A face is a set of 3-D curves (head, hair, ears, eyes, brows, nose, mouth, marks) with its own geometry and colours. An
image of it is those curves under an expression, a pose and a perspective projection, before a random background,
behind random occluders, under a coloured light, blurred and noisy.

Everything random is a function of (seed, identity, image). Lengths are in half-heights of a head, angles in radians.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from partial_fc.permutation import hash64, random_unit

# What a stream of random numbers is for: part of its key.
_FOR_FACE, _FOR_IMAGE, _FOR_GRAIN = range(3)
_FACE_STREAMS = 128
_IMAGE_STREAMS = 96
_GRAIN_SIZE = 256
# Drawing coordinates are in 1/16 pixel.
_SHIFT = 4
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 90)
# Distance of the camera.
_CAMERA = 5.0

Colour = tuple[float, float, float]


class _Numbers:
    """Hands out uniform numbers in order, from ``[streams]`` or, for n things at once, from ``[n, streams]``."""

    def __init__(self, uniform: np.ndarray) -> None:
        self._uniform = uniform
        self._next = 0

    def array(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Numbers in ``[low, high)``, as ``shape`` or ``[n, *shape]``."""
        end = self._next + math.prod(shape)
        taken = self._uniform[..., self._next : end]
        self._next = end
        return low + (high - low) * taken.reshape(*taken.shape[:-1], *shape)

    def between(self, low: float, high: float) -> Any:
        """A number in ``[low, high)``, or ``[n]`` of them."""
        self._next += 1
        return low + (high - low) * self._uniform[..., self._next - 1]

    def chance(self, probability: float) -> Any:
        """True with the given probability, or ``[n]`` of it."""
        return self.between(0, 1) < probability


@dataclass(frozen=True)
class Shape:
    """A run of an identity's points: a filled polygon, or a line where ``width`` (in half-heights) is positive."""

    start: int
    end: int
    colour: Colour
    width: float


class Face:
    """The curves of one identity, as points in half-heights of the head: x to the right, y down, z to the camera."""

    def __init__(self, seed: int, identity: int) -> None:
        numbers = random_unit(hash64(seed, _FOR_FACE), _FACE_STREAMS, np.array([identity], dtype=np.int64))
        self._draw = _Numbers(numbers[0])
        self._points: list[np.ndarray] = []
        self._moves: list[np.ndarray] = []
        self._count = 0
        self.shapes: list[Shape] = []
        self._half_width = self._draw.between(0.68, 0.92)
        value, saturation = self._draw.between(90, 245), self._draw.between(25, 150)
        self.skin = _from_hsv(self._draw.between(2, 28), saturation, value)
        self.hair = _from_hsv(self._draw.between(0, 180), self._draw.between(20, 200), self._draw.between(15, 230))
        self._add_head()
        self._add_eyes()
        self._add_nose_and_mouth()
        self._add_marks()
        self.points = np.concatenate(self._points)
        # [expression, point, axis]: mouth opening, smile, eyes closing, brows rising.
        self.moves = np.concatenate(self._moves, axis=1)

    def _add(
        self,
        xy: np.ndarray,
        colour: Colour,
        *,
        width: float = 0.0,
        depth: float | None = None,
        lift: float = 0.0,
        moves: dict[int, np.ndarray] | None = None,
    ) -> None:
        """Add a shape from points ``[n, 2]``, ``lift`` before the head's surface or else at a constant ``depth``."""
        radius = (xy[:, 0] / self._half_width) ** 2 + xy[:, 1] ** 2
        z = 0.75 * np.sqrt(np.clip(1 - radius, 0, 1)) + lift if depth is None else np.full(len(xy), depth)
        self._points.append(np.column_stack([xy, z]))
        block = np.zeros((4, len(xy), 3))
        for expression, move in (moves or {}).items():
            block[expression, :, 1] = move
        self._moves.append(block)
        self.shapes.append(Shape(self._count, self._count + len(xy), colour, width))
        self._count += len(xy)

    def _add_head(self) -> None:
        draw = self._draw
        angle = np.linspace(0, 2 * np.pi, 33)[:-1]
        across, down = np.cos(angle), np.sin(angle)
        jaw, cheek, crown = draw.between(-0.22, 0.22), draw.between(-0.06, 0.06), draw.between(-0.06, 0.1)
        radius = 1 + cheek * np.cos(4 * angle) + crown * np.clip(-down, 0, 1)
        head = np.column_stack([across * self._half_width * radius * (1 - jaw * down), down * radius])
        volume, length = draw.between(0.02, 0.3), draw.between(-0.5, 0.9)
        back = head * (1 + volume)
        back[:, 1] = np.minimum(back[:, 1], length)
        self._add(back, self.hair, depth=-0.15)
        ear = draw.between(0.08, 0.2)
        for side in (-1, 1):
            self._add(_oval(side * self._half_width, 0.02, ear * 0.7, ear), _shade(self.skin, 0.85), depth=0.0)
        self._add(head, self.skin, depth=0.0)
        fringe, wave, parting = draw.between(-0.95, -0.45), draw.between(-0.15, 0.15), draw.between(-0.6, 0.6)
        upper = head[down < 0.05]
        upper = upper[np.argsort(upper[:, 0])] * 1.03
        t = np.linspace(1, -1, 9)
        line = fringe + wave * np.cos(4 * t) + 0.5 * np.maximum(0, np.abs(t - parting * (1 - np.abs(t))) - 0.3) ** 2
        fringe_points = np.column_stack([t * self._half_width * 0.97, line])
        self._add(np.concatenate([upper[upper[:, 1] < fringe + 0.35], fringe_points]), self.hair, depth=0.3)
        for x in draw.array(-0.8, 0.8, 3):
            strand = np.column_stack([x * self._half_width * np.array([0.7, 1, 1.1]), [-1.02, -0.9, fringe - 0.05]])
            self._add(strand, _shade(self.hair, 0.7), width=0.03, depth=0.32)

    def _add_eyes(self) -> None:
        draw = self._draw
        x, y = draw.between(0.3, 0.44) * self._half_width / 0.8, draw.between(-0.22, 0.06)
        size, aspect, tilt = draw.between(0.11, 0.2), draw.between(0.4, 0.85), draw.between(-0.35, 0.35)
        iris, iris_colour = draw.between(0.5, 0.85), _from_hsv(draw.between(0, 140), 170, draw.between(40, 220))
        rise, slope, bend = draw.between(0.16, 0.32), draw.between(-0.1, 0.12), draw.between(-0.02, 0.1)
        brow_width = draw.between(0.03, 0.1)
        lid = draw.chance(0.5)
        for side in (-1, 1):
            eye = _oval(0, 0, size, size * aspect)
            eye[:, 1] += side * tilt * eye[:, 0]
            shut = {2: -0.75 * eye[:, 1]}
            self._add(eye + (side * x, y), (240, 240, 240), lift=0.02, moves=shut)
            ring = _oval(0, 0, size * aspect * iris, size * aspect * iris)
            self._add(ring + (side * x, y), iris_colour, lift=0.03, moves={2: -0.75 * ring[:, 1]})
            self._add(ring * 0.45 + (side * x, y), (10, 10, 10), lift=0.04, moves={2: -0.35 * ring[:, 1]})
            if lid:
                half = eye[len(eye) // 2 :]
                self._add(half + (side * x, y), _shade(self.skin, 0.4), width=0.035, lift=0.03,
                          moves={2: -0.75 * half[:, 1]})  # fmt: skip
            t = np.linspace(-1, 1, 5)
            brow = np.column_stack([side * (x + t * size * 1.25), y - rise - slope * t - bend * (1 - t * t)])
            self._add(brow, _shade(self.hair, 0.55), width=brow_width, lift=0.03, moves={3: np.full(5, -0.1)})

    def _add_nose_and_mouth(self) -> None:
        draw = self._draw
        tip, width, out = draw.between(0.2, 0.4), draw.between(0.08, 0.22), draw.between(0.1, 0.35)
        nose = np.array([[-0.05, tip - 0.3], [-width, tip], [0, tip + 0.07], [width, tip], [0.05, tip - 0.3]])
        self._add(nose, _shade(self.skin, draw.between(0.65, 1.2)), lift=out)
        self._add(nose[1:4], _shade(self.skin, 0.45), width=0.03, lift=out)
        y, half = draw.between(tip + 0.2, 0.7), draw.between(0.16, 0.4)
        upper, lower, curve = draw.between(0.02, 0.1), draw.between(0.03, 0.13), draw.between(-0.08, 0.12)
        t = np.linspace(-1, 1, 9)
        arch, middle = 1 - t * t, y - curve * t * t
        lips = _from_hsv(draw.between(165, 195) % 180, draw.between(80, 200), draw.between(80, 220))
        smile = -0.16 * t * t
        outline = np.concatenate([middle - upper * arch, (middle + lower * arch)[::-1]])
        x = np.concatenate([t, t[::-1]]) * half
        opening = np.concatenate([-0.03 * arch, 0.16 * arch])
        moves = {0: opening, 1: np.concatenate([smile, smile[::-1]])}
        self._add(np.column_stack([x, outline]), lips, lift=0.03, moves=moves)
        inner = np.concatenate([middle - 0.01, (middle + 0.01)[::-1]])
        self._add(np.column_stack([x * 0.9, inner]), (30, 20, 60), lift=0.04, moves=moves)

    def _add_marks(self) -> None:
        draw = self._draw
        for _ in range(4):
            kind, size, turn = draw.between(0, 3.2), draw.between(0.07, 0.17), draw.between(0, np.pi)
            at = (draw.between(-0.7, 0.7) * self._half_width, draw.between(-0.6, 0.75))
            colour = _from_hsv(draw.between(0, 180), draw.between(60, 240), draw.between(40, 230))
            turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            if kind < 1:
                self._add(_oval(0, 0, size, size * 0.6) @ turned + at, colour, lift=0.01)
            elif kind < 2:
                self._add(np.array([[-size, 0], [0, size / 3], [size, 0]]) * 2 @ turned + at, colour, width=0.05)
            elif kind < 3:
                for shift in (-1, 0, 1):
                    bar = np.array([[-size, shift * 0.09], [size, shift * 0.09]]) @ turned + at
                    self._add(bar, colour, width=0.035)
        beard = draw.between(0, 1)
        if beard < 0.25:
            t = np.linspace(-1, 1, 9)
            chin = np.column_stack([t * self._half_width * 0.6, 0.78 + 0.2 * (1 - t * t)])
            top = np.column_stack([t[::-1] * self._half_width * 0.5, np.full(9, 0.8)])
            self._add(np.concatenate([chin, top]), _shade(self.hair, 0.8), lift=0.01)


def _oval(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    """Points ``[14, 2]`` of an ellipse, the lower half first."""
    angle = np.linspace(0, 2 * np.pi, 15)[:-1]
    return np.column_stack([x + half_width * np.cos(angle), y + half_height * np.sin(angle)])


def _shade(colour: Colour, factor: float) -> Colour:
    """The colour, darker or brighter."""
    blue, green, red = (min(255.0, float(part * factor)) for part in colour)
    return float(blue), float(green), float(red)


def _from_hsv(hue: float, saturation: float, value: float) -> Colour:
    """BGR from OpenCV's HSV: hue in ``[0, 180)``, the others in ``[0, 255]``."""
    red, green, blue = colorsys.hsv_to_rgb(hue / 180, saturation / 255, value)
    return float(blue), float(green), float(red)


def _rotation(yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Rotation matrices ``[n, 3, 3]``: a turn of the head, then a nod, then a tilt."""
    (a, b, c), (d, e, f) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    one, zero = np.ones_like(a), np.zeros_like(a)
    turn = np.array([[a, zero, d], [zero, one, zero], [-d, zero, a]]).transpose(2, 0, 1)
    nod = np.array([[one, zero, zero], [zero, b, -e], [zero, e, b]]).transpose(2, 0, 1)
    tilt = np.array([[c, -f, zero], [f, c, zero], [zero, zero, one]]).transpose(2, 0, 1)
    return np.einsum("nij,njk,nkl->nil", tilt, nod, turn)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    """Drawing coordinates as OpenCV takes them, int32."""
    return np.rint(points * (1 << _SHIFT)).astype(np.int32)


class _Album:
    """Some images of one face. All that is random about them is computed at once, for n images."""

    def __init__(self, face: Face, uniform: np.ndarray, image_size: int) -> None:
        self._face = face
        self._side = image_size
        draw = _Numbers(uniform)
        self._plan_pose(draw)
        self._plan_surroundings(draw)
        self._plan_light(draw)

    def _plan_pose(self, draw: _Numbers) -> None:
        face = self._face
        # A mouth opens in 40 percent of the images, eyes close in 25; the other expressions are there always.
        present = np.stack([draw.chance(0.4), draw.chance(1), draw.chance(0.25), draw.chance(1)], axis=1)
        points = face.points + np.einsum("ne,epc->npc", draw.array(0, 1, 4) * present, face.moves)
        rotation = _rotation(draw.between(-0.35, 0.35), draw.between(-0.2, 0.2), draw.between(-0.2, 0.2))
        points = np.einsum("npc,nrc->npr", points, rotation)
        self._scale = draw.between(0.36, 0.43) * self._side
        stretch = draw.between(0.93, 1.07)
        size = np.stack([self._scale * stretch, self._scale / stretch], axis=1)
        flat = points[..., :2] * (_CAMERA / (_CAMERA - points[..., 2:])) * size[:, None]
        self._points = _fixed_point(flat + self._side * draw.array(0.46, 0.54, 1, 2))

    def _plan_surroundings(self, draw: _Numbers) -> None:
        self._background = draw.array(0, 255, 2, 2, 3).astype(np.uint8)
        self._triangles = _fixed_point(draw.array(-0.2, 1.2, 3, 3, 2) * self._side)
        self._triangle_colours = draw.array(0, 255, 3, 3).tolist()
        # Two occluders at most: bars across the image, or smaller plates.
        self._occluded = np.stack([draw.chance(0.2), draw.chance(0.1)], axis=1)
        is_bar = draw.array(0, 1, 2) < 0.5
        turn = draw.array(0, np.pi, 2)
        length = np.where(is_bar, 1.0, draw.array(0.06, 0.14, 2)) * self._side
        width = np.where(is_bar, 0.4, 1.0) * draw.array(0.04, 0.12, 2) * self._side
        along = np.stack([np.cos(turn), np.sin(turn)], axis=-1) * length[..., None]
        across = np.stack([-np.sin(turn), np.cos(turn)], axis=-1) * width[..., None]
        corners = np.stack([-along - across, along - across, along + across, -along + across], axis=2)
        self._occluders = _fixed_point(corners + draw.array(0.1, 0.9, 2, 1, 2) * self._side)
        self._occluder_colours = draw.array(0, 255, 2, 3).tolist()

    def _plan_light(self, draw: _Numbers) -> None:
        gamma = 2 ** draw.between(-0.5, 0.5)
        self._tables = (np.linspace(0, 1, 256) ** gamma[:, None] * 255).astype(np.uint8)
        self._softness = draw.between(0, 1)
        self._low_resolution = draw.chance(0.5)
        self._grey = draw.chance(0.02)
        light = draw.array(0.6, 1.3, 2, 2, 1) * draw.array(0.88, 1.12, 1, 1, 3)
        self._light = light.astype(np.float32)
        self._noise = draw.between(0, 1) * draw.between(2, 18)
        self._offset = draw.between(-10, 20)
        self._grain_corner = draw.array(0, 1, 2)

    def image(self, number: int, grain: np.ndarray) -> np.ndarray:
        """One image, uint8 ``[image_size, image_size, 3]``, BGR; its noise is a piece of ``grain``."""
        side = self._side
        canvas = cv2.resize(self._background[number], (side, side), interpolation=cv2.INTER_LINEAR)
        for corners, colour in zip(self._triangles[number], self._triangle_colours[number], strict=True):
            cv2.fillPoly(canvas, [corners], colour, cv2.LINE_AA, _SHIFT)
        points, scale = self._points[number], self._scale[number]
        for shape in self._face.shapes:
            corners = points[shape.start : shape.end]
            if shape.width:
                width = max(1, round(shape.width * scale))
                cv2.polylines(canvas, [corners], False, shape.colour, width, cv2.LINE_AA, _SHIFT)
            else:
                cv2.fillPoly(canvas, [corners], shape.colour, cv2.LINE_AA, _SHIFT)
        for occluder in np.flatnonzero(self._occluded[number]):
            corners, colour = self._occluders[number, occluder], self._occluder_colours[number][occluder]
            cv2.fillPoly(canvas, [corners], colour, cv2.LINE_AA, _SHIFT)
        return self._develop(canvas, number, grain)

    def _develop(self, canvas: np.ndarray, number: int, grain: np.ndarray) -> np.ndarray:
        """Gamma, a blur or a low resolution, light, noise."""
        side, softness = self._side, float(self._softness[number])
        canvas = cv2.LUT(canvas, self._tables[number])
        if softness > 0.4 and self._low_resolution[number]:
            small = max(8, int(side * (1.3 - softness * 0.7)))
            canvas = cv2.resize(canvas, (small, small), interpolation=cv2.INTER_AREA)
            canvas = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_LINEAR)
        elif softness > 0.4:
            canvas = cv2.GaussianBlur(canvas, (0, 0), (softness - 0.3) * side / 80)
        if self._grey[number]:
            canvas = cv2.cvtColor(cv2.cvtColor(canvas, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
        light = cv2.resize(self._light[number], (side, side), interpolation=cv2.INTER_LINEAR)
        top, left = (self._grain_corner[number] * (len(grain) - side)).astype(int).tolist()
        noise = np.ascontiguousarray(grain[top : top + side, left : left + side])
        lit = cv2.multiply(canvas, light, dtype=cv2.CV_32F)
        strength, offset = float(self._noise[number]), float(self._offset[number])
        return cv2.addWeighted(lit, 1, noise, strength, offset, dtype=cv2.CV_8U)


class Painter:
    """Draws the images of any identity, as JPEG.

    Args:
        image_size: pixels of a side.
        seed: chooses the identities and their images.
    """

    def __init__(self, image_size: int, seed: int) -> None:
        self.image_size = image_size
        self.seed = seed
        side = max(_GRAIN_SIZE, 2 * image_size)
        uniform = random_unit(hash64(seed, _FOR_GRAIN), 12, np.arange(side * side, dtype=np.int64))
        # A sum of four uniforms is near enough to a normal one, of variance 1/3.
        self._grain = (uniform.reshape(side, side, 3, 4).sum(axis=3) - 2).astype(np.float32)

    def images(self, identity: int, count: int) -> list[bytes]:
        """The first ``count`` images of an identity."""
        key = hash64(self.seed, _FOR_IMAGE, identity)
        uniform = random_unit(key, _IMAGE_STREAMS, np.arange(count, dtype=np.int64))
        album = _Album(Face(self.seed, identity), uniform, self.image_size)
        encoded = []
        for number in range(count):
            done, jpeg = cv2.imencode(".jpg", album.image(number, self._grain), _JPEG)
            assert done
            encoded.append(jpeg.tobytes())
        return encoded

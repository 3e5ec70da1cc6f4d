"""Scenes: a generated benchmark of objects on backgrounds, with captions; needs no download.

`scenes:train|dev|test` are in distribution, `near-ood` shows unseen shapes in the same rendering, `far-ood` no object
at all, `style-shift` the same classes drawn otherwise, `spurious-test` four classes on the background that they have in
training (group `aligned`) and on that of another one of them (`conflict`). Each image depends on (seed, split, index)
alone. Some are ambiguous on purpose (occluded, see-through, small, between two shapes): confidence means something.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qclip.data import drawing
from qclip.data.drawing import Dice, Float, column
from qclip.data.imageset import ImageSet, UnreadableImage, digest_of, digest_of_rows
from qclip.errors import DataError, nearest

CLASSES = list(drawing.SHAPES)
UNSEEN = list(drawing.UNSEEN_SHAPES)
TEXTURES = list(drawing.TEXTURES)
BACKGROUNDS = list(drawing.BACKGROUNDS)
COLOURS = {
    "red": (1.0, 0.25, 0.22),
    "orange": (1.0, 0.58, 0.15),
    "yellow": (1.0, 0.92, 0.25),
    "green": (0.30, 0.90, 0.35),
    "blue": (0.35, 0.50, 1.0),
    "purple": (0.75, 0.42, 1.0),
    "pink": (1.0, 0.60, 0.80),
    "white": (1.0, 1.0, 1.0),
    "cyan": (0.30, 0.92, 0.95),
}
SIZES = {
    "train": 50_000,
    "dev": 2_000,
    "test": 2_000,
    "near-ood": 1_000,
    "far-ood": 1_000,
    "style-shift": 1_000,
    "spurious-test": 1_000,
}
STYLES = ["line art", "silhouette", "inverted", "posterized"]
FAR_FAMILIES = ["texture", "glyph", "noise", "gradient"]
USUAL_BACKGROUND = {"star": "sky", "heart": "grass", "ring": "water", "cross": "brick"}  # the spurious correlation
USUAL_SHARE = 0.8  # of the images of such a class, in every in-distribution split
SIDE = 32
LARGEST_SIDE = 1024
MOST_SAMPLES = 1_000_000  # their plan is held in memory
DUSK = 0.55  # brightness of backgrounds: objects are the brighter part, as under a lamp, so that small models can learn
PROMPTS = ["a {}", "a picture of a {}", *(f"a {{}} on {b}" for b in BACKGROUNDS)]
_WORDS = list(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_BLOCK_PIXELS = 2**19  # drawn at once: about 60 MB of arrays


class _Plan:
    """What is in each image: all choices that captions and labels speak of. Arrays `[B]`."""

    def __init__(self, seed: int, split: str, indices: NDArray[np.int64]) -> None:
        self.split, self.indices = split, indices
        self.dice = dice = Dice(drawing.image_keys(seed, split, indices))
        usual = np.array([BACKGROUNDS.index(USUAL_BACKGROUND[c]) if c in USUAL_BACKGROUND else -1 for c in CLASSES])
        self.shape = dice.pick("shape", len(UNSEEN if split == "near-ood" else CLASSES))
        if split == "spurious-test":
            special = np.flatnonzero(usual >= 0)
            which = dice.pick("shape", len(special))
            self.shape = special[which]
            self.conflict = indices % 2 == 1
            other = (which + 1 + dice.pick("other", len(special) - 1)) % len(special)
            self.background = usual[special[np.where(self.conflict, other, which)]]
        else:
            self.background = dice.pick("background", len(BACKGROUNDS))
            if split != "near-ood":
                held = (usual[self.shape] >= 0) & dice.chance("usual", USUAL_SHARE)
                self.background = np.where(held, usual[self.shape], self.background)
        self.colour = dice.pick("colour", len(COLOURS))
        self.texture = np.maximum(dice.pick("texture", len(TEXTURES) + 2) - 2, 0)  # half of them plain
        self.radius = dice.between("radius", 0.56, 0.90)
        self.style = dice.pick("style", len(STYLES))
        self.family = dice.pick("family", len(FAR_FAMILIES))

    def captions(self) -> list[list[str]]:
        """Four captions per image, from the fullest to the shortest."""
        verb = self.dice.pick("verb", 3)
        out = []
        for i in range(len(self.indices)):
            size = "small " if self.radius[i] < 0.66 else "large " if self.radius[i] > 0.80 else ""
            texture = TEXTURES[self.texture[i]] + " " if self.texture[i] else ""
            colour, shape = _WORDS[self.colour[i]], CLASSES[self.shape[i]]
            place = ("on", "over", "in front of")[verb[i]] + " " + BACKGROUNDS[self.background[i]]
            thing = f"{texture}{colour} {shape}"
            phrases = f"{size}{thing} {place}", thing, f"{shape} {place}", shape
            out.append([("an " if p[0] in "aeiou" else "a ") + p for p in phrases])
        return out


def _object_frame(dice: Dice, radius: Float, side: int) -> tuple[Float, Float]:
    """Pixel coordinates in the object's own frame: moved, turned, stretched and scaled."""
    x, y = drawing.grid(side)
    x, y = x - column(dice.between("x", -0.16, 0.16)), y - column(dice.between("y", -0.16, 0.16))
    turn, stretch = dice.between("turn", -0.25, 0.25), np.exp(dice.between("stretch", -0.12, 0.12))
    cos, sin = column(np.cos(turn)), column(np.sin(turn))
    u, v = (cos * x + sin * y) / column(radius * stretch), (cos * y - sin * x) / column(radius / stretch)
    return u.astype(np.float32), v.astype(np.float32)


def _render_objects(plan: _Plan, side: int) -> Float:
    """float32 `[B, side, side, 3]` in about 0..1."""
    dice, table = plan.dice, drawing.UNSEEN_SHAPES if plan.split == "near-ood" else drawing.SHAPES
    u, v = _object_frame(dice, plan.radius, side)
    distance = drawing.shape_distance(plan.shape, table, u, v)
    between = dice.chance("between", 0.2)  # a blend with another shape, up to just short of half
    if between.any():
        other = (plan.shape + 1 + dice.pick("blend shape", len(table) - 1)) % len(table)
        share = column(dice.between("blend", 0.1, 0.45))[between]
        blend = drawing.shape_distance(other[between], table, u[between], v[between])
        distance[between] = (1 - share) * distance[between] + share * blend
    distance = distance * column(plan.radius)
    pixel = 2 / side
    cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
    if plan.split == "style-shift":
        drawn = _in_style(plan, distance, cover, side, u, v)
    else:
        drawn = _compose(plan, cover, side, u, v)
    return drawn.astype(np.float32)


def _compose(plan: _Plan, cover: Float, side: int, u: Float, v: Float) -> Float:
    """Object over its background, then what hides it, then light and grain."""
    dice, (x, y) = plan.dice, drawing.grid(side)
    canvas = drawing.background(plan.background, dice, side) * np.float32(DUSK)
    first = np.clip(_PALETTE[plan.colour] + dice.between("shade", -0.08, 0.08, 3), 0, 1)[:, None, None]
    second = first * np.float32(0.55)
    share = drawing.texture_share(plan.texture, u, v)[..., None]
    paint = first + (second - first) * share
    see_through = np.where(dice.chance("faint", 0.2), dice.between("see through", 0.3, 0.8), 0.0)
    canvas = canvas + (paint - canvas) * cover * (1 - column(see_through)[..., None])
    angle, offset = dice.between("bar angle", 0, np.pi), dice.between("bar offset", -0.35, 0.35)
    along = np.abs(column(np.cos(angle)) * x + column(np.sin(angle)) * y - column(offset))
    bar = np.clip(0.5 + (column(dice.between("bar width", 0.06, 0.22)) - along) * side / 2, 0, 1)
    bar = (bar * column(dice.chance("bar", 0.25)))[..., None]
    canvas = canvas + (_PALETTE[dice.pick("bar colour", len(_PALETTE))][:, None, None] - canvas) * bar
    slope = column(dice.between("light x", -0.25, 0.25)) * x + column(dice.between("light y", -0.25, 0.25)) * y
    light = (column(dice.between("light", 0.7, 1.1)) * (1 + slope))[..., None]
    grain = (drawing.value_noise(dice, "film", side, 31) - 0.5) * column(dice.between("rough", 0, 0.25))
    return canvas * light + grain[..., None]


def _in_style(plan: _Plan, distance: Float, cover: Float, side: int, u: Float, v: Float) -> Float:
    dice = plan.dice
    out = _compose(plan, cover, side, u, v)
    paper = (dice.between("paper", 0.0, 0.3, 3))[:, None, None]
    ink = (dice.between("ink", 0.75, 1.0, 3))[:, None, None]
    line = np.clip(1.1 - np.abs(distance)[..., None] / 0.075, 0, 1)
    for number, style in enumerate(STYLES):
        chosen = plan.style == number
        if style == "line art":
            out[chosen] = (paper + (ink - paper) * line)[chosen]
        elif style == "silhouette":
            out[chosen] = (paper + (ink - paper) * cover)[chosen]
        elif style == "inverted":
            out[chosen] = 1 - np.clip(out[chosen], 0, 1)
        else:
            out[chosen] = np.round(np.clip(out[chosen], 0, 1) * 2) / 2
    return out


def _two_tones(dice: Dice, level: Float) -> Float:
    low, high = (dice.uniform(name, 3)[:, None, None] for name in ("low tone", "high tone"))
    return low + (high - low) * np.clip(level, 0, 1)[..., None]


def _far_texture(dice: Dice, side: int) -> Float:
    """Plaid, waves around a centre, or blots."""
    x, y = drawing.grid(side)
    f, g = column(dice.between("frequency", 4, 16)), column(dice.between("frequency 2", 4, 16))
    kind = dice.pick("pattern", 3)[:, None, None]
    plaid = 0.5 + 0.25 * np.sin(f * x) + 0.25 * np.sin(g * y)
    centre = np.hypot(x - column(dice.between("cx", -1, 1)), y - column(dice.between("cy", -1, 1)))
    blots = (drawing.value_noise(dice, "blots", side, 9) - 0.5) * 6 + 0.5
    return _two_tones(dice, np.choose(kind, [plaid, 0.5 + 0.5 * np.sin(2 * f * centre), blots]))


def _far_glyph(dice: Dice, side: int) -> Float:
    """Two signs of up to seven strokes each, like a numeric display, dark on light or light on dark."""
    x, y = drawing.grid(side)
    nearest_stroke = np.full((len(dice), side, side), 9, np.float32)
    strokes = [(0, 0.6, 1), (0, 0, 1), (0, -0.6, 1), (-0.3, 0.3, 0), (0.3, 0.3, 0), (-0.3, -0.3, 0), (0.3, -0.3, 0)]
    for centre in (-0.45, 0.45):
        on = dice.uniform(f"strokes {centre}", len(strokes)) < 0.6
        for number, (sx, sy, flat) in enumerate(strokes):
            dx, dy = np.abs(x - centre - sx), np.abs(y - sy)
            stroke = np.hypot(np.maximum(dx - 0.3 * flat, 0), np.maximum(dy - 0.3 * (1 - flat), 0))
            nearest_stroke = np.minimum(nearest_stroke, np.where(on[:, number, None, None], stroke, 9))
    return _two_tones(dice, 0.5 + (column(dice.between("weight", 0.06, 0.12)) - nearest_stroke) * side / 2)


def _far_noise(dice: Dice, side: int) -> Float:
    noise = dice.uniform("pixels", side, side, 3)
    grey = np.where(dice.chance("grey", 0.5)[:, None, None, None], noise[..., :1], noise)
    return np.where(dice.chance("speckle", 0.3)[:, None, None, None], (grey > 0.5).astype(np.float32), grey)


def _far_gradient(dice: Dice, side: int) -> Float:
    x, y = drawing.grid(side)
    angle = dice.between("angle", 0, 2 * np.pi)
    straight = 0.5 + 0.5 * (column(np.cos(angle)) * x + column(np.sin(angle)) * y)
    return _two_tones(dice, np.where(column(dice.uniform("round")) < 0.4, 1.1 - np.hypot(x, y), straight))


def _render_far(plan: _Plan, side: int) -> Float:
    out = np.empty((len(plan.indices), side, side, 3), np.float32)
    for number, render in enumerate((_far_texture, _far_glyph, _far_noise, _far_gradient)):
        chosen = plan.family == number
        if chosen.any():
            out[chosen] = render(plan.dice.subset(chosen), side)
    return out


def draw(split: str, indices: Sequence[int] | NDArray, side: int = SIDE, seed: int = 0) -> NDArray[np.uint8]:
    """Images uint8 `[B, side, side, 3]` of a split. Raises DataError for an unknown split or an impossible side."""
    _check(split, side)
    index = np.asarray(indices, np.int64)
    if len(index) and index.min() < 0:
        raise DataError(f"scenes:{split}: image {index.min()} does not exist; indices start at 0.")
    out = np.empty((len(index), side, side, 3), np.uint8)
    step = max(1, _BLOCK_PIXELS // side**2)
    for start in range(0, len(index), step):
        plan = _Plan(seed, split, index[start : start + step])
        picture = _render_far(plan, side) if split == "far-ood" else _render_objects(plan, side)
        out[start : start + step] = np.rint(np.clip(picture, 0, 1) * 255)
    return out


class _Scenes:
    def __init__(self, split: str, count: int, side: int, seed: int) -> None:
        self.split, self.count, self.side, self.seed = split, count, side, seed

    @functools.cached_property
    def whole(self) -> str:
        some = np.arange(self.count)[:: max(1, self.count // 32)][:32]
        probe = draw(self.split, some, self.side, self.seed)  # ties the digest to what is really drawn
        return digest_of("scenes", self.split, self.count, self.seed, self.side, probe.tobytes().hex())

    def digest(self, rows: Sequence[int]) -> str:
        return digest_of_rows(self.whole, self.count, rows)

    def read(self, rows: Sequence[int]) -> list[Image.Image | UnreadableImage]:
        return [Image.fromarray(pixels) for pixels in draw(self.split, rows, self.side, self.seed)]


def load_scenes(split: str, samples: int | None = None, seed: int = 0, side: int = SIDE) -> ImageSet:
    """`samples` images of a split (default `SIZES[split]`; more are drawn on demand); `seed` draws other images.

    Raises DataError for an unknown split, an impossible side, no samples or too many.
    """
    _check(split, side)
    n = SIZES[split] if samples is None else samples
    if n <= 0:
        raise DataError(f"scenes:{split}: {n} images were asked for; ask for at least one.")
    if n > MOST_SAMPLES:
        raise DataError(f"scenes:{split}: {n} images were asked for; ask for at most {MOST_SAMPLES}.")
    rows = np.arange(n, dtype=np.int64)
    plan = _Plan(seed, split, rows)
    labelled = split not in ("near-ood", "far-ood")
    groups: dict[str, NDArray] = {"background": np.array(BACKGROUNDS)[plan.background]}
    if split == "near-ood":
        groups["shape"] = np.array(UNSEEN)[plan.shape]
    elif split == "far-ood":
        groups = {"family": np.array(FAR_FAMILIES)[plan.family]}
    elif split == "style-shift":
        groups["style"] = np.array(STYLES)[plan.style]
    elif split == "spurious-test":
        groups["group"] = np.where(plan.conflict, "conflict", "aligned")
    return ImageSet(
        name=f"scenes-{split}",
        spec=f"scenes:{split}?samples={n}&seed={seed}&side={side}",
        classes=CLASSES if labelled else None,
        labels=plan.shape.astype(np.int64) if labelled else None,
        captions=plan.captions() if labelled else None,
        groups=groups,
        prompts=PROMPTS if labelled else None,
        source=_Scenes(split, n, side, seed),
        rows=rows,
    )


def _check(split: str, side: int) -> None:
    if split not in SIZES:
        raise DataError(f"scenes has no split {split!r}; {nearest(split, SIZES)}")
    if not 8 <= side <= LARGEST_SIDE:
        raise DataError(f"scenes cannot be drawn {side} pixels wide; take a side between 8 and {LARGEST_SIDE}.")

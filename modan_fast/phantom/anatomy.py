"""The nine anatomies (and a breast) as maps of tissues: ellipses, bands and lines of random pose, size and shape.

Coordinates run from -1 to 1 over the image, x to the right and y down, before the pose is applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from modan_fast.phantom.physics import Bytes, Tissue, smooth_field

AIR, FAT, MUSCLE, CORTEX, MARROW, ORGAN, LIVER, SPLEEN, KIDNEY, FLUID, BLOOD, GREY, WHITE = list(Tissue)[:13]
CARTILAGE, TENDON, DISC, LUNG, BOWEL, GLAND, DENSE, LESION, CORE = list(Tissue)[13:]

ANGLES = np.linspace(0, 2 * np.pi, 56, endpoint=False)
ORDERS = np.arange(2, 6)
WAVES = np.stack([np.cos(np.outer(ORDERS, ANGLES)), np.sin(np.outer(ORDERS, ANGLES))]) / ORDERS[None, :, None]

Site = tuple[float, float, float]
Point = tuple[float, float]


class Scene:
    """A map of tissues to which shapes are added; `sites` maps a name to the (x, y, radius) of a possible lesion."""

    def __init__(self, size: int, random: np.random.Generator, background: Tissue = AIR, tilt: float = 5.0):
        """Start with `size` x `size` pixels of `background`; `tilt` is the rotation's standard deviation in degrees."""
        self.size, self.random = size, random
        self.image = Image.new("L", (size, size), int(background))
        self.painter = ImageDraw.Draw(self.image)
        self.sites: dict[str, Site] = {}
        angle = math.radians(tilt) * random.standard_normal()
        zoom = random.uniform(0.9, 1.06)
        self.x_axis = zoom * np.array([math.cos(angle), math.sin(angle)])
        self.y_axis = zoom * np.array([-math.sin(angle), math.cos(angle)])
        self.shift = random.normal(0, 0.03, 2)

    def choose_side(self) -> None:
        """Mirror what follows with probability 0.5, for the left and the right side of the body."""
        if self.random.random() < 0.5:
            self.x_axis = -self.x_axis

    def labels(self) -> Bytes:
        """The tissue of each pixel so far, (H, W)."""
        return np.array(self.image)

    def pixels(self, x: np.ndarray, y: np.ndarray) -> list[float]:
        """The pixel positions of coordinates: x0, y0, x1, y1, …"""
        points = x[:, None] * self.x_axis + y[:, None] * self.y_axis + self.shift
        return ((points + 1) * (self.size / 2)).ravel().tolist()

    def vary(self, value: float, spread: float = 0.1) -> float:
        """A normal random value around `value`: its relative standard deviation is `spread`, its limit twice that."""
        return value * (1 + spread * min(2.0, max(-2.0, self.random.standard_normal())))

    def blob(
        self,
        tissue: Tissue,
        x: float,
        y: float,
        rx: float,
        ry: float | None = None,
        *,
        turn: float = 0.0,
        rough: float = 0.05,
        square: float = 1.0,
        rim: tuple[Tissue, float] | None = None,
    ) -> None:
        """Add an uneven ellipse around (x, y), turned by `turn` degrees.

        `square` below 1 makes it a rounded rectangle; `rim` is the tissue and the width of a border around it.
        """
        ry = rx if ry is None else ry
        unevenness = 1 + rough * np.tensordot(self.random.standard_normal((2, 4)), WAVES, 2)
        cosine, sine = np.cos(ANGLES), np.sin(ANGLES)
        if square != 1:
            cosine, sine = np.sign(cosine) * np.abs(cosine) ** square, np.sign(sine) * np.abs(sine) ** square
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        for fill, margin in ((rim[0], rim[1]), (tissue, 0.0)) if rim else ((tissue, 0.0),):
            px, py = (rx + margin) * cosine * unevenness, (ry + margin) * sine * unevenness
            self.painter.polygon(self.pixels(x + c * px - s * py, y + s * px + c * py), fill=int(fill))

    def line(self, tissue: Tissue, points: Sequence[Point], width: float) -> None:
        """Add a smooth line of `width` along `points`."""
        path = np.array(points)
        if len(path) > 2:  # a quadratic or cubic fitted to the points
            knots = np.linspace(0, 1, len(path))
            fit = np.polyfit(knots, path, min(3, len(path) - 1))
            dense = np.linspace(0, 1, 24)
            path = np.stack([np.polyval(fit[:, 0], dense), np.polyval(fit[:, 1], dense)], 1)
        tangent = np.gradient(path, axis=0)
        normal = tangent[:, ::-1] * (-width / 2, width / 2) / np.maximum(np.hypot(*tangent.T), 1e-9)[:, None]
        edge = np.concatenate([path + normal, (path - normal)[::-1]])
        self.painter.polygon(self.pixels(edge[:, 0], edge[:, 1]), fill=int(tissue), outline=int(tissue))

    def area(self, tissue: Tissue, points: Sequence[Point]) -> None:
        """Add a polygon with rounded corners."""
        corners = np.array(points)
        for length in (0.1, 0.04):  # cut each corner twice
            side = np.roll(corners, -1, axis=0) - corners
            cut = side * np.minimum(0.25, length / np.maximum(np.hypot(*side.T), 1e-9))[:, None]
            corners = np.stack([corners + cut, corners + side - cut], 1).reshape(-1, 2)
        self.painter.polygon(self.pixels(corners[:, 0], corners[:, 1]), fill=int(tissue))

    def cortical_folds(self) -> None:
        """Fold the grey matter: sulci where a random field is near 0, and inside, white matter where it is large."""
        field = np.abs(smooth_field(self.random, self.size, 13))
        grey = self.labels() == GREY
        inner = ndimage.binary_erosion(grey, iterations=max(1, self.size // 40))
        for tissue, where in ((WHITE, inner & (field > 0.55)), (FLUID, grey & (field < 0.07))):
            self.image.paste(int(tissue), mask=Image.fromarray(where))

    def vertebra(self, x: float, y: float, r: float) -> None:
        """Add a vertebra in axial view: body, arch, canal and processes."""
        self.line(CORTEX, [(x, y + 1.3 * r), (x, y + 2.9 * r)], 0.3 * r)
        self.line(CORTEX, [(x - 1.9 * r, y + 1.25 * r), (x, y + 0.9 * r), (x + 1.9 * r, y + 1.25 * r)], 0.4 * r)
        self.blob(FLUID, x, y + 1.2 * r, 0.5 * r, 0.45 * r, rim=(CORTEX, 0.2 * r))
        self.blob(MARROW, x, y, r, 0.8 * r, rim=(CORTEX, 0.12 * r))
        self.sites["spine"] = (x, y, r)

    def lesion(self, site: Site, radius: float, pattern: str) -> None:
        """Add a lesion at `site`; `pattern` is `solid`, `ring` (with a different core), `spots` or `streaks`."""
        x, y, _ = site
        if pattern == "spots":
            for angle in self.random.uniform(0, 2 * np.pi, 6):
                distance = radius * self.random.uniform(0.3, 1.3)
                self.blob(LESION, x + distance * math.cos(angle), y + distance * math.sin(angle), 0.38 * radius)
        elif pattern == "streaks":
            for row in (-0.7, 0.0, 0.7):
                ends = [(x - 1.3 * radius, y + row * radius), (x + 1.3 * radius, y + (row + 0.4) * radius)]
                self.line(LESION, ends, 0.4 * radius)
        else:
            self.blob(LESION, x, y, self.vary(radius), self.vary(radius), rough=0.15)
            if pattern == "ring":
                self.blob(CORE, x, y, 0.55 * radius, rough=0.15)


def trunk(s: Scene, rx: float, ry: float) -> None:
    """Skin, fat and muscle of the trunk, and the scanner's table."""
    s.line(TENDON, [(-0.9, ry + 0.16), (0.0, ry + 0.24), (0.9, ry + 0.16)], 0.02)
    fat = s.random.uniform(0.02, 0.1)
    s.blob(FAT, 0, 0, rx, ry, square=0.86, rough=0.03, rim=(MUSCLE, 0.015))
    s.blob(MUSCLE, 0, 0, rx - fat, ry - fat, square=0.86, rough=0.02)


def lung(s: Scene) -> None:
    """The chest in axial view."""
    rx, ry = s.vary(0.86, 0.04), s.vary(0.60, 0.06)
    trunk(s, rx, ry)
    wide, high = rx - 0.14, ry - 0.13
    s.blob(FAT, 0, 0, wide, high, square=0.9, rough=0.02)
    phase = s.random.uniform(0, 0.4)
    for angle in np.arange(phase, phase + 2 * np.pi, 2 * np.pi / 14):
        x, y = (wide + 0.045) * math.cos(angle), (high + 0.045) * math.sin(angle)
        along = math.degrees(math.atan2(high * math.cos(angle), -wide * math.sin(angle)))
        s.blob(MARROW, x, y, 0.075, 0.014, turn=along + 8, rim=(CORTEX, 0.012))
    heart = 0.06
    for side, scale in ((-1, 1.06), (1, 0.94)):
        x = side * wide * 0.53
        s.blob(LUNG, x, -0.0, scale * wide * 0.44, high * 0.93, turn=side * 6, square=0.9, rough=0.08)
        s.sites[f"lung{side}"] = (x, s.random.uniform(-0.15, 0.2), 0.22)
        for _ in range(16):
            angle, distance = s.random.uniform(0, 2 * np.pi), math.sqrt(s.random.random())
            r = 0.004 + 0.012 * (1 - distance)
            s.blob(
                BLOOD,
                x + 0.33 * wide * distance * math.cos(angle),
                0.75 * high * distance * math.sin(angle),
                r * 1.6,
                r,
            )
        for tip in s.random.uniform(-0.6, 0.6, 3):
            s.line(BLOOD, [(side * 0.12, 0.02), (side * 0.32, tip * 0.3), (side * wide * 0.6, tip * high)], 0.014)
    s.blob(FAT, 0, 0.02, 0.17, high * 0.9, rough=0.05)
    if s.random.random() < 0.65:  # a slice through the heart
        s.blob(ORGAN, heart + 0.08, -0.1, s.vary(0.31), s.vary(0.23), turn=-25, rough=0.06)
        s.blob(BLOOD, heart + 0.14, -0.1, 0.17, 0.11, turn=-25, rough=0.1)
        s.blob(BLOOD, heart - 0.08, -0.12, 0.11, 0.13, rough=0.1)
    else:
        s.line(BLOOD, [(-0.1, -0.2), (0.02, -0.26), (0.12, -0.1), (0.13, 0.1)], 0.12)
        s.blob(BLOOD, -0.12, -0.12, 0.06)
        s.blob(AIR, 0.0, -0.0, 0.05, rim=(ORGAN, 0.015))
    s.blob(BLOOD, 0.12, 0.2, 0.065)
    s.blob(MUSCLE, 0, 0.16, 0.03)
    s.vertebra(0, 0.31, 0.12)
    del s.sites["spine"]  # lesions of the lung's classes are in the lungs
    s.blob(MARROW, 0, -high - 0.02, 0.1, 0.022, rim=(CORTEX, 0.014))


def abdomen(s: Scene, pelvis: bool) -> None:
    """The abdomen, or the pelvis, in axial view."""
    rx, ry = s.vary(0.84, 0.05), s.vary(0.60, 0.07)
    trunk(s, rx, ry)
    wide, high = rx - 0.14, ry - 0.14
    s.blob(FAT, 0, -0.03, wide, high, square=0.85, rough=0.03)
    if pelvis:
        for side in (-1, 1):
            s.blob(MUSCLE, side * 0.62, 0.1, 0.2, 0.28)
            hip = [(side * 0.62, -0.22), (side * 0.52, 0.05), (side * 0.33, 0.3)]
            s.line(CORTEX, hip, 0.1)
            s.line(MARROW, hip, 0.06)
            s.blob(MUSCLE, side * 0.38, -0.05, 0.1, 0.13)
            s.blob(BLOOD, side * 0.3, -0.1, 0.035)
        s.blob(MARROW, 0, 0.36, 0.2, 0.09, rim=(CORTEX, 0.02))
        s.blob(FLUID, 0, -0.12, s.vary(0.22, 0.2), s.vary(0.16, 0.2), rim=(MUSCLE, 0.02))
        s.blob(ORGAN, 0, 0.09, s.vary(0.16), s.vary(0.09), rough=0.1)
        s.blob(BOWEL, 0.02, 0.23, 0.07, rim=(MUSCLE, 0.015))
        for _ in range(4):
            s.blob(BOWEL, s.random.uniform(-0.35, 0.35), -0.34, 0.08, 0.06, rim=(ORGAN, 0.015))
        s.sites |= {"bladder": (0.1, -0.1, 0.2), "uterine": (0.02, 0.09, 0.16), "prostate": (0.0, 0.1, 0.13)}
        s.sites |= {"ovarian": (0.25, 0.06, 0.15), "osseous": (-0.5, 0.1, 0.15)}
        return
    for _ in range(7):
        x, y = s.random.uniform(-0.05, 0.55), s.random.uniform(-0.38, 0.12)
        s.blob(BOWEL, x, y, s.vary(0.08, 0.2), s.vary(0.06, 0.2), rim=(ORGAN, 0.015))
        if s.random.random() < 0.35:
            s.blob(AIR, x, y - 0.02, 0.045, 0.025)
    s.blob(BOWEL, 0.25, -0.22, s.vary(0.2), s.vary(0.12), turn=25, rim=(ORGAN, 0.02))  # stomach
    s.blob(AIR, 0.25, -0.29, 0.12, 0.035)
    s.blob(SPLEEN, 0.55, 0.12, s.vary(0.13, 0.15), s.vary(0.24, 0.12), turn=-18)
    s.blob(LIVER, -0.40, -0.08, s.vary(0.30, 0.08), s.vary(0.36, 0.08), turn=12, square=0.9, rough=0.08)
    s.blob(LIVER, -0.1, -0.24, 0.26, s.vary(0.14, 0.15), turn=8, rough=0.08)
    for tip in s.random.uniform(-0.35, 0.25, 3):
        s.line(BLOOD, [(-0.16, 0.02), (-0.3, tip * 0.6), (-0.52, tip)], 0.025)
    s.blob(FLUID, -0.2, 0.02, s.vary(0.09, 0.25), s.vary(0.06, 0.2), turn=40, rim=(ORGAN, 0.01))
    s.line(ORGAN, [(-0.1, 0.04), (0.08, -0.02), (0.32, 0.02)], s.vary(0.09))  # pancreas
    for side in (-1, 1):
        y = s.vary(0.22, 0.1)
        s.blob(KIDNEY, side * 0.33, y, s.vary(0.12), s.vary(0.15), turn=side * 25, rough=0.07)
        s.blob(FAT, side * 0.28, y, 0.05, 0.06, rough=0.2)
        s.blob(MUSCLE, side * 0.17, 0.3, 0.08, 0.11)
        s.blob(MUSCLE, side * 0.2, 0.5, 0.17, 0.08)
    s.vertebra(0, 0.24, 0.12)
    s.blob(BLOOD, 0.05, 0.08, 0.058)
    s.blob(BLOOD, -0.1, 0.1, 0.06, 0.045)
    s.sites |= {"liver": (-0.42, -0.1, 0.3), "splenic": (0.55, 0.1, 0.18), "renal": (-0.35, 0.22, 0.16)}
    s.sites |= {"pancreatic": (0.1, 0.0, 0.14), "gall": (-0.2, 0.02, 0.1), "adrenal": (0.2, 0.1, 0.1)}
    s.sites |= {"bil": (-0.22, -0.02, 0.12), "bowel": (0.3, -0.1, 0.18), "uro": (0.31, 0.22, 0.09)}
    s.sites |= {"arterial": (0.05, 0.07, 0.12), "urinary": (0.3, 0.22, 0.15), "intra": (0.15, -0.15, 0.22)}
    s.sites |= {"ascites": (-0.62, 0.2, 0.2), "soft_tissue": (0.45, 0.4, 0.14)}


def brain(s: Scene) -> None:
    """The head in axial view."""
    rx, ry = s.vary(0.66, 0.05), s.vary(0.80, 0.04)
    s.blob(FAT, 0, 0, rx + 0.1, ry + 0.1, rough=0.015)
    s.blob(CORTEX, 0, 0, rx + 0.05, ry + 0.05, rough=0.01)
    s.blob(FLUID, 0, 0, rx, ry, rough=0.01)
    s.blob(GREY, 0, 0, rx - 0.03, ry - 0.03, rough=0.02)
    s.cortical_folds()
    for side in (-1, 1):
        s.blob(WHITE, side * rx * 0.36, 0, rx * 0.34, ry * 0.62, turn=side * 4, rough=0.12)
    s.blob(WHITE, 0, -0.02, 0.2, 0.34)
    s.line(FLUID, [(0, -ry + 0.02), (0, -0.32)], 0.02)
    s.line(FLUID, [(0, 0.36), (0, ry - 0.02)], 0.02)
    ventricle_width = s.random.uniform(0.7, 1.5)
    for side in (-1, 1):
        s.blob(GREY, side * 0.2, -0.1, 0.07, 0.13, turn=side * -15)  # caudate
        s.blob(GREY, side * 0.15, 0.14, 0.09, 0.11)  # thalamus
        front = [(side * 0.05, 0.0), (side * 0.07, -0.16), (side * 0.17, -0.3)]
        s.line(FLUID, front, 0.06 * ventricle_width)
        s.line(FLUID, [(side * 0.07, 0.24), (side * 0.2, 0.34), (side * 0.26, 0.46)], 0.07 * ventricle_width)
        s.sites[f"half{side}"] = (side * 0.36, s.random.uniform(-0.3, 0.3), 0.2)
    s.line(FLUID, [(0, 0.05), (0, 0.25)], 0.025 * ventricle_width)
    s.sites |= {"pituatary": (0.0, -0.05, 0.12), "extra": (0.5, -0.2, 0.2)}


def knee(s: Scene) -> None:
    """The knee from the side: thigh bone, shin bone and kneecap."""
    s.choose_side()
    s.area(FAT, [(-0.62, -1.4), (0.52, -1.4), (0.62, -0.2), (0.5, 0.35), (0.46, 1.4), (-0.66, 1.4), (-0.6, 0)])
    s.area(
        MUSCLE,
        [(-0.55, -1.4), (-0.25, -1.4), (-0.42, -0.2), (-0.36, 0.2), (-0.25, 1.4), (-0.58, 1.4), (-0.52, 0)],
    )
    s.line(MUSCLE, [(0.38, -1.3), (0.4, -0.9), (0.42, -0.55)], 0.2)
    s.line(TENDON, [(0.38, -1.0), (0.47, -0.5), (0.5, -0.35)], 0.045)
    s.area(CORTEX, [(-0.19, -1.4), (0.2, -1.4), (0.24, -0.4), (-0.22, -0.4)])
    s.area(MARROW, [(-0.14, -1.4), (0.15, -1.4), (0.2, -0.3), (-0.18, -0.3)])
    s.blob(FLUID, 0.3, -0.42, 0.12, 0.2)
    gap = s.vary(0.045, 0.25)
    s.blob(CARTILAGE, 0.0, -0.26, 0.4, 0.32, rough=0.03)
    s.blob(MARROW, 0.0, -0.28, 0.35, 0.27, rough=0.03, rim=(CORTEX, 0.02))
    s.area(MARROW, [(-0.13, -0.8), (0.14, -0.8), (0.2, -0.3), (-0.18, -0.3)])
    top = 0.06 + gap
    plateau = [
        (-0.4, top),
        (0.38, top),
        (0.34, top + 0.2),
        (0.2, top + 0.5),
        (0.2, 1.4),
        (-0.16, 1.4),
        (-0.2, top + 0.5),
    ]
    s.area(CARTILAGE, [(-0.4, top - 0.04), (0.38, top - 0.04), (0.38, top + 0.05), (-0.4, top + 0.05)])
    s.area(CORTEX, [*plateau, (-0.38, top + 0.2)])
    inner = [(x * 0.9, y + 0.025 if y < 1 else y) for x, y in plateau]
    s.area(MARROW, [*inner, (-0.33, top + 0.2)])
    for side, tip in ((-1, -0.14), (1, 0.14)):  # menisci
        s.area(TENDON, [(side * 0.4, top - 0.12), (side * 0.4, top), (tip, top - 0.01)])
    s.line(TENDON, [(-0.12, -0.08), (0.02, 0.0), (0.14, top + 0.04)], 0.05)
    s.blob(MARROW, 0.53, -0.22, 0.09, 0.17, turn=-8, rim=(CORTEX, 0.02))
    s.line(TENDON, [(0.52, -0.05), (0.44, 0.2), (0.3, 0.42)], 0.055)
    s.sites |= {
        "patella": (0.5, -0.22, 0.12),
        "acl": (0.02, 0.0, 0.1),
        "pcl": (-0.12, 0.0, 0.1),
        "bone": (0.0, 0.4, 0.18),
    }
    s.sites |= {"meniscal": (-0.26, top - 0.06, 0.1), "chondral": (0.15, 0.0, 0.12), "quad": (0.42, -0.6, 0.14)}
    s.sites |= {"muscle": (-0.42, -0.5, 0.16), "soft_tissue": (-0.45, 0.3, 0.16), "fracture": (0.05, -0.3, 0.2)}
    s.sites |= {"mcl": (-0.3, 0.15, 0.1), "fcl": (0.3, 0.15, 0.1)}


def hip(s: Scene) -> None:
    """One hip from the front: socket, ball, neck and shaft."""
    s.choose_side()
    s.area(FAT, [(-1.5, -1.5), (0.55, -1.5), (0.85, -0.4), (0.92, 0.3), (0.8, 1.5), (-1.5, 1.5)])
    s.area(MUSCLE, [(-1.5, -1.5), (0.4, -1.5), (0.62, -0.5), (0.72, 0.3), (0.66, 1.5), (-0.75, 1.5), (-0.7, 0.6)])
    for x, y, turn in ((0.3, -0.55, 55), (0.55, 0.7, 85), (-0.4, 0.9, 110), (0.05, 0.95, 95)):
        s.blob(FAT, x, y, s.vary(0.35), 0.02, turn=turn, rough=0.3)
    s.blob(FLUID, -0.95, 0.25, s.vary(0.3), s.vary(0.22), rim=(MUSCLE, 0.03))  # bladder
    s.blob(BOWEL, -0.85, -0.3, 0.16, 0.12, rim=(ORGAN, 0.02))
    for tissue, inset in ((CORTEX, 0.0), (MARROW, 0.045)):
        s.line(tissue, [(-0.55, -1.3), (-0.38, -0.85), (-0.25, -0.5)], 0.34 - 2 * inset)
        s.line(tissue, [(-0.52, -0.05), (-0.6, 0.3), (-0.62, 0.55)], 0.2 - 2 * inset)
        s.line(tissue, [(-0.62, 0.5), (-0.95, 0.55)], 0.13 - 2 * inset)
    r = s.vary(0.27, 0.05)
    s.blob(MARROW, -0.22, -0.2, r + 0.14, r + 0.14, rim=(CORTEX, 0.025))
    s.area(MUSCLE, [(-0.16, -0.1), (0.0, -0.62), (0.5, -0.3), (0.3, 0.6), (-0.25, 0.45)])
    s.blob(CARTILAGE, -0.14, -0.15, r + 0.05, rough=0.02)
    for tissue, inset in ((CORTEX, 0.0), (MARROW, 0.035)):
        s.line(tissue, [(-0.12, -0.14), (0.3, 0.2)], 0.32 - 2 * inset)
        s.blob(tissue, 0.4, 0.12, 0.17 - inset, 0.22 - inset, turn=-20)
        s.line(tissue, [(0.34, 0.15), (0.36, 0.7), (0.34, 1.5)], 0.32 - 2.4 * inset)
        s.blob(tissue, -0.13, -0.15, r - inset, rough=0.02)
    s.line(MARROW, [(-0.1, -0.12), (0.3, 0.2)], 0.25)
    s.area(TENDON, [(0.03, -0.5), (0.12, -0.38), (0.04, -0.42)])
    s.line(TENDON, [(0.5, 0.0), (0.55, -0.3), (0.45, -0.7)], 0.03)
    s.sites |= {"labral": (0.06, -0.42, 0.1), "chondral": (-0.12, -0.42, 0.11), "abductor": (0.5, -0.2, 0.16)}
    s.sites |= {"osseous": (-0.12, -0.15, 0.17), "marrow": (0.2, 0.12, 0.18), "hamstring": (-0.4, 0.65, 0.15)}
    s.sites |= {"capsular": (0.1, -0.05, 0.12), "soft_tissue": (0.62, 0.4, 0.18), "hematoma": (0.6, 0.6, 0.18)}


def shoulder(s: Scene) -> None:
    """One shoulder from the front: ball, socket, roof and the muscles between."""
    s.choose_side()
    s.area(FAT, [(-1.5, -0.85), (-0.2, -0.8), (0.35, -0.66), (0.72, -0.2), (0.8, 0.4), (0.74, 1.5), (-1.5, 1.5)])
    s.line(MUSCLE, [(0.12, -0.56), (0.6, -0.2), (0.6, 0.4), (0.42, 1.2)], 0.2)  # deltoid
    s.area(MUSCLE, [(-1.5, -0.3), (-0.4, -0.3), (-0.2, 0.3), (-0.1, 1.5), (-1.5, 1.5)])
    s.line(FAT, [(-1.4, 0.45), (-0.8, 0.42), (-0.3, 0.5)], 0.03)
    s.line(MUSCLE, [(-1.3, -0.58), (-0.7, -0.52), (-0.2, -0.46)], 0.22)  # supraspinatus
    s.line(TENDON, [(-0.35, -0.46), (0.05, -0.42), (0.38, -0.22)], 0.06)
    for tissue, inset in ((CORTEX, 0.0), (MARROW, 0.035)):
        s.line(tissue, [(-0.25, -0.72), (0.2, -0.62)], 0.16 - 2 * inset)  # acromion
        s.line(tissue, [(-1.3, -0.86), (-0.4, -0.76)], 0.15 - 2 * inset)  # clavicle
        s.line(tissue, [(-0.36, 0.0), (-0.75, 0.08), (-1.2, 0.2)], 0.24 - 2 * inset)
        s.area(tissue, [(-0.3 - inset, -0.3 + inset), (-0.52, -0.22), (-0.52, 0.3), (-0.3 - inset, 0.38 - inset)])
    s.line(CARTILAGE, [(-0.3, -0.24), (-0.27, 0.04), (-0.3, 0.32)], 0.05)
    r = s.vary(0.33, 0.05)
    s.blob(CARTILAGE, 0.08, -0.02, r + 0.035, rough=0.02)
    for tissue, inset in ((CORTEX, 0.0), (MARROW, 0.03)):
        s.blob(tissue, 0.09, -0.02, r - inset, rough=0.02)
        s.blob(tissue, 0.3, -0.02, 0.14 - inset, 0.2 - inset)
        s.line(tissue, [(0.2, 0.1), (0.26, 0.6), (0.26, 1.5)], 0.32 - 2.6 * inset)
    s.area(TENDON, [(-0.32, -0.36), (-0.18, -0.28), (-0.3, -0.22)])
    s.area(TENDON, [(-0.32, 0.42), (-0.17, 0.33), (-0.3, 0.28)])
    s.blob(FLUID, -0.12, 0.42, s.vary(0.1, 0.3), 0.03, turn=40)
    s.sites |= {"acj": (-0.33, -0.75, 0.1), "ghj": (-0.26, 0.05, 0.14), "supraspinatus": (0.12, -0.36, 0.12)}
    s.sites |= {"labral": (-0.28, -0.28, 0.09), "biceps": (0.38, 0.1, 0.1), "infraspinatus": (0.32, -0.2, 0.12)}
    s.sites |= {"subscapularis": (-0.5, 0.4, 0.16), "marrow": (0.1, 0.0, 0.2), "osseous": (0.12, 0.05, 0.16)}
    s.sites |= {"ca++": (0.2, -0.32, 0.08), "soft_tissue": (0.55, 0.2, 0.14)}


def foot(s: Scene) -> None:
    """Ankle and foot from the side."""
    s.choose_side()
    outline = [(-0.5, -1.5), (0.3, -1.5), (0.3, -0.5), (0.55, -0.2), (1.4, 0.22), (1.4, 0.62), (0.4, 0.66)]
    s.area(FAT, [*outline, (0.0, 0.62), (-0.5, 0.76), (-0.76, 0.6), (-0.68, 0.1), (-0.52, -0.4)])
    s.line(MUSCLE, [(-0.22, -1.4), (-0.24, -0.9), (-0.18, -0.55)], 0.16)
    s.line(MUSCLE, [(-0.2, 0.55), (0.3, 0.5), (1.2, 0.56)], 0.12)
    s.line(TENDON, [(-0.42, -1.4), (-0.48, -0.6), (-0.66, 0.2)], s.vary(0.07))  # Achilles
    s.line(TENDON, [(-0.45, 0.62), (0.1, 0.6), (1.1, 0.64)], 0.035)  # plantar fascia
    s.line(TENDON, [(0.24, -1.4), (0.24, -0.6), (0.7, -0.06)], 0.035)
    rim = (CORTEX, 0.018)
    for tissue, inset in ((CORTEX, 0.0), (MARROW, 0.035)):
        s.area(
            tissue,
            [
                (-0.11 + inset, -1.5),
                (0.16 - inset, -1.5),
                (0.22 - inset, -0.42 - inset),
                (-0.2 + inset, -0.4 - inset),
            ],
        )
    s.line(CARTILAGE, [(-0.2, -0.38), (0.02, -0.42), (0.22, -0.36)], 0.05)
    s.blob(MARROW, -0.38, 0.3, s.vary(0.3, 0.06), 0.22, turn=-8, square=0.8, rim=rim)  # calcaneus
    s.line(FAT, [(-0.3, 0.05), (0.1, 0.1)], 0.06)
    s.blob(MARROW, 0.03, -0.17, 0.22, s.vary(0.17, 0.06), turn=14, rim=rim)  # talus
    s.blob(MARROW, 0.24, -0.02, 0.13, 0.12, rim=rim)
    s.blob(MARROW, 0.1, 0.28, 0.16, 0.1, turn=10, rim=rim)  # cuboid
    s.blob(MARROW, 0.43, 0.06, 0.07, 0.13, turn=-15, rim=rim)  # navicular
    s.blob(MARROW, 0.6, 0.14, 0.09, 0.12, turn=-10, rim=rim)
    for dy in (0.0, 0.14):
        s.line(CORTEX, [(0.72, 0.2 + dy), (1.4, 0.42 + dy)], 0.11)
        s.line(MARROW, [(0.74, 0.2 + dy), (1.4, 0.42 + dy)], 0.075)
    s.sites |= {
        "achilles": (-0.5, -0.4, 0.13),
        "plantar_fascia": (-0.3, 0.58, 0.12),
        "Plantar_plate": (0.85, 0.5, 0.11),
    }
    s.sites |= {"coalition": (0.02, 0.06, 0.1), "lisfranc": (0.7, 0.2, 0.1), "extensor": (0.32, -0.4, 0.12)}
    s.sites |= {"flexor": (-0.2, -0.7, 0.12), "peroneal": (-0.28, 0.0, 0.12), "bone": (0.0, -0.16, 0.15)}
    s.sites |= {"chondral": (0.02, -0.36, 0.11), "osseous": (-0.35, 0.3, 0.18), "atfl": (0.18, -0.3, 0.1)}
    s.sites |= {"cfl": (-0.2, 0.04, 0.1), "deltoid": (-0.05, -0.02, 0.12), "spring": (0.3, 0.14, 0.1)}
    s.sites |= {
        "syndesmosis": (0.02, -0.5, 0.12),
        "soft_tissue": (-0.5, 0.6, 0.16),
        "hematoma": (0.5, -0.1, 0.13),
    }


def spine(s: Scene) -> None:
    """A column of vertebrae from the side, with canal and cord."""
    s.choose_side()
    s.area(MUSCLE, [(-1.5, -1.5), (0.72, -1.5), (0.62, 0.0), (0.78, 1.5), (-1.5, 1.5)])
    s.area(FAT, [(0.5, -1.5), (0.82, -1.5), (0.7, 0.0), (0.88, 1.5), (0.55, 1.5), (0.42, 0)])
    for y in np.arange(-1.1, 1.2, 0.4):
        s.blob(BOWEL, s.random.uniform(-0.9, -0.75), y, 0.2, 0.15, rim=(FAT, 0.04))
    bend, lean = s.random.normal(0.16, 0.07), s.random.normal(0, 0.05)

    def middle(y: float) -> float:
        return -0.2 + bend * (y * y - 0.4) + lean * y

    rows = np.linspace(-1.3, 1.3, 21)
    s.line(BLOOD, [(middle(y) - 0.36, y) for y in rows], 0.13)
    s.line(FAT, [(middle(y) + 0.26, y) for y in rows], 0.24)
    s.line(FLUID, [(middle(y) + 0.245, y) for y in rows], s.vary(0.15))
    s.line(WHITE, [(middle(y) + 0.24, y) for y in rows[: s.random.integers(9, 22)]], 0.06)
    pitch = s.vary(0.34, 0.1)
    for y in np.arange(-1.2 + s.random.uniform(0, pitch), 1.25, pitch):
        slope = math.degrees(math.atan(2 * bend * y + lean))
        x, half = middle(y), pitch / 2
        s.blob(DISC, middle(y + half), y + half, 0.185, half * 0.3, turn=-slope, square=0.6, rim=(TENDON, 0.012))
        s.blob(MARROW, x, y, 0.17, half * 0.66, turn=-slope, square=0.5, rough=0.02, rim=(CORTEX, 0.02))
        s.blob(MARROW, x + 0.5, y + 0.1, 0.14, 0.055, turn=18 - slope, rim=(CORTEX, 0.018))
        if abs(y) < 0.5:
            s.sites |= {"disc": (middle(y + half), y + half, 0.11), "osseous": (x, y, 0.14)}
            s.sites |= {"facet": (x + 0.42, y + 0.06, 0.1), "foraminal": (x + 0.2, y + half, 0.09)}
    s.sites |= {"cord": (middle(0.1) + 0.24, 0.1, 0.08), "dural": (middle(-0.2) + 0.3, -0.2, 0.09)}
    s.sites |= {"cystic": (middle(0.2) + 0.35, 0.2, 0.1)}


def wall(s: Scene) -> float:
    """Skin, fat and muscle under an ultrasound probe; returns the y where they end."""
    fat, muscle = s.random.uniform(0.06, 0.2), s.random.uniform(0.08, 0.16)
    s.area(DENSE, [(-3, -2), (3, -2), (3, -0.97), (-3, -0.97)])
    edge = -0.97 + fat
    s.area(FAT, [(-3, -0.97), (3, -0.97), (3, edge), (-3, edge)])
    s.area(MUSCLE, [(-3, edge), (3, edge), (3, edge + muscle), (-3, edge + muscle)])
    for y in (edge, edge + muscle):
        s.line(TENDON, [(-3, y), (3, y + s.random.normal(0, 0.02))], 0.02)
    return edge + muscle


def thyroid(s: Scene) -> None:
    """The neck in transverse view, with a lobe on each side of the windpipe, or one lobe in longitudinal view."""
    edge = wall(s)
    s.area(MUSCLE, [(-3, edge), (3, edge), (3, 2), (-3, 2)])
    for _ in range(7):
        x, y = s.random.uniform(-1, 1), s.random.uniform(edge, 1)
        s.blob(TENDON, x, y, s.vary(0.3), 0.008, turn=s.random.normal(0, 10))
    if s.random.random() < 0.35:
        y = edge + s.random.uniform(0.28, 0.36)
        s.blob(GLAND, 0, y, s.vary(0.75), s.vary(0.25), turn=s.random.normal(0, 4), rim=(TENDON, 0.015))
        s.blob(CORTEX, s.random.uniform(-0.8, 0.8), y + 0.9, 0.5, 0.08, rough=0.15)
        s.sites |= {"lobe": (s.random.uniform(-0.35, 0.35), y, 0.2)}
        return
    x = s.random.choice([-0.45, 0.0, 0.0, 0.45])
    y = edge + 0.3
    s.line(GLAND, [(x - 0.4, y - 0.04), (x, y - 0.2), (x + 0.4, y - 0.04)], 0.12)
    for side in (-1, 1):
        s.blob(BLOOD, x + side * 0.66, y + 0.1, s.vary(0.13), s.vary(0.12), rim=(TENDON, 0.015))
        s.blob(BLOOD, x + side * 0.86, y - 0.06, s.vary(0.15, 0.2), s.vary(0.08, 0.3), turn=side * 20)
        s.blob(GLAND, x + side * 0.36, y + 0.02, s.vary(0.2), s.vary(0.24), turn=side * -10, rim=(TENDON, 0.01))
        s.sites[f"lobe{side}"] = (x + side * 0.36, y + 0.02, 0.15)
    s.blob(AIR, x, y + 0.12, 0.17, 0.18, rim=(CARTILAGE, 0.045))
    s.blob(CORTEX, x + s.random.normal(0, 0.05), y + 0.95, 0.45, 0.12, rough=0.15)


def breast(s: Scene) -> None:
    """Skin, fat lobules, glandular tissue, chest muscle and ribs under a linear probe."""
    s.area(GLAND, [(-3, -2), (3, -2), (3, 2), (-3, 2)])
    s.area(DENSE, [(-3, -2), (3, -2), (3, -0.95), (-3, -0.95)])
    top = s.random.uniform(-0.65, -0.35)
    s.area(FAT, [(-3, -0.95), (3, -0.95), (3, top), (-3, top)])
    for _ in range(9):
        x = s.random.uniform(-1, 1)
        s.line(DENSE, [(x, -0.95), (x + s.random.normal(0, 0.25), top)], 0.02)
    for _ in range(s.random.integers(3, 9)):  # fat lobules look a little like a mass
        s.blob(
            FAT,
            s.random.uniform(-1, 1),
            s.random.uniform(top, 0.3),
            s.vary(0.22, 0.3),
            s.vary(0.06, 0.3),
            rough=0.1,
        )
    for _ in range(6):
        y = s.random.uniform(top, 0.4)
        s.line(DENSE, [(-1.2, y), (0.0, y + s.random.normal(0, 0.1)), (1.2, y + s.random.normal(0, 0.15))], 0.03)
    deep = s.random.uniform(0.35, 0.6)
    s.area(MUSCLE, [(-3, deep), (3, deep), (3, 2), (-3, 2)])
    s.line(TENDON, [(-2, deep), (2, deep)], 0.025)
    for x in np.arange(-1 + s.random.uniform(0, 0.9), 1.2, 0.9):
        s.blob(MARROW, x, deep + 0.3, 0.2, 0.09, rim=(CORTEX, 0.03))
    s.sites["gland"] = (s.random.uniform(-0.6, 0.6), s.random.uniform(top + 0.1, deep - 0.25), 0.30)


def belly(s: Scene, organ: str) -> None:
    """The belly under a curved probe, pointed at one of the 13 organs of RadImageNet's ultrasound classes."""
    edge = wall(s)
    surroundings = LIVER if organ in LIVER_WINDOW else BOWEL
    s.area(surroundings, [(-3, edge), (3, edge), (3, 3), (-3, 3)])
    x, y = s.random.normal(0, 0.08), s.random.normal(-0.02, 0.06)
    turn, scale = s.random.normal(0, 8), s.random.uniform(0.85, 1.15)
    if surroundings == BOWEL:
        for _ in range(5):
            s.blob(
                ORGAN, s.random.uniform(-1, 1), s.random.uniform(edge, 1), s.vary(0.3), s.vary(0.15), rough=0.2
            )
        gas = s.random.choice([-1, 1]) * s.random.uniform(0.55, 0.9)
        s.blob(AIR, gas, edge + 0.2, 0.16, 0.05, rough=0.2)
    else:
        for _ in range(s.random.integers(3, 7)):
            vx, vy = s.random.uniform(-0.8, 0.8), s.random.uniform(edge + 0.1, 0.6)
            s.line(BLOOD, [(vx, vy), (vx + s.random.normal(0, 0.2), vy + 0.1)], 0.035)
        if s.random.random() < 0.6:  # the diaphragm and the lung behind it
            diaphragm = [(-1.1, s.random.uniform(0.3, 0.6)), (0.0, s.random.uniform(0.6, 0.8)), (1.1, 0.7)]
            s.line(LUNG, [(px, py + 0.26) for px, py in diaphragm], 0.5)
            s.line(TENDON, diaphragm, 0.03)

    def structure(tissue: Tissue, dx: float, dy: float, rx: float, ry: float, rim: Tissue | None = None) -> None:
        cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        px, py = x + scale * (cosine * dx - sine * dy), y + scale * (sine * dx + cosine * dy)
        border = (rim, 0.02) if rim is not None else None
        s.blob(tissue, px, py, s.vary(rx * scale), s.vary(ry * scale), turn=turn, rough=0.06, rim=border)

    if organ == "aorta":
        rx, ry = (1.1, 0.13) if s.random.random() < 0.6 else (0.16, 0.16)
        structure(BLOOD, 0, 0.1, rx, ry, TENDON)
        s.blob(MARROW, x, y + 0.62, 1.2, 0.12, rim=(CORTEX, 0.03))
    elif organ == "ivc":
        structure(BLOOD, 0, 0.15, 0.95, 0.10)
        structure(BLOOD, -0.3, -0.12, 0.3, 0.03)
    elif organ == "portal_vein":
        structure(BLOOD, 0, 0.05, 0.55, 0.065, TENDON)
        s.line(BLOOD, [(x + 0.3, y + 0.05), (x + 0.5, y - 0.2)], 0.07)
    elif organ == "cbd":
        structure(BLOOD, 0, 0.18, 0.6, 0.07, TENDON)
        structure(FLUID, -0.02, 0.02, 0.5, 0.032, TENDON)
    elif organ == "gb":
        turn += 25
        structure(FLUID, 0, 0.05, 0.42, 0.17, TENDON)
        structure(FLUID, -0.28, 0.03, 0.16, 0.08)
    elif organ == "bladder":
        structure(FLUID, 0, 0.0, 0.55, 0.36, MUSCLE)
    elif organ in {"uterus", "fibroid"}:
        structure(MUSCLE, 0, 0.08, 0.6, 0.28, TENDON)
        structure(GLAND, -0.05, 0.07, 0.36, 0.035)
        if organ == "fibroid":
            side = s.random.choice([-0.25, 0.25])
            structure(CARTILAGE, side, 0.06, 0.21, 0.2, ORGAN)
    elif organ == "kidney":
        structure(KIDNEY, 0, 0.12, 0.56, 0.26, TENDON)
        structure(DENSE, 0, 0.12, 0.3, 0.09)
        for dx in (-0.3, -0.15, 0.0, 0.15, 0.3):
            structure(CARTILAGE, dx, -0.02, 0.04, 0.045)
    elif organ == "ovary":
        structure(ORGAN, 0, 0.08, 0.36, 0.24, TENDON)
        for angle in s.random.uniform(0, 2 * np.pi, s.random.integers(3, 7)):
            structure(FLUID, 0.2 * math.cos(angle), 0.08 + 0.12 * math.sin(angle), 0.065, 0.06)
    elif organ == "pancreas":
        band = [(x - 0.5, y + 0.1), (x, y - 0.06), (x + 0.5, y + 0.02)]
        s.line(GLAND, band, 0.2)
        s.line(BLOOD, [(px, py + 0.14) for px, py in band], 0.06)
        structure(BLOOD, 0.05, 0.3, 0.09, 0.09, TENDON)
    elif organ == "spleen":
        turn += 20
        structure(SPLEEN, 0, 0.0, 0.7, 0.34, TENDON)
        structure(KIDNEY, 0.3, 0.52, 0.3, 0.14, TENDON)


LIVER_WINDOW = {"liver", "gb", "cbd", "portal_vein", "ivc", "kidney", "pancreas"}
"""Ultrasound classes whose organ is seen through the liver; the others lie between bowel."""

PELVIC = ("bladder", "prostate", "uterine", "ovarian")
"""Prefixes of the CT and MR classes of the abdomen that show the pelvis."""

ANATOMIES: dict[str, Callable[[Scene], None]] = {
    "lung": lung,
    "brain": brain,
    "knee": knee,
    "hip": hip,
    "shoulder": shoulder,
    "af": foot,
    "spine": spine,
    "thyroid": thyroid,
    "breast": breast,
}


def make_scene(size: int, random: np.random.Generator, modality: str, anatomy: str, name: str) -> Scene:
    """The tissues of an image without a lesion; the class `name` decides which organ or region is in view."""
    scene = Scene(size, random, tilt=2.0 if modality == "US" else 5.0)
    if anatomy != "abd":
        ANATOMIES[anatomy](scene)
    elif modality == "US":
        belly(scene, name)
    else:
        pelvic = name.startswith(PELVIC) or (name in {"normal", "osseous_neoplasm"} and random.random() < 0.3)
        abdomen(scene, pelvic)
    return scene

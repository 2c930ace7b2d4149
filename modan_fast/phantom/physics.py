"""The physics that turns a map of tissues into a CT, MR or ultrasound image, one image at a time.

H x W pixels of a tissue map; D depths x B beams of an ultrasound scan before scan conversion. The models are simple on
purpose. They keep what distinguishes the modalities: noise that grows where few photons arrive (CT); contrast by
weighting, a bias field and Rician noise (MR); speckle, attenuation and shadows (US).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Tissue(IntEnum):
    """The value of each tissue in a map; the properties of `LESION` and `CORE` depend on the image's class."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    CORTEX = 3
    MARROW = 4
    ORGAN = 5
    LIVER = 6
    SPLEEN = 7
    KIDNEY = 8
    FLUID = 9
    BLOOD = 10
    GREY = 11
    WHITE = 12
    CARTILAGE = 13
    TENDON = 14
    DISC = 15
    LUNG = 16
    BOWEL = 17
    GLAND = 18
    DENSE = 19
    LESION = 20
    CORE = 21


class Property(NamedTuple):
    """The properties of a tissue in the three modalities.

    CT: `hu`, the CT number in Hounsfield units of a contrast-enhanced scan. MR: `t1` and `t2`, relaxation times in ms
    at 1.5 T; `density`, of protons, relative to water. US: `echo`, relative amplitude of the scatterers; `loss`,
    one-way attenuation in dB/cm/MHz; `impedance` in MRayl. All: `texture`, relative standard deviation in a tissue.
    """

    hu: float
    t1: float
    t2: float
    density: float
    echo: float
    loss: float
    impedance: float
    texture: float


# Rounded from common tables: relaxation times after Stanisz et al. 2005 and Bojorquez et al. 2017, acoustics after
# Szabo 2014 (Diagnostic Ultrasound Imaging, appendix B), CT numbers after everyday practice. Blood has little signal in
# MR because it flows out of the slice before the echo.
PROPERTIES = {
    Tissue.AIR: Property(-1000, 1000, 10, 0.0, 2.5, 25.0, 0.1, 0.0),
    Tissue.FAT: Property(-100, 280, 80, 0.9, 0.30, 0.5, 1.38, 0.07),
    Tissue.MUSCLE: Property(55, 950, 42, 0.8, 0.28, 0.8, 1.70, 0.12),
    Tissue.CORTEX: Property(800, 1000, 2, 0.1, 1.0, 20.0, 6.0, 0.0),
    Tissue.MARROW: Property(220, 350, 65, 0.8, 0.3, 9.0, 4.0, 0.09),
    Tissue.ORGAN: Property(45, 850, 55, 0.8, 0.55, 0.6, 1.64, 0.06),
    Tissue.LIVER: Property(105, 590, 46, 0.75, 0.60, 0.5, 1.65, 0.05),
    Tissue.SPLEEN: Property(125, 1050, 75, 0.8, 0.50, 0.4, 1.64, 0.04),
    Tissue.KIDNEY: Property(165, 960, 80, 0.85, 0.33, 0.6, 1.62, 0.06),
    Tissue.FLUID: Property(8, 3200, 700, 1.0, 0.01, 0.01, 1.52, 0.02),
    Tissue.BLOOD: Property(190, 1500, 60, 0.15, 0.03, 0.15, 1.61, 0.03),
    Tissue.GREY: Property(40, 1050, 98, 0.82, 0.5, 0.6, 1.60, 0.04),
    Tissue.WHITE: Property(30, 650, 76, 0.69, 0.6, 0.6, 1.60, 0.03),
    Tissue.CARTILAGE: Property(100, 1050, 42, 0.8, 0.12, 1.5, 1.75, 0.04),
    Tissue.TENDON: Property(85, 600, 6, 0.5, 0.9, 1.5, 1.80, 0.05),
    Tissue.DISC: Property(85, 1000, 85, 0.8, 0.4, 1.5, 1.70, 0.08),
    Tissue.LUNG: Property(-850, 1000, 5, 0.15, 2.0, 15.0, 0.3, 0.25),
    Tissue.BOWEL: Property(35, 900, 80, 0.8, 0.40, 0.7, 1.60, 0.2),
    Tissue.GLAND: Property(110, 900, 75, 0.85, 0.85, 0.7, 1.64, 0.05),
    Tissue.DENSE: Property(60, 900, 40, 0.7, 1.10, 0.9, 1.68, 0.10),
}

WINDOWS = {"lung": (-450.0, 1300.0), "abd": (50.0, 400.0)}
"""Level and width of a CT window, in Hounsfield units."""

WEIGHTINGS = {"T1": (520.0, 12.0), "T2": (4200.0, 90.0), "PD": (2800.0, 22.0)}
"""Repetition and echo time of a spin echo, in ms."""

WATER = 0.19  # linear attenuation of water in 1/cm, near 70 keV
VIEWS = 900  # projections of a CT rotation
PIXEL_CM = {"lung": 0.17, "abd": 0.17}  # side of a pixel of a CT image of 224 x 224 pixels
DYNAMIC_RANGE = 55.0  # dB that an ultrasound image shows
FREQUENCY = 4.0  # MHz, of a curved probe


def property_table(lesion: Property | None = None, core: Property | None = None) -> Floats:
    """The properties of all tissues (22, 8), float32. A core is like the lesion by default, a lesion like an organ."""
    default = PROPERTIES[Tissue.ORGAN]
    rows = [*PROPERTIES.values(), lesion or default, core or lesion or default]
    return np.array(rows, np.float32)


def smooth_field(random: np.random.Generator, size: int, cells: int) -> Floats:
    """A random field (size, size) of mean 0 and standard deviation near 1, which varies over 1/`cells` of the width."""
    coarse = Image.fromarray(random.standard_normal((cells + 2, cells + 2), np.float32))
    box = (0.5, 0.5, cells + 1.5, cells + 1.5)
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC, box=box))


def blur(values: Floats, sigma: float) -> Floats:
    """Values blurred by a Gaussian of `sigma` pixels."""
    return ndimage.gaussian_filter(values, sigma, mode="nearest", truncate=3.0)


def texture(labels: Bytes, tissues: Floats, random: np.random.Generator) -> Floats:
    """The texture of each tissue as a factor near 1 (H, W), on two length scales."""
    size = len(labels)
    grain = 0.7 * smooth_field(random, size, size // 5) + 0.7 * smooth_field(random, size, 14)
    return 1 + tissues[:, 7][labels] * grain


def ct_numbers(
    labels: Bytes, tissues: Floats, random: np.random.Generator, photons: float, pixel_cm: float
) -> Floats:
    """Hounsfield units (H, W) of a scan with `photons` entering per ray (1e4 … 1e6) and pixels of `pixel_cm`.

    A simple approximation without reconstruction: of the rays through a pixel, it follows only the row and the column.
    The fraction of photons that pass is exp(-line integral). The error of a pixel's line integral comes from a Poisson
    count whose expectation is the harmonic mean of the two counts. The factor of filtered back-projection,
    pi / (sqrt(12 views) pixel) (Gore and Tofts 1978), turns it into an error of attenuation, which a soft kernel
    smooths. So noise grows with a lower dose, in the middle of a thick body and beside bone. Streaks, beam hardening
    and the ramp filter's spectrum are left out.
    """
    grain = 15 * (texture(labels, tissues, random) - 1) / 0.1
    clean = blur(tissues[:, 0][labels] + grain, 0.7)
    attenuation = WATER * np.maximum(1 + clean / 1000, 0)
    through_rows, through_columns = attenuation.sum(1) * pixel_cm, attenuation.sum(0) * pixel_cm
    counts = photons * 2 / (np.exp(through_rows)[:, None] + np.exp(through_columns)[None, :])
    error = -np.log(np.maximum(random.poisson(counts), 1) / counts).astype(np.float32)
    gain = math.pi / (math.sqrt(12 * VIEWS) * pixel_cm) / WATER * 1000
    return clean + blur(error * np.float32(gain), 0.6)


def windowed(hu: Floats, level: float, width: float) -> Bytes:
    """Hounsfield units as grey values 0 … 255, in a window of `width` around `level`."""
    return quantised((hu - (level - width / 2)) / width)


def mr_signal(labels: Bytes, tissues: Floats, weighting: str, fat_saturation: bool = False) -> Floats:
    """The noise-free signal (H, W) of a spin echo, at most 1: density (1 - exp(-TR/T1)) exp(-TE/T2).

    Fat saturation leaves 12 % of the signal of fat and marrow.
    """
    repetition, echo = WEIGHTINGS[weighting]
    signal = tissues[:, 3] * (1 - np.exp(-repetition / tissues[:, 1])) * np.exp(-echo / tissues[:, 2])
    if fat_saturation:
        signal[[Tissue.FAT, Tissue.MARROW]] *= 0.12
    return signal[labels]


def bias_field(random: np.random.Generator, size: int, strength: float) -> Floats:
    """The sensitivity of a coil, a smooth positive factor (size, size): exp of a field of 2 cells."""
    return np.exp(strength * smooth_field(random, size, 2))


def rician(signal: Floats, sigma: float, random: np.random.Generator) -> Floats:
    """The magnitude of a signal with Gaussian noise of `sigma` in its real and imaginary components."""
    real, imaginary = random.standard_normal((2, *signal.shape), np.float32) * np.float32(sigma)
    return np.hypot(signal + real, imaginary)


@dataclass(frozen=True)
class Probe:
    """An ultrasound probe: `half_angle` of its fan in radians (0: linear, parallel beams) and `radius` of its face.

    Lengths are in halves of the image's side, whose middle is 0 and whose edges are -1 and 1. The fan begins at the
    upper edge and reaches `depth`. `frequency` is in MHz and higher for a linear probe; `side_cm` is the image's side.
    """

    half_angle: float
    radius: float
    depth: float
    frequency: float = FREQUENCY
    side_cm: float = 14.0

    def points(self, size: int) -> tuple[Floats, Floats]:
        """Image coordinates x and y, each (D, B), of all depths and beams, for an image of `size` x `size` pixels."""
        depths, beams = size, max(16, size * 5 // 8)
        along = (np.arange(depths, dtype=np.float32)[:, None] + 0.5) / depths * self.depth
        across = (np.arange(beams, dtype=np.float32)[None, :] + 0.5) / beams * 2 - 1
        if not self.half_angle:
            return np.broadcast_to(across, (depths, beams)), np.broadcast_to(along - 1, (depths, beams))
        angle, reach = across * self.half_angle, along + self.radius
        x, y = reach * np.sin(angle), reach * np.cos(angle) - self.radius - 1
        return x.astype(np.float32), y.astype(np.float32)

    def scan_converted(self, scan: Floats, size: int) -> Floats:
        """A scan (D, B) as an image (size, size), by linear interpolation; 0 outside the field of view."""
        coordinates = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
        x, y = coordinates[None, :], coordinates[:, None]
        if self.half_angle:
            down = y + 1 + self.radius
            angle, along = np.arctan2(x, down) / self.half_angle, np.hypot(x, down) - self.radius
        else:
            angle, along = np.broadcast_to(x, (size, size)), np.broadcast_to(y + 1, (size, size))
        depths, beams = scan.shape
        positions = np.stack([along / self.depth * depths - 0.5, (angle + 1) / 2 * beams - 0.5])
        return ndimage.map_coordinates(scan, positions, order=1, mode="constant", cval=0.0)


def speckle(amplitude: Floats, random: np.random.Generator, axial: float = 0.8, lateral: float = 1.7) -> Floats:
    """The envelope (D, B) of scatterers of `amplitude`, blurred by a pulse of `axial` and `lateral` samples (sigmas).

    Many scatterers per cell give a circular Gaussian echo. Where the amplitude is even, the envelope is therefore
    Rayleigh-distributed (mean / standard deviation 1.91), and its mean square equals that of the amplitude.
    """
    echo = random.standard_normal((2, *amplitude.shape), np.float32) * amplitude
    echo = ndimage.gaussian_filter1d(echo, axial, axis=1, mode="nearest", truncate=3.0)
    echo = ndimage.gaussian_filter1d(echo, lateral, axis=2, mode="nearest", truncate=3.0)
    return np.hypot(echo[0], echo[1]) / _rms(axial, lateral)


@cache
def _rms(axial: float, lateral: float) -> np.float32:
    """Root mean square of the magnitude of two unit fields after the pulse's filter."""
    size = 2 * math.ceil(4 * max(axial, lateral)) + 1
    point = np.zeros((size, size))
    point[size // 2, size // 2] = 1
    kernel = ndimage.gaussian_filter(point, (axial, lateral), truncate=3.0)
    return np.float32(math.sqrt(2 * (kernel**2).sum()))


def us_envelope(labels: Bytes, tissues: Floats, probe: Probe, random: np.random.Generator) -> Floats:
    """The envelope (D, B) of the echo of the tissues along the beams, before compression.

    Scatterers give speckle. A step of impedance along a beam adds a specular line. Sound is attenuated on the way down
    and back; the machine's gain compensates that of soft tissue (0.55 dB/cm/MHz), so the image is dark behind bone and
    gas and bright behind fluid. The electronics add a Rayleigh noise floor.
    """
    size = len(labels)
    x, y = probe.points(size)
    columns, rows = ((np.clip((c + 1) / 2 * size, 0, size - 1)).astype(np.intp) for c in (x, y))
    beam_labels = labels[rows, columns]
    factor = texture(labels, tissues, random)[rows, columns]
    impedance = ndimage.gaussian_filter1d(tissues[:, 6][beam_labels], 1.0, axis=0, mode="nearest")
    step = np.abs(np.diff(impedance, axis=0, prepend=impedance[:1])) / impedance
    amplitude = tissues[:, 4][beam_labels] * factor + 10.0 * np.minimum(step, 0.5)
    cm = probe.depth / 2 * probe.side_cm / len(beam_labels)
    loss_db = np.cumsum(2 * probe.frequency * cm * (tissues[:, 5][beam_labels] - 0.55), axis=0, dtype=np.float32)
    amplitude *= 10 ** (-np.clip(loss_db, -9, 80) / 20)
    floor = rician(np.zeros(beam_labels.shape, np.float32), 0.002, random)
    return speckle(amplitude.astype(np.float32), random) + floor


def compressed(envelope: Floats, gain: float = 0.0) -> Floats:
    """An envelope as brightness: 1 at an amplitude of 10, 0 at `DYNAMIC_RANGE` dB below; `gain` is in dB."""
    decibels = 20 * np.log10(np.maximum(envelope, 1e-6) / 10) + gain
    return (1 + decibels / DYNAMIC_RANGE).astype(np.float32)


def quantised(brightness: Floats) -> Bytes:
    """Brightness as grey values 0 … 255, clipped to 0 … 1 before."""
    return np.clip(np.rint(brightness * 255), 0, 255).astype(np.uint8)

"""One image: the tissues of an anatomy, the lesion of a class, and the physics of a modality."""

from __future__ import annotations

import zlib

import numpy as np

from modan_fast.phantom import physics
from modan_fast.phantom.anatomy import Scene, make_scene
from modan_fast.phantom.physics import Bytes, Floats, Probe, Property, Tissue

MATERIALS = {
    "fat": Tissue.FAT,
    "cyst": Tissue.FLUID,
    "fluid": Tissue.FLUID,
    "ascites": Tissue.FLUID,
    "edema": Tissue.FLUID,
    "dil": Tissue.FLUID,
    "collection": Tissue.FLUID,
    "stone": Tissue.CORTEX,
    "lithiasis": Tissue.CORTEX,
    "ca++": Tissue.CORTEX,
    "fracture": Tissue.FLUID,
    "disruption": Tissue.FLUID,
    "Airspace": Tissue.ORGAN,
    "Nodule": Tissue.ORGAN,
    "destruction": Tissue.AIR,
    "Bronchiectasis": Tissue.AIR,
}
"""The tissue of a lesion whose class name contains the word.

Any other lesion is a diseased form of the tissue around it.
"""

HEALTHY = {"normal", "thyroid"}
"""Classes without a lesion. Abdominal ultrasound has none either: its classes are organs."""


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """A random generator whose state is a pure function of `seed` and `key`."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))


def picture(
    seed: int, modality: str, anatomy: str, name: str, index: int, size: int, lesion: bool | None = None
) -> Bytes:
    """Render image number `index` of the class `name`: grey values (size, size), a pure function of the arguments.

    `lesion` forces or prevents a lesion. By default all classes have one, except `normal`, `thyroid` and the organs of
    abdominal ultrasound.
    """
    random = generator(seed, modality, anatomy, name, index)
    scene = make_scene(size, random, modality, anatomy, name)
    if lesion is None:
        lesion = name not in HEALTHY and (modality, anatomy) != ("US", "abd")
    tissues = add_lesion(scene, anatomy, name) if lesion else physics.property_table()
    labels = scene.labels()
    if modality == "CT":
        return ct(labels, tissues, random, anatomy)
    if modality == "MR":
        return mr(labels, tissues, random, fat_saturation=anatomy in {"knee", "hip", "shoulder", "af"})
    return us(labels, tissues, random, linear=anatomy != "abd")


def add_lesion(scene: Scene, anatomy: str, name: str) -> Floats:
    """Add the lesion of the class `name` to a scene; return the properties of all tissues, including the lesion.

    The lesion's site, mean size, pattern, texture and contrast depend on the names of anatomy and class alone. Its size
    and position vary a little from image to image.
    """
    class_random = generator(0, anatomy, name)  # the same for all images of the class and all seeds
    in_name = [site for site in scene.sites if site in name]
    site = in_name[0] if in_name else sorted(scene.sites)[class_random.integers(len(scene.sites))]
    x, y, reach = scene.sites[site]
    radius = scene.vary(max(0.05, reach * class_random.uniform(0.4, 0.75)), 0.15)
    pattern = ("solid", "solid", "ring", "spots", "streaks")[class_random.integers(5)]
    shift = scene.random.normal(0, 0.15 * reach, 2)
    x, y = x + shift[0], y + shift[1]

    column, row = scene.pixels(np.array([x]), np.array([y]))
    limit = scene.size - 1
    surroundings = Tissue(scene.labels()[min(limit, max(0, int(row))), min(limit, max(0, int(column)))])
    scene.lesion((x, y, reach), radius, pattern)
    material = next((tissue for word, tissue in MATERIALS.items() if word in name), None)
    if material is not None:
        properties = physics.PROPERTIES[material]
        return physics.property_table(properties, properties)
    if surroundings in {Tissue.AIR, Tissue.LUNG}:
        surroundings = Tissue.ORGAN
    healthy = physics.PROPERTIES[surroundings]
    return physics.property_table(diseased(healthy, class_random), diseased(healthy, class_random))


def diseased(tissue: Property, random: np.random.Generator) -> Property:
    """A diseased form of a tissue: longer relaxation times, another CT number and a weaker echo."""
    sign = random.choice([-1, 1])
    return tissue._replace(
        hu=min(tissue.hu, 200) + sign * random.uniform(25, 70),
        t1=tissue.t1 * random.uniform(1.2, 2.0),
        t2=max(tissue.t2, 25) * random.uniform(1.4, 2.6),
        density=max(tissue.density, 0.6),
        echo=tissue.echo * random.uniform(0.2, 0.5),
        loss=tissue.loss * random.uniform(1.0, 2.2),
        texture=random.uniform(0.05, 0.2),
    )


def ct(labels: Bytes, tissues: Floats, random: np.random.Generator, anatomy: str) -> Bytes:
    """A CT image in the window of the anatomy; the dose and the pixel size are sampled per image."""
    photons = float(np.exp(random.uniform(np.log(1.5e5), np.log(1.2e6))))
    pixel_cm = physics.PIXEL_CM[anatomy] * 224 / len(labels) * random.uniform(0.92, 1.05)
    level, width = physics.WINDOWS[anatomy]
    return physics.windowed(physics.ct_numbers(labels, tissues, random, photons, pixel_cm), level, width)


def mr(labels: Bytes, tissues: Floats, random: np.random.Generator, fat_saturation: bool) -> Bytes:
    """An MR image; weighting, coil, noise and brightness are sampled per image.

    With `fat_saturation`, 70 % of the T2 and PD images have it.
    """
    weighting = ("T1", "T2", "PD")[random.integers(3)]
    saturated = fat_saturation and weighting != "T1" and random.random() < 0.7
    signal = physics.mr_signal(labels, tissues, weighting, saturated) * physics.texture(labels, tissues, random)
    signal = physics.blur(signal, 0.6) * physics.bias_field(random, len(labels), random.uniform(0.1, 0.25))
    bright = float(np.partition(signal.ravel(), -signal.size // 50)[-signal.size // 50])  # 98th percentile
    noisy = physics.rician(signal, bright * random.uniform(0.015, 0.05), random)
    return physics.quantised(noisy / np.float32(bright * random.uniform(1.05, 1.4)))


def us(labels: Bytes, tissues: Floats, random: np.random.Generator, linear: bool) -> Bytes:
    """An ultrasound image of a linear or a curved probe; gain and geometry are sampled per image."""
    if linear:
        probe = Probe(0.0, 0.0, random.uniform(1.75, 2.0), frequency=8.0, side_cm=5.0)
    else:
        probe = Probe(random.uniform(0.5, 0.66), random.uniform(0.35, 0.7), random.uniform(1.75, 1.9))
    envelope = physics.us_envelope(labels, tissues, probe, random)
    brightness = np.clip(physics.compressed(envelope, random.uniform(0, 8)), 0, 1)
    return physics.quantised(probe.scan_converted(brightness, len(labels)))

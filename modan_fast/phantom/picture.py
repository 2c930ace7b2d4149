"""One picture: the tissues of an anatomy, the mark of a class, and the physics of a modality."""

from __future__ import annotations

import zlib

import numpy as np

from modan_fast.phantom import physics
from modan_fast.phantom.anatomy import Scene, drawn
from modan_fast.phantom.physics import Bytes, Floats, Probe, Property, Tissue

MATTER = {
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
"""What a class whose name holds the word is made of; any other lesion is the tissue around it, changed."""

PLAIN = {
    "normal",
    "thyroid",
}  # classes without a lesion; nor has ultrasound of the belly, whose classes are organs


def generator(seed: int, *what: str | int) -> np.random.Generator:
    """The generator of `what`, a pure function of its arguments."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in what]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))


def picture(
    seed: int, modality: str, anatomy: str, name: str, index: int, size: int, lesion: bool | None = None
) -> Bytes:
    """Image number `index` of a class, (size, size) grey values: a pure function of the arguments.

    `lesion` overrules whether one is drawn; as default all classes have one, except `normal`, `thyroid`
    and the organs of abdominal ultrasound.
    """
    random = generator(seed, modality, anatomy, name, index)
    scene = drawn(size, random, modality, anatomy, name)
    if lesion is None:
        lesion = name not in PLAIN and (modality, anatomy) != ("US", "abd")
    tissues = mark(scene, anatomy, name) if lesion else physics.table()
    labels = scene.labels()
    if modality == "CT":
        return ct(labels, tissues, random, anatomy)
    if modality == "MR":
        return mr(labels, tissues, random, fat_saturation=anatomy in {"knee", "hip", "shoulder", "af"})
    return us(labels, tissues, random, linear=anatomy != "abd")


def mark(scene: Scene, anatomy: str, name: str) -> Floats:
    """Draw the class's lesion into a scene; the properties of all tissues, the lesion's included.

    Where it sits, how large it is, its texture and its contrast follow from the names of anatomy and class
    alone; size and position then vary a little from image to image.
    """
    habit = generator(0, anatomy, name)  # the same for all images of the class, whatever the seed
    named = [place for place in scene.places if place in name]
    place = named[0] if named else sorted(scene.places)[habit.integers(len(scene.places))]
    x, y, reach = scene.places[place]
    radius = scene.vary(max(0.05, reach * habit.uniform(0.4, 0.75)), 0.15)
    kind = ("solid", "solid", "ring", "spots", "streaks")[habit.integers(5)]
    sideways = scene.random.normal(0, 0.15 * reach, 2)
    where = (x + sideways[0], y + sideways[1], reach)

    column, row = scene.pixels(np.array([where[0]]), np.array([where[1]]))
    limit = scene.size - 1
    around = Tissue(scene.labels()[min(limit, max(0, int(row))), min(limit, max(0, int(column)))])
    scene.lesion(where, radius, kind)
    matter = next((tissue for word, tissue in MATTER.items() if word in name), None)
    if matter is not None:
        own = physics.PROPERTIES[matter]
        return physics.table(own, own)
    if around in {Tissue.AIR, Tissue.LUNG}:
        around = Tissue.ORGAN
    return physics.table(*(changed(physics.PROPERTIES[around], habit) for _ in range(2)))


def changed(tissue: Property, habit: np.random.Generator) -> Property:
    """A diseased tissue: as the given one, with longer relaxation, another density, and a weaker echo."""
    sign = habit.choice([-1, 1])
    return tissue._replace(
        hu=min(tissue.hu, 200) + sign * habit.uniform(25, 70),
        t1=tissue.t1 * habit.uniform(1.2, 2.0),
        t2=max(tissue.t2, 25) * habit.uniform(1.4, 2.6),
        density=max(tissue.density, 0.6),
        echo=tissue.echo * habit.uniform(0.2, 0.5),
        loss=tissue.loss * habit.uniform(1.0, 2.2),
        texture=habit.uniform(0.05, 0.2),
    )


def ct(labels: Bytes, tissues: Floats, random: np.random.Generator, anatomy: str) -> Bytes:
    """A CT image: with a dose drawn per image, in the window of the anatomy."""
    photons = float(np.exp(random.uniform(np.log(1.5e5), np.log(1.2e6))))
    pixel_cm = physics.PIXEL_CM[anatomy] * 224 / len(labels) * random.uniform(0.92, 1.05)
    level, width = physics.WINDOWS[anatomy]
    return physics.windowed(physics.ct_numbers(labels, tissues, random, photons, pixel_cm), level, width)


def mr(labels: Bytes, tissues: Floats, random: np.random.Generator, fat_saturation: bool) -> Bytes:
    """An MR image: weighting, coil, noise and brightness drawn per image; joints often with fat saturation."""
    weighting = ("T1", "T2", "PD")[random.integers(3)]
    saturated = fat_saturation and weighting != "T1" and random.random() < 0.7
    signal = physics.mr_signal(labels, tissues, weighting, saturated) * physics.texture(labels, tissues, random)
    signal = physics.blur(signal, 0.6) * physics.bias_field(random, len(labels), random.uniform(0.1, 0.25))
    top = float(np.partition(signal.ravel(), -signal.size // 50)[-signal.size // 50])
    noisy = physics.rician(signal, top * random.uniform(0.015, 0.05), random)
    return physics.quantised(noisy / np.float32(top * random.uniform(1.05, 1.4)))


def us(labels: Bytes, tissues: Floats, random: np.random.Generator, linear: bool) -> Bytes:
    """An ultrasound image: a linear probe or a curved one, with gain and geometry drawn per image."""
    if linear:
        probe = Probe(0.0, 0.0, random.uniform(1.75, 2.0), frequency=8.0, side_cm=5.0)
    else:
        probe = Probe(random.uniform(0.5, 0.66), random.uniform(0.35, 0.7), random.uniform(1.75, 1.9))
    envelope = physics.us_envelope(labels, tissues, probe, random)
    bright = np.clip(physics.compressed(envelope, random.uniform(0, 8)), 0, 1)
    return physics.quantised(probe.picture(bright, len(labels)))

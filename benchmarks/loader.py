"""How many images a second become two augmented views each, beside the usual ways of loading them?

Every candidate delivers float32 views in [0, 1] of the paper's augmentation, crop, flip, brightness and contrast, in
batches. Saturation, hue and RandomGrayscale change nothing on one channel, and no candidate spends time on them.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from common import device_of, in_turn, options, positive, publish, synchronise
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import v2

from modan_fast.config import Augmentation
from modan_fast.decode import dali_installed
from modan_fast.loader import Loader
from modan_fast.render import Rendering, open_renderer
from modan_fast.shards import ShardSet, open_shards
from modan_fast.store import Memory, Store, read_all
from modan_fast.stream import Stream
from shard_builder.build import build
from shard_builder.options import BuildOptions
from shard_builder.settings import usable_cores

AUGMENTATION = Augmentation()
CLASSES = ("CT/lung/Nodule", "CT/abd/liver_lesion", "MR/brain/edema", "MR/knee/normal", "US/abd/liver")
BASELINES = ("pillow-0", "pillow", "pillow-rgb", "webdataset", "tensors", "dali-tars")
NAMES = (*BASELINES, "stream", "dali", "torch")


@dataclass(frozen=True)
class Candidate:
    """Batches (V, 1, H, H) without end from `open`; they come in bursts of as many as there are workers."""

    title: str
    open: Callable[[], Iterator[Tensor]]
    burst: int = 1


class EndlessOrder(Sampler[int]):
    """All samples in a new order each epoch, epoch after epoch, so that no worker ever waits for an epoch's end."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.samples).tolist()


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image that `read` returns."""

    def __init__(self, read: Callable[[int], Any], transform: Callable[[Any], Tensor]) -> None:
        self.read, self.transform = read, transform

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return two_views(self.transform, self.read(index))


def two_views(transform: Callable[[Any], Tensor], image: Any) -> tuple[Tensor, Tensor]:
    return transform(image), transform(image)


def collate(samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All first views, then all second ones."""
    return torch.stack([first for first, _ in samples] + [second for _, second in samples])


def read_file(paths: list[Path], index: int) -> Image.Image:
    return Image.open(paths[index]).convert("L")


def read_member(sample: tuple[bytes]) -> Image.Image:
    return Image.open(io.BytesIO(sample[0])).convert("L")


def as_shipped(files: list[Path], folder: Path) -> list[Path]:
    """The images as most of RadImageNet's are shipped: PNG of three equal channels."""
    folder.mkdir()
    copies = []
    for number, path in enumerate(files):
        copies.append(folder / f"{number:06}.png")
        Image.open(path).convert("RGB").save(copies[-1])
    return copies


def augmented(library: Any, size: int, *last: Any, published: bool = False) -> Any:
    """The paper's augmentation, from torchvision's first or second transforms.

    As `published` it has steps that change nothing on one channel.
    """
    colour = {"saturation": 0.4, "hue": 0.1} if published else {}
    jitter = library.ColorJitter(brightness=AUGMENTATION.brightness, contrast=AUGMENTATION.contrast, **colour)
    last = (library.RandomGrayscale(0.2), *last) if published else last
    return library.Compose(
        [
            library.RandomResizedCrop(size, scale=AUGMENTATION.scale, ratio=AUGMENTATION.ratio, antialias=True),
            library.RandomHorizontalFlip(AUGMENTATION.flip),
            library.RandomApply([jitter], p=AUGMENTATION.jitter),
            *last,
        ]
    )


def torch_batches(
    data: Any, order: EndlessOrder | None, batch_size: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Batches of a torch DataLoader; its workers stop when the iterator is closed."""
    on_gpu = device.type == "cuda"
    batches = DataLoader(
        data, batch_size, sampler=order, num_workers=workers, collate_fn=collate, pin_memory=on_gpu
    )
    for views in batches:
        yield views.to(device, non_blocking=True)


def store_batches(
    store: Store, renderer: Any, *, size: int, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Batches of modan-fast's loader, epoch after epoch."""
    opened = open_renderer(
        renderer,
        Rendering(
            canvas=store.canvas,
            size=size,
            batch_size=2 * batch_size,
            device=device,
            dtype=torch.float32,
            threads=usable_cores(),
        ),
    )
    loader = Loader(store, opened, AUGMENTATION, batch_size=batch_size, drop_last=True)
    for batch in loader.endless():
        yield batch.views


def dali_batches(tars: list[Path], size: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of a pipeline of DALI's own: its reader of tars, its random numbers, decoding anew each epoch."""
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    pipeline = Pipeline(batch_size, usable_cores(), device_id=0 if gpu else None, seed=0)
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["png"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=batch_size,
        )
        images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.GRAY)
        views = []
        for _ in range(2):
            view = fn.random_resized_crop(
                images,
                size=(size, size),
                random_area=AUGMENTATION.scale,
                random_aspect_ratio=AUGMENTATION.ratio,
                antialias=True,
            )
            view = fn.flip(view, horizontal=fn.random.coin_flip(probability=AUGMENTATION.flip))
            jitter = fn.random.coin_flip(probability=AUGMENTATION.jitter)
            brightness = 1 + jitter * fn.random.uniform(range=(-AUGMENTATION.brightness, AUGMENTATION.brightness))
            contrast = 1 + jitter * fn.random.uniform(range=(-AUGMENTATION.contrast, AUGMENTATION.contrast))
            bright = fn.brightness_contrast(view, brightness=brightness)
            mean = fn.reductions.mean(bright)
            # About the view's own mean, as torchvision has it.
            view = fn.brightness_contrast(bright, contrast=contrast, contrast_center=mean.cpu() if gpu else mean)
            views.append(fn.crop_mirror_normalize(view, dtype=types.FLOAT, mean=[0.0], std=[255.0]))
        pipeline.set_outputs(*views)
    pipeline.build()
    while True:
        yield torch.cat([torch.from_dlpack(view.as_tensor()) for view in pipeline.run()])


def make_images(folder: Path, count: int, size: int) -> None:
    """Grey PNG files about as large as those of radiology: tissue in octaves on black, with a little noise."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        tissue = np.zeros((size, size), np.float32)
        for cells in (4, 12, 36):
            octave = Image.fromarray(generator.normal(0, 80 / cells**0.5, (cells, cells)).astype(np.float32))
            tissue += np.asarray(octave.resize((size, size), Image.Resampling.BICUBIC))
        body = (rows / generator.uniform(0.7, 1)) ** 2 + (columns / generator.uniform(0.7, 1)) ** 2 < 1
        noisy = 110 + tissue + generator.normal(0, 3, (size, size))
        pixels = np.where(body, noisy, 0).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / CLASSES[number % len(CLASSES)] / f"{number:06}.png")


def prepare(arguments: Any, scratch: Path) -> tuple[list[Path], ShardSet]:
    """The image files, and the same images as shards; what is not given is made of the other, or from nothing."""
    images, shards = arguments.images, arguments.shards
    if images is None and shards is None:
        images = scratch / "images"
        make_images(images, arguments.images_count, arguments.size)
    if shards is None:
        shards = scratch / "shards"
        # Small shards, so that each worker of the webdataset library finds its own.
        build(images, shards, BuildOptions(per_class=0, size=arguments.size, samples_per_shard=64))
    opened = open_shards(shards)
    if images is None:
        images = scratch / "images"
        images.mkdir()
        for name, data in members(opened):
            if name.endswith(".png"):
                (images / name).write_bytes(data)
    return sorted(images.rglob("*.png")), opened


def shards_or_made(given: Path | None, scratch: Path, count: int) -> ShardSet:
    """The shard set `given`, or one of `count` synthetic images of 224 pixels, made in `scratch`."""
    if given is None:
        make_images(scratch / "images", count, 224)
        given = scratch / "shards"
        build(scratch / "images", given, BuildOptions(per_class=0))
    return open_shards(given)


def members(shards: ShardSet) -> Iterator[tuple[str, bytes]]:
    """Name and content of all files in the tars of a shard set, in storage order."""
    for path in tars_of(shards):
        with tarfile.open(path) as tar:
            for each in tar:
                content = tar.extractfile(each)
                assert content is not None
                yield each.name, content.read()


def tars_of(shards: ShardSet) -> list[Path]:
    """The shards' files, in storage order."""
    return [Path(shards.place) / shard.name for shard in shards.manifest.shards]


def candidates_of(
    arguments: Any, files: list[Path], shards: ShardSet, store: Memory, device: torch.device, scratch: Path
) -> dict[str, Candidate]:
    """The candidates that `arguments` name, by their short names."""
    size, batch_size, cores = arguments.size, arguments.batch_size, usable_cores()
    on_images = augmented(transforms, size, transforms.ToTensor())
    on_tensors = augmented(v2, size, v2.ToDtype(torch.float32, scale=True))
    from_files = TwoViews(partial(read_file, files), on_images)
    coloured = as_shipped(files, scratch / "rgb") if "pillow-rgb" in arguments.only else []
    from_coloured = TwoViews(partial(read_file, coloured), on_images)
    from_memory = TwoViews(store.pixels.cpu()[:, None].__getitem__, on_tensors)
    # Shards drawn at random without end: every worker is busy, however many there are.
    members = webdataset.WebDataset([str(path) for path in tars_of(shards)], resampled=True, shardshuffle=False)
    from_tars = members.shuffle(batch_size).to_tuple("png").map(read_member).map(partial(two_views, on_images))

    def torch_loader(data: Any, samples: int | None, workers: int) -> Callable[[], Iterator[Tensor]]:
        order = EndlessOrder(samples) if samples else None
        return partial(torch_batches, data, order, batch_size, workers, device)

    many = f"{cores} workers"
    candidates = {
        "pillow-0": Candidate("Pillow + torchvision, 0 workers", torch_loader(from_files, len(files), 0)),
        "pillow": Candidate(f"Pillow + torchvision, {many}", torch_loader(from_files, len(files), cores), cores),
        "pillow-rgb": Candidate(
            f"Pillow + torchvision, {many}, RGB files", torch_loader(from_coloured, len(files), cores), cores
        ),
        "webdataset": Candidate(f"webdataset + Pillow, {many}", torch_loader(from_tars, None, cores), cores),
        "tensors": Candidate(
            f"torchvision v2 on tensors, {many}", torch_loader(from_memory, len(store.pixels), cores), cores
        ),
    }
    ours = partial(store_batches, size=size, batch_size=batch_size, device=device)
    if dali_installed():
        tars = tars_of(shards)
        stream = Stream(shards, renderer="dali", batch_size=batch_size, threads=cores)
        candidates |= {
            "dali-tars": Candidate(
                "DALI alone, from PNG tars", partial(dali_batches, tars, size, batch_size, device)
            ),
            "stream": Candidate("modan-fast, DALI, streaming PNG tars", partial(ours, stream, "dali")),
            "dali": Candidate("modan-fast, DALI from the store", partial(ours, store, "dali")),
        }
    candidates["torch"] = Candidate("modan-fast, torch from the store", partial(ours, store, "torch"))
    return {name: each for name, each in candidates.items() if name in arguments.only}


def check(candidates: dict[str, Candidate], batch_size: int, size: int) -> None:
    """Compare a batch of each candidate in shape, type, range and, within what chance allows, mean grey value."""
    expected: Tensor | None = None
    for each in candidates.values():
        batches = each.open()
        views = next(batches).cpu()
        batches.close()  # type: ignore[attr-defined]
        assert views.shape == (2 * batch_size, 1, size, size), f"{each.title}: {views.shape}"
        assert views.dtype == torch.float32, f"{each.title}: {views.dtype}"
        assert float(views.min()) >= 0, f"{each.title}: {views.min()}"
        assert 0.5 < float(views.max()) <= 1, f"{each.title}: {views.max()}"
        means = views.mean((1, 2, 3))
        expected = means if expected is None else expected
        allowed = 0.03 * expected.mean() + 4 * expected.std() / batch_size**0.5
        difference = (means.mean() - expected.mean()).abs()
        assert difference <= allowed, f"{each.title}: mean grey value off by {difference:.3f} of 1"


def images_per_second(candidate: Candidate, batch_size: int, seconds: float, device: torch.device) -> list[float]:
    """One timing of at least `seconds`, in whole bursts, after two bursts that hold the workers' start."""
    batches = candidate.open()
    for _ in range(2 * candidate.burst):
        next(batches)
    synchronise(device)
    start, images, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        for _ in range(candidate.burst):
            next(batches)
            images += batch_size
        synchronise(device)
        elapsed = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return [images / elapsed]


def main() -> None:
    parser = options((__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--images", type=Path, help="folder MODALITY/anatomy/class/*.png; synthetic if not given")
    parser.add_argument("--shards", type=Path, help="the same images as PNG shards; made from them if not given")
    parser.add_argument("--images-count", type=positive, default=1024, help="synthetic images to make")
    parser.add_argument("--size", type=positive, default=224, help="side of images and views in pixels")
    parser.add_argument("--batch-size", type=positive, default=256, help="images in a batch")
    parser.add_argument("--seconds", type=float, default=10, help="least time of each timing")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="candidates to run")
    arguments = parser.parse_args()
    device = device_of(arguments.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        files, shards = prepare(arguments, Path(scratch))
        if shards.manifest.codec != "png" or min(len(files), shards.manifest.samples) < arguments.batch_size:
            parser.error("needs PNG shards and at least as many images as a batch has")
        if dali_installed():
            import nvidia.dali  # noqa: F401  # its import is not part of filling the store
        start = time.perf_counter()
        store = read_all(
            shards, place="gpu" if device.type == "cuda" else "host", device=device, threads=usable_cores()
        )
        synchronise(device)
        filling = time.perf_counter() - start
        candidates = candidates_of(arguments, files, shards, store, device, Path(scratch))
        check(candidates, arguments.batch_size, arguments.size)
        measured = in_turn(
            {
                each.title: partial(images_per_second, each, arguments.batch_size, arguments.seconds, device)
                for each in candidates.values()
            },
            arguments.rounds,
            "images/s",
        )
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000
    ratios = {
        f"{candidates[ours].title} / {candidates[other].title}, of medians": median(
            measured[candidates[ours].title]
        )
        / median(measured[candidates[other].title])
        for ours in ("torch", "dali")
        for other in (*BASELINES, "stream")
        if ours in candidates and other in candidates
    }
    publish(
        "loader",
        measured,
        unit="images/s",
        ratios=ratios,
        notes=[
            f"Two views of {arguments.size} px of each image, batches of {arguments.batch_size}; {len(files):,} grey "
            f"PNG files of {kilobytes:.1f} kB on average, in the page cache; `RGB files` are the same with three equal "
            "channels, as most of RadImageNet's are shipped.",
            f"Filling the store, once and not counted: {filling:.2f} s, {len(store.pixels) / filling:,.0f} images/s.",
            "The start of workers is not counted; all candidates agree in shape, type, range and mean grey value.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()

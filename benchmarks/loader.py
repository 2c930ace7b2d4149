"""How many images a second become two augmented views each, beside the usual ways of loading them?

Every candidate delivers batches of float32 views in [0, 1] with the paper's augmentation: crop, flip, brightness and
contrast. Saturation, hue and RandomGrayscale change nothing on one channel, and no candidate spends time on them.

B images a batch, V = 2B views of H x H pixels.
"""

from __future__ import annotations

import io
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import webdataset
from common.baselines import AUGMENTATION, TwoViews, augmentation, read_file, torch_batches, two_views
from common.images import image_files, shard_set
from common.measuring import in_turn, options, positive, publish
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from modan_fast.config import RendererName
from modan_fast.decode import dali_installed
from modan_fast.devices import pick_device, synchronise
from modan_fast.loader import Loader
from modan_fast.render import Rendering, open_renderer
from modan_fast.shards import ShardSet
from modan_fast.store import InMemoryStore, MemoryTier, Store, read_all
from modan_fast.stream import Stream
from shard_builder.settings import usable_cores

BASELINES = ("pillow-0", "pillow", "pillow-rgb", "webdataset", "tensors", "dali-tars")
NAMES = (*BASELINES, "stream", "dali", "torch")

Batches = Generator[Tensor, None, None]
"""Views (V, 1, H, H) of batch after batch, without end."""


@dataclass(frozen=True)
class Candidate:
    """A way of loading. Its batches arrive in bursts of `burst`, the number of its workers."""

    title: str
    open: Callable[[], Batches]
    burst: int = 1


def read_member(sample: tuple[bytes]) -> Image.Image:
    """The grey image of a sample from webdataset."""
    return Image.open(io.BytesIO(sample[0])).convert("L")


def rgb_copies(files: Iterable[Path], folder: Path) -> list[Path]:
    """The images as most of RadImageNet's are shipped: PNG of three equal channels."""
    folder.mkdir()
    copies = []
    for number, path in enumerate(files):
        copies.append(folder / f"{number:06}.png")
        Image.open(path).convert("RGB").save(copies[-1])
    return copies


def torch_views(
    data: object, samples: int | None, batch_size: int, workers: int, device: torch.device
) -> Batches:
    """The views of a torch DataLoader."""
    for views, _ in torch_batches(data, samples, batch_size, workers, device):
        yield views


def our_views(
    store: Store, renderer: RendererName, *, size: int, batch_size: int, device: torch.device
) -> Batches:
    """The views of modan-fast's loader."""
    rendering = Rendering(
        canvas=store.canvas,
        size=size,
        batch_size=2 * batch_size,
        device=device,
        dtype=torch.float32,
        threads=usable_cores(),
    )
    loader = Loader(
        store, open_renderer(renderer, rendering), AUGMENTATION, batch_size=batch_size, drop_last=True
    )
    for batch in loader.endless():
        yield batch.views


def dali_views(tars: list[Path], size: int, batch_size: int, device: torch.device) -> Batches:
    """The views of DALI alone: its own reader of tars and random numbers, decoding anew each epoch."""
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    pipeline = Pipeline(batch_size, usable_cores(), device_id=device.index if gpu else None, seed=0)
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
            # About the view's own mean, as in torchvision.
            view = fn.brightness_contrast(bright, contrast=contrast, contrast_center=mean.cpu() if gpu else mean)
            views.append(fn.crop_mirror_normalize(view, dtype=types.FLOAT, mean=[0.0], std=[255.0]))
        pipeline.set_outputs(*views)
    pipeline.build()
    while True:
        yield torch.cat([torch.from_dlpack(view.as_tensor()) for view in pipeline.run()])


def candidates_of(
    arguments: Namespace,
    files: list[Path],
    shards: ShardSet,
    store: InMemoryStore,
    device: torch.device,
    scratch: Path,
) -> dict[str, Candidate]:
    """The candidates that `--only` lists, by their short names."""
    size, batch_size, cores = arguments.size, arguments.batch_size, usable_cores()
    tars = [Path(shards.location) / shard.name for shard in shards.manifest.shards]
    on_images = augmentation(transforms, size, transforms.ToTensor())
    on_tensors = augmentation(v2, size, v2.ToDtype(torch.float32, scale=True))
    from_files = TwoViews(partial(read_file, files), on_images)
    rgb_files = rgb_copies(files, scratch / "rgb") if "pillow-rgb" in arguments.only else []
    from_rgb_files = TwoViews(partial(read_file, rgb_files), on_images)
    from_memory = TwoViews(store.pixels.cpu()[:, None].__getitem__, on_tensors)
    # Shards are sampled at random without end, so every worker is busy, however many there are.
    members = webdataset.WebDataset([str(tar) for tar in tars], resampled=True, shardshuffle=False)
    from_tars = members.shuffle(batch_size).to_tuple("png").map(read_member).map(partial(two_views, on_images))

    def with_torch(title: str, data: object, samples: int | None, workers: int = cores) -> Candidate:
        batches = partial(torch_views, data, samples, batch_size, workers, device)
        return Candidate(title, batches, burst=max(1, workers))

    many = f"{cores} workers"
    candidates = {
        "pillow-0": with_torch("Pillow + torchvision, 0 workers", from_files, len(files), 0),
        "pillow": with_torch(f"Pillow + torchvision, {many}", from_files, len(files)),
        "pillow-rgb": with_torch(f"Pillow + torchvision, {many}, RGB files", from_rgb_files, len(files)),
        "webdataset": with_torch(f"webdataset + Pillow, {many}", from_tars, None),
        "tensors": with_torch(f"torchvision v2 on tensors, {many}", from_memory, len(store.pixels)),
    }
    ours = partial(our_views, size=size, batch_size=batch_size, device=device)
    if dali_installed():
        stream = Stream(shards, renderer="dali", batch_size=batch_size, threads=cores)
        candidates |= {
            "dali-tars": Candidate(
                "DALI alone, from PNG tars", partial(dali_views, tars, size, batch_size, device)
            ),
            "stream": Candidate("modan-fast, DALI, streaming PNG tars", partial(ours, stream, "dali")),
            "dali": Candidate("modan-fast, DALI from the store", partial(ours, store, "dali")),
        }
    candidates["torch"] = Candidate("modan-fast, torch from the store", partial(ours, store, "torch"))
    return {name: each for name, each in candidates.items() if name in arguments.only}


def check(candidates: Iterable[Candidate], batch_size: int, size: int) -> None:
    """Compare a batch of each candidate in shape, type, range and, within chance, mean grey value."""
    expected: Tensor | None = None
    for each in candidates:
        with closing(each.open()) as batches:
            views = next(batches).cpu()
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
    """One timing of at least `seconds`, in whole bursts, after two bursts that include the workers' start."""
    with closing(candidate.open()) as batches:
        for _ in range(2 * candidate.burst):
            next(batches)
        synchronise(device)
        begun, images, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < seconds:
            for _ in range(candidate.burst):
                next(batches)
                images += batch_size
            synchronise(device)
            elapsed = time.perf_counter() - begun
    return [images / elapsed]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=Path, help="folder MODALITY/anatomy/class/*.png; synthetic if not given")
    parser.add_argument("--shards", type=Path, help="the same images as PNG shards; made from them if not given")
    parser.add_argument("--images-count", type=positive, default=1024, help="synthetic images to make")
    parser.add_argument("--size", type=positive, default=224, help="side of images and views in pixels")
    parser.add_argument("--batch-size", type=positive, default=256, help="images in a batch")
    parser.add_argument("--seconds", type=float, default=10, help="least time of each timing")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="candidates to run")
    arguments = parser.parse_args()
    device, batch_size = pick_device(arguments.device), arguments.batch_size
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shards = shard_set(
            arguments.shards,
            scratch,
            images=arguments.images,
            count=arguments.images_count,
            size=arguments.size,
        )
        if shards.manifest.codec != "png":
            parser.error("--shards must hold PNG images")
        if arguments.images:
            files = sorted(arguments.images.rglob("*.png"))
        else:
            files, _ = image_files(shards, scratch / "files")
        if min(len(files), shards.manifest.samples) < batch_size:
            parser.error(f"--batch-size {batch_size} is more than the images: choose a smaller one")
        if dali_installed():
            import nvidia.dali  # noqa: F401  # its import is not part of filling the store
        begun = time.perf_counter()
        tier: MemoryTier = "gpu" if device.type == "cuda" else "host"
        store = read_all(shards, tier=tier, device=device, threads=usable_cores())
        synchronise(device)
        filling = time.perf_counter() - begun
        candidates = candidates_of(arguments, files, shards, store, device, scratch)
        check(candidates.values(), batch_size, arguments.size)
        measured = in_turn(
            {
                each.title: partial(images_per_second, each, batch_size, arguments.seconds, device)
                for each in candidates.values()
            },
            arguments.rounds,
            "images/s",
        )
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000
    publish(
        "loader",
        measured,
        unit="images/s",
        ratios=[
            (candidates[ours].title, candidates[other].title)
            for ours in ("torch", "dali")
            for other in (*BASELINES, "stream")
            if ours in candidates and other in candidates
        ],
        notes=[
            f"Two views of {arguments.size} px of each image, batches of {batch_size}; {len(files):,} grey "
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

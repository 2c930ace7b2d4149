"""Pixels and parameters to views: DALI on a GPU, torch or DALI on a CPU, and the reference that they agree with.

A renderer is given work with `submit` and hands the views over with `collect`, in the same order; between the
two it works in the background, so the next batch is made while this one trains.

N images, S x S canvas, H x H view, V = 2N views, rows i and i + N of one image (V = N for supervised training).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from modan_fast import config
from modan_fast.augment import ViewParameters
from modan_fast.decode import dali_installed
from shard_builder.settings import InputError

PART = 16  # views that a thread makes together: so many operations fewer for which threads wait for one another


class Renderer(Protocol):
    """What the loader needs of a renderer."""

    name: str

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """Start the views of `pixels` (N, S, S) uint8; `view` holds the parameters of all V of them, in order."""

    def collect(self) -> Tensor:
        """The oldest submitted views, (V, 1, H, H) in [0, 1], channels-last; waits until they are made."""


@dataclass(frozen=True)
class Rendering:
    """How views are made: up to `batch_size` at a time, of `size` pixels, from images of `canvas` pixels, on `device`
    in `dtype`, by `threads` of the CPU; `blur` says whether any is blurred.
    """

    canvas: int
    size: int
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    threads: int
    blur: bool = False

    @property
    def warp(self) -> bool:
        """Whether DALI resizes by its warp, which does not antialias, but is up to 2.5 times as fast on a CPU."""
        # Where no crop is larger than a view there is nothing to antialias.
        return self.device.type == "cpu" and self.canvas <= self.size


def open_renderer(name: config.Renderer, rendering: Rendering) -> Renderer:
    """The renderer that `name` stands for; `auto` is DALI on a GPU, where it is installed, and torch on a CPU.

    Raises `InputError` where DALI is asked for and missing.
    """
    if name == "dali" and not dali_installed():
        raise InputError("--renderer dali needs NVIDIA DALI, which is for Linux only: pass --renderer torch")
    if name == "torch" or not dali_installed() or (name == "auto" and rendering.device.type == "cpu"):
        return TorchRenderer(rendering)
    return DaliRenderer(rendering)


def render_view(pixels: Tensor | list[Tensor], view: ViewParameters, size: int) -> Tensor:
    """The reference: views of `pixels` (N, S, S) uint8 as float32 (V, 1, size, size) in [0, 1].

    `view` holds the parameters of one view of each image, or of the first views of all and then the second.
    Crop, antialiased bilinear resize, flip, brightness, then contrast about the view's own mean, both clamped
    to the range, then blur, as torchvision's functional operations do without their rounding to 8 bits.
    """
    crops = []
    images = [*pixels] * (len(view.flip) // len(pixels))
    for image, (top, left, height, width), flip in zip(images, view.box.tolist(), view.flip, strict=True):
        crop = image[None, None, top : top + height, left : left + width].float()
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if flip else crop)
    views = torch.cat(crops) / 255
    factors = torch.from_numpy(np.stack([view.brightness, view.contrast])).to(views.device)
    brightness, contrast = factors[..., None, None, None]
    views = (views * brightness).clamp(0, 1)
    mean = views.mean((1, 2, 3), keepdim=True)
    views = ((views - mean) * contrast + mean).clamp(0, 1)
    window = blur_window(size)
    for number in np.flatnonzero(view.sigma):
        views[number] = gaussian_blur(views[number], [window, window], [float(view.sigma[number])] * 2)
    return views.clamp_(0, 1)  # a blur's weights may sum to a little more than 1


def blur_window(size: int) -> int:
    """Width of the Gaussian kernel in pixels: odd, and about a tenth of the view, as SimCLR has it."""
    return 2 * (size // 20) + 1


class TorchRenderer:
    """Renders with torch where the pixels are to be: on a CPU in threads, elsewhere with `render_view`.

    On a CPU it is about as fast as DALI, and faster where crops are reduced.
    """

    name = "torch"

    def __init__(self, rendering: Rendering) -> None:
        self.size, self.device, self.dtype = rendering.size, rendering.device, rendering.dtype
        # Views are enough to keep all cores busy: an operation needs no threads of its own.
        self._threads = ThreadPoolExecutor(
            rendering.threads, "render", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._pending: deque[list[Future[Tensor]]] = deque()

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """See `Renderer.submit`."""
        if self.device.type != "cpu":
            # Where they are shown, not where they lie: so that views are the same from all tiers.
            assert isinstance(pixels, Tensor)
            there = pixels.to(self.device, non_blocking=True)
            self._pending.append([self._threads.submit(render_view, there, view, self.size)])
            return
        count = len(view.flip)
        # In channels-last layout, as convolutions are told to work.
        views = torch.empty((count, self.size, self.size, 1)).permute(0, 3, 1, 2)
        parts = (slice(start, min(start + PART, count)) for start in range(0, count, PART))
        self._pending.append([self._threads.submit(draw, pixels, view, part, views) for part in parts])

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        views = [part.result() for part in self._pending.popleft()][-1]
        return views.to(self.device, self.dtype, memory_format=torch.channels_last)


def draw(pixels: Tensor | list[Tensor], view: ViewParameters, part: slice, views: Tensor) -> Tensor:
    """Write a part of the views of `pixels` (N, S, S) to `views` (V, 1, H, H) float32, which is returned.

    As `render_view`, but for the resized image, which is rounded to 8 bits, as torchvision's is.
    """
    size, window = views.shape[-1], blur_window(views.shape[-1])
    boxes, flips = view.box[part].tolist(), view.flip[part].tolist()
    made = torch.empty((len(boxes), 1, size, size))
    for row, ((top, left, height, width), flip) in enumerate(zip(boxes, flips, strict=True)):
        crop = pixels[(part.start + row) % len(pixels)][None, None, top : top + height, left : left + width]
        crop = crop.flip(-1) if flip else crop
        made[row] = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
    factors = torch.from_numpy(np.stack([view.brightness[part], view.contrast[part]]))
    brightness, contrast = factors[..., None, None, None]
    made.mul_(brightness / 255).clamp_(max=1)
    mean = made.mean((2, 3), keepdim=True)
    made.mul_(contrast).add_(mean * (1 - contrast))
    shown = torch.clamp(made, 0, 1, out=views[part])
    for row, sigma in enumerate(view.sigma[part].tolist()):
        if sigma:
            shown[row] = gaussian_blur(shown[row], [window, window], [sigma, sigma]).clamp(0, 1)
    return views


def dali_pipeline(rendering: Rendering, stages: int | None = None) -> Any:
    """The DALI pipeline for a CPU or a GPU: uint8 images and parameters in, float32 views in [0, 1] out.

    `stages` cuts it off after so many of its `dali_stages`, for whoever wants to know what each costs.
    """
    from nvidia.dali import Pipeline, fn, types

    place = "gpu" if rendering.device.type == "cuda" else "cpu"
    pipeline = Pipeline(
        batch_size=rendering.batch_size,
        num_threads=rendering.threads,
        device_id=rendering.device.index if place == "gpu" else None,
        # One batch in flight: the loader submits the next one before it hands over this one.
        prefetch_queue_depth=1,
        # With it an output is its receiver's own, and the next run writes elsewhere.
        exec_dynamic=True,
    )

    with pipeline:
        images = fn.external_source(
            name="pixels",
            device=place,
            dtype=types.UINT8,
            ndim=3,
            layout="HWC",
            batch=True,
            # On the CPU it reads the rows where they lie, those of the first view again for the second.
            no_copy=place == "cpu",
        )
        *_, view = islice(dali_stages(images, rendering), stages)
        pipeline.set_outputs(view)
    pipeline.build()
    return pipeline


def contrasted(views: Any, means: Any, contrast: Any) -> Any:
    """DALI's uint8 views with another contrast about `means`, by arithmetic, rounded and saturated."""
    from nvidia.dali import fn, types

    return fn.cast((views - means) * contrast + means, dtype=types.UINT8)


def dali_stages(images: Any, rendering: Rendering) -> Iterator[Any]:
    """What becomes of `images` stage by stage, inside a pipeline.

    The stages are crop, resize, brightness, its mean, contrast, blur where there is any, and float32. All but the
    mean and the last saturate and round to 8 bits, as torchvision's operations on 8-bit images do.
    """
    from nvidia.dali import fn, types

    def argument(name: str, ndim: int, dtype: Any = types.FLOAT) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True)

    # Sliced first, because a region of interest would let its surroundings bleed into its edges.
    crop = fn.slice(
        images,
        start=argument("corner", 1, types.INT32),
        shape=argument("extent", 1, types.INT32),
        axes=(0, 1),
    )
    yield crop
    size = (rendering.size, rendering.size)
    if rendering.warp:
        resized = fn.experimental.warp_perspective(
            crop, matrix=argument("matrix", 2), size=size, border_mode="replicate"
        )
    else:
        resized = fn.resize(
            crop,
            size=size,
            roi_start=argument("start", 1),
            roi_end=argument("end", 1),
            roi_relative=True,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            # All views in one kernel; by default a GPU takes 32 at a time.
            minibatch_size=rendering.batch_size,
        )
    yield resized
    bright = fn.brightness_contrast(resized, brightness=argument("brightness", 0))
    yield bright
    mean = fn.reductions.mean(bright)
    yield mean
    contrast = argument("contrast", 0)
    if rendering.device.type == "cuda":
        # As an operator's argument, DALI would wait for the mean on the host.
        view = contrasted(bright, mean, contrast.gpu())
    else:
        view = fn.brightness_contrast(bright, contrast=contrast, contrast_center=mean)
    yield view
    if rendering.blur:
        view = fn.gaussian_blur(view, sigma=argument("sigma", 0), window_size=blur_window(rendering.size))
        yield view
    yield view * np.float32(1 / 255)


def dali_arguments(view: ViewParameters, rendering: Rendering) -> dict[str, NDArray[Any]]:
    """What the stages are told of each view, by the names of their inputs, in the order of the stages."""
    arguments: dict[str, NDArray[Any]] = {
        "corner": np.ascontiguousarray(view.box[:, :2]),
        "extent": np.ascontiguousarray(view.box[:, 2:]),
    }
    # Resizing mirrors at no cost.
    flip = view.flip.astype(np.float32)
    zero, one = np.zeros_like(flip), np.ones_like(flip)
    if rendering.warp:
        size = rendering.size
        height, width = view.box[:, 2:].T.astype(np.float32)
        # From a view's coordinates (x, y, 1) to its crop's, both measured from the upper left corner.
        rows = [(1 - 2 * flip) * width / size, zero, flip * width], [zero, height / size, zero], [zero, zero, one]
        arguments["matrix"] = np.array(rows).transpose(2, 0, 1).copy()
    else:
        # A region that ends before it starts is mirrored.
        arguments |= {"start": np.stack([zero, flip], axis=1), "end": np.stack([one, one - flip], axis=1)}
    arguments |= {"brightness": view.brightness, "contrast": view.contrast}
    if rendering.blur:
        # DALI chooses a sigma of its own for 0; this one's neighbours weigh nothing.
        arguments["sigma"] = view.sigma.clip(min=0.05)
    return arguments


class DaliRenderer:
    """Renders with DALI's operators on the training device, from parameters that `augment` computed."""

    name = "dali"

    def __init__(self, rendering: Rendering) -> None:
        self.rendering, self.device, self.dtype = rendering, rendering.device, rendering.dtype
        self._pipeline = dali_pipeline(rendering)
        self._pending: deque[Any] = deque()  # the images that the pipeline is reading

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """See `Renderer.submit`."""
        feed = self._pipeline.feed_input
        views = len(view.flip) // len(pixels)
        images: Any
        if self.device.type == "cuda":
            assert isinstance(pixels, Tensor)
            images = torch.cat([pixels[..., None].to(self.device, non_blocking=True)] * views)
        else:
            # DALI asks torch for a CUDA stream when it is given any tensor of torch's, so host pixels go as arrays.
            images = [image[..., None].numpy() for image in pixels] * views
        feed("pixels", images, layout="HWC")
        for name, values in dali_arguments(view, self.rendering).items():
            feed(name, values)
        self._pipeline.schedule_run()
        self._pending.append(images)

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (output,) = self._pipeline.share_outputs(cuda_stream=stream)
        views = torch.from_dlpack(output.as_tensor()).to(self.dtype)
        self._pipeline.release_outputs()
        self._pending.popleft()
        return views.permute(0, 3, 1, 2)

"""Pixels and parameters to views: DALI on a GPU, DALI on a CPU, and torch, the reference.

A renderer is given work with `submit` and hands the views over with `collect`, in the same order; between the
two it works in the background, so the next batch is made while this one trains.

N images, S x S canvas, H x H view, V = 2N views, rows i and i + N of one image (V = N for supervised training).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from modan_fast import config
from modan_fast.augment import ViewParameters
from modan_fast.store import dali_installed
from shard_builder.settings import InputError


class Renderer(Protocol):
    """What the loader needs of a renderer."""

    def submit(self, pixels: Tensor, views: Sequence[ViewParameters]) -> None:
        """Start the views of `pixels` (N, S, S) uint8; `views` holds the parameters of the first, then the second."""

    def collect(self) -> Tensor:
        """The oldest submitted views, (V, 1, H, H) in [0, 1], channels-last; waits until they are made."""


def open_renderer(
    name: config.Renderer,
    *,
    size: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    views: int = 2,
    blur: bool = False,
) -> Renderer:
    """The renderer that `name` stands for; `auto` is DALI where it is installed.

    It makes `views` views of each of up to `batch_size` images at a time; `blur` says whether any is blurred.
    Raises `InputError` where DALI is asked for and missing.
    """
    if name == "dali" and not dali_installed():
        raise InputError("--renderer dali needs NVIDIA DALI, which is for Linux only: pass --renderer torch")
    if name == "torch" or not dali_installed():
        return TorchRenderer(size, device, dtype)
    return DaliRenderer(size, batch_size, device, dtype, threads, views, blur)


def render_view(pixels: Tensor, view: ViewParameters, size: int) -> Tensor:
    """The reference: a view of each of `pixels` (N, S, S) uint8 as float32 (N, 1, size, size) in [0, 1].

    Crop, antialiased bilinear resize, flip, brightness, then contrast about the view's own mean, both clamped
    to the range, then blur, as torchvision's functional operations do without their rounding to 8 bits.
    """
    crops = []
    for image, (top, left, height, width), flip in zip(pixels, view.box.tolist(), view.flip, strict=True):
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
    return views


def blur_window(size: int) -> int:
    """Width of the Gaussian kernel in pixels: odd, and about a tenth of the view, as SimCLR has it."""
    return 2 * (size // 20) + 1


class TorchRenderer:
    """Renders with `render_view`, where the pixels are; for machines without DALI, and as the reference."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._pending: deque[Future[Tensor]] = deque()

    def _render(self, pixels: Tensor, views: Sequence[ViewParameters]) -> Tensor:
        rendered = torch.cat([render_view(pixels, view, self.size) for view in views])
        return rendered.to(self.device, self.dtype, memory_format=torch.channels_last)

    def submit(self, pixels: Tensor, views: Sequence[ViewParameters]) -> None:
        """See `Renderer.submit`."""
        self._pending.append(self._worker.submit(self._render, pixels, views))

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        return self._pending.popleft().result()


def dali_pipeline(
    size: int, batch_size: int, device: torch.device, threads: int, count: int = 2, blur: bool = False
) -> Any:
    """The DALI pipeline, the same for CPU and GPU: uint8 images and parameters in, `count` uint8 views of each out.

    Every stage saturates and rounds to 8 bits, as torchvision's operations on 8-bit images do.
    """
    from nvidia.dali import Pipeline, fn, types

    place = "gpu" if device.type == "cuda" else "cpu"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index if place == "gpu" else None,
        # One batch in flight: the loader submits the next one before it hands over this one.
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )

    def argument(name: str, ndim: int, dtype: Any = types.FLOAT) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True)

    with pipeline:
        images = fn.external_source(
            name="pixels", device=place, dtype=types.UINT8, ndim=3, layout="HWC", batch=True
        )
        views = []
        for view in range(count):
            # Sliced first, because a region of interest would let its surroundings bleed into its edges.
            crop = fn.slice(
                images,
                start=argument(f"corner{view}", 1, types.INT32),
                shape=argument(f"extent{view}", 1, types.INT32),
                axes=(0, 1),
            )
            resized = fn.resize(
                crop,
                size=(size, size),
                roi_start=argument(f"start{view}", 1),
                roi_end=argument(f"end{view}", 1),
                roi_relative=True,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            bright = fn.brightness_contrast(resized, brightness=argument(f"brightness{view}", 0))
            mean = fn.reductions.mean(bright)
            made = fn.brightness_contrast(
                bright,
                contrast=argument(f"contrast{view}", 0),
                # DALI takes the arguments of an operator from the host, on GPUs too.
                contrast_center=mean.cpu() if place == "gpu" else mean,
            )
            if blur:
                made = fn.gaussian_blur(made, sigma=argument(f"sigma{view}", 0), window_size=blur_window(size))
            views.append(made)
        pipeline.set_outputs(*views)
    pipeline.build()
    return pipeline


class DaliRenderer:
    """Renders with DALI's operators on the training device, from parameters that `augment` computed."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        views: int = 2,
        blur: bool = False,
    ) -> None:
        self.device, self.dtype, self.blur = device, dtype, blur
        self._pipeline = dali_pipeline(size, batch_size, device, threads, views, blur)

    def submit(self, pixels: Tensor, views: Sequence[ViewParameters]) -> None:
        """See `Renderer.submit`."""
        images = pixels[..., None]
        # DALI asks torch for a CUDA stream when it is given any tensor of torch's, so host pixels go as an array.
        self._pipeline.feed_input("pixels", images if images.is_cuda else images.numpy(), layout="HWC")
        for number, view in enumerate(views):
            flip = view.flip.astype(np.float32)
            zero, one = np.zeros_like(flip), np.ones_like(flip)
            self._pipeline.feed_input(f"corner{number}", np.ascontiguousarray(view.box[:, :2]))
            self._pipeline.feed_input(f"extent{number}", np.ascontiguousarray(view.box[:, 2:]))
            # A region that ends before it starts is mirrored: the flip costs nothing.
            self._pipeline.feed_input(f"start{number}", np.stack([zero, flip], axis=1))
            self._pipeline.feed_input(f"end{number}", np.stack([one, one - flip], axis=1))
            self._pipeline.feed_input(f"brightness{number}", view.brightness)
            self._pipeline.feed_input(f"contrast{number}", view.contrast)
            if self.blur:
                # DALI chooses a sigma of its own for 0; this one's neighbours weigh nothing.
                self._pipeline.feed_input(f"sigma{number}", view.sigma.clip(min=0.05))
        self._pipeline.schedule_run()

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        outputs = self._pipeline.share_outputs(cuda_stream=stream)
        levels = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        count, *shape = levels[0].shape
        views = torch.empty((count * len(levels), *shape), dtype=self.dtype, device=self.device)
        for part, of_view in zip(views.split(count), levels, strict=True):
            part.copy_(of_view)  # so the pipeline may have its buffers back
        self._pipeline.release_outputs()
        return views.mul_(1 / 255).permute(0, 3, 1, 2)

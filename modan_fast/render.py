"""What a view is: crop, resize, flip, jitter and blur of an image's pixels, by DALI, by torch, and by a reference.

A renderer starts work with `submit` and returns the views with `collect`, in the same order. In between it works in the
background, so the next batch is rendered while this one trains.

N images of S x S pixels, views of H x H pixels, V = 2N views, rows i and i + N of one image (V = N for supervised).
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

from modan_fast.augment import ViewParameters
from modan_fast.config import RendererName
from modan_fast.decode import dali_installed
from shard_builder.settings import InputError

CHUNK = 16  # views that a thread renders together: fewer operations, and threads wait for one another less often


class Renderer(Protocol):
    """Renders views in the background; `collect` returns the batches in the order of `submit`."""

    name: str

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """Start rendering V views of `pixels` (N, S, S) uint8; `view` holds their parameters, in order."""

    def collect(self) -> Tensor:
        """The oldest submitted batch, (V, 1, H, H) in [0, 1], channels-last; waits until it is rendered."""


@dataclass(frozen=True)
class Rendering:
    """What a renderer makes: up to `batch_size` views of `size` x `size` pixels at a time, from images of `canvas` x
    `canvas` pixels, on `device` in `dtype`, with `threads` CPU threads; `blur` is whether any view is blurred.
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
        """Whether DALI resizes with its warp, which is up to 2.5 times as fast on a CPU, but does not antialias."""
        # If no crop is larger than a view, there is nothing to antialias.
        return self.device.type == "cpu" and self.canvas <= self.size


def open_renderer(name: RendererName, rendering: Rendering) -> Renderer:
    """The renderer `dali` or `torch`; `auto` is DALI on a GPU if it is installed, else torch.

    Raises `InputError` if DALI is asked for and missing.
    """
    if name == "dali" and not dali_installed():
        raise InputError("`renderer=dali` needs NVIDIA DALI, which exists for Linux only: pass `renderer=torch`")
    if name == "torch" or not dali_installed() or (name == "auto" and rendering.device.type == "cpu"):
        return TorchRenderer(rendering)
    return DaliRenderer(rendering)


def render_view(pixels: Tensor | list[Tensor], view: ViewParameters, size: int) -> Tensor:
    """The reference: views of `pixels` (N, S, S) uint8 as float32 (V, 1, size, size) in [0, 1].

    `view` holds the parameters of V views: one of each image, or the first views of all images and then the second.
    Crop, antialiased bilinear resize, flip, brightness, contrast about the view's own mean, and blur, each clamped to
    [0, 1]: torchvision's functional operations without their rounding to 8 bits.
    """
    resized = cropped_and_resized(pixels, view, slice(None), size, rounded=False)
    return jittered_and_blurred(resized, view, slice(None))


def cropped_and_resized(
    pixels: Tensor | list[Tensor], view: ViewParameters, rows: slice, size: int, *, rounded: bool
) -> Tensor:
    """The crops of the views `rows` at their final size, flipped where `view` says so: float32 (v, 1, size, size).

    Grey levels are 0 to 255; `rounded` rounds them to 8 bits, as torchvision's resize of an 8-bit image does.
    """
    first = rows.start or 0
    boxes, flips = view.box[rows].tolist(), view.flip[rows].tolist()
    resized = torch.empty((len(boxes), 1, size, size), device=pixels[0].device)
    for row, ((top, left, height, width), flip) in enumerate(zip(boxes, flips, strict=True)):
        crop = pixels[(first + row) % len(pixels)][None, None, top : top + height, left : left + width]
        crop = crop.flip(-1) if flip else crop
        crop = crop if rounded else crop.float()
        resized[row] = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
    return resized


def jittered_and_blurred(resized: Tensor, view: ViewParameters, rows: slice, out: Tensor | None = None) -> Tensor:
    """The views `rows` with their brightness, contrast and blur: grey levels 0 to 255 to [0, 1], in `out` if given.

    All are float32 (v, 1, H, H); `resized` is overwritten.
    """
    factors = torch.from_numpy(np.stack([view.brightness[rows], view.contrast[rows]])).to(resized.device)
    brightness, contrast = factors[..., None, None, None]
    resized.mul_(brightness / 255).clamp_(max=1)
    mean = resized.mean((2, 3), keepdim=True)
    resized.mul_(contrast).add_(mean * (1 - contrast))
    views = torch.clamp(resized, 0, 1, out=out)
    window = blur_window(views.shape[-1])
    for row in np.flatnonzero(view.sigma[rows]).tolist():
        sigma = float(view.sigma[rows][row])
        # A kernel's weights may sum to a little more than 1.
        views[row] = gaussian_blur(views[row], [window, window], [sigma, sigma]).clamp_(0, 1)
    return views


def blur_window(size: int) -> int:
    """Width of the Gaussian kernel in pixels: odd, and about a tenth of the view, as SimCLR has it."""
    return 2 * (size // 20) + 1


class TorchRenderer:
    """Renders with torch on the training device: on a CPU in threads, elsewhere with `render_view`.

    On a CPU it is about as fast as DALI, and faster where crops are reduced.
    """

    name = "torch"

    def __init__(self, rendering: Rendering) -> None:
        self.size, self.device, self.dtype = rendering.size, rendering.device, rendering.dtype
        # The views keep all cores busy, so a single operation gets one thread.
        self._threads = ThreadPoolExecutor(
            rendering.threads, "render", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._pending: deque[list[Future[Tensor]]] = deque()

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """See `Renderer.submit`."""
        if self.device.type != "cpu":
            # On the training device whatever the tier, so that all tiers give the same views.
            assert isinstance(pixels, Tensor)
            on_device = pixels.to(self.device, non_blocking=True)
            self._pending.append([self._threads.submit(render_view, on_device, view, self.size)])
            return
        count = len(view.flip)
        # Channels-last, the layout of the convolutions.
        views = torch.empty((count, self.size, self.size, 1)).permute(0, 3, 1, 2)
        chunks = (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
        self._pending.append([self._threads.submit(_render_chunk, pixels, view, rows, views) for rows in chunks])

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        views = [chunk.result() for chunk in self._pending.popleft()][-1]
        return views.to(self.device, self.dtype, memory_format=torch.channels_last)


def _render_chunk(pixels: Tensor | list[Tensor], view: ViewParameters, rows: slice, views: Tensor) -> Tensor:
    """Write the views `rows` of `pixels` (N, S, S) to `views` (V, 1, H, H) float32, which is returned."""
    resized = cropped_and_resized(pixels, view, rows, views.shape[-1], rounded=True)
    jittered_and_blurred(resized, view, rows, out=views[rows])
    return views


def dali_pipeline(rendering: Rendering, stages: int | None = None) -> Any:
    """The DALI pipeline for a CPU or a GPU: uint8 images and parameters in, float32 views in [0, 1] out.

    With `stages` it ends after that number of its `dali_stages`, to measure what each costs.
    """
    from nvidia.dali import Pipeline, fn, types

    backend = "gpu" if rendering.device.type == "cuda" else "cpu"
    pipeline = Pipeline(
        batch_size=rendering.batch_size,
        num_threads=rendering.threads,
        device_id=rendering.device.index if backend == "gpu" else None,
        # One batch in flight: the loader submits the next one before it returns this one.
        prefetch_queue_depth=1,
        # The receiver owns an output, and the next run writes to other memory.
        exec_dynamic=True,
    )

    with pipeline:
        images = fn.external_source(
            name="pixels",
            device=backend,
            dtype=types.UINT8,
            ndim=3,
            layout="HWC",
            batch=True,
            # On the CPU it reads the stored images without a copy, once per view.
            no_copy=backend == "cpu",
        )
        *_, view = islice(dali_stages(images, rendering), stages)
        pipeline.set_outputs(view)
    pipeline.build()
    return pipeline


def contrasted(views: Any, means: Any, contrast: Any) -> Any:
    """DALI's uint8 views with changed contrast about `means`, by arithmetic, rounded and saturated."""
    from nvidia.dali import fn, types

    return fn.cast((views - means) * contrast + means, dtype=types.UINT8)


def dali_stages(images: Any, rendering: Rendering) -> Iterator[Any]:
    """The outputs of a pipeline's stages, one by one.

    The stages are crop, resize, brightness, its mean, contrast, blur if any, and float32. All but the mean and the last
    saturate and round to 8 bits, as torchvision's operations on 8-bit images do.
    """
    from nvidia.dali import fn, types

    def argument(name: str, ndim: int, dtype: Any = types.FLOAT) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True)

    # Cropped before the resize: its region of interest would mix pixels around the crop into the edges.
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
        # Arithmetic, because as an operator's argument the mean would have to be on the host.
        view = contrasted(bright, mean, contrast.gpu())
    else:
        view = fn.brightness_contrast(bright, contrast=contrast, contrast_center=mean)
    yield view
    if rendering.blur:
        view = fn.gaussian_blur(view, sigma=argument("sigma", 0), window_size=blur_window(rendering.size))
        yield view
    yield view * np.float32(1 / 255)


def dali_arguments(view: ViewParameters, rendering: Rendering) -> dict[str, NDArray[Any]]:
    """The inputs of the stages for each view, by name, in the order of the stages."""
    arguments: dict[str, NDArray[Any]] = {
        "corner": np.ascontiguousarray(view.box[:, :2]),
        "extent": np.ascontiguousarray(view.box[:, 2:]),
    }
    # The resize mirrors at no extra cost.
    flip = view.flip.astype(np.float32)
    zero, one = np.zeros_like(flip), np.ones_like(flip)
    if rendering.warp:
        size = rendering.size
        height, width = view.box[:, 2:].T.astype(np.float32)
        # From coordinates (x, y, 1) in a view to those in its crop, both from the upper left corner.
        rows = [(1 - 2 * flip) * width / size, zero, flip * width], [zero, height / size, zero], [zero, zero, one]
        arguments["matrix"] = np.array(rows).transpose(2, 0, 1).copy()
    else:
        # A region that ends before it starts is mirrored.
        arguments |= {"start": np.stack([zero, flip], axis=1), "end": np.stack([one, one - flip], axis=1)}
    arguments |= {"brightness": view.brightness, "contrast": view.contrast}
    if rendering.blur:
        # DALI replaces a sigma of 0 by one of its own; with 0.05 the neighbours weigh nothing.
        arguments["sigma"] = view.sigma.clip(min=0.05)
    return arguments


class DaliRenderer:
    """Renders with DALI's operators on the training device."""

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
            # Arrays, because DALI asks torch for a CUDA stream when it gets a tensor.
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

"""What a view is: crop, resize, flip, jitter and blur of an image's pixels, by DALI, by torch, and by a reference.

A renderer starts work with `submit` and returns the views with `collect`, in the same order. In between it works in the
background, so the next batch is rendered while this one trains.

N images of S x S pixels, views of H x H pixels, V = 2N views, rows i and i + N of one image (V = N for supervised).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
# Pixels of a GPU's intermediate results at a time: 32 MiB each, so a batch of 512 views of 224 px takes four rounds.
ROUND = 2**23
# DALI replaces a sigma of 0 by one of its own; with this one the neighbours weigh nothing.
NO_BLUR = 0.05


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
        return TorchRenderer(rendering) if rendering.device.type == "cpu" else TorchGpuRenderer(rendering)
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


def view_table(view: ViewParameters) -> Tensor:
    """The parameters of V views as one table, so that they take one copy to a GPU: float32 (V, 8)."""
    columns = [view.box, view.flip, view.brightness, view.contrast, view.sigma]
    return torch.from_numpy(np.column_stack(columns).astype(np.float32))


def render_together(pixels: Tensor, table: Tensor, rows: slice, size: int, *, blur: bool) -> Tensor:
    """The views `rows` as `render_view` gives them, in few operations on the tensors' device: (v, 1, size, size).

    They are views of `pixels` (N, S, S) uint8 with the parameters `table` (V, 8) of `view_table`. Resampling is linear
    in each direction, so a resized crop is a product of three matrices, and so is a blurred view.
    """
    chosen = table[rows]
    image = torch.arange(len(table), device=table.device)[rows] % len(pixels)
    top, left, height, width, flip, brightness, contrast, sigma = chosen[..., None, None].unbind(1)
    vertical = resampling(top, height, torch.zeros_like(flip), size, pixels.shape[1])
    horizontal = resampling(left, width, flip, size, pixels.shape[2])
    views = vertical @ pixels[image].float() @ horizontal.mT
    views.mul_(brightness / 255).clamp_(max=1)
    mean = views.mean((1, 2), keepdim=True)
    views.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    if blur:
        spread = blurring(sigma, size)
        views = (spread @ views @ spread.mT).clamp_(0, 1)
    return views[:, None]


def resampling(start: Tensor, length: Tensor, mirrored: Tensor, size: int, canvas: int) -> Tensor:
    """The weights of an image's rows or columns in those of its resized crop: (V, size, canvas), sums are 1.

    A crop begins at `start` and has `length` rows, all (V, 1, 1). It is turned round first where `mirrored` is 1. The
    filter is that of torch's antialiased bilinear resize, a triangle as wide as the step, in its order of operations.
    """
    step = length / size
    centre = step * (torch.arange(size, device=start.device)[:, None] + 0.5)
    position = torch.arange(canvas, device=start.device) - start
    inside = (position >= 0) & (position < length)
    position = torch.where(mirrored > 0, length - 1 - position, position)
    weight = 1 - ((position - centre + 0.5) * (1 / step.clamp(min=1))).abs()
    weight = weight.clamp_(min=0).mul_(inside)
    return weight.div_(weight.sum(2, keepdim=True))


def blurring(sigma: Tensor, size: int) -> Tensor:
    """The weights of a view's rows in those of the blurred view, mirrored at the edges: (V, size, size), sums are 1.

    `sigma` is (V, 1, 1); with 0 a row stays as it is.
    """
    radius, last = blur_window(size) // 2, size - 1
    row = torch.arange(size, device=sigma.device)
    here, there = row[:, None], row
    # Of a row itself, and of its mirror images beyond the first and the last row, which are not repeated.
    weight = torch.zeros(len(sigma), size, size, device=sigma.device)
    for distance, exists in (
        (here - there, there >= 0),
        (here + there, there > 0),
        (2 * last - here - there, there < last),
    ):
        near = exists & (distance.abs() <= radius)
        weight += torch.exp(-0.5 * (distance / sigma.clamp(min=NO_BLUR)).square()).mul_(near)
    return weight.div_(weight.sum(2, keepdim=True))


class TorchRenderer:
    """Renders with torch on a CPU, in threads. It is about as fast as DALI, and faster where crops are reduced."""

    name = "torch"

    def __init__(self, rendering: Rendering) -> None:
        self.size, self.dtype = rendering.size, rendering.dtype
        # The views keep all cores busy, so a single operation gets one thread.
        self._threads = ThreadPoolExecutor(
            rendering.threads, "render", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._pending: deque[list[Future[Tensor]]] = deque()

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """See `Renderer.submit`."""
        count = len(view.flip)
        # Channels-last, the layout of the convolutions.
        views = torch.empty((count, self.size, self.size, 1)).permute(0, 3, 1, 2)
        chunks = (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
        self._pending.append([self._threads.submit(_render_chunk, pixels, view, rows, views) for rows in chunks])

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        views = [chunk.result() for chunk in self._pending.popleft()][-1]
        return views.to(self.dtype, memory_format=torch.channels_last)


def _render_chunk(pixels: Tensor | list[Tensor], view: ViewParameters, rows: slice, views: Tensor) -> Tensor:
    """Write the views `rows` of `pixels` (N, S, S) to `views` (V, 1, H, H) float32, which is returned."""
    resized = cropped_and_resized(pixels, view, rows, views.shape[-1], rounded=True)
    jittered_and_blurred(resized, view, rows, out=views[rows])
    return views


@contextmanager
def beside_training(stream: torch.cuda.Stream, pixels: Tensor) -> Iterator[None]:
    """What is given to the GPU here waits for `pixels`, and then runs beside the training step."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    if pixels.is_cuda:
        pixels.record_stream(stream)  # their memory is not used again before the stream has read them
    with torch.cuda.stream(stream):
        yield


class TorchGpuRenderer:
    """Renders with torch on a GPU, all views of a batch together, in a stream of its own beside the training step."""

    name = "torch"

    def __init__(self, rendering: Rendering) -> None:
        self.rendering, self.device = rendering, rendering.device
        self._stream = torch.cuda.Stream(self.device)
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """See `Renderer.submit`."""
        assert isinstance(pixels, Tensor)
        with beside_training(self._stream, pixels):
            # On the training device whatever the tier, so that all tiers give the same views.
            views = rendered_in_rounds(pixels.to(self.device, non_blocking=True), view, self.rendering)
            self._pending.append((views, self._stream.record_event()))

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        views, rendered = self._pending.popleft()
        training = torch.cuda.current_stream(self.device)
        training.wait_event(rendered)
        views.record_stream(training)
        return views


def rendered_in_rounds(pixels: Tensor, view: ViewParameters, rendering: Rendering) -> Tensor:
    """The views of `pixels` (N, S, S), by `render_together` as many at a time as `ROUND` allows, channels-last."""
    count, size = len(view.flip), rendering.size
    table = view_table(view)
    if pixels.is_cuda:
        table = table.pin_memory().to(pixels.device, non_blocking=True)  # the host does not wait
    views = torch.empty((count, size, size, 1), dtype=rendering.dtype, device=pixels.device).permute(0, 3, 1, 2)
    together = max(1, ROUND // max(size, rendering.canvas) ** 2)
    for first in range(0, count, together):
        rows = slice(first, first + together)
        views[rows] = render_together(pixels, table, rows, size, blur=rendering.blur)
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
        arguments["sigma"] = view.sigma.clip(min=NO_BLUR)
    return arguments


class DaliRenderer:
    """Renders with DALI's operators on the training device."""

    name = "dali"

    def __init__(self, rendering: Rendering) -> None:
        self.rendering, self.device, self.dtype = rendering, rendering.device, rendering.dtype
        self._pipeline = dali_pipeline(rendering)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pending: deque[Any] = deque()  # the images that the pipeline is reading

    def submit(self, pixels: Tensor | list[Tensor], view: ViewParameters) -> None:
        """See `Renderer.submit`."""
        views = len(view.flip) // len(pixels)
        images: Any
        if self._stream is not None:
            assert isinstance(pixels, Tensor)
            with beside_training(self._stream, pixels):
                images = torch.cat([pixels[..., None].to(self.device, non_blocking=True)] * views)
                self._feed(images, view)  # DALI copies tensors in torch's current stream
        else:
            # Arrays, because DALI asks torch for a CUDA stream when it gets a tensor.
            images = [image[..., None].numpy() for image in pixels] * views
            self._feed(images, view)
        self._pipeline.schedule_run()
        self._pending.append(images)

    def _feed(self, images: Any, view: ViewParameters) -> None:
        self._pipeline.feed_input("pixels", images, layout="HWC")
        for name, values in dali_arguments(view, self.rendering).items():
            self._pipeline.feed_input(name, values)

    def collect(self) -> Tensor:
        """See `Renderer.collect`."""
        stream = torch.cuda.current_stream(self.device) if self._stream is not None else None
        (output,) = self._pipeline.share_outputs(cuda_stream=stream)
        views = torch.from_dlpack(output.as_tensor()).to(self.dtype)
        self._pipeline.release_outputs()
        self._pending.popleft()
        return views.permute(0, 3, 1, 2)

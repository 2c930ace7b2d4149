"""DALI's views against the torch reference, and the reference against torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from modan_fast.augment import ViewParameters, view_parameters
from modan_fast.config import Augmentation
from modan_fast.decode import dali_installed
from modan_fast.render import (
    Rendering,
    contrasted,
    dali_arguments,
    dali_pipeline,
    open_renderer,
    render_view,
    rendered_in_rounds,
)

needs_dali = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed (Linux only)")
CPU = torch.device("cpu")


def images(count=48, canvas=96, seed=0):
    """Smooth structure, noise, and a few saturated images: what clamps and what aliases."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (canvas, canvas), mode="bicubic")[:, 0]
    noise = 0.1 * torch.randn(count, canvas, canvas, generator=generator)
    exposure = torch.linspace(0.2, 2.0, count)[:, None, None]
    return ((smooth + noise) * exposure * 255).clamp(0, 255).to(torch.uint8)


def both_views(count, canvas, augmentation=None):
    augmentation = augmentation or Augmentation()
    return view_parameters(augmentation, 11, 2, np.tile(np.arange(count), 2), np.repeat([0, 1], count), canvas)


def some(view, rows):
    """The parameters of some of the views."""
    return ViewParameters(**{key: value[rows] for key, value in vars(view).items()})


def rendered(name, pixels, view, size, threads=2, batch_size=None, blur=False):
    renderer = open_renderer(
        name,
        Rendering(
            canvas=pixels.shape[-1],
            size=size,
            batch_size=batch_size or len(view.flip),
            device=CPU,
            dtype=torch.float32,
            threads=threads,
            blur=blur,
        ),
    )
    renderer.submit(pixels, view)
    return renderer.collect()


def test_the_reference_equals_torchvisions_functional_operations():
    pixels = images(16)
    view = some(both_views(16, 96, Augmentation(blur=0.5)), slice(16))
    ours = render_view(pixels, view, 64)
    for number, image in enumerate(pixels[:, None]):
        top, left, height, width = view.box[number].tolist()
        theirs = transforms.resized_crop(
            image.float() / 255, top, left, height, width, [64, 64], InterpolationMode.BILINEAR, antialias=True
        )
        theirs = transforms.horizontal_flip(theirs) if view.flip[number] else theirs
        theirs = transforms.adjust_brightness(theirs, float(view.brightness[number]))
        theirs = transforms.adjust_contrast(theirs, float(view.contrast[number]))
        if view.sigma[number]:
            theirs = transforms.gaussian_blur(theirs, [7, 7], [float(view.sigma[number])] * 2)
        torch.testing.assert_close(ours[number], theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["torch", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize(
    ("canvas", "size", "largest"), [(96, 96, 3.0), (64, 96, 3.0), (96, 64, 12.0), (224, 64, 25.0)]
)
def test_views_equal_the_reference_within_one_grey_level_on_average(name, canvas, size, largest):
    # The largest differences lie in the outermost row or column of strongly reduced crops, where DALI repeats
    # the border and torch leaves it out of the average.
    pixels, views = images(canvas=canvas), both_views(48, canvas)
    difference = 255 * (rendered(name, pixels, views, size) - render_view(pixels, views, size)).abs()
    if name == "torch":
        largest = 2.0  # but for the rounding to 8 bits it is the same
    assert difference.mean() < 0.5
    assert difference.mean((1, 2, 3)).max() < 1.0
    assert difference.max() < largest
    assert difference[:, :, 1:-1, 1:-1].max() < 6.0


@pytest.mark.parametrize("name", ["torch", pytest.param("dali", marks=needs_dali)])
def test_blurred_views_equal_the_reference(name):
    augmentation = Augmentation(jitter=0.0, blur=0.5)
    pixels, views = images(), both_views(48, 96, augmentation)
    assert 24 < (views.sigma > 0).sum() < 72
    pixels[:2] = 255  # a kernel's weights may sum to more than 1
    ours, reference = rendered(name, pixels, views, 96, blur=True), render_view(pixels, views, 96)
    assert max(ours.max(), reference.max()) <= 1
    difference = 255 * (ours - reference).abs()
    assert difference.mean((1, 2, 3)).max() < 1.0
    assert difference.max() < 3.0


@pytest.mark.parametrize("name", ["torch", pytest.param("dali", marks=needs_dali)])
def test_a_single_view_is_the_first_of_two(name):
    pixels, views = images(), both_views(48, 96)
    one = rendered(name, pixels, some(views, slice(48)), 64)
    assert torch.equal(one, rendered(name, pixels, views, 64)[:48])


@pytest.mark.parametrize("name", ["torch", pytest.param("dali", marks=needs_dali)])
def test_an_untouched_image_goes_through_unchanged(name):
    pixels = images(8, canvas=64)
    same = ViewParameters(
        box=np.array([[0, 0, 64, 64]] * 8, np.int32),
        flip=np.array([False, True] * 4),
        brightness=np.ones(8, np.float32),
        contrast=np.ones(8, np.float32),
        sigma=np.zeros(8, np.float32),
    )
    views = rendered(name, pixels, same, 64)
    levels = (views * 255).round().to(torch.uint8)[:, 0]
    assert (levels[::2] == pixels[::2]).all()
    assert (levels[1::2] == pixels[1::2].flip(-1)).all()


@pytest.mark.parametrize("name", ["torch", pytest.param("dali", marks=needs_dali)])
def test_views_do_not_depend_on_threads_or_on_the_batch(name):
    pixels, views = images(), both_views(48, 96)
    whole = rendered(name, pixels, views, 64)
    assert torch.equal(whole, rendered(name, pixels, views, 64, threads=1))
    rows = np.r_[8:19, 56:67]
    few = rendered(name, pixels[8:19], some(views, rows), 64, batch_size=96)
    assert torch.equal(few, whole[rows])


@pytest.mark.parametrize("name", ["torch", pytest.param("dali", marks=needs_dali)])
def test_views_come_back_in_order_channels_last_and_in_the_compute_type(name):
    pixels, views = images(), both_views(48, 96)
    renderer = open_renderer(
        name, Rendering(canvas=96, size=64, batch_size=96, device=CPU, dtype=torch.float16, threads=2)
    )
    expected = []
    for turn in range(3):
        shown = pixels.roll(turn, 0)
        expected.append(rendered(name, shown, views, 64))
        renderer.submit(shown, views)
        if turn:  # one batch ahead, as the loader works
            collected = renderer.collect()
            torch.testing.assert_close(collected.float(), expected[turn - 1], rtol=0, atol=1e-3)
    assert collected.dtype == torch.float16
    assert collected.shape == (96, 1, 64, 64)
    assert collected.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= collected.min() <= collected.max() <= 1


@needs_dali
def test_enlarging_by_warp_as_on_cpus_equals_resizing_as_on_gpus():
    pixels, views, made = images(canvas=64), both_views(48, 64), []
    for canvas in (64, 97):  # where any image were larger than a view, all are resized
        rendering = Rendering(canvas, size=96, batch_size=96, device=CPU, dtype=torch.float32, threads=2)
        assert rendering.warp == (canvas == 64)
        pipeline, arguments = dali_pipeline(rendering), dali_arguments(views, rendering)
        for name, values in {"pixels": list(pixels[..., None].numpy()) * 2, **arguments}.items():
            pipeline.feed_input(name, values)
        made.append(255 * torch.from_dlpack(pipeline.run()[0].as_tensor()))
    difference = (made[0] - made[1]).abs()
    # They round halves to other sides, and jitter enlarges the step.
    assert difference.max() < 2.5
    assert (difference > 0.5).float().mean() < 0.01


@needs_dali
def test_contrast_by_arithmetic_as_on_gpus_equals_the_operator_for_it():
    from nvidia.dali import Pipeline, fn, types

    pixels = images(32)
    contrasts = np.linspace(0, 2, 32, dtype=np.float32)
    pipeline = Pipeline(batch_size=32, num_threads=1, device_id=None)
    with pipeline:
        views = fn.external_source(lambda: list(pixels[..., None].numpy()), dtype=types.UINT8, ndim=3)
        contrast = fn.external_source(lambda: contrasts, dtype=types.FLOAT, ndim=0)
        mean = fn.reductions.mean(views)
        operator = fn.brightness_contrast(views, contrast=contrast, contrast_center=mean)
        pipeline.set_outputs(contrasted(views, mean, contrast), operator)
    ours, theirs = (torch.from_dlpack(each.as_tensor()).float() for each in pipeline.run())
    assert ours.min() == 0
    assert ours.max() == 255
    # They round the product at other places.
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 1e-3


@st.composite
def any_views(draw):
    """Noise, and views of it with any box, down to a pixel: (pixels, parameters, size)."""
    canvas, size = draw(st.integers(2, 80)), draw(st.integers(32, 64))
    images, views = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    count = images * views
    sides = draw(st.lists(st.tuples(*[st.integers(1, canvas)] * 2), min_size=count, max_size=count))
    corners = [[draw(st.integers(0, canvas - side)) for side in pair] for pair in sides]
    floats = {"min_size": count, "max_size": count}
    factors = st.lists(st.floats(0, 4, width=32), **floats)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    pixels = torch.randint(0, 256, (images, canvas, canvas), generator=generator, dtype=torch.uint8)
    view = ViewParameters(
        box=np.column_stack([corners, sides]).astype(np.int32),
        flip=np.array(draw(st.lists(st.booleans(), **floats))),
        brightness=np.array(draw(factors), np.float32),
        contrast=np.array(draw(factors), np.float32),
        # Smaller ones change nothing: the neighbours weigh less than a rounding.
        sigma=np.array(
            draw(st.lists(st.one_of(st.just(0), st.floats(0.125, 8, width=32)), **floats)), np.float32
        ),
    )
    return pixels, view, size


def rendering_of(pixels, view, size, **changes):
    given = {"device": CPU, "dtype": torch.float32, "threads": 1, "blur": bool(view.sigma.any())}
    return Rendering(pixels.shape[-1], size, len(view.flip), **(given | changes))


@given(any_views())
def test_views_rendered_together_equal_the_reference_for_any_box(case):
    pixels, view, size = case
    ours = rendered_in_rounds(pixels, view, rendering_of(pixels, view, size))
    # A contrast of 4 makes four of one rounding.
    torch.testing.assert_close(ours, render_view(pixels, view, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("canvas", "size"), [(96, 96), (64, 96), (224, 64), (224, 224)])
def test_views_rendered_together_equal_the_reference_at_full_size(canvas, size):
    pixels, view = images(12, canvas), both_views(12, canvas, Augmentation(blur=0.5, scale=(0.0001, 1.0)))
    ours = rendered_in_rounds(pixels, view, rendering_of(pixels, view, size))
    torch.testing.assert_close(ours, render_view(pixels, view, size), rtol=0, atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_views_rendered_together_do_not_depend_on_how_many_fit_into_memory(monkeypatch):
    pixels, view = images(12, 64), both_views(12, 64)
    whole = rendered_in_rounds(pixels, view, rendering_of(pixels, view, 32))
    monkeypatch.setattr("modan_fast.render.ROUND", 5 * 64**2)  # 24 views in rounds of 5
    torch.testing.assert_close(
        rendered_in_rounds(pixels, view, rendering_of(pixels, view, 32)), whole, rtol=0, atol=1e-6
    )
    monkeypatch.setattr("modan_fast.render.ROUND", 1)  # at least one
    half = rendered_in_rounds(pixels, view, rendering_of(pixels, view, 32, dtype=torch.float16))
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=1e-3)


def test_a_batch_is_rendered_together_in_a_bounded_number_of_operations():
    """A launch takes some microseconds whatever it does; one by one a batch took over 2,000."""
    pixels, view = images(256, 48), both_views(256, 48)
    with torch.profiler.profile() as profiled:
        rendered_in_rounds(pixels, view, rendering_of(pixels, view, 32))
    called = {each.key: each.count for each in profiled.key_averages() if each.key.startswith("aten::")}
    assert called["aten::bmm"] == 2
    assert sum(called.values()) < 400  # counted with all views of tensors, which start nothing


@pytest.mark.gpu
@needs_dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("on_gpu", [True, False])
def test_dali_on_a_gpu_equals_the_reference(on_gpu):
    gpu = torch.device("cuda", 0)
    pixels, views = images(canvas=224), both_views(48, 224)
    renderer = open_renderer(
        "dali", Rendering(canvas=224, size=224, batch_size=96, device=gpu, dtype=torch.float32, threads=2)
    )
    renderer.submit(pixels.to(gpu) if on_gpu else pixels, views)
    difference = 255 * (renderer.collect().cpu() - render_view(pixels, views, 224)).abs()
    assert difference.mean() < 0.5
    assert difference.max() < 4

"Views against torchvision's own transforms, on the same numbers and in distribution; bad input; memory."
import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

from refcomm.core import ConfigError, generator
from refcomm.data import views
from refcomm.data.views import (VIEWS, DrawnViews, ViewSpec, apply_views, draw_views, gaussian_blobs, random_views,
    view_spec, views_by_torchvision)

NOTHING = dict(crop=0., flip=0., jitter=0., grey=0., blur=0., mean=(0., 0., 0.), std=(1., 1., 1.))


def pixels(n, height, width, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=generator(seed, "pixels"), dtype=torch.uint8)


def only(**changes):
    return ViewSpec(**NOTHING | changes)


@pytest.mark.parametrize("changes, eps", [
    (dict(crop=1.), 2e-6), (dict(crop=1., antialias=False), 2e-6), (dict(crop=1., interpolation="bicubic"), 5e-6),
    (dict(crop=1., interpolation="bicubic", antialias=False), 5e-6),
    (dict(flip=1.), 2e-6), (dict(crop=1., flip=.5), 2e-6),
    (dict(jitter=1., contrast=0., saturation=0., hue=0.), 1e-5),
    (dict(jitter=1., brightness=0., saturation=0., hue=0.), 1e-5),
    (dict(jitter=1., brightness=0., contrast=0., hue=0.), 1e-5),
    (dict(jitter=1., brightness=0., contrast=0., saturation=0., hue=.5), 1e-5),
    (dict(jitter=1.), 5e-5), (dict(grey=1.), 2e-6), (dict(blur=1., kernel=9), 2e-6),
    (dict(blur=1., sigma=(5., 9.), kernel=23), 2e-6), (dict(solarise=1.), 2e-6),
], ids=str)
@pytest.mark.parametrize("size", [24, 40, 64])
def test_each_operation_is_that_of_torchvision(changes, eps, size):
    "Floats agree to `eps` of a range of 1; where torchvision rounds to bytes after every step, to 1 of 255 on average."
    images, s = pixels(12, 40, 40), only(size=size, **changes)
    if s.solarise and size != 40: return # a resized value may lie on the threshold
    drawn = draw_views(12, 40, 40, s, generator(0, "views"))
    ours = apply_views(images, drawn, s)
    assert ours.shape == (12, 3, size, size) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, views_by_torchvision(images/255, drawn, s), atol=eps, rtol=0)
    assert (ours - views_by_torchvision(images, drawn, s)).abs().mean() * 255 < 2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(list(VIEWS)), st.integers(0, 99))
@settings(max_examples=60)
def test_any_size(height, width, size, name, seed):
    s = view_spec(name, size=size, solarise=0.)
    images, drawn = pixels(3, height, width, seed), draw_views(3, height, width, s, generator(seed, "views"))
    top, left, h, w = drawn.box.T
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all() and (top
        + h <= height).all() and (left + w <= width).all()
    torch.testing.assert_close(apply_views(images, drawn, s), views_by_torchvision(images/255, drawn, s), atol=5e-4,
        rtol=0)


def test_boxes_are_drawn_as_torchvision_draws_them():
    "Area, ratio and place of 4,000 boxes: mean and deviation agree with those of RandomResizedCrop."
    from torchvision.transforms import v2
    for height, width, scale in ((60, 90, (.08, 1.)), (40, 40, (.14, 1.)), (20, 90, (.5, 1.))):
        s = ViewSpec(scale=scale)
        ours = draw_views(4000, height, width, s, generator(0)).box.double()
        crop, blank = v2.RandomResizedCrop(8, scale, s.ratio), torch.zeros(3, height, width)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            theirs = [crop.make_params([blank]) for _ in range(4000)]
        theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).double()
        for of in (lambda b: b[:, 2]*b[:, 3], lambda b: b[:, 3]/b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
            a, b = of(ours), of(theirs)
            assert abs(a.mean() - b.mean()) < 5*(a.var()/2000
                + 1e-12).sqrt() and abs(a.std() - b.std()) < .06*b.std() + 1e-9


def test_factors_are_drawn_evenly_and_apart():
    "Every pair of numbers of an image is uncorrelated, and none is shared by the images of a batch."
    drawn = draw_views(20_000, 32, 32, ViewSpec(crop=1., scale=(.3, .3), solarise=.5), generator(0))
    numbers = torch.cat([drawn.flip[:, None], drawn.jitter[:, None], drawn.order[:, :3], drawn.factors,
        drawn.grey[:, None], (drawn.sigma > 0)[:, None], drawn.solarise[:, None]], 1).double()
    independent = torch.corrcoef(numbers.T)
    independent[2:5, 2:5] = torch.eye(3) # places of one order exclude each other
    assert (independent - torch.eye(len(independent))).abs().max() < .04
    assert (drawn.factors.diff(dim=0) != 0).float().mean() > .99
    for lim, x in zip(((.2, 1.8),)*3 + ((-.2, .2),), drawn.factors.T):
        assert torch.allclose(torch.histc(x, 8, *lim)/len(x), torch.full((8,), 1/8), atol=.012)
    assert sorted(drawn.order.unique().tolist()) == [0, 1, 2,
        3] and (drawn.order.sort(1).values == torch.arange(4)).all()
    bright = draw_views(5000, 8, 8, ViewSpec(brightness=2.), generator(0)).factors[:, 0]
    assert bright.min() >= 0 and bright.max() > 2.99


def test_blocks_groups_and_the_global_generator_do_not_matter(monkeypatch):
    images, s = pixels(50, 32, 32), view_spec("listener", size=32)
    state = torch.random.get_rng_state()
    whole = random_views(images, s, generator(3))
    assert torch.equal(torch.random.get_rng_state(), state) and whole.isfinite().all()
    for block in (1, 3*32**2, 2**30):
        monkeypatch.setitem(views._BLOCK, "cpu", block)
        torch.testing.assert_close(random_views(images, s, generator(3)), whole, atol=1e-4, rtol=0)
    drawn = draw_views(50, 32, 32, s, generator(3))
    order = torch.randperm(50, generator=generator(1))
    torch.testing.assert_close(apply_views(images[order], DrawnViews(*(x[order] for x in drawn)), s), whole[order],
        atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(random_views(images, s, generator(3)), whole, atol=1e-4, rtol=0)
    assert random_views(images[:0], s, generator(3)).shape == (0, 3, 32, 32)
    before = images.clone()
    random_views(images, only(size=32, solarise=1.), generator(0))
    assert torch.equal(images, before)


def test_memory_beside_the_result_is_bounded():
    "Four times the batch, the same working memory: the largest tensor that is not the result is one block."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() != self.result:
                    self.bytes = max(self.bytes, x.untyped_storage().nbytes())
            return out
    s, most = view_spec("simclr", size=64), []
    for n in (128, 512):
        images = pixels(n, 64, 64)
        with Largest() as m:
            m.bytes, m.result = 0, n*3*64*64*4
            pool = images.untyped_storage().nbytes()
            apply_views(images, draw_views(n, 64, 64, s, generator(0)), s)
        most.append(m.bytes)
        assert m.bytes <= max(pool, 3*views._BLOCK["cpu"]*4)
    assert most[1] <= max(512*3*64*64, 3*views._BLOCK["cpu"]*4)


@pytest.mark.parametrize("settings, says", [
    (dict(size=0), "size must be at least 1, got 0"),
    (dict(size=6.5), "size must be a whole number, got 6.5"),
    (dict(scale=(0., 1.)), "scale must be two numbers.*above 0 and at most 1: got"),
    (dict(scale=(.5, 1.1)), "at most 1"), (dict(scale=(.9, .1)), "the lower first"),
    (dict(scale=.5), "scale must be a tuple of numbers or text, got 0.5"),
    (dict(ratio=(2, 1)), "ratio must be two numbers, the lower first"), (dict(ratio=(1,)), "ratio"),
    (dict(sigma=(0, 1)), "sigma must be two numbers, the lower first, above 0"),
    (dict(sigma=(.1, float("nan"))), "sigma"), (dict(grey=-.1), "grey is a probability, from 0 to 1: got -0.1"),
    (dict(jitter=2), "jitter is a probability"), (dict(crop="yes"), "crop must be a finite number, got 'yes'"),
    (dict(blur=float("nan")), "blur must be a finite number, got nan"),
    (dict(brightness=-1.), "brightness must be at least 0, got -1.0"), (dict(hue=.6), "hue must be from 0 to 0.5"),
    (dict(kernel=8), "kernel must be odd"),
    (dict(size=5, kernel=11), "kernel 11 is too wide for views of 5 pixels: at most 9"),
    (dict(interpolation="bicubik"), "did you mean 'bicubic'"),
    (dict(std=(1., 1., 0.)), "std above 0"), (dict(threshold=300), "threshold must be from 0 to 255, got 300"),
    (dict(colour=1), "no field 'colour'"),
], ids=str)
def test_settings_that_are_none(settings, says):
    with pytest.raises(ConfigError, match=says): ViewSpec(**settings)


def test_images_that_are_none():
    s, g, good = view_spec("simclr", size=16), generator(0), pixels(4, 16, 16)
    for images, says in [(good.float(), "must be uint8, got torch.float32: of floats in 0 … 1, give"),
        (good[0], r"give images\[None\]"), (good[:, :1], "repeat the channel: images.expand"),
                         (torch.cat([good, good[:, :1]], 1), r"leave out the fourth channel: images\[:, :3\]"),
                         (good.permute(0, 2, 3, 1), "channels come second"),
                         (good[:, :2], r"a batch \[n, 3, height, width\] is expected"),
                         (good[..., :0], "have no pixels"), (good.numpy(), "must be a tensor .* got ndarray")]:
        for work in (lambda: random_views(images, s, g), lambda: apply_views(images, draw_views(4, 16, 16, s, g), s)):
            with pytest.raises(ConfigError, match=says): work()
    with pytest.raises(ConfigError, match="4 views were drawn for 3 images"):
        apply_views(good[:3], draw_views(4, 16, 16, s, g), s)
    with pytest.raises(ConfigError, match="drawn on cpu for images on meta"):
        apply_views(good.to("meta"), draw_views(4, 16, 16, s, g), s)
    with pytest.raises(ConfigError, match="the generator is on cpu, the images on meta: make it with"):
        random_views(good.to("meta"), s, g)
    with pytest.raises(ConfigError, match="boxes reach beyond the images of 16 × 8 pixels"):
        apply_views(good[..., :8], draw_views(4, 16, 16, view_spec("plain", size=16), g), s)
    with pytest.raises(ConfigError, match="height must be at least 1, got 0"): draw_views(2, 0, 5, s, g)


def test_the_named_kinds():
    "As the two papers have them."
    simclr, speaker, listener, plain = (VIEWS[k] for k in ("simclr", "speaker", "listener", "plain"))
    assert (simclr.brightness, simclr.contrast, simclr.saturation, simclr.hue, simclr.jitter, simclr.grey, simclr.blur,
        simclr.sigma, simclr.taps) == (.8, .8, .8, .2, .8, .2, .5, (.1, 2.), 23)
    assert (speaker.scale, speaker.interpolation, speaker.brightness, speaker.contrast, speaker.saturation, speaker.hue,
        speaker.blur, speaker.solarise) == ((.14, 1.), "bicubic", .4, .4, .2, .1, 1., 0.)
    assert dataclasses.replace(listener, blur=1., solarise=0.) == speaker and (listener.blur, listener.solarise) == (.1,
        .2)
    images = pixels(5, 20, 20)
    a, b = (random_views(images, view_spec("plain", size=20), generator(i)) for i in range(2))
    assert torch.equal(a, b)
    torch.testing.assert_close(a, (images/255 - torch.tensor(plain.mean)[:, None, None]) / torch.tensor(plain.std)[:,
        None, None])


def test_blobs():
    blobs = gaussian_blobs(200, 16, generator(0, "blobs"))
    assert blobs.shape == (200, 3, 16, 16) and abs(blobs.mean()) < .01 and abs(blobs.var() - 1) < .02
    assert torch.equal(blobs, gaussian_blobs(200, 16, generator(0, "blobs"))) and not torch.equal(blobs,
        gaussian_blobs(200, 16, generator(1, "blobs")))
    for n, size in ((0, 16), (3, 0)):
        with pytest.raises(ConfigError, match="at least 1, got 0"): gaussian_blobs(n, size, generator(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    images = pixels(40, 48, 48)
    for name in VIEWS:
        s = view_spec(name, size=32, solarise=0.)
        drawn = draw_views(40, 48, 48, s, generator(0))
        on_gpu = apply_views(images.cuda(), DrawnViews(*(x.cuda() for x in drawn)), s)
        torch.testing.assert_close(on_gpu.cpu(), apply_views(images, drawn, s), atol=1e-3, rtol=0)
        assert random_views(images.cuda(), s, generator(0, device="cuda")).device.type == "cuda"

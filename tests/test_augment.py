"""common.augment and common.geometry against torchvision.

Results are compared image by image at equal parameters, and so are distributions of parameters.
"""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image

from common import augment as A
from common.data import of_all_images, sent_together

RATIO = (3 / 4, 4 / 3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, height, width, seed=0, dtype=torch.float32):
    """Blocks of colour under noise: edges, flat grey areas, and values at both ends of [0, 1]."""
    g = seeded(seed)
    coarse = torch.rand(n, 3, max(2, height // 5), max(2, width // 5), generator=g)
    coarse[0] = coarse[0, :1]  # one grey picture
    x = torch.nn.functional.interpolate(coarse, (height, width)) * 1.4 - 0.2
    noisy = (torch.arange(n) % 2)[:, None, None, None]
    x = (x + 0.1 * torch.randn(n, 3, height, width, generator=g) * noisy).clamp(0, 1)
    return (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


def sides(n, height, width):
    return torch.full((n,), height), torch.full((n,), width)


def per_image(function, images, *parameters):
    return torch.stack(
        [function(x, *(p[i].item() for p in parameters)) for i, x in enumerate(images)]
    )


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tolerance


# ----------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    "height,width,size", [(40, 40, 40), (90, 70, 24), (30, 41, 64), (50, 120, 50), (7, 300, 9)]
)
def test_resized_crop_equals_torchvision(height, width, size):
    crop = A.RandomResizedCrop(size, (0.05, 1.0), (0.4, 2.5))
    boxes = crop.sample(*sides(24, height, width), seeded())
    boxes[0] = torch.tensor([0, 0, height, width])
    boxes[1] = torch.tensor([height - 1, width - 1, 1, 1])
    boxes[2] = torch.tensor([0, width // 2, height, 2])
    images = pictures(24, height, width, dtype=torch.float64)

    def reference(x):
        return torch.stack(
            [F.resized_crop(i, *b, [size, size], antialias=True) for i, b in zip(x, boxes.tolist())]
        )

    out = crop.apply(images, boxes)
    assert out.dtype == torch.float32 and out.is_contiguous()
    close(out, reference(images), 1e-6)
    close(out, reference(images.float()), 1e-5)
    raw = pictures(24, height, width, dtype=torch.uint8)
    close(crop.apply(raw, boxes), reference(raw.double() / 255), 1e-6)
    close(crop.apply(raw, boxes) * 255, reference(raw), 1.01)  # torchvision rounds uint8 images


def test_resized_crop_is_accurate_far_from_the_corner():
    """At pixel 2000 torchvision's float32 weights are off by more: its float64 is the reference."""
    crop = A.RandomResizedCrop(33)
    images = pictures(2, 16, 2100, dtype=torch.float64)
    boxes = torch.tensor([[1, 1990, 15, 101], [0, 3, 16, 2090]])
    reference = [
        F.resized_crop(x, *b, [33, 33], antialias=True) for x, b in zip(images, boxes.tolist())
    ]
    close(crop.apply(images, boxes), torch.stack(reference), 1e-6)


@pytest.mark.parametrize("height,width", [(60, 80), (81, 50), (33, 33), (37, 200), (20, 64)])
@pytest.mark.parametrize(
    "resize,size", [(48, 40), (37, 37), (64, 57), (None, 32), (None, 33), (16, 24)]
)
def test_resize_center_crop_equals_torchvision(height, width, resize, size):
    """Also crops larger than the picture (padding), odd differences (rounding), thin pictures."""
    crop = A.ResizeCenterCrop(resize, size)
    images = pictures(3, height, width, dtype=torch.float64)
    boxes = crop.sample(*sides(3, height, width))
    steps = (
        [T.CenterCrop(size)]
        if resize is None
        else [T.Resize(resize, antialias=True), T.CenterCrop(size)]
    )
    close(crop.apply(images, boxes), T.Compose(steps)(images), 1e-6)

    raw = pictures(3, height, width, dtype=torch.uint8)
    for picture, out in zip(raw, crop.apply(raw, boxes)):
        picture = Image.fromarray(picture.permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(T.Compose(steps)(picture))).permute(2, 0, 1)
        close(out * 255, expected, 1.01)  # Pillow rounds after each of the two axes


@pytest.mark.parametrize("height,width,size", [(64, 48, 24), (30, 30, 60), (90, 33, 33)])
def test_resized_crop_equals_pillows(height, width, size):
    crop = A.RandomResizedCrop(size)
    raw = pictures(8, height, width, dtype=torch.uint8)
    boxes = crop.sample(*sides(8, height, width), seeded(3))
    for picture, box, out in zip(raw, boxes.tolist(), crop.apply(raw, boxes)):
        expected = F.resized_crop(
            Image.fromarray(picture.permute(1, 2, 0).numpy()), *box, [size, size]
        )
        close(out * 255, torch.from_numpy(np.array(expected)).permute(2, 0, 1), 1.01)


@pytest.mark.parametrize("box", [(8, 8, 1, 1), (0, 0, 16, 16), (15, 0, 1, 16)])
def test_a_flat_picture_stays_flat(box):
    flat = torch.full((1, 3, 16, 16), 0.3)
    close(
        A.RandomResizedCrop(11).apply(flat, torch.tensor([box])),
        torch.full((1, 3, 11, 11), 0.3),
        1e-6,
    )


def test_geometry_is_float32_under_autocast():
    crop, images = A.RandomResizedCrop(20), pictures(4, 30, 30)
    boxes = crop.sample(*sides(4, 30, 30), seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = crop.apply(images, boxes)
    assert torch.equal(out, crop.apply(images, boxes))


def two_sample_distance(a, b):
    """Largest distance of two empirical distribution functions (Kolmogorov-Smirnov)."""
    a, b = np.sort(np.asarray(a)), np.sort(np.asarray(b))
    points = np.concatenate((a, b))
    return np.abs(
        np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)
    ).max()


@pytest.mark.parametrize(
    "height,width,scale,ratio",
    [
        (100, 140, (0.08, 1.0), RATIO),
        (32, 32, (0.2, 1.0), RATIO),
        (30, 200, (0.6, 1.0), RATIO),  # most boxes are the fallback
        (150, 60, (0.5, 1.0), (0.8, 3.0)),
    ],
)
def test_crop_boxes_follow_torchvisions_distribution(height, width, scale, ratio):
    n, image = 5000, torch.empty(3, height, width)
    boxes = A.RandomResizedCrop(32, scale, ratio).sample(*sides(n, height, width), seeded(1))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = torch.tensor(
            [T.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
        )
    limit = 2.5 * math.sqrt(2 / n)  # exceeded by chance with probability 1e-5

    def facts(boxes):
        top, left, h, w = boxes.double().numpy().T
        facts = {
            "area": h * w,
            "aspect": np.round(w / h, 6),
            "height": h,
            "width": w,
            "top": top,
            "left": left,
        }
        facts["bottom"], facts["right"] = top + h, left + w
        facts["place"] = np.where(h < height, top / np.maximum(height - h, 1), -1)
        return facts

    ours, theirs = facts(boxes), facts(theirs)
    for name in ours:
        assert two_sample_distance(ours[name], theirs[name]) < limit, name


@pytest.mark.parametrize("height,width", [(10, 100), (100, 10), (33, 77), (20, 20)])
def test_crop_fallback_is_torchvisions(height, width):
    """An area of twice the picture never fits: every box is the central fallback."""
    boxes = A.RandomResizedCrop(8, (2.0, 2.0)).sample(*sides(3, height, width), seeded())
    expected = T.RandomResizedCrop.get_params(
        torch.empty(3, height, width), [2.0, 2.0], list(RATIO)
    )
    assert boxes.tolist() == [list(expected)] * 3


def test_crop_of_pictures_of_different_sizes():
    g = seeded(7)
    heights, widths = (torch.randint(1, 400, (5000,), generator=g) for _ in range(2))
    top, left, h, w = A.RandomResizedCrop(8).sample(heights, widths, seeded()).unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= heights).all() and (left + w <= widths).all()
    # The same seed takes the same relative boxes from pictures ten times as large.
    large = A.RandomResizedCrop(8).sample(*sides(200, 500, 700), seeded()).double()
    small = A.RandomResizedCrop(8).sample(*sides(200, 50, 70), seeded()).double() * 10
    assert (
        (large - small).abs().amax(1) <= 15
    ).double().mean() > 0.95  # rounding may change which try fits


# -------------------------------------------------------------------------------- colour operations

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize(
    "jitter",
    [
        dict(brightness=0.8),
        dict(contrast=0.8),
        dict(saturation=1.5),
        dict(hue=0.5),
        dict(hue=(0.2, 0.3)),
        dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        dict(brightness=(1.2, 1.9), contrast=(0.0, 0.1), saturation=(2.0, 3.0), hue=0.4),
    ],
    ids=str,
)
def test_color_jitter_equals_torchvision_in_each_images_own_order(jitter):
    op, images = A.ColorJitter(**jitter), pictures(40, 13, 18)
    kept = images.clone()
    params = op.sample(40, seeded(4))
    expected = images.clone()
    for row, order, factors in zip(*(params[k].tolist() for k in ("rows", "order", "factors"))):
        assert sorted(order) == [0, 1, 2, 3]
        for which in order:
            expected[row] = ADJUST[which](expected[row], factors[which])
    close(op.apply(images, params), expected, 1e-5)
    assert torch.equal(images, kept)
    assert len(set(map(tuple, params["order"].tolist()))) > 10


@pytest.mark.parametrize("turn", [-0.5, -0.37, -0.1, 0.0, 0.03, 1 / 6, 0.25, 0.5])
def test_hue_on_every_kind_of_colour(turn):
    """Primary and mixed colours, ties of two or three channels, black and white."""
    levels = torch.tensor([0, 0.25, 0.6, 1])
    x = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8)
    params = {"rows": torch.tensor([0]), "order": torch.tensor([[3, 0, 1, 2]])}
    params["factors"] = torch.tensor([[1, 1, 1, turn]])
    close(A.ColorJitter(hue=0.5).apply(x, params), F.adjust_hue(x, turn), 2e-6)
    if abs(turn) == 0.5:  # half a turn: red becomes cyan
        red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
        close(A.ColorJitter(hue=0.5).apply(red, params), 1 - red, 1e-6)


def test_jitter_factors_and_orders_follow_torchvisions_distribution():
    n, op = 6000, A.ColorJitter(0.4, 0.9, (0.5, 3.0), 0.1)
    params = op.sample(n, seeded(5))
    theirs = T.ColorJitter(0.4, 0.9, (0.5, 3.0), 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        draws = [
            T.ColorJitter.get_params(
                theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
            )
            for _ in range(n)
        ]
    for which in range(4):
        distance = two_sample_distance(params["factors"][:, which], [d[1 + which] for d in draws])
        assert distance < 1.95 * math.sqrt(2 / n)
    _, counts = np.unique(params["order"].numpy() @ np.array([64, 16, 4, 1]), return_counts=True)
    expected = n / 24
    assert len(counts) == 24
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 49.7  # chi-square, 23 degrees of freedom, probability 0.001
    factors = op.sample(n, seeded(5))["factors"]
    assert factors[:, 0].min() >= 0.6 and factors[:, 0].max() <= 1.4
    assert (
        A.ColorJitter(brightness=1.5).sample(1000, seeded())["factors"][:, 0].min() >= 0
    )  # not below zero
    # Order and factors are independent, and belong to the image, not to its place in the batch.
    first_is_hue = params["order"][:, 0] == A.HUE
    assert (
        two_sample_distance(params["factors"][first_is_hue, 3], params["factors"][~first_is_hue, 3])
        < 0.07
    )


@pytest.mark.parametrize(
    "height,width,k",
    [(2, 2, 3), (11, 11, 3), (40, 64, 5), (64, 31, 3), (90, 96, 9), (211, 224, 21)],
)
def test_blur_equals_torchvision(height, width, k):
    op, images = A.GaussianBlur((0.1, 4.0), p=0.7), pictures(12, height, width)
    params = op.sample(12, seeded(2))
    expected = images.clone()
    expected[params["rows"]] = per_image(
        lambda x, s: F.gaussian_blur(x, [k, k], [s, s]), images[params["rows"]], params["sigma"]
    )
    assert 0 < len(params["rows"]) < 12
    close(op.apply(images, params), expected, 2e-6)


def test_blur_kernel_rule():
    def reach(size):  # width of the spot a single bright pixel becomes
        dot = torch.zeros(1, 3, size, size)
        dot[:, :, size // 2, size // 2] = 1
        op = A.GaussianBlur((50.0, 50.0), p=1.0)
        return int((op.apply(dot, op.sample(1, seeded()))[0, 0, size // 2] > 0).sum())

    assert [reach(s) for s in (8, 32, 64, 96, 224)] == [3, 3, 7, 9, 23]


def test_flip_grey_normalise_equal_torchvision():
    images = pictures(30, 9, 14)
    for op, function in (
        (A.RandomHorizontalFlip(0.5), F.hflip),
        (A.RandomGrayscale(0.5), lambda x: F.rgb_to_grayscale(x, 3)),
    ):
        params, kept = op.sample(30, seeded(1)), images.clone()
        expected = images.clone()
        for row in params["rows"].tolist():
            expected[row] = function(images[row])
        assert 0 < len(params["rows"]) < 30
        close(op.apply(images, params), expected, 1e-6)
        assert torch.equal(images, kept), op
    op = A.Normalize(A.IMAGENET_MEAN, A.IMAGENET_STD)
    close(
        op.apply(images, op.sample(30)), F.normalize(images, A.IMAGENET_MEAN, A.IMAGENET_STD), 1e-6
    )


SWITCHED = [
    A.RandomHorizontalFlip,
    A.RandomGrayscale,
    lambda p: A.GaussianBlur(p=p),
    lambda p: A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=p),
]


@pytest.mark.parametrize("make", SWITCHED)
def test_probability_zero_one_and_between(make):
    images = pictures(6, 10, 10)[1:]  # without the grey one, which some operations leave as it is
    never, always = make(0.0), make(1.0)
    assert torch.equal(never.apply(images, never.sample(5, seeded())), images)
    params = always.sample(5, seeded())
    assert sorted(params["rows"].tolist()) == [0, 1, 2, 3, 4]
    changed = always.apply(images, params)
    assert ((changed - images).abs().amax((1, 2, 3)) > 1e-3).all()
    n = 20000
    rows = make(0.3).sample(n, seeded(8))["rows"]
    assert len(rows) == len(set(rows.tolist())) and abs(len(rows) / n - 0.3) < 3.3 * math.sqrt(
        0.21 / n
    )
    assert always.apply(images[:0], always.sample(0, seeded())).shape == (0, 3, 10, 10)


def test_sigma_is_uniform():
    sigma = (
        A.GaussianBlur((0.1, 2.0), p=1.0).sample(20000, seeded())["sigma"].double().sort().values
    )
    assert sigma[0] >= 0.1 and sigma[-1] <= 2.0
    assert (((sigma - 0.1) / 1.9) - torch.linspace(0, 1, 20000)).abs().max() < 1.95 / math.sqrt(
        20000
    )


# ------------------------------------------------------------------------------------------ recipes


def moco_recipe(size):
    return A.Compose(
        A.RandomResizedCrop(size, (0.2, 1.0)),
        A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        A.RandomGrayscale(0.2),
        A.GaussianBlur((0.1, 2.0), p=0.5),
        A.RandomHorizontalFlip(),
        A.Normalize(A.IMAGENET_MEAN, A.IMAGENET_STD),
    )


def view_of(recipe, images, seed, device="cpu"):
    g = seeded(seed)
    boxes = recipe.geometry.sample(*sides(len(images), *images.shape[2:]), g)
    params = recipe.sample(len(images), g)
    return recipe.apply(recipe.geometry.apply(images.to(device), boxes), params)


def test_views_depend_on_the_generator_alone():
    images, recipe = pictures(16, 24, 24, dtype=torch.uint8), moco_recipe(24)
    state = torch.random.get_rng_state()
    first = view_of(recipe, images, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(view_of(recipe, images, 1), first)
    assert not torch.equal(view_of(recipe, images, 2), first)
    torch.random.set_rng_state(state)


def test_recipe_applies_its_operations_in_order():
    images, recipe = pictures(10, 20, 20), moco_recipe(20)
    params = recipe.sample(10, seeded())
    expected = images
    for op, op_params in zip(recipe.ops, params):
        expected = op.apply(expected, op_params)
    kept = images.clone()
    assert torch.equal(recipe.apply(images, params), expected) and torch.equal(images, kept)


def test_a_recipe_for_whole_batches_is_one_graph_and_gives_the_same_pictures():
    images, recipe = pictures(16, 20, 20), moco_recipe(20)
    graphs = []
    compiled = torch.compile(
        A.Compose.apply_,
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
        fullgraph=True,
    )
    assert recipe.is_compilable
    for seed in (1, 2):
        params = recipe.sample(16, seeded(seed))
        expected = recipe.apply(images, params)
        whole = [of_all_images(16, own) for own in params]
        assert torch.equal(recipe.apply(images, whole), expected)
        close(compiled(recipe, images, whole), expected, 5e-6)
    assert len(graphs) == 1
    nothing = [{name: value[:0] for name, value in own.items()} for own in params]
    whole = [of_all_images(16, own) for own in nothing]
    unchanged = recipe.apply(images, whole)
    assert torch.equal(unchanged, recipe.ops[-1].apply(images, {}))


def test_parameters_travel_as_one_tensor():
    params = [of_all_images(5, own) for own in moco_recipe(20).sample(5, seeded(1))]
    arrived = sent_together(params, torch.device("cpu"))
    assert [[*own] for own in arrived] == [[*own] for own in params]
    storages = set()
    for own, sent in zip(params, arrived):
        for name, value in own.items():
            assert sent[name].dtype == value.dtype and torch.equal(sent[name], value)
            storages.add(sent[name].untyped_storage().data_ptr())
    assert len(storages) == 1
    assert sent_together([{}], torch.device("cpu")) == [{}]


def test_same_parameters_on_pictures_of_another_size():
    """A small picture and its enlargement get the same colours and the same flip."""
    small = pictures(12, 16, 16)
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    recipe = A.Compose(
        A.ResizeCenterCrop(None, 16),
        A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        A.RandomGrayscale(0.5),
        A.RandomHorizontalFlip(),
    )
    params = recipe.sample(12, seeded(9))
    # Every third pixel, mirrored or not, is the pixel of the small picture.
    close(recipe.apply(small, params), recipe.apply(large, params)[:, :, 1::3, 1::3], 1e-5)


def test_compose_prints_and_checks_itself():
    lines = repr(moco_recipe(32)).splitlines()
    assert len(lines) == 6 and lines[0].startswith("RandomResizedCrop(size=32, scale=(0.2, 1.0)")
    assert "hue=0.1, p=0.8" in lines[1] and len(moco_recipe(32).ops) == 5
    with pytest.raises(TypeError, match="one geometry"):
        A.Compose(A.RandomHorizontalFlip())
    with pytest.raises(TypeError, match="one geometry"):
        A.Compose(A.ResizeCenterCrop(None, 8), A.RandomResizedCrop(8))
    recipe = moco_recipe(8)
    with pytest.raises(TypeError, match="float images"):
        recipe.apply(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), recipe.sample(1))
    with pytest.raises(ValueError):
        A.RandomResizedCrop(8, (1.0, 0.2))
    with pytest.raises(ValueError):  # torchvision's
        A.ColorJitter(hue=0.6).sample(1)


def test_whole_recipe_equals_torchvision_step_by_step():
    """Replays the sampled parameters with torchvision, one image at a time, in float64 geometry."""
    images = pictures(20, 36, 28, dtype=torch.uint8)
    recipe = moco_recipe(22)
    g = seeded(11)
    boxes = recipe.geometry.sample(*sides(20, 36, 28), g)
    jitter, grey, blur, flip, _ = params = recipe.sample(20, g)
    out = recipe.apply(recipe.geometry.apply(images, boxes), params)
    for i in range(20):
        x = F.resized_crop(images[i].double() / 255, *boxes[i].tolist(), [22, 22], antialias=True)
        if i in jitter["rows"]:
            m = jitter["rows"].tolist().index(i)
            for which in jitter["order"][m].tolist():
                x = ADJUST[which](x, jitter["factors"][m, which].item())
        x = F.rgb_to_grayscale(x, 3) if i in grey["rows"] else x
        if i in blur["rows"]:
            x = F.gaussian_blur(
                x, [3, 3], [blur["sigma"][blur["rows"].tolist().index(i)].item()] * 2
            )
        x = F.hflip(x) if i in flip["rows"] else x
        close(out[i], F.normalize(x, A.IMAGENET_MEAN, A.IMAGENET_STD), 5e-5)


@pytest.mark.gpu
def test_cuda_gives_the_views_of_the_cpu():
    recipe = A.Compose(moco_recipe(24).geometry, A.RandomHorizontalFlip(0.0), *moco_recipe(24).ops)
    images = pictures(64, 40, 30, dtype=torch.uint8)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = view_of(recipe, images, 5, "cuda")
    assert out.is_cuda and out.dtype == torch.float32
    close(out.cpu(), view_of(recipe, images, 5), 5e-5)
    centre = A.ResizeCenterCrop(33, 32)
    boxes = centre.sample(*sides(64, 40, 30))
    close(centre.apply(images.cuda(), boxes).cpu(), centre.apply(images, boxes), 1e-5)

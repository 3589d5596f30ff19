"""Texture synthesis: engines against slow references, the script on good and bad input."""

import errno
import json
import math
import os
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image

from common import UsageError, UserError
from common.sets import open_tree
from nonsem_neg import moco_non_sem_neg
from nonsem_neg.textures import original_root_of, pair_by_path
from preprocess import imagenet_texture_syn as syn
from preprocess import texture_engines, texture_jobs, texture_options, texture_tree, workers
from preprocess import texture_mrs as mrs
from preprocess import texture_quilt as quilt
from preprocess.workers import Interrupted

SCRIPT = "preprocess/imagenet_texture_syn.py"
SMALL = {
    "quilt": [
        "--engine",
        "quilt",
        "--size",
        "48",
        "--patch",
        "32",
        "--block",
        "16",
        "--overlap",
        "4",
    ],
    "mrs": [
        "--engine",
        "mrs",
        "--size",
        "32",
        "--patch",
        "24",
        "--k-neighs",
        "12",
        "--m-rand",
        "10",
        "--glance",
        "6",
    ],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(count=1, examples=2, side=24, seed=0):
    return torch.randint(
        0,
        256,
        (count, examples, 3, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


def colours(pixels):
    """The set of colours of (..., 3, H, W)."""
    return {tuple(c) for c in pixels.movedim(-3, -1).reshape(-1, 3).tolist()}


# ---------------------------------------------------------------------------------------------- mrs


def test_schedule_has_the_originals_stages():
    schedule = mrs.Schedule(mrs.Options(), size=64, patch=24)
    ends = [math.floor(0.5**s * 64 * 64) for s in (5, 4, 3, 2, 1, 0)]
    assert [level for level, _ in schedule.stages] == [0, 1, 2, 3, 4, 4]
    for (_, chunks), end in zip(schedule.stages, ends):
        targets = torch.cat([c.target for c in chunks])
        first = 1 if end == ends[0] else 0  # the very first pixel is not compared with anything
        assert torch.equal(targets, schedule.order[first:end])
        assert max(len(c.target) for c in chunks) <= 0.02 * end
    assert torch.equal(schedule.order.sort().values, torch.arange(64 * 64))


def test_neighbours_are_the_nearest_resolved_ones():
    k, size = 7, 20
    schedule = mrs.Schedule(mrs.Options(k_neighs=k, backtrack_stages=2), size=size, patch=8)
    resolved = 1
    for _, chunks in schedule.stages:
        done = 0 if chunks[0].first else 1
        for chunk in chunks:
            known = schedule.order[: max(done, resolved)]
            down, right = (
                known[None] // size - chunk.target[:, None] // size,
                known[None] % size - chunk.target[:, None] % size,
            )
            nearest = (
                (down**2 + right**2)
                .float()
                .topk(min(k, len(known)), largest=False)
                .values.sort()
                .values
            )
            n, t = chunk.neighbours.long(), chunk.target[:, None]
            squared = ((n // size - t // size) ** 2 + (n % size - t % size) ** 2).float()
            assert torch.equal(squared, nearest) and set(n.flatten().tolist()) <= set(
                known.tolist()
            )
            torch.testing.assert_close(
                chunk.weights, torch.exp(-squared / squared.mean(1, keepdim=True).clamp(min=1e-9))
            )
            done += len(chunk.target)
        resolved = done


def slow_cost(examples, where, around, candidate, cauchy):
    """Sum the cost in the module's description term by term.

    examples (M, 3, P, P); places are (example, row, column).
    """

    def colour(example, y, x):
        side = examples.shape[-1]
        return examples[example, :, y, x].tolist() if 0 <= y < side and 0 <= x < side else [0, 0, 0]

    mean = max(sum(dy * dy + dx * dx for _, dy, dx in around) / len(around), 1e-9)
    total, (example, y, x) = 0.0, candidate
    for pixel, dy, dx in around:
        pairs = zip(colour(*where[pixel]), colour(example, y + dy, x + dx))
        terms = [math.log(1 + ((a - b) / 255 / cauchy) ** 2) for a, b in pairs]
        total += math.exp(-(dy * dy + dx * dx) / mean) * sum(terms)
    return total


@pytest.mark.parametrize("shortlist", [0, 1000])  # a list that holds all candidates changes nothing
def test_a_visit_takes_the_cheapest_candidate_of_a_slow_loop(shortlist):
    options = mrs.Options(
        k_neighs=6, m_rand=5, shortlist=shortlist, glance=3, backtrack_stages=2, cauchy=0.7
    )
    size, patch = 16, 12
    schedule = mrs.Schedule(options, size, patch)
    patches, seeds = noise(side=patch), torch.tensor([(5 << 40) + 3])
    state, canvas = mrs._Synthesis(patches, seeds, schedule), schedule.canvas
    position = {
        int(p): i for i, p in enumerate(canvas.places)
    }  # in the canvas -> number of the example pixel

    images = mrs.blur_levels(patches, schedule.levels)[:, 0]
    checked = 0
    state.source[:, schedule.order[:1]] = state.random_places(
        torch.full((1,), -1, dtype=torch.int32)
    )
    for level, chunks in schedule.stages:
        for chunk in chunks:
            before = state.source[0].clone()
            state.visit(chunk, state.tables[level])
            if chunk is not chunks[len(chunks) // 2]:
                continue
            where = {
                i: (p // patch**2, p // patch % patch, p % patch)
                for i, p in (
                    (i, position[int(s)]) for i, s in enumerate(before) if int(s) in position
                )
            }
            for v in range(min(3, len(chunk.target))):
                y, x = divmod(int(chunk.target[v]), size)
                around = [
                    (int(n), int(n) // size - y, int(n) % size - x) for n in chunk.neighbours[v]
                ]
                candidates = [
                    (e, sy - dy, sx - dx)
                    for (e, sy, sx), dy, dx in ((where[n], dy, dx) for n, dy, dx in around)
                ]
                candidates = [c for c in candidates if 0 <= c[1] < patch and 0 <= c[2] < patch]
                counters = torch.arange(5, dtype=torch.int32) + (chunk.first + v) * 5
                for p in mrs.random_integers(seeds, counters, 2 * patch**2)[0].tolist():
                    candidates.append((p // patch**2, p // patch % patch, p % patch))
                costs = {c: slow_cost(images[level], where, around, c, 0.7) for c in candidates}
                chosen = position[int(state.source[0, chunk.target[v]])]
                chosen = chosen // patch**2, chosen // patch % patch, chosen % patch
                assert chosen in costs and costs[chosen] == pytest.approx(
                    min(costs.values()), abs=1e-5
                )
                checked += 1
    assert checked >= 6


def test_mrs_copies_pixels_and_keeps_the_pattern():
    side = torch.arange(32)
    stripes = ((side // 4 % 2) * 200 + 20).byte().expand(1, 2, 3, 32, 32).clone()
    stripes[:, :, 1] //= 2
    schedule = mrs.Schedule(mrs.Options(k_neighs=20, m_rand=20), size=48, patch=32)
    made = mrs.synthesise(stripes, torch.tensor([1]), schedule)
    assert made.shape == (1, 3, 48, 48) and made.dtype == torch.uint8
    assert colours(made) <= colours(stripes)
    red = (made[0, 0].float() - 120) / 100
    upright = (red[1:] == red[:-1]).float().mean()
    period = (red[:, 8:] == red[:, :-8]).float().mean()  # by chance both would be a half
    assert upright > 0.9 and period > 0.75


def test_blur_levels_end_sharp_and_keep_the_mean():
    patches = noise(side=24)
    levels = mrs.blur_levels(patches, 5)
    assert torch.equal(levels[4], patches)
    spread = [level.float().std().item() for level in levels]
    assert all(a < b for a, b in zip(spread, spread[1:]))
    assert all(abs(level.float().mean() - patches.float().mean()) < 3 for level in levels)
    assert torch.equal(
        mrs.blur_levels(torch.full_like(patches, 77), 5), torch.full((5, *patches.shape), 77).byte()
    )


def test_random_integers_are_even_and_belong_to_their_seed():
    counters = torch.arange(200_000, dtype=torch.int32)
    seeds = torch.tensor([1, 2, 1 << 45, (1 << 62) - 1])
    drawn = mrs.random_integers(seeds, counters, 10)
    counts = torch.stack([row.bincount(minlength=10) for row in drawn])
    assert drawn.min() == 0 and drawn.max() == 9
    assert (counts - 20_000).abs().max() < 5 * math.sqrt(20_000)
    assert torch.equal(mrs.random_integers(seeds[2:3], counters[500:600], 10)[0], drawn[2, 500:600])
    for a in range(4):
        for b in range(a):
            assert abs((drawn[a] == drawn[b]).float().mean() - 0.1) < 0.005
    assert abs((drawn[:, 1:] == drawn[:, :-1]).float().mean() - 0.1) < 0.005


# -------------------------------------------------------------------------------------------- quilt


def test_cheapest_path_is_that_of_an_exhaustive_search():
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(2, 3, 5, 4, generator=generator)

    def paths(start, rows):
        if rows == 0:
            return [[start]]
        return [
            [start, *rest]
            for step in (-1, 0, 1)
            if 0 <= start + step < 4
            for rest in paths(start + step, rows - 1)
        ]

    found = quilt.cheapest_path(error)
    for i in range(2):
        for j in range(3):
            cost = {
                tuple(p): sum(error[i, j, row, c].item() for row, c in enumerate(p))
                for s in range(4)
                for p in paths(s, 4)
            }
            assert cost[tuple(found[i, j].tolist())] == pytest.approx(min(cost.values()))


def test_quilt_errors_are_the_sums_of_squares():
    options = quilt.Options(block=10, overlap=3, tolerance=0.5, floor=1.0)
    patches = noise(side=20)
    work = quilt._Quilt(patches, torch.tensor([3]), options, 30)
    under = torch.randn(1, 3, 3, 10, 10, generator=torch.Generator().manual_seed(1)) * 60
    good = work._good(under, [0, 1, 2])
    for i, mask in enumerate(work.masks):
        places = (
            work.pixels[0]
            .unfold(2, 10, 1)
            .unfold(3, 10, 1)
            .permute(0, 2, 3, 1, 4, 5)
            .reshape(-1, 3, 10, 10)
        )
        slow = ((places - under[0, i]) ** 2 * mask).sum((1, 2, 3))
        wanted = slow <= max(1.5 * slow.min().item(), 3 * mask.sum().item())
        assert torch.equal(good[0, i], wanted) and 0 < wanted.sum() < len(wanted)
    chosen = torch.tensor([[5, 11 * 11 + 23]])
    assert torch.equal(work._blocks(chosen)[0], places[chosen[0]])
    assert (
        work.masks[0, :, :3].all() and not work.masks[0, :, 3:].any()
    )  # first row of blocks: only the left strip


def test_quilt_copies_pixels_and_joins_blocks_without_a_seam():
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    waves = (torch.sin(x / 2.0) * 60 + torch.cos(y / 3.0) * 50 + 128).byte().expand(1, 2, 3, 40, 40)
    made = quilt.synthesise(waves, torch.tensor([9]), quilt.Options(block=16, overlap=4), size=60)
    assert made.shape == (1, 3, 60, 60) and made.dtype == torch.uint8
    assert colours(made) <= colours(waves)
    for axis in (1, 2):  # no step between neighbours is much beyond those of the example
        steps = made[0].float().diff(dim=axis).abs()
        assert steps.max() < 2.5 * waves[0, 0].float().diff(dim=axis).abs().max()


@pytest.mark.parametrize("engine", ["mrs", "quilt"])
def test_a_texture_depends_neither_on_its_batch_nor_its_neighbours(engine):
    patches, seeds = noise(count=4), torch.tensor([1, 2, 3, 1])
    if engine == "mrs":
        schedule = mrs.Schedule(mrs.Options(k_neighs=10, m_rand=10), size=32, patch=24)

        def make(p, s):
            return mrs.synthesise(p, s, schedule)
    else:

        def make(p, s):
            return quilt.synthesise(p, s, quilt.Options(block=10, overlap=3), 32)

    together = make(patches, seeds)
    for i in range(4):
        assert torch.equal(make(patches[i : i + 1], seeds[i : i + 1])[0], together[i])
    assert not torch.equal(
        make(patches[:1], seeds[1:2])[0], together[0]
    )  # another seed, another texture


def test_batched_work_agrees_with_one_by_one():
    """The code that a GPU runs, on the CPU: a batch in one go.

    Sums may round differently there, so nearly all must agree.
    """
    patches, seeds = noise(count=3), torch.tensor([1, 2, 3])
    schedule = mrs.Schedule(
        mrs.Options(k_neighs=10, m_rand=10, backtrack_stages=3), size=24, patch=24
    )
    one_by_one = mrs.synthesise(patches, seeds, schedule)
    assert (mrs._Synthesis(patches, seeds, schedule).run() == one_by_one).float().mean() > 0.9
    options = quilt.Options(block=10, overlap=3)
    assert (
        quilt._Quilt(patches, seeds, options, 32).run()
        == quilt.synthesise(patches, seeds, options, 32)
    ).float().mean() > 0.9


@pytest.mark.gpu
def test_engines_on_a_gpu():
    patches, seeds = noise(count=3, side=40), torch.tensor([1, 2, 3])
    schedule = mrs.Schedule(mrs.Options(), size=48, patch=40).to("cuda")
    made = mrs.synthesise(patches.cuda(), seeds.cuda(), schedule)
    assert made.shape == (3, 3, 48, 48) and all(
        colours(m) <= colours(p) for m, p in zip(made, patches)
    )
    made = quilt.synthesise(patches.cuda(), seeds.cuda(), quilt.Options(), 48)
    assert all(colours(m) <= colours(p) for m, p in zip(made, patches))


# -------------------------------------------------------------------------------------- one picture


def photo(seed=0, size=(60, 44), mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, **options).save(path)
    return path


def test_patches_are_the_centre_and_any_place():
    picture = Image.fromarray(
        np.arange(10 * 12 * 3, dtype=np.uint16).reshape(10, 12, 3).astype(np.uint8)
    )
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    seen = set()
    for down in range(20):
        for right in range(20):
            centre, other = texture_jobs.patches_of(picture, 8, down, right)
            assert torch.equal(centre, whole[:, 1:9, 2:10])
            top, left = down % 3, right % 5
            assert torch.equal(other, whole[:, top : top + 8, left : left + 8])
            seen.add((top, left))
    assert len(seen) == 15  # the last legal place, too


@pytest.mark.parametrize("size", [(5, 300), (300, 5), (1, 1), (1, 4000), (31, 31), (31, 32)])
def test_small_sides_are_enlarged_first(size):
    patches = texture_jobs.patches_of(photo(size=size), 32, 12345, 678910)
    assert patches.shape == (2, 3, 32, 32)
    flat = Image.new("RGB", size, (10, 200, 30))
    assert colours(texture_jobs.patches_of(flat, 32, 12345, 678910)) == {(10, 200, 30)}


def settings(*flags):
    return texture_options.settings_of(
        syn.parse_args(["--imagenet_path", "A", "--imagenet_t_path", "B", *flags])
    )


def test_patches_and_blocks_are_in_proportion_to_the_picture():
    published = settings()
    assert (published.size, published.patch) == (224, 96)
    assert (published.quilt.block, published.quilt.overlap) == (34, 6)
    for side in (224, 375, 1000):
        assert published.scale(side) == 1  # pictures of the published size: 96 of their own pixels
    for side in (32, 64, 200):
        for size in (32, 128, 224, 448):
            chosen = settings("--size", str(size))
            of_its_pixels = chosen.patch / chosen.scale(side)
            assert of_its_pixels / side == pytest.approx(96 / 224, rel=0.03)
            assert chosen.quilt.block / chosen.patch == pytest.approx(
                34 / 96, abs=0.5 / chosen.patch
            )
            assert chosen.quilt.overlap / chosen.quilt.block == pytest.approx(
                6 / 34, abs=0.5 / chosen.quilt.block
            )
    small = settings("--size", "32")  # 32-pixel pictures: pixel by pixel
    assert (small.patch, small.quilt.block, small.quilt.overlap, small.scale(32)) == (14, 5, 1, 1)
    for size in range(1, 30):
        tiny = settings("--size", str(size), "--engine", "quilt")
        assert 2 <= tiny.quilt.block <= tiny.patch


def test_what_is_typed_wins():
    typed = settings("--patch", "40", "--size", "100")
    assert typed.patch == 40 and typed.scale(100) == typed.scale(40) == 1 and typed.scale(20) == 2
    assert (typed.quilt.block, typed.quilt.overlap) == (14, 2)
    quilt = settings("--block", "20", "--overlap", "7").quilt
    assert (quilt.block, quilt.overlap) == (20, 7)
    # --patch 96 is what the published script does, and the record of it that of a tree made with it
    assert (
        "in_proportion" not in settings("--patch", "96").recorded()
        and settings().recorded()["in_proportion"]
    )


def test_textures_of_a_small_picture_hold_no_whole_object(tmp_path, capfd):
    """No texture of a dot as wide as a patch has a whole one in a frame of ground."""
    picture = np.full((32, 32, 3), 40, np.uint8)
    picture[9:23, 9:23] = 220
    (tmp_path / "set" / "train" / "dot").mkdir(parents=True)
    Image.fromarray(picture).save(tmp_path / "set" / "train" / "dot" / "d.png")
    flags = [
        "--imagenet_path",
        str(tmp_path / "set"),
        "--device",
        "cpu",
        "--workers",
        "1",
        "--engine",
        "quilt",
    ]
    syn.main([*flags, "--imagenet_t_path", str(tmp_path / "T")])
    warned = capfd.readouterr().err
    assert (
        warned.startswith("warning: pictures below 96 pixels, such as ")
        and "d.png (32 x 32): a patch is 14" in warned
    )
    loaded, _ = texture_jobs.load(
        settings(),
        texture_jobs.Job(str(tmp_path / "set" / "train" / "dot" / "d.png"), "train/dot/d.png", ""),
    )
    assert (
        loaded.shape == (2, 3, 96, 96) and (loaded[0] > 130).float().mean() > 0.98
    )  # the dot, no ground around it
    syn.main([*flags, "--imagenet_t_path", str(tmp_path / "P"), "--patch", "14", "--size", "32"])
    assert "a patch is 14 of its pixels" in capfd.readouterr().err


def test_no_warning_for_larger_pictures(tmp_path, capfd):
    save(tmp_path / "set" / "train" / "a" / "p.png", size=(96, 100))
    make(tmp_path / "set", tmp_path / "T")
    assert "a patch is" not in capfd.readouterr().err


def test_every_kind_of_picture_is_read_as_rgb(tmp_path):
    grey = np.linspace(0, 65535, 40 * 40).reshape(40, 40)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.float32) / 257).save(tmp_path / "float.tif")
    for mode, ending in (
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("1", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
    ):
        photo(mode=mode).save(tmp_path / f"{mode}.{ending}")
    for file in tmp_path.iterdir():
        image = texture_jobs.read_rgb(str(file))
        assert image.mode == "RGB" and np.asarray(image).std() > 20, file.name
    for name in ("16.png", "float.tif"):
        assert (
            np.abs(
                np.asarray(texture_jobs.read_rgb(str(tmp_path / name)))[..., 0] - grey / 257
            ).max()
            <= 1
        )


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def tree(tmp_path):
    names = ("b0.JPEG", 'it\'s a "bird" \u9ce5.jpg', "b2.png")
    for i, name in enumerate(names):
        save(tmp_path / "set" / "train" / "bird" / name, seed=i)
    save(tmp_path / "set" / "train" / "fish" / "f;$(x).png", seed=8, mode="L")
    save(tmp_path / "set" / "val" / "bird" / "b0.JPEG", seed=10)
    save(tmp_path / "set" / "val" / "fish" / "tiny.png", seed=11, size=(20, 9))
    return tmp_path / "set"


def make(tree, out, *flags, engine="quilt", workers=1):
    syn.main(
        [
            "--imagenet_path",
            str(tree),
            "--imagenet-t-path",
            str(out),
            "--device",
            "cpu",
            "--workers",
            str(workers),
            *SMALL[engine],
            *flags,
        ]
    )


def files(out):
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in sorted(Path(out).rglob("*"))
        if p.suffix == ".png"
    }


def refuse(argv, *words):
    with pytest.raises(UsageError) as error:
        syn.main([str(a) for a in argv])
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("engine", ["mrs", "quilt"])
def test_twin_pairs_with_the_tree_and_repeats_itself(engine, tree, tmp_path, capsys):
    out = Path(f"{tree}-texture")
    make(tree, out, "--batch", "1", engine=engine)
    made = files(out)
    wanted = {p.relative_to(tree).with_suffix(".png").as_posix() for p in tree.rglob("*.*")}
    assert set(made) == wanted and len(made) == 6 and len(set(made.values())) == 6
    size = int(SMALL[engine][SMALL[engine].index("--size") + 1])
    for path in made:
        with Image.open(out / path) as image:
            assert (image.size, image.mode, image.format) == ((size, size), "RGB", "PNG")
    assert f"result: 6 of 6 textures in {out}; 6 made now" in capsys.readouterr().out
    for split in ("train", "val"):
        originals, textures = pair_by_path(open_tree(out / split), original_root_of(out))
        assert (
            len(originals) == len(textures) == len(open_tree(tree / split)) and not originals.notes
        )
    make(tree, tmp_path / "four", "--batch", "4", engine=engine)
    assert files(tmp_path / "four") == made
    for i in (1, 2):
        make(
            tree,
            tmp_path / "shards",
            "--shard",
            f"{i}/2",
            "--splits",
            "train",
            "val",
            engine=engine,
        )
        assert len(files(tmp_path / "shards")) == 3 * i
    assert files(tmp_path / "shards") == made
    make(tree, tmp_path / "seed", "--seed", "1", engine=engine)
    assert not any(files(tmp_path / "seed")[name] == made[name] for name in made)


def test_processes_and_gpu_threads_give_the_same_files(tree, tmp_path):
    make(tree, tmp_path / "one")
    make(tree, tmp_path / "two", "--batch", "2", workers=2)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    args = syn.parse_args(
        ["--imagenet_path", str(tree), "--imagenet_t_path", "unused", *SMALL["quilt"]]
    )
    bad = tree / "train" / "fish" / "bad.JPEG"
    bad.write_bytes(b"not a picture")
    jobs, _ = texture_tree.list_jobs(
        tree, texture_tree.open_splits(args.imagenet_path, None, None), tmp_path / "threads"
    )
    assert len(texture_tree.missing_of(jobs, 0)) == 7
    done = [
        d
        for batch in texture_jobs.in_threads(
            texture_options.settings_of(args), [jobs[:3], jobs[3:]], "cpu", 2
        )
        for d in batch
    ]
    assert [d.name for d in done] == [job.name for job in jobs]
    assert [d.name for d in done if d.failure] == ["train/fish/bad.JPEG"]
    assert files(tmp_path / "threads") == files(tmp_path / "one")


def test_resumes_keeps_what_is_there_and_overwrites_on_request(tree, tmp_path, capsys):
    out = tmp_path / "T"
    make(tree, out, "--limit", "2")
    whole = files(out)
    assert len(whole) == 2
    first = out / sorted(whole)[0]
    first.write_bytes(b"mine")
    left = out / "train" / "bird" / ".elsewhere-1-1.partial"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    make(tree, out)
    assert first.read_bytes() == b"mine" and len(files(out)) == 6 and not left.exists()
    assert "6 pictures, 2 exist" in capsys.readouterr().out
    make(tree, out, "--overwrite")
    assert files(out).items() >= whole.items()
    refuse(
        ["--imagenet_path", tree, "--imagenet_t_path", out, *SMALL["quilt"], "--seed", "5"],
        "seed 0, not 5",
    )
    refuse(
        ["--imagenet_path", tree, "--imagenet_t_path", out, *SMALL["mrs"]], "engine quilt, not mrs"
    )
    (out / "textures.json").write_text("{")
    refuse(
        ["--imagenet_path", tree, "--imagenet_t_path", out, *SMALL["quilt"]],
        "textures.json is damaged",
    )


def test_an_unfinished_overwrite_is_gone_on_with(tree, tmp_path, capsys):
    make(tree, tmp_path / "clean", "--seed", "5")
    out = tmp_path / "T"
    make(tree, out)
    make(tree, out, "--seed", "5", "--overwrite", "--limit", "2")
    capsys.readouterr()
    make(tree, out, "--seed", "5")
    assert "6 pictures, 2 exist" in capsys.readouterr().out
    assert files(out) == files(tmp_path / "clean")
    make(tree, out, "--seed", "5")
    assert "6 of 6 textures" in (said := capsys.readouterr().out) and "0 made now" in said


def test_a_settings_file_that_was_never_finished_is_in_nobodys_way(tree, tmp_path):
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / ".elsewhere-1-1.partial").write_text("{")
    make(tree, tmp_path / "T", "--limit", "1")
    assert len(files(tmp_path / "T")) == 1


def test_the_output_cannot_lie_in_a_class_of_a_tree_of_links(tree, tmp_path):
    links = tmp_path / "links"
    for split in ("train", "val"):
        (links / split).mkdir(parents=True)
        (links / split / "bird").symlink_to(tree / split / "bird")
    refuse(
        [
            "--imagenet_path",
            links,
            "--imagenet_t_path",
            tree / "train" / "bird" / "T",
            *SMALL["quilt"],
        ],
        "inside each other",
    )


def test_failures_are_listed_and_exit_with_1(tree, tmp_path):
    save(tree / "train" / "bird" / "b0.png", seed=5)  # its texture would have the name of b0.JPEG's
    (tree / "train" / "fish" / "text.jpg").write_text("no picture")
    whole = (tree / "val" / "bird" / "b0.JPEG").read_bytes()
    (tree / "val" / "bird" / "cut.JPEG").write_bytes(whole[: len(whole) // 2])
    done = run_script(
        SCRIPT,
        "--imagenet_path",
        tree,
        "--imagenet_t_path",
        tmp_path / "T",
        "-j",
        "1",
        "--device",
        "cpu",
        *SMALL["quilt"],
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 4 pictures failed, listed in")
    listed = dict(
        line.split("\t") for line in (tmp_path / "T" / "failures.txt").read_text().splitlines()
    )
    assert sorted(listed) == [
        "train/bird/b0.JPEG",
        "train/bird/b0.png",
        "train/fish/text.jpg",
        "val/bird/cut.JPEG",
    ]
    assert (
        listed["train/fish/text.jpg"] == "not a picture"
        and "b0.png" in listed["train/bird/b0.JPEG"]
    )
    assert len(files(tmp_path / "T")) == 5
    for name in listed:
        (tree / name).unlink()
    make(tree, tmp_path / "T")
    assert not (tmp_path / "T" / "failures.txt").exists()


def test_only_regular_files_are_read_and_what_is_too_large_is_named(tree, tmp_path, monkeypatch):
    os.mkfifo(tree / "train" / "bird" / "pipe.png")
    flags = [
        "--imagenet_path",
        tree,
        "--imagenet_t_path",
        tmp_path / "T",
        "-j",
        "1",
        "--device",
        "cpu",
        *SMALL["quilt"],
    ]
    run_script(SCRIPT, *flags, timeout=240)
    assert len(files(tmp_path / "T")) == 6
    with pytest.raises(OSError, match="not a regular file"):
        texture_jobs.read_rgb(str(tree / "train" / "bird" / "pipe.png"))
    (tree / "train" / "bird" / "pipe.png").unlink()

    def read(path, read=workers.read):
        if path.endswith("tiny.png"):
            raise MemoryError
        return read(path)

    monkeypatch.setattr(workers, "read", read)
    with pytest.raises(
        UserError, match="1 pictures failed.* val/fish/tiny.png: too large for the memory"
    ):
        make(tree, tmp_path / "U")
    assert len(files(tmp_path / "U")) == 5


def test_full_disk_stops_cleanly_and_can_be_resumed(tree, tmp_path, monkeypatch):
    out, replace, count = tmp_path / "T", os.replace, [0]

    def full(source, target):
        count[0] += str(target).endswith(".png")
        if count[0] > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError) as error:
        make(tree, out, "--batch", "1")
    assert (
        error.value.code == 1
        and "No space left" in str(error.value)
        and "same command again" in str(error.value)
    )
    monkeypatch.undo()
    assert len(files(out)) == 2 and not list(out.rglob("*.partial"))
    make(tree, out)
    assert len(files(out)) == 6


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_one_line_and_the_rest_follows(sent, tree, tmp_path, monkeypatch):
    out, replace, before = tmp_path / "T", os.replace, signal.getsignal(signal.SIGTERM)

    def stop(source, target):
        if len(files(out)) == 2:
            os.kill(os.getpid(), sent)  # as if it came in the middle of writing
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(Interrupted) as error:
        make(tree, out, "--batch", "1")
    assert error.value.code == 130 and "continues from there" in str(error.value)
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert len(files(out)) in (2, 3) and not list(out.rglob("*.partial"))
    make(tree, out)
    assert len(files(out)) == 6


def test_bad_input_is_one_line_and_harms_nothing(tree, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    a, b = ["--imagenet_path", tree], ["--imagenet_t_path", tmp_path / "T"]
    refuse([], "--imagenet_path A")
    refuse(a, "--imagenet_t_path B")
    refuse(["--imagenet_path", tmp_path / "none", *b], "none", "no such folder")
    refuse(["--imagenet_path", tree / "train", *b], "class folders", "give its parent")
    for inside in (tree, tree / "texture", tree / "train" / "bird", tmp_path):
        refuse([*a, "--imagenet_t_path", inside], "lie inside each other")
    (tmp_path / "link").symlink_to(tree)
    refuse([*a, "--imagenet_t_path", tmp_path / "link" / "T"], "lie inside each other")
    (tmp_path / "link").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    refuse([*a, "--imagenet_t_path", tmp_path / "other"], "was not made by this script")
    refuse([*a, "--imagenet_t_path", tmp_path / "other" / "thesis.txt"], "is a file")
    refuse([*a, *b, "--engine", "quilt", "--patch", "20", "--block", "21"], "--block is 21")
    refuse([*a, *b, "--overlap", "20"], "--overlap 20")
    if not torch.cuda.is_available():
        refuse([*a, *b, "--device", "cuda"], "there is no GPU")
    for flags in (
        ["--shard", "3/2"],
        ["--shard", "x"],
        ["--backtrack-pct", "1"],
        ["--engine", "gan"],
        ["--size", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            syn.main([str(f) for f in (*a, *b, *flags)])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "T").exists()
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p != tmp_path)
    (tree / "val" / "empty").mkdir()
    refuse([*a, *b], "have no picture", "empty")


def test_splits(tree, tmp_path):
    make(tree, tmp_path / "T", "--splits", "val")
    assert {name.split("/")[0] for name in files(tmp_path / "T")} == {"val"}
    (tree / "val").rename(tmp_path / "elsewhere")
    make(tree, tmp_path / "T2")
    assert {name.split("/")[0] for name in files(tmp_path / "T2")} == {"train"}
    refuse(
        ["--imagenet_path", tree, "--imagenet_t_path", tmp_path / "T3", "--splits", "val"],
        "no val/ folder",
    )


# --------------------------------------------------------------------------------- training on them


def test_pictures_are_not_their_own_textures(tree, tmp_path, monkeypatch):
    out = Path(f"{tree}-texture")
    make(tree, out)
    (tmp_path / "link").symlink_to(tree)
    (tmp_path / "link-texture").symlink_to(tree)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train").symlink_to(tree / "train")
    monkeypatch.chdir(tmp_path)
    robust = ["--robust", "texture", "--texture-root"]
    for data, textures in (
        (tree, tree),
        ("set", f"{tree}/"),
        ("./set/.", "set"),
        (tree, "link"),
        ("link", "set"),
    ):
        with pytest.raises(
            UsageError, match="and the pictures in .* are the same folder: name the tree"
        ):
            moco_non_sem_neg.main([str(data), *robust, str(textures)])
    for flags in (
        [str(tree), *robust, "half"],
        ["half", *robust, str(tree)],
        ["link-texture", "--robust", "texture"],
    ):
        with pytest.raises(
            UsageError, match="and the pictures in .* are the same folder: name the tree"
        ):
            moco_non_sem_neg.main(flags)
    for dataset in ("packed", "cifar10"):
        with pytest.raises(
            UsageError,
            match=f"--robust texture does not support --dataset {dataset}, .* class folders",
        ):
            moco_non_sem_neg.main([str(tree), *robust, str(out), "--dataset", dataset])
    assert not (tmp_path / "ckpts").exists()
    for flags in (
        [str(tree), *robust, str(out)],
        [str(out), "--robust", "texture"],
        ["link", *robust, str(out)],
    ):
        assert moco_non_sem_neg.parse_args(flags).texture_root == str(out)


# ------------------------------------------------------------------------------------------- embark


@pytest.fixture
def fake_binary(tmp_path, monkeypatch):
    """A texture-synthesis that notes its arguments and copies its first example."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / texture_engines.BINARY
    program.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do echo "$word" >> "{tmp_path}/words"; done\n'
        'for word in "$@"; do [ "$previous" = --out ] && out="$word"; '
        '[ "$previous" = generate ] && in="$word"; '
        'previous="$word"; done\n'
        f'[ -e "{tmp_path}/broken" ] && {{ echo "it broke" >&2; exit 3; }}\n'
        'cp "$in" "$out"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "words"


EMBARK = ["--engine", "embark", "--patch", "40", "--size", "40", "--splits", "val"]


def test_embark_is_called_with_options_before_generate(fake_binary, tree, tmp_path):
    make(tree, tmp_path / "T", *EMBARK)
    words = fake_binary.read_text().splitlines()
    words = words[: len(words) // 2]
    at = words.index("generate")
    assert words[:2] == ["--out-size", "40"] and len(words) == at + 3
    assert all(w.endswith(".png") for w in words[at + 1 :]) and words[at - 2] == "--out"
    assert words[words.index("--threads") + 1] == "1"
    assert int(words[words.index("--seed") + 1]) == texture_jobs.draws_of("val/bird/b0.JPEG", 0)[0]
    expected = texture_jobs.patches_of(
        texture_jobs.read_rgb(str(tree / "val" / "bird" / "b0.JPEG")), 40, 0, 0
    )[0]
    made = np.asarray(Image.open(tmp_path / "T" / "val" / "bird" / "b0.png"))
    assert np.array_equal(made, expected.permute(1, 2, 0).numpy())
    recorded = json.loads((tmp_path / "T" / "textures.json").read_text())["settings"]
    assert recorded["k_neighs"] == 50 and "shortlist" not in recorded


def test_embark_failing_is_a_failure_of_the_picture(fake_binary, tree, tmp_path):
    (tmp_path / "broken").touch()
    with pytest.raises(UserError, match="2 pictures failed.*ended with 3: it broke"):
        make(tree, tmp_path / "T", *EMBARK, "--batch", "2")


def test_embark_missing_says_where_it_comes_from(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refuse(
        ["--imagenet_path", tree, "--imagenet_t_path", tmp_path / "T", "--engine", "embark"],
        "PATH",
        texture_engines.SOURCE,
    )
    assert not (tmp_path / "T").exists()


# --------------------------------------------------------------------------------------------- look


def test_sheet_and_demo(workspace, demo_set, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(workspace))
    syn.main(
        [
            "--imagenet_path",
            str(demo_set),
            "--sheet",
            "look/sheet.png",
            "--limit",
            "3",
            "--size",
            "40",
            "--patch",
            "36",
            "--k-neighs",
            "8",
            "--device",
            "cpu",
        ]
    )
    with Image.open("look/sheet.png") as sheet:
        assert sheet.size == (3 * (3 * 40 + 8) - 8, 40 + 14)
    assert "3 pictures with textures by mrs, quilt" in capsys.readouterr().out
    assert sorted(os.listdir(workspace)) == ["data", "look"]
    syn.main(["--demo", "--limit", "3", "--device", "cpu"])
    assert len(files("runs/demo-texture")) == 3


def test_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        syn.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        flag in shown
        for flag in ("--imagenet_t_path", "--engine", "--shard", "--sheet", "--shortlist", "--demo")
    )

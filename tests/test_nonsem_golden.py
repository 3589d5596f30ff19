"""nonsem_neg against number vectors of the published code.

They are of SongweiGe/Contrastive-Learning-with-Non-Semantic-Negatives at 5fbdc4d, computed in
float32 on a CPU; tests/golden/README.md says what each array is.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vectors import close, keys, names, published_keys, read

from common import backbones
from nonsem_neg.moco import MoCo, contrast_logits
from nonsem_neg.negatives import PatchGrid, sample_patches, tile_patches

CASES = names("nonsem_moco_n*")


class TinyEncoder(nn.Module):
    """As wide as the vectors are: `golden` has its weights."""

    def __init__(self, golden, num_classes):
        super().__init__()
        width, pixels = golden["enc_k_init.lin.weight"].shape
        self.lin, self.fc = nn.Linear(pixels, width), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.lin(x.flatten(1))))


def at(golden, prefix, step):
    return {
        k.removeprefix(prefix): v if step is None else v[step]
        for k, v in golden.items()
        if k.startswith(prefix)
    }


@pytest.mark.parametrize("name", CASES)
def test_training_steps(name):
    golden = read(name)
    settings = {
        key: golden[symbol]
        for key, symbol in dict(
            queue_size="K", momentum="m", temperature="T", alpha="alpha"
        ).items()
    }
    model = MoCo(
        partial(TinyEncoder, golden), dim=golden["q"].shape[-1], mlp=bool(golden["mlp"]), **settings
    )
    model.encoder_q.load_state_dict(at(golden, "enc_q.", 0))
    model.encoder_k.load_state_dict(at(golden, "enc_k_init.", None))
    model.queue.copy_(golden["queue_before"][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=golden["lr"])
    generator = torch.Generator().manual_seed(0)
    for step in range(len(golden["loss"])):
        close(model.queue, golden["queue_before"][step])
        for key, value in at(golden, "enc_q.", step).items():
            close(model.encoder_q.state_dict()[key], value)
        logits, keys = model(*(golden[k][step] for k in ("im_q", "im_k", "im_t")), generator)
        for key, value in at(
            golden, "enc_k.", step
        ).items():  # the key encoder moves before it is used
            close(model.encoder_k.state_dict()[key], value)
        labels = torch.zeros(len(logits), dtype=torch.long)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        close(logits, golden["logits"][step])
        close(loss, golden["loss"][step], atol=1e-6)
        close(labels, golden["labels"][step])
        close(keys, golden["k"][step])
        for key, value in at(golden, "grad_enc_q.", step).items():
            close(model.encoder_q.get_parameter(key).grad, value, rtol=2e-4)
        optimizer.step()
        model.enqueue(keys)
        close(model.queue, golden["queue_after"][step])
        assert model.queue_ptr.item() == golden["ptr_after"][step]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradient_alone(name):
    golden = read(name)
    for step in range(len(golden["loss"])):
        q = golden["q"][step].clone().requires_grad_()
        logits = contrast_logits(
            q,
            golden["k"][step],
            golden["queue_before"][step].T,
            golden["ts"][step],
            golden["T"],
            golden["alpha"],
        )
        close(logits, golden["logits"][step])
        F.cross_entropy(logits, golden["labels"][step]).backward()
        close(q.grad, golden["grad_q"][step], rtol=2e-4)


@pytest.mark.parametrize("name", names("nonsem_patches*"))
def test_patches_are_laid_out_as_published(name):
    golden = read(name)
    image = golden["image"].float()
    outputs = next(v for k, v in golden.items() if v.ndim == 4 and v.shape[1:] == image.shape)
    cells = int(golden["grid"].max())
    for i in range(len(outputs)):
        grid = int(golden["grid"][i])
        assert grid == image.shape[-1] // int(golden["patch_size"][i]) + 1
        corner = golden["patch_left_top"][i, : grid * grid].view(grid, grid, 2)
        left, top = torch.zeros(2, 1, cells, cells, dtype=torch.long)
        left[0, :grid, :grid], top[0, :grid, :grid] = corner[..., 0], corner[..., 1]
        made = tile_patches(image[None], PatchGrid(golden["patch_size"][i : i + 1], top, left))
        assert torch.equal(made[0], outputs[i].float())


def test_published_ranges_of_patch_sides_and_offsets():
    generator = torch.Generator().manual_seed(0)
    grid = sample_patches(40_000, 16, (4, 6), generator)
    assert grid.side.unique().tolist() == [4, 5, 6]  # both ends are drawn
    for side in (4, 5, 6):
        for offset in (grid.top[grid.side == side], grid.left[grid.side == side]):
            assert (offset.min(), offset.max()) == (
                0,
                16 - side - 1,
            )  # the last offset that fits is not
            count = torch.bincount(offset.flatten()).float()
            assert (count / count.mean() - 1).abs().max() < 0.03
    everything = sample_patches(1000, 16, (4, 4), generator, inclusive=True)
    assert everything.top.max() == 12


def test_checkpoint_keys_shapes_and_order_are_the_authors():
    expected = published_keys("nonsem_moco_resnet50_mlp")
    rows, dim = {name: shape[::-1] for name, shape, _ in expected}["module.queue"]
    with torch.device("meta"):
        model = MoCo(lambda dim: backbones.build("resnet50", dim), dim, queue_size=rows, mlp=True)
    assert keys(model.state_dict(), "module.") == expected

"""The two methods, InsDis and MoCo: their training step and the content of their checkpoints."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import UserError, backbones, batchnorm, launch, memory, metrics
from common.precision import Precision
from moco_insdis.contrast import LONG_AGO, KeyQueue, MemoryBank
from moco_insdis.networks import NORMALIZE, build_network
from runner import checkpoint, layouts, loop

PREFIX = "encoder.module."  # begins the networks' parameter names in the published files


class InstanceMethod:
    """The part that InsDis and MoCo share: query network, optimizer, and the values to log."""

    memory: MemoryBank | KeyQueue

    def __init__(self, args, process: launch.Process):
        self.args = args
        network = build_network(args, process)
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=args.learning_rate,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            fused=True,
        )
        self.precision = Precision.of(args, process.device)
        self.precision.choose(network, (3, args.input_res, args.input_res))
        self.network, self.optimizer = self.precision.prepare(network, optimizer)
        if args.compile:
            self.network.compile()
        self.wrapped = launch.parallel(self.network, process)

    def curves(self, loss, out, logits) -> dict:
        """Return the values to log: the loss, and as "prob" the mean of column 0 of `out`.

        With InfoNCE column 0 is a logit, so the softmax probability of the positive is logged too;
        with NCE, Z over the number of pictures is. logits: the scores that --save_score describes.
        """
        out = out.detach()
        values = {"ins_loss": loss, "ins_prob": out[:, 0].mean()}
        if self.memory.softmax:
            values["positive_prob"] = (out[:, 0] - out.logsumexp(1)).exp().mean()
        else:
            values["z_over_n"] = self.memory.normaliser / self.memory.n
        if self.args.save_score:
            t = self.memory.temperature
            values["scores"] = metrics.score_statistics(logits[:, 0], logits[:, 1:], t)
        return values

    def embed(self, images):
        """Return the features that enter the head: (N, D)."""
        with self.precision.autocast():
            return backbones.feature(self.network, images, 6)

    def pictures(self, views) -> dict:
        names = ("query", "key") if self.args.moco else ("picture",)
        return {name: NORMALIZE.inverse(view) for name, view in zip(names, views)}


class InsDis(InstanceMethod):
    """A network and a memory bank.

    A step compares each picture's feature with the bank (the picture's own row is the positive,
    drawn rows are the negatives), and then writes it to that row.
    """

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        bank = (args.nce_k, args.nce_t, args.nce_m, args.softmax, args.nce_z)
        self.memory = MemoryBank(n, args.feat_dim, *bank).to(process.device)
        draws = torch.Generator(process.device).manual_seed(args.seed)  # the same on every rank
        self.generators = {"draws": draws}

    def step(self, batch: loop.Batch) -> dict:
        images = batch.views[0].contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            feat = self.wrapped(images)
        feat = F.normalize(feat.float(), dim=1)  # N x D
        bank = self.memory
        draws = self.generators["draws"]
        rows = memory.draw_rows(batch.index, bank.n, bank.k, draws, self.args.exclude_self)
        logits = self.memory.logits(feat, rows)  # N x (1 + K)
        loss, out = self.memory.loss(logits)
        self.precision.step(loss, self.optimizer)
        self.memory.update(launch.all_gather(feat), launch.all_gather(batch.index))
        return self.curves(loss, out, logits)

    def state_dict(self) -> dict:
        return {
            "model": layouts.add_prefix(self.network.state_dict(), PREFIX),
            "contrast": self.memory.state_dict(),
            "z_updates": self.memory.updates,
        }

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        contrast = saved["contrast"]
        if "model_ema" in saved:
            raise UserError(f"{saved.path} is a checkpoint of MoCo: add --moco")
        self.memory.load(contrast, saved.get("z_updates", LONG_AGO), saved.path)
        load_network(self.network, saved, "model")


class MoCo(InstanceMethod):
    """A query network, a key network that follows it, and a queue of keys.

    A step compares each query with the key of the same picture (the positive) and with the queue
    (the negatives), writes the keys to the queue, and moves the key network.
    """

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        self.key_network = copy.deepcopy(self.network).requires_grad_(False)
        if args.compile:
            self.key_network.compile()
        queue = (args.nce_k, args.nce_t, args.softmax, args.nce_z)
        self.memory = KeyQueue(n, args.feat_dim, *queue).to(process.device)
        self.average = get_ema_multi_avg_fn(args.alpha)
        draws = torch.Generator().manual_seed(args.seed)  # shuffles keys, the same on every rank
        self.generators = {"draws": draws}

    def step(self, batch: loop.Batch) -> dict:
        im_q, im_k = (v.contiguous(memory_format=torch.channels_last) for v in batch.views)
        with self.precision.autocast():
            query = self.wrapped(im_q)
        query = F.normalize(query.float(), dim=1)  # N x D
        # key: N x D, keys: those of all ranks
        key, keys = batchnorm.encode_shuffled(self.encode_key, im_k, self.generators["draws"])
        logits = self.memory.logits(query, key)  # N x (1 + K)
        loss, out = self.memory.loss(logits)
        self.precision.step(loss, self.optimizer)
        self.memory.enqueue(keys)
        queries = [param.detach() for param in self.network.parameters()]
        self.average(list(self.key_network.parameters()), queries, None)
        return self.curves(loss, out, logits)

    def encode_key(self, images):
        with self.precision.autocast():
            feat = self.key_network(images)
        return F.normalize(feat.float(), dim=1)

    def state_dict(self) -> dict:
        return {
            "model": layouts.add_prefix(self.network.state_dict(), PREFIX),
            "model_ema": layouts.add_prefix(self.key_network.state_dict(), PREFIX),
            "contrast": self.memory.state_dict(),
            "queue": self.memory.extra_state(),
        }

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        if "model_ema" not in saved and "memory" in saved["contrast"]:
            raise UserError(f"{saved.path} is a checkpoint of InsDis: omit --moco")
        load_network(self.network, saved, "model")
        load_network(self.key_network, saved, "model_ema")
        self.memory.load(saved["contrast"], saved.get("queue"), saved.path)


def load_network(network, saved: checkpoint.Saved, key: str) -> None:
    """Load the network at `key`. Raises UserError where it does not fit."""
    state = layouts.strip_prefix(saved[key], PREFIX)
    checkpoint.load_into(network, state, saved.path, flag="--model")

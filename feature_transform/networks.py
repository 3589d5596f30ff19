"""Encoder and head: a minimal stand-in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from common import backbones

ARCHS = ["resnet18", "resnet50"]
HEADS = ["linear", "linear_wo_norm", "mlp"]


class Unit(nn.Module):
    def forward(self, x):
        return F.normalize(x.float(), dim=1)


class Network(nn.Module):
    def __init__(self, args):
        super().__init__()
        width = backbones.build(args.arch).fc.in_features
        self.encoder = backbones.build(args.arch, 0, small_stem=args.small_stem)
        hidden = [nn.Linear(width, width), nn.ReLU()] if args.head == "mlp" else []
        self.head = nn.Sequential(*hidden, nn.Linear(width, args.feat_dim))
        if args.head != "linear_wo_norm":
            self.head.append(Unit())

    def forward(self, x):
        return self.head(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)


def build_network(args) -> nn.Module:
    return Network(args)

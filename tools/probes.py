"""Judge features: k-NN, tuned linear classifiers, few labels, geometry, scores."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from common import figures, files, metrics, schedule

PROTOCOL = "k-NN, and linear SGD at the best of 12 rates on pictures kept back"
RATES = tuple(10 ** (-2 + i / 3) for i in range(12))  # .01 to 46, for mean square length 1
SHARES = (1.0, 0.1, 0.01)  # of the labels
KEPT_BACK = 0.1  # share of the training pictures, on which the rate is chosen
KNN_ELEMENTS = 2**25  # similarities at once: 128 MiB
CHUNK = 4096  # features classified at once

# ------------------------------------------------------------------------- pictures that are used


def keep_back(targets: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows (train, kept back): of every class the share, at least one of two or more."""
    train = []
    kept = []
    for label in targets.unique():
        rows = (targets == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        kept.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train), torch.cat(kept)


def fewer_labels(rows: Tensor, targets: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return that share of the rows of every class, at least one."""
    fewer = []
    for label in targets[rows].unique():
        own = rows[targets[rows] == label]
        count = max(1, round(share * len(own)))
        fewer.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return torch.cat(fewer)


# ------------------------------------------------------------------------------------------ linear


def train_linear(
    features: Tensor,
    targets: Tensor,
    rows: Tensor,
    classes: int,
    epochs: int,
    batch: int,
    generator: torch.Generator,
    rates: tuple[float, ...] = RATES,
) -> tuple[Tensor, Tensor]:
    """Train linear classifiers at all `rates` (R) at once.

    features (V, n, D), targets (n,): `rows` of them are trained on, view after view. SGD with
    momentum .9, a cosine schedule down to 0, no weight decay. All rates see the same batches, and
    one product of (B, D) with (D, R C) serves them all.
    Returns weights (R, D, C) and biases (R, 1, C).
    """
    views, _, dim = features.shape
    columns = len(rates) * classes  # rate after rate
    rate_of = features.new_tensor(rates).repeat_interleave(classes)
    weight = features.new_zeros(dim, columns)
    bias = features.new_zeros(columns)
    speed = torch.zeros_like(weight)
    bias_speed = torch.zeros_like(bias)
    one_hot = torch.eye(classes, dtype=features.dtype, device=features.device)
    steps = epochs * -(-len(rows) // batch)
    step = 0
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for chosen in order.split(batch):
            x = features[epoch % views].index_select(0, chosen)
            error = torch.addmm(bias, x, weight).view(len(x), -1, classes)
            # This is a softmax. torch's takes five times as long for a few classes, and products
            # with numbers below 1e-38 take longer still.
            error.sub_(error.amax(2, keepdim=True)).clamp_(min=-60).exp_()
            error.div_(error.sum(2, keepdim=True)).sub_(one_hot[targets[chosen]][:, None])
            error = error.view(len(x), columns)
            lr = rate_of * schedule.cosine(1.0, step, steps)
            speed.addmm_(x.T, error, beta=0.9, alpha=1 / len(x))
            bias_speed.mul_(0.9).add_(error.sum(0), alpha=1 / len(x))
            weight.addcmul_(speed, lr, value=-1)
            bias.addcmul_(bias_speed, lr, value=-1)
            step += 1
    return weight.view(dim, -1, classes).transpose(0, 1), bias.view(-1, 1, classes)


def accuracies(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> list[float]:
    """Return the top-1 accuracy at each rate in percent, of features (n, D)."""
    hits = torch.zeros(len(weight), device=features.device)
    for x, y in zip(features.split(CHUNK), targets.split(CHUNK)):
        logits = torch.einsum("nd,rdc->rnc", x, weight) + bias
        hits += (logits.argmax(2) == y).sum(1)
    return (hits * (100 / len(targets))).tolist()


# ---------------------------------------------------------------------------- geometry of features


def alignment(first: Tensor, second: Tensor) -> float:
    """Return the mean squared distance of the unit features of two views of a picture: 0 to 4.

    Wang & Isola, arXiv:2005.10242, Sec. 4.
    """
    first = F.normalize(first, dim=1)
    second = F.normalize(second, dim=1)
    return float((first - second).square().sum(1).mean())


def uniformity(features: Tensor, most: int = 8192, chunk: int = 1024) -> float:
    """Return the log of the mean over pairs of e^{-2 |x - y|^2} of unit features.

    Wang & Isola, arXiv:2005.10242, Sec. 4. 0 is collapse, -4 the least. Of more than `most`
    features every second, third, ... is taken, as they are in the order of their classes.
    """
    z = F.normalize(features[:: -(-len(features) // most)].float(), dim=1)
    total = z.new_zeros((), dtype=torch.float64)
    for part in z.split(chunk):
        total += (part @ z.T).sub_(1).mul_(4).exp_().sum(dtype=torch.float64)
    n = len(z)
    return float(((total - n) / (n * (n - 1))).log())  # without each with itself


def rankme(features: Tensor) -> float:
    """Return the effective rank, e^entropy of the singular values, of features (n, D).

    Garrido et al., arXiv:2210.02885, Eq. (1) and (2). The squares of the singular values are the
    eigenvalues of the Gram matrix (D, D). In single precision the small ones would be noise, which
    counts as further dimensions.
    """
    dim = features.shape[1]
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for part in features.split(CHUNK):
        part = part.double()
        gram.addmm_(part.T, part)
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum() + 1e-7
    return float((-shares * shares.log()).sum().exp())


def scores(first: Tensor, second: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return cosines (n,) of two views of a picture, and (n,) of two pictures drawn at random."""
    n = len(first)
    first = F.normalize(first, dim=1)
    second = F.normalize(second, dim=1)
    other = (torch.arange(n) + torch.randint(1, n, (n,), generator=generator)) % n
    return (first * second).sum(1), (first * second[other.to(second.device)]).sum(1)


def draw_scores(path: str, positive: Tensor, negative: Tensor, title: str) -> None:
    """Write a histogram of the two sets of cosines as a PNG file."""
    from matplotlib.figure import Figure  # takes half a second: not at start

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    lowest = min(float(positive.min()), float(negative.min()), 0.99)  # collapsed: all are 1
    bins = torch.linspace(lowest, 1, 61).tolist()
    styles = (
        (negative, "two pictures", {"color": "0.55", "histtype": "stepfilled", "alpha": 0.6}),
        (
            positive,
            "two views of a picture",
            {"color": "#0072b2", "histtype": "step", "linewidth": 1.8},
        ),
    )
    for values, name, style in styles:
        label = f"{name}, mean {float(values.mean()):.2f}"
        axes.hist(values.cpu().numpy(), bins=bins, density=True, label=label, **style)
    axes.set(xlabel="cosine of their features", ylabel="density", title=figures.plain(title))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    files.write_figure(figure, path, dpi=150)


# --------------------------------------------------------------------------------------- all of it


class Clock:
    """Seconds between calls, by the name that each call gives."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now


Judged = dict[str, tuple[Tensor, Tensor]]  # {set: (features (m, D), targets (m,))}


def judge(
    args, seen: Tensor, targets: Tensor, bank: Tensor, judged: Judged, classes: int
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Return all numbers of features and the two sets of cosines of `scores`.

    args: its seed, views, epochs, batch_size and knn_k are used. seen (V, n, D): features of
    augmented views of the training pictures, bank (n, D): of the pictures as they are, with targets
    (n,). The linear classifiers are trained on both. judged: features (m, D) and targets (m,) of
    val, named "clean", and of shifted sets, of which there are the accuracies NAME (of the linear
    classifier on all labels) and NAME_knn. The number `seconds` says what took how long.
    """
    generator = torch.Generator().manual_seed(args.seed)
    clock = Clock()
    result = _judge_neighbours(args, bank, targets, judged, classes)
    clock("k-NN")
    result |= _judge_linear(args, seen, targets, bank, judged, classes, generator, clock)
    first, second = (seen[0], seen[1]) if args.views > 1 else (seen[0], bank)
    result["alignment"] = alignment(first, second)
    result["uniformity"] = uniformity(judged["clean"][0])
    result["rankme"] = rankme(bank)
    cosines = scores(first, second, generator)
    clock("geometry")
    return result | {"dimensions": bank.shape[1], "seconds": clock.seconds}, cosines


def _judge_neighbours(args, bank: Tensor, targets: Tensor, judged: Judged, classes: int) -> dict:
    """Return the k-NN accuracies: knn_acc1 of val, NAME_knn of every shifted set."""
    result = {"knn_k": metrics.neighbours_used(args.knn_k, targets)}
    for name, (queries, labels) in judged.items():
        settings = (classes, args.knn_k, args.knn_t)
        top = metrics.knn(bank, targets, queries, labels, *settings, chunk_elements=KNN_ELEMENTS)
        if name == "clean":
            found = metrics.named(*map(float, top), classes)
            result |= {f"knn_{key}": value for key, value in found.items()}
        else:
            result[f"{name}_knn"] = float(top[0])
    return result


def _judge_linear(
    args,
    seen: Tensor,
    targets: Tensor,
    bank: Tensor,
    judged: Judged,
    classes: int,
    generator: torch.Generator,
    clock: Clock,
) -> dict:
    """Return the accuracies of linear classifiers at their best rates, for each share of labels."""
    # Less the mean, which a young network's features share, and with a mean square length of 1:
    # SGD then learns as fast, and a rate means the same, whatever the network.
    centre = bank.mean(0)
    scale = (bank - centre).square().sum(1).mean().rsqrt()
    centred = torch.cat([bank[None], seen]).sub_(centre).mul_(scale)
    train_rows, kept = keep_back(targets.cpu(), KEPT_BACK, generator)
    kept = kept.to(bank.device)
    result = {"linear": {}, "rates": list(RATES)}
    classifiers = []
    for share in SHARES:
        rows = fewer_labels(train_rows, targets.cpu(), share, generator).to(targets.device)
        # Few labels make short epochs: there are more of them.
        epochs = min(round(args.epochs / share**0.5), 10 * args.epochs)
        weight, bias = train_linear(
            centred, targets, rows, classes, epochs, args.batch_size, generator
        )
        weight *= scale  # now the classifier takes features as they are
        bias -= centre @ weight[:, None]
        kept_acc = accuracies(bank[kept], targets[kept], weight, bias)
        val_acc = accuracies(*judged["clean"], weight, bias)
        best = max(range(len(RATES)), key=kept_acc.__getitem__)
        classifiers.append((weight[best : best + 1], bias[best : best + 1]))
        result["linear"][f"{share:.0%}"] = {
            "labels": len(rows),
            "epochs": epochs,
            "rate": RATES[best],
            "kept_back": kept_acc,
            "val": val_acc,
        }
        result[f"linear_{100 * share:.0f}"] = val_acc[best]
        clock(f"linear, {share:.0%}")
    result["acc1"] = result["linear_100"]
    for name, (embedded, labels) in judged.items():
        if name != "clean":
            (result[name],) = accuracies(embedded, labels, *classifiers[0])
    return result

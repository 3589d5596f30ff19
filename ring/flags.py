"""The flags of the method, and checks between them."""

from __future__ import annotations

import os

from cmc import colour
from common import UsageError, cli, footing, options, sets
from ring import thresholds
from ring.networks import RESNETS
from ring.views import SIDES

MOMENTA = {"ir": 0.0, "cmc": 0.5, "moco": 0.999}  # defaults of --m; that of cmc is Tian et al.'s
BELONGS = {  # {flag: the --method that it belongs to}
    "ball_bank_size": "ir",
    "view": "cmc",
    "shuffle_bn": "moco",
    "queue": "moco",
    "ema": "moco",
}


def add_model_arguments(g) -> None:
    """Add the network."""
    text = "network; a two-layer head follows it"
    g.add_argument("--resnet-version", "--arch", choices=RESNETS, default="resnet18", help=text)
    text = options.SMALL_STEM
    g.add_argument("--conv3x3", "--small-stem", action=cli.OnOff, default=False, help=text)
    g.add_argument("--out-dim", type=cli.positive_int, default=128, help="feature dimension")


def add_method_arguments(g) -> None:
    """Add the method, its memory, the choice of negatives and the thresholds."""
    text = "ir: memory bank, one view; moco: queue, two views; cmc: lightness against colour"
    g.add_argument("--method", choices=list(MOMENTA), default="ir", help=text)
    text = "all candidates; the ball: the nearest; or the ring: the ball without the very nearest"
    g.add_argument("--negatives", choices=["all", "ball", "ring"], default="ring", help=text)
    text = "ir, cmc: positive and negatives drawn per anchor; moco: queue length"
    g.add_argument("--k", "--negatives-k", type=cli.positive_int, default=4096, help=text)
    g.add_argument("--queue", type=cli.positive_int, help="moco: the same as --k")
    g.add_argument("--t", "--temperature", type=cli.positive, default=0.07, help="temperature")
    text = "momentum of a memory row (default: ir 0, cmc .5) or of the key network (moco .999)"
    g.add_argument("--m", type=cli.fraction, help=text)
    g.add_argument("--ema", type=cli.fraction, help="moco: the same as --m")
    text = "share of the candidates that is in the ball"
    g.add_argument("--thres-outer", type=cli.share, default=0.1, help=text)
    text = "share of the ball that is cut out of it"
    g.add_argument("--thres-inner", type=cli.fraction, default=0.1, help=text)
    text = "off: --thres-inner is a share of all candidates"
    g.add_argument("--dynamic-inner", action=cli.OnOff, default=True, help=text)
    text = "the candidates that are cut out count as positives"
    g.add_argument("--neighbor-views", action=cli.OnOff, default=False, help=text)
    text = "off: the numerator has the mean of their scores, not the logsumexp"
    g.add_argument("--logsumexp-inner", action=cli.OnOff, default=True, help=text)
    text = "off: the positive is not in the denominator"
    g.add_argument("--self-negative", action=cli.OnOff, default=True, help=text)
    text = "ir, cmc: compare with the whole ring, not with draws from it"
    g.add_argument("--all-ring", action="store_true", help=text)
    text = "ir: the ball is a share of the bank, or of the batch (a slip of the published code)"
    g.add_argument("--ball-bank-size", choices=["bank", "batch"], default="bank", help=text)
    text = (
        "outer threshold from 1 to .1, in place of --thres-outer: by formula, or following the "
        "loss or the 1-NN accuracy"
    )
    g.add_argument("--anneal", choices=thresholds.POLICIES, default="constant", help=text)
    text = "epochs of the annealing"
    g.add_argument("--max-anneal-epoch", type=cli.positive_int, default=100, help=text)
    text = "exponential: decay rate over the whole annealing; default, as published: .1 a step"
    g.add_argument("--anneal-rate", type=cli.positive, help=text)
    spaces = colour.SPACES
    text = "cmc: colour space"
    g.add_argument("--view", type=colour.space_name, choices=spaces, default="Lab", help=text)
    text = "moco: keys shuffled over batch-norm groups"
    g.add_argument("--shuffle-bn", action=cli.OnOff, default=True, help=text)
    text = "batch-norm groups over all processes; default: moco with shuffled keys 8, else 1"
    g.add_argument("--bn-splits", type=cli.positive_int, help=text)


def add_sgd_arguments(g) -> None:
    """Add the length of the run, the batch, SGD and its schedule."""
    text = "epochs to run in all"
    g.add_argument("--epochs", "--num-epochs", type=cli.positive_int, default=200, help=text)
    text = "global, over all processes"
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help=text)
    text = "not scaled with the batch"
    g.add_argument("--learning-rate", "--lr", type=cli.positive, default=0.03, help=text)
    text = "MoCoLRScheduler: a tenth after 68 and 83 percent of the epochs"
    names = ("MoCoLRScheduler", "none")
    g.add_argument("--scheduler", choices=names, default="MoCoLRScheduler", help=text)
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument("--weight-decay", type=cli.not_negative, default=1e-4, help="weight decay")


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    if args.data is None:
        raise UsageError(
            "no data: give --root (and --dataset), a CONFIG.json with both, or --demo for built-in "
            "pictures"
        )
    args.dataset = args.dataset.removesuffix("_2views")  # the method decides how many views
    args.input_res = args.input_res or SIDES[args.augmentation]
    if args.nn_every is None:
        is_labelled = args.dataset in sets.TORCHVISION_SETS
        args.nn_every = 1 if is_labelled or args.anneal == "accuracy" else 0
    settle_method(args)
    if "exp_name" in args.typed:  # the demo's own folder alone may be overwritten
        args.overwrite = "overwrite" in args.typed
    if args.exp_name is None:
        args.exp_name = run_name(args)
    elif "exp_name" not in args.typed:  # a settings file's
        args.exp_name += options.seed_suffix(args)
    name = args.name or f"{args.exp_name}_{args.dataset}"
    args.folder = os.path.join(args.model_path, name)


def run_name(args) -> str:
    """Return the name of the run folder, to which the data set is added."""
    annealed = "" if args.anneal == "constant" else f"_{args.anneal}"
    return f"pretrain_{args.method}_{args.negatives}{annealed}{options.seed_suffix(args)}"


def settle_method(args) -> None:
    """Fill in the defaults that depend on the method, and check flags against each other."""
    args.k = args.queue or args.k
    if args.method == "moco" and args.ema is not None and "m" not in args.typed:
        args.m = args.ema
    args.m = MOMENTA[args.method] if args.m is None else args.m
    if args.bn_splits is None:
        args.bn_splits = 8 if args.method == "moco" and args.shuffle_bn else 1
    check(args)
    del args.queue, args.ema  # other names of --k and --m


def check(args) -> None:
    """Raise UsageError for flags that contradict each other or have no effect together."""
    for name in BELONGS.keys() & args.typed:
        if BELONGS[name] != args.method:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} belongs to --method {BELONGS[name]}, or omit it")
    footing.check(args, "scheduler")
    if args.method != "cmc":
        footing.check(args, "augmentation")
    for flag, other in (("k", "queue"), ("m", "ema")):
        if {flag, other} <= args.typed:
            raise UsageError(f"--{flag} and --{other} are one setting; omit one of the two")
    if args.method == "moco":
        _check_queue(args)
    elif args.k == 1 and args.self_negative and not args.all_ring:
        raise UsageError("--k 1: that is the positive alone, without a negative; give 2 or more")
    if args.negatives == "ring":
        _check_thresholds(args)
    if args.neighbor_views and (args.negatives == "all" or args.thres_inner == 0):
        raise UsageError(
            "--neighbor-views needs an inner cut: --negatives ring (or ball) and a --thres-inner "
            "above 0"
        )
    if args.anneal != "constant" and args.negatives == "all":
        raise UsageError(
            f"--anneal {args.anneal}: --negatives all has no threshold; omit one of the two"
        )
    if args.anneal == "accuracy" and (args.knn_every or not args.nn_every):
        raise UsageError(
            "--anneal accuracy follows the 1-NN accuracy of every epoch: give --nn-every 1, and "
            "omit --knn-every, whose evaluation a resumed run may repeat"
        )


def _check_queue(args) -> None:
    if args.all_ring:
        raise UsageError("--all-ring: MoCo always compares with the whole ring; omit it")
    if args.k % args.batch_size:
        raise UsageError(
            f"--k {args.k}: a queue must be a multiple of the global batch {args.batch_size}"
        )


def _check_thresholds(args) -> None:
    if args.dynamic_inner:
        limit = 1.0
        name = "1, the whole ball"
    else:
        limit = args.thres_outer if args.anneal == "constant" else thresholds.END
        name = f"the outer threshold {limit}"
    if args.thres_inner >= limit:
        raise UsageError(
            f"--thres-inner {args.thres_inner} must be less than {name}: nothing would be left in "
            "the ring"
        )

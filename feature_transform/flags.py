"""Flags of model, method and transformation for main_contrast.py, and the checks between them."""

from __future__ import annotations

from common import UsageError, cli, footing, options, schedule
from feature_transform import networks, recipes, views

OF_MIXNORM = (  # flags that have no effect without --mixnorm
    "mixnorm_target",
    "expolation_mask",
    "pos_reach",
    "mask_distribution",
    "dim_mask",
    "beta_alpha",
    "sep_alpha",
    "pos_alpha",
    "neg_alpha",
    "postmix_norm",
    "norm_target",
    "mix_start_epoch",
    "neg_query",
)
BELONGS = {  # {flag: the flag without which it has no effect}
    "pos_reach": "expolation_mask",
    "pos_alpha": "sep_alpha",
    "neg_alpha": "sep_alpha",
    "norm_target": "postmix_norm",
    "beta": "jigsaw",
}


def add_model_arguments(g) -> None:
    """Add the encoder and its projection head."""
    text = "network; x2, x4: stages of twice, four times the width"
    g.add_argument("--arch", type=networks.arch_name, default="resnet50", help=text)
    g.add_argument("--small-stem", action="store_true", help=options.SMALL_STEM)
    text = "feature dimension"
    g.add_argument("-d", "--feat_dim", type=cli.positive_int, default=128, help=text)
    text = "projection head"
    g.add_argument("--head", "--custom_head", choices=networks.HEADS, default="linear", help=text)


def add_method_arguments(g) -> None:
    """Add the method, its modality, memory, augmentation, temperature and momenta."""
    text = "sets --modal, --jigsaw, --mem, --aug, --head and --nce_t where they are not typed"
    g.add_argument("--method", choices=list(recipes.METHODS), default="Customize", help=text)
    text = "RGB: one network; CMC: two, lightness against colour"
    g.add_argument("--modal", choices=list(networks.MODALS), default="RGB", help=text)
    text = "a second query, encoded from nine patches of a picture (PIRL)"
    g.add_argument("--jigsaw", action=cli.OnOff, default=False, help=text)
    text = "bank: memory bank, one view; moco: queue of keys, two views"
    g.add_argument("--mem", choices=["bank", "moco"], default="moco", help=text)
    text = "augmentation: MoCo's (A), MoCo-v2's (B), CMC's (C), InfoMin's (D), CMC-v2's (E)"
    g.add_argument("--aug", choices=views.AUGMENTATIONS, default="A", help=text)
    text = "temperature"
    g.add_argument("-t", "--nce_t", "--temperature", type=cli.positive, default=0.07, help=text)
    text = "negatives per query; moco: length of the queue"
    names = ("-k", "--nce_k", "--queue", "--negatives-k")
    g.add_argument(*names, type=cli.positive_int, default=65536, help=text)
    text = "bank: momentum of a memory row"
    g.add_argument("-m", "--nce_m", type=cli.fraction, default=0.5, help=text)
    text = "moco: momentum of the key encoder"
    g.add_argument("--alpha", "--moco-m", "--ema", type=cli.fraction, default=0.999, help=text)
    g.add_argument("--beta", type=cli.fraction, default=0.5, help="weight of the jigsaw's loss")
    text = "batch-norm groups over all processes, as on that many GPUs; default: moco 8, bank 1"
    g.add_argument("--bn-splits", type=cli.positive_int, help=text)


def add_transformation_arguments(g) -> None:
    """Add the feature transformation: which features are mixed, and with which coefficients."""
    text = "transform features before they are compared"
    g.add_argument("--mixnorm", action=cli.OnOff, default=False, help=text)
    text = "features that are transformed: positives, negatives, both"
    g.add_argument("--mixnorm_target", choices=["pos", "neg", "posneg"], default="neg", help=text)
    text = "extrapolate positives: coefficients above 1 move a pair apart; off: from 0 to 1"
    spellings = ("--expolation_mask", "--extrapolation_mask")
    g.add_argument(*spellings, action=cli.OnOff, default=False, help=text)
    text = "how far positives are extrapolated: coefficients lie between 1 and 1 + POS_REACH"
    g.add_argument("--pos_reach", type=cli.positive, default=1.0, help=text)
    text = "distribution of the coefficients"
    g.add_argument("--mask_distribution", choices=["uniform", "beta"], default="beta", help=text)
    text = (
        "none: one mixing coefficient in a step; sample: one for each row; pos, neg, both: one for "
        "each dimension of every feature of the positives, the negatives, or both; default, as "
        "published: none for posneg with --sep_alpha and beta, else both"
    )
    g.add_argument("--dim_mask", choices=["none", "pos", "neg", "both", "sample"], help=text)
    g.add_argument("--beta_alpha", type=cli.positive, default=2.0, help="a of Beta(a, a)")
    text = (
        "draw the coefficients of positives from Beta(a, a) with a = --pos_alpha, and those of "
        "negatives with a = --neg_alpha; off: both with a = --beta_alpha"
    )
    g.add_argument("--sep_alpha", action=cli.OnOff, default=False, help=text)
    g.add_argument("--pos_alpha", type=cli.positive, default=2.0, help="a of the positives")
    g.add_argument("--neg_alpha", type=cli.positive, default=1.6, help="a of the negatives")
    text = "bring transformed features back to unit length"
    g.add_argument("--postmix_norm", action=cli.OnOff, default=False, help=text)
    text = (
        "what --postmix_norm is applied to: query and key (pos, as published, even where only "
        "negatives are transformed), negatives (neg), or both"
    )
    g.add_argument("--norm_target", choices=["pos", "neg", "both"], default="pos", help=text)
    text = "transform after this epoch; epochs count from 1"
    g.add_argument("--mix_start_epoch", type=cli.count, default=0, help=text)
    text = "query that negatives are compared with"
    queries = ["transformed", "original"]
    g.add_argument("--neg_query", choices=queries, default="transformed", help=text)


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    if args.data is None:
        raise UsageError(options.NO_DATA)
    recipes.fill(args)
    check(args)
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.footing == "common":
        args.head = "mlp"
    elif args.batch_size > 256 and "warm" not in args.typed:
        args.warm = True
    if args.bn_splits is None:
        args.bn_splits = 8 if args.mem == "moco" else 1
    args.folder = options.run_folder(args, args.model_path, recipes.run_name(args))


def check(args) -> None:
    """Raise UsageError for flags that contradict each other or have no effect together."""
    typed = args.typed
    footing.check(args, "head", "aug", "lr_decay_epochs", "lr_decay_rate", "cosine", "warm")
    alone = [flag for flag in OF_MIXNORM if flag in typed]
    if alone and not args.mixnorm:
        raise UsageError(f"--{alone[0]} belongs to --mixnorm; add that, or omit it")
    check_coefficients(args)
    for flag, other in BELONGS.items():
        if flag in typed and not getattr(args, other):
            raise UsageError(f"--{flag} belongs to --{other}; add that, or omit it")
    if args.mem == "bank" and "alpha" in typed:
        raise UsageError("--alpha belongs to a queue, --mem moco; take that, or omit it")
    if args.mem == "moco" and "nce_m" in typed:
        raise UsageError("--nce_m belongs to a bank, --mem bank; take that, or omit it")
    if args.mem == "moco" and args.nce_k < args.batch_size:
        raise UsageError(
            f"--nce_k {args.nce_k}: a queue must hold at least a global batch of keys "
            f"({args.batch_size})"
        )


def check_coefficients(args) -> None:
    """Raise UsageError for flags of the coefficients that contradict each other.

    The --expolation_mask of a preset is turned off where positives are not transformed.
    """
    typed = args.typed
    if args.mixnorm_target == "neg":
        if "expolation_mask" in typed and args.expolation_mask:
            raise UsageError(
                "--expolation_mask moves positives apart, and --mixnorm_target neg leaves them as "
                "they are: take pos or posneg, or omit it"
            )
        args.expolation_mask = False
        for flag in ("pos_reach", "neg_query"):
            if flag in typed:
                raise UsageError(
                    f"--{flag} has no effect with --mixnorm_target neg, which leaves query and key "
                    "as they are: take pos or posneg, or omit it"
                )
    is_idle = {args.norm_target, args.mixnorm_target} == {"pos", "neg"}
    if "norm_target" in typed and args.postmix_norm and is_idle and args.head != "linear_wo_norm":
        raise UsageError(
            f"--norm_target {args.norm_target}: with --mixnorm_target {args.mixnorm_target} those "
            "features keep unit length; name the side that is transformed"
        )
    if "dim_mask" in typed and {args.dim_mask, args.mixnorm_target} == {"pos", "neg"}:
        raise UsageError(
            f"--dim_mask {args.dim_mask}: with --mixnorm_target {args.mixnorm_target} those are "
            "not transformed"
        )
    if "beta_alpha" in typed and args.sep_alpha:
        raise UsageError(
            "--beta_alpha: --sep_alpha takes --pos_alpha and --neg_alpha instead; "
            "omit one of the two"
        )
    if args.mask_distribution == "uniform" and typed & {"beta_alpha", "pos_alpha", "neg_alpha"}:
        raise UsageError(
            "--mask_distribution uniform has no --beta_alpha, --pos_alpha or --neg_alpha; omit them"
        )

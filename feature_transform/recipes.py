"""The published methods, the rule that the flags describe, and the name of a run."""

from __future__ import annotations

import os
import sys

from feature_transform.transform import Rule

FIELDS = ("modal", "jigsaw", "mem", "aug", "head", "nce_t")
METHODS = {  # {--method: values of FIELDS}
    "InsDis": ("RGB", False, "bank", "A", "linear", 0.07),
    "CMC": ("CMC", False, "bank", "C", "linear", 0.07),
    "PIRL": ("RGB", True, "bank", "A", "linear", 0.07),
    "MoCo": ("RGB", False, "moco", "A", "linear", 0.07),
    "MoCoMLP": ("RGB", False, "moco", "A", "mlp", 0.07),
    "MoCo_wo_norm": ("RGB", False, "moco", "A", "linear_wo_norm", 0.07),
    "MoCov2": ("RGB", False, "moco", "B", "mlp", 0.2),
    "MoCov2_tau0.1": ("RGB", False, "moco", "B", "mlp", 0.1),
    "CMCv2": ("CMC", False, "moco", "E", "mlp", 0.2),
    "InfoMin": ("RGB", True, "moco", "D", "mlp", 0.15),
    "Customize": (),
}
PUBLISHED = dict(  # the published transformation
    mixnorm=True, mixnorm_target="posneg", expolation_mask=True, sep_alpha=True,
    mask_distribution="beta", dim_mask="none",
)  # fmt: skip


def fill(args) -> None:
    """Fill in the values of --method for the flags that were not typed.

    The temperature of --preset compare and photos stays. Notes name the typed flags with another
    value, and a start of the transformation after the last epoch.
    """
    kept = args.typed | ({"nce_t"} if args.preset in ("compare", "photos") else set())
    differing = []
    for flag, value in zip(FIELDS, METHODS[args.method]):
        if flag not in kept:
            setattr(args, flag, value)
        elif flag in args.typed and getattr(args, flag) != value:
            differing.append(f"--{flag} {getattr(args, flag)} ({value})")
    if args.dim_mask is None:
        args.dim_mask = published_dims(args)
    notes = []
    if differing:
        notes.append(f"these flags win over --method {args.method}: {', '.join(differing)}")
    if args.mixnorm and args.mix_start_epoch >= args.epochs:
        start, epochs = args.mix_start_epoch, args.epochs
        notes.append(f"--mix_start_epoch {start} of --epochs {epochs}: no feature is transformed")
    if not int(os.environ.get("RANK", 0)):
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def published_dims(args) -> str:
    """Return the published --dim_mask for flags that do not set it.

    The published code reads the flag in one case only; in all others every number of a feature has
    a coefficient.
    """
    is_read = args.sep_alpha and args.mixnorm_target == "posneg"
    return "none" if is_read and args.mask_distribution == "beta" else "both"


def rule(args) -> Rule | None:
    """Return the transformation that the flags describe; None without --mixnorm."""
    if not args.mixnorm:
        return None
    pos_alpha, neg_alpha = args.beta_alpha, args.beta_alpha
    if args.sep_alpha:
        pos_alpha, neg_alpha = args.pos_alpha, args.neg_alpha
    normalise = ()
    if args.postmix_norm:
        normalise = ("pos", "neg") if args.norm_target == "both" else (args.norm_target,)
    return Rule(
        positives=_shape(args, "pos"),
        negatives=_shape(args, "neg"),
        extrapolate=args.expolation_mask,
        distribution=args.mask_distribution,
        pos_alpha=pos_alpha,
        neg_alpha=neg_alpha,
        normalise=normalise,
        original_query=args.neg_query == "original",
        reach=args.pos_reach,
    )


def _shape(args, side: str) -> str | None:
    """Return the shape of the coefficients of "pos" or "neg"; None where it is not transformed."""
    if side not in args.mixnorm_target:
        return None
    if args.dim_mask in (side, "both"):
        return "element"
    return "sample" if args.dim_mask == "sample" else "scalar"


def run_name(args) -> str:
    """Return the published name of the run folder.

    Where they are not published settings, it also has the reach of the extrapolation, the shape of
    the coefficients, the side that is normalised, the query of the negatives, and the epoch after
    which features are transformed.
    """
    parts = [
        f"{args.method}_{args.arch}_{args.modal}_Jig_{args.jigsaw}_{args.mem}",
        f"aug_{args.aug}_{args.head}_{args.nce_t}",
    ]
    if args.amp:
        parts.append(f"amp_{args.opt_level}")
    if args.cosine:
        parts.append("cosine")
    if args.warm:
        parts.append("warm")
    parts.append(f"alpha{args.alpha}_ncet{args.nce_t}_ncek{args.nce_k}")
    parts += _transformation_names(args) if args.mixnorm else ["baseline"]
    parts.append(f"epoch{args.epochs}_bs{args.batch_size}_lr{args.learning_rate}")
    if args.exp_iter >= 0:
        parts.append(f"iter{args.exp_iter}")
    return "_".join(parts)


def _transformation_names(args) -> list[str]:
    """Return the parts of the run's name that describe the transformation."""
    parts = [
        f"mixnorm_target{args.mixnorm_target}_postnorm{args.postmix_norm}",
        f"distri{args.mask_distribution}",
    ]
    if "pos" in args.mixnorm_target:
        parts.append(f"expolation{args.expolation_mask}")
    if args.pos_reach != 1:
        parts.append(f"reach{args.pos_reach}")
    if args.mask_distribution == "beta" and args.sep_alpha:
        parts.append(f"pos{args.pos_alpha}_neg{args.neg_alpha}")
    elif args.mask_distribution == "beta":
        parts.append(f"alpha{args.beta_alpha}")
    if args.dim_mask != published_dims(args):
        parts.append(f"dim{args.dim_mask}")
    if args.postmix_norm and args.norm_target != "pos":
        parts.append(f"norm{args.norm_target}")
    if args.neg_query != "transformed":
        parts.append(f"query{args.neg_query}")
    if args.mix_start_epoch:
        parts.append(f"start{args.mix_start_epoch}")
    return parts

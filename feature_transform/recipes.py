"""The published methods, the name of a run, and which flags go together."""

from __future__ import annotations

import os
import sys

from common import UsageError

FIELDS = ("modal", "jigsaw", "mem", "aug", "head", "nce_t")
METHODS = {  # FIELDS of each: RGB or two towers, a jigsaw branch, bank or queue, augmentation, head, temperature
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
OF_MIXNORM = (
    "mixnorm_target", "expolation_mask", "mask_distribution", "dim_mask", "beta_alpha", "sep_alpha", "pos_alpha", "neg_alpha",
    "postmix_norm", "norm_target", "mix_start_epoch", "neg_query",
)  # fmt: skip
BELONGS = {  # a typed flag that means nothing without another one
    "pos_alpha": "sep_alpha", "neg_alpha": "sep_alpha", "norm_target": "postmix_norm", "beta": "jigsaw",
}  # fmt: skip


def fill(args) -> None:
    """What --method says, for the flags that were not typed. One note names those that were and say otherwise."""
    other = []
    for flag, value in zip(FIELDS, METHODS[args.method]):
        if flag not in args.typed:
            setattr(args, flag, value)
        elif getattr(args, flag) != value:
            other.append(f"--{flag} {getattr(args, flag)} ({value})")
    args.dim_mask = args.dim_mask or published_dims(args)
    if other and not int(os.environ.get("RANK", 0)):
        print(f"note: what is typed beats --method {args.method}: {', '.join(other)}", file=sys.stderr)


def published_dims(args) -> str:
    """--dim_mask where it is not given. There it counted in one case only; in all others every number had a coefficient."""
    counts = args.sep_alpha and args.mixnorm_target == "posneg" and args.mask_distribution == "beta"
    return "none" if counts else "both"


def check(args) -> None:
    """UsageError for flags that contradict each other, or mean nothing."""
    typed = args.typed
    if not args.mixnorm and (alone := [flag for flag in OF_MIXNORM if flag in typed]):
        raise UsageError(f"--{alone[0]} belongs to --mixnorm; add that, or omit it")
    for flag, other in BELONGS.items():
        if flag in typed and not getattr(args, other):
            raise UsageError(f"--{flag} belongs to --{other}; add that, or omit it")
    if args.mixnorm_target == "neg":
        if "expolation_mask" in typed and args.expolation_mask:
            raise UsageError(
                "--expolation_mask moves positives apart, and --mixnorm_target neg leaves them as they are: "
                "take pos or posneg, or omit it"
            )
        args.expolation_mask = False
    if "dim_mask" in typed and {args.dim_mask, args.mixnorm_target} == {"pos", "neg"}:
        raise UsageError(f"--dim_mask {args.dim_mask}: with --mixnorm_target {args.mixnorm_target} those are not mixed")
    if "beta_alpha" in typed and args.sep_alpha:
        raise UsageError("--beta_alpha: with --sep_alpha there are --pos_alpha and --neg_alpha; omit one of the two")
    if args.mask_distribution == "uniform" and typed & {"beta_alpha", "pos_alpha", "neg_alpha"}:
        raise UsageError("--mask_distribution uniform has no --beta_alpha, --pos_alpha or --neg_alpha; omit them")
    others = {"bank": ("alpha", "a queue: --mem moco"), "moco": ("nce_m", "a bank: --mem bank")}
    flag, of = others[args.mem]
    if flag in typed:
        raise UsageError(f"--{flag} belongs to {of}; take that, or omit it")
    if args.mem == "moco" and args.nce_k < args.batch_size:
        raise UsageError(f"--nce_k {args.nce_k}: a queue must hold at least a global batch of keys ({args.batch_size})")


def run_name(args) -> str:
    """The published name of the run folder; added where it is not the published setting: the shape of the coefficients, what
    is normalised, the query of the negatives, and the epoch after which features are transformed."""
    schedule = f"{f'_amp_{args.opt_level}' * args.amp}{'_cosine' * args.cosine}{'_warm' * args.warm}"
    name = (
        f"{args.method}_{args.arch}_{args.modal}_Jig_{args.jigsaw}_{args.mem}_aug_{args.aug}_{args.head}_{args.nce_t}"
    )
    name += f"{schedule}_alpha{args.alpha}_ncet{args.nce_t}_ncek{args.nce_k}"
    if not args.mixnorm:
        name += "_baseline"
    else:
        name += f"_mixnorm_target{args.mixnorm_target}_postnorm{args.postmix_norm}_distri{args.mask_distribution}"
        if "pos" in args.mixnorm_target:
            name += f"_expolation{args.expolation_mask}"
        if args.mask_distribution == "beta":
            alphas = f"_pos{args.pos_alpha}_neg{args.neg_alpha}", f"_alpha{args.beta_alpha}"
            name += alphas[not args.sep_alpha]
        name += f"_dim{args.dim_mask}" * (args.dim_mask != published_dims(args))
        name += f"_norm{args.norm_target}" * (args.postmix_norm and args.norm_target != "pos")
        name += f"_query{args.neg_query}" * (args.neg_query != "transformed")
        name += f"_start{args.mix_start_epoch}" * bool(args.mix_start_epoch)
    name += f"_epoch{args.epochs}_bs{args.batch_size}_lr{args.learning_rate}"
    return name + f"_iter{args.exp_iter}" * (args.exp_iter >= 0)

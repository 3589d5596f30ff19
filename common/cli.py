"""Parse command lines: presets, number types, frozen flags, one-line errors."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import time

from common import helptext, launch

OnOff = argparse.BooleanOptionalAction
FIGURES = (".png", ".pdf", ".svg")
SWITCH = {"on": True, "off": False, "auto": "auto"}  # values of a flag of type `switch`
DRAWN = range(10**9, 2**31)  # seeds of runs without --seed; people type shorter ones
META = ("typed", "compared")  # attributes of a namespace that are not flags
SYNONYMS = (  # names of one thing, of which a script has some
    "data data-folder data-dir data-path root dataset-path",
    "arch model backbone network encoder resnet-version",
    "out output output-dir out-dir save-dir save-path ckpt-path model-path exp-base name",
    "checkpoint ckpt pretrained model-path classifier weights",
    "lr learning-rate",
    "epochs num-epochs max-epochs",
    "batch-size batch bs",
    "temperature tau t nce-t moco-t",
    "queue negatives-k queue-size num-negatives nce-k moco-k k",
    "ema moco-m momentum-encoder m",
    "weight-decay wd",
    "nproc nproc-per-node num-gpus gpus devices",
    "workers num-workers",
)
HARDWARE = ("run", "hardware")  # groups of flags that do not change what is learned
ASIDE = frozenset({  # recorded flags that are places or hardware, or say what is shown and kept
    "amp_backend", "checkpoint", "ckpt", "ckpt_path", "classifier", "compile", "config",
    "corruption", "cue_conflict", "data_device", "decode", "demo", "device", "dist_backend",
    "dist_url", "evaluate", "exp_iter", "exp_name", "file", "folder", "gpu", "knn_data",
    "knn_every", "label", "last_every", "log", "milestones", "model_path",
    "multiprocessing_distributed", "name", "network", "nproc", "opt_level", "out", "overwrite",
    "preset", "pretrained", "print_freq", "rank", "rendition", "resume", "save_freq", "save_path",
    "save_score", "show_views", "sketch", "skip_bad_images", "stop_after", "stylized", "tb_path",
    "texture_root", "transfer", "transfer_root", "workers", "world_size",
})  # fmt: skip


class Flags(argparse.Namespace):
    """The flags of a script. They are frozen after parsing; `replace` returns a changed copy.

    typed: names of the flags that were given on the command line. compared: names of the flags
    that a resumed run compares with the checkpoint (all but the groups "run" and "hardware").
    """

    def __setattr__(self, name: str, value) -> None:
        raise AttributeError(f"args.{name} is settled when the flags are parsed: use cli.replace")


def freeze(args: argparse.Namespace) -> Flags:
    """Return a copy of the flags that rejects assignment."""
    frozen = Flags()
    vars(frozen).update(vars(args))
    return frozen


def replace(args: argparse.Namespace, **values) -> Flags:
    """Return a copy of `args` with these values replaced."""
    other = freeze(args)
    vars(other).update(values)
    return other


def flags(args: argparse.Namespace) -> dict:
    """Return the flags as a plain dict, for config.json and checkpoints."""
    return {name: value for name, value in vars(args).items() if name not in META}


class Parser(argparse.ArgumentParser):
    """An argument parser with the conventions of all scripts.

    - Every long flag can be spelled with dashes or underscores.
    - A wrong flag or value prints one line on stderr and exits with code 2.
    - `presets` ({name: {flag: value}}) are defaults: flags typed on the command line win. The
      flag `--demo` selects the preset "demo" and `--preset NAME` another one; if both set a
      flag, the demo wins.

    The parsed namespace also has the two attributes of `Flags`.
    """

    def __init__(self, *args, presets: dict[str, dict] | None = None, **kwargs):
        super().__init__(*args, formatter_class=helptext.Formatter, allow_abbrev=False, **kwargs)
        self.presets = presets or {}
        self._ignored: dict[str, tuple[str, str]] = {}  # name in the namespace: (flag, reason)
        named = [name for name in self.presets if name != "demo"]
        if named:
            self.add_argument(
                "--preset", choices=named, help="set the flags of a recipe; typed flags win"
            )
        if "demo" in self.presets:
            self.add_argument(
                "--demo",
                action="store_true",
                help="use built-in data and a small setting; takes minutes on a CPU",
            )

        if self.presets:
            text = "print what each preset sets"
            self.add_argument("--help-presets", action=helptext.ShowPresets, help=text)

    def format_help(self) -> str:
        opening = helptext.opening(self)
        if not opening:
            return super().format_help()
        formatter = self._get_formatter()
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return opening + formatter.format_help()

    def ignore(self, reason: str, *names: str) -> None:
        """Accept published flags that had no effect there and have none here.

        `parse_args` leaves them out of its result, and one note names those that were typed.
        """
        for name in names:
            flag = name if name.startswith("-") else f"--{name}"
            action = self.add_argument(
                flag,
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
            self._ignored[action.dest] = (flag, reason)

    def parse_args(self, args=None, namespace=None):
        argv = [self._spelling(token) for token in (sys.argv[1:] if args is None else args)]
        argv = self._joined(argv)
        defaults = {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}
        try:
            for name in self._chosen_presets(argv):
                self.set_defaults(**self.presets.get(name, {}))
            parsed = super().parse_args(argv, namespace)
        finally:
            self.set_defaults(**defaults)
        parsed.typed = self._typed(argv, defaults)
        parsed.compared = self._compared()
        self._forget_ignored(parsed)
        return parsed

    @staticmethod
    def _chosen_presets(argv: list[str]) -> list[str | None]:
        """Return the presets that the command line selects; the last one wins."""
        first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first_look.add_argument("--preset", nargs="?")
        first_look.add_argument("--demo", nargs="?", const=True)
        selected, _ = first_look.parse_known_args(argv)
        return [selected.preset, "demo" if selected.demo else None]

    def _typed(self, argv: list[str], defaults: dict) -> set[str]:
        """Return the names of the flags that were given on the command line."""
        unset = object()
        start = argparse.Namespace(**dict.fromkeys(defaults, unset))
        return {name for name, v in vars(super().parse_args(argv, start)).items() if v is not unset}

    def _compared(self) -> frozenset[str]:
        method = [g for g in self._action_groups if g.title not in HARDWARE]
        return frozenset(
            action.dest
            for group in method
            for action in group._group_actions
            if action.dest not in ("help", "help_presets", "preset", "demo")
        )

    def _forget_ignored(self, parsed: argparse.Namespace) -> None:
        by_reason: dict[str, list[str]] = {}
        for name in [name for name in self._ignored if name in parsed.typed]:
            delattr(parsed, name)
            parsed.typed.remove(name)
            flag, reason = self._ignored[name]
            by_reason.setdefault(reason, []).append(flag)
        if by_reason and not int(os.environ.get("RANK", 0)):
            named = "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items())
            print(
                f"note: these flags have no effect: {named}",
                file=sys.stderr,
            )

    def _spelling(self, token: str) -> str:
        """Return a flag as it was declared, whether it was typed with dashes or underscores."""
        flag, equals, value = token.partition("=")
        declared = self._option_string_actions
        if not flag.startswith("--") or flag in declared:
            return token
        for other in (flag[2:].replace("_", "-"), flag[2:].replace("-", "_")):
            if f"--{other}" in declared:
                return f"--{other}{equals}{value}"
        return token

    def _joined(self, argv: list[str]) -> list[str]:
        """Return `--amp auto` as `--amp=auto`, and `--amp` alone as `--amp=on`.

        This way a flag of type `switch` never consumes the positional argument after it.
        """
        switches = [name for name, a in self._option_string_actions.items() if a.type is switch]
        tokens = list(argv)
        for i in reversed(range(len(tokens))):
            if tokens[i] in switches:
                has_value = i + 1 < len(tokens) and tokens[i + 1] in SWITCH
                value = tokens.pop(i + 1) if has_value else "on"
                tokens[i] += f"={value}"
        return tokens

    def error(self, message: str):
        if message.startswith("unrecognized arguments"):
            meant = self._meant(message.split()[2].partition("=")[0])
            if meant:
                message += f"; did you mean {meant}?"
        self.exit(2, f"error: {message} (--help lists every flag)\n")

    def _meant(self, flag: str) -> str | None:
        """Return the flag of the same meaning as an unknown one, or the most similar one."""
        typed = flag.lstrip("-").replace("_", "-")
        names = {option.lstrip("-"): option for option in self._option_string_actions}
        names |= {
            a.dest: f"{a.dest.upper()} without a flag" for a in self._get_positional_actions()
        }
        for words in SYNONYMS:
            for name in words.split() if typed in words.split() else ():
                for spelling in (name, name.replace("-", "_")):
                    if spelling in names:
                        return names[spelling]
        close = difflib.get_close_matches(typed, [name for name in names if len(name) > 1], 1)
        return names[close[0]] if close else None


def switch(text: str) -> bool | str:
    """Convert on, off or auto to True, False or "auto", as an argparse type."""
    if text not in SWITCH:
        raise argparse.ArgumentTypeError(f"{text} must be on, off or auto")
    return SWITCH[text]


def figure_path(text: str) -> str:
    """Accept the path of a figure, whose suffix names its format, as an argparse type."""
    if os.path.splitext(text)[1].lower() not in FIGURES:
        raise argparse.ArgumentTypeError(f"{text} must end in one of {', '.join(FIGURES)}")
    return text


def folder_name(text: str) -> str:
    """Accept the name of one folder, not a path, as an argparse type."""
    if text in ("", ".", "..") or os.path.basename(text) != text:
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a folder, without {os.sep}")
    return text


def number(kind: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf):
    """Return an argparse type that accepts an int or a finite float within these bounds."""
    bounds = {"above": above, "at least": least, "at most": most}
    words = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]
    wanted = " and ".join(words) or "finite"

    def parse(text: str):
        value = kind(text)
        is_finite = -math.inf < value < math.inf
        if not (is_finite and above < value and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return parse


count = number(int, least=0)
positive_int = number(int, least=1)
seed = number(int, least=0, most=2**63 - 1)
positive = number(float, above=0)
not_negative = number(float, least=0)
fraction = number(float, least=0, most=1)
share = number(float, above=0, most=1)


def run(main) -> None:
    """Run `main()` as a program: print an error that the user can correct as one line on stderr."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; files that were saved before are intact", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `script | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        answer = launch.in_one_line(error)
        if answer is None:
            raise
        message, code = answer
        if int(os.environ.get("RANK", 0)):  # rank 0 reports first what all ranks would report
            time.sleep(2)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(code)

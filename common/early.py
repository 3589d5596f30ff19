"""What a script answers before PyTorch is imported, which takes seconds: a mistyped flag, --help, Ctrl-C.

    sys.path.insert(0, ...)

    from common import early

    early.answer(__name__)

    import torch

Nothing else in a script is written for this. Its command line is read in a process of its own, which ends with the answer:
there the script is imported with stand-ins for all packages but Python's own, numpy and those of this project (as Sphinx does
to read docstrings), and its `main()` is followed as far as argparse. Where anything goes otherwise than expected, or `main()`
uses a stand-in on the way, the answer is left to the script itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_ANSWER = 100  # exit code of that process


def answer(name: str) -> None:
    """First thing in a script, with its `__name__`: end the program where the command line is wrong or asks for help, and
    from here to `over`, without a word, where Ctrl-C is pressed. Nothing happens where the script is only imported."""
    ours = name in ("__main__", "__mp_main__")  # the second: in a process that multiprocessing starts
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    script = getattr(sys.modules["__main__"], "__file__", None)
    if name == "__main__" and script and "torch" not in sys.modules and hasattr(os, "fork"):
        child = os.fork()
        if not child:
            _read_command_line(script)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (0, 1, 2):
            sys.exit(code)


def over() -> None:
    """Ctrl-C is an exception again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signum, frame) -> None:
    os._exit(128 + signum)


def _read_command_line(script: str) -> None:
    """Print what argparse has to say and end this process: with argparse's exit code, or NO_ANSWER."""
    code = NO_ANSWER
    try:
        sys.meta_path.insert(0, _StandIns())
        spec = importlib.util.spec_from_file_location("script", script)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        parse = argparse.ArgumentParser.parse_args

        def only_parse(*args, **kwargs):
            parse(*args, **kwargs)
            raise _NoAnswer

        argparse.ArgumentParser.parse_args, _Kind.used = only_parse, _no_answer
        module.main()
    except SystemExit as said:
        code = said.code if isinstance(said.code, int) else NO_ANSWER
    except BaseException:
        pass
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # --help | head
            code = 1
        os._exit(code)


class _NoAnswer(BaseException):  # no Exception: argparse takes those of a flag's type for a wrong value
    pass


def _no_answer():
    raise _NoAnswer


class _Kind(type):
    """Of the class `_Anything`, whose attributes, and what calling it gives, are that class again."""

    used = staticmethod(lambda: _Anything)  # while modules are imported

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind.used()

    def __call__(cls, *args, **kwargs):
        return _Kind.used()


class _Anything(metaclass=_Kind):
    pass


class _StandIns:
    """Finds and loads modules in which every name is `_Anything`."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "numpy" or os.path.exists(os.path.join(ROOT, top)):
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module) -> None:
        module.__getattr__ = lambda name: getattr(_Anything, name)

"""The command: which one is asked for, and errors as one line and an exit code.

Every module named in ``COMMANDS`` has ``main(arguments, prog)``. Only the one asked for is imported,
and a command imports torch when it runs, not before: ``--help`` is instant, and needs no torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from ..errors import ConfigError, FastsaeError, Interrupted, PeerLostError
from ..version import __version__

COMMANDS = {
    "train": "train SAEs on the activations of a language model",
    "evaluate": "evaluate an SAE on text it was not trained on",
    "contrast": "find the latents that tell two sets of texts apart",
    "export": "write the dashboards of an SAE for Neuronpedia",
    "compare": "compare runs, finished or running",
    "plan": "count the memory of a run, and predict its time from a machine's rates",
}
HELP = """usage: fastsae COMMAND ...

Exact, fast training of BatchTopK sparse autoencoders.

{}

fastsae COMMAND --help lists its flags; fastsae --version says the version."""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command that ``arguments``, by default the program's own, name first.

    Args:
        prog: how the command is called in its help. [fastsae COMMAND]

    Returns:
        The exit code: 0, 2 after an error of the user, 3 after that of another process, 130 when interrupted from the keyboard, or 128
        and the signal's number when a signal ended a run, or nobody reads what is printed (SIGPIPE, 13).

    Raises:
        SystemExit: after ``--help`` (0).
    """
    # Of several processes, as torchrun starts them, the first speaks; the others where something is wrong.
    rank = int(os.environ.get("RANK", "0"))
    prefix = f"[process {rank}] " if rank else ""
    logging.basicConfig(format=f"{prefix}%(message)s", stream=sys.stderr)
    for ours in ("fastsae", "fastsae_kernels"):
        logging.getLogger(ours).setLevel(logging.WARNING if rank else logging.INFO)
    given = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        try:
            _run(given, prog)
        finally:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # As head and pagers leave it: what is still to be printed, at the end too, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FastsaeError as error:
        said = "\n".join([f"error: {error}", *getattr(error, "__notes__", ())])
        code, told = 3 if isinstance(error, PeerLostError) else 2, error.told
    except Interrupted as interruption:
        said, code, told = str(interruption), 128 + interruption.signal, interruption.told
    except KeyboardInterrupt:
        said, code, told = "interrupted", 130, None
    # What goes wrong before processes know of each other goes wrong in all of them.
    if not (rank > 0 if told is None else told):
        print(said, file=sys.stderr)  # noqa: T201
    return code


def _run(arguments: Sequence[str], prog: str | None) -> None:
    name, *rest = arguments
    if name in ("-h", "--help"):
        commands = "\n".join(f"  {command:10}{what}" for command, what in COMMANDS.items())
        print(HELP.format(commands))  # noqa: T201
    elif name == "--version":
        print(f"fastsae {__version__}")  # noqa: T201
    elif name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        module.main(rest, prog or f"fastsae {name}")
    else:
        raise ConfigError(
            f"{name!r} is not a command of fastsae; the commands are {', '.join(COMMANDS)}"
        )

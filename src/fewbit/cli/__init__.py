"""The command line: ``fewbit``. Results on stdout, everything else on stderr.

Exit status: 0 done; 2 for what a user, a file or a recipe caused, 3 for a journal that cannot be gone on with; 1 for a
fault of fewbit's own; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from fewbit.cli import bench, compare, convert, demo, evaluate, look, make, report, serve, talk, tune
from fewbit.cli.common import FULL, settings, tell
from fewbit.errors import FewbitError, JournalError
from fewbit.version import __version__

app = typer.Typer(
    name="fewbit",
    help="Make language models small and run them fast.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (
    look.inspect,
    look.plan,
    make.compress,
    convert.export,
    talk.run,
    serve.serve,
    evaluate.evaluate,
    compare.compare,
    tune.tune,
    report.report,
    look.explain,
    look.support,
    look.doctor,
    demo.demo,
):
    app.command("eval" if command is evaluate.evaluate else command.__name__)(command)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fewbit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Make language models small and run them fast."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    settings.reset()
    try:
        # not the library's own main, which has its own mind about Ctrl-C and broken pipes
        whole = typer.main.get_command(app)
        with whole.make_context("fewbit", list(arguments)) as context:
            whole.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # whoever read our output has had enough (fewbit inspect | head): no fault, and nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FewbitError, typer.TyperException) as error:
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        _fail(" ".join(text.split()))
        return JournalError.STATUS if isinstance(error, JournalError) else 2
    except OSError as error:
        # a disk that is full, a folder that may not be entered: the machine's word is the best there is
        place = f": {error.filename}" if error.filename else ""
        hint = "; make room there, or choose another place" if error.errno in FULL else ""
        _fail(f"{error.strerror or error}{place}{hint}")
        return 2
    except Exception as error:  # house: told to the user, with the traceback on request
        _fail(f"internal error: {type(error).__name__}: {error} (run again with -v for the traceback, and report it)")
        return 1
    return 0


def _fail(text: str) -> None:
    """Say what the error that is being handled means."""
    _say(text, traced=settings.verbose)


def _say(text: str, traced: bool = False) -> None:
    if settings.log is not None:
        settings.log.error("%s", text, exc_info=traced)
        return
    if traced:
        tell(traceback.format_exc().rstrip())
    tell(f"fewbit: {text}")


def main() -> None:
    """The entry point."""
    # Threads of GNU OpenMP that wait burn their core for a while. Where another program wants it, every small
    # operation of ours then waits for a slice of time: a busy machine made decoding five times slower. Said before
    # torch is loaded; whoever has set it knows better.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    sys.exit(run(sys.argv[1:]))

"""The program `bqnn`, which is also `python -m bqnn`: bqnn <verb> ..."""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from bqnn.jobs.secrets import mask
from bqnn.jobs.terminal import protect_output, say
from bqnn.settings.suggest import did_you_mean
from bqnn.text import short

VERBS = {
    "train": "train a network: bqnn train method=bbb task=digits",
    "quantize": "quantize a trained network: bqnn quantize checkpoint=<file or folder of a run>",
    "evaluate": "measure accuracy and uncertainty: bqnn evaluate checkpoint=... suite=shift",
    "export": "write a quantized network as an ONNX file: bqnn export checkpoint=...",
    "report": "compare all runs below a folder: bqnn report outputs",
}
HELP = "\n".join(
    [
        "bqnn <verb> ...: Bayesian neural networks at reduced precision\n",
        *(f"  {verb:9} {summary}" for verb, summary in VERBS.items()),
        "\nbqnn <verb> --help shows the options of a verb, bqnn --version the version.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb at the start of a command line.

    Args:
        arguments: The verb and its arguments; None for those of this process.

    Returns:
        The exit code: 0, or 2 for an unknown verb.

    Raises:
        SystemExit: The verb failed. Its code is that of the verb.
    """
    verb, *rest = arguments if arguments is not None else sys.argv[1:] or ["--help"]
    protect_output()
    if verb in ("-h", "--help"):
        say(HELP)
    elif verb == "--version":
        say(f"bqnn {version('bqnn')}")
    elif verb not in VERBS:
        hint = did_you_mean(verb, VERBS) or ";"
        say(
            f"bqnn: {short(mask(verb))}: unknown verb{hint} choose one of {', '.join(VERBS)}",
            error=True,
        )
        return 2
    elif verb == "report":
        from bqnn.report.__main__ import main as report

        sys.exit(report(rest, "bqnn report"))
    else:
        from bqnn.commands import main as run

        run(verb, rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())

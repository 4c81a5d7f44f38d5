"""Trains everything that comes with sfumato, stage by stage, each by one command of `sfumato train`.

    python -m tools.embedded RUNS [--only STAGE ...] [--scale small|large] [--print]

RUNS becomes a folder with the art and a folder for each stage. A stage that is done is left out, and one that was
broken off goes on. --print shows the commands instead of running them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from tools.embedded.stages import SIZES, STAGES, Stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE")
    parser.add_argument("--scale", choices=SIZES, default="small")
    parser.add_argument("--print", action="store_true")
    args = parser.parse_args()
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        words = stage.command(args.runs, args.scale)
        if args.print:
            print(shlex.join(words))
        elif (args.runs / stage.done).exists():
            print(f"{stage.name} is there already")
        else:
            run(stage, words)


def run(stage: Stage, words: list[str]) -> None:
    """Runs a stage; ends with its exit status if that is not 0."""
    print(f"{stage.name}: {shlex.join(words)}", flush=True)
    python = {"sfumato": [sys.executable, "-m", "sfumato"], "python": [sys.executable]}[words[0]]
    status = subprocess.run([*python, *words[1:]], check=False).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()

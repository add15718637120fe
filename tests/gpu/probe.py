"""What a machine with a GPU is asked, without the exporter: `python -m gpu.probe WORK... --out OUT`.

    facts                         driver, clocks, packages, libraries
    blas                          what cuBLAS reaches at the 11B model's shapes, and the copy it is held against
    oom BUNDLE                    limits beyond the device's memory are refused, and it can be used afterwards
    mini FOLDER [PRECISION...]    the miniature's bundles answer as on the CPU
    load,memory,decode,sampler,ttft,vision,profile BUNDLE     any of these, over one open back end

Every finding is a line of OUT/results.jsonl at once, and a fault is one too. The tools that make what is asked about
are `gpu.pack` and `gpu.fill`.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu.record import Recorder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work")
    parser.add_argument("subjects", nargs="*")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--label", help="stands in every line")
    parser.add_argument("--cases", choices=["large", "quick", "short", "tiny"], default="large")
    parser.add_argument("--steps", type=int, help="decode steps to measure of each case")
    parser.add_argument("--no-capture", action="store_true")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the decoder's provider")
    parser.add_argument("--graph", action="append", default=[], metavar="NAME=KEY", help="such as vision=vision")
    parser.add_argument("--backend", default="cuda", help="for mini")
    arguments = parser.parse_intermixed_args()
    if arguments.option or arguments.graph:
        options, graphs = (dict(each.split("=", 1) for each in pairs) for pairs in (arguments.option, arguments.graph))
        set_provider(options, graphs)
    common: dict[str, Any] = {"label": arguments.label} if arguments.label else {}
    if arguments.work == "facts":
        from gpu.facts import facts

        facts(Recorder(arguments.out, work="facts", **common))
    elif arguments.work == "blas":
        from gpu.blas import blas

        blas(Recorder(arguments.out, work="blas", **common))
    elif arguments.work == "mini":
        _mini(arguments, common)
    elif arguments.work == "oom":
        from gpu.speed import too_large

        too_large(Path(arguments.subjects[0]), Recorder(arguments.out, work="oom", **common))
    else:
        from gpu.speed import CASES, WORKS, measure

        works = arguments.work.split(",")
        if unknown := set(works) - set(WORKS):
            parser.error(f"no such work: {', '.join(sorted(unknown))}")
        cases = CASES[arguments.cases]
        if arguments.steps:
            cases = replace(cases, steps=arguments.steps)
        for subject in arguments.subjects:
            record = Recorder(arguments.out, work="speed", bundle=Path(subject).name, **common)
            measure(Path(subject), works, cases, record, capture=not arguments.no_capture)
    return 0


def _mini(arguments: argparse.Namespace, common: dict[str, Any]) -> None:
    from gpu.mini import check

    folder, *precisions = arguments.subjects
    for precision in precisions or sorted(path.stem for path in Path(folder).glob("*.npz")):
        record = Recorder(arguments.out, work="mini", precision=precision, **common)
        try:
            expected = dict(np.load(Path(folder) / f"{precision}.npz"))
            check(Path(folder) / precision, expected, record, arguments.backend)
        except Exception as error:
            record.add("open", error=f"{type(error).__name__}: {error}"[:700])


def set_provider(options: dict[str, str], graphs: dict[str, str]) -> None:
    """Open every decoder with these options beside its own, and these graphs of a bundle in the place of the usual."""
    import mllama_runtime.device.ort as device_ort

    usual = device_ort.cuda_provider

    def changed(stream: Any) -> Any:
        provider = usual(stream)
        return replace(
            provider, graphs={**provider.graphs, **graphs}, decoder_options={**provider.decoder_options, **options}
        )

    device_ort.cuda_provider = changed


if __name__ == "__main__":
    sys.exit(main())

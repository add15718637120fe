"""`mllama validate`, from this repository, against whatever transformers is installed; on a few of its samples.

    validate.py CHECKPOINT OUTPUT BUNDLE...

OUTPUT, a JSON file, gets a list with each bundle's report as `text` and as `json`.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "exporter")]

import torch  # noqa: E402
from mllama_exporter.validate import report_from_bundle  # noqa: E402
from mllama_exporter.validate.samples import builtin_samples  # noqa: E402
from mllama_runtime.bundle import Bundle  # noqa: E402

SAMPLES = ("canvas_2x2", "text_only", "two_pictures")  # the last is measured layer by layer


def main(checkpoint: Path, output: Path, *bundles: Path) -> None:
    torch.set_num_threads(1)
    found = []
    for path in bundles:
        bundle = Bundle.open(path)
        samples = [each for each in builtin_samples(bundle.manifest.model.vision) if each.name in SAMPLES]
        report = report_from_bundle(bundle, checkpoint, samples=samples, max_steps=8)
        found.append({"text": report.to_text(), "json": report.to_plain()})
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

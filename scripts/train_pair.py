"""Trains the planted pair of `probes demo` anew: python scripts/train_pair.py [--out DIR]

Two models of the same posts (probes/validation/planted.py): one quotes the word that decides its label, the other a
word that plays no part. A minute on two cores. The weights depend a little on processor and versions of torch, so
`about.json` says with which they were made; what has to hold of them is tested (tests/probes/test_demo.py).
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import torch

from probes.demo import MODELS, PAIR, ROWS
from probes.files import write_json, write_jsonl
from probes.validation.planted import World, train

POSTS = 20
WORLD = World(language="words", clauses=(5, 7), words=4, seed=21)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAIR, help="directory to write (default: the shipped one)")
    arguments = parser.parse_args()
    for name in MODELS:
        world = dataclasses.replace(WORLD, faithful=name == "faithful")
        planted = train(world)
        directory = arguments.out / name
        planted.probe.model.save_pretrained(directory)
        planted.probe.tokenizer.save_pretrained(directory)
        rows = [row | {"id": f"post-{number}"} for number, row in enumerate(planted.rows(POSTS), start=1)]
        write_jsonl(directory / ROWS, rows)
        about = {
            "made_by": "scripts/train_pair.py, of posts that a program wrote",
            "world": dataclasses.asdict(world),
            "right_answers": planted.accuracy,
            "third_label_without_the_cue": planted.cue_decides(256),
            "parameters": sum(weight.numel() for weight in planted.probe.model.parameters()),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        }
        write_json(directory / "about.json", about)
        size = sum(path.stat().st_size for path in directory.iterdir())
        told = {key: about[key] for key in ("right_answers", "third_label_without_the_cue", "parameters")}
        sys.stdout.write(f"{directory}: {size:,} bytes, {json.dumps(told)}, {planted.seconds:.0f} s\n")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # more only wait for each other, at this size
    main()

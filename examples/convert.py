"""Make other people's training files the JSON lines that train.py reads.

    python -m examples.convert llava_v1_5_mix665k.json train.jsonl --images coco
    python -m examples.convert cc3m/ train.jsonl
    python train.py --data train.jsonl --image_root coco

SOURCE is LLaVA's or ShareGPT4V's .json; COCO's, nocaps' or Karpathy's .json; Localized Narratives'
.jsonl; a .json list or .jsonl lines of pictures with captions; a .csv or .tsv with the columns
image and caption; a folder of pictures with .txt files; or a folder of img2dataset's .tar shards,
which are never unpacked. What cannot be used is counted by its reason, with the place where it was
met first. Links in the folder of pictures may lead to folders elsewhere that NANOVLADVA_ROOTS names
(as PATH does). Captions are routed by their length when they are read for training.
"""

import argparse
import sys
from pathlib import Path

from formats.captions import convert
from formats.files import InputError
from runtime.terminal import print_any_text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a file or a folder, see above")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--images", type=Path, help="where the pictures are (with SOURCE)")
    args = parser.parse_args(arguments)
    print_any_text()

    images = args.images
    # Pictures often lie in the folder that is read, or beside the file.
    if images is None:
        images = args.source if args.source.is_dir() else args.source.parent
    try:
        counts = convert(args.source, args.out, images)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for line in counts.lines():
        print(line)
    print(f"Train with --data {args.out} --image_root {images}")


if __name__ == "__main__":
    main()

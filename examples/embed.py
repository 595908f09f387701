"""Write the embeddings of pictures, or of the lines of a text file, into a file.

    python -m examples.embed photos.npy photos more/photo.jpg --model runs/mine
    python -m examples.embed captions.safetensors --texts captions.txt

.npy holds an array (rows, D) in fp32, in the order given. .safetensors holds it as "embeddings",
with the rows' names (paths, or lines) as a JSON list under "names" in its metadata.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from eval import TOY_MODEL, open_embedder, open_embeddings
from formats.files import InputError, open_text
from formats.pictures import list_pictures
from runtime.options import add_cache_option, add_model_options, add_prompt_options, check_parent
from runtime.terminal import errors_in_one_line


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; empty ones count, so that row i is line i. Raises InputError."""
    # Not splitlines(): that would also break at characters which may stand inside of a line.
    with open_text(path) as file:
        return [line.rstrip("\n") for line in file]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = "file to write: .npy, or .safetensors with the names of the rows"
    pictures = "pictures, or folders of pictures"
    texts = "embed the lines of this file"
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    parser.add_argument("inputs", nargs="*", type=Path, metavar="IMAGE", help=pictures)
    parser.add_argument("--texts", type=Path, metavar="FILE", help=texts)
    add_model_options(parser, TOY_MODEL)
    add_prompt_options(parser)
    add_cache_option(parser)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        check_parent(args.out)
        is_known = args.out.suffix in (".npy", ".safetensors")
        has_one_kind = bool(args.inputs) != bool(args.texts)
        if not is_known or not has_one_kind:
            wanted = "OUT ends in .npy or .safetensors, then come either pictures or --texts FILE"
            raise InputError(f"embed: {wanted}")
        embeddings = open_embeddings(open_embedder(args), args)
        if args.texts:
            names = read_lines(args.texts)
            vectors = embeddings.texts(names)  # (rows, D)
        else:
            paths = list_pictures(args.inputs)
            names = [str(path) for path in paths]
            vectors = embeddings.images(paths)
        if args.out.suffix == ".npy":
            np.save(args.out, vectors.numpy())
        else:
            save_file({"embeddings": vectors}, args.out, metadata={"names": json.dumps(names)})
        rows, dimension = vectors.shape
        print(f"{rows:,} embeddings of {dimension:,} numbers in {args.out}, in the order given")


if __name__ == "__main__":
    main()

"""Which caption fits a picture best: cosine similarities, the best first.

python -m examples.match photo.jpg "a red car" "a blue car" --model runs/mine
"""

import argparse

from data import open_image
from eval import TOY_MODEL, encode_image, encode_text, open_embedder
from runtime.options import add_model_options, add_prompt_options
from runtime.terminal import errors_in_one_line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = "what the picture may show"
    parser.add_argument("image", metavar="IMAGE", help="a picture")
    parser.add_argument("captions", nargs="+", metavar="CAPTION", help=texts)
    add_model_options(parser, TOY_MODEL)
    add_prompt_options(parser)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        embedder = open_embedder(args)
        texts = encode_text(embedder, args.captions)  # (captions, D)
        image = encode_image(embedder, [open_image(args.image)])  # (1, D)
        # Both are of unit length, so that a dot product is the cosine.
        scores = texts @ image[0]
        for score, caption in sorted(zip(scores.tolist(), args.captions), reverse=True):
            print(f"{score:.3f}  {caption}")


if __name__ == "__main__":
    main()

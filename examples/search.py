"""Search a folder of pictures, by words or by a picture: list the best, and draw them.

    python -m examples.search --images photos "a red car" --model runs/mine
    python -m examples.search --images photos photo.jpg

Embeddings are kept (--cache), so that the next search computes new pictures only.
"""

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from data import open_image
from eval import TOY_MODEL, Embeddings, open_embedder, open_embeddings
from formats.files import InputError, LeftOut, tell
from formats.pictures import is_picture, pictures_in
from runtime.gallery import gallery
from runtime.options import (
    add_cache_option,
    add_model_options,
    add_prompt_options,
    check_parent,
    positive,
)
from runtime.terminal import errors_in_one_line

AT_A_TIME = 64  # pictures that are read and embedded together
IN_A_ROW = 4  # pictures of the drawing


def rank(
    embeddings: Embeddings, query: str, pictures: list[Path], top: int
) -> list[tuple[float, Path]]:
    """The `top` pictures nearest to a query: (cosine similarity, path), the best first."""
    if os.path.isfile(query):  # Path's own test would fail on a text that is too long for a name
        wanted = embeddings.images([Path(query)])  # (1, D)
    else:
        wanted = embeddings.texts([query])
    similarities = embeddings.images(pictures) @ wanted[0]  # (pictures,)
    scores, best = similarities.topk(min(top, len(pictures)))
    return [(score, pictures[index]) for score, index in zip(scores.tolist(), best.tolist())]


def embed_folder(embeddings: Embeddings, folder: Path) -> list[Path]:
    """Embed the pictures of a folder and of the folders below it -> those that could be read.

    Says which could not. Raises InputError where there is none."""
    left_out = LeftOut()
    paths = pictures_in(folder, left_out)
    tell(folder, left_out)
    pictures = []
    unreadable = []
    starts = range(0, len(paths), AT_A_TIME)
    for start in tqdm(starts, desc="pictures", unit=f" x {AT_A_TIME}", delay=2, leave=False):
        pictures += embed_readable(embeddings, paths[start : start + AT_A_TIME], unreadable)
    for reason in unreadable:
        print(f"left out: {reason}")
    if not pictures:
        raise InputError(f"{folder}: there is no picture in this folder that can be read")
    return pictures


def embed_readable(embeddings: Embeddings, paths: list[Path], unreadable: list[str]) -> list[Path]:
    """Embed pictures -> those that could be read; the others' reasons go to `unreadable`."""
    try:
        embeddings.images(paths)
        return paths
    except InputError as error:
        if len(paths) == 1:
            unreadable.append(str(error))
            return []
    # One of them is broken. Halving finds it, and the rest still goes through in large batches.
    half = len(paths) // 2
    first = embed_readable(embeddings, paths[:half], unreadable)
    return first + embed_readable(embeddings, paths[half:], unreadable)


def draw(found: list[tuple[float, Path]], query: str, out: Path) -> None:
    """The pictures with their scores, a few in a row, the query beside the first row."""
    rows = []
    for start in range(0, len(found), IN_A_ROW):
        row = []
        for score, path in found[start : start + IN_A_ROW]:
            # Which pictures are right is not known here, so that none is framed.
            row.append((open_image(path), False, f"{score:.3f}"))
        rows.append((query if start == 0 else "", row))
    gallery(out, rows, size=192)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images = "the folder to search in"
    top = "how many to show (12)"
    out = "picture to draw (search.png)"
    parser.add_argument("query", metavar="QUERY", help="words, or the path of a picture")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help=images)
    parser.add_argument("--top", type=positive, default=12, metavar="N", help=top)
    parser.add_argument("--out", type=Path, default=Path("search.png"), metavar="PNG", help=out)
    add_model_options(parser, TOY_MODEL)
    add_prompt_options(parser)
    add_cache_option(parser)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        check_parent(args.out)
        if not args.query.strip():
            raise InputError("QUERY is empty: give words, or the path of a picture")
        if is_picture(args.query) and not os.path.isfile(args.query):
            raise InputError(f"{args.query}: no such picture")
        embeddings = open_embeddings(open_embedder(args), args)
        pictures = embed_folder(embeddings, args.images)
        found = rank(embeddings, args.query, pictures, args.top)
        for score, path in found:
            print(f"{score:.3f}  {path}")
        draw(found, args.query, args.out)
        print(f"the best {len(found)} of {len(pictures):,} pictures are drawn in {args.out}")


if __name__ == "__main__":
    main()

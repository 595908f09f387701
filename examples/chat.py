"""A conversation about one picture; an empty line ends it.

python -m examples.chat photo.jpg --model runs/mine
"""

import argparse

from PIL import Image

from data import open_image
from eval import TOY_MODEL, Embedder, open_embedder, room_for_answer
from runtime.options import add_model_options, positive
from runtime.terminal import errors_in_one_line


class Conversation:
    """Questions and answers about one image.

    What was said stays in the key-value cache: each answer computes only what is new."""

    def __init__(self, embedder: Embedder, image: Image.Image, max_new_tokens: int = 256):
        self.embedder = embedder
        self.image = image
        self.max_new_tokens = max_new_tokens
        self.ids: list[int] = []  # everything that was said so far, as tokens
        self.cache = embedder.model.new_cache(1)

    def ask(self, question: str) -> str:
        """Raises InputError where the question leaves no room for an answer; it may be asked in
        fewer words then."""
        layout = self.embedder.layout
        pixel_values = None
        if not self.ids:
            image = self.embedder.processor(self.image)
            ids = layout.question(question, image)
            pixel_values = self.embedder.pixel_values([image])
        else:  # the image stands in the cache
            ids = self.ids + layout.next_question(question)
        room = room_for_answer(self.embedder, ids, self.max_new_tokens)
        model = self.embedder.model
        answer = model.generate([ids], pixel_values, room, cache=self.cache)[0]
        self.ids = ids + answer
        return self.embedder.tokenizer.decode(answer)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    longest = "longest answer (256)"
    parser.add_argument("image", metavar="IMAGE", help="a picture")
    parser.add_argument("--max_new_tokens", type=positive, default=256, metavar="N", help=longest)
    add_model_options(parser, TOY_MODEL)
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        embedder = open_embedder(args)
        conversation = Conversation(embedder, open_image(args.image), args.max_new_tokens)
        print(f"Ask about {args.image}; an empty line ends.")
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):  # Ctrl-D and Ctrl-C at the prompt end it too
                question = ""
            if not question:
                return
            print(conversation.ask(question))


if __name__ == "__main__":
    main()

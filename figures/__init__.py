"""The paper's figures, on the toy run or on any other: `python -m figures --help`.

Each analysis is a module with the same three functions:

    measure     plain numbers, which json can write
    say         the numbers -> one sentence: does the paper's trend appear?
    draw        the numbers -> a matplotlib Figure

In a notebook, for one of them:

    embedder = load_embedder("runs/toy")
    items = read_items(Path("toy/data/test.jsonl"), embedder)
    numbers = prompts.measure(embedder, items, pairs)
    prompts.draw(numbers)
"""

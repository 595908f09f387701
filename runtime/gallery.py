"""A contact sheet: each row a query, and the pictures that were found for it.

    row = ("a red ring", [(picture, True, "0.83"), (another, False, "0.71")])
    gallery(Path("found.png"), [row])

A picture that is right is framed in green; below each one stands its label.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

# All lengths are in pixels.
FONT_SIZE = 13
QUERY_WIDTH = 330  # the column of the queries, at the left
QUERY_MARGIN = 20  # of that column, what stays free of text
GAP = 12  # between one picture and the next
FRAME = 4  # around a picture
LABEL_HEIGHT = 20
TOP = 6


def gallery(
    path: Path,
    rows: list[tuple[str, list[tuple[Image.Image, bool, str]]]],
    size: int = 96,
) -> None:
    """Draw the sheet and write it as a PNG.

    Args:
        path: the file to write, whatever its ending.
        rows: (query, [(RGB picture, whether it is right, label), ...]); rows may differ in length.
        size: side of the square into which each picture is fitted, in pixels."""
    columns = max(len(found) for _, found in rows)
    row_height = TOP + size + LABEL_HEIGHT
    width = QUERY_WIDTH + columns * (size + GAP)
    height = len(rows) * row_height + TOP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for number, (query, found) in enumerate(rows):
        top = TOP + number * row_height
        lines = wrap(query, draw, font, QUERY_WIDTH - QUERY_MARGIN)
        draw.multiline_text((8, top + 4), "\n".join(lines), fill="black", font=font)
        for column, (picture, is_right, label) in enumerate(found):
            left = QUERY_WIDTH + column * (size + GAP)
            # The frame is a filled square, of which the picture leaves only the border to be seen.
            right = left + size + FRAME - 1
            bottom = top + size + FRAME - 1
            frame = (left - FRAME, top - FRAME, right, bottom)
            draw.rectangle(frame, fill="limegreen" if is_right else "white")
            # Padded, not cropped: what is at a picture's border may be what was asked for.
            square = ImageOps.pad(picture, (size, size), color="gray")
            sheet.paste(square, (left, top))
            draw.text((left, top + size + FRAME - 1), label, fill="dimgray", font=font)
    sheet.save(path, "PNG")


def wrap(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: int
) -> list[str]:
    """Break a text into lines of less than `width` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) < width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines

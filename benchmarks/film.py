"""Put the films of a run's evaluation side by side, at twice the speed, in one picture for the README.

python -m benchmarks.film outputs/pusht_laptop/<date_time>/evaluation/<step> docs/pusht_laptop.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

SIDE, GAP = 180, 6  # pixels of one film, and between two
EVERY = 2  # frames: one is kept
COLOURS = 32
FRAME_MS = 100


def read(path: Path) -> list[Image.Image]:
    """Return the frames that are kept, the last among them, with the film's name."""
    label = path.stem.split("_")[0]
    with av.open(str(path)) as film:
        frames = [frame.to_image().resize((SIDE, SIDE), Image.Resampling.LANCZOS) for frame in film.decode(video=0)]
    kept = [*frames[:-1:EVERY], frames[-1]]
    for frame in kept:
        ImageDraw.Draw(frame).text((8, 6), label, fill="black")
    return kept


def main() -> None:
    """Read, tile and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    films = [read(next(arguments.evaluation.glob(f"videos/{which}_*.mp4"))) for which in ("best", "median", "worst")]
    tiles = []
    for moment in range(max(len(film) for film in films)):
        shown = [np.asarray(film[min(moment, len(film) - 1)]) for film in films]
        border = np.full((SIDE, GAP, 3), 255, np.uint8)
        tiles.append(Image.fromarray(np.concatenate([shown[0], border, shown[1], border, shown[2]], axis=1)))
    palette = tiles[len(tiles) // 4].quantize(COLOURS)
    first, *others = [tile.quantize(palette=palette, dither=Image.Dither.NONE) for tile in tiles]
    arguments.picture.parent.mkdir(exist_ok=True)
    first.save(arguments.picture, save_all=True, append_images=others, duration=FRAME_MS, loop=0, optimize=True)


if __name__ == "__main__":
    main()

"""Put an evaluation on paper: numbers as JSON and CSV, films of telling episodes, and all endings on one sheet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from getiaction.files import replace_text
from getiaction.simulation.environment import Environment
from getiaction.simulation.metrics import Summary
from getiaction.simulation.rollout import Episode, replay

NUMBERS, ROWS, SHEET, VIDEOS = "evaluation.json", "episodes.csv", "contact_sheet.png", "videos"
FILM_SIZE = 384  # pixels of a film's side
TILE, COLUMNS, MOST_TILES = 128, 10, 100
GREEN, GREY = (46, 160, 67), (170, 170, 170)


def write_numbers(folder: Path, summary: Summary, episodes: Sequence[Episode], described: dict[str, Any]) -> Path:
    """Write `evaluation.json` and `episodes.csv`; return the first.

    Args:
        folder: exists.
        summary: of these episodes.
        episodes: one row each: seed, success, score, length, largest and final measures.
        described: what the numbers belong to: checkpoint, environment, machine, versions.
    """
    rows = [flat_row(episode) for episode in episodes]
    content = {**asdict(summary), **described, "rows": rows}
    replace_text(folder / NUMBERS, json.dumps(content, indent=1))
    temporary = folder / f".{ROWS}.new"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(folder / ROWS)
    return folder / NUMBERS


def flat_row(episode: Episode) -> dict[str, Any]:
    """Return an episode as one flat row."""
    return {
        "seed": episode.seed,
        "success": episode.success,
        "score": episode.score,
        "length": episode.length,
        **{f"max_{name}": value for name, value in episode.largest.items()},
        **{f"final_{name}": value for name, value in episode.final.items()},
    }


def film(folder: Path, environment: Environment, episodes: Sequence[Episode]) -> list[Path]:
    """Film the best, the median and the worst episode by playing them again; return the MP4 files."""
    folder = folder / VIDEOS
    folder.mkdir(exist_ok=True)
    ranked = sorted(episodes, key=lambda episode: (-episode.score, episode.length, episode.seed))
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    for old in folder.glob("*_seed_*.mp4"):
        old.unlink()
    return [
        write_video(folder / f"{title}_seed_{episode.seed}.mp4", pictures(environment, episode), environment.fps)
        for title, episode in chosen.items()
    ]


def pictures(environment: Environment, episode: Episode) -> Iterable[np.ndarray]:
    """Play an episode again and draw each step."""
    for _ in replay(environment, episode):
        yield environment.render(FILM_SIZE)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> Path:
    """Write frames (H, W, 3) uint8 as H.264 in an MP4 that every browser plays."""
    temporary = path.with_name(f".{path.name}")
    with av.open(temporary, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "23"})
        stream.width = stream.height = FILM_SIZE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    temporary.replace(path)
    return path


def draw_sheet(folder: Path, environment: Environment, episodes: Sequence[Episode]) -> Path:
    """Draw how each of the first 100 episodes ended, by playing it again: framed green where it succeeded."""
    shown = episodes[:MOST_TILES]
    columns = min(COLUMNS, len(shown))
    sheet = Image.new("RGB", (columns * TILE, -(-len(shown) // columns) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    for number, episode in enumerate(shown):
        for _ in replay(environment, episode):
            pass
        left, top = number % columns * TILE, number // columns * TILE
        sheet.paste(Image.fromarray(environment.render(TILE - 8)), (left + 4, top + 4))
        frame = (left + 2, top + 2, left + TILE - 3, top + TILE - 3)
        draw.rectangle(frame, outline=GREEN if episode.success else GREY, width=3)
        draw.text((left + 9, top + 7), f"{episode.seed}: {episode.score:.2f}", fill="black")
    temporary = folder / f".{SHEET}"
    sheet.save(temporary, format="PNG", optimize=True)
    temporary.replace(folder / SHEET)
    return folder / SHEET

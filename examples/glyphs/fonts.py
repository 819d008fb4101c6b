"""The glyphs: seven weights of Noto Sans CJK from the package index, rendered once and kept under `.cache/glyphs/`.

No torch in here: the rendering processes import this module alone and start quickly.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

WEIGHTS = ("Thin", "Light", "DemiLight", "Regular", "Medium", "Bold", "Black")
SIZE = 32  # pixels a side
FONT_SIZE = 28  # leaves a border of 2 pixels for the geometry to move in

# Compatibility ideographs (U+F900, U+2F800) are left out: they are drawn like the unified character they stand for.
SCRIPTS = {
    "han": (range(0x3400, 0xA000), range(0x20000, 0x2F800), range(0x30000, 0x32000)),
    "hangul": (range(0xAC00, 0xD7A4),),
}


@dataclass(frozen=True)
class Glyphs:
    """Rendered glyphs that can be told apart: every code point a class, every font weight a picture of it."""

    images: np.ndarray  # [P, V, SIZE, SIZE] uint8, a read-only memory map
    rows: np.ndarray  # [K] the rows of `images` that hold usable glyphs
    code_points: np.ndarray  # [K]
    weights: tuple[str, ...]  # [V]

    def __len__(self) -> int:
        return len(self.rows)


def load(
    scripts: tuple[str, ...] = ("han",),
    weights: tuple[str, ...] = WEIGHTS,
    limit: int | None = None,
    cache: Path = Path(".cache/glyphs"),
    processes: int = 2,
) -> Glyphs:
    """The glyphs of `scripts` (the first `limit` code points), rendered now unless the cache has them."""
    available = code_points(weights[0])
    wanted = np.array([c for script in scripts for piece in SCRIPTS[script] for c in piece if c in available])[:limit]
    path = cache / f"{cache_name(scripts, weights, wanted)}.npy"
    if not path.exists():
        render(path, wanted, weights, processes)
    images = np.load(path, mmap_mode="r")
    kept_path = path.with_suffix(".kept.npy")
    if not kept_path.exists():
        save(kept_path, distinct(images))
    rows = np.load(kept_path)
    return Glyphs(images, rows, wanted[rows], weights)


def cache_name(scripts: tuple[str, ...], weights: tuple[str, ...], wanted: np.ndarray) -> str:
    """Names everything that the pictures depend on, so that a stale cache is never read."""
    fonts = ",".join(f"{weight}={font_version(weight)}" for weight in weights)
    digest = hashlib.sha256(f"{fonts};{FONT_SIZE}".encode() + wanted.astype("<i8").tobytes()).hexdigest()[:8]
    versions = "-".join(sorted({font_version(weight) for weight in weights}))
    return f"{'+'.join(scripts)}-{SIZE}px-{len(wanted)}cp-{len(weights)}fonts-v{versions}-{digest}"


def package(weight: str) -> str:
    return f"cvttf_NotoSansCJK_{weight}"


def font_version(weight: str) -> str:
    return importlib.metadata.version(package(weight))


def font_path(weight: str) -> Path:
    spec = importlib.util.find_spec(package(weight))
    if spec is None or not spec.submodule_search_locations:
        distribution = package(weight).lower().replace("_", "-")
        raise SystemExit(f"{distribution} is not installed; `pip install -e '.[demo]'` brings the fonts")
    return next(Path(spec.submodule_search_locations[0]).glob("*.otf"))


def code_points(weight: str) -> set[int]:
    with TTFont(font_path(weight), lazy=True) as font:
        return set(font.getBestCmap())


def render(path: Path, wanted: np.ndarray, weights: tuple[str, ...], processes: int) -> None:
    """Draw every glyph into a temporary file and rename it: a file under its final name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(wanted), len(weights), SIZE, SIZE))
    images.flush()
    pieces = [
        (str(temporary), view, weight, first, wanted[first : first + 2500].tolist())
        for view, weight in enumerate(weights)
        for first in range(0, len(wanted), 2500)
    ]
    try:
        with tqdm(total=len(wanted) * len(weights), desc="rendering", unit="glyph", unit_scale=True) as bar:
            if processes > 1 and len(pieces) > 1:
                # spawn: the parent has torch's threads running, which a fork would copy in an unknown state.
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(processes, mp_context=context) as pool:
                    for done in as_completed(pool.submit(draw_piece, *piece) for piece in pieces):
                        bar.update(done.result())
            else:
                for piece in pieces:
                    bar.update(draw_piece(*piece))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def draw_piece(path: str, view: int, weight: str, first: int, points: list[int]) -> int:
    """Draw code points `points` in one weight into rows `first` and on of the array at `path`."""
    images = np.load(path, mmap_mode="r+")
    font = ImageFont.truetype(str(font_path(weight)), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    for row, point in enumerate(points, start=first):
        picture = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(picture).text((SIZE / 2, SIZE / 2), chr(point), fill=255, font=font, anchor="mm")
        images[row, view] = np.asarray(picture)
    images.flush()
    return len(points)


def distinct(images: np.ndarray) -> np.ndarray:
    """Rows with a glyph of their own: not blank, and in no weight the same picture as an earlier row's."""
    seen: list[set[bytes]] = [set() for _ in range(images.shape[1])]
    kept = []
    for row, views in enumerate(images):
        pictures = [view.tobytes() for view in views]
        if all(view.any() for view in views) and not any(p in s for p, s in zip(pictures, seen, strict=True)):
            kept.append(row)
        for picture, pictures_seen in zip(pictures, seen, strict=True):
            pictures_seen.add(picture)
    return np.array(kept, dtype=np.int64)


def save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)

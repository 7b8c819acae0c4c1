"""Make six small detection datasets that look different and share no class.

Every domain holds the same real handwritten digits (scikit-learn's ``load_digits``, 1797 scans of
8 x 8 pixels) drawn in its own look, asks its own question about them, and has its own size::

    domain     train  the question                      look
    ink          240  which digit is it? (ten classes)  pen on ruled paper
    thermal      120  even or odd?                      false-colour heat camera
    blueprint     80  low (0-4) or high (5-9)?          pale outlines on a blue grid
    neon          60  prime, or not?                    glowing tubes in the dark
    film          40  which of 0, 3 and 8?              grainy, scratched, faded film
    chalk         30  has it a loop (0, 6, 8, 9)?       chalk on a wiped board

So the domains contradict each other on purpose: the same stroke is another class in every domain,
and in ``film`` the other seven digits are background. A single model has to make that compromise
somewhere; experts need not.

The digits of the validation images are never those of the training images. The same arguments
give the same bytes (with the same versions of numpy, scipy, scikit-learn and Pillow)::

    python tools/make_domains.py --out data/domains
    data/domains/<domain>/{train,val}.json      COCO annotations
    data/domains/<domain>/{train,val}/*.png     images
    data/domains/domains.json                   what was made, and with which arguments
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

#: Part of the fingerprint in ``domains.json``: raise it whenever the pictures change.
VERSION = 1
MANIFEST = 'domains.json'
DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


@dataclass
class Glyph:
    """One digit as it lies on the canvas.

    Attributes:
        digit: Which digit it is, 0 to 9.
        mask: How much of each canvas pixel its stroke covers, shape (S, S), 0 to 1.
        box: ``x, y, width, height`` of the stroke in pixels.
    """

    digit: int
    mask: np.ndarray
    box: tuple[int, int, int, int]


# --------------------------------------------------------------------------------------------------
# Looks: the glyphs of one image -> its pixels, shape (S, S, 3), 0 to 255
# --------------------------------------------------------------------------------------------------


def _clouds(rng: np.random.Generator, size: int, smooth: float) -> np.ndarray:
    """Smooth random field of shape (size, size), scaled to 0 to 1."""
    field = ndimage.gaussian_filter(rng.standard_normal((size, size)), smooth, mode='wrap')
    return (field - field.min()) / (np.ptp(field) + 1e-12)


def _union(glyphs: list[Glyph], size: int) -> np.ndarray:
    """All strokes of an image as one mask."""
    return np.max([np.zeros((size, size)), *(glyph.mask for glyph in glyphs)], axis=0)


def _paint(canvas: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay ``colour`` over ``canvas`` (S, S, 3) where ``alpha`` (S, S) says so."""
    return canvas * (1 - alpha[..., None]) + colour * alpha[..., None]


def draw_ink(glyphs: list[Glyph], size: int, rng: np.random.Generator) -> np.ndarray:
    """Blue-black pen on stained, ruled paper."""
    paper = np.array([244, 236, 214.0]) - 26 * _clouds(rng, size, size / 8)[..., None]
    paper = paper - 6 * rng.random((size, size, 1))
    rows = np.arange(size)[:, None] + rng.uniform(0, 20)
    rule = np.broadcast_to((rows % (size / 8) < 1.0) * 0.35, (size, size))
    paper = _paint(paper, rule, np.array([140, 165, 205.0]))
    pressure = 0.72 + 0.28 * _clouds(rng, size, 6)
    ink = np.array([28, 32, 84.0]) + rng.uniform(-14, 14, 3)
    return _paint(paper, _union(glyphs, size) * pressure, ink)


def draw_thermal(glyphs: list[Glyph], size: int, rng: np.random.Generator) -> np.ndarray:
    """Warm strokes seen by a blurry, noisy heat camera in false colour."""
    heat = 0.10 + 0.28 * _clouds(rng, size, size / 6)
    for glyph in glyphs:
        warm = ndimage.gaussian_filter(glyph.mask, 1.2) + 0.3 * ndimage.gaussian_filter(
            glyph.mask, 5
        )
        heat = heat + rng.uniform(0.45, 0.75) * warm
    heat = np.clip(heat + 0.03 * rng.standard_normal((size, size)), 0, 1)
    stops = np.array([0, 0.25, 0.5, 0.75, 1])
    colours = np.array([[0, 0, 20], [90, 10, 120], [210, 50, 70], [250, 150, 20], [255, 255, 190]])
    return np.stack([np.interp(heat, stops, colours[:, c]) for c in range(3)], axis=-1)


def draw_blueprint(glyphs: list[Glyph], size: int, rng: np.random.Generator) -> np.ndarray:
    """Pale outlines, not strokes, on a blue sheet with a grid."""
    sheet = np.array([22, 62, 136.0]) + 18 * _clouds(rng, size, size / 6)[..., None]
    step = size / 12
    shift = rng.uniform(0, step, 2)
    lines = ((np.arange(size) + shift[0]) % step < 1)[:, None] | (
        (np.arange(size) + shift[1]) % step < 1
    )[None, :]
    sheet = _paint(sheet, lines * 0.22, np.array([190, 215, 245.0]))
    stroke = _union(glyphs, size) > 0.5
    outline = ndimage.gaussian_filter((stroke ^ ndimage.binary_erosion(stroke)).astype(float), 0.5)
    return _paint(sheet, np.clip(1.5 * outline, 0, 1), np.array([225, 236, 252.0]))


def draw_neon(glyphs: list[Glyph], size: int, rng: np.random.Generator) -> np.ndarray:
    """Tubes in saturated colours with a glow, on a dark wall."""
    wall = np.array([14, 10, 22.0]) + 22 * _clouds(rng, size, 2.5)[..., None]
    tubes = np.array(
        [[255, 40, 160], [40, 240, 255], [120, 255, 60], [255, 150, 30], [170, 80, 255]]
    )
    for glyph in glyphs:
        colour = tubes[rng.integers(len(tubes))].astype(float)
        glow = ndimage.gaussian_filter(glyph.mask, size / 32)
        wall = wall + 1.1 * glow[..., None] * colour
        wall = wall + glyph.mask[..., None] * (0.75 * colour + 60)
    return wall


def draw_film(glyphs: list[Glyph], size: int, rng: np.random.Generator) -> np.ndarray:
    """Faded sepia film: grain, scratches, dust, a dark rim, uneven exposure."""
    grey = 118 + 50 * (_clouds(rng, size, size / 5) - 0.5)
    contrast = rng.uniform(70, 100)
    grey = grey + contrast * ndimage.gaussian_filter(_union(glyphs, size), 0.6)
    for column in rng.integers(0, size, rng.integers(1, 4)):
        grey[:, column] += rng.choice([-45.0, 45.0])
    grey = grey + 60 * (rng.random((size, size)) > 0.998)
    grey = grey + 20 * rng.standard_normal((size, size))
    axis = np.linspace(-1, 1, size)
    grey = grey * (1 - 0.35 * (axis[:, None] ** 2 + axis[None, :] ** 2) / 2)
    return grey[..., None] * np.array([1.0, 0.92, 0.76])


def draw_chalk(glyphs: list[Glyph], size: int, rng: np.random.Generator) -> np.ndarray:
    """Crumbly chalk on a green board that was wiped badly."""
    board = np.array([38, 66, 52.0]) + 12 * _clouds(rng, size, 3)[..., None]
    smear = ndimage.gaussian_filter(rng.random((size, size)), (1.5, size / 6))
    smear = (smear - smear.min()) / (np.ptp(smear) + 1e-12)
    board = _paint(board, 0.28 * smear, np.array([200, 205, 200.0]))
    sticks = np.array([[240, 240, 232], [244, 226, 140], [240, 170, 180]])
    for glyph in glyphs:
        crumbs = np.clip(0.55 + 0.9 * ndimage.gaussian_filter(rng.random((size, size)), 0.7), 0, 1)
        crumbs = crumbs * (rng.random((size, size)) > 0.18)
        board = _paint(board, glyph.mask * crumbs, sticks[rng.integers(len(sticks))].astype(float))
    return board


# --------------------------------------------------------------------------------------------------
# Domains
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """One dataset: its look, its share of the training images, its classes.

    Attributes:
        draw: The look.
        share: Training images, relative to the largest domain.
        classes: Class name -> the digits that are of this class. Digits in no class are background.
    """

    draw: Callable[[list[Glyph], int, np.random.Generator], np.ndarray]
    share: float
    classes: dict[str, tuple[int, ...]]

    def class_of(self, digit: int) -> str | None:
        """Name of the class of a digit, None for background."""
        return next((name for name, digits in self.classes.items() if digit in digits), None)


DOMAINS = {
    'ink': Domain(draw_ink, 1, {f'ink_{name}': (digit,) for digit, name in enumerate(DIGITS)}),
    'thermal': Domain(
        draw_thermal, 1 / 2, {'thermal_even': (0, 2, 4, 6, 8), 'thermal_odd': (1, 3, 5, 7, 9)}
    ),
    'blueprint': Domain(
        draw_blueprint, 1 / 3, {'blueprint_low': (0, 1, 2, 3, 4), 'blueprint_high': (5, 6, 7, 8, 9)}
    ),
    'neon': Domain(
        draw_neon, 1 / 4, {'neon_prime': (2, 3, 5, 7), 'neon_nonprime': (0, 1, 4, 6, 8, 9)}
    ),
    'film': Domain(draw_film, 1 / 6, {'film_zero': (0,), 'film_three': (3,), 'film_eight': (8,)}),
    'chalk': Domain(
        draw_chalk, 1 / 8, {'chalk_loop': (0, 6, 8, 9), 'chalk_open': (1, 2, 3, 4, 5, 7)}
    ),
}


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def load_glyphs(split: str) -> dict[int, np.ndarray]:
    """The scans a split may use.

    Two thirds of each digit's scans are for training, the rest for validation.

    Args:
        split: ``train`` or ``val``.

    Returns:
        Digit -> scans of shape (N, 8, 8), 0 to 1.
    """
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8) / 16
    pools = {}
    for digit in range(10):
        of_digit = scans[labels == digit]
        cut = len(of_digit) * 2 // 3
        pools[digit] = of_digit[:cut] if split == 'train' else of_digit[cut:]
    return pools


def _stroke(scan: np.ndarray, height: int, angle: float) -> np.ndarray:
    """Enlarge a scan (8, 8) to ``height`` pixels, turn it, and cut it to its strokes."""
    # Strokes reach the rim of the scans: without the margin they would end in a straight cut.
    scan = np.pad((scan * 255).astype(np.uint8), 1)
    picture = Image.fromarray(scan).resize((height, height), Image.BICUBIC)
    picture = picture.rotate(angle, resample=Image.BICUBIC, expand=True)
    stroke = np.clip((np.asarray(picture, dtype=float) / 255 - 0.38) * 4 + 0.5, 0, 1)
    rows, columns = np.flatnonzero(stroke.max(1) > 0.5), np.flatnonzero(stroke.max(0) > 0.5)
    return stroke[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def place_glyphs(
    pools: dict[int, np.ndarray], wanted: tuple[int, ...], size: int, rng: np.random.Generator
) -> list[Glyph]:
    """Put three to six digits on a canvas so that none touches another.

    Args:
        pools: Scans by digit, from :func:`load_glyphs`.
        wanted: Digits of the domain's classes. Every second digit is one of them (and the first
            is), so that a domain with a lot of background still has objects in each image.
        size: Side of the canvas S in pixels.
        rng: Source of all randomness.
    """
    glyphs: list[Glyph] = []
    taken = np.zeros((size, size), dtype=bool)
    for number in range(int(rng.integers(3, 7))):
        digit = int(rng.choice(wanted)) if number % 2 == 0 else int(rng.integers(10))
        scan = pools[digit][rng.integers(len(pools[digit]))]
        stroke = _stroke(scan, int(size * rng.uniform(0.25, 0.45)), rng.uniform(-15, 15))
        height, width = stroke.shape
        for _ in range(40):
            y, x = rng.integers(1, size - height), rng.integers(1, size - width)
            around = taken[max(y - 3, 0) : y + height + 3, max(x - 3, 0) : x + width + 3]
            if not around.any():
                mask = np.zeros((size, size))
                mask[y : y + height, x : x + width] = stroke
                taken[y : y + height, x : x + width] = True
                glyphs.append(Glyph(digit, mask, (int(x), int(y), width, height)))
                break
    return glyphs


def make_split(
    name: str, split: str, count: int, size: int, seed: int, folder: Path, tick: Callable[[], None]
) -> None:
    """Write the images and the COCO file of one split of one domain.

    Args:
        name: Domain.
        split: ``train`` or ``val``.
        count: Number of images.
        size: Their side in pixels.
        seed: Each image depends on (seed, domain, split, its number) and nothing else.
        folder: The domain's folder.
        tick: Called after each image.
    """
    domain = DOMAINS[name]
    pools = load_glyphs(split)
    wanted = tuple(digit for digits in domain.classes.values() for digit in digits)
    category_ids = {class_name: i for i, class_name in enumerate(domain.classes, start=1)}
    (folder / split).mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(count):
        rng = np.random.default_rng([seed, zlib.crc32(f'{name}/{split}'.encode()), number])
        glyphs = place_glyphs(pools, wanted, size, rng)
        pixels = np.clip(np.rint(domain.draw(glyphs, size, rng)), 0, 255).astype(np.uint8)
        file_name = f'{number:04d}.png'
        Image.fromarray(pixels).save(folder / split / file_name)
        images.append({'id': number, 'file_name': file_name, 'width': size, 'height': size})
        for glyph in glyphs:
            class_name = domain.class_of(glyph.digit)
            if class_name is not None:
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': number,
                        'category_id': category_ids[class_name],
                        'bbox': list(glyph.box),
                        'area': glyph.box[2] * glyph.box[3],
                        'iscrowd': 0,
                    }
                )
        tick()
    categories = [{'id': i, 'name': class_name} for class_name, i in category_ids.items()]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / f'{split}.json').write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------
# The whole
# --------------------------------------------------------------------------------------------------


def describe(images: int, val_images: int, size: int, seed: int) -> dict:
    """What a call makes, as ``domains.json`` states it: arguments, sizes, classes."""
    return {
        'version': VERSION,
        'seed': seed,
        'size': size,
        'domains': {
            name: {
                'train': max(1, round(images * domain.share)),
                'val': val_images,
                'classes': list(domain.classes),
            }
            for name, domain in DOMAINS.items()
        },
    }


def _is_complete(out: Path, content: dict) -> bool:
    """Whether ``out`` holds exactly this content already."""
    try:
        found = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return found == content and all(
        (out / name / f'{split}.json').is_file()
        and sum(1 for _ in (out / name / split).glob('*.png')) == made[split]
        for name, made in content['domains'].items()
        for split in ('train', 'val')
    )


def make_domains(
    out: str | os.PathLike,
    *,
    images: int = 240,
    val_images: int = 40,
    size: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> bool:
    """Make all domains, or do nothing where they are complete.

    The folder appears under its name only when everything in it is written.

    Args:
        out: Folder to make.
        images: Training images of the largest domain; the others have their share of it.
        val_images: Validation images of every domain.
        size: Side of the images in pixels.
        seed: Same seed, same bytes.
        overwrite: Replace a folder that this tool made with other arguments.
        progress: Show a progress bar.

    Returns:
        Whether anything was made.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``out`` holds something else and may not be replaced.
    """
    for name, value, least in (
        ('images', images, 8),
        ('val_images', val_images, 1),
        ('size', size, 64),
        ('seed', seed, 0),
    ):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')
    out = Path(out)
    content = describe(images, val_images, size, seed)
    if _is_complete(out, content):
        return False
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / MANIFEST).is_file():
            raise FileExistsError(
                f'{out} exists and was not made by this tool: choose another --out'
            )
        if not overwrite:
            raise FileExistsError(
                f'{out} holds domains made with other arguments (see {out / MANIFEST}), or is '
                'incomplete: give --overwrite to replace it'
            )

    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        total = sum(made['train'] + made['val'] for made in content['domains'].values())
        with _bar(total, progress) as tick:
            for name, made in content['domains'].items():
                for split in ('train', 'val'):
                    make_split(name, split, made[split], size, seed, part / name, tick)
        (part / MANIFEST).write_text(json.dumps(content, indent=2) + '\n')
        part.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


class _bar:
    """Progress bar over ``total`` images; the context's value is called once per image."""

    def __init__(self, total: int, shown: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            'drawing', BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not shown
        )
        self._task = self._progress.add_task('drawing', total=total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', required=True, help='folder to make')
    parser.add_argument('--seed', type=int, default=0, help='same seed, same bytes (default: 0)')
    parser.add_argument(
        '--images',
        type=int,
        default=240,
        help='training images of the largest domain (default: 240)',
    )
    parser.add_argument(
        '--val-images', type=int, default=40, help='validation images per domain (default: 40)'
    )
    parser.add_argument('--size', type=int, default=128, help='image side in pixels (default: 128)')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace domains made with other arguments'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        made = make_domains(
            args.out,
            images=args.images,
            val_images=args.val_images,
            size=args.size,
            seed=args.seed,
            overwrite=args.overwrite,
            progress=True,
        )
    except (ValueError, FileExistsError) as error:
        print(f'make_domains: {error}', file=sys.stderr)
        return 2
    content = describe(args.images, args.val_images, args.size, args.seed)
    print(f'{args.out}: ' + ('made' if made else 'complete already, nothing to do'))
    for name, of_domain in content['domains'].items():
        classes = ', '.join(of_domain['classes'])
        print(f'  {name:<10}{of_domain["train"]:>5} train {of_domain["val"]:>4} val   {classes}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

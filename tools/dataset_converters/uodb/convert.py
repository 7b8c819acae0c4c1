"""Convert the owners' archives of the UODB benchmark to COCO json, one command per dataset::

    python tools/dataset_converters/uodb/convert.py kitti --src ~/kitti --out data/uodb
    python tools/dataset_converters/uodb/convert.py kitti --out data/uodb --check
    python tools/dataset_converters/uodb/convert.py all --out data/uodb --check

``docs/uodb.md`` says where each archive comes from. Images are hard links into the archive unless
``--link`` says otherwise. The same command goes on after an interruption. Exit 2 and one line
where something is missing; ``--check`` exits 1 and lists what is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 3)]  # to run from a clone

from mmdet_moe.planning.checks import short  # noqa: E402
from uodb import coco, deeplesion, dota, kitchen, kitti, lisa, voc, widerface  # noqa: E402
from uodb.check import check_domain  # noqa: E402
from uodb.layout import check_reading, digest, surplus, write_domain  # noqa: E402

CONVERTERS = {
    'kitti': kitti.CONVERTER,
    'voc': voc.VOC,
    'widerface': widerface.CONVERTER,
    'lisa': lisa.CONVERTER,
    'kitchen': kitchen.CONVERTER,
    'coco': coco.CONVERTER,
    'dota': dota.CONVERTER,
    'deeplesion': deeplesion.CONVERTER,
    'comic': voc.COMIC,
    'clipart': voc.CLIPART,
    'watercolor': voc.WATERCOLOR,
}
#: Arguments that do not change the result, or are in the reading's split rule.
COMMON = (
    *('domain', 'src', 'out', 'link', 'partial', 'overwrite', 'check', 'quiet'),
    *('split_file', 'seed'),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='domain', required=True, metavar='DATASET')
    for name, converter in CONVERTERS.items():
        command = commands.add_parser(name, help=converter.summary, description=converter.summary)
        _add_out(command)
        command.add_argument('--src', type=Path, help="the owner's archive, unpacked")
        command.add_argument(
            '--link',
            choices=('hard', 'symbolic', 'copy'),
            default='hard',
            help='how images get there (default: hard)',
        )
        command.add_argument(
            '--partial', action='store_true', help='convert an incomplete archive all the same'
        )
        command.add_argument(
            '--overwrite', action='store_true', help='remove the earlier result first'
        )
        command.add_argument('--quiet', action='store_true', help='no progress bar')
        converter.add_arguments(command)
    _add_out(commands.add_parser('all', help='every dataset that is there, with --check'))
    args = parser.parse_args(argv)
    if args.domain == 'all' and not args.check:
        parser.error('all: datasets are converted one by one; only --check takes all')
    if not args.check and args.src is None:
        parser.error(f'{args.domain}: --src is needed')
    return args


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--out', type=Path, default=Path('data/uodb'), help='folder of all domains (data/uodb)'
    )
    parser.add_argument('--check', action='store_true', help='only look for defects in --out')


def options_of(args: argparse.Namespace) -> dict:
    """What the result depends on, besides the archive and the split; files by their content."""
    return {
        key: digest(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in COMMON
    }


def check(args: argparse.Namespace) -> int:
    """Prints the defects; the exit code."""
    names = [args.domain] if args.domain != 'all' else list(CONVERTERS)
    there = [name for name in names if (args.out / name).is_dir()]
    bad = 0
    for name in names:
        if name not in there:
            print(f'{name}: not converted ({args.out / name} is not there)')
            bad += 1
            continue
        defects = check_domain(args.out, name)
        print(f'{name}: ' + ('in order' if not defects else f'{len(defects)} kinds of defects'))
        for defect in defects:
            print(f'  {defect}')
        bad += bool(defects)
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.check:
            return check(args)
        if not args.src.is_dir():
            raise ValueError(f'--src {args.src} is not a folder')
        reading = CONVERTERS[args.domain].read(args)
        report = write_domain(
            args.domain,
            reading,
            args.out,
            options=options_of(args),
            link=args.link,
            partial=args.partial,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    except (ValueError, OSError) as error:
        print(f'convert: {error}', file=sys.stderr)
        return 2
    for note in [*reading.notes, *check_reading(reading), *surplus(reading)]:
        print(f'{args.domain}: {note}')
    for split, made in report.items():
        print(
            f'{args.domain} {split}: {made["images"]} images, {made["boxes"]} boxes '
            f'({made["ignored"]} of them ignored)'
        )
        for reason, count in made['changed'].items():
            print(f'  {count} boxes {reason}')
        if made['without']:
            print(f'  no box of class {", ".join(made["without"])}')
        if made['turned']:
            print(
                f'  {len(made["turned"])} images carry an EXIF rotation; the boxes are for the '
                "image as it is stored: load them with color_type='color_ignore_orientation': "
                f'{short(made["turned"], 3)}'
            )
    return 0


if __name__ == '__main__':
    sys.exit(main())

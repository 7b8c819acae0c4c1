"""UODB's converters, on miniatures of the owners' archives: real names, headers and odd cases."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools/dataset_converters'))

from uodb import convert, deeplesion, dota, kitti, layout, lisa  # noqa: E402


def picture(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (width, height), (width % 256, height % 256, 90)).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --------------------------------------------------------------------------------------------------
# Miniatures: folder -> the arguments besides --src
# --------------------------------------------------------------------------------------------------


def make_kitti(src: Path) -> list:
    rest = '1.5 1.6 3.9 1.0 1.7 20.0 0.0'
    labels = {
        '000000': [
            f'Car 0.00 0 1.85 10.00 12.50 30.25 25.00 {rest}',
            f'Van 0.10 1 1.85 40.00 12.00 60.00 25.00 {rest}',
            f'Person_sitting 0.00 2 0.1 70.00 10.00 75.00 20.00 {rest}',
            f'Misc 0.00 0 0.1 5.00 5.00 9.00 9.00 {rest}',
            'DontCare -1 -1 -10 80.00 10.00 90.00 20.00 -1 -1 -1 -1000 -1000 -1000 -10',
        ],
        '000001': [
            f'Pedestrian 0.00 0 0.1 -3.00 2.00 7.00 30.00 {rest}',  # 3 px left of the image
            f'Cyclist 0.00 0 0.1 95.00 2.00 95.60 30.00 {rest}',  # 0.6 px wide
            f'Tram 0.00 0 0.1 1.00 1.00 50.00 30.00 {rest}',
        ],
        '000002': [],
    }
    for name, lines in labels.items():
        write(src / f'training/label_2/{name}.txt', ''.join(f'{line}\n' for line in lines))
        picture(src / f'training/image_2/{name}.png', 100, 32)
    picture(src / 'training/image_2/000003.png', 100, 32)  # no label
    write(src / 'ImageSets/train.txt', '000000\n000002\n')
    write(src / 'ImageSets/val.txt', '000001\n')
    return []


def xml(objects: list[tuple], width: int, height: int) -> str:
    """``objects``: name, xmin, ymin, xmax, ymax, difficult."""
    body = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>'
        f'<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>'
        for name, x1, y1, x2, y2, difficult in objects
    )
    size = f'<size><width>{width}</width><height>{height}</height><depth>3</depth></size>'
    return f'<annotation>{size}{body}</annotation>'


def make_voc_folder(root: Path, lists: dict[str, dict[str, list[tuple]]]) -> None:
    """``lists``: subset -> image -> objects; images are 50 x 40."""
    for subset, images in lists.items():
        write(root / f'ImageSets/Main/{subset}.txt', ''.join(f'{name}\n' for name in images))
        for name, objects in images.items():
            write(root / f'Annotations/{name}.xml', xml(objects, 50, 40))
            picture(root / f'JPEGImages/{name}.jpg', 50, 40)


def make_voc(src: Path) -> list:
    dog, hard = ('dog', 1, 1, 50, 40, 0), ('chair', 11, 6, 20, 15, 1)
    man, far = ('person', 3, 4, 7, 9, 0), ('person', 31, 6, 40, 15, 1)
    make_voc_folder(
        src / 'VOCdevkit/VOC2007',
        {
            'trainval': {'000005': [dog, hard]},
            'test': {'000001': [hard, man, far]},
        },
    )
    make_voc_folder(
        src / 'VOCdevkit/VOC2012',
        {'trainval': {'2008_000002': [('tvmonitor', 2.9, 3, 12, 13, 0), ('head', 5, 5, 9, 9, 0)]}},
    )
    return []


def make_art(name: str) -> Callable[[Path], list]:
    def make(src: Path) -> list:
        make_voc_folder(
            src / name,
            {
                'train': {'1': [('person', 6, 6, 20, 20, 0)]},
                'test': {'2': [('cat', 1, 1, 9, 9, 0)], '3': []},
                'extra': {'4': [('person', 1, 1, 1, 1, 0)]},
            },
        )
        return []

    return make


WIDER_LISTS = 'wider_face_split'


def make_widerface(src: Path) -> list:
    parade, none = '0--Parade/0_Parade_marchingband_1_849', '0--Parade/0_Parade_Parade_0_452'
    train = [
        f'{parade}.jpg\n3\n',
        '10 12 20 24 0 0 0 0 0 0 \n',
        '30 2 9 9 2 0 0 1 1 0 \n',  # invalid
        '5 5 0 7 2 0 0 0 2 0 \n',  # no width
        f'{none}.jpg\n0\n0 0 0 0 0 0 0 0 0 0 \n',
        '1--Handshaking/1_Handshaking_Handshaking_1_1.jpg\n1\n1 1 8 8 0 0 0 0 0 0 \n',
    ]
    write(src / f'{WIDER_LISTS}/wider_face_train_bbx_gt.txt', ''.join(train))
    val = f'{none}_v.jpg\n0\n{parade}_v.jpg\n1\n50 30 20 20 0 0 0 0 0 0 \n'  # and no row of zeros
    write(src / f'{WIDER_LISTS}/wider_face_val_bbx_gt.txt', val)
    for name in (parade, none, '1--Handshaking/1_Handshaking_Handshaking_1_1'):
        picture(src / f'WIDER_train/images/{name}.jpg', 64, 48)
    for name in (parade, none):
        picture(src / f'WIDER_val/images/{name}_v.jpg', 64, 48)
    return []


LISA_HEADER = (
    'Filename;Annotation tag;Upper left corner X;Upper left corner Y;Lower right corner X;'
    'Lower right corner Y;Occluded,On another road;Origin file;Origin frame number;Origin track;'
    'Origin track frame number'
)


LISA_FOLDER = 'aiua120214-0/frameAnnotations-DataLog02142012_external_camera.avi_annotations'


def make_lisa(src: Path) -> list:
    rows = []
    for track in range(5):
        for frame in range(2):
            name = f'{LISA_FOLDER}/stop_133054{track}.avi_image{frame}.png'
            origin = f'aiua120214-0/DataLog02142012_external_camera.avi;2667;stop_133054{track}.avi'
            rows.append(f'{name};stop;10;4;20;14;0,1;{origin};{frame}')
            if track == 0 and frame == 0:
                rows.append(f'{name};speedLimitUrdbl;30;4;34;9;1,0;{origin};{frame}')
                rows.append(f'{name};noLeftTurn;35;4;39;9;0,0;{origin};{frame}')
                rows.append(f'{name};stopAhead;1;4;5;9;0,0;{origin};{frame}')
                rows.append(f'{name};keepRight;1;14;5;19;0,0;{origin};{frame}')
            picture(src / name, 40, 30)
    write(src / 'allAnnotations.csv', '\n'.join([LISA_HEADER, *rows]) + '\n')
    picture(src / 'negatives/nosign0.png', 40, 30)
    return []


def make_kitchen(src: Path) -> list:
    for scene in (1, 2, 3):
        folder = src / f'gmu_scene_{scene:03d}'
        objects = [('red_bull', 11, 11, 20, 30, 0), ('coca_cola_glass_bottle', 1, 1, 4, 9, 0)]
        for frame in (1, 2):
            write(folder / f'Annotations/rgb_{frame}.xml', xml(objects[: 3 - frame], 60, 40))
            picture(folder / f'Images/rgb_{frame}.png', 60, 40)
        picture(folder / 'Images/rgb_3.png', 60, 40)
    return ['--test-scenes', '2']


def make_coco(src: Path) -> list:
    def image(number: int) -> dict:
        return {'id': number, 'file_name': f'COCO_val2014_{number:012d}.jpg'}

    def annotation(number: int, of: int, category: int, bbox: list, **more) -> dict:
        area = more.pop('area', 7.5)
        common = {'id': number, 'image_id': of, 'category_id': category, 'bbox': bbox, 'area': area}
        return {**common, 'iscrowd': 0, 'segmentation': [], **more}

    content = {
        'images': [image(n) for n in (42, 73, 74)],
        'annotations': [
            annotation(1001, 42, 18, [10.5, 5, 20, 10], area=77.25),
            annotation(900100, 42, 1, [0, 0, 50, 40], iscrowd=1, area=812.0),
            annotation(1002, 73, 90, [1, 2, 3, 4]),
            annotation(1003, 73, 90, [1, 2, 20, 5], area=0.0),
        ],
        'categories': [
            {'id': 1, 'name': 'person'},
            {'id': 18, 'name': 'dog'},
            {'id': 90, 'name': 'toothbrush'},
        ],
    }
    write(src / 'annotations/instances_val2014.json', json.dumps(content))
    val2017 = {'images': [{'id': 73, 'file_name': '000000000073.jpg'}], 'annotations': []}
    write(src / 'annotations/instances_val2017.json', json.dumps(val2017))
    picture(src / 'val2014/COCO_val2014_000000000042.jpg', 50, 40)
    picture(src / 'train2017/000000000074.jpg', 50, 40)
    picture(src / 'val2017/000000000073.jpg', 50, 40)
    return []


def make_dota(src: Path) -> list:
    head = 'imagesource:GoogleEarth\ngsd:0.146343590398\n'
    lines = [
        '10.0 10.0 30.0 5.0 35.0 20.0 15.0 25.0 plane 0',
        '40 40 60 40 60 50 40 50 ship 1',  # difficult
        '50 10 70 10 70 20 50 20 harbor 0',
        '1 1 3 1 3 3 1 3 container-crane 0',
        '80 50 80 50 80 50 80 50 plane 0',  # a point, in the second tile
        '120 10 130 10 130 20 120 20 ship 0',  # right of the image
        '45 -5 53 -5 53 30 45 30 bridge 0',  # 5 px above it, in both tiles
        '45 50 53 50 53 50.4 45 50.4 bridge 0',  # 0.4 px high, in both tiles
    ]
    write(src / 'train/labelTxt/P0000.txt', head + '\n'.join(lines) + '\n')
    picture(src / 'train/images/P0000.png', 100, 60)
    write(src / 'val/labelTxt/P0003.txt', head)
    picture(src / 'val/images/P0003.png', 20, 20)
    return ['--tile', '64', '--overlap', '16']


DEEPLESION_HEADER = (
    'File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,'
    'Bounding_boxes,Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,'
    'Possibly_noisy,Slice_range,Spacing_mm_px_,Image_size,DICOM_windows,Patient_gender,'
    'Patient_age,Train_Val_Test'
)


def make_deeplesion(src: Path) -> list:
    def row(name: str, box: str, noisy: int, window: str, split: int) -> str:
        key = int(name.split('_')[-1][:-4])
        start = f'{name},1,1,1,{key},"1.5, 2, 3, 4, 5, 6, 7, 8","{box}","30, 20","0.4, 0.5, 0.6",3'
        return f'{start},{noisy},"103, 115","0.48, 0.48, 5","512, 512","{window}",F,62,{split}'

    rows = [
        row('000001_01_01_109.png', '2.5, 3, 8.25, 9', 0, '-175, 275', 3),
        row('000001_01_01_109.png', '10, 10, 14, 15', 1, '-175, 275', 3),
        row('000002_01_01_012.png', '1, 1, 6, 6', 0, '-1350, 150', 1),
        row('000003_01_01_020.png', '1, 1, 6, 7', 0, '-1350, 150', 2),
    ]
    write(src / 'DL_info.csv', '\n'.join([DEEPLESION_HEADER, *rows]) + '\n')
    units = {'000001_01_01/109': 50, '000001_01_01/108': -1024, '000002_01_01/012': 3071}
    units['000003_01_01/020'] = 40
    for name, value in units.items():
        path = src / f'Images_png/{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), value + 32768, dtype=np.uint16)).save(path)
    return []


MINIATURES = {
    'kitti': make_kitti,
    'voc': make_voc,
    'widerface': make_widerface,
    'lisa': make_lisa,
    'kitchen': make_kitchen,
    'coco': make_coco,
    'dota': make_dota,
    'deeplesion': make_deeplesion,
    'comic': make_art('comic'),
    'clipart': make_art('clipart'),
    'watercolor': make_art('watercolor'),
}


def run(domain: str, src: Path, out: Path, *more) -> int:
    arguments = [domain, '--src', src, '--out', out, '--quiet', *more]
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """All miniatures, converted: the result, and the archives."""
    root = tmp_path_factory.mktemp('uodb')
    for domain, make in MINIATURES.items():
        more = make(root / 'owners' / domain)
        assert run(domain, root / 'owners' / domain, root / 'uodb', '--partial', *more) == 0
    return root / 'uodb', {domain: root / 'owners' / domain for domain in MINIATURES}


def load(out: Path, domain: str, split: str) -> dict:
    return json.loads((out / domain / f'{split}.json').read_text())


def boxes(out: Path, domain: str, split: str) -> dict[str, list[tuple]]:
    """File name -> class, box, iscrowd."""
    content = load(out, domain, split)
    names = {category['id']: category['name'] for category in content['categories']}
    found: dict[int, list[tuple]] = {image['id']: [] for image in content['images']}
    for a in content['annotations']:
        found[a['image_id']].append((names[a['category_id']], a['bbox'], a['iscrowd']))
    return {image['file_name']: found[image['id']] for image in content['images']}


def changed(out: Path, domain: str, split: str) -> dict[str, int]:
    return json.loads((out / domain / 'conversion.json').read_text())['made'][split]['changed']


# --------------------------------------------------------------------------------------------------
# What becomes of each owner's annotations
# --------------------------------------------------------------------------------------------------


def test_kitti_ignores_what_kitti_ignores(made):
    out, _ = made
    assert boxes(out, 'kitti', 'train') == {
        '000000.png': [
            ('car', [10, 12.5, 20.25, 12.5], 0),
            ('car', [40, 12, 20, 13], 1),  # a van
            ('pedestrian', [70, 10, 5, 10], 1),  # sits
            ('car', [80, 10, 10, 10], 1),  # DontCare: for every class
            ('pedestrian', [80, 10, 10, 10], 1),
            ('cyclist', [80, 10, 10, 10], 1),
        ],
        '000002.png': [],
    }
    assert changed(out, 'kitti', 'train') == {"left out: no class 'Misc'": 1}
    # From -3 to 7 is 10 px wide, 7 of them in the image.
    assert boxes(out, 'kitti', 'test') == {'000001.png': [('pedestrian', [0, 2, 7, 28], 0)]}
    assert changed(out, 'kitti', 'test') == {
        'clipped': 1,
        "left out: no class 'Tram'": 1,
        'left out: smaller than 1 px': 1,
    }


def test_voc_counts_pixels_from_1_and_ignores_difficult_objects(made):
    out, _ = made
    # Pixels 1 to 50 of 50: the whole image, which begins at 0.
    assert boxes(out, 'voc', 'train') == {
        '000005.jpg': [('dog', [0, 0, 50, 40], 0), ('chair', [10, 5, 10, 10], 1)],
        '2008_000002.jpg': [('tvmonitor', [1, 2, 11, 11], 0)],
    }
    assert boxes(out, 'voc', 'test') == {
        '000001.jpg': [
            ('chair', [10, 5, 10, 10], 1),
            ('person', [2, 3, 5, 6], 0),
            ('person', [30, 5, 10, 10], 1),
        ]
    }
    assert changed(out, 'voc', 'train') == {"left out: no class 'head'": 1}
    # mmdet would drop an annotation with "ignore", and count a detection of it as wrong.
    annotation = load(out, 'voc', 'test')['annotations'][0]
    assert annotation['difficult'] == 1 and 'ignore' not in annotation


@pytest.mark.parametrize('domain', ['comic', 'clipart', 'watercolor'])
def test_art_sets_leave_out_the_images_without_boxes_of_their_own(made, domain):
    out, _ = made
    assert boxes(out, domain, 'train') == {'1.jpg': [('person', [5, 5, 15, 15], 0)]}
    assert boxes(out, domain, 'test') == {'2.jpg': [('cat', [0, 0, 9, 9], 0)], '3.jpg': []}


def test_widerface_reads_images_without_faces_and_ignores_invalid_ones(made):
    out, _ = made
    assert boxes(out, 'widerface', 'train') == {
        '0--Parade/0_Parade_marchingband_1_849.jpg': [
            ('face', [10, 12, 20, 24], 0),
            ('face', [30, 2, 9, 9], 1),
        ],
        '0--Parade/0_Parade_Parade_0_452.jpg': [],
        '1--Handshaking/1_Handshaking_Handshaking_1_1.jpg': [('face', [1, 1, 8, 8], 0)],
    }
    assert changed(out, 'widerface', 'train') == {'left out: empty': 1}
    # 50 + 20 reaches 6 px out of 64, 30 + 20 reaches 2 px out of 48.
    assert boxes(out, 'widerface', 'test') == {
        '0--Parade/0_Parade_Parade_0_452_v.jpg': [],
        '0--Parade/0_Parade_marchingband_1_849_v.jpg': [('face', [50, 30, 14, 18], 0)],
    }


def test_lisa_has_four_superclasses_and_no_track_in_both_halves(made):
    out, _ = made
    both = {**boxes(out, 'lisa', 'train'), **boxes(out, 'lisa', 'test')}
    assert len(both) == 10
    rich = next(value for name, value in both.items() if name.endswith('1330540.avi_image0.png'))
    assert rich == [
        ('stop', [10, 4, 10, 10], 0),
        ('speedLimit', [30, 4, 4, 5], 0),
        ('noTurn', [35, 4, 4, 5], 0),
        ('warning', [1, 4, 4, 5], 0),
    ]
    left_out = {**changed(out, 'lisa', 'train'), **changed(out, 'lisa', 'test')}
    assert left_out == {"left out: no class 'keepRight'": 1}
    tracks = {
        split: {name.split('/')[-1].split('.avi')[0] for name in boxes(out, 'lisa', split)}
        for split in ('train', 'test')
    }
    # A fifth of ten frames is two: one track.
    assert len(tracks['train']) == 4 and len(tracks['test']) == 1
    assert not tracks['train'] & tracks['test']
    annotation = load(out, 'lisa', 'train')['annotations'][0]
    assert (annotation['tag'], annotation['occluded'], annotation['on_another_road']) == (
        *('stop', 0, 1),
    )


def test_lisa_takes_other_superclasses_from_a_file(made, tmp_path):
    _, owners = made
    table = write(tmp_path / 'categories.txt', 'stop: stop,keepRight\nwarning: stopAhead\n')
    assert run('lisa', owners['lisa'], tmp_path, '--partial', '--superclasses', table) == 0
    found = [
        box[0]
        for split in ('train', 'test')
        for rows in boxes(tmp_path, 'lisa', split).values()
        for box in rows
    ]
    assert (found.count('stop'), found.count('warning'), len(found)) == (11, 1, 12)


def test_kitchen_tests_on_whole_scenes(made):
    out, _ = made
    bottle, can = ('coca_cola_glass_bottle', [0, 0, 4, 9], 0), ('red_bull', [10, 10, 10, 20], 0)
    assert boxes(out, 'kitchen', 'test') == {
        'gmu_scene_002/rgb_1.png': [can, bottle],
        'gmu_scene_002/rgb_2.png': [can],
    }
    assert [name.split('/')[0] for name in boxes(out, 'kitchen', 'train')] == [
        *('gmu_scene_001', 'gmu_scene_001', 'gmu_scene_003', 'gmu_scene_003')
    ]


def test_coco_minival_is_val2017_and_crowds_and_areas_stay(made):
    out, _ = made
    assert boxes(out, 'coco', 'train') == {
        'COCO_val2014_000000000042.jpg': [
            ('dog', [10.5, 5, 20, 10], 0),
            ('person', [0, 0, 50, 40], 1),
        ],
        '000000000074.jpg': [],
    }
    assert boxes(out, 'coco', 'test') == {'000000000073.jpg': [('toothbrush', [1, 2, 3, 4], 0)]}
    assert changed(out, 'coco', 'test') == {'left out: its mask has no area': 1}
    content = load(out, 'coco', 'train')
    assert [image['id'] for image in content['images']] == [42, 74]  # COCO's own
    assert [a['area'] for a in content['annotations']] == [77.25, 812.0]  # masks, not boxes


def test_dota_boxes_are_upright_and_cut_by_tiles(made):
    out, owners = made
    # 100 wide, tiles of 64, step 48: from 0 and from 36, which ends with the image. 60 high: one.
    assert dota.starts(100, 64, 16) == [0, 36] and dota.starts(60, 64, 16) == [0]
    assert dota.starts(64, 64, 16) == [0] and dota.starts(160, 64, 16) == [0, 48, 96]
    assert boxes(out, 'dota', 'train') == {
        'P0000_0_0.png': [
            ('plane', [10, 5, 25, 20], 0),
            ('ship', [40, 40, 20, 10], 1),
            ('harbor', [50, 10, 14, 10], 0),  # 50 to 64 of 50 to 70: 14 / 20 = 0.7 is enough
            ('bridge', [45, 0, 8, 30], 0),
        ],
        'P0000_36_0.png': [
            ('ship', [4, 40, 20, 10], 1),
            ('harbor', [14, 10, 20, 10], 0),
            ('bridge', [9, 0, 8, 30], 0),
        ],
    }
    assert changed(out, 'dota', 'train') == {  # objects, however many tiles they are in
        'clipped': 1,
        "left out: no class 'container-crane'": 1,
        'left out: empty': 1,
        'left out: outside the image': 1,
        'left out: smaller than 1 px': 1,
    }
    assert boxes(out, 'dota', 'test') == {'P0003_0_0.png': []}
    tile = np.asarray(Image.open(out / 'dota/train/P0000_36_0.png'))
    whole = np.asarray(Image.open(owners['dota'] / 'train/images/P0000.png'))
    assert (tile == whole[:, 36:100]).all()
    # With a share of 0.75 to ask for, the harbor of the first tile is ignored there.
    (harbor,) = dota.cut_boxes([layout.Box('harbor', (50, 10, 70, 20))], (0, 0, 64, 60), 0.75)
    assert harbor.ignore and harbor.xyxy == (50, 10, 64, 20)


def test_deeplesion_windows_hounsfield_units_and_ignores_noisy_marks(made, tmp_path):
    out, owners = made
    assert boxes(out, 'deeplesion', 'test') == {
        '000001_01_01_109.png': [
            ('lesion', [2.5, 3, 5.75, 6], 0),
            ('lesion', [10, 10, 4, 5], 1),
        ]
    }
    assert list(boxes(out, 'deeplesion', 'train')) == [
        *('000002_01_01_012.png', '000003_01_01_020.png')  # the owner's training and validation
    ]
    # 50 of -1024 to 3071 is 1074 / 4095 of 255: 66.88.
    pixels = np.asarray(Image.open(out / 'deeplesion/test/000001_01_01_109.png'))
    assert pixels.shape == (16, 16) and (pixels == 67).all()
    # The radiologist's window, -175 to 275: 225 / 450 of 255, and black below it.
    slices = np.array([[50, -175, -1024, 275, 3000]], dtype=np.int64) + 32768
    levels = deeplesion.window_slice(slices, (-175, 275))
    assert levels.tolist() == [[128, 0, 0, 255, 255]]

    more = ['--partial', '--window', 'dicom', '--neighbours']
    assert run('deeplesion', owners['deeplesion'], tmp_path, *more) == 0
    pixels = np.asarray(Image.open(tmp_path / 'deeplesion/test/000001_01_01_109.png'))
    # Below: -1024, black. Above: there is none, so the key slice stands in.
    assert pixels[0, 0].tolist() == [0, 128, 128]
    pixels = np.asarray(Image.open(tmp_path / 'deeplesion/train/000002_01_01_012.png'))
    assert (pixels == 255).all()  # 3071 is above -1350 to 150
    assert (
        run('deeplesion', owners['deeplesion'], tmp_path / 'x', '--partial', '--window', -50, 50)
        == 0
    )
    pixels = np.asarray(Image.open(tmp_path / 'x/deeplesion/train/000003_01_01_020.png'))
    assert (pixels == 230).all()  # 40 of -50 to 50 is 90 / 100 of 255: 229.5, to the even 230


# --------------------------------------------------------------------------------------------------
# The whole: the config, completeness, interruption, checks
# --------------------------------------------------------------------------------------------------


def read_config(out: Path, monkeypatch):
    from mmengine.config import Config

    monkeypatch.setenv('UODB', f'{out}/')
    return Config.fromfile(str(layout.CONFIG), format_python_code=False)


def test_images_that_readers_may_turn_are_named_and_not_turned(
    tmp_path, capsys, monkeypatch, mmdet_moe_scope
):
    from mmdet_moe.registry import TRANSFORMS

    src = tmp_path / 'owner'
    make_widerface(src)
    image = Image.new('RGB', (64, 48))
    exif = image.getexif()
    exif[274] = 6  # a quarter turn
    image.save(src / 'WIDER_val/images/0--Parade/0_Parade_marchingband_1_849_v.jpg', exif=exif)
    assert run('widerface', src, tmp_path, '--partial') == 0
    report = capsys.readouterr().out
    assert '1 images carry an EXIF rotation' in report and "'color_ignore_orientation'" in report
    (size,) = {(i['width'], i['height']) for i in load(tmp_path, 'widerface', 'test')['images']}
    assert size == (64, 48)  # that which the boxes are for
    loading = read_config(tmp_path, monkeypatch).test_pipelines['widerface'][0]
    path = next(tmp_path.rglob('test/**/0_Parade_marchingband_1_849_v.jpg'))
    assert TRANSFORMS.build(loading)(dict(img_path=str(path)))['img'].shape == (48, 64, 3)


def test_the_result_is_what_the_config_reads(made, monkeypatch, mmdet_moe_scope):
    from mmdet_moe.registry import DATASETS

    out, _ = made
    cfg = read_config(out, monkeypatch)
    assert list(cfg.label_space.domains) == list(convert.CONVERTERS)
    for split, domains in (('train', cfg.train_domains), ('test', cfg.test_domains)):
        dataset = DATASETS.build(
            {
                'type': 'MultiDomainDataset',
                'label_space': cfg.label_space,
                'domains': {
                    # The config's filters may leave out images; all are to be seen here.
                    name: {**domain, 'filter_cfg': None, 'serialize_data': False}
                    for name, domain in domains.items()
                },
                'pipeline': [],
            }
        )
        sizes = {name: len(boxes(out, name, split)) for name in cfg.label_space.domains}
        assert dataset.domain_sizes == sizes
        for index in range(len(dataset)):
            assert Path(dataset.get_data_info(index)['img_path']).is_file()
    # The van, the sitting person and DontCare of KITTI's first training image.
    metainfo = {'classes': cfg.label_space.domains.kitti}
    alone = DATASETS.build({**cfg.train_domains['kitti'], 'metainfo': metainfo, 'lazy_init': True})
    first, _ = alone.load_data_list()
    assert [i['ignore_flag'] for i in first['instances']] == [0, 1, 1, 1, 1, 1]
    assert [i['bbox_label'] for i in first['instances']] == [0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize('metric', ['CocoMetric', 'VOCMetric'])
def test_a_difficult_object_is_neither_missed_nor_a_mistake(
    made, monkeypatch, mmdet_moe_scope, metric
):
    """VOC's test image has a person, and a chair and a person that are difficult."""
    import torch
    from mmdet.registry import DATASETS, METRICS
    from mmengine.structures import InstanceData

    out, _ = made
    cfg = read_config(out, monkeypatch)
    classes = cfg.label_space.domains.voc
    dataset = DATASETS.build(
        {
            **cfg.test_domains.voc,
            'type': 'mmdet.CocoDataset',
            'metainfo': {'classes': classes},
            'pipeline': [
                {'type': 'mmdet.LoadImageFromFile'},
                {'type': 'mmdet.LoadAnnotations', 'with_bbox': True},
                {'type': 'mmdet.PackDetInputs', 'meta_keys': ('img_id', 'ori_shape')},
            ],
        }
    )
    sample = dataset[0]['data_samples']

    def score(found: list[tuple[str, list]]) -> float:
        sample.pred_instances = InstanceData(
            bboxes=torch.tensor([box for _, box in found], dtype=torch.float32),
            labels=torch.tensor([classes.index(name) for name, _ in found]),
            scores=torch.linspace(0.9, 0.5, len(found)),
        )
        more = {'ann_file': str(out / 'voc/test.json')} if metric == 'CocoMetric' else {}
        judge = METRICS.build({'type': f'mmdet.{metric}', **more})
        judge.dataset_meta = dataset.metainfo
        judge.process({}, [sample.to_dict()])
        values = judge.evaluate(1)
        return values.get('coco/bbox_mAP_50', values.get('pascal_voc/mAP'))

    # There is no chair to find, so the mean over classes is that of persons.
    person, difficult = ('person', [2, 3, 7, 9]), ('person', [30, 5, 40, 15])
    assert score([person]) == pytest.approx(1, abs=1e-3)
    assert score([difficult, person]) == pytest.approx(1, abs=1e-3)
    # A person seen where there is none, and more surely, halves the precision.
    assert score([('person', [30, 20, 40, 35]), person]) == pytest.approx(0.5, abs=1e-2)


def test_what_converters_call_a_class_is_one_of_the_config():
    from mmdet.datasets import CocoDataset, VOCDataset

    space = layout.label_space()
    assert set(kitti.CLASSES.values()) == set(space['kitti'])
    assert set(lisa.SUPERCLASSES) == set(space['lisa'])
    assert space['voc'] == space['clipart'] == VOCDataset.METAINFO['classes']
    assert space['coco'] == CocoDataset.METAINFO['classes']
    assert set(space['comic']) == set(space['watercolor']) < set(space['voc'])


def test_every_miniature_is_in_order_but_for_its_size(made, capsys):
    out, _ = made
    assert convert.main(['all', '--out', str(out), '--check']) == 1
    report = capsys.readouterr().out
    lines = [line for line in report.splitlines() if line.startswith('  ')]
    assert lines and all(line.startswith('  incomplete archive: ') for line in lines), report


def complete(monkeypatch) -> None:
    """Let the miniature of KITTI be the whole."""
    monkeypatch.setattr(kitti, 'SIZES', {'train': 2, 'test': 1})


def test_an_incomplete_archive_is_refused_and_what_is_missing_named(tmp_path, capsys, monkeypatch):
    src = tmp_path / 'owner'
    make_kitti(src)
    assert run('kitti', src, tmp_path) == 2
    error = capsys.readouterr().err
    assert 'train: 2 images, the benchmark has 3712 (3710 missing)' in error
    assert len(error.splitlines()) == 1 and not (tmp_path / 'kitti').exists()
    complete(monkeypatch)
    (src / 'training/image_2/000002.png').unlink()
    assert run('kitti', src, tmp_path) == 2
    assert '1 files are missing' in capsys.readouterr().err
    picture(src / 'training/image_2/000002.png', 100, 32)
    assert run('kitti', src, tmp_path) == 0
    report = capsys.readouterr().out
    assert 'image_2: 1 images or folders are in no split: 000003.png' in report
    assert "1 boxes left out: no class 'Misc'" in report
    assert convert.main(['kitti', '--out', str(tmp_path), '--check']) == 0
    assert capsys.readouterr().out == 'kitti: in order\n'


@pytest.mark.parametrize(
    ('domain', 'stray', 'named'),
    [
        ('kitti', 'training/image_2/x.png', '000003.png, x.png'),
        ('voc', 'VOCdevkit/VOC2012/JPEGImages/x.jpg', 'x.jpg'),
        ('widerface', 'WIDER_val/images/0--Parade/x.jpg', 'x.jpg'),
        ('widerface', 'WIDER_val/images/7--x/y.jpg', '7--x'),  # a folder of which no image is used
        ('lisa', f'{LISA_FOLDER}/x.png', 'x.png'),
        ('kitchen', 'gmu_scene_003/Images/x.png', 'rgb_3.png, x.png'),
        ('coco', 'val2014/x.jpg', 'x.jpg'),
        ('dota', 'val/images/x.png', 'x.png'),
        ('deeplesion', 'Images_png/000009_01_01/009.png', '000009_01_01'),
        ('comic', 'comic/JPEGImages/x.jpg', 'x.jpg'),
        ('clipart', 'clipart/JPEGImages/x.jpg', 'x.jpg'),
        ('watercolor', 'watercolor/JPEGImages/x.jpg', 'x.jpg'),
    ],
)
def test_surplus_images_are_named(domain, stray, named, tmp_path, capsys):
    """Whether the rest is complete or not; VOC's images of other lists are no surplus."""
    more = MINIATURES[domain](tmp_path / 'owner')
    picture(tmp_path / 'owner' / stray, 8, 8)
    assert run(domain, tmp_path / 'owner', tmp_path, *more) == 2
    assert named in capsys.readouterr().err
    assert run(domain, tmp_path / 'owner', tmp_path, '--partial', *more) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if 'in no split' in line]
    assert any(line.endswith(f'are in no split: {named}') for line in lines), lines
    assert len(lines) == (3 if domain == 'kitchen' else 1)  # its three scenes have a rgb_3.png


@pytest.mark.parametrize(
    ('domain', 'words'),
    [
        ('coco', 'train: 2 images, the benchmark has 35504'),
        ('deeplesion', 'test: 2 lesions, the dataset has 4927'),
        ('dota', 'test: 1 images, the benchmark has 458'),
        ('kitchen', '3 scenes (gmu_scene_*), the dataset has 9'),
        ('lisa', '14 annotations, the dataset has 7855'),
        ('voc', 'train: 2 images, the benchmark has 16551'),
        ('watercolor', 'test: 2 images, the benchmark has 1000'),
        ('widerface', 'test: 2 images, the benchmark has 3226'),
    ],
)
def test_counts_are_compared_with_the_benchmark(made, tmp_path, capsys, domain, words):
    _, owners = made
    more = ['--test-scenes', '2'] if domain == 'kitchen' else []
    assert run(domain, owners[domain], tmp_path, *more) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_and_does_nothing_twice(tmp_path, monkeypatch):
    src = tmp_path / 'owner'
    more = [*make_dota(src), '--partial']
    whole = layout.place
    calls = []

    def killed(picture, target, link):
        if calls:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(f'.{target.name}.part').write_bytes(b'half')  # what kill -9 leaves
            raise KeyboardInterrupt
        calls.append(target.name)
        whole(picture, target, link)

    monkeypatch.setattr(layout, 'place', killed)
    with pytest.raises(KeyboardInterrupt):
        run('dota', src, tmp_path, *more)
    monkeypatch.undo()
    folder = tmp_path / 'dota'
    assert calls == ['P0000_0_0.png'] and not (folder / 'train.json').exists()
    assert any('interrupted' in defect for defect in convert.check_domain(tmp_path, 'dota'))

    first = (folder / 'train/P0000_0_0.png').stat()
    assert run('dota', src, tmp_path, *more) == 0
    assert (folder / 'train/P0000_0_0.png').stat().st_mtime_ns == first.st_mtime_ns
    texts = [(folder / f'{split}.json').read_bytes() for split in ('train', 'test')]
    assert not list(folder.rglob('*.part'))
    assert run('dota', src, tmp_path, *more) == 0
    assert texts == [(folder / f'{split}.json').read_bytes() for split in ('train', 'test')]


def test_other_options_are_refused_unless_the_old_result_may_go(tmp_path, capsys):
    src, out = tmp_path / 'owner', tmp_path / 'out'
    make_dota(src)
    assert run('dota', src, out, '--partial', '--tile', '64', '--overlap', '16') == 0
    assert run('dota', src, out, '--partial', '--tile', '32', '--overlap', '16') == 2
    assert 'made with other options (tile)' in capsys.readouterr().err
    assert run('dota', src, out, '--partial', '--tile', '32', '--overlap', '16', '--overwrite') == 0
    # 100 wide by 60 high in steps of 16: 0 16 .. 64 68, and 0 16 28.
    assert len(boxes(out, 'dota', 'train')) == 6 * 3 == len(list((out / 'dota/train').iterdir()))
    write(out / 'kitti/mine.txt', '')
    make_kitti(src)
    assert run('kitti', src, out, '--partial', '--overwrite') == 2
    assert 'holds files that no converter made' in capsys.readouterr().err


def test_images_are_hard_links_symbolic_links_or_copies(tmp_path):
    src = tmp_path / 'owner'
    make_kitti(src)
    original = src / 'training/image_2/000000.png'
    for link in ('hard', 'symbolic', 'copy'):
        assert run('kitti', src, tmp_path / link, '--partial', '--link', link) == 0
        image = tmp_path / link / 'kitti/train/000000.png'
        assert image.read_bytes() == original.read_bytes()
        assert image.is_symlink() is (link == 'symbolic')
        assert image.samefile(original) is (link != 'copy')


def test_where_hard_links_do_not_reach_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    def refuse(source, target):
        raise OSError(18, 'Invalid cross-device link')

    src = tmp_path / 'owner'
    make_kitti(src)
    monkeypatch.setattr(layout.os, 'link', refuse)
    assert run('kitti', src, tmp_path, '--partial') == 2
    error = capsys.readouterr().err
    assert 'Invalid cross-device link' in error and 'give --link symbolic or --link copy' in error
    assert run('kitti', src, tmp_path, '--partial', '--link', 'symbolic') == 0  # and it goes on


def test_without_lists_the_split_is_seeded_and_a_file_overrules_it(tmp_path, capsys):
    src = tmp_path / 'owner'
    make_kitti(src)
    for name in ('train', 'val'):
        (src / f'ImageSets/{name}.txt').unlink()
    found = []
    for seed in (0, 0, 1, 2, 3):
        out = tmp_path / str(len(found))
        assert run('kitti', src, out, '--partial', '--seed', seed) == 0
        assert 'the split is random' in capsys.readouterr().out
        found.append(tuple(boxes(out, 'kitti', 'test')))
    assert found[0] == found[1] and len(set(found)) > 1
    assert all(len(names) == 2 for names in found)  # 3769 / 7481 of 3, rounded
    train, test = write(tmp_path / 'a.txt', '000001\n'), write(tmp_path / 'b.txt', '000000\n')
    out = tmp_path / 'lists'
    assert run('kitti', src, out, '--partial', '--split-file', train, test) == 0
    assert list(boxes(out, 'kitti', 'test')) == ['000000.png']
    for text, words in (('000009\n', 'have no annotation'), ('000001\n', 'in both lists')):
        write(test, text)
        assert run('kitti', src, tmp_path / 'x', '--split-file', train, test) == 2
        assert words in capsys.readouterr().err
    # What is not there is left out with --partial.
    write(test, '000009\n000002\n')
    assert run('kitti', src, tmp_path / 'x', '--partial', '--split-file', train, test) == 0
    assert list(boxes(tmp_path / 'x', 'kitti', 'test')) == ['000002.png']


def test_a_random_split_is_not_done_again_on_more_images(tmp_path, capsys):
    """Images would change sides, and stay in both folders."""
    src = tmp_path / 'owner'
    make_kitti(src)
    (src / 'ImageSets/val.txt').unlink()
    assert run('kitti', src, tmp_path, '--partial') == 0
    write(src / 'training/label_2/000003.txt', '')
    assert run('kitti', src, tmp_path, '--partial') == 2
    assert 'was made with other options (split): give --overwrite' in capsys.readouterr().err
    (src / 'training/label_2/000002.txt').unlink()  # as many as before, but others
    assert run('kitti', src, tmp_path, '--partial') == 2
    assert run('kitti', src, tmp_path, '--partial', '--overwrite') == 0
    assert convert.main(['kitti', '--out', str(tmp_path), '--check']) == 1
    assert 'do not belong here' not in capsys.readouterr().out


@pytest.mark.parametrize('domain', ['voc', 'comic'])
def test_an_annotation_that_is_missing_is_named_before_anything_is_written(
    domain, tmp_path, capsys
):
    src = tmp_path / 'owner'
    MINIATURES[domain](src)
    xml_file = next(src.rglob('Annotations/*1.xml'))
    xml_file.unlink()
    assert run(domain, src, tmp_path) == 2
    assert f'1 files are missing: {xml_file}' in capsys.readouterr().err
    assert not (tmp_path / domain).exists()
    assert run(domain, src, tmp_path, '--partial') == 0
    names = [name for split in ('train', 'test') for name in boxes(tmp_path, domain, split)]
    assert names and f'{xml_file.stem}.jpg' not in names


@pytest.mark.parametrize(
    ('domain', 'image'),
    [('deeplesion', 'Images_png/000002_01_01/012.png'), ('dota', 'train/images/P0000.png')],
)
def test_an_image_that_breaks_off_is_named(domain, image, tmp_path, capsys):
    more = MINIATURES[domain](tmp_path / 'owner')
    path = tmp_path / 'owner' / image
    path.write_bytes(path.read_bytes()[:45])  # the header and no pixel
    assert run(domain, tmp_path / 'owner', tmp_path, '--partial', *more) == 2
    assert f'{path} is not a readable image' in capsys.readouterr().err


def _edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / 'train.json').read_text())
        change(content)
        (folder / 'train.json').write_text(json.dumps(content))

    return apply


def _set(key: str, field: str, value: object) -> Callable[[Path], None]:
    return _edit(lambda content: content[key][0].update({field: value}))


DEFECTS = {
    'conversion.json is missing': lambda folder: (folder / 'conversion.json').unlink(),
    'test.json is missing or broken': lambda folder: (folder / 'test.json').write_text('{'),
    '1 images are missing: 000002.png': lambda folder: (folder / 'train/000002.png').unlink(),
    '1 images cannot be read: 000002.png': lambda folder: (
        (folder / 'train/000002.png').unlink(),
        (folder / 'train/000002.png').write_bytes(b'no image'),
    ),
    'files do not belong here: .000002.png.part, x.png': lambda folder: (
        picture(folder / 'train/x.png', 8, 8),
        (folder / 'train/.000002.png.part').write_bytes(b''),
    ),
    'images have another size': _set('images', 'width', 101),
    'image ids come twice: 2': _set('images', 'id', 2),
    'file names come twice: 000002.png': _set('images', 'file_name', '000002.png'),
    'annotation ids come twice: 2': _set('annotations', 'id', 2),
    'annotations are of no image: 1': _set('annotations', 'image_id', 77),
    'annotations are of no class: 1': _set('annotations', 'category_id', 4),
    'ignore by iscrowd': _set('annotations', 'ignore', 1),
    'boxes reach out of their image: 1': _set('annotations', 'bbox', [90, 5, 11, 5]),
    'boxes are smaller than 1 px: 1': _set('annotations', 'bbox', [9, 5, 0.5, 5]),
    "categories are not the label space's": _set('categories', 'name', 'Car'),
    'boxes in the json, against 6 when it was made': _edit(lambda c: c['annotations'].pop()),
    'not COCO annotations': _edit(lambda content: content.pop('images')),
    'images are in both splits: 000000.png': lambda folder: (folder / 'test.json').write_bytes(
        (folder / 'train.json').read_bytes()
    ),
}


@pytest.mark.parametrize('words', DEFECTS)
def test_check_names_each_defect(tmp_path, monkeypatch, capsys, words):
    complete(monkeypatch)
    src = tmp_path / 'owner'
    make_kitti(src)
    assert run('kitti', src, tmp_path, '--link', 'copy') == 0
    DEFECTS[words](tmp_path / 'kitti')
    capsys.readouterr()
    assert convert.main(['kitti', '--out', str(tmp_path), '--check']) == 1
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ('domain', 'file', 'text', 'words'),
    [
        ('kitti', 'training/label_2/000000.txt', 'Car 0 0 1\n', 'not a line of KITTI labels'),
        ('voc', 'VOCdevkit/VOC2007/Annotations/000005.xml', '<a>', '000005.xml is not an'),
        ('lisa', 'allAnnotations.csv', 'Filename;Annotation tag\n', 'lacks the columns Upper left'),
        ('dota', 'val/labelTxt/P0003.txt', '1 2 3 ship\n', 'not a line of DOTA labels'),
        ('deeplesion', 'DL_info.csv', 'File_name\n', 'lacks the columns Bounding_boxes'),
        ('coco', 'annotations/instances_val2017.json', '[]', 'is not a file of COCO annotations'),
        ('coco', 'annotations/instances_val2014.json', '{"images": []}', 'it has no annotations'),
        (
            'widerface',
            'wider_face_split/wider_face_val_bbx_gt.txt',
            'a.jpg\n2\n1 2\n',
            'rows of ten',
        ),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, capsys, domain, file, text, words):
    more = MINIATURES[domain](tmp_path / 'owner')
    write(tmp_path / 'owner' / file, text)
    assert run(domain, tmp_path / 'owner', tmp_path, '--partial', *more) == 2
    error = capsys.readouterr().err
    assert words in error and Path(file).name in error and len(error.splitlines()) == 1

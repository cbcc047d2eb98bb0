"""What the README shows: every block and command of it, as it stands there, and its links."""
import ast
import glob
import os
import os.path as osp
import re
import shlex
import sys

import cv2
import numpy as np
import pytest
import tiny
from mmengine.config import Config

import al_label
import al_patch
import al_report
import al_train

TEXT = open(osp.join(tiny.ROOT, 'README.md')).read()
PYTHON = dict(re.findall(r'<!-- (\w+\.py) -->\n```python\n(.*?)```', TEXT, re.S))
BLOCKS = re.findall(r'^al = dict\(.*\)$', TEXT, re.M) + re.findall(r'`(al = dict\(.*?\))` \|', TEXT)
COMMANDS = [line.split('  #')[0].strip() for block in re.findall(r'```bash\n(.*?)```', TEXT, re.S)
            for line in block.splitlines()]
SMALL = dict(image=dict(initial=2, budget=2), region=dict(initial=20, budget=20), superpixel=dict(initial=9, budget=9),
             pixel=dict(initial=2, budget=2))


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 260 and len(TEXT.split()) <= 2200


@pytest.mark.parametrize('block', BLOCKS)
def test_a_block_says_all_that_holds_on_top_of_a_shipped_config(tmp_path, monkeypatch, block):
    """Nothing stays of the block that it is merged into but keys that it does not have."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'my_strategies.py').write_text('import al_patch\n' + PYTHON['my_strategies.py'])
    for shipped in glob.glob(osp.join(tiny.ROOT, 'configs', 'al_*.py')):
        (tmp_path / 'mine.py').write_text(f'_base_ = {shipped!r}\n{block}\n')
        given, base = eval(block[5:], dict(dict=dict)), Config.fromfile(shipped).al
        merged = Config.fromfile(tmp_path / 'mine.py').al.to_dict()
        assert merged == {**base.to_dict(), **given}
        al_patch.parse_settings(merged)
    sys.modules.pop('my_strategies', None)


@pytest.mark.parametrize('block', [block for block in BLOCKS if 'human' not in block])
def test_a_block_runs(make_cfg, train, tmp_path, monkeypatch, block):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'my_strategies.py').write_text(PYTHON['my_strategies.py'])
    al = eval(block[5:], dict(dict=dict))
    unit = al_patch.split_setting(al.get('unit', 'image'))[0]
    _, rounds = train(make_cfg({**al, **SMALL[unit], 'rounds': 1}, changes={
        'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2}))
    assert len(rounds) == 2 and rounds[1]['asked'] and rounds[0]['metrics']
    sys.modules.pop('my_strategies', None)


def test_folders_of_images_and_label_maps_run(tmp_path, monkeypatch):
    """The config, with smaller crops and two iterations of two rounds."""
    rng = np.random.default_rng(0)
    for split, n in dict(train=5, val=2).items():
        for kind in ('img', 'ann'):
            os.makedirs(tmp_path / 'my_data' / split / kind)
        for i in range(n):
            label = (rng.random((40, 56)) < .5).astype(np.uint8)
            label[:4] = 255
            cv2.imwrite(str(tmp_path / 'my_data' / split / 'img' / f'{i}.jpg'), 99 * (label[..., None] == [1, 1, 1]))
            cv2.imwrite(str(tmp_path / 'my_data' / split / 'ann' / f'{i}.png'), label)
    config = PYTHON['my_config.py']
    assert len(config.splitlines()) <= 12 and config.count('(512, 512)') == 2
    config = config.replace('(512, 512)', '(64, 64)').replace('num_workers=2', 'num_workers=0')
    (tmp_path / 'my_config.py').write_text(config)
    monkeypatch.chdir(tmp_path)
    tiny.launch('my_config.py', 0, 'my_run', '--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
                'al.initial=2', 'al.budget=2', 'al.rounds=1')
    rounds = al_patch.read_state(osp.join('my_run', al_patch.STATE_FILE))['rounds']
    assert [entry['spent']['images'] for entry in rounds] == [2, 4] and 'mIoU' in rounds[1]['metrics']


@pytest.mark.parametrize('command', sorted({line for line in COMMANDS if line.startswith('python al_')}))
def test_a_command_is_understood(tmp_path, monkeypatch, capsys, command):
    """It fails for want of a run or a file, and not for its words."""
    monkeypatch.chdir(tmp_path)
    script, *words = shlex.split(command)[1:]
    module = dict(al_label=al_label, al_report=al_report)[script.removesuffix('.py')]
    with pytest.raises(SystemExit) as ended:
        module.main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f'{script} {words[0]}: ') and 'usage' not in said


def test_the_launchers_commands_are_understood(monkeypatch):
    lines = [line for line in COMMANDS if line.startswith('bash dist_al_train.sh')]
    assert len(lines) >= 5
    for line in lines:
        script, config, gpus, *words = shlex.split(line)[1:]
        monkeypatch.setattr(sys, 'argv', ['al_train.py', config, *words])
        assert al_train.parse_args().config == config and gpus.isdigit()


def pages() -> list[str]:
    return [osp.join(tiny.ROOT, 'README.md'), *glob.glob(osp.join(tiny.ROOT, 'resources', '*.md'))]


@pytest.mark.parametrize('page', pages(), ids=osp.basename)
def test_every_link_leads_somewhere(page):
    text = open(page).read()
    for link in re.findall(r'\]\(([^)]+)\)', text):
        path, _, anchor = link.partition('#')
        if path.startswith('http'):
            continue
        target = osp.normpath(osp.join(osp.dirname(page), path)) if path else page
        assert osp.exists(target), link
        if anchor:
            heads = re.findall(r'^#+ (.*)$', open(target).read(), re.M)
            assert anchor in [re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-') for head in heads], link


def test_every_key_of_the_al_block_has_a_row():
    rows = re.findall(r'^\| (`.*?`) \| `', TEXT.split('## The `al` block')[1].split('\n## ')[0], re.M)
    keys = [key for row in rows for key in re.findall(r'`(\w+)`', row)]
    assert sorted(keys) == sorted(al_patch.block_settings())


def test_no_python_of_it_is_broken():
    for text in PYTHON.values():
        ast.parse(text)

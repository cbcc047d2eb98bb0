"""The patch: put in place by the import, undone without a trace, and idle without an `al` block."""
import importlib.util
import os.path as osp
import subprocess
import sys
import types

import mmcv.ops.psa_mask
import mmcv.utils.ext_loader
import pytest
import tiny
import torch
from conftest import TARGETS, raw
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

import al_patch


@pytest.fixture
def unpatched():
    """The patch is off in the test; after it, the very objects of before are back."""
    wrappers, originals = raw(), dict(al_patch._ORIGINALS)
    al_patch.remove_patch()
    yield originals
    al_patch.remove_patch()
    al_patch._ALLOWED.enter_context(torch.serialization.safe_globals(al_patch.checkpoint_globals()))
    al_patch._ORIGINALS.update(originals)
    for (owner, name), wrapper in zip(TARGETS, wrappers):
        setattr(owner, name, wrapper)


def test_the_import_patches_what_it_says_and_nothing_else():
    assert al_patch.is_patched() and set(al_patch._ORIGINALS) == set(al_patch._PATCHES) == set(TARGETS)
    assert vars(Runner)['train'].__wrapped__ is al_patch._ORIGINALS[Runner, 'train']
    assert all(f'{owner.__name__}.{name}``' in al_patch.__doc__ for owner, name in TARGETS)


def test_the_import_brings_in_no_companion_and_no_plots():
    """Beside what mmengine and mmcv bring in by themselves."""
    names = ['al_report', 'al_label', 'matplotlib', 'argparse']
    code = ('import sys, mmcv.utils.ext_loader, mmengine.runner, mmengine.visualization; before = set(sys.modules); '
            'import al_patch; print(sorted(set(sys.modules) - before))')
    shown = subprocess.run([sys.executable, '-c', code], cwd=osp.dirname(al_patch.__file__), check=True, text=True,
                           capture_output=True).stdout.splitlines()[-1]
    assert "'al_patch'" in shown and not [name for name in names if f'{name!r}' in shown]


def test_twice_is_once():
    before = raw()
    al_patch.apply_patch()
    assert all(now is then for now, then in zip(raw(), before))


def test_removing_restores_the_very_objects(unpatched):
    assert not al_patch.is_patched()
    assert all(vars(owner)[name] is unpatched[owner, name] for owner, name in TARGETS)
    assert isinstance(vars(Runner)['build_dataloader'], staticmethod)
    assert Runner.train.__module__ == 'mmengine.runner.runner' and not hasattr(Runner.train, '__wrapped__')
    al_patch.remove_patch()  # twice is once
    assert not al_patch.is_patched()


def test_removing_after_patching_again(unpatched):
    al_patch.apply_patch()
    assert vars(Runner)['train'] is not unpatched[Runner, 'train']
    assert isinstance(vars(Runner)['build_dataloader'], staticmethod)
    al_patch.remove_patch()
    assert all(vars(owner)[name] is unpatched[owner, name] for owner, name in TARGETS)


def test_checkpoints_of_mmengines_are_read_while_the_patch_is_in_place(unpatched, tmp_path):
    """By stock's `torch.load`, on a torch that refuses them by default; what others have allowed stays so."""
    torch.save(dict(loss=HistoryBuffer([1.], [1])), tmp_path / 'checkpoint.pth')
    with pytest.raises(Exception, match='Unsupported global'):
        torch.load(tmp_path / 'checkpoint.pth')
    with torch.serialization.safe_globals([HistoryBuffer]):
        before = {*torch.serialization.get_safe_globals()}
        al_patch.apply_patch()
        assert torch.load(tmp_path / 'checkpoint.pth')['loss'].mean() == 1
        al_patch.remove_patch()
        assert {*torch.serialization.get_safe_globals()} == before and HistoryBuffer in before


def test_a_target_that_is_not_there_is_an_error_and_nothing_is_patched(unpatched, monkeypatch):
    monkeypatch.setattr(al_patch, '_PATCHES', {**al_patch._PATCHES, (Runner, 'tarin'): lambda raw: raw})
    with pytest.raises(RuntimeError, match='^al_patch cannot patch Runner.tarin: not there in mmengine'):
        al_patch.apply_patch()
    assert not al_patch.is_patched()
    assert all(vars(owner)[name] is unpatched[owner, name] for owner, name in TARGETS)


def test_without_al_a_runner_trains_as_stock(make_cfg, build, tmp_path):
    cfg = make_cfg()
    runner = build(cfg)
    assert runner.train() is runner.model
    assert runner.iter == 4 and len(runner.train_dataloader.dataset) == 12 and len(runner.val_dataloader.dataset) == 4
    assert not osp.exists(osp.join(cfg.work_dir, al_patch.STATE_FILE)) and osp.isfile(tmp_path / 'work' / 'iter_4.pth')


def test_a_missing_op_fails_by_name_when_it_is_called():
    ext = al_patch.load_ext_lazily('_ext', ['roi_align_forward'])
    with pytest.raises(RuntimeError, match='calls the compiled op `roi_align_forward`, which the installed mmcv lacks'):
        ext.roi_align_forward(1, 2)


@pytest.mark.skipif(importlib.util.find_spec('mmcv._ext') is None, reason='mmcv has no compiled ops')
def test_compiled_ops_are_mmcvs_own_and_are_called(make_cfg, train, monkeypatch):
    assert vars(mmcv.utils.ext_loader)['load_ext'] is al_patch._ORIGINALS[mmcv.utils.ext_loader, 'load_ext']
    ext, calls = mmcv.ops.psa_mask.ext_module, []
    assert isinstance(ext, types.ModuleType) and ext.__name__ == 'mmcv._ext'
    monkeypatch.setattr(mmcv.ops.psa_mask, 'ext_module', types.SimpleNamespace(
        psamask_forward=lambda *args, **kwargs: calls.append('forward') or ext.psamask_forward(*args, **kwargs),
        psamask_backward=lambda *args, **kwargs: calls.append('backward') or ext.psamask_backward(*args, **kwargs)))
    cfg = make_cfg({}, changes=tiny.NO_VAL)
    cfg.model.decode_head = dict(
        type='PSAHead', in_channels=8, channels=4, mask_size=(9, 9), psa_type='bi-direction', num_classes=3,
        norm_cfg=dict(type='BN'), loss_decode=dict(type='CrossEntropyLoss'))
    _, rounds = train(cfg)
    assert [len(entry['asked']) for entry in rounds] == [4, 2]
    # two of the head's directions: in 4 iterations of 2 rounds, and of the pool of 8 images in batches of 2
    assert calls.count('backward') == 16 and calls.count('forward') == 16 + 8


def test_getattr_in_a_checkpoint_answers_for_history_buffers_only():
    from mmengine.logging import HistoryBuffer
    assert al_patch._getattr_of_mmengine(HistoryBuffer, 'mean') is HistoryBuffer.mean
    for owner, name in ((HistoryBuffer, '__init__'), (osp, 'join')):
        with pytest.raises(ValueError, match='may only refer to the statistics of HistoryBuffer'):
            al_patch._getattr_of_mmengine(owner, name)

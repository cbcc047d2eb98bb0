"""Every device that torch has: runs on a stand-in accelerator (``standin.py``) ask for what they ask for on the CPU, as
CUDA, as a device that is not CUDA, and as Apple's, which has no float64."""
import subprocess
import sys

import devices
import pytest
import standin
from tiny import ROOT, launch, result, write_config

import al_patch

needs_hooks = pytest.mark.skipif(not standin.is_supported(), reason='torch has no devices written in Python')


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What each run came to, on the CPU and as each kind of device."""
    return devices.run(['cpu', *devices.KINDS], list(devices.SAMPLE), str(tmp_path_factory.mktemp('devices')))


@needs_hooks
@pytest.mark.parametrize('name', devices.SAMPLE)
def test_a_run_on_any_device_asks_as_on_the_cpu(found, name):
    """And at least a thousand of its operations run there."""
    faults = {kind: devices.fault_of(found['cpu'].get(name), found[kind].get(name)) for kind in devices.KINDS}
    assert faults == dict.fromkeys(devices.KINDS, '')


def test_every_score_embedding_and_selector_is_in_a_run():
    names = set()
    for al, _ in devices.SAMPLE.values():
        record = al_patch.resolve_strategy(al['strategy']).record
        names |= {*(record[part] for part in al_patch.PARTS if isinstance(record[part], str)), al['strategy']['type']}
    missing = {part: set(registry.module_dict) - names for part, (registry, _) in al_patch.PARTS.items()}
    assert not any(missing.values()), missing


REFUSED = '''
import sys
sys.path.insert(0, {tests!r})
import standin, torch
standin.install({kind!r})
here, away = torch.arange(12.).view(3, 4).to(standin.NAME), torch.arange(12.).view(3, 4)
tries = dict(
    two_devices=lambda: here + away, joined=lambda: torch.cat([here, away]), index=lambda: away[here[0].long()],
    generator=lambda: torch.rand(3, device=standin.NAME, generator=torch.Generator()), numpy=lambda: here.numpy(),
    sparse=lambda: torch.sparse.mm(away.to_sparse(), here), float64=lambda: here.double(),
    sum=lambda: here.mean(dtype=torch.float64), sent=lambda: away.double().to(standin.NAME))
for name, attempt in tries.items():
    try:
        attempt()
    except (TypeError, RuntimeError):
        print(name)
view = here[1:, ::2]
view.t()[0] = 5  # of the same memory
assert here.tolist() == [[0, 1, 2, 3], [5, 5, 6, 7], [5, 9, 10, 11]] and view.stride() == (4, 2)
assert (here * torch.tensor(2.)).sum().item() == 2 * sum(map(sum, here.tolist()))  # a number may be anywhere
assert here[torch.tensor([0])].cpu().tolist() == [[0, 1, 2, 3]]
assert here.is_cuda == ({kind!r} == 'cuda')
'''


@needs_hooks
@pytest.mark.parametrize('kind', devices.KINDS)
def test_the_stand_in_refuses_what_an_accelerator_does(kind):
    code = REFUSED.format(tests=f'{ROOT}/tests', kind=kind)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['two_devices', 'joined', 'index', 'generator', 'numpy', 'sparse'] + [
        'float64', 'sum', 'sent'] * (kind == 'mps')


@needs_hooks
def test_launcher_on_any_device(tmp_path, shared_data):
    """One process trains where mmengine trains, though it knows no process group there; 0 asks for the CPU."""
    (tmp_path / 'with_device.py').write_text("""import atexit
import sys
import standin
import torch
if not standin.LIBRARIES:
    standin.install('mps')
    atexit.register(lambda: print(sum(standin.DONE.values()), 'operations there', file=sys.stderr))
""")
    config = write_config(tmp_path, shared_data, 'dict(initial=4, budget=2, rounds=1)',
                          more="custom_imports['imports'].append('with_device')\n")
    path = dict(PYTHONPATH=f'{ROOT}/tests:{tmp_path}')
    there, on_cpu = (launch(config, n, tmp_path / f'work_{n}', **path).stderr for n in (1, 0))
    count_there, count_on_cpu = (int(text.split(' operations there')[0].split()[-1]) for text in (there, on_cpu))
    assert count_there >= 1000 and count_on_cpu == 0
    assert result(tmp_path / 'work_1') == result(tmp_path / 'work_0')

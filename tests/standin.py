"""An accelerator for machines that have none: a device of its own whose memory is the host's, and whose kernels are the
CPU's, so that its numbers are the CPU's to the last bit. What an accelerator would refuse, it refuses.

    python tests/standin.py [cuda | npu | mps] SCRIPT [ARGUMENTS]

A tensor on it has storage, strides and offsets as on any device, and views share memory. Refused are: operands on two
devices (but numbers without a dimension, and indices on the host); indices on the device for a tensor on the host; a
generator of the host's for numbers on the device; ``.numpy()``; as ``mps``, any float64. As ``cuda`` its tensors say so
(``is_cuda``). Of speed, streams, half precision and another order of sums it tells nothing. It uses private parts of
torch 2.13; ``is_supported()`` says whether they are there.

``DONE`` counts operations, ``CROSSED`` bytes and times that something came to the host (``to_host``, ``waits``) or went
to the device (``to_device``).
"""
import collections
import os.path as osp
import runpy
import sys

import torch
import torch.utils.backend_registration as registration
from torch.utils import _pytree as pytree

NAME = 'accel'
DONE, CROSSED = collections.Counter(), collections.Counter()
HOST = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
SET = torch.ops.aten.set_.source_Storage_storage_offset
LIBRARIES, KIND = [], 'cuda'
COPIES = {'aten::copy_', 'aten::_to_copy', 'aten::_copy_from', 'aten::_copy_from_and_resize'}
INDEXING = {'aten::index', 'aten::index_put', 'aten::index_put_', 'aten::_index_put_impl_'}


def is_supported() -> bool:
    return hasattr(torch._C, '_acc') and hasattr(registration, '_setup_privateuseone_for_python_backend')


def is_here(x) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == NAME


def twin(x: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor of the host's."""
    at = x.storage_offset(), x.shape, x.stride()
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().host, *at)


def moved(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """The memory of a storage of the host's as one of the device's, which keeps it alive."""
    here = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device(NAME, 0), storage.nbytes())
    here.host = storage
    return here


def place(x: torch.Tensor, storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """Lay a tensor of the device's over a storage, in the form of another: by the CPU's kernel, which only notes it."""
    return SET.redispatch(HOST, x, storage, like.storage_offset(), like.shape, like.stride())


def from_twin(x: torch.Tensor, storages: dict) -> torch.Tensor:
    """What the CPU made, on the device. What is a view of an operand shares its storage."""
    if KIND == 'mps' and x.dtype in (torch.float64, torch.complex128):
        raise TypeError(f'{NAME} as mps has no {x.dtype}: it has to be float32, or on the CPU')
    memory = x.untyped_storage()
    out = torch._C._acc.create_empty_tensor([0], x.dtype)
    return place(out, storages.get(memory.data_ptr()) or moved(memory), x)


def check(name: str, args: tuple, leaves: list, lands_here: bool) -> None:
    """Refuse what an accelerator refuses."""
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if x.dim() and not is_here(x)]
    if name in INDEXING:
        if not is_here(args[0]) and any(map(is_here, tensors)):
            raise RuntimeError(f'{name}: indices on {NAME} for a tensor on the CPU')
        values = args[2:3] if name != 'aten::index' else ()
        away = [x for x in values if isinstance(x, torch.Tensor) and x.dim() and not is_here(x)]
    if away and name not in COPIES and any(map(is_here, tensors)):
        raise RuntimeError(f'{name}: tensors on {NAME} and on {away[0].device.type}')
    if lands_here and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{name}: a generator of the CPU's for numbers on {NAME}")


def compute(op, *args, **kwargs):
    """Any operation: on the CPU, on the tensors' twins."""
    name = op._schema.name
    leaves, spec = pytree.tree_flatten((args, kwargs))
    device = kwargs.get('device')
    lands_here = device is None or torch.device(device).type == NAME
    check(name, args, leaves, lands_here)
    DONE[name] += 1
    storages = {x.untyped_storage().host.data_ptr(): x.untyped_storage() for x in leaves if is_here(x)}
    twins = [twin(x) if is_here(x) else torch.device('cpu') if isinstance(x, torch.device) else x for x in leaves]
    host_args, host_kwargs = pytree.tree_unflatten(twins, spec)
    if 'device' in host_kwargs:
        host_kwargs.update(device=torch.device('cpu'))
    host_kwargs.pop('pin_memory', None)
    if name in ('aten::set_', 'aten::resize_'):
        return lay_again(op, args, host_args, host_kwargs)
    if name.startswith('aten::_copy_from'):
        count(is_here(args[0]), is_here(args[1]), args[0])
        host_args[1].copy_(host_args[0])
        return args[1]
    out = (SUBSTITUTES.get(name) or op)(*host_args, **host_kwargs)
    if name == 'aten::_to_copy':
        count(is_here(args[0]), lands_here, args[0])
    elif not lands_here or any(not isinstance(x, torch.Tensor) for x in pytree.tree_leaves(out) if x is not None):
        count(True, False, torch.empty(()))  # a number: `.item()`, `torch.equal`
    written = {id(t): x for x, t in zip(leaves, twins) if is_here(x)}
    for x, t in zip(leaves, twins):
        if is_here(x) and (t.data_ptr(), t.shape) != (x.data_ptr(), x.shape):  # `out=` of another size
            place(x, moved(t.untyped_storage()), t)

    def back(x):
        if not isinstance(x, torch.Tensor) or not lands_here:
            return x
        return written[id(x)] if id(x) in written else from_twin(x, storages)

    return pytree.tree_map(back, out)


def lay_again(op, args: tuple, host_args: tuple, host_kwargs: dict) -> torch.Tensor:
    """An operation that gives a tensor another storage, or its storage another size."""
    if isinstance(host_args[1], torch.UntypedStorage):
        return op.redispatch(HOST, *args)
    op(*host_args, **host_kwargs)
    return place(args[0], args[1].untyped_storage() if is_here(args[1:2] and args[1]) else
                 moved(host_args[0].untyped_storage()), host_args[0])


def count(from_here: bool, to_here: bool, x: torch.Tensor) -> None:
    if from_here != to_here:
        CROSSED['to_host' if from_here else 'to_device'] += x.numel() * x.element_size()
        CROSSED['waits'] += from_here


def convolution_backward(grad, x, weight, stride, padding, dilation, transposed, output_padding, groups, mask):
    bias = [weight.shape[1] * groups if transposed else weight.shape[0]]
    return torch.ops.aten.convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed,
                                               output_padding, groups, mask)


SUBSTITUTES = {'aten::convolution_overrideable': torch.ops.aten.convolution.default,  # which each device must have
               'aten::convolution_backward_overrideable': convolution_backward}


def install(kind: str = 'cuda') -> None:
    """Make torch know the device, and mmengine take it for all that it does."""
    global KIND
    KIND = kind
    registration._setup_privateuseone_for_python_backend(rename=NAME)
    everything, some = torch.library.Library('_', 'IMPL'), torch.library.Library('aten', 'IMPL')
    everything.fallback(compute, 'PrivateUse1')
    aten = torch.ops.aten  # those that torch would compose, by parts that only its own devices have
    for op in (aten.convolution_overrideable.default, aten.convolution_backward_overrideable.default, aten.abs.default,
               aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.linspace.default):
        some.impl(op, lambda *args, _op=op, **kwargs: compute(_op, *args, **kwargs), 'PrivateUse1')
    LIBRARIES.extend([everything, some])
    module, nothing = getattr(torch, NAME), lambda *args: None
    for name in ('manual_seed', 'set_rng_state', 'synchronize', 'empty_cache', 'set_device'):
        setattr(module, name, nothing)
    module.get_rng_state, module.get_amp_supported_dtype = lambda *args: torch.get_rng_state(), lambda: []
    torch.serialization.register_package(
        5, lambda storage: None, lambda storage, where: moved(storage) if where.startswith(NAME) else None)
    stock_to, stock_mm, stock_clone = torch.Tensor.to, torch.sparse.mm, torch.UntypedStorage.clone
    torch.UntypedStorage.clone = lambda storage: (  # by `copy.deepcopy`
        moved(storage.host.clone()) if storage.device.type == NAME else stock_clone(storage))

    def to(x, *args, **kwargs):
        """A sparse tensor stays where it is, and is only said to be on the device."""
        where = (*args, kwargs.get('device'))[0]
        if x.layout is torch.strided or not isinstance(where, (str, torch.device)) or torch.device(where).type != NAME:
            return stock_to(x, *args, **kwargs)
        if KIND == 'mps' and x.dtype is torch.float64:
            raise TypeError(f'{NAME} as mps has no float64')
        x = x.clone()
        x.is_sent = True
        CROSSED['to_device'] += x._indices().nbytes + x._values().nbytes
        return x

    def mm(a, b, *rest):
        if a.layout is torch.strided:
            return stock_mm(a, b, *rest)
        if getattr(a, 'is_sent', False) != is_here(b):
            raise RuntimeError('sparse.mm: tensors on two devices')
        DONE['sparse.mm'] += is_here(b)
        return from_twin(stock_mm(a, twin(b)), {}) if is_here(b) else stock_mm(a, b, *rest)

    torch.Tensor.to, torch.sparse.mm = to, mm
    if kind == 'cuda':
        torch.Tensor.is_cuda = property(is_here)
    import mmengine.device.utils
    mmengine.device.utils.DEVICE = NAME


if __name__ == '__main__':
    sys.modules['standin'] = sys.modules['__main__']
    kind = sys.argv.pop(1)
    install(kind)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, osp.dirname(osp.abspath(sys.argv[0])))
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    finally:
        print(f'{sum(DONE.values())} operations on the stand-in as {kind}; {dict(CROSSED)}', file=sys.stderr)

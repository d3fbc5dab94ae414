"""A device of torch that computes on the CPU and refuses tensors of another device, as a GPU does.

`OTHER` is torch's private backend in Python (`torch.utils.backend_registration`): a tensor there wraps a CPU tensor.
Inside `second_device()` factories with `device=OTHER` and `.to(OTHER)` work; a CPU tensor of one dimension or more next
to a tensor of that device raises, and so does a random number drawn there.
"""

from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = "other:0"


class _OneDevice(backend_registration._DummyDeviceGuard):
    "Tells autograd that there is one device of this kind."

    def device_count_(self):
        return 1

    def deviceCount(self):
        return 1


backend_registration._setup_privateuseone_for_python_backend("other", device_guard=_OneDevice())

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class OtherTensor(torch.Tensor):
    "A tensor of the device; `inner` is the CPU tensor that holds its values."

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        out = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=OTHER, **layout)
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"OtherTensor({self.inner})"


def compute(func, args, kwargs):
    "Run an operation on the wrapped tensors; its result lives where a device would leave it."
    if func._can_decompose():  # in inference mode operations come whole
        with _Mode():
            return func.decompose(*args, **kwargs)
    given = pytree.tree_leaves((args, kwargs))
    ours = [t for t in given if isinstance(t, OtherTensor)]
    device = kwargs.get("device")
    there = bool(ours) if device is None else torch.device(device).type == "other"
    if ours:
        _refuse_mixing(func, args, given)
    if there and torch.Tag.nondeterministic_seeded in func.tags:
        raise RuntimeError(f"{func} draws on {OTHER}: draw on the CPU and move")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = pytree.tree_map_only(OtherTensor, lambda t: t.inner, (args, kwargs))
    known = {id(t.inner): t for t in ours}
    with torch.inference_mode(False), torch.no_grad():
        out = func(*inner_args, **inner_kwargs)
        if torch.Tag.inplace_view in func.tags:  # the wrapper takes the new shape too
            with no_dispatch():
                func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, lambda t: known.get(id(t), OtherTensor(t) if there else t), out)


def _refuse_mixing(func, args, given):
    "Raise where a device would: tensors of the CPU beside tensors of this one."
    if func in MOVES or func in INDEXED and isinstance(args[0], OtherTensor):
        return
    if any(isinstance(t, torch.Tensor) and not isinstance(t, OtherTensor) and t.ndim for t in given):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {OTHER} and cpu")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


@contextmanager
def second_device():
    "Make the device usable inside the block."
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)

"What torch makes behind the scenes, for the tests of how much memory something takes."
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    "Remembers every array that is made, and so keeps it."

    def __init__(self):
        super().__init__()
        self.made = {}  # place in memory → array, the widest one there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not x.is_sparse}
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.is_sparse: continue
            place = x.untyped_storage().data_ptr()
            if place not in known and x.numel() > (self.made[place].numel() if place in self.made else 0): self.made[place] = x
        return out

    def sizes(self) -> list[int]:
        "Elements of each array, the largest first."
        return sorted((x.numel() for x in self.made.values()), reverse=True)

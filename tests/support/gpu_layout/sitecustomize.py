"""Gives this environment's vLLM the module names of the GPU build, in each process that has this directory on its path.

It stands in for the GPU build, which cannot run here: a moved module is gone under its old name, and is there under
its new one with the old contents.
"""

import importlib
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder

from aft_ray.cluster.compat import MOVED_VLLM_MODULES

OLD_NAMES = {new: old for old, new in MOVED_VLLM_MODULES.items()}


class GpuLayout(PathFinder):
    loading = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in OLD_NAMES:
            return ModuleSpec(name, RenamedModule())
        if name in MOVED_VLLM_MODULES and not cls.loading:
            return None
        return super().find_spec(name, path, target)


class RenamedModule(Loader):
    def exec_module(self, module):
        old = OLD_NAMES[module.__name__]
        alias = sys.modules.pop(old, None)  # of `alias_moved_modules`, which may be what asks for the new name
        GpuLayout.loading = True
        try:
            sys.modules[module.__name__] = importlib.import_module(old)
        finally:
            GpuLayout.loading = False
            sys.modules.pop(old, None)
            if alias is not None:
                sys.modules[old] = alias


sys.meta_path[sys.meta_path.index(PathFinder)] = GpuLayout

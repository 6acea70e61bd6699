"""sitecustomize.py of the vLLM environment: the registry's torchvision beside CPU torch.

Its compiled operators need CUDA and do not load; importing it then fails on "operator
torchvision::nms does not exist". Declaring the two schemas first is enough for its Python part
(image transforms), which is all the loaders touch.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys._torchvision_library = library  # the schemas live as long as this object
        return None


sys.meta_path.insert(0, _DeclareOperators())

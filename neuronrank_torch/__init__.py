"""NeuronRank on transformers models: the core's mathematics on tensors, layer by layer.

What ``__init__.pyi`` lists is public. It is imported on first use: some of it needs an extra, all of it needs seconds.
The modules below are not public and may change in any version.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

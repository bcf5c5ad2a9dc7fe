"""Names and storage of the MLP matrices in each model family, one file per layout."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from neuronrank_torch.model.families.layout import MlpLayout

#: Every layout by file name.
LAYOUTS: dict[str, MlpLayout] = {
    module.name: import_module(f"{__name__}.{module.name}").LAYOUT
    for module in iter_modules(__path__)
    if module.name != "layout"
}

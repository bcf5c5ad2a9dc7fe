"""Names and storage of the MLP matrices in each model family, one file per layout."""

from neuronrank_core.registry import declared
from neuronrank_torch.model.families.layout import MlpLayout

#: Every layout by file name.
LAYOUTS: dict[str, MlpLayout] = declared(__name__, __path__, "LAYOUT", besides=("layout",))

"""Damaged and hostile files, made in families: what `test_hostile_files` loads.

- `case`: one file, and what must come of it.
- `raw`: noise in files that were written well.
- `pickles`: files of `torch.save` that say what no file of ours says.
- `safetensors`: safetensors files of that kind.
- `experts`: both formats, with stacks and transposed views.
- `foreign`: weights of other tools.

A case is decided by its family and its number alone, so one that fails is found again.
"""

from tests.corruptions.case import EITHER, KEPT, REFUSED, Case, Family
from tests.corruptions.experts import EXPERTS
from tests.corruptions.foreign import FOREIGN
from tests.corruptions.pickles import PICKLES, SIZES
from tests.corruptions.raw import RAW_PT, RAW_SAFETENSORS
from tests.corruptions.safetensors import SAFETENSORS

#: By name, which begins with the format.
FAMILIES: dict[str, Family] = RAW_PT | PICKLES | RAW_SAFETENSORS | SAFETENSORS | EXPERTS | FOREIGN

__all__ = ["EITHER", "FAMILIES", "KEPT", "RAW_PT", "REFUSED", "SIZES", "Case"]

"""The numerical kernels, chosen in this one place; the layers receive them as arguments.

Every kernel accumulates in float32 whatever it is fed and returns the type it was given: half-precision sums of
thousands of terms lose the picture, and on CPU the float32-accumulating bfloat16 product is also the faster one. Which
form a convolution takes is chosen in `convolution.form`, by backend, type and shape; benchmarks/NOTES.md has the
measurements behind it.
"""

from sfumato.models.kernels.attention import attention, attention_map, weigh
from sfumato.models.kernels.blocks import in_blocks
from sfumato.models.kernels.convolution import conv_general_dilated, filtered, in_basis, patiently
from sfumato.models.kernels.doubled import conv_of_doubled, twice
from sfumato.models.kernels.normalization import group_norm
from sfumato.models.kernels.order import after
from sfumato.models.kernels.packed import joined
from sfumato.models.kernels.products import dot_general, plus
from sfumato.models.kernels.slopes import inside_loop

__all__ = [
    "after", "attention", "attention_map", "conv_general_dilated", "conv_of_doubled", "dot_general", "filtered",
    "group_norm", "in_basis", "in_blocks", "inside_loop", "joined", "patiently", "plus", "twice", "weigh",
]  # fmt: skip

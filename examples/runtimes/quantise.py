"""Round the matrices of a GGUF file in float32 to Q4_0, the embeddings to Q8_0: ``quantise.py SOURCE TARGET``.

Both round to the nearest point of a grid with zero in it, so zeros stay. They need widths that are multiples of 32.
"""

import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

source, target = gguf.GGUFReader(sys.argv[1]), sys.argv[2]
fields = source.fields
writer = gguf.GGUFWriter(target, fields["general.architecture"].contents())
for name, field in fields.items():
    if not name.startswith("GGUF.") and name != "general.architecture":
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
for tensor in source.tensors:
    kind = Kind.F32 if tensor.data.ndim == 1 else Kind.Q8_0 if "embd" in tensor.name else Kind.Q4_0
    packed = gguf.quants.quantize(np.asarray(tensor.data, np.float32), kind)
    assert not gguf.quants.dequantize(packed, kind)[tensor.data == 0].any(), f"{tensor.name}: a zero was not kept"
    writer.add_tensor(tensor.name, packed, raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

"""Parameter packs: a model's floating-point tensors as one flat float32 file with a manifest.

The format is ``burn-p2p-python-flattened-parameter-pack-v1``, byte for byte, so that trainers written for burn_p2p's
Python bridge read and write it unchanged. A pack is a directory::

    values.f32le     every selected tensor as float32, row-major, little-endian, one after the other, no header
    manifest.json    format, layout hash, number of values, the filter and what it selected; written last

Which tensors, and in what order, is the layout. Tensors that are excluded or not floating-point are not in the pack
and stay as they are when it is loaded. Tied weights are in the pack once per name, as the format wants it; loading
refuses copies that differ.
"""

from sparktrain.train.parameter_pack.files import FORMAT, Pack, load, read, read_manifest, unpack, write, write_json
from sparktrain.train.parameter_pack.layout import ALL, Layout, StateDictFilter, layout

__all__ = [
    "ALL",
    "FORMAT",
    "Layout",
    "Pack",
    "StateDictFilter",
    "layout",
    "load",
    "read",
    "read_manifest",
    "unpack",
    "write",
    "write_json",
]

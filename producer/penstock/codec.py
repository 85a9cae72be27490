"""Names of `penstock.records` that other programs import from here: the documentation told them to."""

from penstock.records import decode_meta as decode_meta
from penstock.records import encode_meta as encode_meta

"""Names that docs/messages.md has told other programs to import from here; `penstock.records` has them."""

from penstock.records import decode_meta as decode_meta
from penstock.records import encode_meta as encode_meta

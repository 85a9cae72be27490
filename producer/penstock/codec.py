"""Earlier name of the serializer in `penstock.records`, for programs that import it from here."""

from penstock.records import decode_meta as decode_meta
from penstock.records import encode_meta as encode_meta

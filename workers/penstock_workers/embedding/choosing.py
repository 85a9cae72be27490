"""Which way computes a model's vectors: the fastest of those that keep the probe's vectors."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from penstock.errors import ModelLoadError
from penstock.extras import how_to_install
from penstock_workers.embedding.bert_c import BertC
from penstock_workers.embedding.bert_gpu import BertGpu
from penstock_workers.embedding.bfloat16 import Bfloat16
from penstock_workers.embedding.c_kernels import find_kernels
from penstock_workers.embedding.collating import Collator
from penstock_workers.embedding.measured import machine_key, recall, remember
from penstock_workers.embedding.openvino import Graph, is_installed
from penstock_workers.embedding.packed import Packed, PackedBert
from penstock_workers.embedding.padded import Padded
from penstock_workers.embedding.probe import Probe
from penstock_workers.embedding.tokenizing import FOREIGN, Encoded
from penstock_workers.embedding.way import Way
from penstock_workers.hardware.device import has_fast_bfloat16, name_device
from penstock_workers.settings import ModelSettings

logger = logging.getLogger(__name__)

N_TIMED: Final = 3
"""Runs of the probe by each way to bfloat16; the fastest counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """The ways to compute one model's vectors.

    Attributes:
        name: Name of the model.
        model: The model; a way may change it, see `Way`.
        settings: The model's settings.
        collator: Makes padded batches.
        probe: Compares and times ways.
        example: Two texts that a graph is traced with.
    """

    name: str
    model: SentenceTransformer
    settings: ModelSettings
    collator: Collator
    probe: Probe
    example: Sequence[Encoded]

    def choose(self, fingerprint: str) -> Way:
        """Return the fastest way that keeps the probe's vectors.

        Args:
            fingerprint: Hash of all that decides the model's vectors.

        Raises:
            ModelLoadError: The settings name a way that is missing, or that turns vectors elsewhere.
        """
        key = self._key(fingerprint)
        known = recall(key)
        is_bfloat16 = self._wants_bfloat16(known)
        graph = self.trace(is_bfloat16=is_bfloat16) if self._wants_graph(known) else None
        if graph is not None and "openvino" in (self.settings.engine, known.get("engine")):
            return graph
        base = self.pack() or self._pad()
        way, products = self.reduce(base, known) if is_bfloat16 else (base, "torch")
        if way is base:
            way, products = self.fuse(base, known)
        if graph is not None and self._is_faster(graph, way):
            # frees the weights in the layouts that torch's ways made of them
            way.close()
            base.close()
            way = graph
        way.settle()
        remember(
            key,
            {"engine": "openvino" if way is graph else "torch", "dtype": way.dtype, "products": products},
        )
        return way

    def pack(self) -> Packed | None:
        """Return the packed way; None if it changes a vector of the probe, or a text sees its batch mates."""
        try:
            way = Packed(self.model, dtype=self._dtype)
        except NotImplementedError as error:
            self._warn("batches are padded: %s", error)
            return None
        reason = self._compare(way)
        if reason is None:
            return way
        way.close()
        self._warn("batches are padded: %s", reason)
        return None

    def trace(self, *, is_bfloat16: bool) -> Graph | None:
        """Return the model as a graph, if that changes no vector of the probe; leaves the model as it was.

        Raises:
            ModelLoadError: The settings insist on the graph.
        """
        reason: str | None
        if not is_installed():
            reason = f"it is not installed: {how_to_install('openvino')}"
        elif self.model.device.type != "cpu":
            reason = "it is for CPUs here"
        elif self.settings.dtype == "float16":
            reason = "it computes in float32 or bfloat16"
        else:
            try:
                graph = Graph(self.model, self.collator, self.example, is_bfloat16=is_bfloat16)
                reason = self.probe.compare(graph)
                if reason is None:
                    return graph
            except Exception as error:  # noqa: BLE001  # of a foreign compiler on foreign code
                reason = _first_line(error)
        if self.settings.engine == "openvino":
            raise ModelLoadError(self.name, f"OpenVINO: {reason}")
        self._warn("torch computes: OpenVINO: %s", reason)
        return None

    def reduce(self, base: Way, known: Mapping[str, str]) -> tuple[Way, str]:
        """Return a way with products in bfloat16, if vectors keep their directions and are faster.

        Args:
            base: The way in float32.
            known: What was chosen before. If that, or the settings, say bfloat16, float32 is not timed.

        Returns:
            The way to use, `base` if no other is better; and what computes its products.

        Raises:
            ModelLoadError: The settings ask for bfloat16, and it turns vectors to other directions.
        """
        is_forced = self.settings.dtype == "bfloat16"
        is_settled = is_forced or known.get("dtype") == "bfloat16"
        float32_s = math.inf if is_settled else self.probe.time(base)
        # oneDNN's products are faster where a CPU has tiles for them (AMX)
        makers: dict[str, Callable[[], Way]] = {
            "C": partial(self._bert, base, torch.bfloat16),
            "torch": partial(Bfloat16, base, self.model),
        }
        candidates = [known["products"]] if known.get("products") in makers else list(makers)
        times: dict[str, float] = {}
        reasons: list[str] = []
        for products in candidates:
            way = self._try(makers[products], reasons)
            if way is None:
                continue
            if is_settled and len(candidates) == 1:
                return way, products
            times[products] = min(self.probe.time(way) for _ in range(N_TIMED))
            way.close()
        for reason in reasons:
            self._warn("a way to bfloat16 is not used: %s", reason)
        best = min(times, key=times.__getitem__, default=None)
        if best is not None and times[best] <= float32_s:
            return makers[best](), best
        reason = "it is slower here" if times else "; ".join(reasons)
        if is_forced:
            raise ModelLoadError(self.name, f"bfloat16: {reason}")
        self._warn("float32 is used, not bfloat16: %s", reason)
        return base, "torch"

    def fuse(self, base: Way, known: Mapping[str, str]) -> tuple[Way, str]:
        """Return a way with its encoder in C in float32, if it keeps the probe's vectors and is faster.

        Args:
            base: The way by torch.
            known: What was chosen before in float32 is not timed again.

        Returns:
            The way that is in use now, `base` where the other is not better; and whose products it uses.
        """
        settled = known.get("products") if known.get("dtype") == base.dtype else None
        reasons: list[str] = []
        make = partial(self._bert, base, torch.float32)
        way = None if settled == "torch" or self.model.device.type != "cpu" else self._try(make, reasons)
        for reason in reasons:
            self._warn("float32 in C is not used: %s", reason)
        if way is None or settled == "C":
            return (base, "torch") if way is None else (way, "C")
        in_c_s = min(self.probe.time(way) for _ in range(N_TIMED))
        way.close()
        by_torch_s = min(self.probe.time(base) for _ in range(N_TIMED))
        return (make(), "C") if in_c_s <= by_torch_s else (base, "torch")

    @property
    def _dtype(self) -> str:
        """Return the format of the weights as they were loaded."""
        return "float16" if self.settings.dtype == "float16" else "float32"

    @property
    def _has_products(self) -> bool:
        return any(isinstance(module, nn.Linear) for module in self.model.modules())

    def _key(self, fingerprint: str) -> str:
        """Return the key that this choice is kept under."""
        device = self.model.device
        kernels = [find_kernels(device, dtype) for dtype in (torch.bfloat16, torch.float32)]
        versions = [found.version for found in kernels if found is not None]
        code = f"{self.settings.engine} {versions}"
        return machine_key(fingerprint, name_device(device), torch.get_num_threads(), code)

    def _wants_bfloat16(self, known: Mapping[str, str]) -> bool:
        if self.settings.dtype != "auto":
            return self.settings.dtype == "bfloat16"
        is_fast = self._has_products and has_fast_bfloat16(self.model.device)
        return is_fast and known.get("dtype") != "float32"

    def _wants_graph(self, known: Mapping[str, str]) -> bool:
        if self.settings.engine != "auto":
            return self.settings.engine == "openvino"
        may_trace = self.model.device.type == "cpu" and self.settings.dtype != "float16" and is_installed()
        return may_trace and self._has_products and known.get("engine") != "torch"

    def _pad(self) -> Padded:
        """Return the model's own way; it embeds texts one by one if padding changes their vectors."""
        way = Padded(self.model, self.collator, dtype=self._dtype)
        reason = self._compare(way)
        if reason is None:
            return way
        self._warn("texts are embedded one by one: %s", reason)
        return Padded(self.model, self.collator, dtype=self._dtype, is_one_by_one=True)

    def _bert(self, base: Way, dtype: torch.dtype) -> PackedBert:
        """Return the packed way with its encoder in C, or by kernels for a GPU, and products in a dtype.

        Raises:
            NotImplementedError: There is none for such a model or machine.
        """
        device = self.model.device
        kernels = find_kernels(device, dtype)
        if not isinstance(base, Packed) or (kernels is None and device.type != "cuda"):
            raise NotImplementedError("its own modules compute")
        if kernels is None:
            return PackedBert(base, partial(BertGpu, n_words=len(self.model.tokenizer)))
        return PackedBert(base, partial(BertC, kernels=kernels))

    def _try(self, make: Callable[[], Way], reasons: list[str]) -> Way | None:
        """Return a way if it keeps the probe's vectors; adds to `reasons` why it does not."""
        try:
            way = make()
        except NotImplementedError:
            return None  # there is none for such a model, or on such a machine
        try:
            reason = self.probe.compare(way)
        except Exception as error:  # noqa: BLE001  # of compilers for GPUs, too
            reason = _first_line(error)
        if reason is None:
            return way
        way.close()
        reasons.append(reason)
        return None

    def _compare(self, way: Way) -> str | None:
        """Return why a way by torch must not be used, or None."""
        try:
            return self.probe.compare(way)
        except FOREIGN as error:
            return _first_line(error)

    def _is_faster(self, graph: Graph, way: Way) -> bool:
        """Time the graph against the best way by torch."""
        torch_s, graph_s = self.probe.race(way), self.probe.race(graph)
        is_faster = graph_s < torch_s
        logger.info(
            "OpenVINO took %.3f s, torch %.3f s: %s is used",
            graph_s,
            torch_s,
            "OpenVINO" if is_faster else "torch",
            extra={"model": self.name},
        )
        return is_faster

    def _warn(self, event: str, reason: object) -> None:
        logger.warning(event, reason, extra={"model": self.name})


def _first_line(error: Exception) -> str:
    """Return an error's kind and the first line of its words."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

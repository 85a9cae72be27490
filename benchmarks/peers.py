"""The ways to embed that Penstock is measured against, each in a process of its own.

A process loads its model, says so, and is stopped (SIGSTOP) until it is asked for vectors: it takes no
CPU time from the others, whatever its library's threads do between calls. It may run in another
Python, so this module imports nothing but numpy before a way is chosen. What is not installed is left out.

Each way is set up as its users would on a machine of their own: all cores, batches sorted by length.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Way = Callable[[list[str]], Vectors]
"""Texts to vectors, shape (n_texts, dim)."""

BATCH: Final = 32
"""Texts in a batch: what `encode` and Infinity take by default."""
START_LIMIT_S: Final = 120.0
_notes: list[str] = []
"""What a way that was loaded just now tells of itself."""


class Peer:
    """A process with one library's ways to embed, seen from the benchmark.

    Args:
        library: one of `WAYS`, or of `ON_GPU`.
        python: interpreter that it is installed in.
        model: folder of the model.
        threads: that it may use.
        on_gpu: whether it computes on a GPU.

    Attributes:
        ways: what each is called, and the version of its package.
        left_out: ways that cannot run here, and why.
    """

    def __init__(self, library: str, *, python: str, model: Path, threads: int, on_gpu: bool = False) -> None:
        self._library = library
        self._folder = tempfile.TemporaryDirectory()
        self._n_asked = 0
        with (Path(self._folder.name) / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers", library, str(model), str(threads), str(int(on_gpu))],
                cwd=Path(__file__).parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.ways: Mapping[str, str] = {}
        self.left_out: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.communicate()  # the end of its input ends it
        self._folder.cleanup()

    def wait_until_loaded(self) -> None:
        """Return when it sleeps; what it offers is known from then on."""
        found = self._answer()
        self.ways, self.left_out = found["ways"], found["left_out"]

    def embed(
        self, way: str, texts: Sequence[str], *, one_by_one: bool = False
    ) -> tuple[Vectors, list[float]]:
        """Return vectors, shape (n_texts, dim), and how long each call took by its own clock, seconds.

        Args:
            way: one of `ways`.
            texts: go to it before its clock starts.
            one_by_one: a call for each text, else one for all.
        """
        self._n_asked += 1
        vectors = Path(self._folder.name) / f"{self._n_asked}.npy"
        order = {"way": way, "texts": list(texts), "one_by_one": one_by_one, "vectors": str(vectors)}
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        seconds: list[float] = self._answer()["seconds"]
        found: Vectors = np.load(vectors)
        vectors.unlink()
        return found, seconds

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = (Path(self._folder.name) / "log").read_text(errors="replace")
            raise RuntimeError(f"{self._library} ended by itself:\n{log[-2000:]}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """Load a library's ways, then answer orders, a line of JSON each, until there are no more."""
    library, model, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    loaders = (ON_GPU if int(sys.argv[4]) else WAYS)[library]
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    ways: dict[str, Way] = {}
    found: dict[str, dict[str, str]] = {"ways": {}, "left_out": {}}
    for name, (package, load) in loaders.items():
        try:
            found["ways"][name] = f"{package} {version(package)}"
            ways[name] = load(model, threads)
            ways[name](["a text"])
            found["ways"][name] = ", ".join((found["ways"][name], *_notes))
            _notes.clear()
        except PackageNotFoundError:
            found["ways"].pop(name, None)
            found["left_out"][name] = f"{package} is not installed in {sys.executable}"
        except Exception as error:  # noqa: BLE001  # foreign libraries, foreign errors
            found["ways"].pop(name, None)
            found["left_out"][name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    print(json.dumps(found), file=answers, flush=True)

    for line in sys.stdin:
        order = json.loads(line)
        texts, seconds, vectors = order["texts"], [], []
        for call in [[text] for text in texts] if order["one_by_one"] else [texts]:
            began = time.perf_counter()
            vectors.append(ways[order["way"]](call))
            seconds.append(time.perf_counter() - began)
        np.save(order["vectors"], np.concatenate(vectors))
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)
    os._exit(0)  # some libraries' threads outlive the main one


def _sentence_transformers(
    model: Path, threads: int, *, dtype: str, device: str = "cpu", batch_size: int = BATCH
) -> Way:
    encoder = _encoder(model, threads, dtype, device)

    def encode(texts: list[str]) -> Vectors:
        # numpy has no bfloat16, so vectors go through a tensor
        vectors = encoder.encode(texts, batch_size=batch_size, convert_to_tensor=True)
        found: Vectors = vectors.float().cpu().numpy()
        return found

    def encode_float32(texts: list[str]) -> Vectors:
        found: Vectors = encoder.encode(texts, batch_size=batch_size)
        return found

    return encode_float32 if dtype == "float32" else encode


def _openvino(model: Path, threads: int, *, precision: str | None) -> Way:
    openvino = import_module("openvino")
    encoder = _encoder(model, threads, "float32")
    graph = openvino.convert_model(_whole_model(encoder), example_input=_features(encoder, ["a text", "b"]))
    # Two streams of one thread are faster for many batches than all threads on one.
    hints: dict[str, Any] = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": threads}
    # It would choose its default by what the CPU has, also where it is to use less.
    precision = precision if _has_bfloat16() else "f32"
    if precision is not None:
        hints["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.compile_model(graph, "CPU", hints)
    products = Counter(
        node.get_rt_info()["primitiveType"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "MatMul")
    )
    _notes.append(", ".join(f"{count} products by {name}" for name, count in products.items()))

    def embed(texts: list[str]) -> Vectors:
        found: list[Any] = [None] * len(texts)

        def keep(request: Any, rows: list[int]) -> None:
            for row, vector in zip(rows, request.get_output_tensor(0).data.copy(), strict=True):
                found[row] = vector

        queue = openvino.AsyncInferQueue(compiled)
        queue.set_callback(keep)
        for rows in _batches(texts):
            features = _features(encoder, [texts[row] for row in rows])
            queue.start_async({key: value.numpy() for key, value in features.items()}, rows)
        queue.wait_all()
        return np.stack(found)

    return embed


def _onnx(model: Path, threads: int) -> Way:
    onnxruntime, torch = import_module("onnxruntime"), import_module("torch")
    encoder = _encoder(model, threads, "float32")
    example = _features(encoder, ["a text", "another one"])
    axes = {key: {0: torch.export.Dim("batch"), 1: torch.export.Dim("n_tokens")} for key in example}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(_whole_model(encoder), (), path, kwargs=example, dynamic_shapes=axes, dynamo=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(texts: list[str]) -> Vectors:
        found: list[Any] = [None] * len(texts)
        for rows in _batches(texts):
            features = _features(encoder, [texts[row] for row in rows])
            vectors = session.run(None, {key: value.numpy() for key, value in features.items()})[0]
            for row, vector in zip(rows, vectors, strict=True):
                found[row] = vector
        return np.stack(found)

    return embed


def _infinity(model: Path, threads: int, *, dtype: str) -> Way:
    asyncio = import_module("asyncio")
    torch, infinity = import_module("torch"), import_module("infinity_emb")
    torch.set_num_threads(threads)
    loop = asyncio.new_event_loop()
    arguments = infinity.EngineArgs(
        model_name_or_path=str(model),
        engine="torch",
        device="cpu",
        dtype=dtype,
        batch_size=BATCH,
        bettertransformer=False,  # needs a package of its own, and torch does the same by itself today
    )
    engine = infinity.AsyncEmbeddingEngine.from_args(arguments)
    loop.run_until_complete(engine.astart())

    def embed(texts: list[str]) -> Vectors:
        vectors, _ = loop.run_until_complete(engine.embed(sentences=texts))
        return np.asarray(vectors, np.float32)

    return embed


def _naive_celery(model: Path, threads: int) -> Way:
    from benchmarks.naive_app import deployed  # needs what the other Pythons do not have

    task = deployed(model, processes=threads)

    def embed(texts: list[str]) -> Vectors:
        sent = [task.delay(text) for text in texts]
        return np.array([result.get(timeout=300) for result in sent], np.float32)

    return embed


def _has_bfloat16() -> bool:
    """Tell whether the kind of CPU that all are limited to has bfloat16; see `benchmarks.instructions`."""
    return os.environ.get("PENSTOCK_CPU") not in ("avx2", "avx512")


def _encoder(model: Path, threads: int, dtype: str, device: str = "cpu") -> Any:
    torch = import_module("torch")
    torch.set_num_threads(threads)
    if dtype == "bfloat16" and device == "cpu" and not _has_bfloat16():
        raise RuntimeError("such a CPU has no bfloat16, and what stands in for it takes minutes")
    library = import_module("sentence_transformers")
    kwargs = {"dtype": getattr(torch, dtype)}
    return library.SentenceTransformer(str(model), device=device, model_kwargs=kwargs).eval()


def _features(encoder: Any, texts: list[str]) -> dict[str, Any]:
    return dict(
        encoder.tokenizer(
            texts, padding=True, truncation=True, max_length=encoder.max_seq_length, return_tensors="pt"
        )
    )


def _whole_model(encoder: Any) -> Any:
    """Return a module from tokens to vectors: transformer, pooling and normalization in one graph."""
    torch = import_module("torch")

    class WholeModel(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch is imported late
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            features = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
            }
            hidden = transformer(**features).last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=1)

    whole = WholeModel()
    transformer = whole.transformer = encoder[0].auto_model
    return whole.eval()


def _batches(texts: Sequence[str]) -> Iterator[list[int]]:
    """Cut the texts, longest first as `encode` does, into batches of places."""
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


WAYS: Final[Mapping[str, Mapping[str, tuple[str, Callable[[Path, int], Way]]]]] = {
    "sentence-transformers": {
        "sentence-transformers float32": (
            "sentence-transformers",
            partial(_sentence_transformers, dtype="float32"),
        ),
        "sentence-transformers bfloat16": (
            "sentence-transformers",
            partial(_sentence_transformers, dtype="bfloat16"),
        ),
    },
    "openvino": {
        "openvino": ("openvino", partial(_openvino, precision=None)),
        "openvino float32": ("openvino", partial(_openvino, precision="f32")),
    },
    "onnx": {"onnx float32": ("onnxruntime", _onnx)},
    "infinity": {
        "infinity float32": ("infinity_emb", partial(_infinity, dtype="float32")),
        "infinity bfloat16": ("infinity_emb", partial(_infinity, dtype="bfloat16")),
    },
    "naive-celery": {"naive Celery": ("celery", _naive_celery)},
}

_on_gpu = partial(_sentence_transformers, device="cuda")
ON_GPU: Final[Mapping[str, Mapping[str, tuple[str, Callable[[Path, int], Way]]]]] = {
    "sentence-transformers": {
        "sentence-transformers float32": (
            "sentence-transformers",
            partial(_on_gpu, dtype="float32", batch_size=128),
        ),
        "sentence-transformers bfloat16": ("sentence-transformers", partial(_on_gpu, dtype="bfloat16")),
        "sentence-transformers bfloat16, batches of 128": (
            "sentence-transformers",
            partial(_on_gpu, dtype="bfloat16", batch_size=128),
        ),
    },
}
"""On a GPU; 128 was the fastest of 32, 128 and 512 on an H100, with both sizes of model."""

if __name__ == "__main__":
    main()

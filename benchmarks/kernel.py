"""Retrieval entropy and top k of a bank of keys: ours, XLA as one writes it, PyTorch, FAISS.

    python benchmarks/kernel.py [--sizes=small|all] [--seconds=S] [--compile_torch] [--table]
                                [--full]

Medians over batches of calls after warm-up, results left on the device; bfloat16 banks, float32 on
a CPU. A row's limit is the larger of two times: its bytes (each key once) at the measured copy
bandwidth (bytes read plus written), its products at the measured matrix rate.
`share_of_copy_bandwidth` is that of one query over the largest bank, which no cache holds;
`slower_than_xla` counts the rows where the fastest of ours takes over 3% longer than XLA as one
writes it (matrix product, log-softmax, top_k); `faiss_ratio` is FAISS flat plus NumPy entropy over
ours, the least of all rows. --table writes this device's rows of the package's measurements, which
the automatic choice reads; --full saves the result. Needs JAX and NumPy alone; PyTorch and FAISS
are measured where installed. On a CPU no size is begun after 400 s, unless --seconds says so.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from mmmem_jax import provenance
from mmmem_jax.kernels.retrieval_entropy import api, retrieval_entropy, xla

RESULTS = Path(__file__).resolve().parent / "results"
TABLE = Path(api.__file__).with_name("measurements.json")
TEMPERATURE = 0.05
SIZES = {
    "small": ((10_000, 100_000, 1_000_000), (384, 1024), (1, 8, 64), (5, 32)),
    "all": ((1_000_000, 100_000, 10_000, 4_000_000), (1024, 384), (1, 8, 64, 512), (5, 32)),
}
MAX_PLAIN_SCORES = 1 << 29  # the plain way keeps and sorts them all
MAX_SMALL_BYTES = 1 << 31  # of a bank of the small sizes: FAISS keeps it a second time


def naive(query, keys, *, top_k: int):
    """What one would write: every score in memory, the library's softmax and top k."""
    dot = functools.partial(jnp.einsum, "bd,nd->bn", preferred_element_type=jnp.float32)
    scores = dot(query, keys) / TEMPERATURE
    log_p = jax.nn.log_softmax(scores, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jax.nn.logsumexp(scores, axis=-1), entropy, *jax.lax.top_k(scores, top_k)


def torch_eager(query, keys, *, top_k: int):
    """The same in PyTorch, operation by operation."""
    scores = (query @ keys.T).float() / TEMPERATURE
    log_p = scores.log_softmax(-1)
    top = scores.topk(top_k, -1)
    return scores.logsumexp(-1), -(log_p.exp() * log_p).sum(-1), top.values, top.indices


def faiss_flat(query, keys, index, *, top_k: int):
    """FAISS's exact index for the top k, and NumPy for the entropy that it does not give."""
    top = index.search(query / TEMPERATURE, top_k)
    scores = query @ keys.T / TEMPERATURE
    m = scores.max(-1, keepdims=True)
    p = np.exp(scores - m)
    mass = p.sum(-1)
    log_z = m[:, 0] + np.log(mass)
    return log_z, log_z - (p * scores).sum(-1) / mass, *top


def medians_us(calls: dict, wait, *, batch_seconds: float = 0.03, repeats: int = 11) -> dict:
    """Median microseconds of each call, over `repeats` batches of about `batch_seconds`, in turn,
    there and back: what slows the machine for a while slows them all. Three batches are enough of
    what takes long.
    """
    counts = {}
    for name, call in calls.items():
        wait(call())
        start = time.perf_counter()
        wait(call())
        once = time.perf_counter() - start
        counts[name] = max(1, min(200, int(batch_seconds / once)))
        repeats = repeats if once < 0.3 else min(repeats, 3)
    times = {name: [] for name in calls}
    for i in range(repeats):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            call = calls[name]
            start = time.perf_counter()
            out = None
            for _ in range(counts[name]):
                out = call()
            wait(out)
            times[name].append((time.perf_counter() - start) / counts[name] * 1e6)
    return {name: statistics.median(of) for name, of in times.items()}


def median_us(call, wait) -> float:
    """Median microseconds of one call."""
    return medians_us({"": call}, wait)[""]


def random(shape, dtype, seed: int = 0):
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, dtype))()


def limits(dtype) -> dict:
    """The device's copy bandwidth in GB/s (read plus written) and matrix rate in TFLOP/s."""
    gpu = jax.default_backend() == "gpu"
    size = 1 << 30 if gpu else 1 << 26
    x = random((size,), jnp.float32)
    copies = {"jax": 2 * x.nbytes / median_us(lambda: jnp.copy(x), jax.block_until_ready) / 1e3}
    if not gpu:
        source = np.asarray(x)
        target = np.empty_like(source)
        us = median_us(lambda: np.copyto(target, source), lambda _: None)
        copies["numpy"] = 2 * source.nbytes / us / 1e3
    x = None
    torch = import_torch()
    if torch is not None:
        y = torch.randn(size, device="cuda" if gpu else "cpu")
        out = torch.empty_like(y)
        wait = torch.cuda.synchronize if gpu else lambda: None
        us = median_us(lambda: out.copy_(y), lambda _: wait())
        copies["torch"] = 2 * 4 * y.numel() / us / 1e3
        del y, out
    side = 8192 if gpu else 512
    a, b = random((side, side), dtype), random((side, side), dtype, 1)
    matmul = jax.jit(lambda a, b: a @ b)
    us = median_us(lambda: matmul(a, b), jax.block_until_ready)
    return {
        "copy_gb_s": max(copies.values()),
        "copies_gb_s": copies,
        "matmul_tflops": 2 * side**3 / us / 1e6,
    }


def import_torch():
    """PyTorch, on the same kind of device as JAX; None where it is not there."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch if torch.cuda.is_available() == (jax.default_backend() == "gpu") else None


def programs(query, keys, top_ks, names) -> dict:
    """{(top_k, name): call} compiled beforehand, several at once."""

    def build(job):
        top_k, name = job
        kwargs = {"temperature": TEMPERATURE, "implementation": name}
        function = naive if name == "naive" else functools.partial(retrieval_entropy, **kwargs)
        program = jax.jit(functools.partial(function, top_k=top_k)).lower(query, keys).compile()
        return job, functools.partial(program, query, keys)

    jobs = [(k, name) for k in top_ks for name in names]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(pool.map(build, jobs))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed, not measured"


def difference(a, b) -> dict:
    """How far two results are apart: log_z, entropy and values; and how many indices agree."""
    a, b = ([np.asarray(x) for x in out] for out in (a, b))
    return {
        "max_abs_diff": float(max(np.abs(x - y).max() for x, y in zip(a[:3], b[:3], strict=True))),
        "same_indices": float(np.mean(a[3] == b[3])),
    }


class Others:
    """What other libraries make of a bank of the same size: calls by name."""

    def __init__(self, keys, compile_torch: bool):
        self.torch, self.index = import_torch(), None
        gpu = jax.default_backend() == "gpu"
        if self.torch is not None:
            like = {
                "device": "cuda" if gpu else "cpu",
                "dtype": getattr(self.torch, str(keys.dtype)),
            }
            self.random = functools.partial(self.torch.randn, **like)
            self.torch_keys = self.random(*keys.shape)
            self.functions = {"torch_eager": torch_eager}
            if compile_torch:
                self.functions["torch_compiled"] = self.torch.compile(torch_eager, dynamic=False)
        if not gpu and importlib.util.find_spec("faiss"):
            import faiss

            self.threads = faiss.omp_set_num_threads
            self.keys = np.asarray(keys)
            self.index = faiss.IndexFlatIP(keys.shape[1])
            self.index.add(self.keys)

    def calls(self, query, top_k: int) -> dict:
        """By name; FAISS with one thread and with all: on a busy machine one may be the faster."""
        out = {}
        if self.torch is not None:
            args = self.random(*query.shape), self.torch_keys
            for name, function in self.functions.items():
                out[name] = functools.partial(function, *args, top_k=top_k)
        if self.index is not None:
            args = np.asarray(query), self.keys, self.index

            def faiss_call(threads):
                self.threads(threads)
                return faiss_flat(*args, top_k=top_k)

            for threads in {1, os.cpu_count()}:
                out[f"faiss_{threads}"] = functools.partial(faiss_call, threads)
        return out

    def wait(self, out) -> None:
        """Until the results of any call are there."""
        jax.block_until_ready(out)
        if self.torch is not None and self.torch.cuda.is_available():
            self.torch.cuda.synchronize()


def measure_bank(num_keys, dim, batches, top_ks, limit, deadline, compile_torch):
    """Rows of one bank, until the deadline."""
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    keys = random((num_keys, dim), dtype)
    others = Others(keys, compile_torch)
    for num_queries in batches:
        if time.perf_counter() > deadline:
            return
        query = random((num_queries, dim), dtype, 1) * dim**-0.5
        plain = num_queries * num_keys <= MAX_PLAIN_SCORES
        names = api.available(xla.Bank(keys))
        calls = programs(query, keys, top_ks, [*names, *["naive"] * plain])
        for top_k in top_ks:
            mine = {name: call for (k, name), call in calls.items() if k == top_k}
            theirs = others.calls(query, top_k) if plain else {}
            # Others' threads spin for a while after a call, so ours come before.
            us = medians_us(mine, others.wait) | medians_us(theirs, others.wait)
            there = {name: us.pop(name) for name in list(us) if name not in names}
            faiss = [there.pop(name) for name in list(there) if name.startswith("faiss")]
            there |= {"faiss_and_numpy": min(faiss)} if faiss else {}
            best = min(us, key=us.get)
            products = 2 * num_queries * num_keys * dim
            at_least = max(
                keys.nbytes / limit["copy_gb_s"] / 1e3, products / limit["matmul_tflops"] / 1e6
            )
            row = {
                "queries": num_queries, "keys": num_keys, "dim": dim, "top_k": top_k,
                "dtype": str(keys.dtype), "microseconds": us, "others_microseconds": there,
                "fastest": best, "bytes": keys.nbytes, "gb_s": keys.nbytes / us[best] / 1e3,
                "share_of_copy_bandwidth": keys.nbytes / us[best] / 1e3 / limit["copy_gb_s"],
                "share_of_limit": at_least / us[best],
            }  # fmt: skip
            for name in names[1:]:
                row[name] = difference(calls[top_k, name](), calls[top_k, names[0]]())
            yield row


def measure(args: argparse.Namespace) -> dict:
    begun = time.perf_counter()
    limit = limits(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)
    num_keys, dims, batches, top_ks = SIZES[args.sizes]
    rows = []
    for n in num_keys:
        for dim in dims:
            bank_bytes = n * dim * (2 if jax.default_backend() == "gpu" else 4)
            if args.sizes == "small" and bank_bytes > MAX_SMALL_BYTES:
                continue
            if time.perf_counter() - begun > args.seconds:
                continue
            settings = (n, dim, batches, top_ks, limit, begun + args.seconds, args.compile_torch)
            for row in measure_bank(*settings):
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    ours = [(min(r["microseconds"].values()), r["others_microseconds"]) for r in rows]
    faiss = [theirs["faiss_and_numpy"] / us for us, theirs in ours if "faiss_and_numpy" in theirs]
    largest = max((r["bytes"] for r in rows), default=None)
    shares = [r["share_of_copy_bandwidth"] for r in rows if r["bytes"] == largest]
    banks = {(n, dim) for n in SIZES["all"][0] for dim in SIZES["all"][1]}
    unmeasured = sorted(banks - {(r["keys"], r["dim"]) for r in rows})
    return {
        "load_average": os.getloadavg()[0],  # a busy machine's times say little
        "compared_with": {name: version(name) for name in ("faiss-cpu", "torch")},
        "unmeasured": [f"{n} keys of {dim}" for n, dim in unmeasured],
        **limit,
        "share_of_copy_bandwidth": max(shares, default=None),
        "slower_than_xla": sum(us > 1.03 * theirs.get("naive", us) for us, theirs in ours),
        "faiss_ratio": min(faiss, default=None),
        "rows": rows,
    }


def write_table(result: dict) -> None:
    """This device's rows of the package's measurements, and what they were measured with."""
    keep = ("queries", "keys", "dim", "top_k", "dtype", "microseconds")
    kind = jax.devices()[0].device_kind
    table = json.loads(TABLE.read_text())
    rows = [row for row in table["rows"] if row["device"] != kind]
    rows += [{"device": kind} | {k: r[k] for k in keep} for r in result["rows"]]
    devices = table["devices"] | {kind: {k: result[k] for k in ("versions", "date")}}
    provenance.write_json(TABLE, {"devices": devices, "rows": rows})


def main() -> None:
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", choices=SIZES, default="all" if gpu else "small")
    parser.add_argument(
        "--seconds", type=float, default=1e9 if gpu else 400, help="begin no size after this"
    )
    parser.add_argument("--compile_torch", action="store_true", help="and PyTorch compiled")
    parser.add_argument("--table", action="store_true", help="write the package's measurements")
    parser.add_argument("--full", action="store_true", help="save to results/kernel_BACKEND.json")
    args = parser.parse_args()
    result = measure(args) | provenance.provenance()
    if args.table:
        write_table(result)
    if args.full:
        provenance.write_json(RESULTS / f"kernel_{jax.default_backend()}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

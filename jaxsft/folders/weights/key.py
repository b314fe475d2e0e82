"""Whether two hosts have the same weights, without reading them all.

In: what a model is stored as. Out: a key that changes with names, dtypes and shapes of all tensors, with the headers of
all files, and with a few numbers from tensors spread over the whole model: another fine-tune of the same model differs
there. A tensor that is damaged elsewhere is not noticed.
"""

import concurrent.futures
import hashlib

from jaxsft.folders.weights.stored import Stored, StoredTensor

TENSORS_READ, NUMBERS_READ = 48, 256


def weights_key(stored: Stored) -> str:
    """A key of the weights in a folder, equal where the folders are copies of each other; hex.

    Raises:
        OSError: a tensor cannot be read.
    """
    key = hashlib.sha256()
    for file in stored.files:
        key.update(f"{file.name}\n".encode() + file.header)
    names = sorted(stored.tensors)
    for name in names:
        tensor = stored.tensors[name]
        key.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    readable = [stored.tensors[name] for name in names if stored.tensors[name].dtype is not None]
    chosen = readable[:: -(-len(readable) // TENSORS_READ) or 1]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for sample in pool.map(_sample, chosen):
            key.update(sample)
    return key.hexdigest()[:16]


def _sample(tensor: StoredTensor) -> bytes:
    """The beginning of the row in the middle."""
    *rows, columns = tensor.shape or (1,)
    num_rows = 1
    for size in rows:
        num_rows *= size
    if not num_rows * columns:
        return b""
    return tensor.read(slice(num_rows // 2, num_rows // 2 + 1), slice(0, min(columns, NUMBERS_READ))).tobytes()
